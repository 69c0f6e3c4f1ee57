"""The model of time: what must hold for any machine, and clusters in the user's words."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from datm_ray.errors import ConfigError
from datm_ray.runtime.cost import (
    BANDWIDTH,
    CORE_PRODUCT,
    GPU_PEAK,
    MATCHING_OF_PRODUCT,
    Described,
    Machine,
    Matched,
    Row,
    Traffic,
    Training,
    Workload,
    assumptions,
    candidate_shards,
    checkpoint_bytes,
    estimate,
    iteration_seconds,
    machine_of,
    makespan,
    parse_cluster,
    slowest_calls,
    sum_seconds,
)

GIB = 2**30
GPUS = Machine("GPU", workers=64, rate=60e12, bandwidth=3e9)


def work_of(shards: int = 1, **changes: object) -> Workload:
    """Tiny-ImageNet at IPC 50, about."""
    base = Workload(
        experts=(Training("100 convnet", 100, 1e15, "experts", 8),),
        evaluation=(Training("controls", 10, 4e16), Training("distilled", 5, 1.3e16)),
        iterations=10_000,
        steps=20,
        batch=10_000,
        images=10_000,
        held=-(-200 // shards) * 50,
        row_bytes=50_000,
        rows=(Row((Matched(4e9, chunk=25),)),),
        traffic=Traffic(4 * 20 * (2 * 857_160 + 1) if shards > 1 else 0, 41 if shards > 1 else 0),
        shards=shards,
        choosing=4e14,
        validations=20,
        validation_flop=6e15,
        scoring_flop=1e12,
        checkpoints=100,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_twice_the_shards_halve_the_compute() -> None:
    """Where every minibatch is the whole set, so that no shard gets more than its part."""
    one, two, four = (iteration_seconds(work_of(shards), GPUS).compute for shards in (1, 2, 4))
    assert two == pytest.approx(one / 2)
    assert four == pytest.approx(one / 4)


def test_more_shards_are_never_slower_unless_the_network_is() -> None:
    """Without a cost of sums more help always; over a slow network there is a number that is best."""
    fast = dataclasses.replace(GPUS, bandwidth=1e18, latency=0.0)
    slow = dataclasses.replace(GPUS, bandwidth=1e8, latency=0.01)
    numbers = (1, 2, 4, 8, 20, 40, 100, 200)
    times = [iteration_seconds(work_of(shards, batch=1000), fast).total for shards in numbers]
    assert all(later < earlier for earlier, later in itertools.pairwise(times))
    times = [iteration_seconds(work_of(shards, batch=1000), slow).total for shards in numbers]
    assert min(times) < times[-1]
    assert iteration_seconds(work_of(200), slow).sums > iteration_seconds(work_of(200), slow).compute


def test_a_sum_costs_what_travels_and_its_rounds() -> None:
    """Of two members each sends all, of many nearly twice as much; alone nothing is sent."""
    machine = Machine("core", 2, 1e9, bandwidth=1e6, latency=0.5)
    assert sum_seconds(3_000_000, 2, 1, machine) == 0
    assert sum_seconds(3_000_000, 2, 2, machine) == pytest.approx(3 + 2 * 0.5)
    assert sum_seconds(3_000_000, 2, 4, machine) == pytest.approx(1.5 * 3 + 2 * 2 * 0.5)


@pytest.mark.parametrize(
    ("batch", "shards", "chunk"), [(20, 2, 5), (200, 2, 5), (100, 4, 10), (1000, 8, 64), (3, 2, 1)]
)
def test_the_slowest_shard_is_that_of_drawn_minibatches(batch: int, shards: int, chunk: int) -> None:
    """Against 2,000 draws: micro-batches of the shard that has most, a micro-batch being computed whole."""
    images = 1000 * shards
    draw = np.random.default_rng(0)
    most = [
        max(-(-count // chunk) for count in np.bincount(draw.permutation(images)[:batch] // 1000, minlength=shards))
        for _ in range(2000)
    ]
    assert slowest_calls(batch, 1000, shards, chunk) == pytest.approx(np.mean(most), rel=0.02)


def test_one_shard_or_a_whole_batch_leave_nothing_to_chance() -> None:
    """Then the number of micro-batches is known."""
    assert slowest_calls(100, 1000, 1, 30) == 4
    assert slowest_calls(1000, 250, 4, 25) == 10


def test_rows_work_at_the_same_time() -> None:
    """The row that takes longest decides, first of looking and then of matching."""
    row = Row((Matched(4e9, 25),))
    one = iteration_seconds(work_of(), GPUS).compute
    assert iteration_seconds(work_of(rows=(row, row)), GPUS).compute == one
    assert iteration_seconds(work_of(rows=(Row((*row.matched, *row.matched)),)), GPUS).compute == pytest.approx(2 * one)
    looking = Row(row.matched, looking=1e13)
    more = iteration_seconds(work_of(rows=(looking,)), GPUS).compute - one
    assert more == pytest.approx(GPUS.seconds(1e13, "training"))
    elsewhere = iteration_seconds(work_of(rows=(row, Row((), looking=1e13))), GPUS).compute - one
    assert elsewhere == pytest.approx(more)  # the others wait for what is seen there


def test_hours_are_those_of_the_stages() -> None:
    """They add up; a set's workers are held while it is distilled and validated."""
    told = estimate(work_of(8), GPUS)
    assert told.total_hours == pytest.approx(sum(told.hours.values()))
    assert told.total_wall == pytest.approx(sum(told.wall.values()))
    assert told.hours["distillation"] == pytest.approx(8 * told.wall["distillation"])
    assert told.hours["validation"] == pytest.approx(8 * told.wall["validation"])
    assert told.hours["experts"] == pytest.approx(100 * GPUS.seconds(1e15, "experts") / 3600)
    iterations = 10_000 * told.iteration.total + 100 * told.checkpoint + told.start
    assert told.wall["distillation"] == pytest.approx(iterations / 3600)
    threads = estimate(work_of(8), dataclasses.replace(GPUS, device="core", cores=4))
    assert threads.hours["experts"] == pytest.approx(4 * told.hours["experts"])


