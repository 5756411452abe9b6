"""What each stage runs: its programs, the token that each alone may read, and its environment. Pure.

The pods of the cluster, the local processes and the check for missing Secrets are all rendered from this, so that a
stage runs the same in both worlds. docs/architecture.md lists all variables, and who sets those that are not set here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from finetune_api.base import Stage
from finetune_api.rendezvous import Rendezvous
from finetune_api.runconfig import ATTEMPT_VARIABLE, CONFIG_VARIABLE, GPUS_VARIABLE, Attempt, TokenKind
from finetune_api.spec import Credentials, FineTuneJobSpec, SecretKey


@dataclass(frozen=True)
class Program:
    """One container of a pod, or one local process."""

    name: str
    arguments: tuple[str, ...]
    token: TokenKind | None = None
    """The only token that it may read."""
    reaches_hub: bool = False
    """Whether it may ask the Hub for anything; others find on the volumes what they need."""

    @property
    def variables(self) -> dict[str, str]:
        """Variables of this program, in addition to those of its stage."""
        return {} if self.reaches_hub else {"HF_HUB_OFFLINE": "1"}

    def command(self, python: str = "python") -> list[str]:
        """The command line."""
        return [python, "-m", "finetune_trainer", *self.arguments]


CHECK_PUBLISH = Program("check-publish", ("check-publish",), "publish", reaches_hub=True)
"""Before anything is downloaded: may the result be written to its repository? Only this program reads the write token
in Prepare."""
FETCH = Program("fetch", ("fetch",), "hub", reaches_hub=True)
"""Brings the job's repositories into the cache, and parses none of it. What does parse models and data runs after it
and has no token."""
PROGRAMS: dict[Stage, tuple[Program, ...]] = {
    Stage.PREPARE: (CHECK_PUBLISH, FETCH, Program("prepare", ("prepare",))),
    Stage.TRAIN: (Program("train", ("launch", "train"), "wandb"),),
    Stage.EVALUATE: (Program("evaluate", ("launch", "evaluate")),),
    Stage.PUBLISH: (Program("publish", ("publish",), "publish", reaches_hub=True),),
}
"""What a stage runs, one program after the other; the last one is the stage itself."""
COMPUTING_STAGES = (Stage.TRAIN, Stage.EVALUATE)
"""These have GPUs and ranks."""


def programs_of(stage: Stage, spec: FineTuneJobSpec) -> tuple[Program, ...]:
    """The programs of a stage of this job."""
    needed = {CHECK_PUBLISH: spec.publish is not None, FETCH: spec.reads_hub}
    return tuple(program for program in PROGRAMS[stage] if needed.get(program, True))


def preview_programs(spec: FineTuneJobSpec) -> tuple[Program, ...]:
    """Not a stage: `finetune preview` on this machine, which needs no weights."""
    fetch = replace(FETCH, arguments=("fetch-preview",))
    return (*([fetch] if spec.reads_hub else []), Program("preview", ("preview",)))


def secret_of(credentials: Credentials, kind: TokenKind | None) -> tuple[str, SecretKey] | None:
    """The Secret with a token, and the field that names it; publishing falls back to the read token."""
    fields = ("publish", "hub") if kind == "publish" else (kind,) if kind is not None else ()
    named = ((f"credentials.{field}", getattr(credentials, field)) for field in fields)
    return next(((field, secret) for field, secret in named if secret is not None), None)


def trainer_environment(
    attempt: Attempt,
    *,
    given: Mapping[str, str],
    config_file: str,
    hf_home: str,
    gpus: int,
    threads: int | None,
    rendezvous: Rendezvous | None,
) -> dict[str, str]:
    """The variables of all programs of a stage. `given`, the user's, replace our defaults, but not what we rely on.

    `threads` is per rank, None to leave the number to the libraries; `gpus` is what this node was given; `rendezvous`
    is None where there are no ranks, or where another controller sets its variables.
    """
    computes = attempt.stage in COMPUTING_STAGES
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        **({"NCCL_DEBUG": "WARN"} if computes else {}),
        **({"OMP_NUM_THREADS": str(threads)} if threads is not None else {}),
    }
    fixed = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "HF_HOME": hf_home,
        **({GPUS_VARIABLE: str(gpus)} if computes else {}),
        CONFIG_VARIABLE: config_file,
        ATTEMPT_VARIABLE: attempt.model_dump_json(by_alias=True, exclude_none=True),
    }
    return defaults | dict(given) | fixed | (rendezvous.to_environment() if rendezvous else {})
