"""Rules for the course of training and for inference: augmentation, optimizer, schedule, windows."""

from __future__ import annotations

import re
from typing import Any

from autoseg.geometry import alike
from autoseg.plan.draft import Choice, Draft
from autoseg.plan.rules_patch import ANISOTROPY_OF_SECTIONS

_NONE: dict[str, Any] = {
    "flip": False,
    "right_angles": False,
    "transpose_z": False,
    "rotation_probability": 0.0,
    "rotation_degrees": 180.0,
    "scale_probability": 0.0,
    "scale_range": (0.7, 1.4),
    "elastic_probability": 0.0,
    "elastic_sigma": 12.0,
    "elastic_magnitude": 4.0,
    "contrast_probability": 0.0,
    "contrast_range": (0.85, 1.15),
    "brightness_sd": 0.0,
    "gamma_probability": 0.0,
    "gamma_range": (0.7, 1.4),
    "noise_probability": 0.0,
    "noise_sd_max": 0.1,
    "blur_probability": 0.0,
    "blur_sigma_range": (0.5, 1.0),
    "milling_axis": "z",
    "drift_probability": 0.0,
    "drift_sd": 0.2,
    "drift_length": 8.0,
    "stripe_probability": 0.0,
    "stripe_sd": 0.15,
    "stripe_width": 2.0,
    "jitter_probability": 0.0,
    "jitter_sd": 0.5,
    "missing_section_probability": 0.0,
    "missing_sections_max": 2,
    "missing_partial_share": 0.5,
    "missing_area_range": (0.25, 0.75),
    "lost_section_probability": 0.0,
    "misalign_probability": 0.0,
    "misalign_slip_share": 0.3,
    "misalign_max": 8,
    "defocus_probability": 0.0,
    "defocus_sections_max": 2,
    "defocus_sigma_range": (1.0, 3.0),
    "section_contrast_probability": 0.0,
    "section_contrast_range": (0.8, 1.25),
    "section_brightness_sd": 0.15,
}
# The presets are written for input of sd 1; input by dtype has another sd, and these follow it.
_IN_UNITS_OF_INPUT = ("brightness_sd", "noise_sd_max", "drift_sd", "stripe_sd", "section_brightness_sd")
_FLIPS = _NONE | {"flip": True, "right_angles": True}
_LIGHT = _FLIPS | {"contrast_probability": 1.0, "brightness_sd": 0.15}
PRESETS: dict[str, dict[str, Any]] = {
    "none": _NONE,
    "flips": _FLIPS,
    "light": _LIGHT,
    "fib-sem": _LIGHT
    | {
        "rotation_probability": 0.2,
        "scale_probability": 0.2,
        "contrast_range": (0.75, 1.25),
        "gamma_probability": 0.2,
        "noise_probability": 0.2,
        "blur_probability": 0.2,
        "drift_probability": 0.2,
        "stripe_probability": 0.1,
        "jitter_probability": 0.1,
    },
    "sstem": _LIGHT
    | {
        "rotation_probability": 0.2,
        "scale_probability": 0.2,
        "elastic_probability": 0.1,
        "contrast_range": (0.75, 1.25),
        "gamma_probability": 0.2,
        "noise_probability": 0.2,
        "blur_probability": 0.1,
        "missing_section_probability": 0.05,
        "lost_section_probability": 0.05,
        "misalign_probability": 0.1,
        "defocus_probability": 0.1,
        "section_contrast_probability": 0.2,
    },
}


def choose_preset(draft: Draft) -> Choice:
    """Return the named augmentation."""
    z, y, x = draft["voxel_size_nm"]
    if draft["budget_s"] is not None and draft["budget_s"] < 300 and draft["device"] == "cpu":
        return Choice(
            "light",
            "a run under 5 minutes: strong augmentation scored .007 less on VNC, within noise",
            "a prototype, once, 3 minutes",
        )
    if z / min(y, x) >= ANISOTROPY_OF_SECTIONS:
        return Choice(
            "sstem",
            f"{z:g} nm sections: grey values vary from one to the next",
            "nnU-Net's shares; defects after DeepEM and PyTorch Connectomics, milder",
        )
    because = "near-isotropic voxels: noise, blur, drift, stripes and jitter, any orientation"
    return Choice("fib-sem", because, "nnU-Net's shares; defects of milling, unmeasured")


def choose_augmentation_field(draft: Draft, field: str) -> Choice:
    """Return one parameter of the preset."""
    preset = draft["augmentation.preset"]
    value = PRESETS[preset][field]
    z, y, x = draft["voxel_size_nm"]
    if field == "transpose_z" and preset == "fib-sem":
        solid = draft["patch_size_zyx"][0] > 1
        because = f"preset {preset}: " + (f"solid patches of {z:g}x{y:g}x{x:g} nm" if solid else "flat patches")
        return Choice(solid and alike(z, y, x), because, "augmentation.preset")
    if field == "right_angles" and value and not alike(y, x):
        because = f"voxels of {y:g} x {x:g} nm in the plane: a right angle would stretch tissue"
        return Choice(False, because, "voxel_size_nm")
    if field in _IN_UNITS_OF_INPUT and draft["normalization.kind"] == "dtype":
        sd = _input_sd(draft)
        return Choice(value * sd, f"preset {preset}, of input of sd {sd:.3g}", "augmentation.preset")
    return Choice(value, f"preset {preset}", "augmentation.preset")


