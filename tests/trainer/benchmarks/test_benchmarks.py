"""Every benchmark runs at its smallest, on a tiny model, and its figures are what they say they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import checkpoint, convergence, evaluate, flops, gpu, jobs, limit, peers, prepare, scaling, startup
from benchmarks.harness import QUICK, Result, Table, ratios
from benchmarks.jobs import Model, Workload
from tests.support.prepare_runs import labelled
from tests.support.time_limits import scaled
from tests.support.tiny import tiny_llama

CLASSIFIED = {"task": "classification", "columns": {"text": "text", "label": "label"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("benchmarks")
    return Model(tiny_llama(folder / "tiny"), folder / "cache")


def rows(count: int = 24) -> Workload:
    return Workload("tweets", labelled(count), CLASSIFIED, examples_per_step=4)


def test_both_trainers_are_compared_on_the_same_documents_in_pairs(model: Model, tmp_path: Path) -> None:
    found = peers.compare(rows(), model, tmp_path, pairs=2)
    own = found["samples"][peers.OURS]
    assert len(own) == 2
    given = json.loads((tmp_path / "trl-rows.json").read_text())
    # Two warm-up steps came first: what is measured are the third and the fourth step's documents.
    assert [sample["tokens"] for sample in own] == [
        sum(len(row["input_ids"]) for row in given[step * 4 : step * 4 + 4]) for step in (2, 3)
    ]
    for row in given:
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    found["samples"]["TRL, padded"] = [{**sample, "seconds": 2 * sample["seconds"]} for sample in own]
    assert peers.best_of(found) == ("TRL, padded", pytest.approx(2))
    assert [row[0] for row in peers.summarise(found).rows] == [peers.OURS, "TRL, padded"]


def test_what_is_needed_is_what_torch_counts(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    directory = tiny_llama(tmp_path, hidden=64, heads=4, key_value_heads=2, intermediate=128)
    base = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    ids = torch.arange(4, 68)[None]
    with FlopCounterMode(display=False) as counter:
        base(ids).logits.sum().backward()
    full = flops.flops_of(directory, rank=0, full=True)
    # Eager attention computes the half that is masked too.
    needed = full.of_step(64, 2 * 64**2, 64)
    assert counter.get_total_flops() == pytest.approx(needed, rel=0.02)


def test_utilisation_is_measured_beside_a_product_and_a_profile(model: Model, tmp_path: Path) -> None:
    found = limit.measure(rows(), model, tmp_path, steps=1)
    assert 0 < found["samples"][0]["utilisation"] < 1
    assert found["samples"][0]["ofOwnProducts"] > 0
    assert sum(found["profileShares"].values()) == pytest.approx(1)
    assert found["profileShares"]["matrix products"] > 0


def test_starts_are_told_by_part(model: Model, tmp_path: Path) -> None:
    found = startup.measure(rows(), model, tmp_path, starts=1)
    for stage, parts in startup.PARTS.items():
        (start,) = found[stage]
        assert set(start["seconds"]) == set(parts)
        assert all(seconds >= 0 for seconds in start["seconds"].values())
        assert 0 < start["importedMB"] <= start["peakMB"]
    assert "torch" in found["imports"]


def test_a_save_holds_the_loop_for_less_than_it_takes() -> None:
    found = checkpoint.saves(60_000, repetitions=2)
    assert set(map(len, found.values())) == {2}
    assert all(held <= published for held, published in zip(*list(found.values())[:2], strict=True))


def test_rows_are_prepared_by_a_process_of_their_own(model: Model, tmp_path: Path) -> None:
    found = prepare.prepare_rows(model, tmp_path, labelled(40))
    assert found["rows"] == 40
    assert found["tokens"] > 40
    assert found["peakMegabytes"] >= found["ownPeakMegabytes"] > 0


def test_labels_score_alike_however_they_are_scored(model: Model, tmp_path: Path) -> None:
    labels = jobs.INTENTS[:5]
    workload = jobs.intents(40, labels=labels)
    job = jobs.prepare(tmp_path, model, workload, split={"validation": 0, "test": 0.25})
    closed = evaluate.closed_rows(job, "intents")[:3]
    with evaluate.loaded(job) as (loaded, tokenizer):
        scored = evaluate.score_labels(loaded, closed, rounds=1)
        generated = evaluate.generate(loaded, tokenizer, [row.prompt for row in closed], rounds=1, new_tokens=2)
    assert scored["labels"] == 5
    assert scored["apart"] < (1e-3 if loaded.dtype == torch.float32 else 1.0)
    assert all(seconds > 0 for values in generated["seconds"].values() for seconds in values)


def test_two_ranks_share_a_step_and_tell_how_long_they_talk(model: Model, tmp_path: Path) -> None:
    profiled, *samples = scaling.measure(rows(), model, tmp_path, ranks=2, steps=1)
    assert 0 < profiled["communicationShare"] < 1
    assert samples[0]["documents"] == 4


@pytest.mark.parametrize("hybrid", [False, True])
def test_on_paper_one_node_sends_nothing_to_others(hybrid: bool) -> None:
    alone = scaling.traffic(scaling.Cluster(1, 8), 16e9, 1e8, hybrid)
    assert alone.between == 0
    assert alone.within == pytest.approx((2 * 16e9 + 1e8) * 7 / 8)


def test_a_loss_is_reached_when_it_was_first_seen() -> None:
    samples = [{"seconds": 2.0, "validationLoss": loss} if loss else {"seconds": 2.0} for loss in (3.0, 0, 1.0, 2.0)]
    points = convergence.curve(samples)
    assert points == [(2.0, 3.0), (6.0, 1.0), (8.0, 2.0)]
    assert convergence.seconds_to(points, 2.0) == 6.0


def test_on_paper_hybrid_sends_gradients_between_nodes_and_full_the_weights() -> None:
    cluster = scaling.Cluster(3, 4)
    full, hybrid = (scaling.traffic(cluster, 16e9, 1e8, how) for how in (False, True))
    assert full.between == pytest.approx((2 * 16e9 + 1e8) * 11 / 12)
    assert hybrid.between == pytest.approx(2 * 1e8 * 2 / 3)
    assert len(list(scaling.paper())) == 12


def test_the_gpu_script_runs_tiny_from_what_it_carries_and_says_what_it_left_out(tmp_path: Path) -> None:
    out, carried = tmp_path / "gpu.json", tmp_path / "carried"
    gpu.copy_sources(carried)
    command = [sys.executable, str(carried / "benchmarks" / "gpu.py"), "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(200), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    paths, *speeds = result["cases"]
    assert {name: paths[name]["outcome"] for name in ("fused AdamW", "asynchronous checkpoint")} == {
        "fused AdamW": "ok",
        "asynchronous checkpoint": "ok",
    }
    measured = [case for case in speeds if case["outcome"] == "ok"]
    assert {case["case"]["method"] for case in measured} == {"lora", "qlora"}
    assert all(case["tokensPerSecond"] > 0 and case["plannedBytes"] > 0 for case in measured)
    if not torch.cuda.is_available():
        assert paths["lack of memory"]["outcome"] == "not run"


def test_a_result_is_kept_with_its_machine_and_versions(tmp_path: Path) -> None:
    result = Result("one", {"factor": 2.0}, [Table("Title", ("", "x"), [("a", "1")])], ["A note."])
    kept = json.loads(result.write(QUICK, tmp_path).read_text())
    assert kept["machine"]["cores"] >= 1
    assert kept["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert kept["size"] == "quick"
    assert "**Title**" in result.text()
    assert "- A note." in result.text()


def test_ratios_are_of_pairs() -> None:
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


def test_trl_gets_batches_that_are_no_longer_than_two_rows_and_ours_in_all() -> None:
    for examples, longest in ((9, 150), (4, 700), (8, 480)):
        for settings in peers.settings_of_trl(examples, examples * longest, longest, "bfloat16").values():
            together, parts = (
                settings[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
            )
            assert settings.get("packing") or together * parts == examples
            assert together == 1 or together * longest <= 2 * peers.ROW_OF_TRL
