"""Classes and what one annotation says about another: three-valued logic on rows of states.

A state row holds, for every class, absent (0), present (1) or unknown (2). What may be inferred, and nothing else::

    a part present            -> the composite present
    all parts known, none     -> the composite absent
    the composite absent      -> every part absent
    a class present           -> every class disjoint from it absent

Disjoint are the challenge's classes that share no atom, as long as their names, ids and parts are the challenge's, and
what the table of a data set declares so: a class of its own excludes none by default. Annotation beats inference; a
contradiction is counted and named. Cost depends on the number of rows, never on voxels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DataError
from autoseg.schema import ClassEntry, ClassTable, Contradiction, decode, load_as, nearest

ABSENT, PRESENT, UNKNOWN = 0, 1, 2
States = NDArray[np.uint8]


@cache
def cellmap_table() -> ClassTable:
    """Return the 74 classes of the CellMap challenge, and sets of them; classes that share no atom exclude each other.

    `cellmap-48` are the classes that the challenge scores.
    """
    content = resources.files("autoseg.data").joinpath("cellmap_classes.json").read_bytes()
    table: ClassTable = decode(content, ClassTable, "cellmap_classes.json")
    return table


def table_of(data_root: Path) -> ClassTable:
    """Return the class table of a data set: its own `classes.json` over the challenge's; DataError if it is wrong."""
    own_path = data_root / "classes.json"
    if not own_path.is_file():
        return cellmap_table()
    table = merge(cellmap_table(), load_as(own_path, ClassTable))
    _refuse_shared_ids(table, own_path)
    names = {entry.name for entry in table.classes}
    for set_name, members in table.sets.items():
        if set_name in names:
            raise DataError(own_path, f"{set_name} is a class and a set", "rename the set")
        select(table, members)
    return table


def _refuse_shared_ids(table: ClassTable, own_path: Path) -> None:
    owners: dict[int, str] = {}
    for entry in table.classes:
        if entry.id is not None and owners.setdefault(entry.id, entry.name) != entry.name:
            what = f"id {entry.id} is of {owners[entry.id]} and of {entry.name}"
            raise DataError(own_path, what, "give one of them another id, or none")


def merge(base: ClassTable, own: ClassTable) -> ClassTable:
    """Return `base` with the classes and sets of `own` added or put in their place."""
    entries = {entry.name: entry for entry in base.classes} | {entry.name: entry for entry in own.classes}
    return ClassTable(classes=tuple(entries.values()), disjoint=base.disjoint + own.disjoint, sets=base.sets | own.sets)


def select(table: ClassTable, names: Iterable[str]) -> tuple[ClassEntry, ...]:
    """Return the entries of these classes in that order; DataError suggests a near name for an unknown one."""
    entries = {entry.name: entry for entry in table.classes}
    chosen = []
    for name in names:
        if name not in entries:
            raise _no_class(name, entries)
        chosen.append(entries[name])
    return tuple(chosen)


