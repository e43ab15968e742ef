"""The door to people's files: what is written with a library comes back, and bad input is one DataError."""

import itertools
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from autoseg.data.formats import expand_globs, open_volume, readers, write_hdf5, write_tiff, writers
from autoseg.errors import DataError

SHAPE = (5, 7, 11)
Nifti: Any = nibabel.Nifti1Image
VOXEL_NM = (40.0, 5.9, 4.6)
Save = Callable[[Path, NDArray[Any]], str]


def volume_of(shape: tuple[int, ...] = SHAPE, dtype: Any = np.uint8) -> NDArray[Any]:
    """Return random voxels of any real dtype."""
    rng = np.random.default_rng(7)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    high = 2 if np.dtype(dtype).kind == "b" else 120
    return rng.integers(0, high, shape).astype(dtype)


def saver(name: str, write: Callable[[Path, NDArray[Any]], object], spec: str = "") -> Save:
    """Return a function that writes an array into a folder and gives what a user would type."""

    def save(folder: Path, array: NDArray[Any]) -> str:
        write(folder / name, array)
        return str(folder / (spec or name))

    save.__name__ = name
    return save


def imwrite(name: str, **how: Any) -> Save:
    return saver(name, lambda path, array: tifffile.imwrite(path, array, **({"photometric": "minisblack"} | how)))


def write_pages(path: Path, array: NDArray[Any]) -> None:
    with tifffile.TiffWriter(path) as writer:
        for plane in array:
            writer.write(plane, photometric="minisblack", contiguous=False, metadata=None)


def write_h5(path: Path, array: NDArray[Any], key: str, **how: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=array, **how)
        file["table"] = np.arange(3)


def write_slices(path: Path, array: NDArray[Any]) -> None:
    for z, plane in enumerate(array):
        file = path.with_stem(f"slice_{z + 8}")
        Image.fromarray(plane).save(file) if path.suffix == ".png" else tifffile.imwrite(file, plane)


def write_nifti(path: Path, array: NDArray[Any]) -> None:
    Nifti(array.T, np.eye(4), dtype=array.dtype).to_filename(path)


ZYX = {"axes": "ZYX"}
plain_tiff, paged_tiff = imwrite("a.tif"), saver("a.tiff", write_pages)
big_endian_bigtiff = imwrite("a.btf", bigtiff=True, byteorder=">")
tiled_tiff = imwrite("a.TIF", tile=(16, 16), compression="lzw", predictor=True)
ome_tiff = imwrite("a.ome.tif", compression="zlib", metadata=ZYX)
imagej_tiff = imwrite("ij.tif", photometric=None, imagej=True, metadata=ZYX)
imagej_first_page_only = imwrite("ij1.tif", photometric=None, imagej=True, truncate=True, metadata=ZYX)
hdf5 = saver("a.h5", lambda path, array: write_h5(path, array, "volumes/raw"), "a.h5:volumes/raw")
hdf5_without_key = saver("a.hdf5", lambda path, a: write_h5(path, a, "deep/main", chunks=True, compression="gzip"))
nifti, nifti_gz = saver("a.nii", write_nifti), saver("a.nii.gz", write_nifti)
npy, npy_fortran = saver("a.npy", np.save), saver("f.npy", lambda path, array: np.save(path, np.asfortranarray(array)))
png_stack, tiff_stack = (saver(f"slice.{end}", write_slices, f"slice_*.{end}") for end in ("png", "tif"))

ANY = ("bool", "uint8", "int16", ">u2", "uint32", "float32")
CASES: list[tuple[Save, tuple[str, ...]]] = [
    (plain_tiff, (*ANY, "uint64", "float16", "float64")),
    (paged_tiff, ANY),
    (big_endian_bigtiff, ANY),
    (tiled_tiff, ("uint8", "uint16")),
    (ome_tiff, ANY),
    (imagej_tiff, ("uint8", "uint16", "float32")),
    (imagej_first_page_only, ("uint8", "uint16", "float32")),
    (hdf5, (*ANY, "uint64", "float16")),
    (hdf5_without_key, (*ANY, "int64")),
    (nifti, ("uint8", "int16", "uint16", "float32", "int64")),
    (nifti_gz, ("uint8", "int16", "float32")),
    (npy, (*ANY, "float16")),
    (npy_fortran, ANY),
    (png_stack, ("bool", "uint8", "uint16")),
    (tiff_stack, ANY),
]


