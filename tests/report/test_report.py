"""Tests the report: its content, its words for missing parts, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datm_ray.artifact import save_artifact
from datm_ray.config import (
    PUBLISHED_AUGMENTATION,
    NetworkConfig,
    RunConfig,
    override,
    run_identity,
    to_yaml,
)
from datm_ray.config.identity import SCORING_KEYS
from datm_ray.core.synthetic import Rows, SyntheticSet, hard_logits
from datm_ray.core.training.labelling import draw_views
from datm_ray.data.transform import fit_transform
from datm_ray.errors import CorruptFileError, RunDirectoryError
from datm_ray.methods.trajectory.iteration import IterationRecord, MatchingState
from datm_ray.monitor.spent import Spent
from datm_ray.pipeline import report
from datm_ray.pipeline.folder import DATA, RECIPE
from datm_ray.report.differences import differences, differing
from datm_ray.report.page import write_report
from datm_ray.report.results import (
    Maps,
    RunSummary,
    accuracy_table,
    cost_lines,
    fair_table,
    networks_table,
    shown_rows,
    write_summary,
)
from datm_ray.runtime.mesh import ALONE
from datm_ray.stages.distill import checkpoint
from datm_ray.stages.distill.checkpoint import CHECKPOINT
from datm_ray.stages.distill.task import COST, INITIAL, SYNTHETIC
from datm_ray.stages.evaluate.rows import FAIR_ROWS, ROWS
from datm_ray.stages.evaluate.scores import FAIR_PARTS, NetworkScores, Score
from datm_ray.stages.experts.train import ExpertsCost, write_experts_cost
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.labels import LabelInfo, LabelRecords, LabelStore
from datm_ray.words import data_size
from tests.conftest import load_config_text

SCORES = [
    Score("random-hard", (0.70, 0.72), Spent(3.0)),
    Score("random-soft", (0.80, 0.82), Spent(4.0)),
    Score("distilled", (0.90, 0.91, 0.92), Spent(90.0)),
    Score("full", (0.97, 0.99), Spent(4000.0)),
]
PROVENANCE = {"versions": {"torch": "9.8.7"}, "processor": "Toy <CPU>", "cores": 2, "dataset": "toys"}  # former name
SIDE, MARKUP_NAME = 6, "<b> & $x_1$ 数"


@pytest.fixture
def out(tmp_path: Path) -> Location:
    return open_location(str(tmp_path / "out"))


def configure(name: str = "tiny", **distill: Any) -> RunConfig:
    grows = "{first: 1, bound: 3, final_bound: 6, expand_iterations: 8}"
    values = {"ipc": 2, "iterations": 12, "threshold": 0.9, "start_epochs": grows} | distill
    return override(RunConfig(), [f"name={name}", *(f"distill.{key}={value}" for key, value in values.items())])


def synthetic_set(config: RunConfig, classes: int, channels: int = 1) -> SyntheticSet:
    rng = np.random.default_rng(0)
    labels = torch.arange(classes).repeat_interleave(config.distill.ipc)
    return SyntheticSet(
        images=torch.from_numpy(rng.normal(size=(len(labels), channels, SIDE, SIDE)).astype(np.float32)),
        soft_labels=torch.nn.functional.one_hot(labels, classes).float() * 4,
        step_sizes=torch.tensor([0.0123]),
        labels=labels,
    )


def save_set(
    place: Location, config: RunConfig, class_names: Sequence[str], channels: int = 1, **provenance: Any
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (30, channels, SIDE, SIDE), dtype=np.uint8)
    transform = fit_transform("standard", pixels, 255)
    synthetic = synthetic_set(config, len(class_names), channels)
    context = (transform, tuple(class_names), run_identity(config), PROVENANCE | provenance)
    save_artifact(place, synthetic, *context, has_step_size=True)


def save_checkpoint(folder: Location, config: RunConfig, losses: Sequence[float], validations: Sequence[float]) -> None:
    state = MatchingState(synthetic_set(config, 3), config.distill)
    for k, loss in enumerate(losses):
        skipped = not loss <= config.distill.skip_above
        decrease = math.nan if skipped else loss  # a skipped iteration has no decrease
        state.history.append(IterationRecord(k, 0, 0, 1 + k % 2, loss, 0.01 + k / 1000, skipped, decrease))
    state.validations = [(4 * (i + 1), accuracy) for i, accuracy in enumerate(validations)]
    state.chosen_at = max(state.validations, key=lambda validation: validation[1], default=(0, 0.0))[0]
    attempt = checkpoint.Attempt.start(folder, ALONE)
    checkpoint.save_checkpoint(attempt, state, Rows(0, len(state.synthetic.images)), ALONE, run_identity(config))


def finished_run(
    out: Location,
    config: RunConfig,
    class_names: Sequence[str] = ("a", "b", "c"),
    scores: Sequence[Score] = SCORES,
    training_images: int | None = 600,
) -> RunSummary:
    folder = out / config.name
    save_set(folder / INITIAL, config, class_names)
    save_set(folder / SYNTHETIC, config, class_names)
    save_checkpoint(folder, config, [0.8, 0.7, 5.0, 0.6, 0.5, 0.5, 0.6, 0.4, 0.4, 0.4, 0.3, 0.3], [0.81, 0.93, 0.88])
    return RunSummary(config, folder, list(scores), training_images)


def page_of(out: Location, *runs: RunSummary) -> str:
    return write_report(out, runs).read_bytes().decode()


def text_of(page: str) -> str:
    """Visible text of a page, without style sheet and tags, with single spaces."""
    words = html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))
    return " ".join(words.split())


class Images(HTMLParser):
    """Attributes of all img elements, with the decoded content under "content"."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            image: dict[str, Any] = dict(attrs)
            media_type, _, data = image["src"].partition(";base64,")
            self.found.append(image | {"type": media_type, "content": base64.b64decode(data)})


