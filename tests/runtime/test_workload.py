"""What a recipe computes, sums and stores, against what the code really sums and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datm_ray.config import RunConfig
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork
from datm_ray.errors import ConfigError
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe
from datm_ray.runtime.cost import Described, Traffic, machine_of, parse_cluster
from datm_ray.runtime.distill import _Run
from datm_ray.runtime.executor import SerialExecutor
from datm_ray.runtime.mesh import Alone
from datm_ray.runtime.plan import KNOWN_SHAPES, DataShape, Layout, data_shape, parse_shape
from datm_ray.runtime.speed import product_rate
from datm_ray.runtime.telemetry import Reporter
from datm_ray.runtime.workload import (
    as_it_is,
    described_here,
    plans_of,
    propose,
    show_number,
    storage,
    traffic,
    transform_bytes,
    workload,
)
from datm_ray.store.filesystem import open_location
from tests.conftest import tiny_config

BASE = ("distill.ipc=2", "distill.batch_size=20", "distill.threshold=1e9")
TWO_NETWORKS = "backbones=[{network: {width: 3, depth: 2, norm: group}, weight: 0.5}]"
METADD = (
    "metadd={auxiliaries: [{architecture: lenet}, {width: 2, depth: 1, norm: batch}], variance: 0.01, "
    "invariance: 0.01, experts: {count: 1, epochs: 3, learning_rate: 0.02, augmentation: ''}}"
)
DIGITS = data_shape(get_recipe("digits-ipc1").dataset)


@dataclass(frozen=True)
class CountingMesh(Alone):
    """One worker of a grid that has nobody to sum with, and notes what it would hand over."""

    over_classes: list[int] = field(default_factory=list)
    over_networks: list[int] = field(default_factory=list)

    def sum_over_classes(self, tensor: Tensor) -> Tensor:
        """Notes it."""
        self.over_classes.append(tensor.nbytes)
        return tensor

    def sum_over_backbones(self, tensor: Tensor) -> Tensor:
        """Notes it."""
        self.over_networks.append(tensor.nbytes)
        return tensor

    def counted(self) -> Traffic:
        """What travels: nothing where there is one row or column."""
        classes = self.over_classes if self.columns > 1 else []
        networks = self.over_networks if self.rows > 1 else []
        return Traffic(sum(classes), len(classes), sum(networks), len(networks))


def counted(config: RunConfig, out: Path, rank: int) -> Traffic:
    """What one worker of a mesh hands to sums in its second iteration."""
    rows = len(config.roles)
    pipeline = Pipeline([config], str(out))
    pipeline.train_experts(lambda: SerialExecutor(config.cluster), Reporter(quiet=True))
    mesh = CountingMesh(rank, rows, config.cluster.shards)
    folder = open_location(str(out / f"{rank}"))
    run = _Run(config, pipeline._dataset(config), pipeline.store_uri, folder, mesh, torch.device("cpu"), 1)
    try:
        state = run._resume_or_start()
        run._iterate(state)
        mesh.over_classes.clear()
        mesh.over_networks.clear()
        run._iterate(state)
    finally:
        run.close()
    return mesh.counted()


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("cluster.shards=2",),
        pytest.param(("cluster.shards=3", TWO_NETWORKS), marks=pytest.mark.slow),
        ("cluster.shards=2", TWO_NETWORKS, "cluster.backbones_apart=true"),
        ("cluster.shards=2", METADD),
        pytest.param((METADD, "cluster.auxiliaries_apart=true"), marks=pytest.mark.slow),
        ("cluster.shards=2", METADD, TWO_NETWORKS, "cluster.auxiliaries_apart=true", "cluster.backbones_apart=true"),
    ],
)
def test_traffic_is_what_a_mesh_sums(changes: tuple[str, ...], tmp_path: Path) -> None:
    """To the byte, and as many sums, for the first worker of every row."""
    config = tiny_config(*BASE, *changes)
    for row, role in enumerate(config.roles):
        expected = counted(config, tmp_path, row * config.cluster.shards)
        assert traffic(config, DIGITS, role) == expected
    assert any((config.cluster.shards > 1, len(config.roles) > 1)) == bool(expected.class_sums + expected.network_sums)


def test_the_plan_s_sums_are_those_of_matching() -> None:
    """The bytes that the memory plan tells are the student steps' part of all that is summed."""
    config = tiny_config(*BASE, "cluster.shards=2", "cluster.memory=4GiB")
    (planned,) = plans_of(config, DIGITS, Layout.of(config))
    beside = traffic(config, DIGITS, config.roles[0]).over_classes - planned.network_bytes
    # The loss and how many have one; in float64, the update's length and whether it is finite; whether the set is.
    assert beside == 4 * (2 + 2 * 2 + 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A whole run with MetaDD at 16x16, whitened, wide enough for numbers to outweigh headers."""
    out = tmp_path_factory.mktemp("finished")
    wide = ("network.width=32", "dataset.resize=16", "dataset.normalisation=zca", "distill.ipc=10")
    config = tiny_config(*BASE, METADD.replace("width: 2", "width: 16"), *wide, "distill.iterations=4")
    config = config.model_copy(update={"distill": config.distill.model_copy(update={"ipc": 10})})
    pipeline = Pipeline([config], str(out))
    start: Callable[[], SerialExecutor] = lambda: SerialExecutor(config.cluster)  # noqa: E731
    pipeline.train_experts(start, Reporter(quiet=True))
    pipeline.distill(start, Reporter(quiet=True))
    return config, out


@pytest.mark.slow
def test_storage_is_what_lies_on_disk(finished: tuple[RunConfig, Path]) -> None:
    """Experts with their transforms, the checkpoint, both sets with one; within headers of some kB a file."""
    config, out = finished
    told = storage(config, data_shape(config.dataset))
    for size, *patterns in (
        (told.store, "experts/*"),
        (told.checkpoint, "tiny/checkpoint*"),
        (told.results, "tiny/[is]*.arrow", "transforms/*"),
    ):
        found = [path for pattern in patterns for path in out.glob(pattern)]
        files = {each for path in found for each in (path, *path.rglob("*")) if each.is_file()}
        written = sum(each.stat().st_size for each in files)
        assert size == pytest.approx(written, abs=16_384 * len(files)), patterns
        assert 2 * 16_384 * len(files) < written
    assert told.total == told.store + told.checkpoint + told.results


def test_auxiliaries_have_a_part_of_the_store() -> None:
    """Their epochs beside the last are stored too, as every group's transform is."""
    auxiliary = "metadd={auxiliaries: [{architecture: lenet}], experts: {count: 3, epochs: 9}}"
    alone, more = (storage(tiny_config(*changes), DIGITS).store for changes in ((), (auxiliary,)))
    lenet = FlatNetwork(build_network(NetworkSpec("lenet", 1, (8, 8), 10), seed=0)).count
    assert more - alone == 3 * 3 * 4 * lenet + transform_bytes(tiny_config(), DIGITS)


def test_a_whitening_matrix_is_counted() -> None:
    """At 64x64 it is larger than the sets of few images per class."""
    shape = data_shape(get_recipe("tiny-imagenet-ipc1").dataset)
    assert transform_bytes(get_recipe("tiny-imagenet-ipc1"), shape) == 4 * 12_288 * 12_291


def test_work_follows_the_recipe() -> None:
    """GSAM has two gradients a step, controls try three step sizes, several shards share what each does."""
    sgd, gsam = (
        workload(config, DIGITS, plans_of(config, DIGITS, Layout.of(config)))
        for config in (tiny_config(f"experts.optimiser={name}", "cluster.memory=4GiB") for name in ("sgd", "gsam"))
    )
    assert gsam.experts[0].flop == 2 * sgd.experts[0].flop
    controls, distilled, real = sgd.evaluation
    assert (controls.networks, controls.flop) == (4, 3 * distilled.flop)
    assert (distilled.networks, real.networks) == (2, 2)
    # 6 iterations, validated every third; 3 epochs with ipc 1.
    assert (sgd.validations, sgd.checkpoints, sgd.images) == (2, 3, 10)
    whole = tiny_config("cluster.memory=4GiB", METADD)
    apart = tiny_config("cluster.memory=4GiB", METADD, "cluster.auxiliaries_apart=true")
    rows = [workload(each, DIGITS, plans_of(each, DIGITS, Layout.of(each))).rows for each in (whole, apart)]
    assert len(rows[0]) == 1
    assert len(rows[1]) == 3
    assert [len(row.matched) for row in rows[1]] == [1, 0, 0]
    assert sum(row.looking for row in rows[1]) == pytest.approx(rows[0][0].looking, rel=1e-6)


@pytest.mark.slow
def test_a_layout_is_one_that_fits_and_is_fastest() -> None:
    """Little memory asks for shards; a slow network is not crossed; where there is room, more workers are used."""
    config = get_recipe("tiny-imagenet-ipc50")
    shape = data_shape(config.dataset)

    def proposed(text: str) -> tuple[int, float]:
        described = parse_cluster(text)
        found = propose(config, shape, described, machine_of(described))
        assert found.config.cluster.shards == found.work.shards <= described.count
        assert f"--set cluster.shards={found.work.shards} " in found.settings()
        return found.work.shards, found.estimate.iteration.total

    one, eight, slow = (proposed(f"gpus={count},tflops=20,network={link}") for count, link in
                        ((1, "25Gbps"), (8, "25Gbps"), (8, "10Mbps")))  # fmt: skip
    assert (one[0], eight[0], slow[0]) == (1, 8, 1)
    assert one[1] / 8 < eight[1] < one[1] / 4
    assert proposed("gpus=16,memory=1800MiB,tflops=20,network=10Mbps")[0] == 16  # 10 would do, and 8 do not
    with pytest.raises(ConfigError, match=r"needs .* and may take"):
        proposed("gpus=2,memory=200MiB")


def test_a_layout_sets_auxiliaries_apart_where_that_is_faster() -> None:
    """With as many workers as classes, further ones can only look on."""
    seen = "metadd={auxiliaries: [{width: 5, depth: 2}]}"
    long = ("distill.iterations=5000", "distill.validate_every=5000", "distill.student_steps=1")
    config = tiny_config(seen, "cluster.memory=4GiB", *long)
    work = {}
    for gpus in (1, 2):
        described = parse_cluster(f"gpus={gpus},tflops=0.000001,network=100Gbps")
        work[gpus] = propose(config, DataShape((1, 8, 8), 1, 100), described, machine_of(described))
    assert not work[1].config.cluster.auxiliaries_apart
    assert work[2].config.cluster.auxiliaries_apart
    assert "--set cluster.auxiliaries_apart=true" in work[2].settings()


def test_workers_without_a_description_are_those_asked_for() -> None:
    """Cores of all workers together, and never fewer than one worker takes; GPUs where workers have some."""
    assert described_here(tiny_config("cluster.workers=3", "cluster.threads_per_worker=2")) == Described("core", 6)
    assert described_here(tiny_config("cluster.threads_per_worker=999")).count == 999
    assert described_here(tiny_config()).count == os.cpu_count()
    assert described_here(tiny_config("cluster.workers=4", "cluster.gpus_per_worker=1")) == Described("GPU", 4)


def test_what_is_told_of_a_layout() -> None:
    """All stages, their sum, traffic, storage, and what it rests on."""
    config = tiny_config("cluster.memory=4GiB", "cluster.shards=2")
    described = parse_cluster("cpus=2")
    found = as_it_is(config, DIGITS, Layout.of(config), described, machine_of(described))
    lines = found.lines(suggested=False)
    labels = [line[2:18].strip() for line in lines[: lines.index("  Assumptions:")]]
    assert labels == [
        "an iteration", "a worker sends", "experts", "distillation", "validation", "evaluation", "in all", "storage",
    ]  # fmt: skip
    assert all(line.startswith("  ") for line in lines)
    assert "layout" in "\n".join(replace(found, work=found.work).lines(suggested=True))


@pytest.mark.parametrize(
    "text", ["", "3x64x64", "3x64,200,10", "3x64x64,200", "0x8x8,10,10", "3x64x64,200,1e5", "-1x8x8,2,3"]
)
def test_an_unreadable_shape_is_one_line(text: str) -> None:
    """With how to write it."""
    with pytest.raises(ConfigError, match="Write channels x height x width") as caught:
        parse_shape(text)
    assert len(str(caught.value).splitlines()) == 1


def test_shapes_are_read() -> None:
    """Image, classes, training images."""
    assert parse_shape(" 3x64x64,1000,1281167 ") == DataShape((3, 64, 64), 1000, 1_281_167)


def test_numbers_keep_three_digits() -> None:
    """Or all before the point."""
    assert [show_number(value) for value in (0.00123456, 1.5, 99.96, 12345.6)] == ["0.00123", "1.5", "100", "12,346"]


def test_timing_the_machine_leaves_its_threads_as_they_were() -> None:
    """And gives a rate that a machine can have."""
    before = torch.get_num_threads()
    assert 1e6 < product_rate(repetitions=1, side=64) < 1e15
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.ray
def test_the_benchmark_of_the_plan_predicts_runs_kills_and_goes_on(tmp_path: Path) -> None:
    """With digits and a tiny network: every quantity has both numbers, and the second part continues the first."""
    script = Path(__file__).parents[2] / "benchmarks/bench_plan.py"
    command = [sys.executable, str(script), "--quick", "--before", "3", "--after", "2", "--limit", "120"]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("plan-digits_*.json")
    told = json.loads(written.read_text())
    assert set(told["predicted"]) == set(told["measured"])
    assert all(value > 0 for value in (*told["predicted"].values(), *told["measured"].values()))
    assert told["resumed"]["first after"] > told["resumed"]["iterations before"] >= 3
    assert told["resumed"]["initial set unchanged"]
    assert told["resumed"]["history"] == list(range(len(told["resumed"]["history"])))


@pytest.mark.parametrize(("gpus", "stack"), [(8, None), (13, None), (64, 2), (200, 1)])
def test_experts_stand_in_smaller_stacks_where_gpus_would_be_left_without(gpus: int, stack: int | None) -> None:
    """A hundred experts in stacks of eight would occupy thirteen GPUs of sixty-four."""
    config, shape = get_recipe("cifar10-ipc10"), KNOWN_SHAPES["cifar10"]
    described = parse_cluster(f"gpus={gpus},memory=80GiB,tflops=60")
    proposed = propose(config, shape, described, machine_of(described))
    assert proposed.config.cluster.experts_at_a_time == stack
    assert ("cluster.experts_at_a_time" in proposed.settings()) == (stack is not None)
