"""`python images/build.py [operator] [trainer]`: build the images with podman, buildah or docker.

Layers have no timestamps, so builds are reproducible; commit and version are labels. Arguments after `--` are passed to
the tool's `build` command: `-- --isolation chroot`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ("operator", "trainer")
EPOCH = "315532800"
"""Timestamp of all files, 1980-01-01: the earliest one that every archive format supports."""
ASKED = {"podman": ("info",), "buildah": ("version",), "docker": ("info",)}
"""Tools in order of preference, each with a subcommand that succeeds only if the tool can build."""


@dataclass(frozen=True)
class Tool:
    """A program that builds images, with its global options."""

    name: str
    options: tuple[str, ...] = ()

    def build(self, arguments: Sequence[str]) -> list[str]:
        """The command line that builds."""
        flags = {
            "podman": ["build", "--layers", "--timestamp", EPOCH],
            "buildah": ["build", "--layers", "--timestamp", EPOCH],
            "docker": ["build", "--build-arg", f"SOURCE_DATE_EPOCH={EPOCH}"],
        }[self.name]
        return [self.name, *self.options, *flags, *arguments]


def find_tool(names: Sequence[str] = tuple(ASKED)) -> Tool:
    """The first tool that is installed and answers. Raises SystemExit with a sentence if there is none."""
    for name in names:
        if (
            shutil.which(name)
            and subprocess.run([name, *ASKED[name]], capture_output=True, check=False).returncode == 0
        ):
            return Tool(name)
    raise SystemExit(f"Cannot build images: none of {', '.join(names)} is installed and running. Install one of them.")


def project_version() -> str:
    """The version for image tags, which is the chart's appVersion."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def revision() -> str:
    """The commit, with `-dirty` if files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def command(tool: Tool, image: str, tag: str, base: str | None, more: Sequence[str] = ()) -> list[str]:
    """The command line that builds one image from the repository's root."""
    arguments = ["--file", f"images/{image}/Containerfile", "--tag", tag]
    arguments += ["--build-arg", f"VERSION={project_version()}", "--build-arg", f"REVISION={revision()}"]
    arguments += ["--build-arg", f"BASE={base}"] if base else []
    return tool.build([*arguments, *more, "."])


def main(words: Sequence[str] | None = None) -> None:
    """Build the requested images and print their tags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="operator, trainer; default: both")
    parser.add_argument("--tool", choices=tuple(ASKED), help="default: the first one that is installed")
    parser.add_argument("--base", help="base image: a Debian or Ubuntu with Python 3.11 or newer")
    parser.add_argument("--prefix", default="", help="prefix of the image names, such as registry.example.com/ml/")
    words = list(sys.argv[1:] if words is None else words)
    end = words.index("--") if "--" in words else len(words)
    given, more = parser.parse_args(words[:end]), words[end + 1 :]
    if unknown := set(given.images) - set(IMAGES):
        parser.error(f"unknown image {', '.join(sorted(unknown))}; the images are {' and '.join(IMAGES)}")
    tool = find_tool([given.tool] if given.tool else tuple(ASKED))
    for image in given.images or IMAGES:
        tag = f"{given.prefix}finetune-{image}:{project_version()}"
        begun = time.monotonic()
        done = subprocess.run(command(tool, image, tag, given.base, more), cwd=ROOT, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{tool.name} could not build {tag}.")
        print(f"{tag} built with {tool.name} in {time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
