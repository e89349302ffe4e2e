"""Which code computes a launch: our own kernels where they can, transformers with this engine's attention everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from torch import Tensor

from common.errors import StartError
from common.logs import get_logger
from common.settings import Kernels
from services.engine.launch import Launch
from services.engine.model import LoadedModel
from services.engine.native import build
from services.engine.native.forward import NativeForward, NativeWeights, refusal
from services.engine.packed import pack, packable
from services.engine.pool import Pool
from services.engine.torch_forward import TorchForward

log = get_logger(__name__)

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


def place(loaded: LoadedModel, kernels: Kernels, folder: str | None = None) -> Callable[[Pool], Forward]:
    """Put the weights where the fastest code there is wants them; `native` and `torch` insist on theirs. `folder`: kernels that are
    compiled already, if any. What is returned makes the forward pass over a pool: the pool is sized by the memory that the weights
    leave, and the module is not kept if its weights have been copied. Says in the log what it is and why. Raises StartError if the
    native kernels are insisted on and cannot run."""
    why = refusal(loaded, loaded.layout.page_tokens) if kernels != "torch" else "the setting says so"
    if why is None:
        try:
            kind = build.target()
            weights = NativeWeights(loaded, build.library(kind, folder))
        except build.Unavailable as error:
            why = str(error)
        else:
            log.info("kernels: native", instructions=kind)
            return partial(NativeForward, weights)
    if kernels == "native":
        raise StartError(f"kernels is native, but {why}")
    log.info("kernels: torch", because=why)
    if packable(loaded.device, loaded.dtype):
        pack(loaded.module)
    return partial(TorchForward, loaded)
