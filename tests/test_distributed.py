"""Several processes train as one would: the same patches, loss and weights, one stop, one error, one writer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from strategies import child_environment, make_dataset, valid_plan
from test_losses import KINDS, loss_of
from test_planner import tiny_plan
from test_training import StopAt, assert_same_bits, everything, logged
from torch import Tensor

import autoseg.train.team
from autoseg.data.classes import UNKNOWN
from autoseg.data.dataset import open_dataset
from autoseg.errors import DataError, LostProcess, PlanError
from autoseg.model import checkpoint, windows
from autoseg.model.groups import Groups
from autoseg.model.losses import CodeTable, CodeTargets, outputs_of, supervised_loss
from autoseg.model.sums import Sums
from autoseg.schema import Observer, Plan, StepResult, check_plan, read_json_lines, save
from autoseg.train import batches, launch, train, validation
from autoseg.train.patches import own_patches
from autoseg.train.step import Learner
from autoseg.train.team import ALONE, Team
from autoseg.train.validation import Validator

GROUP: dict[str, Any] = {
    "network.norm": "group",
    "optimizer.num_steps": 20,
    "augmentation.preset": "sstem",
    "batch_size": 1,
    "accumulate_batches": 2,
    "sampling.crops_per_step": 4,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (DATA, cache); crop 2 does not annotate c, so that in a step only one process may know it."""
    folder = tmp_path_factory.mktemp("distributed")
    return make_dataset(folder / "data", shape=(4, 64, 64), classes=("a", "b", "c")), folder / "cache"


