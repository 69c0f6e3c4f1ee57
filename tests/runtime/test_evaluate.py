"""Scoring: what is chosen on validation data, what is reported, and which results runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datm_ray.artifact import save_artifact
from datm_ray.config import NetworkConfig, RunConfig, override, scored_on
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.pipeline import Pipeline
from datm_ray.report import RunSummary, networks_table, write_report
from datm_ray.runtime.distill import SYNTHETIC
from datm_ray.runtime.evaluate import (
    ADAMW_STEP_SIZES,
    CONTROL_STEP_SIZES,
    ON_OTHERS,
    ROWS,
    EvaluateWorker,
    _Trial,
    read_network_scores,
    result_location,
)
from datm_ray.runtime.executor import Finished
from datm_ray.store.filesystem import open_location
from tests.conftest import tiny_config

LEARNED = 0.5
VALIDATION = {LEARNED: 0.6, 0.01: 0.2, 0.03: 0.9, 0.1: 0.3}
TEST = {LEARNED: 0.7, 0.01: 0.99, 0.03: 0.4, 0.1: 0.98}
WITH_ADAMW = {3e-4: 0.1, 1e-3: 0.8, 3e-3: 0.95}
"""By step size; the test set would choose otherwise than the validation set."""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateWorker:
    """One whose trainings end with the accuracies above."""
    config = tiny_config()
    dataset = Pipeline([config], str(tmp_path))._dataset(config)
    worker = EvaluateWorker(dataset, config.cluster)
    network = torch.nn.Identity()

    def trial(_: Any, __: Any, ___: Any, schedule: Any, ____: Any) -> _Trial:
        accuracies = VALIDATION if schedule.optimiser == "sgd" else WITH_ADAMW
        return _Trial(network, schedule.learning_rate, accuracies[schedule.learning_rate])

    monkeypatch.setattr(worker, "_trial", trial)
    monkeypatch.setattr(worker, "_test_accuracy", lambda trial: {**TEST, **WITH_ADAMW}[trial.step_size])
    images = torch.zeros(1, 1, 8, 8)
    monkeypatch.setattr(worker, "_training_set", lambda *_: (images, images, LEARNED))
    return worker


def result_of(worker: EvaluateWorker, tmp_path: Path, network: NetworkConfig | None, *changes: str) -> dict[str, Any]:
    """Of the distilled set."""
    place = str(tmp_path / "result.json")
    events = list(worker.evaluate(tiny_config(*changes), "", str(tmp_path), place, "distilled", 0, network))
    assert isinstance(events[-1], Finished)
    assert open_location(place).read_json() == events[-1].result
    return dict(events[-1].result)


def test_the_backbone_has_the_step_size_that_was_learned(worker: EvaluateWorker, tmp_path: Path) -> None:
    """Whatever others would reach."""
    result = result_of(worker, tmp_path, None)
    assert (result["step_size"], result["test_accuracy"]) == (LEARNED, TEST[LEARNED])


def test_other_architectures_have_both_and_choose_on_validation_data(worker: EvaluateWorker, tmp_path: Path) -> None:
    """The learned one's accuracy, and that of the best on validation images, though the test set likes another."""
    assert set(VALIDATION) == {LEARNED, *CONTROL_STEP_SIZES}
    result = result_of(worker, tmp_path, NetworkConfig(architecture="lenet"))
    assert (result["step_size"], result["test_accuracy"], result["validation_accuracy"]) == (0.03, TEST[0.03], 0.9)
    assert (result["learned_step_size"], result["test_accuracy_with_learned_step_size"]) == (LEARNED, TEST[LEARNED])


def place(config: RunConfig, row: str, network: NetworkConfig | None = None) -> str:
    """Of the first result."""
    return result_location(open_location("/runs"), config, "d" * 16, row, 0, network).path


@pytest.mark.parametrize("network", [None, NetworkConfig(architecture="lenet")])
def test_runs_share_what_does_not_depend_on_their_distillation(network: NetworkConfig | None) -> None:
    """Controls by images per class and experts, all real data by neither; a distilled set by its run alone."""
    base = tiny_config("name=base")
    shared = {
        "name=other": {"random-hard", "random-soft", "full"},
        "distill.iterations=7": {"random-hard", "random-soft", "full"},
        "metadd={auxiliaries: [{architecture: lenet}]}": {"random-hard", "random-soft", "full"},
        "distill.ipc=2": {"full"},
        "experts.learning_rate=0.5": {"full"},
        "evaluate.protocol=published": set(),
        "seed=5": set(),
    }
    for change, expected in shared.items():
        other = override(base, [change, *(["name=other"] if not change.startswith("name") else [])])
        rows = ("random-hard", "random-soft", "full", "distilled")
        same = {row for row in rows if place(base, row, network) == place(other, row, network)}
        assert same == expected, change
    assert place(base, "distilled", network) == place(override(base, ["distill.ipc=2"]), "distilled", network)