@pytest.mark.parametrize(("save", "dtype"), [(save, dtype) for save, dtypes in CASES for dtype in dtypes])
def test_what_a_library_writes_comes_back(tmp_path: Path, save: Save, dtype: str) -> None:
    array = volume_of(dtype=dtype)
    with open_volume(save(tmp_path, array)) as volume:
        whole = volume.read(0, SHAPE[0])
        slabs = [volume.read(z, min(z + 2, SHAPE[0])) for z in range(0, SHAPE[0], 2)]
        again = volume.read(1, 3)
    native = np.dtype("uint8" if dtype == "bool" else dtype).newbyteorder("=")
    assert volume.shape_zyx == SHAPE
    assert volume.dtype == whole.dtype == native
    assert whole.flags.c_contiguous
    assert whole.flags.writeable
    np.testing.assert_array_equal(whole, array)
    np.testing.assert_array_equal(np.concatenate(slabs), whole)
    np.testing.assert_array_equal(again, array[1:3])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    save=st.sampled_from([plain_tiff, ome_tiff, paged_tiff, hdf5, nifti, npy, tiff_stack, png_stack]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 9)),
    cut=st.integers(0, 8),
)
def test_any_shape_and_any_cut(
    tmp_path_factory: pytest.TempPathFactory, save: Save, shape: tuple[int, ...], cut: int
) -> None:
    array = volume_of(shape)
    with open_volume(save(tmp_path_factory.mktemp("any"), array)) as volume:
        cut = min(cut, shape[0] - 1)
        parts = [volume.read(*ends) for ends in itertools.pairwise(sorted({0, cut, shape[0]}))]
    assert volume.shape_zyx == shape
    np.testing.assert_array_equal(np.concatenate(parts), array)


def test_a_flat_image_is_one_plane(tmp_path: Path) -> None:
    plane = volume_of((6, 9))
    tifffile.imwrite(tmp_path / "a.tif", plane)
    Image.fromarray(plane).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", plane)
    Nifti(plane.T, np.eye(4), dtype=plane.dtype).to_filename(tmp_path / "a.nii")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["main"] = plane
    for name in ("a.tif", "a.png", "a.npy", "a.nii", "a.h5:main", "a.h5", "*.png"):
        with open_volume(tmp_path / name) as volume:
            assert volume.shape_zyx == (1, 6, 9), name
            np.testing.assert_array_equal(volume.read(0, 1)[0], plane)


