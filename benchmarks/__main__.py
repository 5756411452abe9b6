"""`python -m benchmarks [NAME...] [--quick | --full]`: run benchmarks, print their tables, keep the results.

Without names all of them are run. `--quick` is to see that they run, `--full` takes longer and adds what takes hours.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time

from benchmarks.harness import FULL, NORMAL, QUICK, Result, Size

BENCHMARKS = {
    "peers-tweets": "side by side with TRL on short documents",
    "peers-chats": "side by side with TRL on chats of mixed length",
    "peers-intents": "side by side with TRL on a task whose prompt names 77 labels",
    "limit": "against the measured matrix product",
    "startup": "process start to first step",
    "checkpoint": "how long a save holds the loop",
    "prepare": "rows per second and memory",
    "evaluate": "77 labels, and generation",
    "scaling": "1 to 3 ranks, and a model for 12 and 96 GPUs",
}
ONLY_FULL = {"convergence": "time to a validation loss"}


def run(name: str, size: Size) -> Result:
    """One benchmark."""
    module, _, part = name.partition("-")
    found: Result = importlib.import_module(f"benchmarks.{module}").run(size, *([part] if part else []))
    return found


def main() -> int:
    """Run what was asked for; 1 if one of them failed."""
    known = {**BENCHMARKS, **ONLY_FULL}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(f"{n} ({w})" for n, w in known.items()))
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const=QUICK, default=NORMAL)
    sizes.add_argument("--full", dest="size", action="store_const", const=FULL)
    given = parser.parse_args()
    names = [known_name for name in given.names for known_name in known if known_name.partition("-")[0] == name]
    names += [name for name in given.names if name in known and name not in names]
    if unknown := set(given.names) - {*known, *(name.partition("-")[0] for name in known)}:
        parser.error(f"there is no {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A job to measure need not hold anything out; what its stages warn of stands in its report.
    logging.getLogger("finetune_trainer").setLevel(logging.ERROR)
    failed = 0
    for name in names or [*BENCHMARKS, *(ONLY_FULL if given.size is FULL else ())]:
        begun = time.monotonic()
        print(f"\n## {name}: {known[name]}\n", flush=True)
        try:
            result = run(name, given.size)
        except Exception as error:  # the others are still worth having
            print(f"{name} failed: {error}", file=sys.stderr)
            failed = 1
            continue
        path = result.write(given.size)
        print(f"{result.text()}\n\n{time.monotonic() - begun:.0f} s, {path}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
