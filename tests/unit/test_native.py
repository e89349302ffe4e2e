"""Our own CPU kernels, compiled for every kind of CPU that this one can play: the logits of eager transformers, on every path."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from common.errors import StartError
from services.engine.bench.ceilings import native_product
from services.engine.forward import choose
from services.engine.loading import load
from services.engine.model import LoadedModel
from services.engine.native import build
from services.engine.native.build import KINDS, Unavailable, target
from services.engine.native.forward import NativeForward, NativeWeights, refusal
from services.engine.native.library import functions
from services.engine.pool import Pool
from services.engine.runner import Runner
from services.engine.torch_forward import TorchForward
from tests.unit.tiny_models import PLANS, pairs, saved

BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 700,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONG = [[(0, 0, 333)], [(1, 0, 500), (0, 333, 60)], [(0, 393, 1), (1, 500, 1)], [(1, 501, 97), (0, 394, 1)]]
"""Longer than a block of queries, and of keys; ends in and at the end of a page."""
CONFIGS: dict[str, PreTrainedConfig] = {
    "grouped": LlamaConfig(**BASE),
    "tied": LlamaConfig(**BASE, tie_word_embeddings=True),
    "narrow": LlamaConfig(**{**BASE, "intermediate_size": 80}),
    "each its own": Qwen3Config(**{**BASE, "num_key_value_heads": 6, "head_dim": 64}),
    "five to one": Qwen2Config(**{**BASE, "num_attention_heads": 10}),
    "twenty to one": Qwen3Config(**{**BASE, "num_attention_heads": 20, "num_key_value_heads": 1}),
    "wide heads": Qwen3Config(**{**BASE, "head_dim": 128}),
    "widest heads": LlamaConfig(**{**BASE, "head_dim": 256}),
    "odd heads": Qwen3Config(**{**BASE, "head_dim": 96}),
}
able = pytest.mark.skipif(build.compiler() is None, reason="no compiler")


def playable() -> list[str]:
    """Kinds whose instructions this CPU has."""
    return list(KINDS[: KINDS.index(target()) + 1]) if target() in KINDS else [target()]


def made(config: PreTrainedConfig, folder: Path, dtype: str) -> tuple[Any, LoadedModel, Pool]:
    eager = saved(config, folder, std=0.1)
    if dtype == "bfloat16":
        eager = eager.to(torch.bfloat16).float()
    loaded = load(folder, "cpu", dtype, 16)
    pool = Pool(loaded.layout, 120, "cpu")
    pool.tensor.fill_(float("nan"))
    return eager, loaded, pool


@able
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", playable())
def test_float32_is_eager(kind: str, config: PreTrainedConfig, tmp_path: Path) -> None:
    eager, loaded, pool = made(config, tmp_path, "float32")
    runner = Runner(NativeForward(NativeWeights(loaded, build.library(kind)), pool), 16)
    for found, wanted in pairs(runner, eager, [*PLANS, *LONG], page_tokens=16, pages=120):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@able
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", playable())
def test_bfloat16_is_as_near_as_torch(kind: str, config: PreTrainedConfig, tmp_path: Path) -> None:
    """Against the same rounded weights in float32: no further away than transformers' own bfloat16, on average and at worst."""
    near_as_torch(kind, *made(config, tmp_path, "bfloat16"))


@able
@pytest.mark.parametrize("kind", playable())
def test_maxima_that_grow(kind: str, tmp_path: Path) -> None:
    """Scores so far apart that a row's maximum grows by powers of two from one block of keys to the next."""
    sharp = saved(LlamaConfig(**BASE), tmp_path, std=0.1)  # saving in bfloat16 changes the configuration
    with torch.no_grad():
        for layer in sharp.model.layers:
            layer.self_attn.q_proj.weight *= 4
    sharp.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load(tmp_path, "cpu", "bfloat16", 16)
    near_as_torch(kind, sharp.float(), loaded, Pool(loaded.layout, 120, "cpu"))


def near_as_torch(kind: str, eager: Any, loaded: LoadedModel, pool: Pool) -> None:
    def errors(forward: Any) -> torch.Tensor:
        return torch.stack([found - wanted for found, wanted in pairs(Runner(forward, 16), eager, [*PLANS, *LONG], 16, 120)]).abs()

    ours = errors(NativeForward(NativeWeights(loaded, build.library(kind)), pool))
    pool.tensor.zero_()
    plain = errors(TorchForward(loaded, pool))
    assert ours.mean() <= 1.1 * plain.mean() and ours.max() <= 1.5 * plain.max()


