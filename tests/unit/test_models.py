"""Every kind of model that is supported equals its eager self; every other is refused by name; what is broken on disk is said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from common.errors import StartError
from common.messages import Layout
from services.engine import weights
from services.engine.forward import choose
from services.engine.loading import load
from services.engine.pool import RESERVE_BYTES, Pool, _group_free_bytes, fit_pages, free_bytes, refuse_expandable
from services.engine.runner import Runner
from tests.unit.tiny_models import PLANS, pairs, saved

COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 300,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**COMMON, "intermediate_size": 80, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SUPPORTED: list[PreTrainedConfig] = [
    LlamaConfig(**GROUPED),
    LlamaConfig(**GROUPED, attention_bias=True, rope_parameters=LLAMA3_ROPE),
    MistralConfig(**GROUPED, sliding_window=None, head_dim=16),
    Qwen2Config(**GROUPED),
    Qwen3Config(**GROUPED, head_dim=16),
    OPTConfig(**COMMON, ffn_dim=80, word_embed_proj_dim=48),
    OPTConfig(**COMMON, ffn_dim=80, word_embed_proj_dim=24, do_layer_norm_before=False),
]


@pytest.mark.parametrize("config", SUPPORTED, ids=lambda c: c.model_type)
def test_logits_are_those_of_eager(config: PreTrainedConfig, tmp_path: Path) -> None:
    eager = saved(config, tmp_path)
    loaded = load(tmp_path, "cpu", "float32", 4)
    runner = Runner(choose(loaded, Pool(loaded.layout, 100, "cpu"), "torch"), 4)
    kv_heads = getattr(config, "num_key_value_heads", None) or 6
    assert (loaded.layout.layers, loaded.layout.kv_heads) == (3, kv_heads)
    assert loaded.layout.head_dim == (getattr(config, "head_dim", None) or 8)
    assert (loaded.context_tokens, loaded.vocabulary) == (300, 211)
    for found, wanted in pairs(runner, eager, PLANS, page_tokens=4, pages=100):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


REFUSED: list[tuple[PreTrainedConfig, str]] = [
    (MistralConfig(**GROUPED, sliding_window=64), "mistral.*sliding-window"),
    (Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=64, max_window_layers=1), "qwen2.*sliding-window"),
    (Qwen3Config(**GROUPED, use_sliding_window=True, sliding_window=64, max_window_layers=1), "qwen3.*sliding-window"),
    (LlamaConfig(**GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "llama.*dynamic"),
    (T5Config(), "t5.*encoder-decoder.*llama"),
    (MambaConfig(), "'mamba'.*supported are: llama"),
    (DeepseekV3Config(), "'deepseek_v3'.*supported are: llama"),
    (GPT2Config(), "'gpt2'.*supported are: llama"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=lambda c: getattr(c, "model_type", None))
def test_other_attention_is_refused_by_name(config: PreTrainedConfig, words: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(StartError, match=words):
        load(tmp_path, "cpu", "float32", 16)


def test_a_window_wider_than_the_context_is_no_window(tmp_path: Path) -> None:
    saved(MistralConfig(**GROUPED, sliding_window=300), tmp_path)
    assert load(tmp_path, "cpu", "auto", 16).dtype is torch.float32


def test_broken_folders_are_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no model in"):
        load(tmp_path / "nothing", "cpu", "auto", 16)
    saved(LlamaConfig(**GROUPED), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StartError, match="cannot load the model"):
        load(tmp_path, "cpu", "auto", 16)
    file.unlink()
    with pytest.raises(StartError, match="cannot load the model"):
        load(tmp_path, "cpu", "auto", 16)


def test_weights_that_would_be_unpickled_are_refused(tmp_path: Path) -> None:
    model = saved(LlamaConfig(**GROUPED), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(StartError, match="cannot load the model"):
        load(tmp_path, "cpu", "auto", 16)


def test_missing_weights_are_never_made_up(tmp_path: Path) -> None:
    """transformers fills them with random numbers and goes on."""
    from safetensors.torch import load_file, save_file

    saved(LlamaConfig(**GROUPED), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StartError, match=r"lack 1 of .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path, "cpu", "auto", 16)


def test_cuda_without_a_card_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return
    saved(LlamaConfig(**GROUPED), tmp_path)
    with pytest.raises(StartError, match="no CUDA device"):
        load(tmp_path, "cuda", "auto", 16)


def test_pages_from_free_memory() -> None:
    layout = Layout(30, 3, 16, 64, "bfloat16")
    free = RESERVE_BYTES + 1000 * layout.page_bytes
    assert [fit_pages(layout, free, fraction, 10) for fraction in (0.001, 0.1, 0.5)] == [10, 100, 500]
    assert fit_pages(layout, free_bytes(torch.device("cpu")), 0.1, 1) > 1
    with pytest.raises(StartError, match=r"reserve of 256, .*lower max_request_tokens"):
        fit_pages(layout, free, 0.1, 1001)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_pool_that_cannot_be_handed_over_is_refused(name: str) -> None:
    """UCX would copy through the host, and say nothing."""
    refuse_expandable({name: "max_split_size_mb:512,expandable_segments:False"})
    with pytest.raises(StartError, match=f"{name} has expandable_segments"):
        refuse_expandable({name: "max_split_size_mb:512, expandable_segments: True"})


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert _group_free_bytes(tmp_path) == math.inf
    for name, text in {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 5\ninactive_file 250\n"}.items():
        (tmp_path / name).write_text(text)
    assert _group_free_bytes(tmp_path) == 550
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_free_bytes(tmp_path) == math.inf


def test_a_file_that_is_no_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "wrong.gguf"
    source.write_bytes(b"this is no model" * 100)
    with pytest.raises(StartError, match=r"wrong\.gguf is no GGUF model"):
        weights.materialise(source, tmp_path / "made" / "model")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_model_that_is_there_is_used_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert weights.materialise(tmp_path / "absent.gguf", folder) == folder
    assert [file.name for file in folder.iterdir()] == ["config.json"]
