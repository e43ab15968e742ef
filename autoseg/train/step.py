"""One optimizer step, and everything that a checkpoint must hold to repeat it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from autoseg.model.losses import CodeTable, CodeTargets, build_loss
from autoseg.model.networks import build_network
from autoseg.model.windows import autocast
from autoseg.schema import Plan, StepResult
from autoseg.train.patches import Batch
from autoseg.train.schedule import rate_factor
from autoseg.train.team import ALONE, Team


class Learner:
    """Network, averaged network, optimizer and scaler of one run on one device, in step with those of its team."""

    def __init__(self, plan: Plan, num_steps: int, device: torch.device, team: Team = ALONE) -> None:
        self.plan, self.num_steps, self.device, self._team = plan, num_steps, device, team
        layout = torch.channels_last if plan.patch_size_zyx[0] == 1 else torch.contiguous_format
        network = build_network(plan)
        if team.size > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        self.network = network.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self.averaged: dict[str, Tensor] = {}
        self.reset_average()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=plan.optimizer.learning_rate, weight_decay=plan.optimizer.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
        self._loss = build_loss(plan, team.pool)

    def step(self, step: int, batch: Batch) -> StepResult:
        """Do optimizer step `step` (from 0), micro-batch by micro-batch; without finite gradients it is skipped."""
        rate = self.plan.optimizer.learning_rate * rate_factor(self.plan.schedule, step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        total = 0.0
        table = CodeTable(batch.states_CK.to(self.device))
        images = torch.split(batch.image_BCZYX, self.plan.batch_size)
        for image, codes in zip(images, torch.split(batch.codes_BZYX, self.plan.batch_size), strict=True):
            loss = self._forward(image, codes, table) / len(images)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self._team.add_up_gradients(self.network)
        self.scaler.unscale_(self.optimizer)
        parameters = self.network.parameters()
        norm = float(nn.utils.clip_grad_norm_(parameters, self.plan.optimizer.gradient_clip_norm))
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if finite:
            self._average(step)
        else:  # the forward pass has already put NaN into the running statistics of batch norm
            for buffer, value in zip(self.network.buffers(), statistics, strict=True):
                buffer.copy_(value)
        return StepResult(total, norm, rate, not finite)

    def _forward(self, image: Tensor, codes: Tensor, table: CodeTable) -> Tensor:
        with autocast(self.plan, self.device):
            logits = self.network(image.to(self.device, non_blocking=True))
        return self._loss(logits, CodeTargets(codes.to(self.device, non_blocking=True).long(), table))

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Move the averaged weights; early on the average spans only the steps there were."""
        decay = min(self.plan.optimizer.ema_decay, (step + 1) / (step + 10))
        now = self.network.state_dict()
        real = [name for name, value in now.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.averaged[name] for name in real], [now[name] for name in real], 1 - decay)
        for name in now.keys() - real:
            self.averaged[name].copy_(now[name])

    def reset_average(self) -> None:
        """Let the average start from the network as it is."""
        self.averaged = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def averaged_network(self) -> nn.Module:
        """Return a network with the averaged weights, ready for inference."""
        network: nn.Module = copy.deepcopy(self.network)
        network.load_state_dict(self.averaged)
        network.eval()
        return network

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that resuming needs beside the averaged weights."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
        return tensors | {f"loss.{name}": value for name, value in self._loss.state().items()}

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned; tensors that do not fit raise RuntimeError or KeyError."""
        self.averaged = {name: value.to(self.device) for name, value in weights.items()}
        self.network.load_state_dict(_under(state, "network."))
        self._loss.restore(_under(state, "loss."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(state, "optimizer.").items():
            index, key = name.split(".", 1)
            moments.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def make_step(plan: Plan, device: torch.device | str, num_steps: int = 1000) -> Callable[[Batch], StepResult]:
    """Return the function that takes a batch through forward, loss, backward and optimizer of a fresh network."""
    learner = Learner(plan, num_steps, torch.device(device))
    steps = itertools.count()
    return lambda batch: learner.step(min(next(steps), num_steps - 1), batch)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
