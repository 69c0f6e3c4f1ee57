"""Tests the card of a published set: what it says, that hubs can read it, and that its code works."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from datm_ray import load, publish
from datm_ray.artifact import SCORING, Artifact, LeftOutTransform
from datm_ray.config import (
    NetworkConfig,
    override,
    parse_config,
    run_identity,
    to_yaml,
    with_settings,
)
from datm_ray.core.training.loop import PROTOCOLS, Schedule, schedule_of
from datm_ray.errors import RunDirectoryError, StoreError
from datm_ray.interop.sets import read_set
from datm_ray.monitor.spent import Spent
from datm_ray.pipeline.folder import DATA, RECIPE
from datm_ray.recipes import get_recipe
from datm_ray.report.card import as_markdown, card, is_card, published_files
from datm_ray.report.results import Cell, Line, RunSummary, Table
from datm_ray.stages.distill.task import SYNTHETIC
from datm_ray.stages.evaluate.scores import NetworkScores, Score
from datm_ray.store.files.filesystem import open_location
from tests.conftest import CommandLine, load_config_text, recorded_steps, scoring_steps
from tests.report.test_report import SIDE, configure, finished_run as run_with_scores, save_set

SETS = sorted((Path(__file__).parents[2] / "benchmarks/sets").iterdir())


def card_of(summary: RunSummary) -> str:
    return published_files(summary)["README.md"].decode()


def sections(text: str) -> dict[str, str]:
    """Heading -> text below it."""
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@pytest.fixture
def summary(tmp_path: Path) -> RunSummary:
    return run_with_scores(open_location(str(tmp_path / "runs")), configure("toys-ipc2"))


def test_a_hub_reads_the_front_matter(summary: RunSummary) -> None:
    """The front matter is YAML with the keys that Hugging Face reads, and names the Parquet file that is written."""
    files = published_files(summary)
    found = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert found["pretty_name"] == "toys-ipc2: toys distilled to 6 images"
    assert (found["license"], found["size_categories"]) == ("other", ["n<1K"])
    assert found["task_categories"] == ["image-classification"]
    assert found["tags"] == ["dataset-distillation", "datm"]
    assert pq.read_table(io.BytesIO(files[found["configs"][0]["data_files"]])).num_rows == 6


def test_a_large_transform_may_be_left_out(
    summary: RunSummary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The card says how to make it again, and pictures and Parquet are those of the whole set."""
    whole = published_files(summary)
    assert published_files(summary, transform=False) == whole  # a small one stays
    monkeypatch.setattr("datm_ray.artifact.INLINE_BYTES", 0)
    small = published_files(summary, transform=False)
    assert {name: content for name, content in small.items() if name not in ("README.md", "synthetic.safetensors")} == {
        name: content for name, content in whole.items() if name not in ("README.md", "synthetic.safetensors")
    }
    code, of_whole = (files["README.md"].decode() for files in (small, whole))
    assert 'real = load_raw("digits", validation=0.1)' in code
    assert "synthetic = synthetic.fitted(real.train.images)" in code
    assert "fitted" not in of_whole
    assert "load_raw" not in of_whole
    (tmp_path / "synthetic.safetensors").write_bytes(small["synthetic.safetensors"])
    with pytest.raises(StoreError, match="leaves out its standard transform"):
        load(str(tmp_path / "synthetic.safetensors")).pixels()


def test_a_card_has_the_accuracies_beside_their_controls(summary: RunSummary) -> None:
    """Every scored row is in the table with its number of networks; other networks have a table of their own."""
    accuracy = sections(card_of(summary))["Accuracy"]
    assert "| random real images, soft labels | 81.0 ± 1.4 (2) |" in accuracy
    assert "| distilled | 91.0 ± 1.0 (3) |" in accuracy
    assert "other networks" not in accuracy
    score = Score("distilled", (0.5,), Spent(1.0))
    vgg = NetworkScores(NetworkConfig(architecture="vgg11"), "unseen", None, score, None)
    summary = RunSummary(summary.config, summary.folder, summary.scores, 600, [vgg])
    assert "| vgg11 | unseen | – | 50.0 (1) |" in sections(card_of(summary))["Accuracy"]


