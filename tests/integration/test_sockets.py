"""Token and control sockets, for real: gating by subscription, sends that never block, successors, reconnects; on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import uvloop
import zmq
from zmq.utils.monitor import recv_monitor_message

from common import messages as m
from common.control import MAX_FRAME_BYTES, MAX_LETTER_BYTES, ControlClient, ControlServer
from common.errors import SettingError, StartError
from common.faults import MessageFault
from common.logs import get_logger
from common.pump import BURST, Pump, new_socket
from common.refusals import Refusals
from common.seal import read_seal, seal_of
from common.tokens import TokenPublisher, TokenSubscriber
from scripts.launcher.child import ROOT, die_with_parent
from services.prefill.peers import Peers
from services.prefill.routing import Load

pytestmark = pytest.mark.system

KEY = m.Key("r", 0, 1, "e")
SOON_S = 5.0


Closing: TypeAlias = Callable[[Any], Any]
"""Registers what must be closed at the end of the test, on its loop."""


def both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test under asyncio and under uvloop."""

    def run(loop: str, **arguments: Any) -> None:
        async def main() -> None:
            with contextlib.ExitStack() as things:

                def closing(thing: Any) -> Any:
                    things.callback(thing.close_all if isinstance(thing, TokenPublisher) else thing.close)
                    return thing

                await test(closing, **arguments)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop) as runner:
            runner.run(main())

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    _, *others = inspect.signature(test).parameters.values()
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("loop", *(other.name for other in others))]
    run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return pytest.mark.parametrize("loop", ["asyncio", "uvloop"])(run)


async def until(condition: Callable[[], object], timeout_s: float = SOON_S) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "it did not come true"
        await asyncio.sleep(0.005)


def words(index: int) -> list[m.Event]:
    return [m.Tokens(KEY, [m.Token(index, 7)])]


def indices(parcels: list[m.Parcel]) -> list[int]:
    return [event.tokens[0].index for parcel in parcels for event in parcel.events if isinstance(event, m.Tokens)]


# ---------------------------------------------------------------------------------------------------------- token socket


@both_loops
async def test_nothing_is_sent_before_the_subscription_and_nothing_is_lost_after(closing: Closing) -> None:
    parcels: list[m.Parcel] = []
    opened: list[str] = []
    subscriber = closing(TokenSubscriber("gw", "127.0.0.1", parcels.append))
    publisher = closing(TokenPublisher("w", opened.append))
    assert not publisher.is_open("gw") and not publisher.send("gw", words(0))
    publisher.open("gw", subscriber.address)
    assert not publisher.is_open("gw") and not publisher.send("gw", words(0))
    await until(lambda: publisher.is_open("gw"))
    assert opened == ["gw"]
    for index in range(1, 2001):
        assert publisher.send("gw", words(index))
    await until(lambda: len(parcels) == 2000)
    assert indices(parcels) == list(range(1, 2001))
    assert {(parcel.sender, parcel.to) for parcel in parcels} == {("w", "gw")}
    assert subscriber.refusals.total == 0


@both_loops
async def test_opening_twice_changes_nothing_and_closing_ends_it(closing: Closing) -> None:
    parcels: list[m.Parcel] = []
    subscriber = closing(TokenSubscriber("gw", "127.0.0.1", parcels.append))
    publisher = closing(TokenPublisher("w"))
    publisher.open("gw", subscriber.address)
    await until(lambda: publisher.is_open("gw"))
    publisher.open("gw", subscriber.address)
    assert publisher.is_open("gw")
    publisher.close("gw")
    publisher.close("gw")
    assert not publisher.is_open("gw") and not publisher.send("gw", words(0))


@both_loops
async def test_a_gateway_that_is_gone_closes_the_link(closing: Closing) -> None:
    publisher = closing(TokenPublisher("w"))
    subscriber = TokenSubscriber("gw", "127.0.0.1", lambda parcel: None)
    publisher.open("gw", subscriber.address)
    await until(lambda: publisher.is_open("gw"))
    subscriber.close()
    await until(lambda: not publisher.is_open("gw"))
    assert not publisher.send("gw", words(0))


