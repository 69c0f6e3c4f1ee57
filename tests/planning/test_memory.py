"""Tests the plan of memory: what fits is accepted, and what does not is refused with the option that helps."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datm_ray.config import ClusterConfig, DatasetConfig, PriorConfig, Role, RunConfig, override
from datm_ray.core.metadd import Evidence, MetaDD
from datm_ray.core.networks.registry import build_network
from datm_ray.core.steps import result_of
from datm_ray.core.training.loop import Schedule
from datm_ray.data.splits import Stream, stratified_split
from datm_ray.errors import ConfigError, DatasetError, GpuMemoryError, WorkerLostError
from datm_ray.memory import available_memory
from datm_ray.methods.trajectory import matching
from datm_ray.planning.memory import (
    ALONE_MAPS,
    GPU_PROCESS_BYTES,
    PHOTO_BYTES,
    STREAM_BYTES,
    distilling_memory,
    experts_memory,
    labelling_memory,
    prior_memory,
    scoring_memory,
)
from datm_ray.recipes import get_recipe, recipe_names
from datm_ray.runtime.machine.devices import MOST_READERS
from datm_ray.runtime.mesh import ALONE
from datm_ray.shape import KNOWN_SHAPES, DataShape, data_shape, network_cost, parse_shape
from datm_ray.stages import labels
from datm_ray.stages.distill.metadd import MetaNetworks
from datm_ray.stages.labels import planned_labels, records_bytes
from datm_ray.stages.methods.memory import (
    MARGIN,
    META_IMAGES,
    PROCESS_BYTES,
    DistillationPlan,
    chunk_by_trial,
    crowded_gpus_lose,
    laid_out,
    meta_plan_of_part,
    plans_of,
    worker_budget,
)
from datm_ray.stages.methods.registry import teacher_of
from datm_ray.stages.methods.trajectory import rows_at_a_time
from tests.conftest import tiny_config

GIB, MIB = 2**30, 2**20


def plan_of(config: RunConfig) -> DistillationPlan:
    """The plan of a recipe's first network, whose data's shape is known, or that of ImageNet-1K."""
    shape = IMAGENET if config.dataset.source == "folder" else data_shape(config.dataset)
    return plans_of(config.resolved(shape.image[1:]), shape)[0]


IMAGENET = DataShape((3, 224, 224), 1000, 1_281_167, is_streamed=True)
READABLE = {"8GiB": 8 * GIB, "512MiB": 2**29, "6 GB": 6 * 10**9, "1.5gib": 3 * GIB // 2, " 2 G ": 2 * 10**9,
            "100kB": 100_000, "4096": 4096, "4096B": 4096, "8PiB": 2**53}  # fmt: skip


def test_sizes_are_read() -> None:
    """Sizes are read in binary and decimal units or plain bytes."""
    assert {text: ClusterConfig(memory=text).memory_bytes for text in READABLE} == READABLE


def test_an_unreadable_size_is_one_line() -> None:
    """An unreadable size is one line of error with how to write one."""
    for text in ("", "much", "8 apples", "-1GiB", "8GiBs", "0", "1e9", "GiB", "8 Gi"):
        with pytest.raises(ConfigError, match="8GiB or 512MiB") as caught:
            override(get_recipe("digits-ipc1"), [f"cluster.memory='{text}'"])
        assert len(str(caught.value).splitlines()) == 1, text


def test_bytes_as_a_number_in_yaml_are_a_size() -> None:
    """--set cluster.memory=8589934592 needs no quotes, and none stays None."""
    assert override(get_recipe("digits-ipc1"), ["cluster.memory=8589934592"]).cluster.memory_bytes == 8 * GIB
    assert ClusterConfig().memory_bytes is None


def test_every_packaged_recipe_fits_a_machine_of_24_gib() -> None:
    """Every packaged recipe fits two workers in 24 GiB, the large sets in two shards."""
    for name in recipe_names():
        plan = plan_of(override(get_recipe(name), ["cluster.memory=11GiB", "cluster.shards=2", "cluster.device=cpu"]))
        assert plan.total <= 11 * GIB, name
        assert 1 <= plan.chunk <= plan.demand.at_once, name


@pytest.mark.parametrize(
    ("recipe", "changes", "measured"),
    [
        ("digits-ipc1", (), 952),
        ("digits-ipc10", (), 966),
        ("digits-ipc30", (), 980),
        ("digits16-metadd-ipc1", (), 962),
        ("cifar10-ipc10", ("network={width: 32, depth: 3}", "distill.batch_size=50"), 1239),
        ("tiny-imagenet-ipc50", ("cluster.shards=2", "distill.student_steps=20", "distill.batch_size=20"), 2661),
    ],
)
def test_the_estimate_is_never_below_what_was_measured(recipe: str, changes: tuple[str, ...], measured: int) -> None:
    """The estimate is between once and twice the measured peak MiB of a worker, from benchmarks/results."""
    plan = plan_of(override(get_recipe(recipe), ["cluster.memory=64GiB", "cluster.device=cpu", *changes]))
    assert measured <= plan.total / MIB <= 2 * measured


@pytest.mark.parametrize(
    ("size", "images", "compiled", "measured"),
    [(32, 20, True, 82), (32, 100, True, 402), (64, 5, True, 82), (32, 20, False, 328), (64, 5, False, 362)],
)
def test_a_step_takes_about_what_was_measured(size: int, images: int, compiled: bool, measured: int) -> None:
    """A step's estimate is near the measured peak MiB of ConvNet of width 128 (benchmarks/LOG.md, 2026-11-21)."""
    recipe = "cifar10-ipc10" if size == 32 else "tiny-imagenet-ipc10"
    plan = plan_of(override(get_recipe(recipe), ["cluster.memory=64GiB", f"cluster.compile={str(compiled).lower()}"]))
    estimated = images * plan.parts["call"] / plan.chunk / MIB
    assert measured <= MARGIN * estimated <= 1.7 * measured


