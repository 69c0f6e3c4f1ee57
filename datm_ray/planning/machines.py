"""Number, size and speed of the workers on this machine, or on a cluster that the user describes.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from datm_ray.config import RunConfig, parse_bytes
from datm_ray.errors import ConfigError
from datm_ray.runtime.machine.devices import reading_threads, uses_gpu, workers_here

FORWARD_PASSES = {
    "matching": 11.0,
    "embedding": 0.7,
    "recovery": 2.2,
    "experts": 3.2,
    "training": 6.7,
    "real": 6.7,
    "scoring": 2.9,
    "steps": 5.0,
    "reading": 1.0,
}
"""Kind of work -> time to process one image once, as a multiple of its forward pass at the speed of student steps.

"matching", "embedding" and "recovery" are compiled steps of DATM, DM and SRe2L. "experts" is training
networks together in compiled stacks, "training" one by one on a synthetic set, "real" one by one on real data.
"scoring" is computing logits. "steps" is the fixed cost of a step of scored networks, see `STEP_OVERHEAD`; speeds that
`measure` finds include it. "reading" is reading a streamed image, see `READING_OPERATIONS`. All but "steps" and
"reading" were measured on one core with 32x32 images: "recovery" with a ResNet-18 of half the published width, the
others with a ConvNet of depth 3 and width 128."""
COMPILING = {"matching": 1.7, "experts": 0.8, "embedding": 0.8, "recovery": 0.4}
"""Kind of step -> CPU seconds to compile it in a new process, per torch function of the network's forward pass.

Measured by `measure.measured` for digits-ipc1, with an empty compiler cache, on an idle core of an EPYC with AVX-512.
An older, busy core took up to three times as long. "embedding" and "recovery" are for the networks of
`FORWARD_PASSES`."""
READING_OPERATIONS = 3.5e8
"""Operations of student steps that take as long as reading one streamed image: 2.3 ms on a core with the speed in
`SPEED`. There, `benchmarks/bench_reading.py` took 1.6 to 2.0 ms to decode and resize a JPEG file of 500x375 pixels and
79 KB, and 0.2 ms to normalise it. Files of other sizes take other times."""
READERS = 8
"""Number of threads in which a GPU's worker reads streamed images, if `--cluster` describes the machines. Assumed:
nodes in clouds have 6 to 24 CPUs for each GPU."""
SPEED = {"core": 150e9, "GPU": 7e12}
"""FLOP/s of student steps on one core and on one GPU, used to choose a layout if no speed is given. The GPU's value is
assumed: a tenth of an H200's float32 peak."""
BANDWIDTH = {"core": 0.75e9, "GPU": 25e9 / 8}
"""Bytes per second that a worker sends while tensors are summed over workers. Measured between two processes of one
machine: 0.7 to 1.0 GB/s. Assumed for GPUs: 25 Gbps."""
LATENCY = {"core": 0.003, "GPU": 0.0002}
"""Seconds of one round of messages while tensors are summed over workers. A message alone takes 0.16 ms between two
processes of one machine, but two workers there take 0.7 to 4.6 ms more CPU time for each sum (benchmarks/LOG.md,
2026-11-29). Assumed for GPUs."""


@dataclass(frozen=True)
class Machine:
    """Workers of one kind on a machine or cluster: number, size and speed."""

    device: str
    """Device of a worker: "core" or "GPU"."""
    workers: int
    """Number of workers that run at the same time."""
    cores: int
    """Number of cores of one worker."""
    seconds: Mapping[str, float]
    """Kind of work -> one worker's seconds to process one image once, per FLOP of the image's forward pass."""
    compiling: Mapping[str, float]
    """Kind of work -> one worker's seconds to compile its steps, per torch function of the network's forward pass."""
    bandwidth: float
    """Bytes per second that one worker sends while tensors are summed over workers."""
    memory: int | None = None
    """Bytes that one worker may take: of GPU memory on a GPU, else of main memory; `None` if unknown."""
    basis: str = ""
    """Source of `seconds`, in words; "" for an assumed speed, which serves to compare layouts and gives no times."""
    network: str = ""
    """Assumed speed and latency of a described cluster's network, in words; "" if the user gives the speed."""

    @classmethod
    def of(cls, device: str, workers: int, cores: int = 1, speed: float = 0.0, readers: int = READERS) -> Machine:
        """Make a machine whose workers are alike, from the speed of one core or GPU.

        Args:
            device: device of a worker, "core" or "GPU".
            workers: number of workers that run at the same time.
            cores: number of cores of one worker; 1 on GPUs.
            speed: FLOP/s of student steps on one core or one GPU; 0 to assume `SPEED`.
            readers: number of threads in which a GPU's worker reads streamed images. A core's worker has `cores`.
        """
        unit = cores * (speed or SPEED[device])
        seconds = {kind: passes / unit for kind, passes in FORWARD_PASSES.items()}
        if device == "GPU":  # CPUs read for it
            seconds["reading"] = FORWARD_PASSES["reading"] / (readers * SPEED["core"])
        return cls(device, workers, cores, seconds, COMPILING, BANDWIDTH[device], basis="as given" if speed else "")

    def sum_seconds(self, size: float, sums: int, members: int) -> float:
        """Estimated seconds in which `members` workers sum tensors over all of them; 0 for one worker.

        Args:
            size: bytes of one worker's tensors in all sums together.
            sums: number of sums. Each costs some rounds of messages.
            members: number of workers that take part in a sum.
        """
        if members == 1:
            return 0.0
        rounds = sums * math.ceil(math.log2(members))
        return 2 * (members - 1) / members * size / self.bandwidth + rounds * LATENCY[self.device]


