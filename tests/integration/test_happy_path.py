"""A FineTuneJob on a real API server, from `kubectl apply` to Complete: the test is kubelet and trainer."""

from __future__ import annotations

from collections import Counter

from tests.support.time_limits import scaled

from .harness.control_plane import ControlPlane
from .harness.fake_kubelet import FakeKubelet
from .harness.operator import OperatorProcess, Trainer, fine_tune_job, furnish, is_true, wait_for_job
from .harness.processes import wait_until

NAME = "support"


def test_a_job_is_carried_to_complete(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet, operator: OperatorProcess
) -> None:
    api = control_plane.api
    furnish(api, namespace)
    api.create(fine_tune_job(NAME), namespace)
    trainer = Trainer(api, namespace)
    with kubelet.playing(namespace, trainer.succeeds):
        done = wait_for_job(api, NAME, namespace, is_true("Complete"), "Complete", seconds=120)
    status = done["status"]
    assert [(a["stage"], a["number"], a["outcome"]) for a in status["attempts"]] == [
        (stage, 1, "succeeded") for stage in ("prepare", "train", "evaluate", "publish")
    ]
    assert status["published"]["commit"] == "c0ffee"
    assert status["observedGeneration"] == done["metadata"]["generation"]
    assert "finalizers" not in done["metadata"]
    assert not any(key.startswith("kopf") for key in done["metadata"].get("annotations", {}))
    user = f"system:serviceaccount:{operator.ops}:{operator.account}"
    # Before it is stopped: what is under way then, its Lease's renewal, is broken off, and the server calls that a 500.
    answers = {e["responseStatus"]["code"] for e in control_plane.audit_events(user)}
    assert answers <= {200, 201, 404, 409}
    assert operator.stop() == 0
    assert "Traceback" not in operator.words()
    writes = [e for e in control_plane.audit_events(user) if e["verb"] in ("create", "update", "patch", "delete")]
    counted = Counter((e["verb"], e["objectRef"]["resource"]) for e in writes if e["objectRef"]["resource"] != "leases")
    # Each stage has a report channel of its own; everything else is counted together.
    kinds = ("serviceaccounts", "roles", "rolebindings", "configmaps")
    assert [counted.pop(("create", kind)) for kind in kinds] == [4, 4, 4, 4 + 1], "and one ConfigMap is the run config"
    assert counted.total() <= 25, counted


def test_children_are_gone_with_their_job_and_the_kept_claim_stays(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet, operator: OperatorProcess
) -> None:
    api = control_plane.api
    furnish(api, namespace)
    job = api.create(fine_tune_job(NAME), namespace)
    wait_for_job(api, NAME, namespace, lambda status: status.get("phase") == "Preparing", "Preparing")
    (pod,) = kubelet.wait_for_pods(namespace, 1, {"finetune.dev/stage": "prepare"})
    assert pod["spec"]["initContainers"][0]["name"] == "check-publish"
    api.delete(job)
    with kubelet.playing(namespace):
        wait_until(lambda: not api.objects("Pod", namespace), "the pods to be gone", 60)
        wait_until(lambda: not api.objects("Job", namespace), "the Job to be gone", 60)
    kept = [claim["metadata"]["name"] for claim in api.objects("PersistentVolumeClaim", namespace)]
    assert "support-run" in kept


def test_a_second_replica_waits_and_takes_over_when_the_first_dies(
    control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet, operator: OperatorProcess
) -> None:
    api = control_plane.api
    furnish(api, namespace)
    api.create(fine_tune_job(NAME), namespace)
    wait_for_job(api, NAME, namespace, lambda status: status.get("phase") == "Preparing", "Preparing")
    # The replica that is left is the program itself; other tests fork theirs.
    second = operator.twin()
    program = second.program()
    try:
        wait_until(lambda: second.get("/readyz", second.metrics_port)[0] == 200, "the second replica to be ready")
        assert "finetune_leader 0.0" in second.get("/metrics", second.metrics_port)[1]
        operator.kill()
        with kubelet.playing(namespace, Trainer(api, namespace).succeeds):
            done = wait_for_job(api, NAME, namespace, is_true("Complete"), "Complete", seconds=120)
        assert [a["number"] for a in done["status"]["attempts"]] == [1, 1, 1, 1]
        metrics = second.get("/metrics", second.metrics_port)[1]
        assert "finetune_leader 1.0" in metrics
        assert f'finetune_jobs{{namespace="{namespace}",phase="Complete"}} 1.0' in metrics
        program.terminate()
        assert program.wait(timeout=scaled(30)) == 0
    finally:
        program.kill()
        program.wait(timeout=scaled(10))
