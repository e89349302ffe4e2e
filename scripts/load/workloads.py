"""What is asked: lengths, times and text of the named workloads (data/README.md has their origins).

A workload is a list of `Shape`s in a fixed order. Real text stays real (`code`); where a source gives lengths only, `texts` cuts real text
of the same kind to them. **Scaling rule:** every length of a workload is multiplied by one factor, so that its proportions stay:
`min(1, context / most)`, with `most` the workload's 99th percentile of input + output; what is still too long is dropped. A factor given by
hand replaces it.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

DATA = Path(__file__).with_name("data")
MALFORMED_OUTPUT = 1024
MOONCAKE_BLOCK = 512
"""Prompt tokens that one hash id of the Mooncake trace stands for."""


class WorkloadError(Exception):
    """A workload cannot be had: one line that says why."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One request before it has text. `blocks`: ids of its shared prefix blocks, each of `block_tokens` tokens."""

    input_tokens: int
    output_tokens: int
    at_s: float | None = None
    text: str | None = None
    blocks: tuple[int, ...] = ()
    block_tokens: int = MOONCAKE_BLOCK

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    shapes: tuple[Shape, ...]
    prose: str
    """File in data/ whose text is cut to length."""
    factor: float = 1.0

    @property
    def timed(self) -> bool:
        return all(shape.at_s is not None for shape in self.shapes)


def lines(name: str) -> list[dict[str, object]]:
    with gzip.open(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


def table(path: Path) -> Iterable[Shape]:
    """Rows of a CSV with input_tokens, output_tokens and perhaps arrival_s. Raises WorkloadError."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                at = float(row["arrival_s"]) if row.get("arrival_s") else None
                yield Shape(int(row["input_tokens"]), int(row["output_tokens"]), at)
            except (KeyError, TypeError, ValueError):
                raise WorkloadError(f"{path.name}, line {number}: columns input_tokens, output_tokens (and arrival_s) are needed") from None


def chatbot() -> Iterable[Shape]:
    return table(DATA / "sharegpt_v3_distserve_lengths.csv.gz")


def code() -> Iterable[Shape]:
    """Real prompts; lengths are counted by the model's own tokenizer later (0 here means: count)."""
    for one in lines("humaneval.jsonl.gz"):
        yield Shape(0, len(str(one["canonical_solution"])) // 3 + 1, text=str(one["prompt"]))


def summarisation() -> Iterable[Shape]:
    yield from table(DATA / "xsum_lengths.csv.gz")
    arxiv = (shape for shape in table(DATA / "arxiv_summarization_llama2_lengths.csv.gz") if shape.output_tokens <= MALFORMED_OUTPUT)
    for number, shape in enumerate(arxiv):
        if number % 27 == 0:  # as many as of XSum
            yield shape


def mooncake() -> Iterable[Shape]:
    for one in lines("mooncake_conversation.jsonl.gz"):
        blocks = one["hash_ids"]
        assert isinstance(blocks, list)
        numbers = (int(str(one["input_length"])), int(str(one["output_length"])), int(str(one["timestamp"])) / 1000)
        yield Shape(*numbers, blocks=tuple(blocks))


NAMED: dict[str, tuple[Callable[[], Iterable[Shape]], str, bool]] = {
    "chatbot": (chatbot, "arena_hard_prompts.jsonl.gz", True),
    "code": (code, "humaneval.jsonl.gz", True),
    "summarisation": (summarisation, "scitldr_test.jsonl.gz", True),
    "azure-conv": (lambda: table(DATA / "azure2023_conv.csv.gz"), "arena_hard_prompts.jsonl.gz", False),
    "azure-code": (lambda: table(DATA / "azure2023_code.csv.gz"), "humaneval.jsonl.gz", False),
    "mooncake": (mooncake, "scitldr_test.jsonl.gz", False),
}
"""Name → (shapes, prose, shuffled). A trace keeps its order."""


def load(name: str, context_tokens: int, seed: int, factor: float | None = None) -> Workload:
    """A named workload or a CSV, scaled to the context by the rule above. Raises WorkloadError."""
    if name in NAMED:
        source, prose, shuffled = NAMED[name]
        shapes = list(source())
    elif Path(name).is_file():
        prose, shuffled, shapes = "arena_hard_prompts.jsonl.gz", False, list(table(Path(name)))
    else:
        raise WorkloadError(f"{name}: neither a workload ({', '.join(NAMED)}) nor a CSV file")
    if not shapes:
        raise WorkloadError(f"{name}: no requests")
    if factor is None:
        ordered = sorted(shape.total_tokens for shape in shapes)
        factor = min(1.0, context_tokens / ordered[int(0.99 * (len(ordered) - 1))])
    scaled = [shape if shape.text is not None else scale(shape, factor) for shape in shapes]
    fitting = [shape for shape in scaled if shape.total_tokens <= context_tokens]
    if not fitting:
        raise WorkloadError(f"{name}: no request fits into {context_tokens} tokens; give a smaller --length-scale")
    if shuffled:
        random.Random(seed).shuffle(fitting)
    return Workload(name, tuple(fitting), prose, factor)


def scale(shape: Shape, factor: float) -> Shape:
    """Lengths times the factor, at least one token each (two out: a TPOT needs two)."""
    return replace(
        shape,
        input_tokens=max(1, round(shape.input_tokens * factor)),
        output_tokens=max(2, round(shape.output_tokens * factor)),
        block_tokens=max(1, round(shape.block_tokens * factor)),
    )
