"""Training of the networks whose test accuracies score a set of images, and their accuracy.

Whole batches are augmented on the network's device; there is no per-sample loader. Shapes: n images, k classes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

from datm_ray.config import EvaluateConfig, ExpertConfig, OptimiserName
from datm_ray.config.identity import SCORING_KEYS
from datm_ray.core.images.augment import augment, draw_augmentation, parse_strategy
from datm_ray.core.images.batches import Images, batches, rows_on
from datm_ray.core.networks.image_cost import ImageCost, image_cost
from datm_ray.core.networks.parameters import flatten, flatten_buffers, unflatten_buffers_into, unflatten_into
from datm_ray.core.networks.stack_trial import InParts, StackStep, fitting, found_at_a_time, is_tried
from datm_ray.core.networks.stacked import CACHED_MAP_BYTES, LARGEST_STACK, StackFunctions, can_be_stacked
from datm_ray.core.steps import Steps, result_of
from datm_ray.core.training.experts import ExpertState, stack_steps
from datm_ray.core.training.rates import share_of_rate
from datm_ray.core.training.teacher import Lessons, divergence
from datm_ray.errors import ConfigError

Heartbeat = Callable[[], None]
"""Heartbeat callback, called regularly during long work, so that workers that wait for its end know it is running."""


SCORING_BATCH = 250
"""Default number of images that a network classifies at a time. A thousand of 64x64 would take 4 GB of memory."""


def no_heartbeat() -> None:
    """Do nothing: the heartbeat callback of work for which no other worker waits."""


@dataclass(frozen=True)
class Optimiser:
    """An optimiser that can train scored networks. The step size that a synthetic set learns is only for SGD."""

    title: str
    """Name in reports; "" for SGD, the usual one, which reports do not name."""
    kind: Callable[..., torch.optim.Optimizer]
    """Makes torch's optimizer from parameters of a network, the learning rate `lr`, and the values of `settings`."""
    settings: tuple[str, ...]
    """Names of fields of `Schedule` whose values are arguments of `kind` of the same name, beside the learning rate."""
    vectors: tuple[str, ...]
    """Names of the tensors that torch's optimizer keeps for a parameter, in the parameter's shape, such as momentum."""
    step_sizes: tuple[float, ...]
    """Learning rates to try if neither the recipe nor the set gives one; accuracy on validation images decides."""
    weight_decay: float | None = None
    """Weight decay if the recipe gives none; `None` for that of the schedule."""


OPTIMISERS: dict[OptimiserName, Optimiser] = {
    "sgd": Optimiser(
        title="",
        kind=torch.optim.SGD,
        settings=("momentum", "weight_decay"),
        vectors=("momentum_buffer",),
        step_sizes=(0.01, 0.03, 0.1),
    ),
    "adamw": Optimiser(
        title="AdamW",
        kind=torch.optim.AdamW,
        settings=("weight_decay",),
        vectors=("exp_avg", "exp_avg_sq"),
        step_sizes=(3e-4, 1e-3, 3e-3),
        weight_decay=0.05,  # a usual value for transformers
    ),
}
"""Value of `evaluate.optimiser` -> the optimiser."""


