"""Training batches: a pure function of (plan, step), whoever draws them, and honest about what is unknown."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import crop_path, em_path, make_dataset, write_label, write_multiscale
from test_planner import tiny_plan

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN
from autoseg.data.codes import index_blocks
from autoseg.data.dataset import open_dataset
from autoseg.data.em import EmReader
from autoseg.errors import DataError, PlanError
from autoseg.geometry import Box, Grid, VoxelsZYX
from autoseg.schema import Plan, Region, Sampling, Split
from autoseg.train import batches
from autoseg.train.loader import _start_worker
from autoseg.train.patches import Batch, PatchSampler, narrowest
from autoseg.train.sources import (
    build_index,
    draw_layer,
    draw_voxel,
    held_on,
    hide,
    scale_box,
    usable_counts,
    validated_box,
)
from autoseg.train.turns import ROUND, Turns, class_shares
from autoseg.train.validation import Validator
from autoseg.train.warp import place_patch

NO_AUGMENTATION = {"augmentation.preset": "none"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (DATA, cache)."""
    folder = tmp_path_factory.mktemp("patches")
    return make_dataset(folder / "data", shape=(6, 64, 64)), folder / "cache"


def sampler(plan: Plan, place: tuple[Path, Path]) -> PatchSampler:
    return PatchSampler(plan, open_dataset(place[0]), place[1], 2**24)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def states_of(batch: Batch) -> torch.Tensor:
    """Return the state of each voxel for each class, (B, Z, Y, X, K)."""
    return batch.states_CK[batch.codes_BZYX.long()]


# ---- a pure function of the step ----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["flips", "sstem"])
def test_a_batch_depends_on_plan_and_step_alone(place: tuple[Path, Path], preset: str) -> None:
    plan = tiny_plan(*place, {"augmentation.preset": preset})
    straight = list(itertools.islice(batches(plan, place[0], cache=place[1]), 6))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    late = list(itertools.islice(batches(plan, place[0], start_step=4, cache=place[1]), 2))
    assert same(straight[4], late[0])
    assert same(straight[5], late[1])
    assert not any(same(a, b) for a, b in itertools.combinations(straight, 2))
    other = sampler(msgspec.structs.replace(plan, seed=1), place).batch(4)
    assert not torch.equal(other.image_BCZYX, straight[4].image_BCZYX)


def test_a_batch_lies_in_memory_that_the_next_can_take(place: tuple[Path, Path]) -> None:
    """Aligned memory, as torch allocates, is not used again by glibc: the heap of a worker grew by the batch."""
    batch = sampler(tiny_plan(*place), place).batch(0)
    for tensor in (batch.image_BCZYX, batch.codes_BZYX):
        assert not tensor.untyped_storage().resizable(), "allocated by torch"


def test_batches_end_where_the_run_ends(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place)
    assert len(list(batches(plan, place[0], start_step=5, stop_step=8, cache=place[1]))) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_spawned_workers_give_the_batches_of_this_process(place: tuple[Path, Path], num_workers: int) -> None:
    plan = tiny_plan(*place, {"augmentation.preset": "sstem"})
    here = list(batches(plan, place[0], start_step=3, stop_step=7, cache=place[1]))
    spread = msgspec.structs.replace(plan, num_workers=num_workers)
    spawned = list(batches(spread, place[0], start_step=3, stop_step=7, cache=place[1]))
    assert len(spawned) == 4
    assert all(same(a, b) for a, b in zip(here, spawned, strict=True))


def test_ctrl_c_is_for_the_process_that_saves_not_for_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to all of them; a worker that died of it would end the run before it is saved."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGINT)
    try:
        _start_worker(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@settings(max_examples=10)
@given(st.integers(0, 2**31 - 1))
def test_any_step_gives_a_whole_batch_and_leaves_global_generators_alone(place: tuple[Path, Path], step: int) -> None:
    plan = tiny_plan(*place, {"accumulate_batches": 2, "augmentation.preset": "sstem"})
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before: tuple[Any, Any, Any] = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index, union-attr]
    batch = sampler(plan, place).batch(step)
    assert batch.image_BCZYX.shape == (4, 1, 1, 32, 32)
    assert batch.codes_BZYX.shape == (4, 1, 32, 32)
    assert batch.image_BCZYX.dtype == torch.float32
    assert torch.isfinite(batch.image_BCZYX).all()
    assert int(batch.codes_BZYX.min()) >= 0
    assert int(batch.codes_BZYX.max()) < len(batch.states_CK)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index, union-attr]
    assert torch.equal(torch.get_rng_state(), before[2])


