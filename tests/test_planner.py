"""The planner: a pure function whose every decision fits the machine, has one reason, and can be overridden."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.errors import PlanError
from autoseg.geometry import NmZYX, VoxelsZYX
from autoseg.model.memory import StepCost
from autoseg.plan import fingerprint, make_plan, parse_settings, rules_patch
from autoseg.plan.draft import DERIVED, leaf_fields
from autoseg.schema import (
    ClassCount,
    ClassEntry,
    ClassShape,
    CropFacts,
    Fingerprint,
    Gpu,
    Hardware,
    Intensity,
    Network,
    Plan,
    Quantiles,
    Region,
    VolumeFacts,
    check_plan,
    encode,
    load_as,
    save,
)

GIB = 2**30
GOLDEN = Path(__file__).parent / "golden"
TINY: dict[str, Any] = {
    "network.features": (4, 8),
    "patch_size_zyx": (1, 32, 32),
    "input_slices": 1,
    "network.kind": "unet",
    "network.norm": "batch",
    "network.deep_supervision": False,
    "optimizer.learning_rate": 3e-3,
    "optimizer.ema_decay": 0.99,
    "batch_size": 2,
    "accumulate_batches": 1,
    "num_threads": 1,
    "optimizer.num_steps": 8,
    "validation.num_rounds": 2,
    "precision": "fp32",
}

# ---- what plans are made from; other test modules use these, too ---------------------------------------------


def machine(*gpus: Gpu, threads: int = 2, bf16: bool = False, ram_gib: float = 8, shm_gib: float = 1) -> Hardware:
    """Return a machine; the first GPU is the one that counts."""
    return Hardware(
        name="bench",
        gpus=gpus,
        cpu_name="a CPU",
        cpu_threads=threads,
        cpu_bf16=bf16,
        ram_bytes=int(ram_gib * GIB),
        shm_bytes=int(shm_gib * GIB),
        step_gflops={"fp32": 60.0, "bf16": 120.0, "fp16": 100.0},
    )


def gpu(name: str = "RTX 3090", gib: float = 24, *, bf16: bool = True, fp16: bool = True) -> Gpu:
    """Return a GPU with all its memory free."""
    return Gpu(name=name, memory_bytes=int(gib * GIB), free_bytes=int(gib * GIB), bf16=bf16, fp16=fp16)


def busy(free_gib: float, gib: float = 80) -> Gpu:
    """Return a GPU that other processes use."""
    return msgspec.structs.replace(gpu(gib=gib), free_bytes=int(free_gib * GIB))


def facts(
    shape: VoxelsZYX = (20, 512, 512),
    voxel: NmZYX = (50.0, 4.6, 4.6),
    *,
    classes: tuple[str, ...] = ("mito", "pm"),
    crops: int = 3,
    volumes: int = 1,
) -> Fingerprint:
    """Return the fingerprint of crops that all have that shape; every class fills a tenth of each."""
    voxels = math.prod(shape)
    count = ClassCount(absent=voxels - voxels // 10, present=voxels // 10, unknown=0)
    grey = Intensity(minimum=0, p0_5=3, p50=120, p99_5=240, maximum=255, mean=123.4, sd=45.6, num_voxels=voxels)
    return Fingerprint(
        volumes=tuple(
            VolumeFacts(
                name=f"v{i}",
                path=f"v{i}/v{i}.zarr",
                dtype="uint8",
                shape_zyx=shape,
                voxel_size_nm=voxel,
                intensity=grey,
                stored_fraction=1.0,
            )
            for i in range(volumes)
        ),
        crops=tuple(
            CropFacts(
                name=f"v{i % volumes}/crop{i + 1}",
                volume=f"v{i % volumes}",
                shape_zyx=shape,
                voxel_size_nm=voxel,
                origin_nm=(0.0, 0.0, i * shape[2] * voxel[2]),
                split=None,
                annotated=classes,
                counts=dict.fromkeys(classes, count),
            )
            for i in range(crops)
        ),
        classes=tuple(ClassEntry(name=name) for name in classes),
    )


def tiny_plan(data: Path, cache: Path, changes: Mapping[str, Any] | None = None) -> Plan:
    """Return a plan for DATA, at the voxel size of its labels, that trains in a second on one thread."""
    found = fingerprint(data, cache)
    native = {"voxel_size_nm": found.crops[0].voxel_size_nm}
    return make_plan("tiny", found, machine(threads=1), TINY | native | dict(changes or {}))


def tiny_facts_plan(changes: Mapping[str, Any] | None = None) -> Plan:
    """Return a small plan without any data on disk, for two classes."""
    return make_plan("tiny", facts(), machine(threads=1), TINY | dict(changes or {}))


def cheap_trace(network: Network, slices: int, classes: int, patch: VoxelsZYX, *_: object) -> StepCost:
    """Price a step by a formula where only the planner's reaction to the price is of interest."""
    per_patch = 7 * math.prod(patch) * sum(network.features) + 4 * math.prod(patch) * (slices + classes)
    return StepCost(50 * 2**20, per_patch, 1000 * per_patch, 10**6)


cheap = pytest.mark.usefixtures("_cheap")


def value_of(plan: Plan, field: str) -> Any:
    """Return the value of a dotted field."""
    value: Any = plan
    for part in field.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def reason(plan: Plan, field: str) -> str:
    """Return why the field has its value."""
    return next(r.because for r in plan.reasons if r.field == field)


# ---- any machine, any data ----------------------------------------------------------------------------------

