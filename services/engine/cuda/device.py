"""What counts of the device that tensors are on."""

from __future__ import annotations

from functools import cache

import torch

from services.engine.cuda.tiles import Device


@cache
def about(device: torch.device) -> Device:
    """Where there is no GPU: one multiprocessor, as large as any."""
    if device.type != "cuda":
        return Device(1, 1 << 30)
    properties = torch.cuda.get_device_properties(device)
    return Device(int(properties.multi_processor_count), int(getattr(properties, "shared_memory_per_block_optin", 48 << 10)))


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether a launch may begin before the one ahead of it has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
