"""The softmax form of the losses: exclusive classes, a background, partial annotation, priors, seesaw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceLoss, TverskyLoss
from test_losses import SOFTMAX, loss_of
from torch import Tensor

from autoseg.model import losses
from autoseg.model.groups import Groups
from autoseg.model.losses import CodeTable, CodeTargets, MaskTargets, Outputs, outputs_of
from autoseg.schema import Loss

KINDS = [*(f"{kind}/softmax" for kind in SOFTMAX), "balanced_softmax", "seesaw"]
SHAPE = (2, 3, 2, 6, 6)
EVEN = torch.ones(3)
ONE = Groups(((0, 1, 2),))
TWO = Groups(((0, 2), (1,)))
PRIORS = [0.3, 0.1, 0.05]


def draw(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits, labels with 0 as background, target with one channel a class)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE, generator=generator, dtype=dtype) * 2
    labels = torch.randint(0, 4, (2, 2, 6, 6), generator=generator)
    return logits, labels, F.one_hot(labels, 4).movedim(-1, 1)[:, 1:].to(dtype)


def partial(seed: int = 1, share: float = 0.6) -> Tensor:
    """Return which classes are known: of a present class all, elsewhere any of them."""
    target = draw()[2]
    known = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < share).float()
    return torch.where((target * known).amax(dim=1, keepdim=True) > 0, torch.ones(SHAPE), known)


def value_of(logits: Tensor, target: Tensor, known: Tensor, loss: Loss, **rest: Any) -> Tensor:
    """Return the loss of one group, or of other `groups`."""
    outputs = outputs_of(loss, rest.get("groups", ONE), PRIORS)
    if outputs.counts is not None:
        outputs.counts[:4] = torch.tensor([500.0, 20.0, 7.0, 900.0])
    return losses.masked_loss(
        logits, MaskTargets(target, known), loss, rest.get("weights", EVEN), outputs=rest.get("outputs", outputs)
    )


def with_background(logits: Tensor) -> Tensor:
    """Return logits of background and classes, as references want them."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)


# ---- conformance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [ONE, TWO])
def test_a_voxel_of_which_nothing_is_known_has_no_gradient_and_no_influence(kind: str, groups: Groups) -> None:
    logits, _, target = draw()
    known = partial()
    blind = torch.rand((2, 1, 2, 6, 6), generator=torch.Generator().manual_seed(7)) < 0.3
    known = torch.where(blind, torch.zeros(SHAPE), known)
    blind = (known.amax(dim=1, keepdim=True) == 0).expand(SHAPE)
    leaf = logits.clone().requires_grad_()
    value = value_of(leaf, target, known, loss_of(kind), groups=groups)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert torch.count_nonzero(gradient[blind]) == 0
    assert torch.isfinite(gradient).all()
    other = torch.where(blind, torch.full_like(logits, 37.0), logits)
    assert value_of(other, torch.where(blind, 1 - target, target), known, loss_of(kind), groups=groups) == value


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_equals_cutting_the_unknown_part_away(kind: str) -> None:
    logits, _, target = draw()
    known = partial()
    known[..., 4:] = 0
    whole = value_of(logits, target, known, loss_of(kind))
    torch.testing.assert_close(whole, value_of(*(t[..., :4] for t in (logits, target, known)), loss_of(kind)))
    assert value_of(logits, target, torch.zeros(SHAPE), loss_of(kind)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_is_unknown_everywhere_adds_nothing(kind: str) -> None:
    logits, _, target = draw()
    known = torch.ones(SHAPE)
    known[:, 1] = 0
    leaf = logits.clone().requires_grad_()
    value = value_of(leaf, target, known, loss_of(kind), groups=TWO)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert torch.count_nonzero(gradient[:, 1]) == 0
    assert torch.isfinite(gradient).all()
    other = logits.clone()
    other[:, 1] = 9.0
    assert value_of(other, target, known, loss_of(kind), groups=TWO) == value


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "seesaw"])
@pytest.mark.parametrize("groups", [ONE, TWO])
def test_the_gradient_is_that_of_finite_differences(kind: str, groups: Groups) -> None:
    logits, _, target = (t[:, :, :1, :2, :3].double() if t.ndim == 5 else t for t in draw(3))
    known, weights = partial()[:, :, :1, :2, :3].double(), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: value_of(x, target, known, loss_of(kind), groups=groups, weights=weights), logits.requires_grad_()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 60000.0), (torch.bfloat16, 1e30), (torch.float32, 50.0)])
