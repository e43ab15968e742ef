"""plan + DATA -> RUN: steps, validations, checkpoints; the same command on an existing RUN resumes it.

::

    fit steps to the budget (once, written down) ─► step ─► log ─┬─► step ...
                                                                 ├─ every 1/n of the run: validate, checkpoint
                                                                 └─ every 5 minutes, or asked to stop: checkpoint

A checkpoint also stands before each step that is validated: a validation that is cut short costs that step alone.
Several processes (`num_processes`) go through the same loop side by side; the first of them decides and writes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from autoseg.data.codes import default_cache
from autoseg.data.dataset import Dataset, open_dataset
from autoseg.data.em import CHUNK_CACHE_BYTES
from autoseg.errors import CheckpointError, PlanError
from autoseg.model import checkpoint
from autoseg.model.windows import find_device
from autoseg.schema import (
    CheckpointHeader,
    Observer,
    Outcome,
    Plan,
    StepResult,
    check_plan,
    load_as,
    save,
    sha256,
)
from autoseg.train.budget import fit_length
from autoseg.train.journal import Journal, adapt, only_process
from autoseg.train.launch import assembled, joined
from autoseg.train.loader import StepDataset
from autoseg.train.signals import asked_to_stop
from autoseg.train.step import Learner
from autoseg.train.team import Team
from autoseg.train.validation import Abandoned, Validator

CHECKPOINT_EVERY_S = 300.0
MAX_SKIPPED_IN_A_ROW = 20
OVERRUN = 1.25


class Job(NamedTuple):
    """What every process of a training must know; `plan` is the plan as it runs here."""

    plan: Plan
    plan_sha256: str
    data: Path
    cache: Path
    run: Path
    device: str


def train(
    plan: Plan,
    data: Path,
    run: Path,
    *,
    used: Plan | None = None,
    device: str = "auto",
    cache: Path | None = None,
    observer: Observer | None = None,
    claimed: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train the plan on DATA into RUN, or go on with it; PlanError or CheckpointError if RUN does not fit.

    `used` is the plan as it runs here: with the split of other data, or shrunk to a smaller machine. `claimed` is
    called once RUN holds this plan.
    """
    check_plan(plan, plan.name)
    dataset = open_dataset(data)
    used = used or plan
    target = device_of(device, used)
    check_plan(msgspec.structs.replace(used, device=target.type), plan.name)
    check_data(used, dataset)
    source = StepDataset(used, data, cache or default_cache())
    source.first()
    _claim(plan, run)
    with only_process(run):
        claimed()
        job = Job(used, sha256(plan), data.absolute(), source.cache.absolute(), run.absolute(), device)
        with asked_to_stop() as asked, assembled(used.num_processes, target, follow) as team:
            team.tell(job)
            session = _Session(job._replace(run=run), source, dataset, team.device(target), team)
            return session.go(observer or Observer(), asked)


def follow(team: Team) -> Outcome:
    """Train as one of the processes of a team that are not the first, which says what and where."""
    with asked_to_stop(interruptible=False) as asked:
        job: Job = team.tell(None)
        target = team.device(device_of(job.device, job.plan))
        source = StepDataset(job.plan, job.data, job.cache, team.rank)
        session = _Session(job, source, open_dataset(job.data), target, team)
        return session.go(Observer(), asked)


def follow_torchrun() -> Outcome:
    """Train as one of the processes that torchrun started and that are not the first."""
    with joined() as team:
        return follow(team)


