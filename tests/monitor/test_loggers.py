"""Tests curves in TensorBoard and Weights & Biases: what is logged, what never is, and how they fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from datm_ray.config import RunConfig, run_identity
from datm_ray.errors import ConfigError
from datm_ray.monitor import loggers
from datm_ray.monitor.loggers import Logger, open_logger
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import Finished, Lost, Progress, Task
from datm_ray.store.files.filesystem import open_location
from tests.conftest import CommandLine, run_here, tiny_config

TASK = Task("experts 0-1 of digits/convnet/5f", (), run="tiny", stage="experts")
METRICS = {"datm_ray_expert_loss": 0.5, "datm_ray_expert_epochs_total": 2.0, "datm_ray_metadd_loss": float("nan")}


class FakeWriter:
    """Stands in for torch's SummaryWriter."""

    made: dict[str, FakeWriter]

    def __init__(self, folder: str) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        FakeWriter.made[folder] = self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


class FakeRun:
    """Stands in for a run of W&B."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.steps: dict[str, str] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.steps[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeWriter]:
    """TensorBoard's writers by their folders, with the methods used here."""
    FakeWriter.made = {}
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    return FakeWriter.made


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """W&B with the methods used here: `started` has the arguments of the start, `run` what was logged."""
    module: Any = ModuleType("wandb")
    module.started, module.run, module.Settings = {}, FakeRun(), dict

    def init(**arguments: Any) -> FakeRun:
        module.started.update(arguments)
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    return module


def feed(logger: Logger) -> None:
    """Feed two epochs with a loss between them, and the end."""
    for event in (Progress(1, 2, {}, METRICS), Lost("died", 1), Progress(2, 2, {}, METRICS), Finished()):
        logger.event(TASK, event)


def test_tensorboard_gets_a_folder_for_every_task(writers: dict[str, FakeWriter], tmp_path: Path) -> None:
    """TensorBoard gets a folder for each task, with gauges over its own steps and no sums or nan."""
    feed(open_logger("tensorboard", open_location(str(tmp_path)), [], print))
    ((folder, writer),) = writers.items()
    assert folder == f"{tmp_path}/tensorboard/experts/experts-0-1-of-digits-convnet-5f"
    assert writer.scalars == [("expert_loss", 0.5, 1), ("expert_loss", 0.5, 2)]
    assert writer.closed


def test_wandb_gets_steps_of_every_tasks_own(wandb: Any, tiny: RunConfig, tmp_path: Path) -> None:
    """W&B gets one run with steps of each task, configured by the recipe's identity without places of files."""
    secret = tiny.model_copy(update={"dataset": tiny.dataset.model_copy(update={"path": "s3://secret"})})
    logger = open_logger("wandb", open_location(str(tmp_path)), [secret], print)
    feed(logger)
    logger.close()
    name = "experts-0-1-of-digits-convnet-5f"
    assert wandb.run.steps == {f"{name}/*": f"{name}/step"}
    assert wandb.run.logged == [{f"{name}/step": step, f"{name}/expert_loss": 0.5} for step in (1, 2)]
    assert wandb.run.finished
    assert wandb.started["config"] == {"tiny": run_identity(secret)}
    assert "secret" not in repr(wandb.started)
    settings = {"x_disable_meta": True, "console": "off", "save_code": False, "disable_git": True}
    settings |= {"host": "", "x_save_requirements": False}  # or the machine's name and all its packages are sent
    assert settings.items() <= wandb.started["settings"].items()


def test_a_run_is_logged_from_any_executor(writers: dict[str, FakeWriter], tmp_path: Path) -> None:
    """All three stages are logged from either executor, and every writer is closed."""
    config = tiny_config("cluster.log_to=tensorboard")
    run_here(tmp_path, config)
    assert {Path(folder).parent.name for folder in writers} == {"experts", "distillation", "evaluation"}
    losses = writers[f"{tmp_path}/tensorboard/distillation/tiny"].scalars
    assert [step for name, _, step in losses if name == "distill_matching_loss"] == [1, 2, 3, 4, 5, 6]
    assert all(writer.closed for writer in writers.values())


def test_where_to_log_changes_nothing_of_a_run() -> None:
    """A finished run can be resumed with any logger."""
    assert run_identity(tiny_config("cluster.log_to=wandb")) == run_identity(tiny_config())


def test_a_missing_package_is_one_line_before_anything_starts(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing logger is one line with an existing extra, exit code 2, and no folder made."""
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in ("tensorboard", "wandb"):
        assert f'\n{name} = ["{name}>=' in project
        code, _, err = datm_ray("run", "digits-ipc1", "--set", f"cluster.log_to={name}", "--executor", "serial")
        assert (code, err.count("\n")) == (2, 1)
        assert f"the package {name} is not installed. `pip install 'datm-ray[{name}]'`, or" in err
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_wants_a_local_folder(writers: dict[str, FakeWriter]) -> None:
    """TensorBoard on an object store is refused before the run."""
    with pytest.raises(ConfigError, match=r"memory://out is not a local folder\..* Give a local --out"):
        Pipeline([tiny_config("cluster.log_to=tensorboard")], "memory://out")


def test_a_service_that_does_not_start_is_one_line_without_its_words(wandb: Any, tmp_path: Path) -> None:
    """A service that fails to start is one line without its message, which may quote a key; no folder is made."""

    def refuse(**_: Any) -> None:
        raise RuntimeError("key 123-secret is wrong")

    wandb.init = refuse
    config = tiny_config("cluster.log_to=wandb")
    with pytest.raises(ConfigError, match="wandb does not start: RuntimeError") as caught:
        run_here(tmp_path, config)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / config.name).exists()


def test_a_broken_package_is_not_taken_for_a_missing_account(wandb: Any, tmp_path: Path) -> None:
    """An import error within the package is blamed on its installation."""

    def refuse(**_: Any) -> None:
        raise ImportError("cannot import name 'x'")

    wandb.init = refuse
    with pytest.raises(ConfigError, match=r"ImportError\. Its installation is broken"):
        open_logger("wandb", open_location(str(tmp_path)), [], print)


def test_logging_that_fails_half_way_does_not_end_the_run(writers: dict[str, FakeWriter], tmp_path: Path) -> None:
    """A logger that fails is reported once, without its message, and not called again; the run continues."""
    messages: list[str] = []
    logger = open_logger("tensorboard", open_location(str(tmp_path)), [], messages.append)
    logger.event(TASK, Progress(1, 2, {}, METRICS))
    (writer,) = writers.values()
    writer.add_scalar = None  # type: ignore[assignment]
    feed(logger)
    logger.close()
    assert messages == ["Logging failed (TypeError); the run continues without it"]


def test_tensorboard_itself_reads_what_was_logged(tmp_path: Path) -> None:
    """The real TensorBoard, where installed, reads the logged curves."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = open_logger("tensorboard", open_location(str(tmp_path)), [], print)
    feed(logger)
    logger.close()
    read = EventAccumulator(str(tmp_path / "tensorboard/experts/experts-0-1-of-digits-convnet-5f"))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("expert_loss")] == [(1, 0.5), (2, 0.5)]
