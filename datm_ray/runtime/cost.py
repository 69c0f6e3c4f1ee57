"""How long a run takes and what it sends, from what it computes and from a machine described in a few numbers.

Pure functions of plain numbers: nothing is built, started or measured here. What a recipe computes is counted in
`workload.py`; memory is `plan.py`'s. The model of one matching iteration:

    seconds = looking + matching      of the row of workers that takes longest, and in it of the shard that has most
              + sums          bytes on the wire / bandwidth + latency * rounds, for every sum
              + update        bytes of the shard's part of the set / UPDATE_RATE

Everything that is not counted is a named constant below, with where it was measured; what was not is called assumed.
Checked against runs of another shape than the one it was calibrated on: benchmarks/bench_plan.py. Tests:
tests/runtime/test_cost.py.
"""

from __future__ import annotations

import functools
import heapq
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from datm_ray.config import parse_bytes
from datm_ray.errors import ConfigError
from datm_ray.store.trajectories import size_in_words

Device = Literal["core", "GPU"]

CORE_PRODUCT = 102e9
"""FLOP/s of a float32 matrix product of side 2048 on one core, the others busy with the same. Measured: 2 cores of AMD
EPYC without AVX-512, 100 and 104 GFLOP/s; `plan --measure` takes this machine's own."""

MATCHING_OF_PRODUCT = 1.35
"""Of that rate, what compiled student steps reach. Operations are counted in the graph for processors, with Winograd's
filtering in it, which GPUs do without: at this shape there are 17 % more then. Measured at CIFAR-10's shape (ConvNet-3
of width 128, 32x32, batch 100 in calls of 20, augmented), a process on each of two cores: 138 GFLOP/s."""

RELATIVE = {"matching": 1.0, "experts": 1.15, "training": 0.54, "scoring": 0.42}
"""Rates of other work against student steps'. Measured as `MATCHING_OF_PRODUCT`: experts' compiled steps (batch 256)
158 GFLOP/s, uncompiled training for validation and evaluation (batch 128) 74, scoring (250 images at a time) 57. On
GPUs assumed to be the same."""

CALL_SECONDS = 0.0005
"""Of a micro-batch's two calls beside their operations. Measured with networks too small to count: 0.52 ms. On GPUs
assumed."""

UPDATE_RATE: dict[Device, float] = {"core": 340e6, "GPU": 100e9}
"""Bytes of images and soft labels that are updated in a second: checked, moved, momentum included. Measured on one
core: 340 MB/s for sets of 49 and 98 MB. On GPUs assumed: a fiftieth of what their memory is said to move."""

WRITE_RATE = 370e6
"""Bytes of a checkpoint that one worker writes in a second, its checksums included. Measured: 273 to 602 MB/s, median
373, two workers writing to one local disk at a time. Elsewhere assumed."""

GPU_PEAK = {"bfloat16": 790e12, "tf32": 395e12, "float32": 67e12}
"""FLOP/s of large products on an H200: the first measured elsewhere, the second half of it, the third as its maker
states."""
GPU_SHARE = 0.1
"""Of the peak, what student steps are assumed to reach on a GPU where no speed is given; not measured."""

BANDWIDTH: dict[Device, float] = {"core": 0.75e9, "GPU": 25e9 / 8}
"""Bytes a second that a worker sends while others sum with it. Measured between two processes on one machine (gloo):
320,010 floats in 1.25 ms, 857,160 in 4.7 ms, so 1.0 and 0.7 GB/s. Of GPUs without `network=` assumed: 25 Gbps."""
LATENCY = 0.0002
"""Seconds of a round of a sum. Measured between two processes on one machine: 0.16 ms. Elsewhere assumed."""

EXAMPLE = "gpus=64,memory=80GiB,tflops=60,network=25Gbps or cpus=2,memory=24GiB,gflops=140"


