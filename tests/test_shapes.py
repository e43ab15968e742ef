"""Shapes: bodies of known size read as what they are, at any voxel size; instances by a slow count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from strategies import crop_path, em_path, listing, write_label, write_multiscale

from autoseg.data import shapes as shapes_module
from autoseg.data.codes import open_codes
from autoseg.data.dataset import open_dataset
from autoseg.data.shapes import ShapeSample, instance_sizes, measure_shape, pool_shape, thickness
from autoseg.geometry import Grid, NmZYX, VoxelsZYX
from autoseg.plan import fingerprint
from autoseg.report.data_tables import class_table
from autoseg.report.terminal import make_console
from autoseg.schema import ClassShape, Fingerprint

SIZES: list[NmZYX] = [(1.74, 2.0, 2.0), (4.0, 4.0, 4.0), (4.0, 6.0, 5.0), (8.0, 8.0, 8.0), (50.0, 4.6, 4.6)]
KINDS = ("slab", "tube", "ball")
BODIES = [(size, nm) for size in SIZES for nm in (20.0, 37.0, 64.0) if nm < 40 or min(size) > 2]


def body(kind: str, thickness_nm: float, size: NmZYX, normal: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Return a body in a box twice as wide: slab across `normal`, tube along it, or ball."""
    flat = size[0] >= 3 * size[1]
    extent = 2 * thickness_nm + 30
    shape = [2 * round(extent / (2 * v)) + 3 for v in size]
    if flat:
        shape[0] = 3
    axes = [(np.arange(n) - (n - 1) / 2) * v for n, v in zip(shape, size, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) - np.array([0.3, 0.7, -0.4])
    unit = np.array((0.0, *normal[1:]) if flat and kind == "slab" else (1.0, 0, 0) if flat else normal)
    along = points @ (unit / np.linalg.norm(unit))
    square = (points[..., 1:] if flat else points) ** 2
    distance2 = {
        "slab": along**2,
        "tube": (points**2).sum(-1) - along**2,
        "ball": square.sum(-1),
    }[kind]
    return np.asarray(distance2 <= (thickness_nm / 2) ** 2)


@pytest.mark.parametrize(("size", "nm"), BODIES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normal", [(0.0, 0.0, 1.0), (0.0, 1.0, 0.4), (0.5, 0.3, 0.8)])
def test_a_body_of_known_thickness_reads_as_that(
    kind: str, nm: float, size: NmZYX, normal: tuple[float, float, float]
) -> None:
    """Within a voxel, or a tenth more (in the plane of sections, a voxel of the plane)."""
    step = 1.1 * max(v for v in size if v < 3 * min(size))
    values, _ = thickness(body(kind, nm, size, normal), size)
    assert abs(float(np.median(values)) - nm) <= step + 1e-6


@given(st.integers(1, 9), st.integers(0, 2), st.sampled_from(SIZES[:4]))
def test_a_slab_along_an_axis_is_as_thick_as_its_voxels(layers: int, axis: int, size: NmZYX) -> None:
    mask = np.zeros((2 * layers + 9,) * 3, bool)
    mask[(slice(None),) * axis + (slice(layers + 2, 2 * layers + 2),)] = True
    values, _ = thickness(mask, size)
    assert values == pytest.approx(np.full(len(values), layers * size[axis]), rel=1e-5)


def test_a_thin_membrane_in_coarse_sections_reads_its_width_in_the_plane() -> None:
    """37 nm at 50 x 4.6 x 4.6 nm: eight voxels in the section, and not one section of 50 nm."""
    mask = np.zeros((4, 64, 64), bool)
    mask[:, 20:28] = True
    values, _ = thickness(mask, (50.0, 4.6, 4.6))
    assert np.median(values) == pytest.approx(36.8)
    mask[:] = False
    mask[1, 20:28] = True
    assert np.median(thickness(mask, (50.0, 4.6, 4.6))[0]) == pytest.approx(36.8)


def test_what_leaves_the_box_or_meets_the_unknown_is_left_out() -> None:
    mask = np.zeros((40, 40, 40), bool)
    mask[:6] = True
    values, cut = thickness(mask, (4.0, 4.0, 4.0))
    assert len(values) == 0
    assert cut > 0
    mask[:] = False
    mask[10:16] = True
    whole, _ = thickness(mask, (4.0, 4.0, 4.0))
    unknown = np.zeros_like(mask)
    unknown[16:] = True
    assert len(whole) > 0
    assert len(thickness(mask, (4.0, 4.0, 4.0), unknown)[0]) == 0, "it may go on where nobody looked"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 9), (5, 6, 7)])
