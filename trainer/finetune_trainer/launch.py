"""The image's entrypoint for stages with several ranks: starts this node's ranks and reports how they ended.

torchrun turns every exit code into 1 and exits 1 on SIGTERM; this wrapper exits with the code of the failure's class
and writes the node's root cause as the termination message. Rendezvous is static: ranks follow from the node's number,
the other nodes wait for a late node 0, and machines without Kubernetes use the same rendezvous.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.cgroup import oom_kills
from finetune_api.files import write_json
from finetune_api.rendezvous import Rendezvous, rendezvous_of
from finetune_api.report import EXIT_CODES, Failure, FailureClass
from finetune_api.runconfig import Attempt
from finetune_trainer.context import RunContext
from finetune_trainer.failures import TrainerError, failure_file, root_cause
from finetune_trainer.termination import read_termination_message, write_termination_message


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
    command, environ = command_of(stage, rendezvous, os.environ, context.attempt)
    kills = oom_kills()
    child = subprocess.Popen(command, env=environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: child.send_signal(received))
    code = child.wait()
    if code == 0:
        return 0
    # On a full volume the ranks leave no files, but each of them still writes the termination message.
    failure = root_cause(_failures(context.logs, ranks)) or read_termination_message()
    failure = failure or _unreported(code, oom_kills() > kills, ranks[0])
    with contextlib.suppress(OSError):
        write_json(failure_file(context.logs, ranks[0]), failure.to_wire())
    write_termination_message(failure)
    return EXIT_CODES[failure.failure_class]


def command_of(
    stage: str, rendezvous: Rendezvous, environ: Mapping[str, str], attempt: Attempt
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of this node's ranks: the rank itself if it is the only one, else torchrun."""
    nodes, node_rank, ranks_per_node = rendezvous.nodes, rendezvous.node_rank, rendezvous.ranks_per_node
    address, port = rendezvous.address, str(rendezvous.port)
    program = ["-m", "finetune_trainer", stage]
    result = _interfaces(rendezvous) | {k: v for k, v in environ.items() if not k.startswith("PET_")}
    result["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(max(10, attempt.grace_seconds - 10))
    if ranks_per_node == 1:
        # torchrun would only import torch a second time; the rank finds its peers by the same variables.
        own = {"RANK": str(node_rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": "1"}
        result |= own | {"MASTER_ADDR": address, "MASTER_PORT": port, "GROUP_RANK": str(node_rank)}
        return [sys.executable, *program], result
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "static", "--max-restarts", "0"]
    torchrun += ["--nnodes", str(nodes), "--node-rank", str(node_rank), "--nproc-per-node", str(ranks_per_node)]
    torchrun += ["--master-addr", address, "--master-port", port]
    torchrun += ["--rdzv-conf", f"timeout={attempt.startup_seconds}"]
    return [*torchrun, *program], result


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
