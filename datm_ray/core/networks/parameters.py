"""A network as a pure function of one flat parameter vector.

Expert snapshots, students and gradients are vectors [p]. Computations split them into layers inside the forward pass
only; `unflatten_into` fills a module for other uses. Buffers (running statistics) are a separate vector [q], which is
empty for most networks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FlatNetwork:
    """Network as a function of parameters [p] and images [b c h w] that returns logits [b k].

    The function is differentiable in both arguments and can be compiled. A call uses the module's buffers;
    `with_buffers` gets them as a vector.

    Attributes:
        module: the network; its own parameters are not read.
        names, shapes: names and shapes of the parameters, in the order of the vector.
        count: p, the length of the vector.
    """

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_parameters())
        self.names = tuple(name for name, _ in named)
        self.shapes = tuple(tuple(parameter.shape) for _, parameter in named)
        self.sizes = [parameter.numel() for _, parameter in named]
        self.count = sum(self.sizes)
        self.module = module
        self._buffers = {name: buffer.shape for name, buffer in float_buffers(module).items()}

    @property
    def device(self) -> torch.device:
        """Device of the module's parameters."""
        return next(self.module.parameters()).device

    def __call__(self, parameters: Tensor, images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.module, self.layers(parameters), (images,))
        return logits

    def with_buffers(
        self, parameters: Tensor, buffers: Tensor, images: Tensor, *, channels_last: bool = False
    ) -> Tensor:
        """Compute logits [b k] of images [b c h w] with parameters [p] and buffers [q].

        In training mode the vector of buffers is changed in place.

        Args:
            channels_last: True to store the weights of convolutions with their input channels innermost in memory, for
                images that are stored so; False to leave them in the vector's order.
        """
        pieces = buffers.split([shape.numel() for shape in self._buffers.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(self._buffers.items(), pieces, strict=True)}
        layers = self.layers(parameters)
        if channels_last:
            ordered = {name: each for name, each in layers.items() if each.dim() == 4}
            layers |= {name: each.contiguous(memory_format=torch.channels_last) for name, each in ordered.items()}
        logits: Tensor = functional_call(self.module, {**layers, **named}, (images,))
        return logits

    def layers(self, parameters: Tensor) -> dict[str, Tensor]:
        """Split the vector [p] into views with the shapes of the module's parameters, by name."""
        pieces = parameters.split(self.sizes)
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}


def flatten(module: nn.Module) -> Tensor:
    """Copy the module's parameters into one vector [p].

    Without a copy, later training would change the vector, and all stored epochs of an expert would equal the last.
    """
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers of the module and its submodules, not copied, by name: running statistics, no counters."""
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def flatten_buffers(module: nn.Module) -> Tensor:
    """Copy the module's floating-point buffers (running statistics, no counters) into one vector [q]."""
    pieces = [buffer.detach().reshape(-1) for buffer in float_buffers(module).values()]
    return torch.cat(pieces) if pieces else torch.empty(0, device=next(module.parameters()).device)


def unflatten_buffers_into(module: nn.Module, buffers: Tensor) -> None:
    """Copy the vector [q] into the module's floating-point buffers (running statistics, no counters), in place."""
    own = list(float_buffers(module).values())
    for buffer, piece in zip(own, buffers.split([buffer.numel() for buffer in own]), strict=True):
        buffer.copy_(piece.view_as(buffer))


def unflatten_into(module: nn.Module, parameters: Tensor) -> None:
    """Write the vector [p] into the module's parameters, which keep their memory order, such as channels-last.

    Contiguous parameters become views of the vector, so they share its memory; others are copied.

    Raises:
        ValueError: the vector has more or fewer numbers than the parameters.
    """
    own = list(module.parameters())
    sizes = [each.numel() for each in own]
    if parameters.numel() != (count := sum(sizes)):  # torch would ignore the surplus
        raise ValueError(f"{parameters.numel():,} numbers for a network of {count:,} parameters")
    for each, piece in zip(own, parameters.split(sizes), strict=True):
        view = piece.view_as(each).data
        if view.stride() == each.stride():
            each.data = view
        else:
            each.data.copy_(view)
