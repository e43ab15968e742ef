"""A plan on a smaller machine than it was made for: what must shrink so that it runs, and nothing else.

The patches of an optimizer step stay as many: micro-batches get smaller and more. Patch, network and loss stay, too,
since another patch is another plan.
"""

from __future__ import annotations

import math
from typing import Any

from autoseg.errors import PlanError
from autoseg.model.memory import trace_step
from autoseg.plan.rules_machine import GIB, room_on, workers_on
from autoseg.schema import Hardware, Plan


def shrink(plan: Plan, hardware: Hardware, device: str) -> tuple[dict[str, Any], list[str]]:
    """Return what changes on that machine, by field, and why; nothing where the plan fits as it is.

    `device` is "auto" or a device of torch. PlanError where not even one patch fits.
    """
    changes: dict[str, Any] = {}
    because: list[str] = []

    def change(field: str, value: Any, why: str) -> None:
        changes[field] = value
        because.append(f"{field} {getattr(plan, field)} -> {value}: {why}")

    kind = plan.device if device == "auto" else device.split(":", maxsplit=1)[0]
    if kind == "cuda" and device == "auto" and not hardware.gpus:
        kind = "cpu"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not hardware.gpus):
        return {}, []  # a device that is not there, which training refuses
    if kind != plan.device:
        change("device", kind, f"{hardware.name} has no GPU" if not hardware.gpus else f"--device {device}")
    precision = _precision(plan, hardware, kind)
    if precision != plan.precision:
        change("precision", precision, f"the {kind.upper()} here has no {plan.precision}")
    _fit_memory(plan, hardware, kind, precision, change)
    _fit_processes(plan, hardware, kind, change)
    return changes, because


def _fit_processes(plan: Plan, hardware: Hardware, kind: str, change: Any) -> None:
    """Give a CPU all its threads and no workers; else no more of either than the machine has."""
    if kind == "cpu" != plan.device:
        change("num_threads", hardware.cpu_threads, "the CPU computes")
        change("num_workers", 0, "a worker would take its thread from the network")
        return
    if plan.num_threads > hardware.cpu_threads:
        change("num_threads", hardware.cpu_threads, f"{hardware.name} has {hardware.cpu_threads}")
    batch_bytes = 4 * math.prod(plan.patch_size_zyx) * plan.batch_size * plan.accumulate_batches
    workers, why = workers_on(hardware, batch_bytes * (plan.input_slices + 1))
    if plan.num_workers > workers and _smaller(hardware, plan.hardware):  # on its own machine they were chosen
        change("num_workers", workers, why)


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
    here, there = hardware.gpus[0], plan.hardware.gpus[:1]
    if plan.precision == "bf16" and not here.bf16 and all(gpu.bf16 for gpu in there):
        return "fp16" if here.fp16 else "fp32"
    return plan.precision


def _fit_memory(plan: Plan, hardware: Hardware, kind: str, precision: str, change: Any) -> None:
    """Split an optimizer step into micro-batches that fit."""
    room, name = room_on(hardware, kind)
    if plan.predicted_memory_bytes <= room and (kind, precision) == (plan.device, plan.precision):
        return
    cost = trace_step(plan.network, plan.input_slices, len(plan.classes), plan.patch_size_zyx, precision, plan.loss)
    patches = plan.batch_size * plan.accumulate_batches
    sizes = [n for n in range(plan.batch_size, 0, -1) if patches % n == 0]
    batch = next((n for n in sizes if cost.memory_bytes(n, kind) <= room), None)
    if batch is None:
        need = cost.memory_bytes(1, kind) / GIB
        what = f"one patch of {list(plan.patch_size_zyx)} needs {need:.1f} GiB of {room / GIB:.1f} GiB of {name}"
        raise PlanError(plan.name, what, "plan for this machine: autoseg plan DATA")
    if batch < plan.batch_size:
        need = cost.memory_bytes(plan.batch_size, kind) / GIB
        why = f"{plan.batch_size} patches need {need:.1f} GiB, {room / GIB:.1f} GiB of {name} may be used"
        change("batch_size", batch, why)
        change("accumulate_batches", patches // batch, f"so that a step still has {patches} patches")