@dataclass(frozen=True)
class Machine:
    """Workers of one kind."""

    device: Device
    workers: int
    """At work at a time."""
    rate: float
    """FLOP/s that one worker's student steps reach."""
    memory: int | None = None
    """Bytes that one worker may take; none where it is not known."""
    bandwidth: float = 0.0
    """Bytes a second that one worker sends in a sum."""
    latency: float = LATENCY
    """Seconds of a round of a sum."""
    origin: str = ""
    """Where the rate comes from, in words."""
    cores: int = 1
    """Of one worker, where it has no GPU."""
    float32_rate: float | None = None
    """FLOP/s that one worker's student steps would reach in float32, in which all other work runs; None for `rate`."""

    @property
    def hours(self) -> str:
        """What hours of its workers are called."""
        return "GPU-hours" if self.device == "GPU" else "CPU-hours"

    def seconds(self, flop: float, kind: str = "matching") -> float:
        """That one worker takes for so many operations of a kind, in the precision that the kind runs in."""
        rate = self.rate if kind == "matching" else self.float32_rate or self.rate
        return flop / (rate * RELATIVE[kind])


@dataclass(frozen=True)
class Matched:
    """One network that a worker matches."""

    flop: float
    """Of one image in one student step, forward and reverse."""
    chunk: int
    """Images of a micro-batch."""


@dataclass(frozen=True)
class Row:
    """A row of workers: what each of its shards computes in an iteration."""

    matched: tuple[Matched, ...]
    looking: float = 0.0
    """FLOP of MetaDD, over all shards."""


@dataclass(frozen=True)
class Traffic:
    """What one worker hands to sums in one iteration; what travels is a little more, see `sum_seconds`."""

    over_classes: int = 0
    """Bytes summed with the other shards."""
    class_sums: int = 0
    over_networks: int = 0
    """Bytes summed with the workers that hold the same rows for other networks."""
    network_sums: int = 0

    def sent(self, shards: int, rows: int) -> float:
        """Bytes that one worker puts on the wire."""
        return _on_the_wire(self.over_classes, shards) + _on_the_wire(self.over_networks, rows)


@dataclass(frozen=True)
class Training:
    """Networks that are trained alike, each a task or in stacks."""

    name: str
    networks: int
    flop: float
    """Of one network."""
    kind: str = "training"
    """Key of `RELATIVE`."""
    at_a_time: int = 1
    """Networks of one task."""


@dataclass(frozen=True)
class Workload:
    """What a recipe computes, for one layout of its distillation."""

    experts: tuple[Training, ...]
    evaluation: tuple[Training, ...]
    iterations: int
    steps: int
    batch: int
    """Images of a student step over all shards."""
    images: int
    """Of the set."""
    held: int
    """Images of the largest shard."""
    row_bytes: int
    """Of one image and its soft label."""
    rows: tuple[Row, ...]
    traffic: Traffic
    """Of the worker that sums most."""
    shards: int
    choosing: float
    """FLOP of choosing the first images and labelling them, over all shards."""
    validations: int
    validation_flop: float
    """Of training the networks of one validation; the first worker does it."""
    scoring_flop: float
    """Of scoring them."""
    checkpoints: int

    @property
    def workers(self) -> int:
        """That distil the set together."""
        return self.shards * len(self.rows)


@dataclass(frozen=True)
class IterationTime:
    """Seconds of one matching iteration, by part."""

    compute: float
    sums: float
    update: float

    @property
    def total(self) -> float:
        """All parts, one after the other."""
        return self.compute + self.sums + self.update


STAGES = ("experts", "distillation", "validation", "evaluation")


@dataclass(frozen=True)
class Estimate:
    """What a recipe takes on a machine."""

    iteration: IterationTime
    start: float
    """Seconds until the first iteration, without starting processes and compiling."""
    checkpoint: float
    """Seconds of one checkpoint."""
    hours: Mapping[str, float]
    """Of GPUs or cores, by stage: those of a set are held while the first of them validates."""
    wall: Mapping[str, float]
    """Hours on the clock, by stage."""

    @property
    def total_hours(self) -> float:
        """Of GPUs or cores."""
        return sum(self.hours.values())

    @property
    def total_wall(self) -> float:
        """Hours on the clock, one stage after the other."""
        return sum(self.wall.values())