# ---- what is in a batch -------------------------------------------------------------------------------------


def test_code_zero_is_everything_unknown(place: tuple[Path, Path]) -> None:
    batch = sampler(tiny_plan(*place), place).batch(0)
    assert batch.states_CK[0].tolist() == [UNKNOWN] * 3
    assert batch.states_CK.shape[1] == 3


def test_grey_values_tell_the_class_as_in_the_data(place: tuple[Path, Path]) -> None:
    """The data's grey values are 200, 147, 93 and 40 (sd 10) by class: image and codes lie on the same voxels."""
    plan = tiny_plan(*place, NO_AUGMENTATION)
    one, images, states = sampler(plan, place), [], []
    for step in range(12):
        batch = one.batch(step)
        images.append(batch.image_BCZYX[:, 0])
        states.append(states_of(batch))
    image, state = torch.cat(images), torch.cat(states)
    means = [image[state[..., k] == PRESENT].mean() for k in range(3)]
    spreads = [image[state[..., k] == PRESENT].std() for k in range(3)]
    names = list(plan.class_names)
    order = [means[names.index(name)] for name in ("mito", "er_mem", "pm")]
    assert order[0] > order[1] + 0.5
    assert order[1] > order[2] + 0.5
    assert max(spreads) < 0.35, "one class is one grey value with a little noise"


@pytest.mark.parametrize("size", [4.0, 8.0])
def test_a_composite_that_follows_from_its_parts_is_taught_and_validated_where_they_are_thin(
    tmp_path: Path, size: float
) -> None:
    """Three parts that fill a third of each coarse voxel: together they fill it, and it must not be called absent."""
    data, cache, shape = tmp_path / "data", tmp_path / "cache", (16, 32, 64)
    grid, rng = Grid(shape, (4.0, 4.0, 4.0), (0.0, 0.0, 0.0)), np.random.default_rng(0)
    write_multiscale(em_path(data, "a"), [(grid, rng.integers(1, 255, shape).astype(np.uint8))])
    third = np.arange(grid.shape_zyx[0] * 32 * 64).reshape(shape) % 3
    for i, name in enumerate(("mito_mem", "mito_lum", "mito_ribo")):
        write_label(crop_path(data, "a", "crop1"), name, (third == i).astype(np.uint8), grid)
    plan = tiny_plan(data, cache, {"voxel_size_nm": (size, size, size), "patch_size_zyx": (1, 16, 16)})
    k = plan.class_names.index("mito")
    states = states_of(sampler(plan, (data, cache)).batch(0))[..., k]
    assert set(states.unique().tolist()) <= {PRESENT, UNKNOWN}
    assert (states == PRESENT).any()
    (target,) = Validator(plan, open_dataset(data), cache, 2**20)._targets
    assert (target.states_CK[:, k] == PRESENT).all()


def test_with_several_slices_the_centre_channel_is_the_section_of_the_codes(place: tuple[Path, Path]) -> None:
    flat = tiny_plan(*place, NO_AUGMENTATION)
    deep = tiny_plan(*place, NO_AUGMENTATION | {"input_slices": 3})
    samplers = sampler(flat, place), sampler(deep, place)
    for step in range(4):
        one, three = (drawn.batch(step) for drawn in samplers)
        assert three.image_BCZYX.shape[1] == 3
        assert torch.equal(three.image_BCZYX[:, 1:2], one.image_BCZYX)
        assert torch.equal(three.codes_BZYX, one.codes_BZYX)
        assert not torch.equal(three.image_BCZYX[:, 0], three.image_BCZYX[:, 1])


def test_centred_patches_hold_every_class_in_its_turn(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place, NO_AUGMENTATION | {"sampling.class_centred_fraction": 1.0, "patch_size_zyx": (1, 16, 16)})
    one = sampler(plan, place)
    holds = np.array([(states_of(one.batch(s)) == PRESENT).any(dim=3).any(dim=2).any(dim=1) for s in range(100)])
    shares = holds.reshape(-1, 3).mean(axis=0)
    assert holds.reshape(-1, 3).any(axis=1).all(), "a centred patch holds the class it is centred on"
    assert shares.min() > plan.sampling.class_floor, f"every class in its turn: {shares}"
    inner = np.array([(states_of(one.batch(s))[:, 0, 4:12, 4:12] == PRESENT).any(dim=2).any(dim=1) for s in range(50)])
    assert inner.reshape(-1, 3).any(axis=1).mean() > 0.9, "in its inner half"


