r"""Grey values of an EM volume, from a seeded sample of its stored chunks: how bright, how sure of it, which polarity.

::

    grey - its surroundings (2 voxels)         __  _____    ___        dark stain: few voxels far below, the rest a
                                                 \/     \  /           little above, so the skewness is negative
                                                         \/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from autoseg.data import store
from autoseg.errors import DataError
from autoseg.geometry import Box
from autoseg.schema import Intensity

SAMPLED_CHUNKS, SAMPLED_VOXELS = 64, 2**16  # voxels of each chunk
MAX_DAMAGED_SHARE = 0.2  # of the sampled chunks
SAMPLED_SECTIONS, SURROUNDINGS = 4, 2.0  # of each chunk; sd in voxels
CONFIDENCE_95 = 1.96
PROBE_EDGE = 32
PADDING_SHARE = 0.02


class Measured(NamedTuple):
    """Grey values of a volume, the share of its chunks that are stored, a box of texture, what could not be read."""

    intensity: Intensity
    stored_fraction: float
    probe_box: Box
    num_sampled: int
    damaged: tuple[str, ...]


def measure_intensity(array: store.ArrayReader, seed: int = 0) -> Measured:
    """Measure grey values in a seeded sample of stored chunks.

    Exact zeros that fill more than 2 % of the sample are padding and do not count. Chunks that cannot be decoded are
    passed over and named; DataError if they are more than a fifth of the sample (and more than one).
    """
    parts, damaged = _sample(array, seed)
    num_sampled = len(parts) + len(damaged)
    if damaged and (not parts or len(damaged) > max(1, MAX_DAMAGED_SHARE * num_sampled)):
        what = f"{len(damaged)} of {num_sampled} sampled chunks cannot be used, first: {damaged[0]}"
        raise DataError(array.path, what, "restore the files")
    grey = np.concatenate([part.grey for part in parts]).astype(np.float64)
    inside = grey[grey != 0]
    padded = bool(inside.size and np.mean(grey == 0) > PADDING_SHARE)
    if padded:
        grey = inside
    low, median, high = np.percentile(grey, [0.5, 50, 99.5])
    found = Intensity(
        minimum=float(grey.min()),
        p0_5=float(low),
        p50=float(median),
        p99_5=float(high),
        maximum=float(grey.max()),
        mean=float(grey.mean()),
        sd=float(grey.std()),
        num_voxels=int(grey.size),
        mean_interval=_mean_interval(parts, float(grey.mean()), int(array.stored_chunks.sum()), padded),
        drift_z=_drift(parts, float(grey.std())),
        local_skewness=_local_skewness(parts),
    )
    textured = max(parts, key=lambda part: float(part.grey.std())).box
    return Measured(found, float(array.stored_chunks.mean()), middle(textured), num_sampled, tuple(damaged))


class _Part(NamedTuple):
    """What is kept of a sampled chunk: some grey values, the means of its sections, some less their surroundings."""

    box: Box
    grey: NDArray[Any]
    section_means: dict[int, float]
    local: NDArray[np.float32]


def _part(box: Box, values: NDArray[Any]) -> _Part:
    means = {box.start[0] + z: float(section.mean()) for z, section in enumerate(values) if section.any()}
    chosen = values[:: max(1, -(-len(values) // SAMPLED_SECTIONS))].astype(np.float32)
    local = chosen - gaussian_filter(chosen, (0, SURROUNDINGS, SURROUNDINGS))
    flat = local[:, 2:-2, 2:-2].ravel()
    thin = max(1, box.num_voxels // SAMPLED_VOXELS)
    return _Part(box, values.ravel()[::thin].copy(), means, flat[:: max(1, flat.size // SAMPLED_VOXELS)].copy())


def _mean_interval(parts: Sequence[_Part], mean: float, num_stored: int, padded: bool) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of all stored chunks, as the sampled ones spread.

    None where a single chunk of several says nothing of the others.
    """
    if len(parts) == num_stored:
        return mean, mean
    kept = [part.grey[part.grey != 0] if padded else part.grey for part in parts]
    means = [float(grey.mean()) for grey in kept if grey.size]
    if len(means) < 2:
        return None
    share_left = 1 - len(parts) / num_stored
    half = CONFIDENCE_95 * float(np.std(means, ddof=1)) * (share_left / len(means)) ** 0.5
    return mean - half, mean + half


def _drift(parts: Sequence[_Part], sd: float) -> float | None:
    """Return the sd of the means of sections, in sd of grey values; None where fewer than two can be compared."""
    by_section: dict[int, list[float]] = {}
    for part in parts:
        for z, mean in part.section_means.items():
            by_section.setdefault(z, []).append(mean)
    means = [float(np.mean(found)) for found in by_section.values()]
    return float(np.std(means)) / sd if len(means) > 1 and sd > 0 else None


def _local_skewness(parts: Sequence[_Part]) -> float | None:
    """Return the skewness of grey values less their surroundings: thin stained structures are its tail."""
    local = np.concatenate([part.local for part in parts]).astype(np.float64)
    if local.size == 0 or local.std() == 0:
        return None
    return float(np.mean(((local - local.mean()) / local.std()) ** 3))


def _sample(array: store.ArrayReader, seed: int) -> tuple[list[_Part], list[str]]:
    """Return (what is kept of each sampled chunk, why others could not be read)."""
    stored = np.argwhere(array.stored_chunks)
    if len(stored) == 0:
        raise DataError(array.path, "not one chunk of the EM is stored", "fetch the EM of this volume")
    rng = np.random.Generator(np.random.Philox(seed))
    chosen = rng.permutation(len(stored))[:SAMPLED_CHUNKS]
    whole = Box.whole(array.shape_zyx)
    parts, damaged = [], []
    for z, y, x in stored[np.sort(chosen)].tolist():
        start = (z * array.chunk_zyx[0], y * array.chunk_zyx[1], x * array.chunk_zyx[2])
        stop = tuple(a + c for a, c in zip(start, array.chunk_zyx, strict=True))
        box = Box(start, (stop[0], stop[1], stop[2])).clip(whole)
        try:
            values = array.read(box)
        except DataError as error:
            damaged.append(error.what)
            continue
        if not np.isfinite(values).all():
            raise DataError(array.path, "holds NaN or infinite grey values", "replace them by a finite value")
        parts.append(_part(box, values))
    return parts, damaged


def middle(box: Box) -> Box:
    """Return the middle of a box, up to PROBE_EDGE voxels wide."""
    edges = [min(n, PROBE_EDGE) for n in box.shape_zyx]
    z, y, x = (a + (n - e) // 2 for a, n, e in zip(box.start, box.shape_zyx, edges, strict=True))
    return Box((z, y, x), (z + edges[0], y + edges[1], x + edges[2]))
