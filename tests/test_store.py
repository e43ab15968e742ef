"""The store: read like zarr does, refuse what would not fit, know what is stored."""

from __future__ import annotations

import itertools
import json
import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import shapes, write_multiscale

from autoseg.data import store
from autoseg.data.store.codecs import COMPRESSORS, FILTERS, decode_chunk
from autoseg.data.store.engine import ZARR_MAJOR
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, VoxelsZYX, blocks

COMPRESSED: dict[str, Any] = {
    "none": None,
    "blosc-zstd": numcodecs.Blosc("zstd", 3, numcodecs.Blosc.SHUFFLE),
    "blosc-lz4": numcodecs.Blosc("lz4", 5, numcodecs.Blosc.BITSHUFFLE),
    "zstd": numcodecs.Zstd(3),
    "gzip": numcodecs.GZip(1),
    "zlib": numcodecs.Zlib(1),
    "bz2": numcodecs.BZ2(1),
    "lz4": numcodecs.LZ4(),
    "lzma": numcodecs.LZMA(),
}
DTYPES = ("|u1", "<u2", ">u2", "<i4", "<u8", "<f4", "|b1")


def write_v2(path: Path, values: NDArray[Any], chunks: VoxelsZYX, **options: Any) -> Any:
    """Write a zarr format 2 array with either zarr major and return it."""
    keywords: dict[str, Any] = {"zarr_format": 2} if ZARR_MAJOR >= 3 else {}
    array = zarr.open_array(
        str(path), mode="w", shape=values.shape, chunks=chunks, dtype=values.dtype, **options, **keywords
    )
    array[:] = values
    return array


def random_values(shape: VoxelsZYX, dtype: str, seed: int) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2 if dtype == "|b1" else 200, shape).astype(dtype)


def reader(path: Path) -> store.ArrayReader:
    return store.ArrayReader(path, store.ChunkCache(2**20))


def error_of(look: Callable[[], object]) -> DataError | None:
    """Return the DataError that a call raises, if any; nothing else may be raised."""
    try:
        look()
    except DataError as error:
        return error
    return None


# ---- the same voxels as zarr --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    shape=shapes(9),
    chunks=shapes(9),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(sorted(COMPRESSED)),
    order=st.sampled_from("CF"),
    separator=st.sampled_from("./"),
    fill=st.sampled_from([0, None, 1]),
    seed=st.integers(0, 99),
)
def test_an_array_of_format_2_reads_as_zarr_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    shape: VoxelsZYX,
    chunks: VoxelsZYX,
    dtype: str,
    codec: str,
    order: str,
    separator: str,
    fill: int | None,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("array")
    options = {"compressor": COMPRESSED[codec], "order": order, "dimension_separator": separator, "fill_value": fill}
    written = write_v2(path, random_values(shape, dtype, seed), chunks, **options)
    rng = np.random.default_rng(seed)
    units = list(itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunks, strict=True))))
    for index in rng.permutation(len(units))[: len(units) // 3]:
        (path / separator.join(map(str, units[index]))).unlink(missing_ok=True)
    found = reader(path)
    expected = np.zeros(shape, dtype) if fill is None else np.full(shape, fill, dtype)
    stored = found.stored_mask(Box.whole(shape))
    expected[stored] = written[:][stored]
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found.read(Box.whole(shape)), expected)
    start = [int(rng.integers(-2, n)) for n in shape]
    stop = [a + int(rng.integers(1, n + 3)) for a, n in zip(start, shape, strict=True)]
    box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    padded = np.pad(expected, [(max(0, -a), max(0, b - n)) for a, b, n in zip(start, stop, shape, strict=True)])
    part = tuple(slice(a + max(0, -a), b + max(0, -a)) for a, b in zip(start, stop, strict=True))
    assert np.array_equal(found.read(box), padded[part])


