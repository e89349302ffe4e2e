"""Settings of every process: one definition each, from which the environment variable, the flag and the help text are derived.

`--max-batch 8` and `BATON_MAX_BATCH=8` say the same; the flag wins, and an empty variable says nothing. A bad value is a SettingError
that names the setting, and the process ends with that one line.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar

from common.errors import SettingError

PREFIX = "BATON_"
TESTS = "BATON_TEST_"
"""Variables of the test suite, which are no settings of a process."""

MOST_CORES = 65536

Device = Literal["cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
PolicyName = Literal["prefill_first", "chunked"]
Kernels = Literal["auto", "native", "torch"]
Anonymous = Literal["loopback", "anyone"]


def setting(default: Any, help_text: str, *, low: float | None = None, high: float | None = None, secret: bool = False) -> Any:
    """A setting with its default, its help, and the range a number must lie in. A secret one is never printed."""
    return field(default=default, repr=not secret, metadata={"help": help_text, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    redis_url: str = setting("redis://127.0.0.1:6379/0", "Redis 7 or Valkey 8, or newer", secret=True)
    fleet: str = setting("default", "processes of one fleet serve one model together")
    redis_password_file: str | None = setting(None, "file with the password for redis_url, so that it stands in no environment")
    redis_ca_file: str | None = setting(None, "certificates that a rediss:// server must be signed by; default: the system's")
    fleet_secret_file: str | None = setting(
        None, "file with the fleet's secret: tokens and control are then encrypted, and peers without it are refused"
    )
    host: str = setting(
        "127.0.0.1", "address on which internal sockets are bound and announced to the fleet; auto: the one by which Redis is reached"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe line to log")
    log_format: Literal["text", "json"] = setting("text", "log lines for people or for machines")
    ready_file: str | None = setting(None, "file written when the process is ready; `--check` looks at it")
    drain_s: float = setting(20.0, "grace after SIGTERM", low=0, high=3600)
    message_fault: str = setting("", "injected faults of internal messages, for tests: drop:N, delay:NxS or both, every N-th on a socket")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(CommonSettings):
    model: str = setting("", "folder of the model (config, tokenizer, safetensors)")
    model_name: str | None = setting(None, "the name clients use; default: the folder's name")
    device: Device = setting("cpu", "where to compute")
    gpu: str = setting(
        "auto",
        "with device cuda: a free GPU of this host by a lease in Redis (auto), the one with this index or UUID, or torch's choice (none)",
    )
    gpu_percent: int = setting(
        100,
        "share of the card's multiprocessors that this worker may use at most, with NVIDIA's MPS; for workers that share a card",
        low=1,
        high=100,
    )
    dtype: DType = setting("auto", "of weights and KV; auto: the model's own")
    tp: int = setting(1, "tensor parallelism: ranks among which the heads of each layer are divided", low=1, high=64)
    pp: int = setting(1, "pipeline parallelism: stages of consecutive layers; the worker has tp times pp ranks", low=1, high=64)
    cores: str | None = setting(None, "CPU cores for this worker, as 0 or 0-3 or 0,2; default: all it may use")
    pages: int | None = setting(None, "pages of KV in the pool; default: from free memory", low=1)
    memory_fraction: float = setting(
        0.25,
        "share of the free memory that becomes the KV pool: of what is left by the weights, 256 MiB and (on a CPU) other workers' pools",
        low=0.01,
        high=0.95,
    )
    page_tokens: int = setting(16, "tokens of KV in a page", low=1, high=1024)
    max_request_tokens: int | None = setting(None, "largest request, prompt and answer; default: the model's context", low=2)
    kernels: Kernels = setting(
        "auto", "native: our own (CPU cores; Triton on a GPU), torch: transformers with torch; auto: the faster that runs"
    )
    kernels_folder: str | None = setting(None, "compiled kernels, for hosts without a compiler; what is not there is compiled and cached")
    prefix_reuse: bool = setting(True, "keep pages after their last user and share them with prompts that begin alike")
    checksums: bool = setting(True, "verify every page that is handed over")
    policy: PolicyName = setting("prefill_first", "how a step is composed when both phases share an engine")
    short_tokens: int = setting(
        4, "answers of up to so many tokens are written where their prompt was read; 0: every answer is handed over", low=0, high=1024
    )
    max_batch: int = setting(256, "sequences in one decode step", low=1, high=4096)
    growth_pages: int = setting(2, "pages a granted handoff reserves beyond what is sent", low=0, high=1024)
    budget_tokens: int | None = setting(None, "prompt tokens in one launch; default: measured at start", low=1)
    chunk_s: float = setting(0.5, "a long prompt runs in chunks of about this long", low=0.01, high=60)
    metrics_port: int = setting(0, "port for Prometheus on `host`; 0: any free one, named in the ready file", low=0, high=65535)
    fault: str = setting("", "injected transfer fault, for tests: fail:N, stall:N or corrupt:N, every N-th page")
    die: str = setting(
        "",
        "injected death, for tests: STAGE:N kills the worker at that stage's N-th request (prefill_queue, decode_queue), computed chunk "
        "(prefill), handoff (transfer) or drawn token (decode), poison:ID by a launch of a prompt that begins with this token; with "
        "hang:ID such a launch never ends. A colocated worker knows the last two only",
    )


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(CommonSettings):
    model: str = setting("", "folder of the model; only its configuration and tokenizer are read")
    model_name: str | None = setting(None, "the name clients use; default: the folder's name")
    http_host: str = setting("127.0.0.1", "address of the HTTP server")
    http_port: int = setting(8000, "port of the HTTP server", low=0, high=65535)
    max_body_bytes: int = setting(4 << 20, "largest request body", low=1024)
    max_bodies_bytes: int = setting(
        256 << 20, "all request bodies that are being read, beyond 64 KiB of each; a further one is answered 503", low=1024
    )
    max_running: int = setting(1024, "answers under way at once (n of a request); more are answered 429", low=1)
    max_queued: int = setting(256, "requests that wait for a prefill; more are answered 429", low=1)
    max_ttft_s: float = setting(
        30.0, "a request that waits and whose first token is predicted to take longer is answered 429", low=0.01, high=86400
    )
    max_tpot_s: float | None = setting(
        None, "a request with which the decodes' steps are predicted to take longer is answered 429; default: no limit", low=0.001, high=60
    )
    slo_ttft_s: float = setting(0.5, "time to the first token that baton_good_requests counts as good", low=0.001, high=3600)
    slo_tpot_s: float = setting(0.05, "time per output token that baton_good_requests counts as good", low=0.0001, high=60)
    deadline_s: float = setting(600.0, "a request that is not complete by then is given up", low=1, high=86400)
    write_timeout_s: float = setting(60.0, "a client that takes nothing for this long is disconnected", low=1, high=3600)
    max_connections: int = setting(4096, "HTTP connections at once; a further one is answered 503", low=1, high=1_000_000)
    api_keys: str = setting("", "keys that clients must show: [NAME:]KEY or [NAME:]sha256:DIGEST, separated by commas", secret=True)
    api_keys_file: str | None = setting(None, "file with more of them, one a line; # begins a comment")
    key_running: int | None = setting(None, "requests of one key at once; more are answered 429; default: no limit", low=1)
    key_requests_per_minute: int | None = setting(
        None, "requests of one key within a minute; more are answered 429; default: no limit", low=1, high=100_000
    )
    key_tokens_per_minute: int | None = setting(
        None, "tokens of one key within a minute, prompts and answers; more are answered 429; default: no limit", low=1, high=1_000_000_000
    )
    allow_anonymous: Anonymous = setting(
        "loopback", "whom to serve without keys: this host only (loopback), or anyone who reaches the port"
    )
    cors_origins: str = setting("", "origins whose web pages may call the API, separated by commas, as https://chat.example.org; * for all")


S = TypeVar("S", bound=CommonSettings)


def load(kind: type[S], argv: Sequence[str], environ: Mapping[str, str]) -> S:
    """Settings of this kind from flags and environment. Raises SettingError; `--help` raises SystemExit after printing."""
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, text in _words(kind, argv, environ):
        if name in known:
            values[name] = parse(name, text, hints[name], known[name].metadata)
    return kind(**values)


def _words(kind: type[CommonSettings], argv: Sequence[str], environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """(setting, text) pairs, the environment's first, so that flags win."""
    names = {f.name for f in fields(kind)}
    every = {f.name for one in (WorkerSettings, GatewaySettings) for f in fields(one)}
    pairs = []
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and not variable.startswith(TESTS):
            name = variable.removeprefix(PREFIX).lower()
            if name not in every:
                raise SettingError(f"{variable}: no such setting{_nearest(name, every, lambda n: PREFIX + n.upper())}")
            if text:
                pairs.append((name, text))
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(help_text(kind))
            raise SystemExit(0)
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in names:
            raise SettingError(f"{flag}: no such setting{_nearest(name, names, lambda n: '--' + n.replace('_', '-'))}")
        if not equals:
            if not words:
                raise SettingError(f"{flag}: a value is missing")
            text = words.pop(0)
        pairs.append((name, text))
    return pairs


