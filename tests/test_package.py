"""Tests what `import datm_ray` gives, and what is installed with it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import datm_ray
from tests.conftest import CommandLine


def test_public_names_are_those_of_their_modules() -> None:
    """`datm_ray.load` and the other public names are the functions and classes of their modules."""
    from datm_ray.artifact import Artifact, load
    from datm_ray.config import RunConfig
    from datm_ray.recipes import get_recipe

    assert (datm_ray.Artifact, datm_ray.load) == (Artifact, load)
    assert (datm_ray.RunConfig, datm_ray.get_recipe) == (RunConfig, get_recipe)
    assert all(hasattr(datm_ray, name) for name in datm_ray.__all__)


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Importing the package loads no heavy module; public names are loaded on first use."""
    code = (
        "import sys, datm_ray\n"
        "assert not {'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules), 'too much'\n"
        "datm_ray.get_recipe\n"
        "assert 'pydantic' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_set_is_loaded_without_ray_and_without_locks() -> None:
    """Loading a set needs neither Ray nor file locks, which Windows lacks."""
    sample = Path(__file__).parent / "samples/synthetic-with-matrix.arrow"
    code = (
        "import sys, datm_ray\n"
        "sys.modules['fcntl'] = None\n"
        f"assert len(datm_ray.load({str(sample)!r}).images)\n"
        "heavy = {'ray', 'torchvision', 'sklearn', 'matplotlib', 's3fs', 'typer', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


WARN = "import warnings; warnings.warn('it will change', FutureWarning)"


@pytest.mark.parametrize(
    "module", ["datm_ray", "datm_ray.methods.trajectory.matching", __name__, "benchmarks.bench_store"]
)
def test_warnings_of_our_own_code_are_errors(module: str) -> None:
    """A deprecation in the package's own calls fails the tests."""
    with pytest.raises(FutureWarning, match="it will change"):
        exec(WARN, {"__name__": module})


@pytest.mark.parametrize("module", ["torch.func", "ray", "numpy", "datm_rays", "test"])
def test_warnings_of_a_dependency_are_no_errors(module: str) -> None:
    """A deprecation inside a dependency does not fail the tests."""
    with warnings.catch_warnings(record=True) as issued:
        exec(WARN, {"__name__": module})
    assert [warning.category for warning in issued] == [FutureWarning]


def test_users_see_no_deprecations_of_dependencies(datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line hides dependencies' deprecations, unless Python's -W asks for them, and shows its own."""
    for options, seen in (([], 0), (["default"], 1)):
        monkeypatch.setattr(sys, "warnoptions", options)
        with warnings.catch_warnings(record=True) as issued:
            datm_ray("recipe", "list")
            exec(WARN, {"__name__": "torch.func"})
            with pytest.raises(FutureWarning):
                exec(WARN, {"__name__": "datm_ray.store"})
        assert len(issued) == seen


def test_unknown_name_is_an_attribute_error() -> None:
    """An unknown name of the package is an AttributeError, so that `hasattr` works."""
    with pytest.raises(AttributeError, match="'datm_ray' has no attribute 'lod'"):
        _ = datm_ray.lod
    assert not hasattr(datm_ray, "lod")


def test_types_are_shipped() -> None:
    """The package has the py.typed marker, so that type checkers read its annotations."""
    assert importlib.resources.files("datm_ray").joinpath("py.typed").is_file()


def test_command_is_installed() -> None:
    """`datm-ray` starts the command line."""
    from datm_ray.cli import main

    (command,) = importlib.metadata.entry_points(group="console_scripts", name="datm-ray")
    assert command.load() is main


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml")
def test_what_is_imported_is_asked_for() -> None:
    """Every package that datm_ray imports is a dependency of its own, not one that another package may drop."""
    import tomllib

    root = Path(datm_ray.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = {canonicalize_name(Requirement(each).name) for listed in lists for each in listed}
    imported = {
        name.partition(".")[0]
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in ([each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    owners = importlib.metadata.packages_distributions()
    parts = {"pydantic_core", "typing_extensions"}  # pydantic is not there without them
    for name in imported - sys.stdlib_module_names - {"datm_ray"} - parts:
        assert asked & {canonicalize_name(owner) for owner in owners.get(name, [name])}, name
