"""The operator as a process: kopf, watches, the Lease, the workers, metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime

import kopf
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator import handlers
from finetune_operator.cluster.access import connect
from finetune_operator.cluster.api import Api
from finetune_operator.cluster.lease import Lease
from finetune_operator.cluster.store import Key, Store
from finetune_operator.cluster.watch import Watch
from finetune_operator.errors import EXIT_FAILED, UserError
from finetune_operator.manifests.backends import BACKENDS
from finetune_operator.metrics import Metrics
from finetune_operator.plan_worker import PlanWorker
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)


async def serve(settings: Settings, stop: asyncio.Event | None = None) -> None:
    """Run until a signal, or until `stop`. Raises LeaseLostError if the Lease is lost."""
    backend, store = BACKENDS[settings.backend], Store()
    metrics, planner = Metrics(store.phases), PlanWorker()
    ready = asyncio.Event()
    async with connect(user_agent="finetune-operator") as access:
        api = Api(access.client, metrics.count_request)
        lease = Lease(api, settings.lease_namespace, settings.lease_name, settings.identity, settings.lease_seconds)
        queue = WorkQueue[Key]()
        watches = handlers.watches(api, store, queue, backend, settings.namespaces)
        resyncs = handlers.resyncs(api, store, queue, settings.namespaces)
        reconciler = Reconciler(api, store, settings, metrics, planner, backend, queue=queue, watches=watches)
        kopf_operator = kopf.operator(
            registry=handlers.registry(store, queue, access.client.configuration),
            settings=handlers.kopf_settings(clusterwide=not settings.namespaces),
            namespaces=settings.namespaces,
            clusterwide=not settings.namespaces,
            stop_flag=stop,
            ready_flag=ready,
            liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz" if settings.health_port else None,
        )
        runner = await _listen(
            _http_app(metrics, lambda: ready.is_set() and all(watch.listed.is_set() for watch in watches)),
            settings.metrics_port,
        )
        tasks = [
            asyncio.create_task(_lead(lease, reconciler, metrics, watches), name="lease"),
            asyncio.create_task(kopf_operator, name="kopf"),
            asyncio.create_task(_watch(watches, resyncs), name="watches"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _end(tasks)
            await planner.close()
            if runner is not None:
                await runner.cleanup()


async def _watch(watches: list[Watch], resyncs: list[Watch]) -> None:
    async with asyncio.TaskGroup() as group:
        for work in (*(watch.run() for watch in watches), *(resync.resync() for resync in resyncs)):
            group.create_task(work)


async def _serve_queue(reconciler: Reconciler, watches: list[Watch]) -> None:
    """Serve the queue once all children are known: a job whose child has not been seen would start another."""
    for watch in watches:
        await watch.listed.wait()
    await reconciler.run()


async def _lead(lease: Lease, reconciler: Reconciler, metrics: Metrics, watches: list[Watch]) -> None:
    """Wait for the Lease, serve the queue while it is held, give it back at the end."""
    await lease.acquire()
    log.info("acquired the Lease %s/%s", lease.namespace, lease.name)
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
    """Serve HTTP on a port; 0 serves nothing. Raises UserError if the port is in use."""
    if port == 0:
        return None
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
    except OSError as error:
        raise UserError(
            f"Port {port} cannot be used ({error.strerror}): set FINETUNE_METRICS_PORT.", EXIT_FAILED
        ) from error
    return runner


def _http_app(metrics: Metrics, ready: Callable[[], bool]) -> web.Application:
    async def show(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def is_ready(_: web.Request) -> web.Response:
        return web.Response(status=200 if ready() else 503)

    app = web.Application()
    app.add_routes([web.get("/metrics", show), web.get("/readyz", is_ready)])
    return app


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with job and attempt where they are known."""

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
    """Send all logging to stderr in the configured format; of kopf only warnings, of HTTP requests nothing."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for name in ("kopf", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
