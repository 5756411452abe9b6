import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.finetune_operator.manifests.restricted import violations

from finetune_api.base import STAGES, Stage
from finetune_api.runconfig import Attempt, RunConfig
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.decision.model import Environment
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.children import all_manifests, child_manifests, first_attempt
from finetune_operator.manifests.job import Job, Manifest
from finetune_operator.manifests.labels import node_rank
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.manifests.shared import isolation, run_claim, run_config, stage_channel
from finetune_operator.manifests.trainjob import TrainJobBackend

SPEC: dict[str, object] = {
    "model": {"repo": "acme/base"},
    "datasets": [{"name": "claims", "repo": "acme/claims", "task": "classification"}],
    "tuning": {"method": "lora"},
    "topology": {"nodes": 3, "gpusPerNode": 4},
    "publish": {"repo": "acme/support"},
    "tracking": {"wandb": {"project": "support"}},
    "credentials": {"hub": {"name": "hf-read"}, "publish": {"name": "hf-write"}, "wandb": {"name": "wb", "key": "key"}},
    "podTemplate": {
        "nodeSelector": {"pool": "a100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "priorityClassName": "research",
        "queueName": "team",
        "labels": {"team": "ml", "finetune.dev/uid": "forged"},
        "annotations": {"note": "x"},
        "env": [
            {"name": "NCCL_IB_HCA", "value": "mlx5"},
            {"name": "NCCL_DEBUG", "value": "INFO"},
            {"name": "FINETUNE_TOKENS", "value": "/elsewhere"},
        ],
        "resources": {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "96Gi"}},
    },
}


def job(name: str = "support", **spec: object) -> Job:
    return Job("ml", name, "uid-1", FineTuneJobSpec.model_validate(SPEC | spec), "trainer@sha256:1")


def child(stage: Stage, of: Job | None = None, **attempt: object) -> Manifest:
    of = of or job()
    return child_manifests(of, first_attempt(of, stage).model_copy(update=attempt), PyTorchJobBackend())[-1]


def pod(manifest: Manifest) -> dict[str, Any]:
    spec = manifest["spec"]
    template = (
        spec["pytorchReplicaSpecs"]["Worker"]["template"] if manifest["kind"] == "PyTorchJob" else spec["template"]
    )
    return template["spec"]  # type: ignore[no-any-return]


def container(manifest: Manifest) -> dict[str, Any]:
    return pod(manifest)["containers"][0]  # type: ignore[no-any-return]


def environment(manifest: Manifest) -> dict[str, str]:
    return {e["name"]: e.get("value", json.dumps(e.get("valueFrom"))) for e in container(manifest)["env"]}


def volumes(manifest: Manifest) -> dict[str, Any]:
    return {v["name"]: v for v in pod(manifest)["volumes"]}


@pytest.mark.parametrize("stage", STAGES)
def test_pods_pass_the_restricted_pod_security_standard(stage: Stage) -> None:
    assert violations(pod(child(stage))) == []


