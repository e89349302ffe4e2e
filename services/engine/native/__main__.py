"""Compile the kernels into a folder for every kind of x86-64 CPU that they know: for images without a compiler."""

from __future__ import annotations

import sys
from pathlib import Path

from services.engine.native.build import KINDS, Unavailable, compile_to, library_name


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m services.engine.native FOLDER")
    for kind in KINDS:
        try:
            print(compile_to(Path(sys.argv[1]) / library_name(kind), kind), flush=True)
        except Unavailable as error:
            sys.exit(f"not compiled for {kind}: {error}")


main()
