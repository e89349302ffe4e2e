"""A model for the engine: which ones it can run, and what it must know of them. Without transformers: see tensors.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from common.errors import StartError
from common.messages import Layout, Shard

SUPPORTED = ("llama", "mistral", "opt", "qwen2", "qwen3")
"""Model types with standard or grouped-query attention over the whole context (SmolLM2 is a llama)."""
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Those of which the native kernels run: they have the same names and shapes."""
LENGTH_ROPES = ("dynamic", "longrope")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with the facts the engine needs."""

    module: Any
    layout: Layout
    shard: Shard
    context_tokens: int
    vocabulary: int
    device: torch.device
    dtype: torch.dtype


def adopt(module: Any, device: str, page_tokens: int) -> LoadedModel:
    """The facts of a module that is in memory already, loaded with this engine's attention."""
    config = module.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kind = cast(Literal["float32", "bfloat16", "float16"], str(module.dtype).removeprefix("torch."))
    return LoadedModel(
        module=module,
        layout=Layout(config.num_hidden_layers, kv_heads, page_tokens, head_dim, kind),
        shard=Shard(0, (0, config.num_hidden_layers), (0, kv_heads)),
        context_tokens=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        device=torch.device(device),
        dtype=module.dtype,
    )


def body_of(module: Any) -> Any:
    """The decoder inside: embeddings, layers, final norm."""
    return getattr(module.model, "decoder", module.model)


def refuse_unsupported(config: Any) -> None:
    """Raises StartError, by name, for attention that this engine would compute wrongly."""
    kind = getattr(config, "model_type", "?")
    known = ", ".join(SUPPORTED)
    if getattr(config, "is_encoder_decoder", False):
        raise StartError(f"{kind} is an encoder-decoder; supported are decoder-only models: {known}")
    if kind not in SUPPORTED:
        raise StartError(f"model type {kind!r} is not supported; supported are: {known}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in LENGTH_ROPES:
        raise StartError(f"{kind} with {rope} rope is not supported: its angles depend on the longest sequence computed beside it")
    window = getattr(config, "sliding_window", None)
    windowed = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    uses = getattr(config, "use_sliding_window", kind == "mistral") and window is not None and window < config.max_position_embeddings
    if uses or windowed:
        raise StartError(
            f"{kind} with sliding-window attention (window {window}) is not supported; attention must be over the whole context"
        )


def dtype_of(config: Any, name: str) -> torch.dtype:
    """Of weights and KV: what the setting says, or else the model's own."""
    if name != "auto":
        return DTYPES[name]
    own = getattr(config, "dtype", None) or torch.float32
    own = own if isinstance(own, torch.dtype) else DTYPES.get(str(own).removeprefix("torch."), torch.float32)
    return own if own in DTYPES.values() else torch.float32
