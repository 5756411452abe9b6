"""The programs of the control plane: built once from Go modules, kept outside the checkout by version.

Never changes anything in the checkout, and never builds what `KUBEBUILDER_ASSETS` already offers.
Run `python -m tests.integration.harness.binaries` to build them all ahead of the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KUBERNETES_VERSION = "v1.36.3"
TRAINING_OPERATOR_VERSION = "v1.9.4"
HELM_VERSION = "v3.22.0"
COREDNS_VERSION = "v1.14.1"
TRAINER_VERSION = "v2.3.0"
JOBSET_VERSION = "v0.12.0"
PROMETHEUS_OPERATOR_VERSION = "v0.85.0"

LIBRARY_VERSION = KUBERNETES_VERSION.replace("v1.", "v0.", 1)

KUBERNETES_MODULE = "k8s.io/kubernetes"
TRAINING_OPERATOR_MODULE = "github.com/kubeflow/training-operator"
HELM_MODULE = "helm.sh/helm/v3"
COREDNS_MODULE = "github.com/coredns/coredns"
TRAINER_MODULE = "github.com/kubeflow/trainer/v2"
JOBSET_MODULE = "sigs.k8s.io/jobset"
PROMETHEUS_OPERATOR_MODULE = "github.com/prometheus-operator/prometheus-operator"
# kube-apiserver's own module graph pins an etcd server: the pair is the one Kubernetes was
# tested with, and most of etcd is compiled already once the API server is.
ETCD_MODULE = "go.etcd.io/etcd/server/v3"

_STAGING_REPLACE = re.compile(r"^\s*(?:replace\s+)?(k8s\.io/\S+)\s+=>\s+\./staging/", re.MULTILINE)
_KUBERNETES_LIBRARY = re.compile(
    r"^\s*(?:require\s+)?(k8s\.io/(?:api|apiextensions-apiserver|apimachinery|apiserver|client-go|component-base))\s",
    re.MULTILINE,
)
_GO_DIRECTIVES = re.compile(r"^(?:go|godebug|toolchain)\s.*$", re.MULTILINE)


class BinaryUnavailableError(RuntimeError):
    """A program of the control plane cannot be found or built; the message says what to do."""


@dataclass(frozen=True)
class Program:
    """One executable and the Go package it is built from."""

    name: str
    module: str
    package: str
    version: str
    source: str = ""
    """A `main` of our own, built instead of a package of the module's."""

    @property
    def folder(self) -> Path:
        """Where it is kept once it is built: one folder for each thing it can be built from."""
        own = hashlib.sha256(self.source.encode()).hexdigest()[:8] if self.source else ""
        return cache_folder() / "-".join(filter(None, (self.name, self.version, own)))

    @property
    def is_kubernetes(self) -> bool:
        """Whether it comes out of the Kubernetes module graph, which needs replace directives."""
        return self.module in (KUBERNETES_MODULE, ETCD_MODULE)


_COREDNS_MAIN = """package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
)

func main() {
	dnsserver.Directives = []string{"bind", "errors", "cache", "kubernetes"}
	coremain.Run()
}
"""
# The process that holds a pod's namespaces: it waits, and reaps what is orphaned.
_PAUSE_MAIN = """package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for received := range signals {
		if received != syscall.SIGCHLD {
			return
		}
		for {
			if pid, _ := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 {
				break
			}
		}
	}
}
"""


def _kubernetes(name: str) -> Program:
    return Program(name, KUBERNETES_MODULE, f"{KUBERNETES_MODULE}/cmd/{name}", KUBERNETES_VERSION)


PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        _kubernetes("kube-apiserver"),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kube-scheduler"),
        _kubernetes("kubelet"),
        _kubernetes("kube-proxy"),
        # Versioned by the Kubernetes release that pins it.
        Program("etcd", ETCD_MODULE, ETCD_MODULE, f"for-kubernetes-{KUBERNETES_VERSION}"),
        Program(
            "training-operator",
            TRAINING_OPERATOR_MODULE,
            f"{TRAINING_OPERATOR_MODULE}/cmd/training-operator.v1",
            TRAINING_OPERATOR_VERSION,
        ),
        Program(
            "kubeflow-trainer", TRAINER_MODULE, f"{TRAINER_MODULE}/cmd/trainer-controller-manager", TRAINER_VERSION
        ),
        Program("jobset", JOBSET_MODULE, JOBSET_MODULE, JOBSET_VERSION),
        Program("helm", HELM_MODULE, f"{HELM_MODULE}/cmd/helm", HELM_VERSION),
        # With the four plugins that a test needs it is built in a third of the time.
        Program("coredns", COREDNS_MODULE, ".", COREDNS_VERSION, _COREDNS_MAIN),
        Program("pause", "", ".", "1", _PAUSE_MAIN),
    )
}

CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager", "etcd", "training-operator")
"""What the integration tests start; the others are built on demand: Helm, and what a real node needs."""

NODE = ("kubelet", "kube-scheduler", "kube-proxy", "coredns", "pause")
"""What a node that runs pods needs beside them."""

HOW_TO_GET_THEM = (
    "The control plane is built from source and no `go` was found: install Go 1.26 or newer, "
    f"or point KUBEBUILDER_ASSETS at a folder with {', '.join(CONTROL_PLANE)}."
)


def ensure(name: str) -> Path:
    """Return the path of a program, building it first where neither cache nor environment has it."""
    offered = _from_assets(name)
    if offered is not None:
        return offered
    program = PROGRAMS[name]
    folder = program.folder
    with _exclusive(folder):
        if not (folder / name).exists():
            with _published_atomically(folder) as target:
                _build(program, target / name)
    return folder / name


def ensure_training_operator_manifests() -> Path:
    """Return the folder with the training-operator's own `crds`, `rbac` and `webhook` manifests."""
    return _manifests("training-operator", TRAINING_OPERATOR_MODULE, TRAINING_OPERATOR_VERSION, "manifests/base")


def ensure_trainer_manifests() -> Path:
    """Return the folder with Kubeflow Trainer's own `crds` and `webhook` manifests."""
    return _manifests("kubeflow-trainer", TRAINER_MODULE, TRAINER_VERSION, "manifests/base")


def ensure_jobset_manifests() -> Path:
    """Return the folder with JobSet's own `crd` and `webhook` manifests."""
    return _manifests("jobset", JOBSET_MODULE, JOBSET_VERSION, "config/components")


def ensure_prometheus_operator_crds() -> Path:
    """Return the folder with the Prometheus operator's own CRDs."""
    module, version = PROMETHEUS_OPERATOR_MODULE, PROMETHEUS_OPERATOR_VERSION
    return _manifests("prometheus-operator", module, version, "example/prometheus-operator-crd")


