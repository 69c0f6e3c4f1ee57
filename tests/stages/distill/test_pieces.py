"""Tests sets that are made in pieces, by SRe2L: any number of workers, kills and resumption give the same set."""

from __future__ import annotations

import gc
import itertools
import shutil
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datm_ray.artifact import load
from datm_ray.config import RunConfig, run_identity, unread_keys
from datm_ray.core.metadd import MetaDD
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.steps import result_of
from datm_ray.core.synthetic import Rows
from datm_ray.core.training.loop import predict_logits
from datm_ray.errors import DatmError
from datm_ray.methods.recovery import Recovery, RecoveryLoss
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, preview, report, summaries
from datm_ray.planning.duration import Proposal
from datm_ray.planning.plan import plan_run
from datm_ray.runtime.executor import Progress, SerialExecutor
from datm_ray.runtime.mesh import ALONE
from datm_ray.stages.distill import task as distill
from datm_ray.stages.distill.checkpoint import read_curves
from datm_ray.stages.distill.pieces import PIECES, PieceWorker, remove_pieces, unfinished_pieces
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.methods import recovery
from datm_ray.stages.methods.first_images import crops
from datm_ray.stages.methods.first_images.crops import Crops, chosen_crops
from datm_ray.stages.methods.first_images.initial import first_rows
from datm_ray.stages.methods.part import Part, Piece
from datm_ray.stages.methods.recovery import RecoveryFromTeacher
from datm_ray.stages.worker import StageWorker
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.trajectories import ExpertGroup
from tests.conftest import killing_executor, run_here, set_of, tiny_config

SRE2L = (
    "method=sre2l",
    "network={architecture: resnet18, width: 8, norm: batch}",
    "dataset.normalisation=standard",
    "experts.count=1",
    "experts.epochs=2",
    "experts.keep_epochs=1",
    "experts.learning_rate=0.05",
    "distill.ipc=2",
    "distill.iterations=4",
    "distill.initial=noise",
    "recover.block=6",
    "recover.shift=1",
    "evaluate.full=false",
    "evaluate.seeds=1",
)
"""Overrides that recover 20 images of digits in four pieces."""
Arguments = tuple[RunConfig, str, str]
METADD = "metadd={auxiliaries: [{architecture: convnet, width: 4}], experts: {epochs: 1}}"


