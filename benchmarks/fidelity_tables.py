"""Finished runs of bench_fidelity.py as numbers and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from datm_ray.config import RunConfig
from datm_ray.runtime.checkpoint import read_curves
from datm_ray.runtime.distill import read_cost
from datm_ray.runtime.evaluate import Score, read_scores
from datm_ray.runtime.experts import read_experts_cost
from datm_ray.runtime.spent import Spent, total
from datm_ray.store.filesystem import Location
from datm_ray.store.trajectories import size_in_words

Accuracies = Sequence[Sequence[float]]
"""In [0, 1], by distillation and network."""
REAL = "full"


def without_set(runs: Mapping[str, list[RunConfig]], name: str) -> dict[str, list[RunConfig]]:
    """All runs but those of one variant."""
    return {each: configs for each, configs in runs.items() if each != name}


def measured(
    out: Location,
    crossover: Mapping[tuple[int, str], Sequence[RunConfig]],
    ablation: Mapping[str, Sequence[RunConfig]],
    ablation_ipc: int,
) -> dict[str, Any]:
    """Every accuracy and cost, as plain data."""
    base = crossover[ablation_ipc, "datm"]
    rows = {"DATM": base, **ablation} if ablation else {}
    return {
        "crossover": [{"ipc": ipc, "range": name, **_of(out, runs)} for (ipc, name), runs in crossover.items()],
        "ablation": [{"variant": name, "ipc": ablation_ipc, **_of(out, runs)} for name, runs in rows.items()],
        "training_images": _note(out, base[0])["training_images"],
    }


def _note(out: Location, config: RunConfig) -> Any:
    return (out / config.name / "dataset.json").read_json()


def _of(out: Location, runs: Sequence[RunConfig]) -> dict[str, Any]:
    """Of one row of a table: all distillations."""
    scores = [{s.row: s for s in read_scores(out, each, _note(out, each)["fingerprint"])} for each in runs]
    curves = [read_curves(out / each.name) for each in runs]
    distill = runs[0].distill
    return {
        "runs": [each.name for each in runs],
        "seeds": [each.seed for each in runs],
        "start_epochs": [distill.first_start, distill.final_start_bound - 1],
        "iterations": distill.iterations,
        "experts": runs[0].experts.count,
        "accuracy": {row: [list(found[row].accuracies) for found in scores] for row in scores[0]},
        "validation": [float(max(curve["validation.accuracy"])) for curve in curves],
        "kept_at": [int(curve["validation.chosen_at"]) for curve in curves],
        "skipped": [int(curve["history.skipped"].sum()) for curve in curves],
        "cost": {
            "experts": total(e.spent for each in runs for e in read_experts_cost(out / each.name)).to_json(),
            "distillation": total(read_cost(out / each.name) for each in runs).to_json(),
            **{row: _cost([found[row] for found in scores]) for row in scores[0]},
        },
    }


def _cost(scores: Sequence[Score]) -> dict[str, float]:
    return total(score.cost or Spent(seconds=score.seconds) for score in scores).to_json()


# --- statistics ---------------------------------------------------------------------------------------------------


def mean(values: Accuracies) -> float:
    """Over distillations of the means of their networks."""
    return statistics.fmean(map(statistics.fmean, values))


def standard_error(values: Accuracies) -> float:
    """Over distillations by their means; over networks where there is one distillation; nan for one network."""
    units = [statistics.fmean(each) for each in values] if len(values) > 1 else values[0]
    return statistics.stdev(units) / math.sqrt(len(units)) if len(units) > 1 else math.nan


def difference(these: Accuracies, those: Accuracies) -> tuple[float, float]:
    """Mean difference, and its standard error, of what are taken for independent draws."""
    return mean(these) - mean(those), math.hypot(standard_error(these), standard_error(those))


def is_lossless(distilled: Accuracies, real: Accuracies) -> bool:
    """Whether a set is not below all real data by more than one standard error of the difference."""
    gain, error = difference(distilled, real)
    return gain >= -error


def cell(values: Accuracies | None) -> str:
    """Percent: mean ± standard deviation over all networks."""
    if values is None:
        return "–"
    every = [each for networks in values for each in networks]
    return f"{100 * mean(values):.1f}" + (f" ± {100 * statistics.stdev(every):.1f}" if len(every) > 1 else "")


# --- tables -------------------------------------------------------------------------------------------------------


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *rows)]


def crossover_table(found: Mapping[str, Any]) -> list[str]:
    """Every IPC and range with both controls, all real data, and whether it is lossless."""
    rows = []
    for row in found["crossover"]:
        accuracy = row["accuracy"]
        gain, error = difference(accuracy["distilled"], accuracy[REAL])
        share = 10 * row["ipc"] / found["training_images"]
        verdict = "lossless" if is_lossless(accuracy["distilled"], accuracy[REAL]) else "no"
        rows.append(
            [
                f"{row['ipc']} ({100 * share:.2g} %)",
                f"{row['range']}, {row['start_epochs'][0]}–{row['start_epochs'][1]}",
                *(cell(accuracy[name]) for name in ("random-hard", "random-soft", "distilled", REAL)),
                f"{100 * gain:+.1f} (± {100 * error:.1f})",
                verdict,
                ", ".join(map(str, row["skipped"])),
            ]
        )
    head = ["IPC (share)", "range, start epochs", "random, hard labels", "random, soft labels", "**distilled**"]
    head += ["all real data", "distilled − all real (± standard error)", "lossless", "skipped"]
    return [*_lines(head, rows), "", lossless_sentence(found)]


def lossless_sentence(found: Mapping[str, Any]) -> str:
    """From which share of the data on, with DATM's own range."""
    own = [row for row in found["crossover"] if row["range"] == "datm"]
    enough = [r["ipc"] for r in own if is_lossless(r["accuracy"]["distilled"], r["accuracy"][REAL])]
    if not enough:
        return "With DATM's own range no set is lossless."
    named = ", ".join(f"{ipc} ({1000 * ipc / found['training_images']:.2g} % of the data)" for ipc in enough)
    return f"With DATM's own range the sets are lossless at IPC {named}."


