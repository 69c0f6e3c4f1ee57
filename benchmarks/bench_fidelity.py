"""Does it do what the papers say? DATM's figure 1 and an ablation, on scikit-learn's real digits.

python benchmarks/bench_fidelity.py [--part crossover|ablation] [--distillations 1] [--quick]         (make fidelity)

Crossover: images per class (IPC) against start ranges early, middle, late and DATM's own, which are those of the
packaged recipes; within an IPC nothing else differs. Which range wins where, and at which share of the data is the set
lossless: not below all real data by more than one standard error. Both controls stand beside every row. Ablation: at
one IPC, one thing at a time. Experts are shared. How sets do on other architectures is measured by bench_metadd.py.

Nothing is chosen on test images here: the set that is kept and the controls' step sizes are chosen on validation
images, and of the tables nothing is fed back. (The ranges come from a prototype, which was scored on its test split.)
The folder of runs is kept, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from facts import common_facts, counted, going, head, result_path, save
from fidelity_tables import ablation_table, cost_table, crossover_table, measured, range_table, without_set
from fidelity_variants import FULL, QUICK, TESLA, Sizes, TeslaPipeline, ablation_runs, crossover_runs, estimate
from program import options, run, settled, start

from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.provenance import provenance

HEADER = "Real 8x8 digits, {images:,} training images, {tests:,} test images; ConvNet of depth 2 and width 32."
MEASURED = """Accuracy on test images in %, mean ± standard deviation over all networks. Random images are drawn anew
for each network; networks of one distillation share its set. {errors}"""
ERRORS = {
    False: """With one distillation of a row, standard errors are over networks,
and leave out by how much distillations differ.""",
    True: "Standard errors are over distillations, by the means of their networks.",
}
"""By whether there are several distillations of a row."""


class Scoring(Pipeline):
    """A pipeline that trains no controls for the ablation, whose sets are compared with one another."""

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """Of the ablation the set alone."""
        if config.name.startswith("ablation"):
            return [("distilled", None)]
        return super().scored_rows(config)


class TeslaScoring(Scoring, TeslaPipeline):
    """The same with TESLA's approximation."""


def asked(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options(__doc__, "runs/fidelity", seeds=5)
    parser.add_argument("--part", choices=["crossover", "ablation", "all"], default="all")
    parser.add_argument("--estimate", action="store_true", help="say how long it will take, and do nothing")
    arguments = parser.parse_args(words)
    return arguments if arguments.estimate else settled(parser, arguments)


def wanted(
    arguments: argparse.Namespace, sizes: Sizes
) -> tuple[dict[tuple[int, str], list[RunConfig]], dict[str, list[RunConfig]]]:
    """The runs of the crossover and of the ablation; the latter is compared with one of the former."""
    crossover = crossover_runs(sizes, arguments.distillations, arguments.seeds)
    ablation = ablation_runs(sizes, arguments.distillations, arguments.seeds)
    if arguments.part == "ablation":
        base = sizes.ablation_ipc, "datm"
        crossover = {base: crossover[base]}
    return crossover, {} if arguments.part == "crossover" else ablation


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Distil, score, compare; print the tables, write them down and draw; what was measured."""
    arguments = asked(words)
    sizes = QUICK if arguments.quick else FULL
    crossover, ablation = wanted(arguments, sizes)
    cores = provenance(torch.device("cpu"))["cores"]
    seconds = estimate(crossover, ablation)
    sets = sum(map(len, (*crossover.values(), *ablation.values())))
    minutes = f"about {seconds / 60:.0f} minutes of one core, so {seconds / 60 / min(2, cores):.0f} of two"
    print(f"{sets} sets; {'sizes of --quick are not estimated' if arguments.quick else minutes}")
    if arguments.estimate:
        return {"estimate": seconds}
    rows = [*crossover.values(), *without_set(ablation, TESLA).values()]
    # A distillation of every row before the next one, so that what is there at any time can be compared.
    exact = [config for seed in zip(*rows, strict=True) for config in seed]
    with going(arguments.runs):
        pipeline = run(exact, Scoring, arguments.runs, arguments.executor)
        if TESLA in ablation:
            run(ablation[TESLA], TeslaScoring, arguments.runs, arguments.executor)
    found = measured(pipeline.out, crossover, ablation, sizes.ablation_ipc)
    facts = {
        **common_facts(__file__, sys.argv[1:] if words is None else words, runs=arguments.runs),
        **counted(arguments.distillations, arguments.seeds),
    }
    lines = page(facts, found, arguments)
    print("\n".join(lines))
    if arguments.out:
        write(arguments, facts, found, lines)
    return found


def page(facts: dict[str, str], found: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """The results as Markdown."""
    lines = head("Digits: difficulty, and what each part of DATM is worth", facts)
    if arguments.quick:
        lines += ["Tiny sizes, of no meaning (--quick).", ""]
    lines += [
        HEADER.format(images=found["training_images"], tests=found["test_images"]),
        MEASURED.format(errors=ERRORS[arguments.distillations > 1]),
        "",
    ]
    if len(found["crossover"]) > 1:
        lines += ["## Start range and images per class", "", *crossover_table(found), "", *range_table(found), ""]
    if found["ablation"]:
        lines += ["## One thing at a time", "", *ablation_table(found), ""]
    return [*lines, "## Cost", "", *cost_table(found)]


def write(arguments: argparse.Namespace, facts: dict[str, str], found: dict[str, Any], lines: Sequence[str]) -> None:
    """The three files of a result; a part alone, and tiny sizes, have a name of their own."""
    part = "" if arguments.part == "all" else f"-{arguments.part}"
    several = f"-{arguments.distillations}-distillations" if arguments.distillations > 1 else ""
    path = result_path(arguments.out, f"fidelity-digits{part}{several}{'-quick' if arguments.quick else ''}")
    shown = list(lines)
    if len(found["crossover"]) > 1:
        from fidelity_plot import draw

        draw(found, path.with_suffix(".png"))
        shown[2:2] = [f"![Accuracy against images per class, a line for each range]({path.name}.png)", ""]
    save(path, shown, {**facts, **found})


if __name__ == "__main__":
    start(main)
