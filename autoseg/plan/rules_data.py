"""Rules that look at the data: classes, voxel size, normalization."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from autoseg.data.classes import cellmap_table
from autoseg.data.split import within
from autoseg.errors import PlanError, counted
from autoseg.geometry import NmZYX, coarser_voxel_size, cube_edge_nm
from autoseg.plan.draft import Choice, Draft
from autoseg.plan.resolution import MIN_VOXELS_ACROSS, resolution_groups, serving_range
from autoseg.schema import CropFacts, VolumeGrey, nearest

MIN_POSITIVE_VOXELS = 50
NAMED_VOLUMES = 4


def choose_seed(_: Draft) -> Choice:
    """Return the seed of split, weights and batches."""
    return Choice(0, "any number; repeat a run with others to see its noise", "convention")


def choose_resolution(draft: Draft) -> Choice:
    """Return the edges in nm of the voxels of crops that one plan can use, None for any; the split holds them."""
    if "split.voxel_edge_nm" in draft.settings:
        return Choice(draft.settings["split.voxel_edge_nm"], "set by the user", "user")
    names = [entry.name for entry in draft.fingerprint.classes if _positive(draft, entry.name) >= MIN_POSITIVE_VOXELS]
    sets = cellmap_table().sets | draft.fingerprint.class_sets
    asked = [member for name in draft.settings.get("classes.names", ()) for member in sets.get(name, (name,))]
    wanted = [name for name in dict.fromkeys(asked or names) if name in names]
    edges = serving_range(draft.fingerprint, wanted) if wanted else None
    if edges is None:
        return Choice(None, "the labels of all crops are of like voxel sizes", "fingerprint")
    crops = draft.fingerprint.crops
    out = [crop for crop in crops if not within(crop.voxel_size_nm, edges)]
    groups = resolution_groups(draft.fingerprint, wanted)
    lost = [crop for crop in out if not any(within(crop.voxel_size_nm, group.voxel_edge_nm) for group in groups)]
    because = (
        f"{len(crops) - len(out)} of {len(crops)} crops have labels of {edges[0]:.3g} to {edges[1]:.3g} nm, which "
    )
    because += "one voxel size serves"
    because += f"; plan --by-resolution uses {len(out) - len(lost)} more" if len(out) > len(lost) else ""
    return Choice(edges, because + (f"; no plan uses the other {len(lost)}" if lost else ""), "fingerprint")


def choose_classes(draft: Draft) -> Choice:
    """Return the classes that training can learn: those with positive voxels, or those the user asked for.

    A set of classes that was asked for means those of its members that can be learnt.
    """
    known = {entry.name: entry for entry in draft.fingerprint.classes}
    positives = {name: _positive(draft, name, draft["resolution"]) for name in known}
    learnable = {name: known[name] for name, n in positives.items() if n >= MIN_POSITIVE_VOXELS}
    wanted = draft.settings.get("classes.names")
    if wanted:
        return _classes_asked(draft, wanted, positives, list(learnable))
    if not learnable:
        raise PlanError("classes", "no class has enough positive voxels", "check the labels (autoseg fingerprint)")
    left = [name for name in known if name not in learnable]
    were_counted = any(name in crop.counts for crop in draft.fingerprint.crops for name in learnable)
    because = counted(len(learnable), "class", "have" if were_counted else "are")
    because += (
        f" at least {MIN_POSITIVE_VOXELS} positive voxels" if were_counted else " annotated (nobody counted voxels)"
    )
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
                raise PlanError(f"--classes {name}", *_not_there(draft, name))
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


def _not_there(draft: Draft, name: str) -> tuple[str, str]:
    """Return why a class cannot be trained, and what to do."""
    edges = draft["resolution"]
    if edges is None or _positive(draft, name) == 0:
        return "has no positive voxel in this data", "leave it out"
    what = f"has no positive voxel in crops of {edges[0]:.3g} to {edges[1]:.3g} nm, which the other classes want"
    return what, "plan --by-resolution, or ask for it alone"


def choose_em_voxel_size(draft: Draft) -> Choice:
    """Return the voxel size of the EM of most annotated voxels; a file that declares none is taken to have it."""
    volumes = {volume.name: volume.voxel_size_nm for volume in draft.fingerprint.volumes}
    votes: Counter[NmZYX] = Counter()
    for crop in training_crops(draft):
        votes[volumes[crop.volume]] += math.prod(crop.shape_zyx)
    size, won = votes.most_common(1)[0]
    because = f"{won / votes.total():.0%} of the annotated voxels lie in EM of {_nm(size)}; "
    because += "assumed where a file declares none"
    return Choice(size, because, "fingerprint")


def choose_voxel_size(draft: Draft) -> Choice:
    """Return the voxel size of most training crops, one vote for each class they hold, never finer than their EM.

    A CPU takes the next coarser one if the thinnest class still spans enough voxels there.
    """
    crops = training_crops(draft)
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
        votes[key] += sum(bool(crop.present(entry.name)) for entry in draft["classes"])
    key, won = votes.most_common(1)[0]
    size = exact[key]
    share = won / votes.total()
    because = f"{share:.0%} of what is annotated, by crop and class, has {_nm(size)}"
    because += " (that of their EM, where labels are finer)" if key in finer else ""
    others = [_nm(other) for other in votes if other != key]
    because += f"; resampled on the fly: {', '.join(others[:3])}" if others else ""
    because += _ill_served(draft, size)
    return _coarser(draft, size, because) or Choice(size, because, "fingerprint")


def _ill_served(draft: Draft, size: NmZYX) -> str:
    """Say which classes would want another voxel size, and how to give it to them."""
    groups = resolution_groups(draft.fingerprint, [entry.name for entry in draft["classes"]])
    near = min(groups, key=lambda group: abs(math.log2(group.edge_nm / cube_edge_nm(size))))
    lost = [f"{', '.join(group.classes)} ({group.edge_nm:.3g} nm)" for group in groups if group is not near]
    return f"; not best for {'; '.join(lost)}: plan --by-resolution" if lost else ""


def _coarser(draft: Draft, size: NmZYX, because: str) -> Choice | None:
    """Return the voxel size of the next level of a pyramid, None where it is not for this device or these classes."""
    crops = [crop.grid.at_voxel_size(size).shape_zyx for crop in training_crops(draft)]
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


def choose_normalization(draft: Draft) -> Choice:
    """Return the rule that makes grey values network input."""
    measured = [(v.name, v.intensity) for v in draft.fingerprint.volumes if v.intensity is not None]
    example = "".join(f" ({name}: {grey.mean:.0f} ± {grey.sd:.0f})" for name, grey in measured[:1])
    because = f"by mean and sd of each volume{example}, never of a patch{_odd_polarity(draft)}"
    return Choice(
        "volume", because, "per-patch scaling shifts grey values (seen in the CellMap loss experiments, Shan-CU)"
    )


def _odd_polarity(draft: Draft) -> str:
    """Name the volumes in which what is stained is not as dark, or as bright, as in most."""
    polarity = {v.name: v.intensity.polarity for v in draft.fingerprint.volumes if v.intensity and v.intensity.polarity}
    if len(set(polarity.values())) < 2:
        return ""
    usual = Counter(polarity.values()).most_common(1)[0][0]
    odd = [name for name, found in polarity.items() if found != usual]
    return f"; stain is {usual} in most volumes, but not in {', '.join(odd[:NAMED_VOLUMES])}: are they inverted?"


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
        if v.intensity is not None
    )
    named = ", ".join(f"{grey.name} {grey.mean:.4g} ± {grey.sd:.4g}" for grey in greys[:NAMED_VOLUMES])
    more = f" and {len(greys) - NAMED_VOLUMES} more" if len(greys) > NAMED_VOLUMES else ""
    because = f"as measured: {named or 'none'}{more}; other volumes are measured when opened"
    return Choice(greys, because, "fingerprint")


def training_crops(draft: Draft) -> list[CropFacts]:
    """Return the crops of which something trains."""
    train = {region.crop for region in draft["split"].train}
    return [crop for crop in draft.fingerprint.crops if crop.name in train]


def _positive(draft: Draft, name: str, edges_nm: tuple[float, float] | None = None) -> int:
    crops = (c for c in draft.fingerprint.crops if edges_nm is None or within(c.voxel_size_nm, edges_nm))
    return sum(crop.present(name) or 0 for crop in crops)


class Share(NamedTuple):
    """How much a class fills, and of what, in words."""

    share: float
    of_what: str


def share_of(draft: Draft, name: str) -> Share | None:
    """Return the share of a class in the voxels in which it is known, as counted or as reported; None: nobody knows."""
    reported = draft.fingerprint.frequencies.get(name)
    counts = [crop.counts[name] for crop in draft.fingerprint.crops if name in crop.counts]
    known = sum(c.present + c.absent for c in counts)
    if known:
        return Share(sum(c.present for c in counts) / known, "what is known of it")
    return Share(reported.share, f"what was reported ({reported.source})") if reported else None


def _nm(size: NmZYX) -> str:
    return "x".join(f"{v:g}" for v in size) + " nm"
