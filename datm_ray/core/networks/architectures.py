"""Architectures: ConvNet, ResNets, VGG-11, MobileNetV2, AlexNet, LeNet, a perceptron and a small vision transformer.

Each architecture is a function of a `NetworkSpec`. Names and seeds are in `registry.py`.

A forward pass draws no random numbers and never branches on a tensor's value. Apart from batch statistics, nothing
changes in place. So every network runs under `torch.func` to any order of derivative, and compiles to one graph. Where
torchvision defines the same network, the results are equal (tests/core/networks/test_architectures.py). torchvision
itself is not used, to spare users a dependency. torchvision's transformer could not be matched anyway: its attention
calls a fused kernel without a second derivative.

Instance normalisation of a map of one pixel leaves only the bias. So ResNets, MobileNetV2 and VGG-11 halve a map that a
normalisation follows only if at least two pixels a side remain. Their docstrings name the halvings that are left out.

Shapes: b images, c channels, h w height and width, k classes, t tokens, d numbers per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from datm_ray.config.sections import NetworkSpec, Norm, Pooling
from datm_ray.core.networks.instance_norm import InstanceNorm
from datm_ray.errors import ConfigError

LEAST_SIDE = 8
"""Smallest image side in pixels, inclusive, that all architectures accept; `convnet` and `mlp` also accept less."""
MOST_SMALL_SIDE = 64
"""Largest shorter side in pixels, inclusive, of small images, which the first layers of ResNets and MobileNetV2 do not
halve."""

Convolutions = Sequence[tuple[int, int, int]]
"""Successive convolutions, each as (output channels, side of the kernel in pixels, stride)."""


class SpatialNetwork(nn.Module):
    """Network in named parts, which give access to its last feature maps: features -> pooling -> flatten -> classifier.

    Attributes:
        features: computes the last feature maps, before pooling, of images [b c h w].
        pooling: reduces the feature maps to smaller maps, or each map to one number; may be the identity.
        classifier: computes logits from the pooled feature maps, flattened.
    """

    def __init__(self, features: nn.Module, pooling: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.pooling = pooling
        self.classifier = classifier

    def logits(self, maps: Tensor) -> Tensor:
        """Compute logits [b k] from the last feature maps [b c h w]."""
        logits: Tensor = self.classifier(self.pooling(maps).flatten(1))
        return logits

    def embedding(self, images: Tensor) -> Tensor:
        """Compute the classifier's input [b d] of images [b c h w]: the pooled last feature maps, flattened."""
        flat: Tensor = self.pooling(self.features(images)).flatten(1)
        return flat

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [b k] of images [b c h w]."""
        return self.logits(self.features(images))


class ConvNet(SpatialNetwork):
    """ConvNet: depth x [conv 3x3 -> norm -> ReLU -> pool 2x2], then one linear layer over the flattened map.

    DC, DSA, MTT, FTD, TESLA and DATM use this network with width 128 and depth 3 at 32x32, 4 at 64x64, 5 at 128x128.
    If the poolings would halve the image to less than one pixel, a `ConfigError` is raised.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        height, width = spec.size
        shrink = 1 if spec.pooling == "none" else 2**spec.depth
        if min(height, width) < shrink:
            raise ConfigError(
                f"network.depth {spec.depth} is too large for a {height}x{width} image, which every block halves",
                remedy=f"use a depth of at most {min(height, width).bit_length() - 1}, or dataset.resize",
            )
        layers: list[nn.Module] = []
        channels = spec.channels
        for _ in range(spec.depth):
            layers += [
                nn.Conv2d(channels, spec.width, kernel_size=3, padding=1),
                _normalisation(spec.norm, spec.width),
                nn.ReLU(),
                _pooling(spec.pooling),
            ]
            channels = spec.width
        flat = spec.width * (height // shrink) * (width // shrink)
        super().__init__(nn.Sequential(*layers[:-1]), layers[-1], nn.Linear(flat, spec.classes))


def resnet(spec: NetworkSpec, blocks: Sequence[int], block: Callable[[int, int], Convolutions]) -> SpatialNetwork:
    """ResNet (arXiv 1512.03385) of four stages with convolutions initialised as by He et al.

    For images up to 64 pixels on the shorter side, the first layers are one 3x3 convolution without pooling, as is
    usual for small images. For larger images they are the published 7x7 convolution and 3x3 pooling, which divide the
    side by four. All stages but the first halve the feature map. For images of 8x8 the last stage does not, so the map
    stays at 2x2. Smaller images raise a `ConfigError`.

    Args:
        blocks: number of residual blocks in each of the four stages.
        block: function from a stage's channels and a block's stride to the block's convolutions.
    """
    _require_least_side(spec)
    side, first = min(spec.size), _scaled(64, spec)
    if side <= MOST_SMALL_SIDE:
        layers: list[nn.Module] = [nn.Conv2d(spec.channels, first, kernel_size=3, padding=1, bias=False)]
    else:
        layers = [nn.Conv2d(spec.channels, first, kernel_size=7, stride=2, padding=3, bias=False)]
    layers += [_normalisation(spec.norm, first), nn.ReLU()]
    if side > MOST_SMALL_SIDE:
        layers.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
        side = math.ceil(side / 4)
    inputs = first
    for stage, count in enumerate(blocks):
        for number in range(count):
            stride = 2 if stage and not number and side > 2 else 1
            convolutions = block(first * 2**stage, stride)
            layers.append(ResidualBlock(inputs, convolutions, spec.norm))
            inputs, side = convolutions[-1][0], math.ceil(side / stride)
    network = SpatialNetwork(nn.Sequential(*layers), GlobalAverage(), nn.Linear(inputs, spec.classes))
    return _he_initialised(network)


def two_convolutions(width: int, stride: int) -> Convolutions:
    """Two 3x3 convolutions of a ResNet-18 block, with `width` output channels; `stride` is that of the first."""
    return (width, 3, stride), (width, 3, 1)


def bottleneck(width: int, stride: int) -> Convolutions:
    """Three convolutions (1x1, 3x3, 1x1) of a block of deeper ResNets. As in torchvision, the 3x3 one has the stride.

    The first two convolutions have `width` output channels, the last has four times as many.
    """
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


class ResidualBlock(nn.Module):
    """Residual block: ReLU of the sum of a branch of convolutions and a shortcut.

    Attributes:
        branch: the convolutions, each with a normalisation, with ReLU between them.
        shortcut: the identity or, if the number of channels changes, a 1x1 convolution and a normalisation.
    """

    def __init__(self, inputs: int, convolutions: Convolutions, norm: Norm) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = inputs
        for outputs, side, stride in convolutions:
            convolution = nn.Conv2d(channels, outputs, side, stride=stride, padding=side // 2, bias=False)
            layers += [convolution, _normalisation(norm, outputs), nn.ReLU()]
            channels = outputs
        self.branch = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if inputs != channels:
            stride = max(stride for _, _, stride in convolutions)
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, channels, kernel_size=1, stride=stride, bias=False), _normalisation(norm, channels)
            )

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(self.branch(maps) + self.shortcut(maps))


