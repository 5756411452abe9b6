"""The project's images in the node's containerd: built with buildah, imported layer by layer, only what changed.

The layer of the trainer's dependencies is some 6 GB. It is never compressed, goes to containerd once, and is kept
there unpacked only; what stands for it afterwards are its name and its size.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.integration.harness import binaries
from tests.support.scripts import load_script

from .node import PAUSE_IMAGE, ctr
from .places import Places

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv")
_NAME = "org.opencontainers.image.ref.name"
ROOM_BYTES = 30 * 10**9
"""Free disk space below which former builds are dropped: a build holds its largest layer three times."""
LARGE_BYTES = 50_000_000
"""Layers from this size on are kept in one copy only."""
_MANIFEST, _CONFIG, _LAYER = (
    f"application/vnd.oci.image.{what}" for what in ("manifest.v1+json", "config.v1+json", "layer.v1.tar")
)


@cache
def _builder() -> ModuleType:
    """images/build.py, which is a script and not a package."""
    return load_script("images/build.py", "images_build")


def names(prefix: str = "docker.io/library/") -> dict[str, str]:
    """The names under which pods ask for the images: the chart's defaults, or those of `images/build.py --prefix`."""
    version = _builder().project_version()
    return {image: f"{prefix}finetune-{image}:{version}" for image in _builder().IMAGES}


@dataclass(frozen=True)
class Blob:
    """One part of an image: its digest, and its bytes or the file that has them."""

    digest: str
    size: int
    content: bytes | Path

    @property
    def path(self) -> str:
        """Where it lies in a layout."""
        return f"blobs/{self.digest.replace(':', '/')}"


