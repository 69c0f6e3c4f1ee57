"""MetaDD: losses that make synthetic images show the same evidence to every architecture (arXiv 2410.05103).

Trained, frozen networks classify an image of class y: the backbone, and auxiliaries of other architectures. Each
network's class activation map shows where the network finds y. Features that all networks use are the image's meta
features; all other features are heterogeneous.
Three terms, each a mean over images, are weighted and added to the loss of any distillation:

    variance     of the maps, scaled to [0, 1], over the networks: mean over pixels of 1/M sum_m (a_m - mean a)^2;
                 as a control, of the logits instead (`metadd.variance_of`)
    invariance   sum over the auxiliaries of CE(f_m(x), y) + divergence * KL(f_m(x) || f_0(x)), f_0 the backbone
    position     mean over networks and pixels of relu(-map): evidence against y. This is our reading of the paper's
                 third and smallest term.

Descriptions of the paper do not agree on the sign of the divergence, so its weight may be negative. Every term is a
function of the maps and logits of single images, so images may be processed in parts. Processes that hold different
networks exchange only maps and logits. Each process differentiates the whole loss through its own networks. The sum of
these gradients is the gradient of one process with all networks.

Shapes: m networks, the backbone first; b images of c h w; k classes. Tests: tests/core/test_metadd.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from datm_ray.config import MetaLossConfig
from datm_ray.core.images.augment import Augmentation, augment_each
from datm_ray.core.networks.registry import spatial_features
from datm_ray.core.synthetic import AllSum, identity
from datm_ray.errors import ConfigError

IMAGES_AT_A_TIME = 10
"""Default number of images that MetaDD's networks process at a time. It bounds the memory of the autograd graphs."""


ROUNDING = 16
"""A class activation map counts as constant if its values differ by at most this many machine epsilons times its
largest magnitude."""


@dataclass(frozen=True)
class Evidence:
    """Class activation maps and logits of networks for images of known classes."""

    maps: Tensor
    """[b h w] class activation maps of one network, at the images' size, or [m b h w] of m networks. Each shows the
    evidence for the image's given class. The mean of a map is roughly the logit of its class."""
    logits: Tensor
    """[b k] logits of one network, or [m b k] of m networks."""


@dataclass(frozen=True)
class MetaLoss:
    """MetaDD's loss and its terms, each a mean over images.

    `total` is the loss: the weighted sum of the terms `variance`, `invariance` and `position`, which are unweighted.
    """

    total: Tensor
    variance: Tensor
    invariance: Tensor
    position: Tensor
    ratio: Tensor
    """Meta-feature ratio in [0, 1], a mean over images, for reports only: the number of pixels where the scaled maps of
    all networks reach `metadd.threshold`, divided by the number where any map does."""

    def values(self) -> Tensor:
        """Loss, its three terms and the ratio as one vector [5] without derivatives, in the order of the fields."""
        return torch.stack([getattr(self, each.name).detach() for each in fields(self)])

    def detach(self) -> MetaLoss:
        """Copy the loss, its terms and the ratio without derivatives."""
        return MetaLoss(*self.values())


