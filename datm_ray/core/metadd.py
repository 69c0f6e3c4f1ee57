"""MetaDD: losses that make synthetic images show the same evidence to every architecture (arXiv 2410.05103).

Trained, frozen networks of several architectures look at an image of class y. Each one's class activation map says
where it sees y. What all of them use are the image's meta features, the rest is heterogeneous. Three terms, each a mean
over images, are added to the loss of any distillation:

    variance     of the maps, scaled to [0, 1], over the networks: mean over pixels of 1/M sum_m (c_m - mean c)^2
    invariance   sum over the auxiliaries of CE(f_m(x), y) + divergence * KL(f_m(x) || f_0(x)), f_0 the backbone
    position     mean over networks and pixels of relu(-map): evidence against y. Our reading of the paper's third and
                 smallest term.

The sign of the divergence is described in both ways, so it is yours to choose. All of it is a function of the maps and
logits of single images. So images may be taken in any parts, and processes that hold different networks have to
exchange maps and logits only: each then differentiates the whole loss through its own networks, and the gradients add
up to that of one process with all of them. Shapes: m networks, the backbone first; b images, c h w of one, k classes.
Tests: tests/core/test_metadd.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from datm_ray.core.matching import AllSum, identity
from datm_ray.core.networks import spatial_features
from datm_ray.errors import ConfigError

IMAGES_AT_A_TIME = 10
"""Of a part, where not said otherwise; the graph of one network on so many images is what `gradient` holds."""


ROUNDING = 16
"""Multiples of the smallest relative difference that the values of a map must differ by to be told apart."""


@dataclass(frozen=True)
class MetaOptions:
    """What the loss is made of."""

    variance: float = 1.0
    """Weight of the maps' variance over the networks."""
    invariance: float = 0.01
    """Weight of the auxiliaries' classification and divergence."""
    position: float = 0.1
    """Weight of evidence against the class."""
    divergence: float = 1.0
    """Of the auxiliaries from the backbone, within invariance; negative pushes them apart, 0 leaves it out."""
    threshold: float = 0.5
    """Of a map in [0, 1], from which on a pixel counts as a feature. Decides masks and ratios, not the loss."""
    variance_of: Literal["maps", "logits"] = "maps"
    """logits: a control, the variance of each network's standardised logits in place of that of its maps."""


@dataclass(frozen=True)
class Evidence:
    """What networks see in images of known classes."""

    maps: Tensor
    """[.. b h w] class activation maps at the images' size; a map's mean is about the class's logit."""
    logits: Tensor
    """[.. b k]."""


@dataclass(frozen=True)
class MetaLoss:
    """The loss and its parts, each a mean over images; `total` carries their weights, the others do not."""

    total: Tensor
    variance: Tensor
    invariance: Tensor
    position: Tensor
    ratio: Tensor
    """Meta-feature ratio: pixels that are a feature to all networks, as a share of those that are to any."""

    def detach(self) -> MetaLoss:
        """The values alone."""
        return MetaLoss(*(getattr(self, each.name).detach() for each in fields(self)))


