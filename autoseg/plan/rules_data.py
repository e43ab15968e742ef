"""Rules that look at the data: classes, voxel size, dimensions, patch, sampling, normalization."""

from __future__ import annotations

import math
import statistics
from collections import Counter

import numpy as np

from autoseg.data.classes import cellmap_table
from autoseg.data.em import CHUNK_CACHE_BYTES
from autoseg.data.store import pyramid_grids
from autoseg.errors import PlanError
from autoseg.geometry import Grid, NmZYX, VoxelsZYX, coarser_voxel_size
from autoseg.plan.draft import Choice, Draft
from autoseg.schema import CropFacts, VolumeGrey, nearest

ANISOTROPY_OF_SECTIONS = 3.0
VALID_SHARE = 0.9
PATCH_EDGES = (512, 384, 320, 256, 192, 160, 128, 96, 64, 48, 32, 16)
MIN_VOXELS_ACROSS = 3.0
SLICES_2_5D = 5
SLICES_OF_SECTIONS = 3
MIN_POSITIVE_VOXELS = 50


def choose_seed(_: Draft) -> Choice:
    """Return the seed of split, weights and batches."""
    return Choice(0, "any number; repeat a run with others to see its noise", "convention")


def choose_classes(draft: Draft) -> Choice:
    """Return the classes that training can learn: those with positive voxels, or those the user asked for.

    A set of classes that was asked for means those of its members that can be learnt.
    """
    known = {entry.name: entry for entry in draft.fingerprint.classes}
    positives = {name: _positive(draft, name) for name in known}
    learnable = {name: known[name] for name, n in positives.items() if n >= MIN_POSITIVE_VOXELS}
    wanted = draft.settings.get("classes.names")
    if wanted:
        return _classes_asked(draft, wanted, positives, list(learnable))
    if not learnable:
        raise PlanError("classes", "no class has enough positive voxels", "check the labels (autoseg fingerprint)")
    left = [name for name in known if name not in learnable]
    because = f"{len(learnable)} classes have at least {MIN_POSITIVE_VOXELS} positive voxels"
    choice = tuple(learnable.values())
    return Choice(choice, because + (f"; left out: {', '.join(left)}" if left else ""), "fingerprint")


def _classes_asked(draft: Draft, wanted: list[str], positives: dict[str, int], learnable: list[str]) -> Choice:
    known = {entry.name: entry for entry in draft.fingerprint.classes}
    sets = cellmap_table().sets | draft.fingerprint.class_sets
    chosen: list[str] = []
    left: list[str] = []
    for name in wanted:
        if name in known:
            if positives[name] == 0:
                raise PlanError(f"--classes {name}", "has no positive voxel in this data", "leave it out")
            chosen.append(name)
        elif name in sets:
            members = [member for member in sets[name] if member in learnable]
            if not members:
                raise PlanError(f"--classes {name}", "no class of this set can be learnt here", "name other classes")
            chosen += members
            left += [member for member in sets[name] if member not in learnable]
        else:
            near = nearest(name, [*known, *sets])
            hint = f"did you mean {near}?" if near else f"it has {', '.join(known)}; sets are {', '.join(sets)}"
            raise PlanError(f"--classes {name}", "is not annotated in this data", hint)
    missing = f"; of the set not in this data: {', '.join(dict.fromkeys(left))}" if left else ""
    return Choice(tuple(known[name] for name in dict.fromkeys(chosen)), "set by the user" + missing, "user")


def choose_em_voxel_size(draft: Draft) -> Choice:
    """Return the voxel size of the EM of most annotated voxels; a file that declares none is taken to have it."""
    volumes = {volume.name: volume.voxel_size_nm for volume in draft.fingerprint.volumes}
    votes: Counter[NmZYX] = Counter()
    for crop in _training_crops(draft):
        votes[volumes[crop.volume]] += math.prod(crop.shape_zyx)
    size, won = votes.most_common(1)[0]
    because = f"{won / votes.total():.0%} of the annotated voxels lie in such EM; assumed where a file declares none"
    return Choice(size, because, "fingerprint")


