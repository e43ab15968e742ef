"""The only door to zarr: OME-NGFF multiscale groups in, chunks out; both zarr majors, zarr format 2 and 3.

Reading never writes. A chunk that was never stored reads as the fill value, so `stored_chunks` tells which are.
Only `engine` imports zarr and `codecs` numcodecs; above them `layout` (one array's metadata), `sidecar` (checksums of
what is stored), `reading` (chunks), `metadata` (OME-NGFF) and `pyramid` (levels).
"""

from autoseg.data.store.engine import (
    create_array,
    make_groups,
    open_for_update,
    read_attributes,
    write_attributes,
)
from autoseg.data.store.layout import CHUNK_CAP_BYTES, read_layout, units_of
from autoseg.data.store.metadata import Level, Multiscale, multiscale_attributes, open_multiscale
from autoseg.data.store.pyramid import CHUNK_EDGE, chunk_shape, pyramid_grids, write_pyramid
from autoseg.data.store.reading import ArrayReader, ChunkCache
from autoseg.data.store.sidecar import Checksums, alone, checksums_in

__all__ = [
    "CHUNK_CAP_BYTES",
    "CHUNK_EDGE",
    "ArrayReader",
    "Checksums",
    "ChunkCache",
    "Level",
    "Multiscale",
    "alone",
    "checksums_in",
    "chunk_shape",
    "create_array",
    "make_groups",
    "multiscale_attributes",
    "open_for_update",
    "open_multiscale",
    "pyramid_grids",
    "read_attributes",
    "read_layout",
    "units_of",
    "write_attributes",
    "write_pyramid",
]
