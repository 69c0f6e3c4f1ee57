"""What the report is told of a run, and what it reads from the run's folder."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datm_ray.artifact import Artifact, read_artifact
from datm_ray.config import RunConfig, network_names
from datm_ray.core.distillation import diverged
from datm_ray.runtime.checkpoint import CHECKPOINT, read_curves
from datm_ray.runtime.distill import COST, INITIAL, MAPS, SYNTHETIC, read_cost
from datm_ray.runtime.evaluate import FAIR_PARTS, FAIR_ROWS, ROWS, FairScores, NetworkScores, Score
from datm_ray.runtime.experts import read_experts_cost
from datm_ray.runtime.metadd import MAPS_KIND
from datm_ray.runtime.spent import Spent
from datm_ray.store.filesystem import Location
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.tensors import read_tensors


@dataclass(frozen=True)
class RunSummary:
    """What the report is told of one run; it reads the rest from the run's folder."""

    config: RunConfig
    folder: Location
    """Holds initial.arrow, checkpoint.arrow and synthetic.arrow, as far as the run has come."""
    scores: list[Score]
    """The finished rows, in any order; empty before evaluation."""
    training_images: int | None = None
    """Real training images, where the caller knows their number."""
    networks: Sequence[NetworkScores] = ()
    """What the set is worth to other architectures, as far as that is known."""
    fair: FairScores | None = None
    """DD-Ranking's scores, where they were asked for and all networks they need are trained."""
    fair_rows: Sequence[Score] = ()
    """The rows beyond the table's that these are made of."""


@dataclass(frozen=True)
class Maps:
    """Class activation maps of some images, before and after."""

    networks: Sequence[str]
    """The backbone first."""
    rows: Sequence[int]
    """Of the images in the set."""
    scaled: tuple[NDArray[np.float32], NDArray[np.float32]]
    """[m b h w] from 0 to 1."""
    ratios: tuple[float, float]
    """Meta-feature ratio of all images."""
    threshold: float


@dataclass(frozen=True)
class CostLine:
    """What one part of a run has cost."""

    title: str
    count: int
    """Experts, sets or networks behind it."""
    spent: Spent
    complete: bool = True
    """Whether everything was measured; of results of earlier versions only the seconds are known."""

    @property
    def processor_seconds(self) -> float:
        """Of the GPUs where it had any, else of the CPUs."""
        return self.spent.gpu_seconds or self.spent.cpu_seconds


def cost_lines(summary: RunSummary) -> list[CostLine]:
    """Of experts, distillation, every row of the table and every other architecture, as far as they are there."""
    lines = [
        CostLine(f"experts, {each.architecture}", each.known, each.spent)
        for each in read_experts_cost(summary.folder)
        if each.known
    ]
    if (summary.folder / COST).exists():
        lines.append(CostLine("distillation", 1, read_cost(summary.folder)))
    titles = {**ROWS, **FAIR_ROWS}
    ordered = sorted((*summary.scores, *summary.fair_rows), key=lambda score: list(titles).index(score.row))
    lines += [_cost_line(titles[score.row], score) for score in ordered]
    for name, each in zip(names_of(summary.networks), summary.networks, strict=True):
        rows = (each.tuned, each.control)  # the learned step size is one of those that were tried for the tuned one
        lines += [_cost_line(f"{titles[score.row]}, on {name}", score) for score in rows if score]
    return lines


def _cost_line(title: str, score: Score) -> CostLine:
    return CostLine(title, score.n, score.spent, complete=score.cost is not None)


@dataclass(frozen=True)
class Run:
    """Everything the page says about one run."""

    summary: RunSummary
    initial: Artifact | None
    synthetic: Artifact | None
    history: Mapping[str, NDArray[Any]] | None
    """Columns of the checkpoint; None where there is none, or none with an iteration in it."""
    maps: Maps | None = None
    """What MetaDD's networks see; None where it takes no part, or is not finished."""

    @property
    def config(self) -> RunConfig:
        return self.summary.config

    @property
    def latest(self) -> Artifact | None:
        return self.synthetic or self.initial

    @property
    def iterations(self) -> int:
        """Iterations done, as far as the checkpoint knows."""
        return 0 if self.history is None else len(self.history["history.iteration"])

    @property
    def skipped(self) -> int:
        return 0 if self.history is None else int(self.history["history.skipped"].sum())

    @property
    def diverged(self) -> int:
        """Iterations skipped for another reason than a finite loss above the threshold."""
        if self.history is None:
            return 0
        loss, skipped = self.history["history.loss"], self.history["history.skipped"]
        return int(diverged(loss, skipped, self.config.distill.threshold).sum())

    @property
    def shortened(self) -> int:
        """Gradients that were shortened so far."""
        limit = self.config.distill.gradient_limit
        if self.history is None or limit is None or "history.decrease" not in self.history:
            return 0
        return int((self.history["history.decrease"] > limit).sum())


