"""Tests labels that are stored for every epoch: made by any worker, resumed, pruned, and trained on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray import ReplayedLabels
from datm_ray.config import NetworkConfig, RunConfig, expert_fingerprint, stable_hash
from datm_ray.core.networks.registry import build_network
from datm_ray.core.steps import result_of
from datm_ray.core.training import labelling
from datm_ray.core.training.labelling import images_fingerprint
from datm_ray.core.training.loop import Schedule, Training
from datm_ray.core.training.teacher import StoredLessons, Teacher
from datm_ray.errors import ConfigError
from datm_ray.monitor.progress import Reporter
from datm_ray.monitor.spent import Spent
from datm_ray.pipeline import Pipeline, preview, report, summaries
from datm_ray.planning.plan import plan_run
from datm_ray.report.results import cost_lines
from datm_ray.runtime.executor import Progress, SerialExecutor
from datm_ray.stages import labels as stage
from datm_ray.stages.evaluate.rows import EvaluateWorker
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.labels import (
    COSTS,
    LABELS,
    LabelWorker,
    label_epochs,
    labels_cost,
    labels_location,
    missing_epochs,
)
from datm_ray.stages.worker import StageWorker
from datm_ray.store.labels import LabelStore
from tests.conftest import set_of, tiny_config
from tests.training import train

SCORED = ("evaluate.epochs=4", "evaluate.learning_rate=0.05", "evaluate.seeds=1")
STORED = (*SCORED, "evaluate.labels=stored", "evaluate.cutmix=1", "evaluate.full=false")


def pipeline_of(finished_run: Path, out: Path, *settings: str) -> tuple[Pipeline, RunConfig]:
    """Pipeline of a run whose set is that of the finished run, with other scoring."""
    for name in ("synthetic.arrow", "initial.arrow", "recipe.yaml", "dataset.json", "checkpoint.arrow"):
        place = out / "tiny" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((finished_run / "tiny" / name).read_bytes())
    pipeline = Pipeline([tiny_config(*settings)], str(out), str(finished_run / "experts"))
    return pipeline, pipeline.configs[0]


def evaluate(pipeline: Pipeline) -> None:
    pipeline.evaluate(lambda: SerialExecutor(pipeline.configs[0].cluster), Reporter(quiet=True))


def store_of(pipeline: Pipeline, config: RunConfig) -> LabelStore:
    return LabelStore(labels_location(pipeline.runs.folder(config), config, pipeline.runs.raw(config).fingerprint))


@pytest.mark.parametrize("settings", [(), ("evaluate.keep_labels=2", "evaluate.top_logits=3")])
def test_an_evaluation_stores_labels_and_trains_on_them(
    finished_run: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """The labels of all or some epochs lie beside the set, and the row's networks have learned them, and no others."""
    pipeline, config = pipeline_of(finished_run, tmp_path, *STORED, *settings)
    evaluate(pipeline)
    store, artifact = store_of(pipeline, config), set_of(tmp_path)
    keep = config.evaluate.keep_labels or 4
    assert store.epochs() == list(range(keep))
    assert (store.info.keep, store.info.epochs, store.info.top) == (keep, 4, config.evaluate.top_logits)
    dataset = pipeline.runs.dataset(config.dataset)
    teacher = ExpertNetworks(config, dataset, pipeline.store_uri, torch.device("cpu")).restored(0)
    labels = ReplayedLabels(artifact, store)
    views, logits = labels.batch(range(10))
    if not settings:
        with torch.no_grad():
            torch.testing.assert_close(logits, teacher(views), rtol=2e-3, atol=2e-3)  # float16
    (result,) = (tmp_path / "tiny/evaluation").glob("*/distilled-00.json")
    (summary,) = summaries(pipeline.out, pipeline.configs)
    assert {score.row for score in summary.scores} >= {"distilled", "random-soft", "random-hard"}
    assert "labels" in [line.title for line in cost_lines(summary)]
    assert report(str(tmp_path)).exists()
    assert "stored" not in result.name
    evaluate(pipeline)  # nothing to do
    assert missing_epochs(pipeline.runs.folder(config), config, dataset.fingerprint) == []