def test_a_card_without_accuracies_says_so(summary: RunSummary) -> None:
    """A set that was not scored has a card without a table, which says how to score it."""
    accuracy = sections(card_of(RunSummary(summary.config, summary.folder, [], 600)))["Accuracy"]
    assert "|" not in accuracy
    assert "Not measured yet" in accuracy


def test_a_card_names_the_iteration_that_was_kept_and_the_precision(summary: RunSummary) -> None:
    """Validation chose an earlier set than the last one; sums in 16 bits are part of the recipe."""
    text = card_of(summary)
    assert "in 12 iterations. The set of iteration 8 is kept, which validation images chose." in sections(text)[""]
    assert "precision" not in sections(text)["How it was made"]
    config = override(summary.config, ["cluster.precision=bfloat16", "cluster.workers=7"])
    made = sections(card_of(dataclasses.replace(summary, config=config)))["How it was made"]
    assert "cluster:\n  precision: bfloat16\n" in made
    assert "workers" not in made.split("```yaml")[1]


@pytest.mark.parametrize("folder", SETS, ids=lambda each: each.name)
def test_a_set_of_this_repository_can_be_had(folder: Path) -> None:
    """A committed set has readable, equal files, and a card with its accuracy beside a control, and a licence."""
    text = (folder / "README.md").read_text()
    found, rows = load(folder / "synthetic.safetensors"), pq.read_table(folder / "train.parquet")
    assert is_card(text)
    assert re.search(r"^\| random real images.*\d ± \d", text, re.MULTILINE)
    assert re.search(r"^\| distilled \| \d+\.\d ± ", text, re.MULTILINE)
    assert "state it here" not in text
    assert len(found.images) == rows.num_rows
    assert found.labels.tolist() == rows["label"].to_pylist()
    assert found.training().epochs > 0
    assert not {"/work", "/home", "/root"} & set(re.findall(r"/\w+", text + json.dumps(dict(found.recipe))))


@pytest.mark.parametrize("folder", SETS, ids=lambda each: each.name)
def test_the_code_of_a_set_of_this_repository_is_that_of_new_cards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card of a committed set says how to use it in the words and code of a card that is written now."""
    text, found = (folder / "README.md").read_text(), load(folder / "synthetic.safetensors")
    clipped = re.search(r"^(.* were clipped) there;", text, re.MULTILINE)
    assert clipped is not None
    monkeypatch.setattr(Artifact, "clipped_in_words", lambda _: clipped[1])  # needs the transform
    recipe = load_config_text(sections(text)["How it was made"].split("```yaml\n")[1].split("```")[0], "card")
    config = override(recipe, ["dataset.path=x"])
    summary = RunSummary(config, open_location(str(folder)), [])
    again = card(summary, found, is_whole=not isinstance(found.held_transform, LeftOutTransform))
    assert sections(text)["Use it"] == sections(again)["Use it"]


def test_a_card_says_how_the_set_was_made(summary: RunSummary) -> None:
    """The card has the method, the hardware, the versions and a recipe, but no path of the machine."""
    text = card_of(summary)
    made = sections(text)["How it was made"]
    assert "600 real images of toys were distilled to 6 synthetic images" in sections(text)[""]
    assert "- cores: 2" in made
    assert "- versions: torch 9.8.7" in made
    assert summary.folder.uri not in text


@pytest.mark.parametrize("name", ["digits-ipc1", "digits-dm-ipc10", "cifar10-ipc1", "digits-select-ipc10"])
def test_the_recipe_of_a_card_makes_the_same_set(name: str, tmp_path: Path) -> None:
    """The recipe on a card can be run, has the run's identity, and no path or cluster of this machine."""
    config = override(get_recipe(name), ["dataset.path=/home/me/images", "distill.gradient_limit=null"])
    config = override(config, ["cluster.workers=7"]).resolved((32, 32))
    folder = open_location(str(tmp_path / config.name))
    run = run_with_scores(open_location(str(tmp_path)), config)
    text = sections(card_of(RunSummary(config, folder, run.scores, 600)))["How it was made"]
    recipe = text.split("```yaml\n")[1].split("```")[0]
    assert run_identity(load_config_text(recipe, "card")) == run_identity(config)
    assert "home" not in recipe
    assert "cluster" not in recipe


