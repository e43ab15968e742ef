"""Rules that ask what fits the machine: time, batch, threads, workers, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

from autoseg.errors import PlanError, counted
from autoseg.geometry import VoxelsZYX
from autoseg.model.memory import StepCost, trace_step
from autoseg.plan.cards import explain_cards, held_bytes, leading, usable_bytes_of
from autoseg.plan.draft import Choice, Draft
from autoseg.schema import Gpu, Hardware, Loss, Network, Plan

GIB = 2**30
RAM_SHARE, MOST_RAM_SHARE = 0.6, 0.9  # of a step or of workers; of all together
BASE_PROCESS_BYTES, USUAL_PROCESS_BYTES = int(0.7 * GIB), int(1.2 * GIB)  # alone; with 30 M parameters to store
WORKER_BYTES = int(0.6 * GIB)
BATCHES_IN_FLIGHT = 3
MAX_WORKERS, MAX_FEEDING = 8, 8
CHECKPOINTS, STORED_TENSORS = 4, 4  # last, previous, best and the one being written; weights, average and moments
MOST_VOXELS, MOST_PATCHES = {True: 32 * 256**2, False: 4 * 192**3}, 128  # on a GPU, at once; flat, solid
MIN_STEPS = 400  # on a CPU, batches of 8 are halved rather than take fewer
# Of a step; measured on VNC, two CPU cores: 6 to 8 % (one thread, bf16), without workers.
DATA_SHARE = 0.07
DEFAULT_BUDGET_S = {"cpu": 1800.0, "cuda": 6 * 3600.0}


def choose_num_processes(draft: Draft) -> Choice:
    """Return the training processes: one for each of the first GPUs that are alike and as free, one on a CPU."""
    hardware, asked = draft.hardware, draft.settings.get("num_processes", 1)
    if asked * BASE_PROCESS_BYTES > hardware.ram_bytes * MOST_RAM_SHARE and asked > 1:
        what = (
            f"{asked} of {BASE_PROCESS_BYTES / GIB:.1f} GiB each, and there are {hardware.ram_bytes / GIB:.1f} of RAM"
        )
        most = max(1, int(hardware.ram_bytes * MOST_RAM_SHARE // USUAL_PROCESS_BYTES))
        raise PlanError("num_processes", what, f"--set num_processes={most} fits")
    if draft["device"] == "cpu":
        return Choice(1, f"one process uses all of {counted(hardware.cpu_threads, 'thread')}", "hardware")
    cards, because = leading(hardware.gpus), explain_cards(hardware.gpus)
    number = max(1, min(cards, hardware.cpu_threads, int(hardware.ram_bytes * RAM_SHARE // USUAL_PROCESS_BYTES)))
    if number < cards:
        because += f"; {counted(hardware.cpu_threads, 'thread')} and {hardware.ram_bytes / GIB:.1f} GiB of RAM feed "
        because += f"{number}"
    return Choice(number, because, "hardware")


def choose_batch_size(draft: Draft) -> Choice:
    """Return the largest useful micro-batch that the memory model says fits."""
    flat = draft["patch_size_zyx"][0] == 1
    cost = step_cost(draft)
    wanted, most = _useful_batch(draft, flat)
    room, name = usable_bytes(draft)
    batch = wanted
    while batch > 1 and cost.memory_bytes(batch, draft["device"]) > room:
        batch -= 1
    need = cost.memory_bytes(batch, draft["device"])
    if need > room:
        patch = list(draft["patch_size_zyx"])
        what = f"one patch of {patch} needs {need / GIB:.1f} GiB of {room / GIB:.1f} GiB of {name}"
        raise PlanError("batch_size", what, _nearest_that_fits(draft, room))
    because = (
        f"{counted(batch, 'patch', 'take')} {need / GIB:.2f} GiB of the {room / GIB:.1f} GiB of {name} that may be used"
    )
    return Choice(batch, because + ("" if batch < wanted else f"; {most}"), "traced step")


def _nearest_that_fits(draft: Draft, room: int) -> str:
    """Return what would fit: the patch, halved along its longest edges, else narrower levels too, else more memory.

    No edge gets so short that the network would lose a level.
    """
    steps = [math.prod(stride[axis] for stride in draft["network.strides_zyx"]) for axis in range(3)]
    patch, features, need = list(draft["patch_size_zyx"]), draft["network.features"], 0
    while True:
        halved = [n // 2 if n == max(patch) else n for n in patch]
        smaller = [h if h % s == 0 and h >= 4 * s > 4 else n for n, h, s in zip(patch, halved, steps, strict=True)]
        if smaller == patch:
            if max(features) == 1:
                return f"nothing smaller does: it takes a machine with {need / GIB:.1f} GiB to spare"
            features = tuple(max(1, n // 2) for n in features)
        patch = smaller
        need = _patch_cost(draft, patch, features).memory_bytes(1, draft["device"])
        if need <= room:
            narrower = f" --set network.features={_commas(features)}" if features != draft["network.features"] else ""
            return f"--set patch_size_zyx={_commas(patch)}{narrower} fits, with {need / GIB:.2f} GiB"


def _commas(numbers: Sequence[int]) -> str:
    return ",".join(str(n) for n in numbers)


def _useful_batch(draft: Draft, flat: bool) -> tuple[int, str]:
    """Return the largest batch worth its time, and why no larger one is."""
    if draft["device"] != "cpu":
        most = max_batch(draft["patch_size_zyx"])
        like = "32 of 256x256" if flat else "4 of 192x192x192"
        return most, f"more than {most} would not help: as many voxels as {like}, an unmeasured limit"
    wanted = max(1, round(8 * 128 * 128 / math.prod(draft["patch_size_zyx"]))) if flat else 2
    processes = draft["num_processes"]  # that share the CPU, and the patches of a step
    step_s = (_step_seconds(draft, 1) or 0.0) * wanted / processes
    if flat and step_s and draft["budget_s"] and wanted > 4 and draft["budget_s"] / step_s < MIN_STEPS:
        steps = draft["budget_s"] / step_s
        few = f"{wanted} would leave {counted(round(steps), 'step')} in {draft['budget_s']:g} s"
        return max(1, 4 // processes), f"{few} (demo, 80 s, one run each, noise unknown: .62 with 8, .65 with 4)"
    return max(1, wanted // processes), f"more than {wanted} would not help"


def max_batch(patch_zyx: VoxelsZYX) -> int:
    """Return the largest micro-batch of a GPU that is worth its time."""
    return min(MOST_PATCHES, max(2, MOST_VOXELS[patch_zyx[0] == 1] // math.prod(patch_zyx)))


def usable_bytes(draft: Draft) -> tuple[int, str]:
    """Return the bytes that a training step may take, and of what."""
    return room_on(draft.hardware, draft["device"], draft["num_processes"])


def room_on(hardware: Hardware, device: str, num_processes: int = 1) -> tuple[int, str]:
    """Return the bytes that a training step of one process may take on that device of a machine, and of what."""
    if device == "cpu":
        shared = f", shared by {num_processes} processes" if num_processes > 1 else ""
        rest = hardware.ram_bytes * MOST_RAM_SHARE - num_processes * BASE_PROCESS_BYTES
        return int(max(0.0, min(hardware.ram_bytes * RAM_SHARE, rest)) / num_processes), f"RAM{shared}"
    return min(_room_on_gpu(gpu) for gpu in hardware.gpus[:num_processes])


def _room_on_gpu(gpu: Gpu) -> tuple[int, str]:
    held = held_bytes(gpu)
    others = f" beside the {held / GIB:.1f} GiB of other processes" if held else ""
    return usable_bytes_of(gpu), f"GPU memory{others}"


def choose_accumulate(draft: Draft) -> Choice:
    """Return how many micro-batches make one optimizer step."""
    wanted = 2 if draft["patch_size_zyx"][0] > 1 else 4
    batch, processes = draft["batch_size"], draft["num_processes"]
    number = max(1, math.ceil(wanted / (batch * processes)))
    because = f"{counted(number * batch * processes, 'patch')} a step (at least {wanted}), {batch} at once"
    because += f" in each of {processes} processes" if processes > 1 else ""
    return Choice(number, because, "effective batch")


def choose_num_threads(draft: Draft) -> Choice:
    """Return the threads of one training process: what loader processes leave, and no more than feed a GPU."""
    there, processes, workers = draft.hardware.cpu_threads, draft["num_processes"], draft["num_workers"]
    most, asked = max(1, there // processes), draft.settings.get("num_threads", 1)
    if asked > most:
        what = f"{asked} in each of {counted(processes, 'process')}, and {draft.hardware.name} has {there}"
        raise PlanError("num_threads", what, f"--set num_threads={most} fits")
    threads = max(1, (there - processes * workers) // processes)
    shared = f", shared by {processes} processes" if processes > 1 else ""
    left = f", {threads} beside {counted(workers, 'worker')}" if workers else ""
    left += " of each" if workers and processes > 1 else ""
    if draft["device"] == "cpu":
        because = f"all of the {counted(there, 'thread')} this process may use{shared}{left}"
        return Choice(threads, because, "hardware")
    because = f"{counted(there, 'thread')}{shared}{left}; the GPU computes, at most {MAX_FEEDING} feed it"
    return Choice(min(threads, MAX_FEEDING), because, "hardware")


def choose_num_workers(draft: Draft) -> Choice:
    """Return the loader processes of one training process."""
    if draft["device"] == "cpu":
        return Choice(
            0, "a batch costs 6 to 21 % of a step: a worker would take its thread from the network", "measured, CPU"
        )
    threads = draft.settings.get("num_threads", 1)
    workers, because = workers_on(draft.hardware, _batch_bytes(draft), draft["num_processes"], threads)
    return Choice(workers, because, "hardware")


def _batch_bytes(draft: Draft) -> int:
    """Return the bytes of the batch of a step of one process."""
    voxels = math.prod(draft["patch_size_zyx"]) * draft["batch_size"] * draft["accumulate_batches"]
    return 4 * int(voxels) * (int(draft["input_slices"]) + 1)


def workers_on(hardware: Hardware, batch_bytes: int, num_processes: int = 1, threads: int = 1) -> tuple[int, str]:
    """Return how many loader processes a machine has room for beside a GPU, for each training process, and why.

    `threads` are those that a training process needs at least itself.

    Threads, RAM and /dev/shm are shared by all of them: four of five processes each once filled 120 GB.
    """
    ram = hardware.ram_bytes * RAM_SHARE / 2 - (num_processes - 1) * BASE_PROCESS_BYTES
    by_ram = max(0, int(ram // _worker_bytes(batch_bytes)))
    by_shm = int(hardware.shm_bytes // (BATCHES_IN_FLIGHT * batch_bytes))
    by_threads = min((hardware.cpu_threads - 1) // num_processes - 1, hardware.cpu_threads // num_processes - threads)
    workers = max(0, min(MAX_WORKERS, by_threads, by_ram // num_processes, by_shm // num_processes))
    kept = f", {threads} of them for each training process" if threads > 1 else ""
    because = f"{counted(hardware.cpu_threads, 'thread')}{kept}; RAM allows {by_ram}, /dev/shm {by_shm}"
    because += f", for {num_processes} processes together" if num_processes > 1 else ""
    if by_shm // num_processes < min(MAX_WORKERS, by_threads, by_ram // num_processes):
        small = f"{BATCHES_IN_FLIGHT} batches of {batch_bytes / 2**20:.0f} MiB for each must fit into its "
        because += f"; {small}{hardware.shm_bytes / 2**20:.0f} MiB: enlarge it (docker run --shm-size) to have more"
    return workers, because


def _worker_bytes(batch_bytes: int) -> int:
    return WORKER_BYTES + BATCHES_IN_FLIGHT * batch_bytes


def choose_memory(draft: Draft) -> Choice:
    """Return the predicted peak of the training step, in bytes."""
    cost = step_cost(draft)
    value = cost.memory_bytes(draft["batch_size"], draft["device"])
    room, name = usable_bytes(draft)
    if value > room:
        needed = f"{counted(draft['batch_size'], 'patch', 'need')} {value / GIB:.1f} GiB"
        what = f"{needed}, {room / GIB:.1f} GiB of {name} may be used"
        fits = max(1, (room - cost.fixed_bytes) // max(1, cost.memory_bytes(1, draft["device"]) - cost.fixed_bytes))
        raise PlanError("batch_size", what, f"--set batch_size={fits}, and accumulate_batches for the rest")
    because = f"{counted(draft['batch_size'], 'patch')} of {cost.patch_bytes / 2**20:.1f} MiB and "
    because += f"{cost.fixed_bytes / 2**20:.1f} MiB beside them ({cost.num_parameters / 1e6:.1f} M parameters, loss)"
    guess = "" if draft["device"] == "cpu" else "; 10 % and 0.6 GiB on top, estimated"
    return Choice(value, because, f"traced under FakeTensorMode{guess}")


def choose_ram(draft: Draft) -> Choice:
    """Return the predicted host memory, in bytes; PlanError where the machine has less."""
    processes, workers, batch_bytes = draft["num_processes"], draft["num_workers"], _batch_bytes(draft)
    worker = _worker_bytes(batch_bytes)
    if draft["device"] == "cpu":
        kept, source = draft["predicted_memory_bytes"], "measured: 0.8 GiB at peak, VNC plan"
        what = f"{kept / 2**20:.1f} MiB of the step"
    else:
        kept, source = STORED_TENSORS * 4 * step_cost(draft).num_parameters, "estimated"
        what = f"{kept / 2**20:.1f} MiB of weights and optimizer, while they are stored or restored"
    because = f"process {BASE_PROCESS_BYTES / GIB:.1f} GiB + {counted(workers, 'worker')}"
    of_each = f"{WORKER_BYTES / GIB:.1f} GiB and {BATCHES_IN_FLIGHT} batches of {batch_bytes:,} bytes"
    because += f" of {of_each}" if workers else ""
    because = f"{processes} times: {because}" if processes > 1 else because
    one = BASE_PROCESS_BYTES + kept
    need = processes * (one + workers * worker)
    if need > draft.hardware.ram_bytes * MOST_RAM_SHARE:
        raise PlanError(*_too_little_ram(draft, one, worker))
    return Choice(need, f"{because} + {what}", source)


def _too_little_ram(draft: Draft, one: int, worker: int) -> tuple[str, str, str]:
    """Return (field, what, remedy) where processes of `one` byte each, and their workers, need too much."""
    processes, workers, limit = draft["num_processes"], draft["num_workers"], draft.hardware.ram_bytes * MOST_RAM_SHARE
    what = f"{counted(processes, 'process', 'need')} {processes * (one + workers * worker) / GIB:.1f} GiB"
    what += f" with {counted(workers, 'worker')} each" if workers else ""
    what += f", {limit / GIB:.1f} GiB of RAM may be used"
    if processes * one <= limit:
        return "num_workers", what, f"--set num_workers={int((limit / processes - one) // worker)} fits"
    if one <= limit:
        return "num_processes", what, f"--set num_processes={int(limit // one)} --set num_workers=0 fits"
    return "num_processes", what, f"it takes a machine with {one / MOST_RAM_SHARE / GIB:.1f} GiB"


def choose_disk(draft: Draft) -> Choice:
    """Return the disk space that a run takes, in bytes: its checkpoints, and label codes in the cache."""
    checkpoints = CHECKPOINTS * STORED_TENSORS * 4 * step_cost(draft).num_parameters
    codes = _code_voxels(draft)
    because = f"{CHECKPOINTS} checkpoints of {checkpoints / CHECKPOINTS / 2**20:.0f} MiB, {codes / GIB:.4g} GiB "
    because += "of label codes in the cache"
    free = draft.hardware.disk_free_bytes
    if free is not None:
        because += f"; {free / GIB:.0f} GiB are free here" + (": too few" if free < checkpoints + codes else "")
    return Choice(checkpoints + codes, because, "float32; a byte a voxel")


def _code_voxels(draft: Draft) -> int:
    """Return the voxels of the label codes of all crops, and of those that the plan uses at its voxel size."""
    used = {region.crop for region in (*draft["split"].train, *draft["split"].validate)}
    grids = {crop.name: crop.grid for crop in draft.fingerprint.crops}
    own = sum(math.prod(grid.shape_zyx) for grid in grids.values())
    others = ((grid, grid.at_voxel_size(draft["voxel_size_nm"])) for name, grid in grids.items() if name in used)
    return own + sum(math.prod(other.shape_zyx) for grid, other in others if other != grid)


def choose_step_s(draft: Draft) -> Choice:
    """Return the predicted seconds of an optimizer step, None where this machine's speed is unknown."""
    speed = _step_gflops(draft)
    if speed is None:
        because = f"the speed of this machine in {draft['precision']} on {draft['device']} was not measured"
        return Choice(None, because, "hardware")
    patches = draft["batch_size"] * draft["accumulate_batches"]
    because = f"{patches * step_cost(draft).patch_flops / 1e9:.1f} Gflop at {speed:.0f} Gflop/s"
    because += f", and {DATA_SHARE:.0%} for its batch" if draft["num_workers"] == 0 else "; workers make its batch"
    if draft["num_processes"] > 1:
        because += f"; of one of {draft['num_processes']} processes, without what they exchange"
    return Choice(
        _step_seconds(draft, patches),
        because,
        "steps on random voxels, measured when the machine was probed",
    )


