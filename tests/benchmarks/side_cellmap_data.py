"""The other side of loader.py: samples of cellmap-data, as its README drives it, one core. Run by loader.py.

It runs in an environment of its own, with cellmap-data, zarr below 3 and torch; autoseg is not imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cellmap_data import CellMapDataLoader, CellMapDataSplit
from rounds import serve, stay_on_one_core

ENDLESS = 10**7


def loader_of(data: Path, case: dict[str, Any]) -> CellMapDataLoader:
    """Return its loader over all crops: class-balanced, in this process, only the augmentation of the case."""
    axes = ("z", "y", "x") if case["patch_zyx"][0] > 1 else ("y", "x")
    spatial: dict[str, Any] = {"mirror": {"axes": dict.fromkeys(axes, 0.5)}}
    if case["rotates"]:
        spatial["rotate"] = {"axes": {axis: [-180, 180] for axis in axes}}
    array = {"shape": tuple(case["patch_zyx"]), "scale": tuple(case["voxel_size_nm"])}
    classes = ",".join(case["classes"])
    crops = sorted(data.glob("*/*.zarr/recon-1/labels/groundtruth/crop*"))
    split = CellMapDataSplit(
        input_arrays={"raw": array},
        target_arrays={"labels": array},
        classes=case["classes"],
        dataset_dict={
            "train": [{"raw": str(crop.parents[2] / "em/fibsem-uint8"), "gt": f"{crop}/[{classes}]"} for crop in crops],
            "validate": [],
        },
        pad=True,  # as the challenge's own code does; without, crops smaller than the patch are left out
        spatial_transforms=spatial,
        force_has_data=True,  # skips a check that reads every label array
    )
    assert len(split.train_datasets) == len(crops)
    return CellMapDataLoader(
        split.train_datasets_combined,
        batch_size=case["batch_size"],
        num_workers=0,
        weighted_sampler=True,  # without it the order of all voxels is shuffled before the first sample
        iterations_per_epoch=ENDLESS,
        is_train=True,
        device="cpu",
    )


def main() -> None:
    data, case = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    stay_on_one_core()
    start = time.perf_counter()
    loader = loader_of(data, case)

    def sizes() -> Iterator[int]:
        squeezed = tuple(n for n in case["patch_zyx"] if n > 1)
        for batch in loader:
            assert batch["labels"].shape[1:] == (len(case["classes"]), *squeezed), batch["labels"].shape
            yield len(batch["raw"])

    source = sizes()
    first = next(source)
    names = ("cellmap-data", "torch", "torchvision", "zarr", "numpy")
    about = {"versions": {name: version(name) for name in names}}
    serve(source, about | {"open_s": time.perf_counter() - start, "first_batch": first})


if __name__ == "__main__":
    main()