@both_loops
async def test_a_link_that_comes_back_opens_again(closing: Closing) -> None:
    """The same incarnation behind the same address, as after a network that was away."""
    opened: list[str] = []
    publisher = closing(TokenPublisher("w", opened.append))
    first = new_socket(zmq.SUB, 10, 1 << 20)
    first.setsockopt(zmq.SUBSCRIBE, b"gw")
    port = first.bind_to_random_port("tcp://127.0.0.1")
    pump = Pump(first, lambda frames: None)
    publisher.open("gw", f"tcp://127.0.0.1:{port}")
    await until(lambda: publisher.is_open("gw"))
    pump.close()
    await until(lambda: not publisher.is_open("gw"))
    got: list[list[bytes]] = []
    second = new_socket(zmq.SUB, 10, 1 << 20)
    second.setsockopt(zmq.SUBSCRIBE, b"gw")
    await until(lambda: bound(second, port))
    closing(Pump(second, got.append))
    await until(lambda: publisher.is_open("gw"))
    assert opened == ["gw", "gw"]
    assert publisher.send("gw", words(1))
    await until(lambda: len(got) == 1)


def bound(socket: zmq.Socket[bytes], port: int) -> bool:
    try:
        socket.bind(f"tcp://127.0.0.1:{port}")
    except zmq.ZMQError:
        return False
    return True


@both_loops
async def test_a_successor_on_the_same_address_gets_nothing_for_its_predecessor(closing: Closing) -> None:
    parcels: list[m.Parcel] = []
    subscriber = TokenSubscriber("old", "127.0.0.1", lambda parcel: None)
    publisher = closing(TokenPublisher("w"))
    publisher.open("old", subscriber.address)
    await until(lambda: publisher.is_open("old"))
    subscriber.close()
    await until(lambda: not publisher.is_open("old"))
    socket = new_socket(zmq.SUB, 10, 1 << 20)
    socket.setsockopt(zmq.SUBSCRIBE, b"new")
    await until(lambda: bound(socket, int(subscriber.address.rsplit(":", 1)[1])))
    closing(Pump(socket, lambda frames: parcels.append(m.decode(frames[-1], m.Parcel))))
    publisher.open("new", subscriber.address)
    await until(lambda: publisher.is_open("new"))
    assert not publisher.is_open("old") and not publisher.send("old", words(1))
    assert publisher.send("new", words(2))
    await until(lambda: parcels)
    assert indices(parcels) == [2]


@both_loops
async def test_what_is_no_parcel_for_us_is_counted_and_dropped(closing: Closing) -> None:
    parcels: list[m.Parcel] = []
    subscriber = closing(TokenSubscriber("gw", "127.0.0.1", parcels.append))
    raw = new_socket(zmq.XPUB, 100, 1 << 20)
    raw.connect(subscriber.address)
    subscribed: list[list[bytes]] = []
    pump = closing(Pump(raw, subscribed.append))
    await until(lambda: subscribed)
    for body in (b"", b"\xff garbage", m.encode(m.Parcel("w", "gw2", words(1))), m.encode(m.Withdraw(1))):
        assert pump.send([b"gw", body])
    pump.send([b"gw-longer-topic", m.encode(m.Parcel("w", "gw-longer", words(2)))])
    pump.send([b"gw", m.encode(m.Parcel("w", "gw", words(3)))])
    await until(lambda: parcels)
    assert indices(parcels) == [3] and subscriber.refusals.total == 5


