"""Drawing against float64 references: greedy, truncations, penalties, log-probabilities, and numbers that depend on nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.messages import Sampling
from services.engine.sampler import Row, draw, truncated, truncated_rows, uniform


def row(index: int = 0, ids: list[int] | None = None, prompt_tokens: int = 1, choice: int = 0, **sampling: Any) -> Row:
    return Row(Sampling(**sampling), choice, index, ids or [0], prompt_tokens)


def reference(logits: Tensor, s: Sampling) -> list[float]:
    """Probability of each id after temperature, top-k, top-p and min-p, in plain Python; ties go to the smaller id."""
    scaled = [float(x) / s.temperature for x in logits.double()]
    highest = max(scaled)
    weights = [math.exp(x - highest) for x in scaled]
    total = sum(weights)
    likeliest = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    kept = likeliest[: s.top_k] if s.top_k else likeliest
    mass = sum(weights[i] for i in kept) if s.top_k else total
    stays, before = set(), 0.0
    for i in kept:
        if (before < s.top_p * mass and weights[i] >= s.min_p * weights[likeliest[0]]) or i == kept[0]:
            stays.add(i)
        before += weights[i]
    left = sum(weights[i] for i in stays)
    return [weights[i] / left if i in stays else 0.0 for i in range(len(weights))]


SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_follow_the_distribution(sampling: dict[str, float], dtype: torch.dtype) -> None:
    """Chi-square over 6,000 draws, at a level that a right sampler misses once in 100,000 runs; the seed is fixed."""
    logits = (torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5).to(dtype)
    expected = reference(logits, Sampling(**sampling))
    count = 6_000
    seen = [0] * 40
    for first in range(0, count, 2000):
        rows = [row(index, seed=11, **sampling) for index in range(first, first + 2000)]
        for one in draw(logits.expand(2000, -1), rows):
            seen[one.id] += 1
    assert_follows(seen, expected)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.4, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 1.0, "min_p": 0.02},
        {"temperature": 0.9, "top_k": 200, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_draws_of_many_seeds_follow_the_distribution(sampling: dict[str, float]) -> None:
    """The same over a larger vocabulary, with a new seed for each of 3,000 requests; tokens likelier than 1 in 500 each make a cell."""
    vocabulary, count = 8_192, 3_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(6)) * 2
    logits[:200] += 6  # some tokens likely, the others a long tail
    expected = reference(logits, Sampling(**sampling))
    large = [i for i in range(vocabulary) if expected[i] > 1 / 500]
    cell = dict(zip(large, range(len(large)), strict=True))
    seen = [0] * (len(large) + 1)
    for first in range(0, count, 100):
        for one in draw(logits.expand(100, -1), [row(seed=seed, **sampling) for seed in range(first, first + 100)]):
            assert expected[one.id] > 0
            seen[cell.get(one.id, len(large))] += 1
    assert_follows(seen, [expected[i] for i in large] + [1 - sum(expected[i] for i in large)])


def assert_follows(seen: list[int], expected: list[float]) -> None:
    """Chi-square: how often each cell was seen against its probability, at a level of 1e-5; rare cells count as one."""
    count = sum(seen)
    assert all(p > 0 for p, n in zip(expected, seen, strict=True) if n)
    common = [(n, p * count) for n, p in zip(seen, expected, strict=True) if p * count >= 5]
    rare = (count - sum(n for n, _ in common), count - sum(due for _, due in common))
    cells = [*common, rare] if rare[1] >= 5 else common
    square = sum((n - due) ** 2 / due for n, due in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile; 4.27 standard deviations are 1e-5
    limit = freedom * (1 - 2 / (9 * freedom) + 4.27 * math.sqrt(2 / (9 * freedom))) ** 3
    assert square < limit, (square, limit)


@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([1, 2, 17, 1024, 4000]),
    top_k=st.sampled_from([0, 1, 3, 50, 1024, 5000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.95, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.1, 1.0]),
    sharp=st.sampled_from([0.01, 1.0, 8.0]),
    coarse=st.booleans(),
)
def test_truncation_keeps_what_the_reference_keeps(
    seed: int, vocabulary: int, top_k: int, top_p: float, min_p: float, sharp: float, coarse: bool
) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * sharp
    if coarse:
        logits = logits.round()  # many ties
    s = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    kept, ids = truncated(torch.softmax(logits.double(), 0), s)
    expected = reference(logits, s)
    wanted = {i for i, p in enumerate(expected) if p > 0}
    assert len(ids) == len(set(ids.tolist()))
    if set(ids.tolist()) != wanted:  # a sum rounded differently may move the last token of top-p
        assert 0 < top_p < 1 and abs(len(ids) - len(wanted)) == 1
    else:
        total = float(kept.sum())
        assert all(abs(float(p) / total - expected[i]) < 1e-9 for p, i in zip(kept, ids.tolist(), strict=True))
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncating_all_rows_at_once_keeps_the_same(dtype: torch.dtype) -> None:
    """As on a GPU, with nothing read back; many weights are equal in bfloat16."""
    samplings = [
        Sampling(**changed)
        for changed in (
            {"top_k": 3},
            {"top_p": 0.7},
            {"min_p": 0.2},
            {"top_k": 40, "top_p": 0.5},
            {"top_p": 0.9, "min_p": 0.05},
            {"top_p": 1e-9},
        )
    ]
    weights = torch.softmax((2 * torch.randn(len(samplings), 300)).to(dtype).double(), -1)
    many, places = truncated_rows(weights, samplings)
    for row, ids, alone, sampling in zip(many, places, weights, samplings, strict=True):
        kept, wanted = truncated(alone, sampling)
        assert int((row > 0).sum()) == len(kept)
        assert torch.equal(row[: len(kept)], kept) and torch.equal(ids[: len(kept)], wanted)


def test_the_draw_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(12, 3000, generator=torch.Generator().manual_seed(5)) * 3
    rows = [
        row(i, seed=i * 7, choice=i % 3, temperature=[0.0, 0.7, 1.3][i % 3], top_p=[1.0, 0.9][i % 2], top_k=[0, 0, 40][i % 3])
        for i in range(12)
    ]
    together = [one.id for one in draw(logits, rows)]
    assert together == [draw(logits[i : i + 1], rows[i : i + 1])[0].id for i in range(12)]
    backwards = draw(logits.flip(0), rows[::-1])
    assert together == [one.id for one in backwards][::-1]


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}, {"logit_bias": {3: 1.0}, "top_p": 0.99}], ids=str)
def test_a_row_draws_the_same_in_any_company(sampling: dict[str, Any]) -> None:
    """Alone, and in batches whose other rows are greedy, random, truncated or penalised, at any place."""
    logits = torch.randn(9, 3001, generator=torch.Generator().manual_seed(12)) * 2
    mine = [row(index, seed=5, temperature=1.1, **sampling) for index in range(60)]
    alone = [draw(logits[:1], [one])[0].id for one in mine]
    assert len(set(alone)) > 20
    others: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_k": 7}, {"top_p": 0.5, "seed": 5}, {"repetition_penalty": 1.5}]
    for size in (2, 5, 9):
        for index, one in enumerate(mine):
            place = index % size
            rows = [row(index, ids=[1, 2, 3], **others[(index + i) % len(others)]) for i in range(size)]
            rows[place] = one
            batch = logits[torch.arange(size).roll(place)]
            assert draw(batch, rows)[place].id == alone[index]


def test_random_numbers_of_one_request_are_independent() -> None:
    """Chi-square over pairs: of neighbouring indices, of neighbouring choices, of neighbouring seeds."""
    for other in ((0, 0, 1), (0, 1, 0), (1, 0, 0)):
        seen = [0] * 64
        for index in range(6400):
            seed, choice = index % 80, index // 80 % 4
            first, second = uniform(seed, choice, index), uniform(seed + other[0], choice + other[1], index + other[2])
            seen[int(first * 8) * 8 + int(second * 8)] += 1
        assert_follows(seen, [1 / 64] * 64)


def test_random_numbers_are_fixed_for_ever() -> None:
    """A resumed request must meet the numbers of the version before: these values may never change."""
    assert [uniform(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63 + 5, 2, 100))] == [
        0.156742553465558,
        0.33776134126730917,
        0.4633667468151501,
        0.6269999134633438,
        0.5708202173269771,
    ]


def test_random_numbers_are_even() -> None:
    numbers = [uniform(7, choice, index) for choice in range(4) for index in range(2500)]
    assert min(numbers) >= 0 and max(numbers) < 1 and len(set(numbers)) == len(numbers)
    cells = [0] * 20
    for number in numbers:
        cells[int(number * 20)] += 1
    assert sum((c - 500) ** 2 / 500 for c in cells) < 60


def test_greedy_is_the_first_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert [one.id for one in draw(logits, [row(temperature=0.0), row(temperature=0.0)])] == [1, 0]


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-300}], ids=str)
def test_the_likeliest_alone(sampling: dict[str, float]) -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(1))
    found = draw(logits, [row(i, **{"temperature": 2.0, **sampling}) for i in range(64)])
    assert [one.id for one in found] == logits.argmax(-1).tolist()


def test_penalties_follow_their_definitions() -> None:
    """Repetition over prompt and output (transformers), presence and frequency over output only (OpenAI), before the draw."""
    ids, prompt = [1, 2, 2, 5, 5, 5, 6], 3
    logits = torch.tensor([0.0, 2.0, -1.0, 0.5, 4.0, 6.0, 3.0, 1.0])
    expected = logits.double().clone()
    for i in set(ids):
        expected[i] = expected[i] / 1.5 if expected[i] > 0 else expected[i] * 1.5
    for i, times in {5: 3, 6: 1}.items():
        expected[i] -= 0.7 + 0.4 * times
    expected[7] += 2.5
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": {7: 2.5}}
    wanted = reference(expected, Sampling(temperature=1.0))
    seen = [0] * 8
    rows = [row(i, ids, prompt, seed=4, temperature=1.0, **penalties) for i in range(8000)]
    for one in draw(logits.expand(8000, -1), rows):
        seen[one.id] += 1
    assert sum((seen[i] - 8000 * wanted[i]) ** 2 / (8000 * wanted[i]) for i in range(8)) < 35
    greedy = draw(logits[None], [row(0, ids, prompt, temperature=0.0, **penalties)])[0]
    assert greedy.id == int(expected.argmax())


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    from services.engine.sampler import shape

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2))
    ids = [3, 9, 9, 41]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits.clone())
    shape(logits[0], row(ids=ids, repetition_penalty=1.3))
    assert torch.equal(logits, expected)


def test_shaping_one_row_leaves_its_neighbours_and_the_models_logits_alone() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 4] = 1
    found = draw(logits, [row(temperature=0.0, logit_bias={4: -100.0, 7: 1.0}), row(temperature=0.0)])
    assert [one.id for one in found] == [7, 4]
    assert float(logits[0, 4]) == 1 and float(logits[0, 7]) == 0


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_bias_of_a_hundred_forces_and_forbids(bias: float) -> None:
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(8))
    found = {one.id for one in draw(logits, [row(i, temperature=1.0, logit_bias={3: bias}) for i in range(200)])}
    assert found == {3} if bias > 0 else 3 not in found


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(9)).bfloat16()
    changed = {"temperature": 0.3, "top_k": 2, "logit_bias": {5: 50.0}}
    rows = [row(logprobs=4, **changed), row(logprobs=-1, temperature=0.0), row(logprobs=0, temperature=0.0)]
    found = draw(logits, rows)
    exact = torch.log_softmax(logits.double(), -1)
    first, second, third = found
    assert first.id == 5 and second.logprob is None and third.logprob is not None and third.logprob.top == []
    assert first.logprob is not None and first.logprob.own == pytest.approx(float(exact[0, 5]), abs=1e-5)
    assert third.logprob.own == pytest.approx(float(exact[2].max()), abs=1e-5)
    values = exact[0].sort(descending=True).values[:4].tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(values, abs=1e-5)
    assert all(float(exact[0, token]) == pytest.approx(value, abs=1e-5) for token, value in first.logprob.top)


def test_a_distribution_with_one_possible_token() -> None:
    logits = torch.full((5, 9), float("-inf"))
    logits[:, 6] = 0
    assert {one.id for one in draw(logits, [row(i, temperature=1.0, top_p=t) for i, t in enumerate((1.0, 0.5, 0.1, 0.99, 1.0))])} == {6}


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_still_draw_a_token_and_disturb_nobody(sampling: dict[str, Any], value: float) -> None:
    """The id behind the last one was drawn, and read beyond the embedding; or the whole launch failed."""
    logits = torch.randn(2, 50)
    healthy = draw(logits[1:], [row(index=1, **sampling)])[0].id
    logits[0, 7] = value
    broken, other = draw(logits, [row(**sampling), row(index=1, **sampling)])
    assert 0 <= broken.id < 50 and other.id == healthy
