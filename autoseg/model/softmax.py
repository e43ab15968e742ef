"""The sums of every loss inside groups of classes that exclude each other, with a gradient written by hand.

A group has a row for each of its classes and one for the background, whose logit is 0. What is known of a voxel is a
set of allowed rows A: the class that is present, else all that are unknown, and the background, unless an annotation
says that one of them is there. The cross-entropy is the marginal one::

    b = -log sum_A p = softplus(-d)     d = log sum_A e^z - log sum_not-A e^z

so where everything is allowed d is infinite, and the voxel teaches nothing. With one class it is that of a sigmoid.
A voxel counts for the row that is present, else for the background. Overlap has no background row: tp and found are
sums of p over the voxels where the class itself is known.
Source: marginal loss, Shi et al. 2021, arXiv 2007.03868.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from autoseg.model.groups import Groups
from autoseg.model.sums import Sums, Terms
from autoseg.model.targets import Targets
from autoseg.model.voxels import flat, in_a_known_layout, parts_of

LEAST_PROBABILITY = 1e-2  # of the true row, in the ratio of seesaw


class Seesaw(NamedTuple):
    """Punish a class less for taking voxels of a commoner one, more where it is thought more likely than the true one.

    z_j of a wrong row grows by log M_ij C_ij, where row i is true:
    M_ij = min(1, N_j / N_i)^p of the voxels seen so far, C_ij = max(1, p_j / p_i)^q.
    Source: Wang et al. 2021, arXiv 2008.10032.
    """

    counts: Tensor
    p: float
    q: float

    def mitigation(self, rows: Tensor) -> Tensor:
        """Return log M of some rows, (true, wrong)."""
        log_n = self.counts[rows].clamp(min=1).log()
        return (self.p * (log_n[None, :] - log_n[:, None]).clamp(max=0)).float()


class Inside(NamedTuple):
    """The groups, and what else the sums of a softmax depend on."""

    groups: Groups
    terms: Terms
    seesaw: Seesaw | None = None


class Seen(NamedTuple):
    """One part of one group: its logits with the background's, what is known, what is allowed; (rows, voxels)."""

    z_RN: Tensor
    present_GN: Tensor
    known_GN: Tensor
    allowed_RN: Tensor
    informative_N: Tensor

    def background(self) -> Tensor:
        """Return 1 where a voxel counts for the background's row."""
        return self.informative_N * (self.present_GN.amax(dim=0) == 0)


def group_sums(logits_BKZYX: Tensor, targets: Targets, inside: Inside) -> Sums:
    """Return the sums by sample and row: classes first, then the background of each group (its known is 0).

    The `present` voxels of a background are those that count for it.
    """
    made = _GroupSums.apply(logits_BKZYX, targets, inside)  # type: ignore[no-untyped-call]
    bce, focal, tp, found, background = made
    present, known = (F.pad(total.to(bce.dtype), (0, len(inside.groups.members))) for total in targets.totals())
    nothing = torch.zeros_like(known)
    return Sums(bce, focal, tp, found, present + background, known, nothing, nothing, nothing, nothing)


class _GroupSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, inside: Inside) -> tuple[Tensor, ...]:
        logits = in_a_known_layout(logits)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        num_rows = logits.shape[1] + len(inside.groups.members)
        sums = torch.zeros(5, len(logits), num_rows, dtype=dtype, device=logits.device)
        for index, _, rows, seen in _walk(logits, targets, inside, dtype):
            of_rows = torch.cat([seen.present_GN, seen.background()[None]])
            bce = _cross_entropy(_margin(seen, inside.seesaw, rows)[0], seen)
            sums[0, index, rows] += (of_rows * bce).sum(dim=1)
            if inside.terms.focus is not None:
                focal = inside.terms.focus.value(bce, seen.present_GN.amax(dim=0))
                sums[1, index, rows] += (of_rows * focal).sum(dim=1)
            p = torch.softmax(seen.z_RN, dim=0)[:-1]
            sums[2, index, rows[:-1]] += (p * seen.present_GN).sum(dim=1)
            sums[3, index, rows[:-1]] += (p * seen.known_GN).sum(dim=1)
            sums[4, index, rows[-1:]] += of_rows[-1].sum()
        ctx.save_for_backward(logits)
        ctx.targets, ctx.inside = targets, inside
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        out, inside = torch.empty_like(logits), ctx.inside
        for index, voxels, rows, seen in _walk(logits, ctx.targets, inside, gradients[0].dtype):
            by_row = [g[index, rows].unsqueeze(1) for g in gradients[:4]]
            flat(out[index])[rows[:-1], voxels] = _gradient(seen, inside, rows, by_row).to(out.dtype)
        return out, None, None


