"""Tests labelling a set and playing its labels back: equal views and logits, in any batches, processes and turns."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import datm_ray
from datm_ray.artifact import save_artifact
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.labelling import apply_views, draw_views, pack_logits, teacher_logits, unpack_logits
from datm_ray.data.transform import fit_transform
from datm_ray.errors import ConfigError, StoreError
from datm_ray.replay import ReplayedLabels
from datm_ray.stages.labels import create_labels, label_epochs
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.labels import LabelStore

COUNT, CLASSES = 40, 6
PAGE = Path(__file__).parents[1] / "docs/methods/labels.md"


def images_of(seed: int = 0) -> Tensor:
    return torch.randn(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))


def created(place: str, **options: Any) -> LabelStore:
    return create_labels(place, images_of(), CLASSES, "teacher", **{"epochs": 5, "seed": 3, **options})


def labelled(place: str, **options: Any) -> LabelStore:
    """A store with all its epochs."""
    store = created(place, **options)
    assert list(label_epochs(store, teacher(), images_of(), store.missing(), batch=16)) == [*range(store.info.keep)]
    return store


def epoch_of(data: ReplayedLabels, epoch: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Views and logits of an epoch, from a loader."""
    data.set_epoch(epoch)
    return joined(DataLoader(data, **options))


def joined(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    views, logits = zip(*loader, strict=True)
    return torch.cat(views), torch.cat(logits)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "labels")