gpus = st.builds(
    gpu,
    st.sampled_from(["A", "B"]),
    st.sampled_from([4, 6, 11, 16, 24, 80]),
    bf16=st.booleans(),
    fp16=st.booleans(),
)
machines = st.builds(
    lambda cards, **rest: machine(*cards, **rest),
    st.lists(gpus, max_size=4),
    threads=st.integers(1, 128),
    bf16=st.booleans(),
    ram_gib=st.sampled_from([2, 4, 8, 31.3, 64, 500]),
    shm_gib=st.sampled_from([0, 0.0625, 1, 32]),
)
fingerprints = st.builds(
    facts,
    st.tuples(st.integers(1, 120), st.integers(24, 1500), st.integers(24, 1500)),
    st.tuples(st.sampled_from([4.0, 8.0, 30.0, 50.0]), st.sampled_from([2.62, 4.0, 8.0]), st.sampled_from([4.0, 8.0])),
    classes=st.sampled_from([("mito",), ("mito", "pm", "er_mem", "nuc")]),
    crops=st.integers(1, 9),
    volumes=st.integers(1, 4),
).filter(lambda f: len(f.crops) >= len(f.volumes))


@cheap
@settings(max_examples=150)
@given(fingerprints, machines)
def test_any_plan_fits_its_machine_and_its_own_network(found: Fingerprint, hardware: Hardware) -> None:
    try:
        plan = make_plan("any", found, hardware, {})
    except PlanError as error:
        # the smallest step does not fit: the message compares what is needed with what there is
        if not re.search(r"batch_size: one patch .* needs .* GiB", str(error)):
            raise
        return
    room = hardware.gpus[0].memory_bytes * 0.85 if hardware.gpus else hardware.ram_bytes * 0.6
    assert 0 < plan.predicted_memory_bytes <= room
    assert plan.predicted_ram_bytes <= hardware.ram_bytes
    assert (plan.device == "cuda") == bool(hardware.gpus)
    assert 1 <= plan.num_processes <= max(1, len(hardware.gpus))
    assert 1 <= plan.num_threads * plan.num_processes <= hardware.cpu_threads
    assert plan.num_processes * plan.num_workers <= max(0, hardware.cpu_threads - 2)
    assert all(plan.predicted_memory_bytes <= g.memory_bytes * 0.85 for g in hardware.gpus[: plan.num_processes])
    for axis in range(3):
        step = math.prod(stride[axis] for stride in plan.network.strides_zyx)
        assert plan.patch_size_zyx[axis] % step == 0
        assert plan.sliding_window.tile_zyx[axis] % step == 0
    assert len(plan.network.features) == len(plan.network.strides_zyx) + 1 == len(plan.network.kernels_zyx)
    assert encode(make_plan("any", found, hardware, {})) == encode(plan), "the same input gave another plan"


@cheap
@settings(max_examples=25)
@given(fingerprints, machines.filter(lambda m: m.ram_bytes > 4 * GIB))
def test_every_decision_of_a_plan_has_exactly_one_reason(found: Fingerprint, hardware: Hardware) -> None:
    plan = make_plan("any", found, hardware, {"patch_size_zyx": (1, 16, 16)})
    explained = [r.field for r in plan.reasons]
    assert len(explained) == len(set(explained))
    given_or_derived = {"name", "heads", *DERIVED} - {n for n in DERIVED if n.startswith("predicted_")}
    for field, _ in leaf_fields(Plan):
        if field.split(".")[0] in given_or_derived:
            continue
        covering = [name for name in explained if field == name or field.startswith(f"{name}.")]
        assert len(covering) == 1, f"{field} has the reasons {covering}"
    assert all(r.because and r.source for r in plan.reasons)
    assert {name.split(".")[0] for name in explained} <= {*Plan.__struct_fields__, "dimensions", "resolution"}


@cheap
def test_a_cpu_takes_coarser_voxels_while_the_thinnest_class_still_spans_three() -> None:
    def plan(found: Fingerprint, *cards: Gpu) -> Plan:
        return make_plan("a", found, machine(*cards), {})

    enough = plan(thick(facts(), mito=200.0, pm=27.6))
    assert enough.voxel_size_nm == (50.0, 9.2, 9.2)
    assert "pm of 28 nm" in reason(enough, "voxel_size_nm")
    assert "3.0 voxels" in reason(enough, "voxel_size_nm")
    assert "twice coarser along y, x" in reason(enough, "voxel_size_nm")
    assert "4 times as much tissue" in reason(enough, "voxel_size_nm")
    assert "20x256x256" in reason(enough, "patch_size_zyx")
    for found in (
        thick(facts(), mito=200.0, pm=27.5),
        thick(facts(), mito=200.0),  # nothing is known of pm
        thick(facts(), mito=None, pm=None),
        facts(),
    ):
        assert plan(found).voxel_size_nm == (50.0, 4.6, 4.6)
    assert plan(thick(facts(), mito=None, pm=40.0)).voxel_size_nm == (50.0, 9.2, 9.2), "mito is thicker than crops"
    assert plan(thick(facts(), mito=200.0, pm=27.6), gpu()).voxel_size_nm == (50.0, 4.6, 4.6)
    cubic = thick(facts((96, 96, 96), (8.0, 8.0, 8.0)), mito=200.0, pm=48.0)
    assert plan(cubic).voxel_size_nm == (16.0, 16.0, 16.0)
    column = thick(facts((96, 96, 96), (8.0, 4.0, 8.0)), mito=200.0, pm=48.0)
    assert plan(column).voxel_size_nm == (8.0, 8.0, 8.0)
    assert "twice coarser along y than 8x4x8 nm" in reason(plan(column), "voxel_size_nm")
    assert "2 times as much tissue" in reason(plan(column), "voxel_size_nm")
    one = thick(facts((1, 512, 512), (10.0, 10.0, 10.0)), mito=200.0, pm=60.0)
    assert plan(one).voxel_size_nm == (10.0, 20.0, 20.0), "one section has no neighbour to be averaged with"