@pytest.mark.parametrize(
    "filters",
    [
        [numcodecs.Delta("<u2")],
        [numcodecs.Shuffle(2)],
        [numcodecs.Delta("<u2"), numcodecs.CRC32()],
        [numcodecs.AsType("<f8", "<u2"), numcodecs.CRC32()],
        [numcodecs.FixedScaleOffset(offset=0, scale=1, dtype="<u2", astype="|u1")],
        [numcodecs.FixedScaleOffset(offset=0, scale=2, dtype="<u2", astype="<i4"), numcodecs.Delta("<i4", "<i8")],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_filters_are_undone(tmp_path: Path, filters: list[Any]) -> None:
    values = random_values((5, 9, 7), "<u2", 1)
    write_v2(tmp_path / "a", values, (4, 4, 4), filters=filters, compressor=numcodecs.Zstd(1))
    assert np.array_equal(reader(tmp_path / "a").read(Box.whole(values.shape)), values)


@pytest.mark.skipif(ZARR_MAJOR < 3, reason="zarr 2 does not write format 3")
@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize(
    "codec",
    ["none", *(f"{name}Codec" for name in ("Blosc", "Zstd", "Gzip", "Crc32c"))]
    + [f"{how}{more}" for how in ("sharded", "transposed") for more in ("", " gzip", " twice")]
    + ["transposed shards", "shards, index first"],
)
def test_format_3_reads_as_zarr_reads_it(tmp_path: Path, codec: str, separator: str) -> None:
    from zarr import codecs

    values = random_values((10, 9, 12), ">u2" if codec == "ZstdCodec" else "<u2", 2)
    options: dict[str, Any] = {"compressors": getattr(codecs, codec)() if codec.endswith("Codec") else None}
    if "shard" in codec:
        options["shards"] = (8, 8, 8)
    if codec == "shards, index first":
        options["shards"] = {"shape": (8, 8, 8), "index_location": "start"}
    if codec.endswith("gzip"):
        options["compressors"] = [codecs.GzipCodec(), codecs.Crc32cCodec()]
    if "transposed" in codec:
        options["filters"] = [codecs.TransposeCodec(order=(1, 2, 0))] * (1 + ("twice" in codec))
    array = zarr.create_array(
        str(tmp_path / "a"),
        shape=values.shape,
        chunks=(4, 2, 4),
        dtype=values.dtype,
        fill_value=3,
        chunk_key_encoding={"name": "default", "separator": separator},
        **options,
    )
    array[:, :, :8] = values[:, :, :8]
    expected = values.copy()
    expected[:, :, 8:] = 3
    found = reader(tmp_path / "a")
    assert np.array_equal(found.read(Box.whole(values.shape)), expected)
    stored = found.stored_mask(Box.whole(values.shape))
    assert np.array_equal(stored, np.broadcast_to(np.arange(12) < 8, values.shape))
    assert found.stored_chunks.tolist() == stored[::4, ::2, ::4].tolist()


def test_a_cached_chunk_is_decoded_once_and_one_not_stored_holds_no_memory(tmp_path: Path) -> None:
    values = random_values((8, 64, 64), "|u1", 0)
    store.create_array(tmp_path / "a", values.shape, "u1", (8, 32, 32))[:, :32] = values[:, :32]
    cache = store.ChunkCache(2 * 8 * 32 * 32 + 2**13)
    array = store.ArrayReader(tmp_path / "a", cache)
    first = array.read(Box.whole(values.shape))
    for chunk in (tmp_path / "a/0").glob("*/*"):
        chunk.unlink()
    assert np.array_equal(array.read(Box.whole(values.shape)), first), "all four chunks fit: two are one value each"


def test_memory_that_is_used_again_never_shows_in_what_was_read(tmp_path: Path) -> None:
    """Arrays of several chunk sizes, orders and dtypes through a cache of a few chunks, with some not stored."""
    rng = np.random.default_rng(0)
    written, readers = [], []
    cache = store.ChunkCache(3000)
    for i, (dtype, chunks, order) in enumerate(
        [("|u1", (4, 8, 8), "C"), ("<u2", (4, 8, 8), "F"), ("|u1", (8, 8, 8), "C"), ("<f4", (3, 5, 7), "C")]
    ):
        values = random_values((12, 20, 24), dtype, i)
        compressor = (numcodecs.Zstd(1), numcodecs.GZip(1), None, numcodecs.Blosc())[i]
        write_v2(tmp_path / str(i), values, chunks, order=order, compressor=compressor, fill_value=0)
        (tmp_path / str(i) / "0.0.0").unlink()
        values[tuple(slice(0, c) for c in chunks)] = 0
        written.append(values)
        readers.append(store.ArrayReader(tmp_path / str(i), cache))
    for _ in range(300):
        i = int(rng.integers(4))
        start = [int(rng.integers(n)) for n in written[i].shape]
        z, y, x = (int(rng.integers(a + 1, n + 1)) for a, n in zip(start, written[i].shape, strict=True))
        box = Box((start[0], start[1], start[2]), (z, y, x))
        assert np.array_equal(readers[i].read(box), written[i][box.slices])


def test_a_cache_holds_no_more_memory_than_it_may_whatever_the_sizes_of_chunks(tmp_path: Path) -> None:
    """First one volume, then another: what the chunks of the first leave is freed."""
    limit = 4 * 2**20
    cache = store.ChunkCache(limit)
    shape = (64, 512, 256)
    for name, chunks in (("a", (16, 64, 32)), ("b", (16, 64, 64)), ("c", (64, 256, 128)), ("d", (16, 32, 32))):
        write_v2(tmp_path / name, random_values(shape, "|u1", 0), chunks, compressor=None)
    held = []
    for name in "abcdab":
        array = store.ArrayReader(tmp_path / name, cache)
        for box in blocks(shape, (16, 64, 64)):
            array.read(box)
        held.append(cache.slots.num_bytes)
    assert limit / 2 < max(held) < limit + 2.5 * 2**20, "and a slab of two sizes beyond it"


# ---- what would not fit -------------------------------------------------------------------------------------

SIZE = 2**15


def bombs() -> dict[str, bytes]:
    """Return few bytes per codec that unfold to 64 MiB."""
    zeros = np.zeros(2**26, np.uint8)
    return {
        name: bytes(codec.encode(zeros)) for name, codec in COMPRESSED.items() if codec is not None and name != "lzma"
    } | {"lzma": bytes(numcodecs.LZMA(preset=0).encode(zeros))}


@pytest.mark.parametrize("exact", [True, False], ids=["alone", "below a filter"])
def test_a_decompression_bomb_is_refused_before_it_unfolds(exact: bool) -> None:
    filters = () if exact else ({"id": "delta", "dtype": "|u1"},)
    for name, raw in bombs().items():
        codecs = (*filters, COMPRESSED[name].get_config())
        tracemalloc.start()
        with pytest.raises(ValueError, match="decodes to"):
            decode_chunk(raw, codecs, np.dtype("u1"), SIZE)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22, f"{name} took {peak} bytes"


def test_a_bomb_in_an_array_is_named_with_its_chunk(tmp_path: Path) -> None:
    write_v2(tmp_path / "a", random_values((8, 8, 8), "|u1", 0), (4, 4, 4), compressor=numcodecs.Zstd(1))
    (tmp_path / "a/1.0.1").write_bytes(bombs()["zstd"])
    with pytest.raises(
        DataError, match=r"a: the chunk 1\.0\.1 cannot be decoded \(the frame decodes to 67108864 bytes"
    ):
        reader(tmp_path / "a").read(Box.whole((8, 8, 8)))


def test_a_zstd_frame_may_leave_out_its_size(tmp_path: Path) -> None:
    """As streaming writers do; then what it unfolds to is bounded by the chunk it must be."""
    frame = struct.pack("<IBB", 0xFD2FB528, 0, 0x58)
    good = frame + (1 | 1 << 1 | SIZE << 3).to_bytes(3, "little") + b"\x07"  # one block, the last: SIZE times a byte
    many = (1 << 1 | 2**17 << 3).to_bytes(3, "little") + b"\x07"
    bomb = frame + many * 2**14 + (1 | 1 << 1 | 2**17 << 3).to_bytes(3, "little") + b"\x07"
    try:
        numcodecs.Zstd().decode(good)
    except RuntimeError:
        pytest.skip("this numcodecs does not read frames without a size")
    assert (decode_chunk(good, [{"id": "zstd"}], np.dtype("u1"), SIZE) == 7).all()
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"\w"):
        decode_chunk(bomb, [{"id": "zstd"}], np.dtype("u1"), SIZE)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(COMPRESSED))
