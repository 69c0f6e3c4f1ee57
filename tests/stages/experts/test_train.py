"""Tests training experts into a store: resumed, stacked, thinned out or killed, with equal bits every time."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray.config import RunConfig
from datm_ray.core.networks.parameters import flatten, flatten_buffers, unflatten_buffers_into, unflatten_into
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import predict_logits
from datm_ray.core.training.teacher import Teacher
from datm_ray.errors import DivergenceError, MissingExpertsError, StoreError
from datm_ray.monitor.progress import Reporter
from datm_ray.monitor.spent import Spent
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import Event, Finished, Lost, Note, Phase, Progress
from datm_ray.runtime.heartbeats import TRAINING
from datm_ray.runtime.machine.devices import images_on
from datm_ray.stages.experts import progress as expert_progress
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.experts.progress import ExpertProgress
from datm_ray.stages.experts.train import (
    ExpertWorker,
    expert_group,
    expert_info,
    experts_at_a_time,
    experts_cost,
    stacks,
)
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import ExpertGroup, Snapshot
from tests.conftest import actor_processes, run_here, tiny_config
from tests.tapes import Tape

RICH = ("experts.optimiser=gsam", "experts.momentum=0.5", "experts.augmentation=crop_scale")


def worker_of(config: RunConfig, out: Path) -> tuple[ExpertWorker, ExpertGroup, str]:
    """A worker for the run's experts, and the place where they are stored."""
    pipeline = Pipeline([config], str(out))
    dataset = pipeline.runs.dataset(config.dataset)
    group = expert_group(pipeline.store_uri, config, dataset.name, dataset.fingerprint)
    return ExpertWorker(dataset, config.cluster), group, pipeline.store_uri


def train(config: RunConfig, out: Path, experts: tuple[int, ...] = (0,), stop_after: int | None = None) -> list[Event]:
    """Train a stack to the end or up to an epoch. Returns the events."""
    worker, _, uri = worker_of(config, out)
    events: list[Event] = []
    for event in worker.train(config, uri, experts):
        events.append(event)
        if isinstance(event, Progress) and event.done == stop_after:
            break
    return events


def epochs_trained(events: list[Event]) -> list[int]:
    return [event.done for event in events if isinstance(event, Progress)]


def content(group: ExpertGroup, expert: int) -> list[bytes]:
    """All stored values of an expert."""
    epochs = group.read_info(expert).epochs
    progress = group.read_progress(expert)
    arrays = [*group.read_params(expert, epochs), progress.train_loss]
    return [array.tobytes() for array in arrays]


def test_an_expert_resumes_from_its_last_epoch_with_the_same_bits(tmp_path: Path) -> None:
    """An expert stopped after three of five epochs resumes with equal bits, and its progress is removed."""
    config = tiny_config(*RICH)
    assert epochs_trained(train(config, tmp_path / "whole")) == [1, 2, 3, 4, 5]
    train(config, tmp_path / "parts", stop_after=3)
    _, group, _ = worker_of(config, tmp_path / "parts")
    assert group.experts() == []
    resumed = epochs_trained(train(config, tmp_path / "parts"))
    assert resumed[-1] == 5
    assert 1 not in resumed
    assert content(group, 0) == content(worker_of(config, tmp_path / "whole")[1], 0)
    assert group.progress.list() == []


