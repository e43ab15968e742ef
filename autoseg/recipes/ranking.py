"""Scores of finished runs -> which change is better, by more than noise, and the plan to go on with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from autoseg.metrics.noise import bootstrap_mean_dice, least_difference, pooled_sd
from autoseg.metrics.overlap import Counts, mean
from autoseg.schema import Change, CompareSpec, Plan, Ranking, RankRow, Scores

LEAST_SEEDS = 3
Apart = Callable[[str, str], bool | None]
TERMS = {
    "focal_weight": ("focal_gamma", "focal_alpha"),
    "tversky_weight": ("tversky_alpha", "tversky_beta", "tversky_exponent"),
    "topk_weight": ("topk_share",),
    "unified_weight": ("unified_lambda", "unified_delta", "unified_gamma"),
    "balance_tau": ("priors",),
}
NO_MATTER = ("name", "reasons", "seed", "hardware", "class_weighting", "class_balance_beta")


class Finished(NamedTuple):
    """One run of a change: its plan, scores, and the step of its best checkpoint."""

    change: str
    seed: int
    plan: Plan
    scores: Scores
    best_step: int | None


def rank(spec: CompareSpec, runs: Sequence[Finished], failed: Mapping[str, str]) -> Ranking:
    """Return the rows, best first, and which of the changes to go on with; runs of every change that has any."""
    by_change = {c.name: [run for run in runs if run.change == c.name] for c in spec.changes}
    by_change = {name: found for name, found in by_change.items() if found}
    alike = _alike(by_change)
    values = {
        name: [v for run in found if (v := run.scores.mean_dice) is not None] for name, found in by_change.items()
    }
    groups = [_repeats(names, by_change) for names in dict.fromkeys(alike.values())]
    sd, freedom = pooled_sd(groups)
    ordered = sorted(by_change, key=lambda name: -(mean(list(values[name])) or 0.0))
    ranked = sd is not None and all(len(values[name]) >= LEAST_SEEDS for name in ordered)

    def apart(a: str, b: str) -> bool | None:
        if sd is None or not ranked:
            return None
        if alike[a] == alike[b]:
            return False
        gap = statistics.fmean(values[a]) - statistics.fmean(values[b])
        return abs(gap) > least_difference(sd, freedom, len(values[a]), len(values[b]))

    described = {c.name: c.description for c in spec.changes}
    rows = []
    for i, name in enumerate(ordered):
        follows = ordered[i + 1] if i + 1 < len(ordered) else None
        others = tuple(other for other in alike[name] if other != name)
        rows.append(_row(by_change[name], described[name], others, apart(name, follows) if follows else None))
    best, because = _best(spec.changes, ordered, apart)
    metric = runs[0].scores.metric if runs else ""
    return Ranking(
        rows=tuple(rows), noise_sd=sd, metric=metric, ranked=ranked, best=best, because=because, failed=dict(failed)
    )


def _row(runs: Sequence[Finished], description: str, same_as: tuple[str, ...], separable: bool | None) -> RankRow:
    dice = _dice(runs)
    classes = list(dict.fromkeys(name for run in runs for name in run.scores.per_class))
    per_class = {c: mean([run.scores.per_class[c].dice for run in runs if c in run.scores.per_class]) for c in classes}
    known = {name: value for name, value in per_class.items() if value is not None}
    return RankRow(
        name=runs[0].change,
        description=description,
        mean_dice=mean(list(dice)),
        sd=statistics.stdev(dice) if len(dice) > 1 else None,
        seeds=tuple(run.seed for run in runs),
        per_class=per_class,
        separable_from_next=separable,
        same_as=same_as,
        interval=bootstrap_mean_dice(_by_crop(runs)),
        best_class=max(known, key=known.__getitem__) if known else None,
        best_steps=tuple(run.best_step for run in runs if run.best_step is not None),
    )


def _dice(runs: Sequence[Finished]) -> list[float]:
    return [value for run in runs if (value := run.scores.mean_dice) is not None]


def _repeats(names: Sequence[str], runs: Mapping[str, Sequence[Finished]]) -> list[float]:
    """Return the scores of changes that train alike; what one seed gives twice, to the last bit, is no repetition."""
    found = {(run.seed, run.scores.mean_dice) for name in names for run in runs[name]}
    return [value for _, value in sorted(found, key=lambda pair: pair[0]) if value is not None]


def _by_crop(runs: Sequence[Finished]) -> list[dict[str, Counts]]:
    """Return the counts of each crop, those of all seeds together."""
    crops: dict[str, dict[str, Counts]] = {}
    for run in runs:
        for row in run.scores.rows:
            of_crop = crops.setdefault(row.crop, {})
            before = of_crop.get(row.class_, Counts(0, 0, 0))
            of_crop[row.class_] = before + Counts(row.tp, row.fp, row.fn)
    return list(crops.values())


def _alike(runs: Mapping[str, Sequence[Finished]]) -> dict[str, tuple[str, ...]]:
    """Return for each change the changes that train exactly as it does, itself among them."""
    keys = {name: msgspec.json.encode(_what_trains(found[0].plan), order="sorted") for name, found in runs.items()}
    return {name: tuple(other for other, key in keys.items() if key == keys[name]) for name in keys}


def _what_trains(plan: Plan) -> dict[str, Any]:
    """Return a plan without what changes no training: names, reasons, the scale of weights, parameters of no term."""
    tree: dict[str, Any] = msgspec.to_builtins(plan)
    for field in (*NO_MATTER, *(name for name in tree if name.startswith("predicted_"))):
        tree.pop(field, None)
    total = sum(tree["class_weights"].values())
    tree["class_weights"] = {name: round(w / total, 9) for name, w in tree["class_weights"].items()}
    loss = tree["loss"]
    loss.pop("kind")
    for weight, parameters in TERMS.items():
        for parameter in parameters if not loss[weight] else ():
            loss.pop(parameter)
    return tree


def _best(changes: Sequence[Change], ordered: Sequence[str], apart: Apart) -> tuple[tuple[str, ...], str]:
    """Return the changes to go on with: the simplest of those that nothing tells from the best, else all that help."""
    if not ordered:
        return (), "no run finished"
    sets, top = {change.name: change.set for change in changes}, ordered[0]
    if apart(top, top) is None:
        return (top,), f"{top} was highest, but there are too few seeds to rank"
    peers = [name for name in ordered if name == top or not apart(top, name)]
    simplest = min(peers, key=lambda name: (len(sets[name]), ordered.index(name)))
    if len(peers) > 1:
        return (simplest,), f"{', '.join(peers)} are not separable, and {simplest} changes least"
    chosen, fields = [top], set(sets[top])
    for name in _better_than_base(sets, ordered, apart):
        if fields.isdisjoint(sets[name]):
            chosen.append(name)
            fields |= set(sets[name])
    if len(chosen) > 1:
        return tuple(chosen), f"{' and '.join(chosen)} each help and touch different fields; together they never ran"
    return (top,), f"{top} is separable from every other" if len(ordered) > 1 else f"{top} is the only one"


def _better_than_base(sets: Mapping[str, dict[str, Any]], ordered: Sequence[str], apart: Apart) -> list[str]:
    """Return the changes, best first, that are above the one that changes nothing, by more than noise."""
    base = next((name for name in ordered if not sets[name]), None)
    return [] if base is None else [name for name in ordered[: ordered.index(base)] if apart(name, base)]
