"""The two functions that the student's inner loop is made of: its gradient, and the derivative of that gradient.

    forward(theta, x, y, weights)     -> g = grad_theta l
    reverse(theta, x, y, weights, v)  -> s = <v, g> and its derivatives in theta, x and y

s is the derivative of the loss along v, so there are two ways to `reverse`: differentiate the loss along v and then
backwards (reverse over forward), or the gradient backwards (reverse over reverse). Both are exact; the first was the
faster one compiled, the second the faster one uncompiled (benchmarks/LOG.md; CPUs only so far).

To be compiled a function is traced once, for one number of images (`compilation.py`).
Shapes: b images of one call, c h w image, k classes, p parameters.
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

from datm_ray.core.compilation import Compiled, compiler_problem, traced
from datm_ray.core.networks.instance_norm import InstanceNorm
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import couples_samples
from datm_ray.core.precision import Precision, tf32_products
from datm_ray.core.torch_compat import shapes_only
from datm_ray.core.training import Heartbeat, no_heartbeat
from datm_ray.errors import ConfigError

Order = Literal["reverse-over-forward", "reverse-over-reverse"]
Reversed = tuple[Tensor, Tensor, Tensor, Tensor]
"""s [], ds/dtheta [p], ds/dx [b c h w], ds/dy [b k]."""


@dataclass(frozen=True)
class StepOptions:
    """How a student step is computed; what is computed does not depend on it but for rounding."""

    compiled: bool = True
    """Compile where the machine can."""
    order: Order | None = None
    """Order of differentiation; `None` takes the faster one. A compiled network with a layer norm always gets
    reverse-over-reverse."""
    channels_last: bool = True
    """Keep maps with their channels innermost, where the device computes convolutions faster that way."""
    precision: Precision = "float32"
    """tf32: products of float32 numbers rounded to 10 bits, on GPUs that have it; bfloat16: layers and their
    derivatives in bfloat16, parameters and sums in float32."""


class StudentStepFunctions:
    """`forward` and `reverse` for one network, compiled where the machine can.

    Attributes:
        network: a copy of the network that was given, arranged for matching.
        note: one line on why the functions are not compiled although asked to be; "" otherwise.

    Raises:
        ConfigError: the network couples the samples of a batch, so that no step is a sum over samples.
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
        self.network = FlatNetwork(self._arranged(network.module))
        self._built: dict[tuple[Any, ...], tuple[Callable[..., Tensor], Callable[..., Reversed]]] = {}

    @property
    def facts(self) -> dict[str, str | bool]:
        """How a step is really computed, as plain data; the order of differentiation is final once it was prepared."""
        precision, device = self._options.precision, self.network.device.type
        return {
            "precision": precision,
            "tf32": precision == "tf32" and device == "cuda",
            "compiled": self._compiled,
            "order": self._order,
            "channels_last": self._is_channels_last,
        }

    def forward(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The student's gradient g [p].

        Args:
            theta: [p] parameters.
            x: [b c h w] images.
            y: [b k] soft labels as logits.
            weights: [b] of the images' losses in the sum; see `soft_cross_entropy`.
        """
        with tf32_products(self._options.precision == "tf32", theta.device):
            return self._functions(theta, x, y)[0](theta, self.layout(x), y, weights)

    def reverse(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor, v: Tensor) -> Reversed:
        """Differentiate s = <v, g>, where g is what `forward` returns and v [p] is given.

        Returns s [] and its derivatives in theta [p], x [b c h w] and y [b k].
        """
        with tf32_products(self._options.precision == "tf32", theta.device):
            return self._functions(theta, x, y)[1](theta, self.layout(x), y, weights, v)

    def prepare(
        self, batch: int, image: tuple[int, int, int], classes: int, heartbeat: Heartbeat = no_heartbeat
    ) -> None:
        """Compile both functions for `batch` images, which takes seconds to minutes. Calls `heartbeat` after each.

        On a GPU both are computed in any case, so that the caller learns whether there is memory for them.
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
        """Images in the memory order that the functions want."""
        return x.contiguous(memory_format=torch.channels_last if self._is_channels_last else torch.contiguous_format)

    @functools.cached_property
    def _is_channels_last(self) -> bool:
        # Torch 2.11 cannot take the tangent of its own group norm with channels innermost.
        own_norms = (part for part in self.network.module.modules() if isinstance(part, nn.GroupNorm))
        has_own = any(not getattr(part, "explicit", False) for part in own_norms)
        return self._options.channels_last and not (self._order == "reverse-over-forward" and has_own)

    def graphs(self, batch: int, image: tuple[int, int, int], classes: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        """`forward` and `reverse` for so many images as graphs of tensor operations, traced without memory for them."""
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
            except NotImplementedError:  # torch has no tangent for an operation, such as a weight normalisation
                self._order = "reverse-over-reverse"
                return forward, traced(self._reverse, *arguments, torch.empty_like(theta))

    def _functions(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Reversed]]:
        if not self._compiled:
            return self._gradient, self._reverse
        batch, *image = x.shape
        key = (x.shape, y.shape, theta.dtype)
        if key not in self._built:
            forward, reverse = (
                Compiled(graph, theta.device.type, channels_last=self._is_channels_last)
                for graph in self.graphs(batch, (image[0], image[1], image[2]), y.shape[1])
            )
            self._built[key] = forward, reverse
        return self._built[key]

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

    def _arranged(self, module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module)
        for part in module.modules():
            if isinstance(part, InstanceNorm):
                part.explicit = self._compiled
        return module


def soft_cross_entropy(logits: Tensor, soft_labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over samples of the cross-entropy between softmax(soft_labels) and softmax(logits).

    Args:
        logits, soft_labels: [b k].
        weights: [b]; 1/b each gives the mean, 0 takes a sample out.
    """
    per_sample = -(soft_labels.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
    return (weights * per_sample).sum()


def _has_wrong_tangents(graph: fx.GraphModule) -> bool:
    """True if torch differentiates the tangent of an operation wrongly, and silently.

    Layer and batch normalisation take their saved mean and variance for constants (github.com/pytorch/pytorch/issues
    196700 and 196699). torch's instance normalisation is a batch normalisation too.
    """
    return any(re.search("(layer|batch)_norm", str(node.target)) for node in graph.graph.nodes)


@functools.cache
def _load_tangent_rules() -> None:
    """Have torch load its rules for tangents, which it does on the first one, warning of its own deprecated code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 defines tangents with the deprecated torch.jit
        jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))
