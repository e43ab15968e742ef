"""THE DOOR: parse, call, show the result; an expected error is one line on stderr and exit code 2.

Nothing heavy is imported before a command runs, so that `autoseg --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import shtab
from rich_argparse import RawDescriptionRichHelpFormatter

from autoseg import __version__
from autoseg.errors import AutosegError
from autoseg.limits import size_thread_pools

EXIT_OK, EXIT_USER, EXIT_STOPPED = 0, 2, 143
SIGNAL_ECHO_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return EXIT_OK
    try:
        with _sigterm_as_ctrl_c():
            size_thread_pools(getattr(options, "plan", None))
            from autoseg import commands

            code: int = getattr(commands, f"run_{options.command}")(options)
            return code
    except AutosegError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return EXIT_USER
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        what = error.strerror or str(error)
        print(f"{error.filename or 'autoseg'}: {what}: check the path, its permissions and free space", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("autoseg: interrupted: run the same command to go on", file=sys.stderr)
        return EXIT_STOPPED


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does, so that what cleans up after one does after the other.

    Some send it twice in a row, such as timeout(1): the second must not interrupt the cleaning up.
    """
    last_s = -math.inf

    def interrupt(_: int, __: FrameType | None) -> None:
        nonlocal last_s
        again, last_s = time.monotonic() - last_s < SIGNAL_ECHO_S, time.monotonic()
        if not again:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class _Once(argparse.Action):
    """Store a value; refuse an option that is given twice, of which argparse would take the last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Store the value under the option's name."""
        given = vars(namespace).setdefault("_given", set())
        if option is not None and self.dest in given:
            raise argparse.ArgumentError(self, f"is given twice, and takes one {self.dest.replace('_', ' ')} at a time")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors in the package's grammar, and near names for a mistyped command."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> NoReturn:
        """Print `where: what: what to do` and exit with 2."""
        if "invalid choice" in message and "'" in message:
            wrong = message.split("'")[1]
            near = difflib.get_close_matches(wrong, _COMMANDS, n=1)
            message = f"no command {wrong!r}" + (f", did you mean {near[0]!r}" if near else "")
        print(f"{self.prog}: {message}: see {self.prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_USER)


_COMMANDS = ("demo", "import", "fingerprint", "plan", "profile", "train", "predict", "evaluate", "compare", "report")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = _Parser(
        prog="autoseg",
        description="Looks at your labelled volume EM and at your machine, writes every training decision with its\n"
        "reason into one plan, and trains, predicts and scores exactly as that plan says.",
        epilog="start with:  autoseg demo",
        formatter_class=RawDescriptionRichHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"autoseg {__version__}")
    shtab.add_argument_to(parser, ["--print-completion"])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add in (_demo, _import, _fingerprint, _plan, _profile, _train, _predict, _evaluate, _compare, _report):
        add(commands)
    return parser


if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction["_Parser"]


def _command(commands: _Commands, name: str, text: str, example: str, *, data: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:  {example}",
        formatter_class=RawDescriptionRichHelpFormatter,
    )
    parser.add_argument("--quiet", action="store_true", help="print results only")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    if data:
        _cache(parser)
    return parser


def _cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, metavar="DIR", help="code cache (default: $XDG_CACHE_HOME/autoseg)")