def config_of(*settings: str) -> RunConfig:
    return tiny_config(*SRE2L, *settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run."""
    out = tmp_path_factory.mktemp("sre2l")
    run_here(out, config_of())
    return out


@pytest.fixture(scope="module")
def with_metadd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a set made with MetaDD, and of its experts."""
    out = tmp_path_factory.mktemp("sre2l-metadd")
    for stage in ("train_experts", "distill"):
        run_here(out, config_of(METADD), stage=stage)
    return out


@pytest.mark.parametrize(
    ("classes", "ipc", "block", "sizes"),
    [(200, 50, 100, [(100, 1)] * 100), (10, 10, 100, [(10, 10)]), (10, 3, 4, [(4, 1), (3, 1), (3, 1)] * 3)],
)
def test_blocks_hold_each_image_once(classes: int, ipc: int, block: int, sizes: list[tuple[int, int]]) -> None:
    """Blocks have as many classes as fit, in even parts, and no more images than the recipe says."""
    config = config_of(f"distill.ipc={ipc}", f"recover.block={block}")
    pieces = RecoveryFromTeacher.pieces(config, classes)
    assert [(len(piece.classes), len(piece.images)) for piece in pieces] == sizes
    assert [piece.number for piece in pieces] == list(range(len(sizes)))
    rows = np.concatenate([piece.rows(ipc) for piece in pieces])
    assert sorted(rows.tolist()) == list(range(classes * ipc))
    assert Piece(0, range(1, 3), range(2)).rows(5).tolist() == [5, 6, 10, 11]


def test_a_run_leaves_a_set_with_the_teachers_labels_and_no_pieces(finished: Path) -> None:
    """The images are those of all pieces, class by class, between black and white, labelled by the teacher."""
    artifact, config = set_of(finished), config_of()
    assert artifact.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert artifact.clipped_share() == 0
    pipeline = Pipeline([config], str(finished))
    assert preview.remaining_lines(pipeline.runs) == [
        "0 experts to train",
        "0 sets to distil",
        "0 networks to train for evaluation",
    ]
    (config,) = pipeline.configs
    dataset = pipeline.runs.dataset(config.dataset)
    teacher = ExpertNetworks(config, dataset, pipeline.store_uri, torch.device("cpu"))
    logits = predict_logits(teacher.restored(0), artifact.images)
    torch.testing.assert_close(artifact.soft_labels, logits, rtol=1e-5, atol=1e-5)
    assert not (finished / "tiny" / PIECES).exists()
    first = load(str(finished / "tiny/initial.arrow"))
    noise = generator(config.seed, Purpose.RECOVERY_NOISE, 0).standard_normal((5, 1, 8, 8), np.float32)
    assert torch.equal(first.images[0:10:2], torch.from_numpy(noise))
    assert float((first.images - artifact.images).norm()) > 0
    (summary,) = summaries(pipeline.out, pipeline.configs)
    assert {score.row for score in summary.scores} == {"random-hard", "random-soft", "distilled"}
    assert b"Loss" in report(str(finished)).read_bytes()


def test_pieces_in_any_order_and_resumed_anywhere_have_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """Pieces made backwards, each stopped once in the middle, give the set of a run that was not disturbed."""
    config = config_of("distill.checkpoint_every=1")
    pipeline = Pipeline([config], str(tmp_path), str(finished / "experts"))
    (config,) = pipeline.configs
    worker = PieceWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    folder = tmp_path / "tiny"
    for piece in reversed(unfinished_pieces(config, open_location(str(folder)), 10)):
        arguments = (config, pipeline.store_uri, str(folder), piece.number)
        for event in worker.make_piece(*arguments):
            if isinstance(event, Progress) and event.done == piece.number % 4 + 1:
                break
        left = unfinished_pieces(config, open_location(str(folder)), 10)
        assert [each.number for each in left] == list(range(piece.number + 1))
        list(worker.make_piece(*arguments))
    assert not (folder / "synthetic.arrow").exists()
    list(worker.join_pieces(config, pipeline.store_uri, str(folder)))
    assert torch.equal(set_of(tmp_path).images, set_of(finished).images)
    assert torch.equal(set_of(tmp_path).soft_labels, set_of(finished).soft_labels)


@pytest.mark.parametrize("count", [2, 4])
def test_several_workers_recover_the_bits_of_one(count: int, finished: Path, tmp_path: Path) -> None:
    """Pieces that are dealt out to two or four workers, one of them joining, give the set of a single worker."""
    config = config_of()
    pipeline = Pipeline([config], str(tmp_path), str(finished / "experts"))
    (config,) = pipeline.configs
    workers = [PieceWorker(pipeline.runs.dataset(config.dataset), config.cluster) for _ in range(count)]
    arguments = (config, pipeline.store_uri, str(tmp_path / "tiny"))
    pieces = RecoveryFromTeacher.pieces(config, 10)
    for piece in reversed(pieces):
        list(workers[piece.number % count].make_piece(*arguments, piece.number))
    list(workers[-1].join_pieces(*arguments))
    assert len(pieces) == 4
    assert torch.equal(set_of(tmp_path).images, set_of(finished).images)
    assert torch.equal(set_of(tmp_path).soft_labels, set_of(finished).soft_labels)


def test_a_worker_reads_its_teacher_once_for_all_pieces(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of runs with one teacher, and their joining, read it once; it goes with another kind of task."""
    reads: list[tuple[str, int]] = []
    read = ExpertGroup.read_snapshot

    def counting(group: ExpertGroup, expert: int, epoch: int) -> Any:
        reads.append((group.key, expert))
        return read(group, expert, epoch)

    configs = [config_of(), config_of("name=longer", "distill.iterations=5"), config_of("name=other", "seed=1")]
    pipeline = run_here(tmp_path, *configs, stage="train_experts", store=finished / "experts")
    monkeypatch.setattr(ExpertGroup, "read_snapshot", counting)
    worker = StageWorker(pipeline.runs.dataset(configs[0].dataset), configs[0].cluster)

    def make(config: RunConfig) -> str:
        arguments = (config, pipeline.store_uri, str(tmp_path / config.name))
        for number in range(4):
            list(worker.make_piece(*arguments, number))
        list(worker.join_pieces(*arguments))
        return str(tmp_path / config.name / "synthetic.arrow")

    one, longer, other = pipeline.configs
    assert torch.equal(load(make(one)).images, set_of(finished).images)
    make(longer)
    assert len(reads) == 1
    held = weakref.ref(worker._worker(PieceWorker, light=False)._experts(longer, pipeline.store_uri)[0])
    make(other)
    assert len(reads) == len(set(reads)) == 2
    gc.collect()
    assert held() is None
    held = weakref.ref(worker._worker(PieceWorker, light=False)._experts(other, pipeline.store_uri)[0])
    result = str(tmp_path / "score.json")
    list(worker.evaluate(one, pipeline.store_uri, str(tmp_path / "tiny"), [result], "random-hard", [0]))
    gc.collect()
    assert held() is None


def test_a_set_whose_pieces_are_all_made_is_joined_by_the_next_command(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies before it joins the pieces leaves one task, which makes nothing again."""
    pipeline = Pipeline([config_of()], str(tmp_path), str(finished / "experts"))
    start = lambda: SerialExecutor(pipeline.configs[0].cluster)  # noqa: E731

    def die(*arguments: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(PieceWorker, "join_pieces", die)
        with pytest.raises(RuntimeError, match="killed"):
            pipeline.distill(start, Reporter(quiet=True))
    assert preview.remaining_lines(pipeline.runs)[1] == "1 set to distil: tiny"
    monkeypatch.setattr(PieceWorker, "make_piece", die)
    pipeline.distill(start, Reporter(quiet=True))
    assert torch.equal(set_of(tmp_path).images, set_of(finished).images)


def test_real_images_and_several_rounds(finished: Path, tmp_path: Path) -> None:
    """A recovery may start from real images of the right classes, and mix them in between rounds."""
    settings = ("distill.initial=random", "recover.rounds=2", "recover.mixed_in=0.9", "distill.labels=hard")
    pipeline = run_here(tmp_path, config_of(*settings), stage="distill", store=finished / "experts")
    (config,) = pipeline.configs
    dataset, first = pipeline.runs.dataset(config.dataset), load(str(tmp_path / "tiny/initial.arrow"))
    for image, label in zip(first.images.numpy(), first.labels.tolist(), strict=True):
        same = (dataset.train_images == image).all(axis=(1, 2, 3))
        assert label in dataset.train_labels[same]
    assert len(np.unique(first.images.numpy(), axis=0)) == 20
    assert set_of(tmp_path).soft_labels.argmax(dim=1).tolist() == first.labels.tolist()
    assert sorted(set(set_of(tmp_path).soft_labels.flatten().tolist())) == [0.0, 20.0]


@pytest.mark.parametrize("tiles", [1, 2])
def test_images_may_start_from_the_crops_that_select_chooses(tiles: int, finished: Path, tmp_path: Path) -> None:
    """First crops are those of method select, whatever the blocks, and the second round mixes them in."""
    select = f"select={{by: rded, crops: 3, pool: 20, tiles: {tiles}}}"
    rounds = ("distill.initial=crops", "distill.iterations=2", "recover.rounds=2", "recover.mixed_in=1")
    configs = [config_of(select, *rounds), config_of(select, "name=chosen", "method=select")]
    run_here(tmp_path, *configs, stage="distill", store=finished / "experts")
    first, chosen = (load(str(tmp_path / name)).images for name in ("tiny/initial.arrow", "chosen/synthetic.arrow"))
    assert torch.equal(first, chosen)
    moved = (set_of(tmp_path).images - first).abs().max()
    assert 0.02 < float(moved) < 0.051  # one step of Adam, at half of the learning rate


def classes_chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List that gets the class whenever any worker begins to choose crops."""
    found: list[int] = []

    def counted(part: Part, teacher: nn.Module, label: int) -> Generator[None, None, Crops]:
        found.append(label)
        return (yield from chosen_crops(part, teacher, label))

    monkeypatch.setattr(crops, "chosen_crops", counted)
    monkeypatch.setattr(distill, "REPORT_INTERVAL", 0.0)  # an event for each step of choosing
    return found


def piece_workers(config: RunConfig, count: int, out: Path, store: Path) -> tuple[list[PieceWorker], Arguments]:
    """Some workers, and the arguments of `make_piece` before the number of the piece."""
    pipeline = Pipeline([config], str(out), str(store / "experts"))
    (config,) = pipeline.configs
    workers = [PieceWorker(pipeline.runs.dataset(config.dataset), config.cluster) for _ in range(count)]
    return workers, (config, pipeline.store_uri, str(out / "tiny"))


CROPS = ("distill.initial=crops", "distill.iterations=1", "select.pool=4")


@pytest.mark.parametrize("count", [1, 2])
def test_the_crops_of_a_class_are_chosen_once_for_all_workers(
    count: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers read the crops that another has chosen for a block of the same classes; nothing of them is left."""
    chosen = classes_chosen(monkeypatch)
    sets = []
    for name, workers_of_pieces in (("one", [0, 0, 0, 0]), ("all", [0, count - 1, count - 1, 0])):
        workers, arguments = piece_workers(config_of(*CROPS), count, tmp_path / name, finished)
        chosen.clear()
        for number, worker in enumerate(workers_of_pieces):  # pieces 0 and 2 have the same classes, as have 1 and 3
            list(workers[worker].make_piece(*arguments, number))
        assert sorted(chosen) == list(range(10))
        list(workers[0].join_pieces(*arguments))
        remove_pieces(open_location(arguments[2]))
        assert not (tmp_path / name / "tiny" / PIECES).exists()
        sets.append(set_of(tmp_path / name).images)
    assert torch.equal(*sets)


def test_workers_choose_for_different_classes_at_the_same_time(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on blocks of the same five classes, step by step in turn, choose at most one class twice."""
    chosen = classes_chosen(monkeypatch)
    workers, arguments = piece_workers(config_of(*CROPS), 2, tmp_path, finished)
    pieces = [workers[0].make_piece(*arguments, 0), workers[1].make_piece(*arguments, 2)]
    for _ in itertools.zip_longest(*pieces):
        pass
    assert set(chosen) == set(range(5))
    assert len(chosen) <= 6


def test_a_worker_that_dies_leaves_the_crops_that_it_has_chosen(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The successor of a worker that died while it chose its third class chooses this class and the rest alone."""
    chosen = classes_chosen(monkeypatch)
    (killed, successor), arguments = piece_workers(config_of(*CROPS), 2, tmp_path, finished)
    events = killed.make_piece(*arguments, 0)
    while len(chosen) < 3:
        next(events)
    events.close()
    list(successor.make_piece(*arguments, 0))
    assert chosen == [0, 1, 2, 2, 3, 4]


def test_a_run_with_the_same_crops_chooses_none_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that makes a second run with the same choice stores its crops there, for the run's other workers."""
    chosen = classes_chosen(monkeypatch)
    (first, other), arguments = piece_workers(config_of(*CROPS), 2, tmp_path, finished)
    list(first.make_piece(*arguments, 0))
    second = (*arguments[:2], str(tmp_path / "second"))
    list(first.make_piece(*second, 0))
    list(other.make_piece(*second, 2))
    assert sorted(chosen) == list(range(5))


@pytest.mark.parametrize("count", [1, 2])
def test_real_first_images_are_chosen_once_for_all_workers(
    count: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that the teacher classifies correctly are looked for once for the blocks of the same classes."""
    chosen: list[range] = []

    def counted(part: Part, experts: ExpertNetworks, rows: Rows) -> Any:
        chosen.append(rows.classes(2))
        return first_rows(part, experts, rows)

    monkeypatch.setattr(recovery, "first_rows", counted)
    config = config_of("distill.initial=correct", "distill.iterations=1")
    workers, arguments = piece_workers(config, count, tmp_path, finished)
    for number in range(4):
        list(workers[number // 2 % count].make_piece(*arguments, number))
    assert chosen == [range(5), range(5, 10)]
    list(workers[0].join_pieces(*arguments))
    dataset, first = workers[0]._dataset, load(str(tmp_path / "tiny/initial.arrow"))
    part = Part(arguments[0], dataset, arguments[1], ALONE, torch.device("cpu"), 1)
    experts = ExpertNetworks(arguments[0], dataset, arguments[1], torch.device("cpu"))
    assert torch.equal(
        first.images, torch.from_numpy(dataset.train_images[result_of(first_rows(part, experts, Rows(0, 20)))])
    )


def test_checkpoints_of_a_piece_take_a_small_share_of_its_time(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer checkpoints than `checkpoint_every` says are made where they would take too much time; no bit changes."""
    saved = {}
    for share in (1e9, 1e-9):
        monkeypatch.setattr(distill, "WRITE_SHARE", share)
        out = tmp_path / str(share)
        (worker,), arguments = piece_workers(config_of("distill.checkpoint_every=1"), 1, out, finished)
        events = [event for event in worker.make_piece(*arguments, 0) if isinstance(event, Progress)]
        saved[share] = [event.done for event in events if event.saved]
        piece = load(str(out / "tiny" / PIECES / "00000/synthetic.arrow"))
        assert torch.equal(piece.images, set_of(finished).images[:10:2])
    assert saved == {1e9: [1, 2, 3, 4], 1e-9: [1, 4]}


def test_the_section_select_counts_for_crops_alone() -> None:
    """Keys of `select` are read, and part of the identity, where images start from crops, and nowhere else in sre2l."""
    for initial, is_read in (("crops", True), ("noise", False)):
        one, other = (config_of(f"distill.initial={initial}", f"select.crops={count}") for count in (3, 4))
        assert ("select" not in unread_keys(one)) == is_read
        assert (run_identity(one) != run_identity(other)) == is_read
        work = [RecoveryFromTeacher.choosing(each, 10, 1000)["scoring"] for each in (one, other)]
        assert work[1] - work[0] == (1000 if is_read else 0)


def test_metadd_changes_the_images_and_is_recorded(finished: Path, with_metadd: Path) -> None:
    """MetaDD's losses of the same views join the recovery, and maps of the whole set are kept."""
    assert not torch.equal(set_of(with_metadd).images, set_of(finished).images)
    assert (with_metadd / "tiny/maps.arrow").exists()
    curves = read_curves(open_location(str(with_metadd / "tiny")))
    assert curves["meta.iteration"].tolist() == [0, 1, 2, 3]
    assert float(curves["meta.total"].min()) > 0


def test_metadd_has_no_record_of_an_iteration_that_is_skipped(
    with_metadd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that skips an iteration has no record of it; means are over the other blocks, if there are any."""
    follow, first_block = Recovery.follow, list[int]()

    def failing(state: Recovery, gradient: Tensor, loss: Tensor, *more: Any) -> Any:
        first_block[:] = first_block or [id(state)]
        fails = state.iteration == 2 or (state.iteration == 1 and id(state) == first_block[0])
        return follow(state, gradient, loss * float("nan") if fails else loss, *more)

    monkeypatch.setattr(Recovery, "follow", failing)
    run_here(tmp_path, config_of(METADD), stage="distill", store=with_metadd / "experts")
    curves = read_curves(open_location(str(tmp_path / "tiny")))
    assert curves["meta.iteration"].tolist() == [0, 1, 3]
    assert np.isfinite(curves["meta.total"]).all()
    assert curves["history.skipped"].tolist() == [False, True, True, False]


def test_metadd_may_see_the_images_instead_of_the_views(with_metadd: Path, tmp_path: Path) -> None:
    """With `metadd.augmented: false` networks see whole images; where views are whole images, nothing changes."""
    weights = METADD.replace("experts", "invariance: 1, experts")
    whole = ("recover.least_share=1", "recover.flip=false", "recover.shift=0")
    for name, settings in (("views", ()), ("whole", whole)):
        images = []
        for augmented in ("true", "false"):
            place = tmp_path / f"{name}-{augmented}"
            config = config_of(weights, f"metadd.augmented={augmented}", *settings)
            run_here(place, config, stage="distill", store=with_metadd / "experts")
            images.append(set_of(place).images)
        assert torch.allclose(*images, atol=1e-3) == (name == "whole")


def test_images_may_have_the_statistics_of_auxiliaries(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Auxiliaries give statistics in place of the teacher's; with MetaDD's weights at 0 its networks see no view.

    If nothing else uses the auxiliaries, they are not trained, and there are no maps of what they see.
    """
    monkeypatch.delattr(MetaDD, "gradient")
    weightless = "metadd={auxiliaries: [{architecture: convnet, width: 4, norm: batch}], experts: {epochs: 1}, "
    weightless += "variance: 0, invariance: 0, position: 0}"
    images = []
    for of in ("teacher", "auxiliaries"):
        for stage in ("train_experts", "distill"):
            config = config_of(weightless, f"recover.statistics_of={of}")
            run_here(tmp_path / of, config, stage=stage, store=tmp_path / "experts")
        images.append(set_of(tmp_path / of).images)
        is_used = of == "auxiliaries"
        assert (tmp_path / of / "tiny/maps.arrow").exists() == is_used
        assert len(list((tmp_path / "experts").glob("*/convnet*"))) == is_used
    assert torch.equal(images[0], set_of(finished).images)
    assert not torch.equal(*images)


def test_metadd_sees_the_share_of_a_block_that_the_recipe_says(with_metadd: Path, tmp_path: Path) -> None:
    """With a share of the images, MetaDD's term and with it the set are others than with all."""
    for share in (1.0, 0.4):
        config = config_of(METADD.replace("{aux", f"{{share: {share}, aux"))
        run_here(out := tmp_path / str(share), config, stage="distill", store=with_metadd / "experts")
        assert torch.equal(set_of(out).images, set_of(with_metadd).images) == (share == 1)


def test_pieces_left_by_a_killed_command_are_removed_by_the_next(finished: Path, tmp_path: Path) -> None:
    """A command that finds a finished set removes what is left of its pieces."""
    shutil.copytree(finished, tmp_path / "out")
    left = tmp_path / "out/tiny" / PIECES / "00001"
    left.mkdir(parents=True)
    (left / "synthetic.arrow").write_bytes(b"")
    run_here(tmp_path / "out", config_of(), stage="distill")
    assert not left.parent.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("recover.rounds=9", r"recover\.rounds is 9, and there are 4 iterations"),
        ("network.norm=instance", r"network\.norm is 'instance', and method sre2l needs 'batch'"),
        ("recover.statistics_of=all", r"recover\.statistics_of is 'all', and there are no auxiliaries"),
        ("dataset.normalisation=zca", "kept between black and white"),
        ("distill.initial=crops select.pool=1", r"select\.pool is 1, and 2 crops of each class are wanted"),
        ("distill.initial=crops select.tiles=2 distill.ipc=99", "needs 396 training images of each class"),
        ("distill.initial=crops method=dm network.norm=instance", "method dm starts from whole images or noise"),
        ("cluster.shards=2", r"Method sre2l makes a set in pieces.*cluster\.shards=1; all"),
        (
            'cluster.auxiliaries_apart=true metadd={"auxiliaries":[lenet]}',
            r"by cluster\.auxiliaries_apart\. .*one worker holds all networks of its piece.*_apart=false; all",
        ),
    ],
)
def test_recipes_that_cannot_be_recovered_are_refused(setting: str, message: str, tmp_path: Path) -> None:
    """Each impossible setting is refused before anything starts, with what to do."""
    with pytest.raises(DatmError, match=message):
        run_here(tmp_path, config_of(*setting.split()))


def test_a_plan_divides_the_pieces_among_workers() -> None:
    """Hours of all workers are those of all pieces; on the clock two workers take half as long."""
    one, two = (plan_run(config_of(), f"cpus={n},gflops=50").stages["distillation"] for n in (1, 2))
    assert one[0] == one[1] == pytest.approx(two[0])
    assert two[1] == pytest.approx(one[1] / 2)
    assert plan_run(config_of(), "cpus=2,gflops=50").stages["validation"] == (0, 0)


def test_memory_is_that_of_one_block() -> None:
    """A worker holds one block, so its memory does not grow with the set."""
    few, many = (plan_run(config_of(f"distill.ipc={ipc}"), "cpus=2,gflops=50").plans[0] for ipc in (2, 50))
    assert few.parts["synthetic"] == many.parts["synthetic"]
    assert few.chunk == many.chunk == 5


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_on_ray_one_of_them_killed_recover_the_same_bits(
    ray_cluster: Any, finished: Path, tmp_path: Path
) -> None:
    """Ray's workers take pieces; one that is killed in the middle loses its piece to another, and no bit changes."""
    losses: list[str] = []
    config = config_of("distill.iterations=4", "distill.checkpoint_every=1")
    pipeline = Pipeline([config], str(tmp_path), str(finished / "experts"))
    pipeline.distill(lambda: killing_executor(config, losses), Reporter(quiet=True))
    assert losses
    assert torch.equal(set_of(tmp_path).images, set_of(finished).images)
    assert torch.equal(set_of(tmp_path).soft_labels, set_of(finished).soft_labels)


def test_a_gradient_is_compiled_where_the_run_is_long_enough() -> None:
    """A short recovery would wait longer for its compiler than it computes; plans and workers follow one rule."""
    for iterations, compiled, kind in ((3, True, "training"), (10**7, True, "recovery"), (10**7, False, "training")):
        config = config_of(f"distill.iterations={iterations}", f"cluster.compile={str(compiled).lower()}")
        plan = plan_run(config)
        assert kind in plan.plans[0].demand.passes
        compiling = Proposal(config, plan.shape, plan.plans, plan.machine).compiling("recovery", config)
        assert (compiling > 0) == (kind == "recovery")


@pytest.mark.slow
def test_blocks_in_one_worker_share_the_compiled_gradient(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker makes one loss for all blocks of a run, and compiled blocks differ by rounding alone."""
    made: list[RecoveryLoss] = []

    def counted(*arguments: Any, **options: Any) -> RecoveryLoss:
        made.append(RecoveryLoss(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(recovery, "RecoveryLoss", counted)
    monkeypatch.setattr(recovery, "COMPILED_FROM", 0)
    config = config_of("cluster.compile=true")
    run_here(tmp_path, config, stage="distill", store=finished / "experts")
    assert len(made) == 1
    assert not made[0].note
    torch.testing.assert_close(set_of(tmp_path).images, set_of(finished).images, rtol=1e-3, atol=1e-3)


def test_a_plan_here_times_only_steps_that_the_method_has() -> None:
    """Neither a recovery nor DM has student steps, which a network with batch normalisation could not take."""
    for config in (config_of(), tiny_config("method=dm")):
        machine = plan_run(config).machine
        assert machine.basis.startswith("timed here")
        assert "matching" not in machine.seconds
        assert {kind for kind, seconds in machine.seconds.items() if seconds <= 0} == {"steps"}
