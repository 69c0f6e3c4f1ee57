"""Tests nodes lost and added during a whole run, with real raylets that are really killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from datm_ray.artifact import load
from datm_ray.config import RunConfig, override, to_yaml
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import SerialExecutor
from datm_ray.stages.distill.checkpoint import read_iteration
from datm_ray.stages.evaluate.scores import read_scores
from datm_ray.store.files.filesystem import Location, open_location
from tests.conftest import set_of, tiny_config
from tests.processes import side_by_side, until
from tests.runtime.nodes import Nodes
from tests.runtime.soak import Journal, Soak, counted_steps, drawn, lines, memory_limit
from tests.store.proxy import serving

ITERATIONS = 24
TOLERANCE = 0.2
"""Allowed difference, as a share of one iteration's average change. One shard and two differ by 2e-4 of an iteration
(20 of 20 disturbed runs), because they sum floats in another order, unless rounding carries a rectifier over its kink.
A lost iteration differs by at least 1.4 (each of six left out). The images' learning rate is low, because higher ones
crossed such kinks, whose effect grows with every iteration."""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
def test_nodes_are_lost_in_training_and_in_distillation_and_one_is_added(tmp_path: Path) -> None:
    """The run survives a node lost in training and one in distillation, and uses an added node."""
    config = tiny_config(
        "experts.epochs=40",
        "experts.keep_epochs=5",
        "experts.count=3",
        "cluster.shards=2",
        "cluster.experts_at_a_time=1",
        f"distill.iterations={ITERATIONS}",
        "distill.student_steps=10",
        "distill.initial_step_size=0.01",
        "distill.learning_rate_images=1",
        "distill.learning_rate_step_size=1e-7",
        "distill.validate_every=24",
        "distill.checkpoint_every=1",
        "evaluate.seeds=1",
    )
    pipeline = Pipeline([config], str(tmp_path / "undisturbed"))
    for stage in (pipeline.train_experts, pipeline.distill):
        stage(lambda: SerialExecutor(config.cluster), Reporter(quiet=True))
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    out, log = tmp_path / "out", tmp_path / "log"
    with Nodes() as nodes, log.open("w") as output:
        nodes.add("first")
        nodes.add("second")
        command = [sys.executable, "-m", "datm_ray", "run", str(tmp_path / "tiny.yaml"), "--out", str(out)]
        run = subprocess.Popen([*command, "--address", nodes.address], stdout=output, stderr=output, text=True)

        def happened(words: str) -> Callable[[], bool]:
            assert run.poll() is None, log.read_text()
            return lambda: words in log.read_text()

        until(lambda: any((out / "experts").rglob("progress/*/*.arrow")), "experts are trained")
        nodes.kill("first")
        until(happened("worker lost ("), "the loss of an expert's worker is logged")
        nodes.add("third")
        until((out / "tiny/checkpoint.arrow").exists, "the set is distilled")
        nodes.kill("second")
        until(happened("runs with 1 of 2 workers"), "the set continues in one shard")
        nodes.add("fourth")
        until(happened("runs with 2 of 2 workers"), "the set continues in two shards again")
        assert run.wait(200) == 0, log.read_text()
    text = log.read_text()
    assert text.count("worker lost (") == 2, text
    assert "Traceback" not in text
    assert "raylet" not in text
    experts = [path.read_bytes() for path in sorted((out / "experts").rglob("expert-*.arrow"))]
    assert experts == [path.read_bytes() for path in sorted((tmp_path / "undisturbed/experts").rglob("expert-*.arrow"))]
    initial = load(str(out / "tiny/initial.arrow"))
    found, expected = (set_of(folder) for folder in (out, tmp_path / "undisturbed"))
    for part in ("images", "soft_labels"):
        before, ours, theirs = getattr(initial, part), getattr(found, part), getattr(expected, part)
        iterations_apart = ITERATIONS * float((ours - theirs).norm() / (theirs - before).norm())
        print(f"{part}: {iterations_apart:.1e} of an iteration")
        assert iterations_apart < TOLERANCE
    assert found.step_size == pytest.approx(expected.step_size, rel=1e-4)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
def test_a_worker_that_rays_memory_monitor_kills_costs_an_attempt(tmp_path: Path) -> None:
    """A worker killed because its node ran out of memory is a loss, whose reason says so."""
    script = f"""
from datm_ray.config import ClusterConfig
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import Task
from tests.runtime.workers import Hog
import sys
executor = create_executor("ray", ClusterConfig(), sys.argv[1])
for _, event in executor.run(Hog, ({str(tmp_path)!r},), "work", [Task("hog", (4 << 30,))]):
    print(event, flush=True)
