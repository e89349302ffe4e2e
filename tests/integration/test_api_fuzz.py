"""Schemathesis over `/openapi.json`: whatever is asked, within the description or against it, gets a reply that is described.

BATON_TEST_FULL=1 asks many times as much, and a whole fleet instead of an echo; every process must live on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from gateway.gate import Access
from gateway.keys import read_keys
from gateway.limits import Meters
from gateway.openapi import OPERATIONS
from scripts.launcher.cluster import Cluster
from tests.integration.echo_desk import Script
from tests.integration.http_fixtures import PATIENCE_S, serving

FULL = bool(os.environ.get("BATON_TEST_FULL"))
EXAMPLES = 300 if FULL else 4
"""Of each endpoint, within its description and again against it."""
FLEET_EXAMPLES = 50
DEADLINE_S = 1.0
"""Of what a whole fleet is asked: it would go on for hours otherwise."""
pytestmark = pytest.mark.timeout(3600 if FULL else 120)
KEY = "fuzz-0123456789abcdef"
PATHS = [path.replace(":path}", "}") for path in OPERATIONS]


@pytest.fixture(scope="module")
def echo(smollm2: Path) -> Iterator[str]:
    keys = read_keys(KEY, None)
    assert keys is not None
    with serving(smollm2, Access(keys, Meters(keys.names))) as served:
        served.desk.scripts = lambda ask: Script([100, 101])
        yield served.url


def fuzz(url: str, path: str, mode: GenerationMode, examples: int, deadline_s: float | None = None) -> int:
    """Ask and judge; returns how many were asked. Schemathesis raises what it finds wrong.

    Not held against it: that a description admits what is refused (sums of prompt and answer, fields that exclude each other), and that
    parameters of an address which nobody knows are ignored; nor that what has a deadline of ours is late, with the 503 for it.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=PATIENCE_S)
    (operation,) = (found.ok() for found in schema.include(path=path).get_all_operations())
    excluded = [positive_data_acceptance, *([negative_data_rejection] if operation.method == "get" else [])]
    asked = 0

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        nonlocal asked
        if deadline_s is not None and isinstance(case.body, dict):
            case.body["deadline"] = deadline_s
        asked += 1
        how: dict[str, Any] = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": PATIENCE_S}
        answer = case.call(**how)
        late = deadline_s is not None and answer.status_code == 503 and answer.json()["error"]["code"] == "deadline_exceeded"
        more = [not_a_server_error] if late else []
        case.validate_response(answer, excluded_checks=[*excluded, *more], headers=how["headers"], transport_kwargs=how)

    ask()
    return asked


def fuzzed(url: str, path: str, mode: GenerationMode, examples: int, deadline_s: float | None = None) -> None:
    try:
        asked = fuzz(url, path, mode, examples, deadline_s)
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "nothing can be wrong with it"
    else:
        print(f"{path} {mode.value}: {asked} asked")
    assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", PATHS)
def test_every_reply_is_described(echo: str, path: str, mode: GenerationMode) -> None:
    fuzzed(echo, path, mode, EXAMPLES)


@pytest.mark.skipif(not FULL, reason="only with BATON_TEST_FULL=1")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", [path for path in PATHS if path.startswith("/v1/c")])
def test_no_process_of_a_fleet_dies(pair: Cluster, conserved: None, path: str, mode: GenerationMode) -> None:
    fuzzed(pair.urls[0], path, mode, FLEET_EXAMPLES, DEADLINE_S)
    assert all(child.alive for child in pair.children.values())
