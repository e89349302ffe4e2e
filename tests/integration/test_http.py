"""The `openai` package as client of the HTTP side, over an echo desk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from common.errors import BadRequest, Overloaded, StartError, Unavailable
from gateway.app import Bounds, create_app
from gateway.metrics import Metrics
from gateway.server import HttpServer
from gateway.text import HALF
from tests.integration.echo_desk import Script
from tests.integration.http_fixtures import NAME, PATIENCE_S, Served, completion, events, serving

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
SENTENCE = "The capital of France is Paris. 🦜 日本"


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Served]:
    with serving(smollm2) as served:
        yield served


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    """The desk says SENTENCE, unless a test tells it otherwise."""
    server.desk.asks.clear()
    server.desk.answers.clear()
    server.desk.live = {"prefill": 1, "decode": 1}
    identity = server.desk.identity
    script = Script([*server.model.encode(SENTENCE), server.model.eos_ids[0]])
    server.desk.scripts = lambda ask: script
    yield server
    server.desk.identity = identity


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as found:
        yield found


def say(served: Served, **script: Any) -> None:
    told = Script(**script)
    served.desk.scripts = lambda ask: told


# ------------------------------------------------------------------------------------------------------------ the good


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("gpt-9")
    assert unknown.value.code == "model_not_found"


def test_chat(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=PARIS)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", SENTENCE, "stop")
    tokens = len(served.model.encode(SENTENCE)) + 1
    prompt = len(served.desk.asks[0].prompt)
    assert answer.usage is not None and answer.object == "chat.completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (prompt, tokens, prompt + tokens)
    assert served.desk.answers[0].cancelled.wait(PATIENCE_S)


def test_chat_streamed(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=NAME, messages=PARIS, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == SENTENCE and not any(HALF in text for text in texts) and len(texts) > 8
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and all(chunk.usage is None for chunk in chunks[:-1])
    whole = client.chat.completions.create(model=NAME, messages=PARIS)
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_completions(served: Served, client: openai.OpenAI) -> None:
    cut = client.completions.create(model=NAME, prompt="Where?", max_tokens=5)
    assert cut.choices[0].finish_reason == "length" and SENTENCE.startswith(cut.choices[0].text)
    assert cut.usage is not None and cut.usage.completion_tokens == 5
    parts = list(client.completions.create(model=NAME, prompt=[5, 6, 7], max_tokens=100, stream=True))
    assert "".join(part.choices[0].text for part in parts) == SENTENCE
    assert parts[-1].choices[0].finish_reason == "stop" and served.desk.asks[-1].prompt == [5, 6, 7]
    assert {part.object for part in parts} == {"text_completion"}


def test_a_stream_on_the_wire(served: Served) -> None:
    asked = completion([5], max_tokens=100, stream=True)
    answer = httpx.post(f"{served.url}/v1/completions", json=asked, timeout=PATIENCE_S)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    assert answer.text.endswith("data: [DONE]\n\n") and all(part.startswith("data: ") for part in answer.text.split("\n\n") if part)
    said = events(answer.text)
    assert "usage" not in said[0] and said[-1] == "[DONE]"


@pytest.mark.parametrize("together", [1, 4, 100])
@pytest.mark.parametrize("stop", ["of Fra", ["never", "is Par", "Paris"], "🦜"])
def test_stop_strings(served: Served, client: openai.OpenAI, stop: Any, together: int) -> None:
    say(served, ids=[*served.model.encode(SENTENCE), 2], together=together)
    expected = SENTENCE.split(stop if isinstance(stop, str) else "is Par")[0]
    whole = client.chat.completions.create(model=NAME, messages=PARIS, stop=stop)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (expected, "stop")
    parts = list(client.chat.completions.create(model=NAME, messages=PARIS, stop=stop, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "stop"


def test_a_stop_string_ends_the_work(served: Served, client: openai.OpenAI) -> None:
    say(served, ids=served.model.encode(" one two three"), endless=True, pause_s=0.001)
    answer = client.completions.create(model=NAME, prompt="Count", max_tokens=2000, stop=" three")
    assert answer.choices[0].text == " one two"
    assert served.desk.answers[0].cancelled.is_set() and served.desk.answers[0].given < 10


def test_parameters_reach_the_desk(served: Served, client: openai.OpenAI) -> None:
    client.completions.create(
        model=NAME,
        prompt="x",
        seed=7,
        temperature=0.25,
        logit_bias={"28": -100},
        max_tokens=3,
        extra_body={"top_k": 20, "ignore_eos": True},
    )
    ask = served.desk.asks[0]
    assert (ask.sampling.seed, ask.sampling.temperature, ask.sampling.logit_bias, ask.sampling.top_k) == (7, 0.25, {28: -100.0}, 20)
    assert (ask.max_tokens, ask.stop_ids, ask.deadline_s) == (3, [], 600.0)
    client.completions.create(model=NAME, prompt="x", max_tokens=3)
    assert served.desk.asks[1].sampling.seed != 7


def test_logprobs(served: Served, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=NAME, messages=PARIS, logprobs=True, top_logprobs=2)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    content = chat.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == SENTENCE
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].bytes == entry.bytes for entry in content)
    streamed = client.chat.completions.create(model=NAME, messages=PARIS, logprobs=True, top_logprobs=2, stream=True)
    parts = [part.choices[0].logprobs.content or [] for part in streamed if part.choices and part.choices[0].logprobs]
    assert [entry for part in parts for entry in part] == content
    old = client.completions.create(model=NAME, prompt="x", max_tokens=6, logprobs=1).choices[0]
    assert old.logprobs is not None and old.logprobs.tokens is not None and old.logprobs.text_offset is not None
    assert "".join(old.logprobs.tokens) == old.text and len(old.logprobs.tokens) == 6
    assert [old.text[at:].startswith(token) for at, token in zip(old.logprobs.text_offset, old.logprobs.tokens, strict=True)] == [True] * 6
    assert old.logprobs.token_logprobs == [-0.5] * 6
    assert chat.choices[0].logprobs.content[0].logprob == -0.5


@pytest.mark.parametrize("stream", [False, True])
def test_timeline_only_on_request(served: Served, stream: bool) -> None:
    for asked in (True, False):
        body = completion([5], stream=stream, timeline=asked, max_tokens=50)
        text = httpx.post(f"{served.url}/v1/completions", json=body, timeout=PATIENCE_S).text
        found = events(text)[-2] if stream else httpx.Response(200, text=text).json()
        assert ("baton" in found) == asked
        if asked:
            stages = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other")
            timeline = found["baton"]["timeline"]
            assert sum(timeline[f"{stage}_ms"] for stage in stages) == pytest.approx(timeline["total_ms"])


def test_the_async_client_too(served: Served) -> None:
    async def talk() -> str:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            stream = await client.chat.completions.create(model=NAME, messages=PARIS, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(talk()) == SENTENCE


@pytest.mark.parametrize("choices", [1, 2])
def test_every_chunk_but_the_last_says_that_usage_is_null(served: Served, choices: int) -> None:
    asked = {"model": NAME, "messages": PARIS, "n": choices, "stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=asked, timeout=PATIENCE_S)
    *chunks, last, done = events(answer.text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant" and done == "[DONE]"
    assert all("usage" in chunk and chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("before_s", [0.0, 0.05])
def test_usage_so_far_begins_with_the_prompt_alone(served: Served, before_s: float) -> None:
    say(served, ids=[300, 301], before_s=before_s)
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"model": NAME, "messages": PARIS, "stream": True, "stream_options": options}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=asked, timeout=PATIENCE_S)
    first = events(answer.text)[0]["usage"]
    assert first["completion_tokens"] == 0 and first["total_tokens"] == first["prompt_tokens"] == len(served.desk.asks[-1].prompt)


def test_usage_so_far_in_every_chunk(client: openai.OpenAI) -> None:
    """As load generators made for vLLM ask for it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(model=NAME, prompt="one two", max_tokens=3, stream=True, stream_options=options))  # type: ignore[call-overload]
    assert [chunk.usage.completion_tokens for chunk in chunks] == [*range(1, len(chunks)), len(chunks) - 1]


