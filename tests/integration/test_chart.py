"""The chart does what its README says, with the real Helm and a real API server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.finetune_operator.decision.world import job

from finetune_api.base import Stage
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.manifests.job import Job, Manifest
from finetune_operator.manifests.shared import stage_channel
from finetune_operator.metrics import Metrics
from finetune_operator.settings import from_environment

from .harness import binaries
from .harness.api import Api, ApiError, Resource
from .harness.control_plane import ControlPlane
from .harness.helm import CHART, Helm, HelmError
from .harness.processes import wait_until

NAME = "finetune-finetune-operator"
FULL: Resource = {
    "replicas": 2,
    "pricePerGpuHour": {"A100-80GB": 1.8},
    "backend": "trainjob",
    "imagePullSecrets": [{"name": "registry"}],
    "podLabels": {"team": "ml"},
    "podAnnotations": {"note": "x"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"operator": "Exists"}],
    "priorityClassName": "system-cluster-critical",
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "networkPolicy": {"restrictEgress": True, "metricsFrom": [{"namespaceSelector": {}}]},
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True},
    },
    "serviceAccount": {"annotations": {"a": "b"}},
    "rbac": {"protectReports": "always"},
}
NAMESPACED: Resource = {
    "namespaces": ["ml", "research"],
    "crd": {"install": False},
    "rbac": {"aggregate": False, "protectReports": "never"},
}
CLUSTER_WIDE = ("ClusterRole", "CustomResource", "ValidatingAdmission")
MONITORING_KINDS = {"ServiceMonitor", "PrometheusRule"}


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm without a cluster."""
    try:
        binaries.ensure("helm")
    except binaries.BinaryUnavailableError as problem:
        pytest.skip(str(problem))
    return Helm(tmp_path_factory.mktemp("helm"))


@pytest.fixture
def release(control_plane: ControlPlane, helm: Helm, tmp_path: Path) -> Iterator[tuple[Helm, str]]:
    """A namespace that enforces `restricted`, into which a test installs the chart."""
    namespace = control_plane.create_namespace("ops", {"pod-security.kubernetes.io/enforce": "restricted"})
    installer = Helm(tmp_path, control_plane.kubeconfig)
    yield installer, namespace
    installer.uninstall(namespace)
    control_plane.delete_namespace(namespace)


def fine_tune_job(name: str = "live") -> Resource:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"repo": "acme/base"},
            "datasets": [{"name": "claims", "repo": "acme/claims", "task": "classification"}],
            "tuning": {"method": "lora"},
        },
    }


def the(manifests: list[Resource], kind: str, name: str = NAME) -> Resource:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


# Rendering ------------------------------------------------------------------------------------------------


def test_helm_finds_nothing_to_complain_about(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm("lint", CHART, "--strict")


@pytest.mark.parametrize("values", [{}, NAMESPACED, FULL], ids=["default", "namespaced", "everything"])
def test_every_object_carries_its_labels_and_its_place(helm: Helm, values: Resource) -> None:
    manifests = helm.template(values)
    for manifest in manifests:
        metadata = manifest["metadata"]
        assert metadata["labels"]["app.kubernetes.io/name"] == "finetune-operator", metadata
        cluster_wide = manifest["kind"].startswith(CLUSTER_WIDE)
        assert ("namespace" in metadata) is not cluster_wide, metadata
    names = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in manifests]
    assert len(names) == len(set(names))


def test_named_namespaces_get_roles_and_nothing_reaches_further(helm: Helm) -> None:
    manifests = helm.template(NAMESPACED)
    assert not [m for m in manifests if m["kind"].startswith(CLUSTER_WIDE)]
    places = [m["metadata"]["namespace"] for m in manifests if m["kind"] == "Role" and m["metadata"]["name"] == NAME]
    assert places == ["ml", "research"]
    assert environment(the(manifests, "Deployment"))["FINETUNE_NAMESPACES"] == "ml,research"


