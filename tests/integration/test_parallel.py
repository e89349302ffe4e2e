"""Each phase its own parallelism: whatever the degrees of prefill and decode, whole systems give the ids of plain transformers.

Quick: one pair of degrees, and a rank that is killed. BATON_TEST_FULL=1: every pair of one rank, three parts and two stages on SmolLM2
(9 heads, 3 KV heads), mixed ones on a random model, and colocated workers.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from scripts.launcher.__main__ import wait_served
from scripts.launcher.cluster import Cluster, ClusterError
from tests.integration.talk import Heard, body, listen_all
from tests.integration.test_recovery import TOKENS as LONGER
from tests.integration.test_recovery import assert_undisturbed, talk, until
from tests.references import references
from tests.systems import assert_conserved, figures, small
from tests.unit.tiny_models import saved

pytestmark = pytest.mark.system
FULL = bool(os.environ.get("BATON_TEST_FULL"))
TOKENS = 24
ASKED = 4
START_S = 300.0
ONE, PARTS, STAGES = (1, 1), (3, 1), (1, 2)
QUICK = [(PARTS, STAGES)]
PAIRS = [(prefill, decode) for prefill in (ONE, PARTS, STAGES) for decode in (ONE, PARTS, STAGES)] if FULL else QUICK

RANDOM: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

Degrees = tuple[int, int]


@pytest.fixture(scope="module")
def short(smollm2: Path) -> list[dict[str, Any]]:
    """Prompts of some length, with the text of their first TOKENS tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chosen = sorted(references(), key=lambda one: len(one["prompt"]))[2 : 2 + ASKED]
    return [{**one, "text": tokenizer.decode(one["output"][:TOKENS], skip_special_tokens=True)} for one in chosen]


@contextmanager
def system(model: Path, prefill: Degrees, decode: Degrees, **more: Any) -> Iterator[Cluster]:
    """Workers of these degrees; each rank is a process that has to import and load everything."""
    roles = {role: {"tp": str(tp), "pp": str(pp)} for role, (tp, pp) in (("prefill", prefill), ("decode", decode))}
    with Cluster(small(model, role_flags=roles, **more)) as cluster:
        cluster.start(START_S)
        wait_served(cluster.urls[0], START_S)
        yield cluster


def ask(cluster: Cluster, asked: list[dict[str, Any]]) -> list[Heard]:
    return asyncio.run(listen_all(cluster.urls, [body(one["prompt"], TOKENS) for one in asked], ASKED))


def assert_no_complaint(cluster: Cluster) -> None:
    for child in cluster.workers:
        log = child.log.read_text()
        assert not any(word in log for word in ("Traceback", "not be pushed", "did not arrive")), log


