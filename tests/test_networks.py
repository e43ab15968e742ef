"""Networks of every kind and dimension: same size out, same weights from the same seed, every weight learns."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
import torch
from test_planner import tiny_facts_plan
from torch import Tensor, nn

from autoseg.geometry import VoxelsZYX
from autoseg.model.networks import UShape, build_network, smallest_patch
from autoseg.schema import Network, Plan

KINDS = ("unet", "resunet", "rsunet")
NORMS = ("batch", "group", "instance")
FLAT: dict[str, Any] = {"kernels_zyx": ((1, 3, 3),) * 3, "strides_zyx": ((1, 2, 2), (1, 2, 2))}
MIXED: dict[str, Any] = {"kernels_zyx": ((1, 3, 3), (3, 3, 3), (3, 3, 3)), "strides_zyx": ((1, 2, 2), (2, 2, 2))}
CUBIC: dict[str, Any] = {"kernels_zyx": ((3, 3, 3),) * 3, "strides_zyx": ((2, 2, 2), (2, 2, 2))}
SHAPES: dict[str, tuple[VoxelsZYX, int, dict[str, Any]]] = {
    "2d": ((1, 16, 24), 1, FLAT),
    "2.5d": ((1, 16, 24), 5, FLAT),
    "3d-flat-first": ((4, 16, 24), 1, MIXED),
    "3d-cubic": ((8, 8, 16), 1, CUBIC),
}
EVERY = list(itertools.product(KINDS, NORMS, SHAPES))
FEATURES = (4, 6, 8)
NUM_CLASSES = 3


def network_of(kind: str, norm: str, shape: str, *, deep_supervision: bool = False) -> UShape:
    patch, slices, rest = SHAPES[shape]
    record = Network(kind=kind, norm=norm, features=FEATURES, deep_supervision=deep_supervision, **rest)
    torch.manual_seed(0)
    return UShape(record, slices, NUM_CLASSES, flat=patch[0] == 1)


def image_of(shape: str, batch: int = 2) -> Tensor:
    patch, slices, _ = SHAPES[shape]
    return torch.randn((batch, slices, *patch), generator=torch.Generator().manual_seed(1))


def plan_of(kind: str, norm: str, shape: str, seed: int = 0) -> Plan:
    patch, slices, rest = SHAPES[shape]
    record = Network(kind=kind, norm=norm, features=FEATURES, deep_supervision=False, **rest)
    return msgspec.structs.replace(
        tiny_facts_plan(), network=record, patch_size_zyx=patch, input_slices=slices, seed=seed
    )


@pytest.mark.parametrize(("kind", "norm", "shape"), EVERY)
def test_logits_have_the_size_of_the_patch_and_a_channel_for_each_class(kind: str, norm: str, shape: str) -> None:
    patch = SHAPES[shape][0]
    network = network_of(kind, norm, shape)
    for batch, training in ((1, True), (2, True), (1, False), (3, False)):
        logits = network.train(training)(image_of(shape, batch))
        assert len(logits) == 1
        assert logits[0].shape == (batch, NUM_CLASSES, *patch)
        assert torch.isfinite(logits[0]).all()


@pytest.mark.parametrize(("kind", "norm", "shape"), EVERY)
def test_every_parameter_gets_a_gradient(kind: str, norm: str, shape: str) -> None:
    network = network_of(kind, norm, shape, deep_supervision=True).train()
    logits = network(image_of(shape))
    sum((out**2).sum() for out in logits).backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not torch.any(p.grad != 0)]
    # instance norm removes what a bias or scale in front of it adds; nothing else may stand still
    assert still == []


@pytest.mark.parametrize(("kind", "shape"), [(k, s) for k in KINDS for s in SHAPES])
def test_deep_supervision_gives_coarser_logits_finest_first_and_only_in_training(kind: str, shape: str) -> None:
    patch, _, rest = SHAPES[shape]
    network = network_of(kind, "group", shape, deep_supervision=True)
    logits = network.train()(image_of(shape))
    first = rest["strides_zyx"][0]
    halved = tuple(n // s for n, s in zip(patch, first, strict=True))
    assert [tuple(out.shape[2:]) for out in logits] == [patch, halved]
    alone = network.eval()(image_of(shape))
    assert [tuple(out.shape[2:]) for out in alone] == [patch]
    torch.testing.assert_close(alone[0], logits[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_a_function_of_the_seed_alone(kind: str, shape: str) -> None:
    torch.rand(7)
    first = build_network(plan_of(kind, "batch", shape)).state_dict()
    torch.rand(3)
    again = build_network(plan_of(kind, "batch", shape)).state_dict()
    other = build_network(plan_of(kind, "batch", shape, seed=1)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("shape", ["2d", "3d-flat-first", "3d-cubic"])
def test_the_upsampling_of_rsunet_keeps_a_constant_constant(shape: str) -> None:
    network = network_of("rsunet", "group", shape)
    strides = SHAPES[shape][2]["strides_zyx"]
    for up, stride, coarse, fine in zip(network.ups, strides, FEATURES[1:], FEATURES[:-1], strict=True):
        dims = 2 if network.flat else 3
        size = (4, 6, 6)[-dims:]
        skip = torch.zeros((1, fine, *(n * s for n, s in zip(size, stride[-dims:], strict=True))))
        out = up(torch.ones((1, coarse, *size)), skip)
        assert out.shape == skip.shape
        flattened = out.flatten(2)
        torch.testing.assert_close(flattened, flattened[..., :1].expand_as(flattened))
        assert flattened.abs().max() > 0


@pytest.mark.parametrize(("kind", "shape"), [(k, s) for k in KINDS for s in SHAPES])
def test_deciding_on_one_voxel_looks_at_its_surroundings(kind: str, shape: str) -> None:
    network = network_of(kind, "group", shape).eval()
    image = image_of(shape, 1).requires_grad_()
    z, y, x = (n // 2 for n in SHAPES[shape][0])
    network(image)[0][0, 0, z, y, x].backward()
    assert image.grad is not None
    seen = image.grad[0].abs().sum(dim=0) > 0
    assert seen[z, y - 2 : y + 3, x - 2 : x + 3].all()
    if SHAPES[shape][1] > 1:
        assert (image.grad[0].abs().sum(dim=(1, 2, 3)) > 0).all(), "every slice of a 2.5D input counts"


GOLDEN_PARAMETERS = {
    ("unet", "2d"): 3439,  # by hand: 196 + 564 + 1040 down, 1104 + 520 up, 15 in the head
    ("unet", "3d-cubic"): 10063,
    ("resunet", "2d"): 3639,
    ("resunet", "3d-cubic"): 10263,
    ("rsunet", "2d"): 6203,
    ("rsunet", "3d-flat-first"): 15491,
}


@pytest.mark.parametrize(("kind", "shape"), GOLDEN_PARAMETERS)
def test_the_number_of_parameters_is_the_golden_one(kind: str, shape: str) -> None:
    found = sum(p.numel() for p in network_of(kind, "batch", shape).parameters())
    assert found == GOLDEN_PARAMETERS[kind, shape]


def test_the_smallest_patch_is_the_product_of_the_strides() -> None:
    network = network_of("unet", "batch", "3d-flat-first")
    record = Network(kind="unet", norm="batch", features=FEATURES, deep_supervision=False, **MIXED)
    z, y, x = smallest_patch(record)
    assert (z, y, x) == (2, 4, 4)
    assert network.eval()(torch.zeros(1, 1, z, y, x))[0].shape[2:] == (z, y, x)


def test_a_network_is_a_module_that_torch_can_save_by_name() -> None:
    network: nn.Module = network_of("resunet", "batch", "2d")
    names = list(network.state_dict())
    assert len(names) == len(set(names))
    assert all(torch.is_tensor(value) for value in network.state_dict().values())