@pytest.mark.parametrize(
    ("value", "served", "rendered"),
    [("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)],
)
def test_reports_are_protected_if_the_api_server_can_do_it(
    helm: Helm, value: str, served: bool, rendered: bool
) -> None:
    kinds = ["admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy"] if served else []
    manifests = helm.template({"rbac": {"protectReports": value}}, served=kinds)
    assert [m["kind"] for m in manifests if m["kind"].startswith("ValidatingAdmission")] == (
        ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"] if rendered else []
    )


def test_an_image_is_named_by_tag_digest_or_the_version_of_the_chart(helm: Helm) -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    digest = "sha256:" + "a" * 64
    for image, expected in [
        ({}, f"finetune-operator:{version}"),
        ({"repository": "r.example/ml/op", "tag": "7"}, "r.example/ml/op:7"),
        ({"tag": "7", "digest": digest}, f"finetune-operator@{digest}"),
    ]:
        deployment = the(helm.template({"image": image}), "Deployment")
        assert container(deployment)["image"] == expected
    beside = the(helm.template({"image": {"repository": "r.example/ml/op"}}), "Deployment")
    assert environment(beside)["FINETUNE_TRAINER_IMAGE"] == f"r.example/ml/finetune-trainer:{version}"
    given = the(helm.template({"trainerImage": "r.example/t@sha256:b"}), "Deployment")
    assert environment(given)["FINETUNE_TRAINER_IMAGE"] == "r.example/t@sha256:b"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": -1}, "/replicas"),
        ({"replicas": "two"}, "/replicas"),
        ({"namespaces": "ml"}, "/namespaces"),
        ({"namespaces": ["ML"]}, "/namespaces/0"),
        ({"namespaces": ["ml", "ml"]}, "/namespaces"),
        ({"workers": 0}, "/workers"),
        ({"log": {"level": "loud"}}, "/log/level"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"pricePerGpuHour": {"A100": "1.80"}}, "/pricePerGpuHour/A100"),
        ({"metrics": {"port": 80}}, "/metrics/port"),
        ({"metrics": {"serviceMonitor": {"enable": True}}}, "enable"),
        ({"networkPolicy": {"apiServerPorts": []}}, "/networkPolicy/apiServerPorts"),
        ({"crd": {"install": "yes"}}, "/crd/install"),
        ({"extraEnv": [{"value": "x"}]}, "/extraEnv/0"),
    ],
)
def test_a_wrong_value_is_refused_and_named(helm: Helm, values: Resource, named: str) -> None:
    with pytest.raises(HelmError) as refused:
        helm.template(values)
    assert "values don't meet the specifications of the schema" in str(refused.value)
    assert named in str(refused.value)


def test_alerts_are_valid_promql_and_say_what_to_do(helm: Helm) -> None:
    rule = the(helm.template(FULL), "PrometheusRule")
    alerts = [alert for group in rule["spec"]["groups"] for alert in group["rules"]]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) >= 6
    for alert in alerts:
        promql_parser.parse(alert["expr"])
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]


def test_alerts_and_dashboard_ask_for_what_the_operator_exports(helm: Helm) -> None:
    exported = exported_series()
    manifests = helm.template(FULL)
    rules = the(manifests, "PrometheusRule")["spec"]["groups"][0]["rules"]
    dashboard = json.loads(the(manifests, "ConfigMap", f"{NAME}-dashboard")["data"]["finetune-operator.json"])
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = [found for text in expressions for found in re.findall(r"\b(finetune_[a-z_]+)(?:\{([^}]*)\})?", text)]
    assert len({name for name, _ in asked}) >= 8
    for name, matchers in asked:
        assert name in exported
        assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= exported[name], (name, matchers)


def exported_series() -> dict[str, set[str]]:
    """Names of all series of the operator, with their labels."""
    metrics = Metrics(lambda: {("ml", "Training"): 1})
    metrics.count_request("get", 200)
    metrics.count_transition("ml", job().status, job().complete().status)
    text = generate_latest(metrics.registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def test_the_alert_on_a_silent_operator_looks_at_this_release(helm: Helm) -> None:
    manifests = helm.template(FULL)
    rules = the(manifests, "PrometheusRule")["spec"]["groups"][0]["rules"]
    down = next(rule for rule in rules if rule["alert"] == "FinetuneOperatorDown")
    service = the(manifests, "Service", f"{NAME}-metrics")["metadata"]
    assert f'job="{service["name"]}", namespace="{service["namespace"]}"' in down["expr"]


def environment(deployment: Resource) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in container(deployment)["env"]}


def container(deployment: Resource) -> Resource:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    found: Resource = only
    return found


def test_the_operator_reads_what_the_chart_sets(helm: Helm) -> None:
    values = {"namespaces": ["ml", "research"], "workers": 3, "healthPort": 9001, "metrics": {"port": 9000}}
    prices = {"A100-80GB": 1.8, "default": 1}
    more = {
        "backend": "trainjob",
        "pricePerGpuHour": prices,
        "trainerImage": "t:1",
        "gangScheduling": True,
        "log": {"level": "debug"},
    }
    variables = environment(the(helm.template({**values, **more}), "Deployment")) | {"FINETUNE_LEASE_NAMESPACE": "ops"}
    asked = Asked(variables)
    settings = from_environment(asked)
    assert settings.namespaces == ("ml", "research")
    assert (settings.workers, settings.metrics_port, settings.health_port) == (3, 9000, 9001)
    assert (settings.prices, settings.image, settings.gang_scheduling) == (prices, "t:1", True)
    assert settings.backend == "trainjob"
    assert (settings.log_level, settings.log_format) == ("debug", "json")
    assert (settings.lease_name, settings.lease_namespace) == (NAME, "ops")
    assert set(variables) <= asked.names, "the operator does not read these"