class Logic:
    """The relations of a class table, ready to complete rows of states."""

    def __init__(self, table: ClassTable) -> None:
        self.names = tuple(entry.name for entry in table.classes)
        self._index = {name: i for i, name in enumerate(self.names)}
        atoms = _atoms({entry.name: entry.components for entry in table.classes})
        usual = {(entry.name, entry.id, frozenset(entry.components)) for entry in cellmap_table().classes}
        official = [(entry.name, entry.id, frozenset(entry.components)) in usual for entry in table.classes]
        num = len(self.names)
        self._part_of = np.zeros((num, num), dtype=bool)  # [part, composite]
        self._components = np.zeros((num, num), dtype=bool)
        self._disjoint = np.zeros((num, num), dtype=bool)
        self._atoms = np.array([[name in atoms[entry.name] for name in self.names] for entry in table.classes])
        for i, a in enumerate(table.classes):
            for j, b in enumerate(table.classes):
                self._part_of[i, j] = i != j and bool(b.components) and atoms[a.name] <= atoms[b.name]
                self._components[i, j] = a.name in b.components
                apart = official[i] and official[j] and not atoms[a.name] & atoms[b.name]
                self._disjoint[i, j] = i != j and apart
        for group in table.disjoint:
            members = self.columns(group)
            for i in members:
                self._disjoint[i, [j for j in members if j != i]] = True
        relations = (self._part_of, self._components, self._disjoint)
        self.key = hashlib.sha256(repr(self.names).encode() + b"".join(r.tobytes() for r in relations)).digest()

    def rows(self, states_CK: States, names: Sequence[str]) -> States:
        """Spread states of the annotated classes `names` over all classes of the table, the others unknown.

        A name that is not in the table says nothing; `open_dataset` reports it as left out.
        """
        rows = np.full((states_CK.shape[0], len(self.names)), UNKNOWN, dtype=np.uint8)
        known = [name in self._index for name in names]
        rows[:, self.columns([name for name in names if name in self._index])] = states_CK[:, known]
        return rows

    def columns(self, names: Sequence[str]) -> list[int]:
        """Return the column of each of these classes; DataError names the first that is not in the table."""
        for name in names:
            if name not in self._index:
                raise _no_class(name, self.names)
        return [self._index[name] for name in names]

    def parts_among(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return for each of these classes that contains others of them which ones; names of no table say nothing."""
        known = [name for name in names if name in self._index]
        inside = {b: tuple(a for a in known if self._part_of[self._index[a], self._index[b]]) for b in known}
        return {name: parts for name, parts in inside.items() if parts}

    def excluding(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Return (names, names): whether none is of both; what excludes a whole excludes its parts."""
        columns = self.columns(names)
        within = (self._part_of | np.eye(len(self.names), dtype=bool)).astype(np.float32)
        exclude: NDArray[np.bool_] = within @ self._disjoint @ within.T > 0
        return exclude[np.ix_(columns, columns)]

    def overlaps(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Return (names, names): whether the two share an atom; each shares its own with itself."""
        atoms = self._atoms[self.columns(names)].astype(np.float32)
        return atoms @ atoms.T > 0

    def consists_of(self, name: str, others: Sequence[str]) -> bool:
        """Return whether every atom of a class is one of the others', so that they leave nothing of it."""
        (whole,) = self._atoms[self.columns([name])]
        return not (whole & ~self._atoms[self.columns(others)].any(axis=0)).any()

    def complete(self, annotated_CK: States) -> tuple[States, NDArray[np.bool_]]:
        """Return (states with everything that follows, contradictions), both (rows, classes of the table).

        Inference is repeated until nothing new follows. Where two inferences disagree the class stays unknown.
        """
        says_present = np.zeros(annotated_CK.shape, dtype=bool)
        says_absent = np.zeros(annotated_CK.shape, dtype=bool)
        has_components = self._components.any(axis=0)
        states = annotated_CK.copy()
        while True:
            present, absent = states == PRESENT, states == ABSENT
            says_present |= _any(present, self._part_of)
            says_absent |= _any(absent, self._part_of.T)
            says_absent |= _any(present, self._disjoint)
            says_absent |= ~_any(~absent, self._components) & has_components
            inferred = np.where(says_present, PRESENT, ABSENT)
            decided = (says_present ^ says_absent) & (annotated_CK == UNKNOWN)
            new = np.where(decided, inferred, annotated_CK).astype(np.uint8)
            if np.array_equal(new, states):
                break
            states = new
        conflicts = (
            (annotated_CK == PRESENT) & says_absent
            | (annotated_CK == ABSENT) & says_present
            | (annotated_CK == UNKNOWN) & says_present & says_absent
        )
        return states, conflicts

    def contradictions(self, annotated_CK: States, histogram_C: NDArray[np.int64]) -> tuple[Contradiction, ...]:
        """Return which annotated class stands against which, most voxels first; `histogram_C` holds voxels by row.

        Every row in which `complete` finds a contradiction is in at least one of them.
        """
        rows = self.complete(annotated_CK)[1].any(axis=1)
        voxels = histogram_C[rows].astype(np.float64)[:, None]
        present, absent = annotated_CK[rows] == PRESENT, annotated_CK[rows] == ABSENT
        within = (self._part_of | np.eye(len(self.names), dtype=bool)).astype(np.float32)
        exclude = within @ self._disjoint @ within.T > 0  # what excludes a whole excludes its parts
        together, outside = (present * voxels).T @ present, (present * voxels).T @ absent
        refuted = _any(present, exclude) | _any(absent, self._part_of.T)
        gone = _any(absent, self._atoms) | _any(present, _any(exclude, self._atoms))
        hollow = ((present & ~refuted & ~_any(~gone, self._atoms.T)) * voxels).sum(axis=0)
        found: list[tuple[Literal["excludes", "contains", "parts"], int, int, float]] = [
            *(("excludes", i, j, together[i, j]) for i, j in np.argwhere(np.triu(exclude) & (together > 0)).tolist()),
            *(("contains", i, j, outside[i, j]) for i, j in np.argwhere(self._part_of & (outside > 0)).tolist()),
            *(("parts", i, i, hollow[i]) for i in np.flatnonzero(hollow).tolist()),
        ]
        named = [
            Contradiction(present=self.names[i], against=self.names[j], rule=rule, voxels=int(n))
            for rule, i, j, n in found
        ]
        return tuple(sorted(named, key=lambda one: (-one.voxels, one.present, one.against)))


def _atoms(components: Mapping[str, Sequence[str]]) -> dict[str, frozenset[str]]:
    """Return the atoms of each class, parts of parts taken apart; an atom is its own."""
    found: dict[str, frozenset[str]] = {}

    def visit(name: str, inside: tuple[str, ...]) -> frozenset[str]:
        if name in inside:
            raise DataError(name, f"contains itself ({' > '.join([*inside, name])})", "correct classes.json")
        if name not in found:
            for part in components[name]:
                if part not in components:
                    raise DataError(name, f"component {part!r} is not a class", "add it to classes.json")
            parts = [visit(part, (*inside, name)) for part in components[name]]
            found[name] = frozenset().union(*parts) if parts else frozenset({name})
        return found[name]

    for name in components:
        visit(name, ())
    return found


def _no_class(name: str, known: Iterable[str]) -> DataError:
    near = nearest(name, list(known))
    return DataError(name, "is not a class of the table", f"did you mean {near}?" if near else "add it to classes.json")


def _any(flags_CK: NDArray[np.bool_], relation_KK: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return for each class whether any class related to it (rows of the relation) is flagged."""
    related: NDArray[np.bool_] = (flags_CK.astype(np.float32) @ relation_KK.astype(np.float32)) > 0
    return related
