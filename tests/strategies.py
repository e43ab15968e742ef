"""What several test files make: small data sets on disk, and hypothesis strategies of geometry and records.

Import it as `from strategies import make_dataset` (pytest puts tests/ on the path).
"""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from autoseg import schema
from autoseg.data import store
from autoseg.data.dataset import EM_NAME, GROUNDTRUTH, RECON
from autoseg.geometry import Grid, NmZYX, VoxelsZYX

UNKNOWN_LABEL = 250

# ---- data sets on disk --------------------------------------------------------------------------------------


def make_dataset(
    root: Path,
    *,
    seed: int = 0,
    shape: VoxelsZYX = (8, 64, 64),
    voxel_size_nm: NmZYX = (40.0, 8.0, 8.0),
    classes: Sequence[str] = ("mito", "er_mem", "pm"),
    crops: int = 2,
    partial: bool = True,
    validate: tuple[int, ...] = (),
) -> Path:
    """Import one synthetic volume `demo` as DATA = `root` and return `root`.

    ::

        demo/crop1        demo/crop2  ...     each of `shape`, side by side along x
        +-----------+-----------+             every voxel is one class or background; its grey value tells
        |           |           |             which (40, ... 200 with noise of sd 10), so a tiny network
        | unknown   | lacks the |             learns it in a few steps
        | in a slab | last class|
        +-----------+-----------+

    `partial`: the first section of crop 1 is unknown for every class, and the last crop (of several) does not
    annotate the last class. `validate` lists crops (from 1) that datasplit.csv holds out; without, no datasplit.
    """
    from autoseg.data.convert import ImportRequest, import_arrays

    z, y, x = shape
    rng = np.random.default_rng(seed)
    whole = (z, y, x * crops)
    sigma = [max(0.5, 32.0 / v) for v in voxel_size_nm]
    fields = [ndimage.gaussian_filter(rng.standard_normal(whole), sigma) for _ in range(len(classes) + 1)]
    labels = np.argmax(fields, axis=0).astype(np.uint8)
    grey = np.linspace(200, 40, len(classes) + 1)[labels] + rng.normal(0, 10, whole)
    em = np.clip(np.rint(grey), 1, 255).astype(np.uint8)
    if partial and z > 1:
        labels[0, :, :x] = UNKNOWN_LABEL
    request = ImportRequest(
        data=root,
        name="demo",
        em="em",
        voxel_size_nm=voxel_size_nm,
        labels="labels",
        values={name: (i + 1,) for i, name in enumerate(classes)},
        ignore_value=UNKNOWN_LABEL if partial and z > 1 else None,
        grid=(1, 1, crops),
        validate=validate,
    )
    import_arrays(request, {"em": em, "labels": labels})
    if partial and crops > 1 and len(classes) > 1:
        shutil.rmtree(root / "demo/demo.zarr" / GROUNDTRUTH / f"crop{crops}" / classes[-1])
    return root


def write_multiscale(
    path: Path,
    levels: Sequence[tuple[Grid, NDArray[Any]]],
    attributes: Mapping[str, Any] | None = None,
    chunk_zyx: VoxelsZYX | None = None,
) -> Path:
    """Write an OME-NGFF group with these levels (fine to coarse) and return its path."""
    for i, (grid, values) in enumerate(levels):
        chunk = chunk_zyx or store.chunk_shape(grid.shape_zyx)
        array = store.create_array(path / f"s{i}", grid.shape_zyx, values.dtype, chunk)
        array[:] = values
    attributes = {**store.multiscale_attributes(path.name, [grid for grid, _ in levels]), **(attributes or {})}
    store.write_attributes(path, attributes)
    return path


def em_path(root: Path, dataset: str) -> Path:
    """Return where the EM of a data set lies."""
    return root / dataset / f"{dataset}.zarr" / RECON / "em" / EM_NAME


def crop_path(root: Path, dataset: str, crop: str) -> Path:
    """Return where the annotation of a crop lies."""
    return root / dataset / f"{dataset}.zarr" / GROUNDTRUTH / crop


