"""Charts of a distillation's course as SVG images, in one style. Their labels stay text, not outlines."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from datm_ray.artifact import Artifact
from datm_ray.report.gallery import CLASSES_SHOWN, data_uri
from datm_ray.report.results import RunSummary
from datm_ray.words import counted

Floats = NDArray[np.float64]

INK, MUTED, FAINT, ACCENT, PALE, SIGNAL = "#24292f", "#6b7280", "#e5e7eb", "#2563a8", "#b9d2ea", "#c2570c"
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", PALE, ACCENT, "#123456"])

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    # SVG keeps text as text, so the reader's browser uses the first of these fonts that it has.
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
    "axes.formatter.useoffset": False,  # tick labels are full values, not differences from an offset
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
    "savefig.dpi": 200,  # resolution of the rasterised layers
    "svg.fonttype": "none",
    "svg.hashsalt": "datm_ray",  # otherwise the identifiers in the file are random
}


@dataclass(frozen=True)
class Picture:
    """Image in the report, with its title, alternative text and caption."""

    title: str
    source: str
    """Image data as a data: URI."""
    alt: str
    caption: str


def charts_of(run: RunSummary) -> list[Picture]:
    charts = []
    if run.history is not None:
        is_matching = "history.start" in run.history
        charts.append(_loss_chart(run, run.history) if is_matching else _plain_loss_chart(run.history))
        charts += [_start_chart(run, run.history)] if is_matching else []
        if len(run.history["validation.iteration"]):
            charts.append(_validation_chart(run, run.history))
        charts += [_step_size_chart(run, run.history)] if "history.step_size" in run.history else []
        if "meta.iteration" in run.history:
            charts.append(_ratio_chart(run.history))
    if run.latest is not None:
        charts.append(_soft_label_chart(run.latest, finished=run.synthetic is not None))
    return charts


def _svg(draw: Callable[[Figure], None]) -> str:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Class names may be in any script. matplotlib's font may lack their glyphs, and the browser draws them.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        draw(figure)
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return data_uri("image/svg+xml", sink.getvalue())


def _iteration_axes(figure: Figure, last: int, label: str) -> Axes:
    axes = figure.subplots()
    axes.set_xlim(0, max(1, last))
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    _tidy(axes)
    return axes


def _plot_with_mean(axes: Axes, iteration: NDArray[Any], values: Floats) -> None:
    """Plot a value of every iteration, and its running mean."""
    mean, window = _running_mean(values)
    axes.plot(iteration, values, color=PALE, linewidth=0.8, rasterized=True, label="each iteration")
    axes.plot(iteration, mean, color=ACCENT, label=f"mean of {window}" if window > 1 else "value")


def _course(values: Floats) -> str:
    """End of a chart's alternative text: the number of iterations, and the running mean's first and last finite value.

    The two values are left out if no value is finite.
    """
    mean, _ = _running_mean(values)
    ends = mean[np.isfinite(mean)]
    course = f" from {ends[0]:.3g} to {ends[-1]:.3g}" if len(ends) else ""
    return f"over {counted(len(values), 'iteration')}; its running mean goes{course}."


def _tidy(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _loss_chart(run: RunSummary, history: Mapping[str, NDArray[Any]]) -> Picture:
    iteration, skipped = history["history.iteration"] + 1, history["history.skipped"]
    loss: Floats = history["history.loss"]
    used = np.where(skipped | ~np.isfinite(loss), np.nan, loss)
    threshold = run.config.distill.threshold
    highest = float(np.nanmax(used)) if np.isfinite(used).any() else 1.0
    is_far = threshold is not None and threshold > 2 * highest and not skipped.any()  # it would flatten the curve
    drawn = None if is_far else threshold

    def draw(figure: Figure) -> None:
        axes = _iteration_axes(figure, len(loss), "matching loss")
        _plot_with_mean(axes, iteration, used)
        if drawn is not None:
            axes.axhline(drawn, color=SIGNAL, linewidth=1, dashes=(4, 3), label="threshold")
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
        axes.set_ylim(0, 1.12 * max(highest, drawn or 0))
        axes.legend(loc="lower left", ncols=2)

    tail = f" The threshold, {threshold:g}, lies far above." if is_far else ""
    return Picture(
        "Matching loss",
        _svg(draw),
        f"Matching loss {_course(used)} {counted(int(skipped.sum()), 'iteration')} skipped.",
        "Distance of the student from the target, relative to that at its start: 0 is a perfect match, 1 is no "
        f"progress.{tail}",
    )


def _drawn_with_mean(iteration: NDArray[Any], values: Floats, label: str) -> str:
    """Draw a value of every iteration, and its running mean. Returns the image as a data: URI."""

    def draw(figure: Figure) -> None:
        axes = _iteration_axes(figure, int(iteration.max(initial=0)), label)
        _plot_with_mean(axes, iteration, values)
        axes.legend(loc="best")

    return _svg(draw)


def _plain_loss_chart(history: Mapping[str, NDArray[Any]]) -> Picture:
    loss = np.where(history["history.skipped"], np.nan, history["history.loss"])
    source = _drawn_with_mean(history["history.iteration"] + 1, loss, "loss")
    caption = "The method’s loss before each update, without MetaDD’s terms."
    return Picture("Loss", source, f"Loss {_course(loss)}", caption)


def _start_chart(run: RunSummary, history: Mapping[str, NDArray[Any]]) -> Picture:
    starts, skipped = history["history.start"], history["history.skipped"]
    allowed = run.config.distill.start_epochs
    iteration = history["history.iteration"]
    bounds = np.array([allowed.upper_bound(int(k)) for k in iteration])
    steps = np.flatnonzero(np.diff(bounds)) + 1  # iterations at which the bound changes
    epochs = np.arange(allowed.first, allowed.last + 1)
    counts = np.array([(starts == epoch).sum() for epoch in epochs])
    expected = np.array([(1 / (bounds - allowed.first))[bounds > epoch].sum() for epoch in epochs])

    def draw(figure: Figure) -> None:
        axes, margin = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        tops, edges = bounds[[0, *steps]] - 0.5, np.array([0, *steps, len(bounds)]) + 0.5
        axes.stairs(tops, edges, baseline=allowed.first - 0.5, fill=True, color="#f1f5fa")
        axes.stairs(tops, edges, baseline=None, color=MUTED, linewidth=1)
        size = float(np.clip(1200 / len(starts), 1.5, 14))
        for chosen, color in ((~skipped, ACCENT), (skipped, SIGNAL)):
            axes.scatter(
                iteration[chosen] + 1, starts[chosen], s=size, color=color, alpha=0.7, linewidths=0, rasterized=True
            )
        axes.set_xlim(0, len(starts))
        axes.set_ylim(allowed.first - 0.5 - 0.04 * len(epochs), allowed.last + 0.5 + 0.04 * len(epochs))
        axes.set_xlabel("iteration")
        axes.set_ylabel("start epoch")
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        _tidy(axes)
        axes.grid(visible=False)
        margin.barh(epochs, counts, height=0.8, color=PALE)
        sides = np.append(epochs, allowed.last + 1) - 0.5
        margin.stairs(expected, sides, orientation="horizontal", color=MUTED, linewidth=1, baseline=None)
        margin.spines["left"].set_visible(False)
        margin.tick_params(axis="y", length=0, labelleft=False)
        margin.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        margin.set_xlabel("times")

    return Picture(
        "Start epochs",
        _svg(draw),
        f"Start epoch of every iteration, between {starts.min()} and {starts.max()}, within the allowed range from "
        f"{allowed.first} to a bound that goes from {bounds[0] - 1} to {bounds[-1] - 1}; at the side, how often each "
        "epoch was drawn.",
        "Start epoch of the student in each iteration. The tinted area is the allowed range; at the side, how often "
        "each epoch was drawn, with the expected number as a line.",
    )


def _validation_chart(run: RunSummary, history: Mapping[str, NDArray[Any]]) -> Picture:
    iteration, accuracy = history["validation.iteration"], 100 * history["validation.accuracy"]
    kept = int(np.flatnonzero(iteration == history["validation.chosen_at"])[0])

    def draw(figure: Figure) -> None:
        axes = _iteration_axes(figure, run.iterations, "validation accuracy in %")
        axes.set_xlim(0, 1.03 * max(1, run.iterations))
        axes.plot(iteration, accuracy, color=ACCENT, marker="o", markersize=3)
        axes.plot(iteration[kept], accuracy[kept], "o", color="white", markeredgecolor=SIGNAL, markersize=8, zorder=3)
        axes.plot(iteration[kept], accuracy[kept], "o", color=SIGNAL, markersize=4, zorder=4)
        late = iteration[kept] > 0.7 * run.iterations
        axes.annotate(
            f"{accuracy[kept]:.1f} kept",
            (iteration[kept], accuracy[kept]),
            xytext=(-8 if late else 8, 7),
            textcoords="offset points",
            ha="right" if late else "left",
            color=SIGNAL,
        )
        axes.margins(y=0.18)

    networks = counted(run.config.distill.validation_seeds, "network")
    return Picture(
        "Validation accuracy",
        _svg(draw),
        f"Validation accuracy at {counted(len(accuracy), 'point')}. The set of iteration {iteration[kept]} was kept, "
        f"with {accuracy[kept]:.1f} %.",
        f"{networks} trained on the current set, scored on images held back from training. The last set within one "
        "standard error of the best is kept.",
    )


def _step_size_chart(run: RunSummary, history: Mapping[str, NDArray[Any]]) -> Picture:
    iteration = np.append(0, history["history.iteration"] + 1)
    learned = history["history.step_size"]
    steps = np.append(run.initial.step_size if run.initial else learned[0], learned)

    def draw(figure: Figure) -> None:
        axes = _iteration_axes(figure, run.iterations, "step size")
        axes.axhline(steps[0], color="#c4c9d0", linewidth=1, dashes=(4, 3))
        axes.plot(iteration, steps, color=ACCENT)
        axes.margins(y=0.12)
        if not run.learns_step_size:
            axes.set_ylim(0, 2.02 * steps[0])

    kind = "learned together with the images" if run.learns_step_size else "constant in this recipe"
    return Picture(
        "Step size",
        _svg(draw),
        f"Step size of the student, from {steps[0]:.3g} to {steps[-1]:.3g} "
        f"over {counted(run.iterations, 'iteration')}.",
        f"The student’s learning rate, {kind}; dashed: the initial value.",
    )


def _ratio_chart(history: Mapping[str, NDArray[Any]]) -> Picture:
    ratio = 100 * history["meta.ratio"]
    return Picture(
        title="Meta-feature ratio",
        source=_drawn_with_mean(history["meta.iteration"] + 1, ratio, "meta-feature ratio in %"),
        alt=f"Meta-feature ratio over iterations, {ratio[0]:.1f} % at first and {ratio[-1]:.1f} % at last.",
        caption="Pixels that are a feature of all MetaDD networks, as a share of the features of any network.",
    )


def _soft_label_chart(artifact: Artifact, *, finished: bool) -> Picture:
    labels = artifact.labels.numpy()
    probabilities = artifact.soft_labels.double().softmax(dim=1).numpy()
    present = sorted(set(labels.tolist()))
    mean: Floats = np.stack([probabilities[labels == label].mean(axis=0) for label in present])
    own = float(np.mean([mean[row, label] for row, label in enumerate(present)]))
    few = len(artifact.class_names) <= CLASSES_SHOWN

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # Colours follow the square root of the probability, so that small shares of other classes are visible.
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
                text.set_parse_math(False)  # a $ in a class name starts no formula
        bar = figure.colorbar(shown, ax=axes, ticks=[0, 1, 5, 20, 50, 100], pad=0.02, aspect=28)
        bar.ax.set_yticklabels(["0", "1", "5", "20", "50", "100 %"])
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)

    return Picture(
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


def _running_mean(values: Floats) -> tuple[Floats, int]:
    """Mean of the finite values in the window that ends at each value, nan if it has none; and the window's length.

    The window is a 40th of all values long, at least one value.
    """
    window = max(1, len(values) // 40)
    known = np.isfinite(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums = sums - np.append(np.zeros(window), sums[:-window])[: len(sums)]
    counts = counts - np.append(np.zeros(window, int), counts[:-window])[: len(counts)]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), window
