"""Tests runs whose student overflows, and runs whose trajectory does not move."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray import pipeline as pipeline_module
from datm_ray.artifact import load
from datm_ray.config import RunConfig
from datm_ray.errors import DivergenceError, StoreError
from datm_ray.methods.trajectory import iteration
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import SerialExecutor
from datm_ray.stages.checkpoint import read_curves
from datm_ray.stages.distill import _Run
from datm_ray.stages.experts import expert_group
from datm_ray.stages.trajectory import TrajectoryMatching
from datm_ray.store.files.filesystem import open_location
from tests.conftest import tiny_config

QUIET = Reporter(quiet=True)


@pytest.fixture(autouse=True)
def no_training_of_validation_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the training of validation networks, which takes most of the time."""
    monkeypatch.setattr(_Run, "_validate", lambda self, held: (0.5, 0.1))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the experts of the tiny configuration."""
    out, config = tmp_path_factory.mktemp("experts"), tiny_config()
    Pipeline([config], str(out)).train_experts(lambda: SerialExecutor(config.cluster), QUIET)
    return out / "experts"


def distil(config: RunConfig, out: Path, store: Path) -> None:
    Pipeline([config], str(out), str(store)).distill(lambda: SerialExecutor(config.cluster), QUIET)


def overflow(monkeypatch: pytest.MonkeyPatch, iterations: Container[int]) -> None:
    """Start the student so far away in these iterations that its loss is not a number."""
    match_of = TrajectoryMatching._match

    def far_away(self: Any, backbone: Any, origin: Any, state: Any) -> Any:
        match = match_of(self, backbone, origin, state)
        return replace(match, start=1e30 * match.start) if state.iteration in iterations else match

    monkeypatch.setattr(TrajectoryMatching, "_match", far_away)


def curves_of(out: Path) -> Any:
    return read_curves(open_location(str(out / "tiny")))


def test_an_overflow_costs_an_iteration_and_not_the_run(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overflow skips its iteration; the set still changes, and checkpoint, report and JSON accept nan."""
    overflow(monkeypatch, {1})
    distil(tiny_config(), tmp_path, experts)
    curves = curves_of(tmp_path)
    assert curves["history.skipped"].tolist() == [False, True, False, False, False, False]
    assert np.isfinite(curves["history.loss"]).tolist() == [True, False, True, True, True, True]
    page = pipeline_module.report(str(tmp_path)).read_bytes().decode()
    assert "1 iteration changed nothing, because a value was not finite" in page
    assert "exceeded the threshold" not in page
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert torch.isfinite(load(str(tmp_path / "tiny/synthetic.arrow")).images).all()


def test_nothing_but_overflows_ends_with_one_error_and_can_be_tried_again(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overflows alone end the run with one error; running it again tries as many iterations, with new draws."""
    monkeypatch.setattr(iteration, "MOST_DIVERGED", 3)
    overflow(monkeypatch, range(1, 5))
    with pytest.raises(DivergenceError, match="diverged 3 times without an update up to iteration 4") as caught:
        distil(tiny_config(), tmp_path, experts)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tiny/synthetic.arrow").exists()
    assert torch.isfinite(load(str(tmp_path / "tiny/last-good.arrow")).images).all()
    distil(tiny_config(), tmp_path, experts)
    assert curves_of(tmp_path)["history.skipped"].tolist() == [False, True, True, True, True, False]


def test_a_step_size_that_would_turn_negative_is_never_taken(experts: Path, tmp_path: Path) -> None:
    """An absurd learning rate ends the run with the count of skipped updates and a positive step size."""
    config = tiny_config("distill.learning_rate_step_size=1e9", "distill.threshold=1e30")
    distil(config, tmp_path, experts)
    curves = curves_of(tmp_path)
    assert curves["history.skipped"].any()
    assert (curves["history.step_size"] > 0).all()


def test_a_trajectory_that_stands_still_is_named(experts: Path, tmp_path: Path) -> None:
    """A trajectory without movement is one line of error before the first update, which blames no learning rate."""
    config = tiny_config()
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    moving, still = (
        expert_group(str(place), config, dataset.name, dataset.fingerprint) for place in (experts, tmp_path / "still")
    )
    for expert in range(config.experts.count):
        info = moving.read_info(expert)
        first = moving.read_snapshot(expert, 0)
        still.write_expert(expert, [replace(first, epoch=epoch) for epoch in info.epochs], info)
    with pytest.raises(StoreError, match=r"epochs \d and \d of expert \d in .*still.* are identical") as caught:
        distil(config, tmp_path, tmp_path / "still")
    assert caught.value.exit_code == 2
    assert "learning_rate_images" not in str(caught.value)
    assert not (tmp_path / "tiny/checkpoint.arrow").exists()


def test_one_identical_pair_costs_an_iteration_and_not_the_run(experts: Path, tmp_path: Path) -> None:
    """An expert at rest for one epoch skips iterations that start there and none of the others."""
    config = tiny_config()
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    moving, resting = (
        expert_group(str(place), config, dataset.name, dataset.fingerprint) for place in (experts, tmp_path / "resting")
    )
    for expert in range(config.experts.count):
        info = moving.read_info(expert)
        every = {epoch: moving.read_snapshot(expert, epoch) for epoch in info.epochs}
        every[2] = replace(every[1], epoch=2)
        resting.write_expert(expert, list(every.values()), info)
    distil(config, tmp_path, tmp_path / "resting")
    curves = curves_of(tmp_path)
    assert set(curves["history.skipped"]) == {True, False}
    assert curves["history.skipped"].tolist() == (curves["history.start"] == 1).tolist()
    assert np.isfinite(curves["history.loss"]).tolist() == (curves["history.start"] != 1).tolist()
