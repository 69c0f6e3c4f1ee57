"""What the report is told of a run, and what it reads from the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from datm_ray.artifact import Artifact, read_artifact
from datm_ray.config import RunConfig
from datm_ray.runtime.checkpoint import CHECKPOINT, read_curves
from datm_ray.runtime.distill import INITIAL, SYNTHETIC
from datm_ray.runtime.evaluate import ROWS, Score
from datm_ray.store.filesystem import Location


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


@dataclass(frozen=True)
class Run:
    """Everything the page says about one run."""

    summary: RunSummary
    initial: Artifact | None
    synthetic: Artifact | None
    history: Mapping[str, NDArray[Any]] | None
    """Columns of the checkpoint; None where there is none, or none with an iteration in it."""

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


def read_run(summary: RunSummary) -> Run:
    folder = summary.folder
    history = read_curves(folder) if (folder / CHECKPOINT).exists() else None
    if history is not None and not len(history["history.iteration"]):
        history = None
    return Run(summary, _artifact(folder / INITIAL), _artifact(folder / SYNTHETIC), history)


def _artifact(place: Location) -> Artifact | None:
    return read_artifact(place) if place.exists() else None


def write_summary(out: Location, summaries: Sequence[RunSummary], name: str = "summary.json") -> Location:
    """Write recipes, accuracies seed by seed, costs, versions and hardware of the runs as JSON; the file's place."""
    place = out / name
    place.write_json([_summary(summary) for summary in summaries])
    return place


def _summary(summary: RunSummary) -> dict[str, Any]:
    latest = read_run(summary).latest
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
            for score in summary.scores
        },
        "recipe": summary.config.model_dump(),
        "provenance": None if latest is None else dict(latest.provenance),
    }


def accuracy_table(summaries: Sequence[RunSummary]) -> str:
    """Test accuracy of every run and row as aligned text: one column for each run."""
    if not any(summary.scores for summary in summaries):
        return "No test accuracy yet: no row of any run is evaluated."
    lines = [["test accuracy in %", *(summary.config.name for summary in summaries)]]
    for row, title in ROWS.items():
        found = [find_score(summary.scores, row) for summary in summaries]
        lines.append([title, *(str(score) if score else "-" for score in found)])
    shares = [share_of_full(summary.scores) for summary in summaries]
    if any(shares):
        lines.append(["share of full-data accuracy", *(share or "-" for share in shares)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip() for first, *cells in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*text, "", _networks_behind(summaries)])


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
