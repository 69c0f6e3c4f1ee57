"""Choice of real images (method select) in one worker, class by class and without iterations."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.config import RunConfig, with_settings
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.networks.registry import build_network, embedding
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.loop import SCORING_BATCH, in_batches
from datm_ray.data.sources import RawDataset
from datm_ray.errors import ConfigError
from datm_ray.methods.selection import Scores, Work, drawn_order, forgetting_scores, keep, moderate_scores
from datm_ray.stages.experts.difficulty import mean_el2n
from datm_ray.stages.methods.base import ALONE, Demand, Method
from datm_ray.stages.methods.first_images.crops import check_crops, check_images_for_crops, chosen_crops, crops_scored
from datm_ray.stages.methods.part import Piece
from datm_ray.store.trajectories import epochs_in_words

MOST_PIECES = 32
"""Largest number of pieces into which a set is divided, each made by one worker. Every piece reads several networks
again, so more pieces would be slow."""
LEAST_EPOCHS = 3
"""Smallest number of stored epochs, inclusive and without epoch 0, for which forgetting can be counted."""

Rows = Mapping[int, NDArray[np.int64]]
"""Class -> indices of its real training images, in the order that `drawn_order` gives."""


class Selection(Method):
    """Chooses real images at random, or by scores that a teacher or all experts of `network` give the images."""

    batch_norm = "either"
    trains = "first"  # expert 0 is the teacher and labels the set; el2n and forgetting use all experts
    soft_labels = True
    has_iterations = False
    has_teacher = True

    @classmethod
    def epochs_read(cls, config: RunConfig) -> Sequence[int]:
        """Numbers of the epochs that a run reads: all for forgetting, otherwise the last and `select.epoch`."""
        if config.select.by == "forgetting":
            return config.kept_epochs
        return (config.select.epoch or config.experts.epochs, config.experts.epochs)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise a `ConfigError` for a recipe that the method cannot follow, such as an unstored `select.epoch`."""
        super().check(config)
        _check_select(config)

    @classmethod
    def check_images(cls, config: RunConfig, images: RawDataset) -> None:
        """Raise a `DatmError` for images that cannot be chosen by `select.by`.

        rded rejects too few images per class, and images that do not divide into tiles. moderate rejects a network that
        gives no features.
        """
        if config.select.by == "rded":
            check_images_for_crops(config, images)
        if config.select.by == "moderate":
            spec = config.network.for_images(images.channels, images.size, images.classes)
            embedding(build_network(spec, seed=0).eval(), torch.zeros(1, images.channels, *images.size))

    @classmethod
    def pieces(cls, config: RunConfig, classes: int) -> Sequence[Piece]:
        """Pieces with about equally many classes: one piece per class, but at most `MOST_PIECES` pieces."""
        groups = np.array_split(np.arange(classes), min(classes, MOST_PIECES))
        images = range(config.distill.ipc)
        return [Piece(number, range(own[0], own[-1] + 1), images) for number, own in enumerate(groups)]

    @classmethod
    def demand(cls, config: RunConfig, classes: int, shards: int, cost: ImageCost) -> Demand:
        """Memory for scoring one batch of real images; no work, because the method has no iterations."""
        held = config.distill.ipc * max(len(piece.classes) for piece in cls.pieces(config, classes))
        return Demand({}, at_once=1, maps=1, vectors=1, held=held, trace=2 * SCORING_BATCH * cost.largest)

    @classmethod
    def choosing(cls, config: RunConfig, classes: int, training_images: int) -> Mapping[str, float]:
        """Work of choosing the images: kind of work -> images that pass a network.

        Crops of rded pass the teacher once, and an image is read once for all its crops. Otherwise an image passes
        one network (moderate), each expert (el2n), or each expert at each stored epoch (forgetting), and is read for
        each pass. Chosen images are read once more, and soft labels add two passes of each.

        Args:
            training_images: number of training images, without validation images.
        """
        settings, count = config.select, config.experts.count
        passes = {
            "rded": crops_scored(config, classes, training_images),
            "moderate": training_images,
            "el2n": training_images * count,
            "forgetting": training_images * count * len(_epochs_of_training(config)),
            "random": 0,
        }[settings.by]
        images = config.distill.ipc * classes
        read = passes // (settings.crops if settings.by == "rded" else 1) + images
        return {"scoring": passes + 2 * images * config.distill.has_soft_labels, "reading": read}

    @classmethod
    def described(cls, config: RunConfig, images: int, chunk: int) -> str:
        """Text for plans: how many images are chosen, by which score."""
        settings = config.select
        crops = f": {settings.crops:,} crops of up to {settings.pool:,} images of a class"
        return f"{images:,} images chosen by {settings.by}{crops if settings.by == 'rded' else ''}, without iterations"

    def choose(self) -> Generator[None, None, SyntheticSet]:
        """Choose the images of this worker's piece (some classes) and return them with hard labels.

        Yields between steps. The task that joins the pieces may replace the labels, see `stages/distill/pieces.py`.
        """
        config, device = self.part.config, self.part.device
        images = yield from self._condensed() if config.select.by == "rded" else self._real()
        labels = torch.tensor(self.piece.classes, device=device).repeat_interleave(config.distill.ipc)
        return self.hard_labelled(images, labels)

    def _real(self) -> Generator[None, None, Tensor]:
        """Uncropped real images [n c h w] with the best scores, class by class; yields between scoring steps."""
        settings, seed = self.part.config.select, self.part.config.seed
        rows = {label: drawn_order(self._rows_of(label), seed, label) for label in self.piece.classes}
        score: Callable[[Rows], Work] = {
            "moderate": self._moderate,
            "el2n": self._el2n,
            "forgetting": self._forgetting,
            "random": _equal,
        }[settings.by]
        scores = yield from score(rows)
        hardest = settings.hardest and settings.by in ("el2n", "forgetting")
        ipc = self.part.config.distill.ipc
        return self._images(np.concatenate([own[keep(scores[k], ipc, hardest=hardest)] for k, own in rows.items()]))

    def _moderate(self, rows: Rows) -> Work:
        network, found = self._network(0), dict[int, Scores]()
        for label, own in rows.items():
            features = yield from self._computed(lambda images: embedding(network, images), own)
            found[label] = moderate_scores(features.numpy())
        return found

    def _el2n(self, rows: Rows) -> Work:
        count, epoch = self.experts[0].count, self.part.config.select.epoch
        networks = (self._network(expert, epoch) for expert in range(count))
        return (yield from mean_el2n(networks, count, rows, self._images))

    def _forgetting(self, rows: Rows) -> Work:
        count, found = self.experts[0].count, {label: np.zeros(len(own)) for label, own in rows.items()}
        for expert in range(count):
            correct: dict[int, list[NDArray[np.bool_]]] = {label: [] for label in rows}
            for epoch in _epochs_of_training(self.part.config):
                network = self._network(expert, epoch)
                for label, own in rows.items():
                    logits = yield from self._computed(network, own)
                    correct[label].append((logits.argmax(dim=1) == label).numpy())
            for label in rows:
                found[label] += forgetting_scores(np.stack(correct[label])) / count
        return found

    def _condensed(self) -> Generator[None, None, Tensor]:
        """Images [n c h w], tiled from the crops of lowest loss, class by class; yields between scoring steps."""
        network, found, every = self._network(0), list[Tensor](), range(self.part.config.distill.ipc)
        for label in self.piece.classes:
            found.append((yield from chosen_crops(self.part, network, label)).images(self.part, every))
        return torch.cat(found)

    def _network(self, expert: int, epoch: int | None = None) -> nn.Module:
        return self.experts[0].restored(expert, epoch).eval()

    def _images(self, rows: NDArray[np.int64]) -> Tensor:
        """Real training images [n c h w] at these indices, on the device."""
        return torch.from_numpy(self.part.dataset.train_images[rows]).to(self.part.device)

    def _computed(self, function: Callable[[Tensor], Tensor], rows: NDArray[np.int64]) -> Generator[None, None, Tensor]:
        """Values of `function` for the real images at the indices `rows`, in main memory; yields between batches."""
        return in_batches(lambda batch: function(self._images(batch)), rows)


