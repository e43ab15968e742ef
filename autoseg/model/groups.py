"""Which classes of a plan exclude each other, and what logits mean as probabilities.

::

    softmax    ecs  pm  mito_mem  mito_lum  (background)      one group: the probabilities of a voxel add up to 1
    sigmoid    mito                                           shares atoms with others: a group of its own

A group has a background row whose logit is 0, so that the softmax of a group of one class is its sigmoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from autoseg.data.classes import Logic, cellmap_table, merge
from autoseg.schema import ClassEntry, ClassTable, Plan


class Groups(NamedTuple):
    """Classes by number, each in one group; `filled` holds (composite, group): where it is, one of the group is."""

    members: tuple[tuple[int, ...], ...]
    filled: tuple[tuple[int, int], ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes of all groups."""
        return sum(len(group) for group in self.members)


@cache
def groups_of(classes: tuple[ClassEntry, ...], disjoint: tuple[tuple[str, ...], ...]) -> Groups:
    """Return the groups of these classes: each joins the first group that it excludes all of.

    A composite that shares atoms with another of the classes stays alone, and so does what excludes nothing.
    """
    logic, names = Logic(_table(classes, disjoint)), [entry.name for entry in classes]
    exclude, overlap = logic.excluding(names), logic.overlaps(names).sum(axis=1) > 1
    members: list[list[int]] = []
    closed: list[int] = []
    for k, entry in enumerate(classes):
        alone = bool(entry.components) and overlap[k]
        fitting = (i for i, group in enumerate(members) if i not in closed and exclude[k, group].all())
        if not alone and (first := next(fitting, None)) is not None:
            members[first].append(k)
            continue
        if alone:
            closed.append(len(members))
        members.append([k])
    filled = (
        (k, i)
        for k, entry in enumerate(classes)
        for i, group in enumerate(members)
        if entry.components and k not in group and logic.consists_of(names[k], [names[j] for j in group])
    )
    return Groups(tuple(tuple(group) for group in members), tuple(filled))


def _table(classes: Sequence[ClassEntry], disjoint: tuple[tuple[str, ...], ...]) -> ClassTable:
    """Return the class table as far as a plan holds it; parts that are in no table are atoms."""
    table = merge(cellmap_table(), ClassTable(classes=tuple(classes), disjoint=disjoint))
    known = {entry.name for entry in table.classes}
    named = [name for entry in table.classes for name in entry.components] + [n for group in disjoint for n in group]
    missing = sorted(set(named) - known)
    return merge(table, ClassTable(classes=tuple(ClassEntry(name=name) for name in missing)))


def probabilities(logits_BKZYX: Tensor, plan: Plan) -> Tensor:
    """Return the probability of each class: its sigmoid, or its softmax in its group with a background of logit 0."""
    if plan.loss.activation == "sigmoid":
        return torch.sigmoid(logits_BKZYX)
    out = torch.empty_like(logits_BKZYX)
    for group in groups_of(plan.classes, plan.disjoint).members:
        if len(group) == 1:
            out[:, group] = torch.sigmoid(logits_BKZYX[:, group])
        else:
            z = logits_BKZYX[:, group]
            out[:, group] = torch.softmax(torch.cat([z, torch.zeros_like(z[:, :1])], dim=1), dim=1)[:, :-1]
    return out
