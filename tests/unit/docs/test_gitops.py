"""The health scripts of docs/gitops.md, run as Argo CD and Flux run them, over every state that the operator writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import celpy.adapter
import pytest
import yaml
from lupa.lua51 import LuaRuntime
from tests.unit.finetune_operator.decision.world import World, job, steps

from finetune_api.base import Stage
from finetune_operator.decision.model import Missing

PAGE = Path(__file__).parents[3] / "docs" / "gitops.md"
Resource = dict[str, Any]


def gate_refused() -> World:
    world = job()
    world.gate_passes = False
    return world.complete()


def without_secret() -> World:
    world = job()
    world.missing["hub"] = Missing("Secret", "hf-read", "Secret hf-read is missing.")
    return world.settled()


def queued() -> World:
    return (
        job()
        .training()
        .with_pod_failed("crash")
        .all_ended()
        .settled()
        .gone()
        .later(3600)
        .settled()
        .change(queued=True)
        .settled()
    )


def backing_off() -> World:
    return job().training().with_pod_failed("crash").all_ended().settled().gone().settled()


def suspending() -> World:
    return job().training().suspended().settled()


def resumed() -> World:
    return job().training().suspended().settled().gone().settled().suspended(False).settled()


def new() -> World:
    return job()


def changed_behind_the_operators_back() -> World:
    return job().complete().with_spec(lambda wire: wire.update(suspend=True))


STATES: list[tuple[Callable[[], World], str, str]] = [
    (new, "Progressing", "InProgress"),
    (lambda: job().preparing(), "Progressing", "InProgress"),
    (lambda: job().training(), "Progressing", "InProgress"),
    (lambda: job().evaluating(), "Progressing", "InProgress"),
    (lambda: job().publishing(), "Progressing", "InProgress"),
    (queued, "Progressing", "InProgress"),
    (backing_off, "Progressing", "InProgress"),
    (without_secret, "Progressing", "InProgress"),
    (suspending, "Progressing", "InProgress"),
    (lambda: suspending().gone().settled(), "Suspended", "Current"),
    (resumed, "Progressing", "InProgress"),
    (lambda: job().complete(), "Healthy", "Current"),
    (lambda: job(publish=None).complete(), "Healthy", "Current"),
    (lambda: job().training().failed_for_good("bad-data"), "Degraded", "Failed"),
    (lambda: job().training().failed_for_good("bad-data").retried("2").settled(), "Progressing", "InProgress"),
    (gate_refused, "Degraded", "Failed"),
    (changed_behind_the_operators_back, "Progressing", "InProgress"),
]


def resource(world: World) -> Resource:
    """The resource as an API server would return it; the status of a new one is absent."""
    status = world.status.to_wire() if world.status.conditions else None
    made: Resource = {"metadata": {"name": "support", "generation": world.generation}, "spec": world.spec.to_wire()}
    return made if status is None else {**made, "status": status}


@cache
def blocks() -> list[Resource]:
    text = PAGE.read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def argo_health(made: Resource) -> tuple[str, str]:
    """What Argo CD makes of it: the script sees the resource as `obj` and returns status and message."""
    (script,) = [block["data"].values() for block in blocks() if "data" in block]
    (source,) = script
    lua = LuaRuntime(register_eval=False, register_builtins=False)
    lua.globals().obj = lua.table_from(made, recursive=True)
    result = lua.execute(source)
    return str(result.status), str(result.message)


def flux_status(made: Resource) -> str:
    """What Flux makes of it: a stale generation is in progress; then inProgress, failed, current; else in progress."""
    (kustomization,) = [block for block in blocks() if block.get("kind") == "Kustomization"]
    (expressions,) = kustomization["spec"]["healthCheckExprs"]
    observed = made.get("status", {}).get("observedGeneration")
    if observed is not None and observed != made["metadata"]["generation"]:
        return "InProgress"
    environment = celpy.Environment()
    context = {name: celpy.adapter.json_to_cel(value) for name, value in made.items()}
    for name, status in (("inProgress", "InProgress"), ("failed", "Failed"), ("current", "Current")):
        if name in expressions:
            program = environment.program(environment.compile(expressions[name]))
            try:
                if program.evaluate(context):
                    return status
            except celpy.CELEvalError:
                return "InProgress"  # Flux: unknown, looked at again
    return "InProgress"


@pytest.mark.parametrize(("make", "argo", "flux"), STATES)
def test_every_state_of_a_job_has_the_health_that_the_page_promises(
    make: Callable[[], World], argo: str, flux: str
) -> None:
    made = resource(make())
    assert argo_health(made)[0] == argo
    assert flux_status(made) == flux


def test_the_states_are_the_ones_they_are_called() -> None:
    def phase(world: World) -> str:
        return str(world.status.phase)

    assert [phase(make()) for make in (queued, backing_off, without_secret, suspending, resumed)] == [
        "Queued",
        "BackingOff",
        "Waiting",
        "Suspending",
        "Training",
    ]
    assert gate_refused().reason == "GateRefused"


def test_argo_cd_shows_the_reason_and_the_progress() -> None:
    world = job().training()
    world.says(progress=steps(120)).settled()
    status, message = argo_health(resource(world))
    assert status == "Progressing"
    assert "120/450" in message
    failed = job().training().failed_for_good("bad-data", rank=2)
    assert "rank 2: bad-data" in argo_health(resource(failed))[1]
    assert failed.attempt(Stage.TRAIN, 1).outcome == "failed"
