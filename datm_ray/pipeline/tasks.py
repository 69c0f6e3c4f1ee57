"""Tasks left to do in each stage: experts to train, sets to distil, labels to store, networks to score.

The first argument of every task is its run's recipe. The task's worker must hold the data set of this recipe.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from datm_ray.config import NetworkConfig, RunConfig, short_names
from datm_ray.errors import ConfigError
from datm_ray.pipeline.runs import Runs
from datm_ray.planning import work
from datm_ray.planning.memory import (
    distilling_memory,
    experts_memory,
    labelling_memory,
    prior_memory,
    scoring_memory,
)
from datm_ray.planning.work import Row, weight
from datm_ray.runtime.executor import Executor, Task
from datm_ray.runtime.machine.devices import workers_here
from datm_ray.shape import DataShape
from datm_ray.stages.distill.pieces import unfinished_pieces
from datm_ray.stages.distill.validation import is_apart, only_validations_are_left, validation_schedule
from datm_ray.stages.evaluate.rows import ALL_ROWS, DISTILLED, asks_teacher, result_location
from datm_ray.stages.experts.progress import read_stacks
from datm_ray.stages.experts.train import divided, experts_at_a_time
from datm_ray.stages.labels import kept_labels, missing_epochs
from datm_ray.stages.methods.base import ALONE
from datm_ray.stages.methods.memory import laid_out, plans_of
from datm_ray.stages.methods.part import Piece
from datm_ray.stages.methods.registry import method_of

SETS_JOINED = 4
"""Number of copies of a synthetic set that a worker holds while it joins the set's pieces: first and final set, and two
to write files."""


def expert_tasks(runs: Runs, workers: int = 1, networks: Sequence[RunConfig] | None = None) -> list[Task]:
    """Make a task for every stack, a group of experts trained together, that has experts missing in the store.

    Args:
        workers: number of workers that train at the same time.
        networks: networks to train, as runs with one network each; `None` for all of `runs` but those that score
            images for a curriculum.
    """
    tasks = []
    for config, open_stacks in expert_stacks(runs, workers, networks):
        group, shape = runs.experts(config), runs.shape(config)
        for stack in open_stacks:
            last = min(stack[-1], config.experts.count - 1)
            name = f"expert {stack[0]}" if last == stack[0] else f"experts {stack[0]}-{last}"
            needed, memory = work.experts(config, shape, len(stack)), experts_memory(config, shape, len(stack))
            tasks.append(_task(runs, "experts", f"{name} of {group.key}", config, needed, stack, memory=memory))
    return tasks


def _task(
    runs: Runs,
    stage: str,
    name: str,
    config: RunConfig,
    needed: work.Work,
    *more: Any,
    memory: int,
    method: str = "",
    is_light: bool = True,
) -> Task:
    """Make a task of a run for one worker.

    Args:
        needed: work of the task.
        more: arguments of the worker's method after the configuration and the store.
        memory, method, is_light: see `Task`.
    """
    return Task(
        name,
        (config, runs.store_uri, *more),
        run=config.name,
        stage=stage,
        weight=weight(needed),
        method=method,
        memory=memory,
        is_light=is_light,
    )


def prior_tasks(runs: Runs) -> list[Task]:
    """Make a task for every trained prior that a run needs and that is missing in the store."""
    tasks = []
    for config in runs.missing_priors():
        needed, memory = work.prior(config, runs.shape(config)), prior_memory(config, runs.shape(config))
        name = f"prior of {config.name}"
        tasks.append(_task(runs, "experts", name, config, needed, memory=memory, method="train_prior"))
    return tasks


def scoring_runs(runs: Runs) -> list[RunConfig]:
    """Runs whose networks score images by difficulty for `experts.curriculum`, if missing experts need the order.

    There is one run for each order of images that is missing in the store.
    """
    found: dict[str, RunConfig] = {}
    for config in expert_recipes(runs):
        scoring = config.scoring_run
        if scoring is not None and runs.missing_experts(config):
            place = runs.experts(scoring).difficulty_file(scoring.experts.count)
            if not place.exists():
                found.setdefault(place.uri, scoring)
    return list(found.values())


def scoring_tasks(runs: Runs) -> list[Task]:
    """Make one task for each of `scoring_runs`: score all training images with that run's networks, once trained."""
    tasks = []
    for config in scoring_runs(runs):
        name = f"difficulty of images by {config.experts.count} of {runs.experts(config).key}"
        needed, memory = work.order(config, runs.shape(config)), experts_memory(config, runs.shape(config), 1)
        tasks.append(_task(runs, "experts", name, config, needed, memory=memory))
    return tasks