@functools.lru_cache(maxsize=256)
def slowest_calls(batch: int, held: int, shards: int, chunk: int) -> float:
    """Micro-batches that the slowest shard has of a minibatch, on average.

    A minibatch is drawn without regard to shards, so their parts are uneven and all wait for the largest; and a
    micro-batch is computed whole, however many images it has.

    Args:
        held: images of every shard; of the largest, where they differ.
    """
    fair = -(-batch // shards)
    if shards == 1 or batch >= held * shards:
        return math.ceil(fair / chunk)
    expected, calls = 0.0, 0
    while True:  # the mean of a count is the sum over n of the chance that it exceeds n
        more = 1 - _chance_of_no_more(calls * chunk, batch, held, shards) if calls * chunk >= fair else 1.0
        if more < 1e-6:
            return expected
        expected, calls = expected + more, calls + 1


def _chance_of_no_more(most: int, batch: int, held: int, shards: int) -> float:
    """That of a minibatch drawn from all shards none has more than so many images."""
    images = held * shards
    share, most = batch / images, min(most, batch, held)
    each = np.exp([_log_chance(count, held, share) for count in range(most + 1)])
    together, power = np.ones(1), shards
    while power:  # the shards' sum, by squaring; what exceeds the batch is of no interest
        if power & 1:
            together = np.convolve(together, each)[: batch + 1]
        each, power = np.convolve(each, each)[: batch + 1], power >> 1
    return float(together[batch] / math.exp(_log_chance(batch, images, share))) if len(together) > batch else 0.0


def _log_chance(count: int, held: int, share: float) -> float:
    """Of so many of the images held, each taken with that chance."""
    ways = math.lgamma(held + 1) - math.lgamma(count + 1) - math.lgamma(held - count + 1)
    return ways + count * math.log(share) + (held - count) * math.log1p(-share)


def iteration_seconds(work: Workload, machine: Machine) -> IterationTime:
    """Of one matching iteration."""
    # Nobody has looked before all have, for each needs what the others see; then each matches by itself.
    compute = max(machine.seconds(row.looking / work.shards, "training") for row in work.rows)
    compute += max(sum(_matching_seconds(work, each, machine) for each in row.matched) for row in work.rows)
    sums = sum_seconds(work.traffic.over_classes, work.traffic.class_sums, work.shards, machine)
    sums += sum_seconds(work.traffic.over_networks, work.traffic.network_sums, len(work.rows), machine)
    return IterationTime(compute, sums, work.held * work.row_bytes / UPDATE_RATE[machine.device])


def _matching_seconds(work: Workload, matched: Matched, machine: Machine) -> float:
    calls = slowest_calls(work.batch, work.held, work.shards, matched.chunk)
    return work.steps * calls * (machine.seconds(matched.chunk * matched.flop) + CALL_SECONDS)


def sum_seconds(size: int, sums: int, members: int, machine: Machine) -> float:
    """Of so many sums of so many bytes together: a member sends 2 (m - 1) / m of them, in log2(m) rounds at least."""
    if members == 1 or not sums:
        return 0.0
    return _on_the_wire(size, members) / machine.bandwidth + sums * machine.latency * math.ceil(math.log2(members))


def estimate(work: Workload, machine: Machine) -> Estimate:
    """Hours of workers and on the clock, stage by stage."""
    iteration = iteration_seconds(work, machine)
    checkpoint = checkpoint_bytes(work.held, work.row_bytes, chosen=True) / WRITE_RATE
    start = machine.seconds(work.choosing / work.shards, "scoring")
    validation = work.validations * (
        machine.seconds(work.validation_flop, "training") + machine.seconds(work.scoring_flop, "scoring")
    )
    distillation = start + work.iterations * iteration.total + work.checkpoints * checkpoint
    wall = {
        "experts": makespan(_tasks(work.experts, machine), machine.workers),
        "distillation": distillation,
        "validation": validation,
        "evaluation": makespan(_tasks(work.evaluation, machine), machine.workers),
    }
    hours = {
        "experts": sum(_tasks(work.experts, machine)),
        "distillation": distillation * work.workers,
        "validation": validation * work.workers,
        "evaluation": sum(_tasks(work.evaluation, machine)),
    }
    return Estimate(
        iteration,
        start,
        checkpoint,
        {name: machine.cores * seconds / 3600 for name, seconds in hours.items()},
        {name: seconds / 3600 for name, seconds in wall.items()},
    )


def checkpoint_bytes(images: int, row_bytes: int, *, chosen: bool) -> int:
    """Of a checkpoint with so many images: the set and its momentum; from the first validation on, the chosen set."""
    return images * (row_bytes * (3 if chosen else 2) + 8 * (2 if chosen else 1))


def makespan(seconds: Iterable[float], workers: int) -> float:
    """On the clock, for tasks that are given out longest first, each to the worker that is free first."""
    busy = [0.0] * workers
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(busy, busy[0] + each)
    return max(busy)


def candidate_shards(workers: int, classes: int) -> list[int]:
    """Numbers of shards worth a look: powers of two, as many as there are workers, and one class each."""
    most = min(workers, classes)
    return sorted({2**power for power in range(most.bit_length())} | {most} if most else set())


# --- machines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """A cluster in the user's words; what was not said is none."""

    device: Device
    count: int
    memory: int | None = None
    """Of each GPU; of all cores of one machine together."""
    flops: float | None = None
    bandwidth: float | None = None
    """Bytes a second."""


_AMOUNT = re.compile(r"\d+(\.\d+)?")
_LINK = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])bps", re.IGNORECASE)


