"""State of a distillation for all methods: the set, SGD's momenta, histories, and the set chosen on validation data.

The state holds everything that a checkpoint needs. No code here reads the disk. Each class shard, a worker with some of
the classes, holds the images and soft labels of its own classes, and a copy of everything else. All shards make the
same updates, so these copies stay equal.
Shapes: n images that this shard holds, a backbones. Tests: tests/methods/trajectory/test_iteration.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.config import DistillConfig
from datm_ray.core.compute.gpu import sent
from datm_ray.core.images.augment import Augmentation
from datm_ray.core.metadd import IMAGES_AT_A_TIME, MetaDD, MetaLoss
from datm_ray.core.prior import Prior
from datm_ray.core.synthetic import AllSum, SyntheticSet, identity
from datm_ray.errors import DivergenceError

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGE_MOMENTUM, LABEL_MOMENTUM, STEP_SIZE_MOMENTUM = 0.5, 0.9, 0.5
"""Momenta of SGD on the images, the soft labels and the step sizes, as published for DATM."""

FIRST_MOVE = 0.05
"""Root mean square of the images' first update, as a share of the pixels' root mean square, if
`distill.learning_rate_images` is null. In the recipes for digits, tuned on validation data, the share is 0.07 at 1
image per class and 0.025 at 10."""
MOST_DIVERGED = 100
"""Number of diverged iterations since the last update after which a distillation stops. Trajectory matching counts them
for each backbone. Every iteration has other random draws, so a hundred divergences come from the set, not
from a draw."""

LEARNED = ("images", "soft_labels", "step_sizes")

Arrays = Mapping[str, NDArray[np.generic]]

ROWS = ("images", "soft_labels")
"""Names of the learned variables that have one row per synthetic image."""


_COLUMN_TYPES: dict[Any, type[np.generic]] = {"int": np.int64, "float": np.float64, "bool": np.bool_}


@dataclass(frozen=True)
class MetaTerm:
    """Networks and images with which this process computes MetaDD's loss in one iteration."""

    metadd: MetaDD
    """MetaDD with the networks that this process holds."""
    networks: int
    """Number of MetaDD networks in all processes together."""
    rows: NDArray[np.int64]
    """[b] indices, among the images of this class shard, of those that MetaDD uses in this iteration."""
    images: int
    """Number of images that MetaDD uses in this iteration, in all class shards together."""
    augmentations: Sequence[Augmentation] = ()
    """Augmentation of each of the b images in `rows`; empty if MetaDD sees unaugmented images."""
    chunk: int = IMAGES_AT_A_TIME
    """Number of images that pass through MetaDD's networks at a time; the same in all processes."""

    def gradient(self, shown: Tensor, held: SyntheticSet, all_sum: AllSum = identity) -> tuple[MetaLoss, Tensor]:
        """Compute MetaDD's loss, and its gradient [n c h w], which is 0 for images that MetaDD does not use.

        Args:
            shown: [n c h w] images, or views of them, that the networks see.
            held: rows of the set that this process holds, for the images' classes.
            all_sum: sum over the processes that hold the same images and work on other networks.
        """
        rows = sent(torch.from_numpy(self.rows), shown.device)
        loss, along = self.metadd.gradient(
            shown[rows],
            held.labels[rows],
            networks=self.networks,
            classes=held.soft_labels.shape[1],
            over=self.images,
            chunk=self.chunk,
            augmentations=self.augmentations,
            all_sum=all_sum,
        )
        return loss, torch.zeros_like(shown).index_copy_(0, rows, along)


@dataclass(frozen=True)
class MetaRecord:
    """Values of MetaDD in one iteration: the loss `total`, its terms without weights, and the meta-feature ratio."""

    iteration: int
    total: float
    variance: float
    invariance: float
    position: float
    ratio: float


@dataclass(frozen=True)
class Move:
    """Update of the synthetic set that `State.moved` has computed; `State.take` applies it."""

    synthetic: SyntheticSet
    """The set after the update."""
    momenta: dict[str, Tensor]
    """Learned variable -> SGD's momentum after the update."""
    is_invalid: Tensor
    """[1] not 0 if the update makes a value not finite, or a step size not positive, in any shard."""


Record = TypeVar("Record")


