"""Sliding windows: a voxel has one value, however the region is cut, mirrored or batched."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_planner import tiny_facts_plan
from torch import Tensor, nn

from autoseg.geometry import Box, VoxelsZYX, blocks, tiles
from autoseg.model.networks import build_network
from autoseg.model.windows import Predictor
from autoseg.schema import Plan

CPU = torch.device("cpu")
BASE = tiny_facts_plan({"sliding_window.tile_zyx": (1, 32, 32), "sliding_window.mirror_axes": ()})
SOLID = tiny_facts_plan({"patch_size_zyx": (4, 16, 16), "network.features": (2, 4), "batch_size": 1})


def plan_with(base: Plan = BASE, slices: int = 1, **window: Any) -> Plan:
    """Return the plan with other windows, without test-time averaging unless it is asked for."""
    plain: dict[str, Any] = {"mirror_axes": (), "transpose_yx": False}
    changed = msgspec.structs.replace(base.sliding_window, **(plain | window))
    return msgspec.structs.replace(base, sliding_window=changed, input_slices=slices)


def predictor(plan: Plan, network: nn.Module | None = None) -> Predictor:
    return Predictor((network or build_network(plan)).eval(), plan, CPU)


class Volume:
    """A random volume to read input from, mirrored at its border; counts what was asked for."""

    def __init__(self, shape: VoxelsZYX, slices: int = 1, seed: int = 0) -> None:
        self.values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        self.slices, self.reads = slices, 0

    def read(self, box: Box) -> NDArray[np.float32]:
        self.reads += 1
        reach = self.slices // 2
        wide = box.grow((reach, 0, 0))
        indices = [
            np.clip(np.arange(a, b), 0, n - 1) for a, b, n in zip(wide.start, wide.stop, self.values.shape, strict=True)
        ]
        values = self.values[np.ix_(*indices)]
        return values[:, None] if reach else values[None]


def whole(one: Predictor, volume: Volume) -> NDArray[np.float32]:
    shape = volume.values.shape
    return one.predict(volume.read, shape, Box.whole(shape))


class Pointwise(nn.Module):
    """A network that commutes with mirroring and transposing: a voxel's answer is its own (centre slice's) grey."""

    def forward(self, image: Tensor) -> list[Tensor]:
        centre = image[:, image.shape[1] // 2][:, None]
        return [torch.cat([centre, -2 * centre + 1], dim=1)]


class Drift(nn.Module):
    """A network that does not: its answer grows along x, y and z (or the slices) of its input."""

    def forward(self, image: Tensor) -> list[Tensor]:
        ramp = sum(
            torch.linspace(-1, 1, n).reshape([-1 if a == b else 1 for b in range(3)])
            for a, n in enumerate(image.shape[2:])
        )
        slices = torch.linspace(-1, 1, image.shape[1]).reshape(1, -1, 1, 1, 1) if image.shape[1] > 1 else torch.ones(1)
        out = (image * 0 + ramp + slices * image).sum(dim=1, keepdim=True)
        return [torch.cat([out, out], dim=1)]


CUTS = [(8, 64, 64), (1, 16, 80), (3, 7, 11), (8, 32, 16)]


@pytest.mark.parametrize("plan", [BASE, SOLID], ids=["2d", "3d"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_voxel_has_the_same_bits_however_the_region_is_cut(plan: Plan, cut: VoxelsZYX) -> None:
    volume, shape = Volume((5, 50, 70)), (5, 50, 70)
    one = predictor(plan_with(plan))
    expected = whole(one, volume)
    found = np.full_like(expected, -1)
    for block in blocks(shape, cut):
        found[:, *block.slices] = one.predict(volume.read, shape, block)
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=12)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 60), st.integers(1, 60)),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from([1, 3]),
)
def test_any_region_is_covered_by_probabilities(shape: VoxelsZYX, overlap: float, batch: int) -> None:
    plan = plan_with(overlap=overlap, batch_size=batch)
    found = whole(predictor(plan), Volume(shape))
    assert found.shape == (2, *shape)
    assert np.isfinite(found).all()
    assert ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (2, 31, 33), (9, 8, 8)], ids=str)
@pytest.mark.parametrize("plan", [BASE, SOLID], ids=["2d", "3d"])
def test_regions_smaller_than_a_tile_and_thin_volumes_work(plan: Plan, shape: VoxelsZYX) -> None:
    one = predictor(plan_with(plan), Pointwise())
    volume = Volume(shape)
    expected = 1 / (1 + np.exp(-np.stack([volume.values, 1 - 2 * volume.values])))
    np.testing.assert_allclose(whole(one, volume), expected, rtol=1e-5)


def test_one_tile_is_a_plain_forward_pass() -> None:
    plan = plan_with()
    network = build_network(plan).eval()
    volume = Volume((1, 20, 24))
    one = Predictor(network, plan, CPU)
    assert one.tile((1, 20, 24)) == (1, 24, 28), "the region and a margin of one step on each side"
    image = torch.from_numpy(volume.read(Box((0, -2, -2), (1, 22, 26))))[None]
    with torch.inference_mode():
        expected = torch.sigmoid(network(image)[0])[0, :, :, 2:22, 2:26]
    np.testing.assert_allclose(whole(one, volume), expected.numpy(), rtol=1e-5)


def test_classes_of_a_softmax_are_predicted_within_their_group() -> None:
    plan = plan_with()
    softmax = msgspec.structs.replace(plan.loss, activation="softmax")
    plan = msgspec.structs.replace(plan, loss=softmax, disjoint=(plan.class_names,))
    volume = Volume((2, 20, 24))
    logits = np.stack([volume.values, 1 - 2 * volume.values])
    expected = np.exp(logits) / (1 + np.exp(logits).sum(axis=0))
    np.testing.assert_allclose(whole(predictor(plan, Pointwise()), volume), expected, rtol=1e-4)


def test_where_tiles_overlap_the_average_leans_to_the_nearer_centre() -> None:
    class TileNumber(nn.Module):
        calls = 0

        def forward(self, image: Tensor) -> list[Tensor]:
            TileNumber.calls += 1
            return [torch.full_like(image, 4.0 * (1 if TileNumber.calls % 2 else -1)).expand(-1, 2, -1, -1, -1)]

    plan = plan_with(overlap=0.5, tile_zyx=(1, 32, 32))
    row = whole(predictor(plan, TileNumber()), Volume((1, 8, 44)))[0, 0, 4]
    assert TileNumber.calls == 2
    assert (np.diff(row) <= 1e-6).all(), "from the first tile's answer to the second's, without a seam"
    assert row[0] > 0.9
    assert row[-1] < 0.1
    assert abs(np.diff(row)).max() < 0.25


@pytest.mark.parametrize("slices", [1, 5])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("axes", [("x",), ("y", "x"), ("z", "y", "x")])
def test_averaging_mirrors_of_an_equivariant_network_changes_nothing(
    axes: tuple[str, ...], transpose: bool, slices: int
) -> None:
    volume = Volume((3, 40, 40), slices)
    plain = whole(predictor(plan_with(slices=slices), Pointwise()), volume)
    averaged = whole(predictor(plan_with(slices=slices, mirror_axes=axes, transpose_yx=transpose), Pointwise()), volume)
    np.testing.assert_allclose(averaged, plain, rtol=1e-5)


def test_averaging_mirrors_makes_any_network_equivariant() -> None:
    """The slices of a 2.5D input are its channels, and must be mirrored with z."""
    for slices in (1, 3):
        window: dict[str, Any] = {"mirror_axes": ("z", "y", "x"), "transpose_yx": True, "tile_zyx": (1, 32, 32)}
        one = predictor(plan_with(slices=slices, **window), Drift())
        image = np.random.default_rng(0).normal(size=(1, slices, 1, 16, 16)).astype(np.float32)
        answer = one._forward(torch.from_numpy(image))
        mirrored = one._forward(torch.from_numpy(image[:, ::-1, :, ::-1, ::-1].copy()))
        torch.testing.assert_close(mirrored, answer.flip([3, 4]))
        turned = one._forward(torch.from_numpy(image.swapaxes(3, 4).copy()))
        torch.testing.assert_close(turned, answer.transpose(3, 4))


def test_blocks_are_disjoint_cover_the_region_and_are_whole_tiles() -> None:
    one = predictor(plan_with())
    shape = (3, 70, 200)
    covered = np.zeros(shape, dtype=int)
    for block in one.blocks(shape):
        covered[block.slices] += 1
    assert (covered == 1).all()
    assert one.tile(shape) == (1, 32, 32)


def test_only_the_tiles_that_touch_a_block_are_computed() -> None:
    volume, shape = Volume((1, 32, 320)), (1, 32, 320)
    predictor(plan_with(), Pointwise()).predict(volume.read, shape, Box((0, 0, 0), (1, 32, 8)))
    assert 1 <= volume.reads <= 6


@given(
    st.sampled_from([BASE, SOLID]),
    st.tuples(st.integers(1, 30), st.integers(1, 120), st.integers(1, 120)),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.data(),
)
def test_the_tiles_of_a_block_are_those_of_a_walk_over_the_whole_region(
    base: Plan, shape: VoxelsZYX, overlap: float, data: st.DataObject
) -> None:
    one = predictor(plan_with(base, overlap=overlap), Pointwise())
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    block = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    margin, edges = one._margin(), one.tile(shape)
    walk = []
    for t in tiles(Box.whole(shape).grow(margin).shape_zyx, edges, overlap):
        z, y, x = (a - m for a, m in zip(t.start, margin, strict=True))
        tile = Box((z, y, x), (z + edges[0], y + edges[1], x + edges[2]))
        if tile.clip(block).num_voxels:
            walk.append(tile.start)
    assert list(itertools.product(*one._starts(shape, block))) == walk


def test_a_block_of_a_vast_region_needs_no_walk_over_it() -> None:
    """There are 10^11 tiles."""
    one = predictor(plan_with(SOLID), Pointwise())
    shape, block = (40_000, 80_000, 80_000), Box((3, 3, 3), (5, 9, 9))
    found = one.predict(lambda box: np.zeros((1, *box.shape_zyx), dtype=np.float32), shape, block)
    assert found.shape == (2, 2, 6, 6)


@pytest.mark.parametrize("base", [BASE, SOLID])
@pytest.mark.parametrize("shape", [(1, 40, 90), (9, 20, 33), (12, 70, 70)])
def test_one_batch_is_one_forward_pass_and_every_tile_is_counted(base: Plan, shape: VoxelsZYX) -> None:
    plan = plan_with(base, batch_size=3 if base is BASE else 1)
    batches: list[int] = []
    network = build_network(plan).eval()
    network.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    one = predictor(plan, network)
    whole(one, Volume(shape))
    assert sum(batches) == one.num_tiles(shape)
    batches.clear()
    box = one.one_batch(shape)
    assert box.clip(Box.whole(shape)) == box
    whole(one, Volume(box.shape_zyx))
    assert len(batches) == 1
