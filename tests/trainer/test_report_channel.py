"""The report's way to the cluster: a patch now and then, and at once what the history of attempts tells."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.reporter import PATCH_SECONDS, ConfigMapChannel

Patches = queue.Queue[dict[str, Any]]


@pytest.fixture
def patches() -> Patches:
    """Reports in the order of their arrival."""
    return queue.Queue()


@pytest.fixture
def channel(patches: Patches, tmp_path: Path) -> Iterator[ConfigMapChannel]:
    """A channel to a server on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_PATCH(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            patches.put(json.loads(body["data"]["train"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    (tmp_path / "token").write_text("secret")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield ConfigMapChannel(f"http://127.0.0.1:{server.server_port}/map", "train", tmp_path / "token", None)
        server.shutdown()


def test_where_an_attempt_goes_on_is_told_at_once_and_what_moves_all_the_time_is_not(
    channel: ConfigMapChannel, patches: Patches
) -> None:
    soon = PATCH_SECONDS / 3
    channel.offer({"activity": "loading the model"})
    assert patches.get(timeout=soon) == {"activity": "loading the model"}
    channel.offer({"activity": "training", "resumedFromStep": 7})
    assert patches.get(timeout=soon)["resumedFromStep"] == 7
    channel.offer({"activity": "training", "resumedFromStep": 7, "step": 8})
    with pytest.raises(queue.Empty):
        patches.get(timeout=0.3)
    channel.offer({"activity": "done", "resumedFromStep": 7, "done": True})
    assert patches.get(timeout=soon)["done"]
