"""How much of a patch the crops can fill with annotated tissue: the larger a patch, the more of it lies outside.

::

    crop of 800 nm            at 8 nm: 100 voxels
    ┌──────────┐   ┌────────────────────────┐
    │  patch   │   │   ┌──────────┐         │
    │  of 96²  │   │   │   crop   │         │
    └──────────┘   │   └──────────┘         │
      100 %        └────────────────────────┘  256²: 15 %
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from autoseg.geometry import NmZYX, VoxelsZYX, annotated_share, cube_edge_nm
from autoseg.schema import CropFacts, ValidShare

PATCH_EDGES = (512, 384, 320, 256, 192, 160, 128, 96, 64, 48, 32, 16)
SOLID_EDGES = (192, 160, 128, 96, 64)
FLAT_LISTED = (64, 96, 128, 192, 256, 384, 512)
HAIR = 1e-3


def shares_of(crops: Iterable[CropFacts], patch_zyx: VoxelsZYX, voxel_size_nm: NmZYX) -> list[float]:
    """Return for each crop which share of a patch it fills, at best, from 0 to 1."""
    return [annotated_share(crop.extent_nm, patch_zyx, voxel_size_nm) for crop in crops]


def valid_shares(crops: Sequence[CropFacts]) -> tuple[ValidShare, ...]:
    """Return the shares of usual patches, flat and as cubic as voxels allow, at the voxel sizes of the labels.

    Sizes are those of the crops, one for each octave: the most frequent, finest first. At each of them count the crops
    whose labels are no coarser.
    """
    found = []
    for size in _usual_sizes(crops):
        limit = cube_edge_nm(size) * (1 + HAIR)
        fine = [crop for crop in crops if cube_edge_nm(crop.voxel_size_nm) <= limit]
        per_section = min(size[1:]) / size[0]
        patches: list[VoxelsZYX] = [(1, edge, edge) for edge in FLAT_LISTED]
        patches += [(max(2, round(edge * per_section)), edge, edge) for edge in reversed(SOLID_EDGES)]
        for patch in patches:
            shares = shares_of(fine, patch, size)
            found.append(
                ValidShare(
                    voxel_size_nm=size,
                    patch_size_zyx=patch,
                    mean=statistics.fmean(shares),
                    median=statistics.median(shares),
                    num_crops=len(shares),
                )
            )
    return tuple(found)


def _usual_sizes(crops: Sequence[CropFacts]) -> list[NmZYX]:
    """Return the most frequent voxel size of each octave, finest first."""
    by_octave: dict[int, Counter[NmZYX]] = {}
    for crop in crops:
        octave = round(math.log2(cube_edge_nm(crop.voxel_size_nm)))
        by_octave.setdefault(octave, Counter())[crop.voxel_size_nm] += 1
    return [by_octave[octave].most_common(1)[0][0] for octave in sorted(by_octave)]