def read_run(summary: RunSummary) -> Run:
    folder = summary.folder
    history = read_curves(folder) if (folder / CHECKPOINT).exists() else None
    if history is not None and not len(history["history.iteration"]):
        history = None
    return Run(summary, _artifact(folder / INITIAL), _artifact(folder / SYNTHETIC), history, _maps(folder / MAPS))


def _maps(place: Location) -> Maps | None:
    if not place.exists():
        return None
    file = read_tensors(place, kind=MAPS_KIND)
    told, arrays = file.metadata, file.arrays
    with rejecting_nonsense(place):
        scaled = (np.asarray(arrays["initial"], np.float32), np.asarray(arrays["final"], np.float32))
        before, after = told["ratios"]
        return Maps(told["networks"], arrays["rows"].tolist(), scaled, (before, after), told["threshold"])


def _artifact(place: Location) -> Artifact | None:
    return read_artifact(place) if place.exists() else None


def write_summary(out: Location, summaries: Sequence[RunSummary], name: str = "summary.json") -> Location:
    """Write recipes, accuracies seed by seed, costs, versions and hardware of the runs as JSON; the file's place."""
    place = out / name
    place.write_json([_summary(summary) for summary in summaries])
    return place


def _summary(summary: RunSummary) -> dict[str, Any]:
    run = read_run(summary)
    latest = run.latest
    return {
        "run": summary.config.name,
        "training_images": summary.training_images,
        "synthetic_images": None if latest is None else len(latest.images),
        "test_accuracy": {
            score.row: {
                "mean": score.mean,
                "std": score.std if score.n > 1 else None,
                "n": score.n,
                "seeds": list(score.accuracies),
                "worker_seconds": round(score.seconds, 1),
            }
            for score in (*summary.scores, *summary.fair_rows)
        },
        "fair": None
        if summary.fair is None
        else {name: {"mean": statistics.fmean(v), "n": len(v), "seeds": list(v)} for name, v in fair_parts(summary)},
        "meta_feature_ratio": None
        if run.maps is None
        else dict(zip(("before", "after"), run.maps.ratios, strict=True)),
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
        "cost": [
            {"what": line.title, "n": line.count}
            | (line.spent.to_json() if line.complete else {"seconds": round(line.spent.seconds, 3)})
            for line in cost_lines(summary)
        ],
        "recipe": summary.config.model_dump(),
        "provenance": None if latest is None else dict(latest.provenance),
    }


def accuracy_table(summaries: Sequence[RunSummary]) -> str:
    """Test accuracy of every run and row as aligned text: one column for each run."""
    if not any(summary.scores for summary in summaries):
        return "No test accuracy yet: no row of any run is evaluated."
    lines = [["test accuracy in %", *map(column_name, summaries)]]
    for row, title in ROWS.items():
        found = [find_score(summary.scores, row) for summary in summaries]
        lines.append([title, *(str(score) if score else "-" for score in found)])
    shares = [share_of_full(summary.scores) for summary in summaries]
    if any(shares):
        lines.append(["share of full-data accuracy", *(share or "-" for share in shares)])
    return "\n".join([*_aligned(lines), "", _networks_behind(summaries)])


def fair_parts(summary: RunSummary) -> list[tuple[str, tuple[float, ...]]]:
    """DD-Ranking's scores and their parts, a value for each seed; nothing where they are not known."""
    return [] if summary.fair is None else list(summary.fair.parts().items())


