"""Sections of a run's configuration: the data set, networks, stages, and how the work is spread over a cluster.

All sections are frozen and strict: an unknown key, a wrong type or an impossible value is an error. Tests:
tests/config/test_config.py.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)
from pydantic_core import PydanticCustomError

from datm_ray.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Epoch = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _required(holds: Callable[[Any], object], words: str) -> AfterValidator:
    """Validator of a value for which `holds` must return true; `words` say in the error what the value must be."""

    def require(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("value", words)
        return value

    return AfterValidator(require)


PUBLISHED_AUGMENTATION = "color_crop_cutout_flip_scale_rotate"
"""DSA augmentation of MTT, FTD, TESLA and DATM: the default for experts, students and evaluation."""


class Section(BaseModel):
    """Base class of all sections of a recipe: immutable, without unknown keys or silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _none_is_null(cls, values: object) -> object:
        """Read the text "none" or "None" as null in fields that may be null, for use on a command line."""
        if not isinstance(values, Mapping):
            return values
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if key in optional and each in ("none", "None") else each for key, each in values.items()}


class DatasetConfig(Section):
    """Images of the run, and their normalisation."""

    source: str = "digits"
    """digits, cifar10, cifar100, tiny-imagenet, folder or parquet."""
    path: str | None = None
    """Path of the data set. null: ~/.cache/datm_ray for cifar10, cifar100 and tiny-imagenet; digits needs none."""
    resize: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels to resize every image to; null keeps the size."""
    normalisation: Literal["auto", "zca", "standard"] = "auto"
    """zca: whitening with eps 0.1, as published. standard: mean and standard deviation per channel.
    auto: zca up to 64x64 pixels, else standard; streamed images and those with a given `mean` get standard."""
    mean: Annotated[tuple[NonNegative, ...], Field(strict=False)] | None = None
    """standard: mean of each channel, for pixels in [0, 1], such as a teacher's; null: that of the training images."""
    std: Annotated[tuple[Positive, ...], Field(strict=False)] | None = None
    """standard: standard deviation of each channel, given with `mean`; null: that of the training images."""
    validation: Fraction = 0.1
    """Share of each class's training images used for validation, in (0, 1)."""
    streamed: bool = False
    """True to leave images in their files and to decode each whenever it is needed, for sets larger than memory. Needs
    resize, and folder, parquet or tiny-imagenet as source."""

    @model_validator(mode="after")
    def _normalisation_fits(self) -> DatasetConfig:
        if self.streamed and self.normalisation == "zca":
            raise ValueError("dataset.streamed and zca do not go together; use dataset.normalisation=standard")
        if len(self.mean or ()) != len(self.std or ()):
            raise ValueError("dataset.mean and dataset.std need one number per channel each; give both, or neither")
        if self.mean is not None and self.normalisation == "zca":
            raise ValueError("dataset.mean is given, and zca has another mean; set dataset.normalisation=standard")
        return self

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Given means and standard deviations of the channels; `None` if they are computed from the training images."""
        return None if self.mean is None or self.std is None else (self.mean, self.std)

    @property
    def kind(self) -> Literal["zca", "standard"]:
        """Value of `normalisation`, once `RunConfig.resolved` has replaced auto.

        Raises:
            ValueError: the value is still auto.
        """
        if self.normalisation == "auto":
            raise ValueError(UNRESOLVED)
        return self.normalisation

    def resolved(self, size: tuple[int, int]) -> DatasetConfig:
        """Copy in which "auto" is replaced by the normalisation for images of `size` (height, width) in pixels.

        Memory of fitting zca grows with the fourth power of an image's side, time with the sixth. Estimates on two CPU
        cores: 6 GB and ten minutes at 64x64 RGB, the largest published size; 30 GB and 70 minutes at 96x96. Both are
        less if there are fewer images than values in an image. The number of images has no influence on the choice,
        because the experts' fingerprint contains the normalisation. Streamed images, and a given `mean`, get
        "standard".
        """
        if self.normalisation != "auto":
            return self
        whitens = size[0] * size[1] <= MOST_WHITENED and not self.streamed and self.mean is None
        return self.model_copy(update={"normalisation": "zca" if whitens else "standard"})


UNRESOLVED = "the configuration still has values that depend on the size of the images; call RunConfig.resolved first"
MOST_WHITENED = 64 * 64
"""Largest number of pixels (height x width) of an image for which normalisation "auto" means zca, inclusive."""
SMALLEST_MAP = 3
"""Smallest side in pixels of convnet's last feature maps if `depth` is null, which limits the number of blocks.

