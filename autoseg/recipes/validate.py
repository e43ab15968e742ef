"""RUN + DATA -> scores: predict what the run may be judged on, then count."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from autoseg.data.codes import default_cache
from autoseg.data.dataset import Dataset, open_dataset
from autoseg.data.em import measured_anew
from autoseg.data.store import ChunkCache, checksums_in
from autoseg.errors import DataError, PlanError
from autoseg.evaluate import Scored, score_labels, voxels_without_em
from autoseg.geometry import Box
from autoseg.plan import fingerprint
from autoseg.predict import Region, check_finished, open_run, predict_regions
from autoseg.recipes.training import data_of, split_of
from autoseg.schema import CropFacts, Fingerprint, Plan, Scores, VolumeFacts, load_as, sha256
from autoseg.train.journal import adaptation

Progress = Callable[[str, int, int], None]


class Judged(NamedTuple):
    """Scores, and in one sentence what they were counted on."""

    scores: Scores
    on: str


def evaluate_run(
    run: Path,
    data: Path,
    *,
    prediction: Path | None = None,
    which: str = "best",
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Judged:
    """Score a run on DATA: on its validation regions if DATA is what it was trained on, else on all crops.

    Without `prediction` the run predicts first, into its own folder; that is kept and reused.
    """
    cache = cache or default_cache()
    dataset, facts = open_dataset(data), fingerprint(data, cache)
    plan = load_as(run / "plan.json", Plan)
    boxes, on = _judged_boxes(run, plan, dataset, facts)
    checkpoint = "given labels"
    if prediction is None:
        trained = open_run(run, which, device)
        prediction = run / "predictions" / f"{_key(data)}-{sha256(facts)[:8]}-{trained.identity[:8]}.zarr"
        regions = [Region(crop.name, crop.em, crop.grid) for crop in dataset.crops if crop.name in boxes]
        predict_regions(trained, regions, prediction, checksums=checksums_in(cache), progress=progress)
        checkpoint = trained.checkpoint
        if new := measured_anew(plan.normalization, [r.em for r in regions], ChunkCache(0, checksums_in(cache))):
            on += f"; EM that the plan did not measure, with its own grey values: {', '.join(map(str, new))}"
    else:
        for name in boxes:
            check_finished(prediction, name)
    known = {entry.name for entry in facts.classes}
    classes = [name for name in plan.class_names if name in known]
    if not classes:
        raise DataError(data, f"annotates none of {', '.join(plan.class_names)}", "evaluate on data with these classes")
    size = plan.voxel_size_nm
    targets = [Scored(dataset.crop(name), box, prediction / name, size) for name, box in boxes.items()]
    scores = score_labels(dataset, targets, classes, cache, progress)
    scores = msgspec.structs.replace(
        scores, run=str(run), checkpoint=checkpoint, data=str(data), prediction=str(prediction)
    )
    if others := sorted(known - set(plan.class_names)):
        on += f"; annotated, but no classes of this run: {', '.join(others)}"
    if hidden := voxels_without_em(targets):
        on += f"; {hidden:,} voxels do not count: the EM under them was never fetched"
    return Judged(scores, on)


def _judged_boxes(run: Path, plan: Plan, dataset: Dataset, facts: Fingerprint) -> tuple[dict[str, Box], str]:
    """Return the box of each crop that may be scored: never a voxel that the run learnt from."""
    seen_path = run / "fingerprint.json"
    if not seen_path.is_file():
        raise PlanError(run, "does not say what it learnt from (no fingerprint.json)", "train with `autoseg train`")
    seen = load_as(seen_path, Fingerprint)
    own = adaptation(run, "data") is not None and dataset.root.resolve() in (data_of(run), data_of(run).parent)
    taught = {crop.name: _overlapping(crop, facts, seen, own) for crop in facts.crops}
    if not any(taught.values()):
        boxes = {crop.name: Box.whole(crop.grid.shape_zyx) for crop in dataset.crops}
        return boxes, f"{_crops(len(boxes))} of {dataset.root}, which the run has not seen"
    regions = {region.crop: region for region in split_of(run).validate}
    boxes = {}
    for crop in facts.crops:
        twins = [twin for twin in taught[crop.name] if twin.grid == crop.grid and twin.name in regions]
        if len(taught[crop.name]) == 1 and twins:
            boxes[crop.name] = regions[twins[0].name].box(crop.shape_zyx)
    if not boxes:
        raise PlanError(run, f"trained on every crop of {dataset.root}", "import other crops as a second DATA")
    return (
        boxes,
        f"the validation regions ({len(boxes)}) that chose its checkpoint: score a second DATA to compare",
    )


def _crops(number: int) -> str:
    return "1 crop" if number == 1 else f"all {number} crops"


def _overlapping(crop: CropFacts, facts: Fingerprint, seen: Fingerprint, own: bool) -> list[CropFacts]:
    """Return the crops the run has seen that share a voxel of EM with this one; `own` if DATA is the run's folder."""
    em = _em(crop, facts)
    return [other for other in seen.crops if _same_em(em, _em(other, seen), own) and _meet(crop, other)]


def _em(crop: CropFacts, facts: Fingerprint) -> VolumeFacts:
    return next(volume for volume in facts.volumes if volume.name == crop.volume)


def _same_em(a: VolumeFacts, b: VolumeFacts, own: bool) -> bool:
    """Return whether two EM volumes are the same: by name in the run's own folder, else by shape and grey values.

    In the run's own folder more EM may have been fetched since, which changes the grey values that were measured.
    """
    if own and a.name == b.name:
        return True
    if a.intensity is None or b.intensity is None:
        return False
    greys = zip((a.intensity.mean, a.intensity.sd), (b.intensity.mean, b.intensity.sd), strict=True)
    shapes = (a.dtype, a.shape_zyx, a.voxel_size_nm) == (b.dtype, b.shape_zyx, b.voxel_size_nm)
    return shapes and all(math.isclose(x, y, rel_tol=1e-6) for x, y in greys)


def _meet(a: CropFacts, b: CropFacts) -> bool:
    """Return whether two crops share more than a hair's breadth along every axis."""
    sides = zip(a.grid.corner_nm, a.grid.extent_nm, b.grid.corner_nm, b.grid.extent_nm, strict=True)
    return all(min(p + m, q + n) - max(p, q) > 1e-3 * min(m, n) for p, m, q, n in sides)


def _key(data: Path) -> str:
    return f"{data.resolve().stem}-{hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8]}"
