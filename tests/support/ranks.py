"""Worker processes that play the ranks: started once, from a process that has imported torch and transformers."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.time_limits import scaled

FORK_SERVER_IMPORTS = ["tests.support.fork_server_imports"]

_workers: list[tuple[Any, Connection]] = []
_groups = 0


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 280) -> list[Any]:
    """`function(*arguments)` on every rank of a gloo group; the results by rank.

    `function` must be importable (a test module's own function is). One rank's exception is raised here.
    """
    global _groups
    _groups += 1
    rendezvous = Path(tempfile.gettempdir()) / f"ranks-{os.getpid()}-{_groups}"
    while len(_workers) < world_size:
        _workers.append(_start())
    for rank in range(world_size):
        _workers[rank][1].send((str(rendezvous), rank, world_size, function, arguments))
    results = []
    try:
        for rank in range(world_size):
            if not _workers[rank][1].poll(scaled(timeout)):
                raise TimeoutError(f"rank {rank} of {world_size} did not finish {function.__name__} in {timeout} s")
            ok, value = _workers[rank][1].recv()
            if not ok:
                raise AssertionError(f"rank {rank} of {world_size}: {value}")
            results.append(value)
    except BaseException:
        stop()  # the other ranks may wait for the failed one
        raise
    finally:
        rendezvous.unlink(missing_ok=True)
    return results


def stop() -> None:
    """End the workers; the next call starts new ones."""
    while _workers:
        process, connection = _workers.pop()
        connection.close()
        process.kill()
        process.join()


def _start() -> tuple[Any, Connection]:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(FORK_SERVER_IMPORTS)
    here, there = server.Pipe()
    process = server.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return process, here


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rendezvous, rank, world_size, function, arguments = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
            value: tuple[bool, Any] = (True, function(*arguments))
        except BaseException:
            value = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        connection.send(value)


atexit.register(stop)
