"""Making a model folder of a GGUF file leaves the folder and nothing else, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import StartError
from services.engine import weights

MAKER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from services.engine import weights

def save(folder):
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "model.safetensors").write_text("gigabytes")
    print("saving", flush=True)
    time.sleep(600)

model = SimpleNamespace(to=lambda dtype: model, save_pretrained=save)
made = SimpleNamespace(from_pretrained=lambda *words, **more: model)
weights.AutoModelForCausalLM = weights.AutoTokenizer = made
weights.materialise(Path("model.gguf"), Path(sys.argv[1]))
"""


def made(folder: Path) -> None:
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "config.json").write_text("{}")


def fails(source: Path, folder: Path) -> None:
    source.write_bytes(b"this is no model" * 100)
    with pytest.raises(StartError):
        weights.materialise(source, folder)


def test_what_a_killed_maker_left_goes_at_the_next_start_and_what_a_living_one_makes_stays(tmp_path: Path) -> None:
    """A partial model is gigabytes; a container that is killed for its memory while it saves is started again and again."""
    source, folder, parent = tmp_path / "wrong.gguf", tmp_path / "made" / "model", tmp_path / "made"
    command = [sys.executable, "-c", MAKER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as maker:
        assert maker.stdout is not None and maker.stdout.readline() == "saving\n"
        (partial,) = parent.iterdir()
        fails(source, folder)
        assert list(parent.iterdir()) == [partial] and list(partial.rglob("*.safetensors")), "in use"
        maker.kill()
    fails(source, folder)
    assert list(parent.iterdir()) == []


def test_the_model_lies_in_its_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(to=lambda dtype: model, save_pretrained=made)
    monkeypatch.setattr(weights, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda *words, **more: model))
    monkeypatch.setattr(weights, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *words, **more: model))
    folder = tmp_path / "made" / "model"
    assert weights.materialise(tmp_path / "some.gguf", folder) == folder
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert list(folder.parent.iterdir()) == [folder]


def test_folders_that_are_not_ours_stay(tmp_path: Path) -> None:
    for name in (".model.settings", ".model.cache", ".modelling.abcdefgh"):
        (tmp_path / name / "model").mkdir(parents=True)
    fails(tmp_path / "wrong.gguf", tmp_path / "model")
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3
