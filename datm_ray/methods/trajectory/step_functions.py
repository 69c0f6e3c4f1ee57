"""The two functions of a student step: the student's gradient, and the derivative of this gradient.

    forward(theta, x, y, weights)     -> g = grad_theta l
    reverse(theta, x, y, weights, v)  -> s = <v, g> and its derivatives in theta, x and y

theta [p]: parameters. x [b c h w]: images. y [b k]: soft labels as logits. weights [b]: weights of the images in the
loss l, a weighted cross-entropy. v [p]: a given direction.

s is the derivative of the loss along v, so `reverse` can be computed in two ways. Reverse over forward differentiates
the loss along v, then backwards. Reverse over reverse differentiates the gradient backwards. Both are exact. Compiled,
reverse over forward was faster; uncompiled, reverse over reverse (benchmarks/LOG.md; CPUs only so far).

A function to compile is traced once for each number of images (`compilation.py`).
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import grad, grad_and_value, jvp

from datm_ray.core.compute.compilation import Compiled, compiled_facts, compiler_problem, traced
from datm_ray.core.compute.cuda_graphs import Replayed
from datm_ray.core.compute.precision import Precision, has_tf32, tf32_products
from datm_ray.core.compute.torch_compat import shapes_only
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.instance_norm import set_explicit
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import couples_samples
from datm_ray.core.training.loop import Heartbeat, no_heartbeat
from datm_ray.errors import ConfigError

Order = Literal["reverse-over-forward", "reverse-over-reverse"]
Reversed = tuple[Tensor, Tensor, Tensor, Tensor]
"""Result of `StudentStepFunctions.reverse`: s [], then its derivatives ds/dtheta [p], ds/dx [b c h w], ds/dy [b k]."""


REPLAYED_FLOP = 11 * 10**9
"""Largest number of operations of a call that is replayed as CUDA graphs if `StepOptions.graphs` is `None`.

