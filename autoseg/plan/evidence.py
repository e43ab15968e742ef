"""What a scored run tells the planner: its scores, its plan, and the course of its training.

::

    scores.json ──run──► RUN/plan.json, RUN/log.jsonl, RUN/adaptations.jsonl ──► Evidence ──► advice (rules_scores.py)
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

from autoseg.errors import PlanError
from autoseg.schema import Plan, Scores, load_as, read_json_lines


class Round(NamedTuple):
    """One validation: after which step, and its Dice by class, None where there was nothing to measure."""

    step: int
    mean_dice: float
    dice: dict[str, float | None]


class Evidence(NamedTuple):
    """One run as it was planned, trained and scored; `losses` are those of its steps that were not skipped."""

    scores: Scores
    plan: Plan
    num_steps: int
    num_done: int
    num_skipped: int
    peak_rate: float
    losses: tuple[float, ...]
    rounds: tuple[Round, ...]


def read_evidence(path: Path) -> Evidence:
    """Return what scores.json and the run it names tell; PlanError if that run is not found."""
    scores = load_as(path, Scores)
    run = _run_of(path, scores)
    lines = read_json_lines(run / "log.jsonl")
    if not lines:
        raise PlanError(run, "has no log.jsonl, so its training cannot be judged", "pass the scores of a trained run")
    plan = load_as(run / "plan.json", Plan)
    return Evidence(
        scores=scores,
        plan=plan,
        num_steps=_num_steps(run, plan, lines),
        num_done=max(line["step"] for line in lines),
        num_skipped=sum(bool(line.get("skipped")) for line in lines),
        peak_rate=max(line["learning_rate"] for line in lines),
        losses=tuple(line["loss"] for line in lines if line.get("loss") is not None),
        rounds=tuple(
            Round(line["step"], line["mean_dice"], line["dice"])
            for line in lines
            if line.get("mean_dice") is not None and line.get("dice")
        ),
    )


def carried_settings(plan: Plan) -> dict[str, Any]:
    """Return what the user had set in the scored plan, by dotted field, so that the next plan starts from there."""
    settings: dict[str, Any] = {}
    for field in (reason.field for reason in plan.reasons if reason.source == "user"):
        if field == "classes":
            settings["classes.names"] = list(plan.class_names)
        elif field in ("class_weights", "decode.thresholds", "loss.priors"):
            settings[f"{field}.*"] = functools.reduce(getattr, field.split("."), plan)
        elif field not in ("split", "resolution", "dimensions"):
            settings[field] = functools.reduce(getattr, field.split("."), plan)
    if plan.split.rule == "user":
        settings |= {"split.train": plan.split.train, "split.validate": plan.split.validate}
    elif plan.split.folds is not None:
        settings |= {"split.folds": plan.split.folds, "split.fold": plan.split.fold}
    if plan.split.voxel_edge_nm is not None:
        settings["split.voxel_edge_nm"] = plan.split.voxel_edge_nm
    return settings


def _run_of(path: Path, scores: Scores) -> Path:
    """Return the run that was scored: where it was then, or the folder in which its scores lie."""
    if scores.run is None:
        raise PlanError(path, "names no run", "pass the scores of `autoseg evaluate --run RUN`")
    for folder in (Path(scores.run), path.parent, path.parent / Path(scores.run).name):
        if (folder / "plan.json").is_file():
            return folder
    raise PlanError(path, f"was scored on {scores.run}, which is not here", "call from where the run can be found")


def _num_steps(run: Path, plan: Plan, lines: list[dict[str, Any]]) -> int:
    events = [event for event in read_json_lines(run / "adaptations.jsonl") if event.get("event") == "length"]
    planned = events[-1]["num_steps"] if events else plan.optimizer.num_steps
    return int(planned or lines[-1]["step"])