@dataclass(frozen=True)
class Schedule:
    """Training schedule of a scored network. The learning rate may fall, once or along a cosine."""

    epochs: int
    """Number of passes over the images."""
    batch_size: int
    """Images per step. The last batch of an epoch may be smaller; it is not dropped."""
    learning_rate: float
    """Highest learning rate of the training; `decay_epoch`, `cosine` and `warmup_epochs` lower it."""
    momentum: float = 0.0
    """SGD's momentum; 0 for none."""
    weight_decay: float = 0.0
    """Factor of the L2 penalty on the parameters; with adamw, of the decoupled weight decay."""
    augmentation: str = ""
    """Augmentation strategy such as "crop_flip": each batch gets one of its operations; "" for none."""
    decay_epoch: int | None = None
    """Number of the epoch, from 0, at whose start the learning rate is divided by ten and momentum (or AdamW's moments)
    set to 0, as published; `None` if neither happens."""
    optimiser: OptimiserName = "sgd"
    """Update rule, a key of `OPTIMISERS`. adamw ignores `momentum`; its decays of the two moments are 0.9 and 0.999."""
    cosine: bool = False
    """True if the learning rate falls to 0 along a cosine, step by step."""
    warmup_epochs: int = 0
    """Number of first epochs in which the learning rate grows linearly from a hundredth, step by step; 0 for none."""
    temperature: float | None = None
    """Divisor of all logits if a teacher's logits replace the set's labels; `None` without a teacher. Only recorded
    here: training reads the temperature of its `lessons`."""
    micro_batch: int | None = None
    """Largest number of images in one forward and backward pass of a step; `None` for all images of the step.

    Gradients are summed over the passes, so the step is the same, unless the network has batch statistics."""

    def to_json(self) -> dict[str, Any]:
        """Fields as plain data for JSON. `micro_batch` is left out if it is `None`, as earlier versions lacked it."""
        content = dataclasses.asdict(self)
        return content if self.micro_batch else {name: each for name, each in content.items() if name != "micro_batch"}

    @classmethod
    def from_json(cls, content: object) -> Schedule:
        """Restore a schedule from the result of `to_json`. Fields that an earlier version lacked get their defaults.

        Raises:
            ValueError: a field is missing, unknown, of another type or outside its range.
            ConfigError: the augmentation names an operation that does not exist.
        """
        kinds = get_type_hints(cls)
        needed = {each.name for each in dataclasses.fields(cls) if each.default is dataclasses.MISSING}
        if not isinstance(content, dict) or not needed <= content.keys() <= kinds.keys():
            raise ValueError("it has other fields than a schedule")
        wrong = [name for name, value in content.items() if not _is_of(kinds[name], value)]
        if not wrong:
            schedule = cls(**content)
            wrong = schedule._out_of_range()
            parse_strategy(schedule.augmentation)
        if wrong:
            raise ValueError(f"wrong {', '.join(wrong)}")
        return schedule

    def _out_of_range(self) -> list[str]:
        """Names of the fields whose numbers are outside their range."""
        positive = ("epochs", "batch_size", "learning_rate", "temperature", "micro_batch")
        others = ("momentum", "weight_decay", "decay_epoch", "warmup_epochs")
        values = {name: value for name in positive + others if (value := getattr(self, name)) is not None}
        wrong = [name for name, each in values.items() if not 0 <= each < math.inf or (name in positive and not each)]
        return wrong + ["warmup_epochs"] * (self.warmup_epochs >= self.epochs)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Make torch's optimizer for a network's parameters, at the schedule's highest learning rate."""
        rule = OPTIMISERS[self.optimiser]
        settings = {name: getattr(self, name) for name in rule.settings}
        return rule.kind(network.parameters(), lr=self.learning_rate, **settings)

    def with_optimiser(self, name: OptimiserName, weight_decay: float | None = None) -> Schedule:
        """Copy of the schedule with the optimiser `name` and a weight decay.

        If `weight_decay` is `None`, it is that of `OPTIMISERS` or, if that is `None` too, that of this schedule.
        """
        decays = (weight_decay, OPTIMISERS[name].weight_decay, self.weight_decay)
        decay = next(each for each in decays if each is not None)
        return dataclasses.replace(self, optimiser=name, weight_decay=decay)

    def rate(self, step: int, steps_per_epoch: int = 1) -> float:
        """Learning rate of step number `step`, from 0, over all epochs; of epoch `step` if `steps_per_epoch` is 1."""
        is_late = self.decay_epoch is not None and step >= self.decay_epoch * steps_per_epoch
        rate = self.learning_rate / 10 if is_late else self.learning_rate
        steps, warmup = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        return rate * share_of_rate(step, steps, warmup, cosine=self.cosine)

    def batches(self, loader: DataLoader[Any], optimizer: torch.optim.Optimizer, epoch: int) -> Iterator[Any]:
        """Yield a loader's batches for one epoch. Before each batch, set the schedule's learning rate for this step.

        At the start of `decay_epoch` the optimizer's momentum (or AdamW's moments) is set to 0.

        Args:
            loader: gives the batches of an epoch, `batch_size` images each.
            optimizer: optimizer that the caller steps once for each batch; all its groups get the learning rate.
            epoch: number of the epoch, from 0. The caller must go through the epochs in order.
        """
        if epoch == self.decay_epoch:
            optimizer.state.clear()
        for step, batch in enumerate(loader, epoch * len(loader)):
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step, len(loader))
            yield batch

    def augment(self, images: Tensor) -> Tensor:
        """Augment a batch [b c h w] with one operation of `augmentation`, drawn by torch's global random generator.

        An operation that does not exist raises a `ConfigError`.
        """
        random = np.random.default_rng(int(torch.randint(2**62, ())))
        return augment(images, draw_augmentation(self.augmentation, len(images), random))


