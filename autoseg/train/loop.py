"""plan + DATA -> RUN: steps, validations, checkpoints; the same command on an existing RUN resumes it.

::

    fit steps to the budget (once, written down) ─► step ─► log ─┬─► step ...
                                                                 ├─ every 1/n of the run: validate, checkpoint
                                                                 └─ every 5 minutes, or asked to stop: checkpoint
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch

from autoseg.data.codes import default_cache
from autoseg.data.dataset import Dataset, open_dataset
from autoseg.errors import CheckpointError, PlanError
from autoseg.model import checkpoint
from autoseg.schema import (
    CheckpointHeader,
    Observer,
    Outcome,
    Plan,
    Split,
    StepResult,
    check_plan,
    load_as,
    save,
    sha256,
)
from autoseg.train.journal import Journal, adapt, adaptation
from autoseg.train.loader import CACHE_BYTES, batches
from autoseg.train.step import Learner
from autoseg.train.validation import Validator

CHECKPOINT_EVERY_S = 300.0
WARM_UP_STEPS = 3
TIMED_STEPS = 8
MAX_SKIPPED_IN_A_ROW = 20
BUDGET_USED = 0.97


def train(
    plan: Plan,
    data: Path,
    run: Path,
    *,
    split: Split | None = None,
    device: str = "auto",
    cache: Path | None = None,
    observer: Observer | None = None,
    claimed: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train the plan on DATA into RUN, or go on with it; PlanError or CheckpointError if RUN does not fit.

    `split` replaces the plan's on other data; `claimed` is called once RUN holds this plan.
    """
    check_plan(plan, plan.name)
    dataset = open_dataset(data)
    target = _device(device, plan)
    used = plan if split is None else msgspec.structs.replace(plan, split=split)
    _check_data(used, dataset)
    _claim(plan, run)
    claimed()
    torch.set_num_threads(plan.num_threads)
    session = _Session(used, sha256(plan), data, dataset, run, target, cache or default_cache())
    with _asked_to_stop() as asked:
        return session.go(observer or Observer(), asked)