def choose_voxel_size(draft: Draft) -> Choice:
    """Return the voxel size that most annotated voxels of the training crops have, never finer than their EM.

    A CPU takes the next coarser one if the thinnest class still spans enough voxels there.
    """
    crops = _training_crops(draft)
    volumes = {volume.name: volume for volume in draft.fingerprint.volumes}
    votes: Counter[NmZYX] = Counter()
    exact: dict[NmZYX, NmZYX] = {}
    finer = set()
    for crop in crops:
        em = volumes[crop.volume].voxel_size_nm
        size = tuple(max(v, e) for v, e in zip(crop.voxel_size_nm, em, strict=True))
        key = (round(size[0], 3), round(size[1], 3), round(size[2], 3))
        exact.setdefault(key, (size[0], size[1], size[2]))
        if any(e - v > 1e-3 for v, e in zip(crop.voxel_size_nm, em, strict=True)):
            finer.add(key)
        votes[key] += math.prod(crop.shape_zyx)
    key, won = votes.most_common(1)[0]
    size = exact[key]
    share = won / votes.total()
    because = f"{share:.0%} of the annotated voxels have it"
    because += " (that of their EM, where labels are finer)" if key in finer else ""
    others = [_nm(other) for other in votes if other != key]
    because += f"; resampled on the fly: {', '.join(others[:3])}" if others else ""
    return _coarser(draft, size, because) or Choice(size, because, "fingerprint")


def _coarser(draft: Draft, size: NmZYX, because: str) -> Choice | None:
    """Return the voxel size of the next level of a pyramid, None where it is not for this device or these classes."""
    crops = [crop.grid.at_voxel_size(size).shape_zyx for crop in _training_crops(draft)]
    smallest = tuple(min(shape[axis] for shape in crops) for axis in range(3))
    shapes = {shape.name: shape for shape in draft.fingerprint.shapes}
    names = [entry.name for entry in draft["classes"]]
    if draft["device"] != "cpu" or any(name not in shapes for name in names) or max(smallest) < 2:
        return None
    thickness = [(q.p50, name) for name in names if (q := shapes[name].thickness_nm) is not None]
    if not thickness:  # every class is thicker than the crops can say
        return None
    coarse = coarser_voxel_size(size, (smallest[0], smallest[1], smallest[2]))
    thinnest, name = min(thickness)
    across = thinnest / max(v for v, w in zip(coarse, size, strict=True) if v != w)
    if across < MIN_VOXELS_ACROSS:
        return None
    doubled = [axis for axis, v, w in zip("zyx", coarse, size, strict=True) if v != w]
    because = f"twice coarser along {', '.join(doubled)} than {_nm(size)} ({because}): a CPU sees {2 ** len(doubled)} "
    because += "times as much tissue in the same time"
    why = f"the thinnest class, {name} of {thinnest:.0f} nm, still spans {across:.1f} voxels ({MIN_VOXELS_ACROSS:g} do)"
    return Choice(
        coarse, f"{because}, and {why}", "VNC, 1,000 steps, one run each: .762 against .749, about the noise of .013"
    )


def choose_dimensions(draft: Draft) -> Choice:
    """Return "2d", "2.5d" or "3d" by anisotropy, depth and accelerator; not a field, others follow from it."""
    asked = _dimensions_asked(draft)
    if asked:
        return asked
    z, y, x = draft["voxel_size_nm"]
    depth = _median_extent(draft)[0]
    anisotropy = z / min(y, x)
    if depth < SLICES_2_5D:
        return Choice("2d", f"crops are {depth} sections deep, fewer than {SLICES_2_5D}", "geometry")
    if draft["device"] == "cpu" or "patch_size_zyx" in draft.settings:
        because = "flat patches: neighbouring sections as channels cost at most 13 % of a step"
        return Choice("2.5d", because, "step time of a prototype, two CPU cores")
    if anisotropy >= ANISOTROPY_OF_SECTIONS:
        because = f"sections are {anisotropy:.1f} times coarser than in plane (at least {ANISOTROPY_OF_SECTIONS:g})"
        return Choice("3d" if depth >= 2 * SLICES_2_5D else "2.5d", because, "Lee et al. 2017; nnU-Net's threshold")
    return Choice("3d", f"near-isotropic voxels ({anisotropy:.1f}) and a GPU", "nnU-Net: 3D where it fits")


