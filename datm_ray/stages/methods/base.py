"""Interface between distillation and methods: what a method states and computes. `part.py` has what it receives.

A method is a subclass of `Method`. It states which networks must be trained before, what an iteration costs, and what
it computes. The rest is the same for all methods: `stages/distill/` resumes, iterates, validates and saves. Plans,
pipelines, MetaDD, evaluation and the report work with any method. The numerics of methods are in `datm_ray/methods`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.config import RunConfig
from datm_ray.config.sections import keys_read_of_distill
from datm_ray.core.images.augment import Augmentation, augment
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.networks.registry import build_network
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.steps import Steps
from datm_ray.core.synthetic import AllSum, SyntheticSet, draw_rows, hard_logits
from datm_ray.core.training.loop import Heartbeat
from datm_ray.data.sources import RawDataset
from datm_ray.errors import ConfigError
from datm_ray.methods.distribution import draw_shared, repeated
from datm_ray.methods.state import FIRST_MOVE, Descent, MetaTerm, State
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.methods.first_images.initial import first_set
from datm_ray.stages.methods.part import Part, Piece
from datm_ray.words import counted

STEP_SIZE = 0.01
"""Step size for training on a set without a learned one: the value published with DM (distribution matching)."""
ALONE = {"shards": 1, "backbones_apart": False, "auxiliaries_apart": False}
"""Key of the section `cluster` -> value with which one worker distils a set by itself."""


@dataclass(frozen=True)
class Demand:
    """Work and memory of one iteration on one worker for one network. Plans of memory and time use it."""

    passes: Mapping[str, float]
    """Kind of work (a key of `FORWARD_PASSES` in `planning/machines.py`) -> number of images that pass through the
    network, or that would take as long as the work does."""
    at_once: int
    """Largest number of images in the network at the same time. If memory is short, micro-batches have fewer."""
    is_divisible: bool = field(default=True, kw_only=True)
    """False if micro-batches must not divide the images, for example because batch statistics couple them."""
    maps: int
    """Peak memory of a micro-batch, as a multiple of the bytes that all layers write in one forward pass."""
    vectors: int
    """Number of vectors as long as the network's parameters that stay in memory: networks, gradients, sums."""
    read: int = field(default=0, kw_only=True)
    """Number of real images that the worker reads in an iteration for this network."""
    held: int | None = None
    """Number of the set's images that a worker holds; `None` if it holds all images of its classes."""
    trace: int = 0
    """Bytes of tensors that stay in memory through the whole iteration, beside parameters and micro-batches: for
    example the student's parameters after each step. 0 for none."""
    steps: int = 0
    """Number of steps in an iteration, of `at_once` images each. A GPU may augment the images of several small steps
    together. 0 if the method never augments several micro-batches together."""
    summed: int = 0
    """Number of bytes that an iteration sums over class shards (workers with different classes)."""
    sums: int = 0
    """Number of sums over class shards (workers with different classes) in an iteration."""


class Outlook(Protocol):
    """A method's forecast for a recipe, made before the run starts, such as how far experts move."""

    @property
    def title(self) -> str:
        """Title shown above the forecast's lines."""
        ...

    def lines(self) -> list[str]:
        """Forecast as lines of text, with advice if something is likely to fail."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Forecast as plain data for JSON."""
        ...


