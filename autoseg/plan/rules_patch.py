"""Rules of the patch: 2D, 2.5D or 3D, its edges, its neighbouring sections."""

from __future__ import annotations

import math
import statistics

from autoseg.errors import counted
from autoseg.geometry import VoxelsZYX
from autoseg.plan.draft import Choice, Draft
from autoseg.plan.extents import PATCH_EDGES, SOLID_EDGES, shares_of
from autoseg.plan.rules_data import training_crops
from autoseg.plan.rules_machine import usable_bytes

ANISOTROPY_OF_SECTIONS = 3.0
VALID_SHARE = 0.9
# Traced: the narrow RSUNet in bf16, 96³ to 192³, 14 and 48 classes, with the share of workspace.
SOLID_BYTES, SOLID_BYTES_A_CLASS = 1100, 22
SOLID_ROOM = 0.7
SLICES_2_5D = 5
SLICES_OF_SECTIONS = 3


def choose_dimensions(draft: Draft) -> Choice:
    """Return "2d", "2.5d" or "3d" by anisotropy, depth and accelerator; not a field, others follow from it."""
    asked = _dimensions_asked(draft)
    if asked:
        return asked
    z, y, x = draft["voxel_size_nm"]
    depth = _median_extent(draft)[0]
    anisotropy = z / min(y, x)
    if depth < SLICES_2_5D:
        return Choice("2d", f"crops are {counted(depth, 'section')} deep, fewer than {SLICES_2_5D}", "geometry")
    if draft["device"] == "cpu" or "patch_size_zyx" in draft.settings:
        because = "flat patches: neighbouring sections as channels cost at most 13 % of a step"
        return Choice("2.5d", because, "step time of a prototype, two CPU cores")
    room, name = usable_bytes(draft)
    if (edge := _largest_solid(draft, room)) is None:
        because = f"two solid patches of {SOLID_EDGES[-1]}³ do not fit the {room / 2**30:.1f} GiB of {name}"
        return Choice("2.5d", because, "traced, narrow RSUNet")
    if anisotropy >= ANISOTROPY_OF_SECTIONS:
        because = (
            f"{depth} sections, {anisotropy:.1f} times coarser than in plane (from {ANISOTROPY_OF_SECTIONS:g} on the "
        )
        because += "first levels have flat kernels)"
        return Choice("3d" if depth >= 2 * SLICES_2_5D else "2.5d", because, "Lee et al. 2017; nnU-Net's threshold")
    because = (
        f"near-isotropic voxels ({anisotropy:.1f}), and patches up to {edge}³ fit {room / 2**30:.1f} GiB of {name}"
    )
    return Choice("3d", because, "nnU-Net: 3D where it fits")


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
    """Return the largest patch of which the crops fill 90 %, within what the device can take."""
    extent = _median_extent(draft)
    if draft["dimensions"] in ("2d", "2.5d"):
        limit, why = (128, "limit 128 on a CPU") if draft["device"] == "cpu" else (512, "limit 512 on a GPU")
        candidates: list[VoxelsZYX] = [(1, edge, edge) for edge in PATCH_EDGES if edge <= limit]
    else:
        z, y, x = draft["voxel_size_nm"]
        anisotropy = z / min(y, x)
        limit, why = _solid_edge(draft)
        flat = anisotropy >= ANISOTROPY_OF_SECTIONS
        longest = limit * (2 if flat else 1)
        why += f", twice that in the plane, where patches are {anisotropy:.0f} times fewer voxels deep" if flat else ""
        candidates = [(_depth(edge, anisotropy, extent[0]), edge, edge) for edge in PATCH_EDGES if edge <= longest]
        why = f"as cubic as voxels of {anisotropy:.1f}:1 and {counted(extent[0], 'section')} allow; {why}"
    mean, patch = _fullest(draft, candidates)
    because = f"the crops fill {mean:.0%} of such a patch, in the mean (median crop: {_voxels(extent)} voxels)"
    larger = [c for c in candidates if c[1] > patch[1]]
    if larger:
        because += f"; {_filled(draft, larger[-1]):.0%} of {_voxels(larger[-1])}"
    return Choice(patch, f"{because}; {why}", f"valid share of at least {VALID_SHARE:.0%}")


def _fullest(draft: Draft, candidates: list[VoxelsZYX]) -> tuple[float, VoxelsZYX]:
    """Return (share that is valid, patch) of the first candidate that is valid enough, else of the last."""
    for patch in candidates:
        share = _filled(draft, patch)
        if share >= VALID_SHARE:
            break
    return share, patch


def _filled(draft: Draft, patch: VoxelsZYX) -> float:
    return statistics.fmean(shares_of(training_crops(draft), patch, draft["voxel_size_nm"]))


def _depth(edge: int, anisotropy: float, sections: int) -> int:
    """Return how deep a patch of that edge is: as deep as wide in nm, no deeper than the crops, and easy to halve."""
    wanted = max(8, round(edge / anisotropy))
    fits = [e for e in (*PATCH_EDGES, 8, 4) if e <= wanted and sections >= e * math.sqrt(VALID_SHARE)]
    return fits[0] if fits else 4


def _solid_edge(draft: Draft) -> tuple[int, str]:
    """Return the longest edge of a cubic patch of which two fit, and why; on a CPU time is the limit."""
    if draft["device"] == "cpu":
        return 64, "limit 64 on a CPU"
    room, name = usable_bytes(draft)
    edge = _largest_solid(draft, room) or SOLID_EDGES[-1]
    return edge, f"edges up to {edge}, so that two patches leave room in the {room / 2**30:.1f} GiB of {name}"


def _largest_solid(draft: Draft, room: int) -> int | None:
    """Return the longest usual edge of which two cubes fit so many bytes, None if none does."""
    wide = 2 if draft["precision"] == "fp32" else 1  # the bytes were traced in bf16
    most = SOLID_ROOM * room / 2 / wide / (SOLID_BYTES + SOLID_BYTES_A_CLASS * len(draft["classes"]))
    return max((edge for edge in SOLID_EDGES if edge**3 <= most), default=None)


def choose_input_slices(draft: Draft) -> Choice:
    """Return the number of neighbouring sections given to the network as channels; 1 unless 2.5D."""
    z, y, x = draft["voxel_size_nm"]
    if draft["dimensions"] == "2.5d" and z / min(y, x) >= ANISOTROPY_OF_SECTIONS:
        because = f"2.5D: of {z:g} nm sections one neighbour on each side; on VNC that gained .008 Dice, within noise"
        return Choice(SLICES_OF_SECTIONS, because, "a prototype, once, 3 minutes")
    if draft["dimensions"] == "2.5d":
        return Choice(SLICES_2_5D, "2.5D: the section and two neighbours on each side", "2.5D by convention")
    return Choice(1, f"{draft['dimensions'].upper()}: one section or a solid patch", "dimensions")


def _median_extent(draft: Draft) -> VoxelsZYX:
    """Return the median edges of the training crops, in voxels of the plan's size."""
    shapes = [crop.grid.at_voxel_size(draft["voxel_size_nm"]).shape_zyx for crop in training_crops(draft)]
    z, y, x = (int(statistics.median_low([shape[axis] for shape in shapes])) for axis in range(3))
    return z, y, x


def _voxels(shape: VoxelsZYX) -> str:
    return "x".join(str(n) for n in shape)
