"""A plan on a smaller machine than it was made for: what must shrink so that it runs, and nothing else.

The patches of an optimizer step stay as many: micro-batches get smaller and more, in fewer processes. Patch, network
and loss stay, too, since another patch is another plan.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from autoseg.errors import PlanError, counted
from autoseg.model.memory import trace_step
from autoseg.plan.cards import explain_cards, leading
from autoseg.plan.rules_machine import GIB, room_on, workers_on
from autoseg.schema import Gpu, Hardware, Plan


def shrink(plan: Plan, hardware: Hardware, device: str, started: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return what changes on that machine, by field, and why; nothing where the plan fits as it is.

    `device` is "auto" or a device of torch; `started` is how many processes torchrun has started, on all machines.
    PlanError where not even one patch fits, or where a step cannot be shared by those processes.
    """
    changes: dict[str, Any] = {}
    because: list[str] = []

    def change(field: str, value: Any, why: str) -> None:
        changes[field] = value
        because.append(f"{field} {getattr(plan, field)} -> {value}: {why}")

    kind = plan.device if device == "auto" else device.split(":", maxsplit=1)[0]
    if kind == "cuda" and device == "auto" and not hardware.gpus:
        kind = "cpu"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not _cards(hardware, device, 1)):
        return {}, []  # a device that is not there, which training refuses
    if kind != plan.device:
        change("device", kind, f"{hardware.name} has no GPU" if not hardware.gpus else f"--device {device}")
    processes, why = _processes(plan, hardware, kind, device, started)
    hardware = msgspec.structs.replace(hardware, gpus=_cards(hardware, device, processes))
    precision = _precision(plan, hardware, kind)
    if precision != plan.precision:
        change("precision", precision, f"the {kind.upper()} here has no {plan.precision}")
    if processes != plan.num_processes:
        change("num_processes", processes, why)
    _fit_memory(plan, hardware, kind, precision, processes, change)
    _fit_host(plan, hardware, kind, processes, change)
    return changes, because


def _processes(plan: Plan, hardware: Hardware, kind: str, device: str, started: int | None) -> tuple[int, str]:
    """Return how many processes can share the patches of a step here, no more than planned, and what limits them."""
    patches = plan.patches_per_step
    if started:
        if started > 1 and kind == "cpu" and plan.network.norm == "batch":
            what = f"{started} processes on the CPU would each have batch norm statistics of their own"
            raise PlanError("torchrun", what, "start one, or plan with --set network.norm=group")
        if patches % started:
            fitting = [str(n) for n in range(1, patches + 1) if patches % n == 0]
            what = f"{counted(started, 'process')} cannot share the {counted(patches, 'patch')} of a step evenly"
            raise PlanError("torchrun", what, f"start one of {', '.join(fitting)}")
        return started, f"torchrun started {started}"
    if kind == "cpu":
        return (plan.num_processes, "") if plan.device == "cpu" else (1, "one process uses all threads of a CPU")
    if ":" in device:
        return 1, f"--device {device} is one"
    there = hardware.gpus[: plan.num_processes]
    together, limit = len(there), f"{hardware.name} has {counted(len(hardware.gpus), 'GPU')}"
    if there and _chosen(plan) and leading(there) < together:
        together, limit = leading(there), explain_cards(there)
    number = next(n for n in range(together, 0, -1) if patches % n == 0)
    even = "" if number == together else f", and {number} share {counted(patches, 'patch')} evenly"
    return number, limit + even


def _chosen(plan: Plan) -> bool:
    """Return whether the planner would let these GPUs train together, too, rather than the user alone."""
    planned = plan.hardware.gpus[: plan.num_processes]
    return len(planned) == plan.num_processes == leading(planned)


def _cards(hardware: Hardware, device: str, processes: int) -> tuple[Gpu, ...]:
    """Return the GPUs of this machine that so many processes train on; a device with a number is one of them."""
    number = device.partition(":")[2]
    if number and processes == 1:
        return hardware.gpus[int(number) :][:1] if number.isdecimal() else ()
    return hardware.gpus[:processes]


