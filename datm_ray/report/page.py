"""HTML page of the report: text and tables for each run, in one file."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from datm_ray.config import to_yaml
from datm_ray.core.training.loop import OPTIMISERS
from datm_ray.report.differences import differences
from datm_ray.report.gallery import galleries, left_out
from datm_ray.report.results import (
    SKIPPED,
    Cell,
    CostLine,
    Line,
    RunSummary,
    Table,
    accuracies,
    column_name,
    cost_lines,
    fair_scores,
    find_score,
    network_accuracies,
    share_of_full,
    shown_rows,
)
from datm_ray.stages.distill.task import FOUND
from datm_ray.stages.evaluate.rows import FAIR_ROWS
from datm_ray.store.files.filesystem import Location
from datm_ray.words import counted, data_size, duration, listed, percent


def write_report(out: Location, runs: Sequence[RunSummary]) -> Location:
    """Write the page about these runs, finished ones first, as report.html in the output folder `out`.

    Returns the page's location.

    Raises:
        CorruptFileError: a file of a run is damaged. A missing file is no error: the page states that it is missing.
        StoreError: the page cannot be written.
    """
    place = out / "report.html"
    page = render(sorted(runs, key=lambda run: run.unfinished))
    place.write_atomic(page.encode(errors="backslashreplace"))  # a class's name may not be valid UTF-8
    return place


def template(name: str) -> jinja2.Template:
    """Jinja template in `datm_ray/report`, by its file's name. Values are escaped in HTML templates only."""
    text = importlib.resources.files("datm_ray.report").joinpath(name).read_text(encoding="utf-8")
    is_page = name.endswith(".html.j2")
    environment = jinja2.Environment(
        autoescape=is_page, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)


def render(runs: Sequence[RunSummary]) -> str:
    datasets = list(dict.fromkeys(run.dataset_name for run in runs))
    return template("page.html.j2").render(
        title=f"Distilling {listed(datasets)}" if runs else "Dataset distillation",
        matching=any(run.follows_experts for run in runs),
        done=[what_was_done(run) for run in runs],
        columns=[column_name(run) for run in runs],
        accuracies=accuracies(runs),
        skipped="" if "full" in shown_rows(runs) else SKIPPED,
        differences=differences([run.config for run in runs]),
        evaluated=any(run.scores for run in runs),
        runs=[_run_view(run) for run in runs],
    )


def _run_view(run: RunSummary) -> dict[str, Any]:
    # Imported here because matplotlib takes most of a second, and most commands draw no charts.
    from datm_ray.report.charts import charts_of
    from datm_ray.report.maps import map_pictures

    return {
        "name": run.config.name,
        "figures": _key_figures(run),
        "state": _state(run),
        "galleries": galleries(run),
        "left_out": left_out(run),
        "maps": map_pictures(run),
        "networks": network_accuracies(run) if run.networks else None,
        "fair": fair_scores([run]) if run.fair else None,
        "fair_rows": [(FAIR_ROWS[each.row], str(each), each.n) for each in run.fair_rows],
        "optimiser": OPTIMISERS[run.config.evaluate.optimiser].title,
        "charts": charts_of(run),
        "recipe": _recipe(run),
        "provenance": provenance_lines(run.latest.provenance) if run.latest else [],
        "costs": costs_of(cost_lines(run)),
    }


def costs_of(lines: Sequence[CostLine]) -> Table | None:
    """Table of a run's costs, one row for each of `lines`; `None` if there are none."""
    cells = [_cost_cells(line) for line in lines]
    rows = [Line(line.title, [*map(Cell, each.values())]) for line, each in zip(lines, cells, strict=True)]
    return Table(["part", *cells[0]], rows) if cells else None


def _cost_cells(line: CostLine) -> dict[str, str]:
    """Heading of the table of costs -> text of this line's cell."""
    spent = line.spent
    return {
        "n": f"{line.count:,}",
        "worker time": duration(spent.seconds),
        "CPU and GPU time": line.device_time or "–",
        "peak memory": data_size(spent.peak_memory_bytes) if spent.peak_memory_bytes else "–",
        "read": data_size(spent.read_bytes),
    }


def what_was_done(run: RunSummary) -> str:
    """Description of one run in one sentence, with a second one if validation chose an earlier iteration's set."""
    config, real = run.config, run.training_images
    verb = "were" if run.synthetic else "are being" if run.initial else "are to be"
    origin = f"{counted(real, 'real image')} of {run.dataset_name}" if real else f"The images of {run.dataset_name}"
    experts = f"{counted(config.experts.count, 'expert')} trained for {counted(config.experts.epochs, 'epoch')} each"
    taught = f"from {experts}, " if run.follows_experts else ""
    done = f"distilled to {_size(run)}, {taught}in {counted(run.total, 'iteration')}"
    if config.method == "given":
        return f"{_size(run)}, made elsewhere, stand for {origin[:1].lower()}{origin[1:]}."
    if not run.total:
        done = f"reduced to {_size(run)}, {taught}by choice, without iterations"
    return f"{origin} {verb} {done}.{_kept(run)}"


