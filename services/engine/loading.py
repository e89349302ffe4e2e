"""Loading a model by transformers, with this engine's attention put into place: every supported model, every device."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from common.errors import StartError
from services.engine.attention import attend
from services.engine.grid import Grid
from services.engine.model import LoadedModel, adopt, dtype_of, refuse_unsupported

ATTENTION = "baton_paged"

AttentionInterface.register(ATTENTION, attend)


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
    kind = dtype_of(config, dtype)
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