def test_networks_are_told_apart_by_what_they_had_to_do_with_the_set(tmp_path: Path) -> None:
    """Same, seen by matching or looking, unseen; only those of which every seed is there."""
    changes = ["backbones=[{network: {width: 8, depth: 2}}]", "metadd={auxiliaries: [{architecture: lenet}]}"]
    config = scored_on(tiny_config(*changes, "evaluate.seeds=1"), ["convnet", "lenet", "mlp", "vgg11"])
    out = open_location(str(tmp_path))
    for number, network in enumerate(config.scored_networks[:-1]):
        for row in ON_OTHERS:
            values = {"test_accuracy": number / 10, "test_accuracy_with_learned_step_size": 0.0, "seconds": 1.0}
            result_location(out, config, "d", row, 0, network).write_json(values)
    scores = read_network_scores(out, config, "d")
    assert [(each.network.architecture, each.kind) for each in scores] == [
        ("convnet", "same"),
        ("convnet", "seen"),
        ("lenet", "seen"),
        ("mlp", "unseen"),
    ]
    assert [each.tuned.mean for each in scores] == [0.0, 0.1, 0.2, 0.3]
    assert all(each.learned.mean == 0.0 and each.control is not None for each in scores)


@pytest.mark.parametrize(("stored", "second"), [([0.1, 0.2], 0.2), ([0.1], 0.1)])
def test_a_network_that_was_matched_too_has_a_step_size_of_its_own(
    tmp_path: Path, stored: list[float], second: float
) -> None:
    """The others, and all where an earlier version has kept one only, have the first network's."""
    config = tiny_config("backbones=[{network: {width: 8, depth: 2}}]")
    dataset = Pipeline([config], str(tmp_path))._dataset(config)
    synthetic = SyntheticSet(
        torch.zeros(10, 1, 8, 8), torch.zeros(10, 10), torch.tensor(stored, dtype=torch.float64), torch.arange(10)
    )
    folder = open_location(str(tmp_path / "tiny"))
    save_artifact(folder / SYNTHETIC, synthetic, dataset.transform, dataset.class_names, config.identity(), {})
    worker = EvaluateWorker(dataset, config.cluster)

    def learned(network: NetworkConfig | None) -> float | None:
        return worker._training_set(config, "", folder, "distilled", 0, network)[2]

    assert learned(config.backbones[0].network) == second
    assert [learned(network) for network in (None, config.network, NetworkConfig(architecture="mlp"))] == [0.1] * 3


@pytest.mark.parametrize("network", [None, NetworkConfig(architecture="vit-small")])
def test_with_adamw_no_step_size_was_learned(
    worker: EvaluateWorker, tmp_path: Path, network: NetworkConfig | None
) -> None:
    """All are chosen on validation data, among some that are usual for it."""
    assert set(WITH_ADAMW) == set(ADAMW_STEP_SIZES)
    result = result_of(worker, tmp_path, network, "evaluate.optimiser=adamw")
    assert (result["step_size"], result["validation_accuracy"]) == (3e-3, 0.95)
    assert result["learned_step_size"] is result["test_accuracy_with_learned_step_size"] is None


@pytest.mark.parametrize("network", [None, NetworkConfig(architecture="lenet")])
@pytest.mark.parametrize("row", ROWS)
def test_results_of_each_optimiser_have_places_of_their_own(row: str, network: NetworkConfig | None) -> None:
    """In a finished run too, whose set they do not change; those of SGD lie where they always did."""
    sgd, adamw = tiny_config(), tiny_config("evaluate.optimiser=adamw")
    assert sgd.identity() == adamw.identity()
    assert "optimiser" not in sgd.identity()["evaluate"]
    assert place(sgd, row, network) != place(adamw, row, network)


def test_the_column_of_the_learned_step_size_is_empty_with_adamw(tmp_path: Path) -> None:
    """A dash in the table; the name of the run tells why."""
    config = scored_on(tiny_config("evaluate.optimiser=adamw", "evaluate.seeds=1"), ["lenet"])
    out = open_location(str(tmp_path))
    for network in config.scored_networks:
        values = {"test_accuracy": 0.5, "test_accuracy_with_learned_step_size": None, "seconds": 1.0}
        result_location(out, config, "d", "distilled", 0, network).write_json(values)
    scores = read_network_scores(out, config, "d")
    assert [(each.learned, each.tuned.mean) for each in scores] == [(None, 0.5)] * 2
    summary = RunSummary(config, out / config.name, [], networks=scores)
    head, _, first, *_ = networks_table(summary).splitlines()
    assert head.startswith("tiny (AdamW):")
    assert first.split()[-3:] == ["-", "50.0", "-"]
    page = write_report(out, [summary]).read_bytes().decode()
    assert "<td>–</td>" in page
    assert "trained with AdamW" in page
