"""What of a page goes from one rank to another: the layers and heads that both hold. Pure."""

from __future__ import annotations

from common.messages import Layout, Shard


def common_part(own: Shard, other: Shard) -> Shard | None:
    """The intersection of what two ranks hold, under the first one's number; None if there is none."""
    layers = max(own.layers[0], other.layers[0]), min(own.layers[1], other.layers[1])
    heads = max(own.kv_heads[0], other.kv_heads[0]), min(own.kv_heads[1], other.kv_heads[1])
    if layers[0] >= layers[1] or heads[0] >= heads[1]:
        return None
    return Shard(own.rank, layers, heads)


def alike(own: Shard, other: Shard) -> bool:
    """Whether two ranks hold the same part of every page: then a run of pages can go from one to the other as one message."""
    return (own.layers, own.kv_heads) == (other.layers, other.kv_heads)


def covers(layout: Layout, shards: list[Shard]) -> bool:
    """Whether these ranks, numbered in order, hold every head of every layer exactly once."""
    if [shard.rank for shard in shards] != list(range(len(shards))):
        return False
    for shard in shards:
        (first, last), (low, high) = shard.layers, shard.kv_heads
        if not (0 <= first < last <= layout.layers and 0 <= low < high <= layout.kv_heads):
            return False
    held = sum((s.layers[1] - s.layers[0]) * (s.kv_heads[1] - s.kv_heads[0]) for s in shards)
    apart = all(common_part(one, other) is None for i, one in enumerate(shards) for other in shards[:i])
    return apart and held == layout.layers * layout.kv_heads