@cheap
def test_reasons_quote_the_numbers_they_were_given() -> None:
    plan = make_plan("a", facts(), machine(gpu("Quadro X", 48), threads=12, ram_gib=64), {})
    assert "Quadro X" in reason(plan, "device")
    assert "48 GiB" in reason(plan, "device")
    assert "12 threads" in reason(plan, "num_workers")
    assert f"{plan.predicted_memory_bytes / GIB:.2f} GiB" in reason(plan, "batch_size")
    assert f"{48 * 0.85:.1f} GiB" in reason(plan, "batch_size")
    assert "20x512x512" in reason(plan, "patch_size_zyx")
    assert "10.9" in reason(plan, "dimensions"), "anisotropy 50 / 4.6"
    assert "123 ± 46" in reason(plan, "normalization.kind")
    assert "10.00%" in reason(plan, "sampling.class_centred_fraction")


def thick(found: Fingerprint, **thickness_nm: float | None) -> Fingerprint:
    """Return the fingerprint with a measured thickness of its classes."""
    shapes = tuple(
        ClassShape(
            name=name,
            thickness_nm=None if nm is None else Quantiles(p10=nm / 2, p50=nm, p90=2 * nm),
            in_plane=True,
            thickness_cut_share=0.0 if nm else 1.0,
            num_instances=3,
            num_instances_cut=1,
            instance_nm3=None,
            sampled_crops=1,
            sampled_voxels=1000,
        )
        for name, nm in thickness_nm.items()
    )
    return msgspec.structs.replace(found, shapes=shapes)


# ---- rules --------------------------------------------------------------------------------------------------


@cheap
@pytest.mark.parametrize(
    ("shape", "voxel", "cards", "expected"),
    [
        pytest.param((1, 512, 512), (50.0, 4.6, 4.6), [gpu()], "2d", id="one-section"),
        pytest.param((2, 512, 512), (50.0, 4.6, 4.6), [gpu()], "2d", id="too-few-for-neighbours"),
        pytest.param((6, 512, 512), (50.0, 4.6, 4.6), [gpu()], "2.5d", id="a-few-coarse-sections"),
        pytest.param((20, 512, 512), (50.0, 4.6, 4.6), [gpu()], "3d", id="many-coarse-sections"),
        pytest.param((64, 256, 256), (8.0, 8.0, 8.0), [gpu()], "3d", id="isotropic"),
        pytest.param((64, 256, 256), (8.0, 8.0, 8.0), [], "flat", id="isotropic-without-gpu"),
    ],
)
def test_dimensions_follow_depth_anisotropy_and_device(
    shape: VoxelsZYX, voxel: NmZYX, cards: list[Gpu], expected: str
) -> None:
    plan = make_plan("a", facts(shape, voxel), machine(*cards), {})
    depth = plan.patch_size_zyx[0]
    assert (depth > 1) == (expected == "3d")
    assert (plan.network.kind == "rsunet") == (expected == "3d")
    if expected != "flat":
        assert (plan.input_slices in (3, rules_patch.SLICES_2_5D)) == (expected == "2.5d")


@cheap
@pytest.mark.parametrize(
    ("hardware", "precision"),
    [
        pytest.param(machine(gpu("V100", 16, bf16=False)), "fp16", id="V100"),
        pytest.param(machine(gpu("RTX 2080 Ti", 11, bf16=False)), "fp16", id="2080Ti"),
        pytest.param(machine(gpu("A100", 40)), "bf16", id="A100"),
        pytest.param(machine(gpu("GTX 1080", 8, bf16=False, fp16=False)), "fp32", id="1080"),
        pytest.param(machine(bf16=True), "bf16", id="cpu-with-bf16"),
        pytest.param(machine(bf16=False), "fp32", id="cpu-without-bf16"),
    ],
)
def test_precision_is_what_the_device_does_natively(hardware: Hardware, precision: str) -> None:
    assert make_plan("a", facts(), hardware, {}).precision == precision


@cheap
def test_less_memory_means_a_smaller_step_and_then_a_refusal_with_numbers() -> None:
    planned = [make_plan("a", facts(), machine(gpu(gib=gib)), {}) for gib in (80, 24, 11, 8, 6)]
    for size in (
        [math.prod(plan.patch_size_zyx) for plan in planned],
        [plan.network.features[0] for plan in planned],
        [plan.predicted_memory_bytes for plan in planned],
    ):
        assert size[0] > size[-1]
        assert size == sorted(size, reverse=True)
    fixed = {"patch_size_zyx": (16, 256, 256), "network.features": (18, 36, 48, 64, 80)}
    batches = [make_plan("a", facts(), machine(gpu(gib=gib)), fixed).batch_size for gib in (80, 8, 6)]
    assert batches[0] > batches[-1]
    assert batches == sorted(batches, reverse=True)
    with pytest.raises(PlanError, match=r"batch_size: one patch .* needs \d+\.\d GiB .*--set patch_size_zyx"):
        make_plan("a", facts(), machine(gpu(gib=1)), {"patch_size_zyx": (64, 512, 512)})


@cheap
def test_anisotropic_kernels_are_flat_until_voxels_are_cubic() -> None:
    plan = make_plan("a", facts((40, 512, 512), (40.0, 10.0, 10.0)), machine(gpu()), {})
    depths = [kernel[0] for kernel in plan.network.kernels_zyx]
    assert depths == sorted(depths)
    assert depths[0] == 1
    assert depths[-1] == 3
    assert plan.network.strides_zyx[0] == (1, 2, 2)


@cheap
@pytest.mark.parametrize(("edge", "batch", "places"), [(64, 8, 8), (400, 8, 4), (400, 3, 2), (400, 1, 1), (400, 2, 2)])
def test_patches_share_places_only_where_chunks_do_not_stay_decoded(edge: int, batch: int, places: int) -> None:
    changes = {"batch_size": batch, "accumulate_batches": 1, "patch_size_zyx": (1, 64, 64), "network.features": (4, 8)}
    plan = make_plan("a", facts((edge, edge, edge), (8.0, 8.0, 8.0)), machine(), changes)
    assert plan.sampling.crops_per_step == places


