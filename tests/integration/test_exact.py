"""Float32, real prompts: the whole system gives exactly the greedy ids of plain transformers, however the work is split.

The API speaks text, so texts are compared: the reference's ids, decoded. BATON_TEST_FULL=1 asks all 30 prompts in every way
(about ten minutes); otherwise 10 together, the longest among them, and 2 alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.launcher.cluster import Cluster
from tests.integration.talk import Heard, body, listen_all
from tests.references import TOKENS, Reference, references
from tests.systems import assert_conserved, figures

FULL = bool(os.environ.get("BATON_TEST_FULL"))
ALONE = 30 if FULL else 2


@pytest.fixture(scope="module")
def answers(smollm2: Path) -> list[dict[str, Any]]:
    """Prompt ids and expected text of every test prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    found = [{**one, "text": tokenizer.decode(one["output"], skip_special_tokens=True)} for one in references()]
    return (
        sorted(found, key=lambda one: -len(one["prompt"])) if FULL else sorted(found, key=lambda one: -len(one["prompt"]))[::4] + found[:2]
    )


def ask(cluster: Cluster, chosen: list[dict[str, Any]], at_once: int) -> list[Heard]:
    return asyncio.run(listen_all(cluster.urls, [body(one["prompt"], TOKENS) for one in chosen], at_once))


def assert_exact(chosen: list[dict[str, Any]], heard: list[Heard]) -> None:
    for number, (one, answer) in enumerate(zip(chosen, heard, strict=True)):
        assert answer.error is None, (number, answer.error)
        assert answer.completion_tokens == TOKENS
        assert answer.text == one["text"], number


@pytest.mark.timeout(900)
def test_the_references_are_what_transformers_generates(smollm2: Path) -> None:
    reference = Reference(smollm2)
    shortest = min(references(), key=lambda one: len(one["prompt"]))
    assert reference.generate(shortest["prompt"], 48) == shortest["output"][:48]


@pytest.mark.timeout(900)
def test_disaggregated(pair: Cluster, answers: list[dict[str, Any]]) -> None:
    """Alone and 16 at a time; every page that a decode used came in by transfer, this time or earlier: nothing is recomputed in secret."""
    before, sent = figures(pair, "decode-0"), figures(pair, "prefill-0")
    chosen = answers[:ALONE]
    assert_exact(chosen, ask(pair, chosen, 1))
    assert_exact(answers, ask(pair, answers, 16))
    assert_conserved(pair)
    after, pushed = figures(pair, "decode-0"), figures(pair, "prefill-0")
    pages = sum(-(-len(one["prompt"]) // 16) for one in [*chosen, *answers])
    page_bytes = 30 * 2 * 3 * 16 * 64 * 4
    held = (after["prefix_tokens_reused_total"] - before["prefix_tokens_reused_total"]) // 16
    assert held > 0, "two prompts were asked twice"
    assert after["received_pages_total"] - before["received_pages_total"] == pages - held
    assert after["received_bytes_total"] - before["received_bytes_total"] == (pages - held) * page_bytes
    assert pushed["sent_pages_total"] - sent["sent_pages_total"] == pages - held
    assert pushed["spared_pages_total"] - sent["spared_pages_total"] == held


@pytest.mark.timeout(900)
@pytest.mark.parametrize("policy", ["prefill_first", "chunked"])
def test_colocated(launch: Callable[..., Cluster], answers: list[dict[str, Any]], policy: str) -> None:
    cluster = launch(prefill=0, decode=0, colocated=1, worker_flags={"policy": policy})
    chosen = answers if FULL else answers[1::3]
    assert_exact(chosen, ask(cluster, chosen, 16))
    assert_conserved(cluster)
    cluster.stop()
