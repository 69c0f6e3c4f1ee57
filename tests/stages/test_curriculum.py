"""Tests experts that see images from easy to hard: their order is scored once, stored, resumed and shared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray.config import RunConfig, expert_fingerprint
from datm_ray.errors import CorruptFileError, MissingExpertsError
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.pipeline.tasks import scoring_tasks
from datm_ray.runtime.executor import Event, Finished, Progress, SerialExecutor
from datm_ray.stages.curriculum import KIND, curriculum_of
from datm_ray.stages.expert_networks import ExpertNetworks
from datm_ray.stages.experts import ExpertWorker, read_experts_cost
from datm_ray.stages.worker import StageWorker
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import ExpertGroup, TrajectoryStore
from tests.conftest import tiny_config
from tests.stages.test_experts import content

CURRICULUM = (
    "experts.curriculum={first_share: 0.5, whole_from: 3, removals: [{epoch: 4, share: 0.2}], scoring_networks: 3, "
    "scoring_epochs: 2}"
)


def trained(out: Path, *changes: str) -> Pipeline:
    config = tiny_config(*(changes or (CURRICULUM,)))
    pipeline = Pipeline([config], str(out))
    pipeline.train_experts(lambda: SerialExecutor(config.cluster), Reporter(quiet=True))
    return pipeline


def scoring_group(pipeline: Pipeline) -> ExpertGroup:
    scoring = pipeline.configs[0].scoring_run
    assert scoring is not None
    return pipeline.runs.experts(scoring)


def scored(group: ExpertGroup, networks: int = 3) -> np.ndarray[Any, Any]:
    return read_tensors(group.difficulty_file(networks), kind=KIND).arrays["scores"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained experts of the tiny run with a curriculum."""
    out = tmp_path_factory.mktemp("curriculum")
    trained(out)
    return out


def test_scores_are_the_mean_error_of_the_scoring_networks(finished: Path) -> None:
    """Scores are the norms of softmax minus one-hot, as a mean over the networks, and sort each class."""
    pipeline = Pipeline([tiny_config(CURRICULUM)], str(finished))
    config, scoring, group = pipeline.configs[0], pipeline.configs[0].scoring_run, scoring_group(pipeline)
    assert scoring is not None
    dataset = pipeline.runs.dataset(config.dataset)
    networks = ExpertNetworks(scoring, dataset, pipeline.store_uri, torch.device("cpu"))
    images, labels = torch.from_numpy(dataset.train_images), torch.from_numpy(dataset.train_labels)
    hot = torch.nn.functional.one_hot(labels, dataset.classes)
    errors = [(networks.logits(expert, images).softmax(1) - hot).norm(dim=1) for expert in range(3)]
    expected = torch.stack(errors).mean(dim=0).numpy()
    np.testing.assert_allclose(scored(group), expected, atol=1e-5)
    order = curriculum_of(config, dataset, group)
    assert order is not None
    for label, rows in enumerate(order.by_class):
        assert sorted(rows) == np.flatnonzero(dataset.train_labels == label).tolist()
        assert (np.diff(scored(group)[rows]) >= 0).all()
    seen = order.rows(0)
    assert len(seen) == pytest.approx(len(labels) / 2, abs=dataset.classes)
    assert scored(group)[seen].mean() < scored(group).mean()


def test_a_finished_order_is_not_scored_again(finished: Path) -> None:
    """A plan names the order only if experts are missing and their images are not scored; its cost is noted."""
    pipeline = Pipeline([tiny_config(CURRICULUM)], str(finished))
    assert pipeline.plan()[0] == "0 experts to train"
    (cost,) = read_experts_cost(pipeline.runs.folder(pipeline.configs[0]))
    assert cost.known == 2
    more = Pipeline([tiny_config(CURRICULUM, "experts.count=3")], str(finished))
    assert scoring_tasks(more.runs) == []
    assert more.plan()[0].startswith("1 expert to train")


def test_a_new_order_is_planned(tmp_path: Path) -> None:
    """Before anything is trained, the plan has one order to score, for all runs that share it."""
    other = CURRICULUM.replace("whole_from: 3", "whole_from: 2")
    configs = [tiny_config(CURRICULUM), tiny_config(other, "name=other"), tiny_config("name=plain")]
    pipeline = Pipeline(configs, str(tmp_path))
    assert pipeline.plan()[0].startswith("1 order of images to score: difficulty of images by 3 of digits/convnet/")
    assert pipeline.plan()[1].startswith("6 experts to train")
    fingerprints = {expert_fingerprint(config, "") for config in pipeline.configs}
    assert len(fingerprints) == 3


def events_of(out: Path, config: RunConfig, stop_after: int | None = None) -> list[Event]:
    """Events of the task that scores the images, to its end or up to an epoch."""
    pipeline = Pipeline([config], str(out))
    (dataset, task) = scoring_tasks(pipeline.runs)[0]
    worker, events = StageWorker(pipeline.runs.dataset(dataset), config.cluster), list[Event]()
    for event in worker.score(*task.arguments):
        events.append(event)
        if isinstance(event, Progress) and event.done == stop_after:
            break
    return events


