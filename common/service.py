"""A process' life: settings, ready, signals, drain, `--check`. Every process starts and ends through `run`.

Exit status: 0 after a drain, 1 when it could not start, join or go on (one line says why), 2 for a bad setting (one line names it).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import sys
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common import logs, names
from common.errors import BatonError, SettingError
from common.files import allow_files
from common.logs import get_logger
from common.messages import Incarnation, Role
from common.resolve import settled
from common.settings import CommonSettings, load

log = get_logger(__name__)

SWITCH_S = 0.0005
"""Python's threads hand over at least this often: a socket must not wait 5 ms for the engine's bookkeeping."""
CHECK_S = 2.0
CANCEL_S = 0.2
OVERDUE_S = 5.0
"""A process that has not ended this long after its drain's grace is ended."""

S = TypeVar("S", bound=CommonSettings)


class Service:
    """What a process' main function gets: its name, when to stop, and how to say that it is ready or cannot go on."""

    def __init__(self, role: Role, settings: CommonSettings) -> None:
        self.incarnation: Incarnation = names.incarnation()
        self.role = role
        self.stopping = asyncio.Event()
        self.becoming: Role | None = None
        """Not the end: a worker stops only to go on in this role."""
        self.error: BaseException | None = None
        self._ready_file = Path(settings.ready_file) if settings.ready_file else None

    def ready(self, **facts: object) -> None:
        """The process serves from now on; `facts` (addresses, ports) go into the ready file."""
        if self._ready_file is not None:
            unfinished = self._ready_file.with_name(self._ready_file.name + ".partial")
            try:
                unfinished.write_text(
                    json.dumps({"pid": os.getpid(), "role": self.role, "incarnation": self.incarnation, **facts}, default=str)
                )
                unfinished.replace(self._ready_file)
            except OSError as error:
                raise SettingError(f"ready_file is {str(self._ready_file)!r}; it cannot be written: {error.strerror}") from error
        log.info("ready", **facts)

    def stop(self) -> None:
        self.becoming = None
        self.stopping.set()

    def become(self, role: Role) -> None:
        """Stop, and go on in another role; unless it stops for good already."""
        if not self.stopping.is_set():
            self.becoming = role
            self.stopping.set()

    def renew(self, role: Role) -> None:
        """It has stopped and goes on: a new member of the fleet, of which nobody has heard anything yet."""
        self.unready()
        self.incarnation, self.role, self.becoming = names.incarnation(), role, None
        self.stopping.clear()

    def fail(self, error: BaseException) -> None:
        """Something the process cannot live without has died."""
        self.error = self.error or error
        self.stop()

    def unready(self) -> None:
        """Before the start (a killed predecessor may have left its file) and at the end."""
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)


def run(main: Callable[[S, Service], Awaitable[None]], kind: type[S], role: Role, argv: list[str] | None = None) -> int:
    """Load settings, run `main(settings, service)` until it returns, and give the exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        settings = load(kind, [word for word in words if word != "--check"], os.environ)
    except SettingError as error:
        print(f"{role}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if "--check" in words:
        return check(settings)
    logs.set_up(role, settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_S)
    allow_files()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_live(main, settings, role))
    except KeyboardInterrupt:
        return 130


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop
    return factory


async def _live(main: Callable[[S, Service], Awaitable[None]], settings: S, role: Role) -> int:
    service = Service(role, settings)
    logs.set_up(f"{role}[{service.incarnation[:4]}]", settings.log_level, settings.log_format)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _signalled, service, settings.drain_s)
    loop.set_exception_handler(partial(_stray, service))
    try:
        service.unready()
        await main(await settled(settings), service)
    except Exception as error:
        service.fail(error)
    finally:
        service.unready()
    return _status(role, service.error)


def _stray(service: Service, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception that nobody awaits. In a callback (a socket's or a thread's word) it left the state unknown: the process ends.

    Others, such as a transport's, are only logged.
    """
    error = context.get("exception")
    if isinstance(error, Exception) and "handle" in context and "transport" not in context:
        service.fail(error)
    else:
        loop.default_exception_handler(context)


def _status(role: Role, error: BaseException | None) -> int:
    """The exit status for what ended the process, after saying it in one line, with a traceback if it was unexpected."""
    if error is None:
        return 0
    causes = list(_leaves(error))
    unexpected = [cause for cause in causes if not isinstance(cause, BatonError)]
    if unexpected:
        log.exception("the process cannot go on", unexpected[0] if len(causes) == 1 else error)
        return 1
    print(f"{role}: {' '.join(str(causes[0]).split())}", file=sys.stderr)
    return 2 if isinstance(causes[0], SettingError) else 1


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _signalled(service: Service, drain_s: float) -> None:
    """The first signal asks for a drain, the second ends the process; so does a drain that does not end."""
    if service.stopping.is_set() and service.becoming is None:
        os._exit(1)
    service.stop()
    asyncio.get_running_loop().call_later(drain_s + OVERDUE_S, _overdue)


def _overdue() -> None:
    log.error("the drain does not end")
    os._exit(1)


async def end(*tasks: asyncio.Task[None]) -> None:
    """Cancel until they have ended: a library may swallow one cancellation, and the task would go on."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_S)


def leave(status: int) -> NoReturn:
    """End the process at once. After a drain nothing is left to tidy up; taking apart the interpreter with torch in it costs seconds, and a
    library's thread that does not end could hold it up for ever."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def checked(kind: type[CommonSettings], role: Role) -> None:
    """Answers `--check` and ends the process if that was asked for: nothing heavy need be imported for it."""
    if "--check" in sys.argv[1:]:
        leave(run(_nothing, kind, role))


async def _nothing(settings: CommonSettings, service: Service) -> None:
    raise AssertionError("a check runs nothing")


def check(settings: CommonSettings) -> int:
    """`--check`, for containers: the ready file is there, its process lives, and its HTTP server answers if it has one."""
    if settings.ready_file is None:
        print("no ready_file is set: nothing to check", file=sys.stderr)
        return 1
    try:
        facts = json.loads(Path(settings.ready_file).read_text())
        os.kill(int(facts["pid"]), 0)
        if "http_port" in facts:
            host = facts.get("http_host", "127.0.0.1")
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
            url = f"http://{f'[{host}]' if ':' in host else host}:{facts['http_port']}/health"
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            direct.open(url, timeout=CHECK_S).close()
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        print(f"not ready: {' '.join(f'{type(error).__name__} {error}'.split())}", file=sys.stderr)
        return 1
    print("ready")
    return 0
