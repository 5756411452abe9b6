"""The Lease that one of several operators holds while it works (the client's own LeaseLock cannot create one: its
`pretty=True` is refused by its own validation).

Times are compared by this process's monotonic clock only: a Lease is free when nobody has renewed it for its
duration *as seen from here*, whatever the holder's clock says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_operator.cluster.api import KINDS, Api, ApiError, Object

log = logging.getLogger(__name__)


class LeaseLostError(Exception):
    """Another replica may be working: this process has to end."""


@dataclass
class Lease:
    """One candidate for a Lease."""

    api: Api
    namespace: str
    name: str
    identity: str
    seconds: int = 15
    _seen: tuple[str, float] = ("", 0.0)
    """resourceVersion of the Lease as last seen changed, and when that was."""

    async def acquire(self) -> None:
        """Wait until this candidate holds the Lease."""
        while not await self._try():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(self._pause)

    async def keep(self) -> None:
        """Renew the Lease again and again. Raises LeaseLostError when that fails for two thirds of its duration."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(self._pause)
            try:
                held = await asyncio.wait_for(self._try(), self._deadline)
            except TimeoutError:
                held = False
            if held:
                renewed = time.monotonic()
            elif time.monotonic() - renewed >= self._deadline:
                raise LeaseLostError(f"The Lease {self.namespace}/{self.name} could not be renewed.")

    async def release(self) -> None:
        """Release the Lease, so that the next candidate need not wait for its expiry."""
        try:
            lease = await self.api.find("Lease", self.namespace, self.name)
            if lease is not None and _holder(lease) == self.identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self.api.replace(lease)
        except ApiError as error:
            log.info("the Lease was not released (%s); it will expire", error)

    @property
    def _pause(self) -> float:
        return self.seconds / 7

    @property
    def _deadline(self) -> float:
        return self.seconds * 2 / 3

    async def _try(self) -> bool:
        """Create, take over or renew the Lease; whether this candidate holds it now."""
        try:
            lease = await self.api.find("Lease", self.namespace, self.name)
            if lease is None:
                await self.api.create(self._new())
                return True
            if _holder(lease) not in ("", self.identity) and not self._is_over(lease):
                return False
            await self.api.replace(self._taken(lease))
            return True
        except ApiError as error:
            if error.code != 409:
                log.warning("the Lease could not be read or written: %s", error)
            return False

    def _is_over(self, lease: Object) -> bool:
        version = lease["metadata"]["resourceVersion"]
        if self._seen[0] != version:
            self._seen = (version, time.monotonic())
        duration = (lease.get("spec") or {}).get("leaseDurationSeconds") or self.seconds
        return time.monotonic() - self._seen[1] > duration

    def _new(self) -> Object:
        meta = {"name": self.name, "namespace": self.namespace}
        spec = self._spec() | {"acquireTime": _now(), "leaseTransitions": 0}
        return {"apiVersion": KINDS["Lease"].api_version, "kind": "Lease", "metadata": meta, "spec": spec}

    def _taken(self, lease: Object) -> Object:
        before = lease.get("spec") or {}
        spec = before | self._spec()
        if _holder(lease) != self.identity:
            spec |= {"acquireTime": _now(), "leaseTransitions": (before.get("leaseTransitions") or 0) + 1}
        return lease | {"apiVersion": KINDS["Lease"].api_version, "kind": "Lease", "spec": spec}

    def _spec(self) -> Object:
        return {"holderIdentity": self.identity, "leaseDurationSeconds": self.seconds, "renewTime": _now()}


def _holder(lease: Object) -> str:
    return str((lease.get("spec") or {}).get("holderIdentity") or "")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
