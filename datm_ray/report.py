"""The report: one self-contained HTML page about the runs of an output folder.

Every image is inside the page, there is no script, and nothing is requested from anywhere. It shows whatever a run
has so far and says what is missing. The same files give the same bytes. Nothing is computed here that is not in the
files already: no training, no evaluation.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from datm_ray.artifact import Artifact, read_artifact
from datm_ray.config import RunConfig, to_yaml
from datm_ray.runtime.distill import CHECKPOINT, INITIAL, SYNTHETIC, difficulty_range, read_history
from datm_ray.runtime.evaluate import ROWS, Score
from datm_ray.store.filesystem import Location

IMAGES_SHOWN, CLASSES_SHOWN = 10, 20
"""At most so many images of a class, and so many classes, in a gallery."""

Floats = NDArray[np.float64]


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


def write_report(out: Location, runs: Sequence[RunSummary], name: str = "report.html") -> Location:
    """Write the page about these runs into the output folder; its place.

    Raises:
        CorruptFileError: a file of a run is damaged. A missing one is no error: the page says so.
    """
    place = out / name
    place.write_text(_render([_read_run(run) for run in runs]))
    return place


def accuracy_table(summaries: Sequence[RunSummary]) -> str:
    """Test accuracy of every run and row as aligned text: one column for each run."""
    if not any(summary.scores for summary in summaries):
        return "No test accuracy yet: no row of any run is evaluated."
    lines = [["test accuracy in %", *(summary.config.name for summary in summaries)]]
    for row, title in ROWS.items():
        found = [_score(summary.scores, row) for summary in summaries]
        lines.append([title, *(str(score) if score else "-" for score in found)])
    shares = [_share_of_full(summary.scores) for summary in summaries]
    if any(shares):
        lines.append(["share of full-data accuracy", *(share or "-" for share in shares)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip() for first, *cells in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*text, "", _networks_behind(summaries)])


# --- what is read -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
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


def _read_run(summary: RunSummary) -> _Run:
    folder = summary.folder
    history = read_history(folder) if (folder / CHECKPOINT).exists() else None
    if history is not None and not len(history["history.iteration"]):
        history = None
    return _Run(summary, _artifact(folder / INITIAL), _artifact(folder / SYNTHETIC), history)


def _artifact(place: Location) -> Artifact | None:
    return read_artifact(place) if place.exists() else None


def _score(scores: Sequence[Score], row: str) -> Score | None:
    return next((score for score in scores if score.row == row), None)


def _share_of_full(scores: Sequence[Score]) -> str | None:
    """Accuracy of the distilled set relative to all real data."""
    distilled, full = _score(scores, "distilled"), _score(scores, "full")
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


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """An image inside the page."""

    title: str
    source: str
    """A data: URI."""
    alt: str
    caption: str


@dataclass(frozen=True)
class _Gallery:
    """Images of a set, one row for each class, as one picture."""

    title: str
    source: str
    alt: str
    class_names: Sequence[str]
    """Labels of the rows."""
    width: int
    """CSS pixels, a multiple of the picture's own."""
    enlarged: bool
    """Whether a pixel of an image takes several on the screen, and should stay a square."""


