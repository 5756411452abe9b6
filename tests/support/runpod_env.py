"""Machines as they are rented without Kubernetes: the variables that RunPod sets."""

from __future__ import annotations


def runpod_variables(index: int, count: int, port: int, primary: str = "127.0.0.1", own: str = "") -> dict[str, str]:
    """What an Instant Cluster sets on machine `index` of `count`, with one process per machine."""
    return {
        "PRIMARY_ADDR": primary,
        "MASTER_ADDR": primary,
        "PRIMARY_PORT": str(port),
        "MASTER_PORT": str(port),
        "NODE_ADDR": own or primary,
        "NODE_RANK": str(index),
        "NUM_NODES": str(count),
        "NUM_TRAINERS": "1",
        "HOST_NODE_ADDR": f"{primary}:{port}",
        "WORLD_SIZE": str(count),
    }
