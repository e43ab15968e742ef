"""DATA -> fingerprint: what was annotated, how often and how thick each class is, how the EM looks, what looks wrong.

Counts come from every voxel, read once; thickness and instances from boxes of the crops that show a class best.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data import store
from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, Logic, States, cellmap_table, select
from autoseg.data.codes import CropCodes, open_codes
from autoseg.data.coding import INDEX_BLOCK
from autoseg.data.dataset import Crop, Dataset, open_dataset, refuse_too_many
from autoseg.data.datasplit import shared_numbers
from autoseg.data.em import Measured, finest_stored, make_probe, measure_intensity
from autoseg.data.integrity import find_missing, pin
from autoseg.data.sanity import find
from autoseg.data.shapes import measure_shape, pool_shape, sections_apart
from autoseg.data.traits import CropTraits, remembered
from autoseg.errors import DataError
from autoseg.geometry import part_length
from autoseg.plan.extents import valid_shares
from autoseg.schema import (
    ClassCount,
    ClassShape,
    Contradiction,
    CropFacts,
    Finding,
    Fingerprint,
    LeftOut,
    VolumeFacts,
)

Progress = Callable[[str, int, int], None]
SHAPE_CROPS = 2
SHAPE_VOXELS = 1000
SECTIONS = 64  # of label codes, looked at together


class _Opened(NamedTuple):
    """One crop, its codes, and what they mean for the classes of the fingerprint."""

    crop: Crop
    codes: CropCodes
    states_CK: States
    conflicts_C: NDArray[np.bool_]
    contradictions: tuple[Contradiction, ...]

    @property
    def cooccurrence_KK(self) -> NDArray[np.int64]:
        """Return the voxels that hold both of two classes."""
        present_CK = (self.states_CK == PRESENT).astype(np.int64)
        found: NDArray[np.int64] = present_CK.T @ (present_CK * self.codes.histogram_C[:, None])
        return found


def fingerprint(data: Path, cache: Path, progress: Progress = lambda what, done, total: None) -> Fingerprint:
    """Return the facts of all usable crops and the EM volumes they lie in; DataError if there is none."""
    dataset = open_dataset(data)
    if not dataset.crops:
        raise DataError(data, "holds EM but no annotated crop", "import labels too, or use `autoseg predict --volume`")
    logic = Logic(dataset.table)
    annotated = sorted({label.name for crop in dataset.crops for label in crop.labels} & set(logic.names))
    names = _knowable(logic, dataset, annotated)
    usable: list[_Opened] = []
    crops, left_out, findings, traits = [], list(dataset.left_out), list[Finding](), []
    for done, crop in enumerate(dataset.crops):
        progress("crops", done, len(dataset.crops))
        try:
            opened = _open(crop, logic, names, cache)
            facts, found, look = _crop_facts(opened, logic, names, cache)
        except DataError as error:
            left_out.append(_left_out(crop, error, dataset.root))
            refuse_too_many(data, len(dataset.crops) + len(dataset.left_out), left_out)
            continue
        usable.append(opened)
        crops.append(facts)
        findings += found
        traits.append(look)
    progress("crops", len(dataset.crops), len(dataset.crops))
    first = {opened.crop.volume: opened.crop for opened in reversed(usable)}
    real: dict[str, Path] = {}  # one EM under two names is one volume to the split
    ems = {name: real.setdefault(os.path.realpath(first[name].em), first[name].em) for name in sorted(first)}
    measured = [_volume_facts(first[name], em, dataset.root, cache) for name, em in ems.items()]
    volumes = tuple(facts for facts, _ in measured)
    findings += [finding for _, damaged in measured for finding in damaged]
    return Fingerprint(
        volumes=volumes,
        crops=tuple(crops),
        classes=select(dataset.table, names),
        disjoint=dataset.table.disjoint,
        left_out=(*left_out, *dataset.foreign),
        shapes=_shapes(names, crops, usable, progress),
        class_sets=_own_sets(dataset),
        cooccurrence=tuple(map(tuple, np.sum([one.cooccurrence_KK for one in usable], axis=0).tolist())),
        valid_shares=valid_shares(crops),
        findings=(*findings, *find(crops, volumes, traits), *shared_numbers([crop.name for crop in crops])),
    )


def _left_out(crop: Crop, error: DataError, root: Path) -> LeftOut:
    """Return why this crop is left out; raise what is no fault of its files."""
    folders = (crop.em, *(label.path for label in crop.labels))
    if error.where != crop.name and not any(error.where.startswith(str(folder)) for folder in folders):
        raise error
    return LeftOut(name=crop.name, why=str(error).replace(f"{root}{os.sep}", ""))


def _own_sets(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """Return the named class sets that this data adds to the challenge's, or defines anew."""
    usual = cellmap_table().sets
    return {name: members for name, members in dataset.table.sets.items() if usual.get(name) != members}


def _knowable(logic: Logic, dataset: Dataset, annotated: list[str]) -> list[str]:
    """Return the annotated classes and the composites all parts of which are annotated somewhere, or follow in turn."""
    known = set(annotated)
    while derived := {
        entry.name
        for entry in dataset.table.classes
        if entry.components and entry.name not in known and known.issuperset(entry.components)
    }:
        known |= derived
    return [name for name in logic.names if name in known]


def _open(crop: Crop, logic: Logic, names: list[str], cache: Path) -> _Opened:
    codes = open_codes(crop, crop.grid.voxel_size_nm, cache)
    rows = logic.rows(codes.states_CK, codes.names)
    states, conflicts = logic.complete(rows)
    said = logic.contradictions(rows, codes.histogram_C)
    return _Opened(crop, codes, states[:, logic.columns(names)], np.asarray(conflicts.any(axis=1)), said)