@pytest.mark.parametrize("shape", [(1, *SHAPE), (*SHAPE, 1), (1, 1, *SHAPE), (1, *SHAPE, 1)])
def test_axes_of_length_one_are_dropped(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = volume_of(shape)
    for save in (hdf5, npy, nifti):
        with open_volume(save(tmp_path, array)) as volume:
            assert volume.shape_zyx == SHAPE
            np.testing.assert_array_equal(volume.read(1, 4), array.reshape(SHAPE)[1:4])


def test_nifti_is_stored_x_y_z(tmp_path: Path) -> None:
    x, y, z = np.meshgrid(range(2), range(3), range(4), indexing="ij")
    image = Nifti((100 * x + 10 * y + z).astype(np.int16), np.eye(4))
    image.to_filename(tmp_path / "a.nii.gz")
    with open_volume(tmp_path / "a.nii.gz") as volume:
        assert volume.shape_zyx == (4, 3, 2)
        assert volume.read(3, 4)[0].tolist() == [[3, 103], [13, 113], [23, 123]]


def test_nifti_intensities_are_scaled(tmp_path: Path) -> None:
    image = Nifti(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    image.to_filename(tmp_path / "a.nii")
    with open_volume(tmp_path / "a.nii") as volume:
        assert volume.dtype == np.float64
        truth = Nifti.from_filename(tmp_path / "a.nii").get_fdata().T
        np.testing.assert_allclose(volume.read(0, 4), truth)


def test_a_tiled_tiff_is_read_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ome_tiff(tmp_path, volume_of())
    pages: list[int] = []
    whole = readers._whole

    def spy(page: Any) -> Any:
        pages.append(page.index)
        return whole(page)

    monkeypatch.setattr(readers, "_whole", spy)
    with open_volume(spec) as volume:
        pages.clear()
        volume.read(2, 4)
    assert pages == [2, 3]


# --- what a file declares of its voxels ---


def test_ome_sizes_become_nanometres(tmp_path: Path) -> None:
    metadata = {"axes": "ZYX", "PhysicalSizeZ": 0.04, "PhysicalSizeY": 5.9, "PhysicalSizeX": 46.0}
    metadata |= {"PhysicalSizeZUnit": "µm", "PhysicalSizeYUnit": "nm", "PhysicalSizeXUnit": "Å"}
    tifffile.imwrite(tmp_path / "a.ome.tif", volume_of(), photometric="minisblack", metadata=metadata)
    with open_volume(tmp_path / "a.ome.tif") as volume:
        assert volume.voxel_size_nm == pytest.approx(VOXEL_NM)


@pytest.mark.parametrize(("unit", "nm"), [("um", 1e3), ("micron", 1e3), ("\\u00B5m", 1e3), ("nm", 1.0)])
def test_imagej_sizes_become_nanometres(tmp_path: Path, unit: str, nm: float) -> None:
    metadata = {"axes": "ZYX", "spacing": 40.0, "unit": unit}
    tifffile.imwrite(tmp_path / "a.tif", volume_of(), imagej=True, resolution=(1 / 5, 1 / 8), metadata=metadata)
    with open_volume(tmp_path / "a.tif") as volume:
        assert volume.voxel_size_nm == pytest.approx((40 * nm, 8 * nm, 5 * nm))


@pytest.mark.parametrize(("unit", "nm"), [("mm", 1e6), ("micron", 1e3), ("unknown", None)])
def test_nifti_sizes_become_nanometres(tmp_path: Path, unit: str, nm: float | None) -> None:
    image = Nifti(volume_of(), np.diag([2.0, 3.0, 4.0, 1.0]), dtype=np.uint8)
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "a.nii")
    with open_volume(tmp_path / "a.nii") as volume:
        assert volume.voxel_size_nm == (None if nm is None else (4 * nm, 3 * nm, 2 * nm))


@pytest.mark.parametrize(
    ("name", "value", "nm"),
    [
        ("resolution", [40, 8, 5], (40, 8, 5)),
        ("voxel_size_nm_zyx", [40, 8, 5], (40, 8, 5)),
        ("element_size_um", [0.5, 0.25, 0.25], (500, 250, 250)),
        ("resolution", "fine", None),
        ("resolution", [8, 8], None),
        ("resolution", [40, 8, 0], None),
        ("resolution", [40, 8, np.nan], None),
    ],
)
def test_hdf5_sizes_become_nanometres(tmp_path: Path, name: str, value: Any, nm: Any) -> None:
    spec = hdf5(tmp_path, volume_of())
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["volumes/raw"].attrs[name] = value
    with open_volume(spec) as volume:
        assert volume.voxel_size_nm == nm


# --- specs and globs ---


def test_slices_come_in_natural_order(tmp_path: Path) -> None:
    for z in (10, 9, 100, 2):
        Image.fromarray(np.full((2, 3), z, np.uint8)).save(tmp_path / f"slice_{z}.png")
    with open_volume(tmp_path / "*.png") as volume:
        assert volume.read(0, 4)[:, 0, 0].tolist() == [2, 9, 10, 100]


def test_a_path_with_brackets_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "scan [1]").mkdir()
    with open_volume(npy(tmp_path / "scan [1]", volume_of())) as volume:
        assert volume.shape_zyx == SHAPE


