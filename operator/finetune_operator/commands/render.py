"""`finetune render FILE`: the manifests that the operator would create, for review."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer
import yaml

from finetune_api.validate import check
from finetune_operator.decision.model import Environment
from finetune_operator.errors import UserError
from finetune_operator.inputs import read_text, source_name
from finetune_operator.manifests.backends import BACKENDS
from finetune_operator.manifests.children import all_manifests
from finetune_operator.manifests.job import Job

UNKNOWN_UID = "00000000-0000-0000-0000-000000000000"


def render(
    file: Annotated[str, typer.Argument(metavar="FILE", help="File with FineTuneJobs; - reads standard input.")],
    image: Annotated[
        str, typer.Option("--image", envvar="FINETUNE_TRAINER_IMAGE", help="Trainer image for jobs that set none.")
    ] = "finetune-trainer",
    backend: Annotated[
        str, typer.Option("--backend", help="Backend for training pods: pytorchjob or trainjob.")
    ] = "pytorchjob",
) -> None:
    """Print the manifests that the operator would create for a job, in that order.

    The uid, which the API server assigns, is shown as zeros.
    """
    if backend not in BACKENDS:
        raise UserError(f"--backend must be {' or '.join(BACKENDS)}, not {backend}.")
    checked = check(read_text(file))
    if checked.problems:
        raise UserError("\n".join(problem.text(source_name(file)) for problem in checked.problems))
    environment = Environment(operator_version=version("finetune-operator"))
    for parsed in checked.jobs:
        meta = parsed.metadata
        uid = meta.uid or UNKNOWN_UID
        job = Job(meta.namespace, meta.name, uid, parsed.spec, parsed.spec.image or image, environment)
        print(yaml.dump_all(all_manifests(job, BACKENDS[backend]), Dumper=_Dumper, sort_keys=False, width=120), end="")


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings as blocks, without anchors: the output is for people."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
