"""Rules of the loss: its kind, its parameters, the weight of each class, from how rare the classes are.

The decision tree is that of the CellMap loss experiments (Shan-CU), with numbers in place of words; where a run of
ours contradicts it, the run is followed (tests/benchmarks/README.md has them)::

    share of the rarest class      the tree                   here
    over 20 %                      cross-entropy              dice_bce: cross-entropy alone was last in every comparison
    0.1 % to 20 %                  focal_dice, weights        dice_bce without weights: as good, and weights did harm
    below 0.1 %                    focal_dice, weights        focal_dice, unmeasured
    a scored run calls a class
    too often or too seldom        focal, Tversky             rules_scores.py
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from autoseg.errors import counted
from autoseg.plan.draft import Choice, Draft
from autoseg.plan.rules_data import share_of
from autoseg.plan.weighting import BETA_INSTANCES, Occurrence, saturated, weights_by
from autoseg.schema import Fingerprint, Loss

BALANCED, VERY_RARE = 0.2, 0.001
THIN_VOXELS = 4.0
NOMINAL_VOXELS = 10**9
MEASURED = "VNC, 1,000 steps, 3 seeds: dice_bce .763, focal_dice .765, tversky .73, bce .61, sd .003 to .023"
WEIGHTS_MEASURED = "VNC, 1,000 steps, 3 seeds: .763 alike, .670 by roots of inverse shares"
TREE = "decision tree of the CellMap loss experiments (Shan-CU)"
# The weights that a kind is made of. `per_class_*` are names of the origin experiments, where all other overlap was by
# sample: here all of it is of the whole batch unless `loss.per_sample`. With softmax `bce` is cross-entropy (`ce`).
LOSS_TERMS: dict[str, dict[str, float]] = {
    "bce": {"bce": 1.0},
    "weighted_ce": {"bce": 1.0},
    "focal": {"focal": 1.0},
    "dice": {"dice": 1.0},
    "dice_bce": {"dice": 1.0, "bce": 1.0},
    "focal_dice": {"focal": 0.5, "dice": 0.5},
    "tversky": {"tversky": 1.0},
    "focal_tversky": {"tversky": 1.0},
    "combo": {"bce": 0.3, "dice": 0.5, "focal": 0.2},
    "dice_topk": {"dice": 1.0, "topk": 1.0},
    "unified_focal": {"unified": 1.0},
    "per_class_tversky": {"tversky": 1.0},
    "per_class_combo": {"bce": 0.4, "dice": 0.6},
    "balanced_softmax": {"bce": 1.0},
    "seesaw": {"bce": 1.0},
}
LOSS_VALUES: dict[str, tuple[Any, str]] = {
    "focal_gamma": (2.0, "used by focal terms"),
    "focal_alpha": (None, "absent voxels count as much as present ones"),
    "tversky_alpha": (0.3, "weighs false positives"),
    "tversky_beta": (0.7, "weighs false negatives"),
    "tversky_exponent": (1.0, "of 1 - index"),
    "smooth": (1.0, "one voxel: keeps absent classes from exploding"),
    "topk_share": (0.1, "of the known voxels of a sample and class are its hardest"),
    "unified_lambda": (0.5, "focal part against overlap part"),
    "unified_delta": (0.6, "weighs what is missed against what is found wrongly"),
    "unified_gamma": (0.5, "suppresses easy background, enhances the class"),
    "per_sample": (False, "overlap is of the whole batch: a sample without the class teaches, too"),
    "activation": ("sigmoid", "classes overlap, or are annotated apart"),
    "balance_tau": (0.0, "no prior in the logits"),
    "seesaw_p": (0.0, "no mitigation"),
    "seesaw_q": (0.0, "no compensation"),
}
KIND_VALUES: dict[str, dict[str, Any]] = {
    "focal_tversky": {"tversky_exponent": 0.75},
    "balanced_softmax": {"activation": "softmax", "balance_tau": 1.0},
    "seesaw": {"activation": "softmax", "seesaw_p": 0.8, "seesaw_q": 2.0},
}


def choose_loss(draft: Draft) -> Choice:
    """Return the kind of loss."""
    found = {e.name: known for e in draft["classes"] if (known := share_of(draft, e.name)) is not None}
    if not found:
        return Choice("dice_bce", f"nobody counted the classes{_thin(draft)}", MEASURED)
    rarest, commonest = (pick(found, key=lambda name: found[name].share) for pick in (min, max))
    share, of_what = found[rarest]
    seen = f"{rarest} fills {_percent(share)} of {of_what}"
    seen += f", {commonest} {_percent(found[commonest].share)}" if rarest != commonest else ""
    seen += _thin(draft)
    if share >= BALANCED:
        because = f"{seen}: no class is rare, but cross-entropy alone misses the overlap that is scored"
        return Choice("dice_bce", because, f"{TREE} has cross-entropy here; unmeasured at such shares")
    if share >= VERY_RARE:
        return Choice("dice_bce", f"{seen}: the overlap that is scored, plus a gradient for every voxel", MEASURED)
    because = f"{seen}: under {VERY_RARE:.1%}, so easy voxels must not drown it"
    return Choice("focal_dice", because, f"{TREE}; unmeasured at such shares")


def _thin(draft: Draft) -> str:
    """Name the thinnest class where it spans few voxels: there the overlap hangs on single voxels."""
    names = {entry.name for entry in draft["classes"]}
    thickness = [(s.thickness_nm.p50, s.name) for s in draft.fingerprint.shapes if s.thickness_nm and s.name in names]
    if not thickness:
        return ""
    nm, name = min(thickness)
    across = nm / min(draft["voxel_size_nm"])
    return f"; {name} spans {across:.1f} voxels, so overlap alone would be unsteady" if across < THIN_VOXELS else ""


def choose_loss_field(draft: Draft, field: str) -> Choice:
    """Return one number of the loss: the weights its kind is made of, and its parameters."""
    kind = draft["loss.kind"]
    if field == "priors":
        return _priors(draft)
    if field.endswith("_weight"):
        return Choice(_value_of(kind, field), f"part of {kind}", "kind of loss")
    if field == "activation" and (draft.settings.get("loss.seesaw_p") or draft.settings.get("loss.seesaw_q")):
        return Choice("softmax", "seesaw compares classes that exclude each other", "kind of loss")
    if field in KIND_VALUES.get(kind, {}):
        return Choice(_value_of(kind, field), f"part of {kind}", "kind of loss")
    return Choice(_value_of(kind, field), LOSS_VALUES[field][1], "paper default")


def loss_values(kind: str) -> dict[str, Any]:
    """Return every field of a loss of that kind but its priors, as a plan has them."""
    fields = [name for name in Loss.__struct_fields__ if name not in ("kind", "priors")]
    return {"kind": kind} | {name: _value_of(kind, name) for name in fields}


def _value_of(kind: str, field: str) -> Any:
    if field.endswith("_weight"):
        return LOSS_TERMS[kind].get(field.removesuffix("_weight"), 0.0)
    return KIND_VALUES.get(kind, {}).get(field, LOSS_VALUES[field][0])


def _priors(draft: Draft) -> Choice:
    """Return the share of every class among its known voxels, where the logits are shifted by them."""
    set_by_user = draft.settings.get("loss.priors.*", {})
    if not draft["loss.balance_tau"] and not set_by_user:
        return Choice({}, "no prior in the logits", "paper default")
    names = [entry.name for entry in draft["classes"]]
    even = 1 / (len(names) + 1)  # of a class that nobody counted
    shares = {name: even if (found := share_of(draft, name)) is None else found.share for name in names}
    because = "shares of the known voxels: " + ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
    if set_by_user:
        return Choice(shares | set_by_user, f"set by the user for {', '.join(set_by_user)}; else {because}", "user")
    return Choice(shares, because, "counted")


def choose_class_weighting(draft: Draft) -> Choice:
    """Return how the weights of the classes follow from the data: not at all where sampling evens them out."""
    centred = draft["sampling.class_centred_fraction"]
    if draft["loss.kind"] == "weighted_ce":
        because = "weighted_ce is cross-entropy with weights"
        return Choice("sqrt_inverse_median", because, "kind of loss")
    if centred > 0:
        because = f"every class counts alike: {centred:.0%} of the patches are centred on classes, rare ones as often"
        return Choice("uniform", because, WEIGHTS_MEASURED)
    source = "CellMap class-weighting experiments (Shan-CU), one run: .562 by roots, .536 ± .013 of five without"
    return Choice("sqrt_inverse_median", "no patch is centred on a class, so nothing else evens them out", source)


def choose_class_balance_beta(_: Draft) -> Choice:
    """Return beta of the effective numbers of instances, which class_weighting=class_balanced uses."""
    return Choice(BETA_INSTANCES, "used by class_weighting=class_balanced", "Cui et al. 2019")


def choose_class_weights(draft: Draft) -> Choice:
    """Return one weight for every class; only their ratios matter, since the loss is divided by their sum."""
    strategy = draft["class_weighting"]
    found = occurrences_of(draft.fingerprint, [entry.name for entry in draft["classes"]], draft.dice)
    weights = weights_by(strategy, found, draft["class_balance_beta"])
    because = f"{strategy}: {_extremes(found)}"
    if strategy.startswith("effective") and saturated(found):
        because += "; effective numbers of so many voxels are all alike: this is uniform"
    if strategy == "manual":
        because += "; set by hand from a table that was an artefact of its evaluation"
    set_by_user = draft.settings.get("class_weights.*", {})
    if set_by_user:
        return Choice(weights | set_by_user, f"set by the user for {', '.join(set_by_user)}; else {because}", "user")
    return Choice(weights, because, "class_weighting")


def _extremes(found: Mapping[str, Occurrence]) -> str:
    counted_ones = {name: one.share for name, one in found.items() if one.counted}
    if not counted_ones:
        return "nobody counted the classes"
    least, most = (pick(counted_ones, key=counted_ones.__getitem__) for pick in (min, max))
    shares = f"{_percent(counted_ones[least])} of {least} to {_percent(counted_ones[most])} of {most}"
    unknown = len(found) - len(counted_ones)
    return shares + (f"; {counted(unknown, 'class', 'are')} unknown, and taken for the median" if unknown else "")


def occurrences_of(
    facts: Fingerprint, names: Sequence[str], dice: Mapping[str, float | None] | None = None
) -> dict[str, Occurrence]:
    """Return how often each class occurs: as counted, as reported, or, where nobody knows, as often as the median."""
    shapes = {shape.name: shape.num_instances + shape.num_instances_cut for shape in facts.shapes}
    known = {name: voxels for name in names if (voxels := _voxels_of(facts, name))[1]}
    usual = statistics.median(positive / total for positive, total in known.values()) if known else 0.5
    found = {}
    for name in names:
        positive, total = known.get(name, (round(usual * NOMINAL_VOXELS), NOMINAL_VOXELS))
        instances = shapes.get(name) or sum(bool(crop.present(name)) for crop in facts.crops)
        found[name] = Occurrence(positive, total, instances, (dice or {}).get(name), name in known)
    return found


def _voxels_of(facts: Fingerprint, name: str) -> tuple[int, int]:
    """Return (positive, known) voxels of a class, of a nominal volume where its share was reported; (0, 0): unknown."""
    counts = [crop.counts[name] for crop in facts.crops if name in crop.counts]
    positive, known = sum(c.present for c in counts), sum(c.present + c.absent for c in counts)
    reported = facts.frequencies.get(name)
    if not known and reported:
        return round(NOMINAL_VOXELS * reported.share), NOMINAL_VOXELS
    return positive, known


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
