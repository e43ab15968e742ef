"""What was fingerprinted stays what it was: every damage after a fingerprint is named, none gives other numbers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from strategies import crop_path, em_path, listing, write_label, write_multiscale

from autoseg.data import store
from autoseg.data.classes import PRESENT
from autoseg.data.codes import open_codes
from autoseg.data.dataset import Crop, Dataset, complement_counts, open_dataset
from autoseg.data.em import EmReader
from autoseg.data.integrity import find_missing, pin
from autoseg.data.store import sidecar
from autoseg.data.store.codecs import decode_chunk
from autoseg.errors import AutosegError, DamageError, DataError
from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX
from autoseg.plan import fingerprint
from autoseg.schema import Normalization

EM_GRID = Grid((8, 32, 48), (8.0, 4.0, 4.0), (0.0, 0.0, 0.0))
SIZES: tuple[NmZYX, ...] = ((8.0, 4.0, 4.0), (8.0, 8.0, 8.0))
CHUNK: VoxelsZYX = (4, 16, 16)
LABELS = ("mito", "pm", "nuc")


def write_data(root: Path) -> Path:
    """Write one EM volume of two levels and two crops of it, semantic and instance, partly unknown; return DATA."""
    rng = np.random.default_rng(0)
    fine = rng.integers(1, 255, EM_GRID.shape_zyx).astype(np.uint8)
    half = fine.reshape(8, 16, 2, 24, 2).mean(axis=(2, 4)).astype(np.uint8)
    write_multiscale(em_path(root, "a"), [(EM_GRID, fine), (EM_GRID.at_voxel_size(SIZES[1]), half)], chunk_zyx=CHUNK)
    for i, start in enumerate((0, 20), start=1):
        grid = EM_GRID.crop(Box((0, 4, start), (8, 28, start + 24)))
        crop = crop_path(root, "a", f"crop{i}")
        values = rng.integers(0, 2, grid.shape_zyx).astype(np.uint8)
        unknown = values.copy()
        unknown[0] = 255
        write_label(crop, "pm", values, grid, chunk_zyx=CHUNK)
        write_label(
            crop, "mito", unknown, grid, unknown=255, counted_unknown=int((unknown == 255).sum()), chunk_zyx=CHUNK
        )
        ids = (values * rng.integers(1, 2**60, grid.shape_zyx)).astype(np.uint64)
        ids[:4] = 0  # half of its chunks are not stored
        write_label(crop, "nuc", ids, grid, instance=True, unknown=255, chunk_zyx=CHUNK)
    return root


Numbers = dict[str, tuple[NDArray[Any], NDArray[np.bool_]]]


def numbers(data: Path, cache: Path) -> Numbers:
    """Return everything that a training run takes from the data, with what of it is valid."""
    dataset, found = open_dataset(data), Numbers()
    chunks = store.ChunkCache(2**24, store.checksums_in(cache))
    for crop in dataset.crops:
        codes = open_codes(crop, crop.grid.voxel_size_nm, cache)
        states = codes.states_CK[codes.codes_ZYX]
        for k, name in enumerate(codes.names):
            found[f"{crop.name}/{name}"] = states[..., k], np.ones(states.shape[:3], bool)
        for size in SIZES:
            grid = crop.grid.at_voxel_size(size)
            grey, valid = EmReader(crop.em, size, Normalization(kind="volume", volumes=()), chunks).read(grid)
            found[f"{crop.name} at {size}"] = grey, np.ones(grey.shape, bool) if valid is None else valid
    return found


class Place(NamedTuple):
    data: Path
    cache: Path
    before: Numbers

    def fresh(self, tmp_path: Path) -> Path:
        """Return a cache that holds the checksums, and no code volume."""
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        shutil.copytree(self.cache / sidecar.FOLDER, tmp_path / "fresh" / sidecar.FOLDER)
        return tmp_path / "fresh"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("pinned")
    data = write_data(root / "data")
    facts = fingerprint(data, root / "cache")
    assert not facts.left_out
    assert not facts.findings
    return Place(data, root / "cache", numbers(data, root / "cache"))


def first_crop(data: Path) -> Crop:
    return open_dataset(data).crops[0]


# ---- random damages -----------------------------------------------------------------------------------------

Rng = np.random.Generator
Damage = Callable[[Path, Rng], Any]


def flip_bit(path: Path, rng: Rng) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    path.write_bytes(bytes(raw))


def truncate(path: Path, rng: Rng) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.integers(1, len(raw))])


def lengthen(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(3))


def zero_run(path: Path, rng: Rng) -> None:
    """Overwrite a run of bytes by zeros, as a lost disk block does."""
    raw = bytearray(path.read_bytes())
    start = int(rng.integers(len(raw)))
    stop = min(len(raw), start + 64)
    raw[start:stop] = bytes(stop - start)
    path.write_bytes(bytes(raw))


def swap_dtype(path: Path, rng: Rng) -> None:
    text = path.read_text()
    swaps = [(a, b) for a, b in (("|u1", "|i1"), ("<u8", "<i8"), ("<u8", ">u8"), ("<u8", "<f8")) if a in text]
    old, new = swaps[rng.integers(len(swaps))]
    path.write_text(text.replace(old, new))


def swap_chunk(path: Path, rng: Rng) -> None:
    """Put another chunk of the same array in its place: it decodes without an error."""
    array = path.parents[2]
    others = [p for p in array.glob("*/*/*") if p != path]
    path.write_bytes(others[rng.integers(len(others))].read_bytes())


CHUNK_DAMAGES: dict[str, Damage] = {
    "bit flip": flip_bit,
    "truncated": truncate,
    "longer": lengthen,
    "empty": lambda path, rng: path.write_bytes(b""),
    "run of zeros": zero_run,
    "missing": lambda path, rng: path.unlink(),
    "another chunk": swap_chunk,
}
METADATA_DAMAGES: dict[str, Damage] = {
    "missing": lambda path, rng: path.unlink(),
    "truncated": truncate,
    "bit flip": flip_bit,
    "empty": lambda path, rng: path.write_bytes(b""),
}


def damages(data: Path, rng: Rng) -> Iterator[tuple[str, Path, Damage]]:
    """Yield any number of damages to files of the EM and the labels."""
    files = [path for path in sorted(data.rglob("*")) if path.is_file()]
    chunks = [path for path in files if path.name.isdecimal()]
    metadata = [path for path in files if path.name in (".zarray", ".zattrs")]
    arrays = [path for path in files if path.name == ".zarray"]
    while True:
        for kind, damage in CHUNK_DAMAGES.items():
            yield f"chunk: {kind}", chunks[rng.integers(len(chunks))], damage
        for kind, damage in METADATA_DAMAGES.items():
            yield f"metadata: {kind}", metadata[rng.integers(len(metadata))], damage
        yield "metadata: swapped dtype", arrays[rng.integers(len(arrays))], swap_dtype


def outcome(data: Path, cache: Path, before: Numbers) -> str:
    """Return 'named', or 'same' if nothing valid changed; fail if other numbers come out, or another error."""
    try:
        after = numbers(data, cache)
    except AutosegError as error:
        return "named" if len(str(error).splitlines()) == 1 and str(data) in str(error) else str(error)
    assert after.keys() == before.keys()
    for key, (values, valid) in after.items():
        both = valid & before[key][1]
        assert np.array_equal(values[both], before[key][0][both]), f"{key}: other numbers, silently"
        assert both.all(), f"{key}: masked without a word"
    return "same"


@pytest.mark.parametrize("rot", [False, True], ids=["written", "rotten"])
def test_after_a_fingerprint_no_damage_gives_other_numbers(place: Place, tmp_path: Path, rot: bool) -> None:
    """120 random damages each, with a new time of the file (somebody wrote) and with the old one (the disk rots)."""
    rng = np.random.default_rng(7 + rot)
    seen: dict[str, list[str]] = {}
    for (kind, path, damage), _ in zip(damages(place.data, rng), range(120), strict=False):
        raw, status = path.read_bytes(), path.stat()
        damage(path, rng)
        changed = not path.exists() or path.read_bytes() != raw
        if rot and path.exists():
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        try:
            found = outcome(place.data, place.fresh(tmp_path), place.before)
        finally:
            path.write_bytes(raw)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if kind.startswith("chunk") and changed:
            assert found == "named", f"{kind} of {path}"
        assert found in ("named", "same"), found
        seen.setdefault(kind, []).append(found)
    assert len(seen) == len(CHUNK_DAMAGES) + len(METADATA_DAMAGES) + 1
    assert "named" in seen["metadata: bit flip"]
    assert set(seen["metadata: swapped dtype"]) == {"named"}
    assert outcome(place.data, place.fresh(tmp_path), place.before) == "same", "all was restored"


@pytest.mark.parametrize("kind", CHUNK_DAMAGES)
def test_a_damaged_chunk_is_named_with_its_path_and_by_the_next_fingerprint(
    place: Place, tmp_path: Path, kind: str
) -> None:
    data = shutil.copytree(place.data, tmp_path / "data")
    fingerprint(data, tmp_path / "cache")
    paths = [crop_path(data, "a", "crop1") / "pm/s0/0/1/0", em_path(data, "a") / "s1/0/0/0"]
    for path in paths:
        raw = path.read_bytes()
        CHUNK_DAMAGES[kind](path, np.random.default_rng(3))
        for act in (fingerprint, numbers):
            with pytest.raises(DamageError) as caught:
                act(data, tmp_path / "cache")
            assert caught.value.where == str(path.parents[2])
            assert f"chunk {path.relative_to(path.parents[2])} " in caught.value.what
            assert str(tmp_path / "cache/checksums") in caught.value.remedy
        path.write_bytes(raw)
        fingerprint(data, tmp_path / "cache")


def test_an_edit_is_accepted_when_the_checksums_are_deleted(place: Place, tmp_path: Path) -> None:
    data = shutil.copytree(place.data, tmp_path / "data")
    before = fingerprint(data, tmp_path / "cache")
    store.open_for_update(crop_path(data, "a", "crop1") / "pm/s0")[0, 0, 0] ^= 1
    with pytest.raises(DamageError):
        fingerprint(data, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/checksums")
    after = fingerprint(data, tmp_path / "cache")
    assert after.crops[0].stored_sha256 != before.crops[0].stored_sha256
    assert after.crops[1] == before.crops[1]
    (finding,) = after.findings
    assert (finding.where, finding.kind) == ("a/crop1", "miscounted")


def test_data_written_anew_is_not_damaged_data(place: Place, tmp_path: Path) -> None:
    """As a second import into the same folder: other bytes, all of them new."""
    data = shutil.copytree(place.data, tmp_path / "data")
    before = fingerprint(data, tmp_path / "cache")
    shutil.rmtree(crop_path(data, "a", "crop1"))
    grid = before.crops[0].grid
    write_label(crop_path(data, "a", "crop1"), "pm", np.ones(grid.shape_zyx, np.uint16), grid, chunk_zyx=(8, 8, 8))
    after = fingerprint(data, tmp_path / "cache")
    assert after.crops[0].counts["pm"].present == np.prod(grid.shape_zyx)
    assert after.crops[0].stored_sha256 != before.crops[0].stored_sha256


# ---- the record ---------------------------------------------------------------------------------------------


def test_the_digest_depends_on_bytes_and_meaning_only(place: Place, tmp_path: Path) -> None:
    """Not on place, time, or the format of the JSON; so it pins the data on another machine too."""
    data = shutil.copytree(place.data, tmp_path / "data", copy_function=shutil.copyfile)
    for path in data.rglob(".zattrs"):
        path.write_text(path.read_text().replace("\n", "").replace(" ", ""))
    cache = tmp_path / "cache"
    digests = [crop.stored_sha256 for crop in fingerprint(place.data, place.cache).crops]
    assert [crop.stored_sha256 for crop in fingerprint(data, cache).crops] == digests
    assert len(set(digests)) == 2
    other = {"cellmap": {**store.read_attributes(em_path(data, "a")).get("cellmap", {}), "remark": 1}}
    store.write_attributes(em_path(data, "a"), other)
    shutil.rmtree(cache)
    assert all(a.stored_sha256 != b for a, b in zip(fingerprint(data, cache).crops, digests, strict=True))


def test_what_has_the_same_size_and_time_is_not_read_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(place.data, tmp_path / "data")
    checksums, crop = store.checksums_in(tmp_path / "cache"), first_crop(data)
    genuine, read = sidecar._read, list[Path]()
    monkeypatch.setattr(sidecar, "_read", lambda path: read.append(path) or genuine(path))
    digest = pin(crop, checksums)
    num_labels = sum(1 for label in crop.labels for _ in label.path.glob("*/*/*"))
    assert len(read) == num_labels + 2 * 2 * 2 + 2 * 1 * 1, "EM: what touches the crop, at both levels"
    read.clear()
    before = listing(tmp_path / "cache")
    assert pin(crop, checksums) == digest
    assert read == []
    assert listing(tmp_path / "cache") == before, "and nothing is written"
    chunk = crop.labels[0].path / "0/0/0"
    os.utime(chunk, ns=(1, 1))
    assert pin(crop, checksums) == digest
    assert read == [chunk]
    second = open_dataset(data).crops[1]
    read.clear()
    pin(second, checksums)
    em_read = {str(path.relative_to(crop.em)) for path in read if path.is_relative_to(crop.em)}
    assert em_read == {f"s0/{z}/{y}/2" for z in (0, 1) for y in (0, 1)} | {f"s1/{z}/0/1" for z in (0, 1)}


def test_two_records_at_once_lose_nothing(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race, made certain: another process records the second crop while this one reads the first."""
    data = shutil.copytree(place.data, tmp_path / "data")
    checksums, (first, second) = store.checksums_in(tmp_path / "cache"), open_dataset(data).crops
    genuine, read = sidecar._read, list[Path]()

    def overtaken(path: Path) -> Any:
        monkeypatch.setattr(sidecar, "_read", genuine)
        if not path.is_relative_to(first.em):
            monkeypatch.setattr(sidecar, "_read", overtaken)
        else:
            pin(second, checksums)
        return genuine(path)

    monkeypatch.setattr(sidecar, "_read", overtaken)
    pin(first, checksums)
    monkeypatch.setattr(sidecar, "_read", lambda path: read.append(path) or genuine(path))
    pin(first, checksums)
    pin(second, checksums)
    assert read == []
    assert {path.suffix for path in (tmp_path / "cache/checksums").iterdir()} == {".crc"}, "no lock is left"