def test_stored_labels_train_as_a_live_teacher_does_on_the_same_views(finished_run: Path, tmp_path: Path) -> None:
    """With the stored logits replaced by the teacher's for the same views, the network's parameters agree."""
    pipeline, config = pipeline_of(finished_run, tmp_path, *STORED)
    evaluate(pipeline)
    dataset, images = pipeline.runs.dataset(config.dataset), set_of(tmp_path).images
    experts = ExpertNetworks(config, dataset, pipeline.store_uri, torch.device("cpu"))
    teacher, stored = Teacher(experts.restored(0)), ReplayedLabels(images, store_of(pipeline, config))

    class Live:
        def set_epoch(self, epoch: int) -> None:
            stored.set_epoch(epoch)

        def batch(self, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
            views, _ = stored.batch(rows)
            with torch.no_grad():
                return views, teacher.network(views)

    spec = config.network.for_images(dataset.channels, dataset.size, dataset.classes)
    schedule = Schedule(4, 4, 0.05, momentum=0.9)
    found = []
    for labels in (stored, Live()):
        network = build_network(spec, 3)
        own = Training(network, images, torch.zeros(len(images), dtype=torch.int64), schedule, 5)
        train(own, StoredLessons(labels))
        found.append(torch.cat([each.detach().flatten() for each in network.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)
    assert float((found[0] - found[1]).abs().max()) > 0


def test_a_plan_and_a_dry_run_tell_of_labels(finished_run: Path, tmp_path: Path) -> None:
    """Epochs to label are part of what is left, and their time and bytes of a plan; both end with the labelling."""
    pipeline, config = pipeline_of(finished_run, tmp_path, *STORED, "evaluate.keep_labels=3")
    assert "3 epochs to label: tiny" in preview.remaining_lines(pipeline.runs)
    plan = plan_run(config, "cpus=1,gflops=50")
    store = 3 * 10 * (16 + 1 / 8 + 4 + 4 + 8 + 2 * 10)
    assert plan.storage["labels"] == math.ceil(store)
    held, clock = plan_run(config, "cpus=3,gflops=50").stages["labels"]
    assert plan.stages["labels"] == pytest.approx((held, held))
    assert clock == pytest.approx(held / 3)  # each worker labels one of three epochs
    assert "labels" not in plan_run(tiny_config(), "cpus=1,gflops=50").stages
    online = plan_run(tiny_config(*STORED, "evaluate.labels=teacher"), "cpus=1,gflops=50")
    assert plan.stages["evaluation"][0] < online.stages["evaluation"][0]  # no teacher beside the set's networks
    evaluate(pipeline)
    assert not any("label" in line for line in preview.remaining_lines(pipeline.runs))
    assert store_of(pipeline, config).info.planned_bytes == plan.storage["labels"]


def test_labels_that_cannot_be_stored_are_refused(finished_run: Path, tmp_path: Path) -> None:
    """More logits than classes and more epochs than networks train for are refused before anything starts."""
    for setting, message in (("top_logits=10", "10 classes"), ("keep_labels=5", "train for 4 epochs")):
        with pytest.raises(ConfigError, match=message):
            pipeline_of(finished_run, tmp_path, *STORED, f"evaluate.{setting}")


def test_labelling_is_resumed_epoch_by_epoch(finished_run: Path, tmp_path: Path) -> None:
    """A worker that ends after one epoch leaves the others, and the labels equal those of one that is not stopped."""
    pipeline, config = pipeline_of(finished_run, tmp_path / "stopped", *STORED)
    dataset, folder = pipeline.runs.dataset(config.dataset), pipeline.runs.folder(config)
    worker = LabelWorker(dataset, config.cluster)
    for event in worker.label(config, pipeline.store_uri, folder.uri, (0, 1, 2, 3)):
        if isinstance(event, Progress) and event.done == 1:
            break
    assert missing_epochs(folder, config, dataset.fingerprint) == [1, 2, 3]
    evaluate(pipeline)
    other, _ = pipeline_of(finished_run, tmp_path / "whole", *STORED)
    evaluate(other)
    for epoch in range(4):
        one, two = (store_of(each, config).read(epoch, range(10)) for each in (pipeline, other))
        assert np.array_equal(one.values, two.values)
        assert np.array_equal(one.boxes, two.boxes)


def test_tasks_of_one_worker_read_and_hash_their_set_once(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker keeps a set and its teacher for its next label task, until a task of another stage."""
    pipeline, config = pipeline_of(finished_run, tmp_path, *STORED)
    dataset, folder = pipeline.runs.dataset(config.dataset), pipeline.runs.folder(config)
    counts = dict[str, int]()

    def counted(name: str, module: Any) -> None:
        function = getattr(module, name)

        def call(*arguments: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    counted("read_artifact", stage)
    counted("images_fingerprint", stage)
    counted("images_fingerprint", labelling)
    worker = StageWorker(dataset, config.cluster)
    for epochs in ((0, 1), (2,), (3,)):
        list(worker.label(config, pipeline.store_uri, folder.uri, epochs))
    assert counts == {"read_artifact": 1, "images_fingerprint": 1}
    assert missing_epochs(folder, config, dataset.fingerprint) == []
    worker._worker(EvaluateWorker, light=True)
    assert not any(isinstance(each, LabelWorker) for each in worker._workers.values())


def test_scores_under_other_labels_lie_beside_each_other(finished_run: Path, tmp_path: Path) -> None:
    """Live, stored and pruned labels have results of their own, for the set and for random images."""
    for settings in ((*SCORED, "evaluate.labels=teacher", "evaluate.cutmix=1"), STORED):
        pipeline, _ = pipeline_of(finished_run, tmp_path, *settings, "evaluate.full=false")
        evaluate(pipeline)
    pipeline, _ = pipeline_of(finished_run, tmp_path, *STORED, "evaluate.keep_labels=1")
    evaluate(pipeline)
    assert len(list((tmp_path / "tiny/evaluation").glob("*/distilled-00.json"))) == 3
    assert len(list((tmp_path / "controls").rglob("random-soft-00.json"))) == 3
    assert len(list((tmp_path / "tiny" / LABELS).iterdir())) == 1


@pytest.mark.parametrize("network", [None, NetworkConfig(architecture="lenet")])
def test_random_images_have_labels_by_the_rule_of_the_stored_ones(
    finished_run: Path, tmp_path: Path, network: NetworkConfig | None
) -> None:
    """The control has the bits of a store of its own, with the set's views, kept epochs and kept logits."""
    settings = ("evaluate.keep_labels=2", "evaluate.top_logits=3", "evaluate.temperature=4")
    pipeline, config = pipeline_of(finished_run, tmp_path, *STORED, *settings)
    evaluate(pipeline)
    of_set, dataset = store_of(pipeline, config), pipeline.runs.dataset(config.dataset)
    worker, folder = EvaluateWorker(dataset, config.cluster), pipeline.runs.folder(config)
    works = worker._training_sets(config, pipeline.store_uri, folder, "random-soft", [5], network)
    ((images, *_),) = result_of(works)
    lessons = worker._lessons(config, pipeline.store_uri, "random-soft", folder, images)
    assert isinstance(lessons, StoredLessons)
    assert lessons.temperature == 4
    experts = ExpertNetworks(config, dataset, pipeline.store_uri, torch.device("cpu"))
    info = replace(of_set.info, set_fingerprint=images_fingerprint(images))
    own = LabelStore.create(str(tmp_path / "own"), info)
    list(label_epochs(own, experts.restored(0), images, own.missing()))
    replayed = ReplayedLabels(images, own)
    for epoch in range(4):
        lessons.labels.set_epoch(epoch)
        replayed.set_epoch(epoch)
        rows = range(len(images))
        for found, stored in zip(lessons.labels.batch(rows), replayed.batch(rows), strict=True):
            assert torch.equal(found, stored)
        one, two = (store.read(epoch % 2, rows) for store in (of_set, own))
        assert all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("boxes", "flips", "partners"))
    parts = list(lessons.batches(images, 0, range(4), 4, "resized+flip"))
    assert [len(part.images[0]) for part in parts] == [4, 4, 2] * 4
    assert all(len(set(logits.tolist())) <= 4 for part in parts for logits in part.targets[0])  # three and the rest


def test_recipes_with_other_numbers_of_epochs_share_their_labels(finished_run: Path, tmp_path: Path) -> None:
    """A longer training, or more kept epochs, labels only the missing epochs; cost and bytes are of those used."""
    found = {}
    for keep, epochs, missing in ((2, 4, 2), (4, 6, 2), (1, 4, 0), (4, 4, 0)):
        settings = (f"evaluate.keep_labels={keep}", f"evaluate.epochs={epochs}")
        pipeline, config = pipeline_of(finished_run, tmp_path, *STORED, *settings)
        left = missing_epochs(pipeline.runs.folder(config), config, pipeline.runs.raw(config).fingerprint)
        assert len(left) == missing
        evaluate(pipeline)
        (summary,) = summaries(pipeline.out, pipeline.configs)
        found[keep, epochs] = next(line.spent.seconds for line in cost_lines(summary) if line.title == "labels")
    assert len(list((tmp_path / "tiny" / LABELS).iterdir())) == 1
    assert 0 < found[1, 4] < found[2, 4] < found[4, 4] == found[4, 6]


def test_the_store_of_an_earlier_version_is_used_by_its_recipe(finished_run: Path, tmp_path: Path) -> None:
    """A store in the folder that earlier versions made for each number of epochs is not labelled again."""
    pipeline, config = pipeline_of(finished_run, tmp_path, *STORED, "evaluate.keep_labels=2")
    folder, dataset = pipeline.runs.folder(config), pipeline.runs.dataset(config.dataset)
    list(LabelWorker(dataset, config.cluster).label(config, pipeline.store_uri, folder.uri, (0, 1)))
    fingerprint = dataset.fingerprint
    facts = {"keep_labels": 2, "top_logits": None, "cutmix": 1.0, "epochs": 4}
    facts["teacher"] = expert_fingerprint(config, fingerprint)
    (now,) = (tmp_path / "tiny" / LABELS).iterdir()
    (note,) = (now / COSTS).iterdir()
    content = json.loads(note.read_text())
    assert content.pop("epochs") == [0, 1]
    assert labels_cost(labels_location(folder, config, fingerprint), 1).seconds == content["seconds"] / 2
    note.write_text(json.dumps(content))  # as they noted it
    now.rename(now.with_name(stable_hash(facts)))
    assert missing_epochs(folder, config, fingerprint) == []
    place = labels_location(folder, config, fingerprint)
    assert labels_cost(place, 1) == labels_cost(place, 2) == Spent.from_json(content)
    evaluate(pipeline)
