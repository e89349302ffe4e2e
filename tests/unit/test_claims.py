"""What happens to jobs that a worker has claimed and cannot or need not run."""

from __future__ import annotations

import asyncio
from typing import Any

from common.messages import Choice, GatewayBeat, Job, Letter, Sampling
from common.names import DEAD_S
from common.queue import Claimed, Entry
from services.worker.claims import Claims
from tests.unit.in_process import IDENTITY, serve


def claimed(name: str, gateway: str = "g") -> Claimed:
    job = Job(name, gateway, "tcp://127.0.0.1:1", [1, 2, 3], [Choice(0, 1)], Sampling(), 12, deadline_s=60.0)
    return Claimed(Entry("interactive", f"{name}-0"), job)


class Slow:
    """A queue that gives two jobs and does not answer the third time."""

    def __init__(self) -> None:
        self.left = [claimed("1"), claimed("2")]
        self.asked = asyncio.Event()

    async def claim(self, consumer: str) -> Claimed | None:
        if self.left:
            return self.left.pop(0)
        self.asked.set()
        await asyncio.Event().wait()
        return None


async def test_what_has_been_claimed_when_the_claiming_ends_is_not_forgotten() -> None:
    """A drain gave back what ran; these waited for seconds, and came back as suspects."""
    taken: list[Claimed] = []
    queue: Any = Slow()
    running = asyncio.create_task(Claims(queue, "me", lambda: 100, taken.extend).run())
    await asyncio.wait_for(queue.asked.wait(), 5)
    running.cancel()
    await asyncio.wait({running}, timeout=5)
    assert running.cancelled() and [one.job.request_id for one in taken] == ["1", "2"]


def test_what_a_lost_gateway_has_left_in_the_queue_is_not_computed() -> None:
    """Its whole backlog was, before what the clients of the other gateways were waiting for. Whoever hears no gateway at all was cut off
    itself, and throws nothing away."""
    acknowledged: list[str] = []
    begun: list[int] = []

    def act(worker: Any) -> None:
        gateways = worker.gateways
        for name in ("g", "i"):
            gateways.meet(name, "tcp://127.0.0.1:1")
            gateways._liveness._pulses[name].heard_at -= DEAD_S + 1
        assert gateways.reap() == ["g", "i"]
        worker._claimed([claimed("0"), claimed("0", "i")])
        begun.append(len(worker.runs))
        for name in ("g", "i"):
            gateways._liveness._pulses[name].heard_at -= DEAD_S + 1  # the jobs have made them look alive
        gateways.reap()
        gateways.meet("h", "tcp://127.0.0.1:2")
        worker._claimed([claimed("1"), claimed("2")])
        begun.append(len(worker.runs))
        acknowledged.extend(entry.id for entry in worker._acknowledged._queue)
        beat = GatewayBeat(1, "tcp://127.0.0.1:1", "default", IDENTITY.fingerprint)
        assert gateways.letter(Letter("g", worker.incarnation, beat))
        worker._claimed([claimed("3")])
        begun.append(len(worker.runs))

    serve(act)
    assert acknowledged[-2:] == ["1-0", "2-0"] and begun == [2, 0, 1], "one that is heard again is worked for again"
