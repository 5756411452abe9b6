"""What `fetch` hands over to the programs that parse it: which files of which commits now lie in the cache.

fetch has the read token and opens next to nothing; what opens the files has no token. The hand-over is in the run
directory, names its attempt, and is checked like everything that lies on a volume.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from finetune_api.base import ApiModel
from finetune_api.files import write_json
from finetune_api.report import FailureClass
from finetune_trainer.context import RunContext
from finetune_trainer.failures import TrainerError

FETCHED_FILE = "fetched.json"
MOST_FILES = 200_000
"""Files of a repository at most; the Hub itself recommends half of that."""
MOST_BYTES = 1 << 28
"""Of the hand-over."""


def is_inside(name: str) -> bool:
    """Whether a file of that name lies inside the directory that it is relative to."""
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and not {".", ".."} & set(path.parts) and "\0" not in name


def _inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError("it leads out of its directory")
    return name


Name = Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_inside)]
Names = Annotated[list[Name], Field(max_length=MOST_FILES)]
Text = Annotated[str, StringConstraints(max_length=1000)]


class FetchedRepo(ApiModel):
    """Files of one repository at one commit."""

    directory: Name
    """Where they lie, relative to the cache."""
    repo: Text
    """Repository on the Hub."""
    commit: Text
    """The commit that the spec's revision was."""
    files: Names = []
    """Files of a model or an adapter."""
    splits: dict[str, Names] = {}
    """Files of a dataset by split."""
    config: Text = ""
    """The dataset's configuration that was chosen."""
    notes: Annotated[list[Text], Field(max_length=10)] = []
    """What was decided about it, as sentences."""

    @property
    def names(self) -> list[str]:
        """All of its files."""
        return [*self.files, *(name for names in self.splits.values() for name in names)]


class Fetched(ApiModel):
    """Everything that was fetched for one attempt."""

    attempt: Text
    """The attempt that fetched it."""
    config_digest: Text
    """Of the run config that it was fetched for."""
    repos: Annotated[dict[str, FetchedRepo], Field(max_length=100)] = {}
    """By the field of the spec that names the repository."""

    def repository(self, field: str) -> FetchedRepo:
        """What was fetched for that field of the spec. Raises TrainerError (crash) if nothing was."""
        if field not in self.repos:
            raise _incomplete(f"nothing was fetched for {field}")
        return self.repos[field]

    def write(self, run: Path) -> None:
        """Leave it in that run directory."""
        write_json(run / FETCHED_FILE, self.to_wire())


def read_fetched(context: RunContext, digest: str) -> Fetched:
    """What was fetched for this attempt and config; nothing if the spec names no repository.

    Raises TrainerError (crash) if that is missing, or another attempt's, or not in the cache any more.
    """
    if not context.config.spec.reads_hub:
        return Fetched(attempt=context.attempt.id, config_digest=digest)
    try:
        with (context.run / FETCHED_FILE).open("rb") as file:
            fetched = Fetched.model_validate_json(file.read(MOST_BYTES))
    except (OSError, ValueError) as error:
        raise _incomplete(f"{FETCHED_FILE} is missing or damaged") from error
    if (fetched.attempt, fetched.config_digest) != (context.attempt.id, digest):
        raise _incomplete(f"{FETCHED_FILE} was written by attempt {fetched.attempt}")
    for repo in fetched.repos.values():
        for name in repo.names:
            if not (context.cache / repo.directory / name).is_file():
                raise _incomplete(f"{name} of {repo.repo} is not in the cache any more")
    return fetched


def _incomplete(why: str) -> TrainerError:
    return TrainerError(FailureClass.CRASH, f"What the job needs from the Hub is not all there: {why}.")