def _dimensions_asked(draft: Draft) -> Choice | None:
    """Return what the user's other settings ask for, None if they leave it open."""
    settings = draft.settings
    if settings.get("patch_size_zyx", (1,))[0] > 1:
        return Choice("3d", "follows patch_size_zyx", "user")
    if "input_slices" in settings:
        return Choice("2.5d" if settings["input_slices"] > 1 else "2d", "follows input_slices", "user")
    if settings.get("network.kind") == "rsunet" and "patch_size_zyx" not in settings and _median_extent(draft)[0] >= 4:
        return Choice("3d", "follows network.kind", "user")
    return None


def choose_patch_size(draft: Draft) -> Choice:
    """Return the largest patch of which the median crop fills at least 90 %, within what the device can take."""
    dimensions = draft["dimensions"]
    extent = _median_extent(draft)
    if dimensions in ("2d", "2.5d"):
        limit = 128 if draft["device"] == "cpu" else 512
        edge = _edge(min(extent[1:]), limit)
        valid = min(1.0, extent[1] / edge) * min(1.0, extent[2] / edge)
        because = f"{valid:.0%} of such a patch is annotated in the median crop of {_voxels(extent)} voxels"
        return Choice((1, edge, edge), f"{because}; limit {limit} on this device", "valid share >= 90 %")
    z, y, x = draft["voxel_size_nm"]
    anisotropy = z / min(y, x)
    limit = 64 if draft["device"] == "cpu" else 128
    in_plane = _edge(min(extent[1:]), limit * (2 if anisotropy >= ANISOTROPY_OF_SECTIONS else 1))
    depth = _edge(extent[0], max(8, round(in_plane / anisotropy)), smallest=4)
    because = f"as cubic as the {anisotropy:.1f}:1 voxels and the median crop of {_voxels(extent)} voxels allow"
    return Choice((depth, in_plane, in_plane), because, "physical extent")


def choose_input_slices(draft: Draft) -> Choice:
    """Return the number of neighbouring sections given to the network as channels; 1 unless 2.5D."""
    z, y, x = draft["voxel_size_nm"]
    if draft["dimensions"] == "2.5d" and z / min(y, x) >= ANISOTROPY_OF_SECTIONS:
        because = f"2.5D: of {z:g} nm sections one neighbour on each side; on VNC that gained .008 Dice, within noise"
        return Choice(SLICES_OF_SECTIONS, because, "a prototype, once, 3 minutes")
    if draft["dimensions"] == "2.5d":
        return Choice(SLICES_2_5D, "2.5D: the section and two neighbours on each side", "2.5D by convention")
    return Choice(1, f"{draft['dimensions'].upper()}: one section or a solid patch", "dimensions")


def choose_normalization(draft: Draft) -> Choice:
    """Return the rule that makes grey values network input."""
    greys = [(v.name, v.intensity) for v in draft.fingerprint.volumes]
    name, grey = greys[0]
    because = f"by mean and sd of each volume ({name}: {grey.mean:.0f} ± {grey.sd:.0f}), never of a patch"
    return Choice("volume", because, "per-patch scaling shifts grey values (origin experiments)")


def choose_volume_greys(draft: Draft) -> Choice:
    """Return mean and sd of each volume, so that EM that is fetched later changes no input."""
    if draft["normalization.kind"] == "dtype":
        return Choice((), "the range of the dtype needs none", "normalization.kind")
    greys = tuple(
        VolumeGrey(
            name=v.name,
            dtype=v.dtype,
            shape_zyx=v.shape_zyx,
            mean=v.intensity.mean,
            sd=v.intensity.sd,
            probe=v.probe,
        )
        for v in draft.fingerprint.volumes
    )
    return Choice(greys, "mean and sd of each, as measured; other volumes are measured when opened", "fingerprint")


