"""Bring volumes as people have them into the CellMap layout: the `import` verb, the only writer into DATA.

Everything is written into a staging folder first; DATA changes by renames, or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import cellmap_table, merge, table_of
from autoseg.data.dataset import GROUNDTRUTH, RECON, open_dataset
from autoseg.data.formats import Volume, expand_globs, in_memory, open_volume
from autoseg.data.writer import ImportRequest, VolumeWriter
from autoseg.errors import DataError
from autoseg.schema import ClassEntry, ClassTable, save, write_atomically


class Imported(NamedTuple):
    """What an import wrote: data sets, their crops, and remarks for the user."""

    datasets: tuple[str, ...]
    crops: tuple[str, ...]
    remarks: tuple[str, ...]


def import_volumes(request: ImportRequest) -> Imported:
    """Write the request's volumes into DATA; on any error DATA is as it was before."""
    check_request(request)
    others = {f"instances {name}": spec for name, spec in request.instances.items()}
    if request.labels:
        others["labels"] = request.labels
    if request.mask:
        others["mask"] = request.mask
    pairs = expand_globs(request.em, others)
    names = [request.name if len(pairs) == 1 else f"{request.name}-{pair['match']}" for pair in pairs]
    openers = [functools.partial(_open_sources, request, pair) for pair in pairs]
    return _import(request, dict(zip(names, openers, strict=True)))


def import_arrays(request: ImportRequest, arrays: Mapping[str, NDArray[Any]]) -> Imported:
    """Do the same from arrays in memory, keyed `em`, `labels`, `mask` and `instances CLASS`."""
    check_request(request)

    def open_sources(stack: contextlib.ExitStack) -> dict[str, Volume]:
        return {key: stack.enter_context(in_memory(f"{request.name} {key}", a)) for key, a in arrays.items()}

    return _import(request, {request.name: open_sources})


def _import(
    request: ImportRequest, openers: Mapping[str, Callable[[contextlib.ExitStack], dict[str, Volume]]]
) -> Imported:
    names = tuple(openers)
    for name in names:
        if (request.data / name).exists():
            raise DataError(request.data / name, "exists already", "choose another --name, or remove that folder")
    request.data.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".importing-", dir=request.data))
    try:
        first_id = _highest_crop_id(request.data) + 1
        crops: list[tuple[str, bool]] = []
        remarks: list[str] = []
        for name, opener in openers.items():
            with contextlib.ExitStack() as stack:
                sources = opener(stack)
                _check_sources(request, sources)
                writer = VolumeWriter(request, sources, staging / name, first_id + len(crops))
                remarks += writer.write()
            crops += [(f"{name}/crop{i}", cell in request.validate) for i, cell in writer.crop_cells]
        table = _own_table(request)
        split = _datasplit(request, crops)
        for name in names:
            (staging / name).rename(request.data / name)
        if table is not None:
            save(table, request.data / "classes.json")
        if split is not None:
            write_atomically(request.data / "datasplit.csv", split)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Imported(names, tuple(name for name, _ in crops), tuple(dict.fromkeys(remarks)))


def check_request(request: ImportRequest) -> None:
    """Raise DataError for the first setting that cannot be carried out, naming its flag."""
    if any(not np.isfinite(v) or v <= 0 for v in request.voxel_size_nm):
        raise DataError(
            "--voxel-size-nm", f"{list(request.voxel_size_nm)}", "give three positive numbers, in nm, order z y x"
        )
    if any(n < 1 for n in request.grid):
        raise DataError("--grid", f"{list(request.grid)}", "give three numbers of cells, each at least 1")
    num_cells = int(np.prod(request.grid))
    for flag, cells in (("--crops", request.crops or ()), ("--validate", request.validate)):
        for cell in cells:
            if not 1 <= cell <= num_cells:
                raise DataError(flag, f"cell {cell}", f"the grid has cells 1 to {num_cells}")
    dropped = set(request.validate) - set(request.crops or range(1, num_cells + 1))
    if dropped:
        raise DataError("--validate", f"cell {min(dropped)} is not among --crops", "list it in both")
    if "/" in request.name or request.name.startswith(".") or not request.name:
        raise DataError("--name", repr(request.name), "use a plain name such as vnc")
    if bool(request.labels) != bool(request.values):
        raise DataError(
            "--labels", "needs --values, and --values needs --labels", "e.g. --labels L.tif --values mito=1"
        )
    twice = set(request.values) & set(request.instances)
    if twice:
        raise DataError("--instances", f"{min(twice)} is also in --values", "give each class once")
    if request.mask and not (request.labels or request.instances):
        raise DataError("--mask", "there are no labels to mask", "add --labels or --instances")


