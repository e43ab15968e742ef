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
from scipy.ndimage import gaussian_filter, minimum_filter
from scipy.special import stdtrit

from autoseg.data import store
from autoseg.errors import DataError
from autoseg.geometry import Box
from autoseg.schema import Intensity

SAMPLED_CHUNKS, SAMPLED_VOXELS = 64, 2**16  # voxels of each chunk
MAX_DAMAGED_SHARE = 0.2  # of the sampled chunks
SAMPLED_SECTIONS, SURROUNDINGS = 4, 2.0  # of each chunk; sd in voxels
LEAST_TISSUE = 0.1  # of a section, for its mean to count
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

    Mean and sd are those of all voxels of these chunks, percentiles of some. Exact zeros that fill more than 2 % of the
    sample are padding and do not count. Chunks that cannot be decoded are passed over and named; DataError if they are
    more than a fifth of the sample (and more than one).
    """
    parts, damaged = _sample(array, seed)
    num_sampled = len(parts) + len(damaged)
    if damaged and (not parts or len(damaged) > max(1, MAX_DAMAGED_SHARE * num_sampled)):
        what = f"{len(damaged)} of {num_sampled} sampled chunks cannot be used, first: {damaged[0]}"
        raise DataError(array.path, what, "restore the files")
    zeros, total = sum(part.num_zeros for part in parts), sum(part.box.num_voxels for part in parts)
    padded = total > zeros > PADDING_SHARE * total
    grey = np.concatenate([part.grey for part in parts]).astype(np.float64)
    grey = grey[grey != 0] if padded and (grey != 0).any() else grey
    low, median, high = np.percentile(grey, [0.5, 50, 99.5])
    counted = [part.tissue if padded else part.everything for part in parts]
    mean, sd, num = _pooled(counted)
    found = Intensity(
        minimum=min(part.least_tissue if padded else part.least for part in parts),
        p0_5=float(low),
        p50=float(median),
        p99_5=float(high),
        maximum=max(part.most for part in parts),
        mean=mean,
        sd=sd,
        num_voxels=num,
        mean_interval=_mean_interval(counted, mean, int(array.stored_chunks.sum())),
        drift_z=_drift(parts, sd),
        local_skewness=_local_skewness(parts),
    )
    textured = max(parts, key=lambda part: part.everything.variance).box
    return Measured(found, float(array.stored_chunks.mean()), middle(textured), num_sampled, tuple(damaged))


class _Moments(NamedTuple):
    """Number, mean and variance of the grey values of a chunk."""

    num: int
    mean: float
    variance: float


class _Part(NamedTuple):
    """What is kept of one sampled chunk; tissue is what is not exactly zero."""

    box: Box
    grey: NDArray[Any]
    everything: _Moments
    tissue: _Moments
    num_zeros: int
    least: float
    least_tissue: float
    most: float
    section_means: dict[int, float]
    local: NDArray[np.float32]


def _part(box: Box, values: NDArray[Any]) -> _Part:
    tissue = values[values != 0]
    thin = max(1, box.num_voxels // SAMPLED_VOXELS)
    return _Part(
        box=box,
        grey=values.ravel()[::thin].copy(),
        everything=_moments(values),
        tissue=_moments(tissue),
        num_zeros=int(values.size - tissue.size),
        least=float(values.min()),
        least_tissue=float(tissue.min()) if tissue.size else float("inf"),
        most=float(values.max()),
        section_means=_section_means(box, values),
        local=_local(values),
    )


def _moments(values: NDArray[Any]) -> _Moments:
    if values.size == 0:
        return _Moments(0, 0.0, 0.0)
    return _Moments(values.size, float(values.mean(dtype=np.float64)), float(values.var(dtype=np.float64)))


def _section_means(box: Box, values: NDArray[Any]) -> dict[int, float]:
    """Return the mean of the tissue of each section that holds some."""
    flat = values.reshape(len(values), -1)
    tissue = [section[section != 0] for section in flat]
    return {
        box.start[0] + z: float(found.mean(dtype=np.float64))
        for z, found in enumerate(tissue)
        if found.size >= LEAST_TISSUE * flat.shape[1]
    }


def _local(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return some grey values less their surroundings, none of them near zeros or the border of the chunk."""
    chosen = values[:: max(1, -(-len(values) // SAMPLED_SECTIONS))].astype(np.float32)
    local = chosen - gaussian_filter(chosen, (0, SURROUNDINGS, SURROUNDINGS))
    reach = int(4 * SURROUNDINGS) + 1
    clear = minimum_filter(chosen != 0, (1, 2 * reach + 1, 2 * reach + 1), mode="nearest")
    inside = (slice(None), slice(2, -2), slice(2, -2))
    flat: NDArray[np.float32] = local[inside][clear[inside]]
    return flat[:: max(1, flat.size // SAMPLED_VOXELS)].copy()


def _pooled(parts: Sequence[_Moments]) -> tuple[float, float, int]:
    """Return mean, sd and number of all voxels of the chunks."""
    num = sum(part.num for part in parts)
    mean = sum(part.num * part.mean for part in parts) / num
    squares = sum(part.num * (part.variance + (part.mean - mean) ** 2) for part in parts)
    return mean, (squares / num) ** 0.5, num


def _mean_interval(parts: Sequence[_Moments], mean: float, num_stored: int) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of all stored chunks, as the sampled ones spread; their mean where all were.

    None where a single chunk of several says nothing of the others. Source: Cochran 1977, chapter 6 (ratio of sums).
    """
    if len(parts) == num_stored:
        return mean, mean
    parts = [part for part in parts if part.num]
    if len(parts) < 2:
        return None
    sizes, means = np.array([part.num for part in parts]), np.array([part.mean for part in parts])
    spread = float(np.std(sizes * (means - mean), ddof=1)) / float(sizes.mean())
    share_left = 1 - len(parts) / num_stored
    half = float(stdtrit(len(parts) - 1, 0.975)) * spread * (share_left / len(parts)) ** 0.5
    return mean - half, mean + half


def _drift(parts: Sequence[_Part], sd: float) -> float | None:
    """Return the sd of the means of sections, in sd of grey values; None without two sections.

    Sections are seen in chunks at different places: what the mean changes along y and x, linearly, is taken off.
    """
    rows = [
        (z, *(float(a + b) / 2 for a, b in zip(part.box.start[1:], part.box.stop[1:], strict=True)), mean)
        for part in parts
        for z, mean in part.section_means.items()
    ]
    z, y, x, means = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    if len(np.unique(z)) < 2 or sd <= 0:
        return None
    centred = np.stack([axis - axis.mean() for axis in (z, y, x)], axis=1)
    _, along_y, along_x = np.linalg.lstsq(centred, means - means.mean(), rcond=None)[0]
    level = means - along_y * centred[:, 1] - along_x * centred[:, 2]
    place = np.unique(z, return_inverse=True)[1]
    profile = np.bincount(place, level) / np.bincount(place)
    return float(profile.std()) / sd


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