def _render(runs: Sequence[_Run]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = importlib.resources.files("datm_ray").joinpath("report.html.j2").read_text(encoding="utf-8")
    summaries = [run.summary for run in runs]
    datasets = list(dict.fromkeys(_dataset_name(run) for run in runs))
    return environment.from_string(template).render(
        title=f"Distilling {_listed(datasets)}" if runs else "Dataset distillation",
        done=[_what_was_done(run) for run in runs],
        columns=[run.config.name for run in runs],
        rows=[(row, title, [_cell(summary.scores, row) for summary in summaries]) for row, title in ROWS.items()],
        shares=[_share_of_full(summary.scores) for summary in summaries],
        evaluated=any(summary.scores for summary in summaries),
        runs=[_run_view(run) for run in runs],
    )


def _run_view(run: _Run) -> dict[str, Any]:
    return {
        "name": run.config.name,
        "figures": _key_figures(run),
        "state": _state(run),
        "galleries": _galleries(run),
        "left_out": _left_out(run),
        "charts": _charts(run),
        "recipe": to_yaml(run.config).strip(),
        "provenance": _provenance_lines(run.latest.provenance) if run.latest else [],
        "costs": [
            (title, score.n, _duration(score.seconds), _duration(score.seconds / score.n))
            for row, title in ROWS.items()
            if (score := _score(run.summary.scores, row)) is not None
        ],
    }


def _cell(scores: Sequence[Score], row: str) -> tuple[str, int] | None:
    """(mean ± standard deviation in percent, number of networks)."""
    score = _score(scores, row)
    return (str(score), score.n) if score else None


def _what_was_done(run: _Run) -> str:
    """One run in one sentence."""
    config, real = run.config, run.summary.training_images
    verb = "were" if run.synthetic else "are being" if run.initial else "are to be"
    origin = f"{_count(real, 'real image')} of {_dataset_name(run)}" if real else f"The images of {_dataset_name(run)}"
    return (
        f"{origin} {verb} distilled to {_size(run)}, from {_count(config.experts.count, 'expert')} trained for "
        f"{_count(config.experts.epochs, 'epoch')} each, in {_count(config.distill.iterations, 'iteration')}."
    )


def _size(run: _Run) -> str:
    """The synthetic set's size, and its share of the real one."""
    if run.latest is None:
        return f"{_count(run.config.distill.ipc, 'image')} per class"
    synthetic, real = len(run.latest.images), run.summary.training_images
    return _count(synthetic, "synthetic image") + (f" ({_percent(synthetic / real)})" if real else "")


def _key_figures(run: _Run) -> list[tuple[str, str]]:
    """(value, what it is) pairs for the strip below a run's name."""
    figures = []
    real, scores = run.summary.training_images, run.summary.scores
    if run.synthetic is not None:
        synthetic = len(run.synthetic.images)
        share = f", {_percent(synthetic / real)} of {real:,} real ones" if real else ""
        figures.append((f"{synthetic:,}", ("synthetic image" if synthetic == 1 else "synthetic images") + share))
    if (distilled := _score(scores, "distilled")) is not None:
        figures.append((f"{distilled} %", f"test accuracy, {_count(distilled.n, 'network')}"))
    if (of_full := _share_of_full(scores)) is not None:
        figures.append((of_full, "of the accuracy with all real data"))
    if run.synthetic is not None:
        figures.append((f"{run.synthetic.step_size:.3g}", "learned step size"))
    return figures


def _state(run: _Run) -> str:
    """How far the run has come, in sentences."""
    total = run.config.distill.iterations
    if run.synthetic is not None:
        sentences = [f"Distillation is finished: {_count(run.iterations or total, 'iteration')}."]
    elif run.history is not None:
        sentences = [
            f"Distillation is not finished: {run.iterations:,} of {_count(total, 'iteration')} are in the last "
            "checkpoint, and there is no synthetic set yet."
        ]
    elif run.initial is not None:
        sentences = ["Distillation has only begun: its initial images are there, but no checkpoint yet."]
    else:
        sentences = ["Distillation has not begun: there are no images yet."]
    if run.skipped:
        sentences.append(
            f"{_count(run.skipped, 'iteration')} changed nothing, because the matching loss exceeded the threshold of "
            f"{run.config.distill.threshold:g}."
        )
    missing = [title for row, title in ROWS.items() if _score(run.summary.scores, row) is None]
    if len(missing) == len(ROWS):
        sentences.append("Nothing is evaluated yet.")
    elif missing:
        sentences.append(f"Not evaluated yet: {'; '.join(missing)}.")
    if run.synthetic is not None and run.history is None:
        sentences.append("The checkpoint is missing, and with it the course of the distillation.")
    return " ".join(sentences)


def _dataset_name(run: _Run) -> str:
    name = run.latest.provenance.get("dataset") if run.latest else None
    return str(name or run.config.dataset.source)


def _provenance_lines(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            key.replace("_", " "),
            " · ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, Mapping) else str(value),
        )
        for key, value in provenance.items()
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _percent(share: float) -> str:
    """Two digits that mean something, for shares from 0.02 % to 100 %."""
    digits = 3 if share >= 0.1 else 2
    return f"{100 * share:.{digits}g}\N{NO-BREAK SPACE}%"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- galleries --------------------------------------------------------------------------------------------------------


def _galleries(run: _Run) -> list[_Gallery]:
    sets = (("Before: real images", run.initial), ("After: synthetic images", run.synthetic))
    return [_gallery(title, artifact) for title, artifact in sets if artifact is not None]


def _gallery(title: str, artifact: Artifact) -> _Gallery:
    rows = _shown_rows(artifact)
    columns = max(map(len, rows))
    flat = [index for row in rows for index in row]
    pixels = dataclasses.replace(artifact, images=artifact.images[flat]).pixels()
    height, width = pixels.shape[1:3]
    gap = max(1, width // 12)
    sprite = np.zeros((len(rows) * (height + gap), columns * (width + gap), 4), np.uint8)  # transparent between images
    places = ((y, x) for y, row in enumerate(rows) for x in range(len(row)))
    for image, (y, x) in zip(pixels, places, strict=True):
        top, left = y * (height + gap), x * (width + gap)
        tile = sprite[top : top + height, left : left + width]
        tile[..., :3], tile[..., 3] = image, 255
    scale = max(1, round((56 if columns <= 4 and len(rows) <= 10 else 40) / width))
    return _Gallery(
        title=title,
        source=_png(sprite),
        alt=f"{title}, {len(flat)} images in {len(rows)} rows, one row for each class.",
        class_names=artifact.class_names[: len(rows)],
        width=sprite.shape[1] * scale,
        enlarged=scale > 1,
    )


def _shown_rows(artifact: Artifact) -> list[list[int]]:
    """Positions of the images shown, class by class."""
    labels = artifact.labels.numpy()
    classes = range(min(CLASSES_SHOWN, len(artifact.class_names)))
    return [np.flatnonzero(labels == label)[:IMAGES_SHOWN].tolist() for label in classes]


def _left_out(run: _Run) -> str:
    """A sentence on what the galleries do not show; empty where they show everything."""
    if run.latest is None:
        return ""
    ipc, classes = run.config.distill.ipc, len(run.latest.class_names)
    parts = []
    if ipc > IMAGES_SHOWN:
        parts.append(f"the first {IMAGES_SHOWN} of {ipc:,} images of each class")
    if classes > CLASSES_SHOWN:
        parts.append(f"the first {CLASSES_SHOWN} of {classes:,} classes")
    return f"Shown are {' and '.join(parts)}." if parts else ""


def _png(rgba: NDArray[np.uint8]) -> str:
    sink = io.BytesIO()
    Image.fromarray(rgba).save(sink, "PNG", optimize=True)
    return _data_uri("image/png", sink.getvalue())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


# --- charts -----------------------------------------------------------------------------------------------------------

INK, MUTED, FAINT, ACCENT, PALE, SIGNAL = "#24292f", "#6b7280", "#e5e7eb", "#2563a8", "#b9d2ea", "#c2570c"
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", PALE, ACCENT, "#123456"])

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    # Text stays text, so the reader's browser picks the first of these that it has.
    "font.sans-serif": ["Helvetica Neue", "Segoe UI", "Roboto", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.usetex": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "axes.facecolor": "white",
    "axes.edgecolor": "#c4c9d0",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "xtick.color": "#c4c9d0",
    "ytick.color": "#c4c9d0",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "savefig.dpi": 200,  # of the rasterised layers
    "svg.fonttype": "none",
    "svg.hashsalt": "datm_ray",  # otherwise the identifiers in the file are random
}


def _charts(run: _Run) -> list[_Picture]:
    charts = []
    if run.history is not None:
        charts += [_loss_chart(run, run.history), _start_chart(run, run.history)]
        if len(run.history["validation.iteration"]):
            charts.append(_validation_chart(run, run.history))
        charts.append(_step_size_chart(run, run.history))
    if run.latest is not None:
        charts.append(_soft_label_chart(run.latest, finished=run.synthetic is not None))
    return charts


def _svg(draw: Callable[[Figure], None]) -> str:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Class names may be in any script: the browser has glyphs that matplotlib's measuring font has not.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        draw(figure)
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _data_uri("image/svg+xml", sink.getvalue())


def _iteration_axes(figure: Figure, last: int, label: str) -> Axes:
    axes = figure.subplots()
    axes.set_xlim(0, max(1, last))
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    _tidy(axes)
    return axes


def _tidy(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _loss_chart(run: _Run, history: Mapping[str, NDArray[Any]]) -> _Picture:
    iteration, skipped = history["history.iteration"] + 1, history["history.skipped"]
    loss: Floats = history["history.loss"]
    used = np.where(skipped | ~np.isfinite(loss), np.nan, loss)
    window = max(1, len(loss) // 40)
    mean = _running_mean(used, window)
    threshold = run.config.distill.threshold
    highest = float(np.nanmax(used)) if np.isfinite(used).any() else threshold
    near = bool(skipped.any()) or threshold <= 2 * highest  # a far threshold would flatten the curve

    def draw(figure: Figure) -> None:
        axes = _iteration_axes(figure, len(loss), "matching loss")
        axes.plot(iteration, used, color=PALE, linewidth=0.8, rasterized=True, label="each iteration")
        axes.plot(iteration, mean, color=ACCENT, label=f"mean of {window}" if window > 1 else "loss")
        if near:
            axes.axhline(threshold, color=SIGNAL, linewidth=1, dashes=(4, 3), label="threshold")
        if skipped.any():
            top = np.full(int(skipped.sum()), 0.985)
            axes.plot(
                iteration[skipped],
                top,
                "|",
                color=SIGNAL,
                markersize=5,
                transform=axes.get_xaxis_transform(),
                label="skipped",
            )
        axes.set_ylim(0, 1.12 * max(highest, threshold if near else 0))
        axes.legend(loc="lower left", ncols=2)

    ends = mean[np.isfinite(mean)]
    course = f" from {ends[0]:.3g} to {ends[-1]:.3g}" if len(ends) else ""
    tail = "" if near else f" The threshold, {threshold:g}, lies far above."
    return _Picture(
        "Matching loss",
        _svg(draw),
        f"Matching loss over {_count(len(loss), 'iteration')}; its running mean goes{course}. "
        f"{_count(int(skipped.sum()), 'iteration')} skipped.",
        "How far the student lands from the expert, relative to how far it had to go: 0 is a perfect match, 1 is no "
        f"progress.{tail}",
    )


def _start_chart(run: _Run, history: Mapping[str, NDArray[Any]]) -> _Picture:
    starts, skipped = history["history.start"], history["history.skipped"]
    allowed = difficulty_range(run.config)
    iteration = history["history.iteration"]
    bounds = np.array([allowed.upper_bound(int(k)) for k in iteration])
    steps = np.flatnonzero(np.diff(bounds)) + 1  # where the bound changes
    epochs = np.arange(allowed.lowest, allowed.upper)
    counts = np.array([(starts == epoch).sum() for epoch in epochs])
    expected = np.array([(1 / (bounds - allowed.lowest))[bounds > epoch].sum() for epoch in epochs])

    def draw(figure: Figure) -> None:
        axes, margin = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        tops, edges = bounds[[0, *steps]] - 0.5, np.array([0, *steps, len(bounds)]) + 0.5
        axes.stairs(tops, edges, baseline=allowed.lowest - 0.5, fill=True, color="#f1f5fa")
        axes.stairs(tops, edges, baseline=None, color=MUTED, linewidth=1)
        size = float(np.clip(1200 / len(starts), 1.5, 14))
        for chosen, color in ((~skipped, ACCENT), (skipped, SIGNAL)):
            axes.scatter(
                iteration[chosen] + 1, starts[chosen], s=size, color=color, alpha=0.7, linewidths=0, rasterized=True
            )
        axes.set_xlim(0, len(starts))
        axes.set_ylim(allowed.lowest - 0.5 - 0.04 * len(epochs), allowed.upper - 0.5 + 0.04 * len(epochs))
        axes.set_xlabel("iteration")
        axes.set_ylabel("start epoch")
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        _tidy(axes)
        axes.grid(visible=False)
        margin.barh(epochs, counts, height=0.8, color=PALE)
        sides = np.append(epochs, allowed.upper) - 0.5
        margin.stairs(expected, sides, orientation="horizontal", color=MUTED, linewidth=1, baseline=None)
        margin.spines["left"].set_visible(False)
        margin.tick_params(axis="y", length=0, labelleft=False)
        margin.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        margin.set_xlabel("times")

    return _Picture(
        "Start epochs",
        _svg(draw),
        f"Start epoch of every iteration, between {starts.min()} and {starts.max()}, within the allowed range from "
        f"{allowed.lowest} to a bound that goes from {bounds[0] - 1} to {bounds[-1] - 1}; at the side, how often each "
        "epoch was drawn.",
        "Where on the expert’s way each iteration began. The tinted area is the allowed range; at the side, how often "
        "each epoch was drawn, with the expected number as a line.",
    )


def _validation_chart(run: _Run, history: Mapping[str, NDArray[Any]]) -> _Picture:
    iteration, accuracy = history["validation.iteration"], 100 * history["validation.accuracy"]
    best = int(accuracy.argmax())  # the first of equals, as distillation keeps it

    def draw(figure: Figure) -> None:
        axes = _iteration_axes(figure, run.iterations, "validation accuracy in %")
        axes.set_xlim(0, 1.03 * max(1, run.iterations))
        axes.plot(iteration, accuracy, color=ACCENT, marker="o", markersize=3)
        axes.plot(iteration[best], accuracy[best], "o", color="white", markeredgecolor=SIGNAL, markersize=8, zorder=3)
        axes.plot(iteration[best], accuracy[best], "o", color=SIGNAL, markersize=4, zorder=4)
        late = iteration[best] > 0.7 * run.iterations
        axes.annotate(
            f"{accuracy[best]:.1f} kept",
            (iteration[best], accuracy[best]),
            xytext=(-8 if late else 8, 7),
            textcoords="offset points",
            ha="right" if late else "left",
            color=SIGNAL,
        )
        axes.margins(y=0.18)

    networks = _count(run.config.distill.validation_seeds, "network")
    return _Picture(
        "Validation accuracy",
        _svg(draw),
        f"Validation accuracy at {_count(len(accuracy), 'point')}; the best, {accuracy[best]:.1f} %, at iteration "
        f"{iteration[best]}.",
        f"{networks} trained on the set as it stood, scored on images held back from training. The marked set is kept.",
    )


def _step_size_chart(run: _Run, history: Mapping[str, NDArray[Any]]) -> _Picture:
    iteration = np.append(0, history["history.iteration"] + 1)
    steps = np.append(run.config.distill.initial_step_size, history["history.step_size"])

    def draw(figure: Figure) -> None:
        axes = _iteration_axes(figure, run.iterations, "step size")
        axes.axhline(steps[0], color="#c4c9d0", linewidth=1, dashes=(4, 3))
        axes.plot(iteration, steps, color=ACCENT)
        axes.margins(y=0.12)

    return _Picture(
        "Step size",
        _svg(draw),
        f"Step size of the student, from {steps[0]:.3g} to {steps[-1]:.3g} over {_count(run.iterations, 'iteration')}.",
        "The student’s learning rate, learned together with the images; dashed, where it began.",
    )


def _soft_label_chart(artifact: Artifact, *, finished: bool) -> _Picture:
    labels = artifact.labels.numpy()
    probabilities = artifact.soft_labels.double().softmax(dim=1).numpy()
    present = sorted(set(labels.tolist()))
    mean: Floats = np.stack([probabilities[labels == label].mean(axis=0) for label in present])
    own = float(np.mean([mean[row, label] for row, label in enumerate(present)]))
    few = len(artifact.class_names) <= CLASSES_SHOWN

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # The root of the probability: small shares of other classes are the point of soft labels.
        shown = axes.imshow(100 * mean, cmap=BLUES, norm=PowerNorm(0.5, 0, 100), aspect="auto", interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("probability given to class")
        axes.set_ylabel("image made for class")
        if few:
            names = [_short(name) for name in artifact.class_names]
            across = max(map(len, names)) > 4
            axes.set_xticks(range(len(names)), names, rotation=45 if across else 0, ha="right" if across else "center")
            axes.set_yticks(range(len(present)), [names[label] for label in present])
            for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
                text.set_parse_math(False)  # a $ in a class name is a $
        bar = figure.colorbar(shown, ax=axes, ticks=[0, 1, 5, 20, 50, 100], pad=0.02, aspect=28)
        bar.ax.set_yticklabels(["0", "1", "5", "20", "50", "100 %"])
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)

    return _Picture(
        "Soft labels" if finished else "Soft labels at the start",
        _svg(draw),
        f"Mean soft label of each class as a heat map of {len(artifact.class_names)} classes; on average "
        f"{100 * own:.0f} % goes to the image's own class.",
        f"Mean label of the images of each class. On average {100 * own:.0f} % goes to the image’s own class; the rest "
        "says which classes it resembles.",
    )


def _short(name: str) -> str:
    printable = "".join(letter for letter in name if letter.isprintable())
    return printable if len(printable) <= 14 else printable[:13] + "…"


def _running_mean(values: Floats, window: int) -> Floats:
    """Mean of the finite values among the last `window`; nan where there are none."""
    known = np.isfinite(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums = sums - np.append(np.zeros(window), sums[:-window])[: len(sums)]
    counts = counts - np.append(np.zeros(window, int), counts[:-window])[: len(counts)]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
