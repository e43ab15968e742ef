"""Thresholds are chosen where validation shows more than noise, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN
from autoseg.metrics.overlap import Counts, ratios
from autoseg.schema import TunedDecode
from autoseg.train.thresholds import NUM_BINS, choose_thresholds, dice_at, histograms


def draw(num_present: int, num_absent: int, shift: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Probabilities of voxels whose class is known; absent ones reach up to `shift`."""
    rng = np.random.default_rng(0)
    present = 0.9 + 0.1 * rng.random(num_present)
    absent = shift * rng.random(num_absent)
    states = np.repeat(np.array([PRESENT, ABSENT], dtype=np.uint8), (num_present, num_absent))
    return np.concatenate([present, absent]).astype(np.float32), states


def tuned(probability: NDArray[np.float32], states: NDArray[np.uint8]) -> TunedDecode:
    counts = histograms(probability[None], states, np.arange(3, dtype=np.uint8)[:, None])
    return choose_thresholds(["pm"], counts, {"pm": 0.5}, tolerance=0.01, step=7)


def dice(probability: NDArray[np.float32], states: NDArray[np.uint8], threshold: float) -> float | None:
    hit, true = probability >= threshold, states == PRESENT
    return ratios(Counts(int((hit & true).sum()), int((hit & ~true).sum()), int((~hit & true).sum()))).dice


def test_over_prediction_raises_the_threshold_to_where_dice_is_best() -> None:
    probability, states = draw(1000, 9000, shift=0.8)
    found = tuned(probability, states)
    assert found.thresholds["pm"] > 0.75
    assert found.dice_after["pm"] == dice(probability, states, found.thresholds["pm"]) == 1.0
    assert found.dice_before["pm"] == pytest.approx(dice(probability, states, 0.5))
    assert found.step == 7


def test_a_gain_inside_the_tolerance_keeps_one_half() -> None:
    probability, states = draw(1000, 9000, shift=0.5005)
    assert dice(probability, states, 0.5) > 0.99
    assert tuned(probability, states).thresholds == {"pm": 0.5}


def test_few_positives_keep_one_half() -> None:
    assert tuned(*draw(499, 9000, shift=0.8)).thresholds == {"pm": 0.5}


def test_a_class_that_is_nowhere_keeps_one_half_and_has_no_dice() -> None:
    found = tuned(*draw(0, 100, shift=0.05))
    assert (found.thresholds, found.dice_after) == ({"pm": 0.5}, {"pm": None})


def test_unknown_voxels_do_not_count_and_the_last_bin_holds_one() -> None:
    states = np.array([PRESENT, ABSENT, UNKNOWN], dtype=np.uint8)
    probability = np.array([[1.0, 0.0, 0.5]], dtype=np.float32)
    (counts,) = histograms(probability, states, np.arange(3, dtype=np.uint8)[:, None])
    assert counts.shape == (2, NUM_BINS)
    assert (counts[1, -1], counts[0, 0], counts.sum()) == (1, 1, 2)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.29, 0.395, 0.5, 0.95, 1.0]))
def test_the_dice_of_a_histogram_is_that_of_the_voxels(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    states_CK = rng.integers(0, 3, (5, 2)).astype(np.uint8)
    codes = rng.integers(0, 5, (3, 40, 40)).astype(np.uint8)
    probability = ((rng.integers(0, NUM_BINS, (2, *codes.shape)) + 0.5) / NUM_BINS).astype(np.float32)
    for k, counts in enumerate(histograms(probability, codes, states_CK)):
        states = states_CK[codes, k]
        known = states != UNKNOWN
        assert dice_at(counts, threshold) == dice(probability[k][known], states[known], threshold)
