"""`./scripts/plan --against`: the simulator beside a run of `./scripts/goodput`, on the same requests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from common.slo import Objectives, attains
from scripts.planning import __main__ as script
from scripts.planning.against import AgainstError, compared, placement, pooled, read, slower
from scripts.planning.crossing import Asked, crossed, crossing, falling
from services.planner.costs import Parallel
from services.planner.placement import Colocated, Disaggregated, Group
from services.planner.requests import Ask
from services.planner.trial import Window, run
from tests.unit.planner.machines import machine
from tests.unit.planner.test_profile import document

ONE = Parallel(1, 1)
SYSTEMS = {
    "disaggregated 1+1": Disaggregated(Group(ONE, 1), Group(ONE, 1)),
    "colocated 2×1": Colocated(Group(ONE, 2)),
    "chunked 2×1": Colocated(Group(ONE, 2), "chunked", 64),
}
OBJECTIVES = Objectives(0.2, 0.025)
FRONT_S, OVERHEAD_S, HANDOFF_S = 0.03, 0.002, 0.016
RATES = (5.0, 10.0, 20.0, 40.0)


def as_measured(name: str, rate: float, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A trial, as the file has it, of a server that is the simulator's machine and slower by the three constants."""
    rng = random.Random(seed)
    asks, at = [], 0.0
    for _ in range(80):
        at += rng.expovariate(rate)
        asks.append(Ask(at, rng.randrange(20, 400), rng.randrange(5, 40)))
    apart = name.startswith("disaggregated")
    costs = slower(machine(1 << 20), OVERHEAD_S, HANDOFF_S if apart else 0.0)
    verdict = run(costs, SYSTEMS[name], asks, Window(0, 80), 1.0, Objectives(1e9, 1e9), 1.0, whole=True)
    late = Objectives(OBJECTIVES.ttft_s - FRONT_S, OBJECTIVES.tpot_s)
    hits = sum(attains(one, late) for one in verdict.served)
    trial = {"target": name, "rate": rate, "requests": 80, "attained": hits, "void": False, "more": [1]}
    return trial, [{"due_s": a.at, "input_tokens": a.input_tokens, "output_tokens": a.output_tokens, "status": 200} for a in asks]


def run_file(names: list[str]) -> dict[str, Any]:
    trials = [as_measured(name, rate, seed) for seed, rate in enumerate(RATES) for name in names]
    targets = []
    for name in names:
        kind, _, place = name.partition(" ")
        tokens = 100
        ttft = 0.010 + 1e-4 * tokens + OVERHEAD_S + FRONT_S
        pace = 0.011 + OVERHEAD_S
        if kind == "disaggregated":
            pace += (7 * 0.001 + HANDOFF_S) / 16
        flags = {"pages": "65536", **({"budget_tokens": "64"} if kind == "chunked" else {})}
        targets.append(
            {"name": name, "kind": kind, "placement": place, "flags": flags, "unloaded": {"ttft": [[tokens, ttft]], "tpot_s": pace}}
        )
        if kind == "chunked":  # 64 tokens, then 36, with an overhead each
            targets[-1]["unloaded"]["ttft"] = [[60, 0.016 + OVERHEAD_S + FRONT_S]]
    return {
        "command": "./scripts/goodput …",
        "machine": "here",
        "objectives": {"ttft": [[0, OBJECTIVES.ttft_s]], "tpot_s": OBJECTIVES.tpot_s, "scales": [1.0, 1.0]},
        "targets": targets,
        "trials": [trial for trial, _ in trials],
        "records": [records for _, records in trials],
    }


def test_a_server_that_is_as_simulated_is_found_to_be(tmp_path: Path) -> None:
    """What an idle one is slower by is measured and added: every request is then judged as it was."""
    path = tmp_path / "goodput.json"
    path.write_text(json.dumps(run_file(list(SYSTEMS))))
    results, left = compared(machine(), read(path), 0.9)
    assert not left and [one.target for one in results] == list(SYSTEMS)
    for one in results:
        assert one.where == SYSTEMS[one.target]
        assert (one.front_s, one.overhead_s) == pytest.approx((FRONT_S, OVERHEAD_S))
        assert one.transfer_s == pytest.approx(HANDOFF_S if one.target.startswith("dis") else 0.0, abs=1e-9)
        assert [hits for _, _, hits, _ in one.trials] == [simulated for *_, simulated in one.trials]
        assert min(hits for _, _, hits, _ in one.trials) < 72 <= max(hits for _, _, hits, _ in one.trials), "no crossing to be found"
        assert one.simulated == one.measured.rate and one.holds