def _input_sd(draft: Draft) -> float:
    """Return the mean sd of the volumes as a share of the range of their dtype."""
    shares = []
    for volume in draft.fingerprint.volumes:
        if volume.intensity is None:
            continue
        bits = int(re.sub(r"\D", "", volume.dtype) or 0)
        shares.append(volume.intensity.sd / (2.0**bits - 1) if "int" in volume.dtype and bits else 1.0)
    return sum(shares) / len(shares) if shares else 0.2


def choose_learning_rate(draft: Draft) -> Choice:
    """Return the peak learning rate."""
    if draft["device"] == "cpu" and draft["dimensions"] != "3d":
        return Choice(3e-3, "small batch-normalised networks and short runs", "unmeasured; a hand-made recipe's")
    patches = draft["batch_size"] * draft["accumulate_batches"] * draft["num_processes"]
    because = f"AdamW with warm-up; the same for any number of patches a step, here {patches}"
    return Choice(1e-3, because, "common in EM (BANIS, DeepEM); not scaled with the batch, unmeasured")


def choose_weight_decay(_: Draft) -> Choice:
    """Return AdamW's decay."""
    return Choice(1e-2, "AdamW's usual", "Loshchilov and Hutter 2019")


def choose_clip(_: Draft) -> Choice:
    """Return the largest gradient norm."""
    return Choice(12.0, "cuts outliers only", "nnU-Net")


def choose_ema(_: Draft) -> Choice:
    """Return the decay of the averaged weights, which validation and prediction use."""
    return Choice(0.999, "costs no time; +.002 Dice on VNC, within noise", "a prototype, once, 10 minutes")


def choose_num_steps(_: Draft) -> Choice:
    """Return the optimizer steps; None fits them to the budget before step 1."""
    return Choice(None, "as many as budget_s allows, measured before step 1 and written to adaptations.jsonl", "budget")


def choose_schedule(_: Draft) -> Choice:
    """Return the course of the learning rate."""
    return Choice("warmup_cosine", "per step, ends at zero exactly when the budget ends", "common practice")


def choose_warmup(draft: Draft) -> Choice:
    """Return the share of the run that warms up."""
    if draft["schedule.kind"] == "one_cycle":
        return Choice(0.3, "one cycle climbs for a third of the run", "Smith and Topin 2018")
    return Choice(0.05, "short, and certain to be left", "the CellMap loss experiments (Shan-CU) never left theirs")


def choose_validation_rounds(draft: Draft) -> Choice:
    """Return how often the validation regions are predicted."""
    if not draft["split"].validate:
        return Choice(0, "nothing to validate on: the last weights are the best", "split")
    return Choice(8, "evenly over the run; every voxel of the validation regions each time", "fixed validation")


def choose_tolerance(draft: Draft) -> Choice:
    """Return by how much the validation Dice may fall short of the best and still count as the best."""
    because = "smaller differences are noise of the validation regions; then the later weights are kept"
    if draft["split"].rule == "box":
        because = f"one box is a noisy judge: {because}, which saw the lowest rate"
        return Choice(0.1, because, "VNC, once: the box preferred step 334 of 1,000 by .016; the last had .049 more")
    return Choice(0.01, because, "noise band .013 of five equal runs (CellMap class-weighting experiments, Shan-CU)")


def choose_tile(draft: Draft) -> Choice:
    """Return the inference window."""
    z, y, x = draft["patch_size_zyx"]
    if z > 1:
        return Choice((z, y, x), f"the patch of {z}x{y}x{x} it was trained on", "patch_size_zyx")
    factor = 4 if draft["device"] == "cpu" else 2 if y <= 256 else 1
    because = f"{factor} times the edge of the patch of {y}x{x}: less is computed twice"
    return Choice((1, y * factor, x * factor), because, "fully convolutional")


def choose_overlap(draft: Draft) -> Choice:
    """Return the share by which windows overlap."""
    if draft["patch_size_zyx"][0] > 1:
        return Choice(0.5, "3D windows are small: every voxel is inside one", "nnU-Net")
    return Choice(0.25, "windows are large against the receptive field", "Gaussian blending")


def choose_window_batch(draft: Draft) -> Choice:
    """Return how many windows run at once."""
    if draft["device"] == "cpu":
        return Choice(1, "a window is large enough for a CPU", "memory")
    return Choice(4, "more would not fill a GPU better", "memory; unmeasured")


def choose_mirrors(draft: Draft) -> Choice:
    """Return the axes that prediction mirrors and averages over."""
    if not draft["augmentation.flip"]:
        return Choice((), "training did not mirror", "augmentation.flip")
    return Choice(
        ("y", "x"),
        "EM has no up; with right angles, copies gained .001 to .010 Dice in 6 of 6 runs",
        "a prototype on VNC",
    )


def choose_transpose(draft: Draft) -> Choice:
    """Return whether prediction also averages over transposed copies."""
    value = bool(draft["augmentation.right_angles"])
    because = "right angles in the plane were trained" if value else "right angles in the plane were not trained"
    return Choice(value, because, "augmentation.right_angles")
