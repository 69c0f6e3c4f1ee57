"""Training of the networks of one evaluation task, saved so that a task that is stopped or killed resumes.

    progress-<first result>-<hash of the trainings>-<stack>/    state of one stack (networks trained together)

The folders lie beside the task's result files and are removed when the task is done. `TrainingProgress` of
`stages.experts.progress` reads and writes them.
Tests: tests/stages/evaluate/test_evaluate.py.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import torch

from datm_ray.config import ClusterConfig, stable_hash
from datm_ray.core.steps import Steps, all_of
from datm_ray.core.training.loop import Trainer, Training, TrainingState
from datm_ray.core.training.teacher import Lessons
from datm_ray.monitor.logs import fields
from datm_ray.monitor.spent import Account, Spent, total
from datm_ray.runtime.executor import Note, Phase, Progress
from datm_ray.runtime.heartbeats import (
    interval_between_epochs,
    interval_in_epochs,
    reporting,
    stopped_if,
    with_heartbeats,
    within_epoch,
)
from datm_ray.runtime.stopping import Interrupted, saving
from datm_ray.stages.experts.progress import REPORT_INTERVAL, TrainingProgress, remove_folder
from datm_ray.store.files.filesystem import Location

SAVE_INTERVAL = 30.0
"""Smallest number of seconds between two saved states of a stack (networks trained together)."""
PROGRESS = "progress-"
"""First part of the names of the progress folders."""
SCORING = "scoring the networks"
"""Text of the phase in which trained networks are scored."""
_FOLDER = re.compile(rf"{PROGRESS}(.+-\d+)-[0-9a-f]+-\d+")
_log = logging.getLogger(__name__)


class SavedTraining:
    """Training of one evaluation task's networks, together or one after another. The state is saved regularly."""

    def __init__(
        self,
        trainer: Trainer,
        trainings: Sequence[Training],
        lessons: Lessons | None,
        result: Location,
        account: Account,
        alike: int = 0,
    ) -> None:
        """Divide the networks into stacks (networks trained together), and open a progress folder for each stack.

        Args:
            trainer: trains the networks.
            trainings: networks of one architecture. Their schedules differ in the learning rate alone.
            lessons: a teacher's images and logits for every step; `None` trains on the set's own labels.
            result: file of the task's first result, beside which the progress folders lie.
            account: measures the task's cost.
            alike: number of networks in all tasks of the run whose training steps are the same as those of
                `trainings`; 0 if unknown. Compiling the step once serves all of them, so it pays off sooner.
        """
        self._trainer, self._lessons, self._count = trainer, lessons, len(trainings)
        self._epochs = trainings[0].schedule.epochs
        stacks = trainer.stacks(trainings, lessons, alike)
        trained = [[(each.seed, each.schedule.to_json()) for each in stack] for stack in stacks]
        name = result.path.rpartition("/")[2].removesuffix(".json")
        name = f"{PROGRESS}{name}-{stable_hash({'network': str(trainings[0].network), 'trained': trained})}"
        self._stacks = [
            (stack, TrainingProgress(result.parent / f"{name}-{number}", len(stack), account, interval=SAVE_INTERVAL))
            for number, stack in enumerate(stacks)
        ]
        self._account = account
        self._done, self._reported, self._saved = 0, 0.0, list[int]()

    @property
    def spent(self) -> Spent:
        """Cost of the training up to the last saved states, summed over all attempts at the task."""
        return total(progress.spent for _, progress in self._stacks)

    def run(
        self, device: torch.device, cluster: ClusterConfig, scored: Callable[[torch.nn.Module], Steps[float]]
    ) -> Generator[Progress | Phase | Note, None, list[float]]:
        """Train the networks from where they were saved. Returns each network's validation accuracy, in [0, 1].

        Yields a phase as a heartbeat within a slow epoch, and while many images are scored.

        Args:
            device: device of the networks.
            cluster: section `cluster` of the recipe, whose time limits decide when a heartbeat is due.
            scored: measures the validation accuracy of a network, in [0, 1], in steps.

        Raises:
            Interrupted: the work was asked to stop, and is saved.
        """
        self._saved = [progress.last_epoch for _, progress in self._stacks]
        self._done = sum(len(stack) * epoch for (stack, _), epoch in zip(self._stacks, self._saved, strict=True))
        if self._done:
            _log.info("scoring resumed %s", fields(epoch=self._done, epochs=self._count * self._epochs))
        self._reported, measured = time.monotonic(), list[float]()
        yield self._progress()
        with saving() as is_asked:
            for number, (stack, _) in enumerate(self._stacks):
                yield from self._train(number, device, interval_in_epochs(cluster), is_asked)
                works = all_of(scored(each.network) for each in stack)
                work = stopped_if(is_asked, works, partial(Interrupted, self._place(number, self._epochs)))
                shares = yield from reporting(work, SCORING, interval_between_epochs(cluster), at_once=False)
                measured += shares
                mean = statistics.fmean(shares)
                metrics = self._account.metrics() | {"datm_ray_evaluate_validation_accuracy_ratio": mean}
                yield dataclasses.replace(self._progress(saved=True), values={"validation": mean}, metrics=metrics)
            if is_asked():
                raise Interrupted(f"{self._count} networks, to be tested")
        return measured

    def _train(
        self, number: int, device: torch.device, interval: float, is_asked: Callable[[], bool]
    ) -> Iterator[Progress | Phase | Note]:
        """Train one stack (networks trained together) from where it was saved.

        Afterwards only the parameters and buffers of these networks stay in memory.

        Args:
            number: index of the stack among those of the task, from 0.
            interval: seconds without an event after which a phase is yielded within an epoch.
            is_asked: returns True if the work was asked to stop.
        """
        stack, progress = self._stacks[number]
        steps = self._trainer.train_steps(stack, self._lessons, self._resumed(number, device))
        for state in with_heartbeats(steps, interval):
            if state is None:
                yield within_epoch(lambda: self._place(number, progress.last_epoch))
                continue
            yield from self._after_epoch(stack, progress, state)
            if is_asked():
                yield from map(Note, progress.write(state))
                raise Interrupted(self._place(number, state.epoch))
        for each in stack:
            each.network.zero_grad()

    def _resumed(self, number: int, device: torch.device) -> TrainingState | None:
        """Saved state of a stack; `None` if there is none, so that the training starts.

        Also corrects the count of finished epochs: another worker may have replaced the files since the task started.
        """
        stack, progress = self._stacks[number]
        state = progress.resume(device)
        progress.at_a_time = self._trainer.at_a_time(stack, progress.at_a_time if state else None)
        self._done += len(stack) * ((state.epoch if state else 0) - self._saved[number])
        return state

    def remove(self) -> None:
        """Remove the progress folders of the finished task."""
        for _, progress in self._stacks:
            progress.remove()

    def _after_epoch(
        self, stack: Sequence[Training], progress: TrainingProgress, state: TrainingState
    ) -> Iterator[Progress | Note]:
        """Save a stack's state if due. Yield progress if it is saved, or `REPORT_INTERVAL` seconds after the last."""
        self._done += len(stack)
        yield from map(Note, progress.add(state, last=state.epoch == self._epochs))
        if progress.is_written or time.monotonic() - self._reported > REPORT_INTERVAL:
            self._reported = time.monotonic()
            yield self._progress(saved=progress.is_written)

    def _progress(self, *, saved: bool = False) -> Progress:
        return Progress(self._done, self._count * self._epochs, saved=saved)

    def _place(self, number: int, epoch: int) -> str:
        """Progress in words, such as "networks 6-10 of 15, epoch 3 of 20".

        Args:
            number: index of the stack among those of the task, from 0.
            epoch: number of epochs done.
        """
        before, size = sum(len(earlier) for earlier, _ in self._stacks[:number]), len(self._stacks[number][0])
        which = f"network {before + 1}" if size == 1 else f"networks {before + 1}-{before + size}"
        return f"{which} of {self._count}, epoch {epoch} of {self._epochs}"


def remove_progress(folder: Location) -> None:
    """Remove progress folders in `folder` of tasks whose results are written; workers killed at the end leave them."""
    names = set(folder.list())
    for name in names:
        match = _FOLDER.fullmatch(name)
        if match and f"{match[1]}.json" in names:
            remove_folder(folder / name)
