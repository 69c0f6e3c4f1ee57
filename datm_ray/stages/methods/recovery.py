"""Recovery of images from a teacher (SRe2L) in one worker: one block (at most `recover.block` images) at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from datm_ray.config import RunConfig
from datm_ray.core.compute.compilation import compiled_facts
from datm_ray.core.networks.image_cost import ImageCost, image_cost
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.synthetic import Rows, SyntheticSet
from datm_ray.core.training.loop import Heartbeat
from datm_ray.data.sources import RawDataset
from datm_ray.errors import ConfigError
from datm_ray.methods.recovery import Recovery, RecoveryLoss, draw_view, pulled_back
from datm_ray.methods.state import MetaTerm, State
from datm_ray.runtime.machine.devices import channels_last_on, uses_gpu
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.methods.base import Demand, Method
from datm_ray.stages.methods.first_images.crops import check_crops, check_images_for_crops, crops_scored, shared_crops
from datm_ray.stages.methods.first_images.initial import first_rows
from datm_ray.stages.methods.part import Arrays, Part, Piece, shared_arrays

FEW_IMAGES = 32
"""Number of images in a block (the images that are recovered together) below which a run warns: batch statistics of
fewer images are unreliable."""


COMPILED_FROM, GPU_SPEED = 6e12, 100
"""COMPILED_FROM: smallest work of a run, inclusive, for which the gradient is compiled, in floating-point operations of
all forward passes. One CPU core needs three minutes for this work uncompiled. Compiling takes half a minute and halves
the time. GPU_SPEED: number of times that a GPU is faster than a core, assumed."""


class RecoveryFromTeacher(Method):
    """SRe2L: recovers the images of one block (part of a set) from a teacher, which is expert 0 of `network`."""

    state: ClassVar[type[State[Any]]] = Recovery
    batch_norm = "always"
    trains = "first"
    reads_last_epoch = True  # the teacher is expert 0 after this epoch
    soft_labels = True
    starts_from_crops = True
    has_teacher = True
    augments = False  # `step` shows MetaDD the view of the iteration

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise a `ConfigError` for a recipe that the method cannot follow, such as one with ZCA whitening."""
        super().check(config)
        if config.dataset.normalisation == "zca":
            raise ConfigError(
                "dataset.normalisation is 'zca', and recovered pixels are kept between black and white",
                "whitened values have no such bounds",
                "use --set dataset.normalisation=standard",
            )
        if config.recover.rounds > config.distill.iterations:
            raise ConfigError(
                f"recover.rounds is {config.recover.rounds}, and there are {config.distill.iterations} iterations",
                "a round has at least one iteration",
                "lower recover.rounds",
            )
        if config.distill.initial == "crops":
            check_crops(config)

    @classmethod
    def check_images(cls, config: RunConfig, images: RawDataset) -> None:
        """Raise a `DatasetError` for images that do not give the crops to start from."""
        if config.distill.initial == "crops":
            check_images_for_crops(config, images)

    @classmethod
    def choosing(cls, config: RunConfig, classes: int, training_images: int) -> Mapping[str, float]:
        """Work of choosing and labelling the first images: kind of work -> images that pass the teacher, or are read.

        Each crop counts as an image that passes.
        """
        labelled = dict(super().choosing(config, classes, training_images))
        if config.distill.initial == "crops":
            scored = crops_scored(config, classes, training_images)
            labelled["scoring"] += scored
            labelled["reading"] += scored // config.select.crops
        return labelled

    @classmethod
    def pieces(cls, config: RunConfig, classes: int) -> Sequence[Piece]:
        """Blocks into which the set is divided: at most `recover.block` images each, of about equal sizes.

        If there are more classes than a block may have images, a block has one image of each of some classes.
        Otherwise a block has all classes, with as many images of each class as fit.
        """
        most, ipc = config.recover.block, config.distill.ipc
        groups = np.array_split(np.arange(classes), -(-classes // most))
        each = max(1, most // len(groups[0]))
        parts = np.array_split(np.arange(ipc), -(-ipc // each))
        found = [(range(group[0], group[-1] + 1), range(part[0], part[-1] + 1)) for part in parts for group in groups]
        return [Piece(number, *ranges) for number, ranges in enumerate(found)]

    @classmethod
    def demand(cls, config: RunConfig, classes: int, shards: int, cost: ImageCost) -> Demand:
        """Work and memory of an iteration of one block: the block's images pass the networks once forward and back."""
        largest = max(len(each.classes) * len(each.images) for each in cls.pieces(config, classes))
        kind = "recovery" if cls.is_compiled(config, classes, cost) else "training"
        networks = 1  # each auxiliary is assumed to cost as much as the teacher
        if config.recover.statistics_of != "teacher":
            networks += len(config.each_auxiliary())
        passes, most = {kind: float(networks * largest)}, 2 * networks
        return Demand(passes, at_once=largest, is_divisible=False, maps=most, vectors=most, held=largest)

    @classmethod
    def is_compiled(cls, config: RunConfig, classes: int, cost: ImageCost) -> bool:
        """True if the gradient is to be compiled: `cluster.compile` is set, and the run's work is worth compiling."""
        work = config.distill.iterations * config.distill.ipc * classes * cost.flop
        return config.cluster.compile and work >= COMPILED_FROM * (GPU_SPEED if uses_gpu(config.cluster) else 1)

    @classmethod
    def described(cls, config: RunConfig, images: int, chunk: int) -> str:
        """Text for plans: the numbers of blocks, iterations and images."""
        return f"{config.distill.iterations:,} iterations of each block of {chunk:,} of {images:,} images"

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.calibration = ""  # Adam has its own learning rate, so none is found
        cost = image_cost(self.experts[0].network, part.dataset.image_shape)
        self._is_compiled = self.is_compiled(part.config, part.dataset.classes, cost)
        few = f"a block has {part.rows.last} images, whose statistics say little: raise recover.block"
        self.notes = list(filter(None, [few if part.rows.last < FEW_IMAGES else "", self._loss.note]))
        works = self._is_compiled and not self._loss.note
        self.preparation = "compiling the recovery" if works else ""
        self.facts = compiled_facts(works, self._loss.note)

    def prepare(self, heartbeat: Heartbeat) -> None:
        """Compile the gradient with respect to the images, if compiling saves more time than it takes.

        A worker keeps the compiled code for all blocks of one size.
        """
        if not self.facts["compiled"]:
            return
        labels = torch.zeros(self.part.rows.last, dtype=torch.long, device=self.part.device)
        self._loss.gradient(torch.zeros(len(labels), *self.part.dataset.image_shape, device=self.part.device), labels)
        heartbeat()

    def calibrate(self, state: Any) -> Iterator[str]:
        """Yields nothing, because the recipe leaves no value open."""
        return iter(())

    @cached_property
    def _loss(self) -> RecoveryLoss:
        config, kept = self.part.config, self.part.kept
        options = {"compiled": self._is_compiled, "channels_last": channels_last_on(config.cluster, self.part.device)}
        others = [] if config.recover.statistics_of == "teacher" else config.each_auxiliary()
        place = (self.part.dataset, self.part.store_uri, self.part.device)
        networks = [ExpertNetworks(each, *place) for each in others]
        key = (config.recover.model_dump_json(), *(each.group.location.uri for each in networks), *options.values())
        if key not in kept:
            beside = [each.restored(0) for each in networks]
            kept[key] = RecoveryLoss(self.experts[0].restored(0), config.recover, beside, **options)
        loss: RecoveryLoss = kept[key]
        return loss

    @cached_property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        """Values [c 1 1] of black and of white pixels in normalised images."""
        normaliser, shape = self.part.dataset.transform.normaliser(), self.part.dataset.image_shape
        black, white = (normaliser(torch.full((1, *shape), value))[0, :, :1, :1] for value in (0.0, 1.0))
        return black.to(self.part.device), white.to(self.part.device)

    def choose(self) -> Generator[None, None, SyntheticSet]:
        """Make the images with which the block starts: noise, real images or crops. Labels are hard.

        Yields between steps. The task that joins the blocks may replace the labels, see `stages/distill/pieces.py`.
        """
        config, piece = self.part.config, self.piece
        labels = torch.tensor(piece.classes, device=self.part.device).repeat_interleave(len(piece.images))
        yield
        if config.distill.initial == "noise":
            noise = generator(config.seed, Purpose.RECOVERY_NOISE, piece.number)
            images = torch.from_numpy(noise.standard_normal((len(labels), *self.part.dataset.image_shape), np.float32))
        elif config.distill.initial == "crops":
            images = yield from self._crops()
        else:
            images = yield from self._real_images()
        return self.hard_labelled(images, labels)

    def _crops(self) -> Generator[None, None, Tensor]:
        """Images [n c h w], tiled from the crops that the teacher classifies best; yields between scoring steps.

        The crops of a class are chosen once for all blocks of the set.
        """
        piece, teacher, found = self.piece, self.experts[0].restored(0).eval(), dict[int, Tensor]()
        for label in _in_turn(piece):
            crops = yield from shared_crops(self.part, teacher, label)
            found[label] = crops.images(self.part, piece.images)
        return torch.cat([found[label] for label in piece.classes])

    def _real_images(self) -> Generator[None, None, Tensor]:
        """Real images [n c h w] from which recovering this block of synthetic images starts; yields between steps.

        The images of the block's classes are chosen once for all blocks of these classes.
        """
        config, classes, ipc = self.part.config, self.piece.classes, self.part.config.distill.ipc
        of_classes = Rows(classes.start * ipc, classes.stop * ipc)

        def choose() -> Generator[None, None, Arrays]:
            yield
            return {"rows": (yield from first_rows(self.part, self.experts[0], of_classes))}

        settings = (config.distill.initial, config.seed, ipc)
        name = f"{config.distill.initial}-{classes.start:05d}-{classes.stop:05d}"
        arrays = yield from shared_arrays(self.part, name, settings, choose)
        return torch.from_numpy(self.part.dataset.train_images[arrays["rows"][self.piece.rows(ipc) - of_classes.first]])

    def step(self, state: Any, meta: MetaTerm | None) -> None:
        """Run one iteration: one step of Adam on the loss of a random view of the block's images.

        Args:
            state: state of the distillation, a `Recovery`, changed in place.
            meta: MetaDD's term, which is added to the loss; `None` without MetaDD.

        Raises:
            DivergenceError: too many steps in a row were skipped because a value was not finite.
        """
        config, synthetic = self.part.config, state.synthetic
        if config.recover.rounds > 1 and state.first_images is None:
            state.first_images = synthetic.variable("images").clone()
        iterations = config.distill.iterations
        view = draw_view(config.recover, config.seed, self.piece.number, state.iteration, iterations)
        images = synthetic.images.detach().requires_grad_()
        seen = view.of(images)
        along, loss, statistics = self._loss.gradient(seen.detach(), synthetic.labels)
        sees_view = config.metadd is not None and config.metadd.augmented
        values: tuple[Tensor, ...] = ()
        if meta is not None and sees_view:
            found, more = meta.gradient(seen.detach(), synthetic)
            along, values = along + more, found.values().unbind()
        gradient = pulled_back(seen, images, along)
        if meta is not None and not sees_view:
            found, more = meta.gradient(synthetic.images, synthetic)
            gradient, values = gradient + more, found.values().unbind()
        state.follow(gradient, loss, statistics, config.recover, self._bounds, values)

    def shown(self, state: Any) -> Mapping[str, float]:
        """Loss of the last iteration, and the loss's statistics term without weight: name -> value."""
        return {"loss": state.history[-1].loss, "statistics": state.history[-1].statistics}

    def images_seen(self) -> float:
        """Number of images that the teacher sees in one iteration: the images of a block."""
        return float(self.part.rows.last)


def _in_turn(piece: Piece) -> Sequence[int]:
    """Classes of a piece (part of a set), in the order in which their first images are chosen.

    Pieces of the same classes start at different classes, so that workers that make them at the same time choose for
    different classes. The start is a multiple of the golden ratio's fraction, which spreads any number of starts.
    """
    classes = piece.classes
    start = int(piece.images.start * 0.618034 % 1 * len(classes))
    return [*classes[start:], *classes[:start]]