CORESETS = ("moderate", "el2n", "forgetting")
"""Values of `select.by` for coresets, the chosen real images with which a table compares a distilled set."""


def coresets_of(config: RunConfig, say: Callable[[str], object] = lambda _: None) -> list[RunConfig]:
    """Runs that choose real images, one for each of `CORESETS`: as many as the run's set has, with the same labels.

    The new runs share the run's experts, teacher and controls. If the run has a prior or several backbones, they have
    random images of their own, and no row on all real data. Their recipes omit what changes images or uses several
    workers per set. A run of a coreset gets the other ones. Forgetting is left out if too few epochs are stored.

    Args:
        say: shows a message about a choice that is left out, with what to do.
    """
    from datm_ray.stages.methods.registry import method_of

    left_out: dict[str, Any] = {"metadd": None, "prior": None, "backbones": [], "distill.options": {}}
    left_out |= {f"cluster.{key}": value for key, value in ALONE.items()}
    if config.prior is not None or config.backbones:
        left_out |= {"evaluate.full": False, "evaluate.fair": False}
    if not method_of(config).has_soft_labels(config):
        left_out["distill.labels"] = "hard"
    if config.cluster.precision == "bfloat16":  # for the distillation alone
        left_out["cluster.precision"] = "auto"
    chosen = [by for by in CORESETS if config.method != "select" or by != config.select.by]
    named = [{"name": f"{config.name}-{by}", "method": "select", "select.by": by} for by in chosen]
    found = []
    for each in named:
        coreset = with_settings(config, left_out | each)
        if lacking := _lacking_epochs(coreset):
            say(f"{coreset.name} is left out: {lacking}")
        else:
            found.append(coreset)
    return found


