"""Tests the comparison of a worker's versions with the command's."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch

from datm_ray.errors import ClusterError
from datm_ray.runtime.machine.versions import Versions, require_same, source_digest, versions_here
from datm_ray.runtime.ray.losses import may_be_the_nodes


def test_the_versions_of_the_same_process_are_accepted() -> None:
    """A process accepts its own versions, also after they travelled; another build of torch is the same version."""
    require_same(pickle.loads(pickle.dumps(versions_here())))
    assert versions_here().packages["torch"] == re.match(r"[\d.]+", torch.__version__)[0]  # type: ignore[index]


@pytest.mark.parametrize("name", ["datm_ray", "torch"])
def test_another_version_is_refused_with_both_machines(name: str) -> None:
    """The error names both versions and machines, and lets the task be tried on another node."""
    here = versions_here()
    with pytest.raises(ClusterError) as caught:
        require_same(Versions("head-1", {**here.packages, name: "0.0.9"}))
    assert caught.value.fact == f"{here.machine} has {name} {here.packages[name]}, and the command on head-1 has 0.0.9"
    assert may_be_the_nodes(caught.value)


def test_any_change_of_a_source_file_is_another_version(tmp_path: Path) -> None:
    """A changed, renamed or moved line changes the digest; what is not Python, such as compiled files, does not."""
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("")
    digests = [source_digest(tmp_path)]
    (tmp_path / "core" / "__pycache__").mkdir()
    (tmp_path / "core" / "__pycache__" / "a.pyc").write_bytes(b"1")
    assert source_digest(tmp_path) == digests[0]
    (tmp_path / "core" / "a.py").write_text("x = 2\n")
    digests.append(source_digest(tmp_path))
    (tmp_path / "core" / "a.py").rename(tmp_path / "core" / "c.py")
    digests.append(source_digest(tmp_path))
    (tmp_path / "core" / "c.py").rename(tmp_path / "c.py")
    digests.append(source_digest(tmp_path))
    assert len({*digests}) == 4