def test_a_later_card_keeps_the_licence(summary: RunSummary) -> None:
    """A card that is written again keeps the licence that was filled in, and has the new accuracies."""
    first = card_of(RunSummary(summary.config, summary.folder, [], 600))
    filled = first.replace("license: other", "license: cc-by-4.0").split("## Licence")[0] + "## Licence\n\nCC BY 4.0.\n"
    again = published_files(summary, earlier=filled)["README.md"].decode()
    assert "license: cc-by-4.0" in again.split("---\n")[1]
    assert again.endswith("## Licence\n\nCC BY 4.0.\n")
    assert "| distilled | 91.0 ± 1.0 (3) |" in again


LICENCES = {
    "license: mit": {"license": "mit"},
    "license:\n- cc-by-4.0\n- mit": {"license": ["cc-by-4.0", "mit"]},
    "license: other\nlicense_name: my-own\nlicense_link: LICENSE": {
        "license": "other", "license_name": "my-own", "license_link": "LICENSE"
    },
    "": {},
}  # fmt: skip


@pytest.mark.parametrize("front", LICENCES)
@pytest.mark.parametrize(
    "section",
    [
        "## Licence\n\nMine.\n",
        "### LICENSE: mine\n\nMine.\n\n## Citation\n\nMe\n",
        "## Data licence\n\nMine.\n\n### Licence of the texts\n\nMine too.\n",
        "Licensing\n---------\n\nMine.\n",
        "",
    ],
)
def test_every_form_of_a_licence_is_kept(summary: RunSummary, front: str, section: str) -> None:
    """All keys of a licence stay in the front matter, and the section with its heading, or without one."""
    first = card_of(RunSummary(summary.config, summary.folder, [], 600))
    filled = first.replace("license: other\n", f"{front}\n" if front else "").split("## Licence")[0] + section
    again = published_files(summary, earlier=filled)["README.md"].decode()
    found = yaml.safe_load(again.split("---\n")[1])
    assert {key: value for key, value in found.items() if key.startswith("license")} == LICENCES[front]
    assert found["tags"] == ["dataset-distillation", "datm"]
    assert "state it here" not in again
    assert again.endswith(section)
    assert "| distilled | 91.0 ± 1.0 (3) |" in again


def test_a_licence_that_cannot_be_read_is_not_lost(summary: RunSummary) -> None:
    """A card whose front matter is no YAML is refused in one line."""
    broken = card_of(summary).replace("license: other", "license: [mine")
    with pytest.raises(RunDirectoryError, match="is no YAML, and its licence would be lost"):
        published_files(summary, earlier=broken)


def test_an_unfinished_publication_keeps_the_earlier_card(summary: RunSummary, tmp_path: Path) -> None:
    """The card is written last, so that a card never stands beside the files of another set."""
    run, hub = summary.folder, tmp_path / "hub"
    (run / RECIPE).write_text(to_yaml(summary.config))
    (run / DATA).write_json({"fingerprint": "0" * 16, "training_images": 600, "test_images": 9, "name": "toys"})
    publish(run.uri, str(hub))
    earlier = (hub / "README.md").read_text()
    (hub / "README.md").write_text(earlier.replace("\n", "\r\n").replace("license: other", "license: mit"), newline="")
    (hub / "train.parquet").unlink()
    (hub / "train.parquet").mkdir()
    with pytest.raises(StoreError):
        publish(run.uri, str(hub))
    assert "license: mit" in (hub / "README.md").read_text()
    (hub / "train.parquet").rmdir()
    assert publish(run.uri, str(hub))[-1] == "README.md"
    assert (hub / "README.md").read_text() == earlier.replace("license: other", "license: mit")


