"""A real API server accepts the CRD, and refuses the same jobs with the same sentences as `finetune validate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.jobs import BROKEN, CHANGES_ALLOWED, Broken, job, manifest

from finetune_api.cel import violations
from finetune_api.crd import definition
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validate import check

from .harness.api import Api, ApiError, Resource
from .harness.control_plane import ControlPlane

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def api(control_plane: ControlPlane) -> Iterator[Api]:
    """An API server that serves FineTuneJobs."""
    control_plane.install_crds(definition())
    return control_plane.api


def _refusal(send: Callable[[Resource, str], Resource], resource: Resource, namespace: str) -> str:
    with pytest.raises(ApiError) as refused:
        send(resource, namespace)
    assert refused.value.code == 422, refused.value.message
    return refused.value.message


def _changed(stored: Resource, changes: dict[str, Any]) -> Resource:
    return stored | {"spec": manifest(changes)["spec"]}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.path}: {broken.says}")
def test_a_broken_rule_is_refused_with_the_sentence_of_validate(api: Api, namespace: str, broken: Broken) -> None:
    before = None if broken.before is None else job(broken.before)
    [expected] = [found.rule for found in violations(job(broken.changes), before)]
    if before is None:
        message = _refusal(api.create, manifest(broken.changes), namespace)
    else:
        stored = api.create(manifest(broken.before), namespace)
        message = _refusal(lambda changed, _: api.replace(changed), _changed(stored, broken.changes), namespace)
    assert expected.message in message
    if not broken.path.startswith("metadata"):
        assert f"{broken.path}: " in message


@pytest.mark.parametrize("broken", [item for item in BROKEN if item.valid], ids=lambda broken: broken.path)
def test_the_neighbour_that_is_right_is_accepted(api: Api, namespace: str, broken: Broken) -> None:
    api.create(manifest(broken.valid), namespace)


@pytest.mark.parametrize(("before", "after"), CHANGES_ALLOWED)
def test_what_may_change_can_be_changed(
    api: Api, namespace: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    stored = api.create(manifest(before), namespace)
    api.replace(_changed(stored, after))


@pytest.mark.parametrize(
    "changes",
    [
        {"spec.training.packng": True},
        {"spec.training.learning_rate": 1},
        {"spec.training.epochs": "2"},
        {"spec.training.seed": 1.5},
        {"spec.training.packing": "auto"},
        {"spec.tuning.method": "lorra"},
        {"spec.model": "a/b"},
        {"spec.datasets": []},
        {"spec.timeouts.hang": "20"},
        {"spec.split.validation": 1},
        {"spec.training.maxGradNorm": 0},
        {"spec.podTemplate.nodeSelector": {"gpu": True}},
        {"spec.podTemplate.serviceAccountName": "x"},
        {"spec.podTemplate.resources.limits": {"cpu": 0.5}},
        {"spec.podTemplate.resources.limits": {"cpu": "many"}},
    ],
    ids=str,
)
def test_what_validate_refuses_the_api_server_refuses(api: Api, namespace: str, changes: dict[str, Any]) -> None:
    document = manifest(changes)
    assert check(yaml.safe_dump(document)).problems
    with pytest.raises(ApiError):
        api.apply(document, namespace)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_every_example_passes_a_dry_run(api: Api, namespace: str, file: Path) -> None:
    for document in yaml.safe_load_all(file.read_text()):
        api.apply(document, namespace, dry_run=True)


def test_the_api_server_fills_in_what_the_models_fill_in(api: Api, namespace: str) -> None:
    stored = api.create(manifest({"spec.publish.repo": "a/b"}), namespace)["spec"]
    assert stored == FineTuneJobSpec.model_validate(manifest({"spec.publish.repo": "a/b"})["spec"]).to_wire()


def test_nulls_count_as_left_out_here_too(api: Api, namespace: str) -> None:
    document = manifest({"spec.training.packing": None, "spec.training.seed": None})
    assert check(yaml.safe_dump(document)).problems == []
    stored = api.create(document, namespace)["spec"]["training"]
    assert "packing" not in stored
    assert stored["seed"] == 42


def test_the_stored_job_can_be_applied_again_and_the_crd_upgraded_under_it(api: Api, namespace: str) -> None:
    stored = api.create(manifest(), namespace)
    api.apply(definition())
    again = api.apply(
        {key: stored[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": {"name": "tiny"}}, namespace
    )
    assert again["metadata"]["generation"] == stored["metadata"]["generation"]
