"""A job as it changes: a watch that outlives dropped connections, and time that passes in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TypeVar

from finetune_api.base import KIND
from finetune_operator.cluster.api import ApiError, Object, backoff_seconds
from finetune_operator.cluster.as_user.jobs import Jobs
from finetune_operator.cluster.as_user.problems import ClusterError

PATIENCE_SECONDS = 120.0
"""How long a cluster that was there before may be away."""
HTTP_GONE = 410

_Item = TypeVar("_Item")


class JobDeletedError(ClusterError):
    """The job was deleted while it was watched."""


async def watch_job(jobs: Jobs, name: str, patience_seconds: float = PATIENCE_SECONDS) -> AsyncIterator[Object]:
    """Yield the job as it is, and again after each change.

    Raises `NoSuchJobError` if it is not there to begin with, `JobDeletedError` when it is deleted (also if another
    took its name), and the last ApiError of a cluster that stays away for longer than `patience_seconds`.
    """
    listed, version = await _list(jobs, name)
    job = listed or await jobs.get(name)  # raises, with a near match
    yield job
    heard, failures = time.monotonic(), 0
    while True:
        try:
            if not version:
                listed, version = await _list(jobs, name)
                heard, failures = time.monotonic(), 0
                if listed is None or listed["metadata"]["uid"] != job["metadata"]["uid"]:
                    raise JobDeletedError(f"{name} was deleted.")
                if listed["metadata"]["resourceVersion"] != job["metadata"]["resourceVersion"]:
                    job = listed
                    yield job
            async for event in jobs.api.watch(KIND, jobs.namespace, "", version, f"metadata.name={name}"):
                heard, failures = time.monotonic(), 0
                version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] == "BOOKMARK":
                    continue
                if event["type"] == "DELETED" or event["object"]["metadata"]["uid"] != job["metadata"]["uid"]:
                    raise JobDeletedError(f"{name} was deleted.")
                job = event["object"]
                yield job
        except ApiError as error:
            if error.code == HTTP_GONE:
                version = ""
            elif not error.transient or time.monotonic() - heard > patience_seconds:
                raise
        failures += 1
        await asyncio.sleep(backoff_seconds(failures))


async def _list(jobs: Jobs, name: str) -> tuple[Object | None, str]:
    """The job, and a version to watch from: the list's, for that of a job at rest is soon too old for a watch."""
    page = await jobs.api.collection(KIND, jobs.namespace, fields=f"metadata.name={name}")
    return next(iter(page["items"]), None), str(page["metadata"]["resourceVersion"])


async def with_ticks(items: AsyncIterator[_Item], seconds: float) -> AsyncIterator[_Item | None]:
    """The same items, and None whenever none has come for that long."""
    upcoming = asyncio.ensure_future(anext(items))
    try:
        while True:
            if not (await asyncio.wait([upcoming], timeout=seconds))[0]:
                yield None
                continue
            try:
                item = upcoming.result()
            except StopAsyncIteration:
                return
            yield item
            upcoming = asyncio.ensure_future(anext(items))
    finally:
        upcoming.cancel()
