"""Priors in the store: training of an autoencoder as a task of its own, and the prior that a distillation uses.

    <store>/<data set>/prior/<fingerprint>/prior.arrow       the trained autoencoder
    <store>/<data set>/prior/<fingerprint>/progress.arrow    its state after the last saved epoch; only while unfinished

A killed task resumes from the last saved epoch, with bit-identical results. Two workers that train the same prior at
the same time write the same numbers, and each file is replaced whole. Tests: tests/stages/test_prior.py.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.config import ClusterConfig, PriorConfig, RunConfig, prior_fingerprint
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.parameters import unflatten_into
from datm_ray.core.prior import (
    Autoencoder,
    AutoencoderState,
    Prior,
    build_autoencoder,
    build_decoder,
    draw_latents,
    latent_shape,
    micro_batch,
    train_autoencoder,
)
from datm_ray.core.steps import Steps
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.data.dataset import Dataset
from datm_ray.errors import CorruptFileError, DivergenceError, MissingExpertsError, StoreError
from datm_ray.monitor.logs import fields
from datm_ray.monitor.spent import Account, Spent
from datm_ray.runtime.executor import Event, Finished, Progress
from datm_ray.runtime.heartbeats import interval_in_epochs, with_heartbeats, within_epoch
from datm_ray.runtime.machine.devices import prepare_device, to_device
from datm_ray.runtime.stopping import Interrupted, saving
from datm_ray.stages.experts.progress import WRITE_SHARE
from datm_ray.stages.experts.train import group_in_store
from datm_ray.stages.methods.part import Part
from datm_ray.store.files.filesystem import Location
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import PRIOR_FILE, PRIOR_PROGRESS

PRIOR_COST = "prior-cost.json"
"""Name of the file with the prior's cost in the folder of a run."""
KIND = "prior"
SAVED = ("parameters", "first", "second")
"""Vectors of an `AutoencoderState` that are saved (parameters and Adam's moments), in the order of its fields."""


_log = logging.getLogger(__name__)


def prior_folder(store_uri: str, config: RunConfig, dataset: str, dataset_fingerprint: str) -> Location:
    """Folder of a run's trained prior in the store."""
    fingerprint = prior_fingerprint(config, dataset_fingerprint)
    return group_in_store(store_uri, dataset, KIND, fingerprint).location


def note_prior_cost(folder: Location, prior: Location) -> None:
    """Write the cost of a trained prior into a run's folder.

    Args:
        folder: folder of the run.
        prior: folder of the prior in the store.

    Raises:
        MissingFileError: the prior is not trained.
        CorruptFileError: the prior's file is damaged.
    """
    file = read_tensors(prior / PRIOR_FILE, kind=KIND)
    with rejecting_nonsense(prior / PRIOR_FILE):
        (folder / PRIOR_COST).write_json(Spent.from_json(file.metadata["spent"]).to_json())


def read_prior_cost(folder: Location) -> Spent | None:
    """Cost of a run's trained prior, from the run's folder; `None` without the file.

    Raises:
        CorruptFileError: the file of the cost is damaged.
    """
    place = folder / PRIOR_COST
    if not place.exists():
        return None
    with rejecting_nonsense(place):
        return Spent.from_json(place.read_json())


def is_trained(config: RunConfig) -> bool:
    """True if a run needs a trained prior from the store."""
    return config.prior is not None and config.prior.kind == "trained"


def described_prior(config: RunConfig) -> str:
    """Text for plans: the training of a run's prior; "" if the run trains none."""
    return f"a decoder, trained for {config.prior.epochs:,} epochs" if config.prior and is_trained(config) else ""