The network always has at least two blocks, even if the side gets smaller."""
PUBLISHED_DEPTH = 3
"""Depth of mlp in the literature; every architecture but convnet gets this value where depth is null."""


def depth_for(architecture: str, size: tuple[int, int]) -> int:
    """Default depth of a network for images of `size` (height, width) in pixels.

    The depth of convnet is its number of blocks. The image's smaller side decides: below 24 pixels 2 blocks, from 24
    on 3, from 48 on 4, from 96 on 5, and so on. Each block's pooling halves the sides of the feature maps; from 12
    pixels on, the last maps therefore have at least 3 pixels a side. Published networks for 28, 32, 64 and 128 pixels
    have these depths. mlp gets its published 3 layers at any size. Other architectures ignore depth.
    """
    if architecture != "convnet":
        return PUBLISHED_DEPTH
    return max(2, (min(size) // SMALLEST_MAP).bit_length() - 1)


PUBLISHED_WIDTH = 128
"""Channels of ConvNet's convolutions as published; at this value other architectures have their own published width."""

Norm = Literal["instance", "batch", "group", "none"]
Pooling = Literal["avg", "max", "none"]


class NetworkConfig(Section):
    """The backbone: architecture of experts, students and evaluation networks.

    An architecture reads only the fields in its row:

        convnet                                             width, depth, norm, pooling
        mlp                                                 width, depth
        resnet18, resnet50, resnet101, mobilenet-v2, vgg11  width, norm
        alexnet, vit-small                                  width
        lenet                                               nothing: its size is the published one
        package.module:Builder                              what the builder reads

    Architectures without norm in their row refuse norm "batch" and "group".
    """

    architecture: str = "convnet"
    """convnet, resnet18, resnet50, resnet101, vgg11, mobilenet-v2, alexnet, lenet, mlp, vit-small, or
    package.module:Builder of your own."""
    width: Count = PUBLISHED_WIDTH
    """Channels of convnet's layers. Other networks get width / 128 times their published numbers of channels."""
    depth: Count | None = None
    """Number of convnet's blocks or mlp's layers. null (default): 3 layers; 2 or more blocks by image size."""
    norm: Norm = "instance"
    """Normalisation layers: instance, batch, group or none. sre2l needs batch; datm, mtt and dm refuse it."""
    pooling: Pooling = "avg"
    """2x2 pooling at the end of every convnet block: avg, max or none."""

    def resolved(self, size: tuple[int, int]) -> NetworkConfig:
        """Copy in which a depth of `None` is replaced by the default for images of `size` (height, width) in pixels."""
        if self.depth is not None:
            return self
        return self.model_copy(update={"depth": depth_for(self.architecture, size)})

    def for_images(self, channels: int, size: tuple[int, int], classes: int) -> NetworkSpec:
        """Specification of the network for images with these channels, size (height, width) in pixels and classes."""
        values = self.resolved(size).model_dump()
        return NetworkSpec(**values | {"channels": channels, "size": size, "classes": classes})


class NetworkSpec(NetworkConfig):
    """Everything that decides a network's shape; two equal specs have interchangeable parameters."""

    depth: Count = PUBLISHED_DEPTH
    """Blocks of convnet, or layers of mlp including the one that computes the logits."""
    channels: Count
    """Channels of an image."""
    size: tuple[Count, Count]
    """Height and width of an image in pixels."""
    classes: Count
    """Number of logits."""


def _architecture(value: object) -> object:
    return {"architecture": value} if isinstance(value, str) else value


NamedNetwork = Annotated[NetworkConfig, BeforeValidator(_architecture)]
"""Network settings. A recipe may give the architecture's name alone, such as `resnet18`."""


class BackboneConfig(Section):
    """A network that is matched in addition to the run's `network`. It has experts of its own."""

    network: NamedNetwork
    """The network; its experts are trained with the settings of `experts`."""
    weight: Positive = 1.0
    """Weight of this network's matching loss; the run's `network` has weight 1."""


class RemovalConfig(Section):
    """Removal of easy images from the training of experts."""

    epoch: Epoch
    """First epoch, counted from 0, in which experts no longer see the easiest `share` of each class."""
    share: Fraction
    """Share of each class that is left out, its easiest images, in (0, 1)."""


