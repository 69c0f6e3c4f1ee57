"""Tests distillation on a mesh of processes: any number of shards learns what one process learns."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from datm_ray.artifact import Artifact
from datm_ray.config import DistillConfig, RunConfig, to_yaml
from datm_ray.core.synthetic import Rows
from datm_ray.errors import ConfigError, CorruptFileError, OvertakenError
from datm_ray.methods.trajectory.iteration import MatchingState
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe
from datm_ray.runtime.executor import Event, Finished, Lost, More, Note, Progress, Task, WorkerRank
from datm_ray.runtime.mesh import ALONE
from datm_ray.runtime.stopping import Interrupted, ask
from datm_ray.stages.distill import checkpoint
from datm_ray.stages.distill.checkpoint import (
    CHECKPOINT,
    Attempt,
    load_checkpoint,
    read_computed,
    read_curves,
    save_checkpoint,
)
from datm_ray.stages.distill.metadd import MAPS_KIND
from datm_ray.stages.distill.task import SYNTHETIC, DistillWorker
from datm_ray.stages.methods.trajectory import TrajectoryMatching
from datm_ray.store.files import filesystem
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.tensors import read_tensors, write_tensors
from tests.conftest import actor_processes, run_here, set_of, tiny_config
from tests.processes import side_by_side

METADD = (
    "metadd={auxiliaries: [{architecture: lenet}, {width: 2, depth: 1, norm: batch}], share: 0.5, variance: 0.01,"
    " invariance: 0.01, experts: {count: 2, epochs: 2, learning_rate: 0.02, momentum: 0.9, augmentation: ''}}"
)
SET = (
    *("distill.ipc=2", "distill.batch_size=7"),
    *("distill.initial_step_size=null", "distill.learning_rate_images=null"),
)
AUGMENTED = "distill.augmentation=color_crop_scale"
APART = "cluster.auxiliaries_apart=true"
TWO_NETWORKS = "backbones=[{network: {width: 3, depth: 2, norm: group}, weight: 0.5}]"


def as_rank(config_file: str, out: str, worker_rank: WorkerRank, stop_at: int | None) -> None:
    """One process of the mesh."""
    torch.set_num_threads(1)
    config = get_recipe(config_file)
    pipeline = Pipeline([config], out)
    worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    arguments = (config, pipeline.store_uri, str(Path(out, config.name)))
    for event in worker.distill(*arguments, worker_rank=worker_rank if worker_rank.world_size > 1 else None):
        if isinstance(event, Progress) and event.done == stop_at:
            break


def as_validated_rank(config_file: str, out: str, worker_rank: WorkerRank, at_once: int) -> list[Task]:
    """One process of a mesh that does not wait for validations, but for one. Returns the tasks that are left."""
    torch.set_num_threads(1)
    config = get_recipe(config_file)
    pipeline = Pipeline([config], out)
    worker, left = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster), list[Task]()
    arguments = (config, pipeline.store_uri, str(Path(out, config.name)))
    template, rank = (
        Task("validation", arguments, method="validate"),
        worker_rank if worker_rank.world_size > 1 else None,
    )
    for event in worker.distill(*arguments, 1, template, worker_rank=rank):
        if isinstance(event, More) and not worker_rank.rank:
            if event.task.arguments[-1] == at_once:
                list(worker.validate(*event.task.arguments))
            else:
                left.append(event.task)
    return left


def as_asked_rank(config_file: str, out: str, worker_rank: WorkerRank, asked: int) -> tuple[str, int]:
    """One process of a mesh with one rank that is asked to stop: rank 0 while it validates, rank 1 after iteration 3.

    Returns what was saved, and the number of steps of the validation after the request.
    """
    torch.set_num_threads(1)
    config = get_recipe(config_file)
    pipeline = Pipeline([config], out)
    worker, steps = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster), [0]

    def validating(*_: Any) -> Iterator[Progress]:
        assert ask()
        for steps[0] in range(1, 100):
            yield Progress(0, 1)
        yield Progress(1, 1, {"validation": 0.5})

    try:
        with nullcontext() if asked else patch("datm_ray.stages.distill.task.validating", validating):
            for event in worker.distill(config, pipeline.store_uri, str(Path(out, "tiny")), worker_rank=worker_rank):
                if isinstance(event, Progress) and event.done == 3 and worker_rank.rank == asked == 1:
                    assert ask()
    except Interrupted as end:
        return str(end), steps[0]
    return "", steps[0]


def as_late_rank(config_file: str, out: str, worker_rank: WorkerRank, looks: int, lag: int) -> None:
    """One process of a mesh, where rank 1 does not see the checkpoint at first.

    Args:
        looks: number of times that rank 1 looks in vain.
        lag: longest time in seconds to wait for a file of another machine.
    """
    info, left = LocalFileSystem.info, [2 * looks * worker_rank.rank]  # the package asks twice each time

    def late(self: LocalFileSystem, path: str, **options: Any) -> Any:
        if path.endswith(CHECKPOINT) and left[0] > 0:
            left[0] -= 1
            raise FileNotFoundError(path)
        return info(self, path, **options)

    with patch.object(LocalFileSystem, "info", late), patch.object(filesystem, "LAG", lag):
        as_rank(config_file, out, worker_rank, None)


def distil(
    config: RunConfig,
    out: Path,
    size: int,
    stop_at: int | None = None,
    elsewhere: Path | None = None,
    late: tuple[int, int] | None = None,
) -> None:
    """Distil in `size` processes, to the end or up to an iteration; all but the first may have another folder.

    Args:
        late: last arguments of `as_late_rank`.
    """
    (out / "config.yaml").write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    folders = [elsewhere if elsewhere and rank else out for rank in range(size)]
    file = str(out / "config.yaml")
    last = late or (stop_at,)
    calls = side_by_side(
        as_late_rank if late else as_rank,
        [(file, str(folder), WorkerRank(rank, size, rendezvous), *last) for rank, folder in enumerate(folders)],
    )
    failures = [str(call.exception()) for call in calls if call.exception()]
    if failures:
        raise AssertionError("\n".join(failures))


def trained(out: Path, *changes: str) -> RunConfig:
    """A tiny run whose experts are in the store."""
    config = tiny_config(*SET, *changes)
    run_here(out, config, stage="train_experts")
    return config


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation by one process with one backbone, to the end."""
    out = tmp_path_factory.mktemp("reference")
    distil(trained(out), out, size=1)
    return out