def with_em(found: Fingerprint, voxel: NmZYX, shape: VoxelsZYX, dtype: str = "uint8") -> Fingerprint:
    """Return the fingerprint with EM of that voxel size, shape and dtype around its crops."""
    change = {"voxel_size_nm": voxel, "shape_zyx": shape, "dtype": dtype}
    return msgspec.structs.replace(
        found, volumes=tuple(msgspec.structs.replace(volume, **change) for volume in found.volumes)
    )


@cheap
def test_decoded_em_is_counted_in_bytes_of_the_level_that_is_read() -> None:
    def places(found: Fingerprint, **changes: Any) -> tuple[int, str]:
        plan = make_plan("a", found, machine(), {"batch_size": 8, "accumulate_batches": 1} | changes)
        return plan.sampling.crops_per_step, reason(plan, "sampling.crops_per_step")

    crops = facts((300, 300, 300), (8.0, 8.0, 8.0))
    mib = 3 * 300**3 / 2**20
    assert places(crops)[0] == 8
    shorts = places(with_em(crops, (8.0, 8.0, 8.0), (300, 300, 900), "uint16"))
    assert (shorts[0], f"{2 * mib:.0f} MiB" in shorts[1]) == (4, True)
    finer = places(with_em(crops, (5.0, 5.0, 5.0), (480, 480, 1440)))
    assert (finer[0], f"{3 * 480**3 / 2**20:.0f} MiB" in finer[1]) == (4, True), "no level of 8 nm: 5 nm are read"
    assert places(with_em(crops, (4.0, 4.0, 4.0), (600, 600, 1800)))[0] == 8, "its second level has 8 nm"


@cheap
def test_labels_finer_than_their_em_are_not_said_to_have_its_voxel_size() -> None:
    plan = make_plan("a", with_em(facts((64, 64, 64), (2.0, 2.0, 2.0)), (4.0, 4.0, 4.0), (64, 64, 256)), machine(), {})
    assert plan.voxel_size_nm == (4.0, 4.0, 4.0)
    assert reason(plan, "voxel_size_nm").startswith(
        "100% of what is annotated, by crop and class, has 4x4x4 nm (that of"
    )
    own = make_plan("a", facts((64, 64, 64), (4.0, 4.0, 4.0)), machine(), {})
    assert reason(own, "voxel_size_nm") == "100% of what is annotated, by crop and class, has 4x4x4 nm"


@cheap
def test_a_step_is_priced_only_on_the_device_that_was_measured() -> None:
    priced = make_plan("a", facts(), machine(gpu()), {})
    assert priced.predicted_step_s is not None
    assert "measured when" in next(r.source for r in priced.reasons if r.field == "predicted_step_s")
    other = make_plan("a", facts(), machine(gpu()), {"device": "cpu"})
    assert other.predicted_step_s is None
    assert reason(other, "predicted_step_s") == "the speed of this machine in fp32 on cpu was not measured"
    assert make_plan("a", facts(), machine(), {}).predicted_step_s is not None


@cheap
@pytest.mark.parametrize(
    ("cards", "number", "because"),
    [
        ([gpu(gib=24)] * 2, 2, "2 GPUs of 24.0 GiB with bf16 and fp16, one process each"),
        ([gpu(gib=24), gpu(gib=22)], 2, "2 GPUs of 22.0 to 24.0 GiB with bf16 and fp16, one process each"),
        ([gpu(gib=24), gpu("T4", 16)], 1, "1 GPU from T4 on are not used: that one has 16.0 GiB"),
        ([gpu(gib=11), gpu("V100", 11, bf16=False), gpu(gib=11)], 1, "2 GPUs from V100 on are not used"),
        ([gpu(gib=24)] * 3 + [gpu("T4", 16)], 3, "3 GPUs of 24.0 GiB"),
        ([gpu(gib=24)], 1, "one GPU of 24.0 GiB with bf16 and fp16"),
        ([busy(2), gpu(gib=80)], 2, "2 GPUs of 80.0 GiB with bf16 and fp16, one process each; to use 1 x 68.0"),
        ([gpu(gib=80), busy(2)] + [gpu(gib=80)] * 2, 1, "; to use 3 x 68.0 GiB, set CUDA_VISIBLE_DEVICES=0,2,3"),
        ([gpu(gib=80)] * 3 + [busy(2)], 3, "GPU 3 has 77.4 of 80.0 GiB in use, with it 4 x 2.2 GiB could be used inst"),
        ([gpu(gib=80)] * 3 + [busy(70)], 4, "4 GPUs of 80.0 GiB"),
        (
            [gpu("T400", 4)] + [gpu(gib=80)] * 2,
            1,
            "that one has 80.0 GiB or other formats; to use 2 x 68.0 GiB, set CU",
        ),
        ([], 1, "one process uses all of 16 threads"),
    ],
)
def test_gpus_that_are_alike_train_together(cards: list[Gpu], number: int, because: str) -> None:
    plan = make_plan("a", facts(), machine(*cards, threads=16, ram_gib=64, shm_gib=32), {})
    assert plan.num_processes == number
    assert because in reason(plan, "num_processes")
    assert "stay free" not in reason(plan, "device")
    if number == len(cards) and not any(card.free_bytes < card.memory_bytes for card in cards):
        assert "CUDA_VISIBLE_DEVICES" not in reason(plan, "num_processes")
    assert plan.patches_per_step == plan.batch_size * plan.accumulate_batches * number


