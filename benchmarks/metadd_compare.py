"""Finished runs of bench_metadd.py against the one without MetaDD: accuracies, meta-feature ratios, tests and tables.

A variant is a list of runs, one for each distillation, that differ in the seed alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import ttest_1samp, ttest_rel, wilcoxon
from tables import COST_HEAD, cost_cells, table

from datm_ray.artifact import load
from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.core.metadd import MetaDD, meta_feature_ratio, scaled_maps
from datm_ray.monitor.spent import Spent, total
from datm_ray.pipeline import Pipeline
from datm_ray.stages.distill.task import SYNTHETIC, read_cost
from datm_ray.stages.evaluate.scores import read_network_scores
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.experts.train import ExpertsCost, read_experts_cost

MAIN = ("without", "var-ai-pos")
"""Variants whose accuracies are shown for every architecture."""
THRESHOLDS = (0.3, 0.5, 0.7)
FEWEST_DISTILLATIONS = 3
"""Smallest number of distillations whose mean differences are tested, inclusive."""

Accuracies = dict[str, list[list[float]]]
"""Architecture -> for each distillation, the accuracies of its networks in %."""


def label(network: NetworkConfig) -> str:
    """Short name of a network, different for all networks of bench_metadd.py."""
    return network.architecture + (f"-{network.norm}-{network.pooling}" if network.norm != "instance" else "")


def accuracies(pipeline: Pipeline, runs: Sequence[RunConfig], column: str) -> Accuracies:
    """Accuracies of one variant; `column` is tuned or learned. Empty for learned if sets have no step size."""
    fingerprint = pipeline.runs.raw(runs[0]).fingerprint
    found: Accuracies = {}
    for config in runs:
        for scores in read_network_scores(pipeline.out, config, fingerprint):
            score = getattr(scores, column)
            if score is not None:
                each = [100 * accuracy for accuracy in score.accuracies]
                found.setdefault(label(scores.network), []).append(each)
    return found


def ratios(pipeline: Pipeline, config: RunConfig, looking: RunConfig) -> list[float]:
    """Meta-feature ratios of a run's set under the networks of another run, at every threshold."""
    dataset, cpu = pipeline.runs.dataset(config.dataset), torch.device("cpu")
    networks = [*looking.each_backbone()[:1], *looking.each_auxiliary()]
    restored = [ExpertNetworks(each, dataset, pipeline.store_uri, cpu).restored(0) for each in networks]
    found = load(f"{(pipeline.out / config.name / SYNTHETIC).uri}")
    scaled = scaled_maps(MetaDD(restored).evidence(found.images, found.labels).maps)
    return [float(meta_feature_ratio(scaled, threshold).mean()) for threshold in THRESHOLDS]


def compared(pipeline: Pipeline, runs: dict[str, list[RunConfig]], auxiliaries: int) -> list[dict[str, Any]]:
    """Rows of the table, with every accuracy; the first variant is the baseline of all others.

    Args:
        auxiliaries: number of auxiliaries of the variant under whose networks all sets' ratios are measured.
    """
    looks = [each for each in runs.values() if each[0].metadd]
    looking = next((each for each in looks if len(each[0].each_auxiliary()) == auxiliaries), looks[0])
    first = next(iter(runs.values()))
    base, backbone = accuracies(pipeline, first, "tuned"), label(first[0].network)
    rows = []
    for name, each in runs.items():
        tuned, learned = (accuracies(pipeline, each, column) for column in ("tuned", "learned"))
        seen = [label(one.network) for one in (each if each[0].metadd else looking)[0].each_auxiliary()]
        groups = {
            "same": [backbone],
            "seen": seen,
            "unseen": [architecture for architecture in tuned if architecture not in (backbone, *seen)],
        }
        measured = [ratios(pipeline, config, looker) for config, looker in zip(each, looking, strict=True)]
        rows.append(
            {
                "variant": name,
                "tuned": tuned,
                "learned": learned,
                "groups": groups,
                "ratio": [statistics.fmean(of_one_threshold) for of_one_threshold in zip(*measured, strict=True)],
                "ratios": measured,
                "tests": {group: paired(tuned, base, names) for group, names in groups.items()},
                "cost": {part: spent.to_json() for part, spent in costs(pipeline, each).items()},
            }
        )
    return rows


def costs(pipeline: Pipeline, runs: Sequence[RunConfig]) -> dict[str, Spent]:
    """Cost of distilling all sets of a variant, and of their scoring networks by architecture."""
    fingerprint = pipeline.runs.raw(runs[0]).fingerprint
    found = {"distillation": total(read_cost(pipeline.out / config.name) for config in runs)}
    for config in runs:
        for scores in read_network_scores(pipeline.out, config, fingerprint):
            name = label(scores.network)
            found[name] = found.get(name, Spent()) + scores.tuned.spent
    return found


