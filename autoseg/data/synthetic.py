r"""Synthetic volume electron microscopy with exact ground truth, for `autoseg demo` and the tests.

One cell, about 1 um wide, in section (every voxel is exactly one of ATOMS)::

    . . . . . . . . . . . . . . . . .      .    ecs     extracellular space, bright
    . ############################# .      #    pm      plasma membrane, dark like each membrane
    . #    .-------.   (|_|_|_|_|) # .     (|)  mito_mem around mito_lum with its cristae
    . #  / @@@ : : @\     =======  # .     =    er_mem around er_lum, sheets
    . # | @@ : o o  @|  ======     # .     / \  ne_mem, ne_lum, ne_mem: a double membrane
    . # | @ : o o @@@|     ======= # .     @    hchrom  dark, along the envelope and inside
    . #  \ @@@ : : @/   (|_|_|_|)  # .     :    echrom  mid-grey, between @ and o
    . #    `-------'               # .     o    nucpl   bright
    . ############################# .           cyto    mid-grey, the rest

Smooth signed distances in nm, positive inside, on a 20 nm lattice drawn from seed and extent only,
are sampled at voxel centres: one seed and extent show the same cells at any voxel size.  Wider than
in life, to span 2-3 voxels at 8 nm: membranes (22-26 nm) and the extracellular gap (from 56 nm).
There are no nuclear pores.  Classes share grey values on purpose: only context tells them apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
Real = NDArray[np.floating[Any]]
Rng = np.random.Generator

ATOMS: tuple[str, ...] = (
    *("ecs", "pm", "mito_mem", "mito_lum", "er_mem", "er_lum"),
    *("ne_mem", "ne_lum", "hchrom", "echrom", "nucpl", "cyto"),
)
ECS, PM, MITO_MEM, MITO_LUM, ER_MEM, ER_LUM = range(6)
NE_MEM, NE_LUM, HCHROM, ECHROM, NUCPL, CYTO = range(6, 12)
_GREY = np.array([186, 74, 72, 118, 76, 182, 74, 184, 86, 130, 168, 140], np.float32)
_TEXTURE = np.array([6, 7, 7, 9, 7, 6, 7, 6, 11, 13, 11, 12], np.float32)

CELL_NM = 960.0
PM_NM, MITO_MEM_NM, ER_MEM_NM = 24.0, 26.0, 22.0
NE_BANDS_NM = (0.0, 24.0, 52.0, 76.0)  # where outer membrane, lumen, inner membrane, inside begin
ER_HALF_LUMEN_NM = 16.0
CLEARANCE_NM = 12.0  # of cytoplasm around each organelle
_LATTICE_NM = 20.0
_PAD = 2  # knots beyond each face of the volume that a cubic spline needs


class SyntheticVolume(NamedTuple):
    """A grey volume ZYX, the index into ATOMS of each voxel, and instance ids 1.. by object."""

    em_ZYX: U8
    atom_ZYX: U8
    instances_ZYX: dict[str, NDArray[np.uint16]]


class _Grid(NamedTuple):
    """Points in the volume, spanned by three axes: the lattice of the geometry, or the voxels."""

    extent_nm: F32
    axes_nm: tuple[Real, ...]

    def sample(self, knots: F32, spacing_nm: float = _LATTICE_NM) -> F32:
        """Evaluate the cubic B-spline with knots ZYX, one every spacing_nm, at each point."""
        weights = []
        for position, count in zip(self.axes_nm, knots.shape, strict=True):
            t = np.abs(position[:, None] / spacing_nm + _PAD - np.arange(count))
            cubic = np.where(t < 1, (4 - 6 * t**2 + 3 * t**3) / 6, np.maximum(2 - t, 0) ** 3 / 6)
            weights.append(cubic.astype(np.float32))
        sampled: F32 = weights[1] @ np.tensordot(weights[0], knots, axes=(1, 0)) @ weights[2].T
        return sampled

    def noise(self, rng: Rng, spacing_nm: float) -> F32:
        """Draw a field ZYX, smooth below spacing_nm; 3.0 brings it to about unit variance."""
        shape = np.ceil(self.extent_nm / spacing_nm).astype(int) + 2 + 2 * _PAD
        return self.sample(3.0 * rng.standard_normal(shape, np.float32), spacing_nm)


class _Scene(NamedTuple):
    """All there is to see, free of voxels; distances in nm, positive inside."""

    cell: F32
    nucleus: F32
    chromatin: F32  # levels 1 and 0 part hchrom, echrom and nucpl
    er_sheet: F32  # zero in the middle of a sheet
    er_end: F32  # positive beyond the rim of the lumen
    mito: F32
    mito_id: I32
    mito_axis: F32  # unit vector zyx of each mito id
    cell_id: I32


def synthesize(
    shape_zyx: tuple[int, int, int], voxel_size_nm: tuple[float, float, float], seed: int
) -> SyntheticVolume:
    """Make one volume of shape_zyx voxels, each voxel_size_nm (zyx) large.

    A pure function of its arguments.  Every atom occurs from 768 nm a side (96 voxels at 8 nm)
    upwards.  Thick sections are sampled at their centre, as in block-face imaging, not projected.
    """
    geometry, imaging = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    extent = np.array(shape_zyx, np.float32) * np.array(voxel_size_nm, np.float32)
    scene = _build_scene(geometry, extent)
    axes = ((np.arange(n) + 0.5) * v for n, v in zip(shape_zyx, voxel_size_nm, strict=True))
    grid = _Grid(extent, tuple(axes))
    atom = _classify(scene, grid)
    nearest = np.ix_(*(np.rint(p / _LATTICE_NM).astype(int) + _PAD for p in grid.axes_nm))
    cell = np.where(atom != ECS, scene.cell_id[nearest], 0)
    nuc = np.where((atom >= NE_MEM) & (atom <= NUCPL), cell, 0)
    mito = np.where((atom == MITO_MEM) | (atom == MITO_LUM), scene.mito_id[nearest], 0)
    em = _render(imaging, grid, atom, mito, scene.mito_axis)
    ids = {"mito": mito, "nuc": nuc, "cell": cell}
    return SyntheticVolume(em, atom, {name: _number_bodies(i) for name, i in ids.items()})


def _build_scene(rng: Rng, extent_nm: F32) -> _Scene:
    """Draw cells with nuclei, then mitochondria, then ER, each where the former leave room."""
    counts = np.ceil(extent_nm / _LATTICE_NM).astype(int) + 1 + 2 * _PAD
    axes = [(np.arange(n, dtype=np.float32) - _PAD) * _LATTICE_NM for n in counts]
    points = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    lattice = _Grid(extent_nm, tuple(axes))
    cell, nucleus, cell_id = _grow_cells(rng, lattice, points)
    room = np.minimum(cell - PM_NM, -nucleus) - CLEARANCE_NM
    mito, mito_id, mito_axis = _grow_mitos(rng, lattice, points, room)
    er_sheet, er_end = _grow_er(rng, lattice, np.minimum(room, -mito - CLEARANCE_NM))
    depth = nucleus - NE_BANDS_NM[-1]
    density = lattice.noise(rng, 75.0) + 1.8 * np.exp(-np.maximum(depth, 0) / 40)
    low, high = np.quantile(density[depth > 0], (0.3, 0.66)) if (depth > 0).any() else (0, 1)
    chromatin = ((density - low) / (high - low)).astype(np.float32)
    return _Scene(cell, nucleus, chromatin, er_sheet, er_end, mito, mito_id, mito_axis, cell_id)


def _place_sites(rng: Rng, extent_nm: F32) -> F32:
    """Place cell centres (N, 3) in nm, a jittered staggered lattice that also covers the rim.

    One is kept near a corner of the volume, so that its nucleus and the gap opposite both fit.
    """
    steps = [np.arange(-1, n + 2) for n in np.ceil(extent_nm / CELL_NM)]
    k = np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 3)
    stagger = 0.5 * np.stack([0 * k[:, 0], k[:, 0] % 2, (k[:, 0] + k[:, 1]) % 2], 1)
    jitter = rng.uniform(-0.12, 0.12, k.shape) * (k != 0).any(1, keepdims=True)
    sites = np.minimum(0.24 * extent_nm, 400.0) + CELL_NM * (k + stagger + jitter)
    sites += (rng.random(3) < 0.5) * (extent_nm - 2 * sites)  # mirrored
    return np.asarray(sites, np.float32)


def _grow_cells(rng: Rng, lattice: _Grid, points_nm: F32) -> tuple[F32, F32, I32]:
    """Grow rounded Voronoi cells: depth in the cell, depth in its nucleus, and its id, ZYX."""
    points = points_nm + 34 * np.stack([lattice.noise(rng, 240.0) for _ in range(3)])
    sites = _place_sites(rng, lattice.extent_nm)
    nearest_sq = np.full(points.shape[1:], np.inf, np.float32)
    owner = np.zeros(points.shape[1:], np.int32)
    for j, site in enumerate(sites):
        box, dist_sq = _near(points, site, 1.6 * CELL_NM)
        owner[box][dist_sq < nearest_sq[box]] = j
        np.minimum(nearest_sq[box], dist_sq, out=nearest_sq[box])
    apart = np.linalg.norm(sites[:, None] - sites, axis=-1).astype(np.float32)
    np.fill_diagonal(apart, np.inf)
    # A soft minimum over the bisecting planes rounds the edges where three cells meet.
    softness, crowd = 30.0, np.full(owner.shape, 1e-12, np.float32)
    for j, site in enumerate(sites):
        box, dist_sq = _near(points, site, 1.6 * CELL_NM)
        plane = (dist_sq - nearest_sq[box]) / (2 * apart[j, owner[box]])
        crowd[box] += np.where(owner[box] == j, 0, np.exp(-plane / softness))
    half_gap = np.clip(34 + 10 * lattice.noise(rng, 150.0), 28, 70)
    cell = _to_distance(-softness * np.log(crowd)) - half_gap
    radii = rng.uniform(245, 315, len(sites)).astype(np.float32)
    nucleus = _to_distance(radii[owner] - np.sqrt(nearest_sq))
    return cell, np.minimum(nucleus, cell - PM_NM - 60), owner + 1


def _grow_mitos(rng: Rng, lattice: _Grid, points_nm: F32, room_nm: F32) -> tuple[F32, I32, F32]:
    """Grow bent capsules where there is room: depth and id ZYX, and the long axis of each id."""
    room = room_nm.copy()
    depth, ids = np.full(room.shape, -CELL_NM, np.float32), np.zeros(room.shape, np.int32)
    wobble = 4 * lattice.noise(rng, 90.0)
    points = points_nm.reshape(3, -1)
    starts = np.flatnonzero((np.abs(points / lattice.extent_nm[:, None] - 0.5) <= 0.5).all(0))
    axes = [np.zeros(3)]
    for trial in range(1 + int(len(starts) * _LATTICE_NM**3 / 2e7)):
        picks = rng.choice(starts, 48) if trial else starts
        start = picks[np.argmax(room.flat[picks])]
        radius = min(rng.uniform(75, 110), float(room.flat[start]) - 2 * CLEARANCE_NM)
        if trial and radius < 66:
            continue
        path = _walk(rng, room, points[:, start], radius)
        for bead in path:
            box, dist_sq = _near(points_nm, bead, radius + 150)
            body = radius - np.sqrt(dist_sq) + wobble[box]
            ids[box][body > depth[box]] = len(axes)
            np.maximum(depth[box], body, out=depth[box])
            np.minimum(room[box], -body - CLEARANCE_NM, out=room[box])
        along = path[-1] - path[0] + 1e-3
        axes.append(along / np.linalg.norm(along))
    return depth, ids, np.array(axes, np.float32)


def _walk(rng: Rng, room_nm: F32, start_nm: Real, radius_nm: float) -> F32:
    """Find a long, gently bent path (N, 3) in nm that keeps a radius of room all along."""
    best, last = [start_nm], np.array(room_nm.shape) - 1
    for _ in range(8):
        path, step = [start_nm], rng.standard_normal(3)
        for _ in range(rng.integers(8, 24)):
            step = 24 * step / np.linalg.norm(step) + rng.normal(0, 3.5, 3)
            knot = np.clip(np.rint((path[-1] + step) / _LATTICE_NM) + _PAD, 0, last).astype(int)
            if room_nm[tuple(knot)] < radius_nm + 3 * CLEARANCE_NM:
                break
            path.append(path[-1] + step)
        best = max(best, path, key=len)
    return np.array(best, np.float32)


def _grow_er(rng: Rng, lattice: _Grid, room_nm: F32) -> tuple[F32, F32]:
    """Grow sheets: distance to their middle and beyond the rim of their lumen, in nm, ZYX.

    Sheets are level sets of a wave, save where it is too flat for a thin one; the share kept is a
    quantile over the room there is, which puts ER in every volume that has room for it.
    """
    wall = ER_MEM_NM + CLEARANCE_NM - room_nm
    roomy = wall < 0 if (wall < 0).any() else np.ones_like(wall, bool)
    wave = lattice.noise(rng, 150.0)
    slope = _slope(wave)
    typical = float(np.median(slope))
    sheet = (wave - np.median(wave[roomy])) / np.maximum(slope, 0.4 * typical)
    rim = 150 * lattice.noise(rng, 190.0) + 300 * np.maximum(0.7 - slope / typical, 0)
    end = np.maximum(_to_distance(rim - np.quantile(rim[roomy], 0.8)), wall)
    # Drop membrane that would stand alone where there is almost, but not quite, a lumen.
    lumen = (end < 0) & (np.abs(sheet) < ER_HALF_LUMEN_NM + _LATTICE_NM / 2)
    end[~ndimage.binary_dilation(lumen, np.ones((3, 3, 3), bool), 2)] = 3 * ER_MEM_NM
    return sheet.astype(np.float32), end.astype(np.float32)


def _classify(scene: _Scene, grid: _Grid) -> U8:
    """Name the atom at each point of a grid, ZYX."""
    to_lumen = np.maximum(np.abs(grid.sample(scene.er_sheet)) - ER_HALF_LUMEN_NM, 0)
    er = np.hypot(to_lumen, np.maximum(grid.sample(scene.er_end), 0))
    atom = np.full(er.shape, CYTO, np.uint8)
    atom[er < ER_MEM_NM] = ER_MEM
    atom[er <= 0] = ER_LUM
    depth = grid.sample(scene.mito)
    atom[depth > 0] = MITO_MEM
    atom[depth > MITO_MEM_NM] = MITO_LUM
    depth = grid.sample(scene.nucleus)
    for begin_nm, band in zip(NE_BANDS_NM, (NE_MEM, NE_LUM, NE_MEM, ECHROM), strict=True):
        atom[depth > begin_nm] = band
    chromatin = grid.sample(scene.chromatin)
    atom[(atom == ECHROM) & (chromatin > 1)] = HCHROM
    atom[(atom == ECHROM) & (chromatin < 0)] = NUCPL
    depth = grid.sample(scene.cell)
    atom[depth < PM_NM] = PM
    atom[depth < 0] = ECS
    return atom


def _render(rng: Rng, grid: _Grid, atom: U8, mito_id: I32, mito_axis: F32) -> U8:
    """Image atoms as grey values ZYX: texture, then blur, uneven light and sensor noise."""
    grain, drift = grid.noise(rng, 24.0), grid.noise(rng, 110.0)
    grey = _GREY[atom] + _TEXTURE[atom] * grain + 6 * drift
    grey[(atom == CYTO) & (grain > 1.3)] -= 32  # ribosomes
    lumen = np.nonzero(atom == MITO_LUM)
    point = np.stack([p[i] for p, i in zip(grid.axes_nm, lumen, strict=True)], -1)
    along = np.einsum("ni,ni->n", point, mito_axis[mito_id[lumen]])
    grey[lumen] -= 26 * np.sin(along / 10 + 1.5 * drift[lumen])  # cristae, 63 nm apart
    ndimage.gaussian_filter(grey, 6.0 * np.array(grey.shape) / grid.extent_nm, output=grey)
    grey += 7 * grid.noise(rng, 900.0)
    grey += np.sqrt(60 + 0.8 * np.maximum(grey, 0)) * rng.standard_normal(grey.shape, np.float32)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _number_bodies(ids: I32) -> NDArray[np.uint16]:
    """Give connected bodies of all ids numbers from 1, so that no instance is in two pieces."""
    bodies, total = np.zeros(ids.shape, np.uint16), 0
    for value, box in enumerate(ndimage.find_objects(ids), start=1):
        if box is not None:
            parts, count = ndimage.label(ids[box] == value, np.ones((3, 3, 3), bool))
            bodies[box][parts > 0] = parts[parts > 0] + total
            total += count
    return bodies


def _near(points_nm: F32, centre_nm: F32, reach_nm: float) -> tuple[tuple[slice, ...], F32]:
    """Slice the lattice within reach of a centre, with squared distances in nm^2, ZYX."""
    ends = np.stack([centre_nm - reach_nm, centre_nm + reach_nm]) / _LATTICE_NM + _PAD + 1
    box = tuple(slice(*pair) for pair in np.maximum(ends, 0).astype(int).T)
    z, y, x = (points_nm[i][box] - centre_nm[i] for i in range(3))
    return box, z * z + y * y + x * x


def _slope(level: Real) -> F32:
    """Measure the gradient on the lattice, per nm, ZYX."""
    return np.asarray(np.linalg.norm(np.array(np.gradient(level, _LATTICE_NM)), axis=0), np.float32)


def _to_distance(level: Real) -> F32:
    """Rescale a level function to the distance to its zero level, in nm, exact only near it."""
    return (level / np.clip(_slope(level), 0.6, 4.0)).astype(np.float32)
