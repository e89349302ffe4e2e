"""Which code computes a launch: our own kernels where they can, transformers with this engine's attention everywhere else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from torch import Tensor

from common.errors import StartError
from common.logs import get_logger
from common.settings import Kernels
from services.engine.cuda.forward import CudaForward
from services.engine.cuda.weights import fused, refusal
from services.engine.launch import Launch
from services.engine.model import LoadedModel
from services.engine.native import build
from services.engine.native import forward as native
from services.engine.packed import pack, packable
from services.engine.pool import Pool
from services.engine.torch_forward import TorchForward

log = get_logger(__name__)

MOST_BATCH = 256

Forward: TypeAlias = Callable[[Launch], Tensor]
"""Writes the launch's KV into the pool; gives logits of its `keep` rows, `[draws, vocabulary]`."""


def place_rank(loaded: LoadedModel) -> Callable[[Pool], TorchForward]:
    """The same for one of a worker's ranks, which has `cut` its part of the model: always through torch."""
    if packable(loaded.device, loaded.dtype):
        pack(loaded.module)
    return partial(TorchForward, loaded)


def choose(loaded: LoadedModel, pool: Pool, kernels: Kernels, folder: str | None = None) -> Forward:
    """`place`, and over this pool at once."""
    return place(loaded, kernels, folder)(pool)


def place(loaded: LoadedModel, kernels: Kernels, folder: str | None = None, most_batch: int = MOST_BATCH) -> Callable[[Pool], Forward]:
    """Put the weights where the fastest code there is wants them; `native` and `torch` insist on theirs. `folder`: kernels for CPU cores
    that are compiled already, if any. `most_batch`: the largest decode step that is captured as a graph on a GPU. What is returned makes
    the forward pass over a pool: the pool is sized by the memory that the weights leave, and the module is not kept if its weights have
    been copied. Says in the log what it is and why. Raises StartError if the native kernels are insisted on and cannot run."""
    why = "the setting says so"
    if kernels != "torch":
        try:
            return _on_gpu(loaded, most_batch) if loaded.device.type == "cuda" else place_native(loaded, folder)
        except build.Unavailable as error:
            why = str(error)
    if kernels == "native":
        raise StartError(f"kernels is native, but {why}")
    log.info("kernels: torch", because=why)
    if packable(loaded.device, loaded.dtype):
        pack(loaded.module)
    return partial(TorchForward, loaded)


def place_native(loaded: LoadedModel, folder: str | None) -> Callable[[Pool], Forward]:
    """By the kernels for CPU cores alone, which need nothing of the module but its configuration and tensors. Raises Unavailable."""
    why = native.refusal(loaded, loaded.layout.page_tokens)
    if why is not None:
        raise build.Unavailable(why)
    kind = build.target()
    weights = native.NativeWeights(loaded, build.library(kind, folder))
    log.info("kernels: native", instructions=kind)
    return partial(native.NativeForward, weights)


def _on_gpu(loaded: LoadedModel, most_batch: int) -> Callable[[Pool], Forward]:
    """Raises Unavailable."""
    why = refusal(loaded)
    if why is not None:
        raise build.Unavailable(why)
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang")):
        raise build.Unavailable("there is no C compiler (gcc, clang or CC), which Triton needs to launch kernels")
    try:
        from services.engine.cuda import choose as chosen
        from services.engine.cuda.triton_operators import TritonOperators
    except ImportError as error:
        raise build.Unavailable(f"Triton cannot be imported: {error}") from error
    log.info("kernels: native", instructions="Triton and CUDA graphs")
    weights = fused(loaded)
    ways = chosen.ways(weights.like, loaded.dtype, loaded.device)
    return partial(CudaForward, weights, TritonOperators(ways), most_batch=most_batch)
