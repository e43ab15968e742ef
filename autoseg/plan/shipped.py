"""Plans, hardware profiles and fingerprints that come with autoseg, from a checkout as from an installed package.

::

    plans/NAME.json                 shipped plans
    plans/hardware/NAME.json        machines, for `--hardware NAME`
    plans/fingerprints/NAME.json    data sets that the plans were made for
    plans/compare/NAME.json         comparisons, for `autoseg compare NAME`
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Literal

from autoseg.errors import PlanError
from autoseg.schema import Hardware, Plan, check_hardware, load, nearest

DISTRIBUTION = "autoseg-em"
Kind = Literal["plans", "hardware", "fingerprints", "compare"]


def shipped_files(kind: Kind) -> dict[str, Path]:
    """Return the shipped files of a kind by name."""
    root = Path(__file__).parents[2]
    folder = root / "plans" if kind == "plans" else root / "plans" / kind
    if (root / "pyproject.toml").is_file() and folder.is_dir():
        return {path.stem: path for path in sorted(folder.glob("*.json"))}
    return dict(sorted((path.stem, path) for path in _installed() if path.parent.name == kind))


def _installed() -> list[Path]:
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve() for file in files if "share/autoseg/" in file.as_posix()]


def own_or_shipped(path: Path, kind: Kind) -> Path:
    """Return the path if that file exists, else the shipped one that NAME or plans/NAME.json means, else the path."""
    wanted = path.parent in (Path(), Path("plans"), Path("plans") / kind) and path.suffix in ("", ".json")
    return path if path.exists() or not wanted else shipped_files(kind).get(path.stem, path)


def read_hardware(name: str) -> Hardware:
    """Return the machine at that path (its record, or a plan for it), or the shipped one of that name."""
    found = load(_hardware_file(name))
    found = found.hardware if isinstance(found, Plan) else found
    if not isinstance(found, Hardware):
        raise PlanError(f"--hardware {name}", "is neither a machine nor a plan for one", "pass another file")
    check_hardware(found, f"--hardware {name}")
    return found


def _hardware_file(name: str) -> Path:
    path = own_or_shipped(Path(name), "hardware")
    if path.exists():
        return path
    names = ["local", *shipped_files("hardware")]
    near = nearest(name, names)
    hint = f"did you mean {near}?" if near else f"pass a file, or one of {', '.join(names)}"
    raise PlanError(f"--hardware {name}", "is neither a file nor the name of a machine", hint)
