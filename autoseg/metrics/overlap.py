"""Count first, divide last: voxels that agree and disagree, and the ratios that follow. Absent is None."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import PRESENT, UNKNOWN
from autoseg.schema import ClassScore


class Counts(NamedTuple):
    """True positives, false positives and false negatives of one class, in voxels."""

    tp: int
    fp: int
    fn: int

    def __add__(self, other: object) -> Counts:
        if not isinstance(other, Counts):
            return NotImplemented
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)


NOTHING = Counts(0, 0, 0)


def count(predicted_ZYX: NDArray[np.bool_], codes_ZYX: NDArray[Any], states_C: NDArray[np.uint8]) -> Counts:
    """Count one class against label codes; voxels whose code is unknown for the class do not count."""
    num_codes = len(states_C)
    codes = codes_ZYX.astype(np.intp, copy=False).ravel()
    total = np.bincount(codes, minlength=num_codes)
    hit = np.bincount(codes[predicted_ZYX.ravel()], minlength=num_codes)
    present, known = states_C == PRESENT, states_C != UNKNOWN
    tp = int(hit[present].sum())
    return Counts(tp, int(hit[known].sum()) - tp, int(total[present].sum()) - tp)


def ratios(counts: Counts) -> ClassScore:
    """Return Dice, IoU, precision and recall; each None where its denominator is zero.

    A class that is neither in the truth nor predicted has no Dice; one that is only predicted has Dice 0.
    """
    tp, fp, fn = counts
    return ClassScore(
        dice=_divide(2 * tp, 2 * tp + fp + fn),
        iou=_divide(tp, tp + fp + fn),
        precision=_divide(tp, tp + fp),
        recall=_divide(tp, tp + fn),
    )


def mean(values: list[float | None]) -> float | None:
    """Return the mean of the values that are there, None if none is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _divide(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