def _device(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    parser.add_argument("--device", default=default, help="auto, cpu, cuda or cuda:1 (default: auto, the plan's)")


def _demo(commands: _Commands) -> None:
    parser = _command(
        commands, "demo", "make synthetic EM, then plan, train, predict, score and report", "autoseg demo"
    )
    parser.add_argument("dir", nargs="?", type=Path, default=Path("autoseg-demo"), metavar="DIR")
    parser.add_argument("--budget", metavar="TIME", help="training time (default: 100s)")


def _import(commands: _Commands) -> None:
    parser = _command(
        commands,
        "import",
        "bring TIFF, HDF5, NIfTI, npy or PNG volumes into the CellMap layout",
        "autoseg import data --name vnc --em raw.tif --labels labels.tif --values pm=1 mito=2 "
        "--voxel-size-nm 50 4.6 4.6 --grid 1 2 2",
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--name", required=True, help="name of the data set")
    parser.add_argument("--em", required=True, metavar="FILE[:key]", help="a file, or a glob in quotes")
    parser.add_argument("--labels", metavar="FILE[:key]", help="label volume; --values says what its values mean")
    parser.add_argument("--values", nargs="+", default=[], metavar="CLASS=V[,V]")
    parser.add_argument("--instances", nargs="+", default=[], metavar="CLASS=FILE[:key]", help="one id per object")
    parser.add_argument("--mask", metavar="FILE[:key]", help="0 where nothing is annotated")
    parser.add_argument("--ignore-value", type=int, metavar="V", help="label value that means: not annotated")
    parser.add_argument("--voxel-size-nm", required=True, nargs=3, metavar=("Z", "Y", "X"))
    parser.add_argument("--grid", nargs=3, type=int, default=[1, 1, 1], metavar=("NZ", "NY", "NX"), help="cells")
    parser.add_argument("--crops", metavar="N,N", help="cells to keep as crops, from 1 in raster order (default: all)")
    parser.add_argument(
        "--validate",
        default="",
        metavar="N,N",
        help="crops of this import, from 1, that validate; writes datasplit.csv",
    )


def _fingerprint(commands: _Commands) -> None:
    parser = _command(
        commands, "fingerprint", "measure what the data holds", "autoseg fingerprint data --out f.json", data=True
    )
    parser.add_argument("data", nargs="?", type=Path, default=Path("data"), metavar="DATA")
    parser.add_argument("--out", type=Path, metavar="F")
    parser.add_argument(
        "--weights", action="store_true", help="also show the weight of each class by every strategy (class_weighting)"
    )


def _plan(commands: _Commands) -> None:
    parser = _command(
        commands,
        "plan",
        "decide everything, with reasons",
        "autoseg plan data --budget 10m --out plans/vnc.json",
        data=True,
    )
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="default: ./data")
    parser.add_argument("--out", type=Path, metavar="PLAN", help="default: plans/<host name>.json")
    parser.add_argument("--fingerprint", type=Path, metavar="F", help="plan from a fingerprint instead of DATA")
    parser.add_argument("--hardware", default="local", help="local, a shipped machine such as rocinante, or a file")
    parser.add_argument(
        "--side-by-side", type=int, default=1, metavar="N", help="plan for one of N runs that share the machine"
    )
    parser.add_argument("--budget", metavar="TIME", help="training time such as 90s, 10m, 2h")
    parser.add_argument("--classes", metavar="a,b", help="train these classes, or sets such as cellmap-48, only")
    parser.add_argument(
        "--by-resolution", action="store_true", help="a plan for each group of classes that wants its own voxel size"
    )
    parser.add_argument("--scores", type=Path, metavar="F", help="scores.json of a run: change what it shows lacking")
    parser.add_argument("--folds", type=int, metavar="K", help="cross-validate: cut the data into K folds by volume")
    parser.add_argument("--fold", type=int, metavar="N", help="which fold validates, from 1 (default: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field; repeatable"
    )
    parser.add_argument("--diff", nargs=2, type=Path, metavar=("A", "B"), help="show what differs between two plans")


def _profile(commands: _Commands) -> None:
    parser = _command(
        commands,
        "profile",
        "measure a plan's batches, steps and memory on this machine; keeps nothing",
        "autoseg profile --plan plans/vnc.json --data data",
        data=True,
    )
    parser.add_argument("--plan", required=True, type=Path, metavar="PLAN")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DATA", help="default: ./data")
    _device(parser)


def _train(commands: _Commands) -> None:
    parser = _command(
        commands,
        "train",
        "train a plan; the same command resumes it",
        "autoseg train --plan plans/vnc.json --data data --run runs/vnc",
        data=True,
    )
    parser.add_argument("--plan", required=True, type=Path, metavar="PLAN")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DATA", help="default: ./data")
    parser.add_argument("--run", type=Path, metavar="RUN", help="default: runs/<plan name>")
    parser.add_argument(
        "--fast-dev-run", action="store_true", help="one step, validation, checkpoint and prediction: does it all work"
    )
    _device(parser)


def _predict(commands: _Commands) -> None:
    parser = _command(
        commands,
        "predict",
        "label EM with a trained run; the same command finishes what is missing",
        "autoseg predict --run runs/vnc --volume raw.tif --out labels.tif",
        data=True,
    )
    parser.add_argument("--run", required=True, type=Path, metavar="RUN")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DATA")
    source.add_argument("--volume", metavar="ZARR, TIFF or HDF5[:key]")
    parser.add_argument("--crops", default=None, metavar="validate, all or N,N", help="with --data (default: all)")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="OUT.zarr, .tif or .h5",
        help="zarr: a mask for each class; tif: one map of labels, where several classes are called a part shows "
        "before what it is part of, else the more probable; h5: both",
    )
    parser.add_argument(
        "--voxel-size-nm",
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="of a file, not of a zarr (default: what it declares, else that of the EM the run learnt from)",
    )
    parser.add_argument("--roi-nm", nargs=3, metavar=("Z0:Z1", "Y0:Y1", "X0:X1"))
    parser.add_argument("--probabilities", action="store_true", help="also write probabilities (255 is 1)")
    parser.add_argument("--checkpoint", default="best", metavar="last, best or PATH")
    _device(parser)


def _evaluate(commands: _Commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        "score a run on data it has not learnt from",
        "autoseg evaluate --run runs/vnc --data unseen --per-class",
        data=True,
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="default: the only run in ./runs")
    parser.add_argument("--data", type=Path, metavar="DATA", help="default: the DATA it was trained on")
    parser.add_argument("--pred", type=Path, metavar="OUT.zarr", help="labels from `autoseg predict --data`")
    parser.add_argument("--per-class", action="store_true", help="print the table of classes")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="show the change of each class")
    parser.add_argument("--out", type=Path, metavar="scores.json", help="default: RUN/scores.json")
    parser.add_argument("--checkpoint", metavar="last, best or PATH", help="default: best")
    _device(parser, default=None)


def _compare(commands: _Commands) -> None:
    parser = _command(
        commands,
        "compare",
        "run changes of a plan with several seeds, and rank them by more than noise; the same command goes on",
        "autoseg compare weighting --data data --out runs/weighting --quick",
        data=True,
    )
    parser.add_argument("spec", type=Path, metavar="SPEC", help="a JSON file, or a shipped one: losses, weighting")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DATA", help="default: ./data")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--judge", type=Path, metavar="DATA", help="score on these crops (default: what validates in DATA)"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 150 steps: does every change run and learn")
    parser.add_argument("--at-once", type=int, metavar="N", help="runs side by side (default: GPUs, or CPU threads)")


def _report(commands: _Commands) -> None:
    parser = _command(commands, "report", "write one self-contained HTML page", "autoseg report runs/vnc", data=True)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="report.html", help="default: RUN/report.html")
    parser.add_argument("--scores", type=Path, metavar="scores.json", help="default: RUN/scores.json if it is there")


if __name__ == "__main__":
    sys.exit(main())
