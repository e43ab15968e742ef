"""What every loss is made of: sums over known voxels, by sample and class, with a gradient written by hand.

A sum and its gradient are computed sample by sample, from logits and label codes; beside the logits no tensor of
their size is kept for the backward pass::

    bce    sum of  known * (log(1 + e^z) - present * z)
    focal  sum of  known * (1 - e^-b)^gamma * b          b the cross-entropy of the voxel
    tp     sum of  present * p                           p = sigmoid(z)
    found  sum of  known * p
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from autoseg.data.classes import PRESENT, UNKNOWN

EPSILON = 1e-6


class CodeTable:
    """What each label code means for each class, as tensors on a device."""

    def __init__(self, states_CK: Tensor) -> None:
        self.present_CK = (states_CK == PRESENT).float()
        self.known_CK = (states_CK != UNKNOWN).float()


class CodeTargets(NamedTuple):
    """The annotation of a batch as label codes (B, Z, Y, X) and their table; nothing of the logits' size is kept."""

    codes_BZYX: Tensor
    table: CodeTable

    def of_sample(self, index: int, like_KZYX: Tensor) -> tuple[Tensor, Tensor]:
        """Return (present, known) of one sample, 0 or 1 in the shape and layout of its logits."""
        codes = self.codes_BZYX[index]
        present, known = (t.to(like_KZYX.dtype) for t in (self.table.present_CK, self.table.known_CK))
        if like_KZYX.stride(0) == 1:  # channels last
            return present[codes].movedim(-1, 0), known[codes].movedim(-1, 0)
        return present.T[:, codes], known.T[:, codes]

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the number of (present, known) voxels, both (B, classes), float32."""
        codes = self.codes_BZYX.flatten(1)
        histogram = torch.zeros(len(codes), len(self.table.known_CK), dtype=torch.int64, device=codes.device)
        histogram.scatter_add_(1, codes, torch.ones_like(codes))
        counts = histogram.float()
        return counts @ self.table.present_CK, counts @ self.table.known_CK

    def dense(self) -> MaskTargets:
        """Return the same annotation as two volumes for each class."""
        codes = self.codes_BZYX
        return MaskTargets(*(t[codes].movedim(-1, 1) for t in (self.table.present_CK, self.table.known_CK)))


class MaskTargets(NamedTuple):
    """The annotation of a batch as two volumes of 0 and 1, both (B, classes, Z, Y, X); unknown beats present."""

    present: Tensor
    known: Tensor

    def of_sample(self, index: int, like_KZYX: Tensor) -> tuple[Tensor, Tensor]:
        """Return (present, known) of one sample, 0 or 1."""
        known = self.known[index].to(like_KZYX.dtype)
        return self.present[index] * known, known

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the number of (present, known) voxels, both (B, classes)."""
        return (self.present * self.known).sum(dim=(2, 3, 4)), self.known.sum(dim=(2, 3, 4))

    def dense(self) -> MaskTargets:
        """Return the same annotation, present only where it is known."""
        return MaskTargets(self.present * self.known, self.known)


Targets = CodeTargets | MaskTargets


class Sums(NamedTuple):
    """Sums over the known voxels of each sample and class, all (B, classes)."""

    bce: Tensor
    focal: Tensor
    tp: Tensor
    found: Tensor
    present: Tensor
    known: Tensor


def voxel_sums(logits_BKZYX: Tensor, targets: Targets, focal_gamma: float | None) -> Sums:
    """Return the sums of logits against targets; without a gamma `focal` is zero and costs nothing."""
    bce, focal, tp, found = _VoxelSums.apply(logits_BKZYX, targets, focal_gamma)  # type: ignore[no-untyped-call]
    present, known = (total.to(bce.dtype) for total in targets.totals())
    return Sums(bce, focal, tp, found, present, known)


class _VoxelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, gamma: float | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits)
        ctx.targets, ctx.gamma = targets, gamma
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = torch.zeros(4, *logits.shape[:2], dtype=dtype, device=logits.device)
        for index, sample in enumerate(logits):
            z = sample.to(dtype)
            present, known = targets.of_sample(index, z)
            p = torch.sigmoid(z)
            sums[2, index], sums[3, index] = _dot(p, present), _dot(p, known)
            bce = F.softplus(z)
            if gamma is not None:
                exact = bce - present * z
                sums[1, index] = _dot(_wrong(exact) ** gamma * exact, known)
            sums[0, index] = _dot(bce, known) - _dot(z, present)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        out = torch.empty_like(logits)
        for index, sample in enumerate(logits):
            by_class = [g[index].reshape(-1, 1, 1, 1) for g in gradients]
            out[index] = _sample_gradient(sample.to(by_class[0].dtype), index, ctx.targets, ctx.gamma, by_class)
        return out, None, None


def _sample_gradient(z: Tensor, index: int, targets: Targets, gamma: float | None, by_class: list[Tensor]) -> Tensor:
    """Return d/dz of the sums of one sample, weighted by the gradients that arrive for each class."""
    d_bce, d_focal, d_tp, d_found = by_class
    present, known = targets.of_sample(index, z)
    p = torch.sigmoid(z)
    slope = p * (1 - p)
    gradient = known * (d_bce * p + d_found * slope) + present * (d_tp * slope - d_bce)
    if gamma is not None:
        bce = F.softplus(z) - present * z
        wrong = _wrong(bce)
        inside = gamma * wrong ** (gamma - 1) * torch.exp(-bce) * bce * (wrong > EPSILON) if gamma else 0.0
        gradient += d_focal * (inside + wrong**gamma) * (p - present) * known
    return gradient


def _wrong(bce: Tensor) -> Tensor:
    """Return 1 - e^-bce, the probability of the wrong answer; at 0 a root of it would have no finite slope."""
    return (-torch.expm1(-bce)).clamp(min=EPSILON)


def _dot(a_KZYX: Tensor, b_KZYX: Tensor) -> Tensor:
    return (a_KZYX * b_KZYX).sum(dim=(1, 2, 3))
