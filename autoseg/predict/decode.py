"""Probabilities to labels: one mask for each class, and one map of labels for formats that hold only that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.schema import ClassEntry


def to_labels(probability_KZYX: NDArray[np.float32], thresholds_K: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return 1 where a class reaches its threshold, else 0; same shape."""
    return (probability_KZYX >= thresholds_K[:, None, None, None]).astype(np.uint8)


def label_map(labels_KZYX: NDArray[np.uint8], classes: Sequence[ClassEntry]) -> NDArray[np.uint8]:
    """Return 0 for none, else the number (from 1, in plan order) of the class; atoms cover composites.

    Where two atoms meet, the later one in plan order shows: a map cannot hold both.
    """
    out = np.zeros(labels_KZYX.shape[1:], dtype=np.uint8)
    for composite in (True, False):
        for k, entry in enumerate(classes):
            if bool(entry.components) == composite:
                out[labels_KZYX[k] > 0] = k + 1
    return out
