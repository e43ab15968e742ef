"""Labels against annotation: voxel counts by crop and class, and every ratio that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import Logic
from autoseg.data.codes import open_codes
from autoseg.data.dataset import Crop, Dataset
from autoseg.data.em import valid_voxels
from autoseg.data.store import ArrayReader, ChunkCache, open_multiscale
from autoseg.errors import DataError
from autoseg.geometry import Box, NmZYX, blocks
from autoseg.metrics.overlap import NOTHING, Counts, count, mean, ratios
from autoseg.schema import ScoreRow, Scores

METRIC = "voxel-overlap-1"
BLOCK = (64, 256, 256)
CACHE_BYTES = 128 * 2**20
Progress = Callable[[str, int, int], None]


class Scored(NamedTuple):
    """A crop, the box of it (voxels of its labels) that counts, and the folder of its predicted classes.

    With the voxel size at which its EM was read, what lies under EM that was never fetched does not count.
    """

    crop: Crop
    box: Box
    prediction: Path
    em_voxel_size_nm: NmZYX | None = None

    def blocks(self) -> Iterator[tuple[Box, NDArray[np.bool_] | None]]:
        """Yield the blocks of the box, and which of their voxels lie under EM; None for all."""
        found = self.em_voxel_size_nm and open_multiscale(self.crop.em).levels_for(self.em_voxel_size_nm)
        levels = [(level.grid, ArrayReader(level.path, ChunkCache(0))) for level in found or ()]
        for block in blocks(self.box.shape_zyx, BLOCK):
            box = block.shift(self.box.start)
            yield box, valid_voxels(levels, self.crop.grid.crop(box)) if levels else None


def score_labels(
    dataset: Dataset,
    targets: Sequence[Scored],
    classes: Sequence[str],
    cache: Path,
    progress: Progress = lambda what, done, total: None,
) -> Scores:
    """Return the scores of these classes; voxels whose class is unknown, or that have no EM, do not count."""
    logic = Logic(dataset.table)
    columns = logic.columns(classes)
    rows: list[ScoreRow] = []
    for done, target in enumerate(targets):
        progress("crops", done, len(targets))
        codes = open_codes(target.crop, target.crop.grid.voxel_size_nm, cache, logic)
        chunks = ChunkCache(CACHE_BYTES)
        readers = [_open_prediction(target, name, chunks) for name in classes]
        totals = [NOTHING] * len(classes)
        for box, valid in target.blocks():
            code = codes.codes_ZYX[box.slices]
            chosen = slice(None) if valid is None else valid
            for i, (reader, k) in enumerate(zip(readers, columns, strict=True)):
                totals[i] += count((reader.read(box) > 0)[chosen], code[chosen], codes.states_CK[:, k])
        whole = target.box == Box.whole(target.crop.grid.shape_zyx)
        box_zyx = None if whole else (target.box.start, target.box.stop)
        rows += [
            ScoreRow(crop=target.crop.name, class_=name, tp=t.tp, fp=t.fp, fn=t.fn, box_zyx=box_zyx)
            for name, t in zip(classes, totals, strict=True)
        ]
    progress("crops", len(targets), len(targets))
    return summarize(rows, METRIC)


def voxels_without_em(targets: Sequence[Scored]) -> int:
    """Return how many voxels of the boxes do not count because their EM was never fetched."""
    return sum(int((~valid).sum()) for target in targets for _, valid in target.blocks() if valid is not None)


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


def _open_prediction(target: Scored, name: str, chunks: ChunkCache) -> ArrayReader:
    path = target.prediction / name / "s0"
    if not path.is_dir():
        raise DataError(target.prediction, f"has no prediction of {name}", "predict this crop with the run first")
    reader = ArrayReader(path, chunks)
    if reader.shape_zyx != target.crop.grid.shape_zyx:
        raise DataError(path, f"shape {reader.shape_zyx}, the crop has {target.crop.grid.shape_zyx}", "predict it anew")
    return reader