def test_any_bytes_are_a_chunk_or_a_value_error(name: str) -> None:
    """Flips, cuts and noise: nothing else is raised, and never is the array of another size."""
    rng = np.random.default_rng(5)
    values = rng.normal(128, 20, (16, 16, 16)).astype(np.uint8)
    codec = COMPRESSED[name]
    codecs = [] if codec is None else [codec.get_config()]
    good = values.tobytes() if codec is None else bytes(codec.encode(values))
    for trial in range(300):
        raw = bytearray(good)
        if trial % 3 == 0:
            raw = raw[: rng.integers(0, len(raw))]
        elif trial % 3 == 1:
            raw[rng.integers(0, min(len(raw), 40))] ^= 1 << rng.integers(8)
        else:
            raw[rng.integers(0, len(raw))] ^= 1 << rng.integers(8)
        try:
            found = decode_chunk(bytes(raw), codecs, values.dtype, values.size)
        except ValueError:
            continue
        assert found.shape == (values.size,)
        assert trial % 3


def test_a_filter_that_widens_is_refused_before_it_is_undone(tmp_path: Path) -> None:
    """A chunk of 76 bytes under a filter to strings of 1000 characters would be a gigabyte."""
    write_v2(tmp_path / "a", np.ones((64, 64, 64), np.uint8), (64, 64, 64), compressor=numcodecs.Zstd(1))
    content = json.loads((tmp_path / "a/.zarray").read_text())
    for filters, message in (
        ([{"id": "astype", "encode_dtype": "|u1", "decode_dtype": "<U1000"}], "dtype '<U1000' is not a number"),
        ([{"id": "astype", "encode_dtype": "|V1", "decode_dtype": "|u1"}], "dtype '|V1' is not a number"),
        ([{"id": "astype", "encode_dtype": "|u1"}], "no decode_dtype"),
        ([{"id": "delta", "dtype": "|u1", "astype": "<c16"}], "dtype '<c16' is not a number"),
        ([{"id": "quantize", "digits": 1, "dtype": "(9999,)u1"}], "is not a number"),
        ([{"id": "astype", "encode_dtype": "<f8", "decode_dtype": "|u1"}] * 2, "widen a chunk of 262144 bytes"),
        ([{"id": "packbits"}], "filter 'packbits' is none of"),
        ([{"id": "zstd"}, {"id": "zstd"}], "codec 'zstd' follows a compressor"),
    ):
        (tmp_path / "a/.zarray").write_text(json.dumps(content | {"filters": filters}))
        tracemalloc.start()
        with pytest.raises(DataError) as caught:
            reader(tmp_path / "a").read(Box((0, 0, 0), (1, 1, 1)))
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()
        assert message in str(caught.value)