class Asked(dict[str, str]):
    """An environment that remembers what it was asked for."""

    def __init__(self, variables: dict[str, str]) -> None:
        super().__init__(variables)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


# On an API server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def monitoring(control_plane: ControlPlane) -> None:
    """The Prometheus operator's own CRDs."""
    folder = binaries.ensure_prometheus_operator_crds()
    names = [f"monitoring.coreos.com_{kind.lower()}s.yaml" for kind in MONITORING_KINDS]
    control_plane.install_crds([yaml.safe_load((folder / name).read_text()) for name in names])


def test_what_prometheus_is_told_is_what_its_operators_crds_allow(
    control_plane: ControlPlane, release: tuple[Helm, str], monitoring: None
) -> None:
    helm, namespace = release
    made = [m for m in helm.template(FULL, namespace=namespace) if m["kind"] in MONITORING_KINDS]
    assert {m["kind"] for m in made} == MONITORING_KINDS
    for manifest in made:
        # Server-side apply refuses a field that the schema does not know; helm's create would only drop it.
        stored = control_plane.api.apply(manifest, dry_run=True)
        assert stored["spec"] == manifest["spec"]


def test_the_chart_installs_into_a_restricted_namespace(
    control_plane: ControlPlane, release: tuple[Helm, str], monitoring: None
) -> None:
    helm, namespace = release
    assert "serves all namespaces" in helm.install(namespace, FULL)
    api = control_plane.api
    (endpoint,) = api.get("ServiceMonitor", NAME, namespace)["spec"]["endpoints"]
    service = api.get("Service", f"{NAME}-metrics", namespace)
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    selector = api.get("ServiceMonitor", NAME, namespace)["spec"]["selector"]["matchLabels"]
    assert selector.items() <= service["metadata"]["labels"].items()
    template = api.get("Deployment", NAME, namespace)["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "probe"}}
    # What the ReplicaSet controller would do: Pod Security Admission refuses a pod that is not restricted.
    api.apply({**pod, "spec": template["spec"]}, namespace, dry_run=True)
    assert api.get("PodDisruptionBudget", NAME, namespace)["spec"]["maxUnavailable"] == 1
    made = api.create(fine_tune_job(), namespace)
    assert made["spec"]["training"]["epochs"] >= 1  # filled in by the CRD


def test_an_upgrade_changes_the_crd_and_keeps_live_jobs(
    control_plane: ControlPlane, release: tuple[Helm, str], tmp_path: Path
) -> None:
    helm, namespace = release
    helm.install(namespace)
    before = control_plane.api.create(fine_tune_job(), namespace)
    newer = shutil.copytree(CHART, tmp_path / "newer")
    crd = yaml.safe_load((newer / "files" / "crd.yaml").read_text())
    (version,) = crd["spec"]["versions"]
    version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["novelty"] = {"type": "string"}
    (newer / "files" / "crd.yaml").write_text(yaml.safe_dump(crd))
    try:
        helm.install(namespace, chart=newer)

        def novelty_is_kept() -> bool:
            answer = control_plane.api.patch(before, {"status": {"novelty": "yes"}}, "status")
            return answer["status"].get("novelty") == "yes"

        wait_until(novelty_is_kept, "the new schema to be served")
        after = control_plane.api.get("FineTuneJob", "live", namespace)
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        assert after["spec"] == before["spec"]
    finally:
        helm.install(namespace)


def test_an_uninstall_leaves_the_crd_and_the_jobs_and_can_be_taken_back(
    control_plane: ControlPlane, release: tuple[Helm, str]
) -> None:
    helm, namespace = release
    helm.install(namespace)
    before = control_plane.api.create(fine_tune_job(), namespace)
    helm.uninstall(namespace)
    assert control_plane.api.find("Deployment", NAME, namespace) is None
    assert control_plane.api.find("ClusterRole", f"{namespace}-{NAME}") is None
    assert control_plane.api.refresh(before) is not None
    helm("install", "finetune", CHART, "-n", namespace)  # the CRD is its own: nothing to take over
    assert control_plane.api.refresh(before) is not None


ALLOWED_AND_DENIED = [
    ("list", "finetune.dev", "finetunejobs", "", True),
    ("watch", "finetune.dev", "finetunejobs", "", True),
    ("update", "finetune.dev", "finetunejobs", "status", True),
    ("update", "finetune.dev", "finetunejobs", "finalizers", True),
    ("update", "finetune.dev", "finetunejobs", "", False),
    ("patch", "finetune.dev", "finetunejobs", "", False),
    ("create", "finetune.dev", "finetunejobs", "", False),
    ("delete", "finetune.dev", "finetunejobs", "", False),
    ("create", "batch", "jobs", "", True),
    ("delete", "batch", "jobs", "", True),
    ("patch", "batch", "jobs", "", False),
    ("create", "kubeflow.org", "pytorchjobs", "", True),
    ("delete", "kubeflow.org", "pytorchjobs", "", True),
    ("patch", "kubeflow.org", "pytorchjobs", "", False),
    ("create", "trainer.kubeflow.org", "trainjobs", "", False),
    ("get", "finetune.dev", "finetunejobs", "", False),
    ("list", "", "pods", "", True),
    ("create", "", "pods", "", False),
    ("create", "", "pods", "exec", False),
    ("get", "", "pods", "log", False),
    ("patch", "", "configmaps", "", True),
    ("update", "", "configmaps", "", False),
    ("delete", "", "configmaps", "", False),
    ("create", "", "serviceaccounts", "", True),
    ("create", "", "serviceaccounts", "token", False),
    ("create", "rbac.authorization.k8s.io", "roles", "", True),
    ("bind", "rbac.authorization.k8s.io", "roles", "", False),
    ("escalate", "rbac.authorization.k8s.io", "roles", "", False),
    ("create", "rbac.authorization.k8s.io", "clusterroles", "", False),
    ("create", "networking.k8s.io", "networkpolicies", "", True),
    ("create", "", "persistentvolumeclaims", "", True),
    ("delete", "", "persistentvolumeclaims", "", False),
    ("get", "", "secrets", "", True),
    ("list", "", "secrets", "", False),
    ("watch", "", "secrets", "", False),
    ("create", "", "secrets", "", False),
    ("create", "events.k8s.io", "events", "", True),
    ("impersonate", "", "users", "", False),
]


def may(api: Api, namespace: str, verb: str, group: str, resource: str, sub: str, place: str) -> bool:
    attributes = {"verb": verb, "group": group, "resource": resource, "subresource": sub, "namespace": place}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "metadata": {},
        "spec": {"user": f"system:serviceaccount:{namespace}:{NAME}", "resourceAttributes": attributes},
    }
    answer = api.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(answer["status"]["allowed"])