def test_pinning_writes_nothing_into_the_data(place: Place, tmp_path: Path) -> None:
    before = listing(place.data)
    pin(first_crop(place.data), store.checksums_in(tmp_path))
    assert listing(place.data) == before


def test_em_that_cannot_be_decoded_is_not_recorded(tmp_path: Path) -> None:
    """Else its repair would look like damage."""
    data = write_data(tmp_path / "data")
    chunk = em_path(data, "a") / "s0/0/0/0"
    raw = chunk.read_bytes()
    chunk.write_bytes(raw[:40])
    checksums = store.checksums_in(tmp_path / "cache")
    with pytest.raises(DataError, match=r"em/fibsem-uint8/s0: the chunk 0/0/0 cannot be decoded") as caught:
        pin(first_crop(data), checksums)
    assert not isinstance(caught.value, DamageError)
    chunk.write_bytes(raw)
    pin(first_crop(data), checksums)


def test_a_damaged_sidecar_is_named(place: Place, tmp_path: Path) -> None:
    cache = place.fresh(tmp_path)
    for path in (cache / sidecar.FOLDER).iterdir():
        for content in (b"", path.read_bytes()[:-3], path.read_bytes()[:20] + b"!" + path.read_bytes()[21:]):
            path.write_bytes(content)
            with pytest.raises(DataError, match="damaged checksums"):
                numbers(place.data, cache)
        shutil.rmtree(cache)
        return


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamageError("a", "b", "c")))
    assert (type(error), str(error)) == (DamageError, "a: b: c")


