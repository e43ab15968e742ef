"""Losses on logits and label codes, per class, over known voxels only.

Unknown voxels have exactly zero gradient and never change the value. Sums and counts are taken over the whole
batch and divided once; a class without a known voxel contributes nothing::

    loss = sum_k w_k L_k / sum_k w_k     over classes k with a known voxel in the batch

Inside a group of a softmax, L_k is the cross-entropy of the group, where a voxel of class y weighs w_y and one of the
background the mean of the group's weights, plus the overlap of the class itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from autoseg.model.groups import Groups, groups_of
from autoseg.model.softmax import Inside, Seesaw, group_sums
from autoseg.model.sums import EPSILON, Focus, Sums, Terms, voxel_sums
from autoseg.model.targets import CodeTable, CodeTargets, MaskTargets, Targets
from autoseg.schema import Loss, Plan

__all__ = ["CodeTable", "CodeTargets", "MaskTargets", "Outputs", "build_loss", "masked_loss", "supervised_loss"]

LEAST_PRIOR = 1e-4
Pool = Callable[[Sums], Sums]


def _own(sums: Sums) -> Sums:
    return sums


class Outputs(NamedTuple):
    """What the network's logits mean: sigmoids, or a softmax in each group; `shift` (classes) is added to them.

    `counts` are the voxels of each row (classes, then backgrounds) that seesaw has seen.
    """

    groups: Groups | None = None
    shift: Tensor | None = None
    counts: Tensor | None = None


SIGMOIDS = Outputs()


class PlanLoss:
    """The function (logits finest first, targets) -> scalar of a plan, and what it remembers of earlier batches."""

    def __init__(self, plan: Plan, pool: Pool) -> None:
        self._loss, self._pool = plan.loss, pool
        self._weights = torch.tensor([plan.class_weights[name] for name in plan.class_names])
        groups = groups_of(plan.classes, plan.disjoint)
        self._outputs = outputs_of(plan.loss, groups, [plan.loss.priors.get(name, 0.0) for name in plan.class_names])

    def __call__(self, logits: list[Tensor], targets: Targets) -> Tensor:
        """Return the loss of a batch."""
        device = logits[0].device
        shift, counts = (None if t is None else t.to(device) for t in (self._outputs.shift, self._outputs.counts))
        self._outputs = Outputs(self._outputs.groups, shift, counts)
        return supervised_loss(logits, targets, self._loss, self._weights.to(device), self._pool, self._outputs)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold, which is nothing for most kinds."""
        return {} if self._outputs.counts is None else {"counts": self._outputs.counts}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned; KeyError or RuntimeError if it does not fit."""
        if self._outputs.counts is not None:
            self._outputs.counts.copy_(state["counts"])


def build_loss(plan: Plan, pool: Pool = _own) -> PlanLoss:
    """Return the plan's loss; `pool` adds the sums of other processes."""
    return PlanLoss(plan, pool)


def outputs_of(loss: Loss, groups: Groups, priors: list[float]) -> Outputs:
    """Return what the logits of classes in these groups mean under a loss.

    A balanced softmax adds tau log prior to the logits in training and nothing in prediction, so that the network
    itself is as sure of rare classes as of common ones: p = prior e^z / sum prior e^z. With sigmoids it adds
    tau log (prior / (1 - prior)), which a bias of the last layer takes up: what is left is a lower threshold.
    Source: Ren et al. 2020, arXiv 2007.10740; with tau: Menon et al. 2021, arXiv 2007.07314.
    """
    softmax = loss.activation == "softmax"
    members = groups.members if softmax else tuple((k,) for k in range(len(priors)))
    shift = counts = None
    if loss.balance_tau:
        share = torch.tensor(priors, dtype=torch.float64).clamp(LEAST_PRIOR, 1 - LEAST_PRIOR)
        shift = torch.zeros_like(share)
        for group in members:
            rest = (1 - share[list(group)].sum()).clamp(min=LEAST_PRIOR)
            shift[list(group)] = loss.balance_tau * (share[list(group)] / rest).log()
    if loss.seesaw_p or loss.seesaw_q:
        counts = torch.zeros(len(priors) + len(members), dtype=torch.float64)
    return Outputs(groups if softmax else None, shift, counts)


