"""From what a user types to files: FILE:key, stacks of slices by a glob, globs of volumes that pair."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from autoseg.data.formats.readers import PNG_ENDS, TIFF_ENDS, joined, open_file
from autoseg.data.formats.volume import Volume, by_plane
from autoseg.errors import DataError

_Matches = dict[tuple[str, ...], str]
_WILDCARDS = re.compile(r"\*\*/|(?:\*|\?|\[!?\]?[^\]]*\])+")


def open_volume(spec: str | Path) -> Volume:
    """Open FILE, FILE:key or a glob of 2D slices as one volume; raise DataError saying what to do."""
    file, key = _split_key(str(spec))
    if not _is_glob(file):
        return open_file(file, key)
    paths = list(_matches(file).values())
    return open_file(paths[0], key) if len(paths) == 1 else _open_stack(file, paths)


def expand_globs(em: str, others: Mapping[str, str]) -> list[dict[str, str]]:
    """Pair the volumes of globs by what `*` matched, one dict a volume; raise DataError for one unpaired."""
    file, key = _split_key(em)
    alone = [{"em": em, **others, "match": ""}]
    if not _is_glob(file):
        return alone
    ems = _matches(file)
    is_stack = _is_slice(next(iter(ems.values())), key)
    specs = {"em": {groups: joined(path, key) for groups, path in ems.items()}}
    for name, spec in others.items():
        other, other_key = _split_key(spec)
        if _is_glob(other):
            found = _matches(other)
            _refuse_unpaired(ems, found, other)
            _refuse_unpaired(found, ems, file)
            specs[name] = {groups: joined(path, other_key) for groups, path in found.items()}
        elif not is_stack:
            what = f"is one {name} file for the several volumes of {em}"
            raise DataError(spec, what, "put a * where the volumes' names differ")
    if is_stack:
        return alone
    names = {groups: "_".join(groups).replace("/", "_") for groups in ems}
    if len(set(names.values())) < len(names):
        raise DataError(em, "its wildcards match several files by the same text", "use a single *")
    return [
        {name: found[groups] for name, found in specs.items()} | {"match": match} for groups, match in names.items()
    ]


def _open_stack(pattern: str, paths: Sequence[str]) -> Volume:
    """Open 2D files of one shape and dtype as the planes of one volume; raise DataError for an odd one."""
    with open_file(paths[0]) as first:
        alike = f"{paths[0]} is {first.stored_dtype} of {first.shape_zyx[1:]}"
    is_palette = False
    for path in paths:
        with open_file(path) as one:
            is_palette |= one.is_palette
            if one.shape_zyx[0] != 1 or not path.lower().endswith((*TIFF_ENDS, *PNG_ENDS)):
                what = f"is a volume of shape {one.shape_zyx}, but {pattern} should be a stack of slices"
                raise DataError(path, what, "name a single volume, or match 2D TIFF or PNG files only")
            if one.shape_zyx != first.shape_zyx or one.stored_dtype != first.stored_dtype:
                what = f"is {one.stored_dtype} of {one.shape_zyx[1:]}, {alike}"
                raise DataError(path, what, "save all slices alike, or narrow the glob")

    def plane(at: int) -> NDArray[Any]:
        with open_file(paths[at]) as volume:
            return volume.read(0, 1).squeeze(0)

    shape = (len(paths), *first.shape_zyx[1:])
    return Volume(pattern, shape, first.stored_dtype, first.voxel_size_nm, by_plane(plane), is_palette=is_palette)


def _split_key(spec: str) -> tuple[str, str | None]:
    """Split FILE.h5:key; any other colon belongs to the path."""
    found = re.fullmatch(r"(.+?\.(?:h5|hdf5|hdf|he5)):(.+)", spec, re.IGNORECASE)
    file, key = found.groups() if found else (spec, None)
    return str(Path(file).expanduser()), key


def _is_glob(file: str) -> bool:
    return glob.has_magic(file) and not os.path.exists(file)


def _natural(text: str) -> list[str | int]:
    """Return a sort key in which slice_2 comes before slice_10."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"([0-9]+)", text))]


def _matches(pattern: str) -> _Matches:
    """Return {what each run of wildcards matched: file} in natural order; raise DataError for no file."""
    pattern = pattern.replace(os.sep, "/")
    regex, end = "", 0
    for found in _WILDCARDS.finditer(pattern):
        group = "(.*/|)" if found[0] == "**/" else "(.*)" if "**" in found[0] else "([^/]*)"
        regex += re.escape(pattern[end : found.start()]) + group
        end = found.end()
    regex += re.escape(pattern[end:])
    matches = {}
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: (_natural(path), path)):
        if match := re.fullmatch(regex, path.replace(os.sep, "/"), re.IGNORECASE | re.DOTALL):
            matches[match.groups()] = path
    if not matches:
        raise DataError(pattern, "matches no file", "check the folder and the spelling")
    return matches


def _refuse_unpaired(files: _Matches, partners: _Matches, pattern: str) -> None:
    for groups, path in files.items():
        if groups not in partners:
            what = f"has no partner in {pattern}, where * would be {'_'.join(groups)!r}"
            raise DataError(path, what, "add the missing file, or write globs whose * match the same text")


def _is_slice(path: str, key: str | None) -> bool:
    if not path.lower().endswith((*TIFF_ENDS, *PNG_ENDS)):
        return False
    with open_file(path, key) as volume:
        return volume.shape_zyx[0] == 1
