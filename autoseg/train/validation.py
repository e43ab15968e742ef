"""Predict the validation regions whole, count, and report Dice by class: the same voxels every time."""

from __future__ import annotations

import time
from collections.abc import Callable
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
from autoseg.data.store import ChunkCache, checksums_in
from autoseg.geometry import Box
from autoseg.metrics.overlap import mean
from autoseg.model.windows import Predictor
from autoseg.schema import Plan, TunedDecode, ValidationScore
from autoseg.train.sources import validated_box
from autoseg.train.team import ALONE, Team
from autoseg.train.thresholds import NUM_BINS, choose_thresholds, dice_at, histograms


class _Target(NamedTuple):
    box: Box
    codes: CropCodes
    states_CK: States
    em: EmReader


class Validated(NamedTuple):
    """What a validation found: Dice by class, and thresholds if the plan lets it choose them."""

    score: ValidationScore
    tuned: TunedDecode | None


class Abandoned(Exception):  # noqa: N818 - not an error
    """A validation that was asked to stop, with the name of the signal."""


class Validator:
    """The validation regions of a plan, opened once; the processes of a team take turns at their blocks."""

    def __init__(self, plan: Plan, data: Dataset, cache: Path, cache_bytes: int, team: Team = ALONE) -> None:
        self._plan, self._team = plan, team
        logic, chunks = Logic(data.table), ChunkCache(cache_bytes, checksums_in(cache))
        columns = logic.columns(plan.class_names)
        readers: dict[Path, EmReader] = {}
        self._targets = []
        for region in plan.split.validate:
            crop = data.crop(region.crop)
            codes = open_codes(crop, plan.voxel_size_nm, cache, logic)
            if crop.em not in readers:
                readers[crop.em] = EmReader(crop.em, plan.voxel_size_nm, plan.normalization, chunks)
            box = validated_box(region.box(crop.grid.shape_zyx), crop.grid, codes.grid)
            self._targets.append(_Target(box, codes, codes.states_CK[:, columns], readers[crop.em]))

    def score(
        self, network: nn.Module, device: torch.device, step: int, asked: Callable[[], str | None] = lambda: None
    ) -> Validated:
        """Return the Dice over all validation regions, counts pooled; Abandoned once `asked` says to stop.

        Dice and thresholds are of probabilities without mirrored copies, also where the plan predicts with them.
        """
        plan = self._plan
        counts_K2B = self._counts(self._predictor(network, device), asked)
        planned = plan.decode.thresholds
        dice = {name: dice_at(h, planned[name]) for name, h in zip(plan.class_names, counts_K2B, strict=True)}
        tuned = None
        if plan.decode.tune_thresholds and self._targets:
            tuned = choose_thresholds(plan.class_names, counts_K2B, planned, plan.validation.tolerance, step)
        return Validated(ValidationScore(dice, mean(list(dice.values()))), tuned)

    def seconds(self, network: nn.Module, device: torch.device) -> float:
        """Return how long a validation takes, from the second of two batches of tiles."""
        if not self._targets:
            return 0.0
        predictor, first = self._predictor(network, device), self._targets[0]
        box = predictor.one_batch(first.box.shape_zyx)
        probe = first._replace(box=box.shift(first.box.start))
        for _ in range(2):
            start = time.perf_counter()
            for block in predictor.blocks(probe.box.shape_zyx):
                self._count(predictor, probe, block, self._zeros())
            once = time.perf_counter() - start
        num_tiles = sum(predictor.num_tiles(target.box.shape_zyx) for target in self._targets)
        return self._largest_share(predictor) * once * num_tiles / predictor.num_tiles(box.shape_zyx)

    def _blocks(self, predictor: Predictor) -> list[tuple[_Target, Box]]:
        return [(target, block) for target in self._targets for block in predictor.blocks(target.box.shape_zyx)]

    def _largest_share(self, predictor: Predictor) -> float:
        """Return the share of all voxels that the process with most of them predicts."""
        voxels = [block.num_voxels for _, block in self._blocks(predictor)]
        return max(sum(voxels[rank :: self._team.size]) for rank in range(self._team.size)) / sum(voxels)

    def _counts(self, predictor: Predictor, asked: Callable[[], str | None]) -> NDArray[np.int64]:
        """Return the counts of all regions, each process counting its share of the blocks; Abandoned by all at once."""
        counts_K2B, stopped_by, heard = self._zeros(), None, self._team.listen(asked)
        try:
            for target, block in self._blocks(predictor)[self._team.rank :: self._team.size]:
                self._count(predictor, target, block, counts_K2B, heard)
        except Abandoned as abandoned:
            stopped_by = str(abandoned)
        if stopped_by := self._team.agree(stopped_by):
            raise Abandoned(stopped_by)
        return self._team.add_up(counts_K2B)

    def _zeros(self) -> NDArray[np.int64]:
        return np.zeros((len(self._plan.class_names), 2, NUM_BINS), dtype=np.int64)

    def _predictor(self, network: nn.Module, device: torch.device) -> Predictor:
        plain = msgspec.structs.replace(self._plan.sliding_window, mirror_axes=(), transpose_yx=False)
        return Predictor(network, msgspec.structs.replace(self._plan, sliding_window=plain), device)

    def _count(
        self,
        predictor: Predictor,
        target: _Target,
        block: Box,
        counts_K2B: NDArray[np.int64],
        asked: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Predict a block of a region and add its probabilities to the counts; EM never fetched is unknown."""
        grid = target.codes.grid.crop(target.box)
        seen = np.zeros(block.shape_zyx, dtype=bool)

        def read(tile: Box) -> NDArray[np.float32]:
            if stopped_by := asked():
                raise Abandoned(stopped_by)
            image, valid = read_input(target.em, grid, tile, self._plan.input_slices)
            part = tile.clip(block)
            inside = part.relative_to(block).slices
            seen[inside] |= True if valid is None else valid[part.relative_to(tile).slices]
            return image

        codes = target.codes.codes_ZYX[block.shift(target.box.start).slices]
        probability = predictor.predict(read, target.box.shape_zyx, block)
        if not seen.all():
            probability, codes = probability[:, seen], codes[seen]
        counts_K2B += histograms(probability, codes, target.states_CK)
