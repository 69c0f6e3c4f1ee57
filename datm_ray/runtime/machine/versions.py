"""Versions of the packages that compute. All workers of a command must have those of the process that started it.

Ray compares its own version and Python's. Those of datm_ray and torch may differ where a node has an older image or
environment, or where a folder of the package was changed while a command runs.

Tests: tests/runtime/machine/test_versions.py.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from datm_ray._version import __version__
from datm_ray.errors import ClusterError


class Versions(NamedTuple):
    """Versions of the packages that one process has imported, and the host name of its machine."""

    machine: str
    packages: Mapping[str, str]
    """Name of a package -> its version. That of datm_ray includes a digest of its source files."""


@cache
def versions_here() -> Versions:
    """Versions of datm_ray and torch in this process, as at the first call. Torch's builds for devices count as one."""
    ours = f"{__version__} (source {source_digest(Path(__file__).parents[1])})"
    return Versions(socket.gethostname(), {"datm_ray": ours, "torch": version("torch").partition("+")[0]})


def source_digest(folder: Path) -> str:
    """Digest (8 hex digits) of the names and contents of all Python files in a folder and its subfolders."""
    digest = sha256()
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:8]


def require_same(command: Versions) -> None:
    """Raise a `ClusterError` if a package of this process has another version than in `command`.

    Args:
        command: versions of the process that started the command.
    """
    here = versions_here()
    for name, wanted in command.packages.items():
        if (found := here.packages.get(name)) != wanted:
            raise ClusterError(
                f"{here.machine} has {name} {found}, and the command on {command.machine} has {wanted}",
                "the node's image or environment is older, or the package was changed while the command runs",
                "install the same versions on all nodes, and give a new image a new tag; "
                "the same command again resumes",
            )