executor.close()
"""
    with Nodes(memory_limit(2 << 30)) as nodes:
        nodes.add("only")
        command = [sys.executable, "-c", script, nodes.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    lost = re.search(r"Lost\(reason='(.*)', attempt=1\)", done.stdout)
    assert lost, done.stdout
    assert re.fullmatch(r"its node ran out of memory: [\d.]+GB used / [\d.]+GB limit", lost[1])
    assert "Finished(result='done'" in done.stdout


LEFT = """
import sys, time
from pathlib import Path
import ray
from datm_ray.config import ClusterConfig
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import Progress, Task
from tests.runtime.workers import Leaver

class Located(Leaver):
    def __init__(self, folder):
        super().__init__(folder)
        Path(folder, "node").write_text(ray.get_runtime_context().get_node_id())

PREEMPTION, (_, address, folder) = 2, sys.argv
executor, done = create_executor("ray", ClusterConfig(), address), []
for _, event in executor.run(Located, (folder,), "count", [Task("count", (80,))]):
    if isinstance(event, Progress):
        done.append(event.done)
    else:
        print(event, flush=True)
    if done == [1] and isinstance(event, Progress):
        node, deadline = Path(folder, "node").read_text(), int(1000 * (time.time() + 120))
        assert ray._private.worker.global_worker.gcs_client.drain_node(node, PREEMPTION, "reclaimed", deadline)[0]
assert done == list(range(1, 81)), done
executor.close()
"""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
def test_a_worker_leaves_a_node_that_ray_says_is_preempted(tmp_path: Path) -> None:
    """A real notice of preemption has the worker save, and another node resumes without loss or repetition."""
    with Nodes() as nodes:
        nodes.add("first")
        nodes.add("second")
        command = [sys.executable, "-c", LEFT, nodes.address, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "its node ends soon: saved number" in done.stdout
    assert done.stdout.count("Started(") == 2
    assert "Lost(" not in done.stdout


FAULTS, SEED = (int(os.environ.get(f"DATM_RAY_FAULTS{name}", "0")) for name in ("", "_SEED"))
"""FAULTS: number of faults of the soak, about a minute each. SEED: decides their kinds, victims and moments. With
DATM_RAY_FAULTS_REPORT=FILE the tables of benchmarks/results are written, again after each fault."""
MINUTES = float(os.environ.get("DATM_RAY_FAULTS_MINUTES", "inf"))
"""Minutes after which the soak makes no more faults, on a machine that is too busy for all of them."""
ACCURACY_TOLERANCE = 0.05
"""Allowed difference of the accuracy of a set that was made in two shards and, after losses, in one."""


def recipes_of(run: int) -> list[RunConfig]:
    """Recipes of one run of the soak: two sets in one worker each, or a set in two workers, in turn."""
    changes = [
        f"seed={run}",
        "experts.epochs=20",
        "experts.keep_epochs=5",
        "cluster.experts_at_a_time=1",
        f"cluster.shards={1 + run % 2}",
        f"distill.iterations={max(60, 4 * FAULTS)}",
        "distill.student_steps=5",
        "distill.initial_step_size=0.01",
        "distill.learning_rate_images=1",
        "distill.learning_rate_step_size=1e-7",
        f"distill.validate_every={max(15, FAULTS)}",
        "distill.checkpoint_every=1",
    ]
    return [
        tiny_config(*changes, f"name=run{run}ipc{ipc}", f"distill.ipc={ipc}") for ipc in ((1,) if run % 2 else (1, 2))
    ]


def run_alone(config: RunConfig, folder: Path) -> None:
    """Make a set without faults, in one worker, and score it."""
    alone = override(config, ["cluster.shards=1"])
    start = partial(SerialExecutor, alone.cluster)
    Pipeline([alone], str(folder)).run_all(start, Reporter(quiet=True))


def files_of(folder: Location) -> dict[str, bytes]:
    """Arrow files in a folder, by their paths in it."""
    paths = [path for path in folder.fs.find(folder.path) if path.endswith(".arrow")]
    return {path.removeprefix(folder.path): folder.fs.cat_file(path) for path in paths}


def compared(config: RunConfig, out: Location, undisturbed: Location) -> str:
    """Compare a set of the soak and its scores with an undisturbed run's. Returns a line about it."""
    ours, theirs, initial = (
        load((folder / config.name / name).uri)
        for folder, name in ((out, "synthetic.arrow"), (undisturbed, "synthetic.arrow"), (out, "initial.arrow"))
    )
    dataset = (out / config.name / "dataset.json").read_json()["fingerprint"]
    scores = [read_scores(folder, config, dataset) for folder in (out, undisturbed)]
    accuracies = [[score.accuracies for score in each] for each in scores]
    assert read_iteration(out / config.name) == config.distill.iterations
    assert torch.equal(ours.labels, theirs.labels)
    if config.cluster.shards == 1:
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.soft_labels, theirs.soft_labels)
        assert ours.step_size == theirs.step_size
        assert accuracies[0] == accuracies[1]
        return f"{config.name}: same bits, accuracies {accuracies[0]}"
    change = float((ours.images - theirs.images).norm() / (theirs.images - initial.images).norm())
    text = (
        f"{config.name}: images differ by {change:.1e} of their change, accuracies {accuracies[0]} and {accuracies[1]}"
    )
    means = [[sum(score) / len(score) for score in each] for each in accuracies]
    assert means[0] == pytest.approx(means[1], abs=ACCURACY_TOLERANCE), text
    return text


