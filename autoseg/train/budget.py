"""Turn a time budget into numbers of steps and validations: once, before step 1, measured, and written down."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from autoseg.train.journal import adapt, adaptation
from autoseg.train.loader import PREFETCH, StepDataset
from autoseg.train.step import Learner
from autoseg.train.validation import Validator

WARM_UP_STEPS = 3
TIMED_STEPS = 12
BUDGET_USED = 0.97
MAX_VALIDATION_SHARE = 0.1


class Length(NamedTuple):
    """How long a run is."""

    num_steps: int
    num_rounds: int


def fit_length(source: StepDataset, run: Path, validator: Validator, device: torch.device) -> Length:
    """Return the plan's number of steps, or what its budget allows on this device; a resumed run reads it back."""
    plan = source.plan
    if plan.optimizer.num_steps is not None:
        return Length(plan.optimizer.num_steps, plan.validation.num_rounds)
    before = adaptation(run, "length")
    if before is not None:
        return Length(int(before["num_steps"]), int(before["num_rounds"]))
    assert plan.budget_s is not None
    start = time.perf_counter()
    step_s, validation_s = _measure(source, validator, device)
    left = BUDGET_USED * plan.budget_s - (time.perf_counter() - start)
    affordable = max(1, int(MAX_VALIDATION_SHARE * left / max(validation_s, 1e-6)))
    num_rounds = min(plan.validation.num_rounds, affordable)
    num_steps = max(1, int((left - num_rounds * validation_s) / step_s))
    adapt(
        run,
        {
            "event": "length",
            "num_steps": num_steps,
            "num_rounds": num_rounds,
            "step_s": step_s,
            "validation_s": validation_s,
            "because": f"{left:.0f} s left of the budget, {step_s:.4f} s a step, {num_rounds} validations of "
            f"{validation_s:.1f} s (at most {MAX_VALIDATION_SHARE:.0%} of the time, and at least one)",
        },
    )
    return Length(num_steps, num_rounds)


def _measure(source: StepDataset, validator: Validator, device: torch.device) -> tuple[float, float]:
    """Return (seconds of a step with its batch, seconds of a validation) on a throw-away network."""
    plan = source.plan
    trial, batches = Learner(plan, 10**6, device), source.batches(0, 10**6)
    queued = plan.num_workers * (PREFETCH + 1)  # batches that were made while the others were timed
    for step in range(WARM_UP_STEPS + queued):
        trial.step(step, next(batches))
    times = []
    for step in range(TIMED_STEPS + queued):
        start = time.perf_counter()
        trial.step(step, next(batches))
        times.append(time.perf_counter() - start)
    # Workers deliver in bursts, so their mean counts; without them a slow step read chunks that later ones need not.
    step_s = statistics.fmean(times) if plan.num_workers else statistics.median(times)
    return step_s, validator.seconds(trial.averaged_network(), device)
