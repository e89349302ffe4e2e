"""The codec: what was encoded comes back, neighbouring versions can talk, and other bytes are a MessageError and nothing else."""

from __future__ import annotations

import os
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from common import messages as m
from common.errors import MessageError
from common.messages import decode, encode

KEY = m.Key("r1", 0, 2, "e1")
LAYOUT = m.Layout(30, 3, 16, 64, "bfloat16")
SHARD = m.Shard(0, (0, 30), (0, 3))
TOKENS = [m.Token(4, 11), m.Token(5, 12, m.Logprob(-0.5, [(12, -0.5), (13, -1.5)]))]
JOB = m.Job("r1", "g", "tcp://127.0.0.1:1", [1, 2, 3], [m.Choice(0, 1, [9]), m.Choice(1, 0)], m.Sampling(logit_bias={7: -1.0}), 64)
GRANTED = m.Granted(1, 2, [5, -1, 6], [m.GrantedRank(SHARD, b"\x00ucx\xff")])
BEAT = m.WorkerBeat("decode", 7, 70, True, 3.0, 5, 10, 2, 1, holding=[m.Holding(KEY, 6, False, True)])

EXAMPLES = int(os.environ.get("BATON_TEST_EXAMPLES", "50000")) if os.environ.get("BATON_TEST_FULL") else 300
pytestmark = pytest.mark.timeout(3600 if os.environ.get("BATON_TEST_FULL") else 120)

EVENTS: list[Any] = [
    m.Started(KEY, 0.1),
    m.Tokens(KEY, TOKENS, 0.2, 0.3),
    m.Handed(KEY, "d"),
    m.Finished(KEY, 6, "length"),
    m.Lost(KEY, "preempted", "no room"),
    m.Resent(KEY, started=True, tokens=TOKENS, end=m.Finished(KEY, 6, "stop")),
    BEAT,
]
TO_WORKER: list[Any] = [
    m.GatewayBeat(1, "tcp://h:1", "f", "p", seen=[(KEY, 3, False)]),
    m.Cancel(KEY),
    m.Resend(KEY, 3),
    m.PeerBeat(1, 0, "f", "p", LAYOUT, [SHARD], [1, 2]),
    m.Offer(1, KEY, JOB, 33, [b"h" * 16] * 2, 5.0),
    m.Pushed(1, 2, [(0, TOKENS[0])], [[2**63, 2**64 - 1]], 0.1),
    m.Withdraw(1),
]
TO_PEER: list[Any] = [
    BEAT,
    m.Waiting(1),
    GRANTED,
    m.Refused(1, "full"),
    m.Committed(1),
    m.Rejected(1, 0, [3]),
    m.Withdrawn(1, GRANTED),
    m.Mismatch("another model"),
]
FLEET = [m.Introduction("decode", "d", "tcp://h:1", "p", LAYOUT, [SHARD], 640), m.Identity("p", "smollm2", "t", 8192, 512, 16)]
WHOLE: list[Struct] = [
    JOB,
    *FLEET,
    *[m.Parcel("w", "g", [event]) for event in EVENTS],
    m.Parcel("w", "g", EVENTS),
    *[m.Letter("a", "b", body) for body in TO_WORKER + TO_PEER],
]
KINDS = [m.Job, m.Parcel, m.Letter, m.Introduction, m.Identity]


@pytest.mark.parametrize("message", WHOLE, ids=lambda message: type(getattr(message, "body", message)).__name__)
def test_every_message_comes_back_as_it_was(message: Struct) -> None:
    assert decode(encode(message), type(message)) == message
    assert decode(memoryview(encode(message)), type(message)) == message


def test_the_samples_are_all_there_is() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(m.Event))
    assert {type(body) for body in TO_WORKER} == set(get_args(m.ToWorker))
    assert {type(body) for body in TO_PEER} == set(get_args(m.ToPeer))


def test_one_kind_is_not_taken_for_another() -> None:
    for message in WHOLE:
        for kind in KINDS:
            if type(message) is not kind:
                with pytest.raises(MessageError, match=kind.__name__):
                    decode(encode(message), kind)


@pytest.mark.parametrize("message", [JOB, *FLEET, *TO_WORKER, *TO_PEER, *EVENTS], ids=lambda message: type(message).__name__)
def test_a_field_of_a_newer_version_is_ignored(message: Struct) -> None:
    fields = msgspec.msgpack.decode(encode(message))
    fields["from_the_future"] = {"a": [1]}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=type(message)) == message


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", ["a"]), ("prompt", [1.5]), ("max_tokens", "64"), ("gateway", 1), ("choices", {}), ("deadline_s", None), ("sampling", [])],
)
def test_a_field_of_another_type_is_refused_by_name(field: str, value: object) -> None:
    fields = msgspec.msgpack.decode(encode(JOB))
    fields[field] = value
    with pytest.raises(MessageError, match=field):
        decode(msgspec.msgpack.encode(fields), m.Job)