def hdf5_pairs(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["main"] = volume_of()


def test_volumes_are_paired_by_what_the_star_matched(tmp_path: Path) -> None:
    hdf5_pairs(tmp_path, tuple(f"vol{i}_{kind}" for i in (10, 9) for kind in ("im", "ins", "mask")))
    globs = {"mito": f"{tmp_path}/vol*_ins.h5:main", "mask": f"{tmp_path}/vol*_mask.h5"}
    assert expand_globs(f"{tmp_path}/vol*_im.h5:main", globs) == [
        {
            "em": f"{tmp_path}/vol{i}_im.h5:main",
            "mito": f"{tmp_path}/vol{i}_ins.h5:main",
            "mask": f"{tmp_path}/vol{i}_mask.h5",
            "match": i,
        }
        for i in ("9", "10")
    ]


def test_runs_of_wildcards_and_folders_pair(tmp_path: Path) -> None:
    for cell in ("a", "b"):
        for kind in ("im", "ins"):
            (tmp_path / cell / kind).mkdir(parents=True)
            np.save(tmp_path / cell / kind / "v07.npy", volume_of())
    for wild in ("*/{}/v??.npy", "**/{}/v[0-9]?.npy"):
        pairs = expand_globs(f"{tmp_path}/{wild.format('im')}", {"ins": f"{tmp_path}/{wild.format('ins')}"})
        assert [Path(pair["ins"]).parts[-3:] for pair in pairs] == [
            ("a", "ins", "v07.npy"),
            ("b", "ins", "v07.npy"),
        ]
        assert all("/" not in pair["match"] and pair["match"].endswith("07") for pair in pairs)


@pytest.mark.parametrize(
    ("names", "lonely", "pattern"),
    [
        (("vol0_im", "vol1_im", "vol0_ins"), "vol1_im.h5", "vol*_ins.h5"),
        (("vol0_im", "vol0_ins", "vol1_ins"), "vol1_ins.h5", "vol*_im.h5"),
    ],
)
def test_an_unpaired_file_is_named(tmp_path: Path, names: tuple[str, ...], lonely: str, pattern: str) -> None:
    hdf5_pairs(tmp_path, names)
    with pytest.raises(DataError) as error:
        expand_globs(f"{tmp_path}/vol*_im.h5:main", {"mito": f"{tmp_path}/vol*_ins.h5:main"})
    assert error.value.where.endswith(lonely)
    assert pattern in error.value.what


def test_matches_that_read_alike_are_refused(tmp_path: Path) -> None:
    hdf5_pairs(tmp_path, ("a_b-c", "a-b_c"))
    with pytest.raises(DataError, match="same text"):
        expand_globs(f"{tmp_path}/*-*.h5", {})


def test_one_file_for_many_volumes_is_refused(tmp_path: Path) -> None:
    hdf5_pairs(tmp_path, ("vol0_im", "vol1_im", "ins"))
    with pytest.raises(DataError, match="one mito file for the several volumes"):
        expand_globs(f"{tmp_path}/vol*_im.h5", {"mito": f"{tmp_path}/ins.h5"})


@pytest.mark.parametrize("save", [png_stack, tiff_stack])
def test_a_glob_of_slices_is_one_volume(tmp_path: Path, save: Save) -> None:
    for name in ("em", "mito"):
        (tmp_path / name).mkdir()
    em, mito = (save(tmp_path / name, volume_of()) for name in ("em", "mito"))
    assert expand_globs(em, {"mito": mito}) == [{"em": em, "mito": mito, "match": ""}]
    assert expand_globs(em, {"mito": "one.tif"}) == [{"em": em, "mito": "one.tif", "match": ""}]
    next((tmp_path / "mito").iterdir()).unlink()
    with pytest.raises(DataError, match="has no partner"):
        expand_globs(em, {"mito": mito})


@pytest.mark.parametrize("save", [plain_tiff, ome_tiff, nifti, nifti_gz, npy])
def test_a_glob_of_volumes_is_several(tmp_path: Path, save: Save) -> None:
    spec = Path(save(tmp_path, volume_of()))
    suffixes = "".join(spec.suffixes)
    for name in ("vol1", "vol2"):
        (tmp_path / f"{name}{suffixes}").write_bytes(spec.read_bytes())
    pairs = expand_globs(f"{tmp_path}/vol*{suffixes}", {})
    assert [pair["match"] for pair in pairs] == ["1", "2"]
    with pytest.raises(DataError, match="should be a stack of slices"):
        open_volume(tmp_path / f"vol*{suffixes}")
    with open_volume(tmp_path / f"vol1*{suffixes}") as volume:
        assert volume.shape_zyx == SHAPE


# --- bad input ---


def cut(path: str | Path, share: float) -> str:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])
    return str(path)