class PriorWorker:
    """Trains priors on one data set."""

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device = prepare_device(cluster)
        self._cluster, self._dataset = cluster, dataset

    def train(self, config: RunConfig, store_uri: str) -> Iterator[Event]:
        """Train the autoencoder whose decoder makes a run's images from latents, and store it.

        The training resumes from the last saved epoch. Nothing is trained if the autoencoder is stored already. Yields
        progress.

        Raises:
            DivergenceError: the error of the reconstructed pixels is not finite.
            StoreError: the store cannot be written.
            Interrupted: the work was asked to stop, and is saved.
        """
        assert config.prior is not None
        dataset, account = self._dataset, Account(self._device, self._cluster)
        folder = prior_folder(store_uri, config, dataset.name, dataset.fingerprint)
        if not (folder / PRIOR_FILE).exists():
            yield from self._train(config, config.prior, folder, account)
        with suppress(StoreError):  # another worker has removed it
            if (folder / PRIOR_PROGRESS).exists():
                (folder / PRIOR_PROGRESS).remove()
        yield Finished(metrics=account.metrics())

    def _train(self, config: RunConfig, settings: PriorConfig, folder: Location, account: Account) -> Iterator[Event]:
        network = build_autoencoder(settings, self._dataset.image_shape, config.seed).to(self._device)
        state, spent = self._resumed(folder / PRIOR_PROGRESS, network)
        due, error = time.monotonic() + self._cluster.checkpoint_seconds, math.nan
        count, pixels = len(self._dataset.train_labels), self._pixels(settings.batch_size)
        steps = train_autoencoder(network, pixels, count, settings, config.seed, state)
        saved_epoch = state.epoch
        with saving() as is_asked:
            for found in with_heartbeats(steps, interval_in_epochs(self._cluster)):
                if found is None:
                    yield within_epoch(partial("epoch {} of {}".format, saved_epoch, settings.epochs))
                    continue
                error = found
                if not math.isfinite(error):
                    raise DivergenceError(
                        f"the prior diverged in epoch {state.epoch}: its squared error is {error}",
                        "the learning rate is too high for these images",
                        "lower prior.learning_rate",
                    )
                is_saved = is_asked() or time.monotonic() > due
                if is_saved:
                    began = time.monotonic()
                    spent += account.lap()
                    _write(folder / PRIOR_PROGRESS, state, spent)
                    saved_epoch = state.epoch
                    ended = time.monotonic()
                    due = ended + max(self._cluster.checkpoint_seconds, (ended - began) / WRITE_SHARE)
                yield Progress(state.epoch, settings.epochs, {"error": error}, account.metrics(), saved=is_saved)
                if is_asked():
                    raise Interrupted(f"epoch {state.epoch} of {settings.epochs}")
        unflatten_into(network, state.parameters)
        arrays = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
        metadata = {
            "dataset_fingerprint": self._dataset.fingerprint,
            "prior": settings.model_dump(),
            "seed": config.seed,
            "squared_error": None if math.isnan(error) else error,
            "spent": (spent + account.lap()).to_json(),
        }
        write_tensors(folder / PRIOR_FILE, arrays, kind=KIND, metadata=metadata)
        _log.info("prior stored %s", fields(run=config.name, place=folder.uri, squared_error=error))

    def _pixels(self, rows_at_a_time: int) -> Callable[[NDArray[np.int64]], Tensor]:
        """Function from indices of training images to these images [b c h w], 0 for black and 1 for white.

        Whitened images are converted back once, not in every epoch. Streamed images are never whitened.

        Args:
            rows_at_a_time: number of images that are converted together.
        """
        images, transform = self._dataset.train_images, self._dataset.transform
        if transform.kind != "zca" or not isinstance(images, np.ndarray):
            return lambda rows: transform.denormalise(to_device(images[rows], self._device))
        pixels = np.empty_like(images)
        for start in range(0, len(images), rows_at_a_time):
            part = slice(start, start + rows_at_a_time)
            pixels[part] = transform.denormalise(to_device(images[part], self._device)).cpu().numpy()
        return lambda rows: to_device(pixels[rows], self._device)

    def _resumed(self, place: Location, network: nn.Module) -> tuple[AutoencoderState, Spent]:
        """State of the last saved epoch, and the cost so far; a new state if the saved one is missing or damaged.

        What a damaged state had cost is unknown, so the cost is partial.
        """
        new = AutoencoderState.initial(network)
        if not place.exists():
            return new, Spent()
        try:
            file = read_tensors(place, kind=KIND)
            with rejecting_nonsense(place):
                parameters, first, second = (torch.tensor(file.arrays[name], device=self._device) for name in SAVED)
                if not parameters.shape == first.shape == second.shape == new.parameters.shape:
                    raise ValueError("it does not hold as many numbers as the autoencoder has parameters")
                saved = AutoencoderState(parameters, first, second, int(file.metadata["epoch"]))
                return saved, Spent.from_json(file.metadata["spent"])
        except CorruptFileError:
            place.remove()
        return new, Spent(is_partial=True)


def _write(place: Location, state: AutoencoderState, spent: Spent) -> None:
    """Replace the saved state of a prior's training, with its cost so far."""
    vectors = {name: getattr(state, name).cpu().numpy() for name in SAVED}
    write_tensors(place, vectors, kind=KIND, metadata={"epoch": state.epoch, "spent": spent.to_json()})


