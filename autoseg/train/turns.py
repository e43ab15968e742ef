"""From which crop, and around a voxel of which class, each patch is drawn: everything in its turn.

One number in [0, 1) chooses crop and class at once, since every (class, crop) owns an interval::

    0        any known voxel             1 - c                    class 1             ...        1
    |-- crop a ----|-- crop b --|- c -|  |-- crop a --|-- crop c --|-- crop b --|-- crop c --|

Known voxels are all alike, so a large crop owns much of the left. On the right a class owns its share, of which
every crop that holds it owns the same, so no large crop dominates. In each round of 1,024 places the numbers are
evenly spaced, in random order: an interval of length p is hit p * 1,024 times, give or take one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.schema import Sampling

ROUND = 1024
GOLDEN = (5**0.5 - 1) / 2


class Turn(NamedTuple):
    """A crop by its number, and the class to centre on; None is any known voxel."""

    crop: int
    class_index: int | None


def class_shares(num_present_K: NDArray[np.int64], sampling: Sampling) -> NDArray[np.float64]:
    """Return for each class in which share of all patches it is centred; 0 where it has no voxel.

    Every class that exists gets the floor; the rest is in proportion to voxels to the power of `class_power`.
    """
    exists = num_present_K > 0
    shares = np.zeros(len(num_present_K))
    if not exists.any():
        return shares
    wishes = np.power(num_present_K[exists].astype(np.float64), sampling.class_power)
    rest = sampling.class_centred_fraction - sampling.class_floor * exists.sum()
    shares[exists] = sampling.class_floor + rest * wishes / wishes.sum()
    return shares


class Turns:
    """The order of turns of one plan: turn number t is the same whoever asks."""

    def __init__(self, known_N: Sequence[int], present_NK: NDArray[np.int64], sampling: Sampling, seed: int) -> None:
        """Take the known voxels of each crop, and the voxels of each class in each crop."""
        shares = class_shares(present_NK.sum(axis=0), sampling)
        holds = (present_NK > 0).T
        self._class_K, self._crop_K = np.nonzero(holds)
        lengths_K = (shares / np.maximum(1, holds.sum(axis=1)))[self._class_K]
        known = np.asarray(known_N, dtype=np.float64)
        ends = np.cumsum(np.concatenate([(1 - shares.sum()) * known / known.sum(), lengths_K]))
        self._ends, self._num_crops, self._seed = ends / ends[-1], len(known), seed
        self._round: tuple[int, NDArray[np.float64]] = (-1, np.zeros(0))

    def turn(self, number: int) -> Turn:
        """Return the turn of that number, counted from 0 over the whole run."""
        number_of_round, place = divmod(number, ROUND)
        if self._round[0] != number_of_round:
            self._round = (number_of_round, self._numbers(number_of_round))
        index = int(np.searchsorted(self._ends, self._round[1][place], side="right"))
        if index < self._num_crops:
            return Turn(index, None)
        return Turn(int(self._crop_K[index - self._num_crops]), int(self._class_K[index - self._num_crops]))

    def _numbers(self, number_of_round: int) -> NDArray[np.float64]:
        """Return the numbers of a round; from round to round they move by the golden ratio, to lie between all others.

        So also an interval shorter than 1 / 1,024 is hit as often as its length says.
        """
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, ROUND, number_of_round, 1])))
        start = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, ROUND, 0, 2]))).random()
        shift = (start + number_of_round * GOLDEN) % 1
        numbers: NDArray[np.float64] = (rng.permutation(ROUND) + shift) / ROUND
        return numbers
