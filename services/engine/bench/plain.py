"""The same launches through plain transformers: its own attention, its own cache, one tensor of equal prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from services.engine.bench.launches import prompt_name, step_name
from services.engine.bench.rounds import Case

KINDS = ("sdpa", "eager")


class Plain:
    """One model of transformers, with the attention of this `kind`."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype, kind: str) -> None:
        self.kind = kind
        self._device = device
        self._dtype = dtype
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=kind).eval().to(device)

    def cases(self, prompts: tuple[tuple[int, ...], ...], steps: tuple[tuple[int, int], ...]) -> list[Case]:
        """Named as the engine's, with the kind behind: prompts of equal lengths, and decode steps behind a cache of random numbers."""
        return [self._prefill(lengths) for lengths in prompts] + [self._decode(*step) for step in steps]

    def name(self, launch: str) -> str:
        return f"{launch}, {self.kind}"

    # ---------------------------------------------------------------------------------------------------------- inside

    def _prefill(self, lengths: tuple[int, ...]) -> Case:
        ids = torch.randint(100, 500, (len(lengths), lengths[0]), device=self._device)
        return Case(self.name(prompt_name(lengths)), self._run(ids, lambda: DynamicCache()))

    def _decode(self, batch: int, context: int) -> Case:
        ids = torch.randint(100, 500, (batch, 1), device=self._device)
        cache = self._cache(batch, context - 1)

        def shorten() -> None:
            if (added := cache.get_seq_length() - (context - 1)) > 0:
                cache.crop(-added)

        return Case(self.name(step_name(batch, context)), self._run(ids, lambda: cache), before=shorten)

    def _cache(self, batch: int, tokens: int) -> Any:
        config = self._model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(batch, heads, tokens, dim, device=self._device).to(self._dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def _run(self, ids: Any, cache: Callable[[], Any]) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> object:
            logits = self._model(input_ids=ids, past_key_values=cache(), use_cache=True, logits_to_keep=1).logits
            return logits[:, -1].argmax(-1).tolist()

        return run
