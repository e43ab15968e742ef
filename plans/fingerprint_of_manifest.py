"""Make the shipped fingerprint of the CellMap challenge from its own table of training crops.

python plans/fingerprint_of_manifest.py train_crop_manifest.csv plans/fingerprints/cellmap.json

What the table tells is in it: crops, their voxel sizes, places and annotated classes. What it does not tell is left
open: no class was counted, no grey value measured; an EM volume reaches as far as its crops, at the voxel size of the
finest.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from autoseg.data.classes import cellmap_table, select
from autoseg.geometry import NmZYX, VoxelsZYX
from autoseg.plan.extents import valid_shares
from autoseg.schema import CropFacts, Fingerprint, Frequency, VolumeFacts, save

SOURCE = "train_crop_manifest.csv of the CellMap challenge; classes were not counted, grey values not measured"
IN_CROPS = "mean share of the crops that hold it, of 234 crops, as Shan-CU/CellMap-Segmentation reports"
REPORTED = {
    "nuc": 0.49,
    "ecs": 0.35,
    "golgi_lum": 0.097,
    "mito_lum": 0.093,
    "mito_mem": 0.075,
    "golgi_mem": 0.067,
    "er_lum": 0.053,
    "pm": 0.045,
    "er_mem": 0.044,
    "mito_ribo": 0.0004,
}


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.strip("[]").split(";")]


def crops_of(path: Path) -> tuple[CropFacts, ...]:
    """Return the crops of the table, each with the classes that are annotated in it."""
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault((row["dataset"], row["crop_name"]), []).append(row)
    crops = []
    for (dataset, number), of_crop in rows.items():
        finest = min(of_crop, key=lambda row: numbers(row["voxel_size"]))
        z, y, x = numbers(finest["voxel_size"])
        oz, oy, ox = numbers(finest["translation"])
        nz, ny, nx = (int(n) for n in numbers(finest["shape"]))
        crops.append(
            CropFacts(
                name=f"{dataset}/crop{number}",
                volume=dataset,
                shape_zyx=(nz, ny, nx),
                voxel_size_nm=(z, y, x),
                origin_nm=(oz, oy, ox),
                split=None,
                annotated=tuple(sorted(row["class_label"] for row in of_crop)),
                counts={},
            )
        )
    return tuple(sorted(crops, key=lambda crop: crop.name))


def volume_of(name: str, crops: list[CropFacts]) -> VolumeFacts:
    """Return the box around the crops of one EM, at the voxel size of the finest."""
    size: NmZYX = min(crop.voxel_size_nm for crop in crops)
    start = [min(crop.grid.corner_nm[axis] for crop in crops) for axis in range(3)]
    stop = [max(crop.grid.corner_nm[axis] + crop.grid.extent_nm[axis] for crop in crops) for axis in range(3)]
    z, y, x = (round((b - a) / v) for a, b, v in zip(start, stop, size, strict=True))
    shape: VoxelsZYX = (z, y, x)
    oz, oy, ox = (a + v / 2 for a, v in zip(start, size, strict=True))
    return VolumeFacts(
        name=name,
        path=f"{name}/{name}.zarr/recon-1/em/fibsem-uint8",
        dtype="uint8",
        shape_zyx=shape,
        voxel_size_nm=size,
        intensity=None,
        stored_fraction=1.0,
        origin_nm=(oz, oy, ox),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    crops = crops_of(options.manifest)
    table = cellmap_table()
    annotated = {name for crop in crops for name in crop.annotated}
    volumes = sorted({crop.volume for crop in crops})
    found = Fingerprint(
        volumes=tuple(volume_of(name, [crop for crop in crops if crop.volume == name]) for name in volumes),
        crops=crops,
        classes=select(table, [entry.name for entry in table.classes if entry.name in annotated]),
        disjoint=table.disjoint,
        frequencies={name: Frequency(share=share, source=IN_CROPS) for name, share in REPORTED.items()},
        valid_shares=valid_shares(crops),
        source=SOURCE,
    )
    save(found, options.out)
    print(f"{len(crops)} crops, {len(volumes)} volumes, {len(found.classes)} classes: {options.out}")


if __name__ == "__main__":
    main()
