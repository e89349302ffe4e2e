"""Two gateways, two prefills, two decodes: 64 streams at once, none crossed, none lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.launcher.cluster import Cluster
from tests.integration.talk import body, listen_all
from tests.references import references
from tests.systems import assert_conserved, figures

STREAMS = 64
TOKENS = 16


@pytest.mark.timeout(400)
def test_64_streams_over_two_of_everything(launch: Callable[..., Cluster], smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    cluster = launch(prefill=2, decode=2, gateways=2)
    assert len(cluster.urls) == 2
    shortest = sorted(references(), key=lambda one: len(one["prompt"]))[:16]
    asked = [shortest[number % len(shortest)] for number in range(STREAMS)]
    heard = asyncio.run(listen_all(cluster.urls, [body(one["prompt"], TOKENS) for one in asked], STREAMS))
    for one, answer in zip(asked, heard, strict=True):
        assert answer.error is None
        assert answer.completion_tokens == TOKENS
        assert answer.text == tokenizer.decode(one["output"][:TOKENS], skip_special_tokens=True)
    assert_conserved(cluster)
    assert all(figures(cluster, child.name)["steps_total"] > 1 for child in cluster.workers)
