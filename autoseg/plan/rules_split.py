"""The rule of the split: what data/split.py derives, what the user set instead, and what of it leaks."""

from __future__ import annotations

from typing import Any

import msgspec

from autoseg.data.islands import SplitCrop, count_leaks, holders
from autoseg.data.split import DEFAULT_FOLDS, derive_split, split_crops
from autoseg.errors import PlanError, counted
from autoseg.geometry import VoxelsZYX
from autoseg.plan.draft import Choice, Draft
from autoseg.schema import Region, Split, nearest

NAMED_REGIONS = 3
SETTABLE = ("train", "validate", "folds", "fold")


def choose_split(draft: Draft) -> Choice:
    """Return the split of data/split.py with the sides that the user set in their place, and what leaks.

    Where the user sets one side, the other keeps what does not overlap it. Raises PlanError where nothing trains.
    """
    edges = draft["resolution"]
    crops = split_crops(draft.fingerprint, [entry.name for entry in draft["classes"]], edges)
    if edges and not crops:
        raise PlanError("split.voxel_edge_nm", f"no crop has voxels of {edges[0]:g} to {edges[1]:g} nm", "widen it")
    asked = {name: draft.settings[f"split.{name}"] for name in SETTABLE if f"split.{name}" in draft.settings}
    fold = asked.pop("fold", None)
    folds = asked.pop("folds", DEFAULT_FOLDS if fold is not None else None)
    split = derive_split(crops, draft["seed"], folds=folds, fold=fold)
    split = msgspec.structs.replace(split, voxel_edge_nm=edges)
    because = {
        "datasplit": "datasplit.csv fixes it",
        "volumes": f"whole volumes of {len({c.volume for c in crops})}, so that no EM is on both sides",
        "crops": f"whole crops of {len(crops)}, all from few volumes",
        "box": f"{counted(len(crops), 'crop')} of few volumes: "
        f"boxes of {'each validate' if folds else 'one validate'}, the other voxels train",
        "user": "",
    }[split.rule]
    if folds is not None:
        because = f"fold {split.fold} of {folds}: {because}"
    if asked:
        split = _split_asked(split, asked, crops)
        because = f"set by the user ({', '.join(asked)}), else: {because}"
    if not split.train:
        raise PlanError("split.train", f"is empty ({because})", "leave at least one crop to train on")
    leaks = count_leaks(split, crops)
    numbers = (
        f"{counted(len(split.train), 'region', 'train')}, {len(split.validate)} validate, {leaks.regions} of them "
    )
    numbers += f"share {leaks.voxels:,} voxels with what trains: those never teach" if leaks.regions else "leak"
    by_user = asked or folds is not None or "split.voxel_edge_nm" in draft.settings
    source = "user" if by_user else "split rule"
    return Choice(split, f"{because}; {numbers}{_named(split, crops)}{_one_sided(split, crops)}", source)


def _named(split: Split, crops: list[SplitCrop]) -> str:
    """Count the voxels that train, and name the first regions that validate."""
    shapes = {crop.name: crop.shape_zyx for crop in crops}
    taught = sum(region.box(shapes[region.crop]).num_voxels for region in split.train)
    named = [region.crop + ("" if region.box_zyx is None else _box_text(region)) for region in split.validate]
    more = f" and {len(named) - NAMED_REGIONS} more" if len(named) > NAMED_REGIONS else ""
    return f"; {taught:,} voxels train" + (f"; validates {', '.join(named[:NAMED_REGIONS])}{more}" if named else "")


def _box_text(region: Region) -> str:
    start, stop = region.box_zyx or ((), ())
    return f" [{', '.join(f'{a}:{b}' for a, b in zip(start, stop, strict=True))}]"


def _split_asked(split: Split, asked: dict[str, Any], crops: list[SplitCrop]) -> Split:
    shapes = {crop.name: crop.shape_zyx for crop in crops}
    for side, regions in asked.items():
        for region in regions:
            _check_region(f"split.{side}", region, shapes)
    split = msgspec.structs.replace(split, rule="user", **asked)
    if len({"train", "validate"} & set(asked)) == 1:
        other = "validate" if "train" in asked else "train"
        alone = [msgspec.structs.replace(split, **{other: (region,)}) for region in getattr(split, other)]
        kept = tuple(getattr(one, other)[0] for one in alone if count_leaks(one, crops).regions == 0)
        return msgspec.structs.replace(split, **{other: kept})
    return split


def _check_region(field: str, region: Region, shapes: dict[str, VoxelsZYX]) -> None:
    """Refuse a crop that is not there, and a box that does not lie in it or is empty."""
    if region.crop not in shapes:
        near = nearest(region.crop, list(shapes))
        hint = f"did you mean {near}?" if near else f"it has {', '.join(list(shapes)[:8])}"
        raise PlanError(field, f"{region.crop} is not in this data", hint)
    shape = shapes[region.crop]
    box = region.box(shape)
    if not all(0 <= a < b <= n for a, b, n in zip(box.start, box.stop, shape, strict=True)):
        what = f"box {list(box.start)} to {list(box.stop)} of {region.crop} is empty or not inside {list(shape)}"
        raise PlanError(field, what, "box_zyx is [start, stop], start below stop on each axis, in voxels of the labels")


def _one_sided(split: Split, crops: list[SplitCrop]) -> str:
    """Say which classes only one side holds, as far as the counts along y and x tell."""
    train, validate = (set(holders(side, crops)) for side in (split.train, split.validate))
    both = [(validate - train, "validation"), (train - validate, "training")]
    told = [f"only in {side}: {', '.join(sorted(names))}" for names, side in both if names and split.validate]
    return "".join(f"; {text}" for text in told)
