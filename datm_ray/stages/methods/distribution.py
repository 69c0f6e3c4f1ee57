"""Distribution matching (DM) in one worker: fresh networks, and real images of the worker's classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datm_ray.config import RunConfig
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.networks.registry import embedding
from datm_ray.core.synthetic import AllSum, SyntheticSet
from datm_ray.core.training.loop import Heartbeat
from datm_ray.methods.distribution import distance_and_gradient, draw_shared
from datm_ray.stages.methods.base import Demand, Method
from datm_ray.stages.methods.memory import chunk_by_trial, plans_of_part
from datm_ray.stages.methods.part import Part


class DistributionMatching(Method):
    """Matches mean embeddings of real and synthetic images in fresh networks. No network is trained beforehand."""

    reads_backbones = True
    can_continue = True
    gives_step_size = True  # the published one, 0.01

    @classmethod
    def epochs_read(cls, config: RunConfig) -> Sequence[int]:
        """Epochs of each expert that a run reads: the last one alone, for MetaDD and for labels."""
        return (config.experts.epochs,)

    @classmethod
    def demand(cls, config: RunConfig, classes: int, shards: int, cost: ImageCost) -> Demand:
        """Work and memory of an iteration, for the worker with the most classes.

        Its real and synthetic images pass the network once for the means, synthetic images once more for the gradient.
        """
        settings, own = config.distill, -(-classes // shards)
        passes = {"scoring": own * (settings.real_batch + settings.ipc), "training": own * settings.ipc}
        return Demand(passes, at_once=max(settings.real_batch, settings.ipc), maps=2, vectors=2)

    @classmethod
    def described(cls, config: RunConfig, images: int, chunk: int) -> str:
        """Text for plans: the numbers of iterations, synthetic images and real images."""
        settings, real = config.distill, config.distill.real_batch * images // config.distill.ipc
        through = f"{images:,} synthetic and up to {real:,} real images through a fresh network"
        return f"{settings.iterations:,} iterations of {through}, in micro-batches of {chunk:,}"

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self._plans = plans_of_part(part, compiled=False)
        self._chunks = {number: plan.chunk for number, plan in self._plans.items()}

    def prepare(self, heartbeat: Heartbeat) -> None:
        """On a GPU, find by trial how many images of a micro-batch fit into its memory. On a CPU, do nothing."""
        for number, plan in self._plans.items():
            network = self.fresh_network(0, number).requires_grad_(False)

            def step(chunk: int, network: torch.nn.Module = network) -> None:
                images = torch.zeros(chunk, *self.part.image, device=self.part.device, requires_grad=True)
                torch.autograd.grad(embedding(network, images).sum(), images)

            if self.part.device.type == "cuda":
                self._chunks[number] = chunk_by_trial(step, plan, self.part.device)
            heartbeat()

    def gradient(self, synthetic: SyntheticSet, iteration: int, all_sum: AllSum) -> tuple[Tensor, Tensor]:
        """Compute the weighted distances between mean embeddings of real and synthetic images, and their gradient.

        The distances are summed over this worker's classes and backbones. The gradient is in the images [n c h w].
        """
        config, settings, images = self.part.config, self.part.config.distill, synthetic.images
        labels = self.part.rows.classes(settings.ipc)
        real = [self.real_images(label, settings.real_batch, iteration) for label in labels]
        drawn = [draw_shared(settings.augmentation, config.seed, iteration, label) for label in labels]
        loss, total = images.new_zeros(()), torch.zeros_like(images)
        for number, chunk in self._chunks.items():
            network = self.fresh_network(iteration, number).requires_grad_(False)
            distance, gradient = distance_and_gradient(network, images, real, drawn, chunk)
            loss += config.weights[number] * distance
            total += config.weights[number] * gradient
        return loss, total
