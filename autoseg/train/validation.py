"""Predict the validation regions whole, count, and report Dice by class: the same voxels every time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoseg.data.classes import Logic, States
from autoseg.data.codes import CropCodes, open_codes
from autoseg.data.dataset import Dataset
from autoseg.data.em import EmReader, read_input
from autoseg.data.store import ChunkCache
from autoseg.geometry import Box
from autoseg.metrics.overlap import NOTHING, Counts, count, mean, ratios
from autoseg.model.windows import Predictor
from autoseg.schema import Plan, ValidationScore
from autoseg.train.patches import scale_box


class _Target(NamedTuple):
    box: Box
    codes: CropCodes
    states_CK: States
    em: EmReader


class Validator:
    """The validation regions of a plan, opened once; mirrored copies are left to prediction."""

    def __init__(self, plan: Plan, data: Dataset, cache: Path, cache_bytes: int) -> None:
        plain = msgspec.structs.replace(plan.sliding_window, mirror_axes=(), transpose_yx=False)
        self._plan = msgspec.structs.replace(plan, sliding_window=plain)
        logic, chunks = Logic(data.table), ChunkCache(cache_bytes)
        columns = logic.columns(plan.class_names)
        self._targets = []
        for region in plan.split.validate:
            crop = data.crop(region.crop)
            codes = open_codes(crop, plan.voxel_size_nm, cache)
            states, _ = logic.complete(logic.rows(codes.states_CK, codes.names))
            em = EmReader(crop.em, plan.voxel_size_nm, plan.normalization.kind, chunks)
            box = scale_box(region, crop.grid.shape_zyx, codes.grid.shape_zyx)
            self._targets.append(_Target(box, codes, states[:, columns], em))

    @property
    def num_voxels(self) -> int:
        """Return the voxels that one validation predicts."""
        return sum(target.box.num_voxels for target in self._targets)

    def score(self, network: nn.Module, device: torch.device) -> ValidationScore:
        """Return the Dice of the network over all validation regions, counts pooled."""
        predictor = Predictor(network, self._plan, device)
        names = self._plan.class_names
        thresholds = np.array([self._plan.decode.thresholds[name] for name in names])
        totals: list[Counts] = [NOTHING] * len(names)
        for target in self._targets:
            shape = target.box.shape_zyx

            def read(tile: Box, target: _Target = target) -> NDArray[np.float32]:
                grid = target.codes.grid.crop(target.box)
                return read_input(target.em, grid, tile, self._plan.input_slices)[0]

            for block in predictor.blocks(shape):
                probability = predictor.predict(read, shape, block)
                codes = target.codes.codes_ZYX[block.shift(target.box.start).slices]
                for k in range(len(names)):
                    hits = probability[k] >= thresholds[k]
                    totals[k] += count(hits, codes, target.states_CK[:, k])
        dice = {name: ratios(total).dice for name, total in zip(names, totals, strict=True)}
        return ValidationScore(dice, mean(list(dice.values())))
