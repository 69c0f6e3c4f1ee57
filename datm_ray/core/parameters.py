"""A network as a pure function of one flat parameter vector.

Trajectories, students and their gradients are vectors [p]; only inside a forward pass do they become layers.
Buffers (running statistics) are not part of the vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FlatNetwork:
    """`network(parameters [p], images [b c h w]) -> logits [b k]`, differentiable in both, safe to compile.

    Attributes:
        names, shapes: of the parameters, in the order in which they lie in the vector.
        count: p, the length of the vector.
    """

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_parameters())
        self.names = tuple(name for name, _ in named)
        self.shapes = tuple(tuple(parameter.shape) for _, parameter in named)
        self.sizes = [parameter.numel() for _, parameter in named]
        self.count = sum(self.sizes)
        self.module = module

    @property
    def device(self) -> torch.device:
        """Where the module lives."""
        return next(self.module.parameters()).device

    def __call__(self, parameters: Tensor, images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.module, self.layers(parameters), (images,))
        return logits

    def layers(self, parameters: Tensor) -> dict[str, Tensor]:
        """Views of the vector [p] as the module's parameters, by name."""
        pieces = parameters.split(self.sizes)
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}


def flatten(module: nn.Module) -> Tensor:
    """A copy of the module's parameters as one vector [p].

    Always a copy: a view of live weights would make every epoch of a trajectory the last one.
    """
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def unflatten_into(module: nn.Module, parameters: Tensor) -> None:
    """Write the vector [p] into the module's parameters."""
    torch.nn.utils.vector_to_parameters(parameters, module.parameters())
