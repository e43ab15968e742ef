"""Three-valued composite logic against sets and loops, and the facts of the 74 classes of the challenge."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import crop_path, em_path, write_label, write_multiscale

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, Logic, cellmap_table, merge, select, table_of
from autoseg.errors import DataError
from autoseg.geometry import Grid
from autoseg.plan import fingerprint
from autoseg.schema import ClassEntry, ClassTable, encode, write_atomically

Row = dict[str, int]
Case = tuple[ClassTable, NDArray[np.uint8]]
OFFICIAL = ("golgi_mem", "golgi_lum", "er_mem", "pm", "ribo")
INSTANCES = {"nuc", "vim", "ves", "endo", "lyso", "ld", "perox", "mito", "np", "mt", "cell"}

# ---- the slow and obvious reference -------------------------------------------------------------------------


class Reference:
    """The four rules of classes.py, as sets and loops over one row."""

    def __init__(self, table: ClassTable) -> None:
        self.entries = {entry.name: entry for entry in table.classes}
        self.atoms = {name: self._atoms(name) for name in self.entries}
        self.disjoint = [set(group) for group in table.disjoint]

    def _atoms(self, name: str) -> set[str]:
        parts = self.entries[name].components
        return set().union(*[self._atoms(part) for part in parts]) if parts else {name}

    def is_part(self, a: str, b: str) -> bool:
        return a != b and bool(self.entries[b].components) and self.atoms[a] <= self.atoms[b]

    def exclude(self, a: str, b: str) -> bool:
        if any(a in group and b in group and a != b for group in self.disjoint):
            return True
        official = all(self.entries[name] in cellmap_table().classes for name in (a, b))
        return official and a != b and not self.atoms[a] & self.atoms[b]

    def follows(self, facts: set[tuple[str, int]]) -> set[tuple[str, int]]:
        """Return everything that one rule, applied once, says of any class."""
        said = set()
        for a, state in facts:
            for b in self.entries:
                if state == PRESENT and self.is_part(a, b):
                    said.add((b, PRESENT))
                if state == ABSENT and self.is_part(b, a):
                    said.add((b, ABSENT))
                if state == PRESENT and self.exclude(a, b):
                    said.add((b, ABSENT))
        for b, entry in self.entries.items():
            if entry.components and all((part, ABSENT) in facts for part in entry.components):
                said.add((b, ABSENT))
        return said

    def complete(self, annotated: Row) -> tuple[set[tuple[str, int]], set[str], set[str]]:
        """Return (facts, annotated classes that a fact refutes, other classes that are said to be both)."""
        facts, said = set(annotated.items()), set()
        while new := self.follows(facts) - said:
            said |= new
            facts |= {(name, state) for name, state in new if name not in annotated}
        refuted = {name for name, state in annotated.items() if (name, 1 - state) in said}
        torn = {name for name in self.entries if {(name, PRESENT), (name, ABSENT)} <= facts}
        return facts, refuted, torn


@st.composite
def tables(draw: st.DrawFn) -> ClassTable:
    """Return a table of atoms, composites of earlier classes (nested, sharing parts), and disjoint groups.

    Some are the challenge's, some bear its names or a number alone.
    """
    atoms = select(cellmap_table(), draw(st.permutations(OFFICIAL))[: draw(st.integers(1, 5))])
    entries = [draw(st.sampled_from([entry, ClassEntry(name=entry.name)])) for entry in atoms]
    entries += [golgi for golgi in select(cellmap_table(), ["golgi"]) if {*golgi.components} <= {a.name for a in atoms}]
    for i in range(draw(st.integers(0, 4))):
        names = [entry.name for entry in entries]
        parts = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
        entries.append(ClassEntry(name=f"c{i}", id=draw(st.sampled_from([None, 150 + i])), components=tuple(parts)))
    entries = draw(st.permutations(entries))
    names = [entry.name for entry in entries]
    group = st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True).map(tuple)
    disjoint = draw(st.lists(group, max_size=2)) if len(names) > 1 else []
    return ClassTable(classes=tuple(entries), disjoint=tuple(disjoint))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return a table and rows of annotated states."""
    table = draw(tables())
    state = st.sampled_from([ABSENT, PRESENT, UNKNOWN, UNKNOWN, UNKNOWN])
    width = len(table.classes)
    rows = draw(st.lists(st.lists(state, min_size=width, max_size=width), min_size=1, max_size=4))
    return table, np.array(rows, dtype=np.uint8)


