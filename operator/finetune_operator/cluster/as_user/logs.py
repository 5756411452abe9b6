"""The logs of one attempt's pods: which pods, and their lines as they come."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_api.base import STAGES, Stage
from finetune_operator.cluster.as_user.connection import Connection, Resource
from finetune_operator.cluster.as_user.problems import ClusterError, RefusedError, UnreachableError
from finetune_operator.manifests import labels
from finetune_operator.manifests.job import UID_LABEL

START_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class LogSource:
    """One pod of an attempt."""

    name: str
    container: str
    """The one whose log is wanted: the stage's own, or the one before it that failed."""
    stage: Stage
    attempt: int
    node_rank: int
    started: bool
    waiting: str
    """Why it has not started, in a word."""


@dataclass(frozen=True)
class Line:
    """One line of one pod."""

    source: LogSource
    text: str


def sources(connection: Connection, namespace: str, uid: str) -> list[LogSource]:
    """The pods of the job of that uid, of all its attempts that are still there, in the order of its life."""
    query = {"labelSelector": f"{UID_LABEL}={uid}"}
    found = connection.request("GET", f"/api/v1/namespaces/{namespace}/pods", query=query)["items"]
    made = [_source(pod) for pod in found if pod["metadata"]["labels"].get(labels.STAGE) in STAGES]
    return sorted(made, key=lambda source: (STAGES.index(source.stage), source.attempt, source.node_rank))


def _source(pod: Resource) -> LogSource:
    marks = pod["metadata"]["labels"]
    container = _container(pod.get("status", {}))
    state = container.get("state", {})
    return LogSource(
        name=str(pod["metadata"]["name"]),
        container=str(container.get("name") or pod["spec"]["containers"][0]["name"]),
        stage=Stage(marks[labels.STAGE]),
        attempt=int(marks.get(labels.ATTEMPT, "1")),
        node_rank=labels.node_rank(marks),
        started="running" in state or "terminated" in state,
        waiting=str(state.get("waiting", {}).get("reason") or "Pending"),
    )


def _container(status: Resource) -> Resource:
    """The status of the stage's container; of one before it, if that failed and the stage's thus never starts."""
    for earlier in status.get("initContainerStatuses") or []:
        if earlier.get("state", {}).get("terminated", {}).get("exitCode"):
            return dict(earlier)
    return dict(next(iter(status.get("containerStatuses") or []), {}))


def newest(found: list[LogSource], stage: Stage | None, attempt: int | None) -> list[LogSource]:
    """The pods of the stage that came furthest, and of its newest attempt, unless others are asked for."""
    found = [source for source in found if stage is None or source.stage is stage]
    found = [source for source in found if attempt is None or source.attempt == attempt]
    if not found:
        return []
    last = found[-1]
    return [source for source in found if (source.stage, source.attempt) == (last.stage, last.attempt)]


def read(
    connection: Connection, namespace: str, found: list[LogSource], *, tail: int | None, follow: bool
) -> Iterator[Line]:
    """Yield the lines of these pods: one pod after the other, or, when followed, as they come until all have ended."""
    query = {"tailLines": str(tail)} if tail is not None else {}
    if not follow:
        for source in found:
            yield from _lines(connection, namespace, source, query)
        return
    yield from _merged(connection, namespace, found, query | {"follow": "true"})


def _lines(connection: Connection, namespace: str, source: LogSource, query: dict[str, str]) -> Iterator[Line]:
    path = f"/api/v1/namespaces/{namespace}/pods/{source.name}/log"
    query = query | {"container": source.container}
    for line in connection.lines(path, query, None if "follow" in query else 60.0):
        yield Line(source, line.decode("utf-8", errors="replace"))


def _merged(connection: Connection, namespace: str, found: list[LogSource], query: dict[str, str]) -> Iterator[Line]:
    mailbox: queue.Queue[Line | ClusterError | None] = queue.Queue(maxsize=1000)

    def pump(source: LogSource) -> None:
        try:
            started = _wait_for_start(connection, namespace, source)
            if started is not None:
                for line in _lines(connection, namespace, started, query):
                    mailbox.put(line)
        except UnreachableError as error:
            mailbox.put(error)
        except RefusedError as error:
            if error.code != 404:  # the pod is gone: its log has ended
                mailbox.put(error)
        finally:
            mailbox.put(None)

    for source in found:
        threading.Thread(target=pump, args=(source,), daemon=True).start()
    open_ends = len(found)
    while open_ends:
        item = mailbox.get()
        if item is None:
            open_ends -= 1
        elif isinstance(item, ClusterError):
            raise item
        else:
            yield item


def _wait_for_start(connection: Connection, namespace: str, source: LogSource) -> LogSource | None:
    """Wait until the pod's container runs or has run; None if it never will."""
    while not source.started:
        time.sleep(START_POLL_SECONDS)
        pod = connection.request("GET", f"/api/v1/namespaces/{namespace}/pods/{source.name}")
        source = _source(pod)
        if pod.get("status", {}).get("phase") in ("Failed", "Succeeded") and not source.started:
            return None
    return source