def test_tasks_are_given_out_longest_first() -> None:
    """A stack of experts is one task, so more workers than stacks do not help."""
    assert makespan([3, 3, 2, 2, 2], 2) == 7
    assert makespan([], 3) == 0
    told = [estimate(work_of(), dataclasses.replace(GPUS, workers=workers)).wall["experts"] for workers in (1, 13, 64)]
    assert told[0] == pytest.approx(100 * GPUS.seconds(1e15, "experts") / 3600)
    assert told[1] == told[2] == pytest.approx(8 * GPUS.seconds(1e15, "experts") / 3600)


def test_a_checkpoint_grows_with_the_chosen_set() -> None:
    """Set and momentum, and from the first validation on the chosen set; labels of 8 bytes beside each set."""
    assert checkpoint_bytes(10, 100, chosen=False) == 10 * (200 + 8)
    assert checkpoint_bytes(10, 100, chosen=True) == 10 * (300 + 16)


def test_candidates_divide_by_two_and_end_with_all() -> None:
    """As many shards as there are workers or classes, whichever is less."""
    assert candidate_shards(64, 200) == [1, 2, 4, 8, 16, 32, 64]
    assert candidate_shards(6, 10) == [1, 2, 4, 6]
    assert candidate_shards(64, 10) == [1, 2, 4, 8, 10]
    assert candidate_shards(0, 10) == []


