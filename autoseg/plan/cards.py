"""Which GPUs of a machine train together: the first ones that are alike, as long as each adds to what all may use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from autoseg.errors import counted
from autoseg.model.memory import CUDA_CONTEXT_BYTES
from autoseg.schema import Gpu

GIB = 2**30
VRAM_SHARE = 0.85
ALIKE = 0.1  # by how much the memory of GPUs may differ that train together


def held_bytes(gpu: Gpu) -> int:
    """Return what other processes hold of a GPU; asking for it takes a context, which a step's memory counts."""
    return max(0, gpu.memory_bytes - gpu.free_bytes - CUDA_CONTEXT_BYTES)


def usable_bytes_of(gpu: Gpu) -> int:
    """Return the bytes of a GPU that a training step may take."""
    return int((gpu.memory_bytes - held_bytes(gpu)) * VRAM_SHARE)


def leading(gpus: Sequence[Gpu]) -> int:
    """Return how many of the first GPUs train together: each gets as much to do as the fullest of them can take."""
    return max(range(1, len(leading_alike(gpus)) + 1), key=lambda n: (_together(gpus[:n]), n))


def leading_alike(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Return the first GPUs that are of one kind: formats, and memory whatever others hold of it."""
    return list(itertools.takewhile(lambda gpu: _alike(gpu, gpus[0]), gpus))


def explain_cards(gpus: Sequence[Gpu]) -> str:
    """Return which GPUs train together, which do not and why, and what to do where others would do better."""
    number, alike = leading(gpus), len(leading_alike(gpus))
    one = gpus[0]
    formats = " and ".join(name for name in ("bf16", "fp16") if getattr(one, name)) or "fp32 alone"
    least, most = (size(gpu.memory_bytes for gpu in gpus[:number]) / GIB for size in (min, max))
    sizes = f"{least:.1f}" if f"{least:.1f}" == f"{most:.1f}" else f"{least:.1f} to {most:.1f}"
    because = f"{counted(number, 'GPU')} of {sizes} GiB with {formats}, one process each"
    if number == 1:
        because = f"one GPU of {most:.1f} GiB with {formats}"
    if number < len(gpus):
        because += f"; {counted(len(gpus) - number, 'GPU')} from {gpus[number].name} on are not used: "
        because += _busy(gpus, number) if number < alike else _unlike(gpus[number])
    better = _best(gpus)
    if _together(gpus[i] for i in better) > _together(gpus[:number]):
        because += f"; to use {_usable(gpus[i] for i in better)}, set CUDA_VISIBLE_DEVICES={','.join(map(str, better))}"
    return because


def _busy(gpus: Sequence[Gpu], number: int) -> str:
    fuller = gpus[number]
    text = f"GPU {number} has {held_bytes(fuller) / GIB:.1f} of {fuller.memory_bytes / GIB:.1f} GiB in use, with it "
    return f"{text}{_usable(gpus[: number + 1])} could be used instead of {_usable(gpus[:number])}"


def _unlike(gpu: Gpu) -> str:
    return f"that one has {gpu.memory_bytes / GIB:.1f} GiB or other formats"


def _usable(gpus: Iterable[Gpu]) -> str:
    cards = list(gpus)
    return f"{len(cards)} x {_least(cards) / GIB:.1f} GiB"


def _alike(gpu: Gpu, one: Gpu) -> bool:
    formats = (gpu.bf16, gpu.fp16) == (one.bf16, one.fp16)
    return formats and abs(gpu.memory_bytes - one.memory_bytes) <= ALIKE * one.memory_bytes


def _least(gpus: Iterable[Gpu]) -> int:
    return min(usable_bytes_of(gpu) for gpu in gpus)


def _together(gpus: Iterable[Gpu]) -> int:
    cards = list(gpus)
    return len(cards) * _least(cards)


def _best(gpus: Sequence[Gpu]) -> list[int]:
    """Return the numbers of the GPUs of one kind, anywhere, that may use most memory together."""
    groups = []
    for one in gpus:
        alike = [i for i, gpu in enumerate(gpus) if _alike(gpu, one)]
        alike.sort(key=lambda i: (-usable_bytes_of(gpus[i]), i))
        groups += [sorted(alike[:n]) for n in range(1, len(alike) + 1)]
    return max(groups, key=lambda group: (_together(gpus[i] for i in group), -len(group)))
