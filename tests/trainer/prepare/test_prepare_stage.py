"""Prepare as a whole: real text in, `prepared/` out, and the same again costs nothing."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.assets import chitchat_jsonl, commonsense_jsonl, tweets_csv
from tests.support.prepare_runs import labelled, prepare_context, write_rows
from tests.support.tiny import tiny_llama
from transformers import AutoTokenizer

from finetune_api.report import FailureClass, Report
from finetune_trainer.context import RunContext
from finetune_trainer.data.documents import DocumentStore
from finetune_trainer.data.evaluation_rows import read_baseline, read_evaluation
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare import stage


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny", layers=1, hidden=16, heads=2, key_value_heads=1, intermediate=16, context=600)
    return tmp_path


def prepared(context: RunContext) -> tuple[PreparedManifest, Report]:
    stage.run(context)
    return PreparedManifest.read(context.prepared), context.reporter.report


def classification(work: Path, rows: list[Any], **settings: Any) -> dict[str, Any]:
    write_rows(work / "rows.jsonl", rows)
    return {"datasets": [{"name": "d", "path": "rows.jsonl", "task": "classification"} | settings]}


def texts(context: RunContext, store: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(context.prepared / "tokenizer")
    return [tokenizer.decode(document.ids) for document in DocumentStore(context.prepared / store)]


def test_three_tasks_on_real_text_are_prepared_together(work: Path) -> None:
    context = prepare_context(
        work,
        {
            "datasets": [
                {
                    "name": "tweets",
                    "path": str(tweets_csv()),
                    "task": "classification",
                    "columns": {"label": "sentiment"},
                    "maxRows": 200,
                },
                {"name": "commonsense", "path": str(commonsense_jsonl()), "task": "multiple-choice", "maxRows": 100},
                {"name": "chats", "path": str(chitchat_jsonl()), "task": "chat", "maxRows": 40, "weight": 0.5},
            ],
            "split": {"validation": 0.2},
            "evaluation": {"gate": {"mustImprove": False}, "fewShot": 1, "maxRows": 10},
        },
    )
    manifest, report = prepared(context)
    train = DocumentStore(context.prepared / "train")
    assert [dataset.train for dataset in manifest.datasets] == np.bincount(train.dataset).tolist()
    assert [(d.name, d.train + d.validation) for d in manifest.datasets[:2]] == [("tweets", 180), ("commonsense", 90)]
    assert manifest.dataset("tweets").labels == ["negative", "neutral", "positive"]
    assert manifest.evaluation_split == "unseen half of validation"
    assert report.lengths is not None
    assert report.lengths.documents == 160 + 80 + round(0.5 * manifest.dataset("chats").train)
    assert report.lengths.longest == int(train.lengths.max()) <= 600
    assert report.model is not None
    assert report.model.num_hidden_layers == 1
    assert any("are not valid UTF-8" in sentence for sentence in report.warnings)
    rows = list(read_evaluation(context.prepared / "evaluation" / "tweets.jsonl"))
    assert len(rows) == manifest.dataset("tweets").test == 10
    assert all(len(row.few_shot_prompt_ids or []) > len(row.prompt_ids) for row in rows)
    assert report.origin["datasets"]["tweets"].partition(" sha256:")[2]
    assert report.done


def test_held_out_rows_are_in_no_training_document_and_baselines_see_none_of_them(work: Path) -> None:
    context = prepare_context(work, classification(work, labelled(100), maxRows=50))
    manifest, _ = prepared(context)
    held = [row.text for row in read_evaluation(context.prepared / "evaluation" / "d.jsonl")]
    assert len(held) == manifest.datasets[0].test == 5
    for store in ("train", "validation"):
        assert not [text for text in texts(context, store) if any(row in text for row in held)]
    baseline = list(read_baseline(context.prepared / "baseline" / "d.jsonl"))
    assert not {row.text for row in baseline} & set(held)
    assert Counter(row.used for row in baseline) == {True: 40, False: 50}


@pytest.mark.parametrize(
    ("spec", "evaluation", "counts"),
    [
        ({}, "unseen half of validation", (80, 10, 10)),
        ({"training": {"keepBest": False}}, "validation", (70, 30, 30)),
        ({"training": {"keepBest": False, "earlyStopping": {}}}, "unseen half of validation", (80, 10, 10)),
        ({"split": {"validation": 0.1, "test": 0.1}}, "test", (80, 10, 10)),
        ({"split": {"validation": 0.0}}, "none", (100, 0, 0)),
    ],
)
def test_rows_that_chose_the_checkpoint_do_not_measure_it(
    work: Path, spec: dict[str, Any], evaluation: str, counts: tuple[int, int, int]
) -> None:
    manifest, report = prepared(prepare_context(work, classification(work, labelled(100)) | spec))
    [dataset] = manifest.datasets
    assert dataset.evaluation_split == evaluation
    assert (dataset.train, dataset.validation, dataset.test) == counts
    assert any("No rows of d are held out" in warning for warning in report.warnings) == (evaluation == "none")


def test_the_dataset_s_own_splits_are_used(work: Path) -> None:
    rows = labelled(60)
    write_rows(work / "data" / "train.jsonl", rows[:40])
    write_rows(work / "data" / "dev.jsonl", rows[40:50])
    write_rows(work / "data" / "test.jsonl", rows[50:])
    own = {"validation": "validation", "test": "test"}
    context = prepare_context(
        work, {"datasets": [{"name": "d", "path": "data", "task": "classification", "splits": own}]}
    )
    manifest, _ = prepared(context)
    [dataset] = manifest.datasets
    assert (dataset.train, dataset.validation, dataset.test) == (40, 10, 10)
    assert [row.text for row in read_evaluation(context.prepared / "evaluation" / "d.jsonl")] == [
        row["text"] for row in rows[50:]
    ]


def test_rows_of_one_group_and_near_duplicates_stay_on_one_side(work: Path) -> None:
    rows = [row | {"author": f"a{i // 5}"} for i, row in enumerate(labelled(100))]
    rows += [row | {"text": row["text"].upper() + "!", "author": f"b{i}"} for i, row in enumerate(rows)]
    context = prepare_context(work, classification(work, rows, groupBy="author"))
    _, report = prepared(context)
    train = set(" ".join(texts(context, "train")).lower().split("number"))
    held = [row.text.lower().strip("!") for row in read_evaluation(context.prepared / "evaluation" / "d.jsonl")]
    assert held
    assert not [text for text in held if any(text in piece for piece in train)]
    assert any("100 rows are near-duplicates of others" in note for note in report.datasets[0].notes)


def test_held_out_rows_that_another_dataset_trains_on_are_told(work: Path) -> None:
    rows = labelled(50)
    write_rows(work / "a.jsonl", rows)
    write_rows(work / "b.jsonl", rows)
    spec = {"datasets": [{"name": name, "path": f"{name}.jsonl", "task": "classification"} for name in "ab"]}
    spec["datasets"][1]["maxRows"] = 30  # so that the two are divided otherwise
    _, report = prepared(prepare_context(work, spec))
    assert any(
        "held-out rows of a occur, nearly word for word, in the training rows of b" in w for w in report.warnings
    )


def test_a_filter_leaves_rows_out_and_says_how_many(work: Path) -> None:
    rows = [row | {"stars": i % 4} for i, row in enumerate(labelled(80, ("bad", "good", "so so")))]
    manifest, report = prepared(
        prepare_context(work, classification(work, rows, filter="stars > 0 and text | length > 5"))
    )
    assert sum([manifest.datasets[0].train, manifest.datasets[0].validation, manifest.datasets[0].test]) == 60
    assert "20 rows removed by the filter" in report.datasets[0].notes


def test_a_few_bad_rows_are_named_and_left_out(work: Path) -> None:
    rows = [*labelled(98), '{"text": "unfinished', {"text": "", "label": "good"}]
    manifest, report = prepared(prepare_context(work, classification(work, rows)))
    assert sum([manifest.datasets[0].train, manifest.datasets[0].validation, manifest.datasets[0].test]) == 98
    assert report.datasets[0].bad_rows == 2
    [note] = [note for note in report.datasets[0].notes if "unusable rows" in note]
    assert "rows.jsonl, row 99: not JSON" in note
    assert "rows.jsonl, row 100: text is empty" in note


def test_the_same_again_is_not_done_again_but_said_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = classification(work, labelled(40))
    first, report = prepared(prepare_context(work, spec))
    monkeypatch.setattr(stage, "open_datasets", lambda *_: pytest.fail("prepared a second time"))
    second, again = prepared(prepare_context(work, spec, number=2))
    assert second == first
    told = ("model", "lengths", "datasets", "origin", "choices", "warnings")
    assert {name: getattr(again, name) for name in told} == {name: getattr(report, name) for name in told}


def test_another_config_or_a_lost_model_prepares_anew(work: Path) -> None:
    spec = classification(work, labelled(40))
    first, _ = prepared(prepare_context(work, spec))
    second, _ = prepared(prepare_context(work, spec | {"split": {"seed": 7}}))
    assert second.digest != first.digest
    same, _ = prepared(prepare_context(work, spec))
    assert same.digest == first.digest, "the content follows from config and data alone"


def test_killed_in_the_middle_nothing_half_written_is_left(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = classification(work, labelled(40))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage.run(prepare_context(work, spec))
    assert not (work / "run" / "prepared").exists()
    (work / "run" / ".prepared-1").mkdir()  # as a SIGKILL leaves it
    (work / "run" / ".prepared-1" / "manifest.json").write_text("{")
    manifest, _ = prepared(prepare_context(work, spec, number=2))
    assert manifest.datasets[0].train == 32
    assert not list((work / "run").glob(".prepared-*"))


def test_an_attempt_that_was_replaced_publishes_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = prepare_context(work, classification(work, labelled(40)))

    def overtaken(*_: Any) -> None:
        (context.run / "fence.json").write_text(json.dumps({"attempt": "uid-1/prepare/2"}))

    monkeypatch.setattr(stage, "report_split", lambda *_, **__: overtaken())
    with pytest.raises(TrainerError) as error:
        stage.run(context)
    assert error.value.failure_class is FailureClass.FENCED
    assert not context.prepared.exists()


def test_a_longer_limit_than_the_model_s_context_is_lowered_and_said(work: Path) -> None:
    rows = [row | {"text": row["text"] + " and on" * 200} for row in labelled(40)]
    spec = classification(work, rows) | {"tuning": {"method": "prompt", "prompt": {"virtualTokens": 100}}}
    manifest, report = prepared(prepare_context(work, spec))
    assert manifest.train.longest <= 500
    assert any("maxSequenceLength 2,048 does not fit into the model's context; 500" in w for w in report.warnings)
    assert any("texts truncated to fit 500 tokens" in note for note in report.datasets[0].notes)


def test_a_base_model_without_a_template_gets_a_plain_one_and_is_told(work: Path) -> None:
    (work / "tiny" / "chat_template.jinja").unlink()
    context = prepare_context(work, classification(work, labelled(40)))
    _, report = prepared(context)
    assert report.choices["chatTemplate"].value == "plain"
    assert any("no chat template" in warning for warning in report.warnings)
    assert AutoTokenizer.from_pretrained(context.prepared / "tokenizer").chat_template


BAD: list[tuple[str, dict[str, Any], FailureClass, str, str]] = [
    ("no such file", {"path": "none.csv"}, FailureClass.BAD_SPEC, "datasets[0].path", "none.csv does not exist"),
    ("no such format", {"path": "tiny/model.safetensors"}, FailureClass.BAD_SPEC, "datasets[0].path",
     "not in a supported format"),
    ("no such column", {"columns": {"text": "txt"}}, FailureClass.BAD_DATA, "datasets[0].columns.text",
     "d has no column 'txt'. Did you mean 'text'? Its columns: text, label."),
    ("column not found", {"task": "summarization"}, FailureClass.BAD_DATA, "datasets[0].columns.summary",
     "d has no column with a usual name for summary"),
    ("no such split", {"splits": {"test": "tests"}}, FailureClass.BAD_SPEC, "datasets[0].splits.test",
     "d has no split 'tests'. Its splits: train."),
    ("no such group", {"groupBy": "autor"}, FailureClass.BAD_DATA, "datasets[0].groupBy", "no column 'autor'"),
    ("filter that names no column", {"filter": "txet | length > 3"}, FailureClass.BAD_SPEC, "datasets[0].filter",
     "The expression uses 'txet', which is not a column of the dataset. Did you mean 'text'?"),
    ("filter that is none", {"filter": "text >"}, FailureClass.BAD_SPEC, "datasets[0].filter",
     "Not a valid Jinja expression"),
    ("filter that leaves nothing", {"filter": "text | length > 5000"}, FailureClass.BAD_DATA, "datasets[0]",
     "the filter removes all 40"),
    ("template that names no column", {"template": "{{ txt }}"}, FailureClass.BAD_SPEC, "datasets[0].template",
     "The template uses 'txt'"),
    ("template that is none", {"template": "{% if %}"}, FailureClass.BAD_SPEC, "datasets[0].template",
     "Not a valid Jinja template"),
    ("template that reaches out of its sandbox", {"template": "{{ text.__class__.__mro__ }}"}, FailureClass.BAD_DATA,
     "datasets[0]", "access to attribute '__class__'"),
    ("template without effect", {"task": "chat", "columns": {"messages": "text"}, "template": "{{ text }}"},
     FailureClass.BAD_SPEC, "datasets[0].template", "template has no effect on task chat"),
    ("configuration of a directory that has none", {"path": "tiny", "config": "x"}, FailureClass.BAD_SPEC,
     "datasets[0].config", "no configuration 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "failure", "field", "sentence"), [case[1:] for case in BAD], ids=[c[0] for c in BAD]
)
def test_a_dataset_that_cannot_be_used_is_refused_with_a_sentence(
    work: Path, settings: dict[str, Any], failure: FailureClass, field: str, sentence: str
) -> None:
    with pytest.raises(TrainerError) as error:
        stage.run(prepare_context(work, classification(work, labelled(40), **settings)))
    assert (error.value.failure_class, error.value.field) == (failure, field)
    assert sentence in error.value.sentence


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "d has no rows"),
        ([{"text": "", "label": "x"}] * 3, "None of the 3 rows of d can be used"),
        (
            [*labelled(90), *[{"text": "x", "label": None}] * 10],
            "Only 90 of 100 rows of d can be used; at most 5% may be unusable",
        ),
        (labelled(40, ("good",)), "d has only one label ('good')"),
    ],
    ids=["empty", "all bad", "a tenth bad", "one label"],
)
def test_rows_that_teach_nothing_are_refused_with_a_sentence(work: Path, rows: list[Any], sentence: str) -> None:
    with pytest.raises(TrainerError) as error:
        stage.run(prepare_context(work, classification(work, rows)))
    assert error.value.failure_class is FailureClass.BAD_DATA
    assert sentence in error.value.sentence


def test_a_held_out_label_that_never_occurs_in_training_is_refused(work: Path) -> None:
    write_rows(work / "data" / "train.jsonl", labelled(40))
    write_rows(work / "data" / "test.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "Good"}])
    spec = {"name": "d", "path": "data", "task": "classification", "splits": {"test": "test"}}
    with pytest.raises(TrainerError, match=r"Label 'Good' of d \(test, row 2\) is held out but never .* mean 'good'"):
        stage.run(prepare_context(work, {"datasets": [spec]}))


def test_rows_longer_than_the_context_are_refused_where_they_may_not_be_cut(work: Path) -> None:
    rows = [{"question": f"q{i} " + "and on " * 200, "answer": "a"} for i in range(40)]
    with pytest.raises(TrainerError, match=r"row 1: [\d,]+ tokens do not fit into 600"):
        stage.run(prepare_context(work, classification(work, rows, task="question-answering")))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantised \(gptq\)"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel is not a causal language model"),
        ({"model_type": "no-such-model"}, "config cannot be read"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused(work: Path, change: dict[str, Any], sentence: str) -> None:
    path = work / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    spec = classification(work, labelled(40)) | {"tuning": {"method": "qlora"}}
    with pytest.raises(TrainerError, match=sentence) as error:
        stage.run(prepare_context(work, spec))
    assert error.value.failure_class is FailureClass.BAD_SPEC


def test_pickled_weights_are_refused(work: Path) -> None:
    (work / "tiny" / "model.safetensors").rename(work / "tiny" / "pytorch_model.bin")
    with pytest.raises(TrainerError, match="pickle files, which can run code"):
        stage.run(prepare_context(work, classification(work, labelled(40))))


def test_a_chat_template_that_cannot_be_used_is_refused(work: Path) -> None:
    model = {"path": "tiny", "chatTemplate": "{{ messages[-1]['content'] }}"}
    with pytest.raises(TrainerError, match=r"set model\.chatTemplate") as error:
        stage.run(prepare_context(work, classification(work, labelled(40)) | {"model": model}))
    assert error.value.field == "model.chatTemplate"


def test_an_adapter_to_go_on_from_is_found_and_named_in_the_origin(work: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = {"path": "tiny", "adapter": {"path": "adapter"}}
    spec = classification(work, labelled(40)) | {"model": model}
    (work / "adapter").mkdir()
    with pytest.raises(TrainerError, match=r"adapter is not an adapter: adapter_config\.json is missing"):
        stage.run(prepare_context(work, spec))
    (work / "adapter" / "adapter_model.safetensors").touch()
    for content, kind in (("{", "damaged"), ('{"peft_type": "IA3"}', "IA3")):
        (work / "adapter" / "adapter_config.json").write_text(content)
        with pytest.raises(
            TrainerError, match=f"adapter is a {kind} adapter; only LoRA adapters can be trained further"
        ):
            stage.run(prepare_context(work, spec))
    base = AutoModelForCausalLM.from_pretrained(work / "tiny")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(work / "adapter")
    manifest, report = prepared(prepare_context(work, spec))
    assert manifest.model.adapter_directory == str(work / "adapter")
    assert report.origin["adapter"].startswith("adapter sha256:")


def adapter_with(work: Path, change: Callable[[Any], None] = lambda model: None, **fields: Any) -> dict[str, Any]:
    """A job that goes on from a LoRA adapter with these fields, saved with its embeddings."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(work / "tiny")
    model = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | fields))
    change(model)
    model.save_pretrained(work / "adapter", save_embedding_layers=True)
    return classification(work, labelled(40)) | {"model": {"path": "tiny", "adapter": {"path": "adapter"}}}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base model too"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base model too"),
        ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices, which is not supported"),
        ({"ensure_weight_tying": True}, "sets ensure_weight_tying, which is not supported"),
        ({"alora_invocation_tokens": [5]}, "sets alora_invocation_tokens, which is not supported"),
    ],
)
def test_an_adapter_that_peft_would_start_otherwise_is_refused(
    work: Path, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(TrainerError, match=f"The adapter cannot be trained further.*{sentence}") as error:
        stage.run(prepare_context(work, adapter_with(work, **fields)))
    assert error.value.field == "model.adapter"


def test_embeddings_in_an_adapter_s_file_must_be_those_of_the_model(work: Path) -> None:
    def train_embeddings(model: Any) -> None:
        model.get_input_embeddings().weight.data[5, 0] += 1e-3

    with pytest.raises(TrainerError, match=r"its file holds .*weight, other than the model's"):
        stage.run(prepare_context(work, adapter_with(work, train_embeddings)))
    prepared(prepare_context(work, adapter_with(work, target_modules=["q_proj", "embed_tokens"])))


def test_biases_of_an_adapter_cannot_be_merged(work: Path) -> None:
    spec = adapter_with(work, lora_bias=True) | {"publish": {"path": "out", "format": "merged"}}
    with pytest.raises(TrainerError, match=r"biases .* cannot be merged"):
        stage.run(prepare_context(work, spec))


def test_packing_is_refused_for_an_architecture_that_cannot_be_packed(work: Path) -> None:
    config = json.loads((work / "tiny/config.json").read_text())
    (work / "tiny/config.json").write_text(json.dumps(config | {"architectures": ["FalconForCausalLM"]}))
    spec = classification(work, labelled(40))
    with pytest.raises(TrainerError, match=r"FalconForCausalLM .* Remove training\.packing") as error:
        stage.run(prepare_context(work, spec | {"training": {"packing": True}}))
    assert error.value.field == "training.packing"
    prepared(prepare_context(work, spec))


def test_a_model_without_attention_is_refused(work: Path) -> None:
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 32, "vocab_size": 260}
    (work / "tiny/config.json").write_text(json.dumps(config))
    with pytest.raises(TrainerError, match="mamba has no attention layers; only transformers can be tuned"):
        stage.run(prepare_context(work, classification(work, labelled(40))))


