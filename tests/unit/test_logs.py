"""Logs: one line per event, facts beside words, for people or for machines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from common import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logs._name = "baton"


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_text_has_time_level_name_words_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("prefill[ab12]")
    logs.get_logger("x").warning("worker lost", worker="f00", silent_s=2.5)
    [line] = lines(capsys)
    stamp, rest = line.split(" ", 1)
    assert stamp.count(":") == 2
    assert rest == "warning prefill[ab12] worker lost worker=f00 silent_s=2.5"


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_fact_never_breaks_the_line(capsys: pytest.CaptureFixture[str], style: str) -> None:
    logs.set_up("gateway", style=style)
    logs.get_logger("x").info("odd", reason=ValueError("one\r\ntwo"))
    assert len(lines(capsys)) == 1


def test_json_keeps_numbers_and_its_own_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("decode[cd]", style="json")
    logs.get_logger("x").info("done", pages=3, share=0.5, odd=float("nan"), event="another", peers={1})
    line = json.loads(lines(capsys)[0])
    assert isinstance(line.pop("time"), float)
    assert line == {"level": "info", "process": "decode[cd]", "event": "done", "pages": 3, "share": 0.5, "odd": "nan", "peers": "{1}"}


def test_levels_below_the_asked_one_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("gateway", level="warning")
    logger = logs.get_logger("x")
    logger.debug("a")
    logger.info("b")
    logger.error("c")
    assert [line.rsplit(" ", 1)[1] for line in lines(capsys)] == ["c"]


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_unexpected_comes_with_its_traceback(capsys: pytest.CaptureFixture[str], style: str) -> None:
    logs.set_up("gateway", style=style)
    try:
        raise ZeroDivisionError("by hand")
    except ZeroDivisionError as error:
        logs.get_logger("x").exception("cannot go on", error)
    text = "\n".join(lines(capsys))
    assert "Traceback" in text and "ZeroDivisionError: by hand" in text and "cannot go on" in text


def test_what_clients_send_fills_no_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Uvicorn warns of each line that is no HTTP, and of each wish for another protocol."""
    logs.set_up("gateway")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert lines(capsys) == []
    logging.getLogger("uvicorn.error").error("Exception in ASGI application")
    assert len(lines(capsys)) == 1