class CurriculumConfig(Section):
    """Experts see the easy images of each class first, as in PAD.

    Separate networks are trained to score the images: a low EL2N score means an easy image.
    """

    first_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of each class, its easiest images, that experts see in the first epoch, in (0, 1]."""
    whole_from: Count = 20
    """Epoch from which experts see all images, counted from 0. Until then, the share seen grows linearly."""
    removals: Annotated[tuple[RemovalConfig, ...], Field(strict=False, max_length=16)] = (
        RemovalConfig(epoch=41, share=0.1),
        RemovalConfig(epoch=61, share=0.2),
    )
    """Epochs from which easy images are left out, in order, such as `[{epoch: 41, share: 0.1}]`; [] for none."""
    scoring_networks: Annotated[int, Field(ge=1, le=100)] = 8
    """Number of networks whose mean EL2N score orders the images, 1 to 100."""
    scoring_epochs: Count = 10
    """Number of epochs for which the networks that score the images are trained, on all images."""

    @model_validator(mode="after")
    def _removals_are_in_order(self) -> CurriculumConfig:
        epochs = [self.whole_from - 1, *(each.epoch for each in self.removals)]
        if any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
            raise ValueError(
                f"experts.curriculum.removals are at epochs {epochs[1:]}; give epochs that grow, from whole_from "
                f"{self.whole_from} on"
            )
        return self

    def bounds(self, epoch: int) -> tuple[float, float]:
        """Images that experts see in an epoch, as shares [first, last) of each class ordered from easy to hard.

        Args:
            epoch: number of the epoch, from 0.
        """
        first = next((each.share for each in reversed(self.removals) if epoch >= each.epoch), 0.0)
        return first, min(1.0, self.first_share + (1 - self.first_share) * epoch / self.whole_from)


class ExpertConfig(Section):
    """Training of the experts on real data: SGD as in MTT, or GSAM as in FTD and DATM."""

    count: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Number of experts, 1 to 100000."""
    epochs: Count = 100
    """Epochs of training per expert."""
    batch_size: Count = 256
    """Images per SGD step; the last, smaller batch is kept."""
    learning_rate: Positive = 0.01
    """Learning rate; the highest one if `schedule` or `warmup_epochs` change it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """constant; or cosine: the learning rate falls to 0 along a cosine, step by step."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of first epochs in which the learning rate grows from a hundredth to its full value; 0: none."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum in [0, 1); 0 as published, for easier matching."""
    weight_decay: NonNegative = 0.0
    """L2 penalty on the parameters."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations; a_b draws one of them for each batch, a+b applies both; '' for none."""
    optimiser: Literal["sgd", "gsam"] = "sgd"
    """gsam: two gradients per step, flatter trajectories."""
    rho: Positive = 0.01
    """gsam: length of the ascent step; 0.01 as published."""
    alpha: NonNegative = 0.3
    """gsam: how much of the gradient's component orthogonal to the perturbed gradient is subtracted; 0 for none."""
    adaptive: bool = True
    """gsam: scale the ascent step by each parameter's size."""
    curriculum: CurriculumConfig | None = None
    """Easy images first (PAD), such as `{first_share: 0.75, whole_from: 20}`; null: all images in every epoch."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of the experts; null: the run's seed. Runs with different seeds can share experts if this seed is equal."""
    keep_epochs: Count | None = None
    """Store epochs 0 to this one, inclusive, and the final one; null: those that the method may read."""
    storage: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of stored parameters; 16 bits halve the files, but round."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: layers compute in 16 bits on GPUs and CPUs that can; parameters, gradients, losses have 32 bits."""
    test_every: Annotated[int, Field(ge=0)] = 0
    """Epochs between measurements of test accuracy (only for display); 0: none. Only stored epochs keep the value."""

    @property
    def image_passes(self) -> float:
        """Number of gradients per training image in the whole training of one expert; gsam computes two per step."""
        each = 2 if self.optimiser == "gsam" else 1
        return each * self.epochs * self.share_seen(range(self.epochs))

    def share_seen(self, epochs: range) -> float:
        """Mean share of the images that an expert sees in these epochs, counted from 0; 1 without a curriculum."""
        if self.curriculum is None or not epochs:
            return 1.0
        bounds = (self.curriculum.bounds(epoch) for epoch in epochs)
        return sum(last - first for first, last in bounds) / len(epochs)


class StartEpochs(Section):
    """Expert epochs at which students start: `[5, 30]` is 5 to 29. With keys, the range can grow with iterations."""

    first: Epoch = 0
    """Earliest start epoch, inclusive (T- in the paper)."""
    bound: Count
    """Upper bound of start epochs at iteration 0, exclusive (T in the paper)."""
    final_bound: Count | None = None
    """Upper bound of start epochs from iteration `expand_iterations` on, exclusive (T+ in the paper);
    null: `bound`."""
    expand_iterations: Annotated[int, Field(ge=0)] = 0
    """Number of iterations over which the upper bound grows; 0 for a fixed range."""

    @model_validator(mode="before")
    @classmethod
    def _pair_is_a_fixed_range(cls, values: object) -> object:
        if isinstance(values, list | tuple) and len(values) == 2:
            return {"first": values[0], "bound": values[1]}
        if isinstance(values, Mapping | cls):
            return values
        raise ValueError(
            f"distill.start_epochs is {values!r}; give two epochs, such as [5, 30] for 5 to 29, or "
            "{first: 0, bound: 10, final_bound: 20, expand_iterations: 1000}"
        )

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> StartEpochs:
        if not self.first < self.bound <= self.last + 1:
            raise ValueError(
                f"distill.start_epochs needs first < bound <= final_bound, but has {self.first}, {self.bound} and "
                f"{self.last + 1}; bounds are exclusive"
            )
        if self.expand_iterations == 0 and self.last >= self.bound:
            raise ValueError(
                f"distill.start_epochs.expand_iterations is 0, so the bound cannot grow from {self.bound} to "
                f"{self.final_bound}"
            )
        return self

    @property
    def last(self) -> int:
        """Latest start epoch of the whole run, inclusive."""
        return (self.final_bound or self.bound) - 1

    def upper_bound(self, iteration: int) -> int:
        """Exclusive upper bound of the start epoch at this iteration."""
        if self.expand_iterations == 0:
            return self.bound
        grown = (self.last + 1 - self.bound) * iteration // self.expand_iterations
        return min(self.last + 1, self.bound + grown)


