"""Every loss: blind to what is unknown, equal to the references where everything is known, finite everywhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import AsymmetricUnifiedFocalLoss, DiceLoss, FocalLoss, TverskyLoss
from test_planner import tiny_facts_plan
from torch import Tensor

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN
from autoseg.model import losses
from autoseg.model.groups import Groups
from autoseg.model.losses import CodeTable, CodeTargets, MaskTargets, Outputs, build_loss, outputs_of
from autoseg.plan.rules_loss import LOSS_TERMS, loss_values
from autoseg.schema import Loss

SOFTMAX = ("bce", "weighted_ce", "focal", "dice", "dice_bce", "focal_dice", "tversky")
BY_SAMPLE = ("dice", "focal_dice", "tversky", "focal_tversky", "unified_focal")
# every kind, and other forms of some: a softmax in groups of one class is a sigmoid, so the same must hold
KINDS = [*sorted(LOSS_TERMS), *(f"{kind}/softmax" for kind in SOFTMAX), *(f"{kind}/sample" for kind in BY_SAMPLE)]
WRITTEN = [
    kind for kind in KINDS if kind.split("/")[0] not in ("dice_topk", "unified_focal", "balanced_softmax", "seesaw")
]
TRUE_GRADIENT = [kind for kind in KINDS if kind != "seesaw"]  # its ratio of probabilities counts as constant
SHAPE = (2, 3, 2, 6, 6)
EVEN = torch.ones(3)


def loss_of(kind: str = "dice_bce", **changes: Any) -> Loss:
    """Return a loss as a plan would write it; after a slash stands another form of the kind."""
    kind, _, form = kind.partition("/")
    forms: dict[str, dict[str, Any]] = {"softmax": {"activation": "softmax"}, "sample": {"per_sample": True}, "": {}}
    return Loss(**(loss_values(kind) | forms[form] | changes))


def alone(loss: Loss, num_classes: int = 3) -> Outputs:
    """Return the outputs of classes that exclude no other."""
    return outputs_of(loss, Groups(tuple((k,) for k in range(num_classes))), [0.2] * num_classes)


def draw(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return random (logits, target)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=dtype) * 2
    return logits, (torch.rand(shape, generator=generator) < 0.4).to(dtype)


def mask(seed: int = 1, share: float = 0.7) -> Tensor:
    return (torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < share).float()


def masked_loss(logits: Tensor, target: Tensor, known: Tensor, loss: Loss, class_weights: Tensor) -> Tensor:
    outputs = alone(loss, logits.shape[1])
    return losses.masked_loss(logits, MaskTargets(target, known), loss, class_weights, outputs=outputs)


# ---- conformance: what holds for every kind -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_voxels_have_no_gradient_and_no_influence(kind: str) -> None:
    logits, target = draw()
    known = mask()
    logits.requires_grad_()
    value = masked_loss(logits, target, known, loss_of(kind), EVEN)
    value.backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[known == 0]) == 0
    assert torch.count_nonzero(logits.grad[known == 1]) > 0.9 * known.sum()
    other_logits = torch.where(known == 1, logits.detach(), torch.full_like(logits, 37.0))
    other_target = torch.where(known == 1, target, 1 - target)
    assert masked_loss(other_logits, other_target, known, loss_of(kind), EVEN) == value


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_equals_cutting_the_unknown_part_away(kind: str) -> None:
    logits, target = draw()
    known = torch.ones(SHAPE)
    known[..., 4:] = 0
    whole = masked_loss(logits, target, known, loss_of(kind), EVEN)
    part = masked_loss(logits[..., :4], target[..., :4], known[..., :4], loss_of(kind), EVEN)
    torch.testing.assert_close(whole, part)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_is_unknown_everywhere_adds_nothing(kind: str) -> None:
    logits, target = draw()
    known = mask()
    known[:, 1] = 0
    logits.requires_grad_()
    value = masked_loss(logits, target, known, loss_of(kind), EVEN)
    value.backward()
    rest = [0, 2]
    alone = masked_loss(logits[:, rest], target[:, rest], known[:, rest], loss_of(kind), torch.ones(2))
    torch.testing.assert_close(value, alone)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    nothing = masked_loss(logits, target, torch.zeros(SHAPE), loss_of(kind), EVEN)
    assert nothing == 0, "a batch without a known voxel"


@pytest.mark.parametrize("kind", KINDS)
def test_class_weights_are_a_weighted_mean_over_classes(kind: str) -> None:
    logits, target = draw()
    known = mask()
    single = torch.stack([masked_loss(logits, target, known, loss_of(kind), row) for row in torch.eye(3)])
    weights = torch.tensor([1.0, 3.0, 0.0])
    mixed = masked_loss(logits, target, known, loss_of(kind), weights)
    torch.testing.assert_close(mixed, (single * weights).sum() / weights.sum())
    assert single[0] != single[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_a_mean_and_does_not_grow_with_the_batch(kind: str) -> None:
    logits, target = draw()
    known = mask()
    loss = loss_of(kind, smooth=0.0)
    once = masked_loss(logits, target, known, loss, EVEN)
    twice = masked_loss(*(torch.cat([t, t]) for t in (logits, target, known)), loss, EVEN)
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [50.0, 1e4, 3e4])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_logits_keep_value_and_gradient_finite(kind: str, size: float, right: bool) -> None:
    target = draw()[1]
    logits = (size * (2 * target - 1) * (1 if right else -1)).requires_grad_()
    for gamma in (0.0, 0.5, 2.0):
        value = masked_loss(logits, target, torch.ones(SHAPE), loss_of(kind, focal_gamma=gamma), EVEN)
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all(), f"gamma {gamma}"
        assert value < 1e-3 if right else value > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_answer_costs_nothing_and_a_gradient_step_helps(kind: str) -> None:
    logits, target = draw()
    rooted = kind.startswith(("focal_tversky", "unified_focal"))
    perfect = masked_loss(60 * (2 * target - 1), target, mask(), loss_of(kind), EVEN)
    assert perfect.abs() < (1e-4 if rooted else 1e-6)
    logits.requires_grad_()
    value = masked_loss(logits, target, mask(), loss_of(kind), EVEN)
    (gradient,) = torch.autograd.grad(value, logits)
    after = masked_loss(logits - 0.5 * gradient / gradient.abs().max(), target, mask(), loss_of(kind), EVEN)
    assert after < value


@pytest.mark.parametrize("kind", TRUE_GRADIENT)
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    logits, target = draw(3, (1, 2, 1, 2, 3), torch.float64)
    known = torch.ones_like(target)
    known[..., 0] = 0
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return masked_loss(x, target, known, loss_of(kind), weights)

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_full_precision(kind: str, dtype: torch.dtype) -> None:
    shape = (1, 1, 1, 512, 512)
    logits, target = draw(0, shape)
    logits = logits.to(dtype)
    half = masked_loss(logits, target, torch.ones(shape), loss_of(kind), torch.ones(1))
    full = masked_loss(logits.float(), target, torch.ones(shape), loss_of(kind), torch.ones(1))
    assert half.dtype == torch.float32
    assert half == full


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.floats(0, 1))
def test_any_mask_gives_a_finite_value_that_is_not_negative(seed: int, kind: str, share: float) -> None:
    logits, target = draw(seed)
    value = masked_loss(logits, target, mask(seed, share), loss_of(kind), EVEN)
    assert torch.isfinite(value)
    assert value >= -1e-6


# ---- relations between kinds, and references ----------------------------------------------------------------


def test_division_is_by_the_known_voxels_of_each_class() -> None:
    logits, target = draw()
    known = mask()
    value = masked_loss(logits, target, known, loss_of("bce"), torch.tensor([0.0, 1.0, 0.0]))
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")[:, 1]
    torch.testing.assert_close(value, bce[known[:, 1] == 1].mean())


def test_focal_without_gamma_is_cross_entropy() -> None:
    logits, target = draw()
    focal = masked_loss(logits, target, mask(), loss_of("focal", focal_gamma=0.0), EVEN)
    torch.testing.assert_close(focal, masked_loss(logits, target, mask(), loss_of("bce"), EVEN))


def test_tversky_of_two_halves_is_dice_with_half_the_smoothing() -> None:
    logits, target = draw()
    halves = loss_of("tversky", tversky_alpha=0.5, tversky_beta=0.5, smooth=1.0)
    tversky = masked_loss(logits, target, mask(), halves, EVEN)
    torch.testing.assert_close(tversky, masked_loss(logits, target, mask(), loss_of("dice", smooth=2.0), EVEN))


def test_tversky_of_two_ones_is_the_jaccard_distance() -> None:
    logits, target = draw()
    known = mask()
    ones = loss_of("tversky", tversky_alpha=1.0, tversky_beta=1.0, smooth=0.0)
    probability = torch.sigmoid(logits) * known
    inside = (probability * target).sum(dim=(0, 2, 3, 4))
    union = probability.sum(dim=(0, 2, 3, 4)) + (target * known).sum(dim=(0, 2, 3, 4)) - inside
    torch.testing.assert_close(masked_loss(logits, target, known, ones, EVEN), (1 - inside / union).mean())


def test_alpha_weighs_false_positives_and_beta_false_negatives() -> None:
    target = torch.zeros(1, 1, 1, 4, 4)
    target[..., :2] = 1
    everything, nothing = torch.full_like(target, 9.0), torch.full_like(target, -3.0)

    def weigh(logits: Tensor, a: float, b: float) -> Tensor:
        loss = loss_of("tversky", tversky_alpha=a, tversky_beta=b)
        return masked_loss(logits, target, torch.ones_like(target), loss, torch.ones(1))

    assert weigh(everything, 0.9, 0.1) > weigh(everything, 0.1, 0.9)
    assert weigh(nothing, 0.9, 0.1) < weigh(nothing, 0.1, 0.9)


REFERENCES: dict[str, tuple[Loss, Any]] = {
    "dice": (loss_of("dice"), DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)),
    "tversky": (
        loss_of("tversky"),
        TverskyLoss(sigmoid=True, batch=True, alpha=0.3, beta=0.7, smooth_nr=1.0, smooth_dr=1.0),
    ),
    "focal": (loss_of("focal"), FocalLoss(gamma=2.0)),
    "bce": (loss_of("bce"), torch.nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_where_everything_is_known_it_is_the_loss_of_monai_or_torch(kind: str) -> None:
    ours, theirs = REFERENCES[kind]
    logits, target = draw()
    value = masked_loss(logits, target, torch.ones(SHAPE), ours, EVEN)
    torch.testing.assert_close(value, theirs(logits, target), rtol=1e-4, atol=1e-5)


def test_unified_focal_is_that_of_monai_on_the_class_and_its_background() -> None:
    """MONAI's takes overlap by sample, and the probabilities of two channels."""
    logits, target = draw()
    for weight, delta, gamma in ((0.5, 0.6, 0.5), (0.3, 0.7, 0.2), (1.0, 0.6, 0.5), (0.0, 0.6, 0.75)):
        fields = {"unified_lambda": weight, "unified_delta": delta, "unified_gamma": gamma, "smooth": 1e-7}
        ours = masked_loss(logits, target, torch.ones(SHAPE), loss_of("unified_focal/sample", **fields), EVEN)
        theirs = AsymmetricUnifiedFocalLoss(weight=weight, delta=delta, gamma=gamma)
        p = torch.sigmoid(logits)
        by_class = [
            theirs(torch.stack([1 - p[:, k], p[:, k]], dim=1), torch.stack([1 - target[:, k], target[:, k]], dim=1))
            for k in range(3)
        ]
        torch.testing.assert_close(ours, torch.stack(by_class).mean(), rtol=1e-4, atol=1e-5)


