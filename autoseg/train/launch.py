"""The processes of one training: the first of them starts the others, or torchrun has started all.

::

    autoseg train = rank 0 ──spawn──► rank 1, rank 2 ...        one machine
                       └─ watches them: one that dies ends the training, with its reason
    torchrun ──► autoseg train, on each machine one for each device: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT

The first process is the one that the user started, rather than a parent of all as torch's launcher has it: so the view,
the lock of the run and its errors are those of one process, a stop has as long as a checkpoint takes (the launcher
kills after 30 s), and there is one process less to hold torch in memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from autoseg.errors import AutosegError, LostProcess, PlanError
from autoseg.train.team import ALONE, Team

HOST = "127.0.0.1"
LEAKS = "ignore::UserWarning:multiprocessing.resource_tracker"
WAIT = timedelta(hours=6)  # for one that validates or saves; one that died is noticed at once
START_S, GRACE_S, END_S, SAVE_S = 300.0, 30.0, 60.0, 600.0
LOST = 3  # exit code of a process that ends for want of another
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Work = Callable[[Team], object]


@contextmanager
def assembled(num_processes: int, device: torch.device, work: Work) -> Iterator[Team]:
    """Yield the team of this process, the first; the others do `work` and end with it. Alone nothing is started.

    An AutosegError of another process is raised here, LostProcess where one was killed.
    """
    started = torchrun_size()
    if started not in (None, num_processes):
        what = f"torchrun started {started} processes, the plan has num_processes {num_processes}"
        raise PlanError("torchrun", what, "start as many")
    if started:
        with joined() as team:
            yield team
    elif num_processes == 1:
        yield ALONE
    else:
        with _crew(num_processes, device.type, work) as team:
            yield team


def torchrun_size() -> int | None:
    """Return how many processes torchrun started, None if it did not start this one, or started it alone."""
    size = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in TORCHRUN) else 1
    return size if size > 1 else None


def torchrun_rank() -> int:
    """Return the number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ["RANK"]) if torchrun_size() else 0


@contextmanager
def joined() -> Iterator[Team]:
    """Yield the team that torchrun put together."""
    store, rank, size = next(rendezvous("env://", timeout=WAIT))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with _group(store, rank, size, kind) as team:
        yield team


