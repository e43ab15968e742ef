"""Sliding windows: probabilities of any box from tiles of one global layout, blended by a Gaussian.

Tiles lie at fixed places over the whole region; a block is computed from every tile that touches it, in raster
order. So a voxel has the same value however the region is cut into blocks::

    tiles   |-----A-----|
                  |-----B-----|
                        |-----C-----|
    block               |===|            needs B and C
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from monai.utils.enums import BlendMode
from numpy.typing import NDArray
from torch import Tensor, nn

from autoseg.errors import PlanError
from autoseg.geometry import Box, VoxelsZYX, blocks, tile_starts
from autoseg.model.groups import probabilities
from autoseg.model.networks import smallest_patch
from autoseg.schema import Plan

ReadImage = Callable[[Box], NDArray[np.float32]]
BLOCK_BYTES = 2**28
AXES = {"z": 2, "y": 3, "x": 4}


class Predictor(NamedTuple):
    """A network ready for inference, and how the plan wants it to be applied."""

    network: nn.Module
    plan: Plan
    device: torch.device

    def blocks(self, shape_zyx: VoxelsZYX) -> Iterator[Box]:
        """Yield the blocks of a region: whole multiples of a tile, as many as fit in 256 MiB of probabilities."""
        tile = self.tile(shape_zyx)
        budget = BLOCK_BYTES // (4 * len(self.plan.class_names))
        z, y, x = tile
        while x < shape_zyx[2] and z * y * x * 2 <= budget:
            x *= 2
        while y < shape_zyx[1] and z * y * x * 2 <= budget:
            y *= 2
        while z < shape_zyx[0] and z * y * x * 2 <= budget:
            z *= 2
        return blocks(shape_zyx, (z, y, x))

    def tile(self, shape_zyx: VoxelsZYX) -> VoxelsZYX:
        """Return the plan's tile, no larger than the region needs, in steps the network can halve."""
        steps = smallest_patch(self.plan.network)
        z, y, x = (
            min(t, -(-(n + 2 * margin) // s) * s)
            for t, n, s, margin in zip(self.plan.sliding_window.tile_zyx, shape_zyx, steps, self._margin(), strict=True)
        )
        return z, y, x

    def _margin(self) -> VoxelsZYX:
        """Voxels beyond the region that tiles also cover, so that its border sees its surroundings."""
        z, y, x = smallest_patch(self.plan.network)
        return (0 if self.plan.sliding_window.tile_zyx[0] == 1 else z), y, x

    def _starts(self, shape_zyx: VoxelsZYX, block: Box) -> list[list[int]]:
        """Return for each axis where the tiles of a region start that touch `block`; the outer ones reach beyond it."""
        overlap = self.plan.sliding_window.overlap
        axes = zip(shape_zyx, self._margin(), self.tile(shape_zyx), *block, strict=True)
        return [
            [s - m for s in tile_starts(n + 2 * m, tile, overlap) if a < s - m + tile and s - m < b]
            for n, m, tile, a, b in axes
        ]

    def num_tiles(self, shape_zyx: VoxelsZYX) -> int:
        """Return the number of tiles of a region."""
        return math.prod(len(starts) for starts in self._starts(shape_zyx, Box.whole(shape_zyx)))

    def one_batch(self, shape_zyx: VoxelsZYX) -> Box:
        """Return a box in the corner of a region that one batch of tiles covers, one tile if tiles are deep."""
        z, y, x = (
            min(n, max(1, t - 2 * m)) for n, t, m in zip(shape_zyx, self.tile(shape_zyx), self._margin(), strict=True)
        )
        flat = self.plan.sliding_window.tile_zyx[0] == 1
        return Box.whole((min(shape_zyx[0], self.plan.sliding_window.batch_size) if flat else z, y, x))

    def predict(self, read: ReadImage, shape_zyx: VoxelsZYX, block: Box) -> NDArray[np.float32]:
        """Return probabilities (classes, z, y, x) of `block` in a region of that shape.

        `read(box)` gives the network input (channels, z, y, x) of any box, also partly outside the region.
        """
        tile = self.tile(shape_zyx)
        importance = compute_importance_map(tile, mode=BlendMode.GAUSSIAN, sigma_scale=0.125).clamp(min=1e-3)
        total = torch.zeros((len(self.plan.class_names), *block.shape_zyx))
        weight = torch.zeros(block.shape_zyx)
        starts = itertools.product(*self._starts(shape_zyx, block))
        needed = (Box((z, y, x), (z + tile[0], y + tile[1], x + tile[2])) for z, y, x in starts)
        while batch := list(itertools.islice(needed, self.plan.sliding_window.batch_size)):
            image = torch.from_numpy(np.stack([read(t) for t in batch]))
            for t, probability in zip(batch, self._forward(image), strict=True):
                part = t.clip(block)
                inner, outer = part.relative_to(t).slices, part.relative_to(block).slices
                total[:, *outer] += probability[:, *inner] * importance[inner]
                weight[outer] += importance[inner]
        return (total / weight).numpy()

    @torch.inference_mode()
    def _forward(self, image_BCZYX: Tensor) -> Tensor:
        """Return probabilities on the CPU, the mean over the plan's mirrored and transposed copies."""
        window = self.plan.sliding_window
        image = image_BCZYX.to(self.device)
        mirrors = [
            list(combination)
            for n in range(len(window.mirror_axes) + 1)
            for combination in itertools.combinations([AXES[a] for a in window.mirror_axes], n)
        ]
        square = window.transpose_yx and image.shape[3] == image.shape[4]
        total = None
        for swap in (False, True) if square else (False,):
            for axes in mirrors:
                probability = self._once(image, axes, swap)
                total = probability if total is None else total + probability
        assert total is not None
        return (total / (len(mirrors) * (2 if square else 1))).cpu()

    def _once(self, image: Tensor, axes: list[int], swap: bool) -> Tensor:
        moved = image.transpose(3, 4) if swap else image
        if axes:
            moved = _mirror_image(moved, axes)
        with autocast(self.plan, self.device):
            probability = probabilities(self.network(moved)[0].float(), self.plan)
        probability = probability.flip(axes) if axes else probability
        return probability.transpose(3, 4) if swap else probability


def _mirror_image(image: Tensor, axes: list[int]) -> Tensor:
    """Mirror the input; the slices of a 2.5D input are its channels and mirror with z."""
    if 2 in axes and image.shape[1] > 1:
        image = image.flip(1)
    return image.flip(axes)


def find_device(name: str, plan: Plan) -> torch.device:
    """Return the device of that name; `auto` is the one the plan was made for. PlanError if it is not here."""
    wanted = plan.device if name == "auto" else name
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise PlanError(f"--device {wanted}", "is not a device", "use auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f"--device {wanted}", "is not supported", "use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        where, what = (plan.name, "was planned for a GPU, and ") if name == "auto" else (f"--device {name}", "")
        raise PlanError(where, f"{what}there is none here", "use --device cpu")
    return device


def autocast(plan: Plan, device: torch.device) -> torch.autocast:
    """Return the autocast context of the plan's precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[plan.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=plan.precision != "fp32")
