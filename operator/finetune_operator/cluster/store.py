"""What the watches have seen: jobs and their children by job. Filled by the watches, read by the reconciler.

Ten thousand bodies as dictionaries would be most of the process's memory. So what nobody reads is dropped and the
rest is kept as JSON, unpacked when its job is worked on.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from finetune_api.base import STAGES
from finetune_api.report import MAX_REPORT_BYTES
from finetune_api.runconfig import RUN_CONFIG_FILE
from finetune_api.status import Phase
from finetune_operator.cluster.api import Object
from finetune_operator.manifests.labels import JOB
from finetune_operator.manifests.names import channel_name, label_value, shared_name

FINE_TUNE_JOB = "FineTuneJob"
COMPRESSED_FROM = 16384
"""Bytes of JSON from which compressing is worth its time in a body that changes."""
ENDED = frozenset({Phase.COMPLETE, Phase.FAILED})
APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
READ = ("apiVersion", "kind", "spec", "status")
KEYS = frozenset({RUN_CONFIG_FILE, *STAGES})
MAX_TEXT = 2 * MAX_REPORT_BYTES
"""Characters of a value of a ConfigMap, which a job's pods can write, that are kept."""
UNREAD = frozenset({"managedFields", "finalizers", "generateName", "selfLink"})


class Key(NamedTuple):
    """A job: its namespace and the value of its label."""

    namespace: str
    label: str


class _Packed(NamedTuple):
    """One body."""

    uid: str
    version: int
    phase: str
    """Of a FineTuneJob."""
    data: bytes


class Store:
    """Newest known bodies, by kind and job. A body that is no newer than the known one is passed over."""

    def __init__(self) -> None:
        self._bodies: dict[tuple[str, Key], dict[str, _Packed]] = {}

    def put(self, kind: str, body: Object) -> Key | None:
        """Take a body over; returns the job it is about, or None if it is about none or nothing new."""
        key = key_of(kind, body)
        if key is None:
            return None
        name, version, uid = body["metadata"]["name"], int(body["metadata"].get("resourceVersion") or 0), _uid(body)
        known = self._bodies.setdefault((kind, key), {})
        before = known.get(name)
        if before is not None and before.uid == uid and before.version >= version:
            return None
        phase = str((body.get("status") or {}).get("phase", Phase.PENDING)) if kind == FINE_TUNE_JOB else ""
        data = json.dumps(slim(kind, body), separators=(",", ":"), ensure_ascii=False).encode()
        # Active jobs are read again soon, ended ones hardly ever.
        if phase in ENDED or len(data) >= COMPRESSED_FROM:
            data = zlib.compress(data, 1)
        known[name] = _Packed(uid, version, phase, data)
        return key

    def drop(self, kind: str, body: Object) -> Key | None:
        """Forget a body that was deleted; returns the job it was about."""
        key = key_of(kind, body)
        if key is None:
            return None
        name = body["metadata"]["name"]
        before = self._bodies.get((kind, key), {}).get(name)
        if before is not None and before.uid == _uid(body):
            self._forget(kind, key, name)
        return key

    def keep_only(
        self, kind: str, namespace: str, uids: Collection[str], version: int, job: Key | None = None
    ) -> list[Key]:
        """Forget bodies of a kind that a list of that version (of a namespace, or all; of one job) lacks.

        Returns the jobs of what was forgotten.
        """
        listed = [(known, key) for known, key in self._bodies if known == kind and namespace in ("", key.namespace)]
        gone = [
            (key, name)
            for _, key in (listed if job is None else [(kind, job)])
            for name, packed in self._bodies.get((kind, key), {}).items()
            if packed.uid not in uids and packed.version <= version
        ]
        for key, name in gone:
            self._forget(kind, key, name)
        return [key for key, _ in gone]

    def _forget(self, kind: str, key: Key, name: str) -> None:
        bodies = self._bodies[kind, key]
        del bodies[name]
        if not bodies:
            del self._bodies[kind, key]

    def job(self, key: Key) -> Object | None:
        """The FineTuneJob itself."""
        return next(iter(self.of(FINE_TUNE_JOB, key)), None)

    def of(self, kind: str, key: Key) -> tuple[Object, ...]:
        """All bodies of a kind that belong to a job."""
        return tuple(_unpack(packed.data) for packed in self._bodies.get((kind, key), {}).values())

    def named(self, kind: str, key: Key, name: str) -> Object | None:
        """One body of a kind that belongs to a job."""
        packed = self._bodies.get((kind, key), {}).get(name)
        return None if packed is None else _unpack(packed.data)

    def holds(self, kind: str, key: Key, name: str) -> bool:
        """Whether a body of that name belongs to a job."""
        return name in self._bodies.get((kind, key), {})

    def phases(self) -> Counter[tuple[str, str]]:
        """How many FineTuneJobs there are, by namespace and phase."""
        return Counter(
            (key.namespace, packed.phase)
            for (kind, key), bodies in self._bodies.items()
            if kind == FINE_TUNE_JOB
            for packed in bodies.values()
        )


