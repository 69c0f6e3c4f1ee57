"""Tests the import of trained classifiers: torchvision's weights give its logits, and bad files are refused."""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v2, resnet, resnet18

from datm_ray.artifact import load
from datm_ray.config import NetworkConfig, RunConfig, parse_config
from datm_ray.core.networks.registry import build_network
from datm_ray.data.dataset import prepare
from datm_ray.data.sources import load_raw
from datm_ray.data.transform import fit_transform
from datm_ray.errors import ConfigError, CorruptFileError, DatasetError, StoreError
from datm_ray.interop import teachers
from datm_ray.interop.accuracy import Accuracy
from datm_ray.interop.names import torchvision_names
from datm_ray.interop.teachers import import_teacher, load_weights, read_weights
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.experts.train import expert_group
from datm_ray.stages.methods.registry import teacher_of
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.trajectories import TrajectoryStore
from tests.conftest import CommandLine, load_config_text

MEAN, STD = [0.3], [0.4]


def recipe(**changes: Any) -> RunConfig:
    """A recipe of SRe2L on digits, whose teacher is torchvision's ResNet-18 with a small first layer."""
    values: dict[str, Any] = {
        "name": "tiny",
        "method": "sre2l",
        "dataset": {"mean": MEAN, "std": STD},
        "network": {"architecture": "resnet18", "norm": "batch"},
        "experts": {"count": 1, "epochs": 3, "keep_epochs": 1},
        "distill": {"ipc": 1, "iterations": 1, "initial": "noise", "start_epochs": [0, 1]},
    }
    return parse_config(values | changes, "test")


def with_statistics(network: nn.Module) -> nn.Module:
    """The network with random running statistics, so that a mistake in them changes the logits."""
    draw = torch.Generator().manual_seed(1)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=draw) + (0.5 if name.endswith("var") else -0.5))
    return network.eval()


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """torchvision's ResNet-18 for images of one channel and up to 64 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = resnet18(num_classes=10)
        network.conv1 = nn.Conv2d(1, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.layer4[0].conv1.stride = network.layer4[0].downsample[0].stride = (1, 1)  # at 8x8 pixels
    return with_statistics(network)


def write(folder: Path, weights: Mapping[str, Tensor], name: str) -> str:
    """Write weights as a file of this name. Returns its path."""
    path = folder / name
    if name.endswith(".safetensors"):
        save_file(dict(weights), path)
    elif name.endswith(".tar"):
        torch.save({"epoch": 7, "state_dict": {f"module.{key}": each for key, each in weights.items()}}, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=name.endswith(".pth"))
    return str(path)


@pytest.mark.parametrize("name", ["new.pth", "legacy.pt", "training.tar", "plain.safetensors"])
def test_every_kind_of_file_gives_the_same_weights(reference: nn.Module, tmp_path: Path, name: str) -> None:
    """Files of torch, of its former format, with more than weights, and safetensors give the same tensors."""
    weights = read_weights(open_location(write(tmp_path, reference.state_dict(), name)))
    assert weights.keys() == reference.state_dict().keys()
    assert all(torch.equal(weights[key], each) for key, each in reference.state_dict().items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_torch_are_left_out(tmp_path: Path, prefix: str) -> None:
    """Weights of a network that was compiled, or trained in parallel, have the names of the network."""
    weights = {f"{prefix}fc.{name}": torch.ones(2) for name in ("weight", "bias")}
    assert read_weights(open_location(write(tmp_path, weights, "a.pth"))).keys() == {"fc.weight", "fc.bias"}


def test_a_network_that_was_averaged_is_read(tmp_path: Path) -> None:
    """The counter of torch's averaged networks is not read; two weights whose names become one are refused."""
    network = nn.Linear(3, 2)
    averaged = torch.optim.swa_utils.AveragedModel(network)
    path = write(tmp_path, averaged.state_dict(), "a.pth")
    assert load_weights(network, read_weights(open_location(path))) == ""
    path = write(tmp_path, {"module.weight": torch.ones(2), "weight": torch.zeros(2)}, "b.pth")
    with pytest.raises(CorruptFileError, match="is not a state_dict"):
        read_weights(open_location(path))


