"""Weights of classes by name of the strategy, from how often each class occurs; uniform is the default.

::

    family            f = share of a class               weight
    *_median          positive / known voxels            median(f) / f, cut to 0.5 .. 5 (root, logarithm: .. 3)
    *_max             positive voxels / those of all     1 / f, divided by the largest
    inverse_plain     positive / known voxels            1 / f

`log_inverse_max` is almost `inverse_max`: log(1 + f) is f where f is small. Effective numbers of voxels saturate (every
class has more than 1 / (1 - beta) of them), so `effective_*` come out alike on any dense data; `class_balanced` counts
instances, or crops where there are none. Source: the CellMap class-weighting experiments (Shan-CU), whose directive and
code define the median and the max family; Cui et al. 2019 for effective numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

LEAST, MOST, MOST_DAMPED = 0.5, 5.0, 3.0
TINY = 1e-8
BETA_VOXELS, BETA_INSTANCES = 0.999, 0.9999
MANUAL = {"nuc": 1.8, "mito_mem": 1.3, "er_mem": 1.6, "pm": 1.6, "golgi_mem": 1.1}  # from a table that was an artefact


class Occurrence(NamedTuple):
    """How often one class occurs: its voxels, those in which it is known, its instances (or crops), its Dice.

    What nobody `counted` is an assumption.
    """

    positive: int
    known: int
    instances: int
    dice: float | None = None
    counted: bool = True

    @property
    def share(self) -> float:
        """Return the share of the known voxels that hold the class, never 0."""
        return max(self.positive / max(1, self.known), TINY)


Occurrences = Mapping[str, Occurrence]
Weights = dict[str, float]


def uniform(found: Occurrences) -> Weights:
    """Return 1 for every class."""
    return dict.fromkeys(found, 1.0)


def inverse_median(found: Occurrences) -> Weights:
    """Return median(f) / f, cut to 0.5 .. 5."""
    return _of_median(found, lambda f, median: median / f, MOST)


def sqrt_inverse_median(found: Occurrences) -> Weights:
    """Return sqrt(median(f) / f), cut to 0.5 .. 3."""
    return _of_median(found, lambda f, median: math.sqrt(median / f), MOST_DAMPED)


def log_inverse_median(found: Occurrences) -> Weights:
    """Return log(1 + 1/f) / log(1 + 1/median(f)), cut to 0.5 .. 3."""
    return _of_median(found, lambda f, median: math.log1p(1 / f) / math.log1p(1 / median), MOST_DAMPED)


def effective_median(found: Occurrences) -> Weights:
    """Return 2 / E_n over the largest 1 / E_n, cut to 0.5 .. 3; E_n of positive voxels, beta 0.999."""
    raw = {name: 1 / effective_number(one.positive, BETA_VOXELS) for name, one in found.items()}
    largest = max(raw.values())
    return {name: _cut(2 * w / largest, MOST_DAMPED) for name, w in raw.items()}


def inverse_max(found: Occurrences) -> Weights:
    """Return 1 / f over the largest."""
    return _over_max({name: 1 / f for name, f in _shares_of_all(found).items()})


def sqrt_inverse_max(found: Occurrences) -> Weights:
    """Return 1 / sqrt(f) over the largest."""
    return _over_max({name: 1 / math.sqrt(f) for name, f in _shares_of_all(found).items()})


def log_inverse_max(found: Occurrences) -> Weights:
    """Return 1 / log(1 + f) over the largest."""
    return _over_max({name: 1 / math.log1p(f) for name, f in _shares_of_all(found).items()})


def effective_max(found: Occurrences) -> Weights:
    """Return 1 / E_n of positive voxels (beta 0.999) over the largest."""
    return _over_max({name: 1 / effective_number(one.positive, BETA_VOXELS) for name, one in found.items()})


def inverse_plain(found: Occurrences) -> Weights:
    """Return 1 / f."""
    return {name: 1 / one.share for name, one in found.items()}


def class_balanced(found: Occurrences, beta: float = BETA_INSTANCES) -> Weights:
    """Return 1 / E_n of instances (or crops), with a mean of 1."""
    raw = {name: 1 / effective_number(one.instances, beta) for name, one in found.items()}
    return _mean_one(raw)


def performance(found: Occurrences) -> Weights:
    """Return 1 - Dice of the scored run, with a mean of 1; a class without a Dice weighs 1."""
    raw = {name: max(0.05, 1 - one.dice) for name, one in found.items() if one.dice is not None}
    return dict.fromkeys(found, 1.0) | (_mean_one(raw) if raw else {})


def manual(found: Occurrences) -> Weights:
    """Return the weights that the experiments set by hand, 1 for other classes; they rest on an artefact."""
    return {name: MANUAL.get(name, 1.0) for name in found}


STRATEGIES: dict[str, Callable[[Occurrences], Weights]] = {
    rule.__name__: rule
    for rule in (
        uniform,
        manual,
        inverse_median,
        sqrt_inverse_median,
        log_inverse_median,
        effective_median,
        inverse_max,
        sqrt_inverse_max,
        log_inverse_max,
        effective_max,
        inverse_plain,
        class_balanced,
        performance,
    )
}


def weights_by(strategy: str, found: Occurrences, beta: float = BETA_INSTANCES) -> Weights:
    """Return the weights of a strategy by name; beta is that of `class_balanced`."""
    return class_balanced(found, beta) if strategy == "class_balanced" else STRATEGIES[strategy](found)


def effective_number(n: int, beta: float) -> float:
    """Return (1 - beta^n) / (1 - beta), 1 at n = 0 or 1."""
    return 1.0 if n < 1 else -math.expm1(n * math.log(beta)) / (1 - beta)


def saturated(found: Occurrences, beta: float = BETA_VOXELS) -> bool:
    """Return whether every class has so many voxels that their effective numbers are alike, within a hundredth."""
    numbers = [effective_number(one.positive, beta) for one in found.values()]
    return max(numbers) < 1.01 * min(numbers)


def _shares_of_all(found: Occurrences) -> Weights:
    total = sum(max(1, one.positive) for one in found.values())
    return {name: max(1, one.positive) / total for name, one in found.items()}


def _of_median(found: Occurrences, rule: Callable[[float, float], float], most: float) -> Weights:
    median = statistics.median(one.share for one in found.values())
    return {name: _cut(rule(one.share, median), most) for name, one in found.items()}


def _cut(weight: float, most: float) -> float:
    return max(LEAST, min(most, weight))


def _over_max(raw: Weights) -> Weights:
    largest = max(raw.values())
    return {name: weight / largest for name, weight in raw.items()}


def _mean_one(raw: Weights) -> Weights:
    mean = statistics.fmean(raw.values())
    return {name: weight / mean for name, weight in raw.items()}
