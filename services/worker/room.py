"""What a worker computes with: model, pool, runner, scheduler, measured budgets. Built once at start, off the event loop."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from common import model_files
from common.errors import StartError
from common.logs import get_logger
from common.messages import Identity, Layout, Shard
from common.settings import WorkerSettings, cores
from services.engine.calibrate import measure
from services.engine.forward import choose
from services.engine.model import load
from services.engine.pages import PagePool
from services.engine.policies import Limits
from services.engine.pool import Pool, fit_pages
from services.engine.runner import Runner
from services.engine.scheduler import Scheduler

log = get_logger(__name__)


@dataclass(frozen=True)
class Room:
    """One rank's means. Scheduler and runner belong to the engine's thread once it has started."""

    layout: Layout
    shard: Shard
    pool: Pool
    runner: Runner
    scheduler: Scheduler
    budget_tokens: int
    longest_step_s: float
    identity: Identity
    """What this worker would make of the fleet if it were the first."""


def pin(settings: WorkerSettings) -> None:
    """Keep this process, and torch's threads, on its own cores."""
    wanted = cores(settings.cores) if settings.cores else sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        raise StartError(f"cores is {settings.cores!r}: {error.strerror}") from error
    torch.set_num_threads(len(wanted))


def build(settings: WorkerSettings) -> Room:
    """Load, allocate, measure. Raises StartError saying what does not fit."""
    where = model_files.folder(settings.model)
    loaded = load(where, settings.device, settings.dtype, settings.page_tokens)
    layout = loaded.layout
    most_tokens = min(settings.max_request_tokens or loaded.context_tokens, loaded.context_tokens)
    needed = layout.pages(most_tokens)
    pages = settings.pages or fit_pages(layout, loaded.device, settings.memory_fraction, needed)
    if pages < needed:
        raise StartError(f"{pages} pages, but a request of {most_tokens} tokens needs {needed}: raise pages or lower max_request_tokens")
    pool = Pool(layout, pages, loaded.device)
    runner = Runner(choose(loaded, pool, settings.kernels, settings.kernels_folder), layout.page_tokens)
    budgets = measure(runner, layout.page_tokens, min(pages * layout.page_tokens, loaded.context_tokens), settings.chunk_s)
    limits = Limits(settings.budget_tokens or budgets.budget_tokens, budgets.chunk_tokens, settings.max_batch, settings.growth_pages)
    identity = _identity(where, settings, layout, loaded.context_tokens, needed)
    reuse = identity.fingerprint if settings.prefix_reuse else None
    book = PagePool(pages, layout.page_tokens, keep_cached=settings.prefix_reuse)
    log.info("engine built", pages=pages, page_bytes=layout.page_bytes, dtype=layout.dtype, rate=round(budgets.rate), **_words(limits))
    return Room(
        layout=layout,
        shard=loaded.shard,
        pool=pool,
        runner=runner,
        scheduler=Scheduler(book, settings.policy, limits, reuse=reuse),
        budget_tokens=limits.budget_tokens,
        longest_step_s=budgets.longest_step_s,
        identity=identity,
    )


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