def plan_for(place: tuple[Path, Path], processes: int, **changes: Any) -> Plan:
    """Return a plan whose steps have the same four patches whatever the number of processes."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    share = {"batch_size": 2 // processes, "num_processes": processes}
    return tiny_plan(*place, GROUP | share | named)


@pytest.fixture(scope="module")
def straight(place: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """Return (plan, run) of two processes that nothing interrupted."""
    plan, run = plan_for(place, 2), tmp_path_factory.mktemp("two") / "run"
    outcome = train(plan, place[0], run, cache=place[1])
    assert (outcome.step, outcome.stopped_by) == (20, None)
    return plan, run


# ---- the same steps -----------------------------------------------------------------------------------------


def test_two_processes_take_the_steps_of_one(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, run = straight
    alone = plan_for(place, 1)
    known = [
        [
            (batch.states_CK[batch.codes_BZYX.long()] != UNKNOWN).any(dim=(1, 2, 3))
            for batch in batches(p, place[0], stop_step=20, cache=place[1], rank=r)
        ]
        for p, r in ((plan, 0), (plan, 1))
    ]
    assert any((a != b).any() for a, b in zip(*known, strict=True)), "a class that only one process knows"
    train(alone, place[0], tmp_path / "alone", cache=place[1])
    two, one = logged(run), logged(tmp_path / "alone")
    for name in ("loss", "gradient_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-5), name
    assert [line.get("mean_dice") for line in two] == pytest.approx([line.get("mean_dice") for line in one], abs=1e-3)
    a, b = everything(run), everything(tmp_path / "alone")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_two_processes_have_seen_the_voxels_of_both(place: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        plan = plan_for(place, processes, loss__kind="seesaw", optimizer__num_steps=4)
        plan = msgspec.structs.replace(plan, disjoint=(("a", "b", "c"),))
        train(plan, place[0], tmp_path / str(processes), cache=place[1])
        found.append((everything(tmp_path / str(processes))["loss.counts"], logged(tmp_path / str(processes))))
    assert len(found[0][0]) == 4, "three classes that exclude each other, and a background"
    assert torch.equal(found[0][0], found[1][0])
    assert [line["loss"] for line in found[1][1]] == pytest.approx([line["loss"] for line in found[0][1]], rel=1e-5)


def test_weights_are_sent_only_to_who_has_others(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, genuine = list[Any](), Team.tell

    def tell(team: Team, value: Any) -> Any:
        told = genuine(team, value)
        sent.append(told)
        return told

    monkeypatch.setattr(Team, "tell", tell)
    plan = plan_for(place, 2, optimizer__num_steps=4)
    train(plan, place[0], tmp_path / "run", cache=place[1], observer=StopAt(2))
    assert not any(isinstance(value, Tensor) for value in sent), "a fresh run: all of them know the seed"
    sent.clear()
    train(plan, place[0], tmp_path / "run", cache=place[1])
    assert sum(isinstance(value, Tensor) for value in sent) == len(everything(tmp_path / "run"))


def test_a_resumed_run_of_two_processes_equals_the_straight_one_bit_for_bit(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, run = straight
    resumed = tmp_path / "run"
    outcome = train(plan, place[0], resumed, cache=place[1], observer=StopAt(7))
    assert (outcome.step, outcome.stopped_by) == (7, "SIGTERM")
    assert not multiprocessing.active_children(), "no process is left behind"
    assert train(plan, place[0], resumed, cache=place[1]).step == 20
    assert logged(resumed) == logged(run)
    for name in ("last", "best"):
        assert_same_bits(everything(resumed, name), everything(run, name))


def test_a_stop_in_a_validation_of_two_processes_is_heard_at_once_and_costs_nothing(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = straight
    genuine, read = validation.read_input, list[Any]()

    def read_input(*args: Any) -> Any:
        if not read:
            os.kill(os.getpid(), signal.SIGINT)
        read.append(args)
        return genuine(*args)

    monkeypatch.setattr(validation, "read_input", read_input)
    outcome = train(plan, place[0], tmp_path / "run", cache=place[1])
    assert (outcome.step, outcome.stopped_by, len(read)) == (9, "SIGINT", 1), "step 10 is validated"
    train(plan, place[0], tmp_path / "run", cache=place[1])
    assert logged(tmp_path / "run") == logged(run)
    assert_same_bits(everything(tmp_path / "run"), everything(run))


def test_processes_share_the_blocks_of_validation(
    straight: tuple[Plan, Path], place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cpu = straight[0], torch.device("cpu")
    network = Learner(plan, 8, cpu).averaged_network()

    def counted(rank: int, size: int) -> Any:
        team: Any = SimpleNamespace(rank=rank, size=size, listen=lambda a: a, agree=lambda s: s, add_up=lambda c: c)
        validator = Validator(plan, open_dataset(place[0]), place[1], 2**24, team)
        predictor = validator._predictor(network, cpu)
        return validator._counts(predictor, lambda: None), validator._largest_share(predictor)

    whole, all_of_it = counted(0, 1)
    monkeypatch.setattr(windows, "BLOCK_BYTES", 2**15)
    (first, share), (second, _) = counted(0, 2), counted(1, 2)
    assert first.any()
    assert second.any()
    assert np.array_equal(first + second, whole)
    assert all_of_it == 1
    assert 0.5 <= share < 1


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("places", [1, 4, 8, 1000])
def test_micro_batch_by_micro_batch_processes_share_the_patches_of_one(processes: int, places: int) -> None:
    plan = valid_plan(batch_size=2, accumulate_batches=3, num_processes=processes)
    plan = msgspec.structs.replace(plan, sampling=msgspec.structs.replace(plan.sampling, crops_per_step=places))
    shares = [own_patches(plan, rank) for rank in range(processes)]
    for micro in range(3):
        together = sorted(i for share in shares for i in share[2 * micro : 2 * micro + 2])
        assert together == list(range(2 * processes * micro, 2 * processes * (micro + 1)))
    assert own_patches(msgspec.structs.replace(plan, num_processes=1), 0) == list(range(6))


def test_each_process_builds_the_patches_that_one_would_have_drawn(place: tuple[Path, Path]) -> None:
    two, one = plan_for(place, 2), plan_for(place, 1)
    whole = next(batches(one, place[0], start_step=5, cache=place[1]))
    shares = [own_patches(two, rank) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == [0, 1, 2, 3]
    for rank, own in enumerate(shares):
        part = next(batches(two, place[0], start_step=5, cache=place[1], rank=rank))
        assert torch.equal(part.image_BCZYX, whole.image_BCZYX[own])
        assert torch.equal(part.codes_BZYX, whole.codes_BZYX[own])


# ---- the same gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_partial_gradients_of_pooled_sums_add_up_to_the_gradient_of_the_union(kind: str) -> None:
    """In fp64, with a coarser level, and with a class that only the second half knows."""
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn((4, 3, 2, n, n), generator=generator, dtype=torch.float64) for n in (8, 4)]
    codes = torch.randint(0, 3, (4, 2, 8, 8), generator=generator)
    codes[2:] += 3
    states = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 2, 2], [0, 1, 0], [1, 0, 1], [2, 0, 1]], dtype=torch.uint8)
    table, weights, loss = CodeTable(states), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), loss_of(kind)
    counts = []

    def gradient(part: slice, pool: Any) -> tuple[Tensor, list[Tensor]]:
        own = [out[part].clone().requires_grad_() for out in logits]
        outputs = outputs_of(loss, Groups(((0, 1), (2,))), [0.3, 0.1, 0.2])
        if outputs.counts is not None:
            outputs.counts.copy_(torch.tensor([50.0, 2.0, 7.0, 90.0, 100.0]))
            counts.append(outputs.counts)
        value = supervised_loss(own, CodeTargets(codes[part], table), loss, weights, pool, outputs)
        value.backward()
        return value.detach(), [out.grad for out in own if out.grad is not None]

    seen: list[list[Sums]] = [[], []]
    for half, part in enumerate((slice(0, 2), slice(2, 4))):
        gradient(part, lambda sums, half=half: seen[half].append(Sums(*(s.detach() for s in sums))) or sums)

    def pooled(other: int) -> Any:
        rest = iter(seen[other])
        return lambda sums: Sums(*(a + b for a, b in zip(sums, next(rest), strict=True)))

    whole, expected = gradient(slice(0, 4), ALONE.pool)
    parts = [gradient(part, pooled(1 - half)) for half, part in enumerate((slice(0, 2), slice(2, 4)))]
    assert torch.equal(parts[0][0], parts[1][0])
    assert all(torch.equal(found, counts[-1]) for found in counts[-3:]), "each has seen the voxels of both"
    torch.testing.assert_close(parts[0][0], whole, rtol=1e-12, atol=0)
    for level, gradients in enumerate(expected):
        found = torch.cat([part[1][level] for part in parts])
        torch.testing.assert_close(found, gradients, rtol=1e-10, atol=1e-16)


def test_one_process_never_initialises_torch_distributed(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("initialised")

    for name in ("init_process_group", "all_reduce", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, never)
    plan = tiny_plan(*place, {"optimizer.num_steps": None, "budget_s": 1.0})
    assert train(plan, place[0], tmp_path / "run", cache=place[1], observer=StopAt(2)).step == 2


# ---- one stop, one error, one writer ------------------------------------------------------------------------


class At(Observer):
    """Calls a function after a step."""

    def __init__(self, step: int, call: Any) -> None:
        self._step, self._call = step, call

    def stepped(self, step: int, result: StepResult) -> None:
        """Call it there."""
        if step == self._step:
            self._call()


def other() -> multiprocessing.process.BaseProcess:
    """Return the process that was started."""
    (process,) = multiprocessing.active_children()
    return process


def test_a_budget_is_fitted_by_the_first_and_a_signal_to_the_second_stops_both(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = plan_for(place, 2, optimizer__num_steps=None, budget_s=20.0)

    def stop() -> None:
        os.kill(other().pid or 0, signal.SIGTERM)

    outcome = train(plan, place[0], tmp_path / "run", cache=place[1], observer=At(3, stop))
    assert outcome.stopped_by == "SIGTERM"
    assert 3 <= outcome.step < outcome.num_steps
    assert [line["event"] for line in read_json_lines(tmp_path / "run/adaptations.jsonl")] == ["length"]
    assert logged(tmp_path / "run")[-1]["step"] == outcome.step


def test_a_process_that_dies_ends_the_training_with_one_line_of_its_number_and_reason(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    save(plan_for(place, 2, optimizer__num_steps=10**6), tmp_path / "plan.json")
    words = ["train", "--plan", "plan.json", "--data", place[0], "--run", "run", "--cache", place[1], "--quiet"]
    code = "import multiprocessing, os, signal, sys, threading, time\n"
    code += "from autoseg.cli import main\n"
    code += "def kill():\n"
    code += "    while not os.path.exists('run/log.jsonl'): time.sleep(0.1)\n"
    code += "    [process.kill() for process in multiprocessing.active_children()]\n"
    code += "if __name__ == '__main__':\n"
    code += "    threading.Thread(target=kill).start()\n"
    code += "    sys.exit(main(sys.argv[1:]))\n"
    (tmp_path / "main.py").write_text(code)
    command = [sys.executable, "main.py", *map(str, words)]
    environment = child_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("rank 1: was killed by SIGKILL")
    assert len(done.stderr.splitlines()) == 1


WAITING = """
import sys, time
from pathlib import Path
import torch
from autoseg.errors import DataError
from autoseg.train import launch