def _kept(run: RunSummary) -> str:
    """Sentence on the iteration whose set is kept, if it is not the last one; else ""."""
    if run.synthetic is None or run.history is None or "validation.chosen_at" not in run.history:
        return ""
    chosen = int(run.history["validation.chosen_at"])
    if chosen in (0, run.total):
        return ""
    return f" The set of iteration {chosen:,} is kept, which validation images chose."


def _size(run: RunSummary) -> str:
    """Number of synthetic images as text, also as a percentage of the real images if their number is known."""
    if run.latest is None:
        return f"{counted(run.config.distill.ipc, 'image')} per class"
    synthetic, real = len(run.latest.images), run.training_images
    return counted(synthetic, "synthetic image") + (f" ({percent(synthetic / real)})" if real else "")


def _key_figures(run: RunSummary) -> list[tuple[str, str]]:
    """Pairs (value, meaning) of figures, such as the test accuracy, that the page shows below a run's name."""
    figures = []
    real, scores = run.training_images, run.scores
    if run.synthetic is not None:
        synthetic = len(run.synthetic.images)
        share = f", {percent(synthetic / real)} of {real:,} real ones" if real else ""
        figures.append((f"{synthetic:,}", ("synthetic image" if synthetic == 1 else "synthetic images") + share))
    if (distilled := find_score(scores, "distilled")) is not None:
        figures.append((f"{distilled} %", f"test accuracy, {counted(distilled.n, 'network')}"))
    if (of_full := share_of_full(scores)) is not None:
        figures.append((of_full, "of the accuracy with all real data"))
    if run.synthetic is not None:
        kind = "learned step size" if run.learns_step_size else "step size, not learned"
        figures.append((f"{run.synthetic.step_size:.3g}", kind))
    return figures


def _state(run: RunSummary) -> str:
    """Progress of the run, in sentences."""
    total = run.total
    if run.synthetic is not None and not total:
        sentences = ["The images are chosen; the method has no iterations."]
    elif run.synthetic is not None:
        sentences = [f"Distillation is finished: {counted(run.iterations or total, 'iteration')}."]
    elif run.history is not None:
        sentences = [
            f"Distillation is not finished: {run.iterations:,} of {counted(total, 'iteration')} are in the last "
            "checkpoint, and there is no synthetic set yet."
        ]
    elif run.initial is not None:
        sentences = ["Distillation has started: its initial images are there, but no checkpoint yet."]
    else:
        sentences = ["Distillation has not started: there are no images yet."]
    if above := run.skipped - run.diverged:
        sentences.append(
            f"{counted(above, 'iteration')} changed nothing, because the matching loss exceeded the threshold of "
            f"{run.config.distill.skip_above:g}."
        )
    if run.diverged:
        sentences.append(
            f"{counted(run.diverged, 'iteration')} changed nothing, because a value was not finite or a step size "
            "would not have stayed positive."
        )
    if run.shortened:
        sentences.append(
            f"{counted(run.shortened, 'gradient')} {'was' if run.shortened == 1 else 'were'} shortened: the "
            f"first-order decrease exceeded {run.config.distill.gradient_limit:g} times the loss."
        )
    rows = shown_rows([run])
    missing = [title for row, title in rows.items() if find_score(run.scores, row) is None]
    if len(missing) == len(rows):
        sentences.append("Nothing is evaluated yet.")
    elif missing:
        sentences.append(f"Not evaluated yet: {'; '.join(missing)}.")
    if run.synthetic is not None and run.history is None and total:
        sentences.append("The checkpoint is missing, and with it the course of the distillation.")
    return " ".join(sentences)


def _recipe(run: RunSummary) -> str:
    """Recipe as YAML. Comments give the values of `distill` that are null in it and were found by the run."""
    text = to_yaml(run.config).strip()
    for key, value in (run.latest.provenance.get(FOUND, {}) if run.latest else {}).items():
        text = text.replace(f"  {key}: null\n", f"  {key}: null  # found: {_in_words(value)}\n")
    return text


def provenance_lines(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs (name, value) of a set's provenance in words.

    Values that the run found for settings that are null in the recipe are left out.
    """
    return [
        (key.replace("student_steps", "computed").replace("_", " "), _in_words(value))
        for key, value in provenance.items()
        if key != FOUND
    ]


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return " · ".join(f"{str(name).replace('_', ' ')} {part}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "; ".join(map(_in_words, value)) if isinstance(value, list) else str(value)
