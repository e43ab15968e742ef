"""What counts say in words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from autoseg.evaluate.scores import summarize
from autoseg.metrics.overlap import Counts
from autoseg.metrics.verdicts import band, class_verdict, spread
from autoseg.report.terminal import score_table
from autoseg.schema import ScoreRow


@pytest.mark.parametrize(
    ("counts", "words", "field"),
    [
        (Counts(0, 0, 0), "absent", ""),
        (Counts(0, 9, 0), "only false", "decode.thresholds up"),
        (Counts(0, 0, 9), "never predicted", "sampling.class_floor"),
        (Counts(90, 60, 10), "over-predicting", "tversky_alpha"),
        (Counts(40, 10, 60), "under-predicting", "tversky_beta"),
        (Counts(80, 20, 20), "", ""),
    ],
)
def test_a_class_in_words_and_the_field_that_acts_on_it(counts: Counts, words: str, field: str) -> None:
    found = class_verdict(counts)
    assert found.words == words
    assert field in found.remedy
    assert bool(found.remedy) == (words not in ("", "absent"))


def test_bands_of_dice() -> None:
    assert [band(d) for d in (0.0, 0.149, 0.15, 0.249, 0.25, 0.399, 0.4, 1.0, None)] == [
        "critical", "critical", "poor", "poor", "weak", "weak", "", "", "",
    ]  # fmt: skip


def test_the_spread_over_crops_ignores_crops_without_the_class() -> None:
    assert spread([Counts(1, 0, 0), Counts(1, 1, 1), Counts(0, 0, 0)]) == pytest.approx(0.5 / 2**0.5)
    assert spread([Counts(1, 0, 0), Counts(0, 0, 0)]) is None


def test_the_table_is_sorted_by_dice_with_spread_verdicts_and_overall_ratios() -> None:
    rows = [
        ScoreRow(crop="a/crop1", class_="er", tp=10, fp=90, fn=10),
        ScoreRow(crop="a/crop2", class_="er", tp=20, fp=80, fn=0),
        ScoreRow(crop="a/crop1", class_="mito", tp=90, fp=10, fn=10),
        ScoreRow(crop="a/crop1", class_="nuc", tp=0, fp=0, fn=0),
    ]
    console = Console(width=170, record=True, file=io.StringIO())
    console.print(score_table(summarize(rows, "m")))
    text = console.export_text()
    assert "over-predicting: decode.thresholds or loss.tversky_alpha up" in text
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in lines] == ["mito", "er", "nuc", "mean"]
    assert "weak over-predicting" in lines[1]
    assert "0.250 ± 0.118" in lines[1]
    assert "absent" in lines[2]
    assert "critical" not in lines[2]
    assert "0.400" in lines[3], "precision of all voxels: 120 of 300"
    assert "0.857" in lines[3], "recall of all voxels: 120 of 140"
