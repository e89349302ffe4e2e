"""What every test may use: the real small model, whole systems that serve it, and sane defaults for threads and hypothesis."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from scripts.launcher.cluster import Cluster
from tests.systems import assert_conserved, serve, small

settings.register_profile("here", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("here")
torch.set_num_threads(1)


SYSTEMS = {"launch", "pair"}
"""Fixtures that start whole systems."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need both cores, or that no other process may hold up, are marked `system`: `./scripts/test` runs them one by one."""
    for item in items:
        if SYSTEMS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct; `./scripts/test` fetches it and says where it is."""
    found = os.environ.get("BATON_TEST_MODEL")
    if not found:
        pytest.fail("BATON_TEST_MODEL is not set: run the tests by ./scripts/test")
    return Path(found)


@pytest.fixture(scope="module")
def launch(smollm2: Path) -> Iterator[Callable[..., Cluster]]:
    """Start systems; all end with the module."""
    with ExitStack() as running:

        def start(**shape: Any) -> Cluster:
            cluster = running.enter_context(Cluster(small(smollm2, **shape)))
            serve(cluster)
            return cluster

        yield start


@pytest.fixture(scope="session")
def pair(smollm2: Path) -> Iterator[Cluster]:
    """One prefill, one decode, one gateway, for all tests that leave them as they were."""
    with Cluster(small(smollm2)) as cluster:
        serve(cluster)
        yield cluster


@pytest.fixture
def conserved(pair: Cluster) -> Iterator[None]:
    yield
    assert_conserved(pair)
