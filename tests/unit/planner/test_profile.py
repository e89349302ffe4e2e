"""Profiles: the format of the docstring, what is refused, and that it ends up in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.planner import profile
from services.planner.profile import ProfileError

LENGTHS = (64, 256, 1024, 2048)
STEPS = [(batch, context) for batch in (1, 8, 32) for context in (128, 1024)]


def document(**changes: Any) -> dict[str, Any]:
    return {
        "memory_bytes": 8e10,
        "weight_bytes": 2e10,
        "kv_bytes_per_token": 1e6,
        "transfer_bytes_per_s": 1e10,
        "transfer_s": 0.002,
        "prefill": [{"tokens": [n], "seconds": 0.01 + 1e-4 * n} for n in LENGTHS] + [{"tokens": [128, 128], "seconds": 0.0356}],
        "decode": [{"batch": b, "context": c, "seconds": 0.01 + 1e-6 * b * c + 1e-4 * b} for b, c in STEPS],
        "a_field_of_tomorrow": 1,
        **changes,
    }


def read(tmp_path: Path, content: dict[str, Any]) -> profile.Profile:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(content))
    return profile.read(path)


def test_what_was_measured_is_what_the_model_says(tmp_path: Path) -> None:
    costs = profile.costs(read(tmp_path, document()))
    assert costs.launches[1].prefill_s(512, 512**2) == pytest.approx(0.0612, rel=1e-3)
    assert costs.launches[1].decode_s(16, 16 * 512) == pytest.approx(0.01 + 8192e-6 + 16e-4, rel=1e-3)
    assert costs.network_bytes_per_s == 1e10
    assert "worst 0.0%" in costs.source


def test_degrees_are_those_measured_in_both_phases(tmp_path: Path) -> None:
    content = document()
    content["prefill"] += [{**point, "tp": 2, "seconds": point["seconds"] / 2} for point in content["prefill"]]
    assert set(profile.costs(read(tmp_path, content)).launches) == {1}
    content["decode"] += [{**point, "tp": 2} for point in content["decode"]]
    launches = profile.costs(read(tmp_path, content)).launches
    assert launches[2].prefill_s(512, 512**2) == pytest.approx(launches[1].prefill_s(512, 512**2) / 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefill": []}, "no tensor-parallel degree"),
        ({"prefill": [{"tokens": [64], "seconds": 0.1}] * 5}, "three different points"),
        ({"decode": [{"batch": b, "context": 0, "seconds": 0.0} for b in (1, 2, 3)]}, "above 0"),
        ({"decode": [{"batch": b, "context": 9, "seconds": 0.1} for b in (0, 2, 3)]}, "without tokens or sequences"),
        ({"prefill": [{"tokens": [], "seconds": 0.1}] + [{"tokens": [n], "seconds": 0.1} for n in LENGTHS]}, "without tokens or sequences"),
        ({"kv_bytes_per_token": 0}, "above 0"),
        ({"weight_bytes": "many"}, "Expected `float`"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        profile.costs(read(tmp_path, document(**changes)))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="No such file"):
        profile.read(tmp_path / "none.json")


def test_the_docstring_s_example_is_a_profile() -> None:
    text = (profile.__doc__ or "").split("```")[1].removeprefix("json")
    assert msgspec.json.decode(text, type=profile.Profile).prefill[1].tokens == [128, 128, 256]
