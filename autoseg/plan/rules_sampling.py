"""Rules of what is shown how often, what it weighs, and where a probability becomes a label."""

from __future__ import annotations

import math

import numpy as np

from autoseg.data.em import CHUNK_CACHE_BYTES
from autoseg.data.islands import holders
from autoseg.data.split import split_crops
from autoseg.data.store import pyramid_grids
from autoseg.errors import counted
from autoseg.geometry import Grid
from autoseg.plan.draft import Choice, Draft
from autoseg.plan.rules_data import share_of, training_crops


def choose_sampling_fraction(draft: Draft) -> Choice:
    """Return the share of patches that are centred on a voxel of a class."""
    shares = {e.name: share for e in draft["classes"] if (share := share_of(draft, e.name)) is not None}
    because = "the other half shows tissue as it is"
    if shares:
        rarest = min(shares, key=lambda name: shares[name].share)
        because += f"; {rarest} fills {shares[rarest].share:.2%} of {shares[rarest].of_what}"
    return Choice(0.5, because, "unmeasured; nnU-Net draws a third")


def choose_class_floor(draft: Draft) -> Choice:
    """Return the share of patches in which every class that exists is centred at least."""
    names = [entry.name for entry in draft["classes"]]
    taught = holders(draft["split"].train, split_crops(draft.fingerprint, names, draft["split"].voxel_edge_nm))
    centred = draft["sampling.class_centred_fraction"]
    floor = min(centred / 2 / max(1, len(taught)), centred / len(names))
    because = f"{floor:.2%} of all patches or more for each of {counted(len(taught), 'class')}"
    if taught:
        fewest, rarest = min((len(crops), name) for name, crops in taught.items())
        found = "in" if any(rarest in crop.counts for crop in training_crops(draft)) else "annotated in"
        because += f"; {rarest} is {found} {fewest} of {len(training_crops(draft))} crops"
    if left := [name for name in names if name not in taught]:
        because += f"; nothing to train on: {', '.join(left)}"
    return Choice(floor, because, "half of the centred share, split evenly; unmeasured")


def choose_class_power(_: Draft) -> Choice:
    """Return how the rest of the centred share depends on the number of voxels of a class."""
    return Choice(0.5, "the other half of the centred share goes by the square root of voxels", "unmeasured")


def choose_crops_per_step(draft: Draft) -> Choice:
    """Return from how many places a step is drawn: from fewer than it has patches where chunks do not stay decoded."""
    patches = draft["batch_size"] * draft["accumulate_batches"] * draft["num_processes"]
    em_bytes = _em_bytes(draft)
    if em_bytes <= CHUNK_CACHE_BYTES:
        because = f"a place for each of {counted(patches, 'patch')}: the {em_bytes / 2**20:.1f} MiB of EM stay decoded"
        return Choice(patches, because, "chunk cache of a process")
    places = max(min(2, patches), -(-patches // 2))
    because = f"up to {-(-patches // places)} of {counted(patches, 'patch')} from a place: "
    because += f"{em_bytes / 2**20:.0f} MiB of EM do not stay decoded"
    return Choice(places, because, "chunk cache of a process")


def _em_bytes(draft: Draft) -> int:
    """Return the bytes of the EM of the training crops at the level that is read, decoded.

    A fingerprint knows only the finest level of a volume; the others are taken to be those that `import` would write.
    """
    volumes = {volume.name: volume for volume in draft.fingerprint.volumes}
    total = 0
    for crop in training_crops(draft):
        volume = volumes[crop.volume]
        sizes = [g.voxel_size_nm for g in pyramid_grids(Grid(volume.shape_zyx, volume.voxel_size_nm, (0.0, 0.0, 0.0)))]
        fine = [s for s in sizes if all(v <= w * 1.01 for v, w in zip(s, draft["voxel_size_nm"], strict=True))]
        shape = crop.grid.at_voxel_size(fine[-1] if fine else sizes[0]).shape_zyx
        total += math.prod(shape) * np.dtype(volume.dtype).itemsize
    return total


def choose_thresholds(draft: Draft) -> Choice:
    """Return the probability at which each class is called present."""
    names = [entry.name for entry in draft["classes"]]
    set_by_user = draft.settings.get("decode.thresholds.*", {})
    thresholds = {name: set_by_user.get(name, 0.5) for name in names}
    if set_by_user:
        return Choice(thresholds, f"set by the user for {', '.join(set_by_user)}, else 0.5", "user")
    return Choice(thresholds, "sigmoid outputs trained with Dice are cut at one half", "convention")


def choose_tuning(draft: Draft) -> Choice:
    """Return whether the validation regions choose the thresholds after training."""
    if not draft["split"].validate:
        return Choice(False, "nothing to validate on", "split")
    if draft["split"].rule == "box":
        return Choice(False, "one box is too small a sample to choose by", "VNC: tuned on it scored .004 less, once")
    because = "patches centred on rare classes make them look common; validation sees them as they are"
    return Choice(True, because, "sampling.class_centred_fraction")
