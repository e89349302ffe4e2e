"""The goodput benchmark against a server whose service times are known, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from scripts.load import trials
from scripts.load.client import Server, look, trial
from scripts.load.curve import Curve
from scripts.load.judge import Yardstick
from scripts.load.targets import Target
from scripts.load.texts import Question
from scripts.load.trials import LATE_S, Bench, Plan
from scripts.load.workloads import Shape, Workload

pytestmark = pytest.mark.system

SERVICE_S = 0.05
TTFT_S = 0.35
COUNT = 40


class Queue:
    """One request after the other, `SERVICE_S` each; answers two tokens at once. `stall`: until when nobody is served."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.stalled_until = 0.0
        self.stalls_s = 0.0
        """From the first request on."""

    async def complete(self, request: Request) -> StreamingResponse:
        now = time.monotonic()
        if self.stalls_s:
            self.stalled_until, self.stalls_s = now + self.stalls_s, 0.0
        asked = json.loads(await request.body())
        self.free_at = max(self.free_at, now, self.stalled_until) + SERVICE_S

        async def events(ready: float = self.free_at) -> AsyncIterator[str]:
            await asyncio.sleep(ready - time.monotonic())
            for chunk in ({"choices": [{"text": "a b"}]}, {"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}}):
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


@asynccontextmanager
async def serving(queue: Queue) -> AsyncIterator[Server]:
    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "known"}]})

    app = Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", queue.complete, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield await look(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        await serving


class Words:
    def question(self, number: int) -> Question:
        return Question(f"question {number}", 10, 2)


def bench(server: Server, say: Callable[[str], None]) -> Bench:
    workload = Workload("known", (Shape(10, 2),), "")
    plan = Plan(seconds=1, least=COUNT, most=COUNT, cv=0, seed=1)
    return Bench([Target("known", "known", "", server)], workload, Words(), plan, say)  # type: ignore[arg-type]


@pytest.mark.timeout(300)
async def test_goodput_of_known_service_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even arrivals at rate r above 1/s find the k-th in a queue of k (s - 1/r), so a share of 90 % of n requests waits at most
    0.9 n (s - 1/r) = TTFT - s: the goodput is r = 1 / (s - (TTFT - s) / (0.9 n - 1))."""
    monkeypatch.setattr(trials, "VOIDS", 30)  # on a busy machine a trial may be late; that it is void is tested below
    expected = 1 / (SERVICE_S - (TTFT_S - SERVICE_S) / (0.9 * COUNT - 1))
    said: list[str] = []
    async with serving(Queue()) as server:
        one = bench(server, said.append)
        curves = {"known": Curve(20.0, 0.1, 1000, 1.03)}
        await one.search(curves, Yardstick(((0, TTFT_S),), 1.0), time.monotonic() + 240)
    found = curves["known"].goodput(0.9)
    assert found.resolved, said
    assert abs(found.rate / expected - 1) < 0.05, (found, expected, said)


async def test_a_stall_is_charged_to_every_request_due_in_it() -> None:
    """Coordinated omission would send nothing during the stall, and see one slow request."""
    queue = Queue()
    due = [0.1 * n for n in range(30)]
    async with serving(queue) as server:
        queue.stalls_s = 2.0
        records = await trial(server, [Question(f"{n}", 10, 2) for n in range(30)], due, 20.0)
    assert all(record.error is None for record in records)
    assert sum(at + record.late_s < 1.9 for record, at in zip(records, due, strict=True)) >= 8, "sent while it stalls"
    waited = [record.served.ttft_s for record in records]
    assert all(wait > 2.0 - at - 0.1 for wait, at in zip(waited, due, strict=True))
    assert sum(wait > 0.5 for wait in waited) >= 15


async def test_no_answer_is_a_miss_and_hangs_nobody() -> None:
    queue = Queue()
    async with serving(queue) as server:
        queue.stalled_until = time.monotonic() + 3.0
        began = time.monotonic()
        (record,) = await trial(server, [Question("x", 10, 2)], [0.0], 0.5)
        refused = await trial(Server(server.url + "/nowhere", "known", False), [Question("x", 10, 2)], [0.0], 5.0)
    assert time.monotonic() - began < 4.0
    assert record.error is not None and not Yardstick(((0, 60.0),), 60.0).attains(record)
    assert refused[0].error is not None and refused[0].error.startswith("404")


async def test_a_late_generator_voids_its_trial_and_its_search() -> None:
    said: list[str] = []
    async with serving(Queue()) as server:
        one = bench(server, said.append)
        curves = {"known": Curve(40.0, 0.1, 1000, 1.03)}
        busy = asyncio.create_task(hog())
        try:
            await one.search(curves, Yardstick(((0, TTFT_S),), 1.0), time.monotonic() + 60)
        finally:
            busy.cancel()
    assert one.trials and all(done.void for done in one.trials) and all("VOID" in words for words in said)
    assert not curves["known"].asked


async def hog() -> None:
    """Keeps the generator's own thread from sending in time."""
    while True:
        time.sleep(4 * LATE_S)  # noqa: ASYNC251
        await asyncio.sleep(0.001)


async def test_no_text_comes_twice_and_every_target_gets_the_same_shapes() -> None:
    """Also with more requests in a trial than the workload has."""
    shapes = tuple(Shape(10 + n, 2) for n in range(7))
    asked: list[int] = []

    class Numbers:
        def question(self, number: int) -> Question:
            asked.append(number)
            return Question(str(number), shapes[number % 7].input_tokens, 2)

    plan = Plan(1, 20, 20, 0, 1)
    one = Bench([], Workload("known", shapes, ""), Numbers(), plan, print)  # type: ignore[arg-type]
    lengths = [[question.input_tokens for question in one.questions(20, offset)] for offset in (40, 40, 0)]
    assert len(set(asked)) == 60
    assert lengths[0] == lengths[1] == [10 + (40 + n) % 7 for n in range(20)]