def with_experts_of(reference: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    (out / "experts").symlink_to(reference / "experts")
    return out


def assert_equal_but_for_rounding(one: Artifact, other: Artifact) -> None:
    """Assert equality up to 1e-4 of the change, which 6 iterations of float32 sums in another order cause."""
    assert one.labels.tolist() == other.labels.tolist()
    for name in ("images", "soft_labels"):
        difference = (getattr(one, name) - getattr(other, name)).norm()
        assert float(difference / getattr(other, name).norm()) < 1e-5
    assert one.step_size == pytest.approx(other.step_size, rel=1e-5)


@pytest.mark.parametrize("shards", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_learn_what_one_process_learns(shards: int, reference: Path, tmp_path: Path) -> None:
    """Two even shards and four uneven ones learn what one process learns, whenever they save, which they agree on."""
    out = with_experts_of(reference, tmp_path)
    distil(tiny_config(*SET, f"cluster.shards={shards}", "cluster.checkpoint_seconds=0.001"), out, shards)
    assert_equal_but_for_rounding(set_of(out), set_of(reference))


def test_shards_leave_out_and_average_what_one_process_does(reference: Path, tmp_path: Path) -> None:
    """Without shallow parameters and with averaged images, two shards learn what one process learns and resumes."""
    pad = (*SET, "distill.unmatched_share=0.3", "distill.average_decay=0.5")
    one, again, two = (with_experts_of(reference, tmp_path / name) for name in ("one", "again", "two"))
    distil(tiny_config(*pad), one, 1)
    distil(tiny_config(*pad), again, 1, stop_at=5)
    distil(tiny_config(*pad), again, 1)
    distil(tiny_config(*pad, "cluster.shards=2"), two, 2)
    assert torch.equal(set_of(again).images, set_of(one).images)
    assert_equal_but_for_rounding(set_of(two), set_of(one))
    state = state_of(one, tiny_config(*pad))
    assert state.averaged is not None
    assert torch.equal(set_of(one).images, state.averaged)
    assert not torch.equal(state.averaged, state.synthetic.images)
    assert not torch.equal(state.synthetic.images, set_of(reference).images)


@pytest.mark.parametrize("asked", [0, 1])
def test_all_workers_of_a_mesh_save_the_same_iteration_if_one_is_asked_to_stop(
    asked: int, reference: Path, tmp_path: Path
) -> None:
    """Both ranks save iteration 3 if rank 1 is asked after it, or rank 0 while it validates; one process resumes it."""
    out = with_experts_of(reference, tmp_path)
    file = out / "config.yaml"
    file.write_text(to_yaml(tiny_config(*SET, "cluster.shards=2")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    ranks = [(str(file), str(out), WorkerRank(rank, 2, rendezvous), asked) for rank in range(2)]
    found = [call.result() for call in side_by_side(as_asked_rank, ranks)]
    assert found == [("iteration 3 of 6", 1 - asked), ("iteration 3 of 6", 0)]
    assert parts(out / "tiny") == ["00000003-0-10.arrow", "00000003-10-20.arrow"]
    distil(tiny_config(*SET), out, 1)
    assert_equal_but_for_rounding(set_of(out), set_of(reference))


def test_checkpoints_go_by_seconds_too_and_change_no_bit(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds make checkpoints that iterations would not, unless writing takes too much time; the set is the same."""
    seen: dict[float, list[int]] = {}
    for share in (1e9, 1e-9):
        monkeypatch.setattr("datm_ray.stages.distill.task.WRITE_SHARE", share)
        out = with_experts_of(reference, tmp_path / str(share))
        config = tiny_config(*SET, "distill.checkpoint_every=1000", "cluster.checkpoint_seconds=0.000001")
        pipeline = Pipeline([config], str(out))
        worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
        events = list(worker.distill(config, pipeline.store_uri, str(out / "tiny")))
        seen[share] = [event.done for event in events if isinstance(event, Progress) and event.saved]
        assert torch.equal(set_of(out).images, set_of(reference).images)
    assert seen == {1e9: [1, 2, 3, 4, 5, 6], 1e-9: [1, 6]}


def distil_apart(config: RunConfig, out: Path, size: int, at_once: int) -> None:
    """Distil in `size` processes that validate one set at once, and others when all iterations are done."""
    (out / "config.yaml").write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    ranks = [(str(out / "config.yaml"), str(out), WorkerRank(rank, size, rendezvous), at_once) for rank in range(size)]
    left, *_ = (call.result() for call in side_by_side(as_validated_rank, ranks))
    worker = DistillWorker(Pipeline([config], str(out)).runs.dataset(config.dataset), config.cluster)
    assert not (out / "tiny" / SYNTHETIC).exists()
    for task in left:
        assert isinstance(list(worker.validate(*task.arguments))[-1], Finished)


@pytest.mark.slow
def test_a_mesh_records_validations_by_other_workers(reference: Path, tmp_path: Path) -> None:
    """Two ranks whose sets are validated by others end as two ranks that wait, and as one process but for rounding."""
    (tmp_path / "waits").mkdir()
    (tmp_path / "apart").mkdir()
    waits, apart = (with_experts_of(reference, tmp_path / name) for name in ("waits", "apart"))
    config = tiny_config(*SET, "cluster.shards=2", "distill.validate_every=1")
    distil(config, waits, 2)
    distil_apart(config, apart, 2, at_once=3)
    assert torch.equal(set_of(apart).images, set_of(waits).images)
    assert set_of(apart).provenance == set_of(waits).provenance
    curves = [read_curves(open_location(str(out / "tiny"))) for out in (apart, waits)]
    for name, array in curves[0].items():
        np.testing.assert_array_equal(array, curves[1][name], err_msg=name)
    assert not (apart / "tiny/candidates").exists()
    assert len(list((apart / "tiny/checkpoint").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_checkpoint_is_resumed_by_any_number_of_shards(
    before: int, after: int, reference: Path, tmp_path: Path
) -> None:
    """A run stopped after 5 of 6 iterations resumes from the fourth with fewer or more shards."""
    out = with_experts_of(reference, tmp_path)
    distil(tiny_config(*SET, f"cluster.shards={before}"), out, before, stop_at=5)
    assert not (out / "tiny" / SYNTHETIC).exists()
    assert len(list((out / "tiny/checkpoint").glob("00000004-*"))) == before
    distil(tiny_config(*SET, f"cluster.shards={after}"), out, after)
    assert_equal_but_for_rounding(set_of(out), set_of(reference))
    assert len(list((out / "tiny/checkpoint").iterdir())) == after


@pytest.mark.slow
def test_backbones_apart_and_sharded_learn_what_one_process_learns(tmp_path: Path) -> None:
    """Two networks in two shards each learn the set, step sizes and shortened updates of one process."""
    (tmp_path / "one").mkdir()
    (tmp_path / "four").mkdir()
    shortened = "distill.gradient_limit=0.01"
    config = trained(tmp_path / "one", TWO_NETWORKS, shortened)
    distil(config, tmp_path / "one", size=1)
    out = with_experts_of(tmp_path / "one", tmp_path / "four")
    mesh = (*SET, TWO_NETWORKS, "cluster.shards=2", "cluster.backbones_apart=true")
    distil(tiny_config(*mesh, shortened), out, size=4)
    assert_equal_but_for_rounding(set_of(out), set_of(tmp_path / "one"))
    states = [state_of(place, config) for place in (tmp_path / "one", out)]
    torch.testing.assert_close(states[0].synthetic.step_sizes, states[1].synthetic.step_sizes, rtol=1e-5, atol=0)
    assert len(states[0].history) == 12
    decreases = [[record.decrease for record in state.history] for state in states]
    assert decreases[0] == pytest.approx(decreases[1], rel=1e-3)
    assert sum(each > 0.01 for each in decreases[0]) >= 6
    assert states[0].synthetic.step_sizes[0] != states[0].synthetic.step_sizes[1]


@pytest.fixture(scope="module")
def with_metadd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation of two backbones with MetaDD's auxiliaries by one process, to the end."""
    out = tmp_path_factory.mktemp("with_metadd")
    distil(trained(out, TWO_NETWORKS, METADD, AUGMENTED), out, size=1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apart", "size"),
    [
        ([APART], 3),
        (["cluster.backbones_apart=true"], 2),
        (["cluster.shards=2"], 2),
        ([APART, "cluster.backbones_apart=true"], 4),
    ],
)
def test_networks_of_metadd_may_live_anywhere(apart: list[str], size: int, with_metadd: Path, tmp_path: Path) -> None:
    """Actors that exchange MetaDD's maps and logits learn what one process learns, and report equal losses."""
    out = with_experts_of(with_metadd, tmp_path)
    config = tiny_config(*SET, TWO_NETWORKS, METADD, AUGMENTED, *apart)
    assert config.workers_per_set == size
    distil(config, out, size)
    assert_equal_but_for_rounding(set_of(out), set_of(with_metadd))
    mine, theirs = (state_of(place, config).meta_history for place in (out, with_metadd))
    assert [record.iteration for record in mine] == list(range(6))
    for one, other in zip(mine, theirs, strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-3)


@pytest.mark.slow
def test_metadd_without_weights_changes_nothing_wherever_its_networks_are(with_metadd: Path, tmp_path: Path) -> None:
    """With all weights at 0 the set is that of a run without MetaDD, and one worker makes it, with no auxiliary."""
    weightless = METADD.replace("variance: 0.01, invariance: 0.01", "variance: 0, invariance: 0, position: 0")
    weightless = weightless.replace("lenet", "mlp")  # which the store lacks
    for name, more in (("without", []), ("one", [weightless]), ("apart", [weightless, APART])):
        (tmp_path / name).mkdir()
        out, config = with_experts_of(with_metadd, tmp_path / name), tiny_config(*SET, AUGMENTED, *more)
        assert config.workers_per_set == 1
        distil(config, out, size=1)
        assert not (out / "tiny/maps.arrow").exists()
        assert state_of(out, config).meta_history == []
        assert torch.equal(set_of(out).images, set_of(tmp_path / "without").images)


@pytest.mark.slow
def test_metadd_changes_the_set_and_is_resumed(with_metadd: Path, tmp_path: Path) -> None:
    """MetaDD changes the learned set, and a run stopped after iteration 5 resumes from the fourth."""
    (tmp_path / "resumed").mkdir()
    (tmp_path / "without").mkdir()
    settings = (*SET, TWO_NETWORKS, AUGMENTED)
    resumed, without = (with_experts_of(with_metadd, tmp_path / name) for name in ("resumed", "without"))
    distil(tiny_config(*settings, METADD), resumed, size=1, stop_at=5)
    distil(tiny_config(*settings, METADD), resumed, size=1)
    assert torch.equal(set_of(resumed).images, set_of(with_metadd).images)
    assert len(state_of(resumed, tiny_config(*settings, METADD)).meta_history) == 6
    distil(tiny_config(*settings), without, size=1)
    difference = set_of(without).images - set_of(with_metadd).images
    assert float(difference.norm() / set_of(without).images.norm()) > 1e-3


@pytest.mark.slow
def test_maps_of_metadd_are_those_of_a_run_that_waits(with_metadd: Path, tmp_path: Path) -> None:
    """The worker that writes the last result writes MetaDD's maps too, with the same bits."""
    out = with_experts_of(with_metadd, tmp_path)
    distil_apart(tiny_config(*SET, TWO_NETWORKS, METADD, AUGMENTED), out, 1, at_once=3)
    assert torch.equal(set_of(out).images, set_of(with_metadd).images)
    mine, theirs = (
        read_tensors(open_location(str(place / "tiny/maps.arrow")), kind=MAPS_KIND) for place in (out, with_metadd)
    )
    assert mine.metadata == theirs.metadata
    assert {name: array.tobytes() for name, array in mine.arrays.items()} == {
        name: array.tobytes() for name, array in theirs.arrays.items()
    }


@pytest.mark.slow
def test_backbones_may_part_on_resume(tmp_path: Path) -> None:
    """Backbones matched by one process up to iteration 5 resume from the fourth in a process each."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    distil(trained(tmp_path / "one", TWO_NETWORKS), tmp_path / "one", size=1)
    out = with_experts_of(tmp_path / "one", tmp_path / "two")
    settings = (*SET, TWO_NETWORKS)
    distil(tiny_config(*settings), out, size=1, stop_at=5)
    distil(tiny_config(*settings, "cluster.backbones_apart=true"), out, size=2)
    assert_equal_but_for_rounding(set_of(out), set_of(tmp_path / "one"))


@pytest.mark.slow
def test_divergence_in_the_rows_of_one_shard_is_skipped_by_all(reference: Path, tmp_path: Path) -> None:
    """An infinite momentum in the second shard makes all processes skip, and their histories are equal."""
    out = with_experts_of(reference, tmp_path)
    config = tiny_config(*SET, "cluster.shards=2")
    distil(config, out, 2, stop_at=5)
    part = next((out / "tiny/checkpoint").glob("00000004-10-20-*.arrow"))
    file = read_tensors(open_location(str(part)), kind="checkpoint")
    momentum = file.arrays["momentum.images"].copy()
    momentum[-1] = np.inf
    write_tensors(
        open_location(str(part)), {**file.arrays, "momentum.images": momentum}, kind="checkpoint", metadata={}
    )
    before = state_of(out, config).synthetic.images
    distil(config, out, 2)
    after = state_of(out, config)
    assert [record.skipped for record in after.history] == [False] * 4 + [True] * 2
    assert torch.equal(after.synthetic.images, before)


@pytest.mark.slow
def test_folders_that_are_not_shared_are_an_error(reference: Path, tmp_path: Path) -> None:
    """A checkpoint that one process finds and another does not is an error that blames folders."""
    outs = [tmp_path / "here", tmp_path / "there"]
    for out in outs:
        out.mkdir()
        with_experts_of(reference, out)
    distil(tiny_config(*SET), outs[0], 1, stop_at=5)
    config = tiny_config(*SET, "cluster.shards=2")
    with pytest.raises(AssertionError) as caught:
        distil(config, outs[0], 2, elsewhere=outs[1], late=(0, 1))
    assert str(caught.value).count("see different checkpoints") == 2


def test_a_checkpoint_that_a_shared_disk_shows_late_is_waited_for(reference: Path, tmp_path: Path) -> None:
    """A set is resumed by all its workers where one of them sees the checkpoint after some time only."""
    out = with_experts_of(reference, tmp_path)
    distil(tiny_config(*SET), out, 1, stop_at=5)
    distil(tiny_config(*SET, "cluster.shards=2"), out, 2, late=(3, 60))
    assert_equal_but_for_rounding(set_of(out), set_of(reference))


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_shard_costs_an_attempt_and_not_the_result(ray_cluster: Any, reference: Path, tmp_path: Path) -> None:
    """Killing one of two Ray actors in mid-distillation costs an attempt and does not change the result."""
    from datm_ray.runtime.ray.executor import RayExecutor

    losses: list[str] = []

    class Murderous(RayExecutor):
        def run(self, *arguments: Any) -> Iterator[tuple[Any, Event]]:
            for task, event in super().run(*arguments):
                if isinstance(event, Progress) and event.done == 3 and not losses:
                    os.kill(actor_processes()[-1], signal.SIGKILL)
                if isinstance(event, Lost):
                    losses.append(event.reason)
                yield task, event

    out = with_experts_of(reference, tmp_path)
    config = tiny_config(*SET, "cluster.shards=2")
    Pipeline([config], str(out)).distill(lambda: Murderous(config.cluster), Reporter(quiet=True))
    assert len(losses) == 1
    assert len(list((out / "tiny/checkpoint").iterdir())) == 1  # of the worker that validated last
    assert_equal_but_for_rounding(set_of(out), set_of(reference))


def state_of(out: Path, config: RunConfig) -> Any:
    rows = Rows.of_shard(0, 1, 10, config.distill.ipc)
    return load_checkpoint(MatchingState, open_location(str(out / "tiny")), rows, DistillConfig(), torch.device("cpu"))


def test_a_missing_part_of_a_checkpoint_is_named(reference: Path, tmp_path: Path) -> None:
    """A checkpoint with a missing part is refused with its name."""
    import shutil

    folder = tmp_path / "tiny"
    shutil.copytree(reference / "tiny", folder)
    (part,) = (folder / "checkpoint").iterdir()
    place = open_location(str(folder))
    settings = DistillConfig()
    with pytest.raises(CorruptFileError, match="holds 20 of the 30 images"):
        load_checkpoint(MatchingState, place, Rows(0, 30), settings, torch.device("cpu"))
    part.unlink()
    with pytest.raises(Exception, match=part.name):
        load_checkpoint(MatchingState, place, Rows(0, 20), settings, torch.device("cpu"))


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    """A checkpoint of another format is one line of error, when resuming and in the report."""
    place = open_location(str(tmp_path))
    write_tensors(place / "checkpoint.arrow", {"x": np.zeros(1)}, kind="checkpoint", metadata={})
    with pytest.raises(CorruptFileError, match="names no parts"):
        load_checkpoint(MatchingState, place, Rows(0, 10), DistillConfig(), torch.device("cpu"))
    with pytest.raises(CorruptFileError, match="no columns for iterations"):
        read_curves(place)


def test_entries_on_student_steps_that_are_no_mappings_are_a_damaged_checkpoint(tmp_path: Path) -> None:
    """Student-step entries that are no mappings make a damaged checkpoint, named in one line."""
    place = open_location(str(tmp_path))
    for computed in ([1], [{}, None], [[]], None, 5, "ab", {"a": 1}):
        write_tensors(
            place / "checkpoint.arrow", {"x": np.zeros(1)}, kind="checkpoint", metadata={"computed": computed}
        )
        with pytest.raises(CorruptFileError, match=r"checkpoint\.arrow is damaged"):
            read_computed(place)
    metadata = {"computed": [{"from_iteration": 0}]}
    write_tensors(place / "checkpoint.arrow", {"x": np.zeros(1)}, kind="checkpoint", metadata=metadata)
    assert read_computed(place) == [{"from_iteration": 0}]


def start(folder: Path, resumed_at: int = -1) -> Attempt:
    """A new attempt of one worker, whose parts have a number in their names that grows with every attempt."""
    attempt = Attempt.start(open_location(str(folder)), ALONE)
    attempt.resumed_at = resumed_at
    return attempt


def save_at(folder: Path, iteration: int, attempt: Attempt | None = None) -> Attempt:
    """Save a checkpoint of one worker that has two rows, by default in a new attempt that resumed just before."""
    attempt = attempt or start(folder, iteration - 1)
    state: Any = SimpleNamespace(
        iteration=iteration,
        synthetic=SimpleNamespace(images=torch.zeros(2)),
        to_arrays=lambda: ({"x": np.full(2, iteration)}, {"y": np.zeros(1)}),
    )
    save_checkpoint(attempt, state, Rows(0, 2), ALONE, {})
    return attempt


def parts(folder: Path) -> list[str]:
    """Names of the parts, without their attempts."""
    return sorted(re.sub(r"-[0-9a-f]{12}", "", path.name) for path in (folder / "checkpoint").iterdir())


def test_a_checkpoint_clears_up_the_parts_of_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint deletes parts of earlier ones, not of later ones; parts already deleted are no error."""
    save_at(tmp_path, 2)
    for name in ("00000009-0-2.arrow", "notes.txt"):
        (tmp_path / "checkpoint" / name).write_bytes(b"")
    found = Location.list
    monkeypatch.setattr(Location, "list", lambda place: ["00000001-0-2.arrow", *found(place)])
    save_at(tmp_path, 4)
    assert parts(tmp_path) == ["00000004-0-2.arrow", "00000009-0-2.arrow", "notes.txt"]


def test_a_worker_left_over_from_an_earlier_attempt_writes_nothing(tmp_path: Path) -> None:
    """A worker whose set another attempt has started writes no checkpoint, result or cost, and says who took over."""
    stale = save_at(tmp_path, 4)
    save_at(tmp_path, 6)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for write in (
        lambda: save_at(tmp_path, 8, stale),
        lambda: (stale.folder / SYNTHETIC).write_text("result"),
        lambda: (stale.folder / "cost.json").write_json({}),
    ):
        with pytest.raises(OvertakenError, match="was taken over by process"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("moment", [2, 6, 8])
def test_a_checkpoint_that_is_delayed_past_the_check_corrupts_nothing(tmp_path: Path, moment: int) -> None:
    """A stale checkpoint that passed its check and is stored late is whole, and so is the next one."""
    stale = save_at(tmp_path, 2)
    written = []

    def delayed() -> None:  # the check of checkpoint.arrow, after that of the part
        written.append(1)
        if len(written) == 2:
            fresh = start(tmp_path, resumed_at=2)
            for iteration in range(4, moment + 1, 2):
                save_at(tmp_path, iteration, fresh)
            written.append(fresh)

    stale.folder = dataclasses.replace(stale.folder, guard=delayed)
    save_at(tmp_path, 6, stale)
    for iteration in (6, moment + 2):
        metadata = read_tensors(open_location(str(tmp_path / "checkpoint.arrow")), kind="checkpoint").metadata
        assert metadata["iteration"] == iteration
        for name in metadata["parts"]:
            part = read_tensors(open_location(str(tmp_path / "checkpoint" / name)), kind="checkpoint")
            assert part.arrays["x"].tolist() == [iteration] * 2
        save_at(tmp_path, moment + 2, written[-1])


def test_a_checkpoint_that_moves_on_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose parts are deleted while it is read is read again; parts that stay away are an error."""
    place, state = open_location(str(tmp_path)), []
    save_at(tmp_path, 2)

    def rows_of(held: Any, *_: Any) -> Any:
        state.append(held["x"].tolist())
        return SimpleNamespace(synthetic=None)

    monkeypatch.setattr(MatchingState, "from_arrays", rows_of)
    monkeypatch.setattr("datm_ray.stages.distill.checkpoint._require_shapes", lambda *_: None)
    original = checkpoint._read_rows

    def moving(folder: Location, names: list[str], rows: Rows) -> Any:
        if not state and len(parts(tmp_path)) == 1 and names[0].startswith("00000002"):
            save_at(tmp_path, 4)
        return original(folder, names, rows)

    monkeypatch.setattr(checkpoint, "_read_rows", moving)
    load_checkpoint(MatchingState, place, Rows(0, 2), DistillConfig(), torch.device("cpu"))
    assert state == [[4, 4]]
    next((tmp_path / "checkpoint").glob("00000004-0-2-*.arrow")).unlink()
    with pytest.raises(
        CorruptFileError, match=r"names the part 00000004-0-2-\w+\.arrow, which is missing.*move it away"
    ):
        load_checkpoint(MatchingState, place, Rows(0, 2), DistillConfig(), torch.device("cpu"))


@pytest.mark.parametrize(("shards", "sizes"), [(1, [10]), (2, [5, 5]), (4, [3, 3, 2, 2]), (10, [1] * 10)])
def test_every_class_is_in_one_shard(shards: int, sizes: list[int]) -> None:
    """Shards are ordered ranges of whole classes, as even as possible."""
    ranges = [Rows.of_shard(shard, shards, 10, 7) for shard in range(shards)]
    assert [len(rows.classes(7)) for rows in ranges] == sizes
    assert [rows.last - rows.first for rows in ranges] == [7 * size for size in sizes]
    assert ranges[0].first == 0
    assert [rows.last for rows in ranges[:-1]] == [rows.first for rows in ranges[1:]]


def test_more_shards_than_classes_are_refused(tmp_path: Path) -> None:
    """More shards than classes are an error before anything is written, with the number that works."""
    with pytest.raises(ConfigError, match=r"cluster\.shards is 11, but digits has 10 classes.*shards=10"):
        Pipeline([tiny_config("cluster.shards=11")], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_serial_executor_distils_a_sharded_recipe_alone(reference: Path, tmp_path: Path) -> None:
    """A sharded recipe on the serial executor runs in one process, with the bits of an unsharded one."""
    out = with_experts_of(reference, tmp_path)
    config = tiny_config(*SET, "cluster.shards=2")
    run_here(out, config, stage="distill")
    assert torch.equal(set_of(out).images, set_of(reference).images)


def test_what_a_killed_writer_left_is_removed(reference: Path, tmp_path: Path) -> None:
    """Checkpoint parts left by a killed writer are removed."""
    out = with_experts_of(reference, tmp_path)
    left = [out / "tiny" / place / f".tmp-{socket.gethostname()}-1-part" for place in (".", "checkpoint")]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    config = tiny_config(*SET)
    run_here(out, config, stage="distill")
    assert not any(file.exists() for file in left)


def last_two_events(config: RunConfig, out: Path) -> tuple[Note, Finished]:
    """The last two events of a distillation."""
    pipeline = Pipeline([config], str(out))
    worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    *_, note, last = worker.distill(config, pipeline.store_uri, str(out / config.name))
    assert isinstance(note, Note)
    assert isinstance(last, Finished)
    return note, last


def test_result_says_how_many_updates_were_skipped(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result counts skipped updates for the report."""
    monkeypatch.setattr(TrajectoryMatching, "refuses", False)
    out = with_experts_of(reference, tmp_path)
    config = tiny_config(*SET, "distill.threshold=1e-9", "name=skipping")
    note, last = last_two_events(config, out)
    assert last.result["skipped"] == 6
    assert note.text.startswith("6 of 6 matching losses exceeded distill.threshold 1e-09, and taught nothing")
    assert last.result["shortened"] == 0


def test_result_says_how_many_updates_were_shortened(reference: Path, tmp_path: Path) -> None:
    """The result counts updates shortened by the recipe's limit, and warns if most are."""
    out = with_experts_of(reference, tmp_path)
    config = tiny_config(*SET, "distill.gradient_limit=1e-9", "name=short")
    note, last = last_two_events(config, out)
    assert last.result["shortened"] == 6
    assert note.text.startswith("6 of 6 gradients were shortened")
    curves = read_curves(open_location(str(out / "short")))
    assert (curves["history.decrease"] > 1e-9).all()