def expert_recipes(runs: Runs, networks: Sequence[RunConfig] | None = None) -> list[RunConfig]:
    """Configurations to train experts by, one for each group of experts in the store, which several runs may share.

    Each has the largest `experts.count` and `experts.keep_epochs` of the runs that share the group.

    Args:
        networks: networks with experts, as runs with one network each; `None` for all of `runs` but those that score
            images for a curriculum.
    """
    recipes: dict[str, RunConfig] = {}
    for config in runs.networks() if networks is None else networks:
        uri = runs.experts(config).location.uri
        other = recipes.setdefault(uri, config).experts
        bound = max(recipes[uri].kept_bound, config.kept_bound)
        needs = {
            "count": max(other.count, config.experts.count),
            "keep_epochs": bound if bound > 0 else None,
        }
        recipes[uri] = recipes[uri].model_copy(update={"experts": other.model_copy(update=needs)})
    return list(recipes.values())


def expert_stacks(
    runs: Runs, workers: int, networks: Sequence[RunConfig] | None = None
) -> list[tuple[RunConfig, list[tuple[int, ...]]]]:
    """Pairs (configuration, stacks) for all groups of experts that are wanted.

    A stack is a tuple of expert numbers, from 0, that one worker trains together. Listed are the stacks in which at
    least one expert is missing; none if all are stored. Stacks that an earlier command recorded come first, unless
    `cluster.experts_at_a_time` is set.

    Args:
        workers: number of workers that train at the same time.
        networks: networks with experts, as runs with one network each; `None` for all but those that score images for a
            curriculum.
    """
    found = list[tuple[RunConfig, list[tuple[int, ...]]]]()
    missing = [(config, runs.missing_experts(config)) for config in expert_recipes(runs, networks)]
    groups = sum(bool(left) for _, left in missing)
    for config, left in missing:
        group = runs.experts(config)
        noted = () if config.cluster.experts_at_a_time else read_stacks(group)
        kept = [stack for stack in noted if not set(left).isdisjoint(stack)]
        new = sorted(set(left).difference(*kept))
        found.append((config, [*kept, *divided(config, new, stack_size(runs, config), workers, max(1, groups))]))
    return found


def stack_size(runs: Runs, config: RunConfig) -> int:
    """Largest number of experts that one worker trains together, for a run with one network."""
    shape = runs.shape(config)
    return experts_at_a_time(config, shape.image, shape.classes)


def distill_tasks(runs: Runs, executor: Executor | None = None) -> list[Task]:
    """Make a task for every unfinished set, or for each unfinished piece of a set that single workers make in pieces.

    If workers are free to validate sets, a task that distils a set creates validation tasks while it runs.

    Args:
        executor: where the workers run; `None` if it is not started yet. Then no task creates validation tasks.
    """
    tasks = []
    wanted = sum(config.workers_per_set for config in runs.unfinished())
    for config in runs.unfinished():
        if method_of(config).pieces(config, runs.raw(config).classes):
            pieces = unfinished_pieces(config, runs.folder(config), runs.raw(config).classes)
            tasks += _piece_tasks(runs, config, pieces) or [join_task(runs, config)]
            continue
        folder, size, fewer = runs.folder(config), config.workers_per_set, smaller_groups(runs, config)
        validation, is_over = None, False
        if executor is not None:
            is_over = only_validations_are_left(folder, config.distill)
            if is_over or is_apart(size, wanted, executor.workers):
                validation = validation_task(runs, config)
        own, sharing = layout(runs, config, executor)
        whole = own.workers_per_set * weight(work.distillation(own, runs.shape(own)))
        if is_over:  # the task only makes others
            size, fewer, whole = 1, (), 1.0
        tasks.append(
            Task(
                config.name,
                (config, runs.store_uri, folder.uri, sharing, validation),
                size,
                fewer,
                run=config.name,
                stage="distillation",
                weight=whole,
                memory=0 if is_over else _distilling_memory(runs, own, sharing),
                is_light=is_over,
            )
        )
    return tasks


def _distilling_memory(runs: Runs, config: RunConfig, sharing: int) -> int:
    with suppress(ConfigError):  # workers of other machines check their own memory
        return distilling_memory(config, runs.shape(config), sharing)
    return 0


def _piece_tasks(runs: Runs, config: RunConfig, pieces: Sequence[Piece]) -> list[Task]:
    """Make a task for each of these pieces: parts of the run's set, each made by a single worker."""
    memory = _distilling_memory(runs, laid_out(config, ALONE), 1)
    needed, folder = work.distillation(config, runs.shape(config)), runs.folder(config).uri
    tasks = []
    for piece in pieces:
        name, more = f"{config.name} {piece.number}", (folder, piece.number)
        tasks.append(
            _task(runs, "distillation", name, config, needed, *more, memory=memory, method="make_piece", is_light=False)
        )
    return tasks


