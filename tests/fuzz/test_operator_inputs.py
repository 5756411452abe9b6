"""What operator and stages read of others: job files, records, reports, last words are taken or refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from tests.support import jobs
from tests.support.tiny import tiny_llama
from tests.unit.finetune_operator.decision.world import UID, job

from finetune_api.base import Stage
from finetune_api.report import Failure, Report
from finetune_api.validate import check
from finetune_operator.cluster.observe import read_pod, reports
from finetune_operator.errors import UserError
from finetune_operator.local.jobfile import job_file, record
from finetune_operator.sizing.data_estimate import data_estimate
from finetune_operator.sizing.model_estimate import model_estimate
from finetune_trainer.digest import export_digest, write_digest
from finetune_trainer.failures import TrainerError
from finetune_trainer.termination import read_termination_message

from .hunting import changed, damaged, hunt
from .test_datasets import FORMATS
from .test_models import GGUF

MANIFEST = jobs.manifest(
    {"metadata.namespace": "ml", "spec.podTemplate.env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}
)
YAML_WORDS = (
    b"&a ",
    b"*a",
    b"<<: *a\n",
    b"!!python/object:os.system ",
    b"? ",
    b"- " * 500,
    b"[" * 500,
    b"---\n",
    b"\x85",
    b"~",
)


def as_text(data: bytes) -> str:
    return data.decode(errors="replace")


def test_a_job_file_is_valid_or_its_problems_are_named() -> None:
    def read(text: str) -> None:
        checked = check(text)
        assert checked.jobs or checked.problems or checked.notes
        assert all(problem.sentence and "\n" not in problem.text() for problem in checked.problems)

    text = yaml.safe_dump(MANIFEST)
    hunt(damaged([text.encode()], YAML_WORDS).map(as_text) | changed(MANIFEST).map(json.dumps), read)


def test_a_job_file_of_finetune_run_is_one_job_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    keys = st.sampled_from(
        ["training.epochs", "datasets[0].name", "datasets[9]", "tuning", "a.b", "podTemplate.env[0]"]
    )
    override = st.builds("{}={}".format, keys, st.text(max_size=20) | st.sampled_from(["[" * 500, "&a [*a]", "{a: 1}"]))

    def read(given: tuple[bytes, list[str]]) -> None:
        content, overrides = given
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            job_file.load(str(path), overrides)

    text = yaml.safe_dump(MANIFEST).encode()
    hunt(st.tuples(st.just(text) | damaged([text], YAML_WORDS), st.lists(override, max_size=2)), read)


def test_the_record_of_a_run_is_read_or_refused(tmp_path: Path) -> None:
    run = tmp_path / UID
    run.mkdir()
    given = jobs.manifest() | {"metadata": {"name": "tiny", "namespace": "ml", "uid": UID}}
    sample = given | {"status": job().training().says(progress={"step": 3, "total": 9}).status.to_wire()}

    def read(content: bytes) -> None:
        (run / record.STATUS_FILE).write_bytes(content)
        with contextlib.suppress(UserError):
            assert record.read(run).uid == UID

    raw = damaged([json.dumps(sample).encode()], (b"[" * 2000,))
    hunt(raw | changed(sample).map(lambda value: json.dumps(value).encode()), read)


def test_a_report_is_used_or_set_aside_with_a_reason() -> None:
    observation = job().training().says(progress={"step": 3, "total": 9}).observe()
    sample = next(report.to_wire() for report in observation.reports if report.stage is Stage.TRAIN)
    owner = {"kind": "FineTuneJob", "uid": UID, "controller": True}

    def read(text: str) -> None:
        body = {"metadata": {"name": "r", "ownerReferences": [owner]}, "data": {"train": text}}
        usable, unusable = reports({Stage.TRAIN: body}, UID, observation.now)
        assert all(isinstance(report, Report) for report in usable)
        assert all(reason and len(reason) < 1000 for reason in unusable.values())
        assert len(usable) + len(unusable) == 1

    raw = damaged([json.dumps(sample).encode()], (b"[" * 2000, b"1e999", b"9" * 5000))
    hunt(raw.map(as_text) | changed(sample).map(json.dumps), read)


def test_last_words_are_a_failure_or_nothing(tmp_path: Path) -> None:
    sample = {"class": "crash", "sentence": "x", "rank": 0, "time": "2026-01-01T00:01:00Z", "field": "model"}
    path = tmp_path / "termination-log"

    def read(content: bytes) -> None:
        terminated = {"exitCode": 1, "message": as_text(content)}
        status = {"phase": "Failed", "containerStatuses": [{"name": "c", "state": {"terminated": terminated}}]}
        body: dict[str, Any] = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}]}, "status": status}
        assert isinstance(read_pod(body, frozenset()).failure, Failure | None)
        path.write_bytes(content)
        assert isinstance(read_termination_message(path), Failure | None)

    raw = damaged([json.dumps(sample).encode()], (b"[" * 2000, b"9" * 5000))
    hunt(raw | changed(sample).map(lambda value: json.dumps(value).encode()), read)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "m.gguf"])
def test_finetune_plan_reads_the_shape_of_a_model_or_refuses_it(file: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16)
    (model / "m.gguf").write_bytes(GGUF)
    given = str(model / file if file == "m.gguf" else model)
    spec = jobs.job({"spec.model": {"path": given}}).spec
    content = (model / file).read_bytes()
    config = json.loads((model / "config.json").read_text())

    def read(content: bytes) -> None:
        (model / file).write_bytes(content)
        with contextlib.suppress(UserError):
            assert model_estimate(spec, [tmp_path]).facts.parameters >= 0

    wires = changed(config).map(lambda value: json.dumps(value).encode())
    hunt(damaged([content[:3000]], (b"[" * 2000,)) | wires, read)


@pytest.mark.parametrize("name", FORMATS)
def test_finetune_plan_estimates_whatever_the_data_are(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{name}"
    spec = jobs.job({"spec.datasets.0.path": str(path)}).spec

    def read(content: bytes) -> None:
        path.write_bytes(content)
        assert data_estimate(spec, [tmp_path]).lengths.documents >= 1

    hunt(damaged(*FORMATS[name]), read)


def test_the_digest_of_an_export_is_told_or_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_digest(tmp_path)
    sample = json.loads((tmp_path / "digest.json").read_text())

    def read(content: bytes) -> None:
        (tmp_path / "digest.json").write_bytes(content)
        with contextlib.suppress(TrainerError):
            assert export_digest(tmp_path) == sample["digest"]

    raw = damaged([json.dumps(sample).encode()], (b"[" * 2000,))
    hunt(raw | changed(sample).map(lambda value: json.dumps(value).encode()), read)