def ended(pid: int) -> bool:
    """Gone, or dead and not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("prefill", "decode"), PAIRS, ids=lambda degrees: f"tp{degrees[0]}pp{degrees[1]}")
def test_degrees_may_differ(smollm2: Path, short: list[dict[str, Any]], prefill: Degrees, decode: Degrees) -> None:
    with system(smollm2, prefill, decode) as cluster:
        for one, answer in zip(short, ask(cluster, short), strict=True):
            assert answer.error is None
            assert (answer.text, answer.timeline["attempts"]) == (one["text"], 1)
        assert_conserved(cluster)
        pages = sum(-(-len(one["prompt"]) // 16) for one in short)
        after = figures(cluster, "decode-0")
        held = after["prefix_tokens_reused_total"] // 16
        assert after["received_bytes_total"] == (pages - held) * 30 * 2 * 3 * 16 * 64 * 4
        assert_no_complaint(cluster)
        ranks = [pid for child in cluster.workers for pid in (child.facts or {})["ranks"]]
        assert len(ranks) == prefill[0] * prefill[1] + decode[0] * decode[1] - 2
    assert all(map(ended, ranks)), "a rank outlives its worker's drain"


@pytest.mark.timeout(900)
def test_kill_9_of_one_rank_ends_its_worker_and_its_requests_go_on_elsewhere(smollm2: Path) -> None:
    """A decode of three ranks and one of one rank; the last rank of the first is killed while everybody is being answered."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chosen = sorted(references(), key=lambda one: len(one["prompt"]))[2:8]
    asked = [{**one, "text": tokenizer.decode(one["output"][:LONGER], skip_special_tokens=True)} for one in chosen]
    cluster = Cluster(small(smollm2, decode=2))
    cluster.children["decode-0"].flags["tp"] = "3"
    pids: list[int] = []

    async def kill(heard: list[Heard]) -> None:
        await until(lambda: all(len(one.at) > 2 for one in heard), START_S)
        facts = cluster.children["decode-0"].facts
        assert facts is not None
        pids.extend([facts["pid"], *facts["ranks"]])
        assert len(pids) == 3 and figures(cluster, "decode-0")["running"] > 0
        os.kill(pids[-1], signal.SIGKILL)
        await until(lambda: not cluster.children["decode-0"].alive and all(map(ended, pids)), 10)

    with cluster:
        cluster.start(START_S)
        wait_served(cluster.urls[0], START_S)
        give_up = time.monotonic() + START_S
        while figures(cluster, "prefill-0")["decodes"] < 2:
            assert time.monotonic() < give_up
            time.sleep(0.1)
        heard = talk(cluster, asked, kill)
        assert_undisturbed(asked, heard)
        assert any(one.timeline["attempts"] > 1 for one in heard)
        assert "a rank is lost" in cluster.children["decode-0"].log.read_text()
        assert_conserved(cluster)


MIXED = [((2, 1), (4, 1)), ((4, 1), (2, 2)), ((1, 4), (2, 1))]
"""Degrees of prefill and decode on a model with 8 heads, 4 KV heads and 4 layers."""


@pytest.fixture(scope="module")
def random_llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    saved(LlamaConfig(**RANDOM), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (smollm2 / name).exists():
            shutil.copy(smollm2 / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    return sorted(references(), key=lambda one: len(one["prompt"]))[2 : 2 + ASKED]


@pytest.fixture(scope="module")
def plain(random_llama: Path, asked: list[dict[str, Any]]) -> list[str]:
    """What one rank of each phase answers."""
    with system(random_llama, ONE, ONE) as cluster:
        return [answer.text for answer in ask(cluster, asked)]


@pytest.mark.skipif(not FULL, reason="the quick test has one pair of degrees")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("prefill", "decode"), MIXED, ids=lambda degrees: f"tp{degrees[0]}pp{degrees[1]}")
def test_mixed_degrees(random_llama: Path, asked: list[dict[str, Any]], plain: list[str], prefill: Degrees, decode: Degrees) -> None:
    with system(random_llama, prefill, decode) as cluster:
        heard = ask(cluster, asked)
        assert [(answer.text, answer.error) for answer in heard] == [(text, None) for text in plain]
        assert all(answer.timeline["attempts"] == 1 for answer in heard)
        assert_conserved(cluster)
        assert_no_complaint(cluster)


@pytest.mark.skipif(not FULL, reason="the same engine as above")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("degrees", [PARTS, STAGES], ids=lambda degrees: f"tp{degrees[0]}pp{degrees[1]}")
def test_colocated(smollm2: Path, short: list[dict[str, Any]], degrees: Degrees) -> None:
    flags = {"tp": str(degrees[0]), "pp": str(degrees[1])}
    with Cluster(small(smollm2, prefill=0, decode=0, colocated=1, role_flags={"colocated": flags})) as cluster:
        cluster.start(START_S)
        wait_served(cluster.urls[0], START_S)
        assert [answer.text for answer in ask(cluster, short)] == [one["text"] for one in short]
        assert_conserved(cluster)


@pytest.mark.timeout(300)
def test_degrees_that_do_not_fit_are_refused_in_one_line(smollm2: Path) -> None:
    with pytest.raises(ClusterError, match=r"tp is 2, .* 9 heads, 3 KV heads .* possible: 1, 3"), system(smollm2, (2, 1), ONE):
        raise AssertionError("it started")
