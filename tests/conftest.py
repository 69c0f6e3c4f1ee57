"""Fixtures of several test files: a tiny configuration of the real pipeline, a Ray cluster, an S3 server."""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import signal
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from datm_ray import cli
from datm_ray.artifact import Artifact, load
from datm_ray.config import RunConfig, override, parse_config, to_yaml
from datm_ray.config.files import _read_sections
from datm_ray.core.compute import compilation
from datm_ray.core.networks import stacked
from datm_ray.core.training import loop
from datm_ray.monitor import logs
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, report
from datm_ray.recipes import get_recipe
from datm_ray.runtime.executor import Event, Executor, Lost, Progress, SerialExecutor
from datm_ray.stages.distill import validation
from datm_ray.stages.distill.task import Distillation
from tests import processes
from tests.store import proxy
from tests.tapes import Tape, recorded_tapes
from tests.training import train

TINY = (
    "network.width=4",
    "experts.count=2",
    "experts.epochs=5",
    "experts.batch_size=128",
    "distill.ipc=1",
    "distill.iterations=6",
    "distill.student_steps=3",
    "distill.expert_epochs=1",
    "distill.start_epochs=[0, 3]",
    "distill.validate_every=3",
    "distill.validation_seeds=1",
    "distill.checkpoint_every=2",
    "distill.threshold=10",
    "evaluate.protocol=quick",
    "evaluate.epochs=4",
    "evaluate.seeds=2",
    "evaluate.real_epochs=1",
    "cluster.compile=false",
)
"""Overrides for real digits in seconds on one core, uncompiled; other tests cover compilation."""


def pytest_configure(config: pytest.Config) -> None:
    """Give all processes of a session one compiler cache, so that each graph is compiled once.

    Ctrl-C is handled again, because tests need it: a shell that starts the session in the background has it ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(10_000, 10, 10)  # at Python's own threshold, garbage collection takes a quarter of the time
    cache = getattr(config, "cache", None)  # None with -p no:cacheprovider
    if cache is not None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.mkdir("inductor"))


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, to share fixtures, and all tests of the Ray cluster in another one."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))  # seconds; enough on a busy machine
        shared = {"ray_cluster", "executor"} & set(getattr(item, "fixturenames", ()))
        group = "ray" if shared and item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _hides_no_values_of_other_tests() -> Iterator[None]:
    """Values that one test hides in logs are shown in the next."""
    yield
    logs._hidden.clear()


@pytest.fixture(autouse=True)
def _restores_settings_of_torch() -> Iterator[None]:
    """What a test's worker sets for its whole process, such as cuDNN's timing, does not last beyond the test."""
    from datm_ray.runtime.machine.devices import restoring_settings

    with restoring_settings():
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread, because small networks run many times slower on several threads of a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def end_of_processes() -> Iterator[None]:
    """End the processes that tests have started with the session."""
    yield
    processes.end_all()


@pytest.fixture
def tiny() -> RunConfig:
    """A configuration of every stage that runs in a few seconds."""
    return tiny_config()


def load_config_text(text: str, origin: str) -> RunConfig:
    """Configuration in YAML text without a base; `origin` names its source in messages."""
    return parse_config(_read_sections(text, origin), origin)


def tiny_config(*changes: str) -> RunConfig:
    """The tiny run with some values changed, resolved for its images as in the pipeline."""
    config = override(get_recipe("digits-ipc1"), ["name=tiny", *TINY, *changes])
    return config.resolved((config.dataset.resize or 8,) * 2)


def run_here(out: Path, *configs: RunConfig, stage: str = "run_all", store: Path | str | None = None) -> Pipeline:
    """Run a stage of some runs, or all stages, in this process and in silence. Returns the runs' pipeline."""
    pipeline = Pipeline(configs, str(out), None if store is None else str(store))
    getattr(pipeline, stage)(lambda: SerialExecutor(configs[0].cluster), Reporter(quiet=True))
    return pipeline


def set_of(out: Path) -> Artifact:
    """Set of the tiny run in an output folder."""
    return load(str(out / "tiny/synthetic.arrow"))


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store with the experts of the tiny configuration; a test must not change it."""
    out = tmp_path_factory.mktemp("tiny-experts")
    run_here(out, tiny_config(), stage="train_experts")
    return out / "experts"


@pytest.fixture
def no_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every validated set an accuracy of one half. Its networks would take most of the time."""

    def half(*_: object) -> Iterator[Any]:
        return 0.5
        yield

    monkeypatch.setattr(Distillation, "_validate", half)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of one finished serial run of the tiny configuration; a test that changes it must copy it.

    Its recipe lies beside it, in `tiny.yaml`.
    """
    folder, config = tmp_path_factory.mktemp("finished"), tiny_config()
    (folder / "tiny.yaml").write_text(to_yaml(config))
    run_here(folder / "runs", config)
    report(str(folder / "runs"))
    return folder / "runs"


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Tapes recorded so far, with torch's CUDA graphs replaced by tapes."""
    return recorded_tapes(monkeypatch)


def stacks_of_any_work(patch: pytest.MonkeyPatch) -> None:
    """Let the networks of a row be trained together, uncompiled, however short their training is."""
    patch.setattr(loop, "COMPILED_WORK", 0.0)
    patch.setattr(stacked, "compiler_problem", lambda device: "")
    patch.setattr(compilation, "Compiled", lambda graph, *_, **__: graph)
    patch.setattr(loop, "trainer", functools.cache(loop.trainer.__wrapped__))
    patch.setattr(validation, "trainer", loop.trainer)