Counted are operations of one forward pass of the call's images: 100 images of 32x32 in the published ConvNet have this
number. In larger calls kernels take longer than their launches, which replaying saves. The limit is assumed, not
measured."""


@dataclass(frozen=True)
class StepOptions:
    """Options for computing a student step. Apart from rounding, no option changes the result of the step."""

    compiled: bool = True
    """True to compile both functions if the machine can."""
    order: Order | None = None
    """Order of differentiation in `reverse`; `None` chooses the faster order. Compiled steps always get
    reverse-over-reverse if torch has no tangent, or a wrong one, for an operation such as layer normalisation."""
    channels_last: bool = True
    """True to keep images and feature maps in `torch.channels_last` format, which may make convolutions faster."""
    precision: Precision = "float32"
    """Precision of matrix products and convolutions. tf32 rounds their factors to 10 bits, on GPUs that support it.
    bfloat16 computes layers and their derivatives in bfloat16, with parameters and sums in float32."""
    graphs: bool | None = False
    """True to replay both functions as CUDA graphs, see `core/compute/cuda_graphs.py`, which needs a GPU. `None`: on a
    GPU, for calls of at most `REPLAYED_FLOP`."""


class StudentStepFunctions:
    """The functions of a student step: `forward` computes its gradient, `reverse` the derivative of this gradient.

    They are compiled if the options ask for it and the machine can.

    Attributes:
        network: copy of the given network, prepared for matching.
        note: one line on why the functions are not compiled although this was asked for; "" otherwise.

    Raises:
        ConfigError: the network has batch statistics, so that its gradient is no sum over the images of a batch.
    """

    def __init__(self, network: FlatNetwork, options: StepOptions | None = None) -> None:
        if couples_samples(network.module):
            raise ConfigError(
                "network.norm is 'batch', which cannot be a backbone for matching",
                "batch statistics couple the images of a batch, so its gradient is not a sum over images",
                "use network.norm=instance",
            )
        options = options or StepOptions()
        self.note = compiler_problem(network.device.type) if options.compiled else ""
        self._compiled = options.compiled and not self.note
        default: Order = "reverse-over-forward" if self._compiled else "reverse-over-reverse"
        self._order = options.order or default
        self._options = options
        if self._order == "reverse-over-forward":
            _load_tangent_rules()
        module = copy.deepcopy(network.module)
        set_explicit(module, self._compiled)
        self.network = FlatNetwork(module)
        self._built: dict[tuple[Any, ...], tuple[Callable[..., Tensor], Callable[..., Reversed]]] = {}

    @property
    def facts(self) -> dict[str, str | bool]:
        """Options in use: "precision", "tf32", "order", "channels_last", "compiled" and "not_compiled_because".

        The last is there only if compiling was asked for and is impossible. The first trace may change "order"; later
        traces do not.
        """
        precision = self._options.precision
        return {
            "precision": precision,
            "tf32": precision == "tf32" and has_tf32(self.network.device),
            "order": self._order,
            "channels_last": self._is_channels_last,
            **compiled_facts(self._compiled, self.note),
        }

    @property
    def are_replayed(self) -> bool:
        """True if all calls so far replayed CUDA graphs; False before the first call."""
        made = [each for pair in self._built.values() for each in pair]
        return bool(made) and all(isinstance(each, Replayed) and each.is_recorded for each in made)

    def forget(self) -> None:
        """Drop all compiled code and recorded CUDA graphs, which keep their memory as long as they exist."""
        self._built.clear()

    def forward(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Compute the student's gradient g [p]: that of the weighted cross-entropy with respect to the parameters.

        Args:
            theta: [p] parameters.
            x: [b c h w] images.
            y: [b k] soft labels as logits.
            weights: [b] weights of the images in the loss; 1/b for all gives the mean, and 0 leaves an image out.
        """
        with tf32_products(self._options.precision == "tf32", theta.device):
            return self._functions(theta, x, y)[0](theta, self.layout(x), y, weights)

    def reverse(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor, v: Tensor) -> Reversed:
        """Differentiate s = <v, g> for a given v [p], where g is the result of `forward`.

        Returns s [] and its derivatives in the parameters theta [p], images x [b c h w] and soft labels y [b k].
        """
        with tf32_products(self._options.precision == "tf32", theta.device):
            return self._functions(theta, x, y)[1](theta, self.layout(x), y, weights, v)

    def prepare(
        self, batch: int, image: tuple[int, int, int], classes: int, heartbeat: Heartbeat = no_heartbeat
    ) -> None:
        """Compile and run `forward` and `reverse` once for `batch` images, which takes seconds to minutes.

        On a GPU they are run even if they are not compiled, so that too little memory is found early. On a CPU nothing
        is done if they are not compiled.

        Args:
            batch: number of images.
            image: channels, height and width of an image.
            classes: number of classes.
            heartbeat: called after each function.
        """
        theta = flatten(self.network.module)
        if not self._compiled and theta.device.type == "cpu":
            return
        x, y, weights = theta.new_zeros(batch, *image), theta.new_zeros(batch, classes), theta.new_zeros(batch)
        self.forward(theta, x, y, weights)
        heartbeat()
        self.reverse(theta, x, y, weights, torch.zeros_like(theta))
        heartbeat()

    def layout(self, x: Tensor) -> Tensor:
        """Bring images into the functions' memory format, `torch.channels_last` or contiguous; copied if needed."""
        return x.contiguous(memory_format=torch.channels_last if self._is_channels_last else torch.contiguous_format)

    @functools.cached_property
    def _is_channels_last(self) -> bool:
        # Torch 2.11 cannot take the tangent of its own group norm with channels innermost.
        own_norms = (part for part in self.network.module.modules() if isinstance(part, nn.GroupNorm))
        has_own = any(not getattr(part, "explicit", False) for part in own_norms)
        return self._options.channels_last and not (self._order == "reverse-over-forward" and has_own)

    def graphs(self, batch: int, image: tuple[int, int, int], classes: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Trace `forward` and `reverse` with tensors that take no memory. Returns the graphs of the two functions.

        Args:
            batch: number of images.
            image: channels, height and width of an image.
            classes: number of classes.
        """
        with shapes_only():
            like = next(self.network.module.parameters())
            theta = torch.empty(self.network.count, dtype=like.dtype, device=like.device)
            x = self.layout(theta.new_empty(batch, *image))
            y, weights = theta.new_empty(batch, classes), theta.new_empty(batch)
            arguments = (theta, x, y, weights)
            forward = traced(self._gradient, *arguments)
            if _has_wrong_tangents(forward):
                self._order = "reverse-over-reverse"
            try:
                return forward, traced(self._reverse, *arguments, torch.empty_like(theta))
            except NotImplementedError:  # torch has no tangent for an operation, such as weight normalisation
                self._order = "reverse-over-reverse"
                return forward, traced(self._reverse, *arguments, torch.empty_like(theta))

    def _functions(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Reversed]]:
        if not self._compiled and self._options.graphs is False:
            return self._gradient, self._reverse
        key = (x.shape, y.shape, theta.dtype)
        if key not in self._built:
            forward, reverse = self._compiled_for(x, y) if self._compiled else (self._gradient, self._reverse)
            self._built[key] = (Replayed(forward), Replayed(reverse)) if self._replays(x) else (forward, reverse)
        return self._built[key]

    def _replays(self, x: Tensor) -> bool:
        """True if calls for these images [b c h w] are replayed as CUDA graphs."""
        if self._options.graphs is not None or not _can_replay(x):
            return bool(self._options.graphs)
        return len(x) * image_cost(self.network.module, tuple(x.shape[1:])).flop <= REPLAYED_FLOP

    def _compiled_for(self, x: Tensor, y: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Reversed]]:
        batch, *image = x.shape
        forward, reverse = (
            Compiled(graph, x.device.type, channels_last=self._is_channels_last)
            for graph in self.graphs(batch, (image[0], image[1], image[2]), y.shape[1])
        )
        return forward, reverse

    def _loss(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        if self._options.precision == "bfloat16":
            logits = self.network(theta.bfloat16(), x.bfloat16()).to(theta.dtype)
        else:
            logits = self.network(theta, x)
        return soft_cross_entropy(logits, y, weights)

    def _gradient(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        gradient: Tensor = grad(self._loss)(theta, x, y, weights)
        return gradient

    def _reverse(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor, v: Tensor) -> Reversed:
        def along_v(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
            if self._order == "reverse-over-reverse":
                return torch.dot(v, self._gradient(theta, x, y, weights))
            derivative: Tensor = jvp(lambda theta: self._loss(theta, x, y, weights), (theta,), (v,))[1]
            return derivative

        (d_theta, d_x, d_y), s = grad_and_value(along_v, argnums=(0, 1, 2))(theta, x, y)
        return s, d_theta, d_x, d_y


def soft_cross_entropy(logits: Tensor, soft_labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over samples of the cross-entropy between softmax(soft_labels) and softmax(logits).

    Args:
        logits, soft_labels: [b k].
        weights: [b] weights of the samples; 1/b for all gives the mean, and 0 leaves a sample out.
    """
    per_sample = -(soft_labels.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
    return (weights * per_sample).sum()


def _can_replay(x: Tensor) -> bool:
    return x.is_cuda


def _has_wrong_tangents(graph: fx.GraphModule) -> bool:
    """True if the graph has an operation whose tangent torch differentiates wrongly, without an error.

    torch's layer and batch normalisation treat their saved mean and variance as constants
    (github.com/pytorch/pytorch/issues 196700 and 196699). torch's instance normalisation is a batch normalisation too.
    """
    return any(re.search("(layer|batch)_norm", str(node.target)) for node in graph.graph.nodes)


@functools.cache
def _load_tangent_rules() -> None:
    """Make torch load its rules for `torch.func.jvp` now, without the FutureWarning of its first call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 defines tangents with the deprecated torch.jit
        jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))
