"""The only way to the API server: plain JSON objects over the official client's transport.

Objects are dicts as they are on the wire; nothing is retried here, the queue of the reconciler does that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient

Object = dict[str, Any]
Watch = Callable[[str, int], None]
REQUEST_TIMEOUT_SECONDS = 30.0
WATCH_SECONDS = 600
"""How long the server is asked to keep a watch."""
SILENCE_SECONDS = 90.0
"""A watch that says nothing for so long is dead: the server sends a bookmark a minute."""


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
    "FineTuneJob": Kind("finetune.dev/v1alpha1", "finetunejobs"),
    "Job": Kind("batch/v1", "jobs"),
    "PyTorchJob": Kind("kubeflow.org/v1", "pytorchjobs"),
    "TrainJob": Kind("trainer.kubeflow.org/v1alpha1", "trainjobs"),
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
}


class ApiError(Exception):
    """The API server's refusal, or that it could not be reached (`code` 0)."""

    def __init__(self, code: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code} {reason}: {message}".strip())
        self.code, self.reason, self.message, self.retry_after = code, reason, message, retry_after


class Api:
    """Requests to the API server. `watch` is told verb and code of each."""

    def __init__(self, client: ApiClient, watch: Watch = lambda verb, code: None) -> None:
        self._client, self._watch = client, watch

    async def find(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None."""
        try:
            return await self._request("get", "GET", KINDS[kind].path(namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str, labels: str) -> list[Object]:
        """The objects that carry labels."""
        found = await self._request("list", "GET", KINDS[kind].path(namespace), query={"labelSelector": labels})
        return list(found.get("items", []))

    async def pages(self, kind: str, namespace: str, labels: str, size: int) -> AsyncIterator[Object]:
        """All objects that carry labels, as lists of at most `size`, so that few are held at a time."""
        query = {"labelSelector": labels, "limit": str(size)}
        while True:
            page = await self._request("list", "GET", KINDS[kind].path(namespace), query=query)
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query = query | {"continue": token}

    async def watch(self, kind: str, namespace: str, labels: str, version: str) -> AsyncIterator[Object]:
        """What happens to the objects that carry labels after a version, until the server ends it.

        Raises ApiError with code 410 if the version is too old, with code 0 if the connection breaks or falls silent.
        """
        path = KINDS[kind].path(namespace)
        query = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_SECONDS)}
        query |= {"labelSelector": labels, "resourceVersion": version}
        answer = await self._begin_watch(path, query)
        try:
            async for line in _lines(answer.content):
                event: Object = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise ApiError(int(status.get("code", 500)), status.get("reason", ""), status.get("message", ""))
                yield event
        except (OSError, TimeoutError, ValueError, aiohttp.ClientError) as error:
            raise ApiError(0, "Unreachable", f"{type(error).__name__} while watching {path}") from error
        finally:
            answer.close()

    async def _begin_watch(self, path: str, query: dict[str, str]) -> aiohttp.ClientResponse:
        code = 0
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                answer: aiohttp.ClientResponse = (
                    await self._send("GET", path, None, query, 2.0 * WATCH_SECONDS)
                ).response
                code = answer.status
                if code >= 400:
                    raise _error(code, await answer.read(), answer.headers.get("Retry-After"))
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise ApiError(0, "Unreachable", f"{type(error).__name__} on watching {path}") from error
        finally:
            self._watch("watch", code)
        return answer

    async def create(self, made: Object) -> Object:
        """Create an object. Raises ApiError, with code 409 and reason AlreadyExists if there is one of its name."""
        path = KINDS[made["kind"]].path(made["metadata"]["namespace"])
        return await self._request("create", "POST", path, made)

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
        self, verb: str, method: str, path: str, body: Object | None = None, query: dict[str, str] | None = None
    ) -> Object:
        code = 0
        try:
            answer = await self._send(method, path, body, query or {}, REQUEST_TIMEOUT_SECONDS)
            code = answer.status
            data: bytes = await answer.read()
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            raise ApiError(0, "Unreachable", f"{type(error).__name__} on {method} {path}") from error
        finally:
            self._watch(verb, code)
        if code >= 400:
            raise _error(code, data, answer.headers.get("Retry-After"))
        return _read(data)

    async def _send(self, method: str, path: str, body: Object | None, query: dict[str, str], seconds: float) -> Any:
        prepared = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": "application/json"},
            auth_settings=["BearerToken"],
        )
        return await self._client.rest_client.request(
            method, prepared[1], headers=prepared[2], body=body, _request_timeout=seconds
        )


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length, as they come."""
    rest = b""
    chunks = aiter(content.iter_any())
    while True:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


def _read(data: bytes) -> Object:
    try:
        answer: Object = json.loads(data)
    except ValueError:
        answer = {"message": data[:200].decode(errors="replace")}
    return answer


def _error(code: int, data: bytes, retry_after: str | None) -> ApiError:
    answer = _read(data)
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    return ApiError(code, str(answer.get("reason", "")), str(answer.get("message", "")), seconds)
