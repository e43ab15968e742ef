"""Facts of crops: counted whole, or sampled with an interval that holds; patches they fill; polarity and drift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from strategies import write_multiscale

from autoseg.data import store
from autoseg.data.classes import PRESENT, Logic
from autoseg.data.codes import open_codes
from autoseg.data.dataset import open_dataset
from autoseg.data.greys import measure_intensity
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid
from autoseg.plan import crops, fingerprint
from autoseg.plan.crops import open_crop, sampled_boxes, share_interval
from autoseg.plan.extents import valid_shares
from autoseg.schema import Fingerprint, Intensity, load_as

SHIPPED = Path(__file__).parents[1] / "plans" / "fingerprints" / "cellmap.json"


# ---- co-occurrence -------------------------------------------------------------------------------------------


def test_cooccurrence_counts_the_voxels_of_each_pair(small_data: Path, tmp_path: Path) -> None:
    found = fingerprint(small_data, tmp_path / "cache")
    names = [entry.name for entry in found.classes]
    dataset = open_dataset(small_data)
    logic = Logic(dataset.table)
    expected = np.zeros((len(names), len(names)), dtype=np.int64)
    for crop in dataset.crops:
        codes = open_codes(crop, crop.grid.voxel_size_nm, tmp_path / "cache", logic)
        present = codes.states_CK[codes.codes_ZYX][..., [codes.names.index(name) for name in names]] == PRESENT
        flat = present.reshape(-1, len(names)).astype(np.int64)
        expected += flat.T @ flat
    assert np.array_equal(np.array(found.cooccurrence), expected)
    present = [sum(crop.counts[name].present for crop in found.crops if name in crop.counts) for name in names]
    assert np.array_equal(np.diag(expected), present)
    assert expected.any()


# ---- samples -------------------------------------------------------------------------------------------------


def test_an_interval_holds_the_share_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), []
    for share in (0.5, 0.02, 0.005):
        for _ in range(12):
            smooth = gaussian_filter(rng.standard_normal((96, 128, 128)), 5)
            mask = smooth > np.quantile(smooth, 1 - share)
            boxes = mask.reshape(6, 16, 8, 16, 8, 16).sum((1, 3, 5)).ravel()
            for _ in range(10):
                chosen = rng.choice(len(boxes), 64, replace=False)
                low, high = share_interval(boxes[chosen], np.full(64, 4096), 64 / len(boxes)) or (1.0, 0.0)
                held.append(low <= mask.mean() <= high)
    assert 0.9 <= np.mean(held) <= 0.99


@pytest.mark.parametrize(
    ("present", "low", "high"),
    [
        pytest.param([0] * 64, 0.0, 0.06, id="never-seen-is-not-absent"),
        pytest.param([4096] * 64, 0.94, 1.0, id="everywhere"),
        pytest.param([900, *[0] * 63], 0.0, 0.8, id="one-box-says-little"),
        pytest.param([100, 101] * 32, 0.0240, 0.0251, id="boxes-agree"),
    ],
)
def test_intervals_of_extremes(present: list[int], low: float, high: float) -> None:
    found = share_interval(np.array(present), np.full(64, 4096), 0.001)
    assert found is not None
    assert low <= found[0] <= found[1] <= high
    assert found[1] > found[0]


def test_nothing_known_has_no_interval_and_all_read_has_no_width() -> None:
    assert share_interval(np.array([0, 0]), np.array([0, 0]), 0.1) is None
    assert share_interval(np.array([5]), np.array([9]), 0.1) is None
    assert share_interval(np.array([1, 3]), np.array([10, 10]), 1.0) == (0.2, 0.2)


@pytest.fixture
def _sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "WHOLE_LABEL_VOXELS", 1)
    monkeypatch.setattr(crops, "SAMPLED_BOX", (4, 8, 8))
    monkeypatch.setattr(crops, "SAMPLED_BOXES", 12)


@pytest.mark.usefixtures("_sampled")
def test_parts_of_a_crop_have_the_codes_of_the_whole(small_data: Path, tmp_path: Path) -> None:
    for crop in open_dataset(small_data).crops:
        whole = open_codes(crop, crop.grid.voxel_size_nm, tmp_path)
        boxes = sampled_boxes(crop)
        assert len({box.start for box in boxes}) == len(boxes) > 1
        assert boxes == sampled_boxes(crop), "by lot of its name"
        for box in boxes:
            part = open_codes(crop.part(box), crop.grid.voxel_size_nm, tmp_path)
            assert part.grid == crop.grid.crop(box)
            expected = whole.states_CK[whole.codes_ZYX[box.slices]]
            assert np.array_equal(part.states_CK[part.codes_ZYX], expected)


@pytest.mark.usefixtures("_sampled")
def test_a_crop_that_is_too_large_is_sampled_and_says_so(small_data: Path, tmp_path: Path) -> None:
    found = fingerprint(small_data, tmp_path / "cache")
    assert found == fingerprint(small_data, tmp_path / "other"), "the same boxes each time"
    for crop in found.crops:
        said = [finding for finding in found.findings if (finding.where, finding.kind) == (crop.name, "sampled")]
        assert len(said) == 1
        assert not said[0].alarm
        for count in crop.counts.values():
            total = count.absent + count.present + count.unknown
            assert total == pytest.approx(np.prod(crop.shape_zyx), abs=3)
            assert count.along_y == ()
            if count.absent + count.present and count.share_interval:
                low, high = count.share_interval
                assert 0 <= low <= count.present / (count.absent + count.present) <= high <= 1


def test_all_boxes_of_a_crop_count_what_the_whole_counts(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fingerprint(small_data, tmp_path / "cache")
    monkeypatch.setattr(crops, "WHOLE_LABEL_VOXELS", 1)
    monkeypatch.setattr(crops, "SAMPLED_BOX", (8, 16, 16))
    monkeypatch.setattr(crops, "SAMPLED_BOXES", 10**6)
    boxes = fingerprint(small_data, tmp_path / "cache")
    for a, b in zip(whole.crops, boxes.crops, strict=True):
        for name, count in a.counts.items():
            other = b.counts[name]
            assert (other.absent, other.present, other.unknown) == (count.absent, count.present, count.unknown)
        assert (a.known_voxels, a.conflicts) == (b.known_voxels, b.conflicts)
        assert a.contradictions == b.contradictions
    assert whole.cooccurrence == boxes.cooccurrence


@pytest.mark.usefixtures("_sampled")
def test_codes_that_have_no_room_are_refused_before_a_sample_is_read(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(small_data)
    monkeypatch.setattr("autoseg.data.coding.shutil.disk_usage", lambda _: (10, 0, 10))
    with pytest.raises(DataError, match="GiB of codes, the disk has"):
        open_crop(dataset.crops[0], Logic(dataset.table), [], tmp_path)


# ---- patches -------------------------------------------------------------------------------------------------


def test_the_patch_of_the_cellmap_experiments_was_15_percent_valid() -> None:
    """256² at 8 nm held 15 % annotated tissue in the median crop; 96² holds 98 % in the mean."""
    found = load_as(SHIPPED, Fingerprint)
    five = {"nuc", "mito_mem", "er_mem", "pm", "golgi_mem"}
    annotated = [crop for crop in found.crops if five <= set(crop.annotated)]
    assert len(annotated) == 238
    shares = {
        (round(s.voxel_size_nm[0]), s.patch_size_zyx): s for s in valid_shares(annotated) if s.patch_size_zyx[0] == 1
    }
    assert shares[8, (1, 256, 256)].median == pytest.approx(0.153, abs=0.001)
    assert shares[8, (1, 96, 96)].mean == pytest.approx(0.985, abs=0.001)
    assert shares[4, (1, 128, 128)].mean == pytest.approx(0.998, abs=0.001)
    assert found.valid_shares == valid_shares(found.crops)


# ---- grey values ---------------------------------------------------------------------------------------------


def grey_of(folder: Path, voxels: NDArray[np.uint8]) -> Intensity:
    grid = Grid((voxels.shape[0], voxels.shape[1], voxels.shape[2]), (40.0, 4.0, 4.0), (0.0, 0.0, 0.0))
    path = write_multiscale(folder / "em", [(grid, voxels)], chunk_zyx=(4, 32, 32))
    return measure_intensity(store.ArrayReader(path / "s0", store.ChunkCache(2**24))).intensity


def membranes(seed: int = 0) -> NDArray[np.uint8]:
    """Return bright tissue with thin dark lines."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.standard_normal((24, 96, 96)), (0, 6, 6))
    lines = np.abs(smooth) < 0.003
    grey = 180 + 10 * rng.standard_normal(smooth.shape) - 90 * lines
    return np.clip(grey, 1, 255).astype(np.uint8)


