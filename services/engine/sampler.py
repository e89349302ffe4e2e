"""Drawing tokens: penalties, truncation, and random numbers that depend on (seed, choice, index) only.

One uniform number per token and the inverse of the cumulative distribution in float64: the draw depends neither on the batch nor
on the device, so a resumed request goes on exactly as it would have.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Picked:
    """What has been drawn, where the logits are: nothing has been waited for."""

    ids: Tensor
    """int64 `[N]`."""
    table: Tensor | None
    """float64 `[described, 1 + 2 * most]`: the drawn token's log-probability, those of the likeliest, and their ids."""
    described: dict[int, int]
    """Rows whose log-probabilities are wanted, and how many of the likeliest."""

    def read(self) -> list[Draw]:
        """Waits for the device."""
        return drawn(self.ids.tolist(), [] if self.table is None else self.table.tolist(), self.described)


def drawn(ids: list[int], table: list[list[float]], described: dict[int, int]) -> list[Draw]:
    """From what `Picked` holds, on the host."""
    if not described:
        return [Draw(token) for token in ids]
    found = {}
    for line, (row, count) in zip(table, described.items(), strict=True):
        most = len(line) // 2
        found[row] = Logprob(line[0], [(int(top), value) for top, value in zip(line[1 + most :], line[1 : 1 + count], strict=False)])
    return [Draw(token, found.get(row)) for row, token in enumerate(ids)]


def draw(logits: Tensor, rows: list[Row]) -> list[Draw]:
    """One token for each row of logits `[N, vocabulary]`."""
    return pick(logits, rows).read()


def looks_back(sampling: Sampling) -> bool:
    """Whether a draw depends on the ids before it."""
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def pick(logits: Tensor, rows: list[Row]) -> Picked:
    """`draw`, still on the device."""
    shaped = [i for i, row in enumerate(rows) if looks_back(row.sampling) or row.sampling.logit_bias]
    random = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    adjusted = logits.float() if shaped or random or logits.device.type == "cpu" else logits  # a GPU finds the largest of any type
    if shaped:
        adjusted = adjusted.clone()
        for i in shaped:
            shape(adjusted[i], rows[i])
    if len(random) == len(rows):
        chosen = _sampled(adjusted, rows)
    else:
        chosen = likeliest(adjusted)
        if random:
            where = _sent(random, torch.int64, logits.device)
            chosen[where] = _sampled(adjusted[where], [rows[i] for i in random])
    described = {i: row.sampling.logprobs for i, row in enumerate(rows) if row.sampling.logprobs >= 0}
    return Picked(chosen, _logprobs(logits, chosen, described) if described else None, described)


def likeliest(logits: Tensor) -> Tensor:
    """Id of the largest of each row `[N, vocabulary]`, the first of equals: int64 `[N]`."""
    if logits.device.type == "cpu":  # numpy takes a tenth of torch's time
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _sent(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list as a tensor. To a GPU it goes from pinned memory: any other copy would wait for all that is under way there."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------------- shaping


def shape(logits: Tensor, row: Row) -> None:
    """Bias and penalties, in place, on one row `[vocabulary]`.

    Repetition (Keskar et al., CTRL, as in transformers): over prompt and output, positive logits are divided, negative multiplied.
    Presence and frequency (OpenAI's API reference): subtracted once, and once per occurrence, over output tokens.
    """
    s = row.sampling
    if s.repetition_penalty != 1:
        seen = _sent(sorted(set(row.ids)), torch.int64, logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        counts = Counter(row.ids[row.prompt_tokens :])
        if counts:
            seen = _sent(list(counts), torch.int64, logits.device)
            times = _sent(list(counts.values()), logits.dtype, logits.device)
            logits[seen] -= s.presence_penalty + s.frequency_penalty * times
    if s.logit_bias:
        logits[_sent(list(s.logit_bias), torch.int64, logits.device)] += _sent(list(s.logit_bias.values()), logits.dtype, logits.device)


# ------------------------------------------------------------------------------------------------------------- drawing


def _sampled(logits: Tensor, rows: list[Row]) -> Tensor:
    """Ids `[N]` of logits `[N, vocabulary]`, none of them greedy."""
    heat = _sent([row.sampling.temperature for row in rows], torch.float64, logits.device)
    u = _sent([uniform(r.sampling.seed, r.choice, r.index) for r in rows], torch.float64, logits.device)
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
            where = _sent(cut, torch.int64, logits.device)
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
    ids = (~(weights < _least(weights, total, s))).nonzero()[:, 0]  # all, if they are no numbers
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
        return _sent(values, dtype, weights.device)[:, None]

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
    # A product rounded up to the total is exceeded nowhere: then it is the last token that adds to the sum. Logits that are no numbers
    # have no sum, and what is drawn from them is at least a token.
    return torch.minimum(found, torch.searchsorted(cumulative, total)).clamp_(max=weights.shape[-1] - 1)[:, 0]


# ------------------------------------------------------------------------------------------------------------ logprobs


def _logprobs(logits: Tensor, chosen: Tensor, described: dict[int, int]) -> Tensor:
    """`Picked.table`, of the model's own distribution: before bias, penalties, temperature and truncation."""
    where = _sent(list(described), torch.int64, logits.device)
    table = torch.log_softmax(logits[where].float(), -1)
    values, tops = table.topk(max(described.values()), dim=-1)
    return torch.cat((table.gather(1, chosen[where, None]).double(), values.double(), tops.double()), 1)  # ids are exact in float64