def _step_seconds(draft: Draft, patches: int) -> float | None:
    """Return the predicted seconds of a step of so many patches in each process, None where the speed is unknown."""
    speed = _step_gflops(draft)
    if speed is None:
        return None
    data = DATA_SHARE if draft["device"] == "cpu" else 0.0
    return patches * step_cost(draft).patch_flops / (speed * 1e9) * (1 + data)


def _step_gflops(draft: Draft) -> float | None:
    """Return the speed of steps of one process on the plan's device, None where another device was measured."""
    measured = "cuda" if draft.hardware.gpus else "cpu"
    return (draft.hardware.step_gflops or {}).get(draft["precision"]) if draft["device"] == measured else None


def cost_of(plan: Plan) -> StepCost:
    """Return the traced cost of a plan's step."""
    key = (msgspec.json.encode(plan.network), msgspec.json.encode(plan.loss))
    return _cached_cost(key, plan.input_slices, len(plan.classes), tuple(plan.patch_size_zyx), plan.precision)


def choose_budget(draft: Draft) -> Choice:
    """Return the seconds of training."""
    if draft.settings.get("optimizer.num_steps"):
        return Choice(None, "optimizer.num_steps is set instead", "user")
    if "optimizer.num_steps" in draft.advice:
        return Choice(None, "optimizer.num_steps is planned instead", draft.advice["optimizer.num_steps"].source)
    hours = DEFAULT_BUDGET_S[draft["device"]] / 3600
    return Choice(DEFAULT_BUDGET_S[draft["device"]], f"no --budget given: {hours:g} h on this device", "default")