def write_label(
    crop: Path,
    name: str,
    values: NDArray[Any],
    grid: Grid,
    *,
    instance: bool = False,
    unknown: int | None = None,
    counted_unknown: int = 0,
    chunk_zyx: VoxelsZYX | None = None,
) -> Path:
    """Write one class of a crop with its `cellmap` annotation; `unknown` is what the encoding declares."""
    kind = "instance_segmentation" if instance else "semantic_segmentation"
    encoding = {"absent": 0, "present": 1} | ({} if unknown is None else {"unknown": unknown})
    annotation = {"class_name": name, "annotation_type": {"type": kind, "encoding": encoding}}
    path = write_multiscale(crop / name, [(grid, values)], {"cellmap": {"annotation": annotation}}, chunk_zyx)
    counts = {"complement_counts": {"absent": int((values == 0).sum()), "unknown": counted_unknown}}
    store.write_attributes(path / "s0", {"cellmap": {"annotation": annotation | counts}})
    return path


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Return size and mtime of every file and folder below `root`: equal before and after means untouched."""
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in [root, *sorted(root.rglob("*"))]
    }


# ---- geometry -----------------------------------------------------------------------------------------------

VOXEL_SIZES_NM = (1.74, 2.0, 2.62, 3.48, 4.0, 4.6, 8.0, 13.92, 16.0, 32.0, 50.0)


def shapes(largest: int = 12) -> st.SearchStrategy[VoxelsZYX]:
    """Return shapes with edges from 1 to `largest`."""
    edge = st.integers(1, largest)
    return st.tuples(edge, edge, edge)


def voxel_sizes() -> st.SearchStrategy[NmZYX]:
    """Return voxel sizes as they occur, axes independent."""
    size = st.sampled_from(VOXEL_SIZES_NM)
    return st.tuples(size, size, size)


@st.composite
def grids(draw: st.DrawFn, largest: int = 12) -> Grid:
    """Return a grid anywhere, at any usual voxel size."""
    origin = st.floats(-1e5, 1e5, allow_nan=False).map(lambda nm: round(nm, 2))
    return Grid(draw(shapes(largest)), draw(voxel_sizes()), draw(st.tuples(origin, origin, origin)))


# ---- records ------------------------------------------------------------------------------------------------


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Return values of a type that occurs in a record."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return records(kind)
    if isinstance(kind, type) and kind in (str, bool, int, float, type(None)):
        return _SCALARS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(a) for a in arguments])
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=2)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*[values_of(a) for a in arguments])
    raise TypeError(f"no strategy for {kind!r}")


def records(record_type: type[Any]) -> st.SearchStrategy[Any]:
    """Return records of that type with any values its fields may hold."""
    return _records(record_type)


@cache
def _records(record_type: type[Any]) -> st.SearchStrategy[Any]:
    fields = {field.name: values_of(field.type) for field in msgspec.structs.fields(record_type)}
    if "schema_version" in fields:
        fields["schema_version"] = st.just(schema.SCHEMA_VERSION)
    return st.builds(record_type, **fields)


_SCALARS: dict[type, st.SearchStrategy[Any]] = {
    str: st.text(max_size=6),
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    type(None): st.none(),
}


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment of a child process that imports the same autoseg.

    Only a source folder is put on its path: site-packages there would shadow the standard library.
    """
    root = Path(schema.__file__).parents[2]
    path = {"PYTHONPATH": str(root)} if (root / "pyproject.toml").is_file() else {}
    return os.environ | path | extra


ARTIFACTS: tuple[type[Any], ...] = get_args(schema.AnyArtifact)


