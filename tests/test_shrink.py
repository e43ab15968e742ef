"""A plan on a smaller machine: what must shrink shrinks, is said and written down, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from strategies import make_dataset
from test_planner import busy, facts, gpu, machine, tiny_facts_plan, tiny_plan

from autoseg.errors import PlanError
from autoseg.model.memory import trace_step
from autoseg.plan import make_plan, shipped, shrink
from autoseg.predict import open_run
from autoseg.recipes.training import train_on
from autoseg.schema import Hardware, Plan, load_as, read_json_lines
from autoseg.train import loop

BIG = machine(gpu("A100", 40), threads=16, ram_gib=128, shm_gib=64)
PLAN = make_plan("big", facts((64, 400, 400), (8.0, 8.0, 8.0)), BIG, {"batch_size": 4, "patch_size_zyx": (64, 64, 64)})
SMALL: dict[str, Any] = {"patch_size_zyx": (1, 64, 64), "batch_size": 4}
GIB = 2**30


def named(name: str) -> Hardware:
    return shipped.read_hardware(name)


def test_on_its_own_machine_and_on_a_larger_one_nothing_changes() -> None:
    assert shrink(PLAN, BIG, "auto") == ({}, [])
    assert shrink(PLAN, machine(gpu("H100", 80), threads=64, ram_gib=512, shm_gib=64), "auto") == ({}, [])
    eager = msgspec.structs.replace(PLAN, num_workers=15)
    assert shrink(eager, BIG, "auto") == ({}, []), "workers that the user set on this machine are the user's"


def test_a_smaller_gpu_gets_smaller_and_more_micro_batches() -> None:
    cost = trace_step(PLAN.network, PLAN.input_slices, 2, PLAN.patch_size_zyx, PLAN.precision, PLAN.loss)
    fits_two = cost.memory_bytes(2, "cuda") / 0.85 / GIB + 0.01
    card = machine(gpu("small", fits_two), threads=16, ram_gib=128, shm_gib=64)
    changes, because = shrink(PLAN, card, "auto")
    assert changes == {"batch_size": 2, "accumulate_batches": 2 * PLAN.accumulate_batches}
    assert because[0].startswith("batch_size 4 -> 2: 4 patches need ")
    assert because[1].startswith("accumulate_batches ")
    tiny = machine(gpu("tiny", 0.5), threads=16, ram_gib=128, shm_gib=64)
    with pytest.raises(PlanError, match=r"one patch of .* needs .* plan for this machine: autoseg plan DATA"):
        shrink(PLAN, tiny, "auto")


def test_number_formats_follow_the_device() -> None:
    assert PLAN.precision == "bf16"
    assert shrink(PLAN, named("shenron"), "auto")[0]["precision"] == "fp16"
    changes, because = shrink(PLAN, named("laptop"), "auto")
    assert (changes["device"], changes["precision"]) == ("cpu", "fp32")
    assert "device cuda -> cpu: laptop has no GPU" in because
    native = machine(threads=16, bf16=True, ram_gib=128, shm_gib=64)
    assert "precision" not in shrink(PLAN, native, "cpu")[0]


def of_four(**changes: Any) -> Plan:
    return msgspec.structs.replace(PLAN, num_processes=4, batch_size=2, accumulate_batches=1, **changes)


@pytest.mark.parametrize(
    ("num_gpus", "device", "expected"),
    [
        (4, "auto", {}),
        (6, "auto", {}),
        (3, "auto", {"num_processes": 2, "accumulate_batches": 2}),
        (2, "auto", {"num_processes": 2, "accumulate_batches": 2}),
        (1, "auto", {"num_processes": 1, "accumulate_batches": 4}),
        (4, "cuda:1", {"num_processes": 1, "accumulate_batches": 4}),
    ],
)
def test_fewer_processes_do_more_micro_batches(num_gpus: int, device: str, expected: dict[str, Any]) -> None:
    here = machine(*[gpu("A100", 40)] * num_gpus, threads=64, ram_gib=512, shm_gib=256)
    plan = of_four()
    changes, because = shrink(plan, here, device)
    assert changes == expected
    assert msgspec.structs.replace(plan, **changes).patches_per_step == 8
    if expected:
        why = f"bench has {num_gpus} GPU" if device == "auto" else "--device cuda:1 is one"
        assert because[0].startswith(f"num_processes 4 -> {expected['num_processes']}: {why}")
        assert because[1].endswith("so that a step still has 8 patches")


def test_on_a_cpu_one_process_does_it_all() -> None:
    changes, _ = shrink(of_four(), named("laptop"), "auto")
    assert (changes["num_processes"], changes["num_threads"]) == (1, 8)
    assert msgspec.structs.replace(of_four(), **changes).patches_per_step == 8
    chosen = make_plan("own", facts(), machine(threads=2), {"num_processes": 2})
    assert shrink(chosen, machine(threads=2), "auto") == ({}, []), "for a CPU the user chose them"


def test_as_many_as_torchrun_started_share_a_step() -> None:
    here = machine(*[gpu("A100", 40)] * 4, threads=64, ram_gib=512, shm_gib=256)
    changes, because = shrink(of_four(), here, "auto", 8)
    assert changes == {"num_processes": 8, "batch_size": 1}
    assert because[0] == "num_processes 4 -> 8: torchrun started 8"
    with pytest.raises(PlanError, match=r"torchrun: 3 processes cannot share the 8 patches .*start one of 1, 2, 4, 8"):
        shrink(of_four(), here, "auto", 3)


def test_batch_norm_on_a_cpu_is_for_one_process_that_torchrun_starts() -> None:
    plan = tiny_facts_plan()
    assert (plan.device, plan.network.norm) == ("cpu", "batch")
    with pytest.raises(
        PlanError, match=r"torchrun: 2 processes on the CPU .*batch norm.*start one, or plan with --set"
    ):
        shrink(plan, machine(), "auto", 2)
    assert "num_processes" not in shrink(plan, machine(), "auto", 1)[0]
    changes, _ = shrink(msgspec.structs.replace(plan, device="cuda"), machine(gpu(), gpu()), "cuda", 2)
    assert changes["num_processes"] == 2


def test_only_gpus_that_are_alike_and_free_enough_train_a_plan_together() -> None:
    two = [gpu("A100", 40)] * 2
    planned = make_plan("two", facts(), machine(*two, threads=16, ram_gib=128, shm_gib=64), SMALL)
    assert (planned.num_processes, planned.precision) == (2, "bf16")
    expected = {"num_processes": 1, "accumulate_batches": 2 * planned.accumulate_batches}
    for other, why in ((gpu("V100", 40, bf16=False), "from V100 on are not used"), (busy(2, 40), "GPU 1 has 37.4 of")):
        here = machine(two[0], other, threads=16, ram_gib=128, shm_gib=64)
        changes, because = shrink(planned, here, "auto")
        assert changes == expected
        assert why in because[0]
    mixed = machine(two[0], gpu("V100", 40, bf16=False), threads=16, ram_gib=128, shm_gib=64)
    assert shrink(planned, mixed, "auto", 2)[0] == {"precision": "fp16"}, "torchrun started two"
    told = make_plan("own", facts(), mixed, SMALL | {"num_processes": 2})
    assert shrink(told, mixed, "auto") == ({}, []), "the user wanted both"


def test_a_numbered_gpu_is_the_one_that_counts() -> None:
    cost = trace_step(PLAN.network, PLAN.input_slices, 2, PLAN.patch_size_zyx, PLAN.precision, PLAN.loss)
    small = gpu("small", cost.memory_bytes(2, "cuda") / 0.85 / GIB + 0.01, bf16=False)
    here = machine(gpu("A100", 40), small, threads=16, ram_gib=128, shm_gib=64)
    assert shrink(PLAN, here, "auto") == shrink(PLAN, here, "cuda:0") == ({}, [])
    changes, _ = shrink(PLAN, here, "cuda:1")
    assert (changes["precision"], changes["batch_size"]) == ("fp16", 2)
    for absent in ("cuda:2", "cuda:x"):
        assert shrink(PLAN, here, absent) == ({}, []), "training refuses it"


def test_workers_shrink_to_what_all_processes_leave_room_for() -> None:
    small = machine(*[gpu("A100", 40)] * 4, threads=12, ram_gib=512, shm_gib=256)
    changes, _ = shrink(of_four(num_threads=8, num_workers=8), small, "auto")
    assert changes == {"num_threads": 2, "num_workers": 1}


def test_what_the_user_chose_for_a_machine_stays_there() -> None:
    slow = machine(threads=2)
    emulated = make_plan("own", facts(), slow, {"precision": "bf16"})
    assert shrink(emulated, slow, "auto") == ({}, [])


def test_a_cpu_gets_all_its_threads_and_no_workers() -> None:
    changes, _ = shrink(PLAN, named("rocinante"), "cpu")
    assert (changes["num_workers"], changes["num_threads"]) == (0, 32)


def test_threads_and_workers_shrink_to_what_the_machine_has() -> None:
    changes, _ = shrink(PLAN, machine(gpu("A100", 40), threads=3, ram_gib=128, shm_gib=64), "auto")
    assert changes == {"num_threads": 2, "num_workers": 1}
    no_shm, _ = shrink(PLAN, machine(gpu("A100", 40), threads=16, ram_gib=128, shm_gib=0), "auto")
    assert no_shm == {"num_workers": 0}


def test_a_plan_of_a_large_gpu_trains_on_this_machine_and_its_run_remembers_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path / "data", crops=2)
    changes: dict[str, Any] = {"batch_size": 2, "optimizer.num_steps": 4}
    plan = tiny_plan(data, tmp_path / "cache", changes)
    plan = msgspec.structs.replace(plan, device="cuda", precision="fp16", num_threads=64, num_workers=0, hardware=BIG)
    used: list[Plan] = []
    real = loop.train

    def watched(planned: Plan, *rest: Any, **named: Any) -> Any:
        used.append(named["used"])
        return real(planned, *rest, **named)

    monkeypatch.setattr("autoseg.recipes.training.train", watched)
    said: list[str] = []
    run = tmp_path / "run"
    outcome = train_on(plan, data, run, cache=tmp_path / "cache", warn=said.append)
    assert outcome.step == 4
    assert load_as(run / "plan.json", Plan) == plan, "the plan of a run never changes"
    (event,) = [line for line in read_json_lines(run / "adaptations.jsonl") if line["event"] == "machine"]
    assert event["changes"]["device"] == "cpu"
    assert event["changes"]["precision"] in ("fp32", "bf16")
    assert any("device cuda -> cpu" in line for line in said)
    trained = open_run(run)
    assert trained.plan.precision == event["changes"]["precision"], "a run predicts as it was trained"
    train_on(plan, data, run, cache=tmp_path / "cache", warn=said.append)
    assert used[0] == used[1], "what was adapted is adapted again on resume"
    assert len([line for line in read_json_lines(run / "adaptations.jsonl") if line["event"] == "machine"]) == 1
