"""The only way to the API server, for operator and commands: plain JSON over the official client's transport.

Objects are dictionaries as they are on the wire. Nothing is retried here: the caller knows what may be asked again.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient

from finetune_api.base import API_VERSION, KIND, PLURAL
from finetune_operator.manifests.backends import BACKENDS

Object = dict[str, Any]
RequestCounter = Callable[[str, int], None]
CONNECT_SECONDS = 10.0
REQUEST_TIMEOUT_SECONDS = 30.0
"""How long an answer may stay silent."""
WATCH_SECONDS = 600
"""How long the server is asked to keep a watch."""
SILENCE_SECONDS = 90.0
"""A watch that is silent for this long is dead: the server sends a bookmark per minute."""
BACKOFF_SECONDS = (0.2, 30.0)
"""First and longest pause before something is asked again."""
JSON = "application/json"
TABLE = "application/json;as=Table;g=meta.k8s.io;v=v1,application/json"
"""Asks for the columns of the installed CRD."""
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"


@dataclass(frozen=True)
class Kind:
    """Where objects of a kind are found."""

    api_version: str
    plural: str

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        """The path of a collection, an object or a subresource; no namespace for what has none."""
        root = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        place = f"/namespaces/{namespace}" if namespace else ""
        parts = [root + place, self.plural, *filter(None, (name, subresource))]
        return "/".join(parts)


KINDS: dict[str, Kind] = {
    KIND: Kind(API_VERSION, PLURAL),
    "Job": Kind("batch/v1", "jobs"),
    "TrainingRuntime": Kind("trainer.kubeflow.org/v1alpha1", "trainingruntimes"),
    "Pod": Kind("v1", "pods"),
    "Node": Kind("v1", "nodes"),
    "ConfigMap": Kind("v1", "configmaps"),
    "Secret": Kind("v1", "secrets"),
    "ServiceAccount": Kind("v1", "serviceaccounts"),
    "PersistentVolumeClaim": Kind("v1", "persistentvolumeclaims"),
    "Role": Kind("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": Kind("rbac.authorization.k8s.io/v1", "rolebindings"),
    "NetworkPolicy": Kind("networking.k8s.io/v1", "networkpolicies"),
    "Lease": Kind("coordination.k8s.io/v1", "leases"),
    "Event": Kind("events.k8s.io/v1", "events"),
} | {backend.kind: Kind(backend.api_version, backend.plural) for backend in BACKENDS.values()}


class ApiError(Exception):
    """The API server refused, or could not be reached (`code` 0)."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{code} {reason}: {message}".strip())
        self.code, self.reason, self.message, self.retry_after = code, reason, message, retry_after
        self.details = details or {}
        """Of the Status that the API server answered with."""

    @property
    def kind_unknown(self) -> bool:
        """Whether the cluster does not know the kind at all."""
        return self.code == 404 and not self.details.get("name")

    @property
    def transient(self) -> bool:
        """Whether asking again may help."""
        return self.code in (0, 429, 500, 502, 503, 504)


