"""Comparisons: what may be called better, what is only noise, and runs that go on where they were."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_planner import TINY, facts, machine

from autoseg.errors import PlanError
from autoseg.metrics.noise import bootstrap_mean_dice, least_difference, mean_dice, pooled_sd
from autoseg.metrics.overlap import Counts
from autoseg.plan import fingerprint, make_plan
from autoseg.recipes import compare as recipe
from autoseg.recipes.compare import Ground, check_spec, compare, read_spec, slots_on
from autoseg.recipes.ranking import Finished, rank
from autoseg.report.comparison import in_words, ranking_csv, write_comparison
from autoseg.schema import Change, ClassScore, CompareSpec, Plan, Ranking, ScoreRow, Scores, load_as

SHIPPED = sorted((Path(__file__).parents[1] / "plans" / "compare").glob("*.json"))


# ---- statistics ----------------------------------------------------------------------------------------------


def test_pooled_sd_and_least_difference_against_the_formulas_written_out() -> None:
    groups = [[1.0, 3.0], [2.0, 2.0, 5.0], [7.0]]
    sd, freedom = pooled_sd(groups)
    assert freedom == 3
    assert sd == pytest.approx(((2 * 1.0 + (1 + 1 + 4)) / 3) ** 0.5)
    assert pooled_sd([[1.0], [2.0]]) == (None, 0)
    assert least_difference(0.013, 8, 3, 3) == pytest.approx(2.306 * 0.013 * (2 / 3) ** 0.5, rel=1e-3)


def test_equal_changes_are_told_apart_about_as_often_as_5_percent() -> None:
    rng, apart = np.random.default_rng(0), []
    for _ in range(400):
        groups = [list(rng.normal(0.7, 0.013, 3)) for _ in range(4)]
        sd, freedom = pooled_sd(groups)
        assert sd is not None
        apart.append(abs(np.mean(groups[0]) - np.mean(groups[1])) > least_difference(sd, freedom, 3, 3))
    assert 0.02 < np.mean(apart) < 0.09


def test_a_bootstrap_over_crops_holds_the_dice_and_widens_with_unlike_crops() -> None:
    like = [{"a": Counts(90, 10, 10)} for _ in range(8)]
    assert bootstrap_mean_dice(like) == pytest.approx((0.9, 0.9))
    unlike = [{"a": Counts(90, 10, 10)}, {"a": Counts(10, 90, 90)}] * 4
    found = bootstrap_mean_dice(unlike)
    assert found is not None
    assert found[0] < (mean_dice(unlike) or 0) < found[1]
    assert found[1] - found[0] > 0.2
    assert bootstrap_mean_dice(like[:4]) is None, "few crops say nothing"


# ---- ranking -------------------------------------------------------------------------------------------------


def finished(change: str, seed: int, dice: float, settings: dict[str, Any] | None = None) -> Finished:
    plan = make_plan(f"{change}-{seed}", facts(), machine(threads=1), TINY | (settings or {}) | {"seed": seed})
    row = ScoreRow(crop="v/crop1", class_="mito", tp=round(1000 * dice), fp=100, fn=100)
    score = ClassScore(dice=dice, iou=None, precision=None, recall=None)
    return Finished(
        change,
        seed,
        plan,
        Scores(metric="m", rows=(row,), per_class={"mito": score}, mean_dice=dice, mean_iou=None),
        10,
    )


def spec_of(**sets: dict[str, Any]) -> CompareSpec:
    return CompareSpec(changes=tuple(Change(name=name, set=values) for name, values in sets.items()))


def ranked(spec: CompareSpec, dice: dict[str, list[float]]) -> Ranking:
    fields = {"loss.smooth": float, "optimizer.learning_rate": float, "loss.focal_gamma": float}
    runs = []
    for change in spec.changes:
        settings = {field: fields[field](value) for field, value in change.set.items()}
        runs += [finished(change.name, seed, value, settings) for seed, value in enumerate(dice[change.name])]
    return rank(spec, runs, {})


def test_a_clear_winner_is_separable_and_goes_on() -> None:
    spec = spec_of(base={}, smooth={"loss.smooth": 10})
    found = ranked(spec, {"base": [0.50, 0.51, 0.52], "smooth": [0.70, 0.71, 0.69]})
    assert [row.name for row in found.rows] == ["smooth", "base"]
    assert [row.separable_from_next for row in found.rows] == [True, None]
    assert (found.ranked, found.best) == (True, ("smooth",))
    assert found.noise_sd == pytest.approx(0.01)


def test_noise_is_called_noise_and_the_simpler_goes_on() -> None:
    spec = spec_of(base={}, smooth={"loss.smooth": 10})
    found = ranked(spec, {"base": [0.70, 0.72, 0.74], "smooth": [0.71, 0.73, 0.75]})
    assert found.rows[0].separable_from_next is False
    assert in_words(found.rows[0]) == "not separable"
    assert found.best == ("base",)
    assert "not separable" in found.because


def test_changes_that_each_help_are_combined_if_they_touch_different_fields() -> None:
    spec = spec_of(base={}, smooth={"loss.smooth": 10}, rate={"optimizer.learning_rate": 0.01}, both={"loss.smooth": 5})
    dice = {
        "base": [0.5, 0.51, 0.49],
        "smooth": [0.8, 0.81, 0.79],
        "rate": [0.7, 0.71, 0.69],
        "both": [0.6, 0.61, 0.59],
    }
    found = ranked(spec, dice)
    assert found.best == ("smooth", "rate")
    assert "together they never ran" in found.because


def test_one_seed_ranks_nothing() -> None:
    spec = spec_of(base={}, smooth={"loss.smooth": 10})
    found = ranked(spec, {"base": [0.5], "smooth": [0.9]})
    assert (found.ranked, found.noise_sd) == (False, None)
    assert all(row.separable_from_next is None for row in found.rows)
    assert "too few seeds" in found.because


def test_changes_that_resolve_to_the_same_loss_are_replicates() -> None:
    spec = spec_of(base={}, gamma={"loss.focal_gamma": 5}, smooth={"loss.smooth": 10})
    found = ranked(spec, {"base": [0.70, 0.72, 0.74], "gamma": [0.71, 0.70, 0.75], "smooth": [0.9, 0.92, 0.91]})
    rows = {row.name: row for row in found.rows}
    assert (rows["base"].same_as, rows["gamma"].same_as, rows["smooth"].same_as) == (("gamma",), ("base",), ())
    assert rows["base"].separable_from_next in (False, None)
    sd, _ = pooled_sd([[0.70, 0.72, 0.74, 0.71, 0.70, 0.75], [0.9, 0.92, 0.91]])
    assert found.noise_sd == pytest.approx(sd)


def test_kinds_of_the_same_terms_train_alike_and_effective_numbers_are_uniform() -> None:
    runs = [
        finished("tversky", 0, 0.5, {"loss.kind": "tversky"}),
        finished("per_class", 0, 0.5, {"loss.kind": "per_class_tversky"}),
        finished("effective", 0, 0.5, {"loss.kind": "tversky", "class_weighting": "effective_max"}),
        finished("inverse", 0, 0.5, {"loss.kind": "tversky", "class_weights.*": {"mito": 1.0, "pm": 3.0}}),
    ]
    rows = {row.name: row for row in rank(spec_of(tversky={}, per_class={}, effective={}, inverse={}), runs, {}).rows}
    assert set(rows["tversky"].same_as) == {"per_class", "effective"}
    assert rows["inverse"].same_as == ()


def test_what_one_seed_gives_twice_to_the_last_bit_is_no_repetition() -> None:
    spec = spec_of(base={}, gamma={"loss.focal_gamma": 5})
    found = ranked(spec, {"base": [0.70, 0.72, 0.74], "gamma": [0.70, 0.72, 0.74]})
    assert found.noise_sd == pytest.approx(0.02)


def test_the_scale_of_weights_changes_nothing_and_their_ratio_does() -> None:
    runs = [finished("a", 0, 0.5, {"class_weights.*": {"mito": 2.0, "pm": 2.0}})]
    runs.append(finished("b", 0, 0.5, {"class_weights.*": {"mito": 5.0, "pm": 5.0}}))
    runs.append(finished("c", 0, 0.5, {"class_weights.*": {"mito": 5.0, "pm": 1.0}}))
    rows = {row.name: row.same_as for row in rank(spec_of(a={}, b={}, c={}), runs, {}).rows}
    assert rows == {"a": ("b",), "b": ("a",), "c": ()}


def test_csv_has_a_column_for_each_class_and_survives_odd_text() -> None:
    spec = CompareSpec(changes=(Change(name="base", description='a, "b"\nc'),))
    found = rank(spec, [finished("base", 0, 0.5)], {})
    rows = list(csv.DictReader(io.StringIO(ranking_csv(found))))
    assert rows[0]["description"] == 'a, "b"\nc'
    assert float(rows[0]["mito"]) == 0.5


# ---- specs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_comparisons_make_a_plan_of_every_change(path: Path) -> None:
    spec = read_spec(path)
    check_spec(spec)
    assert all(change.description for change in spec.changes)
    assert len(spec.seeds) >= 3
    for change in spec.changes:
        make_plan(change.name, facts(), machine(threads=1), recipe._settings(spec.base, change.set) | TINY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"changes": []}', "changes: is empty"),
        ('{"changes": [{"name": "a"}, {"name": "a"}]}', "a is there twice"),
        ('{"changes": [{"name": "../a"}]}', "use letters"),
        ('{"changes": [{"name": "a"}], "seeds": [1, 1]}', "give different seeds"),
        ('{"changes": [{"name": "a", "sett": {}}]}', "did you mean 'set'"),
        ("[]", "not an object"),
    ],
)
def test_bad_specs_are_refused_with_the_remedy(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "spec.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=message):
        check_spec(read_spec(path))


def test_a_change_that_makes_no_plan_is_named_before_anything_runs(tmp_path: Path) -> None:
    spec = spec_of(base={}, odd={"loss.kind": "dise"})
    with pytest.raises(PlanError, match="dise"):
        compare(spec, Ground(tmp_path / "none", facts(), machine()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_side_by_side_are_one_a_gpu_and_on_a_cpu_as_many_as_threads_and_ram_allow() -> None:
    from test_planner import gpu

    assert slots_on(machine(gpu(), gpu())) == 2
    assert slots_on(machine(threads=8, ram_gib=64)) == 8
    assert slots_on(machine(threads=8, ram_gib=8)) == 2
    assert slots_on(machine(threads=2, ram_gib=2)) == 1


# ---- end to end ----------------------------------------------------------------------------------------------

STEPS = {"optimizer.num_steps": 2, "patch_size_zyx": [1, 16, 16], "network.features": [4, 8]}


def test_a_comparison_runs_ranks_reports_and_goes_on_where_it_was(small_data: Path, tmp_path: Path) -> None:
    base = STEPS | {"voxel_size_nm": [8, 8, 8], "validation.num_rounds": 1}
    spec = CompareSpec(
        base=base, seeds=(0,), changes=(Change(name="base"), Change(name="smooth", set={"loss.smooth": 10}))
    )
    out, cache, told = tmp_path / "out", tmp_path / "cache", list[str]()
    on = Ground(small_data, fingerprint(small_data, cache), machine(threads=2), cache=cache)
    first = compare(spec, on, out, tell=told.append)
    assert not first.failed
    assert {row.name for row in first.rows} == {"base", "smooth"}
    assert all(row.seeds == (0,) for row in first.rows)
    assert load_as(out / "ranking.json", Ranking) == first
    assert load_as(out / "best_plan.json", Plan).name == "best_plan"
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("weights.safetensors")}
    assert len(stamps) >= 2
    (out / "scores" / "smooth-0.json").unlink()
    again = compare(spec, on, out, tell=told.append)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("weights.safetensors")} == stamps, "nothing trained"
    assert any("1 finished before" in line for line in told)
    write_comparison(out, out / "report.html")
    page = (out / "report.html").read_text()
    assert "smooth" in page
    assert "<script" not in page
    assert (out / "ranking.csv").read_text().startswith("change,")
    other = msgspec.structs.replace(spec, base=base | {"optimizer.num_steps": 3})
    with pytest.raises(PlanError, match="holds another plan of base-0"):
        compare(other, on, out)


def test_a_run_that_fails_is_reported_and_the_others_still_rank(small_data: Path, tmp_path: Path) -> None:
    base = STEPS | {"voxel_size_nm": [8, 8, 8], "validation.num_rounds": 1}
    lost = Change(name="lost", set={"init": str(tmp_path / "nowhere.safetensors")})
    spec = CompareSpec(base=base, seeds=(0,), changes=(Change(name="base"), lost))
    cache = tmp_path / "cache"
    on = Ground(small_data, fingerprint(small_data, cache), machine(threads=1), cache=cache)
    found = compare(spec, on, tmp_path / "out")
    assert [row.name for row in found.rows] == ["base"]
    assert list(found.failed) == ["lost-0"]
    assert "does not exist" in found.failed["lost-0"]
    assert json.loads((tmp_path / "out" / "ranking.json").read_text())["failed"]
