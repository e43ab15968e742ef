"""Which annotated voxels teach and which choose: seeded, and never the same voxel on both sides.

In this order: what datasplit.csv says; whole EM volumes, where there are several; whole crops, where there are many;
else a box at one side of one crop, in the plane, so that one crop is enough. k folds go by the same ladder, each
fold validating once; the last rung cuts every crop into k slabs.
Crops that share voxels of one EM go to one side together, or are cut at the same plane (see islands).
Order by chance is the order of sha256("seed/name"): the same on every machine, and for any order of the crops.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

from autoseg.data.islands import TOUCHING, Island, SplitCrop, cut, frame_of, grid_of, islands, least_in
from autoseg.errors import PlanError
from autoseg.geometry import Grid, NmZYX, cube_edge_nm
from autoseg.schema import CropFacts, Fingerprint, Region, Split, SplitRule, VolumeFacts

VALIDATION_SHARE = 0.1
MAX_CROP_SHARES = (0.2, 0.5)  # of the crops, the second where no group is small enough for the first
MAX_VOXEL_SHARE = 0.5
MIN_CROPS_TO_HOLD_OUT_ONE = 8
BOX_STEP = 64
DEFAULT_FOLDS = 5


def split_crops(
    facts: Fingerprint, classes: Sequence[str], voxel_edge_nm: tuple[float, float] | None = None
) -> list[SplitCrop]:
    """Return what the rule looks at of every crop of a data set, or of those whose voxels are of such edges."""
    volumes = {volume.name: volume for volume in facts.volumes}
    return [
        SplitCrop(
            name=crop.name,
            volume=volumes[crop.volume].path,
            shape_zyx=crop.shape_zyx,
            present={name: voxels for name in classes if (voxels := crop.present(name)) is not None},
            declared=crop.split,
            outer_start_zyx=_outer_start(crop, volumes[crop.volume]),
            grid=crop.grid,
            along={name: (n.along_y, n.along_x) for name in classes if (n := crop.counts.get(name)) and n.along_y},
        )
        for crop in facts.crops
        if voxel_edge_nm is None or within(crop.voxel_size_nm, voxel_edge_nm)
    ]


def within(voxel_size_nm: NmZYX, edges_nm: tuple[float, float]) -> bool:
    """Return whether a voxel is as large as a cube of an edge from the first to the second."""
    return edges_nm[0] * (1 - 1e-6) <= cube_edge_nm(voxel_size_nm) <= edges_nm[1] * (1 + 1e-6)


def _outer_start(crop: CropFacts, volume: VolumeFacts) -> tuple[bool, bool, bool]:
    em = Grid(volume.shape_zyx, volume.voxel_size_nm, volume.origin_nm)
    sides = zip(crop.grid.corner_nm, crop.grid.extent_nm, em.corner_nm, em.extent_nm, em.voxel_size_nm, strict=True)
    z, y, x = (
        corner - start <= (start + length) - (corner + extent) + TOUCHING * size
        for corner, extent, start, length, size in sides
    )
    return z, y, x


def derive_split(crops: Sequence[SplitCrop], seed: int, *, folds: int | None = None, fold: int | None = None) -> Split:
    """Return the split of these crops, or fold number `fold` (from 1) of `folds`; deterministic for its arguments.

    Raises PlanError for folds that the data cannot give.
    """
    if any(crop.declared for crop in crops):
        if folds is not None:
            raise PlanError("--folds", "datasplit.csv fixes the split of this data", "remove it, or leave --folds out")
        return _whole(crops, {crop.name for crop in crops if crop.declared == "validate"}, "datasplit")
    if folds is not None:
        return _fold(crops, seed, folds, 1 if fold is None else fold)
    by_volume = _volumes(crops)
    if len(by_volume) >= 2:
        # two volumes of like size are not split by volume: half of the data is too much to give away
        chosen = _hold_out(by_volume, seed, MAX_CROP_SHARES if len(by_volume) >= 3 else MAX_CROP_SHARES[:1])
        if chosen:
            return _whole(crops, chosen, "volumes")
    if len(crops) >= MIN_CROPS_TO_HOLD_OUT_ONE:
        chosen = _hold_out(islands(crops), seed, MAX_CROP_SHARES)
        if chosen:
            return _whole(crops, chosen, "crops")
    return _box(crops)


def _whole(crops: Sequence[SplitCrop], chosen: set[str], rule: SplitRule) -> Split:
    return Split(
        train=tuple(Region(crop=c.name) for c in crops if c.name not in chosen),
        validate=tuple(Region(crop=c.name) for c in crops if c.name in chosen),
        rule=rule,
    )


def _volumes(crops: Sequence[SplitCrop]) -> list[Island]:
    return [[crop for crop in crops if crop.volume == name] for name in sorted({crop.volume for crop in crops})]


def _by_chance(groups: list[Island], seed: int) -> list[Island]:
    keys = {id(group): min(crop.name for crop in group) for group in groups}
    return sorted(groups, key=lambda g: hashlib.sha256(f"{seed}/{keys[id(g)]}".encode()).digest())


def _hold_out(groups: list[Island], seed: int, crop_shares: Sequence[float]) -> set[str]:
    """Pick groups, first those that add most classes to validation; never the last that holds a class for training.

    At least a tenth of the crops, more while they add classes, within a share of the crops and half of the voxels.
    """
    num_crops, num_voxels = sum(map(len, groups)), sum(crop.num_voxels for group in groups for crop in group)
    wanted = max(1, round(VALIDATION_SHARE * num_crops))
    for share in crop_shares:
        chosen: list[Island] = []
        kept = _by_chance(groups, seed)
        covered: set[str] = set()
        while True:
            spare = {name for name, n in Counter(k for g in kept for k in _classes(g)).items() if n > 1}
            fits = [
                group
                for group in kept
                if _classes(group) <= spare
                and sum(map(len, [*chosen, group])) <= share * num_crops
                and sum(crop.num_voxels for g in [*chosen, group] for crop in g) <= MAX_VOXEL_SHARE * num_voxels
            ]
            best = max(fits, key=lambda group: len(_classes(group) - covered), default=None)
            if best is None or len(kept) == 1 or (sum(map(len, chosen)) >= wanted and _classes(best) <= covered):
                break
            kept.remove(best)
            chosen.append(best)
            covered |= _classes(best)
        if chosen:
            return {crop.name for group in chosen for crop in group}
    return set()


def _classes(group: Island) -> set[str]:
    return {name for crop in group for name, count in crop.present.items() if count > 0}


def _fold(crops: Sequence[SplitCrop], seed: int, folds: int, fold: int) -> Split:
    """Return one of k folds: by volume if there are k, else by island if there are k, else by slab."""
    if folds < 2 or not 1 <= fold <= folds:
        raise PlanError(
            "--folds", f"fold {fold} of {folds}", "give at least 2 folds, and a fold from 1 to their number"
        )
    by_volume, by_island = _volumes(crops), islands(crops)
    if len(by_island) >= folds:
        rule: SplitRule = "volumes" if len(by_volume) >= folds else "crops"
        dealt = _deal(by_volume if rule == "volumes" else by_island, seed, folds)
        split = _whole(crops, {crop.name for group in dealt[fold - 1] for crop in group}, rule)
    else:
        split = _slabs(crops, folds, fold)
    if not split.validate or not split.train:
        raise PlanError("--folds", f"fold {fold} of {folds} has nothing on one side", "use fewer folds")
    return Split(train=split.train, validate=split.validate, rule=split.rule, folds=folds, fold=fold)


def _deal(groups: list[Island], seed: int, folds: int) -> list[list[Island]]:
    """Deal groups to folds, those with the rarest class first, then the largest.

    A group goes where it does not gather all groups of a class in one fold (training would lose it), where its
    rarest class is rarest, and where the fewest crops are.
    """
    holders = Counter(name for group in groups for name in _classes(group))
    by_chance = _by_chance(groups, seed)
    rarity = {id(g): min((holders[name] for name in _classes(g)), default=len(groups)) for g in groups}
    dealt: list[list[Island]] = [[] for _ in range(folds)]
    held: list[Counter[str]] = [Counter() for _ in range(folds)]
    for group in sorted(by_chance, key=lambda g: (rarity[id(g)], -len(g))):
        names = _classes(group)
        rarest = [name for name in names if holders[name] == rarity[id(group)]]
        costs = [
            (
                sum(holders[name] > 1 and held[k][name] == holders[name] - 1 for name in names),
                sum(held[k][name] for name in rarest),
                sum(map(len, dealt[k])),
            )
            for k in range(folds)
        ]
        chosen = costs.index(min(costs))
        dealt[chosen].append(group)
        held[chosen].update(names)
    if not all(dealt):  # as many groups as folds, but classes drew two together
        return [[group for i, group in enumerate(by_chance) if i % folds == k] for k in range(folds)]
    return dealt


def _slabs(crops: Sequence[SplitCrop], folds: int, fold: int) -> Split:
    """Hold out the same of k slabs of every island, across its longest in-plane axis."""
    train, validate = [], []
    for island in islands(crops):
        axis, start, length = frame_of(island)
        step = max(grid_of(crop).voxel_size_nm[axis] for crop in island)
        low, high = (start + round(length * k / folds / step) * step for k in (fold - 1, fold))
        high = start + length if fold == folds else high
        learnt, held_out = cut(island, axis, low, high)
        train += learnt
        validate += held_out
    return Split(train=tuple(train), validate=tuple(validate), rule="box")


def _box(crops: Sequence[SplitCrop]) -> Split:
    """Hold out one side of the crop that holds most classes, along its longest in-plane axis; one line is not cut.

    It is the side nearer to the end of the EM: training keeps what borders on the rest of the volume. Another place
    is taken where training would lose a class, or most of one, or where validation sees more of them. Crops that
    overlap it are cut at the same plane.
    """
    crop = max(crops, key=lambda c: (sum(n > 0 for n in c.present.values()), c.num_voxels, c.name))
    island = next(group for group in islands(crops) if crop in group)
    axis, start, extent = frame_of(island)
    step = max(grid_of(member).voxel_size_nm[axis] for member in island)
    length = round(extent / step)
    share = VALIDATION_SHARE * sum(c.num_voxels for c in crops) / sum(c.num_voxels for c in island)
    wanted = max(1, min(round(length * share), length // 2))
    wanted = max(BOX_STEP, wanted // BOX_STEP * BOX_STEP) if length >= 4 * BOX_STEP else wanted
    whole = tuple(Region(crop=c.name) for c in crops if c not in island)
    if length < 2:
        return Split(train=tuple(Region(crop=c.name) for c in crops), validate=(), rule="box")
    cuts = []
    for first in _places(length, wanted, crop.outer_start_zyx[axis]):
        low = -math.inf if first == 0 else start + first * step
        high = math.inf if first + wanted == length else start + (first + wanted) * step
        cuts.append(cut(island, axis, low, high))
    learnt, held_out = max(cuts, key=lambda sides: _worth(crops, island, *sides))
    order = {c.name: i for i, c in enumerate(crops)}
    train = sorted([*whole, *learnt], key=lambda region: order[region.crop])
    return Split(train=tuple(train), validate=tuple(held_out), rule="box")


def _places(length: int, wanted: int, at_start: bool) -> list[int]:
    """Return where a box may begin, the best first: the outer end, the other, then in between."""
    ends = [0, length - wanted] if at_start else [length - wanted, 0]
    between = range(0, length - wanted, max(1, wanted // 2, length // 64))
    return list(dict.fromkeys([*ends, *between]))


def _worth(
    crops: Sequence[SplitCrop], island: Island, learnt: Sequence[Region], held_out: Sequence[Region]
) -> tuple[int, int, int]:
    """Return how many classes train, how many with at least half of their voxels, and how many validate."""
    members = {crop.name: crop for crop in island}
    taught, seen, total = Counter[str](), Counter[str](), Counter[str]()
    for crop in crops:
        total.update(crop.present)
        taught.update({} if crop.name in members else crop.present)
    for region in learnt:
        taught.update({name: least_in(members[region.crop], region, name) for name in members[region.crop].present})
    for region in held_out:
        seen.update({name: least_in(members[region.crop], region, name) for name in members[region.crop].present})
    return (
        sum(n > 0 for n in taught.values()),
        sum(taught[name] >= (1 - MAX_VOXEL_SHARE) * n for name, n in total.items()),
        sum(n > 0 for n in seen.values()),
    )
