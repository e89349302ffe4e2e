"""Pieces of an answer and the bodies made of them: stop strings and logprobs side by side, usage, errors, timeline."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadRequest, Unavailable
from common.messages import FinishReason, Logprob, Sampling, Token
from gateway.ask import Ask, Timeline, Update
from gateway.prompts import Model
from gateway.replies import Form, error_body, timeline_body, usage_body
from gateway.speech import Broken, Piece, Speech, Usage
from gateway.sse import event

EOS = 2


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model(smollm2, "m")


class Told:
    """An answer that says what it was told."""

    def __init__(self, updates: list[Update]) -> None:
        self.timeline = Timeline()
        self.cancels = 0
        self._updates = updates

    async def __aiter__(self) -> AsyncIterator[Update]:
        for update in self._updates:
            yield update

    def cancel(self) -> None:
        self.cancels += 1


def updates(ids: list[int], together: int = 1, finish: FinishReason = "stop") -> list[Update]:
    tokens = [Token(index, id, Logprob(-1.0 - index, [(id, -1.0 - index), (5, float("-inf"))])) for index, id in enumerate(ids)]
    batches = [tokens[at : at + together] for at in range(0, len(tokens), together)] or [[]]
    return [Update(batch, finish if batch is batches[-1] else None) for batch in batches]


def speech(model: Model, answer: Told, stops: list[str] | None = None) -> Speech:
    return Speech(answer, Ask([7, 8, 9], Sampling(), 100, [EOS]), stops or [], model)


async def pieces(model: Model, ids: list[int], stops: list[str] | None = None, together: int = 1) -> tuple[list[Piece], Speech, Told]:
    answer = Told(updates(ids, together))
    found = speech(model, answer, stops)
    return [piece async for piece in found.pieces()], found, answer


def text(found: list[Piece]) -> str:
    return "".join(piece.text for piece in found)


# --------------------------------------------------------------------------------------------------------------- speech


async def test_an_answer_to_its_end(model: Model) -> None:
    ids = [*model.encode("Grüße 🦜!"), EOS]
    found, said, answer = await pieces(model, ids)
    assert text(found) == "Grüße 🦜!" and found[-1].finish == "stop" and all(piece.finish is None for piece in found[:-1])
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (3, len(ids))
    assert [spoken.token.id for piece in found for spoken in piece.tokens] == ids[:-1]
    assert answer.cancels


@given(data=st.data())
async def test_tokens_and_text_keep_together(model: Model, data: st.DataObject) -> None:
    """Whatever the stop strings and batches: the tokens reported are exactly those whose text begins in the text shown."""
    whole = data.draw(st.sampled_from(["one two three. four 🦜🦜 five", "aaaa bbbb aaaa", "日本語 and more 日本"]))
    ids = model.encode(whole)
    stop = data.draw(st.lists(st.sampled_from(["two t", "🦜 f", "a b", "本語", "re 日", "zzz", "aaaa bbbb aaaa!"]), max_size=2))
    found, _, _ = await pieces(model, ids, stop, data.draw(st.integers(1, 5)))
    shown = text(found)
    expected = min((whole.split(one)[0] for one in stop), key=len, default=whole)
    assert shown == expected
    spoken = [one for piece in found for one in piece.tokens]
    assert [one.token.id for one in spoken] == ids[: len(spoken)]
    assert all(one.offset < len(shown) for one in spoken)
    assert shown in model.decode([one.token.id for one in spoken]) or shown == ""


async def test_work_ends_before_the_last_piece_is_shown(model: Model) -> None:
    """So that the timeline in the last chunk is complete."""
    answer = Told(updates(model.encode("one two three"), 1))
    async for piece in speech(model, answer, [" two"]).pieces():
        if piece.finish is not None:
            assert answer.cancels
    assert answer.cancels


async def test_an_error_is_raised_and_the_work_ends(model: Model) -> None:
    answer = Told([Update([Token(0, 100)]), Update([], error=Unavailable("all dead"))])
    heard = []
    with pytest.raises(Unavailable):
        async for piece in speech(model, answer).pieces():
            heard.append(piece)
    assert len(heard) == 1 and answer.cancels


async def test_an_answer_without_an_end_is_our_fault(model: Model) -> None:
    with pytest.raises(Broken) as broken:
        async for _ in speech(model, Told([Update([Token(0, 100)])])).pieces():
            pass
    assert broken.value.status == 500


async def test_leaving_cancels(model: Model) -> None:
    answer = Told(updates(model.encode("one two three")))
    found = speech(model, answer).pieces()
    await anext(found)
    await found.aclose()
    assert answer.cancels


async def test_special_tokens_after_an_ignored_end_are_counted_not_shown(model: Model) -> None:
    answer = Told(updates([100, EOS, 0, 101], finish="length"))
    found = Speech(answer, Ask([7], Sampling(), 4, []), [], model)
    said = [piece async for piece in found.pieces()]
    assert text(said) == model.decode([100, 101]) and found.usage.completion_tokens == 4


# --------------------------------------------------------------------------------------------------------------- bodies


def form(model: Model, *, chat: bool, logprobs: int = -1) -> Form:
    return Form("id", chat, model, logprobs)


async def test_logprobs_of_half_characters(model: Model) -> None:
    """Bytes as they are, and names that JSON can carry."""
    ids = model.encode("a🦜")
    found, said, _ = await pieces(model, ids)
    entries = form(model, chat=True, logprobs=2).whole([found], said.usage)["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "a🦜"
    assert [entry["logprob"] for entry in entries] == [-1.0 - n for n in range(len(ids))]
    assert entries[0]["top_logprobs"][1]["logprob"] == -9999.0
    old = form(model, chat=False, logprobs=2).whole([found], said.usage)["choices"][0]["logprobs"]
    assert old["tokens"][0] == "a" and old["tokens"][1].startswith("bytes:\\xf0") and old["text_offset"][:2] == [0, 1]
    assert set(old["text_offset"][1:]) == {1}
    for body in (entries, old):
        json.loads(json.dumps(body, allow_nan=False))


async def test_number_of_alternatives(model: Model) -> None:
    found, said, _ = await pieces(model, model.encode(" one two"))
    for asked in (0, 1, 2):
        chat: Any = form(model, chat=True, logprobs=asked).whole([found], said.usage)["choices"][0]["logprobs"]
        assert {len(entry["top_logprobs"]) for entry in chat["content"]} == {asked}
        old: Any = form(model, chat=False, logprobs=asked).whole([found], said.usage)["choices"][0]["logprobs"]
        assert {len(top) for top in old["top_logprobs"]} == {max(asked, 1)}
        assert all(token in top for token, top in zip(old["tokens"], old["top_logprobs"], strict=True))
    assert form(model, chat=True).whole([found], said.usage)["choices"][0]["logprobs"] is None


def test_errors_can_always_be_said() -> None:
    error = BadRequest("\ud800" + "x" * 1000, param="\udfff")
    body = error_body(error)["error"]
    assert body["message"].startswith("\\ud800xxx") and len(body["message"]) < 520 and body["param"] == "\\udfff"
    json.dumps(body, ensure_ascii=False).encode()


def test_stages_add_up() -> None:
    timeline = Timeline(0.1, 0.2, 0.03, 0.004, 0.5, 0.35, 1.0, 2)
    body = timeline_body(timeline)["timeline"]
    stages = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other")
    assert sum(body[f"{stage}_ms"] for stage in stages) == pytest.approx(body["total_ms"]) == 1000
    assert body["attempts"] == 2 and body["ttft_ms"] == 350


def test_a_timeline_never_shows_a_stage_below_zero_and_still_adds_up() -> None:
    """The first token may be slower on its way to the gateway than the last one: then the stages overlap by the difference."""
    timeline = Timeline(prefill_queue_s=0.010, prefill_s=0.1, transfer_s=0.02, decode_queue_s=0.0, decode_s=0.2, total_s=0.327)
    settled = timeline.settled()
    assert timeline.other_s < 0
    assert settled.other_s == pytest.approx(0.0) and settled.prefill_queue_s == pytest.approx(0.007)


def test_usage_always_tells_of_cached_tokens() -> None:
    counts = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert usage_body(Usage(5, 2)) == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    assert usage_body(Usage(40, 2, 32))["prompt_tokens_details"] == {"cached_tokens": 32}


def test_an_event_is_one_line_for_everybody() -> None:
    """Clients that split as Unicode has it (Python's `splitlines`, httpx) would get half a JSON."""
    text = "one\u2028two\u2029three\x85four\x0b\x0c\x1c\x1d\x1e\r\nfünf 六"
    said = event({"text": text})
    assert said.splitlines() == [said.removesuffix("\n\n"), ""]
    assert json.loads(said.removeprefix("data: ")) == {"text": text} and "fünf 六" in said
