"""Labelling of a set for every training epoch, as one worker does it. Any number of workers can divide the epochs.

In every epoch a teacher (a trained network) labels a view of each image: a random crop, mixed with another by CutMix.
Stored epochs are skipped. If a worker dies while it labels an epoch, this epoch is labelled again from its start. The
result does not depend on which worker labels which epoch, or on their order.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from datm_ray.artifact import read_artifact
from datm_ray.config import ClusterConfig, EvaluateConfig, RunConfig, expert_fingerprint, stable_hash
from datm_ray.core.images.augment import LEAST_SHARE
from datm_ray.core.training.labelling import (
    MIX,
    DrawnLabels,
    draw_views,
    images_fingerprint,
    pack_logits,
    require_labelled,
    teacher_logits,
)
from datm_ray.core.training.loop import scoring_schedule
from datm_ray.data.dataset import Dataset
from datm_ray.errors import ConfigError
from datm_ray.monitor.spent import Account, Spent, total
from datm_ray.runtime.executor import Event, Finished, Phase, Progress
from datm_ray.runtime.heartbeats import interval_in_epochs, with_heartbeats
from datm_ray.runtime.machine.devices import network_on, prepare_device, set_on
from datm_ray.shape import DataShape, network_cost
from datm_ray.stages.distill.task import SYNTHETIC
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.methods.memory import MARGIN
from datm_ray.stages.methods.registry import teacher_of
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.labels import INFO_FILE, LabelInfo, LabelRecords, LabelStore
from datm_ray.store.sealed import rejecting_nonsense

LABELLED, VIEW_COPIES = 256, 6
"""LABELLED: number of images that a teacher labels at a time. VIEW_COPIES: copies of these images that augmentation and
CutMix make. `labelling_bytes` counts them, and twice the teacher's largest feature map. In one measurement it estimated
585 MiB, and a CPU took 553 MiB."""
DRAWN_BYTES = 184
"""Peak bytes of main memory per image of a set to draw the views of an epoch. Measured for 2,000,000 images."""
VIEWS: dict[str, float] = {"least_share": LEAST_SHARE, "mix": MIX}
"""Default settings of the views (crops mixed by CutMix): smallest share of an image's area that a crop keeps, and
CutMix's parameter, as keyword arguments of `draw_views`."""


def create_labels(
    place: str | Location,
    images: Tensor,
    classes: int,
    teacher_fingerprint: str,
    *,
    epochs: int,
    keep: int | None = None,
    top: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    views: Mapping[str, float] = VIEWS,
) -> LabelStore:
    """Open the label store of a set, for a teacher's logits of every epoch. Creates the store if it is missing.

    A store that differs only in `epochs` or `keep` is used again, so only missing epochs have to be labelled.

    Args:
        place: folder of the store.
        images: [n c h w] images of the set, as networks are trained on them.
        classes: number of classes, for which the teacher has one logit each.
        teacher_fingerprint: digest of what decides the teacher's logits.
        epochs: number of epochs of the training.
        keep: number of epochs to label and store, which the training repeats in turn; `None` labels all.
        top: number of largest logits to keep; `None` keeps all.
        temperature: divisor of logits in the softmax. With `top`, probabilities are exact at this temperature alone.
        seed: seed of the views (crops mixed by CutMix).
        views: settings of the views, as keyword arguments of `draw_views`.

    Raises:
        ConfigError: `keep` or `top` is out of range.
        StoreError: the folder holds labels of other images, of another teacher or with other settings.
    """
    keep = epochs if keep is None else keep
    if not 1 <= keep <= epochs:
        raise ConfigError(f"{keep} of {epochs} epochs cannot be labelled", remedy=f"keep 1 to {epochs} epochs")
    if top is not None and not 1 <= top < classes:
        raise ConfigError(
            f"the {top} largest of {classes} logits cannot be kept", remedy=f"keep 1 to {classes - 1}, or all"
        )
    height, width = images.shape[2:]
    info = LabelInfo(
        set_fingerprint=images_fingerprint(images),
        teacher_fingerprint=teacher_fingerprint,
        images=len(images),
        classes=classes,
        size=(height, width),
        epochs=epochs,
        keep=keep,
        seed=seed,
        top=top,
        temperature=temperature,
        augmentation=views,
    )
    return LabelStore.create(place, info)


