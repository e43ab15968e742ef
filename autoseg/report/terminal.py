"""What the terminal shows: tables and progress on stderr, plain lines where it is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from autoseg.errors import counted
from autoseg.metrics.overlap import NOTHING, Counts, mean, ratios
from autoseg.metrics.verdicts import band, class_verdict, spread
from autoseg.schema import (
    Observer,
    Outcome,
    Plan,
    Scores,
    StepResult,
    TunedDecode,
    ValidationScore,
)

MISSING = "–"
LINES_EVERY_S = 10.0
RISING = 0.005
FEWEST_LOSSES = 50
LONGEST_WORD = 17
LONGER = "to train longer, plan again with a longer --budget, and train that into another --run"


def make_console(*, quiet: bool = False, stdout: bool = False) -> Console:
    """Return the console for people, on stderr or stdout; brackets and colons are themselves."""
    return Console(stderr=not stdout, quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (what, done, total) that shows a bar on a terminal, a line every few seconds elsewhere."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    disable = not console.is_terminal or console.quiet
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        tasks: dict[str, TaskID] = {}
        said = time.monotonic()

        def show(what: str, done: int, total: int) -> None:
            nonlocal said
            if disable and time.monotonic() - said > LINES_EVERY_S:
                console.print(f"{what}: {done} of {total}")
                said = time.monotonic()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def number(value: float | None, digits: int = 3) -> str:
    """Return the number, or a dash where there is none."""
    return MISSING if value is None else f"{value:.{digits}f}"


def magnitude(count: int) -> str:
    """Return a number of voxels in three digits: 745, 74.5 k, 7.45 G."""
    scaled, units = float(count), ["", " k", " M", " G", " T"]
    while scaled >= 999.5 and len(units) > 1:
        scaled, units = scaled / 1000, units[1:]
    return f"{count}" if len(units) == 5 else f"{scaled:.3g}{units[0]}"


def plan_table(plan: Plan) -> Table:
    """Return every decision with its value, reason and source; parameters of a preset are folded into it."""
    table = Table(title=f"plan {plan.name}", title_justify="left", expand=True, show_lines=False)
    rows = []
    for reason in plan.reasons:
        if reason.source in ("augmentation.preset", "kind of loss", "paper default"):
            continue
        because = Text.assemble(reason.because, (f" ({reason.source})", "dim"))
        rows.append((reason.field, field_text(reason.field, field_value(plan, reason.field)), because))
    longest = max((len(word) for _, value, _ in rows for word in value.split()), default=0)
    table.add_column("decision", no_wrap=True)
    table.add_column("value", overflow="fold", ratio=2, width=min(longest, LONGEST_WORD))  # at least
    table.add_column("because (source)", overflow="fold", ratio=5)
    for row in rows:
        table.add_row(*row)
    return table


def plan_summary(plan: Plan) -> str:
    """Return in one sentence what will be trained, on what, and how long."""
    network, patches = plan.network, plan.patches_per_step
    levels = counted(len(network.features), "level")
    kind = f"{field_value(plan, 'dimensions').upper()} {network.kind} of {levels}"
    size = " x ".join(f"{v:g}" for v in plan.voxel_size_nm)
    split = f"{counted(len(plan.split.train), 'region', 'train')}, {len(plan.split.validate)} validate"
    patch = "x".join(str(n) for n in plan.patch_size_zyx)
    steps = plan.optimizer.num_steps
    if steps is not None:
        course = counted(steps, "step")
    else:
        course = f"{plan.budget_s:g} s" + (
            f" (about {counted(round(plan.budget_s / plan.predicted_step_s), 'step')})"
            if plan.budget_s and plan.predicted_step_s
            else ""
        )
    return (
        f"{counted(len(plan.classes), 'class')} at {size} nm; {kind} on {counted(patches, 'patch')} of {patch} a step, "
        f"{plan.precision} on the {'CPU' if plan.device == 'cpu' else 'GPU'}; {course}; {split}; "
        f"{plan.predicted_ram_bytes / 2**30:.1f} GiB of RAM"
    )


def field_value(plan: Plan, field: str) -> Any:
    """Return the value of a dotted field; "dimensions" is read off the patch, "resolution" off the split."""
    if field == "resolution":
        return plan.split.voxel_edge_nm
    if field == "dimensions":
        flat = plan.patch_size_zyx[0] == 1
        return "3d" if not flat else "2.5d" if plan.input_slices > 1 else "2d"
    value: Any = plan
    for part in field.split("."):
        value = getattr(value, part)
    return value


def field_text(field: str, value: Any) -> str:
    """Return the value of that field in few characters; what has an axis each is one word, as 1x2x2."""
    if field == "resolution" and isinstance(value, tuple):
        return f"{value[0]:.3g} to {value[1]:.3g} nm"
    if isinstance(value, tuple) and field.endswith(("_zyx", "voxel_size_nm")):
        parts = [item if isinstance(item, tuple) else (item,) for item in value]
        return ("x" if len(parts[0]) == 1 else " ").join("x".join(f"{n:.4g}" for n in part) for part in parts)
    return short_value(value)


def short_size(size_nm: Sequence[float]) -> str:
    """Return a voxel size as one word, as 50x4.6x4.6."""
    return "x".join(f"{v:.4g}" for v in size_nm)


def short_value(value: Any) -> str:
    """Return a value in few characters."""
    if isinstance(value, tuple):
        names = [getattr(item, "name", None) or getattr(item, "crop", None) for item in value]
        count = f"{len(value)}: " if any(names) else ""
        texts = (name or short_value(item) for name, item in zip(names, value, strict=True))
        return count + " ".join(texts) if value else "none"
    if isinstance(value, dict):
        different = set(value.values())
        if len(different) == 1:
            return f"{different.pop()} for all {len(value)}"
        return " ".join(f"{key}={item:g}" for key, item in value.items())
    if hasattr(value, "train"):
        return f"{len(value.train)} train, {len(value.validate)} validate"
    if isinstance(value, float):
        return f"{value:g}" if value == int(value) and value < 1e7 else f"{value:.4g}"
    is_bytes = isinstance(value, int) and value >= 2**20
    return f"{value / 2**30:.2f} GiB" if is_bytes else MISSING if value is None else str(value)


def score_table(scores: Scores, beside: Mapping[str, float | None] | None = None, title: str = "scores") -> Table:
    """Return the classes, best Dice first, with what their counts say in words; `beside` adds a column to compare with.

    Where several crops were scored Dice has its sd over them. The last row has the mean over classes, and precision and
    recall of all voxels together.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("class", overflow="fold")
    for name in ("Dice", "IoU", "precision", "recall", "true voxels", *(("grey value",) if beside else ())):
        table.add_column(name, justify="right")
    by_class = {name: [Counts(r.tp, r.fp, r.fn) for r in scores.rows if r.class_ == name] for name in scores.per_class}
    said = {name: in_words(sum(crops, NOTHING), scores.per_class[name].dice) for name, crops in by_class.items()}
    if any(said.values()):
        table.add_column("", no_wrap=True)
    for name in sorted(scores.per_class, key=lambda name: -(scores.per_class[name].dice or 0.0)):
        score, crops = scores.per_class[name], by_class[name]
        total = sum(crops, NOTHING)
        dice = number(score.dice) + (f" ± {sd:.3f}" if (sd := spread(crops)) is not None else "")
        cells = [dice, number(score.iou), number(score.precision), number(score.recall), f"{total.tp + total.fn:,}"]
        table.add_row(
            name,
            *cells,
            *((number(beside.get(name)),) if beside else ()),
            *((said[name],) if any(said.values()) else ()),
        )
    everything = ratios(sum((counts for crops in by_class.values() for counts in crops), NOTHING))
    table.add_section()
    extra = (number(mean(list(beside.values()))),) if beside else ()
    overall = (number(everything.precision), number(everything.recall))
    table.add_row("mean", number(scores.mean_dice), number(scores.mean_iou), *overall, "", *extra, style="bold")
    verdicts = {class_verdict(sum(crops, NOTHING)) for crops in by_class.values()}
    remedies = [f"{one.words}: {one.remedy}" for one in sorted(verdicts) if one.remedy]
    table.caption = "\n".join(["last row: mean over classes; precision and recall of all voxels", *remedies])
    table.caption_justify = "left"
    return table


