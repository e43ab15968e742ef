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

from autoseg.data.classes import PRESENT, UNKNOWN
from autoseg.schema import Loss, Plan

EPSILON = 1e-6


class CodeTable:
    """What each global label code means for each class, as tensors on a device."""

    def __init__(self, states_CK: Tensor) -> None:
        self.present_CK = (states_CK == PRESENT).float()
        self.known_CK = (states_CK != UNKNOWN).float()

    def expand(self, codes_BZYX: Tensor) -> tuple[Tensor, Tensor]:
        """Return (target, known), both (B, classes, Z, Y, X) of 0 and 1."""
        target = self.present_CK[codes_BZYX].permute(0, 4, 1, 2, 3)
        return target, self.known_CK[codes_BZYX].permute(0, 4, 1, 2, 3)


def build_loss(plan: Plan) -> Callable[[list[Tensor], Tensor, Tensor], Tensor]:
    """Return the function (logits finest first, target, known) -> scalar."""
    weights = torch.tensor([plan.class_weights[name] for name in plan.class_names])
    return lambda logits, target, known: supervised_loss(logits, target, known, plan.loss, weights.to(target.device))


def supervised_loss(logits: list[Tensor], target: Tensor, known: Tensor, loss: Loss, class_weights: Tensor) -> Tensor:
    """Return the mean of the losses of all logits, finest first; each coarser one weighs half as much."""
    total = logits[0].new_zeros((), dtype=torch.float32)
    for level, out in enumerate(logits):
        if level > 0:
            target, known = _shrink(target, known, out)
        total = total + 0.5**level * masked_loss(out, target, known, loss, class_weights)
    return total / sum(0.5**level for level in range(len(logits)))


def masked_loss(logits: Tensor, target: Tensor, known: Tensor, loss: Loss, class_weights: Tensor) -> Tensor:
    """Return the weighted mean over classes of the loss's terms; all inputs are (B, classes, Z, Y, X)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    num_known = known.sum(dim=(0, 2, 3, 4))
    per_class = torch.zeros_like(num_known)
    if loss.bce_weight or loss.focal_weight:
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if loss.bce_weight:
            per_class = per_class + loss.bce_weight * _mean(bce, known, num_known)
        if loss.focal_weight:
            wrong = (-torch.expm1(-bce)).clamp(min=EPSILON)  # at 0 a root has no finite slope
            focal = wrong**loss.focal_gamma * bce
            per_class = per_class + loss.focal_weight * _mean(focal, known, num_known)
    if loss.dice_weight or loss.tversky_weight:
        probability = torch.sigmoid(logits) * known
        positive = target * known
        tp = (probability * positive).sum(dim=(0, 2, 3, 4))
        fp = probability.sum(dim=(0, 2, 3, 4)) - tp
        fn = positive.sum(dim=(0, 2, 3, 4)) - tp
        if loss.dice_weight:
            per_class = per_class + loss.dice_weight * _overlap(tp, fp, fn, 0.5, 0.5, loss.smooth / 2)
        if loss.tversky_weight:
            tversky = _overlap(tp, fp, fn, loss.tversky_alpha, loss.tversky_beta, loss.smooth)
            per_class = per_class + loss.tversky_weight * tversky
    weights = class_weights * (num_known > 0)
    return (per_class * weights).sum() / weights.sum().clamp(min=EPSILON)


def _mean(values: Tensor, known: Tensor, num_known: Tensor) -> Tensor:
    return (values * known).sum(dim=(0, 2, 3, 4)) / num_known.clamp(min=1)


def _overlap(tp: Tensor, fp: Tensor, fn: Tensor, alpha: float, beta: float, smooth: float) -> Tensor:
    """Return 1 - Tversky index per class; alpha weighs false positives, beta false negatives.

    Source: Salehi et al. 2017, arXiv 1706.05721; alpha = beta = 1/2 is Dice.
    """
    return 1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth + EPSILON)


def _shrink(target: Tensor, known: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return target and known on the grid of coarser logits, by the rule of coarser label codes.

    A coarse voxel is known where at least half of it is, and present where the class fills half of what is known.
    """
    size = [t // s for t, s in zip(target.shape[2:], like.shape[2:], strict=True)]
    present, real = (F.avg_pool3d(values, size) for values in (target * known, known))
    return (present >= 0.5 * real - EPSILON).float() * (real > 0), (real >= 0.5 - EPSILON).float()