def test_without_centring_patches_lie_anywhere_that_is_known(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place, NO_AUGMENTATION | {"sampling.class_centred_fraction": 0.0})
    one = sampler(plan, place)
    for step in range(20):
        known = states_of(one.batch(step)) != UNKNOWN
        assert known.any(dim=4).any(dim=3).any(dim=2).any(dim=1).all()


def test_a_rare_class_is_seen_far_more_often_than_it_occurs(tmp_path: Path) -> None:
    data, cache = make_dataset(tmp_path / "data", classes=("mito", "pm"), partial=False), tmp_path / "cache"
    base = NO_AUGMENTATION | {"patch_size_zyx": (1, 16, 16)}
    shares = []
    for fraction in (0.0, 1.0):
        one = sampler(tiny_plan(data, cache, base | {"sampling.class_centred_fraction": fraction}), (data, cache))
        shares.append(np.mean([(states_of(one.batch(s)) == PRESENT).float().mean() for s in range(60)]))
    assert shares[1] > shares[0]


# ---- whose turn it is ---------------------------------------------------------------------------------------


def sampling(fraction: float = 0.5, floor: float = 0.01, power: float = 0.5, crops: int = 1) -> Sampling:
    return Sampling(class_centred_fraction=fraction, class_floor=floor, class_power=power, crops_per_step=crops)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_every_class_that_exists_gets_its_floor_and_all_shares_make_the_fraction(
    voxels: list[int], fraction: float, part: float, power: float
) -> None:
    floor = fraction / len(voxels) * part
    shares = class_shares(np.array(voxels), sampling(fraction, floor, power))
    exists = np.array(voxels) > 0
    assert (shares[exists] >= floor - 1e-12).all()
    assert (shares[~exists] == 0).all()
    assert shares.sum() == pytest.approx(fraction if exists.any() else 0)
    order = np.argsort(np.array(voxels), kind="stable")
    assert (np.diff(shares[order]) >= -1e-12).all(), "a class with more voxels is centred no less often"


def test_what_is_left_goes_by_the_square_root_of_voxels() -> None:
    shares = class_shares(np.array([100, 10_000, 0]), sampling(0.5, 0.05))
    assert shares == pytest.approx([0.05 + 0.4 / 11, 0.05 + 0.4 * 10 / 11, 0])
    alike = class_shares(np.array([100, 10_000]), sampling(0.5, 0.0, 0.0))
    assert alike == pytest.approx([0.25, 0.25])