def _fit_host(plan: Plan, hardware: Hardware, kind: str, processes: int, change: Any) -> None:
    """Give a CPU all its threads and no workers; else no more of either than the machine has for its processes."""
    local = min(processes, max(1, len(hardware.gpus))) if kind == "cuda" else processes
    threads = max(1, hardware.cpu_threads // local)
    if kind == "cpu" != plan.device:
        change("num_threads", threads, "the CPU computes")
        change("num_workers", 0, "a worker would take its thread from the network")
        return
    batch_bytes = 4 * math.prod(plan.patch_size_zyx) * (plan.patches_per_step // processes)
    workers, why = workers_on(hardware, batch_bytes * (plan.input_slices + 1), local)
    tighter = _smaller(hardware, plan.hardware) or local > plan.num_processes  # on its own machine they were chosen
    if tighter and plan.num_workers > workers:
        change("num_workers", workers, why)
    workers = min(plan.num_workers, workers) if tighter else 0
    threads = max(1, hardware.cpu_threads // local - workers)
    if plan.num_threads > threads:
        shared = f", {local} processes share them" if local > 1 else ""
        beside = f", {counted(workers, 'worker')} of each among them" if workers else ""
        change("num_threads", threads, f"{hardware.name} has {hardware.cpu_threads}{shared}{beside}")


def _smaller(hardware: Hardware, planned: Hardware) -> bool:
    """Return whether a machine has less than the planned one of what loader processes need."""
    pairs = ((hardware.cpu_threads, planned.cpu_threads), (hardware.ram_bytes, planned.ram_bytes))
    return any(here < there for here, there in (*pairs, (hardware.shm_bytes, planned.shm_bytes)))


def _precision(plan: Plan, hardware: Hardware, kind: str) -> str:
    """Return the number format nearest to the planned one that the device computes in natively.

    What the user chose for a device without it stays on such a device.
    """
    if plan.precision == "fp32":
        return "fp32"
    if kind == "cpu":
        chosen = plan.device == "cpu" and not plan.hardware.cpu_bf16
        return plan.precision if chosen else "bf16" if hardware.cpu_bf16 else "fp32"
    here, there = hardware.gpus, plan.hardware.gpus[: plan.num_processes]
    if plan.precision == "bf16" and not all(gpu.bf16 for gpu in here) and all(gpu.bf16 for gpu in there):
        return "fp16" if all(gpu.fp16 for gpu in here) else "fp32"
    return plan.precision


def _fit_memory(plan: Plan, hardware: Hardware, kind: str, precision: str, processes: int, change: Any) -> None:
    """Split each process's share of an optimizer step into micro-batches that fit."""
    share = plan.patches_per_step // processes
    batch, why = next(n for n in range(plan.batch_size, 0, -1) if share % n == 0), "each process has fewer patches"
    room, name = room_on(hardware, kind, processes)
    if plan.predicted_memory_bytes > room or (kind, precision) != (plan.device, plan.precision):
        cost = trace_step(plan.network, plan.input_slices, len(plan.classes), plan.patch_size_zyx, precision, plan.loss)
        sizes = [n for n in range(batch, 0, -1) if share % n == 0 and cost.memory_bytes(n, kind) <= room]
        if not sizes:
            need = cost.memory_bytes(1, kind) / GIB
            what = f"one patch of {list(plan.patch_size_zyx)} needs {need:.1f} GiB of {room / GIB:.1f} GiB of {name}"
            raise PlanError(plan.name, what, "plan for this machine: autoseg plan DATA")
        if sizes[0] < batch:
            need = cost.memory_bytes(plan.batch_size, kind) / GIB
            why = f"{plan.batch_size} patches need {need:.1f} GiB, {room / GIB:.1f} GiB of {name} may be used"
        batch = sizes[0]
    if batch != plan.batch_size:
        change("batch_size", batch, why)
    if share // batch != plan.accumulate_batches:
        still = f"so that a step still has {counted(plan.patches_per_step, 'patch')}"
        change("accumulate_batches", share // batch, still)
