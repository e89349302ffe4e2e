"""What a worker computes with: model, pool, runner, scheduler, measured budgets. Built once at start, off the event loop."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from common import model_files
from common.errors import StartError
from common.logs import get_logger
from common.messages import Identity, Layout, Role, Shard
from common.settings import WorkerSettings, cores
from services.engine import tensors
from services.engine.calibrate import measure
from services.engine.cuda.runner import runner
from services.engine.forward import Forward, place, place_native
from services.engine.grid import Grid
from services.engine.mesh import Mesh
from services.engine.model import LoadedModel
from services.engine.native.build import Unavailable
from services.engine.pages import PagePool
from services.engine.pipeline import PipelinedRunner
from services.engine.policies import Limits, PolicyName
from services.engine.pool import RESERVE_BYTES, Pool, fit_pages, free_bytes
from services.engine.runner import Runner
from services.engine.scheduler import Scheduler
from services.engine.stage import Leader
from services.worker.memory import leave, notes, turn, untouched_bytes
from services.worker.rank import part, stage_of
from services.worker.ranks import Ranks, share_cores

log = get_logger(__name__)


@dataclass(frozen=True)
class Room:
    """A worker's means, and its other ranks. Scheduler and runner belong to the engine's thread once it has started."""

    layout: Layout
    """Of the whole model's pages."""
    shards: tuple[Shard, ...]
    """What each rank holds."""
    ranks: Ranks
    pool: Pool
    """Rank 0's; page ids are the same on all."""
    runner: Runner | PipelinedRunner
    scheduler: Scheduler
    limits: Limits
    budget_tokens: int
    longest_step_s: float
    identity: Identity
    """What this worker would make of the fleet if it were the first."""
    memory: Memory
    prefill_rate: float
    """Prompt tokens/s, measured at the start."""


@dataclass(frozen=True)
class Memory:
    """What the pool was sized by, in bytes; `note` keeps it known to this host's other workers."""

    free_bytes: int
    """With the weights in place and without the pool."""
    promised_bytes: int
    """Of those, what the pools of other workers of this host will still take."""
    reserve_bytes: int
    """Never given to a pool."""
    pool_bytes: int
    note: IO[str] | None
    """None where there is nothing to know: the pool takes nothing later."""


def pin(settings: WorkerSettings) -> list[list[int]]:
    """Keep this process, and torch's threads, on its own cores; returns those of each rank."""
    wanted = cores(settings.cores) if settings.cores else sorted(os.sched_getaffinity(0))
    shares = share_cores(wanted, settings.tp * settings.pp)
    try:
        os.sched_setaffinity(0, wanted)
        os.sched_setaffinity(0, shares[0])
    except OSError as error:
        raise StartError(f"cores is {settings.cores!r}: {error.strerror}") from error
    torch.set_num_threads(len(shares[0]))
    return shares


def build(settings: WorkerSettings, shares: list[list[int]], role: Role) -> Room:
    """Start the other ranks, load, allocate, measure. `shares`: cores of each rank. Raises StartError saying what does not fit."""
    where = model_files.folder(settings.model)
    grid = Grid(settings.tp, settings.pp)
    if grid.ranks > 1:
        from services.engine.loading import refuse_grid

        refuse_grid(where, grid)
        if settings.kernels == "native":
            raise StartError(f"kernels is native, but the worker has {grid.ranks} ranks")
        log.info("kernels: torch", because=f"the worker has {grid.ranks} ranks")
    ranks = Ranks(settings, grid, where, shares, role)
    try:
        return _build(settings, where, ranks, role)
    except BaseException:
        ranks.abort()
        raise


def _build(settings: WorkerSettings, where: Path, ranks: Ranks, role: Role) -> Room:
    facts, runner_over = _weights(where, settings, ranks)
    layout, grid = facts.layout, ranks.grid
    most_tokens = min(settings.max_request_tokens or facts.context_tokens, facts.context_tokens)
    needed = layout.pages(most_tokens)
    pool, memory = allocate(facts, settings, needed, ranks)
    pages = pool.pages
    if pages < needed:
        raise StartError(f"{pages} pages, but a request of {most_tokens} tokens needs {needed}: raise pages or lower max_request_tokens")
    computes = runner_over(pool)
    longest = min(pages * layout.page_tokens, facts.context_tokens)
    budgets = measure(computes, layout.page_tokens, longest, settings.chunk_s, every_twice=settings.device == "cuda")
    limits = Limits(settings.budget_tokens or budgets.budget_tokens, budgets.chunk_tokens, settings.max_batch, settings.growth_pages)
    identity = _identity(where, settings, layout, facts.context_tokens, needed)
    log.info("engine built", pages=pages, page_bytes=layout.page_bytes, dtype=layout.dtype, rate=round(budgets.rate), **_words(limits))
    return Room(
        layout=layout,
        shards=grid.shards(layout),
        ranks=ranks,
        pool=pool,
        runner=computes,
        scheduler=_scheduler(settings, role, pages, limits, identity, computes.depth),
        limits=limits,
        budget_tokens=limits.budget_tokens,
        longest_step_s=budgets.longest_step_s,
        identity=identity,
        memory=memory,
        prefill_rate=budgets.rate,
    )


def cleared(room: Room, settings: WorkerSettings, role: Role) -> Room:
    """The same weights and pool for a worker of another role; whatever the pages held is forgotten."""
    return replace(room, scheduler=_scheduler(settings, role, room.pool.pages, room.limits, room.identity, room.runner.depth))