class DistillConfig(Section):
    """How the synthetic set is made. `recipe show` leaves out the keys that the recipe's method does not read.

    dm learns neither labels nor step size: its labels are hard, and networks train with `initial_step_size`.
    """

    ipc: Count = 10
    """Synthetic images per class."""
    iterations: Count = 10_000
    """Number of updates of the synthetic set."""
    continue_from: str | None = None
    """Folder of a finished run of this recipe with fewer iterations, to continue; null: from the first images."""
    student_steps: Count = 80
    """SGD steps of the student per iteration."""
    expert_epochs: Count = 2
    """Expert epochs from the student's start to its target (M in MTT)."""
    batch_size: Count = 100
    """Synthetic images per student step."""
    start_epochs: StartEpochs = StartEpochs(bound=10, final_bound=20, expand_iterations=1000)
    """Expert epochs at which students start; [0, 20] means 0 to 19."""
    learning_rate_images: Positive | None = 100.0
    """Learning rate of SGD on the pixels (with a prior: on latents), momentum 0.5; null: found at the start."""
    learning_rate_labels: NonNegative = 2.0
    """Learning rate of the soft labels, momentum 0.9; 0: labels stay fixed."""
    learning_rate_step_size: NonNegative = 1e-5
    """Learning rate of the student's step size, momentum 0.5."""
    real_batch: Count = 256
    """dm: real images of each class in an iteration."""
    initial: Literal["correct", "random", "noise", "crops"] = "correct"
    """First images. correct: real ones that experts classify correctly (mtt, dm: as random); random: real ones;
    noise: random pixels, as published for sre2l; crops (sre2l only): crops that `select` would choose by rded."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: the experts' mean logits, then learned by datm (sre2l, select: expert 0's logits); hard: the classes."""
    initial_step_size: Positive | None = None
    """The student's step size at the start; null: found by a line search (dm, sre2l, select: 0.01). sre2l and
    select only state it in the set's file; networks that score their sets have one chosen on validation images."""
    threshold: Positive | None = 1.0
    """Iterations with a larger matching loss are skipped; null: none is, as published for mtt."""
    gradient_limit: Positive | None = 10.0
    """Largest first-order decrease of the loss by one step, in multiples of the loss; longer gradients are shortened.
    null: no limit, as published."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations on the synthetic images in an iteration, written as in `experts`; dm: on real images too."""
    unmatched_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the parameters, from the first layer on, that the matching loss leaves out (PAD); 0: none."""
    average_decay: Fraction | None = None
    """Decay of a moving average of the images, such as 0.99; the average is validated and kept. null: no average."""
    options: dict[str, bool | int | Annotated[float, Field(allow_inf_nan=False)] | str] = {}
    """Settings that a method of your own reads, such as {temperature: 2, space: features, augment: true}."""
    validate_every: Annotated[int, Field(ge=0)] = 500
    """Iterations between validations, which choose the set to keep; 0: none, the last set is kept."""
    validation_seeds: Count = 1
    """Number of networks trained at each validation."""
    checkpoint_every: Count = 100
    """Largest number of iterations between checkpoints (sre2l: larger if they would take over 5 % of the time)."""

    @property
    def has_soft_labels(self) -> bool:
        return self.labels == "soft"

    @property
    def skip_above(self) -> float:
        """Matching loss above which an iteration is skipped: the largest finite number if `threshold` is `None`."""
        return sys.float_info.max if self.threshold is None else self.threshold


class RecoverConfig(Section):
    """Recovering images from a teacher, only for method sre2l. `distill` has its ipc, iterations, initial and labels.

    The values are those published for Tiny-ImageNet.
    """

    block: Count = 100
    """Largest number of images recovered together, of as many classes as possible; batch statistics couple them."""
    learning_rate: Positive = 0.1
    """Learning rate of Adam on the pixels, falling along a cosine to 0."""
    statistics: NonNegative = 1.0
    """Weight of the distance from the running statistics of the networks in `statistics_of` (r_bn)."""
    first_layer: NonNegative = 10.0
    """Weight of the first batch normalisation within `statistics`; other layers have 1."""
    statistics_of: Literal["teacher", "auxiliaries", "all"] = "teacher"
    """Networks whose running statistics the images should match: teacher, metadd.auxiliaries, or the mean of all."""
    least_share: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of an image's area that a crop keeps, in (0, 1]; 1 does not crop."""
    crops: Literal["published", "falling", "falling-cut"] = "published"
    """published: `least_share` in all iterations; falling: from 1 to `least_share` along a cosine, as in CDA;
    falling-cut: as falling, but crops longer than the image are cut, as in earlier versions."""
    flip: bool = True
    """Mirror half of the random views; false where mirrored images would be of another class."""
    shift: Annotated[int, Field(ge=0)] = 4
    """Largest shift of the images in pixels; pixels that leave one side enter at the other."""
    rounds: Count = 1
    """Number of rounds into which the iterations are divided. After each round but the last, the images are mixed with
    the first images, as in FADRM."""
    restarts: Literal["adam", "all"] = "adam"
    """What restarts when a round begins. adam: Adam's moments, as in FADRM; all: the moments and the learning rate's
    cosine."""
    mixed_in: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight, in [0, 1], of the first images when images are mixed between rounds; the current images get the rest."""


class SelectConfig(Section):
    """Choosing real images without optimisation, for method select, and for sre2l if `distill.initial` is crops.

    Keys that only `by: rded` reads have the published values as defaults.
    """

    by: Literal["rded", "moderate", "el2n", "forgetting", "random"] = "rded"
    """rded: crops of lowest loss; moderate: images near the median distance to the class centre; el2n: by the networks'
    error; forgetting: by how often the networks forget an image; random: any images."""
    crops: Count = 5
    """rded: random crops per image; the crop of lowest loss stays."""
    pool: Count = 300
    """rded: images per class that are cropped; all images if there are fewer."""
    tiles: Annotated[int, Field(ge=1, le=2)] = 1
    """rded: crops side by side in an image, in each direction; 2 as published for ImageNet."""
    least_share: Annotated[float, Field(gt=0, le=1)] = 0.08
    """rded: smallest share of an image's area that a crop keeps, in (0, 1]."""
    epoch: Count | None = None
    """el2n: stored epoch of the networks, an early one as published; null: the last."""
    hardest: bool = False
    """el2n, forgetting: true keeps the images with the highest scores; false those with the lowest, better for few
    images."""


