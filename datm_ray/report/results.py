"""Data of runs for the report, from the caller or from the run's folder, and the accuracy tables as text."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.artifact import Artifact, read_artifact
from datm_ray.config import RunConfig, short_names
from datm_ray.core.synthetic import hard_logits
from datm_ray.core.training.loop import OPTIMISERS
from datm_ray.methods.trajectory.iteration import diverged
from datm_ray.monitor.spent import Spent
from datm_ray.report.differences import differences
from datm_ray.stages.distill.checkpoint import CHECKPOINT, read_curves
from datm_ray.stages.distill.metadd import MAPS_KIND
from datm_ray.stages.distill.task import COST, INITIAL, MAPS, SYNTHETIC, read_cost
from datm_ray.stages.evaluate.rows import ALL_ROWS, FIXED_ROWS, ROWS, TABLE_ROWS, fixed_rows
from datm_ray.stages.evaluate.scores import FAIR_PARTS, FairScores, NetworkScores, Score
from datm_ray.stages.experts.train import may_have_experts, read_experts_cost
from datm_ray.stages.labels import kept_labels, labels_cost
from datm_ray.stages.methods.registry import iterations_of, trained_backbones
from datm_ray.stages.prior import read_prior_cost
from datm_ray.store.files.filesystem import Location
from datm_ray.store.labels import LabelStore
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.tensors import read_tensors
from datm_ray.words import data_size, duration


@dataclass(frozen=True)
class SetBytes:
    """Bytes of the images and labels that networks are trained on. Transform, names and provenance are not counted."""

    images: int
    """Bytes of the images in the type in which the set's file has them, 32-bit floats."""
    labels: int | None
    """Bytes of the labels: one class or k logits for each image, or the files of a label store. `None` if a teacher
    labels every batch, so that no labels are kept, or if stored labels are not made yet."""


