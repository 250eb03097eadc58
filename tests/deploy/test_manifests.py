"""What is deployed is what the schemas allow, and what the security promises say; without any cluster."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = DEPLOY / "kubernetes"


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield f"{path.name}:{document['kind']}:{document.get('metadata', {}).get('name', '')}", document


DOCUMENTS = dict(documents())


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, Ray's among them, by what it belongs to."""
    for name, document in DOCUMENTS.items():
        spec = document.get("spec", {})
        if document["kind"] in ("Deployment", "Job"):
            yield name, spec["template"]
        if document["kind"] == "RayCluster":
            yield f"{name}:head", spec["headGroupSpec"]["template"]
            yield from ((f"{name}:{group['groupName']}", group["template"]) for group in spec["workerGroupSpecs"])


PODS = dict(pods())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name, document in DOCUMENTS.items() if document["kind"] not in ("RayCluster", "Kustomization")])
def test_every_manifest_is_valid_without_a_field_that_kubernetes_does_not_know(name: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[name], kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", PODS)
def test_every_pod_template_is_a_valid_pod(name: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **PODS[name], "metadata": {"name": "pod", **PODS[name].get("metadata", {})}}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_the_ray_cluster_has_only_fields_that_kuberay_knows() -> None:
    schema = json.loads((Path(__file__).parent / "raycluster.schema.json").read_text(encoding="utf-8"))
    (cluster,) = (document for document in DOCUMENTS.values() if document["kind"] == "RayCluster")
    jsonschema.validate(cluster, schema)


def test_nothing_is_left_out_of_the_kustomization() -> None:
    listed = set(DOCUMENTS["kustomization.yaml:Kustomization:"]["resources"])
    assert listed == {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml", "secrets.example.yaml"}


# -- security --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PODS)
def test_no_pod_has_more_rights_than_it_needs(name: str) -> None:
    spec = PODS[name]["spec"]
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    assert not any("hostPath" in volume for volume in spec["volumes"])
    for container in [*spec["containers"], *spec.get("initContainers", ())]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}


@pytest.mark.parametrize("name", [name for name in PODS if not name.endswith(":head")])
def test_only_the_autoscaler_s_pod_may_ask_kubernetes(name: str) -> None:
    assert PODS[name]["spec"]["automountServiceAccountToken"] is False
    assert PODS[name]["spec"]["serviceAccountName"] == "nas"


def test_every_member_of_the_ray_cluster_asks_for_the_token() -> None:
    settings = DOCUMENTS["settings.yaml:ConfigMap:settings"]["data"]
    members = {name: pod for name, pod in PODS.items() if pod["metadata"]["labels"].get("ray") == "member"}
    assert len(members) == 3
    assert settings["RAY_AUTH_MODE"] == "token"
    for pod in members.values():
        (container,) = pod["spec"]["containers"]
        token = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "ray-token", "key": "auth_token"}}}
        assert token in container["env"]
        assert {"configMapRef": {"name": "settings"}} in container["envFrom"]


def test_workers_hold_no_credentials_of_the_database() -> None:
    for name, pod in PODS.items():
        has_database = "database" in json.dumps([container.get("env") for container in pod["spec"]["containers"]])
        assert has_database == (pod["metadata"]["labels"]["app.kubernetes.io/component"] in ("api", "controller", "migrate")), name


