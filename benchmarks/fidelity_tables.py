"""Finished runs of bench_fidelity.py and bench_cifar.py as numbers and tables."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from tables import COST_HEAD, cost_cells, table

from datm_ray.artifact import read_artifact
from datm_ray.config import RunConfig, run_identity
from datm_ray.monitor.spent import total
from datm_ray.stages.distill.checkpoint import read_curves
from datm_ray.stages.distill.task import SYNTHETIC, read_cost
from datm_ray.stages.evaluate.scores import Score, read_scores
from datm_ray.stages.experts.train import read_experts_cost
from datm_ray.store.files.filesystem import Location

Accuracies = Sequence[Sequence[float]]
"""Accuracies in [0, 1]: for each distillation, those of its networks."""
REAL = "full"


def measured(
    out: Location,
    crossover: Mapping[tuple[int, str], Sequence[RunConfig]],
    ablation: Mapping[str, Sequence[RunConfig]],
    ablation_ipc: int,
    unlimited: Mapping[tuple[int, str], Sequence[RunConfig]],
) -> dict[str, Any]:
    """Every accuracy and cost, as plain data."""
    base = next(iter(crossover.values()))
    rows = {"DATM": crossover[ablation_ipc, "datm"], **ablation} if ablation else {}
    digests = {name: [_digest(out, each) for each in runs] for name, runs in rows.items()}
    return {
        "crossover": [{"ipc": ipc, "range": name, **_of(out, runs)} for (ipc, name), runs in crossover.items()],
        "ablation": [
            {
                "variant": name,
                "ipc": ablation_ipc,
                "same_sets_as_base": sum(map(str.__eq__, digests[name], digests["DATM"])),
                **_of(out, runs),
            }
            for name, runs in rows.items()
        ],
        "unlimited": [{"ipc": ipc, "range": name, **_of(out, runs)} for (ipc, name), runs in unlimited.items()],
        "training_images": _note(out, base[0])["training_images"],
        "test_images": _note(out, base[0])["test_images"],
    }


def _note(out: Location, config: RunConfig) -> Any:
    return (out / config.name / "dataset.json").read_json()


def _digest(out: Location, config: RunConfig) -> str:
    """Digest of a set's images and labels; equal digests mean bit-identical sets."""
    found = read_artifact(out / config.name / SYNTHETIC)
    tensors = (found.images, found.soft_labels)
    return sha256(b"".join(each.contiguous().numpy().tobytes() for each in tensors)).hexdigest()


def _of(out: Location, runs: Sequence[RunConfig]) -> dict[str, Any]:
    """Measurements of one row of a table, over all its distillations."""
    scores = [{s.row: s for s in read_scores(out, each, _note(out, each)["fingerprint"])} for each in runs]
    curves = [read_curves(out / each.name) for each in runs]
    distill = runs[0].distill
    return {
        "runs": [each.name for each in runs],
        "seeds": [each.seed for each in runs],
        "start_epochs": [distill.start_epochs.first, distill.start_epochs.last],
        "iterations": distill.iterations,
        "experts": runs[0].experts.count,
        "optimiser": runs[0].experts.optimiser,
        "recipe": run_identity(runs[0]),
        "accuracy": {row: [list(found[row].accuracies) for found in scores] for row in scores[0]},
        "validation": [float(max(curve["validation.accuracy"])) for curve in curves],
        "validation_curves": [
            [
                list(pair)
                for pair in zip(*(curve[f"validation.{of}"].tolist() for of in ("iteration", "accuracy")), strict=True)
            ]
            for curve in curves
        ],
        "kept_at": [int(curve["validation.chosen_at"]) for curve in curves],
        "skipped": [int(curve["history.skipped"].sum()) for curve in curves],
        "shortened": [
            int((curve["history.decrease"] > (distill.gradient_limit or math.inf)).sum()) for curve in curves
        ],
        "cost": {
            "experts": total(e.spent for each in runs for e in read_experts_cost(out / each.name)).to_json(),
            "distillation": total(read_cost(out / each.name) for each in runs).to_json(),
            **{row: _cost([found[row] for found in scores]) for row in scores[0]},
        },
    }


def _cost(scores: Sequence[Score]) -> dict[str, float]:
    return total(score.spent for score in scores).to_json()


# --- statistics ---------------------------------------------------------------------------------------------------


def mean(values: Accuracies) -> float:
    """Mean over distillations of the means of their networks."""
    return statistics.fmean(map(statistics.fmean, values))


def _units(values: Accuracies) -> Sequence[float]:
    """Independent draws: the mean of each distillation's networks, or the networks of a single distillation."""
    return [statistics.fmean(each) for each in values] if len(values) > 1 else values[0]


def _error_of_mean(units: Sequence[float]) -> float:
    """Standard error of the mean; nan for one draw."""
    return statistics.stdev(units) / math.sqrt(len(units)) if len(units) > 1 else math.nan


