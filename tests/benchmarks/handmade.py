"""A small 2D U-Net written by hand, without any planning: the reference that a plan has to beat at equal time.

Five levels of 16-32-64-128-128 channels, two 3x3 convolutions with batch norm and ReLU each, max pooling, nearest
upsampling, concatenated skips; one slice in, normalised by mean and deviation; batches of 8 patches of 128², half of
them around a voxel of a class drawn uniformly; right angles and flips, ±15 % contrast and brightness; BCE + batch
Dice; AdamW 3e-3 with decay 1e-2, 5 % warm-up, cosine to zero over the wall clock; whole slices predicted, cut at 0.5.

    python tests/benchmarks/handmade.py --em raw.tif --labels labels.tif --values pm=1 mito=2 \
        --grid 2 2 --train 1 2 3 --test 4 --seconds 600 --out scores.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

WIDTHS, BATCH, PATCH, RATE = (16, 32, 64, 128, 128), 8, 128, 3e-3


def double_conv(before: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(double_conv(b, w) for b, w in zip((1, *WIDTHS), WIDTHS, strict=False))
        self.up = nn.ModuleList(double_conv(a + b, a) for a, b in itertools.pairwise(WIDTHS))
        self.head = nn.Conv2d(WIDTHS[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([skips[level], F.interpolate(x, scale_factor=2.0, mode="nearest")], dim=1))
        return self.head(x)


def draw(em: np.ndarray, labels: np.ndarray, spots: list, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return one augmented patch: image (1, 128, 128) and label values (128, 128)."""
    crop = int(rng.integers(len(em)))
    z, y, x = (int(rng.integers(n)) for n in labels[crop].shape)
    if rng.random() < 0.5:
        places = spots[rng.integers(len(spots))]
        crop, z, y, x = places[rng.integers(len(places))]
    _, height, width = em[crop].shape
    y0 = int(np.clip(y - rng.integers(PATCH // 4, 3 * PATCH // 4), 0, height - PATCH))
    x0 = int(np.clip(x - rng.integers(PATCH // 4, 3 * PATCH // 4), 0, width - PATCH))
    window = (z, slice(y0, y0 + PATCH), slice(x0, x0 + PATCH))
    turns, flip = int(rng.integers(4)), rng.random() < 0.5
    image, label = (np.rot90(a[crop][window], turns) for a in (em, labels))
    image, label = (np.flip(a, 1) if flip else a for a in (image, label))
    image = image * rng.uniform(0.85, 1.15) + rng.uniform(-0.15, 0.15)
    return image[None].astype(np.float32).copy(), label.copy()


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    probability, axes = logits.sigmoid(), (0, 2, 3)
    dice = (2 * (probability * target).sum(axes) + 1) / (probability.sum(axes) + target.sum(axes) + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + (1 - dice).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--em", required=True)
    parser.add_argument("--labels", required=True)
    parser.add_argument("--values", nargs="+", required=True, metavar="CLASS=V")
    parser.add_argument("--grid", nargs=2, type=int, default=(2, 2))
    parser.add_argument("--train", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--test", nargs="+", type=int, default=(4,))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="where the CPU multiplies bf16 natively")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    values = {name: int(value) for name, value in (text.split("=") for text in options.values)}
    em, labels = tifffile.imread(options.em).astype(np.float32), tifffile.imread(options.labels)
    em = (em - em.mean()) / em.std()
    cells = [
        (slice(None), *window)
        for window in (
            tuple(slice(i * n // g, (i + 1) * n // g) for i, n, g in zip(cell, em.shape[1:], options.grid, strict=True))
            for cell in np.ndindex(*options.grid)
        )
    ]
    train = [cells[i - 1] for i in options.train]
    ems, label_crops = [em[c] for c in train], [labels[c] for c in train]
    spots = [
        np.concatenate([np.insert(np.argwhere(crop == v), 0, i, axis=1) for i, crop in enumerate(label_crops)])
        for v in values.values()
    ]
    network = UNet(len(values)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    start, steps, wanted = time.perf_counter(), 0, torch.tensor(list(values.values()))[None, :, None, None]
    while (share := (time.perf_counter() - start) / options.seconds) < 1:
        factor = share / 0.05 if share < 0.05 else 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(factor, 1e-4)
        patches = [draw(ems, label_crops, spots, rng) for _ in range(BATCH)]
        image = torch.from_numpy(np.stack([p[0] for p in patches]))
        target = (torch.from_numpy(np.stack([p[1] for p in patches]))[:, None] == wanted).float()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
            logits = network(image.contiguous(memory_format=torch.channels_last))
        loss_of(logits.float(), target).backward()
        optimizer.step()
        steps += 1
    network.eval()
    counts = np.zeros((len(values), 3))
    with torch.inference_mode():
        for cell in (cells[i - 1] for i in options.test):
            for image, label in zip(em[cell], labels[cell], strict=True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
                    found = (network(torch.from_numpy(image)[None, None])[0] > 0).numpy()
                for k, value in enumerate(values.values()):
                    truth = label == value
                    counts[k] += (found[k] & truth).sum(), (found[k] & ~truth).sum(), (~found[k] & truth).sum()
    dice = {k: round(float(2 * tp / (2 * tp + fp + fn)), 4) for k, (tp, fp, fn) in zip(values, counts, strict=True)}
    result = {"mean_dice": round(float(np.mean(list(dice.values()))), 4), "dice": dice, "steps": steps}
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
