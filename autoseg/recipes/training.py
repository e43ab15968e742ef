"""plan + DATA -> RUN, with what a run must know of its data: does the plan fit, and which DATA was it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from autoseg.data.codes import default_cache
from autoseg.data.em import measured_anew
from autoseg.data.split import derive_split, split_crops
from autoseg.data.store import ChunkCache, checksums_in
from autoseg.errors import PlanError
from autoseg.plan import fingerprint, probe_hardware, shrink
from autoseg.schema import Fingerprint, Observer, Outcome, Plan, Split, load_as, save, sha256
from autoseg.train import train
from autoseg.train.journal import adapt, adaptation
from autoseg.train.launch import torchrun_size

Warn = Callable[[str], None]


def train_on(
    plan: Plan,
    data: Path,
    run: Path,
    *,
    device: str = "auto",
    cache: Path | None = None,
    observer: Observer | None = None,
    warn: Warn = lambda text: None,
) -> Outcome:
    """Train the plan on DATA into RUN; on another DATA than the plan's the split is derived again and recorded."""
    cache = cache or default_cache()
    facts = fingerprint(data, cache)
    _check_classes(plan, facts, data)
    changes, events = _changes(plan, run, device, warn)
    if sha256(facts) != plan.fingerprint_sha256:
        warn(f"{data} is not the data that {plan.name} was planned for (its fingerprint differs)")
        split = _split_for(plan, facts, data, warn)
        if split != plan.split:
            changes["split"] = split
        _tell_measured(plan, facts, data, cache, warn)
    used = msgspec.structs.replace(plan, **changes)
    remember = functools.partial(_remember, run, data, facts, changes.get("split"), events)
    return train(plan, data, run, used=used, device=device, cache=cache, observer=observer, claimed=remember)


def _changes(plan: Plan, run: Path, device: str, warn: Warn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what differs from the plan on this machine: what the run wrote down, and what must shrink now."""
    before = adaptation(run, "machine")
    changes = dict(before["changes"]) if before else {}
    more, because = shrink(msgspec.structs.replace(plan, **changes), probe_hardware(), device, torchrun_size())
    if not more:
        return changes, []
    for line in because:
        warn(f"adapted to this machine: {line}")
    changes |= more
    return changes, [{"event": "machine", "changes": changes, "because": because}]


def _remember(run: Path, data: Path, facts: Fingerprint, split: Split | None, events: list[dict[str, Any]]) -> None:
    """Write down, once, which DATA a run learns from, and its split if not the plan's; refuse other DATA later.

    What a machine changes is written down whenever it changes anew.
    """
    for event in events:
        adapt(run, event)
    before = run / "fingerprint.json"
    if before.exists():
        if sha256(load_as(before, Fingerprint)) != sha256(facts):
            raise PlanError(run, f"began with other data than {data}", "resume with that, or choose another --run")
        return
    if split is not None:
        adapt(run, {"event": "split", "split": msgspec.to_builtins(split)})
    adapt(run, {"event": "data", "path": str(data.resolve())})
    save(facts, run / "fingerprint.json")


def data_of(run: Path) -> Path:
    """Return the DATA that the run was trained on."""
    event = adaptation(run, "data")
    if event is None:
        raise PlanError(run, "does not say which data it was trained on", "pass --data")
    return Path(event["path"])


def split_of(run: Path) -> Split:
    """Return the split the run used: its plan's, unless it had to be derived again."""
    event = adaptation(run, "split")
    return load_as(run / "plan.json", Plan).split if event is None else msgspec.convert(event["split"], Split)


def _check_classes(plan: Plan, facts: Fingerprint, data: Path) -> None:
    known = {entry.name for entry in facts.classes}
    missing = [name for name in plan.class_names if name not in known]
    if missing:
        number = f"{len(missing)} of the {len(plan.class_names)} classes of {plan.name}"
        what = f"does not annotate {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} ({number})"
        raise PlanError(data, what, f"plan for this data: autoseg plan {data} --hardware {plan.hardware.name}")


def _tell_measured(plan: Plan, facts: Fingerprint, data: Path, cache: Path, warn: Warn) -> None:
    """Name the EM volumes that the plan has no grey values of; they are measured whenever they are opened."""
    root = data.parent if data.suffix == ".csv" else data
    ems = [root / volume.path for volume in facts.volumes]
    chunks = ChunkCache(0, checksums_in(cache))
    for em in measured_anew(plan.normalization, ems, chunks):
        warn(f"{em} is no EM that {plan.name} measured; its own grey values are used: plan anew to write them down")


def _split_for(plan: Plan, facts: Fingerprint, data: Path, warn: Warn) -> Split:
    """Return the plan's split if every region of it exists in this data, else derive it by the plan's rule."""
    crops = split_crops(facts, plan.class_names, plan.split.voxel_edge_nm)
    if not crops:
        raise PlanError(data, f"has no crop of the voxel sizes that {plan.name} trains on", "plan anew for this data")
    shapes = {crop.name: crop.shape_zyx for crop in crops}
    regions = (*plan.split.train, *plan.split.validate)
    fits = all(
        region.crop in shapes
        and all(b <= n for b, n in zip(region.box(shapes[region.crop]).stop, shapes[region.crop], strict=True))
        for region in regions
    )
    if fits and {region.crop for region in regions} == set(shapes):
        return plan.split
    warn(f"the split of {plan.name} does not fit {data}; it was derived again and written to adaptations.jsonl")
    split = derive_split(crops, plan.seed, folds=plan.split.folds, fold=plan.split.fold)
    return msgspec.structs.replace(split, voxel_edge_nm=plan.split.voxel_edge_nm)
