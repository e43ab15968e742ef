"""Turn a time budget into numbers of steps and validations: once, before step 1, measured, and written down."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoseg.schema import Plan
from autoseg.train.journal import adapt, adaptation
from autoseg.train.loader import PREFETCH, StepDataset
from autoseg.train.step import Learner
from autoseg.train.team import ALONE, Team
from autoseg.train.validation import Validator

WARM_UP_STEPS = 2
LEAST_TIMED, USUAL_TIMED, MOST_TIMED = 3, 12, 100
TRIAL_SHARE, MAX_TRIAL_SHARE = (
    0.03,
    0.1,
)  # of the budget: what timing takes, and may take until the usual steps are done
FEW_STEPS = 50
BUDGET_USED = 0.97
MAX_VALIDATION_SHARE = 0.1


class Length(NamedTuple):
    """How long a run is, and what the user should know of it."""

    num_steps: int
    num_rounds: int
    remark: str | None = None


def fit_length(
    source: StepDataset, run: Path, validator: Validator, device: torch.device, team: Team = ALONE
) -> Length:
    """Return the plan's number of steps, or what its budget allows on this device; a resumed run reads it back.

    All processes of a team take the steps that are timed, and the first one decides.
    """
    plan = source.plan
    if plan.optimizer.num_steps is not None:
        return Length(plan.optimizer.num_steps, plan.validation.num_rounds)
    before: dict[str, Any] | None = team.tell(adaptation(run, "length") if team.first else None)
    if before is not None:
        return Length(int(before["num_steps"]), int(before["num_rounds"]))
    start = time.perf_counter()
    step_s, validation_s = _measure(source, validator, device, team)
    length: Length = team.tell(_fit(plan, run, start, step_s, validation_s) if team.first else None)
    return length


def _fit(plan: Plan, run: Path, start: float, step_s: float, validation_s: float) -> Length:
    """Return how many steps and validations fit into what is left of the budget, and write it down."""
    assert plan.budget_s is not None
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
    return Length(num_steps, num_rounds, _remark(plan, num_steps, step_s))


def _remark(plan: Plan, num_steps: int, step_s: float) -> str | None:
    """Warn of a run too short to learn, or of steps that take twice as long as planned."""
    planned = plan.predicted_step_s
    if num_steps >= FEW_STEPS and (planned is None or step_s <= 2 * planned):
        return None
    slow = f" (planned: {planned:.2g} s; is the machine busy?)" if planned is not None and step_s > 2 * planned else ""
    short = ": too few to learn much" if num_steps < FEW_STEPS else ""
    what = f"only {num_steps} steps fit into {plan.budget_s:g} s, a step takes {step_s:.2g} s{slow}{short}"
    return f"{what}; to have more, free the machine or plan with a longer --budget, and train into another --run"


def _measure(source: StepDataset, validator: Validator, device: torch.device, team: Team) -> tuple[float, float]:
    """Return (seconds of a step with its batch, seconds of a validation) on a throw-away network."""
    plan = source.plan
    trial, batches = Learner(plan, 10**6, device, team), source.batches(0, 10**6)
    queued = plan.num_workers * (PREFETCH + 1)  # batches that were made while the others were timed
    for step in range(WARM_UP_STEPS + queued):
        trial.step(step, next(batches))
    times = []
    began = time.perf_counter()
    for step in range(MOST_TIMED + queued):
        if step - queued >= LEAST_TIMED:
            share = TRIAL_SHARE if step - queued >= USUAL_TIMED else MAX_TRIAL_SHARE
            if team.tell(time.perf_counter() - began > share * (plan.budget_s or 0.0)):
                break
        start = time.perf_counter()
        trial.step(step, next(batches))
        times.append(time.perf_counter() - start)
    # Workers deliver in bursts, so their mean counts; without them the first steps read chunks that later ones find.
    step_s = statistics.fmean(times) if plan.num_workers else statistics.median(times[len(times) // 2 :])
    return step_s, validator.seconds(trial.averaged_network(), device) if team.first else 0.0
