"""Which worker an operator may send into another role."""

from __future__ import annotations

import pytest

from common.messages import Introduction, Role
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