def test_nothing_and_everything_have_no_thickness(shape: VoxelsZYX) -> None:
    assert len(thickness(np.zeros(shape, bool), (4.0, 4.0, 4.0))[0]) == 0
    assert len(thickness(np.ones(shape, bool), (4.0, 4.0, 4.0))[0]) == 0


def test_one_section_is_measured_in_its_plane() -> None:
    mask = np.zeros((1, 40, 40), bool)
    mask[:, :, 10:15] = True
    assert np.median(thickness(mask, (8.0, 8.0, 8.0))[0]) == pytest.approx(40.0)


# ---- instances ----------------------------------------------------------------------------------------------


def sizes_by_loops(labels: NDArray[np.unsignedinteger]) -> tuple[list[int], int]:
    sizes, cut = [], 0
    for label in sorted(set(labels.ravel().tolist()) - {0}):
        voxels = np.argwhere(labels == label)
        touches = any(
            n > 1 and (voxels[:, axis].min() == 0 or voxels[:, axis].max() == n - 1)
            for axis, n in enumerate(labels.shape)
        )
        cut += touches
        sizes += [] if touches else [len(voxels)]
    return sorted(sizes), cut


@given(st.tuples(st.integers(1, 6), st.integers(2, 8), st.integers(2, 8)), st.integers(0, 99))
def test_sizes_are_those_of_whole_objects(shape: VoxelsZYX, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 0, 1, 7, 255, 2**63, 2**64 - 1], np.uint64), shape)
    labels[:, 1:-1, 1:-1] = np.where(rng.random((shape[0], shape[1] - 2, shape[2] - 2)) < 0.3, 12, 0)
    sizes, cut = instance_sizes(labels)
    assert (sorted(sizes.tolist()), cut) == sizes_by_loops(labels)


# ---- in a data set ------------------------------------------------------------------------------------------


def ball_data(root: Path, shape: VoxelsZYX = (48, 56, 60), crops: int = 2) -> tuple[Path, NDArray[np.uint64]]:
    """Write crops with balls 40 nm wide as instances (`ves`), their shell as a mask, and a slab (`pm`)."""
    size: NmZYX = (4.0, 4.0, 4.0)
    rng = np.random.default_rng(3)
    ids = np.zeros(shape, np.uint64)
    points = np.stack(np.indices(shape), axis=-1) * 4.0
    for z in range(10, shape[0], 18):
        for y in range(9, shape[1], 18):
            for x in range(4, shape[2], 18):
                centre = (np.array((z, y, x)) + rng.random(3)) * 4
                ids[((points - centre) ** 2).sum(-1) <= 400] = 2**40 + 1000 * z + 50 * y + x
    slab = np.zeros(shape, np.uint8)
    slab[:, 20:26] = 1
    slab[ids > 0] = 0
    for i in range(crops):
        grid = Grid(shape, size, (0.0, 0.0, 4.0 * shape[2] * i))
        crop = crop_path(root, "a", f"crop{i + 1}")
        write_label(crop, "ves", ids, grid, instance=True, unknown=255)
        write_label(crop, "ves_lum", (ndimage.binary_erosion(ids > 0) > 0).astype(np.uint8), grid)
        write_label(crop, "pm", slab, grid)
    whole = Grid((shape[0], shape[1], shape[2] * crops), size, (0.0, 0.0, 0.0))
    write_multiscale(em_path(root, "a"), [(whole, np.full(whole.shape_zyx, 9, np.uint8))])
    return root, ids


def by_name(facts: Fingerprint) -> dict[str, ClassShape]:
    return {shape.name: shape for shape in facts.shapes}