@pytest.mark.parametrize(("seconds", "heartbeats"), [(3600.0, 9), (0.001, 0)])
def test_an_epoch_that_takes_long_is_no_stuck_worker(
    seconds: float, heartbeats: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow steps are heartbeats within their epoch. In a short epoch they are not, so that epochs set the limit."""
    clock = SimpleNamespace(monotonic=itertools.count(step=seconds).__next__)
    monkeypatch.setattr("datm_ray.runtime.heartbeats.time", clock)
    config = tiny_config()
    worker, _, uri = worker_of(config, tmp_path)
    assert -(-len(worker.dataset.train_labels) // config.experts.batch_size) == 10
    events = list(worker.train(config, uri, (0,)))
    assert epochs_trained(events) == [1, 2, 3, 4, 5]
    assert events.count(Phase(TRAINING)) == 5 * heartbeats


def test_memory_order_of_maps_reaches_the_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cluster.channels_last=false applies to experts and auxiliaries, and finds the same stored experts."""
    asked: list[bool] = []

    class Recorded(StackFunctions):
        def __init__(self, *arguments: Any, channels_last: bool, **options: Any) -> None:
            asked.append(channels_last)
            super().__init__(*arguments, channels_last=channels_last, **options)

    monkeypatch.setattr("datm_ray.stages.experts.train.StackFunctions", Recorded)
    metadd = "metadd={auxiliaries: [{architecture: lenet}], experts: {epochs: 1}}"
    first, last = (tiny_config(metadd, f"cluster.channels_last={each}") for each in ("false", "true"))
    run_here(tmp_path, first, stage="train_experts")
    assert asked == [False, False]  # a stack of each network
    run_here(tmp_path, last, stage="train_experts")
    assert asked == [False, False]  # nothing is trained again


def test_a_worker_prepares_the_step_of_a_network_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker compiles the step of equal stacks once, and each expert has the bits of one trained alone."""
    built: list[StackFunctions] = []

    def building(*arguments: Any, **options: Any) -> StackFunctions:
        built.append(StackFunctions(*arguments, **options))
        return built[-1]

    monkeypatch.setattr("datm_ray.stages.experts.train.StackFunctions", building)
    config = tiny_config("experts.epochs=4")
    worker, group, uri = worker_of(config, tmp_path / "shared")
    for expert in (0, 1):
        list(worker.train(config, uri, (expert,)))
    assert len(built) == 1
    train(config, tmp_path / "alone", (1,))
    assert content(group, 1) == content(worker_of(config, tmp_path / "alone")[1], 1)


def test_damaged_progress_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress from a damaged file on is trained again, with an equal result."""
    monkeypatch.setattr(expert_progress, "WRITE_SHARE", 1e9)
    config = tiny_config()
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop_after=4)
    files = sorted((tmp_path / "parts").rglob("progress/*/*.arrow"))
    assert len(files) >= 2
    files[1].write_bytes(files[1].read_bytes()[:-100])
    events = epochs_trained(train(config, tmp_path / "parts"))
    assert events[-1] == 5
    assert content(worker_of(config, tmp_path / "parts")[1], 0) == content(worker_of(config, tmp_path / "whole")[1], 0)


def test_a_stack_stores_each_expert_that_is_missing(tmp_path: Path) -> None:
    """A stack stores its missing experts only, equal to those of a whole stack, and none beyond the count."""
    config = tiny_config("experts.count=3")
    train(config, tmp_path / "whole", (0, 1, 2, 3))
    train(config, tmp_path / "parts", (0, 1, 2, 3))
    _, group, _ = worker_of(config, tmp_path / "parts")
    _, whole, _ = worker_of(config, tmp_path / "whole")
    assert whole.experts() == [0, 1, 2]
    file = next((tmp_path / "parts").rglob("expert-00001.arrow"))
    before = file.stat().st_mtime_ns
    group.remove_expert(2)
    train(config, tmp_path / "parts", (0, 1, 2, 3))
    assert file.stat().st_mtime_ns == before
    assert [content(group, expert) for expert in range(3)] == [content(whole, expert) for expert in range(3)]


def test_stacks_follow_from_numbers_and_count_alone() -> None:
    """An expert's companions in its stack follow from its number and the count, not from what is missing."""
    assert stacks([0, 1, 2], 1, 3) == [(0,), (1,), (2,)]
    assert stacks([5, 9], 4, 20) == [(4, 5, 6, 7), (8, 9, 10, 11)]
    assert stacks([5, 9], 4, 11) == [(4, 5, 6, 7), (8, 9, 10)]
    assert stacks([8], 4, 9) == [(8, 9)]
    assert stacks([], 4, 9) == []


