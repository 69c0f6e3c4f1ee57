"""Tests the provenance of an artifact, and the note of a run that is resumed under other conditions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datm_ray.artifact import load
from datm_ray.config import RunConfig
from datm_ray.methods.trajectory import step_functions
from datm_ray.monitor.provenance import workers_in_words
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import Note, Progress
from datm_ray.stages.distill.task import DistillWorker
from tests.conftest import set_of, tiny_config

pytestmark = pytest.mark.usefixtures("no_validation")
PLAIN = {"precision": "float32", "tf32": False, "compiled": False, "order": "reverse-over-reverse"}


def events(config: RunConfig, out: Path, store: Path) -> Iterator[Any]:
    pipeline = Pipeline([config], str(out), str(store))
    worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    return worker.distill(config, pipeline.store_uri, str(out / config.name))


def test_a_set_says_how_it_was_computed(tiny_experts: Path, tmp_path: Path) -> None:
    """A set records precision, compilation, order of differentiation, memory order, shards and workers."""
    list(events(tiny_config(), tmp_path, tiny_experts))
    recorded = set_of(tmp_path).provenance
    assert recorded["student_steps"] == {"from_iteration": 0, **PLAIN, "channels_last": True}
    assert "student_steps_before" not in recorded
    assert (recorded["shards"], recorded["workers"]) == (1, f"1 x torch {importlib.metadata.version('torch')} on cpu")


def test_a_set_records_the_values_that_were_found_for_it(tiny_experts: Path, tmp_path: Path) -> None:
    """A set records what the recipe left open and was found, also after a resume; a recipe's own values are no such."""
    left_open = ("distill.threshold=100", "distill.initial_step_size=null", "distill.learning_rate_images=null")
    for event in events(tiny_config(*left_open), tmp_path, tiny_experts):
        if isinstance(event, Progress) and event.done == 3:
            break
    list(events(tiny_config(*left_open), tmp_path, tiny_experts))
    initial, final = (load(str(tmp_path / f"tiny/{name}.arrow")) for name in ("initial", "synthetic"))
    assert initial.provenance["found"] == final.provenance["found"]
    assert final.provenance["found"]["initial_step_size"] == list(initial.step_sizes)
    assert final.provenance["found"]["learning_rate_images"] > 0
    list(events(tiny_config("name=given"), tmp_path, tiny_experts))
    assert "found" not in load(str(tmp_path / "given/synthetic.arrow")).provenance


def test_a_set_says_why_it_was_not_compiled(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that was not compiled for lack of a compiler records that reason."""
    monkeypatch.setattr(step_functions, "compiler_problem", lambda device_type: "no compiler here")
    list(events(tiny_config("cluster.compile=true"), tmp_path, tiny_experts))
    recorded = set_of(tmp_path).provenance["student_steps"]
    assert (recorded["compiled"], recorded["not_compiled_because"]) == (False, "no compiler here")


def test_a_run_that_is_resumed_otherwise_says_so(tiny_experts: Path, tmp_path: Path) -> None:
    """A run resumed under other conditions notes it in one line and records both; else it notes nothing."""
    for event in events(tiny_config(), tmp_path, tiny_experts):
        if isinstance(event, Progress) and event.done == 3:
            break
    alike = [event for event in events(tiny_config(), tmp_path, tiny_experts) if not isinstance(event, Progress)]
    assert not any(isinstance(event, Note) for event in alike)
    (tmp_path / "tiny/synthetic.arrow").unlink()
    other = tiny_config("cluster.channels_last=false")
    notes = [event.text for event in events(other, tmp_path, tiny_experts) if isinstance(event, Note)]
    assert notes == [
        "iterations are computed otherwise from iteration 6 on (channels_last True before, False now): the result "
        "differs in rounding from one without the change"
    ]
    recorded = set_of(tmp_path).provenance
    assert recorded["student_steps"] == {"from_iteration": 6, **PLAIN, "channels_last": False}
    assert recorded["student_steps_before"] == [{"from_iteration": 0, **PLAIN, "channels_last": True}]


def test_workers_that_differ_are_all_named() -> None:
    """Workers that differ are all named in the provenance."""
    device = torch.device("cpu")

    def with_another(words: Tensor) -> Tensor:
        other = b"torch 2.11.0 on NVIDIA H100"
        words[0, : len(other)] = torch.tensor(list(other))
        return words

    recorded = workers_in_words(device, with_another, rank=1, size=2)
    assert recorded.startswith("1 x torch 2.")
    assert "1 x torch 2.11.0 on NVIDIA H100" in recorded
