"""Which annotated voxels teach and which choose: seeded, and never the same voxel on both sides.

In this order: what datasplit.csv says; whole volumes, where there are several; whole crops, where there are many;
else a box at one side of one crop, in the plane, so that one crop is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from autoseg.geometry import VoxelsZYX
from autoseg.schema import CropFacts, Fingerprint, Region, Split, VolumeFacts

VALIDATION_SHARE = 0.1
MIN_CROPS_TO_HOLD_OUT_ONE = 8
BOX_STEP = 64


class SplitCrop(NamedTuple):
    """What the split rule looks at: where a crop is from, and its annotated voxels that hold each class.

    `outer_start_zyx` says for each axis whether the crop's start, rather than its end, is nearer to the end of its EM.
    """

    name: str
    volume: str
    shape_zyx: VoxelsZYX
    present: Mapping[str, int]
    declared: str | None
    outer_start_zyx: tuple[bool, bool, bool] = (False, False, False)


def split_crops(facts: Fingerprint, classes: Sequence[str]) -> list[SplitCrop]:
    """Return what the rule looks at of every crop of a data set."""
    volumes = {volume.name: volume for volume in facts.volumes}
    return [
        SplitCrop(
            name=crop.name,
            volume=crop.volume,
            shape_zyx=crop.shape_zyx,
            present={name: crop.counts[name].present for name in classes if name in crop.counts},
            declared=crop.split,
            outer_start_zyx=_outer_start(crop, volumes[crop.volume]),
        )
        for crop in facts.crops
    ]


def _outer_start(crop: CropFacts, volume: VolumeFacts) -> tuple[bool, bool, bool]:
    sides = zip(crop.grid.corner_nm, crop.grid.extent_nm, volume.shape_zyx, volume.voxel_size_nm, strict=True)
    z, y, x = (corner < n * v - (corner + extent) for corner, extent, n, v in sides)
    return z, y, x


def derive_split(crops: Sequence[SplitCrop], seed: int) -> Split:
    """Return the split of these crops; deterministic for (crops, seed)."""
    declared = {crop.declared for crop in crops}
    if declared - {None}:
        return Split(
            train=tuple(Region(crop=c.name) for c in crops if c.declared != "validate"),
            validate=tuple(Region(crop=c.name) for c in crops if c.declared == "validate"),
            rule="datasplit",
        )
    rng = np.random.Generator(np.random.Philox(seed))
    volumes = sorted({crop.volume for crop in crops})
    if len(volumes) >= 3:
        chosen = _hold_out([[c for c in crops if c.volume == v] for v in volumes], rng)
        if chosen:
            return _whole(crops, chosen, "volumes")
    if len(crops) >= MIN_CROPS_TO_HOLD_OUT_ONE:
        chosen = _hold_out([[crop] for crop in crops], rng)
        if chosen:
            return _whole(crops, chosen, "crops")
    return _box(crops)


def _whole(crops: Sequence[SplitCrop], chosen: set[str], rule: str) -> Split:
    return Split(
        train=tuple(Region(crop=c.name) for c in crops if c.name not in chosen),
        validate=tuple(Region(crop=c.name) for c in crops if c.name in chosen),
        rule="volumes" if rule == "volumes" else "crops",
    )


def _hold_out(groups: list[list[SplitCrop]], rng: np.random.Generator) -> set[str]:
    """Pick groups, at random, until the share is reached; never the last that holds a class for training."""
    total = _presence([crop for group in groups for crop in group])
    wanted = max(1, round(VALIDATION_SHARE * len(groups)))
    kept = list(range(len(groups)))
    chosen: set[int] = set()
    for index in rng.permutation(len(groups)).tolist():
        rest = _presence([crop for i in kept if i != index for crop in groups[i]])
        if len(chosen) < wanted and set(rest) == set(total):
            kept.remove(index)
            chosen.add(index)
    return {crop.name for i in chosen for crop in groups[i]}


def _presence(crops: Sequence[SplitCrop]) -> set[str]:
    return {name for crop in crops for name, count in crop.present.items() if count > 0}


def _box(crops: Sequence[SplitCrop]) -> Split:
    """Hold out one side of the crop that holds most classes, along its longest in-plane axis; one line is not cut.

    It is the side nearer to the end of the EM: training keeps what borders on the rest of the volume.
    """
    crop = max(crops, key=lambda c: (sum(n > 0 for n in c.present.values()), np.prod(c.shape_zyx), c.name))
    total = sum(int(np.prod(c.shape_zyx)) for c in crops)
    axis = 1 + int(np.argmax(crop.shape_zyx[1:]))
    length = crop.shape_zyx[axis]
    share = VALIDATION_SHARE * total / int(np.prod(crop.shape_zyx))
    wanted = max(1, min(round(length * share), length // 2))
    wanted = max(BOX_STEP, wanted // BOX_STEP * BOX_STEP) if length >= 4 * BOX_STEP else wanted
    if length < 2:
        return Split(train=tuple(Region(crop=c.name) for c in crops), validate=(), rule="box")
    at_start = crop.outer_start_zyx[axis]
    start, stop = [0, 0, 0], list(crop.shape_zyx)
    start[axis] = stop[axis] = wanted if at_start else length - wanted
    low = Region(crop=crop.name, box_zyx=((0, 0, 0), (stop[0], stop[1], stop[2])))
    high = Region(crop=crop.name, box_zyx=((start[0], start[1], start[2]), crop.shape_zyx))
    learnt, held_out = (high, low) if at_start else (low, high)
    return Split(
        train=tuple(learnt if c.name == crop.name else Region(crop=c.name) for c in crops),
        validate=(held_out,),
        rule="box",
    )
