"""The demo: the whole job on tiny volumes, and (slow) the promise that it learns what no threshold can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_planner import TINY, cheap_trace, tiny_facts_plan

from autoseg.errors import PlanError
from autoseg.evaluate import summarize
from autoseg.plan import make_plan, rules_machine
from autoseg.recipes import demo, speed
from autoseg.schema import Outcome, Plan, ScoreRow, Scores, load_as

TRAINING = (
    demo.Piece("cells-a", (24, 96, 192), demo.CUBIC, 1, (1, 1, 2), demo.EVERY_CLASS),
    demo.Piece("cells-b", (24, 96, 96), demo.CUBIC, 2, (1, 1, 1), ("nuc", "mito", "er", "pm")),
)
UNSEEN = (demo.Piece("unseen", (24, 96, 96), demo.CUBIC, 3, (1, 1, 1), demo.EVERY_CLASS),)


def test_the_demo_goes_from_nothing_to_scores_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny(name: str, facts: Any, machine: Any, settings: Any) -> Plan:
        return make_plan(name, facts, machine, settings | TINY | {"num_workers": 0})

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TRAINING", TRAINING)
    monkeypatch.setattr(demo, "UNSEEN", UNSEEN)
    monkeypatch.setattr(demo, "plan_here", tiny)
    monkeypatch.setattr(rules_machine, "trace_step", cheap_trace)
    monkeypatch.setattr(speed, "TRIAL_S", 0.0)
    folder, told, plans = tmp_path / "demo", list[str](), list[Plan]()
    try:
        made = demo.run_demo(folder, tell=told.append, planned=plans.append, budget_s=50.0)
    finally:
        rules_machine._cached_cost.cache_clear()
    assert made is not None
    assert plans == [made.plan]
    assert [text.split()[0] for text in told] == ["making", "making", "scoring", "note:"]
    assert "does not beat the" in told[-1], "so few steps are no success"
    assert "8 steps in 50 s are too few" in told[-1]
    assert load_as(folder / "scores.json", Scores) == made.scores
    assert {row.crop for row in made.scores.rows} == {"unseen/crop1"}
    assert set(made.scores.per_class) == set(made.by_threshold) == set(demo.EVERY_CLASS)
    assert max(value or 0 for value in made.by_threshold.values()) > 0.1, "grey values tell something"
    again = demo.run_demo(folder, tell=told.append)
    assert again == made, "what is finished is kept, whatever the default budget is"
    assert len(told) == 6
    with pytest.raises(PlanError, match=r"was planned for 50 s of training, not 60: leave out --budget"):
        demo.run_demo(folder, budget_s=60.0)


def test_a_demo_that_beats_grey_values_is_left_without_a_remark() -> None:
    scores = summarize([ScoreRow(crop="a/crop1", class_="pm", tp=8, fp=2, fn=2)], "m")
    outcome = Outcome(Path("run"), 40, 40, 0.5, 0.5, None)
    plan = tiny_facts_plan()
    assert demo._shortfall(scores, {"pm": 0.79}, plan, outcome) is None
    assert "Dice of 0.800 does not beat the 0.810" in str(demo._shortfall(scores, {"pm": 0.81}, plan, outcome))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_learns_what_no_grey_value_threshold_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = demo.run_demo(tmp_path / "demo")
    assert made is not None
    assert made.scores.mean_dice is not None
    by_threshold = [value for value in made.by_threshold.values() if value is not None]
    assert made.scores.mean_dice >= 0.6
    assert made.scores.mean_dice >= sum(by_threshold) / len(by_threshold) + 0.2
