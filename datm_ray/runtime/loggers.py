"""Curves for those who have TensorBoard or Weights & Biases: `cluster.log_to`.

What is logged is what the workers measure (see `metrics`), a curve for each task, over the task's own steps: epochs of
experts, iterations of a distillation. Nothing else leaves: no addresses, no paths, no environment. Neither package is
needed otherwise, and neither can stop a run once it goes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from datm_ray.config import RunConfig
from datm_ray.errors import ConfigError
from datm_ray.runtime.executor import Event, Finished, Progress, Task
from datm_ray.runtime.metrics import CATALOGUE
from datm_ray.store.filesystem import Location

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""`cluster.log_to` -> what must be installed."""

FOLDER = "tensorboard"
PROJECT = "datm-ray"


class Backend(Protocol):
    """Somewhere to log to."""

    def log(self, task: Task, step: int, values: Mapping[str, float]) -> None:
        """Keep what a task has measured at a step of its own."""
        ...

    def finish(self, task: Task) -> None:
        """The task will log no more."""
        ...

    def close(self) -> None:
        """The run is over, or stopped."""
        ...


class Logger:
    """Logs the events of a run, as long as that works."""

    def __init__(self, backend: Backend | None = None, complain: Callable[[str], None] = print) -> None:
        """Log to a backend, or nowhere.

        Args:
            complain: told once, if logging fails; nothing is logged any more then.
        """
        self._backend, self._complain = backend, complain

    def event(self, task: Task, event: Event) -> None:
        """Log what an event says."""
        if isinstance(event, Progress):
            self._do(lambda backend: backend.log(task, event.done, _curves(event)))
        elif isinstance(event, Finished):
            self._do(lambda backend: backend.finish(task))

    def close(self) -> None:
        """Write what is not written yet."""
        self._do(lambda backend: backend.close())
        self._backend = None

    def _do(self, what: Callable[[Backend], None]) -> None:
        if self._backend is None:
            return
        try:
            what(self._backend)
        except Exception as failure:  # of whatever kind: curves are not worth a run
            self._backend = None
            # Not what it says: it may quote an address with a key in it.
            self._complain(f"Logging has failed ({type(failure).__name__}); the run goes on without")


def require_logger(name: str, out: Location) -> None:
    """Raise a ConfigError if `cluster.log_to` asks for what cannot be had."""
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise ConfigError(
            f"cluster.log_to is {name!r}, but the package {package} is not installed",
            remedy=f"`pip install {package}`, or use --set cluster.log_to=none",
        )
    if name == "tensorboard" and out.local_path is None:
        raise ConfigError(
            f"cluster.log_to is 'tensorboard', but {out.uri} is no local folder",
            "TensorBoard's writer appends to its files, which object stores have not",
            "give a local --out, or use --set cluster.log_to=none; metrics are on Ray's dashboard anyway",
        )


def open_logger(name: str, out: Location, configs: Sequence[RunConfig], complain: Callable[[str], None]) -> Logger:
    """What `cluster.log_to` asks for, ready.

    Raises:
        ConfigError: as `require_logger`; or the service cannot be begun with.
    """
    require_logger(name, out)
    if name == "none":
        return Logger()
    try:
        backend = _TensorBoard(out) if name == "tensorboard" else _WeightsAndBiases(out, configs)
    except Exception as failure:
        raise ConfigError(
            f"{name} does not start: {type(failure).__name__}",
            "wandb has no account or no network" if name == "wandb" else "its installation is broken",
            "try `wandb login`, or WANDB_MODE=offline" if name == "wandb" else "use --set cluster.log_to=none",
        ) from None
    return Logger(backend, complain)


class _TensorBoard:
    """A folder of event files for every task, under <out>/tensorboard."""

    def __init__(self, out: Location) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open: Callable[..., Any] = SummaryWriter
        self._folder = (out / FOLDER).path
        self._writers: dict[str, Any] = {}

    def log(self, task: Task, step: int, values: Mapping[str, float]) -> None:
        if task.name not in self._writers:
            self._writers[task.name] = self._open(f"{self._folder}/{task.stage}/{_plain(task.name)}")
        for name, value in values.items():
            self._writers[task.name].add_scalar(name, value, step)

    def finish(self, task: Task) -> None:
        if task.name in self._writers:
            self._writers.pop(task.name).close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _WeightsAndBiases:
    """One run of W&B's for all recipes; every task has its own curves and its own steps."""

    def __init__(self, out: Location, configs: Sequence[RunConfig]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=PROJECT,
            name=", ".join(config.name for config in configs),
            config={config.name: config.identity() for config in configs},
            dir=out.local_path,
            # By itself it would send the command line, which may hold addresses, the console and the sources.
            settings=wandb.Settings(
                x_disable_meta=True, x_disable_machine_info=True, console="off", save_code=False, disable_git=True
            ),
        )
        self._known: set[str] = set()

    def log(self, task: Task, step: int, values: Mapping[str, float]) -> None:
        name = _plain(task.name)
        if name not in self._known:
            self._known.add(name)
            self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
        self._run.log({f"{name}/{key}": value for key, value in {"step": step, **values}.items()})

    def finish(self, task: Task) -> None:
        """Its curves end by themselves."""

    def close(self) -> None:
        self._run.finish()


def _plain(name: str) -> str:
    """A task's name without spaces and slashes."""
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", name)


def _curves(event: Progress) -> dict[str, float]:
    """What is worth a curve, without the prefix; sums of a single attempt are not."""
    return {
        name.removeprefix("datm_ray_"): value
        for name, value in event.metrics.items()
        if name in CATALOGUE and CATALOGUE[name].kind != "counter" and math.isfinite(value)
    }
