"""Whom a gateway without keys takes for this host, and which pages for its own."""

from __future__ import annotations

import pytest

from gateway.local import Forbidden, check_local, local_names

PAGE = "https://chat.example.org"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", None])
def test_this_host_by_any_of_its_names(host: str | None) -> None:
    check_local(host, None, local_names("127.0.0.1"), [])


@pytest.mark.parametrize(
    "host", ["evil.example.org", "evil.example.org:8000", "localhost.evil.example.org", "127.0.0.1.evil.example.org:80", "", ":8000", "::1"]
)
def test_a_name_that_was_turned_towards_this_host(host: str) -> None:
    with pytest.raises(Forbidden, match="answers to") as refused:
        check_local(host, None, local_names("127.0.0.1"), [])
    assert (refused.value.status, refused.value.code) == (403, "forbidden")


@pytest.mark.parametrize(("http_host", "host"), [("Here.local", "here.local:1"), ("127.0.0.2", "127.0.0.2"), ("::1", "[::1]:8000")])
def test_the_name_of_the_setting(http_host: str, host: str) -> None:
    check_local(host, None, local_names(http_host), [])


def test_pages_of_its_own_and_of_named_origins() -> None:
    names = local_names("127.0.0.1")
    for host, origin in [
        ("localhost:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost", "https://localhost"),
    ]:
        check_local(host, origin, names, [])
    check_local("localhost:8000", PAGE, names, [PAGE])
    check_local("localhost:8000", "null", names, ["*"])


@pytest.mark.parametrize(
    "origin", [PAGE, "null", "", "http://localhost:3000", "http://127.0.0.1:8000", "http://localhost:8000.evil.example.org"]
)
def test_pages_of_elsewhere(origin: str) -> None:
    with pytest.raises(Forbidden, match="pages of"):
        check_local("localhost:8000", origin, local_names("127.0.0.1"), ["https://other.example.org"])
