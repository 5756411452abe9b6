"""A proxy in front of the API server that fails on purpose: it kills its client at a chosen request, loses answers,
refuses, delays, cuts watches.

Between the operator and the proxy is plain HTTP on loopback; behind it is the real server, with the client's own
token. What happens to a request is said by a plan, a function of the test; what became of it is kept in `history`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import kubernetes
from aiohttp import web
from tests.support.time_limits import scaled
from yarl import URL

_Value = TypeVar("_Value")
_NOT_FORWARDED = frozenset({"host", "connection", "content-length", "transfer-encoding", "keep-alive"})


@dataclass(frozen=True)
class Call:
    """One request as it came from the client."""

    method: str
    path: str
    query: dict[str, str]
    body: dict[str, Any]

    @property
    def mutates(self) -> bool:
        """Whether it changes anything."""
        return self.method != "GET"

    @property
    def resource(self) -> str:
        """The plural that it is about, such as `pytorchjobs`; with the subresource, such as `finetunejobs/status`."""
        parts = self.path.strip("/").split("/")
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            rest = rest[2:]
        return "/".join([*rest[:1], *rest[2:3]])

    @property
    def name(self) -> str:
        """The object's name: from the body where it is created, else from the path."""
        return str((self.body.get("metadata") or {}).get("name") or self.path.rsplit("/", 1)[-1])

    @property
    def watches(self) -> bool:
        """Whether it is answered by a stream."""
        return self.query.get("watch") == "true"


@dataclass(frozen=True)
class Kill:
    """The client dies: before the server hears of the request, or after it has acted and before it is heard."""

    acted: bool


@dataclass(frozen=True)
class Refuse:
    """The client gets this code; with `acted` although the server has done what was asked."""

    code: int
    retry_after: int | None = None
    acted: bool = False


@dataclass(frozen=True)
class Lose:
    """The connection breaks, or with `silent` nothing comes until the client gives up; the server acts or not."""

    acted: bool
    silent: bool = False


@dataclass(frozen=True)
class Delay:
    """The answer comes late."""

    seconds: float


@dataclass(frozen=True)
class EndWatch:
    """A watch ends after so many events: cut in the middle of a line, or told that its version is too old (410)."""

    after: int
    gone: bool = False


Fault = Kill | Refuse | Lose | Delay | EndWatch
Plan = Callable[[Call], Fault | None]


@dataclass(frozen=True)
class Done:
    """A request that the server answered, whatever the client was told."""

    call: Call
    code: int


class Loop:
    """An event loop in a thread of its own, for any number of proxies; use it in a `with` block."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fault-proxies", daemon=True)

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def call(self, work: Coroutine[Any, Any, _Value]) -> _Value:
        """Run a coroutine there and return what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=scaled(60))


@dataclass
class FaultProxy:
    """One client's way to the API server."""

    loop: Loop
    server: str
    tls: ssl.SSLContext
    plan: Plan = lambda call: None
    on_kill: Callable[[], None] = lambda: None
    history: list[Done] = field(default_factory=list)
    killed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._shut = False

    def start(self) -> FaultProxy:
        """Listen on a free port."""
        self.loop.call(self._start())
        return self

    @property
    def url(self) -> str:
        """Where the client connects to."""
        return f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        """Let nothing through any more."""
        self._shut = True
        self.loop.call(self._stop())

    async def _start(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self.tls, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=128)
        await site.start()
        self._port: int = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        call = Call(request.method, request.path, dict(request.query), json.loads(body) if body else {})
        if self._shut:
            return _break(request)
        # A plan may ask the API server itself.
        fault = await asyncio.to_thread(self.plan, call)
        match fault:
            case Kill(acted) | Lose(acted):
                if acted:
                    await self._forward(request, call, body)
                if isinstance(fault, Kill):
                    self._shut = True
                    self.on_kill()
                    self.killed.set()
                elif fault.silent:
                    await self._until_it_gives_up(request)
                return _break(request)
            case Refuse(code, retry_after, acted):
                if acted:
                    await self._forward(request, call, body)
                return _refusal(code, retry_after)
            case Delay(seconds):
                await asyncio.sleep(seconds)
        if call.watches:
            return await self._stream(request, fault if isinstance(fault, EndWatch) else None)
        return await self._forward(request, call, body)

    def _ask(self, request: web.Request, body: bytes | None) -> Any:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_FORWARDED}
        url = URL(self.server + request.raw_path, encoded=True)
        return self._session.request(request.method, url, headers=headers, data=body)

    async def _forward(self, request: web.Request, call: Call, body: bytes) -> web.StreamResponse:
        async with self._ask(request, body or None) as answer:
            data = await answer.read()
            self.history.append(Done(call, answer.status))
            return web.Response(status=answer.status, body=data, headers=_headers(answer))

    async def _stream(self, request: web.Request, end: EndWatch | None) -> web.StreamResponse:
        async with self._ask(request, None) as answer:
            response = web.StreamResponse(status=answer.status, headers=_headers(answer))
            await response.prepare(request)
            passed = 0
            with contextlib.suppress(ConnectionResetError, aiohttp.ClientError):
                async for line in answer.content:
                    if end is not None and passed >= end.after:
                        return await _end(request, response, end, line)
                    await response.write(line)
                    passed += 1
            return response

    async def _until_it_gives_up(self, request: web.Request) -> None:
        while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.05)


async def _end(request: web.Request, response: web.StreamResponse, end: EndWatch, line: bytes) -> web.StreamResponse:
    if end.gone:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410}
        told = {"type": "ERROR", "object": status | {"message": "too old resource version"}}
        await response.write(json.dumps(told).encode() + b"\n")
        await response.write_eof()
        return response
    await response.write(line[: len(line) // 2])
    _break(request)
    return response


def _headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    kept = ("content-type", "retry-after", "content-encoding")
    return {name: value for name, value in answer.headers.items() if name.lower() in kept}


def _break(request: web.Request) -> web.Response:
    """Cut the connection; the response goes nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=503)


def _refusal(code: int, retry_after: int | None) -> web.Response:
    reasons = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout"}
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reasons.get(code, "")}
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return web.json_response(body | {"message": f"refused by the test with {code}"}, status=code, headers=headers)


def trusting(kubeconfig: Path) -> ssl.SSLContext:
    """What it takes to believe the API server of a kubeconfig."""
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config(str(kubeconfig), client_configuration=configuration)
    return ssl.create_default_context(cafile=configuration.ssl_ca_cert)
