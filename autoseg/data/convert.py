"""Bring volumes as people have them into the CellMap layout: the `import` verb, the only writer into DATA.

Everything is checked as early as it can be and written into a staging folder inside DATA; DATA itself changes by
renames at the very end, or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import Logic, merge, table_of
from autoseg.data.dataset import GROUNDTRUTH, open_dataset
from autoseg.data.datasplit import read_datasplit
from autoseg.data.formats import Volume, expand_globs, in_memory, open_volume
from autoseg.data.store import alone
from autoseg.data.writer import ImportRequest, cell_boxes, em_path, refuse_palette, write_volume
from autoseg.errors import DataError
from autoseg.geometry import Box
from autoseg.schema import ClassEntry, ClassTable, load_as, save, write_atomically

CLASSES, DATASPLIT, STAGING = "classes.json", "datasplit.csv", ".importing"
VOXEL_SIZE_TOLERANCE = 0.01
# a class is a folder beside `all`, in lists with commas and brackets; s0, s1, ... are arrays
_CLASS_NAME = re.compile(r"(?!all$|s\d+$)\w[\w.+-]*", re.ASCII | re.IGNORECASE)
_DATASET_NAME = re.compile(r"\w[\w.+-]*(?<!\.zarr)")


class Imported(NamedTuple):
    """What an import wrote: data sets, their crops, remarks for the user, and which cell of the grid each crop is."""

    datasets: tuple[str, ...]
    crops: tuple[str, ...]
    remarks: tuple[str, ...]
    cells: tuple[int, ...] = ()


_Opener = Callable[[contextlib.ExitStack], dict[str, Volume]]


class _Piece(NamedTuple):
    """One volume to import, checked: how to open its sources, its crops by id, and where its EM goes."""

    name: str
    opener: _Opener
    crops: dict[int, Box]
    em_path: str
    remarks: tuple[str, ...]


def import_volumes(request: ImportRequest) -> Imported:
    """Write the request's volumes into DATA; on any error DATA is as it was before."""
    check_request(request)
    others = {f"instances {name}": spec for name, spec in request.instances.items()}
    others |= {key: spec for key, spec in (("labels", request.labels), ("mask", request.mask)) if spec}
    pairs = expand_globs(request.em, others)
    matches = [re.sub(r"[^\w.+-]+", "_", pair["match"]) for pair in pairs]
    names = [f"{request.name}-{match}" for match in matches] if len(pairs) > 1 else [request.name]
    alike = [name for name, count in Counter(names).items() if count > 1]
    if alike:
        raise DataError(request.em, f"several files would be called {alike[0]}", "rename one of them")

    def opener(pair: Mapping[str, str]) -> _Opener:
        specs = {key: spec for key, spec in pair.items() if key != "match"}
        return lambda stack: {key: stack.enter_context(open_volume(spec)) for key, spec in specs.items()}

    return _import(request, {name: opener(pair) for name, pair in zip(names, pairs, strict=True)})


def import_arrays(request: ImportRequest, arrays: Mapping[str, NDArray[Any]]) -> Imported:
    """Do the same from arrays in memory, keyed `em`, `labels`, `mask` and `instances CLASS`."""
    check_request(request)

    def opener(_: contextlib.ExitStack) -> dict[str, Volume]:
        return {key: in_memory(f"{request.name} {key}", array) for key, array in arrays.items()}

    return _import(request, {request.name: opener})


def check_request(request: ImportRequest) -> None:
    """Raise DataError for the first setting that cannot be carried out, naming its flag."""
    fault = next(itertools.chain(_space_faults(request), _label_faults(request)), None)
    if fault:
        raise DataError(*fault)