def test_a_class_in_19_of_289_crops_is_centred_as_often_as_the_floor_says_and_its_crops_take_turns() -> None:
    """Its voxels lie almost all in one crop, and are a millionth of the others'."""
    rng = np.random.default_rng(0)
    known = (10 ** rng.uniform(5, 9, 289)).astype(np.int64)
    present = np.stack([known // 3, known // 50, np.zeros(289, np.int64)], axis=1)
    rare = np.sort(rng.choice(289, 19, replace=False))
    present[rare, 2] = [10_000, *[7] * 18]
    turns = Turns(known.tolist(), present, sampling(0.5, 0.02), seed=5)
    rounds = 60
    drawn = [turns.turn(number) for number in range(ROUND * rounds)]
    classes = np.array([-1 if turn.class_index is None else turn.class_index for turn in drawn])
    for start in range(0, len(drawn), ROUND):
        counts = np.bincount(classes[start : start + ROUND] + 1, minlength=4)
        assert counts[3] >= int(0.02 * ROUND), "in every round, not only on average"
        assert abs(counts[0] - ROUND / 2) <= 1
    crops = np.array([turn.crop for turn in drawn])
    of_rare = np.bincount(crops[classes == 2], minlength=289)
    assert set(np.flatnonzero(of_rare)) == set(rare.tolist())
    expected = of_rare.sum() / 19
    assert np.abs(of_rare[rare] - expected).max() <= 2, "whatever their size"
    anywhere = np.bincount(crops[classes == -1], minlength=289)
    assert np.abs(anywhere - known / known.sum() * anywhere.sum()).max() <= 4, "any known voxel is as likely as another"


def test_a_turn_is_a_function_of_its_number_and_the_seed() -> None:
    known, present = [10, 20], np.array([[1, 2], [3, 0]])
    turns = Turns(known, present, sampling(), seed=1)
    numbers = [5000, 3, 1024, 3, 0]
    assert [turns.turn(n) for n in numbers] == [Turns(known, present, sampling(), seed=1).turn(n) for n in numbers]
    straight = [turns.turn(n) for n in range(64)]
    assert straight != [Turns(known, present, sampling(), seed=2).turn(n) for n in range(64)]
    assert straight != [turns.turn(n) for n in range(ROUND, ROUND + 64)]
    nothing = Turns(known, np.zeros((2, 2), np.int64), sampling(), seed=1)
    assert {nothing.turn(n).class_index for n in range(64)} == {None}
    assert {nothing.turn(n).crop for n in range(64)} == {0, 1}


@pytest.mark.parametrize("places_per_step", [1, 2, 4])
def test_batches_centre_each_class_as_often_as_the_plan_states(place: tuple[Path, Path], places_per_step: int) -> None:
    """A patch of one voxel is the voxel that it is centred on."""
    settings = {"batch_size": 4, "sampling.class_floor": 0.15, "sampling.crops_per_step": places_per_step}
    plan = tiny_plan(*place, NO_AUGMENTATION | settings | {"sampling.class_centred_fraction": 0.6})
    one = sampler(msgspec.structs.replace(plan, patch_size_zyx=(1, 1, 1)), place)
    steps = ROUND // places_per_step
    present = [(states_of(one.batch(s)) == PRESENT).reshape(4, 3).sum(dim=0) for s in range(steps)]
    shares = torch.stack(present).sum(dim=0) / (4 * steps)
    assert (shares >= 0.15 - 2 / ROUND).all()
    assert shares.sum() > 0.6, "the uniform patches hold classes, too"


# ---- where a class lies -------------------------------------------------------------------------------------


def some_codes(shape: VoxelsZYX, seed: int, num_codes: int = 4) -> Any:
    """Return random code volumes with the counts of their blocks."""
    rng = np.random.default_rng(seed)
    volume = rng.choice(num_codes, shape, p=[0.7] + [0.3 / (num_codes - 1)] * (num_codes - 1)).astype(np.uint8)
    counts = [np.bincount(volume[box.slices].ravel(), minlength=num_codes) for box in index_blocks(shape)]
    grid = Grid(shape, (8, 8, 8), (0, 0, 0))
    return SimpleNamespace(grid=grid, codes_ZYX=volume, counts_BC=np.array(counts, np.uint32))


@settings(max_examples=25)
@given(st.tuples(st.integers(1, 40), st.integers(1, 150), st.integers(1, 150)), st.integers(0, 2**31))
def test_counts_are_of_what_may_teach_alone(shape: VoxelsZYX, seed: int) -> None:
    codes, rng = some_codes(shape, seed), np.random.default_rng(seed + 1)

    def box() -> Box:
        ends = [sorted(rng.integers(0, n + 1, 2).tolist()) for n in shape]
        return Box((ends[0][0], ends[1][0], ends[2][0]), (ends[0][1], ends[1][1], ends[2][1]))

    region, hidden = (Box.whole(shape) if seed % 3 == 0 else box()), tuple(box() for _ in range(seed % 3))
    allowed = np.zeros(shape, bool)
    allowed[region.slices] = True
    for other in hidden:
        allowed[other.slices] = False
    counts = usable_counts(codes, region, hidden)
    for number, block in enumerate(index_blocks(shape)):
        seen = codes.codes_ZYX[block.slices][allowed[block.slices]]
        assert np.array_equal(counts[number], np.bincount(seen, minlength=4))
    holds = rng.random((4, 3)) < 0.5
    index = build_index(counts, holds)
    for k in range(3):
        entries = index.column(k)
        per_block = np.zeros(len(counts), np.int64)
        per_block[index.blocks[entries]] = np.diff(index.cumulative[entries].astype(np.int64), prepend=0)
        assert np.array_equal(per_block, counts @ holds[:, k])


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (DATA, cache) of crops of 80 sections: two layers of chunks, ten rows of index blocks."""
    folder = tmp_path_factory.mktemp("deep")
    data = make_dataset(folder / "data", shape=(80, 72, 24), voxel_size_nm=(8.0, 8.0, 8.0))
    return data, folder / "cache"


@pytest.mark.parametrize("by_layers", [True, False])
def test_voxels_of_a_class_are_drawn_alike_wherever_they_lie(deep: tuple[Path, Path], by_layers: bool) -> None:
    """Layer by layer of EM chunks, then within the layer: in the end, every voxel is as likely."""
    one = sampler(tiny_plan(*deep, NO_AUGMENTATION), deep)
    source, wanted = one._sources[0], one._wanted_KC[1]
    assert source.layers.tolist() == [0] * 8 + [1] * 2 + [2]
    present = wanted[source.to_global[source.codes.codes_ZYX]]
    assert source.hidden, "a box of the crop validates"
    for hidden in source.hidden:
        present[hidden.slices] = False
    rng, drawn = np.random.default_rng(0), np.zeros(present.shape, int)
    for _ in range(6000):
        layer = draw_layer(source, 1, rng) if by_layers else None
        voxel = draw_voxel(source, source.codes.codes_ZYX, 1, wanted, layer, rng)
        assert layer is None or layer == voxel[0] // 64
        drawn[voxel] += 1
    assert not drawn[~present].any()
    for axes in ((1, 2), (0, 2), (0, 1)):
        expected = present.sum(axis=axes) / present.sum() * 6000
        found, expected = drawn.sum(axis=axes)[expected > 0], expected[expected > 0]
        assert ((found - expected) ** 2 / expected).sum() < len(found) + 5 * np.sqrt(2 * len(found))


def test_patches_of_one_place_share_crop_and_layer_of_chunks(deep: tuple[Path, Path]) -> None:
    settings = {"batch_size": 8, "sampling.crops_per_step": 2, "patch_size_zyx": (1, 16, 16)}
    one = sampler(tiny_plan(*deep, NO_AUGMENTATION | settings), deep)
    asked: list[tuple[int, int | None]] = []
    draw = PatchSampler._patch

    def patch(self: PatchSampler, turn: Any, layer: int | None, rng: Any) -> Any:
        asked.append((turn.crop, layer))
        return draw(self, turn, layer, rng)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PatchSampler, "_patch", patch)
        for step in range(12):
            one.batch(step)
    steps = [asked[i : i + 8] for i in range(0, len(asked), 8)]
    assert all(len(set(step[:4])) == len(set(step[4:])) == 1 for step in steps), "four patches of each of two places"
    assert {layer for _, layer in asked} == {0, 1}


def test_a_code_cache_that_vanishes_is_built_again(tmp_path: Path) -> None:
    data, cache = make_dataset(tmp_path / "data"), tmp_path / "cache"
    one = sampler(tiny_plan(data, cache), (data, cache))
    before = one.batch(3)
    shutil.rmtree(cache / "codes")
    assert same(one.batch(3), before)


def test_counts_that_are_wrong_are_named(tmp_path: Path) -> None:
    data, cache = make_dataset(tmp_path / "data"), tmp_path / "cache"
    plan = tiny_plan(data, cache)
    for folder in (cache / "codes").iterdir():
        np.save(folder / "counts.npy", np.load(folder / "counts.npy")[:, ::-1].copy())
        codes = np.load(folder / "codes.npy")
        np.save(folder / "codes.npy", np.full_like(codes, int(np.load(folder / "counts.npy").sum(axis=0).argmin())))
    one = sampler(plan, (data, cache))
    with pytest.raises(DataError, match=r"its counts are wrong.*delete this folder"):
        list(map(one.batch, range(20)))


@pytest.mark.parametrize(("number", "name"), [(1, "uint8"), (256, "uint8"), (257, "int16"), (2**15 + 1, "int32")])
def test_codes_travel_in_the_narrowest_dtype_that_holds_them(number: int, name: str) -> None:
    dtype = narrowest(number)
    assert dtype.name == name
    assert np.iinfo(dtype).max >= number - 1


def test_rotated_patches_still_hold_the_class_that_they_are_centred_on(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", shape=(24, 48, 48), voxel_size_nm=(8.0, 8.0, 8.0))
    cubic = {"voxel_size_nm": (8.0, 8.0, 8.0), "patch_size_zyx": (4, 16, 16), "batch_size": 4}
    turned = {"augmentation.rotation_probability": 1.0, "sampling.class_centred_fraction": 1.0}
    plan = tiny_plan(data, tmp_path / "cache", NO_AUGMENTATION | cubic | turned)
    one = sampler(plan, (data, tmp_path / "cache"))
    missed = 0
    for step in range(20):
        held = (states_of(one.batch(step)) == PRESENT).any(dim=3).any(dim=2).any(dim=1)
        turns = [one._turns.turn(step * plan.sampling.crops_per_step + i) for i in range(plan.sampling.crops_per_step)]
        missed += sum(not held[i, turns[i % len(turns)].class_index] for i in range(4))
    assert missed <= 2, "but for a lone voxel at the border, lost in the nearest-voxel grid"


# ---- what must stay unseen ----------------------------------------------------------------------------------


def test_no_known_code_of_a_validation_box_ever_reaches_a_batch(place: tuple[Path, Path]) -> None:
    """Three quarters of crop 1 validate: their grey values may be seen, their labels never."""
    hidden = Region(crop="demo/crop1", box_zyx=((0, 0, 0), (6, 64, 48)))
    split = Split(train=(Region(crop="demo/crop1"),), validate=(hidden,), rule="user")
    plan = msgspec.structs.replace(tiny_plan(*place, NO_AUGMENTATION | {"patch_size_zyx": (1, 64, 64)}), split=split)
    one, known_columns = sampler(plan, place), np.zeros(64, dtype=bool)
    for step in range(20):
        known = (states_of(one.batch(step)) != UNKNOWN).any(dim=4)
        known_columns |= known.any(dim=2).any(dim=1).any(dim=0).numpy()
    assert not known_columns[:48].any(), "a validated voxel taught"
    assert known_columns[48:].any()


@pytest.mark.parametrize("preset", ["none", "flips", "sstem", "fib-sem"])
def test_a_crop_that_only_validates_never_teaches(place: tuple[Path, Path], preset: str) -> None:
    split = Split(train=(Region(crop="demo/crop2"),), validate=(Region(crop="demo/crop1"),), rule="user")
    plan = msgspec.structs.replace(tiny_plan(*place, {"augmentation.preset": preset}), split=split)
    last = list(plan.class_names).index("pm")  # crop 2 does not annotate it
    one = sampler(plan, place)
    for step in range(10):
        states = states_of(one.batch(step))[..., last]
        assert not (states == PRESENT).any()


@pytest.mark.parametrize("linked", [False, True])
def test_what_validates_in_one_crop_does_not_teach_in_another_of_the_same_em(tmp_path: Path, linked: bool) -> None:
    """Two crops share columns 96 to 160 of their EM, which the second reaches by a link; datasplit.csv may ask that."""
    rng, shape = np.random.default_rng(0), (8, 64, 256)
    em, data = Grid(shape, (40.0, 8.0, 8.0), (0.0, 0.0, 0.0)), tmp_path / "data"
    write_multiscale(em_path(data, "a"), [(em, rng.integers(1, 255, shape).astype(np.uint8))])
    if linked:
        em_path(data, "b").parent.mkdir(parents=True)
        em_path(data, "b").symlink_to(em_path(data, "a"))
    names = ("a/crop1", "b/crop2" if linked else "a/crop2")
    for name, start, stop in zip(names, (0, 96), (160, 256), strict=True):
        grid = em.crop(Box((0, 0, start), (8, 64, stop)))
        write_label(crop_path(data, *name.split("/")), "mito", np.ones(grid.shape_zyx, np.uint8), grid)
    split = Split(train=(Region(crop=names[0]),), validate=(Region(crop=names[1]),), rule="datasplit")
    plan = tiny_plan(data, tmp_path / "cache", NO_AUGMENTATION | {"patch_size_zyx": (1, 64, 160)})
    one, known = sampler(msgspec.structs.replace(plan, split=split), (data, tmp_path / "cache")), np.zeros(160, bool)
    for step in range(10):
        known |= (states_of(one.batch(step)) != UNKNOWN).any(dim=4).any(dim=2).any(dim=1).any(dim=0).numpy()
    assert known[:96].all()
    assert not known[96:].any(), "a voxel that validates taught"


# ---- EM that is not there -----------------------------------------------------------------------------------


def with_gaps(root: Path, width: int, missing: tuple[int, ...]) -> Path:
    """Write one crop over EM in chunks of that width, some never fetched; each quarter of x is a class of its own."""
    rng, shape = np.random.default_rng(0), (12, 64, 256)
    grid = Grid(shape, (40.0, 8.0, 8.0), (0.0, 0.0, 0.0))
    values = rng.integers(1, 255, shape).astype(np.uint8)
    path = write_multiscale(em_path(root, "a"), [(grid, values)], chunk_zyx=(12, 64, width))
    for x in missing:
        (path / f"s0/0/0/{x}").unlink()
    for k, name in enumerate(("mito", "ld", "lyso", "pm")):
        mask = np.zeros(shape, np.uint8)
        mask[:, 8:60, 64 * k : 64 * k + 64] = 1
        write_label(crop_path(root, "a", "crop1"), name, mask, grid)
    return root


@pytest.mark.parametrize(("width", "missing"), [(64, (2, 3)), (48, (1, 3, 4, 5))])
def test_nothing_is_drawn_where_no_em_was_fetched(tmp_path: Path, width: int, missing: tuple[int, ...]) -> None:
    """Every patch holds a known voxel, the classes that are left keep their floor, and the lost one is named."""
    data, cache = with_gaps(tmp_path / "data", width, missing), tmp_path / "cache"
    split = Split(train=(Region(crop="a/crop1"),), validate=(), rule="user")
    settings = {"patch_size_zyx": (1, 16, 16), "batch_size": 16, "sampling.class_floor": 0.12}
    plan = msgspec.structs.replace(tiny_plan(data, cache, NO_AUGMENTATION | settings), split=split)
    one = sampler(plan, (data, cache))
    stored = np.ones(256, bool)
    for x in missing:
        stored[width * x : width * x + width] = False
    taught = [k for k in range(4) if stored[64 * k : 64 * k + 64].any()]
    order = [plan.class_names.index(name) for name in ("mito", "ld", "lyso", "pm")]
    assert set(one.untaught) == {plan.class_names[order[k]] for k in range(4) if k not in taught}
    (source,) = one._sources
    ends = [
        int(source.block_index.cumulative[source.block_index.column(c)][-1])
        for c in order
        if c in [order[k] for k in taught]
    ]
    assert ends == [12 * 52 * int(stored[64 * k : 64 * k + 64].sum()) for k in taught]
    states = torch.cat([states_of(one.batch(step)) for step in range(40)])
    assert (states != UNKNOWN).flatten(1).any(dim=1).all(), "a patch of nothing"
    shows = (states == PRESENT).flatten(1, 3).any(dim=1).float().mean(dim=0)
    assert all(shows[order[k]] >= 0.12 for k in taught)


def test_whole_em_is_not_looked_at_block_by_block(place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(EmReader, "stored_on", looked_at)
    one = sampler(tiny_plan(*place), place)
    assert not any(source.gaps for source in one._sources)
    one.batch(0)


def test_patches_larger_than_the_crop_are_filled_with_unknown(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place, NO_AUGMENTATION | {"patch_size_zyx": (1, 96, 96)})
    batch = sampler(plan, place).batch(0)
    assert (batch.codes_BZYX[:, :, :16] == 0).all()
    assert (batch.codes_BZYX[:, :, -16:] == 0).all()
    assert (batch.codes_BZYX[:, :, 16:-16, 16:-16] != 0).any()
    assert torch.isfinite(batch.image_BCZYX).all()


def test_data_without_one_known_voxel_is_refused(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place)
    pm = tuple(entry for entry in plan.classes if entry.name == "pm")
    split = Split(train=(Region(crop="demo/crop2"),), validate=(), rule="user")
    inside = msgspec.structs.replace(plan, split=split, classes=pm)
    found = sampler(inside, place)
    states = [states_of(found.batch(s)) for s in range(3)]
    assert all(set(s.unique().tolist()) <= {ABSENT, UNKNOWN} for s in states)
    both = Split(train=(Region(crop="demo/crop1"),), validate=(Region(crop="demo/crop1"),), rule="user")
    outside = msgspec.structs.replace(plan, split=both)
    with pytest.raises(PlanError, match="no voxel of its classes is annotated"):
        sampler(outside, place)


# ---- geometry -----------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 64), st.integers(1, 100), st.integers(0, 2**31))
def test_a_patch_holds_its_voxel_and_stays_inside_the_crop_where_it_fits(
    voxel: int, patch: int, size: int, seed: int
) -> None:
    voxel = min(voxel, size - 1)
    box = place_patch((voxel, 0, 0), (patch, 1, 1), (size, 1, 1), np.random.default_rng(seed))
    assert box.shape_zyx == (patch, 1, 1)
    assert box.start[0] <= voxel < box.stop[0]
    if patch <= size:
        assert box.start[0] >= 0
        assert box.stop[0] <= size


@st.composite
def regions_of_one_crop(draw: st.DrawFn) -> tuple[Grid, Grid, Box, Box]:
    """Return (native grid, the plan's, what trains, what validates): disjoint boxes, or one inside the other."""
    shape = draw(st.tuples(*[st.integers(1, 12)] * 3))
    size = draw(st.tuples(*[st.sampled_from([1.0, 4.6, 5.9])] * 3))
    ratio = draw(st.tuples(*[st.sampled_from([0.5, 1.0, 1.3, 2.0, 3.0, 20.0])] * 3))
    grid = Grid(shape, size, (7.0, 0.0, -3.3))
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    stops = [draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True)]
    validates = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
    trains = Box.whole(shape)
    if draw(st.booleans()):
        axis = draw(st.integers(0, 2))
        edges = list(shape)
        edges[axis] = starts[axis]
        trains = Box((0, 0, 0), (edges[0], edges[1], edges[2]))
    z, y, x = (a * b for a, b in zip(size, ratio, strict=True))
    return grid, grid.at_voxel_size((z, y, x)), trains, validates


@given(regions_of_one_crop())
def test_no_voxel_of_a_validation_box_is_part_of_a_voxel_that_trains(case: tuple[Grid, Grid, Box, Box]) -> None:
    grid, target, trains, validates = case
    taught = np.zeros(target.shape_zyx, bool)
    taught[scale_box(trains, grid, target, "inwards").slices] = True
    if trains == Box.whole(grid.shape_zyx):  # else the box that trains must do alone: the other is of another crop
        taught[scale_box(validates, grid, target, "outwards").slices] = False
    for voxel in np.argwhere(taught):
        z, y, x = voxel.tolist()
        covered = grid.covering(target.crop(Box((z, y, x), (z + 1, y + 1, x + 1)))).clip(validates)
        assert covered.num_voxels == 0
    predicted = scale_box(validates, grid, target, "nearest")
    assert predicted.num_voxels > 0
    assert predicted.clip(Box.whole(target.shape_zyx)) == predicted
    assert predicted.clip(scale_box(validates, grid, target, "outwards")) == predicted


@st.composite
def overlapping_crops(draw: st.DrawFn) -> tuple[Grid, Grid, Box, float]:
    """Return (a crop that validates, one that trains, what of the first validates, the plan's voxel size)."""
    size = draw(st.sampled_from([2.0, 4.0]))
    first, second = (
        Grid(
            draw(st.tuples(*[st.integers(2, 14)] * 3)),
            (size * factor,) * 3,
            draw(st.tuples(*[st.integers(0, 8).map(lambda n: n * size)] * 3)),
        )
        for factor in (1, draw(st.sampled_from([1, 2])))
    )
    start = tuple(draw(st.integers(0, n - 1)) for n in first.shape_zyx)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, first.shape_zyx, strict=True))
    box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    return first, second, box, size * draw(st.sampled_from([1.0, 1.5, 2.0, 2.3, 4.0]))


