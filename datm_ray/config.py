"""The configuration of a run: what is computed (`RunConfig`) and how it is spread over machines (`cluster`).

Frozen, strict models: an unknown key, a wrong type or an impossible range is a `ConfigError` with one clear line,
before anything starts. A run is one YAML file; `datm-ray recipe show NAME` prints a packaged one to start from.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from datm_ray.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Epoch = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


PUBLISHED_AUGMENTATION = "color_crop_cutout_flip_scale_rotate"
"""The DSA operations of MTT, FTD, TESLA and DATM, for experts, students and evaluation alike."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _none_is_null(cls, values: object) -> object:
        """YAML's null is what nobody types on a command line."""
        if not isinstance(values, Mapping):
            return values
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if key in optional and each in ("none", "None") else each for key, each in values.items()}


class DatasetConfig(Section):
    """Which images, and how they are normalised."""

    source: str = "digits"
    """digits, cifar10, cifar100, tiny-imagenet, folder or parquet."""
    path: str | None = None
    """Where the data set lies; not needed for digits."""
    resize: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels to resize every image to; null keeps the size."""
    normalisation: Literal["auto", "zca", "standard"] = "auto"
    """zca: whitening with eps 0.1, as published; standard: mean and standard deviation per channel; auto: zca up to
    64x64 pixels, standard above."""
    validation: Fraction = 0.1
    """Share of the training images set aside for validation. Nothing is ever chosen on the test set."""

    @property
    def kind(self) -> Literal["zca", "standard"]:
        """`normalisation`, which must not be auto any more: see `RunConfig.resolved`."""
        if self.normalisation == "auto":
            raise ValueError(_UNRESOLVED)
        return self.normalisation

    def resolved(self, size: tuple[int, int]) -> DatasetConfig:
        """Copy with the normalisation that auto means for images of that height and width in pixels.

        Fitting zca takes memory with the fourth power of an image's side and time with the sixth. Estimates on two CPU
        cores: 6 GB and half an hour at 64x64 RGB, the largest published size, 30 GB and six hours at 96x96.
        """
        if self.normalisation != "auto":
            return self
        return self.model_copy(update={"normalisation": "zca" if size[0] * size[1] <= MOST_WHITENED else "standard"})


_UNRESOLVED = "the configuration still leaves something to the size of the images; call RunConfig.resolved first"
MOST_WHITENED = 64 * 64
"""Pixels of an image up to which normalisation auto means zca."""
SMALLEST_MAP = 3
"""Pixels a side that depth null leaves of the last maps at least, where the network then has more than two blocks."""
PUBLISHED_DEPTH = 3
"""Depth of mlp in the literature; all architectures but convnet have it where depth is null."""


def depth_for(architecture: str, size: tuple[int, int]) -> int:
    """Depth of a network without one, for images of that height and width in pixels.

    convnet gets as many blocks as leave maps of 3 pixels a side or more, and 2 at least: 2 up to 23 pixels, 3 from 24,
    4 from 48, 5 from 96, 6 from 192. Published networks for 28, 32, 64 and 128 pixels have the same. mlp gets its
    published 3 layers at any size; other architectures ignore depth.
    """
    if architecture != "convnet":
        return PUBLISHED_DEPTH
    return max(2, (min(size) // SMALLEST_MAP).bit_length() - 1)


PUBLISHED_WIDTH = 128
"""Channels of ConvNet's convolutions; other architectures have their own published width where theirs is this."""


class NetworkConfig(Section):
    """The backbone: experts, students and evaluation networks."""

    architecture: str = "convnet"
    """Name in the registry of networks."""
    width: Count = PUBLISHED_WIDTH
    """Channels of every convolution of convnet, 128 as published; others are narrower or wider in proportion."""
    depth: Count | None = None
    """Convolution blocks, each halving the image; null follows its smaller side: 2 up to 23 pixels, 3 from 24, 4 from
    48, 5 from 96, 6 from 192. mlp has this many layers, 3 where it is null."""
    norm: Literal["instance", "batch", "group", "none"] = "instance"
    """Normalisation; batch cannot be matched."""
    pooling: Literal["avg", "max", "none"] = "avg"
    """2x2 pooling that ends every block."""

    def resolved(self, size: tuple[int, int]) -> NetworkConfig:
        """Copy with the depth that null means for images of that height and width in pixels."""
        if self.depth is not None:
            return self
        return self.model_copy(update={"depth": depth_for(self.architecture, size)})


