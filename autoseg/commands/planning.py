"""Commands up to a plan: import, fingerprint, plan, profile."""

from __future__ import annotations

import argparse
import functools
import math
import os
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from autoseg.arguments import to_cells, to_instances, to_seconds, to_values, to_voxel_size
from autoseg.commands.showing import EXIT_OK, cache_of, consoles, find_plan, print_json, tell_cache
from autoseg.data.convert import import_volumes
from autoseg.data.writer import ImportRequest
from autoseg.errors import PlanError, counted
from autoseg.plan import (
    fingerprint,
    gpus_of_run,
    make_plan,
    own_or_shipped,
    parse_settings,
    probe_hardware,
    read_evidence,
    read_hardware,
    resolution_groups,
    runs_on_one,
    share_hardware,
)
from autoseg.plan.rules_loss import occurrences_of
from autoseg.plan.weighting import STRATEGIES
from autoseg.recipes.profile import profile_plan
from autoseg.recipes.speed import plan_here
from autoseg.report import data_tables, terminal
from autoseg.schema import Fingerprint, Hardware, Plan, Profile, load_as, save

PROBED = ("hardware.step_gflops", "hardware.disk_free_bytes")
SHORT_HASH = 12

ANY_EDGE_NM = (0.0, 1e9)


def run_import(options: argparse.Namespace) -> int:
    """Bring volumes into DATA."""
    request = ImportRequest(
        data=options.data,
        name=options.name,
        em=options.em,
        voxel_size_nm=to_voxel_size(options.voxel_size_nm),
        labels=options.labels,
        values=to_values(options.values),
        instances=to_instances(options.instances),
        mask=options.mask,
        ignore_value=options.ignore_value,
        grid=(options.grid[0], options.grid[1], options.grid[2]),
        crops=to_cells("--crops", options.crops) if options.crops else None,
        validate=to_cells("--validate", options.validate),
    )
    console, results = consoles(options)
    imported = import_volumes(request)
    for remark in imported.remarks:
        console.print(f"note: {remark}")
    crops = list(imported.crops)
    if math.prod(request.grid) > 1:
        crops = [f"{crop} (cell {cell})" for crop, cell in zip(crops, imported.cells, strict=True)]
    labelled = f"crops {', '.join(crops)}" if crops else "EM without labels"
    results.print(f"imported {', '.join(imported.datasets)} into {options.data}: {labelled}")
    if crops:
        console.print(f"next: autoseg plan {options.data}")
    print_json(options, imported._asdict())
    return EXIT_OK


def run_fingerprint(options: argparse.Namespace) -> int:
    """Measure DATA."""
    console, results = consoles(options)
    with terminal.progress(console) as progress:
        facts = fingerprint(options.data, cache_of(options), progress)
    if options.out:
        save(facts, options.out)
    for table in data_tables.fingerprint_tables(facts):
        results.print(table)
    if options.weights:
        found = occurrences_of(facts, [entry.name for entry in facts.classes])
        weights = {name: rule(found) for name, rule in STRATEGIES.items()}
        for table in data_tables.weight_tables(weights, {name: one.share for name, one in found.items()}):
            results.print(table)
    data_tables.warn(facts, console)
    tell_cache(options, console)
    print_json(options, facts)
    return EXIT_OK