def paired_difference(these: Accuracies, those: Accuracies) -> tuple[float, float]:
    """Mean difference and its standard error, over draws paired by seed.

    Draws of one seed share experts, validation images and initial parameters of networks.
    """
    gains = [one - other for one, other in zip(_units(these), _units(those), strict=True)]
    return statistics.fmean(gains), _error_of_mean(gains)


ROUNDING = 1e-9
"""Tolerance of a comparison. Accuracies are fractions of some hundred images, so a difference may equal its bound."""


def is_lossless(distilled: Accuracies, real: Accuracies) -> bool | None:
    """True if sets are at most one standard error of the difference below all real data; `None` if unknown.

    The answer for a single distillation is `None`: networks that share a set do not show by how much sets differ.
    """
    gain, error = paired_difference(distilled, real)
    return None if len(distilled) < 2 else gain >= -error - ROUNDING


def cell(values: Accuracies | None) -> str:
    """Mean ± standard deviation over all networks, in percent; a dash for `None`."""
    if values is None:
        return "–"
    every = [each for networks in values for each in networks]
    return f"{100 * mean(values):.1f}" + (f" ± {100 * statistics.stdev(every):.1f}" if len(every) > 1 else "")


def gain_cell(these: Accuracies, those: Accuracies) -> str:
    """Mean difference over pairs and its standard error, in percentage points."""
    gain, error = paired_difference(these, those)
    return f"{100 * gain:+.2f}" + ("" if math.isnan(error) else f" (se {100 * error:.2f})")


# --- tables -------------------------------------------------------------------------------------------------------


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


VERDICTS = {True: "lossless", False: "no", None: "not known"}


def crossover_table(found: Mapping[str, Any]) -> list[str]:
    """Every IPC and range with both controls, all real data, and whether it is lossless."""
    rows = []
    for row in found["crossover"]:
        accuracy = row["accuracy"]
        share = 10 * row["ipc"] / found["training_images"]
        rows.append(
            [
                f"{row['ipc']} ({100 * share:.2g} %)",
                f"{row['range']}, {row['start_epochs'][0]}–{row['start_epochs'][1]}",
                *(cell(accuracy.get(name)) for name in ("random-hard", "random-soft", "distilled", REAL)),
                gain_cell(accuracy["distilled"], accuracy[REAL]),
                VERDICTS[is_lossless(accuracy["distilled"], accuracy[REAL])],
                _listed(row["skipped"]),
                _listed(row["shortened"]),
                f"{_listed(row['kept_at'])} of {row['iterations']}",
            ]
        )
    head = ["IPC (share)", "range, start epochs", "random, hard labels", "random, soft labels", "**distilled**"]
    head += ["all real data", "distilled − all real", "lossless", "skipped", "shortened", "kept"]
    images = f"{100 / found['test_images']:.2f} is one of its {found['test_images']:,} test images"
    note = f"""se: standard error of the difference, in pairs of the same seed. Lossless: not below all real data by
more than one; of one distillation this is not known. All of it is of one split: {images}. skipped:
iterations whose matching loss exceeded the threshold, for each distillation. shortened: gradients
beyond `distill.gradient_limit`. kept: the iteration whose set was kept, by validation images."""
    return [note, "", *table(head, rows), "", lossless_sentence(found)]


def lossless_sentence(found: Mapping[str, Any]) -> str:
    """Sentence on the IPCs at which sets with DATM's own range are lossless."""
    own = [row for row in found["crossover"] if row["range"] == "datm"]
    verdicts = {row["ipc"]: is_lossless(row["accuracy"]["distilled"], row["accuracy"][REAL]) for row in own}
    if None in verdicts.values():
        return "Whether a set is lossless is not known of one distillation."
    enough = [ipc for ipc, verdict in verdicts.items() if verdict]
    if not enough:
        return "With DATM's own range no set is lossless."
    named = ", ".join(f"{ipc} ({1000 * ipc / found['training_images']:.2g} % of the data)" for ipc in enough)
    return f"With DATM's own range the sets are lossless at IPC {named}."


def progress_table(found: Mapping[str, Any]) -> list[str]:
    """Table of each set's validation accuracy by iteration, to judge whether more iterations are worth trying."""
    rows = []
    for row in found["crossover"]:
        by: dict[int, list[float]] = {}
        for iteration, accuracy in itertools.chain(*row["validation_curves"]):
            by.setdefault(iteration, []).append(accuracy)
        curve = ", ".join(f"{100 * statistics.fmean(each):.1f} at {iteration}" for iteration, each in by.items())
        rows.append([str(row["ipc"]), row["range"], curve])
    return table(["IPC", "method", "accuracy on validation images, at iteration"], rows)