@cheap
def test_processes_share_threads_ram_and_shared_memory() -> None:
    def plan(number: int, **rest: Any) -> Plan:
        return make_plan("a", facts(), machine(*[gpu()] * 4, **rest), {"num_processes": number, "batch_size": 1})

    four, one = (plan(n, threads=32, ram_gib=120, shm_gib=60) for n in (4, 1))
    assert (four.num_threads, four.num_workers, one.num_threads, one.num_workers) == (2, 6, 8, 8)
    assert "32 threads, shared by 4 processes, 2 beside 6 workers of each" in reason(four, "num_threads")
    assert (four.accumulate_batches, one.accumulate_batches) == (1, 2)
    assert "4 patches a step (at least 2), 1 at once in each of 4 processes" in reason(four, "accumulate_batches")
    batch_gib = 4 * math.prod(four.patch_size_zyx) * (four.input_slices + 1) / GIB
    state_gib = 4 * 4 * 10**6 / GIB  # weights, average, and two moments
    expected = 4 * (0.7 + state_gib + 6 * (0.6 + 3 * batch_gib))
    assert four.predicted_ram_bytes == pytest.approx(expected * GIB, rel=1e-6)
    assert "4 times: process 0.7 GiB + 6 workers" in reason(four, "predicted_ram_bytes")
    assert "for 4 processes together" in reason(four, "num_workers")
    little = plan(4, threads=32, ram_gib=16, shm_gib=60)
    assert little.num_workers < 3
    assert little.predicted_ram_bytes < 16 * GIB
    assert four.sampling.crops_per_step == 4


@cheap
def test_more_workers_or_threads_than_a_machine_has_room_for_are_refused_with_what_fits() -> None:
    def plan(*cards: Gpu, **asked: int) -> Plan:
        return make_plan("a", facts(), machine(*cards, threads=8, ram_gib=16, shm_gib=32), asked)

    for cards, field, number in (
        ([gpu()], "num_workers", 200),
        ([], "num_workers", 200),
        ([gpu()], "num_threads", 500),
        ([], "num_threads", 9),
    ):
        with pytest.raises(PlanError, match=rf"^{field}: .*--set {field}=\d+ fits$") as refused:
            plan(*cards, **{field: number})
        most = int(str(refused.value).rsplit("=", 1)[1].split()[0])
        fitting = plan(*cards, **{field: most})
        assert value_of(fitting, field) == most
        assert fitting.predicted_ram_bytes <= 0.9 * 16 * GIB
        with pytest.raises(PlanError, match=f"^{field}: "):
            plan(*cards, **{field: most + 1})
    with pytest.raises(PlanError, match=r"num_threads: 5 in each of 2 processes, and bench has 8: --set num_threads=4"):
        plan(num_processes=2, num_threads=5)
    with pytest.raises(PlanError, match=r"num_processes: 40 of 0.7 GiB each, .* --set num_processes=12 fits"):
        make_plan("a", facts(), machine(threads=64, ram_gib=16), {"num_processes": 40})
    assert make_plan("a", facts(), machine(threads=64, ram_gib=16), {"num_processes": 12}).num_processes == 12
    little = machine(*[gpu()] * 4, threads=8, ram_gib=3.12)
    remedy = (
        r"num_processes: 4 processes need 2.9 GiB, 2.8 GiB of RAM .*: --set num_processes=3 --set num_workers=0 fits"
    )
    with pytest.raises(PlanError, match=remedy):
        make_plan("a", facts(), little, {"num_processes": 4})
    assert make_plan("a", facts(), little, {"num_processes": 3, "num_workers": 0}).num_processes == 3


@cheap
def test_threads_that_the_user_wants_are_not_given_to_workers() -> None:
    def plan(**asked: int) -> Plan:
        return make_plan("a", facts(), machine(gpu(), threads=12, ram_gib=64, shm_gib=32), asked)

    assert (plan().num_threads, plan().num_workers) == (4, 8)
    assert (plan(num_threads=7).num_threads, plan(num_threads=7).num_workers) == (7, 5)
    assert (plan(num_workers=2).num_threads, plan(num_workers=11).num_threads) == (8, 1)


