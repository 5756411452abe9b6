"""Fixtures of the end-to-end tests: one cluster and one release of the chart a session, one namespace a test."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.cluster.__main__ import running
from tests.cluster.places import Places
from tests.integration.harness import binaries
from tests.integration.harness.api import Api, ApiError
from tests.integration.harness.control_plane import KUBECONFIG_VARIABLE
from tests.integration.harness.helm import Helm
from tests.integration.harness.operator import ACCOUNT
from tests.integration.harness.processes import wait_until
from tests.support.hub_server import HubServer
from tests.support.tiny import schooled_llama

from .clusters import KEEP_VARIABLE, OF_TESTS, Cluster, OwnNode
from .given import CRD, SYSTEM, GivenCluster
from .tenant import Tenant

EVIDENCE = Path(__file__).parents[2] / "build" / "e2e"
REQUIRE_VARIABLE = "FINETUNE_REQUIRE_CLUSTER"
"""Set it, and a machine that cannot have a cluster is an error; else its tests are listed as not run."""
UNDISTURBED = "finetune/undisturbed"
GIVEN = "This test mounts, stops or looks into something of the node itself, and the cluster is a given one."
_LACKING, _CLUSTER = pytest.StashKey[str | None](), pytest.StashKey[Cluster]()
_serial = itertools.count(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bring the cluster up before the first test: images take minutes, and a test's time-out would end that."""
    here = Path(__file__).parent
    if config.option.collectonly or not any(item.path.is_relative_to(here) for item in items):
        return
    config.stash[_CLUSTER] = cluster = _chosen(config)
    config.stash[_LACKING] = lacking = _bring_up(cluster, config)
    if lacking and (REQUIRE_VARIABLE in os.environ or config.option.kubeconfig):
        pytest.exit(lacking, returncode=1)


def _chosen(config: pytest.Config) -> Cluster:
    """The cluster that is given, or a node of our own; also where what is given is that node."""
    own, named = OwnNode(Places.default()), os.environ.get(KUBECONFIG_VARIABLE)
    if not named or (Path(named) == own.kubeconfig and running(own.places)):
        return own
    option = config.option
    return GivenCluster(Path(named), option.storage_class, option.host_address, option.image_prefix)


def _bring_up(cluster: Cluster, config: pytest.Config) -> str | None:
    """Make the cluster usable, or say why it is not."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # what takes minutes is said at once
        try:
            cluster.start()
            binaries.ensure("helm")
        except (SystemExit, binaries.BinaryUnavailableError, OSError) as problem:
            return f"{'There is no cluster' if cluster.owned else 'The given cluster cannot be used'}: {problem}"
    return None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Take the cluster down that this session has brought up, whatever became of the tests."""
    if _CLUSTER in session.config.stash:
        session.config.stash[_CLUSTER].leave()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """A running cluster that takes pods."""
    lacking = request.config.stash[_LACKING]
    if lacking:
        pytest.skip(lacking)
    return request.config.stash[_CLUSTER]


@pytest.fixture(scope="session")
def own_node(cluster: Cluster) -> OwnNode:
    """The cluster, for tests that need its machine; skipped on a given one."""
    if not isinstance(cluster, OwnNode):
        pytest.skip(GIVEN)
    return cluster


@pytest.fixture(scope="session")
def places(own_node: OwnNode) -> Places:
    """Where the node of our own keeps its things."""
    return own_node.places


@pytest.fixture(scope="session")
def api(cluster: Cluster) -> Api:
    """The cluster, as its administrator."""
    return cluster.api


@pytest.fixture(scope="session")
def release(cluster: Cluster, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Helm]:
    """The chart, installed by Helm into a namespace that enforces `restricted`; its operator runs."""

    def there() -> bool:
        found = api.find("Namespace", SYSTEM)
        if found is None:
            cluster.namespace(SYSTEM)
        return found is None or "deletionTimestamp" not in found["metadata"]

    wait_until(there, f"the namespace {SYSTEM} of a former run to go", 180)
    helm = Helm(tmp_path_factory.mktemp("helm"), cluster.kubeconfig)
    helm.install(SYSTEM, values(cluster))
    wait_for_operator(api)
    yield helm
    if not cluster.owned and KEEP_VARIABLE not in os.environ:
        helm.uninstall(SYSTEM)
        api.delete({"kind": "CustomResourceDefinition", "metadata": {"name": CRD}})
        for made in api.objects("Namespace", labels=OF_TESTS):  # those of a killed run too
            api.delete(made)


