"""The rule of the split: what data/split.py derives, what the user set instead, and what of it leaks."""

from __future__ import annotations

from typing import Any

import msgspec

from autoseg.data.islands import SplitCrop, count_leaks
from autoseg.data.split import DEFAULT_FOLDS, derive_split, split_crops
from autoseg.errors import PlanError
from autoseg.plan.draft import Choice, Draft
from autoseg.schema import Split, nearest

SPLIT_FIELDS = Split.__struct_fields__


def choose_split(draft: Draft) -> Choice:
    """Return the split of data/split.py with the sides that the user set in their place, and what leaks.

    Where the user sets one side, the other keeps what does not overlap it.
    """
    crops = split_crops(draft.fingerprint, [entry.name for entry in draft["classes"]])
    asked = {name: draft.settings[f"split.{name}"] for name in SPLIT_FIELDS if f"split.{name}" in draft.settings}
    fold = asked.pop("fold", None)
    folds = asked.pop("folds", DEFAULT_FOLDS if fold is not None else None)
    split = derive_split(crops, draft["seed"], folds=folds, fold=fold)
    because = {
        "datasplit": "datasplit.csv fixes it",
        "volumes": f"whole volumes of {len({c.volume for c in crops})}, so that no EM is on both sides",
        "crops": f"whole crops of {len(crops)}, all from few volumes",
        "box": f"{len(crops)} crops of few volumes: boxes of {'each validate' if folds else 'one validate'}, "
        "the other voxels train",
        "user": "",
    }[split.rule]
    if folds is not None:
        because = f"fold {split.fold} of {folds}: {because}"
    if asked:
        split = _split_asked(draft, split, asked, crops)
        because = f"set by the user ({', '.join(asked)}), else: {because}"
    leaks = count_leaks(split, crops)
    numbers = f"{len(split.train)} regions train, {len(split.validate)} validate, {leaks.regions} of them leak"
    numbers += f" ({leaks.voxels:,} voxels that train too)" if leaks.regions else ""
    source = "user" if asked or folds is not None else "split rule"
    return Choice(split, f"{because}; {numbers}{_one_sided(split, crops)}", source)


def _split_asked(draft: Draft, split: Split, asked: dict[str, Any], crops: list[SplitCrop]) -> Split:
    names = [crop.name for crop in draft.fingerprint.crops]
    for side in ("train", "validate"):
        for region in asked.get(side, ()):
            if region.crop not in names:
                near = nearest(region.crop, names)
                hint = f"did you mean {near}?" if near else f"it has {', '.join(names[:8])}"
                raise PlanError(f"split.{side}", f"{region.crop} is not in this data", hint)
    split = msgspec.structs.replace(split, **({"rule": "user"} | asked))
    if len({"train", "validate"} & set(asked)) == 1:
        other = "validate" if "train" in asked else "train"
        alone = [msgspec.structs.replace(split, **{other: (region,)}) for region in getattr(split, other)]
        kept = tuple(getattr(one, other)[0] for one in alone if count_leaks(one, crops).regions == 0)
        return msgspec.structs.replace(split, **{other: kept})
    return split


def _one_sided(split: Split, crops: list[SplitCrop]) -> str:
    """Say which classes only one side holds, as far as whole crops tell."""
    present = {crop.name: {name for name, n in crop.present.items() if n > 0} for crop in crops}
    train, validate = (
        set().union(*(present[region.crop] for region in side)) for side in (split.train, split.validate)
    )
    both = [(validate - train, "validation"), (train - validate, "training")]
    told = [f"only in {side}: {', '.join(sorted(names))}" for names, side in both if names and split.validate]
    return "".join(f"; {text}" for text in told)
