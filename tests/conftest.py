"""What all tests share: quiet libraries, no network by accident, and an honest list of what was not run."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings
from tests.support.time_limits import scaled, slowness

# A machine's load is no property of the code; in CI (.ci/run) the examples are the same each time.
settings.register_profile("everywhere", deadline=None)
settings.register_profile("same-examples", deadline=None, derandomize=True)
settings.load_profile("everywhere")

os.environ.update(
    {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_SILENT": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

FIRST = ("unit", "fuzz", "trainer", "local", "integration", "e2e")
LONG = ("local/test_run_end_to_end.py", "trainer/benchmarks/test_benchmarks.py", "trainer/train/test_launchers.py")
"""Files that take a minute and more: begun last, they would keep one worker busy while the other has ended."""

NEVER_RUN_WITHOUT = (
    "no test covers CUDA: NCCL, fused AdamW, varlen and flash attention, memory and speed on a GPU",
    "no test covers the public Hub, W&B's cloud or a registry: loopback servers speak their protocols",
    "no test covers a network that enforces NetworkPolicies, or a network file system under the checkpoints",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """A cluster to use instead of one of our own, and what the end-to-end tests have to be told of it."""
    group = parser.getgroup("given cluster", "tests on a cluster that exists already (tests/e2e/README.md)")
    group.addoption("--kubeconfig", metavar="FILE", help="that cluster; the same as FINETUNE_TEST_KUBECONFIG")
    group.addoption("--storage-class", metavar="NAME", help="of the volumes; default: the cluster's default class")
    group.addoption("--host-address", metavar="IP", help="this machine, as pods reach it; default: towards a node")
    group.addoption("--image-prefix", metavar="TEXT", default="", help="before the images' names; see images/build.py")


def pytest_configure(config: pytest.Config) -> None:
    """Put the option where all tests, and the workers of this run, look for it; make Ctrl-C count."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts what it puts into the background deaf to Ctrl-C, and so would be every program under test.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    slowness()  # before workers start, which take it over
    if config.option.kubeconfig:
        from tests.integration.harness.control_plane import KUBECONFIG_VARIABLE

        os.environ[KUBECONFIG_VARIABLE] = str(Path(config.option.kubeconfig).expanduser().absolute())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Give the test a time limit for this machine, before pytest-timeout looks for one."""
    marker, option = item.get_closest_marker("timeout"), item.config.getoption("timeout")
    limit = marker.args[0] if marker else option if option is not None else float(item.config.getini("timeout"))
    item.add_marker(pytest.mark.timeout(scaled(limit)), append=False)
    return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, but for the long ones beside them; one worker a file, unless a folder says otherwise."""
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root)
        if item.get_closest_marker("xdist_group") is None and path.parts[0] != "integration":
            item.add_marker(pytest.mark.xdist_group("e2e" if path.parts[0] == "e2e" else str(path)))
    items.sort(key=lambda item: _rank(item.path.relative_to(root)))


def _rank(path: Path) -> int:
    if path.as_posix() in LONG and "PYTEST_XDIST_WORKER" in os.environ:
        return -1
    return FIRST.index(path.parts[0]) if path.parts[0] in FIRST else -1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what this machine could not run, with the reason: a skip must never look green."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.section("not run on this machine")
    for what in NEVER_RUN_WITHOUT:
        terminalreporter.write_line(what)
    if not skipped:
        terminalreporter.write_line("every test was run")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"{report.nodeid}: {str(reason).removeprefix('Skipped: ')}")