def in_words(counts: Counts, dice: float | None) -> str:
    """Return the band and the verdict of a class."""
    said = class_verdict(counts).words
    return " ".join(word for word in (band(dice) if said != "absent" else "", said) if word)


def change_table(new: Scores, old: Scores, title: str) -> Table:
    """Return Dice before and after by class."""
    table = Table(title=title, title_justify="left")
    for name in ("class", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "class" else "right")
    rows = [(name, old.per_class[name].dice, s.dice) for name, s in new.per_class.items() if name in old.per_class]
    for name, before, after in [*rows, ("mean", old.mean_dice, new.mean_dice)]:
        change = MISSING if before is None or after is None else f"{after - before:+.3f}"
        table.add_row(name, number(before), number(after), change)
    return table


class TrainingView(Observer):
    """Progress of a training run: a live line on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or console.quiet,
        )
        self._began = self._said = time.monotonic()
        self._from, self._total, self._dice = 0, 0, ""

    def started(self, plan: Plan, num_steps: int, from_step: int) -> None:
        """Print the loss and the weights, and start the bar."""
        loss = plan.loss
        names = [name.removesuffix("_weight") for name in loss.__struct_fields__ if name.endswith("_weight")]
        terms = [f"{name} {weight:g}" for name in names if (weight := getattr(loss, f"{name}_weight"))]
        softmax = " (softmax)" if loss.activation == "softmax" else ""
        self.console.print(
            f"loss {loss.kind}{softmax}: {', '.join(terms)}; smooth {loss.smooth:g}; class weights "
            f"{short_value(plan.class_weights)}"
        )
        resumed = f", going on from step {from_step}" if from_step else ""
        patches = counted(plan.patches_per_step, "patch")
        together = f" in {plan.num_processes} processes" if plan.num_processes > 1 else ""
        self.console.print(f"{counted(num_steps, 'step')} of {patches}{together}{resumed}")
        self._from, self._total = from_step, num_steps
        self._began = self._said = time.monotonic()
        self._bar.start()
        self._task = self._bar.add_task("loss –", total=num_steps, completed=from_step, rate="")

    def warned(self, text: str) -> None:
        """Print the warning."""
        self.console.print(f"warning: {text}")

    def stepped(self, step: int, result: StepResult) -> None:
        """Move the bar."""
        now = time.monotonic()
        rate = (step - self._from) / max(now - self._began, 1e-6)
        text = f"loss {result.loss:.3f}{self._dice}"
        self._bar.update(self._task, completed=step, description=text, rate=f"{rate:.1f} it/s")
        if self._bar.disable and (now - self._said > LINES_EVERY_S or step == self._total):
            left = (self._total - step) / rate
            self.console.print(f"step {step}/{self._total}  {text}  {rate:.1f} it/s  {left:.0f} s left")
            self._said = now

    def validated(self, step: int, score: ValidationScore) -> None:
        """Print Dice by class."""
        self._dice = f"  Dice {number(score.mean_dice)}"
        classes = "  ".join(f"{name} {number(value)}" for name, value in score.dice.items())
        self.console.print(f"step {step}: validation Dice {number(score.mean_dice)}  ({classes})")

    def close(self) -> None:
        """Take the bar down."""
        self._bar.stop()


def threshold_line(tuned: TunedDecode, planned: Mapping[str, float]) -> str:
    """Return which thresholds the validation regions moved, with Dice before and after."""
    moved = [
        f"{name} {value:.2f} (Dice {number(tuned.dice_before[name])} → {number(tuned.dice_after[name])})"
        for name, value in tuned.thresholds.items()
        if value != planned[name]
    ]
    return "thresholds from the validation regions: " + (", ".join(moved) if moved else "all as planned")


def verdict(outcome: Outcome, losses: Sequence[float], dice: Sequence[float]) -> str:
    """Return one sentence on how the run ended, and whether validation Dice or loss still moved at the end."""
    if outcome.stopped_by:
        return (
            f"stopped by {outcome.stopped_by} at step {outcome.step} of {outcome.num_steps}; the same command goes on"
        )
    text = f"done: {counted(outcome.num_steps, 'step')}, best validation Dice {number(outcome.best_mean_dice)}"
    if len(losses) < FEWEST_LOSSES:
        return f"{text}; too few steps to judge the curves"
    tenth = len(losses) // 10
    earlier, later = (sum(part) / tenth for part in (losses[-2 * tenth : -tenth], losses[-tenth:]))
    if len(dice) > 1 and dice[-1] > max(dice[:-1]) + RISING:
        return f"{text}; the validation Dice was still rising: {LONGER}"
    if later < 0.98 * earlier:
        return f"{text}; the loss was still falling: {LONGER}"
    if later > 1.02 * earlier:
        return f"{text}; the loss rose at the end, from {earlier:.3g} to {later:.3g}"
    return f"{text}; the loss had levelled off"
