"""What a run left on disk, read once for the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from autoseg.errors import DataError
from autoseg.metrics.overlap import Counts, mean, ratios
from autoseg.schema import Fingerprint, Plan, Scores, load_as, read_json_lines

Line = dict[str, Any]


class Artifacts(NamedTuple):
    """The files of one run; what is not there is None or empty. `written` is when the newest was written."""

    run: Path
    cache: Path
    plan: Plan
    facts: Fingerprint | None
    scores: Scores | None
    steps: list[Line]
    validations: list[Line]
    events: list[Line]
    written: datetime

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the classes of the plan, then any that only the scores have; the place is the class's number."""
        scored = self.scores.per_class if self.scores else {}
        return tuple(dict.fromkeys((*self.plan.class_names, *scored)))

    @property
    def trained_on(self) -> str | None:
        """Return the DATA of the run as it was noted, None if it never was."""
        paths = [event["path"] for event in self.events if event.get("event") == "data"]
        return str(paths[-1]) if paths and isinstance(paths[-1], str) else None


def read_artifacts(run: Path, scores: Path | None, cache: Path) -> Artifacts:
    """Read a run; DataError if it has no plan. Without `scores` it is the run's own scores.json, if there."""
    plan_path = run / "plan.json"
    if not plan_path.is_file():
        raise DataError(run, "holds no plan.json, so it is not a run", "pass the folder given to autoseg train --run")
    fingerprint = run / "fingerprint.json"
    if scores is None and (run / "scores.json").is_file():
        scores = run / "scores.json"
    lines = [line for line in read_json_lines(run / "log.jsonl") if value_of(line, "step") is not None]
    files = [plan_path, fingerprint, run / "log.jsonl", *([scores] if scores else [])]
    return Artifacts(
        run=run,
        cache=cache,
        plan=load_as(plan_path, Plan),
        facts=load_as(fingerprint, Fingerprint) if fingerprint.is_file() else None,
        scores=load_as(scores, Scores) if scores else None,
        steps=lines,
        validations=[line for line in lines if "mean_dice" in line],
        events=read_json_lines(run / "adaptations.jsonl"),
        written=datetime.fromtimestamp(max(p.stat().st_mtime for p in files if p.is_file()), UTC),
    )


def value_of(line: Line, key: str) -> float | None:
    """Return a finite number of a log line, None if there is none."""
    value = line.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable and value is not None else None


def shown(path: str | Path) -> str:
    """Return a path as it may be shown to others: of an absolute one only the last part."""
    text = str(path)
    absolute = Path(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return f"…/{PureWindowsPath(text).name or 'data'}" if absolute else text


def discreet(text: str) -> str:
    """Return a sentence with the leading folders of absolute paths left out; three parts of each stay."""
    return re.sub(r"(?<![\w.…])(?:[A-Za-z]:)?(?:[/\\][^\s/\\:,;]+)+", _tail, text)


def _tail(match: re.Match[str]) -> str:
    return "…/" + "/".join(PureWindowsPath(match[0]).parts[-3:]).lstrip("\\/")


def find(stored: str, run: Path) -> Path | None:
    """Return where a stored path is: as it stands, or below a folder that holds the run; None if nowhere."""
    bases = (Path(), *list(run.resolve().parents)[:3])
    return next((base / stored for base in bases if (base / stored).exists()), None)


class CropScore(NamedTuple):
    """One scored crop: Dice by class (None where there is nothing to measure), their mean, and true voxels."""

    name: str
    dice: dict[str, float | None]
    mean_dice: float | None
    true_voxels: int


def crop_scores(scores: Scores) -> list[CropScore]:
    """Return the scored crops from best to worst; those without a mean come last, ties by name."""
    counts: dict[str, dict[str, Counts]] = {}
    for row in scores.rows:
        counts.setdefault(row.crop, {})[row.class_] = Counts(row.tp, row.fp, row.fn)
    found = []
    for name, by_class in counts.items():
        dice = {label: ratios(count).dice for label, count in by_class.items()}
        true_voxels = sum(count.tp + count.fn for count in by_class.values())
        found.append(CropScore(name, dice, mean(list(dice.values())), true_voxels))
    return sorted(found, key=lambda crop: (crop.mean_dice is None, -(crop.mean_dice or 0.0), crop.name))


def same_folder(a: str | None, b: str | None, run: Path) -> bool:
    """Tell whether two stored paths are one folder."""
    if a is None or b is None:
        return False
    places = [find(text, run) for text in (a, b)]
    return a == b or (None not in places and len({place.resolve() for place in _there(places)}) == 1)


def _there(places: list[Path | None]) -> Iterator[Path]:
    return (place for place in places if place is not None)
