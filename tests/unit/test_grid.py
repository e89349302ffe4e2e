"""How ranks divide a model, and what two ranks have in common."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Layout, Shard
from services.engine.grid import Grid
from services.transfer.parts import common_part, covers

LAYOUT = Layout(30, 12, 16, 64, "float32")
grids = st.builds(Grid, tp=st.sampled_from([1, 2, 3, 4, 6, 12]), pp=st.integers(1, 7))


@given(grids, grids)
def test_any_two_grids_exchange_each_head_of_each_layer_once(prefill: Grid, decode: Grid) -> None:
    ours, theirs = prefill.shards(LAYOUT), decode.shards(LAYOUT)
    assert covers(LAYOUT, list(ours)) and covers(LAYOUT, list(theirs))
    for wanted in theirs:
        parts = [part for shard in ours if (part := common_part(shard, wanted)) is not None]
        cells = [(layer, head) for part in parts for layer in range(*part.layers) for head in range(*part.kv_heads)]
        assert sorted(cells) == [(layer, head) for layer in range(*wanted.layers) for head in range(*wanted.kv_heads)]


@given(grids)
def test_shares_of_a_page_add_up(grid: Grid) -> None:
    shards = grid.shards(LAYOUT)
    assert sum(LAYOUT.share(shard).page_bytes for shard in shards) == LAYOUT.page_bytes
    assert {shard.layers[1] - shard.layers[0] for shard in shards} <= {30 // grid.pp, 30 // grid.pp + 1}


@pytest.mark.parametrize(
    "shards",
    [
        [],
        [Shard(1, (0, 30), (0, 12))],
        [Shard(0, (0, 30), (0, 11))],
        [Shard(0, (0, 30), (0, 13))],
        [Shard(0, (0, 20), (0, 12)), Shard(1, (10, 20), (0, 12))],
        [Shard(0, (0, 30), (0, 6)), Shard(1, (0, 30), (0, 6))],
        [Shard(0, (0, 30), (12, 0))],
    ],
)
def test_ranks_that_lack_or_double_something_are_no_whole(shards: list[Shard]) -> None:
    assert not covers(LAYOUT, shards)


def test_what_does_not_divide_is_refused_in_words() -> None:
    sizes = {"layers": 30, "heads": 9, "kv_heads": 3, "inner": 1536}
    assert Grid(3, 30).refusal(**sizes) is None
    assert Grid(2, 1).refusal(**sizes) == (
        "tp is 2, which does not divide the model's 9 heads, 3 KV heads and 1536 inner dimensions; possible: 1, 3"
    )
    assert Grid(1, 31).refusal(**sizes) == "pp is 31, the model has 30 layers"
    assert Grid(64, 5).refusal(**sizes) == "tp 64 times pp 5 is more than 256 ranks"