class GivenConfig(Section):
    """A set that another program or run has made, only for method given. `distill.ipc` must be its images per class."""

    path: str
    """Folder with images_best.pt and labels_best.pt, or of images in a folder for each class, or an .arrow or
    .safetensors set."""
    step_size: Positive | None = None
    """Learning rate with which networks train on the set; null: the set's own, else chosen on validation images."""
    digest: str | None = None
    """Digest (16 hex digits) that the set's content must have; null: computed. Results depend on it, not on path."""


class AuxiliaryExpertConfig(ExpertConfig):
    """Training of auxiliaries or of a teacher; only their last epoch is used."""

    count: Annotated[int, Field(ge=1, le=100)] = 1
    """Experts per network, 1 to 100; MetaDD's iterations use them in turn, and a teacher has one."""
    epochs: Count = 50
    """Epochs of training per expert."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum in [0, 1)."""
    keep_epochs: Count | None = 1
    """Store epochs 0 to this one, inclusive, and the final one; null: those that the method may read."""


class AuxiliariesConfig(Section):
    """Networks that MetaDD compares with the run's `network`."""

    auxiliaries: Annotated[tuple[NamedNetwork, ...], Field(strict=False, min_length=1, max_length=16)]
    """Architectures of the auxiliaries, beside `network`, such as `[resnet18, {architecture: vgg11, width: 16}]`."""
    experts: AuxiliaryExpertConfig = AuxiliaryExpertConfig()
    """Training of the auxiliaries; only their last epoch is used."""

    @model_validator(mode="after")
    def _auxiliaries_differ(self) -> AuxiliariesConfig:
        for number, network in enumerate(self.auxiliaries):
            if network in self.auxiliaries[:number]:
                raise ValueError(
                    f"metadd.auxiliaries.{number} repeats an earlier network; give each network once, and raise "
                    "metadd.experts.count for several experts of it"
                )
        return self


class MetaLossConfig(Section):
    """Weights and thresholds of MetaDD's loss."""

    variance: NonNegative = 1.0
    """Weight of the class activation maps' variance over the networks."""
    invariance: NonNegative = 0.01
    """Weight of a sum: the auxiliaries' cross-entropy, and `divergence` times their KL from the backbone."""
    position: NonNegative = 0.1
    """Weight of the mean negative part of the class activation maps, which is evidence against the class."""
    divergence: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Weight, within invariance, of the auxiliaries' divergence from `network`; negative pushes them apart."""
    variance_of: Literal["maps", "logits"] = "maps"
    """maps; or, as a control, logits: `variance` then weights the variance of logits instead of maps."""
    threshold: Fraction = 0.5
    """Map value in (0, 1) from which a pixel is a feature; only for the reported share of common features."""

    @property
    def has_weight(self) -> bool:
        """True if a term of the loss has a weight; False if all weights are 0, so that the loss needs no networks."""
        return any((self.variance, self.invariance, self.position))


class MetaConfig(MetaLossConfig, AuxiliariesConfig):
    """MetaDD: losses on class activation maps, for sets that also work on other networks."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the synthetic images that the losses use, in (0, 1], drawn per iteration."""
    augmented: bool = True
    """MetaDD's networks see images augmented as the method augments them; false: unaugmented."""