def read_all(spec: str | Path) -> None:
    with open_volume(spec) as volume:
        volume.read(0, volume.shape_zyx[0])


def refused(spec: str | Path, what: str = ".") -> DataError:
    """Read the volume; return the one-line DataError that names it."""
    with pytest.raises(DataError, match=what) as error:
        read_all(spec)
    text = str(error.value)
    assert "\n" not in text
    assert Path(str(spec).partition(".h5")[0]).name.partition("*")[0] in error.value.where
    assert error.value.what
    assert error.value.remedy
    return error.value


@pytest.mark.parametrize("suffix", ["tif", "h5", "nii", "nii.gz", "npy", "png"])
@pytest.mark.parametrize("content", [b"", b"hello, I am a text file\n" * 40, bytes(600)])
def test_a_file_of_something_else(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(content)
    refused(tmp_path / f"a.{suffix}", "cannot be read")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
@pytest.mark.parametrize(
    "save",
    [save for save, _ in CASES if save not in (hdf5, npy_fortran, png_stack, tiff_stack)],
)
def test_a_truncated_file(tmp_path: Path, save: Save, share: float) -> None:
    refused(cut(save(tmp_path, volume_of((12, 40, 50))), share))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("save", [png_stack, tiff_stack])
def test_a_truncated_slice(tmp_path: Path, save: Save, share: float) -> None:
    spec = save(tmp_path, volume_of((3, 40, 50)))
    cut(sorted(tmp_path.iterdir())[1], share)
    refused(spec)


def test_damaged_compressed_data(tmp_path: Path) -> None:
    for save in (tiled_tiff, ome_tiff, hdf5_without_key, nifti_gz):
        path = Path(save(tmp_path, volume_of((4, 200, 200))))
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 400] = b"\xff" * 400
        path.write_bytes(data)
        refused(path)


def test_missing_folder_and_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"jpg")
    assert "check the path" in refused(tmp_path / "no.tif", "no such file").remedy
    assert "glob" in refused(tmp_path, "is a folder").remedy
    assert ".nii.gz" in refused(tmp_path / "a.jpg", "of no kind").remedy
    refused(tmp_path / "*.tif", "matches no file")
    refused(f"{tmp_path}/a.tif:main", "no such file")
    with pytest.raises(DataError, match="matches no file"):
        expand_globs(f"{tmp_path}/*.h5", {})


def test_hdf5_keys_are_listed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"], file["labels/mito"], file["table"] = volume_of(), volume_of(), np.arange(4)
        file["dangling"] = h5py.SoftLink("/nowhere")
    for spec, what in (
        ("a.h5", "holds 2"),
        ("a.h5:main", "no dataset 'main'"),
        ("a.h5:labels", "no dataset"),
    ):
        error = refused(tmp_path / spec, what)
        assert "raw" in error.remedy
        assert "labels/mito" in error.remedy
    refused(tmp_path / "a.h5:dangling", "no dataset")
    refused(tmp_path / "a.h5:table", "shape")


