"""Batches in the order of steps, from this process or from worker processes: the same batches either way."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from autoseg.data.codes import default_cache
from autoseg.data.dataset import open_dataset
from autoseg.schema import Plan
from autoseg.train.patches import Batch, PatchSampler

CACHE_BYTES = 256 * 2**20
PREFETCH = 2


class StepDataset(Dataset[Batch]):
    """Item s is the batch of step s; the stores are opened in the process that reads them."""

    def __init__(self, plan: Plan, data: Path, cache: Path) -> None:
        self._plan, self._data, self._cache = plan, data, cache
        self._sampler: PatchSampler | None = None

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of that step."""
        if self._sampler is None:
            self._sampler = PatchSampler(self._plan, open_dataset(self._data), self._cache, CACHE_BYTES)
        return self._sampler.batch(step)


def batches(
    plan: Plan, data: Path | str, *, start_step: int = 0, stop_step: int = 2**31, cache: Path | None = None
) -> Iterator[Batch]:
    """Yield what training steps start_step, start_step + 1, ... receive, as tensors on the CPU."""
    dataset = StepDataset(plan, Path(data), cache or default_cache())
    if plan.num_workers == 0:
        for step in range(start_step, stop_step):
            yield dataset[step]
        return
    loader = DataLoader(
        dataset,
        sampler=range(start_step, stop_step),
        batch_size=None,
        num_workers=plan.num_workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context="spawn",
        worker_init_fn=_start_worker,
        pin_memory=plan.device == "cuda" and torch.cuda.is_available(),
    )
    yield from loader


def _start_worker(_: int) -> None:
    """One thread each: parallelism comes from the number of workers. Ctrl-C is for the process that saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
