"""A trainer that keeps the contract of files, signals and exit codes, and computes nothing: for tests of the runner.

`install(directory)` makes `python -m finetune_trainer` with `directory` on PYTHONPATH run this file. What it
does is written in `fake.json` beside the job's file: for each stage a list of behaviours, one an attempt (the
last one repeats): `{"steps": 5, "seconds": 0.01}` and one of `{"fail": "crash", "at": 3, "sentence": "…"}`,
`{"kill": true}`, `{"endless": true}`, `{"stubborn": true}`, `{"gate": "refused"}`. What each process was given is
noted in `trace.jsonl` in the run directory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EXIT_CODES = {
    "crash": 1,
    "bad-spec": 64,
    "no-access": 66,
    "cuda-oom": 68,
    "preempted": 70,
    "hang": 71,
    "storage-full": 73,
    "hub-unavailable": 75,
}
STOP = {"asked": False}


def install(directory: Path) -> Path:
    """Put a package `finetune_trainer` that runs this file into `directory`, for PYTHONPATH."""
    package = directory / "finetune_trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(f"import runpy\nrunpy.run_path({__file__!r}, run_name='__main__')\n")
    return directory


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(value))
    aside.replace(path)


class Process:
    """One process of one attempt."""

    def __init__(self) -> None:
        self.config = json.loads(Path(os.environ["FINETUNE_RUN_CONFIG"]).read_text())
        self.attempt = json.loads(os.environ["FINETUNE_ATTEMPT"])
        self.run = Path(self.config["paths"]["run"])
        self.stage, self.number = self.attempt["stage"], self.attempt.get("number", 1)
        self.report: dict[str, Any] = {
            "attempt": f"{self.attempt['uid']}/{self.stage}/{self.number}",
            "stage": self.stage,
        }

    @property
    def stopping(self) -> Path:
        """There once a rank was asked to stop: as in the real loop, all of them stop then."""
        return self.run / f"stopping-{self.stage}-{self.number}"

    def behaviour(self, name: str) -> dict[str, Any]:
        script = Path(self.config["paths"]["source"]) / "fake.json"
        wanted = json.loads(script.read_text()).get(name, [{}]) if script.exists() else [{}]
        return dict(wanted[min(self.number, len(wanted)) - 1])

    def trace(self, program: str) -> None:
        tokens = Path(os.environ["FINETUNE_TOKENS"])
        found = {
            "program": program,
            "number": self.number,
            "tokens": {file.name: file.read_text() for file in tokens.iterdir()},
            "mode": oct(tokens.stat().st_mode & 0o777),
            "environ": dict(os.environ),
            "arguments": sys.argv,
            "attempt": self.attempt,
        }
        with (self.run / "trace.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")

    def say(self, **fields: Any) -> None:
        self.report |= {"time": now()} | fields
        write(self.run / "reports" / f"{self.stage}-{self.number}.json", self.report)

    def fail(self, kind: str, sentence: str, rank: int = 0) -> int:
        failure = {"class": kind, "sentence": sentence, "rank": rank, "time": now()}
        write(self.run / "logs" / f"{self.stage}-{self.number}" / f"failure-rank{rank}.json", failure)
        write(Path(os.environ["FINETUNE_TERMINATION_LOG"]), failure)
        return EXIT_CODES[kind]


def act(process: Process, behaviour: dict[str, Any], step: int = 0) -> int | None:
    """What a behaviour asks for at a step, short of going on."""
    if behaviour.get("at", 0) != step:
        return None
    if behaviour.get("fail"):
        return process.fail(behaviour["fail"], behaviour.get("sentence", "It broke."))
    if behaviour.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    return None


def train(process: Process, rank: int) -> int:
    behaviour = process.behaviour("train")
    total, seconds = behaviour.get("steps", 5), behaviour.get("seconds", 0.01)
    checkpoints = sorted((process.run / "checkpoints").glob("step-*"))
    step = int(checkpoints[-1].name.partition("-")[2]) if checkpoints else 0
    if rank == 0:
        process.say(**({"resumedFromStep": step} if step else {}))
    while step < total or behaviour.get("endless"):
        code = act(process, behaviour, step)
        if code is not None:
            return code
        if (STOP["asked"] or process.stopping.exists()) and not behaviour.get("stubborn"):
            return checkpoint_and_stop(process, step, rank)
        step += 1
        time.sleep(seconds)
        if rank == 0:
            log_step(process, step, total)
    if rank == 0:
        digest = "sha256:0123"
        export = {"path": "export", "digest": digest, "format": "adapter", "sizeBytes": 1, "step": step}
        process.say(export=export, done=True, activity="done")
    return 0


def log_step(process: Process, step: int, total: int) -> None:
    (process.run / "metrics").mkdir(exist_ok=True)
    row = {"step": step, "loss": 2.0 / (step + 1), "learningRate": 1e-4, "tokensPerSecond": 100.0}
    with (process.run / "metrics" / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    process.say(progress={"step": step, "total": total, "loss": row["loss"]}, activity="training")


def checkpoint_and_stop(process: Process, step: int, rank: int) -> int:
    process.stopping.touch()
    if rank == 0:
        path = f"checkpoints/step-{step:08d}"
        (process.run / path).mkdir(parents=True, exist_ok=True)
        process.say(lastCheckpoint={"step": step, "path": path, "time": now()})
    return process.fail("preempted", "Stopped from outside after a checkpoint.", rank)


def evaluate(process: Process, rank: int) -> int:
    behaviour = process.behaviour("evaluate")
    code = act(process, behaviour)
    if code is not None:
        return code
    refused = behaviour.get("gate") == "refused"
    interval = {"value": 0.01 if refused else 0.2, "low": -0.05 if refused else 0.1, "high": 0.3}
    metric = {"dataset": "tweets", "metric": "accuracy", "rows": 400, "primary": True, "base": 0.4, "tuned": 0.6}
    metric |= {"difference": interval, "baselines": {"majority": 0.41, "tfidf-logreg": 0.66}}
    sentence = "Not significantly better." if refused else "Better than the base model."
    reason = "not-significant" if refused else "improved"
    gate = {"passed": not refused, "reason": reason, "sentence": sentence}
    results = {"split": "test", "metrics": [metric], "gate": gate, "exportDigest": "sha256:0123"}
    process.say(results=results, done=True)
    return 0


def prepare(process: Process, rank: int) -> int:
    behaviour = process.behaviour("prepare")
    while behaviour.get("endless") and not STOP["asked"]:
        time.sleep(0.02)
    if STOP["asked"]:
        return process.fail("preempted", "Stopped from outside.")
    code = act(process, behaviour)
    if code is not None:
        return code
    datasets = [{"name": "tweets", "source": "tweets.csv", "rows": 100, "train": 80, "validation": 20}]
    plan = {"worldSize": 2, "steps": 5, "examples": 80, "tokens": 8000, "tokensPerRankStep": 800}
    plan |= {"trainableParameters": 10, "parameters": 100, "microBatchTokens": 1024}
    lengths = {"documents": 80, "tokens": 8000, "longest": 300, "labelled": 80}
    process.say(datasets=datasets, plan=plan, lengths=lengths, done=True)
    return 0


def check_publish(process: Process, rank: int) -> int:
    code = act(process, process.behaviour("check-publish"))
    return 0 if code is None else code


def fetch(process: Process, rank: int) -> int:
    code = act(process, process.behaviour("fetch"))
    return 0 if code is None else code


def preview(process: Process, rank: int) -> int:
    code = act(process, process.behaviour("preview"))
    print(f"one tweet as {process.config['job']['name']} sees it")
    return 0 if code is None else code


def publish(process: Process, rank: int) -> int:
    code = act(process, process.behaviour("publish"))
    if code is None:
        process.say(published={"path": "published", "digest": "sha256:0123"}, done=True)
    return 0 if code is None else code


def launch(program: str) -> int:
    """A launcher with its rank in a session of its own, as torchrun has."""
    child = subprocess.Popen([sys.executable, "-m", "finetune_trainer", program], start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    code = child.wait()
    return 1 if code < 0 else code


PROGRAMS = {
    "fetch": fetch,
    "fetch-preview": fetch,
    "prepare": prepare,
    "check-publish": check_publish,
    "train": train,
    "evaluate": evaluate,
    "preview": preview,
    "publish": publish,
}


def main(arguments: list[str]) -> int:
    if arguments[0] == "launch":
        return launch(arguments[1])
    signal.signal(signal.SIGTERM, lambda *_: STOP.update(asked=True))
    process = Process()
    process.trace(arguments[0])
    return PROGRAMS[arguments[0]](process, int(os.environ.get("PET_NODE_RANK", "0")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