@dataclass(frozen=True)
class RunSummary:
    """Data of one run: fields that the caller gives, and properties that are read once from the run's folder."""

    config: RunConfig
    folder: Location
    """Folder of the run, with initial.arrow, checkpoint.arrow and synthetic.arrow, if the run has written them yet."""
    scores: list[Score]
    """Scores of the finished rows of the accuracy table, in any order; empty before evaluation."""
    training_images: int | None = None
    """Number of real training images; `None` if the caller does not know it."""
    networks: Sequence[NetworkScores] = ()
    """Scores of the set on other architectures, known so far; empty if none was asked for."""
    fair: FairScores | None = None
    """DD-Ranking's scores; `None` without `evaluate.fair`, or before their networks are trained."""
    fair_rows: Sequence[Score] = ()
    """Scores of the additional rows that DD-Ranking's scores need."""
    dataset: str | None = None
    """Name of the data set; `None` if the caller does not know it."""
    labels: Location | None = None
    """Folder of the labels that the set is scored with; `None` if they are not stored."""

    @cached_property
    def synthetic(self) -> Artifact | None:
        """The finished set; `None` before there is one."""
        return _artifact(self.folder / SYNTHETIC)

    @cached_property
    def stored(self) -> SetBytes | None:
        """Bytes of the finished set and of the labels that score it; `None` before there is a set."""
        if self.synthetic is None:
            return None
        if not self.config.evaluate.has_teacher:
            return SetBytes(self.synthetic.images.nbytes, _own_labels(self.synthetic))
        stored = None if self.labels is None else LabelStore(self.labels, keep=kept_labels(self.config)).nbytes
        return SetBytes(self.synthetic.images.nbytes, stored)

    @cached_property
    def initial(self) -> Artifact | None:
        """The set before the first iteration; `None` before there is one."""
        return _artifact(self.folder / INITIAL)

    @cached_property
    def history(self) -> Mapping[str, NDArray[Any]] | None:
        """Curves in the checkpoint: column name, such as "history.loss" -> array of values, see `read_curves`.

        `None` if the checkpoint is missing or has no iteration.
        """
        history = read_curves(self.folder) if (self.folder / CHECKPOINT).exists() else None
        return None if history is None or not len(history["history.iteration"]) else history

    @cached_property
    def maps(self) -> Maps | None:
        """Class activation maps of MetaDD's networks; `None` without MetaDD, or before the distillation is finished."""
        return _maps(self.folder / MAPS)

    @property
    def follows_experts(self) -> bool:
        """True if the run's method needs trained networks: to make the set or, with method given, to label images."""
        return bool(trained_backbones(self.config))

    @cached_property
    def has_experts(self) -> bool:
        """False if the run has needed no trained networks, so that no row of the accuracy table has experts' labels."""
        return may_have_experts(self.folder)

    @property
    def latest(self) -> Artifact | None:
        """The finished set, else the initial one; `None` before there is one."""
        return self.synthetic or self.initial

    @property
    def dataset_name(self) -> str:
        """Name of the data set: the caller's, else the one in the synthetic set's file, else `dataset.source`."""
        named = self.dataset or (self.latest.provenance.get("dataset") if self.latest else None)
        return str(named or self.config.dataset.source)

    @property
    def before(self) -> str:
        """Heading of the images before the first iteration."""
        first = "noise" if self.config.distill.initial == "noise" else "real images"
        return f"Before: {first}" + (", as the prior makes them" if self.config.prior else "")

    @property
    def learns_step_size(self) -> bool:
        """True if the step size is learned, False if the recipe or the method keeps its initial value."""
        has_course = self.history is None or "history.step_size" in self.history
        return bool(self.total) and has_course and self.config.distill.learning_rate_step_size > 0

    @property
    def unfinished(self) -> tuple[bool, int]:
        """Sort key that puts runs with a synthetic set first, and among equals those with more scored rows.

        Returns True if the run has no synthetic set, and the negative number of its scored rows.
        """
        return self.synthetic is None, -len(self.scores)

    @property
    def total(self) -> int:
        """Number of iterations of the whole distillation; 0 if the initial set is the result."""
        return iterations_of(self.config)

    @property
    def iterations(self) -> int:
        """Number of iterations done, from the checkpoint; 0 without a checkpoint."""
        return 0 if self.history is None else len(self.history["history.iteration"])

    @property
    def skipped(self) -> int:
        """Number of iterations so far that were skipped for any reason; of the first backbone if there are several."""
        return 0 if self.history is None else int(self.history["history.skipped"].sum())

    @property
    def diverged(self) -> int:
        """Number of iterations in `skipped`, without those with a finite loss above `distill.threshold`."""
        if self.history is None:
            return 0
        loss, skipped = self.history["history.loss"], self.history["history.skipped"]
        if "history.start" not in self.history:  # no loss is above a threshold
            return self.skipped
        return int(diverged(loss, skipped, self.config.distill.skip_above).sum())

    @property
    def shortened(self) -> int:
        """Number of the first backbone's gradients that were scaled down to `distill.gradient_limit`, so far."""
        limit = self.config.distill.gradient_limit
        if self.history is None or limit is None or "history.decrease" not in self.history:
            return 0
        return int((self.history["history.decrease"] > limit).sum())


@dataclass(frozen=True)
class Maps:
    """Class activation maps of MetaDD's networks for some images, before and after distillation."""

    networks: Sequence[str]
    """Names of the networks, the backbone first."""
    rows: Sequence[int]
    """Indices in the set of the images whose maps are drawn."""
    scaled: tuple[NDArray[np.float32], NDArray[np.float32]]
    """Maps [m b h w] by m networks of the b initial images, then of the distilled images, in [0, 1]."""
    ratios: tuple[float, float]
    """Mean meta-feature ratio (share of an image's features that all networks have), in [0, 1]: initial, distilled."""
    threshold: float


