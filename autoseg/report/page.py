"""RUN -> one self-contained HTML page: results first, then images, curves, decisions, data and machine.

Only artifacts are read; the page needs no network and no script, and is the same for the same artifacts.
"""

from __future__ import annotations

from pathlib import Path

from autoseg.data.codes import default_cache
from autoseg.report.artifacts import Artifacts, read_artifacts
from autoseg.report.decisions import fingerprint_section, plan_section
from autoseg.report.html import Html, document, el
from autoseg.report.results import crop_section, headline, panel_section, score_section
from autoseg.report.training import adaptation_section, command_section, curve_section, hardware_section
from autoseg.schema import write_atomically


def write_report(run: Path, out: Path, scores: Path | None, cache: Path | None = None) -> None:
    """Write the page of a run to `out`; without `scores` it shows RUN/scores.json, or says how to make it.

    DataError if `run` holds no plan.json. Images of crops whose data is gone are left out, with a remark.
    """
    page = render(read_artifacts(run, scores, cache or default_cache()))
    write_atomically(out, page.encode())


def render(artifacts: Artifacts) -> Html:
    """Return the whole page."""
    sections = {
        "Scores": score_section(artifacts),
        "Crops": crop_section(artifacts),
        "Images": panel_section(artifacts),
        "Training": curve_section(artifacts),
        "Plan": plan_section(artifacts),
        "Data": fingerprint_section(artifacts),
        "Adaptations": adaptation_section(artifacts),
        "Hardware": hardware_section(artifacts),
        "Reproduce": command_section(artifacts),
    }
    anchors = ("scores", "crops", "images", "training", "plan", "data", "adaptations", "hardware", "reproduce")
    there = [(title, anchor) for (title, made), anchor in zip(sections.items(), anchors, strict=True) if made]
    body = el(
        "body",
        el("header", headline(artifacts), el("nav", [el("a", title, href=f"#{anchor}") for title, anchor in there])),
        el("main", list(sections.values())),
        el("footer", "Written by autoseg report from the artifacts of the run."),
    )
    return document(f"{artifacts.plan.name} – autoseg report", body)
