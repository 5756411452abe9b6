"""The report of a running attempt: one document, always rewritten as a whole.

Rank 0 writes it to the run directory and, on a cluster, to the job's report ConfigMap from a thread of its own: a
slow or failing API server never delays the stage.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.files import write_json
from finetune_api.report import Choice, Failure, Progress, Report
from finetune_api.runconfig import REPORT_VARIABLE, Attempt, attempt_name
from finetune_trainer.failures import printable

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 1.0
PATCH_SECONDS = 15.0
_NEWS = ("resumedFromStep", "done", "failure")
"""Sent at once, because the status records them and the attempt may end before the next patch."""
API_TOKEN_DIRECTORY = Path("/var/run/secrets/finetune-report")


class Reporter:
    """Keeps and writes the report of one attempt; a disabled one (rank > 0) writes nothing."""

    def __init__(self, attempt: Attempt, directory: Path, *, enabled: bool) -> None:
        self.report = Report(attempt=attempt.id, stage=attempt.stage, time=datetime.now(UTC))
        self._path = directory / f"{attempt_name(attempt.stage, attempt.number)}.json"
        self._enabled = enabled
        self._written_at = 0.0
        patched = enabled and attempt.report_to == "configmap"
        self._channel = ConfigMapChannel.from_environment(attempt.stage) if patched else None

    def update(self, **fields: Any) -> None:
        """Set fields of the report and write it at once."""
        self.report = self.report.model_copy(update=fields)
        self._write()

    def progress(self, progress: Progress) -> None:
        """Set the progress; written at most once a second."""
        self.report = self.report.model_copy(update={"progress": progress})
        if time.monotonic() - self._written_at >= PROGRESS_SECONDS:
            self._write()

    def activity(self, what: str) -> None:
        """Report what is being done now."""
        self.update(activity=printable(what))

    def choose(self, name: str, value: object, why: str) -> None:
        """Record what an `auto` became, and why."""
        self.update(choices={**self.report.choices, name: Choice(value=printable(str(value)), why=printable(why))})

    def choose_all(self, choices: Mapping[str, Choice]) -> None:
        """Record several choices at once."""
        self.update(choices={**self.report.choices, **choices})

    def warn(self, sentence: str) -> None:
        """Add a warning once."""
        sentence = printable(sentence)
        if sentence not in self.report.warnings:
            log.warning(sentence)
            self.update(warnings=[*self.report.warnings, sentence])

    def fail(self, failure: Failure) -> None:
        """Record why the attempt ends."""
        self.update(failure=failure, activity="failed")
        self.close()

    def done(self, **fields: Any) -> None:
        """Record success; all results must be durable before this is called."""
        self.update(**fields, done=True, activity="done")
        self.close()

    def close(self, timeout_seconds: float = 20.0) -> None:
        """Send the last state before the process ends."""
        if self._channel is not None:
            self._channel.flush(timeout_seconds)

    def _write(self) -> None:
        if not self._enabled:
            return
        self._written_at = time.monotonic()
        self.report = self.report.model_copy(update={"time": datetime.now(UTC)})
        wire = self.report.to_wire()
        write_json(self._path, wire)
        if self._channel is not None:
            self._channel.offer(wire)


class ConfigMapChannel:
    """Patches one key of the report ConfigMap, newest state only, from a daemon thread."""

    def __init__(self, url: str, key: str, token_file: Path, context: ssl.SSLContext | None) -> None:
        self._url, self._key, self._token_file, self._context = url, key, token_file, context
        self._newest: Mapping[str, object] | None = None
        self._changed = threading.Condition()
        self._urgent = False
        self._told: Mapping[str, object] = {}
        self._busy = False
        threading.Thread(target=self._send_forever, daemon=True, name="report").start()

    @classmethod
    def from_environment(cls, key: str, secrets: Path = API_TOKEN_DIRECTORY) -> ConfigMapChannel:
        """The channel of this pod: `FINETUNE_REPORT_CONFIGMAP` is `<namespace>/<name>`."""
        namespace, _, name = os.environ[REPORT_VARIABLE].partition("/")
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        host = f"[{host}]" if ":" in host else host
        url = f"https://{host}:{port}/api/v1/namespaces/{namespace}/configmaps/{name}"
        return cls(url, key, secrets / "token", ssl.create_default_context(cafile=str(secrets / "ca.crt")))

    def offer(self, report: Mapping[str, object]) -> None:
        """Send `report` next."""
        with self._changed:
            news = {name: report[name] for name in _NEWS if report.get(name)}
            self._newest, self._urgent, self._told = report, self._urgent or news != self._told, news
            self._changed.notify_all()

    def flush(self, timeout_seconds: float) -> None:
        """Wait until the newest report has been sent, or until the timeout."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._newest is None and not self._busy, timeout_seconds)

    def _send_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None)
                report, self._newest, self._busy = self._newest, None, True
            sent = self._send(report or {})
            with self._changed:
                self._busy = False
                if not sent and self._newest is None:
                    self._newest = report
                self._changed.notify_all()
                pause = PATCH_SECONDS if sent else 2.0
                self._changed.wait_for(lambda: self._urgent and self._newest is not None, pause)
                self._urgent = self._urgent and self._newest is not None and not sent

    def _send(self, report: Mapping[str, object]) -> bool:
        body = json.dumps({"data": {self._key: json.dumps(report, ensure_ascii=False)}}).encode()
        request = urllib.request.Request(self._url, data=body, method="PATCH")
        request.add_header("Content-Type", "application/merge-patch+json")
        try:
            request.add_header("Authorization", f"Bearer {self._token_file.read_text().strip()}")
            with urllib.request.urlopen(request, timeout=10, context=self._context):
                return True
        except (OSError, ValueError) as error:
            log.warning("The report could not be sent (%s); the stage continues without it", type(error).__name__)
            return False