def test_an_operator_for_the_cluster_may_do_what_the_contract_allows_and_nothing_else(
    control_plane: ControlPlane, release: tuple[Helm, str]
) -> None:
    helm, namespace = release
    helm.install(namespace)
    api = control_plane.api
    wait_until(lambda: may(api, namespace, "list", "finetune.dev", "finetunejobs", "", "default"), "the role to count")
    for verb, group, resource, sub, expected in ALLOWED_AND_DENIED:
        for place in (namespace, "default"):
            found = may(api, namespace, verb, group, resource, sub, place)
            assert found is expected, (verb, group, resource, sub, place)
    assert may(api, namespace, "create", "coordination.k8s.io", "leases", "", namespace)
    assert not may(api, namespace, "create", "coordination.k8s.io", "leases", "", "default")
    assert may(api, namespace, "get", "", "nodes", "", "")
    assert not may(api, namespace, "patch", "", "nodes", "", "")


def test_an_operator_of_named_namespaces_may_do_the_same_there_and_nothing_elsewhere(
    control_plane: ControlPlane, release: tuple[Helm, str], namespace: str
) -> None:
    helm, own = release
    helm.install(own, {"namespaces": [namespace]})
    api = control_plane.api
    wait_until(lambda: may(api, own, "list", "finetune.dev", "finetunejobs", "", namespace), "the role to count")
    for verb, group, resource, sub, expected in ALLOWED_AND_DENIED:
        assert may(api, own, verb, group, resource, sub, namespace) is expected, (verb, group, resource, sub)
        for elsewhere in ("default", own, ""):
            assert not may(api, own, verb, group, resource, sub, elsewhere), (verb, group, resource, sub, elsewhere)
    assert not may(api, own, "get", "", "nodes", "", "")