@settings(max_examples=200)
@given(overlapping_crops())
def test_no_voxel_that_validates_shares_em_with_one_that_teaches_in_another_crop(
    case: tuple[Grid, Grid, Box, float],
) -> None:
    """At the plan's voxels, which a plane through the labels cuts, and as the region was drawn."""
    first, second, box, size = case
    coarse, codes = first.at_voxel_size((size,) * 3), second.at_voxel_size((size,) * 3)
    taught = np.ones(codes.shape_zyx, bool)
    for hidden in hide(held_on([(first, box)], (size,) * 3), codes):
        taught[hidden.slices] = False
    for validates in (first.crop(box), coarse.crop(validated_box(box, first, coarse))):
        shared = np.ones(codes.shape_zyx, bool)
        for axis in range(3):
            low = codes.corner_nm[axis] + np.arange(codes.shape_zyx[axis]) * size
            start, length = validates.corner_nm[axis], validates.extent_nm[axis]
            common = np.minimum(low + size, start + length) - np.maximum(low, start)
            shared &= np.expand_dims(common > 0.01 * size, [a for a in range(3) if a != axis])
        assert not (taught & shared).any()


def test_a_line_that_validates_does_not_teach_at_twice_the_voxel_size() -> None:
    grid = Grid((1, 512, 4), (50.0, 4.6, 4.6), (0.0, 0.0, 0.0))
    target = grid.at_voxel_size((50.0, 9.2, 9.2))
    low, middle, high = (Box((0, a, 0), (1, b, 4)) for a, b in ((0, 307), (307, 410), (410, 512)))
    assert scale_box(low, grid, target, "inwards") == Box((0, 0, 0), (1, 153, 2))
    assert scale_box(middle, grid, target, "outwards") == Box((0, 153, 0), (1, 205, 2))
    assert scale_box(high, grid, target, "inwards") == Box((0, 205, 0), (1, 256, 2))


@given(st.tuples(*[st.integers(1, 99)] * 3), st.floats(0.3, 9.0))
def test_a_whole_crop_is_whole_on_any_grid(shape: VoxelsZYX, size: float) -> None:
    grid = Grid(shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    target = grid.at_voxel_size((size, size, size))
    for rounding in ("inwards", "nearest", "outwards"):
        assert scale_box(Box.whole(shape), grid, target, rounding) == Box.whole(target.shape_zyx)
