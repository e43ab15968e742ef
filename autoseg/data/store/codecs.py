"""Stored bytes to one chunk, never allocating more than the chunk that the metadata declares.

A frame says itself what it decodes to (blosc, zstd, lz4), or is decoded up to one byte more (gzip, zlib, bz2, lzma):
a few bytes that would unfold to gigabytes are refused before they do. Only codecs named here are used, since some of
numcodecs' run code that the file holds, and filters only between numbers, so that each says how much it widens::

    chunk --filter--> values --filter--> values --compressor--> bytes --checksum--> file
    bytes:  what the metadata declare              any number         4 more
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numcodecs
import numpy as np
from numpy.typing import NDArray

COMPRESSORS = frozenset({"blosc", "zstd", "lz4", "gzip", "zlib", "bz2", "lzma"})
CHECKSUMS = frozenset({"crc32", "adler32", "crc32c"})
FILTERS = CHECKSUMS | {"delta", "shuffle", "bitround", "fixedscaleoffset", "quantize", "astype"}
CHECKSUM_BYTES = 4
WIDEST = 8  # bytes of a number
_Decompressor = Any  # of zlib, bz2 or lzma: decompress(data, max_length), eof, unused_data
ZSTD_MAGIC = 0xFD2FB528
LZMA_MEMORY_BYTES = 2**28


def number_type(name: Any) -> np.dtype[Any]:
    """Return the dtype of that name; ValueError unless it is a number of up to 8 bytes."""
    dtype = np.dtype(name) if isinstance(name, str) else None
    if dtype is None or dtype.kind not in "buif" or dtype.itemsize > WIDEST:
        raise ValueError(f"dtype {name!r} is not a number of up to {WIDEST} bytes")
    return dtype


def decode_chunk(
    raw: bytes,
    codecs: Sequence[dict[str, Any]],
    dtype: np.dtype[Any],
    size: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[Any]:
    """Return the `size` values of a stored chunk, flat; ValueError if the bytes are anything else.

    `codecs` are in the order in which they were applied: filters, a compressor, checksums. `out` gets the values.
    """
    expected = size * dtype.itemsize
    try:
        data: Any = raw
        for config, num_bytes in zip(reversed(codecs), reversed(decoded_bytes(codecs, expected)), strict=True):
            if config["id"] in COMPRESSORS:
                room = out if config is codecs[0] else None
                data = _decompress(data if isinstance(data, bytes) else bytes(data), config, num_bytes, room)
            else:
                data = numcodecs.get_codec(dict(config)).decode(data)
    except ValueError:
        raise
    except Exception as error:  # each codec has exceptions of its own
        raise ValueError(str(error) or type(error).__name__) from None
    flat: NDArray[Any] = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.asarray(data)
    flat = flat if flat is out else flat.ravel().view(np.uint8)
    if flat.nbytes != expected:
        raise ValueError(f"{flat.nbytes} bytes, a chunk is {expected}")
    if out is None:
        return flat.view(dtype)
    if flat is not out:
        out[:] = flat
    return out.view(dtype)


def decoded_bytes(codecs: Sequence[dict[str, Any]], chunk_bytes: int) -> list[int]:
    """Return how many bytes each codec decodes to, as its configuration says; ValueError for codecs not used here.

    Of a checksum around compressed bytes it is not known, nor needed.
    """
    found, size, compressed = [], chunk_bytes, False
    for config in codecs:
        found.append(size)
        if compressed and config["id"] not in CHECKSUMS:
            raise ValueError(f"codec {config['id']!r} follows a compressor")
        if config["id"] in COMPRESSORS:
            compressed = True
            continue
        decoded, encoded = _widths(config)
        if size % decoded:
            raise ValueError(f"filter {config['id']!r} takes {decoded} bytes at a time, there are {size}")
        size = size // decoded * encoded + (CHECKSUM_BYTES if config["id"] in CHECKSUMS else 0)
        if size > WIDEST * chunk_bytes + 2**10:
            raise ValueError(f"its filters widen a chunk of {chunk_bytes} bytes to {size}")
    return found


def _widths(config: dict[str, Any]) -> tuple[int, int]:
    """Return how many bytes a value has that this filter decodes, and how many it has encoded."""
    kind = config["id"]
    if kind not in FILTERS:
        raise ValueError(f"filter {kind!r} is none of {', '.join(sorted(FILTERS))}")
    if kind == "astype":
        return number_type(config["decode_dtype"]).itemsize, number_type(config["encode_dtype"]).itemsize
    if kind in ("delta", "fixedscaleoffset", "quantize"):
        return number_type(config["dtype"]).itemsize, number_type(config.get("astype") or config["dtype"]).itemsize
    return 1, 1


def _decompress(raw: bytes, config: dict[str, Any], expected: int, out: NDArray[np.uint8] | None) -> Any:
    """Return the `expected` bytes that were compressed, in `out` if that is given and the codec can."""
    kind = config["id"]
    if kind in _STREAMED:
        return _streamed(raw, _STREAMED[kind](config), expected)
    declared = _DECLARED[kind](raw)
    if declared is not None and declared != expected:
        raise ValueError(f"the frame decodes to {declared} bytes, a chunk is {expected}")
    out = np.empty(expected, np.uint8) if out is None else out
    _DIRECT[kind](raw, out)  # a third faster than by way of a codec object, which checks both buffers again
    return out


def _blosc_bytes(raw: bytes) -> int:
    """Return what a blosc frame decodes to; its decoder trusts the header, so that must fit the bytes."""
    if len(raw) < 16:
        raise ValueError(f"{len(raw)} bytes are no blosc frame")
    num_bytes, block_bytes, stored = struct.unpack_from("<III", raw, 4)
    if stored != len(raw):
        raise ValueError(f"the blosc frame has {len(raw)} of {stored} bytes")
    if block_bytes == 0 or block_bytes > max(num_bytes, 1) or raw[3] == 0:
        raise ValueError(f"the blosc frame has blocks of {block_bytes} bytes")
    return int(num_bytes)


def _zstd_bytes(raw: bytes) -> int | None:
    """Return what a zstd frame decodes to, None if it does not say (RFC 8878, section 3.1.1.1)."""
    if len(raw) < 6 or int.from_bytes(raw[:4], "little") != ZSTD_MAGIC:
        raise ValueError(f"{len(raw)} bytes are no zstd frame")
    descriptor = raw[4]
    single, width = descriptor >> 5 & 1, (0, 2, 4, 8)[descriptor >> 6]
    if width == 0:
        if not single:
            return None
        width = 1
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    if len(raw) < start + width:
        raise ValueError(f"the zstd frame ends after {len(raw)} bytes")
    return int.from_bytes(raw[start : start + width], "little") + (256 if width == 2 else 0)


def _lz4_bytes(raw: bytes) -> int:
    if len(raw) < 4:
        raise ValueError(f"{len(raw)} bytes are no lz4 frame")
    return int.from_bytes(raw[:4], "little")


def _streamed(raw: bytes, make: Callable[[], _Decompressor], limit: int) -> bytes:
    """Return the concatenation of all streams in `raw`; ValueError before it exceeds the limit."""
    parts: list[bytes] = []
    room = limit
    while raw:
        stream = make()
        part = stream.decompress(raw, room + 1)
        room -= len(part)
        if room < 0:
            raise ValueError(f"the stream decodes to more than {limit} bytes, which a chunk is")
        if not stream.eof:
            raise ValueError("the compressed stream is cut short")
        parts.append(part)
        raw = stream.unused_data
    return b"".join(parts)


def _lzma(config: dict[str, Any]) -> Callable[[], _Decompressor]:
    form, filters = config.get("format", lzma.FORMAT_XZ), config.get("filters")
    memory = None if form == lzma.FORMAT_RAW else LZMA_MEMORY_BYTES  # of a raw stream the configuration says it
    if any(item.get("dict_size", 0) > LZMA_MEMORY_BYTES for item in filters or ()):
        raise ValueError(f"lzma with a dictionary of more than {LZMA_MEMORY_BYTES} bytes")
    return lambda: lzma.LZMADecompressor(form, memory, filters)


_DIRECT: dict[str, Callable[[bytes, NDArray[np.uint8]], Any]] = {
    "blosc": numcodecs.blosc.decompress,
    "zstd": numcodecs.zstd.decompress,
    "lz4": numcodecs.lz4.decompress,
}
_DECLARED: dict[str, Callable[[bytes], int | None]] = {"blosc": _blosc_bytes, "zstd": _zstd_bytes, "lz4": _lz4_bytes}
_STREAMED: dict[str, Callable[[dict[str, Any]], Callable[[], _Decompressor]]] = {
    "gzip": lambda config: lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "zlib": lambda config: zlib.decompressobj,
    "bz2": lambda config: bz2.BZ2Decompressor,
    "lzma": _lzma,
}
