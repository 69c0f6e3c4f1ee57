"""Tests `datm-ray store`: listing, verifying, deleting, and replay buffers in and out."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from datm_ray.config import to_yaml
from datm_ray.core.networks import registry as networks
from datm_ray.core.networks.parameters import unflatten_into
from datm_ray.core.networks.registry import build_network
from datm_ray.data.dataset import transform_of
from datm_ray.data.sources import load_raw
from datm_ray.interop.exports import encode_png
from datm_ray.interop.torch_files import read_torch_file
from datm_ray.recipes import get_recipe
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.trajectories import ExpertGroup, GroupKey, Snapshot, TrajectoryInfo, TrajectoryStore
from datm_ray.words import data_size
from tests.conftest import CommandLine, assert_one_line, tiny_config

KEY = GroupKey("digits", "convnet", "a1b2")
EPOCHS = 5  # epochs of the tiny recipe


@pytest.fixture
def group(tmp_path: Path) -> ExpertGroup:
    """A group of three experts of 1000 parameters, epochs 0 to 2 and 9, in the store "experts"."""
    group = TrajectoryStore(str(tmp_path / "experts")).group(*str(KEY).split("/"))
    info = TrajectoryInfo(
        dataset=KEY.dataset,
        dataset_fingerprint="d1",
        architecture=KEY.architecture,
        recipe={"network": {"width": 4}, "experts": {"epochs": 9}},
        fingerprint=KEY.fingerprint,
        seed=0,
        expert=0,
        parameter_names=("w", "b"),
        parameter_shapes=((99, 10), (10,)),
        epochs=(0, 1, 2, 9),
        storage="bfloat16",
    )
    for expert in range(3):
        vectors = np.random.default_rng(expert).standard_normal((4, 1000)).astype(np.float32)
        snapshots = [Snapshot(epoch, epoch, 0.5, 0.9, row) for epoch, row in zip(info.epochs, vectors, strict=True)]
        group.write_expert(expert, snapshots, replace(info, expert=expert))
    group.write_transform({"mean": np.zeros(3, np.float32)}, {"kind": "standard"})
    return group


def test_ls_and_show_say_what_is_kept(datm_ray: CommandLine, group: ExpertGroup) -> None:
    """`ls` and `show` print number and size of the experts, their epochs with gaps, and storage."""
    _, out, _ = datm_ray("store", "ls", "experts")
    size = data_size(sum(group.size(expert) for expert in range(3)))
    assert out == f"{KEY}  3 experts, epochs 0-2, 9, bfloat16, {size}\n"
    _, out, _ = datm_ray("store", "show", "experts")
    assert "parameters 1,000   bfloat16   format 2" in out
    assert (
        f"expert     2: epochs 0-2, 9, final train loss 0.5000, test accuracy 0.9000, {data_size(group.size(2))}" in out
    )


def test_show_names_a_damaged_expert_and_shows_the_others(
    datm_ray: CommandLine, group: ExpertGroup, tmp_path: Path
) -> None:
    """`show` names a damaged expert and shows the others."""
    file = tmp_path / "experts" / str(KEY) / "expert-00000.arrow"
    file.write_bytes(file.read_bytes()[:-50])
    code, out, _ = datm_ray("store", "show", "experts")
    assert code == 0
    assert "expert     0: damaged" in out
    assert "expert     2: epochs 0-2, 9" in out


def test_verify_names_a_missing_transform_and_a_damaged_expert(
    datm_ray: CommandLine, group: ExpertGroup, tmp_path: Path
) -> None:
    """`verify` names both a missing transform and a damaged expert."""
    folder = tmp_path / "experts" / str(KEY)
    (folder / "transform.arrow").unlink()
    file = folder / "expert-00001.arrow"
    file.write_bytes(file.read_bytes()[:-50])
    code, out, _ = datm_ray("store", "verify", "experts")
    assert code == 2
    assert "expert-00001.arrow" in out
    assert "transform.arrow" in out


def test_verify_calls_nothing_damaged_that_it_cannot_read(
    datm_ray: CommandLine, group: ExpertGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that `verify` cannot read for denial or outage is not called damaged or advised for deletion."""
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr("datm_ray.store.files.local.content", lambda path: (_ for _ in ()).throw(denied))
    code, out, err = datm_ray("store", "verify", "experts")
    assert (code, out) == (2, "")
    assert "Access is denied" in err
    assert "damaged" not in err
    assert "rm" not in err.split()


