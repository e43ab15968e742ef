"""SIGTERM and Ctrl-C become a question that is asked between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def asked_to_stop(*, interruptible: bool = True) -> Iterator[Callable[[], str | None]]:
    """Yield a function that returns the name of the signal received, or None; a second Ctrl-C interrupts at once.

    What a terminal sends to several processes at once interrupts only one of them.
    """
    received: list[str] = []

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and received and interruptible:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
