"""Tests runs whose student overflows or goes too far, and runs whose trajectory does not move."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray import pipeline as pipeline_module
from datm_ray.artifact import load
from datm_ray.config import RunConfig, override
from datm_ray.errors import DivergenceError, StoreError, ThresholdError
from datm_ray.methods.state import FIRST_MOVE
from datm_ray.methods.trajectory import iteration
from datm_ray.methods.trajectory.calibration import MOST_TRIED, Measured
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import Note
from datm_ray.stages.distill.checkpoint import read_curves
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.experts.train import expert_group
from datm_ray.stages.methods import trajectory
from datm_ray.stages.methods.trajectory import TrajectoryMatching
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.tensors import read_tensors
from datm_ray.store.trajectories import ExpertGroup
from tests.conftest import run_here, set_of, tiny_config

pytestmark = pytest.mark.usefixtures("no_validation")


def distil(config: RunConfig, out: Path, store: Path) -> None:
    run_here(out, config, stage="distill", store=store)


def overflow(monkeypatch: pytest.MonkeyPatch, iterations: Container[int]) -> None:
    """Start the student so far away in these iterations that its loss is not a number."""
    match_of = TrajectoryMatching._match

    def far_away(self: Any, backbone: Any, origin: Any, iteration: int) -> Any:
        match = match_of(self, backbone, origin, iteration)
        return replace(match, start=1e30 * match.start) if iteration in iterations else match

    monkeypatch.setattr(TrajectoryMatching, "_match", far_away)


def curves_of(out: Path) -> Any:
    return read_curves(open_location(str(out / "tiny")))


def test_an_overflow_costs_an_iteration_and_not_the_run(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overflow skips its iteration; the set still changes, and checkpoint, report and JSON accept nan."""
    overflow(monkeypatch, {1})
    distil(tiny_config(), tmp_path, tiny_experts)
    curves = curves_of(tmp_path)
    assert curves["history.skipped"].tolist() == [False, True, False, False, False, False]
    assert np.isfinite(curves["history.loss"]).tolist() == [True, False, True, True, True, True]
    page = pipeline_module.report(str(tmp_path)).read_bytes().decode()
    assert "1 iteration changed nothing, because a value was not finite" in page
    assert "exceeded the threshold" not in page
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert torch.isfinite(set_of(tmp_path).images).all()


