"""Imports go one way, by the table below, and what is light or pure imports no torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "common": set(),
    "gateway": {"common"},
    "services.engine": {"common"},
    "services.transfer": {"services.engine", "common"},
    "services.worker": {"services.transfer", "services.engine", "common"},
    "services.prefill": {"services.worker", "services.transfer", "services.engine", "common"},
    "services.decode": {"services.worker", "services.transfer", "services.engine", "common"},
    "services.colocated": {"services.worker", "services.transfer", "services.engine", "common"},
    "services.planner": {"services.engine", "common"},
}
"""Each room of the house and the rooms it may import; itself always."""
HEAVY = {"torch", "transformers", "ucxx"}
PURE = {
    f"services/engine/{name}.py"
    for name in (
        "sequence",
        "plan",
        "pages",
        "policies",
        "run",
        "inbound",
        "scheduler",
        "engine",
        "prefixes",
        "binding",
        "budgets",
        "grid",
        "pace",
    )
} | {
    "services/prefill/core.py",
    "services/prefill/handoffs.py",
    "services/decode/core.py",
    "services/decode/inbound.py",
    "services/worker/outbox.py",
    "services/worker/runs.py",
    "services/worker/jobs.py",
    "services/worker/memory.py",
    "services/engine/bench/work.py",
    "services/engine/bench/rounds.py",
    "services/engine/bench/report.py",
    "services/transfer/protocol.py",
    "services/transfer/parts.py",
    "services/transfer/gather.py",
}
"""Files that the simulator and the tests of the rules run without torch."""
TEXT_ONLY = {"gateway/prompts.py": {"transformers"}}
"""The gateway reads tokenizers, which needs no torch."""


def product() -> list[Path]:
    return sorted(path for top in ("common", "gateway", "services") for path in (ROOT / top).rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return ".".join(parts[:2]) if parts[0] == "services" and len(parts) > 2 else parts[0]


def imported(path: Path) -> set[str]:
    """Names of all modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_folder_has_a_place_in_the_table() -> None:
    rooms = {room(path) for path in product()} - {"services"}
    assert rooms <= set(MAY_IMPORT), f"not in the table: {rooms - set(MAY_IMPORT)}"


@pytest.mark.parametrize("path", product(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    own = room(path)
    allowed = MAY_IMPORT.get(own, set()) | {own}
    for name in imported(path):
        top = name.split(".")[0]
        if top in ("common", "gateway", "services", "scripts", "tests"):
            target = ".".join(name.split(".")[:2]) if top == "services" else top
            assert target in allowed, f"{own} imports {name}"


@pytest.mark.parametrize("path", product(), ids=lambda path: str(path.relative_to(ROOT)))
def test_light_rooms_stay_light(path: Path) -> None:
    """common, gateway and planner run without torch; the pure files neither need it."""
    name = str(path.relative_to(ROOT))
    if room(path) in ("common", "gateway", "services.planner") or name in PURE:
        heavy = {module.split(".")[0] for module in imported(path)} & (HEAVY - TEXT_ONLY.get(name, set()))
        assert not heavy, f"{name} imports {heavy}"


@pytest.mark.parametrize("path", [path for path in product() if room(path) == "services.planner"], ids=lambda path: path.stem)
def test_the_planner_sees_only_the_engine_s_pure_files(path: Path) -> None:
    engine = {name for name in imported(path) if name.startswith("services.engine.")}
    assert {"/".join(name.split(".")[:3]) + ".py" for name in engine} <= PURE


def test_pure_files_exist() -> None:
    assert all((ROOT / name).is_file() for name in PURE)