def join_task(runs: Runs, config: RunConfig) -> Task:
    """Make the task that joins the pieces of a run's set, which must all be finished, and writes the set."""
    shape, name, folder = runs.shape(config), f"{config.name} whole", runs.folder(config).uri
    images = shape.synthetic(config)
    needed = [work.passes("scoring", config, shape, images)]
    memory = scoring_memory(config, shape, images, has_teacher=True) + SETS_JOINED * images * shape.row
    return _task(runs, "distillation", name, config, needed, folder, memory=memory, method="join_pieces")


def validation_task(runs: Runs, config: RunConfig) -> Task:
    """Make a task that validates a run's set. The caller adds the set's iteration to the task's name and arguments."""
    shape, name, folder = runs.shape(config), f"{config.name} validation", runs.folder(config).uri
    needed, schedule = work.validation(config, shape), validation_schedule(config, 1.0)
    seeds = config.distill.validation_seeds
    memory = scoring_memory(config, shape, shape.synthetic(config), together=seeds, schedule=schedule)
    return _task(runs, "distillation", name, config, needed, folder, memory=memory, method="validate")


def smaller_groups(runs: Runs, config: RunConfig) -> tuple[int, ...]:
    """Numbers of workers below `workers_per_set` that have enough memory to distil the run's set, the largest first.

    If the workers' memory is unknown, it counts as enough.
    """
    rows, fewer = len(config.roles), range(1, config.cluster.shards)
    # A set that fits n shards also fits n + 1, because then no shard holds more images.
    first = bisect_left(fewer, True, key=lambda shards: _would_fit(runs, config, {"shards": shards}))
    sizes = [rows * shards for shards in reversed(fewer[first:])]
    alone = [1] if rows > 1 and _would_fit(runs, config, ALONE) else []
    return (*sizes, *alone)


def _would_fit(runs: Runs, config: RunConfig, settings: Mapping[str, Any]) -> bool:
    if runs.elsewhere and config.cluster.memory is None:
        return True  # workers check their own memory; if it is too small, executors wait for more workers
    shape = runs.shape(config)
    try:
        plans_of(laid_out(config, settings), DataShape(shape.image, shape.classes, 0), 1)
    except ConfigError:
        return False
    return True


def layout(runs: Runs, config: RunConfig, executor: Executor | None) -> tuple[RunConfig, int]:
    """Choose the layout in which a run's set is distilled: how classes and networks are divided among workers.

    One worker distils the whole set if the command has one process, or if the executor has too few workers.

    Args:
        executor: where the workers run; `None` for this machine's CPUs.

    Returns:
        The run, whose `cluster` section has the layout; and the number of workers that distil on one machine.
    """
    if runs.alone or (executor is not None and config.workers_per_set > executor.workers):
        return laid_out(config, ALONE), 1
    wanted = sum(each.workers_per_set for each in runs.unfinished()) or config.workers_per_set
    return config, min(executor.workers_per_machine if executor else workers_here(config.cluster), wanted)


def label_tasks(runs: Runs, workers: int = 1) -> list[Task]:
    """Make tasks that store a teacher's labels of finished sets, for those epochs whose labels are wanted and missing.

    Args:
        workers: number of workers that label at the same time, among which each set's epochs are divided.
    """
    tasks = list[Task]()
    unfinished = {config.name for config in runs.unfinished()}
    for config in runs.configs:
        if not config.evaluate.stores_labels or config.name in unfinished:
            continue
        folder, shape = runs.folder(config), runs.shape(config)
        for epochs in work.divided_epochs(missing_epochs(folder, config, runs.raw(config).fingerprint), workers):
            name, more = f"{config.name} epochs {epochs[0]}-{epochs[-1]}", (folder.uri, epochs)
            needed, memory = work.labels(config, shape, len(epochs)), labelling_memory(config, shape)
            tasks.append(_task(runs, "labels", name, config, needed, *more, memory=memory, method="label"))
    return tasks


def epochs_to_label(runs: Runs) -> dict[str, int]:
    """Name of each run that lacks stored labels -> number of epochs that lack them, all for an unfinished set."""
    found = {}
    unfinished = {config.name for config in runs.unfinished()}
    for config in runs.configs:
        if config.evaluate.stores_labels:
            folder, fingerprint = runs.folder(config), runs.raw(config).fingerprint
            left = missing_epochs(folder, config, fingerprint)
            found[config.name] = kept_labels(config) if config.name in unfinished else len(left)
    return {name: count for name, count in found.items() if count}


