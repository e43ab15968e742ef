"""Is the stored data what it was, and is it all there: checksums of what lies under a crop, and what is missing.

::

    EM s0   +--+--+--+--+        crop        every EM level:  the chunks that touch the crop
            |  |##|##|  |      +-----+       labels:          all chunks of the finest level
            +--+--+--+--+      |     |
    EM s1   |#####|     |      +-----+       digest: the same for the same bytes, wherever they lie
            +-----+-----+
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal

from autoseg.data import store
from autoseg.data.classes import ABSENT, UNKNOWN
from autoseg.data.codes import CropCodes
from autoseg.data.dataset import Crop, complement_counts
from autoseg.data.em import stored_level
from autoseg.errors import counted
from autoseg.geometry import Box, Grid
from autoseg.schema import Finding

Kind = Literal["outside", "not-fetched", "miscounted", "undeclared"]
COUNTED = {"absent": ABSENT, "unknown": UNKNOWN}


def pin(crop: Crop, checksums: store.Checksums) -> str:
    """Record the chunks under a crop (or a part), so that damage is caught when they are read; return their digest.

    What is recorded already and has the same size and time is not read again. DamageError for a chunk that is not
    what was recorded, DataError for EM that cannot be decoded (labels were, when their codes were built).
    """
    digest = hashlib.sha256()
    for label in sorted(crop.labels, key=lambda label: label.name):
        reader = store.ArrayReader(label.path, store.ChunkCache(0))
        box = Box.whole(crop.grid.shape_zyx).shift(crop.start_zyx)
        units = store.units_of(reader.layout, box.start, box.stop)
        digest.update(label.name.encode() + checksums.record(reader.path, reader.layout, units))
    for grid, reader in _em_levels(crop):
        box = grid.covering(crop.grid).grow((1, 1, 1)).clip(Box.whole(grid.shape_zyx))
        if box.num_voxels:
            units = store.units_of(reader.layout, box.start, box.stop)
            recorded = checksums.record(reader.path, reader.layout, units, reader.check_decodes)
            digest.update(reader.path.name.encode() + recorded)
    return digest.hexdigest()[:32]


def _em_levels(crop: Crop) -> Iterator[tuple[Grid, store.ArrayReader]]:
    for level in store.open_multiscale(crop.em).levels:
        yield level.grid, store.ArrayReader(level.path, store.ChunkCache(0))


def find_missing(crop: Crop, codes: CropCodes | None) -> Iterator[Finding]:
    """Yield what is not there: EM outside the volume or never fetched, label voxels that the annotation counted.

    `codes` are those at the crop's own voxel size, None where not all of them were made.
    """
    levels = list(_em_levels(crop))
    finest = levels[0][0]
    box = finest.covering(crop.grid)
    inside = box.clip(Box.whole(finest.shape_zyx)).num_voxels / box.num_voxels
    if inside < 1:
        yield _finding(
            crop.name, "outside", f"{1 - inside:.1%} of it lies outside its EM and is masked", {"share": 1 - inside}
        )
    order = store.open_multiscale(crop.em).levels_for(crop.grid.voxel_size_nm)
    readers = {reader.path: (grid, reader) for grid, reader in levels}
    _, share = stored_level([readers[level.path] for level in order], crop.grid)
    if share < inside - 1e-9:
        what = f"of the EM under it {inside - share:.1%} was never fetched and is masked"
        yield _finding(crop.name, "not-fetched", what, {"share": inside - share})
    if codes is not None:
        yield from _miscounted(crop, codes)
        yield from _undeclared(crop, codes)


def _miscounted(crop: Crop, codes: CropCodes) -> Iterator[Finding]:
    """Yield each class of which the array holds other counts than its annotation says.

    A label chunk that is not stored is legally all absent; only the count can tell whether one was lost.
    """
    histogram = codes.histogram_C
    for label in crop.labels:
        column = codes.states_CK[:, codes.names.index(label.name)]
        for name, expected in complement_counts(label).items():
            held = int(histogram[column == COUNTED[name]].sum())
            if held == expected:
                continue
            if name == "unknown" and label.unknown is None:
                told = counted(expected, "unknown voxel")
                what = f"{label.name}: its annotation counted {told}, but declares no value for them"
                yield _finding(crop.name, "undeclared", what, {"counted": expected})
                continue
            array = store.ArrayReader(label.path, store.ChunkCache(0))
            lost = int((~array.stored_chunks).sum())
            stored = f", and {lost} of its {array.stored_chunks.size} chunks are not stored" if lost else ""
            what = f"{label.name} has {held:,} {name} voxels, its annotation counted {expected:,}{stored}"
            yield _finding(crop.name, "miscounted", what, {"held": held, "counted": expected, "chunks_missing": lost})


def _undeclared(crop: Crop, codes: CropCodes) -> Iterator[Finding]:
    """Yield each semantic class with values that its encoding does not declare: they may be ids, or a mistake."""
    for label in crop.labels:
        if voxels := codes.undeclared.get(label.name, 0):
            declared = [value for value in (label.absent, label.present, label.unknown) if value is not None]
            what = (
                f"{label.name} has {voxels:,} voxels of other values than its encoding declares "
                f"({', '.join(map(str, declared))}); they count as present"
            )
            yield _finding(crop.name, "undeclared", what, {"voxels": voxels})


def _finding(where: str, kind: Kind, what: str, numbers: Mapping[str, float]) -> Finding:
    remedy = {
        "outside": "correct the translations in .zattrs, if it should not",
        "not-fetched": "fetch the EM under it",
        "undeclared": "declare them in the annotation's encoding, or correct the label",
        "miscounted": "fetch or restore the label, if chunks are lost; else correct complement_counts",
    }[kind]
    exact = {key: float(number) for key, number in numbers.items()}
    return Finding(where=where, kind=kind, what=what, numbers=exact, remedy=remedy)
