"""How good the run is: the headline, classes, crops, and what the worst and best crops look like."""

from __future__ import annotations

import msgspec

from autoseg.data.dataset import Dataset, open_dataset
from autoseg.errors import AutosegError, DataError, counted
from autoseg.report.artifacts import Artifacts, CropScore, crop_scores, discreet, find, same_folder, shown, value_of
from autoseg.report.figures import LEGIBLE_ROWS, Matrix, bar, matrix, sparkline
from autoseg.report.html import Html, command, el, folded, join, note, section, table
from autoseg.report.palette import dice_colour, look
from autoseg.report.panels import error_legend, panel_row, partly_unknown, visible
from autoseg.report.sections import Section, read_section
from autoseg.report.terminal import MISSING, number
from autoseg.schema import ClassScore, Region, Scores

GOOD, FAIR, LEAN = 0.8, 0.5, 0.2
FIRST_CROPS = 12
TEXT_CELLS = 400


def headline(artifacts: Artifacts) -> Html:
    """Return what a reader wants first: how good, on what, by which network, when."""
    scores, plan = artifacts.scores, artifacts.plan
    last = max((int(value_of(line, "step") or 0) for line in artifacts.steps), default=0)
    tiles = []
    if scores is not None:
        num_crops = len({row.crop for row in scores.rows})
        tiles.append(_tile(number(scores.mean_dice), "mean Dice", "tile main"))
        tiles.append(_tile(number(scores.mean_iou), "mean IoU"))
        tiles.append(_tile(f"{num_crops:,}", f"scored crop{'' if num_crops == 1 else 's'}"))
    tiles.append(_tile(f"{len(plan.classes)}", "classes" if len(plan.classes) > 1 else "class"))
    tiles.append(_tile(f"{last:,}", "training steps done"))
    size = "×".join(f"{v:g}" for v in plan.voxel_size_nm)
    tiles.append(_tile(size, "nm a voxel (z, y, x)"))
    when = artifacts.written.strftime("%Y-%m-%d %H:%M UTC")
    parts = [f"Run {shown(artifacts.run)}", f"artifacts of {when}"]
    if scores is not None and scores.checkpoint:
        parts.append(f"checkpoint {scores.checkpoint}")
    return join(
        el("h1", plan.name),
        el("p", " · ".join(parts), class_="muted"),
        el("div", tiles, class_="tiles"),
        _in_words(artifacts),
    )


def _tile(value: str, what: str, class_: str = "tile") -> Html:
    return el("div", el("b", value), el("span", what), class_=class_)


def _in_words(artifacts: Artifacts) -> Html:
    scores = artifacts.scores
    if scores is None:
        return note("This run has not been scored yet.")
    on = f"Scored on {shown(scores.data)}. " if scores.data else ""
    known = [(score.dice, name) for name, score in scores.per_class.items() if score.dice is not None]
    lost = [name for name, score in scores.per_class.items() if verdict(score)[0] == "never found"]
    words = [on]
    if known:
        words.append(f"Best class: {max(known)[1]} (Dice {max(known)[0]:.3f}). ")
    if lost:
        words.append(f"Never found: {_listed(lost)}. ")
    sentence = el("p", words)
    if not same_folder(scores.data, artifacts.trained_on, artifacts.run):
        return sentence
    caution = (
        "This is the DATA the run was trained on: its validation regions were scored, and they also chose the "
        "checkpoint. To compare runs, score a second DATA that this run never saw."
    )
    return join(sentence, note(caution))


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def verdict(score: ClassScore) -> tuple[str, str]:
    """Return (a word on the class, its tone); Dice None means that the class is neither true nor predicted."""
    if score.dice is None:
        return MISSING, "muted"
    if score.recall is None:
        return "predicted, but not there", "poor"
    if score.dice == 0:
        return "never found", "poor"
    if score.dice >= GOOD:
        return "good", "good"
    tone = "fair" if score.dice >= FAIR else "poor"
    lean = score.recall - (score.precision or 0.0)
    if abs(lean) > LEAN:
        return ("over-predicting" if lean > 0 else "under-predicting"), tone
    return ("fair" if tone == "fair" else "poor"), tone