def _space_faults(request: ImportRequest) -> Iterator[tuple[str, str, str]]:
    size, grid = request.voxel_size_nm, request.grid
    if len(size) != 3 or not all(math.isfinite(v) and v > 0 for v in size):
        yield "--voxel-size-nm", " ".join(f"{v:g}" for v in size), "give three positive numbers, in nm, order z y x"
    if len(grid) != 3 or min(grid) < 1:
        yield "--grid", " ".join(map(str, grid)), "give three numbers of cells, each at least 1, order z y x"
    if not _DATASET_NAME.fullmatch(request.name):
        yield "--name", repr(request.name), "use letters, digits and _ - . only, such as vnc"
    kept = (1,) if request.crops is None else request.crops
    wrong = [f"cell {cell}" for cell in kept if not 1 <= cell <= math.prod(grid)]
    if wrong or len(set(kept)) < max(1, len(kept)):
        yield "--crops", (*wrong, f"{list(kept)}")[0], f"list cells of the grid, 1 to {math.prod(grid)}, each once"


def _label_faults(request: ImportRequest) -> Iterator[tuple[str, str, str]]:
    if bool(request.labels) != bool(request.values):
        yield "--labels", "is given without --values, or the other way round", "e.g. --labels L.tif --values mito=1"
    for flag, names in (("--values", request.values), ("--instances", request.instances)):
        for name in names:
            if not _CLASS_NAME.fullmatch(name):
                yield flag, f"{name!r} is no class name", "use letters, digits and _ - . only, such as mito_mem"
    for name, values in request.values.items():
        if not values:
            yield "--values", f"class {name} has no value", f"write {name}=1, or {name}=1,2"
        if request.ignore_value in values:
            yield "--ignore-value", f"{request.ignore_value} is also a value of class {name}", "name it once"
    twice = sorted(set(request.values) & set(request.instances))
    if twice:
        yield "--instances", f"{twice[0]} is also in --values", "give each class once"
    given = {"--mask": request.mask, "--ignore-value": request.ignore_value, "--crops": request.crops}
    for flag, value in (given | {"--validate": request.validate or None}).items():
        if value is not None and not request.classes:
            yield flag, "there are no labels", "add --labels and --values, or --instances"


def _import(request: ImportRequest, openers: Mapping[str, _Opener]) -> Imported:
    with _staging(request.data) as staging:
        for name in openers:
            if (request.data / name).exists():
                raise DataError(request.data / name, "exists already", "choose another --name, or remove that folder")
        pieces = _checked_pieces(request, openers)
        crops = [f"{piece.name}/crop{crop_id}" for piece in pieces for crop_id in piece.crops]
        wrong = [number for number in request.validate if not 1 <= number <= len(crops)]
        if wrong:
            raise DataError("--validate", f"crop {wrong[0]}", f"count the crops of this import, 1 to {len(crops)}")
        remarks = [remark for piece in pieces for remark in piece.remarks]
        table, table_remarks = _own_table(request)
        split, split_remarks = _datasplit(request, pieces)
        present = Counter[str]()
        for piece in pieces:
            with contextlib.ExitStack() as stack:
                zarr = staging / piece.name / f"{piece.name}.zarr"
                of_piece, voxels = write_volume(request, piece.opener(stack), zarr, piece.crops)
            remarks += of_piece
            present.update(voxels)
        if table is not None:
            save(table, staging / CLASSES)
        if split is not None:
            (staging / DATASPLIT).write_bytes(split)
        _publish(staging, request.data, [CLASSES, *openers, DATASPLIT])
    remarks += [*table_remarks, *split_remarks, *_class_remarks(request, present)]
    cells = [cell for piece in pieces for cell in _kept_cells(request)[: len(piece.crops)]]
    return Imported(tuple(openers), tuple(crops), tuple(dict.fromkeys(remarks)), tuple(cells))


