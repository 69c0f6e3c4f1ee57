"""Recovering images from a trained network with batch normalisation, the teacher (SRe2L, arXiv 2306.13092).

    L = CE(f(x'), y) + statistics * sum over layers l of w_l (|mean_l - m_l| + |var_l - v_l|),   x' = view(x)

f is the teacher in evaluation mode. mean_l and var_l are the mean and the biased variance of the inputs of the l-th
batch normalisation, over pixels and the images of a block (those recovered together); m_l and v_l are its running
statistics. Norms are not squared, and w_l is 1 except in layer 1, where it is `recover.first_layer`. A view is one
resized crop, flip and shift, the same for all images of a block. Adam follows the gradient, with a learning rate that
falls along a cosine to 0. Pixels are kept between black and white after each step. The statistics of other networks may
be used too, or in place of the teacher's (as in PRISM). The term is then the mean over networks of each network's sum
over layers.

The statistics couple only the images of one block, so blocks are independent. Two options come from other papers. Crops
may start as the whole image and shrink (CDA, arXiv 2311.18838). A recovery may have rounds: between two rounds the
first images are mixed in, and Adam's moments are reset (FADRM, arXiv 2506.24125).

Shapes: n images of a block, c h w an image, k classes. Tests: tests/methods/test_recovery.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from datm_ray.config import DistillConfig, RecoverConfig
from datm_ray.core.compute.compilation import CompiledForShapes, compiler_problem
from datm_ray.core.compute.precision import tf32_products
from datm_ray.core.images.augment import WHOLE, crop_boxes, fitting_box
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.training.adam import adam_step
from datm_ray.core.training.rates import share_of_rate
from datm_ray.errors import ConfigError
from datm_ray.methods.state import Arrays, Descent, LossRecord, MetaRecord, not_finite

if TYPE_CHECKING:
    from typing_extensions import Self

DECAYS = (0.5, 0.9)
"""Adam's decay rates of the first and of the second moment, as published for SRe2L."""
TRIES = 10
"""Number of boxes drawn for each crop if `recover.crops` is "falling", as in torchvision's RandomResizedCrop.

The crop is the first of the boxes that fits into the image, or the whole image if none fits."""


@dataclass(frozen=True)
class View:
    """Crop, flip and shift of one iteration, the same for all images of a block (images recovered together)."""

    box: tuple[float, float, float, float]
    """Top, left, height and width of the crop, from 0 to 1: shares of the image's height or width."""
    is_flipped: bool
    shift: tuple[int, int]
    """Number of pixels by which images move down, and to the right. Pixels that leave one side enter at the other."""

    def of(self, images: Tensor) -> Tensor:
        """Crop images [n c h w], enlarge the crops to h w, flip and shift them; differentiable in the images.

        All images share one box, so the crop is a product with two matrices, whose gradient is reproducible on GPUs.
        """
        top, left, height, width = self.box
        rows, columns = (
            crop_matrix(first, share, side).to(images)
            for first, share, side in ((top, height, images.shape[2]), (left, width, images.shape[3]))
        )
        columns = columns.flip(0) if self.is_flipped else columns
        with tf32_products(False, images.device):  # weights of 10 bits would blur and move the images
            return (rows.roll(self.shift[0], 0) @ images) @ columns.roll(self.shift[1], 0).T


def pulled_back(seen: Tensor, images: Tensor, gradient: Tensor) -> Tensor:
    """Turn a gradient with respect to views of images (see `View`) into a gradient with respect to the images.

    Args:
        seen: [n c h w] views, computed from `images`.
        images: [n c h w] whole images, which require gradients.
        gradient: [n c h w] gradient with respect to the views.
    """
    with tf32_products(False, gradient.device):
        (found,) = torch.autograd.grad(seen, images, gradient)
    return found


