"""`finetune plan`: read from what is on this machine, told to the person who pays."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.jobs import job, manifest

from finetune_api.spec import FineTuneJobSpec
from finetune_operator.cli import run_command_line
from finetune_operator.devices import Gpu as Device
from finetune_operator.errors import UserError
from finetune_operator.sizing.data_estimate import TEMPLATE_TOKENS, data_estimate
from finetune_operator.sizing.gguf import gguf_config
from finetune_operator.sizing.gpus import GIB, cpu_has_bf16, gpu_here
from finetune_operator.sizing.model_estimate import model_estimate
from finetune_operator.sizing.model_shapes import model_facts

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}


def _spec(changes: dict[str, Any]) -> FineTuneJobSpec:
    return job(changes).spec


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a job, its model and its data; nothing of this machine is looked at."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    rows = "".join(f"{'a word ' * 20},{'yes' if number % 2 else 'no'}\n" for number in range(500))
    (tmp_path / "tweets.csv").write_text(f"text,label\n{rows}")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(manifest({"spec.topology": {"gpusPerNode": 0, "nodes": 2}})))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_models_directory_is_read_and_its_tensors_counted(home: Path) -> None:
    header = {"model.embed_tokens.weight": {"shape": [256, 64]}, "lm_head.weight": {"shape": [256, 64]}}
    blob = json.dumps(header | {"__metadata__": {}}).encode()
    (home / "models" / "tiny" / "model.safetensors").write_bytes(len(blob).to_bytes(8, "little") + blob)
    estimate = model_estimate(_spec({}), [home])
    assert estimate.facts.hidden_size == 64
    assert estimate.facts.parameters == 256 * 64
    assert estimate.origin == str(home / "models" / "tiny" / "config.json")


def test_a_path_is_looked_for_beside_the_job_and_then_in_the_cache(home: Path) -> None:
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    assert model_estimate(_spec({}), [elsewhere, home]).facts.hidden_size == 64


def test_the_hubs_cache_comes_before_the_name(home: Path) -> None:
    cache = home / "hub" / "hub" / "models--meta-llama--Llama-3.2-1B"
    (cache / "snapshots" / "c0ffee").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c0ffee")
    (cache / "snapshots" / "c0ffee" / "config.json").write_text(json.dumps(CONFIG))
    repo = _spec({"spec.model": {"repo": "meta-llama/Llama-3.2-1B"}})
    assert model_estimate(repo, [home]).facts.hidden_size == 64
    (cache / "refs" / "main").unlink()
    named = model_estimate(repo, [home])
    assert named.facts.hidden_size == 2048
    assert "the Hub was not asked" in named.origin


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"repo": "acme/secret"}, "The shape of acme/secret is unknown"),
        ({"path": "nowhere"}, "does not exist. Pass the model's config.json with --model-config"),
        ({"path": "models"}, "has no config.json"),
    ],
)
def test_a_model_that_cannot_be_seen_is_said(home: Path, model: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        model_estimate(_spec({"spec.model": model}), [home])
    assert says in refused.value.sentence


def test_a_config_that_is_none_is_said(home: Path) -> None:
    (home / "other.json").write_text("[1]")
    with pytest.raises(UserError, match=r"is not a model's config\.json"):
        model_estimate(_spec({}), [home], home / "other.json")
    (home / "other.json").write_text("{}")
    with pytest.raises(UserError, match="has no num_attention_heads"):
        model_estimate(_spec({}), [home], home / "other.json")


def _gguf(path: Path, *, tied: bool) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def number(key: str, value: int) -> bytes:
        return text(key) + struct.pack("<II", 4, value)

    values = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 0.0, 1.0),
        text("general.flag") + struct.pack("<I?", 7, True),
        *(
            number(f"llama.{key}", value)
            for key, value in {
                "embedding_length": 64,
                "feed_forward_length": 128,
                "block_count": 2,
                "attention.head_count": 4,
                "attention.head_count_kv": 2,
                "context_length": 512,
            }.items()
        ),
    ]
    tensors = [("token_embd.weight", (64, 256)), *([] if tied else [("output.weight", (64, 256))])]
    shapes = [text(name) + struct.pack("<IQQIQ", 2, *dims, 0, 0) for name, dims in tensors]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(values))
    path.write_bytes(head + b"".join(values) + b"".join(shapes))
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_says_its_shape(tmp_path: Path, tied: bool) -> None:
    facts = model_facts(gguf_config(_gguf(tmp_path / "model.gguf", tied=tied)))
    assert (facts.architecture, facts.hidden_size, facts.intermediate_size) == ("LlamaForCausalLM", 64, 128)
    assert (facts.num_hidden_layers, facts.num_key_value_heads, facts.head_dim) == (2, 2, 16)
    assert (facts.vocab_size, facts.max_position_embeddings, facts.tie_word_embeddings) == (256, 512, tied)


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"not a model at all", b"GGUF" + b"\xff" * 40],
    ids=["empty", "magic only", "text", "absurd counts"],
)
def test_a_file_that_is_no_gguf_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match="is not a readable GGUF file"):
        gguf_config(tmp_path / "model.gguf")


# --- the data --------------------------------------------------------------------------------------------------------


def test_rows_are_counted_and_tokens_estimated_from_characters(home: Path) -> None:
    spec = _spec({"spec.split": {"validation": 0.1, "test": 0.1}, "spec.datasets.0.columns": {"text": "text"}})
    estimate = data_estimate(spec, [home])
    assert estimate.lengths.documents == 400
    assert estimate.lengths.tokens / 400 == pytest.approx(140 / 4 + TEMPLATE_TOKENS, abs=1)
    assert "counted 500 rows" in estimate.notes[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".tsv", ".parquet"])
def test_every_kind_of_file_is_counted(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"row {number} with some words", "label": "x"} for number in range(30)]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n{broken\n")
    elif suffix == ".json":
        path.write_text(json.dumps({"data": rows}))
    elif suffix == ".tsv":
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    spec = _spec({"spec.datasets.0.path": path.name, "spec.split": {"validation": 0.5}})
    assert data_estimate(spec, [tmp_path]).lengths.documents in (15, 16)


def test_a_directory_gives_its_training_files(tmp_path: Path) -> None:
    for name, rows in (("train", 20), ("test", 5)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n' * rows)
    spec = _spec({"spec.datasets.0.path": ".", "spec.datasets.0.splits.test": "test", "spec.split.validation": 0.5})
    assert data_estimate(spec, [tmp_path]).lengths.documents == 10


def test_max_rows_weight_and_longest_count(home: Path) -> None:
    changes = {"spec.datasets.0.maxRows": 100, "spec.datasets.0.weight": 3, "spec.training.maxSequenceLength": 32}
    lengths = data_estimate(_spec(changes), [home]).lengths
    assert (lengths.documents, lengths.longest) == (240, 32)
    assert lengths.tokens == 240 * 32


def test_a_known_dataset_brings_its_rows_and_an_unknown_one_says_what_is_assumed(home: Path) -> None:
    known = {"name": "bank", "repo": "PolyAI/banking77", "splits": {"test": "test"}}
    unknown = {"name": "other", "repo": "acme/data", "task": "chat"}
    estimate = data_estimate(_spec({"spec.datasets": [known, unknown], "spec.split.validation": 0}), [home])
    assert "10,003 rows, the known size of PolyAI/banking77" in estimate.notes[0]
    assert "assumed 10,000 rows of 200 tokens, because acme/data is not on this machine" in estimate.notes[1]
    assert estimate.lengths.documents == 20_003


def test_a_gate_that_the_counted_rows_cannot_decide_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "a", "label": "b"}\n' * 100)
    few = {"spec.datasets.0.path": "few.jsonl", "spec.split": {"validation": 0.1}}
    [warning] = data_estimate(_spec(few), [tmp_path]).warnings
    assert "10 of tweets would be measured" in warning or "5 of tweets would be measured" in warning
    assert "set split: {validation: 0.1, test: 0.3}" in warning
    for decided in (
        {"spec.split": {"validation": 0.1, "test": 0.3}},
        {"spec.evaluation.gate": {"mustImprove": False}},
        {"spec.datasets.0.splits.test": "test"},
        {"spec.datasets.0.filter": "text | length > 2"},
        {"spec.datasets.0.path": "elsewhere.jsonl"},
    ):
        assert data_estimate(_spec(few | decided), [tmp_path]).warnings == ()


def test_the_prompts_list_of_labels_is_counted(home: Path) -> None:
    short = data_estimate(_spec({"spec.datasets.0.columns": {"text": "text"}}), [home]).lengths.tokens
    listed = data_estimate(
        _spec({"spec.datasets.0.columns": {"text": "text", "label": "label"}}), [home]
    ).lengths.tokens
    assert listed > short


# --- the GPU ---------------------------------------------------------------------------------------------------------


def test_a_gpu_of_this_machine_has_the_memory_that_its_driver_says() -> None:
    found = gpu_here(Device("0", "NVIDIA A100-SXM4-80GB", 40 * GIB))
    assert found is not None
    assert (found.name, found.memory_bytes) == ("A100-80GB", 40 * GIB)
    assert gpu_here(Device("0", "Something else")) is None


@pytest.mark.parametrize(("flags", "has"), [("avx2 avx512_bf16 amx_tile", True), ("sse avx2", False)])
def test_a_cpus_instructions_are_read_from_its_flags(tmp_path: Path, flags: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert cpu_has_bf16(tmp_path / "cpuinfo") is has
    assert not cpu_has_bf16(tmp_path / "missing")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_page_says_memory_steps_and_where_the_numbers_come_from(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(["plan", str(home / "job.yaml")]) == 0
    page = capsys.readouterr().out
    for words in (
        "tiny · lora · 2 processes on the CPU",
        "Peak memory per process",
        "activations",
        "total",
        "26: 2 epochs of 400 examples, global batch size 32",
        "counted 500 rows",
        "planned for this machine",
    ):
        assert words in page, words


def test_a_plan_for_programs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "plan",
        str(home / "job.yaml"),
        "-o",
        "json",
        "--set",
        "topology.gpusPerNode=1",
        "--gpu",
        "L4",
        "--price",
        "1",
    ]
    assert run_command_line(line) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == "L4-24GB"
    assert plan["fits"] is True
    assert plan["price"] > 0
    assert plan["worldSize"] == 2
    assert plan["origins"]


def test_what_does_not_fit_fails_the_command_and_says_how_it_would(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_file = home / "large.yaml"
    changes = {"spec.model": {"repo": "meta-llama/Llama-3.1-8B"}, "spec.tuning.method": "full"}
    job_file.write_text(yaml.safe_dump(manifest(changes | {"spec.topology.gpuType": "A100-80GB"})))
    assert run_command_line(["plan", str(job_file)]) == 1
    page = capsys.readouterr().out
    assert "it does not fit" in page
    assert "Any of these changes makes it fit" in " ".join(page.split())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--set", "model.path=nowhere"], "does not exist"),
        (["--set", "tuning.method=lorra"], "did you mean lora?"),
        (["--model-config", "missing.json"], "Cannot read"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(
    home: Path, capsys: pytest.CaptureFixture[str], line: list[str], says: str
) -> None:
    assert run_command_line(["plan", str(home / "job.yaml"), *line]) == 2
    assert says in capsys.readouterr().err


def test_planning_needs_neither_torch_nor_the_network(home: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "from finetune_operator.cli import run_command_line\n"
        f"code = run_command_line(['plan', {str(home / 'job.yaml')!r}])\n"
        "heavy = {'torch', 'transformers', 'finetune_trainer', 'kubernetes', 'kopf'} & set(sys.modules)\n"
        "sys.exit(code or f'loaded {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- validate and crd ------------------------------------------------------------------------------------------------


def test_validate_says_everything_and_exits_with_2(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = home / "bad.yaml"
    bad.write_text(yaml.safe_dump(manifest({"spec.training.packng": True, "spec.tuning.method": "lorra"})))
    assert run_command_line(["validate", str(home / "job.yaml"), str(bad)]) == 2
    shown = capsys.readouterr()
    assert f"{home / 'job.yaml'}: tiny is valid" in shown.out
    assert "spec.training.packng: unknown field packng (did you mean packing?)" in shown.err
    assert "(did you mean lora?)" in shown.err


def test_validate_reads_standard_input_and_answers_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(yaml.safe_dump(manifest({"spec.nope": 1})).encode())))
    assert run_command_line(["validate", "-", "-o", "json"]) == 2
    [problem] = json.loads(capsys.readouterr().out)["-"]["problems"]
    assert problem["path"] == "spec.nope"
    assert problem["line"] is not None


@pytest.mark.parametrize(
    ("name", "content", "says"), [("missing.yaml", None, "does not exist"), ("bytes", b"\xff\xfe", "UTF-8")]
)
def test_validate_says_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run_command_line(["validate", str(tmp_path / name)]) == 2
    assert says in capsys.readouterr().err


def test_a_file_that_cannot_be_read_keeps_none_of_the_others_from_being_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(manifest()))
    assert run_command_line(["validate", str(tmp_path / "gone.yaml"), str(tmp_path / "job.yaml")]) == 2
    said = capsys.readouterr()
    assert "does not exist" in said.err
    assert "tiny is valid" in said.out


def test_render_says_all_that_is_wrong_with_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(manifest({"spec.nope": 1, "spec.training": {"epochs": "two"}})))
    assert run_command_line(["render", str(file)]) == 2
    said = capsys.readouterr().err
    assert "spec.nope: unknown field nope" in said
    assert 'spec.training.epochs: "two" is not a number' in said
    assert said.count(f"{file}:") == 2


def test_crd_prints_what_kubectl_can_apply(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["crd"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "CustomResourceDefinition"
