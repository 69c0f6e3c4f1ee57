"""Experts as networks: restored from the store, and what they say of real images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datm_ray.config import RunConfig
from datm_ray.core.networks import build_network
from datm_ray.core.parameters import unflatten_buffers_into, unflatten_into
from datm_ray.core.synthetic import mean_correct_logits
from datm_ray.core.training import Pulse, no_pulse, predict_logits
from datm_ray.data.dataset import Dataset
from datm_ray.errors import MissingExpertsError
from datm_ray.runtime.devices import to_device
from datm_ray.runtime.experts import expert_group, network_spec


class ExpertNetworks:
    """The experts of one network as networks: their snapshots, and logits of real images from the last ones."""

    def __init__(self, config: RunConfig, dataset: Dataset, store_uri: str, device: torch.device) -> None:
        self.group = expert_group(store_uri, config, dataset.name, dataset.fingerprint)
        self.count = config.experts.count
        self._require_all(config)
        spec = network_spec(config, dataset.channels, dataset.size, dataset.classes)
        self.network = build_network(spec, seed=0).to(device)
        self._last_epoch = config.experts.epochs
        self._device = device

    def _require_all(self, config: RunConfig) -> None:
        available = sum(expert < self.count for expert in self.group.experts())
        if available < self.count:
            raise MissingExpertsError(
                f"{self.group.location.uri} holds {available} of the {self.count} experts that {config.name} needs",
                "expert training has not finished for this recipe",
                f"run `datm-ray experts {config.name}` with the same --out and --store",
            )

    def restored(self, expert: int) -> nn.Module:
        """The network as an expert left it; the same module for every expert."""
        last = self.group.read_snapshot(expert, self._last_epoch)
        unflatten_into(self.network, to_device(last.params, self._device))
        unflatten_buffers_into(self.network, to_device(last.buffers, self._device))
        return self.network

    def logits(self, expert: int, images: Tensor, pulse: Pulse = no_pulse) -> Tensor:
        """Logits [n k] of an expert's last snapshot; `pulse` is called as they are computed."""
        return predict_logits(self.restored(expert), images, pulse)

    def soft_labels(self, images: Tensor, labels: Tensor, pulse: Pulse = no_pulse) -> Tensor:
        """Soft labels [n k]: the mean logits of the experts that classify each image correctly."""
        return mean_correct_logits((self.logits(expert, images, pulse) for expert in range(self.count)), labels)