def fair_cell(values: Sequence[float]) -> str:
    """Mean ± standard deviation; scores are no percentages."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def fair_table(summaries: Sequence[RunSummary]) -> str:
    """DD-Ranking's scores of the runs that have them, and their parts, as aligned text."""
    known = [summary for summary in summaries if summary.fair is not None]
    lines = [["DD-Ranking's scores, of accuracies from 0 to 1", *map(column_name, known)]]
    parts = [dict(fair_parts(summary)) for summary in known]
    lines += [[f"{name}, {title}", *(fair_cell(each[name]) for each in parts)] for name, title in FAIR_PARTS.items()]
    lines.append(["n", *(str(len(each["LRS"])) for each in parts)])
    return "\n".join(_aligned(lines))


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first one to the left; a rule below the heading."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip() for first, *cells in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return text


def column_name(summary: RunSummary) -> str:
    """The run's, with the optimiser of its networks where it is not the one that the step size was learned for."""
    return summary.config.name + (" (AdamW)" if summary.config.evaluate.optimiser == "adamw" else "")


NETWORK_COLUMNS = {
    "learned": "learned step size",
    "tuned": "tuned step size",
    "control": "random real images, soft labels, tuned",
}
"""Columns of the table of architectures."""


def scores_by_name(scores: NetworkScores) -> dict[str, Score]:
    """By column of `NETWORK_COLUMNS`, those that are there."""
    found = {"learned": scores.learned, "tuned": scores.tuned, "control": scores.control}
    return {name: score for name, score in found.items() if score is not None}


def names_of(networks: Sequence[NetworkScores]) -> list[str]:
    """Distinct names of the architectures."""
    return network_names([each.network for each in networks])


def mean_over_networks(networks: Sequence[NetworkScores], column: str, kinds: Sequence[str]) -> str | None:
    """Mean accuracy in percent over the architectures of these kinds; None where one is missing."""
    found = [scores_by_name(each).get(column) for each in networks if each.kind in kinds]
    means = [score.mean for score in found if score is not None]
    return f"{100 * statistics.fmean(means):.1f}" if means and len(means) == len(found) else None


def networks_table(summary: RunSummary) -> str:
    """Accuracy on every architecture as aligned text, then the means over those seen and unseen."""
    lines = [[f"{column_name(summary)}: test accuracy in %", "", *NETWORK_COLUMNS.values()]]
    for name, each in zip(names_of(summary.networks), summary.networks, strict=True):
        cells = scores_by_name(each)
        columns = [str(cells[column]) if column in cells else "-" for column in NETWORK_COLUMNS]
        lines.append([name, each.kind, *columns])
    for title, kinds in (("mean, seen", ["seen"]), ("mean, unseen", ["unseen"]), ("mean, both", ["seen", "unseen"])):
        means = [mean_over_networks(summary.networks, column, kinds) for column in NETWORK_COLUMNS]
        if any(means):
            lines.append([title, "", *(mean or "-" for mean in means)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([a.ljust(widths[0]), b.ljust(widths[1]), *map(str.rjust, cells, widths[2:])]).rstrip()
        for a, b, *cells in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    n = ", ".join(sorted({str(each.tuned.n) for each in summary.networks}))
    return "\n".join([*text, "", f"mean ± standard deviation over freshly trained networks; n = {n}"])


def find_score(scores: Sequence[Score], row: str) -> Score | None:
    return next((score for score in scores if score.row == row), None)


def share_of_full(scores: Sequence[Score]) -> str | None:
    """Accuracy of the distilled set relative to all real data."""
    distilled, full = find_score(scores, "distilled"), find_score(scores, "full")
    if distilled is None or full is None or not full.mean:
        return None
    return f"{100 * distilled.mean / full.mean:.1f} %"


def _networks_behind(summaries: Sequence[RunSummary]) -> str:
    """How many networks a cell of the table rests on, in one sentence."""
    numbers = {summary.config.name: sorted({score.n for score in summary.scores}) for summary in summaries}
    known = {name: " or ".join(map(str, n)) for name, n in numbers.items() if n}
    if len(set(known.values())) == 1:
        n = next(iter(known.values()))
    else:
        n = ", ".join(f"{n} for {name}" for name, n in known.items())
    return f"mean ± standard deviation over freshly trained networks; n = {n}"
