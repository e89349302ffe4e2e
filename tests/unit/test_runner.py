"""The runner on the real small model in float32: greedy ids exactly those of transformers, whatever the chunks and the company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.messages import Key, Sampling
from common.settings import Kernels
from services.engine.calibrate import measure
from services.engine.forward import choose
from services.engine.loading import load
from services.engine.model import LoadedModel
from services.engine.native import build
from services.engine.plan import Chunk, Plan
from services.engine.pool import Pool
from services.engine.runner import Runner
from services.engine.sequence import Sequence
from tests.references import Reference, references

PAGES = 400
TOKENS = 64
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return load(smollm2, "cpu", "float32", 16)


@pytest.fixture(scope="module")
def pool(loaded: LoadedModel) -> Pool:
    return Pool(loaded.layout, PAGES, "cpu")


NATIVE = pytest.param("native", marks=pytest.mark.skipif(build.compiler() is None, reason="no compiler"))


@pytest.fixture(params=["torch", NATIVE])
def runner(loaded: LoadedModel, pool: Pool, request: pytest.FixtureRequest) -> Runner:
    pool.tensor.fill_(float("nan"))
    return Runner(choose(loaded, pool, request.param), 16)


def sequence(name: int, ids: list[int], first_page: int, tokens: int, sampling: Sampling = GREEDY) -> Sequence:
    made = Sequence(Key(str(name), 0, 1, "e"), list(ids), len(ids), sampling, tokens)
    made.pages = list(range(first_page, first_page - (-(len(ids) + tokens) // 16)))[::-1]
    return made


def spread(prompts: list[list[int]], tokens: int, sampling: Sampling = GREEDY) -> list[Sequence]:
    made, page = [], 0
    for name, ids in enumerate(prompts):
        made.append(sequence(name, ids, page, tokens, sampling))
        page += len(made[-1].pages)
    assert page <= PAGES
    return made


def drive(runner: Runner, sequences: list[Sequence], chunk: int, tokens: int, *, ahead: bool = False) -> list[list[int]]:
    """Every launch: the next chunk of each prompt, or the next token. With `ahead` a launch goes off before the one before is collected,
    its ids still pending. Returns the output ids."""
    number = 0
    before: tuple[Plan, object] | None = None

    def settle(plan: Plan, ticket: object) -> None:
        for part, drawn in zip(plan.chunks, runner.collect(ticket).draws, strict=True):  # type: ignore[arg-type]
            assert (drawn is not None) == part.draws
            if drawn is not None:
                assert part.index == part.sequence.index
                part.sequence.ids.append(drawn.id)

    while True:
        chunks = []
        for s in sequences:
            behind = s.planned - s.prompt_tokens  # output tokens whose KV is planned
            if behind + 1 >= tokens:
                continue
            left = s.prompt_tokens - s.planned
            count = min(chunk, left) if left > 0 else 1
            index = max(behind + 1, 0)
            chunks.append(Chunk(s, s.planned, count, draws=left <= count, index=index, pending=s.planned >= len(s.ids)))
            s.planned += count
        if chunks:
            plan = Plan(number, tuple(chunks))
            ticket = runner.launch(plan)
            number += 1
        if before is not None:
            settle(*before)
            before = None
        if not chunks:
            return [s.ids[s.prompt_tokens :] for s in sequences]
        if ahead:
            before = (plan, ticket)
        else:
            settle(plan, ticket)


def some(count: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """Prompts with their greedy answers by transformers' generate."""
    found = [(one["prompt"], one["output"]) for one in references() if len(one["prompt"]) <= longest]
    assert len(found) >= count
    step = len(found) // count
    return found[::step][:count]


def test_references_are_of_this_model(smollm2: Path) -> None:
    """The answers kept in the tests' data are what transformers generates here."""
    ids, output = some(3, 120)[0]
    assert Reference(smollm2).generate(ids, 24) == output[:24]


@pytest.mark.parametrize(("chunk", "ahead"), [(10_000, False), (37, False), (64, True)])
def test_greedy_ids_are_those_of_transformers(runner: Runner, chunk: int, ahead: bool) -> None:
    """Prompts of different lengths side by side: their last chunks and others' decode steps share launches."""
    chosen = some(4, 400)
    found = drive(runner, spread([ids for ids, _ in chosen], TOKENS), chunk, TOKENS, ahead=ahead)
    assert found == [output[:TOKENS] for _, output in chosen]


