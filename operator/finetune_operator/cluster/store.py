"""What the watches have seen: jobs and their children by job. Filled by the handlers, read by the reconciler."""

from __future__ import annotations

from typing import NamedTuple

from finetune_operator.cluster.api import Object
from finetune_operator.planning.labels import JOB
from finetune_operator.planning.names import label_value

FINE_TUNE_JOB = "FineTuneJob"


class Key(NamedTuple):
    """A job: its namespace and the value of its label."""

    namespace: str
    label: str


class Store:
    """Newest known bodies, by kind and job. A body that is older than the known one is passed over."""

    def __init__(self) -> None:
        self._bodies: dict[tuple[str, Key], dict[str, Object]] = {}

    def put(self, kind: str, body: Object) -> Key | None:
        """Take a body over; returns the job it is about, or None if it is about none."""
        key = key_of(kind, body)
        if key is None:
            return None
        name = body["metadata"]["name"]
        known = self._bodies.setdefault((kind, key), {})
        if name not in known or _version(body) >= _version(known[name]) or _uid(body) != _uid(known[name]):
            known[name] = body
        return key

    def drop(self, kind: str, body: Object) -> Key | None:
        """Forget a body that was deleted; returns the job it was about."""
        key = key_of(kind, body)
        if key is None:
            return None
        known = self._bodies.get((kind, key), {})
        name = body["metadata"]["name"]
        if name in known and _uid(known[name]) == _uid(body):
            del known[name]
        if not known:
            self._bodies.pop((kind, key), None)
        return key

    def drop_all_but(self, kind: str, key: Key, suspects: frozenset[str], there: frozenset[str]) -> bool:
        """Forget those of the suspects (uids) that are not there; whether there were any.

        kopf lists again after a watch has broken, and does not say what was deleted meanwhile.
        """
        ghosts = [body for body in self.of(kind, key) if _uid(body) in suspects - there]
        for body in ghosts:
            self.drop(kind, body)
        return bool(ghosts)

    def uids(self, kind: str, key: Key) -> frozenset[str]:
        """Uids of all bodies of a kind that belong to a job."""
        return frozenset(_uid(body) for body in self.of(kind, key))

    def job(self, key: Key) -> Object | None:
        """The FineTuneJob itself."""
        return next(iter(self._bodies.get((FINE_TUNE_JOB, key), {}).values()), None)

    def of(self, kind: str, key: Key) -> tuple[Object, ...]:
        """All bodies of a kind that belong to a job."""
        return tuple(self._bodies.get((kind, key), {}).values())

    def named(self, kind: str, key: Key, name: str) -> Object | None:
        """One body of a kind that belongs to a job."""
        return self._bodies.get((kind, key), {}).get(name)

    def jobs(self) -> list[Object]:
        """Every FineTuneJob."""
        return [job for (kind, _), known in self._bodies.items() if kind == FINE_TUNE_JOB for job in known.values()]


def key_of(kind: str, body: Object) -> Key | None:
    """The job that a body belongs to."""
    meta = body["metadata"]
    if kind == FINE_TUNE_JOB:
        return Key(meta["namespace"], label_value(meta["name"]))
    label = (meta.get("labels") or {}).get(JOB)
    return Key(meta["namespace"], label) if label else None


def slim(body: Object) -> Object:
    """A body without what nobody reads here and what is most of its size."""
    meta = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
    return {**body, "metadata": meta}


def _version(body: Object) -> int:
    return int(body["metadata"].get("resourceVersion") or 0)


def _uid(body: Object) -> str:
    return str(body["metadata"].get("uid", ""))