def _crop_facts(
    opened: _Opened, logic: Logic, names: list[str], cache: Path
) -> tuple[CropFacts, list[Finding], CropTraits]:
    crop, histogram = opened.crop, opened.codes.histogram_C
    digest = pin(crop, store.checksums_in(cache))
    along_y, along_x = (_counts_along(opened.codes, axis) @ (opened.states_CK == PRESENT) for axis in (1, 2))
    counts = {
        name: ClassCount(
            absent=int(histogram[states == ABSENT].sum()),
            present=int(histogram[states == PRESENT].sum()),
            unknown=int(histogram[states == UNKNOWN].sum()),
            along_y=tuple(along_y[:, k].tolist()) if along_y[:, k].any() else (),
            along_x=tuple(along_x[:, k].tolist()) if along_x[:, k].any() else (),
        )
        for k, (name, states) in enumerate(zip(names, opened.states_CK.T, strict=True))
    }
    facts = CropFacts(
        name=crop.name,
        volume=crop.volume,
        shape_zyx=crop.grid.shape_zyx,
        voxel_size_nm=crop.grid.voxel_size_nm,
        origin_nm=crop.grid.origin_nm,
        split=crop.split,
        annotated=tuple(label.name for label in crop.labels if label.name in logic.names),
        counts=counts,
        conflicts=int(histogram[opened.conflicts_C].sum()),
        contradictions=opened.contradictions,
        stored_sha256=digest,
        known_voxels=int(histogram[(opened.states_CK != UNKNOWN).any(axis=1)].sum()),
    )
    return facts, list(find_missing(crop, opened.codes)), remembered(crop, opened.codes, digest)


def _counts_along(codes: CropCodes, axis: int) -> NDArray[np.int64]:
    """Return how often each code occurs in each part of an axis; only short axes need a look at the voxels."""
    shape = codes.grid.shape_zyx
    length = part_length(shape[axis])
    if length == INDEX_BLOCK[axis]:
        blocks = [-(-n // b) for n, b in zip(shape, INDEX_BLOCK, strict=True)]
        others = tuple({0, 1, 2} - {axis})
        rows: NDArray[np.int64] = codes.counts_BC.reshape(*blocks, -1).sum(axis=others, dtype=np.int64)
        return rows
    volume, counts = codes.codes_ZYX, np.zeros((-(-shape[axis] // length), len(codes.states_CK)), np.int64)
    for z in range(0, shape[0], SECTIONS):
        parts = np.split(volume[z : z + SECTIONS], range(length, shape[axis], length), axis=axis)
        counts += np.stack([np.bincount(part.ravel(), minlength=counts.shape[1]) for part in parts])
    return counts


def _shapes(
    names: list[str], crops: Sequence[CropFacts], opened: Sequence[_Opened], progress: Progress
) -> tuple[ClassShape, ...]:
    """Return thickness and instances of each class that lies anywhere, from the crops that show it best."""
    shapes = []
    for k, name in enumerate(names):
        progress("shapes of classes", k, len(names))
        chosen = _best_crops(name, crops)
        samples = []
        for index in chosen:
            crop, codes, states_CK, *_ = opened[index]
            source = next((label for label in crop.labels if label.name == name and label.instance), None)
            samples.append(measure_shape(codes, states_CK[:, k], source, crop.name))
        if samples:
            flat = [any(sections_apart(crops[index].voxel_size_nm)) for index in chosen]
            shapes.append(pool_shape(name, samples, in_plane=any(flat)))
    progress("shapes of classes", len(names), len(names))
    return tuple(shapes)


def _best_crops(name: str, crops: Sequence[CropFacts]) -> list[int]:
    """Return the crops to measure a class in: those that hold enough of it, the finest first, then by lot."""

    def rank(index: int) -> tuple[bool, int, str]:
        crop = crops[index]
        octave = round(math.log2(math.prod(crop.voxel_size_nm)) / 3)
        lot = hashlib.sha256(crop.name.encode()).hexdigest()
        return crop.counts[name].present < SHAPE_VOXELS, octave, lot

    return sorted((i for i, crop in enumerate(crops) if crop.counts[name].present), key=rank)[:SHAPE_CROPS]


def _volume_facts(crop: Crop, em: Path, root: Path, cache: Path) -> tuple[VolumeFacts, list[Finding]]:
    """Return the facts of the volume that a crop lies in, its EM read from `em`, and what looks wrong in them."""
    name = crop.volume
    multiscale = store.open_multiscale(em)
    finest = multiscale.levels[0]
    grid, array = finest_stored(multiscale, store.ChunkCache(0, store.checksums_in(cache)))
    found = measure_intensity(array)
    try:
        path = str(em.relative_to(root))
    except ValueError:
        path = str(em)
    facts = VolumeFacts(
        name=name,
        path=path,
        dtype=str(np.dtype(array.dtype)),
        shape_zyx=finest.grid.shape_zyx,
        voxel_size_nm=finest.grid.voxel_size_nm,
        intensity=found.intensity,
        stored_fraction=found.stored_fraction,
        probe=make_probe(array, grid, crop.grid, found),
        origin_nm=finest.grid.origin_nm,
    )
    return facts, list(_damaged(name, array, found))


def _damaged(name: str, array: store.ArrayReader, found: Measured) -> Iterator[Finding]:
    """Yield what could not be read of a volume; of a crop under which it lies, it is another matter."""
    if found.damaged:
        number = len(found.damaged)
        what = f"of {found.num_sampled} sampled chunks of its EM {number} cannot be used, first: {array.path.name}: "
        yield Finding(
            where=name,
            kind="damaged",
            what=what + found.damaged[0],
            numbers={"chunks": number, "sampled": found.num_sampled},
            remedy="restore the files",
        )