def test_focal_alpha_weighs_present_against_absent_and_one_half_halves() -> None:
    """As written in the paper: alpha (1 - p)^gamma for present voxels, 1 - alpha for absent ones."""
    logits, target = draw()
    known = mask()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    for alpha in (0.25, 0.9):
        weight = alpha * target + (1 - alpha) * (1 - target)
        written = (weight * (1 - torch.exp(-bce)) ** 2 * bce * known).sum(dim=(0, 2, 3, 4)) / known.sum(
            dim=(0, 2, 3, 4)
        )
        ours = masked_loss(logits, target, known, loss_of("focal", focal_alpha=alpha), EVEN)
        torch.testing.assert_close(ours, written.mean())
    half = masked_loss(logits, target, known, loss_of("focal", focal_alpha=0.5), EVEN)
    torch.testing.assert_close(2 * half, masked_loss(logits, target, known, loss_of("focal"), EVEN))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_topk_is_the_cross_entropy_of_the_hardest_known_voxels_of_each_sample_and_class(share: float) -> None:
    logits, target = draw()
    known = mask()
    loss = loss_of("dice_topk", dice_weight=0.0, topk_share=share)
    bce = F.binary_cross_entropy_with_logits(logits.requires_grad_(), target, reduction="none")
    means = []
    for k in range(3):
        hard = []
        for b in range(2):
            there = bce[b, k][known[b, k] == 1]
            hard.append(there.topk(math.ceil(share * len(there) - 1e-6)).values)
        means.append(torch.cat(hard).mean())
    ours, written = masked_loss(logits, target, known, loss, EVEN), torch.stack(means).mean()
    torch.testing.assert_close(ours, written)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (ours, written)))
    if share == 1:
        torch.testing.assert_close(ours, masked_loss(logits, target, known, loss_of("bce"), EVEN))