def test_a_server_of_half_the_speed_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    found = run_file(["colocated 2×1"])
    for trial in found["trials"]:
        trial["attained"] = trial["attained"] if trial["rate"] < 8 else trial["attained"] // 3
    path.write_text(json.dumps(found))
    (one,), _ = compared(machine(), read(path), 0.9)
    assert not one.holds and one.simulated > 1.5 * one.measured.rate


def test_cores_that_others_took_are_missing_in_the_simulator_too(tmp_path: Path) -> None:
    """On two cores everything else runs on those of the two workers: reality was 8 % slower than each of its launches."""
    path = tmp_path / "goodput.json"
    found = run_file(["colocated 2×1"])
    path.write_text(json.dumps(found))
    (whole,), _ = compared(machine(), read(path), 0.9)
    for trial in found["trials"]:
        trial["cpu_cores"] = {"colocated": 1.5, "gateway": 0.1, "machine": 2.1}
    for cores, share in ((2, 0.3), (3, 0.0), (None, 0.0)):
        found["cores"] = cores
        path.write_text(json.dumps(found))
        (one,), _ = compared(machine(), read(path), 0.9)
        assert one.taken == pytest.approx(share)
        assert (one.simulated < 0.9 * whole.simulated) == (share > 0)


def test_what_the_simulator_does_not_know_is_left_out_in_words(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    found = run_file(["colocated 2×1"])
    found["targets"].append({**found["targets"][0], "name": "colocated 1×2", "placement": "1×2"})
    found["targets"].append({**found["targets"][0], "name": "vllm", "kind": "vllm", "placement": "as found", "flags": {}})
    path.write_text(json.dumps(found))
    results, left = compared(machine(), read(path), 0.9)
    assert len(results) == 1 and [words.partition(":")[0] for words in left] == ["colocated 1×2", "vllm"]
    found["targets"] = found["targets"][1:]
    path.write_text(json.dumps(found))
    with pytest.raises(AgainstError, match="vllm"):
        compared(machine(), read(path), 0.9)


def test_objectives_that_depend_on_the_length_are_refused_and_so_is_another_file(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    found = run_file(["colocated 2×1"])
    found["objectives"]["ttft"] = [[10, 0.1], [100, 0.2]]
    path.write_text(json.dumps(found))
    with pytest.raises(AgainstError, match="--slo"):
        read(path)
    path.write_text("{}")
    with pytest.raises(AgainstError, match="no result"):
        read(path)


def test_pools_are_as_large_as_the_workers_were(tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    path.write_text(json.dumps(run_file(["colocated 2×1"])))
    (target,) = read(path).targets
    assert pooled(machine(), target).pages(ONE) == 65536
    assert placement(target) == SYSTEMS["colocated 2×1"]


def test_the_script_prints_a_line_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_json, profile = tmp_path / "goodput.json", tmp_path / "profile.json"
    run_json.write_text(json.dumps(run_file(["colocated 2×1"])))
    profile.write_text(json.dumps(document()))
    monkeypatch.setattr("sys.argv", ["plan", "--profile", str(profile), "--against", str(run_json), "--out", str(tmp_path / "plan")])
    assert script.main() == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["systems"]["colocated 2×1"]["trials_rate_requests_attained_simulated"][0][:2] == [5.0, 80]
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", ["plan", "--profile", str(profile), "--against", str(tmp_path / "none.json")])
    assert script.main() == 1 and "none.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- crossing


def test_a_falling_curve_is_read_where_it_crosses() -> None:
    trials = [Asked(1.0, 100, 100), Asked(4.0, 80, 100), Asked(2.0, 100, 100)]
    assert crossed(trials, 0.9) == pytest.approx(2 * 2**0.5)
    assert crossed(trials, 0.7) == 4.0
    assert crossed([Asked(1.0, 50, 100)], 0.9) == 0.0


def test_trials_that_rise_are_pooled_with_those_before_them() -> None:
    trials = [Asked(1.0, 90, 100), Asked(2.0, 100, 100), Asked(2.0, 96, 100), Asked(3.0, 10, 50)]
    assert falling(trials) == [(1.0, pytest.approx(286 / 300)), (2.0, pytest.approx(286 / 300)), (3.0, 0.2)]
    with pytest.raises(ValueError, match="no trials"):
        falling([])


def test_the_interval_narrows_with_the_requests_and_holds_the_figure() -> None:
    few, many = (crossing([Asked(1.0, 0.98 * n, n), Asked(2.0, 0.9 * n, n), Asked(4.0, 0.3 * n, n)], 0.9) for n in (50, 5000))
    assert few.low <= few.rate <= few.high and many.low <= 2.0 <= many.high
    assert many.high - many.low < 0.2 * (few.high - few.low)
    assert crossing([Asked(1.0, 50, 50), Asked(2.0, 50, 50)], 0.9).open and not many.open
