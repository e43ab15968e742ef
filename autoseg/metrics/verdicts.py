"""What the counts of a class say in words, and which field of the plan acts on it.

::

    truth 0, found 0         absent             nothing to score
    truth 0                  only false         found where there is none
    found 0                  never predicted
    recall - precision       over-predicting    more than .2; found too often
    precision - recall       under-predicting   more than .2; missed too often
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from autoseg.metrics.overlap import Counts, ratios

LOPSIDED = 0.2
BANDS = ((0.15, "critical"), (0.25, "poor"), (0.40, "weak"))


class Verdict(NamedTuple):
    """A class in words, and what to try; "" where there is nothing to say."""

    words: str
    remedy: str


def class_verdict(counts: Counts) -> Verdict:
    """Return what the pooled counts of a class say."""
    truth, found = counts.tp + counts.fn, counts.tp + counts.fp
    if truth == 0:
        return Verdict("absent", "") if found == 0 else Verdict("only false", "decode.thresholds up")
    if found == 0:
        return Verdict("never predicted", "longer budget_s, or sampling.class_floor up")
    score = ratios(counts)
    lean = (score.recall or 0.0) - (score.precision or 0.0)
    if lean > LOPSIDED:
        return Verdict("over-predicting", "decode.thresholds or loss.tversky_alpha up")
    if lean < -LOPSIDED:
        return Verdict("under-predicting", "decode.thresholds down or loss.tversky_beta up")
    return Verdict("", "")


def band(dice: float | None) -> str:
    """Return the name of the band of a Dice, "" from .40 up."""
    return "" if dice is None else next((name for limit, name in BANDS if dice < limit), "")


def spread(of_crops: Sequence[Counts]) -> float | None:
    """Return the sd of Dice over the crops that have one; None for fewer than two."""
    dice = [value for counts in of_crops if (value := ratios(counts).dice) is not None]
    return statistics.stdev(dice) if len(dice) > 1 else None
