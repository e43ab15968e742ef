"""Classes that want different voxel sizes are told apart, and each group gets a plan with its own crops."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planner import facts, machine, reason

from autoseg.cli import main
from autoseg.errors import PlanError
from autoseg.geometry import cube_edge_nm
from autoseg.plan import make_plan, resolution_groups
from autoseg.schema import ClassCount, ClassEntry, ClassShape, CropFacts, Fingerprint, Plan, Quantiles, load_as, save

EDGE = 64


def shape(name: str, thickness: float | None) -> ClassShape:
    width = None if thickness is None else Quantiles(p10=thickness / 2, p50=thickness, p90=2 * thickness)
    return ClassShape(
        name=name,
        thickness_nm=width,
        in_plane=False,
        thickness_cut_share=0.0 if thickness else 1.0,
        num_instances=0,
        num_instances_cut=0,
        instance_nm3=None,
        sampled_crops=1,
        sampled_voxels=1,
    )


def data_of(crops: list[tuple[float, tuple[str, ...]]], thickness: dict[str, float | None]) -> Fingerprint:
    """Return cubic crops of (voxel edge, classes they hold) in one volume, side by side."""
    base = facts((EDGE,) * 3, (2.0, 2.0, 2.0), classes=tuple(thickness))
    count = ClassCount(absent=EDGE**3 // 2, present=EDGE**3 // 2, unknown=0)
    made = [
        CropFacts(
            name=f"v0/crop{i + 1}",
            volume="v0",
            shape_zyx=(EDGE,) * 3,
            voxel_size_nm=(edge,) * 3,
            origin_nm=(0.0, 0.0, i * 1e5),
            split=None,
            annotated=held,
            counts=dict.fromkeys(held, count),
        )
        for i, (edge, held) in enumerate(crops)
    ]
    return msgspec.structs.replace(
        base,
        crops=tuple(made),
        classes=tuple(ClassEntry(name=name) for name in thickness),
        shapes=tuple(shape(*item) for item in thickness.items()),
    )


MIXED = data_of(
    [(4.0, ("pm", "mito", "nuc"))] * 4 + [(32.0, ("nuc", "ld"))] * 3 + [(2.0, ("pm",))] * 2,
    {"pm": 12.0, "mito": 300.0, "nuc": None, "ld": 600.0},
)


def test_thin_classes_and_large_ones_get_groups_of_their_own() -> None:
    fine, coarse = resolution_groups(MIXED, ["pm", "mito", "nuc", "ld"])
    assert (fine.classes, coarse.classes) == (("pm", "mito"), ("nuc", "ld"))
    assert (fine.edge_nm, coarse.edge_nm) == (pytest.approx(4), pytest.approx(32))
    assert fine.voxel_edge_nm == (pytest.approx(2), pytest.approx(4))
    assert coarse.voxel_edge_nm == (pytest.approx(32), pytest.approx(32))
    assert "pm, is 12 nm thick" in fine.because


@given(st.floats(1.5, 60), st.floats(1, 12))
def test_crops_twice_coarser_and_four_times_finer_serve_whatever_the_size(edge: float, anisotropy: float) -> None:
    """Their edges are roots of products: compared to the last bit, half of them would not fit."""
    made = data_of([(edge, ("pm",))] * 4 + [(2 * edge, ("pm",)), (edge / 4, ("pm",))], {"pm": None})
    crops = []
    for crop in made.crops:
        z, y, x = crop.voxel_size_nm
        crops.append(msgspec.structs.replace(crop, voxel_size_nm=(z * anisotropy, y, x)))
    found = msgspec.structs.replace(made, crops=tuple(crops), shapes=())
    (group,) = resolution_groups(found, ["pm"])
    low, high = group.voxel_edge_nm
    assert high / low == pytest.approx(8)
    plan = make_plan("a", found, machine(), {"patch_size_zyx": (1, 16, 16)})
    assert plan.split.voxel_edge_nm is None


def test_crops_that_no_plan_uses_are_counted_and_those_of_other_plans_too() -> None:
    because = reason(make_plan("a", MIXED, machine(), {}), "resolution")
    assert "6 of 9 crops have labels of 2 to 4 nm" in because
    assert because.endswith("plan --by-resolution uses 3 more")
    odd = data_of([(4.0, ("pm",))] * 4 + [(64.0, ("pm",))], {"pm": 12.0})
    assert reason(make_plan("a", odd, machine(), {}), "resolution").endswith("no plan uses the other 1")


def test_classes_that_are_asked_for_choose_the_resolution_by_name_and_by_set() -> None:
    sets = msgspec.structs.replace(MIXED, class_sets={"large": ("nuc", "ld")})
    for wanted in (["nuc", "ld"], ["large"]):
        plan = make_plan("a", sets, machine(), {"classes.names": wanted})
        assert plan.class_names == ("nuc", "ld")
        assert {round(cube_edge_nm(c.voxel_size_nm)) for c in MIXED.crops if c.name in trained(plan)} == {32}
    with pytest.raises(PlanError, match=r"--classes ld: has no positive voxel in crops of 2 to 4 nm.*by-resolution"):
        make_plan("a", MIXED, machine(), {"classes.names": ["pm", "mito", "ld"]})


def trained(plan: Plan) -> set[str]:
    return {region.crop for region in plan.split.train}


def test_data_of_one_voxel_size_is_one_group() -> None:
    (group,) = resolution_groups(facts(), ["mito", "pm"])
    assert group.classes == ("mito", "pm")
    assert "by-resolution" not in reason(make_plan("a", facts(), machine(), {}), "voxel_size_nm")


names = st.sampled_from(["a", "b", "c", "d"])
random_crops = st.lists(
    st.tuples(st.sampled_from([2.0, 4.0, 8.0, 16.0, 64.0]), st.sets(names, min_size=1).map(lambda s: tuple(sorted(s)))),
    min_size=1,
    max_size=8,
)


@given(random_crops, st.dictionaries(names, st.none() | st.floats(1, 1e4), min_size=4, max_size=4))
def test_every_class_is_in_one_group_whose_crops_hold_it(
    crops: list[tuple[float, tuple[str, ...]]], thickness: dict[str, float | None]
) -> None:
    found = data_of(crops, thickness)
    wanted = sorted({name for _, held in crops for name in held})
    groups = resolution_groups(found, wanted)
    assert sorted(name for group in groups for name in group.classes) == wanted
    edges = [group.edge_nm for group in groups]
    assert edges == sorted(edges)
    for group in groups:
        low, high = group.voxel_edge_nm
        assert low <= group.edge_nm * (1 + 1e-3)
        assert high <= 2 * group.edge_nm * (1 + 1e-3)
        for name in group.classes:
            assert any(name in held and low - 1e-3 <= edge <= 2 * high for edge, held in crops)


def test_a_plan_by_resolution_trains_on_the_crops_of_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(MIXED, tmp_path / "f.json")
    save(machine(), tmp_path / "m.json")
    assert main(["plan", "--fingerprint", "f.json", "--hardware", "m.json", "--by-resolution", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["plans"]
    fine, coarse = (load_as(tmp_path / f"plans/bench-{edge}nm.json", Plan) for edge in (4, 32))
    assert [plan["name"] for plan in printed] == [fine.name, coarse.name] == ["bench-4nm", "bench-32nm"]
    assert (fine.class_names, coarse.class_names) == (("pm", "mito"), ("nuc", "ld"))
    sizes = {crop.name: cube_edge_nm(crop.voxel_size_nm) for crop in MIXED.crops}
    for plan, edges in ((fine, {2, 4}), (coarse, {32})):
        used = {round(sizes[region.crop]) for region in (*plan.split.train, *plan.split.validate)}
        assert used == edges
    assert math.prod(coarse.voxel_size_nm) > math.prod(fine.voxel_size_nm)
    command = ["plan", "--fingerprint", "f.json", "--hardware", "m.json", "--by-resolution"]
    assert main([*command, "--set", "class_weights.nuc=2"]) == 0
    assert load_as(tmp_path / "plans/bench-32nm.json", Plan).class_weights == {"nuc": 2.0, "ld": 1.0}
    assert main([*command, "--set", "split.voxel_edge_nm=3,5"]) == 2


def test_one_plan_says_which_classes_lose_by_it() -> None:
    plan = make_plan("a", MIXED, machine(), {"device": "cpu"})
    assert "not best for" in reason(plan, "voxel_size_nm")
    assert "plan --by-resolution" in reason(plan, "voxel_size_nm")
