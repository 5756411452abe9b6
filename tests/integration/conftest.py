"""Fixtures of the integration tests: one control plane a worker of pytest-xdist, one namespace a test."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.crd import definition

from .harness import binaries
from .harness.control_plane import ControlPlane, is_given
from .harness.fake_kubelet import FAKE_NODE_LABEL, FakeKubelet
from .harness.helm import Helm
from .harness.job_scenario import JobScenario
from .harness.operator import OperatorProcess

NEEDED = (*binaries.CONTROL_PLANE, "helm", "jobset", "kubeflow-trainer")
LONG_FIRST = ("test_killed_between_calls", "test_trainjob", "test_disturbances", "test_failures")
"""Files whose tests take longest: begun last, they would keep one worker busy while the others have ended."""
TOGETHER = ("test_trainjob", "test_chart", "test_command_line_on_a_cluster")
"""Files whose tests share what is made for the file: one worker for all of each; a given cluster has but one."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Build what is missing before there are workers, aloud: they would be silent for minutes."""
    if config.option.collectonly or is_given() or not binaries.can_build():
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    aloud = capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext()
    # What cannot be built is said by the tests that need it.
    with aloud, contextlib.suppress(binaries.BinaryUnavailableError):
        for name in binaries.missing(NEEDED):
            binaries.ensure(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say what runs where and in which order; build the programs before the first test.

    A build takes minutes, and a test's time-out would end it. Of several workers one builds, the others wait for it.
    """
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in ours:
        if is_given() or item.path.stem in TOGETHER:
            item.add_marker(pytest.mark.xdist_group("given" if is_given() else item.path.stem))
    items.sort(key=lambda item: LONG_FIRST.index(item.path.stem) if item.path.stem in LONG_FIRST else len(LONG_FIRST))
    with contextlib.suppress(binaries.BinaryUnavailableError):
        _build({name for item in ours for name in getattr(item, "fixturenames", ())}, config)


def _build(fixtures: set[str], config: pytest.Config) -> None:
    if config.option.collectonly or not binaries.can_build():
        return
    if fixtures & {"helm", "operator"}:
        binaries.ensure("helm")
    if "kubeflow_trainer" in fixtures and not is_given():
        binaries.ensure("jobset"), binaries.ensure("kubeflow-trainer")
    if "control_plane" in fixtures and not is_given():
        for name in binaries.CONTROL_PLANE:
            binaries.ensure(name)
        binaries.ensure_training_operator_manifests()


@pytest.fixture(scope="session")
def control_plane(request: pytest.FixtureRequest) -> Iterator[ControlPlane]:
    """A control plane without nodes, shared by all tests of the session.

    Its logs stay behind if a test failed.
    """
    if not is_given() and binaries.missing() and not binaries.can_build():
        pytest.skip(binaries.HOW_TO_GET_THEM)
    with ControlPlane.from_environment() as running:
        yield running
        if request.session.testsfailed:
            running.keep_folder = True
            warnings.warn(f"Logs of the control plane are kept in {running.folder}", stacklevel=1)


@pytest.fixture
def own_control_plane(control_plane: ControlPlane) -> ControlPlane:
    """The control plane, for tests that read its files or stop its programs; skipped on a given cluster."""
    if not control_plane.owned:
        pytest.skip("This test reads files or stops programs of the control plane, and the cluster is a given one.")
    return control_plane


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace of the test's own that enforces the `restricted` Pod Security Standard."""
    name = control_plane.create_namespace(labels={"pod-security.kubernetes.io/enforce": "restricted"})
    yield name
    control_plane.delete_namespace(name)


@pytest.fixture
def kubelet(control_plane: ControlPlane) -> FakeKubelet:
    """The kubelet, played by the test; pods run on `node-a` unless it says otherwise."""
    nodes = control_plane.api.objects("Node")
    if any(FAKE_NODE_LABEL not in node["metadata"].get("labels", {}) for node in nodes):
        pytest.skip("The given cluster has kubelets of its own, which would run the pods of this test.")
    kubelet = FakeKubelet(control_plane.api)
    kubelet.add_node("node-a")
    return kubelet


@pytest.fixture(scope="session")
def fine_tune_jobs(control_plane: ControlPlane) -> None:
    """FineTuneJobs are served."""
    control_plane.install_crds(definition())


@pytest.fixture
def operator(
    request: pytest.FixtureRequest, control_plane: ControlPlane, namespace: str, tmp_path: Path, fine_tune_jobs: None
) -> Iterator[OperatorProcess]:
    """Our operator, serving the test's namespace under the chart's rights; an indirect parameter says more of it."""
    try:
        binaries.ensure("helm")
    except binaries.BinaryUnavailableError as problem:
        pytest.skip(str(problem))
    ops = control_plane.create_namespace("ops")
    helm, more = Helm(tmp_path, control_plane.kubeconfig), getattr(request, "param", {})
    running = OperatorProcess(control_plane, helm, namespace, ops, **more).start()
    yield running
    running.kill()
    control_plane.delete_namespace(ops)


@pytest.fixture
def scenario(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet, operator: OperatorProcess
) -> JobScenario:
    """A furnished namespace that our operator serves."""
    return JobScenario(control_plane, namespace, kubelet)