@pytest.mark.parametrize("top", [None, 2])
def test_played_back_labels_equal_labelling_the_views_at_once(place: str, top: int | None) -> None:
    """Views have the bits of those labelled, and logits those of the teacher, rounded to float16."""
    labelled(place, top=top)
    data = ReplayedLabels(images_of(), place)
    for epoch in range(5):
        views = draw_views(3, epoch, COUNT, (8, 8))
        logits = torch.cat(
            [teacher_logits(teacher(), images_of(), views.take(slice(first, first + 16)), 16) for first in (0, 16, 32)]
        )
        found = epoch_of(data, epoch, batch_size=COUNT)
        assert_same(found, (apply_views(images_of(), views), unpack_logits(*pack_logits(logits, top), CLASSES)))
        online = teacher().eval()(found[0]).detach()
        if top is None:
            torch.testing.assert_close(found[1], online, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(found[1].argmax(dim=1), online.argmax(dim=1))


def test_any_batch_size_and_order_gives_the_same_rows(place: str) -> None:
    """A plain loader gives the same pairs in batches of any size, shuffled, and one at a time."""
    labelled(place)
    data = ReplayedLabels(images_of(), place)
    assert (len(data), data.epoch) == (COUNT, 0)
    expected = epoch_of(data, 2, batch_size=COUNT)
    for size in (1, 7, 16):
        assert_same(epoch_of(data, 2, batch_size=size), expected)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    shuffled = epoch_of(data, 2, batch_size=9, sampler=order.tolist())
    assert_same(shuffled, tuple(each[order] for each in expected))
    assert_same(tuple(map(torch.stack, zip(*data, strict=True))), expected)  # by index, up to the IndexError
    assert_same(data.batch([5, 5]), tuple(each[[5, 5]] for each in expected))


def test_workers_of_a_loader_follow_the_epoch(place: str) -> None:
    """Processes that a loader keeps from epoch to epoch play back the epoch that was set last."""
    labelled(place)
    data = ReplayedLabels(images_of(), place)
    expected = [epoch_of(data, epoch, batch_size=8) for epoch in range(3)]
    data.set_epoch(0)
    loader = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for epoch in (0, 2, 1):
        data.set_epoch(epoch)
        assert_same(joined(loader), expected[epoch])
    again = pickle.loads(pickle.dumps(data))
    assert_same(again.batch(range(COUNT)), expected[1])


@pytest.mark.s3
def test_labels_on_s3_are_played_back_in_forked_processes(bucket: str, place: str) -> None:
    """Labels on S3 equal local ones, also in processes that are forked after the first request."""
    labelled(place)
    labelled(f"s3://{bucket}/labels")
    local, remote = ReplayedLabels(images_of(), place), ReplayedLabels(images_of(), f"s3://{bucket}/labels")
    assert_same(epoch_of(remote, 1, batch_size=8), epoch_of(local, 1, batch_size=8))
    forked = epoch_of(remote, 2, batch_size=8, num_workers=2, multiprocessing_context="fork")
    assert_same(forked, epoch_of(local, 2, batch_size=8))


def test_a_pruned_pool_is_repeated_in_turn(place: str) -> None:
    """With two of seven epochs kept, the training's epochs have the two in turn, and the others are not stored."""
    store = labelled(place, epochs=7, keep=2)
    assert store.epochs() == [0, 1]
    data = ReplayedLabels(images_of(), store)
    epochs = [epoch_of(data, epoch, batch_size=10) for epoch in range(7)]
    for epoch in range(7):
        assert_same(epochs[epoch], epochs[epoch % 2])
    assert not torch.equal(epochs[0][0], epochs[1][0])
    whole = labelled(f"{place}-whole", epochs=7)
    assert_same(epoch_of(ReplayedLabels(images_of(), whole), 1, batch_size=10), epochs[1])
    assert whole.nbytes - (whole.location / "labels.arrow").size() == pytest.approx(
        3.5 * (store.nbytes - (store.location / "labels.arrow").size()), rel=1e-3
    )


def test_labelling_resumes_after_an_interruption_and_splits_over_workers(place: str) -> None:
    """Stored epochs are not labelled again; any division of the epochs gives the same bytes."""
    whole = labelled(place)
    parts, labelled_views = created(f"{place}-parts"), 0

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = teacher()

        def forward(self, images: Tensor) -> Tensor:
            nonlocal labelled_views
            labelled_views += len(images)
            if labelled_views == 2 * COUNT + 16:
                raise KeyboardInterrupt  # in the third epoch
            return self.network(images)  # type: ignore[no-any-return]

    work = label_epochs(parts, Counted(), images_of(), parts.missing(), batch=16)
    assert [next(work), next(work)] == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        next(work)
    assert parts.missing() == [2, 3, 4]
    labelled_views = 0
    assert list(label_epochs(parts, Counted(), images_of(), [4, 0, 1], batch=16)) == [4, 0, 1]
    assert labelled_views == COUNT
    assert list(label_epochs(created(f"{place}-parts"), teacher(), images_of(), [3, 2], batch=16)) == [3, 2]
    for name in whole.location.list():
        assert (parts.location / name).read_bytes() == (whole.location / name).read_bytes()


def test_labels_of_other_images_are_refused(place: str) -> None:
    """Other images than those labelled are an error that names both fingerprints; epochs not labelled are named."""
    store = created(place)
    changed = images_of()
    changed[7, 0, 0, 0] += 1e-3
    refused = rf"labels of images with fingerprint {store.info.set_fingerprint}, but the 40 given have \w{{16}}\."
    with pytest.raises(ConfigError, match=refused):
        ReplayedLabels(changed, place)
    with pytest.raises(ConfigError, match=refused):
        next(label_epochs(store, teacher(), changed, [0]))
    with pytest.raises(StoreError, match="set_fingerprint"):
        create_labels(place, changed, CLASSES, "teacher", epochs=5, seed=3)
    data = ReplayedLabels(images_of(), place)
    with pytest.raises(StoreError, match=r"no labels of epoch 0; it has no epochs\. 5 epochs are to be labelled"):
        data[0]
    with pytest.raises(ValueError, match="from 0, not -1"):
        data.set_epoch(-1)
    for wrong in ({"keep": 6}, {"keep": 0}, {"top": CLASSES}, {"top": 0}):
        with pytest.raises(ConfigError, match="cannot be"):
            created(f"{place}-wrong", **wrong)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_page_run(in_folder: Path) -> None:
    """The documented programs label a set, and train a network on its labels."""
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 2
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 8, 8), dtype=np.uint8)
    transform = fit_transform("standard", pixels, 255)
    synthetic = SyntheticSet(images_of(), torch.zeros(COUNT, CLASSES), torch.ones(1), torch.arange(COUNT) % CLASSES)
    names = tuple("abcdef")
    save_artifact(open_location("synthetic.arrow"), synthetic, transform, names, {"name": "x"}, {}, has_step_size=True)
    known: dict[str, Any] = {"teacher": teacher(), "fingerprint": "teacher", "network": teacher()}
    before = known["network"][0].weight.detach().clone()
    for snippet in snippets:
        for number in ("300", "100"):
            snippet = snippet.replace(f"={number}", "=3")
        exec(snippet, known)
    assert LabelStore("labels").missing() == []
    assert not torch.equal(known["network"][0].weight, before)
    assert known["epoch"] == 2
    assert datm_ray.ReplayedLabels is ReplayedLabels