def as_row(names: tuple[str, ...], states: NDArray[np.uint8]) -> Row:
    return {name: int(state) for name, state in zip(names, states, strict=True) if state != UNKNOWN}


@given(cases())
@settings(max_examples=200)
def test_completed_rows_equal_the_reference(case: Case) -> None:
    """Where nothing is torn between two inferences, states and contradictions are exactly those of the loops."""
    table, rows = case
    logic, reference = Logic(table), Reference(table)
    states, conflicts = logic.complete(rows)
    for before, after, conflict in zip(rows, states, conflicts, strict=True):
        facts, refuted, torn = reference.complete(as_row(logic.names, before))
        found = set(as_row(logic.names, after).items())
        if torn:
            assert conflict.any()
            assert found <= facts
        else:
            assert found == facts
            assert {logic.names[i] for i in np.flatnonzero(conflict)} == refuted


@given(cases())
def test_annotation_is_never_changed_and_a_torn_class_stays_unknown(
    case: Case,
) -> None:
    table, rows = case
    states, conflicts = Logic(table).complete(rows)
    annotated = rows != UNKNOWN
    assert np.array_equal(states[annotated], rows[annotated])
    assert (states[conflicts & ~annotated] == UNKNOWN).all()


@given(cases())
def test_completing_twice_adds_nothing(case: Case) -> None:
    table, rows = case
    logic = Logic(table)
    once, conflicts = logic.complete(rows)
    twice, _ = logic.complete(once)
    consistent = ~conflicts.any(axis=1)
    assert np.array_equal(twice[consistent], once[consistent])


