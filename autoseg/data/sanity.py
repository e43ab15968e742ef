"""What looks wrong in a data set before anything is learnt from it: a finding each, with the crop's or volume's name.

::

    empty        annotated, without a voxel, though most other crops have the class   information: absent is legal
    shifted      labels fit the EM clearly better when moved by some voxels
    swapped      two classes of a crop look like each other's in the other crops      grey value and thickness
    constant     one grey value                  few-values   so few that it may be a label volume
    saturated    a large share of the voxels has the smallest or the largest value
    unseen       nothing could be looked at
    inverted     what is dark in the other volumes is bright in this one

A finding is a question to a person, never a reason to leave a crop out.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.special import stdtr

from autoseg.data.traits import ClassTraits, CropTraits
from autoseg.schema import CropFacts, Finding, VolumeFacts

MIN_GAIN, MAX_CHANCE, MIN_FIT_BOXES = 1.15, 0.005, 4
USUALLY_PRESENT = 0.5
FEW_VALUES, MIN_GREY_VOXELS = 16, 1000
SATURATED_SHARE = 0.25
MIN_CLASS_VOXELS = 200
MIN_OTHERS = 2  # crops that a crop is compared with
GREY_SCALE, THICKNESS_SCALE = 0.25, 0.25  # least spread between crops: sd of the volume's grey values; log of nm
MISFIT, RELIEF = 3.0, 0.5
CONTRAST, OPPOSED = 0.3, -0.8
NAMED = 6

Look = tuple[float, float]  # grey value in sd of its volume, log of thickness in nm


def find(crops: Sequence[CropFacts], volumes: Sequence[VolumeFacts], traits: Sequence[CropTraits]) -> list[Finding]:
    """Return what looks wrong, in the order of the crops; `traits` are those of the same crops."""
    by_name = {volume.name: volume for volume in volumes}
    looks = {crop.name: _looks(crop, by_name[crop.volume]) for crop in traits}
    inverted = list(_inverted(traits, looks))
    upside_down = {finding.where for finding in inverted}
    upright = {crop.name: looks[crop.name] for crop in traits if crop.volume not in upside_down}
    found = [finding for crop in traits for finding in (*_not_em(crop), *_shifted(crop))]
    return [*inverted, *found, *_swapped(upright), *_empty(crops)]


def _looks(crop: CropTraits, volume: VolumeFacts) -> dict[str, Look]:
    if volume.intensity is None:
        return {}
    mean, sd = volume.intensity.mean, max(volume.intensity.sd, 1e-6)

    def look(one: ClassTraits) -> Look:
        return (one.grey - mean) / sd, float(np.log(one.thickness_nm or 1.0))

    return {
        name: look(one) for name, one in crop.classes.items() if one.voxels >= MIN_CLASS_VOXELS and one.thickness_nm
    }


def _empty(crops: Sequence[CropFacts]) -> Iterator[Finding]:
    """Summarise, in one finding, the annotated labels without a voxel of a class that most crops have."""
    holds: dict[str, dict[str, bool]] = defaultdict(dict)
    for crop in crops:
        for name in crop.annotated:
            holds[name][crop.name] = crop.counts[name].present > 0
    usual = {
        name
        for name, present in holds.items()
        if sum(present.values()) >= max(MIN_OTHERS, USUALLY_PRESENT * len(present))
    }
    empty = {name: [crop for crop, some in present.items() if not some] for name, present in holds.items()}
    listed = [f"{name} in {crop}" for name in sorted(usual) for crop in empty[name]]
    if listed:
        more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
        yield Finding(
            where="labels",
            kind="empty",
            what=f"{len(listed)} annotated labels hold no voxel, though most crops have some: "
            f"{', '.join(listed[:NAMED])}{more}",
            numbers={"labels": len(listed)},
            remedy="nothing if the class is absent there; if it was never annotated, remove its folder",
        )


def _not_em(crop: CropTraits) -> Iterator[Finding]:
    if crop.num_voxels == 0:
        yield Finding(
            where=crop.name,
            kind="unseen",
            what="none of its sampled boxes has all its EM (or few enough label codes), so it was not looked at",
            numbers={"grey_voxels": 0},
            remedy="fetch the EM under it, and look at it yourself",
        )
    if crop.num_voxels < MIN_GREY_VOXELS:
        return
    if crop.num_greys <= FEW_VALUES:
        values = "one grey value" if crop.num_greys == 1 else f"only {crop.num_greys} grey values"
        yield Finding(
            where=crop.name,
            kind="constant" if crop.num_greys == 1 else "few-values",
            what=f"its EM has {values} in {crop.num_voxels:,} sampled voxels",
            numbers={"grey_values": crop.num_greys},
            remedy="check that the EM is the raw volume, and that it was fetched here",
        )
        return
    for end, share in (("smallest", crop.darkest_share), ("largest", crop.brightest_share)):
        if share >= SATURATED_SHARE:
            yield Finding(
                where=crop.name,
                kind="saturated",
                what=f"{share:.0%} of its EM has the {end} grey value",
                numbers={"share": round(share, 3)},
                remedy="check the conversion to 8 bits, and whether there is tissue",
            )


def _shifted(crop: CropTraits) -> Iterator[Finding]:
    fit = crop.fit
    if fit is None or fit.boxes < MIN_FIT_BOXES or fit.gain < MIN_GAIN:
        return
    if stdtr(fit.boxes - 1, -fit.t) > MAX_CHANCE:
        return
    move = ", ".join(f"{n:+d}" for n in fit.move_zyx)
    z, y, x = fit.move_zyx
    yield Finding(
        where=crop.name,
        kind="shifted",
        what=f"its labels fit the EM {fit.gain:.1f} times better moved by {move} voxels (z, y, x; {fit.boxes} boxes)",
        numbers={"z": z, "y": y, "x": x, "gain": round(fit.gain, 2), "boxes": fit.boxes},
        remedy="look at both; correct the translation of the labels, or of the EM",
    )


# ---- inverted -----------------------------------------------------------------------------------------------


def _inverted(traits: Sequence[CropTraits], looks: Mapping[str, Mapping[str, Look]]) -> Iterator[Finding]:
    """Find volumes whose classes stand out from the grey mean in the other direction than in the other volumes.

    Between two volumes that oppose each other, membranes tell which is the usual one: they are dark.
    """
    greys: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for crop in traits:
        for name, (grey, _) in looks[crop.name].items():
            greys[crop.volume][name].append(grey)
    contrast = {
        volume: {name: statistics.fmean(values) for name, values in classes.items()}
        for volume, classes in greys.items()
    }
    for volume, own in contrast.items():
        others = {
            name: statistics.median([other[name] for v, other in contrast.items() if v != volume and name in other])
            for name in own
            if any(name in other for v, other in contrast.items() if v != volume)
        }
        products = [own[name] * usual for name, usual in others.items() if abs(usual) >= CONTRAST]
        weight = sum(abs(product) for product in products)
        opposed = bool(products) and weight >= CONTRAST**2 and sum(products) / weight <= OPPOSED
        membranes = [grey for name, grey in own.items() if name == "pm" or "_mem" in name]
        dark = statistics.fmean(membranes) if membranes else None
        if (opposed and (dark is None or dark > -CONTRAST)) or (not others and dark is not None and dark > CONTRAST):
            beside = "in the other volumes" if opposed else "usual in EM"
            yield Finding(
                where=volume,
                kind="inverted",
                what=f"its EM looks inverted: bright and dark classes are the reverse of what they are {beside}",
                numbers={name: round(grey, 2) for name, grey in sorted(own.items())},
                remedy="invert its grey values, or plan it apart from the others",
            )


# ---- swapped ------------------------------------------------------------------------------------------------


def _swapped(looks: Mapping[str, Mapping[str, Look]]) -> Iterator[Finding]:
    """Find pairs of classes that fit badly in one crop, and well if their names are exchanged."""
    crops_of: dict[str, dict[str, Look]] = defaultdict(dict)
    for crop, classes in looks.items():
        for name, look in classes.items():
            crops_of[name][crop] = look
    for crop, classes in looks.items():
        usual = {
            name: _usual([look for other, look in crops_of[name].items() if other != crop])
            for name in classes
            if len(crops_of[name]) > MIN_OTHERS
        }
        odd = [name for name in sorted(usual) if _distance(classes[name], usual[name]) >= MISFIT]
        for i, a in enumerate(odd):
            for b in odd[i + 1 :]:
                as_named = (_distance(classes[a], usual[a]), _distance(classes[b], usual[b]))
                exchanged = (_distance(classes[a], usual[b]), _distance(classes[b], usual[a]))
                if exchanged[0] <= RELIEF * as_named[0] and exchanged[1] <= RELIEF * as_named[1]:
                    yield Finding(
                        where=crop,
                        kind="swapped",
                        what=f"{a} looks like {b} in the other crops, and {b} like {a} (grey value and thickness)",
                        numbers={"as_named": round(sum(as_named), 1), "exchanged": round(sum(exchanged), 1)},
                        remedy=f"check whether the folders {a} and {b} were exchanged",
                    )


def _usual(looks: Sequence[Look]) -> tuple[Look, Look]:
    """Return (median, spread) of looks; the spread never below what crops of one kind differ by."""
    values = np.array(looks)
    middle = np.median(values, axis=0)
    spread = np.maximum(1.4826 * np.median(np.abs(values - middle), axis=0), (GREY_SCALE, THICKNESS_SCALE))
    return (float(middle[0]), float(middle[1])), (float(spread[0]), float(spread[1]))


def _distance(look: Look, usual: tuple[Look, Look]) -> float:
    middle, spread = usual
    return float(np.hypot((look[0] - middle[0]) / spread[0], (look[1] - middle[1]) / spread[1]))
