"""`finetune run` with a scripted trainer: real processes, signals, files and decisions, and no torch."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
from tests.support.local_runs import Workspace, job, until
from tests.support.time_limits import scaled

from finetune_api.base import Stage
from finetune_api.status import ConditionType
from finetune_operator.cli import run_command_line
from finetune_operator.errors import UserError
from finetune_operator.local.jobfile import record
from finetune_operator.local.processes import process_table


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def attempts(workspace: Workspace, stage: Stage = Stage.TRAIN) -> list[tuple[str, str | None, bool]]:
    records = [r for r in workspace.record.status.attempts if r.stage is stage]
    return [(r.outcome, r.reason, r.counted) for r in records]


def test_a_job_goes_through_its_four_stages(workspace: Workspace) -> None:
    assert workspace.run() == 0
    programs = [entry["program"] for entry in workspace.trace()]
    assert programs == ["check-publish", "prepare", "train", "train", "evaluate", "publish"]
    assert [str(event.reason) for event in workspace.heard.events][-1] == "Complete"
    assert json.loads((workspace.record.run / "status.json").read_text())["kind"] == "FineTuneJob"


def test_a_finished_job_does_nothing_when_run_again(workspace: Workspace) -> None:
    workspace.run()
    before = workspace.trace()
    again = workspace.finetune("run", "job.yaml")
    assert again.returncode == 0
    assert "already complete" in again.stderr
    assert workspace.trace() == before


def test_each_process_sees_only_its_own_tokens(workspace: Workspace) -> None:
    secrets = {"HF_TOKEN": "hf_read", "HF_PUBLISH_TOKEN": "hf_write", "WANDB_API_KEY": "wandb_key"}
    workspace.write(job(model={"repo": "acme/base"}))
    assert workspace.run(**secrets) == 0
    seen = {entry["program"]: entry["tokens"] for entry in workspace.trace()}
    assert seen == {
        "check-publish": {"publish": "hf_write"},
        "fetch": {"hub": "hf_read"},
        "prepare": {},
        "train": {"wandb": "wandb_key"},
        "evaluate": {},
        "publish": {"publish": "hf_write"},
    }
    for entry in workspace.trace():
        online = entry["program"] in ("check-publish", "fetch", "publish")
        assert ("HF_HUB_OFFLINE" in entry["environ"]) is not online
        assert entry["mode"] == "0o700"
        assert not any(secret in text for secret in secrets.values() for text in entry["environ"].values())
        assert not any(secret in text for secret in secrets.values() for text in entry["arguments"])
        assert not Path(entry["environ"]["FINETUNE_TOKENS"]).exists()
    kept = b"".join(
        file.read_bytes() for file in workspace.record.run.rglob("*") if file.is_file() and file.suffix != ".jsonl"
    )
    assert not any(secret.encode() in kept for secret in secrets.values())


def test_ranks_meet_on_loopback_with_the_variables_of_the_pods(workspace: Workspace) -> None:
    resource = job(podTemplate={"env": [{"name": "MY_FLAG", "value": "1"}]})
    workspace.write(resource)
    workspace.run()
    first, second = (entry["environ"] for entry in workspace.trace() if entry["program"] == "train")
    assert {first["PET_NODE_RANK"], second["PET_NODE_RANK"]} == {"0", "1"}
    assert first["PET_MASTER_PORT"] == second["PET_MASTER_PORT"]
    assert (first["PET_NNODES"], first["PET_NPROC_PER_NODE"], first["PET_MASTER_ADDR"]) == ("2", "1", "127.0.0.1")
    assert first["MY_FLAG"] == "1"
    assert first["CUDA_VISIBLE_DEVICES"] == ""


def test_a_crash_is_counted_and_tried_again(workspace: Workspace) -> None:
    workspace.script(train=[{"fail": "crash", "at": 2, "sentence": "The wheel came off."}, {}])
    assert workspace.run() == 0
    assert attempts(workspace) == [("failed", "crash", True), ("succeeded", None, False)]
    assert workspace.record.status.attempts[1].message == "The wheel came off."


def test_a_rank_that_is_killed_is_a_crash_that_says_so(workspace: Workspace) -> None:
    workspace.script(prepare=[{"kill": True}, {}])
    assert workspace.run() == 0
    killed = workspace.record.status.attempts[0]
    assert (killed.reason, killed.counted) == ("crash", True)
    assert "SIGKILL" in killed.message


def test_crashes_beyond_the_limit_fail_the_job_with_the_cause(workspace: Workspace) -> None:
    workspace.write(job(retry={"limit": 1}), train=[{"fail": "crash", "sentence": "The wheel came off."}])
    assert workspace.run() == 1
    failed = workspace.record.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert "The wheel came off." in failed.message
    assert "retry.limit 1" in failed.message


def test_a_failed_job_goes_on_from_its_failed_stage_with_retry(workspace: Workspace) -> None:
    workspace.write(job(retry={"limit": 0}), evaluate=[{"fail": "crash", "sentence": "The wheel came off."}])
    failed = workspace.finetune("run", "job.yaml", together=True)
    assert failed.returncode == 1
    assert failed.stdout.count("The wheel came off.") == 1, "who reads both streams is told once"
    hint = workspace.finetune("run", "job.yaml")
    assert hint.returncode == 1
    assert "--retry" in hint.stderr
    assert hint.stderr.count("The wheel came off.") == 1
    workspace.script()
    assert workspace.run(retry=True) == 0
    assert len(attempts(workspace, Stage.TRAIN)) == 1


def test_gpu_memory_that_runs_out_halves_the_micro_batch(workspace: Workspace) -> None:
    workspace.script(train=[{"fail": "cuda-oom"}, {"fail": "cuda-oom"}, {}])
    assert workspace.run() == 0
    tokens = [entry["attempt"]["microBatchTokens"] for entry in workspace.trace() if entry["program"] == "train"]
    assert tokens[::2] == [1024, 512, 300]


def test_a_hang_that_the_ranks_report_is_counted_and_tried_again(workspace: Workspace) -> None:
    workspace.script(train=[{"fail": "hang", "at": 1}, {}])
    assert workspace.run() == 0
    assert attempts(workspace)[0] == ("failed", "hang", True)


def test_a_refused_gate_ends_with_exit_code_3_and_publishes_nothing(workspace: Workspace) -> None:
    workspace.script(evaluate=[{"gate": "refused"}])
    assert workspace.run() == 3
    assert "publish" not in [entry["program"] for entry in workspace.trace()]


def test_a_bad_spec_found_by_the_trainer_ends_with_exit_code_2(workspace: Workspace) -> None:
    workspace.script(prepare=[{"fail": "bad-spec", "sentence": "There is no column txt."}])
    assert workspace.run() == 2


def test_without_write_access_nothing_is_downloaded(workspace: Workspace) -> None:
    workspace.script(check_publish=[{"fail": "no-access", "sentence": "The token cannot write to acme/llama."}])
    assert workspace.run() == 1
    assert [entry["program"] for entry in workspace.trace()] == ["check-publish"]
    failed = workspace.record.status.condition(ConditionType.FAILED)
    assert failed is not None
    assert "acme/llama" in failed.message


def test_what_stops_a_download_has_its_own_class_and_is_tried_again(workspace: Workspace) -> None:
    away = {"fail": "hub-unavailable", "sentence": "The Hub did not deliver acme/base (status 503)."}
    workspace.write(job(model={"repo": "acme/base"}), fetch=[away, {"kill": True}, {}])
    assert workspace.run() == 0
    reasons = [reason for _, reason, _ in attempts(workspace, Stage.PREPARE)]
    assert reasons == ["hub-unavailable", "crash", None]
    assert workspace.record.status.attempts[0].message == away["sentence"]
    programs = [entry["program"] for entry in workspace.trace()]
    assert programs[:7] == ["check-publish", "fetch"] * 3 + ["prepare"]
    assert (workspace.record.run / "logs" / "prepare-1" / "fetch.log").exists()


def test_no_space_left_is_said_in_a_sentence(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, value: object, indent: int | None = None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(record, "write_json", full)
    monkeypatch.chdir(workspace.root)
    assert run_command_line(["run", "job.yaml"]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "status.json" in said
    assert "Free some space" in said


# Stopping and going on -------------------------------------------------------------------------------


def test_ctrl_c_checkpoints_and_the_same_command_goes_on(workspace: Workspace) -> None:
    workspace.script(train=[{"endless": True}, {"steps": 60}])
    process = workspace.start()
    workspace.wait_for_step(3)
    process.send_signal(signal.SIGINT)
    assert process.wait(scaled(20)) == 130
    status = workspace.record.status
    assert status.is_true(ConditionType.SUSPENDED)
    assert status.last_checkpoint is not None
    assert workspace.run() == 0
    first, second = [r for r in workspace.record.status.attempts if r.stage is Stage.TRAIN]
    assert (first.outcome, first.counted) == ("suspended", False)
    assert second.resumed_from_step == status.last_checkpoint.step


def test_a_second_ctrl_c_ends_what_does_not_listen(workspace: Workspace) -> None:
    workspace.script(train=[{"endless": True, "stubborn": True}])
    process = workspace.start(grace=600)
    workspace.wait_for_step(1)
    process.send_signal(signal.SIGINT)
    until(lambda: workspace.record.status.phase == "Suspending")
    process.send_signal(signal.SIGINT)
    assert process.wait(scaled(20)) == 130
    assert not process_table.marked(workspace.record.uid)


def test_what_does_not_listen_is_killed_after_the_grace_period(workspace: Workspace) -> None:
    workspace.script(train=[{"endless": True, "stubborn": True}])
    process = workspace.start(grace=1)
    workspace.wait_for_step(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(scaled(20)) == 130
    assert not process_table.marked(workspace.record.uid)


def test_a_killed_run_leaves_orphans_that_the_next_one_ends(workspace: Workspace) -> None:
    workspace.script(train=[{"endless": True, "stubborn": True}, {}])
    process = workspace.start(grace=1)
    workspace.wait_for_step(1)
    process.kill()
    process.wait()
    uid = workspace.record.uid
    assert process_table.marked(uid)
    assert workspace.run() == 0
    assert not process_table.marked(uid)
    assert any("left behind" in note for note in workspace.heard.notes)
    assert attempts(workspace) == [("failed", "preempted", False), ("succeeded", None, False)]


def test_a_killed_run_asks_its_ranks_to_checkpoint(workspace: Workspace) -> None:
    workspace.script(train=[{"endless": True}, {"steps": 1}])
    process = workspace.start()
    workspace.wait_for_step(3)
    process.kill()
    process.wait()
    until(lambda: not process_table.marked(workspace.record.uid))
    assert workspace.run() == 0
    assert (workspace.record.status.last_checkpoint or pytest.fail("no checkpoint")).step >= 3


def test_a_second_run_of_the_same_job_is_refused_while_the_first_one_runs(workspace: Workspace) -> None:
    workspace.script(prepare=[{"endless": True}])
    process = workspace.start()
    until(lambda: (workspace.directory / ".lock").exists() and (workspace.directory / ".lock").read_text())
    second = workspace.finetune("run", "job.yaml")
    assert second.returncode == 1
    assert f"is already running (process {process.pid})" in second.stderr
    process.terminate()
    assert process.wait(scaled(20)) == 130


def test_suspend_in_the_file_starts_nothing_and_says_how_to_go_on(workspace: Workspace) -> None:
    workspace.write(job(suspend=True))
    stopped = workspace.finetune("run", "job.yaml")
    assert stopped.returncode == 130
    assert "--set suspend=false" in stopped.stderr
    assert not (workspace.record.run / "trace.jsonl").exists()
    assert workspace.finetune("run", "job.yaml", "--set", "suspend=false").returncode == 0


# A changed spec --------------------------------------------------------------------------------------


def test_a_changed_spec_is_refused_with_the_field_that_changed(workspace: Workspace) -> None:
    workspace.run()
    workspace.write(job(training={"epochs": 7}))
    with pytest.raises(UserError, match=r"training\.epochs \(2\.0 → 7\.0\)") as caught:
        workspace.run()
    assert caught.value.exit_code == 2


def test_fresh_starts_over_beside_what_was_done(workspace: Workspace) -> None:
    workspace.run()
    first = workspace.record.run
    workspace.write(job(training={"epochs": 7}))
    assert workspace.run(fresh=True) == 0
    assert workspace.record.run != first
    assert (first / "status.json").exists()


def test_what_may_change_changes_under_a_stopped_job(workspace: Workspace) -> None:
    workspace.write(job(suspend=True))
    assert workspace.run() == 130
    workspace.write(job(topology={"nodes": 3, "gpusPerNode": 0}, retry={"limit": 7}, timeouts={"hang": "1m"}))
    assert workspace.run() == 0
    trains = [entry for entry in workspace.trace() if entry["program"] == "train"]
    assert len(trains) == 3
    assert trains[0]["attempt"]["hangSeconds"] == 60
    assert workspace.record.job.metadata.generation == 2


def test_a_spec_that_failed_before_training_can_be_corrected(workspace: Workspace) -> None:
    workspace.write(job(), prepare=[{"fail": "bad-spec", "sentence": "There is no column txt."}])
    assert workspace.run() == 2
    workspace.write(job(split={"seed": 7}))
    assert workspace.run() == 0
    assert any("split.seed" in note for note in workspace.heard.notes)


# The command line ------------------------------------------------------------------------------------


def test_json_output_is_one_object_a_line_and_ends_with_the_resource(workspace: Workspace) -> None:
    done = workspace.finetune("run", "job.yaml", "--output", "json")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"event", "progress", "status"} <= {line["type"] for line in lines}
    assert lines[-1]["resource"]["status"]["phase"] == "Complete"


def test_set_changes_the_spec_before_it_is_checked(workspace: Workspace) -> None:
    done = workspace.finetune("run", "job.yaml", "--set", "topology.nodes=1", "--set", "datasets.tweets.weight=0.5")
    assert done.returncode == 0
    spec = workspace.record.job.spec
    assert (spec.topology.nodes, spec.datasets[0].weight) == (1, 0.5)


def test_more_gpus_than_there_are_is_said_with_the_way_out(workspace: Workspace) -> None:
    done = workspace.finetune("run", "job.yaml", "--set", "topology.gpusPerNode=8")
    assert done.returncode == 2
    assert "--set topology.gpusPerNode=0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace.directory / "status.json").exists()


def test_preview_passes_on_what_the_trainer_shows_and_leaves_nothing(workspace: Workspace) -> None:
    shown = workspace.finetune("preview", "job.yaml", TMPDIR=str(workspace.root))
    assert (shown.returncode, shown.stdout.strip()) == (0, "one tweet as tiny sees it")
    assert not list(workspace.root.glob("finetune-*"))


def test_preview_downloads_first_and_says_what_keeps_it_from_that(workspace: Workspace) -> None:
    workspace.write(job(model={"repo": "acme/base"}))
    assert workspace.finetune("preview", "job.yaml").stdout.strip() == "one tweet as tiny sees it"
    workspace.script(fetch=[{"fail": "no-access", "sentence": "The model acme/base is gated."}])
    shown = workspace.finetune("preview", "job.yaml")
    assert (shown.returncode, shown.stdout, shown.stderr.strip()) == (1, "", "error: The model acme/base is gated.")


def test_preview_says_what_is_wrong_in_a_sentence(workspace: Workspace) -> None:
    workspace.script(preview=[{"fail": "bad-spec", "sentence": "There is no column txt."}])
    shown = workspace.finetune("preview", "job.yaml")
    assert (shown.returncode, shown.stderr.strip()) == (2, "error: There is no column txt.")
