"""A job as it changes: a watch that outlives dropped connections, and time that passes in between."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

from finetune_operator.cluster.as_user.connection import Resource
from finetune_operator.cluster.as_user.jobs import Jobs
from finetune_operator.cluster.as_user.problems import ClusterError, RefusedError, UnreachableError

WATCH_SECONDS = 240
"""After which the API server ends a watch, and another begins."""
SILENCE_MARGIN_SECONDS = 15
PATIENCE_SECONDS = 120.0
"""How long a cluster that was there before may be away."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
HTTP_GONE = 410

_Item = TypeVar("_Item")


class JobDeletedError(ClusterError):
    """The job was deleted while it was followed."""


def follow(jobs: Jobs, name: str, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[Resource]:
    """Yield the job as it is, and again after each change.

    Raises `NoSuchJobError` if it is not there to begin with, `JobDeletedError` when it is deleted (also if another
    took its name), and the last error of a cluster that stays away for longer than `patience_seconds`.
    """
    job, version = _look(jobs, name)
    if job is None:
        job = jobs.get(name)  # raises, with a near match
    uid = job["metadata"]["uid"]
    yield job
    heard, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        try:
            for job in _changes(jobs, name, uid, version):
                heard, pause = time.monotonic(), FIRST_PAUSE_SECONDS
                yield job
            # The watch ended, or its beginning is too long ago: look, and watch from there.
            time.sleep(FIRST_PAUSE_SECONDS)
            fresh, version = _look(jobs, name)
        except (UnreachableError, RefusedError) as error:
            passing = isinstance(error, UnreachableError) or error.transient
            if not passing or time.monotonic() - heard > patience_seconds:
                raise
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            continue
        heard = time.monotonic()
        if fresh is None or fresh["metadata"]["uid"] != uid:
            raise _deleted(name)
        if fresh["metadata"]["resourceVersion"] != job["metadata"]["resourceVersion"]:
            yield fresh
        job = fresh


def _look(jobs: Jobs, name: str) -> tuple[Resource | None, str]:
    """The job, and a version to watch from: the list's, for that of a job at rest is soon too old for a watch."""
    found = jobs.connection.request("GET", jobs.path(), query={"fieldSelector": f"metadata.name={name}"})
    return next(iter(found["items"]), None), str(found["metadata"]["resourceVersion"])


def _changes(jobs: Jobs, name: str, uid: str, version: str) -> Iterator[Resource]:
    """The events of one watch, until it ends or is too old."""
    query = {
        "watch": "true",
        "fieldSelector": f"metadata.name={name}",
        "resourceVersion": version,
        "timeoutSeconds": str(WATCH_SECONDS),
    }
    for line in _lines(jobs, query):
        event = json.loads(line) if line.strip() else {}
        if event.get("type") not in ("ADDED", "MODIFIED", "DELETED"):
            return
        if event["type"] == "DELETED" or event["object"]["metadata"]["uid"] != uid:
            raise _deleted(name)
        yield event["object"]


def _lines(jobs: Jobs, query: dict[str, str]) -> Iterator[bytes]:
    try:
        yield from jobs.connection.lines(jobs.path(), query, WATCH_SECONDS + SILENCE_MARGIN_SECONDS)
    except RefusedError as error:
        if error.code != HTTP_GONE:
            raise


def _deleted(name: str) -> JobDeletedError:
    return JobDeletedError(f"{name} was deleted.")


def ticking(items: Iterator[_Item], seconds: float) -> Iterator[_Item | None]:
    """The same items, and None whenever none has come for that long. An error of `items` comes where it happened."""
    mailbox: queue.Queue[tuple[str, _Item | BaseException | None]] = queue.Queue()

    def pump() -> None:
        try:
            for item in items:
                mailbox.put(("item", item))
            mailbox.put(("end", None))
        except BaseException as error:
            mailbox.put(("error", error))

    # A daemon: whoever stops listening does not wait for a watch that is silent for minutes.
    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            kind, item = mailbox.get(timeout=seconds)
        except queue.Empty:
            yield None
            continue
        if kind == "end":
            return
        if isinstance(item, BaseException):
            raise item
        yield item