def test_empty_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["none"], file["nothing"] = h5py.Empty("f"), np.zeros((0, 4, 4))
    refused(tmp_path / "a.h5", "is empty")
    refused(tmp_path / "a.h5:nothing", "is empty")
    refused(tmp_path / "a.h5:none")


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 4)])
def test_colour_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = volume_of(shape)
    Image.fromarray(array).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb")
    assert "one channel" in refused(tmp_path / "a.png", r"\(5, 7\) of mode RGB").remedy
    assert "one channel" in refused(tmp_path / "a.tif", r"\(5, 7, [34]\)").remedy


def test_channels_and_time_are_refused(tmp_path: Path) -> None:
    array = volume_of((3, 2, 8, 9))
    for axes in ("ZCYX", "TZYX"):
        tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, metadata={"axes": axes})
        assert "one channel" in refused(tmp_path / "a.tif", r"\(3, 2, 8, 9\)").remedy
    tifffile.imwrite(tmp_path / "a.ome.tif", array[:, 0], photometric="minisblack", metadata={"axes": "CYX"})
    refused(tmp_path / "a.ome.tif", "axes CYX")
    for save in (hdf5, npy, nifti):
        assert "one channel" in refused(save(tmp_path, array), "has shape").remedy


def test_a_slice_of_a_multi_file_ome_set_stands_for_itself(tmp_path: Path) -> None:
    array = volume_of((3, 7, 11))
    blocks = "".join(
        f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="1"><UUID FileName="s{z}.ome.tif">urn:uuid:{z}</UUID></TiffData>'
        for z in range(3)
    )
    for z in range(3):
        text = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{z}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="11" '
            f'SizeY="7" SizeZ="3" SizeC="1" SizeT="1">{blocks}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / f"s{z}.ome.tif", array[z], description=text, metadata=None)
    with open_volume(tmp_path / "s1.ome.tif") as volume:
        assert volume.shape_zyx == (1, 7, 11)
    with open_volume(tmp_path / "s*.ome.tif") as volume:
        np.testing.assert_array_equal(volume.read(0, 3), array)


def test_ome_planes_that_are_missing_are_refused(tmp_path: Path) -> None:
    for planes in (1, 3):
        tifffile.imwrite(
            tmp_path / "a.ome.tif",
            volume_of((planes, 7, 11)),
            photometric="minisblack",
            metadata={"axes": "ZYX"},
        )
        data = (tmp_path / "a.ome.tif").read_bytes()
        assert f'SizeZ="{planes}"'.encode() in data
        (tmp_path / "a.ome.tif").write_bytes(data.replace(f'SizeZ="{planes}"'.encode(), b'SizeZ="5"'))
        refused(tmp_path / "a.ome.tif", "cannot be read")


def test_pages_of_several_shapes_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for width in (8, 9):
            writer.write(volume_of((2, 8, width)), photometric="minisblack")
    refused(tmp_path / "a.tif", "holds 2 images")


def test_more_pages_than_declared_are_refused(tmp_path: Path) -> None:
    description = "ImageJ=1.53\nimages=2\nslices=2\nloop=false\n"
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for plane in volume_of():
            writer.write(plane, compression="zlib", description=description, metadata=None)
            description = ""
    refused(tmp_path / "a.tif", "holds 5 pages|5 pages")


@pytest.mark.parametrize("dtype", ["complex64", "S4", "M8[s]", "u1,u1,u1"])
def test_voxels_that_are_no_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(SHAPE, dtype))
    assert "one channel" in refused(tmp_path / "a.npy", "voxels of type").remedy


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((2, 2), None), allow_pickle=True)
    refused(tmp_path / "a.npy", "cannot be read")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["main"] = [["a", "b"], ["c", "d"]]
    refused(tmp_path / "a.h5:main", "type object")
    Nifti(np.zeros((2, 3, 4), np.complex64), np.eye(4)).to_filename(tmp_path / "a.nii")
    refused(tmp_path / "a.nii", "type complex")


