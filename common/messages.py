"""Everything that crosses a process boundary: jobs (Redis), events (token socket), control messages (control socket).

Tagged msgspec structs, encoded as msgpack; nothing is ever unpickled. New fields have defaults, so that neighbouring versions
can talk; what does not fit the types is refused at decoding (`MessageError`).

Words used throughout: an *incarnation* names one start of one process, and a new one its next role; `attempt` counts the executions the
gateway has started for one (request, choice); `execution` is drawn by the worker at each claim; `handoff` counts offers within a prefill's
incarnation; `index` is the absolute position of an output token of a choice. Durations are seconds on the sender's clock: no stamp leaves
its host.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from common.errors import MessageError

PROTOCOL = 1
"""Version of everything in this file; peers with another one refuse each other in words."""

Incarnation = str
Role = Literal["gateway", "prefill", "decode", "colocated"]
WORKER_ROLES: tuple[Role, ...] = ("prefill", "decode", "colocated")
FinishReason = Literal["stop", "length"]
LostReason = Literal["preempted", "drained", "refused", "no_decode", "failed", "expired"]


# ---------------------------------------------------------------------------------------------------------------- parts


class Key(Struct, frozen=True, array_like=True, gc=False):
    """One execution of one choice of one request: what every event is about."""

    request_id: str
    choice: int
    attempt: int
    execution: str

    def covers(self, other: Key) -> bool:
        """Whether a cancel of this key means `other`: an empty execution means any of that attempt."""
        same = (self.request_id, self.choice, self.attempt) == (other.request_id, other.choice, other.attempt)
        return same and self.execution in ("", other.execution)


class Sampling(Struct, frozen=True, omit_defaults=True):
    """How output tokens are drawn. Temperature 0 is greedy. Random numbers depend on (seed, choice, index) only."""

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int = -1
    """Alternatives reported with each token; 0: the token's own logprob only; -1: none."""


class Logprob(Struct, frozen=True, array_like=True, gc=False):
    """Natural log-probabilities at one position, of the model's distribution before temperature and truncation."""

    own: float
    top: list[tuple[int, float]] = []


class Token(Struct, frozen=True, array_like=True, gc=False):
    """One output token: absolute index, vocabulary id, logprob if asked for."""

    index: int
    id: int
    logprob: Logprob | None = None


class Choice(Struct, frozen=True):
    """A live choice of a request, with the output ids its client has been shown."""

    choice: int
    attempt: int
    accepted: list[int] = []

    @property
    def index(self) -> int:
        """The absolute index of the next output token."""
        return len(self.accepted)


