"""What was decided and from what: the plan with its reasons, and the fingerprint of the data."""

from __future__ import annotations

import math

from autoseg.errors import counted
from autoseg.report.artifacts import Artifacts
from autoseg.report.figures import Matrix, matrix
from autoseg.report.html import Html, el, folded, join, section, table
from autoseg.report.palette import RGB, css
from autoseg.report.terminal import MISSING, field_value, short_value
from autoseg.schema import CropFacts, Fingerprint, Plan, Reason, VolumeFacts

FOLDED_SOURCES = ("augmentation.preset", "kind of loss", "paper default")
USED, EMPTY, PARTLY = (0, 158, 115), (150, 160, 170), (86, 180, 233)
LEAST_SHARE = 1e-6


def plan_section(artifacts: Artifacts) -> Html:
    """Return every decision with value, reason and source; parameters of a preset are folded."""
    plan = artifacts.plan
    key = [reason for reason in plan.reasons if reason.source not in FOLDED_SOURCES]
    rest = [reason for reason in plan.reasons if reason.source in FOLDED_SOURCES]
    folds = []
    for group in dict.fromkeys(reason.field.split(".")[0] for reason in rest):
        members = [reason for reason in rest if reason.field.split(".")[0] == group]
        folds.append(folded(f"{group}: {len(members)} parameters", _reasons(plan, members)))
    by_user = sum(reason.source == "user" for reason in key)
    intro = f"{len(key)} decisions, each with its reason; {by_user or 'none'} set by the user."
    return section("plan", "The plan", el("p", intro), _reasons(plan, key), *folds)


def _reasons(plan: Plan, reasons: list[Reason]) -> Html:
    rows = [(reason.field, _value(plan, reason.field), reason.because, _source(reason)) for reason in reasons]
    return table(("decision", "value", "because", "source"), rows, "plan")


def _source(reason: Reason) -> Html:
    return el("span", reason.source, class_="user" if reason.source == "user" else "muted")


def _value(plan: Plan, field: str) -> str:
    """Return the value in few characters; a plan edited by hand may give reasons for fields that are not there."""
    try:
        value = field_value(plan, field)
    except AttributeError:
        return MISSING
    nested = isinstance(value, tuple) and value and all(isinstance(item, tuple) for item in value)
    return "  ".join("×".join(str(v) for v in item) for item in value) if nested else short_value(value)


def fingerprint_section(artifacts: Artifacts) -> Html:
    """Return class frequencies, the annotation of each crop, and the volumes with voxel size and grey values."""
    facts = artifacts.facts
    if facts is None:
        return section("data", "The data", el("p", "This run holds no fingerprint.json."))
    left_out = [folded(f"left out: {counted(len(facts.left_out), 'crop')}", _left_out(facts))] if facts.left_out else []
    crops = counted(len(facts.crops), "crop")
    return section(
        "data",
        "The data",
        el("p", f"{crops} in {counted(len(facts.volumes), 'volume')}, {counted(len(facts.classes), 'class')}."),
        *left_out,
        el("h3", "How much of the annotated volume each class fills"),
        _shares(artifacts, facts),
        el("h3", "What is annotated where"),
        _annotation(artifacts, facts),
        el("h3", "Volumes"),
        _volumes(facts.volumes),
    )


def _left_out(facts: Fingerprint) -> Html:
    return table(("crop", "why"), [(item.name, item.why) for item in facts.left_out], "wrap")


def _shares(artifacts: Artifacts, facts: Fingerprint) -> Html:
    """Return a bar per class on a logarithmic axis that ends at 100 %."""
    planned = set(artifacts.plan.class_names)
    shares: dict[str, tuple[float, int]] = {}
    for entry in facts.classes:
        counts = [crop.counts[entry.name] for crop in facts.crops if entry.name in crop.counts]
        present, known = sum(c.present for c in counts), sum(c.present + c.absent for c in counts)
        shares[entry.name] = (present / known if known else 0.0, present)
    least = min((share for share, _ in shares.values() if share > 0), default=0.01)
    decades = max(2, math.ceil(-math.log10(max(least, LEAST_SHARE)) + 1e-9))
    cells: list[Html] = []
    for name, (share, present) in sorted(shares.items(), key=lambda item: (-item[1][0], item[0])):
        width = 100 * max(0.0, 1 + math.log10(max(share, LEAST_SHARE)) / decades) if share else 0.0
        left = None if name in planned else el("span", " (not in the plan)", class_="muted")
        text = f"{share:.2%}, {present:,} voxels" if share >= 1e-4 else f"{100 * share:.2g}%, {present:,} voxels"
        track = el("span", el("i", "", style=f"width:{width:.1f}%"), class_="track")
        cells += [el("span", name, left), track, el("span", text if present else "never present")]
    every = 1 if decades <= 2 else 2
    marks = [f"{100 * 10.0**-k:.6g}%" if k % every == 0 else "" for k in range(decades, -1, -1)]
    scale = el("span", [el("span", mark) for mark in marks], class_="scale")
    return el("div", cells, el("span", ""), scale, el("span", ""), class_="shares", style=f"--decades:{decades}")


def _annotation(artifacts: Artifacts, facts: Fingerprint) -> Html:
    names = [entry.name for entry in facts.classes]
    colours = [[_state(crop, name) for name in names] for crop in facts.crops]
    label = "Annotation of each crop and class"
    picture = matrix(
        Matrix([c.name for c in facts.crops], [c.volume for c in facts.crops], names, colours, None, label)
    )
    meanings = (
        (USED, "present, known everywhere"),
        (PARTLY, "present, unknown in parts"),
        (EMPTY, "known to be absent"),
    )
    chips = [el("li", el("i", "", class_="chip", style=f"background:{css(rgb)}"), text) for rgb, text in meanings]
    return join(picture, el("ul", chips, el("li", "empty: unknown"), class_="legend"))


def _state(crop: CropFacts, name: str) -> RGB | None:
    count = crop.counts.get(name)
    if count is None or not count.present + count.absent:
        return None
    if not count.present:
        return EMPTY
    return PARTLY if count.unknown else USED


def _volumes(volumes: tuple[VolumeFacts, ...]) -> Html:
    head = ("volume", "voxel size nm (z, y, x)", "voxels (z, y, x)", "dtype", "grey mean ± sd", "0.5 % · 50 % · 99.5 %",
            "stored")  # fmt: skip
    rows = []
    for volume in volumes:
        grey = volume.intensity
        size = " × ".join(f"{v:g}" for v in volume.voxel_size_nm)
        shape = " × ".join(f"{n:,}" for n in volume.shape_zyx)
        levels = f"{grey.p0_5:.4g} · {grey.p50:.4g} · {grey.p99_5:.4g}" if grey else "–"
        mean = f"{grey.mean:.4g} ± {grey.sd:.3g}" if grey else "–"
        rows.append((volume.name, size, shape, volume.dtype, mean, levels, f"{volume.stored_fraction:.0%}"))
    return table(head, rows)