def test_lzma_with_a_huge_dictionary_is_refused() -> None:
    config = {"id": "lzma", "format": 3, "filters": [{"id": 33, "dict_size": 2**31}]}
    with pytest.raises(ValueError, match="dictionary"):
        decode_chunk(b"abc", [config], np.dtype("u1"), SIZE)


@pytest.mark.skipif(ZARR_MAJOR < 3, reason="zarr 2 does not write format 3")
@pytest.mark.parametrize("how", ["transposed", "sharded"])
def test_a_bomb_in_a_chunk_of_any_order_or_in_a_shard_is_refused(tmp_path: Path, how: str) -> None:
    from zarr import codecs

    options: dict[str, Any] = {"compressors": [codecs.GzipCodec()]}
    if how == "sharded":
        options["shards"] = (64, 64, 64)
    else:
        options["filters"] = [codecs.TransposeCodec(order=(0, 2, 1))]
    path = tmp_path / "a"
    zarr.create_array(str(path), shape=(64, 64, 64), chunks=(32, 64, 64), dtype="uint8", **options)[:] = 1
    bomb = bombs()["gzip"]
    if how == "sharded":
        table = struct.pack("<4Q", 0, len(bomb), 2**64 - 1, 2**64 - 1)
        bomb += bytes(numcodecs.get_codec({"id": "crc32c"}).encode(np.frombuffer(table, np.uint8)))
    (path / "c/0/0/0").write_bytes(bomb)
    array = reader(path)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a: the chunk c/0/0/0 cannot be decoded \(the stream decodes to more than"):
        array.read(Box((0, 0, 0), (1, 1, 1)))
    with pytest.raises(DataError, match="more than"):
        array.check_decodes((0, 0, 0), bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.skipif(ZARR_MAJOR < 3, reason="zarr 2 does not write format 3")
def test_any_bytes_are_a_shard_or_an_error_that_names_it(tmp_path: Path) -> None:
    """Flips and cuts in chunks and index, also where a crc32c was made for the flipped index."""
    rng = np.random.default_rng(3)
    path = tmp_path / "a"
    zarr.create_array(str(path), shape=(8, 8, 8), chunks=(4, 4, 4), shards=(8, 8, 8), dtype="uint16")[:] = 7
    good = (path / "c/0/0/0").read_bytes()
    index = 8 * 16 + 4
    for trial in range(400):
        raw = bytearray(good)
        raw[rng.integers(len(raw)) if trial % 2 else len(raw) - index + rng.integers(index - 4)] ^= 1 << rng.integers(8)
        if trial % 5 == 0:
            raw = raw[: rng.integers(len(raw))]
        elif trial % 2 == 0:
            table = np.frombuffer(bytes(raw[-index:-4]), np.uint8)
            raw[-index:] = bytes(numcodecs.get_codec({"id": "crc32c"}).encode(table))
        (path / "c/0/0/0").write_bytes(raw)
        array = reader(path)
        for look in (partial(array.read, Box.whole((8, 8, 8))), partial(array.check_decodes, (0, 0, 0), bytes(raw))):
            if (error := error_of(look)) is not None:
                assert "c/0/0/0" in str(error)


# ---- metadata that cannot be meant --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressor": {"id": "pickle"}}, "compressor 'pickle' is none of blosc"),
        ({"compressor": {}}, "no id"),
        ({"filters": [{"id": "json2"}]}, "filter 'json2' is none of"),
        ({"dtype": "|O"}, "dtype '|O' is not a number"),
        ({"dtype": [["a", "<u2"]]}, "is not a number"),
        ({"dtype": "<c16"}, "is not a number"),
        ({"dtype": 7}, "dtype 7"),
        ({"fill_value": "blue"}, "could not convert"),
        ({"fill_value": 300}, "fill_value 300 is no uint8"),
        ({"fill_value": 0.5}, "fill_value 0.5 is no uint8"),
        ({"fill_value": "NaN"}, "a: "),
        ({"shape": [4, 4]}, "has 2 axes"),
        ({"shape": [4, 4, 0]}, "shape (4, 4, 0)"),
        ({"shape": [4, 4, "4"]}, "are not whole numbers"),
        ({"chunks": [4, 4]}, "chunks"),
        ({"chunks": [4, 4, -4]}, "chunks (4, 4, -4)"),
        ({"chunks": [2**12] * 3}, "decodes to 64.0 GiB"),
        ({"shape": [10**9] * 3}, "is 15,625,000,000,000,000,000,000,000 chunks of (4, 4, 4)"),
        ({"shape": [10**6] * 3}, "chunks of (4, 4, 4)"),
        ({"order": "Q"}, "order 'Q'"),
        ({"zarr_format": 4}, "zarr_format 4"),
        ({"compressor": None, "shape": None}, "a: is not a readable zarr array"),
    ],
)
def test_metadata_that_cannot_be_meant_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    store.create_array(tmp_path / "a", (4, 4, 4), "u1", (4, 4, 4))
    content = json.loads((tmp_path / "a/.zarray").read_text())
    (tmp_path / "a/.zarray").write_text(json.dumps(content | changes))
    with pytest.raises(DataError) as caught:
        reader(tmp_path / "a").read(Box.whole((4, 4, 4)))
    assert message in str(caught.value)
    assert "/a" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(ZARR_MAJOR < 3, reason="zarr 2 does not write format 3")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codecs: [{"name": "numcodecs.zfpy"}, *codecs], "codec 'numcodecs.zfpy' is not read"),
        (lambda codecs: [*codecs, {"name": "vlen-utf8"}], "codec 'vlen-utf8' is not read"),
        (lambda codecs: [*codecs, {"name": "gzip"}], "codec 'gzip' follows a compressor"),
        (lambda codecs: [{"name": "transpose", "configuration": {"order": [0, 0, 1]}}, *codecs], "transpose of axes"),
        (lambda codecs: [], "IndexError"),
        (lambda codecs: [shard([3, 4, 4], codecs)], "shards (4, 4, 4) of chunks (3, 4, 4)"),
        (lambda codecs: [shard([4, 4, 4], [shard([4, 4, 4], codecs)])], "codec 'sharding_indexed' is not read"),
        (lambda codecs: [shard([4, 4, 4], codecs, "blosc")], "the index of its shards is"),
    ],
)
def test_what_is_not_read_of_format_3_is_named(tmp_path: Path, change: Any, message: str) -> None:
    zarr.create_array(str(tmp_path / "a"), shape=(4, 4, 4), chunks=(4, 4, 4), dtype="uint8")
    content = json.loads((tmp_path / "a/zarr.json").read_text())
    content["codecs"] = change(content["codecs"])
    (tmp_path / "a/zarr.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        reader(tmp_path / "a").read(Box.whole((4, 4, 4)))
    assert message in str(caught.value)


def shard(chunk: list[int], codecs: list[dict[str, Any]], *index: str) -> dict[str, Any]:
    """Return a sharding codec whose index has those codecs after `bytes`."""
    names: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    names += [{"name": name} for name in index]
    inner = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": names}
    return {"name": "sharding_indexed", "configuration": inner}


@pytest.mark.parametrize("name", [".zattrs", "s0/.zarray"])
@pytest.mark.parametrize("depth", [300, 900, 3000, 200_000])
def test_metadata_nested_without_end_is_named(tmp_path: Path, name: str, depth: int) -> None:
    pyramid(tmp_path / "em")
    content = json.loads((tmp_path / "em" / name).read_text()) | {"more": "DEEP"}
    text = json.dumps(content).replace('"DEEP"', "[" * depth + "]" * depth)
    (tmp_path / "em" / name).write_text(text)

    def look() -> None:
        array = reader(store.open_multiscale(tmp_path / "em").levels[0].path)
        store.Checksums(tmp_path / "sums").record(array.path, array.layout, [(0, 0, 0)], array.check_decodes)

    error = error_of(look)
    assert (error is not None) == (depth > 1000)
    assert error is None or f"{tmp_path}/em/{name}: is not readable JSON (RecursionError" in str(error)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_a_voxel_size_beyond_all_numbers_is_named(tmp_path: Path, scale: float) -> None:
    """Each factor is a number, their product is not; nor is the volume of a voxel."""
    pyramid(tmp_path / "em")
    content = json.loads((tmp_path / "em/.zattrs").read_text())
    multiscale = content["multiscales"][0]
    multiscale["coordinateTransformations"] = [{"type": "scale", "scale": [scale] * 3}] * 2
    (tmp_path / "em/.zattrs").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"em: level s0 has voxels of .*: correct its scale"):
        store.open_multiscale(tmp_path / "em")


