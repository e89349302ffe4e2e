"""Packed linear layers give what plain ones give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from services.engine.forward import choose
from services.engine.loading import load
from services.engine.packed import PackedLinear, pack, packable
from services.engine.pool import Pool

CPU = torch.device("cpu")
able = pytest.mark.skipif(not packable(CPU, torch.bfloat16), reason="this CPU or this torch packs no bf16 weights")


def test_only_bf16_on_a_cpu_is_packed() -> None:
    assert not packable(CPU, torch.float32)
    assert not packable(torch.device("cuda"), torch.bfloat16)


@able
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 16, 300])
def test_it_computes_the_same(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(576, 192, bias=bias).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, rows, 576, dtype=torch.bfloat16)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
    with torch.inference_mode():
        ours, plain = PackedLinear(linear)(x), linear(x)
    assert ours.shape == plain.shape and ours.dtype is torch.bfloat16
    assert (ours.double() - exact).abs().max() <= 1.5 * (plain.double() - exact).abs().max()


@able
def test_every_linear_layer_inside_is_replaced_and_embeddings_are_not() -> None:
    module = nn.ModuleDict({"e": nn.Embedding(8, 16), "a": nn.Linear(16, 16), "b": nn.Sequential(nn.Linear(16, 4))}).to(torch.bfloat16)
    assert pack(module) == 2
    assert [type(part).__name__ for part in (module["e"], module["a"], module["b"][0])] == ["Embedding", "PackedLinear", "PackedLinear"]


@able
def test_a_bf16_model_is_packed_where_torch_computes_it(smollm2: Path) -> None:
    def packed(dtype: str) -> int:
        loaded = load(smollm2, "cpu", dtype, 16)
        choose(loaded, Pool(loaded.layout, 1, "cpu"), "torch")
        return sum(isinstance(part, PackedLinear) for part in loaded.module.modules())

    assert packed("bfloat16") == 30 * 7 + 1, "of each layer q, k, v, o, gate, up, down; and the head"
    assert packed("float32") == 0
