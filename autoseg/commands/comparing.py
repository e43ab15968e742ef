"""The command that compares plans by running them."""

from __future__ import annotations

import argparse

from autoseg.commands.showing import EXIT_OK, cache_of, consoles, print_json, tell_cache
from autoseg.errors import AutosegError, counted
from autoseg.plan import fingerprint, own_or_shipped, probe_hardware, read_hardware
from autoseg.recipes.compare import Ground, compare, read_spec
from autoseg.report import comparison, terminal
from autoseg.schema import Hardware, save


def run_compare(options: argparse.Namespace) -> int:
    """Run every change and seed of a SPEC, and rank them."""
    console, results = consoles(options)
    spec = read_spec(own_or_shipped(options.spec, "compare"))
    with terminal.progress(console) as progress:
        facts = fingerprint(options.data, cache_of(options), progress)
    on = Ground(options.data, facts, _hardware(options), options.judge, options.cache)
    ranking = compare(spec, on, options.out, quick=options.quick, at_once=options.at_once, tell=console.print)
    folder = options.out / "quick" if options.quick else options.out
    comparison.write_comparison(folder, folder / "report.html")
    results.print(comparison.ranking_table(ranking))
    if ranking.best:
        results.print(f"go on with {' and '.join(ranking.best)}: {ranking.because}")
    results.print(f"wrote {folder}/ranking.json, ranking.csv, best_plan.json and report.html")
    tell_cache(options, console)
    print_json(options, ranking)
    if ranking.failed:
        names = ", ".join(ranking.failed)
        raise AutosegError(
            folder, f"{counted(len(ranking.failed), 'run')} failed: {names}", "see above; the same command tries again"
        )
    return EXIT_OK


def _hardware(options: argparse.Namespace) -> Hardware:
    """Return the machine as it was when this comparison began, so that its plans stay the same."""
    path = options.out / "hardware.json"
    if not path.is_file():
        save(probe_hardware(), path)
    return read_hardware(str(path))
