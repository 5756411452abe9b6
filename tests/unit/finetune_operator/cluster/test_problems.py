"""Answers of an API server, as recorded, and the sentence that each becomes."""

from __future__ import annotations

import json
import socket
import ssl
from typing import Any

import aiohttp
import pytest

from finetune_operator.cluster.api import ApiError, _error
from finetune_operator.cluster.as_user.problems import ClusterError, explained, unreachable


def status(message: str, **details: Any) -> str:
    return json.dumps({"kind": "Status", "message": message, "details": details})


ANSWERS: list[tuple[int, str, str]] = [
    (401, status("Unauthorized"), "The cluster does not accept your credentials: log in again"),
    (
        403,
        status('finetunejobs.finetune.dev is forbidden: User "eve" cannot list resource "finetunejobs"'),
        'The cluster forbids it: User "eve" cannot list resource "finetunejobs".',
    ),
    (403, "denied by the proxy\n", "The cluster forbids it: denied by the proxy."),
    (404, "404 page not found\n", "This cluster does not know FineTuneJobs: ask for the chart"),
    (404, status("…", name="a", kind="finetunejobs"), "There is no FineTuneJob a."),
    (404, status("…", name="ml", kind="namespaces"), "There is no namespace ml."),
    (404, status("…", name="a-0", kind="pods"), "There is no pod a-0."),
    (409, status("the object has been modified"), "It was changed by someone else at the same moment: the object"),
    (
        422,
        status(
            "…",
            causes=[
                {"field": "spec.tuning", "message": 'Invalid value: "object": tuning cannot change once it exists'},
                {"field": "spec.epochs", "message": "Invalid value: 0: spec.epochs should be greater than 0"},
                {"field": "<nil>", "message": 'Invalid value: "null": some validation rules were not checked because'},
            ],
        ),
        "spec.tuning: tuning cannot change once it exists; spec.epochs: 0: spec.epochs should be greater than 0.",
    ),
    (422, status("FineTuneJob is invalid"), "FineTuneJob is invalid."),
    (400, status('unknown field "spec.x"'), 'The cluster refused (400): unknown field "spec.x".'),
    (503, "<html>upstream is down</html>", "The cluster could not answer (503): <html>upstream is down</html>."),
]


@pytest.mark.parametrize(("code", "body", "sentence"), ANSWERS)
def test_an_answer_becomes_one_sentence(code: int, body: str, sentence: str) -> None:
    with pytest.raises(ClusterError) as said, explained("https://api.example"):
        raise _error(code, body.encode(), None)
    assert said.value.sentence.startswith(sentence)
    assert said.value.exit_code == 1
    assert "\n" not in said.value.sentence


def test_only_some_answers_are_worth_asking_again_for() -> None:
    assert [ApiError(code, "", "").transient for code in (0, 429, 500, 503)] == [True] * 4
    assert [ApiError(code, "", "").transient for code in (401, 403, 404, 409, 410, 422)] == [False] * 6


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('10.0.0.1', 6443)"), "the connection is refused"),
        (socket.gaierror(-2, "Name or service not known"), "its name cannot be resolved"),
        (OSError(113, "Connect call failed"), "there is no route to it"),
        (ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED]"), "does not trust its certificate"),
        (aiohttp.SocketTimeoutError("Timeout on reading data from socket"), "it does not answer"),
        (TimeoutError(), "it does not answer"),
        (aiohttp.ServerDisconnectedError(), "it closed the connection"),
        (aiohttp.ClientPayloadError(), "it closed the connection"),
        (OSError("something new"), "OSError"),
    ],
)
def test_a_connection_that_does_not_come_about_is_said_with_its_address(error: OSError, sentence: str) -> None:
    said = unreachable("https://api.example:6443", error)
    assert said.startswith("The cluster at https://api.example:6443 cannot be reached: ")
    assert sentence in said