def test_clusters_are_read() -> None:
    """All keys, in any order, with spaces or without."""
    assert parse_cluster("gpus=64,memory=80GiB,tflops=60,network=25Gbps") == Described(
        "GPU", 64, 80 * GIB, 60e12, 3.125e9
    )
    assert parse_cluster(" network = 10 gbps , cpus = 2, gflops=137.5") == Described("core", 2, None, 137.5e9, 1.25e9)
    assert parse_cluster("gpus=1") == Described("GPU", 1)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "'' is not one of gpus=, cpus="),
        ("64", "'64' is not one of"),
        ("gpus", "'gpus' is not one of"),
        ("memory=80GiB", "it needs gpus= or cpus="),
        ("gpus=1,cpus=2", "it needs gpus= or cpus=, and not both"),
        ("gpus=1,gpus=2", "gpus is there twice"),
        ("gpus=0", "gpus is '0'"),
        ("gpus=-1", "gpus is '-1'"),
        ("gpus=1.5", "gpus is '1.5'"),
        ("gpus=¹", "gpus is '¹'"),
        ("gpus=1,", "'' is not one of"),
        ("gpus=1,speed=3", "'speed=3' is not one of"),
        ("gpus=1,tflops=fast", "tflops is 'fast'"),
        ("gpus=1,tflops=0", "tflops is '0'"),
        ("gpus=1,tflops=nan", "tflops is 'nan'"),
        ("gpus=1,tflops=1,gflops=1", "it has tflops= and gflops="),
        ("gpus=1,memory=much", "memory is 'much'"),
        ("gpus=1,network=25", "network is '25'"),
        ("gpus=1,network=25GiB", "network is '25GiB'"),
        ("gpus=" + "9" * 400, "gpus is '999"),
        ("gpus=999999999", "gpus is '999999999'"),
        ("gpus=1,memory=8", "memory is '8'"),
    ],
)
def test_an_unreadable_cluster_is_one_line(text: str, fact: str) -> None:
    """What is wrong, and how to write it."""
    with pytest.raises(ConfigError) as caught:
        parse_cluster(text)
    assert str(caught.value).startswith(f"--cluster {text!r}: ")
    assert fact in caught.value.fact
    assert "gpus=64,memory=80GiB,tflops=60,network=25Gbps" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_not_said_is_assumed_and_told() -> None:
    """Speed and network of a machine, with where they come from."""
    gpus = machine_of(parse_cluster("gpus=8"), precision="bfloat16")
    assert (gpus.workers, gpus.rate, gpus.bandwidth) == (8, 79e12, BANDWIDTH["GPU"])
    told = "\n".join(assumptions(gpus, work_of(2), parse_cluster("gpus=8")))
    assert "not measured on any GPU" in told
    assert "3.12 GB/s in a sum (assumed)" in told
    given = parse_cluster("gpus=8,tflops=60,network=8Gbps,memory=80GiB")
    told = "\n".join(assumptions(machine_of(given), work_of(2), given))
    assert "60 TFLOP/s a worker (as given), 80.00 GiB a worker as given" in told
    assert "1 GB/s in a sum (as given)" in told


def test_only_student_steps_run_in_the_recipe_s_precision() -> None:
    """Experts, training and scoring take as long in every one, whether a speed is assumed or given."""
    assert GPU_PEAK == {"bfloat16": 790e12, "tf32": 395e12, "float32": 67e12}
    for text, float32 in (("gpus=8", 6.7e12), ("gpus=8,tflops=60", 60e12)):
        for precision, times in (("float32", 1.0), ("tf32", 395 / 67), ("bfloat16", 790 / 67)):
            gpus = machine_of(parse_cluster(text), precision=precision)
            plain = gpus.rate / times
            assert gpus.seconds(1e15) == pytest.approx(1e15 / gpus.rate), (text, precision)
            for kind, share in (("experts", 1.15), ("training", 0.54), ("scoring", 0.42)):
                assert gpus.seconds(1e15, kind) == pytest.approx(1e15 / (share * plain)), (text, precision, kind)
            if text == "gpus=8":
                assert plain == pytest.approx(float32), precision
            else:
                assert gpus.rate == float32, precision
    hours = {each: estimate(work_of(), machine_of(parse_cluster("gpus=8"), precision=each)).hours for each in GPU_PEAK}
    for stage in ("experts", "evaluation", "validation"):
        assert hours["bfloat16"][stage] == pytest.approx(hours["float32"][stage]), stage
    told = "\n".join(
        assumptions(machine_of(parse_cluster("gpus=8"), precision="tf32"), work_of(), parse_cluster("gpus=8"))
    )
    assert "1.15, 0.54, 0.42 of 6.7 TFLOP/s, their float32 rate" in told
    cores = machine_of(parse_cluster("cpus=2,gflops=140"))
    assert cores.seconds(1e12, "experts") == pytest.approx(1e12 / (1.15 * 140e9))


def test_cores_are_shared_out_to_workers() -> None:
    """With their memory; a worker of two threads is twice as fast as a core."""
    two = machine_of(parse_cluster("cpus=9,memory=24GiB"), threads=2)
    assert (two.workers, two.memory, two.cores) == (4, 6 * GIB, 2)
    assert two.rate == pytest.approx(2 * MATCHING_OF_PRODUCT * CORE_PRODUCT)
    assert machine_of(parse_cluster("cpus=9"), product=1e9).rate == pytest.approx(MATCHING_OF_PRODUCT * 1e9)
    with pytest.raises(ConfigError, match="a worker takes 4 cores, and the cluster has 2"):
        machine_of(parse_cluster("cpus=2"), threads=4)
