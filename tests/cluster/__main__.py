"""`python -m tests.cluster up|down|status`."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.integration.harness.api import Api
from tests.integration.harness.control_plane import KUBECONFIG_VARIABLE

from . import leftovers, machine
from .images import Images
from .places import Places

ROOT = Path(__file__).parents[2]
UP_SECONDS = 40 * 60
"""On two cores with nothing cached: the programs take some 20 minutes, the images 8."""
_POLL_SECONDS, _DOWN_SECONDS = 0.2, 180


def up(places: Places, owner: int | None = None, seconds: float = UP_SECONDS) -> str:
    """Start the cluster, or bring a running one the images of this checkout; returns when pods can be run.

    A cluster that is started ends with the process `owner`. Raises SystemExit with a sentence if there can be none.
    """
    begun = time.monotonic()
    if running(places):
        Images(places).bring()
    else:
        lacking = machine.lacks(places.cache)
        if lacking:
            raise SystemExit(lacking)
        _start_supervisor(places, owner, begun + seconds)
    print(f"the cluster was up after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return str(places.kubeconfig)


def down(places: Places, *, purge: bool = False) -> None:
    """Stop the cluster and remove what it left; `purge` forgets the images too."""
    _end_supervisor(places)
    if places.state.exists():
        leftovers.remove(places)
    if purge:
        for folder in (places.state, places.cache):
            shutil.rmtree(folder, ignore_errors=True)


def running(places: Places) -> bool:
    """Whether pods can be run."""
    return _supervisor(places) is not None and places.ready_file.exists()


def _supervisor(places: Places) -> int | None:
    try:
        pid = int(places.pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"tests.cluster.supervisor" in words else None


def _end_supervisor(places: Places) -> None:
    """Let it clean up; one that does not come to an end is killed, and its programs die with it."""
    deadline = time.monotonic() + _DOWN_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        pid = _supervisor(places)
        if pid is None:
            return
        os.kill(pid, number)
        while _supervisor(places) is not None and (number == signal.SIGKILL or time.monotonic() < deadline):
            time.sleep(_POLL_SECONDS)


def _start_supervisor(places: Places, owner: int | None, deadline: float) -> None:
    for folder in (places.state, places.cache):
        folder.mkdir(parents=True, exist_ok=True)
    places.state.chmod(0o711)  # pods look through it at their volumes
    log = places.state / "supervisor.log"
    started = None
    if _supervisor(places) is None:
        places.ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.cluster.supervisor", str(places.state), str(places.cache)]
        command += [str(owner)] if owner is not None else []
        with log.open("wb") as output:
            started = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
    said = 0
    while not running(places):
        text = log.read_text(errors="replace")
        print(text[said:], end="", file=sys.stderr, flush=True)
        said = len(text)
        if _supervisor(places) is None and (started is None or started.poll() is not None):
            last = " ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
            raise SystemExit(f"The cluster did not start: {last} (What its programs said is in {places.state}.)")
        if time.monotonic() > deadline:
            down(places)
            raise SystemExit("The cluster was not up in time: programs or images take too long to build here.")
        time.sleep(_POLL_SECONDS)


def status(places: Places) -> int:
    """Say whether the cluster runs and what runs on it."""
    if not running(places):
        print("no cluster is running")
        return 1
    pods = Api(places.kubeconfig).objects("Pod")
    print(f"running since {time.ctime(places.ready_file.stat().st_mtime)}, {len(pods)} pods")
    print(f"export {KUBECONFIG_VARIABLE}={places.kubeconfig}")
    return 0


def main() -> int:
    """One command for each thing."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="A cluster of one real node.")
    parser.add_argument("command", choices=("up", "down", "status"))
    parser.add_argument("--purge", action="store_true", help="with down: forget images and caches too")
    given = parser.parse_args()
    places = Places.default()
    if given.command == "up":
        print(f"export {KUBECONFIG_VARIABLE}={up(places)}")
    elif given.command == "down":
        down(places, purge=given.purge)
    else:
        return status(places)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