def _is_of(kind: Any, value: object) -> bool:
    """True if a value read from JSON has the type `kind` of a field, which may be a union or a choice of literals."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or (type(value) is int and float in kinds)


PROTOCOLS: dict[str, Schedule] = {
    "published": Schedule(1001, 128, 0.01, momentum=0.9, weight_decay=5e-4, decay_epoch=502),
    "short": Schedule(500, 128, 0.01, momentum=0.9, weight_decay=5e-4, decay_epoch=251),
    "brief": Schedule(200, 128, 0.01, momentum=0.9, weight_decay=5e-4, decay_epoch=101),
    "quick": Schedule(20, 128, 0.01, momentum=0.9, weight_decay=5e-4, decay_epoch=11),
}
"""Value of `evaluate.protocol` -> training schedule. Other keys of `evaluate` then replace values of the schedule."""


def scoring_schedule(settings: EvaluateConfig, learning_rate: float) -> Schedule:
    """Training schedule of scored networks: the schedule of `evaluate.protocol`, changed by other keys of `evaluate`.

    The keys of optimiser and teacher are not read; `schedule_of` reads them too.

    Args:
        settings: section `evaluate` of the recipe.
        learning_rate: highest learning rate.

    Raises:
        ConfigError: the warm-up takes all epochs.
    """
    protocol, is_cosine = PROTOCOLS[settings.protocol], settings.schedule == "cosine"
    epochs = settings.epochs or protocol.epochs
    halfway = next((each.decay_epoch for each in PROTOCOLS.values() if each.epochs == epochs), epochs // 2 + 1)
    if settings.warmup_epochs >= epochs:
        raise ConfigError(
            f"evaluate.warmup_epochs is {settings.warmup_epochs}, and there are {epochs} epochs in all",
            remedy="lower it, or raise evaluate.epochs",
        )
    return dataclasses.replace(
        protocol,
        epochs=epochs,
        batch_size=settings.batch_size or protocol.batch_size,
        learning_rate=learning_rate,
        weight_decay=protocol.weight_decay if settings.weight_decay is None else settings.weight_decay,
        augmentation=settings.augmentation,
        decay_epoch=None if is_cosine else halfway,
        cosine=is_cosine,
        warmup_epochs=settings.warmup_epochs,
        micro_batch=settings.micro_batch,
    )


def schedule_of(scored: Mapping[str, Any], learning_rate: float) -> Schedule:
    """Schedule, with optimiser and teacher's temperature, that a recipe's section `evaluate` describes.

    `scored` is the section as plain data; missing keys get their defaults. `learning_rate` is the highest. A warm-up
    that takes all epochs raises a `ConfigError`.
    """
    known = {key: scored[key] for key in SCORING_KEYS if key in scored}
    name, augmentation = scored.get("protocol", "published"), scored.get("augmentation", "")
    settings = EvaluateConfig.model_construct(protocol=name, augmentation=augmentation, **known)
    schedule = scoring_schedule(settings, learning_rate)
    if settings.has_teacher:
        schedule = dataclasses.replace(schedule, temperature=settings.temperature)
    return schedule.with_optimiser(scored.get("optimiser", "sgd"), settings.weight_decay)


def validation_protocol(evaluation: str) -> str:
    """Protocol for validating sets that are scored by protocol `evaluation`: "short" for "published", else the same."""
    return "short" if evaluation == "published" else evaluation


class NetworkState:
    """State of one network in training: parameters [1 p], buffers [1 q], optimizer. Reading a vector copies it."""

    def __init__(self, network: nn.Module, schedule: Schedule, saved: TrainingState | None = None) -> None:
        """Start a training, or resume it.

        Args:
            network: network to train; it gets the saved parameters and buffers.
            schedule: schedule of the training.
            saved: state after an epoch of the same training; `None` to start.
        """
        self.network, self._schedule, self._rule = network, schedule, OPTIMISERS[schedule.optimiser]
        self.epoch: int = saved.epoch if saved else 0
        self.step: int = saved.step if saved else 0
        self.start_anew()
        if saved:
            parameters = list(network.parameters())
            pieces = saved.parameters[0].split([each.numel() for each in parameters])
            for each, piece in zip(parameters, pieces, strict=True):
                each.data.copy_(piece.view_as(each))  # in place, since a new tensor's alignment may change sums
            unflatten_buffers_into(network, saved.buffers[0])
            if saved.velocity is not None:
                self._restore(saved.velocity[0])

    def start_anew(self) -> None:
        """Replace the optimizer by a new one, whose momentum (or AdamW's moments) is 0. The network stays as it is."""
        self.optimizer = self._schedule.optimizer(self.network)

    @property
    def parameters(self) -> Tensor:
        """Copy of the parameters [1 p]."""
        return flatten(self.network)[None]

    @property
    def buffers(self) -> Tensor:
        """Copy of the buffers [1 q]."""
        return flatten_buffers(self.network)[None]

    @property
    def velocity(self) -> Tensor | None:
        """Copy of momentum [1 p], or AdamW's two moments [1 2p]; `None` without momentum or before the first step."""
        states = [self.optimizer.state[each] for each in self.network.parameters()]
        pieces = [state[name] for name in self._rule.vectors for state in states if state.get(name) is not None]
        return torch.cat([piece.reshape(-1) for piece in pieces])[None] if pieces else None

    def _restore(self, vectors: Tensor) -> None:
        decay = self._schedule.decay_epoch
        anew_at = decay * (self.step // self.epoch) if decay is not None and self.epoch >= decay else 0
        parameters = list(self.network.parameters())
        pieces = iter(vectors.split([each.numel() for each in parameters] * len(self._rule.vectors)))
        for name in self._rule.vectors:
            for each in parameters:
                self.optimizer.state[each][name] = torch.empty_like(each).copy_(next(pieces).view_as(each))
        for each in parameters:
            self.optimizer.state[each]["step"] = torch.tensor(float(self.step - anew_at))  # torch's SGD reads none


TrainingState = ExpertState | NetworkState
"""State of one network (`NetworkState`), or of several trained together: all that the next step depends on."""


@dataclass(frozen=True)
class Training:
    """One network to train, on images of its own."""

    network: nn.Module
    """Network, which is trained in place."""
    images: Images
    """[n c h w] images, normalised; must be a tensor if a teacher labels them (`lessons` of `train_steps`)."""
    targets: Tensor
    """[n] int64 classes, or [n k] logits of soft labels; not read if a teacher labels the images (`lessons` of
    `train_steps`)."""
    schedule: Schedule
    seed: int
    """Seed of order, augmentation and CutMix."""


def train_steps(
    training: Training, lessons: Lessons | None = None, saved: TrainingState | None = None
) -> Iterator[NetworkState | None]:
    """Train a network in place, step by step. Yields the state after an epoch's last step, otherwise `None`.

    Args:
        training: the network, its images and targets, and how it is trained.
        lessons: a teacher's images and logits for every step; `None` trains on the targets.
        saved: state after an epoch of an earlier, equal training, to resume from; `None` to start.
    """
    network, images, targets, schedule = training.network, training.images, training.targets, training.schedule
    if targets.is_floating_point():
        targets = targets.softmax(dim=1)
    steps_per_epoch = -(-len(images) // schedule.batch_size)
    state = NetworkState(network, schedule, saved)
    del saved  # frees up to three vectors as long as the parameters
    network.train()
    epochs, size, augmentation = range(state.epoch, schedule.epochs), schedule.batch_size, schedule.augmentation
    if lessons is None:
        steps = batches([images], [targets], [training.seed], epochs, size, augmentation)
    else:
        assert isinstance(images, Tensor)  # sets as small as a synthetic one are never streamed
        steps = lessons.batches(images, training.seed, epochs, size, augmentation)
    for epoch, is_last, x, y in steps:
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.rate(state.step, steps_per_epoch)
        state.optimizer.zero_grad(set_to_none=True)
        _differentiate(network, x[0], y[0], lessons, schedule.micro_batch)
        state.optimizer.step()
        state.step += 1
        if is_last:
            state.epoch = epoch + 1
            if state.epoch == schedule.decay_epoch:
                state.start_anew()
        yield state if is_last else None


def _differentiate(
    network: nn.Module, images: Tensor, wanted: Tensor, lessons: Lessons | None, micro_batch: int | None
) -> None:
    """Add the gradient of a batch's mean loss to the parameters' `grad`.

    Args:
        images: [b c h w] images of the batch.
        wanted: [b] classes, or [b k] probabilities; a teacher's logits [b k] if there are lessons.
        lessons: give the temperature of the loss against a teacher; `None` for the cross-entropy.
        micro_batch: largest number of images that are computed at a time; all parts of the batch are nearly equal.
            `None` for the whole batch.
    """
    parts = -(-len(images) // (micro_batch or len(images)))
    for own, targets in zip(images.tensor_split(parts), wanted.tensor_split(parts), strict=True):
        logits = network(own)
        loss = cross_entropy(logits, targets) if lessons is None else divergence(logits, targets, lessons.temperature)
        if len(own) < len(images):
            loss = loss * (len(own) / len(images))
        loss.backward()


STEP_OVERHEAD = 3e7
"""Fixed cost of a training step on a CPU core, in floating-point operations of a forward pass that take equally long.

The cost is one millisecond, at 3e10 operations a second. Measured with `make bench-evaluate`: 1.0 ms a step for 10
digits, and 3.7e10 operations a second and core for 10 images of 32x32."""
COMPILED_WORK = 3e11
"""Smallest total of floating-point operations of forward passes for which a CPU trains networks together. The total is
over all trainings of a run that can use the same compiled step.

One CPU core takes about ten seconds for this work if networks are trained one after another. Training five networks
together saves six to seven of these seconds, and compiling takes as long. `make bench-evaluate` found both ways equally
fast at 3.1e11 operations (digits, 1 image per class) and at 2.6e11 (10 images per class)."""
COMPILED_STEPS = 15_000
"""Smallest total of steps for which a GPU trains networks together. The total is over all trainings of a run that can
use the same compiled step.

On a GPU a step of one network takes as long as launching its kernels. Assumed: two milliseconds saved in each step, and
half a minute to compile. `make gpu` measures from how many steps this pays."""
WIDE_MAP_BYTES = 3 * 2**20
"""Size in bytes of a network's largest feature map, for a batch, above which one network keeps a CPU busy. Networks are
then trained one after another, unless the map reaches `CACHED_MAP_BYTES`.

Measured for images of 32x32 on two cores, as time of five networks one after another divided by their time together
(benchmarks/LOG.md): map of 2.6 MB: 1.7; 5.2 MB: 0.86; 10.5 MB: 0.9 to 1.2; 52 MB, far beyond the cache: 1.8."""


def work_of_training(schedule: Schedule, images: int, flop: float) -> float:
    """Expected work of training one network: floating-point operations of all its forward passes.

    Backward passes are not counted. Each step adds `STEP_OVERHEAD` operations for its fixed cost.

    Args:
        schedule: schedule of the training.
        images: number of images that the network is trained on.
        flop: floating-point operations of one image's forward pass.
    """
    return schedule.epochs * (images * flop + -(-images // schedule.batch_size) * STEP_OVERHEAD)


def would_gain_together(
    cost: Callable[[], ImageCost],
    networks: int,
    count: int,
    schedule: Schedule,
    *,
    on_gpu: bool = False,
    alike: int = 0,
) -> bool:
    """True if training several networks of one kind together would be faster than one after another.

    Assumes that the network can be stacked, that torch.compile works, and that no teacher gives the labels. `Trainer`
    checks these conditions. False for other optimisers than SGD, and if micro-batches divide the steps. Compiling must
    take less time than it saves in all trainings with the same step.

    Args:
        cost: function that returns the cost of one image in a network; not called if the other arguments decide.
        networks: number of networks.
        count: number of images that each network is trained on.
        on_gpu: True if a GPU trains them.
        alike: number of networks in all tasks of the run that the same compiled step can train, including these
            `networks`; 0 if not known.
    """
    every, is_divided = max(networks, alike), 0 < (schedule.micro_batch or 0) < min(schedule.batch_size, count)
    if networks == 1 or schedule.optimiser != "sgd" or is_divided:
        return False
    if on_gpu:
        return every * schedule.epochs * -(-count // schedule.batch_size) >= COMPILED_STEPS
    if WIDE_MAP_BYTES < min(schedule.batch_size, count) * cost().largest < CACHED_MAP_BYTES:
        return False
    return every * work_of_training(schedule, count, cost().flop) >= COMPILED_WORK


def stack_sizes(networks: int) -> list[int]:
    """Divide `networks` networks into groups (stacks) that are trained together. Returns the groups' sizes.

    Sizes are equal, because each size is compiled, if a size from 3 to `LARGEST_STACK` divides `networks`; otherwise
    they differ by at most 1. Each is at most `LARGEST_STACK`, and at least 2 unless there is only one network.
    """
    for size in range(min(networks, LARGEST_STACK), 2, -1):
        if networks % size == 0:
            return [size] * (networks // size)
    return [len(part) for part in np.array_split(np.arange(networks), -(-networks // LARGEST_STACK))]


class Trainer:
    """Trainer of several networks of one architecture, together if that is faster, otherwise one after another.

    Together means one compiled call for all networks of a group (stack) in every step. Each network has the same
    images, order and augmentation as in a training alone, and does not depend on the other networks. Only rounding
    differs. Without `compile_`, networks are never trained together.
    """

    def __init__(self, *, compile_: bool = True, channels_last: bool = True) -> None:
        self.note = ""
        """Reason why networks that should be trained together are not compiled; "" if there is none."""
        self._compile, self._channels_last = compile_, channels_last
        self._functions: dict[tuple[str, int], StackFunctions] = {}
        """Compiled functions, kept for all trainings: (result of `_kind_of`, number of networks) -> function."""
        self._at_a_time: dict[tuple[str, int, int], int] = {}
        """(Result of `_kind_of`, number of networks, images of a step) -> number of networks that one call computes."""

    def stacks(
        self, trainings: Sequence[Training], lessons: Lessons | None = None, alike: int = 0
    ) -> list[Sequence[Training]]:
        """Divide networks into groups that are trained together.

        Groups have one network each if this is faster, and if the networks cannot be stacked or compiled.

        Args:
            trainings: networks of one architecture and equally many images. Their schedules differ in the learning
                rate alone.
            lessons: a teacher's images and logits; networks with lessons are trained one after another.
            alike: number of networks in all tasks of the run that the same compiled step can train; 0 if not known.
        """
        first, sizes = trainings[0], [1] * len(trainings)
        count, *image = first.images.shape
        may_stack = self._compile and lessons is None and can_be_stacked(first.network)
        if may_stack and would_gain_together(
            functools.cache(lambda: image_cost(first.network, tuple(image))),
            len(trainings),
            count,
            first.schedule,
            on_gpu=is_tried(device_of(trainings[0].network)),
            alike=alike,
        ):
            self.note = self._functions_for(first, stack_sizes(len(trainings))[0]).note
            sizes = sizes if self.note else stack_sizes(len(trainings))
        ends = np.cumsum(sizes).tolist()
        return [trainings[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def at_a_time(self, stack: Sequence[Training], saved: int | None = None) -> int:
        """Number of networks of a stack (networks that are trained together) that one call computes.

        On a CPU one call computes all. On a GPU a trial on the first batch chooses the faster of two ways: one network
        in a call, or as many as fit into the GPU's memory. The trial is made once for every architecture, number of
        networks and batch size.

        Args:
            stack: one of the groups that `stacks` returned.
            saved: number that an earlier part of this training used. This number is used again, halved if it does not
                fit; `None` for a trial.

        Raises:
            torch.OutOfMemoryError: one network at a time was tried, and does not fit into the GPU's memory.
        """
        if len(stack) == 1 or not is_tried(device_of(stack[0].network)):
            return len(stack)
        key = (_kind_of(stack[0]), len(stack), _rows_of(stack))
        if key not in self._at_a_time or saved not in (None, self._at_a_time[key]):
            self._at_a_time[key] = self._tried(stack, saved)
        return self._at_a_time[key]

    def _tried(self, stack: Sequence[Training], saved: int | None) -> int:
        batch, step_of = _first_batch(stack), functools.cache(functools.partial(self._in_parts, stack[0]))
        if saved is not None:
            return found_at_a_time(step_of, batch, saved, None)
        cost = image_cost(stack[0].network, tuple(stack[0].images.shape[1:]))
        most = fitting(len(stack), _rows_of(stack), cost)
        return found_at_a_time(step_of, batch, most, device_of(stack[0].network))

    def _step_of(self, stack: Sequence[Training]) -> StackStep:
        """Function that computes losses and gradients of all networks of a stack in a training step.

        On a GPU the function owns CUDA graphs, which are freed with it.
        """
        if not is_tried(device_of(stack[0].network)):
            return self._functions_for(stack[0], len(stack))
        return self._in_parts(stack[0], self.at_a_time(stack))

    def _in_parts(self, training: Training, networks: int) -> InParts:
        return InParts(self._functions_for(training, networks), networks)

    def train_steps(
        self, stack: Sequence[Training], lessons: Lessons | None = None, saved: TrainingState | None = None
    ) -> Iterator[TrainingState | None]:
        """Train networks in place. Yields the state after every epoch, and `None` after every other step.

        The networks hold their trained parameters only after the last epoch.

        Args:
            stack: one of the groups that `stacks` returned.
            lessons: a teacher's images and logits for every step; must be `None` for several networks.
            saved: state after an epoch of an earlier, equal training, from which this one resumes; `None` to start. The
                trainer keeps no reference to it.
        """
        steps: Iterator[TrainingState | None]
        if len(stack) > 1:
            steps = together_steps(self._step_of(stack), stack, saved)
        else:
            steps = train_steps(stack[0], lessons, saved)
        del saved  # frees up to three vectors as long as the parameters
        yield from steps

    def train_all(self, trainings: Sequence[Training], alike: int = 0) -> Iterator[int]:
        """Train networks of one architecture in place, in the groups of `stacks`.

        Yields, after every step, the number of epochs done so far, summed over all networks.

        Args:
            trainings: networks with equally many images, whose schedules differ in the learning rate alone.
            alike: number of networks in all tasks of the run that the same compiled step can train; 0 if not known.
        """
        done = 0
        for stack in self.stacks(trainings, alike=alike):
            for state in self.train_steps(stack):
                done += 0 if state is None else len(stack)
                yield done

    def _functions_for(self, training: Training, size: int) -> StackFunctions:
        key = (_kind_of(training), size)
        if key not in self._functions:
            functions = StackFunctions(training.network, stacked=size, channels_last=self._channels_last)
            self._functions[key] = functions
        return self._functions[key]


def _kind_of(training: Training) -> str:
    """Text of everything that a compiled function and a trial depend on; trainings with equal texts share them.

    These are the network's layers, the shape of an image, the device, and whether algorithms are deterministic: a
    process may do some runs with and some without `cluster.deterministic`.
    """
    how = "deterministic" if torch.are_deterministic_algorithms_enabled() else "timed"
    return f"{training.network} {tuple(training.images.shape[1:])} {device_of(training.network)} {how}"


def _rows_of(stack: Sequence[Training]) -> int:
    """Number of images of each network in a full batch: the batch size, or all images if they are fewer."""
    return min(stack[0].schedule.batch_size, len(stack[0].images))


def _first_batch(stack: Sequence[Training]) -> tuple[Tensor, ...]:
    """Parameters [s p], buffers [s q], images [s b c h w], probabilities [s b k] and image weights [b] of s networks.

    They are the arguments of a step on each network's first b images.
    """
    state, rows = ExpertState.initial([each.network for each in stack]), torch.arange(_rows_of(stack))
    device = state.parameters.device
    images = torch.stack([rows_on(each.images, rows, device) for each in stack])
    labels = torch.stack([each[rows.to(device)] for each in _probabilities(stack)])
    return state.parameters, state.buffers, images, labels, state.parameters.new_full((len(rows),), 1 / len(rows))


def _probabilities(stack: Sequence[Training]) -> list[Tensor]:
    """Probabilities [n k] of each network's targets; networks with the same targets share a tensor."""
    network, device = stack[0].network, device_of(stack[0].network)
    classes = network(rows_on(stack[0].images, torch.arange(1), device)).shape[1]
    dtype, found = next(network.parameters()).dtype, dict[int, Tensor]()
    for targets in (each.targets for each in stack):
        if id(targets) not in found:
            is_soft = targets.is_floating_point()
            found[id(targets)] = targets.softmax(dim=1) if is_soft else one_hot(targets, classes).to(dtype)
    return [found[id(each.targets)] for each in stack]


@functools.cache
def trainer(*, compile_: bool, channels_last: bool) -> Trainer:
    """Return the process's only trainer with these settings, which keeps its compiled functions between calls.

    With `compile_` networks may be trained together. With `channels_last` the compiled functions keep feature maps with
    their channels innermost.
    """
    return Trainer(compile_=compile_, channels_last=channels_last)


def together_steps(
    functions: StackStep, stack: Sequence[Training], saved: TrainingState | None = None
) -> Iterator[ExpertState | None]:
    """Train several networks of one architecture in place by SGD, each as `train_steps` would alone.

    Yields the state after every epoch's last step, and `None` after every other step. The networks get their new
    parameters after the last epoch.

    Args:
        functions: computes the losses and gradients of all networks in each step.
        stack: networks with equally many images, whose schedules differ in the learning rate alone.
        saved: state after an epoch of an earlier, equal training, to resume from; `None` to start.
    """
    state, schedule = ExpertState.initial([each.network for each in stack]), stack[0].schedule
    if saved is not None:
        state = ExpertState(saved.parameters, saved.buffers, saved.velocity, saved.epoch, saved.step)
        del saved  # so that its vectors are freed by the first step
    images, probabilities = [each.images for each in stack], _probabilities(stack)
    seeds, decay = [each.seed for each in stack], schedule.decay_epoch
    for epochs in sorted({min(decay or schedule.epochs, schedule.epochs), schedule.epochs}):
        is_late = decay is not None and state.epoch >= decay
        if state.epoch == decay:
            state.velocity = None
        rates = [each.schedule.learning_rate / 10 if is_late else each.schedule.learning_rate for each in stack]
        settings = ExpertConfig(
            epochs=epochs,
            batch_size=schedule.batch_size,
            schedule="cosine" if schedule.cosine else "constant",
            warmup_epochs=schedule.warmup_epochs,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            augmentation=schedule.augmentation,
        )
        for losses in stack_steps(functions, images, probabilities, settings, seeds, state, rates):
            yield None if losses is None else state
    for each, parameters in zip(stack, state.parameters, strict=True):
        unflatten_into(each.network, parameters)


def device_of(network: nn.Module) -> torch.device:
    """Device of a network's parameters; the CPU if it has none."""
    return next((each.device for each in network.parameters()), torch.device("cpu"))


def predict_logits(network: nn.Module, images: Images, *, batch_size: int = SCORING_BATCH) -> Tensor:
    """Compute logits [n k] of images [n c h w] in evaluation mode, without derivatives, `batch_size` images at a time.

    The images may lie in main memory or in files. The logits are on the network's device.
    """
    return result_of(logits_in_steps(network, images, batch_size=batch_size))


def logits_in_steps(network: nn.Module, images: Images, *, batch_size: int = SCORING_BATCH) -> Steps[Tensor]:
    """Compute logits [n k] of images [n c h w] in evaluation mode. Yields after each batch of `batch_size` images.

    Between two steps the network is in the mode that it had before.
    """
    was_training, device = network.training, device_of(network)
    logits = []
    for first in range(0, len(images), batch_size):
        chunk = images[first : first + batch_size]
        chunk = chunk if isinstance(chunk, Tensor) else torch.from_numpy(chunk)
        with torch.no_grad():
            logits.append(network.eval()(chunk.to(device)))
        network.train(was_training)
        yield
    return torch.cat(logits)


def in_batches(function: Callable[[NDArray[np.int64]], Tensor], items: NDArray[np.int64]) -> Steps[Tensor]:
    """Apply `function`, which maps b items to values [b ..], to all items, `SCORING_BATCH` of them at a time.

    Returns the values [n ..] of all n items in main memory, without derivatives. Yields before each batch.
    """
    found = []
    for first in range(0, len(items), SCORING_BATCH):
        yield
        with torch.no_grad():
            found.append(function(items[first : first + SCORING_BATCH]).cpu())
    return torch.cat(found)


def accuracy_in_steps(network: nn.Module, images: Images, labels: Tensor) -> Steps[float]:
    """Compute the fraction in [0, 1] of the images [n c h w] that the network classifies as their labels [n].

    Yields after each batch.
    """
    logits = yield from logits_in_steps(network, images)
    return float((logits.argmax(dim=1) == labels).float().mean())
