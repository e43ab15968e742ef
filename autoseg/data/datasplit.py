"""Which crops a data set lists: the rows of a datasplit.csv, and no crop listed under two names.

::

    "train","a/a.zarr","recon-1/em/fibsem-uint8","a/a.zarr","recon-1/labels/groundtruth/crop234/[mito,er]"
    "validate","a/a.zarr/recon-1/em/fibsem-uint8","a/a.zarr/recon-1/labels/groundtruth/crop235"
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from autoseg.errors import DataError
from autoseg.schema import Finding

SplitName = Literal["train", "validate"]


class CropRow(NamedTuple):
    """One crop as it is listed; `classes` None means all that its folder holds."""

    name: str
    split: SplitName | None
    em: Path | None
    group: Path
    classes: tuple[str, ...] | None


def read_datasplit(path: Path) -> Iterator[CropRow]:
    """Yield the rows of a datasplit.csv: split, EM zarr, EM path, label zarr, crop/[classes] (or split, EM, crop)."""
    seen: dict[str, tuple[int, str]] = {}
    try:
        lines = list(csv.reader(path.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, f"cannot be read ({error})", "check the file") from None
    for number, cells in enumerate(lines, start=1):
        if not cells:
            continue
        row = _datasplit_row(path, number, [cell.strip() for cell in cells])
        if row.name in seen:
            first, split = seen[row.name]
            side = "on both sides" if split != row.split else "twice"
            raise DataError(f"{path}:{number}", f"{row.name} is listed {side} (see line {first})", "keep one line")
        seen[row.name] = (number, row.split or "")
        yield row


def _datasplit_row(path: Path, number: int, cells: list[str]) -> CropRow:
    where = f"{path}:{number}"
    if len(cells) == 5:
        split, em_zarr, em_inner, label_zarr, label_inner = cells
        em, labels = f"{em_zarr}/{em_inner}", f"{label_zarr}/{label_inner}"
    elif len(cells) == 3:
        split, em, labels = cells
    else:
        raise DataError(where, f"has {len(cells)} columns", "write split, EM zarr, EM path, label zarr, crop/[classes]")
    if split not in ("train", "validate"):
        raise DataError(where, f"split {split!r}", "write train or validate")
    match = re.fullmatch(r"(.*?)/?(?:\[([^\]]*)\])?", labels)
    assert match is not None
    group = path.parent / match[1]
    classes = tuple(name.strip() for name in match[2].split(",") if name.strip()) if match[2] is not None else None
    zarr_parts = [part for part in group.parts if part.endswith(".zarr")]
    dataset = zarr_parts[-1].removesuffix(".zarr") if zarr_parts else group.parent.name
    side: SplitName = "train" if split == "train" else "validate"
    return CropRow(f"{dataset}/{group.name}", side, path.parent / em, group, classes)


def refuse_twins(rows: Sequence[CropRow]) -> None:
    """Raise DataError where one crop has two names, two crops one number of a volume, or two EM volumes one name.

    Crops of several volumes may share a number: `shared_numbers` tells.
    """
    folders: dict[str, CropRow] = {}
    numbers: dict[tuple[str, str], CropRow] = {}
    ems: dict[str, Path] = {}
    for row in rows:
        volume, folder = row.name.rsplit("/", 1)
        if row.em is not None:
            refuse_namesake(volume, ems.setdefault(volume, row.em), row.em)
        number = _number(folder)
        twin = numbers.setdefault((volume, number), row)
        twin = folders.setdefault(os.path.realpath(row.group), row) if twin is row else twin
        if twin is not row:
            side = " on both sides of the split" if twin.split != row.split else ""
            raise DataError(row.group, f"is the same crop as {twin.group}{side}", "keep one of them")


def shared_numbers(names: Iterable[str]) -> Iterator[Finding]:
    """Yield, in one finding, the crop numbers that several volumes use; the challenge's are of one crop each."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(_number(name.rsplit("/", 1)[1]), []).append(name)
    shared = [crops for crops in owners.values() if len(crops) > 1]
    if shared:
        listed = "; ".join(" and ".join(crops) for crops in shared[:3]) + ("; ..." if len(shared) > 3 else "")
        yield Finding(
            where="crops",
            kind="shared-number",
            what=f"{len(shared)} numbers are of several crops: {listed}",
            numbers={"numbers": float(len(shared))},
            remedy="nothing for your own data; --crops and the challenge tell crops apart by their number",
        )


def _number(folder: str) -> str:
    return re.sub(r"^crop0*(?=\d)", "crop", folder)


def refuse_namesake(volume: str, em: Path, other: Path) -> None:
    """Raise DataError for two EM volumes of one name: the grey values of one would stand for both."""
    if em != other and os.path.realpath(em) != os.path.realpath(other):
        what = f"is called {volume}, and so is {em}"
        raise DataError(other, what, "list crops of one of them alone, or give one a zarr of another name")
