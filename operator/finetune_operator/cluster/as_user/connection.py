"""From a kubeconfig to requests: the only module here that knows the Kubernetes client.

The client is used for what is hard in it (kubeconfig files, their merging, exec plugins, tokens, proxies); requests
are plain paths and dictionaries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config
import urllib3
import yaml

from finetune_api.structure import nearest
from finetune_operator.cluster.as_user.problems import ClusterError, RefusedError, unreachable

Resource = dict[str, Any]
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0
USER_AGENT = "finetune"
_IN_CLUSTER_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Connection:
    """Somebody's access to one cluster."""

    client: Any
    """`kubernetes.client.ApiClient`."""
    namespace: str
    """Where to look when nothing else is said."""

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self.client.configuration.host)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Resource | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Resource:
        """Ask, and return the answer. Raises `RefusedError` from 400 up, `UnreachableError` if nobody answers."""
        headers = {"Accept": accept} | ({"Content-Type": content_type} if body is not None else {})
        with self._open(method, path, query or {}, headers, body, ANSWER_SECONDS) as response:
            answer: Resource = json.loads(response.data or b"{}")
            return answer

    def lines(self, path: str, query: Mapping[str, str], silence_seconds: float | None) -> Iterator[bytes]:
        """Yield the lines of an answer as they come, until it ends or nothing has come for so long (None: forever)."""
        with self._open("GET", path, query, {"Accept": "*/*"}, None, silence_seconds) as response:
            rest = b""
            for chunk in response.stream(amt=None, decode_content=True):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from whole
            if rest:
                yield rest

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        headers: dict[str, str],
        body: Resource | None,
        silence_seconds: float | None,
    ) -> Iterator[urllib3.HTTPResponse]:
        serialized = self.client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers | {"User-Agent": USER_AGENT},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            opened = self.client.call_api(*serialized, _request_timeout=(CONNECT_SECONDS, silence_seconds))
            response: urllib3.HTTPResponse = opened.response
            try:
                if response.status >= 400:
                    raise _refusal(response)
                yield response
            finally:
                response.close()
                response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError, kubernetes.client.ApiException) as error:
            # An ApiException here is the client's own wrapping of a TLS error.
            raise unreachable(self.server, error) from error


def _refusal(response: urllib3.HTTPResponse) -> RefusedError:
    text = response.data.decode(errors="replace")
    try:
        status = json.loads(text)
    except ValueError:
        status = {}
    known = isinstance(status, dict) and status.get("kind") == "Status"
    return RefusedError(response.status, status if known else {}, "" if known else text)


def connect(context: str | None = None, namespace: str | None = None) -> Connection:
    """Access as kubectl would have it: $KUBECONFIG, ~/.kube/config, or the pod's own service account.

    Raises `ClusterError` with a sentence if there is none, or it cannot be read, or has no such context.
    """
    files = _kubeconfig_files()
    if not files:
        return _in_cluster(namespace)
    paths = os.pathsep.join(str(path) for path in files)
    try:
        contexts, active = kubernetes.config.list_kube_config_contexts(config_file=paths)
    except kubernetes.config.ConfigException as error:
        raise ClusterError(f"{paths} cannot be used: {_words(error)}") from error
    except (yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ClusterError(f"{paths} is no kubeconfig: it cannot be read as one.") from error
    chosen = _chosen(context, contexts, active)
    configuration = kubernetes.client.Configuration()
    # An error is told at once; what may be asked again is asked again by whoever knows that it may.
    configuration.retries = False
    try:
        client = kubernetes.config.new_client_from_config(
            config_file=paths, context=chosen["name"], client_configuration=configuration
        )
    except (kubernetes.config.ConfigException, OSError) as error:
        raise ClusterError(f"Context {chosen['name']} of {paths} cannot be used: {_words(error)}") from error
    return Connection(client, namespace or chosen["context"].get("namespace") or "default")


def _kubeconfig_files() -> list[Path]:
    """Those files of $KUBECONFIG, or of the default, that exist. Raises if $KUBECONFIG names none that does."""
    named = os.environ.get("KUBECONFIG", "")
    places = [Path(part).expanduser() for part in (named or "~/.kube/config").split(os.pathsep) if part]
    found = [place for place in places if place.is_file()]
    if named and not found:
        raise ClusterError(f"KUBECONFIG names {named}, and there is no such file.")
    return found


def _chosen(wanted: str | None, contexts: list[Resource], active: Resource) -> Resource:
    if wanted is None:
        return active
    names = [str(context["name"]) for context in contexts]
    for context in contexts:
        if context["name"] == wanted:
            return context
    near = nearest(wanted, names)
    hint = f"did you mean {near}?" if near else f"known: {', '.join(names)}."
    raise ClusterError(f"There is no context {wanted} in the kubeconfig; {hint}")


def _in_cluster(namespace: str | None) -> Connection:
    configuration = kubernetes.client.Configuration()
    configuration.retries = False
    try:
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    except kubernetes.config.ConfigException as error:
        raise ClusterError(
            "There is no kubeconfig: ~/.kube/config does not exist and KUBECONFIG is not set."
        ) from error
    own = _IN_CLUSTER_NAMESPACE.read_text().strip() if _IN_CLUSTER_NAMESPACE.is_file() else "default"
    return Connection(kubernetes.client.ApiClient(configuration), namespace or own)


def _words(error: BaseException) -> str:
    text = str(error).removeprefix("Invalid kube-config file. ").strip()
    return text if text.endswith(".") else f"{text}."
