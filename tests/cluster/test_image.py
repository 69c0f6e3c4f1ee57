"""Tests cluster/Dockerfile: its sources exist, and all files agree on versions. Nothing is built."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.cluster.files import CLUSTER, ROOT, ray_version

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """Arguments of every instruction of that name, in order."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", joined, re.MULTILINE)


@pytest.mark.skipif(tomllib is None, reason="reads pyproject.toml")
def test_ray_is_new_enough_for_the_package() -> None:
    """The image's Ray satisfies what pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = [each for each in map(Requirement, project["dependencies"]) if each.name == "ray"]
    assert asked.specifier.contains(ray_version())
    python = re.search(r"-py(\d)(\d+)-", instructions("FROM")[0])
    assert python is not None
    assert Requirement(f"python{project['requires-python']}").specifier.contains(f"{python[1]}.{python[2]}")


def test_every_file_has_the_image_s_ray() -> None:
    """Every version of Ray under cluster/ is the Dockerfile's."""
    pattern = r"""(?:rayproject/ray:|ray-|rayVersion: "|ray(?:\[\w+\])?==)(\d+\.\d+\.\d+)"""
    found = {
        (path.relative_to(CLUSTER).as_posix(), version)
        for path in CLUSTER.rglob("*")
        if path.is_file() and path.suffix not in (".png", ".pyc") and "monitoring" not in path.parts
        for version in re.findall(pattern, path.read_text())
    }
    assert {version for _, version in found} == {ray_version()}
    named = {"Dockerfile", "aws/cluster.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"}
    assert {path for path, _ in found} == named | {"README.md", "local/README.md"}


def test_it_does_not_run_as_root() -> None:
    """The image's last user is a number other than 0, which Kubernetes can check."""
    user = instructions("USER")[-1]
    assert user.isdigit()
    assert int(user) > 0


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    """Sources of COPY exist and are sent to the builder; nothing else is sent."""
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source for line in instructions("COPY") for source in [word for word in line.split() if word[:2] != "--"][:-1]
    }
    assert copied == allowed
    for source in copied:
        assert (ROOT / source).exists()
        ignored = [rule for rule in rules[1:] if not rule.startswith("!") and fnmatch.fnmatch(source, rule)]
        assert not ignored


@pytest.mark.skipif(tomllib is None, reason="reads pyproject.toml")
def test_what_the_package_is_built_from_is_copied() -> None:
    """The files that pyproject.toml names for the build are in the image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"]}
    copied = {Path(word).name for line in instructions("COPY") for word in line.split()}
    assert needed <= copied
    assert "datm_ray" in copied


@pytest.mark.skipif(tomllib is None, reason="reads pyproject.toml")
def test_its_command_is_installed_by_the_package() -> None:
    """The container's command, and the one that the build tries, are scripts of pyproject.toml."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (command,) = instructions("CMD")
    first = re.match(r'\["([^"]+)"', command)
    assert first is not None
    assert first[1] in scripts
    assert any(line.endswith(f"{first[1]} --version") for line in instructions("RUN"))
    assert not instructions("ENTRYPOINT"), "Ray's launchers give commands of their own"


def test_images_of_different_days_have_the_same_versions(tmp_path: Path) -> None:
    """Torch comes first, in the constraints' version or the builder's own. The package follows, under constraints."""
    given = dict(line.split("=", 1) for line in instructions("ARG") if "=" in line)
    assert given["TORCH_INDEX"].startswith("https://")
    pinned = [line for line in (CLUSTER / "aws" / "constraints.txt").read_text().splitlines() if line[:5] == "torch"]
    assert [line.partition("=")[0] for line in pinned] == ["torch", "torchvision"]
    assert torch_of_the_image(tmp_path, "") == (pinned, pinned)
    assert torch_of_the_image(tmp_path, "torch==2.11.0 torchvision") == (["torch==2.11.0", "torchvision"], [])
    second = instructions("RUN")[1]
    assert " -c /tmp/constraints.txt " in second
    assert "/tmp/datm_ray" in second
    assert "--upgrade" not in second
    assert "--build-arg TORCH_INDEX=" in (CLUSTER / "kuberay" / "README.md").read_text()


def torch_of_the_image(tmp_path: Path, given: str) -> tuple[list[str], list[str]]:
    """What the image's first command asks pip for, and the constraints on torch that are left, for a value of TORCH."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text((CLUSTER / "aws" / "constraints.txt").read_text())
    command = instructions("RUN")[0].replace("/tmp/constraints.txt", str(constraints))
    environment = {"PATH": os.environ["PATH"], "TORCH": given, "TORCH_INDEX": "https://index"}
    shell = ["sh", "-euc", f"pip() {{ echo $*; }}; {command}"]
    asked = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True).stdout
    left = [line for line in constraints.read_text().splitlines() if line.startswith("torch")]
    return asked.partition("https://index ")[2].split(), left
