"""Tasks that are left of each stage: experts to train, sets to distil, networks to score."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from datm_ray.config import DatasetConfig, NetworkConfig, Role, RunConfig, network_names
from datm_ray.errors import ConfigError
from datm_ray.pipeline.runs import Runs
from datm_ray.planning.fit import ALONE, DataShape, Layout, network_cost, plans_of
from datm_ray.runtime.executor import Executor, Task
from datm_ray.stages.evaluate import FAIR_ROWS, ROWS, result_location, work_of
from datm_ray.stages.experts import experts_at_a_time, stacks

DatasetTask = tuple[DatasetConfig, Task]
"""A task, and the data set its worker must hold."""


def expert_tasks(runs: Runs) -> list[DatasetTask]:
    """One task for every stack of experts that any of the runs needs and the store does not hold."""
    tasks = []
    for config in expert_recipes(runs):
        group = runs.experts(config)
        for stack in stacks(runs.missing_experts(config), stack_size(runs, config), config.experts.count):
            last = min(stack[-1], config.experts.count - 1)
            name = f"expert {stack[0]}" if last == stack[0] else f"experts {stack[0]}-{last}"
            arguments = (config, runs.store_uri, stack)
            steps = config.experts.epochs * (2 if config.experts.optimiser == "gsam" else 1)
            work = len(stack) * steps * len(runs.raw(config).train) * _flop(runs, config)
            task = Task(f"{name} of {group.key}", arguments, run=config.name, stage="experts", weight=work)
            tasks.append((config.dataset, task))
    return tasks


def expert_recipes(runs: Runs) -> list[RunConfig]:
    """One configuration for each group of shared experts, with the largest `count` and `keep_epochs` of its runs."""
    recipes: dict[str, RunConfig] = {}
    for config in runs.networks():
        uri = runs.experts(config).location.uri
        other = recipes.setdefault(uri, config).experts
        needs = {
            "count": max(other.count, config.experts.count),
            "keep_epochs": max(recipes[uri].kept_bound, config.kept_bound),
        }
        recipes[uri] = recipes[uri].model_copy(update={"experts": other.model_copy(update=needs)})
    return list(recipes.values())


def stack_size(runs: Runs, config: RunConfig) -> int:
    """Number of experts that are trained together."""
    shape = runs.shape(config)
    return experts_at_a_time(config, shape.image, shape.classes)


def distill_tasks(runs: Runs, executor: Executor | None = None) -> list[DatasetTask]:
    """One task for every set that is not finished."""
    tasks = []
    for config in runs.unfinished():
        arguments = (config, runs.store_uri, runs.folder(config).uri, layout(runs, config, executor).sharing)
        size, fewer = config.workers_per_set, smaller_groups(runs, config)
        settings, images = config.distill, config.distill.ipc * runs.raw(config).classes
        passes = settings.iterations * settings.student_steps * min(images, settings.batch_size)
        work = passes * sum(_flop(runs, each) for each in config.each_backbone())
        task = Task(config.name, arguments, size, fewer, run=config.name, stage="distillation", weight=work)
        tasks.append((config.dataset, task))
    return tasks


def _flop(runs: Runs, config: RunConfig, network: NetworkConfig | None = None) -> float:
    """Operations of one image in a forward pass through the backbone or another network."""
    return network_cost(config.model_copy(update={"network": network or config.network}), runs.shape(config)).flop


def smaller_groups(runs: Runs, config: RunConfig) -> tuple[int, ...]:
    """Smaller numbers of workers that can resume a set, the largest first. Unknown memory is taken to suffice."""
    rows, roles = len(config.roles), config.roles if len(config.roles) > 1 else ()
    fewer = range(1, config.cluster.shards)
    # What fits some shards fits more of them, since each then holds no more images.
    first = bisect_left(fewer, True, key=lambda shards: _would_fit(runs, config, shards, roles))
    sizes = [rows * shards for shards in reversed(fewer[first:])]
    alone = [1] if rows > 1 and _would_fit(runs, config, 1, ()) else []
    return (*sizes, *alone)


def _would_fit(runs: Runs, config: RunConfig, shards: int, roles: tuple[Role, ...]) -> bool:
    if runs.elsewhere and config.cluster.memory is None:
        return True  # workers check their own memory, and executors then wait for more of them
    shape = runs.shape(config)
    try:
        plans_of(config, DataShape(shape.image, shape.classes, 0), Layout(shards, roles, 1))
    except ConfigError:
        return False
    return True


def layout(runs: Runs, config: RunConfig, executor: Executor | None) -> Layout:
    """Workers that distil a set beside the other sets. Without an executor, it has this machine's CPUs."""
    if runs.alone or (executor is not None and config.workers_per_set > executor.workers):
        return ALONE
    wanted = sum(each.workers_per_set for each in runs.unfinished())
    return Layout.of(config, wanted, executor.workers_per_machine if executor else None)


def evaluate_tasks(
    runs: Runs, scored_rows: Callable[[RunConfig], Sequence[tuple[str, NetworkConfig | None]]]
) -> list[DatasetTask]:
    """One task for every scored row and seed without a result, once for runs that share it; all real data last."""
    tasks: dict[str, DatasetTask] = {}
    everything = [(config, row, network) for config in runs.configs for row, network in scored_rows(config)]
    for config, row, network in sorted(everything, key=lambda each: each[1] == "full"):
        raw = runs.raw(config)
        work = work_of(config, row, network, raw.classes, len(raw.train), _flop(runs, config, network))
        name = f"{config.name} {row}{_on(config, network)}"
        for number in range(config.evaluate.seeds):
            place = result_location(runs.out, config, raw.fingerprint, row, number, network)
            if not place.exists():
                uris = (runs.store_uri, runs.folder(config).uri, place.uri)
                arguments = (config, *uris, row, number, network)
                task = Task(f"{name} {number}", arguments, run=config.name, stage="evaluation", weight=work)
                tasks[place.uri] = (config.dataset, task)
    return list(tasks.values())


def row_title(config: RunConfig, row: str, network: NetworkConfig | None) -> str:
    """A run's row in words, such as "birds, distilled" or "birds, distilled on vgg11"."""
    return f"{config.name}, {(ROWS | FAIR_ROWS)[row]}{_on(config, network)}"


def _on(config: RunConfig, network: NetworkConfig | None) -> str:
    names = dict(zip(config.scored_networks, network_names(config.scored_networks), strict=True))
    return f" on {names[network]}" if network else ""