READER = """
import asyncio, sys
from common.tokens import TokenSubscriber
async def main():
    seen = 0
    def parcel(p):
        nonlocal seen
        seen += 1
        if p.events[0].tokens[0].id == 99:
            print("seen", seen, flush=True)
    subscriber = TokenSubscriber("gw", "127.0.0.1", parcel)
    print(subscriber.address, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def start_reader() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", READER]
    return subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, env=environment, preexec_fn=die_with_parent)


@both_loops
async def test_a_stopped_reader_is_told_false_and_never_waited_for(closing: Closing) -> None:
    """A send to a stopped process must not block; when it goes on, it gets what was accepted, and new words get through."""
    reader = start_reader()
    try:
        assert reader.stdout is not None
        publisher = closing(TokenPublisher("w"))
        publisher.open("gw", reader.stdout.readline().decode().strip())
        await until(lambda: publisher.is_open("gw"), 20.0)
        os.kill(reader.pid, signal.SIGSTOP)
        large: list[m.Event] = [m.Tokens(KEY, [m.Token(index, 1) for index in range(500)])]
        accepted, slowest, said = 0, 0.0, True
        while said and accepted < 60_000:
            started = time.perf_counter()
            said = publisher.send("gw", large)
            slowest = max(slowest, time.perf_counter() - started)
            accepted += said
            if accepted % 200 == 0:
                await asyncio.sleep(0)
        assert not said and accepted >= 10_000
        assert slowest < 10.0, "a send that waits for the reader never returns"
        assert publisher.is_open("gw") and not publisher.send("gw", large)
        os.kill(reader.pid, signal.SIGCONT)
        last: list[m.Event] = [m.Tokens(KEY, [m.Token(0, 99)])]
        await until(lambda: publisher.send("gw", last), 20.0)
        line = await asyncio.wait_for(asyncio.to_thread(reader.stdout.readline), 20.0)
        assert line.split() == [b"seen", str(accepted + 1).encode()]
    finally:
        reader.kill()
        reader.communicate()


# -------------------------------------------------------------------------------------------------------- control socket


@both_loops
async def test_letters_go_both_ways_in_order(closing: Closing) -> None:
    at_server: list[m.Letter] = []
    at_client: list[m.Letter] = []
    server = closing(ControlServer("w", "127.0.0.1", at_server.append))
    client = closing(ControlClient("gw", at_client.append))
    client.connect("w", server.address)
    client.connect("w", server.address)
    assert client.peers == {"w"}
    for number in range(1000):
        assert client.send("w", m.Withdraw(number))
    await until(lambda: len(at_server) == 1000)
    assert [letter.body for letter in at_server] == [m.Withdraw(number) for number in range(1000)]
    for number in range(1000):
        assert server.send("gw", m.Committed(number))
    await until(lambda: len(at_client) == 1000)
    assert at_client[-1] == m.Letter("w", "gw", m.Committed(999))
    assert (server.refusals.total, client.refusals.total) == (0, 0)


@both_loops
async def test_a_handler_may_answer_at_once(closing: Closing) -> None:
    """Sending from within a handler swallows the socket's edge; no message may wait for the next one."""
    server: ControlServer = closing(ControlServer("w", "127.0.0.1", lambda letter: server.send("gw", m.Committed(letter.body.handoff))))  # type: ignore[union-attr]
    answers: list[int] = []

    def again(letter: m.Letter) -> None:
        answers.append(letter.body.handoff)  # type: ignore[union-attr]
        if len(answers) < 3000:
            client.send("w", m.Withdraw(len(answers)))

    client: ControlClient = closing(ControlClient("gw", again))
    client.connect("w", server.address)
    for number in (-1, -2, -3):
        client.send("w", m.Withdraw(number))
    await until(lambda: len(answers) >= 3000, 20.0)


@both_loops
async def test_nobody_there_is_false(closing: Closing) -> None:
    server = closing(ControlServer("w", "127.0.0.1", lambda letter: None))
    client = closing(ControlClient("gw", lambda letter: None))
    assert not server.send("nobody", m.Committed(1))
    assert not client.send("nobody", m.Withdraw(1))
    client.connect("w", server.address)
    client.disconnect("w")
    client.disconnect("w")
    assert not client.send("w", m.Withdraw(1)) and client.peers == set()
    client.connect("odd", "no address at all")
    assert not client.send("odd", m.Withdraw(1)) and client.peers == set()


@both_loops
async def test_a_queue_that_is_full_is_false_and_bounded(closing: Closing) -> None:
    client = closing(ControlClient("gw", lambda letter: None))
    client.connect("w", "tcp://127.0.0.1:9")
    sent = 0
    while sent < 50_000 and client.send("w", m.Withdraw(sent)):
        sent += 1
    assert 1_000 < sent < 50_000


@both_loops
async def test_a_successor_on_the_same_address_does_not_open_its_predecessors_mail(closing: Closing) -> None:
    opened: list[m.Letter] = []
    first = ControlServer("old", "127.0.0.1", opened.append)
    client = closing(ControlClient("gw", lambda letter: None))
    client.connect("old", first.address)
    client.send("old", m.Withdraw(1))
    await until(lambda: opened)
    first.close()
    successor = await server_at(first.address, "new", opened.append, closing)
    await until(lambda: client.send("old", m.Withdraw(2)) and successor.refusals.total)
    client.connect("new", first.address)
    client.send("new", m.Withdraw(3))
    await until(lambda: len(opened) == 2)
    assert [letter.body for letter in opened] == [m.Withdraw(1), m.Withdraw(3)]


async def server_at(address: str, name: str, on_letter: Callable[[m.Letter], None], closing: Closing) -> ControlServer:
    """A server at an address that has just been given up."""
    server: ControlServer = closing(ControlServer(name, "127.0.0.1", on_letter))
    socket = server._pump._socket
    socket.unbind(server.address)
    await until(lambda: bound(socket, int(address.rsplit(":", 1)[1])))
    return server


