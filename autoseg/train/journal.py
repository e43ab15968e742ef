"""What a run writes down: log.jsonl (a line for each step), adaptations.jsonl, and TensorBoard events."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoseg.errors import CheckpointError
from autoseg.schema import read_json_lines

LOG, ADAPTATIONS, LOCK = "log.jsonl", "adaptations.jsonl", ".lock"


class Journal:
    """Appends to the run's log; opening it at a step drops later lines, so that every step stands once.

    Without a run, in the processes that are not the first, nothing is written.
    """

    def __init__(self, run: Path | None, from_step: int) -> None:
        self._file = None
        if run is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        keep = [line for line in read_json_lines(run / LOG) if line.get("step", from_step + 1) <= from_step]
        self._path = run / LOG
        _write_lines(self._path, keep)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run), purge_step=from_step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; its numbers go to TensorBoard, Dice by class under `dice/`."""
        if self._file is None:
            return
        self._file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if name not in ("step", "dice")}
        numbers |= {f"dice/{name}": value for name, value in line.get("dice", {}).items()}
        for name, value in numbers.items():
            if value is None:
                continue
            self._board.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """Make what was written survive a kill."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._board.close()


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Hold the lock of a run, which ends with the process; CheckpointError while another process trains it.

    A file system without locks refuses nobody.
    """
    with (run / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what, remedy = "is being trained by another process", "wait for it, stop it, or choose another --run"
            raise CheckpointError(run, what, remedy) from None
        except OSError:
            pass
        yield


def adapt(run: Path, event: Mapping[str, Any]) -> None:
    """Append an event to adaptations.jsonl: something the run had to decide that the plan left open."""
    with (run / ADAPTATIONS).open("a") as file:
        file.write(json.dumps(event) + "\n")
        file.flush()
        os.fsync(file.fileno())


def adaptation(run: Path, name: str) -> dict[str, Any] | None:
    """Return the last event of that name, None if there is none."""
    events = [line for line in read_json_lines(run / ADAPTATIONS) if line.get("event") == name]
    return events[-1] if events else None


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)