class BackboneConfig(Section):
    """A further network that is matched together with the first, on experts of its own."""

    network: NetworkConfig
    """The network; its experts are trained as those of the first."""
    weight: Positive = 1.0
    """Of its matching loss; the first network's has weight 1."""


class ExpertConfig(Section):
    """Training of the expert trajectories on real data: SGD as in MTT, or GSAM as in FTD and DATM."""

    count: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Number of experts."""
    epochs: Count = 100
    """Epochs of each; parameters are stored before the first and after every one."""
    batch_size: Count = 256
    """Images per SGD step; the last, smaller batch is kept."""
    learning_rate: Positive = 0.01
    """Constant."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Zero as published: trajectories without it are easier to imitate."""
    weight_decay: NonNegative = 0.0
    """L2 penalty."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations joined by underscores; '' for none."""
    optimiser: Literal["sgd", "gsam"] = "sgd"
    """gsam takes two gradients a step and finds flatter trajectories, which are easier to imitate."""
    rho: Positive = 0.01
    """Of gsam: length of the step to the worst point nearby; 0.01 in all published runs, not FTD's default of 2."""
    alpha: NonNegative = 0.3
    """Of gsam: share that is taken off of the gradient's part at right angles to the one at the worst point."""
    adaptive: bool = True
    """Of gsam: scale the neighbourhood with the size of each parameter."""
    keep_epochs: Count | None = None
    """Epochs up to this one are stored, and the last one; null stores those that the recipe can match."""
    storage: Literal["float32", "float16", "bfloat16"] = "float32"
    """How parameters are stored; two bytes each halve the store and what is read of it, and round the trajectories."""
    test_every: Annotated[int, Field(ge=0)] = 0
    """Epochs between measurements of test accuracy, to look at only; 0 for none. Stored with the epochs that are."""


class DistillConfig(Section):
    """Difficulty-aligned trajectory matching."""

    ipc: Count = 10
    """Synthetic images per class."""
    iterations: Count = 10_000
    """Matching iterations."""
    student_steps: Count = 80
    """SGD steps T of the student in one iteration."""
    expert_epochs: Count = 2
    """How many epochs past the start the target lies (M)."""
    batch_size: Count = 100
    """Synthetic images per student step."""
    first_start: Epoch = 0
    """Earliest start epoch."""
    start_bound: Count = 10
    """First start epoch that is too late at iteration 0."""
    final_start_bound: Count = 20
    """First start epoch that is too late once the range has grown; equal to start_bound for a fixed range."""
    expand_iterations: Annotated[int, Field(ge=0)] = 1000
    """Iterations over which the bound grows; 0 for a fixed range."""
    learning_rate_images: Positive = 100.0
    """Of SGD on the pixels, momentum 0.5."""
    learning_rate_labels: NonNegative = 2.0
    """Of SGD on the soft-label logits, momentum 0.9; 0 keeps the initial soft labels."""
    learning_rate_step_size: NonNegative = 1e-5
    """Of SGD on the student's step size, momentum 0.5."""
    initial: Literal["correct", "random"] = "correct"
    """Real images to start from: those that an expert classifies correctly, as DATM, or any."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: the experts' mean correct logits, then learned, as DATM; hard: the classes, not learned, as MTT."""
    initial_step_size: Positive = 0.01
    """The student's step size at the start."""
    threshold: Positive = 1.0
    """Iterations whose matching loss exceeds this are skipped and counted, as are those that overflow."""
    overshoot: Positive | None = 10.0
    """A gradient is shortened where a step along it would, to first order, lower the matching loss by more than so many
    times its value: one that explodes ruins a set. null shortens none, as published."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations of the student's steps."""
    validate_every: Count = 500
    """Iterations between trainings on the current set that are scored on validation data, to choose the set to keep."""
    validation_seeds: Count = 1
    """Networks trained at each validation."""
    checkpoint_every: Count = 100
    """Iterations between checkpoints."""


