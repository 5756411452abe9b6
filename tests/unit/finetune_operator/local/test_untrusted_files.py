"""A job file and a `runs` folder are data that others may have written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.support.local_runs import job

from finetune_api.base import Stage
from finetune_api.spec import FineTuneJob, FineTuneJobSpec
from finetune_api.validate import check
from finetune_operator.errors import UserError
from finetune_operator.local.jobfile import record
from finetune_operator.local.processes.children import Children
from finetune_operator.local.processes.environment import check_variables
from finetune_operator.local.processes.tokens import Tokens, remove_tokens, write_tokens

HARMFUL = """
    PYTHONPATH PYTHONSTARTUP LD_PRELOAD LD_LIBRARY_PATH HF_ENDPOINT HF_HUB_CACHE HF_TOKEN_PATH WANDB_BASE_URL WANDB_DIR
    HTTPS_PROXY https_proxy ALL_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE PATH HOME TMPDIR BASH_ENV
    NCCL_NET_PLUGIN NCCL_CONF_FILE CUDA_INJECTION64_PATH CUDA_HOME OMP_TOOL_LIBRARIES TORCHINDUCTOR_CACHE_DIR
    GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_COMM_ID PYTORCH_JIT
"""
HARMLESS = """
    NCCL_DEBUG NCCL_IB_HCA OMP_NUM_THREADS TOKENIZERS_PARALLELISM CUDA_LAUNCH_BLOCKING PYTORCH_CUDA_ALLOC_CONF
    TORCH_NCCL_BLOCKING_WAIT HF_HUB_ENABLE_HF_TRANSFER HF_HUB_DOWNLOAD_TIMEOUT WANDB_TAGS LANG
"""


def spec_with(*names: str) -> FineTuneJobSpec:
    env = [{"name": name, "value": "x"} for name in names]
    return FineTuneJobSpec.model_validate(job()["spec"] | {"podTemplate": {"env": env}})


@pytest.mark.parametrize("name", HARMFUL.split())
def test_a_variable_that_loads_code_or_redirects_connections_is_taken_only_if_the_user_says_so(name: str) -> None:
    with pytest.raises(UserError, match=rf"^spec.podTemplate.env\[1\]: {name} .*--allow-env {name}\.$"):
        check_variables(spec_with("NCCL_DEBUG", name), ["OTHER"])
    check_variables(spec_with("NCCL_DEBUG", name), [name])


def test_variables_that_tune_a_library_need_no_permission() -> None:
    check_variables(spec_with(*HARMLESS.split()), [])


@pytest.mark.parametrize("namespace", ["/srv/abs", "../../../x", "", ".", "a/b", "UPPER", "a" * 64, "a\n"])
def test_a_namespace_that_is_no_dns_label_is_refused(namespace: str) -> None:
    resource: dict[str, Any] = job() | {"metadata": {"name": "base", "namespace": namespace}}
    problems = check(json.dumps(resource)).problems
    assert [problem.path for problem in problems] == ["metadata.namespace"]


def test_a_directory_that_only_claims_to_hold_tokens_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    precious = tmp_path / "home" / "finetune-tokens-precious"
    precious.mkdir(parents=True)
    link = tmp_path / "finetune-tokens-link"
    link.symlink_to(precious)
    own = write_tokens(Tokens({"hub": "hf_secret"}), "hub")
    process = {"index": 0, "tokens": str(precious), "started": "2026-01-01T00:00:00Z"}
    child = {"stage": "train", "number": 1, "created": "2026-01-01T00:00:00Z", "graceSeconds": 1}
    (tmp_path / "children.json").write_text(json.dumps([child | {"processes": [process]}]))
    children = Children(tmp_path, "uid-of-nobody", Tokens())
    children.recover(lambda _: None)
    (ended,) = children.observe()
    assert (ended.stage, ended.failed) == (Stage.TRAIN, True)
    for path in (link, precious, precious / "..", tmp_path, tmp_path / "home", Path()):
        remove_tokens(str(path))
    assert precious.is_dir()
    remove_tokens(str(own))
    assert not own.exists()


@pytest.mark.parametrize("place", ["ns", "ns/tiny", "ns/tiny/.lock"])
def test_a_link_where_runs_are_kept_is_not_followed(tmp_path: Path, place: str) -> None:
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").write_text("precious")
    path = tmp_path / "runs" / place
    path.parent.mkdir(parents=True)
    path.symlink_to(target / "file" if path.name == ".lock" else target)
    with pytest.raises(UserError, match="is a link"), record.locked(tmp_path / "runs" / "ns" / "tiny"):
        pass
    assert (target / "file").read_text() == "precious"
    assert [entry.name for entry in target.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["logs", "reports", "logs/train-1/node0.log", "children.json"])
def test_a_recorded_run_with_a_link_in_it_is_refused(tmp_path: Path, place: str) -> None:
    made = record.create(tmp_path, FineTuneJob.model_validate(job()))
    made.save()
    assert record.read(made.run).uid == made.uid
    (made.run / place).parent.mkdir(parents=True, exist_ok=True)
    (made.run / place).symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link"):
        record.read(made.run)


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 100_000, '{"status": []}', '{"spec": 1}'])
def test_a_record_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    made = record.create(tmp_path, FineTuneJob.model_validate(job()))
    made.save()
    (made.run / record.STATUS_FILE).write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        record.read(made.run)


def test_a_record_that_names_another_run_is_refused(tmp_path: Path) -> None:
    made = record.create(tmp_path, FineTuneJob.model_validate(job()))
    made.save()
    made.run.rename(tmp_path / "other")
    with pytest.raises(UserError, match="cannot be read"):
        record.read(tmp_path / "other")


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    directory = tmp_path / "ns" / "tiny"
    directory.mkdir(parents=True)
    os.chown(directory, 12345, 12345)
    with pytest.raises(UserError, match="belongs to another user"), record.locked(directory):
        pass
