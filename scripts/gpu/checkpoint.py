"""A model with random weights, written as a checkpoint: generated on the device, layer by layer, in files of one layer each.

Rows of the head are zero for every token that is no piece of plain text by itself (special ones, halves of characters, ids beyond the
tokenizer's), so that such a token is never the likeliest, and every token of a greedy answer shows as text at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig

from common.model_files import TOKENIZER_FILES

STD = 0.02
WRITERS = 4
SPACES = str.maketrans("", "", "Ġ▁")
"""How tokenizers write a space at the beginning of a word."""

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Of a model of the Llama family."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    context: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


LLAMA_3_8B = Size(hidden=4096, layers=32, heads=32, kv_heads=8, inner=14336, vocabulary=128256, context=16384)
TINY = Size(hidden=64, layers=2, heads=4, kv_heads=2, inner=128, vocabulary=50_000, context=4096)


def write(folder: Path, size: Size, tokenizer: Path, device: str) -> int:
    """Config, weights and the tokenizer's files; returns the bytes of weights. `tokenizer`: a folder with a tokenizer.json."""
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    _config(size).save_pretrained(folder)
    places: dict[str, str] = {}
    total = 0
    waiting: list[Future[None]] = []
    with ThreadPoolExecutor(WRITERS) as writers:
        for number, tensors in enumerate(_parts(size, plain(tokenizer), device)):
            name = f"model-{number:05}.safetensors"
            places.update(dict.fromkeys(tensors, name))
            total += sum(tensor.nbytes for tensor in tensors.values())
            on_host = {key: tensor.cpu() for key, tensor in tensors.items()}
            waiting.append(writers.submit(save_file, on_host, folder / name, {"format": "pt"}))
            if len(waiting) > WRITERS:
                waiting.pop(0).result()
        for one in waiting:
            one.result()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def plain(tokenizer: Path) -> list[int]:
    """Ids that are a piece of printable ASCII by themselves, ascending."""
    known = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    special = set(known.get_added_tokens_decoder())
    words = ((id, word.translate(SPACES)) for word, id in known.get_vocab().items())
    return sorted(id for id, word in words if word and word.isascii() and word.isprintable() and id not in special)


def _config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.context,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _parts(size: Size, shown: list[int], device: str) -> Iterator[Named]:
    """What goes into one file each."""
    torch.manual_seed(6)

    def matrix(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=torch.bfloat16).normal_(std=STD)

    def ones() -> Tensor:
        return torch.ones(size.hidden, device=device, dtype=torch.bfloat16)

    yield {"model.embed_tokens.weight": matrix(size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        matrices = {
            "self_attn.q_proj": matrix(size.hidden, size.hidden),
            "self_attn.k_proj": matrix(size.kv_heads * size.head_dim, size.hidden),
            "self_attn.v_proj": matrix(size.kv_heads * size.head_dim, size.hidden),
            "self_attn.o_proj": matrix(size.hidden, size.hidden),
            "mlp.gate_proj": matrix(size.inner, size.hidden),
            "mlp.up_proj": matrix(size.inner, size.hidden),
            "mlp.down_proj": matrix(size.hidden, size.inner),
        }
        norms = {"input_layernorm": ones(), "post_attention_layernorm": ones()}
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in {**matrices, **norms}.items()}
    head = torch.zeros(size.vocabulary, size.hidden, device=device, dtype=torch.bfloat16)
    head[torch.tensor(shown, device=device)] = matrix(len(shown), size.hidden)
    yield {"model.norm.weight": ones(), "lm_head.weight": head}