class AuxiliaryExpertConfig(ExpertConfig):
    """Training of MetaDD's auxiliaries, of which only the last epoch is used."""

    count: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of experts of each network; they take turns."""
    epochs: Count = 50
    """Epochs of each."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """These are not imitated, so they may be trained as networks usually are."""
    keep_epochs: Count | None = 1
    """Epochs up to this one are stored, and the last one."""


class MetaConfig(Section):
    """MetaDD: losses on class activation maps, so that the set works on networks that it was not made with."""

    auxiliaries: Annotated[tuple[NetworkConfig, ...], Field(strict=False, min_length=1, max_length=16)]
    """Architectures that look at the images beside the first backbone, e.g. `[{architecture: resnet18}]`."""
    experts: AuxiliaryExpertConfig = AuxiliaryExpertConfig()
    """How the auxiliaries are trained; only the last epoch is used. Several experts of each take turns."""
    variance: NonNegative = 1.0
    """Weight of the maps' variance over the networks."""
    invariance: NonNegative = 0.01
    """Weight of the auxiliaries' cross-entropy and divergence from the backbone."""
    position: NonNegative = 0.1
    """Weight of evidence against the class."""
    divergence: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Of the auxiliaries from the backbone, within invariance; negative pushes them apart."""
    variance_of: Literal["maps", "logits"] = "maps"
    """logits: a control, the variance of the networks' logits in place of that of their maps."""
    threshold: Fraction = 0.5
    """Of a map from 0 to 1, from which on a pixel counts as a feature; decides the reported ratio only."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the images, drawn anew for every iteration, that the losses look at."""

    @model_validator(mode="after")
    def _auxiliaries_differ(self) -> MetaConfig:
        for number, network in enumerate(self.auxiliaries):
            if network in self.auxiliaries[:number]:
                raise ValueError(
                    f"metadd.auxiliaries.{number} is there already; give each network once, and raise "
                    "metadd.experts.count for several experts of it"
                )
        return self


class EvaluateConfig(Section):
    """Training fresh networks on the synthetic set and scoring them on the test set."""

    protocol: Literal["published", "short", "quick"] = "published"
    """published: 1001 epochs, learning rate divided by ten half way; short: 500 epochs; quick: 20, also at validation,
    to see that a run works, not how good its set is."""
    seeds: Count = 5
    """Fresh networks for each row of the table."""
    networks: Annotated[tuple[NetworkConfig, ...], Field(strict=False, max_length=64)] = ()
    """Architectures to score the set on, beside the table, each with the learned and with a tuned step size."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """adamw for what SGD does not train, as transformers; the learned step size is SGD's, so all are tuned then."""
    real_epochs: Count = 100
    """Epochs of the control that trains on all real data."""
    fair: bool = False
    """Also train what DD-Ranking's label-robust and augmentation-robust scores need: three more rows of networks."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations while training."""


