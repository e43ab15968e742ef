"""What the processes of one training tell each other; alone, a process tells nobody and needs no torch.distributed.

::

    rank 0   patches ─► sums ─┐             ┌─► one loss ─► gradients of its own patches ─┐
                              ├─ added up ──┤                                             ├─ added up ─► the same step
    rank 1   patches ─► sums ─┘             └─► one loss ─► gradients of its own patches ─┘

The loss is a function of sums over all patches, so its gradient is the sum, not the mean, of what each process finds
through its own sums. Gradients are added up once a step, after the last micro-batch. DistributedDataParallel would take
their mean, after every backward pass or by exception, and put a wrapper around the network that checkpoints must undo.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

from autoseg.errors import LostProcess, PlanError, counted
from autoseg.model.sums import Sums

BUCKET_BYTES = 2**25
STOP = "autoseg/stop"
GLOO = re.compile(r"gloo[/\\]")  # whose errors have no type, but begin with the file of its source
Asked = Callable[[], str | None]


class Team:
    """The processes of one training as one of them sees it: number `rank` of `size`, the first writes and speaks."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Store | None = None) -> None:
        self.rank, self.size = rank, size
        self.unbroken = threading.Lock()  # held where this process must not be ended
        self._local_rank, self._store = local_rank, store

    @property
    def first(self) -> bool:
        """Return whether this process is the one that decides, writes and speaks."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own device of that kind; PlanError where its machine has none for it."""
        if self.size == 1 or device.type == "cpu":
            return device
        if self._local_rank >= (there := torch.cuda.device_count()):
            what = f"is process {self._local_rank} of its machine, which has {counted(there, 'GPU')}"
            raise PlanError(f"rank {self.rank}", what, f"start at most {there} on it, or use --device cpu")
        return torch.device("cuda", self._local_rank)

    def pool(self, sums: Sums) -> Sums:
        """Return the sums over the patches of all processes; a gradient goes to this one's patches alone."""
        if self.size == 1:
            return sums
        return Sums(*_AddUp.apply(torch.stack(sums)))  # type: ignore[no-untyped-call]

    def add_up_gradients(self, network: nn.Module) -> None:
        """Put the sum over all processes in place of every gradient."""
        if self.size == 1:
            return
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            with _together():
                dist.all_reduce(flat)
            for gradient, total in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view(gradient.shape))

    def add_up(self, counts: NDArray[Any]) -> NDArray[Any]:
        """Return the sum of the counts of all processes."""
        if self.size > 1:
            counts = counts.copy()
            with _together():
                dist.all_reduce(torch.from_numpy(counts))
        return counts

    def tell(self, value: Any) -> Any:
        """Return what the first process passes; what the others pass does not matter."""
        told = [value]
        if self.size > 1:
            with _together():
                dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

    def agree(self, stopped_by: str | None) -> str | None:
        """Return the name of a signal that any process received; every process must ask at the same place."""
        if self.size == 1:
            return stopped_by
        number = torch.tensor(signal.Signals[stopped_by] if stopped_by else 0)
        with _together():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None

    def listen(self, asked: Asked) -> Asked:
        """Return `asked` of all processes, for where they work apart: whoever is asked to stop lets the others know."""
        store = self._store
        if store is None:
            return asked

        def heard() -> str | None:
            with _together():
                if stopped_by := asked():
                    store.set(STOP, stopped_by)
                    return stopped_by
                return store.get(STOP).decode() if store.check([STOP]) else None

        return heard


ALONE = Team()


class _AddUp(torch.autograd.Function):
    """Sums over processes; backwards nothing is exchanged, since gradients are added up at the end of the step."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        with _together():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients in groups that are sent at once; the copy of a group is all the memory it takes."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def _together() -> Iterator[None]:
    """Turn what torch.distributed raises where another process is gone into one line; other errors are this one's."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not GLOO.search(str(error)):
            raise
        why = str(error).strip().splitlines()[0]
        raise LostProcess("training", f"another of its processes is gone ({why})", "see what that one says") from error
