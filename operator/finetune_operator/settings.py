"""How the operator runs: flags and FINETUNE_* variables (docs/operator.md)."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version

from finetune_api.spec import FineTuneJobSpec
from finetune_operator.decision.model import Environment
from finetune_operator.errors import UserError
from finetune_operator.manifests.backends import BACKENDS


@dataclass(frozen=True)
class Settings:
    """All settings of the operator."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to serve; empty means all."""
    image: str = "finetune-trainer"
    backend: str = "pytorchjob"
    """Backend for training pods: a name of manifests/backends.py."""
    workers: int = 8
    prices: Mapping[str, float] = field(default_factory=dict)
    """Price per GPU-hour by `topology.gpuType`; `default` for all others."""
    log_level: str = "info"
    log_format: str = "json"
    metrics_port: int = 8080
    health_port: int = 8081
    lease_name: str = "finetune-operator"
    lease_namespace: str = "default"
    lease_seconds: int = 15
    identity: str = ""
    gang_scheduling: bool = False
    grace_seconds: int = 120
    backoff_base_seconds: float = 10.0
    backoff_cap_seconds: float = 300.0

    def environment(self, spec: FineTuneJobSpec) -> Environment:
        """What these settings add to a job."""
        price = self.prices.get(spec.topology.gpu_type or "", self.prices.get("default"))
        return Environment(
            image=self.image,
            operator_version=_own_version(),
            price_per_gpu_hour=price,
            backoff_base_seconds=self.backoff_base_seconds,
            backoff_cap_seconds=self.backoff_cap_seconds,
            grace_seconds=self.grace_seconds,
            gang_scheduling=self.gang_scheduling,
        )


@cache
def _own_version() -> str:
    return version("finetune-operator")


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from FINETUNE_* variables. Raises UserError on a value that cannot be read."""

    def number(name: str, default: float) -> float:
        text = environ.get(f"FINETUNE_{name}", "")
        try:
            return float(text) if text else default
        except ValueError:
            raise UserError(f"FINETUNE_{name} is {text!r}, which is not a number.") from None

    backend = environ.get("FINETUNE_BACKEND") or Settings.backend
    if backend not in BACKENDS:
        raise UserError(f"FINETUNE_BACKEND must be {' or '.join(BACKENDS)}, not {backend!r}.")
    return Settings(
        namespaces=tuple(filter(None, environ.get("FINETUNE_NAMESPACES", "").replace(" ", "").split(","))),
        image=environ.get("FINETUNE_TRAINER_IMAGE") or Settings.image,
        backend=backend,
        workers=int(number("WORKERS", Settings.workers)),
        prices=_prices(environ.get("FINETUNE_PRICE_PER_GPU_HOUR", "")),
        log_level=environ.get("FINETUNE_LOG_LEVEL") or Settings.log_level,
        log_format=environ.get("FINETUNE_LOG_FORMAT") or Settings.log_format,
        metrics_port=int(number("METRICS_PORT", Settings.metrics_port)),
        health_port=int(number("HEALTH_PORT", Settings.health_port)),
        lease_name=environ.get("FINETUNE_LEASE_NAME") or Settings.lease_name,
        lease_namespace=environ.get("FINETUNE_LEASE_NAMESPACE") or Settings.lease_namespace,
        lease_seconds=int(number("LEASE_SECONDS", Settings.lease_seconds)),
        identity=f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}",
        gang_scheduling=environ.get("FINETUNE_GANG_SCHEDULING", "").lower() in ("1", "true", "yes"),
        grace_seconds=int(number("GRACE_SECONDS", Settings.grace_seconds)),
        backoff_base_seconds=number("BACKOFF_BASE_SECONDS", Settings.backoff_base_seconds),
        backoff_cap_seconds=number("BACKOFF_CAP_SECONDS", Settings.backoff_cap_seconds),
    )


def _prices(text: str) -> dict[str, float]:
    if not text:
        return {}
    try:
        value = json.loads(text)
        prices = {"default": value} if isinstance(value, int | float) else dict(value)
        return {str(gpu): float(price) for gpu, price in prices.items()}
    except (TypeError, ValueError):
        raise UserError(
            f'FINETUNE_PRICE_PER_GPU_HOUR must be a number or {{"A100-80GB": 1.8}}, not {text!r}.'
        ) from None