class ClusterConfig(Section):
    """How the work is spread. Changes no result but in the last bits of float sums (threads, device, compilation)."""

    workers: Count | None = None
    """Parallel workers; null takes as many as the CPUs (or GPUs) allow."""
    threads_per_worker: Count = 1
    """CPU threads of each worker. Fixed, because float sums depend on how many threads share them."""
    gpus_per_worker: NonNegative | None = None
    """GPUs of each worker on Ray; a fraction lets several share one. null takes one each where the cluster has GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where a worker has one."""
    compile: bool = True
    """Compile the student step where a C++ compiler is present."""
    shards: Count = 1
    """Workers that share one distillation, each with some of the classes."""
    experts_at_a_time: Count | None = None
    """Experts that one worker trains at a time, in shared calls; null takes the fastest, at most 8."""
    backbones_apart: bool = False
    """Whether every backbone gets workers of its own, as many as there are shards."""
    auxiliaries_apart: bool = False
    """Whether every auxiliary network of metadd gets workers of its own, as many as there are shards."""
    memory: str | None = None
    """What one distilling worker may take, e.g. 8GiB; null takes what the device has free."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of the student step's products; tf32 and bfloat16 need a GPU."""
    channels_last: bool = True
    """Keep maps of experts and students with their channels innermost: faster on CPUs, and rounds more coarsely."""
    peer_timeout: Annotated[float, Field(ge=0.1, le=86_400)] = 300.0
    """Seconds after which a worker that others wait for counts as lost; a student step must be shorter."""
    wait_for_nodes: Annotated[float, Field(ge=0, le=7 * 86_400)] = 0.0
    """Seconds to wait for machines where there is no room: for cluster.workers at the start, and for any after losses,
    where it is a minute at least. A cluster that grows on demand needs minutes."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often in a row a task that gets no further is given to new workers after a worker was lost."""
    log_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Curves beside Ray's own metrics: tensorboard writes to <out>/tensorboard; both must be installed."""

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_is_a_size(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # YAML reads a plain number of bytes as one
        if isinstance(value, str):
            try:
                parse_bytes(value)
            except ConfigError as failure:
                raise ValueError(f"cluster.memory: {failure}") from None
        return value

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else parse_bytes(self.memory)


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b|([kmgt]))?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size in words: 8GiB, 512 MiB, 6 GB (of 10^9 bytes), 8G (the same), or a plain number of bytes.

    Raises:
        ConfigError: it cannot be read, or is less than one byte.
    """
    match = _SIZE.fullmatch(text)
    size = 0
    if match:
        number, prefix, binary, short = match.groups()
        power = " kmgt".index((prefix or short or " ").lower())
        value = float(number) * (1024 if binary else 1000) ** power
        size = int(value) if math.isfinite(value) else 0
    if size < 1:
        raise ConfigError(f"{text!r} is no size of memory", remedy="write it like 8GiB, 512MiB or 6GB")
    return size


@dataclass(frozen=True)
class Role:
    """What one worker of a set computes."""

    backbones: tuple[int, ...]
    """That it matches, by number."""
    seen_by: tuple[int, ...]
    """Networks of metadd that it holds: 0 is the first backbone, then the auxiliaries."""


RESERVED_NAMES = frozenset({"experts", "controls", "report.html", "summary.json", "tensorboard", "transforms", "wandb"})
"""What lies beside the runs in an output folder."""


class RunConfig(Section):
    """One run: experts, distillation, evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Names the run's folder and its row in tables."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Everything random follows from it."""
    dataset: DatasetConfig = DatasetConfig()
    network: NetworkConfig = NetworkConfig()
    backbones: Annotated[tuple[BackboneConfig, ...], Field(strict=False)] = ()
    """Further networks to match at the same time, each `{network: {...}, weight: 1.0}`; the first evaluates."""
    experts: ExpertConfig = ExpertConfig()
    distill: DistillConfig = DistillConfig()
    metadd: MetaConfig | None = None
    """Losses that make the set work on other networks; null leaves them out. Such as `{auxiliaries: [...]}`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _ranges_are_possible(self) -> RunConfig:
        if self.name in RESERVED_NAMES:
            raise ValueError(f"name is {self.name!r}, which is a file or folder beside the runs; choose another name")
        d = self.distill
        if d.first_start >= d.start_bound:
            raise ValueError(f"distill.first_start {d.first_start} leaves no start below start_bound {d.start_bound}")
        if d.start_bound > d.final_start_bound:
            raise ValueError(f"distill.start_bound {d.start_bound} exceeds final_start_bound {d.final_start_bound}")
        latest = d.final_start_bound - 1 + d.expert_epochs
        if latest > self.experts.epochs:
            raise ValueError(
                f"distill.final_start_bound {d.final_start_bound} with expert_epochs {d.expert_epochs} needs epoch "
                f"{latest}, beyond the trajectory's {self.experts.epochs} (experts.epochs)"
            )
        keep = self.experts.keep_epochs
        if keep is not None and keep < min(latest, self.experts.epochs - 1):
            raise ValueError(f"experts.keep_epochs {keep} leaves out epoch {latest}, which the recipe can match")
        if d.expand_iterations == 0 and d.start_bound != d.final_start_bound:
            raise ValueError("distill.expand_iterations is 0, so start_bound must equal final_start_bound")
        if self.cluster.backbones_apart and not self.backbones:
            raise ValueError("cluster.backbones_apart is set, but the recipe has no further network under backbones")
        if self.cluster.auxiliaries_apart and self.metadd is None:
            raise ValueError("cluster.auxiliaries_apart is set, but the recipe has no metadd section")
        if self.cluster.workers is not None and self.workers_per_set > self.cluster.workers:
            raise ValueError(
                f"one set takes {self.workers_per_set} workers at once (cluster.shards, times the networks that "
                f"cluster.backbones_apart and auxiliaries_apart set apart), but cluster.workers is "
                f"{self.cluster.workers}"
            )
        return self

    @property
    def is_matchable(self) -> bool:
        """Whether every network of the run can be matched, and not only trained."""
        return not self._unmatchable

    def require_matchable(self) -> None:
        """Raise a `ConfigError` if a network of the run can only be trained, and not matched."""
        for key in self._unmatchable:
            raise ConfigError(
                f"{key}.norm is 'batch', which cannot be matched",
                "batch statistics couple the images of a batch, so its gradient is not a sum over images",
                f"use {key}.norm=instance; `datm-ray experts` trains networks with any norm",
            )

    @property
    def _unmatchable(self) -> list[str]:
        """Keys of the networks that cannot be matched."""
        networks = {"network": self.network} | {
            f"backbones.{number}.network": backbone.network for number, backbone in enumerate(self.backbones)
        }
        return [key for key, network in networks.items() if network.norm == "batch"]

    def resolved(self, size: tuple[int, int]) -> RunConfig:
        """Copy for images of that height and width in pixels, in which no normalisation is auto and no depth is null.

        A run is the same as one that gives these values itself. Identities, fingerprints and everything that is
        written to a run's folder come from a resolved configuration.

        Raises:
            ConfigError: two of metadd.auxiliaries have become the same network.
        """
        changes: dict[str, Any] = {
            "dataset": self.dataset.resolved(size),
            "network": self.network.resolved(size),
            "backbones": tuple(
                each.model_copy(update={"network": each.network.resolved(size)}) for each in self.backbones
            ),
        }
        if self.metadd is not None:
            auxiliaries = tuple(each.resolved(size) for each in self.metadd.auxiliaries)
            changes["metadd"] = self.metadd.model_copy(update={"auxiliaries": auxiliaries})
        scored = dict.fromkeys(each.resolved(size) for each in self.evaluate.networks)
        changes["evaluate"] = self.evaluate.model_copy(update={"networks": tuple(scored)})
        return parse_config(self.model_copy(update=changes).model_dump(), self.name)

    def each_backbone(self) -> list[RunConfig]:
        """The run with each of its networks alone: what decides that network's experts."""
        networks = [self.network, *(backbone.network for backbone in self.backbones)]
        alone = {"backbones": (), "metadd": None}
        return [self.model_copy(update={"network": network, **alone}) for network in networks]

    def each_auxiliary(self) -> list[RunConfig]:
        """The run with each auxiliary network of metadd alone: what decides that network's experts."""
        if self.metadd is None:
            return []
        alone = {"backbones": (), "metadd": None, "experts": self.metadd.experts}
        return [self.model_copy(update={"network": network, **alone}) for network in self.metadd.auxiliaries]

    @property
    def weights(self) -> list[float]:
        """Of each backbone's matching loss."""
        return [1.0, *(backbone.weight for backbone in self.backbones)]

    @property
    def workers_per_set(self) -> int:
        """Workers that distil one set together."""
        return self.cluster.shards * len(self.roles)

    @property
    def scored_networks(self) -> tuple[NetworkConfig, ...]:
        """Architectures that the set is scored on beside the table, the backbone always among them; or none."""
        others = [network for network in self.evaluate.networks if network != self.network]
        return (self.network, *others) if self.evaluate.networks else ()

    @property
    def whole_role(self) -> Role:
        """Of one worker, or row of shards, that does everything."""
        return Role(tuple(range(len(self.weights))), tuple(range(0 if self.metadd is None else self.networks_looking)))

    @property
    def networks_looking(self) -> int:
        """Networks of metadd: the first backbone and the auxiliaries."""
        return 1 + len(self.each_auxiliary())

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the rows of workers that distil one set together; the first has the first backbone."""
        cluster = self.cluster
        backbones, auxiliaries = range(len(self.weights)), range(1, self.networks_looking)
        first = Role(
            backbones=(0,) if cluster.backbones_apart else tuple(backbones),
            seen_by=() if self.metadd is None else (0,) if cluster.auxiliaries_apart else (0, *auxiliaries),
        )
        more = [Role((number,), ()) for number in backbones[1:] if cluster.backbones_apart]
        return (first, *more, *(Role((), (number,)) for number in auxiliaries if cluster.auxiliaries_apart))

    @property
    def latest_matched(self) -> int:
        """The last epoch of a trajectory that is ever a start or a target."""
        return self.distill.final_start_bound - 1 + self.distill.expert_epochs

    @property
    def kept_bound(self) -> int:
        """The last epoch of each expert that is stored, but for the very last one."""
        return self.experts.keep_epochs or self.latest_matched

    @property
    def kept_epochs(self) -> tuple[int, ...]:
        """The epochs of each expert that are stored: those that may be matched, and the last, whose logits are used."""
        return (*range(min(self.kept_bound + 1, self.experts.epochs)), self.experts.epochs)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the synthetic set and each single accuracy, as plain data, of a resolved run.

        Not `cluster`; not where the data set lies, for its content has a fingerprint; not how many networks are scored,
        with which optimiser and for which scores, for more can be added to a finished run (results of each have places
        of their own); and not what of the experts is kept beyond what is matched.
        """
        left_out: dict[str, Any] = {
            "cluster": True,
            "dataset": {"path"},
            "evaluate": {"seeds", "networks", "optimiser", "fair"},
            "experts": {"keep_epochs", "test_every"},
        }
        identity = self.model_dump(exclude=left_out)
        for name, default in (("initial", "correct"), ("labels", "soft"), ("overshoot", None)):
            if identity["distill"][name] == default:  # as before there was such a choice
                identity["distill"].pop(name)
        if self.metadd is None:  # as before there was such a section
            identity.pop("metadd")
        else:
            for name in ("keep_epochs", "test_every"):
                identity["metadd"]["experts"].pop(name)
        return identity


