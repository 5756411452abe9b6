"""FineTuneJobs of one namespace: read, apply, patch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from finetune_api.base import KIND
from finetune_api.structure import nearest
from finetune_operator.cluster.api import APPLY_PATCH, JSON, MERGE_PATCH, TABLE, Api, ApiError, Object
from finetune_operator.cluster.as_user.problems import ClusterError

FIELD_MANAGER = "finetune"


class NoSuchJobError(ClusterError):
    """There is no job of that name."""


@dataclass(frozen=True)
class Jobs:
    """The FineTuneJobs of one namespace, as a user may see and change them. All methods raise `ApiError`."""

    api: Api
    namespace: str

    async def get(self, name: str) -> Object:
        """One job. Raises `NoSuchJobError` with a near match if there is none."""
        async with self._named(name):
            return await self.api.get(KIND, self.namespace, name)

    async def find(self, name: str) -> Object | None:
        """One job, or None. Raises `ApiError` if the cluster does not know FineTuneJobs."""
        try:
            return await self.api.get(KIND, self.namespace, name)
        except ApiError as error:
            if error.code != 404 or error.kind_unknown:
                raise
            return None

    async def all(self, *, all_namespaces: bool = False, as_table: bool = False) -> Object:
        """All jobs as the API server's list, or as its table: the columns of the CRD that is installed."""
        namespace = "" if all_namespaces else self.namespace
        return await self.api.collection(KIND, namespace, accept=TABLE if as_table else JSON)

    async def apply(self, manifest: Object, *, dry_run: bool = False) -> Object:
        """Apply from the server's side, or create what has only a `generateName`."""
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        name = manifest["metadata"].get("name")
        if name is None:
            metadata = manifest["metadata"] | {"namespace": self.namespace}
            return await self.api.create(manifest | {"metadata": metadata}, query)
        # The file wins, whoever wrote a field before.
        forced = query | {"force": "true"}
        return await self.api.patch(KIND, self.namespace, str(name), manifest, forced, APPLY_PATCH)

    async def merge(self, name: str, changes: Object) -> Object:
        """Change some fields of a job. Raises `NoSuchJobError` with a near match if there is none."""
        async with self._named(name):
            query = {"fieldManager": FIELD_MANAGER}
            return await self.api.patch(KIND, self.namespace, name, changes, query, MERGE_PATCH)

    @asynccontextmanager
    async def _named(self, name: str) -> AsyncIterator[None]:
        try:
            yield
        except ApiError as error:
            if error.code != 404 or error.kind_unknown:
                raise
            raise NoSuchJobError(await self._missing(name)) from error

    async def _missing(self, name: str) -> str:
        sentence = f"There is no {KIND} {name} in namespace {self.namespace}"
        try:
            names = [str(job["metadata"]["name"]) for job in (await self.all())["items"]]
        except ApiError:  # may get, but not list
            return f"{sentence}."
        if near := nearest(name, names):
            return f"{sentence}; did you mean {near}?"
        elsewhere = await self._namespaces_with(name)
        if elsewhere:
            return f"{sentence}; there is one in {', '.join(elsewhere)} (-n)."
        return f"{sentence}." if names else f"{sentence}, nor any other."

    async def _namespaces_with(self, name: str) -> list[str]:
        """Other namespaces with a job of that name, as far as the user may look."""
        try:
            jobs = await self.api.collection(KIND, "", fields=f"metadata.name={name}")
        except ApiError:
            return []
        return [str(job["metadata"]["namespace"]) for job in jobs["items"]]
