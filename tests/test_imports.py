"""Tests which part may import which: one row per rule, read from the source, imports inside functions included."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Set
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import datm_ray

ROOT = Path(datm_ray.__file__).parent

CLUSTER_AND_COMMANDS = ("ray", "typer", "pydantic")
FORBIDDEN = {
    "core": (*CLUSTER_AND_COMMANDS, "pyarrow", "fsspec", "s3fs", "yaml", "rich"),
    "methods": (*CLUSTER_AND_COMMANDS, "pyarrow", "fsspec", "s3fs", "yaml", "rich"),
    "store": (*CLUSTER_AND_COMMANDS, "torch", "yaml", "rich"),
    "data": (*CLUSTER_AND_COMMANDS, "yaml", "rich"),
    "interop": (*CLUSTER_AND_COMMANDS, "yaml", "rich"),
    "stages": (*CLUSTER_AND_COMMANDS, "yaml", "rich"),
    "runtime": ("typer", "pydantic"),
    "planning": CLUSTER_AND_COMMANDS,
    "monitor": CLUSTER_AND_COMMANDS,
    "report": CLUSTER_AND_COMMANDS,
    "artifact.py": CLUSTER_AND_COMMANDS,
    "replay.py": CLUSTER_AND_COMMANDS,
    "cli": ("ray", "torch", "numpy", "pyarrow", "pydantic"),
}
"""Folder or file -> packages of others that it does without."""

BASE = ("config", "errors", "words")
BELOW_STAGES = ("monitor", "runtime", "methods", "core", "data", "store", *BASE, "memory", "shape")
ALLOWED = {
    "words.py": (),
    "errors.py": ("words",),
    "memory.py": (),
    "_version.py": (),
    "config": ("config", "errors"),
    "recipes": ("recipes", "config", "errors"),
    "core": ("core", *BASE),
    "core/compute": ("core.compute", "errors", "words"),
    "core/images": ("core.images", "core.compute", "core.randomness", "errors"),
    "core/networks": ("core.networks", "core.compute", "core.randomness", *BASE),
    "core/training": (
        "core.training",
        "core.networks",
        "core.images",
        "core.randomness",
        "core.steps",
        "config",
        "errors",
    ),
    "methods": ("methods", "core", *BASE),
    "store": ("store", "errors", "words"),
    "data": ("data", "errors", "words", "memory"),
    "artifact.py": ("core", "data", "store", "errors", "words"),
    "replay.py": ("artifact", "core", "store", "errors"),
    "shape.py": ("core", "data", "store", *BASE),
    "runtime": ("runtime", "monitor", "core", "store", "_version", *BASE),
    "monitor": ("monitor", "runtime", "store", *BASE),
    "stages": ("stages", *BELOW_STAGES, "artifact", "replay", "interop.sets"),
    "stages/experts": ("stages.experts", *BELOW_STAGES),
    "stages/methods": ("stages.methods", "stages.experts", *BELOW_STAGES, "interop.sets"),
    "planning": ("planning", "stages", *BELOW_STAGES, "artifact"),
    "interop": ("interop", "stages", "artifact", "core", "data", "store", *BASE),
}
"""Folder or file -> parts of this package that it may use: folders and modules, such as `core.randomness`."""


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    """All nodes of a source file's syntax tree."""
    return list(ast.walk(ast.parse(source)))


def imported(source: str) -> Iterator[str]:
    """Absolute names of the modules that a source file imports, at any place in it."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            if node.module == "datm_ray":
                yield from (f"datm_ray.{alias.name}" for alias in node.names)


def imports_of(place: str) -> list[tuple[str, str]]:
    """(file, module) of every import in a folder or file of the package."""
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files, f"{place} does not exist: mend the table"
    return [(str(file.relative_to(ROOT)), module) for file in files for module in imported(file.read_text())]


def test_every_way_of_importing_is_seen() -> None:
    """Imports are found at the top, in functions, under TYPE_CHECKING, by other names and by public names."""
    source = """
