"""DATA -> fingerprint: what was annotated, how often and how thick each class is, how the EM looks, what looks wrong.

Counts come from every voxel, read once; thickness and instances from boxes of the crops that show a class best.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from autoseg.data import store
from autoseg.data.classes import Logic, cellmap_table, select
from autoseg.data.dataset import Crop, Dataset, open_dataset, refuse_too_many
from autoseg.data.datasplit import shared_numbers
from autoseg.data.em import finest_stored, make_probe
from autoseg.data.greys import Measured, measure_intensity
from autoseg.data.sanity import find
from autoseg.data.shapes import measure_shape, pool_shape, sections_apart
from autoseg.errors import DataError
from autoseg.plan.crops import OpenCrop, crop_facts, open_crop
from autoseg.plan.extents import valid_shares
from autoseg.schema import (
    ClassShape,
    CropFacts,
    Finding,
    Fingerprint,
    LeftOut,
    VolumeFacts,
)

Progress = Callable[[str, int, int], None]
SHAPE_CROPS = 2
SHAPE_VOXELS = 1000


def fingerprint(data: Path, cache: Path, progress: Progress = lambda what, done, total: None) -> Fingerprint:
    """Return the facts of all usable crops and the EM volumes they lie in; DataError if there is none."""
    dataset = open_dataset(data)
    if not dataset.crops:
        raise DataError(data, "holds EM but no annotated crop", "import labels too, or use `autoseg predict --volume`")
    logic = Logic(dataset.table)
    annotated = sorted({label.name for crop in dataset.crops for label in crop.labels} & set(logic.names))
    names = _knowable(logic, dataset, annotated)
    usable: list[OpenCrop] = []
    crops, left_out, findings, traits = [], list(dataset.left_out), list[Finding](), []
    for done, crop in enumerate(dataset.crops):
        progress("crops", done, len(dataset.crops))
        try:
            opened = open_crop(crop, logic, names, cache)
            facts, found, look = crop_facts(opened, logic, names, cache)
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


def _shapes(
    names: list[str], crops: Sequence[CropFacts], opened: Sequence[OpenCrop], progress: Progress
) -> tuple[ClassShape, ...]:
    """Return thickness and instances of each class that lies anywhere, from the crops that show it best."""
    shapes = []
    for k, name in enumerate(names):
        progress("shapes of classes", k, len(names))
        chosen = _best_crops(name, crops)
        samples = []
        for index in chosen:
            crop, (codes, states_CK) = opened[index].crop, opened[index].best_part(k)
            ids = (label for label in crop.labels if label.name == name and label.instance)
            source = None if opened[index].is_sample else next(ids, None)
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
