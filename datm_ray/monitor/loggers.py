"""Curves in TensorBoard or Weights & Biases, chosen by `cluster.log_to`.

Each task has a curve of every gauge and histogram of the metrics' catalogue, over its own steps: epochs of experts,
iterations of a distillation. Besides curves, only names and settings of the recipes are sent: no addresses, names of
machines, paths or environment variables.
Both packages are optional, and a failure after the start never stops a run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from datm_ray.config import RunConfig, run_identity
from datm_ray.errors import ConfigError
from datm_ray.monitor.metrics import CATALOGUE
from datm_ray.runtime.executor import Event, Finished, Progress, Task
from datm_ray.store.files.filesystem import Location

FOLDER = "tensorboard"
PROJECT = "datm-ray"


class Backend(Protocol):
    """Interface of a logging service."""

    def log(self, task: Task, step: int, values: Mapping[str, float]) -> None:
        """Record values of a task's curves, by the curve's name, at the task's step number `step`."""

    def finish(self, task: Task) -> None:
        """Close a task's curves, after the last values of the task."""

    def close(self) -> None:
        """End the log, after the run has finished or stopped."""


class Logger:
    """Logger of a run's events. Logging stops at the first failure; the run continues."""

    def __init__(self, backend: Backend | None = None, on_failure: Callable[[str], None] = print) -> None:
        """Log to a service until the first failure.

        Args:
            backend: logging service; `None` logs nowhere.
            on_failure: called with a message, once, if logging fails. Nothing is logged after that.
        """
        self._backend, self._on_failure = backend, on_failure

    def event(self, task: Task, event: Event) -> None:
        """Log the measurements of a `Progress`, and close a task's curves at its `Finished`. Ignore other events."""
        if isinstance(event, Progress) and (values := _curves(event)):
            self._do(lambda backend: backend.log(task, event.done, values))
        elif isinstance(event, Finished):
            self._do(lambda backend: backend.finish(task))

    def close(self) -> None:
        """Write pending values, and end the log."""
        self._do(lambda backend: backend.close())
        self._backend = None

    def _do(self, what: Callable[[Backend], None]) -> None:
        if self._backend is None:
            return
        try:
            what(self._backend)
        except Exception as failure:  # a run must not stop because of its curves, whatever fails
            self._backend = None
            # The failure's message is left out, because it may contain an address with a key.
            self._on_failure(f"Logging failed ({type(failure).__name__}); the run continues without it")


def require_logger(name: str, out: Location) -> None:
    """Raise a `ConfigError` if a logger's package is not installed, or TensorBoard would write to an object store.

    Args:
        name: value of `cluster.log_to`.
        out: output folder of the runs.
    """
    if name != "none" and find_spec(name) is None:
        raise ConfigError(
            f"cluster.log_to is {name!r}, but the package {name} is not installed",
            remedy=f"`pip install 'datm-ray[{name}]'`, or use --set cluster.log_to=none",
        )
    if name == "tensorboard" and out.local_path is None:
        raise ConfigError(
            f"cluster.log_to is 'tensorboard', but {out.uri} is not a local folder",
            "TensorBoard's writer appends to its files, which object stores do not support",
            "give a local --out, or use --set cluster.log_to=none; Ray's dashboard shows the metrics too",
        )


def open_logger(name: str, out: Location, configs: Sequence[RunConfig], on_failure: Callable[[str], None]) -> Logger:
    """Open the logger that `cluster.log_to` names.

    Args:
        name: value of `cluster.log_to`.
        out: output folder of the runs.
        configs: recipes of the runs.
        on_failure: called with a message, once, if logging fails after the start.

    Raises:
        ConfigError: a package is missing, TensorBoard would write to an object store, or the service does not start.
    """
    require_logger(name, out)
    if name == "none":
        return Logger()
    try:
        backend = _TensorBoard(out) if name == "tensorboard" else _WeightsAndBiases(out, configs)
    except Exception as failure:
        is_broken = name == "tensorboard" or isinstance(failure, ImportError)
        raise ConfigError(
            f"{name} does not start: {type(failure).__name__}",
            "its installation is broken" if is_broken else "wandb has no account or no network",
            "use --set cluster.log_to=none" if is_broken else "try `wandb login`, or WANDB_MODE=offline",
        ) from None
    return Logger(backend, on_failure)


class _TensorBoard:
    """TensorBoard backend: one folder of event files per task, under <out>/tensorboard."""

    def __init__(self, out: Location) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open: Callable[..., Any] = SummaryWriter
        self._folder = (out / FOLDER).path
        self._writers: dict[str, Any] = {}

    def log(self, task: Task, step: int, values: Mapping[str, float]) -> None:
        if task.name not in self._writers:
            self._writers[task.name] = self._open(f"{self._folder}/{task.stage}/{_safe_name(task.name)}")
        for name, value in values.items():
            self._writers[task.name].add_scalar(name, value, step)

    def finish(self, task: Task) -> None:
        if task.name in self._writers:
            self._writers.pop(task.name).close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _WeightsAndBiases:
    """Weights & Biases backend: one run for all recipes, with separate curves and steps per task."""

    def __init__(self, out: Location, configs: Sequence[RunConfig]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=PROJECT,
            name=", ".join(config.name for config in configs),
            config={config.name: run_identity(config) for config in configs},
            dir=out.local_path,
            # By default wandb sends the command line, which may contain addresses, the console output, the sources,
            # the machine's name and the list of installed packages.
            settings=wandb.Settings(
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                host="",
                console="off",
                save_code=False,
                disable_git=True,
            ),
        )
        self._known: set[str] = set()

    def log(self, task: Task, step: int, values: Mapping[str, float]) -> None:
        name = _safe_name(task.name)
        if name not in self._known:
            self._known.add(name)
            self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
        self._run.log({f"{name}/{key}": value for key, value in {"step": step, **values}.items()})

    def finish(self, task: Task) -> None:
        """Do nothing: curves of Weights & Biases need no end."""

    def close(self) -> None:
        self._run.finish()


def _safe_name(name: str) -> str:
    """Task name in which a hyphen replaces each sequence of characters other than letters, digits and ._+=-."""
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", name)


def _curves(event: Progress) -> dict[str, float]:
    """Name of a curve -> value, for finite gauges and histograms. Names lack the metrics' prefix "datm_ray_".

    Counters get no curve.
    """
    return {
        name.removeprefix("datm_ray_"): value
        for name, value in event.metrics.items()
        if name in CATALOGUE and CATALOGUE[name].kind != "counter" and math.isfinite(value)
    }
