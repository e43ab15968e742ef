"""DOING IT: a plan and DATA become a RUN.

Loader processes import this package too: what needs the network (some 80 MB) is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoseg.train.loader import batches

if TYPE_CHECKING:
    from autoseg.train.loop import train
    from autoseg.train.step import make_step

__all__ = ["batches", "make_step", "train"]


def __getattr__(name: str) -> Any:
    """Return `make_step` or `train`."""
    if name == "make_step":
        from autoseg.train.step import make_step

        return make_step
    if name == "train":
        from autoseg.train.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
