"""The web page's own decisions, in node: what is sent of a conversation, and which settings are used."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.keys import KEY
from gateway.page import FILES, LONGEST_OBJECTIVE_MS, LONGEST_WINDOW_S

Node = Callable[[str, str], Any]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """`node(file, script)`: what the script says (it must print JSON), with all that this file of the page exports as `page`."""
    binary = shutil.which("node")
    if binary is None:
        pytest.skip("no node here")
    shutil.copytree(FILES, tmp_path / "web")
    (tmp_path / "package.json").write_text('{"type": "module"}')

    def run(file: str, script: str) -> Any:
        (tmp_path / "main.js").write_text(f'import * as page from "./web/{file}";\n{script}')
        ended = subprocess.run([binary, tmp_path / "main.js"], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def field(name: str) -> dict[str, str]:
    """The attributes of a field of the settings."""
    [found] = re.findall(rf'<input name="{name}" ([^>]*)>', (FILES / "index.html").read_text())
    return dict(re.findall(r'(\w+)="([^"]*)"', found))


def test_a_question_without_an_answer_is_not_sent_again(node: Node) -> None:
    """One that was refused would be refused with each later one, too. The last one is being asked."""
    user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    talks = [[user], [user, assistant, user], [user, user], [user, assistant, user, user, user], [user, user, assistant, user]]
    heard = node("chat.js", f"console.log(JSON.stringify({json.dumps(talks)}.map(page.heard)))")
    assert heard == [[user], [user, assistant, user], [user], [user, assistant, user], [user, assistant, user]]


def read(node: Node, kept: dict[str, Any]) -> Any:
    storage = f"globalThis.localStorage = {{ getItem: () => {json.dumps(json.dumps(kept))} }};"
    return node("settings.js", f"{storage} console.log(JSON.stringify(page.read()))")


def test_an_objective_that_the_server_refuses_is_not_used(node: Node) -> None:
    for name, most in [("ttft_ms", LONGEST_OBJECTIVE_MS), ("tpot_ms", LONGEST_OBJECTIVE_MS), ("minutes", LONGEST_WINDOW_S / 60)]:
        assert float(field(name)["max"]) == most
    found = read(node, {"ttft_ms": 1e9, "tpot_ms": 70, "minutes": 900, "temperature": "hot"})
    assert (found["ttft_ms"], found["tpot_ms"], found["minutes"], found["temperature"]) == (1_000_000, 70, 60, 0.7)


def test_a_key_that_no_browser_would_send_is_refused_where_it_is_entered(node: Node) -> None:
    """With one, each request fails as if the server were away."""
    entered = field("key")
    assert entered["pattern"].replace("\\", "") == KEY.pattern.removesuffix("+") + "*" and entered["title"]
    assert [read(node, {"key": key})["key"] for key in ("a-0._~+/=", "schlüssel–1", "")] == ["a-0._~+/=", "", ""]
