"""Drawing tokens: penalties, truncation, and random numbers that depend on (seed, choice, index) only.

One uniform number per token and the inverse of the cumulative distribution in float64: the draw depends neither on the batch nor
on the device, so a resumed request goes on exactly as it would have.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from common.messages import Logprob, Sampling
from services.engine.plan import Draw

TOP = 1024
"""Truncation looks at this many most likely tokens first, and at all only where that is not enough."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one draw depends on besides the logits."""

    sampling: Sampling
    choice: int
    index: int
    ids: list[int]
    prompt_tokens: int


def uniform(seed: int, choice: int, index: int) -> float:
    """53 random bits in [0, 1), from a keyed hash: counter-based, the same everywhere."""
    packed = struct.pack("<QQQ", seed & 0xFFFFFFFFFFFFFFFF, choice, index)
    return (int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def draw(logits: Tensor, rows: list[Row]) -> list[Draw]:
    """One token for each row of logits `[N, vocabulary]`."""
    adjusted = logits.float()
    shaped = [i for i, row in enumerate(rows) if _shapes(row.sampling)]
    if shaped:
        adjusted = adjusted.clone()
        for i in shaped:
            shape(adjusted[i], rows[i])
    chosen = adjusted.argmax(-1)
    random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if random:
        chosen[random] = _pick(adjusted[random], [rows[i] for i in random])
    ids = chosen.tolist()
    logprobs = _logprobs(logits, rows, ids)
    return [Draw(token, logprobs.get(i)) for i, token in enumerate(ids)]


# ------------------------------------------------------------------------------------------------------------- shaping


def _shapes(s: Sampling) -> bool:
    return bool(s.logit_bias) or s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


def shape(logits: Tensor, row: Row) -> None:
    """Bias and penalties, in place, on one row `[vocabulary]`.

    Repetition (Keskar et al., CTRL, as in transformers): over prompt and output, positive logits are divided, negative multiplied.
    Presence and frequency (OpenAI's API reference): subtracted once, and once per occurrence, over output tokens.
    """
    s = row.sampling
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        counts = Counter(row.ids[row.prompt_tokens :])
        if counts:
            seen = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
            logits[seen] -= s.presence_penalty + s.frequency_penalty * times
    if s.logit_bias:
        biased = torch.tensor(list(s.logit_bias), device=logits.device)
        logits[biased] += torch.tensor(list(s.logit_bias.values()), device=logits.device, dtype=logits.dtype)


# ------------------------------------------------------------------------------------------------------------- drawing


def _pick(logits: Tensor, rows: list[Row]) -> Tensor:
    """Sampled ids `[N]` of logits `[N, vocabulary]`."""
    heat = torch.tensor([row.sampling.temperature for row in rows], dtype=torch.float64, device=logits.device)
    u = torch.tensor([uniform(r.sampling.seed, r.choice, r.index) for r in rows], dtype=torch.float64, device=logits.device)
    exact = logits.double()
    probabilities = torch.softmax((exact - exact.amax(-1, keepdim=True)) / heat[:, None], -1)
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    plain = [i for i, row in enumerate(rows) if not _truncates(row.sampling)]
    if plain:
        chosen[plain] = invert(probabilities[plain], u[plain])
    for i, row in enumerate(rows):
        if _truncates(row.sampling):
            kept, ids = truncated(probabilities[i], row.sampling)
            chosen[i] = ids[invert(kept[None], u[i : i + 1])[0]]
    return chosen


def _truncates(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1 or s.min_p > 0


def truncated(probabilities: Tensor, s: Sampling) -> tuple[Tensor, Tensor]:
    """What top-k, then top-p, then min-p leave of one distribution `[vocabulary]`: probabilities, not normalised, and their ids.

    Top-p keeps the smallest set of most likely tokens whose mass, within what top-k left, reaches p (Holtzman et al., 2020). Min-p keeps
    tokens at least min_p times as likely as the likeliest. The likeliest token always stays. Equally likely tokens (frequent in bf16) count
    in the order of their ids, so that the result does not hang on how a device sorts.
    """
    total = float(probabilities.sum())
    least = 0.0
    if s.top_k or probabilities.shape[0] > TOP:
        found = probabilities.topk(min(s.top_k or TOP, probabilities.shape[0])).values
        if s.top_k or _reaches(found, total, s):
            least = float(found[-1])
    ids = (probabilities >= least).nonzero()[:, 0]
    kept, order = probabilities[ids].sort(descending=True, stable=True)
    ids = ids[order]
    if s.top_k:
        kept, ids = kept[: s.top_k], ids[: s.top_k]
        total = float(kept.sum())
    keep = torch.ones_like(kept, dtype=torch.bool)
    if s.top_p < 1:
        keep &= kept.cumsum(0) - kept < s.top_p * total
    if s.min_p > 0:
        keep &= kept >= s.min_p * kept[0]
    keep[0] = True
    return kept[keep], ids[keep]


def _reaches(likeliest: Tensor, total: float, s: Sampling) -> bool:
    """Whether the likeliest tokens, in falling order, include everything that the truncation keeps."""
    by_mass = s.top_p < 1 and float(likeliest.sum()) >= s.top_p * total
    by_ratio = s.min_p > 0 and float(likeliest[-1]) < s.min_p * float(likeliest[0])
    return by_mass or by_ratio


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index at which the cumulative sum of each row of `weights` `[N, M]` first exceeds `u` `[N]` times its total."""
    cumulative = weights.cumsum(-1)
    found = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(found, last)


# ------------------------------------------------------------------------------------------------------------ logprobs


def _logprobs(logits: Tensor, rows: list[Row], ids: list[int]) -> dict[int, Logprob]:
    """Of the model's own distribution: before bias, penalties, temperature and truncation."""
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs >= 0]
    if not wanted:
        return {}
    table = torch.log_softmax(logits[wanted].float(), -1)
    found = {}
    for line, i in zip(table, wanted, strict=True):
        values, tops = line.topk(rows[i].sampling.logprobs)
        found[i] = Logprob(float(line[ids[i]]), list(zip(tops.tolist(), values.tolist(), strict=True)))
    return found