def test_page_is_self_contained(out: Location) -> None:
    """The page fetches nothing: sources are data: URIs, links stay in the page, and it has no script."""
    page = page_of(out, finished_run(out, configure("one")), finished_run(out, configure("two")))
    targets = re.findall(r'(?:src|href|srcset|action|poster)\s*=\s*"([^"]*)', page)
    assert targets
    assert all(target.startswith(("data:image/", "#")) for target in targets)
    assert not re.search(r"https?://|<script|<link|<iframe|url\(|@import", page)
    assert "default-src 'none'" in page


def test_pictures_are_whole_and_described(out: Location) -> None:
    """Galleries are readable PNGs, charts are SVGs without outer references, and all have alt texts."""
    images = Images(page_of(out, finished_run(out, configure()))).found
    assert [image["type"] for image in images] == ["data:image/png"] * 2 + ["data:image/svg+xml"] * 5
    for image in images:
        assert len(image["alt"]) > 20
        if image["type"].endswith("png"):
            Image.open(io.BytesIO(image["content"])).load()
        else:
            root = ElementTree.fromstring(image["content"])
            links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("}href")]
            assert all(link.startswith(("#", "data:")) for link in links)


@pytest.mark.usefixtures("without_charts")
def test_table_has_every_row_of_every_run(out: Location) -> None:
    """The table has each row as mean, deviation and n in percent, and the share of full-data accuracy below."""
    page = page_of(out, finished_run(out, configure("one")), finished_run(out, configure("two"), scores=SCORES[:3]))
    text = text_of(page)
    assert "random real images, hard labels 71.0 ± 1.4 (2) 71.0 ± 1.4 (2)" in text
    assert "distilled 91.0 ± 1.0 (3) 91.0 ± 1.0 (3)" in text
    assert "all real data 98.0 ± 1.4 (2) not yet" in text
    assert "share of full-data accuracy 92.9 % –" in text
    assert "Nothing was chosen on the test set" in text