def stable_hash(value: Any) -> str:
    """Sixteen hex digits that depend on the content of plain data and on nothing else."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expert_fingerprint(config: RunConfig, dataset_fingerprint: str) -> str:
    """Sixteen hex digits shared by all runs that can use the same experts, and by no others.

    Raises:
        ValueError: the configuration is not resolved, see `RunConfig.resolved`.
    """
    if config.network.depth is None:
        raise ValueError(_UNRESOLVED)
    recipe = config.experts.model_dump(exclude={"count", "keep_epochs", "test_every"})
    if config.experts.optimiser == "sgd":
        recipe = {name: value for name, value in recipe.items() if name not in ("rho", "alpha", "adaptive")}
    return stable_hash(
        {
            "dataset": dataset_fingerprint,
            "normalisation": config.dataset.kind,
            "network": config.network.model_dump(),
            "experts": recipe,
            "seed": config.seed,
        }
    )


def parse_config(values: Mapping[str, Any], origin: str) -> RunConfig:
    """Validate plain data as a `RunConfig`.

    Args:
        origin: what to call the source in messages, e.g. the file's name.

    Raises:
        ConfigError: the first thing that is wrong, in one line.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as failure:
        raise _config_error(failure, origin) from None


def load_config(path: str) -> RunConfig:
    """Read a run's YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a valid configuration.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST_TEXT + 1)
    except OSError as failure:
        raise ConfigError(f"cannot read {path}: {failure.strerror}", remedy="check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file", remedy="give a recipe's name or a YAML file") from None
    return load_config_text(text, path, default_name=_plain_name(Path(path).stem))


def _plain_name(stem: str) -> str:
    """A file's name as a run may be called; "run" where nothing is left of it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"


