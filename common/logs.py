"""Structured logs on stderr: an event in words and facts as key=value, as text for people or as JSON lines."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from typing import Any

_name = "baton"


class Logger:
    """A thin face on `logging`: `log.info("worker lost", worker=name)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, **facts: object) -> None:
        self._log(logging.DEBUG, message, facts)

    def info(self, message: str, **facts: object) -> None:
        self._log(logging.INFO, message, facts)

    def warning(self, message: str, **facts: object) -> None:
        self._log(logging.WARNING, message, facts)

    def error(self, message: str, **facts: object) -> None:
        self._log(logging.ERROR, message, facts)

    def exception(self, message: str, error: BaseException, **facts: object) -> None:
        """With the traceback, for what should never happen."""
        self._logger.error(message, exc_info=error, extra={"facts": facts})

    def _log(self, level: int, message: str, facts: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, message, extra={"facts": facts})


def worth_saying(count: int) -> bool:
    """Of what happens again and again the 1st, 2nd, 4th, 8th … time: a flood must not fill the log."""
    return count & (count - 1) == 0


def get_logger(name: str) -> Logger:
    return Logger(name)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {key}={_plain(value)}" for key, value in getattr(record, "facts", {}).items())
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{stamp}.{int(record.msecs):03d} {record.levelname.lower():7} {_name} {record.getMessage()}{facts}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            **{key: _json(value) for key, value in getattr(record, "facts", {}).items()},
            "time": record.created,
            "level": record.levelname.lower(),
            "process": _name,
            "event": record.getMessage(),
        }
        if record.exc_info is not None:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _plain(value: object) -> str:
    """A fact on one line."""
    return str(value).replace("\r", "\\r").replace("\n", "\\n")


def _json(value: object) -> object:
    """Finite numbers stay numbers; JSON has no others."""
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def set_up(name: str, level: str = "info", style: str = "text") -> None:
    """Logs of this process go to stderr under `name`."""
    global _name
    _name = name
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if style == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # uvicorn.error warns of what clients send, as often as they send it: anyone could fill the log.
    for foreign in ("transformers", "httpx", "httpcore", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(foreign).setLevel(logging.ERROR)
