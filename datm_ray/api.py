"""Commands of the command line as Python calls, which return values.

`train_experts` is the command `experts`; the others have the command's name. Each call works on one recipe, and `init`
makes one. Repeating a call resumes its run. Recipes with the same `out` share experts and controls, as on the command
line. Jobs on clusters are not covered. Tests: tests/test_api.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from numpy.typing import NDArray

from datm_ray.artifact import Artifact, read_artifact
from datm_ray.config import NetworkConfig, RunConfig, with_settings
from datm_ray.errors import ConfigError
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, report, summaries
from datm_ray.planning.duration import Proposal
from datm_ray.planning.init.draft import Wish
from datm_ray.planning.init.suggest import Suggestion, default_name, measured_plans, read_images, rules_of, suggest
from datm_ray.planning.plan import plan_run
from datm_ray.recipes import get_recipe
from datm_ray.report.results import names_of, scores_by_name
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import Executor
from datm_ray.stages.distill.checkpoint import CHECKPOINT, read_curves
from datm_ray.stages.distill.task import SYNTHETIC
from datm_ray.store.files.filesystem import Location
from datm_ray.store.files.local import free_space

if TYPE_CHECKING:
    from typing_extensions import Unpack

LONGEST = 10**9
"""Largest number of minutes that `init` accepts, inclusive: far longer than any run, and small enough for all
computations with it."""

Settings = Mapping[str, object]
"""Overrides of a recipe: `section.field` -> value, such as {"distill.iterations": 100}."""


@dataclass(frozen=True)
class Result:
    """Result of a finished run: synthetic set, accuracies and report."""

    name: str
    """Name of the recipe, and of the run's folder within the output folder."""
    synthetic: Artifact
    """Synthetic set of the run."""
    accuracies: Mapping[str, tuple[float, ...]]
    """Row of the results table -> test accuracies, 0 to 1, one for each seed.

    Networks are trained on random real images with hard or soft labels ("random-hard", "random-soft"), on the synthetic
    set ("distilled") or on all real data ("full"). `evaluate.fixed_labels` adds "distilled-hard",
    "distilled-fixed" and "random-fixed", with fixed labels."""
    report: str
    """Path or URI of the HTML report over all runs of the output folder."""
    networks: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    """Architecture -> column -> test accuracies, 0 to 1, one for each seed. Empty if `evaluate.networks` is empty.

    The recipe's own architecture comes first, then those of `evaluate.networks`. Column "learned": trained with the
    set's own step size, if it has one; "tuned": with a step size chosen on validation images; "control": trained on
    random real images."""
    history: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Curve of the distillation -> array. Empty if no checkpoint exists, as for images chosen or recovered in pieces.

    "iteration" (from 0), "loss" and "skipped" (True if nothing was updated) have one value for each iteration.
    Trajectory matching adds "step_size", "expert", "start" (start epoch) and "decrease" of the first backbone:
    the first-order decrease of the loss, as a share of it, by one step along the gradient before it is shortened.
    "validation.iteration" and "validation.accuracy" (0 to 1) have one value for each validation. "validation.chosen_at"
    is the number of iterations after which the kept set was validated; 0 means that the last set is kept. Names that
    begin with "meta." are MetaDD's terms."""


class Options(TypedDict, total=False):
    """Options that `run`, `train_experts`, `distill` and `evaluate` share."""

    settings: Settings
    """Values of the recipe to replace, by `section.field`; see `Settings`."""
    store: str
    """Path or URI of the trajectory store, which keeps experts. Default: the folder `experts` in the output folder."""
    executor: Literal["ray", "serial"]
    """`ray` (default) runs parallel workers; `serial` uses this process alone, with the same results.

    Torch's settings of this process, such as threads and TF32, are restored when the call ends."""
    address: str
    """Address of the Ray cluster to run on. Default: RAY_ADDRESS, or else a cluster started on this machine."""
    progress: bool
    """True (default) to show progress on standard error."""


Recipe = str | os.PathLike[str] | RunConfig
"""Name of a packaged recipe, path of a YAML file, or a configuration."""


def recipe_of(recipe: Recipe, settings: Settings | None = None) -> RunConfig:
    """Recipe with some settings replaced.

    Args:
        recipe: name of a packaged recipe, path of a YAML file, or a configuration.
        settings: `section.field` -> value that replaces the recipe's; `None` for none.

    Raises:
        ConfigError: there is no such recipe, or a value is impossible.
    """
    config = recipe if isinstance(recipe, RunConfig) else get_recipe(os.fspath(recipe))
    return with_settings(config, {key: _plain(value) for key, value in (settings or {}).items()})