@pytest.mark.usefixtures("without_charts")
def test_the_table_has_the_sizes_of_images_and_labels(out: Location) -> None:
    """Sizes are those of the stored types: soft or hard labels, a label store's kept epochs, or none by a teacher."""
    soft, hard = finished_run(out, configure("soft")), finished_run(out, configure("hard"))
    synthetic = synthetic_set(hard.config, 3)
    synthetic.soft_labels[:] = hard_logits(synthetic.labels, 3)
    transform = fit_transform("standard", np.zeros((2, 1, SIDE, SIDE), np.uint8), 255)
    save_artifact(hard.folder / SYNTHETIC, synthetic, transform, ("a", "b", "c"), {}, PROVENANCE, has_step_size=True)
    taught = dataclasses.replace(soft, config=override(soft.config, ["evaluate.labels=teacher"]))
    info = LabelInfo("set", "teacher", 6, 3, (SIDE, SIDE), epochs=4, keep=4, seed=0)
    store = LabelStore.create(out / "labels", info)
    drawn = draw_views(0, 0, 6, (SIDE, SIDE))
    views = (drawn.boxes, drawn.flips, drawn.partners, drawn.lambdas, drawn.mix_boxes)
    for epoch in range(4):
        store.write_epoch(epoch, [LabelRecords(*views, np.zeros((6, 3), np.float16), np.zeros((6, 0), np.uint16))])
    kept = override(soft.config, ["evaluate.labels=stored", "evaluate.keep_labels=2"])
    stored = dataclasses.replace(soft, config=kept, labels=store.location)
    none = RunSummary(configure("none"), out / "none", SCORES)
    runs = [soft, hard, taught, stored, none]
    files = store.location.sizes()
    two = sum(files[name] for name in ("labels.arrow", "epoch-00000.arrow", "epoch-00001.arrow"))
    images = 6 * SIDE * SIDE * 4
    expected = [(images, 6 * 3 * 4), (images, 6 * 8), (images, None), (images, two)]
    assert [(each.stored.images, each.stored.labels) for each in runs if each.stored] == expected
    assert [each["bytes"] and each["bytes"]["labels"] for each in write_summary(out, runs).read_json()] == [
        *(labels for _, labels in expected),
        None,
    ]
    rows = cells_of_text(accuracy_table(runs))
    assert rows[-2:] == [
        ["size of the set's images", *["864 B"] * 4, "not yet"],
        ["size of its labels", "72 B", "48 B", "from a teacher", data_size(two), "not yet"],
    ]
    assert rows == cells_of_page(page_of(out, *runs[:-1], none))
    assert not any("size" in row[0] for row in cells_of_text(accuracy_table([none])))


@pytest.mark.usefixtures("without_charts")
def test_the_time_of_a_runs_parts_stands_below_their_sizes(out: Location) -> None:
    """Experts, teacher, auxiliaries and distillation have a row with CPU and GPU times, if they are known for a run."""
    runs = [finished_run(out, configure(name)) for name in ("one", "two")]
    networks = (("convnet", Spent(9.0, 60.0), "experts"), ("vgg11", Spent(9.0, 240.0), "experts"))
    others = (("resnet18", Spent(9.0, 1.0, 300.0), "teacher"), ("lenet", Spent(9.0, 120.0), "auxiliaries"))
    costs = [ExpertsCost(name, 2, spent, role) for name, spent, role in (*networks, *others)]
    costs.append(ExpertsCost("mlp", 0, Spent(is_partial=True), "auxiliaries"))  # imported
    write_experts_cost(runs[0].folder, costs)
    for run in runs:
        (run.folder / COST).write_json(Spent(9.0, 30.0, is_partial=run is runs[1]).to_json())
    rows = cells_of_text(accuracy_table(runs))
    assert [row[0] for row in rows[-6:-4]] == ["size of the set's images", "size of its labels"]
    assert rows[-4:] == [
        ["time of the experts", "5 min CPU", "–"],
        ["time of the teacher", "5 min GPU, 1 s CPU", "–"],
        ["time of the auxiliaries", "at least 2 min CPU", "–"],
        ["time of the distillation", "30 s CPU", "at least 30 s CPU"],
    ]
    titles = [line.title for line in cost_lines(runs[0])]
    assert "auxiliaries, lenet" in titles
    assert "auxiliaries, mlp" not in titles
    assert rows == cells_of_page(page_of(out, *runs))


