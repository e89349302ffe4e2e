"""From a GGUF file to a model folder: bf16 safetensors, configuration, tokenizer. Done once, kept in a cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import StartError


def materialise(source: Path, folder: Path, progress: Callable[[str], None] = lambda words: None) -> Path:
    """Write the model of the GGUF file `source` into `folder` and return it; what is there already is used as it is.

    The folder appears whole or not at all. Raises StartError if the file is no GGUF model that transformers reads.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        progress(f"reading {source.name}")
        where, name = str(source.parent), source.name
        transformers.utils.logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32, **_dense())
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        except (ValueError, OSError, KeyError, NotImplementedError, ImportError) as error:
            raise StartError(f"{source} is no GGUF model that transformers can read: {error}") from error
        progress("writing bf16 safetensors")
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
        return folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dense() -> dict[str, object]:
    """Newer transformers keep GGUF weights packed unless told otherwise; older ones always unpack them."""
    packed = getattr(transformers, "GgufConfig", None)
    return {} if packed is None else {"quantization_config": packed(dequantize=True)}