def test_a_word_of_pages_without_a_first_token_is_refused() -> None:
    """It ended the decode that judged them."""
    with pytest.raises(MessageError, match="not a Letter"):
        m.decode(m.encode(m.Letter("p", "d", m.Pushed(1, 1, [], [[1]]))), m.Letter)


def test_a_message_is_plain_msgpack_and_names_its_type() -> None:
    assert msgspec.msgpack.decode(encode(m.Letter("a", "b", m.Withdraw(3))))["body"] == {"type": "Withdraw", "handoff": 3}


def test_nesting_without_end_is_an_error_and_no_crash() -> None:
    deep = b"\x91" * 100_000 + b"\x01"
    with pytest.raises(MessageError):
        decode(b"\x82\xa4type\xa3Job\xa1x" + deep, m.Job)


@settings(max_examples=EXAMPLES)
@given(data=st.binary(max_size=300), kind=st.sampled_from(KINDS))
def test_random_bytes_are_a_message_error(data: bytes, kind: type[Struct]) -> None:
    with pytest.raises(MessageError):
        decode(data, kind)


@settings(max_examples=EXAMPLES)
@given(message=st.sampled_from(WHOLE), cuts=st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=3)), min_size=1, max_size=4))
def test_mutated_messages_are_messages_or_a_message_error(message: Struct, cuts: list[tuple[int, bytes]]) -> None:
    data = encode(message)
    for place, instead in cuts:
        at = place % len(data) if data else 0
        data = data[:at] + instead + data[at + 1 :]
    for kind in KINDS:
        try:
            assert isinstance(decode(data, kind), kind)
        except MessageError as error:
            assert str(error)


@given(message=st.sampled_from(WHOLE), length=st.integers(0, 2000))
def test_a_message_cut_short_is_refused(message: Struct, length: int) -> None:
    data = encode(message)
    with pytest.raises(MessageError):
        decode(data[: length % len(data)], type(message))


def test_layout_counts_bytes_and_pages() -> None:
    assert LAYOUT.page_bytes == 30 * 2 * 3 * 16 * 64 * 2
    assert [LAYOUT.pages(tokens) for tokens in (1, 16, 17)] == [1, 1, 2]
    assert m.Layout(1, 1, 1, 1, "float32").page_bytes == 8


def test_an_empty_execution_means_any_of_that_attempt() -> None:
    assert m.Key("r", 0, 1, "").covers(m.Key("r", 0, 1, "x"))
    assert m.Key("r", 0, 1, "x").covers(m.Key("r", 0, 1, "x"))
    assert not m.Key("r", 0, 1, "x").covers(m.Key("r", 0, 1, "y"))
    assert not m.Key("r", 0, 1, "").covers(m.Key("r", 0, 2, "x"))
    assert not m.Key("r", 0, 1, "").covers(m.Key("r", 1, 1, "x"))


def test_an_error_does_not_repeat_what_was_sent() -> None:
    """It goes into a log; what was sent may be somebody's prompt."""
    fields = msgspec.msgpack.decode(encode(m.Introduction("decode", "d", "tcp://h:1", "p")))
    for name in ("role", "type"):
        with pytest.raises(MessageError) as refused:
            decode(msgspec.msgpack.encode({**fields, name: "my 'secret' \nprompt"}), m.Introduction)
        assert "secret" not in str(refused.value) and name in str(refused.value)
        assert refused.value.__cause__ is None and refused.value.__suppress_context__


# ------------------------------------------------------------------------------------------- every message, out of shape

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
names = st.text(max_size=8)
nodes = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6)


@st.composite
def out_of_shape(draw: st.DrawFn) -> bytes:
    """A message with one or more of its parts, wherever they lie, replaced, doubled or left out; then perhaps bytes too many or too few."""
    whole = msgspec.msgpack.decode(encode(draw(st.sampled_from(WHOLE))))
    for _ in range(draw(st.integers(1, 3))):
        whole = _bent(draw, whole)
    data = msgspec.msgpack.encode(whole)
    return draw(st.sampled_from([data, data[:-1], data + b"\x00", data * 2, data + draw(st.binary(max_size=4))]))


def _bent(draw: st.DrawFn, node: Any) -> Any:
    if not isinstance(node, dict | list) or not node or draw(st.integers(0, 4)) == 0:
        return draw(nodes)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    at = draw(st.sampled_from(keys))
    copy = node.copy()
    match draw(st.sampled_from(["deeper", "deeper", "deeper", "out", "double"])):
        case "deeper":
            copy[at] = _bent(draw, node[at])
        case "out":
            del copy[at]
        case _ if isinstance(copy, list):
            copy += copy
        case _:
            copy[draw(st.text(max_size=8))] = node[at]
    return copy


@settings(max_examples=EXAMPLES)
@given(data=out_of_shape())
def test_messages_out_of_shape_are_messages_or_the_one_refused_error(data: bytes) -> None:
    for kind in KINDS:
        try:
            message = decode(data, kind)
        except MessageError as error:
            assert len(str(error)) < 400
        else:
            assert isinstance(message, kind) and decode(encode(message), kind) is not None