class Api:
    """Requests to the API server. `count` is called with verb and status code of each."""

    def __init__(self, client: ApiClient, count: RequestCounter = lambda verb, code: None) -> None:
        self._client, self._count = client, count

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self._client.configuration.host)

    async def get(self, kind: str, namespace: str, name: str) -> Object:
        """The object. Raises ApiError, with code 404 if there is none."""
        return await self._request("get", "GET", KINDS[kind].path(namespace, name))

    async def find(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None."""
        try:
            return await self.get(kind, namespace, name)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str, labels: str) -> list[Object]:
        """The objects that carry labels."""
        return list((await self.collection(kind, namespace, labels=labels)).get("items", []))

    async def collection(
        self, kind: str, namespace: str, *, labels: str = "", fields: str = "", accept: str = JSON
    ) -> Object:
        """The list object of a kind, of one namespace or of all (empty)."""
        query = _selectors(labels, fields)
        return await self._request("list", "GET", KINDS[kind].path(namespace), query=query, accept=accept)

    async def pages(self, kind: str, namespace: str, labels: str, size: int) -> AsyncIterator[Object]:
        """All objects that carry labels, as lists of at most `size`, so that few are held at a time."""
        query = _selectors(labels) | {"limit": str(size)}
        while True:
            page = await self._request("list", "GET", KINDS[kind].path(namespace), query=query)
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query = query | {"continue": token}

    async def watch(
        self, kind: str, namespace: str, labels: str, version: str, fields: str = ""
    ) -> AsyncIterator[Object]:
        """What happens to the selected objects after a version, until the server ends it.

        Raises ApiError with code 410 if the version is too old, with code 0 if the connection breaks or falls silent.
        """
        path = KINDS[kind].path(namespace)
        query = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_SECONDS)}
        query |= _selectors(labels, fields) | {"resourceVersion": version}
        async for line in self._lines("watch", path, query, SILENCE_SECONDS):
            try:
                event: Object = json.loads(line)
            except ValueError as error:
                raise ApiError(0, "Unreachable", f"An event on {path} was cut off.") from error
            if event["type"] == "ERROR":
                status = event["object"]
                raise ApiError(int(status.get("code", 500)), status.get("reason", ""), status.get("message", ""))
            yield event

    async def log(self, namespace: str, pod: str, query: Mapping[str, str]) -> AsyncIterator[str]:
        """The lines of a pod's log; with `follow` in the query until its container ends."""
        silence = None if "follow" in query else REQUEST_TIMEOUT_SECONDS
        async for line in self._lines("get", KINDS["Pod"].path(namespace, pod, "log"), query, silence):
            yield line.decode("utf-8", errors="replace")

    async def create(self, body: Object, query: Mapping[str, str] | None = None) -> Object:
        """Create an object. Raises ApiError, with code 409 and reason AlreadyExists if there is one of its name."""
        path = KINDS[body["kind"]].path(body["metadata"]["namespace"])
        return await self._request("create", "POST", path, body, query)

    async def replace(self, changed: Object) -> Object:
        """Write an object; refused (409) if its resourceVersion is not the newest."""
        meta = changed["metadata"]
        return await self._request(
            "update", "PUT", KINDS[changed["kind"]].path(meta["namespace"], meta["name"]), changed
        )

    async def replace_status(self, changed: Object) -> Object:
        """Write the status; refused (409) if the object's resourceVersion is not the newest."""
        meta = changed["metadata"]
        path = KINDS[changed["kind"]].path(meta["namespace"], meta["name"], "status")
        return await self._request("update", "PUT", path, changed)

    async def patch(
        self, kind: str, namespace: str, name: str, body: Object, query: Mapping[str, str], content_type: str
    ) -> Object:
        """Change an object, or apply it from the server's side."""
        path = KINDS[kind].path(namespace, name)
        return await self._request("patch", "PATCH", path, body, query, content_type=content_type)

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object, its dependents in the background; that it is gone already is success."""
        try:
            await self._request(
                "delete", "DELETE", KINDS[kind].path(namespace, name), {"propagationPolicy": "Background"}
            )
        except ApiError as error:
            # A conflict is no success: the object is still there, and no event would tell us to try again.
            if error.code != 404:
                raise

    async def _request(
        self,
        verb: str,
        method: str,
        path: str,
        body: Object | None = None,
        query: Mapping[str, str] | None = None,
        *,
        accept: str = JSON,
        content_type: str = JSON,
    ) -> Object:
        headers = {"Accept": accept, "Content-Type": content_type}
        async with self._open(verb, method, path, body, query or {}, headers, REQUEST_TIMEOUT_SECONDS) as response:
            return _read(await response.read())

    async def _lines(
        self, verb: str, path: str, query: Mapping[str, str], silence_seconds: float | None
    ) -> AsyncIterator[bytes]:
        """The lines of an answer, of any length, as they come; `silence_seconds` None waits for ever."""
        rest = b""
        async with self._open(verb, "GET", path, None, query, {"Accept": "*/*"}, silence_seconds) as response:
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line
        if rest:
            yield rest

    @asynccontextmanager
    async def _open(
        self,
        verb: str,
        method: str,
        path: str,
        body: Object | None,
        query: Mapping[str, str],
        headers: dict[str, str],
        silence_seconds: float | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a request. Raises ApiError from status 400 up, and if the connection fails or breaks."""
        code = 0
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=silence_seconds)
        try:
            try:
                serialized = await self._client.param_serialize(
                    method, path, query_params=list(query.items()), header_params=headers, auth_settings=["BearerToken"]
                )
                answer = await self._client.rest_client.request(
                    method, serialized[1], headers=serialized[2], body=body, _request_timeout=timeout
                )
                code = answer.status
            finally:
                self._count(verb, code)
            response: aiohttp.ClientResponse = answer.response
            try:
                if code >= 400:
                    raise _error(code, await response.read(), response.headers.get("Retry-After"))
                yield response
            finally:
                response.close()
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise ApiError(0, "Unreachable", f"{type(error).__name__} on {method} {path}") from error


def backoff_seconds(failures: int, at_least: float | None = None) -> float:
    """The pause after `failures` consecutive failures: doubled each time, and never quite the same."""
    first, longest = BACKOFF_SECONDS
    seconds: float = min(first * 2.0 ** (failures - 1), longest) * random.uniform(0.75, 1.25)
    return max(seconds, at_least or 0.0)


def _selectors(labels: str, fields: str = "") -> dict[str, str]:
    return {name: text for name, text in (("labelSelector", labels), ("fieldSelector", fields)) if text}


def _read(data: bytes) -> Object:
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"message": data.decode(errors="replace").strip()[:300]}


def _error(code: int, data: bytes, retry_after: str | None) -> ApiError:
    status = _read(data)
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    reason, message = str(status.get("reason") or ""), str(status.get("message") or "")
    return ApiError(code, reason, message, seconds, status.get("details"))
