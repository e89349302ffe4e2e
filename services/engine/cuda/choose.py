"""Which way a prompt's attention goes on this device: measured once, at the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from common.logs import get_logger
from services.engine.cuda import flash
from services.engine.cuda.inputs import inputs
from services.engine.cuda.operators import Heads
from services.engine.cuda.triton_operators import TritonOperators, Ways
from services.engine.launch import Launch

log = get_logger(__name__)

PROBE_TOKENS = 4096
"""So many that the device takes longer than Python: a prompt's launches are made ahead of it."""
RUNS, WARM_UPS = 5, 2


@torch.inference_mode()
def ways(like: Heads, dtype: torch.dtype, device: torch.device) -> Ways:
    """The default ways with the faster attention for a prompt of `PROBE_TOKENS`. One that fails here is not taken."""
    usual, seconds = Ways(), dict[bool, float]()
    pages = -(-PROBE_TOKENS // like.page_tokens)
    pool = torch.zeros(pages, 2, like.kv_heads, like.page_tokens, like.dim, dtype=dtype, device=device)
    queries = torch.zeros(PROBE_TOKENS, like.heads, like.dim, dtype=dtype, device=device)
    if not flash.takes(queries):
        return usual
    prompts = inputs(_probe(pages), like, dtype, device, packs=True).prompts
    assert prompts is not None
    for library in (False, True):
        do = TritonOperators(replace(usual, library=library))
        try:
            seconds[library] = _taken(partial(do.prefill, queries, pool, prompts, like, torch.empty_like(queries)))
        except Exception as error:  # whatever a library raises that was built for other devices
            log.warning("one way of attention cannot be taken", library=library, reason=f"{type(error).__name__}: {error}")
    own_s, library_s = seconds.get(False, float("inf")), seconds.get(True, float("inf"))
    log.info("attention of prompts", library=library_s < own_s, own_us=_us(own_s), library_us=_us(library_s), tokens=PROBE_TOKENS)
    return replace(usual, library=library_s < own_s)


def _probe(pages: int) -> Launch:
    tokens = np.arange(PROBE_TOKENS)
    chunk = np.asarray([[0, PROBE_TOKENS, 0, 0]])
    return Launch(tokens * 0, tokens, chunk, np.arange(pages), tokens[:0])


def _taken(run: Callable[[], None]) -> float:
    """Seconds of one, of several made in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for number in range(WARM_UPS + RUNS):
        if number == WARM_UPS:
            begin.record()
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) / 1e3 / RUNS)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"