def giant_png(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2**30, 2**30, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def test_monstrous_shapes_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("plane", (2, 10**6, 10**6), "u1", chunks=(1, 512, 512))
        file.create_dataset("long", (10**12, 10**4, 10), "u1", chunks=(1, 512, 10))
    for key in ("plane", "long"):
        refused(f"{tmp_path}/a.h5:{key}", "16 GiB")
    giant_png(tmp_path / "a.png")
    refused(tmp_path / "a.png", "16 GiB")
    tifffile.imwrite(tmp_path / "a.tif", volume_of((64, 64)))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        for tag in ("ImageWidth", "ImageLength"):
            tif.pages.first.tags[tag].overwrite(2**30, dtype="I")
    refused(tmp_path / "a.tif")
    np.save(tmp_path / "a.npy", volume_of())
    data = (tmp_path / "a.npy").read_bytes().replace(b"(5, 7, 11)", b"(5, 1099511627776, 11)")
    (tmp_path / "a.npy").write_bytes(data)
    refused(tmp_path / "a.npy")


def test_a_tiff_wider_than_its_data_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", volume_of((64, 64)), metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        tif.pages.first.tags["ImageLength"].overwrite(4096, dtype="I")
    refused(tmp_path / "a.tif")


def test_planes_beyond_pillows_limit_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(volume_of((40, 50))).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    read_all(tmp_path / "a.png")


@pytest.mark.parametrize("odd", [volume_of((6, 8)), volume_of((6, 9), np.uint16), volume_of((6, 9), bool)])
def test_an_odd_slice_is_named(tmp_path: Path, odd: NDArray[Any]) -> None:
    for z in range(3):
        Image.fromarray(odd if z == 2 else volume_of((6, 9))).save(tmp_path / f"s{z}.png")
    assert refused(tmp_path / "s*.png", "s0.png is uint8").where.endswith("s2.png")


def test_a_file_that_changes_while_open(tmp_path: Path) -> None:
    spec = png_stack(tmp_path, volume_of())
    with open_volume(spec) as volume:
        Image.fromarray(volume_of((3, 3))).save(tmp_path / "slice_9.png")
        with pytest.raises(DataError, match="cannot be read"):
            volume.read(0, 3)
        (tmp_path / "slice_9.png").unlink()
        with pytest.raises(DataError, match="no such file"):
            volume.read(0, 3)


@pytest.mark.parametrize("ends", [(0, 6), (-1, 2), (2, 2), (3, 1)])
def test_planes_that_are_not_there_are_a_bug(tmp_path: Path, ends: tuple[int, int]) -> None:
    with open_volume(npy(tmp_path, volume_of())) as volume, pytest.raises(ValueError, match="no planes"):
        volume.read(*ends)


def test_nothing_is_logged_and_logging_is_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = cut(ome_tiff(tmp_path, volume_of((12, 40, 50))), 0.5)
    with caplog.at_level(logging.DEBUG):
        refused(spec)
    assert not caplog.records
    assert not logging.getLogger("tifffile").filters


# --- writing ---


def slabs_of(array: NDArray[Any], thickness: int = 2) -> Iterator[NDArray[Any]]:
    for z in range(0, len(array), thickness):
        yield array[z : z + thickness]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int32", "float32"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 6, 3), (3, 1, 1), (4, 300, 280)])
def test_tiff_round_trip(tmp_path: Path, shape: tuple[int, int, int], dtype: str) -> None:
    array = volume_of(shape, dtype)
    write_tiff(tmp_path / "out.tif", shape, dtype, slabs_of(array), VOXEL_NM)
    with open_volume(tmp_path / "out.tif") as volume:
        assert volume.shape_zyx == shape
        assert volume.voxel_size_nm == pytest.approx(VOXEL_NM)
        np.testing.assert_array_equal(volume.read(0, shape[0]), array)
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        assert tif.is_ome
        assert not tif.is_bigtiff
    assert os.listdir(tmp_path) == ["out.tif"]


def test_a_large_tiff_is_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_BIGTIFF_BYTES", 100)
    write_tiff(tmp_path / "out.tif", SHAPE, "u1", slabs_of(volume_of()), VOXEL_NM)
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        assert tif.is_bigtiff
    read_all(tmp_path / "out.tif")


def test_hdf5_round_trip_of_several_classes(tmp_path: Path) -> None:
    arrays = {"mito": volume_of(dtype="uint64"), "membrane/pm": volume_of(dtype="float16")}
    dtypes = {key: array.dtype for key, array in arrays.items()}
    slabs = ({key: array[z : z + 2] for key, array in arrays.items()} for z in range(0, SHAPE[0], 2))
    write_hdf5(tmp_path / "out.h5", SHAPE, dtypes, slabs, VOXEL_NM)
    for key, array in arrays.items():
        with open_volume(f"{tmp_path}/out.h5:{key}") as volume:
            assert volume.voxel_size_nm == pytest.approx(VOXEL_NM)
            assert volume.dtype == array.dtype
            np.testing.assert_array_equal(volume.read(0, SHAPE[0]), array)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["mito"].compression == "gzip"
        assert file["mito"].chunks == (2, 7, 11)
        assert file["mito"].attrs["element_size_um"] == pytest.approx([size / 1e3 for size in VOXEL_NM])
    assert os.listdir(tmp_path) == ["out.h5"]


def write(path: Path, slabs: Iterator[NDArray[Any]], dtype: Any = np.uint8) -> None:
    if path.suffix == ".tif":
        write_tiff(path, SHAPE, dtype, slabs, VOXEL_NM)
    else:
        write_hdf5(path, SHAPE, {"main": dtype}, ({"main": slab} for slab in slabs), VOXEL_NM)


WRITTEN = pytest.mark.parametrize("name", ["out.tif", "out.h5"])


@WRITTEN
@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt(), DataError("a", "b", "c")])
def test_nothing_is_left_when_the_slabs_fail(tmp_path: Path, name: str, error: BaseException) -> None:
    (tmp_path / name).write_text("the old one")

    def slabs() -> Iterator[NDArray[Any]]:
        yield volume_of()[:2]
        raise error

    with pytest.raises(type(error)) as raised:
        write(tmp_path / name, slabs())
    assert raised.value is error
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "the old one"