@dataclass
class State(Generic[Record]):
    """State of one distillation, or of one class shard (the images of some classes) of a distillation."""

    record: ClassVar[type[Any]]
    """Dataclass of one record in the history. Its fields are int, float or bool; the first field is `iteration`."""

    synthetic: SyntheticSet
    settings: DistillConfig
    """Section `distill` of the recipe."""
    momenta: dict[str, Tensor] = field(default_factory=dict)
    """SGD's momentum of each learned variable, by name; empty before the first update."""
    history: list[Record] = field(default_factory=list)
    """Records of the iterations done, in order."""
    meta_history: list[MetaRecord] = field(default_factory=list)
    """MetaDD's records, one for each iteration that updated the set; empty without MetaDD or if all its weights are 0.
    A set that single workers make in pieces has one for each update of a piece."""
    validations: list[tuple[int, float]] = field(default_factory=list)
    """Pair for each validation: number of iterations that made the validated set, and its accuracy in [0, 1]."""
    chosen: SyntheticSet | None = None
    """Set to keep as the result, chosen by the validations so far; `None` before the first validation."""
    chosen_at: int = 0
    """Number of iterations after which the set was `chosen`; 0 before the first validation."""
    averaged: Tensor | None = None
    """Moving average [n c h w] of the images; `None` if `distill.average_decay` is null, or before the first update.

    With a prior, this is the moving average of the images' latents, [n l a b] with l channels of a x b values."""
    image_rate: float | None = None
    """Learning rate of the images, found before the first iteration; `None` if the recipe gives one, or until found."""
    prior: Prior | None = None
    """Decoder that makes the images from latents; `None` if pixels are learned. Checkpoints do not hold the decoder."""
    _counts: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Results of `count` so far: name of a count -> (number of records that were read, their count)."""

    @property
    def iteration(self) -> int:
        """Number of iterations done, which is the number of records.

        Methods with several records per iteration override this property.
        """
        return len(self.history)

    @property
    def rates(self) -> dict[str, float]:
        """Learned variable -> learning rate. Hard labels stay fixed, so their rate is 0.

        Raises:
            ValueError: the recipe gives no learning rate of the images, and none is found yet.
        """
        of_images = self.settings.learning_rate_images or self.image_rate
        if of_images is None:
            raise ValueError("distill.learning_rate_images is null, and none was found before the first iteration")
        of_labels = self.settings.learning_rate_labels if self.settings.has_soft_labels else 0.0
        rates = (of_images, of_labels, self.settings.learning_rate_step_size)
        return dict(zip(LEARNED, rates, strict=True))

    @property
    def result(self) -> SyntheticSet:
        """The set to validate and to keep: the current set, with the moving average of its images if there is one.

        With a prior, the decoder makes the images of the averaged latents.
        """
        if self.averaged is None:
            return self.synthetic
        if self.prior is None:
            return replace(self.synthetic, images=self.averaged)
        return replace(self.synthetic, images=self.prior.render(self.averaged), latents=self.averaged)

    def count(self, name: str, count_in: Callable[[Sequence[Record]], int]) -> int:
        """Count records of some kind in the whole history.

        The history grows at its end only. So the count is kept, and the next call reads only the records added since.

        Args:
            name: name under which the count is kept.
            count_in: function that returns the number of these records among some consecutive ones.
        """
        known, found = self._counts.get(name, (0, 0))
        found += count_in(self.history[known:])
        self._counts[name] = len(self.history), found
        return found

    def record_validation(
        self,
        accuracy: float,
        standard_error: float = 0.0,
        earlier: tuple[int, Callable[[], SyntheticSet]] | None = None,
    ) -> bool:
        """Record the accuracy of a validated set, and choose the set unless it is clearly worse than the best so far.

        "Clearly worse" means by more than one standard error. Validation sets are small, so the highest of many noisy
        accuracies says little. The check is there to catch a collapse. Without a collapse, the set that was optimised
        longest is the best.

        Args:
            accuracy: validation accuracy in [0, 1].
            standard_error: standard error of the accuracy, in the same unit, from the number of validation images.
            earlier: `None` if the current set was validated; for a set of an earlier iteration, its number of
                iterations and a function that reads it.

        Returns:
            True if the set was chosen.
        """
        best = max((before for _, before in self.validations), default=accuracy)
        is_chosen = accuracy >= best - standard_error
        iteration, read = earlier or (self.iteration, self.result.clone)
        self.validations.append((iteration, accuracy))
        if is_chosen:
            self.chosen, self.chosen_at = read(), iteration
        return is_chosen

    def pulled_back(self, gradient: Tensor) -> Tensor:
        """Turn a gradient [n c h w] with respect to pixels into a gradient with respect to latents.

        Without a prior the gradient is returned unchanged.
        """
        if self.prior is None:
            return gradient
        return self.prior.pull_back(self.synthetic.variable("images"), gradient)

    def movement(self, gradient: Tensor) -> Tensor:
        """Images [n c h w] before a step of SGD with learning rate 1, minus the images after this step, to first order.

        Its size gives the images' learning rate if the recipe has none. Without a prior this difference is the gradient
        itself. With a prior, the step moves the latents, and the images change with the latents.

        Args:
            gradient: [n c h w] gradient with respect to pixels.
        """
        if self.prior is None:
            return gradient
        return self.prior.push_forward(self.synthetic.variable("images"), self.pulled_back(gradient))

    def meta_gradient(
        self, meta: MetaTerm | None, all_sum: AllSum, sum_over_backbones: AllSum
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the part of MetaDD's gradient that goes through the networks of this process.

        The gradient is with respect to pixels, or to a prior's latents. The networks see augmented images if `meta` has
        augmentations, but the gradient is with respect to the images before augmentation. Reads no number from
        a GPU, for which the CPU would wait.

        Args:
            meta: MetaDD's inputs; `None` if this process holds no MetaDD network.
            all_sum: function that sums a tensor over class shards (workers with different classes).
            sum_over_backbones: function that sums a tensor over the processes that hold the same images for different
                networks, this one included.

        Returns:
            {"images": gradient}, and [6] the five numbers of a `MetaRecord`, then one that is not 0 if the loss or the
            gradient is not finite in any shard. If `meta` is `None`, the dictionary is empty and the numbers are 0.
        """
        if meta is None:
            return {}, self.synthetic.images.new_zeros(6)
        loss, gradient = meta.gradient(self.synthetic.images, self.synthetic, sum_over_backbones)
        values = all_sum(torch.stack([*loss.values(), not_finite(gradient)]))
        values[-1] += not_finite(values[0])
        return {"images": self.pulled_back(gradient)}, values

    def record_meta(self, meta: MetaTerm | None, values: Sequence[float]) -> None:
        """Append the record of an iteration to the history of MetaDD, if this process holds one of its networks.

        Args:
            meta: MetaDD's inputs; `None` if this process holds no MetaDD network, which appends nothing.
            values: the six numbers from `meta_gradient`, copied to the CPU.
        """
        if meta is not None:
            self.meta_history.append(MetaRecord(self.iteration, *values[:5]))

    def moved(self, gradient: dict[str, Tensor], moved: Tensor, all_sum: AllSum) -> Move:
        """Compute one SGD update of the set, without applying it. Reads no number from a GPU: the CPU would wait.

        Args:
            gradient: learned variable -> its gradient; changed in place.
            moved: [a] True for backbones whose step size has a gradient. Other step sizes stay as they are.
            all_sum: function that sums a tensor over class shards, so that the update is valid in all shards or none.
        """
        updated, rates = self.synthetic.clone(), self.rates
        for name, momentum in zip(LEARNED, (IMAGE_MOMENTUM, LABEL_MOMENTUM, STEP_SIZE_MOMENTUM), strict=True):
            if name in self.momenta:
                gradient[name].add_(self.momenta[name], alpha=momentum)  # in place: the sum becomes the new momentum
            updated.variable(name).sub_(gradient[name], alpha=rates[name])
        if self.prior is not None:
            updated.images = self.prior.render(updated.variable("images"))
        torch.where(moved, updated.step_sizes, self.synthetic.step_sizes, out=updated.step_sizes)
        if self.momenta:
            gradient["step_sizes"] = torch.where(moved, gradient["step_sizes"], self.momenta["step_sizes"])
        is_bad = not_finite(*gradient.values()).bool() | updated.is_invalid()
        # Each shard checks its own rows. The sum makes all shards update, or none.
        return Move(updated, gradient, all_sum(is_bad.float().reshape(1)))

    def take(self, move: Move) -> None:
        """Apply an update: replace the set and SGD's momenta, and update the images' moving average, if any."""
        if self.settings.average_decay is not None:
            before = self.synthetic.variable("images") if self.averaged is None else self.averaged
            self.averaged = before.lerp(move.synthetic.variable("images"), 1 - self.settings.average_decay)
        self.synthetic, self.momenta = move.synthetic, move.momenta

    def to_arrays(self) -> tuple[Arrays, Arrays]:
        """Convert the state to arrays by name, for a checkpoint: those with one row per image, then all others."""
        held: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        sets = {"synthetic": self.synthetic} | ({} if self.chosen is None else {"chosen": self.chosen})
        for prefix, of_set in sets.items():
            held |= {f"{prefix}.{name}": getattr(of_set, name) for name in (*ROWS, "labels")}
            shared[f"{prefix}.step_sizes"] = of_set.step_sizes
        if self.synthetic.latents is not None:
            held["synthetic.latents"] = self.synthetic.latents
        if self.averaged is not None:
            held[_averaged(held)] = self.averaged
        for name, buffer in self.momenta.items():
            (held if name in ROWS else shared)[f"momentum.{name}"] = buffer
        return (
            {name: _to_numpy(value) for name, value in held.items()},
            {name: _to_numpy(value) for name, value in shared.items()} | self._curves(),
        )

    def _curves(self) -> dict[str, NDArray[np.generic]]:
        curves = _columns("history", self.history, self.record)
        curves |= _columns("meta", self.meta_history, MetaRecord) if self.meta_history else {}
        curves["validation.iteration"] = np.array([iteration for iteration, _ in self.validations], np.int64)
        curves["validation.accuracy"] = np.array([accuracy for _, accuracy in self.validations], np.float64)
        curves["validation.chosen_at"] = np.array(self.chosen_at, np.int64)
        if self.image_rate is not None:
            curves["found.image_rate"] = np.array(self.image_rate, np.float64)
        return curves

    @classmethod
    def from_arrays(cls, held: Arrays, shared: Arrays, settings: DistillConfig, device: torch.device) -> Self:
        """Restore a state from the arrays of `to_arrays`.

        Args:
            held: arrays with one row per image: of all images, or of the range of images that a class shard holds.
            shared: all other arrays.
        """
        arrays = {**held, **with_present_names(shared)}
        curve = (arrays["validation.iteration"].tolist(), arrays["validation.accuracy"].tolist())
        return cls(
            synthetic=_set_from(arrays, "synthetic", device),
            settings=settings,
            momenta={
                name: _to_torch(arrays[f"momentum.{name}"], device) for name in LEARNED if f"momentum.{name}" in arrays
            },
            history=records(arrays, "history", cls.record),
            meta_history=records(arrays, "meta", MetaRecord) if "meta.iteration" in arrays else [],
            validations=list(zip(*curve, strict=True)),
            chosen=_set_from(arrays, "chosen", device) if "chosen.step_sizes" in shared else None,
            chosen_at=int(arrays["validation.chosen_at"]),
            averaged=_to_torch(arrays[_averaged(arrays)], device) if _averaged(arrays) in arrays else None,
            image_rate=float(arrays["found.image_rate"]) if "found.image_rate" in arrays else None,
        )


