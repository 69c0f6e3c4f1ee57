"""What a command will do, before it starts: remaining work, the data, and forecasts.

Tests: tests/pipeline/test_pipeline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.pipeline import checks, tasks
from datm_ray.pipeline.runs import Runs
from datm_ray.pipeline.tasks import RowArguments
from datm_ray.stages.evaluate.rows import scored_rows
from datm_ray.stages.methods.base import Outlook
from datm_ray.stages.methods.registry import method_of
from datm_ray.words import dimensions

Rows = Callable[[RunConfig], Sequence[tuple[str, NetworkConfig | None]]]


def remaining_lines(runs: Runs, rows: Rows = scored_rows) -> list[str]:
    """Remaining work of a command in words, one line for each kind, such as "2 sets to distil: birds, cars".

    Args:
        rows: returns the rows of a run's accuracy table that are scored, each with its network.

    Raises:
        DatmError: the runs cannot be distilled or written here, or do not fit into memory.
    """
    lines = []
    for title, (count, names) in remaining(runs, rows).items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        title = title.replace("s ", " ", 1) if count == 1 else title
        lines.append(f"{count} {title}" + (f": {shown}" if names else ""))
    return lines


def remaining(runs: Runs, rows: Rows = scored_rows) -> dict[str, tuple[int, list[str]]]:
    """What is left to make, such as "experts to train" -> its number, and the names of the tasks or runs that make it.

    Experts, sets and networks for evaluation are in the result even if their number is 0, other things are not.

    Args:
        rows: returns the rows of a run's accuracy table that are scored, each with its network.

    Raises:
        DatmError: the runs cannot be distilled or written here, or do not fit into memory.
    """
    checks.require_startable(runs)
    priors = [config.name for config in runs.missing_priors()]
    orders = [task.name for task in tasks.scoring_tasks(runs)]
    sets = list(dict.fromkeys(task.run for task in tasks.distill_tasks(runs)))
    labelled = tasks.epochs_to_label(runs)
    evaluation = tasks.evaluate_tasks(runs, rows)
    found = {
        "priors to train": (len(priors), priors),
        "networks to train for scoring images": _missing_experts(runs, tasks.scoring_runs(runs)),
        "orders of images to score": (len(orders), orders),
        "experts to train": _missing_experts(runs),
        "sets to distil": (len(sets), sets),
        "epochs to label": (sum(labelled.values()), list(labelled)),
        "networks to train for evaluation": (
            sum(len(RowArguments(*task.arguments).numbers) for task in evaluation),
            [task.name for task in evaluation],
        ),
    }
    always = ("experts to train", "sets to distil", "networks to train for evaluation")
    return {title: each for title, each in found.items() if each[0] or title in always}


def _missing_experts(runs: Runs, networks: Sequence[RunConfig] | None = None) -> tuple[int, list[str]]:
    """Number of experts missing in the store, and names of their tasks.

    Args:
        networks: networks with experts, as runs with one network each; `None` for all but those that score images for a
            curriculum.
    """
    missing = sum(len(runs.missing_experts(config)) for config in tasks.expert_recipes(runs, networks))
    return missing, [task.name for task in tasks.expert_tasks(runs, networks=networks)]


def data(runs: Runs) -> list[dict[str, Any]]:
    """Facts of each data set: "name"; number of "classes", and of "training", "validation" and "test" images; "image",
    [channels, height, width] of an image; and "notes", lines on how its files were read."""
    return [
        {
            "name": raw.name,
            "classes": raw.classes,
            "training": len(raw.train),
            "validation": len(raw.validation),
            "test": len(raw.test),
            "image": [raw.channels, *raw.size],
            "notes": list(raw.notes),
        }
        for raw in dict.fromkeys(runs.datasets.values())
    ]


def data_lines(runs: Runs) -> list[str]:
    """Lines about each data set: number of classes and images, notes on its files, and cost of zca if still to fit."""
    lines = []
    for facts in data(runs):
        counts = ", ".join(f"{facts[part]:,} {part}" for part in ("training", "validation", "test"))
        images = f"{counts} images of {dimensions(facts['image'])}"
        lines.append(f"{facts['name']}: {facts['classes']} classes, {images}")
        lines += [f"{facts['name']}: {note}" for note in facts["notes"]]
    for dataset, raw in runs.datasets.items():
        cost = runs.fitting_cost(dataset)
        if cost.minutes >= 1 and runs.stored_transform(dataset) is None:
            lines.append(f"{raw.name}: fitting zca takes {cost}, once")
    return lines


def distances(runs: Runs) -> dict[str, Outlook]:
    """Name of each run whose set is unfinished -> its method's forecast, such as how far experts will move.

    Forecasts are computed from recipes and numbers of images. A run whose method makes none is left out.
    """
    each = {config.name: method_of(config).outlook(config, len(runs.raw(config).train)) for config in runs.unfinished()}
    return {name: outlook for name, outlook in each.items() if outlook}
