"""A Hub on loopback: speaks the protocol of huggingface_hub, transformers and datasets, and misbehaves on order.

    with HubServer() as hub:
        hub.add_token("hf_reader", user="alice")
        hub.add_repo("acme/base", directory, gated=True)
        hub.fault("POST", r"/commit/", status=504, after=True)   # applied, but answered as if it had not been
        subprocess.run(..., env=os.environ | hub_environment(hub, home))

One HF_HOME a scenario: the client's cache hides missing rights. Everything is kept in memory.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, quote, unquote

import uvicorn
import yaml

PAGE = 1000
"""Entries of one page of a tree; more are linked with `rel="next"`."""


def hub_environment(server: HubServer, home: Path, token: str | None = None) -> dict[str, str]:
    """Environment of a process whose Hub is `server`, with a cache of its own under `home`.

    HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported: give this to a new process.
    """
    values = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    return values | ({"HF_TOKEN": token} if token else {})


@dataclass
class Account:
    """Who a token belongs to and what it may do."""

    user: str
    write: bool = False
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.orgs


@dataclass(frozen=True)
class Blob:
    """One file of one commit."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def oid(self) -> str:
        """Git's blob id: of the pointer for an LFS file."""
        return git_blob_id(self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


def git_blob_id(content: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    """One commit: its id and all files."""

    id: str
    files: dict[str, Blob]
    summary: str = ""


@dataclass
class Repo:
    """One repository. `kind` is "models" or "datasets"."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    disabled: bool = False
    consented: set[str] = field(default_factory=set)
    """Users who accepted the terms of a gated repository."""
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    """Branches and tags."""

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    @property
    def files(self) -> dict[str, bytes]:
        """Paths and contents at the head of main."""
        return {path: blob.content for path, blob in self.head.files.items()}

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, tag or commit id means."""
        target = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.id == target), None)

    def commit(self, files: Mapping[str, Blob], summary: str) -> Commit:
        """Put a commit with exactly these files on main."""
        parts = [self.kind, self.id, str(len(self.commits)), *(f"{path}:{blob.oid}" for path, blob in files.items())]
        commit = Commit(hashlib.sha1("\n".join(parts).encode()).hexdigest(), dict(files), summary)
        self.commits.append(commit)
        self.refs["main"] = commit.id
        return commit


@dataclass
class Request:
    """One line of the request log. Without the token: only whether there was one."""

    method: str
    path: str
    authorized: bool
    status: int = 0


@dataclass
class Fault:
    """What is to go wrong with the requests that match."""

    method: str
    pattern: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error":"injected"}'
    times: int | None = 1
    """How often; None for always."""
    after: bool = False
    """Do what was asked for, then answer with the fault."""
    cut: bool = False
    """Close the connection in the middle of the answer instead."""
    delay: float = 0.0
    """Seconds before anything is done. With status 0 the request is then answered as usual."""
    hits: int = 0

    def matches(self, call: Call) -> bool:
        open_ = self.times is None or self.hits < self.times
        return open_ and self.method in ("*", call.method) and re.search(self.pattern, call.raw_path) is not None


@dataclass
class Answer:
    """An HTTP response."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


class RefusalError(Exception):
    """An answer other than success, raised where it is known."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        headers["X-Error-Message"] = message
        if code:
            headers["X-Error-Code"] = code
        self.answer = Answer(status, json.dumps({"error": message}).encode(), headers | JSON)


JSON = {"Content-Type": "application/json"}


def json_answer(value: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), headers | JSON)


@dataclass
class Call:
    """One request, with the path as it came over the wire: %2F inside a segment stays inside."""

    method: str
    raw_path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def segments(self) -> list[str]:
        return [unquote(part) for part in self.raw_path.strip("/").split("/")]

    @property
    def token(self) -> str | None:
        scheme, _, value = self.headers.get("authorization", "").partition(" ")
        return value if scheme == "Bearer" and value else None

    def json(self) -> Any:
        return json.loads(self.body)


VERBS = {"auth-check", "revision", "tree", "paths-info", "preupload", "commit", "tag", "branch", "refs"}
VERBS |= {"xet-write-token", "xet-read-token"}


