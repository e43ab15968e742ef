"""Training patches: the batch of step s is a pure function of (plan, s), whoever asks and in which process.

::

    class by turn -> crop that holds it -> index block -> voxel -> patch around it, kept inside the crop
    or: any known voxel of any crop

A batch carries EM and global codes; one table for the whole data set says what each code means for each class.
Code 0 is "everything unknown": padding, a validation box, EM that was never fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.data.classes import PRESENT, UNKNOWN, Logic, States
from autoseg.data.codes import CropCodes, IndexBlocks, index_blocks, open_codes
from autoseg.data.dataset import Dataset
from autoseg.data.em import EmReader, read_input
from autoseg.data.store import ChunkCache, checksums_in
from autoseg.errors import PlanError
from autoseg.geometry import Box, VoxelsZYX
from autoseg.schema import Plan, Region
from autoseg.train.augment import augment, draw_warp

ISOTROPIC_WITHIN = 1.5
MAX_DRAWS = 50


class Batch(NamedTuple):
    """The patches of one optimizer step, on the CPU: EM (2.5D: slices are channels), label codes, their meaning."""

    image_BCZYX: Tensor
    codes_BZYX: Tensor
    states_CK: Tensor


class _Source(NamedTuple):
    region: Box
    hidden: tuple[Box, ...]
    codes: CropCodes
    to_global: NDArray[np.int32]
    em: EmReader
    blocks: IndexBlocks


class PatchSampler:
    """Draws the batches of one plan from one data set."""

    def __init__(self, plan: Plan, data: Dataset, cache: Path, cache_bytes: int) -> None:
        self.plan = plan
        logic = Logic(data.table)
        columns = logic.columns(plan.class_names)
        rows: dict[bytes, int] = {bytes([UNKNOWN] * len(columns)): 0}
        chunk_cache = ChunkCache(cache_bytes, checksums_in(cache))
        readers: dict[Path, EmReader] = {}
        self._sources: list[_Source] = []
        present, known = [], []
        for region in plan.split.train:
            crop = data.crop(region.crop)
            codes = open_codes(crop, plan.voxel_size_nm, cache)
            states, _ = logic.complete(logic.rows(codes.states_CK, codes.names))
            states = states[:, columns]
            to_global = np.array([rows.setdefault(bytes(row), len(rows)) for row in states], dtype=np.int32)
            if crop.em not in readers:
                readers[crop.em] = EmReader(crop.em, plan.voxel_size_nm, plan.normalization.kind, chunk_cache)
            box = scale_box(region, crop.grid.shape_zyx, codes.grid.shape_zyx)
            hidden = tuple(
                scale_box(other, crop.grid.shape_zyx, codes.grid.shape_zyx)
                for other in plan.split.validate
                if other.crop == region.crop
            )
            blocks = index_blocks(codes.grid.shape_zyx)
            self._sources.append(_Source(box, hidden, codes, to_global, readers[crop.em], blocks))
            usable = np.array([b.clip(box).num_voxels > 0 and not any(h.clip(b) == b for h in hidden) for b in blocks])
            counts = codes.counts_BC * usable[:, None]
            present.append(counts @ (states == PRESENT))
            known.append(counts @ (states != UNKNOWN).any(axis=1))
        self._present_BK, self._known_B = present, known
        self.states_CK: States = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), len(columns))
        self._crops_of_class = [
            [i for i, counts in enumerate(present) if counts[:, k].sum() > 0] for k in range(len(columns))
        ]
        self._classes = [k for k, crops in enumerate(self._crops_of_class) if crops]
        if sum(int(counts.sum()) for counts in known) == 0:
            raise PlanError(plan.name, "no voxel of its classes is annotated in the training crops", "check the DATA")

    def batch(self, step: int) -> Batch:
        """Return the patches of that optimizer step, all its micro-batches in one."""
        plan = self.plan
        size = plan.batch_size * plan.accumulate_batches
        seeds = np.random.SeedSequence([plan.seed, step]).spawn(size + 1)
        chooser = np.random.Generator(np.random.Philox(seeds[0]))
        spots = [self._choose(chooser) for _ in range(min(plan.sampling.crops_per_step, size))]
        patches = [self._patch(*spots[i % len(spots)], seed) for i, seed in enumerate(seeds[1:])]
        return Batch(
            torch.from_numpy(np.stack([image for image, _ in patches])),
            torch.from_numpy(np.stack([codes for _, codes in patches])),
            torch.from_numpy(self.states_CK.copy()),
        )

    def _choose(self, rng: np.random.Generator) -> tuple[int, int | None]:
        """Return (crop, class to centre on); None is any known voxel."""
        if self._classes and rng.random() < self.plan.sampling.class_centred_fraction:
            k = self._classes[rng.integers(len(self._classes))]
            crops = self._crops_of_class[k]
            return crops[rng.integers(len(crops))], k
        crops = [i for i, counts in enumerate(self._known_B) if counts.sum() > 0]
        return crops[rng.integers(len(crops))], None

    def _patch(
        self, crop: int, k: int | None, seed: np.random.SeedSequence
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        rng = np.random.Generator(np.random.Philox(seed))
        source, plan = self._sources[crop], self.plan
        voxel = self._draw_voxel(source, crop, k, rng)
        patch = place_patch(voxel, plan.patch_size_zyx, source.codes.grid.shape_zyx, rng)
        spacing = plan.voxel_size_nm
        isotropic = max(spacing) < ISOTROPIC_WITHIN * min(spacing)
        warp = draw_warp(plan.augmentation, plan.patch_size_zyx, isotropic, rng)
        margin = [(r - p) // 2 for r, p in zip(warp.read_zyx, plan.patch_size_zyx, strict=True)]
        start = tuple(a - m for a, m in zip(patch.start, margin, strict=True))
        stop = tuple(a + r for a, r in zip(start, warp.read_zyx, strict=True))
        image, codes = self._read(source, Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
        image, codes = augment(image, codes, plan.augmentation, warp, plan.patch_size_zyx, int(rng.integers(2**32)))
        return image, codes

    def _draw_voxel(self, source: _Source, crop: int, k: int | None, rng: np.random.Generator) -> VoxelsZYX:
        """Return a voxel of class k (None: any known one) of that crop, outside the hidden boxes."""
        weights = self._known_B[crop] if k is None else self._present_BK[crop][:, k]
        cumulative = np.cumsum(weights)
        wanted = (self.states_CK != UNKNOWN).any(axis=1) if k is None else self.states_CK[:, k] == PRESENT
        box = source.region
        for _ in range(MAX_DRAWS):
            index = int(np.searchsorted(cumulative, rng.integers(cumulative[-1]), side="right"))
            box = source.blocks[index].clip(source.region)
            hits = wanted[source.to_global[source.codes.codes_ZYX[box.slices]]]
            for hidden in source.hidden:
                hits[hidden.clip(box).relative_to(box).slices] = False
            found = np.flatnonzero(hits)
            if len(found):
                z, y, x = np.unravel_index(found[rng.integers(len(found))], box.shape_zyx)
                return int(z) + box.start[0], int(y) + box.start[1], int(x) + box.start[2]
        return box.start

    def _read(self, source: _Source, box: Box) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return EM (channel first) and global codes of that box of the code grid, unknown outside it."""
        inside = box.clip(Box.whole(source.codes.grid.shape_zyx))
        codes = np.zeros(box.shape_zyx, dtype=np.int32)
        codes[inside.relative_to(box).slices] = source.to_global[source.codes.codes_ZYX[inside.slices]]
        outside = np.ones(box.shape_zyx, dtype=bool)
        outside[source.region.clip(box).relative_to(box).slices] = False
        codes[outside] = 0
        for hidden in source.hidden:
            codes[hidden.clip(box).relative_to(box).slices] = 0
        image, valid = read_input(source.em, source.codes.grid, box, self.plan.input_slices)
        if valid is not None:
            codes[~valid] = 0
        return image, codes


def scale_box(region: Region, from_zyx: VoxelsZYX, to_zyx: VoxelsZYX) -> Box:
    """Return the region's box on another grid of the same extent."""
    box = region.box(from_zyx)
    start = [round(a * t / f) for a, f, t in zip(box.start, from_zyx, to_zyx, strict=True)]
    stop = [round(b * t / f) for b, f, t in zip(box.stop, from_zyx, to_zyx, strict=True)]
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def place_patch(voxel: VoxelsZYX, patch_zyx: VoxelsZYX, shape_zyx: VoxelsZYX, rng: np.random.Generator) -> Box:
    """Return a patch that holds the voxel in its inner half, moved inside the crop where it fits."""
    start = []
    for v, p, n in zip(voxel, patch_zyx, shape_zyx, strict=True):
        first = v - p // 4 - int(rng.integers(max(1, p // 2 + p % 2)))
        start.append((n - p) // 2 if p >= n else min(max(first, 0), n - p))
    return Box(
        (start[0], start[1], start[2]),
        (start[0] + patch_zyx[0], start[1] + patch_zyx[1], start[2] + patch_zyx[2]),
    )
