"""Training patches: the batch of step s is a pure function of (plan, s), whoever asks and in which process.

::

    turn -> crop and class -> layer of EM chunks -> voxel -> warp -> patch around the voxel, kept inside the crop

A batch carries EM and global codes; one table for the whole data set says what each code means for each class.
Code 0 is "everything unknown": padding, a validation box, EM that was never fetched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.data.classes import PRESENT, UNKNOWN, Logic, States
from autoseg.data.codes import open_codes
from autoseg.data.dataset import Crop, Dataset
from autoseg.data.em import EmReader
from autoseg.data.store import ChunkCache, checksums_in
from autoseg.errors import PlanError
from autoseg.schema import Plan, Region
from autoseg.train.augment import augment
from autoseg.train.sources import (
    Held,
    Source,
    build_index,
    draw_layer,
    draw_voxel,
    held_on,
    hide,
    index_layers,
    read_source,
    scale_box,
    usable_counts,
)
from autoseg.train.turns import Turn, Turns
from autoseg.train.warp import Frame, draw_warp, place_patch, read_box


class Batch(NamedTuple):
    """The patches of one optimizer step, on the CPU: EM (2.5D: slices are channels), label codes, their meaning.

    Codes come in the narrowest of uint8, int16 and int32; make them long before they index `states_CK`.
    """

    image_BCZYX: Tensor
    codes_BZYX: Tensor
    states_CK: Tensor


class PatchSampler:
    """Draws the batches of one plan from one data set: of each the patches of one process."""

    def __init__(self, plan: Plan, data: Dataset, cache: Path, cache_bytes: int, rank: int = 0) -> None:
        self.plan = plan
        self._own = own_patches(plan, rank)
        self._frame = Frame(plan.patch_size_zyx, plan.voxel_size_nm, plan.input_slices)
        self._logic = Logic(data.table)
        self._columns = self._logic.columns(plan.class_names)
        self._rows: dict[bytes, int] = {bytes([UNKNOWN] * len(self._columns)): 0}
        chunks = ChunkCache(cache_bytes, checksums_in(cache))
        readers: dict[Path, EmReader] = {}
        real = {em: os.path.realpath(em) for em in {crop.em for crop in data.crops}}
        validate = [(data.crop(region.crop), region) for region in plan.split.validate]
        held = {
            em: held_on(
                [(c.grid, r.box(c.grid.shape_zyx)) for c, r in validate if real[c.em] == em], plan.voxel_size_nm
            )
            for em in set(real.values())
        }
        self._sources: list[Source] = []
        for region in plan.split.train:
            crop = data.crop(region.crop)
            if crop.em not in readers:
                readers[crop.em] = EmReader(crop.em, plan.voxel_size_nm, plan.normalization, chunks)
            self._sources.append(self._open(crop, region, held[real[crop.em]], readers[crop.em], cache))
        rows = b"".join(self._rows)
        self.states_CK: States = np.frombuffer(rows, dtype=np.uint8).reshape(len(self._rows), -1)
        self._dtype = narrowest(len(self.states_CK))
        self._sources = [s._replace(to_global=s.to_global.astype(self._dtype)) for s in self._sources]
        self._wanted_KC = np.concatenate(
            [self.states_CK.T == PRESENT, (self.states_CK != UNKNOWN).any(axis=1)[None]]
        )  # the last row is any known voxel
        totals = np.array([_totals(source) for source in self._sources])
        if totals[:, -1].sum() == 0:
            raise PlanError(plan.name, "no voxel of its classes is annotated in the training crops", "check the DATA")
        present_NK = totals[:, :-1]
        untaught = [name for name, n in zip(plan.class_names, present_NK.sum(axis=0), strict=True) if n == 0]
        self.untaught = tuple(untaught)
        self._turns = Turns(totals[:, -1].tolist(), present_NK, plan.sampling, plan.seed)

    def _open(self, crop: Crop, region: Region, held: Held, em: EmReader, cache: Path) -> Source:
        """Return a crop to learn from; nothing that validates on the same EM may teach."""
        plan = self.plan
        codes = open_codes(crop, plan.voxel_size_nm, cache, self._logic)
        states = codes.states_CK[:, self._columns]
        shape = crop.grid.shape_zyx
        box = scale_box(region.box(shape), crop.grid, codes.grid, "inwards")
        own = [other.box(shape) for other in plan.split.validate if other.crop == region.crop]
        hidden = dict.fromkeys(
            [*(scale_box(inside, crop.grid, codes.grid, "outwards") for inside in own), *hide(held, codes.grid)]
        )
        gaps = not em.complete_on(codes.grid)
        holds_CK = np.concatenate([states == PRESENT, (states != UNKNOWN).any(axis=1)[:, None]], axis=1)
        return Source(
            region=box,
            hidden=tuple(hidden),
            gaps=gaps,
            codes=codes,
            to_global=np.array([self._rows.setdefault(bytes(row), len(self._rows)) for row in states]),
            em=em,
            block_index=build_index(usable_counts(codes, box, tuple(hidden), em if gaps else None), holds_CK),
            layers=index_layers(codes.grid, em),
        )

    def batch(self, step: int) -> Batch:
        """Return this process's patches of that optimizer step, all its micro-batches in one."""
        plan, own = self.plan, self._own
        size = plan.patches_per_step
        num_places = min(plan.sampling.crops_per_step, size)
        rng = _generator(plan.seed, step, 0)
        places: list[tuple[Turn, int | None]] = []
        for number in range(step * num_places, (step + 1) * num_places):
            turn = self._turns.turn(number)
            shared = num_places < size
            places.append((turn, draw_layer(self._sources[turn.crop], self._column(turn), rng) if shared else None))
        # not torch.empty: a freed block of aligned memory does not fit the next of its size, and the heap would grow
        images = np.empty((len(own), plan.input_slices, *plan.patch_size_zyx), dtype=np.float32)
        labels = np.empty((len(own), *plan.patch_size_zyx), dtype=self._dtype)
        for first, (turn, layer) in enumerate(places):  # place by place, so that its chunks are decoded once
            for at, i in enumerate(own):
                if i % num_places == first:
                    images[at], labels[at] = self._patch(turn, layer, _generator(plan.seed, step, i + 1))
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(self.states_CK.copy()))

    def _column(self, turn: Turn) -> int:
        """Return the class of a turn as a column of the indices; the last one is any known voxel."""
        return len(self._columns) if turn.class_index is None else turn.class_index

    def _patch(
        self, turn: Turn, layer: int | None, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        source, plan, column = self._sources[turn.crop], self.plan, self._column(turn)
        volume = np.asarray(source.codes.codes_ZYX)  # the crop's own codes, mapped for this patch alone
        voxel = draw_voxel(source, volume, column, self._wanted_KC[column], layer, rng)
        warp = draw_warp(plan.augmentation, self._frame, rng)
        patch = place_patch(voxel, plan.patch_size_zyx, source.codes.grid.shape_zyx, rng, warp)
        image, codes = read_source(source, volume, read_box(patch, warp), plan.input_slices)
        return augment(image, codes, plan.augmentation, warp, self._frame, rng)


def own_patches(plan: Plan, rank: int) -> list[int]:
    """Return which patches of a step one process builds, its micro-batches one after the other.

    Micro-batch by micro-batch all processes together build what one with a `batch_size` as large as all of theirs
    would; patches from one place stay together, so that its chunks are decoded once.
    """
    size, whole = plan.batch_size, plan.batch_size * plan.num_processes
    own: list[int] = []
    for first in range(0, plan.patches_per_step, whole):
        by_place = sorted(range(first, first + whole), key=lambda i: i % plan.sampling.crops_per_step)
        own += sorted(by_place[rank * size : (rank + 1) * size])
    return own


def narrowest(num_codes: int) -> np.dtype[Any]:
    """Return the narrowest dtype, known to numpy and torch, that holds so many codes."""
    return np.dtype(np.uint8 if num_codes <= 2**8 else np.int16 if num_codes <= 2**15 else np.int32)


def _totals(source: Source) -> list[int]:
    """Return the number of voxels of each class, and of known voxels, that may teach."""
    columns = [
        source.block_index.cumulative[source.block_index.column(k)] for k in range(len(source.block_index.first) - 1)
    ]
    return [int(cumulative[-1]) if len(cumulative) else 0 for cumulative in columns]


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
