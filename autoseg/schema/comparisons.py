"""A comparison: changes of a plan, each run with several seeds, and what may be said of their scores."""

from __future__ import annotations

from typing import Any

import msgspec

from autoseg.schema.records import Artifact, Record


class Change(Record, frozen=True, kw_only=True):
    """One variant: values by dotted field of the plan, on top of the base."""

    name: str
    description: str = ""
    set: dict[str, Any] = msgspec.field(default_factory=dict)


class CompareSpec(Record, frozen=True, kw_only=True):
    """What to compare: settings that all runs share, the seeds, and the changes; one that sets nothing is the base."""

    changes: tuple[Change, ...]
    base: dict[str, Any] = msgspec.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)


class RankRow(Record, frozen=True, kw_only=True):
    """One change: the mean over its seeds, their sd, Dice by class, and whether the next row is really worse.

    `separable_from_next` is None where too few seeds ran to say. `same_as` names changes that train exactly alike:
    their runs are replicates. `interval` holds the mean Dice with 95 % confidence over crops, None for few crops.
    """

    name: str
    description: str
    mean_dice: float | None
    sd: float | None
    seeds: tuple[int, ...]
    per_class: dict[str, float | None]
    separable_from_next: bool | None
    same_as: tuple[str, ...] = ()
    interval: tuple[float, float] | None = None
    best_class: str | None = None
    best_steps: tuple[int, ...] = ()


class Ranking(Artifact, frozen=True, kw_only=True, tag="ranking"):
    """Rows, best first; `noise_sd` is the sd of runs that differ in nothing but their seed, pooled over all rows.

    `ranked` is False where too few runs repeat each other for any order to mean something. `best` says which change, or
    which changes together, best_plan.json was made of, and why.
    """

    rows: tuple[RankRow, ...]
    noise_sd: float | None
    metric: str
    ranked: bool
    best: tuple[str, ...] = ()
    because: str = ""
    failed: dict[str, str] = msgspec.field(default_factory=dict)