def key_of(kind: str, body: Object) -> Key | None:
    """The job that a body belongs to."""
    meta = body["metadata"]
    if kind == FINE_TUNE_JOB:
        return Key(meta["namespace"], label_value(meta["name"]))
    label = (meta.get("labels") or {}).get(JOB)
    if not label or (kind == "ConfigMap" and meta["name"] not in _config_maps_of(_owner(meta), label)):
        return None
    return Key(meta["namespace"], label)


def _owner(meta: Object) -> str:
    """Name of the FineTuneJob that controls an object; empty if none does."""
    owners = meta.get("ownerReferences") or []
    return next((owner["name"] for owner in owners if owner.get("controller") and owner["kind"] == FINE_TUNE_JOB), "")


def _config_maps_of(job: str, label: str) -> frozenset[str]:
    """Names of the ConfigMaps of a job with that label; anybody may put the label on others, to fill our memory."""
    names = {shared_name(job, "config"), *(channel_name(job, stage) for stage in STAGES)}
    return frozenset(names) if job and label_value(job) == label else frozenset()


def slim(kind: str, body: Object) -> Object:
    """A body without what nobody reads here and what is most of its size."""
    meta = {name: value for name, value in body["metadata"].items() if name not in UNREAD}
    annotations = meta.pop("annotations", None) or {}
    kept = {name: value for name, value in annotations.items() if name != APPLIED}
    kept_body = {name: body[name] for name in READ if name in body} | {"metadata": meta}
    if kind == FINE_TUNE_JOB:
        meta["annotations"] = kept
    elif kind == "ConfigMap":
        data = body.get("data") or {}
        texts = {name: _image(text) if name == RUN_CONFIG_FILE else text for name, text in data.items() if name in KEYS}
        kept_body["data"] = {name: text for name, text in texts.items() if len(text) <= MAX_TEXT}
    elif "spec" in body:
        kept_body["spec"] = _pod_spec(body["spec"]) if kind == "Pod" else _without_pods(body["spec"])
    return kept_body


def _pod_spec(spec: Object) -> Object:
    """Where a pod runs and what its containers may use."""
    node = {"nodeName": spec["nodeName"]} if "nodeName" in spec else {}
    return node | {
        kind: [{"name": each["name"], "resources": each.get("resources") or {}} for each in spec.get(kind) or []]
        for kind in ("initContainers", "containers")
    }


def _without_pods(spec: Object) -> Object:
    """The spec of what makes pods, without how it makes them."""
    left_out = ("template", "podTemplateOverrides", "env", "command")
    return {
        name: _without_pods(value) if isinstance(value, dict) else value
        for name, value in spec.items()
        if name not in left_out
    }


def _image(run_config: str) -> str:
    """Of a run config, what is read again: the image."""
    try:
        return json.dumps({"image": json.loads(run_config).get("image", "")})
    except (ValueError, AttributeError, RecursionError):
        return run_config


def _unpack(data: bytes) -> Object:
    body: Object = json.loads(data if data.startswith(b"{") else zlib.decompress(data))
    return body


def _uid(body: Object) -> str:
    return str(body["metadata"].get("uid", ""))
