"""The split: never the same voxel on both sides, the same for the same seed, by whole volumes where there are many.

Reference for space: every voxel of every crop as a set of cells of a fine lattice.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import crop_path, em_path, make_dataset, write_label, write_multiscale
from test_planner import cheap, facts, machine

from autoseg.cli import main
from autoseg.data.islands import Leaks, SplitCrop, count_leaks, holders, islands, least_in, most_in
from autoseg.data.split import (
    MAX_CROP_SHARES,
    MAX_VOXEL_SHARE,
    MIN_CROPS_TO_HOLD_OUT_ONE,
    VALIDATION_SHARE,
    derive_split,
    split_crops,
)
from autoseg.errors import PlanError
from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX, part_length
from autoseg.plan import fingerprint, make_plan
from autoseg.schema import Plan, Region, Split, load_as

CLASSES = ("mito", "er", "pm")
GOLDEN = [["v1/crop1"], ["v0/crop1"], ["v2/crop1"]]


@st.composite
def crop_sets(draw: st.DrawFn, largest: int = 14) -> list[SplitCrop]:
    """Return crops of a few volumes, each holding some classes."""
    edge = st.integers(1, 40)
    crops = []
    for i in range(draw(st.integers(1, largest))):
        volume = draw(st.sampled_from("abcde"))
        present = {name: draw(st.sampled_from([0, 0, 5, 90])) for name in CLASSES}
        shape = (draw(edge), draw(edge), draw(edge))
        crops.append(SplitCrop(f"{volume}/crop{i}", volume, shape, present, None))
    return crops


def taken(regions: tuple[Region, ...], name: str, shape: VoxelsZYX) -> np.ndarray:
    """Return which voxels of a crop the regions hold."""
    mask = np.zeros(shape, dtype=bool)
    for region in regions:
        if region.crop == name:
            mask[region.box(shape).slices] = True
    return mask


def names(regions: tuple[Region, ...]) -> list[str]:
    return [region.crop for region in regions]


@given(crop_sets(), st.integers(0, 5))
def test_no_voxel_is_on_both_sides_and_none_is_lost(crops: list[SplitCrop], seed: int) -> None:
    split = derive_split(crops, seed)
    for crop in crops:
        train, validate = (
            taken(split.train, crop.name, crop.shape_zyx),
            taken(split.validate, crop.name, crop.shape_zyx),
        )
        assert not (train & validate).any()
        assert (train | validate).all()
    assert split.train, "there is something to learn from"


@given(crop_sets(), st.integers(0, 5))
def test_the_same_crops_and_seed_give_the_same_split(crops: list[SplitCrop], seed: int) -> None:
    assert derive_split(crops, seed) == derive_split(list(crops), seed)


def test_another_seed_holds_out_another_volume() -> None:
    crops = [SplitCrop(f"{v}/crop{i}", v, (8, 8, 8), {"mito": 9}, None) for i, v in enumerate("abcdef")]
    assert len({tuple(names(derive_split(crops, seed).validate)) for seed in range(20)}) > 1


@given(crop_sets(), st.integers(0, 5))
def test_volumes_are_held_out_whole(crops: list[SplitCrop], seed: int) -> None:
    """Crops of one volume look alike, so neighbours of what is validated on must not be learnt from."""
    split = derive_split(crops, seed)
    assume(split.rule == "volumes")
    volume = {crop.name: crop.volume for crop in crops}
    assert not {volume[n] for n in names(split.train)} & {volume[n] for n in names(split.validate)}
    assert split.validate


def test_three_volumes_are_split_by_volume_and_eight_crops_by_crop() -> None:
    three = [SplitCrop(f"{v}/crop{i}", v, (8, 8, 8), {"mito": 9}, None) for i, v in enumerate("aabbcc")]
    assert derive_split(three, 0).rule == "volumes"
    one = [SplitCrop(f"a/crop{i}", "a", (8, 8, 8), {"mito": 9}, None) for i in range(MIN_CROPS_TO_HOLD_OUT_ONE)]
    split = derive_split(one, 0)
    assert split.rule == "crops"
    assert len(split.validate) == 1
    assert len(split.train) == len(one) - 1
    assert derive_split(one[1:], 0).rule == "box"


@given(crop_sets(), st.integers(0, 5))
def test_every_class_stays_in_training_when_whole_crops_are_held_out(crops: list[SplitCrop], seed: int) -> None:
    split = derive_split(crops, seed)
    assume(split.rule != "box")
    by_name = {crop.name: crop for crop in crops}
    held = {k for crop in crops for k, n in crop.present.items() if n}
    assert {k for n in names(split.train) for k, count in by_name[n].present.items() if count} == held


def test_the_only_volume_with_a_class_is_never_held_out() -> None:
    crops = [SplitCrop(f"{v}/crop{i}", v, (8, 8, 8), {"mito": 9}, None) for i, v in enumerate("abcd")]
    crops[2] = crops[2]._replace(present={"mito": 9, "pm": 1})
    for seed in range(30):
        assert "c/crop2" not in names(derive_split(crops, seed).validate)


@pytest.mark.parametrize("shape", [(8, 64, 64), (1, 512, 300), (15, 512, 1024), (200, 7, 3), (1, 1, 2)])
def test_one_crop_is_enough(shape: VoxelsZYX) -> None:
    split = derive_split([SplitCrop("a/crop1", "a", shape, {"mito": 9}, None)], 0)
    assert split.rule == "box"
    validate = taken(split.validate, "a/crop1", shape)
    assert 0 < validate.sum() <= validate.size / 2
    depth = np.flatnonzero(validate.any(axis=(1, 2)))
    assert len(depth) == shape[0], "the cut is in the plane, where sections are not missing"


def test_one_voxel_is_learnt_from_and_not_validated_on() -> None:
    split = derive_split([SplitCrop("a/crop1", "a", (1, 1, 1), {}, None)], 0)
    assert taken(split.train, "a/crop1", (1, 1, 1)).all()
    assert split.validate == ()


@given(crop_sets(3))
def test_the_box_holds_about_its_share(crops: list[SplitCrop]) -> None:
    split = derive_split(crops, 0)
    assume(split.rule == "box" and split.validate)
    shapes = {crop.name: crop.shape_zyx for crop in crops}
    (region,) = split.validate
    box = region.box(shapes[region.crop])
    slab = box.num_voxels / max(box.shape_zyx[1:])
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    section = int(np.prod(shapes[region.crop])) / max(shapes[region.crop][1:])
    assert box.num_voxels <= VALIDATION_SHARE * total + max(slab, section)


def test_what_the_datasplit_declares_holds_and_the_rest_trains() -> None:
    sides = ["train", "validate", None, "validate"]
    crops = [SplitCrop(f"a/crop{i}", "a", (4, 4, 4), {}, side) for i, side in enumerate(sides)]
    assert derive_split(crops, 0) == Split(
        train=(Region(crop="a/crop0"), Region(crop="a/crop2")),
        validate=(Region(crop="a/crop1"), Region(crop="a/crop3")),
        rule="datasplit",
    )


# ---- crops in space -----------------------------------------------------------------------------------------


@st.composite
def placed_crops(draw: st.DrawFn, largest: int = 7) -> list[SplitCrop]:
    """Return crops of one or two EM volumes on lattices of 2 and 4 nm, many of them overlapping."""
    crops = []
    for i in range(draw(st.integers(1, largest))):
        volume = draw(st.sampled_from("ab"))
        size = draw(st.sampled_from([2.0, 4.0]))
        shape = tuple(draw(st.integers(1, 6)) for _ in range(3))
        corner = [2.0 * draw(st.integers(0, 12)) for _ in range(3)]
        grid = Grid(shape, (size,) * 3, tuple(c + size / 2 for c in corner))
        present = {name: draw(st.sampled_from([0, 5])) for name in CLASSES}
        crops.append(SplitCrop(f"{volume}/crop{i}", volume, shape, present, None, grid=grid))
    return crops


def cells(crop: SplitCrop, region: Region) -> set[tuple[str, int, int, int]]:
    """Return the cells of 2 nm that a region fills, by brute force."""
    assert crop.grid is not None
    box = region.box(crop.shape_zyx)
    edges = [
        range(round((c + a * v) / 2), round((c + b * v) / 2))
        for c, v, a, b in zip(crop.grid.corner_nm, crop.grid.voxel_size_nm, box.start, box.stop, strict=True)
    ]
    return {(crop.volume, z, y, x) for z, y, x in itertools.product(*edges)}


def side(crops: list[SplitCrop], regions: tuple[Region, ...]) -> set[tuple[str, int, int, int]]:
    by_name = {crop.name: crop for crop in crops}
    return set().union(*(cells(by_name[region.crop], region) for region in regions))


@given(placed_crops(), st.integers(0, 3))
def test_no_piece_of_em_is_on_both_sides_where_crops_overlap(crops: list[SplitCrop], seed: int) -> None:
    split = derive_split(crops, seed)
    assert not side(crops, split.train) & side(crops, split.validate)
    assert count_leaks(split, crops) == Leaks(0, 0)
    assert split.train


@given(placed_crops(), st.data())
def test_leaks_are_counted_as_the_cells_say(crops: list[SplitCrop], data: st.DataObject) -> None:
    """Any regions on either side: a validation voxel leaks if one of its cells is trained on."""
    taken = []
    for crop in crops:
        start = tuple(data.draw(st.integers(0, n - 1)) for n in crop.shape_zyx)
        stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, crop.shape_zyx, strict=True))
        taken.append(Region(crop=crop.name, box_zyx=(start, stop)))
    number = data.draw(st.integers(0, len(taken)))
    split = Split(train=tuple(taken[:number]), validate=tuple(taken[number:]), rule="user")
    trained = side(crops, split.train)
    by_name = {crop.name: crop for crop in crops}
    expected = []
    for region in split.validate:
        crop, box = by_name[region.crop], region.box(by_name[region.crop].shape_zyx)
        voxels = itertools.product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True)))
        one = [Region(crop=crop.name, box_zyx=(v, (v[0] + 1, v[1] + 1, v[2] + 1))) for v in voxels]
        expected.append(sum(bool(cells(crop, voxel) & trained) for voxel in one))
    assert count_leaks(split, crops) == Leaks(sum(n > 0 for n in expected), sum(expected))


@given(placed_crops())
def test_islands_are_the_connected_groups_of_overlapping_crops(crops: list[SplitCrop]) -> None:
    filled = {crop.name: cells(crop, Region(crop=crop.name)) for crop in crops}
    groups = [{crop.name} for crop in crops]
    for a, b in itertools.combinations(filled, 2):
        if filled[a] & filled[b]:
            joined = next(g for g in groups if a in g) | next(g for g in groups if b in g)
            groups = [g for g in groups if not g & joined] + [joined]
    assert sorted(sorted(crop.name for crop in group) for group in islands(crops)) == sorted(map(sorted, groups))


def test_a_volume_on_both_sides_leaks_whole_when_the_rule_is_by_volumes() -> None:
    crops = [SplitCrop(f"a/crop{i}", "a", (2, 3, 4), {}, None) for i in range(3)]
    split = Split(train=(Region(crop="a/crop0"),), validate=(Region(crop="a/crop1"),), rule="volumes")
    assert count_leaks(split, crops) == Leaks(1, 24)
    assert count_leaks(msgspec.structs.replace(split, rule="crops"), crops) == Leaks(0, 0)


# ---- classes on both sides ----------------------------------------------------------------------------------


@given(crop_sets(), st.integers(0, 5))
def test_no_single_group_could_still_add_a_class_to_validation(crops: list[SplitCrop], seed: int) -> None:
    """Greedy to the end: every volume left for training would cost it a class, add none, or be too large."""
    split = derive_split(crops, seed)
    assume(split.rule == "volumes")
    held = {crop.volume for crop in crops if crop.name in names(split.validate)}
    classes = {v: {k for c in crops if c.volume == v for k, n in c.present.items() if n} for v in "abcde"}
    covered = set().union(*(classes[v] for v in held))
    sizes = {v: [math.prod(c.shape_zyx) for c in crops if c.volume == v] for v in "abcde"}
    share = sum(len(sizes[v]) for v in held) / len(crops)
    cap = next(cap for cap in MAX_CROP_SHARES if share <= cap)
    for volume in {crop.volume for crop in crops} - held:
        rest = set().union(*(classes[v] for v in classes if v not in held and v != volume))
        fits = sum(len(sizes[v]) for v in (*held, volume)) <= cap * len(crops)
        fits &= sum(sum(sizes[v]) for v in (*held, volume)) <= MAX_VOXEL_SHARE * sum(map(sum, sizes.values()))
        assert not (classes[volume] <= rest and fits and classes[volume] - covered)


def test_a_class_of_two_volumes_is_on_both_sides() -> None:
    """Ten volumes, a class in two of them: chance alone would seldom hold one of the two out."""
    crops = [SplitCrop(f"{v}/crop{i}", v, (8, 8, 8), {"mito": 9}, None) for i, v in enumerate("abcdefghij")]
    for i in (3, 7):
        crops[i] = crops[i]._replace(present={"mito": 9, "pm": 1})
    for seed in range(20):
        split = derive_split(crops, seed)
        for regions in (split.train, split.validate):
            assert {"d/crop3", "h/crop7"} & set(names(regions)), seed


# ---- a data set of the challenge's kind ---------------------------------------------------------------------


def challenge_like(seed: int, num_crops: int = 289, num_volumes: int = 22) -> list[SplitCrop]:
    """Return crops as the challenge has them: uneven volumes, 2-64 nm, some nested, partial and rare classes."""
    rng = np.random.default_rng(seed)
    volumes = np.minimum(rng.geometric(0.12, num_crops) - 1, num_volumes - 1)
    volumes[:num_volumes] = np.arange(num_volumes)
    chance = np.linspace(0.05, 0.8, 20)
    crops: list[SplitCrop] = []
    for i, volume in enumerate(volumes):
        size = float(rng.choice([2, 4, 4, 8, 32, 64]))
        shape = (int(rng.integers(100, 500)),) * 3
        corner = [float(n) for n in rng.integers(0, 40_000, 3)]
        before = [crop for crop in crops if crop.volume == f"v{volume}"]
        if before and rng.random() < 0.1:  # inside another crop of the volume, annotated more finely
            assert before[-1].grid is not None
            corner = [c + 10 for c in before[-1].grid.corner_nm]
        grid = Grid(shape, (size * 1.31, size, size), tuple(c + size / 2 for c in corner))
        annotated = rng.random(20) < (1 if rng.random() < 0.8 else 0.1)
        present = {f"k{k}": int(1000 * (rng.random() < chance[k])) for k in np.flatnonzero(annotated)}
        crops.append(SplitCrop(f"v{volume}/crop{i}", f"v{volume}", shape, present, None, grid=grid))
    return crops


def classes_of(crops: list[SplitCrop], regions: tuple[Region, ...]) -> set[str]:
    by_name = {crop.name: crop for crop in crops}
    return {k for region in regions for k, n in by_name[region.crop].present.items() if n}


@pytest.mark.parametrize("seed", range(5))
def test_289_crops_of_22_volumes_split_without_a_leak_and_with_every_class_on_both_sides(seed: int) -> None:
    crops = challenge_like(seed)
    split = derive_split(crops, seed)
    assert split.rule == "volumes"
    assert count_leaks(split, crops) == Leaks(0, 0)
    every = classes_of(crops, split.train) | classes_of(crops, split.validate)
    assert classes_of(crops, split.train) == classes_of(crops, split.validate) == every
    assert 0.05 < len(split.validate) / len(crops) <= 0.2


@pytest.mark.parametrize("seed", range(3))
def test_five_folds_of_289_crops_are_even_and_train_on_every_class(seed: int) -> None:
    crops = challenge_like(seed)
    splits = [derive_split(crops, seed, folds=5, fold=k) for k in range(1, 6)]
    assert sorted(n for split in splits for n in names(split.validate)) == sorted(crop.name for crop in crops)
    every = {k for crop in crops for k, n in crop.present.items() if n}
    volume = {crop.name: crop.volume for crop in crops}
    for split in splits:
        assert count_leaks(split, crops) == Leaks(0, 0)
        assert not {volume[n] for n in names(split.train)} & {volume[n] for n in names(split.validate)}
        assert classes_of(crops, split.train) == every
        assert len({volume[n] for n in names(split.validate)}) >= 2


def test_the_split_does_not_depend_on_the_order_of_the_crops() -> None:
    crops = challenge_like(0, 60, 8)
    for options in ({}, {"folds": 4, "fold": 2}):
        a, b = (derive_split(order, 0, **options) for order in (crops, crops[::-1]))
        assert set(names(a.validate)) == set(names(b.validate))


def test_the_split_is_the_same_on_every_machine() -> None:
    """Golden: chance is a hash of names, not a generator whose stream may change with a library."""
    crops = [SplitCrop(f"v{i}/crop1", f"v{i}", (8, 8, 8), {"mito": 9}, None) for i in range(10)]
    assert [names(derive_split(crops, seed).validate) for seed in range(3)] == GOLDEN


# ---- folds --------------------------------------------------------------------------------------------------


@given(crop_sets(), st.integers(2, 5), st.integers(0, 3))
def test_folds_are_disjoint_cover_everything_and_train_on_the_rest(
    crops: list[SplitCrop], folds: int, seed: int
) -> None:
    try:
        splits = [derive_split(crops, seed, folds=folds, fold=k) for k in range(1, folds + 1)]
    except PlanError as error:
        assert "use fewer folds" in str(error)  # noqa: PT017
        assert max(max(crop.shape_zyx[1:]) for crop in crops) < folds or len(crops) < folds
        return
    for crop in crops:
        held = [taken(split.validate, crop.name, crop.shape_zyx) for split in splits]
        assert (np.sum(held, axis=0) == 1).all(), "each voxel validates in exactly one fold"
        for split, mask in zip(splits, held, strict=True):
            assert (taken(split.train, crop.name, crop.shape_zyx) == ~mask).all()
    assert [(split.folds, split.fold) for split in splits] == [(folds, k) for k in range(1, folds + 1)]


@given(placed_crops(), st.integers(2, 4))
def test_folds_never_leak_where_crops_overlap(crops: list[SplitCrop], folds: int) -> None:
    for fold in range(1, folds + 1):
        try:
            split = derive_split(crops, 0, folds=folds, fold=fold)
        except PlanError:
            continue
        assert not side(crops, split.train) & side(crops, split.validate)
        assert count_leaks(split, crops) == Leaks(0, 0)


def test_folds_go_by_volume_then_by_crop_then_by_slab() -> None:
    crops = [SplitCrop(f"{v}/crop{i}", v, (8, 8, 60), {"mito": 9}, None) for i, v in enumerate("aabbc")]
    assert [derive_split(crops, 0, folds=k).rule for k in (2, 3, 4, 5, 6)] == [
        "volumes",
        "volumes",
        "crops",
        "crops",
        "box",
    ]
    (region, *_) = derive_split(crops[:1], 0, folds=6, fold=2).validate
    assert region.box_zyx == ((0, 0, 10), (8, 8, 20))


@pytest.mark.parametrize(("folds", "fold"), [(1, 1), (5, 0), (5, 6), (0, 1)])
def test_a_fold_that_does_not_exist_is_refused(folds: int, fold: int) -> None:
    with pytest.raises(PlanError, match=r"--folds: fold \d of \d: .*from 1"):
        derive_split([SplitCrop("a/crop1", "a", (8, 8, 8), {}, None)], 0, folds=folds, fold=fold)


def test_a_datasplit_wins_over_folds() -> None:
    crops = [SplitCrop(f"a/crop{i}", "a", (4, 4, 4), {}, declared) for i, declared in enumerate(["train", "validate"])]
    with pytest.raises(PlanError, match=r"datasplit\.csv fixes the split"):
        derive_split(crops, 0, folds=2, fold=1)


# ---- where in a crop a class lies ---------------------------------------------------------------------------


def counted(present: dict[str, np.ndarray], *, split: str | None = None) -> SplitCrop:
    """Return a crop that holds these masks, counted along y and x as a fingerprint does."""
    shape = next(iter(present.values())).shape
    along = {}
    for name, mask in present.items():
        rows = [mask.sum(axis=axes) for axes in ((0, 2), (0, 1))]
        sizes = [part_length(n) for n in shape[1:]]
        parts = [tuple(int(r[i : i + s].sum()) for i in range(0, len(r), s)) for r, s in zip(rows, sizes, strict=True)]
        along[name] = (parts[0], parts[1])
    voxels = {name: int(mask.sum()) for name, mask in present.items()}
    return SplitCrop("a/crop1", "a", shape, voxels, split, (True, True, True), along=along)


def mask_of(shape: VoxelsZYX, axis: int, *ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for start, stop in ranges:
        np.moveaxis(mask, axis, 0)[start:stop] = True
    return mask


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("length", [100, 320, 700])
def test_a_box_takes_no_class_away_from_training(axis: int, length: int) -> None:
    """The outer end would take the only voxels of one class: the other end is taken, or a place in between."""
    shape = (4, length, 20) if axis == 1 else (4, 20, length)
    everywhere = mask_of(shape, axis, (0, length))
    first, last = mask_of(shape, axis, (0, 6)), mask_of(shape, axis, (length - 6, length))
    for rare in ({"a": first}, {"a": last}, {"a": first, "b": last}):
        split = derive_split([counted({"mito": everywhere} | rare)], 0)
        train, validate = (taken(side, "a/crop1", shape) for side in (split.train, split.validate))
        assert not (train & validate).any()
        assert (train | validate).all()
        assert validate.any()
        assert all((mask & train).sum() >= mask.sum() / 2 for mask in rare.values())


def test_a_box_lies_where_it_shows_most_classes_else_at_the_outer_end() -> None:
    shape = (4, 20, 640)
    everywhere, halves = mask_of(shape, 2, (0, 640)), mask_of(shape, 2, (64, 128), (300, 384))
    assert derive_split([counted({"mito": everywhere})], 0).validate[0].box_zyx == ((0, 0, 0), (4, 20, 64))
    split = derive_split([counted({"mito": everywhere, "er": halves})], 0)
    for side in (split.train, split.validate):
        assert (halves & taken(side, "a/crop1", shape)).any()


@given(st.integers(1, 600), st.data())
def test_the_voxels_of_a_class_in_a_region_lie_between_the_bounds(length: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = rng.random((2, length, 9)) < data.draw(st.sampled_from([0.0, 0.01, 0.5]))
    crop = counted({"mito": mask})
    start = tuple(data.draw(st.integers(0, n - 1)) for n in mask.shape[1:])
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, mask.shape[1:], strict=True))
    region = Region(crop="a/crop1", box_zyx=((0, *start), (2, *stop)))
    held = int(mask[region.box(mask.shape).slices].sum())
    assert least_in(crop, region, "mito") <= held <= most_in(crop, region, "mito")
    assert least_in(crop, Region(crop="a/crop1"), "mito") == most_in(crop, Region(crop="a/crop1"), "mito") == mask.sum()


def write_classes(root: Path, em: np.ndarray, masks: dict[str, np.ndarray], voxel: NmZYX = (40.0, 8.0, 8.0)) -> Path:
    """Write one volume `a` with one crop that covers it."""
    grid = Grid(em.shape, voxel, (0.0, 0.0, 0.0))
    write_multiscale(em_path(root, "a"), [(grid, em)])
    for name, mask in masks.items():
        write_label(crop_path(root, "a", "crop1"), name, mask.astype(np.uint8), grid)
    return root


@pytest.mark.parametrize("width", [150, 320])
def test_a_fingerprint_counts_classes_along_y_and_x(tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(0)
    shape = (70, 40, width)
    masks = {"mito": rng.random(shape) < 0.3, "ld": mask_of(shape, 2, (width - 20, width))}
    data = write_classes(tmp_path / "data", rng.integers(1, 255, shape).astype(np.uint8), masks)
    (crop,) = fingerprint(data, tmp_path / "cache").crops
    expected = counted(masks)
    for name in masks:
        assert (crop.counts[name].along_y, crop.counts[name].along_x) == expected.along[name]


@cheap
def test_what_only_one_side_holds_is_said_and_gets_no_share_of_the_patches(tmp_path: Path) -> None:
    rng, shape = np.random.default_rng(0), (8, 64, 320)
    masks = {
        "mito": mask_of(shape, 2, (0, 320)),
        "ld": mask_of(shape, 2, (290, 318)),
        "lyso": mask_of(shape, 2, (2, 30)),
    }
    data = write_classes(tmp_path / "data", rng.integers(1, 255, shape).astype(np.uint8), masks)
    found = fingerprint(data, tmp_path / "cache")
    plan = make_plan("a", found, machine(), {})
    assert set(holders(plan.split.train, split_crops(found, plan.class_names))) == set(masks)
    assert "only in training: ld, lyso" in reason_of(plan, "split")
    assert "for each of 3 classes" in reason_of(plan, "sampling.class_floor")
    low = {"split.validate": (Region(crop="a/crop1", box_zyx=((0, 0, 0), (8, 64, 64))),)}
    low["split.train"] = (Region(crop="a/crop1", box_zyx=((0, 0, 64), (8, 64, 320))),)
    plan = make_plan("a", found, machine(), low)
    assert "only in validation: lyso; only in training: ld" in reason_of(plan, "split")
    because = reason_of(plan, "sampling.class_floor")
    assert because.startswith("12.50% of all patches or more for each of 2 classes")
    assert because.endswith("nothing to train on: lyso")


# ---- one EM -------------------------------------------------------------------------------------------------


def test_an_em_behind_links_is_one_volume(tmp_path: Path) -> None:
    """Three data sets, one EM: what validates in one must not teach in another."""
    rng, shape = np.random.default_rng(0), (8, 64, 64)
    mask = mask_of(shape, 1, (0, 40))
    data = write_classes(tmp_path / "data", rng.integers(1, 255, shape).astype(np.uint8), {"mito": mask})
    grid = Grid(shape, (40.0, 8.0, 8.0), (0.0, 0.0, 0.0))
    for i, name in enumerate("bc", 2):
        em_path(data, name).parent.mkdir(parents=True)
        em_path(data, name).symlink_to(em_path(data, "a"))
        write_label(crop_path(data, name, f"crop{i}"), "mito", mask.astype(np.uint8), grid)
    crops = split_crops(fingerprint(data, tmp_path / "cache"), ["mito"])
    assert len(crops) == 3
    assert len({crop.volume for crop in crops}) == 1
    split = derive_split(crops, 0)
    masks = [[taken(side, c.name, c.shape_zyx) for c in crops] for side in (split.train, split.validate)]
    assert not (np.any(masks[0], axis=0) & np.any(masks[1], axis=0)).any()


@pytest.mark.parametrize("origin", [0.0, 10_000.0, -500.0])
@pytest.mark.parametrize("at_low_end", [True, False])
def test_the_box_lies_at_the_outer_end_wherever_the_em_begins(tmp_path: Path, origin: float, at_low_end: bool) -> None:
    rng, shape = np.random.default_rng(0), (8, 64, 640)
    em = Grid(shape, (40.0, 8.0, 8.0), (0.0, 0.0, origin))
    data = tmp_path / "data"
    write_multiscale(em_path(data, "a"), [(em, rng.integers(1, 255, shape).astype(np.uint8))])
    grid = em.crop(Box((0, 0, 0 if at_low_end else 320), (8, 64, 320 if at_low_end else 640)))
    write_label(crop_path(data, "a", "crop1"), "mito", np.ones(grid.shape_zyx, np.uint8), grid)
    crops = split_crops(fingerprint(data, tmp_path / "cache"), ["mito"])
    (region,) = derive_split(crops, 0).validate
    assert region.box_zyx == (((0, 0, 0), (8, 64, 64)) if at_low_end else ((0, 0, 256), (8, 64, 320)))


# ---- in the plan --------------------------------------------------------------------------------------------


def reason_of(plan: Plan, field: str) -> str:
    return next(reason.because for reason in plan.reasons if reason.field == field)


@cheap
def test_the_plan_reports_no_leak_and_records_its_fold() -> None:
    plan = make_plan("a", facts(crops=6, volumes=3), machine(), {})
    assert "0 of them leak" in reason_of(plan, "split")
    plan = make_plan("a", facts(crops=6, volumes=3), machine(), {"split.folds": 3, "split.fold": 2})
    assert (plan.split.folds, plan.split.fold, plan.split.rule) == (3, 2, "volumes")
    assert reason_of(plan, "split").startswith("fold 2 of 3: ")


@cheap
def test_a_leak_of_the_users_own_split_is_said() -> None:
    regions = {f"split.{side}": (Region(crop="v0/crop1"),) for side in ("train", "validate")}
    plan = make_plan("a", facts(), machine(), regions)
    assert "1 of them share 5,242,880 voxels with what trains: those never teach" in reason_of(plan, "split")
    assert plan.split.rule == "user"


@cheap
def test_setting_one_side_takes_it_from_the_other() -> None:
    plan = make_plan("a", facts(), machine(), {"split.validate": (Region(crop="v0/crop3"),)})
    assert names(plan.split.train) == ["v0/crop1", "v0/crop2"]
    assert "0 of them leak" in reason_of(plan, "split")


@cheap
@pytest.mark.parametrize("side", ["train", "validate"])
@pytest.mark.parametrize(
    "box",
    [
        pytest.param(((0, 0, 0), (20, 512, 513)), id="outside"),
        pytest.param(((-1, 0, 0), (20, 512, 512)), id="before"),
        pytest.param(((0, 0, 0), (20, 0, 512)), id="empty"),
        pytest.param(((0, 300, 0), (20, 100, 512)), id="reversed"),
    ],
)
def test_a_box_that_holds_nothing_or_leaves_its_crop_is_refused(side: str, box: tuple[VoxelsZYX, VoxelsZYX]) -> None:
    regions = (Region(crop="v0/crop2", box_zyx=((0, 0, 0), (20, 512, 512))), Region(crop="v0/crop1", box_zyx=box))
    with pytest.raises(PlanError, match=rf"^split\.{side}: box .* of v0/crop1 is empty or not inside \[20, 512, 512\]"):
        make_plan("a", facts(), machine(), {f"split.{side}": regions})
    assert getattr(make_plan("a", facts(), machine(), {f"split.{side}": regions[:1]}).split, side) == regions[:1]


@cheap
def test_a_split_that_trains_on_nothing_is_refused() -> None:
    data = facts()
    declared = tuple(msgspec.structs.replace(crop, split="validate") for crop in data.crops)
    with pytest.raises(PlanError, match=r"split\.train: is empty \(datasplit\.csv fixes it\)"):
        make_plan("a", msgspec.structs.replace(data, crops=declared), machine(), {})
    everything = tuple(Region(crop=crop.name) for crop in data.crops)
    for changes in ({"split.train": ()}, {"split.validate": everything}):
        with pytest.raises(PlanError, match=r"split\.train: is empty \(set by the user"):
            make_plan("a", data, machine(), changes)


@cheap
def test_sets_of_classes_can_be_asked_for_and_mean_what_is_there() -> None:
    data = facts(classes=("nuc", "pm", "synapse"))
    data = msgspec.structs.replace(data, class_sets={"mine": ("synapse", "pm", "gone")})
    assert make_plan("a", data, machine(), {"classes.names": ["cellmap-5"]}).class_names == ("nuc", "pm")
    plan = make_plan("a", data, machine(), {"classes.names": ["mine", "pm", "nuc"]})
    assert plan.class_names == ("synapse", "pm", "nuc")
    assert "not in this data: gone" in reason_of(plan, "classes")
    with pytest.raises(PlanError, match="did you mean 'cellmap-48'"):
        make_plan("a", data, machine(), {"classes.names": ["cellmap48"]})
    with pytest.raises(PlanError, match="no class of this set"):
        make_plan("a", facts(classes=("synapse",)), machine(), {"classes.names": ["cellmap-14"]})


@cheap
def test_folds_on_the_command_line_are_recorded_and_cover_the_data(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", crops=2, partial=False)
    masks = []
    for fold in ("1", "2", "3"):
        out = tmp_path / f"{fold}.json"
        assert main(["plan", str(data), "--folds", "3", "--fold", fold, "--out", str(out), "--quiet"]) == 0
        split = load_as(out, Plan).split
        assert (split.folds, split.fold) == (3, int(fold))
        masks.append([taken(split.validate, f"demo/crop{i}", (8, 64, 64)) for i in (1, 2)])
    assert (np.sum(masks, axis=0) == 1).all()
    assert main(["plan", str(data), "--fold", "9", "--out", str(out), "--quiet"]) == 2


def test_crops_of_one_em_under_two_names_are_one_volume() -> None:
    data = facts(crops=6, volumes=3)
    shared = tuple(msgspec.structs.replace(volume, path="one/em") for volume in data.volumes)
    crops = split_crops(msgspec.structs.replace(data, volumes=shared), ["mito"])
    assert {crop.volume for crop in crops} == {"one/em"}
    assert derive_split(crops, 0).rule == "box"
