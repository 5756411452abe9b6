"""`python -m finetune_trainer STAGE`: run one stage, or with `launch`, one stage on all ranks of this node.

This is the edge at which every exception becomes a failure with a class, a sentence and an exit code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from finetune_api.files import write_json
from finetune_api.report import EXIT_CODES, Failure
from finetune_api.runconfig import TERMINATION_VARIABLE
from finetune_trainer.context import RunContext, context_from_environment
from finetune_trainer.failures import TrainerError, classify, failure_file, redact
from finetune_trainer.imports import few_walks, forget_old_products, leave_out, unneeded

STAGES = {
    "prepare": ("finetune_trainer.prepare.stage", "run"),
    "preview": ("finetune_trainer.prepare.preview", "run"),
    "train": ("finetune_trainer.train.stage", "run"),
    "evaluate": ("finetune_trainer.evaluate.stage", "run"),
    "publish": ("finetune_trainer.publish.stage", "run"),
    "check-publish": ("finetune_trainer.publish.stage", "check"),
}
LAUNCHED = ("train", "evaluate")
TERMINATION_LOG = Path(os.environ.get(TERMINATION_VARIABLE, "/dev/termination-log"))
USAGE = f"usage: python -m finetune_trainer {{{'|'.join(STAGES)}}} | launch {{{'|'.join(LAUNCHED)}}}"


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; the exit code is that of the failure's class, 0 on success."""
    arguments = sys.argv[1:] if arguments is None else arguments
    launched = len(arguments) == 2 and arguments[0] == "launch" and arguments[1] in LAUNCHED
    if not launched and (len(arguments) != 1 or arguments[0] not in STAGES):
        print(USAGE, file=sys.stderr)
        return 64
    try:
        context = context_from_environment()
        if launched:
            from finetune_trainer.launch import launch

            return launch(context, arguments[1])
    except TrainerError as error:
        failure = classify(error)
        print(f"error: {failure.sentence}", file=sys.stderr)
        write_termination_message(failure)
        return EXIT_CODES[failure.failure_class]
    try:
        _log_to_volume(context)
        import_stage(context, arguments[0])(context)
    except BaseException as error:
        return _fail(context, error)
    finally:
        gc.unfreeze()  # else libraries complain at the end that their objects were never let go
    return 0


def import_stage(context: RunContext, name: str) -> Callable[[RunContext], None]:
    """The function of a stage, with what this job needs of the libraries and no more."""
    module, function = STAGES[name]
    leave_out(unneeded(context.config.spec, context.attempt.stage, context.gpus_per_node))
    forget_old_products()
    with few_walks():
        found: Callable[[RunContext], None] = getattr(importlib.import_module(module), function)
    return found


def _fail(context: RunContext, error: BaseException) -> int:
    failure = classify(error, context.rank)
    trace = redact("".join(traceback.format_exception(error)))
    with contextlib.suppress(OSError):  # the volume may be full, which is what is to be told
        context.logs.mkdir(parents=True, exist_ok=True)
        (context.logs / f"traceback-rank{context.rank}.txt").write_text(trace)
    if failure.failure_class.value == "crash":
        logging.getLogger(__name__).error(trace)
    logging.getLogger(__name__).error("%s: %s", failure.failure_class, failure.sentence)
    record_failure(context, failure)
    if context.world_size > 1:
        # A rank that waits for its peers in a destructor would hide the failure until the peers' time-out.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODES[failure.failure_class])
    return EXIT_CODES[failure.failure_class]


def record_failure(context: RunContext, failure: Failure) -> None:
    """Leave the failure on the volume, in the report and in the termination message, as far as each can be had."""
    writers: list[Callable[[], None]] = [
        lambda: write_json(failure_file(context.logs, context.rank), failure.to_wire()),
        lambda: context.reporter.fail(failure),
        lambda: write_termination_message(failure),
    ]
    for write in writers:
        try:
            write()
        except OSError as error:
            logging.getLogger(__name__).warning("the failure could not be written: %s", error)


def write_termination_message(failure: Failure, path: Path = TERMINATION_LOG) -> None:
    """Tell the kubelet (4096 bytes at most); silently nothing where there is no kubelet."""
    if path.parent.exists() and (path.exists() or path != Path("/dev/termination-log")):
        path.write_text(json.dumps(failure.to_wire()))


def read_termination_message(path: Path = TERMINATION_LOG) -> Failure | None:
    """What a process of this container has told the kubelet, if it has."""
    try:
        return Failure.model_validate_json(path.read_text())
    except (OSError, ValueError):
        return None


def _log_to_volume(context: RunContext) -> None:
    context.logs.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers.append(logging.FileHandler(context.logs / f"rank{context.rank}.log"))
    form = f"%(asctime)s %(levelname)s {context.attempt.stage}/{context.attempt.number} rank {context.rank} %(message)s"
    logging.basicConfig(level=logging.INFO, handlers=handlers, format=form, force=True)


if __name__ == "__main__":
    sys.exit(main())
