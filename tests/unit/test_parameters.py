"""Request bodies to asks: every field's defaults, bounds and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadRequest, NotFound, RequestError
from common.messages import Sampling
from gateway.ask import Ask
from gateway.parameters import COMPLETION, HARMLESS, Limits, Wish, parse
from gateway.prompts import Model

NAME = "m"
LIMITS = Limits(context_tokens=100, deadline_s=600.0)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model(smollm2, NAME)


def chat(model: Model, /, **fields: Any) -> Wish:
    return parse(json.dumps({"model": NAME, "messages": HELLO, **fields}).encode(), model, LIMITS, chat=True)


def complete(model: Model, /, **fields: Any) -> Wish:
    return parse(json.dumps({"model": NAME, "prompt": "Hello", **fields}).encode(), model, LIMITS, chat=False)


# ------------------------------------------------------------------------------------------------------------ what is taken


def test_defaults_of_a_completion(model: Model) -> None:
    wish = complete(model)
    assert wish.asks[0].prompt == model.encode("Hello")
    assert wish.asks[0].max_tokens == 16 and wish.asks[0].stop_ids == model.eos_ids and wish.asks[0].deadline_s == 600.0
    assert (wish.stream, wish.stops, wish.include_usage, wish.timeline, wish.chat) == (False, [], False, False, False)
    sampling = wish.asks[0].sampling
    assert sampling == Sampling(seed=sampling.seed)


def test_chat_uses_the_template_and_fills_the_context(model: Model) -> None:
    wish = chat(model)
    text = model._backend.decode(wish.asks[0].prompt, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert wish.asks[0].max_tokens == 100 - len(wish.asks[0].prompt)


@pytest.mark.parametrize("n", [1, 3])
def test_a_default_is_never_more_than_the_key_has(model: Model, n: int) -> None:
    def asked(minute_tokens: int, *, is_chat: bool, **fields: Any) -> list[Ask]:
        body = {"model": NAME, "n": n, **({"messages": HELLO} if is_chat else {"prompt": "Hello"}), **fields}
        return parse(json.dumps(body).encode(), model, Limits(100, 600.0, minute_tokens=minute_tokens), chat=is_chat).asks

    for is_chat, fields in [(True, {}), (False, {}), (False, {"prompt": ["Hello", "Hello, world"]})]:
        usual = asked(10**6, is_chat=is_chat, **fields)
        prompts = sum(len(ask.prompt) for ask in usual)
        for more in (0, 6, 20, 2000):
            tight = asked(prompts + more, is_chat=is_chat, **fields)
            share = more // (n * len(tight))
            assert [ask.max_tokens for ask in tight] == [max(1, min(one.max_tokens, share)) for one in usual]
    assert asked(1, is_chat=False, max_tokens=50)[0].max_tokens == 50, "what is named is for the key's meter to refuse"


def test_more_answers_than_ever_run_at_once_are_refused_for_good(model: Model) -> None:
    few = Limits(100, 600.0, most_running=4)
    for fields, words in [({"n": 5}, "n must be from 1 to 4"), ({"n": 2, "prompt": ["a", "b", "c"]}, "there may be 4 answers")]:
        with pytest.raises(BadRequest, match=words) as refused:
            parse(json.dumps({"model": NAME, "prompt": "Hello", **fields}).encode(), model, few, chat=False)
        assert refused.value.param == "n"


def test_every_parameter_arrives(model: Model) -> None:
    wish = complete(
        model,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=-1,
        stop=["a", "b"],
        presence_penalty=-1,
        frequency_penalty=1.5,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "6": 2.5},
        logprobs=3,
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
        timeline=True,
    )
    assert wish.asks[0].sampling == Sampling(2**64 - 1, 0.5, 0.9, 40, 0.05, -1.0, 1.5, 1.1, {5: -100.0, 6: 2.5}, 3)
    assert wish.asks[0].max_tokens == 7 and wish.asks[0].stop_ids == [] and wish.stops == ["a", "b"]
    assert wish.stream and wish.include_usage and wish.timeline


def test_a_seed_is_drawn_if_none_is_given(model: Model) -> None:
    assert len({complete(model).asks[0].sampling.seed for _ in range(5)}) == 5
    assert complete(model, seed=7).asks[0].sampling.seed == 7


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]], ["Hello"], "Hello"])
def test_forms_of_a_prompt(model: Model, prompt: Any) -> None:
    expected = model.encode("Hello") if "Hello" in prompt else [1, 2, 3]
    assert complete(model, prompt=prompt).asks[0].prompt == expected


def test_text_parts_are_joined(model: Model) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(model, messages=[{"role": "user", "content": parts}]).asks[0].prompt == chat(model).asks[0].prompt


def test_a_developer_is_the_system(model: Model) -> None:
    said = [[{"role": role, "content": "Be brief."}, *HELLO] for role in ("developer", "system")]
    assert chat(model, messages=said[0]).asks[0].prompt == chat(model, messages=said[1]).asks[0].prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True},
        {"n": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "logprobs": False},
        {"n": None, "tools": None, "no_such_field": None, "temperature": None, "stop": None, "logprobs": None, "seed": None},
        {"temperature": 0, "top_p": 1, "top_k": -1, "logit_bias": {}, "stop": []},
        {"stream": True, "stream_options": {"include_usage": None}},
    ],
)
def test_harmless_fields_and_null_are_taken(model: Model, fields: dict[str, Any]) -> None:
    assert chat(model, **fields).asks[0].prompt == chat(model).asks[0].prompt


def test_max_completion_tokens_goes_before_max_tokens(model: Model) -> None:
    assert chat(model, max_tokens=5, max_completion_tokens=6).asks[0].max_tokens == 6
    assert chat(model, max_tokens=5).asks[0].max_tokens == 5


def test_chat_logprobs(model: Model) -> None:
    assert chat(model).asks[0].sampling.logprobs == -1
    assert chat(model, logprobs=True).asks[0].sampling.logprobs == 0
    assert chat(model, logprobs=True, top_logprobs=20).asks[0].sampling.logprobs == 20


def test_a_temperature_that_would_overflow_is_greedy(model: Model) -> None:
    assert chat(model, temperature=1e-300).asks[0].sampling.temperature == 0.0


def test_the_context_can_be_filled_to_the_last_token(model: Model) -> None:
    assert complete(model, prompt=[5] * 99, max_tokens=1).asks[0].max_tokens == 1
    assert complete(model, prompt=[5] * 95).asks[0].max_tokens == 5


def test_several_prompts_and_answers(model: Model) -> None:
    wish = complete(model, prompt=["Hello", [5, 6]], n=3, best_of=3, echo=True, deadline=2.5, priority="batch")
    assert [ask.prompt for ask in wish.asks] == [model.encode("Hello"), [5, 6]] and wish.echo
    assert {(ask.n, ask.deadline_s, ask.job_class) for ask in wish.asks} == {(3, 2.5, "batch")}
    assert chat(model, n=2).asks[0].n == 2


# ---------------------------------------------------------------------------------------------------------- what is refused

BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 33}, "n"),
    ({"best_of": 1}, "best_of"),
    ({"echo": True}, "echo"),
    ({"priority": 5}, "priority"),
    ({"priority": "urgent"}, "priority"),
    ({"deadline": 0}, "deadline"),
    ({"deadline": 601}, "deadline"),
    ({"deadline": "soon"}, "deadline"),
    ({"n": True}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{}]}, "functions"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"store": True}, "store"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"prompt": "x"}, "prompt"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[1].content"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"max_completion_tokens": 101}, "max_completion_tokens"),
    ({"messages": [{"role": "user", "content": "word " * 200}]}, "messages"),
]

BAD_COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"echo": 1}, "echo"),
    ({"echo": True, "logprobs": 0}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"prompt": ["a"] * 17, "n": 2}, "n"),
    ({"prompt": ["a"] * 33}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": HELLO}, "messages"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [49152]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [5] * 100}, "prompt"),
    ({"prompt": "word " * 100}, "prompt"),
    ({"prompt": "x" * 100_000}, "prompt"),
    ({"prompt": "\ud83d"}, "prompt"),
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 100}, "max_tokens"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.0}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": [None]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 501}, "stop"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"49152": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": {"5": None}}, "logit_bias"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": 5}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"timeline": "x"}, "timeline"),
]


@pytest.mark.parametrize(
    ("fields", "job_class"),
    [
        ({}, "interactive"),
        ({"service_tier": "auto"}, "interactive"),
        ({"service_tier": "default", "priority": "batch"}, "batch"),
        ({"service_tier": "flex"}, "batch"),
        ({"service_tier": "flex", "priority": "batch"}, "batch"),
        ({"service_tier": "priority"}, "priority"),
    ],
)
def test_classes_by_tier(model: Model, fields: dict[str, Any], job_class: str) -> None:
    assert complete(model, prompt="a", **fields).asks[0].job_class == job_class


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"service_tier": "scale"}, "service_tier"),
        ({"service_tier": ["flex"]}, "service_tier"),
        ({"service_tier": "priority", "priority": "batch"}, "priority"),
        ({"priority": "priority"}, "priority"),
    ],
)
def test_what_is_no_tier(model: Model, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        complete(model, prompt="a", **fields)
    assert refused.value.param == param


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT, ids=lambda value: str(value)[:40])
def test_bad_chat(model: Model, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        chat(model, **fields)
    assert refused.value.param == param
    assert param.partition("[")[0].partition(".")[0] in refused.value.message or "prompt" in refused.value.message


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETION, ids=lambda value: str(value)[:40])
def test_bad_completion(model: Model, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        complete(model, **fields)
    assert refused.value.param == param
    assert param.partition(".")[0] in refused.value.message


WORDS = {
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key", "suffix"), "a string"),
    **dict.fromkeys(("store", "parallel_tool_calls"), "true or false"),
    **dict.fromkeys(("metadata", "response_format"), "an object"),
    **dict.fromkeys(("modalities", "tools", "functions"), "a list"),
    **dict.fromkeys(("tool_choice", "function_call"), "a string or an object"),
}


def test_a_wrong_type_of_an_ignored_field_is_said(model: Model) -> None:
    assert set(WORDS) == set(HARMLESS)
    for name, words in WORDS.items():
        with pytest.raises(BadRequest, match=f"^{name} must be {words}$") as mistyped:
            chat(model, **{name: 5})
        assert (mistyped.value.param, mistyped.value.code) == (name, None)


def test_a_value_that_is_not_supported_is_no_wrong_type(model: Model) -> None:
    wrong: dict[str, Any] = {"store": True, "tools": [{}], "tool_choice": {}, "response_format": {"type": "json_object"}}
    for name, value in wrong.items():
        with pytest.raises(BadRequest, match=f"^{name} is not supported here with this value$") as refused:
            chat(model, **{name: value})
        assert refused.value.code == "unsupported_parameter"


def test_ranges_are_said(model: Model) -> None:
    with pytest.raises(BadRequest, match="temperature must be from 0 to 2"):
        complete(model, temperature=5)
    with pytest.raises(BadRequest, match="ids are 0 to 49151"):
        complete(model, prompt=[70000])


@pytest.mark.parametrize(
    "fields", [{"prompt": "word " * 100}, {"prompt": "x" * 100_000}, {"prompt": [5] * 100_000}, {"max_tokens": 10**12}]
)
def test_beyond_the_context_has_openais_code(model: Model, fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as refused:
        complete(model, **fields)
    assert refused.value.code == "context_length_exceeded"


def test_text_that_may_just_fit_is_not_refused_unread(model: Model) -> None:
    """A long token, many times: more characters than usual text of that many tokens has."""
    text = ("\n" + " " * 80) * 80
    assert len(complete(model, prompt=text, max_tokens=1).asks[0].prompt) <= 99


def test_another_model(model: Model) -> None:
    with pytest.raises(NotFound) as refused:
        complete(model, model="gpt-9")
    assert (refused.value.param, refused.value.code, refused.value.status) == ("model", "model_not_found", 404)


BODIES = [
    b"",
    b"{",
    b"[]",
    b"5",
    b'"x"',
    b"null",
    b"\xff\xfe",
    b'{"model": "m", "prompt": "\xff"}',
    b'{"model": "m", "prompt": "x", "temperature": NaN}',
    b'{"model": "m", "prompt": "x", "temperature": Infinity}',
    b'{"model": "m", "prompt": "x", "temperature": 1e400}',
    b'{"model": "m", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"model": "m", "prompt": ' + b"[" * 200_000,
    b'{"model": "m", "prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    b'{"model": "m"} {"prompt": "x"}',
    b"model=m&prompt=x",
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
def test_what_is_no_request_at_all(model: Model, body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(body, model, LIMITS, chat=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(fields=st.dictionaries(st.sampled_from(sorted(COMPLETION - {"model"})), JSON, max_size=4), is_chat=st.booleans())
def test_nothing_but_request_errors(model: Model, fields: dict[str, Any], is_chat: bool) -> None:
    """Whatever the fields hold, the answer is an Ask or a 4xx."""
    asked = (
        {"model": NAME, "prompt": "Hello", **fields} if not is_chat else {"model": NAME, "messages": fields.get("prompt", HELLO), **fields}
    )
    try:
        wish = parse(json.dumps(asked).encode(), model, LIMITS, chat=is_chat)
    except RequestError as error:
        assert 400 <= error.status < 500
    else:
        assert wish.asks[0].prompt and wish.asks[0].max_tokens >= 1


def test_a_text_that_names_a_token_without_an_embedding_is_refused(smollm2: Path, tmp_path: Path) -> None:
    """Models are published with tokens that were added to the tokenizer only: the id was read beyond the embedding."""
    for file in smollm2.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((smollm2 / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    small = Model(tmp_path, NAME)
    assert small.encode("a")
    with pytest.raises(BadRequest, match="does not have"):
        small.encode("Antarctica")
