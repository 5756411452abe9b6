"""What a cluster answers when something is wrong, as one sentence: what, where, what to do. Pure.

The API server says most of it in the `Status` object that it answers with.
"""

from __future__ import annotations

import re
from typing import Any

from finetune_api.base import KIND, PLURAL
from finetune_operator.errors import EXIT_FAILED, UserError

INSTALL = "ask for the chart finetune-operator to be installed, or `finetune crd | kubectl apply --server-side -f -`"


class ClusterError(UserError):
    """The cluster refused, or could not be asked."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, EXIT_FAILED)


class UnreachableError(ClusterError):
    """Nobody answered; asking again may help."""


class RefusedError(ClusterError):
    """The API server answered with an error: a Kubernetes Status, or any text."""

    def __init__(self, code: int, status: dict[str, Any], body: str = "") -> None:
        super().__init__(sentence_of(code, status, body))
        self.code = code
        self.status = status

    @property
    def kind_unknown(self) -> bool:
        """Whether the cluster does not know the kind at all."""
        return self.code == 404 and not self.status.get("details", {}).get("name")

    @property
    def transient(self) -> bool:
        """Whether asking again may help."""
        return self.code in (429, 500, 502, 503, 504)


def sentence_of(code: int, status: dict[str, Any], body: str = "") -> str:
    """The sentence for an answer of the API server."""
    message = str(status.get("message") or body.strip()[:300])
    match code:
        case 401:
            return "The cluster does not accept your credentials: log in again, or choose another --context."
        case 403:
            return f"The cluster forbids it: {_after(message, 'is forbidden: ')}."
        case 404:
            return _not_found(status, message)
        case 409:
            return f"Somebody else changed it at the same moment: {message}. Try again."
        case 422:
            return _invalid(status, message)
        case 429 | 500 | 502 | 503 | 504:
            return f"The cluster could not answer ({code}): {message.rstrip('.')}. Try again."
    return f"The cluster refused ({code}): {message.rstrip('.')}."


def _not_found(status: dict[str, Any], message: str) -> str:
    details = status.get("details") or {}
    name, kind = details.get("name"), details.get("kind")
    if kind == "namespaces":
        return f"There is no namespace {name}."
    if name:
        thing = KIND if kind == PLURAL else str(kind or "object").removesuffix("s")
        return f"There is no {thing} {name}."
    return f"This cluster does not know {KIND}s: {INSTALL}."


def _invalid(status: dict[str, Any], message: str) -> str:
    causes = (status.get("details") or {}).get("causes") or []
    told = [f"{cause.get('field', '')}: {_cause(str(cause.get('message', '')))}" for cause in causes]
    # CEL rules that could not run because of another fault are told too, and say nothing by themselves.
    told = [line for line in dict.fromkeys(told) if "some validation rules were not checked" not in line]
    return "; ".join(told) + "." if told else f"{message}."


def _cause(message: str) -> str:
    """Without the value, which may be a whole object: `Invalid value: "object": sentence` is `sentence`."""
    short = re.sub(r'^(Invalid value|Forbidden|Required value): ?("?(object|array)"?: )?', "", message, flags=re.DOTALL)
    return (short or message).rstrip(".")


def _after(message: str, mark: str) -> str:
    return (message.partition(mark)[2] or message).rstrip(".")


def unreachable(server: str, error: BaseException) -> UnreachableError:
    """The sentence for a connection that did not come about, or broke."""
    text = str(error)
    for mark, reason in (
        ("Connection refused", "the connection is refused; is it running, and is it the right --context?"),
        ("Name or service not known", "its name is not known; are you in the right network?"),
        ("Temporary failure in name resolution", "its name cannot be looked up; are you in the right network?"),
        ("nodename nor servname", "its name is not known; are you in the right network?"),
        ("No route to host", "there is no route to it; are you in the right network?"),
        ("Network is unreachable", "there is no network."),
        ("CERTIFICATE_VERIFY_FAILED", "its certificate is not the one that the kubeconfig trusts."),
        ("WRONG_VERSION_NUMBER", "it does not speak TLS; the kubeconfig says https."),
        ("timed out", "it does not answer; are you in the right network?"),
        ("EOF", "it broke the connection off."),
        ("Connection aborted", "it broke the connection off."),
        ("Connection broken", "it broke the connection off."),
    ):
        if mark in text:
            return UnreachableError(f"The cluster at {server} cannot be reached: {reason}")
    return UnreachableError(f"The cluster at {server} cannot be reached: {type(error).__name__}.")
