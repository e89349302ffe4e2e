"""A profile: what was measured on one machine with one model, as a JSON file, and the latency model fitted to it.

```json
{
  "machine": "1 x H100 80GB", "model": "SmolLM2-135M-Instruct", "made": "2026-11-24",
  "memory_bytes": 6.8e10, "weight_bytes": 2.7e8, "kv_bytes_per_token": 23040,
  "transfer_bytes_per_s": 4.0e10, "transfer_s": 0.002,
  "prefill": [{"tokens": [512], "seconds": 0.0061}, {"tokens": [128, 128, 256], "seconds": 0.0063}],
  "decode":  [{"batch": 16, "context": 512, "seconds": 0.0049}]
}
```
Each point is one launch of the engine in seconds, from launch to collected: the median of several. `prefill`: whole prompts, `tokens`
their lengths. `decode`: `batch` sequences of `context` tokens of KV *each*. `tp` (1 if left out) is the tensor-parallel degree of a point.
Points should spread over what will be served: three different points of each phase are the least; with eight decode points or more a
knee between small and large batches can be found.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from services.planner.costs import Costs
from services.planner.fit import FitError, fit_decode, fit_one
from services.planner.latency import LaunchModel


class ProfileError(Exception):
    """A profile that cannot be used: one line that says what is wrong with it."""


class PrefillPoint(Struct, frozen=True):
    """A launch of whole prompts."""

    tokens: list[int]
    seconds: float
    tp: int = 1


class DecodePoint(Struct, frozen=True):
    """A decode step: `batch` sequences, each with `context` tokens of KV."""

    batch: int
    context: int
    seconds: float
    tp: int = 1


class Profile(Struct, frozen=True, forbid_unknown_fields=False):
    """The file. Unknown fields are ignored, so that a benchmark may write more than the planner reads."""

    prefill: list[PrefillPoint]
    decode: list[DecodePoint]
    kv_bytes_per_token: float
    weight_bytes: float
    memory_bytes: float
    """Of one device, for weights and KV."""
    transfer_bytes_per_s: float
    """Pages from a prefill to a decode on the same node."""
    network_bytes_per_s: float | None = None
    """The same between nodes; as fast as on a node if left out."""
    transfer_s: float = 0.0
    """From the last page sent to the sequence running in the decode, bytes aside."""
    overhead_s: float = 0.0
    """Of a launch in a running worker, beyond what the points say."""
    page_tokens: int = 16
    layers: int = 0
    machine: str = ""
    model: str = ""
    made: str = ""


def read(path: Path) -> Profile:
    """Raises ProfileError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ProfileError(f"{path.name}: {error}") from error


def costs(profile: Profile) -> Costs:
    """The latency model of each degree that was measured in both phases. Raises ProfileError."""
    sizes = (profile.kv_bytes_per_token, profile.weight_bytes, profile.memory_bytes, profile.transfer_bytes_per_s, profile.page_tokens)
    if min(sizes) <= 0 or min(profile.transfer_s, profile.overhead_s, profile.layers) < 0:
        raise ProfileError("sizes and rates must be above 0, times not below")
    degrees = sorted({point.tp for point in profile.prefill} & {point.tp for point in profile.decode})
    if not degrees or degrees[0] < 1:
        raise ProfileError("no tensor-parallel degree has points of both prefill and decode")
    launches, words = {}, []
    for tp in degrees:
        launches[tp], one = _fitted(profile, tp)
        words.append(one)
    return Costs(
        name=" on ".join(filter(None, (profile.model, profile.machine))) or "profile",
        launches=launches,
        memory_bytes=profile.memory_bytes,
        weight_bytes=profile.weight_bytes,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        transfer_bytes_per_s=profile.transfer_bytes_per_s,
        network_bytes_per_s=profile.network_bytes_per_s or profile.transfer_bytes_per_s,
        transfer_s=profile.transfer_s,
        page_tokens=profile.page_tokens,
        layers=profile.layers,
        source="; ".join(words),
    )


def _fitted(profile: Profile, tp: int) -> tuple[LaunchModel, str]:
    prompts = [point for point in profile.prefill if point.tp == tp]
    steps = [point for point in profile.decode if point.tp == tp]
    bad = [p for p in prompts if not p.tokens or min(p.tokens) < 1] + [d for d in steps if d.batch < 1 or d.context < 0]  # type: ignore[operator]
    if bad:
        raise ProfileError(f"a point without tokens or sequences: {bad[0]}")
    if len({tuple(p.tokens) for p in prompts}) < 3 or len({(d.batch, d.context) for d in steps}) < 3:
        raise ProfileError(f"tp {tp}: three different points of each phase are the least")
    try:
        prefill = fit_one([(sum(p.tokens), sum(n * n for n in p.tokens), p.seconds) for p in prompts])
        decode = fit_decode([(d.batch * d.context, d.batch, d.seconds) for d in steps])
    except FitError as error:
        raise ProfileError(f"tp {tp}: {error}") from error
    words = (
        f"tp {tp}: prefill fits {len(prompts)} points to {prefill.mean:.1%} (worst {prefill.worst:.1%}), "
        f"decode {len(steps)} to {decode.mean:.1%} (worst {decode.worst:.1%})"
    )
    return LaunchModel(prefill.small, decode.small, decode.large, decode.knee, overhead_s=profile.overhead_s), words
