"""Tests stopping by Ctrl-C and SIGTERM: what was computed is saved, and the resumed run has the same bits."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from datm_ray.config import ClusterConfig, RunConfig, to_yaml
from datm_ray.core.steps import Steps
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.runtime import stopping
from datm_ray.runtime.executor import Event, Note, Phase, Progress, SerialExecutor, Task
from datm_ray.runtime.ray import executor
from datm_ray.runtime.ray.executor import _Job
from datm_ray.runtime.stopping import Interrupted, by_signals, close_unless_interrupted, saving, wait_for_close
from datm_ray.stages.distill import checkpoint
from datm_ray.stages.distill.checkpoint import CHECKPOINT, KIND, read_curves
from datm_ray.stages.distill.task import Distillation
from datm_ray.stages.experts import progress
from datm_ray.stages.methods.trajectory import TrajectoryMatching
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.tensors import read_tensors
from tests.conftest import actor_processes, set_of, tiny_config
from tests.processes import until

QUIET = Reporter(quiet=True)


def test_only_work_that_saves_itself_takes_a_request_and_only_one() -> None:
    """A request outside of such work is refused; a second one too; nothing is left of it afterwards."""
    assert not stopping.ask()
    answers = []

    def work() -> None:
        with saving() as is_asked:
            answers.extend([is_asked(), stopping.ask(), is_asked(), stopping.ask()])

    with pytest.raises(Interrupted):
        work()
    assert answers == [False, True, True, False]
    with saving() as is_asked:
        assert not is_asked()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_ask_once_and_then_end(number: signal.Signals, code: int) -> None:
    """The first signal asks, the second ends; where nothing can be saved the first one ends. Handlers are restored."""
    before = signal.getsignal(number)
    messages: list[str] = []
    with pytest.raises(Interrupted) as end, by_signals(messages.append):
        signal.raise_signal(number)
    assert (end.value.exit_code, messages) == (code, [])
    steps = []

    def work() -> None:
        with by_signals(messages.append), saving() as is_asked:
            for _ in range(3):
                signal.raise_signal(number)
                steps.append(is_asked())

    with pytest.raises(Interrupted) as end:
        work()
    saved = f"{stopping.SAVES}. Ctrl-C again stops at once."
    assert (end.value.exit_code, steps, messages) == (code, [True], [saved])
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_wait_for_a_close_and_not_the_close(number: signal.Signals, code: int) -> None:
    """A signal while something is closed ends the wait at once; without one the close is waited for, with its error."""
    before, may_end, closed = signal.getsignal(number), threading.Event(), threading.Event()

    def close() -> None:
        os.kill(os.getpid(), number)
        assert may_end.wait(100)
        closed.set()

    with pytest.raises(Interrupted) as end:
        close_unless_interrupted(close)
    assert (end.value.exit_code, end.value.is_at_once, closed.is_set()) == (code, True, False)
    assert signal.getsignal(number) is before
    may_end.set()
    assert closed.wait(100)
    with pytest.raises(ZeroDivisionError):
        close_unless_interrupted(lambda: 1 / 0)
    wait_for_close()  # without the error of a close that has ended


def test_ray_is_asked_for_only_after_a_close_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new executor in the same process waits for a close that continues after Ctrl-C. Ctrl-C ends this wait too."""
    may_end, order = threading.Event(), list[str]()

    def close() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert may_end.wait(100)
        order.append("closed")

    def acquire_and_interrupt(closing: threading.Lock = stopping._closing) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        closing.acquire(timeout=100)

    class AskedError(Exception):
        pass

    def ask(*_: object) -> bool:
        order.append("asked")
        raise AskedError

    monkeypatch.setattr(executor.ray, "is_initialized", ask)
    with pytest.raises(Interrupted):
        close_unless_interrupted(close)
    with monkeypatch.context() as patch:
        lock = mock.MagicMock(**{"__enter__.side_effect": acquire_and_interrupt})
        patch.setattr(stopping, "_closing", lock)
        with pytest.raises(KeyboardInterrupt):
            executor.RayExecutor(ClusterConfig())
    assert order == []
    threading.Timer(0.1, may_end.set).start()
    with pytest.raises(AskedError):
        executor.RayExecutor(ClusterConfig())
    assert order == ["closed", "asked"]