def machine_here(config: RunConfig) -> Machine:
    """This machine, with assumed speeds, to plan for if the user describes no cluster.

    It has `cluster.workers` workers, or else one for each GPU here, or as many as the CPUs allow. If GPUs are asked for
    and none is here, it has as many workers as make one set.
    """
    cluster = config.cluster
    if uses_gpu(cluster):
        workers = cluster.workers or torch.cuda.device_count() or config.workers_per_set
        return Machine.of("GPU", workers, readers=reading_threads(cluster))
    return Machine.of("core", workers_here(cluster), cluster.threads_per_worker)


_COUNT, _SPEED = "a whole number from 1 to 999999", "a number above 0"
KEYS: dict[str, tuple[dict[str, float], str]] = {
    "gpus": ({"": 1.0}, _COUNT),
    "cpus": ({"": 1.0}, _COUNT),
    "memory": ({}, "a size of at least 1MiB with its unit, such as 80GiB"),
    "tflops": ({"": 1e12}, _SPEED),
    "gflops": ({"": 1e9}, _SPEED),
    "network": ({"kbps": 125.0, "mbps": 125e3, "gbps": 125e6, "tbps": 125e9}, "a speed with its unit, such as 25Gbps"),
}
"""Key of a cluster's description -> (units of its values -> factors, what a value must be in words). Factors convert
to a count, FLOP/s or bytes per second. Values of "memory" have the units of `parse_bytes`."""


def parse_cluster(text: str, threads: int = 1) -> Machine:
    """Read the description of a cluster, such as `gpus=64,memory=80GiB,tflops=10,network=25Gbps`.

    Args:
        text: description. Its memory is that of one GPU, or of all cores together. Its tflops or gflops are the speed
            of student steps on one GPU or core, not the peak. Its network is the speed at which one GPU or core sends.
        threads: number of cores of one worker, for a cluster without GPUs.

    Raises:
        ConfigError: the text cannot be read, or the cluster has fewer cores than one worker takes.
    """
    parts = (part.partition("=") for part in text.split(","))
    entries = [(key.strip(), value.strip()) for key, _, value in parts]
    if fault := next(_faults(entries), ""):
        example = "gpus=64,memory=80GiB,tflops=10,network=25Gbps or cpus=2,memory=24GiB,gflops=140"
        raise ConfigError(f"--cluster {text!r}: {fault}", remedy=f"write it like {example}")
    given = {key: _value(key, value) for key, value in entries}
    device, cores, count = ("GPU", 1, given["gpus"]) if "gpus" in given else ("core", threads, given["cpus"])
    if count < cores:
        raise ConfigError(
            f"a worker takes {threads} cores, and the cluster has {count:.0f}",
            remedy="lower cluster.threads_per_worker, or describe a larger cluster",
        )
    machine = Machine.of(device, int(count) // cores, cores, given.get("tflops") or given.get("gflops") or 0.0)
    memory = int(given.get("memory", 0) / (1 if device == "GPU" else machine.workers)) or None
    if "network" in given:
        return replace(machine, memory=memory, bandwidth=given["network"])
    words = f"network assumed: {8e-9 * machine.bandwidth:g} Gbps, {1e3 * LATENCY[device]:g} ms"
    return replace(machine, memory=memory, network=words)


def _faults(entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield the faults of a cluster's description in words: of each entry (key, value), then of all together."""
    keys = [key for key, _ in entries]
    for place, (key, value) in enumerate(entries):
        if key not in KEYS:
            yield f"{f'it has no key {key!r}' if key else 'an entry has no key'}; the keys are {', '.join(KEYS)}"
        elif key in keys[:place]:
            yield f"{key} is given twice"
        elif not _value(key, value):
            yield f"{key} is {value!r}, and must be {KEYS[key][1]}"
    for one, other in (("gpus", "cpus"), ("tflops", "gflops")):
        if {one, other} <= {*keys}:
            yield f"it has both {one} and {other}; give one of them"
    if not {"gpus", "cpus"} & {*keys}:
        yield "it has neither gpus nor cpus; give one of them"


def _value(key: str, text: str) -> float:
    """Number that the text `text` of a key means: a count, bytes, FLOP/s or bytes per second; 0 if it is invalid."""
    if key == "memory":
        with suppress(ConfigError):
            return float(size) if 2**20 <= (size := parse_bytes(text)) < 2**60 else 0.0
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([a-z]*)", text.lower(), re.ASCII)
    number = float(match[1]) if match else 0.0
    if key in ("gpus", "cpus") and (number % 1 or number >= 10**6):
        return 0.0
    return number * KEYS[key][0].get(match[2], 0.0) if match else 0.0
