"""Ids to text while they come: exactly the tokenizer's own text, and never half a character on the way."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prompts import Model
from gateway.text import HALF, ByteText, Detokenizer, WindowText, detokenizer
from tests.unit.sentences import Sentences

PIECES = ["Hello", " world", "日本語の文章", "🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "é", "e\u0301", "ß", "Привет", "\n\n", "    ", "안녕", "𝔘", "\t", "…"]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model(smollm2)


def said(text: Detokenizer, ids: list[int]) -> list[str]:
    return [*(text.add(token) for token in ids), text.end()]


def test_byte_level_is_recognised(model: Model) -> None:
    assert isinstance(detokenizer(model), ByteText)
    assert isinstance(detokenizer(Sentences()), WindowText)


@given(ids=st.lists(st.integers(0, 49151), max_size=60))
def test_any_ids_give_the_tokenizers_text(model: Model, ids: list[int]) -> None:
    assert "".join(said(detokenizer(model), ids)) == model.decode(ids)


@given(data=st.data())
def test_runs_of_single_bytes_give_the_tokenizers_text(model: Model, data: st.DataObject) -> None:
    """Valid, cut and senseless UTF-8, in tokens of one byte each, with special tokens strewn in."""
    single = {model.raw(token): token for token in range(2000) if len(model.raw(token)) == 1}
    runs = st.one_of(st.binary(max_size=6), st.sampled_from(PIECES).map(lambda piece: piece.encode()))
    raw = b"".join(data.draw(st.lists(runs, max_size=8)))
    ids = [single[bytes([byte])] for byte in raw if bytes([byte]) in single]
    for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(place, data.draw(st.sampled_from([0, 1, 2])))
    assert "".join(said(detokenizer(model), ids)) == model.decode(ids)


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
def test_real_text_is_never_shown_in_halves(model: Model, pieces: list[str]) -> None:
    text = "".join(pieces)
    parts = said(detokenizer(model), model.encode(text))
    assert HALF not in "".join(parts)
    assert "".join(parts) == text


def test_a_character_appears_with_its_last_byte(model: Model) -> None:
    ids = model.encode("🦜")
    assert len(ids) > 1
    parts = said(detokenizer(model), ids)
    assert parts == [""] * (len(ids) - 1) + ["🦜", ""]


def test_an_incomplete_character_ends_as_the_tokenizer_shows_it(model: Model) -> None:
    ids = model.encode("a🦜")[:-1]
    parts = said(detokenizer(model), ids)
    assert HALF not in "".join(parts[:-1])
    assert "".join(parts) == model.decode(ids) == "a" + HALF


def test_special_tokens_are_no_text(model: Model) -> None:
    assert said(detokenizer(model), [1, 2, 0]) == [""] * 4


def test_padding_of_the_vocabulary_is_no_text(model: Model) -> None:
    assert said(detokenizer(model), [49152, 10**6]) == ["", "", ""]


# ------------------------------------------------------------------------------------------------- SentencePiece style


def test_spaces_between_words_stay_and_the_first_goes() -> None:
    tokenizer = Sentences()
    hello, world, wor, ld = tokenizer.words[:4]
    assert said(WindowText(tokenizer), [1, hello, world, world, wor, ld]) == ["", "Hello", " world", " world", "wor", "ld", ""]


@given(data=st.data())
def test_windows_give_the_tokenizers_text(data: st.DataObject) -> None:
    tokenizer = Sentences()
    word = st.sampled_from(tokenizer.words).map(lambda id: [id])
    character = st.sampled_from("日本🙂é\u0301ß").map(tokenizer.ids_of)
    special = st.sampled_from([[0], [1], [2]])
    ids = [id for run in data.draw(st.lists(st.one_of(word, character, special), max_size=30)) for id in run]
    parts = said(WindowText(tokenizer), ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert all(HALF not in part for part in parts)


@pytest.mark.parametrize("tail", [[], [3 + 0xF0, 3 + 0x9F]])
def test_a_window_forgets_bytes_that_never_become_a_character(tail: list[int]) -> None:
    tokenizer = Sentences()
    text = WindowText(tokenizer)
    shown = said(text, [3 + 0xFF] * 500 + tail)
    assert len(text._ids) <= 64
    assert set("".join(shown)) == {HALF}


@pytest.mark.parametrize("kind", ["bytes", "window"])
def test_the_cost_of_a_token_does_not_grow(model: Model, kind: str) -> None:
    """A quadratic detokenizer needs minutes for this."""
    tokenizer = model if kind == "bytes" else Sentences()
    text = detokenizer(tokenizer)
    begin = time.perf_counter()
    for number in range(20000):
        text.add(0 if number % 2 else 260)
    assert time.perf_counter() - begin < 10
