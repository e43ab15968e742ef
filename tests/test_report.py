"""The page of a run: self-contained, complete, safe against names, and there whatever is missing."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from autoseg.data.convert import import_arrays
from autoseg.data.store import create_array
from autoseg.data.writer import ImportRequest
from autoseg.errors import DataError
from autoseg.metrics.overlap import Counts, mean, ratios
from autoseg.report.artifacts import discreet
from autoseg.report.figures import sparkline, thin, ticks
from autoseg.report.html import Html, el, join
from autoseg.report.page import write_report
from autoseg.report.palette import NUM_LOOKS, look
from autoseg.report.png import encode
from autoseg.report.results import verdict
from autoseg.schema import (
    Augmentation,
    ClassCount,
    ClassEntry,
    ClassScore,
    CropFacts,
    Decode,
    Fingerprint,
    Hardware,
    Head,
    Intensity,
    LeftOut,
    Loss,
    Network,
    Normalization,
    Optimizer,
    Plan,
    Reason,
    Region,
    Sampling,
    Schedule,
    ScoreRow,
    Scores,
    SlidingWindow,
    Split,
    Validation,
    VolumeFacts,
    save,
)

VOID = {"meta", "br"}
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a'&amp;\x00\ud800", "../ü\u202ex")


class Page(HTMLParser):
    """Collects tags, visible text and everything that could refer to another file; checks that tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return "".join(self.text)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def check_self_contained(self) -> None:
        ids = {attributes["id"] for _, attributes in self.tags if attributes.get("id")}
        for tag, attributes in self.tags:
            assert tag not in ("script", "link", "iframe", "object", "embed", "img")
            for key, value in attributes.items():
                assert not key.startswith("on")
                if key in ("src", "href", "xlink:href"):
                    assert value is not None
                    inner = value.startswith("#") and value[1:] in ids
                    assert inner or value.startswith("data:image/png;base64,"), (tag, value[:60])
                if key == "style":
                    assert "url(" not in (value or "")
        style = "".join(part for part in self.text if "color-scheme" in part)
        assert "http" not in style
        assert "url(" not in style
        assert "@import" not in style
        assert "prefers-color-scheme:dark" in style