def test_verify_names_every_damaged_file(datm_ray: CommandLine, group: ExpertGroup, tmp_path: Path) -> None:
    """`verify` checks all files after a damaged one, and ends with exit code 2 and one line."""
    folder = tmp_path / "experts" / str(KEY)
    for name in ("expert-00000.arrow", "expert-00002.arrow", "transform.arrow"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    code, out, err = datm_ray("store", "verify", "experts")
    assert_one_line(
        (code, out, err), "3 of the files in experts are damaged or missing", "expert-00000.arrow", "store rm"
    )
    assert [line.partition(" is damaged")[0].rpartition("/")[2] for line in out.splitlines()] == [
        "expert-00000.arrow",
        "expert-00002.arrow",
        "transform.arrow",
    ]
    assert datm_ray("store", "ls", "experts")[0] == 0


def test_verify_sums_up_what_is_whole(datm_ray: CommandLine, group: ExpertGroup) -> None:
    """`verify` of an intact store exits with 0 and prints number and size."""
    code, out, _ = datm_ray("store", "verify", "experts")
    assert code == 0
    assert out.startswith("whole: 3 experts, ")


def test_rm_deletes_nothing_without_yes(datm_ray: CommandLine, group: ExpertGroup) -> None:
    """`rm` without --yes prints what it would delete, and exits with 0."""
    code, out, _ = datm_ray("store", "rm", "experts", str(KEY), "--expert", "1")
    assert code == 0
    assert out.startswith(f"Would delete 1 expert of {group.location.uri}, ")
    assert group.experts() == [0, 1, 2]


def test_rm_deletes_single_experts_or_all(datm_ray: CommandLine, group: ExpertGroup, tmp_path: Path) -> None:
    """`rm` deletes named experts only, or the whole group with its transform, damaged or not."""
    assert datm_ray("store", "rm", "experts", str(KEY), "--expert", "0", "--expert", "2", "--yes")[0] == 0
    assert group.experts() == [1]
    assert group.has_transform()
    (tmp_path / "experts" / str(KEY) / "expert-00001.arrow").write_bytes(b"damaged")
    code, out, _ = datm_ray("store", "rm", "experts", str(KEY), "--yes")
    expected = f"Deleted 1 expert of {group.location.uri}, their transform and what is in progress"
    assert (code, out.rpartition(",")[0]) == (0, expected)
    assert [path for path in (tmp_path / "experts").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits/convnet/none"], f"experts has no group digits/convnet/none. It has {KEY}"),
        ([str(KEY), "--expert", "7"], "has no expert 7"),
    ],
)
def test_rm_of_what_is_not_there_is_one_line(
    datm_ray: CommandLine, group: ExpertGroup, arguments: list[str], words: str
) -> None:
    """`rm` of a missing group or expert is one line and deletes nothing."""
    assert_one_line(datm_ray("store", "rm", "experts", *arguments, "--expert", "0", "--yes"), words)
    assert group.experts() == [0, 1, 2]


