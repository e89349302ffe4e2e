"""Prompts that begin alike: the beginning is neither computed nor sent again, and every answer is what plain transformers gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.launcher.cluster import Cluster
from tests.references import Reference, references
from tests.systems import assert_conserved, figures

SHARED, OWN, ANSWER = 1024, 40, 8
PAGE = 16


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """Real text."""
    found = [token for one in references() for token in one["prompt"]]
    assert len(found) > SHARED + 2 * OWN
    return found


@pytest.fixture(scope="module")
def prompts(ids: list[int]) -> list[list[int]]:
    """Two that share their first 1,024 ids and nothing behind them."""
    return [ids[:SHARED] + ids[at : at + OWN] for at in (SHARED, SHARED + OWN)]


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module", params=["true", "false"] if os.environ.get("BATON_TEST_FULL") else ["true"])
def system(request: pytest.FixtureRequest, launch: Callable[..., Cluster]) -> Iterator[tuple[Cluster, bool]]:
    """A disaggregated system, with prefix reuse (True) and without."""
    cluster = launch(prefill=1, decode=1, worker_flags={"prefix_reuse": request.param})
    yield cluster, request.param == "true"
    cluster.stop()


def ask(cluster: Cluster, prompt: list[int], tokens: int = ANSWER, **more: object) -> dict[str, Any]:
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "timeline": True, **more}
    reply = httpx.post(f"{cluster.urls[0]}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def cached(answer: dict[str, Any]) -> int:
    found: int = answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return found


def expected(reference: Reference, prompt: list[int], tokens: int = ANSWER) -> str:
    text: str = reference.tokenizer.decode(reference.generate(prompt, tokens), skip_special_tokens=True)
    return text


def pages(cluster: Cluster) -> tuple[float, float]:
    """(sent, spared because the decode held them) so far."""
    told = figures(cluster, "prefill-0")
    return told["sent_pages_total"], told["spared_pages_total"]


@pytest.mark.timeout(300)
def test_a_shared_beginning_is_computed_and_sent_once(system: tuple[Cluster, bool], reference: Reference, prompts: list[list[int]]) -> None:
    cluster, reuse = system
    answers, sent, spared = [], [], []
    for prompt in (prompts[0], prompts[1], prompts[1]):
        before = pages(cluster)
        answers.append(ask(cluster, prompt))
        assert_conserved(cluster)  # it has ended, and its handoff as well
        after = pages(cluster)
        sent.append(after[0] - before[0])
        spared.append(after[1] - before[1])
    first, second, again = answers
    assert texts(again) == texts(second)
    for prompt, answer in zip(prompts, answers, strict=False):
        assert texts(answer) == [expected(reference, prompt)]
    whole, full, begins = -(-(SHARED + OWN) // PAGE), (SHARED + OWN) // PAGE, SHARED // PAGE
    if not reuse:
        assert sent == [whole] * 3 and spared == [0] * 3 and [cached(answer) for answer in answers] == [0] * 3
        assert figures(cluster, "decode-0")["pages_cached"] == 0
        return
    assert sent == [whole, whole - begins, whole - full] and spared == [0, begins, full]
    assert [cached(answer) for answer in answers] == [0, SHARED, (SHARED + OWN - 1) // PAGE * PAGE]
    assert second["baton"]["timeline"]["prefill_ms"] < first["baton"]["timeline"]["prefill_ms"], "1,064 tokens against 40"
    prefill, decode = figures(cluster, "prefill-0"), figures(cluster, "decode-0")
    for told in (prefill, decode):
        assert told["prefix_tokens_looked_up_total"] == 3 * (SHARED + OWN)
        assert told["pages_cached"] == full + OWN // PAGE
    assert prefill["prefix_tokens_reused_total"] == sum(map(cached, answers))
    assert decode["prefix_tokens_reused_total"] == PAGE * sum(spared)


@pytest.mark.timeout(300)
def test_several_turns(system: tuple[Cluster, bool], reference: Reference, ids: list[int]) -> None:
    """Each turn's prompt is the last one's with its answer and 21 further ids; what the decode wrote itself is not sent back to it."""
    cluster, reuse = system
    prompt, held = ids[-150:], 0
    for _ in range(3):
        before = pages(cluster)
        answer = ask(cluster, prompt, 40)
        drawn = reference.generate(prompt, 40)
        assert texts(answer) == [reference.tokenizer.decode(drawn, skip_special_tokens=True)]
        assert_conserved(cluster)
        spared = pages(cluster)[1] - before[1]
        assert spared == (held // PAGE if reuse else 0)
        held = len(prompt) + len(drawn) - 1  # the last token's KV is never computed
        prompt = [*prompt, *drawn, *ids[held : held + 21]]


@pytest.mark.timeout(300)
def test_several_answers_to_a_known_prompt(system: tuple[Cluster, bool], reference: Reference, ids: list[int]) -> None:
    cluster, reuse = system
    prompt = ids[300:400]
    first = ask(cluster, prompt, n=3)
    again = ask(cluster, prompt, n=3)
    assert texts(again) == texts(first) == [expected(reference, prompt)] * 3
    assert cached(again) == (96 if reuse else 0)
    sampled = [texts(ask(cluster, prompt, 16, n=3, temperature=1.0, seed=7)) for _ in range(2)]
    assert sampled[0] == sampled[1] and len(set(sampled[0])) == 3
    assert_conserved(cluster)