def test_polarity_turns_with_the_grey_values(tmp_path: Path) -> None:
    dark, bright = grey_of(tmp_path / "a", membranes()), grey_of(tmp_path / "b", 255 - membranes())
    assert (dark.polarity, bright.polarity) == ("dark", "bright")
    assert dark.local_skewness is not None
    assert dark.local_skewness == pytest.approx(-(bright.local_skewness or 0), rel=1e-3)
    noise = np.random.default_rng(0).integers(100, 150, (24, 96, 96)).astype(np.uint8)
    assert grey_of(tmp_path / "c", noise).polarity is None
    assert grey_of(tmp_path / "d", np.full((24, 96, 96), 7, np.uint8)).local_skewness is None


def test_drift_is_the_spread_of_the_means_of_sections(tmp_path: Path) -> None:
    still = membranes().astype(float)
    shift = np.linspace(-20, 20, 24)
    drifting = np.clip(still + shift[:, None, None], 1, 255)
    found = grey_of(tmp_path / "a", drifting.astype(np.uint8))
    assert found.drift_z == pytest.approx(shift.std() / found.sd, rel=0.05)
    quiet = grey_of(tmp_path / "b", still.astype(np.uint8)).drift_z
    assert quiet is not None
    assert quiet < 0.1
    assert grey_of(tmp_path / "c", membranes()[:1]).drift_z is None