class PublishedConvNet(nn.Module):
    """ConvNet with modules made in the order of the MTT family: blocks first, then the classifier."""

    def __init__(self, width: int, depth: int, size: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(depth):
            layers += [
                nn.Conv2d(width if block else 3, width, kernel_size=3, padding=1),
                nn.GroupNorm(width, width, affine=True),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(kernel_size=2, stride=2),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (size // 2**depth) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The tiny recipe, for images of three channels."""
    rows = [
        {"bytes": encode_png(pixels), "path": None}
        for pixels in np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    ]
    pq.write_table(pa.table({"image": rows, "label": [*range(10)] * 10}), tmp_path / "train.parquet")
    config = tiny_config("experts.count=3", "dataset.source=parquet", f"dataset.path={tmp_path / 'train.parquet'}")
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    return str(tmp_path / "tiny.yaml")


def published_network(seed: int) -> PublishedConvNet:
    """The tiny recipe's network with random scales and shifts."""
    network = tiny_config().network
    torch.manual_seed(seed)
    module = PublishedConvNet(network.width, network.depth, 8, 10)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def trajectory(seed: int, epochs: int = EPOCHS) -> list[list[Tensor]]:
    """Snapshots of random networks, as published code stores them."""
    return [
        [parameter.detach().clone() for parameter in published_network(100 * seed + epoch).parameters()]
        for epoch in range(epochs + 1)
    ]


def imported_group(store: str) -> ExpertGroup:
    (key,) = TrajectoryStore(store).groups()
    return TrajectoryStore(store).group(key.dataset, key.architecture, key.fingerprint)


def test_imported_experts_are_the_networks_they_were(datm_ray: CommandLine, recipe: str) -> None:
    """An imported snapshot computes what the published network with its parameters computes."""
    torch.save([trajectory(1), trajectory(2)], "replay_buffer_0.pt")
    code, out, err = datm_ray("store", "import", "replay_buffer_0.pt", "--recipe", recipe, "--store", "s")
    assert code == 0, err
    group = imported_group("s")
    assert group.experts() == [0, 1]
    assert out.splitlines()[0] == f"{group.key} expert 0"
    network = build_network(tiny_config().network.for_images(3, (8, 8), 10), seed=0)
    images = torch.randn(4, 3, 8, 8)
    for expert in (0, 1):
        for epoch in group.read_info(expert).epochs:
            unflatten_into(network, torch.from_numpy(group.read_params(expert, [epoch])[0]))
            expected = published_network(100 * (expert + 1) + epoch)(images)
            torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)


def test_imported_experts_name_their_source(datm_ray: CommandLine, recipe: str) -> None:
    """An imported expert's info names file and position, and the recipe's transform is stored with it."""
    torch.save([trajectory(1)], "replay_buffer_0.pt")
    datm_ray("store", "import", "replay_buffer_0.pt", "--recipe", recipe, "--store", "s")
    group = imported_group("s")
    imported = group.read_info(0).recipe["imported"]
    assert (imported["file"], imported["position"]) == ("replay_buffer_0.pt", 0)
    assert group.read_info(0).epochs == tiny_config().kept_epochs
    assert group.read_transform().metadata["kind"] == tiny_config().dataset.normalisation
    shown = datm_ray("store", "show", "s")[1]
    assert "imported: " in shown
    assert datm_ray("store", "verify", "s")[0] == 0


def test_an_import_measures_the_last_epoch(datm_ray: CommandLine, recipe: str) -> None:
    """Networks that have learned the images are right on test images; those that have not are warned of in a line."""
    torch.save([trajectory(1)], "guessing.pt")
    code, out, err = datm_ray("store", "import", "guessing.pt", "--recipe", recipe, "--store", "s")
    assert code == 0
    assert re.search(r"^The last epoch of the first one classifies [12]?\d\.0% of 20 test images correctly$", out, re.M)
    (warning,) = err.splitlines()
    assert "no better than guessing one of 10 classes. The recipe normalises images otherwise" in warning
    assert f"`datm-ray store rm s {imported_group('s').key}`" in warning
    config = get_recipe(recipe)
    raw = load_raw(config.dataset.source, config.dataset.path, validation=config.dataset.validation)
    images = transform_of(raw, config.dataset.kind).normalise(raw.test.images)
    network, labels = published_network(7), torch.from_numpy(raw.test.labels)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    learned = [parameter.detach().clone() for parameter in network.parameters()]
    torch.save([[*trajectory(2)[:-1], learned], trajectory(3)], "trained.pt")
    code, out, err = datm_ray("store", "import", "trained.pt", "--recipe", recipe, "--store", "trained")
    assert code == 0
    assert "The last epoch of the first one classifies 100.0% of 20 test images correctly" in out
    assert not err


def test_an_import_can_be_repeated_and_continued(datm_ray: CommandLine, recipe: str) -> None:
    """Repeating an import finds stored experts by content and gives new ones the next numbers."""
    torch.save([trajectory(1)], "a.pt")
    torch.save([trajectory(2), trajectory(1), trajectory(3)], "b.pt")
    datm_ray("store", "import", "a.pt", "--recipe", recipe, "--store", "s")
    for _ in range(2):
        code, out, _ = datm_ray("store", "import", "a.pt", "b.pt", "--recipe", recipe, "--store", "s")
        assert code == 0
    group = imported_group("s")
    assert group.experts() == [0, 1, 2]
    assert out.count("was there already") == 4
    assert "0 trajectories were stored in s, 4 were there already" in out
    assert out.splitlines()[-1] == f"Next: datm-ray distill {recipe} --out runs --set experts.count=3 --store s"


def test_an_import_stores_all_or_nothing(datm_ray: CommandLine, recipe: str, tmp_path: Path) -> None:
    """An import with one invalid file stores no expert and no transform."""
    torch.save([trajectory(1)], "good.pt")
    Path("garbage.pt").write_bytes(b"garbage")
    code, _, err = datm_ray("store", "import", "good.pt", "garbage.pt", "--recipe", recipe, "--store", "s")
    assert code == 2
    assert "weights_only" not in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("s/**/*.arrow"))


def test_experts_of_a_group_keep_the_same_epochs(datm_ray: CommandLine, recipe: str) -> None:
    """An import with other epochs than its group's is refused, because not every recipe could match it."""
    torch.save([trajectory(1)], "a.pt")
    torch.save([trajectory(2)], "b.pt")
    assert datm_ray("store", "import", "a.pt", "--recipe", recipe, "--store", "s")[0] == 0
    more = ["--set", "experts.keep_epochs=3"]
    code, _, err = datm_ray("store", "import", "b.pt", "--recipe", recipe, "--store", "s", *more)
    assert code == 2
    assert "all experts of a group keep the same epochs" in err.lower()
    assert imported_group("s").experts() == [0]


def test_export_and_import_are_inverse(datm_ray: CommandLine, recipe: str) -> None:
    """Exported files hold the imported trajectories, a given number in each."""
    trajectories = [trajectory(1), trajectory(2), trajectory(3)]
    torch.save(trajectories, "in.pt")
    whole = ["--recipe", recipe, "--store", "s", "--set", f"experts.keep_epochs={EPOCHS}"]
    assert datm_ray("store", "import", "in.pt", *whole)[0] == 0
    key = str(imported_group("s").key)
    code, out, _ = datm_ray("store", "export", "s", key, "--out", "out", "--per-file", "2")
    assert (code, out) == (0, "Wrote 2 files to out\n")
    found = [each for number in range(2) for each in torch.load(f"out/replay_buffer_{number}.pt", weights_only=True)]
    assert len(found) == 3
    for one, other in zip(found, trajectories, strict=True):
        for left, right in zip(one, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_export_says_which_epochs_have_no_place(datm_ray: CommandLine, group: ExpertGroup) -> None:
    """An export leaves out and names epochs after a gap, because a position in a buffer is an epoch."""
    code, out, _ = datm_ray("store", "export", "experts", str(KEY), "--out", "out")
    assert code == 0
    assert "Without epochs 9, which come after a gap" in out
    found = torch.load("out/replay_buffer_0.pt", weights_only=True)
    assert [len(each) for each in found] == [3, 3, 3]
    assert [tuple(tensor.shape) for tensor in found[0][0]] == [(99, 10), (10,)]


UNFIT = {
    "too short": (
        lambda: [trajectory(1, epochs=3)],
        [],
        "It ends after 3 epochs, and experts.epochs is 5. Give --set experts.epochs=3.",
    ),
    "shorter than what is matched": (
        lambda: [trajectory(1, epochs=2)],
        ["--set", "distill.expert_epochs=2", "--set", "distill.start_epochs=[0, 4]"],
        "Give --set experts.epochs=2 --set distill.expert_epochs=1 --set 'distill.start_epochs=[0,2]'.",
    ),
    "of an untrained network": (lambda: [trajectory(1, epochs=0)], [], "It ends after 0 epochs", "Give the recipe of"),
    "another width": (
        lambda: [trajectory(1)],
        ["--set", "network.width=8"],
        "features.0.weight is [4, 3, 3, 3] in epoch 0, and [8, 3, 3, 3] in the recipe's network. "
        "Give --set network.width=4.",
    ),
    "another depth": (lambda: [trajectory(1)], ["--set", "network.depth=1"], "network 6. Give --set network.depth=2."),
    "no trajectories": (lambda: [torch.zeros(3)], [], "It does not hold trajectories"),
    "nan": (lambda: [[[torch.full((3,), torch.nan)]]], [], "lists of finite tensors"),
    "a state dict": (lambda: {"weights": torch.zeros(3)}, [], "It cannot be read as lists of tensors"),
    "a name of code": (lambda: [[[print]]], [], "It does not hold trajectories"),
    "a call": (lambda: [[[Path("a")]]], [], "It cannot be read as lists of tensors"),
    "live weights": (
        lambda: [trajectory(1), [trajectory(2)[0]] * (EPOCHS + 1)],
        [],
        "Trajectory 1 of",
        "holds the same parameters 6 times, one for each epoch. It was written on a CPU",
    ),
    "views of the live weights": (
        lambda: [[[weight.detach()] for _ in range(EPOCHS + 1)] for weight in [torch.zeros(10_000)]],
        [],
        "Trajectory 0 of",
        "holds the same parameters 6 times",
    ),
    "copies of the same weights": (
        lambda: [[[tensor.clone() for tensor in trajectory(2)[0]] for _ in range(EPOCHS + 1)]],
        [],
        "Trajectory 0 of",
        "`p.detach().clone().cpu()`",
    ),
    "images of one channel": (
        lambda: [trajectory(1)],
        ["--set", "dataset.source=digits", "--set", "dataset.path=null"],
        "the published ConvNet pads them by 3 pixels at its first convolution and this one by 1",
    ),
    "a tensor of 4 TB in a kilobyte": (lambda: [[[torch.zeros(1).expand(2**40)]]], [], "lists of tensors"),
    "one tensor 6,000 times": (
        lambda: [[[torch.zeros(1)], [torch.ones(1)]] * 3000],
        [],
        "does not hold trajectories",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_file_that_does_not_fit_is_one_line(case: str, datm_ray: CommandLine, recipe: str, tmp_path: Path) -> None:
    """A replay buffer that does not fit is one line with the difference and settings that fit; nothing is executed."""
    content, changes, *words = UNFIT[case]
    torch.save(content(), "buffer.pt")
    arguments = ["store", "import", "buffer.pt", "--recipe", recipe, "--store", "s", *changes]
    result = datm_ray(*arguments)
    assert_one_line(result, "buffer.pt", *words)
    assert not (tmp_path / "s").exists()
    given = re.findall(r"--set \S+[^.\s]", result[2])
    if given:  # the advised settings are accepted
        assert datm_ray(*arguments, *shlex.split(" ".join(given)))[0] == 0


def test_an_expert_with_batch_norms_is_not_imported(
    datm_ray: CommandLine, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay buffer of a network with batch norm is refused, because it lacks running statistics."""
    batch_norm = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10))
    monkeypatch.setitem(networks._BUILDERS, "batch-norm", lambda spec: batch_norm)
    torch.save([[[p.detach() + epoch for p in batch_norm.parameters()] for epoch in range(EPOCHS + 1)]], "buffer.pt")
    arguments = ["--recipe", recipe, "--store", "s", "--set", "network.architecture=batch-norm"]
    result = datm_ray("store", "import", "buffer.pt", *arguments)
    assert_one_line(result, "running statistics replay buffers do not contain")


def test_what_torch_save_writes_is_read_as_it_was(tmp_path: Path) -> None:
    """Views, layouts, parameters and narrow types from torch.save are read with their values."""
    whole = torch.arange(24, dtype=torch.float32)
    tensors = [
        whole[4:10].reshape(2, 3),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        nn.Parameter(torch.randn(3)),
        torch.randn(3).half(),
        torch.randn(3).bfloat16(),
        torch.randn(2, 2).double(),
        torch.tensor(1.5),
        torch.zeros(0, 3),
    ]
    for protocol in (2, 4):
        torch.save([tensors], tmp_path / "x.pt", pickle_protocol=protocol)
        (found,) = read_torch_file(open_location(str(tmp_path / "x.pt")))
        for one, other in zip(found, tensors, strict=True):
            assert np.array_equal(one, other.detach().to(torch.promote_types(other.dtype, torch.float32)).numpy())


def test_export_warns_that_one_channel_is_padded_otherwise(datm_ray: CommandLine, tmp_path: Path) -> None:
    """An export for one channel warns that the published network pads otherwise."""
    group = TrajectoryStore(str(tmp_path / "s")).group(*str(KEY).split("/"))
    info = TrajectoryInfo(
        *(KEY.dataset, "d1", KEY.architecture, {}, KEY.fingerprint, 0, 0), ("w",), ((4, 1, 3, 3),), (0,)
    )
    group.write_expert(0, [Snapshot(0, 0, 0.5, 0.9, np.zeros(36, np.float32))], info)
    code, out, _ = datm_ray("store", "export", "s", str(KEY), "--out", "out")
    assert code == 0
    assert "the published ConvNet pads images of one channel by 3 pixels, ours by 1" in out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"not a file of tensors"])
def test_a_file_that_is_no_buffer_is_one_line(content: bytes, datm_ray: CommandLine, recipe: str) -> None:
    """A damaged or foreign file in place of a buffer is one line with its name."""
    Path("buffer.pt").write_bytes(content)
    result = datm_ray("store", "import", "buffer.pt", "--recipe", recipe, "--store", "s")
    assert_one_line(result, "buffer.pt is not a replay buffer")


def test_a_missing_buffer_is_one_line(datm_ray: CommandLine, recipe: str) -> None:
    """A missing buffer is one line with its name."""
    assert_one_line(datm_ray("store", "import", "absent.pt", "--recipe", recipe, "--store", "s"), "absent.pt")


def test_a_group_that_only_has_progress_is_shown_and_can_be_deleted(datm_ray: CommandLine, tmp_path: Path) -> None:
    """A group with progress and no finished expert is listed and can be deleted."""
    file = tmp_path / "store/digits/convnet/abc/progress/00000-2-ab/00000-00001-cd.arrow"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"state")
    uri = str(tmp_path / "store")
    code, out, err = datm_ray("store", "ls", uri)
    assert (code, err) == (0, "")
    assert out.startswith("digits/convnet/abc  no expert yet, training in progress")
    code, out, _ = datm_ray("store", "rm", uri, "digits/convnet/abc", "--yes")
    assert code == 0
    assert not file.exists()
    assert datm_ray("store", "ls", uri)[0] == 2
