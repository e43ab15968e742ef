"""Logits in parts that are small beside them: rows of classes where sums are taken, runs of voxels elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PARTS = 64  # of all logits; some tensors of the size of a part are made at a time
LEAST_PART = 2**18  # elements; smaller ones take longer
ROWS_TOGETHER = 32  # of channels last: as many as a CPU adds up side by side
RUN = 64  # voxels, a multiple of what a CPU computes at once


def flat(sample_KZYX: Tensor) -> Tensor:
    """Return (classes, voxels), a view of one sample in either layout of `in_a_known_layout`."""
    if channels_last(sample_KZYX):
        return sample_KZYX.movedim(0, -1).reshape(-1, len(sample_KZYX)).T
    return sample_KZYX.reshape(len(sample_KZYX), -1)


def channels_last(sample_KZYX: Tensor) -> bool:
    """Return whether the classes of a voxel lie side by side."""
    return not sample_KZYX.is_contiguous() and sample_KZYX.movedim(0, -1).is_contiguous()


def in_a_known_layout(logits_BKZYX: Tensor) -> Tensor:
    """Return logits whose samples `flat` can view."""
    one = logits_BKZYX[0]
    dense = logits_BKZYX.is_contiguous() or logits_BKZYX.movedim(1, -1).is_contiguous()
    return logits_BKZYX if dense and (one.is_contiguous() or channels_last(one)) else logits_BKZYX.contiguous()


def rows_of(logits_BKZYX: Tensor) -> Iterator[slice]:
    """Yield classes in parts of about the wanted size; the sum of a class does not depend on them."""
    num, voxels = logits_BKZYX.shape[1], logits_BKZYX[0, 0].numel()
    step = max(1, _part(logits_BKZYX) // voxels)
    if channels_last(logits_BKZYX[0]):
        step = -(-step // ROWS_TOGETHER) * ROWS_TOGETHER
    return (slice(start, min(start + step, num)) for start in range(0, num, step))


def parts_of(logits_BKZYX: Tensor) -> Iterator[slice]:
    """Yield runs of voxels of a sample in parts of about the wanted size."""
    num, voxels = logits_BKZYX.shape[1], logits_BKZYX[0, 0].numel()
    step = max(RUN, _part(logits_BKZYX) // num // RUN * RUN)
    return (slice(start, min(start + step, voxels)) for start in range(0, voxels, step))


def _part(logits_BKZYX: Tensor) -> int:
    return max(LEAST_PART, logits_BKZYX.numel() // PARTS)
