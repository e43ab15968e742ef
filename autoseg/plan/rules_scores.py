"""Rules that look at a scored run: what to change in the next plan, each with the number that asks for it.

Training comes first: a run that was cut short, never left its warm-up or was still improving says nothing about loss,
weights or sampling, so only its length changes. The thresholds are far outside the noise of repeated runs (sd of .013
of the mean Dice, .02 to .03 of a class, in the CellMap experiments of Shan-CU); which change helps is the decision
tree of those experiments, and unmeasured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from autoseg.errors import counted
from autoseg.plan.draft import Choice, Draft
from autoseg.plan.evidence import Evidence
from autoseg.schema import ClassScore, Fingerprint

STILL_FALLING = 0.98
RISING = 0.026  # twice the noise of the mean Dice
SWING = 0.05
CLASS_SWING = 0.1
LOPSIDED = 0.2
NEVER_FOUND = 0.05
SKIPPED_SHARE = 0.001
MOST_WEIGHT = 5.0
RAISED_THRESHOLD = 0.65

Advice = dict[str, Choice]


def advise(evidence: Evidence, fingerprint: Fingerprint) -> Advice:
    """Return what to change, by field of the plan; empty if the run gives no cause."""
    advice = _skipped(evidence)
    length = _undertrained(evidence)
    if length:
        return advice | length
    for rule in (_unstable_early, _never_found, _lopsided, _unstable_classes, _cut_by_patch):
        found = rule(evidence, fingerprint)
        if not advice.keys() & found.keys():  # of two rules that want one field the first is followed, as a whole
            advice |= found
    return advice


def _undertrained(evidence: Evidence) -> Advice:
    """Ask for a longer run where the rate never peaked, the run was cut, or it still improved at its end."""
    plan, done, planned = evidence.plan, evidence.num_done, evidence.num_steps
    rate = plan.optimizer.learning_rate
    if evidence.peak_rate < 0.9 * rate:
        never = f"the run never left its warm-up ({counted(done, 'step')})"
        what = f"the rate reached {evidence.peak_rate:.2g} of {rate:.2g}: {never}"
        return _longer(evidence, what)
    if done < planned:
        what = f"the run ended after {done} of {planned} steps, so its rate never came down; finish it first"
        return _longer(evidence, what, factor=1)
    means = [found.mean_dice for found in evidence.rounds]
    if len(means) > 2 and means[-1] > max(means[:-1]) + RISING:
        return _longer(evidence, f"validation Dice still rose, from {max(means[:-1]):.3f} to {means[-1]:.3f}")
    tenth = max(1, len(evidence.losses) // 10)
    before, after = (_mean(evidence.losses[-2 * tenth : -tenth]), _mean(evidence.losses[-tenth:]))
    if before is not None and after is not None and after < STILL_FALLING * before:
        return _longer(evidence, f"the loss still fell, from {before:.3g} to {after:.3g} in the last tenth of the run")
    return {}


def _longer(evidence: Evidence, what: str, factor: int = 2) -> Advice:
    budget, steps = evidence.plan.budget_s, evidence.plan.optimizer.num_steps
    if steps is not None:
        return {"optimizer.num_steps": _choice(evidence, factor * steps, what)}
    return {"budget_s": _choice(evidence, factor * (budget or 0.0), what)}


def _skipped(evidence: Evidence) -> Advice:
    share = evidence.num_skipped / max(1, evidence.num_done)
    if share <= SKIPPED_SHARE:
        return {}
    rate = evidence.plan.optimizer.learning_rate
    what = f"{evidence.num_skipped} of {evidence.num_done} steps had no finite gradients and were skipped"
    return {"optimizer.learning_rate": _choice(evidence, rate / 2, what)}


def _unstable_early(evidence: Evidence, _: Fingerprint) -> Advice:
    """Smooth the overlap where the mean Dice fell by more than noise between rounds of the first half."""
    early = [found.mean_dice for found in evidence.rounds if found.step <= evidence.num_done / 2]
    fall = max((a - b for a, b in itertools.pairwise(early)), default=0.0)
    loss = evidence.plan.loss
    if fall <= SWING or not any((loss.dice_weight, loss.tversky_weight, loss.unified_weight)) or loss.smooth >= 10:
        return {}
    return {"loss.smooth": _choice(evidence, 10.0, f"validation Dice fell by {fall:.3f} between two early rounds")}


def _never_found(evidence: Evidence, _: Fingerprint) -> Advice:
    """Show more of the classes that were never found, weigh them more, and turn to what is hard."""
    lost = _classes(evidence, lambda s: s.recall is not None and s.recall < NEVER_FOUND)
    if not lost:
        return {}
    plan = evidence.plan
    what = "; ".join(f"{name}: recall {evidence.scores.per_class[name].recall:.3f}" for name in lost)
    weights = {n: min(MOST_WEIGHT, w * (2 if n in lost else 1)) for n, w in plan.class_weights.items()}

    def floor(draft: Draft) -> float:
        most: float = draft["sampling.class_centred_fraction"] / len(draft["classes"])
        return min(most, 2 * plan.sampling.class_floor)

    gamma = 5.0 if plan.loss.kind == "focal_dice" and plan.loss.focal_gamma >= 3 else 3.0
    return {
        "class_weights": _choice(evidence, weights, what),
        "sampling.class_floor": _choice(evidence, floor, what),
        "loss.kind": _choice(evidence, "focal_dice", what),
        "loss.focal_gamma": _choice(evidence, gamma, what),
    }


def _lopsided(evidence: Evidence, _: Fingerprint) -> Advice:
    """Weigh the error that most classes make; where few are called too often, raise their thresholds."""
    over = _classes(evidence, lambda s: _lean(s) > LOPSIDED)
    under = _classes(evidence, lambda s: _lean(s) < -LOPSIDED and (s.recall or 0) >= NEVER_FOUND)
    half = len(evidence.plan.classes) / 2
    for names, alpha in ((over, 0.7), (under, 0.3)):
        if len(names) >= half:
            what = _quote(evidence, names)
            side = "false positives" if alpha > 0.5 else "false negatives"
            return {
                "loss.kind": _choice(evidence, "tversky", f"{what}: {side} weigh more"),
                "loss.tversky_alpha": _choice(evidence, alpha, what),
                "loss.tversky_beta": _choice(evidence, 1 - alpha, what),
            }
    if not over:
        return {}
    thresholds = evidence.plan.decode.thresholds
    raised = {n: max(t, RAISED_THRESHOLD) if n in over else t for n, t in thresholds.items()}
    return {"decode.thresholds": _choice(evidence, raised, _quote(evidence, over))}


def _unstable_classes(evidence: Evidence, _: Fingerprint) -> Advice:
    """Lower the rate where the Dice of a class swung by far more than noise in the last rounds."""
    swings = {}
    for name in evidence.plan.class_names:
        last = [dice for found in evidence.rounds[-3:] if (dice := found.dice.get(name)) is not None]
        if len(last) == 3:
            swings[name] = max(last) - min(last)
    unstable = {name: swing for name, swing in swings.items() if swing > CLASS_SWING}
    if not unstable:
        return {}
    what = ", ".join(f"{name} by {swing:.2f}" for name, swing in unstable.items())
    rate = evidence.plan.optimizer.learning_rate / 2
    return {"optimizer.learning_rate": _choice(evidence, rate, f"in the last three validations Dice swung: {what}")}


def _cut_by_patch(evidence: Evidence, fingerprint: Fingerprint) -> Advice:
    """Enlarge the patch where a badly scored class is thicker than half of it: it never sees both of its sides."""
    plan = evidence.plan
    _, edge_y, edge_x = (n * v for n, v in zip(plan.patch_size_zyx, plan.voxel_size_nm, strict=True))
    thick = {s.name: s.thickness_nm.p50 for s in fingerprint.shapes if s.thickness_nm is not None}
    worst = _classes(evidence, lambda s: abs(_lean(s)) > LOPSIDED)
    cut = [name for name in worst if thick.get(name, 0) > min(edge_y, edge_x) / 2]
    if not cut:
        return {}
    z, y, x = plan.patch_size_zyx
    crops = sorted(min(crop.grid.at_voxel_size(plan.voxel_size_nm).shape_zyx[1:]) for crop in fingerprint.crops)
    if crops[len(crops) // 2] < 2 * max(y, x):
        return {}
    what = f"{cut[0]} is {thick[cut[0]]:.0f} nm thick, more than half of a patch of {min(edge_y, edge_x):.0f} nm"
    return {"patch_size_zyx": _choice(evidence, (z, 2 * y, 2 * x), f"{_quote(evidence, cut[:1])}, and {what}")}


def _classes(evidence: Evidence, wanted: Callable[[ClassScore], bool]) -> list[str]:
    """Return the plan's classes that have true voxels, and of whose score that holds."""
    scores = evidence.scores.per_class
    return [n for n in evidence.plan.class_names if n in scores and scores[n].recall is not None and wanted(scores[n])]


def _lean(score: ClassScore) -> float:
    """Return recall less precision: positive where a class is called too often."""
    return 0.0 if score.precision is None or score.recall is None else score.recall - score.precision


def _quote(evidence: Evidence, names: list[str]) -> str:
    scores = evidence.scores.per_class
    return "; ".join(f"{n}: precision {scores[n].precision:.3f}, recall {scores[n].recall:.3f}" for n in names)


def _choice(evidence: Evidence, value: Any, what: str) -> Choice:
    return Choice(value, what, f"scores of {evidence.scores.run}; the remedy is unmeasured")


def _mean(values: tuple[float, ...]) -> float | None:
    return sum(values) / len(values) if values else None
