"""A model of the Llama family as mere tensors, which is all that the native kernels want of it.

A worker that needs no module need not import transformers either: that took two fifths of its start, and a replacement for a dead worker
starts from nothing (docs/notes.md, "What a start costs"). Whatever is not plain here is left to transformers (services/engine/loading.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.engine.model import FAMILY, LoadedModel, adopt, dtype_of, refuse_unsupported

NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)
"""What a configuration must say: defaults differ between families, and transformers knows them."""
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

Shapes = dict[str, tuple[int, ...]]


class Rotary:
    """The unscaled rotary embedding (Su et al., 2021), called as transformers' is: cosines and sines `[1, T, dim]`, float32."""

    def __init__(self, theta: float, dim: int) -> None:
        self.inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)

    def __call__(self, like: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        angles = places[..., None].float() * self.inv_freq
        both = torch.cat((angles, angles), -1)
        return both.cos(), both.sin()


def read(path: Path, dtype: str, page_tokens: int) -> LoadedModel | None:
    """Load a model from a folder; None if transformers should. Raises StartError for attention that no code here computes."""
    try:
        config = _config(json.loads((path / "config.json").read_text()))
        if config is None:
            return None
        refuse_unsupported(config)
        kind = dtype_of(config, dtype)
        tensors = _tensors(path, _shapes(config), kind)
    except (OSError, ValueError, TypeError, SafetensorError):
        return None
    if tensors is None:
        return None
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    module = _tree(tensors)
    module.config, module.dtype = config, kind
    module.model.rotary_emb = Rotary(config.rope_theta, config.head_dim)
    for layer in module.model.layers:
        layer.self_attn.scaling = config.head_dim**-0.5
    return adopt(module, "cpu", page_tokens)


def _config(said: Any) -> SimpleNamespace | None:
    """With the names that transformers' configurations have; None if anything is unusual."""
    if not isinstance(said, dict):
        return None
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    theta: Any = rope.get("rope_theta", said.get("rope_theta"))
    plain = (
        said.get("model_type") in FAMILY
        and all(isinstance(said.get(name), int | float) for name in NUMBERS)
        and isinstance(said.get("tie_word_embeddings"), bool)
        and isinstance(theta, int | float)
        and set(rope) <= {"rope_theta", "rope_type"}
        and rope.get("rope_type", "default") == "default"
        and said.get("partial_rotary_factor", 1.0) == 1.0
        and (said["model_type"] != "mistral" or "sliding_window" in said)
        and not said.get("use_sliding_window")
        and "quantization_config" not in said
        and said.get("hidden_act") == "silu"
    )
    if not plain:
        return None
    config = SimpleNamespace(**said)
    config.rope_theta = float(theta)
    config.dtype = said.get("dtype") or said.get("torch_dtype")
    config.head_dim = said.get("head_dim") or config.hidden_size // config.num_attention_heads
    return config


def _shapes(config: SimpleNamespace) -> Shapes:
    """Of every tensor that must be there."""
    hidden, inner = config.hidden_size, config.intermediate_size
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (wide, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, wide),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.model_type == "qwen2":
        layer |= {"self_attn.q_proj.bias": (wide,), "self_attn.k_proj.bias": (narrow,), "self_attn.v_proj.bias": (narrow,)}
    if config.model_type == "qwen3":
        layer |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (config.vocab_size, hidden)}


def _tensors(path: Path, shapes: Shapes, kind: torch.dtype) -> dict[str, Tensor] | None:
    """All of the files', which must be these and no others. Raises OSError, ValueError, SafetensorError."""
    with ExitStack() as files:
        taken = dict(_files(path, files.enter_context))
        if set(taken) != set(shapes):
            return None
        found = {name: take(name).to(kind) for name, take in taken.items()}
    return found if all(tensor.shape == shapes[name] for name, tensor in found.items()) else None


def _files(path: Path, opened: Callable[[Any], Any]) -> Iterator[tuple[str, Callable[[str], Tensor]]]:
    """Each tensor's name, and how to get it."""
    index = path / INDEX
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [FILE]
    for name in names:
        file = opened(safe_open(path / Path(name).name, framework="pt"))
        for tensor in file.keys():  # noqa: SIM118
            if not tensor.endswith(".rotary_emb.inv_freq"):
                yield tensor, file.get_tensor


def _tree(tensors: Mapping[str, Tensor]) -> SimpleNamespace:
    """`model.layers.0.mlp.up_proj.weight` as attributes, layers as a list: what a module looks like to who only reads."""
    branches: dict[str, dict[str, Tensor]] = {}
    leaves: dict[str, Any] = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        if dot:
            branches.setdefault(first, {})[rest] = tensor
        else:
            leaves[first] = tensor
    for name, branch in branches.items():
        leaves[name] = _layers(branch) if name == "layers" else _tree(branch)
    return SimpleNamespace(**leaves)


def _layers(branch: Mapping[str, Tensor]) -> list[SimpleNamespace]:
    named = vars(_tree(branch))
    return [named[str(number)] for number in range(len(named))]
