"""Settings that only the running machine knows: its address, and a password out of a file."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from common import names
from common.errors import SettingError, StartError
from common.resolve import NoWayError, own_address, resolved, settled, with_password
from common.settings import CommonSettings


def test_a_password_is_quoted_into_the_url() -> None:
    assert with_password("redis://redis:6379/0", "p@ss/w:rd") == "redis://:p%40ss%2Fw%3Ard@redis:6379/0"
    assert with_password("rediss://user@redis/1", "x") == "rediss://user:x@redis/1"


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "redis://:known@redis:6379/0"])
def test_a_password_that_cannot_go_there_is_refused(url: str) -> None:
    with pytest.raises(SettingError, match="redis_password_file"):
        with_password(url, "x")


def test_the_file_is_read_and_its_line_end_dropped(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("secret\n")
    settings = resolved(CommonSettings(redis_url="redis://127.0.0.1:6379/0", redis_password_file=str(file)))
    assert settings.redis_url == "redis://:secret@127.0.0.1:6379/0"
    assert ":secret" not in repr(settings)


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_file_without_a_password_is_a_bad_setting(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingError, match="redis_password_file"):
        resolved(CommonSettings(redis_password_file=str(file)))


def test_auto_is_the_address_that_leads_to_redis() -> None:
    assert own_address("redis://127.0.0.1:6379/0") == "127.0.0.1"
    assert own_address("unix:///run/redis.sock") == "127.0.0.1"
    settings = CommonSettings(redis_url="redis://127.0.0.1/0", host="auto")
    assert resolved(settings) == replace(settings, host="127.0.0.1")


def test_an_own_network_gives_its_own_address() -> None:
    """Every address of 127/8 is this machine's: towards one of them the kernel picks a source that others can reach it by."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.7", 0))
        server.listen()
        with socket.create_connection(("127.0.0.7", server.getsockname()[1]), timeout=2) as client:
            assert own_address(f"redis://127.0.0.7:{server.getsockname()[1]}/0") == client.getsockname()[0]


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(StartError, match="host is auto"):
        own_address("redis://no-such-host.invalid:6379/0")


async def test_a_start_waits_for_a_name_that_comes_up_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers and their names come up together. A name that never comes ends the start, in words; an unreadable URL at once."""
    asked: list[str] = []

    def late(url: str) -> str:
        asked.append(url)
        if len(asked) < 3:
            raise NoWayError("host is auto, but no way leads to Redis: name or service not known")
        return "10.1.2.3"

    settings = CommonSettings(redis_url="redis://no-such-host.invalid/0", host="auto")
    with monkeypatch.context() as patched:
        patched.setattr("common.resolve.own_address", late)
        patched.setattr(names, "BEAT_S", 0.01)
        assert (await settled(settings)).host == "10.1.2.3"
    monkeypatch.setattr(names, "PATIENCE_S", 0.0)
    with pytest.raises(NoWayError, match="host is auto"):
        await settled(settings)
    with pytest.raises(StartError, match="cannot be read") as refused:
        await settled(replace(settings, redis_url="redis://[::1/0"))
    assert not isinstance(refused.value, NoWayError)


def test_a_given_address_stays() -> None:
    assert resolved(CommonSettings(host="10.1.2.3")).host == "10.1.2.3"