@contextmanager
def _group(store: Store, rank: int, size: int, kind: str) -> Iterator[Team]:
    local_rank = int(os.environ["LOCAL_RANK"]) if torchrun_size() and "LOCAL_RANK" in os.environ else rank
    if kind == "cuda" and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
    try:
        yield Team(rank, size, local_rank, store)
    except BaseException:
        if kind == "cpu":  # NCCL would first wait for what others no longer send; this process ends anyway
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _crew(size: int, kind: str, work: Work) -> Iterator[Team]:
    """Start the other processes of this machine; kill what is left of them in the end."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=WAIT)
    others = _Others(size, store.port, kind, work)
    try:
        others.wait_until_ready()
        with _group(store, 0, size, kind) as team:
            others.unbroken = team.unbroken
            yield team
        others.let_end()
    except LostProcess as lost:
        raise others.reason(lost) from None
    finally:
        others.kill()


class _Others:
    """The processes that the first one started."""

    def __init__(self, size: int, port: int, kind: str, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: dict[int, tuple[SpawnProcess, Connection]] = {}
        self._left, self._lock, self.unbroken = threading.Event(), threading.Lock(), threading.Lock()
        with _deaf_to_ctrl_c(), _silent_on_leaks():
            for rank in range(1, size):
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work_as, args=(rank, size, port, kind, work, there))
                process.start()
                there.close()
                self._processes[rank] = process, here
        threading.Thread(target=self._watch, daemon=True).start()

    def wait_until_ready(self) -> None:
        """Return once all of them run; LostProcess as soon as one ends instead."""
        for rank, (_, pipe) in self._processes.items():
            ready = False
            with suppress(EOFError):
                ready = pipe.poll(START_S) and pipe.recv() is None
            if not ready:
                raise LostProcess(f"rank {rank}", "did not start", "look for memory and free space, and try again")

    def let_end(self) -> None:
        """Wait for processes whose work is done."""
        self._left.set()
        for process, _ in self._processes.values():
            self._exit_code(process)

    def kill(self) -> None:
        """End what still runs; it holds nothing that must be saved."""
        self._left.set()
        for process, pipe in self._processes.values():
            process.kill()
            self._exit_code(process)
            pipe.close()

    def reason(self, lost: LostProcess | None = None) -> Exception:
        """Return why that one ended which did so by itself; else `lost`, else what one says that missed another."""
        if lost:  # this process has noticed, and ends by itself
            self._left.set()
        missed: Exception | None = lost
        running, deadline = dict(self._processes), time.monotonic() + GRACE_S
        while running and (left_s := deadline - time.monotonic()) > 0:
            ended = wait([process.sentinel for process, _ in running.values()], left_s)
            for rank, (process, pipe) in list(running.items()):
                if process.sentinel in ended:
                    del running[rank]
                    found, by_itself = _reason(rank, self._exit_code(process), pipe)
                    if found and by_itself:
                        return found
                    missed = missed or found
        return missed or LostProcess("training", "one of its processes ended", "the same command goes on")

    def _exit_code(self, process: SpawnProcess) -> int | None:
        with self._lock:  # two threads that wait for one process confuse each other
            process.join(END_S)
            return process.exitcode

    def _watch(self) -> None:
        """End this process where another one died and NCCL waits for it forever; gloo notices by itself.

        A checkpoint that is being written is finished before.
        """
        running = [process for process, _ in self._processes.values()]
        while running:
            ended = wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in ended]:
                running.remove(process)
                if self._exit_code(process) and not self._left.wait(GRACE_S):
                    reason = self.reason()
                    self.unbroken.acquire(timeout=SAVE_S)
                    sys.stderr.write(f"{' '.join(str(reason).split())}\n")
                    sys.stderr.flush()
                    os._exit(2 if isinstance(reason, AutosegError) else 1)


def _reason(rank: int, code: int | None, pipe: Connection) -> tuple[Exception | None, bool]:
    """Return what a process that has ended said, or what its exit code says, and whether it ended by itself."""
    with suppress(EOFError, OSError):
        if pipe.poll() and isinstance(error := pipe.recv(), Exception):
            return error, code != LOST
    if code is not None and code < 0:
        what = f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        remedy = "free memory, or plan with fewer num_workers; the same command goes on from the last checkpoint"
        return LostProcess(f"rank {rank}", what, remedy), True
    if code in (0, LOST):
        return None, False
    what = f"ended with exit code {code}"
    return LostProcess(f"rank {rank}", what, "see what it said; the same command goes on"), True


def _work_as(rank: int, size: int, port: int, kind: str, work: Work, pipe: Connection) -> None:
    """Be one of the other processes: join, work, and tell the first one why if that fails."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send(None)
        store = TCPStore(HOST, port, is_master=False, timeout=WAIT)
        with _group(store, rank, size, kind) as team:
            work(team)
    except LostProcess as lost:
        pipe.send(LostProcess(f"rank {rank}", lost.what, lost.remedy))
        sys.exit(LOST)
    except (AutosegError, OSError) as error:
        pipe.send(error)
        sys.exit(2)
    except Exception as error:
        told = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
        told.add_note(traceback.format_exc())
        pipe.send(told)
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Let processes that are started here ignore Ctrl-C until they listen to it: a terminal sends it to all of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _silent_on_leaks() -> Iterator[None]:
    """Let Python's resource tracker, which starts with the first process, not warn of what a killed one leaves."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, LEAKS)))
    try:
        yield
    finally:
        os.environ.pop("PYTHONWARNINGS")
        os.environ |= {} if before is None else {"PYTHONWARNINGS": before}
