"""How many bytes and operations one training step takes, traced without running it.

The step runs on fake tensors, which have shapes but no data, so any plan can be priced on any machine. Bytes are
affine in the batch: two traces price every batch size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from autoseg.geometry import VoxelsZYX
from autoseg.model.groups import Groups
from autoseg.model.losses import CodeTable, CodeTargets, outputs_of, supervised_loss
from autoseg.model.networks import UShape
from autoseg.schema import Loss, Network

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# CUDA context, cuDNN workspace and fragmentation are not in the trace; estimated, to be calibrated on a device.
CUDA_CONTEXT_BYTES = 600 * 2**20
CUDA_WORKSPACE_SHARE = 0.10
NUM_CODES = 256  # rows of the table of label codes
ADAMW_TENSORS = 4  # of the size of one parameter, while AdamW moves it


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


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, from their making until nothing holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


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
    """Return (peak bytes, operations a patch, parameters); AdamW's own step is added by formula, to save its trace."""
    with FakeTensorMode(), torch.device("cpu"):
        model: nn.Module = UShape(network, in_channels, num_classes, flat=patch_zyx[0] == 1)
        parameters = list(model.parameters())
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        image = torch.empty(batch, in_channels, *patch_zyx)
        codes = torch.empty(batch, *patch_zyx, dtype=torch.int64)
        table = CodeTable(torch.empty(NUM_CODES, num_classes, dtype=torch.uint8))
        weights = torch.empty(num_classes)
        outputs = outputs_of(loss, Groups((tuple(range(num_classes)),)), [0.0] * num_classes)  # one group takes most
        tracker = PeakBytes()
        tracker.hold([*parameters, *model.buffers(), *moments, image, codes])
        with tracker, FlopCounterMode(display=False) as counter:
            with torch.autocast("cpu", dtype=DTYPES[precision], enabled=precision != "fp32"):
                logits: list[Tensor] = model(image)
            loss_value = supervised_loss(logits, CodeTargets(codes, table), loss, weights, outputs=outputs)
            del logits
            loss_value.backward()  # type: ignore[no-untyped-call]
        largest = max(p.numel() * p.element_size() for p in parameters)
    peak = max(tracker.peak, tracker.now + ADAMW_TENSORS * largest)
    return int(peak), int(counter.get_total_flops() / batch), sum(p.numel() for p in parameters)