def test_extreme_logits_keep_value_and_gradient_finite(kind: str, dtype: torch.dtype, size: float) -> None:
    target = draw()[2]
    signs = torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    logits = (size * signs).to(dtype).requires_grad_()
    value = value_of(logits, target, partial(), loss_of(kind))
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_codes_and_masks_of_the_same_annotation_give_the_same(kind: str, channels_last: bool) -> None:
    states = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [2, 0, 2], [2, 2, 2]], dtype=torch.uint8)
    codes = torch.randint(0, 6, (2, 1, 6, 8), generator=torch.Generator().manual_seed(3))
    targets, loss, found = CodeTargets(codes, CodeTable(states)), loss_of(kind), []
    logits = torch.randn((2, 3, 1, 6, 8), generator=torch.Generator().manual_seed(4))
    if channels_last:
        logits = logits.squeeze(2).contiguous(memory_format=torch.channels_last).unsqueeze(2)
    for each in (targets, targets.dense()):
        leaf = logits.clone().requires_grad_()
        value = losses.supervised_loss([leaf], each, loss, EVEN, outputs=outputs_of(loss, TWO, PRIORS))
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- references ---------------------------------------------------------------------------------------------


def test_where_everything_is_known_it_is_the_weighted_cross_entropy_of_torch() -> None:
    logits, labels, target = draw()
    weights = torch.tensor([1.0, 4.0, 2.5])
    every = torch.cat([weights.mean()[None], weights])
    for w, all_w in ((EVEN, torch.ones(4)), (weights, every)):
        ours = value_of(logits, target, torch.ones(SHAPE), loss_of("weighted_ce/softmax"), weights=w)
        torch.testing.assert_close(ours, F.cross_entropy(with_background(logits), labels, weight=all_w))


def test_focal_is_that_of_the_paper_for_several_classes() -> None:
    logits, labels, target = draw()
    p = torch.softmax(with_background(logits), dim=1).gather(1, labels[:, None])
    for gamma in (0.0, 2.0):
        loss = loss_of("focal/softmax", focal_gamma=gamma)
        ours = value_of(logits, target, torch.ones(SHAPE), loss)
        torch.testing.assert_close(ours, (-((1 - p) ** gamma) * p.log()).mean())


@pytest.mark.parametrize("kind", ["dice", "tversky"])
def test_overlap_is_that_of_monai_without_the_background(kind: str) -> None:
    logits, _, target = draw()
    common = {"softmax": True, "include_background": False, "batch": True, "smooth_nr": 1.0, "smooth_dr": 1.0}
    theirs = DiceLoss(**common) if kind == "dice" else TverskyLoss(alpha=0.3, beta=0.7, **common)
    ours = value_of(logits, target, torch.ones(SHAPE), loss_of(f"{kind}/softmax"))
    background = 1 - target.sum(dim=1, keepdim=True)
    expected = theirs(with_background(logits), torch.cat([background, target], dim=1))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**31), st.floats(0.1, 1))
def test_partial_annotation_is_minus_log_of_the_probability_of_what_is_allowed(seed: int, share: float) -> None:
    logits, _, target = draw(seed % 100)
    known = partial(seed, share)
    target = target * known
    named = target.amax(dim=1, keepdim=True) > 0
    allowed = torch.cat([~named, torch.where(named, target > 0, known == 0)], dim=1)
    leaf = logits.clone().requires_grad_()
    p = torch.softmax(with_background(leaf), dim=1)
    marginal = -torch.log((p * allowed).sum(dim=1))
    told = ~allowed.all(dim=1)
    if not (told.any() and (known.sum(dim=(0, 2, 3, 4)) > 0).all()):
        return
    written = marginal[told].mean()
    ours = value_of(leaf, target, known, loss_of("bce/softmax"))
    torch.testing.assert_close(ours, written, rtol=1e-4, atol=1e-5)
    found = [torch.autograd.grad(value, leaf)[0] for value in (ours, written)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_where_a_whole_is_present_one_of_its_parts_is_and_not_the_background() -> None:
    """Classes 0 and 1 are all parts of class 2; a contradiction teaches nothing."""
    groups = Groups(((0, 1), (2,)), filled=((2, 0),))
    logits = torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1, 1).requires_grad_()
    states = torch.tensor([[0, 2, 1], [2, 2, 1], [2, 2, 0], [0, 0, 1], [0, 2, 2]], dtype=torch.uint8)
    p = torch.softmax(torch.tensor([1.0, -2.0, 0.0]), dim=0)
    for code, probability in enumerate([p[1], p[0] + p[1], torch.tensor(1.0), torch.tensor(1.0), p[1] + p[2]]):
        targets = CodeTargets(torch.full((1, 1, 1, 1), code), CodeTable(states))
        sums = losses._pooled_sums(logits, targets, loss_of("bce/softmax"), losses._own, Outputs(groups))
        row = sums.bce[:2].sum() + sums.bce[3]
        torch.testing.assert_close(row, -probability.log(), rtol=1e-5, atol=1e-6)
        assert torch.isfinite(
            losses.masked_loss(logits, targets, loss_of("bce/softmax"), torch.tensor([1.0, 1.0, 0.0]))
        )