def read_autoencoder(place: Location, network: Autoencoder) -> dict[str, Any]:
    """Read a trained prior's parameters from the file `place` into `network`, in place. Returns the file's metadata.

    Raises:
        MissingFileError: the file is missing.
        CorruptFileError: the file is damaged, or has parameters of another network.
    """
    file = read_tensors(place, kind=KIND)
    with rejecting_nonsense(place):
        try:
            network.load_state_dict({name: torch.tensor(array) for name, array in file.arrays.items()})
        except RuntimeError as error:  # torch's only error for names and shapes
            raise ValueError(str(error).partition("\n")[0]) from error
    return file.metadata


class PriorOfSet:
    """Prior of one distillation: its decoder, and how the first latents are found."""

    def __init__(self, part: Part) -> None:
        """Read the trained decoder from the store or, if the recipe asks for an untrained one, build it.

        Raises:
            MissingExpertsError: the store lacks the trained prior.
            ConfigError: the user's function (`prior.kind`) gives no decoder for these images.
        """
        config = part.config
        assert config.prior is not None
        self._part, self._settings = part, config.prior
        self._transform = part.dataset.transform
        self._encoder: Any = None
        decoder = build_decoder(config.prior, part.dataset.image_shape, config.seed)
        if is_trained(config):
            network = build_autoencoder(config.prior, part.dataset.image_shape, config.seed)
            self._read(network)
            decoder, self._encoder = network.decoder, network.to(part.device).requires_grad_(False).encode
        elif not config.prior.is_packaged:
            decoder = decoder.to(part.device)
            self._encoder = getattr(decoder, "encode", None)
        self._decoder, self._shape = decoder, latent_shape(decoder)
        chunk = micro_batch(image_cost(decoder, self._shape))
        self.prior = Prior.of(decoder.to(part.device), self._transform.normaliser().to(part.device), chunk)

    @cached_property
    def digest(self) -> str:
        """Digest of the decoder's parameters and buffers, as 16 hex digits."""
        values = [value.detach().cpu().numpy() for value in self._decoder.state_dict().values()]
        return sha256(b"".join(np.ascontiguousarray(value).tobytes() for value in values)).hexdigest()[:16]

    def _read(self, network: Autoencoder) -> None:
        part = self._part
        folder = prior_folder(part.store_uri, part.config, part.dataset.name, part.dataset.fingerprint)
        if not (folder / PRIOR_FILE).exists():
            raise MissingExpertsError(
                f"{folder.uri} holds no trained prior, which {part.config.name} needs",
                "its training has not finished for this recipe",
                f"run `datm-ray experts {part.config.name}` with the same --set, --out and --store",
            )
        read_autoencoder(folder / PRIOR_FILE, network)

    def start(self, first: SyntheticSet) -> Steps[SyntheticSet]:
        """Make the set before the first iteration: latents, and the images that the prior renders from these latents.

        The images are near those of `first`. All workers of the set call this together. Yields between steps.
        """
        mesh, latents = self._part.mesh, first.images.new_zeros(len(first.images), *self._shape)

        def find() -> Steps[None]:
            if mesh.row == 0:
                latents.copy_((yield from self._latents(first.images)))

        yield from mesh.in_steps(find())
        # Machines may round differently, so only the first row of workers computes. Workers of other rows add zeros,
        # and all get equal bits.
        latents = mesh.sum_over_backbones(latents)
        return dataclasses.replace(first, images=self.prior.render(latents), latents=latents)

    def _latents(self, images: Tensor) -> Steps[Tensor]:
        """Find latents [n l a b] from which the prior renders images near the given ones. Yields between steps.

        The prior's encoder gives them. Without an encoder, an inversion (Adam on the images' squared error) finds them.

        Args:
            images: [n c h w] normalised images.
        """
        if self._encoder is not None:
            found = []
            for part in self._transform.denormalise(images).split(self.prior.chunk):
                with torch.no_grad():
                    found.append(self._encoder(part))
                yield
            return torch.cat(found)
        drawn = self._drawn().to(images.device)
        return (yield from self.prior.invert(images, drawn, self._settings.inversion_steps))

    def _drawn(self) -> Tensor:
        """Random latents for this worker's images, cut from latents that are drawn for the whole set."""
        part, ipc = self._part, self._part.config.distill.ipc
        whole = torch.from_numpy(draw_latents((ipc * part.dataset.classes, *self._shape), part.config.seed))
        if part.piece is not None:
            return whole[torch.from_numpy(part.piece.rows(ipc))]
        return whole[part.rows.first : part.rows.last]
