"""The configuration of one run and its validation, with messages of one line. Tests: tests/config/test_config.py."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from datm_ray.config.sections import (
    SECTIONS_OF_METHODS,
    UNREAD_BY_MATCHING,
    BackboneConfig,
    ClusterConfig,
    DatasetConfig,
    DistillConfig,
    EvaluateConfig,
    ExpertConfig,
    GivenConfig,
    MetaConfig,
    NamedNetwork,
    NetworkConfig,
    PriorConfig,
    RecoverConfig,
    Section,
    SelectConfig,
    keys_read_of_distill,
)
from datm_ray.errors import ConfigError


@dataclass(frozen=True)
class Role:
    """Networks that one worker computes while a synthetic set is made: backbones to match, and networks of MetaDD."""

    backbones: tuple[int, ...]
    """Numbers of the backbones that this worker matches: 0 is `RunConfig.network`, then `RunConfig.backbones`."""
    meta_networks: tuple[int, ...]
    """Numbers of the MetaDD networks that this worker computes: 0 is the first backbone, then the auxiliaries."""


RESERVED_NAMES = frozenset({"experts", "controls", "report.html", "summary.json", "tensorboard", "transforms", "wandb"})
"""Names of files and folders that the program writes beside the runs' folders; no run may have one of them."""


