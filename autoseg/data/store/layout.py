"""What the metadata of one array declares: shape, chunks, dtype, codecs, and which file holds which chunk.

Chunks are read here without zarr: the raw bytes are needed anyway, to compare them with a checksum and to refuse a
decompression bomb, and a chunk costs a third of the time.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.store.codecs import CHECKSUM_BYTES, COMPRESSORS, decode_chunk, decoded_bytes, number_type
from autoseg.data.store.engine import brief, read_attributes, read_json
from autoseg.errors import DataError
from autoseg.geometry import VoxelsZYX

CHUNK_CAP_BYTES = 2**30
MAX_CHUNKS = 2**30  # of one array: of each it is remembered whether it is there
MAX_INDEX_BYTES = 2**26  # of one shard
ENDIAN = {"little": "<", "big": ">"}
V3_CODECS = ("blosc", "zstd", "gzip", "crc32c")
IN_ORDER: VoxelsZYX = (0, 1, 2)
NOT_IN_SHARD = 2**64 - 1


class Shards(NamedTuple):
    """Where a shard, a stored file of many chunks, holds its index, and whether a crc32c follows that.

    ::

        | chunk | chunk | ...                  | index: (offset, length) of each chunk, in z y x | crc32c |

    Source: zarr format 3, sharding_indexed, version 1.0.
    """

    at_end: bool
    checked: bool


class Layout(NamedTuple):
    """One array of three axes; `unit_zyx` are the voxels of one stored file: a chunk, or a shard of chunks.

    `axes` are those of a stored chunk, slowest first; `codecs` are in the order in which they were applied.
    """

    shape_zyx: VoxelsZYX
    chunk_zyx: VoxelsZYX
    unit_zyx: VoxelsZYX
    dtype: np.dtype[Any]
    fill_value: float
    axes: VoxelsZYX
    codecs: tuple[dict[str, Any], ...]
    prefix: str
    separator: str
    shards: Shards | None = None

    @property
    def unit_counts(self) -> VoxelsZYX:
        """Return how many stored files there may be along each axis."""
        z, y, x = (-(-n // u) for n, u in zip(self.shape_zyx, self.unit_zyx, strict=True))
        return z, y, x

    @property
    def chunk_bytes(self) -> int:
        """Return what one chunk decodes to."""
        return math.prod(self.chunk_zyx) * self.dtype.itemsize

    @property
    def longest_bytes(self) -> int:
        """Return what one stored chunk may have at most; more is no chunk."""
        return 2 * self.chunk_bytes + 2**16

    @property
    def chunks_of_unit(self) -> VoxelsZYX:
        """Return how many chunks a stored file holds along each axis."""
        z, y, x = (u // c for u, c in zip(self.unit_zyx, self.chunk_zyx, strict=True))
        return z, y, x

    @property
    def index_bytes(self) -> int:
        """Return the length of the index of a shard: offset and length of each chunk, and maybe a checksum."""
        checked = self.shards is not None and self.shards.checked
        return 16 * math.prod(self.chunks_of_unit) + CHECKSUM_BYTES * checked

    def file_name(self, unit: VoxelsZYX) -> str:
        """Return the file of that unit, relative to the array."""
        return f"{self.prefix}{unit[0]}{self.separator}{unit[1]}{self.separator}{unit[2]}"


def read_layout(path: Path) -> Layout:
    """Return the layout of the array in that folder; DataError names what is missing or wrong in its metadata."""
    try:
        metadata = read_json(path / ".zarray")
        layout = _format_2(metadata) if metadata is not None else _format_3(read_json(path / "zarr.json"))
    except DataError:
        raise
    except Exception as error:
        raise DataError(path, f"is not a readable zarr array ({_reason(error)})", "restore its metadata") from None
    if len(layout.shape_zyx) != 3:
        raise DataError(path, f"has {len(layout.shape_zyx)} axes", "store one channel with axes z, y, x")
    if not all(n >= 1 for n in (*layout.shape_zyx, *layout.chunk_zyx, *layout.unit_zyx)):
        raise DataError(path, f"shape {layout.shape_zyx}, chunks {layout.chunk_zyx}", "restore its metadata")
    if len(layout.chunk_zyx) != 3 or len(layout.unit_zyx) != 3:
        raise DataError(path, f"has chunks of {len(layout.chunk_zyx)} axes", "restore its metadata")
    _refuse_unreadable(path, layout)
    return layout


def _refuse_unreadable(path: Path, layout: Layout) -> None:
    """Raise DataError for chunks too large or too many, and for codecs that are not used here."""
    if layout.chunk_bytes > CHUNK_CAP_BYTES:
        what = f"one chunk {layout.chunk_zyx} decodes to {layout.chunk_bytes / 2**30:.1f} GiB"
        raise DataError(path, what, "store it in smaller chunks (64³ is usual)")
    count = math.prod(-(-n // c) for n, c in zip(layout.shape_zyx, layout.chunk_zyx, strict=True))
    if count > MAX_CHUNKS:
        what = f"shape {layout.shape_zyx} is {count:,} chunks of {layout.chunk_zyx}"
        raise DataError(path, what, f"restore its metadata, or store it in at most {MAX_CHUNKS:,} chunks")
    whole = all(u % c == 0 for u, c in zip(layout.unit_zyx, layout.chunk_zyx, strict=True))
    if not whole or layout.index_bytes > MAX_INDEX_BYTES:
        what = f"shards {layout.unit_zyx} of chunks {layout.chunk_zyx}"
        raise DataError(path, what, f"use shards of up to {MAX_INDEX_BYTES // 16:,} whole chunks")
    try:
        decoded_bytes(layout.codecs, layout.chunk_bytes)
    except Exception as error:
        raise DataError(path, f"is not a readable zarr array ({_reason(error)})", "restore its metadata") from None


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError) and error.args:
        return f"no {error.args[0]}"
    return str(error) if isinstance(error, ValueError) else brief(error)


def _format_2(metadata: dict[str, Any]) -> Layout:
    if metadata.get("zarr_format", 2) != 2:
        raise ValueError(f"zarr_format {metadata['zarr_format']!r}")
    dtype = number_type(metadata["dtype"])
    compressor, codecs = metadata["compressor"], list(metadata.get("filters") or ())
    if compressor is not None:
        if compressor["id"] not in COMPRESSORS:
            raise ValueError(f"compressor {compressor['id']!r} is none of {', '.join(sorted(COMPRESSORS))}")
        codecs.append(compressor)
    order, separator = metadata.get("order", "C"), metadata.get("dimension_separator", ".")
    if order not in ("C", "F") or separator not in (".", "/"):
        raise ValueError(f"order {order!r}, dimension_separator {separator!r}")
    shape, chunks = _integers(metadata["shape"]), _integers(metadata["chunks"])
    fill = _fill(metadata.get("fill_value"), dtype)
    axes = IN_ORDER if order == "C" else (2, 1, 0)
    return Layout(shape, chunks, chunks, dtype, fill, axes, tuple(codecs), "", separator)


def _format_3(metadata: dict[str, Any] | None) -> Layout:
    if metadata is None:
        raise ValueError("neither .zarray nor zarr.json")
    if metadata["node_type"] != "array" or metadata["chunk_grid"]["name"] != "regular":
        raise ValueError(f"{metadata['node_type']} on a {metadata.get('chunk_grid', {}).get('name')} grid")
    unit = _integers(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    chunk, codecs, shards = unit, metadata["codecs"], None
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        sharding = codecs[0]["configuration"]
        chunk, codecs, shards = _integers(sharding["chunk_shape"]), sharding["codecs"], _shards(sharding)
    axes, endian, stored = _codecs_of_format_3(codecs)
    dtype = number_type(np.dtype(metadata["data_type"]).newbyteorder(endian).str)
    encoding = metadata["chunk_key_encoding"]
    default = encoding["name"] == "default"
    separator = (encoding.get("configuration") or {}).get("separator", "/" if default else ".")
    prefix = f"c{separator}" if default else ""
    fill = _fill(metadata["fill_value"], dtype)
    return Layout(_integers(metadata["shape"]), chunk, unit, dtype, fill, axes, stored, prefix, separator, shards)


def _shards(sharding: dict[str, Any]) -> Shards:
    names = [codec["name"] for codec in sharding["index_codecs"]]
    endian = (sharding["index_codecs"][0].get("configuration") or {}).get("endian", "little")
    place = sharding.get("index_location", "end")
    if names not in (["bytes"], ["bytes", "crc32c"]) or endian != "little" or place not in ("start", "end"):
        raise ValueError(f"the index of its shards is {names} ({endian}) at the {place}")
    return Shards(at_end=place == "end", checked=len(names) == 2)


def _codecs_of_format_3(codecs: list[dict[str, Any]]) -> tuple[VoxelsZYX, str, tuple[dict[str, Any], ...]]:
    """Return (axes of a stored chunk, byte order, codecs of its bytes) of `transpose`..., `bytes` and what follows."""
    axes, names = IN_ORDER, [codec["name"] for codec in codecs]
    split = names.index("bytes") if "bytes" in names else len(names)
    for codec in codecs[:split]:
        if codec["name"] != "transpose":
            raise ValueError(f"codec {codec['name']!r} is not read: only transpose, bytes, {', '.join(V3_CODECS)}")
        order = _integers(codec["configuration"]["order"])
        if sorted(order) != [0, 1, 2]:
            raise ValueError(f"transpose of axes {order}")
        axes = (axes[order[0]], axes[order[1]], axes[order[2]])
    for name in names[split + 1 :]:
        if name not in V3_CODECS:
            raise ValueError(f"codec {name!r} is not read: only transpose, bytes, {', '.join(V3_CODECS)}")
    endian = ENDIAN[(codecs[split].get("configuration") or {}).get("endian", "little")]
    return axes, endian, tuple({"id": name} for name in names[split + 1 :])


def _integers(values: Any) -> VoxelsZYX:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{values!r} are not whole numbers")
    return tuple(values)


def _fill(value: Any, dtype: np.dtype[Any]) -> float:
    """Return what a chunk that is not stored reads as; null is 0."""
    number = float(value) if isinstance(value, str) else 0 if value is None else value
    if not isinstance(number, int | float):
        raise ValueError(f"fill_value {value!r}")
    if dtype.kind in "ui" and not (number == int(number) and np.iinfo(dtype).min <= number <= np.iinfo(dtype).max):
        raise ValueError(f"fill_value {value!r} is no {dtype}")
    return number


def parse_index(raw: bytes, layout: Layout) -> NDArray[np.uint64]:
    """Return (offset, length) of each chunk (z, y, x, 2) from the bytes that begin with the index of a shard."""
    codecs = [{"id": "crc32c"}] if layout.shards is not None and layout.shards.checked else []
    try:
        flat = decode_chunk(raw[: layout.index_bytes], codecs, np.dtype("<u8"), 2 * math.prod(layout.chunks_of_unit))
    except ValueError as error:
        raise ValueError(f"the index of the shard: {error}") from None
    return flat.reshape(*layout.chunks_of_unit, 2)


def chunk_range(table: NDArray[np.uint64], place: tuple[int, ...], layout: Layout) -> tuple[int, int] | None:
    """Return (offset, length) of a chunk in its shard, None if it is not stored; ValueError for what cannot be."""
    offset, length = (int(value) for value in table[place])
    if offset == NOT_IN_SHARD:
        return None
    if offset >= 2**62 or length > layout.longest_bytes:
        raise ValueError(f"its index says {length} bytes at {offset}, a chunk has at most {layout.longest_bytes}")
    return offset, length


def stored_units(path: Path, layout: Layout) -> Iterator[VoxelsZYX]:
    """Yield the index of every stored file of the array, by listing its folders."""
    base = path / layout.prefix.rstrip("/") if layout.prefix.endswith("/") else path
    if layout.separator == "/":
        names = (f"{z}/{y}/{x}" for z in _list(base) for y in _list(base / z) for x in _list(base / z / y))
    else:
        names = (name.removeprefix(layout.prefix) for name in _list(base))
    counts = layout.unit_counts
    for name in names:
        parts = name.split(layout.separator)
        if len(parts) == 3 and all(part.isdecimal() for part in parts):
            unit = int(parts[0]), int(parts[1]), int(parts[2])
            if all(i < n for i, n in zip(unit, counts, strict=True)):
                yield unit


def _list(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def metadata_checksum(path: Path) -> int:
    """Return the crc32 of all metadata that decides what the voxels of this level mean, however it is formatted.

    The array's own and its class annotation, and those of the multiscale group; not what other tools add beside.
    """
    array = read_json(path / ".zarray") or read_json(path / "zarr.json") or {}
    group = read_attributes(path.parent)
    used = [
        {key: value for key, value in array.items() if key != "attributes"},
        read_attributes(path).get("cellmap"),
        [group.get(key) for key in ("multiscales", "ome", "cellmap")],
    ]
    return zlib.crc32(json.dumps(used, sort_keys=True).encode())


def units_of(layout: Layout, start: VoxelsZYX, stop: VoxelsZYX) -> Iterator[VoxelsZYX]:
    """Yield the stored files that hold the voxels from `start` to `stop`, which lie inside the array."""
    edges = zip(start, stop, layout.unit_zyx, strict=True)
    z, y, x = (range(a // u, (b - 1) // u + 1) for a, b, u in edges)
    return itertools.product(z, y, x)
