"""Makes tests/data/references.json: what plain transformers generates greedily, in float32, for every test prompt.

BATON_TEST_MODEL=… .venv/bin/python -m tests.references
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parent / "data"
TOKENS = 128


def prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in (DATA / "prompts.jsonl").read_text().splitlines()]


def references() -> list[dict[str, Any]]:
    """[{"prompt": ids of the rendered chat, "output": 128 greedy ids}], in the order of `prompts`."""
    found: list[dict[str, Any]] = json.loads((DATA / "references.json").read_text())["answers"]
    return found


class Reference:
    """Plain transformers in float32."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def render(self, prompt: str) -> list[int]:
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @torch.inference_mode()
    def generate(self, ids: list[int], tokens: int) -> list[int]:
        found = self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            eos_token_id=None,
        )
        output: list[int] = found[0, len(ids) :].tolist()
        return output

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocabulary] of one forward pass."""
        return self.model(torch.tensor([ids])).logits[0]  # type: ignore[no-any-return]


def main() -> None:
    reference = Reference(Path(os.environ["BATON_TEST_MODEL"]))
    answers = []
    for number, prompt in enumerate(prompts()):
        ids = reference.render(prompt)
        answers.append({"prompt": ids, "output": reference.generate(ids, TOKENS)})
        print(f"{number + 1:3}: {len(ids)} tokens", file=sys.stderr)
    made = {"torch": torch.__version__, "transformers": transformers.__version__, "answers": answers}
    (DATA / "references.json").write_text(json.dumps(made, separators=(",", ":")))


if __name__ == "__main__":
    main()