def test_a_trial_on_a_gpu_decides_how_experts_are_computed_until_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]
) -> None:
    """A trial chooses once; whoever resumes the experts computes them alike, with equal bits, without a trial."""
    config, asked, seconds = tiny_config(*RICH), list[list[int]](), {1: 1.0, 2: 2.0}

    def timed(ways: Mapping[int, Any], now: Any) -> int:
        asked.append(list(ways))
        for way in ways.values():
            way()
        return min(ways, key=lambda size: seconds[size])

    monkeypatch.setattr("datm_ray.stages.experts.train.is_tried", lambda device: True)
    monkeypatch.setattr("datm_ray.core.networks.stack_trial.fastest", timed)
    monkeypatch.setattr("datm_ray.core.networks.stack_trial.free_gpu_memory", lambda: 2**40)
    train(config, tmp_path / "whole", (0, 1))
    assert (asked, len(tapes)) == ([[2, 1]], 1)
    assert tapes[0].replays > 100, "every step of both experts"
    train(config, tmp_path / "parts", (0, 1), stop_after=3)
    seconds[1] = 3.0  # a stack would be faster now
    train(config, tmp_path / "parts", (0, 1))
    groups = [worker_of(config, tmp_path / name)[1] for name in ("whole", "parts")]
    for expert in (0, 1):
        assert content(groups[0], expert) == content(groups[1], expert)
    assert len(asked) == 2, "the resumed attempt had no trial"
    train(tiny_config(*RICH, "cluster.experts_at_a_time=2"), tmp_path / "given", (0, 1))
    assert len(asked) == 2, "a given number holds"
    train(config, tmp_path / "moved", (0, 1), stop_after=3)
    monkeypatch.setattr("datm_ray.stages.experts.train.is_tried", lambda device: False)
    made = len(tapes)
    train(config, tmp_path / "moved", (0, 1))
    assert len(tapes) == made, "a CPU that resumes them records no graph"