@dataclass(frozen=True)
class LossRecord:
    """Record of one iteration, for methods that learn the images by the gradient of one loss."""

    iteration: int
    loss: float
    """Loss before the update, without MetaDD's loss, summed over class shards and backbones."""
    skipped: bool
    """True if nothing was updated, because the loss, the gradient or an updated value was not finite."""


@dataclass
class Descent(State[LossRecord]):
    """State of a method that learns the images by the gradient of one loss, with fixed labels and step size."""

    record: ClassVar[type[LossRecord]] = LossRecord
    rate_key: ClassVar[str] = "distill.learning_rate_images"
    """Configuration key of the images' learning rate, for messages."""

    @property
    def skipped(self) -> int:
        """Number of iterations so far that updated nothing, because a value was not finite."""
        return self.count("skipped", lambda new: sum(record.skipped for record in new))

    def step(
        self,
        gradient: Callable[[], tuple[Tensor, Tensor]],
        *,
        meta: MetaTerm | None = None,
        all_sum: AllSum = identity,
        sum_over_backbones: AllSum = identity,
    ) -> LossRecord:
        """Run one iteration: add MetaDD's gradient, update the images, append to the history. Returns the new record.

        If the loss, a gradient or an updated value is not finite, the update is skipped in all shards and backbones.

        Args:
            gradient: function that computes this process's part of the loss [], then its part of the gradient [n c h w]
                of the loss with respect to the images. The gradient may be changed in place.
            meta: MetaDD's inputs; `None` if this process holds no MetaDD network.
            all_sum: function that sums a tensor over class shards (workers with different classes).
            sum_over_backbones: function that sums a tensor over the processes that hold the same images for different
                networks, this one included.

        Raises:
            DivergenceError: the number of iterations skipped in a row reached `MOST_DIVERGED` or a multiple of it, so
                that a resumed run tries as many again.
        """
        # MetaDD comes first: processes that hold only MetaDD networks finish it while the others compute the loss.
        total, meta_values = self.meta_gradient(meta, all_sum, sum_over_backbones)
        own, pixels = gradient()
        images = self.pulled_back(pixels)
        is_bad = meta_values[-1] + not_finite(own, images)
        mine = all_sum(sum_over_backbones(torch.stack([own.detach(), is_bad]).double()))
        total["images"] = total["images"] + images if "images" in total else images
        summed = {"images": sum_over_backbones(total["images"])}
        summed |= {name: torch.zeros_like(self.synthetic.variable(name)) for name in LEARNED if name != "images"}
        moved = torch.zeros_like(self.synthetic.step_sizes, dtype=torch.bool)
        # The update is computed before it is known whether it is taken, so that the CPU waits for the GPU once.
        move = self.moved(summed, moved, all_sum)
        (loss, is_bad), is_invalid, values = read_all(mine, move.is_invalid, meta_values)
        is_followed = not (is_bad or is_invalid)
        if is_followed:
            self.take(move)
            self.record_meta(meta, values.tolist())
        self.history.append(LossRecord(self.iteration, float(loss), not is_followed))
        self._require_progress()
        return self.history[-1]

    def _require_progress(self) -> None:
        times = next((back for back, record in enumerate(reversed(self.history)) if not record.skipped), self.iteration)
        if times and times % MOST_DIVERGED == 0:
            raise DivergenceError(
                f"distillation diverged {times} times in a row up to iteration {self.iteration}: the loss, its "
                "gradient or an updated value is not finite",
                "a learning rate or a weight under metadd is too large",
                f"lower {self.rate_key} and start with a new --out. The set of the last update is saved as "
                f"last-good.arrow. Running the same command again tries {MOST_DIVERGED} more iterations",
            )


