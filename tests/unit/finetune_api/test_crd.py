"""The CRD is a structural schema that says everything the models say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from tests.support.jobs import manifest

from finetune_api import crd, docs
from finetune_api.base import ApiModel
from finetune_api.crd import Schema
from finetune_api.fields import all_paths, submodel
from finetune_api.generate import GENERATED, drift, main, write
from finetune_api.spec import FineTuneJob, FineTuneJobSpec
from finetune_api.status import JobStatus

ROOT = Path(__file__).parents[3]
KNOWN = {
    "type",
    "description",
    "default",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "required",
    "properties",
    "items",
    "additionalProperties",
    "anyOf",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}


def _nodes(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, below in schema.get("properties", {}).items():
        yield from _nodes(below, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key], path + mark)


def _spec() -> Schema:
    return crd.root_schema()["properties"]["spec"]  # type: ignore[no-any-return]


def test_every_field_has_a_description() -> None:
    for path, node in _nodes(crd.root_schema(), ""):
        if path != ".metadata" and not path.endswith(("[]", "{}")):
            assert len(node["description"]) > 3, path


def test_every_field_of_the_models_is_there_and_no_other() -> None:
    for part, model in (("spec", FineTuneJobSpec), ("status", JobStatus)):
        schema = crd.root_schema()["properties"][part]
        found = {path[1:].replace("{}", "") for path, _ in _nodes(schema, "") if not path.endswith(("[]", "{}"))}
        assert found - {""} == {path.replace("{}", "") for path in all_paths(model)}


def test_the_schema_is_structural() -> None:
    for path, node in _nodes(crd.root_schema(), ""):
        assert set(node) <= KNOWN, path
        assert not (node.get("properties") and node.get("additionalProperties")), path
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert node.get("type") != "array" or "items" in node, path
        assert set(node.get("required", ())) <= set(node.get("properties", ())), path


def test_what_rules_look_at_is_bounded_so_that_the_api_server_can_bound_their_cost() -> None:
    for path, node in _nodes(_spec(), "spec"):
        if node.get("type") == "array":
            assert node["maxItems"] <= 128, path
        elif node.get("type") == "object" and "additionalProperties" in node:
            assert node["maxProperties"] <= 64, path
        elif node.get("type") == "string" and "enum" not in node:
            assert node["maxLength"] <= 20_000, path


def _models(model: type[ApiModel], path: str) -> Iterator[tuple[str, type[ApiModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        if below := submodel(field.annotation):
            mark = "[]" if "list" in str(field.annotation) else ""
            yield from _models(below, f"{path}.{field.alias or name}{mark}")


def test_every_rule_is_there_with_its_sentence() -> None:
    nodes = dict(_nodes(_spec(), "spec"))
    for path, model in _models(FineTuneJobSpec, "spec"):
        rules = [(rule["rule"], rule["message"]) for rule in nodes[path].get("x-kubernetes-validations", [])]
        assert rules == [(rule.rule, rule.message) for rule in model.cel_rules], path
    root = crd.root_schema()["x-kubernetes-validations"]
    assert [rule["message"] for rule in root] == [rule.message for rule in FineTuneJob.cel_rules]


def test_a_rule_points_at_a_field_that_exists() -> None:
    paths = {path for path, _ in _nodes(_spec(), "spec")}
    for path, node in _nodes(_spec(), "spec"):
        for rule in node.get("x-kubernetes-validations", []):
            assert path + rule.get("fieldPath", "") in paths


def _filled(schema: Schema, value: object) -> object:
    """What the API server makes of a value: defaults where something is absent."""
    if isinstance(value, dict) and "properties" in schema:
        for name, field in schema["properties"].items():
            if name not in value and "default" in field:
                value[name] = field["default"]
            if name in value:
                value[name] = _filled(field, value[name])
    elif isinstance(value, list):
        return [_filled(schema["items"], entry) for entry in value]
    return value


def test_the_api_server_fills_in_the_same_defaults_as_the_models() -> None:
    changes = {"spec.model.adapter.path": "a", "spec.publish.repo": "a/b", "spec.training.resumeFrom.path": "c"}
    written = manifest(changes)["spec"]
    assert _filled(_spec(), written) == FineTuneJobSpec.model_validate(manifest(changes)["spec"]).to_wire()


def test_the_status_gets_no_defaults() -> None:
    for path, node in _nodes(crd.root_schema()["properties"]["status"], "status"):
        assert "default" not in node, path


def test_the_columns_tell_the_story() -> None:
    version = crd.definition()["spec"]["versions"][0]
    shown = [column["name"] for column in version["additionalPrinterColumns"] if not column.get("priority")]
    assert shown == ["Phase", "Stage", "Progress", "ETA", "Loss", "Metric", "Age"]
    assert version["subresources"] == {"status": {}}
    assert crd.definition()["spec"]["names"]["shortNames"] == ["ftj"]
    paths = {path for path, _ in _nodes(crd.root_schema(), "")}
    for column in version["additionalPrinterColumns"]:
        plain = column["jsonPath"].partition("[?")[0]
        assert plain in paths or plain.startswith(".metadata"), column


def test_the_rendered_crd_is_the_definition() -> None:
    assert yaml.safe_load(crd.render()) == crd.definition()
    assert len(crd.render()) < 200_000


def test_the_reference_names_every_field_and_every_sentence() -> None:
    page = docs.render()
    for model in (FineTuneJobSpec, JobStatus):
        for path in all_paths(model):
            assert f"`{path.rpartition('.')[2].removesuffix('[]')}`" in page, path
    for _, node in _nodes(_spec(), "spec"):
        for rule in node.get("x-kubernetes-validations", []):
            assert "oldSelf" in rule["rule"] or rule["message"].replace("|", "\\|").replace("<", "\\<") in page
    assert "| while `suspend: true` |" in page


def test_links_in_the_reference_lead_to_headings() -> None:
    page = docs.render()
    headings = {
        "#" + "".join(char for char in line.lstrip("# ").lower().replace(" ", "-") if char.isalnum() or char in "-_")
        for line in page.splitlines()
        if line.startswith("#")
    }
    links = {part.partition(")")[0] for part in page.split("](")[1:]}
    assert {link for link in links if link.startswith("#")} <= headings


def test_generated_files_are_what_the_models_say() -> None:
    assert drift(ROOT) == {}


def test_drift_is_shown_and_written_away(tmp_path: Path) -> None:
    assert sorted(write(tmp_path)) == sorted(GENERATED)
    assert main(["--check", "--root", str(tmp_path)]) == 0
    stale = tmp_path / "docs" / "reference.md"
    stale.write_text(stale.read_text().replace("# FineTuneJob reference", "# Something else"))
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert "-# Something else\n+# FineTuneJob reference" in drift(tmp_path)["docs/reference.md"]
    assert write(tmp_path) == ["docs/reference.md"]
