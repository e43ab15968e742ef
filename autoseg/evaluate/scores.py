"""Labels against annotation: voxel counts by crop and class, and every ratio that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from autoseg.data.classes import Logic
from autoseg.data.codes import open_codes
from autoseg.data.dataset import Crop, Dataset
from autoseg.data.store import ArrayReader, ChunkCache
from autoseg.errors import DataError
from autoseg.geometry import Box, blocks
from autoseg.metrics.overlap import NOTHING, Counts, count, mean, ratios
from autoseg.schema import ScoreRow, Scores

METRIC = "voxel-overlap-1"
BLOCK = (64, 256, 256)
Progress = Callable[[str, int, int], None]


class Scored(NamedTuple):
    """A crop, the box of it (voxels of its labels) that counts, and the folder of its predicted classes."""

    crop: Crop
    box: Box
    prediction: Path


def score_labels(
    dataset: Dataset,
    targets: Sequence[Scored],
    classes: Sequence[str],
    cache: Path,
    progress: Progress = lambda what, done, total: None,
) -> Scores:
    """Return the scores of these classes; voxels whose class is unknown do not count."""
    logic = Logic(dataset.table)
    columns = logic.columns(classes)
    rows: list[ScoreRow] = []
    for done, target in enumerate(targets):
        progress("crops", done, len(targets))
        codes = open_codes(target.crop, target.crop.grid.voxel_size_nm, cache)
        states, _ = logic.complete(logic.rows(codes.states_CK, codes.names))
        for name, k in zip(classes, columns, strict=True):
            reader = _open_prediction(target, name)
            total = NOTHING
            for block in blocks(target.box.shape_zyx, BLOCK):
                box = block.shift(target.box.start)
                total += count(reader.read(box) > 0, codes.codes_ZYX[box.slices], states[:, k])
            whole = target.box == Box.whole(target.crop.grid.shape_zyx)
            row = ScoreRow(
                crop=target.crop.name,
                class_=name,
                tp=total.tp,
                fp=total.fp,
                fn=total.fn,
                box_zyx=None if whole else (target.box.start, target.box.stop),
            )
            rows.append(row)
    progress("crops", len(targets), len(targets))
    return summarize(rows, METRIC)


def summarize(rows: Sequence[ScoreRow], metric: str) -> Scores:
    """Pool the counts of each class over crops, divide, and average over the classes that have a value."""
    pooled: dict[str, Counts] = {}
    for row in rows:
        pooled[row.class_] = pooled.get(row.class_, NOTHING) + Counts(row.tp, row.fp, row.fn)
    per_class = {name: ratios(counts) for name, counts in pooled.items()}
    return Scores(
        metric=metric,
        rows=tuple(rows),
        per_class=per_class,
        mean_dice=mean([score.dice for score in per_class.values()]),
        mean_iou=mean([score.iou for score in per_class.values()]),
    )


def _open_prediction(target: Scored, name: str) -> ArrayReader:
    path = target.prediction / name / "s0"
    if not path.is_dir():
        raise DataError(target.prediction, f"has no prediction of {name}", "predict this crop with the run first")
    reader = ArrayReader(path, ChunkCache(128 * 2**20))
    if reader.shape_zyx != target.crop.grid.shape_zyx:
        raise DataError(path, f"shape {reader.shape_zyx}, the crop has {target.crop.grid.shape_zyx}", "predict it anew")
    return reader