def test_test_images_are_copied_to_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test images that several experts and epochs are measured on are copied to the device once."""
    copied: list[int] = []

    def copy(images: Any, device: torch.device) -> Any:
        copied.append(len(images))
        return images_on(images, device)

    monkeypatch.setattr("datm_ray.stages.experts.train.images_on", copy)
    config = tiny_config("experts.test_every=1", "experts.epochs=3", "distill.start_epochs=[0, 2]")
    worker, _, uri = worker_of(config, tmp_path)
    for experts in ((0,), (1,)):
        list(worker.train(config, uri, experts))
    assert sorted(copied) == sorted([len(worker.dataset.train_images), len(worker.dataset.test_images)])


@pytest.mark.parametrize(("workers", "stack"), [(None, 8), (4, 8), (16, 7), (200, 1)])
def test_stacks_on_gpus_leave_no_worker_idle(workers: int | None, stack: int) -> None:
    """Stacks are made smaller where a stack of eight would leave GPUs idle."""
    config = tiny_config("experts.count=100", "cluster.gpus_per_worker=1", f"cluster.workers={workers}")
    assert experts_at_a_time(config, (3, 32, 32), 10) == stack


def test_stacks_follow_the_workers_that_train_experts() -> None:
    """The resources of `cluster.light` decide if experts are stacked as on a GPU, not those of distillation."""
    gpus, light = "cluster.gpus_per_worker=1", "cluster.light.gpus_per_worker=0"
    sizes = [
        experts_at_a_time(tiny_config("experts.count=100", "network.width=128", *settings), (3, 32, 32), 10)
        for settings in ([gpus], [gpus, light], ["cluster.gpus_per_worker=0"])
    ]
    assert sizes[0] > sizes[1] == sizes[2]


def test_stacks_are_divided_where_workers_would_be_idle() -> None:
    """Every worker trains as many stacks as the others, of sizes as even as possible."""
    cases = [
        *((range(100), 8, 64, 1, 64, 2), (range(100), 8, 2, 1, 14, 8), (range(100), 8, 200, 1, 100, 1)),
        *(
            (range(16), 8, 2, 2, 2, 8),
            (range(2), 8, 2, 2, 1, 2),
            (range(5), 8, 64, 2, 2, 3),
            (range(60, 100), 8, 5, 1, 5, 8),
            (range(16), 6, 2, 2, 4, 4),
            (range(5), 1, 2, 2, 5, 1),
        ),
    ]
    for missing, size, workers, least, count, largest in cases:
        found = stacks(missing, size, missing[-1] + 1, workers, least)
        assert (len(found), max(map(len, found))) == (count, largest), (missing, workers)
        assert set(missing) <= {expert for stack in found for expert in stack}
        assert min(map(len, found)) >= min(least, size, len(missing))
    assert stacks([0, 1, 90, 91], 8, 100, 4) == [tuple(range(8)), tuple(range(88, 96))]


def test_only_what_can_be_matched_is_kept(tmp_path: Path) -> None:
    """Stored epochs are those up to the latest target, and the last; a recipe that needs more is refused."""
    config = tiny_config("experts.epochs=8", "experts.keep_epochs=null")
    train(config, tmp_path)
    _, group, _ = worker_of(config, tmp_path)
    assert group.read_info(0).epochs == (0, 1, 2, 3, 8)
    later = tiny_config(
        "experts.epochs=8",
        "experts.keep_epochs=null",
        "distill.start_epochs=[0, 6]",
        "name=later",
    )
    with pytest.raises(
        MissingExpertsError, match=r"later reads epoch 4, which the experts in .* lack.*experts\.keep_epochs"
    ):
        Pipeline([later], str(tmp_path))


def test_experts_without_their_last_epoch_are_refused(tmp_path: Path) -> None:
    """A run of any method that reads the last epoch alone refuses experts without it, and names no epochs to keep."""
    config = tiny_config("method=dm", "metadd={auxiliaries: [{architecture: vgg11, width: 4}], experts: {epochs: 2}}")
    pipeline = Pipeline([config], str(tmp_path))
    (auxiliary, *_) = reversed(pipeline.runs.networks())
    raw, group = pipeline.runs.raw(auxiliary), pipeline.runs.experts(auxiliary)
    network = build_network(auxiliary.network.for_images(raw.channels, raw.size, raw.classes), 0)
    info = expert_info(auxiliary, group, raw.fingerprint, network, 0, seed=0, epochs=(1,))
    group.write_expert(0, [Snapshot(1, 0, 0.0, 0.0, flatten(network).numpy(), flatten_buffers(network).numpy())], info)
    with pytest.raises(MissingExpertsError, match=r"reads epoch 2, which the experts in .* lack\.") as caught:
        Pipeline([config], str(tmp_path))
    assert "keep_epochs" not in str(caught.value)


def test_runs_that_share_experts_keep_what_any_of_them_matches(tmp_path: Path) -> None:
    """Two recipes in one command store the larger number of experts and of epochs."""
    short = tiny_config("experts.epochs=8", "experts.keep_epochs=null", "experts.count=1")
    longer = tiny_config(
        "experts.epochs=8",
        "experts.keep_epochs=null",
        "distill.start_epochs=[0, 6]",
        "name=longer",
    )
    run_here(tmp_path, short, longer, stage="train_experts")
    _, group, _ = worker_of(short, tmp_path)
    assert group.experts() == [0, 1]
    assert group.read_info(0).epochs == (0, 1, 2, 3, 4, 5, 6, 8)


def test_two_byte_storage_is_another_group_of_experts(tmp_path: Path) -> None:
    """Two-byte storage halves the bytes and is a group of experts of its own."""
    exact, rounded = tiny_config(), tiny_config("experts.storage=bfloat16")
    for config in (exact, rounded):
        train(config, tmp_path)
    groups = [worker_of(config, tmp_path)[1] for config in (exact, rounded)]
    assert groups[0].key != groups[1].key
    values = [group.read_params(0, [3])[0] for group in groups]
    np.testing.assert_allclose(values[1], values[0], rtol=2**-8)
    assert not np.array_equal(values[0], values[1])


def test_running_statistics_travel_with_the_parameters(tmp_path: Path) -> None:
    """A network with batch norm, restored from its last snapshot, predicts in evaluation mode."""
    config = tiny_config("experts.test_every=5")
    network = config.network.model_copy(update={"norm": "batch"})  # no backbone, but an auxiliary network may be
    config = config.model_copy(update={"network": network})
    pipeline = Pipeline([tiny_config()], str(tmp_path))
    dataset = pipeline.runs.dataset(tiny_config().dataset)
    worker = ExpertWorker(dataset, config.cluster)
    list(worker.train(config, pipeline.store_uri, (0,)))
    group = expert_group(pipeline.store_uri, config, dataset.name, dataset.fingerprint)
    last = group.read_snapshot(0, 5)
    module = build_network(config.network.for_images(dataset.channels, dataset.size, dataset.classes), 1)
    unflatten_into(module, torch.from_numpy(last.params))
    unflatten_buffers_into(module, torch.from_numpy(last.buffers))
    right = module.eval()(torch.from_numpy(dataset.test_images)).argmax(1).numpy() == dataset.test_labels
    assert right.mean() == pytest.approx(last.test_accuracy)
    assert not np.array_equal(last.buffers, group.read_snapshot(0, 0).buffers)


def test_a_resnet_with_batch_norm_is_a_teacher_in_evaluation_mode(tmp_path: Path) -> None:
    """A ResNet with batch norm trains on a cosine, resumes with equal bits, and is restored with its statistics."""
    changes = ("experts.schedule=cosine", "experts.warmup_epochs=1", "experts.augmentation=resized+crop")
    config = tiny_config(
        *changes, "experts.count=1", "experts.epochs=3", "distill.start_epochs=[0, 2]", "experts.test_every=3"
    )
    network = config.network.model_copy(update={"architecture": "resnet18", "norm": "batch"})
    config = config.model_copy(update={"network": network})
    for folder, stop_after in (("whole", None), ("resumed", 2)):
        pipeline = Pipeline([tiny_config()], str(tmp_path / folder))
        dataset = pipeline.runs.dataset(config.dataset)
        for event in ExpertWorker(dataset, config.cluster).train(config, pipeline.store_uri, (0,)):
            if isinstance(event, Progress) and event.done == stop_after:
                break
        list(ExpertWorker(dataset, config.cluster).train(config, pipeline.store_uri, (0,)))
    groups = [
        expert_group(str(tmp_path / each / "experts"), config, "digits", dataset.fingerprint)
        for each in ("whole", "resumed")
    ]
    assert content(groups[0], 0) == content(groups[1], 0)
    experts = ExpertNetworks(config, dataset, pipeline.store_uri, torch.device("cpu"))
    images, labels = torch.from_numpy(dataset.test_images), torch.from_numpy(dataset.test_labels)
    right = predict_logits(experts.restored(0), images).argmax(dim=1) == labels
    assert float(right.float().mean()) == pytest.approx(groups[0].read_snapshot(0, 3).test_accuracy)
    teacher = Teacher(experts.restored(0))
    torch.testing.assert_close(teacher.network(images[:7]), predict_logits(experts.restored(0), images)[:7])


def test_a_full_disk_is_waited_for_and_then_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk pauses training with a note each minute; it finishes once there is space, and else is an error."""
    monkeypatch.setattr(expert_progress, "DISK_CHECK_INTERVAL", 0.0)
    full, roomy = SimpleNamespace(free=10**6), SimpleNamespace(free=10**12)
    answers = iter([full, full])
    monkeypatch.setattr(expert_progress.shutil, "disk_usage", lambda _: next(answers, roomy))
    events = train(tiny_config(), tmp_path / "roomy")
    assert next(event.text for event in events if isinstance(event, Note)).startswith("waiting for disk space: ")
    assert isinstance(events[-1], Finished)
    monkeypatch.setattr(expert_progress.shutil, "disk_usage", lambda _: full)
    with pytest.raises(StoreError, match="has no space for"):
        train(tiny_config(), tmp_path / "full")
    waits: list[float] = []
    messages: list[float] = []
    monkeypatch.setattr(expert_progress, "DISK_CHECK_INTERVAL", 10.0)
    monkeypatch.setattr(expert_progress.time, "sleep", waits.append)
    _, group, _ = worker_of(tiny_config(), tmp_path / "full")
    waiting = expert_progress.wait_for_disk_space(group.location, 0)
    with pytest.raises(StoreError, match="for 10 min"):
        messages.extend(sum(waits) for _ in waiting)
    assert messages == [60.0 * minute for minute in range(10)]  # else the worker would count as stuck meanwhile