def actor_processes(ancestor: int | None = None) -> list[int]:
    """Process ids of Ray workers among the descendants of a process. Ray names a process after its actor.

    Other workers are left out, because another cluster on the machine may do real work.

    Args:
        ancestor: process id; `None` for this process.
    """
    ancestor = os.getpid() if ancestor is None else ancestor
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                title = (entry / "cmdline").read_bytes()
                if title.startswith(b"ray::") and b"Worker" in title and ancestor in _ancestors(int(entry.name)):
                    found.append(int(entry.name))
    return found


def _ancestors(process: int) -> list[int]:
    ancestors = []
    while process > 1:
        # The fields after the bracketed name, which may hold any character: state, parent, ...
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        ancestors.append(process)
    return ancestors


CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave charts in reports empty, because drawing them takes as long as a tiny run."""
    monkeypatch.setattr("datm_ray.report.charts._svg", lambda draw: "data:,")


@pytest.fixture
def datm_ray(
    without_charts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> CommandLine:
    """Runs the command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATM_RAY_DEBUG", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["datm-ray", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def assert_one_line(ended: tuple[int, str, str], *words: str, code: int = 2) -> None:
    """Assert that a command has ended with an exit code and one line of error, which has these words."""
    found, _, err = ended
    assert (found, len(err.splitlines())) == (code, 1), err
    assert err.startswith("datm-ray: ")
    for each in words:
        assert each in err


@contextmanager
def recorded_steps() -> Iterator[list[tuple[float, bool]]]:
    """Record each optimizer step of the block: its learning rate, and True if the optimizer had a momentum before."""
    found: list[tuple[float, bool]] = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.append((optimizer.param_groups[0]["lr"], any(optimizer.state.values())))

    handle = register_optimizer_step_pre_hook(record)
    try:
        yield found
    finally:
        handle.remove()


def scoring_steps(artifact: Artifact, schedule: loop.Schedule) -> list[tuple[float, bool]]:
    """Optimizer steps of a network that scores a set, see `recorded_steps`."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(len(artifact.class_names)))
    network(artifact.images[:1])
    with recorded_steps() as steps:
        train(loop.Training(network, artifact.images, artifact.soft_labels, schedule, seed=0))
    return steps


def documented_keys(command: str) -> set[str]:
    """Keys that docs/json.md names for a command's --json, those in brackets too."""
    text = (Path(__file__).parents[1] / "docs" / "json.md").read_text()
    (row,) = re.findall(rf"^\| `{re.escape(command)}` \| (.*) \|$", text, re.MULTILINE)
    _, _, table = text.partition(f"The keys of a {command}:\n")  # a long list of keys is a table
    row += table.partition("\n## ")[0]
    return set(re.findall(r"`(\w+)`", row))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A local Ray cluster with two CPUs, started once."""
    ray = pytest.importorskip("ray")
    before = Path.cwd()
    # Workers import the tests from the current folder, and the first test that uses Ray may have changed it.
    os.chdir(Path(__file__).parents[1])
    # Without "local", Ray would join a cluster that already runs on this machine.
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    os.chdir(before)
    yield ray
    ray.shutdown()


def killing_executor(config: RunConfig, losses: list[str]) -> Executor:
    """Executor on the running Ray cluster that kills one actor in each stage, at the stage's first progress.

    Args:
        losses: gets the names of the tasks that lose their worker.
    """
    from datm_ray.runtime.ray.executor import RayExecutor

    class Killing(RayExecutor):
        def run(self, *arguments: Any) -> Iterator[tuple[Any, Event]]:
            killed = False
            for task, event in super().run(*arguments):
                if isinstance(event, Progress) and not killed:
                    os.kill(actor_processes()[0], signal.SIGKILL)
                    killed = True
                if isinstance(event, Lost):
                    losses.append(task.name)
                yield task, event

    return Killing(config.cluster)


@pytest.fixture(params=["serial", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest, tiny: RunConfig) -> Iterator[Executor]:
    """Both executors, so that a test with this fixture holds for either."""
    if request.param == "serial":
        yield SerialExecutor(tiny.cluster)
        return
    request.getfixturevalue("ray_cluster")
    from datm_ray.runtime.ray.executor import RayExecutor

    on_ray = RayExecutor(tiny.cluster)
    yield on_ray
    on_ray.close()  # its actors leave their CPUs to the next test


# --- S3: a local server over HTTP, and an environment that leads to it as a user's would ---

AWS_SETTINGS = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL_S3",
    "AWS_MAX_ATTEMPTS",
    "AWS_CA_BUNDLE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)
"""Variables that a user's environment may have and a test's must not have."""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of moto's server, on a free port because two test sessions may share a machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for every request
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that points the environment to a server; credentials and region are set, files are ignored.

    s3fs keeps its filesystems, each with the environment it was made in, so they are forgotten before and after.
    """
    from datm_ray.store.files.s3 import S3

    def use(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        S3.clear_instance_cache()

    for name in (*AWS_SETTINGS, "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    S3.clear_instance_cache()
    yield use
    S3.clear_instance_cache()


@pytest.fixture
def bucket(s3_server: str, s3_environment: Callable[[str], None]) -> str:
    """Name of a fresh bucket on the environment's server."""
    name = f"bucket-{uuid.uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
    s3_environment(s3_server)
    return name


@pytest.fixture
def s3_proxy(
    s3_server: str, bucket: str, s3_environment: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[proxy.Proxy]:
    """A proxy between the environment and the server; requests that it fails are retried at once."""
    monkeypatch.setattr("datm_ray.store.files.s3.LONGEST_PAUSE", 0.02)
    with proxy.serving(s3_server) as running:
        s3_environment(running.url)
        yield running