def test_only_codecs_that_run_no_code_are_used() -> None:
    assert not {"pickle", "json2", "msgpack2", "categorize"} & (COMPRESSORS | FILTERS)


# ---- what is stored -----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(shape=shapes(10), chunks=shapes(5), seed=st.integers(0, 99))
def test_coverage_and_mask_count_voxels_of_stored_chunks(
    tmp_path_factory: pytest.TempPathFactory, shape: VoxelsZYX, chunks: VoxelsZYX, seed: int
) -> None:
    path, rng = tmp_path_factory.mktemp("array") / "a", np.random.default_rng(seed)
    store.create_array(path, shape, "u1", chunks, store_zeros=True)[:] = 1
    there = np.ones(shape, bool)
    for index in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunks, strict=True))):
        if rng.random() < 0.4:
            path.joinpath(*map(str, index)).unlink()
            there[tuple(slice(i * c, i * c + c) for i, c in zip(index, chunks, strict=True))] = False
    array = reader(path)
    for _ in range(5):
        start = [int(rng.integers(-3, n + 2)) for n in shape]
        stop = [a + int(rng.integers(1, 8)) for a in start]
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        mask = np.zeros(box.shape_zyx, bool)
        inside = box.clip(Box.whole(shape))
        mask[inside.relative_to(box).slices] = there[inside.slices]
        assert np.array_equal(array.stored_mask(box), mask)
        assert array.coverage(box) == pytest.approx(mask.mean())
    assert array.any_stored == there.any()