def test_tokens_without_an_embedding_are_named_before_training(work: Path) -> None:

    tokenizer = AutoTokenizer.from_pretrained(work / "tiny")
    tokenizer.add_tokens(["weather", "never used"])
    tokenizer.save_pretrained(work / "tiny")
    with pytest.raises(TrainerError, match=r"gives 'weather' the id 260, but .* the ids 0 to 259 only"):
        stage.run(prepare_context(work, classification(work, labelled(40))))
    rows = [row | {"text": row["text"].replace("weather", "sun")} for row in labelled(40)]
    prepared(prepare_context(work, classification(work, rows)))


def test_a_tokenizer_without_an_end_token_cannot_end_texts(work: Path) -> None:
    config = json.loads((work / "tiny/tokenizer_config.json").read_text())
    del config["eos_token"]
    (work / "tiny/tokenizer_config.json").write_text(json.dumps(config))
    write_rows(work / "texts.jsonl", [{"text": row["text"]} for row in labelled(40)])
    spec = {"datasets": [{"name": "texts", "path": "texts.jsonl", "task": "text"}]}
    with pytest.raises(TrainerError, match="has no end token, which task text puts after each document"):
        stage.run(prepare_context(work, spec))


def test_qlora_gets_a_four_bit_copy_once(work: Path) -> None:
    spec = classification(work, labelled(40)) | {"tuning": {"method": "qlora"}}
    manifest, _ = prepared(prepare_context(work, spec))
    assert manifest.model.nf4_directory is not None
    copy = Path(manifest.model.nf4_directory)
    config = json.loads((copy / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    made = copy.stat().st_ino
    again, _ = prepared(prepare_context(work, spec | {"split": {"seed": 1}}))
    assert again.model.nf4_directory == str(copy)
    assert copy.stat().st_ino == made


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        (
            [{"text": f"text {i}", "label": ("Good", " good ", "bad")[i % 3]} for i in range(60)],
            "labels that differ only in case or spaces are classes of their own: 'Good' (20 rows) and 'good' (20 rows)",
        ),
        (
            [{"text": f"text {i // 2}", "label": "good" if i % 4 else "bad"} for i in range(60)],
            "d: 15 texts occur with different labels",
        ),
        (
            [{"text": f"text {i}", "label": f"l{i}"} for i in range(40)],
            "d has 40 labels for 40 rows, so most labels have one example: check columns.label",
        ),
    ],
    ids=["case", "contradiction", "as many as rows"],
)
def test_labels_that_look_like_a_mistake_are_warned_of(work: Path, rows: list[Any], warning: str) -> None:
    _, report = prepared(prepare_context(work, classification(work, rows)))
    assert any(warning in said for said in report.warnings)


