"""Bugs in the gateway's rules that `./scripts/chaos`, or reading for it, has found, each as the few steps that show it."""

from __future__ import annotations

from common.errors import RequestError
from common.messages import Holding, Job, Key, Lost, Sampling, Started, Token, Tokens, WorkerBeat
from common.queue import Entry, Pending
from gateway.ask import Ask
from gateway.flight import Action, Confirm, End, Put
from gateway.ledger import PROGRESS, Ledger

ASK = Ask([1, 2, 3], Sampling(seed=1), 12)


def opened() -> Ledger:
    ledger = Ledger("g", "tcp://g")
    ledger.open("r", ASK, 0.0)
    return ledger


def jobs(actions: list[Action]) -> list[Job]:
    return [action.job for action in actions if isinstance(action, Put)]


def test_a_death_right_after_the_launch_has_begun_counts_though_no_beat_has_told_of_the_launch() -> None:
    """A request that kills its worker within a beat was never suspected, and killed one worker after the other until its deadline."""
    ledger = opened()
    suspicions = []
    for attempt, worker in enumerate(("p", "q"), 1):
        ledger.join(worker, "prefill")
        ledger.put("r", 0, attempt, Entry("resume", f"{attempt}-0"))
        ledger.event(worker, Started(Key("r", 0, attempt, f"e{attempt}")), 1.0)
        suspicions += [job.suspicion for job in jobs(ledger.dead(worker, 3.0))]
    assert suspicions == [1, 2]


def test_a_prompt_that_waits_for_its_handoff_is_no_longer_in_a_launch() -> None:
    ledger = opened()
    ledger.join("p", "prefill")
    ledger.put("r", 0, 1, Entry("interactive", "1-0"))
    key = Key("r", 0, 1, "e")
    ledger.event("p", Started(key), 1.0)
    ledger.event("p", Tokens(key, [Token(0, 7)]), 1.1)
    assert [job.suspicion for job in jobs(ledger.dead("p", 3.0))] == [0]


def test_only_the_first_death_without_a_word_counts() -> None:
    """Whoever is claimed in one go with poison dies like that again and again, and was ended for it; a suspect's launch is announced."""
    ledger = opened()
    suspicions = []
    for attempt, worker in enumerate("pqstu", 1):
        entry = Entry("resume", f"{attempt}-0")
        ledger.join(worker, "prefill")
        ledger.put("r", 0, attempt, entry)
        ledger.dead(worker, 10.0 * attempt)
        ledger.judge({entry: Pending(worker, 0.5)}, 10.0 * attempt + 1)
        suspicions += [job.suspicion for job in jobs(ledger.judge({entry: Pending(worker, 3.0)}, 10.0 * attempt + 4))]
    assert suspicions == [1] * 5


def test_a_request_that_kills_ends_at_the_third_death_though_nothing_was_heard_before_the_first() -> None:
    ledger = opened()
    entry = Entry("interactive", "1-0")
    ledger.put("r", 0, 1, entry)
    (second,) = jobs(ledger.judge({entry: Pending("p", 3.0)}, 4.0))
    assert second.suspicion == 1 and not second.alone
    ends = []
    for attempt, worker in enumerate(("q", "s"), 2):
        ledger.join(worker, "prefill")
        ledger.put("r", 0, attempt, Entry("resume", f"{attempt}-0"))
        ledger.event(worker, Started(Key("r", 0, attempt, f"e{attempt}")), 10.0 * attempt)
        ends = [action for action in ledger.dead(worker, 10.0 * attempt + 3) if isinstance(action, End)]
    assert isinstance(ends[0].error, RequestError) and ends[0].error.code == "poison"


def test_a_lost_reply_of_a_living_prefill_is_no_suspicion() -> None:
    ledger = opened()
    entry = Entry("interactive", "1-0")
    ledger.join("p", "prefill")
    ledger.put("r", 0, 1, entry)
    assert ledger.judge({entry: Pending("p", 2.5)}, 2.5)
    ledger.event("p", WorkerBeat("prefill", 1, 0, False, 1.0, 0, 0, 0, 0), 2.7)
    key = Key("r", 0, 2, "e")
    ledger.event("p", Started(key), 3.0)
    assert [job.suspicion for job in jobs(ledger.event("p", Lost(key, "drained"), 3.1))] == [0]


def test_a_claimer_that_has_just_died_is_suspected_though_its_death_is_not_noticed_yet() -> None:
    ledger = opened()
    entry = Entry("interactive", "1-0")
    ledger.join("p", "prefill")
    ledger.put("r", 0, 1, entry)
    assert [job.suspicion for job in jobs(ledger.judge({entry: Pending("p", 2.1)}, 2.2))] == [1]


def test_an_entry_of_a_dead_claimer_is_put_again_though_the_clock_of_redis_was_set_back() -> None:
    """Redis measures how long an entry has been pending by its wall clock: set back an hour, it says 0 for an hour."""
    ledger = opened()
    entry = Entry("interactive", "1-0")
    ledger.put("r", 0, 1, entry)
    assert ledger.judge({entry: Pending("dead", 0.0)}, 3.0) == []
    assert jobs(ledger.judge({entry: Pending("dead", 0.0)}, 5.5))


