"""Prometheus metrics of the operator; the names are those of the chart's alerts and dashboard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from finetune_api.status import JobStatus, Phase

Phases = Mapping[tuple[str, str], int]
"""How many FineTuneJobs there are, by namespace and phase."""

STAGE_BUCKETS = (10, 30, 60, 300, 900, 1800, 3600, 7200, 14400, 43200, 86400, 172800)
RECONCILE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """All metrics in a registry of their own, so that two operators fit into one test."""

    def __init__(self, phases: Callable[[], Phases] = dict) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Jobs(phases))
        self.api_requests = Counter(
            "finetune_api_requests_total", "Requests to the API server.", ["verb", "code"], registry=self.registry
        )
        self.attempts = Counter(
            "finetune_attempts_total",
            "Attempts that ended.",
            ["namespace", "stage", "outcome", "reason"],
            registry=self.registry,
        )
        self.gpu_hours = Counter("finetune_gpu_hours_total", "GPU-hours used.", ["namespace"], registry=self.registry)
        self.stage_seconds = Histogram(
            "finetune_stage_duration_seconds",
            "Duration of attempts that succeeded.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            "finetune_reconcile_duration_seconds",
            "Duration of one reconcile of one job.",
            buckets=RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self.reconcile_errors = Counter(
            "finetune_reconcile_errors_total", "Reconciles that failed and are retried.", registry=self.registry
        )
        self.queue_depth = Gauge("finetune_queue_depth", "Jobs waiting to be reconciled.", registry=self.registry)
        self.leader = Gauge("finetune_leader", "1 while this replica holds the Lease.", registry=self.registry)

    def count_request(self, verb: str, code: int) -> None:
        """Count one request to the API server; code 0 is one without an answer."""
        self.api_requests.labels(verb, str(code)).inc()

    def count_transition(self, namespace: str, old: JobStatus, new: JobStatus) -> None:
        """Count what a written status concluded."""
        before = {(record.stage, record.number): record.outcome for record in old.attempts}
        for record in new.attempts:
            if record.ended is None or before.get((record.stage, record.number), "running") != "running":
                continue
            self.attempts.labels(namespace, record.stage, record.outcome, record.reason or "").inc()
            if record.outcome == "succeeded":
                self.stage_seconds.labels(record.stage).observe((record.ended - record.started).total_seconds())
        self.gpu_hours.labels(namespace).inc(max(new.gpu_hours - old.gpu_hours, 0.0))


class _Jobs:
    """Jobs by namespace and phase, counted on each scrape."""

    def __init__(self, phases: Callable[[], Phases]) -> None:
        self._phases = phases

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not call `collect` to learn the names."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One sample per namespace and phase."""
        family = GaugeMetricFamily("finetune_jobs", "FineTuneJobs by phase.", labels=["namespace", "phase"])
        counts = self._phases()
        for namespace in {namespace for namespace, _ in counts}:
            for phase in Phase:
                family.add_metric([namespace, phase], counts.get((namespace, phase), 0))
        yield family