def test_everything_is_closed_but_what_is_named() -> None:
    policies = {document["metadata"]["name"]: document["spec"] for document in DOCUMENTS.values() if document["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    into = {name: spec for name, spec in policies.items() if spec.get("ingress")}
    assert set(into) == {"api", "metrics", "ray"}
    assert all("ipBlock" not in json.dumps(spec["ingress"]) for spec in into.values())
    out = {name: spec for name, spec in policies.items() if "Egress" in spec["policyTypes"] and spec["podSelector"] == {}}
    assert set(out) == {"nothing", "dns"}
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in PODS.values()}
    assert set(policies["database"]["podSelector"]["matchExpressions"][0]["values"]) <= components


def test_the_api_is_the_only_door() -> None:
    services = [document for document in DOCUMENTS.values() if document["kind"] in ("Service", "Ingress")]
    assert [(service["metadata"]["name"], service["spec"].get("type", "ClusterIP")) for service in services] == [("api", "ClusterIP")]
    with_ports = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert with_ports == {"api": ["127.0.0.1:8400:8400"]}
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert [name for name, service in COMPOSE["services"].items() if "outside" in service["networks"]] == ["api"]


@pytest.mark.parametrize("name", ["api.yaml:Deployment:api", "controller.yaml:Deployment:controller"])
def test_what_serves_is_probed(name: str) -> None:
    (container,) = PODS[name]["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/healthz"
    assert {container[probe]["httpGet"]["port"] for probe in container if probe.endswith("Probe")} <= ports


def test_disruptions_leave_one_of_each() -> None:
    budgets = {document["metadata"]["name"]: document["spec"] for document in DOCUMENTS.values() if document["kind"] == "PodDisruptionBudget"}
    deployments = {document["metadata"]["name"]: document["spec"] for document in DOCUMENTS.values() if document["kind"] == "Deployment"}
    assert set(budgets) == set(deployments)
    for name, budget in budgets.items():
        assert budget["minAvailable"] < deployments[name]["replicas"], "a node could never be drained"
        assert budget["selector"]["matchLabels"].items() <= deployments[name]["template"]["metadata"]["labels"].items()


def test_no_secret_lies_in_a_file_but_the_example() -> None:
    for path in (path for path in DEPLOY.rglob("*") if path.is_file() and path.name != "secrets.example.yaml" and "secrets" not in path.parts):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"postgresql://\w+:(?!%s|PASSWORD)[^@\s]+@", text), path
    assert [name for name, document in DOCUMENTS.items() if document["kind"] == "Secret"] == [
        "secrets.example.yaml:Secret:database",
        "secrets.example.yaml:Secret:ray-token",
    ]
    for service in COMPOSE["services"].values():
        assert not any(key in json.dumps(service.get("environment", {})) for key in ("postgresql://", '"RAY_AUTH_TOKEN"'))


# -- the manifests and the code --------------------------------------------------------------------------------------------


def test_every_setting_that_is_deployed_exists() -> None:
    known = set(
        re.findall(
            r"NAS_[A-Z_]+", "".join(path.read_text(encoding="utf-8") for package in ("nas", "api", "workers") for path in (ROOT / package).rglob("*.py"))
        )
    )
    for path in (path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix in (".yaml", ".sh", ".Containerfile", ".md")):
        used = set(re.findall(r"\bNAS_[A-Z_]+\b", path.read_text(encoding="utf-8")))
        assert {name.removesuffix("_FILE") for name in used} <= known, path


def test_images_and_versions_agree() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (cluster,) = (document for document in DOCUMENTS.values() if document["kind"] == "RayCluster")
    assert f"ray=={cluster['spec']['rayVersion']}\n" in constraints
    named = {image["name"] for image in DOCUMENTS["kustomization.yaml:Kustomization:"]["images"]}
    assert {container["image"] for pod in PODS.values() for container in pod["spec"]["containers"]} == named
    for image in named:
        assert (DEPLOY / f"{image.removeprefix('nas-')}.Containerfile").exists()


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in sorted(DEPLOY.glob("*.sh"))])
def test_scripts_parse(path: Path) -> None:
    assert path.stat().st_mode & 0o111, "not executable"
    subprocess.run(["sh", "-n", str(path)], check=True)


def test_images_copy_what_they_install() -> None:
    for path in DEPLOY.glob("*.Containerfile"):
        text = path.read_text(encoding="utf-8")
        copied = {source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in line.split()[:-1]}
        assert {"nas", "api", "workers", "pyproject.toml", "constraints.txt", "README.md", "deploy/install.sh"} <= copied
        assert all((ROOT / source).exists() for source in copied)
        assert "USER 10001" in text


def test_every_alert_is_in_the_runbook_with_what_to_do() -> None:
    groups = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    runbook = (DEPLOY / "RUNBOOK.md").read_text(encoding="utf-8")
    for rule in (rule for group in groups for rule in group["rules"]):
        assert f"| `{rule['alert']}` | {rule['annotations']['summary']} | {rule['annotations']['runbook']} |" in runbook
