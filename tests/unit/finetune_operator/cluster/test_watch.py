"""Children are listed and watched, whatever the API server does in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.time_limits import scaled

from finetune_api.runconfig import RUN_CONFIG_FILE
from finetune_operator.cluster import api, watch
from finetune_operator.cluster.act import snapshot_image
from finetune_operator.cluster.api import ApiError
from finetune_operator.cluster.store import Key, Store
from finetune_operator.cluster.watch import Watch

Object = dict[str, Any]


def pod(name: str, version: int, job: str = "support") -> Object:
    meta = {"name": name, "namespace": "ml", "uid": f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": meta | {"labels": {"finetune.dev/job": job}}}


class Server:
    """Says what it is told to: each list and each watch is answered by the next in its row, the last one again."""

    def __init__(self, lists: list[list[Object] | ApiError], watches: list[list[tuple[str, Object]] | ApiError]):
        self.lists, self.watches = lists, watches
        self.asked: list[str] = []
        self.silent = asyncio.Event()

    async def pages(self, kind: str, namespace: str, labels: str, size: int) -> AsyncIterator[Object]:
        self.asked.append("list")
        answer = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
        if isinstance(answer, ApiError):
            raise answer
        version = max((int(body["metadata"]["resourceVersion"]) for body in answer), default=1)
        for body in answer:
            yield {"metadata": {"resourceVersion": str(version)}, "items": [body]}
        yield {"metadata": {"resourceVersion": str(version)}}

    async def watch(self, kind: str, namespace: str, labels: str, version: str) -> AsyncIterator[Object]:
        self.asked.append(f"watch from {version}")
        if not self.watches:
            self.silent.set()
            await asyncio.Event().wait()
        answer = self.watches.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        for kind, body in answer:
            yield {"type": kind, "object": body}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BACKOFF_SECONDS", (0.001, 0.01))
    monkeypatch.setattr(watch, "UNKNOWN_KIND_SECONDS", 0.001)


async def run(server: Server) -> tuple[Store, list[Key]]:
    """Watch until the server has nothing more to say."""
    store, told = Store(), list[Key]()
    made = Watch(server, store, "Pod", "", "", told.append)  # type: ignore[arg-type]
    task = asyncio.create_task(made.run())
    async with asyncio.timeout(scaled(5)):
        await server.silent.wait()
    assert made.listed.is_set()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return store, told


def names(store: Store, job: str = "support") -> list[str]:
    return sorted(body["metadata"]["name"] for body in store.of("Pod", Key("ml", job)))


async def test_what_was_there_and_what_happens_is_in_the_store_and_told_once() -> None:
    happens = [("ADDED", pod("c", 4)), ("MODIFIED", pod("a", 5)), ("DELETED", pod("b", 6))]
    server = Server([[pod("a", 2), pod("b", 3, "other")]], [happens])
    store, told = await run(server)
    assert names(store) == ["a", "c"]
    assert [key.label for key in told] == ["support", "other", "support", "support", "support"]


async def test_an_event_that_says_nothing_new_is_told_to_nobody() -> None:
    server = Server([[pod("a", 2)]], [[("ADDED", pod("a", 2)), ("MODIFIED", pod("a", 1))]])
    _, told = await run(server)
    assert len(told) == 1


async def test_a_watch_that_ends_is_gone_on_with_from_its_last_word() -> None:
    bookmark = ("BOOKMARK", {"metadata": {"resourceVersion": "9"}})
    broken = ApiError(0, "Unreachable", "cut")
    server = Server([[pod("a", 2)]], [[("ADDED", pod("b", 5))], broken, [bookmark], []])
    store, _ = await run(server)
    assert server.asked == ["list", "watch from 2", "watch from 5", "watch from 5", "watch from 9", "watch from 9"]
    assert names(store) == ["a", "b"]


async def test_what_went_while_a_watch_was_too_old_is_forgotten_and_told() -> None:
    gone = ApiError(410, "Expired", "too old resource version")
    server = Server([[pod("a", 2), pod("b", 3)], [pod("b", 8)]], [gone])
    store, told = await run(server)
    assert server.asked == ["list", "watch from 3", "list", "watch from 8"]
    assert names(store) == ["b"]
    assert told.count(Key("ml", "support")) == 4


async def test_what_went_unheard_is_found_to_be_gone_sooner_or_later_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RELIST_SECONDS", 0.0)
    server = Server([[pod("a", 2), pod("b", 3)], [pod("b", 3)]], [[]])
    store, told = await run(server)
    assert server.asked == ["list", "watch from 3", "list", "watch from 3"]
    assert names(store) == ["b"]
    assert told.count(Key("ml", "support")) == 3


async def test_what_belongs_to_one_job_is_listed_alone_when_it_is_doubted() -> None:
    store, told = Store(), list[Key]()
    for body in (pod("gone", 2), pod("made-since", 9), pod("another-jobs", 2, "other")):
        store.put("Pod", body)
    server = Server([[pod("listed", 5)], []], [])
    made = Watch(server, store, "Pod", "ml", "", told.append)  # type: ignore[arg-type]
    assert not await made.look_again(Key("research", "support"))
    assert await made.look_again(Key("ml", "support"))
    assert (names(store), names(store, "other")) == (["listed", "made-since"], ["another-jobs"])
    assert set(told) == {Key("ml", "support")}


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 100_000, '{"image": []}'])
async def test_a_run_config_that_somebody_else_wrote_ends_no_watch(text: str) -> None:
    owner = {"kind": "FineTuneJob", "name": "support", "uid": "u", "controller": True}
    body = pod("support-config", 1)
    body["metadata"]["ownerReferences"] = [owner]
    store = Store()
    assert store.put("ConfigMap", body | {"data": {RUN_CONFIG_FILE: text}}) == Key("ml", "support")
    (kept,) = store.of("ConfigMap", Key("ml", "support"))
    assert isinstance(snapshot_image(kept, "u"), str | None)


async def test_what_was_made_after_a_list_is_not_forgotten_by_it() -> None:
    store = Store()
    store.put("Pod", pod("new", 7))
    assert store.keep_only("Pod", "", set(), version=6) == []
    assert store.keep_only("Pod", "other", set(), version=7) == []
    assert store.keep_only("Pod", "ml", set(), version=7) == [Key("ml", "support")]


async def test_a_kind_that_the_cluster_does_not_know_holds_nothing_up_and_is_asked_for_again() -> None:
    unknown = ApiError(404, "NotFound", "the server could not find the requested resource")
    store, _ = await run(Server([unknown, unknown, [pod("a", 2)]], []))
    assert names(store) == ["a"]


async def test_nothing_is_listed_while_the_server_refuses_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forbidden = ApiError(403, "Forbidden", "pods is forbidden")
    server = Server([forbidden, forbidden, forbidden, [pod("a", 2)]], [])
    store, _ = await run(server)
    assert names(store) == ["a"]
    assert [record.getMessage() for record in caplog.records] == [
        "cannot watch Pod in all namespaces: 403 Forbidden: pods is forbidden"
    ]


async def test_what_another_watches_is_listed_now_and_then_and_what_went_unsaid_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "RESYNC_SECONDS", 0.001)
    store, gone = Store(), asyncio.Event()
    store.put("Pod", pod("gone", 2))
    store.put("Pod", pod("stays", 3))
    server = Server([ApiError(503, "ServiceUnavailable", ""), [pod("stays", 3)]], [])
    task = asyncio.create_task(Watch(server, store, "Pod", "", "", lambda key: gone.set()).resync())  # type: ignore[arg-type]
    async with asyncio.timeout(scaled(5)):
        await gone.wait()
    task.cancel()
    assert names(store) == ["stays"]
    assert set(server.asked) == {"list"}
