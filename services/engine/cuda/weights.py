"""A Llama-like model's weights as this forward pass wants them: projections of one input in one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.cuda.operators import Heads
from services.engine.model import LoadedModel
from services.engine.rotary import rotary

FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Layer:
    """Matrices are `[outputs, inputs]`."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    norms: Tensor | None
    """`[2, head_dim]`: of queries and of keys (Qwen3)."""
    o: Tensor
    o_bias: Tensor | None
    output_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    like: Heads
    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Tensor
    """`[vocabulary, hidden]`."""
    angles: tuple[Tensor, Tensor]
    """Cosines and sines, float32 `[context, head_dim / 2]`."""


def refusal(loaded: LoadedModel) -> str | None:
    """Why this forward pass cannot run the model, or None. It asks nothing of the device."""
    config, layout = loaded.module.config, loaded.layout
    if config.model_type not in FAMILY:
        return f"{config.model_type} is not of the Llama family"
    if config.hidden_act != "silu":
        return f"the activation is {config.hidden_act}"
    if layout.head_dim % 16:
        return f"head_dim is {layout.head_dim}, not a multiple of 16"
    turned = 2 * rotary(loaded.module, 1)[0].shape[1]
    if turned != layout.head_dim:
        return f"only {turned} of {layout.head_dim} dimensions of a head are turned"
    return None


def fused(loaded: LoadedModel) -> Weights:
    """The module's weights, fused. The module's own parts become views of them: nothing is in memory twice, and it still works."""
    module, layout = loaded.module, loaded.layout
    body = module.model
    attention = body.layers[0].self_attn
    cosines, sines = rotary(module, loaded.context_tokens)
    return Weights(
        like=Heads(
            heads=module.config.num_attention_heads,
            kv_heads=layout.kv_heads,
            dim=layout.head_dim,
            page_tokens=layout.page_tokens,
            scale=attention.scaling,
            epsilon=module.config.rms_norm_eps,
        ),
        embedding=body.embed_tokens.weight.detach(),
        layers=tuple(_layer(layer) for layer in body.layers),
        final_norm=body.norm.weight.detach(),
        head=module.lm_head.weight.detach(),
        angles=(cosines.to(loaded.device), sines.to(loaded.device)),
    )


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    qkv, qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _joined(mlp.gate_proj, mlp.up_proj)
    o, o_bias = _joined(attention.o_proj)
    down, down_bias = _joined(mlp.down_proj)
    return Layer(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=qkv_bias,
        norms=torch.stack([norm.weight.detach() for norm in norms if norm is not None]) if norms[0] is not None else None,
        o=o,
        o_bias=o_bias,
        output_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )


def _joined(*parts: Any) -> tuple[Tensor, Tensor | None]:
    """Weights below each other, biases behind each other; of one linear layer they are what they were."""
    if len(parts) == 1:
        return parts[0].weight.detach(), None if parts[0].bias is None else parts[0].bias.detach()
    weight = torch.cat([part.weight.detach() for part in parts])
    for part, rows in zip(parts, torch.split(weight, [len(part.weight) for part in parts]), strict=True):
        part.weight.data = rows
    if parts[0].bias is None:
        return weight, None
    return weight, torch.cat([part.bias.detach() for part in parts])
