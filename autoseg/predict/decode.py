"""Probabilities to labels: one mask for each class, and one map of labels for formats that hold only that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.schema import ClassEntry


def to_labels(probability_KZYX: NDArray[np.float32], thresholds_K: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return 1 where a class reaches its threshold, else 0; same shape."""
    return (probability_KZYX >= thresholds_K[:, None, None, None]).astype(np.uint8)


MAP_RULE = "where several are called, a part shows before what it is part of, else the more probable"


def label_map(
    labels_KZYX: NDArray[np.uint8], probability_KZYX: NDArray[np.uint8], classes: Sequence[ClassEntry]
) -> NDArray[np.uint8]:
    """Return 0 for none, else the number (from 1, in plan order) of one of the classes that are called there.

    A part shows before the composites that contain it; of the others the most probable, of equal ones the first.
    """
    out, best = (np.zeros(labels_KZYX.shape[1:], dtype=np.uint8) for _ in range(2))
    for k, parts in enumerate(parts_of(classes)):
        mine = labels_KZYX[k] > 0
        for part in parts:
            mine &= labels_KZYX[part] == 0
        mine &= (out == 0) | (probability_KZYX[k] > best)
        out[mine] = k + 1
        best[mine] = probability_KZYX[k][mine]
    return out


def parts_of(classes: Sequence[ClassEntry]) -> list[list[int]]:
    """Return for each class the indices of its parts, and of theirs; a composite may be part of a larger one."""
    components = {entry.name: entry.components for entry in classes}

    def atoms(name: str) -> frozenset[str]:
        parts = components.get(name, ())
        return frozenset[str]().union(*map(atoms, parts)) if parts else frozenset({name})

    sizes = [(atoms(entry.name), bool(entry.components)) for entry in classes]
    return [
        [i for i, (part, nested) in enumerate(sizes) if part < whole or (part == whole and composite and not nested)]
        for whole, composite in sizes
    ]


def count_shown(labels_KZYX: NDArray[np.uint8], map_ZYX: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return how many voxels, called the class of that row, show each value of the map."""
    num = len(labels_KZYX)
    return np.stack([np.bincount(map_ZYX[labels > 0], minlength=num + 1) for labels in labels_KZYX])


def covered(shown: NDArray[np.int64], classes: Sequence[ClassEntry]) -> list[str]:
    """Return a sentence for each class that has voxels, of which the map shows none, or others show at over half.

    What its own parts show of a composite is not lost, and named only where nothing else is left of it.
    """
    names, sentences = [entry.name for entry in classes], []
    for k, parts in enumerate(parts_of(classes)):
        called, left = int(shown[k].sum()), int(shown[k, k + 1])
        over = shown[k, 1:].copy()
        over[k] = 0
        strangers = over.copy()
        strangers[parts] = 0
        if not called or (left and strangers.sum() <= called / 2):
            continue
        by = strangers if left else over
        share = f"{by.sum() / called:.0%}" if left else "all"
        most = names[int(by.argmax())]
        who = f"covered by {most}" if np.count_nonzero(by) == 1 else f"covered, most by {most}"
        sentences.append(f"{names[k]}: {called:,} voxels, {share} {who if strangers.any() else 'shown as its parts'}")
    return sentences