@dataclass(frozen=True)
class CostLine:
    """Cost of one part of a run, such as its experts or one row of the accuracy table."""

    title: str
    count: int
    """Number of experts, sets or networks that the cost covers."""
    spent: Spent

    @property
    def device_time(self) -> str:
        """Times of GPUs and of CPUs as text, such as "at least 1.2 h GPU, 4.4 min CPU"; "" if both are 0."""
        times = {"GPU": self.spent.gpu_seconds, "CPU": self.spent.cpu_seconds}
        text = ", ".join(f"{duration(seconds)} {kind}" for kind, seconds in times.items() if seconds)
        return f"at least {text}" if text and self.spent.is_partial else text


def cost_lines(summary: RunSummary) -> list[CostLine]:
    """Known costs of trained networks, prior, distillation, labels, each table row and each other architecture."""
    return [line for line in _cost_lines(summary) if line.count]


def _cost_lines(summary: RunSummary) -> list[CostLine]:
    """Costs as in `cost_lines`, and lines of networks whose cost is unknown, with the count 0."""
    lines = [
        CostLine(f"{each.role}, {each.architecture}", each.known, each.spent)
        for each in read_experts_cost(summary.folder)
    ]
    if prior := read_prior_cost(summary.folder):
        lines.append(CostLine("prior", 1, prior))
    if (summary.folder / COST).exists():
        lines.append(CostLine("distillation", 1, read_cost(summary.folder)))
    if summary.labels is not None:
        lines.append(CostLine("labels", 1, labels_cost(summary.labels, kept_labels(summary.config))))
    titles, scores = ALL_ROWS, {score.row: score for score in (*summary.fair_rows, *summary.scores)}
    lines += [CostLine(title, score.n, score.spent) for row, title in titles.items() if (score := scores.get(row))]
    for name, each in zip(names_of(summary.networks), summary.networks, strict=True):
        rows = (each.tuned, each.control)  # tuning also tries the learned step size, so its cost is included
        lines += [CostLine(f"{titles[score.row]}, on {name}", score.n, score.spent) for score in rows if score]
    return lines


def _maps(place: Location) -> Maps | None:
    if not place.exists():
        return None
    file = read_tensors(place, kind=MAPS_KIND)
    metadata, arrays = file.metadata, file.arrays
    with rejecting_nonsense(place):
        scaled = (np.asarray(arrays["initial"], np.float32), np.asarray(arrays["final"], np.float32))
        before, after = metadata["ratios"]
        return Maps(metadata["networks"], arrays["rows"].tolist(), scaled, (before, after), metadata["threshold"])


def _artifact(place: Location) -> Artifact | None:
    return read_artifact(place) if place.exists() else None


def _own_labels(artifact: Artifact) -> int:
    """Bytes that the labels of a set take.

    If the soft labels only repeat the class numbers (see `hard_logits`), class numbers are counted; else soft labels.
    """
    hard = hard_logits(artifact.labels, len(artifact.class_names))
    return artifact.labels.nbytes if torch.equal(artifact.soft_labels, hard) else artifact.soft_labels.nbytes


def write_summary(out: Location, summaries: Sequence[RunSummary]) -> Location:
    """Write recipes, accuracies per seed, costs, versions and hardware of the runs as JSON. Returns the file."""
    place = out / "summary.json"
    place.write_json([facts_of(summary) for summary in summaries])
    return place


def facts_of(summary: RunSummary) -> dict[str, Any]:
    """Recipe, accuracies per seed, costs, versions and hardware of a run as plain data for JSON."""
    latest = summary.latest
    return {
        "run": summary.config.name,
        "dataset": summary.dataset_name,
        "training_images": summary.training_images,
        "synthetic_images": None if latest is None else len(latest.images),
        "bytes": None if summary.stored is None else dataclasses.asdict(summary.stored),
        "test_accuracy": {
            score.row: {
                "mean": score.mean,
                "std": score.std if score.n > 1 else None,
                "n": score.n,
                "seeds": list(score.accuracies),
                "worker_seconds": round(score.spent.seconds, 1),
            }
            for score in (*summary.scores, *summary.fair_rows)
        },
        "fair": None
        if summary.fair is None
        else {
            name: {"mean": statistics.fmean(values), "n": len(values), "seeds": list(values)}
            for name, values in summary.fair.items()
        },
        "meta_feature_ratio": None
        if summary.maps is None
        else dict(zip(("before", "after"), summary.maps.ratios, strict=True)),
        "networks": [
            {
                "network": scores.network.model_dump(),
                "kind": scores.kind,
                **{
                    name: {"mean": score.mean, "n": score.n, "seeds": list(score.accuracies)}
                    for name, score in scores_by_name(scores).items()
                },
            }
            for scores in summary.networks
        ],
        "cost": [{"what": line.title, "n": line.count} | line.spent.to_json() for line in cost_lines(summary)],
        "recipe": summary.config.model_dump(),
        "provenance": None if latest is None else dict(latest.provenance),
    }


