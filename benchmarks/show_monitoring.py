"""A live run under Prometheus whose workers are killed: every query of the Grafana dashboard is asked.

    python benchmarks/show_monitoring.py --out benchmarks/results/monitoring_2-core-cpu_202611.md
    python benchmarks/show_monitoring.py --screenshot cluster/monitoring/ray-dashboard.png

Starts a Ray cluster of its own on this machine, Prometheus (Debian's package) bound to 127.0.0.1 on free ports, and a
run of digits with MetaDD in two shards. While experts are trained, and again while the set is distilled, an actor is
killed with SIGKILL. The run is held at its evaluation until `cluster/monitoring/check.py` has asked everything.
Exit code 1 if a query that must have data has none. --screenshot needs Debian's chromium.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # the cluster listens on this machine only, for a minute or two
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from facts import in_folder
from ray.util.state import list_actors

from datm_ray.config import override
from datm_ray.monitor.progress import Reporter, Stage
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import Event, Lost, Progress, Started, Task

MONITORING = Path(__file__).parents[1] / "cluster" / "monitoring"
FAULTS = ("Workers lost", "Tasks given to other workers")
CONDITIONS = ("Losses", "Meta-feature ratio", "Test accuracy")
PATIENCE = 240.0
"""Longest time in seconds to wait for an event of the run. The machine may be busy with other work."""

CHANGES = (
    "name=watched",
    "metadd={auxiliaries: [{architecture: lenet, width: 16}], experts: {epochs: 3}}",
    "experts.test_every=1",
    "experts.count=4",
    "experts.epochs=40",
    "distill.iterations=150",
    "distill.student_steps=10",
    "distill.validate_every=50",
    "distill.checkpoint_every=10",
    "evaluate.seeds=1",
    "evaluate.real_epochs=2",
    "evaluate.protocol=short",
    "cluster.experts_at_a_time=2",
    "cluster.compile=false",
    "cluster.shards=2",
    "cluster.peer_timeout=60",
)
"""Overrides of digits-ipc1 that give every stage some seconds, so that all are observed."""


class Watcher(Reporter):
    """Reporter that follows the run's events, and holds the run at the first result of its evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        """Stage -> number of its `Progress` events so far."""
        self.lost: Counter[str] = Counter()
        self.go_on = threading.Event()
        """Event that is set once nothing more is watched, so that the run may end."""

    @contextmanager
    def stage(self, title: str, tasks: Sequence[Task]) -> Iterator[_Passing]:
        """Start a stage as a reporter does, and observe its events."""
        with super().stage(title, tasks) as inner:
            yield _Passing(inner, self)

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Wait until a condition holds.

        Raises:
            TimeoutError: the condition does not hold after `PATIENCE` seconds, or the run has ended.
        """
        end = time.monotonic() + PATIENCE
        while not what() and time.monotonic() < end and not self.go_on.is_set():
            time.sleep(0.2)
        if not what():
            raise TimeoutError("the run does not come to where it is wanted")


class _Passing:
    def __init__(self, inner: Stage, watcher: Watcher) -> None:
        self._inner, self._watcher = inner, watcher

    def add(self, task: Task) -> None:
        self._inner.add(task)

    def event(self, task: Task, event: Event) -> None:
        self._inner.event(task, event)
        if isinstance(event, Progress):
            self._watcher.seen[task.stage] += 1
        elif isinstance(event, Lost):
            self._watcher.lost[task.stage] += 1
        if task.stage == "evaluation":
            if not isinstance(event, Started):
                self._watcher.go_on.wait(2 * PATIENCE)
        elif self._watcher.go_on.is_set():
            raise SystemExit("The run was not watched to its end")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens to now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def kill_an_actor(kind: str, dashboard: str) -> None:
    """SIGKILL for one actor of a worker class that is alive on the cluster of this dashboard."""
    actors = list_actors(f"http://{dashboard}", filters=[("state", "=", "ALIVE")], timeout=int(PATIENCE))
    actor = next(actor for actor in actors if kind in actor.class_name)
    os.kill(actor.pid, signal.SIGKILL)


@contextmanager
def prometheus(folder: Path, ray_folder: Path, seconds: int) -> Iterator[str]:
    """Run Prometheus with the configuration of cluster/monitoring, for another folder of Ray's. Yields its address."""
    text = (MONITORING / "prometheus.yml").read_text().replace("/tmp/ray/", f"{ray_folder}/")
    text = text.replace("[alerts.yml]", f"[{MONITORING / 'alerts.yml'}]")
    config = folder / "prometheus.yml"
    config.write_text(text.replace("10s", f"{seconds}s").replace("scrape_timeout: 5s", f"scrape_timeout: {seconds}s"))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen(
            [*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait()


def screenshot(dashboard: str, place: Path) -> None:
    """The page of actors of Ray's dashboard, 1600 x 1000 pixels of at most 64 colours."""
    from PIL import Image

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={profile}", "--window-size=1600,1000", "--virtual-time-budget=15000"]
        command += [f"--screenshot={in_folder(place)}", f"http://{dashboard}/#/actors"]
        subprocess.run(command, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    Image.open(place).convert("RGB").quantize(64).save(place, optimize=True)


def check(address: str, *required: str) -> subprocess.CompletedProcess[str]:
    """Run cluster/monitoring/check.py until all queries return data, for at most half of `PATIENCE`."""
    command = [sys.executable, str(MONITORING / "check.py"), address]
    command += [word for panel in required for word in ("--with", panel)]
    end = time.monotonic() + PATIENCE / 2
    while True:
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode == 0 or time.monotonic() > end:
            return asked
        time.sleep(3)


def watch(watcher: Watcher, address: str, dashboard: str, picture: Path | None) -> tuple[bool, str]:
    """Kill workers and query the metrics meanwhile. Returns whether all queries had data, and the report."""
    try:
        watcher.wait_for(lambda: watcher.seen["experts"] >= 6)
        kill_an_actor("Worker", dashboard)
        watcher.wait_for(lambda: watcher.lost["experts"] >= 1)
        watcher.wait_for(lambda: watcher.seen["distillation"] >= 15)
        if picture is not None:
            screenshot(dashboard, picture)
        kill_an_actor("Worker", dashboard)
        watcher.wait_for(lambda: watcher.lost["distillation"] >= 1)
        watcher.wait_for(lambda: watcher.seen["evaluation"] >= 1)
        asked = check(address, *CONDITIONS, *FAULTS)
        return asked.returncode == 0, asked.stdout + asked.stderr
    finally:
        watcher.go_on.set()


def main() -> int:
    """Run, watch and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the report to this file; else it is printed")
    parser.add_argument("--screenshot", type=Path, help="PNG of Ray's dashboard during the run")
    parser.add_argument("--seconds", type=int, default=5, help="between scrapes")
    given = parser.parse_args()
    for needed in ("prometheus", *(("chromium",) if given.screenshot else ())):
        if shutil.which(needed) is None:
            raise SystemExit(f"{needed} is not installed: `apt-get install {needed}`")

    config = override(get_recipe("digits-ipc1"), CHANGES)
    found: list[tuple[bool, str]] = []
    with ExitStack() as stack:
        # A short path, because names of Ray's sockets are limited to 107 characters.
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="w", dir="/tmp", ignore_cleanup_errors=True))
        )
        context = ray.init(
            address="local",
            num_cpus=2,
            dashboard_host="127.0.0.1",
            dashboard_port=free_port(),
            include_dashboard=True,
            log_to_driver=False,
            _temp_dir=str(folder / "ray"),
        )
        stack.callback(ray.shutdown)
        address = stack.enter_context(prometheus(folder, folder / "ray", given.seconds))
        watcher = Watcher()
        thread = threading.Thread(
            target=lambda: found.append(watch(watcher, address, str(context.dashboard_url), given.screenshot))
        )
        thread.start()
        try:
            pipeline = Pipeline([config], str(folder / "out"))
            pipeline.run_all(lambda: create_executor("ray", config.cluster), watcher)
        finally:
            watcher.go_on.set()
            thread.join()
    if not found:
        return 1
    complete, text = found[0]
    report = "\n".join([*header(sys.argv[1:]), text])
    if given.out:
        in_folder(given.out).write_text(report)
    print(report if not given.out else f"Wrote {given.out}")
    return 0 if complete else 1


def header(arguments: list[str]) -> list[str]:
    """Facts of the report: command, versions and machine."""
    version = subprocess.run(["prometheus", "--version"], capture_output=True, text=True)
    release = (version.stdout or version.stderr).split(",")[1].split()[1]
    return [
        "# A live run under Prometheus",
        "",
        f"`python benchmarks/show_monitoring.py {' '.join(arguments)}`: digits-ipc1 with {', '.join(CHANGES[1:])};",
        "one actor killed while experts were trained, one while the set was distilled.",
        "",
        f"Ray {ray.__version__}, Prometheus {release}, Python {platform.python_version()}, {os.cpu_count()} CPU cores, "
        f"{platform.system()} {platform.machine()}. No Grafana: what is asked is what its panels would ask.",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
