from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.unit.finetune_operator.decision.world import SPEC

from finetune_api.base import STAGES, Stage
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.cluster.api import ApiError
from finetune_operator.cluster.lease import Lease, LeaseLostError
from finetune_operator.cluster.needs import FRESH, Prerequisites, claims_of, secrets_of

CREDENTIALS = {"hub": {"name": "read"}, "publish": {"name": "write"}, "wandb": {"name": "wb", "key": "key"}}


class Cluster:
    """Objects by kind and name; stands in for the API server."""

    def __init__(self, *objects: tuple[str, str, dict[str, Any]]) -> None:
        self.objects = {
            (kind, name): {"metadata": {"name": name, "resourceVersion": "1"}, **rest} for kind, name, rest in objects
        }
        self.down = False
        self.asked: list[str] = []

    async def find(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self.asked.append(name)
        if self.down:
            raise ApiError(0, "Unreachable", "")
        found = self.objects.get((kind, name))
        return None if found is None else {**found, "spec": dict(found.get("spec", {}))}

    async def create(self, made: dict[str, Any]) -> dict[str, Any]:
        key = (made["kind"], made["metadata"]["name"])
        if key in self.objects:
            raise ApiError(409, "AlreadyExists", "")
        made["metadata"]["resourceVersion"] = "1"
        self.objects[key] = made
        return made

    async def replace(self, changed: dict[str, Any]) -> dict[str, Any]:
        key = (changed["kind"], changed["metadata"]["name"])
        version = self.objects[key]["metadata"]["resourceVersion"]
        if changed["metadata"]["resourceVersion"] != version:
            raise ApiError(409, "Conflict", "")
        self.objects[key] = {**changed, "metadata": {**changed["metadata"], "resourceVersion": str(int(version) + 1)}}
        return self.objects[key]


def spec(**fields: object) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(SPEC | {"credentials": CREDENTIALS, "model": {"repo": "acme/base"}} | fields)


def secret(name: str, key: str = "token") -> tuple[str, str, dict[str, Any]]:
    return ("Secret", name, {"data": {key: "eA=="}})


CACHE: tuple[str, str, dict[str, Any]] = ("PersistentVolumeClaim", "finetune-cache", {})


@pytest.mark.parametrize(
    ("stage", "names"),
    [(Stage.PREPARE, ["read", "write"]), (Stage.TRAIN, ["wb"]), (Stage.EVALUATE, []), (Stage.PUBLISH, ["write"])],
)
def test_each_stage_needs_the_secrets_that_it_mounts(stage: Stage, names: list[str]) -> None:
    assert [found.name for found in secrets_of(spec(), stage).values()] == names


def test_a_job_that_names_no_repository_needs_no_read_token() -> None:
    here = spec(model={"path": "base"})
    assert [found.name for found in secrets_of(here, Stage.PREPARE).values()] == ["write"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_without_credentials_needs_none(stage: Stage) -> None:
    assert secrets_of(spec(credentials={}), stage) == {}


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


async def test_what_is_missing_is_named_with_its_field() -> None:
    prerequisites = Prerequisites(Cluster(secret("read", key="other")))  # type: ignore[arg-type]
    needs = await prerequisites.look("ml", spec(), Stage.PREPARE, NOON)
    sentences = [missing.sentence for missing in needs.missing]
    assert sentences == [
        "Secret read (credentials.hub) has no key token: add it.",
        "Secret write (credentials.publish) does not exist: create it with the key token.",
        "PersistentVolumeClaim finetune-cache (storage.cache.claimName) does not exist in ml: create it.",
    ]


async def test_the_version_changes_with_a_secret() -> None:
    cluster = Cluster(secret("write"), CACHE)
    prerequisites = Prerequisites(cluster)  # type: ignore[arg-type]
    before = await prerequisites.look("ml", spec(), Stage.PUBLISH, NOON)
    cluster.objects["Secret", "write"]["metadata"]["resourceVersion"] = "2"
    after = await prerequisites.look("ml", spec(), Stage.PUBLISH, NOON + FRESH)
    assert before.missing == after.missing == ()
    assert before.credentials_version != after.credentials_version


async def test_many_jobs_ask_once_for_what_is_there_and_each_time_for_what_is_not() -> None:
    cluster = Cluster(secret("read"))
    prerequisites = Prerequisites(cluster)  # type: ignore[arg-type]
    for _ in range(5):
        await prerequisites.look("ml", spec(), Stage.PREPARE, NOON)
    assert Counter(cluster.asked) == {"read": 1, "write": 5, "finetune-cache": 5}
    cluster.objects |= Cluster(secret("write"), CACHE).objects
    assert (await prerequisites.look("ml", spec(), Stage.PREPARE, NOON)).missing == ()


def test_given_claims_have_to_be_there_and_made_ones_not() -> None:
    given = spec(storage={"run": {"claimName": "mine"}})
    resumed = spec(training={"resumeFrom": {"claim": "older-run", "path": "a/checkpoints/step-00000100"}})
    assert list(claims_of(spec(), Stage.TRAIN).values()) == ["finetune-cache"]
    assert list(claims_of(given, Stage.TRAIN).values()) == ["finetune-cache", "mine"]
    assert list(claims_of(resumed, Stage.TRAIN).values()) == ["finetune-cache", "older-run"]
    assert list(claims_of(resumed, Stage.PUBLISH).values()) == ["finetune-cache"]


def lease(cluster: Cluster, identity: str, seconds: int = 15) -> Lease:
    return Lease(cluster, "ops", "finetune", identity, seconds)  # type: ignore[arg-type]


async def test_one_candidate_holds_the_lease_until_it_gives_it_back() -> None:
    cluster = Cluster()
    first, second = lease(cluster, "a"), lease(cluster, "b")
    assert await first._try()
    assert not await second._try()
    assert await first._try()
    await first.release()
    assert await second._try()
    assert not await first._try()


async def test_a_lease_that_nobody_renews_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("finetune_operator.cluster.lease.time.monotonic", lambda: clock[0])
    cluster = Cluster()
    first, second = lease(cluster, "a"), lease(cluster, "b")
    assert await first._try()
    assert not await second._try()
    clock[0] = 14
    assert await first._try()
    clock[0] = 16
    assert not await second._try()
    clock[0] = 32
    assert await second._try()
    assert cluster.objects["Lease", "finetune"]["spec"]["leaseTransitions"] == 1


async def test_of_two_that_take_over_at_once_one_gets_it() -> None:
    cluster = Cluster()
    first, second = lease(cluster, "a"), lease(cluster, "b")
    assert await first._try()
    await first.release()
    seen = await cluster.find("Lease", "ops", "finetune")
    assert seen is not None
    assert await second._try()
    with pytest.raises(ApiError, match="Conflict"):
        await cluster.replace(first._taken(seen))


async def test_a_holder_that_cannot_reach_the_server_gives_up() -> None:
    cluster = Cluster()
    holder = lease(cluster, "a", seconds=1)
    await holder.acquire()
    cluster.down = True
    with pytest.raises(LeaseLostError, match="ops/finetune"):
        await holder.keep()
