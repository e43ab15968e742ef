"""Make a data set in the layout of the CellMap challenge, as large as a benchmark needs; the same for the same seed.

Each EM volume holds its crops in a row along x. Only the chunks around a crop are stored, as the challenge's fetch
leaves them; the chunks between are absent::

    EM s0, s1   |#########|. . . .|#########|. . . .|#########|      # stored   . never fetched
    crops         [crop 1]          [crop 2]          [crop 3]

Every voxel of a crop belongs to one atom (a membrane, a lumen, cytoplasm ...) drawn by level sets of smooth random
fields; a class is a union of atoms, so classes nest as in the challenge's table and never contradict it::

    python tests/benchmarks/make_crops.py crops20 --crops 20 --edge 200 --classes 14
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import norm

from autoseg.data import store
from autoseg.data.classes import cellmap_table
from autoseg.data.dataset import EM_NAME, GROUNDTRUTH, RECON
from autoseg.geometry import Box, Grid, VoxelsZYX

VOXEL_NM = 8.0
PLANES = 16  # drawn at once, so that a 1000³ crop needs two bytes a voxel and not forty
PAD = 2  # knots beyond each face that a cubic spline needs


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "ecs pm mito_mem mito_lum mito_ribo golgi_mem golgi_lum ves_mem ves_lum endo_mem endo_lum er_mem er_lum nuc "
    "cyto mito er golgi ves endo lyso_mem lyso_lum lyso ld_mem ld_lum ld eres_mem eres_lum eres perox_mem perox_lum "
    "perox ne_mem ne_lum ne np_out np_in np hchrom echrom nucpl chrom mt_out mt_in mt cell er_mem_all ne_mem_all"
)
ATOMS = _words(
    "ecs pm cyto er_mem er_lum eres_mem eres_lum golgi_mem golgi_lum mito_mem mito_lum mito_ribo ves_mem ves_lum "
    "endo_mem endo_lum lyso_mem lyso_lum ld_mem ld_lum perox_mem perox_lum mt_out mt_in ne_mem ne_lum np_out np_in "
    "hchrom echrom nucpl"
)
GREY = {"ecs": 186, "cyto": 140, "hchrom": 86, "echrom": 130, "nucpl": 168, "mito_lum": 112, "lyso_lum": 90, "pm": 72}


class Body(NamedTuple):
    """Blobs of one kind: the share of space they fill, their size, and their layers from the outside inwards."""

    share: float
    size_nm: float
    layers: tuple[tuple[float, str], ...]


def _membrane(name: str, share: float, size_nm: float, membrane_nm: float = 18.0) -> Body:
    return Body(share, size_nm, ((membrane_nm, f"{name}_mem"), (np.inf, f"{name}_lum")))


# Painted in this order, each over the ones before, inside the cell.
BODIES = (
    _membrane("er", 0.12, 120),
    _membrane("eres", 0.012, 90),
    _membrane("golgi", 0.03, 110),
    _membrane("mito", 0.10, 170, 24),
    _membrane("ves", 0.012, 60, 14),
    _membrane("endo", 0.02, 120),
    _membrane("lyso", 0.015, 130),
    _membrane("ld", 0.015, 140, 14),
    _membrane("perox", 0.012, 110, 14),
    Body(0.006, 50, ((12, "mt_out"), (np.inf, "mt_in"))),
    Body(0.20, 560, ((24, "ne_mem"), (24, "ne_lum"), (24, "ne_mem"), (np.inf, "echrom"))),
)
CELL = Body(0.92, 700, ((24, "pm"), (np.inf, "cyto")))


class Field:
    """A smooth random field of unit variance: a cubic spline through white noise, one knot every `size_nm`."""

    def __init__(self, rng: np.random.Generator, shape_zyx: VoxelsZYX, size_nm: float) -> None:
        self._step = size_nm / VOXEL_NM
        counts = [int(np.ceil(n / self._step)) + 2 + 2 * PAD for n in shape_zyx]
        knots = rng.standard_normal(counts, np.float32)
        weights = [self._weights(n, c) for n, c in zip(shape_zyx, counts, strict=True)]
        self._z = weights[0]
        self._knots, self._y, self._x = knots, weights[1], weights[2]
        spread = np.sqrt(np.mean([(w**2).sum(axis=1).mean() for w in weights]) ** 3)
        self._knots /= spread
        self.per_nm = 0.95 / size_nm  # typical slope, by which a difference in value becomes a distance

    def _weights(self, voxels: int, knots: int) -> NDArray[np.float32]:
        t = np.abs(np.arange(voxels)[:, None] / self._step + PAD - np.arange(knots))
        cubic = np.where(t < 1, (4 - 6 * t**2 + 3 * t**3) / 6, np.maximum(2 - t, 0) ** 3 / 6)
        return cubic.astype(np.float32)

    def planes(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the field on planes start to stop - 1, z, y, x."""
        planes: NDArray[np.float32] = self._y @ np.tensordot(self._z[start:stop], self._knots, (1, 0)) @ self._x.T
        return planes