class RunConfig(Section):
    """One run: experts, distillation, evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run's folder and of its row in tables."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers, 0 to 2^63 - 1."""
    dataset: DatasetConfig = DatasetConfig()
    network: NamedNetwork = NetworkConfig()
    backbones: Annotated[tuple[BackboneConfig, ...], Field(strict=False)] = ()
    """Networks to match in addition to `network`, each `{network: {...}, weight: 1.0}`. Evaluation uses only
    `network`."""
    method: str = "datm"
    """How the set is made: datm or mtt (trajectories), dm (embeddings), sre2l (from a teacher), select (real images),
    given (a finished set), or package.module:Class."""
    experts: ExpertConfig = ExpertConfig()
    distill: DistillConfig = DistillConfig()
    recover: RecoverConfig = RecoverConfig()
    select: SelectConfig = SelectConfig()
    given: GivenConfig | None = None
    """A set that another program or run has made, such as `{path: downloads/datm}`, for method given; null for none."""
    metadd: MetaConfig | None = None
    """MetaDD's losses, such as `{auxiliaries: [...]}`, for sets that also work on other networks; null for none."""
    prior: PriorConfig | None = None
    """A decoder that makes the images, such as `{kind: trained}`; null: pixels are learned."""
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _ranges_are_possible(self) -> RunConfig:
        if self.name in RESERVED_NAMES:
            raise ValueError(
                f"name is {self.name!r}, which is reserved for a file or folder of the output; choose another name"
            )
        if self.method in UNREAD_BY_MATCHING and self._unmatched_epochs:
            raise ValueError(self._unmatched_epochs)  # before anything is imported; its method checks it again
        if self.cluster.backbones_apart and not self.backbones:
            raise ValueError("cluster.backbones_apart is set, but the recipe has no further network under backbones")
        if self.cluster.auxiliaries_apart and self.metadd is None:
            raise ValueError("cluster.auxiliaries_apart is set, but the recipe has no metadd section")
        for key, training in self._trainings.items():
            if training.epochs is not None and training.warmup_epochs >= training.epochs:
                raise ValueError(
                    f"{key}.warmup_epochs is {training.warmup_epochs}, and there are {training.epochs} epochs in all; "
                    f"lower {key}.warmup_epochs"
                )
        if self.evaluate.cutmix and not self.evaluate.has_teacher:
            raise ValueError(
                "evaluate.cutmix mixes images, whose own labels would not fit; set evaluate.labels=teacher, or "
                "evaluate.cutmix=0"
            )
        if self.evaluate.fair and not self.evaluate.full:
            raise ValueError(
                "evaluate.fair needs the control on all real data, but evaluate.full is false; leave out --fair or "
                "--skip-full, or set evaluate.full=true"
            )
        if self.cluster.workers is not None and self.workers_per_set > self.cluster.workers:
            raise ValueError(
                f"one set needs {self.workers_per_set} workers at once (cluster.shards, times the networks that have "
                f"workers of their own), but cluster.workers is {self.cluster.workers}"
            )
        return self

    @property
    def expert_seed(self) -> int:
        """Seed of the experts' training: `experts.seed`, or the run's seed if that is null."""
        return self.seed if self.experts.seed is None else self.experts.seed

    @property
    def _trainings(self) -> dict[str, ExpertConfig | EvaluateConfig]:
        """Sections with settings for training networks: key of the section, such as `metadd.experts` -> section."""
        found: dict[str, ExpertConfig | EvaluateConfig] = {"experts": self.experts, "evaluate": self.evaluate}
        if self.metadd is not None:
            found["metadd.experts"] = self.metadd.experts
        if self.evaluate.teacher is not None:
            found["evaluate.teacher.experts"] = self.evaluate.teacher.experts
        return found

    @property
    def _unmatched_epochs(self) -> str:
        """Message if experts do not store an expert epoch that trajectory matching can match; "" if they store all."""
        latest, epochs, keep = self.latest_matched, self.experts.epochs, self.experts.keep_epochs
        if latest > epochs:
            return (
                f"distill.start_epochs up to {self.distill.start_epochs.last} with expert_epochs "
                f"{self.distill.expert_epochs} needs epoch {latest}, but experts.epochs is {epochs}"
            )
        if keep is not None and keep < min(latest, epochs - 1):
            return f"experts.keep_epochs {keep} leaves out epoch {latest}, which the recipe can match"
        return ""

    def require_matched_epochs(self) -> None:
        """Raise a `ConfigError` if the recipe's experts do not store an epoch that trajectory matching can match."""
        if self._unmatched_epochs:
            raise ConfigError(self._unmatched_epochs)

    def require_matchable(self) -> None:
        """Raise a `ConfigError` if a network of the run has batch normalisation, which cannot be matched.

        Experts can be trained with batch normalisation. Matching cannot use it, because it couples the images of a
        batch: the gradient is then not a sum over images.
        """
        for number, each in enumerate(self.each_backbone()):
            if each.network.norm == "batch":
                key = f"backbones.{number - 1}.network" if number else "network"
                raise ConfigError(
                    f"{key}.norm is 'batch', which cannot be matched",
                    "batch statistics couple the images of a batch, so the gradient is not a sum over images",
                    f"use {key}.norm=instance; `datm-ray experts` trains networks with any norm",
                )

    def require_batch_norm(self) -> None:
        """Raise a `ConfigError` if images cannot be recovered, because a network has no batch normalisation.

        The networks that need it are the teacher (`network`) and, unless `recover.statistics_of` is "teacher",
        MetaDD's auxiliary networks (`metadd.auxiliaries`).
        """
        if self.network.norm != "batch":
            raise ConfigError(
                f"network.norm is {self.network.norm!r}, and method {self.method} needs 'batch'",
                "images are recovered from the statistics of batch normalisation",
                "use --set network.norm=batch, with an architecture that has it, such as resnet18",
            )
        if self.recover.statistics_of == "teacher":
            return
        auxiliaries = self.each_auxiliary()
        if not auxiliaries:
            raise ConfigError(
                f"recover.statistics_of is {self.recover.statistics_of!r}, and there are no auxiliaries",
                remedy="name networks in metadd.auxiliaries, or use --set recover.statistics_of=teacher",
            )
        for number, each in enumerate(auxiliaries):
            if each.network.norm != "batch":
                raise ConfigError(
                    f"metadd.auxiliaries.{number}.norm is {each.network.norm!r}, and its statistics are asked for",
                    "only batch normalisation keeps statistics",
                    f"use metadd.auxiliaries.{number}.norm=batch, or --set recover.statistics_of=teacher",
                )

    def resolved(self, size: tuple[int, int]) -> RunConfig:
        """Copy in which values that depend on the image size are filled in: "auto" normalisation, and depths of `None`.

        The copy equals a configuration that states the filled-in values. Identities, fingerprints and everything that
        is written to a run's folder come from a resolved configuration.

        Args:
            size: height and width of the images in pixels.

        Raises:
            ConfigError: one of `metadd.auxiliaries` equals another one, now that its depth is filled in.
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
        teacher = self.evaluate.teacher
        if teacher is not None:
            teacher = teacher.model_copy(update={"network": teacher.network.resolved(size)})
        changes["evaluate"] = self.evaluate.model_copy(update={"networks": tuple(scored), "teacher": teacher})
        return parse_config(self.model_copy(update=changes).model_dump(), self.name)

    def each_backbone(self) -> list[RunConfig]:
        """One copy of the run for each backbone.

        The backbone is the copy's only network. The copy therefore needs the experts of this backbone alone.
        """
        networks = [self.network, *(backbone.network for backbone in self.backbones)]
        alone = {"backbones": (), "metadd": None}
        return [self.model_copy(update={"network": network, **alone}) for network in networks]

    def each_auxiliary(self) -> list[RunConfig]:
        """One copy of the run for each of MetaDD's auxiliaries, which is the copy's only network.

        The list is empty unless a term of MetaDD has a weight, or images are recovered from auxiliaries' statistics.

        In the copies, `metadd.experts` replaces `experts`. If its seed is null, the seed of `experts` is kept.
        """
        reads = self.method == SECTIONS_OF_METHODS["recover"] or ":" in self.method
        recovers = reads and self.recover.statistics_of != "teacher"
        if self.metadd is None or not (self.metadd.has_weight or recovers):
            return []
        return [self._with_experts(network, self.metadd.experts) for network in self.metadd.auxiliaries]

    def own_teacher(self) -> list[RunConfig]:
        """List with one copy of the run, to train `evaluate.teacher`.

        The list is empty if the run has no such teacher, or if no teacher labels images in the run.

        The teacher is the copy's only network, and `evaluate.teacher.experts` replaces `experts`. If
        `evaluate.teacher.experts.seed` is null, the seed of `experts` is kept.
        """
        teacher = self.evaluate.teacher
        if teacher is None or not self.evaluate.has_teacher:
            return []
        return [self._with_experts(teacher.network, teacher.experts)]

    def _with_experts(self, network: NetworkConfig, experts: ExpertConfig) -> RunConfig:
        """Copy of the run whose only network is `network`, trained with the settings `experts`.

        If the settings have no seed, that of the run's experts is used.
        """
        if experts.seed is None:
            experts = experts.model_copy(update={"seed": self.experts.seed})
        alone = {"backbones": (), "metadd": None, "network": network, "experts": experts}
        return self.model_copy(update=alone)

    @property
    def scoring_run(self) -> ScoringRun | None:
        """Run whose networks score the images, so that experts can see easy ones first; `None` without a curriculum."""
        curriculum = self.experts.curriculum
        if curriculum is None:
            return None
        epochs = curriculum.scoring_epochs
        changes = {
            "curriculum": None,
            "count": curriculum.scoring_networks,
            "epochs": epochs,
            "warmup_epochs": min(self.experts.warmup_epochs, epochs - 1),
            "keep_epochs": 1,
            "test_every": 0,
        }
        return ScoringRun.model_construct(**dict(self) | {"experts": self.experts.model_copy(update=changes)})

    @property
    def weights(self) -> list[float]:
        """Weights of the backbones' matching losses, in the order of `each_backbone`; the first is 1."""
        return [1.0, *(backbone.weight for backbone in self.backbones)]

    @property
    def workers_per_set(self) -> int:
        """Number of workers that distil one set together."""
        return self.cluster.shards * len(self.roles)

    @property
    def scored_networks(self) -> tuple[NetworkConfig, ...]:
        """Networks of the table of architectures, the first backbone first; empty if the run has no such table."""
        others = [network for network in self.evaluate.networks if network != self.network]
        return (self.network, *others) if self.evaluate.networks else ()

    @property
    def whole_role(self) -> Role:
        """Role of a worker that computes all backbones and all MetaDD networks of a set.

        A role says nothing about classes: the worker may compute them all, or only its shard, a part of the classes.
        """
        return Role(tuple(range(len(self.weights))), tuple(range(self.meta_network_count)))

    @property
    def meta_network_count(self) -> int:
        """Number of MetaDD networks: the first backbone and the auxiliaries; 0 if the run uses no auxiliaries."""
        auxiliaries = len(self.each_auxiliary())
        return auxiliaries and 1 + auxiliaries

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles that together compute all networks of one synthetic set. The first role has the first backbone.

        Each role is taken by `cluster.shards` workers. Each of these workers has a shard, a part of the classes.
        """
        cluster = self.cluster
        backbones, auxiliaries = range(len(self.weights)), range(1, self.meta_network_count)
        first = Role(
            backbones=(0,) if cluster.backbones_apart else tuple(backbones),
            meta_networks=tuple(range(self.meta_network_count))[: 1 if cluster.auxiliaries_apart else None],
        )
        more = [Role((number,), ()) for number in backbones[1:] if cluster.backbones_apart]
        return (first, *more, *(Role((), (number,)) for number in auxiliaries if cluster.auxiliaries_apart))

    @property
    def latest_matched(self) -> int:
        """Last epoch of experts that matching can use, inclusive.

        This epoch is the target of students that start at the latest start epoch.
        """
        return self.distill.start_epochs.last + self.distill.expert_epochs

    @property
    def kept_bound(self) -> int:
        """Last epoch, inclusive, of the epochs from 0 on that each expert stores; -1 for none.

        An expert's final epoch is stored in addition.
        """
        if self.experts.keep_epochs is not None:
            return self.experts.keep_epochs
        return self.latest_matched if "start_epochs" in keys_read_of_distill(self.method) else -1

    @property
    def kept_epochs(self) -> tuple[int, ...]:
        """Epochs that each expert stores, ascending: 0 to `kept_bound`, and the final one, which labels images."""
        return (*range(min(self.kept_bound + 1, self.experts.epochs)), self.experts.epochs)


class ScoringRun(RunConfig):
    """Run whose networks only score images, to order them for a curriculum.

    The class keeps these networks apart from experts: their fingerprints differ even if all settings are equal.
    """


def parse_config(values: Mapping[str, Any], origin: str) -> RunConfig:
    """Validate plain data as a `RunConfig`.

    Args:
        origin: name of the source in messages, such as the file's name.

    Raises:
        ConfigError: a key or value is wrong; the message names one of them.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as failure:
        raise _config_error(failure, origin) from None


