"""Prefill's half of the handoff: offer, push, wait for `Committed`, or withdraw and offer elsewhere. Pure: no socket, no clock, no UCX.

Told what happened, it answers with actions. A handoff number is used for one offer to one decode; whatever goes wrong (refusal,
deadline, failed push, rejected page, dead peer) ends that handoff and starts another. Until `Committed` the pages stay here.
"""

from __future__ import annotations

import random

from msgspec.structs import replace

from common.messages import (
    Committed,
    Granted,
    Incarnation,
    Job,
    Key,
    Offer,
    Pushed,
    Refused,
    Rejected,
    Token,
    Waiting,
    Withdraw,
    Withdrawn,
)
from services.engine.binding import less_loaded
from services.prefill.going import Going, Handoff
from services.prefill.moves import Action, FinishPush, Flush, GivenUp, HandedOver, Push, ResetLink, Send
from services.prefill.routing import Holders, Load, choose
from services.transfer.protocol import PushFailed, Sent
from services.transfer.runs import breaks, can_send, complete

REPEAT_S = 0.5
"""A control request is repeated this often until it is answered."""
OFFER_S = 5.0
"""An offer that stands in line longer is withdrawn and made where there is room for it now; one that nobody has answered, anywhere else.
Otherwise it keeps its place, and so does one that must find an empty decode, or all its pages at once: it would be last in each line in
turn, for as long as smaller ones come."""
ANSWER_S = 5.0
"""A live decode that has not judged pushed pages by then is given up."""
FAILURES = 5
"""So many times pages of one execution are rejected, not sent or not judged: then it is given up, for another prefill may do better."""