@given(cases(), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_the_other_rows(case: Case, random: Random) -> None:
    table, rows = case
    logic = Logic(table)
    order = list(range(len(rows)))
    random.shuffle(order)
    states, conflicts = logic.complete(rows)
    shuffled, shuffled_conflicts = logic.complete(rows[order])
    assert np.array_equal(shuffled, states[order])
    assert np.array_equal(shuffled_conflicts, conflicts[order])
    for i, row in enumerate(rows):
        alone, conflict = logic.complete(row[None])
        assert np.array_equal(alone[0], states[i])
        assert np.array_equal(conflict[0], conflicts[i])


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_classes_in_the_table_does_not_matter(case: Case, random) -> None:  # type: ignore[no-untyped-def]
    table, rows = case
    order = list(range(len(table.classes)))
    random.shuffle(order)
    states, conflicts = Logic(table).complete(rows)
    other = ClassTable(classes=tuple(table.classes[i] for i in order), disjoint=table.disjoint)
    permuted, permuted_conflicts = Logic(other).complete(rows[:, order])
    assert np.array_equal(permuted, states[:, order])
    assert np.array_equal(permuted_conflicts, conflicts[:, order])


@given(cases(), st.data())
def test_knowing_more_never_takes_a_conclusion_back(case: Case, data: st.DataObject) -> None:
    table, rows = case
    logic = Logic(table)
    more = rows.copy()
    spot = (data.draw(st.integers(0, rows.shape[0] - 1)), data.draw(st.integers(0, rows.shape[1] - 1)))
    assume(more[spot] == UNKNOWN)
    more[spot] = data.draw(st.sampled_from([ABSENT, PRESENT]))
    fewer_known, _ = logic.complete(rows)
    more_known, conflicts = logic.complete(more)
    keep = ~conflicts.any(axis=1, keepdims=True) & (fewer_known != UNKNOWN)
    assert np.array_equal(more_known[keep], fewer_known[keep])


# ---- contradictions have names --------------------------------------------------------------------------------


def sides(reference: Reference, row: Row) -> set[tuple[str, str, str]]:
    """Return which annotated class stands against which in one row, by the definitions of Contradiction."""
    present = [name for name, state in row.items() if state == PRESENT]
    absent = [name for name, state in row.items() if state == ABSENT]
    wholes = {name: {name, *(b for b in reference.entries if reference.is_part(name, b))} for name in reference.entries}

    def exclude(a: str, b: str) -> bool:
        return any(reference.exclude(x, y) for x in wholes[a] for y in wholes[b])

    gone = set().union(*(reference.atoms[name] for name in absent))
    gone |= {atom for a in present for b in reference.entries if exclude(a, b) for atom in reference.atoms[b]}
    found = set()
    for a in present:
        pairs = {("excludes", *sorted((a, b))) for b in present if exclude(a, b)}
        pairs |= {("contains", a, b) for b in absent if reference.is_part(a, b)}
        if not pairs and reference.atoms[a] <= gone:
            pairs = {("parts", a, a)}
        found |= pairs
    return found


@given(cases(), st.data())
def test_every_contradiction_names_both_sides_and_counts_their_voxels(case: Case, data: st.DataObject) -> None:
    table, rows = case
    logic, reference = Logic(table), Reference(table)
    voxels = np.array(data.draw(st.lists(st.integers(1, 10**9), min_size=len(rows), max_size=len(rows))))
    _, conflicts = logic.complete(rows)
    named = logic.contradictions(rows, voxels)
    assert [one.voxels for one in named] == sorted((one.voxels for one in named), reverse=True)
    assert bool(named) == bool(conflicts.any())
    expected: dict[tuple[str, str, str], int] = {}
    for row, conflict, n in zip(rows, conflicts, voxels.tolist(), strict=True):
        as_facts = as_row(logic.names, row)
        pairs = sides(reference, as_facts)
        assert bool(pairs) == bool(conflict.any()), "a row is in contradiction where two sides can be named"
        for pair in pairs:
            expected[pair] = expected.get(pair, 0) + n
    found = {}
    for one in named:
        pair = sorted((one.present, one.against)) if one.rule == "excludes" else (one.present, one.against)
        found[(one.rule, *pair)] = one.voxels
    assert found == expected


@pytest.mark.parametrize(
    ("annotated", "text"),
    [
        ({"chrom": PRESENT, "nuc": ABSENT}, "chrom where nuc is absent (7)"),
        ({"ecs": PRESENT, "nuc": PRESENT}, "nuc together with ecs (7)"),
        ({"nuc": PRESENT, "env": ABSENT, "chrom": ABSENT}, "nuc where all its parts are absent (7)"),
    ],
)
def test_a_contradiction_reads_as_a_sentence(annotated: Row, text: str) -> None:
    logic = Logic(CELL)
    rows = logic.rows(np.array([list(annotated.values())], dtype=np.uint8), list(annotated))
    assert [one.text for one in logic.contradictions(rows, np.array([7]))] == [text]


# ---- a volume: codes and their table against every voxel for itself -------------------------------------------


@pytest.mark.parametrize(
    ("names", "can_tear"),
    [
        (("nuc", "env", "chrom"), False),
        (("env", "chrom", "cyto"), False),
        (("cell", "nuc"), False),
        (("chrom", "cyto", "ecs"), True),
        (("cell", "env", "chrom", "cyto", "ecs", "only"), True),
    ],
)
def test_counts_of_a_crop_equal_a_fixpoint_in_every_voxel(
    tmp_path: Path, names: tuple[str, ...], can_tear: bool
) -> None:
    """Codes, table and histogram against the loops, voxel by voxel: counts of each class, and contradictions."""
    rng = np.random.default_rng(0)
    write_atomically(tmp_path / "classes.json", encode(CELL))
    shape = (3, 6, 7)
    grid = Grid(shape, (8.0, 8.0, 8.0), (0.0, 0.0, 0.0))
    em = rng.integers(1, 255, shape).astype(np.uint8)
    write_multiscale(em_path(tmp_path, "d"), [(grid, em)])
    labels = {name: rng.choice([0, 0, 0, 1, 2], shape).astype(np.uint8) for name in names}
    for name, values in labels.items():
        write_label(crop_path(tmp_path, "d", "crop1"), name, values, grid, unknown=2)
    (facts,) = fingerprint(tmp_path, tmp_path / "cache").crops

    reference = Reference(table_of(tmp_path))
    counts = {name: [0, 0, 0] for name in facts.counts}
    conflicts = num_torn = 0
    for spot in np.ndindex(shape):
        row = {name: int(values[spot]) for name, values in labels.items() if values[spot] != UNKNOWN}
        known, refuted, torn = reference.complete(row)
        conflicts += bool(refuted or torn)
        num_torn += bool(torn)  # there the package draws no conclusion further, and the loops draw both
        for name, count in counts.items():
            states = [row[name]] if name in row else [state for state in (ABSENT, PRESENT) if (name, state) in known]
            count[states[0] if len(states) == 1 else UNKNOWN] += 1
    found = {name: [c.absent, c.present, c.unknown] for name, c in facts.counts.items()}
    assert bool(num_torn) == can_tear
    for name, count in counts.items():
        assert np.abs(np.subtract(found[name], count)).max() <= num_torn, name
        assert sum(found[name]) == sum(count) == em.size
    assert facts.conflicts == conflicts
    assert bool(facts.contradictions) == bool(conflicts)


def test_the_cost_of_logic_is_in_the_table_not_in_the_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    real = Logic.complete
    monkeypatch.setattr(Logic, "complete", lambda self, states: rows.append(len(states)) or real(self, states))
    for edge in (8, 64):
        rng = np.random.default_rng(0)
        grid = Grid((4, edge, edge), (8.0, 8.0, 8.0), (0.0, 0.0, 0.0))
        data = tmp_path / str(edge)
        write_multiscale(em_path(data, "d"), [(grid, rng.integers(1, 255, grid.shape_zyx).astype(np.uint8))])
        for name in ("mito", "pm"):
            values = rng.integers(0, 2, grid.shape_zyx).astype(np.uint8)
            write_label(crop_path(data, "d", "crop1"), name, values, grid)
        fingerprint(data, tmp_path / "cache")
    assert max(rows) == 4, "two classes have four combinations, in 256 voxels and in 16,384"


# ---- the rules, one by one ----------------------------------------------------------------------------------

CELL = ClassTable(
    classes=(
        ClassEntry(name="cell", components=("nuc", "cyto")),
        ClassEntry(name="nuc", components=("env", "chrom")),
        ClassEntry(name="env"),
        ClassEntry(name="chrom"),
        ClassEntry(name="cyto"),
        ClassEntry(name="only", components=("cyto",)),
        ClassEntry(name="ecs"),
    ),
    disjoint=(("cell", "ecs"),),
)


def completed(table: ClassTable, **annotated: int) -> Row:
    logic = Logic(table)
    row = logic.rows(np.array([list(annotated.values())], dtype=np.uint8), list(annotated))
    return as_row(logic.names, logic.complete(row)[0][0])


def test_a_part_of_a_part_makes_the_whole_present() -> None:
    """Nested composites: chromatin is in the nucleus, the nucleus in the cell; so the cell is there, ecs is not."""
    assert completed(CELL, chrom=PRESENT) == {"chrom": PRESENT, "nuc": PRESENT, "cell": PRESENT, "ecs": ABSENT}


def test_an_absent_whole_makes_parts_of_parts_absent() -> None:
    row = completed(CELL, ecs=PRESENT)
    assert row == {"ecs": PRESENT} | dict.fromkeys(("cell", "nuc", "env", "chrom", "cyto", "only"), ABSENT)


def test_a_composite_of_one_part_is_that_part() -> None:
    assert completed(CELL, cyto=PRESENT)["only"] == PRESENT
    assert completed(CELL, cyto=ABSENT) == {"cyto": ABSENT, "only": ABSENT}


def test_one_unknown_part_leaves_the_whole_unknown() -> None:
    assert completed(CELL, env=ABSENT) == {"env": ABSENT}
    assert completed(CELL, env=ABSENT, chrom=ABSENT) == {"env": ABSENT, "chrom": ABSENT, "nuc": ABSENT}


def test_a_present_whole_says_nothing_about_its_parts() -> None:
    assert completed(CELL, nuc=PRESENT, env=ABSENT) == {
        "nuc": PRESENT,
        "env": ABSENT,
        "cell": PRESENT,
        "ecs": ABSENT,
    }


def test_contradictions_are_counted_and_annotation_wins() -> None:
    logic = Logic(CELL)
    rows = logic.rows(
        np.array([[ABSENT, PRESENT, UNKNOWN], [PRESENT, PRESENT, PRESENT], [PRESENT, PRESENT, UNKNOWN]], np.uint8),
        ["nuc", "chrom", "ecs"],
    )
    states, conflicts = logic.complete(rows)
    names = np.array(logic.names)
    assert set(names[conflicts[0]]) == {"nuc", "chrom"}
    assert set(names[conflicts[1]]) == {"cell"}, "said present by nuc and absent by ecs"
    assert not conflicts[2].any()
    assert states[1, logic.columns(["ecs", "cell"])].tolist() == [PRESENT, UNKNOWN]


# ---- bad tables ---------------------------------------------------------------------------------------------


def test_a_component_that_is_no_class_is_named() -> None:
    with pytest.raises(DataError, match="component 'lumen' is not a class"):
        Logic(ClassTable(classes=(ClassEntry(name="er", components=("lumen",)),)))


def test_a_composite_that_contains_itself_is_refused() -> None:
    loop = (ClassEntry(name="a", components=("b",)), ClassEntry(name="b", components=("a",)))
    with pytest.raises(DataError, match="contains itself"):
        Logic(ClassTable(classes=loop))


def test_a_disjoint_group_with_a_misspelt_class_is_refused() -> None:
    classes = (ClassEntry(name="er"), ClassEntry(name="mito"))
    with pytest.raises(DataError, match="did you mean 'mito'"):
        Logic(ClassTable(classes=classes, disjoint=(("er", "mitto"),)))


def test_a_class_that_is_not_in_the_table_is_named_with_the_nearest() -> None:
    logic = Logic(CELL)
    with pytest.raises(DataError, match="did you mean 'chrom'"):
        logic.columns(["chrm"])
    with pytest.raises(DataError, match="xyz: is not a class"):
        logic.columns(["xyz"])
    with pytest.raises(DataError, match="did you mean 'mito_mem'"):
        select(cellmap_table(), ["mito_me"])


def test_an_annotation_that_is_not_in_the_table_says_nothing() -> None:
    logic = Logic(CELL)
    states = np.array([[0, 1], [1, 0]], np.uint8)
    assert np.array_equal(logic.rows(states, ["xyz", "chrom"]), logic.rows(states[:, 1:], ["chrom"]))


# ---- the challenge's table ----------------------------------------------------------------------------------


def test_the_challenge_has_74_classes_with_ids_1_to_74() -> None:
    classes = cellmap_table().classes
    assert [entry.id for entry in classes] == list(range(1, 75))
    assert len({entry.name for entry in classes}) == 74
    assert {entry.name for entry in classes if entry.instance} == INSTANCES


def test_golden_components_of_the_challenge() -> None:
    parts = {entry.name: set(entry.components) for entry in cellmap_table().classes}
    chromatin = {"hchrom", "nhchrom", "echrom", "nechrom"}
    envelope = {"ne_mem", "ne_lum", "np_out", "np_in"}
    assert parts["nuc"] == envelope | chromatin | {"nucpl", "nucleo"}
    assert len(parts["nuc"]) == 10
    assert parts["er"] == {"er_mem", "er_lum", "eres_mem", "eres_lum"} | envelope
    assert parts["ne"] == envelope
    assert parts["np"] == {"np_out", "np_in"}
    assert parts["chrom"] == chromatin
    assert parts["mito"] == {"mito_mem", "mito_lum", "mito_ribo"}
    assert parts["er_mem_all"] == {"er_mem", "eres_mem", "ne_mem"}
    assert parts["ne_mem_all"] == {"ne_mem", "np_out", "np_in"}
    assert parts["mt"] == {"mt_out", "mt_in"}
    plant = {name for name in parts if name.startswith(("chloroplast", "vacuole", "plasmodesmata"))}
    atoms = {name for name, components in parts.items() if not components}
    assert parts["cell"] == atoms - plant - {"ecs", "rbc", "bm"}
    assert len(parts["cell"]) == 44


def test_the_envelope_belongs_to_the_er_and_the_nucleus_which_do_not_exclude_each_other() -> None:
    row = completed(cellmap_table(), ne_mem=PRESENT)
    present = {name for name, state in row.items() if state == PRESENT}
    assert present == {"ne_mem", "ne", "nuc", "er", "cell", "er_mem_all", "ne_mem_all"}
    assert row["mito"] == row["ecs"] == row["ne_lum"] == row["np"] == ABSENT


def test_extracellular_space_excludes_everything_else() -> None:
    row = completed(cellmap_table(), ecs=PRESENT)
    assert row.pop("ecs") == PRESENT
    assert set(row.values()) == {ABSENT}
    assert len(row) == 73


def test_an_annotated_nucleus_that_is_absent_decides_its_parts_and_no_more() -> None:
    row = completed(cellmap_table(), nuc=ABSENT)
    parts = next(entry.components for entry in cellmap_table().classes if entry.name == "nuc")
    assert set(row) == {"nuc", "ne", "np", "chrom", "ne_mem_all", *parts}
    assert set(row.values()) == {ABSENT}


def test_a_nucleus_follows_from_its_ten_parts() -> None:
    parts = next(entry.components for entry in cellmap_table().classes if entry.name == "nuc")
    for part in parts:
        assert completed(cellmap_table(), **{part: PRESENT})["nuc"] == PRESENT, part
    absent = dict.fromkeys(parts, ABSENT)
    assert completed(cellmap_table(), **absent)["nuc"] == ABSENT
    for part in parts:
        rest = {name: state for name, state in absent.items() if name != part}
        assert "nuc" not in completed(cellmap_table(), **rest), f"{part} is unknown, so is the nucleus"


def test_er_contains_envelope_and_pores() -> None:
    for part in ("ne", "np", "ne_lum", "np_in", "er_mem", "eres"):
        assert completed(cellmap_table(), **{part: PRESENT})["er"] == PRESENT, part
    row = completed(cellmap_table(), er=ABSENT)
    assert {name for name, state in row.items() if state == ABSENT} >= {"ne", "np", "ne_mem_all", "eres", "er_mem_all"}
    assert "nuc" not in row, "chromatin may be there without an envelope in this voxel"


def test_cell_contains_nearly_all() -> None:
    outside = {"ecs", "rbc", "bm", "cell"}
    plant = ("chloroplast", "vacuole", "plasmodesmata")
    for entry in cellmap_table().classes:
        if entry.name not in outside and not entry.name.startswith(plant):
            assert completed(cellmap_table(), **{entry.name: PRESENT})["cell"] == PRESENT, entry.name
    absent = completed(cellmap_table(), cell=ABSENT)
    assert absent["mito"] == absent["nuc"] == absent["er"] == absent["isg"] == ABSENT
    assert "ecs" not in absent


def test_sets_of_the_challenge_are_classes_of_its_table() -> None:
    sets = cellmap_table().sets
    assert {name: len(members) for name, members in sets.items()} == {
        "cellmap-5": 5,
        "cellmap-14": 14,
        "cellmap-48": 48,
    }
    for members in sets.values():
        assert len(select(cellmap_table(), members)) == len(set(members))
    tested = select(cellmap_table(), sets["cellmap-48"])
    assert {entry.name for entry in tested if entry.instance} == INSTANCES - {"vim"}
    assert set(sets["cellmap-5"]) - set(sets["cellmap-14"]) == set()


def test_a_data_set_defines_sets_of_its_own(tmp_path: Path) -> None:
    mine = ClassTable(classes=(ClassEntry(name="synapse"),), sets={"mine": ("synapse", "mito"), "cellmap-5": ("nuc",)})
    write_atomically(tmp_path / "classes.json", encode(mine))
    sets = table_of(tmp_path).sets
    assert (sets["mine"], sets["cellmap-5"], len(sets["cellmap-14"])) == (("synapse", "mito"), ("nuc",), 14)


@pytest.mark.parametrize(
    ("sets", "message"),
    [({"mine": ("mitto",)}, "mitto.*did you mean 'mito'"), ({"mito": ("nuc",)}, "mito is a class and a set")],
)
def test_a_wrong_set_is_refused(tmp_path: Path, sets: dict[str, tuple[str, ...]], message: str) -> None:
    write_atomically(tmp_path / "classes.json", encode(ClassTable(classes=(), sets=sets)))
    with pytest.raises(DataError, match=message):
        table_of(tmp_path)


def test_a_class_of_ones_own_excludes_none_though_it_has_a_number(tmp_path: Path) -> None:
    own = ClassTable(classes=(ClassEntry(name="synapse", id=100), ClassEntry(name="mito", id=50)))
    write_atomically(tmp_path / "classes.json", encode(own))
    table = table_of(tmp_path)
    assert completed(table, synapse=PRESENT) == {"synapse": PRESENT}
    assert "mito_mem" not in completed(table, mito=PRESENT), "without its parts it is no longer the challenge's"
    assert completed(table, er_mem=PRESENT)["ecs"] == ABSENT, "others are"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((ClassEntry(name="mitochondria", id=50),), "id 50 is of mito and of mitochondria: give one of them another"),
        ((ClassEntry(name="x", id=100), ClassEntry(name="y", id=100)), "id 100 is of x and of y"),
    ],
)
def test_two_classes_of_one_id_are_refused(tmp_path: Path, entries: tuple[ClassEntry, ...], message: str) -> None:
    write_atomically(tmp_path / "classes.json", encode(ClassTable(classes=entries)))
    with pytest.raises(DataError, match=f"classes.json: {message}"):
        table_of(tmp_path)


def test_classes_of_a_data_set_replace_and_extend_the_table(tmp_path: Path) -> None:
    assert table_of(tmp_path) == cellmap_table()
    own = ClassTable(
        classes=(ClassEntry(name="mito", id=50), ClassEntry(name="synapse")), disjoint=(("synapse", "mito"),)
    )
    write_atomically(tmp_path / "classes.json", encode(own))
    table = table_of(tmp_path)
    assert len(table.classes) == 75
    assert select(table, ["synapse", "mito"]) == (own.classes[1], own.classes[0])
    assert table == merge(cellmap_table(), own)
    assert completed(table, synapse=PRESENT) == {"synapse": PRESENT, "mito": ABSENT}
