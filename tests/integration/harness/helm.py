"""Helm, as its users call it: one release of the project's chart in a cluster."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from tests.support.time_limits import scaled

from . import binaries
from .api import Resource

CHART = Path(__file__).parents[3] / "charts" / "finetune-operator"


class HelmError(RuntimeError):
    """Helm refused; the message is what it said."""


@dataclass(frozen=True)
class Helm:
    """The program, with folders of its own for what it caches."""

    folder: Path
    kubeconfig: Path | None = None

    def __call__(self, *arguments: str | Path) -> str:
        """Run one command and return what it printed."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "KUBECONFIG": str(self.kubeconfig or self.folder / "none"),
        }
        command = [binaries.ensure("helm"), *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=scaled(120)
        )
        if done.returncode != 0:
            raise HelmError(done.stdout + done.stderr)
        return done.stdout

    def template(
        self,
        values: Resource | None = None,
        *,
        chart: Path = CHART,
        namespace: str = "ops",
        served: Sequence[str] = (),
    ) -> list[Resource]:
        """Render the chart as release `finetune`, without a cluster; `served` are kinds that one would have."""
        cluster = ("--kube-version", binaries.KUBERNETES_VERSION, *(f"--api-versions={kind}" for kind in served))
        text = self("template", "finetune", chart, "-n", namespace, *cluster, *self._values(values))
        return [manifest for manifest in yaml.safe_load_all(text) if manifest]

    def install(self, namespace: str, values: Resource | None = None, *, chart: Path = CHART) -> str:
        """Install or upgrade release `finetune`; a CRD that is there already is taken over."""
        return self(
            *("upgrade", "--install", "finetune", chart, "-n", namespace, "--take-ownership"), *self._values(values)
        )

    def uninstall(self, namespace: str) -> str:
        """Remove release `finetune`."""
        return self("uninstall", "finetune", "-n", namespace, "--ignore-not-found")

    def _values(self, values: Resource | None) -> Sequence[str | Path]:
        if not values:
            return ()
        path = self.folder / "values.yaml"
        path.write_text(yaml.safe_dump(values))
        return ("--values", path)
