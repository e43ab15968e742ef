"""A plan: every decision of one training run."""

from __future__ import annotations

from typing import Literal

import msgspec

from autoseg.geometry import Box, NmZYX, VoxelsZYX
from autoseg.schema.facts import ClassEntry, Hardware, Probe
from autoseg.schema.records import Artifact, Record


class Reason(Record, frozen=True, kw_only=True):
    """Why one field of the plan has its value, and where that rule comes from."""

    field: str
    because: str
    source: str


class Region(Record, frozen=True, kw_only=True):
    """A crop, or a box of it in voxels of its labels."""

    crop: str
    box_zyx: tuple[VoxelsZYX, VoxelsZYX] | None = None

    def box(self, shape_zyx: VoxelsZYX) -> Box:
        """Return the box in voxels of the labels; the whole crop if none is given."""
        return Box(*self.box_zyx) if self.box_zyx else Box.whole(shape_zyx)


SplitRule = Literal["datasplit", "volumes", "crops", "box", "user"]


class Split(Record, frozen=True, kw_only=True):
    """Regions to learn from and regions to choose checkpoints by; a voxel that lies in both never teaches.

    That holds for all crops that show the same EM. A derived split has none; datasplit.csv and the user may.
    Crops take part whose labels have voxels as large as cubes of `voxel_edge_nm`, from and to; None: all.
    With cross-validation this is fold number `fold` (from 1) of `folds`: together they validate every voxel once.
    """

    train: tuple[Region, ...]
    validate: tuple[Region, ...]
    rule: SplitRule
    folds: int | None = None
    fold: int | None = None
    voxel_edge_nm: tuple[float, float] | None = None


class Network(Record, frozen=True, kw_only=True):
    """A U-shaped network, level 0 finest; `strides_zyx[i]` leads from level i to level i + 1."""

    kind: Literal["unet", "resunet", "rsunet"]
    features: tuple[int, ...]
    kernels_zyx: tuple[VoxelsZYX, ...]
    strides_zyx: tuple[VoxelsZYX, ...]
    norm: Literal["batch", "group", "instance"]
    deep_supervision: bool


class Head(Record, frozen=True, kw_only=True):
    """One output of the network: a channel for each class."""

    name: str
    classes: tuple[str, ...]


LossKind = Literal[
    "bce",
    "dice",
    "dice_bce",
    "focal",
    "focal_dice",
    "tversky",
    "weighted_ce",
    "focal_tversky",
    "combo",
    "dice_topk",
    "unified_focal",
    "per_class_tversky",
    "per_class_combo",
    "balanced_softmax",
    "seesaw",
]


class Loss(Record, frozen=True, kw_only=True):
    """A weighted sum of terms over known voxels; a kind is a named set of these weights and parameters.

    `focal_alpha` counts present voxels alpha, absent ones 1 - alpha (None: alike). `tversky_alpha` weighs false
    positives, `tversky_beta` false negatives, `tversky_exponent` is of 1 - index. `topk_share` of the known voxels of a
    sample and class are its hardest. `per_sample` takes overlap by sample and class, else over the whole batch.
    With "softmax" the classes of a group that exclude each other share probabilities with a background.
    `balance_tau` times the log of `priors` is added to the logits in training. `seesaw_*` act with softmax.
    """

    kind: LossKind
    bce_weight: float
    dice_weight: float
    focal_weight: float
    tversky_weight: float
    focal_gamma: float
    tversky_alpha: float
    tversky_beta: float
    smooth: float
    # what follows has the value of plans of earlier versions
    topk_weight: float = 0.0
    unified_weight: float = 0.0
    focal_alpha: float | None = None
    tversky_exponent: float = 1.0
    topk_share: float = 0.1
    unified_lambda: float = 0.5
    unified_delta: float = 0.6
    unified_gamma: float = 0.5
    per_sample: bool = False
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    balance_tau: float = 0.0
    priors: dict[str, float] = msgspec.field(default_factory=dict)
    seesaw_p: float = 0.0
    seesaw_q: float = 0.0


Weighting = Literal[
    "uniform",
    "manual",
    "inverse_median",
    "sqrt_inverse_median",
    "log_inverse_median",
    "effective_median",
    "inverse_max",
    "sqrt_inverse_max",
    "log_inverse_max",
    "effective_max",
    "inverse_plain",
    "class_balanced",
    "performance",
]


class Sampling(Record, frozen=True, kw_only=True):
    """How patches are drawn; shares are of all patches.

    `class_centred_fraction` of them is centred on a voxel of a class, the rest on any known voxel. Of that share every
    class that exists gets `class_floor`; what is left goes to the classes by their number of voxels to the power of
    `class_power` (0: to all alike, 0.5: by square root). The crops that hold a class take turns, whatever their size.
    A step draws from `crops_per_step` places: of one crop, class, and layer of EM chunks.
    """

    class_centred_fraction: float
    class_floor: float
    class_power: float
    crops_per_step: int


class VolumeGrey(Record, frozen=True, kw_only=True):
    """Mean and sd of the grey values of an EM volume, known again by some of its voxels.

    Without a `probe` (plans of earlier versions) it is known by its name, its dtype and the shape of one of its levels.
    """

    name: str
    dtype: str
    shape_zyx: VoxelsZYX
    mean: float
    sd: float
    probe: Probe | None = None


