"""Samples per second of `autoseg.train.batches` beside cellmap-data: the same crops, one core each, rounds in turn.

A sample is what a training step receives on the CPU. autoseg's is EM and label codes; what expanding the codes to
targets and masks costs stands beside it. cellmap-data's is EM and one float array for each class::

    python tests/benchmarks/loader.py crops20 --peer peer/bin/python --out loader.json

Rates are given by wall time and by CPU time (of all threads of the process): on a busy machine the second is steady.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_crops import NAMES
from rounds import ONE_THREAD

HERE = Path(__file__).parent
CASES = (
    {"name": "2D 192²", "patch_zyx": [1, 192, 192], "batch_size": 8, "rotates": False},
    {"name": "2D 256²", "patch_zyx": [1, 256, 256], "batch_size": 8, "rotates": False},
    {"name": "3D 32x128², flips", "patch_zyx": [32, 128, 128], "batch_size": 2, "rotates": False},
    {"name": "3D 32x128², any rotation", "patch_zyx": [32, 128, 128], "batch_size": 2, "rotates": True},
)
TINY = ({"name": "2D 16²", "patch_zyx": [1, 16, 16], "batch_size": 2, "rotates": True},)


class Side:
    """A child process that counts samples when asked."""

    def __init__(self, python: str, script: str, arguments: list[str]) -> None:
        command = [python, str(HERE / script), *arguments]
        environment = os.environ | ONE_THREAD
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = self._answer()
        self.rounds: list[dict[str, float]] = []

    def round(self, seconds: float) -> None:
        """Let it draw samples for that long."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self.rounds.append(self._answer())

    def close(self) -> None:
        """End it, and raise if it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        code = self._process.wait()
        self._process.stdout.close()
        if code != 0:
            raise RuntimeError(f"{self._process.args} failed")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} failed")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def result(self) -> dict[str, Any]:
        """Return the medians over rounds, and every round."""
        rates = {
            f"samples_per_{clock}": statistics.median(r["samples"] / r[f"{clock}_s"] for r in self.rounds)
            for clock in ("wall", "cpu")
        }
        return self.about | rates | {"rounds": self.rounds}


def compare(case: dict[str, Any], data: Path, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Return both sides' results for one case; the peer's is absent where no peer is given."""
    sides: dict[str, Side] = {}
    arguments = [str(data), json.dumps(case)]
    try:
        sides["autoseg"] = Side(sys.executable, "side_autoseg.py", [*arguments, str(cache)])
        if options.peer:
            sides["cellmap_data"] = Side(options.peer, "side_cellmap_data.py", arguments)
        for _ in range(options.repeats):
            for side in sides.values():
                side.round(options.seconds)
    finally:
        for side in sides.values():
            side.close()
    result: dict[str, Any] = {"case": case} | {name: side.result() for name, side in sides.items()}
    if options.peer:
        result["times_as_fast"] = {
            clock: result["autoseg"][f"samples_per_{clock}"] / result["cellmap_data"][f"samples_per_{clock}"]
            for clock in ("wall", "cpu")
        }
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table; rates are samples per second of CPU time, wall time in brackets."""
    lines = [
        "| case | autoseg, samples/s | expanding the codes, ms a sample | cellmap-data, samples/s | times as fast |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        ours, peer = result["autoseg"], result.get("cellmap_data")
        cells = [result["case"]["name"], _rate(ours), f"{1e3 * ours['expand_s']:.1f}"]
        cells.append(_rate(peer) if peer else "–")
        factor = result.get("times_as_fast")
        cells.append(f"{factor['cpu']:.1f} ({factor['wall']:.1f})" if factor else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(side: dict[str, Any]) -> str:
    return f"{side['samples_per_cpu']:.1f} ({side['samples_per_wall']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="made by make_crops.py")
    parser.add_argument("--peer", help="python of an environment that holds cellmap-data")
    parser.add_argument("--out", type=Path, help="JSON with every round")
    parser.add_argument("--cache", type=Path, help="keep the label codes here (default: built anew, then removed)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of one round")
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--cases", default="", metavar="i,j", help="run these only, from 0")
    parser.add_argument("--tiny", action="store_true", help="one small case, to see that it runs")
    options = parser.parse_args()
    cases = TINY if options.tiny else CASES
    chosen = [int(i) for i in options.cases.split(",") if i] or range(len(cases))
    common = {"classes": NAMES[: options.classes], "voxel_size_nm": [8, 8, 8]}
    results = []
    with tempfile.TemporaryDirectory(prefix="autoseg-bench-") as cache:
        for i in chosen:
            results.append(compare(cases[i] | common, options.data, options, options.cache or Path(cache)))
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": sys.version}
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
