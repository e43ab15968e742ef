"""What a run leaves: checkpoints and scores."""

from __future__ import annotations

import msgspec

from autoseg.geometry import VoxelsZYX
from autoseg.schema.records import Artifact, Record


class CheckpointHeader(Artifact, frozen=True, kw_only=True, tag="checkpoint"):
    """What the tensors beside it belong to."""

    plan_sha256: str
    step: int
    mean_dice: float | None
    best_mean_dice: float | None
    best_step: int | None
    grad_scale: float | None
    grad_scale_growth: int
    sha256: dict[str, str]
    decode: TunedDecode | None = None


class TunedDecode(Artifact, frozen=True, kw_only=True, tag="decode"):
    """Thresholds that the validation regions chose for one checkpoint, and their Dice at one half and at these."""

    step: int
    thresholds: dict[str, float]
    dice_before: dict[str, float | None]
    dice_after: dict[str, float | None]


class ScoreRow(Record, frozen=True, kw_only=True):
    """Counts of voxels for one crop and class, over known voxels only, inside a box if one is given."""

    crop: str
    class_: str = msgspec.field(name="class")
    tp: int
    fp: int
    fn: int
    box_zyx: tuple[VoxelsZYX, VoxelsZYX] | None = None


class ClassScore(Record, frozen=True, kw_only=True):
    """Ratios of pooled counts; None where there is nothing to divide."""

    dice: float | None
    iou: float | None
    precision: float | None
    recall: float | None


class Scores(Artifact, frozen=True, kw_only=True, tag="scores"):
    """Counts by crop and class, and what follows from them."""

    metric: str
    rows: tuple[ScoreRow, ...]
    per_class: dict[str, ClassScore]
    mean_dice: float | None
    mean_iou: float | None
    run: str | None = None
    checkpoint: str | None = None
    data: str | None = None
    prediction: str | None = None


class WorkerTrial(Record, frozen=True, kw_only=True):
    """Training with that many loader processes: seconds of a step with its batch, and the share of it waited."""

    num_workers: int
    step_s: float
    batch_wait_fraction: float
    worker_rss_bytes: int | None


class Profile(Record, frozen=True, kw_only=True):
    """What a plan costs on one machine, measured.

    `samples_per_s` is of one loader process alone, `step_s` of a step whose batch is at hand, `batch_wait_fraction`
    of training with the plan's `num_workers`; `worker_rss_bytes` is the largest worker seen.
    """

    samples_per_s: float
    batch_wait_fraction: float
    worker_rss_bytes: int
    step_s: float
    predicted_memory_bytes: int
    measured_memory_bytes: int
    measured_by: str
    num_workers: int
    recommended_workers: int
    because: str
    trials: tuple[WorkerTrial, ...]
