"""Workers that share one card, side by side and within bounds, by NVIDIA's Multi-Process Service.

Without MPS two processes on a card take turns (time slices), each with all of it. Under MPS their kernels run at once, and a process that
starts with CUDA_MPS_ACTIVE_THREAD_PERCENTAGE finds only that share of the multiprocessors. The variable is read when a process' first
CUDA context is made; ranks inherit it. See docs.nvidia.com/deploy/mps, "Volta MPS Execution Resource Provisioning".

A crash or a kill of one process may end the others of its MPS server: there the death of one worker is not only its own.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from common.errors import SettingError, StartError
from common.logs import get_logger
from common.settings import WorkerSettings

log = get_logger(__name__)

PERCENT = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"
DEFAULT_PIPES = "/tmp/nvidia-mps"  # noqa: S108 - the driver's own default
ANSWER_S = 2.0


def pipes(environ: Mapping[str, str]) -> Path:
    """Where processes with this environment look for the MPS daemon."""
    return Path(environ.get(PIPES) or DEFAULT_PIPES)


def listening(folder: Path) -> bool:
    """Whether an MPS daemon listens in this folder: a connection to its socket, given up after ANSWER_S, and nothing said."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_S)
        try:
            probe.connect(str(folder / "control"))
        except OSError as error:
            return error.errno == errno.EPROTOTYPE  # somebody listens, for another kind of socket
    return True


def bound(percent: int, device: str, environ: Mapping[str, str], there: bool) -> dict[str, str]:
    """What the environment must say so that no more than `percent` of the card is used. `there`: an MPS daemon listens.

    Raises SettingError and StartError where the bound would not hold.
    """
    if percent == 100:
        return {}
    if device != "cuda":
        raise SettingError(f"gpu_percent is {percent}, but device is {device}; it must be 100")
    if not there:
        raise StartError(
            f"gpu_percent is {percent}, but no MPS daemon listens in {pipes(environ)}: "
            f"start nvidia-cuda-mps-control -d with the same {PIPES}"
        )
    return {PERCENT: str(percent)}


def limit(settings: WorkerSettings) -> None:
    """Bound this process and the ranks it starts; before CUDA is first touched. Raises SettingError and StartError."""
    percent = settings.gpu_percent
    found = bound(percent, settings.device, os.environ, percent < 100 and listening(pipes(os.environ)))
    os.environ.update(found)
    if found:
        log.info("sharing the GPU by MPS", percent=percent, pipes=pipes(os.environ))
