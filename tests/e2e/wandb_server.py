"""A server that speaks W&B's protocol: openwandb, installed into a folder of its own.

Its licence (CC-BY-NC) keeps it out of the project's dependencies: only this test runs it.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import urllib3
from tests.integration.harness import binaries
from tests.integration.harness.processes import Process, free_ports, wait_until

VERSION = "0.5.25"
API_KEY = "local" + 40 * "0"
_RUN = """query Run($entity: String!, $project: String!, $run: String!) {
  project(name: $project, entityName: $entity) { run(name: $run) { displayName state summaryMetrics } }
}"""


class UnavailableError(RuntimeError):
    """The server cannot be installed here; the message says why."""


def install() -> Path:
    """The program, installed once beside the built ones. Raises UnavailableError where no index is reached."""
    folder = binaries.cache_folder().parent / f"openwandb-{VERSION}"
    program = folder / "bin" / "openwandb"
    if not program.exists():
        uv = Path(sys.executable).parent / "uv"
        for words in (
            ["venv", "--quiet", "--clear", "--python", sys.executable, folder],
            ["pip", "install", "--quiet", "--python", folder / "bin" / "python", f"openwandb=={VERSION}"],
        ):
            done = subprocess.run([uv, *words], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
                raise UnavailableError(f"openwandb, the server that speaks W&B's protocol, cannot be installed: {last}")
    return program


class WandbServer:
    """The server and what it was sent."""

    def __init__(self, folder: Path, address: str) -> None:
        (port,) = free_ports(1)
        self.url = f"http://{address}:{port}"
        self._data = folder / "data"
        words = ["serve", "--host", address, "--port", str(port), "--data-dir", str(self._data)]
        self._process = Process("openwandb", [install(), *words], folder / "openwandb.log")

    def __enter__(self) -> WandbServer:
        self._process.start()

        def answers() -> bool:
            self._process.check()
            try:
                return bool(urllib3.request("GET", self.url, timeout=2, retries=False).status)
            except urllib3.exceptions.HTTPError:
                return False

        wait_until(answers, "the W&B server to answer")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def run(self, entity: str, project: str, run: str) -> dict[str, Any]:
        """Name, state and summary of a run, as the server shows them."""
        secret = base64.b64encode(f"api:{API_KEY}".encode()).decode()
        names = {"entity": entity, "project": project, "run": run}
        asked = {"operationName": "Run", "query": _RUN, "variables": names}
        answer = urllib3.request(
            "POST", f"{self.url}/graphql", json=asked, headers={"Authorization": f"Basic {secret}"}, timeout=30
        )
        found: dict[str, Any] = answer.json()["data"]["project"]["run"]
        return found | {"summaryMetrics": json.loads(found["summaryMetrics"])}

    def history(self, entity: str, project: str, run: str) -> list[dict[str, Any]]:
        """The rows of a run's curves."""
        file = self._data / "files" / entity / project / run / "wandb-history.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]