def label_epochs(
    store: LabelStore,
    network: nn.Module,
    images: Tensor,
    epochs: Iterable[int],
    *,
    batch: int = LABELLED,
) -> Iterator[int]:
    """Label the images in some epochs. Yields each epoch's number once it is stored, by this call or another worker.

    Args:
        store: store of the labels, from `create_labels`.
        network: teacher, which is used in evaluation mode; views are made on its device.
        images: [n c h w] images of the set, the images that `create_labels` got; on the same device or in main memory.
        epochs: numbers of the epochs to label, from 0 to `store.info.keep` - 1, such as those of `store.missing()`.
        batch: number of images labelled at a time. It does not affect views, and affects logits by rounding alone.

    Raises:
        ConfigError: the store is for labels of other images.
        StoreError: an epoch cannot be written, or a logit does not fit into float16.
        ValueError: an epoch is out of range.
    """
    require_labelled(images, store.info.set_fingerprint, store.location.uri)
    stored = _stored(store, network, images, epochs, batch)
    yield from (epoch for epoch in stored if epoch is not None)


def _stored(
    store: LabelStore, network: nn.Module, images: Tensor, epochs: Iterable[int], batch: int
) -> Iterator[int | None]:
    """Label as `label_epochs` does, for images that the caller knows to be those of the store.

    Also yields `None` after each batch. Holds the views and logits of one epoch in memory.
    """
    for epoch in epochs:
        if not store.holds(epoch):
            records = list[LabelRecords]()
            for each in _labelled(store.info, network, images, epoch, batch):
                records.append(each)
                yield None
            store.write_epoch(epoch, records)
        yield epoch


def _labelled(info: LabelInfo, network: nn.Module, images: Tensor, epoch: int, batch: int) -> Iterator[LabelRecords]:
    """Views and logits of all images in one epoch, as records for the store, one batch at a time."""
    drawn = draw_views(info.seed, epoch, info.images, info.size, **info.augmentation)
    for first in range(0, info.images, batch):
        views = drawn.take(slice(first, first + batch))
        logits = teacher_logits(network, images, views, batch)
        values, indices = pack_logits(logits, info.top, info.temperature)
        boxes, flips, partners = views.boxes, views.flips, views.partners
        yield LabelRecords(boxes, flips, partners, views.lambdas, views.mix_boxes, values, indices)


LABELS, COSTS = "labels", "costs"
"""Names of the folder of label stores in a run's folder, and of the folder of cost files in each label store."""


def labels_location(folder: Location, config: RunConfig, dataset_fingerprint: str) -> Location:
    """Location of the label store that a recipe asks for, a folder in labels/ of the run's folder `folder`.

    The folder's name depends on the teacher, `evaluate.cutmix` and `evaluate.top_logits`, with the latter also on
    `evaluate.temperature`. It does not depend on how many epochs are trained or kept, unless an earlier version of this
    package made a store for these numbers.
    """
    settings = config.evaluate
    facts = settings.model_dump(include={"top_logits", "cutmix"})
    facts |= {"temperature": settings.temperature} if settings.top_logits else {}
    facts |= {"teacher": expert_fingerprint(teacher_of(config), dataset_fingerprint)}
    # Earlier versions made a store for each number of epochs. A recipe that made such a store still uses it.
    before = {"keep_labels": settings.keep_labels, "epochs": scoring_schedule(config.evaluate, 1.0).epochs}
    earlier = folder / LABELS / stable_hash(facts | before)
    return earlier if (earlier / INFO_FILE).exists() else folder / LABELS / stable_hash(facts)


def missing_epochs(folder: Location, config: RunConfig, dataset_fingerprint: str) -> list[int]:
    """Numbers of the epochs, from 0 and sorted, for which the finished set in the run's folder still lacks labels."""
    stored = set(LabelStore(labels_location(folder, config, dataset_fingerprint)).epochs())
    return [epoch for epoch in range(kept_labels(config)) if epoch not in stored]


def kept_labels(config: RunConfig) -> int:
    """Number of epochs for which a run stores labels: `evaluate.keep_labels`, or all epochs of the training."""
    return config.evaluate.keep_labels or scoring_schedule(config.evaluate, 1.0).epochs


def labels_cost(place: Location, keep: int) -> Spent:
    """Cost of making the labels of the first `keep` epochs so far, over all workers and attempts; zero without labels.

    If an attempt labelled other epochs too, the counted share of its cost is the share of its epochs that are among the
    first `keep`. Attempts of earlier versions, which did not record their epochs, count in full.

    Args:
        place: folder of the label store.

    Raises:
        CorruptFileError: the cost file of an attempt is damaged.
    """
    return total(_cost_of(place / COSTS / name, keep) for name in (place / COSTS).list())


def _cost_of(note: Location, keep: int) -> Spent:
    """Part of one attempt's cost, read from its cost file `note`, that counts for the first `keep` epochs."""
    content = note.read_json()
    with rejecting_nonsense(note):
        spent, epochs = Spent.from_json(content), list(content.get("epochs", []))
        return spent.share(sum(int(epoch) < keep for epoch in epochs) / len(epochs)) if epochs else spent


