"""One worker class for all stages. So a process reads its data set once, and one list may hold tasks of all stages."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

from datm_ray.config import ClusterConfig
from datm_ray.data.dataset import Dataset
from datm_ray.runtime.executor import Event
from datm_ray.runtime.machine.devices import reading_threads
from datm_ray.stages.distill.pieces import PieceWorker
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.evaluate.rows import EvaluateWorker
from datm_ray.stages.experts.difficulty import score_images
from datm_ray.stages.experts.train import ExpertWorker
from datm_ray.stages.labels import LabelWorker
from datm_ray.stages.methods.memory import crowded_gpus_lose
from datm_ray.stages.prior import PriorWorker
from datm_ray.store.files.filesystem import open_location, require_shared, seconds_to_look
from datm_ray.store.files.patience import expect_rights


class StageWorker:
    """Runs tasks of all stages on one data set: experts, priors, distillation, validation, labels and evaluation.

    Each stage has a worker of its own, made at the stage's first task. Functions of this class pass their arguments on
    to the stage's worker.
    """

    def __init__(
        self,
        dataset: Dataset,
        cluster: ClusterConfig,
        distill_worker: type[DistillWorker] = DistillWorker,
        shared: Sequence[str] = (),
    ) -> None:
        """Check that this machine shares the command's disks.

        Args:
            dataset: data set of all tasks.
            cluster: section `cluster` of the recipe.
            distill_worker: class of the worker that distils.
            shared: local files that the command's machine has, one in each folder that all machines must share.

        Raises:
            ClusterError: a file of `shared` does not exist on this machine.
        """
        expect_rights()
        for path in shared:
            place = open_location(path)
            fact = f"{socket.gethostname()} has no {path}, which the command's machine has"
            require_shared(place.exists, seconds_to_look(place, cluster.progress_timeout), fact)
        self._dataset, self._cluster, self._distill_worker = dataset, cluster, distill_worker
        self._workers: dict[tuple[type[Any], bool], Any] = {}

    def train(self, *arguments: Any) -> Iterator[Event]:
        """Train experts together. Arguments and errors are those of `ExpertWorker.train`."""
        yield from self._worker(ExpertWorker, light=True).train(*arguments)

    def train_prior(self, *arguments: Any) -> Iterator[Event]:
        """Train a prior (a decoder from latents to images). Arguments and errors are those of `PriorWorker.train`."""
        yield from self._worker(PriorWorker, light=True).train(*arguments)

    def score(self, *arguments: Any) -> Iterator[Event]:
        """Store scores of how hard the training images are for trained networks.

        Arguments and errors are those of `score_images`, after its first argument.
        """
        yield from score_images(self._worker(ExpertWorker, light=True), *arguments)

    def distill(self, *arguments: Any, **rank: Any) -> Iterator[Event]:
        """Make a set, alone or with other workers. Arguments and errors are those of `DistillWorker.distill`.

        Also raises a `WorkerLostError` if other processes hold memory of the worker's GPU, and too little is left.
        """
        with crowded_gpus_lose(self._cluster):
            yield from self._worker(self._distill_worker, light=False).distill(*arguments, **rank)

    def make_piece(self, *arguments: Any) -> Iterator[Event]:
        """Make some images of some classes of a set. Arguments and errors are those of `PieceWorker.make_piece`.

        Also raises a `WorkerLostError` if other processes hold memory of the worker's GPU, and too little is left.
        """
        with crowded_gpus_lose(self._cluster):
            yield from self._worker(PieceWorker, light=False).make_piece(*arguments)

    def join_pieces(self, *arguments: Any) -> Iterator[Event]:
        """Join the pieces (parts) of a set. Arguments and errors are those of `PieceWorker.join_pieces`."""
        yield from self._worker(PieceWorker, light=False).join_pieces(*arguments)

    def label(self, *arguments: Any) -> Iterator[Event]:
        """Store a teacher's labels of a set for some epochs. Arguments and errors are those of `LabelWorker.label`."""
        yield from self._worker(LabelWorker, light=True).label(*arguments)

    def validate(self, *arguments: Any) -> Iterator[Event]:
        """Validate a set of an unfinished distillation. Arguments and errors are those of `DistillWorker.validate`."""
        yield from self._worker(self._distill_worker, light=True).validate(*arguments)

    def evaluate(self, *arguments: Any) -> Iterator[Event]:
        """Score networks of one row of the accuracy table. Arguments and errors: `EvaluateWorker.evaluate`."""
        yield from self._worker(EvaluateWorker, light=True).evaluate(*arguments)

    def _worker(self, kind: type[Any], *, light: bool) -> Any:
        """Worker of one stage, made at the stage's first task.

        The first task of another stage drops the worker that trains experts, which frees the images on the device. It
        also drops the workers of pieces and of labels, which frees the set and the trained networks on the device.

        Args:
            kind: class of the stage's worker.
            light: True to give the worker the resources of section `cluster.light`, if the recipe has one; False for
                those of `cluster`, as distilling workers have.
        """
        for other, is_light in ((ExpertWorker, True), (PieceWorker, False), (LabelWorker, True)):
            if kind is not other:
                self._workers.pop((other, is_light), None)
        if (kind, light) not in self._workers:
            cluster = self._cluster.shaped(light=light)
            self._workers[kind, light] = kind(self._dataset.read_by(reading_threads(cluster)), cluster)
        return self._workers[kind, light]
