"""SPEC + DATA -> a run for each change and seed, and their ranking; what is finished is kept, the same command goes on.

::

    base + change + seed ─► DIR/plans/NAME-SEED.json ─► DIR/runs/NAME-SEED/ ─► its scores.json ─┐
    base + change + seed ─► ...             one process a run, as many at once as there are     ├─► DIR/ranking.json
                                            devices (or, on a CPU, threads and RAM)             ┘   DIR/best_plan.json
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from autoseg.errors import AutosegError, PlanError, counted
from autoseg.model import checkpoint
from autoseg.plan import make_plan, parse_settings, share_hardware
from autoseg.recipes.ranking import Finished, rank
from autoseg.schema import CompareSpec, Fingerprint, Hardware, Plan, Ranking, Scores, decode, load_as, save

QUICK: dict[str, Any] = {"optimizer.num_steps": 150, "validation.num_rounds": 1}
KILL_AFTER_S = 120.0
CLASSES = "classes"

Tell = Callable[[str], None]


class Job(NamedTuple):
    """One run of a change."""

    change: str
    seed: int
    plan: Plan
    folder: Path

    @property
    def name(self) -> str:
        """Return the name of its plan and run."""
        return f"{self.change}-{self.seed}"

    @property
    def run(self) -> Path:
        """Return its run."""
        return self.folder / "runs" / self.name

    @property
    def scores(self) -> Path:
        """Return where its scores lie once it is finished."""
        return self.folder / "scores" / f"{self.name}.json"


class Ground(NamedTuple):
    """What all runs of a comparison share; without `judge` they are scored on what validates in `data`."""

    data: Path
    facts: Fingerprint
    hardware: Hardware
    judge: Path | None = None
    cache: Path | None = None


def compare(
    spec: CompareSpec,
    on: Ground,
    folder: Path,
    *,
    quick: bool = False,
    at_once: int | None = None,
    tell: Tell = lambda text: None,
) -> Ranking:
    """Run what is not yet finished, write ranking.json and best_plan.json into `folder`, and return the ranking.

    `quick` runs one seed for a few steps, into a folder of its own: does every change run and learn? PlanError before
    anything runs where a change makes no plan, or the folder holds other plans of these names.
    """
    check_spec(spec)
    folder = folder / "quick" if quick else folder
    slots = at_once or slots_on(on.hardware)
    jobs = _jobs(spec, on.facts, share_hardware(on.hardware, slots), folder, quick=quick)
    for job in jobs:
        _claim(job)
    left = [job for job in jobs if not job.scores.is_file()]
    before = f"{len(jobs) - len(left)} finished before"
    tell(f"{counted(len(jobs), 'run')} of {counted(len(spec.changes), 'change')}, {before}; {slots} at once")
    failed = _run_all(left, _devices(on.hardware, slots), on, tell)
    done = [_finished(job) for job in jobs if job.scores.is_file()]
    ranking = rank(spec, done, failed)
    save(ranking, folder / "ranking.json")
    if ranking.best:
        settings = _settings(spec.base, *(c.set for c in spec.changes if c.name in ranking.best))
        save(make_plan("best_plan", on.facts, on.hardware, settings), folder / "best_plan.json")
    return ranking


def check_spec(spec: CompareSpec) -> None:
    """Raise PlanError for a spec of which no comparison can be made."""
    names = [change.name for change in spec.changes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError("changes", f"{twice[0]} is there twice", "give each change a name of its own")
    odd = [name for name in names if not name.replace("-", "").replace("_", "").replace(".", "").isalnum()]
    if odd or not names:
        raise PlanError("changes", f"name {odd[0]!r}" if odd else "is empty", "use letters, digits, '-', '_' and '.'")
    if not spec.seeds or len(set(spec.seeds)) < len(spec.seeds):
        raise PlanError("seeds", f"{list(spec.seeds)}", "give different seeds, three or more to rank by")


def slots_on(hardware: Hardware) -> int:
    """Return how many runs go side by side: one on each GPU; on a CPU one on each thread, within RAM.

    Two runs of a thread each do a fifth more steps than one after the other with two (VNC, two cores, bf16).
    """
    if hardware.gpus:
        return len(hardware.gpus)
    return max(1, min(hardware.cpu_threads, hardware.ram_bytes // (3 * 2**30)))


def _devices(hardware: Hardware, slots: int) -> list[str]:
    number = len(hardware.gpus)
    return [f"cuda:{i % number}" for i in range(slots)] if number else ["cpu"] * slots


def _jobs(spec: CompareSpec, facts: Fingerprint, share: Hardware, folder: Path, *, quick: bool) -> list[Job]:
    """Return all runs, seed by seed, so that every change has run once before any runs twice."""
    jobs = []
    for seed in spec.seeds[:1] if quick else spec.seeds:
        for change in spec.changes:
            settings = _settings(spec.base, change.set) | {"seed": seed} | (QUICK if quick else {})
            if quick:
                settings.pop("budget_s", None)
            try:
                plan = make_plan(f"{change.name}-{seed}", facts, share, settings)
            except PlanError as error:
                raise PlanError(f"change {change.name}: {error.where}", error.what, error.remedy) from None
            jobs.append(Job(change.name, seed, plan, folder))
    return jobs


def _settings(*layers: dict[str, Any]) -> dict[str, Any]:
    """Return typed values by dotted field of values as JSON holds them; later layers win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    classes = merged.pop(CLASSES, None)
    settings = parse_settings([f"{field}={json.dumps(value)}" for field, value in merged.items()])
    if classes is not None:
        settings["classes.names"] = classes.split(",") if isinstance(classes, str) else list(classes)
    return settings


