"""What a prefill decides, pure: claims in, outcomes in, letters in; engine commands, pushes and letters out."""

from __future__ import annotations

from typing import TypeAlias

from common.messages import Committed, Granted, Incarnation, Job, Key, Refused, Rejected, Waiting, Withdrawn
from common.queue import Entry
from services.engine.pages import chain_hashes
from services.engine.plan import Began, Computed, Drawn, Failed, Outcome, Preempted
from services.engine.plan import Granted as EngineGranted
from services.prefill import moves
from services.prefill.handoffs import Handoffs
from services.prefill.routing import Load
from services.transfer.protocol import PushFailed, Sent
from services.worker.jobs import leader
from services.worker.outbox import Outbox
from services.worker.runs import Acknowledge, Release, Runs, Stop, Submit

Action: TypeAlias = Submit | Stop | Release | Acknowledge | moves.Send | moves.Push | moves.FinishPush | moves.Flush | moves.ResetLink


class PrefillCore:
    """One prefill's executions and handoffs."""

    def __init__(
        self, outbox: Outbox, ways: Handoffs, *, fingerprint: str, page_tokens: int, max_request_tokens: int, short_tokens: int
    ) -> None:
        self.runs = Runs(outbox, max_request_tokens, parks=True, short_tokens=short_tokens)
        self.handoffs = ways
        self._fingerprint = fingerprint
        self._page_tokens = page_tokens

    def claimed(self, entry: Entry, job: Job, now: float) -> list[Action]:
        return [*self.runs.claimed(entry, job, now)]

    def outcome(self, outcome: Outcome, now: float) -> list[Action]:
        match outcome:
            case Began():
                return self._began(outcome, now)
            case Computed():
                return self._resolve(self.handoffs.computed(outcome.key, outcome.tokens, now))
            case Drawn():
                self.runs.drawn(outcome, now)
                if outcome.finish is not None:
                    return self._resolve(self.handoffs.drop(outcome.key, now))
                return self._resolve(self.handoffs.drawn(outcome.key, outcome.token, now))
            case Preempted() | Failed():
                self.runs.ended(outcome)
                return self._resolve(self.handoffs.drop(outcome.key, now))
            case EngineGranted():
                raise AssertionError("a prefill reserves no pages for others")

    def letter(self, peer: Incarnation, body: Waiting | Granted | Refused | Committed | Rejected | Withdrawn, now: float) -> list[Action]:
        return self._resolve(self.handoffs.letter(peer, body, now))

    def sent(self, event: Sent, now: float) -> list[Action]:
        return self._resolve(self.handoffs.sent(event, now))

    def push_failed(self, event: PushFailed, now: float) -> list[Action]:
        return self._resolve(self.handoffs.push_failed(event, now))

    def beat(self, peer: Incarnation, load: Load | None, now: float) -> list[Action]:
        return self._resolve(self.handoffs.beat(peer, load, now))

    def peer_dead(self, peer: Incarnation, now: float) -> list[Action]:
        return self._resolve(self.handoffs.peer_dead(peer, now))

    def tick(self, now: float) -> list[Action]:
        return self._resolve(self.handoffs.tick(now))

    def cancel(self, key: Key, now: float) -> list[Action]:
        return [*self._resolve(self.handoffs.drop(key, now)), *self.runs.cancel(key)]

    def over(self, key: Key) -> list[Action]:
        return [*self.runs.over(key)]

    def drain(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for key in self.runs.outbox.unended():
            actions += self._resolve(self.handoffs.drop(key, now))
        return [*actions, *self.runs.drain()]

    def _began(self, outcome: Began, now: float) -> list[Action]:
        """Offer at once, so that the grant is there before the first page is final. Short answers stay."""
        run = self.runs.began(outcome, now)
        if run is None or not run.parks or leader(run.job).index + 1 >= run.job.max_tokens:
            return []
        ids = [*run.job.prompt, *leader(run.job).accepted]
        hashes = list(outcome.hashes) or chain_hashes(self._fingerprint, ids, self._page_tokens)
        return self._resolve(self.handoffs.begin(run.key, run.job, len(ids), hashes, outcome.pages, now))

    def _resolve(self, actions: list[moves.Action]) -> list[Action]:
        """A handoff that is completed or given up ends the run here; everything else is for the driver."""
        resolved: list[Action] = []
        for action in actions:
            if isinstance(action, moves.HandedOver):
                resolved += self.runs.handed(action.key, action.to)
            elif isinstance(action, moves.GivenUp):
                resolved += self.runs.lose(action.key, "no_decode", action.detail)
            else:
                resolved.append(action)
        return resolved
