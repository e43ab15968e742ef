"""Counts of agreement: equal to a loop over voxels, and ratios that are None where nothing can be divided."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import shapes

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN
from autoseg.geometry import VoxelsZYX
from autoseg.metrics.overlap import NOTHING, Counts, count, mean, ratios

COUNTS = st.builds(Counts, *[st.integers(0, 2**40)] * 3)


@given(shapes(5), st.lists(st.sampled_from([ABSENT, PRESENT, UNKNOWN]), min_size=1, max_size=6), st.integers(0, 99))
def test_counts_equal_a_loop_over_voxels(shape: VoxelsZYX, states: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, len(states), shape).astype(np.uint8)
    predicted = rng.random(shape) < rng.random()
    tp = fp = fn = 0
    for code, hit in zip(codes.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        if states[code] == UNKNOWN:
            continue
        tp += hit and states[code] == PRESENT
        fp += hit and states[code] == ABSENT
        fn += not hit and states[code] == PRESENT
    assert count(predicted, codes, np.array(states, dtype=np.uint8)) == Counts(tp, fp, fn)


def test_unknown_voxels_never_count() -> None:
    states = np.array([UNKNOWN, PRESENT], dtype=np.uint8)
    codes = np.array([[[0, 0, 1, 1]]], dtype=np.uint16)
    everything, nothing = np.ones((1, 1, 4), dtype=bool), np.zeros((1, 1, 4), dtype=bool)
    assert count(everything, codes, states) == Counts(2, 0, 0)
    assert count(nothing, codes, states) == Counts(0, 0, 2)
    assert count(everything, np.zeros_like(codes), states) == NOTHING


@given(st.lists(COUNTS, max_size=5))
def test_counts_pool_by_addition(parts: list[Counts]) -> None:
    assert sum(parts, NOTHING) == (sum(p.tp for p in parts), sum(p.fp for p in parts), sum(p.fn for p in parts))
    with pytest.raises(TypeError):
        operator.add(NOTHING, (1, 2, 3))


@given(COUNTS)
def test_ratios_are_none_exactly_where_nothing_can_be_divided(counts: Counts) -> None:
    tp, fp, fn = counts
    score = ratios(counts)
    assert (score.dice is None) == (score.iou is None) == (tp + fp + fn == 0)
    assert (score.precision is None) == (tp + fp == 0)
    assert (score.recall is None) == (tp + fn == 0)
    for value in (score.dice, score.iou, score.precision, score.recall):
        assert value is None or 0 <= value <= 1
    if score.dice is not None and score.iou is not None:
        assert score.dice == pytest.approx(2 * score.iou / (1 + score.iou))
    if score.precision and score.recall:
        assert score.dice == pytest.approx(2 / (1 / score.precision + 1 / score.recall))


def test_ratios_by_hand() -> None:
    score = ratios(Counts(tp=3, fp=1, fn=2))
    assert (score.dice, score.iou, score.precision, score.recall) == (6 / 9, 3 / 6, 3 / 4, 3 / 5)
    only_predicted = ratios(Counts(0, 7, 0))
    assert (only_predicted.dice, only_predicted.precision, only_predicted.recall) == (0.0, 0.0, None)


def test_mean_leaves_out_what_is_not_there() -> None:
    assert mean([0.5, None, 1.0]) == 0.75
    assert mean([0.0, None]) == 0.0
    assert mean([None, None]) is None
    assert mean([]) is None