@both_loops
async def test_a_client_reconnects_by_itself_and_a_restarted_peer_can_answer(closing: Closing) -> None:
    letters: list[m.Letter] = []
    answers: list[m.Letter] = []
    first = ControlServer("w", "127.0.0.1", letters.append)
    client = closing(ControlClient("gw", answers.append))
    client.connect("w", first.address)
    client.send("w", m.Withdraw(1))
    await until(lambda: letters)
    first.close()
    second = await server_at(first.address, "w", letters.append, closing)
    await until(lambda: client.send("w", m.Withdraw(2)) and len(letters) > 1)
    await until(lambda: second.send("gw", m.Committed(2)))
    await until(lambda: answers)


@both_loops
async def test_the_newer_of_two_clients_with_one_name_gets_the_answers(closing: Closing) -> None:
    """ROUTER_HANDOVER: a connection that died unnoticed must not shut its successor out."""
    letters: list[m.Letter] = []
    server = closing(ControlServer("w", "127.0.0.1", letters.append))
    old: list[m.Letter] = []
    new: list[m.Letter] = []
    for number, inbox in enumerate((old, new), 1):
        client = closing(ControlClient("gw", inbox.append))
        client.connect("w", server.address)
        client.send("w", m.Withdraw(number))
        await until(lambda number=number: len(letters) == number)
    assert server.send("gw", m.Committed(1))
    await until(lambda: new)
    assert old == []


@both_loops
async def test_letters_that_are_not_for_us_or_lie_about_their_sender_are_not_opened(closing: Closing) -> None:
    opened: list[m.Letter] = []
    server = closing(ControlServer("w", "127.0.0.1", opened.append))
    raw = new_socket(zmq.DEALER, 100, 1 << 20)
    raw.setsockopt(zmq.ROUTING_ID, b"gw")
    raw.connect(server.address)
    pump = closing(Pump(raw, lambda frames: None))
    for body in (
        b"",
        b"\x81\xa4type\xa6Letter",
        m.encode(m.Letter("gw", "another", m.Withdraw(1))),
        m.encode(m.Letter("liar", "w", m.Withdraw(2))),
        m.encode(m.Parcel("gw", "w", [])),
    ):
        pump.send([body])
    pump.send([m.encode(m.Letter("gw", "w", m.Withdraw(3)))])
    await until(lambda: opened)
    assert [letter.body for letter in opened] == [m.Withdraw(3)] and server.refusals.total == 5


@both_loops
async def test_a_client_opens_only_what_its_peer_wrote_to_it(closing: Closing) -> None:
    opened: list[m.Letter] = []
    router = new_socket(zmq.ROUTER, 100, 1 << 20)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    seen: list[list[bytes]] = []
    pump = closing(Pump(router, seen.append))
    client = closing(ControlClient("gw", opened.append))
    client.connect("w", f"tcp://127.0.0.1:{port}")
    client.send("w", m.Withdraw(1))
    await until(lambda: seen)
    for letter in (m.Letter("stranger", "gw", m.Committed(1)), m.Letter("w", "gw2", m.Committed(2)), m.Letter("w", "gw", m.Committed(3))):
        pump.send([b"gw", m.encode(letter)])
    await until(lambda: opened)
    assert [letter.body for letter in opened] == [m.Committed(3)] and client.refusals.total == 2


# ------------------------------------------------------------------------------------------------------------------ pump


@pytest.mark.parametrize("host", ["0.0.0.0", "203.0.113.7", "no.such.host.invalid"])
@both_loops
async def test_a_host_that_cannot_be_announced_is_a_start_error_that_names_it(closing: Closing, host: str) -> None:
    for bind in (
        lambda: ControlServer("w", host, lambda letter: None),
        lambda: TokenSubscriber("gw", host, lambda parcel: None),
    ):
        with pytest.raises(StartError, match=host):
            closing(bind())


@both_loops
async def test_a_name_of_this_machine_will_do(closing: Closing) -> None:
    assert closing(ControlServer("w", "localhost", lambda letter: None)).address.startswith("tcp://127.0.0.1:")


async def pair_of_pumps(closing: Closing, on_frames: Callable[[list[bytes]], None]) -> Pump:
    """The sending end of a pair whose other end calls `on_frames`."""
    server = new_socket(zmq.DEALER, 100_000, 1 << 20)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    closing(Pump(server, on_frames))
    client = new_socket(zmq.DEALER, 100_000, 1 << 20)
    client.connect(f"tcp://127.0.0.1:{port}")
    return closing(Pump(client, lambda frames: None))  # type: ignore[no-any-return]


