"""What a worker has said to its gateways about each execution, kept until they have seen it (protocol rules 5 and 6). Pure.

The token socket may drop anything. The outbox is what makes that harmless: beats say how far each execution has been published,
a gateway that has less asks `Resend`, and what it acknowledges is forgotten here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from common.messages import Finished, Handed, Holding, Incarnation, Key, Lost, Resent, Started, Token, Tokens

Ending: TypeAlias = Finished | Lost | Handed


@dataclass(eq=False)
class Record:
    """One execution: tokens from the first unacknowledged one on, and its ending if it has one."""

    gateway: Incarnation
    index: int
    """Absolute index of the next token to be published."""
    tokens: list[Token] = field(default_factory=list)
    ending: Ending | None = None
    launched: bool = False
    known: bool = False
    """Its gateway has said that it knows of this execution here."""


class Outbox:
    """Executions by key. `take` hands out what is new since the last time, by gateway."""

    def __init__(self) -> None:
        self._records: dict[Key, Record] = {}
        self._fresh: dict[Incarnation, list[Started | Tokens | Ending | Resent]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    def gateway(self, key: Key) -> Incarnation | None:
        record = self._records.get(key)
        return None if record is None else record.gateway

    def known(self, key: Key) -> bool:
        """Whether its gateway has ever named it among those that it has seen: it will hear what is said of it next."""
        record = self._records.get(key)
        return record is not None and record.known

    def meant_by(self, wanted: Key) -> list[Key]:
        """Executions here that a cancel of this key means."""
        return [key for key in self._records if wanted.covers(key)]

    def of(self, gateway: Incarnation) -> list[Key]:
        return [key for key, record in self._records.items() if record.gateway == gateway]

    def unended(self) -> list[Key]:
        return [key for key, record in self._records.items() if record.ending is None]

    # -------------------------------------------------------------------------------------------------------- speaking

    def hold(self, gateway: Incarnation, key: Key, index: int) -> None:
        """The execution is here from now on (beats will say so); nothing is published yet."""
        self._records[key] = Record(gateway, index)

    def start(self, key: Key, transfer_s: float = 0.0, reused_tokens: int = 0) -> None:
        record = self._records.get(key)
        if record is not None:
            self._say(record, Started(key, transfer_s, reused_tokens))

    def tokens(self, key: Key, tokens: list[Token], *, stage_s: float, queued_s: float = 0.0) -> None:
        record = self._records.get(key)
        if record is None or record.ending is not None:
            return
        record.tokens += tokens
        record.index = tokens[-1].index + 1
        self._say(record, Tokens(key, tokens, stage_s, queued_s))

    def end(self, ending: Ending) -> None:
        """The last word on an execution; later ones are ignored."""
        record = self._records.get(ending.key)
        if record is None or record.ending is not None:
            return
        record.ending = ending
        record.launched = False
        self._say(record, ending)

    def launched(self, key: Key, launched: bool) -> None:
        """Whether the execution is part of the launches going on (rule 11)."""
        record = self._records.get(key)
        if record is not None:
            record.launched = launched

    def _say(self, record: Record, event: Started | Tokens | Ending | Resent) -> None:
        self._fresh.setdefault(record.gateway, []).append(event)

    def take(self) -> dict[Incarnation, list[Started | Tokens | Ending | Resent]]:
        """New events by gateway, in order; whoever takes them need not succeed in sending."""
        fresh, self._fresh = self._fresh, {}
        return fresh

    # -------------------------------------------------------------------------------------------------- being answered

    def resend(self, gateway: Incarnation, key: Key, index: int) -> None:
        record = self._records.get(key)
        if record is None:
            self._fresh.setdefault(gateway, []).append(Resent(key, unknown=True))
            return
        kept = [token for token in record.tokens if token.index >= index]
        self._say(record, Resent(key, started=True, tokens=kept, end=record.ending))

    def seen(self, acknowledged: Iterable[tuple[Key, int, bool]]) -> list[Key]:
        """The gateway has seen tokens below an index, or everything. Returns the executions that are forgotten now."""
        over: list[Key] = []
        for key, index, final in acknowledged:
            record = self._records.get(key)
            if record is None:
                continue
            record.known = True
            if final and record.ending is not None:
                del self._records[key]
                over.append(key)
            elif record.tokens and record.tokens[0].index < index:
                record.tokens = [token for token in record.tokens if token.index >= index]
        return over

    def forget(self, key: Key) -> bool:
        """Cancelled: not a word more about it."""
        return self._records.pop(key, None) is not None

    def holding(self, gateway: Incarnation) -> list[Holding]:
        """The beat's word to this gateway."""
        return [
            Holding(key, record.index, record.ending is not None, record.launched)
            for key, record in self._records.items()
            if record.gateway == gateway
        ]