class Images:
    """Builds the images and brings them to the node."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._layout = places.cache / "layout"
        self._imported = places.cache / "containerd" / "imported.json"

    def bring(self) -> None:
        """Make the node have the images of this checkout; says what that took."""
        self._bring_pause()
        for image, name in names().items():
            inputs = self._inputs(image)
            if self._record().get(name) == inputs and self._has(name):
                continue
            begun = time.monotonic()
            self._make_room()
            self._build(image)
            built = time.monotonic()
            sent = self._import(image, name)
            self._remember(name, inputs)
            took = f"built in {built - begun:.0f} s, {sent / 1e6:.0f} MB imported in {time.monotonic() - built:.0f} s"
            print(f"{name}: {took}", file=sys.stderr, flush=True)

    def imported(self, image: str) -> str:
        """A digest of what the node's image of that kind was made from; another one is another image."""
        return str(self._record()[names()[image]])

    def layers(self, image: str) -> list[int]:
        """Bytes of an image's layers, unpacked and without compression; the first is the base."""
        parts = json.loads(self._path(self._manifests()[image]).read_text())
        return [layer["size"] for layer in parts["layers"]]

    # -- building -----------------------------------------------------------------------------------------------

    def _inputs(self, image: str) -> str:
        """A digest of everything that an image is made from."""
        files = [
            "pyproject.toml",
            "hashes.txt",
            "README.md",
            "LICENSE",
            "images/build-tools.txt",
            "images/build.py",
        ]
        paths = [ROOT / name for name in (*files, f"images/{image}/Containerfile")]
        paths += sorted(path for folder in ("operator", "trainer") for path in (ROOT / folder).rglob("*"))
        total = hashlib.sha256(" ".join((SUITE, *BASE_PACKAGES)).encode())
        for path in paths:
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()

    def _make_room(self) -> None:
        """Drop what former builds left if the disk is nearly full; while there is room, it makes builds quicker."""
        if shutil.disk_usage(self.places.cache).free < ROOM_BYTES:
            self._buildah("rm", "--all", check=False)
            self._buildah("rmi", "--prune", check=False)

    def _build(self, image: str) -> None:
        builder = _builder()
        self._ensure_base()
        more = ["--isolation", "chroot", "--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
        more += ["--volume", "/etc/resolv.conf:/etc/resolv.conf:ro", "--quiet"]
        self._run(builder.command(builder.Tool("buildah", self._storage()), image, _local(image), self._base(), more))

    def _base(self) -> str:
        key = hashlib.sha256(" ".join((SUITE, *BASE_PACKAGES)).encode()).hexdigest()[:12]
        return f"localhost/finetune-base:{SUITE}-{key}"

    def _ensure_base(self) -> None:
        """A Debian with Python, made of packages: the base where no registry is reached."""
        if self._buildah("images", "--quiet", self._base(), check=False).stdout.strip():
            return
        print("making a base image of Debian packages ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="finetune-base-", dir=self.places.cache) as folder:
            root, archive = Path(folder) / "root", Path(folder) / "root.tar"
            include = f"--include={','.join(BASE_PACKAGES)}"
            self._run(["debootstrap", "--variant=minbase", include, SUITE, str(root)])
            for name in ("var/cache/apt/archives", "var/lib/apt/lists"):
                shutil.rmtree(root / name)
                (root / name / "partial").mkdir(parents=True)
            self._run(["tar", "--create", "--file", str(archive), "--directory", str(root), "."])
            container = self._buildah("from", "scratch").stdout.strip()
            self._buildah("add", "--quiet", container, str(archive), "/")
            self._buildah("commit", "--quiet", "--rm", container, self._base())

    def _storage(self) -> tuple[str, ...]:
        run = self.places.cache / "run"
        return ("--root", str(self.places.cache / "storage"), "--runroot", str(run), "--storage-driver", "overlay")

    def _buildah(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run(["buildah", *self._storage(), *words], check=check)

    def _run(self, command: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise SystemExit(f"`{' '.join(command[:2])} ...` failed:\n{last}")
        return done

    # -- importing ----------------------------------------------------------------------------------------------

    def _import(self, image: str, name: str) -> int:
        """Give containerd what it lacks of an image, and return how many bytes that were."""
        manifest = self._export(image)
        parts = json.loads(self._path(manifest.digest).read_text())
        config = self._blob(parts["config"]["digest"])
        layers = [self._blob(layer["digest"]) for layer in parts["layers"]]
        with self._former_kept(name):
            for last in (False, True):
                lacking = self._lacking(image, layers)
                blobs = [manifest, config, *lacking]
                try:
                    self._send(blobs, manifest, name)
                    break
                except SystemExit:  # a snapshot that nothing referred to went away meanwhile
                    if last:
                        raise
        self._forget_former(config, name)
        for layer in lacking:
            if layer.size >= LARGE_BYTES:
                ctr(self.places, "content", "rm", layer.digest)
                _make_hollow(self._path(layer.digest))
        return sum(blob.size for blob in blobs)

    def _lacking(self, image: str, layers: list[Blob]) -> list[Blob]:
        """The layers that containerd does not hold unpacked, all of them with their bytes."""
        unpacked = self._snapshots()
        lacking = [layer for layer, chain in zip(layers, _chains(layers), strict=True) if chain not in unpacked]
        hollow = [layer for layer in lacking if _is_hollow(self._path(layer.digest))]
        if hollow:
            for layer in hollow:
                self._path(layer.digest).unlink()
            self._export(image)
        return lacking

    @contextlib.contextmanager
    def _former_kept(self, name: str) -> Iterator[None]:
        """Hold on to the image of that name: as a new one takes the name, containerd may collect layers of both."""
        former = f"{name}-former"
        if self._has(name) and not self._has(former):  # one that is there is from an import that failed
            ctr(self.places, "images", "tag", name, former)
        yield
        ctr(self.places, "images", "rm", former, check=False)

    def _export(self, image: str) -> Blob:
        """Put a built image into the layout, uncompressed, but for the layers that are there; returns its manifest."""
        self._layout.mkdir(parents=True, exist_ok=True)
        root, run = (self.places.cache / name for name in ("storage", "run"))
        source = f"containers-storage:[overlay@{root}+{run}]{_local(image)}"
        copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"]
        self._run([*copy, source, f"oci:{self._layout}:{image}"])
        named = self._manifests()
        self._prune_layout(list(named.values()))
        return self._blob(named[image])

    def _manifests(self) -> dict[str, str]:
        """The digest of each image's manifest in the layout."""
        index = json.loads((self._layout / "index.json").read_text())
        return {m["annotations"][_NAME]: m["digest"] for m in index["manifests"] if "annotations" in m}

    def _prune_layout(self, manifests: list[str]) -> None:
        """Forget the parts of images that have no name any more."""
        kept = set(manifests)
        for digest in manifests:
            parts = json.loads(self._path(digest).read_text())
            kept |= {parts["config"]["digest"], *(layer["digest"] for layer in parts["layers"])}
        for path in (self._layout / "blobs" / "sha256").iterdir():
            if f"sha256:{path.name}" not in kept:
                path.unlink()

    def _forget_former(self, config: Blob, name: str) -> None:
        """Containerd keeps an image under its digest too, which would hold on to the layers of all former ones."""
        former = self._record().get("configs", {})
        if former.get(name) not in (None, config.digest):
            ctr(self.places, "images", "rm", former[name], check=False)
        self._remember("configs", former | {name: config.digest})

    def _snapshots(self) -> set[str]:
        """The chains of layers that containerd holds unpacked."""
        lines = ctr(self.places, "snapshots", "ls").stdout.splitlines()[1:]
        return {line.split()[0] for line in lines}

    def _bring_pause(self) -> None:
        program = binaries.ensure("pause")
        inputs = hashlib.sha256(program.read_bytes()).hexdigest()
        if self._record().get(PAUSE_IMAGE) == inputs and self._has(PAUSE_IMAGE):
            return
        layer = _made(_layer_with(program))
        settings = {"Entrypoint": [f"/{program.name}"], "User": "65535:65535"}
        facts = {"architecture": "amd64" if os.uname().machine == "x86_64" else "arm64", "os": "linux"}
        config = _made(_json(facts | {"config": settings, "rootfs": {"type": "layers", "diff_ids": [layer.digest]}}))
        manifest = _made(
            _json(
                {
                    "schemaVersion": 2,
                    "mediaType": _MANIFEST,
                    "config": {"mediaType": _CONFIG, "digest": config.digest, "size": config.size},
                    "layers": [{"mediaType": _LAYER, "digest": layer.digest, "size": layer.size}],
                }
            )
        )
        self._send([manifest, config, layer], manifest, PAUSE_IMAGE)
        self._remember(PAUSE_IMAGE, inputs)

    def _send(self, blobs: list[Blob], manifest: Blob, name: str) -> None:
        """Stream an OCI layout that holds only some blobs: containerd has the others, or their snapshots."""
        entry = {"mediaType": _MANIFEST, "digest": manifest.digest, "size": manifest.size}
        entry["annotations"] = {"io.containerd.image.name": name}  # type: ignore[assignment]
        files = {
            "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
            "index.json": _json({"schemaVersion": 2, "manifests": [entry]}),
        }
        command = ["ctr", "--address", str(self.places.socket), "--namespace", "k8s.io", "images", "import", "-"]
        receiver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert receiver.stdin is not None
        with tarfile.open(fileobj=receiver.stdin, mode="w|") as archive:
            for path, content in [*files.items(), *((blob.path, blob.content) for blob in blobs)]:
                _add(archive, path, content)
        said = receiver.communicate()[0].decode()
        if receiver.returncode != 0:
            raise SystemExit(f"containerd did not take {name}: {said.strip()}")

    def _blob(self, digest: str) -> Blob:
        path = self._path(digest)
        return Blob(digest, path.stat().st_size, path)

    def _path(self, digest: str) -> Path:
        return self._layout / "blobs" / digest.replace(":", "/")

    def _has(self, name: str) -> bool:
        return name in ctr(self.places, "images", "ls", "-q").stdout.split()

    def _record(self) -> dict[str, Any]:
        return json.loads(self._imported.read_text()) if self._imported.exists() else {}

    def _remember(self, name: str, value: object) -> None:
        self._imported.write_text(json.dumps(self._record() | {name: value}))


def _local(image: str) -> str:
    return f"localhost/finetune-{image}:built"


def _chains(layers: list[Blob]) -> list[str]:
    """The name of each layer on top of those below it, as the OCI image specification gives it.

    The layers are not compressed, so that their digests are those of what they hold.
    """
    chains: list[str] = []
    for layer in layers:
        both = f"{chains[-1]} {layer.digest}" if chains else ""
        chains.append(f"sha256:{hashlib.sha256(both.encode()).hexdigest()}" if both else layer.digest)
    return chains


def _is_hollow(path: Path) -> bool:
    return path.stat().st_size >= LARGE_BYTES and path.stat().st_blocks == 0


def _make_hollow(path: Path) -> None:
    """Leave a file of the same size without content: buildah asks for no more to know that it was pushed."""
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def _made(content: bytes) -> Blob:
    return Blob(f"sha256:{hashlib.sha256(content).hexdigest()}", len(content), content)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _layer_with(program: Path) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        _add(archive, program.name, program.read_bytes(), mode=0o755)
    return target.getvalue()


def _add(archive: tarfile.TarFile, path: str, content: bytes | Path, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(path)
    entry.mode = mode
    if isinstance(content, bytes):
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        return
    entry.size = content.stat().st_size
    with content.open("rb") as file:
        archive.addfile(entry, file)
