"""Finished runs of bench_metadd.py against the one without MetaDD: accuracies, meta-feature ratios, tests and tables.

A variant is a list of runs, one for each distillation, that differ in the seed alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import ttest_1samp, ttest_rel, wilcoxon

from datm_ray.artifact import load
from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.core.metadd import MetaDD, meta_feature_ratio, scaled_maps
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.distill import SYNTHETIC
from datm_ray.runtime.evaluate import read_network_scores
from datm_ray.runtime.expert_networks import ExpertNetworks

MAIN = ("without", "var-ai-pos")
"""Shown architecture by architecture."""
THRESHOLDS = (0.3, 0.5, 0.7)
FEWEST_DISTILLATIONS = 3
"""From which on their mean differences are tested."""

Accuracies = dict[str, list[list[float]]]
"""In %, by architecture, distillation and network."""


def label(network: NetworkConfig) -> str:
    """A short name that tells the networks here apart."""
    return network.architecture + (f"-{network.norm}-{network.pooling}" if network.norm != "instance" else "")


def accuracies(pipeline: Pipeline, runs: Sequence[RunConfig], column: str) -> Accuracies:
    """Of one variant; `column` is tuned or learned."""
    fingerprint = pipeline._raw[runs[0].dataset].fingerprint
    found: Accuracies = {}
    for config in runs:
        for scores in read_network_scores(pipeline.out, config, fingerprint):
            each = [100 * accuracy for accuracy in getattr(scores, column).accuracies]
            found.setdefault(label(scores.network), []).append(each)
    return found


def ratios(pipeline: Pipeline, config: RunConfig, looking: RunConfig) -> list[float]:
    """Of a run's set, under the networks of another run, at every threshold."""
    dataset, cpu = pipeline._dataset(config), torch.device("cpu")
    networks = [*looking.each_backbone()[:1], *looking.each_auxiliary()]
    restored = [ExpertNetworks(each, dataset, pipeline.store_uri, cpu).restored(0) for each in networks]
    found = load(f"{(pipeline.out / config.name / SYNTHETIC).uri}")
    scaled = scaled_maps(MetaDD(restored).evidence(found.images, found.labels).maps)
    return [float(meta_feature_ratio(scaled, threshold).mean()) for threshold in THRESHOLDS]


def compared(pipeline: Pipeline, runs: dict[str, list[RunConfig]], auxiliaries: int) -> list[dict[str, Any]]:
    """What the table says of each variant, with every accuracy; the first is what the others are compared with.

    Args:
        auxiliaries: of the variant under whose networks all sets' ratios are measured.
    """
    looks = [each for each in runs.values() if each[0].metadd]
    looking = next((each for each in looks if len(each[0].each_auxiliary()) == auxiliaries), looks[0])
    first = next(iter(runs.values()))
    base, backbone = accuracies(pipeline, first, "tuned"), first[0].network.architecture
    rows = []
    for name, each in runs.items():
        tuned, learned = (accuracies(pipeline, each, column) for column in ("tuned", "learned"))
        seen = [one.network.architecture for one in (each if each[0].metadd else looking)[0].each_auxiliary()]
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
            }
        )
    return rows


def flat(values: Accuracies, names: Sequence[str]) -> list[float]:
    """Of these architectures, one after another."""
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


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each variant."""
    lines = [
        "| variant | same, tuned (learned) | seen | unseen | difference: same | seen | unseen | ratio |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        cells = []
        for names in row["groups"].values():
            tuned, learned = (statistics.fmean(flat(row[column], names)) for column in ("tuned", "learned"))
            cells.append(f"{tuned:.1f} ({learned:.1f})")
        cells += [told(row["tests"][group]) for group in row["groups"]]
        cells.append(" / ".join(f"{ratio:.3f}" for ratio in row["ratio"]))
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return lines


def told(test: dict[str, Any]) -> str:
    """A difference with its tests."""
    if "p_t" not in test:
        return f"{test['difference']:+.1f}" if test["difference"] else ""
    distillations = f"; over distillations {test['p_distillations']:.2g}" if "p_distillations" in test else ""
    tests = f"p {test['p_t']:.2g}, {test['p_wilcoxon']:.2g}{distillations}"
    return f"{test['difference']:+.1f} ({tests}; {test['pairs']})"


def by_architecture(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Tuned accuracy of the first and the full variant on every architecture."""
    chosen = [row for row in rows if row["variant"] in MAIN]
    lines = [f"| architecture | {' | '.join(row['variant'] for row in chosen)} |", "| --- " * (1 + len(chosen)) + "|"]
    for name in chosen[0]["tuned"]:
        each = [flat(row["tuned"], [name]) for row in chosen]
        cells = [f"{statistics.fmean(values):.1f} ± {spread(values)}" for values in each]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Sample standard deviation."""
    return f"{statistics.stdev(values):.1f}" if len(values) > 1 else "?"