def range_table(found: Mapping[str, Any]) -> list[str]:
    """The crossover in one line for each IPC: late against early."""
    by = {(row["ipc"], row["range"]): row["accuracy"]["distilled"] for row in found["crossover"]}
    rows = []
    for ipc in dict.fromkeys(ipc for ipc, _ in by):
        ranges = [name for each, name in by if each == ipc]
        gain, error = difference(by[ipc, "late"], by[ipc, "early"])
        best = max(ranges, key=lambda name, at=ipc: mean(by[at, name]))  # type: ignore[misc]
        winner = "late" if gain > error else "early" if -gain > error else "neither by a standard error"
        rows.append([str(ipc), f"{100 * gain:+.1f} (± {100 * error:.1f})", winner, best])
    return _lines(["IPC", "late − early (± standard error)", "ahead", "highest mean of all ranges"], rows)


def ablation_table(found: Mapping[str, Any]) -> list[str]:
    """Every variant against DATM's own run of the same IPC."""
    base = found["ablation"][0]
    rows = []
    for row in found["ablation"]:
        accuracy = row["accuracy"]["distilled"]
        gain, error = difference(accuracy, base["accuracy"]["distilled"])
        distillation, experts = (row["cost"][part]["cpu_seconds"] for part in ("distillation", "experts"))
        rows.append(
            [
                NAMES.get(row["variant"], row["variant"]),
                f"{row['start_epochs'][0]}–{row['start_epochs'][1]}",
                str(row["experts"]),
                cell(accuracy),
                "" if row is base else f"{100 * gain:+.1f} (± {100 * error:.1f})",
                f"{100 * statistics.fmean(row['validation']):.1f}",
                f"{distillation:.0f}",
                f"{experts:.0f}",
            ]
        )
    head = ["variant", "start epochs", "experts", "accuracy", "difference to DATM (± standard error)"]
    head += ["validation, best", "distillation, CPU s", "experts, CPU s"]
    note = f"""IPC {base["ipc"]}, {base["iterations"]} iterations each, so the same budget of student steps; one thing
differs from the first row, as its name says. TESLA takes each step's gradient with its parameters held fixed; it is
computed here by the same functions, so it takes no less time. Fewer experts are the first ones of the others."""
    return [note, "", *_lines(head, rows)]


NAMES = {"tesla": "TESLA-style gradient", "DATM": "DATM (base)"}


def cost_table(found: Mapping[str, Any]) -> list[str]:
    """CPU seconds, peak memory and bytes read of every row; experts and controls are shared by rows."""
    rows = []
    seen: set[str] = set()
    named = [(f"IPC {row['ipc']}, {row['range']}", row) for row in found["crossover"]]
    named += [(NAMES.get(row["variant"], row["variant"]), row) for row in found["ablation"][1:]]
    for name, row in named:
        for part, cost in row["cost"].items():
            title = f"{name}: {part}" if part in ("distillation", "distilled") else part
            key = json_key(title, cost)
            if key in seen:  # shared with a row above
                continue
            seen.add(key)
            peak, read = size_in_words(cost["peak_memory_bytes"]), size_in_words(cost["read_bytes"])
            seconds = [f"{cost[name]:.1f}" for name in ("seconds", "cpu_seconds", "gpu_seconds")]
            shared = title if title != part else f"{part}, of {name} and those it shares them with"
            rows.append([shared, *seconds, peak, read])
    head = ["part", "worker s", "CPU s", "GPU s", "peak memory", "read"]
    return _lines(head, rows)


def json_key(title: str, cost: Mapping[str, float]) -> str:
    """The same for what is the same files' cost."""
    return f"{title} {sorted(cost.items())}"
