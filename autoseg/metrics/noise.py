"""Is a difference more than noise: pooled sd of repeated runs, a t test of two means, a bootstrap over crops.

::

    runs that differ only in their seed       .76 .77 .75 | .72 .73 | .60 .60 .64       pooled sd: .013
    means of two variants                     .765 (3)   .728 (2)                        apart by more than
                                                                                         t * sd * sqrt(1/3 + 1/2)?
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from autoseg.metrics.overlap import NOTHING, Counts, mean, ratios

CONFIDENCE = 0.95
RESAMPLED = 1000
LEAST_CROPS = 5

CropCounts = dict[str, Counts]  # by class


def pooled_sd(groups: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """Return the sd within groups of repeated runs, and its degrees of freedom; None where nothing is repeated."""
    repeated = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    if freedom == 0:
        return None, 0
    squares = sum((len(group) - 1) * statistics.variance(group) for group in repeated)
    return math.sqrt(squares / freedom), freedom


def least_difference(sd: float, freedom: int, num_a: int, num_b: int) -> float:
    """Return by how much two means must differ to be told apart at 95 %, two-sided."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * sd * math.sqrt(1 / num_a + 1 / num_b)


def bootstrap_mean_dice(crops: Sequence[CropCounts], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean Dice over classes, crops drawn anew with replacement; None for few."""
    if len(crops) < LEAST_CROPS:
        return None
    rng = np.random.Generator(np.random.Philox(seed))
    found = []
    for _ in range(RESAMPLED):
        drawn = [crops[i] for i in rng.integers(0, len(crops), len(crops))]
        dice = mean_dice(drawn)
        if dice is not None:
            found.append(dice)
    if not found:
        return None
    low, high = np.percentile(found, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_dice(crops: Sequence[CropCounts]) -> float | None:
    """Return the mean over classes of the Dice of counts pooled over crops."""
    total: CropCounts = {}
    for crop in crops:
        for name, counts in crop.items():
            total[name] = total.get(name, NOTHING) + counts
    return mean([ratios(counts).dice for counts in total.values()])