def pyramid(path: Path) -> list[Grid]:
    sizes = ((1.74, 2.0, 2.0), (3.48, 4.0, 4.0), (6.96, 8.0, 8.0))
    grids = [Grid((16, 16, 16), sizes[0], (0.0, 0.0, 0.0)).at_voxel_size(size) for size in sizes]
    write_multiscale(path, [(grid, np.ones(grid.shape_zyx, np.uint8)) for grid in grids])
    return grids


def test_levels_are_tried_in_the_order_of_their_use(tmp_path: Path) -> None:
    pyramid(tmp_path / "em")
    multiscale = store.open_multiscale(tmp_path / "em")
    for size, order in (
        ((4.0, 4.0, 4.0), [1, 0, 2]),
        ((1.0, 1.0, 1.0), [0, 1, 2]),
        ((2.0, 2.0, 2.0), [0, 1, 2]),
        ((32.0, 32.0, 32.0), [2, 1, 0]),
    ):
        assert [multiscale.levels.index(level) for level in multiscale.levels_for(size)] == order
        assert multiscale.level_for(size) == multiscale.levels[order[0]]


def test_a_level_that_is_not_there_is_left_out_but_not_one_that_lost_its_metadata(tmp_path: Path) -> None:
    grids = pyramid(tmp_path / "em")
    for chunk in (tmp_path / "em/s0").rglob("*"):
        if chunk.is_file() and chunk.name != ".zarray":
            chunk.unlink()
    (tmp_path / "em/s0/.zarray").rename(tmp_path / "kept")
    with pytest.raises(DataError, match=r"em/s0: is not a readable zarr array \(neither"):
        store.open_multiscale(tmp_path / "em")
    for folder in sorted((tmp_path / "em/s0").rglob("*"), reverse=True):
        folder.unlink() if folder.is_file() else folder.rmdir()
    assert [level.grid for level in store.open_multiscale(tmp_path / "em").levels] == grids[1:]
    with pytest.raises(DataError, match=r"em/s0: is not a readable"):
        store.open_multiscale(tmp_path / "em", finest_only=True)