class _Session:
    """One process working on one run; the first of its team writes, the others only keep step."""

    def __init__(self, job: Job, source: StepDataset, dataset: Dataset, device: torch.device, team: Team) -> None:
        self.plan, self.plan_sha256, self.run = job.plan, job.plan_sha256, job.run
        self.source, self.device, self.team = source, device, team
        torch.set_num_threads(self.plan.num_threads)
        self.validator = Validator(self.plan, dataset, source.cache, CHUNK_CACHE_BYTES, team)
        self.length = fit_length(source, job.run, self.validator, device, team)
        self.learner = Learner(self.plan, self.length.num_steps, device, team)
        self.remark: str | None = None
        self.header = self._share(self._resume() if team.first else None)
        self.saved_step, self.saved_at = self.header.step, time.monotonic()

    def go(self, observer: Observer, asked: Callable[[], str | None]) -> Outcome:
        """Run the remaining steps."""
        journal = Journal(self.run if self.team.first else None, self.header.step)
        for remark in (self.length.remark, self.remark):
            if remark:
                observer.warned(remark)
        if self.source.untaught:
            observer.warned(f"no voxel to train on shows {', '.join(self.source.untaught)}: such classes learn nothing")
        observer.started(self.plan, self.length.num_steps, self.header.step)
        skipped = 0
        began, self._from = time.monotonic(), self.header.step
        batches = self.source.batches(self.header.step, self.length.num_steps)
        try:
            for step in range(self.header.step, self.length.num_steps):
                due = self._validation_due(step + 1)
                if due and self.header.step > self.saved_step:
                    self._save(journal, best=False)
                before = time.perf_counter()
                batch = next(batches)
                ready = time.perf_counter()
                result = self.learner.step(step, batch)
                skipped = skipped + 1 if result.skipped else 0
                if skipped >= MAX_SKIPPED_IN_A_ROW:
                    raise PlanError(
                        self.run,
                        f"{skipped} steps in a row without finite gradients (step {step + 1})",
                        "lower optimizer.learning_rate, or --set precision=fp32",
                    )
                line = _line(step + 1, result, ready - before, time.perf_counter() - ready)
                observer.stepped(step + 1, result)
                if due:
                    line |= self._validate(step + 1, observer, asked)
                else:
                    self.header = msgspec.structs.replace(self.header, step=step + 1, decode=None)
                journal.write(line)
                stop = self.team.agree(asked())
                if due or stop or time.monotonic() - self.saved_at > CHECKPOINT_EVERY_S:
                    self._save(journal, best=due and self.header.best_step == step + 1)
                if stop:
                    return self._outcome(stop)
                self._warn_late(step + 1, time.monotonic() - began, observer)
        except Abandoned as abandoned:
            return self._outcome(str(abandoned))
        finally:
            journal.close()
        return self._outcome(None)

    def _warn_late(self, step: int, elapsed_s: float, observer: Observer) -> None:
        """Say, once, after a tenth of the steps of this process, that they will take far longer than the budget."""
        budget, steps = self.plan.budget_s, self.length.num_steps - self._from
        if self.plan.optimizer.num_steps is not None or not budget or step - self._from != max(1, steps // 10):
            return
        whole = elapsed_s / (step - self._from) * steps
        if whole > OVERRUN * budget:
            remedy = "free the machine, or stop it and plan another --run"
            observer.warned(
                f"at this pace the run takes {whole:.0f} s, its budget is {budget:g} s (a busy machine?): {remedy}"
            )

    def _outcome(self, stopped_by: str | None) -> Outcome:
        h = self.header
        return Outcome(self.run, h.step, self.length.num_steps, h.mean_dice, h.best_mean_dice, stopped_by)

    def _validation_due(self, step: int) -> bool:
        last, rounds = self.length.num_steps, max(1, self.length.num_rounds)
        return step == last or step * rounds // last > (step - 1) * rounds // last

    def _validate(self, step: int, observer: Observer, asked: Callable[[], str | None]) -> dict[str, Any]:
        """Score the averaged weights; return what the log says of it. Abandoned, if asked to stop, changes nothing.

        The newest weights within the plan's tolerance of the best score are the best: later ones saw a lower rate.
        """
        score, tuned = self.validator.score(self.learner.averaged_network(), self.device, step, asked)
        best, now = self.header.best_mean_dice, score.mean_dice
        if now is None or best is None or now >= best - self.plan.validation.tolerance:
            self.header = msgspec.structs.replace(self.header, best_step=step)
        if now is not None:
            best = now if best is None else max(best, now)
        self.header = msgspec.structs.replace(self.header, step=step, mean_dice=now, best_mean_dice=best, decode=tuned)
        observer.validated(step, score)
        return {"mean_dice": now, "dice": score.dice}

    def _save(self, journal: Journal, *, best: bool) -> None:
        """Write a checkpoint after the log that belongs to it, and for people the thresholds of the best one."""
        if not self.team.first:
            return
        journal.flush()
        scaler = self.learner.scaler.state_dict() if self.learner.scaler.is_enabled() else {}
        self.header = msgspec.structs.replace(
            self.header, grad_scale=scaler.get("scale"), grad_scale_growth=int(scaler.get("_growth_tracker", 0))
        )
        folder = self.run / "checkpoints"
        with self.team.unbroken:
            checkpoint.save_checkpoint(folder, self.header, self.learner.averaged, self.learner.state(), best=best)
            if best and self.header.decode is not None:
                save(self.header.decode, self.run / "decode.json")
        self.saved_step, self.saved_at = self.header.step, time.monotonic()

    def _initialize(self) -> None:
        """Start from the weights that `plan.init` names, if it does; heads that do not fit stay random."""
        if self.plan.init is None:
            return
        source = Path(self.plan.init)
        path = checkpoint.find(source / "checkpoints", "best") / checkpoint.WEIGHTS if source.is_dir() else source
        random = checkpoint.initialize(self.learner.network, path)
        self.learner.reset_average()
        adapt(self.run, {"event": "init", "weights": self.plan.init, "random": random})

    def _resume(self) -> CheckpointHeader:
        """Restore the newest whole checkpoint; a run without one starts at step 0."""
        newest = checkpoint.newest(self.run / "checkpoints")
        digest = self.plan_sha256
        if newest is None:
            self._initialize()
            return CheckpointHeader(
                plan_sha256=digest,
                step=0,
                mean_dice=None,
                best_mean_dice=None,
                best_step=None,
                grad_scale=None,
                grad_scale_growth=0,
                sha256={},
            )
        found, header = newest
        if header.plan_sha256 != digest:
            raise CheckpointError(found, "belongs to another plan", "use another --run")
        weights = checkpoint.load_tensors(found / checkpoint.WEIGHTS)
        try:
            self._restore(header, weights, checkpoint.load_tensors(found / checkpoint.STATE))
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(found, f"does not fit the plan ({error})", "use another --run") from None
        if found.name != "last":
            self.remark = f"{found.parent / 'last'} is not whole: going on from {found.name}, step {header.step}"
        return header

    def _restore(self, header: CheckpointHeader, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        self.learner.restore(weights, state)
        if header.grad_scale is not None:
            scale = {"scale": header.grad_scale, "_growth_tracker": header.grad_scale_growth}
            self.learner.scaler.load_state_dict(self.learner.scaler.state_dict() | scale)

    def _share(self, header: CheckpointHeader | None) -> CheckpointHeader:
        """Let every process start from what the first one has restored; what all have from the seed is not sent."""
        if self.team.size == 1 and header is not None:
            return header
        own = _digest(self.learner.averaged) + _digest(self.learner.state())
        told: tuple[CheckpointHeader, str] = self.team.tell((header, own))
        if self.team.add_up(np.array([told[1] != own], np.int64)).any():
            weights, state = (self._told(x) for x in (self.learner.averaged, self.learner.state()))
            if not self.team.first:
                self._restore(told[0], weights, state)
        return told[0]

    def _told(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the first process's tensors, sent one by one."""
        names: list[str] = self.team.tell(list(tensors))
        told = {name: self.team.tell(tensors[name].cpu() if self.team.first else None) for name in names}
        return {} if self.team.first else told


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _line(step: int, result: StepResult, wait_s: float, step_s: float) -> dict[str, Any]:
    """Return the log's line of a step; a skipped step has no loss."""
    return {
        "step": step,
        "loss": None if result.skipped else result.loss,
        "learning_rate": result.learning_rate,
        "gradient_norm": None if result.skipped else result.gradient_norm,
        "wait_s": round(wait_s, 5),
        "step_s": round(step_s, 5),
    } | ({"skipped": True} if result.skipped else {})


def _claim(plan: Plan, run: Path) -> None:
    """Write plan.json into a new RUN; refuse a RUN that holds another plan."""
    path = run / "plan.json"
    if path.exists():
        if sha256(load_as(path, Plan)) != sha256(plan):
            raise PlanError(run, "holds a run of another plan", "choose another --run, or remove that folder")
        return
    if run.exists() and any(run.iterdir()):
        raise PlanError(run, "is not empty and holds no run", "choose another --run")
    save(plan, path)


def check_data(plan: Plan, dataset: Dataset) -> None:
    """Raise PlanError for a crop of the plan's split that the data set does not have."""
    names = {crop.name for crop in dataset.crops}
    missing = sorted({region.crop for region in (*plan.split.train, *plan.split.validate)} - names)
    if missing:
        raise PlanError(
            dataset.root, f"has no crop {missing[0]}, which the plan uses", "train on the plan's DATA, or plan anew"
        )


def device_of(name: str, plan: Plan) -> torch.device:
    """Return the device to train on; PlanError if it, its precision or what the plan starts from is not there."""
    if plan.init is not None and not Path(plan.init).exists():
        raise PlanError(plan.init, "does not exist, and plan.init starts from it", "correct init, or plan anew")
    device = find_device(name, plan)
    if device.type == "cpu" and plan.precision == "fp16":
        raise PlanError(plan.name, "was planned for fp16, which the CPU lacks", "use a GPU, or plan for this machine")
    return device