def draw_atoms(shape_zyx: VoxelsZYX, seed: list[int]) -> NDArray[np.uint8]:
    """Return the index into ATOMS of every voxel, z, y, x."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    bodies = [(body, Field(rng, shape_zyx, body.size_nm)) for body in (CELL, *BODIES)]
    fine = Field(rng, shape_zyx, 40.0)
    atoms = np.zeros(shape_zyx, np.uint8)
    for start in range(0, shape_zyx[0], PLANES):
        stop = min(start + PLANES, shape_zyx[0])
        out = atoms[start:stop]
        inside = np.ones(out.shape, bool)
        for body, field in bodies:
            depth_nm = (field.planes(start, stop) - np.float32(norm.isf(body.share))) / np.float32(field.per_nm)
            _paint(out, depth_nm, inside, body)
            if body is CELL:
                inside = depth_nm > body.layers[0][0]
        _texture(out, fine.planes(start, stop))
    return atoms


def _paint(out: NDArray[np.uint8], depth_nm: NDArray[np.float32], inside: NDArray[np.bool_], body: Body) -> None:
    reached = 0.0
    for thickness, name in body.layers:
        out[inside & (depth_nm > reached)] = ATOMS.index(name)
        reached += thickness


def _texture(out: NDArray[np.uint8], fine: NDArray[np.float32]) -> None:
    """Split chromatin, and set pores into the envelope and ribosomes into mitochondria."""
    index = {name: ATOMS.index(name) for name in ATOMS}
    chromatin = out == index["echrom"]
    envelope = (out == index["ne_mem"]) | (out == index["ne_lum"])
    out[chromatin & (fine > 0.7)] = index["hchrom"]
    out[chromatin & (fine < -0.5)] = index["nucpl"]
    out[envelope & (fine > 1.5)] = index["np_out"]
    out[envelope & (fine > 2.0)] = index["np_in"]
    out[(out == index["mito_lum"]) & (fine > 2.2)] = index["mito_ribo"]


def draw_em(atoms: NDArray[np.uint8], seed: list[int]) -> NDArray[np.uint8]:
    """Return grey values of these atoms, z, y, x: membranes dark, blurred within sections, with noise."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    membrane = ("mem", "out", "ribo")
    grey = np.array([GREY.get(name, 74 if name.endswith(membrane) else 158) for name in ATOMS], np.float32)
    out = np.empty(atoms.shape, np.uint8)
    for z, section in enumerate(atoms):
        blurred = ndimage.gaussian_filter(grey[section], 0.8)
        blurred += 11 * rng.standard_normal(section.shape, np.float32)
        out[z] = np.clip(np.rint(blurred), 1, 255)
    return out


def members(names: tuple[str, ...]) -> dict[str, NDArray[np.uint8]]:
    """Return for each class which atoms it consists of, as 0 and 1 by index into ATOMS."""
    parts = {entry.name: entry.components for entry in cellmap_table().classes}

    def atoms_of(name: str) -> set[str]:
        return {name}.union(*(atoms_of(part) for part in parts[name]))

    return {name: np.array([atom in atoms_of(name) for atom in ATOMS], np.uint8) for name in names}


def make_crops(
    out: Path, *, crops: int, edge: int, classes: int, seed: int = 0, chunk: int = 64, per_volume: int = 5
) -> Path:
    """Write the data set to a folder beside `out`, then rename it; return `out`, which must not exist."""
    if out.exists():
        raise FileExistsError(out)
    names = NAMES[:classes]
    if len(names) < classes:
        raise ValueError(f"{classes} classes asked for, {len(NAMES)} can be made")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for volume, numbers in enumerate(_groups(crops, per_volume), start=1):
            _write_volume(temporary, f"bench-{volume}", numbers, _Shape(edge, chunk), names, seed)
        temporary.chmod(0o755)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