def drawn_labels(config: RunConfig, network: nn.Module, images: Tensor) -> DrawnLabels:
    """Labels for images of a control (random real images, to compare with the distilled set), computed when needed.

    The labels are made as those of the run's distilled set are: with the same views, epochs and numbers of logits.

    Args:
        network: the teacher, on the device of the training.
        images: [n c h w] the control's images, as many as the set has; on the same device or in main memory.
    """
    options = {**_options(config.evaluate), "at_once": config.evaluate.micro_batch}
    return DrawnLabels(network, images, config.seed, kept_labels(config), **options)


def _options(settings: EvaluateConfig) -> dict[str, Any]:
    """Keyword arguments of `create_labels` for a run: how images are seen, and which logits are kept of each view."""
    temperature = settings.temperature if settings.top_logits else 1.0
    return {"top": settings.top_logits, "temperature": temperature, "views": VIEWS | {"mix": settings.cutmix}}


def labelling_bytes(config: RunConfig, shape: DataShape, images: int) -> int:
    """Estimated peak bytes that labelling takes in its device's memory, beside the set's images and the process.

    Args:
        images: number of images of the set.
    """
    teacher, rows = network_cost(teacher_of(config), shape), min(LABELLED, images)
    views = rows * (2 * teacher.largest + VIEW_COPIES * shape.row)
    return math.ceil(MARGIN * (views + 2 * 4 * teacher.parameters))


def planned_labels(config: RunConfig, shape: DataShape) -> LabelInfo:
    """Facts about the label store of a run that stores labels, as they are known before the set is made."""
    images, classes, top = shape.synthetic(config), shape.classes, config.evaluate.top_logits
    epochs, top = scoring_schedule(config.evaluate, 1.0).epochs, None if top is None or top >= classes else top
    keep = min(kept_labels(config), epochs)
    return LabelInfo("", "", images, classes, shape.image[1:], epochs, keep, config.seed, top)


def records_bytes(config: RunConfig, shape: DataShape) -> int:
    """Estimated bytes of main memory for one epoch's views and logits, which a worker holds until it stores them.

    Views are drawn for all images of the set at once.
    """
    info = planned_labels(config, shape)
    return math.ceil(MARGIN * info.images * (DRAWN_BYTES + info.record_bits / 8))


_Labelling = tuple[LabelStore, Tensor, nn.Module]
"""Label store of a set, the set's images [n c h w], and the teacher that labels them."""


class LabelWorker:
    """Worker that labels sets of one data set with trained networks."""

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device, self._cluster, self._dataset = prepare_device(cluster), cluster, dataset
        self._kept: tuple[tuple[RunConfig, str, str], _Labelling] | None = None
        """Label store, images and teacher of the last task, after a key (run, store of the teacher, folder of the run);
        `None` before the first task."""

    def label(self, config: RunConfig, store_uri: str, folder_uri: str, epochs: Sequence[int]) -> Iterator[Event]:
        """Store a teacher's labels of a finished set for some epochs. Stored epochs stay unchanged.

        Args:
            config: recipe of the run.
            store_uri: store of the teacher.
            folder_uri: folder of the run.
            epochs: numbers of the epochs to store, from 0; not empty.

        Raises:
            MissingExpertsError: the store does not hold the teacher.
            StoreError: a logit does not fit into float16, or the folder cannot be written.
        """
        account, folder = Account(self._device, self._cluster), open_location(folder_uri)
        key = (config, store_uri, folder_uri)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # frees the last set before the next one is read
            self._kept = key, self._opened(config, store_uri, folder)
        store, images, network = self._kept[1]
        yield Progress(0, len(epochs))
        note = store.location / COSTS / f"{epochs[0]:05d}-{secrets.token_hex(4)}.json"  # one for each attempt
        labelled, done = _stored(store, network, images, epochs, LABELLED), 0
        for epoch in with_heartbeats(labelled, interval_in_epochs(self._cluster)):
            if epoch is None:
                yield Phase("labelling an epoch")
                continue
            done += 1
            note.write_json({**account.spent().to_json(), "epochs": list(epochs[:done])})
            yield Progress(done, len(epochs), saved=True)
        yield Finished()

    def _opened(self, config: RunConfig, store_uri: str, folder: Location) -> _Labelling:
        """Read a set and its teacher, and create or open the store of its labels."""
        images = read_artifact(folder / SYNTHETIC).images
        teacher = ExpertNetworks(teacher_of(config), self._dataset, store_uri, self._device)
        store = create_labels(
            labels_location(folder, config, self._dataset.fingerprint),
            images,
            self._dataset.classes,
            teacher.group.key.fingerprint,
            epochs=scoring_schedule(config.evaluate, 1.0).epochs,
            keep=kept_labels(config),
            **_options(config.evaluate),
            seed=config.seed,
        )
        network = network_on(teacher.restored(0), self._device, self._cluster)
        shape = DataShape(self._dataset.image_shape, self._dataset.classes, 0)
        beside = labelling_bytes(config, shape, len(images))
        return store, set_on(images, self._device, beside), network
