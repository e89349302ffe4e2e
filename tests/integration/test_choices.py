"""Several answers to a request, several prompts in one, and the extensions: the whole system with the `openai` package as client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from scripts.launcher.cluster import Cluster
from tests.systems import figures, transport

MODEL = "smollm2"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time there was a little girl who lived in a house at the edge of a wood, and every morning"


@pytest.fixture
def client(pair: Cluster, conserved: None) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pair.urls[0]}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def handed(cluster: Cluster) -> float:
    """Pages of all handoffs: those that were sent, and those that the decode held already."""
    told = figures(cluster, "prefill-0")
    return told["sent_pages_total"] + told["spared_pages_total"]


def test_four_greedy_answers_are_equal_and_cost_one_transfer(pair: Cluster, client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": STORY, "temperature": 0, "max_tokens": 24}
    before = handed(pair)
    one = client.completions.create(**asked)
    for_one = handed(pair) - before
    four = client.completions.create(**asked, n=4)
    assert [choice.text for choice in four.choices] == [one.choices[0].text] * 4
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert handed(pair) - before == 2 * for_one > 0
    assert "tcp" not in transport(pair, "prefill-0") and transport(pair, "prefill-0")
    assert one.usage is not None and four.usage is not None
    assert four.usage.prompt_tokens == one.usage.prompt_tokens and four.usage.completion_tokens == 4 * 24


def test_four_sampled_answers_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def say() -> list[str]:
        answer = client.completions.create(model=MODEL, prompt=STORY, temperature=1.0, seed=11, max_tokens=24, n=4)
        return [choice.text for choice in answer.choices]

    first = say()
    assert len(set(first)) == 4
    assert say() == first


def test_streams_of_several_choices_equal_the_whole(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": PARIS, "temperature": 0.8, "seed": 5, "max_tokens": 16, "n": 3}
    whole = client.chat.completions.create(**asked)
    texts, finishes, roles = [""] * 3, [None] * 3, []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        if not chunk.choices:
            counts = chunk.usage.prompt_tokens, chunk.usage.completion_tokens  # the second may have been cached
            assert counts == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            roles += [choice.index] if choice.delta.role else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert roles == [0, 1, 2]


def test_several_prompts_in_one_request(client: openai.OpenAI) -> None:
    prompts = [STORY, "The capital of France is"]
    alone = [client.completions.create(model=MODEL, prompt=one, temperature=0, max_tokens=8) for one in prompts]
    both = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=8, n=2)
    assert [choice.text for choice in both.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    assert both.usage is not None
    assert both.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage is not None)
    assert both.usage.completion_tokens == 32


@pytest.mark.parametrize("stream", [False, True])
def test_echo_says_the_prompt_first(client: openai.OpenAI, stream: bool) -> None:
    asked = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}
    plain = client.completions.create(**asked).choices[0].text
    if stream:
        echoed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, echo=True, stream=True))
    else:
        echoed = client.completions.create(**asked, echo=True).choices[0].text
    assert echoed == "The capital of France is" + plain


def test_stop_strings_cut_each_choice_by_itself(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": STORY, "temperature": 1.0, "seed": 3, "max_tokens": 24, "n": 4}
    texts = [choice.text for choice in client.completions.create(**asked).choices]
    word = texts[0].split()[1]
    cut = [choice.text for choice in client.completions.create(**asked, stop=[word]).choices]
    assert cut == [text.partition(word)[0] for text in texts]


def test_one_token_answers(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=STORY, temperature=0, max_tokens=1, n=3)
    assert len({choice.text for choice in answer.choices}) == 1 and len(answer.choices) == 3


def test_a_deadline_ends_a_request_with_its_name(client: openai.OpenAI) -> None:
    started = time.monotonic()
    with pytest.raises(openai.InternalServerError) as late:
        client.completions.create(model=MODEL, prompt=STORY, max_tokens=1500, extra_body={"deadline": 1.0, "ignore_eos": True})
    assert late.value.code == "deadline_exceeded" and time.monotonic() - started < 4


def test_batch_priority_is_served(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=STORY, max_tokens=2, extra_body={"priority": "batch"})
    assert answer.usage is not None and answer.usage.completion_tokens == 2


def test_server_timing_names_the_stages(pair: Cluster) -> None:
    asked = {"model": MODEL, "prompt": STORY, "max_tokens": 6, "ignore_eos": True}
    whole = httpx.post(f"{pair.urls[0]}/v1/completions", json=asked, timeout=30).headers["server-timing"]
    assert [stage.partition(";dur=")[0] for stage in whole.split(", ")] == [
        "prefill_queue", "prefill", "transfer", "decode_queue", "decode", "ttft", "total",
    ]  # fmt: skip
    streamed = httpx.post(f"{pair.urls[0]}/v1/completions", json={**asked, "stream": True}, timeout=30).headers["server-timing"]
    assert "prefill;dur=" in streamed and "ttft;dur=" in streamed


@pytest.mark.timeout(300)
def test_200_streams_at_once(pair: Cluster, client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 6}
    alone = client.completions.create(**asked).choices[0].text

    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{pair.urls[0]}/v1", api_key="none", max_retries=0, timeout=240) as client:
            return await asyncio.gather(*(one(client) for _ in range(200)))

    assert asyncio.run(all_of_them()) == [alone] * 200
