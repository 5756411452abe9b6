"""Jobs on this machine with the scripted trainer: in this process, or in one of their own that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tests.support import fake_trainer
from tests.support.time_limits import scaled

from finetune_api.spec import FineTuneJob
from finetune_operator.decision.model import Environment, Event
from finetune_operator.devices import Machine
from finetune_operator.errors import UserError
from finetune_operator.local.jobfile import record as records
from finetune_operator.local.jobfile.record import Record
from finetune_operator.local.jobfile.resume import find_or_create
from finetune_operator.local.processes.children import Children
from finetune_operator.local.processes.placement import place
from finetune_operator.local.processes.tokens import tokens_of
from finetune_operator.local.runner import Runner, RunSettings

ROOT = Path(__file__).parents[2]


def job(**spec: Any) -> dict[str, Any]:
    """A resource with two ranks on the CPU; `spec` adds to it."""
    base: dict[str, Any] = {
        "model": {"path": "model"},
        "datasets": [{"name": "tweets", "path": "tweets.csv", "task": "classification"}],
        "tuning": {"method": "lora"},
        "topology": {"nodes": 2, "gpusPerNode": 0},
        "publish": {"path": "published"},
    }
    metadata = {"name": "tiny"}
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": base | spec}


@dataclass
class Heard:
    """A listener that remembers."""

    notes: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def status(self, record: Record) -> None:
        """Not remembered: the record is."""

    def event(self, event: Event) -> None:
        """Remember."""
        self.events.append(event)

    def note(self, sentence: str) -> None:
        """Remember."""
        self.notes.append(sentence)


@dataclass
class Workspace:
    """A directory with a job's file, the trainer's script and the runs."""

    root: Path
    heard: Heard = field(default_factory=Heard)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        if not (self.root / "fake").exists():
            fake_trainer.install(self.root / "fake")
            self.write(job())

    def write(self, resource: dict[str, Any], **behaviours: list[dict[str, Any]]) -> None:
        """Write the job's file and the trainer's script (`check_publish=[…]` and the stages)."""
        (self.root / "job.yaml").write_text(yaml.safe_dump(resource))
        script = {name.replace("_", "-"): behaviour for name, behaviour in behaviours.items()}
        (self.root / "fake.json").write_text(json.dumps(script))

    def script(self, **behaviours: list[dict[str, Any]]) -> None:
        """Write the trainer's script."""
        self.write(yaml.safe_load((self.root / "job.yaml").read_text()), **behaviours)

    @property
    def environ(self) -> dict[str, str]:
        """An environment in which the scripted trainer is found."""
        return os.environ | {"PYTHONPATH": f"{self.root / 'fake'}:{ROOT}", "FINETUNE_CACHE": str(self.root / "cache")}

    @property
    def directory(self) -> Path:
        """Where all runs of the job lie."""
        return self.root / "runs" / "default" / "tiny"

    @property
    def record(self) -> Record:
        """The newest run's record, from its file."""
        found = records.find(self.directory)
        assert found is not None
        return found

    def trace(self) -> list[dict[str, Any]]:
        """What each process of the newest run was given."""
        return [json.loads(line) for line in (self.record.run / "trace.jsonl").read_text().splitlines()]

    def run(self, *, retry: bool = False, fresh: bool = False, grace: int = 5, **environ: str) -> int:
        """Run the job in this process, without waiting between attempts; returns the exit code."""
        resource = FineTuneJob.model_validate(yaml.safe_load((self.root / "job.yaml").read_text()))
        with records.locked(self.directory):
            record = find_or_create(resource, self.directory, fresh=fresh, retry=retry, tell=self.heard.note)
            record.save()
            tokens = tokens_of(environ | {"HOME": str(self.root)})
            settings = RunSettings(
                placement=place(resource.spec.topology, Machine(cores=2)),
                source=self.root,
                cache=self.root / "cache",
                tokens=tokens,
                decisions=Environment(local=True, backoff_base_seconds=0.0, grace_seconds=grace),
                environ=self.environ | environ,
            )
            children = Children(record.run, record.uid, tokens)
            return Runner(record, settings, children, self.heard).run()

    def start(self, grace: int = 5) -> subprocess.Popen[bytes]:
        """Run the job in a process of its own."""
        command = [sys.executable, "-m", "tests.support.local_runs", str(self.root), str(grace)]
        return subprocess.Popen(command, env=self.environ, cwd=ROOT)

    def finetune(self, *arguments: str, together: bool = False, **environ: str) -> subprocess.CompletedProcess[str]:
        """The command line itself, in the job's directory; `together` has stderr go where stdout goes."""
        command = [sys.executable, "-c", "from finetune_operator.cli import main; main()", *arguments]
        environment = self.environ | environ
        out, err = subprocess.PIPE, subprocess.STDOUT if together else subprocess.PIPE
        return subprocess.run(
            command, env=environment, cwd=self.root, stdout=out, stderr=err, text=True, timeout=scaled(60), check=False
        )

    def wait_for_step(self, step: int) -> None:
        """Until the training has logged that step."""
        until(lambda: any(row["step"] >= step for row in self.rows()))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the training's curves so far."""
        files = list(self.directory.glob("*/metrics/train.jsonl"))
        lines = files[0].read_text().splitlines() if files else []
        return [json.loads(line) for line in lines if line.endswith("}")]


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + scaled(seconds)
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


if __name__ == "__main__":
    try:
        sys.exit(Workspace(Path(sys.argv[1])).run(grace=int(sys.argv[2])) if len(sys.argv) == 3 else 64)
    except UserError as error:
        print(error.sentence, file=sys.stderr)
        sys.exit(error.exit_code)