def _check_select(config: RunConfig) -> None:
    """Raise a `ConfigError` if values of `select` contradict each other or the stored epochs of the experts."""
    settings, stored = config.select, config.kept_epochs
    if settings.by == "rded":
        check_crops(config)
    if settings.by == "el2n" and settings.epoch is not None and settings.epoch not in stored:
        raise ConfigError(
            f"select.epoch is {settings.epoch}, and experts store {epochs_in_words(stored)}",
            "experts.keep_epochs and experts.epochs decide which epochs there are",
            f"use a stored epoch, or --set experts.keep_epochs={settings.epoch}",
        )
    if lacking := _lacking_epochs(config):
        raise lacking


def _lacking_epochs(config: RunConfig) -> ConfigError | None:
    """Error if `select.by` is forgetting and the experts store too few epochs for it; `None` if all is well."""
    trained = _epochs_of_training(config)
    if config.select.by != "forgetting" or len(trained) >= LEAST_EPOCHS:
        return None
    return ConfigError(
        f"select.by is 'forgetting', and experts store {epochs_in_words(trained)} of their training",
        "an image is forgotten from one stored epoch to the next",
        f"use --set experts.keep_epochs={max(LEAST_EPOCHS, config.experts.epochs)}, and as many experts.epochs, "
        "before they are trained or with another --store",
    )


def _epochs_of_training(config: RunConfig) -> list[int]:
    """Stored epochs of the experts, without the untrained epoch 0."""
    return [epoch for epoch in config.kept_epochs if epoch > 0]


def _equal(rows: Rows) -> Work:
    """Give all images the same score, so that the drawn order decides."""
    yield
    return {label: np.zeros(len(own)) for label, own in rows.items()}
