"""Time and memory of label codes, built from a cold cache and opened again, one process.

python tests/benchmarks/make_crops.py big --crops 1 --edge 1000 --classes 48
python tests/benchmarks/codes.py big                    # codes at their own voxel size, then at twice it
python tests/benchmarks/codes.py crops20 --fingerprint  # geometry, counts, thickness and instances
python tests/benchmarks/codes.py crops20 --open 1000    # memory of many open crops
"""

from __future__ import annotations

import argparse
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from autoseg.data import store
from autoseg.data.classes import Logic, cellmap_table
from autoseg.data.codes import open_codes
from autoseg.data.dataset import Crop, open_dataset
from autoseg.data.integrity import pin
from autoseg.geometry import Grid


def make(data: Path, edge: int, classes: int, chunk: int) -> None:
    """Write the labels of one crop: a block of nested structures, mirrored side by side; its EM is one chunk.

    Slabs of one chunk are held at a time, so the memory needed is that of `edge` x `edge` x `chunk` voxels.
    """
    from make_crops import NAMES, VOXEL_NM, draw_atoms, members

    from autoseg.data import store
    from autoseg.data.dataset import EM_NAME, GROUNDTRUTH, RECON

    tile = draw_atoms((4 * chunk,) * 3, [0])
    mirror = np.concatenate([np.arange(len(tile)), np.arange(len(tile))[::-1]])
    place = np.resize(mirror, edge)
    grid = Grid((edge,) * 3, (VOXEL_NM,) * 3, (0.0,) * 3)
    zarr = data / "big/big.zarr"
    em = zarr / RECON / "em" / EM_NAME
    store.create_array(em / "s0", grid.shape_zyx, np.uint8, (chunk,) * 3)[:chunk, :chunk, :chunk] = 128
    store.write_attributes(em, store.multiscale_attributes(EM_NAME, [grid]))
    for name, lookup in members(NAMES[:classes]).items():
        group = zarr / GROUNDTRUTH / "crop1" / name
        array = store.create_array(group / "s0", grid.shape_zyx, np.uint8, (chunk,) * 3)
        store.write_attributes(group, store.multiscale_attributes(name, [grid]))
        of_class = lookup[tile]
        for z in range(0, edge, chunk):
            array[z : z + chunk] = of_class[place[z : z + chunk]][:, place][:, :, place]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@contextmanager
def timed(what: str) -> Iterator[None]:
    wall, used = time.perf_counter(), time.process_time()
    yield
    wall, used = time.perf_counter() - wall, time.process_time() - used
    print(f"{what}: {wall:.1f} s, {used:.1f} s of CPU; peak RSS {peak_mib():.0f} MiB", flush=True)


def build(crops: tuple[Crop, ...], cache: Path, factors: list[float]) -> None:
    logic = Logic(cellmap_table())
    for factor in factors:
        voxels = num_codes = 0
        with timed(f"codes at {factor:g} times the voxel size"):
            for crop in crops:
                z, y, x = (v * factor for v in crop.grid.voxel_size_nm)
                codes = open_codes(crop, (z, y, x), cache, logic)
                voxels += math.prod(codes.grid.shape_zyx)
                num_codes = max(num_codes, len(codes.states_CK))
        print(f"  {voxels:,} voxels, up to {num_codes} codes in a crop of {len(crops[0].labels)} classes")
    with timed("opened again"):
        for crop in crops:
            open_codes(crop, crop.grid.voxel_size_nm, cache)


def hold(crops: tuple[Crop, ...], cache: Path, number: int) -> None:
    """Open the crops over and over, as so many different ones would be, and look into each."""
    for crop in crops:
        open_codes(crop, crop.grid.voxel_size_nm, cache)
    process = psutil.Process()
    before = process.memory_info().rss
    held = [open_codes(crops[i % len(crops)], crops[i % len(crops)].grid.voxel_size_nm, cache) for i in range(number)]
    opened = process.memory_info().rss
    for step in range(10 * number):
        codes = held[step % number]
        z = step * 7 % codes.grid.shape_zyx[0]
        assert codes.codes_ZYX[z : z + 1, :128, :128].size
    after = process.memory_info().rss
    grown = [(now - before) / 2**20 for now in (opened, after)]
    print(f"{number} open crops: {grown[0]:.1f} MiB; after {10 * number} looks at their codes {grown[1]:.1f} MiB")


def measure(data: Path, cache: Path) -> None:
    """Time codes with counts and checksums alone, then the whole fingerprint, label sanity included."""
    from autoseg.plan import fingerprint

    with timed("geometry and counts, cold"):
        for crop in open_dataset(data).crops:
            open_codes(crop, crop.grid.voxel_size_nm, cache / "counts")
            pin(crop, store.checksums_in(cache / "counts"))

    began: dict[str, tuple[float, float]] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.perf_counter(), time.process_time()
        wall, used = now[0] - began.setdefault(what, now)[0], now[1] - began[what][1]
        if done == total:
            print(f"{what}: {wall:.1f} s, {used:.1f} s of CPU; peak RSS {peak_mib():.0f} MiB", flush=True)

    for what in ("fingerprint, cold", "fingerprint, again"):
        began.clear()
        with timed(what):
            fingerprint(data, cache / "whole", progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 2])
    parser.add_argument("--fingerprint", action="store_true")
    parser.add_argument("--open", type=int)
    parser.add_argument("--make", type=int, metavar="EDGE")
    parser.add_argument("--classes", type=int, default=48)
    parser.add_argument("--chunk", type=int, default=64)
    options = parser.parse_args()
    if options.make:
        make(options.data, options.make, options.classes, options.chunk)
        return
    cache = Path(tempfile.mkdtemp(prefix="autoseg-codes-"))
    try:
        crops = open_dataset(options.data).crops
        if options.fingerprint:
            measure(options.data, cache)
        elif options.open:
            hold(crops, cache, options.open)
        else:
            build(crops, cache, options.factors)
    finally:
        shutil.rmtree(cache)


if __name__ == "__main__":
    main()