def values(cluster: Cluster) -> dict[str, object]:
    """What is set for tests: short waits, and the images as they are now."""
    repository, _, tag = cluster.images["operator"].rpartition(":")
    waits = {"FINETUNE_BACKOFF_BASE_SECONDS": "1", "FINETUNE_GRACE_SECONDS": "30", "FINETUNE_LEASE_SECONDS": "8"}
    return {
        "extraEnv": [{"name": name, "value": value} for name, value in waits.items()],
        "log": {"level": "debug"},
        "image": {"repository": repository, "tag": tag},
        "podAnnotations": {"tests/built": cluster.built("operator")},
        "trainerImage": cluster.images["trainer"],
        "resources": {"requests": {"cpu": "50m", "memory": "100Mi"}},
    }


def wait_for_operator(api: Api, replicas: int = 1) -> None:
    """Wait until the operator's pods are ready, and no older ones are left."""

    def ready() -> bool:
        status = api.get("Deployment", ACCOUNT, SYSTEM)["status"]
        return all(status.get(name) == replicas for name in ("replicas", "updatedReplicas", "readyReplicas"))

    wait_until(ready, "the operator to be ready", 180)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that an adapter can teach something within seconds."""
    return schooled_llama(tmp_path_factory.mktemp("base"))


Furnish = Callable[[str, Callable[[], bool]], AbstractContextManager[Tenant]]


@pytest.fixture(scope="session")
def furnish(cluster: Cluster, api: Api, release: Helm, base_model: Path) -> Furnish:
    """Makes a furnished namespace that enforces `restricted`; if what it is for failed, the evidence is kept."""

    @contextlib.contextmanager
    def furnished(name: str, failed: Callable[[], bool]) -> Iterator[Tenant]:
        namespace = f"e2e-{next(_serial)}-{secrets.token_hex(2)}"
        cluster.namespace(namespace)
        with HubServer(host=cluster.address) as hub:
            tenant, broken = Tenant(api, cluster, namespace, hub), True
            try:
                tenant.furnish(base_model)
                with tenant.watched():
                    yield tenant
                broken = failed()
            finally:
                try:
                    _keep_evidence(tenant, name, broken)
                finally:
                    tenant.clear()

    return furnished


def _keep_evidence(tenant: Tenant, name: str, broken: bool) -> None:
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    (EVIDENCE / f"{name}.timeline.txt").write_text("\n".join(tenant.told()) + "\n")
    if not broken:
        return
    folder = EVIDENCE / name
    tenant.keep_evidence(folder)
    with contextlib.suppress(ApiError):  # a pod may just end
        logs = [tenant.api.request("GET", tenant.api.path_of(pod, "log")) for pod in tenant.api.objects("Pod", SYSTEM)]
        (folder / "operator.log").write_text("\n".join(str(log.get("message", log)) for log in logs))
    print(f"logs, events and timeline are kept in {folder}")
    print("\n".join(tenant.timeline[-40:]))


@pytest.fixture
def tenant(request: pytest.FixtureRequest, furnish: Furnish) -> Iterator[Tenant]:
    """A furnished namespace for one test."""

    def failed() -> bool:
        report = request.node.stash.get(_REPORT, None)
        return report is None or report.failed

    with furnish(request.node.name, failed) as made:
        yield made


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest, cluster: Cluster) -> dict[int, float]:
    """The losses of a job to which nothing happened: as the job of `test_from_apply...` saw them with these images."""
    losses = request.config.cache.get(UNDISTURBED, {}).get(cluster.built("trainer"))
    if losses is None:
        pytest.skip("No undisturbed job was trained before with this image: run the whole folder.")
    return {int(step): loss for step, loss in losses.items()}


_REPORT = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let the fixtures know how the test itself ended."""
    report: pytest.TestReport = yield
    if report.when == "call":
        item.stash[_REPORT] = report
    return report  # type: ignore[return-value]