@cheap
def test_any_number_of_processes_may_share_a_cpu_and_on_gpus_one_for_each() -> None:
    fixed = {"patch_size_zyx": (1, 128, 128), "budget_s": 1e5}
    two, one = (make_plan("a", facts(), machine(threads=4), fixed | {"num_processes": n}) for n in (2, 1))
    assert (two.num_threads, two.network.norm, two.batch_size) == (2, "group", one.batch_size // 2)
    assert two.patches_per_step == one.patches_per_step
    assert "of one of 2 processes" in reason(two, "predicted_step_s")
    cards = machine(gpu(), gpu())
    with pytest.raises(
        PlanError, match=r"num_processes: 3, and bench has 2 GPUs: one process needs one: use at most 2"
    ):
        make_plan("a", facts(), cards, {"num_processes": 3})
    assert make_plan("a", facts(), cards, {"num_processes": 3, "device": "cpu"}).num_processes == 3
    with pytest.raises(PlanError, match="num_processes: 0 is not positive"):
        make_plan("a", facts(), machine(), {"num_processes": 0})


@cheap
def test_the_fullest_gpu_and_the_lesser_format_count_for_all() -> None:
    shared = msgspec.structs.replace(gpu(), free_bytes=6 * GIB)
    fixed = {"patch_size_zyx": (1, 64, 64)}
    cards = machine(gpu(), shared, threads=8, ram_gib=64)
    assert make_plan("a", facts(), cards, fixed).num_processes == 1
    both = make_plan("a", facts(), cards, fixed | {"num_processes": 2})
    assert "beside the 17.4 GiB of other processes" in reason(both, "batch_size")
    mixed = machine(gpu(), gpu("V100", 24, bf16=False), threads=8, ram_gib=64)
    assert make_plan("a", facts(), mixed, fixed).precision == "bf16"
    assert make_plan("a", facts(), mixed, fixed | {"num_processes": 2}).precision == "fp16"


@cheap
def test_what_other_processes_hold_of_a_gpu_is_not_planned_with() -> None:
    def step(free_gib: float) -> tuple[int, str]:
        card = msgspec.structs.replace(gpu(gib=24), free_bytes=int(free_gib * GIB))
        plan = make_plan("a", facts(), machine(card), {})
        return plan.predicted_memory_bytes, reason(plan, "batch_size")

    alone, shared = step(23.5), step(6)
    assert "20.4 GiB of GPU memory that" in alone[1], "a context of one's own is nobody else's"
    assert "beside the 17.4 GiB of other processes" in shared[1]
    assert shared[0] < alone[0]
    with pytest.raises(PlanError, match=r"batch_size: one patch .* beside the 23\.4 GiB of other processes"):
        step(0)


@cheap
def test_reasons_do_not_name_a_batch_that_is_decided_later() -> None:
    plan = make_plan("a", facts(), machine(), {"batch_size": 4})
    assert "batches of" not in reason(plan, "network.norm")
    assert "thousands" not in reason(plan, "network.features")


@cheap
def test_the_floor_of_a_class_is_a_share_of_all_patches_and_names_the_rarest_class() -> None:
    plan = make_plan("a", facts(), machine(), {})
    assert plan.sampling.class_floor == plan.sampling.class_centred_fraction / 2 / len(plan.classes)
    assert re.search(
        r"12\.50% of all patches or more for each of 2 classes; \w+ is in \d of \d",
        reason(plan, "sampling.class_floor"),
    )
    less = make_plan("a", facts(), machine(), {"sampling.class_centred_fraction": 0.1})
    assert less.sampling.class_floor == 0.025
    with pytest.raises(PlanError, match=r"sampling\.class_floor"):
        make_plan("a", facts(), machine(), {"sampling.class_floor": 0.3})


@cheap
def test_grey_defects_are_in_units_of_the_network_input() -> None:
    by_volume = make_plan("a", facts(), machine(), {"augmentation.preset": "sstem"}).augmentation
    changes = {"augmentation.preset": "sstem", "normalization.kind": "dtype"}
    by_dtype = make_plan("a", facts(), machine(), changes).augmentation
    for name in ("brightness_sd", "noise_sd_max", "drift_sd", "stripe_sd", "section_brightness_sd"):
        assert getattr(by_dtype, name) == pytest.approx(getattr(by_volume, name) * 45.6 / 255)
    assert by_dtype.contrast_range == by_volume.contrast_range


# ---- --set --------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[str, Any]] = {
    "name": ("other", "other"),
    "device": ("cpu", "cpu"),
    "classes": ('[{"name": "pm"}]', (ClassEntry(name="pm"),)),
    "split.train": ('[{"crop": "v0/crop2"}]', (Region(crop="v0/crop2"),)),
    "split.validate": ('[{"crop": "v0/crop3"}]', (Region(crop="v0/crop3"),)),
    "split.voxel_edge_nm": ("8,16", (8.0, 16.0)),
    "em_voxel_size_nm": ("50,4,4", (50.0, 4.0, 4.0)),
    "split.folds": ("3", 3),
    "split.fold": ("2", 2),
    "voxel_size_nm": ("50,9.2,9.2", (50.0, 9.2, 9.2)),
    "patch_size_zyx": ("1,64,32", (1, 64, 32)),
    "input_slices": ("3", 3),
    "num_processes": ("2", 2),
    "batch_size": ("3", 3),
    "accumulate_batches": ("5", 5),
    "num_workers": ("2", 2),
    "num_threads": ("1", 1),
    "precision": ("bf16", "bf16"),
    "network.kind": ("resunet", "resunet"),
    "network.features": ("4,8,12", (4, 8, 12)),
    "network.kernels_zyx": ("[[1,5,5],[1,3,3],[1,3,3]]", ((1, 5, 5), (1, 3, 3), (1, 3, 3))),
    "network.strides_zyx": ("[[1,2,2],[1,1,2]]", ((1, 2, 2), (1, 1, 2))),
    "network.norm": ("group", "group"),
    "network.deep_supervision": ("true", True),
    "loss.kind": ("focal_dice", "focal_dice"),
    "class_weighting": ("inverse_max", "inverse_max"),
    "loss.per_sample": ("true", True),
    "loss.activation": ("softmax", "softmax"),
    "loss.priors": ('{"mito": 0.2, "pm": 0.1}', {"mito": 0.2, "pm": 0.1}),
    "class_weights": ('{"mito": 2, "pm": 1}', {"mito": 2.0, "pm": 1.0}),
    "normalization.kind": ("dtype", "dtype"),
    "init": ("null", None),
    "augmentation.preset": ("flips", "flips"),
    "augmentation.flip": ("false", False),
    "augmentation.right_angles": ("false", False),
    "augmentation.transpose_z": ("true", True),  # of cubes, see below
    "augmentation.scale_range": ("0.5,2", (0.5, 2.0)),
    "augmentation.contrast_range": ("0.5,2", (0.5, 2.0)),
    "augmentation.gamma_range": ("0.5,2", (0.5, 2.0)),
    "augmentation.blur_sigma_range": ("0.5,2", (0.5, 2.0)),
    "augmentation.milling_axis": ("x", "x"),
    "augmentation.missing_sections_max": ("3", 3),
    "augmentation.missing_area_range": ("0.1,0.5", (0.1, 0.5)),
    "augmentation.misalign_max": ("5", 5),
    "augmentation.defocus_sections_max": ("3", 3),
    "augmentation.defocus_sigma_range": ("0.5,2", (0.5, 2.0)),
    "augmentation.section_contrast_range": ("0.5,2", (0.5, 2.0)),
    "sampling.class_floor": ("0.05", 0.05),
    "optimizer.kind": ("adamw", "adamw"),
    "optimizer.num_steps": ("120", 120),
    "schedule.kind": ("one_cycle", "one_cycle"),
    "validation.num_rounds": ("3", 3),
    "budget_s": ("40", 40.0),
    "sampling.crops_per_step": ("3", 3),
    "sliding_window.tile_zyx": ("1,96,96", (1, 96, 96)),
    "sliding_window.batch_size": ("3", 3),
    "sliding_window.mirror_axes": ("x", ("x",)),
    "sliding_window.transpose_yx": ("false", False),
    "decode.tune_thresholds": ("false", False),
    "decode.thresholds": ('{"mito": 0.25, "pm": 0.5}', {"mito": 0.25, "pm": 0.5}),
    "seed": ("7", 7),
}
SETTABLE = [name for name, _ in leaf_fields(Plan) if not {name, name.split(".")[0]} & set(DERIVED)]


