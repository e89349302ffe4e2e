"""Two prompts that begin alike: the second one's beginning is not computed again, and both answers are what plain transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.launcher.cluster import Cluster
from tests.references import Reference, references
from tests.systems import assert_conserved, figures

SHARED, OWN, ANSWER = 1024, 40, 8


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Two of real text that share their first 1,024 ids and nothing behind them."""
    ids = [token for one in references() for token in one["prompt"]]
    assert len(ids) > SHARED + 2 * OWN
    return [ids[:SHARED] + ids[at : at + OWN] for at in (SHARED, SHARED + OWN)]


def ask(cluster: Cluster, prompt: list[int]) -> dict[str, Any]:
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "timeline": True}
    reply = httpx.post(f"{cluster.urls[0]}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.timeout(300)
def test_a_shared_beginning_is_computed_once(launch: Callable[..., Cluster], smollm2: Path, prompts: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    cluster = launch(prefill=1, decode=1, worker_flags={"prefix_reuse": "true"})
    first, second, again = ask(cluster, prompts[0]), ask(cluster, prompts[1]), ask(cluster, prompts[1])
    reference, tokenizer = Reference(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert again["choices"] == second["choices"]
    for prompt, answer in zip(prompts, [first, second], strict=True):
        assert answer["choices"][0]["text"] == tokenizer.decode(reference.generate(prompt, ANSWER), skip_special_tokens=True)
    assert "prompt_tokens_details" not in first["usage"]
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": SHARED}
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": (SHARED + OWN - 1) // 16 * 16}
    assert second["baton"]["timeline"]["prefill_ms"] < first["baton"]["timeline"]["prefill_ms"], "1,064 tokens against 40"
    assert_conserved(cluster)
    told = figures(cluster, "prefill-0")
    assert told["prefix_tokens_looked_up_total"] == 3 * (SHARED + OWN)
    assert told["prefix_tokens_reused_total"] == SHARED + (SHARED + OWN - 1) // 16 * 16
    assert told["pages_cached"] == -(-(SHARED + OWN) // 16) - 1 + OWN // 16
    cluster.stop()