def test_voxels_that_are_equally_hard_share_the_places_that_are_left() -> None:
    logits = torch.zeros(1, 1, 1, 2, 10, requires_grad=True)
    loss = loss_of("dice_topk", dice_weight=0.0)
    masked_loss(logits, torch.zeros(1, 1, 1, 2, 10), torch.ones(1, 1, 1, 2, 10), loss, torch.ones(1)).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.full_like(logits, 0.5 / 20))


def test_overlap_by_sample_is_the_mean_over_pairs_with_a_known_voxel() -> None:
    logits, target = draw()
    known = mask()
    known[0, 1] = 0
    pairs = [
        masked_loss(logits[b : b + 1, k : k + 1], target[b : b + 1, k : k + 1], known[b : b + 1, k : k + 1], loss, w)
        for loss, w in [(loss_of("dice"), torch.ones(1))]
        for b, k in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2))
    ]
    torch.testing.assert_close(
        masked_loss(logits, target, known, loss_of("dice/sample"), EVEN), torch.stack(pairs).mean()
    )
    reference = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)(logits, target)
    ours = masked_loss(logits, target, torch.ones(SHAPE), loss_of("dice/sample"), EVEN)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_class_weights_that_are_all_larger_change_nothing(kind: str) -> None:
    logits, target = draw()
    weights = torch.tensor([1.0, 3.0, 0.5])
    one, seven = (masked_loss(logits, target, mask(), loss_of(kind), n * weights) for n in (1, 7))
    torch.testing.assert_close(one, seven)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 60000.0), (torch.bfloat16, 1e4), (torch.bfloat16, 1e30)])