@cheap
@pytest.mark.parametrize("field", SETTABLE)
def test_every_field_of_the_plan_can_be_set_and_says_so(field: str) -> None:
    text, expected = SETTINGS.get(field, ("0.125", 0.125))  # every other field is a plain number
    pairs = [f"{field}={text}"] + (["network.features=4,8,12"] if field.startswith("network.") else [])
    if field == "augmentation.transpose_z":
        pairs += ["voxel_size_nm=8,8,8", "augmentation.preset=flips"]
    plan = make_plan("a", facts(), machine(), parse_settings(list(dict.fromkeys(pairs))))
    assert value_of(plan, field) == expected
    if field != "name":
        sources = {r.field: r.source for r in plan.reasons}
        assert sources["split" if field.startswith("split.") else field] == "user"
    default = make_plan("a", facts(), machine(), {})
    if field not in ("device", "optimizer.kind", "init", "network.kernels_zyx"):
        assert encode(plan) != encode(default)


@cheap
@pytest.mark.parametrize(
    ("pairs", "follows"),
    [
        (["network.features=8,16"], lambda p: len(p.network.kernels_zyx) == 2 and len(p.network.strides_zyx) == 1),
        (["network.kind=rsunet"], lambda p: p.patch_size_zyx[0] > 1 and p.network.norm == "group"),
        (["input_slices=5"], lambda p: p.patch_size_zyx[0] == 1 and p.sliding_window.tile_zyx[0] == 1),
        (["patch_size_zyx=8,64,64"], lambda p: p.network.kind == "rsunet" and p.sliding_window.tile_zyx[0] > 1),
        (["patch_size_zyx=1,32,32"], lambda p: all(kernel[0] == 1 for kernel in p.network.kernels_zyx)),
        (["loss.kind=tversky"], lambda p: p.loss.tversky_weight == 1 and p.loss.dice_weight == p.loss.bce_weight == 0),
        (["loss.kind=dice_topk"], lambda p: p.loss.dice_weight == p.loss.topk_weight == 1 and p.loss.topk_share == 0.1),
        (["loss.kind=focal_tversky"], lambda p: p.loss.tversky_weight == 1 and p.loss.tversky_exponent == 0.75),
        (
            ["loss.kind=balanced_softmax"],
            lambda p: p.loss.activation == "softmax" and set(p.loss.priors) == set(p.class_names),
        ),
        (
            ["loss.balance_tau=1", "loss.priors.pm=0.3"],
            lambda p: p.loss.priors["pm"] == 0.3 and len(p.loss.priors) == 2,
        ),
        (["loss.kind=seesaw"], lambda p: (p.loss.seesaw_p, p.loss.seesaw_q, p.loss.activation) == (0.8, 2, "softmax")),
        (["augmentation.preset=none"], lambda p: not p.augmentation.flip and p.sliding_window.mirror_axes == ()),
        (["optimizer.num_steps=9"], lambda p: p.budget_s is None),
        (["seed=3"], lambda p: p.seed == 3),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_fields_that_depend_on_a_setting_follow_it(pairs: list[str], follows: Callable[[Plan], bool]) -> None:
    plan = make_plan("a", facts(), machine(), parse_settings(pairs))
    assert follows(plan)


@cheap
@pytest.mark.parametrize(
    ("voxel", "turns"),
    [
        ((40.0, 8.0, 4.0), (False, False, False)),
        ((2.62, 2.0, 2.0), (True, False, True)),
        ((8.0, 8.2, 8.0), (True, True, True)),
        ((4.0, 4.0, 4.4), (False, False, False)),
    ],
)
def test_axes_are_swapped_only_where_their_voxels_are_alike(voxel: NmZYX, turns: tuple[bool, bool, bool]) -> None:
    """A swap of axes whose voxels differ shows tissue stretched: 2:1 for voxels of 8 x 4 nm."""
    found = facts((96, 512, 512), voxel)
    plan = make_plan("a", found, machine(gpu()), {"patch_size_zyx": (32, 64, 64), "voxel_size_nm": voxel})
    augmentation = plan.augmentation
    assert (augmentation.right_angles, augmentation.transpose_z, plan.sliding_window.transpose_yx) == (
        turns[0],
        turns[1] and augmentation.preset == "fib-sem",
        turns[2],
    )
    fields = ("augmentation.right_angles", "augmentation.transpose_z", "sliding_window.transpose_yx")
    for field, allowed in zip(fields, turns, strict=True):
        settings = {"patch_size_zyx": (32, 64, 64), "voxel_size_nm": voxel, field: True}
        if allowed:
            assert value_of(make_plan("a", found, machine(gpu()), settings), field)
        else:
            with pytest.raises(PlanError, match=rf"{re.escape(field)}: swaps .*: use false"):
                make_plan("a", found, machine(gpu()), settings)


@cheap
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            ["patch_size_zyx=1,100,100", "network.strides_zyx=[[1,2,2],[1,2,2],[1,2,2]]"],
            r"patch_size_zyx: 100 .*use 96",
        ),
        (["patch_size_zyx=1,7,7"], r"patch_size_zyx: .*cannot be halved"),
        (["input_slices=4"], r"input_slices: 4: use an odd number"),
        (["input_slices=5", "patch_size_zyx=8,64,64"], r"input_slices: 5 with .*2\.5D patches have z = 1"),
        (["patch_size_zyx=1,32,32", "network.features=4,4,4,4,4,4,4"], r"network\.features: 7 .*give \d widths"),
        (["network.features=4"], r"network\.features: .*at least two levels"),
        (["network.features=4,0"], r"network\.features: .*positive"),
        (["network.kernels_zyx=[[1,2,2],[1,2,2]]", "network.features=4,8"], r"network\.kernels_zyx: .*odd"),
        (["network.strides_zyx=[[1,3,3]]", "network.features=4,8"], r"network\.strides_zyx: .*1 or 2"),
        (["precision=fp16"], r"precision: fp16 on the CPU: use bf16 or fp32"),
        (["batch_size=0"], r"batch_size: 0 .*use at least 1"),
        (["optimizer.learning_rate=0"], r"optimizer\.learning_rate: 0"),
        (["sliding_window.tile_zyx=1,100,101"], r"sliding_window\.tile_zyx: 10[01] along .*use 96"),
        (["class_weights.mitochondria=2"], r"class_weights\.mitochondria: .*'mito'"),
        (["decode.thresholds.pmm=0.4"], r"decode\.thresholds\.pmm: .*'pm'"),
        (['split.train=[{"crop": "v0/crop7"}]'], r"split\.train: .*v0/crop7.*did you mean 'v0/crop"),
        (["budget_s=-5"], r"budget_s"),
        (["optimizer.num_steps=0"], r"optimizer\.num_steps"),
        (["device=cuda"], r"device: cuda, and bench has no GPU: use cpu, or --hardware"),
        (["augmentation.scale_range=1.5,2"], r"augmentation\.scale_range: 1\.5, 2\.0"),
    ],
    ids=lambda v: ",".join(v)[:60] if isinstance(v, list) else "",
)
def test_impossible_combinations_are_refused_with_one_line_and_the_fix(pairs: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        make_plan("a", facts(), machine(), parse_settings(pairs))
    assert "\n" not in str(caught.value)


@cheap
def test_only_annotated_classes_with_voxels_can_be_asked_for() -> None:
    chosen = make_plan("a", facts(), machine(), {"classes.names": ["pm"]})
    assert chosen.class_names == ("pm",)
    assert set(chosen.class_weights) == set(chosen.decode.thresholds) == {"pm"}
    with pytest.raises(PlanError, match=r"mitos.*did you mean 'mito'"):
        make_plan("a", facts(), machine(), {"classes.names": ["mitos"]})


def test_a_cpu_takes_smaller_batches_rather_than_few_steps() -> None:
    def batch(budget_s: float) -> tuple[int, int]:
        plan = make_plan("a", facts(), machine(), {"budget_s": budget_s, "patch_size_zyx": (1, 128, 128)})
        return plan.batch_size, plan.accumulate_batches

    long, short = batch(1e5), batch(1.0)
    assert (long, short) == ((8, 1), (4, 1))
    slow = msgspec.structs.replace(machine(), step_gflops=None)
    unknown = make_plan("a", facts(), slow, {"budget_s": 1.0, "patch_size_zyx": (1, 128, 128)})
    assert unknown.batch_size == 8


# ---- golden -------------------------------------------------------------------------------------------------

GOLDEN_PLANS: dict[str, tuple[dict[str, Any], Hardware]] = {
    "vnc-two-cores": ({}, machine(bf16=True, ram_gib=15.6)),
    "vnc-v100": (
        {"patch_size_zyx": (8, 64, 64), "network.features": (8, 16, 24)},
        machine(gpu("Tesla V100", 16, bf16=False), threads=12, ram_gib=64),
    ),
}


@pytest.mark.parametrize("name", GOLDEN_PLANS)
def test_the_plan_for_a_frozen_fingerprint_and_machine_is_the_golden_one(name: str) -> None:
    """After a wanted change run with AUTOSEG_WRITE_GOLDEN=1 and show the difference (`autoseg plan --diff`)."""
    changes, hardware = GOLDEN_PLANS[name]
    found = load_as(GOLDEN / "fingerprint-vnc.json", Fingerprint)
    plan = make_plan(name, found, hardware, changes | {"budget_s": 600.0})
    path = GOLDEN / f"plan-{name}.json"
    if os.environ.get("AUTOSEG_WRITE_GOLDEN"):
        save(plan, path)
    golden = load_as(path, Plan)
    traced = ("predicted_memory_bytes", "predicted_ram_bytes", "predicted_step_s")
    for field in traced:
        assert getattr(plan, field) == pytest.approx(getattr(golden, field), rel=0.02), field
    quiet: dict[str, Any] = dict.fromkeys(traced, 0) | {"reasons": ()}
    assert msgspec.to_builtins(msgspec.structs.replace(plan, **quiet)) == msgspec.to_builtins(
        msgspec.structs.replace(golden, **quiet)
    )
    assert [(r.field, r.source) for r in plan.reasons] == [(r.field, r.source) for r in golden.reasons]


@pytest.mark.parametrize("path", sorted((GOLDEN.parents[1] / "plans").glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_plan_can_be_used_as_it_is(path: Path) -> None:
    plan = load_as(path, Plan)
    check_plan(plan, path.name)
    assert path.stem == plan.name
    assert path.read_bytes() == encode(plan), "written by the planner of this version"