def test_a_path_out_of_the_group_is_refused(tmp_path: Path) -> None:
    pyramid(tmp_path / "em")
    for inner in ("../other/s0", str(tmp_path / "em/s0")):
        content = json.loads((tmp_path / "em/.zattrs").read_text())
        content["multiscales"][0]["datasets"][0]["path"] = inner
        (tmp_path / "em/.zattrs").write_text(json.dumps(content))
        with pytest.raises(DataError, match="points outside itself"):
            store.open_multiscale(tmp_path / "em")


def test_the_same_scale_in_another_unit_or_split_in_two_is_the_same_grid(tmp_path: Path) -> None:
    grids = pyramid(tmp_path / "em")
    content = json.loads((tmp_path / "em/.zattrs").read_text())
    multiscale = content["multiscales"][0]
    for axis in multiscale["axes"]:
        axis["unit"] = "micrometer"
    for dataset in multiscale["datasets"]:
        for transform in dataset["coordinateTransformations"]:
            key = transform["type"]
            transform[key] = [value / 2000 for value in transform[key]]
    multiscale["coordinateTransformations"] = [{"type": "scale", "scale": [2.0, 2.0, 2.0]}, {"type": "identity"}]
    (tmp_path / "em/.zattrs").write_text(json.dumps(content))
    for level, grid in zip(store.open_multiscale(tmp_path / "em").levels, grids, strict=True):
        assert level.grid.shape_zyx == grid.shape_zyx
        assert level.grid.voxel_size_nm == pytest.approx(grid.voxel_size_nm)
        assert level.grid.origin_nm == pytest.approx(grid.origin_nm)


def test_crc32_is_that_of_zlib_and_layout_names_files(tmp_path: Path) -> None:
    """The sidecar can be checked by other tools: crc32 of the file as it is stored."""
    store.create_array(tmp_path / "em/s0", (5, 9, 70), "u1", (4, 4, 64))[:] = 1
    array, checksums = reader(tmp_path / "em/s0"), store.Checksums(tmp_path / "sums")
    units = list(store.units_of(array.layout, (0, 0, 0), array.shape_zyx))
    assert len(units) == math.prod(array.layout.unit_counts) == 12
    checksums.record(array.path, array.layout, units)
    rows = checksums.of(array.path, array.layout).rows
    for number, unit in enumerate(units):
        raw = (array.path / array.layout.file_name(unit)).read_bytes()
        assert rows[number].crc32 == zlib.crc32(raw)
        assert rows[number].size == len(raw)