class MetaDD:
    """The loss for given networks: `loss(images, labels).total` joins any distillation's own before `backward()`.

        metadd = MetaDD([backbone, resnet, vit])
        loss = distribution_matching(synthetic, real) + metadd.loss(synthetic, labels).total

    Attributes:
        options: weights and thresholds.
    """

    def __init__(self, networks: Sequence[nn.Module] | Mapping[int, nn.Module], options: MetaOptions | None = None):
        """Copies the networks, frozen and in evaluation mode.

        Args:
            networks: trained ones, the backbone first; of a process that holds only some of them, by their places.

        Raises:
            ConfigError: fewer than two networks.
        """
        places = dict(networks) if isinstance(networks, Mapping) else dict(enumerate(networks))
        if not isinstance(networks, Mapping) and len(places) < 2:
            raise ConfigError(
                f"MetaDD compares what several networks see, and was given {len(places)}",
                remedy="give the backbone and at least one trained network of another architecture",
            )
        self.options = options or MetaOptions()
        self._networks = {place: _frozen(network) for place, network in places.items()}

    def loss(self, images: Tensor, labels: Tensor) -> MetaLoss:
        """The loss of images [b c h w] of classes [b], differentiable in the images.

        Keeps the graph of every network; `gradient` keeps that of one.

        Raises:
            ConfigError: a network without feature maps, or networks that tell different numbers of classes apart.
        """
        each = [evidence(network, images, labels) for network in self._networks.values()]
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
        all_sum: AllSum = identity,
    ) -> tuple[MetaLoss, Tensor]:
        """The loss and its gradient in the images [b c h w], from one network's graph on a part of them at a time.

        Args:
            images: [b c h w], which may be none.
            labels: [b].
            networks: of all processes together; those held here where not given.
            classes: that networks tell apart; to be given where none is held here.
            over: images that the means are over, of which these may be some.
            chunk: images of a part.
            all_sum: sum over the processes that hold the other networks. Each returns the same loss, and the part of
                the gradient that goes through its own networks.
        """
        over, total = over or max(1, len(images)), torch.zeros_like(images)
        losses = [images.new_zeros(len(fields(MetaLoss)))]
        for first in range(0, len(images), chunk):
            rows = slice(first, first + chunk)
            part, own = images[rows], labels[rows]
            seen = self._seen_by_all(part, own, networks or len(self._networks), classes, all_sum)
            losses.append(_values(meta_loss(seen, own, self.options)) * len(part))
            for place, network in self._networks.items():
                total[rows] += self._through(network, place, part, own, seen) * (len(part) / over)
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
        """What every network sees: maps [m b h w] and logits [m b k], without derivatives; arguments as `gradient`."""
        parts = [
            self._seen_by_all(part, own, networks or len(self._networks), classes, all_sum)
            for part, own in zip(images.split(chunk), labels.split(chunk), strict=True)
        ]
        return Evidence(torch.cat([part.maps for part in parts], 1), torch.cat([part.logits for part in parts], 1))

    def _seen_by_all(self, images: Tensor, labels: Tensor, networks: int, classes: int, all_sum: AllSum) -> Evidence:
        """[m b ..] of all processes."""
        here = {place: _values_of(evidence(each, images.detach(), labels)) for place, each in self._networks.items()}
        _require_one_label_set([one.logits for one in here.values()])
        classes = classes or next(iter(here.values())).logits.shape[1]
        maps = images.new_zeros(networks, len(images), *images.shape[2:])
        logits = images.new_zeros(networks, len(images), classes)
        for place, own in here.items():
            maps[place], logits[place] = own.maps, own.logits
        return Evidence(all_sum(maps), all_sum(logits))

    def _through(self, network: nn.Module, place: int, images: Tensor, labels: Tensor, seen: Evidence) -> Tensor:
        """The gradient [b c h w] of the mean loss through one network, what the others see held constant."""
        images = images.detach().requires_grad_()
        own = evidence(network, images, labels)
        together = Evidence(_with(seen.maps, place, own.maps), _with(seen.logits, place, own.logits))
        (gradient,) = torch.autograd.grad(meta_loss(together, labels, self.options).total, images)
        return gradient