def test_alone_and_one_token_at_a_time(runner: Runner) -> None:
    """A prompt whose every chunk is one token goes through decode altogether."""
    ids, output = min(some(5, 200), key=lambda one: len(one[0]))
    assert drive(runner, spread([ids], 8), 1, 8) == [output[:8]]


def test_a_page_of_a_former_owner_does_no_harm(runner: Runner, pool: Pool) -> None:
    """Pages are used again as they are: whatever lies in them, even what is no number, never reaches a result."""
    ids, output = some(5, 200)[1]
    assert drive(runner, spread([ids], 20), 50, 20) == [output[:20]]
    pool.tensor[torch.isfinite(pool.tensor)] = float("inf")
    assert drive(runner, spread([ids], 20), 50, 20) == [output[:20]]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=5, temperature=0.8, top_p=0.95, presence_penalty=0.5, repetition_penalty=1.1),
        Sampling(temperature=0, frequency_penalty=2.0, logit_bias={500: 40.0}),
    ],
    ids=["drawn", "penalised"],
)
def test_draws_do_not_depend_on_chunks_company_or_launching_ahead(runner: Runner, sampling: Sampling) -> None:
    """Penalties must count the token that is still pending: the second one draws the same token until its count outweighs its bias."""
    prompts = [ids for ids, _ in some(3, 200)]
    alone = [drive(runner, spread([ids], 24, sampling), 10_000, 24)[0] for ids in prompts]
    assert drive(runner, spread(prompts, 24, sampling), 40, 24, ahead=True) == alone


def test_an_earlier_launch_still_answers_a_pending_chunk(runner: Runner) -> None:
    """A launch of somebody else in between does not lose the id."""
    (ids, output), (others, _) = some(3, 120)[:2]
    mine, yours = spread([ids, others], 4)
    first = runner.launch(Plan(0, (Chunk(mine, 0, len(ids), draws=True, index=0),)))
    runner.launch(Plan(1, (Chunk(yours, 0, len(others), draws=True, index=0),)))
    third = runner.launch(Plan(2, (Chunk(mine, len(ids), 1, draws=True, index=1, pending=True),)))
    drawn = [runner.collect(first).draws[0], runner.collect(third).draws[0]]
    assert [one.id for one in drawn if one] == output[:2]


def test_launches_without_draws_and_without_anything(runner: Runner) -> None:
    ids = some(3, 200)[0][0]
    (only,) = spread([ids], 1)
    assert runner.collect(runner.launch(Plan(0, (Chunk(only, 0, 5, draws=False, index=0),)))).draws == (None,)
    assert runner.collect(runner.launch(Plan(1, ()))).draws == ()


@pytest.mark.parametrize("kernels", ["torch", NATIVE])
def test_bf16_draws_what_float32_holds_for_nearly_best(kernels: Kernels, smollm2: Path) -> None:
    """Every greedy token's logit in float32, given the same tokens before it, lies within EPSILON of the largest."""
    epsilon = 0.5
    loaded = load(smollm2, "cpu", "auto", 16)
    assert loaded.dtype is torch.bfloat16
    runner = Runner(choose(loaded, Pool(loaded.layout, PAGES, "cpu"), kernels), 16)
    prompts = [ids for ids, _ in some(3, 200)]
    plain = Reference(smollm2)
    for ids, output in zip(prompts, drive(runner, spread(prompts, 32), 64, 32), strict=True):
        logits = plain.logits(ids + output)[len(ids) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(len(output)), torch.tensor(output)]
        assert float(behind.max()) <= epsilon, behind.tolist()


def test_it_knows_paris(runner: Runner, smollm2: Path) -> None:
    reference = Reference(smollm2)
    ids = reference.render("What is the capital of France?")
    (output,) = drive(runner, spread([ids], 12), 100, 12)
    assert "Paris" in reference.tokenizer.decode(output)


def test_budgets_are_measured_within_limits_and_leave_the_pool_usable(runner: Runner) -> None:
    budgets = measure(runner, 16, PAGES * 16, 0.1)
    assert 16 <= budgets.budget_tokens <= PAGES * 16
    assert budgets.chunk_tokens % 16 == 0 and 16 <= budgets.chunk_tokens <= 0.1 * budgets.rate + 16
    assert budgets.longest_step_s >= 15 and budgets.rate > 0
    ids, output = some(5, 200)[2]
    assert drive(runner, spread([ids], 6), 50, 6) == [output[:6]]
