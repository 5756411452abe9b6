"""What the chart grants is what the operator uses: its Role against the API server's audit log."""

from __future__ import annotations

import pytest

from .harness.control_plane import ControlPlane
from .harness.fake_kubelet import FakeKubelet
from .harness.operator import OperatorProcess, Right, Trainer, fine_tune_job, furnish, is_true, rights, wait_for_job
from .harness.processes import wait_until

HELD_TO_BE_HANDED_ON: set[Right] = {
    ("", "configmaps", "patch"),  # RBAC lets nobody grant what he does not hold: the trainer patches its report
    ("finetune.dev", "finetunejobs/finalizers", "update"),  # for blockOwnerDeletion in ownerReferences
}
WHOSE_IS_IT: set[Right] = {
    # Asked only when something of the same name exists: after a crash between two calls, or an older job's.
    ("", "configmaps", "get"),
    ("", "serviceaccounts", "get"),
    ("batch", "jobs", "get"),
    ("kubeflow.org", "pytorchjobs", "get"),
    ("networking.k8s.io", "networkpolicies", "get"),
    ("rbac.authorization.k8s.io", "rolebindings", "get"),
    ("rbac.authorization.k8s.io", "roles", "get"),
}


@pytest.mark.parametrize("operator", [{"values": {"rbac": {"protectReports": "always"}}}], indirect=True, ids=[""])
def test_the_operator_uses_what_it_is_granted_and_asks_for_nothing_else(
    own_control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet, operator: OperatorProcess
) -> None:
    api = own_control_plane.api
    furnish(api, namespace)
    job = api.create(fine_tune_job("support", cleanup={"ttlSecondsAfterFinished": 0}), namespace)
    with kubelet.playing(namespace, Trainer(api, namespace).succeeds):
        wait_for_job(api, "support", namespace, is_true("Complete"), "Complete", seconds=120)
        wait_until(lambda: not api.objects("Job", namespace), "the finished job's children to be deleted", 60)
        wait_until(lambda: not api.objects("PyTorchJob", namespace), "the rest of them to be deleted", 60)
    api.delete(job)
    operator.stop()
    user = f"system:serviceaccount:{operator.ops}:{operator.account}"
    events = [event for event in own_control_plane.audit_events(user) if event["responseStatus"]["code"] == 403]
    refused = {(event["verb"], event["objectRef"]["resource"]) for event in events}
    assert refused <= {("get", "nodes")}, "only rbac.clusterReads gives that, and the operator does without"
    granted = rights(api.get("Role", operator.account, namespace))
    granted |= rights(api.get("Role", f"{operator.account}-lease", operator.ops))
    used = own_control_plane.permissions_used(user)
    assert used <= granted
    assert granted - used == HELD_TO_BE_HANDED_ON | WHOSE_IS_IT - used
