"""Files that a command writes when all its work is done: looked at before it begins."""

from __future__ import annotations

import os
from pathlib import Path


def obstacle(path: Path | None) -> str | None:
    """Why a file cannot be written there, in words; None if it can, or if none is wanted."""
    if path is None:
        return None
    if not path.parent.is_dir():
        return f"{path} cannot be written: there is no folder {path.parent}"
    if path.is_dir():
        return f"{path} cannot be written: it is a folder"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"{path} cannot be written: permission denied"
    return None
