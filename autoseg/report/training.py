"""How the run went: curves, what it had to adapt, the machine, and the commands that repeat it."""

from __future__ import annotations

import shlex
from statistics import median

from autoseg.errors import counted
from autoseg.report.artifacts import Artifacts, Line, shown, value_of
from autoseg.report.figures import Line as Curve
from autoseg.report.figures import Point, line_chart, thin
from autoseg.report.html import Html, command, el, join, section, table
from autoseg.report.palette import css, look
from autoseg.report.terminal import number

GIB = 2**30
SMOOTH_SHARE = 40


def curve_section(artifacts: Artifacts) -> Html:
    """Return loss, validation Dice and learning rate over steps, as far as they were logged."""
    loss = _points(artifacts.steps, "loss")
    if not loss:
        return section("training", "Training", el("p", "No step was logged: there is no log.jsonl, or it is empty."))
    window = max(1, len(loss) // SMOOTH_SHARE)
    smooth = [
        (
            x,
            sum(y for _, y in loss[max(0, i - window) : i + window + 1])
            / len(loss[max(0, i - window) : i + window + 1]),
        )
        for i, (x, _) in enumerate(loss)
    ]
    losses = [Curve("loss", thin(loss), "var(--accent)", 1, 0.35), Curve("smoothed", thin(smooth), "var(--accent)", 2)]
    rate = _points(artifacts.steps, "learning_rate")
    charts = [
        _chart("Loss", line_chart(losses, "loss over steps"), "pale: each step; strong: running mean"),
        _dice_chart(artifacts),
        _chart("Learning rate", line_chart([Curve("rate", thin(rate), "var(--accent)", 2)], "learning rate"), ""),
    ]
    return section("training", "Training", el("div", charts, class_="charts"))


def _points(lines: list[Line], key: str) -> list[Point]:
    pairs = ((value_of(line, "step"), value_of(line, key)) for line in lines)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _chart(title: str, chart: Html, caption: Html | str) -> Html:
    return el("figure", el("h3", title), chart, el("figcaption", caption))


def _dice_chart(artifacts: Artifacts) -> Html:
    lines = []
    for k, name in enumerate(artifacts.plan.class_names):
        points = [
            (step, dice)
            for line in artifacts.validations
            if isinstance(line.get("dice"), dict)
            and (step := value_of(line, "step")) is not None
            and (dice := value_of(line["dice"], name)) is not None
        ]
        lines += [Curve(name, points, css(look(k).rgb))] if points else []
    mean = _points(artifacts.validations, "mean_dice")
    if not lines and not mean:
        return _chart("Validation Dice", el("p", "This run was not validated."), "")
    curves = [*lines, *([Curve("mean", mean, "var(--ink)", 2.6)] if mean else [])]
    best = max(mean, key=lambda point: point[1], default=None)
    says = [f"thick: mean, best {best[1]:.3f} at step {best[0]:,.0f}. "] if best else []
    return _chart(
        "Validation Dice by class", line_chart(curves, "validation Dice", top=1.0), join(says, _key(artifacts))
    )


def _key(artifacts: Artifacts) -> Html:
    names = artifacts.plan.class_names
    if len(names) > 12:
        return join("Thin: classes, one by one in the table of scores.")
    chips = [
        el("li", el("i", "", class_="chip", style=f"background:{css(look(k).rgb)}"), name)
        for k, name in enumerate(names)
    ]
    return el("ul", chips, class_="legend")


def adaptation_section(artifacts: Artifacts) -> Html:
    """Return in words what the run had to decide that the plan left open."""
    said = list(dict.fromkeys(_event(event) for event in artifacts.events))
    body = el("ul", [el("li", text) for text in said]) if said else el("p", "Nothing: it ran exactly as planned.")
    return section("adaptations", "What the run had to adapt", body)


def _event(event: Line) -> str:
    kind = event.get("event")
    if kind == "length":
        because = event.get("because")
        reason = f": {because}" if because else ""
        number = event.get("num_steps")
        steps = counted(number, "step") if isinstance(number, int) else f"{number} steps"
        return f"The time budget became {steps} before step 1{reason}."
    if kind == "data":
        return f"Trained on {shown(str(event.get('path', '?')))}."
    if kind == "split" and isinstance(event.get("split"), dict):
        sizes = [len(event["split"].get(side, ())) for side in ("train", "validate")]
        again = f"{counted(sizes[0], 'region', 'train')}, {sizes[1]} validate"
        return f"The plan's split did not fit this DATA; derived again: {again}."
    rest = ", ".join(
        f"{key.replace('_', ' ')} {shown(value) if isinstance(value, str) else value}"
        for key, value in event.items()
        if key != "event"
    )
    return f"{str(kind or 'event').replace('_', ' ').capitalize()}: {rest}."


def hardware_section(artifacts: Artifacts) -> Html:
    """Return the machine of the plan, and what was predicted for it beside what was measured."""
    plan, machine = artifacts.plan, artifacts.plan.hardware
    gpus = [f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GiB)" for gpu in machine.gpus]
    speed = ", ".join(f"{name} {value:,.0f} Gflop/s" for name, value in (machine.step_gflops or {}).items())
    step_s = [v for line in artifacts.steps if (v := value_of(line, "step_s")) is not None]
    wait_s = [v for line in artifacts.steps if (v := value_of(line, "wait_s")) is not None]
    total = sum(step_s) + sum(wait_s)
    predicted = None if plan.predicted_step_s is None else plan.predicted_step_s * 1000
    rows: list[tuple[str, str]] = [
        ("planned for", machine.name),
        ("trains on", f"{plan.device}, {plan.precision}"),
        ("GPU", ", ".join(gpus) or "none"),
        ("CPU", f"{machine.cpu_name}, {counted(machine.cpu_threads, 'thread')}"),
        ("memory", f"{machine.ram_bytes / GIB:.1f} GiB"),
        ("convolution speed", speed or "not measured"),
        ("memory of training, predicted", f"{plan.predicted_memory_bytes / GIB:.2f} GiB"),
        ("RAM, predicted", f"{plan.predicted_ram_bytes / GIB:.2f} GiB"),
        ("one step, predicted", f"{number(predicted, 1)} ms"),
        ("one step, measured (median)", f"{median(step_s) * 1000:.1f} ms" if step_s else "not logged"),
        ("waiting for data", f"{sum(wait_s) / total:.1%} of the time of training" if total else "not logged"),
    ]
    return section("hardware", "Hardware", table(("", ""), rows, "wrap"))


def command_section(artifacts: Artifacts) -> Html:
    """Return the commands that repeat the run, its scores and this page."""
    run, scores = shown(artifacts.run), artifacts.scores
    data = shown(artifacts.trained_on) if artifacts.trained_on else "DATA"
    lines = [
        ("autoseg", "train", "--plan", f"{run}/plan.json", "--data", data, "--run", f"{run}-again"),
        ("autoseg", "evaluate", "--run", run, "--data", shown(scores.data) if scores and scores.data else "DATA",
         "--per-class"),
        ("autoseg", "report", run),
    ]  # fmt: skip
    text = "\n".join(" ".join(part if part.startswith("…/") else shlex.quote(part) for part in line) for line in lines)
    hidden = "…/" in text
    remark = el("p", "Folders with … were noted as absolute paths; write your own instead.", class_="muted")
    return section("reproduce", "Reproduce it", command(text), remark if hidden else None)
