"""The GPU's forward pass where there is no GPU, with the reference operators: the logits of eager transformers, and its decode inputs."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from common.messages import Key, Sampling
from services.engine.cuda import flash
from services.engine.cuda.forward import Body, CudaForward
from services.engine.cuda.graphs import Step, padded, sizes
from services.engine.cuda.inputs import blocks
from services.engine.cuda.operators import Heads, Prompts
from services.engine.cuda.reference import ReferenceOperators
from services.engine.cuda.runner import runner
from services.engine.cuda.weights import fused, refusal
from services.engine.launch import Launch
from services.engine.loading import load
from services.engine.pages import PagePool
from services.engine.plan import Drawn, Outcome, Plan
from services.engine.policies import Limits
from services.engine.pool import Pool
from services.engine.runner import Runner
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence
from services.engine.torch_forward import TorchForward
from tests.unit.tiny_models import PLANS, pairs, saved

BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 700,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONG = [[(0, 0, 333)], [(1, 0, 500), (0, 333, 60)], [(1, 500, 1), (0, 393, 1)]]
CONFIGS: dict[str, PreTrainedConfig] = {
    "grouped": LlamaConfig(**BASE),
    "tied, biased": LlamaConfig(**BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama 3's angles": LlamaConfig(
        **BASE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "normed heads": Qwen3Config(**{**BASE, "head_dim": 48}),
    "biased inputs": Qwen2Config(**{**BASE, "num_attention_heads": 8}),
}


@pytest.mark.parametrize("page_tokens", [16, 5])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32_is_eager(config: PreTrainedConfig, page_tokens: int, tmp_path: Path) -> None:
    eager = saved(config, tmp_path, std=0.1)
    loaded = load(tmp_path, "cpu", "float32", page_tokens)
    assert refusal(loaded) is None
    pool = Pool(loaded.layout, 1920 // page_tokens, "cpu")
    pool.tensor.fill_(float("nan"))
    runner = Runner(CudaForward(fused(loaded), ReferenceOperators(), pool), page_tokens)
    for found, wanted in pairs(runner, eager, [*PLANS, *LONG], page_tokens, pool.pages):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def varlen(query: Tensor, key: Tensor, value: Tensor, q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int, **how: Any) -> Tensor:
    """What torch's kernel, which runs on a GPU only, is documented to compute; and what it insists on."""
    assert how.pop("window_size") == (-1, 0) and how.pop("enable_gqa", True) and set(how) == {"scale"}
    assert q_ends.dtype == k_ends.dtype == torch.int32 and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    parts = []
    for (first, end), (low, high) in zip(pairwise(q_ends.tolist()), pairwise(k_ends.tolist()), strict=True):
        assert end - first <= most_q and high - low <= most_k
        q, k, v = (x.transpose(0, 1)[None] for x in (query[first:end], key[low:high], value[low:high]))
        mask = torch.ones(end - first, high - low, dtype=torch.bool).tril(high - low - end + first)
        parts.append(scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **how)[0].transpose(0, 1))
    return torch.cat(parts)


class PackedOperators(ReferenceOperators):
    packs = True

    def prefill(self, queries: Tensor, pages: Tensor, prompts: Prompts, like: Heads, out: Tensor) -> None:
        assert prompts.packed is not None
        out.copy_(flash.attend(queries, pages, prompts.packed, like))


@pytest.mark.parametrize("page_tokens", [16, 5])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32_is_eager_with_prompts_packed(
    config: PreTrainedConfig, page_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "varlen_attn", varlen)
    eager = saved(config, tmp_path, std=0.1)
    loaded = load(tmp_path, "cpu", "float32", page_tokens)
    pool = Pool(loaded.layout, 1920 // page_tokens, "cpu")
    pool.tensor.fill_(float("nan"))
    runner = Runner(CudaForward(fused(loaded), PackedOperators(), pool), page_tokens)
    for found, wanted in pairs(runner, eager, [*PLANS, *LONG], page_tokens, pool.pages):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_the_module_still_works_and_shares_the_memory(tmp_path: Path) -> None:
    eager = saved(CONFIGS["biased inputs"], tmp_path, std=0.1)
    loaded = load(tmp_path, "cpu", "float32", 16)
    weights = fused(loaded)
    layer = loaded.module.model.layers[1]
    inside = {weights.layers[1].qkv.untyped_storage().data_ptr(), weights.layers[1].gate_up.untyped_storage().data_ptr()}
    parts = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj)
    assert {part.weight.untyped_storage().data_ptr() for part in parts} == inside
    runner = Runner(TorchForward(loaded, Pool(loaded.layout, 120, "cpu")), 16)
    for found, wanted in pairs(runner, eager, PLANS, 16, 120):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OPTConfig(**{**BASE, "ffn_dim": 80, "word_embed_proj_dim": 96}), "opt is not of the Llama family"),
        (LlamaConfig(**BASE, hidden_act="gelu"), "the activation is gelu"),
        (LlamaConfig(**{**BASE, "head_dim": 24}), "head_dim is 24"),
    ],
)
def test_what_it_cannot_run_is_refused_in_words(config: PreTrainedConfig, words: str, tmp_path: Path) -> None:
    saved(config, tmp_path)
    assert words in (refusal(load(tmp_path, "cpu", "float32", 16)) or "nothing")