def test_parts_are_counted() -> None:
    """Parts equal a count by hand: five copies of ten images, T + 1 vectors, ten vectors, then validation."""
    alone = plan_of(tiny_config("cluster.memory=4GiB"))
    shared = plan_of(tiny_config("cluster.memory=4GiB", "cluster.shards=2"))
    p, row = alone.parts["trace"] // (4 * (3 + 1)), 4 * (64 + 10)
    assert (alone.parts["synthetic"], alone.parts["network"]) == (5 * 10 * row, 4 * 10 * p)
    assert shared.parts["synthetic"] * 2 == alone.parts["synthetic"]
    assert shared.parts["validation"] == alone.parts["validation"] + 10 * row  # the first shard gathers the set
    assert [each.demand.summed for each in (alone, shared)] == [0, 4 * 3 * (2 * p + 1)]
    averaged = plan_of(tiny_config("cluster.memory=4GiB", "distill.average_decay=0.9"))
    assert averaged.parts == {**alone.parts, "synthetic": 6 * 10 * row}
    parts = alone.parts
    worst = max(parts["trace"] + parts["call"], parts["validation"])
    assert alone.total == PROCESS_BYTES + math.ceil(MARGIN * (parts["synthetic"] + parts["network"] + worst))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["cluster.memory=100MiB"], "raise --memory"),
        (["cluster.memory=2GiB", "distill.student_steps=1000000"], "lower distill.student_steps"),
        (["cluster.memory=3GiB", "dataset.source=cifar10", "distill.ipc=5000"], r"use --set cluster\.shards=\d"),
        (
            ["cluster.memory=1250MiB", "dataset.source=cifar10", "network.width=256"],
            "is validation.*lower network.width",
        ),
        (["cluster.memory=100kB", "cluster.gpus_per_worker=1"], "raise --memory"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_option_that_helps(changes: list[str], expected: str) -> None:
    """A refusal is one line: needed and allowed size, the largest part, and what to change."""
    with pytest.raises(ConfigError, match=f"(?i){expected}") as caught:
        plan_of(tiny_config(*changes))
    assert "needs" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_block_that_does_not_fit_names_its_size() -> None:
    """A block that is too large, which no micro-batch may divide, names recover.block, which makes it smaller."""
    small = ["cluster.memory=4GiB", "cluster.device=cpu"]
    with pytest.raises(ConfigError, match=r"is one micro-batch\. .*or lower recover\.block\.$"):
        plan_of(override(get_recipe("imagenet-sre2l-ipc10"), small))
    plan_of(override(get_recipe("imagenet-sre2l-ipc10"), [*small, "recover.block=10"]))


def test_workers_that_share_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers on one machine share its memory beside the common data set; fewer workers are suggested."""
    monkeypatch.setattr("datm_ray.stages.methods.memory.available_memory", lambda: 10 * GIB)
    config = tiny_config("cluster.device=cpu", "cluster.workers=4")
    assert worker_budget(config) == 10 * GIB
    assert worker_budget(config, data_bytes=2 * GIB, sharing=2) == 4 * GIB
    assert worker_budget(config, data_bytes=20 * GIB) == 0
    assert worker_budget(tiny_config("cluster.memory=3GiB"), 2 * GIB, 2) == 3 * GIB
    large = DataShape((1, 8, 8), 10, 9 * GIB // 256)
    with pytest.raises(ConfigError, match=r"may take \d+ MiB.*Lower cluster\.workers"):
        plans_of(config, large, sharing=4)


def test_micro_batches_shrink_to_what_is_left_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches fit cache and budget in even parts; if no image fits, the plan is refused."""
    changes = ("dataset.source=cifar10", "distill.ipc=50", "distill.batch_size=500", "network.width=64")
    roomy = plan_of(tiny_config(*changes, "cluster.memory=8GiB", "cluster.compile=true"))
    assert roomy.chunk == 39  # 40 are in the cache: 12 * 39 + 32
    image = roomy.parts["call"] // 39
    left = sum(roomy.parts[name] for name in ("synthetic", "network", "trace")) + 5.5 * image
    monkeypatch.setattr("datm_ray.stages.methods.memory.SCORING_BATCH", 0)  # else validation needs more
    monkeypatch.setattr("datm_ray.stages.methods.memory.PROTOCOLS", {"short": Schedule(1, 0, 0.1)})
    memory = int(PROCESS_BYTES + MARGIN * left)
    assert plan_of(tiny_config(*changes, f"cluster.memory={memory}", "cluster.compile=true")).chunk == 5
    with pytest.raises(ConfigError, match=r"needs .* and may take"):
        plan_of(tiny_config(*changes, f"cluster.memory={memory - int(5 * MARGIN * image)}", "cluster.compile=true"))


def test_results_depend_on_micro_batches_that_stay() -> None:
    """Micro-batches of the packaged recipes are pinned, because their size decides the last bits of a set."""
    found = {name: plan_of(override(get_recipe(name), ["cluster.memory=64GiB", "cluster.device=cpu"])).chunk
             for name in recipe_names() if get_recipe(name).method == "datm"}  # fmt: skip
    for name, chunk in found.items():
        is_small = name.endswith("-ipc1") or name == "digits-smoke"
        usual = 5 if name.startswith("tiny") else 10 if is_small else 50 if "digits" in name else 20
        assert chunk == (20 if name == "cifar100-ipc1" else usual), name


def test_gpus_that_this_machine_does_not_see_set_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of other machines set no limit: nothing is refused, and a micro-batch may be a whole batch."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = plan_of(tiny_config("cluster.gpus_per_worker=1"))
    assert (plan.budget, plan.chunk, plan.parts["process"]) == (math.inf, 10, 0)
    assert str(plan).endswith("as the GPU allows")


@pytest.mark.parametrize(("size", "together"), [(2**26, 80), (100 * 3072, 4), (25 * 3072, 1), (24 * 3072, 0)])
def test_a_gpu_s_plan_has_the_images_that_are_augmented_together(
    monkeypatch: pytest.MonkeyPatch, size: int, together: int
) -> None:
    """The plan counts the images of the largest block of student steps. On a CPU blocks are small, and not counted."""
    monkeypatch.setattr(matching, "BLOCK_BYTES", size)
    shape, image = DataShape((3, 8, 32), 10, 1000), 4 * 3 * 8 * 32
    settings = ("distill.ipc=10", "distill.batch_size=25")
    of_gpu, of_cpu = (
        plans_of(tiny_config(*settings, "distill.student_steps=80", place), shape)[0]
        for place in ("cluster.gpus_per_worker=1", "cluster.device=cpu")
    )
    steps = [range(number, number + 1) for number in range(80)]
    blocks = matching._blocks(steps, [25] * 80, size // image)
    largest = max(25 * len(block) for block in blocks) if together else 0
    assert of_gpu.parts["block"] == matching.BLOCK_COPIES * largest * image
    assert largest == 25 * together
    assert of_cpu.parts["block"] == 0
    worst = of_gpu.parts["trace"] + of_gpu.parts["block"] + of_gpu.parts["call"]
    assert of_gpu.total >= MARGIN * worst


class FakeGpu:
    """A GPU of this many bytes, on which a step takes a hundred for every image and the trace a fixed number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.size, self.peak, self.tried = size, 0, list[int]()
        for name in ("empty_cache", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name, lambda *_: 0))

    def max_memory_allocated(self, _: torch.device) -> int:
        """Peak bytes of the last step."""
        return self.peak

    def step(self, chunk: int) -> None:
        """Take a student step."""
        self.tried.append(chunk)
        self.peak = 100 * chunk
        if self.peak > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("size", "budget", "tried"),
    [
        (10**9, math.inf, [10]),
        (500, math.inf, [10, 5]),
        (10**9, 250, [10, 5, 2]),
        (100, 10**9, [10, 5, 2, 1]),
        (99, math.inf, [10, 5, 2, 1]),
    ],
    ids=["fits", "runs out of memory", "exceeds its share", "one image", "not even one"],
)
def test_a_trial_step_finds_the_micro_batch_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, size: int, budget: float, tried: list[int]
) -> None:
    """A trial step halves the micro-batch until it fits the worker's share; one image too large is refused."""
    gpu, planned = FakeGpu(monkeypatch, size), plan_of(tiny_config("cluster.memory=4GiB"))
    plan, held = replace(planned, budget=budget, chunk=10), list[int]()

    def step(chunk: int) -> None:
        held.append(chunk)  # graphs keep their memory, also of a step that runs out of it
        gpu.step(chunk)

    if size < 100:
        with pytest.raises(ConfigError, match=r"distils tiny has too little GPU memory for a step of one image"):
            chunk_by_trial(step, plan, torch.device("cpu"), held.clear)
    else:
        assert chunk_by_trial(step, plan, torch.device("cpu"), held.clear) == tried[-1]
    assert gpu.tried == tried
    assert held == tried[-1:] * (size >= 100), "what does not fit is forgotten before the next trial"


@pytest.mark.parametrize(
    ("memory", "size", "error"),
    [("4GiB", 10**9, ConfigError), ("4GiB", 99, GpuMemoryError), ("null", 10**9, GpuMemoryError)],
    ids=["limit of the recipe", "GPU smaller than the recipe's limit", "limit by the GPU"],
)
def test_a_trial_step_that_exceeds_the_recipes_limit_is_no_fault_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch, memory: str, size: int, error: type[ConfigError]
) -> None:
    """A step of one image above the recipe's own limit is a plain error, because other GPUs have the same limit."""
    gpu = FakeGpu(monkeypatch, size)
    plan = plan_of(tiny_config(f"cluster.memory={memory}", "cluster.gpus_per_worker=1"))
    with pytest.raises(ConfigError, match="for a step of one image") as caught:
        chunk_by_trial(gpu.step, replace(plan, budget=99, chunk=10), torch.device("cpu"))
    assert type(caught.value) is error


@pytest.mark.parametrize(("is_timed", "tried"), [(True, [10, 10, 5, 5]), (False, [10, 5, 2])])
def test_memory_of_cudnns_timings_does_not_count(
    monkeypatch: pytest.MonkeyPatch, is_timed: bool, tried: list[int]
) -> None:
    """A first step that times cuDNN's algorithms may take twice the memory; the step after it decides."""
    gpu, planned = FakeGpu(monkeypatch, 10**9), plan_of(tiny_config("cluster.memory=4GiB"))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", is_timed)

    def step(chunk: int) -> None:
        is_first = chunk not in gpu.tried
        gpu.step(chunk)
        gpu.peak *= 2 if is_first else 1

    plan = replace(planned, budget=500, chunk=10)
    assert chunk_by_trial(step, plan, torch.device("cpu")) == tried[-1]
    assert gpu.tried == tried


def test_memory_that_this_process_keeps_unused_on_a_gpu_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the process caches on a GPU counts as free, and a tenth is kept in reserve."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (4 * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda: 1.0)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    segment = {"device": 0, "total_size": 9 * GIB, "allocated_size": 3 * GIB, "segment_pool_id": (0, 0)}
    monkeypatch.setattr("torch.cuda.memory_snapshot", lambda: [segment])
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 3 * GIB)
    assert worker_budget(tiny_config()) == int(0.9 * 10 * GIB)


