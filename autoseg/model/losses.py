"""Losses on logits and label codes, per class, over known voxels only.

Unknown voxels have exactly zero gradient and never change the value. Sums and counts are taken over the whole
batch and divided once; a class without a known voxel contributes nothing::

    loss = sum_k w_k L_k / sum_k w_k     over classes k with a known voxel in the batch
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from autoseg.model.sums import EPSILON, CodeTable, CodeTargets, MaskTargets, Sums, Targets, voxel_sums
from autoseg.schema import Loss, Plan

__all__ = ["CodeTable", "CodeTargets", "MaskTargets", "build_loss", "masked_loss", "supervised_loss"]


Pool = Callable[[Sums], Sums]


def _own(sums: Sums) -> Sums:
    return sums


def build_loss(plan: Plan, pool: Pool = _own) -> Callable[[list[Tensor], Targets], Tensor]:
    """Return the function (logits finest first, targets) -> scalar; `pool` adds the sums of other processes."""
    weights = torch.tensor([plan.class_weights[name] for name in plan.class_names])
    return lambda logits, targets: supervised_loss(logits, targets, plan.loss, weights.to(logits[0].device), pool)


def supervised_loss(
    logits: list[Tensor], targets: Targets, loss: Loss, class_weights: Tensor, pool: Pool = _own
) -> Tensor:
    """Return the mean of the losses of all logits, finest first; each coarser one weighs half as much."""
    total = masked_loss(logits[0], targets, loss, class_weights, pool)
    shares = targets.dense() if len(logits) > 1 else None
    for level, out in enumerate(logits[1:], start=1):
        assert shares is not None
        shares = _shrink(shares, out)
        total = total + 0.5**level * masked_loss(out, _decide(shares), loss, class_weights, pool)
    return total / sum(0.5**level for level in range(len(logits)))


def masked_loss(logits: Tensor, targets: Targets, loss: Loss, class_weights: Tensor, pool: Pool = _own) -> Tensor:
    """Return the weighted mean over classes of the loss's terms; logits are (B, classes, Z, Y, X)."""
    by_sample = voxel_sums(logits, targets, loss.focal_gamma if loss.focal_weight else None)
    sums = pool(Sums(*(total.sum(dim=0) for total in by_sample)))
    per_class = torch.zeros_like(sums.known)
    num_known = sums.known.clamp(min=1)
    if loss.bce_weight:
        per_class = per_class + loss.bce_weight * sums.bce / num_known
    if loss.focal_weight:
        per_class = per_class + loss.focal_weight * sums.focal / num_known
    if loss.dice_weight:
        per_class = per_class + loss.dice_weight * _overlap(sums, 0.5, 0.5, loss.smooth / 2)
    if loss.tversky_weight:
        per_class = per_class + loss.tversky_weight * _overlap(sums, loss.tversky_alpha, loss.tversky_beta, loss.smooth)
    weights = class_weights * (sums.known > 0)
    return (per_class * weights).sum() / weights.sum().clamp(min=EPSILON)


def _overlap(sums: Sums, alpha: float, beta: float, smooth: float) -> Tensor:
    """Return 1 - Tversky index per class; alpha weighs false positives, beta false negatives.

    Source: Salehi et al. 2017, arXiv 1706.05721; alpha = beta = 1/2 is Dice.
    """
    fp, fn = sums.found - sums.tp, sums.present - sums.tp
    return 1 - (sums.tp + smooth) / (sums.tp + alpha * fp + beta * fn + smooth + EPSILON)


def _shrink(shares: MaskTargets, like: Tensor) -> MaskTargets:
    """Return which share of each voxel of coarser logits is present and known; means of means are exact."""
    size = [t // s for t, s in zip(shares.known.shape[2:], like.shape[2:], strict=True)]
    return MaskTargets(F.avg_pool3d(shares.present, size), F.avg_pool3d(shares.known, size))


def _decide(shares: MaskTargets) -> MaskTargets:
    """Return coarse targets by the rule of coarser label codes.

    A voxel is known where at least half of it is, and present where the class fills half of what is known.
    """
    known = (shares.known >= 0.5 - EPSILON).float()
    return MaskTargets((shares.present >= 0.5 * shares.known - EPSILON).float() * known, known)
