"""Keeps the store up to date for one kind in one namespace (or all): lists, then watches, for ever.

Nothing is handled object by object as kopf would: an event costs its JSON and a place in the store, no task.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from finetune_operator.cluster.api import Api, ApiError, Object, backoff_seconds
from finetune_operator.cluster.store import Key, Store
from finetune_operator.manifests.labels import JOB

log = logging.getLogger(__name__)

PAGE_SIZE = 50
"""Complete bodies held at once, before the store trims them."""
RELIST_SECONDS = 900.0
"""How often everything is listed again, in case the watch missed an event."""
RESYNC_SECONDS = 3600.0
"""The same for a kind that kopf watches."""
UNKNOWN_KIND_SECONDS = 30.0
"""How often a kind is asked for that the cluster does not know: its CRD may be installed later."""


@dataclass
class Watch:
    """Keeps the store's objects of a kind; `changed` is called with the job of each object that is new."""

    api: Api
    store: Store
    kind: str
    namespace: str
    """Empty for all."""
    labels: str
    changed: Callable[[Key], None]
    listed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the store holds everything that existed at the start."""
    _version: str = ""
    """What is known up to; empty when everything has to be listed."""
    _failures: int = 0
    _complained: str = ""

    async def run(self) -> None:
        """List and watch until cancelled, starting over after any error."""
        clock, resync = asyncio.get_running_loop().time, 0.0
        while True:
            try:
                if not self._version or clock() >= resync:
                    self._version, _ = await self._list()
                    self._failures = 0
                    resync = clock() + RELIST_SECONDS * random.uniform(0.8, 1.2)
                    self.listed.set()
                await self._follow()
                await asyncio.sleep(backoff_seconds(1))
            except ApiError as error:
                if error.code == 410 or self._unknown(error):
                    self._version = ""
                await asyncio.sleep(self._pause(error))

    async def resync(self) -> None:
        """List periodically until cancelled: for a kind that kopf watches."""
        while True:
            await asyncio.sleep(RESYNC_SECONDS * random.uniform(0.8, 1.2))
            try:
                await self._list()
            except ApiError as error:
                log.warning("cannot list %s: %s", self.kind, error)

    async def look_again(self, job: Key) -> bool:
        """List what belongs to one job; whether a deletion had been missed. Raises ApiError."""
        if self.namespace not in ("", job.namespace):
            return False
        _, gone = await self._list(job)
        return gone

    async def _list(self, job: Key | None = None) -> tuple[str, bool]:
        """Bring the store up to date with everything that is there, or all of one job.

        Returns the version of the list, and whether it lacked something that the store held.
        """
        namespace = self.namespace if job is None else job.namespace
        labels = self.labels if job is None else ",".join(filter(None, (self.labels, f"{JOB}={job.label}")))
        uids: set[str] = set()
        version = ""
        async for page in self.api.pages(self.kind, namespace, labels, PAGE_SIZE):
            version = page["metadata"]["resourceVersion"]
            for body in page.get("items") or []:
                uids.add(body["metadata"]["uid"])
                self._tell(self.store.put(self.kind, body))
        gone = self.store.keep_only(self.kind, namespace, uids, int(version), job)
        for key in gone:
            self.changed(key)
        return version, bool(gone)

    async def _follow(self) -> None:
        """Take over what happens until the watch ends."""
        async for event in self.api.watch(self.kind, self.namespace, self.labels, self._version):
            self._failures = 0
            body: Object = event["object"]
            if event["type"] == "DELETED":
                self._tell(self.store.drop(self.kind, body))
            elif event["type"] != "BOOKMARK":
                self._tell(self.store.put(self.kind, body))
            self._version = body["metadata"]["resourceVersion"]

    def _tell(self, key: Key | None) -> None:
        if key is not None:
            self.changed(key)

    def _unknown(self, error: ApiError) -> bool:
        """Whether the cluster does not know the kind: then there are no objects to wait for."""
        if error.code != 404:
            return False
        self.listed.set()
        return True

    def _pause(self, error: ApiError) -> float:
        """Seconds until the next try; logs each persistent error once."""
        self._failures += 1
        unusual = error.code not in (0, 410, 429) or self._failures > 3
        if unusual and self._complained != error.reason:
            self._complained = error.reason
            log.warning("cannot watch %s in %s: %s", self.kind, self.namespace or "all namespaces", error)
        if error.code == 404:
            return UNKNOWN_KIND_SECONDS
        return backoff_seconds(self._failures, error.retry_after)
