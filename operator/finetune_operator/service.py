"""The operator as a process: watches, the Lease, the workers, health and metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from urllib.request import getproxies

import kopf
from aiohttp import web
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator import handlers
from finetune_operator.cluster.api import Api
from finetune_operator.cluster.lease import Lease
from finetune_operator.cluster.store import Key, Store
from finetune_operator.cluster.watch import Watch
from finetune_operator.decision.model import Planner
from finetune_operator.manifests.backends import BACKENDS
from finetune_operator.metrics import Metrics
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)


async def serve(settings: Settings, planner: Planner | None = None, stop: asyncio.Event | None = None) -> None:
    """Run until a signal, or until `stop`. Raises LeaseLostError if the Lease is lost."""
    backend, store = BACKENDS[settings.backend], Store()
    metrics = Metrics(store.phases)
    ready = asyncio.Event()
    async with _client() as client:
        api = Api(client, metrics.count_request)
        lease = Lease(api, settings.lease_namespace, settings.lease_name, settings.identity, settings.lease_seconds)
        queue = WorkQueue[Key]()
        watches = handlers.watches(api, store, queue, backend, settings.namespaces)
        resyncs = handlers.resyncs(api, store, queue, settings.namespaces)
        reconciler = Reconciler(api, store, settings, metrics, planner, backend, queue=queue, watches=watches)
        watching = asyncio.create_task(_watch(watches, resyncs), name="watches")
        kopf_watching = asyncio.create_task(
            kopf.operator(
                registry=handlers.registry(store, queue),
                settings=handlers.settings(clusterwide=not settings.namespaces),
                namespaces=settings.namespaces,
                clusterwide=not settings.namespaces,
                stop_flag=stop,
                ready_flag=ready,
            ),
            name="kopf",
        )
        leading = asyncio.create_task(_lead(lease, reconciler, metrics, watches), name="lease")
        tasks = [leading, kopf_watching, watching]
        runners = [
            await _listen(_metrics_app(metrics), settings.metrics_port),
            await _listen(_health_app(tasks, lambda: ready.is_set() and _listed(watches)), settings.health_port),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _end(tasks)
            await asyncio.gather(*(runner.cleanup() for runner in runners if runner is not None))


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[ApiClient]:
    configuration = Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)
    # No limit: each watch holds a connection, and requests are as many as workers.
    configuration.connection_pool_maxsize = 0
    # With it, aiohttp asks a thread for the proxy and for ~/.netrc at every request.
    configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
    async with ApiClient(configuration) as client:
        yield client


async def _watch(watches: list[Watch], resyncs: list[Watch]) -> None:
    async with asyncio.TaskGroup() as group:
        for work in (*(watch.run() for watch in watches), *(resync.resync() for resync in resyncs)):
            group.create_task(work)


def _listed(watches: list[Watch]) -> bool:
    return all(watch.listed.is_set() for watch in watches)


async def _serve_queue(reconciler: Reconciler, watches: list[Watch]) -> None:
    """Serve the queue, but not before all children are known: a job whose child is not seen would start another."""
    for watch in watches:
        await watch.listed.wait()
    await reconciler.run()


async def _lead(lease: Lease, reconciler: Reconciler, metrics: Metrics, watches: list[Watch]) -> None:
    """Wait for the Lease, serve the queue while it is held, give it back at the end."""
    await lease.acquire()
    log.info("holds the Lease %s/%s", lease.namespace, lease.name)
    metrics.leader.set(1)
    tasks = [asyncio.create_task(lease.keep()), asyncio.create_task(_serve_queue(reconciler, watches))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        metrics.leader.set(0)
        # First the work ends, then the Lease.
        await _end(tasks)
        await lease.release()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(app: web.Application, port: int) -> web.AppRunner | None:
    """Serve HTTP on a port; 0 serves nothing."""
    if port == 0:
        return None
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


def _health_app(tasks: list[asyncio.Task[None]], ready: Callable[[], bool]) -> web.Application:
    def is_alive() -> bool:
        return not any(task.done() for task in tasks)

    async def alive(_: web.Request) -> web.Response:
        return web.Response(status=200 if is_alive() else 500)

    async def is_ready(_: web.Request) -> web.Response:
        return web.Response(status=200 if ready() and is_alive() else 503)

    app = web.Application()
    app.add_routes([web.get("/healthz", alive), web.get("/readyz", is_ready)])
    return app


def _metrics_app(metrics: Metrics) -> web.Application:
    async def show(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/metrics", show)])
    return app


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with job and attempt where they are known."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in ("job", "attempt") if (value := getattr(record, name, ""))}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        job = getattr(record, "job", "")
        return f"{super().format(record)}{f' [{job}]' if job else ''}"


def configure_logging(settings: Settings) -> None:
    """Send all logging to stderr in the configured form; kopf says only what goes wrong."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("kopf").setLevel(logging.WARNING)
