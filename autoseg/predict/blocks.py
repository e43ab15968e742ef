"""RUN + EM -> labels: each block reads EM and its surroundings, blends inside, and writes its own voxels once.

A ledger beside the output says which blocks are done; the same command on an existing output does the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.data import store
from autoseg.data.em import EmReader, read_input
from autoseg.data.resample import resample
from autoseg.errors import CheckpointError
from autoseg.geometry import Box, VoxelsZYX, blocks
from autoseg.model import checkpoint
from autoseg.model.networks import build_network
from autoseg.model.windows import Predictor
from autoseg.predict.decode import to_labels
from autoseg.predict.volumes import Region
from autoseg.schema import Plan, TunedDecode, load_as, write_atomically

CACHE_BYTES = 256 * 2**20
LEDGER = ".autoseg"
Progress = Callable[[str, int, int], None]


class Trained(NamedTuple):
    """A run ready to predict."""

    predictor: Predictor
    checkpoint: str
    identity: str

    @property
    def plan(self) -> Plan:
        """Return the plan of the run."""
        return self.predictor.plan


def open_run(run: Path, which: str = "best", device: str = "auto") -> Trained:
    """Load the plan and the averaged weights of a run; `which` is best, last or the path of a checkpoint."""
    if not (run / "plan.json").is_file():
        raise CheckpointError(run, "is not a run (no plan.json)", "pass the folder given to `autoseg train --run`")
    plan = load_as(run / "plan.json", Plan)
    folder = checkpoint.find(run / "checkpoints", which) if which in ("best", "last") else Path(which)
    if not (folder / checkpoint.HEADER).is_file():
        raise CheckpointError(folder, "there is no such checkpoint", "train first, or choose --checkpoint last")
    header = checkpoint.verify(folder)
    plan, tuned = _tuned(plan, header.decode)
    network = build_network(plan)
    checkpoint.load_weights(network, folder / checkpoint.WEIGHTS)
    target = _device(device)
    if target.type == "cpu":
        torch.set_num_threads(min(plan.num_threads, os.cpu_count() or 1))
    layout = torch.channels_last if plan.patch_size_zyx[0] == 1 else torch.contiguous_format
    network = network.to(target, memory_format=layout).eval()  # type: ignore[call-overload]
    made_by = (header.plan_sha256, sorted(header.sha256.items()), sorted(plan.decode.thresholds.items()))
    identity = hashlib.sha256(repr(made_by).encode()).hexdigest()
    return Trained(Predictor(network, plan, target), f"{which} (step {header.step}{tuned})", identity)


def _tuned(plan: Plan, tuned: TunedDecode | None) -> tuple[Plan, str]:
    """Return the plan with the thresholds that validation chose for a checkpoint, and a word about it."""
    if tuned is None or set(tuned.thresholds) != set(plan.class_names):
        return plan, ""
    decode = msgspec.structs.replace(plan.decode, thresholds=tuned.thresholds)
    return msgspec.structs.replace(plan, decode=decode), ", tuned thresholds"


def _device(name: str) -> torch.device:
    """Return the device of that name; auto is the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise CheckpointError(f"--device {name}", "is not a device that predicts", "use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("--device cuda", "there is no GPU here", "use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def predict_regions(
    trained: Trained,
    regions: Sequence[Region],
    out: Path,
    *,
    probabilities: bool = False,
    checksums: store.Checksums | None = None,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Write the labels of every region into the zarr `out`; what its ledger lists is not done again.

    EM of which `checksums` were recorded must have them.
    """
    _claim(trained, out, probabilities)
    for region in regions:
        _claim_region(out, region)
        writer = _RegionWriter(trained, region, out / region.name, probabilities, checksums)
        done = _done_blocks(out, region.name)
        todo = list(writer.blocks())
        for number, block in enumerate(todo):
            progress(region.name or "volume", number, len(todo))
            key = f"{region.name} {block.start}"
            if key not in done:
                _record(out, key, writer.write(block))
        progress(region.name or "volume", len(todo), len(todo))
        writer.finish()
        store.make_groups(out, out / region.name)


class _RegionWriter:
    """Predicts one region block by block onto its own grid."""

    def __init__(
        self,
        trained: Trained,
        region: Region,
        folder: Path,
        probabilities: bool,
        checksums: store.Checksums | None = None,
    ) -> None:
        plan = trained.plan
        self.predictor, self.folder, self.grid = trained.predictor, folder, region.grid
        self.names = plan.class_names
        self.thresholds = np.array([plan.decode.thresholds[name] for name in self.names])
        self.network_grid = region.grid.at_voxel_size(plan.voxel_size_nm)
        cache = store.ChunkCache(CACHE_BYTES, checksums)
        self.em = EmReader(region.em, plan.voxel_size_nm, plan.normalization, cache)
        self.folders = {name: folder / name for name in self.names}
        if probabilities:
            self.folders |= {f"{name} probability": folder / "probabilities" / name for name in self.names}
        self.block_zyx = self._block_shape()
        chunk = _chunk_shape(self.block_zyx, self.grid.shape_zyx)
        self.arrays = {key: self._array(path / "s0", chunk) for key, path in self.folders.items()}

    def _array(self, path: Path, chunk: VoxelsZYX) -> Any:
        exists = (path / ".zarray").exists()
        return store.open_for_update(path) if exists else store.create_array(path, self.grid.shape_zyx, np.uint8, chunk)

    def _block_shape(self) -> VoxelsZYX:
        """Return the predictor's block, in voxels of the output."""
        first = next(iter(self.predictor.blocks(self.network_grid.shape_zyx)))
        z, y, x = (
            n if n == whole else max(1, round(n * v / w))
            for n, whole, v, w in zip(
                first.shape_zyx,
                self.network_grid.shape_zyx,
                self.network_grid.voxel_size_nm,
                self.grid.voxel_size_nm,
                strict=True,
            )
        )
        same = self.network_grid == self.grid
        return (z, y, x) if same else (z, -(-y // 16) * 16, -(-x // 16) * 16)

    def blocks(self) -> Iterator[Box]:
        """Yield the blocks in raster order; together they are the region."""
        return blocks(self.grid.shape_zyx, self.block_zyx)

    def write(self, block: Box) -> str:
        """Predict and write one block; return the sha256 of its labels."""
        probability = self._probability(block)
        labels = to_labels(probability, self.thresholds)
        for k, name in enumerate(self.names):
            self.arrays[name][block.slices] = labels[k]
            if f"{name} probability" in self.arrays:
                self.arrays[f"{name} probability"][block.slices] = np.rint(probability[k] * 255).astype(np.uint8)
        return hashlib.sha256(labels.tobytes()).hexdigest()

    def _probability(self, block: Box) -> NDArray[np.float32]:
        """Return probabilities (classes, z, y, x) on the output's grid; 0 where there is no EM."""
        shape = self.network_grid.shape_zyx
        target = self.grid.crop(block)
        if self.network_grid == self.grid:
            probability = self.predictor.predict(self._read, shape, block)
        else:
            covering = self.network_grid.covering(target).grow((1, 1, 1)).clip(Box.whole(shape))
            coarse = self.predictor.predict(self._read, shape, covering)
            probability = resample(coarse, self.network_grid.crop(covering), target, area=False)
        if not self.em.complete:
            valid = self.em.read(target)[1]
            if valid is not None:
                probability[:, ~valid] = 0
        return probability

    def _read(self, box: Box) -> NDArray[np.float32]:
        return read_input(self.em, self.network_grid, box, self.predictor.plan.input_slices)[0]

    def finish(self) -> None:
        """Write the metadata that makes each class an OME-NGFF image of one level."""
        for path in self.folders.values():
            store.write_attributes(path, store.multiscale_attributes(path.name, [self.grid]))
            store.make_groups(self.folder, path)


def _chunk_shape(block_zyx: VoxelsZYX, shape_zyx: VoxelsZYX) -> VoxelsZYX:
    """Return chunks that blocks never share: they divide the block, or the block spans the axis."""
    z, y, x = (
        min(n, store.CHUNK_EDGE) if b >= n else math.gcd(b, store.CHUNK_EDGE)
        for b, n in zip(block_zyx, shape_zyx, strict=True)
    )
    return z, y, x


def _claim(trained: Trained, out: Path, probabilities: bool) -> None:
    """Mark a new output with what makes it; refuse one that something else made."""
    path = out / LEDGER / "prediction.json"
    identity = {"identity": trained.identity, "checkpoint": trained.checkpoint, "probabilities": probabilities}
    if path.is_file():
        if json.loads(path.read_text()) != identity:
            raise CheckpointError(out, "was begun by another run, checkpoint or option", "choose another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(out, "exists and is not a prediction of autoseg", "choose another --out")
    write_atomically(path, json.dumps(identity).encode())


def _claim_region(out: Path, region: Region) -> None:
    """Mark which voxels of which EM a region is; refuse others, whose blocks the ledger would call done."""
    path = out / LEDGER / f"region-{hashlib.sha256(region.name.encode()).hexdigest()[:16]}.json"
    written = os.stat(region.em / ".zattrs").st_mtime_ns if (region.em / ".zattrs").exists() else 0
    identity = json.dumps({"em": str(region.em.resolve()), "written": written, "grid": region.grid})
    if not path.is_file():
        write_atomically(path, identity.encode())
    elif path.read_text() != identity:
        what = f"{region.name or 'its volume'} was begun from other EM or for another box"
        raise CheckpointError(out, what, "choose another --out")


def _done_blocks(out: Path, region: str) -> set[str]:
    path = out / LEDGER / "ledger.jsonl"
    done = set()
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            done.add(str(json.loads(line)["block"]))
        except (ValueError, KeyError):
            continue
    return {key for key in done if key.startswith(f"{region} ")}


def _record(out: Path, key: str, digest: str) -> None:
    with (out / LEDGER / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"block": key, "sha256": digest}) + "\n")
        file.flush()
        os.fsync(file.fileno())