@pytest.mark.parametrize(("together", "stop_after"), [("1", 3), ("3", 1)])
def test_a_lost_scoring_task_resumes_with_the_same_bits(together: str, stop_after: int, tmp_path: Path) -> None:
    """A task stopped while it trains resumes from stored networks and epochs, and stores the scores of one run."""
    config = tiny_config(CURRICULUM, f"cluster.experts_at_a_time={together}")
    whole = events_of(tmp_path / "whole", config)
    total = 2 * (3 if together == "1" else 1)
    assert [(event.done, event.total) for event in whole if isinstance(event, Progress)] == [
        (done, total) for done in range(1, total + 1)
    ]
    assert [isinstance(event, Finished) for event in whole].count(True) == 1
    events_of(tmp_path / "parts", config, stop_after)
    groups = [scoring_group(Pipeline([config], str(tmp_path / name))) for name in ("whole", "parts")]
    assert not groups[1].difficulty_file(3).exists()
    resumed = [event.done for event in events_of(tmp_path / "parts", config) if isinstance(event, Progress)]
    assert 1 not in resumed
    assert scored(groups[0]).tobytes() == scored(groups[1]).tobytes()


def test_experts_follow_their_scores_alone_and_are_resumed_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """With other scores the experts differ; with the stored ones a stopped stack resumes to equal bits."""
    config = tiny_config(CURRICULUM)
    expected = Pipeline([config], str(finished)).runs.experts(config)
    found = {}
    for name in ("same", "others"):
        shutil.copytree(finished, tmp_path / name)
        pipeline = Pipeline([config], str(tmp_path / name))
        group, scoring = pipeline.runs.experts(config), scoring_group(pipeline)
        group.remove_expert(0)
        group.remove_expert(1)
        if name == "others":
            scores = {"scores": -scored(scoring)}
            write_tensors(scoring.difficulty_file(3), scores, kind=KIND, metadata={})
        worker = ExpertWorker(pipeline.runs.dataset(config.dataset), config.cluster)
        for event in worker.train(config, pipeline.store_uri, (0, 1)):
            if isinstance(event, Progress) and event.done == 3:
                break
        list(worker.train(config, pipeline.store_uri, (0, 1)))
        found[name] = [content(group, expert) for expert in (0, 1)]
    assert found["same"] == [content(expected, expert) for expert in (0, 1)]
    assert found["others"] != found["same"]
    steps = [expected.read_snapshot(0, epoch).step for epoch in expected.read_info(0).epochs]
    assert np.diff(steps)[0] < np.diff(steps)[-1]


def test_missing_or_foreign_scores_are_one_line(finished: Path, tmp_path: Path) -> None:
    """Experts are not trained without scores, nor with those of other images."""
    shutil.copytree(finished, tmp_path / "out")
    config = tiny_config(CURRICULUM)
    pipeline = Pipeline([config], str(tmp_path / "out"))
    place = scoring_group(pipeline).difficulty_file(3)
    pipeline.runs.experts(config).remove_expert(1)
    worker = ExpertWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    write_tensors(place, {"scores": np.zeros(3)}, kind=KIND, metadata={})
    with pytest.raises(CorruptFileError, match="3 scores for 1222 images"):
        list(worker.train(config, pipeline.store_uri, (0, 1)))
    place.remove()
    with pytest.raises(MissingExpertsError, match=r"no scores of the images.*datm-ray experts tiny"):
        list(worker.train(config, pipeline.store_uri, (0, 1)))


def test_removing_a_group_removes_its_scores(finished: Path, tmp_path: Path) -> None:
    """Nothing of a removed group of scoring networks stays on disk."""
    shutil.copytree(finished, tmp_path / "out")
    pipeline = Pipeline([tiny_config(CURRICULUM)], str(tmp_path / "out"))
    group = scoring_group(pipeline)
    assert group.key in TrajectoryStore(pipeline.store_uri).groups()
    group.remove()
    assert group.location.list() == []


def test_auxiliaries_may_have_a_curriculum_of_their_own(tmp_path: Path) -> None:
    """MetaDD's auxiliaries see images from easy to hard if their section says so; the backbone then does not."""
    own = CURRICULUM.partition("=")[2]
    metadd = f"metadd={{auxiliaries: [lenet], experts: {{count: 1, epochs: 2, augmentation: '', curriculum: {own}}}}}"
    pipeline = trained(tmp_path, metadd)
    architectures = [key.architecture for key in TrajectoryStore(pipeline.store_uri).groups()]
    assert sorted(architectures) == ["convnet", "lenet", "lenet"]
    assert pipeline.plan()[0] == "0 experts to train"