def test_extreme_logits_of_half_precision_keep_value_and_gradient_finite(
    kind: str, dtype: torch.dtype, size: float
) -> None:
    target = draw()[1]
    signs = torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    logits = (size * signs).to(dtype).requires_grad_()
    value = masked_loss(logits, target, mask(), loss_of(kind), EVEN)
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("dice_bce", {"dice": 1, "bce": 1}),
        ("focal_dice", {"focal": 0.5, "dice": 0.5}),
        ("combo", {"bce": 0.3, "dice": 0.5, "focal": 0.2}),
        ("per_class_combo", {"bce": 0.4, "dice": 0.6}),
        ("per_class_tversky", {"tversky": 1}),
        ("weighted_ce", {"bce": 1}),
        ("focal_dice/sample", {"focal": 0.5, "dice/sample": 0.5}),
    ],
)
def test_a_compound_is_the_weighted_sum_of_its_parts(kind: str, parts: dict[str, float]) -> None:
    logits, target = draw()
    whole = masked_loss(logits, target, mask(), loss_of(kind), EVEN)
    total = sum(w * masked_loss(logits, target, mask(), loss_of(name), EVEN) for name, w in parts.items())
    torch.testing.assert_close(whole, total)


# ---- codes and levels ---------------------------------------------------------------------------------------