def class_name(artifacts: Artifacts, name: str) -> Html:
    """Return the class with its colour and number."""
    index = artifacts.classes.index(name)
    chip = el("i", "", class_="chip", style=f"background:{look(index).css}")
    return join(chip, el("span", index + 1, class_="num-tag"), name)


def score_section(artifacts: Artifacts) -> Html:
    """Return Dice, IoU, precision, recall and true voxels by class, and by crop."""
    scores = artifacts.scores
    if scores is None:
        text = f"autoseg evaluate --run {shown(artifacts.run)} --data DATA --per-class"
        how = el("p", "Score it on data that it has not seen, then write this page again:")
        return section("scores", "Scores", how, command(f"{text}\nautoseg report {shown(artifacts.run)}"))
    order = sorted(scores.per_class, key=lambda name: (scores.per_class[name].dice is None, -_dice(scores, name)))
    head = ("class", "Dice", "verdict", "precision", "recall", "IoU", "true voxels", "validation over steps")
    rows = [_class_row(artifacts, scores, name) for name in order]
    explained = (
        f"Over all scored voxels whose truth is known, pooled over crops ({scores.metric}). Over-predicting: recall is "
        f"more than {LEAN:g} above precision; under-predicting: the reverse; good: Dice of {GOOD:g} or more. "
        "A dash: nothing to measure."
    )
    return section("scores", "Scores by class", table(head, rows, "right classes"), el("p", explained, class_="muted"))


def _dice(scores: Scores, name: str) -> float:
    return scores.per_class[name].dice or 0.0


def _class_row(artifacts: Artifacts, scores: Scores, name: str) -> list[Html | str | None]:
    score = scores.per_class[name]
    word, tone = verdict(score)
    truth = sum(row.tp + row.fn for row in scores.rows if row.class_ == name)
    curve = [value_of(line["dice"], name) for line in artifacts.validations if isinstance(line.get("dice"), dict)]
    ratios = (number(score.precision), number(score.recall), number(score.iou), f"{truth:,}")
    return [class_name(artifacts, name), bar(score.dice), el("span", word, class_=tone), *ratios, sparkline(curve)]


def crop_section(artifacts: Artifacts) -> Html | None:
    """Return mean Dice of each crop, the worst first, and Dice of each crop and class."""
    if artifacts.scores is None or not artifacts.scores.rows:
        return None
    crops = list(reversed(crop_scores(artifacts.scores)))
    rows = [_crop_row(crop) for crop in crops]
    head = ("crop", "mean Dice", "weakest class", "strongest class", "true voxels")
    children: list[Html] = [table(head, rows[:FIRST_CROPS], "right crops")]
    if len(rows) > FIRST_CROPS:
        children.append(
            folded(counted(len(rows) - FIRST_CROPS, "more crop"), table(head, rows[FIRST_CROPS:], "right crops"))
        )
    intro = el("p", "Worst first. A crop's mean is over the classes that are there or predicted.", class_="muted")
    return section("crops", "Scores by crop", intro, *children, _dice_matrix(artifacts, crops))


def _crop_row(crop: CropScore) -> list[Html | str | None]:
    known = sorted((dice, name) for name, dice in crop.dice.items() if dice is not None)
    ends = [f"{known[i][1]} {known[i][0]:.3f}" if known else MISSING for i in (0, -1)]
    return [crop.name, bar(crop.mean_dice), *ends, f"{crop.true_voxels:,}"]


