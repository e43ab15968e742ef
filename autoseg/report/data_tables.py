"""What the terminal shows of a data set: its classes, its EM volumes, how far crops fill patches, what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from autoseg.errors import counted
from autoseg.report.terminal import MISSING, magnitude, short_size
from autoseg.schema import ClassCount, ClassShape, Fingerprint, ValidShare, VolumeFacts

NAMED_PAIRS = 4


def fingerprint_tables(facts: Fingerprint) -> list[Table]:
    """Return what there is to see of a fingerprint, classes first."""
    tables = [class_table(facts)]
    if any(volume.intensity for volume in facts.volumes):
        tables.append(volume_table(facts))
    if facts.valid_shares:
        tables.append(patch_table(facts))
    return tables


def class_table(facts: Fingerprint) -> Table:
    """Return classes by known and positive voxels, crops that hold and that annotate it, thickness and instances."""
    held = f"{counted(len(facts.crops), 'crop')} in {counted(len(facts.volumes), 'volume')}"
    title = f"{held}; thickness and instances (whole + cut) in boxes of up to two crops, ~ in the plane, p10–p90"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in ("class", "known", "positive", "share", "crops", "thickness nm", "instances"):
        is_name = name == "class"  # alone may be folded: a number in two lines is none
        table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    shapes = {shape.name: shape for shape in facts.shapes}
    for entry in facts.classes:
        counts = [c.counts[entry.name] for c in facts.crops if entry.name in c.counts]
        positive, known = sum(c.present for c in counts), sum(c.present + c.absent for c in counts)
        table.add_row(
            entry.name,
            magnitude(known),
            magnitude(positive),
            f"{positive / known:.2%}{_half_width(counts)}" if known else MISSING,
            f"{sum(c.present > 0 for c in counts)}/{sum(_known(c) > 0 for c in counts)}",
            *_shape_cells(shapes.get(entry.name)),
        )
    return table


def _half_width(counts: Sequence[ClassCount]) -> str:
    """Return how far the share of a class may be off, at 95 %, where crops of it were sampled."""
    sampled = [(_known(count), count.share_interval) for count in counts if count.share_interval]
    halves = [weight * (high - low) / 2 for weight, (low, high) in sampled]
    known = sum(_known(count) for count in counts)
    return f" ± {math.hypot(*halves) / known:.2%}" if halves and known else ""


def _shape_cells(shape: ClassShape | None) -> tuple[str, str]:
    """Return the median thickness (p10-p90; ~ in the plane) and the whole instances that were sampled + those cut."""
    if shape is None:
        return MISSING, MISSING
    thick = shape.thickness_nm
    plane = "~" if shape.in_plane else ""
    nm = f"{plane}{thick.p50:.0f} ({thick.p10:.0f}–{thick.p90:.0f})" if thick else "beyond boxes"
    whole, cut = (f"{n:,}" if n < 10_000 else magnitude(n) for n in (shape.num_instances, shape.num_instances_cut))
    return nm, f"{whole} + {cut}"


def warn(facts: Fingerprint, console: Console) -> None:
    """Print what was left out, which annotations contradict each other, and what looks wrong."""
    for item in facts.left_out:
        console.print(f"warning: left out {item.name}: {item.why}")
    for crop in facts.crops:
        if crop.conflicts:
            against = f"{counted(crop.conflicts, 'voxel', 'contradict')} the class table"
            named = "; ".join(one.text for one in crop.contradictions[:NAMED_PAIRS])
            more = len(crop.contradictions) - NAMED_PAIRS
            console.print(
                f"warning: {crop.name}: {against}, annotation wins: {named}"
                + (f"; and {counted(more, 'more pair')} of classes" if more > 0 else "")
            )
    for finding in facts.findings:
        label = "warning" if finding.alarm else "note"
        console.print(f"{label}: {finding.where}: {finding.what}: {finding.remedy}")


def _known(count: ClassCount) -> int:
    return count.present + count.absent


def weight_tables(weights: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]) -> list[Table]:
    """Return the weight of every class by strategy, a table for each family of strategies."""
    families: dict[str, list[str]] = {}
    for strategy in weights:
        families.setdefault(strategy.rpartition("_")[2] if strategy.endswith(("_median", "_max")) else "", []).append(
            strategy
        )
    tables = []
    for family, strategies in families.items():
        table = Table(title=f"class weights{family and ' by '}{family}", title_justify="left", show_edge=False)
        table.add_column("class", overflow="fold")
        for name in ("share", *(s.removesuffix(f"_{family}").replace("_", " ") for s in strategies)):
            table.add_column(name, justify="right")
        for name, share in shares.items():
            table.add_row(name, f"{100 * share:.3g}%", *(f"{weights[strategy][name]:.3g}" for strategy in strategies))
        tables.append(table)
    return tables


def volume_table(facts: Fingerprint) -> Table:
    """Return the grey values of each EM volume: how well the mean is known, polarity, drift from section to section."""
    table = Table(title="EM volumes", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("volume", "voxel nm", "grey mean (95 %)", "sd", "stain", "drift along z"):
        is_name = name == "volume"
        table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for volume in facts.volumes:
        table.add_row(volume.name, short_size(volume.voxel_size_nm), *_grey_cells(volume))
    return table


def _grey_cells(volume: VolumeFacts) -> tuple[str, str, str, str]:
    grey = volume.intensity
    if grey is None:
        return MISSING, MISSING, MISSING, MISSING
    half = "" if grey.mean_interval is None else f" ± {(grey.mean_interval[1] - grey.mean_interval[0]) / 2:.2g}"
    drift = MISSING if grey.drift_z is None else f"{grey.drift_z:.2f} sd"
    return f"{grey.mean:.4g}{half}", f"{grey.sd:.3g}", grey.polarity or "unclear", drift


def patch_table(facts: Fingerprint) -> Table:
    """Return the share of a patch that lies in annotated boxes, by voxel size and edge."""
    flat = [share for share in facts.valid_shares if share.patch_size_zyx[0] == 1]
    edges = sorted({share.patch_size_zyx[2] for share in flat})
    title = "% of a 2D patch inside the annotated boxes: mean/median over the crops"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("voxel nm", no_wrap=True)
    for edge in edges:
        table.add_column(f"{edge}²", justify="right", no_wrap=True)
    rows: dict[str, dict[int, ValidShare]] = {}
    for share in flat:
        rows.setdefault(short_size(share.voxel_size_nm), {})[share.patch_size_zyx[2]] = share
    for size, by_edge in rows.items():
        table.add_row(size, *(f"{100 * by_edge[edge].mean:.0f}/{100 * by_edge[edge].median:.0f}" for edge in edges))
    return table