RENAMED = {
    "distill.overshoot": "distill.gradient_limit",  # former name
    "distill.first_start": "distill.start_epochs.first",
    "distill.start_bound": "distill.start_epochs.bound",
    "distill.final_start_bound": "distill.start_epochs.final_bound",
    "distill.expand_iterations": "distill.start_epochs.expand_iterations",
}
"""Key of an earlier version -> its present name. Recipes of saved runs may have former keys."""


def _config_error(failure: ValidationError, origin: str) -> ConfigError:
    # If a required key is misspelt, it is also missing. The error about the unknown key is more helpful.
    first = min(failure.errors(), key=lambda error: error["type"] != "extra_forbidden")
    path = tuple(str(part) for part in first["loc"] if part != "[key]")
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{origin}: unknown key {key!r}", remedy=known_keys(path))
    if first["type"] == "value_error":
        return ConfigError(f"{origin}: {str(first['msg']).removeprefix('Value error, ')}")
    if first["type"] == "missing":
        return ConfigError(f"{origin}: {key} is missing")
    message = str(first["msg"])
    if first["type"] == "model_type":
        message = "input should be a section of keys and values"
    if first["type"] == "tuple_type":
        message = "input should be a list: [...]"
    elif first["type"] == "string_pattern_mismatch":
        message = "a name has letters, digits, '.', '_' and '-', and begins with a letter or digit"
    remedy = "put it into quotes" if first["type"] == "string_type" else ""
    return ConfigError(f"{origin}: {key} is {first['input']!r}: {message[0].lower()}{message[1:]}", remedy=remedy)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Class of the section that a field holds, alone or in a list; `None` if the field holds no section."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def fields_at(path: Sequence[str]) -> dict[str, FieldInfo]:
    """Fields, by name, of the section at a path of keys and indices in a recipe; empty if no section is there."""
    fields = dict(RunConfig.model_fields)
    for part in path:
        if not part.isdigit():  # index in a list of sections
            section = section_of(fields[part].annotation) if part in fields else None
            fields = dict(section.model_fields) if section else {}
    return fields


def known_keys(path: Sequence[str]) -> str:
    """Text for an error about the unknown key at `path`: its new name, the most similar key, or all keys there."""
    fields = fields_at(path[:-1])
    if ".".join(path) in RENAMED:
        return f"its new name is {RENAMED['.'.join(path)]!r}"
    near = difflib.get_close_matches(path[-1], fields, n=1) if path else []
    if near:
        return f"did you mean {'.'.join([*path[:-1], near[0]])!r}?"
    return f"known keys: {', '.join(fields)}"
