"""From a kubeconfig or a service account to a client of the API server: one way for the operator and the commands.

The client is used for what is hard in it: kubeconfig files and their merging, exec plugins, tokens, certificates and
proxies. Its synchronous loader is used because only that one refreshes tokens and lets exec plugins ask the user.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import kubernetes.config
import yaml
from kubernetes.aio.client import ApiClient, Configuration

from finetune_api.structure import nearest
from finetune_operator.errors import EXIT_FAILED, UserError

_IN_CLUSTER_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class AccessError(UserError):
    """There is no usable way to a cluster."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, EXIT_FAILED)


@dataclass(frozen=True)
class Access:
    """Access to one cluster."""

    client: ApiClient
    namespace: str
    """The default namespace."""


@asynccontextmanager
async def connect(context: str | None = None, user_agent: str = "finetune") -> AsyncIterator[Access]:
    """Access as kubectl would have it: $KUBECONFIG, ~/.kube/config, or the pod's own service account.

    Raises `AccessError` with a sentence if there is none, or it cannot be read, or has no such context.
    """
    configuration = Configuration()
    files = _kubeconfig_files()
    namespace = _load_kubeconfig(configuration, files, context) if files else _load_service_account(configuration)
    # No limit: each watch holds a connection, and requests are as many as workers.
    configuration.connection_pool_maxsize = 0
    # With it, aiohttp asks a thread for the proxy and for ~/.netrc at every request.
    configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
    async with ApiClient(configuration) as client:
        client.user_agent = user_agent
        yield Access(client, namespace)


def _load_kubeconfig(configuration: Configuration, files: list[Path], context: str | None) -> str:
    """Read kubeconfig files into the client's configuration; returns the context's namespace."""
    paths = os.pathsep.join(str(path) for path in files)
    try:
        contexts, active = kubernetes.config.list_kube_config_contexts(config_file=paths)
    except kubernetes.config.ConfigException as error:
        raise AccessError(f"{paths} cannot be used: {_reason(error)}") from error
    except (yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise AccessError(f"{paths} is not a valid kubeconfig.") from error
    chosen = active if context is None else _context_named(context, contexts)
    try:
        kubernetes.config.load_kube_config(paths, chosen["name"], configuration)
    except (kubernetes.config.ConfigException, OSError) as error:
        raise AccessError(f"Context {chosen['name']} of {paths} cannot be used: {_reason(error)}") from error
    return str(chosen["context"].get("namespace") or "default")


def _kubeconfig_files() -> list[Path]:
    """Those files of $KUBECONFIG, or of the default, that exist. Raises if $KUBECONFIG names none that does."""
    named = os.environ.get("KUBECONFIG", "")
    paths = [Path(part).expanduser() for part in (named or "~/.kube/config").split(os.pathsep) if part]
    files = [path for path in paths if path.is_file()]
    if named and not files:
        raise AccessError(f"KUBECONFIG is {named}, but that file does not exist.")
    return files


def _context_named(name: str, contexts: list[dict[str, Any]]) -> dict[str, Any]:
    names = [str(context["name"]) for context in contexts]
    if name in names:
        return contexts[names.index(name)]
    near = nearest(name, names)
    hint = f"did you mean {near}?" if near else f"known contexts: {', '.join(names)}."
    raise AccessError(f"There is no context {name} in the kubeconfig; {hint}")


def _load_service_account(configuration: Configuration) -> str:
    """Read the pod's service account into the client's configuration; returns the pod's namespace."""
    try:
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    except kubernetes.config.ConfigException as error:
        raise AccessError("No kubeconfig found: ~/.kube/config does not exist and KUBECONFIG is not set.") from error
    return _IN_CLUSTER_NAMESPACE.read_text().strip() if _IN_CLUSTER_NAMESPACE.is_file() else "default"


def _reason(error: BaseException) -> str:
    text = str(error).removeprefix("Invalid kube-config file. ").strip()
    return text if text.endswith(".") else f"{text}."