class _Shape(NamedTuple):
    edge: int
    chunk: int

    @property
    def stored(self) -> int:
        """Edge of the EM that is stored around a crop: whole chunks of s1."""
        return -(-self.edge // (2 * self.chunk)) * 2 * self.chunk

    @property
    def margin(self) -> int:
        return (self.stored - self.edge) // 2

    @property
    def stride(self) -> int:
        return self.stored + 2 * self.chunk


def _groups(crops: int, per_volume: int) -> Iterator[range]:
    for first in range(1, crops + 1, per_volume):
        yield range(first, min(first + per_volume, crops + 1))


def _write_volume(root: Path, name: str, numbers: range, shape: _Shape, names: tuple[str, ...], seed: int) -> None:
    zarr = root / name / f"{name}.zarr"
    em_group = zarr / RECON / "em" / EM_NAME
    length = shape.stride * (len(numbers) - 1) + shape.stored
    grid = Grid((shape.stored, shape.stored, length), (VOXEL_NM,) * 3, (0.0, 0.0, 0.0))
    half = Grid((shape.stored // 2, shape.stored // 2, length // 2), (2 * VOXEL_NM,) * 3, (VOXEL_NM / 2,) * 3)
    chunk = (shape.chunk,) * 3
    levels = [
        store.create_array(em_group / f"s{i}", g.shape_zyx, np.uint8, chunk, store_zeros=True)
        for i, g in enumerate((grid, half))
    ]
    store.write_attributes(em_group, store.multiscale_attributes(EM_NAME, [grid, half]))
    for k, number in enumerate(numbers):
        x = k * shape.stride
        atoms = draw_atoms((shape.stored,) * 3, [seed, number, 0])
        for z in range(0, shape.stored, 2 * shape.chunk):
            em = draw_em(atoms[z : z + 2 * shape.chunk], [seed, number, 1, z])
            box = Box((z, 0, x), (z + len(em), shape.stored, x + shape.stored))
            levels[0][box.slices] = em
            pairs = em.reshape(len(em) // 2, 2, shape.stored // 2, 2, shape.stored // 2, 2)
            levels[1][z // 2 : (z + len(em)) // 2, :, x // 2 : (x + shape.stored) // 2] = np.rint(pairs.mean((1, 3, 5)))
        m, e = shape.margin, shape.edge
        inside = Box((m, m, m), (m + e, m + e, m + e))
        lies = grid.crop(inside.shift((0, 0, x)))
        _write_crop(zarr / GROUNDTRUTH / f"crop{number}", atoms[inside.slices], lies, names, chunk)
    store.make_groups(zarr, em_group.parent)
    store.make_groups(zarr, zarr / GROUNDTRUTH)


def _write_crop(group: Path, atoms: NDArray[np.uint8], grid: Grid, names: tuple[str, ...], chunk: VoxelsZYX) -> None:
    shape = grid.shape_zyx
    chunk = (min(chunk[0], shape[0]), min(chunk[1], shape[1]), min(chunk[2], shape[2]))
    for name, lookup in members(names).items():
        array = store.create_array(group / name / "s0", shape, np.uint8, chunk)
        absent = 0
        for z in range(0, shape[0], chunk[0]):
            voxels = lookup[atoms[z : z + chunk[0]]]
            array[z : z + chunk[0]] = voxels
            absent += int(np.count_nonzero(voxels == 0))
        encoding = {"absent": 0, "present": 1, "unknown": 255}
        kind = {"type": "semantic_segmentation", "encoding": encoding}
        annotation: dict[str, Any] = {"class_name": name, "annotation_type": kind}
        counted = annotation | {"complement_counts": {"absent": absent, "unknown": 0}}
        space = store.multiscale_attributes(name, [grid])
        store.write_attributes(group / name, space | {"cellmap": {"annotation": annotation}})
        store.write_attributes(group / name / "s0", {"cellmap": {"annotation": counted}})
    known = {"version": "0.1.1", "name": group.name, "class_names": list(names), "created_by": [], "created_with": []}
    blank = dict.fromkeys(("description", "start_date", "end_date", "duration_days", "protocol_uri"))
    store.write_attributes(group, {"cellmap": {"annotation": known | blank}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--crops", type=int, default=20)
    parser.add_argument("--edge", type=int, default=200, help="voxels of 8 nm")
    parser.add_argument("--classes", type=int, default=14, help=f"1 to {len(NAMES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=64, help="edge of a chunk; an even number")
    parser.add_argument("--per-volume", type=int, default=5, help="crops in one EM volume")
    options = parser.parse_args()
    made = make_crops(**vars(options))
    print(f"wrote {made}", file=sys.stderr)


if __name__ == "__main__":
    main()
