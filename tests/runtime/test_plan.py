"""Planning: what fits is told part by part, what does not is refused with the option that helps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datm_ray.config import ClusterConfig, RunConfig, override, parse_bytes
from datm_ray.errors import ConfigError, DatasetError
from datm_ray.memory import available_memory
from datm_ray.recipes import get_recipe, recipe_names
from datm_ray.runtime.plan import (
    KNOWN_SHAPES,
    DistillationPlan,
    Layout,
    data_shape,
    distillation_plan,
    parse_shape,
    rows_at_a_time,
    worker_budget,
)
from datm_ray.store.trajectories import size_in_words
from tests.conftest import tiny_config

GIB = 2**30
QUICK = ("digits16-metadd-ipc1", "cifar10-ipc50")


def plan_of(config: RunConfig) -> DistillationPlan:
    """The plan of a recipe whose data's shape is known."""
    shape = data_shape(config.dataset)
    return distillation_plan(config, shape.image, shape.classes, training_images=shape.training_images)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("512MiB", 512 * 2**20),
        ("6 GB", 6 * 10**9),
        ("1.5gib", 3 * GIB // 2),
        (" 2 G ", 2 * 10**9),
        ("100kB", 100_000),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    """Binary and decimal units, with and without a space, or plain bytes."""
    assert parse_bytes(text) == size
    assert ClusterConfig(memory=text).memory_bytes == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (310 * 2**20, "310.0 MiB"),
        (3.25 * GIB, "3.25 GiB"),
        (5000 * GIB, "4.88 TiB"),
        (2**60, "1048576.00 TiB"),
    ],
)
def test_sizes_are_told_as_they_can_be_written(size: float, text: str) -> None:
    """The same words everywhere, and those of an error can be given to --memory."""
    assert size_in_words(size) == text
    if size:
        assert parse_bytes(text) == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize("text", ["", "much", "8 apples", "-1GiB", "8GiBs", "0", "1e9", "GiB", "8 Gi"])
def test_an_unreadable_size_is_one_line(text: str) -> None:
    """Named together with how to write it."""
    with pytest.raises(ConfigError, match="8GiB, 512MiB or 6GB") as caught:
        override(get_recipe("digits-ipc1"), [f"cluster.memory='{text}'"])
    assert len(str(caught.value).splitlines()) == 1


def test_bytes_as_a_number_in_yaml_are_a_size() -> None:
    """--set cluster.memory=8589934592 needs no quotes; none stays none."""
    assert override(get_recipe("digits-ipc1"), ["cluster.memory=8589934592"]).cluster.memory_bytes == 8 * GIB
    assert ClusterConfig().memory_bytes is None


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in recipe_names()],
)
def test_every_packaged_recipe_can_be_planned(name: str) -> None:
    """Within 8 GiB a worker, or the published sizes could not be run here at all; two shards where the set is large."""
    plan = plan_of(override(get_recipe(name), ["cluster.memory=8GiB", "cluster.shards=2"]))
    assert plan.footprint.total <= plan.budget == 8 * GIB
    assert 1 <= plan.chunk <= plan.batch <= plan.images


@pytest.mark.slow
def test_tiny_imagenet_with_fifty_images_fits_six_gibibytes_on_two_shards() -> None:
    """Ten thousand images of 64x64, batches of a thousand: memory does not depend on the batch."""
    config = override(get_recipe("tiny-imagenet-ipc50"), ["cluster.memory=6GiB", "cluster.shards=2"])
    plan = plan_of(config)
    assert plan.footprint.total <= 6 * GIB
    small_batch = plan_of(override(config, ["distill.batch_size=100"]))
    assert abs(small_batch.footprint.total - plan.footprint.total) < GIB // 100


