"""Pyramids: which levels a volume gets, and how each is made from the finer one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from autoseg.data.store.engine import create_array
from autoseg.data.store.reading import ArrayReader, ChunkCache
from autoseg.geometry import Box, Grid, VoxelsZYX, blocks, coarser_voxel_size

CHUNK_EDGE = 64
CACHE_BYTES = 2**26


def chunk_shape(shape_zyx: VoxelsZYX) -> VoxelsZYX:
    """Return the chunk shape for a new array: 64³, thin axes whole."""
    z, y, x = (min(n, CHUNK_EDGE) for n in shape_zyx)
    return z, y, x


def pyramid_grids(grid: Grid, smallest_edge: int = 64) -> list[Grid]:
    """Return the grids of a pyramid; each level halves the axes that are not yet coarser than the others.

    A voxel of a level is centred on the voxels it is made of; an odd last voxel has no partner and is dropped::

        s0   o o o o o        translation 0
        s1    O   O           translation 0.5
    """
    grids = [grid]
    while max(grids[-1].shape_zyx) >= 2 * smallest_edge and len(grids) < 8:
        fine = grids[-1]
        (nz, ny, nx), (vz, vy, vx), (oz, oy, ox) = fine
        coarse = coarser_voxel_size(fine.voxel_size_nm, fine.shape_zyx)
        fz, fy, fx = (round(c / v) for c, v in zip(coarse, fine.voxel_size_nm, strict=True))
        origin = (oz + vz * (fz - 1) / 2, oy + vy * (fy - 1) / 2, ox + vx * (fx - 1) / 2)
        grids.append(Grid((nz // fz, ny // fy, nx // fx), (vz * fz, vy * fy, vx * fx), origin))
    return grids


def write_pyramid(path: Path, grids: list[Grid], reduce: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Fill s1, s2, ... from s0 block by block; `reduce` maps (..., 8 or fewer siblings) to one voxel."""
    for i, (fine, coarse) in enumerate(itertools.pairwise(grids)):
        source = ArrayReader(path / f"s{i}", ChunkCache(CACHE_BYTES))
        chunk = chunk_shape(coarse.shape_zyx)
        target = create_array(path / f"s{i + 1}", coarse.shape_zyx, source.dtype, chunk, store_zeros=True)
        fz, fy, fx = (round(c / v) for c, v in zip(coarse.voxel_size_nm, fine.voxel_size_nm, strict=True))
        for box in blocks(coarse.shape_zyx, (CHUNK_EDGE, 4 * CHUNK_EDGE, 4 * CHUNK_EDGE)):
            (z0, y0, x0), (z1, y1, x1) = box
            voxels = source.read(Box((z0 * fz, y0 * fy, x0 * fx), (z1 * fz, y1 * fy, x1 * fx)))
            z, y, x = box.shape_zyx
            siblings = voxels.reshape(z, fz, y, fy, x, fx).transpose(0, 2, 4, 1, 3, 5)
            target[box.slices] = reduce(siblings.reshape(z, y, x, -1))