DecoderKind = Annotated[
    str,
    _required(
        lambda kind: kind in ("trained", "untrained") or ":" in kind,
        "it must be trained, untrained or package.module:function",
    ),
]


class PriorConfig(Section):
    """A prior: a decoder makes the images, and its latents are learned in place of pixels."""

    kind: DecoderKind = "trained"
    """trained: a decoder trained on the data set's images; untrained: the same decoder with random
    parameters, as a control; or package.module:function that returns a decoder."""
    channels: Count = 16
    """Channels of an image's latents."""
    halvings: Annotated[int, Field(ge=0, le=6)] = 2
    """Number of halvings from the sides of an image to those of its latent maps, 0 to 6."""
    width: Count = 64
    """Channels of the layers of the decoder, and of the encoder that is trained with it."""
    epochs: Count = 50
    """trained: epochs of the autoencoder."""
    batch_size: Count = 64
    """trained: images per step."""
    learning_rate: Positive = 2e-3
    """trained: learning rate of Adam, falling along a cosine to 0."""
    inversion_steps: Annotated[int, Field(ge=0)] = 300
    """Steps of Adam that find the initial latents if the decoder has no encoder."""

    @property
    def is_packaged(self) -> bool:
        """True if the decoder comes with the package, False for a user's function."""
        return ":" not in self.kind


class TeacherConfig(Section):
    """A separate network that labels images for scored networks. Runs of several methods can share it."""

    network: NamedNetwork
    """Architecture of the teacher, such as `resnet18`."""
    experts: AuxiliaryExpertConfig = AuxiliaryExpertConfig()
    """Training of the teacher; only its last epoch is used."""

    @model_validator(mode="after")
    def _teacher_is_one(self) -> TeacherConfig:
        if self.experts.count != 1:
            raise ValueError(f"evaluate.teacher.experts.count is {self.experts.count}, and one network labels images")
        return self


OptimiserName = Literal["sgd", "adamw"]
"""Name of an optimiser of scored networks, a key of `core.training.loop.OPTIMISERS`."""


class EvaluateConfig(Section):
    """Training of fresh networks on the synthetic set, scored on the test set."""

    protocol: Literal["published", "short", "brief", "quick"] = "published"
    """Epochs: published 1001, short 500, brief 200, quick 20 (a trial), in batches of 128."""
    seeds: Count = 5
    """Networks tested for each row of the accuracy table, each freshly trained."""
    networks: Annotated[tuple[NamedNetwork, ...], Field(strict=False, max_length=64)] = ()
    """Architectures to score the set on as well, each with the learned and with a tuned step size."""
    optimiser: OptimiserName = "sgd"
    """adamw: for networks that SGD trains badly on few images (transformers), with learning_rate, else a tuned one."""
    real_epochs: Count = 100
    """Epochs of the control that trains on all real data."""
    full: bool = True
    """Train the control on all real data, which takes longest."""
    fair: bool = False
    """Compute DD-Ranking's label-robust and augmentation-robust scores. They need `full` and add three table rows:
    distilled images with hard labels; distilled and random images without augmentation."""
    fixed_labels: bool = False
    """Add rows with labels that stay the same in all epochs, for the set and for random images: hard labels, and under
    a teacher the set's own soft labels."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations on training images of scored networks, written as in `experts`; '' for none. Stored labels have
    views of their own."""
    labels: Literal["own", "teacher", "stored"] = "own"
    """Soft labels for training. own: the set's; teacher: a teacher's logits for every augmented batch; stored: such
    logits for resized and mirrored views, made once for every epoch and kept beside the distilled set."""
    teacher: TeacherConfig | None = None
    """Teacher that runs of any method can share, such as `{network: resnet18, experts: {epochs: 50}}`; null: expert 0
    of `network`. Used if `labels` is teacher or stored."""
    temperature: Positive = 20.0
    """Divisor of the logits of teacher and network. Used if `labels` is teacher or stored."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix, such as 1; 0 for none. Needs `labels` teacher or stored."""
    keep_labels: Count | None = None
    """Number of epochs to label, repeated in turn; null: every epoch. Used if `labels` is stored."""
    top_logits: Count | None = None
    """Number of largest logits to keep of each view; null: all. Used if `labels` is stored."""
    learning_rate: Positive | None = None
    """Learning rate of networks with soft labels; null: learned with the set, or chosen on validation data. It is for
    the recipe's `network`; for other architectures it is one of several that validation data choose from."""
    schedule: Literal["step", "cosine"] = "step"
    """step: the learning rate is divided by 10 halfway; cosine: it falls to 0, step by step."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of first epochs in which the learning rate grows from a hundredth to its full value; 0: none."""
    epochs: Count | None = None
    """Epochs of training; null: those of `protocol`."""
    batch_size: Count | None = None
    """Images per step; null: those of `protocol`."""
    micro_batch: Count | None = None
    """Images computed at a time within a step, for GPUs with less memory; null: all. Gradients are summed, but batch
    normalisation sees the smaller batches. Not used on all real data."""
    weight_decay: NonNegative | None = None
    """Weight decay; null: 0.0005, and 0.05 for adamw."""

    @property
    def has_teacher(self) -> bool:
        """True if a teacher's logits are the soft labels, computed during training or stored beforehand."""
        return self.labels != "own"

    @property
    def stores_labels(self) -> bool:
        """True if the distilled set's labels are made beforehand and kept beside it."""
        return self.labels == "stored"


