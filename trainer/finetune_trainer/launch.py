"""The image's entrypoint for stages with several ranks: starts this node's ranks and reports how they ended.

torchrun turns every exit code into 1, exits 1 on SIGTERM, and serves its store on all addresses of the machine; this
launcher exits with the code of the failure's class and writes the node's root cause as the termination message.
Rendezvous is static: ranks follow from the node's number, the other nodes wait for a late node 0, and machines without
Kubernetes use the same rendezvous.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.cgroup import oom_kills
from finetune_api.files import write_json
from finetune_api.rendezvous import Rendezvous, rendezvous_of
from finetune_api.report import EXIT_CODES, Failure, FailureClass
from finetune_trainer.context import RunContext
from finetune_trainer.failures import TrainerError, failure_file, root_cause
from finetune_trainer.termination import read_termination_message, write_termination_message

POLL_SECONDS = 0.1


def launch(context: RunContext, stage: str) -> int:
    """Run `stage` on every rank of this node; returns the exit code of the failure's class.

    Raises TrainerError (bad-spec) if the rendezvous variables are invalid.
    """
    try:
        rendezvous = rendezvous_of(os.environ)
    except ValueError as error:
        raise TrainerError(FailureClass.BAD_SPEC, str(error)) from error
    ranks = rendezvous.ranks
    with contextlib.suppress(OSError):
        for rank in ranks:
            failure_file(context.logs, rank).unlink(missing_ok=True)
    kills = oom_kills()
    command = [sys.executable, "-m", "finetune_trainer", stage]
    children = [subprocess.Popen(command, env=rank_environment(rendezvous, os.environ, rank)) for rank in ranks]
    code = wait_for_ranks(children, max(10, context.attempt.grace_seconds - 10))
    if code == 0:
        return 0
    # On a full volume the ranks leave no files, but each of them still writes the termination message.
    failure = root_cause(_failures(context.logs, ranks)) or read_termination_message()
    failure = failure or _unreported(code, oom_kills() > kills, ranks[0])
    with contextlib.suppress(OSError):
        write_json(failure_file(context.logs, ranks[0]), failure.to_wire())
    write_termination_message(failure)
    return EXIT_CODES[failure.failure_class]


def wait_for_ranks(children: list[subprocess.Popen[bytes]], shutdown_seconds: float) -> int:
    """Wait for all ranks, and pass signals on to them; returns the exit code of the first that failed, or 0.

    If one fails, the others get SIGTERM, and SIGKILL after `shutdown_seconds`.
    """

    def send(number: int) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: send(received))
    failed, deadline = 0, math.inf
    while True:
        codes = [child.poll() for child in children]
        if None not in codes:
            return failed or next((code for code in codes if code), 0)
        if not failed and (failed := next((code for code in codes if code), 0)):
            send(signal.SIGTERM)
            deadline = time.monotonic() + shutdown_seconds
        elif time.monotonic() > deadline:
            send(signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def rank_environment(rendezvous: Rendezvous, environ: Mapping[str, str], rank: int) -> dict[str, str]:
    """The environment of one rank of this node: the variables by which torchrun's ranks find their peers."""
    ranks = rendezvous.ranks
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - ranks.start),
        "WORLD_SIZE": str(rendezvous.nodes * len(ranks)),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
        "GROUP_RANK": str(rendezvous.node_rank),
        "MASTER_ADDR": rendezvous.address if rendezvous.nodes > 1 else Rendezvous.address,
        "MASTER_PORT": str(rendezvous.port),
    }
    defaults = _interfaces(rendezvous) | ({"OMP_NUM_THREADS": "1"} if len(ranks) > 1 else {})
    return defaults | {name: value for name, value in environ.items() if not name.startswith("PET_")} | own


def _interfaces(rendezvous: Rendezvous) -> dict[str, str]:
    """The interface that gloo and NCCL use, if the machine's address is given: rented machines have several."""
    name = interface_of(rendezvous.node_address) if rendezvous.node_address else ""
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name} if name else {}


def interface_of(address: str) -> str:
    """Name of this machine's interface that has the IPv4 address; empty if none has."""
    siocgifaddr = 0x8915  # linux/sockios.h; the address is at byte 20 of a struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def _failures(logs: Path, ranks: range) -> list[Failure]:
    files = (failure_file(logs, rank) for rank in ranks)
    return [Failure.model_validate_json(file.read_text()) for file in files if file.exists()]


def _unreported(code: int, out_of_memory: bool, rank: int) -> Failure:
    """The failure of a rank that left no report: it was killed, or ended before it could write one."""
    if out_of_memory:
        failure_class = FailureClass.HOST_OOM
        sentence = "A rank was killed at the container's memory limit. Raise podTemplate.resources.limits.memory."
    else:
        failure_class = FailureClass.CRASH
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        sentence = f"The trainer {how} without an error report; see the log of rank {rank}."
    return Failure(failure_class=failure_class, sentence=sentence, rank=rank, time=datetime.now(UTC))
