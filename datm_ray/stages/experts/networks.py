"""Experts as networks: restored from the store, with their logits and soft labels of real images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datm_ray.config import RunConfig
from datm_ray.core.networks.parameters import unflatten_buffers_into, unflatten_into
from datm_ray.core.networks.registry import build_network
from datm_ray.core.steps import Steps
from datm_ray.core.synthetic import mean_correct_in_steps
from datm_ray.core.training.loop import logits_in_steps
from datm_ray.data.dataset import Dataset
from datm_ray.errors import MissingExpertsError
from datm_ray.runtime.machine.devices import to_device
from datm_ray.stages.experts.train import expert_group


class ExpertNetworks:
    """Experts of one backbone as networks, with the parameters after their last or another stored epoch.

    The constructor raises a `MissingExpertsError` if the store lacks any of the recipe's experts.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, store_uri: str, device: torch.device) -> None:
        self.group = expert_group(store_uri, config, dataset.name, dataset.fingerprint)
        self.count = config.experts.count
        self._require_all(config)
        spec = config.network.for_images(dataset.channels, dataset.size, dataset.classes)
        self.network = build_network(spec, seed=0).to(device)
        self._last_epoch = config.experts.epochs
        self._device = device
        self._restored: tuple[int, int] | None = None
        """Expert and epoch whose snapshot the network has; `None` for random parameters."""

    def _require_all(self, config: RunConfig) -> None:
        available = sum(expert < self.count for expert in self.group.experts())
        if available < self.count:
            raise MissingExpertsError(
                f"{self.group.location.uri} holds {available} of the {self.count} experts that {config.name} needs",
                "expert training has not finished for this recipe",
                f"run `datm-ray experts {config.name}` with the same --set, --out and --store",
            )

    def restored(self, expert: int, epoch: int | None = None) -> nn.Module:
        """Network with the parameters of an expert after an epoch.

        Every call returns the same module, with other parameters. Parameters that the module has from the call before
        are not read again. So callers must not change parameters.

        Args:
            expert: number of the expert, from 0.
            epoch: a stored epoch; `None` for the last.

        Raises:
            StoreError: the epoch is not stored.
        """
        wanted = expert, self._last_epoch if epoch is None else epoch
        if self._restored != wanted:
            held, self._restored = self.group.read_snapshot(*wanted), None
            unflatten_into(self.network, to_device(held.params, self._device))
            unflatten_buffers_into(self.network, to_device(held.buffers, self._device))
            self._restored = wanted
        return self.network

    def logits_in_steps(self, expert: int, images: Tensor) -> Steps[Tensor]:
        """Compute the logits [n k] of images [n c h w] by an expert after its last epoch. Yields after each batch."""
        return (yield from logits_in_steps(self.restored(expert), images))

    def soft_labels(self, images: Tensor, labels: Tensor) -> Steps[Tensor]:
        """Compute soft labels [n k] of images [n c h w]: mean logits of the experts that classify an image correctly.

        An image that no expert classifies as in `labels` [n] gets the mean over all experts. Yields after each batch.
        """
        every = (self.logits_in_steps(expert, images) for expert in range(self.count))
        return (yield from mean_correct_in_steps(every, labels))
