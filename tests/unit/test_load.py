"""The goodput benchmark's pure parts: arrivals, workloads and their scaling, judgement, the search."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.slo import Served
from scripts.load import arrivals, plots, results, trials
from scripts.load.__main__ import owned
from scripts.load.client import Record, lines, take
from scripts.load.curve import Curve, needed, wilson
from scripts.load.judge import Yardstick, fixed, scales
from scripts.load.options import parse
from scripts.load.targets import KINDS, variants
from scripts.load.trials import Plan, Trial
from scripts.load.workloads import NAMED, Shape, Workload, WorkloadError, load

STRICT = Yardstick(((0, 0.5),), 0.05)


def record(ttft: float, tpot: float, tokens: int = 11, *, due: float = 1.0, **more: object) -> Record:
    at = [due + ttft + tpot * n for n in range(tokens)]
    return Record(due, 100, tokens, sent_s=due, at_s=at, got_tokens=tokens, status=200, **more)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- arrivals


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_arrivals_have_their_rate_and_spread(cv: float) -> None:
    times = arrivals.gamma(40_000, 5.0, cv, seed=3)
    between = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(between) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(between) / statistics.fmean(between) == pytest.approx(cv, rel=0.05)
    assert times == arrivals.gamma(40_000, 5.0, cv, seed=3) != arrivals.gamma(40_000, 5.0, cv, seed=4)


def test_even_arrivals() -> None:
    assert arrivals.gamma(3, 4.0, 0, seed=1) == [0, 0.25, 0.5]


def test_a_trace_keeps_its_pattern_at_another_rate() -> None:
    assert arrivals.replay([10, 11, 13, 17, 30], 4, 2.0, seed=1) == pytest.approx([0, 1.5 / 7, 4.5 / 7, 1.5])


@given(st.lists(st.integers(0, 20), min_size=3, max_size=50).filter(lambda times: len(set(times)) > 1), st.integers(0, 5))
def test_replayed_times_ascend_from_zero(times: list[int], seed: int) -> None:
    due = arrivals.replay([float(t) for t in times], len(times), 1.0, seed)
    assert len(due) == len(times) and due[0] == 0 and due == sorted(due)


# ------------------------------------------------------------------------------------------------------------- systems


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ([], "false"),
        (["--workload", "mooncake"], "true"),
        (["--workload", "mooncake", "--no-prefix-reuse"], "false"),
        (["--prefix-reuse"], "true"),
        (["--interference", "--workload", "mooncake"], "false"),
    ],
)
def test_no_system_shares_prefixes_unless_the_workload_does_or_it_is_asked_for(words: list[str], shares: str) -> None:
    hardware = owned(parse(words), Path())
    flags = [variant.shape.worker_flags for kind in KINDS for variant in variants(kind, hardware)]
    assert {one["prefix_reuse"] for one in flags} == {shares}


def test_systems_on_one_device_have_the_same_in_all() -> None:
    hardware = owned(parse(["--devices", "1", "--device", "cuda", "--pages", "4000"]), Path())
    apart, colocated, chunked = (variants(kind, hardware) for kind in KINDS)
    assert [one.name for one in (*apart, *colocated, *chunked)] == ["disaggregated 1+1", "colocated 1×1", "chunked 1×1"]
    assert apart[0].shape.role_flags["prefill"]["pages"] == "1000" and apart[0].shape.role_flags["decode"]["pages"] == "3000"
    assert colocated[0].shape.worker_flags["pages"] == "4000" and colocated[0].shape.colocated == 1


def test_systems_have_a_device_for_each_worker_unless_told_otherwise() -> None:
    hardware = owned(parse(["--device", "cuda", "--pages", "4000"]), Path())
    (apart,), (colocated,) = (variants(kind, hardware) for kind in ("disaggregated", "colocated"))
    assert apart.shape.worker_flags["pages"] == colocated.shape.worker_flags["pages"] == "2000" and "prefill" not in apart.shape.role_flags
    assert colocated.shape.colocated == 2
    with pytest.raises(SystemExit):
        parse(["--devices", "3"])


# ------------------------------------------------------------------------------------------------------------ workloads


@pytest.mark.parametrize("name", sorted(NAMED))
@pytest.mark.parametrize("context", [512, 2048])
def test_every_workload_fits_the_context(name: str, context: int) -> None:
    workload = load(name, context, seed=1)
    assert len(workload.shapes) >= 164
    assert all(0 < shape.total_tokens <= context and shape.output_tokens >= 1 for shape in workload.shapes)
    assert workload.timed == (name in ("azure-conv", "azure-code", "mooncake"))


def test_one_factor_for_all_lengths() -> None:
    whole, half = load("azure-conv", 100_000, 1), load("azure-conv", 100_000, 1, factor=0.5)
    assert whole.factor == 1
    assert all(b.input_tokens == max(1, round(a.input_tokens / 2)) for a, b in zip(whole.shapes, half.shapes, strict=True))


def test_a_csv_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("input_tokens,output_tokens\n10,5\n20,6\n")
    assert [shape.total_tokens for shape in load(str(path), 100, 1).shapes] == [15, 26]
    path.write_text("input_tokens,output_tokens\n10,many\n")
    with pytest.raises(WorkloadError, match=r"own.csv, line 2: columns input_tokens, output_tokens"):
        load(str(path), 100, 1)
    with pytest.raises(WorkloadError, match="neither a workload"):
        load("chat", 100, 1)


# ------------------------------------------------------------------------------------------------------------ judgement


@pytest.mark.parametrize(
    ("one", "attained"),
    [
        (record(0.5, 0.05), True),
        (record(0.51, 0.01), False),
        (record(0.1, 0.051), False),
        (record(0.1, 9.0, tokens=1), True),  # one token has no pace
        (record(0.1, 0.01, error="429 Too Many Requests"), False),
        (Record(0, 10, 5), False),
    ],
)
def test_both_objectives_jointly(one: Record, attained: bool) -> None:
    for token in range(len(one.at_s)):
        one.at_s[token] -= 1e-9 * (token + 1)
    assert STRICT.attains(one) is attained


def test_an_answer_that_was_cut_never_attains() -> None:
    cut = record(0.1, 0.01)
    cut.output_tokens += 1
    assert not STRICT.attains(cut)


def test_joint_attainment_is_less_than_either() -> None:
    """Four requests: one misses both, one each of them; a benchmark that checks the two apart would say 50 % each."""
    served = [record(0.1, 0.01), record(0.9, 0.01), record(0.1, 0.09), record(0.9, 0.09)]
    assert [STRICT.attains(one) for one in served] == [True, False, False, False]
    assert [scale[1] for scale in results.sweep(Trial("t", 1.0, served, False), STRICT) if scale[0] == 2.0] == [1.0]


def test_latency_counts_from_when_it_was_due() -> None:
    late = record(0.1, 0.01)
    late.sent_s, late.at_s = 3.0, [at + 2.0 for at in late.at_s]
    assert late.served == Served(pytest.approx(2.1), pytest.approx(0.01), 11) and late.late_s == 2.0


def test_objectives_by_prompt_length() -> None:
    own = Yardstick(((100, 1.0), (300, 2.0)), 0.1, ttft_scale=3, tpot_scale=1.5)
    assert [own.objectives(tokens).ttft_s for tokens in (1, 100, 200, 300, 999)] == pytest.approx([3, 3, 4.5, 6, 6])
    assert own.objectives(200, scale=2).tpot_s == pytest.approx(0.3)


def test_words_for_objectives() -> None:
    assert fixed("code").objectives(7).tpot_s == 0.02 and fixed("0.3,0.1").objectives(7).ttft_s == 0.3
    assert scales("2") == (2, 2) and scales("3,1.5") == (3, 1.5)
    for bad in ("fast", "1", "0,1", "1,2,3"):
        with pytest.raises(ValueError, match="--slo "):
            fixed(bad)
    for bad in ("x", "0", "1,2,3", "-1"):
        with pytest.raises(ValueError, match="--slo-scale"):
            scales(bad)


# --------------------------------------------------------------------------------------------------------------- search


def test_wilson_by_hand() -> None:
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert wilson(0, 0) == (0, 1) and wilson(10, 10)[1] == 1


@given(st.floats(0.05, 500), st.floats(0.1, 100))
def test_the_search_finds_a_capacity(capacity: float, start: float) -> None:
    """A server that attains below its capacity and fails above it."""
    curve = Curve(start, 0.01, 2000, 1.05)
    for _ in range(60):
        rate = curve.next_rate(0.9)
        if rate is None:
            break
        curve.add(rate, 100 if rate <= capacity else 0, 100)
    found = curve.goodput(0.9)
    assert found.resolved and found.below is not None
    assert found.rate <= capacity < found.below <= found.rate * 1.0501


def test_a_lower_rate_that_missed_bounds_the_goodput() -> None:
    curve = Curve(1, 0.1, 10, 1.1)
    for rate, hits in ((1.0, 95), (2.0, 80), (3.0, 95)):
        curve.add(rate, hits, 100)
    assert curve.bracket(0.9) == (1.0, 2.0)


def test_few_requests_resolve_nothing() -> None:
    curve = Curve(1, 0.1, 10, 1.1)
    curve.add(1.0, 100, 100)
    curve.add(1.05, 10, 100)
    assert needed(0.9) == 30 and needed(0.99) == 300
    assert curve.goodput(0.9).resolved
    at_99 = curve.goodput(0.99)
    assert not at_99.resolved and "300 are needed" in at_99.why
    assert not Curve(1, 0.1, 10, 1.1).goodput(0.9).resolved


def test_a_trial_has_enough_requests() -> None:
    plan = Plan(10, 20, 100, 1, 1)
    assert [plan.count(rate) for rate in (0.1, 5, 100)] == [20, 50, 100]


# ----------------------------------------------------------------------------------------------------------- the stream


def test_what_a_chunk_tells() -> None:
    one = Record(0, 3, 4)
    take(one, {"choices": [{"text": ""}]}, 1.0)
    take(one, {"choices": [{"text": "a"}]}, 2.0)
    take(one, {"choices": [], "usage": {"completion_tokens": 4}}, 3.0)
    assert one.at_s == [2.0] and one.got_tokens == 4 and one.error is None
    take(one, {"error": {"message": "gone"}}, 4.0)
    assert one.error == "gone"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slo", "fast"], "--slo fast"),
        (["--slo-scale", "0"], "--slo-scale 0"),
        (["--rate", "0"], "above 0"),
        (["--shares", "1"], "between 0 and 1"),
        (["--start", "both"], "invalid choice"),
        (["--least", "9", "--most", "3"], "--most"),
    ],
)
def test_bad_words_end_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.count("\n") == 1


def test_figures_are_drawn_from_the_json_alone(tmp_path: Path) -> None:
    trial = Trial("disaggregated 1+1", 1.0, [record(0.1, 0.01, stages_ms=dict.fromkeys(results.STAGES, 5.0))], False)
    one = results.trial_summary(trial, STRICT)
    body = {
        "made": "today",
        "machine": "here",
        "workload": {"name": "chatbot"},
        "objectives": {"words": "both"},
        "targets": [{"name": trial.target, "kind": "disaggregated"}],
        "trials": [one],
        "sweep": {
            "rate": 1.0,
            "attainment": {trial.target: results.sweep(trial, STRICT)},
            "trials": {trial.target: {**one, "values": {"ttft": [0.1]}}},
        },
    }
    files = plots.draw(json.loads(json.dumps(body)), tmp_path / "run")
    assert len(files) == 6 and all(file.stat().st_size > 5000 for file in files)
    assert one["transfer_share"] == pytest.approx(1 / 6, abs=1e-6) and one["transfers_within_a_step"] == 1.0
    assert math.isclose(one["between_s"]["p50"], 0.01)


@pytest.mark.parametrize("busy", [3, 1000])
async def test_a_trial_waits_until_the_cores_are_at_rest_but_not_for_ever(monkeypatch: pytest.MonkeyPatch, busy: int) -> None:
    """vLLM's threads spin for a second after its last request, on the cores of whoever is asked next."""
    monkeypatch.setattr(trials, "REST_S", 0.001)
    looks = []

    class Watched(trials.Bench):
        def _cpu(self) -> dict[str, dict[str, float]]:
            looks.append(1.0 * min(len(looks), busy))
            return {"": {"machine": looks[-1]}}

    plan = trials.Plan(1, 20, 20, 0, 1, restless_s=0.2 if busy == 1000 else 5.0)
    one = Watched([], Workload("known", (Shape(10, 2),), ""), None, plan, print)  # type: ignore[arg-type]
    began = time.monotonic()
    await one._rest()
    if busy == 3:
        assert len(looks) == busy + 2, "one look more, which shows that nothing has been done"
    assert time.monotonic() - began < 2 and len(looks) < 500


async def test_a_line_ends_where_an_event_stream_says_so() -> None:
    """Other servers let U+2028 and its like stand within their JSON."""
    said = 'data: {"text": "a\u2028b\x85c"}\r\n\ndata: [DONE]\nrest'.encode()

    async def bytes_one_by_one() -> AsyncIterator[bytes]:
        for at in range(len(said)):
            yield said[at : at + 1]

    for content in (said, bytes_one_by_one()):
        reply = httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, content=content)
        found = [line async for line in lines(reply)]
        assert found == ['data: {"text": "a\u2028b\x85c"}', "", "data: [DONE]", "rest"]