def run_plan(options: argparse.Namespace) -> int:
    """Plan, or show what differs between two plans."""
    console, results = consoles(options)
    if options.diff:
        return _plan_difference(options, results)
    if options.fingerprint and options.data:
        raise PlanError("--fingerprint", "and DATA are both given", "pass one of them")
    local = options.hardware == "local"
    machine = probe_hardware() if local else read_hardware(options.hardware)
    hardware = share_hardware(machine, options.side_by_side)
    out = options.out or Path("plans") / f"{hardware.name}.json"
    settings = _settings(options)
    if options.fingerprint:
        facts = load_as(own_or_shipped(options.fingerprint, "fingerprints"), Fingerprint)
    else:
        with terminal.progress(console) as progress:
            facts = fingerprint(options.data or Path("data"), cache_of(options), progress)
    data_tables.warn(facts, console)
    evidence = read_evidence(options.scores) if options.scores else None
    wanted = _by_resolution(facts, hardware, out, settings) if options.by_resolution else {out: (settings, "")}
    make = functools.partial(plan_here, runs_on_one=runs_on_one(machine, options.side_by_side)) if local else make_plan
    if local and (busy := load_of_others(machine)):
        console.print(f"warning: {busy}: the time of a step, and what rests on it, is a guess")
    plans = {path: make(path.stem, facts, hardware, of_path, evidence) for path, (of_path, _) in wanted.items()}
    for path, plan in plans.items():
        if other := _other_data(path, plan):
            console.print(f"note: {path} was a plan for other data ({other}), and is replaced; --out keeps several")
        save(plan, path)
        results.print(terminal.plan_table(plan))
        results.print(wanted[path][1] or terminal.plan_summary(plan), style="bold")
        where = f" --data {options.data}" if options.data else ""
        results.print(f"wrote {path}; next: autoseg train --plan {path}{where}")
    if options.side_by_side > 1 and machine.gpus:
        for run in range(options.side_by_side):
            mine = ",".join(map(str, gpus_of_run(machine, options.side_by_side, run)))
            console.print(f"run {run + 1} of {options.side_by_side}: CUDA_VISIBLE_DEVICES={mine} autoseg train ...")
    tell_cache(options, console)
    print_json(options, {"plans": [*plans.values()]} if options.by_resolution else plans[out])
    return EXIT_OK


def _other_data(path: Path, plan: Plan) -> str | None:
    """Return the EM volumes of the plan that is at that path, if it was made for other data."""
    try:
        before = load_as(path, Plan)
    except PlanError:
        return None
    if before.fingerprint_sha256 == plan.fingerprint_sha256:
        return None
    return ", ".join(volume.name for volume in before.normalization.volumes) or before.fingerprint_sha256[:SHORT_HASH]


def load_of_others(hardware: Hardware) -> str | None:
    """Return in words that other processes keep the machine busy, None where they do not."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = os.cpu_count() or hardware.cpu_threads
    return f"other processes are busy here (load {load:.1f} on {threads} threads)" if load > threads else None


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the user decided, by dotted field."""
    settings = parse_settings(options.set)
    if options.budget:
        if "budget_s" in settings:
            raise PlanError("--budget", "and --set budget_s are both given", "leave out one of them")
        settings["budget_s"] = to_seconds(options.budget)
    if options.classes:
        settings["classes.names"] = [name.strip() for name in options.classes.split(",") if name.strip()]
    return settings | {f"split.{n}": v for n in ("folds", "fold") if (v := getattr(options, n)) is not None}


def _by_resolution(
    facts: Fingerprint, hardware: Hardware, out: Path, settings: dict[str, Any]
) -> dict[Path, tuple[dict[str, Any], str]]:
    """Return for each group of classes the path of its plan, named by its voxel size, its settings, and why."""
    for field in ("split.voxel_edge_nm", "name"):
        if field in settings:
            raise PlanError(f"--set {field}", "is what --by-resolution chooses for each plan", "leave out one of them")
    every = make_plan(out.stem, facts, hardware, settings | {"split.voxel_edge_nm": ANY_EDGE_NM})
    groups = resolution_groups(facts, every.class_names)
    if len(groups) == 1:
        return {out: (settings, "one voxel size serves all classes: there is nothing to split")}
    found = {}
    for group in groups:
        own = {
            field: {name: v for name, v in value.items() if name in group.classes} if field.endswith(".*") else value
            for field, value in settings.items()
        }
        own |= {"classes.names": list(group.classes), "split.voxel_edge_nm": group.voxel_edge_nm}
        found[out.with_stem(f"{out.stem}-{group.edge_nm:.3g}nm")] = own, group.because
    return found


