"""Which classes share a softmax, and what their logits mean in prediction."""

from __future__ import annotations

import msgspec
import pytest
import torch
from test_planner import tiny_facts_plan

from autoseg.data.classes import cellmap_table, select
from autoseg.model.groups import groups_of, probabilities
from autoseg.schema import ClassEntry


def named(names: list[str], disjoint: tuple[tuple[str, ...], ...] = ()) -> list[list[str]]:
    """Return the groups of these classes by name; what is in no table is a class of the data set."""
    table = {entry.name: entry for entry in cellmap_table().classes}
    groups = groups_of(tuple(table.get(name, ClassEntry(name=name)) for name in names), disjoint)
    return [[names[k] for k in group] for group in groups.members]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ecs", "pm", "mito", "synapse"], [["ecs", "pm", "mito"], ["synapse"]]),
        (["ecs", "mito", "mito_mem", "nuc", "er"], [["ecs", "mito_mem"], ["mito"], ["nuc"], ["er"]]),
        (["mito", "golgi", "er"], [["mito", "golgi", "er"]]),
        (["a", "b"], [["a"], ["b"]]),
        (["cell", "pm"], [["cell"], ["pm"]]),
    ],
)
def test_classes_that_exclude_each_other_share_a_group_and_wholes_of_others_stay_alone(
    names: list[str], expected: list[list[str]]
) -> None:
    assert named(names) == expected


def test_a_data_set_says_which_of_its_classes_exclude_each_other() -> None:
    assert named(["a", "b", "c"], (("a", "c", "not_planned"),)) == [["a", "c"], ["b"]]
    assert named(["a", "b", "c"], (("a", "b"), ("b", "c"))) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("number", [5, 14, 48])
def test_the_sets_of_the_challenge_are_parted_and_no_group_overlaps(number: int) -> None:
    table = cellmap_table()
    classes = select(table, table.sets[f"cellmap-{number}"])
    groups = groups_of(classes, ())
    assert sorted(k for group in groups.members for k in group) == list(range(number))
    for group in groups.members:
        atoms = [set(classes[k].components or (classes[k].name,)) for k in group]
        assert sum(map(len, atoms)) == len(set.union(*atoms))
    largest = max(groups.members, key=len)
    assert len(largest) >= number / 2


def test_the_background_is_excluded_where_all_parts_of_a_whole_are_in_the_group() -> None:
    table = cellmap_table()
    golgi = select(table, ["golgi_mem", "golgi_lum", "golgi", "mito_mem", "mito"])
    groups = groups_of(golgi, ())
    assert groups.members == ((0, 1, 3), (2,), (4,))
    assert groups.filled == ((2, 0),), "mito has parts that are not planned"


def test_parts_that_are_in_no_table_are_atoms() -> None:
    whole = (ClassEntry(name="w", components=("x", "y")), ClassEntry(name="x"))
    assert groups_of(whole, ()).members == ((0,), (1,))


def test_probabilities_are_sigmoids_or_add_up_to_one_with_the_background() -> None:
    plan = tiny_facts_plan()
    logits = torch.randn(2, 2, 1, 4, 4)
    assert torch.equal(probabilities(logits, plan), torch.sigmoid(logits))
    alone = tiny_facts_plan({"loss.activation": "softmax"})
    assert torch.equal(probabilities(logits, alone), torch.sigmoid(logits)), "nothing says that they exclude each other"
    soft = msgspec.structs.replace(alone, classes=select(cellmap_table(), ["mito", "pm"]))
    assert groups_of(soft.classes, soft.disjoint).members == ((0, 1),)
    p = probabilities(logits, soft)
    torch.testing.assert_close(p, logits.exp() / (1 + logits.exp().sum(dim=1, keepdim=True)))
