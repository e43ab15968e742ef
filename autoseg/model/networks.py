"""Networks, built from a plan out of MONAI blocks; 2D, 2.5D and anisotropic 3D are the same shape.

::

    level 0   stem ─ block ───────────────── skip ─────────────── block ─ head ─► logits, full size
                       └ stride 0 ► block ──── skip ──── block ─ up ┘ ─ head ─► logits, level 1 (deep supervision)
                                      └ stride 1 ► block ─ up ┘

`unet` blocks are two convolutions and join skips by concatenation; `resunet` adds a residual path; `rsunet` uses
pre-activation residual blocks, sums skips and upsamples by interpolation and a 1x1x1 convolution, which keeps a
constant constant (Lee et al. 2017, arXiv 1706.00120). Kernels and strides per level come from the voxel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from monai.networks.blocks.convolutions import Convolution
from monai.networks.layers.factories import Norm, Pool
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn

from autoseg.geometry import VoxelsZYX
from autoseg.schema import Network, Plan

ACTIVATION = "relu"
GROUP_CHANNELS = 8


def build_network(plan: Plan) -> nn.Module:
    """Return the plan's network: image (B, input_slices, Z, Y, X) -> list of logits (B, classes, Z, Y, X).

    The first item has the size of the predicted patch; with deep supervision coarser ones follow, finest first.
    Weights depend on `plan.seed` alone.
    """
    torch.manual_seed(plan.seed)
    return UShape(plan.network, plan.input_slices, len(plan.class_names), flat=plan.patch_size_zyx[0] == 1)


class UShape(nn.Module):
    """An encoder and a decoder with skips; `flat` networks run in 2D on patches one section thick."""

    def __init__(self, network: Network, in_channels: int, out_channels: int, *, flat: bool) -> None:
        super().__init__()
        self.flat, self.deep_supervision = flat, network.deep_supervision
        dims = 2 if flat else 3
        kernels = [kernel[-dims:] for kernel in network.kernels_zyx]
        strides = [stride[-dims:] for stride in network.strides_zyx]
        features = network.features
        self.encoder, self.pools = nn.ModuleList(), nn.ModuleList()
        self.ups, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        block = {"unet": _plain_block, "resunet": _residual_block, "rsunet": _preactivation_block}[network.kind]
        first = in_channels
        if network.kind == "rsunet":
            stem_kernel = (1, 5, 5)[-dims:]
            self.stem: nn.Module = Convolution(
                dims, in_channels, features[0], kernel_size=stem_kernel, padding=_same(stem_kernel), conv_only=True
            )
            first = features[0]
        else:
            self.stem = nn.Identity()
        for level, width in enumerate(features):
            before = first if level == 0 else features[level - 1]
            self.encoder.append(block(dims, before, width, kernels[level], network.norm))
        sums = network.kind == "rsunet"
        for level, (fine, coarse) in enumerate(pairwise(features)):
            self.pools.append(Pool["MAX", dims](kernel_size=strides[level], stride=strides[level]))
            self.ups.append(_Up(dims, coarse, fine, strides[level], sums=sums))
            joined = fine if sums else fine + coarse
            self.decoder.append(block(dims, joined, fine, kernels[level], network.norm))
        num_heads = len(features) - 1 if network.deep_supervision else 1
        for level in range(num_heads):
            self.heads.append(Convolution(dims, features[level], out_channels, kernel_size=1, conv_only=True))

    def forward(self, image_BCZYX: Tensor) -> list[Tensor]:
        """Return logits, finest first; coarser ones only in training."""
        x = image_BCZYX.squeeze(2) if self.flat else image_BCZYX
        x = self.stem(x)
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pools[level - 1](x))
            skips.append(x)
        logits: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](self.ups[level](x, skips[level]))
            if level < len(self.heads) and (level == 0 or self.training):
                out = self.heads[level](x)
                logits.insert(0, out.unsqueeze(2) if self.flat else out)
        return logits


class _Up(nn.Module):
    """Enlarge the coarse features and join the skip: summed (interpolated, 1x1x1) or concatenated (nearest)."""

    def __init__(self, dims: int, coarse: int, fine: int, stride: Sequence[int], *, sums: bool) -> None:
        super().__init__()
        self.stride, self.sums = [float(s) for s in stride], sums
        self.mode = ("bilinear" if dims == 2 else "trilinear") if sums else "nearest"
        self.project: nn.Module = (
            Convolution(dims, coarse, fine, kernel_size=1, conv_only=True, bias=False) if sums else nn.Identity()
        )

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        corners = False if self.sums else None
        coarse = F.interpolate(self.project(coarse), scale_factor=self.stride, mode=self.mode, align_corners=corners)
        return coarse + skip if self.sums else torch.cat([skip, coarse], dim=1)


def _same(kernel: Sequence[int]) -> tuple[int, ...]:
    return tuple(k // 2 for k in kernel)


def _norm(norm: str, channels: int) -> tuple[str, dict[str, object]]:
    if norm == "group":
        return Norm.GROUP, {"num_groups": math.gcd(channels, max(1, channels // GROUP_CHANNELS))}
    return norm, {"affine": True}


def _plain_block(dims: int, before: int, width: int, kernel: Sequence[int], norm: str) -> nn.Module:
    def conv(channels: int) -> nn.Module:
        layers: nn.Module = Convolution(
            dims,
            channels,
            width,
            kernel_size=kernel,
            padding=_same(kernel),
            act=ACTIVATION,
            norm=_norm(norm, width),
            bias=False,
        )
        return layers

    return nn.Sequential(conv(before), conv(width))


def _residual_block(dims: int, before: int, width: int, kernel: Sequence[int], norm: str) -> nn.Module:
    return _Residual(dims, before, width, kernel, norm)


class _Residual(nn.Module):
    """conv-norm-act-conv-norm plus the (projected) input, then act."""

    def __init__(self, dims: int, before: int, width: int, kernel: Sequence[int], norm: str) -> None:
        super().__init__()
        common = {"kernel_size": kernel, "padding": _same(kernel), "norm": _norm(norm, width), "bias": False}
        self.first = Convolution(dims, before, width, act=ACTIVATION, **common)
        self.second = Convolution(dims, width, width, act=None, **common)
        self.shortcut: nn.Module = (
            nn.Identity()
            if before == width
            else Convolution(dims, before, width, kernel_size=1, conv_only=True, bias=False)
        )
        self.act = get_act_layer(ACTIVATION)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.second(self.first(x)) + self.shortcut(x))
        return out


def _preactivation_block(dims: int, before: int, width: int, kernel: Sequence[int], norm: str) -> nn.Module:
    return _Preactivation(dims, before, width, kernel, norm)


class _Preactivation(nn.Module):
    """norm-act-conv, then (norm-act-conv twice) added to itself, then norm-act-conv."""

    def __init__(self, dims: int, before: int, width: int, kernel: Sequence[int], norm: str) -> None:
        super().__init__()

        def conv(channels: int) -> nn.Module:
            return nn.Sequential(
                get_norm_layer(_norm(norm, channels), dims, channels),
                get_act_layer("elu"),
                Convolution(
                    dims, channels, width, kernel_size=kernel, padding=_same(kernel), conv_only=True, bias=False
                ),
            )

        self.pre, self.first, self.second, self.post = conv(before), conv(width), conv(width), conv(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        x = x + self.second(self.first(x))
        out: Tensor = self.post(x)
        return out


def smallest_patch(network: Network) -> VoxelsZYX:
    """Return the edges that a patch must be a multiple of: the product of the strides along each axis."""
    z, y, x = (math.prod(stride[axis] for stride in network.strides_zyx) for axis in range(3))
    return z, y, x