def test_the_fingerprint_says_how_thick_and_how_many(tmp_path: Path) -> None:
    root, ids = ball_data(tmp_path / "data")
    before = listing(root)
    shapes = by_name(fingerprint(root, tmp_path / "cache"))
    assert set(shapes) == {"ves", "ves_lum", "pm"}
    sizes, cut = sizes_by_loops(ids)
    ves, lum, pm = shapes["ves"], shapes["ves_lum"], shapes["pm"]
    assert (ves.num_instances, ves.num_instances_cut) == (2 * len(sizes), 2 * cut)
    assert ves.instance_nm3 is not None
    assert ves.instance_nm3.p50 == pytest.approx(np.median(sizes) * 64, rel=0.1)
    assert ves.thickness_nm is not None
    assert ves.thickness_nm.p50 == pytest.approx(40, abs=4)
    # a vesicle's lumen is counted by its connected components
    eroded, _ = ndimage.label(ndimage.binary_erosion(ids > 0), np.ones((3, 3, 3)))
    lumens, lumens_cut = sizes_by_loops(eroded.astype(np.uint32))
    assert (lum.num_instances, lum.num_instances_cut) == (2 * len(lumens), 2 * lumens_cut)
    assert pm.thickness_nm is not None
    assert pm.thickness_nm.p50 == pytest.approx(24, abs=0.1)
    assert pm.sampled_crops == 2
    assert not pm.in_plane
    assert listing(root) == before


def test_the_same_data_elsewhere_gives_the_same_shapes_and_a_second_time_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes_module, "THICKNESS_VOXELS", 24**3)
    monkeypatch.setattr(shapes_module, "INSTANCE_VOXELS", 30**3)
    first = fingerprint(ball_data(tmp_path / "one")[0], tmp_path / "cache").shapes
    second = fingerprint(ball_data(tmp_path / "two")[0], tmp_path / "cache").shapes
    assert first == second

    def never(*_: object) -> ShapeSample:
        raise AssertionError("measured again")

    monkeypatch.setattr(shapes_module, "_measure", never)
    assert fingerprint(tmp_path / "one", tmp_path / "cache").shapes == first
    for path in (tmp_path / "cache").rglob("shape-*.json"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AssertionError, match="measured again"):
        fingerprint(tmp_path / "one", tmp_path / "cache")


def test_a_body_wider_than_the_first_box_is_measured_at_a_coarser_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes_module, "THICKNESS_VOXELS", 20**3)
    shape = (64, 64, 64)
    grid = Grid(shape, (4.0, 4.0, 4.0), (0.0, 0.0, 0.0))
    points = np.stack(np.indices(shape), axis=-1) - 31.5
    root = tmp_path / "data"
    write_label(crop_path(root, "a", "crop1"), "nuc", ((points**2).sum(-1) <= 20**2).astype(np.uint8), grid)
    write_multiscale(em_path(root, "a"), [(grid, np.ones(shape, np.uint8))])
    (crop,) = open_dataset(root).crops
    codes = open_codes(crop, crop.grid.voxel_size_nm, tmp_path / "cache")
    sample = measure_shape(codes, codes.states_CK[:, 0], None, crop.name)
    assert np.median(sample.thickness_nm) == pytest.approx(160, abs=16)


@settings(max_examples=20)
@given(st.lists(st.floats(1, 100), min_size=1, max_size=9), st.integers(2, 50))
def test_each_crop_weighs_alike(values: list[float], times: int) -> None:
    """Many repetitions of one crop's values do not outvote the other crop."""

    def sample(numbers: list[float]) -> ShapeSample:
        return ShapeSample(tuple(sorted(numbers)), len(numbers), 0, (), 0, 0, 1)

    few = pool_shape("mito", [sample(values), sample([500.0])], in_plane=False)
    many = pool_shape("mito", [sample(values * times), sample([500.0])], in_plane=False)
    assert few.thickness_nm is not None
    assert many.thickness_nm is not None
    assert few.thickness_nm.p90 == many.thickness_nm.p90 == 500.0
    assert min(values) - 1e-3 <= many.thickness_nm.p10 <= np.median(values) + 1e-3
    assert many.instance_nm3 is None


def test_the_table_shows_thickness_and_instances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = fingerprint(ball_data(tmp_path / "data", crops=1)[0], tmp_path / "cache")
    console = make_console()
    console.width = 200
    console.print(class_table(facts))
    shown = capsys.readouterr().err
    assert "24 (24–24)" in shown
    shape = by_name(facts)["ves"]
    assert f"{shape.num_instances} + {shape.num_instances_cut}" in shown
