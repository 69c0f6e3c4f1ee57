"""Checks before a run starts. Each raises a `DatmError` of one line and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from datm_ray.config import NetworkConfig, RunConfig, run_identity
from datm_ray.config.schema import RENAMED
from datm_ray.core.images.augment import parse_strategy
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.networks.registry import build_network, require_logits, require_maps, require_stated_norm
from datm_ray.data.transform import require_per_channel
from datm_ray.errors import (
    ClusterError,
    ConfigError,
    CorruptFileError,
    DatasetError,
    MissingExpertsError,
    RunDirectoryError,
    StoreError,
)
from datm_ray.monitor.loggers import require_logger
from datm_ray.pipeline.folder import RECIPE, DataNote, continued_run, has_results, read_recipe
from datm_ray.pipeline.runs import Runs
from datm_ray.pipeline.tasks import layout
from datm_ray.report.differences import differing
from datm_ray.runtime.executor import Executor, require_precision
from datm_ray.stages.distill.checkpoint import CHECKPOINT
from datm_ray.stages.distill.task import SYNTHETIC
from datm_ray.stages.evaluate.rows import CONTROLS, row_schedule
from datm_ray.stages.methods.memory import plans_of, require_whole_classes
from datm_ray.stages.methods.registry import method_of, teacher_of, trained_backbones
from datm_ray.store.files.filesystem import Location, open_location


def require_together(configs: Sequence[RunConfig]) -> None:
    """Raise a `DatmError` if runs of one command have the same name or different cluster sections."""
    names = [config.name for config in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RunDirectoryError(
            f"two runs are both named {twice[0]!r}",
            remedy="give each recipe once; runs under one --out need different names",
        )
    if any(config.cluster != configs[0].cluster for config in configs):
        raise ConfigError(
            "the recipes differ in their cluster sections, and runs of one command share their workers",
            remedy="make the sections alike, or give one command for each",
        )


def check(runs: Runs) -> None:
    """Raise a `DatmError` if a run's configuration does not fit its images, its folder or the trajectory store."""
    require_logger(runs.configs[0].cluster.log_to, runs.out)
    for config in runs.configs:
        _check_scoring(config)
        _check_folder(runs, config)
        _check_continued(runs, config)
        _check_data(runs, config)
    require_same_experts(runs)


def check_before_reading(configs: Sequence[RunConfig], *, elsewhere: bool) -> None:
    """Raise a `DatmError` if run names are equal, cluster sections differ, or workers cannot use the precision.

    Args:
        configs: the runs of one command; at least one.
        elsewhere: True if the workers may run on other nodes, whose GPUs are not known here.
    """
    require_together(configs)
    cluster = configs[0].cluster
    can_have = cluster.gpus_per_worker != 0 and (elsewhere or torch.cuda.is_available())
    has_gpu = cluster.device != "cpu" and can_have
    require_precision(cluster, has_gpu, elsewhere=elsewhere)  # executors and workers check again


def require_startable(runs: Runs) -> None:
    """Raise a `DatmError` if the runs cannot be distilled or written here, or do not fit into memory."""
    require_distillable(runs)
    _require_device(runs)
    require_writable(runs)
    require_memory(runs)


def require_writable(runs: Runs) -> None:
    """Raise a `StoreError` if the output folder or the trajectory store cannot be written."""
    runs.out.require_writable()
    open_location(runs.store_uri).require_writable()


def require_sets(runs: Runs) -> None:
    """Raise a `RunDirectoryError` for a run whose folder holds no synthetic set."""
    for config in runs.configs:
        if not (runs.folder(config) / SYNTHETIC).exists():
            raise RunDirectoryError(
                f"{runs.folder(config).uri} holds no synthetic set",
                "this recipe has not been distilled there",
                f"run `datm-ray distill {config.name}` with the same --set and --out first",
            )


def require_names(runs: Runs) -> None:
    """Raise a `RunDirectoryError` if an unfinished run's folder now holds another recipe.

    Another command with the same name has then started since this one checked its folders.
    """
    for config in runs.unfinished():
        earlier = read_recipe(runs.folder(config))
        if earlier is not None and run_identity(earlier) != run_identity(config):
            raise RunDirectoryError(
                f"{runs.folder(config).uri} belongs to another recipe since this command started",
                "another command was given the same name and other settings",
                "let it finish, and run this one with --set name=...; its experts are kept",
            )


