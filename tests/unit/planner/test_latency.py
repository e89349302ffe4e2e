"""Times of launches and the fit: the formulas, chunks that add up, coefficients recovered from points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.plan import Chunk, Plan
from services.planner import paper
from services.planner.costs import Parallel
from services.planner.fit import FitError, fit, fit_decode
from services.planner.latency import Coefficients, LaunchModel
from services.planner.requests import Request

MODEL = LaunchModel(Coefficients(0.02, 1e-4, 1e-8), Coefficients(0.02, 1e-6, 1e-4), Coefficients(0.01, 1e-6, 2e-4), knee=4)


def chunk(start: int, tokens: int, *, draws: bool = True) -> Chunk:
    return Chunk(Request(0, 0.0, start + tokens, 9).sequence(parks=False), start, tokens, draws, 0)


def launch(*chunks: Chunk) -> Plan:
    return Plan(1, chunks)


def test_the_paper_s_formulas() -> None:
    """13B at TP 1 by hand, in ms: 18.1025 + 0.101912·512 + 7.1223e-6·512² + 1; 19.9347 + 6.2694e-4·5120 + 0.038507·10."""
    model = paper.costs("distserve-a100-opt-13b").launches[1]
    assert model.stage_s(launch(chunk(0, 512))) == pytest.approx(0.0731484, abs=1e-6)
    steps = [chunk(512, 1) for _ in range(10)]
    assert model.stage_s(launch(*steps)) == pytest.approx(0.0235297, abs=1e-6)
    assert model.stage_s(launch(*steps), 2) == pytest.approx(0.0235297 / 2, abs=1e-6)


def test_room_for_kv_is_the_artifact_s() -> None:
    small, large = paper.costs("distserve-a100-opt-13b"), paper.costs("distserve-a100-opt-66b")
    for costs, parallel, tokens in (
        (small, Parallel(1, 1), 66_144),
        (small, Parallel(2, 2), 356_752),
        (large, Parallel(2, 1), 11_600),
        (large, Parallel(4, 2), 212_320),
    ):
        assert costs.pages(parallel) * costs.page_tokens == pytest.approx(tokens, abs=32)
    assert large.pages(Parallel(1, 1)) == 0


def test_the_knee_changes_the_fit() -> None:
    assert MODEL.decode_s(3, 0) == pytest.approx(0.0203)
    assert MODEL.decode_s(4, 0) == pytest.approx(0.0108)


@given(st.lists(st.integers(2, 500), min_size=1, max_size=6))
def test_chunks_of_a_prompt_cost_the_prompt_and_a_constant_for_each_launch(parts: list[int]) -> None:
    at, total = 0, 0.0
    for number, tokens in enumerate(parts):
        total += MODEL.stage_s(launch(chunk(at, tokens, draws=number == len(parts) - 1)))
        at += tokens
    whole = MODEL.stage_s(launch(chunk(0, at)))
    assert total == pytest.approx(whole + 0.02 * (len(parts) - 1))


def test_a_launch_of_both_phases_reads_the_weights_once() -> None:
    both = MODEL.stage_s(launch(chunk(100, 1), chunk(0, 300)))
    assert MODEL.stage_s(launch(chunk(0, 300))) < both < MODEL.stage_s(launch(chunk(0, 300))) + MODEL.stage_s(launch(chunk(100, 1)))


COEFFICIENT = st.floats(1e-3, 1.0)


@given(COEFFICIENT, COEFFICIENT, COEFFICIENT)
def test_coefficients_come_back_from_exact_points(a: float, b: float, c: float) -> None:
    truth = Coefficients(a * 0.1, b * 1e-3, c * 1e-6)
    rows = [(float(n), float(n * n), truth.seconds(n, n * n)) for n in (64, 128, 300, 512, 1024, 2048)]
    found = fit(rows)
    for x, y, seconds in rows:
        assert found.seconds(x, y) == pytest.approx(seconds, rel=1e-4)
    assert found.seconds(1500, 1500**2) == pytest.approx(truth.seconds(1500, 1500**2), rel=1e-3)


def test_no_coefficient_is_negative() -> None:
    rows = [(float(n), float(n * n), 0.01 + 1e-4 * n - 1e-9 * n * n) for n in (64, 256, 1024, 4096)]
    found = fit(rows)
    assert min(found.a, found.b, found.c) >= 0
    assert found.c == 0


def test_a_knee_is_found_where_there_is_one_and_only_there() -> None:
    model = paper.costs("distserve-a100-opt-13b").launches[1]
    points = [(b, context) for b in (8, 32, 64, 96, 128, 192, 256) for context in (128, 512)]
    bent = fit_decode([(b * context, b, model.decode_s(b, b * context)) for b, context in points])
    assert bent.knee == 96
    assert bent.worst < 1e-6
    straight = fit_decode([(b * context, b, 0.01 + 1e-6 * b * context + 1e-4 * b) for b, context in points])
    assert straight.large is None
    assert straight.worst < 1e-6


@pytest.mark.parametrize("rows", [[], [(1.0, 1.0, 0.0)]])
def test_points_without_times_do_not_fit(rows: list[tuple[float, float, float]]) -> None:
    with pytest.raises(FitError):
        fit(rows)


def test_limits_follow_the_workers_rule() -> None:
    """Rates of 64, 128, … tokens; the first within a tenth of the best, and whole pages of half a second."""
    flat = LaunchModel(Coefficients(0.0, 1e-3, 0.0), Coefficients(0.01, 0.0, 0.0))
    assert flat.limits(16, 0.5) == (64, 448)
    assert LaunchModel(Coefficients(0.2, 1e-4, 0.0), flat.decode).limits(16, 0.5)[0] == 8192