def range_table(found: Mapping[str, Any]) -> list[str]:
    """The crossover in one line for each IPC: late against early."""
    by = {(row["ipc"], row["range"]): row["accuracy"]["distilled"] for row in found["crossover"]}
    rows = []
    for ipc in dict.fromkeys(ipc for ipc, _ in by):
        ranges = [name for each, name in by if each == ipc]
        late, early = by[ipc, "late"], by[ipc, "early"]
        gain, error = paired_difference(late, early)
        best = max(ranges, key=lambda name, at=ipc: mean(by[at, name]))  # type: ignore[misc]
        ahead = (
            "not known" if math.isnan(error) else "late" if gain > error else "early" if -gain > error else "neither"
        )
        rows.append([str(ipc), gain_cell(late, early), ahead, best])
    return table(["IPC", "late − early, in pairs", "ahead by more than se", "highest mean of all ranges"], rows)


def ablation_table(found: Mapping[str, Any]) -> list[str]:
    """Every variant against DATM's own run of the same IPC."""
    base = found["ablation"][0]
    rows = []
    for row in found["ablation"]:
        accuracy, sets = row["accuracy"]["distilled"], len(row["runs"])
        gain = gain_cell(accuracy, base["accuracy"]["distilled"])
        same = row["same_sets_as_base"]
        note = f"{gain}; {same} of {sets} set(s) the same bit for bit" if same else gain
        distillation, experts = (row["cost"][part]["cpu_seconds"] / sets for part in ("distillation", "experts"))
        rows.append(
            [
                NAMES.get(row["variant"], row["variant"]),
                f"{row['start_epochs'][0]}–{row['start_epochs'][1]}",
                str(row["experts"]),
                cell(accuracy),
                "" if row is base else note,
                _listed(row["kept_at"]),
                _listed(row["shortened"]),
                f"{100 * statistics.fmean(row['validation']):.1f}",
                f"{distillation:.0f}",
                f"{experts:.0f}",
            ]
        )
    head = ["variant", "start epochs", "experts", "accuracy", "difference to DATM, in pairs", "kept at", "shortened"]
    head += ["validation, best", "distillation, CPU s a set", "experts, CPU s a set"]
    note = f"""IPC {base["ipc"]}, {base["iterations"]} iterations each; one thing differs from the first row, as its
name says (all values are in the JSON file). Which iteration's set is kept is decided on validation images, so that the
sets differ in that too. All differences are to the same base, so that what it has by chance is in all of them; other
experts also give other soft labels to begin with. TESLA takes each step's gradient with its parameters held fixed; it
is computed here by the same functions, so it takes no less time. Fewer experts are the first ones of the others, and
cost their share of those."""
    return [note, "", *table(head, rows)]


def unlimited_table(found: Mapping[str, Any]) -> list[str]:
    """What the limit on gradients is worth: the same runs without it."""
    limited = {(row["ipc"], row["range"]): row for row in found["crossover"]}
    rows = []
    for row in found["unlimited"]:
        other = limited[row["ipc"], row["range"]]
        these, those = other["accuracy"]["distilled"], row["accuracy"]["distilled"]
        rows.append(
            [
                f"{row['ipc']}, {row['range']}",
                _listed(row["skipped"]),
                _listed(other["skipped"]),
                _listed(other["shortened"]),
                cell(those),
                cell(these),
                gain_cell(these, those),
            ]
        )
    head = ["IPC, range", "skipped without", "skipped with", "shortened with", "accuracy without", "accuracy with"]
    note = """The same runs with `distill.gradient_limit=null`. Once a gradient has ruined a set, all iterations are
skipped; what is kept then is the set that validation images had chosen before."""
    return [note, "", *table([*head, "with − without, in pairs"], rows)]


NAMES = {"tesla": "TESLA-style gradient", "DATM": "DATM (base)"}


def cost_table(found: Mapping[str, Any]) -> list[str]:
    """CPU seconds, peak memory and bytes read of every row; experts and controls, which rows share, once."""
    note = """Peak memory is of a worker's process, which does one task after another and keeps some of what it took;
torch and the images are 0.85 GiB of it."""
    rows: list[list[str]] = []
    named = [(f"IPC {row['ipc']}, {row['range']}", row) for row in found["crossover"]]
    named += [(NAMES.get(row["variant"], row["variant"]), row) for row in found["ablation"][1:]]
    named += [(f"IPC {row['ipc']}, {row['range']}, no limit", row) for row in found["unlimited"]]
    groups = {row["optimiser"]: row for _, row in sorted(named, key=lambda each: each[1]["experts"])}
    for optimiser, row in groups.items():  # of each optimiser, the row with most experts, which has the others' too
        count = len(row["seeds"]) * row["experts"]
        rows.append(cost_cells(f"experts, {optimiser}", count, row["cost"]["experts"]))
    controls: set[tuple[str, int | None]] = set()
    for name, row in named:
        rows.append(cost_cells(f"{name}: distillation", len(row["runs"]), row["cost"]["distillation"]))
        for part, accuracies in row["accuracy"].items():
            own = part == "distilled"
            key = part, None if part == REAL else row["ipc"]
            if own or key not in controls:
                title = f"{name}: networks" if own else part if part == REAL else f"{part}, IPC {row['ipc']}"
                rows.append(cost_cells(title, sum(map(len, accuracies)), row["cost"][part]))
            controls |= set() if own else {key}
    return [note, "", *table(COST_HEAD, rows)]
