"""A small SentencePiece-like tokenizer, made here: words with leading spaces, and single bytes for every character it does not know."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models

WORDS = ["▁Hello", "▁world", "wor", "ld", "▁", "!", "▁the", "é", "a", "▁a"]


class Sentences:
    """Ids 0 to 2 are special, 3 to 258 the bytes, then words."""

    byte_level = False

    def __init__(self) -> None:
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
        self._backend = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
        self._backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self._backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        self.special = {0, 1, 2}
        self.words = range(259, len(names))

    def ids_of(self, character: str) -> list[int]:
        """A character by its bytes."""
        return [3 + byte for byte in character.encode()]

    def decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def raw(self, token: int) -> bytes:
        return self.decode([token]).encode()

    def shows(self, token: int) -> bool:
        return token not in self.special
