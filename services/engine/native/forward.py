"""A whole launch in one call of our own kernels: models of the Llama family on CPU cores, in bfloat16 or float32."""

from __future__ import annotations

import ctypes
import weakref
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.engine import huge
from services.engine.launch import Launch
from services.engine.model import FAMILY, LoadedModel
from services.engine.native import library
from services.engine.native.build import Unavailable
from services.engine.pool import Pool
from services.engine.rotary import rotary

COLUMNS = 32
"""Outputs in a panel of packed weights, as in gemm.h."""
HALF = 16
"""Gate and up projections take turns in a panel, so that both are in registers when one is multiplied with the other."""

MOST_HEAD = 256
"""The largest head_dim, as in attention.h."""
QUERY_ROWS = 96
"""Heads times tokens of a block of queries, as in attention.h."""


def refusal(loaded: LoadedModel, page_tokens: int) -> str | None:
    """Why the kernels cannot run this model, or None."""
    config = loaded.module.config
    layout = loaded.layout
    if loaded.device.type != "cpu":
        return f"the device is {loaded.device.type}"
    if loaded.dtype not in (torch.bfloat16, torch.float32):
        return f"the type is {layout.dtype}"
    if config.model_type not in FAMILY:
        return f"{config.model_type} is not of the Llama family"
    if config.hidden_act != "silu":
        return f"the activation is {config.hidden_act}"
    if getattr(config, "mlp_bias", False) or _bias(loaded.module.model.layers[0].self_attn.o_proj) is not None:
        return "output projections have a bias"
    group = config.num_attention_heads // layout.kv_heads
    if group > QUERY_ROWS:
        return f"{group} query heads share a KV head"
    if layout.head_dim > MOST_HEAD:
        return f"head_dim is {layout.head_dim}, more than {MOST_HEAD}"
    if page_tokens % 16 or layout.head_dim % 32 or config.hidden_size % COLUMNS or config.intermediate_size % HALF:
        return "page_tokens must be a multiple of 16, head_dim and hidden_size of 32, intermediate_size of 16"
    return None


class NativeForward:
    """One model's packed weights over one pool."""

    def __init__(self, weights: NativeWeights, pool: Pool) -> None:
        self._weights = weights
        self._library = weights.library
        self._pool = pool
        self._vocabulary = weights.vocabulary
        self._logits = torch.empty(0)
        self._space = ctypes.c_void_p(self._library.baton_workspace())
        weakref.finalize(self, self._library.baton_release, self._space)

    def __call__(self, launch: Launch) -> Tensor:
        """Logits of the launch's `keep` rows, float32 `[draws, vocabulary]`: good until the next launch."""
        logits = self._room(len(launch.keep))
        given = library.Launch(
            tokens=len(launch.ids),
            chunks=len(launch.chunks),
            draws=len(launch.keep),
            threads=torch.get_num_threads(),
            ids=launch.ids.ctypes.data,
            positions=launch.positions.ctypes.data,
            chunk=launch.chunks.ctypes.data,
            table=launch.table.ctypes.data,
            keep=launch.keep.ctypes.data,
            logits=logits.data_ptr(),
            pool=self._pool.tensor.data_ptr(),
            page_tokens=self._pool.layout.page_tokens,
        )
        self._library.baton_forward(ctypes.byref(self._weights.model), ctypes.byref(given), self._space)
        return logits[:, : self._vocabulary]

    def _room(self, draws: int) -> Tensor:
        """float32 `[draws, vocabulary]`, padded to whole panels: the same memory at every launch, since touching new pages costs more than
        writing the logits."""
        width = -(-self._vocabulary // COLUMNS) * COLUMNS
        if self._logits.numel() < draws * width:
            self._logits = huge.zeros(4 * draws * width).view(torch.float32)
        return self._logits[: draws * width].view(draws, width)


class NativeWeights:
    """Packed weights of one model. Keeps nothing of the module but its token embedding."""

    def __init__(self, loaded: LoadedModel, path: Path) -> None:
        """Raises Unavailable if the library cannot be loaded."""
        try:
            self.library = library.functions(path)
        except OSError as error:
            raise Unavailable(f"the compiled kernels cannot be loaded: {error}") from error
        self.vocabulary = loaded.vocabulary
        self._kept: list[Any] = []
        self._dtype = loaded.dtype
        self.model = self._describe(loaded)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _describe(self, loaded: LoadedModel) -> library.Model:
        module = loaded.module
        config, body = module.config, module.model
        layers = (library.Layer * len(body.layers))(*[self._layer(layer) for layer in body.layers])
        cos, sin = rotary(module, loaded.context_tokens)
        self._kept.append(layers)
        attention = body.layers[0].self_attn
        return library.Model(
            layers=len(body.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=loaded.layout.kv_heads,
            head_dim=loaded.layout.head_dim,
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
            bf16=int(self._dtype is torch.bfloat16),
            epsilon=config.rms_norm_eps,
            scale=attention.scaling,
            layer=layers,
            final_norm=self._floats(body.norm.weight),
            embedding=self._keep(body.embed_tokens.weight.detach().contiguous()),
            head=self._packed(module.lm_head.weight)[0],
            cos=self._keep(cos),
            sin=self._keep(sin),
        )

    def _layer(self, layer: Any) -> library.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        biases = [_bias(part) for part in inputs]
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        gate, up = (part.weight.detach().unflatten(0, (-1, HALF)) for part in (mlp.gate_proj, mlp.up_proj))
        qkv, o, gate_up, down = self._packed(
            torch.cat([part.weight.detach() for part in inputs]),
            attention.o_proj.weight,
            torch.stack((gate, up), 1).flatten(0, 2),
            mlp.down_proj.weight,
        )
        return library.Layer(
            input_norm=self._floats(layer.input_layernorm.weight),
            q_norm=None if norms[0] is None else self._floats(norms[0].weight),
            k_norm=None if norms[1] is None else self._floats(norms[1].weight),
            output_norm=self._floats(layer.post_attention_layernorm.weight),
            bias=None if biases[0] is None else self._floats(torch.cat([bias for bias in biases if bias is not None])),
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
        )

    def _packed(self, *weights: Tensor) -> list[int]:
        """Each `[N, K]` into panels; where they lie, one behind the other."""
        lanes = [weight.shape[1] * weight.element_size() // 4 for weight in weights]
        sizes = [-(-weight.shape[0] // COLUMNS) * COLUMNS * depth * 4 for weight, depth in zip(weights, lanes, strict=True)]
        places = list(accumulate(sizes, initial=self._keep(huge.zeros(sum(sizes)))))
        for weight, depth, place in zip(weights, lanes, places, strict=False):
            self.library.baton_pack(weight.detach().contiguous().data_ptr(), weight.shape[0], depth, place)
        return places[:-1]

    def _floats(self, values: Tensor) -> int:
        """In float32, zeros behind the last one up to a whole panel."""
        values = values.detach().float()
        return self._keep(torch.nn.functional.pad(values, (0, -len(values) % COLUMNS)))

    def _keep(self, values: Tensor) -> int:
        self._kept.append(values)
        return values.data_ptr()


def _bias(linear: Any) -> Tensor | None:
    return getattr(linear, "bias", None)
