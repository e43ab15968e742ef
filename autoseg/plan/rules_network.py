"""Rules of the network: device, number format, kind, levels, widths, kernels, loss."""

from __future__ import annotations

from autoseg.errors import PlanError, counted
from autoseg.geometry import VoxelsZYX
from autoseg.plan.draft import Choice, Draft
from autoseg.plan.rules_machine import GIB, step_cost, usable_bytes

ODD_FROM = 32
NARROW, WIDE = (18, 36, 48, 64, 80), (32, 64, 128, 256, 320)


def choose_device(draft: Draft) -> Choice:
    """Return the kind of device."""
    gpus = draft.hardware.gpus
    if not gpus:
        return Choice("cpu", f"no GPU, {counted(draft.hardware.cpu_threads, 'CPU thread')}", "hardware")
    return Choice("cuda", f"{gpus[0].name} with {gpus[0].memory_bytes / GIB:.0f} GiB", "hardware")


def choose_precision(draft: Draft) -> Choice:
    """Return the number format of the forward pass."""
    if draft["device"] == "cpu":
        if draft.hardware.cpu_bf16:
            return Choice("bf16", f"{draft.hardware.cpu_name} multiplies bf16 natively", "hardware")
        return Choice("fp32", f"{draft.hardware.cpu_name} would only emulate bf16", "hardware")
    used = draft.hardware.gpus[: draft["num_processes"]]
    without_bf16, without_fp16 = (next((g for g in used if not getattr(g, name)), None) for name in ("bf16", "fp16"))
    if without_bf16 is None:
        return Choice("bf16", f"{used[0].name} has bf16: the range of fp32, no loss scaling", "hardware")
    if without_fp16 is None:
        return Choice("fp16", f"{without_bf16.name} has no bf16; fp16 with a gradient scaler", "hardware")
    lacking = f"{without_fp16.name} has neither bf16 nor fast fp16"
    if without_fp16.bf16:
        lacking = f"{without_fp16.name} has no fast fp16, {without_bf16.name} no bf16"
    return Choice("fp32", lacking, "hardware")


def choose_kind(draft: Draft) -> Choice:
    """Return the kind of network."""
    if draft["dimensions"] == "3d":
        return Choice("rsunet", "3D EM: residual blocks, summed skips, kernels by anisotropy", "Lee et al. 2017")
    return Choice("unet", "2D: a residual path costs 27 % more time a step", "step time of a prototype, CPU")


def choose_strides(draft: Draft) -> Choice:
    """Return the stride of each level: an axis is halved once it is no coarser than twice the finest one."""
    patch: VoxelsZYX = draft["patch_size_zyx"]
    for axis, edge in zip("zyx", patch, strict=True):
        if edge >= ODD_FROM and edge % 8:
            what = f"{edge} along {axis} cannot be halved three times"
            raise PlanError("patch_size_zyx", what, f"use {edge // 16 * 16} or {-(-edge // 16) * 16}")
    spacing = list(draft["voxel_size_nm"])
    edges = list(patch)
    strides: list[tuple[int, int, int]] = []
    limit = len(draft.settings.get("network.features", range(5))) - 1
    while len(strides) < limit:
        finest = min(v for v, n in zip(spacing, patch, strict=True) if n > 1)
        stride = [2 if n % 2 == 0 and n >= 8 and v < 2 * finest else 1 for v, n in zip(spacing, edges, strict=True)]
        if stride == [1, 1, 1]:
            break
        strides.append((stride[0], stride[1], stride[2]))
        spacing = [v * s for v, s in zip(spacing, stride, strict=True)]
        edges = [n // s for n, s in zip(edges, stride, strict=True)]
    if not strides:
        raise PlanError("patch_size_zyx", f"{list(patch)} cannot be halved once", "use even edges of at least 8")
    bottom = "x".join(str(n) for n in edges)
    top = "x".join(str(n) for n in patch)
    because = f"{counted(len(strides), 'time')} what is not yet coarse is halved, from {top} to {bottom}"
    return Choice(tuple(strides), because, "nnU-Net topology")


def choose_features(draft: Draft) -> Choice:
    """Return the width of each level."""
    levels = len(draft["network.strides_zyx"]) + 1
    if draft["network.kind"] == "rsunet" and draft["device"] == "cpu":
        return Choice((16, 24, 32, 48, 64)[:levels], "narrow, with many levels", "unmeasured")
    if draft["network.kind"] == "rsunet":
        return _solid_features(draft, levels)
    base, cap = (32, 320) if draft["device"] == "cuda" else (16, 128)
    widths = tuple(min(cap, base * 2**i) for i in range(levels))
    because = f"{counted(levels, 'level')}, from {base} up to {cap}: " + (
        "shorter steps, so that a budget holds more of them" if base == 16 else "nnU-Net's widths"
    )
    return Choice(widths, because, "a prototype, once: 32 scored .03 less on VNC" if base == 16 else "nnU-Net")


def _solid_features(draft: Draft, levels: int) -> Choice:
    """Return the wide levels where two patches of them fit, else the narrow ones."""
    room, name = usable_bytes(draft)
    need = step_cost(draft, WIDE[:levels]).memory_bytes(2, "cuda")
    what = f"two patches of {WIDE[0]} to {WIDE[levels - 1]} channels take {need / GIB:.1f} GiB"
    if need <= room:
        return Choice(WIDE[:levels], f"{what} of {room / GIB:.1f} GiB of {name}", "nnU-Net's widths")
    return Choice(NARROW[:levels], f"{what}, {room / GIB:.1f} GiB of {name} may be used", "PyTorch Connectomics")


def choose_kernels(draft: Draft) -> Choice:
    """Return the kernel of each level: flat while sections are at least twice as coarse as the plane."""
    spacing = list(draft["voxel_size_nm"])
    flat = draft["patch_size_zyx"][0] == 1
    kernels = []
    for stride in [*draft["network.strides_zyx"], (1, 1, 1)]:
        thin = flat or spacing[0] >= 2 * min(spacing[1:])
        kernels.append((1, 3, 3) if thin else (3, 3, 3))
        spacing = [v * s for v, s in zip(spacing, stride, strict=True)]
    num_flat = sum(kernel[0] == 1 for kernel in kernels)
    because = f"{num_flat} of {len(kernels)} levels are flat: there sections are at least twice as coarse"
    return Choice(tuple(kernels), f"{counted(len(kernels), 'level')} of 2D" if flat else because, "nnU-Net topology")


def choose_norm(draft: Draft) -> Choice:
    """Return the normalization layer."""
    if draft["dimensions"] == "3d":
        return Choice("group", "batches of a few 3D patches are too small for batch norm", "Wu and He 2018")
    if draft["device"] == "cpu" and draft["num_processes"] > 1:
        because = f"batches of {draft['num_processes']} processes on a CPU would each have statistics of their own"
        return Choice("group", because, "num_processes")
    if draft["device"] == "cpu":
        because = "group and instance norm cost 83 % and 55 % more time"
        return Choice("batch", because, "step time of a prototype, CPU")
    return Choice("instance", "independent of the batch", "nnU-Net")


def choose_deep_supervision(draft: Draft) -> Choice:
    """Return whether coarser levels have losses of their own."""
    if draft["dimensions"] == "3d":
        return Choice(True, "3D networks learn from short runs: coarse levels get a gradient at once", "nnU-Net")
    return Choice(False, "shallow 2D networks train without", "simplest that works")