# ---- priors and seesaw --------------------------------------------------------------------------------------


def test_balanced_softmax_is_cross_entropy_of_logits_and_log_priors() -> None:
    logits, labels, target = draw()
    for tau in (0.5, 1.0, 2.0):
        loss = loss_of("balanced_softmax", balance_tau=tau)
        prior = torch.tensor([1 - sum(PRIORS), *PRIORS]).log().reshape(1, 4, 1, 1, 1)
        expected = F.cross_entropy(with_background(logits) + tau * prior, labels)
        torch.testing.assert_close(value_of(logits, target, torch.ones(SHAPE), loss), expected)
    even = outputs_of(loss_of("balanced_softmax"), ONE, [0.25] * 3)
    torch.testing.assert_close(
        value_of(logits, target, torch.ones(SHAPE), loss_of("balanced_softmax"), outputs=even),
        value_of(logits, target, torch.ones(SHAPE), loss_of("bce/softmax")),
    )


def written_seesaw(z: Tensor, labels: Tensor, counts: Tensor, p: float, q: float) -> Tensor:
    """Return the seesaw loss as in the paper: logits (voxels, rows), one true row each."""
    onehot = F.one_hot(labels, z.shape[1])
    ratio = counts.clamp(min=1)[None, :] / counts.clamp(min=1)[:, None]
    mitigation = torch.where(ratio < 1, ratio**p, torch.ones_like(ratio))[labels]
    scores = torch.softmax(z.detach(), dim=1)
    score_ratio = scores / scores.gather(1, labels[:, None]).clamp(min=1e-2)
    compensation = torch.where(score_ratio > 1, score_ratio**q, torch.ones_like(score_ratio))
    return F.cross_entropy(z + (mitigation * compensation).log() * (1 - onehot), labels)


@pytest.mark.parametrize(("p", "q"), [(0.8, 2.0), (1.2, 0.0), (0.0, 4.0)])
def test_seesaw_is_that_of_the_paper(p: float, q: float) -> None:
    logits, labels, target = draw()
    logits.requires_grad_()
    ours = value_of(logits, target, torch.ones(SHAPE), loss_of("seesaw", seesaw_p=p, seesaw_q=q))
    z = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1).movedim(1, -1).reshape(-1, 4)
    rows = (labels.flatten() + 3) % 4  # the background's row is the last
    written = written_seesaw(z, rows, torch.tensor([500.0, 20.0, 7.0, 900.0]), p, q)
    torch.testing.assert_close(ours, written)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (ours, written)))


def test_seesaw_counts_the_voxels_of_each_row_once_a_batch_and_goes_by_the_batches_before() -> None:
    logits, labels, target = draw()
    loss, coarse = loss_of("seesaw"), torch.randn(2, 3, 2, 3, 3)
    outputs = outputs_of(loss, ONE, PRIORS)
    targets = MaskTargets(target, torch.ones(SHAPE))
    first = losses.supervised_loss([logits, coarse], targets, loss, EVEN, outputs=outputs)
    assert outputs.counts is not None
    assert outputs.counts.tolist() == [*torch.bincount(labels.flatten())[1:].tolist(), int((labels == 0).sum())]
    assert losses.supervised_loss([logits, coarse], targets, loss, EVEN, outputs=outputs) != first
    assert outputs.counts.sum() == 2 * labels.numel()
