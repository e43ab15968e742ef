"""What every loss is made of: sums over known voxels, by sample and class, with a gradient written by hand.

A sum and its gradient are computed part by part, from logits and label codes; beside the logits no tensor of their
size is kept for the backward pass, and none but the gradient is made::

    bce    sum of  known * (log(1 + e^z) - present * z)
    focal  sum of  known * (1 - e^-b)^gamma * b          b the cross-entropy of the voxel
    hard   sum of  b over the hardest share of the known voxels of each sample and class
    tp     sum of  present * p                           p = sigmoid(z)
    found  sum of  known * p
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from autoseg.model.targets import CodeTargets, MaskTargets, Targets
from autoseg.model.voxels import flat, in_a_known_layout, parts_of, rows_of

EPSILON = 1e-6
__all__ = ["EPSILON", "CodeTargets", "Focus", "MaskTargets", "Sums", "Targets", "Terms", "voxel_sums"]


class Focus(NamedTuple):
    """How the cross-entropy b of a voxel is focused on hard ones: (1 - e^-b)^gamma * b.

    With `alpha` a present voxel counts alpha and an absent one 1 - alpha; `absent_only` leaves present ones unfocused.
    Source: Lin et al. 2017, arXiv 1708.02002; Yeung et al. 2021, arXiv 2102.04525 (absent only).
    """

    gamma: float
    alpha: float | None = None
    absent_only: bool = False

    def value(self, bce: Tensor, present: Tensor) -> Tensor:
        """Return the focused cross-entropy of each voxel."""
        value = _wrong(bce) ** self.gamma * bce
        return self._scale(torch.lerp(value, bce, present) if self.absent_only else value, present)

    def slope(self, bce: Tensor, present: Tensor) -> Tensor:
        """Return the derivative of `value` by the cross-entropy."""
        wrong, gamma = _wrong(bce), self.gamma
        inside = gamma * wrong ** (gamma - 1) * torch.exp(-bce) * bce * (wrong > EPSILON) if gamma else 0.0
        slope = inside + wrong**gamma
        return self._scale(torch.lerp(slope, torch.ones_like(slope), present) if self.absent_only else slope, present)

    def _scale(self, value: Tensor, present: Tensor) -> Tensor:
        return value if self.alpha is None else value * (1 - self.alpha + (2 * self.alpha - 1) * present)


class Terms(NamedTuple):
    """Which sums are asked for beside cross-entropy and overlap; what is None costs nothing.

    `shift` (classes) is added to the logits.
    """

    focus: Focus | None = None
    hard_share: float | None = None
    shift: Tensor | None = None


class Sums(NamedTuple):
    """Sums over the known voxels of each sample and class, all (B, classes); with softmax backgrounds follow them.

    `hard` is of `hardest` voxels; `overlap` holds overlap losses of `pairs` samples, where they are taken by sample.
    """

    bce: Tensor
    focal: Tensor
    tp: Tensor
    found: Tensor
    present: Tensor
    known: Tensor
    hard: Tensor
    hardest: Tensor
    overlap: Tensor
    pairs: Tensor


def voxel_sums(logits_BKZYX: Tensor, targets: Targets, terms: Terms) -> Sums:
    """Return the sums of logits against targets."""
    bce, focal, tp, found, hard = _VoxelSums.apply(logits_BKZYX, targets, terms)  # type: ignore[no-untyped-call]
    present, known = (total.to(bce.dtype) for total in targets.totals())
    hardest = known * 0 if terms.hard_share is None else _number_of(terms.hard_share, known)
    nothing = torch.zeros_like(known)
    return Sums(bce, focal, tp, found, present, known, hard, hardest, nothing, nothing)


class _VoxelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, terms: Terms) -> tuple[Tensor, ...]:
        logits = in_a_known_layout(logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = torch.zeros(5, *logits.shape[:2], dtype=dtype, device=logits.device)
        edges = torch.zeros(2, *logits.shape[:2], dtype=dtype, device=logits.device)
        for index, sample in enumerate(logits):
            z_KN = flat(sample)
            for rows in rows_of(logits):
                z = _shifted(z_KN[rows].to(dtype), terms, rows)
                present, known = targets.part(index, z, rows)
                p = torch.sigmoid(z)
                sums[2, index, rows], sums[3, index, rows] = _dot(p, present), _dot(p, known)
                del p
                bce = F.softplus(z)
                if terms.focus is not None:
                    exact = bce - present * z
                    sums[1, index, rows] = _dot(terms.focus.value(exact, present), known)
                sums[0, index, rows] = _dot(bce, known) - _dot(z, present)
                if terms.hard_share is not None:
                    exact = bce - present * z
                    sums[4, index, rows], *edge = _hardest(exact, known, terms.hard_share)
                    edges[:, index, rows] = torch.stack(edge)
        ctx.save_for_backward(logits, edges)
        ctx.targets, ctx.terms = targets, terms
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, edges = ctx.saved_tensors
        out = torch.empty_like(logits)
        rows = slice(None)
        for index, (sample, made) in enumerate(zip(logits, out, strict=True)):
            by_class = [g[index].reshape(-1, 1) for g in (*gradients, *edges)]
            z_KN, gradient_KN = flat(sample), flat(made)
            for voxels in parts_of(logits):
                z = _shifted(z_KN[:, voxels].to(by_class[0].dtype), ctx.terms, rows)
                gradient_KN[:, voxels] = _gradient(z, ctx.targets.part(index, z, rows, voxels), ctx.terms, by_class)
        return out, None, None


def _gradient(z: Tensor, target: tuple[Tensor, Tensor], terms: Terms, by_class: list[Tensor]) -> Tensor:
    """Return d/dz of the sums of one part, weighted by the gradients that arrive for each class."""
    d_bce, d_focal, d_tp, d_found, d_hard, threshold, tie = by_class
    present, known = target
    p = torch.sigmoid(z)
    slope = p * (1 - p)
    gradient = known * (d_bce * p + d_found * slope) + present * (d_tp * slope - d_bce)
    del slope
    if terms.focus is not None:
        bce = F.softplus(z) - present * z
        gradient += d_focal * terms.focus.slope(bce, present) * (p - present) * known
    if terms.hard_share is not None:
        bce = F.softplus(z) - present * z
        gradient += d_hard * ((bce > threshold) + tie * (bce == threshold)) * (p - present) * known
    return gradient


def _hardest(bce: Tensor, known: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each class (sum of the hardest known voxels, the least of them, how much each that equals it counts).

    Equal voxels share the places that are left, so that the order of voxels does not matter.
    """
    most = max(1, math.ceil(share * bce.shape[1] - EPSILON))
    wanted = _number_of(share, known.sum(dim=1))
    values = torch.where(known > 0, bce, torch.full_like(bce, -1)).topk(most, dim=1).values
    threshold = values.gather(1, (wanted.long() - 1).clamp(min=0, max=most - 1).unsqueeze(1))
    above = (bce > threshold) * known
    left = wanted - above.sum(dim=1)
    equal = ((bce == threshold) * known).sum(dim=1).clamp(min=1)
    return _dot(bce, above) + left * threshold.squeeze(1), threshold.squeeze(1), left / equal


def _number_of(share: float, known: Tensor) -> Tensor:
    """Return how many voxels that share of the known ones is, rounded up."""
    return (known.double() * share - EPSILON).ceil().clamp(min=0).to(known.dtype)


def _shifted(z: Tensor, terms: Terms, rows: slice) -> Tensor:
    return z if terms.shift is None else z + terms.shift[rows, None].to(z.dtype)


def _wrong(bce: Tensor) -> Tensor:
    """Return 1 - e^-bce, the probability of the wrong answer; at 0 a root of it would have no finite slope."""
    return (-torch.expm1(-bce)).clamp(min=EPSILON)


def _dot(a_KN: Tensor, b_KN: Tensor) -> Tensor:
    return (a_KN * b_KN).sum(dim=1)