def load_config_text(text: str, origin: str, default_name: str = "run") -> RunConfig:
    """As `load_config`, from the file's text.

    Args:
        origin: what to call the source in messages.
        default_name: the run's name where the text gives none.
    """
    return parse_config({"name": default_name, **_read_sections(text, origin)}, origin)


def load_recipe_of_run(text: str, origin: str) -> RunConfig:
    """The recipe that `to_yaml` wrote for a run, from the file's text.

    It names every field, so that one which is missing was not there yet, and the run was made without it.
    """
    values = _read_sections(text, origin)
    distill = values.get("distill")
    if isinstance(distill, dict):
        distill.setdefault("overshoot", None)
    return parse_config(values, origin)


def _read_sections(text: str, origin: str) -> dict[str, Any]:
    values = _read_yaml(text, origin)
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} holds no configuration", remedy="compare with `datm-ray recipe show`")
    return values


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Apply `section.field=value` overrides; values are read as YAML.

    The value of a field of text is taken as it stands, without blanks around it, unless it is empty, null or in
    quotes.

    Raises:
        ConfigError: not an assignment, unknown key, wrong type or impossible range.
    """
    values = config.model_dump()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment!r} is no assignment", remedy="write --set section.field=value")
        *sections, field = key.strip().split(".")
        target = values
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise ConfigError(f"--set {assignment!r}: {section!r} is no section", remedy=_known_keys(()))
        bare = text.strip(" \t")
        is_text = _takes_text([*sections, field]) and bare not in ("", "null") and not _QUOTED.fullmatch(bare)
        target[field] = bare if is_text else _read_yaml(text, f"--set {assignment!r}")
    return parse_config(values, "--set")


_QUOTED = re.compile(r"\"(.*)\"|'(.*)'", re.DOTALL)


def _takes_text(path: Sequence[str]) -> bool:
    """Whether the field takes any text, so that a path such as `a #1` or a name such as 1e3 stays what it is."""
    model: type[BaseModel] | None = RunConfig
    for section in path[:-1]:
        field = model.model_fields.get(section) if model else None
        model = _section_of(field.annotation) if field else None
    field = model.model_fields.get(path[-1]) if model else None
    return field is not None and str in (field.annotation, *get_args(field.annotation))


def network_names(networks: Sequence[NetworkConfig]) -> list[str]:
    """Short: the architecture, a width that is not the published one, and what else tells those of one apart."""

    def told(network: NetworkConfig) -> Iterator[str]:
        alike = [each for each in networks if each.architecture == network.architecture]
        for field in NetworkConfig.model_fields:
            value = getattr(network, field)
            if any(getattr(each, field) != value for each in alike) or (field == "width" and value != PUBLISHED_WIDTH):
                yield f"{field} {value}"

    details = [", ".join(told(network)) for network in networks]
    return [
        f"{network.architecture} ({detail})" if detail else network.architecture
        for network, detail in zip(networks, details, strict=True)
    ]


def scored_on(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """The run, to be scored on the architectures of these names, see `networks_named`, too."""
    evaluate = config.evaluate.model_copy(update={"networks": tuple(networks_named(config, names))})
    return config.model_copy(update={"evaluate": evaluate})


def networks_named(config: RunConfig, names: Sequence[str]) -> dict[NetworkConfig, str]:
    """The networks that are meant by names of architectures, each with the name that stands for it.

    Args:
        names: NAME or NAME:WIDTH. A NAME is every network of that architecture that the recipe has, or else the
            published one; with a WIDTH it is the first of them, narrower or wider.

    Raises:
        ConfigError: a width that is no number.
    """
    own = [config.network, *(backbone.network for backbone in config.backbones)]
    own += config.metadd.auxiliaries if config.metadd else ()
    networks: dict[NetworkConfig, str] = {}
    for name in map(str.strip, names):
        architecture, _, width = name.partition(":")
        if width and not (width.isdecimal() and int(width)):
            raise ConfigError(
                f"--arch {name!r} has no number after the colon", remedy="write NAME:WIDTH, as resnet18:32"
            )
        found = [each for each in own if each.architecture == architecture] or [
            NetworkConfig(architecture=architecture)
        ]
        if width:
            found = [found[0].model_copy(update={"width": int(width)})]
        for each in found:
            networks.setdefault(each, name)
    return networks


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML with a comment beside every field, readable by `load_config`."""
    lines: list[str] = []
    for name in RunConfig.model_fields:
        value = getattr(config, name)
        if not isinstance(value, Section):
            lines.append(_yaml_line(config, name))
            continue
        lines += ["", f"{name}:  # {_first_sentence(type(value).__doc__)}"]
        lines += ["  " + _yaml_line(value, field) for field in type(value).model_fields]
    return "\n".join(lines) + "\n"


