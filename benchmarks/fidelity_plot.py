"""The crossover as a figure that can be read in print, in grey too: a marker and a dash for each line."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from facts import in_folder
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

matplotlib.use("Agg")
LINES: dict[str, dict[str, Any]] = {
    "early": {"color": "#0b6e4f", "marker": "v", "linestyle": (0, (5, 2))},
    "middle": {"color": "#b07d00", "marker": "s", "linestyle": (0, (3, 1, 1, 1))},
    "late": {"color": "#b3261e", "marker": "^", "linestyle": (0, (1, 1))},
    "datm": {"color": "#1b3a6b", "marker": "o", "linestyle": "-", "linewidth": 2},
    "random-soft": {"color": "#777777", "marker": "x", "linestyle": (0, (4, 3)), "linewidth": 1},
    "random-hard": {"color": "#777777", "marker": "+", "linestyle": (0, (1, 3)), "linewidth": 1},
}
CONTROLS = {"random-soft": "random real, soft labels", "random-hard": "random real, hard labels"}


def draw(found: Mapping[str, Any], place: Path) -> None:
    """Draw accuracy against IPC, a line for each range, with both controls and all real data.

    The first panel has every IPC. The second leaves the smallest one out.
    """
    rows = found["crossover"]
    every = list(dict.fromkeys(row["ipc"] for row in rows))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        whole, near = figure.subplots(1, 2)
        _panel(whole, rows, every)
        _panel(near, rows, every[1:] or every)
        whole.set_title("all sizes", fontsize=9)
        near.set_title(f"{(every[1:] or every)[0]} images per class and more", fontsize=9)
        handles, labels = whole.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        figure.savefig(in_folder(place), dpi=220, metadata={"Software": None})


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> None:
    shown = [row for row in rows if row["ipc"] in sizes]
    for number, name in enumerate(dict.fromkeys(row["range"] for row in shown)):
        mine = [row for row in shown if row["range"] == name]
        start = mine[0]["start_epochs"]
        label = "DATM’s own range" if name == "datm" else f"{name}, start epochs {start[0]}–{start[1]}"
        _line(axes, mine, "distilled", label, LINES[name], shift=1 + 0.02 * (number - 1.5))
    own = [row for row in shown if row["range"] == "datm"]
    for row, label in CONTROLS.items():
        _line(axes, own, row, label, LINES[row], shift=1.0)
    real = [100 * value for networks in own[0]["accuracy"]["full"] for value in networks]
    middle, deviation = statistics.fmean(real), statistics.stdev(real) if len(real) > 1 else 0.0
    axes.axhspan(middle - deviation, middle + deviation, color="#dddddd", zorder=0, linewidth=0)
    axes.axhline(middle, color="#333333", linewidth=1, label="all real data ± deviation")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("images per class")
    axes.set_ylabel("test accuracy in %")
    axes.grid(axis="y", color="#eeeeee", zorder=0)


def _line(
    axes: Axes, rows: Sequence[Mapping[str, Any]], row: str, label: str, style: Mapping[str, Any], shift: float
) -> None:
    """Means with standard deviations over all networks; moved aside a little, so that bars do not hide each other."""
    values = [[100 * each for networks in of["accuracy"][row] for each in networks] for of in rows]
    means = [statistics.fmean(each) for each in values]
    bars = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
    x = [shift * of["ipc"] for of in rows]
    axes.errorbar(x, means, bars, label=label, capsize=2, elinewidth=0.8, markersize=4.5, **{"linewidth": 1.3, **style})
