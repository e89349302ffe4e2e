"""A launch on a GPU: the Llama family from fused matrices and `Operators`; decode steps are replayed from CUDA graphs if there are any."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from services.engine.cuda.graphs import Graphs
from services.engine.cuda.inputs import Inputs, inputs
from services.engine.cuda.operators import Operators, Prompts, Rows, Singles
from services.engine.cuda.weights import Weights
from services.engine.launch import Launch
from services.engine.pool import Pool

MOST_DRAWN = 4096
"""Ids that one launch draws at most: the largest `max_batch`."""


class Body:
    """The model over one pool, as a function of tensors: nothing is read back from the device. It runs anywhere that its operators do."""

    def __init__(self, weights: Weights, operators: Operators, pool: Pool) -> None:
        self.drawn = torch.zeros(MOST_DRAWN, dtype=torch.int32, device=pool.tensor.device)
        """The ids drawn last: where inputs name `sources` they take theirs from here. Whoever draws writes them, after each launch."""
        self._weights = weights
        self._operators = operators
        self._pages = [pool.tensor[:, layer] for layer in range(pool.layout.layers)]

    def __call__(self, given: Inputs) -> Tensor:
        """Logits `[draws, vocabulary]`, in the model's type."""
        w, do, like = self._weights, self._operators, self._weights.like
        x = embedding(self._ids(given.rows), w.embedding)
        normed = do.norm(x, w.layers[0].input_norm, like.epsilon)
        norms = [*(layer.input_norm for layer in w.layers[1:]), w.final_norm]
        for layer, pages, norm in zip(w.layers, self._pages, norms, strict=True):
            queries = do.put(do.product(normed, layer.qkv, layer.qkv_bias), pages, w.angles, layer.norms, given.rows, like)
            seen = self._attend(queries, pages, given.prompts, given.singles, given.prompt_rows)
            normed = do.add_norm(x, do.product(seen.flatten(1), layer.o, layer.o_bias), layer.output_norm, like.epsilon)
            inner = do.gated(normed, layer.gate_up, layer.gate_up_bias)
            normed = do.add_norm(x, do.product(inner, layer.down, layer.down_bias), norm, like.epsilon)
        if given.keep is not None:
            normed = normed[given.keep]
        return do.product(normed, w.head, None, whole=True) if len(normed) else normed.new_empty(0, len(w.head))

    def _ids(self, rows: Rows) -> Tensor:
        if rows.sources is None:
            return rows.ids
        return torch.where(rows.sources >= 0, self.drawn.index_select(0, rows.sources.clamp(min=0)), rows.ids)

    def _attend(self, queries: Tensor, pages: Tensor, prompts: Prompts | None, singles: Singles | None, prompt_rows: int) -> Tensor:
        out = torch.empty_like(queries)
        if prompts is not None:
            self._operators.prefill(queries[:prompt_rows], pages, prompts, self._weights.like, out[:prompt_rows])
        if singles is not None:
            self._operators.decode(queries[prompt_rows:], pages, singles, self._weights.like, out[prompt_rows:])
        return out


class CudaForward:
    """One model's fused weights over one pool. With `most_batch`, decode steps of up to so many sequences are captured as graphs, now."""

    def __init__(self, weights: Weights, operators: Operators, pool: Pool, most_batch: int = 0) -> None:
        self._body = Body(weights, operators, pool)
        self._packs = operators.packs
        self._like = weights.like
        self._dtype, self._device = pool.tensor.dtype, pool.tensor.device
        self._graphs = Graphs(self._body, weights, pool, most_batch) if most_batch else None
        self.drawn = self._body.drawn
        """int32: whoever draws from a launch's logits writes the ids here, in the order of `keep`, for the launch that follows."""

    def __call__(self, launch: Launch) -> Tensor:
        """Logits of the launch's `keep` rows `[draws, vocabulary]`, in the model's type: good until the next launch."""
        if self._graphs is not None and self._graphs.fits(launch):
            return self._graphs(launch)
        return self._body(inputs(launch, self._like, self._dtype, self._device, packs=self._packs))
