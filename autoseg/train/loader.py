"""Batches in the order of steps, from this process or from worker processes: the same batches either way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from autoseg.data.codes import default_cache
from autoseg.data.dataset import open_dataset
from autoseg.data.em import CHUNK_CACHE_BYTES
from autoseg.errors import AutosegError
from autoseg.limits import one_thread_each
from autoseg.schema import Plan
from autoseg.train.patches import Batch, PatchSampler

PREFETCH = 2


class StepDataset(Dataset[Batch | AutosegError]):
    """Item s is the batch of step s, for process `rank` of the plan's; whoever reads the stores opens them."""

    def __init__(self, plan: Plan, data: Path, cache: Path, rank: int = 0) -> None:
        self.plan, self.data, self.cache, self.rank = plan, data, cache, rank
        self._sampler: PatchSampler | None = None
        self.untaught: tuple[str, ...] = ()

    def first(self) -> Batch:
        """Return the batch of step 0, so that data that cannot be read is known before a run is begun.

        From then on `untaught` are the classes of the plan that no voxel to train on shows.
        """
        batch = _unless_error(self[0])
        self.untaught = self._sampler.untaught if self._sampler else ()
        if self.plan.num_workers:
            self._sampler = None  # workers open their own
        return batch

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yield the batches of those steps, from this process or from the plan's number of workers."""
        if self.plan.num_workers == 0:
            for step in range(start_step, stop_step):
                yield _unless_error(self[step])
            return
        loader = DataLoader(
            self,
            sampler=range(start_step, stop_step),
            batch_size=None,
            num_workers=self.plan.num_workers,
            prefetch_factor=PREFETCH,
            multiprocessing_context="spawn",
            worker_init_fn=_start_worker,
            pin_memory=self.plan.device == "cuda" and torch.cuda.is_available(),
        )
        with one_thread_each():
            items = iter(loader)
        for item in items:
            yield _unless_error(item)

    def __getitem__(self, step: int) -> Batch | AutosegError:
        """Return the batch of that step; an expected error is returned, since torch cannot carry it to its parent."""
        try:
            if self._sampler is None:
                self._sampler = PatchSampler(
                    self.plan, open_dataset(self.data), self.cache, CHUNK_CACHE_BYTES, self.rank
                )
            return self._sampler.batch(step)
        except AutosegError as error:
            return error


def batches(
    plan: Plan,
    data: Path | str,
    *,
    start_step: int = 0,
    stop_step: int = 2**31,
    cache: Path | None = None,
    rank: int = 0,
) -> Iterator[Batch]:
    """Return an iterator of what training steps start_step, start_step + 1, ... receive, as tensors on the CPU.

    Of a plan for several processes it is what number `rank` receives.
    """
    return StepDataset(plan, Path(data), cache or default_cache(), rank).batches(start_step, stop_step)


def _unless_error(item: Batch | AutosegError) -> Batch:
    if isinstance(item, AutosegError):
        raise item
    return item


def _start_worker(_: int) -> None:
    """One thread each: parallelism comes from the number of workers. Signals are for the process that saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