def _yaml_line(section: Section, field: str) -> str:
    plain = section.model_dump(mode="json")[field]
    value = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10_000)
    text = f"{field}: {value.removesuffix(chr(10)).removesuffix('...').strip()}"
    return f"{text:<40}  # {_first_sentence(type(section).model_fields[field].description)}"


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split())


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number and 2024-11-20 is text, and which no key may enter twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)

    def get_single_node(self) -> yaml.Node | None:
        """The document, whose aliases do not make much out of little, nor anything without an end."""
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _LARGEST_TEXT:
            raise yaml.constructor.ConstructorError(None, None, "its aliases stand for too much", node.start_mark)
        return node


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """Nodes below and with this one, were every alias written out; infinite where one stands in itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = (each for part in parts for each in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(_written_out(each, known) for each in inner)
    return known[id(node)]


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    """An integer of 128 bits at most: larger ones are no setting, and Python refuses to print the largest."""
    value = int(loader.construct_yaml_int(node)) if len(node.value) < 100 else 2**128
    if abs(value) >= 2**128:
        raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as the text it is."""


# YAML 1.1, which PyYAML implements, wants a point and a sign: 1.0e-5.
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


_LARGEST_TEXT = 2**16  # characters of a recipe, and values in it; PyYAML takes quadratic time for some