def _plain(value: object) -> object:
    """Convert a path to text, and numbers and arrays of numpy or torch to Python's numbers and lists.

    Any other value is returned unchanged.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value


def stages_of(
    configs: Sequence[RunConfig],
    out: str,
    store: str | None,
    executor: str,
    address: str | None,
    asked: Mapping[NetworkConfig, str] | None = None,
) -> tuple[Pipeline, Callable[[], Executor]]:
    """Check recipes. Returns the pipeline of their runs, and a function that starts the executor for it.

    Args:
        configs: recipes of the runs; at least one.
        out: output folder of all runs, a path or URI.
        store: path or URI of the trajectory store; `None` puts it into the output folder.
        executor: "ray" or "serial".
        address: address of a Ray cluster; `None` for RAY_ADDRESS, or else a cluster started on this machine.
        asked: network to score on -> command-line option that asked for it, for messages; `None` for no such network.

    Raises:
        DatmError: a data set or path cannot be read, or a recipe's values cannot be used.
    """
    elsewhere = bool(address or os.environ.get("RAY_ADDRESS"))
    stages = Pipeline(configs, out, store, elsewhere=elsewhere, alone=executor == "serial", asked=asked)
    return stages, lambda: create_executor(executor, configs[0].cluster, address)


def run(recipe: Recipe, out: str | os.PathLike[str] = "runs", **options: Unpack[Options]) -> Result:
    """Train experts, distil, evaluate and write the report.

    >>> result = datm_ray.run("digits-ipc1", out="runs/demo", settings={"evaluate.seeds": 2})
    >>> result.accuracies["distilled"], result.synthetic.images.shape

    Args:
        recipe: name of a packaged recipe, path of a YAML file, or a configuration.
        out: output folder, a path or URI.
        **options: `settings`, `store`, `executor`, `address` and `progress`, as `Options` describes them.

    Raises:
        DatmError: bad input, or work that failed; running the call again resumes.
        TypeError: an option is unknown.
    """
    stages, start, reporter = _prepared(recipe, out, options)
    stages.run_all(start, reporter)
    return _result(stages)


def plan(
    recipe: Recipe,
    settings: Settings | None = None,
    *,
    cluster: str | None = None,
    data_shape: str | None = None,
    measure: bool = False,
) -> Proposal:
    """Estimate memory, time and storage of a run before it starts.

    >>> plan = datm_ray.plan("cifar10-ipc10", cluster="gpus=8,memory=80GiB,tflops=10")
    >>> print(plan)
    >>> plan.stages["distillation"]  # hours of all workers, hours on the clock
    >>> plan.config.cluster.shards

    Args:
        recipe: name of a packaged recipe, path of a YAML file, or a configuration.
        settings: values that replace the recipe's.
        cluster: cluster to suggest a layout for, such as "gpus=64,memory=80GiB,tflops=10,network=25Gbps" or
            "cpus=2,memory=24GiB". Default: this machine.
        data_shape: shape of data that is not on this machine, as channels x height x width, classes, training images,
            such as "3x64x64,200,100000". Default: the shape of the recipe's data set.
        measure: True to time the run's own compiled steps on this machine. False times small steps instead if the run
            computes on CPUs, and needs tflops= in `cluster` to estimate times on GPUs.

    Raises:
        ConfigError: the set does not fit into memory, or an argument cannot be read or used.
        DatasetError: the images cannot be read, or are on another machine and `data_shape` is not given.
        ClusterError: the recipe's precision needs a GPU, or another CPU.
    """
    return plan_run(recipe_of(recipe, settings), cluster, data_shape, measure=measure)


def init(
    path: str | os.PathLike[str],
    ipc: int,
    minutes: float = 30.0,
    *,
    method: str = "datm",
    name: str | None = None,
    resize: int | None = None,
    progress: bool = True,
) -> Suggestion:
    """Choose a recipe for your own images, with the reason of every value.

    >>> suggestion = datm_ray.init("/data/birds", ipc=10, minutes=20)
    >>> suggestion.reasons["experts.batch_size"]
    >>> datm_ray.run(suggestion.config)

    Args:
        path: folder, zip archive or Parquet file of images, see docs/your-images.md, or `digits`.
        ipc: synthetic images per class, at least 1.
        minutes: time in minutes that the whole run may take on this machine; above 0, at most 1e9. The machine's speed
            is measured first.
        method: datm, mtt, dm, select or sre2l.
        name: name of the run. Default: the file's name, the method unless it is datm, and the images per class.
        resize: side in pixels to resize all images to, at least 8. Default: the images' own size if it is common to
            all and at most 64, otherwise 64.
        progress: True (default) to show progress.

    Raises:
        ConfigError: the name or a number is impossible, there are no rules for the method, the synthetic set would have
            too few images for sre2l, or memory does not suffice.
        DatasetError: there are no images that can be read, or too few of a class.
    """
    rules_of(method)
    _require_numbers(ipc, minutes, resize)
    place, say = os.fspath(path), Reporter(quiet=not progress).message
    called = recipe_of(RunConfig(), {"name": name or default_name(place, ipc, method)}).name
    wish = Wish(called, int(ipc), 60 * float(minutes), method, free_space("runs"))
    soon = threading.Timer(2.0, say, [f"reading the images of {place} ..."])  # early errors need no such line
    soon.start()
    try:
        dataset, raw = read_images(place, None if resize is None else int(resize))
    finally:
        soon.cancel()
    return suggest(wish, dataset, raw, measured_plans(raw, say))


def _require_numbers(ipc: object, minutes: object, resize: object) -> None:
    """Raise a `ConfigError` if an argument of `init` is not a number of the right type, or is out of its range."""
    wanted = [("ipc", ipc, _is_whole(ipc, 1), "a whole number, at least 1")]
    wanted += [("resize", resize, resize is None or _is_whole(resize, 8), "a whole number of pixels, at least 8")]
    is_time = isinstance(minutes, Real) and not isinstance(minutes, bool) and minutes <= LONGEST and not minutes <= 0
    wanted += [("minutes", minutes, is_time, f"a number of minutes, above 0 and at most {LONGEST:,}")]
    for name, value, is_right, right in wanted:
        if not is_right:
            raise ConfigError(f"{name} is {value!r}", remedy=f"give {right}")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def train_experts(recipe: Recipe, out: str | os.PathLike[str] = "runs", **options: Unpack[Options]) -> str:
    """Train what a distillation needs and the trajectory store lacks: experts, a prior, a curriculum's image scores.

    Returns the store's path or URI.

    The arguments and errors are those of `run`: recipe, output folder, and `Options`.
    """
    stages, start, reporter = _prepared(recipe, out, options)
    stages.train_experts(start, reporter)
    return stages.store_uri


def distill(recipe: Recipe, out: str | os.PathLike[str] = "runs", **options: Unpack[Options]) -> Artifact:
    """Distil a synthetic set from experts that are trained already, and return the set.

    The arguments and errors are those of `run`: recipe, output folder, and `Options`. A `MissingExpertsError` is raised
    if an expert or a trained prior is not in the store.
    """
    stages, start, reporter = _prepared(recipe, out, options)
    stages.distill(start, reporter)
    return _set_of(stages)


def evaluate(recipe: Recipe, out: str | os.PathLike[str] = "runs", **options: Unpack[Options]) -> Result:
    """Train networks on a distilled set and on its controls, score them on the test images, and write the report.

    The arguments and errors are those of `run`: recipe, output folder, and `Options`. A `RunDirectoryError` is raised
    if the set is not distilled yet, and a `MissingExpertsError` if an expert is not in the store.
    """
    stages, start, reporter = _prepared(recipe, out, options)
    stages.evaluate(start, reporter)
    return _result(stages)


def _prepared(
    recipe: Recipe, out: str | os.PathLike[str], options: Options
) -> tuple[Pipeline, Callable[[], Executor], Reporter]:
    """Return the pipeline of one run, a function that starts its executor, and its progress display.

    Raises:
        DatmError: bad input.
        TypeError: an option is unknown.
    """
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        raise TypeError(f"unknown option {unknown[0]!r}; known are {', '.join(Options.__annotations__)}")
    config, out = recipe_of(recipe, options.get("settings")), os.fspath(out)
    stages, start = stages_of(
        [config], out, options.get("store"), options.get("executor", "ray"), options.get("address")
    )
    return stages, start, Reporter(quiet=not options.get("progress", True))


def _set_of(stages: Pipeline) -> Artifact:
    return read_artifact(stages.out / stages.configs[0].name / SYNTHETIC)


def _result(stages: Pipeline) -> Result:
    (summary,) = summaries(stages.out, stages.configs)
    networks = zip(names_of(summary.networks), summary.networks, strict=True)
    return Result(
        summary.config.name,
        _set_of(stages),
        {score.row: score.accuracies for score in summary.scores},
        report(stages.out.uri).uri,
        {name: {k: score.accuracies for k, score in scores_by_name(each).items()} for name, each in networks},
        _history(summary.folder),
    )


def _history(folder: Location) -> dict[str, NDArray[Any]]:
    """Curves of the distillation in a run's folder, with the keys of `Result.history`; empty without a checkpoint."""
    curves = read_curves(folder) if (folder / CHECKPOINT).exists() else {}
    return {name.removeprefix("history."): curve for name, curve in curves.items() if name != "history.backbone"}
