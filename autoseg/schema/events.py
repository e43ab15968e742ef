"""What a running training tells whoever watches it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from autoseg.schema.plans import Plan


class StepResult(NamedTuple):
    """What one optimizer step reports; a step without finite gradients is skipped."""

    loss: float
    gradient_norm: float
    learning_rate: float
    skipped: bool


class ValidationScore(NamedTuple):
    """Dice by class, None where a class is neither there nor predicted, and their mean."""

    dice: dict[str, float | None]
    mean_dice: float | None


class Outcome(NamedTuple):
    """How a call to train ended; `stopped_by` names the signal, if one did."""

    run: Path
    step: int
    num_steps: int
    mean_dice: float | None
    best_mean_dice: float | None
    stopped_by: str | None


class Observer:
    """What a front end may watch; the default watches nothing."""

    def started(self, plan: Plan, num_steps: int, from_step: int) -> None:
        """Hear that training is about to run steps from_step + 1 ... num_steps."""

    def warned(self, text: str) -> None:
        """Hear of something that the user should know."""

    def stepped(self, step: int, result: StepResult) -> None:
        """Hear that a step was done."""

    def validated(self, step: int, score: ValidationScore) -> None:
        """Hear that the validation regions were predicted."""
