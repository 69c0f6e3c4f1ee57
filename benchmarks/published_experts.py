"""Training as others do: a DataLoader that collects sample by sample, then SGD or GSAM layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from turns import timed

from datm_ray.core.images.augment import augment, draw_augmentation
from datm_ray.core.randomness import Purpose, generator

Epochs = Iterator[None]
"""Iterator that trains one epoch at every step."""
Data = tuple[Tensor, Tensor]
"""Images [n c h w] and their classes [n]."""


def loader_epochs(
    network: nn.Module, train: Data, test: Data | None, batch: int, augmentation: str, *, gsam: bool
) -> Epochs:
    """The loop of MTT, FTD and DATM: images wait in main memory, and every batch travels to the device.

    Args:
        network: network on the device.
        test: test images, which the network classifies after every epoch; `None` for none.
    """
    device = next(network.parameters()).device
    loader = DataLoader(TensorDataset(*train), batch, shuffle=True)
    tests = DataLoader(TensorDataset(*test), batch) if test else ()
    optimiser = torch.optim.SGD(network.parameters(), 0.01)
    epoch = 0
    while True:
        for number, (x, y) in enumerate(loader):
            draw = generator(0, Purpose.TRAINING_AUGMENTATION, epoch, number)
            inputs = augment(x.to(device), draw_augmentation(augmentation, len(x), draw))
            (gsam_step if gsam else sgd_step)(network, inputs, y.to(device), optimiser)
        with torch.no_grad():
            for x, y in tests:
                float((network(x.to(device)).argmax(dim=1) == y.to(device)).float().mean())
        _ = [parameter.detach().cpu().clone() for parameter in network.parameters()]
        epoch += 1
        yield


def evaluation_epochs(network: nn.Module, images: Tensor, targets: Tensor, batch: int, augmentation: str) -> Epochs:
    """The loop with which MTT and DATM score a set: a DataLoader, SGD with momentum, loss and accuracy read every step.

    Args:
        targets: [n k] probabilities.
    """
    device = next(network.parameters()).device
    loader = DataLoader(TensorDataset(images, targets), batch, shuffle=True)
    optimiser = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    epoch, loss_sum, right = 0, 0.0, 0
    while True:
        for number, (x, y) in enumerate(loader):
            draw = generator(0, Purpose.TRAINING_AUGMENTATION, epoch, number)
            x, y = x.to(device), y.to(device)
            output = network(augment(x, draw_augmentation(augmentation, len(x), draw)))
            loss = cross_entropy(output, y)
            right += int((output.detach().cpu().numpy().argmax(1) == y.cpu().numpy().argmax(1)).sum())
            loss_sum += loss.item() * len(x)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        epoch += 1
        yield


def epoch_seconds(epochs: Iterator[object], device: str, count: int = 1) -> float:
    """Measure the seconds of so many epochs."""
    return timed(lambda: [next(epochs) for _ in range(count)], device)[0]


def sgd_step(network: nn.Module, x: Tensor, y: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """SGD: forward, backward, step."""
    loss = cross_entropy(network(x), y)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def gsam_step(network: nn.Module, x: Tensor, y: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """GSAM layer by layer, as in the published code."""
    layers = list(network.parameters())
    gradient = torch.autograd.grad(cross_entropy(network(x), y), layers)
    pairs = list(zip(layers, gradient, strict=True))
    length = torch.stack([(w.detach().abs() * g).norm() for w, g in pairs]).norm()
    moves = [w.detach().square() * g * (0.01 / (length + 1e-12)) for w, g in pairs]
    with torch.no_grad():
        for w, e in zip(layers, moves, strict=True):
            w.add_(e)
    sharp = torch.autograd.grad(cross_entropy(network(x), y), layers)
    norms = [torch.stack([part.norm() for part in parts]).norm() for parts in (gradient, sharp)]
    inner = torch.stack([(g * s).sum() for g, s in zip(gradient, sharp, strict=True)]).sum()
    cosine = inner / (norms[0] * norms[1] + 1e-12)
    with torch.no_grad():
        for w, e, g, s in zip(layers, moves, gradient, sharp, strict=True):
            w.sub_(e)
            w.grad = s - 0.3 * (g - cosine * norms[0] * s / (norms[1] + 1e-12))
    optimiser.step()
