"""(fingerprint, hardware, settings, scores of a run) -> Plan, a pure function: the rules in order, then the checks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from autoseg.errors import PlanError, counted
from autoseg.plan import rules_data as data
from autoseg.plan import rules_loss as loss
from autoseg.plan import rules_machine as fit
from autoseg.plan import rules_network as network
from autoseg.plan import rules_patch as patch
from autoseg.plan import rules_sampling as sampling
from autoseg.plan import rules_split
from autoseg.plan import rules_training as training
from autoseg.plan.draft import Choice, Draft, numbers
from autoseg.plan.evidence import Evidence, carried_settings
from autoseg.plan.rules_scores import advise
from autoseg.schema import (
    Augmentation,
    Fingerprint,
    Hardware,
    Head,
    Loss,
    Plan,
    check_hardware,
    check_plan,
    explain,
    nearest,
    network_contradictions,
    sha256,
)

Rule = Callable[[Draft], Choice]
MOST_ON_FEW_THREADS = 4  # processes; gloo runs them in turns
LENGTH = {"budget_s", "optimizer.num_steps"}

_LOSS_FIELDS = [name for name in Loss.__struct_fields__ if name != "kind"]
_AUGMENTATION_FIELDS = [name for name in Augmentation.__struct_fields__ if name != "preset"]

# The rules compute with these, so a value that is not positive must not reach them.
_POSITIVE = (
    "em_voxel_size_nm",
    "voxel_size_nm",
    "patch_size_zyx",
    "input_slices",
    "num_processes",
    "batch_size",
    "network.features",
    "network.kernels_zyx",
    "network.strides_zyx",
)


# In order: a rule sees only what stands above it. "resolution" and "dimensions" are no fields; others follow.
RULES: tuple[tuple[str, Rule], ...] = (
    ("seed", data.choose_seed),
    ("device", network.choose_device),
    ("num_processes", fit.choose_num_processes),
    ("precision", network.choose_precision),
    ("resolution", data.choose_resolution),
    ("classes", data.choose_classes),
    ("split", rules_split.choose_split),
    ("em_voxel_size_nm", data.choose_em_voxel_size),
    ("voxel_size_nm", data.choose_voxel_size),
    ("dimensions", patch.choose_dimensions),
    ("patch_size_zyx", patch.choose_patch_size),
    ("input_slices", patch.choose_input_slices),
    ("network.kind", network.choose_kind),
    ("network.strides_zyx", network.choose_strides),
    ("network.kernels_zyx", network.choose_kernels),
    ("network.norm", network.choose_norm),
    ("network.deep_supervision", network.choose_deep_supervision),
    ("loss.kind", loss.choose_loss),
    *((f"loss.{name}", functools.partial(loss.choose_loss_field, field=name)) for name in _LOSS_FIELDS),
    ("network.features", network.choose_features),
    ("budget_s", fit.choose_budget),
    ("batch_size", fit.choose_batch_size),
    ("accumulate_batches", fit.choose_accumulate),
    ("num_workers", fit.choose_num_workers),
    ("num_threads", fit.choose_num_threads),
    ("normalization.kind", data.choose_normalization),
    ("normalization.volumes", data.choose_volume_greys),
    ("sampling.class_centred_fraction", sampling.choose_sampling_fraction),
    ("class_weighting", loss.choose_class_weighting),
    ("class_balance_beta", loss.choose_class_balance_beta),
    ("class_weights", loss.choose_class_weights),
    ("sampling.class_floor", sampling.choose_class_floor),
    ("sampling.class_power", sampling.choose_class_power),
    ("sampling.crops_per_step", sampling.choose_crops_per_step),
    ("augmentation.preset", training.choose_preset),
    *(
        (f"augmentation.{name}", functools.partial(training.choose_augmentation_field, field=name))
        for name in _AUGMENTATION_FIELDS
    ),
    ("init", lambda _: Choice(None, "random weights", "default")),
    ("optimizer.kind", lambda _: Choice("adamw", "needs no tuning by data set", "common practice")),
    ("optimizer.learning_rate", training.choose_learning_rate),
    ("optimizer.weight_decay", training.choose_weight_decay),
    ("optimizer.gradient_clip_norm", training.choose_clip),
    ("optimizer.ema_decay", training.choose_ema),
    ("optimizer.num_steps", training.choose_num_steps),
    ("schedule.kind", training.choose_schedule),
    ("schedule.warmup_fraction", training.choose_warmup),
    ("validation.num_rounds", training.choose_validation_rounds),
    ("validation.tolerance", training.choose_tolerance),
    ("sliding_window.tile_zyx", training.choose_tile),
    ("sliding_window.overlap", training.choose_overlap),
    ("sliding_window.batch_size", training.choose_window_batch),
    ("sliding_window.mirror_axes", training.choose_mirrors),
    ("sliding_window.transpose_yx", training.choose_transpose),
    ("decode.thresholds", sampling.choose_thresholds),
    ("decode.tune_thresholds", sampling.choose_tuning),
    ("predicted_memory_bytes", fit.choose_memory),
    ("predicted_ram_bytes", fit.choose_ram),
    ("predicted_disk_bytes", fit.choose_disk),
    ("predicted_step_s", fit.choose_step_s),
)


def make_plan(
    name: str,
    fingerprint: Fingerprint,
    hardware: Hardware,
    settings: Mapping[str, Any],
    evidence: Evidence | None = None,
) -> Plan:
    """Return the plan; `settings` are typed values by dotted field, which the rules below them follow.

    With `evidence`, a scored run, what that run asks to change is decided before the rules, and after the settings.

    Raises PlanError where a setting contradicts another, or nothing fits the machine.
    """
    advice = advise(evidence, fingerprint) if evidence else {}
    asked, carried = settings, carried_settings(evidence.plan) if evidence else {}
    if LENGTH & settings.keys():  # how long is the user's to say
        advice, carried = ({f: v for f, v in found.items() if f not in LENGTH} for found in (advice, carried))
    settings = {**{f: v for f, v in carried.items() if f.removesuffix(".*") not in advice}, **settings}
    dice = {name: score.dice for name, score in evidence.scores.per_class.items()} if evidence else {}
    draft = Draft(fingerprint, hardware, settings, advice, dice)
    _check_settings(settings, hardware)
    for field, rule in RULES:
        draft.decide(field, rule(draft))
        if field == "classes":
            _check_class_settings(draft, asked)
        if field == "network.features":
            _check_network(draft)
    values = draft.nested()
    del values["dimensions"], values["resolution"]
    values |= {
        "name": settings.get("name", name),
        "fingerprint_sha256": sha256(fingerprint),
        "hardware": hardware,
        "disjoint": fingerprint.disjoint,
        "heads": (Head(name="semantic", classes=tuple(entry.name for entry in values["classes"])),),
        "reasons": tuple(draft.reasons),
    }
    try:
        plan = msgspec.convert(msgspec.to_builtins(values) | {"kind": "plan"}, Plan)
    except msgspec.ValidationError as error:
        raise PlanError(name, *explain(str(error), Plan)) from None
    check_plan(plan, name)
    return plan


def _check_settings(settings: Mapping[str, Any], hardware: Hardware) -> None:
    check_hardware(hardware, f"hardware {hardware.name}")
    if settings.get("device") == "cuda" and not hardware.gpus:
        raise PlanError(
            "device", f"cuda, and {hardware.name} has no GPU", "use cpu, or --hardware of a machine with one"
        )
    wanted, there = settings.get("num_processes", 1), len(hardware.gpus)
    if settings.get("device", "cuda" if there else "cpu") == "cuda" and wanted > there:
        what = f"{wanted}, and {hardware.name} has {counted(there, 'GPU')}: one process needs one"
        raise PlanError("num_processes", what, f"use at most {there}, or --set device=cpu")
    most = max(MOST_ON_FEW_THREADS, hardware.cpu_threads)
    if wanted > most:
        what = f"{wanted}, and {hardware.name} has {counted(hardware.cpu_threads, 'thread')}"
        raise PlanError("num_processes", what, f"use at most {most}")
    for field in _POSITIVE:
        if not all(number > 0 for number in numbers(settings.get(field, ()))):
            raise PlanError(field, f"{settings[field]} is not positive", "use at least 1")
    if len(settings.get("network.features", (1, 1))) < 2:
        raise PlanError("network.features", f"{list(settings['network.features'])}", "give at least two levels")


def _check_class_settings(draft: Draft, asked: Mapping[str, Any]) -> None:
    names = [entry.name for entry in draft["classes"]]
    for field in ("class_weights", "decode.thresholds", "loss.priors"):
        for name in asked.get(f"{field}.*", {}):
            if name not in names:
                near = nearest(name, names)
                hint = f"did you mean {near}?" if near else f"the plan has {', '.join(names)}"
                raise PlanError(f"{field}.{name}", "is not a class of this plan", hint)


def _check_network(draft: Draft) -> None:
    """Refuse a network that cannot be built; what it costs is traced before the plan is complete."""
    edges = {"patch_size_zyx": draft["patch_size_zyx"]}
    for contradiction in network_contradictions(fit.drafted_network(draft), edges):
        raise PlanError(*contradiction)
