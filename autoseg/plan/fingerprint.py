"""DATA -> fingerprint: what was annotated, how often each class occurs, how the EM looks, what looks wrong.

Reads each label voxel once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from autoseg.data import store
from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, Logic, cellmap_table, select
from autoseg.data.codes import CropCodes, open_codes
from autoseg.data.dataset import Crop, Dataset, open_dataset
from autoseg.data.em import finest_stored, measure_intensity
from autoseg.data.sanity import find
from autoseg.data.traits import measure
from autoseg.errors import DataError
from autoseg.schema import ClassCount, CropFacts, Fingerprint, VolumeFacts

Progress = Callable[[str, int, int], None]


def fingerprint(data: Path, cache: Path, progress: Progress = lambda what, done, total: None) -> Fingerprint:
    """Return the facts of all usable crops and the EM volumes they lie in; DataError if there is none."""
    dataset = open_dataset(data)
    if not dataset.crops:
        raise DataError(data, "holds EM but no annotated crop", "import labels too, or use `autoseg predict --volume`")
    logic = Logic(dataset.table)
    annotated = sorted({label.name for crop in dataset.crops for label in crop.labels})
    select(dataset.table, annotated)
    names = _knowable(logic, dataset, annotated)
    crops, traits = [], []
    for done, crop in enumerate(dataset.crops):
        progress("crops", done, len(dataset.crops))
        codes = open_codes(crop, crop.grid.voxel_size_nm, cache)
        crops.append(_crop_facts(crop, codes, logic, names))
        traits.append(measure(crop, codes))
    progress("crops", len(dataset.crops), len(dataset.crops))
    ems = {crop.volume: crop.em for crop in dataset.crops}
    volumes = tuple(_volume_facts(name, em, dataset.root) for name, em in sorted(ems.items()))
    own = {name: members for name, members in dataset.table.sets.items() if cellmap_table().sets.get(name) != members}
    return Fingerprint(
        volumes=volumes,
        crops=tuple(crops),
        classes=select(dataset.table, names),
        disjoint=dataset.table.disjoint,
        left_out=dataset.left_out,
        class_sets=own,
        findings=tuple(find(crops, volumes, traits)),
    )


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


def _crop_facts(crop: Crop, codes: CropCodes, logic: Logic, names: list[str]) -> CropFacts:
    histogram = codes.histogram_C
    rows = logic.rows(codes.states_CK, codes.names)
    states, conflicts = logic.complete(rows)
    columns = logic.columns(names)
    counts = {
        name: ClassCount(
            absent=int(histogram[states[:, k] == ABSENT].sum()),
            present=int(histogram[states[:, k] == PRESENT].sum()),
            unknown=int(histogram[states[:, k] == UNKNOWN].sum()),
        )
        for name, k in zip(names, columns, strict=True)
    }
    return CropFacts(
        name=crop.name,
        volume=crop.volume,
        shape_zyx=crop.grid.shape_zyx,
        voxel_size_nm=crop.grid.voxel_size_nm,
        origin_nm=crop.grid.origin_nm,
        split=crop.split,
        annotated=tuple(label.name for label in crop.labels),
        counts=counts,
        conflicts=int(histogram[conflicts.any(axis=1)].sum()),
        contradictions=logic.contradictions(rows, histogram),
    )


def _volume_facts(name: str, em: Path, root: Path) -> VolumeFacts:
    multiscale = store.open_multiscale(em)
    finest = multiscale.levels[0]
    array = finest_stored(multiscale, store.ChunkCache(0))
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