def _scheduler(settings: WorkerSettings, role: Role, pages: int, limits: Limits, identity: Identity, depth: int) -> Scheduler:
    book = PagePool(pages, identity.page_tokens, keep_cached=settings.prefix_reuse)
    policy = OWN_POLICY.get(role, settings.policy)
    reuse = identity.fingerprint if settings.prefix_reuse else None
    return Scheduler(book, policy, limits, depth=depth, stages=settings.pp, reuse=reuse)


OWN_POLICY: dict[Role, PolicyName] = {"prefill": "decode_first", "decode": "chunked"}
"""Of the roles that do not share their engine. A decode computes the last page of a prompt with several answers, or all of it again where
its pages have gone: beside the others' tokens, and in its turn."""


@dataclass(frozen=True)
class Facts:
    """Of a model whose module may be gone."""

    layout: Layout
    """Of the whole model's pages."""
    own: Layout
    """Of rank 0's."""
    context_tokens: int
    device: torch.device
    mesh: Mesh


def _weights(where: Path, settings: WorkerSettings, ranks: Ranks) -> tuple[Facts, Callable[[Pool], Runner | PipelinedRunner]]:
    """The weights in place, and nothing else of the model: what the loaded module leaves behind counts as free from here on."""
    mesh = Mesh(ranks.grid, 0)
    if ranks.grid.ranks == 1:
        loaded, over = _placed(where, settings)
        facts = Facts(loaded.layout, loaded.layout, loaded.context_tokens, loaded.device, mesh)
        return facts, lambda pool: runner(over(pool), facts.layout.page_tokens)
    whole, loaded = part(where, settings.device, settings.dtype, settings.page_tokens, mesh)
    facts = Facts(whole, loaded.layout, loaded.context_tokens, loaded.device, mesh)

    def leading(pool: Pool) -> Runner | PipelinedRunner:
        leader, stages = Leader(stage_of(loaded, pool, mesh), ranks.launch, ranks.lost), ranks.grid.pp
        return PipelinedRunner(leader, whole.page_tokens, stages) if stages > 1 else Runner(leader, whole.page_tokens)

    return facts, leading


def _placed(where: Path, settings: WorkerSettings) -> tuple[LoadedModel, Callable[[Pool], Forward]]:
    """Mere tensors where the native kernels run the model, a module of transformers everywhere else."""
    native = _placed_natively(where, settings) if settings.device == "cpu" and settings.kernels != "torch" else None
    if native is not None:
        return native
    from services.engine.loading import load  # takes seconds

    loaded = load(where, settings.device, settings.dtype, settings.page_tokens)
    return loaded, place(loaded, settings.kernels, settings.kernels_folder, settings.max_batch)


def _placed_natively(where: Path, settings: WorkerSettings) -> tuple[LoadedModel, Callable[[Pool], Forward]] | None:
    """None: the other way says why."""
    plain = tensors.read(where, settings.dtype, settings.page_tokens)
    try:
        return None if plain is None else (plain, place_native(plain, settings.kernels_folder))
    except Unavailable:
        return None


def allocate(facts: Facts, settings: WorkerSettings, needed: int, ranks: Ranks) -> tuple[Pool, Memory]:
    """Pools on all ranks, of `memory_fraction` of the memory that is free after the reserve and after what other workers' pools will take,
    or of `pages`; the ranks meet. Raises StartError if not even `needed` pages fit."""
    gc.collect()
    folder, layout, device = notes(), facts.layout, facts.device
    others = ranks.loaded()
    with turn(folder):
        free = free_bytes(device)
        untouched = untouched_bytes(folder)
        promised = untouched if device.type == "cpu" else 0
        if settings.pages:
            pages = settings.pages
        elif device.type == "cpu":
            pages = fit_pages(layout, free - promised, settings.memory_fraction, needed)
        else:
            shares = [layout.share(shard) for shard in ranks.grid.shards(layout)]
            pages = min(
                fit_pages(share, left, settings.memory_fraction, needed) for share, left in zip(shares, [free, *others], strict=True)
            )
        ranks.take(pages)
        pool = Pool(facts.own, pages, device)
        size = pages * facts.own.page_bytes
        memory = Memory(free, promised, RESERVE_BYTES, size, leave(folder, size if device.type == "cpu" else 0))
        if ranks.grid.ranks > 1:
            facts.mesh.join(ranks.store, device)
            ranks.ready()
    log.info(
        "pool sized",
        free_mib=free >> 20,
        promised_mib=promised >> 20,
        reserve_mib=RESERVE_BYTES >> 20,
        fraction="-" if settings.pages else settings.memory_fraction,
        pool_mib=size >> 20,
    )
    return pool, memory


def _identity(where: Path, settings: WorkerSettings, layout: Layout, context_tokens: int, max_request_pages: int) -> Identity:
    return Identity(
        fingerprint=model_files.fingerprint(where, layout.dtype, layout.page_tokens),
        model=settings.model_name or where.name,
        tokenizer=model_files.tokenizer_hash(where),
        context_tokens=context_tokens,
        max_request_pages=max_request_pages,
        page_tokens=layout.page_tokens,
    )


def _words(limits: Limits) -> dict[str, object]:
    return {"budget_tokens": limits.budget_tokens, "chunk_tokens": limits.chunk_tokens, "max_batch": limits.max_batch}