def test_rows_without_a_text_are_told_apart_by_all_of_their_columns(work: Path) -> None:
    rows = [{"height": i, "width": i * i, "label": ("small", "large")[i > 30]} for i in range(60)]
    _, report = prepared(prepare_context(work, classification(work, rows, template="{{ height }} x {{ width }}")))
    assert not any("different labels" in said for said in report.warnings)
    assert "60 rows have no text, so of their near-duplicates only equal rows are found" in report.datasets[0].notes


def test_what_was_chosen_for_the_data_is_said(work: Path) -> None:
    lines = ["frage;context;antwort", *(f'"Who {i}?";Ann {i}.;"[\'Ann {i}\']"' for i in range(29)), '"Who?";Ann.;[]']
    (work / "data").mkdir()
    (work / "data" / "train.csv").write_text("\n".join(lines), encoding="utf-16")
    write_rows(work / "data" / "test.jsonl", [{"frage": "Who?", "context": "Ann.", "antwort": "Ann"}])
    columns = {"question": "frage", "answer": "antwort"}
    dataset = {"name": "d", "path": "data", "task": "question-answering", "columns": columns}
    _, report = prepared(prepare_context(work, {"datasets": [dataset], "evaluation": {"gate": {"mustImprove": False}}}))
    assert report.datasets[0].notes[:5] == [
        "train.csv: UTF-16, fields separated by semicolons",
        "splits that are not used: test (datasets[].splits says which are)",
        "answers are lists written as text: every entry is right, and the first is learnt",
        "1 questions have no answer: the model learns to say 'unanswerable'",
        "evaluated on the unseen half of validation",
    ]


