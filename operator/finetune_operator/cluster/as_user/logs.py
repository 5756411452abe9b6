"""The logs of one attempt's pods: which pods, and their lines as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from finetune_api.base import STAGES, Stage
from finetune_operator.cluster.api import Api, ApiError, Object
from finetune_operator.manifests import labels
from finetune_operator.manifests.job import UID_LABEL

START_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class LogSource:
    """One pod of an attempt."""

    name: str
    container: str
    """The one whose log is wanted: the stage's own, or one before it that runs or has failed."""
    last: bool
    """Whether it is the stage's own, which no other follows."""
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


async def log_sources(api: Api, namespace: str, uid: str) -> list[LogSource]:
    """The pods of the job of that uid, of all its attempts that are still there, in the order of its life."""
    pods = await api.list("Pod", namespace, f"{UID_LABEL}={uid}")
    sources = [_source(pod) for pod in pods if pod["metadata"]["labels"].get(labels.STAGE) in STAGES]
    return sorted(sources, key=lambda source: (STAGES.index(source.stage), source.attempt, source.node_rank))


def _source(pod: Object) -> LogSource:
    marks = pod["metadata"]["labels"]
    container = _container(pod.get("status", {}))
    state = container.get("state", {})
    own = str(pod["spec"]["containers"][0]["name"])
    name = str(container.get("name") or own)
    return LogSource(
        name=str(pod["metadata"]["name"]),
        container=name,
        last=name == own,
        stage=Stage(marks[labels.STAGE]),
        attempt=int(marks.get(labels.ATTEMPT, "1")),
        node_rank=labels.node_rank(marks),
        started="running" in state or "terminated" in state,
        waiting=str(state.get("waiting", {}).get("reason") or "Pending"),
    )


def _container(status: Object) -> Object:
    """The status of the stage's container; of one before it, while that runs, or if it failed."""
    for earlier in status.get("initContainerStatuses") or []:
        state = earlier.get("state", {})
        if "running" in state or state.get("terminated", {}).get("exitCode"):
            return dict(earlier)
    return dict(next(iter(status.get("containerStatuses") or []), {}))


def newest(sources: list[LogSource], stage: Stage | None, attempt: int | None) -> list[LogSource]:
    """The pods of the stage that came furthest, and of its newest attempt, unless others are asked for."""
    sources = [source for source in sources if stage is None or source.stage is stage]
    sources = [source for source in sources if attempt is None or source.attempt == attempt]
    return [source for source in sources if (source.stage, source.attempt) == (sources[-1].stage, sources[-1].attempt)]


async def read_logs(
    api: Api, namespace: str, sources: list[LogSource], *, tail: int | None, follow: bool
) -> AsyncIterator[Line]:
    """Yield the lines of these pods: one pod after the other, or, when followed, as they come until all have ended."""
    query = {"tailLines": str(tail)} if tail is not None else {}
    if follow:
        async for line in _merged(api, namespace, sources, query | {"follow": "true"}):
            yield line
        return
    for source in sources:
        async for line in _lines(api, namespace, source, query):
            yield line


async def _lines(api: Api, namespace: str, source: LogSource, query: dict[str, str]) -> AsyncIterator[Line]:
    async for text in api.log(namespace, source.name, query | {"container": source.container}):
        yield Line(source, text)


async def _merged(api: Api, namespace: str, sources: list[LogSource], query: dict[str, str]) -> AsyncIterator[Line]:
    lines: asyncio.Queue[Line | Exception | None] = asyncio.Queue(maxsize=1000)

    async def pump(source: LogSource) -> None:
        try:
            following: LogSource | None = source
            while following and (started := await _wait_for_start(api, namespace, following)):
                async for line in _lines(api, namespace, started, query):
                    await lines.put(line)
                following = await _next_container(api, namespace, started)
        except Exception as error:
            if not isinstance(error, ApiError) or error.code != 404:  # the pod is gone: its log has ended
                await lines.put(error)
        await lines.put(None)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    try:
        open_ends = len(pumps)
        while open_ends:
            line = await lines.get()
            if line is None:
                open_ends -= 1
            elif isinstance(line, Exception):
                raise line
            else:
                yield line
    finally:
        for task in pumps:
            task.cancel()


async def _wait_for_start(api: Api, namespace: str, source: LogSource) -> LogSource | None:
    """Wait until the pod's container runs or has run; None if it never will."""
    while not source.started:
        await asyncio.sleep(START_POLL_SECONDS)
        pod = await api.get("Pod", namespace, source.name)
        source = _source(pod)
        if pod.get("status", {}).get("phase") in ("Failed", "Succeeded") and not source.started:
            return None
    return source


async def _next_container(api: Api, namespace: str, source: LogSource) -> LogSource | None:
    """The pod's container after one whose log has ended; None if there is none, or if it never starts."""
    while not source.last:
        pod = await api.get("Pod", namespace, source.name)
        following = _source(pod)
        if following.container != source.container:
            return following
        if pod.get("status", {}).get("phase") in ("Failed", "Succeeded"):
            return None
        await asyncio.sleep(START_POLL_SECONDS)
    return None
