"""One job in a namespace that our operator serves, and shorthand for what tests ask of it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from finetune_api.base import STAGES, Stage
from finetune_api.report import Failure, FailureClass

from .api import Api, Resource
from .control_plane import ControlPlane
from .fake_kubelet import Exit, FakeKubelet
from .operator import Trainer, fine_tune_job, furnish, is_true, wait_for_job
from .processes import wait_until

NAME = "support"


class JobScenario:
    """The job `support` on three nodes; the test is its user, kubelet and trainer."""

    def __init__(self, control_plane: ControlPlane, namespace: str, kubelet: FakeKubelet) -> None:
        self.api: Api = control_plane.api
        self.namespace, self.kubelet = namespace, kubelet
        self.trainer = Trainer(self.api, namespace)
        furnish(self.api, namespace)

    def apply(self, **spec: object) -> Resource:
        """Create the job; fields of its spec may be replaced."""
        return self.api.create(fine_tune_job(NAME, **spec), self.namespace)

    def wait(self, condition: Callable[[Resource], object], what: str, seconds: float = 60) -> Resource:
        """Wait until the status is as wanted, and return it."""
        return wait_for_job(self.api, NAME, self.namespace, condition, what, seconds)["status"]  # type: ignore[no-any-return]

    def reason(self, reason: str, seconds: float = 60) -> Resource:
        """Wait until Ready gives that reason."""
        return self.wait(lambda status: _ready(status).get("reason") == reason, reason, seconds)

    def message(self, reason: str, seconds: float = 60) -> str:
        """Wait until Ready gives that reason, and return its sentence."""
        return str(_ready(self.reason(reason, seconds))["message"])

    def pods(self, count: int, stage: Stage, number: int = 1) -> list[Resource]:
        """Wait for the pods of an attempt."""
        labels = {"finetune.dev/stage": str(stage), "finetune.dev/attempt": str(number)}
        return self.kubelet.wait_for_pods(self.namespace, count, labels)

    def pods_terminating(self, stage: Stage = Stage.TRAIN) -> list[Resource]:
        """Wait until every pod of a stage that has not ended is being deleted, and return them."""

        def all_of_them() -> list[Resource] | None:
            pods = self.api.objects("Pod", self.namespace, {"finetune.dev/stage": str(stage)})
            return pods if pods and all("deletionTimestamp" in pod["metadata"] for pod in pods) else None

        return wait_until(all_of_them, f"the pods of {stage} to be deleted")

    def patch(self, body: Resource) -> None:
        """Change the job as a user does."""
        self.api.patch({"kind": "FineTuneJob", "metadata": {"name": NAME, "namespace": self.namespace}}, body)

    def until(self, stage: Stage) -> list[Resource]:
        """Everything goes well until the pods of a stage run, which are returned."""
        for each in STAGES:
            count = 3 if each is Stage.TRAIN else 1
            running = [self.kubelet.run(pod) for pod in self.pods(count, each)]
            if each is stage:
                return running
            self.end_well(*running)
        raise AssertionError("a job has no other stages")

    def until_train(self) -> list[Resource]:
        """Prepare goes well; the pods of Train run."""
        return self.until(Stage.TRAIN)

    def end_well(self, *pods: Resource) -> None:
        """Let pods succeed, with the report that they make."""
        for pod in pods:
            self.kubelet.end(pod, self.trainer.succeeds(pod))

    def carry_on(self) -> Resource:
        """From here on everything goes well."""
        with self.kubelet.playing(self.namespace, self.trainer.succeeds):
            return self.wait(is_true("Complete"), "Complete", 120)

    def attempts(self, status: Resource, stage: Stage) -> list[str]:
        """How the attempts of a stage ended: their reason, or else their outcome."""
        return [a.get("reason") or a["outcome"] for a in status["attempts"] if a["stage"] == stage]


def failing(kind: str, rank: int, sentence: str = "") -> Exit:
    """How a rank ends that says why."""
    failure = Failure(
        failure_class=FailureClass(kind),
        rank=rank,
        sentence=sentence or f"Rank {rank}: {kind}.",
        time=datetime.now(UTC),
    )
    return Exit(code=1, message=failure.model_dump_json(by_alias=True, exclude_none=True))


def _ready(status: Resource) -> Resource:
    return next((c for c in status.get("conditions", []) if c["type"] == "Ready"), {})
