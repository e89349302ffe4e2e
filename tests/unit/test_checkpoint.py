"""A random checkpoint is one that transformers and the engine load, and its answers are text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gateway.prompts import Model
from scripts.gpu.checkpoint import TINY, plain, write
from services.engine.loading import load


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("checkpoint")
    write(where, TINY, smollm2, "cpu")
    return where


def test_every_tensor_is_where_the_index_says(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(file.stat().st_size for file in folder.glob("*.safetensors")) - headers(folder)
    assert set(index["weight_map"].values()) == {file.name for file in folder.glob("*.safetensors")}


def headers(folder: Path) -> int:
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))


def test_transformers_and_the_engine_load_it_whole(folder: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 500_000.0
    loaded = load(folder, "cpu", "auto", 16)
    assert (loaded.vocabulary, loaded.context_tokens, loaded.layout.kv_heads) == (TINY.vocabulary, TINY.context, TINY.kv_heads)
    assert float(loaded.module.lm_head.weight.float().std()) > 0


def test_every_token_of_a_greedy_answer_shows_as_text(folder: Path) -> None:
    shown = set(plain(folder))
    assert len(shown) > 20_000
    known = Model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        drawn = model(torch.randint(100, 40_000, (1, 200))).logits[0].argmax(-1).tolist()
    assert set(drawn) <= shown and len(set(drawn)) > 20
    assert all(known.raw(token).decode() and known.shows(token) for token in drawn)
    assert known.raw(TINY.vocabulary - 1) == b"", "an id that the tokenizer lacks is no text"
