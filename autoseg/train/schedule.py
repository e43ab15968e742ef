"""Learning rate by step: a pure function, so that a resumed run cannot drift."""

from __future__ import annotations

import math

from autoseg.schema import Schedule

POLY_POWER = 0.9
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25e4


def rate_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """Return the share of the peak rate for step 0 ... num_steps - 1; the peak is reached, the end is near zero."""
    warmup = min(num_steps - 1, round(schedule.warmup_fraction * num_steps))
    if step < warmup:
        share = (step + 1) / (warmup + 1)
        return _cosine(ONE_CYCLE_START, 1.0, share) if schedule.kind == "one_cycle" else share
    progress = (step - warmup) / max(1, num_steps - warmup)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "poly":
        return float((1 - progress) ** POLY_POWER)
    return _cosine(1.0, ONE_CYCLE_END if schedule.kind == "one_cycle" else 0.0, progress)


def _cosine(start: float, stop: float, progress: float) -> float:
    """Go from start to stop along half a cosine; one cycle starts at 1/25 of the peak and ends at 1/250,000.

    Source: Smith and Topin 2018, arXiv 1708.07120, with the defaults of torch's OneCycleLR.
    """
    return stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * progress))
