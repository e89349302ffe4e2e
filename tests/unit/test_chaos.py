"""The chaos run's pure parts: its schedule, its counting and verdict, the slope of a series, and the faults of messages."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from common.errors import SettingError
from common.faults import MessageFault, parse
from scripts.faults.__main__ import options
from scripts.faults.schedule import LONGEST_S, WEIGHTS, Possible, Strike, plan, rolling
from scripts.faults.score import Answer, Score
from scripts.faults.strikes import ORPHAN_S, Striker
from scripts.faults.trend import trend
from scripts.faults.watch import buckets

EVERYBODY = Possible(["prefill-0", "decode-0"], ["gateway-0", "gateway-1"], ["decode-0"], ["redis", "decode-0"])


# ------------------------------------------------------------------------------------------------------------- schedule


def test_the_same_seed_gives_the_same_strikes_and_another_one_others() -> None:
    assert plan(1, 600, 5, EVERYBODY) == plan(1, 600, 5, EVERYBODY) != plan(2, 600, 5, EVERYBODY)


def test_strikes_keep_their_pace_and_leave_no_kind_out() -> None:
    strikes = plan(1, 10_000, 5, EVERYBODY)
    assert len(strikes) == pytest.approx(2000, rel=0.05)
    assert all(2.5 <= b.at_s - a.at_s <= 7.5 for a, b in itertools.pairwise(strikes))
    assert {strike.kind for strike in strikes} == set(WEIGHTS)
    assert all(strike.target in EVERYBODY.targets(strike.kind) for strike in strikes)
    lasting = [strike.seconds for strike in strikes if strike.kind in ("stop", "cut", "gateway_stop")]
    assert min(lasting) >= 1 and max(lasting) <= LONGEST_S


def test_what_cannot_be_done_is_not_planned() -> None:
    few = Possible(["prefill-0"], ["gateway-0"], empties=False)
    kinds = {strike.kind for strike in plan(1, 5000, 5, few)}
    assert not kinds & {"cut", "clock_step", "gateway_kill", "gateway_drain", "redis_empty"} and "gateway_stop" in kinds
    assert {strike.kind for strike in plan(1, 500, 5, EVERYBODY, ["cut"])} == {"cut"}
    assert plan(1, 500, 5, few, ["cut"]) == []


@pytest.mark.parametrize("victim", ["decode-0", "gateway-1", "redis"])
def test_nobody_but_the_victim_is_struck(victim: str) -> None:
    """Redis was, and poison strikes whoever takes it."""
    strikes = plan(1, 5000, 5, replace(EVERYBODY, victims=[victim]))
    assert len(strikes) > 900 and {strike.target for strike in strikes} == {victim}


def test_a_victim_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert options(["--victim", "decode-1", "--victim", "redis", "--victim", "gateway-0"]).victim == ["decode-1", "redis", "gateway-0"]
    with pytest.raises(SystemExit) as end:
        options(["--decode", "1", "--victim", "decode-1"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "--victim decode-1: there are prefill-0, prefill-1, decode-0, gateway-0" in err
    assert len(err.splitlines()) == 1


def test_a_rolling_restart_drains_everybody_once() -> None:
    strikes = rolling(["prefill-0", "gateway-0", "redis"], 10, 20)
    assert [(strike.at_s, strike.kind, strike.target) for strike in strikes] == [
        (10, "drain", "prefill-0"),
        (30, "gateway_drain", "gateway-0"),
        (50, "redis_kill", "redis"),
    ]


# ------------------------------------------------------------------------------------------------------------- counting


def answer(**more: object) -> Answer:
    facts: dict[str, object] = {"texts": ["right"], "got_tokens": 3, "finished": True, **more}
    return Answer("plain", ["right"], 3, **facts)  # type: ignore[arg-type]


def scored(*answers: Answer) -> Score:
    score = Score()
    for one in answers:
        score.enter(one)
    return score


def test_a_right_answer_is_complete_and_nothing_is_held_against_it() -> None:
    score = scored(answer(attempts=2, worst_pause_s=1.5, refusals=["503 with retry-after"]))
    assert (score.complete, score.recovered, score.worst_pause_s, score.failures()) == (1, 1, 1.5, [])
    assert score.refusals == Counter({"503 with retry-after": 1})


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        (answer(error="gone"), "lost"),
        (answer(finished=False), "lost"),
        (answer(texts=["wrong"]), "wrong"),
        (answer(texts=["righ"]), "wrong"),
        (answer(got_tokens=4), "duplicated"),
    ],
)
def test_what_is_bad_is_counted_and_fails_the_run(bad: Answer, where: str) -> None:
    score = scored(answer(), bad)
    assert getattr(score, where) == 1 and score.failures() == [f"1 {where}"]


def test_who_leaves_or_loses_its_gateway_must_have_seen_a_beginning_of_the_right_text() -> None:
    left, orphaned = answer(texts=["ri"], finished=False), answer(texts=["rig"], finished=False, error="gone", orphaned=True)
    left.manner = "leaving"
    assert scored(answer(), left, orphaned).failures() == []
    left.texts = ["rong"]
    orphaned.texts = ["rong"]
    assert scored(answer(), left, orphaned).wrong == 2


def test_every_choice_is_compared() -> None:
    two = Answer("plain", ["right", "right"], 3, ["right", "wrong"], 6, finished=True)
    assert scored(two).wrong == 1


def test_poison_must_end_as_poison() -> None:
    ended, survived = (Answer("poison", [""], 3, error="it died", code=code) for code in ("poison", "deadline_exceeded"))
    assert scored(answer(), ended).failures() == []
    assert scored(answer(), survived).failures() == ["poison that was not recognised"]


@pytest.mark.parametrize(("victim", "lingers"), [("gateway-0", True), ("prefill-0", False)])
async def test_poison_may_still_kill_after_its_gateway_was_killed(monkeypatch: pytest.MonkeyPatch, victim: str, lingers: bool) -> None:
    """Its job is in the queue: the worker that then died of it was counted as one that had ended by itself."""
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        assert striker._poisonous == 1

    async def poison() -> None:
        striker._killed.add((victim, 0))

    striker = Striker(None, Score(), 1, poison, print)  # type: ignore[arg-type]
    monkeypatch.setattr("scripts.faults.strikes.asyncio.sleep", sleep)
    await striker._strike(Strike(0.0, "poison", "all", 0.0))
    assert striker._poisonous == 0 and (waits == [ORPHAN_S]) is lingers


def test_a_run_without_answers_and_one_with_crashes_fail() -> None:
    assert scored().failures() == ["no complete answer"]
    score = scored(answer())
    score.crashes.append("decode-0 with -11")
    assert score.failures() == ["ended by themselves: decode-0 with -11"]


def test_buckets_of_a_cumulative_histogram() -> None:
    lines = [f'baton_reenqueue_seconds_bucket{{le="{le}"}} {n}' for le, n in (("2.5", 3.0), ("3.0", 5.0), ("+Inf", 5.0))]
    assert buckets("\n".join(["# HELP", *lines, "baton_reenqueue_seconds_sum 1"])) == {2.5: 3.0, 3.0: 2.0, float("inf"): 0.0}


# ---------------------------------------------------------------------------------------------------------------- slope


def test_a_steady_series_has_no_slope_and_a_growing_one_has_its_own() -> None:
    rng = random.Random(1)
    noise = [rng.gauss(0, 1) for _ in range(3600)]
    steady = trend([(float(s), 500 + noise[s]) for s in range(3600)])
    growing = trend([(float(s), 500 + s / 360 + noise[s]) for s in range(3600)])
    assert steady is not None and growing is not None
    assert abs(steady.slope) < 0.5 and steady.slope < steady.upper < 0.5
    assert growing.slope == pytest.approx(10, abs=0.5) and growing.upper > 10 - 0.1


def test_the_upper_bound_lies_above_the_true_slope_in_most_series() -> None:
    rng = random.Random(2)
    covered = 0
    for _ in range(200):
        level, series = 0.0, []
        for s in range(400):
            level = 0.5 * level + rng.gauss(0, 1)
            series.append((float(s), level))
        line = trend(series)
        assert line is not None
        covered += line.upper >= 0
    assert covered / 200 == pytest.approx(0.95, abs=0.05)


def test_too_few_samples_have_no_slope() -> None:
    assert trend([(float(s), 1.0) for s in range(39)]) is None


# --------------------------------------------------------------------------------------------------- faults of messages


def test_faults_of_messages() -> None:
    assert parse("") == MessageFault()
    fault = parse("drop:3,delay:2x0.25")
    assert fault == MessageFault(3, 2, 0.25)
    assert [n for n in range(1, 8) if fault.drops(n)] == [3, 6] and [n for n in range(1, 6) if fault.delays(n)] == [2, 4]
    assert not any(MessageFault().drops(n) or MessageFault().delays(n) for n in range(1, 100))


@pytest.mark.parametrize("text", ["drop", "drop:0", "delay:3", "delay:3x", "delay:3xinf", "lose:3", "drop:3,"])
def test_a_bad_fault_is_a_bad_setting(text: str) -> None:
    with pytest.raises(SettingError, match="message_fault is"):
        parse(text)


def test_a_seed_chooses_the_variant() -> None:
    assert options(["--seed", "2"]).prefix_reuse and not options(["--seed", "3"]).prefix_reuse
    assert options(["--seed", "3"]).transport == "tcp" and options(["--seed", "3", "--transport", "any"]).transport == "any"
    with pytest.raises(SystemExit):
        options(["--rate", "0"])