def _manifests(name: str, module: str, version: str, inside: str) -> Path:
    """A folder of a module, kept beside the programs."""
    folder = cache_folder() / f"{name}-manifests-{version}"
    with _exclusive(folder):
        if not folder.exists():
            source = Path(_download(module, version)["Dir"]) / inside
            with _published_atomically(folder) as target:
                # Files of the module cache are read-only; copyfile leaves the mode behind, so
                # that the cache folder can be deleted like any other.
                shutil.copytree(source, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
                _make_writable(target)
    return folder


def cache_folder() -> Path:
    """Return the folder for built programs, outside any checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "finetune-operator" / "bin"


def missing(names: Iterable[str] = CONTROL_PLANE) -> list[str]:
    """Return the names of the programs, by default the control plane's, that would have to be built now."""
    return [name for name in names if _from_assets(name) is None and not (PROGRAMS[name].folder / name).exists()]


def can_build() -> bool:
    """Whether this machine has the compiler that building needs."""
    return shutil.which("go") is not None


def _from_assets(name: str) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets:
        return None
    candidate = Path(assets) / name
    return candidate if os.access(candidate, os.X_OK) else None


def _build(program: Program, target: Path) -> None:
    say = f"building {program.name} {program.version} (minutes the first time) ..."
    print(say, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="finetune-build-") as folder:
        source = Path(folder)
        if program.is_kubernetes:
            _write_kubernetes_module(source)
        else:
            _write_plain_module(source, program)
        _go("mod", "tidy", cwd=source)
        _go(
            "build",
            "-trimpath",
            "-buildvcs=false",
            f"-ldflags={' '.join(_linker_flags(program))}",
            "-o",
            str(target),
            program.package,
            cwd=source,
        )


def _write_kubernetes_module(folder: Path) -> None:
    """Write a module that can import Kubernetes' commands.

    `k8s.io/kubernetes` replaces its libraries with `./staging/...`, which only holds inside its
    own checkout, so `go install pkg@version` refuses it: the same replaces are spelled out here
    with the published versions of those libraries.
    """
    upstream = Path(_download(KUBERNETES_MODULE, KUBERNETES_VERSION)["GoMod"]).read_text()
    lines = ["module controlplane", ""]
    lines += _GO_DIRECTIVES.findall(upstream)
    lines += ["", f"require {KUBERNETES_MODULE} {KUBERNETES_VERSION}", ""]
    lines += [f"replace {library} => {library} {LIBRARY_VERSION}" for library in _STAGING_REPLACE.findall(upstream)]
    (folder / "go.mod").write_text("\n".join(lines) + "\n")
    packages = [program.package for program in PROGRAMS.values() if program.is_kubernetes]
    _write_imports(folder, packages)


def _write_plain_module(folder: Path, program: Program) -> None:
    # The language version has to match the dependency's: defaults of the runtime hang on it.
    lines = ["module controlplane", ""]
    if program.module:
        upstream = Path(_download(program.module, program.version)["GoMod"]).read_text()
        lines += [*_GO_DIRECTIVES.findall(upstream), "", f"require {program.module} {program.version}"]
        if program.module in (TRAINER_MODULE, JOBSET_MODULE):
            # In the control plane's patch release, in which they are compiled already.
            libraries = sorted(set(_KUBERNETES_LIBRARY.findall(upstream)))
            lines += [f"require {library} {LIBRARY_VERSION}" for library in libraries]
    (folder / "go.mod").write_text("\n".join(lines) + "\n")
    if program.source:
        (folder / "main.go").write_text(program.source)
    else:
        _write_imports(folder, [program.package])


def _write_imports(folder: Path, packages: list[str]) -> None:
    # Commands cannot be imported by code that is built; the tag keeps this file for `tidy` only.
    imports = "\n".join(f'\t_ "{package}"' for package in sorted(packages))
    (folder / "tools.go").write_text(f"//go:build tools\n\npackage tools\n\nimport (\n{imports}\n)\n")


def _linker_flags(program: Program) -> list[str]:
    flags = ["-s", "-w"]
    if program.module == KUBERNETES_MODULE:
        major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
        stamped = {"gitVersion": KUBERNETES_VERSION, "gitMajor": major, "gitMinor": minor}
        flags += [f"-X=k8s.io/component-base/version.{name}={value}" for name, value in stamped.items()]
    return flags


def _download(module: str, version: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="finetune-build-") as folder:
        answer = _go("mod", "download", "-json", f"{module}@{version}", cwd=Path(folder))
    fields: dict[str, str] = json.loads(answer)
    return fields


def _go(*arguments: str, cwd: Path) -> str:
    if not can_build():
        raise BinaryUnavailableError(HOW_TO_GET_THEM)
    # Without cgo the programs also start in an image that has no C library.
    environment = {**os.environ, "CGO_ENABLED": "0"}
    done = subprocess.run(["go", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise BinaryUnavailableError(f"`go {' '.join(arguments)}` failed:\n{last_lines}")
    return done.stdout


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time build into a folder; the others wait and then find it built."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _published_atomically(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the final name only once it is complete."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_writable(folder: Path) -> None:
    # copytree gives each directory the mode of its source, which is read-only here.
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


def main(names: list[str]) -> int:
    """Make all programs of the control plane (or those named) ready and print where they are."""
    try:
        for name in names or CONTROL_PLANE:
            started = time.monotonic()
            path = ensure(name)
            seconds = time.monotonic() - started
            print(f"{name:<24} {PROGRAMS[name].version:<26} {seconds:6.1f} s  {path}", flush=True)
        print(
            f"{'training-operator CRDs':<24} {TRAINING_OPERATOR_VERSION:<26}           "
            f"{ensure_training_operator_manifests()}"
        )
    except BinaryUnavailableError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
