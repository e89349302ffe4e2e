"""Every command in scripts/ finds what it imports, explains itself, and refuses what cannot work before it begins."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts.outputs import obstacle

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODULES = {
    module
    for script in SCRIPTS.iterdir()
    if script.is_file() and not script.suffix
    for module in re.findall(r"(?:python|run) -m ((?:scripts|services)[.\w]+)", script.read_text())
}

WITH_OPTIONS = {*MODULES, "scripts.gpu.system"} - {"scripts.launcher.key", "scripts.launcher.model"}


def program(name: str) -> ModuleType:
    """What `python -m` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_command_can_be_imported(module: str) -> None:
    program(module)


def test_the_commands_are_found() -> None:
    assert {
        "scripts.launcher",
        "scripts.load",
        "scripts.faults",
        "scripts.faults.soak",
        "scripts.trials.engine",
        "scripts.trials.handoff",
        "services.transfer.bench",
    } <= MODULES


def refused(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as end:
        program(module).main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize("module", sorted(WITH_OPTIONS))
def test_a_command_explains_itself(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as end:
        program(module).main()
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("repeats", ["0", "-1"])
def test_a_handoff_is_measured_at_least_once(repeats: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("scripts.trials.handoff.served", lambda *_, **__: pytest.fail("a system was started"))
    assert "--repeats must be at least 1" in refused("scripts.trials.handoff", ["--repeats", repeats], monkeypatch, capsys)


@pytest.mark.parametrize("option", ["--json", "--profile"])
def test_where_nothing_can_be_written_nothing_is_measured(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.trials.engine.obtain", lambda *_: pytest.fail("it has begun"))
    assert "no folder /nonexistent" in refused("scripts.trials.engine", [option, "/nonexistent/x"], monkeypatch, capsys)


def test_what_is_in_the_way_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.touch()
    assert obstacle(None) is obstacle(there) is obstacle(tmp_path / "new") is None
    assert "folder" in (obstacle(tmp_path) or "") and "no folder" in (obstacle(there / "new") or "")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "denied" in (obstacle(tmp_path / "new") or "")