def cells_of_page(page: str) -> list[list[str]]:
    """Titles and cells of a page's tables of accuracies and scores, without headings and numbers of networks."""
    tables = re.findall(r'<table class="accuracy">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for table in tables for row in table.split("</tr>")[:-1]]
    return [[text_of(re.sub(r"<small>\(\d+\)</small>", "", cell)) for cell in row] for row in rows]


def cells_of_text(table: str) -> list[list[str]]:
    """Titles and cells of a text table, without its headings."""
    _, rule, *lines = table.split("\n\n")[0].splitlines()
    columns = [found.span() for found in re.finditer("-+", rule)]
    return [[line[start:end].strip() for start, end in columns] for line in lines]


@pytest.mark.usefixtures("without_charts")
def test_page_and_terminal_show_the_same_cells(out: Location) -> None:
    """The page has every row of the terminal's tables with the same cells, also where scores are missing."""
    networks = [
        NetworkScores(NetworkConfig(architecture=name), kind, SCORES[2] if learned else None, SCORES[2], control)
        for name, kind, learned, control in (("lenet", "seen", True, SCORES[1]), ("alexnet", "unseen", False, None))
    ]
    runs = [
        dataclasses.replace(
            finished_run(out, configure(name), scores=scores),
            networks=networks,
            fair=dict.fromkeys(FAIR_PARTS, (0.3, 0.4)),
        )
        for name, scores in (("one", SCORES), ("two", SCORES[1:3]))
    ]
    on_page = cells_of_page(page_of(out, *runs))
    of_runs = [table for run in runs for table in (networks_table(run), fair_table([run]))]
    assert on_page == [row for table in (accuracy_table(runs), *of_runs) for row in cells_of_text(table)]
    assert ["mean, seen and unseen", "", "–", "91.0", "–"] in on_page
    assert ["all real data", "98.0 ± 1.4", "not yet"] in on_page
    assert ["alexnet", "unseen", "–", "91.0 ± 1.0", "not yet"] in on_page


def test_the_keys_of_the_summary_are_documented(out: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/json.md names the keys that summary.json has for a run with every table, and no others."""
    run = dataclasses.replace(
        finished_run(out, configure(), scores=SCORES),
        networks=[NetworkScores(NetworkConfig(architecture="lenet"), "seen", *SCORES[:3])],
        fair=dict.fromkeys(FAIR_PARTS, (0.3,)),
        fair_rows=[Score(row, (0.5, 0.6), Spent(1.0, is_partial=True)) for row in FAIR_ROWS],
    )
    one = np.zeros((1, 1, 6, 6), np.float32)
    monkeypatch.setattr(RunSummary, "maps", Maps(["convnet"], [0], (one, one), (0.1, 0.2), 0.5))
    (written,) = write_summary(out, [run]).read_json()
    assert set(written["test_accuracy"]) == {*ROWS, *FAIR_ROWS}
    found = keys_below({**written, "test_accuracy": list(written["test_accuracy"].values())})
    text = (Path(__file__).parents[2] / "docs/json.md").read_text().partition("## summary.json")[2]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|.*\|$", text, re.MULTILINE)))) == found


def keys_below(value: object) -> set[str]:
    """Keys of all objects in JSON data, except those of recipes, networks and provenances."""
    if isinstance(value, list):
        return set().union(*map(keys_below, value))
    if not isinstance(value, dict):
        return set()
    below = (keys_below(each) for key, each in value.items() if key not in ("recipe", "network", "provenance"))
    return set(value).union(*below)


@pytest.mark.usefixtures("without_charts")
def test_run_is_described_in_numbers(out: Location) -> None:
    """The page gives numbers of images, experts, iterations and skipped updates, and the hardware."""
    text = text_of(page_of(out, finished_run(out, configure())))
    assert "600 real images of toys were distilled to 6 synthetic images (1 %)" in text
    assert "from 100 experts trained for 100 epochs each, in 12 iterations" in text
    assert "1 iteration changed nothing" in text
    assert "torch 9.8.7" in text
    assert "Toy <CPU>" in text
    assert "1 h 7 min" in text


@pytest.mark.usefixtures("without_charts")
def test_recipe_on_the_page_can_be_run_again(out: Location) -> None:
    """The recipe on the page is YAML that loads as the run's configuration."""
    config = configure()
    page = page_of(out, finished_run(out, config))
    (recipe,) = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert load_config_text(html.unescape(recipe), "page") == config


def test_values_that_a_run_found_stand_beside_its_recipe(out: Location) -> None:
    """A null of the recipe has the value that the run found as a comment, so that the recipe still loads."""
    config = configure(learning_rate_images="null")
    found = {"initial_step_size": [0.0123456, 0.02], "learning_rate_images": 93.21}
    save_set(out / "tiny" / INITIAL, config, ("a", "b"), found=found)
    page = page_of(out, RunSummary(config, out / "tiny", []))
    (recipe,) = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert "  initial_step_size: null  # found: 0.01235; 0.02\n" in recipe
    assert "  learning_rate_images: null  # found: 93.21\n" in recipe
    assert load_config_text(recipe, "page") == config


def test_names_are_escaped(out: Location) -> None:
    """A class name that looks like markup or mathematics, in any script, is shown as it is."""
    page = page_of(out, finished_run(out, configure(), class_names=(MARKUP_NAME, 'caf\udce9 b"', "c\x07")))
    assert "<b>" not in page
    assert MARKUP_NAME in text_of(page)
    assert r'caf\udce9 b"' in text_of(page)  # a folder's name that is no UTF-8
    (soft_labels,) = (image for image in Images(page).found if "heat map" in image["alt"])
    assert MARKUP_NAME in "".join(ElementTree.fromstring(soft_labels["content"]).itertext())


def test_chosen_set_is_marked(out: Location) -> None:
    """The validation chart marks the set that was kept."""
    images = Images(page_of(out, finished_run(out, configure()))).found
    (chart,) = (image for image in images if image["alt"].startswith("Validation"))
    assert "The set of iteration 8 was kept, with 93.0 %" in chart["alt"]
    assert "93.0 kept" in "".join(ElementTree.fromstring(chart["content"]).itertext())


@pytest.mark.usefixtures("without_charts")
def test_gallery_has_a_row_for_each_class(out: Location) -> None:
    """A gallery shows the images' own pixels, one row for each class in order."""
    config = configure()
    images = Images(page_of(out, finished_run(out, config))).found
    gallery = np.asarray(Image.open(io.BytesIO(images[0]["content"])))
    opaque = gallery[..., 3] > 0
    assert opaque.sum() == 3 * config.distill.ipc * SIDE * SIDE
    assert gallery.shape[0] // 3 == gallery.shape[1] // config.distill.ipc == SIDE + 1


@pytest.mark.usefixtures("without_charts")
def test_large_sets_are_cut_and_the_page_says_so(out: Location) -> None:
    """A gallery shows at most ten images of twenty classes, and the page says of how many."""
    config = configure(ipc=11)
    names = [f"class {number}" for number in range(21)]
    page = page_of(out, finished_run(out, config, class_names=names))
    assert "Shown are the first 10 of 11 images of each class and the first 20 of 21 classes." in text_of(page)
    assert "class 19" in text_of(page)
    assert "class 20" not in text_of(page)


def test_colour_images_keep_their_colours(out: Location) -> None:
    """Images of three channels are shown in colour."""
    config = configure()
    save_set(out / config.name / INITIAL, config, ("a", "b"), channels=3)
    (image, _) = Images(page_of(out, RunSummary(config, out / config.name, []))).found
    gallery = np.asarray(Image.open(io.BytesIO(image["content"])))
    assert (gallery[..., 0] != gallery[..., 1]).any()


def test_unstarted_run_is_described(out: Location) -> None:
    """A run without any file gets its recipe and a sentence, not an error."""
    text = text_of(page_of(out, RunSummary(configure(), out / "tiny", [])))
    assert "Distillation has not started: there are no images yet. Nothing is evaluated yet." in text
    assert "No run is evaluated yet" in text
    assert "2 images per class" in text


def test_run_without_checkpoint_is_described(out: Location) -> None:
    """A run with initial images only shows them and says so."""
    config = configure()
    save_set(out / config.name / INITIAL, config, ("a", "b"))
    page = page_of(out, RunSummary(config, out / config.name, []))
    assert "its initial images are there, but no checkpoint yet" in text_of(page)
    assert "Soft labels at the start" in text_of(page)


@pytest.mark.usefixtures("without_charts")
def test_unfinished_run_is_described(out: Location) -> None:
    """A run with a checkpoint but no result shows its curves and its progress so far."""
    config = configure()
    save_set(out / config.name / INITIAL, config, ("a", "b", "c"))
    save_checkpoint(out / config.name, config, [0.8, 0.7, 0.6], [])
    text = text_of(page_of(out, RunSummary(config, out / config.name, SCORES[:1])))
    assert "Distillation is not finished: 3 of 12 iterations are in the last checkpoint" in text
    assert "Not evaluated yet: random real images, soft labels; distilled; all real data." in text
    assert "Matching loss" in text
    assert "Validation accuracy" not in text


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(
    ("limit", "expected"),
    [("0.75", "1 gradient was shortened"), ("0.3", "2 gradients were shortened"), ("", "")],
)
def test_shortened_updates_are_counted(out: Location, limit: str, expected: str) -> None:
    """The page counts updates longer than the recipe's limit; without a limit it counts none."""
    config = configure(gradient_limit=limit or "null")
    save_set(out / config.name / INITIAL, config, ("a", "b", "c"))
    save_checkpoint(out / config.name, config, [0.8, 0.5, 0.2, 0.95], [])
    text = text_of(page_of(out, RunSummary(config, out / config.name, [])))
    assert expected in text
    assert ("shortened: the first-order decrease" in text) == bool(expected)
    assert not expected or f"exceeded {limit} times the loss" in text


@pytest.mark.usefixtures("without_charts")
def test_result_without_its_checkpoint_is_described(out: Location) -> None:
    """A result whose checkpoint was removed is shown without its curves."""
    run = finished_run(out, configure())
    (run.folder / CHECKPOINT).remove()
    text = text_of(page_of(out, run))
    assert "The checkpoint is missing" in text
    assert "After: synthetic images" in text


@pytest.mark.parametrize(
    "losses",
    [[], [0.5], [7.0, math.inf], [0.5, math.nan, 0.4], [math.nan, math.inf], [1e-9, 1e-9]],
    ids=["no iteration", "one iteration", "all skipped", "one nan", "none finite", "tiny losses"],
)
@pytest.mark.parametrize("threshold", [0.9, "null"])
def test_odd_histories_are_drawn(out: Location, losses: list[float], threshold: float | str) -> None:
    """A history of any length is drawn, also where every iteration was skipped, or none can be."""
    config = configure(threshold=threshold)
    save_checkpoint(out / config.name, config, losses, [])
    assert ("Matching loss" in page_of(out, RunSummary(config, out / config.name, []))) == bool(losses)


def test_fixed_range_of_start_epochs_is_drawn(out: Location) -> None:
    """A range of a single start epoch that never grows has a chart, too."""
    config = configure(start_epochs="[2, 3]")
    assert "Start epochs" in page_of(out, finished_run(out, config))


def test_damaged_file_is_an_error(out: Location) -> None:
    """A damaged file is reported as damaged, not as missing."""
    run = finished_run(out, configure())
    (run.folder / SYNTHETIC).write_atomic(b"not an arrow file")
    with pytest.raises(CorruptFileError):
        write_report(out, [run])


def test_same_files_give_the_same_bytes(out: Location) -> None:
    """Two reports on equal files are equal byte for byte."""
    run = finished_run(out, configure())
    assert write_report(out, [run]).read_bytes() == write_report(out, [run]).read_bytes()


def test_finished_runs_come_first(out: Location) -> None:
    """Runs with a set come before others, those with more rows first; else the given order stays."""
    started, half = (RunSummary(configure(name), out / name, []) for name in ("started", "half"))
    save_set(started.folder / INITIAL, started.config, ("a", "b"))
    unscored, done = (RunSummary(configure(name), out / name, of) for name, of in (("unscored", []), ("done", SCORES)))
    for run in (unscored, done):
        save_set(run.folder / SYNTHETIC, run.config, ("a", "b"))
    headings = re.findall(r"<h2>(\w+)</h2>", page_of(out, started, half, unscored, done))
    assert headings == ["done", "unscored", "started", "half"]


@pytest.mark.usefixtures("without_charts")
def test_a_data_set_has_one_name(out: Location) -> None:
    """The page calls a data set by its name, also for a run that has no images yet."""
    new = RunSummary(configure("new"), out / "new", [], dataset="toys")
    text = text_of(page_of(out, finished_run(out, configure()), new))
    assert text.startswith("Distilling toys ")
    assert "The images of toys are to be distilled" in text


def test_a_step_size_that_is_not_learned_is_a_plain_line(out: Location) -> None:
    """A step size that stays is drawn in the middle of an axis from 0, and is not called learned."""
    config = configure(learning_rate_step_size=0, initial_step_size=0.03)
    save_set(out / config.name / SYNTHETIC, config, ("a", "b", "c"))
    state = MatchingState(synthetic_set(config, 3), config.distill)
    noise = float(np.float32(0.03))
    state.history = [IterationRecord(k, 0, 0, 1, 0.5, noise, skipped=False, decrease=0.1) for k in range(9)]
    checkpoint.save_checkpoint(
        checkpoint.Attempt.start(out / config.name, ALONE),
        state,
        Rows(0, len(state.synthetic.images)),
        ALONE,
        run_identity(config),
    )
    page = page_of(out, RunSummary(config, out / config.name, []))
    assert "learned step size" not in text_of(page)
    assert "step size, not learned" in text_of(page)
    assert "constant in this recipe" in text_of(page)
    (chart,) = (image for image in Images(page).found if image["alt"].startswith("Step size"))
    ticks = [text.strip() for text in ElementTree.fromstring(chart["content"]).itertext() if text.strip()]
    assert {"0.00", "0.03", "0.06"} <= set(ticks)
    assert not [text for text in ticks if "e" in text and text[0] in "+-−1"]


def test_no_runs_give_a_page(out: Location) -> None:
    """An empty folder has a page that says so."""
    page = page_of(out)
    assert "There are no runs" in page
    assert "skipped" not in page
    assert "full" in shown_rows([])
    assert "No test accuracy yet" in accuracy_table([])


def test_a_moved_or_copied_run_is_left_out_of_the_report(tmp_path: Path) -> None:
    """A folder that does not have its run's name is left out with a line, and the other runs are shown once each."""
    for folder, name in (("a", "a"), ("a-copy", "a"), ("b-moved", "b")):
        place = open_location(str(tmp_path / folder))
        (place / RECIPE).write_text(to_yaml(configure(name)))
        (place / DATA).write_json({"fingerprint": "0" * 16, "training_images": 20, "test_images": 9, "name": "digits"})
    shown: list[str] = []
    assert report(str(tmp_path), shown.append).uri == str(tmp_path / "report.html")
    assert [each["run"] for each in json.loads((tmp_path / "summary.json").read_text())] == ["a"]
    assert len(shown) == 2
    assert "b-moved was moved or copied; the name of its run is 'b'" in shown[1]
    (tmp_path / "a").rename(tmp_path / "a-moved")
    with pytest.raises(RunDirectoryError, match="holds no runs"):
        report(str(tmp_path))


def test_text_table_is_aligned(out: Location) -> None:
    """The terminal's table has a right-aligned column for each run, and n in its last line."""
    runs = [RunSummary(configure("one"), out / "one", SCORES), RunSummary(configure("two"), out / "two", SCORES[:1])]
    header, rule, *rows, _, last = accuracy_table(runs).splitlines()
    assert header.split() == ["test", "accuracy", "in", "%", "one", "two"]
    assert {len(line) for line in (header, rule, *rows)} == {len(rule)}
    assert rows[2].split() == ["distilled", "91.0", "±", "1.0", "not", "yet"]
    assert rows[-1].split()[-3:] == ["92.9", "%", "–"]
    assert last.endswith("n = 2 or 3 for one, 2 for two")


def test_what_differs_between_runs_stands_below_their_table(out: Location) -> None:
    """Lines below the table name keys of network and training where runs differ, with the runs, and no others."""
    plain = ["network.width=16", "evaluate.epochs=300", "evaluate.augmentation=''"]
    resnet = ["network.architecture=resnet18", "network.width=16"]
    changes: dict[str, list[str]] = {
        "one": [],
        "two": plain,
        "three": [*plain, "evaluate.seeds=2"],
        "four": [*resnet, "evaluate.optimiser=adamw", "evaluate.labels=teacher"],
    }
    configs = {name: override(configure(name), change) for name, change in changes.items()}

    def below(*names: str) -> list[str]:
        runs = [RunSummary(configs[name], out / name, SCORES) for name in names]
        lines = accuracy_table(runs).split("\n\n")[1].splitlines()[1:]
        text = text_of(page_of(out, *runs))
        assert all(f"The runs differ in {line}." in text for line in lines)
        assert text.count("The runs differ") == len(lines)
        return lines

    assert below("one") == below("two", "three") == []
    assert below("one", "two", "three") == [
        "network.width: 128 (one); 16 (two, three)",
        f'evaluate.augmentation: {PUBLISHED_AUGMENTATION} (one); "" (two, three)',
        "evaluate.epochs: null (one); 300 (two, three)",
    ]
    assert below("one", "four") == [
        "network.architecture: convnet (one); resnet18 (four)",
        "network.width: 128 (one); 16 (four)",
        "evaluate.optimiser: sgd (one); adamw (four)",
        "evaluate.labels: own (one); teacher (four)",
    ]


TRAINING = {
    "protocol": "short",
    "optimiser": "adamw",
    "augmentation": "flip",
    "real_epochs": "7",
    "teacher": "{network: lenet}",
}
"""Keys of `evaluate` that change how networks are trained, beside `SCORING_KEYS` -> another value."""
SCORING = {
    **{"labels": "own", "temperature": "4", "cutmix": "1", "keep_labels": "10", "top_logits": "5"},
    **{"learning_rate": "0.2", "schedule": "cosine", "warmup_epochs": "3", "epochs": "7", "batch_size": "7"},
    **{"weight_decay": "0.1", "micro_batch": "5"},
}


@pytest.mark.parametrize("labels", ["own", "teacher", "stored"])
def test_every_setting_of_a_training_is_distinguished(labels: str) -> None:
    """Each key of `evaluate` that changes how networks of a row are trained has a line, if the run reads it."""
    assert SCORING.keys() == set(SCORING_KEYS)
    unused = {
        "own": {"labels", "temperature", "cutmix", "keep_labels", "top_logits", "teacher"},
        "teacher": {"keep_labels", "top_logits"},
        "stored": set[str](),
    }[labels]
    base = [override(configure(name), [f"evaluate.labels={labels}"]) for name in ("one", "two")]
    assert differences(base) == []
    for key, value in (TRAINING | SCORING).items():
        if (labels, key) == ("own", "cutmix"):  # refused
            continue
        found = differences([base[0], override(base[1], [f"evaluate.{key}={value}"])])
        assert [line.partition(": ")[0] for line in found] == [f"evaluate.{key}"] * (key not in unused)


def test_a_teacher_of_evaluation_is_described_and_is_no_expert_of_the_set(out: Location) -> None:
    """Teachers that differ in any setting are named; a set of dm does not come from the teacher's training."""
    words = ["method=dm", "evaluate.labels=teacher", "evaluate.teacher={network: lenet}"]
    one, two = (override(configure(name), words) for name in ("one", "two"))
    for change in ("network.width=8", "experts.seed=3", "experts.learning_rate=0.5"):
        (line,) = differences([one, override(two, [f"evaluate.teacher.{change}"])])
        key, _, value = change.partition("=")
        assert line.startswith(f"evaluate.teacher.{key}: ")
        assert line.endswith(f"; {value} (two)")
    assert not RunSummary(one, out / "one", []).follows_experts
    assert RunSummary(configure("one"), out / "one", []).follows_experts


def test_images_that_differ_are_named(out: Location) -> None:
    """Runs on other images, or with another normalisation, have a line for each key."""
    zca = override(configure("zca"), ["dataset.normalisation=zca"])
    plain = override(configure("plain"), ["dataset.normalisation=standard"])
    assert differences([zca, plain]) == ["dataset.normalisation: zca (zca); standard (plain)"]
    for change in ("mean=[0.5]", "source=folder", "resize=16", "validation=0.2"):
        others = [f"dataset.{change}", *(["dataset.std=[1.0]"] if "mean" in change else [])]
        found = differences([configure("one"), override(configure("two"), others)])
        assert [line.partition(":")[0] for line in found] == [each.partition("=")[0] for each in others]


def test_text_table_states_n_once_where_it_is_one(out: Location) -> None:
    """The terminal's table states n once if it is equal in all cells."""
    runs = [RunSummary(configure(name), out / name, SCORES[:2]) for name in ("one", "two")]
    assert accuracy_table(runs).endswith("n = 2")
    assert "share" not in accuracy_table(runs)


def test_one_seed_has_no_deviation(out: Location) -> None:
    """A single network's accuracy is shown without a standard deviation."""
    run = RunSummary(configure(), out / "tiny", [Score("distilled", (0.5,), Spent(1.0))])
    assert "nan" not in accuracy_table([run])
    assert "distilled 50.0 (1)" in text_of(page_of(out, run))


def test_sections_that_some_runs_lack_are_shown_apart() -> None:
    """A section reads "set" beside a run without it. Two sections that differ are shown as JSON."""
    assert list(differing([{"a": {"b": 1}}, {"a": None}])) == [("a", ["set", "null"])]
    found = list(differing([{"a": {"b": 1}}, {"a": None}, {"a": {"b": 2}}]))
    assert found == [("a", ['{"b": 1}', "null", '{"b": 2}'])]
