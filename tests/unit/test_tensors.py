"""A model as mere tensors: what transformers would have loaded, or nothing where it is not that plain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, MistralConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from common.errors import StartError
from services.engine import tensors
from services.engine.loading import load
from services.engine.native import build
from services.engine.rotary import rotary
from tests.unit.test_native import BASE
from tests.unit.tiny_models import saved

ROOT = Path(__file__).parents[2]
PLAIN: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**BASE),
    "tied": LlamaConfig(**BASE, tie_word_embeddings=True),
    "mistral": MistralConfig(**BASE, sliding_window=None),
    "qwen2": Qwen2Config(**{**BASE, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**{**BASE, "head_dim": 64}),
}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)
def test_it_is_what_transformers_load(config: PreTrainedConfig, dtype: str, tmp_path: Path) -> None:
    saved(config, tmp_path)
    assert_same(tmp_path, dtype)


def test_the_default_model_is_read_so(smollm2: Path) -> None:
    assert_same(smollm2, "bfloat16")


def assert_same(path: Path, dtype: str) -> None:
    plain, whole = tensors.read(path, dtype, 16), load(path, "cpu", dtype, 16)
    assert plain is not None
    for name in ("layout", "shard", "context_tokens", "vocabulary", "device", "dtype"):
        assert getattr(plain, name) == getattr(whole, name), name
    for name, wanted in whole.module.named_parameters(remove_duplicate=False):
        found = plain.module
        for part in name.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
    for found, wanted in zip(rotary(plain.module, 100), rotary(whole.module, 100), strict=True):
        assert torch.equal(found, wanted)
    attention = whole.module.model.layers[0].self_attn
    assert plain.module.model.layers[0].self_attn.scaling == attention.scaling
    assert len(plain.module.model.layers) == len(whole.module.model.layers)
    assert isinstance(whole.module, nn.Module) and not isinstance(plain.module, nn.Module)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model = saved(PLAIN["llama"], tmp_path)
    (tmp_path / tensors.FILE).unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(tmp_path, "auto")


def configured(**said: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        config = {**json.loads(file.read_text()), **said}
        file.write_text(json.dumps({name: value for name, value in config.items() if value != "left out"}))

    return change


def stored(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / tensors.FILE)
        change(found)
        save_file(found, folder / tensors.FILE, {"format": "pt"})

    return rewrite


NORM = "model.norm.weight"
UNUSUAL: dict[str, Callable[[Path], None]] = {
    "scaled angles": configured(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
    "scaled angles, as they were written once": configured(
        rope_parameters="left out", rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2}
    ),
    "no angles": configured(rope_parameters="left out"),
    "part of a head is turned": configured(partial_rotary_factor=0.5),
    "a window by default": configured(model_type="mistral"),
    "a window": configured(model_type="qwen3", use_sliding_window=True),
    "quantised": configured(quantization_config={"bits": 4}),
    "another activation": configured(hidden_act="gelu"),
    "a default that is not said": configured(tie_word_embeddings="left out"),
    "a number that is none": configured(num_key_value_heads=None),
    "another family": configured(model_type="gemma"),
    "more heads than weights": configured(num_attention_heads=12),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "no object": lambda folder: (folder / "config.json").write_text("[]"),
    "no weights": lambda folder: (folder / tensors.FILE).unlink(),
    "no safetensors": lambda folder: (folder / tensors.FILE).write_bytes(b"0" * 100),
    "a tensor missing": stored(lambda found: found.pop(NORM)),
    "one too many": stored(lambda found: found.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(96)})),
    "of another shape": stored(lambda found: found.update({NORM: torch.zeros(95)})),
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_not_plain_is_left_to_transformers(change: Callable[[Path], Any], tmp_path: Path) -> None:
    saved(PLAIN["llama"], tmp_path)
    assert tensors.read(tmp_path, "auto", 16) is not None
    change(tmp_path)
    assert tensors.read(tmp_path, "auto", 16) is None


def test_files_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved(PLAIN["llama"], folder)
    (folder / tensors.FILE).rename(tmp_path / tensors.FILE)
    (folder / tensors.INDEX).write_text(json.dumps({"weight_map": {NORM: f"../{tensors.FILE}"}}))
    assert tensors.read(folder, "auto", 16) is None


def test_a_model_of_other_names_is_left_to_transformers(tmp_path: Path) -> None:
    saved(
        OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=32), tmp_path
    )
    assert tensors.read(tmp_path, "auto", 16) is None


def test_windows_are_refused_as_by_transformers(tmp_path: Path) -> None:
    saved(PLAIN["mistral"], tmp_path)
    configured(sliding_window=128)(tmp_path)
    with pytest.raises(StartError, match="sliding-window"):
        tensors.read(tmp_path, "auto", 16)


@pytest.mark.skipif(build.compiler() is None, reason="no compiler")
def test_a_worker_that_needs_no_module_imports_no_transformers(smollm2: Path) -> None:
    """They took two fifths of its start."""
    script = """
import sys
from pathlib import Path
import services.colocated.worker, services.decode.worker, services.prefill.worker, services.worker.start
from common.settings import WorkerSettings
from services.worker.room import _placed
_placed(Path(sys.argv[1]), WorkerSettings())
print(sorted(name for name in sys.modules if name.partition(".")[0] == "transformers"))
"""
    done = subprocess.run([sys.executable, "-c", script, str(smollm2)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
