"""DOING IT: a plan and DATA become a RUN."""

from autoseg.train.loader import batches
from autoseg.train.loop import train
from autoseg.train.step import make_step

__all__ = ["batches", "make_step", "train"]