FORMER_NAMES = {"history.overshoot": "history.decrease"}  # former name
"""Name of an array in checkpoints of earlier versions -> its current name."""


def _averaged(arrays: Mapping[str, Any]) -> str:
    """Name of the moving average in a checkpoint: "averaged.latents" if the set has a prior, or "averaged.images"."""
    return "averaged.latents" if "synthetic.latents" in arrays else "averaged.images"


def with_present_names(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Rename a checkpoint's arrays from names of earlier versions to current names."""
    return {FORMER_NAMES.get(name, name): array for name, array in arrays.items()}


def read_all(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors to the CPU as float64, all in one copy, so that the CPU waits for a GPU only once."""
    whole = torch.cat([each.double().flatten() for each in tensors]).cpu()
    parts = whole.split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def not_finite(*values: Tensor) -> Tensor:
    """Return a scalar tensor of the first value's type: 1 if any number in `values` is not finite, else 0."""
    return torch.stack([~value.isfinite().all() for value in values]).any().to(values[0].dtype)


def _columns(prefix: str, records: Sequence[Any], record: type[Any]) -> dict[str, NDArray[np.generic]]:
    """Convert `records`, all of type `record`, to arrays for a checkpoint, named `<prefix>.<field>`."""
    named = ((each.name, _COLUMN_TYPES[each.type]) for each in fields(record))
    return {f"{prefix}.{column}": np.array([getattr(each, column) for each in records], kind) for column, kind in named}


def records(arrays: dict[str, NDArray[Any]], prefix: str, record: type[Any]) -> list[Any]:
    """Read the records of a history from the arrays of a checkpoint.

    Args:
        arrays: arrays by name. Missing columns, as in earlier versions, are added with their field's default.
        prefix: name of the history: "history", or "meta" for MetaDD's history.
        record: dataclass of one record.
    """
    names = [each.name for each in fields(record) if each.default is MISSING or f"{prefix}.{each.name}" in arrays]
    rows = zip(*(arrays[f"{prefix}.{name}"].tolist() for name in names), strict=True)
    return [record(**dict(zip(names, row, strict=True))) for row in rows]


def _set_from(arrays: Arrays, prefix: str, device: torch.device) -> SyntheticSet:
    names = (*LEARNED, "labels", *(["latents"] if f"{prefix}.latents" in arrays else []))
    return SyntheticSet(**{name: _to_torch(arrays[f"{prefix}.{name}"], device) for name in names})


def _to_numpy(tensor: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = tensor.detach().cpu().numpy()
    return array


def _to_torch(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.tensor(array, device=device)  # copies, because the array may be a read-only view of a file
