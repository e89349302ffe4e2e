"""One rank's part of a loaded model: its layers, and of each layer its heads and its share of the feed-forward width.

Projections that widen are cut by their outputs, and those that narrow again by their inputs, so that a layer's ranks meet twice: sums of
partial results behind attention and behind the feed-forward part (Megatron-LM, Shoeybi et al., 2019). Embeddings lie on all ranks of the
first stage, the output head on rank 0 alone: where they are tied, as in small models, rank 0 has them once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.engine.grid import Grid
from services.engine.mesh import Mesh
from services.engine.model import LoadedModel, body_of

WIDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
NARROW = ("o_proj", "out_proj", "down_proj", "fc2")


class Summed(nn.Module):
    """A linear layer of which this rank has some of the inputs: x `[..., in / tp]` → `[..., out]`, the sum over all ranks of the stage."""

    def __init__(self, linear: nn.Linear, part: slice, mesh: Mesh) -> None:
        super().__init__()
        self.partial = _linear(linear.weight[:, part], None)
        self.bias = linear.bias
        self._mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.partial(x)
        dist.all_reduce(out, group=self._mesh.stage)
        return out if self.bias is None else out + self.bias


class Nothing(nn.Module):
    """In the place of what another rank has: adds nothing."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(())


def cut(loaded: LoadedModel, grid: Grid, mesh: Mesh) -> LoadedModel:
    """Reduce the module, in place, to what this rank of the mesh computes; weights of others are let go."""
    shard = grid.shards(loaded.layout)[mesh.rank]
    body = body_of(loaded.module)
    first, last = shard.layers
    body.layers = nn.ModuleList(list(body.layers)[first:last])
    for number, layer in enumerate(body.layers):
        _cut_layer(layer, number, grid, mesh)
    if grid.stage(mesh.rank) > 0:
        _without_beginning(body)
    if last < loaded.layout.layers:
        _without_end(body)
    if mesh.rank:
        loaded.module.lm_head = nn.Identity()
    loaded.module.config.num_hidden_layers = last - first
    return replace(loaded, layout=loaded.layout.share(shard), shard=shard)


# -------------------------------------------------------------------------------------------------------------- inside


def _cut_layer(layer: nn.Module, number: int, grid: Grid, mesh: Mesh) -> None:
    """`number`: of the layer among this rank's own, where its KV lies."""
    attention: Any = layer.self_attn
    attention.layer_idx = number
    if grid.tp == 1:
        return
    if hasattr(attention, "num_heads"):
        attention.num_heads //= grid.tp
    part = grid.part(mesh.rank)
    found = [(parent, name, child) for parent in layer.modules() for name, child in parent.named_children() if type(child) is nn.Linear]
    for parent, name, linear in found:
        if name in WIDEN:
            rows = _share(linear.out_features, part, grid.tp)
            setattr(parent, name, _linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows]))
        elif name in NARROW:
            setattr(parent, name, Summed(linear, _share(linear.in_features, part, grid.tp), mesh))
        else:
            raise AssertionError(f"nobody has said how {name} is divided")


def _share(size: int, part: int, parts: int) -> slice:
    return slice(part * size // parts, (part + 1) * size // parts)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """With copies of its own, so that the whole tensors can go."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def _without_beginning(body: Any) -> None:
    """What comes in has been embedded by the first stage."""
    body.embed_tokens = nn.Identity()
    if hasattr(body, "embed_positions"):
        body.embed_positions, body.project_in = Nothing(), None


def _without_end(body: Any) -> None:
    """What goes out is for the next stage."""
    if hasattr(body, "norm"):
        body.norm = nn.Identity()
    else:
        body.final_layer_norm = body.project_out = None