def _walk(
    logits: Tensor, targets: Targets, inside: Inside, dtype: torch.dtype
) -> Iterator[tuple[int, slice, Tensor, Seen]]:
    """Yield (sample, voxels, rows, what is seen) of each part of each group."""
    num, groups = logits.shape[1], inside.groups
    filled = [[k for k, where in groups.filled if where == g] for g in range(len(groups.members))]
    rows_of = [torch.tensor([*group, num + g], device=logits.device) for g, group in enumerate(groups.members)]
    wholes_of = [torch.tensor(wholes, dtype=torch.int64, device=logits.device) for wholes in filled]
    for index, sample in enumerate(logits):
        z_KN = flat(sample)
        for voxels in parts_of(logits):
            z = z_KN[:, voxels].to(dtype)
            if inside.terms.shift is not None:
                z = z + inside.terms.shift[:, None].to(dtype)
            present, known = targets.part(index, z, voxels=voxels)
            for rows, wholes in zip(rows_of, wholes_of, strict=True):
                columns = rows[:-1]
                yield index, voxels, rows, _see(z[columns], present[columns], known[columns], present[wholes])


def _see(z: Tensor, present: Tensor, known: Tensor, filled: Tensor) -> Seen:
    """Return what is known of a part; where a class of `filled` is present, the background is excluded."""
    named = present.amax(dim=0) > 0
    empty = ~named if not len(filled) else ~named & (filled.amax(dim=0) == 0)
    allowed = torch.cat([torch.where(named, present > 0, known == 0), empty[None]])
    informative = (allowed.any(dim=0) & ~allowed.all(dim=0)).to(z.dtype)
    return Seen(torch.cat([z, torch.zeros_like(z[:1])]), present, known, allowed, informative)


def _margin(seen: Seen, seesaw: Seesaw | None, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (d, share of each allowed row among the allowed, share of each other row among the others)."""
    nothing = torch.full_like(seen.z_RN, -torch.inf)
    z = seen.z_RN if seesaw is None else seen.z_RN + _tilt(seen, seesaw, rows)
    right, wrong = (torch.where(allowed, z, nothing) for allowed in (seen.allowed_RN, ~seen.allowed_RN))
    of_right, of_wrong = right.logsumexp(dim=0), wrong.logsumexp(dim=0)
    margin = torch.where(seen.informative_N > 0, of_right - of_wrong, torch.zeros_like(of_right))
    return margin, _shares(right, of_right), _shares(wrong, of_wrong)


def _shares(z_RN: Tensor, total_N: Tensor) -> Tensor:
    return torch.exp(z_RN - torch.where(total_N == -torch.inf, torch.zeros_like(total_N), total_N))


def _tilt(seen: Seen, seesaw: Seesaw, rows: Tensor) -> Tensor:
    """Return log M C of every wrong row where one row is true, else 0."""
    single = seen.allowed_RN.sum(dim=0) == 1
    true_N = seen.allowed_RN.to(torch.uint8).argmax(dim=0)
    log_p = torch.log_softmax(seen.z_RN, dim=0)
    of_true = log_p.gather(0, true_N[None]).clamp(min=math.log(LEAST_PROBABILITY))
    tilt = seesaw.mitigation(rows)[true_N].T + seesaw.q * (log_p - of_true).clamp(min=0)
    return tilt * (single & ~seen.allowed_RN)


def _cross_entropy(margin: Tensor, seen: Seen) -> Tensor:
    return F.softplus(-margin) * seen.informative_N


def _gradient(seen: Seen, inside: Inside, rows: Tensor, by_row: list[Tensor]) -> Tensor:
    """Return d/dz of the sums of one part, weighted by the gradients that arrive for each row."""
    d_bce, d_focal, d_tp, d_found = by_row
    of_rows = torch.cat([seen.present_GN, seen.background()[None]])
    margin, right, wrong = _margin(seen, inside.seesaw, rows)
    weight = (d_bce * of_rows).sum(dim=0)
    if inside.terms.focus is not None:
        slope = inside.terms.focus.slope(_cross_entropy(margin, seen), seen.present_GN.amax(dim=0))
        weight = weight + (d_focal * of_rows).sum(dim=0) * slope
    pull = -torch.sigmoid(-margin) * seen.informative_N * weight
    gradient = (pull * (right - wrong))[:-1]
    p = torch.softmax(seen.z_RN, dim=0)[:-1]
    d_p = d_tp[:-1] * seen.present_GN + d_found[:-1] * seen.known_GN
    return gradient + p * (d_p - (p * d_p).sum(dim=0))
