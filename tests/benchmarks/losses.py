"""Time and memory of a loss, forward and backward: autoseg's on label codes, MONAI's, and plain masked torch.

    python tests/benchmarks/losses.py --out losses.json

Rounds alternate; the table holds medians, and ratios to autoseg's. MONAI's losses get dense targets, every voxel known,
since they know no mask by class; the plain one gets dense targets and masks. Neither pays for making them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from monai.losses import DiceCELoss, DiceFocalLoss
from rounds import stay_on_one_core
from torch import Tensor

from autoseg.model.losses import CodeTable, CodeTargets, masked_loss
from autoseg.model.memory import PeakBytes
from autoseg.plan.rules_loss import loss_values
from autoseg.schema import Loss

SHAPES = {"2D": (8, 1, 256, 256), "3D": (2, 32, 128, 128)}
NUM_CODES = 40


def plain(logits: Tensor, target: Tensor, known: Tensor, loss: Loss) -> Tensor:
    """Return the same loss as anybody would write it."""
    axes, n = (0, 2, 3, 4), known.sum(dim=(0, 2, 3, 4)).clamp(min=1)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p = torch.sigmoid(logits) * known
    voxel = bce if loss.bce_weight else (1 - torch.exp(-bce)) ** loss.focal_gamma * bce
    overlap = (p * target).sum(dim=axes)
    whole = p.sum(dim=axes) + (target * known).sum(dim=axes)
    dice = 1 - (2 * overlap + loss.smooth) / (whole + loss.smooth)
    voxels = (voxel * known).sum(dim=axes) / n
    return ((loss.bce_weight + loss.focal_weight) * voxels + loss.dice_weight * dice).mean()


def sides(
    kind: str, num_classes: int, shape: tuple[int, ...]
) -> dict[str, tuple[Tensor, list[Tensor], Callable[[], Tensor]]]:
    """Return (logits, targets, loss) of each side on the same random annotation; 2D logits are channels last."""
    generator = torch.Generator().manual_seed(0)
    batch, *box = shape
    codes = torch.randint(0, NUM_CODES, (batch, *box), generator=generator)
    states = torch.randint(0, 3, (NUM_CODES, num_classes), generator=generator).to(torch.uint8)
    targets, loss, weights = CodeTargets(codes, CodeTable(states)), Loss(**loss_values(kind)), torch.ones(num_classes)
    layout = torch.channels_last if box[0] == 1 else torch.contiguous_format
    logits = torch.randn((batch, num_classes, *box), generator=generator)
    if box[0] == 1:
        logits = logits.squeeze(2).contiguous(memory_format=layout).unsqueeze(2)
    logits.requires_grad_()
    present, known = targets.dense()
    monai = {"dice_bce": DiceCELoss, "focal_dice": DiceFocalLoss}[kind](sigmoid=True, batch=True)
    return {
        "autoseg": (logits, [codes], lambda: masked_loss(logits, targets, loss, weights)),
        "plain": (logits, [present, known], lambda: plain(logits, present, known, loss)),
        type(monai).__name__: (logits, [present], lambda: monai(logits, present)),
    }


def once(logits: Tensor, loss: Callable[[], Tensor]) -> None:
    """Take the loss and its gradient."""
    logits.grad = None
    loss().backward()


def compare(kind: str, num_classes: int, name: str, repeats: int, edge: int | None) -> dict[str, Any]:
    """Return the median seconds and the peak beyond the logits, in their bytes, of each side."""
    shape = SHAPES[name] if edge is None else (2, min(SHAPES[name][1], edge), edge, edge)
    rounds: dict[str, list[float]] = {}
    peaks = {}
    for side, (logits, given, loss) in (found := sides(kind, num_classes, shape)).items():
        once(logits, loss)
        logits.grad = None
        with PeakBytes() as tracker:
            tracker.hold([logits, *given])
            held = tracker.now
            loss().backward()
        peaks[side] = (tracker.peak - held) / logits.nbytes
    for _ in range(repeats):
        for side, (logits, _, loss) in found.items():
            began = time.perf_counter()
            once(logits, loss)
            rounds.setdefault(side, []).append(time.perf_counter() - began)
    medians = {side: statistics.median(seconds) for side, seconds in rounds.items()}
    about = {"kind": kind, "classes": num_classes, "shape": name, "batch_zyx": shape}
    return about | {"seconds": medians, "peak": peaks, "rounds": rounds}


def table(results: list[dict[str, Any]]) -> str:
    """Return the medians in Markdown: seconds, and in brackets the peak beyond the logits in their bytes."""
    lines = ["| loss | patch | classes | autoseg | plain | MONAI |", "|---|---|---|---|---|---|"]
    for r in results:
        ours, cells = r["seconds"]["autoseg"], []
        for side, seconds in r["seconds"].items():
            ratio = "" if side == "autoseg" else f", {seconds / ours:.2f} x"
            cells.append(f"{1000 * seconds:.0f} ms{ratio} ({r['peak'][side]:.2f})")
        lines.append(f"| {r['kind']} | {r['shape']} {r['batch_zyx']} | {r['classes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compare on one core, print the table and write every round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--edge", type=int, help="edge of tiny patches, to try the script")
    parser.add_argument("--out", type=Path, default=Path("losses.json"))
    options = parser.parse_args()
    stay_on_one_core()
    torch.set_num_threads(1)
    results = [
        compare(kind, num_classes, name, options.repeats, options.edge)
        for name in SHAPES
        for kind in ("dice_bce", "focal_dice")
        for num_classes in (16, 48)
    ]
    options.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