def _open_sources(request: ImportRequest, pair: Mapping[str, str], stack: contextlib.ExitStack) -> dict[str, Volume]:
    return {key: stack.enter_context(open_volume(spec)) for key, spec in pair.items() if key != "match"}


def _check_sources(request: ImportRequest, sources: Mapping[str, Volume]) -> None:
    em = sources["em"]
    for key, volume in sources.items():
        if volume.shape_zyx != em.shape_zyx:
            raise DataError(
                volume.name,
                f"{key} has shape {volume.shape_zyx}, the EM {em.shape_zyx} (z, y, x)",
                "export both on the same voxel grid",
            )
        if key != "em" and volume.dtype.kind not in "uib":
            raise DataError(volume.name, f"{key} has dtype {volume.dtype}", "labels are integers")
    for size, cells, axis in zip(em.shape_zyx, request.grid, "zyx", strict=True):
        if cells > size:
            raise DataError("--grid", f"{cells} cells along {axis}, which has {size} voxels", "use fewer cells")


def _highest_crop_id(data: Path) -> int:
    ids = [p.name.removeprefix("crop") for p in data.glob(f"*/*.zarr/{GROUNDTRUTH}/crop*")]
    return max((int(i) for i in ids if i.isdigit()), default=0)


def _own_table(request: ImportRequest) -> ClassTable | None:
    """Return DATA's class table with the request's classes declared as the data has them, or None if unchanged."""
    before = table_of(request.data)
    known = {entry.name: entry for entry in before.classes}
    own = []
    for name in [*request.values, *request.instances]:
        entry = known.get(name, ClassEntry(name=name))
        declared = ClassEntry(name=name, id=entry.id, components=entry.components, instance=name in request.instances)
        if declared != known.get(name):
            own.append(declared)
    if not own:
        return None
    challenge = {entry.name: entry for entry in cellmap_table().classes}
    earlier = tuple(entry for entry in before.classes if challenge.get(entry.name) != entry)
    merged = merge(ClassTable(classes=earlier, disjoint=before.disjoint), ClassTable(classes=tuple(own)))
    return merged


def _datasplit(request: ImportRequest, crops: list[tuple[str, bool]]) -> bytes | None:
    """Return datasplit.csv with the new crops added, or None where DATA needs none."""
    path = request.data / "datasplit.csv"
    if not path.is_file() and not request.validate:
        return None
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    if path.is_file():
        text.write(path.read_text())
    elif any(request.data.glob(f"*/*.zarr/{GROUNDTRUTH}/crop*")):
        for crop in open_dataset(request.data).crops:
            em = crop.em.relative_to(request.data)
            _write_row(writer, "train", crop.name, str(Path(*em.parts[2:])), [label.name for label in crop.labels])
    classes = [*request.values, *request.instances]
    for name, validates in crops:
        em_name = next(request.data.glob(f".importing-*/{name.split('/')[0]}/*.zarr/{RECON}/em/*"), None)
        assert em_name is not None  # it was just written
        inner = f"{RECON}/em/{em_name.name}"
        _write_row(writer, "validate" if validates else "train", name, inner, classes)
    return text.getvalue().encode()


def _write_row(writer: Any, split: str, crop: str, em_inner: str, classes: list[str]) -> None:
    volume, crop_name = crop.rsplit("/", 1)
    zarr_path = f"{volume}/{volume}.zarr"
    writer.writerow([split, zarr_path, em_inner, zarr_path, f"{GROUNDTRUTH}/{crop_name}/[{','.join(classes)}]"])
