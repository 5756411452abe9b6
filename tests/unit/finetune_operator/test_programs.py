"""A stage runs the same in a pod and as a local process; what differs is listed here, each with its reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_api.base import STAGES, Stage
from finetune_api.runconfig import Attempt
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.devices import Gpu, Machine
from finetune_operator.local.processes.environment import environment
from finetune_operator.local.processes.placement import place
from finetune_operator.manifests.backend import Backend
from finetune_operator.manifests.children import child_manifests
from finetune_operator.manifests.job import Job, Manifest
from finetune_operator.manifests.pytorchjob import PyTorchJobBackend
from finetune_operator.manifests.trainjob import TrainJobBackend
from finetune_operator.programs import PROGRAMS, preview_programs, programs_of

SPEC = FineTuneJobSpec.model_validate(
    {
        "model": {"repo": "acme/base"},
        "datasets": [{"name": "claims", "repo": "acme/claims", "task": "classification"}],
        "tuning": {"method": "lora"},
        "topology": {"nodes": 2, "gpusPerNode": 2},
        "training": {"resumeFrom": {"path": "older/step-00000100"}},
        "publish": {"repo": "acme/support"},
        "podTemplate": {
            "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}, {"name": "TOKENIZERS_PARALLELISM", "value": "true"}],
            "resources": {"limits": {"cpu": "16"}},
        },
    }
)
MACHINE = Machine(tuple(Gpu(str(i)) for i in range(4)), cores=32)

ONLY_IN_PODS = {
    "HOME": "the image has no home directory that its user may write to",
    "USER": "the image's user has no name, which PyTorch asks for",
    "HF_MODULES_CACHE": "code that a model brings along is imported from there, and the cache is shared by all jobs",
    "FINETUNE_REPORT_CONFIGMAP": "local runs read reports/ in the run directory",
    "FINETUNE_TOKENS": "set for each local process when it starts: a new directory for its one token",
    "FINETUNE_RESUME_FROM": "no volume is mounted locally: the path of training.resumeFrom is used as it is",
}
ONLY_LOCAL = {
    "CUDA_VISIBLE_DEVICES": "the device plugin gives a pod its GPUs",
    "GLOO_SOCKET_IFNAME": "local ranks listen on loopback only; a NetworkPolicy isolates pods",
    "NCCL_SOCKET_IFNAME": "local ranks listen on loopback only; a NetworkPolicy isolates pods",
}
DIFFERENT_VALUES = {
    "HF_HOME": "pods mount the cache, and only Prepare may write to it",
    "FINETUNE_RUN_CONFIG": "pods mount a ConfigMap",
    "FINETUNE_ATTEMPT": "pods report to a ConfigMap as well",
    "PET_MASTER_PORT": "local runs of other jobs may have taken the default port",
}
BATCH_ONLY_LOCAL = {"OMP_NUM_THREADS": "pods of Prepare and Publish have no CPU limit: they may use a whole node"}
RENDEZVOUS = {
    "PyTorchJob": {
        "PET_NNODES": "set by the training-operator",
        "PET_NPROC_PER_NODE": "set by the training-operator",
    },
    "TrainJob": dict.fromkeys(
        ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
        "set by Kubeflow Trainer",
    ),
}
RENDEZVOUS_VALUES = {"PET_NODE_RANK": "from a label of the pod", "PET_MASTER_ADDR": "the name of the first pod"}
EVALUATE_VALUES = dict.fromkeys(
    ("FINETUNE_GPUS_PER_NODE", "PET_NPROC_PER_NODE"),
    "a pod has the GPUs of one node of the topology; locally all of the job's GPUs are in one machine",
)
BACKENDS: tuple[Backend, ...] = (PyTorchJobBackend(), TrainJobBackend())
CASES = [(stage, backend) for stage in STAGES for backend in BACKENDS[: 2 if stage is Stage.TRAIN else 1]]


def containers(stage: Stage, backend: Backend = BACKENDS[0]) -> list[Manifest]:
    made = child_manifests(Job("ml", "support", "uid", SPEC, "image"), Attempt(uid="uid", stage=stage), backend)
    pods = [spec for manifest in made for spec in pod_specs(manifest)]
    return [*pods[0].get("initContainers", []), *pods[0]["containers"]]


def pod_specs(value: object) -> list[Manifest]:
    """Every pod's spec in a manifest."""
    if isinstance(value, list):
        return [spec for entry in value for spec in pod_specs(entry)]
    if not isinstance(value, dict):
        return []
    return [value] if "containers" in value else [spec for entry in value.values() for spec in pod_specs(entry)]


