"""Commands of a run: train, predict, evaluate, report, demo."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import msgspec
from rich.console import Console

from autoseg.arguments import to_interval, to_seconds, to_voxel_size
from autoseg.commands.showing import EXIT_OK, EXIT_STOPPED, cache_of, consoles, find_plan, print_json, tell_cache
from autoseg.data.dataset import open_dataset
from autoseg.data.em import measured_anew
from autoseg.data.store import ChunkCache, checksums_in
from autoseg.errors import DataError, PlanError
from autoseg.predict import (
    Region,
    Trained,
    crop_regions,
    cut_roi,
    drop_copy,
    export_labels,
    file_region,
    map_values,
    open_run,
    predict_regions,
    refuse_existing,
    volume_regions,
    zarr_of,
)
from autoseg.recipes import demo as demo_recipe
from autoseg.recipes.dev_run import dev_run
from autoseg.recipes.training import data_of, split_of, train_on
from autoseg.recipes.validate import evaluate_run
from autoseg.report import terminal
from autoseg.report.comparison import write_comparison
from autoseg.report.page import write_report
from autoseg.schema import Plan, Scores, TunedDecode, load_as, read_json_lines, save
from autoseg.train.launch import torchrun_rank
from autoseg.train.loop import follow_torchrun


def run_train(options: argparse.Namespace) -> int:
    """Train, resume, or try everything once."""
    if torchrun_rank() > 0:  # the first process speaks and writes for all
        return EXIT_STOPPED if follow_torchrun().stopped_by else EXIT_OK
    console, results = consoles(options)
    plan = find_plan(options, console)
    console.print(f"preparing to train {plan.name} on {options.data}")
    cache = cache_of(options)
    if options.fast_dev_run:
        for line in dev_run(plan, options.data, device=options.device, cache=cache):
            results.print(line)
        print_json(options, {"works": True})
        return EXIT_OK
    run = options.run or Path("runs") / plan.name
    view = terminal.TrainingView(console)
    try:
        outcome = train_on(
            plan,
            options.data,
            run,
            device=options.device,
            cache=cache,
            observer=view,
            warn=lambda text: console.print(f"warning: {text}"),
        )
    finally:
        view.close()
    lines = read_json_lines(run / "log.jsonl")
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    results.print(
        terminal.verdict(outcome, losses, [line["mean_dice"] for line in lines if line.get("mean_dice") is not None])
    )
    if (run / "decode.json").is_file():
        results.print(terminal.threshold_line(load_as(run / "decode.json", TunedDecode), plan.decode.thresholds))
    if not outcome.stopped_by:
        console.print(f"run {run}; next: autoseg evaluate --run {run} --per-class, or autoseg report {run}")
    tell_cache(options, console)
    print_json(options, outcome._asdict() | {"run": str(run)})
    return EXIT_STOPPED if outcome.stopped_by else EXIT_OK


def run_predict(options: argparse.Namespace) -> int:
    """Label crops of DATA, or a volume."""
    console, results = consoles(options)
    zarr = zarr_of(options.out)
    trained = open_run(options.run, options.checkpoint, options.device)
    refuse_existing(options.out, trained.plan, options.volume or "", probabilities=options.probabilities)
    regions = _regions(options, trained)
    try:
        covered = _predict_into(zarr, trained, regions, options, console)
    except KeyboardInterrupt:
        if zarr.exists():
            console.print(f"what is done so far is kept in {zarr}")
        raise
    finally:
        for region in regions:
            drop_copy(region)
    if zarr != options.out:
        results.print("\n".join([map_values(trained.plan), *covered]))
    results.print(f"wrote {options.out} with checkpoint {trained.checkpoint}")
    tell_cache(options, console)
    done = {"out": str(options.out), "regions": [r.name for r in regions], "checkpoint": trained.checkpoint}
    print_json(options, done)
    return EXIT_OK


def _regions(options: argparse.Namespace, trained: Trained) -> list[Region]:
    """Return what the user asked to label; the copy of a file is the caller's to drop."""
    if options.data:
        if options.voxel_size_nm:
            raise DataError("--voxel-size-nm", "belongs to --volume FILE", "leave it out: DATA says its own")
        if zarr_of(options.out) != options.out or options.roi_nm:
            raise DataError(options.out, "crops of DATA go into one zarr, whole", "write to .zarr, or use --volume")
        dataset = open_dataset(options.data)
        if dataset.crops:
            return crop_regions(split_of(options.run), dataset, options.crops or "all")
        if options.crops:
            raise DataError("--crops", f"{options.data} has no crops", "leave it out: the EM is labelled whole")
        return volume_regions(dataset)
    if options.crops:
        raise DataError("--crops", "belongs to --data", "use --roi-nm with --volume")
    box = [to_interval(text) for text in options.roi_nm or ()]
    size = to_voxel_size(options.voxel_size_nm) if options.voxel_size_nm else None
    region = file_region(trained.plan, options.volume, cache_of(options) / "em", size)
    try:
        return [cut_roi(region, box) if box else region]
    except DataError:
        drop_copy(region)
        raise