def test_the_operator_can_hand_on_the_right_to_patch_one_report_and_no_other_right(
    control_plane: ControlPlane, release: tuple[Helm, str]
) -> None:
    helm, namespace = release
    helm.install(namespace)
    operator = Api(control_plane.kubeconfig_for(NAME, namespace))
    rule = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["live-train-report"], "verbs": ["patch"]}

    def role(name: str, **changes: list[str]) -> Resource:
        kind = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name}}
        return {**kind, "rules": [{**rule, **changes}]}

    wait_until(lambda: may(control_plane.api, namespace, "patch", "", "configmaps", "", namespace), "the role to count")
    operator.create(role("trainer"), namespace)
    with pytest.raises(ApiError, match="attempting to grant RBAC permissions not currently held"):
        operator.create(role("greedy", resources=["secrets"], verbs=["list"]), namespace)
    with pytest.raises(ApiError, match="attempting to grant RBAC permissions not currently held"):
        operator.create(role("writer", verbs=["update"]), namespace)


def test_only_the_operator_and_the_reporting_stage_may_change_a_report(
    control_plane: ControlPlane, release: tuple[Helm, str]
) -> None:
    helm, namespace = release
    helm.install(namespace)
    api = control_plane.api
    owner = api.create(fine_tune_job(), namespace)
    for manifest in (account("editor"), edits_as("editor", namespace)):
        api.create(manifest, namespace)
    *accounts, report = channel(owner, Stage.TRAIN)
    for manifest in (*accounts, channel(owner, Stage.EVALUATE)[0]):
        api.create(manifest, namespace)
    operator, train, evaluate, editor = (
        Api(control_plane.kubeconfig_for(name, namespace))
        for name in (NAME, "live-train-report", "live-evaluate-report", "editor")
    )

    def refusal(act: Callable[[], object]) -> str:
        try:
            act()
        except ApiError as error:
            return str(error)
        return ""

    others = "only the operator changes the ConfigMaps of a FineTuneJob"
    probe = report | {"metadata": report["metadata"] | {"name": "probe"}}

    def counts() -> bool:
        return others in refusal(lambda: editor.apply(probe, namespace, dry_run=True))

    wait_until(counts, "the policy to count")
    assert others in refusal(lambda: editor.create(report, namespace)), "a report before the stage has begun"
    made = operator.create(report, namespace)
    forged = {"data": {"train": "{}"}}
    for stranger in (editor, evaluate):
        assert refusal(lambda user=stranger: user.patch(made, forged))  # type: ignore[misc]
    assert others in refusal(lambda: editor.patch(made, forged))
    assert others in refusal(lambda: editor.delete(made))
    plain = editor.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "plain"}}, namespace)
    assert others in refusal(lambda: editor.patch(plain, {"metadata": {"labels": report["metadata"]["labels"]}}))

    for change in (
        {"metadata": {"annotations": {"a": "b"}}},
        {"metadata": {"finalizers": ["example.com/keep"]}},
        {"metadata": {"ownerReferences": None}},
        {"metadata": {"labels": {"finetune.dev/job": "other"}}},
        {"binaryData": {"a": "AAAA"}},
        {"immutable": True},
    ):
        assert "only the data of its report" in refusal(lambda body=change: train.patch(made, body))  # type: ignore[misc]
    assert train.patch(made, forged)["data"] == forged["data"]
    assert operator.patch(made, {"data": {"train": "{ }"}})["data"] == {"train": "{ }"}

    api.delete(owner)
    wait_until(lambda: api.refresh(made) is None, "the report to be collected with its job", 60)


def channel(job: Resource, stage: Stage) -> list[Manifest]:
    meta, spec = job["metadata"], FineTuneJobSpec.model_validate(job["spec"])
    return stage_channel(Job(meta["namespace"], meta["name"], meta["uid"], spec, "trainer"), stage)


def account(name: str) -> Resource:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}


def edits_as(name: str, namespace: str) -> Resource:
    """What a cluster's administrator gives to the members of a team."""
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    }


def test_editors_of_a_namespace_may_create_jobs_and_viewers_may_read_them(
    control_plane: ControlPlane, release: tuple[Helm, str]
) -> None:
    helm, namespace = release
    helm.install(namespace)
    api = control_plane.api

    def verbs(role: str) -> set[str]:
        rules = api.get("ClusterRole", role).get("rules") or []
        return {verb for rule in rules if "finetunejobs" in rule.get("resources", ()) for verb in rule["verbs"]}

    wait_until(lambda: {"create", "patch", "delete", "list"} <= verbs("edit"), "edit to include FineTuneJobs")
    wait_until(lambda: verbs("view") == {"get", "list", "watch"}, "view to include FineTuneJobs")
