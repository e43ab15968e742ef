"""Everything once, in a throw-away folder: one step, one validation, one checkpoint, one prediction."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from autoseg.data.dataset import open_dataset
from autoseg.geometry import Box
from autoseg.predict import crop_regions, open_run, predict_regions
from autoseg.predict.volumes import Region
from autoseg.recipes.training import train_on
from autoseg.schema import Plan


def dev_run(plan: Plan, data: Path, *, device: str, cache: Path) -> Iterator[str]:
    """Yield a line for each part that works; the first part that does not raises its error."""
    once = msgspec.structs.replace(plan, optimizer=msgspec.structs.replace(plan.optimizer, num_steps=1))
    with tempfile.TemporaryDirectory(prefix="autoseg-dev-run-") as folder:
        run = Path(folder) / "run"
        start = time.perf_counter()
        outcome = train_on(once, data, run, device=device, cache=cache)
        if outcome.stopped_by:
            raise KeyboardInterrupt
        yield f"step, validation and checkpoint work ({time.perf_counter() - start:.1f} s)"
        start = time.perf_counter()
        trained = open_run(run, "last", device)
        region = crop_regions(plan.split, open_dataset(data), "all")[0]
        tile = trained.predictor.tile(region.grid.shape_zyx)
        shape = tuple(min(n, t) for n, t in zip(region.grid.shape_zyx, tile, strict=True))
        corner = region.grid.crop(Box((0, 0, 0), (shape[0], shape[1], shape[2])))
        predict_regions(trained, [Region(region.name, region.em, corner)], Path(folder) / "out.zarr")
        yield f"prediction works ({time.perf_counter() - start:.1f} s)"
        yield f"everything works: {outcome.num_steps} step, nothing was kept"