def test_a_driver_names_what_is_saved_after_its_workers_have_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to a driver announces no saving; then a task whose workers save has a note, and a starting one none."""
    messages: list[str] = []
    with pytest.raises(Interrupted), by_signals(messages.append), saving("Stopping"):
        signal.raise_signal(signal.SIGINT)
    assert messages == ["Stopping. Ctrl-C again stops at once."]
    monkeypatch.setattr(executor, "SAVE_TIMEOUT", 0.0)
    monkeypatch.setattr(executor, "_answer", lambda name: name == "at work")
    monkeypatch.setattr(executor.ray, "wait", lambda asked, **_: (asked, []))
    driver: Any = object.__new__(executor._Stage)
    driver._executor = mock.Mock(set_aside={})
    driver._jobs = [
        _Job(Task(name, ()), workers=[mock.Mock(**{"save.return_value": name})] * at_work)
        for name, at_work in (("at work", 1), ("at nothing", 1), ("starting", 0))
    ]
    driver._pool = [worker for job in driver._jobs for worker in job.workers]
    notes = driver._save_and_stop()
    assert next(notes) == (
        Task("at work", ()),
        Note("Stopping after the present iteration or epoch, which is saved if it ends soon; workers have 0 s"),
    )
    with pytest.raises(Interrupted):
        next(notes)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """A command started in the background of a shell without job control is not ended by Ctrl-C for others."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with by_signals(print):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


class AskedAfter(SerialExecutor):
    """A serial executor whose work is asked to stop after one event."""

    def __init__(self, config: RunConfig, is_it: Callable[[Task, Event], bool]) -> None:
        super().__init__(config.cluster)
        self._is_it = is_it

    def run(self, *arguments: Any) -> Iterator[tuple[Task, Event]]:
        for task, event in super().run(*arguments):
            if self._is_it(task, event):
                assert stopping.ask()
            yield task, event


def after(stage: str, done: int) -> Callable[[Task, Event], bool]:
    return lambda task, event: task.stage == stage and isinstance(event, Progress) and event.done == done


def asked_within(scored: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ask the work to stop before the first images that `scored` has a network classify. Returns steps as they come."""
    steps = list[str]()

    def slowly(*arguments: Any) -> Steps[float]:
        assert steps or stopping.ask()
        for _ in range(1000):
            steps.append(scored)
            yield
        return 0.5

    monkeypatch.setattr(f"datm_ray.stages.{scored}.accuracy_in_steps", slowly)
    return steps


@pytest.mark.parametrize(
    "moment",
    ["between two iterations", "before a validation", "before the last validation", "while it validates"],
)
def test_a_distillation_that_is_stopped_saves_its_iteration_and_resumes_to_the_same_bits(
    moment: str, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No iteration is lost between checkpoints; a validation that was due or under way is made when it resumes."""
    config, stop_at = tiny_config(), {"between two iterations": 5, "before the last validation": 6}.get(moment, 3)
    shutil.copytree(finished_run / "experts", tmp_path / "experts")
    pipeline, step, steps = Pipeline([config], str(tmp_path)), TrajectoryMatching.step, list[str]()

    def asked_meanwhile(self: TrajectoryMatching, state: Any, meta: Any) -> None:
        step(self, state, meta)
        if state.iteration == stop_at:
            stopping.ask()

    if moment == "while it validates":
        monkeypatch.setattr("datm_ray.stages.distill.validation.REPORT_INTERVAL", -1.0)
        steps = asked_within("distill.validation", monkeypatch)
    elif stop_at != 5:
        monkeypatch.setattr(TrajectoryMatching, "step", asked_meanwhile)
    with pytest.raises(Interrupted, match=f"^tiny: iteration {stop_at} of 6$"):
        pipeline.distill(lambda: AskedAfter(config, after("distillation", 5 if stop_at == 5 else -1)), QUIET)
    folder = open_location(str(tmp_path / "tiny"))
    assert read_tensors(folder / CHECKPOINT, kind=KIND).metadata["iteration"] == stop_at
    assert len(steps) == (moment == "while it validates")
    monkeypatch.undo()
    pipeline.distill(lambda: SerialExecutor(config.cluster), QUIET)
    resumed, whole = (set_of(out) for out in (tmp_path, finished_run))
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.soft_labels, whole.soft_labels)
    assert resumed.step_sizes == whole.step_sizes
    curves = [read_curves(open_location(str(out / "tiny"))) for out in (tmp_path, finished_run)]
    assert curves[0].keys() == curves[1].keys()
    for name, values in curves[0].items():
        assert values.tolist() == curves[1][name].tolist(), name