def test_nothing_but_overflows_ends_with_one_error_and_can_be_tried_again(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overflows alone end the run with one error; running it again tries as many iterations, with new draws."""
    monkeypatch.setattr(iteration, "MOST_DIVERGED", 3)
    overflow(monkeypatch, range(1, 5))
    with pytest.raises(DivergenceError, match="diverged 3 times without an update up to iteration 4") as caught:
        distil(tiny_config(), tmp_path, tiny_experts)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tiny/synthetic.arrow").exists()
    assert torch.isfinite(load(str(tmp_path / "tiny/last-good.arrow")).images).all()
    distil(tiny_config(), tmp_path, tiny_experts)
    assert curves_of(tmp_path)["history.skipped"].tolist() == [False, True, True, True, True, False]


def test_a_step_size_that_would_turn_negative_is_never_taken(tiny_experts: Path, tmp_path: Path) -> None:
    """An absurd learning rate ends the run with the count of skipped updates and a positive step size."""
    config = tiny_config("distill.learning_rate_step_size=1e9", "distill.threshold=1e30")
    distil(config, tmp_path, tiny_experts)
    curves = curves_of(tmp_path)
    assert curves["history.skipped"].any()
    assert (curves["history.step_size"] > 0).all()


def groups(config: RunConfig, *stores: Path) -> list[ExpertGroup]:
    """The run's group of experts in each store."""
    dataset = Pipeline([config], str(stores[-1])).runs.dataset(config.dataset)
    return [expert_group(str(store), config, dataset.name, dataset.fingerprint) for store in stores]


def test_a_trajectory_that_stands_still_is_named(tiny_experts: Path, tmp_path: Path) -> None:
    """A trajectory without movement is one line of error before the first update, which blames no learning rate."""
    config = tiny_config()
    moving, still = groups(config, tiny_experts, tmp_path / "still")
    for expert in range(config.experts.count):
        info = moving.read_info(expert)
        first = moving.read_snapshot(expert, 0)
        still.write_expert(expert, [replace(first, epoch=epoch) for epoch in info.epochs], info)
    with pytest.raises(StoreError, match=r"epochs \d and \d of expert \d in .*still.* are identical") as caught:
        distil(config, tmp_path, tmp_path / "still")
    assert caught.value.exit_code == 2
    assert "learning_rate_images" not in str(caught.value)
    assert not (tmp_path / "tiny/checkpoint.arrow").exists()


def test_one_identical_pair_costs_an_iteration_and_not_the_run(tiny_experts: Path, tmp_path: Path) -> None:
    """An expert at rest for one epoch skips iterations that start there and none of the others."""
    config = tiny_config()
    moving, resting = groups(config, tiny_experts, tmp_path / "resting")
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


ONE_PAIR = ("experts.count=1", "distill.start_epochs=[2, 3]", "distill.threshold=1.0")
"""All pairs that are measured, and those of all iterations, are of one expert and epoch."""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """Every step size that is tried, with its losses."""
    tried, measure = [], trajectory.measure

    def noting(*arguments: Any) -> Measured:
        tried.append(measure(*arguments))
        return tried[-1]

    monkeypatch.setattr(trajectory, "measure", noting)
    return tried


def notes_of(config: RunConfig, out: Path, store: Path) -> list[str]:
    """Notes of a distillation by one worker without a pipeline."""
    worker = DistillWorker(Pipeline([config], str(out)).runs.dataset(config.dataset), config.cluster)
    events = worker.distill(config, str(store), str(out / "tiny"))
    return [event.text for event in events if isinstance(event, Note)]


def test_a_step_size_is_found_where_a_given_one_is_refused(
    tiny_experts: Path, tmp_path: Path, measured: list[Measured]
) -> None:
    """A step size with which every pair is above the threshold is refused before anything is written; null finds one
    below it, saves it in the first set and says its loss, which is that of the first iteration."""
    with pytest.raises(
        ThresholdError, match=r"would start with a matching loss of \d.*above distill\.threshold 1"
    ) as caught:
        distil(tiny_config(*ONE_PAIR, "distill.initial_step_size=5.0"), tmp_path / "given", tiny_experts)
    assert caught.value.exit_code == 1
    assert "experts make 10 steps of 0.02 from start to target (0.2 in all)" in caught.value.cause
    assert "the student 3 steps of 5 (15 in all)" in caught.value.cause
    assert not (tmp_path / "given/tiny/initial.arrow").exists()
    assert not (tmp_path / "given/tiny/checkpoint.arrow").exists()
    measured.clear()
    started, *_ = notes_of(
        tiny_config(*ONE_PAIR, "distill.initial_step_size=null", "distill.iterations=1"),
        tmp_path / "null",
        tiny_experts,
    )
    best = min(measured, key=lambda each: each.loss)
    initial = load(str(tmp_path / "null/tiny/initial.arrow"))
    curves = curves_of(tmp_path / "null")
    assert len(measured) <= MOST_TRIED
    assert initial.step_size == pytest.approx(best.step_size)
    assert started == (
        f"initial step size {best.step_size:.3g} found: the set starts with a matching loss of {best.loss:.3g} "
        "(1: no movement)"
    )
    assert f"null, which finds {best.step_size:.3g} for the present set (loss {best.loss:.3g})" in caught.value.remedy
    assert curves["history.loss"][0] == best.losses[0] < 1
    assert not curves["history.skipped"][0]


def test_without_a_threshold_no_loss_is_refused_or_skipped(tiny_experts: Path, tmp_path: Path) -> None:
    """With threshold null, as MTT is published, a set that starts above 1 is distilled, and each iteration counts."""
    settings = (*ONE_PAIR, "distill.threshold=null", "distill.initial_step_size=0.3", "distill.gradient_limit=0.1")
    distil(tiny_config(*settings, "method=mtt", "distill.start_epochs=[0, 1]"), tmp_path, tiny_experts)
    curves = curves_of(tmp_path)
    assert curves["history.loss"][0] > 1
    assert not curves["history.skipped"].any()
    assert curves["history.loss"][-1] < curves["history.loss"][0]
    with pytest.raises(ThresholdError, match=r"would start with a matching loss of inf, not finite\."):
        distil(tiny_config(*settings, "distill.initial_step_size=1e25"), tmp_path / "infinite", tiny_experts)


def test_a_given_step_size_that_sometimes_works_is_kept(
    tiny_experts: Path, tmp_path: Path, measured: list[Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A given step size that exceeds the threshold for some pairs only is kept, with a note."""
    config = tiny_config("distill.threshold=1.0", "distill.initial_step_size=0.03")
    backwards(monkeypatch, {0, 2})
    (note, *_) = notes_of(config, tmp_path, tiny_experts)
    assert len(measured) == 1
    assert note.startswith("2 of 4 matching losses at the start are above distill.threshold 1, and such iterations")
    assert "the student 3 steps of 0.03 (0.09 in all)" in note
    assert load(str(tmp_path / "tiny/initial.arrow")).step_size == pytest.approx(0.03)


def backwards(monkeypatch: pytest.MonkeyPatch, iterations: Container[int]) -> None:
    """Exchange start and target in these iterations, so that every step leads away from the target."""
    match_of = TrajectoryMatching._match

    def turned(self: Any, backbone: Any, origin: Any, iteration: int) -> Any:
        match = match_of(self, backbone, origin, iteration)
        return replace(match, start=match.target, target=match.start) if iteration in iterations else match

    monkeypatch.setattr(TrajectoryMatching, "_match", turned)


def test_a_set_that_no_step_size_moves_towards_its_target_is_refused(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that every step size leads away from its target is refused, and the error says so."""
    backwards(monkeypatch, range(9))
    for step_size in ("null", "0.03"):
        config = tiny_config("distill.threshold=1.0", f"distill.initial_step_size={step_size}")
        with pytest.raises(
            ThresholdError,
            match=r"a matching loss of 1\.\d+, above.*No step size from \d\S+ to 0\.\d+ is enough: lower distill",
        ):
            distil(config, tmp_path / step_size, tiny_experts)


def test_a_set_without_a_best_step_size_starts_with_one_that_moves_the_student(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[Measured]
) -> None:
    """A loss that rises from 1 on has no least value: a line says so, and the student starts with a step size whose
    loss is as far above 1 as the threshold allows. The images' learning rate is found at this step size."""
    backwards(monkeypatch, range(9))
    config = tiny_config("distill.threshold=1.2", "distill.initial_step_size=null", "distill.learning_rate_images=null")
    first, second, *_ = notes_of(override(config, ["distill.iterations=1"]), tmp_path / "found", tiny_experts)
    least, step_size = min(each.loss for each in measured), load(str(tmp_path / "found/tiny/initial.arrow")).step_size
    (start,) = (each.loss for each in measured if each.step_size == pytest.approx(step_size))
    assert 1 <= least < 1.01 < start <= 1.1
    assert first.startswith("no step size from ")
    assert f"the least matching loss is {least:.4g} (1: no movement). The set starts with step size" in first
    assert f"{step_size:.3g}, at which the student moves, and a loss of {start:.3g}" in first
    given = override(config, [f"distill.initial_step_size={step_size}", "distill.iterations=1"])
    assert second == notes_of(given, tmp_path / "given", tiny_experts)[0]


def test_pairs_at_rest_are_no_losses_below_the_threshold(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs at rest do not let a set start whose other losses are all above the threshold; only such pairs end it."""
    match_of = TrajectoryMatching._match
    for name, moving, says in (
        ("one", {0, 1, 2}, "would start with a matching loss of 1"),
        ("all", set(), "identical"),
    ):

        def at_rest(self: Any, backbone: Any, origin: Any, iteration: int, moving: Container[int] = moving) -> Any:
            match = match_of(self, backbone, origin, iteration)
            return replace(match, start=match.target, target=match.start if iteration in moving else match.target)

        monkeypatch.setattr(TrajectoryMatching, "_match", at_rest)
        config = tiny_config("distill.threshold=1.0", "distill.initial_step_size=0.03")
        with pytest.raises(ThresholdError, match=says):
            distil(config, tmp_path / name, tiny_experts)


def test_advice_names_a_found_step_size_where_the_recipe_finds_it_already(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With initial_step_size null, error and warning name the number that the present set needs, not null."""
    monkeypatch.setattr(iteration, "MOST_ABOVE", 2)
    backwards(monkeypatch, {4, 5})
    number = r"try distill\.initial_step_size=0\.\d+, found for the present set \(loss 0\.\d+\)"
    config = tiny_config(*ONE_PAIR, "distill.initial_step_size=null")
    with pytest.raises(ThresholdError, match=f"(?i){number}"):
        distil(config, tmp_path / "stuck", tiny_experts)
    monkeypatch.setattr(TrajectoryMatching, "refuses", False)
    *_, warning = notes_of(config, tmp_path / "through", tiny_experts)
    assert re.search(rf"\d of 6 matching losses exceeded.*(?i:{number}), or lower the start epochs", warning)


def test_losses_above_the_threshold_in_a_row_stop_the_run(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped iterations in a row end the run with numbers and exit code 1, and keep the set. The same command tries as
    many again, and measures nothing anew."""
    monkeypatch.setattr(iteration, "MOST_ABOVE", 2)
    calibrated = []
    calibrate = TrajectoryMatching.calibrate
    monkeypatch.setattr(
        TrajectoryMatching, "calibrate", lambda self, state: calibrated.append(1) or calibrate(self, state)
    )
    backwards(monkeypatch, {1, 3, 4, 5})
    config = tiny_config("distill.threshold=1.0", "distill.initial_step_size=0.03", "distill.iterations=7")
    with pytest.raises(
        ThresholdError, match="2 iterations in a row changed nothing, the last with a matching loss of 1"
    ) as caught:
        distil(config, tmp_path, tiny_experts)
    assert "from start to target (0.2 in all), the student 3 steps of 0.03" in caught.value.cause
    assert "another --out or --set name=" in caught.value.remedy
    assert caught.value.exit_code == 1
    assert curves_of(tmp_path)["history.skipped"].tolist() == [False, True, False, True, True]
    assert not (tmp_path / "tiny/synthetic.arrow").exists()
    assert torch.isfinite(load(str(tmp_path / "tiny/last-good.arrow")).images).all()
    distil(config, tmp_path, tiny_experts)
    assert curves_of(tmp_path)["history.skipped"].tolist() == [False, True, False, True, True, True, False]
    assert calibrated == [1]


def test_every_backbone_has_a_step_size_of_its_own(tmp_path: Path, measured: list[Measured]) -> None:
    """Two networks get a step size each, and the note names both."""
    config = tiny_config(
        "backbones=[{network: {width: 3, depth: 2, norm: group}}]",
        "distill.initial_step_size=null",
        "experts.count=1",
        "distill.iterations=1",
    )
    run_here(tmp_path, config, stage="train_experts")
    note = notes_of(config, tmp_path, tmp_path / "experts")[0]
    first, second = load(str(tmp_path / "tiny/initial.arrow")).step_sizes
    assert first != second
    assert note.startswith(f"initial step size {first:.3g} and {second:.3g} found: ")


def test_an_open_learning_rate_moves_pixels_by_its_share(tiny_experts: Path, tmp_path: Path) -> None:
    """With learning_rate_images null the first update moves pixels by about 5 %. The checkpoint keeps the rate."""
    open_rate = ("distill.threshold=100", "distill.learning_rate_images=null", "distill.gradient_limit=null")
    notes = notes_of(tiny_config(*open_rate, "distill.iterations=1"), tmp_path, tiny_experts)
    initial, final = (load(str(tmp_path / f"tiny/{name}.arrow")).images for name in ("initial", "synthetic"))
    assert any("the first update moves pixels by 5% of their root mean square" in note for note in notes)
    assert 0.5 * FIRST_MOVE < float((final - initial).norm() / initial.norm()) < 2 * FIRST_MOVE
    checkpoint = read_tensors(open_location(str(tmp_path / "tiny/checkpoint.arrow")), kind="checkpoint")
    assert float(checkpoint.arrays["found.image_rate"]) > 0


def test_an_open_learning_rate_is_found_without_losses_above_the_threshold(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair that nearly diverges, whose iterations are skipped, does not shrink the learning rate that is found."""
    rates, match_of = [], TrajectoryMatching._match

    def nearer(self: Any, backbone: Any, origin: Any, iteration: int) -> Any:
        match = match_of(self, backbone, origin, iteration)
        near = match.start + 1e-3 * (match.target - match.start)
        return replace(match, target=near) if far and iteration == 1 else match

    monkeypatch.setattr(TrajectoryMatching, "_match", nearer)
    for far in (False, True):
        settings = ("distill.threshold=2", "distill.initial_step_size=0.02", "distill.learning_rate_images=null")
        notes = notes_of(tiny_config(*settings, "distill.iterations=1"), tmp_path / str(far), tiny_experts)
        assert any("1 of 4 matching losses at the start is above" in note for note in notes) == far
        place = open_location(str(tmp_path / f"{far}/tiny/checkpoint.arrow"))
        rates.append(float(read_tensors(place, kind="checkpoint").arrays["found.image_rate"]))
    assert rates[1] == pytest.approx(rates[0], rel=0.5)
