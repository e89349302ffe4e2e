"""How products of few rows are cut: pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.cuda.tiles import MOST_ROWS, Device, cut

HOPPER, ADA = Device(132, 227 << 10), Device(58, 99 << 10)


@given(
    st.integers(1, 80),
    st.integers(1, 300).map(lambda n: 16 * n),
    st.integers(1, 300).map(lambda n: 16 * n),
    st.booleans(),
    st.booleans(),
    st.sampled_from((HOPPER, ADA)),
)
def test_a_cut_covers_the_product_and_fits(rows: int, outputs: int, inputs: int, gated: bool, whole: bool, device: Device) -> None:
    found = cut(rows, outputs, inputs, device, gated=gated, whole=whole)
    if found is None:
        assert rows > MOST_ROWS or outputs % 32 or inputs % 128 or outputs % 64
        return
    tile = found.tile
    assert rows <= tile.rows <= MOST_ROWS and outputs % tile.outputs == 0
    assert inputs % found.parts == 0 and (inputs // found.parts) % tile.depth == 0
    assert tile.shared_bytes(gated) <= device.shared_bytes
    assert found.parts == 1 or not (gated or whole)


@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 4096), (4096, 14336)])
def test_small_matrices_are_divided_until_the_device_is_full(outputs: int, inputs: int) -> None:
    found = cut(1, outputs, inputs, HOPPER, gated=False, whole=False)
    assert found is not None and found.parts * outputs // found.tile.outputs >= HOPPER.multiprocessors


def test_too_small_a_device_leaves_it_to_the_library() -> None:
    assert cut(64, 4096, 4096, Device(10, 32 << 10), gated=False, whole=False) is None