def test_each_answer_is_counted_and_each_prompt_once(served: Served, client: openai.OpenAI) -> None:
    before, prompts = served.outcomes(), served.figures.prompt_tokens._value.get()
    answer = client.completions.create(model=NAME, prompt=["one two", "three"], max_tokens=2, n=3)
    assert answer.usage is not None
    assert served.outcomes()["length"] - before.get("length", 0) + served.outcomes().get("stop", 0) - before.get("stop", 0) == 6
    assert served.figures.prompt_tokens._value.get() - prompts == answer.usage.prompt_tokens


# ------------------------------------------------------------------------------------------------------------- the bad


def test_error_classes(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=PARIS)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as several:
        client.chat.completions.create(model=NAME, messages=PARIS, n=33)
    assert several.value.param == "n" and several.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=NAME, prompt="word " * 2500)
    assert long.value.code == "context_length_exceeded"
    assert served.desk.asks == []


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_desk_refuses(served: Served, client: openai.OpenAI, stream: bool) -> None:
    say(served, refused=Overloaded("too many", retry_after_s=2.4))
    with pytest.raises(openai.RateLimitError) as overloaded:
        client.completions.create(model=NAME, prompt="x", stream=stream)
    assert overloaded.value.response.headers["retry-after"] == "3"
    say(served, refused=Unavailable("no live decode", retry_after_s=1.2))
    with pytest.raises(openai.InternalServerError) as away:
        client.completions.create(model=NAME, prompt="x", stream=stream)
    assert away.value.status_code == 503 and "no live decode" in str(away.value)
    assert away.value.response.headers["retry-after"] == "2"
    say(served, refused=BadRequest("too large", param="max_tokens"))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=NAME, prompt="x", stream=stream)
    say(served, refused=KeyError("secret detail"))
    with pytest.raises(openai.InternalServerError) as broken:
        client.completions.create(model=NAME, prompt="x", stream=stream)
    assert broken.value.status_code == 500 and broken.value.type == "server_error" and "secret" not in broken.value.response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
