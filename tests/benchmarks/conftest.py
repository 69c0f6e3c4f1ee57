"""Modules of the benchmarks, which are programs and no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[ModuleType | SimpleNamespace]:
    """The module that a test file names in BENCH, or modules by short names, imported as when the benchmark runs."""
    names: str | dict[str, str] = request.module.BENCH
    sys.path.insert(0, folder := str(Path(__file__).parents[2] / "benchmarks"))
    try:
        if isinstance(names, str):
            yield importlib.import_module(names)
        else:
            yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})
    finally:
        sys.path.remove(folder)
