"""What the terminal says of a plan: every decision in a table, and the whole of it in one sentence."""

from __future__ import annotations

import io

import msgspec
from rich.console import Console
from test_planner import tiny_facts_plan

from autoseg.report.terminal import plan_summary, plan_table


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
