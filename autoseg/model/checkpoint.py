"""Checkpoints that are never torn and never run code: safetensors beside a JSON header, written whole, renamed once.

::

    RUN/checkpoints/last/      header.json  weights.safetensors (averaged, for prediction)  state.safetensors
    RUN/checkpoints/previous/  the one before
    RUN/checkpoints/best/      the best validation Dice so far
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import safetensors
import safetensors.torch
from torch import Tensor, nn

from autoseg.errors import CheckpointError, PlanError
from autoseg.schema import CheckpointHeader, encode, load_as

WEIGHTS, STATE, HEADER = "weights.safetensors", "state.safetensors", "header.json"


def save_checkpoint(
    folder: Path,
    header: CheckpointHeader,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    best: bool,
) -> None:
    """Write `folder/last` (and `folder/best`), keeping the one before as `folder/previous`."""
    folder.mkdir(parents=True, exist_ok=True)
    if find(folder, "best") == _old(folder / "best"):  # a kill came between the two renames of `_replace`
        _old(folder / "best").rename(folder / "best")
    for leftover in (*folder.glob(".writing-*"), *folder.glob(".old-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    new = folder / f".writing-{os.getpid()}"
    new.mkdir()
    try:
        for name, tensors in ((WEIGHTS, weights), (STATE, state)):
            safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new / name)
            _flush(new / name)
        digests = {name: _sha256(new / name) for name in (WEIGHTS, STATE)}
        (new / HEADER).write_bytes(encode(msgspec.structs.replace(header, sha256=digests)))
        _flush(new / HEADER)
        if best:
            copy = folder / f".writing-best-{os.getpid()}"
            shutil.copytree(new, copy, copy_function=_link)
            _replace(copy, folder / "best")
        if (folder / "last").exists():
            _replace(folder / "last", folder / "previous")
        _replace(new, folder / "last")
    finally:
        shutil.rmtree(new, ignore_errors=True)


def find(folder: Path, name: str) -> Path:
    """Return the checkpoint of that name; while it is being replaced, or after a kill just then, the one before."""
    path = folder / name
    return _old(path) if not path.exists() and _old(path).exists() else path


def newest(folder: Path) -> tuple[Path, CheckpointHeader] | None:
    """Return the newest whole checkpoint, None if none was ever saved; CheckpointError if all of them are damaged."""
    found = [path for name in ("last", "previous", "best") if (path := find(folder, name)).exists()]
    for path in found:
        with contextlib.suppress(CheckpointError, PlanError):
            return path, verify(path)
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(
            folder, f"no checkpoint is whole ({names})", "put back a copy of one, or remove this folder to begin anew"
        )
    return None


def verify(checkpoint: Path) -> CheckpointHeader:
    """Return the header after comparing the sha256 of every file; CheckpointError if one differs."""
    header = load_as(checkpoint / HEADER, CheckpointHeader)
    for name, expected in header.sha256.items():
        path = checkpoint / name
        if name not in (WEIGHTS, STATE) or not path.is_file() or _sha256(path) != expected:
            raise CheckpointError(path, "is missing or damaged", "use another checkpoint (--checkpoint)")
    return header


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; CheckpointError if it is not one."""
    try:
        return dict(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(path, f"is not readable ({error})", "use another checkpoint (--checkpoint)") from None


def load_weights(network: nn.Module, path: Path) -> None:
    """Put the weights into the network; CheckpointError names the first tensor that does not fit."""
    found, wanted = load_tensors(path), network.state_dict()
    for name in sorted(set(found) | set(wanted)):
        if name not in found or name not in wanted:
            side = "the file" if name not in found else "the network"
            raise CheckpointError(path, f"{side} has no tensor {name}", "use the checkpoint of this plan")
        if found[name].shape != wanted[name].shape:
            shapes = f"{tuple(found[name].shape)} here, {tuple(wanted[name].shape)} in the network"
            raise CheckpointError(path, f"{name} has shape {shapes}", "use the checkpoint of this plan")
    network.load_state_dict(found)


def initialize(network: nn.Module, path: Path) -> list[str]:
    """Put every tensor that fits into the network; return the heads that do not, CheckpointError for anything else."""
    found, wanted = load_tensors(path), network.state_dict()
    fitting = {name: found[name] for name in wanted if name in found and found[name].shape == wanted[name].shape}
    random = sorted(set(wanted) - set(fitting))
    for name in random:
        if not name.startswith("heads."):
            raise CheckpointError(path, f"{name} does not fit this network", "use weights of the same network")
    network.load_state_dict(fitting, strict=False)
    return random


def _replace(source: Path, target: Path) -> None:
    """Rename a folder over another; the old one disappears only after the new one stands."""
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _flush(path: Path) -> None:
    if os.name == "nt":  # there a folder cannot be opened, nor a file flushed that was opened to read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
