"""A run from recipe to report: which stages there are, what each needs, and what is already done.

An output folder holds any number of runs that share experts and controls:

    <out>/experts/                the trajectory store, unless another one is given
    <out>/<run>/recipe.yaml       the run's configuration
    <out>/<run>/dataset.json      fingerprint and size of its data set
    <out>/<run>/experts-cost.json what its experts have cost, as the store knows it
    <out>/<run>/*.arrow           see `distill`
    <out>/<run>/evaluation/       one JSON file per row and seed
    <out>/transforms/             normalisations of the sets, once each; see `artifact`
    <out>/controls/               training on real images, shared by runs
    <out>/report.html, summary.json

A stage is a list of tasks; a task whose result exists is skipped. So running the same command again resumes where it
stopped, for whatever reason it stopped.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from datm_ray.artifact import TRANSFORMS, keep_transform
from datm_ray.config import (
    DatasetConfig,
    NetworkConfig,
    Role,
    RunConfig,
    load_recipe_of_run,
    network_names,
    run_identity,
    to_yaml,
)
from datm_ray.core.augment import parse_strategy
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.networks.registry import build_network, require_maps
from datm_ray.data.dataset import Dataset, prepare
from datm_ray.data.sources import RawDataset, load_raw
from datm_ray.data.transform import FitCost, Transform
from datm_ray.errors import (
    ClusterError,
    ConfigError,
    DatasetError,
    MissingExpertsError,
    RunDirectoryError,
    StoreError,
)
from datm_ray.monitor.loggers import Logger, open_logger, require_logger
from datm_ray.monitor.progress import Reporter
from datm_ray.planning.fit import ALONE, DataShape, Layout, plans_of, require_whole_classes
from datm_ray.report import RunSummary, accuracy_table, fair_table, networks_table, write_report, write_summary
from datm_ray.runtime.executor import Executor, Task, require_precision
from datm_ray.stages.checkpoint import CHECKPOINT
from datm_ray.stages.distill import SYNTHETIC, DistillWorker
from datm_ray.stages.evaluate import (
    FAIR_ROWS,
    ON_OTHERS,
    ROWS,
    EvaluateWorker,
    read_fair_rows,
    read_fair_scores,
    read_network_scores,
    read_scores,
    result_location,
)
from datm_ray.stages.expert_progress import ExpertProgress
from datm_ray.stages.experts import (
    ExpertWorker,
    expert_group,
    experts_at_a_time,
    experts_cost,
    network_spec,
    progress_of,
    stacks,
    write_experts_cost,
)
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.trajectories import ExpertGroup

RECIPE, DATA = "recipe.yaml", "dataset.json"

DatasetTask = tuple[DatasetConfig, Task]
"""A task, and the data set its worker must hold."""


class Pipeline:
    """The stages for some runs that share an output folder.

    Creating it checks everything that can be checked beforehand and writes nothing.

    Raises:
        DatmError: a data set, path or range that cannot be used.
    """

    distill_worker: type[DistillWorker] = DistillWorker
    """What distils; a benchmark may put another one here."""

    def __init__(
        self,
        configs: Sequence[RunConfig],
        out: str,
        store: str | None = None,
        *,
        elsewhere: bool = False,
        alone: bool = False,
        asked: Mapping[NetworkConfig, str] | None = None,
    ) -> None:
        """Check runs.

        Args:
            out: output folder, a path or URI.
            store: trajectory store; none puts it into the output folder.
            elsewhere: whether the workers may run on other machines, whose memory is not this one's.
            alone: whether one process will do all the work.
            asked: how networks to score on were asked for, where a recipe's `evaluate.networks` did not name them.
        """
        self._elsewhere, self._alone = elsewhere, alone
        self._asked = asked or {}
        self.out = open_location(out)
        # Absolute, for workers resolve it too and may have another working directory.
        self.store_uri = open_location(store).uri if store else (self.out / "experts").uri
        self._raw: dict[DatasetConfig, RawDataset] = {}
        self._prepared: dict[DatasetConfig, Dataset] = {}
        require_together(configs)
        self._log_to = configs[0].cluster.log_to
        self._log = Logger()
        require_logger(self._log_to, self.out)
        for config in configs:
            self._check_precision(config)
        self.configs = [self._read(config) for config in configs]
        """The runs, resolved: no normalisation is auto and no depth null."""
        for config in self.configs:
            self._check_folder(config)
            self._check_data(config)

    def plan(self) -> list[str]:
        """What is left to do, a line for each stage that has something to do.

        Raises:
            ConfigError: a set that does not fit into memory.
        """
        self._require_matchable()
        self._require_device()
        self.out.require_writable()
        open_location(self.store_uri).require_writable()
        self._require_memory()
        lines = []
        experts = sum(len(self._missing_experts(config)) for config in self._expert_recipes())
        for title, count, tasks in (
            ("experts to train", experts, self._expert_tasks()),
            ("sets to distil", None, self._distill_tasks()),
            ("networks to train for evaluation", None, self._evaluate_tasks()),
        ):
            names = [task.name for _, task in tasks]
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"{len(names) if count is None else count} {title}" + (f": {shown}" if names else ""))
        return lines

    def data_lines(self) -> list[str]:
        """What was understood of each data set, and how its files were read."""
        lines = []
        for raw in dict.fromkeys(self._raw.values()):
            height, width = raw.size
            parts = (("training", raw.train), ("validation", raw.validation), ("test", raw.test))
            counts = ", ".join(f"{len(images):,} {name}" for name, images in parts)
            lines.append(f"{raw.name}: {raw.classes} classes, {counts} images of {raw.channels}x{height}x{width}")
            lines += [f"{raw.name}: {note}" for note in raw.notes]
        for dataset, raw in self._raw.items():
            cost = FitCost.of(dataset.kind, (raw.channels, *raw.size))
            if cost.minutes >= 1 and self._group_with_transform(dataset) is None:
                lines.append(f"{raw.name}: fitting zca takes {cost}, once")
        return lines

    def run_all(self, start: Callable[[], Executor], reporter: Reporter) -> None:
        """Experts, distillation, evaluation."""
        self._require_matchable()
        with self._started(start, reporter, distils=True) as executor:
            self._experts(executor, reporter)
            self._distill(executor, reporter)
            self._evaluate(executor, reporter)

    def train_experts(self, start: Callable[[], Executor], reporter: Reporter) -> None:
        """Train the experts that are missing in the store."""
        with self._started(start, reporter) as executor:
            self._experts(executor, reporter)

    def distill(self, start: Callable[[], Executor], reporter: Reporter) -> None:
        """Distil the sets that are not finished."""
        self._require_matchable()
        for config in self.configs:
            self._require_experts([*config.each_backbone(), *config.each_auxiliary()])
        with self._started(start, reporter, distils=True) as executor:
            self._note_experts_cost()  # they may have been trained by another command
            self._distill(executor, reporter)

    def evaluate(self, start: Callable[[], Executor], reporter: Reporter) -> None:
        """Score the rows that are missing."""
        self._require_matchable()
        for config in self.configs:
            self._require_experts(config.each_backbone())
            if not (self._folder(config) / SYNTHETIC).exists():
                raise RunDirectoryError(
                    f"{self._folder(config).uri} holds no synthetic set",
                    "this recipe has not been distilled there",
                    f"run `datm-ray distill {config.name}` with the same --out first",
                )
        with self._started(start, reporter) as executor:
            self._evaluate(executor, reporter)

    def table(self) -> str:
        """The accuracy table as text, and those of other architectures."""
        found = summaries(self.out, self.configs)
        others = [networks_table(summary) for summary in found if summary.networks]
        fair = [fair_table(found)] if any(summary.fair for summary in found) else []
        return "\n\n".join([accuracy_table(found), *fair, *others])

    # --- stages ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _started(
        self, start: Callable[[], Executor], reporter: Reporter, *, distils: bool = False
    ) -> Iterator[Executor]:
        self.out.require_writable()
        open_location(self.store_uri).require_writable()
        executor = start()
        try:
            if distils:
                for config in self._unfinished():
                    # An unfinished distillation may resume with fewer workers: nodes may be lost since it started.
                    is_unfinished = (self._folder(config) / CHECKPOINT).exists()
                    fewer = self._fewer(config) if is_unfinished else ()
                    executor.require_workers(config.name, min((config.workers_per_set, *fewer)))
                self._require_memory(executor)
            for line in (f"Running on {executor.description}", *self.data_lines()):
                reporter.message(line)
            self._log = open_logger(self._log_to, self.out, self.configs, reporter.message)
            for config in self.configs:
                # The recipe last: it is what marks a folder as a run's, for `report` too.
                (self._folder(config) / DATA).write_json(self._data_note(config))
                (self._folder(config) / RECIPE).write_text(to_yaml(self._with_rows_before(config)))
            yield executor
        finally:
            self._log.close()
            executor.close()

    def _with_rows_before(self, config: RunConfig) -> RunConfig:
        """The run, with the architectures and rows too that an earlier command has scored it on."""
        earlier = self._earlier(config)
        before = earlier.evaluate.networks if earlier else ()
        more = tuple(network for network in before if network not in config.evaluate.networks)
        networks = (*config.evaluate.networks, *more)
        fair = config.evaluate.fair or bool(earlier and earlier.evaluate.fair)
        more_rows = {"networks": networks, "fair": fair}
        return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=more_rows)})

    def _experts(self, executor: Executor, reporter: Reporter) -> None:
        for config in self._networks():
            group = self._group(config)
            if not group.has_transform():
                transform = self._dataset(config).transform
                twin = keep_transform(transform, self.out / TRANSFORMS)
                group.write_transform(transform.to_arrays(), transform.to_metadata(), twin)
        self._clear_up()
        self._run("Experts", ExpertWorker, "train", self._expert_tasks, executor, reporter)
        self._note_experts_cost()

    def _note_experts_cost(self) -> None:
        """Into the runs' folders, where the report finds it without the store."""
        for config in self.configs:
            costs = [
                experts_cost(each, self._group(each)) for each in (*config.each_backbone(), *config.each_auxiliary())
            ]
            write_experts_cost(self._folder(config), costs)

    def _expert_tasks(self) -> list[DatasetTask]:
        tasks = []
        for config in self._expert_recipes():
            group = self._group(config)
            for stack in stacks(self._missing_experts(config), self._stack_size(config), config.experts.count):
                last = min(stack[-1], config.experts.count - 1)
                name = f"expert {stack[0]}" if last == stack[0] else f"experts {stack[0]}-{last}"
                task = Task(f"{name} of {group.key}", (config, self.store_uri, stack), run=config.name, stage="experts")
                tasks.append((config.dataset, task))
        return tasks

    def _missing_experts(self, config: RunConfig) -> list[int]:
        done = set(self._group(config).experts())
        return [expert for expert in range(config.experts.count) if expert not in done]

    def _stack_size(self, config: RunConfig) -> int:
        raw = self._raw[config.dataset]
        return experts_at_a_time(config, (raw.channels, *raw.size), raw.classes)

    def _clear_up(self) -> None:
        """Remove what is left of experts in progress whose worker died after it had stored them."""
        for config in self._expert_recipes():
            group, missing = self._group(config), set(self._missing_experts(config))
            if group.progress.list():
                ExpertProgress.clear_up(group)
                for stack in stacks(range(config.experts.count), self._stack_size(config), config.experts.count):
                    if not missing & set(stack):
                        progress_of(config, group, stack).remove()

    def _expert_recipes(self) -> list[RunConfig]:
        """One for every group of experts that the runs share: as many, and as many epochs of them, as any run needs."""
        recipes: dict[str, RunConfig] = {}
        for config in self._networks():
            uri = self._group(config).location.uri
            other = recipes.setdefault(uri, config).experts
            needs = {
                "count": max(other.count, config.experts.count),
                "keep_epochs": max(recipes[uri].kept_bound, config.kept_bound),
            }
            recipes[uri] = recipes[uri].model_copy(update={"experts": other.model_copy(update=needs)})
        return list(recipes.values())

    def _networks(self) -> list[RunConfig]:
        """Every network of every run that needs experts, as a run with that network alone."""
        return [each for config in self.configs for each in (*config.each_backbone(), *config.each_auxiliary())]

    def _distill(self, executor: Executor, reporter: Reporter) -> None:
        def open_tasks() -> list[DatasetTask]:
            return self._distill_tasks(executor)

        self._run("Distillation", self.distill_worker, "distill", open_tasks, executor, reporter)

    def _distill_tasks(self, executor: Executor | None = None) -> list[DatasetTask]:
        tasks = []
        for config in self._unfinished():
            sharing = self._layout(config, executor).sharing
            arguments = (config, self.store_uri, self._folder(config).uri, sharing)
            size, fewer = config.workers_per_set, self._fewer(config)
            task = Task(config.name, arguments, size, fewer, run=config.name, stage="distillation")
            tasks.append((config.dataset, task))
        return tasks

    def _fewer(self, config: RunConfig) -> tuple[int, ...]:
        """Smaller numbers of workers that can resume a set, the largest first. Unknown memory is taken to suffice."""
        rows, roles = len(config.roles), config.roles if len(config.roles) > 1 else ()
        fewer = range(1, config.cluster.shards)
        # What fits some shards fits more of them, since each then holds no more images.
        first = bisect_left(fewer, True, key=lambda shards: self._would_fit(config, shards, roles))
        sizes = [rows * shards for shards in reversed(fewer[first:])]
        alone = [1] if rows > 1 and self._would_fit(config, 1, ()) else []
        return (*sizes, *alone)

    def _would_fit(self, config: RunConfig, shards: int, roles: tuple[Role, ...]) -> bool:
        if self._elsewhere and config.cluster.memory is None:
            return True  # workers look at their own memory, and executors then wait for more of them
        raw = self._raw[config.dataset]
        try:
            plans_of(config, DataShape((raw.channels, *raw.size), raw.classes, 0), Layout(shards, roles, 1))
        except ConfigError:
            return False
        return True

    def _unfinished(self) -> list[RunConfig]:
        return [config for config in self.configs if not (self._folder(config) / SYNTHETIC).exists()]

    def _layout(self, config: RunConfig, executor: Executor | None) -> Layout:
        """Workers that distil a set beside the other sets. Without an executor, it has this machine's CPUs."""
        if self._alone or (executor is not None and config.workers_per_set > executor.workers):
            return ALONE
        wanted = sum(each.workers_per_set for each in self._unfinished())
        return Layout.of(config, wanted, executor.workers_per_machine if executor else None)

    def _evaluate(self, executor: Executor, reporter: Reporter) -> None:
        self._run("Evaluation", EvaluateWorker, "evaluate", self._evaluate_tasks, executor, reporter)

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """What a run is scored on: rows of its table, and the network, none for the backbone."""
        rows: list[tuple[str, NetworkConfig | None]] = [(row, None) for row in _rows_of(config)]
        return rows + [(row, network) for network in config.scored_networks for row in ON_OTHERS]

    def _evaluate_tasks(self) -> list[DatasetTask]:
        tasks: dict[str, DatasetTask] = {}
        for config in self.configs:
            fingerprint = self._raw[config.dataset].fingerprint
            names = dict(zip(config.scored_networks, network_names(config.scored_networks), strict=True))
            for row, network in self.scored_rows(config):
                for number in range(config.evaluate.seeds):
                    place = result_location(self.out, config, fingerprint, row, number, network)
                    if not place.exists():
                        uris = (self.store_uri, self._folder(config).uri, place.uri)
                        name = f"{config.name} {row}{f' on {names[network]}' if network else ''} {number}"
                        arguments = (config, *uris, row, number, network)
                        task = Task(name, arguments, run=config.name, stage="evaluation")
                        tasks[place.uri] = (config.dataset, task)  # once for runs that share it
        return list(tasks.values())

    def _run(
        self,
        title: str,
        worker: Callable[..., Any],
        method: str,
        open_tasks: Callable[[], Sequence[DatasetTask]],
        executor: Executor,
        reporter: Reporter,
    ) -> None:
        """Run the open tasks of one stage, data set by data set.

        Raises:
            ClusterError: afterwards, where workers have written to a place that this process does not see.
        """
        tasks = open_tasks()
        if not tasks:
            reporter.message(f"{title}: nothing to do, all finished")
            return
        by_dataset: dict[DatasetConfig, list[Task]] = {}
        for dataset, task in tasks:
            by_dataset.setdefault(dataset, []).append(task)
        with reporter.stage(title, len(tasks)) as stage:
            for dataset, group in by_dataset.items():
                setup = (executor.share(self._prepared_dataset(dataset)), self.configs[0].cluster)
                for task, event in executor.run(worker, setup, method, group):
                    stage.event(task, event)
                    self._log.event(task, event)
        if unseen := open_tasks():
            raise ClusterError(
                f"{title}: {len(unseen)} result(s), {unseen[0][1].name} the first, cannot be seen from here",
                "the workers run on machines that do not share this disk",
                "give --out and --store on a shared file system or on s3://",
            )

    # --- what stages need -----------------------------------------------------------------------------------------

    def _folder(self, config: RunConfig) -> Location:
        return self.out / config.name

    def _group(self, config: RunConfig) -> ExpertGroup:
        raw = self._raw[config.dataset]
        return expert_group(self.store_uri, config, raw.name, raw.fingerprint)

    def _dataset(self, config: RunConfig) -> Dataset:
        """The data set under the transform that the run's experts were trained with."""
        if config.dataset not in self._prepared:
            raw = self._raw[config.dataset]
            self._prepared[config.dataset] = prepare(
                raw,
                config.dataset.kind,
                self._stored_transform(config.dataset),
                device="cuda" if torch.cuda.is_available() else "cpu",
            )
        return self._prepared[config.dataset]

    def _prepared_dataset(self, dataset: DatasetConfig) -> Dataset:
        return self._dataset(next(config for config in self.configs if config.dataset == dataset))

    def _stored_transform(self, dataset: DatasetConfig) -> Transform | None:
        group = self._group_with_transform(dataset)
        if group is None:
            return None
        stored = group.read_transform()
        return Transform.from_arrays(stored.arrays, stored.metadata, group.transform_file.uri)

    def _group_with_transform(self, dataset: DatasetConfig) -> ExpertGroup | None:
        """A group of experts that has the data set's transform, of any network of the runs; None if none has it."""
        groups = (self._group(each) for each in self._networks() if each.dataset == dataset)
        return next((group for group in groups if group.has_transform()), None)

    def _earlier(self, config: RunConfig) -> RunConfig | None:
        """The run as an earlier command has written it into its folder."""
        recipe = self._folder(config) / RECIPE
        return _read_recipe(recipe) if recipe.exists() else None

    def _check_folder(self, config: RunConfig) -> None:
        earlier = self._earlier(config)
        if earlier is not None and run_identity(earlier) != run_identity(config):
            raise RunDirectoryError(
                f"{self._folder(config).uri} holds a run of {config.name!r} with another configuration",
                f"it differs in {', '.join(_differences(run_identity(earlier), run_identity(config)))}",
                "give another --out or --set name=..., or, for the run that is there, "
                f"{(self._folder(config) / RECIPE).uri} as the recipe",
            )

    def _read(self, config: RunConfig) -> RunConfig:
        """Read the run's images, unless another run has; the run, resolved for their size."""
        d = config.dataset
        alike = (
            raw for each, raw in self._raw.items() if each.model_copy(update={"normalisation": d.normalisation}) == d
        )
        raw = next(alike, None)
        if raw is None:
            copies = 1 if self._alone else 2  # Ray's object store has one of its own
            raw = load_raw(d.source, d.path, resize=d.resize, validation=d.validation, copies=copies)
        config = config.resolved(raw.size)
        self._raw[config.dataset] = raw
        return config

    def _check_data(self, config: RunConfig) -> None:
        raw = self._raw[config.dataset]
        note = self._folder(config) / DATA
        if note.exists() and _read_note(note)["fingerprint"] != raw.fingerprint:
            raise RunDirectoryError(
                f"{self._folder(config).uri} holds a run on other images than those of {raw.name}",
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
        require_whole_classes(config.cluster.shards, raw.classes, raw.name)
        self._check_networks(config)
        if self._group_with_transform(config.dataset) is None:
            FitCost.of(config.dataset.kind, (raw.channels, *raw.size)).require_memory()
        strategies = [config.experts.augmentation, config.distill.augmentation, config.evaluate.augmentation]
        for strategy in (*strategies, *(each.experts.augmentation for each in config.each_auxiliary())):
            parse_strategy(strategy)

    def _check_networks(self, config: RunConfig) -> None:
        for number, backbone in enumerate(config.each_backbone()):
            looks = config.metadd is not None and number == 0
            key = f"backbones.{number - 1}.network" if number else "network"
            self._check_experts(backbone, self._check_network(config, backbone.network, key, has_maps=looks))
        for number, auxiliary in enumerate(config.each_auxiliary()):
            key = f"metadd.auxiliaries.{number}"
            self._check_experts(auxiliary, self._check_network(config, auxiliary.network, key, has_maps=True))
            if auxiliary.network == config.network:
                raise ConfigError(
                    f"{key} is the backbone itself",
                    "MetaDD compares what different architectures see",
                    "give another one, such as {architecture: resnet18}",
                )
        asked = {network.resolved(self._raw[config.dataset].size): name for network, name in self._asked.items()}
        for number, network in enumerate(config.evaluate.networks):
            self._check_network(config, network, asked.get(network, f"evaluate.networks.{number}"))

    def _check_network(
        self, config: RunConfig, network: NetworkConfig, key: str, *, has_maps: bool = False
    ) -> nn.Module:
        """The network for the images, which shows feature maps where it has to."""
        raw = self._raw[config.dataset]
        spec = network_spec(config.model_copy(update={"network": network}), raw.channels, raw.size, raw.classes)
        try:
            built = build_network(spec, seed=0)
            if has_maps:
                require_maps(built)
        except ConfigError as failure:
            raise _under(failure, key) from None
        return built

    def _check_experts(self, config: RunConfig, network: nn.Module) -> None:
        """Experts that are stored may lack epochs that this recipe matches, or be of another version's network."""
        group = self._group(config)
        for expert in group.experts()[:1]:  # all of a group are kept alike, but for a change of mind half way
            info = group.read_info(expert)
            if tuple(map(tuple, info.parameter_shapes)) != tuple(FlatNetwork(network).shapes):
                raise StoreError(
                    f"the experts in {group.location.uri} are not of the {config.network.architecture} that it is now",
                    "another version of this package trained them",
                    f"give another --store, or delete them with `datm-ray store rm {self.store_uri} {group.key}`",
                )
            missing = set(config.kept_epochs) - set(info.epochs)
            if missing:
                raise MissingExpertsError(
                    f"{config.name} can match epoch {min(missing)}, which the experts in {group.location.uri} lack",
                    "they were trained for recipes that match earlier epochs only",
                    "give another --store, and experts.keep_epochs, so that all recipes can share them",
                )

    def _require_matchable(self) -> None:
        for config in self.configs:
            config.require_matchable()

    def _require_memory(self, executor: Executor | None = None) -> None:
        """Refuse sets that would not fit, before hours are spent on their experts; workers check again."""
        for config in self._unfinished():
            if self._elsewhere and config.cluster.memory is None:
                continue
            raw = self._raw[config.dataset]
            shape = DataShape((raw.channels, *raw.size), raw.classes, len(raw.train) + len(raw.validation))
            plans_of(config, shape, self._layout(config, executor))

    def _require_device(self) -> None:
        """Refuse GPUs that this machine has not, where the workers are to run on it."""
        cluster = self.configs[0].cluster
        wanted = cluster.device == "cuda" or (bool(cluster.gpus_per_worker) and not self._alone)
        if wanted and not self._elsewhere and not torch.cuda.is_available():
            raise ClusterError(
                "workers are to have GPUs (cluster.gpus_per_worker, cluster.device), and this machine has none",
                "they are on a cluster, or torch is not built for them",
                "give its --address, or leave both settings out",
            )

    def _check_precision(self, config: RunConfig) -> None:
        cluster = config.cluster
        can_have = cluster.gpus_per_worker != 0 and (self._elsewhere or torch.cuda.is_available())
        require_precision(cluster, has_gpu=cluster.device != "cpu" and can_have)  # executors ask again

    def _require_experts(self, networks: Sequence[RunConfig]) -> None:
        for network in networks:
            group, count = self._group(network), network.experts.count
            available = sum(expert < count for expert in group.experts())
            if available < count:
                raise MissingExpertsError(
                    f"{group.location.uri} holds {available} of {count} experts of {network.name}",
                    "expert training has not finished for this recipe, or it used another --store",
                    f"run `datm-ray experts {network.name}` with the same --out and --store first",
                )

    def _data_note(self, config: RunConfig) -> dict[str, Any]:
        raw = self._raw[config.dataset]
        counts = {"training_images": len(raw.train), "test_images": len(raw.test)}
        return {"name": raw.name, "fingerprint": raw.fingerprint, **counts}


def report(out: str) -> Location:
    """Write report.html and summary.json over all runs of an output folder; needs no data set. The report's place.

    Raises:
        RunDirectoryError: the folder holds no runs.
    """
    folder = open_location(out)
    found = summaries(folder, _find_runs(folder))
    write_summary(folder, found)
    return write_report(folder, found)


def summaries(out: Location, configs: Sequence[RunConfig]) -> list[RunSummary]:
    """Scores of runs of one output folder, and what the report needs to know of them."""
    found = []
    for config in configs:
        note = _read_note(out / config.name / DATA)
        where = (out, config, note["fingerprint"])
        found.append(
            RunSummary(
                config,
                out / config.name,
                read_scores(*where),
                note["training_images"],
                read_network_scores(*where),
                fair=read_fair_scores(*where),
                fair_rows=read_fair_rows(*where),
            )
        )
    return found


def _read_note(place: Location) -> dict[str, Any]:
    """Fingerprint and number of training images, as `Pipeline._data_note` wrote them."""
    note = place.read_json()
    with rejecting_nonsense(place):
        return {"fingerprint": str(note["fingerprint"]), "training_images": int(note["training_images"])}


def _rows_of(config: RunConfig) -> list[str]:
    """Rows that the backbone is trained for."""
    return [*ROWS, *(FAIR_ROWS if config.evaluate.fair else ())]


def _find_runs(folder: Location) -> list[RunConfig]:
    recipes = [folder / name / RECIPE for name in folder.list()]
    configs = [_read_recipe(recipe) for recipe in recipes if recipe.exists()]
    if not configs:
        raise RunDirectoryError(f"{folder.uri} holds no runs", remedy="give the --out of an earlier `datm-ray run`")
    return configs


def _read_recipe(recipe: Location) -> RunConfig:
    return load_recipe_of_run(recipe.read_bytes().decode(errors="replace"), recipe.uri)


def require_together(configs: Sequence[RunConfig]) -> None:
    """Raise a `DatmError` for runs that one command cannot have."""
    _require_distinct_names(configs)
    _require_one_cluster(configs)


def _require_distinct_names(configs: Sequence[RunConfig]) -> None:
    names = [config.name for config in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RunDirectoryError(
            f"two runs are both named {twice[0]!r}",
            remedy="give each recipe once; runs under one --out need different names",
        )


def _require_one_cluster(configs: Sequence[RunConfig]) -> None:
    if any(config.cluster != configs[0].cluster for config in configs):
        raise ConfigError(
            "the recipes differ in their cluster sections, and runs of one command share their workers",
            remedy="make the sections alike, or give one command for each",
        )


def _under(failure: ConfigError, key: str) -> ConfigError:
    """A failure of a network that stands elsewhere in the recipe than under `network`, or on the command line."""
    parts = (failure.fact, failure.cause, failure.remedy)
    if key.startswith("--"):
        fact, *more = (re.sub(r"\bnetwork\.(?=\w)", "", part) for part in parts)
        return ConfigError(f"{key}: {fact}", *more)
    return ConfigError(*(re.sub(r"\bnetwork\.(?=\w)", f"{key}.", part) for part in parts))


def _differences(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys at which two configurations differ."""
    keys: list[str] = []
    for key in {**earlier, **now}:
        there, here = (side.get(key, "not set") for side in (earlier, now))
        if isinstance(there, dict) and isinstance(here, dict):
            keys += _differences(there, here, f"{prefix}{key}.")
        elif isinstance(there, dict) or isinstance(here, dict):
            keys.append(f"{prefix}{key} ({'set' if isinstance(there, dict) else 'not set'} there)")
        elif there != here:
            keys.append(f"{prefix}{key} ({there!r} there, {here!r} here)")
    return keys
