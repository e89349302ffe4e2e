"""Drawing tokens: penalties, truncation, and random numbers that depend on (seed, choice, index) only.

One uniform number per token and the inverse of the cumulative distribution in float64: the draw depends neither on the batch nor
on the device, so a resumed request goes on exactly as it would have.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter

import torch
from msgspec import Struct
from torch import Tensor

from common.messages import Logprob, Sampling
from services.engine.plan import Draw

ROWS = {"cpu": 1, "cuda": 64}
"""Rows whose distributions are computed at a time: few, so that they stay in a core's cache; many, where a launch costs more."""


class Row(Struct, frozen=True, gc=False):
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
    shaped = [
        i
        for i, row in enumerate(rows)
        if (s := row.sampling).repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0 or s.logit_bias
    ]
    if shaped:
        adjusted = adjusted.clone()
        for i in shaped:
            shape(adjusted[i], rows[i])
    random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if len(random) == len(rows):
        chosen = _pick(adjusted, rows)
    else:
        chosen = likeliest(adjusted)
        if random:
            chosen[random] = _pick(adjusted[random], [rows[i] for i in random])
    ids = chosen.tolist()
    logprobs = _logprobs(logits, rows, ids)
    if not logprobs:
        return [Draw(token) for token in ids]
    return [Draw(token, logprobs.get(i)) for i, token in enumerate(ids)]


def likeliest(logits: Tensor) -> Tensor:
    """Id of the largest of each row `[N, vocabulary]`, the first of equals: int64 `[N]`."""
    if logits.device.type == "cpu":  # numpy takes a tenth of torch's time
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


# ------------------------------------------------------------------------------------------------------------- shaping


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
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    at_a_time = ROWS[logits.device.type]
    for first in range(0, len(rows), at_a_time):
        part = slice(first, first + at_a_time)
        exact = logits[part].double()
        weights = exact.sub_(exact.amax(-1, keepdim=True)).div_(heat[part, None]).exp_()
        chosen[part] = invert(weights, u[part])
        cut = [i for i, row in enumerate(rows[part]) if _truncates(row.sampling)]
        if logits.device.type == "cpu":
            for i in cut:
                kept, ids = truncated(weights[i], rows[first + i].sampling)
                chosen[first + i] = ids[invert(kept[None], u[first + i, None])[0]]
        elif cut:
            where = torch.tensor(cut, device=logits.device)
            kept, ids = truncated_rows(weights[where], [rows[first + i].sampling for i in cut])
            chosen[first + where] = ids.gather(1, invert(kept, u[first + where])[:, None])[:, 0]
    return chosen


def _truncates(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1 or s.min_p > 0


def truncated(weights: Tensor, s: Sampling) -> tuple[Tensor, Tensor]:
    """What top-k, then top-p, then min-p leave of one distribution `[vocabulary]`, normalised or not: the weights and their ids.

    Top-p keeps the smallest set of most likely tokens whose mass, within what top-k left, reaches p (Holtzman et al., 2020). Min-p keeps
    tokens at least min_p times as likely as the likeliest. The likeliest token always stays. Equally likely tokens (frequent in bf16) count
    in the order of their ids, so that the result does not hang on how a device sorts.
    """
    total = weights.sum()
    ids = (weights >= _least(weights, total, s)).nonzero()[:, 0]
    kept, order = weights[ids].sort(descending=True, stable=True)
    ids = ids[order]
    if s.top_k:
        kept, ids = kept[: s.top_k], ids[: s.top_k]
        total = kept.sum()
    keep = torch.ones_like(kept, dtype=torch.bool)
    if s.top_p < 1:
        keep &= kept.cumsum(0) - kept < s.top_p * total
    if s.min_p > 0:
        keep &= kept >= s.min_p * kept[0]
    keep[0] = True
    return kept[keep], ids[keep]


def truncated_rows(weights: Tensor, samplings: list[Sampling]) -> tuple[Tensor, Tensor]:
    """`truncated` of each row `[N, vocabulary]`, in sorted order with zeros for what is dropped: nothing is read back from the device, and
    all rows are sorted at once. What is kept begins every row, so that a sum over it is the same."""

    def column(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=weights.device)[:, None]

    everything = weights.shape[1]
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(everything, device=weights.device)
    kept = ordered * (place < column([s.top_k or everything for s in samplings]))
    by_mass = column([s.top_p for s in samplings])
    before = kept.cumsum(-1) - kept
    keep = (before < by_mass * kept.sum(-1, keepdim=True)) | (by_mass >= 1)
    keep &= kept >= column([s.min_p for s in samplings]) * kept[:, :1]
    keep |= place == 0
    return kept * keep, ids


def _least(weights: Tensor, total: Tensor, s: Sampling) -> Tensor:
    """A weight below which truncation keeps nothing, so that a few tokens are to be sorted instead of all: the k-th largest, or half of
    what follows for the others (half, for the sake of rounding). Tokens lighter than an equal share of the mass beyond p cannot fill it,
    so what is before each of them reaches p."""
    if s.top_k:
        return weights.topk(min(s.top_k, weights.shape[0])).values[-1]
    by_mass = (1 - s.top_p) * total / weights.shape[0]
    return torch.maximum(by_mass, s.min_p * weights.amax()) / 2


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index at which the cumulative sum of each row of `weights` `[N, M]` first exceeds `u` `[N]` times its total."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    found = torch.searchsorted(cumulative, u[:, None] * total, right=True)
    # A product rounded up to the total is exceeded nowhere: then it is the last token that adds to the sum.
    return torch.minimum(found, torch.searchsorted(cumulative, total))[:, 0]


# ------------------------------------------------------------------------------------------------------------ logprobs


def _logprobs(logits: Tensor, rows: list[Row], ids: list[int]) -> dict[int, Logprob]:
    """Of the model's own distribution: before bias, penalties, temperature and truncation."""
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs >= 0]
    if not wanted:
        return {}
    table = torch.log_softmax(logits[wanted].float(), -1)
    chosen = table.gather(1, torch.tensor([ids[i] for i in wanted], device=table.device)[:, None])
    values, tops = table.topk(max(rows[i].sampling.logprobs for i in wanted), dim=-1)
    lines = torch.cat((chosen.double(), values.double(), tops.double()), 1).tolist()  # one copy from the device; ids are exact
    found = {}
    for line, i in zip(lines, wanted, strict=True):
        count, most = rows[i].sampling.logprobs, values.shape[1]
        found[i] = Logprob(line[0], [(int(top), value) for top, value in zip(line[1 + most :], line[1 : 1 + count], strict=False)])
    return found
