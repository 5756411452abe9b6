"""`finetune list`."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Literal

import typer

from finetune_api.base import KIND
from finetune_operator.commands._cluster import Context, Namespace, jobs_in
from finetune_operator.view.jobs_table import layout, place_and_name


async def list(
    namespace: Namespace = None,
    everywhere: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="List the jobs of all namespaces.")
    ] = False,
    context: Context = None,
    output: Annotated[
        Literal["table", "wide", "json", "name"], typer.Option("--output", "-o", help="Output format.")
    ] = "table",
) -> None:
    """List FineTuneJobs, with the columns of `kubectl get`."""
    async with jobs_in(namespace, context) as jobs:
        table = await jobs.all(all_namespaces=everywhere, as_table=output != "json")
    if output == "json":
        print(json.dumps(table, indent=2, ensure_ascii=False))
        return
    rows = sorted(table.get("rows") or [], key=place_and_name)
    if output == "name":
        for row in rows:
            print(place_and_name(row)[1])
        return
    if not rows:
        where = "all namespaces" if everywhere else f"namespace {jobs.namespace}"
        print(f"There are no {KIND}s in {where}.", file=sys.stderr)
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in layout(table["columnDefinitions"], rows, wide=output == "wide", places=everywhere, colour=colour):
        print(line)
