"""Compiles the kernels once for this kind of CPU, and keeps the library. Nothing is compiled twice, and nothing but g++ is needed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
MAIN = "forward.cpp"
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
KINDS = ("x86-64-v3", "x86-64-v4", "x86-64-v4+avx512bf16", "x86-64-v4+avx512bf16+amx-tile+amx-bf16")
"""Of x86-64 CPUs; each has all instructions of those before it."""
TIMEOUT_S = 180.0


class Unavailable(Exception):
    """Why there is no library, in words."""


def target() -> str:
    """The instructions to compile for: the most that this CPU has of the sets that matter."""
    if platform.machine() != "x86_64":
        return "native"
    flags = _cpu_flags()
    needed = (
        {"avx2", "fma", "bmi2"},
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        {"avx512_bf16"},
        {"amx_tile", "amx_bf16"},
    )
    has = [kind for at, kind in enumerate(KINDS) if set().union(*needed[: at + 1]) <= flags]
    if has == list(KINDS) and not _tiles_permitted():
        has.pop()
    return has[-1] if has else "x86-64"


def library(kind: str | None = None, prebuilt: str | Path | None = None) -> Path:
    """The compiled library for `kind` of CPU: out of a folder that `python -m services.engine.native FOLDER` has filled, or the cache, or
    compiled now. Raises Unavailable."""
    kind = kind or target()
    name = library_name(kind)
    for folder in ([Path(prebuilt)] if prebuilt else []) + [cache()]:
        if (folder / name).exists():
            return folder / name
    return compile_to(cache() / name, kind)


def library_name(kind: str) -> str:
    """Another one for other sources."""
    return f"kernels-{kind}-{_digest()}.so"


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "native"


def compiler() -> str | None:
    """Where it is: g++, or what CXX names."""
    return shutil.which(_wanted())


def compile_to(path: Path, kind: str) -> Path:
    """Compile for `kind` of CPU; the file appears whole or not at all. Raises Unavailable."""
    command = compiler()
    if command is None:
        raise Unavailable(f"there is no {_wanted()} to compile the kernels with")
    march, *extra = kind.split("+")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            arguments = [command, *FLAGS, f"-march={march}", *(f"-m{name}" for name in extra), "-o", str(made), str(SOURCES / MAIN)]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode:
                words = (done.stderr.strip() or "no words").splitlines()
                raise Unavailable(f"{command} failed: {next((line for line in words if 'error' in line), words[-1])}")
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command} did not run: {error}") from error
    return path


def _wanted() -> str:
    return os.environ.get("CXX") or "g++"


def _digest() -> str:
    """Of all that the library is made from."""
    found = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        found.update(source.read_bytes())
    return found.hexdigest()[:16]


def _tiles_permitted() -> bool:
    """Ask the kernel for the state of AMX's tiles, which it hands out on request: for this process and all its threads."""
    request_permission, tile_data = 0x1023, 18
    arch_prctl = 158
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((set(line.split()) for line in lines if line.startswith("flags")), set())
    except OSError:
        return set()
