"""What every stage is given: run config, attempt, directories, tokens and the reporter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from finetune_api.files import write_json
from finetune_api.report import FailureClass
from finetune_api.runconfig import (
    ATTEMPT_VARIABLE,
    CONFIG_VARIABLE,
    FENCE_FILE,
    GPUS_VARIABLE,
    LOGS_DIRECTORY,
    METRICS_FILE,
    REPORTS_DIRECTORY,
    TOKENS_VARIABLE,
    Attempt,
    RunConfig,
    TokenKind,
    attempt_name,
)
from finetune_trainer.failures import TrainerError, register_secret
from finetune_trainer.reporter import Reporter


@dataclass
class RunContext:
    """One process of one attempt."""

    config: RunConfig
    attempt: Attempt
    reporter: Reporter
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    tokens: Path | None = None
    gpus_per_node: int | None = None
    """GPUs that this node should have, 0 for none; None: as many as are found."""
    run: Path = field(init=False)
    cache: Path = field(init=False)
    """Shared downloads and conversions; read-only outside Prepare."""
    prepared: Path = field(init=False)
    """What Prepare wrote."""
    checkpoints: Path = field(init=False)
    """Published checkpoints, `step-00000010`."""
    export: Path = field(init=False)
    """The trained model."""
    evaluation: Path = field(init=False)
    """Results, predictions and the page."""
    reports: Path = field(init=False)
    """One report per attempt."""
    metrics_file: Path = field(init=False)
    """Training curves, one JSON object per line."""

    def __post_init__(self) -> None:
        run = self.run = Path(self.config.paths.run)
        self.cache = Path(self.config.paths.cache)
        self.prepared, self.checkpoints, self.export = run / "prepared", run / "checkpoints", run / "export"
        self.evaluation, self.reports, self.metrics_file = (
            run / "evaluation",
            run / REPORTS_DIRECTORY,
            run / METRICS_FILE,
        )
        if self.gpus_per_node is None:
            self.gpus_per_node = self.config.spec.topology.gpus_per_node

    @property
    def logs(self) -> Path:
        """Logs, failures and stacks of this attempt."""
        return attempt_logs(self.run, self.attempt)

    def resolve_source(self, path: str, field: str) -> Path:
        """The file or directory that a `path` of the spec refers to: absolute, next to the job's file, or in the cache.

        Raises TrainerError (bad-spec) for `field` if it does not exist.
        """
        given = Path(path).expanduser()
        places = [given] if given.is_absolute() else [Path(self.config.paths.source) / given, self.cache / given]
        if not given.is_absolute() and not self.config.paths.source:
            places = places[1:]
        for place in places:
            if place.exists():
                return place
        looked = " and ".join(str(place) for place in places)
        raise TrainerError(FailureClass.BAD_SPEC, f"{path} does not exist; looked for {looked}.", field)

    def token(self, kind: TokenKind) -> str | None:
        """The token that this stage may see, or None."""
        if self.tokens is None:
            return None
        try:
            token = (self.tokens / kind).read_text().strip()
        except FileNotFoundError:
            return None
        register_secret(token)
        return token or None

    def take_fence(self) -> None:
        """Make this attempt the only one that may publish checkpoints. Rank 0 calls it once, at the start."""
        write_json(self.run / FENCE_FILE, {"attempt": self.attempt.id})

    def check_fence(self) -> None:
        """Raise TrainerError (fenced) if another attempt has taken the volume since."""
        try:
            holder = json.loads((self.run / FENCE_FILE).read_text())["attempt"]
        except FileNotFoundError:
            return
        if holder != self.attempt.id:
            raise TrainerError(
                FailureClass.FENCED, f"Attempt {holder} has taken over the run volume; {self.attempt.id} stops writing."
            )


def attempt_logs(run: Path, attempt: Attempt) -> Path:
    """Directory of one attempt's logs on the volume."""
    return run / LOGS_DIRECTORY / attempt_name(attempt.stage, attempt.number)


def _config_and_attempt(environ: Mapping[str, str]) -> tuple[RunConfig, Attempt]:
    for name in (CONFIG_VARIABLE, ATTEMPT_VARIABLE):
        if name not in environ:
            raise TrainerError(
                FailureClass.BAD_SPEC,
                f"{name} is not set. Start the trainer with `finetune run` or through the operator.",
            )
    path = Path(environ[CONFIG_VARIABLE])
    try:
        config = RunConfig.model_validate_json(path.read_text())
        return config, Attempt.model_validate_json(environ[ATTEMPT_VARIABLE])
    except OSError as error:
        raise TrainerError(FailureClass.BAD_SPEC, f"The run config {path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"This trainer (finetune-operator {version('finetune-operator')}) cannot read its configuration "
            f"({error.title}, {where or 'whole'}: {first['msg']}). Use the trainer image of the operator's version.",
            where,
        ) from error


def context_from_environment(environ: Mapping[str, str] = os.environ) -> RunContext:
    """The context of this process from `FINETUNE_*` and torchrun's variables.

    Raises TrainerError (bad-spec) if these are missing, or were written by an incompatible version.
    """
    config, attempt = _config_and_attempt(environ)
    rank = int(environ.get("RANK", "0"))
    # Rented machines set WORLD_SIZE before any rank is started: without RANK it is not about this process.
    world_size = int(environ.get("WORLD_SIZE", "1")) if "RANK" in environ else 1
    tokens = environ.get(TOKENS_VARIABLE)
    return RunContext(
        config=config,
        attempt=attempt,
        reporter=Reporter(attempt, Path(config.paths.run) / REPORTS_DIRECTORY, enabled=rank == 0),
        rank=rank,
        world_size=world_size,
        local_rank=int(environ.get("LOCAL_RANK", "0")),
        tokens=Path(tokens) if tokens else None,
        gpus_per_node=int(environ[GPUS_VARIABLE]) if GPUS_VARIABLE in environ else None,
    )
