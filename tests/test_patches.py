"""Training batches: a pure function of (plan, step), whoever draws them, and honest about what is unknown."""

from __future__ import annotations

import itertools
import random
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_dataset
from test_planner import tiny_plan

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN
from autoseg.data.dataset import open_dataset
from autoseg.errors import PlanError
from autoseg.geometry import Box
from autoseg.schema import Plan, Region, Split
from autoseg.train import batches
from autoseg.train.loader import _start_worker
from autoseg.train.patches import Batch, PatchSampler, place_patch, scale_box

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


def test_batches_end_where_the_run_ends(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place)
    assert len(list(batches(plan, place[0], start_step=5, stop_step=8, cache=place[1]))) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_spawned_workers_give_the_batches_of_this_process(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place, {"augmentation.preset": "sstem"})
    here = list(batches(plan, place[0], start_step=3, stop_step=7, cache=place[1]))
    spread = msgspec.structs.replace(plan, num_workers=2)
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
    assert shares.min() > 1 / 3 - 0.1, f"every class by turn: {shares}"
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


def test_a_region_scales_with_its_grid() -> None:
    region = Region(crop="a/crop1", box_zyx=((0, 8, 16), (4, 16, 32)))
    assert scale_box(region, (4, 16, 32), (4, 8, 16)) == Box((0, 4, 8), (4, 8, 16))
    assert scale_box(Region(crop="a/crop1"), (4, 16, 32), (4, 8, 16)) == Box((0, 0, 0), (4, 8, 16))
