"""Which worker an operator may send into another role."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import QueueError
from common.messages import Introduction, Role
from services.worker import role as script
from services.worker.role import RoleError, chosen


def fleet(**roles: Role) -> dict[str, Introduction]:
    return {name: Introduction(role, name, "", "") for name, role in roles.items()}


def test_the_beginning_of_a_name_is_enough() -> None:
    assert chosen(fleet(ab1="prefill", ac2="prefill", b3="decode"), "ac", "decode") == "ac2"
    assert chosen(fleet(ab1="prefill", b3="decode", c4="colocated"), "a", "decode") == "ab1", "the colocated one reads prompts"


@pytest.mark.parametrize(
    ("begins", "role", "words"),
    [
        ("a", "decode", "2 workers"),
        ("x", "decode", "0 workers"),
        ("b", "decode", "already"),
        ("b", "prefill", "nobody would be left as decode"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(begins: str, role: Role, words: str) -> None:
    with pytest.raises(RoleError, match=words):
        chosen(fleet(ab1="prefill", ac2="prefill", b3="decode"), begins, role)


def test_the_password_and_the_certificates_of_redis_are_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose gives the password in a file: the command of docs/deploy.md logged in without it."""
    (tmp_path / "password").write_text("secret\n")
    seen = []

    def connect(*wanted: str | None) -> None:
        seen.append(wanted)
        raise QueueError("enough")

    monkeypatch.setattr(script, "connect", connect)
    environ = {
        "BATON_REDIS_URL": "rediss://baton@redis:6379/0",
        "BATON_REDIS_PASSWORD_FILE": str(tmp_path / "password"),
        "BATON_REDIS_CA_FILE": "/ca.pem",
    }
    assert script.main([], environ) == 1
    assert seen == [("rediss://baton:secret@redis:6379/0", "/ca.pem")]
