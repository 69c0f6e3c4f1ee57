"""Names of weights in torchvision and timm, for networks that this package defines too.

Each table maps the name of a module or parameter in this package to its name in the other library. Tests:
tests/test_teachers.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from datm_ray.core.networks.architectures import (
    INVERTED_STAGES,
    InvertedResidual,
    ResidualBlock,
    SpatialNetwork,
    TransformerLayer,
)
from datm_ray.core.networks.parameters import float_buffers

_IN_INVERTED = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
"""Name of a module in the branch of an `InvertedResidual` -> its name in a block of timm's MobileNetV2."""
_IN_FIRST_INVERTED = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
"""Table like `_IN_INVERTED` for the network's first `InvertedResidual`, which has no widening 1x1 convolution."""
_IN_TRANSFORMER = {
    **{"attention.0": "norm1", "attention.1.projection": "attn.qkv", "attention.1.output": "attn.proj"},
    **{"perceptron.0": "norm2", "perceptron.1": "mlp.fc1", "perceptron.3": "mlp.fc2"},
}
"""Name of a module in a `TransformerLayer` -> its name in a block of timm's transformers."""


def torchvision_names(network: nn.Module) -> dict[str, str]:
    """Name of every parameter and float buffer of a network -> its name in torchvision, for ResNets and MobileNetV2.

    Names in other networks are mapped to themselves.
    """
    layers = _layers(network)
    parts = _resnet_parts(layers)
    for place, layer in enumerate(layers):
        if isinstance(layer, InvertedResidual):
            parts |= {f"features.{place}.branch": f"features.{place}.conv", "classifier": "classifier.1"}
    return _renamed(network, parts)


def timm_names(network: nn.Module) -> dict[str, str]:
    """Name of every parameter and float buffer of a network -> its name in timm, for ResNets, MobileNetV2, vit-small.

    Names in other networks are mapped to themselves. ResNets have the same names in timm as in torchvision. In timm,
    vit-small is the variant without a class token.
    """
    layers = _layers(network)
    return _renamed(network, _resnet_parts(layers) | _inverted_parts(layers) | _transformer_parts(layers))


def _layers(network: nn.Module) -> list[nn.Module]:
    """Layers before the pooling of a `SpatialNetwork` of this package; empty for other networks."""
    if isinstance(network, SpatialNetwork) and isinstance(network.features, nn.Sequential):
        return list(network.features)
    return []


def _renamed(network: nn.Module, parts: Mapping[str, str]) -> dict[str, str]:
    """Name of every parameter and float buffer of a network -> its name in another library.

    Args:
        parts: name of a module or parameter here -> its name in the other library. Names without an entry stay.
    """
    found = {}
    for name in [*dict(network.named_parameters()), *float_buffers(network)]:
        part = next((part for part in parts if f"{name}.".startswith(f"{part}.")), "")
        found[name] = parts[part] + name.removeprefix(part) if part else name
    return found


def _resnet_parts(layers: list[nn.Module]) -> dict[str, str]:
    """Name of a module in this package's ResNet -> its name in torchvision and timm; empty for other networks."""
    parts, stage, number = {"features.0": "conv1", "features.1": "bn1", "classifier": "fc"}, 0, 0
    for place, layer in enumerate(layers):
        if isinstance(layer, ResidualBlock):
            begins = stage == 0 or isinstance(layer.shortcut, nn.Sequential)
            stage, number = (stage + 1, 0) if begins else (stage, number + 1)
            ours, theirs = f"features.{place}", f"layer{stage}.{number}"
            parts[f"{ours}.shortcut"] = f"{theirs}.downsample"
            for inner in range(len(layer.branch)):
                step, kind = divmod(inner, 3)
                parts[f"{ours}.branch.{inner}"] = f"{theirs}.{('conv', 'bn', 'relu')[kind]}{step + 1}"
    return parts if stage else {}


def _inverted_parts(layers: list[nn.Module]) -> dict[str, str]:
    """Name of a module in this package's MobileNetV2 -> its name in timm; empty for other networks."""
    counts = [count for _, _, count, _ in INVERTED_STAGES]
    blocks = [f"blocks.{stage}.{number}" for stage, count in enumerate(counts) for number in range(count)]
    found: dict[str, str] = {}
    for place, layer in enumerate(layers):
        if isinstance(layer, InvertedResidual):
            names = _IN_INVERTED if len(layer.branch) == 4 else _IN_FIRST_INVERTED
            found |= {
                f"features.{place}.branch.{ours}": f"{blocks[place - 1]}.{theirs}" for ours, theirs in names.items()
            }
    ends = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    ends |= {f"features.{len(layers) - 1}.0": "conv_head", f"features.{len(layers) - 1}.1": "bn2"}
    return found | ends if found else {}


def _transformer_parts(layers: list[nn.Module]) -> dict[str, str]:
    """Name of a module in this package's transformer -> its name in timm; empty for other networks."""
    places = [place for place, layer in enumerate(layers) if isinstance(layer, TransformerLayer)]
    if not places:
        return {}
    found = {"features.0.patches": "patch_embed.proj", "features.0.positions": "pos_embed", "classifier": "head"}
    found[f"features.{places[-1] + 1}"] = "norm"
    for number, place in enumerate(places):
        found |= {f"features.{place}.{ours}": f"blocks.{number}.{theirs}" for ours, theirs in _IN_TRANSFORMER.items()}
    return found
