"""The whole way on real pods: a job is applied, three pods train it, and what is published is what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.base import Stage

from .attacker import Attack, failure
from .clusters import JOB, Cluster
from .conftest import UNDISTURBED, Furnish
from .tenant import Tenant, accuracy, is_true
from .wandb_server import API_KEY, UnavailableError, WandbServer

pytestmark = pytest.mark.timeout(1200)
PROJECT = "days"


@dataclass(frozen=True)
class Trained:
    """A job that nobody disturbed, and the W&B server that it told, or why there is none."""

    tenant: Tenant
    status: dict[str, Any]
    wandb: WandbServer | str


@pytest.fixture(scope="module")
def wandb(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer | str]:
    """A server that speaks W&B's protocol, or why there is none."""
    try:
        server = WandbServer(tmp_path_factory.mktemp("wandb"), cluster.address)
    except UnavailableError as problem:
        yield str(problem)
        return
    with server:
        yield server


@pytest.fixture(scope="module")
def attack(request: pytest.FixtureRequest, furnish: Furnish) -> Iterator[Attack]:
    """A tenant that is about to attack."""
    failed_before = request.session.testsfailed
    with furnish("attacker", lambda: request.session.testsfailed > failed_before) as tenant:
        yield Attack(tenant)


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, furnish: Furnish, wandb: WandbServer | str, attack: Attack
) -> Iterator[Trained]:
    """Three pods, two tasks, LoRA: applied, and complete, while another tenant attacks."""
    failed_before = request.session.testsfailed
    with furnish("undisturbed", lambda: request.session.testsfailed > failed_before) as tenant:
        if isinstance(wandb, str):
            tenant.apply()
        else:
            tenant.create("Secret", "wandb", stringData={"key": API_KEY})
            tenant.apply(
                {"WANDB_BASE_URL": wandb.url, "WANDB_ERROR_REPORTING": "false"},
                tracking={"wandb": {"project": PROJECT}},
                credentials__wandb={"name": "wandb", "key": "key"},
            )
        attack.begin()
        status = tenant.complete()
        request.config.cache.set(UNDISTURBED, {tenant.cluster.built("trainer"): tenant.losses()})
        yield Trained(tenant, status, wandb)


def test_a_job_that_is_applied_goes_through_every_stage_once_and_is_better_at_both_tasks(trained: Trained) -> None:
    attempts = [(a["stage"], a["number"], a["outcome"]) for a in trained.status["attempts"]]
    assert attempts == [(stage, 1, "succeeded") for stage in ("prepare", "train", "evaluate", "publish")]
    primary = {"days": "accuracy", "greetings": "neg-loss"}
    found = {m["dataset"]: m for m in trained.status["results"]["metrics"] if primary.get(m["dataset"]) == m["metric"]}
    assert found.keys() == primary.keys()
    assert all(metric["difference"]["low"] > 0 for metric in found.values())


def test_what_is_published_is_as_good_as_the_status_says(trained: Trained, tmp_path: Path) -> None:
    tenant, status = trained.tenant, trained.status
    repo = tenant.hub.repo("acme/days-tuned")
    assert repo.head.id == status["published"]["commit"]
    assert repo.private
    for path, content in repo.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    base, tuned, tokenizer = loaded(tenant, tmp_path)
    lines = tenant.read("evaluation/predictions.jsonl").splitlines()
    held_out = [row for row in map(json.loads, lines) if row["dataset"] == "days"]
    rows = [(row["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0], row["gold"]) for row in held_out]
    (metric,) = [m for m in status["results"]["metrics"] if (m["dataset"], m["metric"]) == ("days", "accuracy")]
    assert len(rows) == metric["rows"]
    assert accuracy(base, tokenizer, rows) == pytest.approx(metric["base"], abs=1e-6)
    assert accuracy(tuned, tokenizer, rows) == pytest.approx(metric["tuned"], abs=1e-6)


def test_wandb_shows_the_run_that_the_status_links_to(trained: Trained) -> None:
    if isinstance(trained.wandb, str):
        pytest.skip(trained.wandb)
    uid = trained.tenant.job()["metadata"]["uid"]
    *_, entity, project, _, run = trained.status["wandbUrl"].split("/")
    assert (trained.status["wandbUrl"].startswith(trained.wandb.url), project, run) == (True, PROJECT, uid)
    shown = trained.wandb.run(entity, project, run)
    losses = trained.tenant.losses()
    assert shown["state"] == "finished"
    assert shown["displayName"] == f"{trained.tenant.namespace}/{JOB}"
    assert shown["summaryMetrics"]["exported/step"] == max(losses)
    curve = {r["train/step"]: r["train/loss"] for r in trained.wandb.history(entity, project, run) if "train/loss" in r}
    assert curve == pytest.approx(losses)


def test_a_tenant_that_attacks_meanwhile_stops_nobody_forges_nothing_and_gets_no_token(
    trained: Trained, attack: Attack
) -> None:
    attack.end()
    assert is_true(trained.status, "Complete")
    assert "spec.tuning.lora.layers" in attack.refusal
    assert "report.time" in attack.ignored
    assert attack.pods_while_suspended == 0
    assert attack.codes == {
        "time": 200,
        "into Evaluate's report": 403,
        "beside its own report": 200,
        "never to be deleted": 422,
    }
    assert "is a link or a special file" in failure(attack.status)
    assert attack.status.get("results") is None
    assert attack.tenant.pods(Stage.PUBLISH) == []
    assert not attack.tenant.hub.seen("POST", r"/(commit|preupload)/")
    assert attack.stolen() == []


def loaded(tenant: Tenant, adapter: Path) -> tuple[Any, Any, Any]:
    """The base model, the published adapter on top of it, and its tokenizer, as a user would load them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = adapter.parent / "base"
    for path, content in tenant.hub.repo("acme/base").files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    base, under = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    return base, PeftModel.from_pretrained(under, adapter), AutoTokenizer.from_pretrained(adapter)