INVERTED_STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
"""Stages of MobileNetV2, each with four numbers: factor by which each block first multiplies its input's channels,
output channels of each block, number of blocks, and stride of the first block."""


def mobilenet_v2(spec: NetworkSpec) -> SpatialNetwork:
    """MobileNetV2 (arXiv 1801.04381) without dropout, convolutions initialised as by He et al.

    For images up to 64 pixels on the shorter side, the first convolution and the second stage do not halve the map, as
    is usual for small images. Maps of two pixels a side are not halved either, so an 8x8 image ends as a 2x2 map.
    Smaller images raise a `ConfigError`.
    """
    _require_least_side(spec)
    side, is_small = min(spec.size), min(spec.size) <= MOST_SMALL_SIDE
    stride, inputs = 1 if is_small else 2, _scaled(32, spec)
    layers: list[nn.Module] = [_activated(spec.channels, inputs, 3, spec.norm, stride)]
    side = math.ceil(side / stride)
    for stage, (factor, published, count, first_stride) in enumerate(INVERTED_STAGES):
        width = _scaled(published, spec)
        for number in range(count):
            is_halving = first_stride == 2 and not number and side > 2 and not (is_small and stage == 1)
            layers.append(InvertedResidual(inputs, width, factor, 2 if is_halving else 1, spec.norm))
            inputs, side = width, math.ceil(side / 2) if is_halving else side
    last = _scaled(1280, spec)
    layers.append(_activated(inputs, last, 1, spec.norm))
    return _he_initialised(SpatialNetwork(nn.Sequential(*layers), GlobalAverage(), nn.Linear(last, spec.classes)))