def test_two_commands_that_train_the_same_expert_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands that train one expert both end well; the first to finish stores it."""
    monkeypatch.setattr(expert_progress, "WRITE_SHARE", 1e9)
    config = tiny_config()
    train(config, tmp_path / "whole")
    workers = [worker_of(config, tmp_path / "shared") for _ in range(2)]
    streams = [worker.train(config, uri, (0,)) for worker, _, uri in workers]
    events = [event for pair in itertools.zip_longest(*streams) for event in pair]
    assert sum(isinstance(event, Finished) for event in events) == 2
    assert content(workers[0][1], 0) == content(worker_of(config, tmp_path / "whole")[1], 0)


@pytest.mark.parametrize("far", [1, 3, 5])
def test_a_command_that_finds_its_experts_stored_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: int
) -> None:
    """A command ends well when another finishes and clears the same expert at any moment of its training."""
    monkeypatch.setattr(expert_progress, "WRITE_SHARE", 1e9)
    config = tiny_config()
    (slow, group, uri), (fast, _, _) = (worker_of(config, tmp_path) for _ in range(2))
    events = []
    for event in slow.train(config, uri, (0, 1)):
        events.append(event)
        if isinstance(event, Progress) and event.done == far:
            assert isinstance(list(fast.train(config, uri, (0, 1)))[-1], Finished)
            stored = [content(group, expert) for expert in (0, 1)]
    assert isinstance(events[-1], Finished)
    assert [content(group, expert) for expert in (0, 1)] == stored
    assert group.progress.list() == []


@pytest.mark.parametrize("seed", range(8))
def test_no_expert_joins_parts_of_two_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Attempts that hang, die, resume and return never make an expert whose epochs do not follow from each other."""
    monkeypatch.setattr(expert_progress, "WRITE_SHARE", 1e9)
    _, group, _ = worker_of(tiny_config(), tmp_path)
    rng, epochs = random.Random(seed), 12

    def progress() -> ExpertProgress:
        return ExpertProgress(group, (0,), range(epochs + 1), (0,))

    def after(state: ExpertState | None) -> ExpertState:
        """Next state. Its parameters are a number that no other training has, and the number before."""
        before, epoch = (0.0, 0) if state is None else (float(state.parameters[0, 0]), state.epoch + 1)
        return ExpertState(torch.tensor([[rng.random(), before]]), torch.zeros(1, 0), None, epoch, epoch)

    attempts: list[tuple[ExpertProgress, ExpertState | None]] = []
    reached = 0
    while reached < epochs:
        if len(attempts) < 3 and rng.random() < 0.3:
            attempts.append(((new := progress()), new.resume(torch.device("cpu"))))
        elif attempts:
            own, state = attempts.pop(rng.randrange(len(attempts)))
            state = after(state)
            list(own.add(state, torch.zeros(1)))
            if state.epoch < epochs and rng.random() < 0.9:  # else killed
                attempts.append((own, state))
        found = list(progress().snapshots(0))
        reached = found[-1].epoch if found else 0
        numbers = [snapshot.params.tolist() for snapshot in found]
        assert [snapshot.epoch for snapshot in found] == list(range(len(found)))
        assert [before for _, before in numbers[1:]] == [number for number, _ in numbers[:-1]]


