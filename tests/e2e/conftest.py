"""Fixtures of the end-to-end tests: one cluster and one release of the chart a session, one namespace a test."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster import machine
from tests.cluster.__main__ import down, running, up
from tests.cluster.images import Images, names
from tests.cluster.places import NODE_ADDRESS, Places
from tests.integration.harness import binaries
from tests.integration.harness.api import Api
from tests.integration.harness.control_plane import is_given
from tests.integration.harness.helm import Helm
from tests.integration.harness.operator import ACCOUNT
from tests.integration.harness.processes import wait_until
from tests.support.hub_server import HubServer
from tests.support.tiny import schooled_llama

from .place import Place

EVIDENCE = Path(__file__).parents[2] / "build" / "e2e"
SYSTEM = "finetune-system"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
KEEP_VARIABLE = "FINETUNE_KEEP_CLUSTER"
"""Set it, and the cluster is still there for the next run."""
UNDISTURBED = "finetune/undisturbed"
_serial = itertools.count(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bring the cluster up before the first test: images take minutes, and a test's time-out would end that."""
    here = Path(__file__).parent
    wanted = [item for item in items if item.path.is_relative_to(here)]
    if not wanted or config.option.collectonly:
        return
    places = Places.default()
    config.stash[_LACKING] = None if running(places) else machine.lacks(places.cache)
    if is_given() and not running(places):
        config.stash[_LACKING] = (
            "A cluster is given, but these tests read volumes and signal processes on a node of their own."
        )
    config.stash[_STARTED] = False
    if config.stash[_LACKING] is None:
        binaries.ensure("helm")
        config.stash[_STARTED] = not running(places) and KEEP_VARIABLE not in os.environ
        up(places)


_LACKING, _STARTED = pytest.StashKey[str | None](), pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def places(request: pytest.FixtureRequest) -> Iterator[Places]:
    """A running cluster of one real node; taken down afterwards if this session has brought it up."""
    lacking = request.config.stash[_LACKING]
    if lacking:
        pytest.skip(lacking)
    places = Places.default()
    yield places
    if request.config.stash[_STARTED]:
        down(places)


@pytest.fixture(scope="session")
def api(places: Places) -> Api:
    """The cluster, as its administrator."""
    return Api(places.kubeconfig)


@pytest.fixture(scope="session")
def release(places: Places, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The chart, installed by Helm into a namespace that enforces `restricted`; its operator runs."""
    if api.find("Namespace", SYSTEM) is None:
        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM, "labels": RESTRICTED}})
    helm = Helm(tmp_path_factory.mktemp("helm"), places.kubeconfig)
    helm.install(SYSTEM, values())
    wait_for_operator(api)
    return helm


def values() -> dict[str, object]:
    """What is set for tests: short waits, and the image as it is now."""
    waits = {"FINETUNE_BACKOFF_BASE_SECONDS": "1", "FINETUNE_GRACE_SECONDS": "45"}
    return {
        "extraEnv": [{"name": name, "value": value} for name, value in waits.items()],
        "log": {"level": "debug"},
        "podAnnotations": {"tests/built": Images(Places.default()).imported("operator")},
        "trainerImage": names()["trainer"],
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


@pytest.fixture
def hub(places: Places) -> Iterator[HubServer]:
    """A Hub on the node's address."""
    with HubServer(host=NODE_ADDRESS) as server:
        yield server


@pytest.fixture
def place(
    request: pytest.FixtureRequest, places: Places, api: Api, release: Helm, hub: HubServer, base_model: Path
) -> Iterator[Place]:
    """A furnished namespace that enforces `restricted`; if the test fails, the evidence is kept."""
    namespace = f"e2e-{next(_serial)}-{secrets.token_hex(2)}"
    metadata = {"name": namespace, "labels": RESTRICTED}
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    wait_until(lambda: api.find("ServiceAccount", "default", namespace), "the namespace")
    made = Place(api, places, namespace, hub)
    made.furnish(base_model)
    with made.watched():
        yield made
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    (EVIDENCE / f"{request.node.name}.timeline.txt").write_text("\n".join(made.timeline) + "\n")
    report = request.node.stash.get(_REPORT, None)
    if report is None or report.failed:
        made.keep_evidence(EVIDENCE / request.node.name)
        log = [api.request("GET", api.path_of(pod, "log"))["message"] for pod in api.objects("Pod", SYSTEM)]
        (EVIDENCE / request.node.name / "operator.log").write_text("\n".join(map(str, log)))
        print(f"logs, events and timeline are kept in {EVIDENCE / request.node.name}")
        print("\n".join(made.timeline[-40:]))
    made.clear()


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest, place: Place) -> dict[int, float]:
    """The losses of a job to which nothing happened: as `test_what_is_published...` saw them with these images."""
    losses = request.config.cache.get(UNDISTURBED, {}).get(Images(place.places).imported("trainer"))
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