SELDOM = {
    "dataset": "normalisation mean std validation",
    "network": "norm pooling",
    "experts": "seed schedule warmup_epochs momentum weight_decay rho alpha adaptive curriculum keep_epochs storage "
    "precision test_every",
    "distill": "continue_from learning_rate_step_size real_batch initial labels gradient_limit unmatched_share "
    "average_decay options validate_every validation_seeds checkpoint_every",
    "recover": "first_layer rounds restarts mixed_in",
    "select": "least_share epoch hardest",
    "given": "digest",
    "metadd": "divergence variance_of threshold augmented",
    "prior": "epochs batch_size learning_rate inversion_steps",
    "evaluate": "optimiser real_epochs full fair fixed_labels augmentation labels teacher temperature cutmix "
    "keep_labels top_logits learning_rate schedule warmup_epochs epochs batch_size micro_batch weight_decay",
    "cluster": "threads_per_worker resources labels accelerator_type light device compile experts_at_a_time "
    "backbones_apart auxiliaries_apart channels_last cuda_graphs deterministic peer_timeout wait_for_nodes retries",
}
"""Section -> names, with blanks between them, of its fields that few recipes change. `recipe show` prints these fields
last in their section."""

READ_OF_DISTILL = {
    "dm": "ipc iterations learning_rate_images real_batch initial initial_step_size augmentation average_decay "
    "options validate_every validation_seeds checkpoint_every continue_from",
    "sre2l": "ipc iterations initial labels initial_step_size options checkpoint_every",
    "select": "ipc labels initial_step_size options start_epochs expert_epochs",
    "given": "ipc",
}
"""Packaged method -> keys of `distill` that it reads, with blanks between them. Users' methods may read any key.
`select` reads `start_epochs` and `expert_epochs`, because they decide which epochs of its networks are stored."""
SECTIONS_OF_METHODS = {"recover": "sre2l", "select": "select", "given": "given"}
"""Section that only one packaged method reads -> name of this method. An exception: sre2l reads `select` too if
`distill.initial` is crops."""
UNREAD_BY_MATCHING = {"datm": {"real_batch"}, "mtt": {"real_batch", "labels", "learning_rate_labels"}}
"""Packaged method that matches trajectories -> keys of `distill` that it does not read."""


def keys_read_of_distill(method: str) -> Collection[str]:
    """Keys of `distill` that a method reads; all keys for a method of the user's own."""
    if method in READ_OF_DISTILL:
        return READ_OF_DISTILL[method].split()
    return DistillConfig.model_fields.keys() - UNREAD_BY_MATCHING.get(method, set())


_SIZE: TypeAdapter[ByteSize] = TypeAdapter(Annotated[ByteSize, Field(ge=1)])


def parse_bytes(text: str) -> int:
    """Number of bytes in a size such as 8GiB, 512 MiB, 6 GB or 6G (10^9 bytes each), or a plain number of bytes.

    Raises:
        ConfigError: the text is no size, or the size is less than one byte.
    """
    try:
        return int(_SIZE.validate_python(text))
    except ValueError:
        raise ConfigError(f"invalid size {text!r}", remedy="use a number with a unit, such as 8GiB or 512MiB") from None


def _require_size(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # YAML reads a plain number of bytes as an integer
    if isinstance(value, str):
        try:
            parse_bytes(value)
        except ConfigError as failure:
            raise ValueError(f"cluster.memory: {failure}") from None
    return value


Amount = Annotated[
    NonNegative,
    _required(
        lambda value: value <= 1 or value == int(value),
        "above 1 it must be a whole number, because Ray divides no more than one unit",
    ),
]
GpuShare = Annotated[
    NonNegative,
    _required(
        lambda value: value <= 1, "a worker computes on one GPU; cluster.shards divides a set over several workers"
    ),
]
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
Resource = Annotated[
    str,
    _required(
        lambda name: name not in _RAYS_OWN and not name.startswith("accelerator_type:"),
        "it is Ray's own; use threads_per_worker, gpus_per_worker or accelerator_type",
    ),
]
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"(?:[A-Za-z0-9.-]{{1,253}}/)?{_NAME}")
_LABEL_VALUE = re.compile(rf"!?(?:in\({_NAME}(?:, ?{_NAME})*\)|{_NAME})")
LabelKey = Annotated[str, _required(_LABEL_KEY.fullmatch, "it must be a label's name, as of Kubernetes")]
LabelValue = Annotated[
    str,
    _required(_LABEL_VALUE.fullmatch, "it must be a label's value, !value, in(a,b) or !in(a,b), as Ray takes it"),
]
Accelerator = Annotated[str, _required(re.compile(_NAME).fullmatch, "it must be a name of Ray's, such as A100")]