def _predict_into(
    zarr: Path, trained: Trained, regions: list[Region], options: argparse.Namespace, console: Console
) -> list[str]:
    """Fill the zarr, and make the TIFF or HDF5 file of it that was asked for; return what its map covers."""
    for remark in filter(None, (region.remark for region in regions)):
        console.print(f"note: {remark}")
    for size in {region.grid.voxel_size_nm for region in regions}:
        same = " as planned" if size == trained.plan.voxel_size_nm else f", resampled to {_nm(trained.plan)} and back"
        console.print(f"EM of {' x '.join(f'{v:g}' for v in size)} nm{same}")
    checksums, exports = checksums_in(cache_of(options)), zarr != options.out
    graded = options.probabilities or exports  # by which the label map decides
    for em in measured_anew(trained.plan.normalization, [r.em for r in regions], ChunkCache(0, checksums)):
        console.print(f"{options.volume or em}: no EM that the plan measured, so its own grey values are used")
    with terminal.progress(console) as progress:
        predict_regions(trained, regions, zarr, probabilities=graded, checksums=checksums, progress=progress)
    if not exports:
        return []
    covered = export_labels(zarr, regions[0].grid, trained.plan, options.out, probabilities=options.probabilities)
    shutil.rmtree(zarr, ignore_errors=True)
    return covered


def run_evaluate(options: argparse.Namespace) -> int:
    """Score a run."""
    console, results = consoles(options)
    if options.pred and (options.checkpoint or options.device):
        raise DataError("--pred", "is scored as it is", "leave out --checkpoint and --device")
    run = options.run or _only_run()
    if not (run / "plan.json").is_file():
        raise PlanError(run, "is not a run (no plan.json)", "pass the folder given to `autoseg train --run`")
    data = options.data or data_of(run)
    with terminal.progress(console) as progress:
        judged = evaluate_run(
            run,
            data,
            prediction=options.pred,
            which=options.checkpoint or "best",
            device=options.device or "auto",
            cache=cache_of(options),
            progress=progress,
        )
    out = options.out or run / "scores.json"
    if out.is_file() and (before := load_as(out, Scores)).data != judged.scores.data:
        console.print(f"note: {out} held scores on {before.data} and is replaced; --out keeps several")
    save(judged.scores, out)
    results.print(f"scored on {judged.on}")
    if options.per_class:
        results.print(terminal.score_table(judged.scores, title=f"{run} on {data}"))
    else:
        results.print(
            f"mean Dice {terminal.number(judged.scores.mean_dice)} over {len(judged.scores.per_class)} classes"
        )
    if options.against:
        old = load_as(options.against, Scores)
        results.print(terminal.change_table(judged.scores, old, f"against {options.against}"))
    results.print(f"wrote {out}")
    print_json(options, judged.scores)
    return EXIT_OK


def run_report(options: argparse.Namespace) -> int:
    """Write the page of a run."""
    _, results = consoles(options)
    out = options.out or options.run / "report.html"
    if (options.run / "ranking.json").is_file():
        write_comparison(options.run, out)
        results.print(f"wrote {out} and {options.run / 'ranking.csv'}")
        print_json(options, {"report": str(out)})
        return EXIT_OK
    write_report(options.run, out, options.scores, options.cache)
    results.print(f"wrote {out}")
    print_json(options, {"report": str(out)})
    return EXIT_OK


def run_demo(options: argparse.Namespace) -> int:
    """Do the main job on synthetic data."""
    console, results = consoles(options)
    view = terminal.TrainingView(console)
    try:
        demo = demo_recipe.run_demo(
            options.dir,
            observer=view,
            tell=console.print,
            budget_s=to_seconds(options.budget) if options.budget else None,
            planned=lambda plan: console.print(terminal.plan_table(plan)),
        )
    finally:
        view.close()
    if demo is None:
        console.print("stopped; the same command goes on")
        return EXIT_STOPPED
    title = "Dice on a volume that the run never saw, beside the best grey-value threshold per class"
    results.print(terminal.score_table(demo.scores, demo.by_threshold, title=title))
    report = options.dir / "report.html"
    write_report(options.dir / "run", report, options.dir / "scores.json")
    results.print(f"wrote {options.dir / 'scores.json'} and {report}")
    print_json(options, {"scores": msgspec.to_builtins(demo.scores), "by_threshold": demo.by_threshold})
    return EXIT_OK


def _only_run() -> Path:
    runs = sorted(path.parent for path in Path("runs").glob("*/plan.json"))
    if len(runs) != 1:
        found = f"{len(runs)} runs: {', '.join(str(run) for run in runs)}" if runs else "no run"
        raise PlanError("runs", f"holds {found}", "say which: --run RUN" if runs else "train one first: autoseg train")
    return runs[0]


def _nm(plan: Plan) -> str:
    return " x ".join(f"{v:g}" for v in plan.voxel_size_nm) + " nm"