def parse_cluster(text: str) -> Described:
    """A cluster such as `gpus=64,memory=80GiB,tflops=60,network=25Gbps` or `cpus=2,memory=24GiB,gflops=140`.

    memory is that of a GPU, or of all cores together; tflops or gflops is the speed of student steps on one GPU or
    core, not its peak; network is what one GPU or core can send.

    Raises:
        ConfigError: it cannot be read; what is wrong, in one line.
    """
    values: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or name not in _READERS:
            raise _unreadable(text, f"{part.strip()!r} is not one of {', '.join(f'{each}=' for each in _READERS)}")
        if name in values:
            raise _unreadable(text, f"{name} is there twice")
        values[name] = value
    counts, speeds = [name for name in ("gpus", "cpus") if name in values], {"tflops", "gflops"} & set(values)
    if len(counts) != 1:
        raise _unreadable(text, "it needs gpus= or cpus=, and not both")
    if len(speeds) > 1:
        raise _unreadable(text, "it has tflops= and gflops=")
    read = {name: _read(text, name, value) for name, value in values.items()}
    flops = [read[name] for name in speeds]
    return Described(
        device="GPU" if counts[0] == "gpus" else "core",
        count=int(read[counts[0]]),
        memory=int(read["memory"]) if "memory" in read else None,
        flops=flops[0] if flops else None,
        bandwidth=read.get("network"),
    )


def machine_of(
    described: Described, *, precision: str = "float32", threads: int = 1, product: float | None = None
) -> Machine:
    """Workers of a described cluster.

    Args:
        precision: of the recipe's student steps, on GPUs; experts, training and scoring always run in float32.
        threads: cores of a worker, where there are no GPUs.
        product: FLOP/s of a matrix product on one core of this machine, where it was measured.

    Raises:
        ConfigError: fewer cores than one worker takes.
    """
    bandwidth = described.bandwidth or BANDWIDTH[described.device]
    if described.device == "GPU":
        rate = described.flops or GPU_SHARE * GPU_PEAK[precision]
        assumed = f"assumed, {GPU_SHARE:.0%} of an H200's peak in {precision}; not measured on any GPU"
        origin = "as given" if described.flops else assumed
        float32_rate = rate * GPU_PEAK["float32"] / GPU_PEAK[precision]
        return Machine(
            "GPU", described.count, rate, described.memory, bandwidth, LATENCY, origin, float32_rate=float32_rate
        )
    workers = described.count // threads
    if not workers:
        raise ConfigError(
            f"a worker takes {threads} cores, and the cluster has {described.count}",
            remedy="lower cluster.threads_per_worker, or describe a larger cluster",
        )
    core = described.flops or MATCHING_OF_PRODUCT * (product or CORE_PRODUCT)
    origin = "as given" if described.flops else "measured here now" if product else "measured on 2 cores, AMD EPYC"
    memory = described.memory // workers if described.memory else None
    return Machine("core", workers, threads * core, memory, bandwidth, LATENCY, origin, threads)


