"""The configuration of a run: what is computed (`RunConfig`) and how it is spread over machines (`ClusterConfig`).

All models are frozen and strict. An unknown key, a wrong type or an impossible range raises a `ConfigError` of one line
before anything starts. A run is one YAML file; `datm-ray recipe show NAME` prints a packaged one to start from.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import textwrap
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
"""DSA operations of MTT, FTD, TESLA and DATM: the default for experts, students and evaluation."""


class Section(BaseModel):
    """Base class of all sections: immutable, without unknown keys, without silent conversion of types."""

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
    """Which images are used, and how they are normalised."""

    source: str = "digits"
    """digits, cifar10, cifar100, tiny-imagenet, folder or parquet."""
    path: str | None = None
    """Path of the data set; not needed for digits."""
    resize: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels to resize every image to; null keeps the size."""
    normalisation: Literal["auto", "zca", "standard"] = "auto"
    """zca: whitening with eps 0.1, as published. standard: mean and deviation per channel. auto: zca up to 64x64
    pixels, else standard."""
    validation: Fraction = 0.1
    """Share of training images used for validation, in (0, 1)."""

    @property
    def kind(self) -> Literal["zca", "standard"]:
        """Value of `normalisation` in a resolved configuration, see `RunConfig.resolved`.

        Raises:
            ValueError: the value is still auto.
        """
        if self.normalisation == "auto":
            raise ValueError(_UNRESOLVED)
        return self.normalisation

    def resolved(self, size: tuple[int, int]) -> DatasetConfig:
        """Copy in which "auto" is replaced by the normalisation for images of `size` (height, width) in pixels.

        Memory of fitting zca grows with the fourth power of an image's side, time with the sixth. Estimates on two CPU
        cores: 6 GB and half an hour at 64x64 RGB, the largest published size; 30 GB and six hours at 96x96.
        """
        if self.normalisation != "auto":
            return self
        return self.model_copy(update={"normalisation": "zca" if size[0] * size[1] <= MOST_WHITENED else "standard"})


_UNRESOLVED = "the configuration still has values that depend on the size of the images; call RunConfig.resolved first"
MOST_WHITENED = 64 * 64
"""Largest number of pixels in an image for which normalisation "auto" means zca, inclusive."""
SMALLEST_MAP = 3
"""Least side in pixels of the last feature maps when depth is null; smaller images get two blocks all the same."""
PUBLISHED_DEPTH = 3
"""Depth of mlp in the literature; every architecture but convnet gets this value where depth is null."""


