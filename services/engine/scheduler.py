"""Decides what each launch contains and who has which pages. Pure Python: no torch, no clock, no socket; one thread at a time.

Who gets pages, in this order: running sequences that grow, oldest first; offers in line; waiting prompts. Who loses them: the youngest
running or prefilling sequence that is not reserved in full. A page is never given back while a launch in flight names it.
"""

from __future__ import annotations

from collections import deque
from operator import attrgetter

from common.messages import Key, Token
from services.engine.inbound import InboundLine
from services.engine.pages import PagePool
from services.engine.plan import Began, Chunk, Computed, Drawn, Failed, Handoff, Outcome, Plan, Preempted, Snapshot, StepOutput
from services.engine.policies import POLICIES, Limits, PolicyName
from services.engine.prefixes import Prefixes
from services.engine.run import Roster, Run, Stage, most_here
from services.engine.sequence import Sequence


class Scheduler:
    """Continuous batching over one page pool. With `depth` 2 the next launch is planned before the last one is collected.

    With `reuse` (the fingerprint of what is computed) full pages can be found by their tokens, and a prompt whose beginning lies in the
    pool shares those pages instead of computing them, a handoff instead of having them sent.

    With `stages` a launch takes as many turns as the model has stages, and its tokens are known only after the last: a running sequence is
    in one launch at a time, and a launch takes its share of them, so that with `depth` as large every stage has one.
    """

    def __init__(
        self, pool: PagePool, policy: PolicyName, limits: Limits, *, depth: int = 1, stages: int = 1, reuse: str | None = None
    ) -> None:
        if depth < 1:
            raise ValueError(f"{depth} launches in flight")
        self._pool = pool
        self._policy = POLICIES[policy]
        self._limits = limits
        self._depth = depth
        self._stages = stages
        self._prefixes = None if reuse is None else Prefixes(pool, reuse)
        self._looked_up = 0
        self._reused = 0
        self._roster = Roster(pool)
        self._inbound = InboundLine(pool)
        self._flights: deque[tuple[Plan, list[Run]]] = deque()
        self._planned = 0
        self._collected = 0
        self._outcomes: list[Outcome] = []

    # -------------------------------------------------------------------------------------------------------- commands

    def submit(self, sequence: Sequence) -> None:
        """A prompt to compute. Raises ValueError if it can never fit, or if its key is here already."""
        self._check_fits(sequence)
        self._roster.accept(sequence, Stage.WAITING)

    def cancel(self, key: Key) -> None:
        """Forget this execution, whatever its state; an empty execution means any of that attempt. Unknown ones are fine."""
        for run in [run for run in self._roster.runs.values() if key.covers(run.sequence.key)]:
            self._roster.drop(run)
        for handoff, sequence in self._inbound.sequences():
            if key.covers(sequence.key):
                self.lapse(handoff)

    def release(self, key: Key) -> None:
        """Handed over: its pages may go. Unknown executions are fine."""
        run = self._roster.runs.get(key)
        if run is not None:
            self._roster.drop(run)

    def reserve(self, handoff: Handoff, sequence: Sequence) -> None:
        """Stand in line for pages; `Granted` says when its turn has come. Repeats are fine. Raises ValueError if it can never fit."""
        self._check_fits(sequence)
        if self._inbound.reserve(handoff, sequence):
            self._roster.enter(sequence)

    def admit(self, handoff: Handoff, token: Token) -> None:
        """All pages of the grant are verified, and prefill drew `token`: the sequence runs from now on, unless its execution runs here
        already through another handoff. Raises ValueError without a live grant, or if the token is not the next one."""
        sequence, pages = self._inbound.admit(handoff)
        self._roster.leave(sequence)
        if sequence.key in self._roster.runs:
            self._pool.release(pages)
            return
        run = self._roster.accept(sequence, Stage.RUNNING)
        self._roster.give(run, pages)
        sequence.planned = sequence.computed = run.known
        if self._prefixes is not None:
            self._prefixes.remember(sequence, 0)
        self._fork(run)
        self._append(run, token, drawn=False)

    def lapse(self, handoff: Handoff) -> None:
        """The handoff is given up. Pages that it has been granted stay in transit until `landed`."""
        sequence = self._inbound.lapse(handoff)
        if sequence is not None:
            self._roster.leave(sequence)

    def landed(self, handoff: Handoff) -> None:
        """Nothing can write into the pages of this handoff's grant any more."""
        sequence = self._inbound.landed(handoff)
        if sequence is not None:
            self._roster.leave(sequence)

    # ----------------------------------------------------------------------------------------------------------- steps

    def next(self) -> Plan | None:
        """The next launch, in flight from now on; None if there is nothing to do or enough is in flight."""
        if len(self._flights) >= self._depth:
            return None
        growing, tight = self._grow()
        if not tight:
            self._grant()
        ready = self._ready(tight)
        share = self._policy([run.lacking for run in ready], len(growing), self._limits)
        runs = growing[: share.decodes]
        chunks = [Chunk((s := run.sequence), s.planned, 1, True, len(s.ids) - s.prompt_tokens + run.ahead, run.ahead > 0) for run in runs]
        for run, tokens in zip(ready, share.prefill, strict=False):
            chunks.append(self._prefill(run, tokens))
            runs.append(run)
        if not chunks:
            return None
        announced: list[Key] = []
        for run, chunk in zip(runs, chunks, strict=True):
            run.flights += 1
            run.ahead += chunk.draws
            sequence = run.sequence
            sequence.planned += chunk.tokens
            if not sequence.began:
                sequence.began = True
                if sequence.suspect and chunk.start < run.known:
                    announced.append(sequence.key)
                self._outcomes.append(Began(sequence.key, tuple(sequence.pages), sequence.reused, tuple(sequence.hashes)))
                if sequence.reused:
                    self._outcomes.append(Computed(sequence.key, sequence.reused, tuple(sequence.pages)))
        self._planned += 1
        plan = Plan(self._planned, tuple(chunks), tuple(announced))
        self._flights.append((plan, runs))
        return plan

    def commit(self, plan: Plan, output: StepOutput) -> None:
        """A launch has been collected: the oldest in flight. Raises ValueError on another one, or if draws are missing."""
        if not self._flights or self._flights[0][0] is not plan:
            raise ValueError(f"launch {plan.number} is not the oldest in flight")
        _, runs = self._flights.popleft()
        self._collected += 1
        collected, prefixes = self._roster.collected, self._prefixes
        for run, chunk, draw in zip(runs, plan.chunks, output.draws, strict=True):
            if not collected(run):
                continue
            sequence, start = run.sequence, chunk.start
            sequence.computed = start + chunk.tokens
            if start < run.known:
                self._outcomes.append(Computed(sequence.key, sequence.computed, tuple(sequence.pages)))
            if prefixes is not None:
                prefixes.remember(sequence, start)
            if chunk.draws:
                if draw is None:
                    raise ValueError(f"launch {plan.number} drew no token for {sequence.key}")
                run.ahead -= 1
                if sequence.forks:
                    self._fork(run)
                self._append(run, Token(chunk.index, draw.id, draw.logprob), drawn=True)

    def abort(self, plan: Plan, error: str) -> None:
        """A launch raised, or its collection did: every sequence in it has failed. Raises ValueError if it is not in flight."""
        for flight in self._flights:
            if flight[0] is plan:
                break
        else:
            raise ValueError(f"launch {plan.number} is not in flight")
        self._flights.remove(flight)
        self._collected += 1
        for run in flight[1]:
            if self._roster.collected(run):
                self._roster.drop(run)
                self._outcomes.append(Failed(run.sequence.key, error))

    # --------------------------------------------------------------------------------------------------------- reports

    def take_outcomes(self) -> list[Outcome]:
        """What has happened since the last call, in order."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def snapshot(self) -> Snapshot:
        roster = self._roster
        return Snapshot(
            step=self._collected,
            in_flight=len(self._flights),
            waiting=len(roster.waiting),
            unplanned_tokens=roster.unplanned_tokens,
            running=len(roster.prefilling) + len(roster.running),
            parked=len(roster.parked),
            inbound=len(self._inbound),
            pool=self._pool.counts,
            looked_up=self._looked_up,
            reused=self._reused,
        )

    def find(self, key: Key) -> Sequence | None:
        run = self._roster.runs.get(key)
        return None if run is None else run.sequence

    def keys(self) -> tuple[Key, ...]:
        """Every execution that waits, runs or is parked here."""
        return tuple(self._roster.runs)

    # ----------------------------------------------------------------------------------------------------------- pages

    def _check_fits(self, sequence: Sequence) -> None:
        pages = self._pool.pages_for(most_here(sequence))
        if pages > self._pool.total:
            raise ValueError(f"{sequence.key} may need {pages} pages, the pool has {self._pool.total}")

    def _first_pages(self, sequence: Sequence, growth_pages: int) -> int:
        """Pages it gets before its first launch here."""
        known, most = self._pool.pages_for(len(sequence.ids)), self._pool.pages_for(most_here(sequence))
        return most if sequence.reserve_all else min(known + growth_pages, most)

    def _grow(self) -> tuple[list[Run], bool]:
        """The running sequences that can draw one more token, oldest first, with a page for it. True: pages are so tight that a
        sequence has lost its own, and nobody else may have any in this launch."""
        growing: list[Run] = []
        awaited = 0
        preempted = False
        running = self._roster.running.copy()
        share = -(-len(running) // self._stages)
        for run in running:
            if len(growing) == share:
                break
            if run.stage is not Stage.RUNNING or run.sequence.planned >= run.most or (self._stages > 1 and run.ahead):
                continue
            while run.sequence.planned >= run.room:
                page = self._pool.allocate(1)
                if page is not None:
                    self._roster.give(run, page)
                elif self._roster.leaving_pages > awaited:
                    awaited += 1  # it comes with the collection of what is in flight: no need to preempt for it
                    break
                else:
                    # Never one that is in `growing` already: those are older, and the needy one itself is a candidate.
                    victim = self._roster.youngest()
                    self._roster.drop(victim)
                    self._outcomes.append(Preempted(victim.sequence.key))
                    preempted = True
                    if victim is run:
                        break
            else:
                growing.append(run)
        # What a preemption leaves over is for the growth of the others; with nobody left to grow, the engine would stand still.
        return growing, preempted and len(growing) > 0

    def _grant(self) -> None:
        """Pages for the offers in line, strictly in turn, while there are places. A prompt that must run alone holds them up, and so does
        one that was accepted before (a further choice, on a decode), or it would never start."""
        roster, waiting = self._roster, self._roster.waiting
        places = self._limits.max_batch - len(roster.prefilling) - len(roster.running) - self._inbound.granted
        while places > 0 and (head := self._inbound.head) is not None and roster.may_enter(head):
            if waiting and ((waiting[0].sequence.alone and not head.alone) or waiting[0].sequence.order < head.order):
                return
            places -= 1
            granted = self._inbound.grant(self._first_pages(head, self._limits.growth_pages), self._known(head, len(head.ids)))
            if granted is None:
                return
            if self._prefixes is not None:
                self._looked_up += len(head.ids)
                self._reused += granted.shared * self._pool.page_tokens
            self._roster.enter(head)
            self._outcomes.append(granted)

    def _known(self, sequence: Sequence, tokens: int) -> tuple[int, ...]:
        """Pages of the pool that hold its first tokens, at most so many."""
        return () if self._prefixes is None else self._prefixes.known(sequence, tokens)

    def _ready(self, tight: bool) -> list[Run]:
        """Prompts with their pages and, strictly in turn, those that could have theirs now; enough of them for any policy."""
        roster, limits = self._roster, self._limits
        head = self._inbound.head
        if tight or not roster.waiting or (head is not None and head.alone and head.order <= roster.waiting[0].sequence.order):
            return roster.prefilling.copy()
        ready = roster.prefilling.copy()
        places = limits.max_batch - len(roster.prefilling) - len(roster.running)
        pages = self._pool.available
        tokens = 0
        for run in roster.waiting.copy():
            places -= 1
            crowded = run.sequence.alone and len(ready) > 0
            if places < 0 or tokens >= limits.budget_tokens or crowded or not roster.may_enter(run.sequence):
                break
            known = self._known(run.sequence, run.known - 1)  # its last token is left to be computed, to draw from
            pages -= self._first_pages(run.sequence, 0) - len(known) + self._pool.idle(known)
            if pages < 0:
                break
            if known:
                self._share(run, known)
            ready.append(run)
            tokens += min(run.lacking, limits.chunk_tokens)
            if run.sequence.alone:
                break
        ready.sort(key=attrgetter("rank"))
        return ready

    def _share(self, run: Run, found: tuple[int, ...]) -> None:
        """A prompt that may enter, and whose beginning is in the pool, gets all its first pages now: those and new ones. The caller has
        seen that there is room."""
        self._looked_up += run.known
        sequence = run.sequence
        self._pool.share(found)
        own = self._pool.allocate(self._first_pages(sequence, 0) - len(found))
        assert own is not None, "a prompt was let in without pages for it"
        self._roster.give(run, (*found, *own))
        sequence.planned = sequence.computed = sequence.reused = len(found) * self._pool.page_tokens
        self._roster.unplanned_tokens -= sequence.reused
        self._reused += sequence.reused
        self._roster.move(run, Stage.PREFILLING)

    def _fork(self, run: Run) -> None:
        """The prompt is computed: its other choices share all of its pages but the last, whose tokens each computes anew to draw its own
        first token. One for which there is no place or no page now waits its turn like any prompt, and shares nothing."""
        roster = self._roster
        forks, run.sequence.forks = run.sequence.forks, ()
        for sequence in forks:
            if sequence.key in roster.runs:
                continue
            fork = roster.accept(sequence, Stage.WAITING)
            if len(roster.prefilling) + len(roster.running) >= self._limits.max_batch:
                continue
            shared = run.sequence.pages[: (sequence.prompt_tokens - 1) // self._pool.page_tokens]
            own = self._pool.allocate(self._first_pages(sequence, 0) - len(shared))
            if own is None:
                continue
            self._pool.retain(shared)
            roster.give(fork, (*shared, *own))
            sequence.hashes = run.sequence.hashes[: len(shared)]
            sequence.planned = sequence.computed = len(shared) * self._pool.page_tokens
            roster.unplanned_tokens -= sequence.planned
            roster.move(fork, Stage.PREFILLING)

    # ---------------------------------------------------------------------------------------------------------- chunks

    def _prefill(self, run: Run, tokens: int) -> Chunk:
        if run.stage is Stage.WAITING:
            pages = self._pool.allocate(self._first_pages(run.sequence, 0))
            assert pages is not None, "a prompt was ready without pages for it"
            self._looked_up += run.known if self._prefixes is not None else 0
            self._roster.give(run, pages)
            self._roster.move(run, Stage.PREFILLING)
        self._roster.unplanned_tokens -= tokens
        draws = tokens == run.lacking
        chunk = Chunk(run.sequence, run.sequence.planned, tokens, draws, run.sequence.index)
        if draws:
            self._roster.move(run, Stage.RUNNING)
        return chunk

    def _append(self, run: Run, token: Token, *, drawn: bool) -> None:
        """The sequence's next output token, which may be its last one here. One that prefill drew is news only if it ends it."""
        sequence = run.sequence
        if token.index != len(sequence.ids) - sequence.prompt_tokens:  # `index`, whose call would be a twelfth of a large step
            raise ValueError(f"token {token.index} of {sequence.key} comes where {sequence.index} is due")
        sequence.ids.append(token.id)
        finish = sequence.ends_with(token.id)
        if drawn or finish is not None:
            self._outcomes.append(Drawn(sequence.key, token, finish))
        if finish is not None:
            self._roster.drop(run)
        elif sequence.parks:
            self._roster.move(run, Stage.PARKED)