def in_pod(stage: Stage, backend: Backend) -> dict[str, str]:
    names = [variable["name"] for variable in containers(stage, backend)[-1]["env"]]
    assert len(names) == len(set(names))
    return {v["name"]: v.get("value", "from the pod") for v in containers(stage, backend)[-1]["env"]}


def locally(stage: Stage) -> dict[str, str]:
    node = place(SPEC.topology, MACHINE).nodes_of(stage, SPEC, 29500)[0]
    attempt = Attempt(uid="uid", stage=stage, report_to="configmap")
    stage_wide = environment({}, node, attempt, SPEC, config_file="run-config.json", cache="/c", interface="lo")
    return stage_wide | node.programs[-1].variables


@pytest.mark.parametrize(("stage", "backend"), CASES, ids=lambda value: getattr(value, "kind", str(value)))
def test_pods_and_local_processes_get_the_same_environment_but_for_what_is_listed(
    stage: Stage, backend: Backend
) -> None:
    pod, local = in_pod(stage, backend), locally(stage)
    trains = stage is Stage.TRAIN
    assert set(pod) - set(local) == {name for name in ONLY_IN_PODS if trains or name != "FINETUNE_RESUME_FROM"}
    computes = stage in (Stage.TRAIN, Stage.EVALUATE)
    only_local = ONLY_LOCAL | ({} if computes else BATCH_ONLY_LOCAL) | (RENDEZVOUS[backend.kind] if trains else {})
    assert set(local) - set(pod) == set(only_local)
    differ = {name for name in set(pod) & set(local) if pod[name] != local[name]}
    of_the_stage = {Stage.TRAIN: RENDEZVOUS_VALUES, Stage.EVALUATE: EVALUATE_VALUES}.get(stage, {})
    assert differ <= set(DIFFERENT_VALUES | of_the_stage)


def test_the_documentation_names_every_variable() -> None:
    page = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text(encoding="utf-8")
    every = {name for stage, backend in CASES for name in in_pod(stage, backend)}
    every |= {name for stage in STAGES for name in locally(stage)} - {"NCCL_IB_HCA"}
    assert {name for name in every if not re.search(rf"`{name}\b", page)} <= {"NCCL_IB_HCA"}


@pytest.mark.parametrize("stage", STAGES)
def test_pods_and_local_processes_run_the_same_programs(stage: Stage) -> None:
    (node, *_) = place(SPEC.topology, MACHINE).nodes_of(stage, SPEC, 29500)
    assert [each["command"] for each in containers(stage)] == [program.command() for program in node.programs]


def test_only_what_a_job_needs_runs_before_prepare() -> None:
    def names(**changes: object) -> list[str]:
        spec = FineTuneJobSpec.model_validate(SPEC.to_wire() | changes)
        return [program.name for program in programs_of(Stage.PREPARE, spec)]

    here = {"model": {"path": "base"}, "datasets": [{"name": "claims", "path": "claims.csv"}]}
    assert names() == ["check-publish", "fetch", "prepare"]
    assert names(publish=None) == ["fetch", "prepare"]
    assert names(**here, publish=None) == ["prepare"]
    assert names(**here | {"model": {"path": "base", "adapter": {"repo": "acme/adapter"}}}, publish=None)[0] == "fetch"
    assert names(**here | {"datasets": SPEC.to_wire()["datasets"]}, publish=None)[0] == "fetch"


def test_what_parses_models_and_data_has_no_token_of_the_hub_and_does_not_reach_it() -> None:
    everywhere = [*(program for programs in PROGRAMS.values() for program in programs), *preview_programs(SPEC)]
    for program in everywhere:
        if program.name in ("check-publish", "fetch", "publish"):
            assert program.reaches_hub
        else:
            assert program.token in (None, "wandb")
            assert program.variables == {"HF_HUB_OFFLINE": "1"}
    in_pods = {each["name"]: each["env"] for each in containers(Stage.PREPARE)}
    offline = {"name": "HF_HUB_OFFLINE", "value": "1"}
    assert [name for name, variables in in_pods.items() if offline in variables] == ["prepare"]
