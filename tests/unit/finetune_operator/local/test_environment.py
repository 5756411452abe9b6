"""Which nodes an attempt has on one machine, and what their processes inherit."""

from __future__ import annotations

from finetune_api.base import Stage
from finetune_api.runconfig import Attempt
from finetune_api.spec import FineTuneJobSpec, Topology
from finetune_operator.devices import Gpu, Machine
from finetune_operator.local.processes.environment import environment
from finetune_operator.local.processes.placement import Node, place
from finetune_operator.local.processes.tokens import tokens_of, without_secrets

SPEC = FineTuneJobSpec.model_validate(
    {"model": {"path": "m"}, "datasets": [{"name": "a", "path": "a.csv"}], "tuning": {"method": "lora"}}
)
FOUR_GPUS = Machine(tuple(Gpu(str(i)) for i in range(4)), cores=16)


def nodes(stage: Stage, topology: Topology, machine: Machine = FOUR_GPUS) -> list[dict[str, str]]:
    return [inherit(node, stage) for node in place(topology, machine).nodes_of(stage, SPEC, 29500)]


def inherit(node: Node, stage: Stage = Stage.TRAIN, spec: FineTuneJobSpec = SPEC, **inherited: str) -> dict[str, str]:
    attempt = Attempt(uid="u", stage=stage)
    return environment(inherited, node, attempt, spec, config_file="c.json", cache="/cache", interface="lo")


def on_cpu() -> Node:
    (node,) = place(Topology(gpus_per_node=0), FOUR_GPUS).nodes_of(Stage.TRAIN, SPEC, 29500)
    return node


def test_training_on_gpus_gives_each_node_its_own_and_shares_the_cores() -> None:
    first, second = nodes(Stage.TRAIN, Topology(nodes=2))
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0,1", "2,3")
    assert (first["PET_NODE_RANK"], second["PET_NODE_RANK"]) == ("0", "1")
    assert (first["PET_NPROC_PER_NODE"], first["FINETUNE_GPUS_PER_NODE"]) == ("2", "2")
    assert first["OMP_NUM_THREADS"] == "4"


def test_evaluation_is_one_node_with_every_gpu_of_the_job() -> None:
    (node,) = nodes(Stage.EVALUATE, Topology(nodes=2))
    assert (node["PET_NNODES"], node["PET_NPROC_PER_NODE"], node["FINETUNE_GPUS_PER_NODE"]) == ("1", "4", "4")
    assert node["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_gpus_per_node_0_hides_the_gpus() -> None:
    assert {n["CUDA_VISIBLE_DEVICES"] for n in nodes(Stage.TRAIN, Topology(nodes=2, gpus_per_node=0))} == {""}


def test_prepare_and_publish_see_no_gpu() -> None:
    for stage in (Stage.PREPARE, Stage.PUBLISH):
        (node,) = nodes(stage, Topology())
        assert node["CUDA_VISIBLE_DEVICES"] == ""


def test_threads_that_the_user_set_are_kept() -> None:
    assert inherit(on_cpu())["OMP_NUM_THREADS"] == "16"
    assert inherit(on_cpu(), OMP_NUM_THREADS="3")["OMP_NUM_THREADS"] == "3"


def test_the_job_s_own_variables_win_over_those_of_the_shell() -> None:
    spec = FineTuneJobSpec.model_validate(
        SPEC.to_wire() | {"podTemplate": {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}}
    )
    assert inherit(on_cpu(), spec=spec, NCCL_DEBUG="TRACE")["NCCL_DEBUG"] == "INFO"


def test_a_rendezvous_that_was_meant_for_others_is_not_inherited() -> None:
    inherited = inherit(
        on_cpu(), MASTER_ADDR="10.0.0.1", RANK="7", PET_RDZV_BACKEND="c10d", FINETUNE_ATTEMPT="old", LANG="C"
    )
    assert inherited["LANG"] == "C"
    assert not {"MASTER_ADDR", "RANK", "PET_RDZV_BACKEND"} & set(inherited)
    assert '"uid":"u"' in inherited["FINETUNE_ATTEMPT"]


def test_secrets_are_taken_out_and_never_shown() -> None:
    variables = {"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "key", "HF_TOKEN_PATH": "/x", "LANG": "C"}
    assert without_secrets(variables) == {"LANG": "C"}
    tokens = tokens_of(variables)
    assert "hf_secret" not in repr(tokens)
    assert tokens.borrowed
    assert tokens.values["publish"] == "hf_secret"


def test_the_version_of_the_tokens_changes_with_a_token_and_differs_by_job() -> None:
    old, new = tokens_of({"HF_TOKEN": "a", "HOME": "/nowhere"}), tokens_of({"HF_TOKEN": "b", "HOME": "/nowhere"})
    assert old.version("u") == old.version("u")
    assert len({old.version("u"), new.version("u"), old.version("v")}) == 3