@pytest.mark.parametrize(
    ("share", "free", "held", "expected"),
    [
        (0.5, 80, 0, 39.5),
        (0.5, 44, 0, 39.5),
        (0.5, 30, 0, 30),
        (0.5, 40, 4, 35.5),
        (0.25, 25, 0, 19.5),
        (0.25, 50, 21, 0),
        (0.005, 80, 0, 0),
        (1.0, 44, 4, 44),
    ],
)
def test_workers_that_share_a_gpu_may_take_their_part_of_all_of_it(
    share: float, free: int, held: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's limit is its part of the whole GPU without its context, whoever else has started, or what is left."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda: 1.0)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.memory_snapshot", list)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: held * GIB)
    assert worker_budget(tiny_config(f"cluster.gpus_per_worker={share}")) == int(0.9 * expected * GIB)


@pytest.mark.parametrize(
    ("share", "size", "expected"),
    [(None, 80 * GIB, 72 * GIB), (1, 80 * GIB, 72 * GIB), (0.25, 80 * GIB, 0.9 * 19.5 * GIB), (1, None, math.inf)],
)
def test_a_driver_counts_a_gpu_without_starting_cuda(
    share: float | None, size: int | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that does not compute on a GPU counts the memory of all of it, and asks torch for nothing."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda._lazy_init", lambda: pytest.fail("CUDA starts"))
    monkeypatch.setattr("datm_ray.stages.methods.memory.gpu_size", lambda: size)
    config = tiny_config(*([] if share is None else [f"cluster.gpus_per_worker={share}"]))
    assert worker_budget(config) == pytest.approx(expected, rel=0, abs=1)
    assert plan_of(config).budget == worker_budget(config)


@pytest.mark.parametrize(("share", "free"), [(1.0, 60), (1.0, 79), (0.5, 30), (0.5, 40)])
@pytest.mark.parametrize("memory", ["null", "8MiB"])
def test_a_gpu_that_others_fill_costs_an_attempt_and_a_small_one_the_node(
    share: float, free: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without enough GPU memory is lost if other processes hold some; else GPUs of other nodes may do.

    A limit in the recipe would be the same on every node, so it is a plain error of the recipe.
    """
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free * MIB, 80 * MIB))
    monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", lambda: 1.0)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.memory_snapshot", list)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: 0)
    monkeypatch.setattr("datm_ray.stages.methods.memory.CONTEXT_BYTES", MIB)
    config = tiny_config(f"cluster.gpus_per_worker={share}", f"cluster.memory={memory}", "distill.ipc=5000")
    is_crowded = free in (30, 60)
    expected = ConfigError if memory != "null" else WorkerLostError if is_crowded else GpuMemoryError
    with (
        pytest.raises((ConfigError, WorkerLostError), match=r"needs .* and may take") as caught,
        crowded_gpus_lose(config.cluster),
    ):
        plan_of(config)
    assert type(caught.value) is expected
    assert ("Other processes hold memory" in str(caught.value)) == (expected is WorkerLostError)


def test_networks_count_where_they_live() -> None:
    """Networks of one worker add up; apart, each worker counts its own, MetaDD's too."""
    two, seen = (
        "backbones=[{network: {width: 64, depth: 2}}]",
        "metadd={auxiliaries: [{architecture: resnet18, width: 8}]}",
    )
    alone, together, apart, looking, looking_apart = (
        plan_of(tiny_config("cluster.memory=4GiB", *changes))
        for changes in (
            (),
            (two,),
            (two, "cluster.backbones_apart=true"),
            (seen,),
            (seen, "cluster.auxiliaries_apart=true"),
        )
    )
    assert apart.parts == alone.parts
    assert together.parts["network"] > 2 * alone.parts["network"]
    assert together.parts["synthetic"] * 5 == alone.parts["synthetic"] * 6
    for part in ("network", "meta"):
        assert looking.parts[part] > looking_apart.parts[part] > alone.parts[part] * (part == "network")
    assert (alone.name, together.name) == ("distils tiny", "distils tiny, backbone 0")
    large = "metadd={auxiliaries: [{architecture: resnet18, width: 200}]}"
    with pytest.raises(ConfigError, match=r"a worker that holds metadd\.auxiliaries\.0 of tiny needs"):
        plan_of(tiny_config(large, "cluster.memory=1250MiB", "cluster.auxiliaries_apart=true"))


def test_images_of_metadd_follow_memory_and_speed() -> None:
    """MetaDD's networks get as many images as fit; on CPUs few enough to be fast, or ten if maps are large."""
    seen = "metadd={auxiliaries: [{architecture: resnet18, width: 8}]}"

    def chunk_of(recipe: str, *changes: str) -> int:
        return plan_of(override(get_recipe(recipe), ["cluster.device=cpu", seen, *changes])).meta_chunk

    assert plan_of(tiny_config("cluster.memory=4GiB")).meta_chunk == 0
    assert chunk_of("digits-ipc10", "cluster.memory=8GiB") == META_IMAGES[1] == 50
    assert chunk_of("digits-ipc10", "cluster.memory=8GiB", "metadd.share=0.3") == 30
    wide = ("cifar10-ipc10", "metadd.auxiliaries=[{architecture: resnet18, width: 256}]")
    assert chunk_of(*wide, "cluster.memory=60GiB") == META_IMAGES[0] == 10
    large = ["cluster.device=cpu", "metadd={auxiliaries: [{architecture: resnet18, width: 64}]}"]
    large += ["dataset.resize=32", "network.width=8"]
    plan = plan_of(override(get_recipe("digits-ipc10"), [*large, "cluster.memory=8GiB"]))
    others = plan.parts["synthetic"] + plan.parts["network"]
    budget = int(plan.parts["process"] + MARGIN * (others + plan.parts["meta"] / 3)) + 1
    less = plan_of(override(get_recipe("digits-ipc10"), [*large, f"cluster.memory={budget}"]))
    assert plan.meta_chunk / 4 < less.meta_chunk <= plan.meta_chunk / 3
    assert less.total <= less.budget == budget
    assert chunk_of("cifar10-ipc10", "cluster.device=cuda", "cluster.memory=60GiB") == 100
    apart = plans_of(
        override(get_recipe(wide[0]), [seen, "cluster.auxiliaries_apart=true", "cluster.memory=60GiB"]),
        DataShape((3, 32, 32), 10, 0),
    )
    assert [plan.chunk > 0 for plan in apart] == [True, False]
    assert all(plan.meta_chunk for plan in apart)


def test_more_shards_than_classes_are_refused() -> None:
    """A plan refuses more shards than classes, as a run does."""
    with pytest.raises(ConfigError, match=r"cluster\.shards is 11, but digits-ipc10 has 10 classes"):
        plan_of(override(get_recipe("digits-ipc10"), ["cluster.shards=11"]))


def test_free_memory_is_read_or_else_all_memory_is_taken(tmp_path: Path) -> None:
    """Free memory comes from the kernel's table; if that is missing or strange, sysconf gives all memory."""
    (tmp_path / "proc").mkdir()
    table = tmp_path / "proc/meminfo"
    table.write_text("MemTotal: 100 kB\nMemAvailable:   7 kB\n")
    assert available_memory(tmp_path) == 7 * 1024
    table.write_text("MemAvailable: much\n")
    assert available_memory(tmp_path) == available_memory(tmp_path / "absent") > 2**20


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage"),
    [
        ("0::/", "", "memory.max", "memory.current"),
        ("0::/jobs/one", "jobs", "memory.max", "memory.current"),
        ("4:memory:/docker/abc", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_a_container_s_limit_counts(tmp_path: Path, line: str, folder: str, limit: str, usage: str) -> None:
    """The limit of a container's group, of a group above it, or in the older layout counts; file cache is free."""
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpuset:/x\n{line}\n")
    (group / usage).write_text("3000\n")
    (group / limit).write_text("max\n")
    assert available_memory(tmp_path) == 1_024_000_000
    (group / limit).write_text("10000\n")
    assert available_memory(tmp_path) == 7000
    (group / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    assert available_memory(tmp_path) == 7500


def test_resized_images_of_a_run_on_this_machine_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized images that exceed this machine's memory are refused unread; other machines set no limit."""
    monkeypatch.setattr("datm_ray.data.reading.decode.available_memory", lambda: 20 * GIB)
    dataset = get_recipe("tiny-imagenet-ipc1").dataset.model_copy(update={"resize": 512})
    with pytest.raises(DatasetError, match=r"100,000 images of 3x512x512 need 659 GiB.*resize=64"):
        data_shape(dataset, here=True)
    assert data_shape(dataset).image == (3, 512, 512)


def test_shapes_are_known_without_files() -> None:
    """Shapes of named sources follow from dataset.resize without files; digits keep their own size."""
    config = override(get_recipe("tiny-imagenet-ipc1"), ["dataset.resize=32", "dataset.path=absent"])
    assert data_shape(config.dataset).image == (3, 32, 32)
    digits = data_shape(get_recipe("digits-ipc1").dataset)
    from datm_ray.data.sources import load_raw

    raw = load_raw("digits", validation=0.15)
    assert digits == KNOWN_SHAPES["digits"]
    assert (digits.image, digits.classes) == ((raw.channels, *raw.size), raw.classes)
    assert digits.training_images == len(raw.train) + len(raw.validation)


def test_micro_batches_allow_for_an_uneven_draw() -> None:
    """A shard's micro-batch allows for an uneven draw; a batch of all images needs none."""
    draw = np.random.default_rng(0)
    drawn = [(draw.permutation(100)[:50] < 50).sum() for _ in range(2000)]
    rows = rows_at_a_time(100, 50, 50)
    assert np.mean(np.array(drawn) > rows) < 0.01
    assert rows <= 34
    assert rows_at_a_time(100, 50, 100) == 50
    assert rows_at_a_time(100, 100, 40) == 40
    assert rows_at_a_time(100, 10, 50) <= 10


def test_data_shapes_are_read_or_refused_in_one_line() -> None:
    """Data shapes (image, classes, training images) are read, or refused with how to write them."""
    assert parse_shape(" 3x64x64,1000,1281167 ") == DataShape((3, 64, 64), 1000, 1_281_167)
    unreadable = ("", "3x64x64", "3x64,200,10", "3x64x64,200", "0x8x8,10,10", "3x64x64,200,1e5", "-1x8x8,2,3")
    for text in (*unreadable, "3x64x64,99999999999,9999999999999", "3x64x64,1000,10", "99999x1x1,2,2"):
        with pytest.raises(ConfigError, match=r"is no shape.*Write channels x height x width") as caught:
            parse_shape(text)
        assert len(str(caught.value).splitlines()) == 1, text


def test_a_plan_counts_images_for_validation_as_such() -> None:
    """The images of a plan are those to train and to validate on, together the numbers that a dry run prints."""
    shape = data_shape(get_recipe("digits-ipc1").dataset)
    assert shape.training_images == 1222 + 216
    assert str(shape).startswith("1,438 images of 1x8x8 in 10 classes to train and validate on: ")


def test_images_for_validation_are_counted_where_a_plan_reads_them(tmp_path: Path) -> None:
    """A plan of images in folders, whose classes may be unbalanced, knows how many are held out, as the run does."""
    for name, count in {**dict.fromkeys("abcdefghi", 4), "j": 64}.items():
        for part, images in (("train", count), ("test", 1)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(images):
                (tmp_path / part / name / f"{number}.pgm").write_bytes(b"P5 8 8 255\n" + bytes([number] * 64))
    dataset = DatasetConfig(source="folder", path=str(tmp_path), validation=0.1)
    shape = data_shape(dataset)
    assert shape.trained(dataset) == 100 - (9 * 1 + 6)
    assert replace(shape, validation_images=None).trained(dataset) == 100 - 10 * 1  # if classes count as equally large


ALLOWED = 1.3
"""Largest estimate, as a multiple of the measured peak. No estimate is below the peak."""
PLAIN, GSAM = "cluster.compile=false", "experts.optimiser=gsam"
EXPERTS = [
    (8, 32, 32, 12, 6, PLAIN, 811),
    (32, 64, 256, 2, 1, PLAIN, 971),
    (32, 64, 256, 2, 4, PLAIN, 1041),
    (32, 64, 256, 2, 1, "", 995),
    (32, 64, 256, 2, 4, "", 998),
    (32, 64, 256, 2, 2, GSAM, 961),
]
"""Side of digits in pixels, width of a ConvNet, images of a batch, epochs, stacked experts, a setting, peak in MiB."""
SCORED = [(8, 32, 10, 809), (8, 32, 1222, 804), (32, 64, 1222, 1006), (32, 128, 1222, 1227)]
"""Side of digits in pixels, width of a ConvNet, training images, peak in MiB."""


def digits(side: int, width: int, *changes: str) -> tuple[RunConfig, DataShape]:
    """A recipe of digits of that side, for a ConvNet of that width."""
    settings = [f"dataset.resize={side}", f"network.width={width}", "network.depth=null", *filter(None, changes)]
    return override(get_recipe("digits-ipc1"), settings), DataShape((1, side, side), 10, 1438, 359)


def test_the_reserved_memory_is_what_was_measured_or_little_more() -> None:
    """Estimates for experts, scored networks and a distillation are 0 to 30 % above the peak of real workers."""
    found = {}
    for side, width, batch, epochs, stacked, setting, peak in EXPERTS:
        short = f"experts.epochs={epochs}", "experts.keep_epochs=null", "distill.start_epochs=[0,1]"
        config, shape = digits(side, width, f"experts.batch_size={batch}", *short, "distill.expert_epochs=1", setting)
        found[f"experts {side} {width} {stacked} {setting}"] = experts_memory(config, shape, stacked), peak
    for side, width, images, peak in SCORED:
        found[f"scored {side} {width} {images}"] = scoring_memory(*digits(side, width), images), peak
    found["distilled"] = distilling_memory(*digits(8, 32, PLAIN)), 812
    ratios = {name: round(estimate / 2**20 / peak, 2) for name, (estimate, peak) in found.items()}
    assert {name: ratio for name, ratio in ratios.items() if not 1 <= ratio <= ALLOWED} == {}


def test_the_reserved_memory_follows_the_work() -> None:
    """More experts, images, classes of a rank and another network need more; a GPU leaves the process alone."""
    config, shape = digits(32, 128)
    assert experts_memory(config, shape, 8) > experts_memory(config, shape, 1)
    assert scoring_memory(config, shape, 1000) > scoring_memory(config, shape, 10)
    tested = override(config, ["experts.test_every=1", "experts.batch_size=32"])
    assert experts_memory(tested, shape, 1) > experts_memory(override(tested, ["experts.test_every=0"]), shape, 1)
    larger = config.network.model_copy(update={"width": 256})
    assert scoring_memory(config, shape, 10, larger) > scoring_memory(config, shape, 10)
    more = scoring_memory(config, shape, 10, larger, held=7) - scoring_memory(config, shape, 10, larger)
    cost = network_cost(config.model_copy(update={"network": larger}), shape)
    assert more == pytest.approx(MARGIN * 4 * 7 * cost.parameters, abs=1)
    divided = laid_out(config, {"shards": 5})
    assert distilling_memory(divided, shape, 1) == max(plan.total for plan in plans_of(divided, shape, 1))
    config = override(config, ["cluster.gpus_per_worker=1", "cluster.light.gpus_per_worker=0"])
    assert distilling_memory(config, shape) == GPU_PROCESS_BYTES
    assert experts_memory(config, shape, 1) < GPU_PROCESS_BYTES > scoring_memory(config, shape, 10)
    config = override(config, ["cluster.light=null"])
    assert experts_memory(config, shape, 1) == scoring_memory(config, shape, 10, sets=0) == GPU_PROCESS_BYTES


def test_a_set_that_is_read_for_a_gpu_is_reserved_in_main_memory() -> None:
    """Scoring and labelling on a GPU read the set into main memory first, where a large one stays."""
    shape = DataShape((3, 224, 224), 1000, 1_281_167)
    config = override(
        get_recipe("imagenet-sre2l-ipc10"), ["distill.ipc=50", "evaluate.labels=stored", "cluster.gpus_per_worker=1"]
    )
    config = config.resolved((224, 224))
    images = 2 * 50_000 * 4 * (3 * 224 * 224 + 1000)
    assert scoring_memory(config, shape, 50_000) == GPU_PROCESS_BYTES + images
    assert labelling_memory(config, shape) == GPU_PROCESS_BYTES + images + records_bytes(config, shape)
    on_cpus = override(config, ["cluster.gpus_per_worker=0"])
    assert labelling_memory(on_cpus, shape) > images


@pytest.mark.parametrize("gpus", [0, 1])
def test_records_of_an_epoch_are_reserved_for_its_labelling(gpus: int) -> None:
    """Views and logits of all images stay in main memory until an epoch is stored: 2 kB for each with 1000 classes."""
    config = override(get_recipe("imagenet-sre2l-ipc10"), ["evaluate.labels=stored", f"cluster.gpus_per_worker={gpus}"])
    config, shape = config.resolved((224, 224)), DataShape((3, 224, 224), 1000, 1_281_167)
    few = override(config, ["evaluate.top_logits=5"])
    every, some = (labelling_memory(each, shape) for each in (config, few))
    assert every - some == pytest.approx(MARGIN * 10_000 * (2 * 1000 - (6 * 2 + 5 * 2)), abs=9)
    epochs = [override(config, [f"evaluate.keep_labels={keep}"]) for keep in (1, 100)]
    assert len({labelling_memory(each, shape) for each in epochs}) == 1, "one epoch is held at a time"


def test_memory_of_an_epochs_records_is_counted_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of the views while they are drawn, and of all records afterwards, are no larger than what is counted."""
    config = tiny_config("distill.ipc=500", "evaluate.labels=stored")
    shape = DataShape((1, 8, 8), 10, 1222)
    monkeypatch.setattr(labels, "teacher_logits", lambda network, images, views, batch: torch.zeros(len(views), 10))
    info = replace(planned_labels(config, shape), augmentation=labels.VIEWS)
    tracemalloc.start()
    records = list(labels._labelled(info, torch.nn.Identity(), torch.empty(0), 0, 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    counted = records_bytes(config, shape)
    assert sum(map(len, records)) == 5000
    assert sum(each.nbytes for each in records) < counted
    assert 0.5 * counted < peak < counted


def test_sets_count_as_often_as_a_worker_holds_them() -> None:
    """A set that all seeds share counts once however many networks it trains, and sets of single seeds add up."""
    config, shape = digits(32, 128, "cluster.gpus_per_worker=1")
    size = 1000 * shape.row
    shared, several, none = (scoring_memory(config, shape, 1000, None, 5, sets=sets) for sets in (1, 5, 0))
    assert (shared - none, several - none) == (2 * size, 6 * size), "one more while it is read"
    on_cpus = override(config, ["cluster.gpus_per_worker=0"])
    one, five = (scoring_memory(on_cpus, shape, 1000, None, 5, sets=sets) for sets in (1, 5))
    assert five - one == pytest.approx(MARGIN * 4 * size, abs=1)


def test_threads_that_read_for_a_gpu_are_reserved() -> None:
    """Every worker with a GPU that reads streamed images reserves memory for as many threads as it may have."""
    config = override(get_recipe("imagenet-sre2l-ipc10"), ["cluster.gpus_per_worker=1"]).resolved((224, 224))
    config = config.model_copy(update={"prior": PriorConfig()})
    held = replace(IMAGENET, is_streamed=False)
    found = [
        tuple(each(config, shape, *more) for shape in (IMAGENET, held))
        for each, more in (
            (distilling_memory, ()),
            (experts_memory, (1,)),
            (prior_memory, ()),
            (scoring_memory, (10_000,)),
        )
    ]
    assert {streamed - kept for streamed, kept in found} == {STREAM_BYTES + MOST_READERS * PHOTO_BYTES}
    assert labelling_memory(config, IMAGENET) == labelling_memory(config, held), "it reads the set alone"
    on_cpus = override(config, ["cluster.light={gpus_per_worker: 0, threads_per_worker: 3}"])
    for streamed, kept in (
        (prior_memory(on_cpus, IMAGENET), prior_memory(on_cpus, held)),
        (experts_memory(on_cpus, IMAGENET, 1), experts_memory(on_cpus, held, 1)),
    ):
        assert streamed - kept == STREAM_BYTES + 3 * PHOTO_BYTES


@pytest.mark.parametrize("labels", ["own", "teacher"])
def test_micro_batches_need_less_main_memory(labels: str) -> None:
    """A CPU holds the maps of a micro-batch, of the teacher's too; one that divides nothing changes nothing."""
    shape = replace(IMAGENET, is_streamed=False)
    whole = override(
        get_recipe("imagenet-sre2l-ipc10"), [f"evaluate.labels={labels}", "evaluate.cutmix=0", "cluster.device=cpu"]
    )
    whole = whole.resolved((224, 224))
    large, same, small = (
        scoring_memory(
            override(whole, [f"evaluate.micro_batch={each}"]), shape, 10_000, has_teacher=labels == "teacher"
        )
        for each in ("null", 1024, 128)
    )
    maps = (1024 - 128) * ALONE_MAPS * network_cost(whole, shape).maps
    maps += (1024 - 128) * 2 * network_cost(teacher_of(whole), shape).largest * (labels == "teacher")
    assert large == same
    assert large - small == pytest.approx(MARGIN * maps, abs=2)


class _Gpu(str):
    """The CPU, under the name of a GPU."""

    type = "cuda"


def test_a_trial_finds_how_many_images_fit_into_metadds_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the plan's number is tried, by a gradient of the networks held here, beside others held elsewhere."""
    config = tiny_config("metadd={auxiliaries: [{architecture: lenet}]}", "cluster.memory=8GiB")
    tried: list[int] = []

    def of_trial(step: Callable[[int], None], plan: DistillationPlan, device: object) -> int:
        tried.append(plan.chunk)
        step(3)
        return 3

    monkeypatch.setattr("datm_ray.stages.distill.metadd.chunk_by_trial", of_trial)
    networks = MetaNetworks.__new__(MetaNetworks)
    spec = config.network.for_images(1, (8, 8), 10)
    networks._config, networks._classes = config, 10
    networks._ensembles = [MetaDD({1: build_network(spec, 0)})]
    dataset = SimpleNamespace(classes=10, image_shape=(1, 8, 8))
    place = {"config": config, "dataset": dataset, "mesh": ALONE}
    part: Any = SimpleNamespace(**place, sharing=1, role=config.whole_role, device=torch.device("cpu"))
    networks._part = part
    assert networks.images_that_fit() == meta_plan_of_part(part).chunk == 10
    assert not tried
    part.device = _Gpu("cpu")
    assert networks.images_that_fit() == 3
    assert tried == [10]
    part.role = Role((0,), ())
    assert networks.images_that_fit() == 0


def test_maps_at_the_end_have_as_many_images_at_a_time_as_fit_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps at a set's end take as many images at a time as an iteration on a GPU, and ten on a CPU.

    Images in main memory are copied to a GPU a batch at a time, since a set made in pieces may be larger than a GPU.
    """
    config = tiny_config("metadd={auxiliaries: [{architecture: lenet}]}")
    assert config.metadd is not None
    sizes: list[list[int]] = []

    class Recorded(MetaDD):
        def evidence(self, images: Tensor, *arguments: Any, chunk: int = 10, **options: Any) -> Evidence:
            sizes[-1] += [len(part) for part in images.split(chunk)]
            return super().evidence(images, *arguments, chunk=chunk, **options)

    networks = MetaNetworks.__new__(MetaNetworks)
    networks._config, networks._settings, networks._classes, networks.chunk = config, config.metadd, 10, 17
    specs = [each.for_images(1, (8, 8), 10) for each in (config.network, *config.metadd.auxiliaries)]
    networks._ensembles = [Recorded([build_network(spec, 0) for spec in specs])]
    images, labels = torch.randn(25, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(25) % 10
    ratios, copied = [], list[int]()
    copy = Tensor.to

    def counted(tensor: Tensor, *where: Any, **options: Any) -> Tensor:
        if isinstance(where[0], _Gpu) and tensor.dim() == 4:
            copied.append(len(tensor))
        return copy(tensor, *(str(each) if isinstance(each, _Gpu) else each for each in where), **options)

    monkeypatch.setattr(Tensor, "to", counted)
    for device in (torch.device("cpu"), _Gpu("cpu")):
        sizes.append([])
        networks._part = SimpleNamespace(mesh=ALONE, device=device)  # type: ignore[assignment]
        ratios.append(float(result_of(networks._ratio(images, labels))))
    assert sizes == [[10, 10, 5], [17, 8]]
    assert copied == [17, 8]
    assert ratios[1] == pytest.approx(ratios[0])


def test_every_class_holds_out_an_image_for_validation() -> None:
    """The planned number of training images is that of the split, in which many tiny classes hold out much."""
    for images, classes, share in (
        (3000, 1000, 0.1),
        (2000, 1000, 0.1),
        (2001, 1000, 0.25),
        (50_000, 10, 0.02),
        (7, 3, 0.5),
    ):
        labels = np.sort(np.arange(images) % classes)
        kept, _ = stratified_split(labels, share, Stream.VALIDATION, [str(label) for label in range(classes)])
        found = DataShape((3, 8, 8), classes, images).trained(DatasetConfig(validation=share))
        assert found == len(kept), (images, classes, share)
