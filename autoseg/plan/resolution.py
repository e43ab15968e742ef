"""Which classes want which voxel size: groups of classes, each for a network of its own.

::

    class    thickness      crops that hold it      coarsest size at which it spans 3 voxels
    pm          12 nm       2, 4, 16 nm             4 nm   ┐
    er_mem       9 nm       2, 4 nm                 2 nm   ┘ a factor of 2: one group, at 4 nm
    nuc     > 1600 nm       2, 4, 32 nm             32 nm    a group of its own, with more tissue in a patch

Sizes are compared by octave of the geometric mean of a voxel's edges. A class that is wider than its crops has no
measured thickness: it wants the coarsest crops that hold it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from autoseg.errors import counted
from autoseg.geometry import cube_edge_nm
from autoseg.schema import CropFacts, Fingerprint

MIN_VOXELS_ACROSS = 3.0
LEAST_CROPS = 2
FINER, COARSER = 4.0, 2.0  # crops of a group: labels up to four times finer than its size, and up to twice coarser
HAIR = 1e-3


class Group(NamedTuple):
    """Classes of one voxel size: its typical edge, the edges of the crops that serve it, and why."""

    edge_nm: float
    voxel_edge_nm: tuple[float, float]
    classes: tuple[str, ...]
    because: str


def resolution_groups(facts: Fingerprint, names: Sequence[str]) -> tuple[Group, ...]:
    """Return the groups of these classes, finest first; one group where all want like sizes."""
    wanted = {name: _octave_wanted(facts, name) for name in names}
    groups: list[list[str]] = []
    for name in sorted(names, key=lambda name: wanted[name]):
        if groups and wanted[name] - wanted[groups[-1][0]] <= 1:
            groups[-1].append(name)
        else:
            groups.append([name])
    order = {name: i for i, name in enumerate(names)}
    return tuple(_group(facts, sorted(group, key=order.__getitem__), wanted) for group in groups)


def serving_range(facts: Fingerprint, names: Sequence[str]) -> tuple[float, float] | None:
    """Return the edges of the voxels that suit one plan for most of these classes; None where all crops suit it."""
    groups = resolution_groups(facts, names)
    main = max(groups, key=lambda group: sum(_holds(crop, name) for crop in facts.crops for name in group.classes))
    held = [crop for crop in facts.crops if any(_holds(crop, name) for name in names)]
    return None if all(_serves(crop, main.edge_nm) for crop in held) else main.voxel_edge_nm


def _serves(crop: CropFacts, edge_nm: float) -> bool:
    """Return whether the labels of a crop are neither too fine nor too coarse for voxels of that edge."""
    edge = cube_edge_nm(crop.voxel_size_nm)
    return edge_nm / FINER * (1 - HAIR) <= edge <= edge_nm * COARSER * (1 + HAIR)


def _group(facts: Fingerprint, names: list[str], wanted: dict[str, int]) -> Group:
    """Return the group of these classes at the size of most of their crops within its two octaves."""
    octaves = sorted({wanted[name] for name in names})
    crops = [crop for crop in facts.crops if any(_holds(crop, name) for name in names)]
    near = [crop for crop in crops if octaves[0] <= _octave(crop) <= octaves[-1]]
    sizes = [cube_edge_nm(crop.voxel_size_nm) for crop in near]
    usual, _ = Counter(round(size, 2) for size in sizes).most_common(1)[0]
    edge = next(size for size in sizes if round(size, 2) == usual)
    within = [cube_edge_nm(crop.voxel_size_nm) for crop in crops if _serves(crop, edge)]
    thickness = {shape.name: shape.thickness_nm for shape in facts.shapes}
    known = sorted((q.p50, name) for name in names if (q := thickness.get(name)) is not None)
    thinnest = f"the thinnest measured, {known[0][1]}, is {known[0][0]:.0f} nm thick" if known else "none is measured"
    edges = f"{min(within):.3g} to {max(within):.3g} nm"
    because = f"{', '.join(names)}: {thinnest}; {counted(len(within), 'crop')} of {edges}"
    return Group(edge, (min(within), max(within)), tuple(names), because)


def _octave_wanted(facts: Fingerprint, name: str) -> int:
    """Return the coarsest octave of crops that hold the class at which it spans enough voxels, else the finest.

    Of a class whose shape nobody measured it is the coarsest octave at which crops were annotated for it alone, since
    somebody chose that size for it; without such crops, the coarsest with half as many crops as any other has.
    """
    held = Counter(_octave(crop) for crop in facts.crops if _holds(crop, name))
    shape = next((shape for shape in facts.shapes if shape.name == name), None)
    if shape is None:
        alone = Counter(_octave(crop) for crop in facts.crops if crop.annotated == (name,))
        made_for_it = [octave for octave, number in alone.items() if number >= LEAST_CROPS]
        return max(made_for_it or (octave for octave, number in held.items() if 2 * number >= max(held.values())))
    limit = math.inf if shape.thickness_nm is None else shape.thickness_nm.p50 / MIN_VOXELS_ACROSS
    enough = [octave for octave, number in held.items() if number >= LEAST_CROPS] or list(held)
    fits = [octave for octave in enough if 2.0**octave <= limit * math.sqrt(2)]
    return max(fits, default=min(enough))


def _octave(crop: CropFacts) -> int:
    return round(math.log2(cube_edge_nm(crop.voxel_size_nm)))


def _holds(crop: CropFacts, name: str) -> bool:
    return bool(crop.present(name))
