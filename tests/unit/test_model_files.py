"""What is read off a model's folder: names change exactly when what they name changes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from common.errors import StartError
from common.model_files import TOKENIZER_FILES, context_tokens, eos_ids, fingerprint, folder, tokenizer_hash, vocabulary


@pytest.fixture
def copy(smollm2: Path, tmp_path: Path) -> Path:
    """The model's folder with small weights."""
    for file in smollm2.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / file.name)
    header = json.dumps({"w": {"dtype": "U8", "shape": [100_000], "data_offsets": [0, 100_000]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(100_000))
    return tmp_path


def test_facts_of_the_model(smollm2: Path) -> None:
    assert (context_tokens(smollm2), vocabulary(smollm2), eos_ids(smollm2)) == (8192, 49152, [2])


def test_hash_of_the_tokenizer(copy: Path) -> None:
    before = tokenizer_hash(copy)
    assert tokenizer_hash(copy) == before
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert tokenizer_hash(copy) == before
    for name in TOKENIZER_FILES:
        if (copy / name).exists():
            (copy / name).write_text((copy / name).read_text() + "\n")
            assert tokenizer_hash(copy) != before
            before = tokenizer_hash(copy)


def test_fingerprint_changes_with_everything_that_matters(copy: Path) -> None:
    seen = {fingerprint(copy, "bfloat16", 16), fingerprint(copy, "float32", 16), fingerprint(copy, "bfloat16", 32)}
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    seen.add(fingerprint(copy, "bfloat16", 16))
    weights.write_bytes(raw + b"x")
    seen.add(fingerprint(copy, "bfloat16", 16))
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    seen.add(fingerprint(copy, "bfloat16", 16))
    (copy / "chat_template.jinja").write_text("another")
    seen.add(fingerprint(copy, "bfloat16", 16))
    assert len(seen) == 7
    assert fingerprint(copy, "bfloat16", 16) == fingerprint(copy, "bfloat16", 16)


def test_fingerprint_is_quick(smollm2: Path) -> None:
    begin = time.perf_counter()
    fingerprint(smollm2, "bfloat16", 16)
    assert time.perf_counter() - begin < 10


def test_eos_from_the_configuration_alone(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert eos_ids(copy) == [7, 8]
    (copy / "generation_config.json").unlink()
    assert eos_ids(copy) == [2]


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    for path in ("", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StartError):
            folder(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StartError, match=r"config\.json"):
        context_tokens(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartError, match="max_position_embeddings"):
        context_tokens(tmp_path)