def drafted_network(draft: Draft, features: tuple[int, ...] | None = None) -> Network:
    """Return the network as decided, or with other widths, whether it can be built or not."""
    decided = {name: draft[f"network.{name}"] for name in Network.__struct_fields__ if name != "features"}
    return Network(features=features or draft["network.features"], **decided)


def step_cost(draft: Draft, features: tuple[int, ...] | None = None) -> StepCost:
    """Return the traced cost of the drafted step, or of the same with other widths."""
    return _patch_cost(draft, draft["patch_size_zyx"], features)


def _patch_cost(draft: Draft, patch_zyx: Sequence[int], features: tuple[int, ...] | None) -> StepCost:
    loss = Loss(**{name: draft[f"loss.{name}"] for name in Loss.__struct_fields__})
    key = (msgspec.json.encode(drafted_network(draft, features)), msgspec.json.encode(loss))
    return _cached_cost(key, draft["input_slices"], len(draft["classes"]), tuple(patch_zyx), draft["precision"])


@lru_cache(maxsize=32)
def _cached_cost(key: Any, slices: int, num_classes: int, patch: Any, precision: str) -> StepCost:
    network = msgspec.json.decode(key[0], type=Network)
    loss = msgspec.json.decode(key[1], type=Loss)
    return trace_step(network, slices, num_classes, patch, precision, loss)
