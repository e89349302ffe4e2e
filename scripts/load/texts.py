"""Text for a shape: real where the workload has it, else real text cut so that the model's tokenizer counts the wanted length."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from scripts.load.workloads import Shape, Workload, lines

TRIES = 8


@dataclass(frozen=True, slots=True)
class Question:
    """A request as it is sent."""

    text: str
    input_tokens: int
    output_tokens: int


class Writer:
    """Writes questions from one workload, each different: the n-th differs from every other already in its first tokens."""

    def __init__(self, folder: Path, workload: Workload, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._workload = workload
        self._seed = seed
        prose = [str(one.get("document") or one.get("prompt")) for one in lines(workload.prose)]
        random.Random(seed).shuffle(prose)
        self._prose = self._ids("\n\n".join(prose))
        self._blocks: dict[int, list[int]] = {}

    def question(self, number: int) -> Question:
        """The n-th request; after the last shape the first follows, with other text."""
        shape = self._workload.shapes[number % len(self._workload.shapes)]
        if shape.text is not None:
            text = f"# {number}\n{shape.text}"
            return Question(text, len(self._ids(text)), shape.output_tokens)
        wanted = shape.input_tokens
        ids = self._prefixed(shape, number) if shape.blocks else self._cut(f"[{number}-{self._seed}] ", wanted, number)
        text = self._tokenizer.decode(ids)
        counted = len(self._ids(text))
        for _ in range(TRIES):  # cutting inside a word or a character moves the count a little
            if counted == wanted:
                break
            ids = ids[: wanted - (counted - wanted)] if counted > wanted else [*ids, *self._prose[: wanted - counted]]
            text = self._tokenizer.decode(ids)
            counted = len(self._ids(text))
        return Question(text, counted, shape.output_tokens)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _cut(self, head: str, tokens: int, number: int) -> list[int]:
        """`tokens` ids: the head, then prose from a place of its own."""
        start = random.Random(f"{self._seed} {number}").randrange(len(self._prose))
        ids = self._ids(head)
        while len(ids) < tokens:
            ids += self._prose[start : start + tokens - len(ids)]
            start = 0
        return ids[:tokens]

    def _prefixed(self, shape: Shape, number: int) -> list[int]:
        """Equal block ids give equal text: what the trace shares is shared here; the last block is never whole and its own."""
        ids: list[int] = []
        for block in shape.blocks[:-1]:
            if block not in self._blocks:
                self._blocks[block] = self._cut(f"[block {block}] ", shape.block_tokens, -1 - block)
            ids += self._blocks[block]
        ids = ids[: shape.input_tokens]
        return ids + self._cut(f"[{number}] ", shape.input_tokens - len(ids), number)