class Cell(NamedTuple):
    """Cell of a table. The HTML page shows the value and then the note.

    A table as plain text shows the value, or the note if there is no value.
    """

    value: str
    """Value such as "91.0 ± 1.0"; empty if there is none."""
    note: str = ""
    """Number of networks in brackets, or why there is no value; may be empty."""


class Line(NamedTuple):
    """Row of a `Table`: a title, then one cell for each column. The headings are not a `Line`."""

    title: str
    cells: Sequence[Cell]
    style: str = ""
    """CSS class of the row on the page: "share" for a secondary row such as a size, else the row's key; "" for none."""


class Table(NamedTuple):
    """Table of a report: headings and rows of cells, shown as text in the terminal and as HTML in the report."""

    headings: Sequence[str]
    """Headings: that of the row titles, then one for each column of cells."""
    lines: Sequence[Line]


def as_text(table: Table) -> str:
    """Format a table as text. Titles are left-aligned, cells right-aligned; a rule follows the headings."""
    lines = [table.headings, *([line.title, *(each.value or each.note for each in line.cells)] for line in table.lines)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for first, *cells in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def _cell(score: Score | None, absent: str = "not yet") -> Cell:
    return Cell("", absent) if score is None else Cell(str(score), f"({score.n})")


def _computed(title: str, values: Sequence[str | None], *before: Cell) -> list[Line]:
    """List with a row of values computed from other rows, a dash for each `None`; empty if all are `None`.

    Args:
        before: cells between the title and the values.
    """
    return [Line(title, [*before, *(Cell(value or "–") for value in values)], "share")] if any(values) else []


def accuracies(summaries: Sequence[RunSummary]) -> Table:
    """Table with a column per run, and rows for test accuracies by training set, sizes, and CPU and GPU times."""
    lines = [
        Line(title, [_cell(find_score(each.scores, row), _absent(each, row)) for each in summaries], row)
        for row, title in shown_rows(summaries).items()
    ]
    lines += _computed("share of full-data accuracy", [share_of_full(each.scores) for each in summaries])
    lines += [*_sizes(summaries), *_times(summaries)]
    return Table(["test accuracy in %", *map(column_name, summaries)], lines)


def _sizes(summaries: Sequence[RunSummary]) -> list[Line]:
    """Rows with the size of every run's images and labels; empty if no run has a set yet."""
    if not any(each.stored for each in summaries):
        return []
    images = [Cell(data_size(each.stored.images)) if each.stored else Cell("", "not yet") for each in summaries]
    labels = _label_sizes(summaries)
    return [Line("size of the set's images", images, "share"), Line("size of its labels", labels, "share")]


def _label_sizes(summaries: Sequence[RunSummary]) -> list[Cell]:
    found = []
    for each in summaries:
        absent = "from a teacher" if each.config.evaluate.labels == "teacher" and each.stored else "not yet"
        size = each.stored.labels if each.stored else None
        found.append(Cell("", absent) if size is None else Cell(data_size(size)))
    return found


TIMED = ("experts", "teacher", "auxiliaries", "prior", "distillation", "labels")
"""Parts of a run whose CPU and GPU times the accuracy table has: titles of `cost_lines`, up to a comma."""


def _times(summaries: Sequence[RunSummary]) -> list[Line]:
    """Rows with the CPU and GPU times of parts of every run; a part without a known time in any run has no row."""
    spent = [dict.fromkeys(TIMED, Spent()) for _ in summaries]
    for parts, summary in zip(spent, summaries, strict=True):
        for line in _cost_lines(summary):
            if (part := line.title.partition(",")[0]) in TIMED:
                parts[part] += line.spent
    times = {part: [CostLine(part, 1, each[part]).device_time for each in spent] for part in TIMED}
    return [
        Line(f"time of the {part}", [Cell(text or "–") for text in times[part]], "share")
        for part in TIMED
        if any(times[part])
    ]


def accuracy_table(summaries: Sequence[RunSummary]) -> str:
    """Table of `accuracies` as text, with lines below it that explain the cells and say in what the runs differ."""
    if not any(summary.scores for summary in summaries):
        return "No test accuracy yet: no row of any run is evaluated."
    skipped = [SKIPPED] if "full" not in shown_rows(summaries) else []
    unequal = differences([summary.config for summary in summaries])
    return "\n".join([as_text(accuracies(summaries)), "", _networks_behind(summaries), *unequal, *skipped])


SKIPPED = f"{ROWS['full']}: skipped (evaluate.full is false)"
"""Line below a table that lacks the row for all real data."""


def shown_rows(summaries: Sequence[RunSummary]) -> dict[str, str]:
    """Key of each row of these runs' accuracy table -> title. Rows that every run skips are left out."""
    return {
        row: title
        for row, title in TABLE_ROWS.items()
        if not (summaries and all(_is_skipped(each, row) for each in summaries))
    }


def _is_skipped(summary: RunSummary, row: str) -> bool:
    """True if the run leaves out the row, and no earlier command has scored it."""
    if row in FIXED_ROWS:
        is_made = row in fixed_rows(summary.config)
    else:
        is_made = summary.config.evaluate.full if row == "full" else summary.has_experts or row != "random-soft"
    return not is_made and not find_score(summary.scores, row)


def _absent(summary: RunSummary, row: str) -> str:
    return "skipped" if _is_skipped(summary, row) else "not yet"


def _fair_cell(values: Sequence[float]) -> Cell:
    """Mean ± standard deviation with three decimals. DD-Ranking's scores are no percentages."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return Cell(f"{statistics.fmean(values):.3f}{spread}", f"({len(values)})")


def fair_scores(summaries: Sequence[RunSummary]) -> Table:
    """Table of DD-Ranking's scores and their parts, for the runs that have them."""
    known = [(column_name(summary), summary.fair) for summary in summaries if summary.fair is not None]
    lines = [
        Line(
            f"{name}, {title}",
            [_fair_cell(fair[name]) for _, fair in known],
            "" if name in ("LRS", "ARS") else "share",
        )
        for name, title in FAIR_PARTS.items()
    ]
    return Table(["DD-Ranking's scores, of accuracies from 0 to 1", *(heading for heading, _ in known)], lines)


def fair_table(summaries: Sequence[RunSummary]) -> str:
    """DD-Ranking's scores and their parts as text, for the runs that have them."""
    n = ", ".join(sorted({str(len(each.fair["LRS"])) for each in summaries if each.fair is not None}))
    return f"{as_text(fair_scores(summaries))}\n\nmean ± standard deviation over seeds; n = {n}"


def column_name(summary: RunSummary) -> str:
    """Heading of a run's column: the run's name, then in brackets what differs from the defaults.

    That is the optimiser of scored networks, such as "AdamW", and the kind of labels if not the set's own.
    """
    settings = summary.config.evaluate
    labels = {"teacher": ["a teacher's labels"], "stored": ["stored labels"]}.get(settings.labels, [])
    special = [*filter(None, [OPTIMISERS[settings.optimiser].title]), *labels]
    return summary.config.name + (f" ({', '.join(special)})" if special else "")


NETWORK_COLUMNS = {
    "learned": "learned step size",
    "tuned": "tuned step size",
    "control": f"{ROWS['random-soft']}, tuned",
}
"""Key of a column in the table of architectures -> its heading, for methods with experts. Without experts,
`network_columns` gives other headings."""


def network_columns(summary: RunSummary) -> dict[str, str]:
    """Keys of the columns of a run's table of architectures -> their headings."""
    if summary.follows_experts:
        return NETWORK_COLUMNS
    return NETWORK_COLUMNS | {"learned": "the set's step size", "control": f"{ROWS['random-hard']}, tuned"}


def scores_by_name(scores: NetworkScores) -> dict[str, Score]:
    """Existing scores of one architecture, by column of `NETWORK_COLUMNS`."""
    found = {"learned": scores.learned, "tuned": scores.tuned, "control": scores.control}
    return {name: score for name, score in found.items() if score is not None}


def names_of(networks: Sequence[NetworkScores]) -> list[str]:
    """Names of the architectures, in the same order, each different from the others."""
    return short_names([each.network for each in networks])


def _mean_over(networks: Sequence[NetworkScores], column: str) -> str | None:
    """Mean accuracy in percent of a table's `column` over the architectures; `None` without any, or if one lacks it."""
    found = [scores_by_name(each).get(column) for each in networks]
    means = [score.mean for score in found if score is not None]
    return f"{100 * statistics.fmean(means):.1f}" if means and len(means) == len(found) else None


def network_accuracies(summary: RunSummary) -> Table:
    """Table of a run's accuracy on every architecture, then the means over seen ones, unseen ones, and both.

    Seen architectures were used to distil the set beside the recipe's `network`, which is in no mean.
    """
    lines = []
    for name, each in zip(names_of(summary.networks), summary.networks, strict=True):
        found = scores_by_name(each)
        cells = [_cell(found.get(column)) for column in NETWORK_COLUMNS]
        if each.learned is None:  # not scored: the learned step size is for SGD and the set's own labels
            cells[0] = Cell("–")
        lines.append(Line(name, [Cell(each.kind), *cells]))
    for kinds in (["seen"], ["unseen"], ["seen", "unseen"]):
        networks = [each for each in summary.networks if each.kind in kinds]
        means = [_mean_over(networks, column) for column in NETWORK_COLUMNS]
        lines += _computed(f"mean, {' and '.join(kinds)}", means, Cell(""))
    return Table(["test accuracy in %", "while distilling", *network_columns(summary).values()], lines)


def networks_table(summary: RunSummary) -> str:
    """Accuracy on every architecture as text, then the means over those seen and unseen while distilling."""
    (title, *headings), lines = network_accuracies(summary)
    n = ", ".join(sorted({str(each.tuned.n) for each in summary.networks}))
    text = as_text(Table([f"{column_name(summary)}: {title}", *headings], lines))
    return f"{text}\n\nmean ± standard deviation over freshly trained networks; n = {n}"


def find_score(scores: Sequence[Score], row: str) -> Score | None:
    """Score of a row, given by its key such as "full"; `None` if it is not among `scores`."""
    return next((score for score in scores if score.row == row), None)


def share_of_full(scores: Sequence[Score]) -> str | None:
    """Accuracy of the distilled set as a percentage of the accuracy of all real data; `None` if either is unknown."""
    distilled, full = find_score(scores, "distilled"), find_score(scores, "full")
    if distilled is None or full is None or not full.mean:
        return None
    return f"{100 * distilled.mean / full.mean:.1f} %"


def _networks_behind(summaries: Sequence[RunSummary]) -> str:
    """Sentence on the cells of the accuracy table: mean, standard deviation and number of networks."""
    numbers = {summary.config.name: sorted({score.n for score in summary.scores}) for summary in summaries}
    known = {name: " or ".join(map(str, n)) for name, n in numbers.items() if n}
    if len(set(known.values())) == 1:
        n = next(iter(known.values()))
    else:
        n = ", ".join(f"{n} for {name}" for name, n in known.items())
    return f"mean ± standard deviation over freshly trained networks; n = {n}"