def _dice_matrix(artifacts: Artifacts, crops: list[CropScore]) -> Html:
    assert artifacts.scores is not None
    names = [name for name in artifacts.classes if name in artifacts.scores.per_class]
    ordered = sorted(crops, key=lambda crop: crop.name) if len(crops) > LEGIBLE_ROWS else crops
    values = [[crop.dice.get(name) for name in names] for crop in ordered]
    few = len(ordered) * len(names) <= TEXT_CELLS
    texts = [[MISSING if value is None else f"{value:.2f}" for value in row] for row in values]
    picture = matrix(
        Matrix(
            rows=[crop.name for crop in ordered],
            groups=[crop.name.rsplit("/", 1)[0] for crop in ordered],
            columns=names,
            colours=[[None if value is None else dice_colour(value) for value in row] for row in values],
            texts=texts if few else None,
            label="Dice of each crop and class",
        )
    )
    scale = "Dark is Dice 0, yellow is 1; empty: nothing to measure."
    return join(el("h3", "Dice by crop and class"), picture, el("p", scale, class_="muted"))


def panel_section(artifacts: Artifacts) -> Html | None:
    """Return EM, truth, prediction and errors of the best, median and worst crop; say so where they are gone."""
    if artifacts.scores is None or not artifacts.scores.rows:
        return None
    scored = [crop for crop in crop_scores(artifacts.scores) if crop.mean_dice is not None]
    places = {"worst": len(scored) - 1, "median": (len(scored) - 1) // 2, "best": 0}
    chosen = {scored[i].name: word for word, i in places.items()} if scored else {}
    children = []
    for number_, crop in enumerate(crop for crop in scored if crop.name in chosen):
        word = "only" if len(scored) == 1 else chosen[crop.name]
        title = el("h3", f"{word.capitalize()} crop: {crop.name}, mean Dice {number(crop.mean_dice)}")
        children.append(el("div", title, _panels(artifacts, crop, number_), id=f"crop{number_}"))
    return section("images", "What it looks like", error_legend(), *children)


def _panels(artifacts: Artifacts, crop: CropScore, number_: int) -> Html:
    names = [name for name in artifacts.classes if name in crop.dice]
    try:
        found = _read(artifacts, crop, names)
    except AutosegError as error:
        return note(discreet(f"No image: {error.where} {error.what}; {error.remedy}."))
    except (OSError, ValueError, IndexError, KeyError, msgspec.ValidationError) as error:
        return note(f"No image: the data of this crop cannot be read ({type(error).__name__}).")
    legend = [el("li", class_name(artifacts, names[k]), f" {number(crop.dice[names[k]], 2)}") for k in visible(found)]
    numbers = [artifacts.classes.index(name) for name in names]
    return join(panel_row(found, numbers, number_), el("ul", legend, class_="legend"), _caption(found, names))


def _read(artifacts: Artifacts, crop: CropScore, names: list[str]) -> Section:
    scores = artifacts.scores
    assert scores is not None
    dataset, prediction = _dataset(artifacts, scores), scores.prediction and find(scores.prediction, artifacts.run)
    if not prediction:
        named = shown(scores.prediction) if scores.prediction else "the prediction"
        raise DataError(named, "is not there any more", "evaluate the run again to predict it")
    box = next(row.box_zyx for row in scores.rows if row.crop == crop.name)
    return read_section(dataset, crop.name, names, prediction, Region(crop=crop.name, box_zyx=box), artifacts.cache)


def _dataset(artifacts: Artifacts, scores: Scores) -> Dataset:
    data = scores.data and find(scores.data, artifacts.run)
    if not data:
        named = shown(scores.data) if scores.data else "the scored DATA"
        raise DataError(named, "is not there any more", "restore it where it was and write this page again")
    return open_dataset(data)


def _caption(found: Section, names: list[str]) -> Html:
    y, x = found.shape_yx
    words = f"Section {found.z + 1} of {found.num_sections}, the one with most annotated foreground; {x} × {y} pixels"
    words += ", only the part that was scored." if found.partial else "."
    unknown = [names[k] for k in partly_unknown(found)]
    if unknown:
        words += f" Truth unknown in parts or all of it for {_listed(unknown)}: not counted as right or wrong."
    return el("p", words, class_="muted")
