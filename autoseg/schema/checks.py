"""What a plan must satisfy beyond the types of its fields; used for every plan, planned or edited by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from autoseg.errors import PlanError
from autoseg.geometry import VoxelsZYX, alike
from autoseg.schema.facts import Hardware
from autoseg.schema.plans import Network, Plan

GIB = 2**30


def check_plan(plan: Plan, where: object) -> None:
    """Raise PlanError for the first contradiction between fields, naming the field and what would fit."""
    for field, what, remedy in _contradictions(plan):
        raise PlanError(where, f"{field}: {what}", remedy)


def _contradictions(plan: Plan) -> Iterator[tuple[str, str, str]]:
    edges = {"patch_size_zyx": plan.patch_size_zyx, "sliding_window.tile_zyx": plan.sliding_window.tile_zyx}
    yield from network_contradictions(plan.network, edges)
    yield from _input(plan)
    yield from _classes(plan)
    yield from _loss(plan)
    yield from _run(plan)


def check_hardware(hardware: Hardware, where: object) -> None:
    """Raise PlanError for the first number that no machine has, naming the field and what would be right."""
    least = {"cpu_threads": 1, "ram_bytes": GIB, "shm_bytes": 0, "disk_free_bytes": 0}
    values: list[tuple[str, float | None, float]] = [
        (field, getattr(hardware, field), lowest) for field, lowest in least.items()
    ]
    for i, gpu in enumerate(hardware.gpus):
        values += [(f"gpus[{i}].memory_bytes", gpu.memory_bytes, GIB), (f"gpus[{i}].free_bytes", gpu.free_bytes, 0)]
    values += [(f"step_gflops.{name}", speed, 1e-9) for name, speed in (hardware.step_gflops or {}).items()]
    for field, value, lowest in values:
        if value is not None and value < lowest:
            remedy = f"use at least {lowest:g}"
            if field.endswith("_bytes"):
                remedy = (
                    f"give bytes: 11 GiB are {11 * GIB}"
                    if value < 2**20
                    else f"less than {lowest / GIB:g} GiB is too little"
                )
            raise PlanError(where, f"{field}: {value}", remedy)


def network_contradictions(network: Network, edges: Mapping[str, VoxelsZYX]) -> Iterator[tuple[str, str, str]]:
    """Yield (field, what, remedy) of why no such network can be built, or not for boxes of these edges by field."""
    levels, halved = len(network.features), len(network.strides_zyx)
    if levels < 2 or min(network.features) < 1:
        yield "network.features", f"{list(network.features)}", "give at least two levels of positive widths"
    elif levels != halved + 1 == len(network.kernels_zyx):
        what = f"{levels} levels, and the patch is halved {halved} times (network.strides_zyx)"
        yield "network.features", what, f"give {halved + 1} widths"
    elif len(network.kernels_zyx) != levels:
        yield (
            "network.kernels_zyx",
            f"{len(network.kernels_zyx)} kernels for {levels} levels",
            "give one for each level",
        )
    elif halved != levels - 1:
        yield "network.strides_zyx", f"{halved} strides", f"give {levels - 1}, one between two levels"
    elif any(k < 1 or k % 2 == 0 for kernel in network.kernels_zyx for k in kernel):
        yield "network.kernels_zyx", "a kernel edge is not odd", "use 1, 3, 5 or 7"
    elif any(s not in (1, 2) for stride in network.strides_zyx for s in stride):
        yield "network.strides_zyx", "a stride is neither 1 nor 2", "use 1 or 2"
    else:
        for name, box in edges.items():
            for axis, edge in enumerate(box):
                step = math.prod(stride[axis] for stride in network.strides_zyx)
                if edge < 1 or edge % step:
                    near = max(step, edge // step * step)
                    yield (
                        name,
                        f"{edge} along {'zyx'[axis]} is not a multiple of {step} (network.strides_zyx)",
                        f"use {near}",
                    )


def _input(plan: Plan) -> Iterator[tuple[str, str, str]]:
    slices = plan.input_slices
    if slices < 1 or slices % 2 == 0:
        yield "input_slices", f"{slices}", "use an odd number; 1 is no neighbours"
    if slices > 1 and plan.patch_size_zyx[0] != 1:
        yield "input_slices", f"{slices} with patch_size_zyx {list(plan.patch_size_zyx)}", "2.5D patches have z = 1"
    if (plan.patch_size_zyx[0] == 1) != (plan.sliding_window.tile_zyx[0] == 1):
        yield "sliding_window.tile_zyx", f"{list(plan.sliding_window.tile_zyx)}", "z is 1 exactly when the patch's is"
    for field, size in (("voxel_size_nm", plan.voxel_size_nm), ("em_voxel_size_nm", plan.em_voxel_size_nm)):
        if any(v <= 0 for v in size):
            yield field, f"{list(size)}", "give three positive numbers (z, y, x)"
    if plan.precision == "fp16" and plan.device == "cpu":
        yield "precision", "fp16 on the CPU", "use bf16 or fp32"
    if plan.num_processes > 1 and plan.device == "cpu" and plan.network.norm == "batch":
        what = f"batch with {plan.num_processes} processes on the CPU, each with statistics of its own"
        yield "network.norm", what, "use group or instance, or num_processes 1"
    if not 0 <= plan.sliding_window.overlap < 1:
        yield "sliding_window.overlap", f"{plan.sliding_window.overlap}", "use a share from 0 to below 1"


def _classes(plan: Plan) -> Iterator[tuple[str, str, str]]:
    names = set(plan.class_names)
    for field, keys in (("class_weights", plan.class_weights), ("decode.thresholds", plan.decode.thresholds)):
        if set(keys) != names:
            odd = sorted(names ^ set(keys))[0]
            yield field, f"{odd} is in only one of {field} and classes", "give one value for each class"
    if len(names) != len(plan.classes) or not names:
        yield "classes", f"{len(plan.classes)} entries, {len(names)} names", "list each class once, and at least one"
    if not 0 <= plan.class_balance_beta < 1:
        yield "class_balance_beta", f"{plan.class_balance_beta}", "use 0 to below 1, such as 0.999"
    if any(w < 0 for w in plan.class_weights.values()) or not any(plan.class_weights.values()):
        yield "class_weights", "no positive weight, or a negative one", "weights are 0 or positive"
    in_heads = tuple(name for head in plan.heads for name in head.classes)
    if in_heads != plan.class_names:
        yield "heads", f"hold {list(in_heads)}", f"list every class once, in order: {list(plan.class_names)}"
    if any(not 0 <= value <= 1 for value in plan.decode.thresholds.values()):
        yield "decode.thresholds", f"{plan.decode.thresholds}", "use probabilities from 0 to 1"
    if not plan.split.train:
        yield "split.train", "is empty", "train on at least one crop"
    folds, fold = plan.split.folds, plan.split.fold
    if (folds, fold) != (None, None) and (folds is None or fold is None or folds < 2 or not 1 <= fold <= folds):
        yield "split.fold", f"{fold} of {folds} folds", "give at least 2 folds, and a fold from 1 to their number"


def _loss(plan: Plan) -> Iterator[tuple[str, str, str]]:
    loss = plan.loss
    weights = [getattr(loss, name) for name in loss.__struct_fields__ if name.endswith("_weight")]
    if min(weights) < 0 or max(weights) == 0:
        yield "loss", "no positive weight, or a negative one", "give at least one term a positive weight"
    for field in ("focal_gamma", "tversky_alpha", "tversky_beta", "smooth", "balance_tau", "seesaw_p", "seesaw_q"):
        if getattr(loss, field) < 0:
            yield f"loss.{field}", f"{getattr(loss, field)}", "use 0 or more"
    for field in ("focal_alpha", "unified_lambda", "unified_delta", "unified_gamma", "topk_share"):
        if not 0 <= (getattr(loss, field) or 0) <= 1:
            yield f"loss.{field}", f"{getattr(loss, field)}", "use a share from 0 to 1"
    for field in ("tversky_exponent", "topk_share"):
        if getattr(loss, field) <= 0:
            yield f"loss.{field}", f"{getattr(loss, field)}", "use a positive number"
    yield from _terms_together(plan)


def _terms_together(plan: Plan) -> Iterator[tuple[str, str, str]]:
    loss = plan.loss
    if loss.unified_gamma == 1:
        yield "loss.unified_gamma", "1 leaves no overlap", "use 0 to below 1"
    if loss.focal_weight and loss.unified_weight:
        yield "loss.focal_weight", "beside unified_weight, which has a focal part of its own", "use one of them"
    if loss.activation == "softmax" and (loss.topk_weight or loss.unified_weight):
        yield "loss.activation", "softmax with topk_weight or unified_weight, which have no such form", "use sigmoid"
    if loss.activation == "sigmoid" and (loss.seesaw_p or loss.seesaw_q):
        yield "loss.activation", "sigmoid with seesaw_p or seesaw_q, which compare classes", "use softmax"
    if loss.balance_tau and set(loss.priors) != set(plan.class_names):
        odd = sorted(set(plan.class_names) ^ set(loss.priors))[0]
        yield "loss.priors", f"{odd} is in only one of loss.priors and classes", "give one share for each class"
    if any(not 0 <= share <= 1 for share in loss.priors.values()):
        yield "loss.priors", f"{loss.priors}", "use shares from 0 to 1"


def _run(plan: Plan) -> Iterator[tuple[str, str, str]]:
    for field, value in (
        ("num_processes", plan.num_processes),
        ("batch_size", plan.batch_size),
        ("accumulate_batches", plan.accumulate_batches),
        ("num_threads", plan.num_threads),
        ("sampling.crops_per_step", plan.sampling.crops_per_step),
        ("sliding_window.batch_size", plan.sliding_window.batch_size),
        ("optimizer.num_steps", 1 if plan.optimizer.num_steps is None else plan.optimizer.num_steps),
    ):
        if value < 1:
            yield field, f"{value}", "use at least 1"
    for field, least in (
        ("num_workers", plan.num_workers),
        ("seed", plan.seed),
        ("validation.num_rounds", plan.validation.num_rounds),
        ("validation.tolerance", plan.validation.tolerance),
        ("optimizer.weight_decay", plan.optimizer.weight_decay),
    ):
        if least < 0:
            yield field, f"{least}", "use 0 or more"
    if plan.optimizer.num_steps is None and not (plan.budget_s and plan.budget_s > 0):
        yield "optimizer.num_steps", "and budget_s are both open", "set one of them"
    if plan.optimizer.learning_rate <= 0:
        yield "optimizer.learning_rate", f"{plan.optimizer.learning_rate}", "use a positive rate"
    if plan.optimizer.gradient_clip_norm <= 0:
        yield "optimizer.gradient_clip_norm", f"{plan.optimizer.gradient_clip_norm}", "use a positive norm"
    if not 0 <= plan.sampling.class_centred_fraction <= 1:
        yield "sampling.class_centred_fraction", f"{plan.sampling.class_centred_fraction}", "use a share from 0 to 1"
    floor, most = plan.sampling.class_floor, plan.sampling.class_centred_fraction / max(1, len(plan.classes))
    if not 0 <= floor <= most * (1 + 1e-9):
        yield "sampling.class_floor", f"{floor} for each of {len(plan.classes)} classes", f"use 0 to {most:.4g}"
    if not 0 <= plan.sampling.class_power <= 1:
        yield "sampling.class_power", f"{plan.sampling.class_power}", "use 0 (all alike) to 1 (by voxels)"
    if not 0 <= plan.optimizer.ema_decay < 1:
        yield "optimizer.ema_decay", f"{plan.optimizer.ema_decay}", "use 0 (off) to below 1"
    if not 0 <= plan.schedule.warmup_fraction < 1:
        yield "schedule.warmup_fraction", f"{plan.schedule.warmup_fraction}", "use 0 to below 1"
    yield from _augmentation(plan)
    yield from _turns(plan)


def _turns(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Refuse to swap axes whose voxel sizes differ: that stretches the tissue."""
    size = plan.voxel_size_nm
    for field, swaps, axes in (
        ("augmentation.right_angles", plan.augmentation.right_angles, "yx"),
        ("augmentation.transpose_z", plan.augmentation.transpose_z, "zyx"),
        ("sliding_window.transpose_yx", plan.sliding_window.transpose_yx, "yx"),
    ):
        sizes = size[-len(axes) :]
        if swaps and not alike(*sizes):
            what = f"swaps {', '.join(axes)}, of voxels of {' x '.join(f'{v:g}' for v in sizes)} nm"
            yield field, what, "use false, or a voxel_size_nm that is the same along them"


