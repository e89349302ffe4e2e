"""What the gateway counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from common.slo import CHATBOT, Objectives, Served, attains, tpot_s
from gateway.ask import Timeline
from gateway.demand import Asked, Demand
from gateway.recent import Recent

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60, 120)
TPOT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1)
SHED = ("overloaded", "service_unavailable_error")
REENQUEUE_SECONDS = (0.5, 1, 1.5, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 10, 30)
STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other")


class Metrics:
    """One gateway's figures, in a registry of their own. `objectives`: what a good request meets."""

    def __init__(self, objectives: Objectives = CHATBOT) -> None:
        self._objectives = objectives
        self.recent = Recent()
        self.demand = Demand()
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("baton_requests", "Answers by outcome, and refused requests", ["outcome"], registry=r)
        self.prompt_tokens = Counter("baton_prompt_tokens", "Tokens of accepted prompts", registry=r)
        self.output_tokens = Counter("baton_output_tokens", "Tokens shown to clients", registry=r)
        self.running = Gauge("baton_running", "Answers accepted and not ended, of this gateway", registry=r)
        self.queued = Gauge("baton_queued", "Requests accepted and not begun by a worker, of this gateway", registry=r)
        self.good = Counter(
            "baton_good_requests",
            f"Answers with TTFT up to {objectives.ttft_s:g} s and TPOT up to {objectives.tpot_s:g} s (slo_ttft_s, slo_tpot_s)",
            registry=r,
        )
        self.workers = Gauge("baton_workers", "Live workers by role", ["role"], registry=r)
        self.free_pages = Gauge("baton_free_pages", "Free pages by role", ["role"], registry=r)
        self.recoveries = Gauge("baton_recoveries", "Attempts started anew since the start", registry=r)
        self.reenqueue = Histogram(
            "baton_reenqueue_seconds",
            "From the last word of a worker that was lost to the new attempt in the queue",
            buckets=REENQUEUE_SECONDS,
            registry=r,
        )
        self.refused_messages = Gauge("baton_refused_messages", "Messages of the fleet's sockets that were not taken", registry=r)
        self.ttft = Histogram("baton_ttft_seconds", "Time to the first token", buckets=SECONDS, registry=r)
        self.tpot = Histogram("baton_tpot_seconds", "Mean time per output token after the first", buckets=TPOT_SECONDS, registry=r)
        self.total = Histogram("baton_request_seconds", "From acceptance to the last token", buckets=SECONDS, registry=r)
        self.stages = Histogram("baton_stage_seconds", "The stages of a request", ["stage"], buckets=SECONDS, registry=r)

    def refused(self, outcome: str) -> None:
        """A request has not been accepted: an error's name. One that was shed counts as served badly, a bad one does not count."""
        self.requests.labels(outcome).inc()
        if outcome in SHED:
            self.recent.note(Served(0.0, 0.0, 0, ok=False), time.monotonic())

    def ended(self, outcome: str, timeline: Timeline, prompt_tokens: int, output_tokens: int) -> None:
        """An accepted request is over: `outcome` is stop, length, cancelled or an error's name. `prompt_tokens` 0: another choice counts
        the prompt, which no worker has read for this one."""
        self.requests.labels(outcome).inc()
        self.prompt_tokens.inc(prompt_tokens)
        self.output_tokens.inc(output_tokens)
        whole = outcome in ("stop", "length")
        if outcome != "cancelled":
            paced = tpot_s(timeline.ttft_s, timeline.total_s, output_tokens)
            served = Served(timeline.ttft_s, paced, output_tokens, ok=whole)
            self.recent.note(served, time.monotonic())
            self.good.inc(attains(served, self._objectives))
        if not whole:
            return
        if prompt_tokens:
            self.demand.note(Asked(time.monotonic() - timeline.total_s, prompt_tokens, output_tokens))
        self.ttft.observe(timeline.ttft_s)
        self.total.observe(timeline.total_s)
        if output_tokens > 1:
            self.tpot.observe(paced)
        for stage in STAGES:
            self.stages.labels(stage).observe(getattr(timeline, f"{stage}_s"))

    def text(self) -> bytes:
        return generate_latest(self.registry)
