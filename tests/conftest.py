"""What every test may use: the real small model, and sane defaults for threads and hypothesis."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("here", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("here")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct; `./scripts/test` fetches it and says where it is."""
    found = os.environ.get("BATON_TEST_MODEL")
    if not found:
        pytest.fail("BATON_TEST_MODEL is not set: run the tests by ./scripts/test")
    return Path(found)
