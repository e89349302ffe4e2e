"""Every command in scripts/ finds what it imports."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODULES = {
    module
    for script in SCRIPTS.iterdir()
    if script.is_file() and not script.suffix
    for module in re.findall(r"python -m ((?:scripts|services)[.\w]+)", script.read_text())
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_command_can_be_imported(module: str) -> None:
    importlib.import_module(module)


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
