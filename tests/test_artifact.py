"""Tests the synthetic set as a file: whole or refused, usable as it is, and readable by others once exported."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load as parse_numpy, save as numpy_file
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, PILToTensor

from datm_ray.artifact import KIND, SCORING, Artifact, load, save_artifact, without_transform
from datm_ray.cli.runs import ExportFormat
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.loop import PROTOCOLS, Schedule
from datm_ray.data import Transform, fit_transform, load_raw
from datm_ray.data.transform import Kind
from datm_ray.errors import ConfigError, CorruptFileError, DatasetError, StoreError
from datm_ray.interop.exports import EXPORTS, export, left_out
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.tensors import read_tensors, write_tensors
from tests.conftest import recorded_steps, scoring_steps

NAMES = ("a cat", "dog")
RECIPE = {"name": "test", "distill": {"ipc": 10}, "evaluate": {"protocol": "quick", "augmentation": "flip_crop"}}
PROVENANCE = {"torch": "1", "experts": [0, 1]}


def real_images(channels: int = 3, count: int = 20) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, channels, 6, 5), dtype=np.uint8)


def save(
    path: Path, kind: Kind = "zca", channels: int = 3, names: tuple[str, ...] = NAMES, count: int = 20
) -> Transform:
    """Save a synthetic set whose images are the real ones, normalised."""
    images = real_images(channels, count)
    transform = fit_transform(kind, images, 255)
    labels = torch.arange(len(images)) % len(names)
    synthetic = SyntheticSet(
        torch.from_numpy(transform.apply(images.astype(np.float32) / 255)),
        torch.randn(len(images), len(names), generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.0123, 0.5]),
        labels,
    )
    save_artifact(open_location(str(path)), synthetic, transform, names, RECIPE, PROVENANCE, has_step_size=True)
    return transform


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "synthetic.arrow"
    save(path)
    return path


@pytest.fixture
def artifact(path: Path) -> Artifact:
    return load(str(path))


README = Path(__file__).parents[1] / "README.md"
USING = (README.parent / "docs/using-a-set.md").read_text()


CHOSEN = dataclasses.replace(PROTOCOLS["quick"], learning_rate=0.03, augmentation="flip_crop", batch_size=16)
COSINE: dict[str, Any] = {"decay_epoch": None, "cosine": True, "warmup_epochs": 2, "batch_size": 8}


@pytest.mark.parametrize("kind", ["zca", "standard"])
def test_the_snippet_of_the_readme_runs(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's snippet trains a network on a set and tests it, with any normalisation."""
    section = README.read_text().partition("### Use a set\n")[2]
    snippet = section.partition("```python\n")[2].partition("```")[0]
    place = re.search(r'load\("(.+)"\)', snippet)
    assert place is not None
    save(tmp_path / place[1], kind)
    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(90, 2))
    before = network[1].weight.detach().clone()
    test_images = torch.from_numpy(real_images().astype(np.float32) / 255)
    names: dict[str, Any] = {"network": network, "test_images": test_images, "test_labels": torch.arange(20) % 2}
    exec(snippet, names)
    assert 0 <= float(names["accuracy"]) <= 1
    assert not torch.equal(network[1].weight, before)
    for schedule in (CHOSEN, dataclasses.replace(CHOSEN, **COSINE), dataclasses.replace(CHOSEN, optimiser="adamw")):
        open_location(str((tmp_path / place[1]).parent / SCORING)).write_json(schedule.to_json())
        with recorded_steps() as steps:
            exec(snippet, names)
        assert steps == scoring_steps(load(place[1]), schedule)


