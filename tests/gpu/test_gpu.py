"""What only a GPU can show, briefly; `./scripts/gpu_check` does the same at length, and measures. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.kernel_cases import CASES, SHAPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a GPU only")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_is_its_reference(case, dtype) -> None:  # type: ignore[no-untyped-def]
    from services.engine.cuda.triton_operators import TritonOperators

    error, bound = case(TritonOperators(), SHAPES["grouped"], dtype, torch.device("cuda", 0), 1)
    assert error <= bound


def test_greedy_ids_are_those_of_transformers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from scripts.gpu.model import greedy, random_model

    found = greedy(random_model(tmp_path), "float32", "native")
    assert found["ok"], found


def test_a_launch_ahead_draws_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from scripts.gpu.model import ahead, random_model

    found = ahead(random_model(tmp_path))
    assert found["ok"] and found["depth"] == 2, found


def test_draws_are_those_of_the_cpu() -> None:
    from scripts.gpu.model import draws

    assert draws()["ok"]


def test_checksums_are_those_of_the_cpu() -> None:
    """Computed on the transfer's own stream, behind nobody's step."""
    from common.messages import Shard
    from services.transfer.checksum import keyed_sum
    from services.transfer.places import Places
    from services.transfer.protocol import keyed

    pages = torch.randint(0, 256, (3, 4096), dtype=torch.uint8)
    shard = Shard(0, (0, 1), (0, 1))
    places = Places(pages.cuda(), shard)
    places.enter()
    wanted = [keyed_sum(page, keyed(shard, 7)) for page in pages]
    assert [places.checksum(page, 7, shard) for page in range(3)] == wanted == places.checksums(range(3), [7] * 3, shard)