class Method:
    """One way to make a synthetic set, as one worker computes it. `Method(part)` takes the worker's part in the set.

    The work is divided by classes: each worker holds the images of some classes (`part.rows`), and `all_sum` adds over
    the workers of all classes. A subclass defines `gradient`, unless it has no iterations or overrides `step`. By
    default, descent along this gradient changes the images, labels are hard, and no network is trained before the
    distillation. A subclass overrides what differs.
    """

    state: ClassVar[type[State[Any]]] = Descent
    """Class of the state that checkpoints save. It is built from the first set and the section `config.distill`."""
    options: ClassVar[Mapping[str, bool | float | str]] = {}
    """Name of a setting in `distill.options` that the method reads -> default value: a number, a text, True or False.
    A recipe must give a value of the same kind."""
    batch_norm: ClassVar[Literal["never", "always", "either"]] = "never"
    """Which networks the method takes. never: no network may have batch normalisation, for example because gradients
    are matched. always: `network` must have batch normalisation. either: `network` may have it."""
    starts_from_crops: ClassVar[bool] = False
    """True if `choose` can make a set of the crops that a teacher classifies best (`distill.initial` "crops")."""
    reads_backbones: ClassVar[bool] = False
    """True if the method computes every network of `part.role.backbones`, so that a recipe may have `backbones`. False
    if it computes `config.network` alone."""
    can_continue: ClassVar[bool] = False
    """True if an iteration does not depend on the number of iterations after it. A finished set can then be distilled
    further, see `distill.continue_from`."""
    augments: bool = True
    """True if the method augments its images by `augmented`; MetaDD's networks then see the same augmented images.
    False if it does not augment, or augments in its own way. It may then override `augmentations`."""
    precisions: ClassVar[Sequence[str]] = ("auto", "float32", "tf32")
    """Values of `cluster.precision` that the method supports."""
    gives_step_size: ClassVar[bool] = False
    """True if the method learns the set's step size, or its paper publishes one. Networks that score the set then train
    with this step size. False if the step size is chosen on validation images, as for the controls."""
    trains: ClassVar[Literal["none", "first", "all"]] = "none"
    """Backbones whose experts the method needs. With "none", the first one is trained if MetaDD or a teacher needs it,
    see `trained_backbones`."""
    reads_last_epoch: ClassVar[bool] = False
    """True if only the last epoch of each expert is read, False if any stored epoch may be."""
    soft_labels: ClassVar[bool] = False
    """True if the set's labels are soft unless `distill.labels` asks for hard ones, False if they are the classes."""
    has_iterations: ClassVar[bool] = True
    """True if iterations change the set; False if the set that `choose` makes is the result."""
    has_teacher: ClassVar[bool] = False
    """True if the set is made from one trained network, which lists of costs then call teacher, not experts."""
    preparation: str = ""
    """Work of `prepare` in words for the user, such as "compiling student steps"; "" if it takes almost no time."""
    calibration: str = ""
    """Work of `calibrate` in words for the user; "" if it takes almost no time."""
    notes: Sequence[str] = ()
    """Messages to show to the user before the first iteration."""
    facts: Mapping[str, Any] = {}
    """Settings and facts that affect rounding, such as precision. Checkpoints store them."""

    @classmethod
    def trained_backbones(cls, config: RunConfig) -> list[RunConfig]:
        """Backbones that must be trained before the distillation, each as a run with that network alone.

        By default the class attribute `trains` decides: all backbones, the first one, or none. In two cases it is at
        least the first one: if the run uses auxiliaries of MetaDD; or if the recipe has a section `metadd`, and the
        evaluation needs labels of experts but the recipe names no teacher.
        """
        if cls.trains == "all":
            return config.each_backbone()
        scored = config.evaluate
        teaches = config.metadd is not None and scored.teacher is None and (scored.labels != "own" or scored.fair)
        return config.each_backbone()[:1] if config.meta_network_count or teaches or cls.trains == "first" else []

    @classmethod
    def epochs_read(cls, config: RunConfig) -> Sequence[int]:
        """Numbers of the epochs that a run reads of each backbone's experts.

        By default this is the last epoch with the class attribute `reads_last_epoch`, otherwise all stored epochs.
        """
        return (config.experts.epochs,) if cls.reads_last_epoch else config.kept_epochs

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise a `ConfigError` for a recipe that the method cannot distil."""
        if cls.batch_norm == "always":
            config.require_batch_norm()
        elif cls.batch_norm == "never":
            config.require_matchable()
        for name in config.distill.options.keys() - cls.options.keys():
            raise ConfigError(
                f"distill.options has {name!r}, which method {config.method} does not read",
                remedy=f"it reads {', '.join(cls.options)}" if cls.options else "leave it out",
            )
        for name, value in config.distill.options.items():
            kind = _kind_of(cls.options[name])
            if _kind_of(value) != kind:
                raise ConfigError(f"distill.options.{name} is {value!r}", remedy=f"give {kind}")
        if config.backbones and not cls.reads_backbones:
            raise ConfigError(
                f"backbones has further networks, and method {config.method} computes one",
                remedy="leave them out, or set reads_backbones in its class",
            )
        if (
            config.distill.initial == "crops"
            and not cls.starts_from_crops
            and "initial" in keys_read_of_distill(config.method)
        ):
            raise ConfigError(
                f"distill.initial is 'crops', and method {config.method} starts from whole images or noise",
                remedy="use correct, random or noise; sre2l can start from crops",
            )
        if config.cluster.precision not in cls.precisions:
            raise ConfigError(
                f"cluster.precision is {config.cluster.precision!r}, which method {config.method} does not follow",
                remedy=f"use --set cluster.precision={cls.precisions[0]}",
            )
        if config.workers_per_set > 1 and cls.pieces(config, 1):
            asked = {key: value for key, value in ALONE.items() if getattr(config.cluster, key) != value}
            usual = " ".join(f"--set cluster.{key}={str(value).lower()}" for key, value in asked.items())
            raise ConfigError(
                f"several workers for a set are asked for by {' and '.join(f'cluster.{key}' for key in asked)}",
                f"method {config.method} makes a set in pieces, and one worker holds all networks of its piece",
                f"use {usual}; all workers take pieces",
            )
        if config.metadd is not None and not cls.iterations(config):
            raise ConfigError(
                f"metadd changes images, and method {config.method} leaves them as they are",
                remedy="leave out the metadd section, or choose another method",
            )
        if config.prior is not None and not cls.iterations(config):
            raise ConfigError(
                f"prior is set, and method {config.method} learns no images", remedy="use --set prior=null"
            )
        if config.evaluate.fair and not cls.trained_backbones(config):
            raise ConfigError(
                "evaluate.fair compares with random images under the labels of experts, and the run trains none",
                f"method {config.method} needs no experts",
                "leave out --fair (evaluate.fair)",
            )

    @classmethod
    def check_images(cls, config: RunConfig, images: RawDataset) -> None:
        """Raise a `DatmError` for images that the method cannot distil. By default all images are accepted.

        The caller has checked that each class has at least `distill.ipc` training images.
        """

    @classmethod
    def has_soft_labels(cls, config: RunConfig) -> bool:
        """True if the set's labels may be soft; False if every label is its image's class.

        By default True if the class attribute `soft_labels` is True and the recipe does not ask for hard labels.
        """
        return cls.soft_labels and config.distill.has_soft_labels

    @classmethod
    def has_step_size(cls, config: RunConfig) -> bool:
        """True if networks train on the set with its own step size; False if one is chosen on validation images.

        The default is the value of `gives_step_size`.
        """
        return cls.gives_step_size

    @classmethod
    def resolved(cls, config: RunConfig, raw: RawDataset | None = None, made: RunConfig | None = None) -> RunConfig:
        """Copy of a run, completed by facts from files that only the method reads, such as a finished set's step size.

        By default the run is returned unchanged.

        Args:
            config: the run, resolved for its images' size.
            raw: real images of the run; `None` for a plan, which may have neither the images nor the files.
            made: configuration with which the run's set was made; `None` if there is no set yet.
        """
        return config

    @classmethod
    def iterations(cls, config: RunConfig) -> int:
        """Number of updates of the set.

        If the number is 0, the set before the first iteration is the result, and `calibrate` and `step` are not called.
        By default it is `distill.iterations`, or 0 without `has_iterations`.
        """
        return config.distill.iterations if cls.has_iterations else 0

    @classmethod
    def pieces(cls, config: RunConfig, classes: int) -> Sequence[Piece]:
        """Pieces in which the set is made, each by one worker; empty if all workers make the set together.

        The pieces must not depend on the number of workers.
        """
        return ()

    @classmethod
    def demand(cls, config: RunConfig, classes: int, shards: int, cost: ImageCost) -> Demand:
        """Work and memory of an iteration, for the worker with the most classes.

        By default, each of the worker's synthetic images passes the network once, forward and back.

        Args:
            config: the recipe.
            classes: number of classes of the data.
            shards: number of workers among which the classes are divided.
            cost: cost of one image in the network.
        """
        held = config.distill.ipc * -(-classes // shards)
        return Demand({"training": held}, at_once=held, maps=2, vectors=2)

    @classmethod
    def choosing(cls, config: RunConfig, classes: int, training_images: int) -> Mapping[str, float]:
        """Work of choosing the first set (the images and labels before any iteration), for plans.

        Returns kind of work (a key of `Demand.passes`) -> number of images that pass the recipe's `network`. The key
        "reading" has the number of real images that are read.

        Args:
            training_images: number of training images, without validation images.
        """
        settings, passes, read = config.distill, 0, int(config.distill.initial != "noise")
        if cls.trained_backbones(config):
            read += 2 * (settings.initial == "correct")  # two candidates for each chosen image
            passes = config.experts.count * cls.has_soft_labels(config) + 2 * (settings.initial == "correct")
        return {"scoring": passes * settings.ipc * classes, "reading": read * settings.ipc * classes}

    @classmethod
    def described(cls, config: RunConfig, images: int, chunk: int) -> str:
        """Text for plans: what a distillation computes.

        Args:
            images: number of images of the set.
            chunk: number of images of a micro-batch.
        """
        return f"{config.distill.iterations:,} updates of {images:,} images, in micro-batches of {chunk:,}"

    @classmethod
    def outlook(cls, config: RunConfig, training_images: int) -> Outlook | None:
        """Forecast for a recipe before the run starts, such as how far experts move; `None` if the method has none.

        Args:
            training_images: number of training images, without validation images.
        """
        return None

    def __init__(self, part: Part) -> None:
        self.part = part
        self._rows = dict[int, NDArray[np.int64]]()
        if part.config.distill.learning_rate_images is None:
            self.calibration = "measuring the first loss"

    @property
    def piece(self) -> Piece:
        """Piece (some images of some classes) that this worker makes. Only for methods that make sets in `pieces`."""
        assert self.part.piece is not None
        return self.part.piece

    @cached_property
    def experts(self) -> Sequence[ExpertNetworks]:
        """Experts of each backbone in `trained_backbones`, in this order.

        Raises:
            MissingExpertsError: the store lacks experts.
        """
        part = self.part
        if part.experts is not None:
            return part.experts
        trained = self.trained_backbones(part.config)
        return [ExpertNetworks(each, part.dataset, part.store_uri, part.device) for each in trained]

    def choose(self) -> Generator[None, None, SyntheticSet]:
        """Choose the first set: this worker's images and labels, before any iteration. Returns the set.

        Yields between steps, so that the caller can send heartbeats.
        """
        yield
        found = self.first_set()
        return found if isinstance(found, SyntheticSet) else (yield from found)

    def first_set(self) -> SyntheticSet | Steps[SyntheticSet]:
        """Make the set before any iteration, for `choose`. Returns the set, or a generator that returns it."""
        return first_set(self.part, None, self.part.config.distill.initial_step_size or STEP_SIZE)

    def hard_labelled(self, images: Tensor, labels: Tensor) -> SyntheticSet:
        """Set of images [n c h w] with hard labels of their classes [n], and the recipe's step size or `STEP_SIZE`."""
        part = self.part
        step_sizes = torch.full((1,), part.config.distill.initial_step_size or STEP_SIZE, device=part.device)
        hard = hard_logits(labels, part.dataset.classes)
        return SyntheticSet(images.to(part.device), hard, step_sizes, labels)

    def prepare(self, heartbeat: Heartbeat) -> None:
        """Do slow work once before the first iteration, such as compiling. By default there is none.

        Args:
            heartbeat: function to call after each part of the work.
        """

    def calibrate(self, state: Any) -> Iterator[str]:
        """Find values that the recipe leaves open, before the first iteration of a new set. Yields messages.

        By default this is the images' learning rate, which goes into `state`.

        Raises:
            DatmError: the set would learn nothing.
        """
        if self.part.config.distill.learning_rate_images is None:
            share = self.share_of_images(state.movement(self._gradient(state)[1]), state.synthetic.images)
            if not share:
                raise ConfigError("the loss has no gradient in the images", remedy="give distill.learning_rate_images")
            state.image_rate = FIRST_MOVE / share
            yield rate_found(state)

    def share_of_images(self, gradient: Tensor, images: Tensor) -> float:
        """Euclidean norm of a gradient or a movement of images, divided by the norm of the images, over all workers.

        Args:
            gradient: [n c h w] this worker's part of the gradient; the parts of all backbones are added.
            images: [n c h w] the images that this worker holds.
        """
        mesh = self.part.mesh
        squares = [each.double().square().sum() for each in (mesh.sum_over_backbones(gradient), images)]
        of_gradient, of_images = mesh.sum_over_classes(torch.stack(squares)).sqrt().tolist()
        return float(of_gradient / of_images)

    def option(self, name: str) -> Any:
        """Value of one of the method's own settings: from `distill.options`, or the default in `options`.

        The value has the same kind as the default: a number, a text, True or False.
        """
        return self.part.config.distill.options.get(name, self.options[name])

    def fresh_network(self, iteration: int, backbone: int = 0) -> nn.Module:
        """Network of a backbone with random parameters, drawn for each iteration. Every shard gets the same network."""
        part = self.part
        config, dataset = part.config.each_backbone()[backbone], part.dataset
        spec = config.network.for_images(dataset.channels, dataset.size, dataset.classes)
        seed = derive_seed(config.seed, Purpose.FRESH_NETWORK, backbone, iteration)
        return build_network(spec, seed).to(part.device)

    def real_images(self, label: int, count: int, iteration: int) -> Tensor:
        """Draw `count` training images [m c h w] of a class for an iteration, each at most once; all if fewer exist."""
        drawn = draw_rows(self._rows_of(label), count, self.part.config.seed, iteration, label)
        return torch.from_numpy(self.part.dataset.train_images[drawn]).to(self.part.device)

    def augmented(self, label: int, iteration: int, *batches: Tensor) -> list[Tensor]:
        """Augment batches [b c h w], such as real and synthetic images of a class, by one and the same draw.

        One of the augmentations in `distill.augmentation`, and its parameters, are drawn for the class and iteration.
        Both are equal for all images of all batches (siamese). Differentiable in the images.
        """
        drawn = draw_shared(self.part.config.distill.augmentation, self.part.config.seed, iteration, label)
        return [augment(batch, repeated(drawn, len(batch))) for batch in batches]

    def augmentations(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], iteration: int
    ) -> Sequence[Augmentation]:
        """For each of some images, the augmentation under which the method sees it in an iteration.

        MetaDD's networks see the images under the same augmentation if `metadd.augmented` is set. Every worker that
        holds the images gets the same values. By default, if the method sets `augments`, these are the draws of
        `augmented` for the images' classes.

        Args:
            rows: [b] indices of the images among those that the worker holds.
            labels: [b] classes of the images.
            iteration: number of iterations done.

        Returns:
            [b] augmentations of one sample each; empty if the method does not augment its images.
        """
        strategy, classes = self.part.config.distill.augmentation, labels.tolist()
        if not (self.augments and strategy):
            return ()
        drawn = {each: draw_shared(strategy, self.part.config.seed, iteration, each) for each in set(classes)}
        return [drawn[each] for each in classes]

    def _rows_of(self, label: int) -> NDArray[np.int64]:
        if label not in self._rows:
            self._rows[label] = np.flatnonzero(self.part.dataset.train_labels == label)
        return self._rows[label]

    def gradient(self, synthetic: SyntheticSet, iteration: int, all_sum: AllSum) -> tuple[Tensor, Tensor]:
        """Compute this worker's part of the loss, and the gradient of this part with respect to the worker's images.

        The loss [] is that of the worker's classes and networks. The caller adds it over all workers. It adds the
        gradient [n c h w] over workers that hold the same images and compute other networks.

        Args:
            synthetic: images and labels of the set that the worker holds, class by class.
            iteration: number of iterations done; random draws depend on it and on `config.seed` alone.
            all_sum: adds a tensor over the workers of all classes.
        """
        raise NotImplementedError

    def _gradient(self, state: State[Any]) -> tuple[Tensor, Tensor]:
        """Loss [] of this worker's images and backbones, and the loss's gradient [n c h w] with respect to the images.

        Both are zeros if the worker computes no backbone. Returns once the workers of other backbones are done, too.
        """
        images = state.synthetic.images
        found = images.new_zeros(()), torch.zeros_like(images)

        def compute(all_sum: AllSum) -> None:
            nonlocal found
            if self.part.role.backbones:
                found = self.gradient(state.synthetic, state.iteration, all_sum)

        self.part.mesh.in_rows(compute)
        return found

    def step(self, state: Any, meta: MetaTerm | None) -> None:
        """Run one iteration together with the other workers of the mesh.

        Args:
            state: state of the distillation, changed in place.
            meta: MetaDD's term; `None` without MetaDD.

        Raises:
            DivergenceError: too many updates in a row were skipped because a value was not finite.
        """
        mesh = self.part.mesh
        state.step(
            lambda: self._gradient(state),
            meta=meta,
            all_sum=mesh.sum_over_classes,
            sum_over_backbones=mesh.sum_over_backbones,
        )

    def measured(self, state: Any) -> Mapping[str, float]:
        """Measurements of the last iteration, and counts so far: suffix of a metric name, `matching_loss` -> value."""
        return {"matching_loss": state.history[-1].loss, "skipped_steps": state.skipped}

    def shown(self, state: Any) -> Mapping[str, float]:
        """Values of the last iteration to show beside the progress bar: name -> value."""
        return {"loss": state.history[-1].loss}

    def counts(self, state: Any) -> Mapping[str, int]:
        """Counts that describe the finished distillation: name, such as "skipped" -> number."""
        return {"skipped": state.skipped}

    def images_seen(self) -> float:
        """Number of images that all networks of all workers see in one iteration, on average."""
        part = self.part
        cost = ImageCost(0, 0, 0, 0, 0)
        return len(part.config.weights) * sum(self.demand(part.config, part.dataset.classes, 1, cost).passes.values())

    def warnings(self, state: Any) -> Iterator[str]:
        """Messages after the last iteration. By default there is one if over a quarter of the updates was skipped."""
        if 4 * state.skipped > state.iteration:
            skipped = often(state.skipped, state.iteration, "update", "skipped because a value was not finite")
            yield f"{skipped}: lower {state.rate_key}"

    def close(self) -> None:
        """Release files and threads."""


def often(count: int, of: int, noun: str, what: str) -> str:
    """Begin a warning about something that happened in many iterations, such as "3 of 8 updates were skipped".

    Args:
        count: how often it happened.
        of: in how many cases it could have happened.
        noun: what a case is, such as "update".
        what: what happened, such as "skipped".
    """
    return f"{count} of {counted(of, noun)} {'was' if count == 1 else 'were'} {what}"


def rate_found(state: Any) -> str:
    """Message about the learning rate of the images that `Method.calibrate` has found."""
    found = f"distill.learning_rate_images {state.image_rate:.3g} found"
    return f"{found}: the first update moves pixels by {FIRST_MOVE:.0%} of their root mean square"


def _kind_of(value: bool | float | str) -> str:
    if isinstance(value, bool):
        return "true or false"
    return "a text" if isinstance(value, str) else "a number"
