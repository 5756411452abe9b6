"""Whether the gate can be decided on the rows that are held out: refused here, before a GPU is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from finetune_api.holdout import LEAST_ROWS, undecidable
from finetune_api.report import FailureClass
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.data.render import Rendering, render_evaluation
from finetune_trainer.failures import TrainerError
from finetune_trainer.prepare.mixture import SplitAssignment, assign_splits
from finetune_trainer.prepare.scan import DatasetReader, Scan


def check_gate(
    spec: FineTuneJobSpec,
    scans: Sequence[tuple[DatasetReader, dict[str, Scan]]],
    assignments: Sequence[SplitAssignment],
    measured: Mapping[str, int],
) -> None:
    """Raise TrainerError (bad-data) where too few rows are measured, with a change of the split that was tried.

    measured: rows to score by the dataset's name, without those of the assignments that cannot be rendered.
    """
    lost = {one.reader.name: max(0, one.measured - measured[one.reader.name]) for one in assignments}

    def measured_with(changed: FineTuneJobSpec) -> dict[str, int]:
        with suppress(TrainerError):
            return {one.reader.name: one.measured - lost[one.reader.name] for one in assign_splits(scans, changed)}
        return {}

    sentence = undecidable(spec, measured, measured_with)
    if sentence:
        raise TrainerError(FailureClass.BAD_DATA, sentence, "evaluation.gate")


def rows_to_measure(assignment: SplitAssignment, rendering: Rendering) -> int:
    """Rows that will be scored: chats and texts can make several of one, which matters where there are few."""
    if assignment.measured >= LEAST_ROWS or rendering.task.traits.form == "question":
        return assignment.measured
    found = 0
    for split, sides in assignment.sides.items():
        scan = assignment.scans[split]
        held = {row for row, side in zip(scan.rows, sides, strict=True) if side == assignment.scored_side}
        for example in assignment.reader.examples(scan.split, held):
            with suppress(BadRowError):
                found += len(render_evaluation(rendering, example, assignment.reader.name))
    return found