def _check_scoring(config: RunConfig) -> None:
    """Raise a `ConfigError` if scored networks cannot be trained as the section `evaluate` says.

    Causes are a warm-up that lasts for all epochs, labels of a teacher in a run that trains no network that could be
    one, and labels to store for more epochs than are trained.
    """
    keep, epochs = config.evaluate.keep_labels, row_schedule(config, "distilled").epochs
    if config.evaluate.has_teacher:
        teacher_of(config)
    if config.evaluate.stores_labels and keep is not None and keep > epochs:
        raise ConfigError(
            f"evaluate.keep_labels is {keep}, and networks train for {epochs} epochs",
            remedy=f"use --set evaluate.keep_labels={epochs} or fewer, or null for all",
        )


def _check_folder(runs: Runs, config: RunConfig) -> None:
    """Raise a `RunDirectoryError` if the run's folder has results of another recipe.

    A folder without results may be used again.
    """
    earlier = read_recipe(runs.folder(config))
    if earlier is not None and run_identity(earlier) != run_identity(config) and has_results(runs.folder(config)):
        raise RunDirectoryError(
            f"{runs.folder(config).uri} holds a run of {config.name!r} with another configuration",
            f"it differs in {', '.join(unequal_keys(_compared(earlier), _compared(config)))}",
            "give another --out or --set name=..., or, for the run that is there, "
            f"{(runs.folder(config) / RECIPE).uri} as the recipe",
        )


def _check_continued(runs: Runs, config: RunConfig) -> None:
    """Raise a `DatmError` if `distill.continue_from` names a run that cannot continue as `config`.

    Nothing is checked once the named run's state has been copied, because that run is no longer needed.
    """
    source = continued_run(config, runs.folder(config))
    if source is None:
        return
    if not method_of(config).can_continue or method_of(config).pieces(config, runs.raw(config).classes):
        raise ConfigError(
            f"distill.continue_from is given, and method {config.method} cannot continue a set",
            "its iterations may depend on how many there are",
            "leave it out, or set can_continue in the class of the method if they do not",
        )
    earlier, note = read_recipe(source), DataNote.read(source)
    if earlier is None or note is None or not (source / SYNTHETIC).exists() or not (source / CHECKPOINT).exists():
        raise RunDirectoryError(
            f"{source.uri}, which distill.continue_from names, holds no finished run",
            "it is another folder, or its distillation has not ended",
            "give the folder of a finished run, <out>/<name>",
        )
    there, here = (_but_its_length(each) for each in (earlier, config))
    origins = runs.origins(config)
    others = [name for name, digest in note.experts.items() if origins.get(name, digest) != digest]
    if there != here or note.fingerprint != runs.raw(config).fingerprint or others:
        what = ", ".join(unequal_keys(there, here)) or ("the weights of its experts" if others else "its images")
        raise RunDirectoryError(
            f"the run in {source.uri} cannot continue as {config.name!r}: it differs in {what}",
            remedy="change nothing but name and distill.iterations, or leave out distill.continue_from",
        )
    if earlier.distill.iterations >= config.distill.iterations:
        raise ConfigError(
            f"the run in {source.uri} has {earlier.distill.iterations} iterations, and distill.iterations is "
            f"{config.distill.iterations}",
            remedy="ask for more iterations; they count from the first images",
        )


def _but_its_length(config: RunConfig) -> dict[str, Any]:
    """Settings that a run must share with the run that it continues: those that decide the result, without the name and
    the number of iterations."""
    identity = run_identity(config)
    del identity["name"], identity["distill"]["iterations"]
    return identity


def _compared(config: RunConfig) -> dict[str, Any]:
    """Settings to compare two runs by: those that decide the result, and `cluster.deterministic`.

    `run_identity` has `cluster.deterministic` only if it is true. Here the key is always present, because a message
    shows the two values of a difference only if both runs have the key.
    """
    return {"cluster": config.cluster.model_dump(include={"deterministic"}), **run_identity(config)}


def require_same_experts(runs: Runs, *, of_all: bool = True) -> None:
    """Raise a `RunDirectoryError` if results in the output folder came from other experts than the store's.

    Experts differ if their imported weights differ, or if only one of them was imported. Trained ones count as equal.

    Args:
        of_all: True to check also the output folder's other runs if it has scores that runs share, such as those of
            networks trained on random real images (`stages.evaluate.rows.result_location`). False to check only the
            runs in `runs`.
    """
    now = {expert: digest for config in runs.configs for expert, digest in runs.origins(config).items()}
    if not now:
        return
    own = {config.name for config in runs.configs}
    others = set(runs.out.list()) - own if of_all and (runs.out / CONTROLS).list() else set[str]()
    for folder in (runs.out / name for name in sorted(own | others)):
        for expert, before in _noted_experts(folder).items():
            if now.get(expert, before) != before:
                raise RunDirectoryError(
                    f"the results in {folder.uri} are of other experts than those in {runs.store_uri}",
                    f"{expert} {_origin(before)} there, and {_origin(now[expert])} here",
                    "give another --out, or the --store of those results",
                )


