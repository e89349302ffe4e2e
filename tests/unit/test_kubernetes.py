"""Kubernetes manifests: valid by the API's own schemas, and naming commands, settings, volumes and streams that exist."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from common import names
from common.settings import CommonSettings, GatewaySettings, WorkerSettings, load

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "compose/kubernetes"
VERSION = "1.31"
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
SCALED_OBJECT = {
    "type": "object",
    "required": ["scaleTargetRef", "triggers"],
    "additionalProperties": False,
    "properties": {
        "scaleTargetRef": {"type": "object", "required": ["name"], "properties": {"name": TEXT}},
        "minReplicaCount": COUNT,
        "maxReplicaCount": COUNT,
        "pollingInterval": COUNT,
        "cooldownPeriod": COUNT,
        "advanced": {"type": "object"},
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "metadata"],
                "additionalProperties": False,
                "properties": {
                    "type": TEXT,
                    "metricType": {"enum": ["AverageValue", "Value", "Utilization"]},
                    "metadata": {"type": "object", "additionalProperties": TEXT},
                    "authenticationRef": {"type": "object", "required": ["name"]},
                },
            },
        },
    },
}
"""The part of KEDA's resource definition (keda.sh/v1alpha1) that is used here."""
REQUIRED = {
    "redis-streams": {"address", "stream", "consumerGroup", "lagCount"},
    "prometheus": {"serverAddress", "query", "threshold"},
}
"""Metadata that KEDA's scalers cannot do without."""


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


EVERYTHING = [(path, document) for path in sorted(FOLDER.glob("*.yaml")) for document in documents(path)]
MANIFESTS = [document for path, document in EVERYTHING if path.name != "kustomization.yaml"]
SCALED = [document for document in MANIFESTS if document["kind"] == "ScaledObject"]


def identify(document: dict[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


def of(kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in MANIFESTS if document["kind"] == kind}


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [(identify(document), document["spec"]["template"]) for document in MANIFESTS if "template" in document.get("spec", {})]


@pytest.mark.parametrize("document", [one for one in MANIFESTS if not one["apiVersion"].startswith("keda.sh")], ids=identify)
def test_manifests_are_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


def test_the_validator_sees_a_mistake() -> None:
    broken = {**of("Deployment")["decode"], "spec": {**of("Deployment")["decode"]["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


@pytest.mark.parametrize("document", SCALED, ids=identify)
def test_scaled_objects_are_what_keda_reads(document: dict[str, Any]) -> None:
    jsonschema.validate(document["spec"], SCALED_OBJECT)
    assert document["spec"]["scaleTargetRef"]["name"] in of("Deployment")
    for trigger in document["spec"]["triggers"]:
        assert REQUIRED[trigger["type"]] <= set(trigger["metadata"])
        if "authenticationRef" in trigger:
            assert trigger["authenticationRef"]["name"] in of("TriggerAuthentication")


def test_prefills_scale_on_the_stream_that_gateways_write() -> None:
    (trigger,) = [one for one in of("ScaledObject")["prefill"]["spec"]["triggers"] if one["type"] == "redis-streams"]
    assert trigger["metadata"]["stream"] == names.stream(CommonSettings().fleet, "FINGERPRINT", "interactive")
    assert trigger["metadata"]["consumerGroup"] == names.GROUP


def test_every_file_is_applied_or_named_as_an_option() -> None:
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files - set(kustomization["resources"]) == {"keda.yaml"}
    used = {container["image"] for _, pod in pods() for container in pod["spec"]["containers"]}
    assert {image["name"] for image in kustomization["images"]} <= used


@pytest.mark.parametrize(("name", "kind"), [("gateway", GatewaySettings), ("prefill", WorkerSettings), ("decode", WorkerSettings)])
def test_processes_start_with_settings_that_exist(name: str, kind: type[CommonSettings]) -> None:
    spec = of("Deployment")[name]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    module = container["command"][2]
    assert container["command"][:2] == ["python", "-m"]
    assert importlib.util.find_spec(f"{module}.__main__") is not None
    assert container["startupProbe"]["exec"]["command"] == ["python", "-m", module, "--check"]
    environ = {**of("ConfigMap")["baton"]["data"], **{one["name"]: one["value"] for one in container["env"]}}
    settings = load(kind, [], environ)
    assert settings.host == "auto"
    assert settings.ready_file is not None
    assert spec["terminationGracePeriodSeconds"] > settings.drain_s + 5, "killed while it drains"
    assert spec["enableServiceLinks"] is False, "a service called baton would set variables that are no settings"
    if isinstance(settings, WorkerSettings):
        assert settings.gpu == "none"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert {port["containerPort"] for port in container["ports"]} == {settings.metrics_port}


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_run_unprivileged_and_mount_what_they_name(name: str, pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    (owner,) = [document for document in MANIFESTS if identify(document) == name]
    volumes |= {claim["metadata"]["name"] for claim in owner["spec"].get("volumeClaimTemplates", [])}
    for container in spec["containers"]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for volume in spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in of("PersistentVolumeClaim")
        if "secret" in volume:
            keys = {item["key"] for item in volume["secret"].get("items", [])}
            assert keys <= set(of("Secret")[volume["secret"]["secretName"]]["stringData"])


def test_services_and_budgets_select_pods() -> None:
    labels = [pod["metadata"]["labels"] for _, pod in pods()]
    selectors = {identify(one): one["spec"]["selector"] for one in MANIFESTS if one["kind"] in ("Service", "PodDisruptionBudget")}
    assert {"PodDisruptionBudget-gateway", "PodDisruptionBudget-prefill", "PodDisruptionBudget-decode"} <= set(selectors)
    for name, selector in selectors.items():
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= found.items() for found in labels), name