def parse(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    page.check_self_contained()
    return page


# ---- made-up artifacts --------------------------------------------------------------------------------------


def make_plan(names: tuple[str, ...], **changes: Any) -> Plan:
    machine = Hardware(
        name="machine", gpus=(), cpu_name="a CPU", cpu_threads=2, cpu_bf16=True, ram_bytes=2**34, shm_bytes=2**30
    )
    levels = {"features": (8, 16), "kernels_zyx": ((1, 3, 3), (1, 3, 3)), "strides_zyx": ((1, 2, 2),)}
    made_up: dict[Any, Any] = {float: 0.5, bool: False, int: 2, tuple[float, float]: (0.5, 1.0)}
    augmentation = {
        field.name: made_up.get(field.type, "z")
        for field in msgspec.structs.fields(Augmentation)
        if field.name != "preset"
    }
    weights = {f"{name}_weight": 1.0 for name in ("bce", "dice", "focal", "tversky")}
    plan = Plan(
        name="made-up",
        fingerprint_sha256="0" * 64,
        hardware=machine,
        device="cpu",
        classes=tuple(ClassEntry(name=name) for name in names),
        disjoint=(),
        split=Split(train=(Region(crop="d/crop1"),), validate=(), rule="crops"),
        em_voxel_size_nm=(40.0, 8.0, 8.0),
        voxel_size_nm=(40.0, 8.0, 8.0),
        patch_size_zyx=(1, 64, 64),
        input_slices=1,
        batch_size=4,
        accumulate_batches=1,
        num_workers=0,
        num_threads=1,
        precision="fp32",
        network=Network(kind="unet", norm="batch", deep_supervision=False, **levels),  # type: ignore[arg-type]
        heads=(Head(name="semantic", classes=names),),
        loss=Loss(kind="bce", focal_gamma=2.0, tversky_alpha=0.5, tversky_beta=0.5, smooth=1.0, **weights),
        class_weighting="uniform",
        class_weights=dict.fromkeys(names, 1.0),
        sampling=Sampling(class_centred_fraction=0.5, class_floor=0.1, class_power=0.5, crops_per_step=4),
        normalization=Normalization(kind="dtype", volumes=()),
        init=None,
        augmentation=Augmentation(preset="light", **augmentation),  # type: ignore[arg-type]
        optimizer=Optimizer(
            kind="adamw", learning_rate=1e-3, weight_decay=0.0, gradient_clip_norm=1.0, ema_decay=0.0, num_steps=9
        ),
        schedule=Schedule(kind="constant", warmup_fraction=0.0),
        validation=Validation(num_rounds=2, tolerance=0.01),
        budget_s=None,
        sliding_window=SlidingWindow(
            tile_zyx=(1, 64, 64), overlap=0.25, batch_size=1, mirror_axes=(), transpose_yx=False
        ),
        decode=Decode(thresholds=dict.fromkeys(names, 0.5), tune_thresholds=False),
        predicted_memory_bytes=2**30,
        predicted_ram_bytes=2**31,
        predicted_disk_bytes=2**30,
        predicted_step_s=None,
        seed=0,
        reasons=(
            Reason(field="classes", because="they are <there>", source="fingerprint"),
            Reason(field="batch_size", because="set by hand", source="user"),
            Reason(field="augmentation.flip", because="preset light", source="augmentation.preset"),
            Reason(field="loss.smooth", because="one voxel", source="paper default"),
            Reason(field="gone.field", because="of an older version", source="convention"),
        ),
    )
    return msgspec.structs.replace(plan, **changes)


def make_facts(names: tuple[str, ...], crops: tuple[str, ...]) -> Fingerprint:
    grey = Intensity(minimum=0, p0_5=1, p50=128, p99_5=250, maximum=255, mean=127, sd=40, num_voxels=10**6)
    volumes = dict.fromkeys(crop.rsplit("/", 1)[0] for crop in crops)
    counts = [
        {name: ClassCount(absent=1000, present=(i * k) % 7, unknown=(i + k) % 2) for k, name in enumerate(names)}
        for i in range(len(crops))
    ]
    size = {"shape_zyx": (4, 64, 64), "voxel_size_nm": (40.0, 8.0, 8.0)}
    return Fingerprint(
        volumes=tuple(
            VolumeFacts(name=v, path=f"{v}/em", dtype="uint8", intensity=grey, stored_fraction=1.0, **size)  # type: ignore[arg-type]
            for v in volumes
        ),
        crops=tuple(
            CropFacts(
                name=crop,
                volume=crop.rsplit("/", 1)[0],
                origin_nm=(0.0, 0.0, 0.0),
                split=None,
                annotated=names,
                counts=counts[i],
                **size,  # type: ignore[arg-type]
            )
            for i, crop in enumerate(crops)
        ),
        classes=tuple(ClassEntry(name=name) for name in names),
        left_out=(LeftOut(name="d/crop999", why="no <EM>"),),
    )


def pool(rows: list[ScoreRow], **where: str) -> Scores:
    names = dict.fromkeys(row.class_ for row in rows)
    per_class = {
        name: ratios(Counts(*(sum(getattr(r, key) for r in rows if r.class_ == name) for key in ("tp", "fp", "fn"))))
        for name in names
    }
    dice, iou = (mean([getattr(score, key) for score in per_class.values()]) for key in ("dice", "iou"))
    return Scores(
        metric="voxel-overlap-1", rows=tuple(rows), per_class=per_class, mean_dice=dice, mean_iou=iou, **where
    )


def make_scores(names: tuple[str, ...], crops: tuple[str, ...]) -> Scores:
    rows = [
        ScoreRow(crop=crop, class_=name, tp=(i * k) % 11, fp=(i + k) % 5, fn=i % 3)
        for i, crop in enumerate(crops)
        for k, name in enumerate(names)
    ]
    return pool(rows, run="r", checkpoint="best (step 9)", data="/home/secret/gone", prediction="gone.zarr")


def write_log(run: Path, names: tuple[str, ...], num_steps: int) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        lines.append(
            {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "gradient_norm": 1.0, "wait_s": 0.1, "step_s": 0.3}
        )
        if step % max(1, num_steps // 3) == 0:
            dice = {name: None if k == 1 else step / (num_steps + k) for k, name in enumerate(names)}
            lines[-1] |= {"mean_dice": 0.5, "dice": dice}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "log.jsonl").write_text(text + '{"step": 10, "loss": NaN}\n{"step": 11, "lo')


def write_run(run: Path, names: tuple[str, ...], crops: tuple[str, ...], *, scored: bool = True) -> Path:
    run.mkdir(parents=True)
    save(make_plan(names), run / "plan.json")
    save(make_facts(names, crops), run / "fingerprint.json")
    write_log(run, names, 9)
    events = [
        {"event": "data", "path": "/home/secret/data"},
        {"event": "length", "num_steps": 9, "num_rounds": 2, "because": "8 s of training"},
        {"event": "something_new", "value": "<b>3</b>"},
    ]
    (run / "adaptations.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if scored:
        save(make_scores(names, crops), run / "scores.json")
    return run


# ---- a real, tiny data set ----------------------------------------------------------------------------------


def write_scored_data(root: Path, shape: tuple[int, int, int]) -> Path:
    """Write DATA with three crops side by side, a prediction that is shifted more from crop to crop, and a run."""
    rng = np.random.default_rng(0)
    em = rng.integers(0, 255, shape).astype(np.uint8)
    labels = np.zeros(shape, np.uint8)
    labels[:, 8:30, :] = 1
    labels[:, 32:40, ::2] = 2
    labels[:, -6:, :] = 9
    request = ImportRequest(
        data=root / "data",
        name="d",
        em="em",
        labels="labels",
        values={"mito": (1,), "thing": (2,)},
        ignore_value=9,
        voxel_size_nm=(40.0, 8.0, 8.0),
        grid=(1, 1, 3),
    )
    import_arrays(request, {"em": em, "labels": labels})
    rows, edge = [], shape[2] // 3
    for n in range(3):
        cut = labels[:, :, n * edge : (n + 1) * edge]
        for value, name in ((1, "mito"), (2, "thing")):
            truth, known = cut == value, cut != 9
            predicted = np.roll(truth, 4 * n, axis=1)
            array = create_array(root / f"p.zarr/d/crop{n + 1}/{name}/s0", cut.shape, np.uint8, cut.shape)
            array[...] = predicted.astype(np.uint8)
            tp, fp, fn = (int((f & known).sum()) for f in (truth & predicted, predicted & ~truth, truth & ~predicted))
            rows.append(ScoreRow(crop=f"d/crop{n + 1}", class_=name, tp=tp, fp=fp, fn=fn))
    run = write_run(root / "run", ("mito", "thing"), ("d/crop1", "d/crop2", "d/crop3"), scored=False)
    save(pool(rows, run="run", checkpoint="best", data="data", prediction="p.zarr"), run / "scores.json")
    return run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("depth", [1, 5])
def test_images_of_best_median_and_worst_crop(tmp_path: Path, depth: int) -> None:
    run = write_scored_data(tmp_path, (depth, 48, 144))
    out = tmp_path / "deep" / "report.html"
    write_report(run, out, None)
    page = parse(out)
    assert "No image" not in page.words
    places = [page.words.index(text) for text in ("Best crop: d/crop1", "Median crop: d/crop2", "Worst crop: d/crop3")]
    assert places == sorted(places)
    uris = [attributes["href"] or "" for attributes in page.all("image")]
    assert len(uris) == 2 + 3 * 4  # two matrices; EM, truth, prediction and errors of three crops
    assert len(page.all("use")) == 3 * 4
    for uri in uris:
        assert base64.b64decode(uri.split(",", 1)[1]).startswith(b"\x89PNG")
    assert "Truth unknown in parts or all of it for mito, thing" in page.words
    assert f"of {depth}" in page.words
    assert out.stat().st_size < 300_000


def test_same_artifacts_make_the_same_page(tmp_path: Path) -> None:
    run = write_scored_data(tmp_path, (1, 48, 144))
    write_report(run, tmp_path / "a.html", None)
    write_report(run, tmp_path / "b.html", run / "scores.json")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_only_the_box_that_was_scored_is_shown(tmp_path: Path) -> None:
    run = write_scored_data(tmp_path, (5, 48, 144))
    write_report(run, tmp_path / "whole.html", None)
    assert "only the part that was scored" not in parse(tmp_path / "whole.html").words
    row = ScoreRow(crop="d/crop1", class_="mito", tp=2200, fp=0, fn=0, box_zyx=((0, 0, 0), (5, 48, 20)))
    save(pool([row], run="run", data="data", prediction="p.zarr"), tmp_path / "part.json")
    write_report(run, tmp_path / "part.html", tmp_path / "part.json")
    assert "20 × 48 pixels, only the part that was scored" in parse(tmp_path / "part.html").words


def test_damaged_prediction_is_a_remark(tmp_path: Path) -> None:
    run = write_scored_data(tmp_path, (1, 48, 144))
    (tmp_path / "p.zarr/d/crop1/mito/s0/.zarray").write_text("{")
    write_report(run, tmp_path / "r.html", None)
    words = parse(tmp_path / "r.html").words
    assert words.count("No image") == 1
    assert str(tmp_path) not in words


# ---- made-up runs -------------------------------------------------------------------------------------------


def test_many_classes_and_crops(tmp_path: Path) -> None:
    names = tuple(f"class_{k}" for k in range(48))
    crops = tuple(f"volume{i // 20}/crop{i}" for i in range(289))
    run = write_run(tmp_path / "run", names, crops)
    write_report(run, tmp_path / "r.html", None)
    page = parse(tmp_path / "r.html")
    assert all(name in page.words for name in (*names, *crops))
    assert "No image" in page.words
    assert (tmp_path / "r.html").stat().st_size < 1_000_000


def test_absolute_paths_do_not_leak(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("mito",), ("d/crop1",))
    write_report(run, tmp_path / "r.html", None)
    text = (tmp_path / "r.html").read_text()
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert "--data …/data" in parse(tmp_path / "r.html").words


def test_hostile_names_are_text(tmp_path: Path) -> None:
    names = tuple(name.replace("\ud800", "") for name in HOSTILE)
    run = write_run(tmp_path / "run", names, tuple(f"{name}/crop{i}" for i, name in enumerate(names)))
    save(make_plan(names, name=names[0]), run / "plan.json")
    write_report(run, tmp_path / "<i>.html", None)
    page = parse(tmp_path / "<i>.html")
    assert names[0] in page.words
    assert names[1] in page.words
    assert "a'&amp;\ufffd" in page.words
    assert "\u202e" not in page.words
    assert not page.all("b") or "<b>3</b>" in page.words


def test_without_scores_it_says_how_to_make_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("mito",), ("d/crop1",), scored=False)
    write_report(run, tmp_path / "r.html", None)
    words = parse(tmp_path / "r.html").words
    assert "autoseg evaluate --run" in words
    assert "not been scored" in words


def test_plan_alone_is_enough(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save(make_plan(("mito", "er")), run / "plan.json")
    write_report(run, tmp_path / "r.html", None)
    words = parse(tmp_path / "r.html").words
    for text in (
        "No step was logged",
        "holds no fingerprint.json",
        "ran exactly as planned",
        "mito er",
        "they are <there>",
    ):
        assert text in words


def test_without_validation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("mito",), ("d/crop1",))
    (run / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n')
    write_report(run, tmp_path / "r.html", None)
    assert "was not validated" in parse(tmp_path / "r.html").words


def test_empty_scores(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("mito",), ("d/crop1",), scored=False)
    nothing = [ScoreRow(crop="d/crop1", class_="mito", tp=0, fp=0, fn=0)]
    for rows in ([], nothing):
        save(pool(rows), run / "scores.json")
        write_report(run, tmp_path / "r.html", None)
        parse(tmp_path / "r.html")


def test_sections_parameters_and_adaptations_are_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("mito", "er"), ("d/crop1", "d/crop2"))
    write_report(run, tmp_path / "r.html", None)
    page = parse(tmp_path / "r.html")
    anchors = [attributes.get("id") for attributes in page.all("section")]
    wanted = "scores crops images training plan data adaptations hardware reproduce"
    assert anchors == wanted.split()
    assert "The time budget became 9 steps before step 1: 8 s of training." in page.words
    assert "Something new: value <b>3</b>." in page.words
    assert "augmentation: 1 parameters" in page.words
    assert len(page.all("details")) == 3  # left out crops, augmentation, loss
    assert "d/crop999" in page.words


def test_a_run_without_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no plan.json.*: pass the folder"):
        write_report(tmp_path, tmp_path / "r.html", None)
    assert not (tmp_path / "r.html").exists()


def test_sentences_show_the_end_of_a_path_only() -> None:
    assert discreet("/home/me/data/x.zarr/crop1/mito/s0: is gone, see ../a/b") == "…/crop1/mito/s0: is gone, see ../a/b"
    assert discreet("d/crop1 and 3/4 stay; /data goes") == "d/crop1 and 3/4 stay; …/data goes"


# ---- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        (Counts(0, 0, 0), "–"),
        (Counts(0, 5, 0), "predicted, but not there"),
        (Counts(0, 0, 5), "never found"),
        (Counts(0, 9, 5), "never found"),
        (Counts(50, 100, 1), "over-predicting"),
        (Counts(50, 1, 100), "under-predicting"),
        (Counts(90, 5, 5), "good"),
        (Counts(60, 40, 40), "fair"),
        (Counts(10, 90, 90), "poor"),
    ],
)
def test_verdict(counts: Counts, word: str) -> None:
    assert verdict(ratios(counts))[0] == word