class WorkerShape(Section):
    """Resources of one worker on Ray, and the nodes that may run it."""

    threads_per_worker: Count = 1
    """CPU threads per worker; the number affects rounding."""
    gpus_per_worker: GpuShare | None = None
    """GPUs per worker on Ray, at most 1; a fraction lets several share one. null: 1, or 0 if the cluster has none."""
    resources: dict[Resource, Amount] = {}
    """Custom Ray resources per worker, such as {fast_disk: 1}."""
    labels: dict[LabelKey, LabelValue] = {}
    """Labels of the nodes that may run workers, such as {zone: a}; values may be "!a", "in(a,b)" or "!in(a,b)"."""
    accelerator_type: Accelerator | None = None
    """GPU model by its name in Ray, such as A100; null: any."""


class ClusterConfig(WorkerShape):
    """How the work is spread. Keys such as device, precision and compile change results, but only by rounding."""

    workers: Count | None = None
    """Parallel workers; null: as many as CPUs (or GPUs) allow."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if a worker has one, else the CPU."""
    compile: bool = True
    """Compile the networks' steps if there is a C++ compiler."""
    shards: Count = 1
    """Workers per distillation, each with some of the classes."""
    experts_at_a_time: Count | None = None
    """Experts trained at once per worker; null: the fastest number up to 8, with no idle workers. Affects rounding."""
    backbones_apart: bool = False
    """Give every network under `backbones` workers of its own."""
    auxiliaries_apart: bool = False
    """Give every auxiliary of metadd workers of its own; not for methods that make a set in pieces, such as sre2l."""
    memory: Annotated[str | None, BeforeValidator(_require_size)] = None
    """Memory that a distilling worker may take, GPU or main, such as 8GiB; null: all that is free."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Precision of products; auto: tf32 on GPUs that have it, as published. bfloat16: datm, mtt, dm; on CPUs too."""
    channels_last: bool | None = None
    """Keep feature maps channels-last: faster on CPUs, coarser rounding. null: true except on GPUs in float32."""
    cuda_graphs: bool | None = None
    """Launch all kernels of a student step on a GPU together; null: if a call has little work. Untried on GPUs."""
    deterministic: bool = False
    """Compute every sum in a fixed order, more slowly, so that a GPU gives the same bits in every run."""
    peer_timeout: Annotated[float, Field(ge=0.1, le=86_400)] = 300.0
    """Seconds without an answer before a worker is declared lost; must exceed one student step."""
    progress_timeout: Annotated[float, Field(ge=0.1, le=7 * 86_400)] = 3600.0
    """Seconds without a step before a worker counts as stuck. After three steps: 20 times its slowest step if shorter,
    but at least peer_timeout."""
    wait_for_nodes: Annotated[float, Field(ge=0, le=30 * 86_400)] | None = None
    """Seconds to wait for free resources (at least 3) and for nodes on demand; null: 60, 1800 if no node has a CPU."""
    wait_for_run: Annotated[float, Field(ge=0, le=7 * 86_400)] = 0.0
    """Seconds to wait for each run that another command works on; 0 does not wait. To see if a command on another
    machine is alive takes up to 60 s more."""
    checkpoint_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Most seconds between two checkpoints; longer if checkpoints would take over 5 % of the time."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Number of times in a row that a task may lose a worker without saving new work in between."""
    log_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Logger of curves, besides Ray's metrics. tensorboard writes to <out>/tensorboard. Each logger needs its extra,
    such as datm-ray[wandb]."""
    light: WorkerShape | None = None
    """Resources of workers for experts, validation and evaluation; null: those for distillation."""

    def shaped(self, *, light: bool) -> ClusterConfig:
        """Section with the resources of the workers that a task needs.

        Args:
            light: True for workers for experts, validation and evaluation: a copy in which `cluster.light` replaces the
                resources, or this section itself if the recipe has no `cluster.light`. False for workers that distil:
                this section itself.
        """
        if not light or self.light is None:
            return self
        return self.model_copy(update={name: getattr(self.light, name) for name in WorkerShape.model_fields})

    def given_gpus(self, amount: float) -> ClusterConfig:
        """Copy in which `gpus_per_worker`, in this section and in `light`, is `amount` if it was null."""
        light = self.light
        if light is not None and light.gpus_per_worker is None:
            light = light.model_copy(update={"gpus_per_worker": amount})
        mine = amount if self.gpus_per_worker is None else self.gpus_per_worker
        return self.model_copy(update={"gpus_per_worker": mine, "light": light})

    @property
    def memory_bytes(self) -> int | None:
        """Value of `memory` in bytes; `None` if it is null."""
        return None if self.memory is None else parse_bytes(self.memory)
