"""Artifacts on disk: what is written comes back, and bad input is one PlanError of one line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ARTIFACTS, no_augmentation, records, valid_plan

from autoseg import schema
from autoseg.errors import DataError, PlanError
from autoseg.schema import (
    AnyArtifact,
    Hardware,
    Plan,
    check_plan,
    decode,
    encode,
    load,
    load_as,
    read_json_lines,
    save,
    sha256,
    write_atomically,
)

change = msgspec.structs.replace
HARDWARE = Hardware(name="here", gpus=(), cpu_name="x", cpu_threads=2, cpu_bf16=True, ram_bytes=8, shm_bytes=4)


def refusal(content: bytes, record_type: Any = AnyArtifact) -> str:
    """Return the message of the PlanError that these bytes must raise, and nothing but a PlanError."""
    with pytest.raises(PlanError) as caught:
        decode(content, record_type, "F.json")
    message = str(caught.value)
    assert message.startswith("F.json: ")
    assert len(message.splitlines()) == 1
    return message


def edited(record: schema.Artifact, path: str, value: Any) -> bytes:
    """Return the record's JSON with the value at a dotted path replaced or added."""
    raw = json.loads(encode(record))
    *folders, last = path.split(".")
    spot = raw
    for name in folders:
        spot = spot[name]
    spot[last] = value
    return json.dumps(raw).encode()


# ---- round trip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record_type", ARTIFACTS, ids=lambda t: t.__name__)
@settings(max_examples=20)
@given(data=st.data())
def test_every_record_comes_back_equal_and_encodes_the_same(record_type: type[Any], data: st.DataObject) -> None:
    """Through its own type and through `kind`; the same record gives the same bytes and hash."""
    record = data.draw(records(record_type))
    content = encode(record)
    for back in (decode(content, record_type, "F"), decode(content, AnyArtifact, "F")):
        assert type(back) is record_type
        assert back == record
        assert encode(back) == content
        assert sha256(back) == sha256(record)


def test_the_hash_tells_records_apart() -> None:
    assert sha256(HARDWARE) != sha256(change(HARDWARE, ram_bytes=9))
    assert sha256(HARDWARE) == sha256(change(HARDWARE))


def test_save_and_load_a_plan(tmp_path: Path) -> None:
    plan = valid_plan()
    save(plan, tmp_path / "deep" / "plan.json")
    assert load(tmp_path / "deep/plan.json") == plan
    assert load_as(str(tmp_path / "deep/plan.json"), Plan) == plan
    assert json.loads((tmp_path / "deep/plan.json").read_text())["kind"] == "plan"


def test_the_class_of_a_score_is_called_class_on_disk() -> None:
    row = schema.ScoreRow(crop="a/crop1", class_="mito", tp=1, fp=2, fn=3)
    written = json.loads(encode(row))
    assert written["class"] == "mito"
    assert "class_" not in written
    assert decode(encode(row), schema.ScoreRow, "row") == row


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("batch_sise", "batch_size"),
        ("optimizer.num_step", "num_steps"),
        ("network.feature", "features"),
        ("sliding_window.overlapp", "overlap"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_name(path: str, near: str) -> None:
    message = refusal(edited(valid_plan(), path, 1), Plan)
    assert f"did you mean '{near}'?" in message
    assert f"'{path.split('.')[-1]}'" in message


def test_an_unknown_key_without_a_neighbour_is_to_be_removed() -> None:
    assert refusal(edited(HARDWARE, "qqq", 1)).endswith("remove it")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("batch_size", "many", "batch_size is not a whole number (it is text): correct"),
        ("budget_s", "x", "budget_s is not a number or null (it is text)"),
        ("network.kind", "rsnet", "'rsnet' at network.kind is none of unet, resunet, rsunet: did you mean 'rsunet'?"),
        ("sliding_window.mirror_axes", ["q"], "'q' at sliding_window.mirror_axes[0] is none of z, y, x: use one"),
        ("network.strides_zyx", [[1, 2]], "network.strides_zyx[0] is not a list of 3 values (it has 2)"),
        ("network", [], "network is not an object in braces (it is a list)"),
    ],
)
def test_a_wrong_value_is_told_in_words_of_no_programmer(path: str, value: object, says: str) -> None:
    assert says in refusal(edited(valid_plan(), path, value), Plan)


def test_a_key_with_a_line_break_is_still_one_line() -> None:
    refusal(edited(HARDWARE, "a\nb\r\nc", 1))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["voxel", "extra"])