def assumptions(machine: Machine, work: Workload, described: Described) -> list[str]:
    """What an estimate rests on, a line each."""
    link = "as given" if described.bandwidth else "measured on one machine" if machine.device == "core" else "assumed"
    memory = "" if machine.memory is None else f", {size_in_words(machine.memory)} a worker as given"
    base = "that"
    if machine.float32_rate not in (None, machine.rate):
        base = f"{machine.float32_rate / 1e12:,.3g} TFLOP/s, their float32 rate by the ratio of an H200's peaks"
    lines = [
        f"student steps run at {machine.rate / 1e12:,.3g} TFLOP/s a worker ({machine.origin}){memory}",
        "experts, training and scoring run at "
        + ", ".join(f"{RELATIVE[each]:g}" for each in ("experts", "training", "scoring"))
        + f" of {base}"
        + (" (measured at 32x32 on cores, on GPUs assumed)" if machine.device == "GPU" else " (measured at 32x32)"),
        f"a worker sends {machine.bandwidth / 1e9:,.3g} GB/s in a sum ({link}), and a round takes "
        f"{1000 * machine.latency:g} ms; no sum overlaps with computing",
        "an expert takes as long alone as in a stack",
        "these are rates of 128 channels; narrow networks on small images, as for digits, reach a third of them",
        "an expert gets half of the images right from which the first are chosen; the stages follow each other",
        f"no iteration is skipped, nothing is lost to faults, and compiling and starting workers take no time; "
        f"a checkpoint is written at {WRITE_RATE / 1e6:,.0f} MB/s a worker",
    ]
    if work.shards > 1:
        lines.append("every sum crosses the network, also between workers of one machine")
    return lines


def _tasks(trainings: Iterable[Training], machine: Machine) -> list[float]:
    """Seconds of every task; the last stack may be smaller."""
    found = []
    for each in trainings:
        one = machine.seconds(each.flop, each.kind)
        whole, rest = divmod(each.networks, each.at_a_time)
        found += [one * each.at_a_time] * whole + ([one * rest] if rest else [])
    return found


def _on_the_wire(size: float, members: int) -> float:
    return 2 * (members - 1) / members * size


def _unreadable(text: str, fact: str) -> ConfigError:
    return ConfigError(f"--cluster {text!r}: {fact}", remedy=f"write it like {EXAMPLE}")


def _count(value: str) -> float:
    return float(value) if value.isascii() and value.isdecimal() else 0.0


def _amount(unit: float) -> Callable[[str], float]:
    return lambda value: unit * float(value) if _AMOUNT.fullmatch(value) else 0.0


def _link(value: str) -> float:
    match = _LINK.fullmatch(value)
    return float(match[1]) * 1000.0 ** (" KMGT".index(match[2].upper())) / 8 if match else 0.0


def _memory(value: str) -> float:
    try:
        return float(parse_bytes(value))
    except ConfigError:
        return 0.0


_READERS: dict[str, Callable[[str], float]] = {
    "gpus": _count,
    "cpus": _count,
    "memory": _memory,
    "tflops": _amount(1e12),
    "gflops": _amount(1e9),
    "network": _link,
}
"""Of each key; 0 for what cannot be read."""


def _read(text: str, name: str, value: str) -> float:
    number = _READERS[name](value)
    lowest, highest = _BOUNDS.get(name, (0.0, 1e18))
    if not (lowest < number < highest):
        raise _unreadable(text, f"{name} is {value!r}")
    return number


_BOUNDS = {"gpus": (0.0, 1e5), "cpus": (0.0, 1e6), "memory": (2.0**20, 1e18)}
"""Between which a value makes sense; a memory of 8 is one whose unit was forgotten."""
