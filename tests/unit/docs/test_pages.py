"""What the pages say is true: jobs are valid, commands and options exist, links lead somewhere, names are real."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from tests.support.jobs import manifest

from finetune_api.crd import root_schema
from finetune_api.report import FailureClass
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validate import check
from finetune_operator.cli import COMMANDS, load
from finetune_operator.decision.failure_policy import InfraFailure

ROOT = Path(__file__).parents[3]
WHERE = ("*.md", "docs/**/*.md", "charts/*/README.md", "tests/*/README.md")
PAGES = sorted(page for pattern in WHERE for page in ROOT.glob(pattern))
GENERATED = {"docs/reference.md", "docs/code-map.md"}
VALUES = json.loads((ROOT / "charts" / "finetune-operator" / "values.schema.json").read_text())
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
"""A block, which may stand within a list."""
SHELL = ("sh", "bash", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:60]}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_blocks(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for _, language, text in FENCED.findall(page.read_text()):
            if language in languages:
                found.append(Block(name(page), language, textwrap.dedent(text)))
    return found


def inline(page: Path) -> list[str]:
    """Code within sentences."""
    return re.findall(r"`([^`\n]+)`", without_blocks(page))


# --- YAML ------------------------------------------------------------------------------------------------------------


def documents() -> Iterator[tuple[Block, dict[str, Any]]]:
    for block in blocks("yaml"):
        for document in yaml.safe_load_all(block.text):
            yield block, document


SPEC_FIELDS = {field.alias or name for name, field in FineTuneJobSpec.model_fields.items()}


@pytest.mark.parametrize(("block", "document"), documents(), ids=lambda value: str(value)[:60])
def test_yaml_is_a_valid_job_a_part_of_one_chart_values_or_an_object_of_another_kind(
    block: Block, document: dict[str, Any]
) -> None:
    if document.get("kind") == "FineTuneJob":
        assert check(yaml.safe_dump(document)).problems == []
    elif set(document) <= SPEC_FIELDS:
        changed = manifest({f"spec.{field}": value for field, value in document.items()})
        assert check(yaml.safe_dump(changed)).problems == []
    elif set(document) <= set(VALUES["properties"]):
        jsonschema.validate(document, VALUES)
    else:
        assert {"apiVersion", "kind"} <= set(document) or "data" in document, "what is it a part of?"


def test_the_chart_takes_the_values_that_argo_cd_and_flux_hand_on() -> None:
    specs = {document["kind"]: document["spec"] for _, document in documents() if "spec" in document}
    jsonschema.validate(specs["Application"]["source"]["helm"]["valuesObject"], VALUES)
    jsonschema.validate(specs["HelmRelease"]["values"], VALUES)


def test_pages_name_the_version_that_this_is() -> None:
    version = yaml.safe_load((ROOT / "charts" / "finetune-operator" / "Chart.yaml").read_text())["appVersion"]
    for page in PAGES:
        named = re.findall(
            r"(?:finetune-(?:operator|trainer):|(?:targetRevision|tag): v)([0-9][\w.]*)", page.read_text()
        )
        assert set(named) <= {version}, name(page)


# --- commands --------------------------------------------------------------------------------------------------------


def command_lines() -> list[tuple[str, str]]:
    found = []
    for block in blocks(*SHELL):
        joined = block.text.replace("\\\n", " ")
        found += [
            (block.page, part.strip()) for line in joined.splitlines() for part in re.split(r" && | \| |; ", line)
        ]
    for page in PAGES:
        if name(page) not in GENERATED:
            found += [(name(page), code) for code in inline(page)]
    return found


def starting_with(*programs: str) -> list[tuple[str, list[str]]]:
    """Command lines of a program, as words; what the page leaves to the reader (`…`, `<name>`) stays in them."""
    found = []
    for page, line in command_lines():
        for program in programs:
            if line.startswith(f"{program} "):
                words = shlex.split(line.partition(" | ")[0].removeprefix(program), comments=True)
                found.append((page, words))
    return found


@cache
def options(command: str) -> frozenset[str]:
    loaded: click.Command = load(command)
    known = {option for parameter in loaded.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return frozenset(known | {"-h", "--help", "--debug"})


@pytest.mark.parametrize(("page", "words"), starting_with("finetune", "kubectl finetune"), ids=str)
def test_commands_and_options_exist(page: str, words: list[str]) -> None:
    command = words[0]
    if command.startswith("-"):
        return
    assert command in COMMANDS, f"{page}: finetune has no command {command}"
    for word in words[1:]:
        if word.startswith("-") and len(word) > 1:
            assert word.partition("=")[0] in options(command), f"{page}: finetune {command} has no {word}"


@pytest.mark.parametrize(("page", "words"), starting_with("make"), ids=str)
def test_targets_of_make_exist(page: str, words: list[str]) -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert next(word for word in words if "=" not in word) in targets, page


@pytest.mark.parametrize(("page", "words"), starting_with("helm"), ids=str)
def test_values_that_helm_is_given_exist(page: str, words: list[str]) -> None:
    given = [words[i + 1] for i, word in enumerate(words) if word in ("--set", "--set-json", "--set-string")]
    for assignment in given:
        path = re.sub(r"\[\d+\]", "", assignment.partition("=")[0])
        assert chart_value(path), f"{page}: the chart has no value {path}"


# --- names -----------------------------------------------------------------------------------------------------------


def chart_value(path: str) -> bool:
    """Whether the chart has a value of this dotted name; below a free-form object, anything."""
    node = VALUES
    for part in path.split("."):
        properties = node.get("properties")
        if properties is None:
            return node.get("type") == "object"
        if part not in properties:
            return False
        node = properties[part]
    return True


def job_field(path: str) -> bool:
    """Whether a FineTuneJob has this field, written from the top or from below spec."""
    parts = re.sub(r"\[[^\]]*\]", "", path).split(".")
    return any(_in_schema(root_schema(), [*start, *parts]) for start in ([], ["spec"], ["status"]))


def _in_schema(node: dict[str, Any], parts: list[str]) -> bool:
    for part in parts:
        node = node.get("items", node)
        if "properties" not in node:
            return bool(node.get("additionalProperties"))
        if part not in node["properties"]:
            return False
        node = node["properties"][part]
    return True


FOREIGN_FIELDS = ("configs.cm", "integrations.frameworks", "kubernetes.aio.leaderelection")
"""Dotted names that are neither ours nor the chart's."""
DOTTED = re.compile(r"^([a-z][A-Za-z]*(?:\[\])?(?:\.[a-z][A-Za-z]*(?:\[\])?)+)(?:[:=].*)?$")
FILES = re.compile(r"\.(md|py|yaml|json|jsonl|svg|log|ini|toml|safetensors|html|tpl|lua|txt|com|dev|io)$")


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) not in GENERATED], ids=name)
def test_fields_and_values_that_are_named_exist(page: Path) -> None:
    for code in inline(page):
        found = DOTTED.match(code)
        if not found or FILES.search(found[1]) or found[1] in FOREIGN_FIELDS:
            continue
        assert job_field(found[1]) or chart_value(found[1]), f"{found[1]} is neither a field of a job nor a chart value"


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) not in GENERATED], ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs"}
    for code in inline(page):
        if re.fullmatch(r"[\w./-]+", code) and "/" in code and code.split("/")[0] in tops:
            assert (ROOT / code).exists(), f"there is no {code}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_variables_that_are_named_are_read_somewhere(page: Path) -> None:
    source = _sources()
    for variable in set(re.findall(r"\bFINETUNE_[A-Z_]+\b", page.read_text())):
        assert variable.removeprefix("FINETUNE_") in source, variable


@cache
def _sources() -> str:
    return "\n".join(
        path.read_text() for top in ("operator", "trainer", "tests") for path in (ROOT / top).rglob("*.py")
    )


def test_troubleshooting_names_reasons_that_the_operator_writes() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    kinds = {str(kind) for kind in (*FailureClass, *InfraFailure)}
    named = {word for row in re.findall(r"^\|([^|]*)\|", page, re.MULTILINE) for word in re.findall(r"`([^`]+)`", row)}
    assert len(named) > 10
    for reason in named:
        assert reason in kinds or re.search(rf"[\"']{re.escape(reason)}[\"']", _sources()), f"nobody writes {reason}"


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} leads nowhere"
        if anchor and linked.suffix == ".md" and name(linked) not in GENERATED:
            assert anchor in anchors(linked), f"{target}: there is no such heading"


def test_the_index_has_every_page_of_the_documentation() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name
