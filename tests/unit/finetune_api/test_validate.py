"""Bad input gets the field's path, the line, what is wrong, and what to write instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.support.jobs import ABSENT, manifest

from finetune_api.base import ApiModel
from finetune_api.crd import Schema, root_schema
from finetune_api.spec import FineTuneJobSpec
from finetune_api.structure import HABITS, PATTERNS, all_paths
from finetune_api.validate import Problem, check

ROOT = Path(__file__).parents[3]


def _problems(changes: dict[str, object]) -> list[Problem]:
    return check(yaml.safe_dump(manifest(changes))).problems


@pytest.mark.parametrize(
    ("changes", "path", "sentence", "hint"),
    [
        ({"spec.training.packng": True}, "spec.training.packng", "unknown field packng", "did you mean packing?"),
        ({"spec.training.learning_rate": 1}, "spec.training.learning_rate", "unknown field", "mean learningRate?"),
        ({"spec.training.lr": 0.1}, "spec.training.lr", "unknown field lr", "did you mean learningRate?"),
        (
            {"spec.learningRate": 1},
            "spec.learningRate",
            "unknown field",
            "did you mean spec.training.learningRate?",
        ),
        ({"spec.gpus": 1}, "spec.gpus", "unknown field gpus", "did you mean spec.topology.gpusPerNode?"),
        ({"spec.tuning.r": 1}, "spec.tuning.r", "unknown field r", "did you mean spec.tuning.lora.rank?"),
        ({"spec.quantum": 1}, "spec.quantum", "unknown field quantum", "known fields: model, datasets"),
        ({"spec.model": ABSENT}, "spec.model", "is required", "The base model."),
        ({"spec.datasets": []}, "spec.datasets", "needs at least 1 entries, has 0", ""),
        ({"spec.tuning.method": ABSENT}, "spec.tuning.method", "is required", "one of full, lora, qlora"),
        (
            {"spec.tuning.method": "lorra"},
            "spec.tuning.method",
            '"lorra" must be one of full',
            "did you mean lora?",
        ),
        ({"spec.datasets.0.task": "Chat"}, "spec.datasets[0].task", '"Chat" must be one of', "did you mean chat?"),
        *(
            ({"spec.datasets.0.task": task}, "spec.datasets[0].task", "must be one of", "did you mean instruction?")
            for task in ("sft", "alpaca", "prompt-completion", "prompt_completion", "Instruct")
        ),
        ({"spec.training.epochs": "2"}, "spec.training.epochs", '"2" is not a number', "remove the quotes"),
        ({"spec.training.seed": 1.5}, "spec.training.seed", "1.5 is not a whole number", ""),
        ({"spec.training.seed": True}, "spec.training.seed", "true is not a whole number", ""),
        (
            {"spec.training.packing": "auto"},
            "spec.training.packing",
            "is not true or false",
            "leave the field out to have it",
        ),
        (
            {"spec.training.keepBest": "true"},
            "spec.training.keepBest",
            '"true" is not true or false',
            "remove the quotes",
        ),
        ({"spec.training.maxSteps": "auto"}, "spec.training.maxSteps", "is not a whole number", "leave the field out"),
        ({"spec.model": "a/b"}, "spec.model", '"a/b" is not a map of fields', "write {repo: a/b}"),
        ({"spec.model": "./a"}, "spec.model", '"./a" is not a map of fields', "write {path: ./a}"),
        ({"spec.tuning": "lora"}, "spec.tuning", '"lora" is not a map of fields', "write {method: lora}"),
        ({"spec.datasets": {"name": "x"}}, "spec.datasets", "a map is not a list", "begin each entry with '- '"),
        ({"spec.model.revision": 1}, "spec.model.revision", "1 is not text", 'put it in quotes: "1"'),
        (
            {"spec.tuning.lora.targetModules": ["a", "b"]},
            "spec.tuning.lora.targetModules",
            "is not text",
            "commas: a,b",
        ),
        ({"spec.tuning.lora.targetModules": "(q"}, "spec.tuning.lora.targetModules", "is not a regular expression", ""),
        ({"spec.tuning.lora.targetModules": "q(?=_)"}, "spec.tuning.lora.targetModules", "has no look-around", ""),
        ({"spec.tuning.lora.layers": "0-1000000"}, "spec.tuning.lora.layers", "is not layer numbers such as", ""),
        ({"spec.timeouts.hang": "20"}, "spec.timeouts.hang", '"20" is not a duration such as 90s', ""),
        ({"spec.storage.run.size": "200GB"}, "spec.storage.run.size", "is not a number of bytes such as 200Gi", ""),
        ({"spec.publish.repo": "https://x/a b"}, "spec.publish.repo", "is not owner/name", ""),
        ({"spec.split.validation": 1}, "spec.split.validation", "1 must be less than 1", ""),
        ({"spec.topology.nodes": 0}, "spec.topology.nodes", "0 must be 1 or more", ""),
        ({"spec.training.maxGradNorm": 0}, "spec.training.maxGradNorm", "0 must be greater than 0", ""),
        ({"spec.tuning.lora.rank": 5000}, "spec.tuning.lora.rank", "5000 must be 4096 or less", ""),
        ({"spec.model.path": ""}, "spec.model.path", "is empty", ""),
        ({"spec.model.path": "x" * 1025}, "spec.model.path", "has 1,025 characters; at most 1,024 are allowed", ""),
        (
            {"spec.podTemplate.nodeSelector": {"a.b/gpu": True}},
            'spec.podTemplate.nodeSelector["a.b/gpu"]',
            "true is not text",
            'put it in quotes: "true"',
        ),
        ({"spec.podTemplate.serviceAccountName": "x"}, "spec.podTemplate.serviceAccountName", "unknown field", ""),
        ({"apiVersion": "finetune.dev/v1"}, "apiVersion", "must be finetune.dev/v1alpha1", "did you mean"),
        ({"kind": "FinetuneJob"}, "kind", '"FinetuneJob" must be FineTuneJob', "did you mean FineTuneJob?"),
        ({"apiVersion": ABSENT}, "apiVersion", "is required", "write apiVersion: finetune.dev/v1alpha1"),
        ({"metadata.name": ABSENT}, "metadata.name", "is required", ""),
    ],
)
def test_one_mistake_gets_one_answer(changes: dict[str, object], path: str, sentence: str, hint: str) -> None:
    problems = _problems(changes)
    assert [problem.path for problem in problems] == [path]
    assert sentence in problems[0].sentence
    assert hint in problems[0].hint
    assert bool(hint) <= bool(problems[0].hint)


def test_the_line_is_that_of_the_field() -> None:
    text = (ROOT / "examples" / "quickstart.yaml").read_text()
    broken = text.replace("method: lora", "method: lorra")
    line = broken[: broken.index("lorra")].count("\n") + 1
    [problem] = check(broken).problems
    assert problem.line == line
    assert problem.text("job.yaml").startswith(f"job.yaml:{line}: spec.tuning.method: ")


def test_rules_are_checked_in_the_parts_of_a_faulty_document_that_can_be_read() -> None:
    problems = _problems({"spec.quantum": 1, "spec.timeouts.hang": "5s"})
    assert {problem.path for problem in problems} == {"spec.quantum", "spec.timeouts.hang"}


def test_nulls_count_as_left_out() -> None:
    assert _problems({"spec.training.packing": None, "spec.training.seed": None, "spec.publish": None}) == []
    assert [problem.path for problem in _problems({"spec.model": None})] == ["spec.model"]


def test_a_generated_name_is_accepted_and_a_status_is_passed_over() -> None:
    document = manifest({"metadata": {"generateName": "tiny-"}}) | {"status": {"phase": "No such phase"}}
    checked = check(yaml.safe_dump(document))
    assert checked.problems == []
    assert checked.jobs[0].metadata.name.startswith("tiny-")


def test_documents_of_other_kinds_are_passed_over_with_a_note() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token"}}
    checked = check(yaml.safe_dump_all([secret, manifest(), manifest(name="second")]))
    assert checked.problems == []
    assert checked.notes == ["document 1: Secret token is not a FineTuneJob and was skipped"]
    assert [job.metadata.name for job in checked.jobs] == ["tiny", "second"]


def test_problems_say_which_document() -> None:
    problems = check(yaml.safe_dump_all([manifest(), manifest({"spec.nope": 1})])).problems
    assert [problem.document for problem in problems] == [2]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n"])
def test_a_text_without_documents_is_said(text: str) -> None:
    [problem] = check(text).problems
    assert problem.sentence == "contains no document"


@pytest.mark.parametrize("text", ["just text", "- a\n- b\n", "42"])
def test_a_document_that_is_no_map_is_said(text: str) -> None:
    [problem] = check(text).problems
    assert problem.sentence == "is not a map of fields"
    assert "kind: FineTuneJob" in problem.hint


def test_broken_yaml_after_a_good_document_names_the_line() -> None:
    [problem] = check(yaml.safe_dump(manifest()) + "---\na: [\n").problems
    assert problem.sentence.startswith("not YAML")
    assert problem.document == 2


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.name)
def test_every_example_is_valid(file: Path) -> None:
    checked = check(file.read_text())
    assert checked.problems == []
    assert checked.jobs


def _patterns(schema: Schema) -> set[str]:
    found = {schema["pattern"]} if "pattern" in schema else set()
    for below in [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]:
        found |= _patterns(below) if isinstance(below, dict) else set()
    return found


def test_every_pattern_of_the_spec_is_explained_in_words() -> None:
    assert _patterns(root_schema()["properties"]["spec"]) == set(PATTERNS)


def test_what_other_tools_call_a_field_leads_to_a_field() -> None:
    paths = all_paths(FineTuneJobSpec)
    for wanted in HABITS.values():
        assert any(path == wanted or path.endswith(f".{wanted}") for path in paths), wanted


def test_cel_is_not_loaded_before_a_rule_is_carried_out() -> None:
    code = "import sys, finetune_api.validate; sys.exit('celpy' in sys.modules or 'rapidfuzz' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_may_be_read_by_its_python_names_in_code_but_not_from_a_file() -> None:
    assert isinstance(FineTuneJobSpec.model_validate(manifest()["spec"]), ApiModel)
    assert [problem.path for problem in _problems({"spec.pod_template": {}})] == ["spec.pod_template"]