@WRITTEN
@pytest.mark.parametrize("planes", [0, 4, 6, 7])
def test_too_few_or_too_many_planes_are_a_bug(tmp_path: Path, name: str, planes: int) -> None:
    with pytest.raises(ValueError, match="planes"):
        write(tmp_path / name, slabs_of(volume_of((planes, *SHAPE[1:])), 1))
    assert os.listdir(tmp_path) == []


@WRITTEN
def test_slabs_of_another_shape_or_type_are_a_bug(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / name, slabs_of(volume_of((5, 7, 12))))
    with pytest.raises(TypeError, match="cast"):
        write(tmp_path / name, slabs_of(volume_of(dtype=np.float32)))
    with pytest.raises(TypeError, match="cast"):
        write(tmp_path / name, slabs_of(volume_of(dtype=np.uint16)))
    assert os.listdir(tmp_path) == []


@WRITTEN
def test_an_unwritable_place_is_a_data_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "no folder" / name, slabs_of(volume_of()))
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / name, slabs_of(volume_of()))
    assert os.listdir(tmp_path) == [name]


def test_types_that_ome_lacks_are_refused(tmp_path: Path) -> None:
    for dtype in ("uint64", "float16"):
        with pytest.raises(DataError, match=f"no type {dtype}"):
            write(tmp_path / "out.tif", slabs_of(volume_of(dtype=dtype)), dtype)
    with pytest.raises(DataError, match="complex64"):
        write(tmp_path / "out.h5", slabs_of(volume_of()), np.complex64)
    assert os.listdir(tmp_path) == []