def depth_for(architecture: str, size: tuple[int, int]) -> int:
    """Default depth of a network for images of `size` (height, width) in pixels.

    convnet gets as many blocks as leave feature maps of at least 3 pixels a side, and at least 2 blocks. By the image's
    smaller side these are 2 up to 23 pixels, 3 from 24, 4 from 48, 5 from 96, 6 from 192. Published networks for 28,
    32, 64 and 128 pixels have these depths. mlp gets its published 3 layers at any size; other architectures ignore
    depth.
    """
    if architecture != "convnet":
        return PUBLISHED_DEPTH
    return max(2, (min(size) // SMALLEST_MAP).bit_length() - 1)


PUBLISHED_WIDTH = 128
"""Channels of ConvNet's convolutions as published; at this value other architectures have their own published width."""


class NetworkConfig(Section):
    """The backbone: architecture of experts, students and evaluation networks."""

    architecture: str = "convnet"
    """Registered name: convnet, resnet18, vgg11, lenet, mlp, ..."""
    width: Count = PUBLISHED_WIDTH
    """Channels of convnet's layers; others scale in proportion."""
    depth: Count | None = None
    """Blocks of convnet (each halves the image) or layers of mlp. null: 2 to 6 by image size; mlp 3."""
    norm: Literal["instance", "batch", "group", "none"] = "instance"
    """Normalisation layers; networks with batch cannot be distilled."""
    pooling: Literal["avg", "max", "none"] = "avg"
    """2x2 pooling at the end of every convnet block."""

    def resolved(self, size: tuple[int, int]) -> NetworkConfig:
        """Copy in which a depth of None is replaced by the default for images of `size` (height, width) in pixels."""
        if self.depth is not None:
            return self
        return self.model_copy(update={"depth": depth_for(self.architecture, size)})


class BackboneConfig(Section):
    """A further network that is matched together with the first, against experts of its own."""

    network: NetworkConfig
    """The network; its experts are trained like those of the first network."""
    weight: Positive = 1.0
    """Weight of this network's matching loss; the first network has weight 1."""


class ExpertConfig(Section):
    """Training of the experts on real data: SGD as in MTT, or GSAM as in FTD and DATM."""

    count: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Number of experts, 1 to 100000."""
    epochs: Count = 100
    """Epochs of training per expert."""
    batch_size: Count = 256
    """Images per SGD step; the last, smaller batch is kept."""
    learning_rate: Positive = 0.01
    """Learning rate, constant."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum in [0, 1); 0 as published, for easier matching."""
    weight_decay: NonNegative = 0.0
    """L2 penalty on the parameters."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations joined by underscores; '' for none."""
    optimiser: Literal["sgd", "gsam"] = "sgd"
    """gsam: two gradients per step, flatter trajectories."""
    rho: Positive = 0.01
    """gsam: length of the ascent step; 0.01 as published."""
    alpha: NonNegative = 0.3
    """gsam: how much of the orthogonal gradient part is subtracted."""
    adaptive: bool = True
    """gsam: scale the ascent step by each parameter's size."""
    keep_epochs: Count | None = None
    """Store epochs 0 to this one and the last; null: all matchable."""
    storage: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of stored parameters; 16 bits halve the store but round."""
    test_every: Annotated[int, Field(ge=0)] = 0
    """Epochs between measurements of test accuracy (for display only); 0 for none. Only stored epochs have one."""


class DistillConfig(Section):
    """Difficulty-aligned trajectory matching (DATM)."""

    ipc: Count = 10
    """Synthetic images per class."""
    iterations: Count = 10_000
    """Matching iterations."""
    student_steps: Count = 80
    """SGD steps of the student per iteration (T)."""
    expert_epochs: Count = 2
    """Epochs from the start to the target on the trajectory (M)."""
    batch_size: Count = 100
    """Synthetic images per student step."""
    first_start: Epoch = 0
    """Earliest start epoch, inclusive."""
    start_bound: Count = 10
    """Exclusive upper bound of the start epoch at iteration 0."""
    final_start_bound: Count = 20
    """Final exclusive bound; equal to start_bound if fixed."""
    expand_iterations: Annotated[int, Field(ge=0)] = 1000
    """Iterations over which the bound grows; 0 for a fixed range."""
    learning_rate_images: Positive = 100.0
    """Learning rate of SGD on the pixels, momentum 0.5."""
    learning_rate_labels: NonNegative = 2.0
    """Learning rate of the soft labels, momentum 0.9; 0: none."""
    learning_rate_step_size: NonNegative = 1e-5
    """Learning rate of the student's step size, momentum 0.5."""
    initial: Literal["correct", "random"] = "correct"
    """Real images to start from: correctly classified, or any."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: the experts' mean logits, then learned; hard: fixed."""
    initial_step_size: Positive = 0.01
    """The student's step size at the start."""
    threshold: Positive = 1.0
    """Iterations with a larger matching loss are skipped."""
    gradient_limit: Positive | None = 10.0
    """Largest first-order decrease of the loss by one step, in multiples of the loss; longer gradients are shortened.
    null: no limit, as published."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations of the student's steps."""
    validate_every: Count = 500
    """Iterations between validations, which choose the set to keep."""
    validation_seeds: Count = 1
    """Networks trained at each validation."""
    checkpoint_every: Count = 100
    """Iterations between checkpoints."""


class AuxiliaryExpertConfig(ExpertConfig):
    """Training of MetaDD's auxiliaries; only their last epoch is used."""

    count: Annotated[int, Field(ge=1, le=100)] = 1
    """Experts per network, 1 to 100; used in turn."""
    epochs: Count = 50
    """Epochs of training per expert."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum in [0, 1)."""
    keep_epochs: Count | None = 1
    """Store epochs 0 to this one and the last; null: all matchable."""


class MetaConfig(Section):
    """MetaDD: losses on class activation maps, for sets that work on other networks."""

    auxiliaries: Annotated[tuple[NetworkConfig, ...], Field(strict=False, min_length=1, max_length=16)]
    """Architectures beside the first network, such as `[{architecture: resnet18}]`."""
    experts: AuxiliaryExpertConfig = AuxiliaryExpertConfig()
    """Training of the auxiliaries; only their last epoch is used."""
    variance: NonNegative = 1.0
    """Weight of the maps' variance over the networks."""
    invariance: NonNegative = 0.01
    """Weight of the auxiliaries' cross-entropy and divergence."""
    position: NonNegative = 0.1
    """Weight of evidence against the class."""
    divergence: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Weight, within invariance, of the auxiliaries' divergence from the first network; negative pushes them apart."""
    variance_of: Literal["maps", "logits"] = "maps"
    """logits: as a control, variance of logits instead of maps."""
    threshold: Fraction = 0.5
    """Map value in (0, 1) from which a pixel counts as a feature; affects only the reported ratio."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of images that the losses use, drawn per iteration."""

    @model_validator(mode="after")
    def _auxiliaries_differ(self) -> MetaConfig:
        for number, network in enumerate(self.auxiliaries):
            if network in self.auxiliaries[:number]:
                raise ValueError(
                    f"metadd.auxiliaries.{number} repeats an earlier network; give each network once, and raise "
                    "metadd.experts.count for several experts of it"
                )
        return self


class EvaluateConfig(Section):
    """Training of fresh networks on the synthetic set, scored on the test set."""

    protocol: Literal["published", "short", "quick"] = "published"
    """published: 1001 epochs, learning rate divided by 10 halfway. short: 500 epochs. quick: 20, a trial."""
    seeds: Count = 5
    """Fresh networks per row of the table."""
    networks: Annotated[tuple[NetworkConfig, ...], Field(strict=False, max_length=64)] = ()
    """Architectures to score the set on as well, each with the learned and with a tuned step size."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """adamw: for networks that SGD does not train (transformers); its step size is always tuned."""
    real_epochs: Count = 100
    """Epochs of the control that trains on all real data."""
    fair: bool = False
    """Compute DD-Ranking's LRS and ARS (three more table rows)."""
    augmentation: str = PUBLISHED_AUGMENTATION
    """DSA operations during evaluation."""


class ClusterConfig(Section):
    """How the work is spread. Only threads, device, precision and compilation change results, by rounding."""

    workers: Count | None = None
    """Parallel workers; null: as many as CPUs (or GPUs) allow."""
    threads_per_worker: Count = 1
    """CPU threads per worker; the number affects rounding."""
    gpus_per_worker: NonNegative | None = None
    """GPUs per worker on Ray; a fraction lets several workers share one. null: 1, or 0 if the cluster has none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where a worker has one, else the CPU."""
    compile: bool = True
    """Compile the student step if there is a C++ compiler."""
    shards: Count = 1
    """Workers per distillation, each with some of the classes."""
    experts_at_a_time: Count | None = None
    """Experts trained at once per worker; null: fastest, up to 8."""
    backbones_apart: bool = False
    """Give every network under `backbones` workers of its own."""
    auxiliaries_apart: bool = False
    """Give every auxiliary of metadd workers of its own."""
    memory: str | None = None
    """Memory per distilling worker, such as 8GiB; null: all free."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Products in the student step; tf32 and bfloat16 need a GPU."""
    channels_last: bool = True
    """Store maps channels-last: faster on CPUs, coarser rounding."""
    peer_timeout: Annotated[float, Field(ge=0.1, le=86_400)] = 300.0
    """Seconds without an answer before a worker is declared lost; must exceed one student step."""
    wait_for_nodes: Annotated[float, Field(ge=0, le=7 * 86_400)] = 0.0
    """Seconds to wait for free resources, at the start and after a loss (then at least 60); autoscaling needs
    minutes."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Restarts in a row, without progress, after lost workers."""
    log_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Curves beside Ray's metrics: tensorboard writes to <out>/tensorboard. Either must be installed."""

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_is_a_size(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # YAML reads a plain number of bytes as an integer
        if isinstance(value, str):
            try:
                parse_bytes(value)
            except ConfigError as failure:
                raise ValueError(f"cluster.memory: {failure}") from None
        return value

    @property
    def memory_bytes(self) -> int | None:
        """Value of `memory` in bytes; None if it is null."""
        return None if self.memory is None else parse_bytes(self.memory)


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b|([kmgt]))?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Number of bytes in a size such as 8GiB, 512 MiB, 6 GB or 6G (10^9 bytes each), or a plain number of bytes.

    Raises:
        ConfigError: the text is no size, or the size is less than one byte.
    """
    match = _SIZE.fullmatch(text)
    size = 0
    if match:
        number, prefix, binary, short = match.groups()
        power = " kmgt".index((prefix or short or " ").lower())
        value = float(number) * (1024 if binary else 1000) ** power
        size = int(value) if math.isfinite(value) else 0
    if size < 1:
        raise ConfigError(f"invalid size {text!r}", remedy="use a number with a unit, such as 8GiB or 512MiB")
    return size


@dataclass(frozen=True)
class Role:
    """Part of the work that one worker computes for a synthetic set."""

    backbones: tuple[int, ...]
    """Numbers of the backbones that this worker matches; 0 is `RunConfig.network`."""
    meta_networks: tuple[int, ...]
    """Numbers of the MetaDD networks that this worker holds: 0 is the first backbone, then the auxiliaries."""


RESERVED_NAMES = frozenset({"experts", "controls", "report.html", "summary.json", "tensorboard", "transforms", "wandb"})
"""File and folder names beside the runs in an output folder; no run may have one of them."""


class RunConfig(Section):
    """One run: experts, distillation, evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run's folder and of its row in tables."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers, 0 to 2^63 - 1."""
    dataset: DatasetConfig = DatasetConfig()
    network: NetworkConfig = NetworkConfig()
    backbones: Annotated[tuple[BackboneConfig, ...], Field(strict=False)] = ()
    """Further networks to match at the same time, each `{network: {...}, weight: 1.0}`. Evaluation uses
    the first network alone."""
    experts: ExpertConfig = ExpertConfig()
    distill: DistillConfig = DistillConfig()
    metadd: MetaConfig | None = None
    """MetaDD's losses, such as `{auxiliaries: [...]}`, for sets that work on other networks; null for none."""
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _ranges_are_possible(self) -> RunConfig:
        if self.name in RESERVED_NAMES:
            raise ValueError(
                f"name is {self.name!r}, which is reserved for a file or folder of the output; choose another name"
            )
        d = self.distill
        if d.first_start >= d.start_bound:
            raise ValueError(f"distill.first_start {d.first_start} is not below distill.start_bound {d.start_bound}")
        if d.start_bound > d.final_start_bound:
            raise ValueError(
                f"distill.start_bound {d.start_bound} exceeds distill.final_start_bound {d.final_start_bound}"
            )
        latest = d.final_start_bound - 1 + d.expert_epochs
        if latest > self.experts.epochs:
            raise ValueError(
                f"distill.final_start_bound {d.final_start_bound} with expert_epochs {d.expert_epochs} needs epoch "
                f"{latest}, but experts.epochs is {self.experts.epochs}"
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
                f"one set needs {self.workers_per_set} workers at once (cluster.shards, times the networks that have "
                f"workers of their own), but cluster.workers is {self.cluster.workers}"
            )
        return self

    @property
    def is_matchable(self) -> bool:
        """True if every network of the run can be matched. Networks with batch normalisation can only be trained."""
        return not self._unmatchable

    def require_matchable(self) -> None:
        """Raise a `ConfigError` if a network of the run can be trained but not matched."""
        for key in self._unmatchable:
            raise ConfigError(
                f"{key}.norm is 'batch', which cannot be matched",
                "batch statistics couple the images of a batch, so the gradient is not a sum over images",
                f"use {key}.norm=instance; `datm-ray experts` trains networks with any norm",
            )

    @property
    def _unmatchable(self) -> list[str]:
        """Configuration keys of the networks that cannot be matched."""
        networks = {"network": self.network} | {
            f"backbones.{number}.network": backbone.network for number, backbone in enumerate(self.backbones)
        }
        return [key for key, network in networks.items() if network.norm == "batch"]

    def resolved(self, size: tuple[int, int]) -> RunConfig:
        """Copy for images of `size` (height, width) in pixels, without "auto" normalisation or a depth of None.

        The copy equals a run that gives these values itself. Identities, fingerprints and everything that is written to
        a run's folder come from a resolved configuration.

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
        """One copy of the run per backbone, with this network alone: it decides the network's experts."""
        networks = [self.network, *(backbone.network for backbone in self.backbones)]
        alone = {"backbones": (), "metadd": None}
        return [self.model_copy(update={"network": network, **alone}) for network in networks]

    def each_auxiliary(self) -> list[RunConfig]:
        """One copy of the run per auxiliary of metadd, with this network alone: it decides the network's experts."""
        if self.metadd is None:
            return []
        alone = {"backbones": (), "metadd": None, "experts": self.metadd.experts}
        return [self.model_copy(update={"network": network, **alone}) for network in self.metadd.auxiliaries]

    @property
    def weights(self) -> list[float]:
        """Weights of the backbones' matching losses, in the order of `each_backbone`."""
        return [1.0, *(backbone.weight for backbone in self.backbones)]

    @property
    def workers_per_set(self) -> int:
        """Number of workers that distil one set together."""
        return self.cluster.shards * len(self.roles)

    @property
    def scored_networks(self) -> tuple[NetworkConfig, ...]:
        """Architectures of the second table, the first backbone included; empty if the run has no such table."""
        others = [network for network in self.evaluate.networks if network != self.network]
        return (self.network, *others) if self.evaluate.networks else ()

    @property
    def whole_role(self) -> Role:
        """Role of a worker, or of each worker in a row of shards, that computes all networks."""
        return Role(
            tuple(range(len(self.weights))), tuple(range(0 if self.metadd is None else self.meta_network_count))
        )

    @property
    def meta_network_count(self) -> int:
        """Number of MetaDD networks: the first backbone and the auxiliaries; 1 without metadd."""
        return 1 + len(self.each_auxiliary())

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles of the rows of workers that distil one set together; the first row has the first backbone."""
        cluster = self.cluster
        backbones, auxiliaries = range(len(self.weights)), range(1, self.meta_network_count)
        first = Role(
            backbones=(0,) if cluster.backbones_apart else tuple(backbones),
            meta_networks=() if self.metadd is None else (0,) if cluster.auxiliaries_apart else (0, *auxiliaries),
        )
        more = [Role((number,), ()) for number in backbones[1:] if cluster.backbones_apart]
        return (first, *more, *(Role((), (number,)) for number in auxiliaries if cluster.auxiliaries_apart))

    @property
    def latest_matched(self) -> int:
        """Last epoch of a trajectory that can be a start or a target, inclusive."""
        return self.distill.final_start_bound - 1 + self.distill.expert_epochs

    @property
    def kept_bound(self) -> int:
        """Last epoch of the stored range, inclusive; an expert's very last epoch is stored besides."""
        return self.experts.keep_epochs or self.latest_matched

    @property
    def kept_epochs(self) -> tuple[int, ...]:
        """Stored epochs of each expert: those that may be matched, and the last, whose logits are used."""
        return (*range(min(self.kept_bound + 1, self.experts.epochs)), self.experts.epochs)

    def identity(self) -> dict[str, Any]:
        """Plain data that decides the synthetic set and each single accuracy; needs a resolved run.

        Left out are `cluster` and the data set's path, because the data set's content has a fingerprint of its own.
        Number of seeds, further networks, their optimiser and `fair` are left out, because they can be added to a
        finished run. Stored epochs beyond the matched ones are left out too.
        """
        left_out: dict[str, Any] = {
            "cluster": True,
            "dataset": {"path"},
            "evaluate": {"seeds", "networks", "optimiser", "fair"},
            "experts": {"keep_epochs", "test_every"},
        }
        identity = self.model_dump(exclude=left_out)
        for name, default in (("initial", "correct"), ("labels", "soft"), ("gradient_limit", None)):
            if identity["distill"][name] == default:  # keeps the identity of runs made before the key existed
                identity["distill"].pop(name)
        if self.metadd is None:  # keeps the identity of runs made before the section existed
            identity.pop("metadd")
        else:
            for name in ("keep_epochs", "test_every"):
                identity["metadd"]["experts"].pop(name)
        return identity


def stable_hash(value: Any) -> str:
    """Hash of plain data, sixteen hex digits; equal data have equal hashes on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expert_fingerprint(config: RunConfig, dataset_fingerprint: str) -> str:
    """Fingerprint of the experts that a run needs, sixteen hex digits; equal for two runs if they can share experts.

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
        origin: name of the source in messages, such as the file's name.

    Raises:
        ConfigError: a key or value is wrong; the message names the first one.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as failure:
        raise _config_error(failure, origin) from None


def load_config(path: str) -> RunConfig:
    """Read a run's YAML file.

    Raises:
        ConfigError: the file is missing, not YAML, or not a valid configuration.
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
    """Name of a run made from a file's name without its suffix; "run" if no allowed character is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"


def load_config_text(text: str, origin: str, default_name: str = "run") -> RunConfig:
    """Read a run's configuration from YAML text.

    Args:
        origin: name of the source in messages.
        default_name: name of the run if the text gives none.
    """
    return parse_config({"name": default_name, **_read_sections(text, origin)}, origin)


RENAMED = {"distill.overshoot": "distill.gradient_limit"}  # former name
"""Keys of earlier versions and their present names; recipes of saved runs may still have the former."""


def load_recipe_of_run(text: str, origin: str) -> RunConfig:
    """Read the recipe that `to_yaml` wrote for a run, by this version or an earlier one.

    `to_yaml` writes every field. A missing field did not exist yet, so the run was made without it.
    """
    values = _read_sections(text, origin)
    distill = values.get("distill")
    if isinstance(distill, dict):
        for old, new in RENAMED.items():
            section, _, field = old.partition(".")
            keys = values.get(section)
            if isinstance(keys, dict) and field in keys:
                keys[new.partition(".")[2]] = keys.pop(field)
        distill.setdefault("gradient_limit", None)
    return parse_config(values, origin)


def _read_sections(text: str, origin: str) -> dict[str, Any]:
    values = _read_yaml(text, origin)
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} holds no configuration", remedy="compare with `datm-ray recipe show`")
    return values


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Apply overrides of the form `section.field=value`; values are read as YAML.

    Text fields take the value literally, without surrounding blanks, unless it is empty, null or quoted.

    Raises:
        ConfigError: an override is no assignment, or has an unknown key, a wrong type or an impossible range.
    """
    values = config.model_dump()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment!r} is not an assignment", remedy="write --set section.field=value")
        *sections, field = key.strip().split(".")
        target = values
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise ConfigError(f"--set {assignment!r}: {section!r} is not a section", remedy=_known_keys(()))
        bare = text.strip(" \t")
        is_text = _takes_text([*sections, field]) and bare not in ("", "null") and not _QUOTED.fullmatch(bare)
        target[field] = bare if is_text else _read_yaml(text, f"--set {assignment!r}")
    return parse_config(values, "--set")


_QUOTED = re.compile(r"\"(.*)\"|'(.*)'", re.DOTALL)


def _takes_text(path: Sequence[str]) -> bool:
    """True if the field at this path takes any text; then `a #1` or `1e3` stay what they are."""
    model: type[BaseModel] | None = RunConfig
    for section in path[:-1]:
        field = model.model_fields.get(section) if model else None
        model = _section_of(field.annotation) if field else None
    field = model.model_fields.get(path[-1]) if model else None
    return field is not None and str in (field.annotation, *get_args(field.annotation))


def network_names(networks: Sequence[NetworkConfig]) -> list[str]:
    """Short names of networks: the architecture, a width that is not the published one, and further differences."""

    def differing(network: NetworkConfig) -> Iterator[str]:
        alike = [each for each in networks if each.architecture == network.architecture]
        for field in NetworkConfig.model_fields:
            value = getattr(network, field)
            if any(getattr(each, field) != value for each in alike) or (field == "width" and value != PUBLISHED_WIDTH):
                yield f"{field} {value}"

    details = [", ".join(differing(network)) for network in networks]
    return [
        f"{network.architecture} ({detail})" if detail else network.architecture
        for network, detail in zip(networks, details, strict=True)
    ]


def scored_on(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Copy of the run that is also scored on the architectures of these names, see `networks_named`."""
    evaluate = config.evaluate.model_copy(update={"networks": tuple(networks_named(config, names))})
    return config.model_copy(update={"evaluate": evaluate})


def networks_named(config: RunConfig, names: Sequence[str]) -> dict[NetworkConfig, str]:
    """Networks given by names of architectures, each with the name that stands for it.

    Args:
        names: NAME or NAME:WIDTH. A NAME means every network of that architecture in the recipe, or else the published
            one. NAME:WIDTH means the first of them with another width.

    Raises:
        ConfigError: a width is no number.
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
    """YAML text of the configuration with a comment for every field, readable by `load_config`."""
    lines: list[str] = []
    for name in RunConfig.model_fields:
        value = getattr(config, name)
        if not isinstance(value, Section):
            lines += _yaml_lines(config, name, "")
            continue
        lines += ["", *_commented(f"{name}:", type(value).__doc__)]
        lines += [line for field in type(value).model_fields for line in _yaml_lines(value, field, "  ")]
    return "\n".join(lines) + "\n"


def _yaml_lines(section: Section, field: str, indent: str) -> list[str]:
    plain = section.model_dump(mode="json")[field]
    value = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10_000)
    text = f"{indent}{field}: {value.removesuffix(chr(10)).removesuffix('...').strip()}"
    return _commented(f"{text:<{_COMMENT_COLUMN}}", type(section).model_fields[field].description)


def _commented(text: str, comment: str | None) -> list[str]:
    """A line of YAML with its comment behind it, or on lines above it if that would be too long."""
    comment = " ".join((comment or "").split())
    line = f"{text}  # {comment}"
    if len(line) <= _YAML_COLUMNS:
        return [line]
    above = " " * (len(text) - len(text.lstrip())) + "# "
    wrapped = textwrap.wrap(comment, _YAML_COLUMNS, initial_indent=above, subsequent_indent=above)
    return [*wrapped, text.rstrip()]


_COMMENT_COLUMN, _YAML_COLUMNS = 34, 100


class _Loader(yaml.SafeLoader):
    """YAML reader in which 1e-5 is a number, 2024-11-20 is text, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is repeated", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)

    def get_single_node(self) -> yaml.Node | None:
        """The document's root node; aliases that expand to too much, or without end, are an error."""
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _LARGEST_TEXT:
            raise yaml.constructor.ConstructorError(None, None, "its aliases expand to too much", node.start_mark)
        return node


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """Number of nodes from this one down with all aliases expanded; infinite if one contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # marks a node that is being counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = (each for part in parts for each in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(_written_out(each, known) for each in inner)
    return known[id(node)]


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Integer of at most 128 bits. Larger ones are an error, because Python refuses to print the largest."""
    value = int(loader.construct_yaml_int(node)) if len(node.value) < 100 else 2**128
    if abs(value) >= 2**128:
        raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


class _Dumper(yaml.SafeDumper):
    """YAML writer that quotes text which `_Loader` would read as something else."""


# YAML 1.1, which PyYAML implements, requires a point and a sign: 1.0e-5.
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


_LARGEST_TEXT = 2**16  # limits on a recipe's characters and values, because PyYAML takes quadratic time for some


def _read_yaml(text: str, origin: str) -> Any:
    if len(text) > _LARGEST_TEXT:
        raise ConfigError(
            f"{origin} is too long for a recipe", "it is probably another file", "give a recipe's name or file"
        )
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as failure:
        line = f" at line {failure.problem_mark.line + 1}" if failure.problem_mark else ""
        what = f"not valid YAML{line}: {failure.problem}"
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # PyYAML does not catch errors in explicit tags such as !!int, nor its own recursion depth.
        what = "not valid YAML"
    raise ConfigError(f"{origin} is {what}", remedy="compare with `datm-ray recipe show`")


def _config_error(failure: ValidationError, origin: str) -> ConfigError:
    # A misspelt key is also a missing one; the unknown key says more.
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
    """Class of the section that a field holds, alone or in a list; None if it holds no section."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _known_keys(path: Sequence[str]) -> str:
    """Remedy for an unknown key: the nearest existing key, or all keys of its section."""
    fields = dict(RunConfig.model_fields)
    for part in path[:-1]:
        if part.isdigit():  # index in a list of sections
            continue
        section = _section_of(fields[part].annotation) if part in fields else None
        if section is None:
            break
        fields = dict(section.model_fields)
    if ".".join(path) in RENAMED:
        return f"its new name is {RENAMED['.'.join(path)]!r}"
    near = difflib.get_close_matches(path[-1], fields, n=1) if path else []
    if near:
        return f"did you mean {'.'.join([*path[:-1], near[0]])!r}?"
    return f"known keys: {', '.join(fields)}"