def evaluate_tasks(
    runs: Runs,
    scored_rows: Callable[[RunConfig], Sequence[tuple[str, NetworkConfig | None]]],
    *,
    workers: int = 1,
    of: Sequence[RunConfig] | None = None,
) -> list[Task]:
    """Make tasks for every row of the accuracy tables, such as "distilled", and every seed without a result.

    Runs that share a result share its task. Seeds whose networks are trained together are one task. A row's seeds are
    divided evenly into more tasks if workers would be idle otherwise, or if the row is more than an equal share of all
    work.

    Args:
        scored_rows: returns a run's rows, each with its network, `None` for the backbone.
        workers: number of workers. A single worker gets the row on all real data last, so that users see other rows
            early. Several workers get the longest rows first, so that none waits at the end.
        of: runs whose rows are wanted; `None` for all of `runs`.
    """
    tasks: list[Task] = []
    shared: dict[str, list[Row]] = {}
    for config in runs.configs:  # all runs, so that seeds are grouped alike whichever sets are finished
        for name, network in scored_rows(config):
            place = result_location(runs.out, config, runs.raw(config).fingerprint, name, 0, network)
            shared.setdefault(place.uri, []).append(Row(config, name, network, runs.shape(config)))
    users = sorted(shared.values(), key=lambda each: each[0].name == "full")
    rows = [max(each, key=lambda row: row.run.evaluate.seeds) for each in users]
    for runs_of_row, row, parts in zip(users, rows, work.divided_rows(rows, workers), strict=True):
        if of is None or any(each.run in of for each in runs_of_row):
            tasks += filter(None, (_evaluate_task(runs, row, numbers) for numbers in parts))
    return sorted(tasks, key=lambda task: -task.weight if workers > 1 else 0)


def unstackable(runs: Runs, evaluation: Sequence[Task]) -> list[str]:
    """Architectures whose networks these evaluation tasks train one after another, because they cannot be stacked.

    Trained together they would be faster. Each architecture is named once.
    """
    found = dict[str, None]()
    for task in evaluation:
        config, *_, row, _, network = RowArguments(*task.arguments)
        if Row(config, row, network, runs.shape(config)).is_unstackable:
            found[(network or config.network).architecture] = None
    return list(found)


class RowArguments(NamedTuple):
    """Arguments of an evaluation task: recipe, trajectory store, the run's folder, a result file for each seed, row of
    the accuracy table, numbers of the seeds, and scored network, `None` for the backbone."""

    config: RunConfig
    store_uri: str
    folder_uri: str
    result_uris: tuple[str, ...]
    row: str
    numbers: Sequence[int]
    network: NetworkConfig | None


def _evaluate_task(runs: Runs, row: Row, numbers: Sequence[int]) -> Task | None:
    """Make a task that trains and scores the networks of a row with seeds `numbers`; `None` if all results exist."""
    config, network, fingerprint = row.run, row.network, runs.raw(row.run).fingerprint
    places = [result_location(runs.out, config, fingerprint, row.name, number, network) for number in numbers]
    if all(place.exists() for place in places):
        return None
    together = row.largest_stack(len(numbers))
    networks, schedule = row.training(len(numbers))
    held = networks - together
    sets = 0 if row.name == "full" else 1 if row.name in DISTILLED else len(numbers)
    scored = config, row.shape, row.images, network, together
    is_taught = asks_teacher(config, row.name)
    uris = tuple(place.uri for place in places)
    last = "" if len(numbers) == 1 else f"-{numbers[-1]}"
    name = f"{config.name} {row.name}{_on(config, network)} {numbers[0]}{last}"
    more = runs.folder(config).uri, uris, row.name, numbers, network  # in the order of `RowArguments`
    needed = work.evaluation(row, len(numbers))
    memory = scoring_memory(*scored, held=held, sets=sets, schedule=schedule, has_teacher=is_taught)
    return _task(runs, "evaluation", name, config, needed, *more, memory=memory, method="evaluate")


def row_title(config: RunConfig, row: str, network: NetworkConfig | None) -> str:
    """Title of a row of a run's accuracy table, such as "birds, distilled" or "birds, distilled on vgg11".

    Args:
        row: key of the row, such as "distilled".
        network: network of `evaluate.networks`; `None` for the backbone, which the title does not name.
    """
    return f"{config.name}, {ALL_ROWS[row]}{_on(config, network)}"


def _on(config: RunConfig, network: NetworkConfig | None) -> str:
    names = dict(zip(config.scored_networks, short_names(config.scored_networks), strict=True))
    return f" on {names[network]}" if network else ""
