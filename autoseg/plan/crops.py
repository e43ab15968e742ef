"""One crop -> its facts: what of each class is annotated in it, from every voxel of its label codes.

Of a crop that holds too much to be read, seeded boxes are coded and counted in its place, and counts are scaled::

    +--+--+--+--+--+--+
    |  |##|  |  |  |  |      64 boxes of 128³: share of a class = voxels of the class / known voxels, over all boxes;
    +--+--+--+--+--+--+      its 95 % interval from how far the boxes lie apart
    |  |  |  |##|  |##|
    +--+--+--+--+--+--+
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, Logic, States
from autoseg.data.codes import CropCodes, open_codes
from autoseg.data.coding import INDEX_BLOCK, check_room
from autoseg.data.dataset import Crop
from autoseg.data.integrity import find_missing, pin
from autoseg.data.store import checksums_in
from autoseg.data.traits import CropTraits, remembered
from autoseg.geometry import Box, VoxelsZYX, part_length
from autoseg.schema import ClassCount, Contradiction, CropFacts, Finding

WHOLE_LABEL_VOXELS = 2**36  # voxels x classes that are read whole: minutes
SAMPLED_BOXES = 64
SAMPLED_BOX: VoxelsZYX = (128, 128, 128)
NORMAL_95 = 1.96
SECTIONS = 64  # of label codes, looked at together


class OpenCrop(NamedTuple):
    """One crop, the codes of all of it or of boxes of it, and what their codes, one after the other, mean.

    States are those of the classes of the fingerprint; `histogram_C` has the voxels of each code.
    """

    crop: Crop
    parts: tuple[CropCodes, ...]
    states_CK: States
    histogram_C: NDArray[np.int64]
    conflicts_C: NDArray[np.bool_]
    contradictions: tuple[Contradiction, ...]

    @property
    def is_sample(self) -> bool:
        """Whether only boxes of the crop were read."""
        return self.parts[0].crop is not self.crop

    @property
    def scale(self) -> float:
        """Return voxels of the crop by voxels that were read."""
        return math.prod(self.crop.grid.shape_zyx) / int(self.histogram_C.sum())

    @property
    def cooccurrence_KK(self) -> NDArray[np.int64]:
        """Return the voxels that hold both of two classes."""
        present_CK = (self.states_CK == PRESENT).astype(np.int64)
        found: NDArray[np.int64] = present_CK.T @ (present_CK * self.histogram_C[:, None])
        return np.rint(found * self.scale).astype(np.int64) if self.is_sample else found

    def of_parts(self) -> Iterator[tuple[CropCodes, States]]:
        """Yield the codes of each part, with the states of its codes."""
        start = 0
        for codes in self.parts:
            yield codes, self.states_CK[start : start + len(codes.states_CK)]
            start += len(codes.states_CK)

    def best_part(self, column: int) -> tuple[CropCodes, States]:
        """Return the part that holds most of the class in that column."""
        return max(self.of_parts(), key=lambda part: int(part[0].histogram_C[part[1][:, column] == PRESENT].sum()))


def open_crop(crop: Crop, logic: Logic, names: Sequence[str], cache: Path) -> OpenCrop:
    """Return a crop with the codes of all of it, or of seeded boxes where it holds too much.

    Training codes all of it, so DataError where there is no room for that.
    """
    read = [crop.part(box) for box in sampled_boxes(crop)] or [crop]
    if len(read) > 1:
        cache.mkdir(parents=True, exist_ok=True)
        check_room(crop.grid.shape_zyx, cache, crop.name)
    parts = tuple(open_codes(part, crop.grid.voxel_size_nm, cache) for part in read)
    rows = np.concatenate([logic.rows(codes.states_CK, codes.names) for codes in parts])
    histogram = np.concatenate([codes.histogram_C for codes in parts])
    states, conflicts = logic.complete(rows)
    said = logic.contradictions(rows, histogram)
    wanted = states[:, logic.columns(names)]
    return OpenCrop(crop, parts, wanted, histogram, np.asarray(conflicts.any(axis=1)), said)


def sampled_boxes(crop: Crop) -> tuple[Box, ...]:
    """Return the boxes to read of a crop that holds too much, by lot of its name; () of others, read whole."""
    shape = crop.grid.shape_zyx
    if math.prod(shape) * len(crop.labels) <= WHOLE_LABEL_VOXELS:
        return ()
    counts = [-(-n // edge) for n, edge in zip(shape, SAMPLED_BOX, strict=True)]
    lot = int.from_bytes(hashlib.sha256(crop.name.encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.Philox(lot))
    drawn = rng.choice(math.prod(counts), size=min(SAMPLED_BOXES, math.prod(counts)), replace=False)
    places = np.stack(np.unravel_index(np.sort(drawn), counts), axis=1) * np.array(SAMPLED_BOX)
    box, whole = Box.whole(SAMPLED_BOX), Box.whole(shape)
    return tuple(box.shift((z, y, x)).clip(whole) for z, y, x in places.tolist())


def crop_facts(
    opened: OpenCrop, logic: Logic, names: Sequence[str], cache: Path
) -> tuple[CropFacts, list[Finding], CropTraits]:
    """Return the facts of a crop, what is missing of it, and what it looks like in a few boxes."""
    crop, histogram, scale = opened.crop, opened.histogram_C, opened.scale
    checksums = checksums_in(cache)
    digests = [pin(codes.crop, checksums) for codes in opened.parts]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:32]
    facts = CropFacts(
        name=crop.name,
        volume=crop.volume,
        shape_zyx=crop.grid.shape_zyx,
        voxel_size_nm=crop.grid.voxel_size_nm,
        origin_nm=crop.grid.origin_nm,
        split=crop.split,
        annotated=tuple(label.name for label in crop.labels if label.name in logic.names),
        counts=_counts(opened, names),
        conflicts=round(scale * int(histogram[opened.conflicts_C].sum())),
        contradictions=tuple(
            msgspec.structs.replace(one, voxels=round(scale * one.voxels)) for one in opened.contradictions
        ),
        stored_sha256=digest,
        known_voxels=round(scale * int(histogram[(opened.states_CK != UNKNOWN).any(axis=1)].sum())),
    )
    findings = [*find_missing(crop, None if opened.is_sample else opened.parts[0])]
    if opened.is_sample:
        findings.append(_sampled(opened))
    typical = max(opened.parts, key=lambda codes: len(codes.states_CK))
    return facts, findings, remembered(typical.crop, typical, digest)


def _counts(opened: OpenCrop, names: Sequence[str]) -> dict[str, ClassCount]:
    if opened.is_sample:
        return {name: _sampled_count(opened, k) for k, name in enumerate(names)}
    histogram, codes = opened.histogram_C, opened.parts[0]
    along_y, along_x = (_counts_along(codes, axis) @ (opened.states_CK == PRESENT) for axis in (1, 2))
    return {
        name: ClassCount(
            absent=int(histogram[states == ABSENT].sum()),
            present=int(histogram[states == PRESENT].sum()),
            unknown=int(histogram[states == UNKNOWN].sum()),
            along_y=tuple(along_y[:, k].tolist()) if along_y[:, k].any() else (),
            along_x=tuple(along_x[:, k].tolist()) if along_x[:, k].any() else (),
        )
        for k, (name, states) in enumerate(zip(names, opened.states_CK.T, strict=True))
    }


def _sampled_count(opened: OpenCrop, column: int) -> ClassCount:
    """Return the scaled counts of one class, and the 95 % interval of its share of the voxels where it is known."""
    by_box = np.array(
        [
            [codes.histogram_C[states[:, column] == state].sum() for state in (ABSENT, PRESENT, UNKNOWN)]
            for codes, states in opened.of_parts()
        ]
    )
    absent, present, unknown = (round(opened.scale * int(n)) for n in by_box.sum(axis=0))
    interval = share_interval(by_box[:, 1], by_box[:, 0] + by_box[:, 1], 1 / opened.scale)
    return ClassCount(absent=absent, present=present, unknown=unknown, share_interval=interval)


def share_interval(
    present_B: NDArray[np.int64], known_B: NDArray[np.int64], share_read: float
) -> tuple[float, float] | None:
    """Return the 95 % interval of a share of which boxes (B) were counted; None where nothing is known.

    A box says as much as a few voxels, since neighbours are alike: as many as would spread the share as the boxes do,
    one a box where all agree (Korn and Graubard 1998; the spread is Cochran's of a ratio of sums, 1977, chapter 6).
    Wilson's interval of that many stays inside 0 to 1. Student's t has the boxes that hold the class for its degrees of
    freedom: a heuristic of our own, wide where few boxes do (for compact rare classes wider than it need be).
    """
    known, boxes = int(known_B.sum()), len(known_B)
    if known == 0 or boxes < 2:
        return None
    share = float(present_B.sum()) / known
    spread = float(np.std(present_B - share * known_B, ddof=1)) / float(known_B.mean())
    variance = spread**2 * max(0.0, 1 - share_read) / boxes
    if share_read >= 1:
        return share, share
    num = share * (1 - share) / variance if variance > 0 else float(boxes)
    held = int(min((present_B > 0).sum(), (present_B < known_B).sum()))
    t = float(stdtrit(max(1, held - 1), 0.975)) if held else NORMAL_95
    z2 = t**2
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = t * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2)) / (1 + z2 / num)
    return max(0.0, middle - half), min(1.0, middle + half)


def _sampled(opened: OpenCrop) -> Finding:
    number, share = len(opened.parts), 1 / opened.scale
    edges = "x".join(str(n) for n in SAMPLED_BOX)
    return Finding(
        where=opened.crop.name,
        kind="sampled",
        what=f"is too large to count whole: {number} boxes of {edges}, {share:.2%} of it, stand for all; rare classes "
        "may lie in none of them",
        numbers={"boxes": float(number), "share": share},
        remedy="import the parts that matter as crops of their own, to have all of them counted",
    )


def _counts_along(codes: CropCodes, axis: int) -> NDArray[np.int64]:
    """Return how often each code occurs in each part of an axis; only short axes need a look at the voxels."""
    shape = codes.grid.shape_zyx
    length = part_length(shape[axis])
    if length == INDEX_BLOCK[axis]:
        blocks = [-(-n // b) for n, b in zip(shape, INDEX_BLOCK, strict=True)]
        others = tuple({0, 1, 2} - {axis})
        rows: NDArray[np.int64] = codes.counts_BC.reshape(*blocks, -1).sum(axis=others, dtype=np.int64)
        return rows
    volume, counts = codes.codes_ZYX, np.zeros((-(-shape[axis] // length), len(codes.states_CK)), np.int64)
    for z in range(0, shape[0], SECTIONS):
        parts = np.split(volume[z : z + SECTIONS], range(length, shape[axis], length), axis=axis)
        counts += np.stack([np.bincount(part.ravel(), minlength=counts.shape[1]) for part in parts])
    return counts
