"""What a scored run changes in the next plan: each change quotes the number that asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_planner import facts, machine

from autoseg.errors import PlanError
from autoseg.plan import make_plan
from autoseg.plan.evidence import Evidence, Round, read_evidence
from autoseg.plan.rules_scores import advise
from autoseg.schema import ClassScore, ClassShape, Fingerprint, Plan, Quantiles, Scores, save

CLASSES = ("mito", "pm", "ves")
FACTS = facts(classes=CLASSES)
PLAN = make_plan("before", FACTS, machine(), {"budget_s": 600.0})
GOOD = ClassScore(dice=0.9, iou=0.82, precision=0.9, recall=0.9)
LEVEL = (1.0,) * 100


def score(precision: float | None, recall: float) -> ClassScore:
    return ClassScore(dice=0.5, iou=0.4, precision=precision, recall=recall)


def evidence(plan: Plan = PLAN, scores: dict[str, ClassScore] | None = None, **changes: Any) -> Evidence:
    """Return a run that ended as planned, had levelled off, and scored well but for what is changed."""
    steady = tuple(Round(step, 0.8, dict.fromkeys(CLASSES, 0.8)) for step in (25, 50, 75, 100))
    per_class = dict.fromkeys(CLASSES, GOOD) | (scores or {})
    judged = Scores(metric="voxel-overlap-1", rows=(), per_class=per_class, mean_dice=0.8, mean_iou=0.7, run="runs/a")
    found = Evidence(judged, plan, 100, 100, 0, plan.optimizer.learning_rate, LEVEL, steady)
    return found._replace(**changes)


def rounds(*means: float, **of_class: tuple[float, ...]) -> tuple[Round, ...]:
    steps = [100 * (i + 1) // len(means) for i in range(len(means))]
    dice = [{name: of_class.get(name, means)[i] for name in CLASSES} for i in range(len(means))]
    return tuple(Round(step, mean, found) for step, mean, found in zip(steps, means, dice, strict=True))


def test_a_good_run_changes_nothing() -> None:
    assert advise(evidence(), FACTS) == {}
    again = make_plan("before", FACTS, machine(), {"budget_s": 600.0}, evidence())
    assert again == PLAN


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"losses": (1.0,) * 90 + (0.9,) * 10}, "from 1 to 0.9"),
        ({"rounds": rounds(0.5, 0.6, 0.7, 0.8)}, "from 0.700 to 0.800"),
        ({"peak_rate": 1e-5}, "1e-05"),
    ],
)
def test_a_run_that_was_too_short_is_only_made_longer(changes: dict[str, Any], quoted: str) -> None:
    poor = evidence(scores=dict.fromkeys(CLASSES, score(0.2, 0.9)), **changes)
    assert set(advise(poor, FACTS)) == {"budget_s"}
    plan = make_plan("next", FACTS, machine(), {}, poor)
    assert plan.budget_s == 1200
    assert plan.loss == PLAN.loss
    (reason,) = [reason for reason in plan.reasons if reason.field == "budget_s"]
    assert quoted in reason.because
    assert "runs/a" in reason.source


def test_a_run_that_was_stopped_is_to_be_finished_first() -> None:
    advice = advise(evidence(num_done=40), FACTS)
    assert advice["budget_s"].value == 600
    assert "40 of 100 steps" in advice["budget_s"].because


def test_classes_called_too_often_weigh_false_positives_or_get_a_higher_threshold() -> None:
    most = make_plan("n", FACTS, machine(), {}, evidence(scores={"mito": score(0.4, 0.9), "pm": score(0.5, 0.95)}))
    assert (most.loss.kind, most.loss.tversky_alpha, most.loss.tversky_beta) == ("tversky", 0.7, pytest.approx(0.3))
    assert most.loss.tversky_weight == 1, "what follows from the kind of loss follows"
    reason = next(reason for reason in most.reasons if reason.field == "loss.kind")
    assert "mito: precision 0.400, recall 0.900" in reason.because
    few = make_plan("n", FACTS, machine(), {}, evidence(scores={"mito": score(0.4, 0.9)}))
    assert few.loss == PLAN.loss
    assert few.decode.thresholds == PLAN.decode.thresholds | {"mito": 0.65}


def test_classes_called_too_seldom_weigh_false_negatives() -> None:
    plan = make_plan("n", FACTS, machine(), {}, evidence(scores={"mito": score(0.9, 0.4), "pm": score(0.95, 0.5)}))
    assert (plan.loss.kind, plan.loss.tversky_alpha, plan.loss.tversky_beta) == ("tversky", 0.3, pytest.approx(0.7))


def test_a_class_never_found_is_drawn_more_weighs_more_and_gets_a_focal_loss() -> None:
    lost = evidence(scores={"ves": score(None, 0.0)})
    plan = make_plan("n", FACTS, machine(), {}, lost)
    assert plan.class_weights == {"mito": 1.0, "pm": 1.0, "ves": 2.0}
    assert plan.sampling.class_floor > PLAN.sampling.class_floor
    assert (plan.loss.kind, plan.loss.focal_gamma) == ("focal_dice", 3.0)
    again = make_plan("n", FACTS, machine(), {}, lost._replace(plan=plan))
    assert (again.class_weights["ves"], again.loss.focal_gamma) == (4.0, 5.0)
    third = make_plan("n", FACTS, machine(), {}, lost._replace(plan=again))
    assert third.class_weights["ves"] == 5.0, "weights are clamped"
    assert third.sampling.class_floor * len(CLASSES) <= third.sampling.class_centred_fraction


def test_swings_lower_the_rate_or_smooth_the_overlap() -> None:
    rate = PLAN.optimizer.learning_rate
    late = advise(evidence(rounds=rounds(0.8, 0.8, 0.8, 0.8, pm=(0.8, 0.5, 0.8, 0.6))), FACTS)
    assert late["optimizer.learning_rate"].value == rate / 2
    assert "pm by 0.30" in late["optimizer.learning_rate"].because
    early = advise(evidence(rounds=rounds(0.7, 0.5, 0.8, 0.8)), FACTS)
    assert early["loss.smooth"].value == 10
    assert "0.200" in early["loss.smooth"].because
    skipped = advise(evidence(num_skipped=3), FACTS)
    assert skipped["optimizer.learning_rate"].value == rate / 2
    assert "3 of 100 steps" in skipped["optimizer.learning_rate"].because


def test_a_class_thicker_than_half_a_patch_gets_a_larger_patch_where_crops_are_large_enough() -> None:
    def thick(found: Fingerprint) -> Fingerprint:
        width = Quantiles(p10=400, p50=800, p90=900)
        shape = ClassShape(
            name="mito",
            thickness_nm=width,
            in_plane=True,
            thickness_cut_share=0.0,
            num_instances=1,
            num_instances_cut=0,
            instance_nm3=None,
            sampled_crops=1,
            sampled_voxels=1,
        )
        return msgspec.structs.replace(found, shapes=(shape,))

    badly = evidence(scores={"mito": score(0.4, 0.9)})
    assert advise(badly, thick(FACTS))["patch_size_zyx"].value == (1, 256, 256)
    small = thick(facts((20, 200, 200), classes=CLASSES))
    assert "patch_size_zyx" not in advise(badly, small)
    assert "patch_size_zyx" not in advise(badly, FACTS)


def test_how_long_is_the_user_s_to_say_and_stands_in_one_place() -> None:
    steps = make_plan("n", FACTS, machine(), {"optimizer.num_steps": 500})
    rising = evidence(steps, rounds=rounds(0.5, 0.6, 0.7, 0.8))
    longer = make_plan("n", FACTS, machine(), {}, rising)
    assert (longer.optimizer.num_steps, longer.budget_s) == (1000, None)
    timed = make_plan("n", FACTS, machine(), {"budget_s": 3600.0}, rising)
    assert timed.budget_s == 3600
    assert timed.optimizer.num_steps is None


def test_the_next_plan_starts_from_what_the_user_had_set() -> None:
    before = make_plan("n", FACTS, machine(), {"budget_s": 600.0, "loss.kind": "bce", "class_weights.*": {"pm": 2.0}})
    again = make_plan("n", FACTS, machine(), {}, evidence(before))
    assert msgspec.structs.replace(again, reasons=()) == msgspec.structs.replace(before, reasons=())
    lost = make_plan("n", FACTS, machine(), {}, evidence(before, scores={"ves": score(None, 0.0)}))
    assert lost.loss.kind == "focal_dice", "what the scores ask for goes before what was set then"


def test_advice_fits_the_new_plan_and_rules_do_not_mix() -> None:
    many = tuple(f"c{k}" for k in range(48))
    wide = facts(classes=(*CLASSES, *many))
    lost = evidence(scores=dict.fromkeys(CLASSES, score(None, 0.0)))
    plan = make_plan("n", wide, machine(), {}, lost)
    assert plan.sampling.class_floor * len(plan.classes) <= plan.sampling.class_centred_fraction
    both = evidence(scores={"ves": score(None, 0.0), "mito": score(0.4, 0.9), "pm": score(0.4, 0.9)})
    advice = advise(both, FACTS)
    assert advice["loss.kind"].value == "focal_dice"
    assert "loss.tversky_alpha" not in advice


def test_the_user_has_the_last_word() -> None:
    lost = evidence(scores={"ves": score(None, 0.0)})
    settings = {"loss.kind": "bce", "class_weights.*": {"ves": 3.0}}
    plan = make_plan("n", FACTS, machine(), settings, lost)
    assert plan.loss.kind == "bce"
    assert plan.class_weights["ves"] == 3.0


def test_evidence_is_read_from_the_scores_and_the_run_that_they_name(tmp_path: Path) -> None:
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    save(PLAN, run / "plan.json")
    lines = [
        {"step": 1, "loss": 2.0, "learning_rate": 1e-3},
        {"step": 2, "loss": None, "learning_rate": 3e-3, "skipped": True},
        {"step": 3, "loss": 1.0, "learning_rate": 1e-3, "mean_dice": 0.5, "dice": {"mito": 0.5, "pm": None}},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "adaptations.jsonl").write_text(json.dumps({"event": "length", "num_steps": 9}) + "\n")
    save(evidence().scores, run / "scores.json")
    found = read_evidence(run / "scores.json")
    assert (found.num_steps, found.num_done, found.num_skipped, found.peak_rate) == (9, 3, 1, 3e-3)
    assert found.losses == (2.0, 1.0)
    assert found.rounds == (Round(3, 0.5, {"mito": 0.5, "pm": None}),)
    assert found.plan == PLAN


def test_scores_of_no_run_or_of_one_that_is_gone_are_refused(tmp_path: Path) -> None:
    save(evidence().scores, tmp_path / "scores.json")
    with pytest.raises(PlanError, match="runs/a, which is not here"):
        read_evidence(tmp_path / "scores.json")
    save(msgspec.structs.replace(evidence().scores, run=None), tmp_path / "scores.json")
    with pytest.raises(PlanError, match="names no run"):
        read_evidence(tmp_path / "scores.json")
