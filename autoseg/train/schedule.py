"""Learning rate by step: a pure function, so that a resumed run cannot drift."""

from __future__ import annotations

import math

from autoseg.schema import Schedule

POLY_POWER = 0.9


def rate_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """Return the share of the peak rate for step 0 ... num_steps - 1; the peak is reached, the end is near zero."""
    warmup = min(num_steps - 1, round(schedule.warmup_fraction * num_steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "poly":
        return float((1 - progress) ** POLY_POWER)
    return 0.5 * (1 + math.cos(math.pi * progress))