class MetaDD:
    """MetaDD's loss for given networks. Any distillation can add this loss to its own:

        metadd = MetaDD([backbone, resnet, vit])
        loss = distribution_matching(synthetic, real) + metadd.loss(synthetic, labels).total

    Attributes:
        options: section `metadd` of a recipe: weights of the terms, and how they are computed.
    """

    def __init__(self, networks: Sequence[nn.Module] | Mapping[int, nn.Module], options: MetaLossConfig | None = None):
        """Copy the networks, frozen and in evaluation mode.

        Args:
            networks: trained networks, the backbone first. A process that holds only some of them, or none, gives a
                mapping from a network's index among all to the network; the backbone has index 0.
            options: section `metadd` of a recipe; `None` for the defaults.

        Raises:
            ConfigError: `networks` is a sequence of fewer than two networks.
        """
        numbered = dict(networks) if isinstance(networks, Mapping) else dict(enumerate(networks))
        if not isinstance(networks, Mapping) and len(numbered) < 2:
            raise ConfigError(
                f"MetaDD compares several networks, and was given {len(numbered)}",
                remedy="give the backbone and at least one trained network of another architecture",
            )
        self.options = options or MetaLossConfig()
        self._networks = {
            index: copy.deepcopy(network).eval().requires_grad_(False) for index, network in numbered.items()
        }

    def loss(self, images: Tensor, labels: Tensor) -> MetaLoss:
        """Compute the loss of images [b c h w] of classes [b], differentiable in the images.

        This object must hold all networks. Their autograd graphs are kept for all images. `gradient` needs less memory,
        because it keeps graphs for one part of the images at a time.

        Raises:
            ConfigError: a network has no logits, no feature maps of more than one position, or too few classes for a
                label; or the networks have different numbers of classes.
        """
        largest = _largest(labels)
        each = [evidence(network, images, labels, largest) for network in self._networks.values()]
        _require_one_label_set([one.logits for one in each])
        together = Evidence(torch.stack([one.maps for one in each]), torch.stack([one.logits for one in each]))
        return meta_loss(together, labels, self.options)

    def gradient(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        networks: int | None = None,
        classes: int = 0,
        over: int | None = None,
        chunk: int = IMAGES_AT_A_TIME,
        augmentations: Sequence[Augmentation] = (),
        all_sum: AllSum = identity,
    ) -> tuple[MetaLoss, Tensor]:
        """Compute the loss and its gradient with respect to the images [b c h w], one part of the images at a time.

        Each network processes each part once. Autograd graphs of the networks held here are kept for one part only.

        Args:
            images: [b c h w]; b may be 0.
            labels: [b] classes of the images.
            networks: number of networks in all processes; `None` for the number held here.
            classes: number of classes of the networks; every label must be smaller. Required if no network is held
                here. With 0 the largest label is read instead, for which the CPU waits for a GPU.
            over: number of images over which each mean is taken, if `images` are only some of these; `None` for b.
            chunk: number of images per part.
            augmentations: [b] augmentation of each image. The networks see the augmented images. The gradient is with
                respect to the images before augmentation. Empty for none.
            all_sum: adds a tensor over all processes that take part, this one included.

        Returns:
            The loss without derivatives, the same in each process, and the part [b c h w] of the gradient that goes
            through the networks of this process.

        Raises:
            ConfigError: a network held here lacks logits, feature maps of more than one position, or enough classes.
        """
        over, total = over or max(1, len(images)), torch.zeros_like(images)
        largest = classes - 1 if classes else _largest(labels)
        losses = [images.new_zeros(len(fields(MetaLoss)))]
        for first in range(0, len(images), chunk):
            rows = slice(first, first + chunk)
            part, own = images[rows].detach().requires_grad_(), labels[rows]
            seen = augment_each(part, augmentations[rows]) if augmentations else part
            here = {index: evidence(network, seen, own, largest) for index, network in self._networks.items()}
            together = _gathered(here, part, networks or len(self._networks), classes, all_sum)
            loss = meta_loss(together, own, self.options)
            losses.append(loss.values() * len(part))
            if here:
                total[rows] = torch.autograd.grad(loss.total, part)[0] * (len(part) / over)
        return MetaLoss(*(torch.stack(losses).sum(dim=0) / over).unbind()), total

    def evidence(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        networks: int | None = None,
        classes: int = 0,
        chunk: int = IMAGES_AT_A_TIME,
        all_sum: AllSum = identity,
    ) -> Evidence:
        """Compute the class activation maps [m b h w] and logits [m b k] of all m networks, without derivatives.

        Each process computes those of the networks that it holds, and gets those of all.

        Args:
            images: [b c h w] images.
            labels: [b] classes of the images.
            networks: m; `None` for the number held here.
            classes: k; required if no network is held here. With 0 the CPU waits for a GPU to read the labels.
            chunk: number of images that the networks process at a time.
            all_sum: adds a tensor over all processes that take part, this one included.

        Raises:
            ConfigError: a network held here lacks logits, feature maps of more than one position, or enough classes.
        """
        parts, largest = list[Evidence](), classes - 1 if classes else _largest(labels)
        for part, own in zip(images.split(chunk), labels.split(chunk), strict=True):
            raw = part.detach()
            here = {index: _values_of(evidence(each, raw, own, largest)) for index, each in self._networks.items()}
            parts.append(_gathered(here, part, networks or len(self._networks), classes, all_sum))
        return Evidence(torch.cat([part.maps for part in parts], 1), torch.cat([part.logits for part in parts], 1))


