"""What a plan costs on this machine: its own batches and real training steps, measured; nothing is kept.

::

    batches alone, one thread ───► samples_per_s            0, 1, 2, 4 ... workers:
    steps alone, batch at hand ──► step_s                     steps with their batches ─► seconds, share waited
    two steps under the allocator► measured_memory_bytes                                 └─► recommended_workers
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import torch

from autoseg.data.dataset import open_dataset
from autoseg.errors import counted
from autoseg.limits import usable_threads
from autoseg.plan import probe_hardware, shrink
from autoseg.schema import Plan, Profile, WorkerTrial, check_plan
from autoseg.train import batches, make_step
from autoseg.train.loader import PREFETCH
from autoseg.train.loop import check_data, device_of
from autoseg.train.patches import Batch

TRIAL_S = 5.0
WARM_UP_STEPS = 2
MIN_STEPS = 4
NO_WAIT = 0.02
WORTH_A_WORKER = 0.05
MEASURED_BY = {
    "cpu": "peak of torch's CPU allocator over two steps (torch.profiler)",
    "cuda": "torch.cuda.max_memory_allocated over two steps; CUDA's context is not in it",
}
Tell = Callable[[str], None]


def profile_plan(
    plan: Plan,
    data: Path,
    cache: Path,
    *,
    device: str = "auto",
    trial_s: float = TRIAL_S,
    tell: Tell = lambda text: None,
) -> Profile:
    """Measure the plan's loader and training step on DATA; raise PlanError or DataError where `train` would.

    Of a plan for several processes it is one of them, without what the others take of the machine.
    DATA and runs are not written to; label codes go to the cache, as for every command.
    """
    check_plan(plan, plan.name)
    changes, told = shrink(plan, probe_hardware(), device)
    for line in told:
        tell(f"adapted to this machine: {line}")
    plan = msgspec.structs.replace(plan, **changes)
    check_data(plan, open_dataset(data))
    target = device_of(device, plan)
    alone, made = _rate_alone(plan, data, cache, trial_s)
    tell(f"one loader process makes {alone:.1f} patches/s")
    with _threads(plan.num_threads):
        step_s = _step_alone(plan, made, target, trial_s)
        tell(f"a step of {counted(plan.batch_size * plan.accumulate_batches, 'patch')} takes {step_s:.3f} s")
        measured = peak_bytes(lambda: _two_steps(plan, made, target), target)
        trials = list(_trials(plan, data, cache, target, trial_s))
    workers, because = recommend(plan, trials, alone, step_s)
    planned = next(trial for trial in trials if trial.num_workers == plan.num_workers)
    return Profile(
        samples_per_s=alone,
        batch_wait_fraction=planned.batch_wait_fraction,
        worker_rss_bytes=max(trial.worker_rss_bytes or 0 for trial in trials),
        step_s=step_s,
        predicted_memory_bytes=plan.predicted_memory_bytes,
        measured_memory_bytes=measured,
        measured_by=MEASURED_BY[target.type],
        num_workers=plan.num_workers,
        recommended_workers=workers,
        because=because,
        trials=tuple(trials),
    )


def worker_counts(threads: int, planned: int) -> list[int]:
    """Return the numbers of workers to try: 0, 1, then doubled up to the threads, and the planned one."""
    counts, doubled = {0, 1, planned}, 2
    while doubled <= threads:
        counts.add(doubled)
        doubled *= 2
    return sorted(counts)


def recommend(plan: Plan, trials: Sequence[WorkerTrial], samples_per_s: float, step_s: float) -> tuple[int, str]:
    """Return the fewest workers whose step is within 5 % of the quickest one, and why."""
    quickest = min(trial.step_s for trial in trials)
    chosen = min((t for t in trials if t.step_s <= quickest * (1 + WORTH_A_WORKER)), key=lambda t: t.num_workers)
    patches = plan.batch_size * plan.accumulate_batches
    because = (
        f"one process makes {samples_per_s:.1f} patches/s, the step alone takes {patches / step_s:.1f}; "
        f"with {_workers(chosen.num_workers)} a step and its batch take {chosen.step_s:.3f} s, "
        f"{chosen.batch_wait_fraction:.0%} of it waiting"
    )
    fewer = [t for t in trials if t.num_workers < chosen.num_workers]
    more = [t for t in trials if t.num_workers > chosen.num_workers]
    if fewer:
        because += f"; with {_workers(fewer[-1].num_workers)} {fewer[-1].step_s:.3f} s"
    if more:
        best = min(more, key=lambda t: t.step_s)
        gain = f"gain less than {WORTH_A_WORKER:.0%}" if best.step_s < chosen.step_s else "gain nothing"
        because += f"; more {gain} ({_workers(best.num_workers)}: {best.step_s:.3f} s)"
    return chosen.num_workers, f"{because}; {counted(usable_threads(), 'thread')}"


def _workers(number: int) -> str:
    return "no worker" if number == 0 else counted(number, "worker")


def _rate_alone(plan: Plan, data: Path, cache: Path, trial_s: float) -> tuple[float, list[Batch]]:
    """Return (patches a second of this process with one thread, as a worker has; the last batches)."""
    source = batches(msgspec.structs.replace(plan, num_workers=0), data, cache=cache)
    made: list[Batch] = []
    with _threads(1):
        for _ in range(WARM_UP_STEPS):
            next(source)
        start, number = time.perf_counter(), 0
        while number < MIN_STEPS or time.perf_counter() - start < trial_s:
            made = [*made[-1:], next(source)]
            number += len(made[-1].image_BCZYX)
        return number / (time.perf_counter() - start), made


def _step_alone(plan: Plan, made: Sequence[Batch], device: torch.device, trial_s: float) -> float:
    """Return the seconds of an optimizer step whose batch is at hand."""
    step = make_step(plan, device)
    for _ in range(WARM_UP_STEPS):
        step(made[0])
    start, number = time.perf_counter(), 0
    while number < MIN_STEPS or time.perf_counter() - start < trial_s:
        step(made[number % len(made)])
        number += 1
    return (time.perf_counter() - start) / number


def _two_steps(plan: Plan, made: Sequence[Batch], device: torch.device) -> None:
    step = make_step(plan, device)  # the second step finds the optimizer's moments, as every later one does
    for number in range(2):
        step(made[number % len(made)])


def peak_bytes(action: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that torch's allocator of that device held at once, of what the action made."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on start and stop are not for the user
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory(prefix="autoseg-profile-") as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    return max((int(e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]"), default=0)


def _trials(plan: Plan, data: Path, cache: Path, device: torch.device, trial_s: float) -> Iterator[WorkerTrial]:
    """Yield a trial for each number of workers until nothing waits any more; the planned number is among them."""
    for number in worker_counts(usable_threads() // plan.num_processes, plan.num_workers):
        trial = _trial(msgspec.structs.replace(plan, num_workers=number), data, cache, device, trial_s)
        yield trial
        if number >= max(1, plan.num_workers) and trial.batch_wait_fraction < NO_WAIT:
            return


def _trial(plan: Plan, data: Path, cache: Path, device: torch.device, trial_s: float) -> WorkerTrial:
    """Train with the plan's workers on a throw-away network."""
    step, source = make_step(plan, device), batches(plan, data, cache=cache)
    queued = plan.num_workers * (PREFETCH + 1)  # batches made before the clock starts say nothing about the loader
    others = {process.pid for process in psutil.Process().children()}
    for _ in range(WARM_UP_STEPS + queued):
        step(next(source))
    start, waited, number = time.perf_counter(), 0.0, 0
    while number < MIN_STEPS + queued or time.perf_counter() - start < trial_s:
        before = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - before
        step(batch)
        number += 1
    elapsed = time.perf_counter() - start
    workers = [process for process in psutil.Process().children() if process.pid not in others]
    largest = max((process.memory_info().rss for process in workers), default=0)
    return WorkerTrial(
        num_workers=plan.num_workers,
        step_s=elapsed / number,
        batch_wait_fraction=waited / elapsed,
        worker_rss_bytes=largest if plan.num_workers else None,
    )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
