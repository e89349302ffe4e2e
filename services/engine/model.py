"""Loading a model for the engine: which ones it can run, what it must know of them, and its attention put into place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from common.errors import StartError
from common.messages import Layout, Shard
from services.engine.attention import attend
from services.engine.grid import Grid

ATTENTION = "baton_paged"
SUPPORTED = ("llama", "mistral", "opt", "qwen2", "qwen3")
"""Model types with standard or grouped-query attention over the whole context (SmolLM2 is a llama)."""
LENGTH_ROPES = ("dynamic", "longrope")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

AttentionInterface.register(ATTENTION, attend)


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


def load(path: str | Path, device: str, dtype: str, page_tokens: int) -> LoadedModel:
    """Load a decoder-only model from a folder. Raises StartError if it is none that this engine runs, or does not fit the device."""
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise StartError(f"no model in {path}: {error}") from error
    refuse_unsupported(config)
    if device == "cuda" and not torch.cuda.is_available():
        raise StartError("device is cuda, but torch sees no CUDA device")
    kind = _dtype(config, dtype)
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=kind, attn_implementation=ATTENTION, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        module.eval().requires_grad_(False).to(device)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise StartError(f"cannot load the model in {path}: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise StartError(f"the weights in {path} lack {len(missing)} of the model's tensors, first {missing[0]}")
    return adopt(module, device, page_tokens)


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


def refuse_grid(path: str | Path, grid: Grid) -> None:
    """Raises StartError if the model's sizes cannot be divided so."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise StartError(f"no model in {path}: {error}") from error
    refuse_unsupported(config)
    heads = config.num_attention_heads
    reason = grid.refusal(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        inner=getattr(config, "intermediate_size", None) or config.ffn_dim,
    )
    if reason is not None:
        raise StartError(reason)


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


def _dtype(config: Any, name: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    own = getattr(config, "dtype", None) or torch.float32
    own = own if isinstance(own, torch.dtype) else DTYPES.get(str(own).removeprefix("torch."), torch.float32)
    return own if own in DTYPES.values() else torch.float32