def test_an_error_before_the_first_token_has_its_status(served: Served, client: openai.OpenAI, stream: bool, breaks: bool) -> None:
    say(served, ids=[], error=Unavailable("all dead"), breaks=breaks, together=100, before_s=0.05)
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(model=NAME, prompt="x", stream=stream)
    assert failed.value.status_code == (500 if breaks else 503)


@pytest.mark.parametrize("breaks", [False, True])
def test_an_error_in_mid_stream_is_said_in_the_stream(served: Served, client: openai.OpenAI, breaks: bool) -> None:
    say(served, ids=[100, 101, 102], error=Unavailable("all dead"), breaks=breaks)
    heard = []
    with pytest.raises(openai.APIError) as failed:
        for part in client.completions.create(model=NAME, prompt="x", stream=True):
            heard.append(part)
    assert len(heard) == 3 and failed.value.type == ("server_error" if breaks else "service_unavailable_error")
    assert "as told" not in failed.value.message
    text = httpx.post(f"{served.url}/v1/completions", json=completion([5], stream=True), timeout=PATIENCE_S).text
    assert "error" in events(text)[-1]


def test_health_and_ready(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    for live, status, missing in [
        ({"prefill": 1, "decode": 2}, 200, []),
        ({"colocated": 1}, 200, []),
        ({"decode": 1}, 503, ["prefill"]),
        ({"prefill": 1}, 503, ["decode"]),
        ({}, 503, ["prefill", "decode"]),
    ]:
        served.desk.live = live
        answer = httpx.get(f"{served.url}/ready")
        assert (answer.status_code, answer.json()["missing"]) == (status, missing)
    served.desk.live = {"colocated": 1}
    served.desk.draining = True
    assert httpx.get(f"{served.url}/ready").json()["missing"] == ["gateway"]
    served.desk.away = True
    assert httpx.get(f"{served.url}/ready").json()["missing"] == ["gateway", "redis"]
    served.desk.draining = False
    answer = httpx.get(f"{served.url}/ready")
    assert (answer.status_code, answer.json()["missing"]) == (503, ["redis"]), "every request would get a 503"
    assert httpx.get(f"{served.url}/fleet").json()["missing"] == ["redis"]
    served.desk.away = False
    served.desk.identity = None
    assert httpx.get(f"{served.url}/ready").status_code == 503
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_port_in_use_is_said_at_once(served: Served) -> None:
    app = create_app(served.desk, served.model, Bounds(1024, 1024, 1.0, 1.0, 1.0), Metrics())
    with pytest.raises(StartError, match=f"127.0.0.1:{served.port}.*in use"):
        HttpServer(app, "127.0.0.1", served.port)


def test_root_points_to_the_api(served: Served) -> None:
    assert "/v1/chat/completions" in httpx.get(served.url).text


def test_metrics_count_every_request_once(served: Served, client: openai.OpenAI) -> None:
    before = served.outcomes()
    client.completions.create(model=NAME, prompt="x", max_tokens=3)
    list(client.completions.create(model=NAME, prompt="x", max_tokens=100, stream=True))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=NAME, prompt="x", n=33)
    say(served, refused=Overloaded("too many", retry_after_s=1))
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=NAME, prompt="x")
    difference = {name: value - before.get(name, 0) for name, value in served.outcomes().items() if value != before.get(name, 0)}
    assert difference == {"length": 1, "stop": 1, "invalid_request_error": 1, "overloaded": 1}
    text = httpx.get(f"{served.url}/metrics").text
    for name in (
        "baton_ttft_seconds_bucket",
        "baton_tpot_seconds_bucket",
        "baton_request_seconds_bucket",
        'baton_stage_seconds_count{stage="transfer"}',
    ):
        assert name in text
