"""The split: never the same voxel on both sides, the same for the same seed, by whole volumes where there are many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoseg.data.islands import SplitCrop
from autoseg.data.split import MIN_CROPS_TO_HOLD_OUT_ONE, VALIDATION_SHARE, derive_split
from autoseg.geometry import VoxelsZYX
from autoseg.schema import Region, Split

CLASSES = ("mito", "er", "pm")


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
