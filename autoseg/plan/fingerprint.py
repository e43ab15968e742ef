"""DATA -> fingerprint: what was annotated, how often each class occurs, how the EM looks. Reads each voxel once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from autoseg.data import store
from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, Logic, select
from autoseg.data.codes import open_codes
from autoseg.data.dataset import Crop, Dataset, open_dataset, refuse_too_many
from autoseg.data.em import finest_stored, measure_intensity
from autoseg.data.integrity import find_missing, pin
from autoseg.errors import DataError
from autoseg.schema import ClassCount, CropFacts, Finding, Fingerprint, LeftOut, VolumeFacts

Progress = Callable[[str, int, int], None]


def fingerprint(data: Path, cache: Path, progress: Progress = lambda what, done, total: None) -> Fingerprint:
    """Return the facts of all usable crops and the EM volumes they lie in; DataError if there is none."""
    dataset = open_dataset(data)
    if not dataset.crops:
        raise DataError(data, "holds EM but no annotated crop", "import labels too, or use `autoseg predict --volume`")
    logic = Logic(dataset.table)
    annotated = sorted({label.name for crop in dataset.crops for label in crop.labels} & set(logic.names))
    names = _knowable(logic, dataset, annotated)
    usable: list[Crop] = []
    crops, left_out, findings = [], list(dataset.left_out), list[Finding]()
    for done, crop in enumerate(dataset.crops):
        progress("crops", done, len(dataset.crops))
        try:
            facts, found = _crop_facts(crop, logic, names, cache)
        except DataError as error:
            left_out.append(_left_out(crop, error, dataset.root))
            refuse_too_many(data, len(dataset.crops) + len(dataset.left_out), left_out)
            continue
        usable.append(crop)
        crops.append(facts)
        findings += found
    progress("crops", len(dataset.crops), len(dataset.crops))
    volumes = {crop.volume: crop.em for crop in usable}
    return Fingerprint(
        volumes=tuple(_volume_facts(name, em, dataset.root, cache) for name, em in sorted(volumes.items())),
        crops=tuple(crops),
        classes=select(dataset.table, names),
        disjoint=dataset.table.disjoint,
        left_out=(*left_out, *dataset.foreign),
        findings=tuple(findings),
    )


def _left_out(crop: Crop, error: DataError, root: Path) -> LeftOut:
    """Return why this crop is left out; raise what is no fault of its files."""
    folders = (crop.em, *(label.path for label in crop.labels))
    if not any(error.where.startswith(str(folder)) for folder in folders):
        raise error
    return LeftOut(name=crop.name, why=str(error).replace(f"{root}{os.sep}", ""))


def _knowable(logic: Logic, dataset: Dataset, annotated: list[str]) -> list[str]:
    """Return the annotated classes and the composites that all parts of which are annotated somewhere."""
    entries = {entry.name: entry for entry in dataset.table.classes}
    derived = [
        entry.name
        for entry in dataset.table.classes
        if entry.components and entry.name not in annotated and set(entry.components) <= set(annotated)
    ]
    order = {name: i for i, name in enumerate(entries)}
    return sorted([*annotated, *derived], key=order.__getitem__)


def _crop_facts(crop: Crop, logic: Logic, names: list[str], cache: Path) -> tuple[CropFacts, list[Finding]]:
    codes = open_codes(crop, crop.grid.voxel_size_nm, cache)
    digest = pin(crop, store.checksums_in(cache))
    histogram = codes.histogram_C
    states, conflicts = logic.complete(logic.rows(codes.states_CK, codes.names))
    columns = logic.columns(names)
    counts = {
        name: ClassCount(
            absent=int(histogram[states[:, k] == ABSENT].sum()),
            present=int(histogram[states[:, k] == PRESENT].sum()),
            unknown=int(histogram[states[:, k] == UNKNOWN].sum()),
        )
        for name, k in zip(names, columns, strict=True)
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
        conflicts=int(histogram[conflicts.any(axis=1)].sum()),
        stored_sha256=digest,
    )
    return facts, list(find_missing(crop, codes))


def _volume_facts(name: str, em: Path, root: Path, cache: Path) -> VolumeFacts:
    multiscale = store.open_multiscale(em)
    finest = multiscale.levels[0]
    array = finest_stored(multiscale, store.ChunkCache(0, store.checksums_in(cache)))
    intensity, stored = measure_intensity(array)
    try:
        path = str(em.relative_to(root))
    except ValueError:
        path = str(em)
    return VolumeFacts(
        name=name,
        path=path,
        dtype=str(np.dtype(array.dtype)),
        shape_zyx=finest.grid.shape_zyx,
        voxel_size_nm=finest.grid.voxel_size_nm,
        intensity=intensity,
        stored_fraction=stored,
    )
