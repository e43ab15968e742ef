"""Predict the validation regions whole, count, and report Dice by class: the same voxels every time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoseg.data.classes import Logic, States
from autoseg.data.codes import CropCodes, open_codes
from autoseg.data.dataset import Dataset
from autoseg.data.em import EmReader, read_input
from autoseg.data.store import ChunkCache, checksums_in
from autoseg.geometry import Box
from autoseg.metrics.overlap import NOTHING, Counts, count, mean, ratios
from autoseg.model.windows import Predictor
from autoseg.schema import Plan, TunedDecode, ValidationScore
from autoseg.train.sources import scale_box
from autoseg.train.thresholds import NUM_BINS, choose_thresholds, histogram


class _Target(NamedTuple):
    box: Box
    codes: CropCodes
    states_CK: States
    em: EmReader


class Validator:
    """The validation regions of a plan, opened once."""

    def __init__(self, plan: Plan, data: Dataset, cache: Path, cache_bytes: int) -> None:
        self._plan = plan
        logic, chunks = Logic(data.table), ChunkCache(cache_bytes, checksums_in(cache))
        columns = logic.columns(plan.class_names)
        readers: dict[Path, EmReader] = {}
        self._targets = []
        for region in plan.split.validate:
            crop = data.crop(region.crop)
            codes = open_codes(crop, plan.voxel_size_nm, cache)
            states, _ = logic.complete(logic.rows(codes.states_CK, codes.names))
            if crop.em not in readers:
                readers[crop.em] = EmReader(crop.em, plan.voxel_size_nm, plan.normalization.kind, chunks)
            box = scale_box(region, crop.grid.shape_zyx, codes.grid.shape_zyx)
            self._targets.append(_Target(box, codes, states[:, columns], readers[crop.em]))

    def score(self, network: nn.Module, device: torch.device) -> ValidationScore:
        """Return the Dice over all validation regions, counts pooled; without mirrored copies, to be quick."""
        plain = msgspec.structs.replace(self._plan.sliding_window, mirror_axes=(), transpose_yx=False)
        names = self._plan.class_names
        thresholds = np.array([self._plan.decode.thresholds[name] for name in names])
        totals: list[Counts] = [NOTHING] * len(names)
        predictor = Predictor(network, msgspec.structs.replace(self._plan, sliding_window=plain), device)
        for probability, codes, states in self._predict(predictor):
            for k in range(len(names)):
                totals[k] += count(probability[k] >= thresholds[k], codes, states[:, k])
        dice = {name: ratios(total).dice for name, total in zip(names, totals, strict=True)}
        return ValidationScore(dice, mean(list(dice.values())))

    def tune(self, network: nn.Module, device: torch.device, step: int) -> TunedDecode:
        """Return the thresholds that the validation regions choose, predicted as prediction will do it."""
        names = self._plan.class_names
        histograms = np.zeros((len(names), 2, NUM_BINS), dtype=np.int64)
        for probability, codes, states in self._predict(Predictor(network, self._plan, device)):
            for k in range(len(names)):
                histograms[k] += histogram(probability[k], states[:, k][codes])
        tolerance = self._plan.validation.tolerance
        return choose_thresholds(names, histograms, self._plan.decode.thresholds, tolerance, step)

    def _predict(self, predictor: Predictor) -> Iterator[tuple[NDArray[np.float32], NDArray[Any], States]]:
        """Yield (probabilities (classes, z, y, x), label codes, states of the codes) block by block."""
        for target in self._targets:

            def read(tile: Box, target: _Target = target) -> NDArray[np.float32]:
                grid = target.codes.grid.crop(target.box)
                return read_input(target.em, grid, tile, self._plan.input_slices)[0]

            for block in predictor.blocks(target.box.shape_zyx):
                codes = target.codes.codes_ZYX[block.shift(target.box.start).slices]
                yield predictor.predict(read, target.box.shape_zyx, block), codes, target.states_CK
