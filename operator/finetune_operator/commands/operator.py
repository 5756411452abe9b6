"""`finetune operator`."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Annotated

import typer

from finetune_operator.errors import EXIT_FAILED, UserError
from finetune_operator.settings import from_environment


def operator(
    namespaces: Annotated[
        list[str] | None,
        typer.Option(
            "--namespace", "-n", help="Namespace to serve; may be repeated. Default: FINETUNE_NAMESPACES, or all."
        ),
    ] = None,
    image: Annotated[str, typer.Option("--trainer-image", help="Trainer image for jobs that set none.")] = "",
    backend: Annotated[str, typer.Option("--backend", help="Backend for training pods: pytorchjob or trainjob.")] = "",
    log_format: Annotated[str, typer.Option("--log-format", help="Log format: json or text.")] = "",
) -> None:
    """Run the operator: watch FineTuneJobs and reconcile them while this replica holds the Lease.

    All other settings are FINETUNE_* environment variables, listed in docs/operator.md.
    """
    from finetune_operator.cluster.lease import LeaseLostError
    from finetune_operator.service import configure_logging, serve

    settings = from_environment({**os.environ, "FINETUNE_BACKEND": backend} if backend else os.environ)
    settings = replace(
        settings,
        namespaces=tuple(namespaces or settings.namespaces),
        image=image or settings.image,
        log_format=log_format or settings.log_format,
    )
    configure_logging(settings)
    try:
        asyncio.run(serve(settings))
    except LeaseLostError as error:
        raise UserError(str(error), EXIT_FAILED) from error
