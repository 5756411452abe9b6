"""`finetune submit`, `list`, `watch`, `wait`, `logs`, `suspend`, `resume` and `retry` on a real API server.

No operator runs: its part, the status, is written by the test, as decide() makes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.time_limits import scaled
from tests.unit.finetune_operator.decision.world import World, job, steps

from finetune_api.crd import definition
from finetune_operator.cli import run_command_line
from finetune_operator.cluster.api import KINDS, Api, Kind
from finetune_operator.manifests import labels
from finetune_operator.manifests.job import UID_LABEL

from .harness.api import Resource
from .harness.control_plane import ControlPlane
from .harness.fake_kubelet import FakeKubelet
from .harness.log_server import LogServer
from .harness.manifests import restricted_container, restricted_pod
from .harness.operator import OperatorProcess, Trainer, fine_tune_job, furnish
from .harness.processes import TimedOutError, free_ports, wait_until
from .harness.tcp_proxy import TcpProxy


@dataclass
class Shell:
    """A user with a kubeconfig, in a namespace of the test's own."""

    control_plane: ControlPlane
    namespace: str
    folder: Path
    capture: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        """Run one command; returns what it printed, after checking its exit code."""
        self.capture.readouterr()
        code = run_command_line([*arguments, "-n", self.namespace])
        self.out, self.err = self.capture.readouterr()
        assert code == expect, (code, self.out, self.err)
        assert "Traceback" not in self.err
        return self.out

    def fails(self, *arguments: str, code: int = 1) -> str:
        """Run one command that fails; returns the one sentence that it says."""
        self(*arguments, expect=code)
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").strip()

    def file(self, **changes: Any) -> str:
        """A job's file with changed fields of the spec."""
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(manifest(**changes)))
        return str(path)

    def job(self, name: str = "support") -> Resource:
        """The job as it is on the API server."""
        return self.control_plane.api.get("FineTuneJob", name, self.namespace)

    def says(self, world: World, name: str = "support") -> None:
        """The operator writes its status."""
        present = self.job(name)
        status = world.status.to_wire()
        self.control_plane.api.replace({**present, "status": status}, "status")


def manifest(name: str = "support", **changes: Any) -> Resource:
    spec: Resource = {
        "model": {"repo": "acme/base"},
        "datasets": [{"name": "claims", "repo": "acme/claims", "task": "classification"}],
        "tuning": {"method": "lora"},
        **changes,
    }
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}


@pytest.fixture(scope="session")
def cluster(control_plane: ControlPlane) -> ControlPlane:
    control_plane.install_crds(definition())
    return control_plane


