"""The engine's benchmark: its arithmetic, its rounds, its parts on a tiny model, and what it makes of a server's streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from transformers import LlamaConfig, OPTConfig

from common.errors import SettingError
from scripts.load.client import Server
from scripts.trials import engine as command
from scripts.trials.peers import Through, overlap, result
from scripts.trials.peers import table as http_table
from services.engine.bench import ceilings, launches, measure, overhead, work
from services.engine.bench.report import Report, table
from services.engine.bench.rounds import Case, Times
from services.engine.bench.rounds import measure as timed
from services.engine.bench.work import Shapes, Work
from services.engine.loading import load
from services.engine.native import build, library
from tests.unit.tiny_models import saved

TINY: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMOL = Shapes(30, 576, 192, 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536), 49152 * 576, 49152, 2, ())


def test_the_work_of_a_launch() -> None:
    """SmolLM2-135M, worked out by hand: 106 million weights in layers, 28 in the head, 23,040 bytes of KV a token."""
    assert SMOL.body_weights == 106_168_320 and SMOL.kv_token_bytes == 23_040 and SMOL.weight_bytes == 268_959_744
    one = work.prefill(SMOL, [512])
    assert one.flops == 2 * 106_168_320 * 512 + 2 * 49152 * 576 + 4 * 576 * 30 * 512 * 513 / 2
    assert work.prefill(SMOL, [512] * 4).flops == 4 * one.flops < work.prefill(SMOL, [2048]).flops
    step = work.decode(SMOL, 16, 512)
    assert step.bytes == 268_959_744 + 16 * 512 * 23_040
    assert step.flops == 16 * (2 * (106_168_320 + 49152 * 576) + 4 * 576 * 30 * 512)


def test_the_bound_is_the_larger_of_two_times() -> None:
    assert work.bound(Work(flops=6e9, bytes=1e9), 1e9, 1e9) == work.Bound(6.0, "products")
    assert work.bound(Work(flops=6e9, bytes=7e9), 1e9, 1e9) == work.Bound(7.0, "reads")


def test_rounds_take_turns_and_do_not_count_the_first_one() -> None:
    ran: list[str] = []
    cases = [Case("a", lambda: ran.append("a"), before=lambda: time.sleep(0.01)), Case("b", lambda: ran.append("b"), repeats=2)]
    times = timed(cases, 2, lambda words: None)
    assert ran == ["a", "b", "b"] * 3
    assert times["a"].count == 2 and times["b"].count == 4 and times["a"].median < 0.01
    with pytest.raises(ValueError, match="one name"):
        timed([cases[0], cases[0]], 1, lambda words: None)


@pytest.mark.skipif(build.compiler() is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_bare_product_and_read_are_right(dtype: torch.dtype) -> None:
    kernels = library.functions(build.library())
    x, weight = torch.randn(37, 96).to(dtype), torch.randn(160, 96).to(dtype)
    found = ceilings.arranged(kernels, ceilings.native_product(kernels, x, weight)(), back=37)
    torch.testing.assert_close(found.float(), x.float() @ weight.float().T, rtol=2e-2, atol=1e-1 if dtype is torch.bfloat16 else 1e-4)
    numbers = torch.arange(2048, dtype=torch.float32)
    assert kernels.baton_read(numbers.data_ptr(), 2048, 1) == 2048 * 2047 / 2


def test_shapes_of_real_layers(tmp_path: Path) -> None:
    """Products that share their input go as one; weights are those of the modules, the head apart."""
    saved(LlamaConfig(**TINY, tie_word_embeddings=True), tmp_path)
    found = launches.shapes(load(tmp_path, "cpu", "float32", 16))
    assert found.products == ((320, 96), (96, 192), (320, 96), (96, 160))
    assert found.body_weights == 2 * sum(outputs * inputs for outputs, inputs in found.products) and found.head_weights == 640 * 96
    assert (found.layers, found.width, found.kv_width, found.vocabulary, found.element_bytes) == (2, 192, 64, 640, 4)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_one_run_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    opt = OPTConfig(vocab_size=640, hidden_size=96, ffn_dim=160, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=1024)
    saved(LlamaConfig(**TINY) if kind == "llama" else opt, tmp_path)
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "ROWS", {"cpu": (32,)})
    monkeypatch.setattr(measure, "QUICK_ROUNDS", 1)
    monkeypatch.setattr(overhead, "SEQUENCES", (1, 16))
    small = launches.Grid(((512,), (20, 20)), ((1, 512), (16, 512)))
    monkeypatch.setattr(launches, "grid", lambda device, longest, quick: small)
    plain = kind == "llama"
    report, _ = measure.measure(measure.Options(tmp_path, "cpu", "float32", "auto", quick=True, plain=plain), lambda words: None)
    assert [row.name for row in report.prefill] == ["prefill 512", "prefill 2 x 20"]
    assert [row.name for row in report.decode] == ["decode 1 at 512", "decode 16 at 512"]
    assert report.decode[1].plain.keys() == report.prefill[0].plain.keys() == ({"sdpa"} if plain else set())
    assert len(report.step) == 2 and len(report.sampling) == 6
    for row in (*report.prefill, *report.decode, *report.step, *report.sampling):
        assert 0 < row.least_s <= row.median_s and row.bound_s > 0
    profile = report.profile
    assert profile.prefill[1].tokens == [20, 20] and profile.decode[1].seconds == report.decode[1].median_s
    assert profile.kv_bytes_per_token == 2 * 2 * (64 if kind == "llama" else 96) * 4
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
    words = table(report)
    assert "prefill 2 x 20" in words and ("plain sdpa" in words) == plain and "copies" in words


def test_launches_beyond_the_models_context_are_left_out() -> None:
    found = launches.grid("cpu", 1024, quick=False)
    assert max(max(lengths) for lengths in found.prompts) == 1024 and max(context for _, context in found.steps) == 1024
    assert found.pages == 32 * 1024 // 16
    assert launches.grid("cuda", 8192, quick=False).pages == 256 * 8192 // 16


def test_a_stand_in_steps_for_ever() -> None:
    """More steps than its sequences have tokens: they are renewed meanwhile."""
    steps = overhead.Steps(4)
    for _ in range(200):
        steps.prepare()
        steps.step()


def test_gaps_count_while_all_streams_run() -> None:
    assert overlap([[0.0, 1.0, 2.0, 3.0, 9.0], [1.5, 2.5, 3.5]]) == [1.0, 1.0, 1.0]
    assert overlap([[0.0, 1.0], [2.0, 3.0]]) == []


async def test_a_server_is_measured_by_its_streams() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        body = msgspec.json.decode(request.content)
        assert len(set(body["prompt"])) > 100 and body["ignore_eos"] and max(body["prompt"]) < 640

        async def lines() -> AsyncIterator[bytes]:
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(0.0005)
                yield b'data: {"choices": [{"text": ""}]}\n\n'
            yield b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n'

        return httpx.Response(200, content=lines())

    times: dict[str, Times] = {}
    for tokens, batch in ((512, 0), (1024, 0), (512, 1), (512, 8)):
        one = through(tokens, batch)
        (seconds,) = await one.take(httpx.MockTransport(answer))
        times[one.name] = Times(seconds, seconds, 1)
    found = result("some", "http://some", times)
    assert found.prefill[1024] == times["some: prefill 1024"].median and found.decode[8] == times["some: decode 8 at 512"].median
    assert found.decode[16] is None
    own = {"prefill 512": Times(found.prefill[512] or 0, 1.0, 1)}
    assert "1.00" in http_table([found], {**times, **own}).splitlines()[2]


def through(tokens: int, batch: int) -> Through:
    return Through("some", Server("http://some", "m", False), 640, tokens, batch, frozenset({0}))


async def test_a_servers_refusal_is_told_in_its_words() -> None:
    with pytest.raises(RuntimeError, match="429 too many"):
        await through(512, 0).take(httpx.MockTransport(lambda request: httpx.Response(429, content=b"too many")))


@pytest.mark.parametrize("text", ["http://127.0.0.1:1", "=http://127.0.0.1:1", "vllm=127.0.0.1:8000"])
def test_a_peer_has_a_name_and_a_url(text: str) -> None:
    with pytest.raises(SettingError, match="--peer"):
        command._peer(text)
    assert command._peer("vllm=http://127.0.0.1:8100/v1") == ("vllm", "http://127.0.0.1:8100")
