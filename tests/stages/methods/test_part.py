"""Tests the arrays that one worker computes for all pieces of a set."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray.core.steps import result_of
from datm_ray.runtime.mesh import ALONE
from datm_ray.stages.methods.part import Arrays, Part, shared_arrays
from datm_ray.store.files.filesystem import Location, open_location
from tests.conftest import tiny_config


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Folder of shared files, on a disk or on S3."""
    if request.param == "local":
        return open_location(str(tmp_path / "shared"))
    return open_location(f"s3://{request.getfixturevalue('bucket')}/shared")


def part_at(place: Location) -> Part:
    data: Any = None  # what is shared does not depend on it
    return Part(tiny_config(), data, "", ALONE, torch.device("cpu"), 1, shared=place)


def test_the_first_stored_arrays_count_for_all_workers(place: Location) -> None:
    """A worker that was slower than another to compute the same arrays uses those of the other, as does the next."""
    slow, fast, next_one = (part_at(place) for _ in range(3))
    computed: list[int] = []

    def of_fast() -> Generator[None, None, Arrays]:
        yield
        computed.append(2)
        return {"x": np.array([2])}

    def of_slow() -> Generator[None, None, Arrays]:
        yield
        computed.append(1)
        assert result_of(shared_arrays(fast, "name", 0, of_fast))["x"].tolist() == [2]
        return {"x": np.array([1])}

    for part in (slow, fast, next_one, slow):
        assert result_of(shared_arrays(part, "name", 0, of_slow))["x"].tolist() == [2]
    assert computed == [1, 2]
