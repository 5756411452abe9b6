"""The Publish stage: gate and digest once more, then card and files to where the job says.

`check` runs before Prepare with nothing but the publish token and writes no report: it returns, or it raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.base import Stage
from finetune_api.report import FailureClass, Published, Results
from finetune_api.spec import Publish
from finetune_trainer.context import RunContext
from finetune_trainer.data.manifest import PreparedManifest
from finetune_trainer.digest import export_digest, files_of, refuse_other
from finetune_trainer.evaluate.card import CARD_FILE, CardFacts, base_license, model_card
from finetune_trainer.evaluate.gate import decide_gate
from finetune_trainer.failures import TrainerError
from finetune_trainer.publish import directory
from finetune_trainer.publish.hub import Target
from finetune_trainer.reports import RESULTS_FILE, newest_done, read_reports

log = logging.getLogger(__name__)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def check(context: RunContext) -> None:
    """Raise TrainerError unless this job could be published: rights and privacy of the repository, or the directory."""
    publish = context.config.spec.publish
    if publish is None:
        return
    if publish.repo is None:
        directory.refuse_other_content(_target_directory(context, publish))
    else:
        _target(context, publish).check()


def run(context: RunContext) -> None:
    """Publish what was evaluated, if it passed the gate."""
    publish = context.config.spec.publish
    if publish is None:
        raise TrainerError(FailureClass.BAD_SPEC, "The job has no publish target: set spec.publish.", "publish")
    context.reporter.activity("checking what was evaluated")
    results = read_results(context)
    refuse_unless_better(context, results)
    files = files_to_publish(context, results)
    context.reporter.activity("publishing")
    if publish.repo is None:
        place = _target_directory(context, publish)
        directory.copy(place, files)
        published = Published(path=str(place), digest=results.export_digest)
    else:
        message = f"{context.config.job.name}: {results.gate.sentence[:200]}"
        pushed = _target(context, publish).push(files, message)
        published = Published(repo=publish.repo, commit=pushed.commit, url=pushed.url, digest=results.export_digest)
    log.info("published to %s", published.url or published.path)
    context.reporter.done(published=published)


def read_results(context: RunContext) -> Results:
    """What Evaluate wrote. Raises TrainerError (bad-data) where there is nothing or something damaged."""
    path = context.evaluation / RESULTS_FILE
    try:
        content = path.read_bytes()
        refuse_other(
            f"evaluation/{RESULTS_FILE}", sha256(content).hexdigest(), context.attempt.digests.results, Stage.EVALUATE
        )
        return Results.model_validate_json(content)
    except (OSError, ValidationError) as error:
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"The evaluation's results cannot be read ({type(error).__name__}): run the Evaluate stage again.",
            str(path),
        ) from error


def refuse_unless_better(context: RunContext, results: Results) -> None:
    """Raise TrainerError (gate-refused) unless the measured values, judged anew, pass the gate of this job."""
    evaluation = context.config.spec.evaluation
    gate = decide_gate(evaluation.gate, results.metrics, baseline=evaluation.baseline)
    if not gate.passed:
        raise TrainerError(FailureClass.GATE_REFUSED, gate.sentence, "evaluation.gate")


def files_to_publish(context: RunContext, results: Results) -> dict[str, Path | bytes]:
    """The export's files and the card, by name, after the digest was found to be the evaluated one."""
    found = export_digest(context.export)
    refuse_other("export", found, context.attempt.digests.export, Stage.TRAIN)
    if found != results.export_digest:
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"export/ (digest {found[:12]}…) differs from what was evaluated ({results.export_digest[:12]}…): "
            "run the Evaluate stage again. Nothing was published.",
            "export",
        )
    paths = {path.relative_to(context.export).as_posix(): path for path in files_of(context.export)}
    pickles = [name for name in paths if name.endswith(PICKLES)]
    if pickles:
        raise TrainerError(
            FailureClass.BAD_DATA,
            f"export/{pickles[0]} is a pickle file, which can run code when loaded; it is not published.",
            "export",
        )
    card = model_card(card_facts(context, results))
    return {**paths, CARD_FILE: card.encode()}


def card_facts(context: RunContext, results: Results, origin: Mapping[str, Any] | None = None) -> CardFacts:
    """What the card is written from. origin: Evaluate's, from its report if not given."""
    if origin is None:
        # Any stage can write a report into the folder; the results were checked.
        reports = [(n, report) for n, report in read_reports(context.reports) if report.results == results]
        evaluated = newest_done(reports, Stage.EVALUATE)
        origin = evaluated.origin if evaluated else {}
    manifest = PreparedManifest.read(context.prepared, context.attempt.digests.prepared)
    return CardFacts(
        context.config, manifest, results, origin, context.export, base_license(Path(manifest.model.directory))
    )


def _target(context: RunContext, publish: Publish) -> Target:
    return Target(str(publish.repo), private=publish.private, token=context.token("publish") or context.token("hub"))


def _target_directory(context: RunContext, publish: Publish) -> Path:
    """Absolute, or relative to the job's file for local processes and to the run volume on a cluster."""
    given = Path(str(publish.path)).expanduser()
    if given.is_absolute():
        return given
    local = not context.config.image and context.config.paths.source
    return Path(os.path.normpath((Path(context.config.paths.source) if local else context.run) / given))
