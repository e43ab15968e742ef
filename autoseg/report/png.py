"""Pixels to a PNG data URI: greys, RGBA, or indices into a table of colours; of the standard library alone.

A PNG is a signature and chunks: `length | name | content | crc`, the pixels zlib-compressed row by row, each row
behind a byte that names its filter. Filter 2 (Up, the difference to the row above) or 0 (None), whichever makes
the smaller file. Source: W3C PNG specification, third edition.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, INDEXED, RGBA = 0, 3, 6
NONE, UP = 0, 2


def png_uri(pixels: NDArray[np.uint8], table: NDArray[np.uint8] | None = None) -> str:
    """Return greys (y, x), RGBA (y, x, 4), or indices (y, x) into `table` (colours, 4) as a data URI."""
    return "data:image/png;base64," + base64.b64encode(encode(pixels, table)).decode()


def encode(pixels: NDArray[np.uint8], table: NDArray[np.uint8] | None = None) -> bytes:
    """Return the PNG file; an empty image becomes one clear pixel."""
    if pixels.size == 0:
        pixels, table = np.zeros((1, 1, 4), dtype=np.uint8), None
    height, width = pixels.shape[:2]
    kind = RGBA if pixels.ndim == 3 else GREY if table is None else INDEXED
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    colours = b"" if table is None else _chunk(b"PLTE", table[:, :3].tobytes()) + _chunk(b"tRNS", table[:, 3].tobytes())
    rows: NDArray[Any] = np.ascontiguousarray(pixels).reshape(height, -1)
    content = min((_compressed(rows, kind_of_filter) for kind_of_filter in (NONE, UP)), key=len)
    return SIGNATURE + _chunk(b"IHDR", header) + colours + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def _compressed(rows: NDArray[np.uint8], filter_: int) -> bytes:
    filtered = rows.copy()
    if filter_ == UP:
        filtered[1:] -= rows[:-1]
    named = np.concatenate([np.full((len(rows), 1), filter_, dtype=np.uint8), filtered], axis=1)
    return zlib.compress(named.tobytes(), 9)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