@able
@pytest.mark.parametrize("kind", playable())
def test_gates_far_from_zero(kind: str, tmp_path: Path) -> None:
    """Activations whose exponential is no float any more."""
    eager = saved(CONFIGS["grouped"], tmp_path)
    with torch.no_grad():
        for layer in eager.model.layers:
            layer.mlp.gate_proj.weight *= 100
            layer.mlp.down_proj.weight /= 100
    eager.save_pretrained(tmp_path)
    loaded = load(tmp_path, "cpu", "float32", 16)
    runner = Runner(NativeForward(NativeWeights(loaded, build.library(kind)), Pool(loaded.layout, 120, "cpu")), 16)
    for found, wanted in pairs(runner, eager, PLANS, page_tokens=16, pages=120):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@able
def test_threads_compute_the_same(tmp_path: Path) -> None:
    eager, loaded, pool = made(CONFIGS["grouped"], tmp_path, "bfloat16")
    forward = NativeForward(NativeWeights(loaded, build.library()), pool)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.stack([a for a, _ in pairs(Runner(forward, 16), eager, [*PLANS, *LONG], 16, 120)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


@able
@pytest.mark.parametrize("kind", playable())
def test_products_stay_in_registers(kind: str) -> None:
    """A product of float32 takes no more than four times torch's time, in CPU time. Vectors wider than this kind's registers once lay in
    memory: a prompt took seven times as long as with torch."""
    x, weight = torch.randn(96, 576), torch.randn(1536, 576)
    ours, theirs = (least_cpu_s(run) for run in (native_product(functions(build.library(kind)), x, weight), lambda: linear(x, weight)))
    assert ours < 4 * theirs


def least_cpu_s(run: Callable[[], object]) -> float:
    before = torch.get_num_threads()
    taken = []
    try:
        torch.set_num_threads(1)
        for _ in range(9):
            began = time.process_time()
            run()
            taken.append(time.process_time() - began)
    finally:
        torch.set_num_threads(before)
    return min(taken)


@able
def test_auto_prefers_it_and_torch_is_there_for_the_rest(tmp_path: Path) -> None:
    _, loaded, pool = made(CONFIGS["grouped"], tmp_path / "a", "float32")
    assert isinstance(choose(loaded, pool, "auto"), NativeForward)
    assert isinstance(choose(loaded, pool, "torch"), TorchForward)
    opt = OPTConfig(**{**BASE, "ffn_dim": 80, "word_embed_proj_dim": 96})
    saved(opt, tmp_path / "b")
    other = load(tmp_path / "b", "cpu", "float32", 16)
    assert isinstance(choose(other, Pool(other.layout, 4, "cpu"), "auto"), TorchForward)
    with pytest.raises(StartError, match=r"kernels is native, but opt is not of the Llama family"):
        choose(other, Pool(other.layout, 4, "cpu"), "native")


@pytest.mark.parametrize(
    ("change", "page_tokens", "words"),
    [
        ({}, 8, "page_tokens must be a multiple of 16"),
        ({"head_dim": 16}, 16, "head_dim"),
        ({"head_dim": 288}, 16, "head_dim is 288, more than 256"),
        ({"attention_bias": True}, 16, "bias"),
        ({"mlp_bias": True}, 16, "bias"),
        ({"hidden_act": "gelu"}, 16, "gelu"),
        ({"num_attention_heads": 112, "num_key_value_heads": 1, "hidden_size": 224}, 16, "112 query heads share a KV head"),
    ],
)
def test_what_it_cannot_run_is_refused_in_words(change: dict[str, Any], page_tokens: int, words: str, tmp_path: Path) -> None:
    saved(LlamaConfig(**{**BASE, **change}), tmp_path)
    assert words in (refusal(load(tmp_path, "cpu", "float32", page_tokens), page_tokens) or "nothing")


def test_without_a_compiler_it_is_unavailable_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"no no-such-compiler"):
        build.compile_to(tmp_path / "x.so", target())
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(Unavailable, match="failed"):
        build.compile_to(tmp_path / "x.so", target())
    assert not list(tmp_path.iterdir())


@able
def test_what_is_compiled_once_is_found_again(tmp_path: Path) -> None:
    name = build.library_name(target())
    (tmp_path / name).write_bytes(b"")
    assert build.library(None, tmp_path) == tmp_path / name
