"""Command lines and environments of the processes."""

from __future__ import annotations

from finetune_api.base import Stage
from finetune_api.runconfig import Attempt
from finetune_api.spec import FineTuneJobSpec, Topology
from finetune_operator.devices import Gpu, Machine
from finetune_operator.local.processes.placement import place
from finetune_operator.local.processes.stages import Node, environment, nodes_of
from finetune_operator.local.processes.tokens import tokens_of, without_secrets

SPEC = FineTuneJobSpec.model_validate(
    {"model": {"path": "m"}, "datasets": [{"name": "a", "path": "a.csv"}], "tuning": {"method": "lora"}}
)
FOUR_GPUS = Machine(tuple(Gpu(str(i)) for i in range(4)), cores=16)


def nodes(stage: Stage, topology: Topology, machine: Machine = FOUR_GPUS) -> tuple[Node, ...]:
    attempt = Attempt(uid="u", stage=stage, startup_seconds=60)
    return nodes_of(attempt, SPEC, place(topology, machine), 29500)


def inherit(node: Node, **variables: str) -> dict[str, str]:
    attempt = Attempt(uid="u", stage=Stage.TRAIN)
    return environment(variables, node, attempt, SPEC, config_file="c.json", cache="/cache", interface="lo")


def test_training_on_gpus_gives_each_node_its_own_and_shares_the_cores() -> None:
    first, second = nodes(Stage.TRAIN, Topology(nodes=2))
    assert (first.variables["CUDA_VISIBLE_DEVICES"], second.variables["CUDA_VISIBLE_DEVICES"]) == ("0,1", "2,3")
    assert first.variables["PET_NPROC_PER_NODE"] == "2"
    assert first.variables["OMP_NUM_THREADS"] == "4"
    assert second.variables["PET_RDZV_CONF"] == "timeout=60"


def test_evaluation_is_one_node_with_every_gpu_of_the_job() -> None:
    (node,) = nodes(Stage.EVALUATE, Topology(nodes=2))
    assert (node.variables["PET_NNODES"], node.variables["PET_NPROC_PER_NODE"]) == ("1", "4")
    assert node.variables["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_gpus_per_node_0_hides_the_gpus() -> None:
    assert {n.variables["CUDA_VISIBLE_DEVICES"] for n in nodes(Stage.TRAIN, Topology(nodes=2, gpus_per_node=0))} == {""}


def test_prepare_and_publish_see_no_gpu() -> None:
    for stage in (Stage.PREPARE, Stage.PUBLISH):
        (node,) = nodes(stage, Topology())
        assert node.variables["CUDA_VISIBLE_DEVICES"] == ""


def test_threads_that_the_user_set_are_kept() -> None:
    (node,) = nodes(Stage.TRAIN, Topology(gpus_per_node=0))
    assert inherit(node)["OMP_NUM_THREADS"] == "16"
    assert inherit(node, OMP_NUM_THREADS="3")["OMP_NUM_THREADS"] == "3"


def test_a_rendezvous_that_was_meant_for_others_is_not_inherited() -> None:
    (node,) = nodes(Stage.TRAIN, Topology(gpus_per_node=0))
    inherited = inherit(
        node, MASTER_ADDR="10.0.0.1", RANK="7", PET_RDZV_BACKEND="c10d", FINETUNE_ATTEMPT="old", LANG="C"
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
