"""A small typed view of the Kubernetes API: plain dictionaries in and out, one request a call.

The only module of the harness that speaks HTTP. It never retries and never caches objects, so a
test sees exactly what the API server answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import kubernetes
import urllib3
from tests.support.time_limits import scaled

Resource = dict[str, Any]

MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
_DISCOVERY = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"


class ApiError(RuntimeError):
    """The API server refused a request."""

    def __init__(self, method: str, path: str, code: int, answer: Resource) -> None:
        self.code = code
        self.reason = str(answer.get("reason", ""))
        self.message = str(answer.get("message", ""))
        super().__init__(f"{method} {path}: {code} {self.reason}: {self.message}")


@dataclass(frozen=True)
class Endpoint:
    """Where objects of one kind are found."""

    api_version: str
    plural: str
    namespaced: bool

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Return the URL path of a collection, an object or a subresource."""
        root = "/apis" if "/" in self.api_version else "/api"
        parts = [root, self.api_version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


class Api:
    """Requests to one API server as one user; safe to share between threads."""

    def __init__(self, kubeconfig: Path, timeout_seconds: float = 30) -> None:
        configuration = kubernetes.client.Configuration()
        kubernetes.config.load_kube_config(str(kubeconfig), client_configuration=configuration)
        self._configuration = configuration
        self._timeout_seconds = scaled(timeout_seconds)
        self._endpoints: dict[str, Endpoint] = {}
        self._pool = urllib3.PoolManager(
            maxsize=16,
            retries=False,
            ca_certs=configuration.ssl_ca_cert,
            cert_file=configuration.cert_file,
            key_file=configuration.key_file,
            cert_reqs="CERT_REQUIRED" if configuration.verify_ssl else "CERT_NONE",
        )

    def request(
        self,
        method: str,
        path: str,
        body: Resource | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Resource:
        """Send one request and return the parsed answer; raise `ApiError` from 400 up."""
        response = self._pool.request(
            method,
            self._url(path, query),
            body=None if body is None else json.dumps(body),
            headers=self._headers(content_type, accept),
            timeout=self._timeout_seconds,
        )
        answer = _parsed(response.data)
        if response.status >= 400:
            raise ApiError(method, path, response.status, answer)
        return answer

    def is_ready(self) -> bool:
        """Whether the API server says that it serves."""
        try:
            return self._pool.request("GET", self._url("/readyz", None), timeout=2).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def get(self, kind: str, name: str, namespace: str | None = None) -> Resource:
        """Return one object."""
        return self.request("GET", self.endpoint(kind).path(namespace, name))

    def find(self, kind: str, name: str, namespace: str | None = None) -> Resource | None:
        """Return one object, or None where there is none."""
        try:
            return self.get(kind, name, namespace)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def objects(
        self, kind: str, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> list[Resource]:
        """Return the objects of a kind, with `kind` and `apiVersion` filled in, by name."""
        endpoint = self.endpoint(kind)
        selector = ",".join(f"{key}={value}" for key, value in (labels or {}).items())
        query = {"labelSelector": selector} if selector else None
        items: list[Resource] = self.request("GET", endpoint.path(namespace), query=query)["items"]
        filled = [{"apiVersion": endpoint.api_version, "kind": kind, **item} for item in items]
        return sorted(filled, key=lambda item: (item["metadata"].get("namespace", ""), item["metadata"]["name"]))

    def create(self, manifest: Resource, namespace: str | None = None) -> Resource:
        """Create an object."""
        endpoint = self.endpoint(manifest["kind"])
        return self.request("POST", endpoint.path(_namespace_of(manifest, namespace)), manifest)

    def apply(self, manifest: Resource, namespace: str | None = None, *, dry_run: bool = False) -> Resource:
        """Apply an object from the server's side, taking over fields of other managers."""
        path = self.endpoint(manifest["kind"]).path(_namespace_of(manifest, namespace), manifest["metadata"]["name"])
        query = {"fieldManager": "tests", "force": "true", **({"dryRun": "All"} if dry_run else {})}
        return self.request("PATCH", path, manifest, query, content_type=APPLY_PATCH)

    def patch(self, target: Resource, body: Resource, subresource: str = "") -> Resource:
        """Merge a patch into an object; a `metadata.uid` in the body makes it conditional."""
        return self.request("PATCH", self.path_of(target, subresource), body, content_type=MERGE_PATCH)

    def replace(self, target: Resource, subresource: str = "") -> Resource:
        """Write a whole object back; a stale resourceVersion is refused with 409."""
        return self.request("PUT", self.path_of(target, subresource), target)

    def delete(
        self,
        target: Resource,
        *,
        propagation: str = "Background",
        grace_seconds: int | None = None,
        missing_ok: bool = True,
    ) -> None:
        """Delete exactly this object (by UID where known), not another one under its name."""
        options: Resource = {"propagationPolicy": propagation}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        if uid := target["metadata"].get("uid"):
            options["preconditions"] = {"uid": uid}
        try:
            self.request("DELETE", self.path_of(target), options)
        except ApiError as error:
            gone = error.code == 404 or (error.code == 409 and "uid" in error.message.lower())
            if not (missing_ok and gone):
                raise

    def refresh(self, target: Resource) -> Resource | None:
        """Return the present state of an object, or None once it is gone or replaced."""
        present = self.find(target["kind"], target["metadata"]["name"], target["metadata"].get("namespace"))
        if present is None or present["metadata"]["uid"] != target["metadata"]["uid"]:
            return None
        return present

    def path_of(self, target: Resource, subresource: str = "") -> str:
        """Return the URL path of an object."""
        metadata = target["metadata"]
        return self.endpoint(target["kind"]).path(metadata.get("namespace"), metadata["name"], subresource)

    def endpoint(self, kind: str) -> Endpoint:
        """Return where a kind is served, asking the API server about kinds not yet known."""
        if kind not in self._endpoints:
            # Core kinds come last so that a plain `Event` is the core one.
            for root in ("/apis", "/api"):
                groups = self.request("GET", root, accept=_DISCOVERY)["items"]
                self._endpoints.update(_endpoints(groups))
        if kind not in self._endpoints:
            raise LookupError(f"The API server does not serve the kind {kind}: is its CRD installed?")
        return self._endpoints[kind]

    def _url(self, path: str, query: Mapping[str, str] | None) -> str:
        return f"{self._configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")

    def _headers(self, content_type: str, accept: str) -> dict[str, str]:
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": "finetune-tests"}
        token = self._configuration.get_api_key_with_prefix("BearerToken")
        if token:
            headers["Authorization"] = token if token.startswith("Bearer ") else f"Bearer {token}"
        return headers


def _parsed(data: bytes) -> Resource:
    try:
        answer = json.loads(data or b"{}")
    except ValueError:
        return {"message": data.decode(errors="replace")}
    return answer if isinstance(answer, dict) else {"message": str(answer)}


def _endpoints(groups: list[Resource]) -> Iterator[tuple[str, Endpoint]]:
    for group in groups:
        group_name = group.get("metadata", {}).get("name", "")
        # The first version is the preferred one; going backwards lets it win.
        for version in reversed(group.get("versions", [])):
            api_version = f"{group_name}/{version['version']}" if group_name else version["version"]
            for resource in version.get("resources", []):
                kind = resource.get("responseKind", {}).get("kind", "")
                yield kind, Endpoint(api_version, resource["resource"], resource["scope"] == "Namespaced")


def _namespace_of(manifest: Resource, namespace: str | None) -> str | None:
    stated: str | None = manifest["metadata"].get("namespace")
    return stated or namespace