@pytest.mark.parametrize("is_new", [True, False])
def test_checkpoints_of_training_programs_are_read(tmp_path: Path, is_new: bool) -> None:
    """A checkpoint as timm's program writes it, with options, an optimiser and numbers of numpy, gives its weights."""
    network = nn.Linear(3, 2)
    sgd = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.ones(1, 3)).sum().backward()
    sgd.step()
    options = argparse.Namespace(model="resnet18", mean=(0.4,), more=argparse.Namespace(workers=None))
    checkpoint = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": network.state_dict(),
        "optimizer": sgd.state_dict(),
        "args": options,
        "metric": np.float64(77.1),
        "saver": {"best_metric": np.float32(0.5), "epochs": np.int64(3)},
    }
    path = tmp_path / "model_best.pth.tar"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=is_new)
    weights = read_weights(open_location(str(path)))
    assert weights.keys() == {"weight", "bias"}
    assert torch.equal(weights["weight"], network.weight)
    torch.save(checkpoint | {"args": argparse.Namespace(evil=Evil())}, path, _use_new_zipfile_serialization=is_new)
    with pytest.raises(CorruptFileError, match=r"holds an object of \S+, and objects could run code\. Write"):
        read_weights(open_location(str(path)))


def test_a_whole_network_is_refused_by_its_class(tmp_path: Path) -> None:
    """A file with a network in place of its state_dict is refused, and the line names the network's class."""
    path = tmp_path / "network.pt"
    torch.save(nn.Sequential(nn.Linear(1, 1)), path)
    with pytest.raises(
        CorruptFileError, match=r"holds an object of torch\.nn\.modules\.\w+\.Sequential, .*state_dict\("
    ):
        read_weights(open_location(str(path)))


def test_an_imported_teacher_is_torchvisions_network(reference: nn.Module, tmp_path: Path) -> None:
    """An imported teacher has torchvision's logits of images under the recipe's normalisation, and its transform."""
    config = recipe().resolved((8, 8))
    imported = import_teacher(write(tmp_path, reference.state_dict(), "a.safetensors"), config, str(tmp_path / "store"))
    raw = load_raw("digits", None)
    dataset = prepare(raw, fit_transform("standard", raw.train.images, raw.levels, given=(MEAN, STD)))
    images = torch.from_numpy((raw.test.images[:20] / 16 - MEAN[0]) / STD[0])
    torch.testing.assert_close(torch.from_numpy(dataset.test_images[:20]), images.float())
    found = ExpertNetworks(config, dataset, str(tmp_path / "store"), torch.device("cpu"))
    network, wide = found.restored(0).eval(), copy.deepcopy(reference).double()
    with torch.no_grad():
        torch.testing.assert_close(network(images.float()), reference(images.float()), atol=1e-5, rtol=0)
        torch.testing.assert_close(network.double()(images), wide(images), atol=1e-10, rtol=0)
        answers = reference(torch.from_numpy(dataset.test_images)).argmax(dim=1).numpy()
    transform, info = found.group.read_transform().arrays, found.group.read_info(0)
    np.testing.assert_array_equal([transform["mean"], transform["std"]], np.array([MEAN, STD], np.float32))
    assert (info.epochs, info.recipe["imported"]["file"]) == ((3,), "a.safetensors")
    assert (imported.expert, imported.accuracy.images) == (0, len(raw.test))
    assert imported.accuracy.share == pytest.approx((answers == dataset.test_labels).mean())


