"""FineTuneJobs of one cluster: read, apply, patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api.base import API_VERSION, KIND, PLURAL
from finetune_api.structure import nearest
from finetune_operator.cluster.as_user.connection import Connection, Resource
from finetune_operator.cluster.as_user.problems import ClusterError, RefusedError

FIELD_MANAGER = "finetune"
AS_TABLE = "application/json;as=Table;g=meta.k8s.io;v=v1,application/json"


class NoSuchJobError(ClusterError):
    """There is no job of that name."""


@dataclass(frozen=True)
class Jobs:
    """The FineTuneJobs of one namespace, as the user of a connection may see and change them."""

    connection: Connection
    namespace: str

    def get(self, name: str) -> Resource:
        """One job. Raises `NoSuchJobError` with a near match if there is none."""
        try:
            return self.connection.request("GET", self.path(name))
        except RefusedError as error:
            if error.code != 404 or error.kind_unknown:
                raise
            raise NoSuchJobError(self._missing(name)) from error

    def names(self) -> list[str]:
        """Names of all jobs here."""
        return [str(job["metadata"]["name"]) for job in self.connection.request("GET", self.path())["items"]]

    def everything(self, *, everywhere: bool = False) -> Resource:
        """All jobs, as the API server's list object."""
        return self.connection.request("GET", self.path(everywhere=everywhere))

    def table(self, *, everywhere: bool = False) -> Resource:
        """All jobs as the API server's own table: the columns of the CRD that is installed."""
        return self.connection.request("GET", self.path(everywhere=everywhere), accept=AS_TABLE)

    def apply(self, manifest: Resource, *, dry_run: bool = False) -> Resource:
        """Apply from the server's side, or create what has only a `generateName`."""
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        name = manifest["metadata"].get("name")
        if name is None:
            return self.connection.request("POST", self.path(), query=query, body=manifest)
        # What the file says holds, whoever wrote that field before.
        forced = query | {"force": "true"}
        return self._patch(str(name), manifest, "application/apply-patch+yaml", forced)

    def merge(self, name: str, changes: Resource) -> Resource:
        """Change some fields of a job. Raises `NoSuchJobError` with a near match if there is none."""
        query = {"fieldManager": FIELD_MANAGER}
        try:
            return self._patch(name, changes, "application/merge-patch+json", query)
        except RefusedError as error:
            if error.code != 404 or error.kind_unknown:
                raise
            raise NoSuchJobError(self._missing(name)) from error

    def path(self, name: str = "", *, everywhere: bool = False) -> str:
        """URL path of the jobs here, of the jobs in all namespaces, or of one job."""
        place = "" if everywhere else f"/namespaces/{self.namespace}"
        return f"/apis/{API_VERSION}{place}/{PLURAL}" + (f"/{name}" if name else "")

    def _patch(self, name: str, body: Resource, content_type: str, query: Mapping[str, str]) -> Resource:
        return self.connection.request("PATCH", self.path(name), query=query, body=body, content_type=content_type)

    def _missing(self, name: str) -> str:
        sentence = f"There is no {KIND} {name} in namespace {self.namespace}"
        try:
            here = self.names()
        except ClusterError:  # may get, but not list
            return f"{sentence}."
        if near := nearest(name, here):
            return f"{sentence}; did you mean {near}?"
        elsewhere = self._places_of(name)
        if elsewhere:
            return f"{sentence}; there is one in {', '.join(elsewhere)} (-n)."
        return f"{sentence}." if here else f"{sentence}, nor any other."

    def _places_of(self, name: str) -> list[str]:
        """Other namespaces with a job of that name, as far as one may look."""
        query = {"fieldSelector": f"metadata.name={name}"}
        try:
            found = self.connection.request("GET", self.path(everywhere=True), query=query)["items"]
        except ClusterError:
            return []
        return [str(job["metadata"]["namespace"]) for job in found]