def test_no_other_warning_changes_a_card(summary: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate counts as chosen by the set's own data, whatever another module warns of meanwhile."""
    artifact = load(tmp_path / "runs/toys-ipc2" / SYNTHETIC)
    expected = card(summary, artifact)
    assert "neither learned" not in expected

    def warning_too(*given: Any) -> Schedule:
        warnings.warn("an old call", DeprecationWarning, stacklevel=2)
        return schedule_of(*given)

    monkeypatch.setattr("datm_ray.artifact.schedule_of", warning_too)
    with pytest.warns(DeprecationWarning, match="an old call"):
        assert card(summary, artifact) == expected


def test_the_recipe_of_a_given_sets_card_scores_the_published_set(
    summary: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe on the card of a given set reads the safetensors file beside the card."""
    given = {"path": "/home/me/set", "digest": "0" * 16, "step_size": 0.05}
    config = with_settings(summary.config, {"method": "given", "given": given, "name": "theirs"})
    run = run_with_scores(summary.folder.parent, config)
    for name, content in published_files(run).items():
        (tmp_path / name).write_bytes(content)
    recipe = (tmp_path / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert "home" not in recipe
    found = parse_config(yaml.safe_load(recipe), "card").given
    assert found is not None
    assert (found.step_size, found.digest) == (0.05, None)
    monkeypatch.chdir(tmp_path)
    ours, theirs = read_set(found.path, ("a", "b", "c")), load(run.folder.uri + f"/{SYNTHETIC}")
    assert np.array_equal(ours.images, theirs.images)


def test_what_a_card_does_not_know_is_left_out(summary: RunSummary, tmp_path: Path) -> None:
    """A fact without a value has no line; pixels that nothing clipped are not mentioned."""
    save_set(summary.folder / SYNTHETIC, summary.config, ("a", "b", "c"), expert_fingerprint="")
    text = card_of(summary)
    assert "expert fingerprint" not in text
    clipped = text.split("`train.parquet`")[1].split("## Accuracy")[0]
    assert "`synthetic.safetensors` keeps them" in clipped
    assert ".arrow" not in clipped


def test_a_card_of_labels_by_a_teacher_says_so(summary: RunSummary) -> None:
    """The card of a set that was scored with a teacher's labels says that its code has none of them."""
    assert "teacher" not in card_of(summary)
    config = override(summary.config, ["evaluate.labels=teacher", "evaluate.temperature=4"])
    taught = run_with_scores(summary.folder.parent, override(config, ["name=taught"]))
    schedule = schedule_of({"labels": "teacher", "temperature": 4.0}, 0.1)
    (taught.folder / SCORING).write_json(schedule.to_json())
    assert "a teacher's labels for every batch, at temperature 4" in sections(card_of(taught))["Accuracy"]


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_code_of_a_card_trains_a_network(
    summary: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    """The code on the card trains any network as those that scored the set, and predicts classes of real images."""
    scoring = dataclasses.replace(PROTOCOLS["quick"], learning_rate=0.03)
    (summary.folder / SCORING).write_json(scoring.to_json())
    if not is_whole:
        monkeypatch.setattr("datm_ray.artifact.INLINE_BYTES", 0)
        small = np.random.default_rng(1).integers(0, 256, (30, 1, SIDE, SIDE), dtype=np.uint8)  # as `save_set` has them
        sets = SimpleNamespace(train=SimpleNamespace(images=small), test=SimpleNamespace(images=small[:5]))
        monkeypatch.setattr("datm_ray.data.load_raw", lambda *_, **__: sets)
    for name, content in published_files(summary, transform=is_whole).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    code = sections((tmp_path / "README.md").read_text())["Use it"].split("```python\n")[1].split("```")[0]
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3), torch.nn.Dropout())
    before = network[1].weight.clone()
    names = {"network": network, "test_images": torch.rand(5, 1, 6, 6)}
    with recorded_steps() as steps:
        exec(code, names)
    assert steps == scoring_steps(load("synthetic.safetensors"), scoring)
    assert not torch.equal(before, network[1].weight)
    assert names["predicted"].shape == (5,)
    assert not network.training


def test_the_code_of_a_card_without_datm_ray_gives_the_same(
    summary: RunSummary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code without datm_ray reads the same images, labels and test images, and is on the page on sets too."""
    (summary.folder / SCORING).write_json(PROTOCOLS["quick"].to_json())
    for name, content in published_files(summary).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    text = sections((tmp_path / "README.md").read_text())["Use it"]
    code = text.split("```python\n")[2].split("```")[0]
    assert "datm_ray" not in code
    assert f"```python\n{code}```" in (Path(__file__).parents[2] / "docs/using-a-set.md").read_text()
    names: dict[str, Any] = {"test_images": torch.rand(5, 1, 6, 6)}
    exec(code, names)
    expected = load("synthetic.safetensors")
    images, probabilities = expected.dataset().tensors
    assert torch.equal(names["images"], images)
    assert torch.equal(names["probabilities"], probabilities)
    torch.testing.assert_close(names["inputs"], expected.normalise(names["test_images"]))
    assert ", learning_rate 0.01, momentum 0.9, weight_decay 0.0005, decay_epoch 11, optimiser sgd.\n" in text
    monkeypatch.setattr("datm_ray.artifact.INLINE_BYTES", 0)
    assert "load_file" not in published_files(summary, transform=False)["README.md"].decode()


def test_a_card_has_the_step_size_that_was_chosen(summary: RunSummary, tmp_path: Path) -> None:
    """The card and the published set have the training noted by the evaluation; before, the card says what is not."""
    found = load(tmp_path / "runs/toys-ipc2" / SYNTHETIC)
    unscored = dataclasses.replace(found, recipe={"evaluate": {"protocol": "quick"}}, stated_has_step_size=False)
    assert "learning_rate 0.0123; the learning rate was neither learned nor chosen\n" in card(summary, unscored)
    chosen = dataclasses.replace(PROTOCOLS["quick"], learning_rate=0.03)
    (summary.folder / SCORING).write_json(chosen.to_json())
    files = published_files(summary)
    assert "# epochs 20, batch_size 128, optimiser sgd, learning_rate 0.03\n" in files["README.md"].decode()
    assert "nearly equal parts" not in files["README.md"].decode()
    (tmp_path / "synthetic.safetensors").write_bytes(files["synthetic.safetensors"])
    assert load(tmp_path / "synthetic.safetensors").training() == chosen


def test_the_preview_shows_the_images(summary: RunSummary) -> None:
    """preview.png is a picture, with small images enlarged."""
    assert Image.open(io.BytesIO(published_files(summary)["preview.png"])).width > 2 * 90


def test_names_break_no_card(tmp_path: Path) -> None:
    """Names with Markdown's and YAML's characters stay one value and one cell."""
    table = as_markdown(Table(["a|b", "c\nd"], [Line("x", [Cell("1", "(2)")])]))
    assert table == "| a\\|b | c d |\n| --- | --- |\n| x | 1 (2) |"


def test_an_unfinished_set_is_not_published(summary: RunSummary) -> None:
    """A run without its set is refused, with the command that finishes it."""
    (summary.folder / SYNTHETIC).remove()
    with pytest.raises(RunDirectoryError, match="Its distillation is not finished"):
        published_files(summary)


def test_one_command_publishes_a_finished_run(datm_ray: CommandLine, finished_run: Path, tmp_path: Path) -> None:
    """`publish` writes the files of a run's folder without its data; an output folder of several runs is refused."""
    run = finished_run / "tiny"
    code, out, _ = datm_ray("publish", str(run), "--out", str(tmp_path / "hub"))
    assert code == 0
    assert sorted(place.name for place in (tmp_path / "hub").iterdir()) == [
        "README.md", "preview.png", "synthetic.safetensors", "train.parquet"
    ]  # fmt: skip
    assert "State the licence" in out
    found, kept = load(tmp_path / "hub/synthetic.safetensors"), load(run / SYNTHETIC)
    assert torch.equal(found.images, kept.images)
    assert publish(str(run), str(tmp_path / "again")) == publish(str(run), str(tmp_path / "hub"))
    assert publish(f"{run.as_uri()}/", str(tmp_path / "hub"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("# My repository\n")
    code, _, err = datm_ray("publish", str(run), "--out", str(tmp_path / "mine"))
    assert (code, err.count("\n")) == (2, 1)
    assert "is no card of a set" in err
    assert [place.name for place in (tmp_path / "mine").iterdir()] == ["README.md"]
    code, _, err = datm_ray("publish", str(finished_run), "--out", str(tmp_path / "hub"))
    assert (code, err.count("\n")) == (2, 1)
    assert "is not the folder of a run" in err