def _checked_pieces(request: ImportRequest, openers: Mapping[str, _Opener]) -> list[_Piece]:
    """Open every volume before the first is written; raise DataError where its sources do not fit together."""
    pieces: list[_Piece] = []
    next_id = _highest_crop_id(request.data) + 1
    for name, opener in openers.items():
        with contextlib.ExitStack() as stack:
            sources = opener(stack)
            em = sources["em"]
            _check_sources(request, sources)
            crops: dict[int, Box] = {}
            if request.classes:
                boxes = cell_boxes(em.shape_zyx, request.grid)
                crops = {next_id + i: boxes[cell - 1] for i, cell in enumerate(_kept_cells(request))}
            pieces.append(_Piece(name, opener, crops, em_path(em.dtype), tuple(_source_remarks(request, em))))
            next_id += len(crops)
    return pieces


def _kept_cells(request: ImportRequest) -> tuple[int, ...]:
    return request.crops or tuple(range(1, math.prod(request.grid) + 1))


def _check_sources(request: ImportRequest, sources: Mapping[str, Volume]) -> None:
    em = sources["em"]
    refuse_palette(em)
    for key, volume in sources.items():
        if volume.shape_zyx != em.shape_zyx:
            what = f"{key} has shape {volume.shape_zyx}, the EM {em.name} {em.shape_zyx} (z, y, x)"
            raise DataError(volume.name, what, "export both on the same voxel grid")
        if key != "em" and volume.dtype.kind not in "ui":
            raise DataError(volume.name, f"{key} has dtype {volume.dtype}", "save labels as whole numbers, e.g. uint16")
    for size, cells, axis in zip(em.shape_zyx, request.grid, "zyx", strict=True):
        if cells > size:
            raise DataError("--grid", f"{cells} cells along {axis}, where {em.name} has {size} voxels", "use fewer")


def _source_remarks(request: ImportRequest, em: Volume) -> Iterator[str]:
    declared = em.voxel_size_nm
    if declared and not np.allclose(declared, request.voxel_size_nm, rtol=VOXEL_SIZE_TOLERANCE):
        sizes = " x ".join(f"{v:g}" for v in declared)
        yield f"{em.name} declares voxels of {sizes} nm (z, y, x); --voxel-size-nm was taken"
    if not request.classes and math.prod(request.grid) > 1:
        yield "--grid cuts labels into crops: without labels the EM stays whole"


def _class_remarks(request: ImportRequest, present: Mapping[str, int]) -> Iterator[str]:
    """Yield which classes no crop holds, and whose values leave out those of classes that they contain."""
    for name, voxels in present.items():
        if voxels == 0:
            flag = "--values" if name in request.values else "--instances"
            yield f"no imported crop holds a voxel of {name}: it counts as absent; correct {flag} if it is there"
    for whole, parts in Logic(table_of(request.data)).parts_among(request.values).items():
        values = set(request.values[whole])
        outside = [part for part in parts if not values.issuperset(request.values[part])]
        if outside:
            every = ",".join(map(str, sorted(values.union(*(request.values[part] for part in outside)))))
            contains = f"{whole} contains {', '.join(outside)}: voxels of those count as not {whole}"
            yield f"{contains}; write --values {whole}={every} if {whole} is all of them"


def _highest_crop_id(data: Path) -> int:
    """Return the highest N of any crop{N} that DATA holds, or that its datasplit.csv points at; 0 for none."""
    names = [path.name for path in data.glob(f"*/*.zarr/{GROUNDTRUTH}/crop*")]
    if (data / DATASPLIT).is_file():
        names += re.findall(r"(?<=/)crop\d+", (data / DATASPLIT).read_text(errors="replace"))
    ids = [name.removeprefix("crop") for name in names]
    return max((int(i) for i in ids if i.isdecimal()), default=0)