class InvertedResidual(nn.Module):
    """Block of MobileNetV2: a widening 1x1 convolution, a depthwise 3x3, and a narrowing 1x1 without an activation.

    If the factor of widening is 1, the first convolution is left out. The block's input is added to its output if both
    have the same shape, otherwise not.
    """

    def __init__(self, inputs: int, outputs: int, factor: int, stride: int, norm: Norm) -> None:
        super().__init__()
        wide = factor * inputs
        widening = [_activated(inputs, wide, 1, norm)] if factor > 1 else []
        self.branch = nn.Sequential(
            *widening,
            _activated(wide, wide, 3, norm, stride, groups=wide),
            nn.Conv2d(wide, outputs, kernel_size=1, bias=False),
            _normalisation(norm, outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        changed: Tensor = self.branch(maps)
        return maps + changed if self.is_residual else changed


def _activated(inputs: int, outputs: int, side: int, norm: Norm, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Make a convolution with kernels of side x side pixels, a normalisation and ReLU6, as in MobileNetV2."""
    convolution = nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, _normalisation(norm, outputs), nn.ReLU6())


def vgg11(spec: NetworkSpec) -> SpatialNetwork:
    """VGG-11 (arXiv 1409.1556) with normalisation and one linear layer, convolutions initialised as by torchvision.

    Five stages of 3x3 convolutions each end in 2x2 max pooling; the remaining map (one pixel at 32x32) is averaged.
    Below 32 pixels the pooling after the fourth stage is left out, and below 16 pixels also the pooling after the third
    stage. Otherwise the next convolution would read a map of one pixel. Images below 8x8 raise a `ConfigError`.
    """
    _require_least_side(spec)
    side, inputs = min(spec.size), spec.channels
    layers: list[nn.Module] = []
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        if layers and side >= 4:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        for published in stage:
            width = _scaled(published, spec)
            layers += [nn.Conv2d(inputs, width, kernel_size=3, padding=1), _normalisation(spec.norm, width), nn.ReLU()]
            inputs = width
    pooling = nn.Sequential(nn.MaxPool2d(2), GlobalAverage())
    return _he_initialised(SpatialNetwork(nn.Sequential(*layers), pooling, nn.Linear(inputs, spec.classes)))


def alexnet(spec: NetworkSpec) -> SpatialNetwork:
    """AlexNet in the version of the distillation literature, which was made for 32x32 pixels.

    The network has five convolutions without normalisation, 2x2 max pooling after the first, second and last
    convolution, and one linear layer over the flattened map instead of three. Images below 8x8, and a `spec.norm` that
    asks for batch or group normalisation, raise a `ConfigError`.
    """
    _require_least_side(spec)
    _refuse_norm(spec)
    layers: list[nn.Module] = []
    inputs = spec.channels
    for published, side in ((128, 5), (192, 5), (256, 3), (192, 3), (192, 3)):
        outputs = _scaled(published, spec)
        layers += [nn.Conv2d(inputs, outputs, side, padding=side // 2), nn.ReLU()]
        if side == 5:
            layers.append(nn.MaxPool2d(2))
        inputs = outputs
    height, width = (side // 8 for side in spec.size)
    return SpatialNetwork(nn.Sequential(*layers), nn.MaxPool2d(2), nn.Linear(inputs * height * width, spec.classes))


def lenet(spec: NetworkSpec) -> SpatialNetwork:
    """LeNet-5 with ReLU and max pooling: two 5x5 convolutions, each pooled 2x2, and three linear layers.

    The network was made for 32x32 pixels. Below 32 pixels the first convolution pads its input by two, as is usual for
    the 28x28 of MNIST. Below 16 pixels the second convolution pads its input by two as well. Images below 8x8, and a
    `spec.norm` that asks for batch or group normalisation, raise a `ConfigError`.
    """
    _require_least_side(spec)
    _refuse_norm(spec)
    first, second = (2 if min(spec.size) < bound else 0 for bound in (32, 16))
    height, width = (((side - 4 + 2 * first) // 2 - 4 + 2 * second) // 2 for side in spec.size)
    features = nn.Sequential(
        nn.Conv2d(spec.channels, 6, kernel_size=5, padding=first),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5, padding=second),
        nn.ReLU(),
    )
    classifier = nn.Sequential(
        nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, spec.classes)
    )
    return SpatialNetwork(features, nn.MaxPool2d(2), classifier)


def mlp(spec: NetworkSpec) -> nn.Sequential:
    """Multilayer perceptron of `spec.depth` linear layers with `spec.width` units and ReLU in each but the last.

    The literature uses width 128 and depth 3. Depth 1 is a linear classifier. A `spec.norm` that asks for batch or
    group normalisation raises a `ConfigError`.
    """
    _refuse_norm(spec)
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = spec.channels * spec.size[0] * spec.size[1]
    for _ in range(spec.depth - 1):
        layers += [nn.Linear(inputs, spec.width), nn.ReLU()]
        inputs = spec.width
    return nn.Sequential(*layers, nn.Linear(inputs, spec.classes))


def vit_small(spec: NetworkSpec) -> SpatialNetwork:
    """ViT-Small: 12 layers of 384 numbers a token and 6 heads of 64, with layer normalisation and no dropout.

    The patch side divides both sides of the image, and leaves nearest to eight patches on the shorter side: 1 pixel at
    8x8, 4 pixels at 28x28 and 32x32. So a square image has about 64 tokens. The classifier reads the mean of the tokens
    (arXiv 2205.01580), not an extra class token. So the tokens form a map, as class activation maps need.

    Raises:
        ConfigError: the image is smaller than 8x8 pixels, `spec.norm` asks for batch or group normalisation, or no
            patch side divides the image into 4 to 16 patches on the shorter side.
    """
    _require_least_side(spec)
    _refuse_norm(spec)
    patch = _patch(*spec.size)
    height, width = (side // patch for side in spec.size)
    heads = max(1, _scaled(6, spec))
    hidden = heads * (_scaled(384, spec) // heads)
    features = nn.Sequential(
        _PatchTokens(spec.channels, patch, height * width, hidden),
        *(TransformerLayer(hidden, heads) for _ in range(12)),
        _LayerNorm(hidden),
        _TokenMaps(height, width),
    )
    return SpatialNetwork(features, GlobalAverage(), nn.Linear(hidden, spec.classes))


def _patch(height: int, width: int) -> int:
    """Side in pixels of a transformer's patches for images of this height and width.

    Raises:
        ConfigError: no patch side divides the image into 4 to 16 patches on the shorter side.
    """
    side, common = min(height, width), math.gcd(height, width)
    patches = [patch for patch in range(1, common + 1) if common % patch == 0 and 4 <= side // patch <= 16]
    if not patches:
        raise ConfigError(
            f"vit-small has no patch size that divides a {height}x{width} image into 4 to 16 patches a side",
            remedy=f"use dataset.resize={max(1, round(side / 8)) * 8}",
        )
    return min(patches, key=lambda patch: abs(side // patch - 8))


class _PatchTokens(nn.Module):
    """Turn images [b c h w] into tokens [b t d]: a linear layer on each patch plus a learned position embedding."""

    def __init__(self, channels: int, patch: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, hidden, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, tokens, hidden))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.patches(images).flatten(2).transpose(1, 2)
        return tokens + self.positions


class TransformerLayer(nn.Module):
    """Transformer layer on tokens [b t d]: residual attention, then a residual perceptron with 4 d hidden units."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(_LayerNorm(hidden), _Attention(hidden, heads))
        self.perceptron = nn.Sequential(
            _LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = tokens + self.attention(tokens)
        changed: Tensor = mixed + self.perceptron(mixed)
        return changed


class _LayerNorm(nn.LayerNorm):
    """Normalise every token [.. d] to mean 0 and variance 1, then scale and shift.

    torch's own layer gives a wrong derivative, without an error, if its tangent is differentiated backwards, as in a
    student step. torch then treats mean and variance as constants (github.com/pytorch/pytorch/issues/196700). For a
    random input [4 6] in float64, torch 2.14.1 differs from finite differences by 27 %, this layer by 5e-11. A test in
    tests/core/networks/test_layer_norm.py fails once torch is right.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))  # for sums in bfloat16
        centred = wide - wide.mean(dim=-1, keepdim=True)
        normal = centred * torch.rsqrt((centred * centred).mean(dim=-1, keepdim=True) + self.eps)
        scaled: Tensor = normal.to(tokens.dtype) * self.weight + self.bias
        return scaled


class _Attention(nn.Module):
    """Multi-head self-attention of tokens [b t d], computed by matrix products instead of torch's fused kernel."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (hidden // heads) ** -0.5
        self.projection = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.projection(tokens).unflatten(2, (3, self.heads, -1))  # [b t 3 heads d/heads]
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)  # [b heads t d/heads] each
        shares = (queries @ keys.transpose(2, 3) * self.scale).softmax(dim=3)  # [b heads t t]
        mixed: Tensor = self.output((shares @ values).transpose(1, 2).flatten(2))
        return mixed


class _TokenMaps(nn.Module):
    """Arrange tokens [b t d] as maps [b d h w] of t = h w patches, each token at its patch's position."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.grid = (height, width)

    def forward(self, tokens: Tensor) -> Tensor:
        maps: Tensor = tokens.transpose(1, 2).unflatten(2, self.grid)
        return maps


class GlobalAverage(nn.Module):
    """Average maps [b c h w] over their positions to [b c]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3))


def _scaled(published: int, spec: NetworkSpec) -> int:
    """Scale a layer's published number of channels (or heads) by `spec.width` / 128, rounded down; at least 1."""
    return max(1, published * spec.width // 128)


def _normalisation(norm: Norm, width: int) -> nn.Module:
    if norm == "instance":
        return InstanceNorm(width)
    if norm == "group":
        return nn.GroupNorm(math.gcd(32, width), width)  # at most 32 groups, all of one size
    if norm == "batch":
        return nn.BatchNorm2d(width)
    return nn.Identity()


def _pooling(pooling: Pooling) -> nn.Module:
    if pooling == "none":
        return nn.Identity()
    return nn.AvgPool2d(2) if pooling == "avg" else nn.MaxPool2d(2)


def _he_initialised(network: SpatialNetwork) -> SpatialNetwork:
    """Initialise a network's convolutions as by He et al., in place, and return the network.

    So they keep the scale of maps and gradients. With torch's default initialisation, the last maps of VGG-11 without
    normalisation differ between images by only 1e-4.
    """
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.groups > 1:  # torch's fan-out counts the outputs of all groups
                part.weight.data.mul_(math.sqrt(part.groups))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return network


def _require_least_side(spec: NetworkSpec) -> None:
    height, width = spec.size
    if min(height, width) < LEAST_SIDE:
        raise ConfigError(
            f"{spec.architecture} takes images of at least {LEAST_SIDE}x{LEAST_SIDE} pixels, not {height}x{width}",
            remedy=f"use dataset.resize={LEAST_SIDE} or more, or network.architecture=convnet",
        )


def _refuse_norm(spec: NetworkSpec) -> None:
    if spec.norm in ("batch", "group"):
        raise ConfigError(
            f"network.norm is {spec.norm!r}, but {spec.architecture} has no choice of normalisation",
            remedy="use network.norm=none",
        )
