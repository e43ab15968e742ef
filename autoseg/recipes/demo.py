"""The main job on data that autoseg makes itself: synthetic EM, plan, train, predict, score, report.

::

    DIR/data     cells-a, cells-d   isotropic, every class      cells-b, cells-c   annotate only some classes
                 sections           coarse and anisotropic: 40 nm sections, what one can tell apart in them
    DIR/unseen   a volume that the run never sees; the scores are of it
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autoseg.data.classes import ABSENT, PRESENT, Logic
from autoseg.data.codes import default_cache, open_codes
from autoseg.data.convert import import_arrays
from autoseg.data.dataset import Dataset, open_dataset
from autoseg.data.store import ArrayReader, ChunkCache, open_multiscale
from autoseg.data.synthetic import ATOMS, synthesize
from autoseg.data.writer import ImportRequest
from autoseg.errors import DataError, PlanError, counted
from autoseg.geometry import Box, NmZYX, VoxelsZYX
from autoseg.metrics.overlap import Counts, mean, ratios
from autoseg.plan import fingerprint, probe_hardware
from autoseg.recipes.speed import plan_here
from autoseg.recipes.training import train_on
from autoseg.recipes.validate import evaluate_run
from autoseg.schema import Observer, Outcome, Plan, Scores, load_as, save

COMPOSITES: dict[str, tuple[str, ...]] = {
    "mito": ("mito_mem", "mito_lum"),
    "er": ("er_mem", "er_lum", "ne_mem", "ne_lum"),
    "ne": ("ne_mem", "ne_lum"),
    "nuc": ("ne_mem", "ne_lum", "hchrom", "echrom", "nucpl"),
}
EVERY_CLASS = (*ATOMS, *COMPOSITES)
CUBIC: NmZYX = (8.0, 8.0, 8.0)
SECTIONS: NmZYX = (40.0, 8.0, 8.0)
NUM_GREYS = 256
BUDGET_S = 100.0


class Piece(NamedTuple):
    """One synthetic volume, cut into cells, and the classes that its crops annotate."""

    name: str
    shape_zyx: VoxelsZYX
    voxel_size_nm: NmZYX
    seed: int
    grid: VoxelsZYX
    classes: tuple[str, ...]


TRAINING = (
    Piece("cells-a", (96, 192, 384), CUBIC, 1, (1, 1, 2), EVERY_CLASS),
    Piece("cells-b", (96, 192, 192), CUBIC, 2, (1, 1, 1), ("nuc", "mito", "er", "pm")),
    Piece("cells-c", (96, 192, 192), CUBIC, 3, (1, 1, 1), ("ecs", "pm", "mito_mem", "mito_lum", "cyto")),
    Piece("cells-d", (32, 192, 192), CUBIC, 5, (1, 1, 1), EVERY_CLASS),
    Piece("sections", (24, 192, 192), SECTIONS, 4, (1, 1, 1), ("ecs", "pm", "mito", "er", "nuc", "cyto")),
)
UNSEEN = (Piece("unseen", (48, 192, 192), CUBIC, 11, (1, 1, 1), EVERY_CLASS),)


class Demo(NamedTuple):
    """What the demo made."""

    folder: Path
    plan: Plan
    scores: Scores
    by_threshold: dict[str, float | None]


def run_demo(
    folder: Path,
    *,
    observer: Observer | None = None,
    tell: Callable[[str], None] = lambda text: None,
    planned: Callable[[Plan], None] = lambda plan: None,
    budget_s: float | None = None,
) -> Demo | None:
    """Do the main job in `folder`; None if it was asked to stop. Finished parts are kept: the same command goes on.

    PlanError if what is there was planned for another budget.
    """
    cache = default_cache()
    for name, pieces in (("data", TRAINING), ("unseen", UNSEEN)):
        if not (folder / name).exists():
            tell(f"making synthetic EM in {folder / name}")
            _synthesize_all(folder / name, pieces)
    plan_path = folder / "plan.json"
    if not plan_path.exists():
        facts = fingerprint(folder / "data", cache)
        save(plan_here("demo", facts, probe_hardware(), {"budget_s": budget_s or BUDGET_S}), plan_path)
    plan = load_as(plan_path, Plan)
    if budget_s not in (None, plan.budget_s):
        what = f"was planned for {plan.budget_s:g} s of training, not {budget_s:g}"
        raise PlanError(plan_path, what, "leave out --budget to go on, or choose another DIR")
    planned(plan)
    outcome = train_on(plan, folder / "data", folder / "run", cache=cache, observer=observer)
    if outcome.stopped_by:
        return None
    tell("scoring a volume that the run never saw")
    scores = evaluate_run(folder / "run", folder / "unseen", cache=cache).scores
    save(scores, folder / "scores.json")
    by_threshold = threshold_baseline(folder / "data", folder / "unseen", plan, cache)
    if short := _shortfall(scores, by_threshold, plan, outcome):
        tell(f"note: {short}")
    return Demo(folder, plan, scores, by_threshold)


def _shortfall(scores: Scores, by_threshold: Mapping[str, float | None], plan: Plan, outcome: Outcome) -> str | None:
    """Return in one sentence that the network does not beat grey values, and what to do; None if it does."""
    grey = mean(list(by_threshold.values())) or 0.0
    if (scores.mean_dice or 0.0) > grey:
        return None
    what = f"the network's mean Dice of {scores.mean_dice or 0.0:.3f} does not beat the {grey:.3f} of grey values alone"
    why = f"{counted(outcome.num_steps, 'step')} in {plan.budget_s or 0:g} s are too few (a busy machine makes fewer)"
    return f"{what}: {why}; run autoseg demo OTHER-DIR with a longer --budget"


def _synthesize_all(target: Path, pieces: tuple[Piece, ...]) -> None:
    """Write the pieces into a staging folder, then rename it."""
    staging = target.with_name(f".{target.name}-new")
    shutil.rmtree(staging, ignore_errors=True)
    for piece in pieces:
        volume = synthesize(piece.shape_zyx, piece.voxel_size_nm, piece.seed)
        number = {name: ATOMS.index(name) + 1 for name in ATOMS}
        values: Mapping[str, tuple[int, ...]] = {
            name: tuple(number[atom] for atom in COMPOSITES.get(name, (name,))) for name in piece.classes
        }
        request = ImportRequest(
            data=staging,
            name=piece.name,
            em="em",
            labels="labels",
            values=values,
            voxel_size_nm=piece.voxel_size_nm,
            grid=piece.grid,
        )
        import_arrays(request, {"em": volume.em_ZYX, "labels": volume.atom_ZYX + np.uint8(1)})
    staging.rename(target)


def threshold_baseline(data: Path, unseen: Path, plan: Plan, cache: Path) -> dict[str, float | None]:
    """Return the Dice on `unseen` of the best single grey-value threshold per class, chosen on `data`.

    Either side of the threshold may be the class; this is what one gets without learning.
    """
    learnt, judged = (_grey_histograms(open_dataset(path), plan, cache) for path in (data, unseen))
    out: dict[str, float | None] = {}
    for name in plan.class_names:
        choices = [(bright, cut) for bright in (True, False) for cut in range(1, NUM_GREYS)]
        best = max(choices, key=lambda choice: ratios(_counts(learnt[name], *choice)).dice or 0.0)
        out[name] = ratios(_counts(judged[name], *best)).dice
    return out


def _grey_histograms(
    dataset: Dataset, plan: Plan, cache: Path
) -> dict[str, np.ndarray[tuple[int, int], np.dtype[np.int64]]]:
    """Return for each class the histogram of grey values where it is (absent, present), over all crops."""
    logic = Logic(dataset.table)
    columns = logic.columns(plan.class_names)
    total = {name: np.zeros((2, NUM_GREYS), dtype=np.int64) for name in plan.class_names}
    for crop in dataset.crops:
        codes = open_codes(crop, crop.grid.voxel_size_nm, cache, logic)
        states = codes.states_CK
        level = open_multiscale(crop.em).levels[0]
        offset = crop.grid.aligned_with(level.grid)
        if offset is None:
            raise DataError(crop.name, "does not lie on the voxels of its EM", "use the demo's own data")
        grey = ArrayReader(level.path, ChunkCache(0)).read(Box.whole(crop.grid.shape_zyx).shift(offset))
        joint = np.bincount(
            (codes.codes_ZYX.astype(np.intp) * NUM_GREYS + grey).ravel(), minlength=len(states) * NUM_GREYS
        ).reshape(-1, NUM_GREYS)
        for name, k in zip(plan.class_names, columns, strict=True):
            total[name] += np.stack([joint[states[:, k] == state].sum(axis=0) for state in (ABSENT, PRESENT)])
    return total


def _counts(histogram: np.ndarray[tuple[int, int], np.dtype[np.int64]], bright: bool, cut: int) -> Counts:
    inside = slice(cut, None) if bright else slice(None, cut)
    fp, tp = (int(histogram[state, inside].sum()) for state in (0, 1))
    return Counts(tp, fp, int(histogram[1].sum()) - tp)
