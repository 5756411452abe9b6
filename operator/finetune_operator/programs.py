"""What each stage runs: its programs, the token that each alone may read, and its environment. Pure.

The pods of the cluster, the local processes and the check for missing Secrets are all rendered from this, so that a
stage runs the same in both worlds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    def command(self, python: str = "python") -> list[str]:
        """The command line."""
        return [python, "-m", "finetune_trainer", *self.arguments]


CHECK_PUBLISH = Program("check-publish", ("check-publish",), "publish")
"""Before anything is downloaded: may the result be written to its repository? Only this program reads the write token
in Prepare; models and data are downloaded and parsed by another one."""
PREVIEW = Program("preview", ("preview",), "hub")
"""Not a stage: `finetune preview` on this machine."""
PROGRAMS: dict[Stage, tuple[Program, ...]] = {
    Stage.PREPARE: (CHECK_PUBLISH, Program("prepare", ("prepare",), "hub")),
    Stage.TRAIN: (Program("train", ("launch", "train"), "wandb"),),
    Stage.EVALUATE: (Program("evaluate", ("launch", "evaluate")),),
    Stage.PUBLISH: (Program("publish", ("publish",), "publish"),),
}
"""What a stage runs, one program after the other; the last one is the stage itself."""
COMPUTING_STAGES = (Stage.TRAIN, Stage.EVALUATE)
"""These have GPUs and ranks, and download nothing: Prepare has fetched all that they read."""


def programs_of(stage: Stage, spec: FineTuneJobSpec) -> tuple[Program, ...]:
    """The programs of a stage of this job."""
    return tuple(p for p in PROGRAMS[stage] if p is not CHECK_PUBLISH or spec.publish is not None)


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
    """The variables of a stage's programs. `given`, the user's, replace our defaults, but not what we rely on.

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
        **({"HF_HUB_OFFLINE": "1", GPUS_VARIABLE: str(gpus)} if computes else {}),
        CONFIG_VARIABLE: config_file,
        ATTEMPT_VARIABLE: attempt.model_dump_json(by_alias=True, exclude_none=True),
    }
    return defaults | dict(given) | fixed | (rendezvous.to_environment() if rendezvous else {})
