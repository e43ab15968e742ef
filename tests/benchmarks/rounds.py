"""What both sides of a comparison do alike: be one process on one core, and count samples for a while when asked.

A side prints one line of JSON when it is ready and one for each round; a round begins with a number of seconds on
stdin. It imports nothing but the standard library, so that each side runs in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    "BLOSC_NTHREADS": "1",
    "CELLMAP_MAX_WORKERS": "1",
    "ZARR_THREADING__MAX_WORKERS": "1",  # of zarr 3; zarr 2 reads in the calling thread
}


def stay_on_one_core() -> None:
    """Pin this process, with every thread it starts, to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def serve(batches: Iterator[int], about: Mapping[str, Any]) -> None:
    """Draw one batch, then answer rounds until stdin ends; `batches` yields the number of samples of each."""
    next(batches)
    _say(about)
    for line in sys.stdin:
        _say(measure(batches, float(line)))


def measure(batches: Iterator[int], seconds: float) -> dict[str, float]:
    """Return samples drawn in that time, the wall time, and the CPU time of all threads of this process."""
    samples, wall, cpu = 0, time.perf_counter(), time.process_time()
    while (wall_s := time.perf_counter() - wall) < seconds or samples == 0:
        samples += next(batches)
    return {"samples": samples, "wall_s": wall_s, "cpu_s": time.process_time() - cpu}


def _say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)
