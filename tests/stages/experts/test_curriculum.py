"""Tests experts that see images from easy to hard: their order is scored once, stored, resumed and shared."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray.config import expert_fingerprint
from datm_ray.core.training.loop import predict_logits
from datm_ray.errors import CorruptFileError, MissingExpertsError
from datm_ray.pipeline import Pipeline, preview
from datm_ray.pipeline.tasks import expert_stacks, expert_tasks, scoring_runs, scoring_tasks
from datm_ray.runtime.executor import Progress
from datm_ray.stages.experts.curriculum import KIND, curriculum_of
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.experts.progress import note_stacks
from datm_ray.stages.experts.train import ExpertWorker, experts_cost, read_experts_cost
from datm_ray.stages.worker import StageWorker
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import ExpertGroup, TrajectoryStore
from tests.conftest import CommandLine, run_here, tiny_config
from tests.stages.experts.test_train import content

CURRICULUM = (
    "experts.curriculum={first_share: 0.5, whole_from: 3, removals: [{epoch: 4, share: 0.2}], scoring_networks: 3, "
    "scoring_epochs: 2}"
)


def trained(out: Path, *changes: str) -> Pipeline:
    config = tiny_config(*(changes or (CURRICULUM,)))
    return run_here(out, config, stage="train_experts")


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
    errors = [(predict_logits(networks.restored(expert), images).softmax(1) - hot).norm(dim=1) for expert in range(3)]
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
    assert preview.remaining_lines(pipeline.runs)[0] == "0 experts to train"
    (cost,) = read_experts_cost(pipeline.runs.folder(pipeline.configs[0]))
    assert cost.known == 2
    more = Pipeline([tiny_config(CURRICULUM, "experts.count=3")], str(finished))
    assert scoring_tasks(more.runs) == []
    assert preview.remaining_lines(more.runs)[0].startswith("1 expert to train")


def test_a_new_order_is_planned(tmp_path: Path) -> None:
    """Before anything is trained, the plan has one order to score, for all runs that share it."""
    other = CURRICULUM.replace("whole_from: 3", "whole_from: 2")
    configs = [tiny_config(CURRICULUM), tiny_config(other, "name=other"), tiny_config("name=plain")]
    pipeline = Pipeline(configs, str(tmp_path))
    assert preview.remaining_lines(pipeline.runs)[0].startswith(
        "3 networks to train for scoring images: experts 0-2 of digits/convnet/"
    )
    assert preview.remaining_lines(pipeline.runs)[1].startswith(
        "1 order of images to score: difficulty of images by 3 of digits/convnet/"
    )
    assert preview.remaining_lines(pipeline.runs)[2].startswith("6 experts to train")
    fingerprints = {expert_fingerprint(config, "") for config in pipeline.configs}
    assert len(fingerprints) == 3


@pytest.mark.parametrize("together", ["1", "3"])
def test_lost_scoring_networks_resume_with_the_same_bits(together: str, tmp_path: Path) -> None:
    """Scoring networks are trained by tasks of their own. One stopped early resumes, and the scores have equal bits."""
    config = tiny_config(CURRICULUM, f"cluster.experts_at_a_time={together}")
    groups = [scoring_group(trained(tmp_path / "whole", CURRICULUM, f"cluster.experts_at_a_time={together}"))]
    pipeline = Pipeline([config], str(tmp_path / "parts"))
    left = expert_tasks(pipeline.runs, networks=scoring_runs(pipeline.runs))
    assert [task.arguments[2] for task in left] == ([(0,), (1,), (2,)] if together == "1" else [(0, 1, 2)])
    worker = StageWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    with pytest.raises(MissingExpertsError, match="0 of the 3 experts"):
        list(worker.score(*scoring_tasks(pipeline.runs)[0].arguments))
    for event in worker.train(*left[0].arguments):
        if isinstance(event, Progress) and event.done == 1:
            break
    groups.append(scoring_group(trained(tmp_path / "parts", CURRICULUM, f"cluster.experts_at_a_time={together}")))
    assert scored(groups[0]).tobytes() == scored(groups[1]).tobytes()


def test_scoring_networks_are_divided_among_the_workers(tmp_path: Path) -> None:
    """Idle workers share the scoring networks; trained ones are not trained again, and then one task scores."""
    pipeline = Pipeline([tiny_config(CURRICULUM, "experts.curriculum.scoring_networks=4")], str(tmp_path))
    (scoring,) = scoring_runs(pipeline.runs)
    for config, parts in expert_stacks(pipeline.runs, 2, [scoring]):
        note_stacks(pipeline.runs.experts(config), parts)
    left = expert_tasks(pipeline.runs, 2, [scoring])
    assert [task.arguments[2] for task in left] == [(0, 1), (2, 3)]
    worker = StageWorker(pipeline.runs.dataset(scoring.dataset), scoring.cluster)
    list(worker.train(*left[0].arguments))
    assert [task.arguments[2] for task in expert_tasks(pipeline.runs, 2, [scoring])] == [(2, 3)]
    list(worker.train(*left[1].arguments))
    assert expert_tasks(pipeline.runs, 2, [scoring]) == []
    assert len(scoring_tasks(pipeline.runs)) == 1


def test_scoring_networks_are_never_experts(tmp_path: Path) -> None:
    """A run whose experts are trained as scoring networks are has a group of its own, with all epochs it can match."""
    equal = CURRICULUM.replace("scoring_epochs: 2", "scoring_epochs: 5")
    pipeline = trained(tmp_path, equal, "name=easy")
    scoring, plain = scoring_group(pipeline), trained(tmp_path)
    group = plain.runs.experts(plain.configs[0])
    assert group.key != scoring.key
    assert group.read_info(0).epochs == plain.configs[0].kept_epochs != scoring.read_info(0).epochs
    costs = [(pipeline.runs.experts(each), each) for each in (pipeline.configs[0], pipeline.configs[0].scoring_run)]
    (noted,) = read_experts_cost(pipeline.runs.folder(pipeline.configs[0]))
    apart = [experts_cost(config, of).spent for of, config in costs if config is not None]
    assert asdict(noted.spent) == pytest.approx(asdict(apart[0] + apart[1]))
    assert all(each.has_transform() for each in (scoring, group))


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


def test_damaged_scores_are_found(finished: Path, tmp_path: Path, datm_ray: CommandLine) -> None:
    """`store verify` checks the scores beside the scoring networks, and their transform."""
    store = shutil.copytree(finished / "experts", tmp_path / "experts")
    assert datm_ray("store", "verify", str(store))[1].startswith("whole: 5 experts and 1 other file, ")
    (place,) = store.rglob("difficulty-*.arrow")
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)
    code, out, _ = datm_ray("store", "verify", str(store))
    assert (code, out.partition(" is damaged")[0].rpartition("/")[2]) == (2, place.name)


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
    assert preview.remaining_lines(pipeline.runs)[0] == "0 experts to train"
