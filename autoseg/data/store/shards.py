"""A shard: one file of many chunks, with an index that says where each of them lies.

::

    | chunk | chunk | ...            | index: (offset, length) of each chunk, z y x | crc32c |
    or the index comes first         a chunk that is not stored has an offset of 2^64 - 1

Source: zarr format 3, sharding_indexed, version 1.0.
"""

from __future__ import annotations

import numcodecs
import numpy as np
from numpy.typing import NDArray

from autoseg.data.store.layout import Layout

NOT_STORED = 2**64 - 1


def parse_index(raw: bytes, layout: Layout) -> NDArray[np.uint64]:
    """Return (offset, length) of each chunk (z, y, x, 2) from the bytes that begin with the index of a shard."""
    raw = raw[: layout.index_bytes]
    if len(raw) != layout.index_bytes:
        raise ValueError(f"its index has {len(raw)} of {layout.index_bytes} bytes")
    if layout.shards is not None and layout.shards.checked:
        try:
            raw = bytes(numcodecs.get_codec({"id": "crc32c"}).decode(raw))
        except Exception as error:  # the package that computes it may be missing
            raise ValueError(f"its index: {error}") from None
    return np.frombuffer(raw, "<u8").reshape(*layout.chunks_of_unit, 2)


def chunk_range(table: NDArray[np.uint64], place: tuple[int, ...], layout: Layout) -> tuple[int, int] | None:
    """Return (offset, length) of a chunk in its shard, None if it is not stored; ValueError for what cannot be."""
    offset, length = (int(value) for value in table[place])
    if offset == NOT_STORED:
        return None
    if offset >= 2**62 or length > layout.longest_bytes:
        raise ValueError(f"its index says {length} bytes at {offset}, a chunk has at most {layout.longest_bytes}")
    return offset, length
