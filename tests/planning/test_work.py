"""Tests that plans and runs count the same work, task by task, for every packaged recipe and for further settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from datm_ray.config import RunConfig, override
from datm_ray.data.sources import ImageSet, RawDataset
from datm_ray.pipeline import tasks
from datm_ray.pipeline.runs import Runs
from datm_ray.planning.duration import Proposal
from datm_ray.planning.machines import Machine
from datm_ray.planning.plan import plan_run
from datm_ray.planning.work import Row, fewest_tasks, iterations, weight
from datm_ray.recipes import get_recipe, recipe_names
from datm_ray.runtime.executor import Task
from datm_ray.shape import KNOWN_SHAPES, DataShape
from datm_ray.stages.evaluate.rows import scored_rows
from datm_ray.stages.methods.memory import plans_of
from datm_ray.stages.methods.registry import trained_networks

IMAGENET = DataShape((3, 224, 224), 1000, 1_281_167, 50_000)
SETTINGS = {
    "curriculum": ("experts.curriculum={first_share: 0.5, whole_from: 5, scoring_networks: 2, scoring_epochs: 3}",),
    "prior": ("prior={width: 16}",),
    "metadd": ("metadd={auxiliaries: [lenet], experts: {count: 3, epochs: 9}}", "cluster.auxiliaries_apart=true"),
    "backbones": ("backbones=[{network: {width: 16, depth: 2}}]", "cluster.backbones_apart=true", "cluster.shards=2"),
    "rows": ("evaluate.fair=true", "evaluate.networks=[lenet]", "evaluate.fixed_labels=true"),
    "teacher": ("evaluate.labels=teacher", "evaluate.teacher={network: lenet, experts: {count: 1, epochs: 20}}"),
    "labels": ("evaluate.labels=stored", "evaluate.keep_labels=90"),
    "uncompiled": ("cluster.compile=false", "distill.ipc=30", "experts.optimiser=gsam"),
    "stacks": ("cluster.experts_at_a_time=3", "experts.count=7"),
}
"""Name -> further settings of digits-ipc1, each with a kind of task that few packaged recipes have."""
CASES = {name: (name, ()) for name in recipe_names()} | {
    name: ("digits-ipc1", settings) for name, settings in SETTINGS.items()
}
"""Name of a case -> its recipe and further settings."""


def images(shape: DataShape, count: int) -> ImageSet:
    """Black images, in classes of nearly equal size, that take no memory."""
    return ImageSet(np.broadcast_to(np.uint8(0), (count, *shape.image)), np.arange(count) % shape.classes)


def runs_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A run on made-up images of its data set's shape, with nothing done yet."""
    shape = KNOWN_SHAPES.get(config.dataset.source, IMAGENET)
    if side := config.dataset.resize:
        shape = DataShape((shape.image[0], side, side), shape.classes, shape.training_images, shape.test_images)
    trained = shape.trained(config.dataset)
    counts = (trained, shape.training_images - trained, shape.test_images)
    train, held_out, test = (images(shape, count) for count in counts)
    names = tuple(map(str, range(shape.classes)))
    raw = RawDataset("made-up", names, train, validation=held_out, test=test, fingerprint="0" * 16)
    monkeypatch.setattr("datm_ray.pipeline.runs.load_raw", lambda *_, **__: raw)
    return Runs([config], f"memory://work/{config.name}")


def weights(found: Sequence[Task]) -> list[float]:
    """Sorted weights of tasks."""
    return sorted(task.weight for task in found)


@pytest.mark.parametrize("share", ["0", "1"])
def test_an_iteration_has_work_of_metadd_if_a_term_has_weight(share: str) -> None:
    """Without weights MetaDD's networks see nothing in an iteration, so plans count none of their work."""
    config, terms = get_recipe("digits16-metadd-ipc1"), ("variance", "invariance", "position")
    weighed = override(config, [f"metadd.{term}={share}" for term in terms])
    found = [weight(iterations(each, IMAGENET)[0]) for each in (weighed, override(config, ["metadd=null"]))]
    assert (found[0] > found[1]) == (share == "1")