def _plan_difference(options: argparse.Namespace, results: Console) -> int:
    a, b = (load_as(own_or_shipped(path, "plans"), Plan) for path in options.diff)
    rows = [row for row in difference(a, b) if row[0] != "reasons"]
    results.print(_difference_table(rows, (a, b), [str(path) for path in options.diff]))
    print_json(options, {field: [x, y] for field, x, y in rows})
    return EXIT_OK


def difference(a: Any, b: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted field, value in a, value in b) wherever two nested values or records differ."""
    of_a, of_b = _fields(a), _fields(b)
    if of_a is None or of_b is None:
        return [] if a == b else [(name, a, b)]
    rows = []
    for key in [*of_a, *(key for key in of_b if key not in of_a)]:
        rows += difference(of_a.get(key), of_b.get(key), f"{name}.{key}" if name else key)
    return rows


def _fields(value: Any) -> dict[str, Any] | None:
    if isinstance(value, msgspec.Struct):
        return {field.encode_name: getattr(value, field.name) for field in msgspec.structs.fields(value)}
    return value if isinstance(value, dict) else None


def _difference_table(rows: list[tuple[str, Any, Any]], plans: tuple[Plan, Plan], names: list[str]) -> Table:
    """Return the fields in which two plans differ, those that the user set marked, noise of the probe apart."""
    probed = [row for row in rows if row[0].startswith(PROBED)]
    rows = [row for row in rows if row not in probed]
    by_user = [{reason.field for reason in plan.reasons if reason.source == "user"} for plan in plans]
    table = Table(title=counted(len(rows), "field", "differ"), title_justify="left")
    for name in ("field", *names):
        table.add_column(name, overflow="fold")
    for field, *values in rows:
        cells = [field]
        for value, named in zip(values, by_user, strict=True):
            text = value[:SHORT_HASH] if field.endswith("sha256") else terminal.field_text(field, value)
            is_set = any(f"{field}.".startswith(f"{name}.") for name in named)
            cells.append(f"{text} (user)" if is_set else text)
        table.add_row(*cells)
    notes = ["(user): set by the user, the rest follows"] if any(by_user) and rows else []
    fields = dict.fromkeys(name for name in PROBED for row in probed if row[0].startswith(name))
    notes += [f"{name} differs too: it is measured anew for each plan" for name in fields]
    table.caption, table.caption_justify = "; ".join(notes) or None, "left"
    return table


def run_profile(options: argparse.Namespace) -> int:
    """Measure what a plan costs here."""
    console, results = consoles(options)
    plan = find_plan(options, console)
    found = profile_plan(plan, options.data, cache_of(options), device=options.device, tell=console.print)
    _show_profile(found, results)
    print_json(options, found)
    return EXIT_OK


def _show_profile(profile: Profile, console: Console) -> None:
    """Print seconds of a step, share waited and memory by number of workers, then memory and what to choose."""
    table = Table(title="training steps with their batches", title_justify="left")
    for name in ("workers", "s a step", "waiting", "MiB a worker", ""):
        table.add_column(name, justify="left" if not name else "right")
    for trial in profile.trials:
        notes = {"planned": profile.num_workers, "recommended": profile.recommended_workers}
        mine = ", ".join(note for note, workers in notes.items() if workers == trial.num_workers)
        rss = terminal.MISSING if trial.worker_rss_bytes is None else f"{trial.worker_rss_bytes / 2**20:.0f}"
        table.add_row(
            str(trial.num_workers), terminal.number(trial.step_s), f"{trial.batch_wait_fraction:.0%}", rss, mine
        )
    console.print(table)
    measured, predicted = (
        f"{n / 2**20:.0f} MiB" for n in (profile.measured_memory_bytes, profile.predicted_memory_bytes)
    )
    console.print(f"memory of a step: {measured} measured ({profile.measured_by}), {predicted} predicted")
    console.print(f"recommended: num_workers={profile.recommended_workers}: {profile.because}")
