"""A plan is a function of its inputs, and says so: what changes a value changes the reason beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import GIB, cheap, cheap_trace, facts, fingerprints, gpu, machine, machines, reason, thick, value_of

from autoseg.errors import PlanError
from autoseg.model.memory import trace_step
from autoseg.plan import gpus_of_run, make_plan, parse_settings, read_hardware, share_hardware
from autoseg.plan.rules_machine import max_batch, room_on
from autoseg.schema import Fingerprint, Gpu, Hardware, save

Inputs = tuple[Fingerprint, Hardware]


def _replace(record: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(record, **changes)


def _more_memory(inputs: Inputs) -> Inputs:
    found, hardware = inputs
    cards = tuple(_replace(g, memory_bytes=2 * g.memory_bytes, free_bytes=2 * g.memory_bytes) for g in hardware.gpus)
    return found, _replace(hardware, gpus=cards, ram_bytes=2 * hardware.ram_bytes)


def _one_thread_more(inputs: Inputs) -> Inputs:
    found, hardware = inputs
    return found, _replace(hardware, cpu_threads=hardware.cpu_threads + 1)


def _less_shm(inputs: Inputs) -> Inputs:
    found, hardware = inputs
    return found, _replace(hardware, shm_bytes=hardware.shm_bytes // 64)


def _another_grey(inputs: Inputs) -> Inputs:
    found, hardware = inputs
    volumes = tuple(_replace(v, intensity=_replace(v.intensity, mean=77.0)) for v in found.volumes)
    return _replace(found, volumes=volumes), hardware


def _coarser(inputs: Inputs) -> Inputs:
    found, hardware = inputs
    z, y, x = found.crops[0].voxel_size_nm
    size = (2 * z, 2 * y, 2 * x)
    volumes = tuple(_replace(v, voxel_size_nm=size) for v in found.volumes)
    return _replace(found, volumes=volumes, crops=tuple(_replace(c, voxel_size_nm=size) for c in found.crops)), hardware


def _half_as_wide(inputs: Inputs) -> Inputs:
    found, hardware = inputs
    z, y, x = found.crops[0].shape_zyx
    return _replace(found, crops=tuple(_replace(c, shape_zyx=(z, y // 2, x // 2)) for c in found.crops)), hardware


def _rarer(inputs: Inputs) -> Inputs:
    found, hardware = inputs
    name = found.classes[0].name
    crops = tuple(
        _replace(c, counts=c.counts | {name: _replace(c.counts[name], present=c.counts[name].present // 20 + 60)})
        for c in found.crops
    )
    return _replace(found, crops=crops), hardware


def _without_the_gpu(inputs: Inputs) -> Inputs:
    found, hardware = inputs
    return found, _replace(hardware, gpus=())


CHANGES: tuple[Callable[[Inputs], Inputs], ...] = (
    _more_memory,
    _one_thread_more,
    _less_shm,
    _another_grey,
    _coarser,
    _half_as_wide,
    _rarer,
    _without_the_gpu,
)


@cheap
@settings(max_examples=120)
@given(fingerprints, machines.filter(lambda m: m.ram_bytes > 4 * GIB), st.sampled_from(CHANGES))
def test_what_changes_a_value_changes_its_reason(
    found: Fingerprint, hardware: Hardware, change: Callable[[Inputs], Inputs]
) -> None:
    try:
        before, after = (make_plan("a", *inputs, {}) for inputs in ((found, hardware), change((found, hardware))))
    except PlanError:
        return
    for field in [r.field for r in before.reasons if r.field not in ("dimensions", "resolution")]:
        if value_of(before, field) != value_of(after, field):
            assert reason(before, field) != reason(after, field), f"{field}: {reason(before, field)}"


@settings(max_examples=8)
@given(
    st.sampled_from([4, 8, 11, 16, 24, 40, 80]),
    st.sampled_from([8, 32, 126, 500]),
    st.integers(1, 64),
    st.integers(1, 48),
    st.sampled_from([None, (1, 256, 256), (1, 64, 64), (32, 128, 128), (96, 96, 96)]),
)
def test_a_traced_plan_fits_and_leaves_no_gpu_idle_that_a_larger_batch_would_use(
    vram_gib: int, ram_gib: int, threads: int, num_classes: int, patch: tuple[int, int, int] | None
) -> None:
    found = facts((200, 400, 400), (8.0, 8.0, 8.0), classes=tuple(f"own{i}" for i in range(num_classes)))
    hardware = machine(gpu(gib=vram_gib), threads=threads, ram_gib=ram_gib)
    asked = {} if patch is None else {"patch_size_zyx": patch}
    plan, refusal = None, ""
    try:
        plan = make_plan("any", found, hardware, asked)
    except PlanError as error:
        refusal = str(error)
    if plan is None:
        assert "one patch of" in refusal
        assert "fits, with" in refusal, "the message names what would"
        return
    room, _ = room_on(hardware, "cuda")
    slices = plan.input_slices
    cost = trace_step(plan.network, slices, num_classes, plan.patch_size_zyx, plan.precision, plan.loss)
    assert cost.memory_bytes(plan.batch_size, "cuda") == plan.predicted_memory_bytes <= room
    assert plan.predicted_ram_bytes <= hardware.ram_bytes
    full = plan.batch_size == max_batch(plan.patch_size_zyx)
    assert full or cost.memory_bytes(plan.batch_size + 1, "cuda") > room
    assert not full or f"more than {plan.batch_size} would not help" in reason(plan, "batch_size")


@cheap
@given(machines, st.integers(1, 9))
def test_runs_side_by_side_share_a_machine(hardware: Hardware, num_runs: int) -> None:
    one = share_hardware(hardware, num_runs)
    assert one.cpu_threads == max(1, hardware.cpu_threads // num_runs)
    assert num_runs * one.ram_bytes <= hardware.ram_bytes
    assert num_runs * one.shm_bytes <= hardware.shm_bytes
    assert bool(one.gpus) == bool(hardware.gpus)
    if hardware.gpus:
        whole = max(g.memory_bytes for g in hardware.gpus)
        on_one = math.ceil(num_runs / len(hardware.gpus))
        assert len(one.gpus) * num_runs <= max(len(hardware.gpus), num_runs)
        assert all(g.memory_bytes * on_one <= whole for g in one.gpus)
        mine = [gpus_of_run(hardware, num_runs, run) for run in range(num_runs)]
        assert all(len(gpus) == len(one.gpus) for gpus in mine)
        used = [gpu for gpus in mine for gpu in gpus]
        assert max(used.count(gpu) for gpu in used) <= on_one, "no GPU computes more runs than were planned for it"


def test_one_run_alone_has_the_whole_machine() -> None:
    hardware = machine(gpu(), gpu(), threads=32)
    assert share_hardware(hardware, 1) == hardware
    assert [len(share_hardware(hardware, n).gpus) for n in (1, 2, 3)] == [2, 1, 1]
    with pytest.raises(PlanError, match="use at least 1"):
        share_hardware(hardware, 0)


# ---- the numbers that reasons quote --------------------------------------------------------------------------


@cheap
@settings(max_examples=40)
@given(st.integers(3, 200), st.integers(5, 90), st.integers(2, 60), st.integers(40, 400))
def test_reasons_quote_the_machine_and_the_data(threads: int, vram: int, ram: int, thickness: int) -> None:
    found = thick(facts(), mito=2.0 * thickness, pm=float(thickness))
    plan = make_plan("a", found, machine(gpu("Quadro X", vram), threads=threads, ram_gib=ram + 4), {})
    assert f"Quadro X with {vram} GiB" in reason(plan, "device")
    assert f"{threads} threads" in reason(plan, "num_workers")
    assert f"{threads} threads" in reason(plan, "num_threads")
    assert f"{int(vram * GIB * 0.85) / GIB:.1f} GiB of GPU memory" in reason(plan, "batch_size")
    on_cpu = make_plan("a", found, machine(threads=threads, ram_gib=ram + 4), {})
    assert f"{int((ram + 4) * GIB * 0.6) / GIB:.1f} GiB of RAM" in reason(on_cpu, "batch_size")
    assert (on_cpu.voxel_size_nm[1] == 9.2) == (f"pm of {thickness} nm" in reason(on_cpu, "voxel_size_nm"))


@cheap
def test_too_little_shared_memory_is_named_with_its_remedy() -> None:
    plan = make_plan("a", facts(), machine(gpu(), threads=16, ram_gib=64, shm_gib=0.0625), {})
    assert plan.num_workers < 8
    assert "64 MiB: enlarge it (docker run --shm-size)" in reason(plan, "num_workers")
    enough = make_plan("a", facts(), machine(gpu(), threads=16, ram_gib=64, shm_gib=32), {})
    assert "enlarge" not in reason(enough, "num_workers")


# ---- what no machine is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"ram_bytes": -1}, "ram_bytes: -1: give bytes", id="negative-ram"),
        pytest.param({"ram_bytes": 24}, "give bytes: 11 GiB are 11811160064", id="ram-in-gigabytes"),
        pytest.param({"shm_bytes": -5}, "shm_bytes: -5", id="negative-shm"),
        pytest.param({"cpu_threads": 0}, "cpu_threads: 0: use at least 1", id="no-thread"),
        pytest.param({"step_gflops": {"fp32": -3.0}}, "step_gflops.fp32: -3", id="negative-speed"),
        pytest.param({"gpus": (gpu(), gpu(gib=-11))}, r"gpus\[1\].memory_bytes: -11811160064", id="negative-vram"),
        pytest.param({"gpus": (gpu(gib=11 / GIB),)}, r"gpus\[0\].memory_bytes: 11: give bytes", id="vram-in-gigabytes"),
    ],
)
def test_numbers_that_no_machine_has_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan("a", facts(), _replace(machine(), **changes), {})


@pytest.mark.parametrize(
    ("hardware", "asked"),
    [
        pytest.param(machine(gpu(gib=1.01)), {}, id="tiny-gpu"),
        pytest.param(machine(gpu(gib=4)), {"patch_size_zyx": (64, 256, 256)}, id="huge-patch"),
        pytest.param(machine(gpu(gib=1.5)), {"network.features": (1280, 1280)}, id="wide-network"),
    ],
)
def test_where_nothing_fits_the_nearest_that_would_is_named_and_does(hardware: Hardware, asked: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="one patch of") as refused:
        make_plan("a", facts(), hardware, asked)
    remedy = str(refused.value).rsplit(": ", 1)[1]
    pairs = re.findall(r"--set (\S+)", remedy)
    assert pairs, remedy
    again = make_plan("a", facts(), hardware, asked | parse_settings(pairs))
    assert again.predicted_memory_bytes <= room_on(hardware, "cuda")[0]


def test_a_plan_for_a_machine_stands_for_it(tmp_path: Path) -> None:
    plan = make_plan("a", facts(), machine(gpu(), threads=7), {})
    save(plan, tmp_path / "plan.json")
    save(plan.hardware, tmp_path / "hardware.json")
    assert read_hardware(str(tmp_path / "plan.json")) == plan.hardware == read_hardware(str(tmp_path / "hardware.json"))
    save(facts(), tmp_path / "facts.json")
    with pytest.raises(PlanError, match="neither a machine nor a plan"):
        read_hardware(str(tmp_path / "facts.json"))


# ---- any GPUs, some of them busy: budgets that are counted here, not by the rules -----------------------------


def some_gpu(gib: float, free: float, formats: int) -> Gpu:
    card = gpu("any", gib, bf16=formats == 2, fp16=formats >= 1)
    return _replace(card, free_bytes=int(free * card.memory_bytes))


sizes, formats = st.sampled_from([4, 10, 11, 24, 80]), st.integers(0, 2)
any_gpus = st.lists(st.builds(some_gpu, sizes, st.floats(0, 1), formats), min_size=1, max_size=6)
gpus_of_one_kind = st.builds(
    lambda gib, kind, free: [some_gpu(gib, share, kind) for share in free],
    st.sampled_from([24, 80]),
    formats,
    st.lists(st.floats(0.1, 1), min_size=2, max_size=4),
)


@cheap
@settings(max_examples=200)
@given(
    st.one_of(any_gpus, gpus_of_one_kind),
    st.integers(1, 96),
    st.floats(2, 80),
    st.sampled_from([0, 1, 32, 120]),
    st.sampled_from([facts(), facts((200, 400, 400), (8.0, 8.0, 8.0))]),
    st.data(),
)
def test_a_plan_keeps_within_the_free_memory_of_its_gpus_the_threads_and_the_ram(
    cards: list[Gpu], threads: int, ram_gib: float, shm_gib: int, found: Fingerprint, data: st.DataObject
) -> None:
    hardware = machine(*cards, threads=threads, ram_gib=ram_gib, shm_gib=shm_gib)
    number = data.draw(st.sampled_from([None, None, *range(1, len(cards) + 1)]))
    workers = data.draw(st.one_of(st.none(), st.integers(0, 120)))
    asked = {k: v for k, v in {"num_processes": number, "num_workers": workers}.items() if v is not None}
    try:
        plan = make_plan("any", found, hardware, asked)
    except PlanError as error:
        refused = str(error)
        assert refused.startswith(("batch_size: one patch of", *(f"{field}: " for field in asked))), refused
        return
    processes, used = plan.num_processes, cards[: plan.num_processes]
    cost = cheap_trace(plan.network, plan.input_slices, len(plan.classes), plan.patch_size_zyx)
    traced = cost.fixed_bytes + plan.batch_size * cost.patch_bytes
    for card in used:
        mine = min(card.memory_bytes, card.free_bytes + 600 * 2**20)  # less what asking took
        assert traced * 1.1 + 600 * 2**20 <= 0.85 * mine + 1
        assert plan.precision != "bf16" or card.bf16
        assert plan.precision != "fp16" or card.fp16
    assert processes * (plan.num_threads + plan.num_workers) <= max(threads, processes * (1 + (workers or 0)))
    assert plan.predicted_ram_bytes <= 0.9 * hardware.ram_bytes
    batch = plan.patches_per_step // processes * math.prod(plan.patch_size_zyx) * 4 * (plan.input_slices + 1)
    assert workers or processes * plan.num_workers * 3 * batch <= hardware.shm_bytes
    assert plan.predicted_ram_bytes >= processes * plan.num_workers * 3 * batch
    if number is None:
        assert all((card.bf16, card.fp16) == (cards[0].bf16, cards[0].fp16) for card in used)
        free = [min(card.memory_bytes, card.free_bytes + 600 * 2**20) for card in used]
        assert processes * min(free) >= free[0] * 0.999, "the first alone would have had more"


@cheap
def test_where_one_voxel_size_serves_all_classes_one_plan_is_made(tmp_path: Path) -> None:
    from autoseg.cli import main

    save(facts(), tmp_path / "f.json")
    out = tmp_path / "p.json"
    asked = ["--fingerprint", str(tmp_path / "f.json"), "--hardware", "laptop", "--by-resolution", "--out", str(out)]
    assert main(["plan", *asked, "--cache", str(tmp_path / "cache")]) == 0
    assert [path.name for path in sorted(tmp_path.glob("p*.json"))] == ["p.json"]