def test_verdict_of_a_score_without_precision() -> None:
    assert verdict(ClassScore(dice=0.6, iou=None, precision=None, recall=0.6))[0] == "over-predicting"


def test_only_html_passes_unescaped() -> None:
    assert el("b", "<i>", Html("<i/>"), ["&", None, [1]], title='"') == '<b title="&quot;">&lt;i&gt;<i/>&amp;1</b>'
    assert join("a\x07\ud800b") == "a\ufffd\ufffdb"
    join("a\x07\ud800b").encode()


def test_every_class_of_48_looks_different() -> None:
    assert len({look(k) for k in range(NUM_LOOKS)}) == NUM_LOOKS
    assert look(NUM_LOOKS) == look(0)


def test_curves_keep_their_mean_and_ends() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert np.mean([y for _, y in few]) == pytest.approx(np.mean([y for _, y in points]), rel=1e-2)
    assert thin(points[:5]) == points[:5]
    assert sparkline([None, 0.5]) is None


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 64), (7, 9, 4)])
def test_png_keeps_every_pixel(shape: tuple[int, ...]) -> None:
    """Pillow, an independent reader, sees what was written."""
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(pixels)))), pixels)
    smooth = np.broadcast_to(np.arange(shape[1], dtype=np.uint8), shape[:2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(smooth)))), smooth)


def test_png_of_indices_has_their_colours() -> None:
    table = np.random.default_rng(2).integers(0, 256, (256, 4)).astype(np.uint8)
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.open(io.BytesIO(encode(indices, table))).convert("RGBA")
    assert np.array_equal(np.asarray(image), table[indices])
    assert np.asarray(Image.open(io.BytesIO(encode(np.zeros((0, 4), np.uint8))))).shape == (1, 1, 4)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3e-5), (1, 120_000), (5, 5), (-0.3, 2)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 11
    assert min(found) >= low - 1e-9
    assert max(found) <= high + 1e-9