def work(team):
    raise DataError("crop7", "is damaged", "repair it")

if __name__ == "__main__":
    launch.GRACE_S = 0.2
    with launch.assembled(2, torch.device("cpu"), work) as team:
        if sys.argv[1:]:
            with team.unbroken:
                time.sleep(4)
                Path("whole").touch()
        time.sleep(60)
"""


@pytest.mark.parametrize("saving", [False, True])
def test_a_process_that_waits_for_a_dead_one_without_gloo_is_ended_but_not_while_it_saves(
    tmp_path: Path, saving: bool
) -> None:
    (tmp_path / "main.py").write_text(WAITING)
    command = [sys.executable, "main.py", *(["saving"] if saving else [])]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=child_environment(), capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (2, "crop7: is damaged: repair it\n")
    assert (tmp_path / "whole").exists() == saving


def test_a_checkpoint_is_written_where_nothing_may_end_the_process(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team, genuine, held = Team(), checkpoint.save_checkpoint, list[bool]()

    def watched(*args: Any, **named: Any) -> None:
        held.append(team.unbroken.locked())
        genuine(*args, **named)

    monkeypatch.setattr(launch, "ALONE", team)
    monkeypatch.setattr(checkpoint, "save_checkpoint", watched)
    train(plan_for(place, 1, optimizer__num_steps=2), place[0], tmp_path / "run", cache=place[1])
    assert held
    assert all(held)
    assert not team.unbroken.locked()


def refuse(_: Team) -> None:
    raise DataError("crop7", "is damaged", "repair it")


def stumble(_: Team) -> None:
    raise ZeroDivisionError("by nought")


def overflow(team: Team) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    torch.distributed.all_reduce = raising
    team.tell(None)
    team.add_up(np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (refuse, DataError, "^crop7: is damaged: repair it$"),
        (stumble, RuntimeError, "^rank 1: ZeroDivisionError: by nought"),
        (overflow, RuntimeError, "^rank 1: RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_an_error_of_another_process_is_raised_by_the_first(work: Any, kind: type[Exception], message: str) -> None:
    def count() -> None:
        with launch.assembled(2, torch.device("cpu"), work) as team:
            team.tell("something")
            team.add_up(np.zeros(1, np.int64))

    with pytest.raises(kind, match=message):
        count()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (torch.distributed.DistNetworkError("the store is gone"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_only_what_torch_distributed_says_of_others_is_a_lost_process(error: Exception, lost: bool) -> None:
    with pytest.raises(LostProcess if lost else RuntimeError) as found, autoseg.train.team._together():
        raise error
    assert (found.value is error) != lost


def test_who_only_missed_another_says_so_where_nobody_knows_more() -> None:
    here, there = multiprocessing.Pipe(duplex=False)
    said = LostProcess("rank 2", "another of its processes is gone", "see what that one says")
    there.send(said)
    found, by_itself = launch._reason(2, launch.LOST, here)
    assert (str(found), by_itself) == (str(said), False)
    there.close()
    assert launch._reason(2, launch.LOST, here) == (None, False)
    assert launch._reason(2, 1, here)[1]


def exchange(team: Team) -> None:
    """Do what the first process does in the test below."""
    assert team.tell(None) == {"a": 1}
    assert team.add_up(np.array([1, 2])).tolist() == [4, 6]
    assert team.agree("SIGTERM") == "SIGTERM"
    assert team.agree(None) is None
    team.listen(lambda: "SIGINT")()
    team.tell(None)
    network = torch.nn.Linear(3, 2)
    network.weight.grad, network.bias.grad = torch.ones(3, 2).T, torch.full((2,), 2.0)
    autoseg.train.team.BUCKET_BYTES = 1
    team.add_up_gradients(network)


def test_processes_tell_count_agree_listen_and_add_up_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    with launch.assembled(2, torch.device("cpu"), exchange) as team:
        assert (team.rank, team.size, team.first) == (0, 2, True)
        assert team.tell({"a": 1}) == {"a": 1}
        assert team.add_up(np.array([3, 4])).tolist() == [4, 6]
        assert team.agree(None) == "SIGTERM"
        assert team.agree(None) is None
        heard = team.listen(lambda: None)
        while not heard():
            time.sleep(0.01)
        assert heard() == "SIGINT"
        team.tell("listened")
        network = torch.nn.Linear(3, 2)
        network.weight.grad, network.bias.grad = torch.arange(6.0).reshape(2, 3), torch.tensor([5.0, 6.0])
        monkeypatch.setattr("autoseg.train.team.BUCKET_BYTES", 1)
        team.add_up_gradients(network)
        assert network.weight.grad.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert network.bias.grad.tolist() == [7, 8]


# ---- torchrun -----------------------------------------------------------------------------------------------


def test_processes_that_torchrun_started_join_and_share_the_steps_of_the_plan(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = plan_for(place, 1, optimizer__num_steps=4)
    save(plan, tmp_path / "plan.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["train", "--plan", "plan.json", "--data", place[0], "--run", "run", "--cache", place[1], "--json"]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "autoseg.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=child_environment(
                OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            ),
        )
        for rank in range(2)
    ]
    (out, err), (silent, quiet) = (child.communicate(timeout=120) for child in children)
    assert [child.returncode for child in children] == [0, 0], err + quiet
    assert (silent, quiet) == ("", "")
    assert '"step":4' in out
    said = " ".join(err.split())
    assert "num_processes 1 -> 2: torchrun started 2" in said
    assert "batch_size" not in said.split("num_processes 1 -> 2")[0]
    (event,) = [line for line in read_json_lines(tmp_path / "run/adaptations.jsonl") if line["event"] == "machine"]
    assert event["changes"]["num_processes"] == 2
    assert event["changes"].get("batch_size", 2) * event["changes"].get("accumulate_batches", 2) == 2
    assert len(logged(tmp_path / "run")) == 4


def test_another_number_of_processes_than_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(PlanError, match="torchrun started 3 processes, the plan has num_processes 2"),
        launch.assembled(2, torch.device("cpu"), exchange),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launch.assembled(1, torch.device("cpu"), exchange) as team:
        assert team is ALONE


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Team(3, 4, local_rank=1).device(torch.device("cuda")) == torch.device("cuda:1")
    assert Team(2, 4, local_rank=2).device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(
        PlanError, match=r"^rank 2: is process 2 of its machine, which has 2 GPUs: start at most 2 on it"
    ):
        Team(2, 4, local_rank=2).device(torch.device("cuda"))


def test_batch_norm_in_several_processes_on_a_cpu_is_refused(place: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"network\.norm: batch with 2 processes on the CPU.*use group or instance"):
        plan_for(place, 2, network__norm="batch")
    plan = plan_for(place, 2)
    check_plan(msgspec.structs.replace(plan, device="cuda"), "plan")
    alone = plan_for(place, 1, network__norm="batch")
    shared = msgspec.structs.replace(alone, num_processes=2, batch_size=1)
    for used, device in ((shared, "auto"), (msgspec.structs.replace(shared, device="cuda"), "cpu")):
        with pytest.raises(PlanError, match=r"network\.norm: batch with 2 processes on the CPU"):
            train(alone, place[0], tmp_path / "run", used=used, device=device, cache=place[1])
    assert not (tmp_path / "run").exists()


# ---- GPUs ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_two_gpus_take_the_steps_of_one(place: tuple[Path, Path], tmp_path: Path, norm: str) -> None:
    found = []
    for processes in (1, 2):
        plan = plan_for(place, processes, network__norm="group")
        network = msgspec.structs.replace(plan.network, norm=norm)
        plan = msgspec.structs.replace(plan, device="cuda", network=network)
        run = tmp_path / str(processes)
        train(plan, place[0], run, device="cuda", cache=place[1])
        found.append([line["loss"] for line in logged(run)])
    assert found[1] == pytest.approx(found[0], rel=1e-2)