def crop_matrix(first: float, share: float, side: int) -> Tensor:
    """Matrix [s s] in float64 that crops an image along one side of s pixels and enlarges the crop to s, bilinearly.

    The product with an image equals `resized_crop` along this side.

    Args:
        first: start of the crop, as a share of the side.
        share: length of the crop, as a share of the side.
        side: s, the image's height or width in pixels.
    """
    places = first * side + (torch.arange(side, dtype=torch.float64) + 0.5) * share - 0.5
    distances = (places.clamp(0, side - 1)[:, None] - torch.arange(side, dtype=torch.float64)).abs()
    return (1 - distances).clamp(min=0)


def draw_view(options: RecoverConfig, seed: int, block: int, iteration: int, iterations: int) -> View:
    """Draw the crop, flip and shift that an iteration applies to all images of a block.

    Args:
        options: section `recover` of the recipe.
        seed: seed of the run.
        block: number of the block (images that are recovered together) within the set, from 0.
        iteration: number of iterations done before this one.
        iterations: number of iterations of the whole run, over which crops shrink if `options.crops` asks for it.
    """
    draw = generator(seed, Purpose.RECOVERY_VIEW, block, iteration)
    least = options.least_share
    if options.crops != "published":
        least += (1 - least) * share_of_rate(iteration, iterations, cosine=True)
    is_cropped, is_tried = options.least_share < 1, options.crops == "falling"
    uniform = torch.from_numpy(draw.random((TRIES if is_cropped and is_tried else 1, 4)))
    box = WHOLE
    if is_cropped:
        box = fitting_box(uniform, least) if is_tried else crop_boxes(uniform, least)[0]
    top, left, height, width = box.tolist()
    rows, columns = draw.integers(-options.shift, options.shift + 1, 2).tolist()
    return View((top, left, height, width), options.flip and bool(draw.random() < 0.5), (rows, columns))