def test_numbers_that_are_not_finite_are_refused(number: str, field: str) -> None:
    content = encode(valid_plan())
    if field == "voxel":
        assert content.count(b"40.0") == 2
        refusal(content.replace(b"40.0", number.encode(), 1), Plan)
    else:
        refusal(content.replace(b'"schema_version": 1', b'"schema_version": ' + number.encode(), 1), Plan)


@pytest.mark.parametrize("digits", [20, 25, 400, 6000])
def test_huge_integers_are_refused(digits: int) -> None:
    """They would overflow later, where nobody says which field it was."""
    for field in (b"ram_bytes", b"schema_version"):
        before = json.loads(encode(HARDWARE))[field.decode()]
        old, new = b'"%s": %d' % (field, before), b'"%s": ' % field + b"9" * digits
        assert old in encode(HARDWARE)
        refusal(encode(HARDWARE).replace(old, new))


def test_a_huge_integer_in_the_place_of_a_float_is_refused() -> None:
    refusal(encode(valid_plan()).replace(b"40.0", b"1" + b"0" * 400), Plan)


@pytest.mark.parametrize("depth", [50, 900, 5000, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_deep_nesting_is_refused(depth: int, opening: bytes, closing: bytes) -> None:
    deep = opening * depth + b"1" + closing * depth
    refusal(deep)
    refusal(b'{"kind": "hardware", "name": ' + deep + b"}")
    refusal(b'{"kind": "hardware", "schema_version": ' + deep + b"}")


@pytest.mark.parametrize("version", [0, 2, -1, "1", None, [1], 1.5, True, {}])
def test_another_schema_version_is_refused(version: Any) -> None:
    assert "schema_version" in refusal(edited(HARDWARE, "schema_version", version))


@pytest.mark.parametrize("content", [b"[]", b"1", b'"plan"', b"null", b"true", b"{}", b'{"kind": "plane"}'])
def test_what_is_not_an_artifact_is_refused(content: bytes) -> None:
    refusal(content)


@pytest.mark.parametrize("content", [b"", b" ", b"\xff\xfe", b"{", b"{'a': 1}", b"PK\x03\x04", b"\x00" * 9, b"{}{}"])
def test_what_is_not_json_is_refused(content: bytes) -> None:
    assert "is not valid JSON" in refusal(content)


def test_half_a_surrogate_pair_is_refused() -> None:
    """Python reads it and then cannot write or print it."""
    refusal(edited(HARDWARE, "name", "\ud800"))


@pytest.mark.parametrize("artifact", [HARDWARE, valid_plan()], ids=["hardware", "plan"])
def test_a_truncated_file_is_refused_wherever_it_ends(artifact: schema.Artifact) -> None:
    content = encode(artifact).rstrip()
    for length in range(0, len(content), max(1, len(content) // 150)):
        refusal(content[:length])


@given(st.binary(max_size=40))
def test_random_bytes_never_give_a_traceback(content: bytes) -> None:
    refusal(content)


@given(st.data())
def test_a_random_value_anywhere_is_refused_or_read_never_a_traceback(data: st.DataObject) -> None:
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
    raw = json.loads(encode(valid_plan()))
    spot, name = raw, data.draw(st.sampled_from(sorted(raw)))
    while isinstance(spot[name], dict) and spot[name] and data.draw(st.booleans()):
        spot = spot[name]
        name = data.draw(st.sampled_from(sorted(spot)))
    spot[name] = data.draw(junk)
    message, plan = "", None
    try:
        plan = decode(json.dumps(raw).encode(), Plan, "F.json")
    except PlanError as error:
        message = str(error)
    assert len(message.splitlines()) == (1 if plan is None else 0)
    assert plan is None or decode(encode(plan), Plan, "F.json") == plan


def test_the_wrong_kind_is_named(tmp_path: Path) -> None:
    save(HARDWARE, tmp_path / "h.json")
    with pytest.raises(PlanError, match=r"h\.json: .*hardware"):
        load_as(tmp_path / "h.json", Plan)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json: No such file or directory: check the path"):
        load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="Is a directory"):
        load(tmp_path)


# ---- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_save_refuses_a_number_that_json_cannot_hold_and_writes_nothing(tmp_path: Path, value: float) -> None:
    optimizer = change(valid_plan().optimizer, learning_rate=value)
    with pytest.raises(PlanError, match=r"optimizer\.learning_rate is (nan|inf|-inf)"):
        save(valid_plan(optimizer=optimizer), tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"voxel_size_nm\[1\]"):
        save(valid_plan(voxel_size_nm=(1.0, value, 1.0)), tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "plan.json"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_and_is_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "f.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_json_lines_drop_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes('{"step": 1, "note": "a\u2028b\x85c"}\n{"step": 2}\n\n[3]\n{"st'.encode())
    assert read_json_lines(path) == [{"step": 1, "note": "a\u2028b\x85c"}, {"step": 2}]


@pytest.mark.parametrize("error_type", [PlanError, DataError])
def test_errors_travel_between_processes(error_type: type[PlanError]) -> None:
    import pickle

    back = pickle.loads(pickle.dumps(error_type("a", "b", "c")))
    assert type(back) is error_type
    assert str(back) == "a: b: c"


# ---- what a plan must satisfy -------------------------------------------------------------------------------


def test_the_plan_of_the_tests_has_no_contradiction() -> None:
    check_plan(valid_plan(), "plan")
    check_plan(valid_plan(input_slices=5), "plan")


def network(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"network": change(valid_plan().network, **changes)}


def part(name: str, **changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {name: change(getattr(valid_plan(), name), **changes)}


def field(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: changes


CONTRADICTIONS: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    ("network.features", network(features=())),
    ("network.features", network(features=(8,))),
    ("network.features", network(features=(8, 0))),
    ("network.kernels_zyx", network(kernels_zyx=((3, 3, 3),))),
    ("network.kernels_zyx", network(kernels_zyx=((1, 3, 3), (1, 2, 3)))),
    ("network.kernels_zyx", network(kernels_zyx=((1, 3, 3), (1, -1, 3)))),
    ("network.strides_zyx", network(strides_zyx=())),
    ("network.strides_zyx", network(strides_zyx=((1, 3, 2),))),
    ("network.strides_zyx", network(strides_zyx=((1, 0, 2),))),
    ("patch_size_zyx", field(patch_size_zyx=(1, 33, 32))),
    ("patch_size_zyx", field(patch_size_zyx=(1, 32, 0))),
    ("patch_size_zyx", network(strides_zyx=((2, 2, 2),))),
    ("sliding_window.tile_zyx", part("sliding_window", tile_zyx=(1, 32, 31))),
    ("sliding_window.tile_zyx", part("sliding_window", tile_zyx=(4, 32, 32))),
    ("sliding_window.overlap", part("sliding_window", overlap=1.0)),
    ("sliding_window.overlap", part("sliding_window", overlap=-0.1)),
    ("sliding_window.batch_size", part("sliding_window", batch_size=0)),
    ("input_slices", field(input_slices=0)),
    ("input_slices", field(input_slices=4)),
    (
        "input_slices",
        lambda: {"input_slices": 3, "patch_size_zyx": (4, 32, 32)} | part("sliding_window", tile_zyx=(4, 32, 32))(),
    ),
    ("voxel_size_nm", field(voxel_size_nm=(40.0, 0.0, 8.0))),
    ("voxel_size_nm", field(voxel_size_nm=(-40.0, 8.0, 8.0))),
    ("em_voxel_size_nm", field(em_voxel_size_nm=(40.0, 8.0, 0.0))),
    ("precision", field(precision="fp16")),
    ("class_weights", field(class_weights={"mito": 1.0})),
    ("class_weights", field(class_weights={"mito": 1.0, "pm": 1.0, "er": 1.0})),
    ("class_weights", field(class_weights={"mito": 1.0, "pm": -1.0})),
    ("class_weights", field(class_weights={"mito": 0.0, "pm": 0.0})),
    ("decode.thresholds", part("decode", thresholds={"mito": 0.5})),
    ("decode.thresholds", part("decode", thresholds={"mito": 0.5, "pm": 1.5})),
    ("classes", lambda: {"classes": valid_plan().classes * 2}),
    ("heads", field(heads=())),
    ("heads", field(heads=(schema.Head(name="semantic", classes=("mito",)),))),
    ("heads", field(heads=(schema.Head(name="semantic", classes=("mito", "er")),))),
    ("split.train", part("split", train=())),
    ("num_processes", field(num_processes=0)),
    ("network.norm", field(num_processes=2)),
    ("batch_size", field(batch_size=0)),
    ("accumulate_batches", field(accumulate_batches=0)),
    ("num_threads", field(num_threads=0)),
    ("num_workers", field(num_workers=-1)),
    ("seed", field(seed=-1)),
    ("sampling.crops_per_step", part("sampling", crops_per_step=0)),
    ("sampling.class_centred_fraction", part("sampling", class_centred_fraction=1.01)),
    ("sampling.class_floor", part("sampling", class_floor=0.26)),
    ("sampling.class_floor", part("sampling", class_floor=-0.1)),
    ("sampling.class_power", part("sampling", class_power=1.5)),
    ("optimizer.num_steps", part("optimizer", num_steps=0)),
    ("optimizer.num_steps", part("optimizer", num_steps=None)),
    ("optimizer.learning_rate", part("optimizer", learning_rate=0.0)),
    ("optimizer.ema_decay", part("optimizer", ema_decay=1.0)),
    ("optimizer.gradient_clip_norm", part("optimizer", gradient_clip_norm=0.0)),
    ("optimizer.weight_decay", part("optimizer", weight_decay=-1.0)),
    ("schedule.warmup_fraction", part("schedule", warmup_fraction=1.0)),
    ("validation.num_rounds", part("validation", num_rounds=-1)),
    ("validation.tolerance", part("validation", tolerance=-0.1)),
    ("loss", part("loss", bce_weight=0.0, dice_weight=0.0)),
    ("loss", part("loss", bce_weight=-1.0)),
    ("loss", part("loss", topk_weight=-1.0)),
    ("loss.focal_gamma", part("loss", focal_gamma=-1.0)),
    ("loss.focal_alpha", part("loss", focal_alpha=1.5)),
    ("loss.smooth", part("loss", smooth=-1.0)),
    ("loss.topk_share", part("loss", topk_share=0.0)),
    ("loss.topk_share", part("loss", topk_share=2.0)),
    ("loss.tversky_exponent", part("loss", tversky_exponent=0.0)),
    ("loss.unified_delta", part("loss", unified_delta=1.1)),
    ("loss.unified_gamma", part("loss", unified_gamma=1.0)),
    ("loss.focal_weight", part("loss", focal_weight=1.0, unified_weight=1.0)),
    ("loss.activation", part("loss", topk_weight=1.0, activation="softmax")),
    ("loss.activation", part("loss", seesaw_q=2.0)),
    ("loss.balance_tau", part("loss", balance_tau=-1.0)),
    ("loss.priors", part("loss", balance_tau=1.0)),
    ("loss.priors", part("loss", priors={"mito": 1.5})),
    ("augmentation.scale_range", lambda: {"augmentation": no_augmentation(scale_range=(1.1, 1.4))}),
    ("augmentation.scale_range", lambda: {"augmentation": no_augmentation(scale_range=(0.0, 1.4))}),
    ("augmentation.drift_probability", lambda: {"augmentation": no_augmentation(drift_probability=1.1)}),
    ("augmentation.missing_partial_share", lambda: {"augmentation": no_augmentation(missing_partial_share=-0.1)}),
    ("augmentation.stripe_sd", lambda: {"augmentation": no_augmentation(stripe_sd=-1.0)}),
    ("augmentation.misalign_max", lambda: {"augmentation": no_augmentation(misalign_max=-1)}),
    ("augmentation.gamma_range", lambda: {"augmentation": no_augmentation(gamma_range=(1.4, 0.7))}),
    ("augmentation.missing_sections_max", lambda: {"augmentation": no_augmentation(missing_sections_max=0)}),
    ("augmentation.missing_area_range", lambda: {"augmentation": no_augmentation(missing_area_range=(0.5, 1.5))}),
    ("augmentation.elastic_sigma", lambda: {"augmentation": no_augmentation(elastic_sigma=0.0)}),
]


@pytest.mark.parametrize(("name", "make"), CONTRADICTIONS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CONTRADICTIONS)])
def test_each_contradiction_is_named(name: str, make: Callable[[], dict[str, Any]]) -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(valid_plan(**make()), "plan.json")
    where, found, *rest = str(caught.value).split(": ")
    assert where == "plan.json"
    assert found == name
    assert all(rest), "says what is wrong and what to do"
    assert len(str(caught.value).splitlines()) == 1


def test_a_plan_without_a_number_of_processes_is_for_one(tmp_path: Path) -> None:
    raw = json.loads(schema.encode(valid_plan()))
    assert raw.pop("num_processes") == 1
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    assert schema.load(tmp_path / "plan.json") == valid_plan()


def test_an_open_number_of_steps_needs_a_budget() -> None:
    open_steps = part("optimizer", num_steps=None)()
    check_plan(valid_plan(**open_steps, budget_s=60.0), "plan")
    with pytest.raises(PlanError, match="budget_s"):
        check_plan(valid_plan(**open_steps, budget_s=0.0), "plan")


@pytest.mark.parametrize("edge", [1, 7, 33, 47])
def test_the_edge_that_is_suggested_fits(edge: int) -> None:
    with pytest.raises(PlanError) as caught:
        check_plan(valid_plan(patch_size_zyx=(1, edge, 32)), "plan")
    suggested = int(caught.value.remedy.removeprefix("use "))
    check_plan(valid_plan(patch_size_zyx=(1, suggested, 32)), "plan")
