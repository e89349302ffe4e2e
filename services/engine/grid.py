"""How a worker's ranks divide its model: consecutive layers by stage, heads by part. Rank = stage * tp + part. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages import Layout, Shard

MOST_RANKS = 256
"""A transfer's tag has 8 bits for the sending rank."""


@dataclass(frozen=True, slots=True)
class Grid:
    """`tp` parts of each layer by `pp` stages of layers."""

    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    @property
    def last(self) -> int:
        """The first rank of the last stage: it returns what the launch has made of the rows that are drawn from."""
        return self.ranks - self.tp

    def stage(self, rank: int) -> int:
        return rank // self.tp

    def part(self, rank: int) -> int:
        return rank % self.tp

    def shards(self, layout: Layout) -> tuple[Shard, ...]:
        """What each rank holds of a model with this layout; stages differ by one layer at most."""
        layers = [(s * layout.layers // self.pp, (s + 1) * layout.layers // self.pp) for s in range(self.pp)]
        heads = [(p * layout.kv_heads // self.tp, (p + 1) * layout.kv_heads // self.tp) for p in range(self.tp)]
        return tuple(Shard(rank, layers[self.stage(rank)], heads[self.part(rank)]) for rank in range(self.ranks))

    def refusal(self, *, layers: int, heads: int, kv_heads: int, inner: int) -> str | None:
        """Why a model of these sizes cannot be divided so, or None. `inner`: width of the feed-forward layer."""
        if self.ranks > MOST_RANKS:
            return f"tp {self.tp} times pp {self.pp} is more than {MOST_RANKS} ranks"
        if self.pp > layers:
            return f"pp is {self.pp}, the model has {layers} layers"
        if any(size % self.tp for size in (heads, kv_heads, inner)):
            fits = [str(n) for n in range(1, kv_heads + 1) if not (heads % n or kv_heads % n or inner % n)]
            sizes = f"{heads} heads, {kv_heads} KV heads and {inner} inner dimensions"
            return f"tp is {self.tp}, which does not divide the model's {sizes}; possible: {', '.join(fits)}"
        return None
