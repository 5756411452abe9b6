"""Fixtures of the end-to-end tests: one cluster and one release of the chart a session, one namespace a test."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

import pytest
from tests.cluster.__main__ import down, running, up
from tests.cluster.images import Images, names
from tests.cluster.places import NODE_ADDRESS, Places
from tests.integration.harness import binaries
from tests.integration.harness.api import Api, ApiError
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
REQUIRE_VARIABLE = "FINETUNE_REQUIRE_CLUSTER"
"""Set it, and a machine that cannot have a cluster is an error; else its tests are listed as not run."""
UNDISTURBED = "finetune/undisturbed"
GIVEN = "A cluster is given, but these tests read volumes and signal processes on a node of their own."
OTHERS_SECONDS = 20 * 60
"""How long another run of these tests on this machine is waited for: addresses and names are the same."""
_LACKING, _OURS, _LOCK = pytest.StashKey[str | None](), pytest.StashKey[bool](), pytest.StashKey[TextIO]()
_serial = itertools.count(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bring the cluster up before the first test: images take minutes, and a test's time-out would end that."""
    here = Path(__file__).parent
    if config.option.collectonly or not any(item.path.is_relative_to(here) for item in items):
        return
    config.stash[_LACKING] = lacking = _bring_up(config)
    if lacking and REQUIRE_VARIABLE in os.environ:
        pytest.exit(lacking, returncode=1)


def _bring_up(config: pytest.Config) -> str | None:
    """Start the cluster, or say why there is none. One that we start ends with this process, however that ends."""
    places = Places.default()
    if is_given() and not running(places):
        return GIVEN
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # what takes minutes is said at once
        try:
            config.stash[_LOCK] = _alone(places.cache.parent / "e2e.lock")
            ours = config.stash[_OURS] = not running(places) and KEEP_VARIABLE not in os.environ
            up(places, owner=os.getpid() if ours else None)
            binaries.ensure("helm")
        except (SystemExit, binaries.BinaryUnavailableError, OSError) as problem:
            return f"There is no cluster: {problem}"
    return None


def _alone(path: Path, seconds: float = OTHERS_SECONDS) -> TextIO:
    """Wait until no other run uses the cluster; the kernel forgets the lock with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, deadline, told = path.open("w"), time.monotonic() + seconds, False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise SystemExit(f"Another run of these tests has had it for {seconds / 60:.0f} minutes.") from None
        if not told:
            print("waiting for another run of these tests ...", file=sys.stderr, flush=True)
            told = True
        time.sleep(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Take the cluster down that this session has brought up, whatever became of the tests."""
    if session.config.stash.get(_OURS, False):
        down(Places.default())


@pytest.fixture(scope="session")
def places(request: pytest.FixtureRequest) -> Places:
    """A running cluster of one real node."""
    lacking = request.config.stash[_LACKING]
    if lacking:
        pytest.skip(lacking)
    return Places.default()


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
    waits = {"FINETUNE_BACKOFF_BASE_SECONDS": "1", "FINETUNE_GRACE_SECONDS": "30", "FINETUNE_LEASE_SECONDS": "8"}
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


Furnish = Callable[[str, Callable[[], bool]], AbstractContextManager[Place]]


@pytest.fixture(scope="session")
def furnish(places: Places, api: Api, release: Helm, base_model: Path) -> Furnish:
    """Makes a furnished namespace that enforces `restricted`; if what it is for failed, the evidence is kept."""

    @contextlib.contextmanager
    def furnished(name: str, failed: Callable[[], bool]) -> Iterator[Place]:
        namespace = f"e2e-{next(_serial)}-{secrets.token_hex(2)}"
        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": RESTRICTED}})
        wait_until(lambda: api.find("ServiceAccount", "default", namespace), "the namespace")
        with HubServer(host=NODE_ADDRESS) as hub:
            place, broken = Place(api, places, namespace, hub), True
            try:
                place.furnish(base_model)
                with place.watched():
                    yield place
                broken = failed()
            finally:
                try:
                    _keep_evidence(place, name, broken)
                finally:
                    place.clear()

    return furnished


def _keep_evidence(place: Place, name: str, broken: bool) -> None:
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    (EVIDENCE / f"{name}.timeline.txt").write_text("\n".join(place.told()) + "\n")
    if not broken:
        return
    folder = EVIDENCE / name
    place.keep_evidence(folder)
    with contextlib.suppress(ApiError):  # a pod may just end
        logs = [place.api.request("GET", place.api.path_of(pod, "log")) for pod in place.api.objects("Pod", SYSTEM)]
        (folder / "operator.log").write_text("\n".join(str(log.get("message", log)) for log in logs))
    print(f"logs, events and timeline are kept in {folder}")
    print("\n".join(place.timeline[-40:]))


@pytest.fixture
def place(request: pytest.FixtureRequest, furnish: Furnish) -> Iterator[Place]:
    """A furnished namespace for one test."""

    def failed() -> bool:
        report = request.node.stash.get(_REPORT, None)
        return report is None or report.failed

    with furnish(request.node.name, failed) as made:
        yield made


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest, places: Places) -> dict[int, float]:
    """The losses of a job to which nothing happened: as the job of `test_from_apply...` saw them with these images."""
    losses = request.config.cache.get(UNDISTURBED, {}).get(Images(places).imported("trainer"))
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