# ---- what is missing before any fingerprint -----------------------------------------------------------------


def findings(dataset: Dataset, cache: Path) -> list[tuple[str, str, dict[str, float]]]:
    found = []
    for crop in dataset.crops:
        codes = open_codes(crop, crop.grid.voxel_size_nm, cache)
        found += [(item.where, item.kind, item.numbers) for item in find_missing(crop, codes)]
    return found


def test_a_lost_label_chunk_is_found_by_its_counts(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    assert findings(open_dataset(data), tmp_path / "cache") == []
    crop = crop_path(data, "a", "crop2")
    voxels = store.ArrayReader(crop / "mito/s0", store.ChunkCache(0)).read(Box((0, 0, 16), (4, 16, 24)))
    (crop / "mito/s0/0/0/1").unlink()
    counts = {
        key: int((store.ArrayReader(crop / "mito/s0", store.ChunkCache(0)).read(Box.whole((8, 24, 24))) == value).sum())
        for key, value in (("absent", 0), ("unknown", 255))
    }
    gone = {"absent": int((voxels == 0).sum()) - voxels.size, "unknown": int((voxels == 255).sum())}
    assert findings(open_dataset(data), tmp_path / "cache") == [
        ("a/crop2", "miscounted", {"held": counts[key], "counted": counts[key] + gone[key], "chunks_missing": 1})
        for key in ("absent", "unknown")
    ]
    (item,) = [item for item in fingerprint(data, tmp_path / "cache").findings if "unknown voxels" in item.what]
    assert "mito" in item.what
    assert "1 of its 8 chunks are not stored" in item.what


def test_values_that_no_encoding_declares_are_counted_and_told(tmp_path: Path) -> None:
    """They count as present; whole blocks of one value, blocks of many and chunks not stored are counted alike."""
    data = write_data(tmp_path / "data")
    crop = crop_path(data, "a", "crop2")
    values = np.zeros((8, 64, 200), np.uint8)
    grid = Grid(values.shape, EM_GRID.voxel_size_nm, EM_GRID.origin_nm)
    shutil.rmtree(crop)
    values[:, :20], values[:, 20:24], values[4:, :, 128:], values[:, 40:50, :9] = 1, 7, 9, 255
    write_label(
        crop, "mito", values, grid, unknown=255, counted_unknown=int((values == 255).sum()), chunk_zyx=(4, 64, 64)
    )
    write_label(crop, "pm", values, grid, unknown=255, instance=True, chunk_zyx=(4, 64, 64))
    write_label(crop, "er", np.minimum(values, 1), grid, chunk_zyx=(4, 64, 64))
    dataset = open_dataset(data)
    found = [item for item in findings(dataset, tmp_path / "cache") if item[1] == "undeclared"]
    odd = int(np.isin(values, (7, 9)).sum())
    assert found == [("a/crop2", "undeclared", {"voxels": odd})]
    codes = open_codes(dataset.crop("a/crop2"), grid.voxel_size_nm, tmp_path / "cache")
    present = codes.states_CK[codes.codes_ZYX][..., codes.names.index("mito")] == PRESENT
    assert np.array_equal(present, (values != 0) & (values != 255))
    (item,) = [item for item in fingerprint(data, tmp_path / "cache").findings if item.kind == "undeclared"]
    assert f"mito has {odd:,} voxels of other values than its encoding declares (0, 1, 255)" in item.what


def test_unknown_voxels_that_were_counted_but_have_no_value_are_told(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    mito = crop_path(data, "a", "crop2") / "mito"
    for path in (mito / ".zattrs", mito / "s0/.zattrs"):
        attributes = json.loads(path.read_text())
        encoding = attributes["cellmap"]["annotation"]["annotation_type"]["encoding"]
        encoding.pop("unknown")
        path.write_text(json.dumps(attributes))
    counted = complement_counts(open_dataset(data).crop("a/crop2").labels[0])["unknown"]
    assert counted > 0
    found = [item for item in findings(open_dataset(data), tmp_path / "cache") if item[1] == "undeclared"]
    assert ("a/crop2", "undeclared", {"counted": counted}) in found


def test_em_outside_and_em_never_fetched_are_told_with_their_share(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    grid = EM_GRID.crop(Box((0, 4, 36), (8, 28, 60)))  # 12 of its 24 columns lie beyond the EM
    for name in ("mito", "pm", "nuc"):
        shutil.rmtree(crop_path(data, "a", "crop2") / name)
    write_label(crop_path(data, "a", "crop2"), "pm", np.ones(grid.shape_zyx, np.uint8), grid)
    for level in ("s0/0/0/0", "s1/0/0/0"):
        (em_path(data, "a") / level).unlink()
    found = findings(open_dataset(data), tmp_path / "cache")
    assert found == [
        ("a/crop1", "not-fetched", {"share": pytest.approx(12 * 16 * 4 / (24 * 24 * 8))}),
        ("a/crop2", "outside", {"share": 0.5}),
    ]


def test_one_damaged_crop_of_many_is_left_out_and_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    for i in range(3, 7):
        shutil.copytree(crop_path(data, "a", "crop1"), crop_path(data, "a", f"crop{i}"))
    (crop_path(data, "a", "crop4") / "pm/s0/0/0/0").write_bytes(b"")
    facts = fingerprint(data, tmp_path / "cache")
    assert [crop.name for crop in facts.crops] == [f"a/crop{i}" for i in (1, 2, 3, 5, 6)]
    (item,) = facts.left_out
    assert item.name == "a/crop4"
    assert item.why.startswith("a/a.zarr/recon-1/labels/groundtruth/crop4/pm/s0: the chunk 0/0/0 cannot be decoded")
    assert fingerprint(data, tmp_path / "cache") == facts
    (crop_path(data, "a", "crop5") / "pm/s0/0/0/0").write_bytes(b"")
    with pytest.raises(AutosegError, match=r"crop5/pm/s0: chunk 0/0/0 is not what was fingerprinted"):
        fingerprint(data, tmp_path / "cache")
    with pytest.raises(DataError, match=r"2 of 6 crops cannot be used, first: a/a\.zarr.*crop4.*; a/a\.zarr.*crop5"):
        fingerprint(data, tmp_path / "another cache")


def test_em_damaged_under_a_crop_or_under_none_does_not_stop_the_rest(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    for i in range(3, 7):
        shutil.copytree(crop_path(data, "a", "crop1"), crop_path(data, "a", f"crop{i}"))
    shutil.rmtree(crop_path(data, "a", "crop2"))  # the only one in the last columns
    (em_path(data, "a") / "s0/1/1/2").write_bytes(b"")
    facts = fingerprint(data, tmp_path / "cache")
    assert (len(facts.crops), facts.left_out) == (5, ())
    (finding,) = facts.findings
    assert (finding.where, finding.kind, finding.numbers) == ("a", "damaged", {"chunks": 1, "sampled": 12})
    assert "first: s0: the chunk 1/1/2 cannot be decoded" in finding.what


@pytest.mark.parametrize("shape", [(10**9,) * 3, (2**14,) * 3], ids=["no such array", "no such disk"])
def test_a_crop_whose_labels_cannot_be_so_large_is_left_out_and_named(tmp_path: Path, shape: VoxelsZYX) -> None:
    data = write_data(tmp_path / "data")
    for i in range(3, 7):
        shutil.copytree(crop_path(data, "a", "crop1"), crop_path(data, "a", f"crop{i}"))
    for name in LABELS:
        path = crop_path(data, "a", "crop4") / name / "s0/.zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": shape, "chunks": (32, 512, 512)}))
    (item,) = fingerprint(data, tmp_path / "cache").left_out
    assert item.name == "a/crop4"
    assert str(tmp_path) not in item.why
    assert "chunks of (32, 512, 512)" in item.why or "GiB of codes, the disk has" in item.why


# ---- the share of flips that nothing but a checksum tells ---------------------------------------------------

CODECS: dict[str, Any] = {
    "blosc-zstd": numcodecs.Blosc("zstd", 3, numcodecs.Blosc.SHUFFLE),
    "blosc-lz4": numcodecs.Blosc("lz4", 5, numcodecs.Blosc.SHUFFLE),
    "zstd": numcodecs.Zstd(3),
    "gzip": numcodecs.GZip(5),
    "none": None,
}


def chunks_of_both_kinds(edge: int) -> dict[str, NDArray[Any]]:
    """Return a chunk of EM (smooth, noisy, uint8) and one of labels (a few large objects)."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.standard_normal((edge,) * 3), 4)
    field /= field.std()
    em = np.clip(128 + 40 * field + rng.normal(0, 10, field.shape), 0, 255).astype(np.uint8)
    return {"EM": em, "labels": (field > 0.5).astype(np.uint8)}


def share_undetected(values: NDArray[Any], codec: Any, flips: int) -> tuple[float, float]:
    """Return the share of bit flips that decode to other voxels without an error: (without, with a checksum)."""
    import zlib

    rng = np.random.default_rng(1)
    codecs = [] if codec is None else [codec.get_config()]
    good = values.tobytes() if codec is None else bytes(codec.encode(values))
    passed = pinned = 0
    for _ in range(flips):
        raw = bytearray(good)
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        try:
            found = decode_chunk(bytes(raw), codecs, values.dtype, values.size)
        except ValueError:
            continue
        if not np.array_equal(found, values.ravel()):
            passed += 1
            pinned += zlib.crc32(bytes(raw)) == zlib.crc32(good)
    return passed / flips, pinned / flips


@pytest.mark.parametrize("name", CODECS)
def test_a_flipped_bit_is_always_found_by_its_checksum_and_without_it_often_not(name: str) -> None:
    shares = [share_undetected(values, CODECS[name], 150) for values in chunks_of_both_kinds(24).values()]
    assert [pinned for _, pinned in shares] == [0, 0]
    if name == "none":
        assert [plain for plain, _ in shares] == [1, 1]
    elif name == "gzip":
        assert max(plain for plain, _ in shares) < 0.02, "gzip has a checksum of its own"
    else:
        assert max(plain for plain, _ in shares) > 0.3, "else nobody needs ours"


if __name__ == "__main__":  # the table of the documentation: share of 2,000 flips in a 64³ chunk
    for kind, chunk in chunks_of_both_kinds(64).items():
        for name, codec in CODECS.items():
            plain, pinned = share_undetected(chunk, codec, 2000)
            print(f"{kind:7} {name:11} undetected before a fingerprint {plain:7.2%}, after it {pinned:.2%}")