def choose_class_weights(draft: Draft) -> Choice:
    """Return one weight for every class."""
    names = [entry.name for entry in draft["classes"]]
    set_by_user = draft.settings.get("class_weights.*", {})
    weights = {name: set_by_user.get(name, 1.0) for name in names}
    because = "every class counts alike; rare ones are drawn more often instead"
    if set_by_user:
        return Choice(weights, f"set by the user for {', '.join(set_by_user)}, else 1", "user")
    return Choice(weights, because, "simplest; weights are unmeasured here")


def choose_sampling_fraction(draft: Draft) -> Choice:
    """Return the share of patches that are centred on a voxel of a class."""
    rarest = min((_share(draft, entry.name), entry.name) for entry in draft["classes"])
    because = f"the other half shows tissue as it is; {rarest[1]} fills only {rarest[0]:.2%}"
    return Choice(0.5, because, "unmeasured; nnU-Net draws a third")


def choose_class_floor(draft: Draft) -> Choice:
    """Return the share of patches in which every class that exists is centred at least."""
    names = [entry.name for entry in draft["classes"]]
    floor = draft["sampling.class_centred_fraction"] / 2 / len(names)
    crops = _training_crops(draft)
    holders = [(sum(n in c.counts and c.counts[n].present > 0 for c in crops), n) for n in names]
    fewest, rarest = min(holders)
    because = f"{floor:.2%} of all patches or more for each of {len(names)} classes; {rarest} is in {fewest} of "
    return Choice(floor, f"{because}{len(crops)} crops", "half of the centred share, split evenly; unmeasured")


def choose_class_power(_: Draft) -> Choice:
    """Return how the rest of the centred share depends on the number of voxels of a class."""
    return Choice(0.5, "the other half of the centred share goes by the square root of voxels", "unmeasured")


def choose_crops_per_step(draft: Draft) -> Choice:
    """Return from how many places a step is drawn: from fewer than it has patches where chunks do not stay decoded."""
    patches = draft["batch_size"] * draft["accumulate_batches"]
    em_bytes = _em_bytes(draft)
    if em_bytes <= CHUNK_CACHE_BYTES:
        return Choice(patches, "a place for each patch: the EM of all crops stays decoded", "chunk cache of a process")
    because = f"up to two of {patches} patches from a place: {em_bytes / 2**20:.0f} MiB of EM do not stay decoded"
    return Choice(max(min(2, patches), -(-patches // 2)), because, "chunk cache of a process")


def _em_bytes(draft: Draft) -> int:
    """Return the bytes of the EM of the training crops at the level that is read, decoded.

    A fingerprint knows only the finest level of a volume; the others are taken to be those that `import` would write.
    """
    volumes = {volume.name: volume for volume in draft.fingerprint.volumes}
    total = 0
    for crop in _training_crops(draft):
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


def _training_crops(draft: Draft) -> list[CropFacts]:
    train = {region.crop for region in draft["split"].train}
    return [crop for crop in draft.fingerprint.crops if crop.name in train]


def _positive(draft: Draft, name: str) -> int:
    return sum(crop.counts[name].present for crop in draft.fingerprint.crops if name in crop.counts)


def _share(draft: Draft, name: str) -> float:
    counts = [crop.counts[name] for crop in draft.fingerprint.crops if name in crop.counts]
    known = sum(c.present + c.absent for c in counts)
    return sum(c.present for c in counts) / known if known else 0.0


def _median_extent(draft: Draft) -> VoxelsZYX:
    """Return the median edges of the training crops, in voxels of the plan's size."""
    shapes = [crop.grid.at_voxel_size(draft["voxel_size_nm"]).shape_zyx for crop in _training_crops(draft)]
    z, y, x = (int(statistics.median_low([shape[axis] for shape in shapes])) for axis in range(3))
    return z, y, x


def _edge(extent: int, limit: int, smallest: int = 16) -> int:
    """Return the largest usual edge up to the limit that the extent fills to sqrt(90 %), at least the smallest."""
    fits = [edge for edge in (*PATCH_EDGES, 8, 4) if edge <= limit and extent >= edge * math.sqrt(VALID_SHARE)]
    return max(fits[0], smallest) if fits else smallest


def _nm(size: NmZYX) -> str:
    return "x".join(f"{v:g}" for v in size) + " nm"


def _voxels(shape: VoxelsZYX) -> str:
    return "x".join(str(n) for n in shape)