class Handoffs:
    """All handoffs of one prefill. Decodes are known by `beat` until `peer_dead`."""

    def __init__(
        self, page_tokens: int, rng: random.Random | None = None, *, holders: Holders | None = None, growth_pages: int = 0
    ) -> None:
        """`holders`: what was handed to whom is remembered there, and preferred; None: routed by load alone. `growth_pages`: what a decode
        reserves beyond what is sent."""
        self._page_tokens = page_tokens
        self._growth_pages = growth_pages
        self._holders = holders
        self._rng = rng or random.Random()
        self._going: dict[Key, Going] = {}
        self._by_number: dict[int, Going] = {}
        self._withdrawing: dict[int, Handoff] = {}
        self._decodes: dict[Incarnation, Load] = {}
        """Those that take offers, as their last beat said."""
        self._uncounted: dict[Incarnation, set[int]] = {}
        """Handoffs by decode of which its last beat need not say anything yet, or no more than that they wait (`Handoff.counted`)."""
        self._last = 0
        self.spared_pages = 0
        """Pages that were not sent because the decode held them, of handoffs that it has committed."""

    def __len__(self) -> int:
        return len(self._going)

    def pursued(self, peer: Incarnation) -> list[int]:
        """For the beat to this decode: every handoff with it that is not given up."""
        return [going.handoff.number for going in self._going.values() if going.handoff and going.handoff.peer == peer]

    @property
    def decodes(self) -> int:
        """How many take offers."""
        return len(self._decodes)

    def beat(self, peer: Incarnation, load: Load | None, now: float) -> list[Action]:
        """A decode beats; None: it takes no offers. When one more does, those that found none are made now."""
        new = peer not in self._decodes
        if load is None:
            self._decodes.pop(peer, None)
            return []
        self._decodes[peer] = load
        # What it has granted, it counts: letters and beats keep their order. What is only offered may still be under way.
        self._uncounted[peer] = {number for number in self._uncounted.get(peer, ()) if self._ungranted(number)}
        for number in self._uncounted[peer]:
            handoff = self._by_number[number].handoff
            if handoff is not None:
                handoff.counted = handoff.in_line
        if not new:
            return []
        return [action for going in list(self._going.values()) if going.handoff is None for action in self._offer(going, now)]

    # ------------------------------------------------------------------------------------------- what the engine says

    def begin(self, key: Key, job: Job, length: int, hashes: list[bytes], pages: tuple[int, ...], now: float) -> list[Action]:
        """The prompt has started: offer it now, so that the grant is there before the first page is final."""
        going = self._going[key] = Going(key, job, length, hashes, now, pages)
        return self._offer(going, now)

    def computed(self, key: Key, tokens: int, now: float) -> list[Action]:
        """A chunk is done: pages below `tokens` are final."""
        going = self._going.get(key)
        if going is None:
            return []
        going.final_pages = tokens // self._page_tokens
        return self._push(going, now)

    def drawn(self, key: Key, token: Token, now: float) -> list[Action]:
        """The first token: every page is final, the last partial one too."""
        going = self._going.get(key)
        if going is None:
            return []
        going.first, going.first_at = token, now
        going.final_pages = len(self._needed(going))
        return self._push(going, now)

    def drop(self, key: Key, now: float) -> list[Action]:
        """Cancelled, finished or preempted: nothing is handed over any more."""
        going = self._going.pop(key, None)
        return [] if going is None else self._give_up(going, now)

    # ---------------------------------------------------------------------------------------- what the transfer says

    def sent(self, event: Sent, now: float) -> list[Action]:
        going = self._by_number.get(event.handoff)
        if going is None or going.handoff is None or going.first is None or going.handoff.word is not None:
            return []
        handoff = going.handoff
        tokens = [(going.key.choice, going.first)]
        handoff.word = Pushed(handoff.number, event.grant, tokens, [list(sums) for sums in event.checksums], now - going.first_at)
        handoff.word_at = handoff.asked_at = now
        return [Send(handoff.peer, handoff.word)]

    def push_failed(self, event: PushFailed, now: float) -> list[Action]:
        """One failed page condemns the link: everything on it starts again on a new one, here or elsewhere. It counts against the execution
        whose page it was: what else waited on the link says the same, but has left it by then."""
        going = self._by_number.get(event.handoff)
        handoff = going.handoff if going is not None else self._withdrawing.get(event.handoff)
        if handoff is None:
            return []
        return self._condemn(handoff.peer, now, going, event.reason)

    # --------------------------------------------------------------------------------------------- what a decode says

    def letter(self, peer: Incarnation, body: Waiting | Granted | Refused | Committed | Rejected | Withdrawn, now: float) -> list[Action]:
        if isinstance(body, Withdrawn):
            return self._withdrawn(peer, body)
        gone = self._withdrawing.get(body.handoff)
        if gone is not None and gone.peer == peer:
            if isinstance(body, Granted) and gone.granted is None:
                gone.granted = body
                return self._flush(gone)
            return []
        going = self._by_number.get(body.handoff)
        if going is None or going.handoff is None or going.handoff.peer != peer:
            return []
        handoff = going.handoff
        match body:
            case Waiting():
                handoff.in_line = True
                return []
            case Granted():
                if handoff.granted is not None:
                    return []
                wanted = [i for i, page in enumerate(body.pages) if page >= 0]
                if len(body.pages) != len(self._needed(going)) or not can_send(body.starts, wanted, set(handoff.offer.breaks or ())):
                    return self._again(going, now, f"{len(body.pages)} pages in {len(body.starts)} runs were granted", avoid=True)
                handoff.granted = body
                return self._push(going, now)
            case Refused():
                return self._elsewhere(going, now)
            case Rejected():
                return self._again(going, now, "its pages arrived changed", avoid=going.failures > 0)
            case Committed():
                del self._going[going.key], self._by_number[handoff.number]
                if handoff.granted is not None:
                    self.spared_pages += handoff.granted.pages.count(-1)
                if self._holders is not None:
                    self._holders.handed(going.hashes, peer)
                return [HandedOver(going.key, peer)]

    def peer_dead(self, peer: Incarnation, now: float) -> list[Action]:
        """What was offered to it is offered elsewhere; what was withdrawn from it is over."""
        self._decodes.pop(peer, None)
        self._uncounted.pop(peer, None)
        return [ResetLink(peer), *self._restart(peer, now)]

    def tick(self, now: float) -> list[Action]:
        """Repeats, deadlines, and offers that found no decode before."""
        actions: list[Action] = []
        for gone in self._withdrawing.values():
            if now - gone.asked_at >= REPEAT_S:
                gone.asked_at = now
                actions.append(Send(gone.peer, Withdraw(gone.number)))
        for going in list(self._going.values()):
            actions += self._tick_one(going, now)
        return actions

    # ---------------------------------------------------------------------------------------------------------- inside

    def _tick_one(self, going: Going, now: float) -> list[Action]:
        handoff = going.handoff
        if handoff is None:
            return self._offer(going, now, anywhere=True)
        if handoff.granted is None and now - handoff.offered_at > OFFER_S and (better := self._better(going, handoff)):
            going.avoid = set(self._decodes) - better
            return self._elsewhere(going, now, avoid=False)
        if handoff.word is not None and now - handoff.word_at > ANSWER_S:
            return self._again(going, now, "its pages were not judged")
        if now - handoff.asked_at < REPEAT_S:
            return []
        handoff.asked_at = now
        if handoff.word is not None:
            return [Send(handoff.peer, handoff.word)]
        return [Send(handoff.peer, handoff.offer)] if handoff.granted is None else []

    def _better(self, going: Going, handoff: Handoff) -> set[Incarnation]:
        """Decodes to which an overdue offer moves, if any."""
        if going.job.alone or going.job.reserve_all:
            return set()
        others = set(self._decodes) - {handoff.peer}
        return {name for name in others if self._room(name) >= self._reserved(going)} if handoff.in_line else others

    def _room(self, peer: Incarnation) -> int:
        """Free pages for one offer more, by its last beat and by what of ours already waits for pages there."""
        waiting = [self._by_number[number] for number in self._uncounted.get(peer, ()) if self._ungranted(number)]
        return self._decodes[peer].free_pages - sum(map(self._reserved, waiting))

    def _reserved(self, going: Going) -> int:
        """Pages that a decode grants."""
        return len(self._needed(going)) + self._growth_pages

    def _needed(self, going: Going) -> range:
        return range(-(-going.length // self._page_tokens))

    def _sent_from(self, going: Going) -> tuple[int, ...]:
        return going.pages[: len(self._needed(going))]

    def _offer(self, going: Going, now: float, *, anywhere: bool = False) -> list[Action]:
        """Offer it to a decode that has not just failed; to one that has, only at a tick: failures must not chase each other."""
        peer = self._choose(going, anywhere)
        if peer is None:
            return []
        self._last += 1
        spent = now - going.began_at
        job = replace(going.job, age_s=going.job.age_s + spent, deadline_s=going.job.deadline_s - spent)
        offer = Offer(self._last, going.key, job, going.length, going.hashes, job.deadline_s, list(breaks(self._sent_from(going))))
        going.handoff = Handoff(self._last, peer, offer, now, now)
        self._by_number[self._last] = going
        self._uncounted.setdefault(peer, set()).add(self._last)
        return [Send(peer, offer)]

    def _choose(self, going: Going, anywhere: bool) -> Incarnation | None:
        """By load and by what they hold, the load of two picked at random (the power of two choices); one to avoid only if `anywhere`
        will do."""
        candidates = sorted(set(self._decodes) - going.avoid) or sorted(self._decodes if anywhere else ())
        if not candidates:
            return None
        held = {} if self._holders is None else self._holders.held(going.hashes)
        loads = {name: self._load(name) for name in candidates}
        least = less_loaded(candidates, lambda name: (loads[name].running, -loads[name].free_pages), self._rng)
        return choose(least, loads, held, len(self._needed(going)))

    def _load(self, peer: Incarnation) -> Load:
        """What its beat said, and what we have sent its way meanwhile, committed or not: beats are too rare to spread a burst."""
        said = self._decodes[peer]
        ours = sum(not self._counted(number) for number in self._uncounted.get(peer, ()))
        return Load(said.running + ours, said.free_pages)

    def _counted(self, number: int) -> bool:
        going = self._by_number.get(number)
        return going is not None and going.handoff is not None and going.handoff.counted

    def _ungranted(self, number: int) -> bool:
        going = self._by_number.get(number)
        return going is not None and going.handoff is not None and going.handoff.granted is None

    def _push(self, going: Going, now: float) -> list[Action]:
        """Push what is final and not pushed yet; with the first token drawn, that is everything."""
        handoff = going.handoff
        if handoff is None or handoff.granted is None or handoff.finished:
            return []
        granted, starts = handoff.granted, tuple(handoff.granted.starts)
        ready = going.final_pages if going.first is not None else complete(going.final_pages, starts)
        indices = tuple(i for i in range(handoff.pushed, ready) if granted.pages[i] >= 0)
        handoff.pushed = max(handoff.pushed, ready)
        actions: list[Action] = []
        if indices:
            pages = tuple(going.pages[i] for i in indices)
            actions += [Push(handoff.peer, rank, handoff.number, granted.grant, pages, indices, starts) for rank in granted.ranks]
        if going.first is not None:
            handoff.finished = True
            actions.append(FinishPush(handoff.number, granted.grant))
        return actions

    def _condemn(self, peer: Incarnation, now: float, failed: Going | None, detail: str) -> list[Action]:
        """What goes on over this link starts again on a new one: with another decode at once, with the same at the next tick. `failed`: the
        one whose pages showed it."""
        for going in self._going.values():
            if going.handoff is not None and going.handoff.peer == peer:
                going.avoid = {peer}
        given_up = [] if failed is None else self._failed(failed, detail)  # nobody has to be told of its handoff: the link goes
        return [ResetLink(peer), *self._restart(peer, now), *given_up]

    def _restart(self, peer: Incarnation, now: float) -> list[Action]:
        for number in [n for n, handoff in self._withdrawing.items() if handoff.peer == peer]:
            del self._withdrawing[number]
        actions: list[Action] = []
        for going in list(self._going.values()):
            if going.handoff is not None and going.handoff.peer == peer:
                self._forget(going.handoff)
                going.handoff = None
                actions += self._offer(going, now)
        return actions

    def _again(self, going: Going, now: float, detail: str, *, avoid: bool = True) -> list[Action]:
        """This handoff has failed; the decode is well."""
        given_up = self._failed(going, detail)
        return [*self._give_up(going, now), *given_up] if given_up else self._elsewhere(going, now, avoid=avoid)

    def _elsewhere(self, going: Going, now: float, *, avoid: bool = True) -> list[Action]:
        if avoid and going.handoff is not None:
            going.avoid = {going.handoff.peer}
        return self._give_up(going, now) + self._offer(going, now)

    def _failed(self, going: Going, detail: str) -> list[Action]:
        """One handoff of it more has failed: [] if another may be tried. Otherwise it is gone, and its handoff is the caller's."""
        going.failures += 1
        if going.failures < FAILURES:
            return []
        del self._going[going.key]
        if going.handoff is not None:
            self._forget(going.handoff)
        return [GivenUp(going.key, f"{FAILURES} handoffs failed, the last because {detail}")]

    def _give_up(self, going: Going, now: float) -> list[Action]:
        handoff, going.handoff = going.handoff, None
        if handoff is None:
            return []
        self._forget(handoff)
        self._withdrawing[handoff.number] = handoff
        handoff.asked_at = now
        return [Send(handoff.peer, Withdraw(handoff.number)), *self._flush(handoff)]

    def _forget(self, handoff: Handoff) -> None:
        self._by_number.pop(handoff.number, None)
        self._uncounted.get(handoff.peer, set()).discard(handoff.number)

    def _flush(self, handoff: Handoff) -> list[Action]:
        granted = handoff.granted
        if granted is None or handoff.flushed:
            return []
        handoff.flushed = True
        indices = tuple(i for i in range(handoff.pushed, len(granted.pages)) if granted.pages[i] >= 0)
        if handoff.word is not None and not indices:
            return []
        # Also with nothing left to flush: the transfer would wait for the end of this push for ever.
        return [Flush(handoff.peer, rank, handoff.number, granted.grant, indices, tuple(granted.starts)) for rank in granted.ranks]

    def _withdrawn(self, peer: Incarnation, body: Withdrawn) -> list[Action]:
        handoff = self._withdrawing.get(body.handoff)
        if handoff is None or handoff.peer != peer:
            return []
        del self._withdrawing[body.handoff]
        handoff.granted = handoff.granted or body.granted
        return self._flush(handoff)
