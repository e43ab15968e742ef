"""One side of loader.py: samples of `autoseg.train.batches`, one core. Run by loader.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rounds import serve, stay_on_one_core

from autoseg.model.losses import CodeTable, CodeTargets
from autoseg.plan import fingerprint, make_plan
from autoseg.schema import Hardware, Plan, Region
from autoseg.train import batches

ONE_CORE = Hardware(
    name="one-core", gpus=(), cpu_name="", cpu_threads=1, cpu_bf16=False, ram_bytes=2**34, shm_bytes=2**30
)


def plan_of(data: Path, case: dict[str, Any], cache: Path) -> Plan:
    """Return the plan that the planner makes for this case: every crop trains, all else by its rules.

    A class of the case that no voxel has (in tiny data) is left out: the planner would refuse it.
    """
    facts = fingerprint(data, cache)
    occurs = {name for crop in facts.crops for name, count in crop.counts.items() if count.present}
    settings: dict[str, Any] = {
        "classes.names": [name for name in case["classes"] if name in occurs],
        "split.train": tuple(Region(crop=crop.name) for crop in facts.crops),
        "split.validate": (),
        "patch_size_zyx": tuple(case["patch_zyx"]),
        "input_slices": 1,
        "network.features": (8, 8),
        "network.deep_supervision": False,
        "batch_size": case["batch_size"],
        "accumulate_batches": 1,
        "optimizer.num_steps": 1,
        "num_workers": 0,
        "augmentation.preset": "flips",
    }
    if case["rotates"]:
        settings |= {"augmentation.rotation_probability": 1.0, "augmentation.rotation_degrees": 180.0}
    return make_plan(case["name"], facts, ONE_CORE, settings)


def expand_s(plan: Plan, data: Path, cache: Path, repeats: int = 5) -> float:
    """Return the CPU seconds of expanding one sample's codes to targets and masks, as a training step does it."""
    batch = next(batches(plan, data, cache=cache))
    table = CodeTable(batch.states_CK)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        CodeTargets(batch.codes_BZYX.long(), table).dense()
        times.append(time.process_time() - start)
    return min(times) / len(batch.codes_BZYX)


def main() -> None:
    data, case, cache = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    plan = plan_of(data, case, cache)
    stay_on_one_core()
    start = time.perf_counter()

    def sizes() -> Iterator[int]:
        for batch in batches(plan, data, cache=cache):
            assert batch.codes_BZYX.shape[1:] == tuple(case["patch_zyx"])
            yield len(batch.image_BCZYX)

    about = {"versions": {name: version(name) for name in ("torch", "zarr", "numpy")}}
    source = sizes()
    first = next(source)
    open_s = time.perf_counter() - start
    about |= {"open_s": open_s, "first_batch": first, "expand_s": expand_s(plan, data, cache)}
    serve(source, about)


if __name__ == "__main__":
    main()