@pytest.mark.parametrize(("name", "size"), [("resnet50", 65), ("mobilenet-v2", 65), ("resnet101", 0)])
def test_torchvisions_names_are_known(name: str, size: int) -> None:
    """Weights of torchvision's other networks fit by name, with ImageNet's first layers, and give equal logits."""
    spec = NetworkConfig(architecture=name, norm="batch").for_images(3, (size or 96, size or 96), 5)
    builder = mobilenet_v2 if name == "mobilenet-v2" else getattr(resnet, name)
    if not size:
        with torch.device("meta"):
            assert load_weights(build_network(spec, 0), builder(num_classes=5).state_dict()) == ""
        return
    reference, network = with_statistics(builder(num_classes=5)).double(), build_network(spec, 0).double().eval()
    weights = dict(reversed(reference.state_dict().items()))
    assert load_weights(network, weights) == ""
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference(images), atol=1e-10, rtol=1e-9)


FIRST_OF_STAGES = (1, 2, 4, 7, 11, 14, 17)
"""Indices of the first block of each stage in torchvision's MobileNetV2; its first convolution has index 0."""


def timm_name(name: str) -> str:
    """Name in timm's mobilenetv2_100 of a weight of torchvision's MobileNetV2."""
    if name.startswith("classifier."):
        return name.replace(".1.", ".")
    place, *inner = name.removeprefix("features.").split(".")
    if place in ("0", "18"):
        names = {"0": ("conv_stem", "bn1"), "18": ("conv_head", "bn2")}[place]
        return f"{names[int(inner[0])]}.{inner[-1]}"
    stage = max(number for number, first in enumerate(FIRST_OF_STAGES) if first <= int(place))
    first = ["conv_dw", "bn1", "conv_pw", "bn2"]
    order = [*first] if stage == 0 else ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
    outer, within = int(inner[1]), int(inner[2]) if len(inner) == 4 else 0
    activated = len(order) // 2 - 1  # convolutions that are followed by an activation, each with its normalisation
    position = 2 * outer + within if outer < activated else activated + outer
    return f"blocks.{stage}.{int(place) - FIRST_OF_STAGES[stage]}.{order[position]}.{inner[-1]}"


def test_timms_names_of_mobilenet_are_known() -> None:
    """Weights of MobileNetV2 by timm's names fit, and give torchvision's logits."""
    reference = with_statistics(mobilenet_v2(num_classes=5)).double()
    weights = {timm_name(name): each for name, each in reference.state_dict().items()}
    shapes = {
        "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
        "blocks.2.1.conv_dw.weight": (192, 1, 3, 3),
        "blocks.6.0.bn3.running_var": (320,),
        "conv_head.weight": (1280, 320, 1, 1),
        "bn2.bias": (1280,),
        "classifier.weight": (5, 1280),
    }  # as timm 1.0.31 has them
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes
    spec = NetworkConfig(architecture="mobilenet-v2", norm="batch").for_images(3, (65, 65), 5)
    network = build_network(spec, 0).double().eval()
    assert load_weights(network, weights) == ""
    images = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference(images), atol=1e-10, rtol=1e-9)


