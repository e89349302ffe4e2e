"""Pages between workers whose ranks hold different parts of the model, over UCX and over the in-process twin."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch

from common.messages import GrantedRank, Layout, Shard
from services.engine.grid import Grid
from services.transfer.faults import parse
from services.transfer.gather import Gather
from services.transfer.parts import common_part
from services.transfer.protocol import Arrived, Landed, Posted, Sent, TransferEvent
from services.transfer.twin import Switchboard, TwinTransfer
from services.transfer.ucx import UcxTransfer

LAYOUT = Layout(layers=5, kv_heads=4, page_tokens=64, head_dim=64, dtype="float32")
"""Pages so large that their parts go by rendezvous."""
PAGES = 6
WAIT_S = 10.0


class Side:
    """One worker: a pool and a transfer for each rank, whose words are gathered as rank 0 does."""

    def __init__(self, kind: str, board: Switchboard, grid: Grid, whole: torch.Tensor, fault: str = "") -> None:
        self.shards = grid.shards(LAYOUT)
        self.events: queue.SimpleQueue[tuple[int, TransferEvent]] = queue.SimpleQueue()
        self.gather = Gather(len(self.shards))
        self.pools = [whole[:, slice(*shard.layers), :, slice(*shard.kv_heads)].contiguous() for shard in self.shards]
        self.transfers: list[Any] = []
        for shard, pool in zip(self.shards, self.pools, strict=True):
            rows = pool.view(PAGES, -1).view(torch.uint8)
            say = lambda event, rank=shard.rank: self.events.put((rank, event))  # noqa: E731
            own = parse(fault if shard.rank == 0 else "")
            if kind == "twin":
                self.transfers.append(TwinTransfer(rows, shard, say, board, fault=own))
            else:
                self.transfers.append(UcxTransfer(rows, shard, say, fault=own))

    def next(self) -> TransferEvent:
        while (whole := self.gather.heard(*self.events.get(timeout=WAIT_S))) is None:
            pass
        return whole

    def concerned(self, to: Shard) -> list[Any]:
        return [self.transfers[shard.rank] for shard in self.shards if common_part(shard, to) is not None]


@pytest.mark.parametrize("kind", ["twin", "ucx"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(Grid(2, 1), Grid(1, 2)), (Grid(1, 2), Grid(4, 1)), (Grid(4, 3), Grid(2, 2)), (Grid(1, 3), Grid(1, 2)), (Grid(2, 2), Grid(2, 2))],
    ids=lambda grid: f"tp{grid.tp}pp{grid.pp}",
)
@pytest.mark.parametrize("fault", ["", "corrupt:2x1"])
def test_every_rank_gets_its_part_of_every_page(kind: str, ours: Grid, theirs: Grid, fault: str) -> None:
    board = Switchboard()
    shape = (PAGES, LAYOUT.layers, 2, LAYOUT.kv_heads, LAYOUT.page_tokens, LAYOUT.head_dim)
    source = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    prefill, decode = Side(kind, board, ours, source, fault), Side(kind, board, theirs, torch.zeros(shape))
    try:
        places, pages, indices, starts = (4, 5, 3), (1, 2, 4), (0, 1, 2), (0, 2)
        for transfer in decode.transfers:
            transfer.expect("prefill", 1, places, indices, prefill.shards, starts)
        posted = decode.next()
        assert isinstance(posted, Posted) and [rank.shard for rank in posted.ranks] == list(decode.shards)
        for to in posted.ranks:
            for transfer in prefill.concerned(to.shard):
                transfer.push("decode", to, 9, 1, pages, indices, starts)
        prefill.gather.finishing(9, 1)
        for transfer in prefill.transfers:
            transfer.finish_push(9, 1)
        sent, arrived = prefill.next(), decode.next()
        assert isinstance(sent, Sent) and isinstance(arrived, Arrived)
        assert (sent.checksums == arrived.checksums) == (not fault)
        for shard, pool in zip(decode.shards, decode.pools, strict=True):
            wanted = source[list(pages)][:, slice(*shard.layers), :, slice(*shard.kv_heads)]
            same = torch.equal(pool[list(places)], wanted)
            assert same or (fault and sent.checksums[shard.rank] != arrived.checksums[shard.rank])
            assert not pool[[0, 1, 2]].any()
        assert sum(transfer.counts.received_bytes for transfer in decode.transfers) == 3 * LAYOUT.page_bytes
        assert sum(transfer.counts.sent_bytes for transfer in prefill.transfers) == 3 * LAYOUT.page_bytes
    finally:
        for transfer in (*prefill.transfers, *decode.transfers):
            transfer.close()


@pytest.mark.parametrize("kind", ["twin", "ucx"])
def test_a_withdrawn_push_lands_on_all_ranks(kind: str) -> None:
    """Nothing was pushed to one rank, and of what went to the other a page is held back."""
    board = Switchboard()
    source = torch.randn(PAGES, LAYOUT.layers, 2, LAYOUT.kv_heads, LAYOUT.page_tokens, LAYOUT.head_dim)
    prefill = Side(kind, board, Grid(1, 1), source, "stall:2x1")
    decode = Side(kind, board, Grid(2, 1), torch.zeros_like(source))
    try:
        for transfer in decode.transfers:
            transfer.expect("prefill", 1, (0, 1), (0, 1), prefill.shards)
        posted = decode.next()
        assert isinstance(posted, Posted)
        ranks: tuple[GrantedRank, ...] = posted.ranks
        prefill.transfers[0].push("decode", ranks[1], 9, 1, (0, 1), (0, 1))
        for transfer in decode.transfers:
            transfer.abandon(1, told=True)
        prefill.transfers[0].flush("decode", ranks[0], 9, 1, (0, 1))
        prefill.transfers[0].flush("decode", ranks[1], 9, 1, ())
        said = [decode.next()]
        if isinstance(said[0], Arrived):  # the flush was quicker than the abandonment: it verifies nowhere
            said.append(decode.next())
        assert said[-1] == Landed(1)
    finally:
        for transfer in (*prefill.transfers, *decode.transfers):
            transfer.close()