def supervised_loss(
    logits: list[Tensor],
    targets: Targets,
    loss: Loss,
    class_weights: Tensor,
    pool: Pool = _own,
    outputs: Outputs = SIGMOIDS,
) -> Tensor:
    """Return the mean of the losses of all logits, finest first; each coarser one weighs half as much.

    The voxels of the batch are added to `outputs.counts` afterwards: seesaw goes by the batches before.
    """
    sums = _pooled_sums(logits[0], targets, loss, pool, outputs)
    total = _value(sums, loss, class_weights, outputs)
    shares: MaskTargets | None = None
    for level, out in enumerate(logits[1:], start=1):
        finer = logits[level - 1].shape[2:]
        size = [t // s for t, s in zip(finer, out.shape[2:], strict=True)]
        # means of means are exact
        shares = targets.shares(size) if shares is None else MaskTargets(*(F.avg_pool3d(t, size) for t in shares))
        total = total + 0.5**level * masked_loss(out, _decide(shares), loss, class_weights, pool, outputs)
    if outputs.counts is not None:
        outputs.counts.add_(sums.present.detach())
    return total / sum(0.5**level for level in range(len(logits)))


def masked_loss(
    logits: Tensor,
    targets: Targets,
    loss: Loss,
    class_weights: Tensor,
    pool: Pool = _own,
    outputs: Outputs = SIGMOIDS,
) -> Tensor:
    """Return the weighted mean over classes of the loss's terms; logits are (B, classes, Z, Y, X)."""
    return _value(_pooled_sums(logits, targets, loss, pool, outputs), loss, class_weights, outputs)


def _pooled_sums(logits: Tensor, targets: Targets, loss: Loss, pool: Pool, outputs: Outputs) -> Sums:
    """Return the sums over the samples of all processes."""
    terms = Terms(_focus(loss), loss.topk_share if loss.topk_weight else None, outputs.shift)
    if outputs.groups is None:
        by_sample = voxel_sums(logits, targets, terms)
    else:
        seesaw = None if outputs.counts is None else Seesaw(outputs.counts, loss.seesaw_p, loss.seesaw_q)
        by_sample = group_sums(logits, targets, Inside(outputs.groups, terms, seesaw))
    if loss.per_sample:
        pairs = (by_sample.known > 0).to(by_sample.known.dtype)
        by_sample = by_sample._replace(overlap=pairs * _overlaps(by_sample, loss), pairs=pairs)
    return pool(Sums(*(total.sum(dim=0) for total in by_sample)))


def _focus(loss: Loss) -> Focus | None:
    if loss.unified_weight:
        return Focus(loss.unified_gamma, loss.unified_delta, absent_only=True)
    return Focus(loss.focal_gamma, loss.focal_alpha) if loss.focal_weight else None


def _value(sums: Sums, loss: Loss, class_weights: Tensor, outputs: Outputs) -> Tensor:
    """Return the loss of pooled sums."""
    if outputs.groups is None:
        num_known, bce, focal = sums.known.clamp(min=1), sums.bce, sums.focal
    else:
        bce, focal, num_known = _of_groups(sums, class_weights, outputs.groups)
        sums = Sums(*(total[: len(class_weights)] for total in sums))
    per_class = torch.zeros_like(sums.known)
    if loss.bce_weight:
        per_class = per_class + loss.bce_weight * bce / num_known
    if loss.focal_weight:
        per_class = per_class + loss.focal_weight * focal / num_known
    if loss.topk_weight:
        per_class = per_class + loss.topk_weight * sums.hard / sums.hardest.clamp(min=1)
    if loss.unified_weight:
        per_class = per_class + loss.unified_weight * loss.unified_lambda / 2 * focal / num_known
    if not loss.per_sample:
        per_class = per_class + _overlaps(sums, loss)
    weights = class_weights * (sums.known > 0)
    value = (per_class * weights).sum() / weights.sum().clamp(min=EPSILON)
    if loss.per_sample:
        value = value + (class_weights * sums.overlap).sum() / (class_weights * sums.pairs).sum().clamp(min=EPSILON)
    return value


def _of_groups(sums: Sums, class_weights: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cross-entropy, focal, number of voxels) of the group of each class, weighted by the voxels' rows."""
    inside = torch.zeros(len(class_weights), len(groups.members), dtype=sums.bce.dtype)
    for g, group in enumerate(groups.members):
        inside[list(group), g] = 1
    inside = inside.to(sums.bce.device)
    weights = class_weights.to(inside.dtype)
    rows = torch.cat([inside @ inside.T * weights, inside * (weights @ inside) / inside.sum(dim=0)], dim=1)
    return rows @ sums.bce, rows @ sums.focal, (rows @ sums.present).clamp(min=EPSILON)


def _overlaps(sums: Sums, loss: Loss) -> Tensor:
    """Return the weighted overlap losses of each class, also by sample."""
    total = torch.zeros_like(sums.known)
    if loss.dice_weight:
        total = total + loss.dice_weight * _overlap(sums, 0.5, 0.5, loss.smooth / 2)
    if loss.tversky_weight:
        tversky = _overlap(sums, loss.tversky_alpha, loss.tversky_beta, loss.smooth)
        total = total + loss.tversky_weight * _power(tversky, loss.tversky_exponent)
    if loss.unified_weight:
        weights = (1 - loss.unified_delta, loss.unified_delta, loss.smooth)
        both = _overlap(_background(sums), *weights) + _power(_overlap(sums, *weights), 1 - loss.unified_gamma)
        total = total + loss.unified_weight * (1 - loss.unified_lambda) / 2 * both
    return total


def _overlap(sums: Sums, alpha: float, beta: float, smooth: float) -> Tensor:
    """Return 1 - Tversky index per class; alpha weighs false positives, beta false negatives.

    Source: Salehi et al. 2017, arXiv 1706.05721; alpha = beta = 1/2 is Dice.
    """
    fp, fn = sums.found - sums.tp, sums.present - sums.tp
    return 1 - (sums.tp + smooth) / (sums.tp + alpha * fp + beta * fn + smooth + EPSILON)


def _background(sums: Sums) -> Sums:
    """Return the sums of what is known not to be of each class."""
    tp = sums.known - sums.present - sums.found + sums.tp
    return sums._replace(tp=tp, found=sums.known - sums.found, present=sums.known - sums.present)


def _power(loss: Tensor, exponent: float) -> Tensor:
    """Return loss^exponent; below 1e-6 it is a straight line, since a root has no finite slope at 0."""
    if exponent == 1:
        return loss
    return loss.clamp(min=EPSILON) ** exponent * (loss / EPSILON).clamp(max=1)


def _decide(shares: MaskTargets) -> MaskTargets:
    """Return coarse targets by the rule of coarser label codes.

    A voxel is known where at least half of it is, and present where the class fills half of what is known.
    """
    known = (shares.known >= 0.5 - EPSILON).float()
    return MaskTargets((shares.present >= 0.5 * shares.known - EPSILON).float() * known, known)