def timm_transformer(hidden: int, patch: int, tokens: int) -> dict[str, Tensor]:
    """Random weights of timm's vit_small without a class token, for images of 3 channels and 5 classes."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (hidden, 3, patch, patch)}
    shapes |= {"patch_embed.proj.bias": (hidden,), "pos_embed": (1, tokens, hidden)}
    for block in (f"blocks.{number}" for number in range(12)):
        linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (outputs, inputs) in linear.items():
            shapes[f"{block}.{name}.weight"] = outputs * hidden, inputs * hidden
            shapes[f"{block}.{name}.bias"] = (outputs * hidden,)
        shapes |= {f"{block}.{norm}.{kind}": (hidden,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    shapes |= {"norm.weight": (hidden,), "norm.bias": (hidden,), "head.weight": (5, hidden), "head.bias": (5,)}
    draw = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def logits_of_transformer(weights: Mapping[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """Logits of timm's vision transformer with class_token=False, global_pool="avg" and fc_norm=False."""

    def linear(name: str, values: Tensor) -> Tensor:
        return functional.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, values: Tensor) -> Tensor:
        size = values.shape[-1:]
        return functional.layer_norm(values, size, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    kernel = weights["patch_embed.proj.weight"]
    patches = functional.conv2d(images, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = patches.flatten(2).transpose(1, 2) + weights["pos_embed"]
    for block in (f"blocks.{number}" for number in range(12)):
        parts = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(2, (3, heads, -1))
        mixed = functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        x = x + linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.mlp.fc2", functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
    return linear("head", norm("norm", x).mean(dim=1))


def test_timms_names_of_a_transformer_are_known() -> None:
    """Weights of a vit-small without class token, by timm's names, fit and give the logits of timm's formulas.

    One with a class token, or with its last normalisation after the mean, is refused by the names that differ.
    """
    spec = NetworkConfig(architecture="vit-small", norm="none", width=64).for_images(3, (8, 8), 5)
    network, weights = build_network(spec, 0).double().eval(), timm_transformer(192, 1, 64)
    assert load_weights(network, weights) == ""
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = logits_of_transformer(weights, images, heads=3)
        torch.testing.assert_close(network(images), expected, atol=1e-10, rtol=1e-9)
    with_token = weights | {"cls_token": torch.zeros(1, 1, 192), "pos_embed": torch.zeros(1, 65, 192)}
    difference = load_weights(network, with_token)
    assert difference == "it has unknown cls_token; other shapes: pos_embed [1, 65, 192] instead of [1, 64, 192]"
    late = {name if name[:5] != "norm." else f"fc_{name}": each for name, each in weights.items()}
    difference = load_weights(network, late)
    assert difference == "it lacks norm.bias and norm.weight; it has unknown fc_norm.bias and fc_norm.weight"


def test_own_names_are_known() -> None:
    """Weights of a network of this package fit by its own names."""
    spec = NetworkConfig(architecture="convnet", norm="batch", width=4).for_images(1, (8, 8), 10)
    one, other = with_statistics(build_network(spec, 0)), build_network(spec, 1).eval()
    assert load_weights(other, one.state_dict()) == ""
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(one(images), other(images))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)},
            r"fc\.weight \[7, 512\] instead of \[10, 512\]",
        ),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, r"conv1\.weight \[64, 3, 7, 7\] instead of \[64, 1, 3, 3\]"),
        ({"bn1.weight": None}, r"lacks bn1\.weight\."),
        ({f"extra{n}": torch.zeros(1) for n in range(5)}, r"unknown extra0, extra1, extra2 and 2 more"),
    ],
)
def test_weights_of_another_network_are_refused(
    reference: nn.Module, tmp_path: Path, change: dict[str, Tensor | None], words: str
) -> None:
    """Weights of another network are refused in one line with the first differences, and nothing is stored."""
    weights = {name: each for name, each in (reference.state_dict() | change).items() if each is not None}
    with pytest.raises(StoreError, match=rf"does not fit tiny\. resnet18: .*{words}"):
        import_teacher(write(tmp_path, weights, "other.pth"), recipe(), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


class Evil:
    """An object whose pickle would make a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("evil"),)


def bad_file(kind: str, weights: dict[str, Tensor]) -> bytes:
    """Content of a file that is no state_dict of finite values."""
    file = io.BytesIO()
    values: dict[str, Any] = {
        "list": [1, 2],
        "code": weights | {"fc.bias": Evil()},
        "infinite": weights | {"fc.bias": torch.full((10,), float("nan"))},
        "expanded": weights | {"fc.bias": torch.zeros(1).expand(10**12)},
        "numbers": {"a": 1},
        "negative": weights | {"bn1.running_var": torch.tensor([1.0, -1e-9])},
    }
    if kind in values:
        torch.save(values[kind], file)
        return file.getvalue()
    torch.save(weights, file)
    return {
        "empty": b"",
        "text": b"hello",
        "cut": file.getvalue()[:1000],
        "pickle": pickle.dumps(Evil()),
        "zip": zipped(),
    }[kind]


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Evil()))
    return file.getvalue()


BAD = ["list", "code", "infinite", "expanded", "numbers", "negative", "empty", "text", "cut", "pickle", "zip"]


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
@pytest.mark.parametrize("kind", BAD)
def test_files_without_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    """Unreadable files, other content and code are refused with exit code 2 and in one line; nothing is executed."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(bad_file(kind, {"fc.bias": torch.zeros(10), "fc.weight": torch.zeros(10, 3)}))
    fact = {"infinite": "values that are not finite", "negative": r"negative variances in bn1\.running_var"}
    with pytest.raises(CorruptFileError, match=fact.get(kind if name.endswith("pth") else "", "not a ")) as caught:
        read_weights(open_location(str(path)))
    assert "\n" not in str(caught.value)
    assert caught.value.cause
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    assert not (tmp_path / "evil").exists()


def test_files_that_cannot_be_read_are_no_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, and a file that does not fit into memory, are named as such, with a remedy."""
    with pytest.raises(StoreError, match="Is a directory") as caught:
        read_weights(open_location(str(tmp_path)))
    assert caught.value.remedy
    file = open_location(write(tmp_path, {"a": torch.zeros(1)}, "a.pth"))
    for failure in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")):
        monkeypatch.setattr(torch, "load", lambda *_, failure=failure, **__: raising(failure))
        with pytest.raises(StoreError, match=r"not enough memory to read .*a\.pth\. The file has .*B\. End"):
            read_weights(file)


def raising(failure: Exception) -> None:
    raise failure


def small_weights(**changes: float) -> dict[str, Tensor]:
    """Weights of the teacher of `RECIPE`. A changed tensor, with __ for its dots, has one value everywhere."""
    spec = NetworkConfig(architecture="mobilenet-v2", norm="batch", width=8).for_images(1, (8, 8), 10)
    weights = dict(with_statistics(build_network(spec, 5)).state_dict())
    for name, value in changes.items():
        key = name.replace("__", ".")
        weights[key] = torch.full_like(weights[key], value)
    return weights


def small_recipe() -> RunConfig:
    """Recipe of `RECIPE`."""
    return load_config_text(RECIPE, "test")


def test_a_network_with_infinite_logits_is_refused(tmp_path: Path) -> None:
    """A file of finite values whose network overflows is refused, and nothing is stored."""
    file = write(tmp_path, small_weights(classifier__weight=3e38), "large.pth")
    with pytest.raises(CorruptFileError, match=r"large\.pth gives logits that are not finite\. .*\. Import"):
        import_teacher(file, small_recipe(), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_network_that_guesses_is_stored_with_a_warning(datm_ray: CommandLine, tmp_path: Path) -> None:
    """A network that is no better than guessing is imported, and one line of stderr says so."""
    write(tmp_path, small_weights(classifier__weight=0.0, classifier__bias=0.0), "guess.pth")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    code, out, err = datm_ray("store", "import-teacher", "guess.pth", "--recipe", "tiny.yaml", "--store", "store")
    warnings = [line for line in err.splitlines() if line.startswith("datm-ray:")]
    assert (code, len(warnings), "Next: datm-ray run" in out) == (0, 1, True), err
    assert re.search(
        r"no better than guessing one of 10 classes\. .*Try: `datm-ray store rm store digits/", warnings[0]
    )


@pytest.mark.parametrize(("share", "images", "is_guessing"), [
    (0.0, 1000, True), (0.1, 1000, True), (0.118, 1000, True), (0.12, 1000, False), (0.9, 1000, False), (0.4, 10, False)
])  # fmt: skip
def test_guessing_is_a_matter_of_the_number_of_images(share: float, images: int, is_guessing: bool) -> None:
    """A network guesses if its accuracy is at most two standard deviations above that of a guess."""
    assert Accuracy(share, images, 10).is_guessing == is_guessing


def test_an_import_that_comes_second_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another process stores the expert during an import, the import says that it stored nothing."""
    measured = teachers.accuracy_of

    def meanwhile(*arguments: Any) -> Accuracy:
        monkeypatch.setattr(teachers, "accuracy_of", measured)
        import_teacher(write(tmp_path, small_weights(), "one.pth"), small_recipe(), str(tmp_path / "store"))
        return measured(*arguments)

    monkeypatch.setattr(teachers, "accuracy_of", meanwhile)
    with pytest.raises(StoreError, match=r"two\.pth was not stored in .*Another process stored expert 0 .*store show"):
        import_teacher(
            write(tmp_path, small_weights(classifier__bias=1.0), "two.pth"), small_recipe(), str(tmp_path / "store")
        )


def test_an_import_needs_the_normalisation_and_a_network(tmp_path: Path) -> None:
    """A recipe without normalisation, one that trains no network, and a missing file are refused."""
    with pytest.raises(ConfigError, match=r"dataset\.mean and dataset\.std are not given.*--set dataset\.mean="):
        import_teacher("x.pth", recipe(dataset={"normalisation": "standard"}), str(tmp_path))
    with pytest.raises(StoreError, match=r"x\.pth"):
        import_teacher(str(tmp_path / "x.pth"), recipe(), str(tmp_path))
    file = write(tmp_path, {"a": torch.zeros(1)}, "a.pth")
    with pytest.raises(ConfigError, match="method dm trains no network"):
        import_teacher(file, recipe(method="dm", network="convnet"), str(tmp_path))
    with pytest.raises(DatasetError, match=r"dataset\.mean has 3 numbers, and the images have 1 channel"):
        import_teacher(file, recipe(dataset={"mean": [0.1] * 3, "std": [0.2] * 3}), str(tmp_path))


def test_a_teacher_of_evaluation_is_imported_for_a_method_without_experts(tmp_path: Path) -> None:
    """A file that fits `evaluate.teacher` becomes the teacher of a run of dm, which trains no network itself."""
    teacher = {"network": {"architecture": "mobilenet-v2", "norm": "batch", "width": 8}, "experts": {"epochs": 3}}
    evaluate = {"labels": "teacher", "teacher": teacher}
    config = recipe(method="dm", network="convnet", evaluate=evaluate).resolved((8, 8))
    imported = import_teacher(write(tmp_path, small_weights(), "a.pth"), config, str(tmp_path / "store"))
    raw = load_raw("digits", None)
    group = expert_group(str(tmp_path / "store"), teacher_of(config), raw.name, raw.fingerprint)
    assert (str(group.key), group.experts()) == (imported.group, [0])


RECIPE = """
name: tiny
method: sre2l
dataset: {mean: [0.3], std: [0.4]}
network: {architecture: mobilenet-v2, norm: batch, width: 8}
experts: {count: 1, epochs: 3, keep_epochs: 1}
distill: {ipc: 1, iterations: 1, initial: noise, start_epochs: [0, 1], expert_epochs: 1}
metadd: {auxiliaries: [{architecture: convnet, width: 4}], experts: {epochs: 1}}
evaluate: {protocol: quick, epochs: 1, seeds: 1, full: false, labels: stored}
cluster: {compile: false, workers: 1}
"""


def test_a_run_uses_an_imported_teacher(datm_ray: CommandLine, tmp_path: Path) -> None:
    """A run of SRe2L, MetaDD and stored labels uses an imported teacher and does not train one."""
    spec = NetworkConfig(architecture="mobilenet-v2", norm="batch", width=8).for_images(1, (8, 8), 10)
    teacher = with_statistics(build_network(spec, 5))
    weights = {torchvision_names(teacher).get(name, name): each for name, each in teacher.state_dict().items()}
    write(tmp_path, weights, "teacher.safetensors")
    other = next(name for name in weights if name.endswith("running_mean"))
    write(tmp_path, weights | {other: weights[other] + 1}, "other.safetensors")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    arguments = ["store", "import-teacher", "teacher.safetensors", "--recipe", "tiny.yaml", "--store", "store"]
    code, out, err = datm_ray(*arguments)
    assert code == 0, err
    found = re.match(r"(\S+) expert 0\n.* of (\d+) test images correctly\nNext: datm-ray run tiny.yaml", out)
    assert found, out
    assert int(found[2]) == len(load_raw("digits", None).test)
    code, _, err = datm_ray(*arguments)
    assert (code, "holds the experts of tiny already" in err) == (2, True)
    code, out, err = datm_ray("run", "tiny.yaml", "--store", "store", "--out", "runs", "--executor", "serial")
    assert code == 0, out + err
    stored = TrajectoryStore("store").group(*found[1].split("/"))
    assert (stored.experts(), stored.read_info(0).epochs) == ([0], (3,))
    soft = load("runs/tiny/synthetic.arrow")
    with torch.no_grad():
        logits = teacher(torch.from_numpy(np.asarray(soft.images)))
    torch.testing.assert_close(torch.from_numpy(np.asarray(soft.soft_labels)), logits, atol=1e-4, rtol=1e-4)
    again = ["run", "tiny.yaml", "--out", "runs", "--executor", "serial", "--store"]
    assert datm_ray("store", "import-teacher", "teacher.safetensors", *arguments[3:-1], "same")[0] == 0
    assert datm_ray("store", "import-teacher", "other.safetensors", *arguments[3:-1], "other")[0] == 0
    assert datm_ray(*again, "same")[0] == 0  # the same weights in another store
    for options in ([], ["--set", "name=tiny2"], ["--dry-run"]):  # runs of one folder share rows on random images
        code, _, err = datm_ray(*again, "other", *options)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert re.search(
            r"of other experts than those.*imported with weights \w{8} there, and .*Give another --out", err
        )
    assert datm_ray("run", "tiny.yaml", "--out", "b", "--store", "other", "--executor", "serial", "--dry-run")[0] == 0


def test_a_trained_teacher_is_not_replaced_by_an_imported_one(datm_ray: CommandLine, tmp_path: Path) -> None:
    """Results with a trained teacher refuse an imported one, also from the folder's own store; results without do not.

    A note of an earlier version names no experts and refuses none.
    """
    (tmp_path / "tiny.yaml").write_text(re.sub(r"(?m)^metadd.*\n", "", RECIPE).replace("epochs: 3", "epochs: 1"))
    write(tmp_path, small_weights(), "teacher.pth")
    run = ["run", "tiny.yaml", "--executor", "serial", "--out", "runs", "--store"]
    assert datm_ray(*run, "own")[0] == 0
    arguments = ["store", "import-teacher", "teacher.pth", "--recipe", "tiny.yaml", "--store", "other"]
    assert datm_ray(*arguments)[0] == 0
    code, _, err = datm_ray(*run, "other")
    assert (code, "was trained there, and was imported" in err) == (2, True), err
    note = tmp_path / "runs" / "tiny" / "dataset.json"
    values = json.loads(note.read_text())
    assert list(values["experts"].values()) == [""]
    note.write_text(json.dumps({key: value for key, value in values.items() if key != "experts"}))
    assert datm_ray(*run, "other", "--dry-run")[0] == 0


def test_experts_with_one_epoch_are_not_matched(datm_ray: CommandLine, tmp_path: Path) -> None:
    """Trajectory matching refuses an imported teacher, which has its last epoch alone, before anything starts."""
    spec = NetworkConfig(width=4).for_images(1, (8, 8), 10)
    write(tmp_path, build_network(spec, 0).state_dict(), "teacher.pth")
    settings = ["dataset.mean=[0.3]", "dataset.std=[0.4]", "network.width=4", "experts.count=1"]
    options = [word for each in settings for word in ("--set", each)] + ["--store", "store"]
    code, _, err = datm_ray("store", "import-teacher", "teacher.pth", "--recipe", "digits-ipc1", *options)
    assert code == 0, err
    code, _, err = datm_ray("run", "digits-ipc1", *options, "--executor", "serial")
    assert (code, "imported with their last epoch alone" in err) == (2, True), err
