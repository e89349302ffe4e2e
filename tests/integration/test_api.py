"""The `openai` package as client of the whole system."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from scripts.launcher.cluster import Cluster
from tests.systems import assert_conserved

MODEL = "smollm2"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(pair: Cluster, conserved: None) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pair.urls[0]}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def totals(answer: Any) -> tuple[int, int]:
    """Tokens of the prompt and of the answer; how many of them were cached differs from the second time on."""
    return answer.usage.prompt_tokens, answer.usage.completion_tokens


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=40)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (37, 8, 45)


def test_chat_streamed_equals_whole(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert totals(chunks[-1]) == totals(whole)
    assert len(chunks) >= 8


def test_completion_with_text_and_with_ids(client: openai.OpenAI) -> None:
    by_text = client.completions.create(model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=12)
    assert by_text.choices[0].finish_reason == "length"
    assert by_text.usage is not None and by_text.usage.completion_tokens == 12
    streamed = client.completions.create(model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.choices[0].text
    ids = client.completions.create(model=MODEL, prompt=[9843, 2369, 253, 655], temperature=0, max_tokens=3)
    assert ids.usage is not None and ids.usage.prompt_tokens == 4


def test_one_token_never_leaves_the_prefill(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=1)
    assert answer.usage is not None and answer.usage.completion_tokens == 1
    assert answer.choices[0].finish_reason == "length"


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=40)
    cut = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=40, stop=["of Fra", "never"])
    assert cut.choices[0].message.content == str(whole.choices[0].message.content).split("of Fra")[0]
    assert cut.choices[0].finish_reason == "stop"
    parts = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=40, stop="of Fra", stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == cut.choices[0].message.content


def test_seed(client: openai.OpenAI) -> None:
    def say(seed: int) -> str:
        answer = client.completions.create(model=MODEL, prompt="My favourite animal is", temperature=1.0, seed=seed, max_tokens=16)
        return answer.choices[0].text

    assert say(7) == say(7)
    assert len({say(seed) for seed in (1, 2, 3)}) > 1


def test_logprobs(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 4}
    chat = client.chat.completions.create(**asked, messages=PARIS, logprobs=True, top_logprobs=3)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    content = chat.choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == entry.logprob
    completion = client.completions.create(**asked, prompt="The sky is", logprobs=2)
    found = completion.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.token_logprobs is not None and found.text_offset is not None
    assert len(found.tokens) == len(found.token_logprobs) == 4
    assert "".join(found.tokens) == completion.choices[0].text and found.text_offset[0] == 0


def test_sampling_parameters_are_taken(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="One two three",
        max_tokens=8,
        temperature=0.8,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"28": -100},
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 8


def test_logit_bias_decides(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="A", max_tokens=3, temperature=0, logit_bias={"28": 100}, logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert len(set(answer.choices[0].logprobs.tokens or [])) == 1


def test_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=PARIS)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as several:
        client.chat.completions.create(model=MODEL, messages=PARIS, n=33)
    assert several.value.param == "n"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 2500, max_tokens=1)
    assert long.value.code == "context_length_exceeded"


def test_timeline_adds_up(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=40, extra_body={"timeline": True})
    timeline = answer.model_extra["baton"]["timeline"]  # type: ignore[index]
    stages = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other")
    assert sum(timeline[f"{stage}_ms"] for stage in stages) == pytest.approx(timeline["total_ms"], abs=0.01)
    assert all(timeline[f"{stage}_ms"] >= 0 for stage in stages), timeline
    assert timeline["prefill_ms"] > 0 and timeline["transfer_ms"] > 0 and timeline["decode_ms"] > 0
    assert timeline["ttft_ms"] < timeline["total_ms"] and timeline["attempts"] == 1


def test_metrics_and_health(pair: Cluster, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="Once", max_tokens=2)
    assert httpx.get(f"{pair.urls[0]}/health").json() == {"status": "ok"}
    assert httpx.get(f"{pair.urls[0]}/ready").json()["workers"] == {"prefill": 1, "decode": 1}
    text = httpx.get(f"{pair.urls[0]}/metrics").text
    assert 'baton_requests_total{outcome="length"}' in text and "baton_ttft_seconds_bucket" in text


def test_pools_are_empty_at_the_end(pair: Cluster) -> None:
    assert_conserved(pair)