def test_the_interval_of_the_mean_is_exact_where_all_was_read_and_holds_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = membranes()
    whole = grey_of(tmp_path / "a", voxels)
    assert whole.mean_interval == (whole.mean, whole.mean)
    monkeypatch.setattr("autoseg.data.greys.SAMPLED_CHUNKS", 12)
    held = []
    for seed in range(30):
        ramp = membranes(seed).astype(float) * np.linspace(0.7, 1.0, 96)
        found = grey_of(tmp_path / f"r{seed}", ramp.astype(np.uint8))
        assert found.mean_interval is not None
        low, high = found.mean_interval
        held.append(low <= ramp.astype(np.uint8).mean() <= high)
        assert 0 < high - low < 2 * found.sd
    assert np.mean(held) >= 0.85
    monkeypatch.setattr("autoseg.data.greys.SAMPLED_CHUNKS", 1)
    assert grey_of(tmp_path / "one", voxels).mean_interval is None


def test_a_part_of_a_part_lies_where_it_should(small_data: Path) -> None:
    crop = open_dataset(small_data).crops[0]
    once = crop.part(Box((1, 2, 3), (5, 8, 8))).part(Box((1, 1, 1), (2, 3, 3)))
    assert once.start_zyx == (2, 3, 4)
    assert once.grid == crop.grid.crop(Box((2, 3, 4), (3, 5, 6)))


def test_the_mean_is_that_of_all_voxels_whatever_the_size_of_their_chunks(tmp_path: Path) -> None:
    voxels = np.full((8, 64, 80), 100, np.uint8)
    voxels[..., 64:] = 200  # narrow chunks at the edge, much brighter
    voxels[..., ::2] += 10
    found = grey_of(tmp_path / "a", voxels)
    assert (found.mean, found.sd) == pytest.approx((voxels.mean(), voxels.std()))
    assert (found.minimum, found.maximum, found.num_voxels) == (100, 210, voxels.size)
    assert found.mean_interval == pytest.approx((voxels.mean(), voxels.mean()))


def test_padding_changes_neither_polarity_nor_drift(tmp_path: Path) -> None:
    plain, padded = membranes(), membranes()
    z, y, x = np.indices(padded.shape)
    padded[(y - 48) ** 2 + (x - 48) ** 2 > 40**2] = 0
    padded[x < 2 * z] = 0  # slanted
    whole, cut = grey_of(tmp_path / "a", plain), grey_of(tmp_path / "b", padded)
    assert (whole.polarity, cut.polarity) == ("dark", "dark")
    assert cut.drift_z is not None
    assert cut.drift_z < 0.1


def test_a_volume_that_is_brighter_on_one_side_does_not_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.data.greys.SAMPLED_CHUNKS", 12)
    brighter = np.clip(membranes() * np.linspace(0.5, 1.2, 96), 1, 255).astype(np.uint8)
    found = grey_of(tmp_path / "a", brighter)
    assert found.drift_z is not None
    assert found.drift_z < 0.2