class Layout(Struct, frozen=True):
    """Shape of one page: `[layers, 2, kv_heads, page_tokens, head_dim]` of `dtype`, contiguous. Between workers always of the whole model;
    a rank's own pages hold the `share` of its shard."""

    layers: int
    kv_heads: int
    page_tokens: int
    head_dim: int
    dtype: Literal["float32", "bfloat16", "float16"]

    @property
    def page_bytes(self) -> int:
        width = 4 if self.dtype == "float32" else 2
        return self.layers * 2 * self.kv_heads * self.page_tokens * self.head_dim * width

    def pages(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    def share(self, shard: Shard) -> Layout:
        """Of the pages of a rank that holds this much of the model."""
        (first, last), (low, high) = shard.layers, shard.kv_heads
        return Layout(last - first, high - low, self.page_tokens, self.head_dim, self.dtype)


class Shard(Struct, frozen=True):
    """What one rank of a worker holds: half-open ranges of layers and of KV heads."""

    rank: int
    layers: tuple[int, int]
    kv_heads: tuple[int, int]


# ------------------------------------------------------------------------------------------------------------------ job


class Job(Struct, frozen=True, tag=True):
    """One request on its way to a prefill, through a Redis stream. The engine adds `accepted` to the prompt and goes on at `index`."""

    request_id: str
    gateway: Incarnation
    tokens_address: str
    """Where the gateway's token socket is bound."""
    prompt: list[int]
    choices: list[Choice]
    """The first one leads: its prompt is computed and handed over. The others start on its pages where it draws its tokens."""
    sampling: Sampling
    max_tokens: int
    """Output tokens of a choice in all, those already accepted included."""
    stop_ids: list[int] = []
    """A drawn token among these ends the choice with reason `stop` (and is itself published)."""
    deadline_s: float = 600.0
    """Seconds left, when the job was put, until nobody waits for it any more."""
    age_s: float = 0.0
    """Seconds between acceptance at the gateway and the put: preemption takes the youngest."""
    reserve_all: bool = False
    """Reserve every page the request may ever need: set after a preemption, so that it is not the victim twice."""
    suspicion: int = 0
    """Deaths of workers during a launch that contained this request."""
    alone: bool = False
    """Runs only on an idle worker: two workers have died with it."""
    protocol: int = PROTOCOL


# ----------------------------------------------------------------------------------- worker -> gateway, on the token socket


class Started(Struct, frozen=True, tag=True):
    """The sender runs this execution from now on: a prefill when its first launch begins, a decode when it has committed them.

    `transfer_s` (decode): from the first token to the end of the push, by prefill's clock, and from there to the commit, by decode's.
    """

    key: Key
    transfer_s: float = 0.0
    reused_tokens: int = 0
    """Prefill: tokens whose KV was in its pool already."""


class Tokens(Struct, frozen=True, tag=True):
    """New output tokens. `stage_s`: seconds in the sender's phase so far; `queued_s`: from commit to the first decode launch."""

    key: Key
    tokens: list[Token]
    stage_s: float = 0.0
    queued_s: float = 0.0


class Handed(Struct, frozen=True, tag=True):
    """Prefill has been told `Committed` by `to` and has let go."""

    key: Key
    to: Incarnation


class Finished(Struct, frozen=True, tag=True):
    """The choice ended by itself after `index` output tokens."""

    key: Key
    index: int
    reason: FinishReason


class Lost(Struct, frozen=True, tag=True):
    """The sender gives the execution up, alive and in order; only the reason `failed` counts as suspicion."""

    key: Key
    reason: LostReason
    detail: str = ""


class Resent(Struct, frozen=True, tag=True):
    """Answer to `Resend`: what is still kept from the asked index on, or `unknown`."""

    key: Key
    unknown: bool = False
    started: bool = False
    tokens: list[Token] = []
    end: Finished | Lost | Handed | None = None


class Holding(Struct, frozen=True, array_like=True):
    """A beat's word on one request of the gateway it goes to: published up to `index`, ended or not, part of a launch or only kept."""

    key: Key
    index: int
    """Tokens published so far, as an absolute index of the next one."""
    ended: bool
    launched: bool


class WorkerBeat(Struct, frozen=True, tag=True):
    """Every `BEAT_S`, on the token socket to each gateway (it cannot overtake tokens) and on control to each prefill peer, which also gets
    one in answer to its first."""

    role: Role
    sequence: int
    step: int
    """Launches collected so far, the slowest rank's."""
    busy: bool
    """A launch is under way: `step` must move within `longest_step_s`."""
    longest_step_s: float
    free_pages: int
    total_pages: int
    running: int
    waiting: int
    draining: bool = False
    holding: list[Holding] = []
    """Every request of the receiver that the sender holds, whatever its state."""
    prefill_rate: float = 0.0
    """Prompt tokens/s, measured; 0: not known."""
    backlog_tokens: int = 0
    """Prompt tokens of begun requests that no launch contains yet."""
    step_s: float = 0.0
    """A decode step of b sequences takes `step_s + b * each_s` seconds, measured; 0: not known."""
    each_s: float = 0.0
    elsewhere_tokens: list[int] = []
    """Prompt tokens that wait at other gateways than the receiver, by class of the queue in the order of `names.CLASSES`."""


Event = Started | Tokens | Handed | Finished | Lost | Resent | WorkerBeat


class Parcel(Struct, frozen=True, tag=True):
    """One ZeroMQ message on the token socket: everything one step has for one gateway, in order."""

    sender: Incarnation
    to: Incarnation
    events: list[Event]


# -------------------------------------------------------------------------------------------- gateway -> worker, on control


class GatewayBeat(Struct, frozen=True, tag=True):
    """Every `BEAT_S` to each worker; the first one makes the worker open its token socket to `tokens_address`."""

    sequence: int
    tokens_address: str
    fleet: str
    fingerprint: str
    protocol: int = PROTOCOL
    seen: list[tuple[Key, int, bool]] = []
    """Per held execution: events are acknowledged up to this index; True: its last event too, the worker may forget it."""
    waiting_tokens: list[int] = []
    """Prompt tokens of this gateway's requests that no worker has started yet, by class of the queue."""
    launched: list[Key] = []
    """Suspects that the receiver has said it launches: a death of it now is one in their launch."""


class Cancel(Struct, frozen=True, tag=True):
    """Stop this execution and free what it holds. Unknown executions are fine. An empty execution means: any of that attempt."""

    key: Key


class Resend(Struct, frozen=True, tag=True):
    """Answer with `Resent` on the token socket, from output index `index` on."""

    key: Key
    index: int


# --------------------------------------------------------------------------------------- prefill <-> decode, on control


class PeerBeat(Struct, frozen=True, tag=True):
    """Prefill to decode, every `BEAT_S`: who I am, what each of my ranks holds of the model, and which handoffs I still pursue (the decode
    lapses every other one of mine)."""

    sequence: int
    link: int
    """Raised whenever prefill has closed its side of the transfer link: the decode then closes its own, which lands every earlier grant."""
    fleet: str
    fingerprint: str
    layout: Layout
    shards: list[Shard]
    handoffs: list[int] = []
    protocol: int = PROTOCOL
    checksums: bool = True
    """Whether pages come with them."""


class Offer(Struct, frozen=True, tag=True):
    """Prefill has started `job` and would hand it over: please reserve pages for `length` tokens and room to grow."""

    handoff: int
    """Unique within the sender's incarnation."""
    key: Key
    job: Job
    length: int
    """Tokens whose KV will come: prompt and accepted ids."""
    hashes: list[bytes]
    """Chain hashes of the full pages, in order, 16 bytes each: what the decode holds of them need not be sent."""
    deadline_s: float
    breaks: list[int] | None = None
    """Indices of pages that do not lie behind the page before them here; None: no two can travel together."""


class Pushed(Struct, frozen=True, tag=True):
    """All pages are on their way and the first token is drawn. `checksums[rank]` of what that rank of the decode was sent of the pages that
    were asked for, by sending rank, then in order; empty when checksums are off."""

    handoff: int
    grant: int
    tokens: Annotated[list[tuple[int, Token]], Meta(min_length=1)]
    """(choice, first token) of each live choice."""
    checksums: list[list[int]]
    spent_s: float = 0.0
    """From the first token to this word."""


class Withdraw(Struct, frozen=True, tag=True):
    """Prefill gives the handoff up. What it had not pushed of the grant it flushes with one-byte messages, so that every receive
    completes."""

    handoff: int


class Waiting(Struct, frozen=True, tag=True):
    """The offer stands in line; an answer so that it need not be repeated."""

    handoff: int


class GrantedRank(Struct, frozen=True):
    """Where one rank of the decode wants its pages: its UCX worker address for this peer, and what it holds."""

    shard: Shard
    address: bytes


class Granted(Struct, frozen=True, tag=True):
    """Receives are posted for these pages. `pages[i]` is the i-th page's id, equal on every rank, or -1 if the decode holds it already."""

    handoff: int
    grant: int
    """Numbered per decode incarnation, never reused: with a message's first page and the sending rank it makes the UCX tag."""
    pages: list[int]
    ranks: list[GrantedRank]
    starts: list[int] = []
    """Indices at which a message begins, which takes the pages up to the next (services/transfer/runs.py); none: each page is one."""


class Refused(Struct, frozen=True, tag=True):
    """No such handoff here, or it cannot be taken: try another decode."""

    handoff: int
    reason: str


class Committed(Struct, frozen=True, tag=True):
    """Every rank has verified every page; the pages of prefill may go."""

    handoff: int


class Rejected(Struct, frozen=True, tag=True):
    """These pages of this rank did not verify. The grant is quarantined; push once more under a new one or offer elsewhere."""

    handoff: int
    rank: int
    pages: list[int]


class Withdrawn(Struct, frozen=True, tag=True):
    """Answer to `Withdraw`: the decode shows this handoff to nobody any more. Is `granted` there, its receives still wait for a flush."""

    handoff: int
    granted: Granted | None = None


class Mismatch(Struct, frozen=True, tag=True):
    """The receiver cannot work with the sender, in words (protocol, fleet, fingerprint or layout)."""

    reason: str


ToWorker = GatewayBeat | Cancel | Resend | PeerBeat | Offer | Pushed | Withdraw
ToPeer = WorkerBeat | Waiting | Granted | Refused | Committed | Rejected | Withdrawn | Mismatch


class Letter(Struct, frozen=True, tag=True):
    """One message on a control socket. A letter for another incarnation is not opened: a successor may own the old address."""

    sender: Incarnation
    to: Incarnation
    body: ToWorker | ToPeer


# ----------------------------------------------------------------------------------------------------- fleet, through Redis


class Introduction(Struct, frozen=True, tag=True):
    """What a process tells the others about itself. It says where to knock, never who lives."""

    role: Role
    incarnation: Incarnation
    control_address: str
    fingerprint: str
    layout: Layout | None = None
    shards: list[Shard] = []
    total_pages: int = 0
    protocol: int = PROTOCOL


class Identity(Struct, frozen=True, tag=True):
    """What all members of a fleet share; fixed by the first worker, refreshed by all workers, gone with the last of them."""

    fingerprint: str
    model: str
    """The name clients use."""
    tokenizer: str
    """Hash of the tokenizer's files: the gateway's own must be the same."""
    context_tokens: int
    max_request_pages: int
    page_tokens: int
    protocol: int = PROTOCOL


# ------------------------------------------------------------------------------------------------------------------- codec

_QUOTED = re.compile(r"'.*'", re.DOTALL)
"""Where an error repeats what was sent: that may be somebody's prompt."""
MOST_REASON = 300

_encoder = msgspec.msgpack.Encoder()
_M = TypeVar("_M", bound=Struct)
_decoders: dict[type, msgspec.msgpack.Decoder] = {}  # type: ignore[type-arg]


def encode(message: Struct) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview, kind: type[_M]) -> _M:
    """Decode a message of the given type. Raises MessageError on anything else."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        message: _M = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"not a {kind.__name__}: {_QUOTED.sub('…', str(error))[:MOST_REASON]}") from None
    return message