@pytest.mark.parametrize("name", ["a", "9-lives", "x" * 63, "a.dotted.name"])
def test_names_and_labels_are_legal_for_any_job(name: str) -> None:
    for manifest in all_manifests(job(name), PyTorchJobBackend()):
        assert len(manifest["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in manifest["metadata"]["labels"].values())
        assert manifest["metadata"]["labels"]["finetune.dev/uid"] == "uid-1"


def test_everything_is_owned_by_the_job_but_a_claim_that_is_kept() -> None:
    for manifest in all_manifests(job(), PyTorchJobBackend()):
        kept = manifest["kind"] == "PersistentVolumeClaim"
        assert ("ownerReferences" not in manifest["metadata"]) is kept
    unkept = run_claim(job(storage={"run": {"keep": False}}))
    assert unkept["metadata"]["ownerReferences"][0]["uid"] == "uid-1"


def test_a_claim_that_is_kept_does_not_look_like_a_part_of_a_release() -> None:
    assert "app.kubernetes.io/instance" not in run_claim(job())["metadata"]["labels"]
    assert "app.kubernetes.io/instance" in run_claim(job(storage={"run": {"keep": False}}))["metadata"]["labels"]


@pytest.mark.parametrize("backend", [PyTorchJobBackend(), TrainJobBackend()], ids=lambda backend: backend.kind)
def test_the_claim_of_a_checkpoint_to_start_from_is_mounted_read_only_in_train(backend: Backend) -> None:
    path = "ml/older/uid/checkpoints/step-00000100"
    other = job(training={"resumeFrom": {"claim": "older-run", "path": path}})
    train = json.dumps(child_manifests(other, first_attempt(other, Stage.TRAIN), backend))
    assert '{"name": "resume", "persistentVolumeClaim": {"claimName": "older-run"}}' in train
    assert '{"name": "resume", "mountPath": "/resume", "readOnly": true}' in train
    assert '{"name": "FINETUNE_RESUME_FROM", "value": "/resume"}' in train
    for stage in set(STAGES) - {Stage.TRAIN}:
        assert "older-run" not in json.dumps(pod(child(stage, other)))


def test_a_checkpoint_without_a_claim_is_looked_for_on_the_volume_of_the_run() -> None:
    own = child(Stage.TRAIN, job(training={"resumeFrom": {"path": "ml/older/uid/checkpoints/step-00000100"}}))
    assert environment(own)["FINETUNE_RESUME_FROM"] == "/resume"
    assert {"name": "run", "mountPath": "/resume", "readOnly": True} in container(own)["volumeMounts"]
    assert "resume" not in volumes(own)
    assert "FINETUNE_RESUME_FROM" not in environment(child(Stage.TRAIN))


@pytest.mark.parametrize(("nodes", "mode"), [(1, "ReadWriteOnce"), (3, "ReadWriteMany")])
def test_several_nodes_share_their_volume(nodes: int, mode: str) -> None:
    assert run_claim(job(topology={"nodes": nodes}))["spec"]["accessModes"] == [mode]


def test_a_given_claim_is_used_and_none_is_made() -> None:
    given = job(storage={"run": {"claimName": "mine"}})
    manifests = all_manifests(given, PyTorchJobBackend())
    assert not [m for m in manifests if m["kind"] == "PersistentVolumeClaim"]
    assert volumes(child(Stage.TRAIN, given))["run"]["persistentVolumeClaim"] == {"claimName": "mine"}


def test_the_run_config_is_an_immutable_snapshot_with_defaults_filled_in() -> None:
    made = run_config(job())
    config = RunConfig.model_validate_json(made["data"]["run-config.json"])
    assert made["immutable"] is True
    assert (config.paths.run, config.paths.cache) == ("/data/ml/support/uid-1", "/cache")
    assert config.spec.training.learning_rate == 2e-4
    assert config.image == "trainer@sha256:1"


SEEN = {
    Stage.PREPARE: {"check-publish": "publish", "fetch": "hub", "prepare": None},
    Stage.TRAIN: {"pytorch": "wandb"},
    Stage.EVALUATE: {"evaluate": None},
    Stage.PUBLISH: {"publish": "publish"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_each_container_sees_the_one_token_that_it_needs(stage: Stage) -> None:
    spec = pod(child(stage))
    for each in [*spec.get("initContainers", []), *spec["containers"]]:
        tokens = [m["name"] for m in each["volumeMounts"] if m["name"].startswith("token-")]
        wanted = SEEN[stage][each["name"]]
        assert tokens == ([f"token-{wanted}"] if wanted else [])
        assert not [variable for variable in each["env"] if "secretKeyRef" in json.dumps(variable)]


def test_publishing_falls_back_to_the_read_token() -> None:
    manifest = child(Stage.PUBLISH, job(credentials={"hub": {"name": "hf-read"}}))
    secret = volumes(manifest)["token-publish"]["secret"]
    assert (secret["secretName"], secret["items"]) == ("hf-read", [{"key": "token", "path": "publish"}])


def test_write_access_is_checked_before_anything_is_downloaded() -> None:
    assert [c["name"] for c in pod(child(Stage.PREPARE))["initContainers"]] == ["check-publish", "fetch"]
    here = job(publish=None, model={"path": "m"}, datasets=[{"name": "d", "path": "d.csv", "task": "text"}])
    assert "initContainers" not in pod(child(Stage.PREPARE, here))
    assert "token-hub" not in volumes(child(Stage.PREPARE, here))


@pytest.mark.parametrize("stage", STAGES)
def test_the_cache_is_read_only_outside_prepare(stage: Stage) -> None:
    (mount,) = [m for m in container(child(stage))["volumeMounts"] if m["name"] == "cache"]
    assert mount["readOnly"] is (stage is not Stage.PREPARE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_pod_sees_only_its_jobs_directory_and_cannot_write_what_earlier_stages_left(stage: Stage) -> None:
    made = pod(child(stage, job(storage={"run": {"claimName": "shared"}})))
    for each in [*made.get("initContainers", []), *made["containers"]]:
        first, *earlier = [mount for mount in each["volumeMounts"] if mount["name"] == "run"]
        assert first == {"name": "run", "mountPath": "/data/ml/support/uid-1", "subPath": "ml/support/uid-1"}
        assert all(mount["readOnly"] and mount["mountPath"] == f"/data/{mount['subPath']}" for mount in earlier)
        products = ["prepared", "export", "evaluation"][: STAGES.index(stage)]
        assert [mount["subPath"] for mount in earlier] == [f"ml/support/uid-1/{product}" for product in products]


@pytest.mark.parametrize("stage", STAGES)
def test_a_pod_has_no_rights_but_a_short_token_for_its_report(stage: Stage) -> None:
    manifest = child(stage)
    assert pod(manifest)["automountServiceAccountToken"] is False
    assert pod(manifest)["serviceAccountName"] == f"support-{stage}-report"
    token = volumes(manifest)["report-token"]["projected"]["sources"][0]["serviceAccountToken"]
    assert token == {"path": "token", "expirationSeconds": 3600}
    assert environment(manifest)["FINETUNE_REPORT_CONFIGMAP"] == f"ml/support-{stage}-report"


@pytest.mark.parametrize("stage", STAGES)
def test_the_account_of_a_stage_may_patch_its_own_report_and_nothing_else(stage: Stage) -> None:
    account, role, binding, report = stage_channel(job(), stage)
    name = f"support-{stage}-report"
    assert {manifest["metadata"]["name"] for manifest in (account, role, binding, report)} == {name}
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [name], "verbs": ["patch"]}
    ]
    assert (binding["roleRef"]["name"], binding["subjects"][0]["name"]) == (name, name)


def test_only_pods_of_the_job_reach_its_pods() -> None:
    spec = isolation(job())["spec"]
    same = {"podSelector": {"matchLabels": {"finetune.dev/uid": "uid-1"}}}
    assert spec == {**same, "policyTypes": ["Ingress"], "ingress": [{"from": [same]}]}


def test_the_gang_is_worker_only_with_static_rendezvous_and_no_retries_of_its_own() -> None:
    manifest = child(Stage.TRAIN, number=2)
    spec = manifest["spec"]
    assert manifest["metadata"]["name"] == "support-train-2"
    assert set(spec) == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert spec["runPolicy"] == {"cleanPodPolicy": "None", "backoffLimit": 0}
    assert set(spec["pytorchReplicaSpecs"]) == {"Worker"}
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert (spec["nprocPerNode"], worker["replicas"], worker["restartPolicy"]) == ("4", 3, "Never")
    variables = environment(manifest)
    assert variables["PET_MASTER_ADDR"] == "support-train-2-worker-0"
    assert "training.kubeflow.org/replica-index" in variables["PET_NODE_RANK"]


def test_a_gang_is_scheduled_as_one_where_that_is_configured() -> None:
    gang = replace(job(), environment=Environment(gang_scheduling=True))
    assert child(Stage.TRAIN, gang)["spec"]["runPolicy"]["schedulingPolicy"] == {"minAvailable": 3}


@pytest.mark.parametrize(("stage", "gpus"), [(Stage.TRAIN, "4"), (Stage.EVALUATE, "4"), (Stage.PREPARE, None)])
def test_gpus_are_asked_for_where_they_compute(stage: Stage, gpus: str | None) -> None:
    assert container(child(stage))["resources"].get("limits", {}).get("nvidia.com/gpu") == gpus


@pytest.mark.parametrize(
    ("stage", "limits"),
    [
        (Stage.PREPARE, {"check-publish": "2Gi", "fetch": "32Gi", "prepare": "32Gi"}),
        (Stage.PUBLISH, {"publish": "8Gi"}),
    ],
)
def test_what_reads_the_data_of_others_has_a_memory_limit(stage: Stage, limits: dict[str, str]) -> None:
    def memory(**given: object) -> dict[str, dict[str, str]]:
        spec = pod(child(stage, job(podTemplate={"cpuResources": given})))
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        return {c["name"]: {k: v["memory"] for k, v in c["resources"].items() if "memory" in v} for c in containers}

    assert {name: kinds["limits"] for name, kinds in memory().items()} == limits
    assert all(kinds == {"limits": "1Gi"} for kinds in memory(limits={"memory": "1Gi"}).values())
    asked = memory(requests={"memory": "64Gi"})
    assert all(kinds == {"requests": "64Gi", "limits": "64Gi"} for kinds in asked.values())
    both = memory(requests={"memory": "64Gi"}, limits={"memory": "96Gi"})
    assert all(kinds == {"requests": "64Gi", "limits": "96Gi"} for kinds in both.values())


@pytest.mark.parametrize("stage", STAGES)
def test_every_temporary_directory_has_a_size_and_code_is_imported_from_the_pod_s_own(stage: Stage) -> None:
    manifest = child(stage)
    temporary = [volume["emptyDir"] for volume in volumes(manifest).values() if "emptyDir" in volume]
    assert temporary
    assert all("sizeLimit" in directory for directory in temporary)
    assert environment(manifest)["HF_MODULES_CACHE"] == "/tmp/modules"


def test_training_on_cpus_asks_for_no_gpu_and_runs_one_rank_a_pod() -> None:
    manifest = child(Stage.TRAIN, job(topology={"nodes": 2, "gpusPerNode": 0}))
    assert "nvidia.com/gpu" not in json.dumps(manifest)
    assert manifest["spec"]["nprocPerNode"] == "1"
    assert "kueue.x-k8s.io/queue-name" not in manifest["metadata"]["labels"]


@pytest.mark.parametrize(("stage", "queued"), [(s, s in (Stage.TRAIN, Stage.EVALUATE)) for s in STAGES])
def test_stages_that_ask_for_gpus_wait_in_the_queue(stage: Stage, queued: bool) -> None:
    assert ("kueue.x-k8s.io/queue-name" in child(stage)["metadata"]["labels"]) is queued


def test_prepare_goes_where_train_will_go_when_the_claim_is_new() -> None:
    new, given = child(Stage.PREPARE), child(Stage.PREPARE, job(storage={"run": {"claimName": "mine"}}))
    assert pod(new)["nodeSelector"] == {"pool": "a100"}
    assert {"key": "gpu", "operator": "Exists"} in pod(new)["tolerations"]
    assert "nodeSelector" not in pod(given)


@pytest.mark.parametrize("stage", STAGES)
def test_the_pod_template_adds_what_it_may_and_overrides_nothing_of_ours(stage: Stage) -> None:
    manifest = child(stage)
    spec = manifest["spec"]
    template = spec["pytorchReplicaSpecs"]["Worker"]["template"] if stage is Stage.TRAIN else spec["template"]
    assert template["metadata"]["labels"]["team"] == "ml"
    assert template["metadata"]["labels"]["finetune.dev/uid"] == "uid-1"
    assert template["metadata"]["annotations"] == {"note": "x"}
    assert pod(manifest)["priorityClassName"] == "research"
    assert environment(manifest)["NCCL_IB_HCA"] == "mlx5"
    assert environment(manifest)["NCCL_DEBUG"] == "INFO"
    names = [variable["name"] for variable in container(manifest)["env"]]
    assert len(names) == len(set(names))
    assert environment(manifest)["FINETUNE_TOKENS"] == "/var/run/secrets/finetune"


@pytest.mark.parametrize("stage", STAGES)
def test_pods_bear_two_minutes_without_their_node_and_may_checkpoint_before_they_go(stage: Stage) -> None:
    spec = pod(child(stage))
    taints = {t["key"]: t.get("tolerationSeconds") for t in spec["tolerations"]}
    assert taints["node.kubernetes.io/not-ready"] == taints["node.kubernetes.io/unreachable"] == 120
    assert spec["terminationGracePeriodSeconds"] == 120


@pytest.mark.parametrize(("topology", "gpus"), [({}, "1"), ({"gpusPerNode": 4}, "4"), ({"gpusPerNode": 0}, "0")])
def test_pods_that_compute_are_told_how_many_gpus_they_were_given(topology: dict[str, int], gpus: str) -> None:
    asked = job(topology=topology)
    for stage in (Stage.TRAIN, Stage.EVALUATE):
        assert environment(child(stage, asked))["FINETUNE_GPUS_PER_NODE"] == gpus
    assert "FINETUNE_GPUS_PER_NODE" not in environment(child(Stage.PREPARE, asked))


@pytest.mark.parametrize(
    ("resources", "gpus", "threads"),
    [
        ({"requests": {"cpu": "8"}, "limits": {"cpu": "16"}}, 4, "4"),
        ({"requests": {"cpu": "8"}}, 0, "8"),
        ({"limits": {"cpu": "2500m"}}, 0, "2"),
        ({"limits": {"cpu": "500m"}}, 0, "1"),
        ({"limits": {"memory": "8Gi"}}, 0, None),
        ({"limits": {"cpu": "1k"}}, 0, None),
    ],
)
def test_the_ranks_of_a_pod_share_the_cores_that_it_may_use(
    resources: dict[str, object], gpus: int, threads: str | None
) -> None:
    asked = job(topology={"gpusPerNode": gpus}, podTemplate={"resources": resources})
    for stage in (Stage.TRAIN, Stage.EVALUATE):
        assert environment(child(stage, asked)).get("OMP_NUM_THREADS") == threads
    assert "OMP_NUM_THREADS" not in environment(child(Stage.PREPARE, asked))


def test_the_attempt_is_told_to_every_container() -> None:
    manifest = child(Stage.TRAIN, micro_batch_tokens=4096, number=3)
    attempt = Attempt.model_validate_json(environment(manifest)["FINETUNE_ATTEMPT"])
    assert (attempt.id, attempt.micro_batch_tokens, attempt.report_to) == ("uid-1/train/3", 4096, "configmap")


CONDITIONS = [
    ([], False, False),
    ([("Running", "True")], False, False),
    ([("Succeeded", "True")], True, False),
    ([("Running", "False"), ("Failed", "True")], False, True),
    ([("Failed", "False")], False, False),
]


@pytest.mark.parametrize(("conditions", "succeeded", "failed"), CONDITIONS)
def test_what_a_pytorchjob_says_of_itself(conditions: list[tuple[str, str]], succeeded: bool, failed: bool) -> None:
    manifest = child(Stage.TRAIN)
    manifest["status"] = {"conditions": [{"type": t, "status": s, "reason": "Why"} for t, s in conditions]}
    state = PyTorchJobBackend().state(manifest)
    assert (state.succeeded, state.failed, state.pods_expected) == (succeeded, failed, 3)
    manifest["spec"]["runPolicy"]["suspend"] = True
    assert PyTorchJobBackend().state(manifest).queued


class TestTrainJob:
    backend = TrainJobBackend()

    def manifests(self, of: Job | None = None) -> tuple[Manifest, Manifest]:
        of = of or job()
        runtime, child = child_manifests(of, first_attempt(of, Stage.TRAIN), self.backend)
        return runtime, child

    def manifest(self) -> Manifest:
        return self.manifests()[1]

    def replicated(self, of: Job | None = None) -> Manifest:
        (made,) = self.manifests(of)[0]["spec"]["template"]["spec"]["replicatedJobs"]
        return made["template"]["spec"]  # type: ignore[no-any-return]

    def test_it_runs_its_own_runtime_on_as_many_nodes(self) -> None:
        runtime, made = self.manifests()
        assert made["spec"]["runtimeRef"] == {"name": runtime["metadata"]["name"], "kind": "TrainingRuntime"}
        assert made["spec"]["trainer"] == {"numNodes": 3, "numProcPerNode": 4}
        assert runtime["metadata"]["ownerReferences"] == made["metadata"]["ownerReferences"]
        assert (self.replicated()["completions"], self.replicated()["parallelism"]) == (3, 3)

    def test_its_pods_are_those_of_a_pytorchjob_but_for_the_rendezvous_which_is_its_own(self) -> None:
        ours = copy.deepcopy(self.replicated()["template"])
        theirs = copy.deepcopy(child(Stage.TRAIN)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"])
        containers = [template["spec"]["containers"][0] for template in (ours, theirs)]
        variables = [{v["name"]: v for v in container.pop("env")} for container in containers]
        given = {"PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
        assert variables[0] == {name: v for name, v in variables[1].items() if name not in given}
        assert [container.pop("name") for container in containers] == ["node", "pytorch"]
        assert ours == theirs

    def test_a_failed_rank_is_not_made_again_and_lets_the_others_speak(self) -> None:
        runtime, _ = self.manifests()
        assert runtime["spec"]["template"]["spec"]["failurePolicy"] == {"maxRestarts": 0}
        spec = self.replicated()
        assert (spec["backoffLimitPerIndex"], spec["podReplacementPolicy"]) == (0, "Failed")
        assert spec["template"]["spec"]["restartPolicy"] == "Never"

    def test_all_or_none_are_scheduled_where_that_is_configured(self) -> None:
        gang = replace(job(), environment=Environment(gang_scheduling=True))
        assert "podGroupPolicy" not in self.manifests()[0]["spec"]
        assert self.manifests(gang)[0]["spec"]["podGroupPolicy"] == {"coscheduling": {"scheduleTimeoutSeconds": 900}}

    @pytest.mark.parametrize(("kind", "expected"), [("Complete", (True, False)), ("Failed", (False, True))])
    def test_what_it_says_of_itself(self, kind: str, expected: tuple[bool, bool]) -> None:
        manifest = self.manifest() | {"status": {"conditions": [{"type": kind, "status": "True"}]}}
        state = self.backend.state(manifest)
        assert (state.succeeded, state.failed, state.pods_expected) == (*expected, 3)

    def test_suspended_by_another_means_queued(self) -> None:
        manifest = self.manifest()
        manifest["spec"]["suspend"] = True
        assert self.backend.state(manifest).queued


@pytest.mark.parametrize(
    ("marks", "rank"),
    [
        ({"training.kubeflow.org/replica-index": "2"}, 2),
        ({"batch.kubernetes.io/job-completion-index": "3"}, 3),
        ({"finetune.dev/stage": "prepare"}, 0),
    ],
)
def test_a_pods_node_rank_is_known_whoever_carries_it(marks: dict[str, str], rank: int) -> None:
    assert node_rank(marks) == rank