def test_the_work_and_the_traffic_of_an_iteration() -> None:
    """Traffic: a sum of p numbers for each step forwards and of p + 1 backwards, and none without shards."""
    alone = plan_of(tiny_config("cluster.memory=2GiB"))
    shared = plan_of(tiny_config("cluster.memory=2GiB", "cluster.shards=2"))
    parameters = shared.store_bytes // (4 * 2 * 6)  # two experts of five epochs
    assert (alone.network_bytes, shared.network_bytes) == (0, 4 * 3 * (2 * parameters + 1))
    assert alone.flop == shared.flop > 0
    assert shared.footprint.synthetic * 2 == alone.footprint.synthetic
    assert (alone.images, alone.batch, alone.steps) == (10, 10, 3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["cluster.memory=100MiB"], "raise --memory"),
        (["cluster.memory=2GiB", "distill.student_steps=1000000"], "lower distill.student_steps"),
        (["cluster.memory=2GiB", "dataset.source=cifar10", "distill.ipc=5000"], r"use --set cluster\.shards=\d"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_option_that_helps(changes: list[str], expected: str) -> None:
    """One line: what it takes, what it may take, which part, what to change."""
    with pytest.raises(ConfigError, match=f"(?i){expected}") as caught:
        plan_of(tiny_config(*changes))
    assert "needs" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_micro_batches_shrink_to_what_is_left_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as the cache likes, then as fits, and refused when not one image does; validation left aside."""
    monkeypatch.setattr("datm_ray.runtime.plan._scoring", lambda spec, images: 0)
    changes = ("dataset.source=cifar10", "distill.ipc=50", "distill.batch_size=500")
    roomy = plan_of(tiny_config(*changes, "cluster.memory=8GiB"))
    beside = roomy.footprint.total - roomy.footprint.call
    tight = plan_of(tiny_config(*changes, f"cluster.memory={beside + roomy.footprint.call // 4}"))
    assert roomy.chunk // 8 < tight.chunk < roomy.chunk < 500
    assert tight.budget is not None
    assert tight.footprint.total <= tight.budget
    with pytest.raises(ConfigError, match="may take"):
        plan_of(tiny_config(*changes, f"cluster.memory={beside}"))


def test_the_budget_is_the_recipe_s_or_what_the_machine_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided by the workers that share it, after the data set that all of them use."""
    monkeypatch.setattr("datm_ray.runtime.plan.available_memory", lambda: 10 * GIB)
    config = tiny_config("cluster.device=cpu", "cluster.workers=4")
    assert worker_budget(config) == 10 * GIB
    assert worker_budget(config, data_bytes=2 * GIB, sharing=2) == 4 * GIB
    assert worker_budget(config, data_bytes=2 * GIB, sharing=4) == 2 * GIB
    assert worker_budget(config, data_bytes=20 * GIB) == 0
    assert worker_budget(tiny_config("cluster.memory=3GiB"), 2 * GIB, 2) == 3 * GIB


def test_gpus_that_this_machine_does_not_see_set_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of a cluster may have none: nothing is refused, and a micro-batch may be a whole batch."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = plan_of(tiny_config("cluster.gpus_per_worker=1"))
    assert plan.budget is None
    assert (plan.chunk, plan.footprint.process) == (plan.batch, 0)
    assert "as the GPU allows" in "\n".join(plan.lines())


def test_memory_that_this_process_keeps_unused_on_a_gpu_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second set in one process would else find no room; and a tenth is left to what nobody predicts."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (4 * GIB, 80 * GIB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 9 * GIB)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 3 * GIB)
    assert worker_budget(tiny_config()) == int(0.9 * 10 * GIB)
    assert worker_budget(tiny_config("cluster.gpus_per_worker=0.5")) == int(0.45 * 10 * GIB)


def test_free_memory_is_read_or_else_all_memory_is_taken(tmp_path: Path) -> None:
    """From the kernel's table; without one, or with a strange one, from sysconf."""
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
    """Of its own group, of a group above it, and in the older layout; files that were read can be given back."""
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
    """A known source need not be read to be refused; on another machine's memory there is nothing to say."""
    monkeypatch.setattr("datm_ray.data.decode.available_memory", lambda: 20 * GIB)
    dataset = get_recipe("tiny-imagenet-ipc1").dataset.model_copy(update={"resize": 512})
    with pytest.raises(DatasetError, match=r"100,000 images of 3x512x512 need 659\.2 GiB.*resize=64"):
        data_shape(dataset, here=True)
    assert data_shape(dataset).image == (3, 512, 512)


def test_networks_matched_in_turn_lie_beside_each_other() -> None:
    """Parameters and sums of all of them, and one more sum of gradients; in workers of their own, only their own."""
    two = ["cluster.memory=4GiB", "backbones=[{network: {width: 64, depth: 2}}]"]
    alone, together = plan_of(tiny_config(two[0])), plan_of(tiny_config(*two))
    apart = plan_of(tiny_config(*two, "cluster.backbones_apart=true"))
    assert apart.footprint == alone.footprint
    assert together.footprint.network > 2 * alone.footprint.network
    assert together.footprint.synthetic * 5 == alone.footprint.synthetic * 6
    assert (alone.name, together.name) == ("tiny", "tiny, backbone 0")


def test_networks_of_metadd_count_where_they_live() -> None:
    """Their parameters and, in place of a trace, their activations; apart, only the backbone's own."""
    auxiliaries = "metadd={auxiliaries: [{architecture: resnet18, width: 8}]}"
    alone, with_meta = (
        plan_of(tiny_config("cluster.memory=4GiB")),
        plan_of(tiny_config("cluster.memory=4GiB", auxiliaries)),
    )
    apart = plan_of(tiny_config("cluster.memory=4GiB", auxiliaries, "cluster.auxiliaries_apart=true"))
    assert with_meta.footprint.network > apart.footprint.network > alone.footprint.network
    assert with_meta.footprint.meta > apart.footprint.meta > alone.footprint.meta == 0
    assert with_meta.meta_flop > apart.meta_flop > alone.meta_flop == 0
    assert "MetaDD" in "\n".join(with_meta.lines())
    assert "MetaDD" not in "\n".join(alone.lines())
    large = "metadd={auxiliaries: [{architecture: resnet18, width: 200}]}"
    with pytest.raises(ConfigError, match=r"a worker that holds metadd\.auxiliaries\.0 of tiny needs"):
        plan_of(tiny_config(large, "cluster.memory=950MiB", "cluster.auxiliaries_apart=true"))
    enough = f"cluster.memory={alone.footprint.total}"
    assert plan_of(tiny_config(enough)).footprint == alone.footprint
    with pytest.raises(ConfigError, match="a worker that distils tiny needs"):
        plan_of(tiny_config(auxiliaries, enough))


def test_the_first_of_several_shards_gathers_the_whole_set() -> None:
    """For validation; the others' plans say the same, for any of them may be the first."""
    alone, shared = (plan_of(tiny_config("cluster.memory=4GiB", f"cluster.shards={shards}")) for shards in (1, 2))
    assert alone.footprint.gathered == 0
    assert shared.footprint.gathered == 10 * 4 * (64 + 10)


def test_sets_that_are_distilled_side_by_side_share_the_machine() -> None:
    """As many workers as all sets want, but no more than the machine has room for."""
    config = tiny_config("cluster.shards=2", "cluster.workers=4")
    assert Layout.of(config).sharing == 2
    assert Layout.of(config, workers_of_all_sets=6).sharing == 4
    assert Layout.of(config, workers_of_all_sets=6, workers_here=3).sharing == 3


def test_shapes_are_known_without_files() -> None:
    """Named sources need no files, and their shapes follow dataset.resize; digits are as they are embedded."""
    config = override(get_recipe("tiny-imagenet-ipc1"), ["dataset.resize=32", "dataset.path=absent"])
    assert data_shape(config.dataset).image == (3, 32, 32)
    digits = data_shape(get_recipe("digits-ipc1").dataset)
    from datm_ray.data.sources import load_raw

    raw = load_raw("digits", validation=0.15)
    assert digits == KNOWN_SHAPES["digits"]
    assert (digits.image, digits.classes) == ((raw.channels, *raw.size), raw.classes)
    assert digits.training_images == len(raw.train) + len(raw.validation)


def test_more_shards_than_classes_are_refused() -> None:
    """A plan is not made for what a run would refuse."""
    config = override(get_recipe("digits-ipc10"), ["cluster.shards=11"])
    with pytest.raises(ConfigError, match=r"cluster\.shards is 11, but digits-ipc10 has 10 classes"):
        distillation_plan(config, (1, 8, 8), 10)


def test_micro_batches_leave_room_for_an_uneven_draw() -> None:
    """The part of a minibatch that a shard holds seldom needs a second call; of a batch of all images it is known."""
    draw = np.random.default_rng(0)
    drawn = [(draw.permutation(100)[:50] < 50).sum() for _ in range(2000)]
    room = rows_at_a_time(100, 50, 50)
    assert np.mean(np.array(drawn) > room) < 0.01
    assert room <= 34
    assert rows_at_a_time(100, 50, 100) == 50
    assert rows_at_a_time(100, 100, 40) == 40
    assert rows_at_a_time(100, 10, 50) <= 10


@pytest.mark.parametrize("text", ["3x64x64,99999999999,9999999999999", "3x64x64,1000,10", "99999x1x1,2,2"])
def test_a_data_set_that_cannot_be_is_refused(text: str) -> None:
    """Before a plan of it takes all memory there is."""
    with pytest.raises(ConfigError, match="larger than any data set, or has fewer images than classes"):
        parse_shape(text)