import a.b as c
from d.e import f
if TYPE_CHECKING:
    import g
def function():
    from h import i as j
from datm_ray import store
"""
    assert sorted(imported(source)) == ["a.b", "d.e", "datm_ray", "datm_ray.store", "g", "h"]


@pytest.mark.parametrize("place", FORBIDDEN)
def test_part_does_without(place: str) -> None:
    """Numerics and storage import neither a cluster nor a command line."""
    found = [(file, module) for file, module in imports_of(place) if module.split(".")[0] in FORBIDDEN[place]]
    assert found == []


@pytest.mark.parametrize("place", ALLOWED)
def test_part_uses_only(place: str) -> None:
    """Layers import lower ones only; `core` and `store` never import each other."""
    allowed = tuple(f"datm_ray.{part}." for part in ALLOWED[place])
    ours = [(file, module) for file, module in imports_of(place) if module.split(".")[0] == "datm_ray"]
    assert [(file, module) for file, module in ours if not f"{module}.".startswith(allowed)] == []


def needed(file: Path, modules: Set[str]) -> set[str]:
    """Modules of the package that a file of it imports at any place in it, without their packages."""
    found = set[str]()
    for node in nodes(file.read_text()):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {str(node.module)}
    return found & modules


def test_modules_import_in_no_circle() -> None:
    """No module imports itself through others, not even inside a function or for its types alone."""
    files = {".".join(["datm_ray", *path.relative_to(ROOT).with_suffix("").parts]): path for path in ROOT.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    imports = {name: needed(path, files.keys()) for name, path in files.items()}
    assert "datm_ray.runtime.machine.devices" in imports["datm_ray.runtime.executor"]  # inside a function
    assert "datm_ray.planning.init.rules_matching" in imports["datm_ray.planning.init.suggest"]  # by its package
    TopologicalSorter(imports).prepare()  # raises a CycleError that names the circle


def test_ray_is_imported_in_one_folder() -> None:
    """Ray is imported in one folder only."""
    users = {Path(file).parent for file, module in imports_of(".") if module.split(".")[0] == "ray"}
    assert users == {Path("runtime", "ray")}


def private_parts(source: str) -> list[str]:
    """Dotted names of private parts of torch and Ray that a source file imports or reads."""
    found = [ast.unparse(each) for each in nodes(source) if isinstance(each, ast.Attribute) and each.attr[0] == "_"]
    found += [
        f"{node.module}.{alias.name}"
        for node in nodes(source)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    found += imported(source)
    owners = ("torch", "ray", "nn", "_ATEN")
    return [name for name in found if re.match(rf"({'|'.join(owners)})(\.\w+)*\._[a-zA-Z]|.*\._cdata$", name)]


def test_private_parts_of_torch_and_ray_are_used_in_one_module_each() -> None:
    """Private parts of torch and Ray, which may change unannounced, are used in one module each."""
    seen = "import torch._a\nfrom ray._b import c\nfrom torch.d import _e\nnn.f._g\n_ATEN._h.default\ni()._cdata"
    assert len({*private_parts(seen)} & {"torch._a", "ray._b", "torch.d._e", "nn.f._g", "_ATEN._h", "i()._cdata"}) == 6
    users = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if private_parts(path.read_text())}
    assert users == {str(Path("core", "compute", "torch_compat.py")), str(Path("runtime", "ray", "compat.py"))}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("datm_ray.methods.trajectory.matching", {"ray", "typer", "pyarrow"}),
        ("datm_ray.store.trajectories", {"ray", "typer", "pydantic", "torch"}),
        ("datm_ray.pipeline", {"ray", "typer", "matplotlib"}),
        ("datm_ray.cli", {"ray", "torch", "numpy", "pyarrow", "pydantic"}),
    ],
)
def test_importing_a_module_does_not_load(module: str, absent: set[str]) -> None:
    """Importing a light module in a fresh interpreter loads no heavy one."""
    code = f"import sys, {module}\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert module in loaded
    assert absent & set(loaded) == set()
