"""Tests planned times, layouts and storage, descriptions of clusters, and an estimate against a real run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datm_ray.config import NetworkConfig, override
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.networks.registry import build_network
from datm_ray.core.training.loop import STEP_OVERHEAD
from datm_ray.errors import ConfigError
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.planning.duration import Proposal
from datm_ray.planning.machines import BANDWIDTH, LATENCY, READING_OPERATIONS, machine_here, parse_cluster
from datm_ray.planning.measure import compiled_gain, measured
from datm_ray.planning.memory import scoring_memory
from datm_ray.planning.plan import plan_run, propose
from datm_ray.planning.work import WorkPart
from datm_ray.recipes import get_recipe
from datm_ray.runtime.executor import SerialExecutor
from datm_ray.shape import KNOWN_SHAPES, DataShape, network_cost
from datm_ray.stages.distill.task import read_cost
from datm_ray.stages.methods.distribution import SLOW_READING
from datm_ray.stages.methods.memory import plans_of
from datm_ray.store.files.filesystem import open_location
from tests.conftest import tiny_config

GIB = 2**30
DIGITS = KNOWN_SHAPES["digits"]
METADD = "metadd={auxiliaries: [{architecture: lenet}], experts: {count: 3, epochs: 9}}"


def proposal(*changes: str, machine: str = "cpus=2,gflops=140") -> Proposal:
    """Plan of the tiny recipe on a machine."""
    config = tiny_config("cluster.memory=64GiB", *changes)
    return Proposal(config, DIGITS, plans_of(config, DIGITS), parse_cluster(machine))


def test_clusters_are_read() -> None:
    """A cluster is read with all keys in any order; a worker of two threads has two cores and their memory."""
    given = parse_cluster("gpus=64,memory=80GiB,tflops=60,network=25Gbps")
    assert (given.device, given.workers, given.memory, given.bandwidth) == ("GPU", 64, 80 * GIB, 3.125e9)
    assert given.basis == "as given"
    assert given.seconds["matching"] == pytest.approx(11 / 60e12)
    given = parse_cluster(" network = 10 gbps , cpus = 9, memory=24GiB", threads=2)
    assert (given.device, given.workers, given.cores, given.memory) == ("core", 4, 2, 6 * GIB)
    assert given.bandwidth == 1.25e9
    unknown = parse_cluster("gpus=1")
    assert (unknown.memory, unknown.bandwidth, unknown.basis) == (None, BANDWIDTH["GPU"], "")
    with pytest.raises(ConfigError, match="a worker takes 4 cores, and the cluster has 2"):
        parse_cluster("cpus=2", threads=4)


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        (("", "gpus=1,", "=1"), "an entry has no key; the keys are gpus, cpus, memory, tflops, gflops, network"),
        (("64", "gpus=1,64"), "it has no key '64'; the keys are gpus"),
        (("gpus=1,speed=3",), "it has no key 'speed'; the keys are gpus"),
        (("gpus=0",), "gpus is '0', and must be a whole number from 1 to 999999"),
        (("cpus=2,gpus=0",), "gpus is '0', and must be a whole number"),
        (("gpus", "gpus=-1", "gpus=1.5", "gpus=¹", "gpus=" + "9" * 400), "and must be a whole number from 1 to 999999"),
        (("gpus=1,tflops=fast", "gpus=1,tflops=0", "gpus=1,tflops=nan"), "and must be a number above 0"),
        (("gpus=1,memory=8",), "memory is '8', and must be a size of at least 1MiB with its unit, such as 80GiB"),
        (("gpus=1,memory=much", "gpus=1,memory=1kB"), "and must be a size of at least 1MiB"),
        (("gpus=1,network=25", "gpus=1,network=25GiB"), "and must be a speed with its unit, such as 25Gbps"),
        (("memory=80GiB",), "it has neither gpus nor cpus"),
        (("gpus=1,cpus=2",), "it has both gpus and cpus"),
        (("gpus=1,gpus=2",), "gpus is given twice"),
        (("gpus=1,tflops=1,gflops=1",), "it has both tflops and gflops"),
    ],
)
def test_an_unreadable_cluster_is_one_line(texts: tuple[str, ...], fault: str) -> None:
    """An unreadable cluster is one line of error that names the one fault, and how to write a cluster."""
    for text in texts:
        with pytest.raises(ConfigError) as caught:
            parse_cluster(text)
        assert str(caught.value).startswith(f"--cluster {text!r}: "), text
        assert fault in caught.value.fact, text
        assert "gpus=64,memory=80GiB,tflops=10,network=25Gbps" in str(caught.value), text
        assert len(str(caught.value).splitlines()) == 1, text


def test_workers_without_a_description_are_those_asked_for() -> None:
    """Undescribed workers are as many as requested, at least one, with GPUs where workers have some."""
    asked = machine_here(tiny_config("cluster.workers=3", "cluster.threads_per_worker=2"))
    assert (asked.device, asked.workers, asked.cores) == ("core", 3, 2)
    assert machine_here(tiny_config("cluster.threads_per_worker=999")).workers == 1
    assert machine_here(tiny_config()).workers == os.cpu_count()
    gpus = machine_here(tiny_config("cluster.workers=4", "cluster.gpus_per_worker=1"))
    assert (gpus.device, gpus.workers, gpus.basis) == ("GPU", 4, "")


def test_a_machine_is_measured_only_where_it_tells_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine is measured only if no speed is given and it has what the workers compute on."""
    monkeypatch.setattr("datm_ray.planning.plan.measured", lambda found, **_: replace(found.machine, basis="timed"))
    config = tiny_config("cluster.memory=64GiB")
    assert plan_run(config, "cpus=2", measure=True).machine.basis == "timed"
    for cluster, fact in (("cpus=2,gflops=140", "the speed is given"), ("gpus=2", "it has no GPU")):
        with pytest.raises(ConfigError, match=f"--measure times steps on this machine, and {fact}"):
            plan_run(config, cluster, measure=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert plan_run(config, "gpus=2", measure=True).machine.basis == "timed"


def test_seconds_are_those_of_the_steps_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are those of timed steps, for each image; quick ones assume a gain by compiling, if that is on."""
    monkeypatch.setattr("datm_ray.planning.measure._seconds", lambda *_, **__: (3.0, 2.0))
    found = proposal(machine="cpus=1")
    exact = measured(found)
    assert exact.basis == "measured here"
    assert exact.seconds["training"] == pytest.approx(2 / (10 * FORWARD))  # a step on the set: ten images
    assert exact.seconds["real"] == pytest.approx(2 / (128 * FORWARD))
    assert measured(found, quickly=True).seconds == exact.seconds  # neither compiles, and no step is large
    quick = measured(proposal("cluster.compile=true", machine="cpus=1"), quickly=True)
    for kind in ("matching", "experts"):
        assert quick.seconds[kind] == exact.seconds[kind] / compiled_gain(kind, found.config.network.width)
    assert quick.seconds["training"] == exact.seconds["training"]


MEASURED = {
    "matching": ((128, 1.75), (128, 1.92), (64, 1.94), (32, 3.13), (32, 3.35)),
    "experts": ((128, 1.15), (128, 1.21), (32, 1.90), (32, 1.88)),  # 2.65 at width 64 does not fit
}
"""Kind of step -> widths and gains measured on one core (benchmarks/LOG.md, 2026-11-29)."""


@pytest.mark.parametrize("kind", MEASURED)
def test_wide_networks_gain_less_by_compiling(kind: str) -> None:
    """The assumed gain by compiling is within 18 % of nine of the ten measured gains."""
    for width, gain in MEASURED[kind]:
        assert compiled_gain(kind, width) == pytest.approx(gain, rel=0.18), width


def test_planning_leaves_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that times steps, with the threads of a worker, leaves torch's threads of the caller as they were."""
    monkeypatch.setattr("datm_ray.planning.measure._seconds", lambda *_, **__: (3.0, 2.0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert plan_run(tiny_config("cluster.memory=64GiB")).machine.basis.startswith("timed here in small")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_times_follow_the_recipe() -> None:
    """Twice the iterations take twice the time, GSAM costs two gradients, and no worker waits for validations."""
    base, longer, gsam, shared = (
        proposal(*changes).stages
        for changes in ((), ("distill.iterations=12",), ("experts.optimiser=gsam",), ("cluster.shards=2",))
    )
    passes = 3 * 10  # steps of ten images, eleven forward passes each
    seconds = 6 * passes * 11 * FORWARD / 140e9  # the speed that is given
    assert longer["distillation"][0] - base["distillation"][0] == pytest.approx(seconds / 3600)
    assert gsam["experts"][0] == pytest.approx(2 * base["experts"][0])
    assert shared["validation"] == pytest.approx(base["validation"])  # two validations, at once on two workers
    assert proposal(machine="cpus=2,gflops=70").stages["experts"][0] == pytest.approx(2 * base["experts"][0])
    order = "first_share: 0.5, whole_from: 5, removals: [], scoring_networks: 2, scoring_epochs: 3"
    easy = proposal(f"experts.curriculum={{{order}}}")
    scored = easy.seconds([WorkPart("scoring", easy.config, 2 * DIGITS.trained(easy.config.dataset) * FORWARD)]) / 3600
    trained = (0.7 + 3 / 5) * base["experts"][0]  # five epochs of two experts, three of two scoring networks
    assert easy.stages["experts"][0] == pytest.approx(trained + scored)
    assert easy.storage["store"] > proposal().storage["store"]
    with_meta = proposal(METADD)
    assert with_meta.iteration[0] > proposal().iteration[0]
    assert with_meta.stages["experts"][0] > base["experts"][0]


def test_everything_that_takes_time_is_counted() -> None:
    """Compiling in every worker, first images, starting workers and each kind of row are part of the planned time."""
    compiled, base = proposal("cluster.compile=true"), proposal()
    more = {name: compiled.stages[name][0] - base.stages[name][0] for name in base.stages}
    step = {kind: compiled.compiling(kind, compiled.config) / 3600 for kind in ("experts", "matching")}
    assert more == pytest.approx({"start": 0, "experts": step["experts"], "distillation": step["matching"],
                                  "validation": 0, "evaluation": 0})  # fmt: skip
    chosen, random = (proposal(f"distill.initial={name}").stages["distillation"][0] for name in ("correct", "random"))
    assert chosen > random
    assert base.stages["start"][0] > base.stages["start"][1] / 2 > 0
    rows = [proposal(*changes).stages["evaluation"] for changes in ((), ("evaluate.real_epochs=101",))]
    epochs, images = 2 * 3 * 100, DIGITS.trained(base.config.dataset)  # epochs of all seeds and step sizes
    steps = WorkPart("steps", base.config, epochs * -(-images // 128) * STEP_OVERHEAD)
    real = base.seconds([WorkPart("real", base.config, epochs * images * FORWARD), steps])
    assert rows[1][0] - rows[0][0] == pytest.approx(real / 3600)
    held, clock = proposal("evaluate.real_epochs=999", "evaluate.seeds=1").stages["evaluation"]
    assert clock > 0.9 * held  # the longest network decides what is waited for
    for more_rows in ("evaluate.fair=true", "evaluate.networks=[lenet]", "evaluate.optimiser=adamw"):
        assert proposal(more_rows).stages["evaluation"][0] > rows[0][0], more_rows
    alone, together = (
        proposal("evaluate.real_epochs=999", f"cluster.compile={compiles}", machine="cpus=2,gflops=1")
        for compiles in ("false", "true")  # networks on all real data are trained together where steps are compiled
    )
    assert together.stages["evaluation"][0] < 0.6 * alone.stages["evaluation"][0]
    free = replace(together, machine=replace(together.machine, compiling={}))
    more_seconds = 3600 * (together.stages["evaluation"][0] - free.stages["evaluation"][0])
    assert more_seconds == pytest.approx(2 * together.compiling("experts", together.config))  # a seed for each worker


def test_reading_images_from_their_files_is_counted() -> None:
    """Streamed images take time wherever they are read: in sequence on a core, beside the computing on a GPU."""
    base = proposal()
    for machine, cores in (("cpus=2,gflops=150", 1), ("gpus=1,tflops=0.001", 8), ("gpus=1,tflops=900", 8)):
        held, read = (
            replace(proposal(machine=machine), shape=replace(DIGITS, is_streamed=streamed))
            for streamed in (False, True)
        )
        for stage, count in (
            ("experts", 2 * 5 * DIGITS.trained(base.config.dataset)),
            ("validation", DIGITS.training_images - DIGITS.trained(base.config.dataset)),
        ):
            (computing, *_), (both, *_) = (each.tasks[stage] for each in (held, read))
            seconds, reading = held.seconds(computing), count * READING_OPERATIONS / 150e9 / cores
            joined = seconds + reading if machine.startswith("cpus") else max(seconds, reading)
            assert read.seconds(both) == pytest.approx(joined)
        assert "images from their files" in str(read)
        assert "images from their files" not in str(held)
        images = {
            stage: sum(part.operations for task in read.tasks[stage] for part in task if part.kind == "reading")
            / READING_OPERATIONS
            for stage in ("distillation", "evaluation")
        }
        settings, trained = base.config.evaluate, DIGITS.trained(base.config.dataset)
        assert images["distillation"] >= 2 * base.config.distill.ipc * DIGITS.classes  # candidates for the first set
        assert images["evaluation"] > settings.seeds * (settings.real_epochs * trained + 4 * DIGITS.test_images)  # rows


def test_a_method_that_reads_images_in_every_iteration_is_planned_so() -> None:
    """DM reads its real images in every iteration, and a plan says what helps."""
    changes = ("method=dm", "distill.real_batch=20", "distill.initial=noise", "experts.count=1")
    config = tiny_config("cluster.memory=64GiB", *changes)
    shape = replace(DIGITS, is_streamed=True)
    found = Proposal(config, shape, plans_of(config, shape), parse_cluster("gpus=1,tflops=900"))
    (task,) = found.tasks["distillation"]
    read = sum(operations for kind, _, operations in task if kind == "reading") / READING_OPERATIONS
    assert read == pytest.approx(config.distill.iterations * 10 * 20)
    assert f"200 in every iteration of a worker: {SLOW_READING}" in str(found)


FORWARD = network_cost(tiny_config().resolved((8, 8)), DIGITS).flop


def test_test_images_pass_the_network_of_their_row() -> None:
    """Networks of a row on another architecture are tested, not the backbone."""
    tasks = proposal("evaluate.networks=[lenet]").tasks["evaluation"]
    networks = [{own.network.architecture for _, own, _ in task} for task in tasks]
    assert {"lenet"} in networks
    assert all(len(each) == 1 for each in networks)


@pytest.mark.parametrize("cluster", ["cpus=2,memory=24GiB,gflops=100", "gpus=2,memory=80GiB,tflops=20"])
@pytest.mark.parametrize("own", [(), ("cluster.gpus_per_worker=1",), ("cluster.gpus_per_worker=0",)])
def test_the_options_of_a_layout_give_the_layout(cluster: str, own: tuple[str, ...]) -> None:
    """The recipe with the options that a plan prints has the planned layout, whatever the recipe had before."""
    config = override(get_recipe("digits-ipc1"), own)
    plan = plan_run(config, cluster, "1x8x8,10,1500")
    copied = override(config, re.findall(r"--set (\S+?)[: ]", plan._layout)).cluster
    for name in ("shards", "gpus_per_worker", "experts_at_a_time", "memory"):
        assert getattr(copied, name) == getattr(plan.config.cluster, name)


def test_advice_for_too_few_workers_names_the_keys_that_are_set() -> None:
    """A recipe with networks on workers of their own, for which a cluster is too small, names the key to unset."""
    config = override(get_recipe("digits16-metadd-ipc1"), ["cluster.auxiliaries_apart=true"])
    with pytest.raises(ConfigError, match=r"Use --set cluster\.auxiliaries_apart=false, or") as raised:
        plan_run(config, "cpus=1,memory=24GiB,gflops=100", "1x16x16,10,1500")
    assert "backbones_apart" not in str(raised.value)


def test_a_single_network_and_epoch_are_singular() -> None:
    """A plan says "1 network" and "1 epoch"."""
    one = ("experts.count=1", "experts.epochs=1", "evaluate.epochs=1", "evaluate.seeds=1")
    lines = "\n".join(proposal("method=select", "select.by=el2n", *one).lines())
    assert "1 convnet, 1 epoch\n" in lines
    assert "1 network a row, 1 epoch\n" in lines


def test_a_teacher_takes_time_and_memory() -> None:
    """A taught row takes the teacher's forward passes besides, and its worker memory for the teacher."""
    alone, taught = (
        proposal("evaluate.learning_rate=0.1", f"evaluate.labels={labels}") for labels in ("own", "teacher")
    )
    assert taught.stages["evaluation"][0] > alone.stages["evaluation"][0]
    assert taught.stages["experts"] == alone.stages["experts"]
    own, more = (scoring_memory(each.config, each.shape, 10, has_teacher=each is taught) for each in (alone, taught))
    assert more > own
    longer = proposal("evaluate.learning_rate=0.1", "evaluate.epochs=5000")
    assert longer.stages["evaluation"][0] > alone.stages["evaluation"][0]
    assert longer.stages["validation"] == alone.stages["validation"]


def test_more_shards_are_faster_unless_the_network_is_slow() -> None:
    """Shards share the work of whole-set batches; sums cost their bytes and their rounds."""
    whole = ("distill.batch_size=10", "cluster.memory=64GiB")
    alone, ten = (proposal(*whole, f"cluster.shards={shards}") for shards in (1, 10))
    assert alone.iteration[0] == pytest.approx(10 * ten.iteration[0])
    assert alone.iteration[1] == 0
    machine = replace(parse_cluster("cpus=4"), bandwidth=1e6)
    assert machine.sum_seconds(3_000_000, 2, 1) == 0
    assert machine.sum_seconds(3_000_000, 0, 2) == pytest.approx(3)
    assert machine.sum_seconds(3_000_000, 2, 4) == pytest.approx(1.5 * 3 + 2 * 2 * LATENCY["core"])


def test_a_layout_is_one_that_fits_and_is_fastest() -> None:
    """The layout is the fastest that fits: shards for little memory, one machine for a slow network."""
    config, shape = get_recipe("tiny-imagenet-ipc50"), KNOWN_SHAPES["tiny-imagenet"]

    def proposed(text: str) -> Proposal:
        found = propose(config, shape, parse_cluster(text))
        assert f"--set cluster.shards={found.config.cluster.shards} " in str(found)
        return found

    alone = proposed("gpus=1,tflops=20,network=25Gbps")
    eight = proposed("gpus=8,tflops=20,network=25Gbps")
    slow = proposed("gpus=8,tflops=20,network=10Mbps")
    assert [each.config.cluster.shards for each in (alone, eight, slow)] == [1, 8, 1]
    assert sum(alone.iteration) / 8 < sum(eight.iteration) < sum(alone.iteration) / 4
    assert proposed("gpus=16,memory=2500MiB,tflops=20,network=10Mbps").config.cluster.shards in (8, 16)
    with pytest.raises(ConfigError, match=r"needs .* and may take"):
        proposed("gpus=2,memory=200MiB")
    apart = tiny_config("backbones=[{network: {width: 3, depth: 2}}]", "cluster.backbones_apart=true")
    with pytest.raises(ConfigError, match="tiny needs 2 workers at the same time, and the cluster has 1"):
        propose(apart, DIGITS, parse_cluster("gpus=1"))


def test_experts_stand_in_smaller_stacks_where_gpus_would_be_left_without() -> None:
    """A GPU trains as many of a hundred experts as it would in a run, whose stacks are smaller on more GPUs."""
    for gpus, longest in ((1, 100), (8, 13), (13, 8), (64, 2), (200, 1)):
        found = propose(get_recipe("cifar10-ipc10"), KNOWN_SHAPES["cifar10"], parse_cluster(f"gpus={gpus},tflops=60"))
        held, clock = found.stages["experts"]
        compiling = found.compiling("experts", found.config) / 3600
        one = (held - min(gpus, 100 if gpus == 200 else 64 if gpus == 64 else 13) * compiling) / 100
        assert clock == pytest.approx(longest * one + compiling), gpus
        assert "cluster.experts_at_a_time" not in str(found)


def test_hours_of_gpus_are_planned_only_with_a_speed() -> None:
    """Without a measured speed the plan of GPUs has numbers of steps and no hours."""
    config, shape = get_recipe("cifar10-ipc10").resolved((32, 32)), KNOWN_SHAPES["cifar10"]
    unknown, given = (
        "\n".join(propose(config, shape, parse_cluster(text)).lines())
        for text in ("gpus=8,memory=80GiB", "gpus=8,memory=80GiB,tflops=60")
    )
    assert "10,000 iterations of 80 student steps of 100 of 100 images" in unknown
    assert "GPU time         unknown: not measured. Give the speed as tflops=" in unknown
    assert "about" not in unknown.splitlines()[0]
    assert "on the clock" not in unknown
    assert "; as given" in given
    assert "on the clock" in given
    assert len(given.splitlines()) <= 10


def test_a_plan_says_what_it_assumes_of_a_described_cluster() -> None:
    """Speed and network that the description lacks are named beside what rests on them, and no others."""
    config, shape = get_recipe("cifar10-ipc10").resolved((32, 32)), KNOWN_SHAPES["cifar10"]
    network = "; network assumed: 25 Gbps, 0.2 ms"
    for more, of_time, of_layout in (
        ("", "use --measure where it is", f"distil, for an assumed 7 TFLOP/s{network}"),
        (",tflops=10", f"; as given{network}", "distil"),
        (",network=25Gbps", "use --measure where it is", "distil, for an assumed 7 TFLOP/s"),
        (",tflops=10,network=25Gbps", "; as given", "distil"),
    ):
        lines = propose(config, shape, parse_cluster(f"gpus=8,memory=80GiB{more}")).lines()
        time, layout = (next(line for line in lines if name in line) for name in ("GPU time", "layout"))
        assert time.endswith(of_time), more
        assert layout.partition("; not followed")[0].endswith(of_layout), more
    assert parse_cluster("cpus=2").network == "network assumed: 6 Gbps, 3 ms"


@pytest.mark.slow
def test_a_measured_estimate_is_within_twice_a_real_run(tmp_path: Path) -> None:
    """The estimate in CPU seconds is within a factor of two of a tiny, uncompiled distillation."""
    longer = ("network.width=32", "distill.ipc=10", "distill.batch_size=50", "distill.student_steps=10")
    more = ("distill.iterations=10", "distill.validate_every=10", "cluster.compile=false", "cluster.workers=1")
    config = tiny_config(*longer, *more, "distill.threshold=1e9")
    found = Proposal(config, DIGITS, plans_of(config, DIGITS), machine_here(config))
    found = replace(found, machine=measured(found))
    hours = found.stages["distillation"][0] + found.stages["validation"][0]
    pipeline = Pipeline([config], str(tmp_path), alone=True)
    start: Callable[[], SerialExecutor] = lambda: SerialExecutor(config.cluster)  # noqa: E731
    pipeline.train_experts(start, Reporter(quiet=True))
    pipeline.distill(start, Reporter(quiet=True))
    spent = read_cost(open_location(str(tmp_path)) / "tiny").cpu_seconds
    print(f"estimated {3600 * hours:.2f}, spent {spent:.2f} CPU seconds")
    assert spent / 2 < 3600 * hours < 2 * spent


@pytest.mark.slow
def test_storage_is_what_lies_on_disk(tmp_path: Path) -> None:
    """Planned storage of experts and their transforms equals the disk's to some kB a file; a set takes no more."""
    wide = ("network.width=32", "dataset.resize=16", "dataset.normalisation=zca", "distill.ipc=10")
    config = tiny_config(METADD, *wide, "distill.iterations=4", "distill.threshold=1e9", "distill.average_decay=0.9")
    pipeline = Pipeline([config], str(tmp_path))
    start: Callable[[], SerialExecutor] = lambda: SerialExecutor(config.cluster)  # noqa: E731
    pipeline.train_experts(start, Reporter(quiet=True))
    pipeline.distill(start, Reporter(quiet=True))
    shape = DataShape((1, 16, 16), 10, 1438)
    planned = Proposal(config, shape, plans_of(config, shape), machine_here(config)).storage

    def written(*patterns: str) -> tuple[int, int]:
        """Bytes and number of the files that lie at some paths."""
        found = [path for pattern in patterns for path in tmp_path.glob(pattern)]
        files = {each for path in found for each in (path, *path.rglob("*")) if each.is_file()}
        return sum(each.stat().st_size for each in files), len(files)

    size, files = written("experts/*")
    assert planned["store"] == pytest.approx(size, abs=16_384 * files)
    assert 2 * 16_384 * files < size
    size, _ = written("tiny/checkpoint*", "tiny/[is]*.arrow", "transforms/*")
    assert size < planned["set"] < 2 * size


def test_auxiliaries_and_whitening_have_their_part_of_the_store() -> None:
    """Planned storage counts an auxiliary's first epochs and last, and a whitening row for every value."""
    alone, more = (proposal(*changes).storage["store"] for changes in ((), (METADD,)))
    lenet = FlatNetwork(build_network(NetworkConfig(architecture="lenet").for_images(1, (8, 8), 10), seed=0)).count
    assert more - alone == 3 * 3 * 4 * lenet + 8
    whitened = propose(get_recipe("tiny-imagenet-ipc1"), KNOWN_SHAPES["tiny-imagenet"], parse_cluster("gpus=1"))
    assert whitened.storage["set"] > 4 * 12_288 * 12_291
