"""Does the package do what the papers say? DATM's figure 1 and an ablation, on scikit-learn's real digits.

python benchmarks/bench_fidelity.py [--part crossover|ablation|limit] [--distillations 1] [--quick]   (make fidelity)

Crossover: images per class (IPC) against start ranges early, middle, late and DATM's own, which are those of the
packaged recipes; within an IPC nothing else differs. Questions: which range is best at which IPC, and how many images
make a set lossless, that is at most one standard error below all real data. Both controls stand beside every row.
Ablation: one change at a time, at one IPC. Limit: some runs of the crossover without a limit on gradients. All runs
share their experts. bench_metadd.py measures sets on other architectures.

This program chooses nothing on test images: the kept set and the controls' step sizes are chosen on validation images.
Two earlier choices knew some test images: the ranges come from a prototype scored on its test split, and earlier tables
showed that all real data needs 150 epochs. The folder of runs is kept; running the command again resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from facts import going, head, parsed, result_path, save
from fidelity_tables import ablation_table, cost_table, crossover_table, measured, range_table, unlimited_table
from fidelity_variants import (
    FULL,
    QUICK,
    TESLA,
    UNLIMITED,
    AnyPipeline,
    Rows,
    Sizes,
    TeslaPipeline,
    ablation_runs,
    crossover_runs,
    estimate,
    unlimited_runs,
)
from program import facts_of, options, run, settled, start

from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.monitor.provenance import provenance

HEADER = "Real 8x8 digits, {images:,} training images, {tests:,} test images; ConvNet of depth 2 and width 32."
MEASURED = """Accuracy on test images in %, mean ± standard deviation over all networks. Random images are drawn anew
for each network; networks of one distillation share its set. {errors}"""
ERRORS = {
    False: """With one distillation of a row, standard errors are over networks,
and leave out by how much distillations differ.""",
    True: "Standard errors are over distillations, by the means of their networks.",
}
"""True if a row has several distillations -> sentence on its standard errors."""


class Scoring(AnyPipeline):
    """A pipeline that trains no controls for runs that are compared with those of the crossover."""

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """Score every row of the crossover's runs, and only the distilled set of all other runs."""
        if config.name.startswith(("ablation", UNLIMITED)):
            return [("distilled", None)]
        return super().scored_rows(config)


class TeslaScoring(Scoring, TeslaPipeline):
    """Like `Scoring`, with TESLA's approximation of the gradient."""


def asked(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, "runs/fidelity", seeds=5)
    parser.add_argument("--part", choices=["crossover", "ablation", "limit", "all"], default="all")
    parser.add_argument("--estimate", action="store_true", help="say how long it will take, and do nothing")
    arguments = parsed(parser, words)
    return arguments if arguments.estimate else settled(parser, arguments)


@dataclass(frozen=True)
class Wanted:
    """Runs of every part. Runs of the ablation and of the limit are compared with some of the crossover's."""

    crossover: Rows
    ablation: dict[str, list[RunConfig]]
    unlimited: Rows

    def rows(self) -> list[list[RunConfig]]:
        """All rows of the tables, over all parts."""
        return [*self.crossover.values(), *self.ablation.values(), *self.unlimited.values()]


def wanted(part: str, sizes: Sizes, distillations: int, seeds: int) -> Wanted:
    """Runs that one part needs, or all parts."""
    crossover = crossover_runs(sizes, distillations, seeds)
    ablation = ablation_runs(sizes, distillations, seeds) if part in ("ablation", "all") else {}
    unlimited = unlimited_runs(sizes, distillations, seeds) if part in ("limit", "all") else {}
    if part in ("ablation", "limit"):
        compared = unlimited or [(sizes.ablation_ipc, "datm")]
        crossover = {row: runs for row, runs in crossover.items() if row in compared}
    return Wanted(crossover, ablation, unlimited)


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Distil, score and compare; print, save and draw the tables. Returns what was measured."""
    arguments = asked(words)
    sizes = QUICK if arguments.quick else FULL
    runs = wanted(arguments.part, sizes, arguments.distillations, arguments.seeds)
    # Rows take turns, one distillation each, so that an interrupted benchmark still compares rows.
    ordered = [config for seed in zip(*runs.rows(), strict=True) for config in seed]
    cores = provenance(torch.device("cpu"))["cores"]
    seconds = estimate(ordered)
    minutes = f"about {seconds / 60:.0f} minutes of one core, so {seconds / 60 / min(2, cores):.0f} of two"
    print(f"{len(ordered)} sets; {'sizes of --quick are not estimated' if arguments.quick else minutes}")
    if arguments.estimate:
        return {"estimate": seconds}
    tesla = runs.ablation.get(TESLA, [])
    with going(arguments.runs):
        exact = [config for config in ordered if config not in tesla]
        pipeline = run(exact, Scoring, arguments.runs, arguments.executor)
        if tesla:
            run(tesla, TeslaScoring, arguments.runs, arguments.executor)
    found = measured(pipeline.out, runs.crossover, runs.ablation, sizes.ablation_ipc, runs.unlimited)
    facts = facts_of(__file__, words, arguments)
    lines = page(facts, found, arguments)
    print("\n".join(lines))
    if arguments.out:
        write(arguments, facts, found, lines)
    return found


def page(facts: dict[str, str], found: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Write the results as Markdown."""
    lines = head("Digits: difficulty, and what each part of DATM is worth", facts)
    if arguments.quick:
        lines += ["Tiny sizes, of no meaning (--quick).", ""]
    lines += [
        HEADER.format(images=found["training_images"], tests=found["test_images"]),
        MEASURED.format(errors=ERRORS[arguments.distillations > 1]),
        "",
    ]
    if arguments.part in ("crossover", "all"):
        lines += ["## Start range and images per class", "", *crossover_table(found), "", *range_table(found), ""]
    if found["ablation"]:
        lines += ["## One thing at a time", "", *ablation_table(found), ""]
    if found["unlimited"]:
        lines += ["## Gradients that explode", "", *unlimited_table(found), ""]
    return [*lines, "## Cost", "", *cost_table(found)]


def write(arguments: argparse.Namespace, facts: dict[str, str], found: dict[str, Any], lines: Sequence[str]) -> None:
    """Write the files of a result. Results of a single part, and of tiny sizes, have file names of their own."""
    part = "" if arguments.part == "all" else f"-{arguments.part}"
    several = f"-{arguments.distillations}-distillations" if arguments.distillations > 1 else ""
    path = result_path(arguments.out, f"fidelity-digits{part}{several}{'-quick' if arguments.quick else ''}")
    shown = list(lines)
    if arguments.part in ("crossover", "all"):
        from fidelity_plot import draw

        draw(found, path.with_suffix(".png"))
        shown[2:2] = [f"![Accuracy against images per class, a line for each range]({path.name}.png)", ""]
    save(path, shown, {**facts, **found})


if __name__ == "__main__":
    start(main)
