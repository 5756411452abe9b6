"""What a cluster answers when something is wrong, as one sentence: what, where, what to do. Pure.

The API server says most of it in the `Status` object that it answers with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from finetune_api.base import KIND, PLURAL
from finetune_operator.cluster.api import ApiError
from finetune_operator.errors import EXIT_FAILED, UserError

INSTALL = "ask for the chart finetune-operator to be installed, or `finetune crd | kubectl apply --server-side -f -`"


class ClusterError(UserError):
    """The cluster refused, or could not be reached."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, EXIT_FAILED)


@contextmanager
def explained(server: str) -> Iterator[None]:
    """Raises ClusterError, with a sentence, for an ApiError of the API server at that URL."""
    try:
        yield
    except ApiError as error:
        sentence = refusal(error) if error.code else unreachable(server, error.__cause__ or error)
        raise ClusterError(sentence) from error


def refusal(error: ApiError) -> str:
    """The sentence for an answer of the API server."""
    message = error.message
    match error.code:
        case 401:
            return "The cluster does not accept your credentials: log in again, or choose another --context."
        case 403:
            return f"The cluster forbids it: {message.split('is forbidden: ', 1)[-1].rstrip('.')}."
        case 404:
            return _not_found(error)
        case 409:
            return f"It was changed by someone else at the same moment: {message}. Try again."
        case 422:
            return _invalid(error)
        case 429 | 500 | 502 | 503 | 504:
            return f"The cluster could not answer ({error.code}): {message.rstrip('.')}. Try again."
    return f"The cluster refused ({error.code}): {message.rstrip('.')}."


def _not_found(error: ApiError) -> str:
    name, kind = error.details.get("name"), error.details.get("kind")
    if kind == "namespaces":
        return f"There is no namespace {name}."
    if name:
        thing = KIND if kind == PLURAL else str(kind or "object").removesuffix("s")
        return f"There is no {thing} {name}."
    return f"This cluster does not know {KIND}s: {INSTALL}."


def _invalid(error: ApiError) -> str:
    causes = error.details.get("causes") or []
    lines = [f"{cause.get('field', '')}: {_cause(str(cause.get('message', '')))}" for cause in causes]
    # CEL rules that could not run because of another fault are listed too, and say nothing by themselves.
    lines = [line for line in dict.fromkeys(lines) if "some validation rules were not checked" not in line]
    return "; ".join(lines) + "." if lines else f"{error.message}."


def _cause(message: str) -> str:
    """Without the value, which may be a whole object: `Invalid value: "object": sentence` is `sentence`."""
    short = re.sub(r'^(Invalid value|Forbidden|Required value): ?("?(object|array)"?: )?', "", message, flags=re.DOTALL)
    return (short or message).rstrip(".")


def unreachable(server: str, error: BaseException) -> str:
    """The sentence for a connection that could not be made, or broke."""
    # aiohttp's own words hide those of the operating system.
    number = getattr(error, "errno", None)
    text = f"{error!r} {error} {os.strerror(number) if isinstance(number, int) and number > 0 else ''}"
    for mark, reason in (
        ("Connection refused", "the connection is refused; is it running, and is it the right --context?"),
        ("Name or service not known", "its name cannot be resolved; are you in the right network?"),
        ("Temporary failure in name resolution", "its name cannot be resolved; are you in the right network?"),
        ("nodename nor servname", "its name cannot be resolved; are you in the right network?"),
        ("DNSError", "its name cannot be resolved; are you in the right network?"),
        ("No route to host", "there is no route to it; are you in the right network?"),
        ("Network is unreachable", "there is no network."),
        ("CERTIFICATE_VERIFY_FAILED", "the kubeconfig does not trust its certificate."),
        ("WRONG_VERSION_NUMBER", "it does not use TLS, but the kubeconfig says https."),
        ("imeout", "it does not answer; are you in the right network?"),
        ("Disconnected", "it closed the connection."),
        ("ClientPayloadError", "it closed the connection."),
        ("Connection reset", "it closed the connection."),
    ):
        if mark in text:
            return f"The cluster at {server} cannot be reached: {reason}"
    return f"The cluster at {server} cannot be reached: {type(error).__name__}."
