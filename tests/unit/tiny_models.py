"""Random models of a few thousand weights, on disk and in memory, and launches over them held against transformers' eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from common.messages import Key, Sampling
from services.engine.plan import Chunk, Plan
from services.engine.runner import Runner
from services.engine.sequence import Sequence

Part = tuple[int, int, int]
"""Of which sequence, from which token on, how many tokens."""

PLANS: list[list[Part]] = [
    [(0, 0, 41), (1, 0, 7)],
    [(1, 7, 60), (2, 0, 1)],
    [(0, 41, 1), (2, 1, 80), (1, 67, 1)],
    [(2, 81, 1), (1, 68, 1), (0, 42, 48)],
]
"""Three prompts packed, in chunks, then a step of one token each beside a prompt's chunk."""


def saved(config: PreTrainedConfig, folder: Path, std: float = 0.25) -> Any:
    """A random model of this configuration, written to `folder`; weights large enough that attention matters."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, tensor in model.named_parameters():
        if tensor.dim() == 2:
            tensor.data.normal_(std=std)
        elif "bias" in name:
            tensor.data.normal_(std=0.5)
    model.save_pretrained(folder)
    return model


def pairs(runner: Runner, eager: Any, plans: list[list[Part]], page_tokens: int, pages: int) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities `[vocabulary]` of every chunk's last row, as found and as eager gives them. Pages lie in no order."""
    vocabulary = eager.config.vocab_size
    count = 1 + max(i for parts in plans for i, _, _ in parts)
    longest = max(start + tokens for parts in plans for _, start, tokens in parts)
    ids = torch.randint(3, vocabulary, (count, longest), generator=torch.Generator().manual_seed(1)).tolist()
    every = Sampling(temperature=0, logprobs=vocabulary)
    sequences = [Sequence(Key(str(i), 0, 0, "e"), ids[i], longest, every, 1) for i in range(count)]
    for i, sequence in enumerate(sequences):
        sequence.pages = list(range(i, pages, count))[: -(-longest // page_tokens)][::-1]
        assert len(sequence.pages) * page_tokens >= longest
    compared = []
    for number, parts in enumerate(plans):
        chunks = tuple(Chunk(sequences[i], start, tokens, draws=True, index=0) for i, start, tokens in parts)
        output = runner.collect(runner.launch(Plan(number, chunks)))
        for (i, start, tokens), drawn in zip(parts, output.draws, strict=True):
            with torch.inference_mode():
                wanted = torch.log_softmax(eager(torch.tensor([ids[i][: start + tokens]])).logits[0, -1].float(), -1)
            assert drawn is not None and drawn.logprob is not None
            found = torch.full((vocabulary,), float("nan"))
            for token, value in drawn.logprob.top:
                found[token] = value
            assert wanted.std() > 0.05
            compared.append((found, wanted))
    return compared
