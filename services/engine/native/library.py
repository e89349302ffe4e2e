"""The compiled kernels as Python sees them: the structs of forward.cpp, field by field, and its functions."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path


class Layer(Structure):
    """Addresses; q_norm, k_norm and bias may be null."""

    _fields_ = [(name, c_void_p) for name in ("input_norm", "q_norm", "k_norm", "output_norm", "bias", "qkv", "o", "gate_up", "down")]


class Model(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "inner", "vocabulary", "bf16")],
        ("epsilon", c_float),
        ("scale", c_float),
        ("layer", POINTER(Layer)),
        *[(name, c_void_p) for name in ("final_norm", "embedding", "head", "cos", "sin")],
    ]


class Launch(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("tokens", "chunks", "draws", "threads")],
        *[(name, c_void_p) for name in ("ids", "positions", "chunk", "table", "keep", "logits", "pool")],
        ("page_tokens", c_int64),
    ]


@cache
def functions(path: Path) -> ctypes.CDLL:
    """The library at this path. Raises OSError if it cannot be loaded."""
    found = ctypes.CDLL(str(path))
    found.baton_workspace.restype = c_void_p
    found.baton_workspace.argtypes = []
    found.baton_release.argtypes = [c_void_p]
    found.baton_release.restype = None
    found.baton_forward.argtypes = [POINTER(Model), POINTER(Launch), c_void_p]
    found.baton_forward.restype = None
    found.baton_pack.argtypes = [c_void_p, c_int64, c_int64, c_void_p]
    found.baton_pack.restype = None
    found.baton_arrange.argtypes = [c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    found.baton_arrange.restype = None
    found.baton_gemm.argtypes = [c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p]
    found.baton_gemm.restype = None
    found.baton_read.argtypes = [c_void_p, c_int64, c_int64]
    found.baton_read.restype = c_float
    return found