# ---------------------------------------------------------------------------------------------------- one launch ahead


def test_ids_are_the_same_one_launch_ahead(tmp_path: Path) -> None:
    """A pending chunk takes its id from the launch before it: greedy, sampled, with penalties that look back, with log-probabilities."""
    saved(CONFIGS["grouped"], tmp_path, std=0.1)
    loaded = load(tmp_path, "cpu", "float32", 16)
    samplings = [
        Sampling(temperature=0, logprobs=3),
        Sampling(seed=5),
        Sampling(seed=6, top_k=20, repetition_penalty=1.3),
        Sampling(temperature=0, frequency_penalty=1.5, presence_penalty=0.5),
        Sampling(seed=7, top_p=0.8),
    ]

    def outcomes(depth: int) -> list[Drawn]:
        forward = CudaForward(fused(loaded), ReferenceOperators(), Pool(loaded.layout, 120, "cpu"))
        computes = runner(forward, 16)
        scheduler = Scheduler(PagePool(120, 16), "chunked", Limits(40, 40, 8), depth=depth)
        for number, sampling in enumerate(samplings):
            ids = list(range(3, 20 + 17 * number))
            scheduler.submit(Sequence(Key(str(number), 0, 0, "e"), ids, len(ids), sampling, 9 + 3 * number))
        found: list[Outcome] = []
        under_way: deque[tuple[Plan, Any]] = deque()
        pending = 0
        while (plan := scheduler.next()) or under_way:
            if plan is not None:
                pending += sum(chunk.pending for chunk in plan.chunks)
                under_way.append((plan, computes.launch(plan)))
            else:
                oldest, ticket = under_way.popleft()
                scheduler.commit(oldest, computes.collect(ticket))
                found += scheduler.take_outcomes()
        assert computes.depth == 2 and (pending > 20) == (depth > 1)
        return sorted((one for one in found if isinstance(one, Drawn)), key=lambda one: (one.key.request_id, one.token.index))

    at_once, ahead = outcomes(1), outcomes(2)
    assert [one.token.id for one in ahead] == [one.token.id for one in at_once]
    assert len(ahead) == sum(9 + 3 * number for number in range(len(samplings)))
    assert [one.finish for one in ahead] == [one.finish for one in at_once]
    assert all((one.token.logprob is not None) == (one.key.request_id == "0") for one in ahead)


# -------------------------------------------------------------------------------------------------------- decode steps


def test_sizes_are_powers_of_two_and_the_largest_batch() -> None:
    assert sizes(1) == (1,)
    assert sizes(2) == (1, 2)
    assert sizes(256) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert sizes(100) == (1, 2, 4, 8, 16, 32, 64, 100)
    assert [padded(batch, sizes(100)) for batch in (1, 3, 64, 65, 100)] == [1, 4, 64, 100, 100]


def test_a_padded_step_is_the_step(tmp_path: Path) -> None:
    """Static inputs, filled again and again, as a graph reads them: the rows in use are those of the launch, the others touch no page."""
    config = CONFIGS["grouped"]
    saved(config, tmp_path, std=0.1)
    loaded = load(tmp_path, "cpu", "float32", 16)
    plain, stepped = (Pool(loaded.layout, 30, "cpu") for _ in range(2))
    for pool in (plain, stepped):
        torch.manual_seed(7)
        pool.tensor.normal_()
    weights = fused(loaded)
    forward, body = CudaForward(weights, ReferenceOperators(), plain), Body(weights, ReferenceOperators(), stepped)
    step = Step(8, 64, torch.device("cpu"))
    before = stepped.tensor.clone()
    body(step.views(8, 1))
    assert torch.equal(stepped.tensor, before), "a step of nothing but padding has written"
    for starts, size in (([100, 33, 16, 15, 0], 8), ([101, 17], 2), ([70, 18, 17], 4)):
        launch = _step(starts)
        step.fill(launch, size, 16)
        found: Tensor = body(step.views(size, 1))[: len(starts)]
        torch.testing.assert_close(found, forward(launch), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stepped.tensor, plain.tensor)


def _step(starts: list[int]) -> Launch:
    """One token of each sequence, at these positions; pages from the last one down."""
    counts = np.asarray([start // 16 + 1 for start in starts])
    begins = counts.cumsum() - counts
    rows = np.arange(len(starts))
    return Launch(
        ids=rows + 20,
        positions=np.asarray(starts),
        chunks=np.stack((rows, np.ones_like(rows), starts, begins), 1),
        table=29 - np.arange(counts.sum()),
        keep=rows,
    )


def test_blocks_cover_every_chunk_and_the_longest_come_first() -> None:
    chunks = np.asarray([[0, 5, 0, 0], [5, 130, 64, 1], [135, 64, 0, 14]])
    assert blocks(chunks, 64).tolist() == [[1, 128], [1, 64], [1, 0], [0, 0], [2, 0]]
    assert blocks(chunks[:0], 64).shape == (0, 2)
