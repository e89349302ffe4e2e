"""Which GPU a worker asks for: the pure decision."""

from __future__ import annotations

import pytest

from common.errors import SettingError, StartError
from services.worker.lease import Choice, Gpu, choose, gpu_key, host_id

GPUS = [Gpu(0, "GPU-aaa", 9 << 30), Gpu(1, "GPU-bbb"), Gpu(2, "GPU-ccc", 1 << 20)]


def order(choice: Choice) -> list[int]:
    return [gpu.index for gpu in choice.gpus]


def test_auto_prefers_cards_whose_memory_is_free() -> None:
    choice = choose("auto", GPUS, None)
    assert choice.kind == "lease"
    assert order(choice) == [1, 2, 0]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("0,1", [1, 0]), ("GPU-ccc", [2]), ("2", [2]), ("1,9,2", [1]), ("GPU-c, 0", [2, 0])],
)
def test_visible_devices_bound_the_choice(visible: str, indices: list[int]) -> None:
    """As CUDA reads it: nothing after the first that does not exist."""
    assert order(choose("auto", GPUS, visible)) == indices


@pytest.mark.parametrize("wanted", ["1", "GPU-bbb"])
def test_a_named_card_is_taken_without_a_lease(wanted: str) -> None:
    assert choose(wanted, GPUS, None) == Choice("fixed", (GPUS[1],))


def test_none_leaves_everything_to_torch() -> None:
    assert choose("none", [], None) == Choice("none")


@pytest.mark.parametrize(("gpus", "visible"), [([], None), (GPUS, ""), (GPUS, "7")])
def test_no_gpu_is_said(gpus: list[Gpu], visible: str | None) -> None:
    with pytest.raises(StartError, match="GPU"):
        choose("auto", gpus, visible)


@pytest.mark.parametrize("wanted", ["3", "fast", "-1", ""])
def test_a_card_that_is_not_there_is_a_bad_setting(wanted: str) -> None:
    with pytest.raises(SettingError, match=r"gpu is .*0, 1, 2"):
        choose(wanted, GPUS, None)


def test_keys_name_host_and_card() -> None:
    assert gpu_key(host_id(), "GPU-aaa") == gpu_key(host_id(), "GPU-aaa")
    assert gpu_key("other", "GPU-aaa") != gpu_key(host_id(), "GPU-aaa")
