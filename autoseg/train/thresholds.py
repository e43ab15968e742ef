"""The probability at which a class is called present, chosen on the validation regions.

A run draws rare classes more often than they occur, so its probabilities of them are too high; one half is then not
where Dice is best. The choice is guarded: few positives, or a gain inside the noise, keep the plan's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import ABSENT, PRESENT
from autoseg.metrics.overlap import Counts, ratios
from autoseg.schema import TunedDecode

NUM_BINS = 100
LOWEST, HIGHEST = 0.1, 0.95
MIN_POSITIVE_VOXELS = 500
PLATEAU = 0.002


def histogram(probability: NDArray[np.float32], states: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return counts (absent and present, bins) of the probabilities where the class is known."""
    bins = np.minimum((probability * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return np.stack([np.bincount(bins[states == state], minlength=NUM_BINS) for state in (ABSENT, PRESENT)])


def choose_thresholds(
    names: Sequence[str], histograms_K2B: NDArray[Any], planned: Mapping[str, float], tolerance: float, step: int
) -> TunedDecode:
    """Return for each class the middle of the thresholds whose Dice is within .002 of the best.

    A gain up to the tolerance is noise of the validation regions and keeps the planned threshold.
    """
    chosen: dict[str, float] = {}
    before: dict[str, float | None] = {}
    after: dict[str, float | None] = {}
    candidates = range(round(LOWEST * NUM_BINS), round(HIGHEST * NUM_BINS) + 1)
    for name, counts in zip(names, histograms_K2B, strict=True):
        dice = [_dice(counts, cut) for cut in candidates]
        before[name] = _dice(counts, round(planned[name] * NUM_BINS))
        best = max((value for value in dice if value is not None), default=0.0)
        plateau = [cut for cut, value in zip(candidates, dice, strict=True) if value and value >= best - PLATEAU]
        worth_it = counts[1].sum() >= MIN_POSITIVE_VOXELS and best - (before[name] or 0.0) > tolerance
        chosen[name] = float(np.mean(plateau)) / NUM_BINS if worth_it else planned[name]
        after[name] = _dice(counts, round(chosen[name] * NUM_BINS))
    return TunedDecode(step=step, thresholds=chosen, dice_before=before, dice_after=after)


def _dice(counts_2B: NDArray[Any], cut: int) -> float | None:
    absent, present = counts_2B
    tp = int(present[cut:].sum())
    return ratios(Counts(tp, int(absent[cut:].sum()), int(present[:cut].sum()))).dice
