"""A plan for the machine at hand: planned, tried for a second on random voxels, and planned again with that speed.

::

    facts, machine ──► plan ──► a few steps of its network ──► Gflop/s into the machine's record ──► plan

So what a step takes is measured on the very network, and a plan stays a function of its records.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from autoseg.plan import Evidence, cost_of, make_plan
from autoseg.schema import Fingerprint, Hardware, Plan
from autoseg.train import make_step
from autoseg.train.patches import Batch

TRIAL_S = 1.0
LEAST_STEPS = 2
FIRST_STEPS = 5  # the first may take that many times the trial, and others still follow
NUM_CODES = 16


def plan_here(
    name: str,
    facts: Fingerprint,
    hardware: Hardware,
    settings: Mapping[str, Any],
    evidence: Evidence | None = None,
    *,
    runs_on_one: int = 1,
) -> Plan:
    """Return the plan for the machine at hand, whose record then holds the speed of the plan's own steps.

    Of a device that computes several runs each has a part. Where the step does not run, for want of memory, its speed
    stays unknown.
    """
    plan = make_plan(name, facts, hardware, settings, evidence)
    if plan.device == "cuda" and not torch.cuda.is_available():
        return plan
    try:
        speeds = {plan.precision: measure_step_gflops(plan) / runs_on_one}
    except torch.OutOfMemoryError:
        return plan
    return make_plan(name, facts, msgspec.structs.replace(hardware, step_gflops=speeds), settings, evidence)


def measure_step_gflops(plan: Plan) -> float:
    """Return operations per second of training steps of a plan on its device, one micro-batch of random voxels each."""
    before = torch.get_num_threads()
    torch.set_num_threads(plan.num_threads)
    try:
        step_s = _step_seconds(plan)
    finally:
        torch.set_num_threads(before)
    return plan.batch_size * cost_of(plan).patch_flops / step_s / 1e9


def _step_seconds(plan: Plan) -> float:
    """Return the least seconds of a step after the first, which prepares much; of the first if it took too long.

    Other processes only ever make a step longer.
    """
    step, batch, times = make_step(plan, plan.device), _random_batch(plan), list[float]()
    began = time.perf_counter()
    while len(times) < LEAST_STEPS + 1 or time.perf_counter() - began < TRIAL_S:
        start = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - start)
        if times[0] > FIRST_STEPS * TRIAL_S:
            return times[0]
    return min(times[1:])


def _random_batch(plan: Plan) -> Batch:
    generator = torch.Generator().manual_seed(plan.seed)
    shape = (plan.batch_size, *plan.patch_size_zyx)
    image = torch.randn((shape[0], plan.input_slices, *shape[1:]), generator=generator)
    codes = torch.randint(0, NUM_CODES, shape, generator=generator, dtype=torch.uint8)
    states = torch.randint(0, 3, (NUM_CODES, len(plan.classes)), generator=generator, dtype=torch.uint8)
    return Batch(image, codes, states)
