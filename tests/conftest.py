"""Fixtures and settings of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from strategies import make_dataset

settings.register_profile(
    "autoseg",
    max_examples=50,
    deadline=None,  # the machine may be shared; pytest-timeout stops what hangs
    derandomize=True,  # the same examples in every run; `--hypothesis-profile=explore` looks further
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", parent=settings.get_profile("autoseg"), derandomize=False, max_examples=500)
settings.load_profile("autoseg")


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """DATA with two small, partially annotated, learnable crops of one volume (see strategies.make_dataset)."""
    return make_dataset(tmp_path / "data")


@pytest.fixture
def _cheap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Price training steps by a formula instead of a trace; `test_planner.cheap` marks the tests that want it."""
    from test_planner import cheap_trace

    from autoseg.plan import rules_machine

    monkeypatch.setattr(rules_machine, "trace_step", cheap_trace)
    rules_machine._cached_cost.cache_clear()
    yield
    rules_machine._cached_cost.cache_clear()
