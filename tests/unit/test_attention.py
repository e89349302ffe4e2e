"""Packed prompts and paged decode, packed by the runner, against a slow float64 reference: any shapes, pages, chunks and mixes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.messages import Key, Layout, Sampling, Shard
from services.engine.attention import BLOCK_ROWS, Step, attend, decode
from services.engine.model import LoadedModel
from services.engine.plan import Chunk, Plan
from services.engine.pool import Pool
from services.engine.runner import Runner
from services.engine.sequence import Sequence
from services.engine.torch_forward import TorchForward

LONGEST = 400
"""A token's id says whose it is and where it stands: sequence * LONGEST + position."""


@dataclass
class OnlyAttention:
    """A model of nothing but attention: each id has its own fixed query, key and value in every layer."""

    q: Tensor
    """[layers, ids, heads, head_dim]"""
    k: Tensor
    v: Tensor
    seen: list[tuple[list[int], list[int], Tensor]] = field(default_factory=list)
    """Of each launch: ids, positions, attention's output [layers, T, heads, head_dim]."""

    @property
    def model(self) -> OnlyAttention:
        return self

    @staticmethod
    def lm_head(rows: Tensor) -> Tensor:
        return rows

    def __call__(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, baton_step: Step) -> Any:
        ids = input_ids[0]
        out = []
        for layer in range(self.q.shape[0]):
            q, k, v = (table[layer, ids].transpose(0, 1)[None] for table in (self.q, self.k, self.v))
            out.append(attend(SimpleNamespace(layer_idx=layer), q, k, v, None, 0.3, baton_step=baton_step)[0][0])
        self.seen.append((ids.tolist(), position_ids[0].tolist(), torch.stack(out)))
        return SimpleNamespace(last_hidden_state=torch.zeros(1, len(ids), 8))

    def reference(self, layer: int, token: int) -> Tensor:
        """[heads, head_dim] in float64, one position and one head at a time."""
        first = token // LONGEST * LONGEST
        q, k, v = self.q[layer, token].double(), self.k[layer, first : token + 1].double(), self.v[layer, first : token + 1].double()
        group = q.shape[0] // k.shape[1]
        rows = [torch.softmax(k[:, head // group] @ q[head] * 0.3, 0) @ v[:, head // group] for head in range(q.shape[0])]
        return torch.stack(rows)


@dataclass
class Bench:
    """A runner over `OnlyAttention`, and sequences with pages in random order out of a pool full of what is no number."""

    model: OnlyAttention
    pool: Pool
    forward: TorchForward
    sequences: list[Sequence]

    def check(self, chunks: list[tuple[int, int, int]], tolerance: float) -> None:
        """Launch chunks of (sequence, start, tokens) and compare every row."""
        parts = tuple(Chunk(self.sequences[i], start, tokens, draws=False, index=0) for i, start, tokens in chunks)
        Runner(self.forward, self.pool.layout.page_tokens).launch(Plan(0, parts))
        ids, positions, out = self.model.seen[-1]
        wanted = [i * LONGEST + place for i, start, tokens in chunks for place in range(start, start + tokens)]
        assert sorted(ids) == sorted(wanted)
        assert positions == [token % LONGEST for token in ids]
        for layer in range(out.shape[0]):
            for row, token in enumerate(ids):
                torch.testing.assert_close(out[layer, row].double(), self.model.reference(layer, token), rtol=tolerance, atol=tolerance)


def bench(
    lengths: list[int],
    *,
    page_tokens: int = 4,
    kv_heads: int = 2,
    group: int = 3,
    dim: int = 8,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Bench:
    random = torch.Generator().manual_seed(seed)

    def table(heads: int) -> Tensor:
        return torch.randn(layers, len(lengths) * LONGEST, heads, dim, generator=random).to(dtype)

    model = OnlyAttention(table(kv_heads * group), table(kv_heads), table(kv_heads))
    layout = Layout(layers, kv_heads, page_tokens, dim, "float32" if dtype is torch.float32 else "bfloat16")
    needed = [layout.pages(length) for length in lengths]
    pool = Pool(layout, sum(needed) + 3, "cpu")
    pool.tensor.fill_(float("nan"))
    loaded = LoadedModel(model, layout, Shard(0, (0, layers), (0, kv_heads)), LONGEST, 8, torch.device("cpu"), dtype)
    order = np.random.default_rng(seed).permutation(pool.pages).tolist()
    sequences = []
    for i, length in enumerate(lengths):
        sequence = Sequence(Key(str(i), 0, 0, "e"), [i * LONGEST + place for place in range(length)], length, Sampling(temperature=0), 1)
        sequence.pages = [order.pop() for _ in range(needed[i])]
        sequences.append(sequence)
    return Bench(model, pool, TorchForward(loaded, pool), sequences)


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    page_tokens=st.sampled_from([1, 3, 4, 16]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_split_into_chunks_and_any_mix(
    lengths: list[int], page_tokens: int, kv_heads: int, group: int, seed: int, data: st.DataObject
) -> None:
    made = bench(lengths, page_tokens=page_tokens, kv_heads=kv_heads, group=group, seed=seed)
    done = [0] * len(lengths)
    for _ in range(4):
        open_ = [i for i, length in enumerate(lengths) if done[i] < length]
        if not open_:
            break
        chunks = []
        for i in data.draw(st.permutations(open_)):
            tokens = data.draw(st.sampled_from([1, 2, page_tokens, 70, LONGEST]))
            chunks.append((i, done[i], min(tokens, lengths[i] - done[i])))
            done[i] += chunks[-1][2]
        made.check(chunks, 2e-5)


def test_decode_of_very_different_lengths_in_one_launch() -> None:
    lengths = [2, 300, 7, 150, 151, 33, 5, 80]
    made = bench(lengths)
    made.check([(i, 0, length - 1) for i, length in enumerate(lengths)], 2e-5)
    made.check([(i, length - 1, 1) for i, length in enumerate(lengths)], 2e-5)


def test_padding_at_most_doubles_what_decode_reads() -> None:
    lengths = [2, 300, 7, 150, 151, 33, 5, 80]
    made = bench(lengths)
    made.check([(i, 0, length - 1) for i, length in enumerate(lengths)], 2e-5)
    chunks = [
        Chunk(made.sequences[i], length - 1, 1, draws=False, index=0) for i, length in sorted(enumerate(lengths), key=lambda x: -x[1])
    ]
    batches = made.forward.step(Runner(made.forward, 4).arrays(chunks)).batches
    read = sum(batch.count * batch.runs.shape[-1] for batch in batches)
    assert sum(batch.count for batch in batches) == len(lengths)
    assert read <= 2 * sum(-(-length // 4) for length in lengths) + 8 * len(lengths)


def test_a_prompt_longer_than_many_blocks_of_rows() -> None:
    length = 3 * BLOCK_ROWS["cpu"] + 17
    made = bench([length], layers=1)
    made.check([(0, 0, 50)], 2e-5)
    made.check([(0, 50, length - 50)], 2e-5)


def test_bf16_stays_within_its_rounding() -> None:
    lengths = [90, 40, 17]
    made = bench(lengths, dtype=torch.bfloat16, page_tokens=16, layers=1)
    made.check([(i, 0, length - 1) for i, length in enumerate(lengths)], 4e-2)
    made.check([(i, length - 1, 1) for i, length in enumerate(lengths)], 4e-2)


def test_large_scores_do_not_overflow() -> None:
    made = bench([70], layers=1)
    made.model.q *= 300
    made.model.k *= 300
    made.check([(0, 0, 69)], 1e-3)
    made.check([(0, 69, 1)], 1e-3)


def test_decode_ignores_what_is_masked() -> None:
    q, k, v = torch.randn(1, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    mask = torch.zeros(1, 1, 1, 6)
    mask[..., 4:] = float("-inf")
    before = decode(q, k, v, mask, 0.3)
    k[:, :, 4:], v[:, :, 4:] = 1e30, -1e6
    assert torch.equal(before, decode(q, k, v, mask, 0.3))


def test_neighbours_pages_are_left_alone() -> None:
    """Writing one sequence changes its own pages only: all others still hold what they held."""
    made = bench([37, 21])
    pool = made.pool
    pool.tensor.fill_(7.0)
    made.check([(0, 0, 37)], 2e-5)
    others = sorted(set(range(pool.pages)) - set(made.sequences[0].pages))
    assert bool((pool.tensor[others] == 7.0).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pool_views_are_one_memory(dtype: Any) -> None:
    layout = Layout(3, 2, 4, 8, dtype)
    pool = Pool(layout, 5, "cpu")
    assert pool.bytes.shape == (5, layout.page_bytes) and not bool(pool.bytes.any())
    keys, values = torch.randn(2, 6, 8).to(pool.tensor.dtype), torch.randn(2, 6, 8).to(pool.tensor.dtype)
    pages, offsets = np.asarray([3, 3, 1, 1, 1, 1]), np.asarray([2, 3, 0, 1, 2, 3])
    pool.write(2, torch.as_tensor(pool.slots(pages, offsets)), keys, values)
    assert torch.equal(pool.tensor[3, 2, 0, :, 2:], keys[:, :2]) and torch.equal(pool.layer(2)[1][1], values[:, 2:])
    read = pool.read(2, torch.as_tensor(pool.runs(np.asarray([3, 1]))))
    assert torch.equal(read[0][:, 2:], keys) and torch.equal(read[1][:, 2:], values)
    touched = pool.bytes.view(5, -1).any(1).tolist()
    assert touched == [False, True, False, True, False]
    pool.clear([3])
    assert not bool(pool.bytes[3].any()) and bool(pool.bytes[1].any())