def _claim(job: Job) -> None:
    """Write the plan of a run, or find it there; its hardware record alone may differ."""
    path = job.folder / "plans" / f"{job.name}.json"
    if not path.exists():
        save(job.plan, path)
        return
    before = load_as(path, Plan)
    if _decisions(before) != _decisions(job.plan):
        what = f"holds another plan of {job.name} than this SPEC, DATA and machine make"
        raise PlanError(job.folder, what, "choose another --out, or remove it")


def _decisions(plan: Plan) -> dict[str, Any]:
    tree: dict[str, Any] = msgspec.to_builtins(plan)
    return {name: value for name, value in tree.items() if name not in ("hardware", "reasons", "predicted_step_s")}


def _run_all(jobs: Sequence[Job], devices: list[str], on: Ground, tell: Tell) -> dict[str, str]:
    """Run the jobs, as many at once as there are devices; return those that failed, with their last line."""
    free: queue.Queue[str] = queue.Queue()
    for device in devices:
        free.put(device)
    running: set[subprocess.Popen[str]] = set()
    failed: dict[str, str] = {}

    def work(job: Job) -> None:
        device = free.get()
        try:
            for command in _commands(job, device, on):
                code, last = _call(command, running)
                if code:
                    failed[job.name] = last
                    tell(f"{job.name} failed: {last}")
                    return
            tell(f"{job.name}: mean Dice {_dice_text(load_as(job.scores, Scores).mean_dice)}")
        finally:
            free.put(device)

    pool = ThreadPoolExecutor(len(devices))
    try:
        for future in [pool.submit(work, job) for job in jobs]:
            future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()  # a training saves its checkpoint
        for process in list(running):
            process.wait(KILL_AFTER_S)
        raise
    pool.shutdown()
    return failed


def _commands(job: Job, device: str, on: Ground) -> Iterator[list[str]]:
    program = [sys.executable, "-m", "autoseg.cli"]
    rest = ["--device", device, "--quiet", *(["--cache", str(on.cache)] if on.cache else [])]
    plan = str(job.folder / "plans" / f"{job.name}.json")
    yield [*program, "train", "--plan", plan, "--data", str(on.data), "--run", str(job.run), *rest]
    judged = ["--data", str(on.judge or on.data), "--out", str(job.scores)]
    yield [*program, "evaluate", "--run", str(job.run), *judged, *rest]


def _call(command: list[str], running: set[subprocess.Popen[str]]) -> tuple[int, str]:
    """Run a command; return its exit code and the last line that it said on stderr."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        running.add(process)
        try:
            _, said = process.communicate()
        finally:
            running.discard(process)
    lines = said.strip().splitlines()
    return process.returncode, lines[-1] if lines else f"exit code {process.returncode}"


def _finished(job: Job) -> Finished:
    try:
        best: int | None = checkpoint.verify(checkpoint.find(job.run / "checkpoints", "best")).step
    except AutosegError:
        best = None
    plan = load_as(job.folder / "plans" / f"{job.name}.json", Plan)
    return Finished(job.change, job.seed, plan, load_as(job.scores, Scores), best)


def _dice_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def read_spec(path: Path) -> CompareSpec:
    """Return the comparison that a JSON file describes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(path, error.strerror or "cannot be read", "check the path") from None
    spec: CompareSpec = decode(content, CompareSpec, path)
    return spec
