"""A job is followed through whatever happens to the connection, and the logs of its pods to their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from finetune_operator.cluster import api
from finetune_operator.cluster.api import ApiError, Object
from finetune_operator.cluster.as_user.job_watch import JobDeletedError, watch_job, with_ticks
from finetune_operator.cluster.as_user.jobs import Jobs, NoSuchJobError
from finetune_operator.cluster.as_user.logs import log_sources, read_logs

BROKEN = ApiError(0, "Unreachable", "")


def job(version: int, uid: str = "u", name: str = "support") -> Object:
    return {"metadata": {"name": name, "namespace": "ml", "uid": uid, "resourceVersion": str(version)}}


class StubApi:
    """Answers lists and watches in the order given; the last list is repeated."""

    def __init__(
        self, lists: list[list[Object] | ApiError], watches: list[list[tuple[str, Object]] | ApiError]
    ) -> None:
        self.lists, self.watches = lists, watches
        self.versions: list[str] = []

    async def collection(self, kind: str, namespace: str, *, fields: str = "", **_: Any) -> Object:
        answer = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
        if isinstance(answer, ApiError):
            raise answer
        return {"items": answer, "metadata": {"resourceVersion": "9"}}

    async def get(self, kind: str, namespace: str, name: str) -> Object:
        raise ApiError(404, "NotFound", "", details={"name": name})

    async def watch(self, kind: str, namespace: str, labels: str, version: str, fields: str) -> AsyncIterator[Object]:
        self.versions.append(version)
        answer = self.watches.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        for event, body in answer:
            yield {"type": event, "object": body}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BACKOFF_SECONDS", (0.001, 0.01))


async def versions_of(stub: Any, patience: float = 60.0) -> list[str]:
    """Versions of the job that a follower sees until the job is deleted."""
    versions: list[str] = []
    with pytest.raises(JobDeletedError, match="support was deleted"):
        await follow(stub, versions, patience)
    return versions


async def follow(stub: Any, versions: list[str], patience: float) -> None:
    async for body in watch_job(Jobs(stub, "ml"), "support", patience):
        versions.append(body["metadata"]["resourceVersion"])


async def test_a_watch_goes_on_where_it_broke_off_and_lists_again_when_that_is_too_long_ago() -> None:
    too_old, deleted = ApiError(410, "Expired", ""), [("DELETED", job(20))]
    first = [("MODIFIED", job(10)), ("BOOKMARK", job(12))]
    stub = StubApi([[job(8)], BROKEN, [job(15)]], [BROKEN, first, too_old, deleted])
    assert await versions_of(stub) == ["8", "10", "15"]
    assert stub.versions == ["9", "9", "12", "9"]


async def test_a_job_that_was_replaced_under_its_name_is_deleted() -> None:
    assert await versions_of(StubApi([[job(8)]], [[("MODIFIED", job(10, uid="other"))]])) == ["8"]
    assert await versions_of(StubApi([[job(8)], []], [ApiError(410, "Expired", "")])) == ["8"]


async def test_a_cluster_that_stays_away_or_refuses_is_an_error() -> None:
    for error, patience in ((BROKEN, 0.0), (ApiError(403, "Forbidden", ""), 60.0)):
        stub: Any = StubApi([[job(8)]], [error])
        with pytest.raises(ApiError) as told:
            await follow(stub, [], patience)
        assert told.value is error


async def test_a_job_that_is_not_there_is_answered_with_a_near_name() -> None:
    stub: Any = StubApi([[], [job(8)]], [])
    with pytest.raises(NoSuchJobError, match="did you mean support"):
        await anext(watch_job(Jobs(stub, "ml"), "suport"))


async def test_ticks_come_while_nothing_happens() -> None:
    go = asyncio.Event()

    async def items() -> AsyncIterator[int]:
        yield 1
        await go.wait()
        yield 2

    ticks = with_ticks(items(), 0.005)
    assert await anext(ticks) == 1
    assert await anext(ticks) is None
    go.set()
    assert [item async for item in ticks if item is not None] == [2]


class StubPods:
    """Two pods of Train: the first runs, the second starts later and is gone before its log is read."""

    def __init__(self) -> None:
        self.asked = 0

    def pod(self, rank: int, state: str) -> Object:
        marks = {"finetune.dev/stage": "train", "training.kubeflow.org/replica-index": str(rank)}
        status = {"containerStatuses": [{"name": "trainer", "state": {state: {}}}]}
        return {
            "metadata": {"name": f"w-{rank}", "labels": marks},
            "spec": {"containers": [{"name": "trainer"}]},
            "status": status,
        }

    async def list(self, kind: str, namespace: str, labels: str) -> list[Object]:
        return [self.pod(1, "waiting"), self.pod(0, "running")]

    async def get(self, kind: str, namespace: str, name: str) -> Object:
        return self.pod(1, "running")

    async def log(self, namespace: str, pod: str, query: dict[str, str]) -> AsyncIterator[str]:
        if pod == "w-1":
            raise ApiError(404, "NotFound", "")
        for line in ("one", "two"):
            yield f"{line} {query.get('follow')}"


async def test_logs_are_followed_until_all_pods_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.cluster.as_user.logs.START_POLL_SECONDS", 0.0)
    pods: Any = StubPods()
    sources = await log_sources(pods, "ml", "u")
    assert [source.node_rank for source in sources] == [0, 1]
    lines = [line async for line in read_logs(pods, "ml", sources, tail=None, follow=True)]
    assert [(line.source.name, line.text) for line in lines] == [("w-0", "one true"), ("w-0", "two true")]