def evidence(network: nn.Module, images: Tensor, labels: Tensor) -> Evidence:
    """One network's class activation maps [b h w] and logits [b k] for images [b c h w] of classes [b].

    Grad-CAM: the last feature maps, each weighted with the sum over its positions of the derivative of the class's
    logit. For a network that averages its maps before one linear layer these weights are that layer's, and this is the
    original class activation map. A transformer's maps are its tokens. Differentiable to any order.

    Raises:
        ConfigError: the network has no feature maps.
    """
    with torch.enable_grad():
        looked_at = images if images.requires_grad else images.detach().requires_grad_()
        maps, logits = spatial_features(network, looked_at)
        _require_usable(network, maps, logits, labels)
        score = logits.gather(1, labels[:, None]).sum()
        (derivative,) = torch.autograd.grad(score, maps, create_graph=True, materialize_grads=True)
        weighted = (maps * derivative.sum(dim=(2, 3), keepdim=True)).sum(dim=1, keepdim=True)
        full = interpolate(weighted, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return Evidence(full, logits)


def meta_loss(seen: Evidence, labels: Tensor, options: MetaOptions) -> MetaLoss:
    """The loss from what all networks see: maps [m b h w] and logits [m b k], the backbone first; labels [b]."""
    scaled = scaled_maps(seen.maps)
    compared = scaled.flatten(2) if options.variance_of == "maps" else _standardised(seen.logits)
    variance = compared.var(dim=0, unbiased=False).mean()
    invariance = _invariance(seen.logits, labels, options.divergence)
    position = torch.relu(-seen.maps).mean()
    total = options.variance * variance + options.invariance * invariance + options.position * position
    return MetaLoss(total, variance, invariance, position, meta_feature_ratio(scaled, options.threshold).mean())


def scaled_maps(maps: Tensor) -> Tensor:
    """Maps [.. h w], each from 0 to 1; a map of one value becomes 0, and has no derivative."""
    lowest, highest = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    # Resizing leaves rounding on a map of one value, which is nothing to see either.
    varies = highest - lowest > ROUNDING * torch.finfo(maps.dtype).eps * torch.maximum(highest.abs(), lowest.abs())
    return torch.where(varies, (maps - lowest) / torch.where(varies, highest - lowest, 1), 0)


def meta_features(scaled: Tensor, threshold: float = 0.5) -> Tensor:
    """[b h w] whether a pixel is a feature to all networks, from scaled maps [m b h w]."""
    return (scaled >= threshold).all(dim=0)


def heterogeneous_features(scaled: Tensor, threshold: float = 0.5) -> Tensor:
    """[m b h w] whether a pixel is a feature to the network but not to all."""
    return (scaled >= threshold) & ~meta_features(scaled, threshold)


def meta_feature_ratio(scaled: Tensor, threshold: float = 0.5) -> Tensor:
    """[b] pixels that are a feature to all networks, as a share of those that are to any; 0 where there are none."""
    shared, any_ = meta_features(scaled, threshold), (scaled >= threshold).any(dim=0)
    return shared.sum(dim=(1, 2)) / any_.sum(dim=(1, 2)).clamp_min(1).to(scaled.dtype)


def _invariance(logits: Tensor, labels: Tensor, divergence: float) -> Tensor:
    """Sum over the auxiliaries of the mean cross-entropy and divergence from the backbone, which is logits[0]."""
    ours, others = logits[0].log_softmax(dim=1), logits[1:].log_softmax(dim=2)
    classified = sum((cross_entropy(each, labels) for each in logits[1:]), logits.new_zeros(()))
    apart = (others.exp() * (others - ours)).sum(dim=2).mean(dim=1).sum()
    return classified + divergence * apart


def _standardised(logits: Tensor) -> Tensor:
    """Logits [m b k] with mean 0 and variance 1 over the classes, so that no network's scale decides."""
    centred = logits - logits.mean(dim=2, keepdim=True)
    return centred / centred.square().mean(dim=2, keepdim=True).sqrt().clamp_min(torch.finfo(logits.dtype).eps)


def _values_of(one: Evidence) -> Evidence:
    return Evidence(one.maps.detach(), one.logits.detach())


def _values(loss: MetaLoss) -> Tensor:
    return torch.stack([getattr(loss, each.name).detach() for each in fields(MetaLoss)])


def _with(all_: Tensor, place: int, own: Tensor) -> Tensor:
    """The same [m ..] with one network's part, which carries derivatives."""
    return torch.cat([all_[:place], own[None], all_[place + 1 :]])


def _frozen(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)


def _require_usable(network: nn.Module, maps: Tensor, logits: Tensor, labels: Tensor) -> None:
    name = type(network).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigError(
            f"{name} gives no logits [images, classes]", remedy="wrap it, so that it returns one tensor of logits"
        )
    if maps.shape[2] * maps.shape[3] == 1:
        raise ConfigError(
            f"the last feature maps of {name} have one position, where nothing can be told apart",
            "the images are too small for it",
            "give larger images (dataset.resize) or another network",
        )
    if len(labels) and int(labels.max()) >= logits.shape[1]:
        raise ConfigError(
            f"{name} tells {logits.shape[1]} classes apart, but an image is of class {int(labels.max())}",
            "it was trained on another data set or label set",
            "give networks that were trained on the images that are distilled",
        )


def _require_one_label_set(logits: Sequence[Tensor]) -> None:
    classes = sorted({each.shape[1] for each in logits})
    if len(classes) > 1:
        raise ConfigError(
            f"MetaDD's networks tell {' and '.join(map(str, classes))} classes apart",
            "they were trained on different data sets or label sets",
            "give networks that were trained on the images that are distilled",
        )