def test_the_cost_of_experts_without_a_record_is_known_in_part(tmp_path: Path) -> None:
    """The cost is partial as long as that of an expert is not recorded."""
    config = tiny_config()
    group = expert_group(str(tmp_path), config, "digits", "0" * 16)
    assert experts_cost(config, group).spent.is_partial, "no expert is known"
    group.write_cost("both", {"experts": [0, 1], "spent": Spent(9.0).to_json()})
    assert experts_cost(config, group).spent == Spent(9.0)
    more = config.model_copy(update={"experts": config.experts.model_copy(update={"count": 3})})
    assert experts_cost(more, group).spent.is_partial


@pytest.mark.parametrize("loss", ["killed", "damaged", "without a cost"])
def test_a_progress_file_without_a_cost_makes_it_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """The cost of a training is partial, also for later attempts, if the record of saved epochs is lost."""
    monkeypatch.setattr(expert_progress, "WRITE_SHARE", 1e9)
    group, cpu = expert_group(str(tmp_path), tiny_config(), "digits", "0" * 16), torch.device("cpu")

    def attempt(epochs: Sequence[int]) -> ExpertProgress:
        progress = ExpertProgress(group, [0], range(9), [0])
        progress.resume(cpu)
        for epoch in epochs:
            list(progress.add(ExpertState(torch.zeros(1, 2), torch.zeros(1, 0), None, epoch, epoch)))
        return progress

    attempt(range(3))
    (file,) = Path(group.progress.uri).rglob("00002-00002-*.arrow")
    if loss == "damaged":
        file.write_bytes(file.read_bytes()[:-50])
    elif loss == "without a cost":
        place = open_location(str(file))
        write_tensors(place, read_tensors(place, kind="expert progress").arrays, kind="expert progress", metadata={})
    first = attempt(range(3 if loss == "killed" else 2, 5))
    assert [first.spent.is_partial, attempt([]).spent.is_partial] == [loss != "killed"] * 2
    assert attempt([]).last_epoch == 4