class Normalization(Record, frozen=True, kw_only=True):
    """Grey value to network input: by the range of the dtype, or by mean and sd of each volume.

    `volumes` are those of the planned data; a volume that is not among them is measured when it is opened.
    """

    kind: Literal["dtype", "volume"]
    volumes: tuple[VolumeGrey, ...]


class Augmentation(Record, frozen=True, kw_only=True):
    """A named set of parameters, written out.

    A `_probability` is by patch. Lengths (`elastic_*`, `*_sigma*`, `*_width`, `jitter_sd`, `misalign_max`) are in
    voxels of the patch, `drift_length` and `*_max` of sections in sections, angles in degrees; `brightness_sd`,
    `noise_sd_max`, `drift_sd`, `stripe_sd` and `section_brightness_sd` are in units of the network input;
    `brightness_sd` acts on the patches whose contrast changes, and on no others.
    `drift_*`, `stripe_*` and `jitter_*` act along `milling_axis`; what has a section in its name, `misalign_*` and
    `defocus_*` on z sections. Of all these only a misalignment by translation moves the labels, with the EM.
    """

    preset: Literal["none", "flips", "light", "fib-sem", "sstem"]
    flip: bool
    right_angles: bool
    transpose_z: bool
    rotation_probability: float
    rotation_degrees: float
    scale_probability: float
    scale_range: tuple[float, float]
    elastic_probability: float
    elastic_sigma: float
    elastic_magnitude: float
    contrast_probability: float
    contrast_range: tuple[float, float]
    brightness_sd: float
    gamma_probability: float
    gamma_range: tuple[float, float]
    noise_probability: float
    noise_sd_max: float
    blur_probability: float
    blur_sigma_range: tuple[float, float]
    milling_axis: Literal["z", "y", "x"]
    drift_probability: float
    drift_sd: float
    drift_length: float
    stripe_probability: float
    stripe_sd: float
    stripe_width: float
    jitter_probability: float
    jitter_sd: float
    missing_section_probability: float
    missing_sections_max: int
    missing_partial_share: float
    missing_area_range: tuple[float, float]
    lost_section_probability: float
    misalign_probability: float
    misalign_slip_share: float
    misalign_max: int
    defocus_probability: float
    defocus_sections_max: int
    defocus_sigma_range: tuple[float, float]
    section_contrast_probability: float
    section_contrast_range: tuple[float, float]
    section_brightness_sd: float


class Optimizer(Record, frozen=True, kw_only=True):
    """AdamW; `num_steps` None means: as many as `budget_s` allows, fixed before step 1."""

    kind: Literal["adamw"]
    learning_rate: float
    weight_decay: float
    gradient_clip_norm: float
    ema_decay: float
    num_steps: int | None


class Schedule(Record, frozen=True, kw_only=True):
    """Learning rate over steps; warm-up first."""

    kind: Literal["warmup_cosine", "one_cycle", "poly", "constant"]
    warmup_fraction: float


class SlidingWindow(Record, frozen=True, kw_only=True):
    """Inference windows, blended by a Gaussian; mirrored copies are averaged."""

    tile_zyx: VoxelsZYX
    overlap: float
    batch_size: int
    mirror_axes: tuple[Literal["z", "y", "x"], ...]
    transpose_yx: bool


class Decode(Record, frozen=True, kw_only=True):
    """Probability to label; with `tune_thresholds` the validation regions choose better ones after training."""

    thresholds: dict[str, float]
    tune_thresholds: bool


class Validation(Record, frozen=True, kw_only=True):
    """How often the validation regions are predicted whole, and which differences of their Dice are noise."""

    num_rounds: int
    tolerance: float


class Plan(Artifact, frozen=True, kw_only=True, tag="plan"):
    """Every decision of one training run, each with its reason.

    One process for each device: `batch_size`, `num_workers`, `num_threads` and `predicted_memory_bytes` are of one of
    the `num_processes`, `predicted_ram_bytes` is of all.
    """

    name: str
    fingerprint_sha256: str
    hardware: Hardware
    device: Literal["cpu", "cuda"]
    num_processes: int = 1  # plans of earlier versions
    classes: tuple[ClassEntry, ...]
    disjoint: tuple[tuple[str, ...], ...]
    split: Split
    em_voxel_size_nm: NmZYX
    voxel_size_nm: NmZYX
    patch_size_zyx: VoxelsZYX
    input_slices: int
    batch_size: int
    accumulate_batches: int
    num_workers: int
    num_threads: int
    precision: Literal["fp32", "bf16", "fp16"]
    network: Network
    heads: tuple[Head, ...]
    loss: Loss
    class_weighting: Weighting = "uniform"
    class_balance_beta: float = 0.9999
    class_weights: dict[str, float]
    sampling: Sampling
    normalization: Normalization
    init: str | None
    augmentation: Augmentation
    optimizer: Optimizer
    schedule: Schedule
    validation: Validation
    budget_s: float | None
    sliding_window: SlidingWindow
    decode: Decode
    predicted_memory_bytes: int
    predicted_ram_bytes: int
    predicted_disk_bytes: int
    predicted_step_s: float | None
    seed: int
    reasons: tuple[Reason, ...]

    @property
    def patches_per_step(self) -> int:
        """Number of patches of an optimizer step, over all micro-batches and processes."""
        return self.batch_size * self.accumulate_batches * self.num_processes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the network's channels."""
        return tuple(entry.name for entry in self.classes)