class HubServer:
    """The server and all its repositories. Use as a context manager, or `start` and `stop`."""

    def __init__(
        self, *, lfs_threshold: int = 10 * 1024, multipart_bytes: int | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, Account] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lfs: dict[str, bytes] = {}
        self.lfs_threshold = lfs_threshold
        """Files of at least so many bytes, and weight files of any size, are LFS files."""
        self.multipart_bytes = multipart_bytes
        """Part size; larger LFS files are uploaded in parts."""
        self._parts: dict[tuple[str, int], bytes] = {}
        self._lock = threading.RLock()
        config = uvicorn.Config(
            self._app, host=host, port=0, log_level="critical", interface="asgi3", lifespan="off", http="h11"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True, name="hub-server")
        self._host = host
        self.url = ""

    # -- what a test says ---------------------------------------------------------------------------------------

    def add_token(self, token: str, *, user: str, write: bool = False, orgs: tuple[str, ...] = ()) -> str:
        """Make a token with its rights."""
        self.tokens[token] = Account(user, write, orgs)
        return token

    def add_repo(
        self,
        repo_id: str,
        content: Path | Mapping[str, bytes | str] | None = None,
        *,
        kind: str = "models",
        private: bool = False,
        gated: bool = False,
        disabled: bool = False,
        consented: tuple[str, ...] = (),
    ) -> Repo:
        """Make a repository with the files of a directory, or with the given ones. `kind`: models or datasets."""
        repo = Repo(kind, repo_id, private, gated, disabled, set(consented))
        repo.commit(self._blobs(content or {}), "initial commit")
        self.repos[kind, repo_id] = repo
        return repo

    def push(self, repo: Repo, content: Mapping[str, bytes | str]) -> Commit:
        """Commit further files on main."""
        return repo.commit(repo.head.files | self._blobs(content), "push")

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        """The repository of that name; KeyError if there is none."""
        return self.repos[kind, repo_id]

    def fault(self, method: str, pattern: str, **how: Any) -> Fault:
        """Let requests whose method and raw path match go wrong; see `Fault`."""
        fault = Fault(method, pattern, **how)
        self.faults.append(fault)
        return fault

    def seen(self, method: str, pattern: str) -> list[Request]:
        """Requests so far whose method and raw path match."""
        with self._lock:
            return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def start(self) -> HubServer:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the loopback Hub did not start")
            time.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://{self._host}:{port}"
        return self

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _blobs(self, content: Path | Mapping[str, bytes | str]) -> dict[str, Blob]:
        if isinstance(content, Path):
            files = sorted(path for path in content.rglob("*") if path.is_file())
            content = {path.relative_to(content).as_posix(): path.read_bytes() for path in files}
        raw = {path: data.encode() if isinstance(data, str) else data for path, data in content.items()}
        return {path: Blob(data, self._is_lfs(path, len(data), data[:512])) for path, data in raw.items()}

    def _is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        weights = path.endswith((".safetensors", ".bin", ".pt", ".parquet", ".gguf"))
        return size > 0 and (weights or size >= self.lfs_threshold * (1 if b"\0" in sample else 1000))

    # -- HTTP ---------------------------------------------------------------------------------------------------

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        call = await self._read(scope, receive)
        request = Request(call.method, call.raw_path, call.token is not None)
        with self._lock:
            self.requests.append(request)
            fault = next((f for f in self.faults if f.matches(call)), None)
            if fault is not None:
                fault.hits += 1
        answer = await self._faulty(call, fault) if fault is not None else await self._answer(call)
        request.status = answer.status
        await _send(answer, call, send)

    async def _read(self, scope: Any, receive: Any) -> Call:
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        query = {key: values[0] for key, values in parse_qs(scope["query_string"].decode()).items()}
        headers = {key.decode().lower(): value.decode("latin-1") for key, value in scope["headers"]}
        return Call(scope["method"], scope["raw_path"].decode(), query, headers, bytes(body))

    async def _faulty(self, call: Call, fault: Fault) -> Answer:
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.status == 0 and not fault.cut:
            return await self._answer(call)
        applied = await self._answer(call) if fault.after else None
        if fault.cut:
            whole = applied or Answer(200, b"x" * 64)
            return Answer(whole.status, whole.body or b"x" * 64, whole.headers, cut=True)
        return Answer(fault.status, fault.body, JSON | fault.headers)

    async def _answer(self, call: Call) -> Answer:
        try:
            with self._lock:
                return self._dispatch(call)
        except RefusalError as refused:
            return refused.answer
        except Exception:
            traceback.print_exc()
            return Answer(500, b'{"error":"the loopback Hub is broken"}', JSON)

    def _dispatch(self, call: Call) -> Answer:
        match call.segments:
            case ["api", "agent-harnesses"]:
                return json_answer({"standardEnvVars": [], "harnesses": {}})
            case ["api", "whoami-v2"]:
                return self._whoami(call)
            case ["api", "validate-yaml"]:
                return self._validate_yaml(call)
            case ["api", "repos", "create"]:
                return self._create(call)
            case ["api", ("models" | "datasets") as kind, *rest]:
                return self._api(call, kind, rest)
            case ["lfs-put", capability, *part]:
                return self._lfs_put(call, capability, int(part[0]) if part else 0)
            case ["lfs-complete", capability]:
                return self._lfs_complete(call, capability)
            case segments:
                return self._git(call, segments)

    # -- who may do what ----------------------------------------------------------------------------------------

    def _account(self, call: Call) -> Account | None:
        if call.token is None:
            return None
        if call.token not in self.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.tokens[call.token]

    def _visible(self, call: Call, kind: str, repo_id: str) -> Repo:
        account = self._account(call)
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and (account is None or not account.owns(repo.namespace))):
            raise RefusalError(401 if account is None else 404, "Repository not found", "RepoNotFound")
        if repo.disabled:
            raise RefusalError(403, "Access to this resource is disabled.")
        return repo

    def _readable(self, call: Call, kind: str, repo_id: str) -> Repo:
        repo, account = self._visible(call, kind, repo_id), self._account(call)
        if repo.gated and (account is None or not (account.owns(repo.namespace) or account.user in repo.consented)):
            status = 401 if account is None else 403
            raise RefusalError(status, f"Access to {repo.kind[:-1]} {repo.id} is restricted.", "GatedRepo")
        return repo

    def _writable(self, call: Call, kind: str, repo_id: str) -> Repo:
        repo, account = self._visible(call, kind, repo_id), self._account(call)
        if account is None:
            raise RefusalError(401, "Repository not found", "RepoNotFound")
        if not account.write or not account.owns(repo.namespace):
            raise RefusalError(403, f"You have no rights to write to {repo.id} with this token")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- API ----------------------------------------------------------------------------------------------------

    def _whoami(self, call: Call) -> Answer:
        account = self._account(call)
        if account is None:
            raise RefusalError(401, "Invalid username or password.")
        role = "write" if account.write else "read"
        orgs = [{"type": "org", "name": name} for name in account.orgs]
        token = {"accessToken": {"displayName": "test", "role": role}}
        return json_answer(
            {"type": "user", "name": account.user, "orgs": orgs, "auth": {"type": "access_token"} | token}
        )

    def _validate_yaml(self, call: Call) -> Answer:
        content = call.json()["content"]
        found = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            yaml.safe_load(found.group(1) if found else "")
        except yaml.YAMLError as error:
            return json_answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return json_answer({"errors": [], "warnings": []})

    def _create(self, call: Call) -> Answer:
        account, body = self._account(call), call.json()
        if account is None:
            raise RefusalError(401, "Invalid username or password.")
        kind = f"{body.get('type') or 'model'}s"
        namespace = body.get("organization") or account.user
        repo_id = f"{namespace}/{body['name']}"
        url = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        if not account.write or not account.owns(namespace):
            raise RefusalError(
                403, f"You don't have the rights to create a {kind[:-1]} under the namespace {namespace!r}"
            )
        if (kind, repo_id) in self.repos:
            return json_answer({"error": "You already created this repo", "url": url}, 409)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.add_repo(repo_id, {".gitattributes": "*.safetensors filter=lfs\n"}, kind=kind, private=private)
        return json_answer({"url": url, "name": repo_id, "id": repo_id})

    def _api(self, call: Call, kind: str, rest: list[str]) -> Answer:
        length = 1 if len(rest) == 1 or rest[1] in VERBS else 2
        repo_id, rest = "/".join(rest[:length]), rest[length:]
        match (call.method, rest):
            case ("GET", []):
                return self._info(call, self._visible(call, kind, repo_id), "main")
            case ("GET", ["revision", revision]):
                return self._info(call, self._visible(call, kind, repo_id), revision)
            case ("GET", ["auth-check"]):
                self._readable(call, kind, repo_id)
                return json_answer({})
            case ("GET", ["auth-check", "write"]):
                self._writable(call, kind, repo_id)
                return json_answer({})
            case ("GET", ["tree", revision, *path]):
                return self._tree(call, self._visible(call, kind, repo_id), revision, "/".join(path))
            case ("POST", ["paths-info", revision]):
                return self._paths_info(call, self._visible(call, kind, repo_id), revision)
            case ("GET", ["refs"]):
                repo = self._visible(call, kind, repo_id)
                refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()]
                return json_answer({"branches": refs, "tags": [], "converts": []})
            case ("POST", ["preupload", revision]):
                return self._preupload(call, self._writable(call, kind, repo_id), revision)
            case ("POST", ["commit", revision]):
                return self._commit(call, self._writable(call, kind, repo_id), revision)
            case ("POST", [("tag" | "branch") as what, name]):
                return self._ref(call, self._writable(call, kind, repo_id), what, name)
        raise RefusalError(404, f"Not here: {call.method} {call.raw_path}")

    def _info(self, call: Call, repo: Repo, revision: str) -> Answer:
        commit = self._commit_of(repo, revision)
        blobs = call.query.get("blobs", "").lower() == "true"
        siblings = [self._entry(path, blob) if blobs else {} for path, blob in commit.files.items()]
        for sibling, path in zip(siblings, commit.files, strict=True):
            sibling["rfilename"] = path
            if "oid" in sibling:
                sibling["blobId"] = sibling["oid"]
        facts = {"id": repo.id, "sha": commit.id, "private": repo.private, "disabled": repo.disabled, "tags": []}
        facts |= {"gated": "manual" if repo.gated else False, "siblings": siblings, "author": repo.namespace}
        return json_answer(facts)

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
        return entry

    def _tree(self, call: Call, repo: Repo, revision: str, folder: str) -> Answer:
        commit = self._commit_of(repo, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise RefusalError(
                404, f"{folder} does not exist on {revision}", "EntryNotFound", **{"X-Repo-Commit": commit.id}
            )
        entries = self._entries(inside, prefix, call.query.get("recursive", "").lower() in ("true", "1"))
        start = int(call.query.get("cursor", "0"))
        headers = {}
        if start + PAGE < len(entries):
            query = "&".join(f"{k}={quote(v)}" for k, v in (call.query | {"cursor": str(start + PAGE)}).items())
            headers["Link"] = f'<{self.url}{call.raw_path}?{query}>; rel="next"'
        return json_answer(entries[start : start + PAGE], **headers)

    def _entries(self, files: Mapping[str, Blob], prefix: str, recursive: bool) -> list[dict[str, Any]]:
        folders: dict[str, None] = {}
        entries = []
        for path, blob in files.items():
            parents = path[len(prefix) :].split("/")[:-1]
            deepest = len(parents) if recursive else min(1, len(parents))
            folders |= {prefix + "/".join(parents[: n + 1]): None for n in range(deepest)}
            if recursive or not parents:
                entries.append(self._entry(path, blob))
        named = [{"type": "directory", "path": f, "size": 0, "oid": git_blob_id(f.encode())} for f in folders]
        return named + entries

    def _paths_info(self, call: Call, repo: Repo, revision: str) -> Answer:
        commit = self._commit_of(repo, revision)
        if call.headers.get("content-type", "").startswith("application/json"):
            paths = call.json()["paths"]
        else:
            paths = parse_qs(call.body.decode()).get("paths", [])
        paths = [paths] if isinstance(paths, str) else paths
        return json_answer([self._entry(path, commit.files[path]) for path in paths if path in commit.files])

    def _preupload(self, call: Call, repo: Repo, revision: str) -> Answer:
        present = self._commit_of(repo, revision).files
        files = []
        for file in call.json()["files"]:
            path, sample = file["path"], base64.b64decode(file.get("sample", ""))
            mode = "lfs" if self._is_lfs(path, file["size"], sample) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in present:
                blob = present[path]
                files[-1]["oid"] = blob.sha256 if blob.lfs else blob.oid
        return json_answer({"files": files})

    def _commit(self, call: Call, repo: Repo, revision: str) -> Answer:
        lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = header.get("parentCommit")
        if parent is not None and parent != repo.refs.get(revision):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self._commit_of(repo, revision).files)
        for line in lines:
            self._apply(files, line["key"], line["value"])
        commit = repo.commit(files, header.get("summary", ""))
        return json_answer(
            {"success": True, "commitOid": commit.id, "commitUrl": f"{self.url}/{repo.id}/commit/{commit.id}"}
        )

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.lfs:
                raise RefusalError(422, f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = Blob(self.lfs[value["oid"]], lfs=True)
        elif key == "deletedFile":
            files.pop(value["path"], None)
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]

    def _ref(self, call: Call, repo: Repo, what: str, name: str) -> Answer:
        body = json.loads(call.body or b"{}")
        revision, new = (name, body["tag"]) if what == "tag" else (body.get("startingPoint", "main"), name)
        if new in repo.refs:
            raise RefusalError(409, f"Reference {new} exists already")
        repo.refs[new] = self._commit_of(repo, revision).id
        return json_answer({})

    # -- git and LFS --------------------------------------------------------------------------------------------

    def _git(self, call: Call, segments: list[str]) -> Answer:
        kind, segments = ("datasets", segments[1:]) if segments[0] == "datasets" else ("models", segments)
        if "resolve" in segments and call.method in ("GET", "HEAD"):
            at = segments.index("resolve")
            repo_id, revision, path = "/".join(segments[:at]), segments[at + 1], "/".join(segments[at + 2 :])
            return self._resolve(call, self._readable(call, kind, repo_id), revision, path)
        if segments[-4:] == ["info", "lfs", "objects", "batch"]:
            repo_id = "/".join(segments[:-4]).removesuffix(".git")
            self._writable(call, kind, repo_id)
            verify = {"href": f"{self.url}{call.raw_path.removesuffix('/objects/batch')}/verify"}
            objects = [self._lfs_object(wanted, verify) for wanted in call.json()["objects"]]
            return json_answer({"transfer": "basic", "objects": objects})
        if segments[-3:] == ["info", "lfs", "verify"]:
            self._writable(call, kind, "/".join(segments[:-3]).removesuffix(".git"))
            stored = self.lfs.get(call.json()["oid"])
            if stored is None or len(stored) != call.json()["size"]:
                raise RefusalError(422, "The object was not stored")
            return json_answer({"success": True})
        raise RefusalError(404, f"Not here: {call.method} {call.raw_path}")

    def _resolve(self, call: Call, repo: Repo, revision: str, path: str) -> Answer:
        commit = self._commit_of(repo, revision)
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        blob = commit.files.get(path)
        if blob is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", **headers)
        headers["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        headers["Content-Type"] = "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
        if wanted is None or not any(wanted.groups()):
            return Answer(200, blob.content, headers)
        size = len(blob.content)
        first, last = wanted.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last), size - 1) if first and last else size - 1
        if start > end:
            return Answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        return Answer(206, blob.content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{size}"})

    def _lfs_object(self, wanted: dict[str, Any], verify: dict[str, str]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.lfs:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{self.url}/lfs-put/{oid}"}
        if self.multipart_bytes is not None and size > self.multipart_bytes:
            parts = range(1, math.ceil(size / self.multipart_bytes) + 1)
            urls = {str(n): f"{self.url}/lfs-put/{oid}/{n}" for n in parts}
            upload = {"href": f"{self.url}/lfs-complete/{oid}"}
            upload["header"] = {"chunk_size": str(self.multipart_bytes)} | urls
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _lfs_put(self, call: Call, oid: str, part: int) -> Answer:
        if part:
            self._parts[oid, part] = call.body
        elif hashlib.sha256(call.body).hexdigest() != oid:
            raise RefusalError(400, "The content does not match its digest")
        else:
            self.lfs[oid] = call.body
        return Answer(200, b"", {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    def _lfs_complete(self, call: Call, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in call.json()["parts"]]
        whole = b"".join(self._parts.pop((oid, number)) for number in numbers)
        if hashlib.sha256(whole).hexdigest() != oid:
            raise RefusalError(400, "The content does not match its digest")
        self.lfs[oid] = whole
        return json_answer({"success": True})


async def _send(answer: Answer, call: Call, send: Any) -> None:
    length = len(answer.body)
    headers = answer.headers | {"Content-Length": str(length)}
    wire = [(key.encode(), value.encode("latin-1", "replace")) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": wire})
    body = b"" if call.method == "HEAD" else answer.body
    if answer.cut:
        # Fewer bytes than announced, then the end: uvicorn closes the connection.
        await send({"type": "http.response.body", "body": body[: length // 2], "more_body": True})
        return
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def hub_in_this_process(server: HubServer, home: Path, token: str | None = None) -> Iterator[None]:
    """Point the clients that this process may have imported already at `server`, with a cache of their own."""
    constants = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    datasets = {
        "HF_ENDPOINT": server.url,
        "HUB_DATASETS_URL": server.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_CACHE_HOME": str(home),
        "HF_DATASETS_CACHE": home / "datasets",
        "HF_MODULES_CACHE": home / "modules",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
        "USE_PARQUET_EXPORT": False,
    }
    with contextlib.ExitStack() as stack:
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        stack.enter_context(mock.patch.dict(os.environ, environment | hub_environment(server, home, token), clear=True))
        stack.enter_context(mock.patch.multiple("huggingface_hub.constants", **constants))
        if "datasets" in sys.modules:
            stack.enter_context(mock.patch.multiple("datasets.config", **datasets))
        yield