def _nearest(name: str, among: set[str], spell: Any) -> str:
    near = difflib.get_close_matches(name, among, n=1)
    return f"; did you mean {spell(near[0])}?" if near else ""


def parse(name: str, text: str, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """One value. Raises SettingError naming the setting and what it may be."""
    if isinstance(hint, types.UnionType):
        if text == "":
            return None
        hint = next(part for part in hint.__args__ if part is not type(None))
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if text not in options:
            raise SettingError(f"{name} is {text!r}; it must be one of {', '.join(options)}")
        return text
    if hint is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise SettingError(f"{name} is {text!r}; it must be true or false")
    if hint in (int, float):
        try:
            number = hint(text)
        except ValueError:
            raise SettingError(f"{name} is {text!r}; it must be {'a whole number' if hint is int else 'a number'}") from None
        low, high = metadata.get("low"), metadata.get("high")
        if number != number or (low is not None and number < low) or (high is not None and number > high):
            bounds = " and ".join(f"at {word} {bound:g}" for word, bound in (("least", low), ("most", high)) if bound is not None)
            raise SettingError(f"{name} is {text}; it must be {bounds or 'a number'}")
        return number
    return text


def help_text(kind: type[CommonSettings]) -> str:
    """Every setting in both spellings, with default and meaning."""
    lines = []
    for f in fields(kind):
        default = "" if f.default in (None, "", MISSING) else f" [{f.default}]"
        lines.append(f"  --{f.name.replace('_', '-'):22} {PREFIX + f.name.upper():26} {f.metadata['help']}{default}")
    return "\n".join([f"settings of {kind.__name__.removesuffix('Settings').lower()} processes, as flag or variable:", *lines])


def cores(text: str) -> list[int]:
    """ "0-2,4" as [0, 1, 2, 4]. Raises SettingError."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or not int(first) <= int(last or first) < MOST_CORES:
            raise SettingError(f"cores is {text!r}; it must be like 0 or 0-3 or 0,2")
        found += range(int(first), int(last or first) + 1)
    return found
