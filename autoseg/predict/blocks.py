"""RUN + EM -> labels: each block reads EM and its surroundings, blends inside, and writes its own voxels once.

The same command on an existing output does the blocks that its ledger does not list, and those that are no longer on
disk as the ledger says.
"""

from __future__ import annotations

import hashlib
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
from autoseg.model import checkpoint, windows
from autoseg.model.networks import build_network
from autoseg.model.windows import Predictor, find_device
from autoseg.predict.decode import to_labels
from autoseg.predict.ledger import LEDGER_VERSION, Stored, claim, claim_region, read_ledger, record
from autoseg.predict.volumes import Region
from autoseg.schema import Plan, TunedDecode, used_plan

CACHE_BYTES = 256 * 2**20
SMALLEST_EDGE = 16
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
    plan = used_plan(run)
    folder = checkpoint.find(run / "checkpoints", which) if which in ("best", "last") else Path(which)
    if not (folder / checkpoint.HEADER).is_file():
        raise CheckpointError(folder, "there is no such checkpoint", "train first, or choose --checkpoint last")
    header = checkpoint.verify(folder)
    plan, tuned = _tuned(plan, header.decode)
    network = build_network(plan)
    checkpoint.load_weights(network, folder / checkpoint.WEIGHTS)
    target = _device(device, plan)
    if target.type == "cpu" and plan.precision == "fp16":  # the CPU lacks it, and fp32 holds all its values
        plan = msgspec.structs.replace(plan, precision="fp32")
    if target.type == "cpu":
        torch.set_num_threads(min(plan.num_threads * plan.num_processes, os.cpu_count() or 1))
    layout = torch.channels_last if plan.patch_size_zyx[0] == 1 else torch.contiguous_format
    network = network.to(target, memory_format=layout).eval()  # type: ignore[call-overload]
    made_by = (
        LEDGER_VERSION,
        header.plan_sha256,
        sorted(header.sha256.items()),
        sorted(plan.decode.thresholds.items()),
    )
    identity = hashlib.sha256(repr(made_by).encode()).hexdigest()
    return Trained(Predictor(network, plan, target), f"{which} (step {header.step}{tuned})", identity)


def _device(name: str, plan: Plan) -> torch.device:
    """Return the device to predict on: `auto` is the plan's, or the CPU where there is no GPU."""
    if name == "auto" and plan.device == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu")
    return find_device(name, plan)


def _tuned(plan: Plan, tuned: TunedDecode | None) -> tuple[Plan, str]:
    """Return the plan with the thresholds that validation chose for a checkpoint, and a word about it."""
    if tuned is None or set(tuned.thresholds) != set(plan.class_names):
        return plan, ""
    decode = msgspec.structs.replace(plan.decode, thresholds=tuned.thresholds)
    return msgspec.structs.replace(plan, decode=decode), ", tuned thresholds"


def predict_regions(
    trained: Trained,
    regions: Sequence[Region],
    out: Path,
    *,
    probabilities: bool = False,
    checksums: store.Checksums | None = None,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Write the labels of every region into the zarr `out`; blocks that are on disk as its ledger says are left.

    EM of which `checksums` were recorded must have them.
    """
    marks = {"identity": trained.identity, "checkpoint": trained.checkpoint, "probabilities": probabilities}
    claim(out, marks | {"classes": list(trained.plan.class_names)})
    for region in regions:
        writer = _RegionWriter(trained, region, out / region.name, probabilities, checksums)
        claim_region(out, region, writer.block_zyx)
        writer.open_arrays()
        done, stored = read_ledger(out), Stored(list(writer.folders.values()))
        todo = list(writer.blocks())
        for number, block in enumerate(todo):
            progress(region.name or "volume", number, len(todo))
            key = f"{region.name} {block.start}"
            if key in done and done[key] == stored.digest(block):
                continue
            stored.remove(block)
            digest = writer.write(block)
            stored.flush(block)
            record(out, key, digest)
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
        same = self.network_grid == self.grid
        first = next(iter(self.predictor.blocks(self.grid.shape_zyx))).shape_zyx if same else None
        self.block_zyx = first or self._resampled_block()
        self.arrays: dict[str, Any] = {}

    def open_arrays(self) -> None:
        """Create the arrays of all classes, or open those that are there."""
        chunk = _chunk_shape(self.block_zyx, self.grid.shape_zyx)
        self.arrays = {key: self._array(path / "s0", chunk) for key, path in self.folders.items()}

    def _array(self, path: Path, chunk: VoxelsZYX) -> Any:
        exists = (path / ".zarray").exists()
        return store.open_for_update(path) if exists else store.create_array(path, self.grid.shape_zyx, np.uint8, chunk)

    def _resampled_block(self) -> VoxelsZYX:
        """Return a block, in voxels of the output, of whole chunks: what a tile covers, enlarged as memory allows.

        Depth comes first: neighbouring sections share the coarse ones that they are interpolated from.
        """
        whole, coarse = self.grid.shape_zyx, self.network_grid
        ratio = [v / w for v, w in zip(coarse.voxel_size_nm, self.grid.voxel_size_nm, strict=True)]
        tile = self.predictor.tile(coarse.shape_zyx)
        edge = [1 if t == 1 else store.CHUNK_EDGE for t in tile]
        block = [math.ceil(t * r / e) * e for t, r, e in zip(tile, ratio, edge, strict=True)]

        def fits(shape: list[int]) -> bool:
            fine = [min(b, n) for b, n in zip(shape, whole, strict=True)]
            read = [min(math.ceil(b / r) + 3, n) for b, r, n in zip(fine, ratio, coarse.shape_zyx, strict=True)]
            return 4 * len(self.names) * (math.prod(fine) + math.prod(read)) <= windows.BLOCK_BYTES

        while not fits(block) and max(block) > SMALLEST_EDGE:
            axis = block.index(max(block))
            block[axis] = math.ceil(block[axis] / 2 / SMALLEST_EDGE) * SMALLEST_EDGE
        for axis, limit in ((0, store.CHUNK_EDGE), (2, whole[2]), (1, whole[1]), (0, whole[0])):
            while block[axis] < limit and fits(larger := [b * (1 + (i == axis)) for i, b in enumerate(block)]):
                block = larger
        z, y, x = (min(b, n) for b, n in zip(block, whole, strict=True))
        return z, y, x

    def blocks(self) -> Iterator[Box]:
        """Yield the blocks in raster order; together they are the region."""
        return blocks(self.grid.shape_zyx, self.block_zyx)

    def write(self, block: Box) -> str:
        """Predict and write one block; return the sha256 of its labels, then probabilities if they are written."""
        probability = self._probability(block)
        voxels = to_labels(probability, self.thresholds)
        if len(self.arrays) > len(self.names):
            voxels = np.concatenate([voxels, [np.rint(p * 255).astype(np.uint8) for p in probability]])
        for array, values in zip(self.arrays.values(), voxels, strict=True):
            array[block.slices] = values
        return hashlib.sha256(voxels.tobytes()).hexdigest()

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
    """Return chunks that blocks never share: they divide the block, or the block spans the axis.

    Where they are thin they are wider in the plane.
    """
    edge = store.CHUNK_EDGE

    def along(axis: int, edge: int) -> int:
        block, whole = block_zyx[axis], shape_zyx[axis]
        return min(whole, edge) if block >= whole else math.gcd(block, edge)

    z = along(0, edge)
    plane = edge * math.isqrt(edge // z)
    return z, along(1, plane), along(2, plane)
