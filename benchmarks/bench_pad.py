"""What PAD's three parts change in a set, each alone and all together, against DATM without them.

python benchmarks/bench_pad.py [--data digits] [--distillations 4] [--seeds 3] [--quick]         (make bench-pad)

Every variant is distilled with the same seeds; a seed decides experts, draws, first images and networks. Differences
are paired over distillations. Nothing is tuned for PAD: recipes, learning rates and iterations are those of DATM. The
folder of runs is kept; running the command again resumes. CIFAR-10 is a part of the real one, from Parquet files.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_cifar import BASE, SCALES
from cifar_part import DESCRIPTION, SOURCE, dataset_override
from facts import going, head, parsed, present
from program import facts_of, in_turns, options, resolved, run, settled, start
from scipy.stats import ttest_1samp
from tables import table

from datm_ray.config import NetworkConfig, RunConfig, override
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe
from datm_ray.stages.distill.task import read_cost
from datm_ray.stages.evaluate.scores import read_score

CURRICULUM = {
    "digits": "experts.curriculum={whole_from: 8, removals: []}",
    "cifar10": "experts.curriculum={whole_from: 6, removals: []}",
}
"""Experts see the easiest 75 % of each class at first, and all images after a fifth of the training, as published. The
published removals of easy images are left out, because they come in epochs that are never matched."""
SHALLOW, AVERAGE = "distill.unmatched_share=0.25", "distill.average_decay=0.98"
WITHOUT = "without"
HEADER = """{description}
{count} of each variant, {seeds} networks for each set, at the learned step size, on test images.

- accuracy: mean ± standard deviation over distillations, each the mean of its networks.
- difference: to the sets without PAD, mean ± standard error over pairs of distillations of the same seed; p of a paired
  t test. Of {tests} tests, one in twenty is below 0.05 by chance.
- CPU s: of distilling a set, with its validations. Experts in an order of their own are trained again.
"""


def variants(data: str) -> dict[str, list[str]]:
    """Variant -> its changes to the recipe."""
    return {
        WITHOUT: [],
        "25 % of the parameters unmatched": [SHALLOW],
        "50 % of the parameters unmatched": ["distill.unmatched_share=0.5"],
        "images averaged, 0.98": [AVERAGE],
        "images averaged, 0.95": ["distill.average_decay=0.95"],
        "experts from easy to hard": [CURRICULUM[data]],
        "all three": [SHALLOW, AVERAGE, CURRICULUM[data]],
    }


class Scored(Pipeline):
    """Pipeline that scores the distilled sets alone, without controls."""

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """The distilled set on its own network."""
        return [("distilled", None)]


def runs_of(arguments: argparse.Namespace, dataset: str) -> dict[str, list[RunConfig]]:
    """Variant -> a run for each distillation."""
    scaled = [dataset, *BASE, *SCALES[1].overrides("datm")] if arguments.data == "cifar10" else []
    quick = ["distill.iterations=4", "experts.count=2", "evaluate.protocol=quick"] if arguments.quick else []
    chosen = {
        name: changes for name, changes in variants(arguments.data).items() if is_wanted(arguments.variants, name)
    }
    return {
        name: [
            override(
                get_recipe(f"{arguments.data}-ipc1"),
                [
                    *scaled,
                    f"evaluate.seeds={arguments.seeds}",
                    *quick,
                    *arguments.set,
                    *changes,
                    f"name={plain(name)}-s{seed}",
                    f"seed={seed}",
                ],
            )
            for seed in range(arguments.distillations)
        ]
        for name, changes in chosen.items()
    }


def is_wanted(numbers: Sequence[int] | None, name: str) -> bool:
    """True if a variant is to be measured; the one without PAD always is."""
    return numbers is None or list(variants("digits")).index(name) in {0, *numbers}


def plain(name: str) -> str:
    """Name of a run, made from a variant's name: with hyphens for spaces, "percent" for %, and without commas."""
    return "-".join(name.replace(",", "").replace("%", "percent").split())


def compared(pipeline: Pipeline, runs: Mapping[str, Sequence[RunConfig]]) -> dict[str, dict[str, Any]]:
    """Variant -> accuracies of its distillations in %, and their differences to the sets without PAD."""
    found: dict[str, dict[str, Any]] = {}
    for name, configs in runs.items():
        scores = [
            read_score(pipeline.out, config, pipeline.runs.raw(config).fingerprint, "distilled") for config in configs
        ]
        means = [100 * statistics.fmean(score.accuracies) if score else math.nan for score in scores]
        spent = [read_cost(pipeline.out / config.name).cpu_seconds for config in configs]
        found[name] = {"accuracies": means, "cpu_seconds": spent}
        pairs = zip(means, found[WITHOUT]["accuracies"], strict=True)
        found[name]["differences"] = [mine - other for mine, other in pairs]
    return found


def row(name: str, each: Mapping[str, Any]) -> list[str]:
    """Row of a variant in the table."""
    accuracies, differences, many = each["accuracies"], each["differences"], len(each["accuracies"]) > 1
    deviation = statistics.stdev(accuracies) if many else math.nan
    cells = [name, f"{statistics.fmean(accuracies):.1f} ± {deviation:.1f}", "", ""]
    if name != WITHOUT:
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if many else math.nan
        chance = float(ttest_1samp(differences, 0).pvalue) if many and any(differences) else math.nan
        cells[2:] = [f"{statistics.fmean(differences):+.1f} ± {error:.1f}", f"{chance:.2g}"]
    return [*cells, f"{statistics.fmean(each['cpu_seconds']):.0f}"]


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Distil and score all variants; print and save the table. Returns what was measured."""
    parser = options(__doc__, "runs/pad", seeds=3)
    parser.add_argument("--data", choices=list(CURRICULUM), default="digits")
    parser.add_argument("--cifar", type=Path, default=SOURCE, help="folder of the Parquet files")
    parser.add_argument("--variants", type=int, nargs="*", help="numbers of the rows to measure, from 1")
    parser.add_argument("--set", action="append", default=[], help="changes to all runs, as datm-ray takes them")
    arguments = parsed(parser, words)
    if arguments.data != "digits":
        arguments.default_runs = Path(f"runs/pad-{arguments.data}")
    arguments = settled(parser, arguments)
    is_cifar = arguments.data == "cifar10"
    dataset = dataset_override(arguments.cifar, arguments.runs, arguments.quick) if is_cifar else ""
    runs = runs_of(arguments, dataset)
    with going(arguments.runs):
        pipeline = run(in_turns(runs), Scored, arguments.runs, arguments.executor)
    found = compared(pipeline, resolved(runs, pipeline))
    facts = facts_of(__file__, words, arguments)
    lines = head(f"PAD's parts, {arguments.data}, 1 image per class", facts)
    lines += ["Tiny sizes, of no meaning (--quick).", ""] if arguments.quick else []
    lines.append(
        HEADER.format(
            description=DESCRIPTION if is_cifar else "Real 8x8 digits, ConvNet of depth 2 and width 32.",
            count=f"{arguments.distillations} distillation(s)",
            seeds=arguments.seeds,
            tests=len(found) - 1,
        )
    )
    titles = ["variant", "accuracy, %", "difference", "p", "CPU s"]
    lines += table(titles, [row(name, each) for name, each in found.items()])
    present(arguments.out, f"pad-{arguments.data}", lines, {**facts, **found})
    return found


if __name__ == "__main__":
    start(main)
