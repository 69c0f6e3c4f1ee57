"""Distribution matching (DM) in one worker: fresh networks, and real images of the worker's classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from datm_ray.config import ClusterConfig, RunConfig
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.synthetic import AllSum, SyntheticSet
from datm_ray.core.training.loop import Heartbeat
from datm_ray.methods.distribution import EmbeddingFunctions, distance_and_gradient, draw_shared, even_size
from datm_ray.runtime.machine.devices import channels_last_on, precision_on
from datm_ray.stages.methods.base import Demand, Method
from datm_ray.stages.methods.memory import chunk_by_trial, plans_of_part
from datm_ray.stages.methods.part import Part

SLOW_READING = (
    "if this takes longer than computing, leave out dataset.streamed, or lower distill.real_batch or dataset.resize"
)
"""Advice for streamed images, which every iteration reads from their files again."""
DERIVATIVE = 2.4
"""Time to differentiate an image's embedding, as a multiple of the time to compute the embedding. Measured with a
compiled ConvNet of depth 3 and width 128 on one core, in float32 and bfloat16."""


class DistributionMatching(Method):
    """Matches mean embeddings of real and synthetic images in fresh networks. No network is trained beforehand."""

    reads_backbones = True
    can_continue = True
    gives_step_size = True  # the published one, 0.01
    reads_last_epoch = True  # for MetaDD and for labels
    precisions = ("auto", "float32", "tf32", "bfloat16")

    @classmethod
    def demand(cls, config: RunConfig, classes: int, shards: int, cost: ImageCost) -> Demand:
        """Work and memory of an iteration, for the worker with the most classes.

        The worker's real and synthetic images pass the network once for the means, and the synthetic images once more
        for the gradient.
        """
        settings, own = config.distill, -(-classes // shards)
        passes = {"embedding": own * (settings.real_batch + (1 + DERIVATIVE) * settings.ipc)}
        at_once, read = max(settings.real_batch, settings.ipc), own * settings.real_batch
        return Demand(passes, at_once=at_once, maps=2, vectors=2, read=read)

    @classmethod
    def described(cls, config: RunConfig, images: int, chunk: int) -> str:
        """Text for plans: the numbers of iterations, synthetic images and real images."""
        settings, real = config.distill, config.distill.real_batch * images // config.distill.ipc
        through = f"{images:,} synthetic and up to {real:,} real images through a fresh network"
        return f"{settings.iterations:,} iterations of {through}, in micro-batches of {chunk:,}"

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        cluster = part.config.cluster
        self._plans = plans_of_part(part, compiled=cluster.compile)
        self._functions = {
            number: embedding_functions(self.fresh_network(0, number).requires_grad_(False), cluster, part.device)
            for number in self._plans
        }
        self._sizes = {number: self._divided(plan.chunk) for number, plan in self._plans.items()}
        first = next(iter(self._functions.values()), None)
        self.preparation = "compiling embeddings" if first and first.is_compiled else ""
        self.facts = first.facts if first else {}
        self.notes = [*filter(None, [first.note]), *self._reading()] if first else []

    def _reading(self) -> Iterator[str]:
        """Yield a message if every iteration reads its real images from their files."""
        part = self.part
        if isinstance(part.dataset.train_images, np.ndarray):
            return
        read = part.config.distill.real_batch * len(part.rows.classes(part.config.distill.ipc))
        yield f"every iteration reads up to {read:,} images from their files for each network; {SLOW_READING}"

    def _divided(self, most: int) -> tuple[int, int]:
        """Numbers of a class's synthetic and of its real images in a micro-batch of at most `most` images."""
        settings, largest = self.part.config.distill, int(np.bincount(self.part.dataset.train_labels).max())
        return even_size(settings.ipc, most), even_size(min(settings.real_batch, largest), most)

    def prepare(self, heartbeat: Heartbeat) -> None:
        """Compile the embeddings. On a GPU, also find by trial how large a micro-batch may be for the GPU's memory."""
        for number, plan in self._plans.items():
            functions = self._functions[number]
            values = functions.values_of(self.fresh_network(0, number))

            def step(chunk: int, functions: EmbeddingFunctions = functions, values: Tensor = values) -> None:
                own, theirs = self._divided(chunk)
                for size in {own, theirs}:
                    gap = functions.forward(values, values.new_zeros(size, *self.part.dataset.image_shape), size)[0]
                    heartbeat()
                functions.reverse(values, values.new_zeros(own, *self.part.dataset.image_shape), gap, own)
                heartbeat()

            if self.part.device.type == "cuda":
                self._sizes[number] = self._divided(chunk_by_trial(step, plan, self.part.device))
            elif functions.is_compiled:
                step(plan.chunk)

    def images_seen(self) -> float:
        """Number of real and synthetic images that all networks of all workers see in one iteration."""
        settings, classes = self.part.config.distill, self.part.dataset.classes
        return len(self.part.config.weights) * classes * (settings.real_batch + settings.ipc)

    def gradient(self, synthetic: SyntheticSet, iteration: int, all_sum: AllSum) -> tuple[Tensor, Tensor]:
        """Compute the loss: weighted distances between mean embeddings of real and synthetic images.

        Returns the loss [], summed over this worker's classes and backbones, and the loss's gradient [n c h w] with
        respect to the synthetic images. `all_sum` is not called, because the loss is a sum over classes.
        """
        config, settings, images = self.part.config, self.part.config.distill, synthetic.images
        labels = self.part.rows.classes(settings.ipc)
        drawn = [draw_shared(settings.augmentation, config.seed, iteration, label) for label in labels]
        loss, total = images.new_zeros(()), torch.zeros_like(images)
        for number, functions in self._functions.items():
            values = functions.values_of(self.fresh_network(iteration, number))
            real = (self.real_images(label, settings.real_batch, iteration) for label in labels)
            distance, gradient = distance_and_gradient(functions, values, images, real, drawn, self._sizes[number])
            loss += config.weights[number] * distance
            total += config.weights[number] * gradient
        return loss, total


def embedding_functions(network: nn.Module, cluster: ClusterConfig, device: torch.device) -> EmbeddingFunctions:
    """Functions that compute embeddings by networks with the architecture of `network`, on the device.

    The section `cluster` decides if they are compiled, their memory order and their precision.
    """
    layout, precision = channels_last_on(cluster, device), precision_on(cluster, device)
    return EmbeddingFunctions(network, compiled=cluster.compile, channels_last=layout, precision=precision)