class RecoveryLoss:
    """SRe2L's loss of images: the teacher's cross-entropy for their classes, plus a weighted statistics term.

    The term is the distance of the images' batch statistics to the running statistics of the teacher or other networks.

    Attributes:
        note: one line on why the gradient is not compiled although this was asked for; "" otherwise.
    """

    def __init__(
        self,
        network: nn.Module,
        options: RecoverConfig,
        others: Sequence[nn.Module] = (),
        *,
        compiled: bool = False,
        channels_last: bool = False,
    ) -> None:
        """Copy the networks, frozen and in evaluation mode.

        Args:
            network: the teacher.
            options: weights of the loss, and which networks' statistics the loss uses.
            others: the run's auxiliary networks; used if `recover.statistics_of` is "auxiliaries" or "all".
            compiled: True to compile `gradient` if the machine can. The first call with new shapes compiles.
            channels_last: True to keep images and feature maps in the memory format `torch.channels_last`, which is
                faster on CPUs and rounds differently.

        Raises:
            ConfigError: a network whose statistics the loss uses has no batch normalisation with running statistics.
        """
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._networks = _Networks(network, options, others).to(memory_format=self._format)
        self._weight = options.statistics
        self._named = dict(self._networks.named_parameters())
        self.note = compiler_problem(next(network.parameters()).device.type) if compiled else ""
        function, is_compiled = self._differentiate, compiled and not self.note
        self._function: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
            CompiledForShapes(function, channels_last=channels_last) if is_compiled else function
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss [] of images [n c h w] whose class numbers are `labels` [n].

        Returns the loss, and its statistics term [] without the weight `recover.statistics`. Both are differentiable in
        the images.
        """
        return self._loss(images, labels, self._named)

    def gradient(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Differentiate the loss with respect to the images [n c h w], whose class numbers are `labels` [n].

        Returns the gradient [n c h w], the loss [], and its statistics term [] without the weight `recover.statistics`.
        """
        return self._function(images.contiguous(memory_format=self._format), labels, *self._named.values())

    def _differentiate(self, images: Tensor, labels: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def loss_of(images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            found = self._loss(images, labels, dict(zip(self._named, parameters, strict=True)))
            return found[0], found

        gradient, found = grad(loss_of, has_aux=True)(images)
        return gradient, *found

    def _loss(self, images: Tensor, labels: Tensor, named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the loss as `__call__` does, with `named`, the networks' parameters by name."""
        seen = images.contiguous(memory_format=self._format)
        logits, statistics = functional_call(self._networks, dict(named), (seen,))
        return cross_entropy(logits, labels) + self._weight * statistics, statistics


class _Networks(nn.Module):
    """Frozen copies of the teacher and of the networks whose running statistics the loss uses."""

    def __init__(self, teacher: nn.Module, options: RecoverConfig, others: Sequence[nn.Module]) -> None:
        super().__init__()
        beside = [] if options.statistics_of == "teacher" else others
        self.networks = nn.ModuleList(map(copy.deepcopy, [teacher, *beside]))
        self.eval().requires_grad_(False)
        self._first_layer = options.first_layer
        self._first_counted = int(options.statistics_of == "auxiliaries")  # otherwise the teacher counts too
        self._gaps: list[Tensor] = []
        for network in self.networks[self._first_counted :]:
            layers = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
            layers = [part for part in layers if part.running_mean is not None]
            if not layers:
                raise ConfigError(
                    f"{type(network).__name__} has no batch normalisation, whose statistics images are recovered from",
                    remedy="use --set network.norm=batch, with an architecture that has it, such as resnet18",
                )
            for layer in layers:
                layer.register_forward_pre_hook(self._measure)

    def _measure(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        self._gaps.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the teacher's logits [n k] for images [n c h w], and the statistics term [] of the loss, unweighted.

        The term of one network is a sum over its batch normalisations: the L2 distances of the batch's mean and of its
        variance to the running ones, the first layer's times `recover.first_layer`. The result is the mean over the
        networks that `recover.statistics_of` names, which may leave out the teacher.
        """
        logits, statistics = images.new_zeros(()), list[Tensor]()
        for number, network in enumerate(self.networks):
            self._gaps.clear()
            found = network(images)
            logits = logits if number else found
            if number >= self._first_counted:
                gaps = torch.stack(self._gaps)
                statistics.append(gaps.sum() + (self._first_layer - 1) * gaps[0])
        self._gaps.clear()
        return logits, torch.stack(statistics).mean()


@dataclass(frozen=True)
class RecoveryRecord(LossRecord):
    """Losses of one iteration of a recovery (SRe2L), for its history."""

    statistics: float
    """Statistics term of the loss, without its weight `recover.statistics`: sum over layers of the distances to the
    running statistics, the first layer's times `recover.first_layer`. It is a mean over the networks that
    `recover.statistics_of` names."""


@dataclass
class Recovery(Descent):
    """State of recovering one block (images that are optimised together). It holds the images and Adam's moments."""

    record: ClassVar[type[LossRecord]] = RecoveryRecord
    rate_key: ClassVar[str] = "recover.learning_rate"
    moments: dict[str, Tensor] = field(default_factory=dict)
    """Adam's moments "first" and "second" of the pixels, or of a prior's latents; empty at the start of a round."""
    first_images: Tensor | None = None
    """Images [n c h w] that the block started from, or their latents if there is a prior; `None` with one round."""

    def follow(
        self,
        gradient: Tensor,
        loss: Tensor,
        statistics: Tensor,
        options: RecoverConfig,
        bounds: tuple[Tensor, Tensor],
        meta: Sequence[Tensor] = (),
    ) -> RecoveryRecord:
        """Take one step of Adam, or skip it if a value would not be finite, and append a record to the history.

        After each round but the last, the images that the block started from are mixed in, and Adam's moments restart.

        Args:
            gradient: gradient [n c h w] with respect to the images, of the loss and of MetaDD's loss if there is one.
            loss: loss [] before the update, without MetaDD's loss; for the record.
            statistics: statistics term [] of the loss, without its weight; for the record.
            options: learning rate, rounds, and what happens between rounds.
            bounds: values of a black and of a white pixel after normalisation, [c 1 1] each.
            meta: the five numbers [] of a `MetaRecord`, which is appended to MetaDD's history unless the step is
                skipped; empty without MetaDD.

        Raises:
            DivergenceError: the number of iterations skipped in a row reached `MOST_DIVERGED` or a multiple of it, so
                that a resumed run tries as many again.
        """
        first, last = self._round(options)
        falls = (first, last) if options.restarts == "all" else (0, self.settings.iterations)
        rate = options.learning_rate * share_of_rate(self.iteration - falls[0], falls[1] - falls[0], cosine=True)
        gradient = self.pulled_back(gradient)
        moved, moments = self._adam(gradient, rate, self.iteration - first)
        bad = not_finite(gradient, loss, moved, moments["second"])
        is_bad, *values = torch.stack([bad.to(loss), loss, statistics, *meta]).tolist()  # one wait for the device
        record = RecoveryRecord(self.iteration, values[0], bool(is_bad), values[1])
        if not is_bad:
            self._place(moved, bounds)
            self.moments = moments
            self.meta_history += [MetaRecord(self.iteration, *values[2:])] if meta else []
        self.history.append(record)
        self._require_progress()
        if self.iteration == last < self.settings.iterations:
            assert self.first_images is not None
            self._place(self.synthetic.variable("images").lerp(self.first_images, options.mixed_in), bounds)
            self.moments = {}
        return record

    def _place(self, moved: Tensor, bounds: tuple[Tensor, Tensor]) -> None:
        """Set the images to `moved`: pixels clamped to `bounds` (black, white).

        With a prior, `moved` holds latents, which are not clamped.
        """
        if self.prior is None:
            self.synthetic.images = moved.clamp(*bounds)
        else:
            self.synthetic.latents, self.synthetic.images = moved, self.prior.render(moved)

    def _adam(self, gradient: Tensor, rate: float, done: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute one step of Adam without taking it.

        Returns the new pixels, or a prior's new latents, and Adam's new moments: "first" and "second" -> values.

        Args:
            gradient: gradient with respect to the pixels or latents.
            rate: learning rate of the step.
            done: number of steps taken since Adam's moments were last reset, at the start of the round.
        """
        zero = torch.zeros_like(gradient)
        before = self.moments.get("first", zero), self.moments.get("second", zero)
        moved, *after = adam_step(self.synthetic.variable("images"), gradient, before, rate, done, DECAYS)
        return moved, dict(zip(("first", "second"), after, strict=True))

    def _round(self, options: RecoverConfig) -> tuple[int, int]:
        """Number of the first iteration of the current round, and of the first iteration after this round.

        The iterations are divided into `options.rounds` rounds, whose lengths differ by at most one. Each round starts
        with new moments of Adam.
        """
        ends = [self.settings.iterations * number // options.rounds for number in range(options.rounds + 1)]
        return next((first, last) for first, last in pairwise(ends) if first <= self.iteration < last)

    def to_arrays(self) -> tuple[Arrays, Arrays]:
        """Convert the state to arrays by name, for a checkpoint: those with one row per image, then all others."""
        held, shared = super().to_arrays()
        own = {f"adam.{name}": moment for name, moment in self.moments.items()}
        own |= {} if self.first_images is None else {"first_images": self.first_images}
        return {**held, **{name: value.cpu().numpy() for name, value in own.items()}}, shared

    @classmethod
    def from_arrays(cls, held: Arrays, shared: Arrays, settings: DistillConfig, device: torch.device) -> Self:
        """Restore the state from the two results of `to_arrays`."""
        state = super().from_arrays(held, shared, settings, device)
        own = {name: torch.tensor(array, device=device) for name, array in held.items() if name.startswith("adam.")}
        state.moments = {name.removeprefix("adam."): moment for name, moment in own.items()}
        if "first_images" in held:
            state.first_images = torch.tensor(held["first_images"], device=device)
        return state