def test_the_example_with_a_network_of_ones_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The documented example trains a network of one's own and tests it on a folder of images of any size."""
    snippet = next(each for each in re.findall(r"```python\n(.*?)```", USING, re.DOTALL) if "LazyConv2d" in each)
    save(tmp_path / "synthetic.arrow")
    for number, pixels in enumerate(np.random.default_rng(1).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)):
        place = tmp_path / "test" / NAMES[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    for shown, real in (("runs/birds/synthetic.arrow", "synthetic.arrow"), ("/data/birds/test", "test")):
        assert shown in snippet
        snippet = snippet.replace(shown, str(tmp_path / real))
    open_location(str(tmp_path / SCORING)).write_json(CHOSEN.to_json())
    names: dict[str, Any] = {}
    with recorded_steps() as steps:
        exec(snippet, names)
    assert names["epoch"] == 19
    assert steps == scoring_steps(names["synthetic"], CHOSEN)
    assert [has_momentum for _, has_momentum in steps].count(False) == 2
    assert capsys.readouterr().out.endswith(" of 4 images\n")


def snippet_of_the_page(word: str) -> str:
    """The one snippet of docs/using-a-set.md that has a word."""
    (snippet,) = (each for each in re.findall(r"```python\n(.*?)```", USING, re.DOTALL) if word in each)
    return str(snippet)


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "without its transform"])
@pytest.mark.parametrize("count", [20, 200], ids=["fewer images than values", "more images than values"])
def test_the_documented_code_reads_a_whitened_set_without_datm_ray(
    count: int, is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code without datm_ray whitens real images as the set's transform does, and gives the pixels of the set's own."""
    save(tmp_path / "synthetic.arrow", count=count)
    open_location(str(tmp_path / SCORING)).write_json(CHOSEN.to_json())
    expected = load(tmp_path / "synthetic.arrow")
    monkeypatch.setattr("datm_ray.artifact.INLINE_BYTES", 0)
    export(expected if is_whole else without_transform(expected), "safetensors", open_location(str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    real, test_images = (torch.from_numpy(real_images(count=each) / np.float32(255)) for each in (count, 5))
    names: dict[str, Any] = {"test_images": test_images, "train_images": real}
    snippet, fit = snippet_of_the_page("safe_open"), snippet_of_the_page("linalg.eigh")
    stored = next(line for line in snippet.splitlines(keepends=True) if line.startswith("mean, vectors, values ="))
    assert not re.search(r"import.*datm_ray", snippet + fit)
    exec(snippet if is_whole else snippet.replace(stored, fit), names)
    images, probabilities = expected.dataset().tensors
    assert torch.equal(names["images"], images)
    assert torch.equal(names["probabilities"], probabilities)
    assert names["inputs"].dtype == names["pixels"].dtype == torch.float32
    torch.testing.assert_close(names["inputs"], expected.normalise(test_images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(names["pixels"], expected.denormalise(images), atol=1e-5, rtol=1e-5)
    assert tuple(names["about"]["class_names"]) == expected.class_names
    assert Schedule.from_json(names["about"]["scoring"]) == CHOSEN


class Trainer:
    """Stands in for Lightning's, which is no dependency: the calls of its `fit`, in their order."""

    def __init__(self, max_epochs: int, log_every_n_steps: int) -> None:
        self.max_epochs = max_epochs

    def fit(self, module: Any, loader: DataLoader[Any]) -> None:
        optimizer, self.num_training_batches = module.configure_optimizers(), len(loader)
        module.trainer, module.optimizers = self, lambda use_pl_optimizer: optimizer
        for module.current_epoch in range(self.max_epochs):
            for index, batch in enumerate(loader):
                module.on_train_batch_start(batch, index)
                optimizer.zero_grad()
                module.training_step(batch, index).backward()
                optimizer.step()


@pytest.mark.parametrize("schedule", [CHOSEN, dataclasses.replace(CHOSEN, **COSINE)], ids=["sgd", "cosine"])
def test_the_documented_training_in_lightning_is_the_scoring(
    schedule: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented module has the steps, rates, momentum and augmentation with which the set was scored."""
    folder = tmp_path / "runs/demo/digits-ipc10"
    save(folder / "synthetic.arrow")
    open_location(str(folder / SCORING)).write_json(schedule.to_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(LightningModule=torch.nn.Module, Trainer=Trainer))
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Schedule, "augment", lambda _, images: seen.append(images.shape) or images)
    with recorded_steps() as steps:
        exec(
            snippet_of_the_page("LightningModule"),
            {"network": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(90, 2))},
        )
    assert steps == scoring_steps(load(folder / "synthetic.arrow"), schedule)
    assert len(seen) == len(steps)


def test_the_documented_parquet_is_the_set_up_to_clipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that `datasets` decodes, normalised as documented, and probabilities are those of a set of real pixels."""
    save(tmp_path / "synthetic.arrow", "standard")
    artifact = load(tmp_path / "synthetic.arrow")
    for kind in ("parquet", "safetensors"):
        export(artifact, kind, open_location(str(tmp_path / "published")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=decoded_parquet))
    names: dict[str, Any] = {}
    exec(snippet_of_the_page("load_dataset"), names)
    torch.testing.assert_close(names["images"], artifact.images, atol=1e-5, rtol=0)
    torch.testing.assert_close(names["probabilities"], artifact.soft_labels.softmax(1))


class SliceOf(dict[str, Any]):
    """Columns, also as a slice of all rows."""

    def __getitem__(self, key: Any) -> Any:
        return self if isinstance(key, slice) else super().__getitem__(key)


def decoded_parquet(kind: str, data_files: str) -> dict[str, Any]:
    """Stands in for `datasets.load_dataset`, which is no dependency: columns, with PIL images."""
    assert kind == "parquet"
    columns = pq.read_table(data_files).to_pydict()
    columns["image"] = [Image.open(io.BytesIO(each["bytes"])) for each in columns["image"]]
    return {"train": SliceOf(columns)}


def test_the_documented_folder_reads_16_bits_as_a_data_set_does(path: Path, tmp_path: Path) -> None:
    """The documented ImageFolder gives 16-bit images the pixels that a data set's have, normalised."""
    call = next(line for line in USING.splitlines() if line.startswith("real = torchvision.datasets.ImageFolder("))
    deep = np.random.default_rng(0).integers(0, 2**16, (12, 6, 5), dtype=np.uint16)
    for number, pixels in enumerate(deep):
        place = tmp_path / "deep" / NAMES[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    names: dict[str, Any] = {"synthetic": load(str(path))}
    exec("import PIL.Image, torchvision\n" + call.replace("/data/birds/test", str(tmp_path / "deep")), names)
    raw = load_raw("folder", str(tmp_path / "deep"))
    decoded = np.concatenate([part.images[:] for part in (raw.train, raw.validation, raw.test)])
    assert len(names["real"]) == len(decoded) == 12
    normalise = names["synthetic"].normalise
    expected = {normalise(pixels).numpy().tobytes() for pixels in decoded.repeat(3, axis=1)}
    assert {image.numpy().tobytes() for image, _ in names["real"]} == expected


def test_a_set_says_what_it_is_and_how_it_was_scored(path: Path) -> None:
    """A set's text has its name, size and place; its training is the run's protocol, else the published one."""
    loaded = load(str(path))
    what = "20 images of 3x6x5 in 2 classes, step size 0.0123"
    assert repr(loaded) == f"<synthetic set test: {what}, from {path}>"
    training = loaded.training()
    assert training == dataclasses.replace(PROTOCOLS["quick"], learning_rate=loaded.step_size, augmentation="flip_crop")
    torch.manual_seed(0)
    one = [training.augment(loaded.images) for _ in range(8)]
    torch.manual_seed(0)
    assert all(torch.equal(training.augment(loaded.images), each) for each in one)
    assert any(not torch.equal(each, loaded.images) for each in one)
    old = dataclasses.replace(loaded, recipe={}, place="")
    assert repr(old) == f"<synthetic set without a name: {what}>"
    assert old.training() == dataclasses.replace(PROTOCOLS["published"], learning_rate=loaded.step_size)
    scored = {"protocol": "quick", "epochs": 30, "batch_size": 7, "schedule": "cosine", "learning_rate": 0.2}
    other = dataclasses.replace(loaded, recipe={"evaluate": scored}).training()
    assert (other.epochs, other.batch_size, other.learning_rate, other.cosine) == (30, 7, 0.2, True)
    assert other.rate(15) == pytest.approx(0.1)
    scored = {"protocol": "quick", "optimiser": "adamw", "learning_rate": 1e-3}
    adamw = dataclasses.replace(loaded, recipe={"evaluate": scored}).training()
    assert (adamw.optimiser, adamw.weight_decay, adamw.epochs) == ("adamw", 0.05, 20)
    for unknown in ({"protocol": "slower"}, {"optimiser": "lion"}):
        with pytest.raises(ConfigError, match=f"{next(iter(unknown.values()))}.*this version does not have"):
            dataclasses.replace(loaded, recipe={"evaluate": unknown}).training()


@pytest.mark.parametrize("kind", ["arrow", "safetensors"])
def test_a_set_trains_as_its_run_noted_wherever_it_is_exported(kind: str, path: Path, tmp_path: Path) -> None:
    """A set's training is the one noted in its folder, in exports too; other sets of the folder do not read it."""
    before = load(str(path))
    assert before.training().learning_rate == before.step_size
    open_location(str(tmp_path / SCORING)).write_json(CHOSEN.to_json())
    shutil.copy(path, tmp_path / "initial.arrow")
    assert load(str(path)).training() == before.training() == CHOSEN
    assert load(str(tmp_path / "initial.arrow")).training().learning_rate == before.step_size
    (name,) = export(before, kind, open_location(str(tmp_path / "elsewhere")))
    assert load(str(tmp_path / "elsewhere" / name)).training() == CHOSEN


@pytest.mark.parametrize("kind", ["arrow", "safetensors"])
def test_sets_of_other_versions_load_whatever_their_schedule_has(kind: str, path: Path, tmp_path: Path) -> None:
    """An export whose schedule has fields of a later version loads; one of an earlier version trains by defaults."""
    before, out = load(str(path)), open_location(str(tmp_path / "elsewhere"))
    earlier = {name: value for name, value in CHOSEN.to_json().items() if name not in ("temperature", "cosine")}
    artifact = dataclasses.replace(before, held_scoring=earlier)
    (name,) = export(artifact, kind, out)
    assert load(str(tmp_path / "elsewhere" / name)).training() == CHOSEN
    with pytest.MonkeyPatch.context() as later:
        later.setattr(Schedule, "to_json", lambda self: {**dataclasses.asdict(self), "lookahead": 5})
        (name,) = export(artifact, kind, out)
    loaded = load(str(tmp_path / "elsewhere" / name))
    assert torch.equal(loaded.images, before.images)
    with pytest.raises(CorruptFileError, match="other fields than a schedule"):
        loaded.training()


def test_a_damaged_note_is_an_error_of_its_own(path: Path, tmp_path: Path) -> None:
    """A set with a damaged note is loaded and used as ever; only its training is an error, with the note's name."""
    right = CHOSEN.to_json()
    wrong = [{"epochs": 0}, {"learning_rate": -1.0}, {"learning_rate": "fast"}, {"lr": 1}, {"warmup_epochs": 20}]
    wrong += [{"momentum": math.nan}, {"epochs": 2.5}, {"optimiser": "lion"}, {"decay_epoch": -1}, {"temperature": 0}]
    for content in (*(right | each for each in wrong), [], None, "x", {"epochs": 1}):
        (tmp_path / SCORING).write_text(json.dumps(content))
        loaded = load(str(path))
        assert len(loaded.dataset()) == 20
        with pytest.raises(CorruptFileError, match=SCORING.replace(".", r"\.")):
            loaded.training()
    (tmp_path / SCORING).write_text(json.dumps(right | {"augmentation": "spin"}))
    with pytest.raises(ConfigError, match="spin"):
        loaded.training()


@pytest.mark.parametrize(
    ("recipe", "is_known"),
    [
        ({"method": "sre2l"}, False),
        ({"method": "select"}, False),
        ({"method": "select", "distill": {"initial_step_size": 0.0123}}, False),
        ({"method": "given", "given": {"step_size": None}}, False),
        ({"method": "given", "given": {"step_size": 0.0123}}, True),
        ({"method": "a:B", "distill": {"initial_step_size": None}}, True),
        ({"method": "a:B", "distill": {"initial_step_size": 0.0123}}, False),
        ({"method": "dm"}, True),
        ({"method": "mtt"}, True),
        ({}, True),
        ({"evaluate": {"optimiser": "adamw"}}, False),
        ({"evaluate": {"labels": "teacher"}}, False),
        ({"evaluate": {"labels": "teacher", "learning_rate": 0.2}}, True),
        ({"evaluate": {"optimiser": "adamw", "learning_rate": 0.2}}, True),
    ],
)
def test_a_rate_that_nobody_chose_is_reported(recipe: dict[str, Any], is_known: bool, artifact: Artifact) -> None:
    """Without a note, a warning tells of a learning rate that was neither given, learned nor chosen for its use.

    Sets of earlier versions do not say whether their step size was learned; their recipe tells.
    """
    unscored = dataclasses.replace(artifact, recipe=recipe, held_scoring=None, stated_has_step_size=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule = unscored.training()
    assert schedule.learning_rate == recipe.get("evaluate", {}).get("learning_rate", artifact.step_size)
    assert [str(each.message).count("neither learned") for each in caught] == ([] if is_known else [1])


@pytest.mark.parametrize("kind", ["arrow", "safetensors"])
def test_a_set_states_whether_it_has_a_step_size_whatever_its_method(
    kind: str, artifact: Artifact, tmp_path: Path
) -> None:
    """What a set's file states on its step size counts in every export; without it, the recipe's method does."""
    for method in ("datm", "select", "new", "a:B"):
        for stated in (True, False, None):
            own = dataclasses.replace(artifact, recipe={"method": method}, stated_has_step_size=stated)
            (name,) = export(own, kind, open_location(str(tmp_path)))
            loaded = load(str(tmp_path / name))
            assert loaded.stated_has_step_size is stated
            assert loaded.has_step_size == ((method != "select") if stated is None else stated)
    wrong: Any = "yes"
    export(dataclasses.replace(artifact, stated_has_step_size=wrong), kind, open_location(str(tmp_path)))
    with pytest.raises(CorruptFileError, match="has_step_size is 'yes', not true or false"):
        load(str(tmp_path / name))


def test_the_normaliser_reads_images_as_a_data_set_does(artifact: Artifact) -> None:
    """The normaliser is a torchvision transform: it turns, converts and resizes PIL images as a data set's are."""
    normaliser = pickle.loads(pickle.dumps(artifact.normaliser()))
    (pixels, *_) = real_images()
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    expected = artifact.normalise(pixels)
    for steps in (normaliser, Compose([normaliser]), Compose([PILToTensor(), normaliser])):
        torch.testing.assert_close(steps(image), expected)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    torch.testing.assert_close(normaliser(turned), expected)
    for other in (image.resize((50, 60)), image.convert("L"), image.convert("RGBA"), image.convert("P")):
        assert normaliser(other).shape == (3, 6, 5)


@pytest.mark.parametrize("kind", ["zca", "standard"])
def test_saved_set_is_loaded_as_it_was(kind: Kind, tmp_path: Path) -> None:
    """A saved set is loaded bit for bit: tensors, step size, names, transform, recipe and provenance."""
    transform = save(tmp_path / "x.arrow", kind)
    loaded = load(str(tmp_path / "x.arrow"))
    images = real_images().astype(np.float32) / 255
    assert torch.equal(loaded.images, torch.from_numpy(transform.apply(images)))
    assert torch.equal(loaded.normalise(images), loaded.images)
    torch.testing.assert_close(loaded.normaliser()(torch.from_numpy(real_images())), loaded.images)
    torch.testing.assert_close(loaded.denormalise(loaded.images), torch.from_numpy(images), atol=1e-5, rtol=0)
    assert torch.equal(loaded.soft_labels, torch.randn(20, 2, generator=torch.Generator().manual_seed(0)))
    assert loaded.labels.tolist() == [0, 1] * 10
    assert loaded.step_size == float(torch.tensor(0.0123))
    assert loaded.step_sizes == (loaded.step_size, 0.5)
    assert (loaded.class_names, loaded.recipe, loaded.provenance) == (NAMES, RECIPE, PROVENANCE)
    assert loaded.transform.to_metadata() == transform.to_metadata()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["zca", "standard"])
def test_pixels_of_a_real_image_are_the_image(kind: Kind, channels: int, tmp_path: Path) -> None:
    """A set of real images gives back their exact pixels by its transform."""
    save(tmp_path / "x.arrow", kind, channels)
    pixels = load(str(tmp_path / "x.arrow")).pixels()
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, real_images(channels).transpose(0, 2, 3, 1))


def test_pixels_are_clipped(artifact: Artifact) -> None:
    """Values beyond black and white are clipped and do not wrap around."""
    artifact.images.copy_(artifact.normalise(np.where(real_images() > 127, np.float32(3), np.float32(-2))))
    assert np.array_equal(artifact.pixels(), np.where(real_images() > 127, 255, 0).transpose(0, 2, 3, 1))


def test_dataset_feeds_a_loader(artifact: Artifact) -> None:
    """A set is a data set of images and class probabilities, as torch's cross-entropy takes them."""
    (images, probabilities), (rest, _) = DataLoader(artifact.dataset(), batch_size=16)
    assert (images.shape, rest.shape) == ((16, 3, 6, 5), (4, 3, 6, 5))
    torch.testing.assert_close(probabilities, artifact.soft_labels[:16].softmax(dim=1))
    logits = torch.zeros(16, 2)
    assert float(torch.nn.functional.cross_entropy(logits, probabilities)) == pytest.approx(np.log(2), rel=1e-5)


def message(path: Path) -> str:
    with pytest.raises(CorruptFileError) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_file_is_refused(path: Path, keep: int) -> None:
    """A truncated file is refused, also one that is empty or lacks its last byte."""
    path.write_bytes(path.read_bytes()[:keep])
    message(path)


def test_altered_byte_never_alters_the_set(path: Path) -> None:
    """A byte altered at any of a hundred places is refused or has no effect."""
    whole, refused = path.read_bytes(), 0
    original = load(str(path))
    for place in np.linspace(0, len(whole) - 1, 100).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            altered = load(str(path))
        except CorruptFileError:
            refused += 1
            continue
        assert torch.equal(altered.images, original.images)
        assert torch.equal(altered.soft_labels, original.soft_labels)
        assert np.array_equal(altered.pixels(), original.pixels())
    assert refused > 90


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A checkpoint, a tensor file of another kind, is refused as a synthetic set."""
    path = tmp_path / "checkpoint.arrow"
    write_tensors(open_location(str(path)), {"images": np.zeros(1)}, kind="checkpoint", metadata={})
    assert "checkpoint" in message(path).removeprefix(str(path))


def test_files_of_earlier_versions_have_one_step_size(path: Path) -> None:
    """A file of an earlier version has one step size, the first network's."""
    place = open_location(str(path))
    file = read_tensors(place, kind=KIND)
    arrays = {name: array for name, array in file.arrays.items() if name != "step_sizes"}
    write_tensors(place, arrays, kind=KIND, metadata=file.metadata)
    assert load(str(path)).step_sizes == (float(torch.tensor(0.0123)),)


def test_file_without_a_part_is_refused(tmp_path: Path) -> None:
    """A file that lacks a part is an error that names the part."""
    path = tmp_path / "synthetic.arrow"
    write_tensors(open_location(str(path)), {"images": np.zeros(1)}, kind="synthetic-set", metadata={})
    assert "has no part 'class_names', 'labels', " in message(path)


def replaced(name: str, value: object) -> Callable[[dict[str, NDArray[Any]], dict[str, Any]], None]:
    """An edit of a set's file that replaces an array, or a value of its metadata, under this name."""

    def edit(arrays: dict[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
        part: dict[str, Any] = arrays if isinstance(value, np.ndarray) else metadata
        part[name] = value

    return edit


def test_a_set_is_read_into_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a set are the arrays of its file, and the check of their values copies none of them."""
    save(tmp_path / "set.arrow")
    file = read_tensors(open_location(str(tmp_path / "set.arrow")), kind=KIND)
    monkeypatch.setattr("datm_ray.artifact.read_tensors", lambda *_, **__: file)
    for name in ("isfinite", "abs"):
        own = getattr(torch.Tensor, name)
        small = lambda tensor, own=own: own(tensor) if tensor.dim() == 0 else pytest.fail("a set was copied")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, small)
    loaded = load(str(tmp_path / "set.arrow"))
    for name in ("images", "soft_labels", "labels"):
        assert np.shares_memory(getattr(loaded, name).numpy(), file.arrays[name]), name


NAN, INFINITY = np.float32("nan"), np.float32("inf")
UNSOUND = {
    "a label outside the classes": (replaced("labels", np.arange(20)), "labels are 0..19, and its classes are 0..1"),
    "a negative label": (replaced("labels", np.full(20, -1)), "labels are -1..-1"),
    "labels of another type": (replaced("labels", np.zeros(20)), "labels is torch.float64"),
    "too few labels": (replaced("labels", np.zeros(3, np.int64)), "images is torch.float32 [20, 3, 6, 5], not"),
    "no images": (replaced("labels", np.zeros(0, np.int64)), "images is"),
    "a scalar for labels": (replaced("labels", np.array(1)), "images is"),
    "nan in an image": (replaced("images", np.full((20, 3, 6, 5), NAN)), "images has 1,800 values that are not"),
    "images of another size": (replaced("images", np.zeros((20, 3, 5, 6), np.float32)), "[20, 3, 5, 6], not"),
    "infinite soft labels": (replaced("soft_labels", np.full((20, 2), INFINITY)), "soft_labels has 40 values"),
    "soft labels of other classes": (replaced("soft_labels", np.zeros((20, 3), np.float32)), "[20, 3], not"),
    "a class too many": (replaced("class_names", ["a", "b", "c"]), "soft_labels is torch.float32 [20, 2], not"),
    "class names that are numbers": (replaced("class_names", [1, 2]), "a name that is not text"),
    "no class names": (replaced("class_names", 5), "TypeError"),
    "a step size of zero": (replaced("step_sizes", np.array([0.1, 0.0])), "its step sizes are"),
    "a step size that is nan": (replaced("step_size", np.array(NAN)), "its step sizes are"),
    "no step sizes": (replaced("step_sizes", np.zeros(0)), "its step sizes are"),
    "a table of step sizes": (replaced("step_sizes", np.ones((2, 2))), "its step sizes are"),
    "a recipe that is a list": (replaced("recipe", []), "not a mapping"),
    "nan in the transform": (replaced("transform.mean", np.full(3, NAN)), "mean holds values that are not finite"),
    "a deviation of zero": (replaced("transform.std", np.zeros(3, np.float32)), "a deviation is 0"),
    "a deviation out of float32": (replaced("transform.std", np.full(3, 1e-40, np.float32)), "a deviation is 1e-40"),
    "a transform without a size": (replaced("transform", {"kind": "standard", "shape": [3, 0, 5]}), "3x0x5"),
    "a transform of a list": (replaced("transform", []), "transform"),
}


def test_a_set_whose_parts_disagree_is_refused(tmp_path: Path) -> None:
    """A sealed set whose labels, shapes and numbers disagree is one line that says what is wrong."""
    path = tmp_path / "synthetic.arrow"
    save(path, "standard")
    file = read_tensors(open_location(str(path)), kind=KIND)
    for case, (edit, words) in UNSOUND.items():
        arrays, metadata = dict(file.arrays), dict(file.metadata)
        edit(arrays, metadata)
        write_tensors(open_location(str(path)), arrays, kind=KIND, metadata=metadata)
        with pytest.raises(CorruptFileError) as caught:
            load(str(path))
        assert words in str(caught.value), case


def test_file_of_another_program_is_refused(tmp_path: Path) -> None:
    """A file of another program, such as text, is refused."""
    path = tmp_path / "notes.txt"
    path.write_text("not a synthetic set\n" * 100)
    message(path)


def test_missing_file_is_a_store_error(tmp_path: Path) -> None:
    """A missing set is a StoreError with the path."""
    with pytest.raises(StoreError, match=r"none\.arrow"):
        load(str(tmp_path / "none.arrow"))


def test_a_folder_is_answered_with_the_sets_in_it(tmp_path: Path) -> None:
    """A folder in place of a set is an error that lists the sets of its runs or exports."""
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    save(run / "synthetic.arrow", "standard")
    for folder in (run, tmp_path / "runs"):
        with pytest.raises(StoreError) as caught:
            load(str(folder))
        assert str(caught.value) == f"{folder} is a folder. Give a set in it: {run / 'synthetic.arrow'}."
    with pytest.raises(StoreError, match=r"Cannot read .*\. Is a directory"):
        load(str(tmp_path))


def test_png_export_has_a_folder_per_class(artifact: Artifact, tmp_path: Path) -> None:
    """The PNG export is lossless, with a folder for each class, numbered in the set's order."""
    written = export(artifact, "png", open_location(str(tmp_path / "out")))
    assert sorted(written) == sorted(f"{name}/{index:05d}.png" for name in NAMES for index in range(10))
    for row, pixels in enumerate(artifact.pixels()):
        with Image.open(tmp_path / "out" / NAMES[row % 2] / f"{row // 2:05d}.png") as image:
            assert np.array_equal(np.asarray(image), pixels)


def test_png_exports_of_two_sets_are_not_mixed(artifact: Artifact, tmp_path: Path) -> None:
    """A PNG export into a folder with images that it does not write is refused, and nothing is written."""
    out = open_location(str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "banner.png").write_bytes(b"no class folder")
    for name in ("docs/figure.png", f"{NAMES[0]}/._00000.png"):  # not exported, and left by macOS
        (tmp_path / "out" / name).parent.mkdir()
        (tmp_path / "out" / name).write_bytes(b"no image of a set")
    written = export(artifact, "png", out)
    assert export(artifact, "png", out) == written
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    renamed = dataclasses.replace(artifact, class_names=(NAMES[0], "other"))
    with pytest.raises(ConfigError, match=rf"holds images that are not of this set, such as {NAMES[1]}/00000\.png"):
        export(renamed, "png", out)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("denied", ["out", "lost+found"])
def test_png_exports_need_no_right_to_list(
    denied: str, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PNG export succeeds where the target, or another folder in it, cannot be listed."""
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    listed = Location.list

    def list_allowed(place: Location) -> Sequence[str]:
        if place.uri.endswith(denied):
            raise StoreError(f"no permission to list {place.uri}")
        return listed(place)

    monkeypatch.setattr(Location, "list", list_allowed)
    written = export(artifact, "png", open_location(str(tmp_path / "out")))
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")} == set(written)


def test_grey_png_has_one_channel(tmp_path: Path) -> None:
    """The PNG export keeps grey images grey."""
    save(tmp_path / "x.arrow", channels=1)
    artifact = load(str(tmp_path / "x.arrow"))
    export(artifact, "png", open_location(str(tmp_path / "out")))
    with Image.open(tmp_path / "out" / "dog" / "00000.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), artifact.pixels()[1, :, :, 0])


def test_no_image_is_lost_to_class_names_that_are_no_folder_names(tmp_path: Path) -> None:
    """Classes that differ in forbidden characters or in case alone get folders of their own in the target."""
    names = ("c/d", "c:d", "Fish", "fish", "..", "é 1", "C_D-0", "c_d-0-0")
    save(tmp_path / "x.arrow", names=names)
    written = export(load(str(tmp_path / "x.arrow")), "png", open_location(str(tmp_path / "out")))
    assert len(set(written)) == 20
    assert len(list((tmp_path / "out").rglob("*.png"))) == 20
    assert len({name.split("/")[0].casefold() for name in written}) == len(names)
    assert "é 1" in {name.split("/")[0] for name in written}


def test_parquet_export_is_read_by_our_own_source(artifact: Artifact, tmp_path: Path) -> None:
    """The Parquet export is read by the parquet source with equal images, labels and names."""
    assert export(artifact, "parquet", open_location(str(tmp_path))) == ["train.parquet"]
    raw = load_raw("parquet", str(tmp_path / "train.parquet"), validation=0.3)
    assert raw.class_names == NAMES
    sets = (raw.train, raw.validation, raw.test)
    found = sorted(
        (int(label), image.tobytes()) for part in sets for label, image in zip(part.labels, part.images, strict=True)
    )
    assert found == sorted((row % 2, image.tobytes()) for row, image in enumerate(real_images()))


def test_parquet_export_carries_soft_labels_and_hugging_face_metadata(artifact: Artifact, tmp_path: Path) -> None:
    """The Parquet export has class probabilities, and column types that `datasets` reads."""
    export(artifact, "parquet", open_location(str(tmp_path)))
    table = pq.read_table(tmp_path / "train.parquet")
    np.testing.assert_allclose(table["soft_label"].to_pylist(), artifact.dataset().tensors[1], atol=1e-7)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names == ["image", "label", "soft_label"]
    assert features["label"] == {"names": list(NAMES), "_type": "ClassLabel"}
    with Image.open(io.BytesIO(table["image"][3].as_py()["bytes"])) as image:
        assert np.array_equal(np.asarray(image), artifact.pixels()[3])


def test_pt_export_is_what_datms_evaluation_reads(artifact: Artifact, tmp_path: Path) -> None:
    """The pt export has the names that DATM's evaluation reads: images, logits, one step size."""
    written = export(artifact, "pt", open_location(str(tmp_path)))
    assert written == ["images_best.pt", "labels_best.pt", "lr_best.pt"]
    images, labels, rate = (torch.load(tmp_path / name, weights_only=True) for name in written)
    assert torch.equal(images, artifact.images)
    assert torch.equal(labels, artifact.soft_labels)
    assert rate.shape == ()
    assert float(rate) == artifact.step_size


def test_an_unknown_export_is_refused_with_the_known_ones(artifact: Artifact, tmp_path: Path) -> None:
    """An unknown export is an error that lists the known ones, and writes nothing."""
    with pytest.raises(ConfigError, match=r"unknown export format 'npz'\. Choose one of: png, parquet, pt"):
        export(artifact, "npz", open_location(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_command_line_offers_every_export() -> None:
    """`datm-ray export --format` takes the names of all exports, in their order."""
    assert list(EXPORTS) == [*get_args(ExportFormat)]


def save_kept(folder: Path, run: str, side: int = 12) -> Artifact:
    """Save a set as <folder>/<run>/synthetic.arrow with whitening too large to travel inside."""
    images = np.random.default_rng(0).integers(0, 256, (side**2, 1, side, side), dtype=np.uint8)
    transform = fit_transform("zca", images, 255)
    synthetic = SyntheticSet(transform.normalise(images[:20]), torch.zeros(20, 2), torch.ones(1), torch.arange(20) % 2)
    root = open_location(str(folder))
    context = (transform, NAMES, RECIPE, PROVENANCE, root / "transforms")
    save_artifact(root / run / "synthetic.arrow", synthetic, *context, has_step_size=True)
    return load(str(folder / run / "synthetic.arrow"))


def test_whitening_is_kept_once_for_all_sets(tmp_path: Path) -> None:
    """A set's file is as large as its images, and finds its transform beside the runs or beside itself."""
    sets = [save_kept(tmp_path / "out", run) for run in ("a", "b")]
    (kept,) = (tmp_path / "out/transforms").iterdir()
    written = kept.stat().st_mtime_ns
    assert kept.stat().st_size > 4 * 144**2
    assert (tmp_path / "out/a/synthetic.arrow").stat().st_size < sets[0].images.nbytes + 6000
    save_kept(tmp_path / "out", "a")
    assert kept.stat().st_mtime_ns == written
    expected = sets[0].transform
    assert expected.digest == kept.stem
    assert sets[1].pixels().shape == (20, 12, 12, 1)
    for place in ("here", "here/transforms", "transforms"):
        other = tmp_path / place.replace("here", "elsewhere/run")
        other.mkdir(parents=True, exist_ok=True)
        (other / kept.name).write_bytes(kept.read_bytes())
        moved = tmp_path / "elsewhere/run/synthetic.arrow"
        moved.write_bytes((tmp_path / "out/a/synthetic.arrow").read_bytes())
        assert load(str(moved)).transform.digest == expected.digest, place
        (other / kept.name).unlink()


def test_a_transform_that_is_left_out_is_fitted_again(tmp_path: Path) -> None:
    """Exports without it are small and train networks; the training images bring it back, others with a warning."""
    images = np.random.default_rng(0).integers(0, 256, (144, 1, 12, 12), dtype=np.uint8)
    whole = save_kept(tmp_path / "out", "a")
    for kind, name in (("safetensors", "synthetic.safetensors"), ("arrow", "synthetic.arrow")):
        export(without_transform(whole), kind, open_location(str(tmp_path / kind)))
        file = tmp_path / kind / name
        assert file.stat().st_size < whole.images.nbytes + 6000
        small = load(str(file))
        assert torch.equal(small.images, whole.images)
        assert len(small.dataset()) == 20
        with pytest.raises(StoreError, match=r"leaves out its zca transform.*uint8.*\.fitted\(images\)"):
            small.normalise(images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted = small.fitted(torch.from_numpy(images))
        torch.testing.assert_close(fitted.normalise(images), whole.normalise(images), rtol=1e-5, atol=1e-5)
        assert np.array_equal(fitted.pixels(), whole.pixels())
        with pytest.warns(UserWarning, match="fitted on other images than these 100 images"):
            small.fitted(images[:100])
        with pytest.raises(TypeError, match="float32: give uint8"):
            small.fitted(images.astype(np.float32))  # type: ignore[arg-type]
        with pytest.raises(DatasetError, match="meet a zca transform"):
            small.fitted(images[:, :, 1:])
    assert whole.fitted(images) is whole
    save(tmp_path / "inline.arrow")
    inline = load(str(tmp_path / "inline.arrow"))
    assert without_transform(inline) is inline


def test_set_without_its_transform_has_images_and_says_what_is_missing(tmp_path: Path) -> None:
    """A set without its transform gives images and labels; pixels are an error with file and remedy."""
    save_kept(tmp_path / "out", "a")
    (kept,) = (tmp_path / "out/transforms").iterdir()
    content = kept.read_bytes()
    kept.unlink()
    alone = load(str(tmp_path / "out/a/synthetic.arrow"))
    assert (len(alone.dataset()), alone.labels.tolist(), alone.step_size) == (20, [0, 1] * 10, 1.0)
    with pytest.raises(StoreError, match=rf"a/synthetic\.arrow is missing: no transforms/{kept.name}.*--format arrow"):
        alone.pixels()
    other = fit_transform("zca", real_images(), 255)
    write_tensors(open_location(str(kept)), other.to_arrays(), kind="transform", metadata=other.to_metadata())
    with pytest.raises(CorruptFileError, match="Its transform does not match its name"):
        alone.pixels()
    kept.write_bytes(content)
    assert alone.pixels().shape == (20, 12, 12, 1)


def test_an_unreadable_place_of_a_transform_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expired credentials are not called a missing file, and do not matter if the transform is found."""
    alone = save_kept(tmp_path / "out", "a")
    look, closed = Location.exists, str(tmp_path / "out/a")

    def exists(place: Location) -> bool:
        if place.uri.startswith(closed):
            raise StoreError(f"Cannot look for {place.uri}", "The token has expired", "Log in again")
        return look(place)

    monkeypatch.setattr(Location, "exists", exists)
    assert alone.transform.shape == (1, 12, 12)
    alone = load(str(tmp_path / "out/a/synthetic.arrow"))
    closed = str(tmp_path)
    with pytest.raises(StoreError, match=r"is missing: .*Cannot look for .*expired\. Log in again\. Copy transforms/"):
        alone.pixels()


def test_an_unusable_transform_is_named(tmp_path: Path) -> None:
    """An unusable transform is an error that names its file: the set's, or its own."""
    save(tmp_path / "whole.arrow", "standard")
    save_kept(tmp_path, "a")
    (kept,) = (tmp_path / "transforms").iterdir()
    for path, used, kind, name in (
        (tmp_path / "whole.arrow", tmp_path / "whole.arrow", KIND, "transform.mean"),
        (kept, tmp_path / "a/synthetic.arrow", "transform", "mean"),
    ):
        file = read_tensors(open_location(str(path)), kind=kind)
        arrays = {**file.arrays, name: np.full_like(file.arrays[name], NAN)}
        write_tensors(open_location(str(path)), arrays, kind=kind, metadata=file.metadata)
        with pytest.raises(CorruptFileError, match=rf"the transform in {path} is unusable \(mean holds"):
            load(str(used)).pixels()


def test_a_digest_that_is_a_path_is_refused(tmp_path: Path) -> None:
    """A digest that is a path is refused, so that no set reads other files."""
    save_kept(tmp_path, "a")
    place = open_location(str(tmp_path / "a/synthetic.arrow"))
    file = read_tensors(place, kind=KIND)
    for digest in ("../" * 4 + "etc", "A" * 32, 5, "0" * 31):
        metadata = file.metadata | {"transform": file.metadata["transform"] | {"digest": digest}}
        write_tensors(place, file.arrays, kind=KIND, metadata=metadata)
        message(tmp_path / "a/synthetic.arrow")


@pytest.mark.parametrize("kind", ["arrow", "safetensors"])
def test_whole_exports_load_anywhere(kind: str, tmp_path: Path) -> None:
    """A whole export holds everything bit for bit in one file, and exports to itself."""
    original = save_kept(tmp_path / "out", "a")
    (name,) = export(original, kind, open_location(str(tmp_path / "b")))
    transform = original.transform
    shutil.rmtree(tmp_path / "out")
    loaded = load(str(tmp_path / "b" / name))
    for part in ("images", "soft_labels", "labels"):
        assert torch.equal(getattr(loaded, part), getattr(original, part))
    for part in ("step_size", "step_sizes", "class_names", "recipe", "provenance"):
        assert getattr(loaded, part) == getattr(original, part)
    assert loaded.transform.digest == transform.digest
    export(loaded, kind, open_location(str(tmp_path / "c")))
    assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_safetensors_of_others_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    """Safetensors that are truncated, lie about length, lack our metadata or are missing are one line each."""
    export(artifact, "safetensors", open_location(str(tmp_path)))
    place = tmp_path / "synthetic.safetensors"
    whole = place.read_bytes()
    foreign = numpy_file({"images": np.zeros(3, np.float32)})
    nested = numpy_file({"images": np.zeros(3, np.float32)}, {KIND: "[" * 100_000})
    cases = [b"", whole[:7], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:], whole[8:], foreign, nested]
    for content in [*cases, numpy_file({"images": np.zeros(3, np.float32)}, {KIND: "5"})]:
        place.write_bytes(content)
        message(place)


def test_altered_safetensors_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    """Safetensors with an altered bit, name or type, or without our checksum, are refused."""
    export(artifact, "safetensors", open_location(str(tmp_path)))
    place = tmp_path / "synthetic.safetensors"
    whole = place.read_bytes()
    arrays = parse_numpy(whole)
    metadata = json.loads(json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"][KIND])
    flipped = bytearray(whole)
    flipped[whole.index(arrays["images"].tobytes()) + 5] ^= 1
    cases = [bytes(flipped), whole.replace(b"dog", b"cow")]
    labels = arrays["soft_labels"].view(np.int32)
    cases.append(numpy_file({**arrays, "soft_labels": labels}, {KIND: json.dumps(metadata)}))
    for content in cases:
        assert content != whole
        place.write_bytes(content)
        assert "has a wrong checksum. It was altered" in message(place)
    assert metadata.pop("sha256")
    place.write_bytes(numpy_file(arrays, {KIND: json.dumps(metadata)}))
    assert "has no checksum. It was altered, or was written by another program" in message(place)


def test_sets_of_the_first_format_are_read(tmp_path: Path) -> None:
    """A set of the first format, with its whitening matrix inside, gives its original pixels."""
    sample = Path(__file__).parent / "samples/synthetic-with-matrix.arrow"
    old = load(str(sample))
    assert (old.step_sizes, old.class_names, old.transform.kind) == ((0.5,), ("even", "odd"), "zca")
    assert (old.stated_has_step_size, old.has_step_size) == (None, True)
    pixels = np.arange(4 * 2 * 3 * 3).reshape(4, 2, 3, 3) * 3
    assert np.array_equal(old.pixels(), pixels.transpose(0, 2, 3, 1))
    torch.testing.assert_close(old.normalise(pixels.astype(np.uint8)), old.images)
    (name,) = export(old, "arrow", open_location(str(tmp_path)))
    assert load(str(tmp_path / name)).transform.digest == old.transform.digest


def test_what_an_export_leaves_out_is_reported(artifact: Artifact) -> None:
    """An export reports clipped pixels, renamed folders, and parts that the format cannot hold."""
    notes = {kind: " ".join(left_out(artifact, kind)) for kind in EXPORTS}
    assert artifact.clipped_share() == 0  # images of real ones
    assert "clipped" not in notes["png"] + notes["parquet"]
    assert (notes["arrow"], notes["safetensors"]) == ("", "")
    assert "step size is in the .arrow file" in notes["parquet"]
    assert "neither class names nor the transform" in notes["pt"]
    brighter = dataclasses.replace(artifact, class_names=("a/b", "x" * 300), images=artifact.images + 100)
    notes = {kind: " ".join(left_out(brighter, kind)) for kind in EXPORTS}
    assert notes["parquet"].startswith("100 % of the pixels' values lay outside 0..1 and were clipped")
    assert "'a/b' is in 'a_b'" in notes["png"]
    assert {len(name.partition("/")[0]) for name in EXPORTS["png"](brighter)} >= {200}
    assert "lr_best.pt holds the first of 2 step sizes" in notes["pt"]
    assert "step sizes" not in " ".join(left_out(dataclasses.replace(artifact, step_sizes=(0.1,)), "pt"))
