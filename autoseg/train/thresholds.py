"""The probability at which a class is called present, chosen on the validation regions.

A run draws rare classes more often than they occur, so its probabilities of them are too high; one half is then not
where Dice is best. The choice is guarded: few positives, or a gain inside the noise, keep the plan's threshold.
Each validation counts its probabilities by class, state and value; every Dice and threshold follows from these.
They are of the network without the mirrored copies over which a prediction may average: eight copies would make every
validation eight times as long, too much of a short run. The thresholds apply to averaged probabilities all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import ABSENT, PRESENT
from autoseg.metrics.overlap import Counts, ratios
from autoseg.schema import TunedDecode

NUM_BINS = 1000
LOWEST, HIGHEST, STEP = 0.1, 0.95, 0.01
MIN_POSITIVE_VOXELS = 500
PLATEAU = 0.002


def histograms(
    probability_KN: NDArray[np.float32], codes_N: NDArray[Any], states_CK: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """Return counts (classes, absent and present, bins) of the probabilities of each class where it is known."""
    counts_K2B = np.empty((len(probability_KN), 2, NUM_BINS), dtype=np.int64)
    first = codes_N * np.intp(NUM_BINS)  # of the bins of a voxel's code
    for probability, states_C, counts_2B in zip(probability_KN, states_CK.T, counts_K2B, strict=True):
        place = (probability * NUM_BINS).astype(np.intp)
        np.minimum(place, NUM_BINS - 1, out=place)
        place += first
        joint = np.bincount(place.ravel(), minlength=len(states_C) * NUM_BINS).reshape(-1, NUM_BINS)
        for state, counts_B in zip((ABSENT, PRESENT), counts_2B, strict=True):
            counts_B[:] = joint[states_C == state].sum(axis=0)
    return counts_K2B


def dice_at(counts_2B: NDArray[Any], threshold: float) -> float | None:
    """Return the Dice of calling the class present from that probability on (to a thousandth)."""
    absent, present = counts_2B
    cut = round(threshold * NUM_BINS)
    return ratios(Counts(int(present[cut:].sum()), int(absent[cut:].sum()), int(present[:cut].sum()))).dice


def choose_thresholds(
    names: Sequence[str], histograms_K2B: NDArray[Any], planned: Mapping[str, float], tolerance: float, step: int
) -> TunedDecode:
    """Return for each class the middle of the thresholds whose Dice is within .002 of the best.

    A gain up to the tolerance is noise of the validation regions and keeps the planned threshold.
    """
    chosen: dict[str, float] = {}
    before: dict[str, float | None] = {}
    after: dict[str, float | None] = {}
    candidates = np.arange(LOWEST, HIGHEST + STEP / 2, STEP).tolist()
    for name, counts in zip(names, histograms_K2B, strict=True):
        dice = [dice_at(counts, threshold) for threshold in candidates]
        before[name] = dice_at(counts, planned[name])
        best = max((value for value in dice if value is not None), default=0.0)
        plateau = [cut for cut, value in zip(candidates, dice, strict=True) if value and value >= best - PLATEAU]
        worth_it = counts[1].sum() >= MIN_POSITIVE_VOXELS and best - (before[name] or 0.0) > tolerance
        chosen[name] = round(float(np.mean(plateau)), 3) if worth_it else planned[name]
        after[name] = dice_at(counts, chosen[name])
    return TunedDecode(step=step, thresholds=chosen, dice_before=before, dice_after=after)