def test_a_fresh_claim_is_given_its_time_though_the_clock_of_redis_was_set_forward() -> None:
    ledger = opened()
    entry = Entry("interactive", "1-0")
    ledger.put("r", 0, 1, entry)
    assert ledger.judge({entry: Pending("p", 3600.0)}, 3.0) == []


def test_it_is_told_since_when_nobody_has_spoken_of_a_request_that_is_put_again() -> None:
    ledger = opened()
    ledger.join("p", "prefill")
    ledger.put("r", 0, 1, Entry("interactive", "1-0"))
    ledger.event("p", Started(Key("r", 0, 1, "e")), 1.0)
    assert [action.silent_since for action in ledger.dead("p", 3.2) if isinstance(action, Put)] == [1.0]


def test_silence_while_the_gateway_itself_was_stopped_proves_nothing() -> None:
    """After a pause of the whole machine every running request was started again, although their tokens lay in the socket."""
    ledger = opened()
    ledger.join("p", "prefill")
    ledger.put("r", 0, 1, Entry("interactive", "1-0"))
    ledger.event("p", Started(Key("r", 0, 1, "e")), 1.0)
    assert ledger.tick(1.5) == []
    assert ledger.tick(9.0) == []
    assert [ledger.tick(9.0 + 0.5 * n) for n in range(1, 5)] == [[]] * 4
    assert jobs(ledger.tick(11.5)), "from then on it counts"


def test_the_launch_of_a_suspect_is_confirmed_at_once() -> None:
    """Its worker waits for that: a death before it cannot have been in the launch."""
    ledger = opened()
    ledger.join("p", "prefill")
    ledger.put("r", 0, 1, Entry("interactive", "1-0"))
    assert ledger.event("p", Started(Key("r", 0, 1, "e")), 1.0) == [] == ledger.launched("p"), "nobody has died with it yet"
    ledger.dead("p", 3.0)
    ledger.join("q", "prefill")
    key = Key("r", 0, 2, "f")
    ledger.event("q", WorkerBeat("prefill", 1, 0, False, 1.0, 0, 0, 0, 0, holding=[Holding(key, 0, False, False)]), 4.0)
    assert ledger.launched("q") == [], "known there, not launched"
    assert ledger.event("q", Started(key), 4.1) == [Confirm("q")]
    assert ledger.launched("q") == [key] and ledger.launched("p") == []
    ledger.event("q", Tokens(key, [Token(0, 7)]), 4.2)
    assert ledger.launched("q") == []


def test_a_suspect_is_confirmed_though_the_suspicion_was_taken_back() -> None:
    """Its worker waits by what the job says: the whole engine stood still for two seconds."""
    ledger = opened()
    ledger.join("p", "prefill")
    ledger.put("r", 0, 1, Entry("interactive", "1-0"))
    ledger.event("p", Started(Key("r", 0, 1, "e")), 1.0)
    (job,) = jobs(ledger.dead("p", 3.0))
    assert job.suspicion == 1
    ledger.event("p", WorkerBeat("prefill", 1, 0, False, 1.0, 0, 0, 0, 0), 3.5)  # it was only silent
    ledger.join("q", "prefill")
    key = Key("r", 0, 2, "f")
    assert ledger.event("q", Started(key), 4.0) == [Confirm("q")]
    assert ledger.launched("q") == [key]


def test_choices_that_ride_with_a_suspect_are_confirmed_as_well() -> None:
    """They begin on a decode by themselves, and the job that brought them there is under suspicion."""
    ledger = Ledger("g", "tcp://g")
    ledger.open("r", Ask([1, 2, 3], Sampling(seed=1), 8, n=2), 0.0)
    ledger.join("p", "prefill")
    ledger.put("r", 0, 1, Entry("interactive", "1-0"))
    ledger.event("p", Started(Key("r", 0, 1, "e")), 1.0)
    (job,) = jobs(ledger.dead("p", 3.0))
    assert job.suspicion == 1 and [choice.choice for choice in job.choices] == [0, 1]
    ledger.join("d", "decode")
    for choice in job.choices:
        assert ledger.event("d", Started(Key("r", choice.choice, choice.attempt, "f")), 4.0) == [Confirm("d")]
    assert len(ledger.launched("d")) == 2


def test_a_long_answer_that_meets_many_deaths_is_no_poison() -> None:
    """What kills comes no further each time; ten minutes of faults ended a request that had only been there long enough."""
    ledger = Ledger("g", "tcp://g")
    ledger.open("r", Ask([1, 2, 3], Sampling(seed=1), 1000), 0.0)
    suspicions = []
    for attempt in range(1, 6):
        prefill, decode, key = f"p{attempt}", f"d{attempt}", Key("r", 0, attempt, "e")
        ledger.join(prefill, "prefill")
        ledger.join(decode, "decode")
        ledger.event(prefill, Started(key), 10.0 * attempt)
        ledger.event(decode, Started(key), 10.0 * attempt)
        first = PROGRESS * (attempt - 1)
        ledger.event(decode, Tokens(key, [Token(index, 7) for index in range(first, first + PROGRESS)]), 10.0 * attempt + 1)
        suspicions += [job.suspicion for job in jobs(ledger.dead(decode, 10.0 * attempt + 3))]
    assert suspicions == [1] * 5