@pytest.mark.parametrize("name", ["digits-ipc1", "digits-dm-ipc10", "digits-sre2l-ipc10"])
def test_metadd_without_weights_costs_nothing_unless_its_networks_are_used_otherwise(name: str) -> None:
    """With all weights at 0 a run trains, holds and plans what it does without MetaDD, wherever its networks would be.

    Where images are recovered from the statistics of auxiliaries, these are trained all the same.
    """
    without = get_recipe(name)
    auxiliaries = "[{architecture: resnet18, width: 8, norm: batch}, {width: 8, norm: batch}]"
    weightless = f"metadd={{auxiliaries: {auxiliaries}, variance: 0, invariance: 0, position: 0}}"
    apart = [] if "sre2l" in name else ["cluster.auxiliaries_apart=true"]
    also = "recover.statistics_of=all"

    def planned(config: RunConfig) -> Any:
        found = plan_run(config, "cpus=12,memory=240GiB,gflops=50", "1x8x8,10,1500")
        trained = [(each.network, each.experts) for each in trained_networks(config.resolved((8, 8)))]
        return trained, config.roles, [plan.parts for plan in found.plans], found.stages

    assert planned(override(without, [weightless, *apart])) == planned(without)
    trained, roles, *_ = planned(override(without, [weightless, also]))
    assert len(trained) == len(trained_networks(without)) + ("sre2l" in name) * 2
    assert roles[0].meta_networks == ((0, 1, 2) if "sre2l" in name else ())


@pytest.mark.parametrize("case", CASES)
def test_plans_and_runs_count_the_same_work(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has the tasks of a run, each with the same work, for several workers and for one."""
    name, settings = CASES[case]
    runs = runs_of(override(get_recipe(name), [f"name={case}", *settings, "cluster.memory=1000TiB"]), monkeypatch)
    (config,) = runs.configs
    shape = runs.shape(config)
    for workers in (1, 5) if settings else (5,):
        found = Proposal(config, shape, plans_of(config, shape), Machine.of("core", workers, speed=1.0))

        def planned(stage: str, together: int = 1, found: Proposal = found) -> Any:
            """Work of the plan's tasks: their seconds on a machine that takes one for each operation."""
            works = [max(1.0, together * found.seconds(each)) for each in found.tasks.get(stage, [])]
            return pytest.approx(sorted(works), rel=1e-9)

        scoring = tasks.scoring_runs(runs)
        trained = [*tasks.expert_tasks(runs, workers, scoring), *tasks.scoring_tasks(runs)] if scoring else []
        trained += [*tasks.expert_tasks(runs, workers), *tasks.prior_tasks(runs)]
        assert weights(trained) == planned("experts")
        distilled = tasks.distill_tasks(runs)
        assert weights(distilled) == planned("distillation", config.workers_per_set)
        for work in found.tasks["validation"][:1]:
            assert tasks.validation_task(runs, config).weight == pytest.approx(found.seconds(work))
        assert weights(tasks.evaluate_tasks(runs, scored_rows, workers=workers)) == planned("evaluation")
        with monkeypatch.context() as finished:
            finished.setattr(Runs, "unfinished", lambda _: [])
            assert weights(tasks.label_tasks(runs, workers)) == planned("labels")


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_get_equal_parts_of_a_row(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds of one row differ by at most one between workers, and no task has more seeds than a stack."""
    monkeypatch.setattr(Row, "largest_stack", lambda *_: 8)
    recipe = get_recipe("digits-ipc1")
    for seeds in range(workers, 50):
        config = override(recipe, [f"evaluate.seeds={seeds}"])
        found = Row(config, "random-hard", None, KNOWN_SHAPES["digits"]).seeds_of_tasks(workers)
        assert [seed for part in found for seed in part] == list(range(seeds))
        assert max(map(len, found)) <= 8
        loads = [0] * workers
        for part in sorted(found, key=len, reverse=True):  # free workers take the longest tasks first
            loads[loads.index(min(loads))] += len(part)
        assert max(loads) - min(loads) <= 1, (seeds, found)


def test_a_row_that_is_most_of_the_work_is_divided() -> None:
    """No task exceeds a worker's share of the work, and there are tasks for all workers."""
    assert fewest_tasks([1, 1, 1, 97], 2) == [1, 1, 1, 2]
    assert fewest_tasks([1, 1], 2) == [1, 1]
    assert fewest_tasks([1, 1, 1, 1], 8) == [2, 2, 2, 2]
    assert fewest_tasks([1, 3], 4) == [2, 3]
    assert fewest_tasks([5], 1) == [1]