@pytest.mark.parametrize("moment", ["while it validates", "while its validation is saved"])
def test_a_distillation_that_is_killed_at_a_validation_loses_no_iteration(
    moment: str, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while a set is validated, or between part and file of the checkpoint after it, loses no iteration."""
    config = tiny_config("distill.checkpoint_every=3")
    shutil.copytree(finished_run / "experts", tmp_path / "experts")
    pipeline, write, steps = Pipeline([config], str(tmp_path)), checkpoint.write_tensors, []

    def killed(*arguments: Any, **options: Any) -> Any:
        if moment == "while it validates" or len(written := [*steps, arguments[0].uri]) == 4:
            raise ConnectionError("killed")
        steps[:] = written
        return write(*arguments, **options)

    at = (Distillation, "_validate") if moment == "while it validates" else (checkpoint, "write_tensors")
    monkeypatch.setattr(*at, killed)
    with pytest.raises(ConnectionError, match="killed"):
        pipeline.distill(lambda: SerialExecutor(config.cluster), QUIET)
    monkeypatch.undo()
    assert read_tensors(open_location(str(tmp_path / "tiny")) / CHECKPOINT, kind=KIND).metadata["iteration"] == 3
    pipeline.distill(lambda: SerialExecutor(config.cluster), QUIET)
    resumed, whole = (set_of(out) for out in (tmp_path, finished_run))
    assert torch.equal(resumed.images, whole.images)
    assert resumed.step_sizes == whole.step_sizes


def test_networks_that_are_asked_to_stop_while_they_are_scored_stop_and_are_scored_later(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request while trained networks are scored ends the work at the next images; training resumes at its end."""
    shutil.copytree(finished_run / "experts", tmp_path / "experts")
    shutil.copytree(finished_run / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("evaluation"))
    pipeline = Pipeline([tiny_config("evaluate.seeds=1")], str(tmp_path))
    steps = asked_within("evaluate.rows", monkeypatch)
    with pytest.raises(Interrupted, match=r"network 1 of 3, epoch (\d+) of \1$"):
        pipeline.run_all(lambda: SerialExecutor(ClusterConfig()), QUIET)
    assert len(steps) == 1
    monkeypatch.undo()
    done = list[int]()

    def note(task: Task, event: Event) -> bool:
        done.extend([event.done] if isinstance(event, Progress) and task.stage == "evaluation" else [])
        return False

    pipeline.run_all(lambda: AskedAfter(pipeline.runs.configs[0], note), QUIET)
    assert done[0] == 4


def test_experts_that_are_stopped_save_their_epoch_and_resume_to_the_same_bits(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack that would write seldom writes the epoch after which it stops."""
    monkeypatch.setattr(progress, "WRITE_SHARE", 1e-9)
    config = tiny_config()
    pipeline = Pipeline([config], str(tmp_path))
    with pytest.raises(Interrupted, match=r"^experts 0-1 of .*: epoch 3 of 5$"):
        pipeline.run_all(lambda: AskedAfter(config, after("experts", 3)), QUIET)
    epochs = []

    def note(_: Task, event: Event) -> bool:
        epochs.extend([event.done] if isinstance(event, Progress) else [])
        return False

    pipeline.train_experts(lambda: AskedAfter(config, note), QUIET)
    assert epochs == [4, 5]
    stored = [sorted(out.rglob("expert-*.arrow")) for out in (tmp_path, finished_run / "experts")]
    assert [path.read_bytes() for path in stored[0]] == [path.read_bytes() for path in stored[1]]


PRIOR = ("prior={kind: trained, width: 4, epochs: 4, batch_size: 50}", "cluster.checkpoint_seconds=0.001")


@pytest.mark.parametrize(
    ("settings", "stage", "place"),
    [
        ((), "experts", r"epoch 2 of 5"),
        (("evaluate.full=true",), "full", r"network 1 of 3, epoch 2 of 4"),
        (PRIOR, "prior", "epoch 2 of 4"),
    ],
)
def test_a_long_epoch_is_given_up_between_two_steps(
    settings: tuple[str, ...], stage: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work that is asked to stop within a long epoch ends between two steps, says what is saved, and resumes there."""
    monkeypatch.setattr(progress, "WRITE_SHARE", 1e9)
    monkeypatch.setattr("datm_ray.stages.prior.WRITE_SHARE", 1e9)
    monkeypatch.setattr("datm_ray.stages.evaluate.progress.SAVE_INTERVAL", 0.0)
    monkeypatch.setattr("datm_ray.stages.evaluate.progress.REPORT_INTERVAL", -1.0)
    clock = SimpleNamespace(monotonic=itertools.count(step=1e6).__next__)  # every step is a heartbeat
    monkeypatch.setattr("datm_ray.runtime.heartbeats.time", clock)
    config = tiny_config("evaluate.seeds=1", "evaluate.real_epochs=4", *settings)
    pipeline, done = Pipeline([config], str(tmp_path)), [0]

    def within_the_third(task: Task, event: Event) -> bool:
        """True at a heartbeat within the third epoch of the stage's first task."""
        if stage in task.name and isinstance(event, Progress):
            done[0] = event.done
        is_due = stage in task.name and done[0] == 2 and isinstance(event, Phase)
        if is_due:
            monkeypatch.setattr(stopping, "LONGEST_EPOCH", -1.0)  # has passed at the next step
        return is_due

    with pytest.raises(Interrupted, match=rf"{place}, without the part of the next epoch$"):
        pipeline.run_all(lambda: AskedAfter(config, within_the_third), QUIET)
    monkeypatch.undo()
    resumed = list[int]()

    def first(task: Task, event: Event) -> bool:
        if stage in task.name and isinstance(event, Progress):
            resumed.append(event.done)
            raise Interrupted
        return False

    with pytest.raises(Interrupted):
        pipeline.run_all(lambda: AskedAfter(config, first), QUIET)
    assert resumed[0] in (2, 3)  # an evaluation reports where it starts


SAVED = r"datm-ray: stopped\. Saved {} (\d+) of {}\. Run the same command again to resume from there\."


@pytest.mark.slow
@pytest.mark.ray
def test_a_command_on_ray_that_gets_a_signal_saves_what_its_workers_have_computed(tmp_path: Path) -> None:
    """SIGTERM while experts train and Ctrl-C in a sharded distillation save; the line says from where it resumes."""
    config = tiny_config(
        "experts.epochs=2000",
        "experts.keep_epochs=5",
        "experts.count=2",
        "distill.iterations=10000",
        "distill.validate_every=10000",
        "distill.checkpoint_every=10000",
        "cluster.shards=2",
    )
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    out, log = tmp_path / "out", tmp_path / "out/tiny/log.txt"

    def stopped_by(number: signal.Signals, mark: str, *settings: str) -> tuple[int, str]:
        """Exit code and standard error of a run that gets the signal after a mark in its log."""
        command = [sys.executable, "-m", "datm_ray", "run", str(tmp_path / "tiny.yaml"), "--out", str(out), *settings]
        with (tmp_path / "err").open("w+") as err:
            run = subprocess.Popen([*command, "-v", "-v"], stdout=err, stderr=err, start_new_session=True)
            try:
                until(lambda: run.poll() is not None or (log.exists() and mark in log.read_text()), mark)
                # A terminal sends Ctrl-C to Ray's processes too; SIGTERM ends them.
                (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
                return run.wait(120), (tmp_path / "err").read_text()
            finally:
                if run.poll() is None:
                    run.kill()
                assert not actor_processes(run.pid)

    code, err = stopped_by(signal.SIGTERM, "step=7 ")
    found = re.fullmatch(SAVED.format("experts 0-1 of .*: epoch", 2000), err.strip().splitlines()[-1])
    assert code == 143, err
    assert found, err
    assert int(found[1]) >= 7
    saved = [int(path.name.split("-")[1]) for path in (out / "experts").rglob("progress/*/*.arrow")]
    assert max(saved) == int(found[1])
    shutil.rmtree(out)
    (tmp_path / "tiny.yaml").write_text(to_yaml(config.model_copy(update={"experts": tiny_config().experts})))
    code, err = stopped_by(signal.SIGINT, "task=tiny step=7 ")
    found = re.fullmatch(SAVED.format("tiny: iteration", 10000), err.strip().splitlines()[-1])
    assert code == 130, err
    assert found, err
    iteration = read_tensors(open_location(str(out / "tiny")) / CHECKPOINT, kind=KIND).metadata["iteration"]
    assert iteration == int(found[1]) >= 7
    assert len(list((out / "tiny/checkpoint").iterdir())) == 2
    assert "Traceback" not in err


CLOSES_SLOWLY = """
import sys, time
import ray
import datm_ray.cli

shutdown = ray.shutdown

def slowly():
    print("closing", flush=True)
    time.sleep(600)
    shutdown()

ray.shutdown = slowly
datm_ray.cli.main()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_while_ray_is_closed_ends_the_command_and_ray(finished_run: Path, tmp_path: Path) -> None:
    """A command that closes Ray ends at once on Ctrl-C, with one line, and no process of its Ray stays."""
    shutil.copytree(finished_run, tmp_path / "runs")
    mark = f"DATM_RAY_TEST_{uuid.uuid4().hex}=1"
    command = [sys.executable, "-c", CLOSES_SLOWLY, "run", str(finished_run.parent / "tiny.yaml"), "--out", "runs"]
    environment = {**os.environ, **dict([mark.split("=")])}
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "closing\n"
        assert len(_processes_with(mark)) > 2
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 130, err
    assert err.splitlines()[-1] == "datm-ray: stopped. Run the same command again to resume."
    assert "Traceback" not in err
    until(lambda: not _processes_with(mark), "Ray's processes have ended", every=0.2)


def _processes_with(variable: str) -> list[int]:
    """Process ids of this machine's processes that have the variable in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