def valid_plan(**changes: Any) -> schema.Plan:
    """Return a small plan without a contradiction (2D U-Net, classes mito and pm), with these fields changed."""
    classes = (schema.ClassEntry(name="mito", id=50), schema.ClassEntry(name="pm", id=2))
    names = tuple(entry.name for entry in classes)
    plan = schema.Plan(
        name="small",
        fingerprint_sha256="0" * 64,
        hardware=schema.Hardware(
            name="here",
            gpus=(),
            cpu_name="cpu",
            cpu_threads=1,
            cpu_bf16=False,
            ram_bytes=2**32,
            shm_bytes=2**30,
        ),
        device="cpu",
        classes=classes,
        disjoint=(),
        split=schema.Split(train=(schema.Region(crop="demo/crop1"),), validate=(), rule="user"),
        em_voxel_size_nm=(40.0, 8.0, 8.0),
        voxel_size_nm=(40.0, 8.0, 8.0),
        patch_size_zyx=(1, 32, 32),
        input_slices=1,
        batch_size=2,
        accumulate_batches=1,
        num_workers=0,
        num_threads=1,
        precision="fp32",
        network=schema.Network(
            kind="unet",
            features=(4, 8),
            kernels_zyx=((1, 3, 3), (1, 3, 3)),
            strides_zyx=((1, 2, 2),),
            norm="batch",
            deep_supervision=False,
        ),
        heads=(schema.Head(name="semantic", classes=names),),
        loss=schema.Loss(
            kind="dice_bce",
            bce_weight=1.0,
            dice_weight=1.0,
            focal_weight=0.0,
            tversky_weight=0.0,
            focal_gamma=2.0,
            tversky_alpha=0.5,
            tversky_beta=0.5,
            smooth=1.0,
        ),
        class_weighting="uniform",
        class_weights=dict.fromkeys(names, 1.0),
        sampling=schema.Sampling(class_centred_fraction=0.5, class_floor=0.125, class_power=0.5, crops_per_step=2),
        normalization=schema.Normalization(kind="dtype", volumes=()),
        init=None,
        augmentation=no_augmentation(),
        optimizer=schema.Optimizer(
            kind="adamw",
            learning_rate=1e-3,
            weight_decay=1e-2,
            gradient_clip_norm=1.0,
            ema_decay=0.0,
            num_steps=4,
        ),
        schedule=schema.Schedule(kind="warmup_cosine", warmup_fraction=0.1),
        validation=schema.Validation(num_rounds=1, tolerance=0.0),
        budget_s=None,
        sliding_window=schema.SlidingWindow(
            tile_zyx=(1, 32, 32), overlap=0.5, batch_size=2, mirror_axes=(), transpose_yx=False
        ),
        decode=schema.Decode(thresholds=dict.fromkeys(names, 0.5), tune_thresholds=False),
        predicted_memory_bytes=2**20,
        predicted_ram_bytes=2**20,
        predicted_disk_bytes=2**20,
        predicted_step_s=None,
        seed=0,
        reasons=(),
    )
    return msgspec.structs.replace(plan, **changes)


def no_augmentation(**changes: Any) -> schema.Augmentation:
    """Return the augmentation that changes nothing, with these fields changed."""
    nothing = schema.Augmentation(
        preset="none",
        flip=False,
        right_angles=False,
        transpose_z=False,
        rotation_probability=0.0,
        rotation_degrees=0.0,
        scale_probability=0.0,
        scale_range=(1.0, 1.0),
        elastic_probability=0.0,
        elastic_sigma=12.0,
        elastic_magnitude=0.0,
        contrast_probability=0.0,
        contrast_range=(1.0, 1.0),
        brightness_sd=0.0,
        gamma_probability=0.0,
        gamma_range=(1.0, 1.0),
        noise_probability=0.0,
        noise_sd_max=0.0,
        blur_probability=0.0,
        blur_sigma_range=(0.5, 1.0),
        milling_axis="z",
        drift_probability=0.0,
        drift_sd=0.0,
        drift_length=1.0,
        stripe_probability=0.0,
        stripe_sd=0.0,
        stripe_width=1.0,
        jitter_probability=0.0,
        jitter_sd=0.0,
        missing_section_probability=0.0,
        missing_sections_max=1,
        missing_partial_share=0.0,
        missing_area_range=(0.25, 0.75),
        lost_section_probability=0.0,
        misalign_probability=0.0,
        misalign_slip_share=0.5,
        misalign_max=0,
        defocus_probability=0.0,
        defocus_sections_max=1,
        defocus_sigma_range=(1.0, 3.0),
        section_contrast_probability=0.0,
        section_contrast_range=(1.0, 1.0),
        section_brightness_sd=0.0,
    )
    return msgspec.structs.replace(nothing, **changes)
