"""Every weighting strategy on the counts that the class-weighting experiments published, and its laws."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoseg.plan.weighting import STRATEGIES, Occurrence, effective_number, saturated

VALID = 29_650_000
COUNTS = {"nuc": 3_537_231, "mito_mem": 1_781_370, "er_mem": 1_662_007, "pm": 653_198, "golgi_mem": 536_370}
PUBLISHED = {name: Occurrence(n, VALID, 10) for name, n in COUNTS.items()}

# What the experiments' files hold, rounded as printed there.
GOLDEN = {
    "uniform": [1, 1, 1, 1, 1],
    "manual": [1.8, 1.3, 1.6, 1.6, 1.1],
    "inverse_max": [0.152, 0.301, 0.323, 0.821, 1],
    "sqrt_inverse_max": [0.389, 0.549, 0.568, 0.906, 1],
    "log_inverse_max": [0.177, 0.322, 0.343, 0.827, 1],
    "effective_max": [1, 1, 1, 1, 1],
    "inverse_median": [0.5, 0.933, 1, 2.544, 3.099],
    "sqrt_inverse_median": [0.685, 0.966, 1, 1.595, 1.76],
    "log_inverse_median": [0.763, 0.978, 1, 1.307, 1.373],
    "class_balanced": [1, 1, 1, 1, 1],
    "performance": [1, 1, 1, 1, 1],
}


@pytest.mark.parametrize(("name", "expected"), GOLDEN.items())
def test_published_counts_give_the_published_weights(name: str, expected: list[float]) -> None:
    assert list(STRATEGIES[name](PUBLISHED).values()) == pytest.approx(expected, abs=6e-4)


def test_plain_inverses_of_the_quick_reference() -> None:
    """80, 10, 7 and 3 % weigh 1.25, 10, 14.3 and 33.3."""
    shares = {"background": 80, "er": 10, "mito": 7, "nuc": 3}
    found = {name: Occurrence(n, 100, 1) for name, n in shares.items()}
    assert list(STRATEGIES["inverse_plain"](found).values()) == pytest.approx([1.25, 10, 14.3, 33.3], abs=0.05)


def test_effective_numbers_of_voxels_saturate_and_of_instances_do_not() -> None:
    assert saturated(PUBLISHED)
    few = {"nuc": Occurrence(10**6, VALID, 3), "mito": Occurrence(10**6, VALID, 3000)}
    weights = STRATEGIES["class_balanced"](few)
    assert weights["nuc"] / weights["mito"] == pytest.approx(863, rel=0.01)
    assert not saturated({"a": Occurrence(10, VALID, 1), "b": Occurrence(1000, VALID, 1)})
    assert [effective_number(n, 0.9) for n in (0, 1, 2)] == pytest.approx([1, 1, 1.9])


def test_what_scored_badly_weighs_more() -> None:
    found = {"nuc": Occurrence(1, 2, 1, 0.9), "golgi": Occurrence(1, 2, 1, 0.4), "new": Occurrence(1, 2, 1, None)}
    weights = STRATEGIES["performance"](found)
    assert weights["golgi"] / weights["nuc"] == pytest.approx(6)
    assert weights["new"] == 1


occurrences = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.builds(
        lambda known, share, instances: Occurrence(int(known * share), known, instances),
        st.integers(1, 10**10),
        st.floats(0, 1),
        st.integers(0, 10**5),
    ),
    min_size=1,
)


@given(st.sampled_from(sorted(STRATEGIES)), occurrences)
def test_weights_are_positive_and_finite_and_never_favour_what_is_common(
    name: str, found: dict[str, Occurrence]
) -> None:
    weights = STRATEGIES[name](found)
    assert weights.keys() == found.keys()
    assert all(math.isfinite(w) and w > 0 for w in weights.values())
    if name.endswith("_median") and name != "effective_median":
        ordered = sorted(found, key=lambda one: found[one].share)
        assert all(weights[a] >= weights[b] - 1e-9 for a, b in itertools.pairwise(ordered))
    if name.endswith("_max"):
        assert max(weights.values()) == pytest.approx(1)