@both_loops
async def test_a_handler_that_raises_is_reported_and_the_rest_is_still_received(closing: Closing) -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
    got: list[bytes] = []

    def handler(frames: list[bytes]) -> None:
        got.append(frames[0])
        if frames[0] == b"bad":
            raise ZeroDivisionError

    pump = await pair_of_pumps(closing, handler)
    for body in (b"1", b"bad", b"2", b"3"):
        pump.send([body])
    await until(lambda: len(got) == 4)
    assert [type(context["exception"]) for context in reports] == [ZeroDivisionError] and "handle" in reports[0]


@both_loops
async def test_a_flood_does_not_starve_the_loop(closing: Closing) -> None:
    turns: list[int] = []
    got = 0

    def handler(frames: list[bytes]) -> None:
        nonlocal got
        got += 1
        if got == 1:
            time.sleep(0.3)  # the rest of the flood arrives meanwhile
            asyncio.get_running_loop().call_soon(lambda: turns.append(got))

    pump = await pair_of_pumps(closing, handler)
    for _ in range(10 * BURST):
        assert pump.send([b"x"])
    await until(lambda: got == 10 * BURST)
    assert turns and turns[0] <= 2 * BURST


@both_loops
async def test_a_closed_pump_sends_nothing_and_may_be_closed_again(closing: Closing) -> None:
    pump = await pair_of_pumps(closing, lambda frames: None)
    pump.close()
    pump.close()
    assert not pump.send([b"x"])


@both_loops
async def test_injected_faults_drop_the_nth_message_and_delay_another_with_what_follows(closing: Closing) -> None:
    got: list[bytes] = []
    server = new_socket(zmq.ROUTER, 100, 1 << 20)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    closing(Pump(server, lambda frames: got.append(frames[-1])))
    client = new_socket(zmq.DEALER, 100, 1 << 20)
    client.connect(f"tcp://127.0.0.1:{port}")
    pump = closing(Pump(client, lambda frames: None, MessageFault(drop_every=4, delay_every=3, delay_s=2.0)))
    begin = time.monotonic()
    assert all(pump.send([str(number).encode()]) for number in range(1, 6))
    await until(lambda: len(got) == 2)
    assert time.monotonic() - begin < 2.0
    await until(lambda: len(got) == 4)
    assert time.monotonic() - begin >= 2.0 and got == [b"1", b"2", b"3", b"5"]


# ------------------------------------------------------------------------------------------------------------- strangers


@both_loops
async def test_with_the_fleet_s_secret_peers_talk_and_strangers_do_not(closing: Closing) -> None:
    ours, theirs = seal_of(b"ours" * 8), seal_of(b"theirs" * 8)
    letters: list[m.Letter] = []
    parcels: list[m.Parcel] = []
    server = closing(ControlServer("w", "127.0.0.1", letters.append, ours))
    subscriber = closing(TokenSubscriber("gw", "127.0.0.1", parcels.append, ours))
    friend, friendly = closing(ControlClient("friend", letters.append, ours)), closing(TokenPublisher("friend", seal=ours))
    friend.connect("w", server.address)
    friendly.open("gw", subscriber.address)
    for seal in (None, theirs):
        stranger, strange = closing(ControlClient("stranger", letters.append, seal)), closing(TokenPublisher("stranger", seal=seal))
        stranger.connect("w", server.address)
        strange.open("gw", subscriber.address)
        stranger.send("w", m.Withdraw(66))
    friend.send("w", m.Withdraw(1))
    await until(lambda: friendly.is_open("gw") and letters)
    friendly.send("gw", words(3))
    await until(lambda: parcels)
    await asyncio.sleep(0.3)
    assert [letter.sender for letter in letters] == ["friend"] and indices(parcels) == [3]
    assert not strange.is_open("gw"), "no subscription has come through"


@both_loops
async def test_a_client_with_the_secret_tells_nothing_to_a_false_server(closing: Closing) -> None:
    letters: list[m.Letter] = []
    for seal in (None, seal_of(b"theirs" * 8)):
        false = closing(ControlServer("w", "127.0.0.1", letters.append, seal))
        client = closing(ControlClient("c", letters.append, seal_of(b"ours" * 8)))
        client.connect("w", false.address)
        client.send("w", m.Withdraw(1))
    await asyncio.sleep(0.3)
    assert not letters