def experts_costs(pipeline: Pipeline, runs: dict[str, list[RunConfig]]) -> dict[str, tuple[int, dict[str, float]]]:
    """Number and total cost of the experts and auxiliaries that all variants share, by architecture."""
    by: dict[tuple[int, str], ExpertsCost] = {}
    for config in (config for each in runs.values() for config in each):
        for cost in read_experts_cost(pipeline.out / config.name):
            known = by.setdefault((config.seed, cost.architecture), cost)
            if cost.known > known.known:
                by[config.seed, cost.architecture] = cost
    found = {}
    for name in dict.fromkeys(architecture for _, architecture in by):
        each = [cost for (_, architecture), cost in by.items() if architecture == name]
        found[name] = sum(cost.known for cost in each), total(cost.spent for cost in each).to_json()
    return found


def flat(values: Accuracies, names: Sequence[str]) -> list[float]:
    """Values of these architectures, one after another."""
    return [accuracy for name in names for distillation in values[name] for accuracy in distillation]


def paired(values: Accuracies, base: Accuracies, names: Sequence[str]) -> dict[str, Any]:
    """Mean difference over these architectures, and tests of it.

    Pairs are of the same architecture, distillation and network. Networks of one distillation share its set, so the
    mean differences of the distillations, which share nothing, are tested by themselves.
    """
    ours, theirs = flat(values, names), flat(base, names)
    differences = [value - other for value, other in zip(ours, theirs, strict=True)]
    means = [
        statistics.fmean(
            value - other
            for name in names
            for value, other in zip(values[name][number], base[name][number], strict=True)
        )
        for number in range(len(values[names[0]]))
    ]
    found: dict[str, Any] = {
        "difference": statistics.fmean(differences),
        "pairs": len(differences),
        "of_distillations": means,
    }
    if any(differences) and len(differences) > 1:
        found["p_t"] = float(ttest_rel(ours, theirs).pvalue)
        found["p_wilcoxon"] = float(wilcoxon(differences).pvalue)
    if len(means) >= FEWEST_DISTILLATIONS and len(set(means)) > 1:
        found["p_distillations"] = float(ttest_1samp(means, 0.0).pvalue)
    return found


def variant_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Table with a line for each variant."""
    lines = []
    for row in rows:
        cells = [row["variant"]]
        for names in row["groups"].values():
            tuned, *learned = (statistics.fmean(flat(row[column], names)) for column in columns(row))
            cells.append(f"{tuned:.1f}" + "".join(f" ({each:.1f})" for each in learned))
        cells += [difference(row["tests"][group]) for group in row["groups"]]
        lines.append([*cells, " / ".join(f"{ratio:.3f}" for ratio in row["ratio"])])
    same = "same, tuned (learned)" if "learned" in columns(rows[0]) else "same, tuned"
    return table(["variant", same, "seen", "unseen", "difference: same", "seen", "unseen", "ratio"], lines)


def columns(row: dict[str, Any]) -> list[str]:
    """Kinds of step sizes, tuned and learned, that a row has accuracies of."""
    return [column for column in ("tuned", "learned") if row[column]]


def spent_table(rows: Sequence[dict[str, Any]], experts: dict[str, tuple[int, dict[str, float]]]) -> list[str]:
    """Table of every row's cost; experts and auxiliaries, which variants share, appear once."""
    lines = [cost_cells(f"experts, {name}", number, cost) for name, (number, cost) in experts.items()]
    for row in rows:
        sets = len(next(iter(row["tuned"].values())))
        for part, cost in row["cost"].items():
            number = sets if part == "distillation" else sum(map(len, row["tuned"][part]))
            lines.append(cost_cells(f"{row['variant']}: {part}", number, cost))
    return table(COST_HEAD, lines)


def difference(test: dict[str, Any]) -> str:
    """Format a difference with its tests."""
    if "p_t" not in test:
        return f"{test['difference']:+.1f}" if test["difference"] else ""
    distillations = f"; over distillations {test['p_distillations']:.2g}" if "p_distillations" in test else ""
    tests = f"p {test['p_t']:.2g}, {test['p_wilcoxon']:.2g}{distillations}"
    return f"{test['difference']:+.1f} ({tests}; {test['pairs']})"


def by_architecture(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy of the first and the full variant on every architecture, with the tuned and the learned step size."""
    chosen = [(row, column) for row in rows if row["variant"] in MAIN for column in columns(row)]
    lines = []
    for name in chosen[0][0]["tuned"]:
        each = [flat(row[column], [name]) for row, column in chosen]
        lines.append([name, *(f"{statistics.fmean(values):.1f} ± {deviation(values)}" for values in each)])
    return table(["architecture", *(f"{row['variant']}, {column}" for row, column in chosen)], lines)


def deviation(values: Sequence[float]) -> str:
    """Sample standard deviation."""
    return f"{statistics.stdev(values):.1f}" if len(values) > 1 else "?"
