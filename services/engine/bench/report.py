"""The benchmark's result: rows of seconds against bounds, as structs, as a table, and as the planner's profile."""

from __future__ import annotations

from msgspec import Struct

from services.engine.bench.work import Limit


class Ceiling(Struct, frozen=True):
    """Rates per second: floating-point operations of matrix products, bytes read, bytes copied. `ways`: every way that was tried."""

    flops: float
    read_bytes: float
    copy_bytes: float
    ways: dict[str, float]


class Row(Struct, frozen=True):
    """One measurement. `plain`: median seconds of the same through plain transformers, by its attention."""

    name: str
    median_s: float
    least_s: float
    bound_s: float
    bound_by: Limit | None = None
    """None: the bound is a budget, not a rate of the machine."""
    plain: dict[str, float] = {}

    @property
    def reached(self) -> float:
        """Share of the bound, of the median."""
        return self.bound_s / self.median_s


class PrefillPoint(Struct, frozen=True):
    """As the planner's profile has it: whole prompts in one launch."""

    tokens: list[int]
    seconds: float


class DecodePoint(Struct, frozen=True):
    """`batch` sequences, each with `context` tokens of KV."""

    batch: int
    context: int
    seconds: float


class Profile(Struct, frozen=True):
    """What services/planner/profile.py reads, field by field; seconds are medians from launch to collected."""

    prefill: list[PrefillPoint]
    decode: list[DecodePoint]
    kv_bytes_per_token: float
    weight_bytes: float
    memory_bytes: float
    transfer_bytes_per_s: float
    """A copy's: what pages between workers of one host cannot exceed. `./scripts/transfer_bench` measures the real one."""
    overhead_s: float
    """Python of a step of 16 sequences, which a launch measured alone does not have."""
    page_tokens: int
    layers: int
    machine: str
    model: str
    made: str


class Report(Struct, frozen=True):
    device: str
    dtype: str
    kernels: str
    cores: list[int]
    rounds: int
    ceiling: Ceiling
    prefill: list[Row]
    decode: list[Row]
    step: list[Row]
    sampling: list[Row]
    profile: Profile


def table(report: Report) -> str:
    """For people. Seconds as milliseconds; `reached` is the bound over the median."""
    where = report.device if report.device != "cpu" else f"{len(report.cores)} core{'s' * (len(report.cores) > 1)}"
    profile, ceiling = report.profile, report.ceiling
    lines = [
        f"{profile.model}, {report.dtype}, {report.kernels} kernels, {where} of {profile.machine}; {report.rounds} rounds",
        "",
        f"ceilings: products {_giga(ceiling.flops)} GFLOP/s, reads {_giga(ceiling.read_bytes)} GB/s, "
        f"copies {_giga(ceiling.copy_bytes)} GB/s",
        *(f"  {way:50} {_giga(rate)}" for way, rate in ceiling.ways.items()),
    ]
    for title, rows in (("prefill", report.prefill), ("decode", report.decode), ("python", report.step), ("sampling", report.sampling)):
        kinds = sorted({kind for row in rows for kind in row.plain})
        lines += [
            "",
            f"{title:24} {'median ms':>10} {'least ms':>10} {'bound ms':>10} {'reached':>8} {'by':>9}" + "".join(map(_head, kinds)),
        ]
        lines += [_line(row, kinds) for row in rows]
    return "\n".join(lines)


def _head(kind: str) -> str:
    return f" {'plain ' + kind:>13} {'times':>6}"


def _line(row: Row, kinds: list[str]) -> str:
    cells = f"{row.name:24} {row.median_s * 1e3:10.3f} {row.least_s * 1e3:10.3f} {row.bound_s * 1e3:10.3f}"
    cells += f" {row.reached:8.2f} {row.bound_by or 'budget':>9}"
    for kind in kinds:
        if kind in row.plain:
            cells += f" {row.plain[kind] * 1e3:13.1f} {row.plain[kind] / row.median_s:6.2f}"
    return cells


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.1f}"
