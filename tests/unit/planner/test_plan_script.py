"""`./scripts/plan`: the compose file starts the placement, words are honest about what workers cannot do, options are checked."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from common.settings import WorkerSettings, load
from common.slo import Objectives
from scripts.load.workloads import Shape, Workload, WorkloadError
from scripts.planning import __main__ as script
from scripts.planning.compose import override
from scripts.planning.demand import drawn, measured, traced, wanted
from scripts.planning.options import parse
from services.planner.costs import Parallel
from services.planner.placement import Colocated, Disaggregated, Group, Placement
from tests.unit.compose_files import BASE, ROOT, filled, merged
from tests.unit.planner.test_profile import document

ONE, WIDE, DEEP = Parallel(1, 1), Parallel(2, 1), Parallel(3, 2)


@pytest.mark.parametrize("under", [(BASE,), (BASE, ROOT / "compose/cpu.yml")], ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    ("where", "scales"),
    [
        (Disaggregated(Group(ONE, 2), Group(ONE, 3)), {"prefill": 2, "decode": 3}),
        (Colocated(Group(ONE, 4), "chunked", 512), {"prefill": 4, "decode": 0}),
        (Colocated(Group(ONE, 4)), {"prefill": 4, "decode": 0}),
        (Disaggregated(Group(WIDE, 2), Group(DEEP, 1)), {"prefill": 2, "decode": 1}),
        (Colocated(Group(WIDE, 2), "chunked", 512), {"prefill": 2, "decode": 0}),
    ],
    ids=str,
)
def test_the_override_starts_the_placement(tmp_path: Path, under: tuple[Path, ...], where: Placement, scales: dict[str, int]) -> None:
    text, cannot = override(where, "./scripts/plan --gpus 5")
    assert not cannot
    path = tmp_path / "plan.yml"
    path.write_text(text)
    services = filled(merged(*under, path), {"COMPOSE_PROJECT_NAME": "baton"})["services"]
    assert {name: int(services[name]["scale"]) for name in scales} == scales
    base = filled(merged(*under), {"COMPOSE_PROJECT_NAME": "baton"})["services"]
    assert all(type(services[name]["scale"]) is type(base[name]["scale"]) for name in scales), "podman-compose merges like with like only"
    settings, of_decodes = (
        load(WorkerSettings, [], {key: str(value) for key, value in services[name]["environment"].items()})
        for name in ("prefill", "decode")
    )
    groups = (where.group, Group(ONE, 0)) if isinstance(where, Colocated) else (where.prefill, where.decode)
    assert [Parallel(one.tp, one.pp) for one in (settings, of_decodes)] == [group.parallel for group in groups]
    if isinstance(where, Colocated):
        assert services["prefill"]["command"] == ["python", "-m", "services.colocated"]
        assert services["prefill"]["healthcheck"]["test"][-2:] == ["services.colocated", "--check"]
        assert (settings.policy, settings.budget_tokens) == (where.policy, where.budget_tokens)
    else:
        assert services["prefill"]["command"] == ["python", "-m", "services.prefill"]
    assert set(services) == set(filled(merged(*under), {"COMPOSE_PROJECT_NAME": "baton"})["services"])


def test_what_one_host_cannot_do_is_said_in_the_file_and_outside() -> None:
    text, cannot = override(Disaggregated(Group(WIDE, 2), Group(ONE, 3), units=2), "x")
    assert len(cannot) == 1 and f"# NOT STARTED LIKE THAT: {cannot[0]}" in text
    assert override(Disaggregated(Group(ONE, 2), Group(ONE, 3), across_nodes=True), "x")[1]


def test_seeds_differ_and_lists_of_one_seed_begin_alike() -> None:
    shapes = [Shape(n, n + 1) for n in range(1, 200)]
    source = drawn(shapes, 1.0)
    assert source(50, 1) == source(400, 1)[:50]
    assert source(50, 1) != source(50, 2)
    asks = source(1000, 3)
    assert asks[-1].at == pytest.approx(1000, rel=0.15)
    assert len({ask.input_tokens for ask in asks}) > 150


def test_a_trace_keeps_its_order_and_its_bursts() -> None:
    shapes = [Shape(n, 5, at_s=float(n // 10 * 10 + n % 10 * 0.01)) for n in range(1, 801)]
    asks = traced(shapes)(100, 1)
    assert [ask.input_tokens for ask in asks] == list(range(1, 101))
    assert asks[-1].at == pytest.approx(99, rel=0.05)
    gaps = sorted(later.at - sooner.at for sooner, later in pairwise(asks))
    assert gaps[80] < 0.1 < gaps[-1]
    assert traced(shapes)(100, 2)[0].input_tokens == 101


def test_a_trace_begins_again_behind_its_end() -> None:
    """A trial that judged no request at all had reached every rate."""
    asks = traced([Shape(number, 5, number * 2.0) for number in range(1, 41)])(1000, 1)
    assert len(asks) == 1000 and asks[40].input_tokens == 1
    assert asks[-1].at == pytest.approx(999, rel=0.05)
    assert all(later.at >= sooner.at for sooner, later in pairwise(asks))


def test_text_is_measured_by_its_characters() -> None:
    assert measured(Shape(0, 5, text="x" * 300)).input_tokens == 100
    assert measured(Shape(7, 5, text="x" * 300)).input_tokens == 7
    with pytest.raises(WorkloadError, match="too few"):
        wanted(Workload("short", (Shape(5, 5),) * 3, ""), Objectives(1, 1), 0.9, 1.0)


def test_options() -> None:
    chosen = parse(["--slo", "opt-66b-sharegpt", "--gpus", "8", "--nodes", "2"])
    assert chosen.slo == Objectives(2.5, 0.15)
    bad_ones = (["--gpus", "3", "--nodes", "2"], ["--slo", "soon"], ["--share", "1"], ["--rate", "0"], ["--algorithm", "3"])
    for bad in bad_ones:
        with pytest.raises(SystemExit) as end:
            parse(bad)
        assert end.value.code == 2


@pytest.mark.parametrize("others", [[], ["--no-curve"], ["--against", "goodput.json", "--profile", "mine.json"]], ids=str)
@pytest.mark.parametrize("stem", ["/nonexistent/x", "."])
def test_where_nothing_can_be_written_nothing_is_simulated(stem: str, others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--out", stem, *others])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "--out" in err and len(err.splitlines()) == 1
    parse(["--out", "/nonexistent/x", "--paper"])


@pytest.mark.parametrize("what", [["--live", "http://127.0.0.1:8000"], ["--against", "goodput.json"]], ids=["live", "against"])
def test_a_system_that_runs_is_not_planned_with_the_papers_machine(what: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What clients ask of SmolLM2 was planned with OPT-13B's times on an A100, without a word."""
    with pytest.raises(SystemExit) as end:
        parse(what)
    assert end.value.code == 2 and "need --profile" in capsys.readouterr().err
    assert parse([*what, "--profile", "mine.json"]).profile == "mine.json"


def test_from_a_profile_to_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    profile, lengths, stem = tmp_path / "profile.json", tmp_path / "lengths.csv", tmp_path / "out"
    profile.write_text(json.dumps(document()))
    lengths.write_text("input_tokens,output_tokens\n" + "200,20\n" * 60)
    words = [
        "--profile",
        str(profile),
        "--workload",
        str(lengths),
        "--gpus",
        "2",
        "--slo",
        "0.3,0.03",
        "--context",
        "256",
        "--out",
        str(stem),
    ]
    monkeypatch.setattr("sys.argv", ["plan", *words])
    assert script.main() == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads(stem.with_suffix(".json").read_text())
    assert result["chosen"]["placement"] in stem.with_suffix(".yml").read_text()
    assert result["chosen"]["low"] <= result["chosen"]["goodput"] <= result["chosen"]["high"]
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "requests/s a device" in err and "chosen" in err
    profile.write_text("{}")
    assert script.main() == 1
    assert "missing required field" in capsys.readouterr().err