def _gathered(here: Mapping[int, Evidence], images: Tensor, networks: int, classes: int, all_sum: AllSum) -> Evidence:
    """Gather the class activation maps [m b h w] and logits [m b k] of all m networks from all processes.

    Only the entries of networks that this process holds keep derivatives.

    Args:
        here: index of a network that this process holds -> maps and logits of this network.
        images: [b c h w] images that the networks have processed.
        networks: m, the number of networks in all processes.
        classes: k; 0 reads k from the networks held here.
        all_sum: adds a tensor over all processes that take part, this one included.
    """
    _require_one_label_set([one.logits for one in here.values()])
    classes = classes or next(iter(here.values())).logits.shape[1]
    maps = images.new_zeros(networks, len(images), *images.shape[2:])
    logits = images.new_zeros(networks, len(images), classes)
    for index, own in here.items():
        maps[index], logits[index] = own.maps.detach(), own.logits.detach()
    maps, logits = all_sum(maps), all_sum(logits)
    for index, own in here.items():
        maps, logits = _with(maps, index, own.maps), _with(logits, index, own.logits)
    return Evidence(maps, logits)


def evidence(network: nn.Module, images: Tensor, labels: Tensor, largest: int | None = None) -> Evidence:
    """Compute one network's class activation maps [b h w] and logits [b k] for images [b c h w] of classes [b].

    This is Grad-CAM. The weight of each last feature map is the derivative of the class's logit, summed over the map's
    positions. If a network averages its maps before one linear layer, these weights are the layer's weights, and the
    result is the original class activation map. A transformer's maps are its tokens. The result is differentiable to
    any order.

    Args:
        network: the network, in evaluation mode.
        images: [b c h w] normalised images.
        labels: [b] classes of the images.
        largest: an upper limit of the labels, inclusive. `None` reads the labels, for which the CPU waits for a GPU.

    Raises:
        ConfigError: the network has no logits [b k], no feature maps of more than one position, or not more classes
            than `largest`.
    """
    with torch.enable_grad():
        shown = images if images.requires_grad else images.detach().requires_grad_()
        maps, logits = spatial_features(network, shown)
        _require_usable(network, maps, logits, _largest(labels) if largest is None else largest)
        score = logits.gather(1, labels[:, None]).sum()
        (derivative,) = torch.autograd.grad(score, maps, create_graph=True, materialize_grads=True)
        weighted = (maps * derivative.sum(dim=(2, 3), keepdim=True)).sum(dim=1, keepdim=True)
        full = interpolate(weighted, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return Evidence(full, logits)


def meta_loss(shared: Evidence, labels: Tensor, options: MetaLossConfig) -> MetaLoss:
    """Compute MetaDD's loss for images of the classes `labels` [b].

    Args:
        shared: class activation maps [m b h w] and logits [m b k] of all m networks, the backbone first.
        options: section `metadd` of a recipe.
    """
    scaled = scaled_maps(shared.maps)
    compared = scaled.flatten(2) if options.variance_of == "maps" else _standardised(shared.logits)
    variance = compared.var(dim=0, unbiased=False).mean()
    invariance = _invariance(shared.logits, labels, options.divergence)
    position = torch.relu(-shared.maps).mean()
    total = options.variance * variance + options.invariance * invariance + options.position * position
    return MetaLoss(total, variance, invariance, position, meta_feature_ratio(scaled, options.threshold).mean())


def scaled_maps(maps: Tensor) -> Tensor:
    """Scale class activation maps [.. h w], each to lowest value 0 and highest 1. A constant map becomes 0."""
    lowest, highest = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    # Resizing a constant map leaves rounding errors, which are no evidence.
    varies = highest - lowest > ROUNDING * torch.finfo(maps.dtype).eps * torch.maximum(highest.abs(), lowest.abs())
    return torch.where(varies, (maps - lowest) / torch.where(varies, highest - lowest, 1), 0)


def meta_feature_ratio(scaled: Tensor, threshold: float = 0.5) -> Tensor:
    """Meta-feature ratio [b] of b images: how far m networks find their class in the same pixels, in [0, 1].

    The ratio is the number of pixels where all networks' maps reach `threshold`, divided by the number where any map
    does; 0 if none does.

    Args:
        scaled: [m b h w] class activation maps, scaled to [0, 1].
        threshold: smallest scaled value, inclusive, at which a pixel shows the class.
    """
    reached = scaled >= threshold
    shared, any_ = reached.all(dim=0), reached.any(dim=0)
    return shared.sum(dim=(1, 2)) / any_.sum(dim=(1, 2)).clamp_min(1).to(scaled.dtype)


def _invariance(logits: Tensor, labels: Tensor, divergence: float) -> Tensor:
    """MetaDD's invariance term [], a mean over images, summed over all networks but the backbone.

    Each network adds its cross-entropy, and `divergence` times its KL divergence from the backbone.

    Args:
        logits: [m b k] logits of m networks, the backbone first.
        labels: [b] classes of the images.
        divergence: weight of the KL divergence; a negative value rewards it.
    """
    ours, others = logits[0].log_softmax(dim=1), logits[1:].log_softmax(dim=2)
    classified = sum((cross_entropy(each, labels) for each in logits[1:]), logits.new_zeros(()))
    apart = (others.exp() * (others - ours)).sum(dim=2).mean(dim=1).sum()
    return classified + divergence * apart


def _standardised(logits: Tensor) -> Tensor:
    """Shift and scale the logits [m b k] of m networks to mean 0 and variance 1 over the classes.

    So the variance over the networks does not depend on the scale of each network's logits.
    """
    centred = logits - logits.mean(dim=2, keepdim=True)
    return centred / centred.square().mean(dim=2, keepdim=True).sqrt().clamp_min(torch.finfo(logits.dtype).eps)


def _values_of(one: Evidence) -> Evidence:
    return Evidence(one.maps.detach(), one.logits.detach())


def _with(values: Tensor, index: int, own: Tensor) -> Tensor:
    """Copy `values` [m ..] of m networks, with entry `index` replaced by `own`, which keeps its derivatives."""
    return torch.cat([values[:index], own[None], values[index + 1 :]])


def _largest(labels: Tensor) -> int:
    """Largest of the labels, or -1 without any. If the labels are on a GPU, the CPU waits for the GPU."""
    return int(labels.max()) if len(labels) else -1


def _require_usable(network: nn.Module, maps: Tensor, logits: Tensor, largest: int) -> None:
    name = type(network).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigError(
            f"{name} gives no logits [images, classes]", remedy="wrap it, so that it returns one tensor of logits"
        )
    if maps.shape[2] * maps.shape[3] == 1:
        raise ConfigError(
            f"the last feature maps of {name} have only one position, so a class activation map says nothing",
            "the images are too small for it",
            "give larger images (dataset.resize) or another network",
        )
    if largest >= logits.shape[1]:
        raise ConfigError(
            f"{name} has {logits.shape[1]} classes, but an image is of class {largest}",
            "it was trained on another data set or label set",
            "give networks trained on the data set that is distilled",
        )


def _require_one_label_set(logits: Sequence[Tensor]) -> None:
    classes = sorted({each.shape[1] for each in logits})
    if len(classes) > 1:
        raise ConfigError(
            f"MetaDD's networks have {' and '.join(map(str, classes))} classes",
            "they were trained on different data sets or label sets",
            "give networks trained on the data set that is distilled",
        )
