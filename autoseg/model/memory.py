"""How many bytes and operations one training step takes, traced without running it.

The step runs on fake tensors, which have shapes but no data, so any plan can be priced on any machine. Bytes are
affine in the batch: two traces price every batch size. MemTracker is private API of torch, used here only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from autoseg.geometry import VoxelsZYX
from autoseg.model.losses import CodeTable, CodeTargets, supervised_loss
from autoseg.model.networks import UShape
from autoseg.schema import Loss, Network

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# CUDA context, cuDNN workspace and fragmentation are not in the trace; estimated, to be calibrated on a device.
CUDA_CONTEXT_BYTES = 600 * 2**20
CUDA_WORKSPACE_SHARE = 0.10
NUM_CODES = 256  # rows of the table of label codes


class StepCost(NamedTuple):
    """Cost of one micro-batch: bytes = fixed + batch * per_patch; operations are per patch."""

    fixed_bytes: int
    patch_bytes: int
    patch_flops: int
    num_parameters: int

    def memory_bytes(self, batch_size: int, device: str) -> int:
        """Return the predicted peak of a step with that batch."""
        traced = self.fixed_bytes + batch_size * self.patch_bytes
        return traced if device == "cpu" else int(traced * (1 + CUDA_WORKSPACE_SHARE)) + CUDA_CONTEXT_BYTES


def trace_step(
    network: Network, in_channels: int, num_classes: int, patch_zyx: VoxelsZYX, precision: str, loss: Loss
) -> StepCost:
    """Trace a training step (forward, loss, backward, AdamW) of that network at batch 1 and 2."""
    one, flops, num_parameters = _trace(network, in_channels, num_classes, patch_zyx, precision, loss, 1)
    two, _, _ = _trace(network, in_channels, num_classes, patch_zyx, precision, loss, 2)
    per_patch = max(1, two - one)
    averaged_bytes = 4 * num_parameters
    return StepCost(max(0, one - per_patch) + averaged_bytes, per_patch, flops, num_parameters)


def _trace(
    network: Network,
    in_channels: int,
    num_classes: int,
    patch_zyx: VoxelsZYX,
    precision: str,
    loss: Loss,
    batch: int,
) -> tuple[int, int, int]:
    with FakeTensorMode(), torch.device("cpu"):
        model: nn.Module = UShape(network, in_channels, num_classes, flat=patch_zyx[0] == 1)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        image = torch.empty(batch, in_channels, *patch_zyx)
        codes = torch.empty(batch, *patch_zyx, dtype=torch.int64)
        table = CodeTable(torch.empty(NUM_CODES, num_classes, dtype=torch.uint8))
        weights = torch.empty(num_classes)

        def step() -> None:
            with torch.autocast("cpu", dtype=DTYPES[precision], enabled=precision != "fp32"):
                logits: list[Tensor] = model(image)
            supervised_loss(logits, CodeTargets(codes, table), loss, weights).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        with FlopCounterMode(display=False) as counter:
            step()  # also makes the state of the optimizer, which lives through the step that is tracked
        tracker = MemTracker()
        tracker.track_external(model, optimizer, image, codes)
        with tracker:
            step()
        peak = sum(counts["Total"] for counts in tracker.get_tracker_snapshot("peak").values())
        parameters = sum(p.numel() for p in model.parameters())
    return int(peak), int(counter.get_total_flops() / batch), parameters
