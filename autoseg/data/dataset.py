"""What there is: the crops of a data set in the CellMap layout, opened in place and never written to.

::

    DATA/datasplit.csv                                                    optional; fixes the split
    DATA/classes.json                                                     optional; classes of this data set
    DATA/{dataset}/{dataset}.zarr/recon-1/em/{em}/s0 s1 ...
    DATA/{dataset}/{dataset}.zarr/recon-1/labels/groundtruth/crop{N}/{class}/s0 ...

A class folder means: annotated in this crop (and absent where 0). No folder means: unknown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from autoseg.data import store
from autoseg.data.classes import table_of
from autoseg.data.datasplit import CropRow, SplitName, read_datasplit, refuse_namesake, refuse_twins
from autoseg.errors import AutosegError, DataError, counted
from autoseg.geometry import Box, Grid, VoxelsZYX
from autoseg.schema import ClassTable, LeftOut, nearest

RECON = "recon-1"
GROUNDTRUTH = f"{RECON}/labels/groundtruth"
EM_NAME = "fibsem-uint8"
MAX_LEFT_OUT_SHARE = 0.2


class LabelArray(NamedTuple):
    """One annotated class of a crop: where its finest level is and what its values mean.

    Every value that is neither absent nor unknown is present; `present` is the one that a semantic annotation declares.
    """

    name: str
    path: Path
    instance: bool
    absent: int
    unknown: int | None
    present: int | None = None


class Crop(NamedTuple):
    """One annotated box and the EM volume it lies in; a part of one begins at `start_zyx` of its label arrays."""

    name: str
    em: Path
    grid: Grid
    labels: tuple[LabelArray, ...]
    split: SplitName | None
    start_zyx: VoxelsZYX = (0, 0, 0)

    @property
    def volume(self) -> str:
        """Name of the data set (EM volume) that holds the crop."""
        return self.name.rsplit("/", 1)[0]

    def part(self, box: Box) -> Crop:
        """Return a box of this crop, in its voxels, as a crop of its own."""
        z, y, x = (a + b for a, b in zip(self.start_zyx, box.start, strict=True))
        return self._replace(grid=self.grid.crop(box), start_zyx=(z, y, x))


class Dataset(NamedTuple):
    """All usable crops, every one that is not with its reason, the class table, and the EM volumes.

    `foreign`: class folders whose name is in no table, and classes that datasplit.csv lists for a crop that has no such
    folder; each name once, the crops are used without them.
    """

    root: Path
    crops: tuple[Crop, ...]
    left_out: tuple[LeftOut, ...]
    table: ClassTable
    volumes: dict[str, Path]
    foreign: tuple[LeftOut, ...] = ()

    def crop(self, name: str) -> Crop:
        """Return the crop of that name, `dataset/cropN`."""
        for crop in self.crops:
            if crop.name == name:
                return crop
        for item in self.left_out:
            if item.name == name:
                raise DataError(name, f"was left out: {item.why}", "repair it, or plan without it")
        raise DataError(self.root, f"has no crop {name}", f"it has {', '.join(c.name for c in self.crops[:8])}")


def open_dataset(data: Path) -> Dataset:
    """Open a folder in the CellMap layout, or a datasplit.csv that points at such zarrs."""
    skipped: list[LeftOut] = []
    if data.suffix == ".csv":
        root, rows = data.parent, list(read_datasplit(data))
    elif not data.is_dir():
        raise DataError(data, "is not a folder", "pass a folder in the CellMap layout, or make one: autoseg import")
    else:
        root = data
        csv_path = data / "datasplit.csv"
        if csv_path.is_file():
            rows = list(read_datasplit(csv_path))
        else:
            rows, skipped = list(_scan(data)), list(_skipped(data))
    volumes: dict[str, Path] = {}
    for zarr_path in sorted(root.glob("*/*.zarr")):
        if (em := _find_em(zarr_path)) is not None:
            first = volumes.setdefault(zarr_path.stem, em)
            if not rows:  # else the crops say which of them is meant
                refuse_namesake(zarr_path.stem, first, em)
    if not rows and not skipped and not volumes:
        raise DataError(
            data,
            "holds no crops",
            f"expected {{dataset}}/{{dataset}}.zarr/{GROUNDTRUTH}/crop*/; make it with `autoseg import`",
        )
    refuse_twins(rows)
    table = table_of(root)
    crops, left_out, foreign = _open_crops(rows, table, root)
    left_out = (*left_out, *skipped)
    refuse_too_many(data, len(rows) + len(skipped), left_out)
    return Dataset(root, crops, left_out, table, volumes, foreign)


def refuse_too_many(data: Path, num_crops: int, left_out: Sequence[LeftOut]) -> None:
    """Raise DataError if more than a fifth of all crops is left out: that is no accident of one file."""
    if len(left_out) > MAX_LEFT_OUT_SHARE * num_crops:
        parts = [item.why.rpartition(": ") for item in left_out[:3]]
        remedy = "; ".join(dict.fromkeys(remedy for _, _, remedy in parts))
        what = f"{len(left_out)} of {num_crops} crops cannot be used" + (", first" if len(left_out) > 1 else "")
        raise DataError(data, f"{what}: {'; '.join(where for where, _, _ in parts)}", remedy)


def _open_crops(
    rows: Sequence[CropRow], table: ClassTable, root: Path
) -> tuple[tuple[Crop, ...], tuple[LeftOut, ...], tuple[LeftOut, ...]]:
    """Return (crops, crops that are left out, class folders that are).

    A damaged class folder takes its crop along, until it is repaired. One whose name is in no table is left out alone:
    nothing can be learnt or inferred from it, and the other classes are as good without it. Its labels stay part of
    the crop, so that naming it in a table later changes no code volume.
    """
    crops, left_out, foreign = [], [], dict[_Stray, list[str]]()
    known = frozenset(entry.name for entry in table.classes)
    volumes = _Volumes({})
    for row in rows:
        try:
            crop, strays = _open_crop(row, known, volumes)
            crops.append(crop)
        except AutosegError as error:
            left_out.append(LeftOut(name=row.name, why=str(error).replace(f"{root}{os.sep}", "")))
            continue
        for stray in strays:
            foreign.setdefault(stray, []).append(row.name)
    named = [
        LeftOut(name=f"{where[0]}/{stray.name}", why=_foreign(stray, where, known))
        for stray, where in sorted(foreign.items())
    ]
    return tuple(crops), tuple(left_out), tuple(named)


class _Stray(NamedTuple):
    """A class folder whose name is in no table, or (not `held`) a class that is listed but has no folder."""

    name: str
    held: bool


def _foreign(stray: _Stray, crops: Sequence[str], known: frozenset[str]) -> str:
    near = None if stray.name in known else nearest(stray.name, sorted(known))
    where = f"{crops[0]}/{stray.name}" + (f" and in {counted(len(crops) - 1, 'more crop')}" if len(crops) > 1 else "")
    what, remedy = (
        ("is not a class of the table", "add it to classes.json")
        if stray.held
        else ("is listed in the datasplit, but has no folder", "restore it, or remove it from the list")
    )
    return f"{where}: {what}: " + (f"did you mean {near}?" if near else remedy)


class _Volumes(NamedTuple):
    """The EM volumes opened so far: of one, many crops are cut."""

    opened: dict[Path, tuple[Grid, tuple[tuple[Grid, store.ArrayReader], ...]]]

    def levels(self, em: Path) -> tuple[Grid, tuple[tuple[Grid, store.ArrayReader], ...]]:
        """Return (finest grid, all levels) of an EM volume."""
        if em not in self.opened:
            levels = store.open_multiscale(em).levels
            readers = tuple((level.grid, store.ArrayReader(level.path, store.ChunkCache(0))) for level in levels)
            self.opened[em] = (levels[0].grid, readers)
        return self.opened[em]


def _scan(root: Path) -> Iterator[CropRow]:
    groups = root.glob(f"*/*.zarr/{GROUNDTRUTH}/crop*")
    for group in sorted(groups, key=lambda p: (p.parents[3].stem, _crop_number(p))):
        zarr_path = group.parents[3]
        if group.is_dir() and zarr_path.stem == zarr_path.parent.name:
            yield CropRow(f"{zarr_path.stem}/{group.name}", None, _find_em(zarr_path), group, None)


def _skipped(root: Path) -> Iterator[LeftOut]:
    """Yield what the layout does not cover: links that lead nowhere on the way to a crop, crops of a zarr misnamed."""
    folders = [root]
    for part in ("*", "*.zarr", *GROUNDTRUTH.split("/"), "crop*"):
        inside = (path for folder in folders for path in (folder.glob(part) if "*" in part else [folder / part]))
        found = sorted(path for path in inside if not path.name.startswith("."))
        for path in found:
            if _is_lost(path):
                inner = str(path.relative_to(root))
                yield LeftOut(name=inner, why=f"{inner}: {_lost(path)}: restore that, or remove the link")
        folders = [path for path in found if path.is_dir()]
    for group in folders:
        zarr = group.parents[3]
        if zarr.stem != zarr.parent.name:
            inner = str(group.relative_to(root))
            why = f"{inner}: lies in {zarr.name} of the folder {zarr.parent.name}: name both alike, or move it away"
            yield LeftOut(name=inner, why=why)


def _lost(link: Path) -> str:
    return f"is a link to {os.readlink(link)}, which is not there"


def _is_lost(path: Path | str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _crop_number(group: Path) -> tuple[int, str]:
    digits = re.sub(r"\D", "", group.name)
    return (int(digits) if digits else 0, group.name)


def _find_em(zarr_path: Path) -> Path | None:
    folder = zarr_path / RECON / "em"
    found = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    usual = [p for p in found if p.name == EM_NAME]
    return next(iter(usual or found), None)


def _open_crop(row: CropRow, known: frozenset[str], volumes: _Volumes) -> tuple[Crop, list[_Stray]]:
    """Return the crop, its class folders that are in no table, and the classes listed that have no folder."""
    if row.em is None:
        raise DataError(row.name, f"its zarr has no EM under {RECON}/em", "add the EM, or remove the crop")
    if not row.group.is_dir():
        raise DataError(row.group, "does not exist", "correct the datasplit, or restore the crop")
    em_grid, levels = volumes.levels(row.em)
    with os.scandir(row.group) as entries:
        folders = (e.name for e in entries if e.is_dir() or _is_lost(e.path))
        names = sorted(name for name in folders if name != "all" and not name.startswith("."))
    strays = []
    if row.classes is not None:
        strays = [_Stray(name, held=False) for name in dict.fromkeys(row.classes) if name not in names]
        names = [name for name in names if name in row.classes]
    strays += [_Stray(name, held=True) for name in names if name not in known]
    labels, grids = [], []
    for name in names:
        label, grid = _open_label(row.group / name)
        labels.append(label)
        grids.append(grid)
        if grid.aligned_with(grids[0]) != (0, 0, 0) or grid.shape_zyx != grids[0].shape_zyx:
            raise DataError(row.group / name, f"lies on another grid than {names[0]}", "store all classes on one grid")
    if known.isdisjoint(names):
        why = f" ({_foreign(strays[0], [row.name], known)})" if strays else ""
        raise DataError(row.group, f"annotates no class{why}", "restore its class folders, or remove the crop")
    grid = grids[0]
    if em_grid.covering(grid).clip(Box.whole(em_grid.shape_zyx)).num_voxels == 0:
        raise DataError(row.group, f"lies outside its EM {row.em}", "correct the translations in .zattrs")
    if not any(array.coverage(level_grid.covering(grid)) > 0 for level_grid, array in levels):
        raise DataError(row.group, f"of its EM {row.em} nothing was fetched", "fetch the EM under it")
    return Crop(row.name, row.em, grid, tuple(labels), row.split), strays


def _open_label(path: Path) -> tuple[LabelArray, Grid]:
    if _is_lost(path):
        raise DataError(path, _lost(path), "restore that, or remove the link")
    multiscale = store.open_multiscale(path, finest_only=True)
    finest = multiscale.levels[0]
    if finest.dtype.kind not in "bui":
        raise DataError(finest.path, f"holds {finest.dtype}", "store labels as whole numbers, such as uint8")
    if finest.fill_value != 0:
        what = f"fill_value {finest.fill_value}: chunks that are not stored would read as that"
        raise DataError(finest.path, what, "store labels with fill_value 0")
    return _label_array(path.name, multiscale), finest.grid


def complement_counts(label: LabelArray) -> dict[str, int]:
    """Return how many voxels the annotation says are absent or unknown, by those names; {} if it does not say."""
    counts = _mapping(_annotation(store.read_attributes(label.path)).get("complement_counts"))
    return {key: n for key, n in counts.items() if key in ("absent", "unknown") and type(n) is int}


def _label_array(name: str, multiscale: store.Multiscale) -> LabelArray:
    """Read what the values mean, of the group or else of its array.

    An instance id may be 255, so `unknown` counts there only if it was counted.
    """
    finest = multiscale.levels[0]
    kind = _mapping(_annotation(multiscale.attributes).get("annotation_type"))
    if not _mapping(kind.get("encoding")):
        kind = _mapping(_annotation(store.read_attributes(finest.path)).get("annotation_type")) or kind
    encoding = _mapping(kind.get("encoding"))
    instance = kind.get("type") == "instance_segmentation"
    values = encoding.get("absent", 0), encoding.get("unknown"), None if instance else encoding.get("present")
    absent, unknown, present = (value if type(value) is int else None for value in values)
    if absent is None or (unknown, present) != values[1:]:
        what = f"annotation encoding {encoding}"
        raise DataError(multiscale.path, what, "values of absent, present and unknown are integers")
    label = LabelArray(name, finest.path, instance, absent, unknown, present)
    if instance and unknown is not None and complement_counts(label).get("unknown", 0) <= 0:
        return label._replace(unknown=None)
    return label


def _annotation(attributes: Mapping[str, object]) -> dict[str, object]:
    return _mapping(_mapping(attributes.get("cellmap")).get("annotation"))


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
