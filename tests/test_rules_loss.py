"""The loss follows how rare and how thin classes are; a plan's step time follows the speed of its own steps."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from test_planner import TINY, cheap, facts, machine, reason, thick

from autoseg.plan import cost_of, make_plan
from autoseg.plan.rules_loss import occurrences_of
from autoseg.plan.weighting import STRATEGIES
from autoseg.recipes import speed
from autoseg.recipes.speed import measure_step_gflops, plan_here
from autoseg.schema import ClassCount, Fingerprint, Plan, Weighting


def filling(**shares: float) -> Fingerprint:
    """Return facts of classes that fill these shares of the voxels in which they are known."""
    found = facts(classes=tuple(shares))
    total = 20 * 512 * 512
    counts = {
        name: ClassCount(absent=total - round(share * total), present=round(share * total), unknown=0)
        for name, share in shares.items()
    }
    crops = tuple(msgspec.structs.replace(crop, counts=counts) for crop in found.crops)
    return msgspec.structs.replace(found, crops=crops)


def source(plan: Plan, field: str) -> str:
    return next(r.source for r in plan.reasons if r.field == field)


@cheap
@pytest.mark.parametrize(
    ("shares", "kind", "unmeasured"),
    [
        pytest.param({"nuc": 0.4, "ecs": 0.3}, "dice_bce", True, id="balanced"),
        pytest.param({"pm": 0.18, "mito": 0.04, "synapse": 0.0044}, "dice_bce", False, id="as-VNC"),
        pytest.param({"nuc": 0.3, "mito_ribo": 0.0004}, "focal_dice", True, id="very-rare"),
        pytest.param({"mito": 0.1}, "dice_bce", False, id="one-class"),
    ],
)
def test_the_loss_follows_the_share_of_the_rarest_class(shares: dict[str, float], kind: str, unmeasured: bool) -> None:
    plan = make_plan("a", filling(**shares), machine(), {})
    assert plan.loss.kind == kind
    assert ("unmeasured" in source(plan, "loss.kind")) == unmeasured
    rarest = min(shares, key=shares.__getitem__)
    assert f"{rarest} fills {100 * shares[rarest]:.3g}%" in reason(plan, "loss.kind")
    terms = (plan.loss.bce_weight, plan.loss.dice_weight, plan.loss.focal_weight)
    assert terms == ((1.0, 1.0, 0.0) if kind == "dice_bce" else (0.0, 0.5, 0.5))


@cheap
def test_a_thin_class_is_named_with_the_voxels_it_spans() -> None:
    thin = make_plan("a", thick(filling(pm=0.1, mito=0.1), pm=13.8, mito=200.0), machine(), {})
    assert "pm spans 3.0 voxels" in reason(thin, "loss.kind")
    wide = make_plan("a", thick(filling(pm=0.1, mito=0.1), pm=100.0, mito=200.0), machine(), {})
    assert "spans" not in reason(wide, "loss.kind")


@cheap
def test_classes_weigh_alike_unless_nothing_evens_them_out_and_then_within_bounds() -> None:
    found = filling(pm=0.16, mito=0.04, synapse=0.00001)
    assert set(make_plan("a", found, machine(), {}).class_weights.values()) == {1.0}
    plan = make_plan("a", found, machine(), {"sampling.class_centred_fraction": 0.0})
    weights = plan.class_weights
    assert plan.class_weighting == "sqrt_inverse_median"
    assert weights == pytest.approx({"pm": 0.5, "mito": 1.0, "synapse": 3.0}), "root of 1/4, median, cut"
    assert "0.000992% of synapse to 16% of pm" in reason(plan, "class_weights")
    asked = {"sampling.class_centred_fraction": 0.0, "class_weights.*": {"pm": 9.0}}
    assert make_plan("a", found, machine(), asked).class_weights == pytest.approx({"pm": 9.0, "mito": 1, "synapse": 3})


@cheap
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_can_be_asked_for(name: str) -> None:
    found = filling(pm=0.16, mito=0.04, synapse=0.004)
    plan = make_plan("a", found, machine(), {"class_weighting": name})
    assert plan.class_weights == STRATEGIES[name](occurrences_of(found, ["pm", "mito", "synapse"]))
    assert reason(plan, "class_weights").startswith(name)
    assert ("this is uniform" in reason(plan, "class_weights")) == name.startswith("effective")


def test_the_plan_knows_every_strategy() -> None:
    assert set(get_args(Weighting)) == set(STRATEGIES)


@cheap
def test_weighted_ce_weighs_classes_and_balanced_softmax_has_their_shares() -> None:
    found = filling(pm=0.16, mito=0.04)
    weighted = make_plan("a", found, machine(), {"loss.kind": "weighted_ce"})
    assert (weighted.class_weighting, weighted.loss.bce_weight) == ("sqrt_inverse_median", 1)
    assert weighted.class_weights["mito"] > weighted.class_weights["pm"]
    balanced = make_plan("a", found, machine(), {"loss.kind": "balanced_softmax"})
    assert balanced.loss.priors == {"pm": pytest.approx(0.16), "mito": pytest.approx(0.04)}
    assert "pm 0.16, mito 0.04" in reason(balanced, "loss.priors")
    assert make_plan("a", found, machine(), {}).loss.priors == {}


# ---- seconds of a step ---------------------------------------------------------------------------------------


def test_a_plan_for_the_machine_at_hand_knows_the_speed_of_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "TRIAL_S", 0.1)
    hardware = msgspec.structs.replace(machine(threads=1), step_gflops=None)
    plan = plan_here("a", facts(), hardware, TINY)
    assert set(plan.hardware.step_gflops or {}) == {plan.precision}
    gflops = (plan.hardware.step_gflops or {})[plan.precision]
    flops = plan.batch_size * plan.accumulate_batches * cost_of(plan).patch_flops
    assert plan.predicted_step_s == pytest.approx(1.07 * flops / gflops / 1e9)
    again = make_plan("a", facts(), plan.hardware, TINY)
    assert again == plan, "a function of its records"
    assert 0.2 < measure_step_gflops(plan) / gflops < 5, "the same steps, timed again"