def _noted_experts(folder: Location) -> Mapping[str, str]:
    """Experts that a run's results were made from, as in `DataNote.experts`; empty without results or a valid note."""
    with suppress(CorruptFileError):
        if (folder / RECIPE).exists() and has_results(folder):
            note = DataNote.read(folder)
            return note.experts if note else {}
    return {}


def _origin(digest: str) -> str:
    """Phrase on the origin of an expert's weights: imported with this digest, or trained if the digest is ""."""
    return f"was imported with weights {digest[:8]}" if digest else "was trained"


def _check_data(runs: Runs, config: RunConfig) -> None:
    raw = runs.raw(config)
    note = DataNote.read(runs.folder(config))
    if note is not None and note.fingerprint != raw.fingerprint and has_results(runs.folder(config)):
        raise RunDirectoryError(
            f"{runs.folder(config).uri} holds a run on other images than those of {raw.name}",
            "the data set was changed, or dataset.path leads to another one",
            "give another --out or --set name=...",
        )
    smallest = int(np.bincount(raw.train.labels, minlength=raw.classes).argmin())
    left, held_out, tested = (int((of.labels == smallest).sum()) for of in (raw.train, raw.validation, raw.test))
    if config.distill.ipc > left:
        name, share = raw.class_names[smallest], config.dataset.validation
        raise DatasetError(
            f"distill.ipc is {config.distill.ipc}, but class {name!r} of {raw.name} has {left} training images",
            f"{held_out} more are for validation (dataset.validation={share:g}) and {tested} for testing",
            f"use --set distill.ipc={left}, or add images of this class",
        )
    top = config.evaluate.top_logits
    if config.evaluate.stores_labels and top is not None and top >= raw.classes:
        raise ConfigError(
            f"evaluate.top_logits is {top}, and {raw.name} has {raw.classes} classes",
            remedy=f"use --set evaluate.top_logits={raw.classes - 1} or fewer, or null for all",
        )
    if config.dataset.mean is not None:
        require_per_channel(config.dataset.mean, raw.channels)
    method_of(config).check_images(config, raw)
    require_whole_classes(config.cluster.shards, raw.classes, raw.name)
    _check_networks(runs, config)
    if runs.stored_transform(config.dataset) is None:
        runs.fitting_cost(config.dataset).require_memory()
    trained = (config, *config.each_auxiliary(), *config.own_teacher())
    strategies = [each.experts.augmentation for each in trained]
    for strategy in (*strategies, config.distill.augmentation, config.evaluate.augmentation):
        parse_strategy(strategy)


def _check_networks(runs: Runs, config: RunConfig) -> None:
    trained = len(trained_backbones(config))
    for number, backbone in enumerate(config.each_backbone()):
        looks = config.meta_network_count > 0 and number == 0
        key = f"backbones.{number - 1}.network" if number else "network"
        built = _check_network(runs, config, backbone.network, key, has_maps=looks)
        if number < trained:
            _check_experts(runs, backbone, built, method_of(config).epochs_read(backbone))
    for number, auxiliary in enumerate(config.each_auxiliary()):
        key = f"metadd.auxiliaries.{number}"
        built = _check_network(runs, config, auxiliary.network, key, has_maps=True)
        _check_experts(runs, auxiliary, built, [auxiliary.experts.epochs])
        if auxiliary.network == config.network:
            raise ConfigError(
                f"{key} is the backbone itself",
                "MetaDD compares what different architectures see",
                "give another one, such as {architecture: resnet18}",
            )
    for teacher in config.own_teacher():
        built = _check_network(runs, config, teacher.network, "evaluate.teacher.network")
        _check_experts(runs, teacher, built, [teacher.experts.epochs])
    asked = {network.resolved(runs.raw(config).size): name for network, name in runs.asked.items()}
    for number, network in enumerate(config.evaluate.networks):
        _check_network(runs, config, network, asked.get(network, f"evaluate.networks.{number}"), states_norm=False)


def _check_network(
    runs: Runs, config: RunConfig, network: NetworkConfig, key: str, *, has_maps: bool = False, states_norm: bool = True
) -> nn.Module:
    """Build a network for the images of the run `config`.

    Args:
        key: setting or option with which the user gave the network, named in errors.
        has_maps: True to require class activation maps.
        states_norm: True to require that a user's own network has the normalisation layers that `norm` names.

    Raises:
        ConfigError: the network cannot be built, or does not meet these requirements.
    """
    raw = runs.raw(config)
    spec = network.for_images(raw.channels, raw.size, raw.classes)
    try:
        built = build_network(spec, seed=0)
        if ":" in network.architecture:  # a user's own class
            require_logits(built, spec)
            if states_norm:
                require_stated_norm(built, spec)
        if has_maps:
            require_maps(built, spec)
    except ConfigError as failure:
        raise _under(failure, key) from None
    return built


