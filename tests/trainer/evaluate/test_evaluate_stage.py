"""Evaluate as a stage: what it writes, what each field changes, how several ranks share the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.support.evaluation_runs import EvaluationRun, evaluated_run
from tests.support.ranks import run_ranks

from finetune_api.report import FailureClass, MetricResult, Results
from finetune_api.traits import Task
from finetune_trainer.context import context_from_environment
from finetune_trainer.data.evaluation_rows import EvaluationRow
from finetune_trainer.digest import export_digest
from finetune_trainer.evaluate import stage
from finetune_trainer.evaluate.compare import DatasetAnswers
from finetune_trainer.evaluate.metrics import Answer
from finetune_trainer.failures import TrainerError

Changed = Callable[..., EvaluationRun]


def results_of(run: EvaluationRun) -> Results:
    results = run.report().results
    assert results is not None
    return results


def metric(run: EvaluationRun, dataset: str, name: str) -> MetricResult:
    return next(m for m in results_of(run).metrics if (m.dataset, m.metric) == (dataset, name))


def predictions(run: EvaluationRun, dataset: str) -> list[dict[str, Any]]:
    lines = (run.path / "evaluation/predictions.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["dataset"] == dataset]


# -- what is written --------------------------------------------------------------------------------------------


def test_a_tuned_model_that_learnt_something_passes_the_gate(evaluated: EvaluationRun) -> None:
    assert evaluated.report().done
    assert results_of(evaluated).gate.reason == "improved"
    accuracy = metric(evaluated, "classification", "accuracy")
    assert accuracy.primary
    assert accuracy.base is not None
    assert accuracy.tuned > accuracy.base + 0.2


def test_results_report_and_predictions_tell_the_same(evaluated: EvaluationRun) -> None:
    written = Results.model_validate_json((evaluated.path / "evaluation/results.json").read_text())
    assert written == results_of(evaluated)
    lines = predictions(evaluated, "classification")
    assert len(lines) == 40
    right = sum(line["tuned"]["answer"] == line["gold"] for line in lines) / 40
    assert right == pytest.approx(metric(evaluated, "classification", "accuracy").tuned)
    free = predictions(evaluated, "question-answering")
    matched = sum(line["tuned"] in line["gold"] for line in free) / 40
    assert matched == pytest.approx(metric(evaluated, "question-answering", "exact-match").tuned)


def test_the_digest_is_that_of_the_export_and_the_export_is_untouched(evaluated: EvaluationRun) -> None:
    assert results_of(evaluated).export_digest == export_digest(evaluated.path / "export")


def test_every_task_has_its_metrics_and_the_macro_mean_is_last(evaluated: EvaluationRun) -> None:
    primary = [(m.dataset, m.metric) for m in results_of(evaluated).metrics if m.primary]
    assert primary == [
        ("classification", "accuracy"),
        ("multiple-choice", "accuracy"),
        ("question-answering", "f1"),
        ("summarization", "rouge-l"),
        ("chat", "neg-loss"),
        ("macro", "primary"),
    ]
    assert results_of(evaluated).metrics[-1].dataset == "macro"


def test_baselines_stand_beside_a_classification(evaluated: EvaluationRun) -> None:
    baselines = metric(evaluated, "classification", "accuracy").baselines
    assert baselines.keys() == {"majority", "tfidf-logreg", "tfidf-logreg-all", "few-shot"}
    assert baselines["tfidf-logreg"] > baselines["majority"]
    assert metric(evaluated, "question-answering", "f1").baselines.keys() == {"few-shot"}


def test_few_shot_prompts_are_answered_by_the_base_model(evaluated: EvaluationRun) -> None:
    lines = predictions(evaluated, "multiple-choice")
    assert all(line["few-shot"]["scores"] != line["base"]["scores"] for line in lines)


def test_prompts_of_the_spec_are_answered_on_the_page_by_both_models(evaluated: EvaluationRun) -> None:
    [prompt] = evaluated.config.spec.evaluation.prompts
    page = (evaluated.path / "evaluation/report.html").read_text()
    answers = page.partition("<h2>Prompts side by side</h2>")[2].partition(prompt)[2].partition("</section>")[0]
    assert answers.count("Base</span>") == answers.count("Tuned</span>") == 1


def test_the_first_held_out_instructions_are_answered_on_the_page_by_both_models(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, tasks=[Task.INSTRUCTION], rows=6, steps=0)
    page = (run.path / "evaluation/report.html").read_text()
    answers = page.partition("<h2>Prompts side by side</h2>")[2].partition("<h2>")[0]
    assert answers.count("In the data: ") == answers.count("instruction/") == 3
    assert answers.count("Base</span>") == answers.count("Tuned</span>") == 3 + len(run.config.spec.evaluation.prompts)


def test_the_base_scores_are_those_of_the_untouched_base(evaluated: EvaluationRun) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from finetune_trainer.data.evaluation_rows import read_evaluation
    from finetune_trainer.evaluate.answers import closed
    from finetune_trainer.evaluate.likelihood import plain_scores

    model = AutoModelForCausalLM.from_pretrained(evaluated.manifest.model.directory, dtype=torch.float32).eval()
    rows = list(read_evaluation(evaluated.path / "prepared/evaluation/classification.jsonl"))[:10]
    expected = plain_scores(model, [closed(row) for row in rows])
    for line, scores in zip(predictions(evaluated, "classification"), expected, strict=False):
        assert line["base"]["scores"] == pytest.approx(scores, abs=1e-3)


def test_progress_and_choices_are_reported(evaluated: EvaluationRun) -> None:
    report = evaluated.report()
    assert report.progress.unit == "rows"
    assert report.progress.total == 3 * 5 * 40
    assert report.choices["evaluation.scoring.tuned"].value == "tree"
    assert report.origin["model"] == "acme/tiny-base@" + "b" * 40
    assert report.origin["versions"].keys() >= {"torch", "transformers", "peft", "finetune-operator"}


def test_thoughts_are_counted_and_unfinished_ones_are_a_warning(evaluated: EvaluationRun) -> None:
    rows = [EvaluationRow(str(n), "q", "question-answering") for n in range(3)]
    tuned = [Answer(), Answer(thought="finished"), Answer(thought="finished")]
    base = [Answer(), Answer(), Answer(thought="unfinished")]
    context = evaluated.context(number=2)
    stage._report_thoughts(context, [DatasetAnswers("q", Task.QUESTION_ANSWERING, rows, tuned, base)])
    report = context.reporter.report
    assert report.choices["evaluation.thoughts.q.tuned"].why.startswith("2 of 3 answers begin with a thought")
    assert report.warnings == [
        "1 of 3 answers to q (base) were still a thought after 136 tokens and are scored as empty: "
        "raise evaluation.maxNewTokens."
    ]


# -- what each field changes ------------------------------------------------------------------------------------


def test_without_a_baseline_the_base_is_not_measured(changed: Changed) -> None:
    run = changed(evaluation={"baseline": False, "prompts": []})
    stage.run(run.context())
    assert all(m.base is None and m.difference is None for m in results_of(run).metrics)
    assert all(line["base"] is None for line in predictions(run, "classification"))
    assert "few-shot" not in metric(run, "classification", "accuracy").baselines
    assert results_of(run).gate.reason == "not-asked"
    assert "evaluation.baseline: false" in results_of(run).gate.sentence


def test_max_rows_draws_rows_with_the_seed(changed: Changed) -> None:
    drawn = []
    for seed in (1, 1, 2):
        run = changed(evaluation={"maxRows": 12, "baseline": False, "prompts": []}, split={"seed": seed})
        stage.run(run.context())
        drawn.append([line["id"] for line in predictions(run, "classification")])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 12
    assert len(set(drawn[0])) == 12


def test_too_few_rows_are_undecided(changed: Changed) -> None:
    run = changed(evaluation={"maxRows": 12, "prompts": []})
    stage.run(run.context())
    assert results_of(run).gate.reason == "undecided"
    assert not results_of(run).gate.passed


def test_max_new_tokens_cuts_free_answers(changed: Changed) -> None:
    run = changed(evaluation={"maxNewTokens": 1, "baseline": False, "maxRows": 3, "prompts": []})
    stage.run(run.context())
    assert {len(line["tuned"]) for line in predictions(run, "question-answering")} <= {0, 1}


def test_a_metric_that_no_dataset_can_have_is_said(changed: Changed) -> None:
    from finetune_trainer.data.manifest import PreparedManifest

    run = changed(evaluation={"metrics": ["bleu"], "baseline": False, "maxRows": 3, "prompts": []})
    manifest = PreparedManifest.read(run.path / "prepared")
    manifest.model_copy(update={"datasets": manifest.datasets[:1]}).write(run.path / "prepared")
    only = run.config.spec.model_copy(update={"datasets": run.config.spec.datasets[:1]})
    run = EvaluationRun(run.config.model_copy(update={"spec": only}), run.manifest)
    stage.run(run.context())
    assert run.report().warnings == [
        "evaluation.metrics: bleu applies only to question-answering, summarization; this job has no such dataset."
    ]


# -- what can be wrong ------------------------------------------------------------------------------------------


def sentence(run: EvaluationRun) -> TrainerError:
    with pytest.raises(TrainerError) as error:
        stage.run(run.context())
    return error.value


def test_without_an_export_the_train_stage_is_named(changed: Changed) -> None:
    run = changed()
    for path in (run.path / "export").iterdir():
        path.unlink()
    error = sentence(run)
    assert error.failure_class is FailureClass.BAD_DATA
    assert "the Train stage has to finish first" in error.sentence


def test_an_altered_export_is_not_measured(changed: Changed) -> None:
    run = changed()
    (run.path / "export/extra.json").write_text("{}")
    assert "extra.json was added" in sentence(run).sentence


def test_damaged_prepared_data_is_named(changed: Changed) -> None:
    run = changed()
    (run.path / "prepared/manifest.json").write_text("{")
    assert "run the Prepare stage again" in sentence(run).sentence


def test_a_dataset_without_held_out_rows_is_a_warning_and_without_any_nothing_is_measured(changed: Changed) -> None:
    run = changed(evaluation={"baseline": False, "maxRows": 2, "prompts": [], "gate": {"mustImprove": False}})
    rows = run.path / "prepared/evaluation"
    (rows / "chat.jsonl").write_text("")
    stage.run(run.context())
    assert "Dataset chat has no held-out rows, so it is not evaluated." in run.report().warnings
    for path in rows.iterdir():
        path.unlink()
    stage.run(run.context())
    results = results_of(run)
    assert (results.metrics, results.gate.passed, results.gate.reason) == ([], True, "not-measured")
    page = (run.path / "evaluation/report.html").read_text()
    assert "Nothing was measured" in page
    assert "<h2>Results</h2>" not in page
    card = (run.path / "evaluation/model-card.md").read_text()
    assert "Nothing was measured" in card
    assert "It was not evaluated" in card
    assert "## Results" not in card


# -- several ranks ----------------------------------------------------------------------------------------------


def evaluate_on_rank(config: str, attempt: str) -> None:
    environment = {"FINETUNE_RUN_CONFIG": config, "FINETUNE_ATTEMPT": attempt}
    ranks = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    stage.run(context_from_environment(environment | ranks))


def test_two_ranks_say_what_one_says(changed: Changed, evaluated: EvaluationRun) -> None:
    run = changed()
    environment = run.environment()
    config, attempt = environment["FINETUNE_RUN_CONFIG"], environment["FINETUNE_ATTEMPT"]
    run_ranks(2, evaluate_on_rank, config, attempt, timeout=280)
    for one, two in zip(results_of(evaluated).metrics, results_of(run).metrics, strict=True):
        assert (one.dataset, one.metric, one.rows) == (two.dataset, two.metric, two.rows)
        assert two.tuned == pytest.approx(one.tuned, rel=1e-4)
        assert two.base == pytest.approx(one.base, rel=1e-4)
    assert [line["id"] for line in predictions(run, "chat")] == [line["id"] for line in predictions(evaluated, "chat")]
    assert run.report().origin["ranks"] == 2
    assert run.report().progress.step == run.report().progress.total