def _own_table(request: ImportRequest) -> tuple[ClassTable | None, list[str]]:
    """Return (DATA's own class table with these classes as they are declared, or None if it stays, remarks)."""
    path = request.data / CLASSES
    own = load_as(path, ClassTable) if path.is_file() else ClassTable(classes=())
    here = {entry.name: entry for entry in own.classes}
    known = {entry.name: entry for entry in table_of(request.data).classes}
    declared, remarks = [], []
    for name in request.classes:
        is_instance = name in request.instances
        entry = msgspec.structs.replace(known.get(name, ClassEntry(name=name)), instance=is_instance)
        if entry == known.get(name):
            continue
        declared.append(entry)
        if name not in known:
            remarks.append(f"{name} is not in the class table: registered as a class of this data in {path}")
        elif name in here:
            kinds = ("semantic", "instance")[:: 1 if is_instance else -1]
            remarks.append(f"{name} was declared {kinds[0]} in {path} and is {kinds[1]} from now on")
    return (merge(own, ClassTable(classes=tuple(declared))) if declared else None), remarks


def _datasplit(request: ImportRequest, pieces: Sequence[_Piece]) -> tuple[bytes | None, list[str]]:
    """Return (datasplit.csv with the new crops added, remarks); None where DATA needs none.

    A first datasplit.csv also lists, for training, the crops that are there already: else they would be lost.
    """
    path = request.data / DATASPLIT
    crops = [(piece.em_path, f"{piece.name}/crop{crop_id}") for piece in pieces for crop_id in piece.crops]
    if not crops or not (path.is_file() or request.validate):
        return None, []
    before = path.read_bytes() if path.is_file() else b""
    sides = {row.split for row in read_datasplit(path)} if before else set()
    remarks: list[str] = []
    rows = []
    if not path.is_file() and any(request.data.glob(f"*/*.zarr/{GROUNDTRUTH}/crop*")):
        dataset = open_dataset(request.data)
        remarks = [f"{item.name} is not listed in {path}: {item.why}" for item in dataset.left_out]
        for crop in dataset.crops:
            em_inner = Path(*crop.em.relative_to(request.data).parts[2:]).as_posix()
            rows.append(_row("train", crop.name, em_inner, [label.name for label in crop.labels]))
    for number, (em_inner, name) in enumerate(crops, start=1):
        rows.append(_row("validate" if number in request.validate else "train", name, em_inner, request.classes))
    if "train" not in sides | {row[0] for row in rows}:
        raise DataError("--validate", "leaves no crop to train on", "import crops to train on first, or leave one out")
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    newline = b"\n" if before and not before.endswith(b"\n") else b""
    return before + newline + text.getvalue().encode(), remarks


def _row(split: str, crop: str, em_inner: str, classes: Sequence[str]) -> tuple[str, ...]:
    name, crop_name = crop.rsplit("/", 1)
    zarr = f"{name}/{name}.zarr"
    return split, zarr, em_inner, zarr, f"{GROUNDTRUTH}/{crop_name}/[{','.join(classes)}]"


@contextlib.contextmanager
def _staging(data: Path) -> Iterator[Path]:
    """Give an empty folder inside DATA, to one import at a time; clear away what a killed one left.

    It is gone afterwards, and if there is an error so is every folder made for it.
    """
    made = [folder for folder in (data, *data.parents) if not folder.exists()]
    remedy = "make it a folder with space left"
    try:
        with alone(data / f"{STAGING}.lock", remedy) as held:
            for left in data.glob(f"{STAGING}-*") if held else ():
                shutil.rmtree(left, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}-", dir=data))
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except BaseException as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise DataError(data, f"cannot be written ({error})", remedy) from error
        raise


def _publish(staging: Path, data: Path, names: Sequence[str]) -> None:
    """Move these files and folders from staging into DATA, in this order; on an error put back what was there."""
    done: list[tuple[Path, Path, bytes | None]] = []
    try:
        for name in names:
            source, target = staging / name, data / name
            if source.exists():
                done.append((source, target, target.read_bytes() if target.is_file() else None))
                os.replace(source, target)
    except BaseException:
        for source, target, before in reversed(done):
            if not source.exists():
                os.replace(target, source)
            if before is not None:
                write_atomically(target, before)
        raise
