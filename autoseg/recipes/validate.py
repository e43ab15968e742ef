"""RUN + DATA -> scores: predict what the run may be judged on, then count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from autoseg.data.codes import default_cache
from autoseg.data.dataset import Dataset, open_dataset
from autoseg.errors import DataError, PlanError
from autoseg.evaluate import Scored, score_labels
from autoseg.geometry import Box
from autoseg.plan import fingerprint
from autoseg.predict import crop_regions, open_run, predict_regions
from autoseg.recipes.training import split_of
from autoseg.schema import CropFacts, Fingerprint, Plan, Scores, load_as

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
        prediction = run / "predictions" / f"{_key(data)}-{trained.identity[:8]}.zarr"
        numbers = ",".join(name.rsplit("/", 1)[1].removeprefix("crop") for name in boxes)
        regions = [r for r in crop_regions(plan, dataset, numbers) if r.name in boxes]
        predict_regions(trained, regions, prediction, progress=progress)
        checkpoint = trained.checkpoint
    known = {entry.name for entry in facts.classes}
    classes = [name for name in plan.class_names if name in known]
    if not classes:
        raise DataError(data, f"annotates none of {', '.join(plan.class_names)}", "evaluate on data with these classes")
    targets = [Scored(dataset.crop(name), box, prediction / name) for name, box in boxes.items()]
    scores = score_labels(dataset, targets, classes, cache, progress)
    scores = msgspec.structs.replace(
        scores, run=str(run), checkpoint=checkpoint, data=str(data), prediction=str(prediction)
    )
    return Judged(scores, on)


def _judged_boxes(run: Path, plan: Plan, dataset: Dataset, facts: Fingerprint) -> tuple[dict[str, Box], str]:
    """Return the box of each crop that may be scored: never a voxel that the run learnt from."""
    seen_path = run / "fingerprint.json"
    seen = load_as(seen_path, Fingerprint).crops if seen_path.is_file() else ()
    known = {_identity(crop) for crop in seen}
    common = [crop.name for crop in facts.crops if _identity(crop) in known]
    if not common:
        boxes = {crop.name: Box.whole(crop.grid.shape_zyx) for crop in dataset.crops}
        return boxes, f"all {len(boxes)} crops of {dataset.root}, none of which the run has seen"
    regions = {region.crop: region for region in split_of(run).validate}
    boxes = {crop.name: regions[crop.name].box(crop.grid.shape_zyx) for crop in dataset.crops if crop.name in regions}
    if not boxes:
        raise PlanError(run, f"trained on every crop of {dataset.root}", "import other crops as a second DATA")
    return boxes, f"{len(boxes)} validation regions, which chose its checkpoint: score on a second DATA to compare"


def _identity(crop: CropFacts) -> bytes:
    """Two crops are the same if place and annotation are; names may repeat between data sets."""
    return msgspec.json.encode((crop.shape_zyx, crop.voxel_size_nm, crop.origin_nm, crop.counts), order="sorted")


def _key(data: Path) -> str:
    return f"{data.resolve().stem}-{hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8]}"