@pytest.mark.parametrize("method", ["_chain", "_read", "write"])
def test_progress_that_another_command_clears_up_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Progress that disappears is no error if its experts are stored, and is one if they are not."""
    config = tiny_config()
    worker, group, uri = worker_of(config, tmp_path)
    train(config, tmp_path, stop_after=3)
    original, storing = getattr(ExpertProgress, method), [True]

    def cleared(progress: ExpertProgress, *given: Any) -> Any:
        monkeypatch.setattr(ExpertProgress, method, original)
        if storing:
            list(worker_of(config, tmp_path)[0].train(config, uri, (0, 1)))
        raise StoreError("the folder is gone")

    monkeypatch.setattr(ExpertProgress, method, cleared)
    assert isinstance(list(worker.train(config, uri, (0, 1)))[-1], Finished)
    for expert in group.experts():
        group.remove_expert(expert)
    storing.clear()
    monkeypatch.setattr(ExpertProgress, method, cleared)
    with pytest.raises(StoreError, match="the folder is gone"):
        list(worker.train(config, uri, (0, 1)))


def test_what_a_worker_left_that_died_after_storing_is_cleared_away(tmp_path: Path) -> None:
    """Progress of a worker that died after storing is removed by the next command."""
    config = tiny_config("cluster.experts_at_a_time=1", "experts.count=1")
    train(config, tmp_path, stop_after=3)
    (left,) = (tmp_path / "experts").rglob("progress/*")
    kept = [(file.name, file.read_bytes()) for file in left.iterdir()]
    train(config, tmp_path)
    left.mkdir(parents=True)
    for name, data in kept:
        (left / name).write_bytes(data)
    run_here(tmp_path, config, stage="train_experts")
    assert not left.exists()


def test_an_expert_that_diverges_is_not_stored(tmp_path: Path) -> None:
    """A diverged expert is not stored; one line names it and the setting to lower."""
    with pytest.raises(
        DivergenceError,
        match=r"expert 0 diverged in epoch \d+.*[Ll]ower experts\.learning_rate",
    ):
        train(tiny_config("experts.learning_rate=1e30"), tmp_path)
    assert not list(tmp_path.rglob("expert-*.arrow"))


def test_progress_of_a_stack_of_another_size_goes_when_its_experts_are_stored(tmp_path: Path) -> None:
    """Progress of a stack of another size is removed once all its experts are stored."""
    config = tiny_config("experts.count=3")
    _, group, _ = worker_of(config, tmp_path)
    files = [group.progress / name / "00000-00001-ab.arrow" for name in ("00000-2-ab", "00002-2-ab")]
    for file in files:
        file.write_text("state")
    ExpertProgress.clear_up(group)
    assert all(file.exists() for file in files)
    train(config, tmp_path, (0, 1, 2))
    ExpertProgress.clear_up(group)
    assert [file.exists() for file in files] == [False, True]


@pytest.mark.exhaustive
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_actors_cost_no_expert_and_no_bit(ray_cluster: Any, tmp_path: Path) -> None:
    """Killing DATM_RAY_KILLS actors at random moments changes no bit, and finished experts are not trained again."""
    from datm_ray.runtime.ray.executor import RayExecutor

    wanted, rng = int(os.environ.get("DATM_RAY_KILLS", "2")), random.Random(0)
    count, epochs = 2 * wanted, 12
    config = tiny_config(
        f"experts.count={count}",
        f"experts.epochs={epochs}",
        "cluster.retries=50",
        "cluster.experts_at_a_time=1",
        *RICH,
    )
    kills: list[int] = []
    finished: dict[str, int] = {}
    lost: list[str] = []

    class Murderous(RayExecutor):
        def run(self, *arguments: Any) -> Iterator[tuple[Any, Event]]:
            for task, event in super().run(*arguments):
                if isinstance(event, Progress) and len(kills) < wanted and rng.random() < 1 / epochs:
                    kills.append(actor_processes()[rng.randrange(len(actor_processes()))])
                    os.kill(kills[-1], signal.SIGKILL)
                if isinstance(event, Lost):
                    lost.append(event.reason)
                for file in (tmp_path / "killed").rglob("expert-*.arrow"):
                    assert finished.setdefault(file.name, file.stat().st_mtime_ns) == file.stat().st_mtime_ns
                yield task, event

    Pipeline([config], str(tmp_path / "killed")).train_experts(lambda: Murderous(config.cluster), Reporter(quiet=True))
    run_here(tmp_path / "whole", config, stage="train_experts")
    assert len(kills) == wanted
    assert lost
    groups = [worker_of(config, tmp_path / name)[1] for name in ("killed", "whole")]
    assert groups[0].experts() == list(range(count))
    assert [content(groups[0], each) for each in range(count)] == [content(groups[1], each) for each in range(count)]
