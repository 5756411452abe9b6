"""`finetune plan FILE`: what a job needs, before anything is downloaded or a GPU is allocated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finetune_operator.errors import EXIT_FAILED

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJobSpec
    from finetune_operator.sizing.gpus import GpuType


@dataclass(frozen=True)
class Place:
    """Hardware to plan for: the topology is in the spec."""

    spec: FineTuneJobSpec
    gpu: GpuType | None
    notes: tuple[str, ...] = ()


def plan(
    file: Annotated[str, typer.Argument(help="File with one FineTuneJob; - reads standard input.", metavar="FILE")],
    price: Annotated[
        float | None, typer.Option(min=0, help="Price per GPU-hour, in any currency.", metavar="NUMBER")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Plan for this GPU type, such as A100-80GB; same as --set topology.gpuType=…", metavar="TYPE"
        ),
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="The model's config.json, if the model is not on this machine.", metavar="FILE")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Override a field, such as topology.nodes=2 or tuning.method=qlora.", metavar="PATH=VALUE"
        ),
    ] = None,
    output: Annotated[Literal["text", "json"], typer.Option("--output", "-o", help="Output format.")] = "text",
) -> None:
    """Estimate what a job needs: memory per rank, steps, time and cost.

    Plans for the GPUs in the file, or for this machine if the file names none. Nothing is downloaded: rows of local
    files are counted and their tokens estimated. Exits with code 1 if the job does not fit.
    """
    from finetune_api.runconfig import resolve
    from finetune_operator.commands.run import cache_directory
    from finetune_operator.local.jobfile import job_file
    from finetune_operator.sizing.data_estimate import data_estimate
    from finetune_operator.sizing.gpus import cpu_has_bf16
    from finetune_operator.sizing.model_estimate import model_estimate
    from finetune_operator.sizing.plan import plan_run

    changes = [*(overrides or []), *([f"topology.gpuType={gpu}"] if gpu else [])]
    loaded = job_file.load(file, changes)
    spec = resolve(loaded.job.spec)
    places = (loaded.source, cache_directory())
    model = model_estimate(spec, places, model_config)
    data = data_estimate(spec, places)
    place = place_job(spec)
    estimate = plan_run(
        place.spec, model.facts, data.lengths, gpu=place.gpu, price_per_gpu_hour=price, cpu_bf16=cpu_has_bf16()
    )
    estimate = estimate.model_copy(update={"warnings": [*estimate.warnings, *data.warnings]})
    origins = [f"model: {model.origin}", *data.notes, *place.notes]
    if output == "json":
        print(json.dumps(estimate.to_wire() | {"origins": origins}, indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        from finetune_operator.view.plan_view import render_plan

        console = Console(highlight=False)
        for part in render_plan(loaded.job.metadata.name, place.spec, estimate, origins, price):
            console.print(part)
    if estimate.fits is False:
        raise SystemExit(EXIT_FAILED)


def place_job(spec: FineTuneJobSpec) -> Place:
    """The GPUs that the file names; if none, those of this machine that `finetune run` would use."""
    from finetune_operator.devices import this_machine
    from finetune_operator.local.processes.placement import place
    from finetune_operator.sizing.gpus import gpu_here

    topology = spec.topology
    if topology.gpu_type is not None or topology.gpus_per_node:
        if topology.gpus_per_node is None:
            spec = spec.model_copy(update={"topology": topology.model_copy(update={"gpus_per_node": 1})})
        return Place(spec, None)
    machine = this_machine()
    placement = place(topology, machine)
    spec = spec.model_copy(update={"topology": placement.apply(topology)})
    notes = ["planned for this machine, with the devices that finetune run would use", *placement.notes]
    if placement.gpus:
        return Place(spec, gpu_here(placement.gpus[0]), tuple(notes))
    return Place(spec, None, tuple(notes))
