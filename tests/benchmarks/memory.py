"""Memory of a loader worker with many crops open: at its peak beyond `import torch`, and whether it grows.

The worker is a real one, a process that `autoseg.train.batches` starts; this process draws samples from it and looks
at it from outside::

    python tests/benchmarks/make_crops.py crops1000 --crops 1000 --edge 64 --chunk 32 --per-volume 50
    python tests/benchmarks/memory.py crops1000 --samples 10000 --out memory.json

RSS counts label codes that are mapped from the cache and could be dropped at any time; `anonymous` does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil

from autoseg.schema import Plan
from autoseg.train import batches

MIB = 2**20
ONLY_TORCH = "import torch, sys; torch.set_num_threads(1); print(flush=True); sys.stdin.read()"


class Memory(NamedTuple):
    """Bytes of one process: resident, of it alone, and not backed by a file."""

    rss: int
    uss: int
    anonymous: int


def memory_of(process: psutil.Process) -> Memory:
    """Return what a process holds now; `anonymous` is 0 where the system does not tell."""
    info = process.memory_full_info()
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    lines = rollup.read_text().splitlines() if rollup.exists() else []
    anonymous = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
    return Memory(info.rss, info.uss, anonymous)


def torch_alone() -> Memory:
    """Return the memory of a process that has imported torch and nothing else."""
    command = [sys.executable, "-c", ONLY_TORCH]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = memory_of(psutil.Process(process.pid))
        process.communicate()
    return found


def watch(plan: Plan, data: Path, cache: Path, samples: int, points: int) -> list[tuple[int, Memory]]:
    """Return (samples drawn, memory of the worker) at about that many points while it draws."""
    per_batch = plan.batch_size * plan.accumulate_batches
    steps = -(-samples // per_batch)
    every = max(1, steps // points)
    seen = []
    plan = msgspec.structs.replace(plan, num_workers=1)
    for step, _ in enumerate(batches(plan, data, stop_step=steps, cache=cache), start=1):
        if step % every == 0 or step == 1:
            workers = psutil.Process().children()
            worker = max(workers, key=lambda process: process.memory_info().rss)
            seen.append((step * per_batch, memory_of(worker)))
    return seen


def summary(base: Memory, seen: list[tuple[int, Memory]]) -> dict[str, Any]:
    """Return peaks beyond torch and slopes in bytes a sample, of all points and of those after the first half."""
    drawn = np.array([n for n, _ in seen], float)
    result: dict[str, Any] = {"import_torch": base._asdict()}
    for i, name in enumerate(Memory._fields):
        values = np.array([memory[i] for _, memory in seen], float)
        half = drawn >= drawn[-1] / 2
        result[name] = {
            "peak_beyond_torch": float(values.max() - base[i]),
            "slope": _slope(drawn, values),
            "slope_of_second_half": _slope(drawn[half], values[half]),
        }
    return result | {"points": [[n, *memory] for n, memory in seen]}


def _slope(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float | None:
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else None


def table(result: dict[str, Any]) -> str:
    """Return the summary as a Markdown table."""
    lines = [
        "| memory | import torch, MiB | peak beyond it, MiB | slope, MiB per 1,000 samples | second half |",
        "|---|---|---|---|---|",
    ]
    for name in Memory._fields:
        row = result[name]
        slopes = (row["slope"], row["slope_of_second_half"])
        cells = ["–" if slope is None else f"{1000 * slope / MIB:.2f}" for slope in slopes]
        numbers = (result["import_torch"][name] / MIB, row["peak_beyond_torch"] / MIB)
        lines.append(f"| {name} | {numbers[0]:.0f} | {numbers[1]:.0f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    from make_crops import NAMES  # here, since a worker imports this file again, and these need MONAI
    from side_autoseg import plan_of

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="made by make_crops.py")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--patch", type=int, nargs=3, default=[1, 128, 128], metavar=("Z", "Y", "X"))
    parser.add_argument("--rotates", action="store_true")
    parser.add_argument("--cache", type=Path, help="keep the label codes here (default: built anew, then removed)")
    parser.add_argument("--out", type=Path, help="JSON with every point")
    options = parser.parse_args()
    case = {
        "name": "memory",
        "classes": NAMES[: options.classes],
        "patch_zyx": options.patch,
        "batch_size": 8 if options.patch[0] == 1 else 2,
        "rotates": options.rotates,
    }
    base = torch_alone()
    with tempfile.TemporaryDirectory(prefix="autoseg-bench-") as folder:
        cache = options.cache or Path(folder)
        plan = plan_of(options.data, case, cache)
        result = summary(base, watch(plan, options.data, cache, options.samples, options.points))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    print(table(result))


if __name__ == "__main__":
    main()
