"""The words of a worker's ranks become the worker's when the last has said them."""

from __future__ import annotations

from common.messages import GrantedRank, Shard
from services.transfer.gather import Gather
from services.transfer.protocol import Arrived, Landed, NotPosted, Posted, PushFailed, Sent

RANKS = [GrantedRank(Shard(rank, (0, 1), (rank, rank + 1)), b"%d" % rank) for rank in range(2)]


def test_addresses_come_in_order_of_rank() -> None:
    gather = Gather(2)
    assert gather.heard(1, Posted(7, (RANKS[1],))) is None
    assert gather.heard(0, Posted(7, (RANKS[0],))) == Posted(7, tuple(RANKS))


def test_a_grant_has_arrived_when_it_has_on_every_rank() -> None:
    gather = Gather(2)
    assert gather.heard(1, Arrived(7, ((3, 4),))) is None
    assert gather.heard(0, Arrived(7, ((1, 2),))) == Arrived(7, ((1, 2), (3, 4)))
    assert len(gather) == 0


def test_one_that_has_arrived_on_one_rank_and_failed_on_the_other_lands_once() -> None:
    gather = Gather(2)
    assert gather.heard(0, Arrived(7, ((1,),))) is None
    assert gather.heard(0, Landed(7)) is None
    assert gather.heard(1, Landed(7)) == Landed(7)
    assert len(gather) == 0


def test_a_rejected_grant_lands_after_it_has_arrived() -> None:
    gather = Gather(2)
    for rank in range(2):
        gather.heard(rank, Arrived(7, ((rank,),)))
    assert [gather.heard(rank, Landed(7)) for rank in range(2)] == [None, Landed(7)]


def test_a_rank_that_can_take_nothing_is_the_worker_s_at_once_and_nothing_is_left_of_its_grant() -> None:
    gather = Gather(2)
    assert gather.heard(0, Posted(7, (RANKS[0],))) is None
    assert gather.heard(1, NotPosted(7)) == NotPosted(7)
    assert [gather.heard(rank, Landed(7)) for rank in range(2)] == [None, Landed(7)]
    assert len(gather) == 0


def test_checksums_of_what_was_sent_stand_by_receiver_then_by_sender() -> None:
    gather = Gather(3)
    gather.finishing(1, 7)
    assert gather.heard(2, Sent(1, 7, ((), (50, 51)))) is None
    assert gather.heard(0, Sent(1, 7, ((10, 11),))) is None
    assert gather.heard(1, Sent(1, 7, ((20, 21), (30, 31)))) == Sent(1, 7, ((10, 11, 20, 21), (30, 31, 50, 51)))
    assert len(gather) == 0


def test_one_failure_is_the_worker_s_and_nothing_follows_it() -> None:
    gather = Gather(2)
    gather.finishing(1, 7)
    assert gather.heard(0, Sent(1, 7, ())) is None
    assert gather.heard(1, PushFailed(1, 7, "why")) == PushFailed(1, 7, "why")
    assert gather.heard(0, Sent(1, 7, ())) is None and len(gather) == 0


def test_a_withdrawn_push_is_never_sent() -> None:
    gather = Gather(2)
    gather.finishing(1, 7)
    gather.heard(0, Sent(1, 7, ()))
    gather.withdrawn(1, 7)
    assert gather.heard(1, Sent(1, 7, ())) is None and len(gather) == 0