def test_the_code_table_says_what_each_code_means_for_each_class() -> None:
    table = CodeTable(torch.tensor([[UNKNOWN, UNKNOWN], [PRESENT, ABSENT], [ABSENT, UNKNOWN]], dtype=torch.uint8))
    target, known = CodeTargets(torch.tensor([[[[0, 1, 2]]]]), table).dense()
    assert target.shape == known.shape == (1, 2, 1, 1, 3)
    assert target[0, :, 0, 0].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert known[0, :, 0, 0].tolist() == [[0, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_codes_and_masks_of_the_same_annotation_give_the_same_loss_and_gradient(kind: str, channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    table = CodeTable(torch.randint(0, 3, (5, 3), generator=generator).to(torch.uint8))
    codes = CodeTargets(torch.randint(0, 5, (2, 1, 6, 8), generator=generator), table)
    logits = draw(0, (2, 3, 1, 6, 8))[0]
    if channels_last:
        logits = logits.squeeze(2).contiguous(memory_format=torch.channels_last).unsqueeze(2)
    found = []
    for targets in (codes, codes.dense()):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(kind)
        value = losses.masked_loss(leaf, targets, loss, torch.tensor([1.0, 2.0, 0.5]), outputs=alone(loss))
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_gradient_is_that_of_the_formula_written_out(kind: str) -> None:
    logits, target = draw(4)
    known, loss = mask(), loss_of(kind, focal_gamma=1.5)
    p, n = torch.sigmoid(logits.requires_grad_()), known.sum(dim=(0, 2, 3, 4))
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def sums(x: Tensor) -> Tensor:
        return (x * known).sum(dim=(2, 3, 4) if loss.per_sample else (0, 2, 3, 4))

    tp, fp, fn = sums(p * target), sums(p * (1 - target)), sums((1 - p) * target)
    tversky = (tp + loss.smooth) / (tp + loss.tversky_alpha * fp + loss.tversky_beta * fn + loss.smooth)
    written = (
        loss.bce_weight * (bce * known).sum(dim=(0, 2, 3, 4)) / n
        + loss.focal_weight * ((1 - torch.exp(-bce)) ** loss.focal_gamma * bce * known).sum(dim=(0, 2, 3, 4)) / n
        + loss.dice_weight * (1 - (2 * tp + loss.smooth) / (2 * tp + fp + fn + loss.smooth))
        + loss.tversky_weight * (1 - tversky) ** loss.tversky_exponent
    ).mean()
    ours = masked_loss(logits, target, known, loss, EVEN)
    torch.testing.assert_close(ours, written)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (ours, written)))


def test_coarser_levels_are_compared_with_the_same_place_and_weigh_half() -> None:
    plan = tiny_facts_plan({"class_weights": {"mito": 1.0, "pm": 1.0}})
    loss = build_loss(plan)
    logits, target = draw(0, (2, 2, 1, 8, 8))
    known = torch.ones_like(target)
    coarse = draw(1, (2, 2, 1, 4, 4))[0]
    weights = torch.ones(2)
    targets = MaskTargets(target, known)
    fine_value = masked_loss(logits, target, known, plan.loss, weights)
    filled = target.reshape(2, 2, 1, 4, 2, 4, 2).mean(dim=(4, 6))
    coarse_value = masked_loss(coarse, (filled >= 0.5).float(), torch.ones_like(coarse), plan.loss, weights)
    torch.testing.assert_close(loss([logits], targets), fine_value)
    torch.testing.assert_close(loss([logits, coarse], targets), (fine_value + 0.5 * coarse_value) / 1.5)
    unknown = known.clone()
    unknown[..., ::2, :] = 0
    unknown[..., ::2] = 0
    assert (
        loss([logits, coarse], MaskTargets(target, unknown))
        == masked_loss(logits, target, unknown, plan.loss, weights) / 1.5
    )


@given(st.integers(0, 2**31), st.floats(0.2, 1), st.floats(0.1, 0.9))
def test_every_coarser_level_is_shrunk_from_the_annotation_itself(seed: int, known_share: float, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    target, known = (rand(1, 2, 2, 8, 8) < share).float(), (rand(1, 2, 2, 8, 8) < known_share).float()
    logits = [torch.randn((1, 2, z, n, n), generator=generator) for z, n in ((2, 8), (2, 4), (1, 2))]
    loss, weights, expected = loss_of(), torch.ones(2), []
    for out in logits:
        z, n = 2 // out.shape[2], 8 // out.shape[3]
        blocks = (1, 2, 2 // z, z, 8 // n, n, 8 // n, n)
        num_present, num_known = (t.reshape(blocks).sum(dim=(3, 5, 7)) for t in (target * known, known))
        real = (2 * num_known >= z * n * n).float()
        expected.append(masked_loss(out, (2 * num_present >= num_known).float(), real, loss, weights))
    found = losses.supervised_loss(logits, MaskTargets(target, known), loss, weights)
    torch.testing.assert_close(found, (expected[0] + expected[1] / 2 + expected[2] / 4) / 1.75)
