"""What the terminal says of a plan: every decision in a table, and the whole of it in one sentence."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_planner import facts, tiny_facts_plan

from autoseg.errors import counted
from autoseg.evaluate import summarize
from autoseg.report import data_tables, terminal
from autoseg.report.terminal import plan_summary, plan_table
from autoseg.schema import ClassCount, ClassShape, Outcome, Quantiles, ScoreRow


def test_the_summary_of_a_plan_says_what_is_trained_and_how_long() -> None:
    plan = msgspec.structs.replace(tiny_facts_plan(), budget_s=600.0, predicted_step_s=0.4, input_slices=3)
    text = plan_summary(plan)
    assert f"{len(plan.classes)} classes at {plan.voxel_size_nm[0]:g} x" in text
    assert f"2.5D {plan.network.kind} of {len(plan.network.features)} levels" in text
    assert f"{len(plan.split.train)} regions train, {len(plan.split.validate)} validate" in text
    optimizer = msgspec.structs.replace(plan.optimizer, num_steps=None)
    assert "600 s (about 1,500 steps)" in plan_summary(msgspec.structs.replace(plan, optimizer=optimizer))
    optimizer = msgspec.structs.replace(plan.optimizer, num_steps=1234)
    fixed = plan_summary(msgspec.structs.replace(plan, optimizer=optimizer))
    assert "1,234 steps" in fixed
    assert "600 s" not in fixed


def test_the_table_of_a_plan_shows_each_reason_with_its_source() -> None:
    plan = tiny_facts_plan()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    text = console.export_text()
    for reason in plan.reasons[:5]:
        assert reason.field in text
        assert f"({reason.source})" in " ".join(text.split())


def test_brackets_and_colons_of_paths_and_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    scores = summarize([ScoreRow(crop="a/crop1", class_="[/er]", tp=1, fp=0, fn=0)], "m")
    console = terminal.make_console()
    console.print("wrote runs/[v2]/x [/x] :warning:")
    console.print(terminal.score_table(scores, title="runs/[v2] on [/data]"))
    console.print(terminal.change_table(scores, scores, "against [/old]"))
    with terminal.progress(console) as progress:
        progress("[/crop]", 1, 2)
    text = capsys.readouterr().err
    assert "wrote runs/[v2]/x [/x] :warning:" in text
    for name in ("runs/[v2] on [/data]", "[/er]", "against [/old]"):
        assert name in text


@given(st.integers(0, 10**15))
def test_a_magnitude_has_three_digits_and_the_size_of_the_number(count: int) -> None:
    text = terminal.magnitude(count)
    figures, _, unit = text.partition(" ")
    assert len(figures) <= 5
    assert float(figures) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit] == pytest.approx(count, rel=0.005)


def test_the_fingerprint_fits_a_terminal_of_80_columns() -> None:
    found = facts(classes=("canalicular_channel", "er"), crops=289)
    large = ClassCount(absent=10**9, present=10**8, unknown=0)
    many = tuple(msgspec.structs.replace(crop, counts=dict.fromkeys(crop.counts, large)) for crop in found.crops)
    shape = ClassShape(
        name="canalicular_channel",
        thickness_nm=Quantiles(p10=123, p50=150, p90=234),
        in_plane=True,
        thickness_cut_share=0.0,
        num_instances=1234,
        num_instances_cut=567,
        instance_nm3=None,
        sampled_crops=2,
        sampled_voxels=10,
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(data_tables.class_table(msgspec.structs.replace(found, crops=many, shapes=(shape,))))
    text = console.export_text()
    assert "~150 (123–234)" in text
    assert "1,234 + 567" in text
    for name in ("known", "positive", "share", "crops", "thickness nm", "instances"):
        assert name in text, "no header is cut"
    assert "289/289" in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("later", "says"),
    [
        (9.0, "the loss rose at the end, from 0.1 to 9"),
        (
            0.05,
            "was still falling: to train longer, plan again with a longer --budget, and train that into another --run",
        ),
        (0.1, "had levelled off"),
    ],
)
def test_the_verdict_says_where_the_loss_went_at_the_end(later: float, says: str) -> None:
    outcome = Outcome(Path("run"), 60, 60, 0.5, 0.5, None)
    assert says in terminal.verdict(outcome, [1.0] * 48 + [0.1] * 6 + [later] * 6, [0.5])


@pytest.mark.parametrize("dice", [[0.5], [0.1, 0.5]])
def test_curves_of_a_few_steps_are_not_judged(dice: list[float]) -> None:
    for steps, said in ((1, "done: 1 step, "), (3, "done: 3 steps, "), (49, "done: 49 steps, ")):
        text = terminal.verdict(Outcome(Path("run"), steps, steps, 0.5, 0.5, None), [0.5] * steps, dice)
        assert text == f"{said}best validation Dice 0.500; too few steps to judge the curves"


def test_numbers_that_belong_together_are_one_word_and_are_not_broken_at_80_columns() -> None:
    plan = msgspec.structs.replace(tiny_facts_plan(), voxel_size_nm=(40.0, 11.8, 11.8))
    network = msgspec.structs.replace(plan.network, strides_zyx=((1, 2, 2), (1, 2, 2)))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(plan_table(msgspec.structs.replace(plan, network=network)))
    text = console.export_text()
    assert " 40x11.8x11.8 " in text
    assert terminal.field_text("network.strides_zyx", network.strides_zyx) == "1x2x2 1x2x2"
    assert terminal.field_text("network.features", (16, 32, 64)) == "16 32 64"


def test_one_of_a_thing_is_no_plural() -> None:
    assert [counted(n, "class") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert [counted(n, "voxel", "have") for n in (1, 1234)] == ["1 voxel has", "1,234 voxels have"]
    assert [counted(n, "patch", "need") for n in (1, 2)] == ["1 patch needs", "2 patches need"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(data_tables.class_table(facts(crops=1)))
    assert "1 crop in 1 volume;" in console.export_text()


def test_grey_values_are_no_decision_threshold() -> None:
    scores = summarize([ScoreRow(crop="a/crop1", class_="er", tp=1, fp=0, fn=0)], "m")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal.score_table(scores, {"er": 0.3}))
    text = console.export_text()
    assert "grey value" in text
    assert "threshold" not in text