class _Session:
    """One process working on one run."""

    def __init__(
        self,
        plan: Plan,
        plan_sha256: str,
        data: Path,
        dataset: Dataset,
        run: Path,
        device: torch.device,
        cache: Path,
    ) -> None:
        self.plan, self.data, self.run, self.device, self.cache = plan, data, run, device, cache
        self.plan_sha256 = plan_sha256
        self.validator = Validator(plan, dataset, cache, CACHE_BYTES)
        self.num_steps = self._fit_steps()
        self.learner = Learner(plan, self.num_steps, device)
        self.header = self._resume()

    def go(self, observer: Observer, asked: Callable[[], str | None]) -> Outcome:
        """Run the remaining steps."""
        journal = Journal(self.run, self.header.step)
        observer.started(self.plan, self.num_steps, self.header.step)
        saved_at, skipped = time.monotonic(), 0
        source = batches(self.plan, self.data, start_step=self.header.step, stop_step=self.num_steps, cache=self.cache)
        try:
            for step in range(self.header.step, self.num_steps):
                before = time.perf_counter()
                batch = next(source)
                ready = time.perf_counter()
                result = self.learner.step(step, batch)
                skipped = skipped + 1 if result.skipped else 0
                if skipped >= MAX_SKIPPED_IN_A_ROW:
                    raise PlanError(
                        self.run,
                        f"{skipped} steps in a row without finite gradients (step {step + 1})",
                        "lower optimizer.learning_rate, or --set precision=fp32",
                    )
                self.header = msgspec.structs.replace(self.header, step=step + 1)
                _log(journal, step + 1, result, ready - before, time.perf_counter() - ready)
                observer.stepped(step + 1, result)
                due = self._validation_due(step + 1)
                if due:
                    self._validate(step + 1, journal, observer)
                stop = asked()
                if due or stop or time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                    journal.flush()
                    self._save(best=due and self.header.best_step == step + 1)
                    saved_at = time.monotonic()
                if stop:
                    return self._outcome(stop)
        finally:
            journal.close()
        return self._outcome(None)

    def _outcome(self, stopped_by: str | None) -> Outcome:
        h = self.header
        return Outcome(self.run, h.step, self.num_steps, h.mean_dice, h.best_mean_dice, stopped_by)

    def _validation_due(self, step: int) -> bool:
        rounds = max(1, self.plan.validation.num_rounds)
        return step == self.num_steps or step * rounds // self.num_steps > (step - 1) * rounds // self.num_steps

    def _validate(self, step: int, journal: Journal, observer: Observer) -> None:
        """Score the averaged weights; without validation regions the last weights count as the best."""
        score = self.validator.score(self.learner.averaged_network(), self.device)
        best = self.header.best_mean_dice
        if score.mean_dice is None or best is None or score.mean_dice > best:
            self.header = msgspec.structs.replace(self.header, best_mean_dice=score.mean_dice, best_step=step)
        self.header = msgspec.structs.replace(self.header, mean_dice=score.mean_dice)
        scalars = {f"dice/{name}": value for name, value in score.dice.items() if value is not None}
        if score.mean_dice is not None:
            scalars["dice/mean"] = score.mean_dice
        journal.write({"step": step, "event": "validation", "mean_dice": score.mean_dice, "dice": score.dice}, scalars)
        observer.validated(step, score)

    def _save(self, *, best: bool) -> None:
        scaler = self.learner.scaler.state_dict() if self.learner.scaler.is_enabled() else {}
        self.header = msgspec.structs.replace(
            self.header, grad_scale=scaler.get("scale"), grad_scale_growth=int(scaler.get("_growth_tracker", 0))
        )
        folder = self.run / "checkpoints"
        checkpoint.save_checkpoint(folder, self.header, self.learner.averaged, self.learner.state(), best=best)

    def _resume(self) -> CheckpointHeader:
        """Restore the newest whole checkpoint; a run without one starts at step 0."""
        found = checkpoint.newest(self.run / "checkpoints")
        digest = self.plan_sha256
        if found is None:
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
        header = checkpoint.verify(found)
        if header.plan_sha256 != digest:
            raise CheckpointError(found, "belongs to another plan", "use another --run")
        weights = checkpoint.load_tensors(found / checkpoint.WEIGHTS)
        try:
            self.learner.restore(weights, checkpoint.load_tensors(found / checkpoint.STATE))
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(found, f"does not fit the plan ({error})", "use another --run") from None
        if header.grad_scale is not None:
            scale = {"scale": header.grad_scale, "_growth_tracker": header.grad_scale_growth}
            self.learner.scaler.load_state_dict(self.learner.scaler.state_dict() | scale)
        return header

    def _fit_steps(self) -> int:
        """Return the steps of the run: the plan's, or as many as its budget allows, measured once and written."""
        if self.plan.optimizer.num_steps is not None:
            return self.plan.optimizer.num_steps
        before = adaptation(self.run, "num_steps")
        if before is not None:
            return int(before["num_steps"])
        assert self.plan.budget_s is not None
        start = time.perf_counter()
        step_s, validation_s = self._time_step()
        left = BUDGET_USED * self.plan.budget_s - (time.perf_counter() - start)
        reserved = self.plan.validation.num_rounds * validation_s
        num_steps = max(1, int(max(left - reserved, 0.3 * left) / step_s))
        adapt(
            self.run,
            {
                "event": "num_steps",
                "num_steps": num_steps,
                "step_s": step_s,
                "validation_s": validation_s,
                "because": f"{left:.0f} s of training at {step_s:.4f} s a step, {reserved:.0f} s for validation",
            },
        )
        return num_steps

    def _time_step(self) -> tuple[float, float]:
        """Measure (seconds of a step with its batch, seconds of a validation) on a throw-away network."""
        trial = Learner(self.plan, 10**6, self.device)
        source = batches(self.plan, self.data, cache=self.cache)
        times = []
        for step in range(WARM_UP_STEPS + TIMED_STEPS):
            start = time.perf_counter()
            trial.step(step, next(source))
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        if self.plan.validation.num_rounds:
            self.validator.score(trial.averaged_network(), self.device)
        return statistics.median(times[WARM_UP_STEPS:]), time.perf_counter() - start


def _log(journal: Journal, step: int, result: StepResult, wait_s: float, step_s: float) -> None:
    line: dict[str, Any] = {
        "step": step,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "gradient_norm": result.gradient_norm,
        "wait_s": round(wait_s, 5),
        "step_s": round(step_s, 5),
    }
    if result.skipped:
        line |= {"skipped": True, "loss": None, "gradient_norm": None}
        journal.write(line, {})
        return
    scalars = {"loss": result.loss, "learning_rate": result.learning_rate, "gradient_norm": result.gradient_norm}
    journal.write(line, scalars)


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


def _check_data(plan: Plan, dataset: Dataset) -> None:
    names = {crop.name for crop in dataset.crops}
    missing = sorted({region.crop for region in (*plan.split.train, *plan.split.validate)} - names)
    if missing:
        raise PlanError(
            dataset.root, f"has no crop {missing[0]}, which the plan uses", "train on the plan's DATA, or plan anew"
        )


def _device(name: str, plan: Plan) -> torch.device:
    """Return the device the plan wants, or the one the user names; PlanError if it is not there."""
    wanted = plan.device if name == "auto" else name
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise PlanError(f"--device {wanted}", "is not a device", "use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(plan.name, "was planned for a GPU, and there is none here", "plan anew, or --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f"--device {wanted}", "is not supported", "use auto, cpu or cuda")
    return device


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], str | None]]:
    """Turn SIGTERM and Ctrl-C into a question that is asked between steps; a second Ctrl-C interrupts at once."""
    received: list[str] = []

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
