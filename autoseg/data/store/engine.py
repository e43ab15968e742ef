"""The one module that imports zarr: what both majors do alike, and the JSON beside the chunks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import DTypeLike

from autoseg.errors import DataError
from autoseg.geometry import VoxelsZYX

ZARR_MAJOR = int(zarr.__version__.split(".")[0])


def open_for_update(path: Path) -> Any:
    """Open an existing array to write more blocks into it; chunks of zeros alone are not stored."""
    return zarr.open_array(str(path), mode="r+", **_storing(False))


def create_array(
    path: Path, shape_zyx: VoxelsZYX, dtype: DTypeLike, chunk_zyx: VoxelsZYX, *, store_zeros: bool = False
) -> Any:
    """Create a zarr format 2 array (zstd, '/' between chunk indices, fill 0), replacing what is there.

    A chunk of zeros alone reads the same stored or not; EM stores it, where a missing chunk means: never fetched.
    """
    keywords: dict[str, Any] = {"zarr_format": 2} if ZARR_MAJOR >= 3 else {}
    compressor = numcodecs.Blosc(cname="zstd", clevel=3, shuffle=numcodecs.Blosc.SHUFFLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.open_array(
            str(path),
            mode="w",
            shape=shape_zyx,
            chunks=chunk_zyx,
            dtype=np.dtype(dtype),
            fill_value=0,
            compressor=compressor,
            dimension_separator="/",
            **_storing(store_zeros),
            **keywords,
        )


def _storing(zeros: bool) -> dict[str, Any]:
    """Return the option by which either major stores chunks of zeros or not; their defaults differ."""
    return {"config": {"write_empty_chunks": zeros}} if ZARR_MAJOR >= 3 else {"write_empty_chunks": zeros}


def read_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a group or array of either format; {} if it has none."""
    attributes = read_json(path / ".zattrs")
    if attributes is not None:
        return attributes
    metadata = read_json(path / "zarr.json")
    found = metadata.get("attributes", {}) if metadata else {}
    return found if isinstance(found, dict) else {}


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if there is no file; raise DataError for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, f"is not readable JSON ({brief(error)})", "restore the file") from None
    if not isinstance(content, dict):
        raise DataError(path, "is not a JSON object", "restore the file")
    return content


def write_attributes(path: Path, attributes: dict[str, Any]) -> None:
    """Merge attributes into a zarr format 2 group, making the group if it is not there."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / ".zarray").exists():
        (path / ".zgroup").write_text('{\n    "zarr_format": 2\n}')
    merged = {**read_attributes(path), **attributes}
    (path / ".zattrs").write_text(json.dumps(merged, indent=2))


def make_groups(root: Path, leaf: Path) -> None:
    """Make `leaf` and every folder between it and `root` zarr format 2 groups."""
    for folder in [leaf, *leaf.parents]:
        write_attributes(folder, {})
        if folder == root:
            return


def brief(error: BaseException) -> str:
    """Return one line that says what a library raised."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