def _augmentation(plan: Plan) -> Iterator[tuple[str, str, str]]:
    augmentation = plan.augmentation
    low, high = augmentation.scale_range
    if not 0 < low <= 1 <= high:
        yield "augmentation.scale_range", f"{low}, {high}", "the range holds 1"
    for name in augmentation.__struct_fields__:
        value = getattr(augmentation, name)
        field = f"augmentation.{name}"
        if name.endswith(("_probability", "_share")) and not 0 <= value <= 1:
            yield field, f"{value}", "use a share from 0 to 1"
        elif name.endswith("_range") and not 0 <= value[0] <= value[1]:
            yield field, f"{value[0]}, {value[1]}", "give the lower bound first, from 0"
        elif name.endswith(("_sd", "_sd_max", "_max", "_magnitude", "_width", "_length")) and value < 0:
            yield field, f"{value}", "use 0 or more"
    for name in ("missing_sections_max", "defocus_sections_max"):
        if getattr(augmentation, name) < 1:
            yield f"augmentation.{name}", f"{getattr(augmentation, name)}", "use at least 1"
    if augmentation.elastic_sigma <= 0:
        yield "augmentation.elastic_sigma", f"{augmentation.elastic_sigma}", "use a positive number of voxels"
    if augmentation.missing_area_range[1] > 1:
        yield "augmentation.missing_area_range", f"{augmentation.missing_area_range[1]}", "a share is at most 1"