def _read_yaml(text: str, origin: str) -> Any:
    if len(text) > _LARGEST_TEXT:
        raise ConfigError(f"{origin} is too long for a recipe", "it is another file", "give a recipe's name or file")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as failure:
        line = f" at line {failure.problem_mark.line + 1}" if failure.problem_mark else ""
        what = f"not valid YAML{line}: {failure.problem}"
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # PyYAML does not guard the conversions of explicit tags such as !!int, nor its own depth.
        what = "not valid YAML"
    raise ConfigError(f"{origin} is {what}", remedy="compare with `datm-ray recipe show`")


def _config_error(failure: ValidationError, origin: str) -> ConfigError:
    # A key that is misspelt is missing too; what was typed tells more.
    first = min(failure.errors(), key=lambda error: error["type"] != "extra_forbidden")
    path = tuple(str(part) for part in first["loc"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{origin}: unknown key {key!r}", remedy=_known_keys(path))
    if first["type"] == "value_error":
        return ConfigError(f"{origin}: {str(first['msg']).removeprefix('Value error, ')}")
    message = str(first["msg"])
    if first["type"] == "model_type":
        message = "input should be a section of keys and values"
    if first["type"] == "tuple_type":
        message = "input should be a list: [...]"
    remedy = "put it into quotes" if first["type"] == "string_type" else ""
    return ConfigError(f"{origin}: {key} is {first['input']!r}: {message[0].lower()}{message[1:]}", remedy=remedy)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or holds many of."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _known_keys(path: Sequence[str]) -> str:
    """A remedy: the nearest existing key, or all keys of the section."""
    fields = dict(RunConfig.model_fields)
    for part in path[:-1]:
        if part.isdigit():  # a place in a list of sections
            continue
        section = _section_of(fields[part].annotation) if part in fields else None
        if section is None:
            break
        fields = dict(section.model_fields)
    near = difflib.get_close_matches(path[-1], fields, n=1) if path else []
    if near:
        return f"did you mean {'.'.join([*path[:-1], near[0]])!r}?"
    return f"known keys: {', '.join(fields)}"
