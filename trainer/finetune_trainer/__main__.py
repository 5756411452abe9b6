"""`python -m finetune_trainer STAGE`: run one stage, or with `launch`, one stage on all ranks of this node.

This is the edge at which every exception becomes a failure with a class, a sentence and an exit code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable

from finetune_api.report import EXIT_CODES, FailureClass
from finetune_trainer.context import RunContext, context_from_environment
from finetune_trainer.failures import TrainerError, classify, redact
from finetune_trainer.launch import launch
from finetune_trainer.startup import hide_packages, limit_onednn_cache, reduced_gc, unused_packages
from finetune_trainer.termination import record_failure, write_termination_message

STAGES = {
    "fetch": ("finetune_trainer.prepare.fetch", "run"),
    "fetch-preview": ("finetune_trainer.prepare.fetch", "run_for_preview"),
    "prepare": ("finetune_trainer.prepare.stage", "run"),
    "preview": ("finetune_trainer.prepare.preview", "run"),
    "train": ("finetune_trainer.train.stage", "run"),
    "evaluate": ("finetune_trainer.evaluate.stage", "run"),
    "publish": ("finetune_trainer.publish.stage", "run"),
    "check-publish": ("finetune_trainer.publish.stage", "check"),
}
LAUNCHED = ("train", "evaluate")
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
        gc.unfreeze()  # otherwise libraries complain at exit that their objects were never released
    return 0


def import_stage(context: RunContext, name: str) -> Callable[[RunContext], None]:
    """The function that runs a stage, imported with only those libraries that this job needs."""
    module, function = STAGES[name]
    hide_packages(unused_packages(context.config.spec, context.attempt.stage, context.gpus_per_node))
    limit_onednn_cache()
    with reduced_gc():
        run: Callable[[RunContext], None] = getattr(importlib.import_module(module), function)
    return run


def _fail(context: RunContext, error: BaseException) -> int:
    failure = classify(error, context.rank)
    trace = redact("".join(traceback.format_exception(error)))
    with contextlib.suppress(OSError):  # the volume may be full, which then is the failure to report
        context.logs.mkdir(parents=True, exist_ok=True)
        (context.logs / f"traceback-rank{context.rank}.txt").write_text(trace)
    if failure.failure_class is FailureClass.CRASH:
        logging.getLogger(__name__).error(trace)
    logging.getLogger(__name__).error("%s: %s", failure.failure_class, failure.sentence)
    record_failure(context, failure)
    if context.world_size > 1:
        # A destructor that waits for the other ranks would hide the failure until they time out.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODES[failure.failure_class])
    return EXIT_CODES[failure.failure_class]


def _log_to_volume(context: RunContext) -> None:
    context.logs.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers.append(logging.FileHandler(context.logs / f"rank{context.rank}.log"))
    form = f"%(asctime)s %(levelname)s {context.attempt.stage}/{context.attempt.number} rank {context.rank} %(message)s"
    logging.basicConfig(level=logging.INFO, handlers=handlers, format=form, force=True)


if __name__ == "__main__":
    sys.exit(main())