def test_the_journal_counts_the_steps_that_are_made_again(tmp_path: Path) -> None:
    """Steps of a second attempt up to the furthest one before are repeated; of several ranks the first one counts."""
    journal = Journal(tmp_path / "journal")
    line = "{at} {what} {rank} distill:set: {done}\n".format
    first = [line(at=at, what="step", rank=0, done=at) for at in (1, 2, 3)]
    (tmp_path / "journal/7").write_text("".join(first) + "4 st")  # the worker is killed while it writes
    (tmp_path / "journal/8").write_text("".join(line(at=at, what="step", rank=1, done=at) for at in (1, 2, 3)))
    assert journal.repeated() == []
    assert journal.at_work(4.0) == {"distill:set:": {7, 8}}
    second = [line(at=5, what="resumed", rank=0, done=1)]
    second += [line(at=4 + done, what="step", rank=0, done=done) for done in (2, 3, 4)]
    (tmp_path / "journal/9").write_text("".join([*second, line(at=9, what="end", rank=0, done=0)]))
    assert [(each.process, each.done) for each in journal.repeated()] == [(9, 2.0), (9, 3.0)]
    assert counted_steps(journal.repeated()) == "2 iterations"
    assert journal.at_work(9.0) == {}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.skipif(not FAULTS, reason="takes minutes: say DATM_RAY_FAULTS=9, or 30")
@pytest.mark.timeout(1800 + 300 * FAULTS)
def test_faults_at_random_moments_change_nothing(
    tmp_path: Path, s3_server: str, bucket: str, s3_environment: Callable[[str], None]
) -> None:
    """Random faults in workers, nodes, commands and storage change no bit in one shard and repeat no finished work."""
    report = os.environ.get("DATM_RAY_FAULTS_REPORT")

    def write(*more: str) -> None:
        if report:
            Path(report).write_text("\n".join([*lines(soak.faults), *more]) + "\n")

    with serving(s3_server) as proxy:
        s3_environment(proxy.url)
        out = open_location(f"s3://{bucket}/runs")
        soak = Soak(recipes_of, tmp_path, out, proxy, SEED)
        soak.on_fault = lambda fault: write(f"\nlatest: {fault.kind}, {fault.seconds:.1f} s")
        soak.run(drawn(FAULTS, SEED), max(5, FAULTS // 5), 60 * MINUTES)
        assert soak.failures == []
        assert len(soak.faults) == FAULTS or soak.seconds > 60 * MINUTES
        assert "Traceback" not in (tmp_path / "log").read_text()
        began = time.monotonic()
        configs = [config for configs in soak.runs for config in configs]
        folders = [tmp_path / "undisturbed" / config.name for config in configs]
        calls = side_by_side(run_alone, zip(configs, folders, strict=True))
        assert [call.exception() for call in calls] == [None] * len(configs)
        pairs = [(config, open_location(str(folder))) for config, folder in zip(configs, folders, strict=True)]
        found = [compared(config, out, undisturbed) for config, undisturbed in pairs]
        expected = {path: content for _, folder in pairs for path, content in files_of(folder / "experts").items()}
        assert expected
        assert files_of(out / "experts") == expected
    write("", f"{soak.seconds:.0f} s; undisturbed, a process each: {time.monotonic() - began:.0f} s", *found)
    print("\n".join([*lines(soak.faults), *found]))
