"""The annotation of a batch, as label codes or as volumes, given out in parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from autoseg.data.classes import PRESENT, UNKNOWN
from autoseg.model.voxels import flat

ALL = slice(None)


class CodeTable:
    """What each label code means for each class, as tensors on a device."""

    def __init__(self, states_CK: Tensor) -> None:
        self.present_CK = (states_CK == PRESENT).float()
        self.known_CK = (states_CK != UNKNOWN).float()


class CodeTargets(NamedTuple):
    """The annotation of a batch as label codes (B, Z, Y, X) and their table; nothing of the logits' size is kept."""

    codes_BZYX: Tensor
    table: CodeTable

    def part(self, index: int, like_KN: Tensor, rows: slice = ALL, voxels: slice = ALL) -> tuple[Tensor, Tensor]:
        """Return (present, known) of rows and voxels of one sample, 0 or 1 in the type and layout of its logits."""
        codes = self.codes_BZYX[index].flatten()[voxels]
        both = (t[:, rows].to(like_KN.dtype) for t in (self.table.present_CK, self.table.known_CK))
        if like_KN.stride(1) != 1:  # channels last
            present, known = (t[codes].T for t in both)
        else:
            present, known = (t.T[:, codes] for t in both)
        return present, known

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the number of (present, known) voxels, both (B, classes), float32."""
        codes = self.codes_BZYX.flatten(1)
        histogram = torch.zeros(len(codes), len(self.table.known_CK), dtype=torch.int64, device=codes.device)
        histogram.scatter_add_(1, codes, torch.ones_like(codes))
        counts = histogram.float()
        return counts @ self.table.present_CK, counts @ self.table.known_CK

    def dense(self) -> MaskTargets:
        """Return the same annotation as two volumes for each class."""
        codes = self.codes_BZYX
        return MaskTargets(*(t[codes].movedim(-1, 1) for t in (self.table.present_CK, self.table.known_CK)))

    def shares(self, size_zyx: list[int]) -> MaskTargets:
        """Return which share of each box of that size is present and known, sample by sample."""
        tables = (self.table.present_CK.T, self.table.known_CK.T)
        pooled = ([F.avg_pool3d(t[:, codes], size_zyx) for codes in self.codes_BZYX] for t in tables)
        return MaskTargets(*(torch.stack(samples) for samples in pooled))


class MaskTargets(NamedTuple):
    """The annotation of a batch as two volumes of 0 and 1, both (B, classes, Z, Y, X); unknown beats present."""

    present: Tensor
    known: Tensor

    def part(self, index: int, like_KN: Tensor, rows: slice = ALL, voxels: slice = ALL) -> tuple[Tensor, Tensor]:
        """Return (present, known) of rows and voxels of one sample, 0 or 1."""
        present, known = (flat(t[index])[rows, voxels] for t in self)
        known = known.to(like_KN.dtype)
        return present * known, known

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the number of (present, known) voxels, both (B, classes)."""
        return (self.present * self.known).sum(dim=(2, 3, 4)), self.known.sum(dim=(2, 3, 4))

    def dense(self) -> MaskTargets:
        """Return the same annotation, present only where it is known."""
        return MaskTargets(self.present * self.known, self.known)

    def shares(self, size_zyx: list[int]) -> MaskTargets:
        """Return which share of each box of that size is present and known."""
        return MaskTargets(*(F.avg_pool3d(t, size_zyx) for t in self.dense()))


Targets = CodeTargets | MaskTargets
