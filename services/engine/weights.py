"""From a GGUF file to a model folder: bf16 safetensors, configuration, tokenizer. Done once, kept in a cache."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import StartError

LOCK = "baton.lock"
"""In a folder in which a model is being made: locked as long as its maker lives, however that ends."""
MODEL = "model"


def materialise(source: Path, folder: Path, progress: Callable[[str], None] = lambda words: None) -> Path:
    """Write the model of the GGUF file `source` into `folder` and return it; what is there already is used as it is.

    The folder appears whole or not at all; what killed makers of it have left is removed. Raises StartError if the file is no GGUF model
    that transformers reads.
    """
    _sweep(folder)
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _hold(partial):
            _convert(source, partial / MODEL, progress)
            try:
                os.rename(partial / MODEL, folder)
            except OSError:
                if not (folder / "config.json").exists():
                    raise
        return folder
    finally:
        _remove(partial)


def _convert(source: Path, folder: Path, progress: Callable[[str], None]) -> None:
    progress(f"reading {source.name}")
    where, name = str(source.parent), source.name
    transformers.utils.logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32, **_dense())
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    except (ValueError, OSError, KeyError, NotImplementedError, ImportError) as error:
        raise StartError(f"{source} is no GGUF model that transformers can read: {error}") from error
    progress("writing bf16 safetensors")
    folder.mkdir(mode=0o700)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _hold(partial: Path) -> IO[str]:
    """Keep the file open while a model is made in `partial`. The lock has its name only once it is locked, so that nobody finds it free."""
    file = open(partial / f"{LOCK}.new", "w")  # noqa: SIM115
    with contextlib.suppress(OSError):  # a file system without locks: nobody will know that it is dead
        fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(file.name, partial / LOCK)
    return file


def _sweep(folder: Path) -> None:
    """Remove what makers of this folder that live no more have left beside it: gigabytes for each one that was killed."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*/{LOCK}"):
        with contextlib.suppress(OSError), open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path.parent)


def _remove(partial: Path) -> None:
    """The lock last: what is left if this too is killed is found again."""
    shutil.rmtree(partial / MODEL, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _dense() -> dict[str, object]:
    """Newer transformers keep GGUF weights packed unless told otherwise; older ones always unpack them."""
    packed = getattr(transformers, "GgufConfig", None)
    return {} if packed is None else {"quantization_config": packed(dequantize=True)}