def test_texts_that_hold_the_special_tokens_of_a_model_are_counted(work: Path) -> None:
    rows = [{"text": f"<fim_prefix>def f{i}(x):<fim_suffix>\n<fim_middle>return {i}"} for i in range(30)]
    write_rows(work / "rows.jsonl", [*rows, *({"text": f"plain text {i}, a<b|c>d"} for i in range(30))])
    dataset = {"name": "d", "path": "rows.jsonl", "task": "text"}
    said = {}
    for tokens in ("text", "control"):
        context = prepare_context(work, {"datasets": [dataset | {"specialTokens": tokens}]})
        _, report = prepared(context)
        [said[tokens]] = [note for note in report.datasets[0].notes if "marks" in note]
    assert said["text"].startswith("30 texts hold marks such as <fim_prefix>, read letter by letter as any other text")
    assert said["control"].endswith("read as special tokens where the tokenizer has them (specialTokens: control)")


def test_alpaca_rows_with_a_template_are_no_near_duplicates_of_each_other(work: Path) -> None:
    rows = [{"instruction": f"Name the {i}th number.", "input": "", "output": f"It is {i}."} for i in range(100)]
    write_rows(work / "rows.jsonl", rows)
    dataset = {"name": "d", "path": "rows.jsonl", "columns": {"answer": "output"}, "task": "question-answering"}
    template = "{{ instruction }}\n{{ input }}"
    manifest, report = prepared(prepare_context(work, {"datasets": [dataset | {"template": template}]}))
    assert (manifest.datasets[0].train, manifest.datasets[0].test) == (80, 10)
    assert "no held-out row occurs in the training rows of any dataset" in report.datasets[0].notes
    assert not any("near-duplicates" in note for note in report.datasets[0].notes)
    write_rows(work / "more.jsonl", [*rows, *({**row, "output": "Another."} for row in rows[:10])])
    _, report = prepared(prepare_context(work, {"datasets": [dataset | {"path": "more.jsonl", "template": template}]}))
    assert any("10 rows are near-duplicates of others" in note for note in report.datasets[0].notes)
