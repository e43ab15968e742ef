"""Settings as users type them: every type of field, and a near name for every mistake."""

from __future__ import annotations

import pytest
from test_planner import facts, machine

from autoseg.errors import PlanError
from autoseg.plan.draft import DERIVED, Choice, Draft, leaf_fields, parse_settings
from autoseg.schema import Plan


@pytest.mark.parametrize(
    ("pair", "field", "value"),
    [
        ("batch_size=4", "batch_size", 4),
        ("budget_s=40", "budget_s", 40.0),
        ("budget_s=null", "budget_s", None),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 0.001),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.num_steps=120", "optimizer.num_steps", 120),
        ("patch_size_zyx=1,128,128", "patch_size_zyx", (1, 128, 128)),
        ("patch_size_zyx=[1, 128, 128]", "patch_size_zyx", (1, 128, 128)),
        (" patch_size_zyx =1, 128, 128", "patch_size_zyx", (1, 128, 128)),
        ("voxel_size_nm=50,4.6,4", "voxel_size_nm", (50.0, 4.6, 4.0)),
        ("network.features=8,16", "network.features", (8, 16)),
        ("network.kind=rsunet", "network.kind", "rsunet"),
        ("network.deep_supervision=true", "network.deep_supervision", True),
        ("network.strides_zyx=[[1,2,2]]", "network.strides_zyx", ((1, 2, 2),)),
        ("sliding_window.mirror_axes=y,x", "sliding_window.mirror_axes", ("y", "x")),
        ("sliding_window.mirror_axes=y", "sliding_window.mirror_axes", ("y",)),
        ("sliding_window.mirror_axes=", "sliding_window.mirror_axes", ()),
        ("class_weights.mito=2", "class_weights.*", {"mito": 2.0}),
        ("decode.thresholds.mito=0.4", "decode.thresholds.*", {"mito": 0.4}),
        ("name=a=b", "name", "a=b"),
    ],
)
def test_a_setting_becomes_a_value_of_the_type_of_its_field(pair: str, field: str, value: object) -> None:
    parsed = parse_settings([pair])
    assert parsed == {field: value}
    assert type(parsed[field]) is type(value)


def test_settings_of_one_mapping_add_up_and_the_last_of_a_field_counts() -> None:
    parsed = parse_settings(["class_weights.a=1", "class_weights.b=2", "seed=1", "seed=2"])
    assert parsed == {"class_weights.*": {"a": 1.0, "b": 2.0}, "seed": 2}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("batch_size", r"has no '=': write --set field=value"),
        ("batchsize=4", r"did you mean 'batch_size'"),
        ("network.featurs=4,8", r"did you mean 'network\.features'"),
        ("optimiser.learning_rate=1", r"did you mean 'optimizer\.learning_rate'"),
        ("network=unet", r"set one of .*network\.kind"),
        ("batch_size=four", r"batch_size: 'four' is not a whole number \(it is text\): correct"),
        ("batch_size=1.5", r"batch_size: '1.5' is not a whole number"),
        ("network.kind=vnet", r"network\.kind: 'vnet' is none of unet, resunet, rsunet: did you mean 'unet'"),
        ("patch_size_zyx=1,128", r"patch_size_zyx: '1,128' is not a list of 3 values \(it has 2\)"),
        ("patch_size_zyx=1,128,x", r"\[2\] of '1,128,x' is not a whole number"),
        ("optimizer.num_steps=many", r"'many' is not a whole number or null"),
        ("sliding_window.mirror_axes=q", r"'q' at \[0\] is none of z, y, x: use one of them"),
        ("network.deep_supervision=maybe", r"'maybe' is not true or false"),
        ("loss.kind=dize", r"'dize' is none of bce, dice, .*: did you mean 'dice'"),
        ("classes=pm,mito", r"classes: holds records of classes: use --classes pm,mito"),
        ("classes=pm", r"use --classes pm"),
        ("optimizer.learning_rate=NaN", r"optimizer\.learning_rate"),
        ("optimizer.learning_rate=Infinity", r"optimizer\.learning_rate"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_field_and_remedy(pair: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        parse_settings([pair])
    assert str(caught.value).startswith("--set ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [*DERIVED, "hardware.name"])
def test_what_is_derived_cannot_be_set(field: str) -> None:
    with pytest.raises(PlanError, match="is derived from other fields"):
        parse_settings([f"{field}=1"])


def test_leaf_fields_are_dotted_and_end_at_plain_values() -> None:
    names = [name for name, _ in leaf_fields(Plan)]
    assert len(names) == len(set(names))
    assert {"seed", "network.kind", "optimizer.num_steps", "split.train", "class_weights"} <= set(names)
    assert "network" not in names


def test_a_setting_beats_the_rule_and_keeps_what_the_rule_wanted() -> None:
    draft = Draft(facts(), machine(), {"batch_size": 3})
    draft.decide("batch_size", Choice(8, "it fits", "memory"))
    draft.decide("seed", Choice(0, "any", "convention"))
    assert (draft["batch_size"], draft["seed"]) == (3, 0)
    assert draft.reasons[0].source == "user"
    assert "instead of 8 (it fits)" in draft.reasons[0].because
    assert draft.reasons[1].because == "any"


def test_nested_puts_dotted_fields_into_branches() -> None:
    draft = Draft(facts(), machine(), {})
    for field in ("seed", "network.kind", "network.norm"):
        draft.decide(field, Choice(field, "b", "s"))
    assert draft.nested() == {"seed": "seed", "network": {"kind": "network.kind", "norm": "network.norm"}}
    with pytest.raises(KeyError):
        draft["batch_size"]
