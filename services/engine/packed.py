"""Linear layers whose weights are laid out once for this CPU's matrix instructions (oneDNN's own layout).

`torch.nn.functional.linear` takes weights as they lie. What is gained by the packed layout is in docs/notes.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROWS = 16
"""For how many rows oneDNN is told to choose the layout; others work with it too."""


class PackedLinear(nn.Module):
    """x `[..., in]` → `[..., out]`, as the layer that it was made of; that one's weight is no longer needed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has the operators, and this CPU the instructions, with which packing pays."""
    return (
        device.type == "cpu"
        and dtype is torch.bfloat16
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(module: nn.Module) -> int:
    """Replace every linear layer inside; returns how many."""
    found = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children() if type(child) is nn.Linear]
    for parent, name, linear in found:
        setattr(parent, name, PackedLinear(linear))
    return len(found)
