"""The ledger beside a prediction: which blocks are done, and the sha256 of each.

::

    OUT/.autoseg/prediction.json    which run, checkpoint and options          ledger.jsonl   a line for each block
                 region-*.json      which voxels of which EM, in which blocks
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.data import store
from autoseg.errors import CheckpointError, DataError
from autoseg.geometry import Box, VoxelsZYX, blocks
from autoseg.predict.volumes import Region
from autoseg.schema import read_json_lines, write_atomically

LEDGER, LEDGER_VERSION = ".autoseg", 2


def claim(out: Path, marks: Mapping[str, Any]) -> None:
    """Mark a new output with what makes it; refuse one that something else made."""
    path = out / LEDGER / "prediction.json"
    if path.is_file():
        if json.loads(path.read_text()) != marks:
            raise CheckpointError(out, "was begun by another run, checkpoint or option", "choose another --out")
        _end_torn_line(out / LEDGER / "ledger.jsonl")
        return
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(out, "exists and is not a prediction of autoseg", "choose another --out")
    write_atomically(path, json.dumps(marks).encode())


def claim_region(out: Path, region: Region, block_zyx: VoxelsZYX) -> None:
    """Mark which voxels of which EM a region is; refuse others, whose blocks the ledger would call done."""
    path = _region_file(out, region.name)
    attributes = region.em / ".zattrs"
    written = os.stat(attributes).st_mtime_ns if region.copy_of is None and attributes.exists() else 0
    em = region.copy_of or str(region.em.resolve())
    identity = json.dumps({"em": em, "written": written, "grid": region.grid, "block_zyx": block_zyx})
    if not path.is_file():
        write_atomically(path, identity.encode())
    elif path.read_text() != identity:
        what = f"{region.name or 'its volume'} was begun from other EM or for another box"
        raise CheckpointError(out, what, "choose another --out")


def read_ledger(out: Path) -> dict[str, str]:
    """Return the sha256 of each block, by its key; a later line replaces an earlier one."""
    lines = read_json_lines(out / LEDGER / "ledger.jsonl")
    return {str(line.get("block")): str(line.get("sha256")) for line in lines}


def record(out: Path, key: str, digest: str) -> None:
    """Add a block that is on disk, and wait until the line is."""
    with (out / LEDGER / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"block": key, "sha256": digest}) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Stored:
    """What is on disk of some classes, block by block."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._readers = [store.ArrayReader(folder / "s0", store.ChunkCache(0)) for folder in folders]

    def digest(self, block: Box) -> str | None:
        """Return the sha256 of the voxels of a block, class by class; None if one cannot be read."""
        digest = hashlib.sha256()
        try:
            for reader in self._readers:
                digest.update(reader.read(block).tobytes())
        except DataError:
            return None
        return digest.hexdigest()

    def remove(self, block: Box) -> None:
        """Remove the chunks of a block, of which a damaged one could not be updated."""
        for path in self._files(block):
            path.unlink(missing_ok=True)

    def flush(self, block: Box) -> None:
        """Wait until the chunks of a block are on the disk."""
        for path in filter(Path.exists, self._files(block)):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _files(self, block: Box) -> Iterator[Path]:
        for reader in self._readers:
            for unit in store.units_of(reader.layout, block.start, block.stop):
                yield reader.path / reader.layout.file_name(unit)


def check_finished(out: Path, name: str) -> None:
    """Raise DataError unless the labels of a region are on disk as the ledger beside them says; without one, pass."""
    ledger = out / LEDGER
    claimed = _region_file(out, name)
    if not claimed.is_file():
        return
    prediction, region = json.loads((ledger / "prediction.json").read_text()), json.loads(claimed.read_text())
    kinds = ("", "probabilities") if prediction["probabilities"] else ("",)
    stored = Stored([out / name / kind / entry for kind in kinds for entry in prediction["classes"]])
    done = read_ledger(out)
    todo = list(blocks(tuple(region["grid"][0]), tuple(region["block_zyx"])))
    missing = [block for block in todo if done.get(f"{name} {block.start}", "") != stored.digest(block)]
    if missing:
        what = (
            f"{len(missing)} of {len(todo)} blocks of {name or 'its volume'} are missing or not as they were predicted"
        )
        remedy = f"run the same `autoseg predict` again, or remove {ledger} if you changed the labels yourself"
        raise DataError(out, what, remedy)


def _region_file(out: Path, name: str) -> Path:
    return out / LEDGER / f"region-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def _end_torn_line(ledger: Path) -> None:
    if ledger.is_file() and ledger.read_bytes()[-1:] not in (b"", b"\n"):
        with ledger.open("a") as file:
            file.write("\n")