@pytest.fixture
def shell(
    cluster: ControlPlane,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Shell:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    return Shell(cluster, namespace, tmp_path, capsys)


@pytest.fixture
def submitted(shell: Shell) -> Shell:
    shell("submit", shell.file())
    return shell


# submit ---------------------------------------------------------------------------------------------------


def test_submit_creates_a_job_and_says_so_only_once(shell: Shell) -> None:
    assert shell("submit", shell.file()) == f"support created in namespace {shell.namespace}\n"
    assert shell("submit", shell.file()) == f"support unchanged in namespace {shell.namespace}\n"
    assert shell.job()["spec"]["training"]["epochs"] >= 1


def test_submit_changes_what_may_change_and_takes_it_back_with_the_file(shell: Shell) -> None:
    shell("submit", shell.file())
    assert "support changed" in shell("submit", shell.file(suspend=True))
    assert shell.job()["spec"]["suspend"] is True
    assert "support changed" in shell("submit", shell.file())
    assert shell.job()["spec"]["suspend"] is False


def test_submit_says_in_a_sentence_what_cannot_change(shell: Shell) -> None:
    shell("submit", shell.file())
    sentence = shell.fails("submit", shell.file(tuning={"method": "full"}))
    assert sentence.startswith("support: spec.tuning: tuning cannot change once the job exists")


def test_submit_checks_the_file_before_it_asks_the_cluster(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    shell("submit", shell.file(tuning={"methd": "lora"}), expect=2)
    assert "job.yaml:" in shell.err
    assert "did you mean method?" in shell.err


def test_submit_leaves_nothing_behind_in_a_dry_run(shell: Shell) -> None:
    assert "support created" in shell("submit", shell.file(), "--dry-run")
    assert shell.out.rstrip().endswith("(dry run)")
    assert shell.control_plane.api.objects("FineTuneJob", shell.namespace) == []


def test_submit_goes_on_after_a_job_that_is_refused(shell: Shell) -> None:
    shell("submit", shell.file())
    second = {**manifest("second"), "status": {"phase": "Complete"}}
    text = yaml.safe_dump_all([manifest(tuning={"method": "full"}), second])
    (shell.folder / "two.yaml").write_text(text)
    shell("submit", str(shell.folder / "two.yaml"), expect=1)
    assert "second created" in shell.out
    assert "status" not in shell.job("second")
    assert "error: support: spec.tuning" in shell.err
    assert "1 of 2 jobs were not applied." in shell.err


def test_submit_gives_a_generated_name(shell: Shell) -> None:
    unnamed = manifest()
    unnamed["metadata"] = {"generateName": "sweep-"}
    (shell.folder / "sweep.yaml").write_text(yaml.safe_dump(unnamed))
    names = {shell("submit", str(shell.folder / "sweep.yaml")).split()[0] for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("sweep-") for name in names)


def test_submit_refuses_two_different_namespaces(shell: Shell) -> None:
    placed = manifest()
    placed["metadata"]["namespace"] = "elsewhere"
    (shell.folder / "placed.yaml").write_text(yaml.safe_dump(placed))
    sentence = shell.fails("submit", str(shell.folder / "placed.yaml"), code=2)
    assert "says namespace elsewhere, but -n says" in sentence


def test_submit_into_a_namespace_that_is_not_there_says_so(shell: Shell) -> None:
    shell.namespace = "no-such-place"
    assert shell.fails("submit", shell.file()) == "support: There is no namespace no-such-place."


# list -----------------------------------------------------------------------------------------------------


def test_list_shows_the_columns_of_kubectl(submitted: Shell) -> None:
    submitted.says(job().training().says(progress=steps(120)).settled())
    head, row = submitted("list").splitlines()
    assert head.split() == ["NAME", "PHASE", "STAGE", "PROGRESS", "ETA", "LOSS", "METRIC", "AGE"]
    assert row.split()[:3] == ["support", "Training", "train"]
    assert "120/450 (26%)" in row
    assert "1.5" in row.split()
    wide = submitted("list", "-o", "wide").splitlines()
    assert "METHOD" in wide[0].split()
    assert submitted("list", "-o", "name") == "support\n"
    assert [item["metadata"]["name"] for item in json.loads(submitted("list", "-o", "json"))["items"]] == ["support"]


def test_list_of_all_namespaces_names_them(submitted: Shell) -> None:
    lines = submitted("list", "-A").splitlines()
    assert lines[0].startswith("NAMESPACE")
    assert any(line.split()[:2] == [submitted.namespace, "support"] for line in lines)


def test_an_empty_list_is_said(shell: Shell) -> None:
    assert shell("list") == ""
    assert shell.err == f"There are no FineTuneJobs in namespace {shell.namespace}.\n"


# wait and watch -------------------------------------------------------------------------------------------


def gate_refused() -> World:
    world = job()
    world.gate_passes = False
    return world.complete()


@pytest.mark.parametrize(
    ("make", "code", "sentence"),
    [
        (lambda: job().complete(), 0, "support: Complete: 0.415 → 0.623"),
        (lambda: job().training().failed_for_good("bad-data"), 1, "support: train failed: rank 0: bad-data"),
        (gate_refused, 3, "support: The model worse."),
    ],
    ids=["complete", "failed", "gate-refused"],
)
def test_wait_ends_with_either_end(submitted: Shell, make: Callable[[], World], code: int, sentence: str) -> None:
    submitted.says(job().training())
    timer = threading.Timer(0.3, submitted.says, [make()])
    timer.start()
    submitted("wait", "support", expect=code)
    timer.join()
    assert sentence in submitted.out + submitted.err


def test_wait_gives_up_after_its_time(submitted: Shell) -> None:
    submitted.says(job().training())
    assert submitted.fails("wait", "support", "--timeout", "1s") == "support has not ended after 1s (phase Training)."
    assert submitted.fails("wait", "support", "--timeout", "soon", code=2).startswith(
        "--timeout soon is not a duration"
    )


def test_a_job_that_no_operator_looks_at_is_said(submitted: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.commands._cluster.NOT_SERVED_AFTER", timedelta(0))
    said = "No operator has picked up support yet: is finetune-operator running, "
    said += f"and does it serve namespace {submitted.namespace}?"
    submitted("wait", "support", "--timeout", "1s", expect=1)
    assert submitted.err.splitlines()[0] == said
    timer = threading.Timer(1.5, submitted.says, [job().complete()])
    timer.start()
    submitted("watch", "support")
    timer.join()
    assert submitted.out.count(said) == 1


def test_wait_says_when_the_job_is_deleted(submitted: Shell) -> None:
    api = submitted.control_plane.api
    timer = threading.Timer(0.3, api.delete, [submitted.job()])
    timer.start()
    assert submitted.fails("wait", "support") == "support was deleted."
    timer.join()


def test_wait_outlives_a_connection_that_breaks(submitted: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted.says(job().training())
    with TcpProxy(submitted.control_plane.server) as wire:
        kubeconfig = yaml.safe_load(submitted.control_plane.kubeconfig.read_text())
        kubeconfig["clusters"][0]["cluster"]["server"] = wire.url
        (submitted.folder / "wire.kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        monkeypatch.setenv("KUBECONFIG", str(submitted.folder / "wire.kubeconfig"))
        watching = threading.Event()
        watch = Api.watch

        def spied(*arguments: Any) -> AsyncIterator[Resource]:
            watching.set()
            return watch(*arguments)

        monkeypatch.setattr(Api, "watch", spied)

        def trouble() -> None:
            watching.wait(scaled(30))
            wire.cut()
            submitted.says(job().complete())
            broken = wire.accepted
            wait_until(lambda: wire.accepted > broken, "an attempt while the wire is cut")
            wire.mend()

        thread = threading.Thread(target=trouble)
        thread.start()
        submitted("wait", "support")
        thread.join()
    assert "0.415 → 0.623" in submitted.out


def test_watch_tells_the_story_and_ends_with_the_results(submitted: Shell) -> None:
    world = job().training()
    submitted.says(world)

    def scenario() -> None:
        for progress in (steps(120), steps(450)):
            submitted.says(world.says(progress=progress).settled())
        submitted.says(world.complete())

    timer = threading.Timer(0.3, scenario)
    timer.start()
    submitted("watch", "support")
    timer.join()
    assert "train starts" in submitted.out
    assert "Trained: Model of step 450" in submitted.out
    assert "0.415" in submitted.out
    assert "+0.208" in submitted.out or "improved" in submitted.out


def test_submit_can_go_on_to_watch(shell: Shell) -> None:
    def end() -> None:
        wait_until(lambda: shell.control_plane.api.objects("FineTuneJob", shell.namespace), "the job")
        shell.says(gate_refused())

    thread = threading.Thread(target=end)
    thread.start()
    shell("submit", shell.file(), "--watch", expect=3)
    thread.join()
    assert "support created in namespace" in shell.out
    assert "error: The model worse." in shell.err
    sentence = shell.fails("submit", shell.file(), "--watch", "--dry-run", code=2)
    assert sentence == "--watch needs exactly one job and no --dry-run."


def test_watch_of_a_job_that_has_failed_says_why(submitted: Shell) -> None:
    submitted.says(job().training().failed_for_good("bad-data"))
    submitted("watch", "support", expect=1)
    assert submitted.err == "error: train failed: rank 0: bad-data\n"


def test_watch_in_json_ends_with_the_whole_resource(submitted: Shell) -> None:
    submitted.says(job().complete())
    lines = [json.loads(line) for line in submitted("watch", "support", "-o", "json").splitlines()]
    assert lines[-1]["type"] == "status"
    assert lines[-1]["resource"]["status"]["phase"] == "Complete"


def read_screen(
    screen: FileIO, child: subprocess.Popen[bytes], enough: Callable[[bytes], bool], seconds: float = 60
) -> bytes:
    """What a program writes to its terminal until that is enough or it ends; one that hangs says where."""
    text, deadline = b"", time.monotonic() + scaled(seconds)
    while not enough(text):
        if not select.select([screen], [], [], max(deadline - time.monotonic(), 0))[0]:
            child.send_signal(signal.SIGABRT)
            stacks = read_screen(screen, child, lambda _: False)
            raise TimedOutError(f"Nothing new for {seconds:g} s: {text!r}\n{stacks.decode(errors='replace')}")
        try:
            data = screen.read(65536)
        except OSError:  # Linux: the terminal's other end is closed
            break
        if not data:
            break
        text += data
    return text


def test_watch_in_a_terminal_is_a_live_view_that_ctrl_c_leaves_and_the_job_goes_on(submitted: Shell) -> None:
    submitted.says(job().training().says(progress=steps(120)).settled())
    terminal, own_end = pty.openpty()
    fcntl.ioctl(own_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = [Path(sys.executable).parent / "finetune", "watch", "support", "-n", submitted.namespace]
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONFAULTHANDLER": "1"}
    child = subprocess.Popen(
        program, stdin=own_end, stdout=own_end, stderr=own_end, env=environment, start_new_session=True
    )
    os.close(own_end)
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        shown = read_screen(screen, child, lambda text: b"120/450" in text)
        child.send_signal(signal.SIGINT)
        shown += read_screen(screen, child, lambda text: False)
    assert child.wait() == 130
    assert b"support keeps running; the same command shows it again." in shown
    assert submitted.job()["spec"]["suspend"] is False


# suspend, resume, retry -----------------------------------------------------------------------------------


def test_suspend_and_resume_change_the_spec_and_say_what_follows(submitted: Shell) -> None:
    submitted.says(job().training())
    assert "stops after its next checkpoint" in submitted("suspend", "support")
    assert submitted.job()["spec"]["suspend"] is True
    assert "is already suspended" in submitted("suspend", "support")
    assert submitted("resume", "support") == "support is resuming.\n"
    assert submitted.job()["spec"]["suspend"] is False
    assert submitted("resume", "support") == "support is not suspended (phase Training).\n"


def test_a_job_that_has_ended_cannot_be_suspended(submitted: Shell) -> None:
    submitted.says(job().complete())
    assert submitted.fails("suspend", "support") == "support has already ended (Complete) and cannot be suspended."


def test_retry_gives_the_annotation_a_new_value_each_time(submitted: Shell) -> None:
    submitted.says(job().training().failed_for_good("bad-data"))
    values = set()
    for _ in range(2):
        assert submitted("retry", "support") == "support will retry train.\n"
        values.add(submitted.job()["metadata"]["annotations"]["finetune.dev/retry"])
    assert len(values) == 2


def test_retry_refuses_a_job_that_has_not_failed(submitted: Shell) -> None:
    submitted.says(job().training())
    assert submitted.fails("retry", "support") == "support has not failed (phase Training)."
    submitted.says(job().complete())
    assert submitted.fails("retry", "support") == "support is complete; there is nothing to retry."


# logs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def log_server(submitted: Shell, kubelet: FakeKubelet, tmp_path: Path) -> Iterator[LogServer]:
    with LogServer(tmp_path) as server:
        server.serve_for(submitted.control_plane.api, "node-a")
        yield server


def pod_of(
    shell: Shell, name: str, stage: str, attempt: int = 1, node_rank: int | None = None, before: str = ""
) -> Resource:
    marks = {UID_LABEL: shell.job()["metadata"]["uid"], labels.STAGE: stage, labels.ATTEMPT: str(attempt)}
    if node_rank is not None:
        marks[labels.REPLICA_INDEX] = str(node_rank)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": marks},
        "spec": restricted_pod(restricted_container("trainer")),
    }
    if before:
        pod["spec"]["initContainers"] = [restricted_container(before)]
    return shell.control_plane.api.create(pod, shell.namespace)


def test_logs_are_of_the_newest_attempt_of_the_stage_that_came_furthest(
    submitted: Shell, kubelet: FakeKubelet, log_server: LogServer
) -> None:
    for name, stage, attempt in (("p", "prepare", 1), ("t1", "train", 1), ("t2", "train", 2)):
        kubelet.run(pod_of(submitted, name, stage, attempt, node_rank=0))
        log_server.write(name, f"{stage} {attempt} first", f"{stage} {attempt} last")
    assert submitted("logs", "support") == "train 2 first\ntrain 2 last\n"
    assert submitted("logs", "support", "--attempt", "1", "--tail", "1") == "train 1 last\n"
    assert submitted("logs", "support", "--stage", "prepare") == "prepare 1 first\nprepare 1 last\n"


def test_logs_of_several_pods_are_marked_and_one_rank_can_be_chosen(
    submitted: Shell, kubelet: FakeKubelet, log_server: LogServer
) -> None:
    for node in (0, 1):
        kubelet.run(pod_of(submitted, f"worker-{node}", "train", node_rank=node))
        log_server.write(f"worker-{node}", f"hello from {node}")
    pod_of(submitted, "worker-2", "train", node_rank=2)
    assert submitted("logs", "support").splitlines() == ["0| hello from 0", "1| hello from 1"]
    assert submitted.err == "worker-2 has not started: Pending.\n"
    assert submitted("logs", "support", "--rank", "1") == "hello from 1\n"
    assert submitted.fails("logs", "support", "--rank", "3", code=2) == "There is no rank 3: train has ranks 0 to 2."


def test_logs_are_followed_from_before_the_start_to_the_end(
    submitted: Shell, kubelet: FakeKubelet, log_server: LogServer
) -> None:
    pods = [pod_of(submitted, f"worker-{node}", "train", node_rank=node) for node in (0, 1)]

    def play() -> None:
        for node, pod in enumerate(pods):
            kubelet.run(pod)
            log_server.write(f"worker-{node}", f"hello from {node}")
            log_server.end(f"worker-{node}")

    timer = threading.Timer(0.3, play)
    timer.start()
    lines = submitted("logs", "support", "-f").splitlines()
    timer.join()
    assert sorted(lines) == ["0| hello from 0", "1| hello from 1"]


def test_logs_of_a_pod_that_failed_before_its_stage_began_are_those_of_the_failure(
    submitted: Shell, kubelet: FakeKubelet, log_server: LogServer
) -> None:
    pod = kubelet.bind(pod_of(submitted, "p", "prepare", before="check-publish"))
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    failed = {**pod["status"]["initContainerStatuses"][0], "state": ended}
    status = {"phase": "Failed", "initContainerStatuses": [failed]}
    submitted.control_plane.api.patch(pod, {"status": status}, "status")
    log_server.write("p", "no write access")
    assert submitted("logs", "support") == "no write access\n"
    assert log_server.asked == ["check-publish"]


def test_logs_are_followed_from_one_container_to_the_next(
    submitted: Shell, kubelet: FakeKubelet, log_server: LogServer
) -> None:
    pod = kubelet.bind(pod_of(submitted, "p", "prepare", before="check-publish"))
    runs = {**pod["status"]["initContainerStatuses"][0], "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    submitted.control_plane.api.patch(pod, {"status": {"initContainerStatuses": [runs]}}, "status")
    log_server.write("p", "hello")
    log_server.end("p")
    timer = threading.Timer(0.3, kubelet.run, [pod])
    timer.start()
    assert submitted("logs", "support", "-f") == "hello\nhello\n"
    timer.join()
    assert log_server.asked == ["check-publish", "trainer"]


def test_logs_of_an_older_job_of_the_same_name_are_not_shown(
    submitted: Shell, kubelet: FakeKubelet, log_server: LogServer
) -> None:
    kubelet.run(pod_of(submitted, "old", "train"))
    log_server.write("old", "of the job before")
    submitted.control_plane.api.delete(submitted.job())
    submitted("submit", submitted.file())
    assert submitted.fails("logs", "support").startswith("No pods are left of support;")


def test_logs_of_pods_that_are_gone_are_on_the_volume(submitted: Shell) -> None:
    assert "in logs/<stage>-<attempt>/" in submitted.fails("logs", "support", "--stage", "prepare")


# What can be wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["watch", "wait", "logs", "suspend", "resume", "retry"])
def test_a_misspelt_name_is_answered_with_the_near_one(submitted: Shell, command: str) -> None:
    sentence = submitted.fails(command, "suport")
    assert sentence == f"There is no FineTuneJob suport in namespace {submitted.namespace}; did you mean support?"


def test_a_job_in_another_namespace_is_pointed_at(submitted: Shell, cluster: ControlPlane) -> None:
    other = cluster.create_namespace()
    try:
        submitted.namespace, home = other, submitted.namespace
        sentence = submitted.fails("wait", "support")
        assert sentence.startswith(f"There is no FineTuneJob support in namespace {other}; there is one in ")
        assert home in sentence
    finally:
        cluster.delete_namespace(other)


def test_a_user_without_the_right_is_told_which_right(
    submitted: Shell, cluster: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig_for("default", submitted.namespace)))
    for command in (["list"], ["watch", "support"], ["submit", submitted.file()]):
        sentence = submitted.fails(*command)
        assert "The cluster forbids it: User" in sentence
        assert 'resource "finetunejobs" in API group "finetune.dev"' in sentence


def test_credentials_that_are_not_accepted_are_said(
    shell: Shell, cluster: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = yaml.safe_load(cluster.kubeconfig_for("default", shell.namespace).read_text())
    kubeconfig["users"][0]["user"] = {"token": "expired"}
    (shell.folder / "expired").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(shell.folder / "expired"))
    assert shell.fails("list").startswith("The cluster does not accept your credentials")


def test_a_cluster_that_is_not_there_is_said(
    shell: Shell, cluster: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = yaml.safe_load(cluster.kubeconfig.read_text())
    (port,) = free_ports(1)
    kubeconfig["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{port}"
    (shell.folder / "away").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(shell.folder / "away"))
    for command in (["list"], ["wait", "support"], ["submit", shell.file()], ["logs", "support"]):
        sentence = shell.fails(*command)
        assert f"https://127.0.0.1:{port} cannot be reached: the connection is refused" in sentence


def test_a_certificate_that_is_not_trusted_is_said(
    shell: Shell, cluster: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = yaml.safe_load(cluster.kubeconfig.read_text())
    kubeconfig["clusters"][0]["cluster"].pop("certificate-authority")
    (shell.folder / "untrusting").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(shell.folder / "untrusting"))
    assert "the kubeconfig does not trust its certificate" in shell.fails("list")


def test_a_kind_that_the_cluster_does_not_know_is_said(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "FineTuneJob", Kind("nobody.dev/v1", "finetunejobs"))
    for command in (["list"], ["wait", "support"], ["suspend", "support"], ["submit", shell.file()]):
        sentence = shell.fails(*command)
        assert "This cluster does not know FineTuneJobs: ask for the chart finetune-operator" in sentence


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "KUBECONFIG is {path}, but that file does not exist."),
        ("", "{path} cannot be used"),
        ("a: [", "{path} is not a valid kubeconfig"),
        ("just text", "{path}"),
        ("apiVersion: v1\nkind: Config\n", "{path} cannot be used"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    said: str,
) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(path))
    assert run_command_line(["list"]) == 1
    error = capsys.readouterr().err
    assert said.format(path=path) in error
    assert error.count("\n") == 1


def test_without_any_kubeconfig_that_is_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_command_line(["list"]) == 1
    assert capsys.readouterr().err.startswith("error: No kubeconfig found")


def test_a_context_that_is_not_there_is_answered_with_the_near_one(shell: Shell) -> None:
    assert shell.fails("list", "--context", "tset") == "There is no context tset in the kubeconfig; did you mean test?"
    assert (
        shell.fails("list", "--context", "prod") == "There is no context prod in the kubeconfig; known contexts: test."
    )
    shell("list", "--context", "test")


def test_the_namespace_of_the_context_is_the_default(submitted: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig = yaml.safe_load(submitted.control_plane.kubeconfig.read_text())
    kubeconfig["contexts"][0]["context"]["namespace"] = submitted.namespace
    (submitted.folder / "placed").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(submitted.folder / "placed"))
    submitted.capture.readouterr()
    assert run_command_line(["list", "-o", "name"]) == 0
    assert submitted.capture.readouterr().out == "support\n"


def test_a_job_is_submitted_and_watched_to_its_end_with_the_operator_at_work(
    shell: Shell, kubelet: FakeKubelet, operator: OperatorProcess
) -> None:
    api = shell.control_plane.api
    furnish(api, shell.namespace)
    path = shell.folder / "real.yaml"
    path.write_text(yaml.safe_dump(fine_tune_job("support")))
    with kubelet.playing(shell.namespace, Trainer(api, shell.namespace).succeeds):
        shell("submit", str(path), "--watch")
    for told in ("prepare starts", "Prepared:", "train starts", "Trained:", "Evaluated:", "Published:", "Complete:"):
        assert told in shell.out
    assert shell("wait", "support").startswith("support: Complete: 0.415 → 0.623")
    assert operator.stop() == 0


def test_kubectl_finetune_is_the_same(submitted: Shell) -> None:
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = ["kubectl", "finetune", "list", "-n", submitted.namespace, "-o", "name"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "support\n"), done.stderr
