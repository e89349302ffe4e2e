"""A worker of several ranks computes what transformers' eager attention does: real processes, gloo, float32.

Quick: one grid. BATON_TEST_FULL=1: several, and other models.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen3Config

from common.settings import WorkerSettings
from services.worker.room import Room, build
from tests.unit.tiny_models import PLANS, pairs, saved

pytestmark = pytest.mark.system
FULL = bool(os.environ.get("BATON_TEST_FULL"))
COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 300,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**COMMON, "intermediate_size": 80, "num_key_value_heads": 4}
LLAMA = LlamaConfig(**GROUPED, attention_bias=True)
QWEN = Qwen3Config(**GROUPED, head_dim=16)
OPT = OPTConfig(**COMMON, ffn_dim=80, word_embed_proj_dim=32, do_layer_norm_before=False)


@contextmanager
def room(model: Path, **more: Any) -> Iterator[Room]:
    settings = WorkerSettings(model=str(model), dtype="float32", page_tokens=4, pages=100, log_level="warning", **more)
    built = build(settings, [[min(os.sched_getaffinity(0))]] * (settings.tp * settings.pp), "prefill")
    try:
        yield built
    finally:
        built.ranks.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model has none."""
    monkeypatch.setattr("common.model_files.tokenizer_hash", lambda folder: "none")


CASES = [(LLAMA, 2, 2)] + ([(LLAMA, 2, 1), (QWEN, 4, 1), (QWEN, 1, 3), (OPT, 2, 3)] if FULL else [])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("config", "tp", "pp"), CASES, ids=lambda value: getattr(value, "model_type", value))
def test_logits_are_those_of_eager(config: PreTrainedConfig, tp: int, pp: int, tmp_path: Path) -> None:
    eager = saved(config, tmp_path)
    with room(tmp_path, tp=tp, pp=pp) as built:
        for found, wanted in pairs(built.runner, eager, PLANS, page_tokens=4, pages=100):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


HELD = """
import os, sys
from common.settings import WorkerSettings
from services.worker.room import build

settings = WorkerSettings(model=sys.argv[1], dtype="float32", page_tokens=4, pages=100, tp=2, log_level="error")
built = build(settings, [[min(os.sched_getaffinity(0))]] * 2, "prefill")
print(built.ranks.store, flush=True)
sys.stdin.read()
"""
GONE_S = 20.0


@pytest.mark.timeout(300)
def test_the_store_of_a_killed_worker_goes_with_its_last_rank(tmp_path: Path) -> None:
    """Rank 0 can remove nothing after a SIGKILL; the others see that it has ended."""
    saved(LLAMA, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HELD, str(tmp_path / "model")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root,
    ) as worker:  # fmt: skip
        assert worker.stdout is not None
        store = Path(worker.stdout.readline().strip())
        assert store.parent.parent == temporary and store.exists()
        worker.kill()
    give_up = time.monotonic() + GONE_S
    while list(temporary.glob("baton-ranks-*")):
        assert time.monotonic() < give_up, "the store is left behind"
        time.sleep(0.05)