@both_loops
async def test_a_frame_that_is_too_large_is_refused_and_counted_and_one_beyond_all_bounds_ends_its_connection(
    closing: Closing, caplog: pytest.LogCaptureFixture
) -> None:
    letters: list[m.Letter] = []
    server = closing(ControlServer("w", "127.0.0.1", letters.append))
    friend = closing(ControlClient("friend", letters.append))
    friend.connect("w", server.address)
    context = zmq.Context()
    with context.socket(zmq.DEALER) as flooder, flooder.get_monitor_socket() as watch:
        flooder.setsockopt(zmq.LINGER, 0)
        flooder.connect(server.address)
        flooder.send(b"secret" + bytes(MAX_LETTER_BYTES))
        await until(lambda: server.refusals.total == 1)
        assert "oversized" in str([record.__dict__ for record in caplog.records]) and "secret" not in caplog.text
        flooder.send(bytes(MAX_FRAME_BYTES + 1))
        seen: set[int] = set()
        while zmq.EVENT_DISCONNECTED not in seen:
            await until(lambda: watch.poll(0))
            seen.add(int(recv_monitor_message(watch)["event"]))
        flooder.disable_monitor()
    context.destroy(0)
    friend.send("w", m.Withdraw(1))
    await until(lambda: letters)
    assert [letter.sender for letter in letters] == ["friend"] and server.refusals.total == 1


def test_a_flood_of_refusals_is_counted_and_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals(get_logger("test"), "a letter")
    for _ in range(1000):
        refusals.note("malformed")
    refusals.note("stranger")
    assert refusals.total == 1001 and len(caplog.records) == 11


@pytest.mark.parametrize("content", [None, b"", b"short"])
def test_a_secret_that_is_none_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingError, match="fleet_secret_file is") as refused:
        read_seal(str(file))
    assert "\n" not in str(refused.value)
    file.write_text("0123456789abcdef" * 4 + "\n")
    assert read_seal(str(file)) == seal_of(b"0123456789abcdef" * 4) and read_seal(None) is None


@both_loops
async def test_every_beat_of_a_decode_says_at_once_how_loaded_it_is_or_that_it_takes_no_offers(closing: Closing) -> None:
    heard: list[m.Letter] = []
    said: list[Load | None] = []
    decode = closing(ControlServer("d", "127.0.0.1", heard.append))
    layout = m.Layout(layers=2, kv_heads=2, page_tokens=4, head_dim=8, dtype="float32")
    peers: Peers = closing(
        Peers("p", "fleet", "print", layout, [], True, lambda peer: [], lambda letter: None, lambda peer, load: said.append(load))
    )
    peers.introduced({"d": m.Introduction("decode", "d", decode.address, "print")})
    await until(lambda: heard)
    for sequence, draining in enumerate((False, False, True, False)):
        decode.send("p", m.WorkerBeat("decode", sequence, 0, False, 1.0, sequence, 9, 0, 0, draining))
    await until(lambda: len(said) == 4)
    assert said == [Load(0, 0), Load(0, 1), None, Load(0, 3)]


@both_loops
async def test_a_decode_that_has_left_is_not_knocked_at_any_more_and_its_next_link_is_another(
    closing: Closing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was still thought alive when it left, and nobody asked again until some other member came or went."""
    said: list[Load | None] = []
    heard: list[m.Letter] = []
    decode = closing(ControlServer("d", "127.0.0.1", heard.append))
    layout = m.Layout(layers=2, kv_heads=2, page_tokens=4, head_dim=8, dtype="float32")
    peers: Peers = closing(
        Peers("p", "fleet", "print", layout, [], True, lambda peer: [], lambda letter: None, lambda peer, load: said.append(load))
    )
    members = {"d": m.Introduction("decode", "d", decode.address, "print")}
    peers.introduced(members)
    await until(lambda: heard)
    assert not said
    decode.send("p", m.WorkerBeat("decode", 1, 0, False, 1.0, 1, 9, 0, 0))
    await until(lambda: said)
    peers.introduced({})
    assert peers._client.peers == {"d"}, "it still beats"
    monkeypatch.setattr("services.prefill.peers.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 10))
    assert peers.reap() == ["d"] and not peers._client.peers
    heard.clear()
    peers.introduced(members)
    await until(lambda: heard)
    assert heard[0].body.link == 1  # type: ignore[union-attr]
