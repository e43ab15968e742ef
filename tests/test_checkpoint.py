"""Checkpoints: whole or not there, whatever happens while they are written; and never a line of foreign code run."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
from strategies import child_environment
from test_planner import tiny_facts_plan
from torch import Tensor

from autoseg.errors import CheckpointError, PlanError
from autoseg.model import checkpoint
from autoseg.model.networks import build_network
from autoseg.schema import CheckpointHeader

HEADER = CheckpointHeader(
    plan_sha256="0" * 64,
    step=0,
    mean_dice=None,
    best_mean_dice=None,
    best_step=None,
    grad_scale=None,
    grad_scale_growth=0,
    sha256={},
)
# A process that forks a child 20 times, which saves until it is killed, and says what each kill left behind.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from autoseg.model import checkpoint
from autoseg.schema import CheckpointHeader
folder, rng = Path(sys.argv[1]), random.Random(0)
torch.set_num_threads(1)

def save(step):
    header = CheckpointHeader(plan_sha256="0" * 64, step=step, mean_dice=None, best_mean_dice=None, best_step=None,
                              grad_scale=None, grad_scale_growth=0, sha256={})
    tensors = {"a": torch.full((64, 64), float(step)), "b": torch.full((5,), float(step))}
    checkpoint.save_checkpoint(folder, header, tensors, tensors, best=True)

save(1)
step = 1
for _ in range(20):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            save(step)
            os.write(write, b"%d " % step)
    os.close(write)
    time.sleep(rng.uniform(0.0, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = os.read(read, 10**6).split()
    os.close(read)
    found = checkpoint.newest(folder)[1].step
    best = checkpoint.verify(checkpoint.find(folder, "best")).step
    print(json.dumps({"done": int(done[-1]) if done else step, "found": found, "best": best}), flush=True)
    step = found
"""


def save(folder: Path, step: int, *, best: bool = False) -> dict[str, Tensor]:
    """Save a checkpoint whose tensors say its step."""
    tensors = {"a": torch.full((4, 3), float(step)), "b": torch.arange(5.0) + step}
    header = msgspec.structs.replace(HEADER, step=step)
    checkpoint.save_checkpoint(folder, header, tensors, {"state": tensors["a"] * 2}, best=best)
    return tensors


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint after checking every byte of it."""
    found = checkpoint.newest(folder)
    assert found is not None
    assert found[1].step == step_of(found[0])
    return found[1].step


def step_of(path: Path) -> int:
    """Return the step of a checkpoint after checking every byte of it."""
    header = checkpoint.verify(path)
    for name in (checkpoint.WEIGHTS, checkpoint.STATE):
        for tensor in checkpoint.load_tensors(path / name).values():
            assert tensor.flatten()[0] in (header.step, 2 * header.step)
    return header.step


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = save(tmp_path, 3)
    found = checkpoint.load_tensors(tmp_path / "last" / checkpoint.WEIGHTS)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert checkpoint.verify(tmp_path / "last").step == 3
    assert torch.equal(checkpoint.load_tensors(tmp_path / "last" / checkpoint.STATE)["state"], torch.full((4, 3), 6.0))


def test_last_previous_and_best_are_what_their_names_say(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, best=step in (2, 3))
    assert [step_of(tmp_path / name) for name in ("last", "previous", "best")] == [5, 4, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "previous"], "nothing else is left"
    assert checkpoint.newest(tmp_path / "none") is None


def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, best=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, best=True)
    assert newest_step(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last"]


@pytest.mark.parametrize("moment", ["previous", "last", "best"])
def test_a_kill_between_two_renames_leaves_a_whole_checkpoint(tmp_path: Path, moment: str) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, best=step < 3)
    (tmp_path / moment).rename(tmp_path / f".old-{moment}")
    assert newest_step(tmp_path) >= 2
    assert step_of(checkpoint.find(tmp_path, "best")) == 2
    save(tmp_path, 4)
    assert newest_step(tmp_path) == 4
    assert step_of(tmp_path / "best") == 2, "a later save puts it back in its place"


def test_sigkill_at_any_moment_of_saving_leaves_a_readable_newest_and_best_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    environment = child_environment(OMP_NUM_THREADS="1")
    killer = [sys.executable, "-c", KILLER, str(folder)]
    done = subprocess.run(killer, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 20
    for kill in kills:
        assert kill["done"] <= kill["found"] <= kill["done"] + 1, "a checkpoint that stood is gone"
        assert kill["done"] <= kill["best"] <= kill["done"] + 1, "the best checkpoint is gone"
    assert kills[-1]["found"] > 5, "the children were saving all the while"
    save(folder, 10**6, best=True)
    assert newest_step(folder) == 10**6
    assert sorted(p.name for p in folder.iterdir()) == ["best", "last", "previous"], "leftovers are cleared away"


def test_best_is_the_last_resort_and_damage_everywhere_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, best=step == 1)
    for name, found in (("last", 2), ("previous", 1)):
        (tmp_path / name / checkpoint.STATE).write_bytes(b"torn")
        assert newest_step(tmp_path) == found
    (tmp_path / "best" / checkpoint.HEADER).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(last, previous, best\).*remove this folder"):
        checkpoint.newest(tmp_path)


def test_a_first_save_that_was_killed_leaves_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / ".writing-77").mkdir()
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "missing"])
def test_a_damaged_file_is_refused_and_the_checkpoint_before_is_taken(tmp_path: Path, damage: str, name: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "last" / name
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-3] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": content[:-9], "bit": content, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=f"{name}: is missing or damaged"):
        checkpoint.verify(tmp_path / "last")
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("header", [b"", b"{", b'{"kind": "plan"}', b'{"kind": "checkpoint", "step": "one"}'])
def test_a_damaged_header_is_refused_and_the_checkpoint_before_is_taken(tmp_path: Path, header: bytes) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "last" / checkpoint.HEADER).write_bytes(header)
    with pytest.raises(PlanError, match=r"header\.json"):
        checkpoint.verify(tmp_path / "last")
    assert newest_step(tmp_path) == 1


class Bomb:
    """Unpickling it makes a file: proof that code was run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Return what unpickling would call."""
        return Path.touch, (str(self.mark),)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_is_refused_and_nothing_in_it_is_run(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / "weights.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"a": Bomb(mark)}, path)
    with pytest.raises(CheckpointError, match="is not readable"):
        checkpoint.load_tensors(path)
    assert not mark.exists()


def test_weights_of_another_architecture_are_refused_by_the_name_of_a_tensor(tmp_path: Path) -> None:
    small = tiny_facts_plan({"network.features": (4, 8)})
    wide = tiny_facts_plan({"network.features": (4, 12)})
    deep = tiny_facts_plan({"network.features": (4, 8, 8)})
    path = tmp_path / "w.safetensors"
    weights = build_network(small).state_dict()
    safetensors.torch.save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"decoder\.0\S* has shape \(4, 12, .* here, \(4, 16, .* in the network"):
        checkpoint.load_weights(build_network(wide), path)
    with pytest.raises(CheckpointError, match=r"the file has no tensor (decoder|encoder|heads|ups)\."):
        checkpoint.load_weights(build_network(deep), path)
    safetensors.torch.save_file(weights | {"surplus": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="the network has no tensor surplus"):
        checkpoint.load_weights(build_network(small), path)
    safetensors.torch.save_file({name: value + 1 for name, value in weights.items()}, path)
    network = build_network(small)
    checkpoint.load_weights(network, path)
    assert all(torch.equal(value, weights[name] + 1) for name, value in network.state_dict().items())
