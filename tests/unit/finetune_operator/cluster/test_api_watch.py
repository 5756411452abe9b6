"""Lists in pages and watches, over HTTP from a small server: whatever breaks, it is an ApiError that says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import ApiClient, Configuration

from finetune_operator.cluster import api as module
from finetune_operator.cluster.api import Api, ApiError

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Api]:
    """An Api whose server gives one answer to everything."""
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        async with ApiClient(configuration) as client:
            yield Api(client)
    finally:
        await runner.cleanup()


def saying(*chunks: bytes, then: Callable[[web.Request], Any] = lambda request: None) -> Answer:
    """A watch that sends chunks, whatever lines they are cut into."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0.01)
        ending = then(request)
        if ending is not None:
            await ending
        return response

    return answer


def event(kind: str, **fields: Any) -> bytes:
    return json.dumps({"type": kind, "object": fields}).encode() + b"\n"


async def watched(answer: Answer) -> list[str]:
    async with serving(answer) as api:
        return [seen["object"]["name"] async for seen in api.watch("Pod", "ml", "a=b", "7")]


async def test_events_arrive_whole_however_they_are_cut_and_however_long_they_are() -> None:
    long = event("ADDED", name="long", text="x" * 3_000_000)
    lines = event("ADDED", name="a") + long + event("MODIFIED", name="b")
    cuts = [0, 10, 60, 1_000_000, 1_000_001, len(lines)]
    chunks = [lines[start:end] for start, end in pairwise(cuts)]
    assert await watched(saying(*chunks)) == ["a", "long", "b"]


async def test_a_watch_asks_for_what_came_after_the_version_and_for_bookmarks() -> None:
    asked: dict[str, str] = {}

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.update(request.query, path=request.path)
        return web.Response(body=b"")

    await watched(answer)
    assert asked["path"] == "/api/v1/namespaces/ml/pods"
    assert (asked["resourceVersion"], asked["labelSelector"], asked["allowWatchBookmarks"]) == ("7", "a=b", "true")


async def test_a_version_that_is_too_old_is_told_as_410() -> None:
    gone = event("ERROR", code=410, reason="Expired", message="too old resource version")
    with pytest.raises(ApiError) as told:
        await watched(saying(event("ADDED", name="a"), gone))
    assert (told.value.code, told.value.reason) == (410, "Expired")


async def test_a_watch_that_is_refused_says_the_servers_words() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"reason": "Forbidden", "message": "pods is forbidden"}, status=403)

    with pytest.raises(ApiError, match="403 Forbidden: pods is forbidden"):
        await watched(answer)


async def hang_up(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


async def test_a_watch_that_breaks_off_or_falls_silent_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.2)
    for answer in (
        saying(event("ADDED", name="a")[:20], then=hang_up),
        saying(event("ADDED", name="a"), then=lambda request: asyncio.sleep(5)),
    ):
        with pytest.raises(ApiError) as told:
            await watched(answer)
        assert told.value.code == 0


async def test_a_list_is_read_page_by_page() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        number = int(request.query.get("continue", "0"))
        meta = {"resourceVersion": "9"} | ({"continue": str(number + 1)} if number < 2 else {})
        return web.json_response({"metadata": meta, "items": [{"limit": request.query["limit"], "number": number}]})

    async with serving(answer) as api:
        pages = [page["items"] async for page in api.pages("Pod", "", "a=b", 50)]
    assert pages == [[{"limit": "50", "number": number}] for number in range(3)]