def _check_experts(runs: Runs, config: RunConfig, network: nn.Module, epochs: Sequence[int]) -> None:
    """Raise an error if stored experts do not fit `network`, or lack any of `epochs`, the epochs that a recipe reads.

    Only the first expert in the store is checked; none if the store has none.

    Args:
        config: a run with one network, whose experts are checked.

    Raises:
        StoreError: the experts' parameters have other shapes than those of `network`.
        MissingExpertsError: an epoch is not stored.
    """
    group = runs.experts(config)
    for expert in group.experts()[:1]:  # the first stands for all: normally all keep the same epochs
        info = group.read_info(expert)
        if tuple(map(tuple, info.parameter_shapes)) != tuple(FlatNetwork(network).shapes):
            raise StoreError(
                f"the experts in {group.location.uri} do not fit the present {config.network.architecture}",
                "another version of this package, or of your network's module, trained them",
                f"give another --store, or delete them with `datm-ray store rm {runs.store_uri} {group.key}`",
            )
        missing = set(epochs) - set(info.epochs)
        if missing:
            is_last = missing == {config.experts.epochs}  # the last epoch is stored whatever experts.keep_epochs is
            more = "" if is_last else ", and experts.keep_epochs, so that all recipes can share them"
            raise MissingExpertsError(
                f"{config.name} reads epoch {min(missing)}, which the experts in {group.location.uri} lack",
                "they were trained for recipes that read other epochs, or imported with their last epoch alone",
                f"give another --store{more}",
            )


def require_distillable(runs: Runs) -> None:
    """Raise a `ConfigError` for a run that its method cannot distil."""
    for config in runs.configs:
        method_of(config).check(config)


def require_memory(runs: Runs, executor: Executor | None = None) -> None:
    """Raise a `ConfigError` if distilling one of the unfinished sets takes more memory than its workers may take.

    A run whose workers' memory is unknown here is not checked. Workers check their own memory again.

    Args:
        executor: where the workers run; `None` if it is not started yet, to assume this machine's CPUs.
    """
    for config in runs.unfinished():
        if runs.elsewhere and config.cluster.memory is None:
            continue
        own, sharing = layout(runs, config, executor)
        plans_of(own, runs.shape(config), sharing)


def _require_device(runs: Runs) -> None:
    """Raise a `ClusterError` if workers are to use GPUs of this machine and it has none."""
    cluster = runs.configs[0].cluster
    wanted = cluster.device == "cuda" or (bool(cluster.gpus_per_worker) and not runs.alone)
    if wanted and not runs.elsewhere and not torch.cuda.is_available():
        raise ClusterError(
            "cluster.gpus_per_worker or cluster.device asks for GPUs, and this machine has none",
            "they are on a cluster, or torch is not built for them",
            "give its --address, or leave both settings out",
        )


def require_experts(runs: Runs, networks: Sequence[RunConfig]) -> None:
    """Raise a `MissingExpertsError` for a network whose experts are not all in the store.

    Args:
        networks: runs with one network each.
    """
    for network in networks:
        if missing := len(runs.missing_experts(network)):
            place, count = runs.experts(network).location, network.experts.count
            raise MissingExpertsError(
                f"{place.uri} holds {count - missing} of {count} experts of {network.name}",
                "expert training has not finished for this recipe, or it used another --store",
                f"run `datm-ray experts {network.name}` with the same --set, --out and --store first",
            )


def require_priors(runs: Runs) -> None:
    """Raise a `MissingExpertsError` for a run whose trained prior is not in the store."""
    for config in runs.missing_priors()[:1]:
        raise MissingExpertsError(
            f"{runs.store_uri} holds no trained prior, which {config.name} needs",
            "its training has not finished for this recipe, or it used another --store",
            f"run `datm-ray experts {config.name}` with the same --set, --out and --store first",
        )


def _under(failure: ConfigError, key: str) -> ConfigError:
    """Copy of an error about `network.…` that names the key or option the user wrote, such as `backbones.0.network`."""
    parts = (failure.fact, failure.cause, failure.remedy)
    if key.startswith("--"):
        fact, *more = (re.sub(r"\bnetwork\.(?=\w)", "", part) for part in parts)
        return ConfigError(f"{key}: {fact}", *more)
    return ConfigError(*(re.sub(r"\bnetwork\.(?=\w)", f"{key}.", part) for part in parts))


def unequal_keys(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys whose values differ, with those in `earlier` and in `now`: "experts.epochs (50 there, 30 here)"."""
    found = differing([earlier, now])
    return [f"{RENAMED.get(key, key)} ({there} there, {here} here)" for key, (there, here) in found]
