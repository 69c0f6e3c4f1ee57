"""Workers of stages on the device as a run has them, with the trials that only a GPU has.

They run one after another in this process, without Ray, on random images. The check is that they end without an error.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import numpy as np
from turns import timed

from datm_ray.config import RunConfig, override
from datm_ray.core.compute.precision import tf32_products
from datm_ray.core.training import loop
from datm_ray.runtime.machine.devices import restoring_settings
from gpu.machine import Machine, freeing
from gpu.sections import Clock, Row, Section, Work, needed_packages

SETTINGS = (
    "name=workers",
    "dataset.normalisation=standard",
    "network.depth=2",
    "experts.count=2",
    "experts.epochs=2",
    "experts.test_every=2",
    "distill.ipc=1",
    "distill.iterations=2",
    "distill.student_steps=3",
    "distill.expert_epochs=1",
    "distill.start_epochs=[0, 1]",
    "distill.validate_every=2",
    "distill.threshold=1e9",
    "evaluate.protocol=quick",
    "evaluate.seeds=4",
    "metadd={auxiliaries: [lenet], experts: {epochs: 1}}",
)
"""The shortest run with every stage. The section `cluster` keeps its defaults, which are what is checked."""
SMALL = ("network.width=4", "cluster.compile=false", "cluster.device=cpu", "evaluate.seeds=1")
CLASSES = 10


class _Run:
    """The stages of one run. A temporary folder, which goes with this object, holds their store and their output."""

    def __init__(self, machine: Machine) -> None:
        self._small, self.side = machine.small, 16 if machine.small else 32
        config = override(RunConfig(), [*SETTINGS, *(SMALL if machine.small else ())])
        self.config = config.resolved((self.side, self.side))
        folder = tempfile.mkdtemp(prefix="gpu-workers-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._store, self._out = (f"{folder}/{name}" for name in ("store", "workers"))

    @cached_property
    def dataset(self) -> Any:
        """Random images of CIFAR-10's shape, smaller and fewer in small."""
        from datm_ray.data.dataset import prepare, transform_of
        from datm_ray.data.sources import ImageSet, RawDataset

        draw = np.random.default_rng(0)
        train, held_out, test = (
            ImageSet(
                draw.integers(0, 256, (count, 3, self.side, self.side), dtype=np.uint8), np.arange(count) % CLASSES
            )
            for count in ((40, 20, 20) if self._small else (1_024, 100, 100))
        )
        names = tuple(f"class {number}" for number in range(CLASSES))
        raw = RawDataset("random", names, train, validation=held_out, test=test, fingerprint="0" * 16)
        return prepare(raw, transform_of(raw, "standard"))

    def experts(self, config: RunConfig) -> str:
        """Train experts together. On a GPU a trial finds how many of them one call computes."""
        from datm_ray.stages.experts.train import ExpertWorker

        worker = ExpertWorker(self.dataset, config.cluster.shaped(light=True))
        ended(worker.train(config, self._store, range(config.experts.count)))
        return ", ".join(f"{size} in a call" for size in worker._at_a_time.values()) or "no trial"

    def auxiliary(self) -> str:
        """Train the network that MetaDD compares with the first one."""
        return self.experts(self.config.each_auxiliary()[0])

    def distilled(self) -> str:
        """Distil, validate and write maps. On a GPU trials find how many images fit, in a step and in MetaDD."""
        from datm_ray.stages.distill import metadd
        from datm_ray.stages.distill.task import DistillWorker
        from datm_ray.stages.methods import trajectory

        worker = DistillWorker(self.dataset, self.config.cluster.shaped(light=False))
        with noting(trajectory, "chunk_by_trial") as steps, noting(metadd, "chunk_by_trial") as maps:
            ended(worker.distill(self.config, self._store, self._out))
        return ", ".join(f"{size} images fit" for size in (*steps, *maps)) or "no trial"

    def scored(self) -> str:
        """Train networks on the set together, and score them. On a GPU a trial finds how many one call computes."""
        from datm_ray.stages.distill.validation import trainer_of
        from datm_ray.stages.evaluate.rows import EvaluateWorker

        numbers = range(self.config.evaluate.seeds)
        files = [f"{self._out}/{number}.json" for number in numbers]
        worker = EvaluateWorker(self.dataset, self.config.cluster.shaped(light=True))
        with short_trainings_together():
            results = ended(worker.evaluate(self.config, self._store, self._out, files, "distilled", numbers))
        trials = trainer_of(worker._cluster, worker._device)._at_a_time.values()
        return ", ".join([f"{len(results)} networks", *(f"{size} in a call" for size in trials)])


@contextmanager
def short_trainings_together() -> Iterator[None]:
    """Let networks on a GPU be trained together however few steps they take, as those of a longer run are."""
    before, loop.COMPILED_STEPS = loop.COMPILED_STEPS, 1
    try:
        yield
    finally:
        loop.COMPILED_STEPS = before


@contextmanager
def noting(module: ModuleType, name: str) -> Iterator[list[int]]:
    """Collect the results of a module's function in a list."""
    original, found = getattr(module, name), list[int]()

    def noted(*arguments: Any) -> int:
        found.append(original(*arguments))
        return found[-1]

    setattr(module, name, noted)
    try:
        yield found
    finally:
        setattr(module, name, original)


def ended(events: Iterator[Any]) -> Any:
    """Result of a task, after all its events."""
    *_, last = events
    return last.result


def row(machine: Machine, stage: Callable[[], str]) -> Row:
    """Run a stage, and restore what its worker has set for its whole process."""
    with needed_packages(), restoring_settings(), tf32_products(False, machine.place):
        seconds, found = timed(stage, machine.device)
    return {"seconds": seconds, "found": found, "verdict": "ok"}


def works(machine: Machine, _: Clock) -> list[Work]:
    """List the stages in the order of a run, in which each needs those before it."""
    run = _Run(machine)
    stages = {
        "ExpertWorker: two experts, on a GPU with the trial of a stack": partial(run.experts, run.config),
        "ExpertWorker: an auxiliary": run.auxiliary,
        "DistillWorker: two iterations with MetaDD, on a GPU with trials of memory": run.distilled,
        "EvaluateWorker: networks trained together": run.scored,
    }
    return [
        Work({"what": what}, partial(freeing, machine.device, partial(row, machine, stage)))
        for what, stage in stages.items()
    ]


SECTION = Section(
    "workers",
    "2. Do the workers of a run work here?",
    "Workers of all stages with a recipe's default settings, one after another without Ray, on random images. Seconds "
    "with compilation. Found: by trials, which only a GPU has. The accuracy means nothing.",
    ("what", "seconds", "found", "verdict"),
    seconds=50,
    least=10,
    works=works,
)
