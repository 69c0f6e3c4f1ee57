"""Tests that every set is normalised by the one transform, exactly and without waste of memory."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import get_args

import numpy as np
import pytest

from datm_ray.data import Dataset, RawDataset, dataset, fit_transform, load_raw, prepare, transform_of
from datm_ray.data.transform import Kind
from datm_ray.errors import DatasetError

KINDS: tuple[Kind, ...] = get_args(Kind)


@pytest.fixture(scope="module")
def raw() -> RawDataset:
    return load_raw("digits")


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_sets_have_the_raw_shapes_and_labels(raw: RawDataset, kind: Kind) -> None:
    """Prepared images are float32 of the raw shape; labels, names and order stay."""
    ready = prepare(raw, transform_of(raw, kind))
    assert (ready.channels, ready.size, ready.classes, ready.image_shape) == (1, (8, 8), 10, (1, 8, 8))
    assert (ready.name, ready.class_names) == (raw.name, raw.class_names)
    for role in ("train", "validation", "test"):
        images, labels = getattr(ready, f"{role}_images"), getattr(ready, f"{role}_labels")
        assert images.dtype == np.float32
        assert images.shape == getattr(raw, role).images.shape
        assert np.array_equal(labels, getattr(raw, role).labels)


@pytest.mark.parametrize("kind", KINDS)
def test_all_sets_are_normalised_by_the_training_statistics(raw: RawDataset, kind: Kind) -> None:
    """Validation and test images are normalised by the training set's transform, whose inverse restores them."""
    ready = prepare(raw, transform_of(raw, kind))
    assert ready.transform.fingerprint == fit_transform(kind, raw.train.images, raw.levels).fingerprint
    for images, pixels in ((ready.validation_images, raw.validation), (ready.test_images, raw.test)):
        np.testing.assert_allclose(ready.transform.invert(images), pixels.images / 16, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_transform_is_used(raw: RawDataset, kind: Kind) -> None:
    """A transform given by stored experts is used, and nothing is fitted."""
    stored = fit_transform(kind, raw.test.images, raw.levels)
    ready = prepare(raw, stored)
    assert ready.transform is stored
    np.testing.assert_array_equal(ready.train_images, stored.apply(raw.train.images / np.float32(16)))


def test_a_transform_of_another_shape_is_refused(raw: RawDataset) -> None:
    """A transform fitted to images of another size is an error."""
    other = load_raw("digits", resize=4)
    with pytest.raises(DatasetError, match=r"\(1, 8, 8\) meet a zca transform fitted on \(1, 4, 4\)"):
        prepare(raw, fit_transform("zca", other.train.images, other.levels))


def test_fingerprint_follows_the_data(raw: RawDataset) -> None:
    """The data's fingerprint repeats and changes with the split; the transform has its own."""
    transform = transform_of(raw, "zca")
    again = prepare(load_raw("digits"), transform).fingerprint
    assert prepare(raw, transform).fingerprint == again
    assert prepare(load_raw("digits", validation=0.2), transform).fingerprint != again
    assert transform.fingerprint != again


def test_normalising_in_chunks_changes_nothing(raw: RawDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalising a few images at a time equals normalising all at once."""
    whole = prepare(raw, transform_of(raw, "zca"))
    monkeypatch.setattr(dataset, "_CHUNK", 100)
    np.testing.assert_allclose(prepare(raw, transform_of(raw, "zca")).train_images, whole.train_images, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_one_copy_of_each_set(raw: RawDataset, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing allocates one copy of each set and a small chunk."""
    transform = fit_transform(kind, raw.train.images, raw.levels)
    monkeypatch.setattr(dataset, "_CHUNK", 16)
    tracemalloc.start()
    try:
        ready = prepare(raw, transform)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * sum(getattr(ready, f"{role}_images").nbytes for role in ("train", "validation", "test"))


def test_a_data_set_survives_pickling(raw: RawDataset) -> None:
    """A data set survives pickling and can still invert its transform."""
    ready = prepare(raw, transform_of(raw, "zca"))
    copy: Dataset = pickle.loads(pickle.dumps(ready, protocol=5))
    assert copy.fingerprint == ready.fingerprint
    np.testing.assert_array_equal(copy.transform.invert(copy.test_images), ready.transform.invert(ready.test_images))
