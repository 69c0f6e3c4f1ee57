"""DATM and MTT on a part of real CIFAR-10, on CPUs: the published recipes, scaled down as the results say.

python benchmarks/bench_cifar.py [--distillations 1] [--ipc 1 10 50] [--quick]         (make bench-cifar)

At every IPC: DATM (its range of start epochs, first images that an expert has right, learned soft labels), DATM from
any first images, MTT (no range, any first images, hard labels), the two controls and all real data. Sizes follow rules
that the results page states, and no result decided them. The kept set and the controls' step sizes are chosen on
validation images. The folder of runs is kept; running the command again resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_fidelity import ERRORS, MEASURED
from cifar_part import DESCRIPTION, SOURCE, dataset_override
from facts import going, head, parsed, present
from fidelity_tables import cost_table, crossover_table, measured, progress_table
from program import facts_of, in_turns, options, resolved, run, settled, start

from datm_ray.config import RunConfig, override
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe

EPOCHS = 30
"""Epochs of an expert; the last start epoch is one less."""
REAL_EPOCHS = 30
"""Epochs of a network on all real data."""


@dataclass(frozen=True)
class Scale:
    """Values that replace the published ones at one IPC."""

    bounds: tuple[int, int]
    """Exclusive upper bounds of the start epoch: at iteration 0, and once the range has grown."""
    batch: int
    iterations: int

    def overrides(self, method: str) -> list[str]:
        """Overrides of a recipe: these values, with the range of start epochs of a method."""
        bound, final = (EPOCHS, EPOCHS) if method == "mtt" else self.bounds
        grows = f"{{bound: {bound}, final_bound: {final}, expand_iterations: {self.iterations // 10}}}"
        starts = grows if bound < final else [0, bound]
        return [
            f"distill.start_epochs={starts}",
            f"distill.batch_size={self.batch}",
            f"distill.iterations={self.iterations}",
            f"distill.validate_every={self.iterations // 4}",
            "distill.checkpoint_every=20",
        ]


SCALES = {1: Scale((5, 5), 10, 500), 10: Scale((14, 28), 50, 300), 50: Scale((28, 30), 100, 300)}
METHODS: Mapping[str, Sequence[str]] = {
    "datm": [],
    "datm, any first images": ["distill.initial=random"],
    "mtt": ["distill.labels=hard", "distill.initial=random"],
}
"""Method -> its overrides of the recipe, besides the range of start epochs."""
BASE = [
    "network={width: 32, depth: 3}",
    f"experts={{count: 8, epochs: {EPOCHS}, batch_size: 128, learning_rate: 0.02, keep_epochs: {EPOCHS}}}",
    "distill.student_steps=15",
    "distill.expert_epochs=1",
    "distill.initial_step_size=0.02",
    "distill.learning_rate_step_size=1e-5",
    "distill.threshold=2.0",
    "distill.validation_seeds=1",
    "evaluate.protocol=short",
    f"evaluate.real_epochs={REAL_EPOCHS}",
]
QUICK = [
    "network={width: 4, depth: 3}",
    f"experts={{count: 2, epochs: {EPOCHS}, batch_size: 128, learning_rate: 0.02, augmentation: '', "
    f"keep_epochs: {EPOCHS}}}",
    "distill.iterations=4",
    "distill.validate_every=2",
    "distill.student_steps=2",
    "distill.learning_rate_step_size=0",
    "distill.threshold=10",
    "evaluate.protocol=quick",
    "evaluate.real_epochs=1",
    "cluster.compile=false",
]
HEADER = """{description}
Far from the published sizes, and below them in accuracy; what the rows say of one another is what there is to see.

- Scaled: ConvNet of depth 3 and width 32 (128), 8 SGD experts (100 with GSAM) of {epochs} epochs (100), batch 128
  (256), rate 0.02 (0.01); 15 student steps (80) for 1 epoch (2) of 71 steps (196), so that a student's step stands
  for about as many of the expert's as published; batches of 10 / 50 / 100 synthetic images (10 / 100 / 500) and
  500 / 300 / 300 iterations (10,000) at IPC 1 / 10 / 50; a student's first step size 0.02, its rate 1e-5; a threshold
  of 2 (1.1 / 1 / 1), for of so short a step the first losses are near 1. Rates of images and labels as published.
- DATM's range: the epochs at which experts have taken as much training, steps times rate, as at the published ones:
  0–4; 0–13, growing to 0–27; 0–27, growing to 0–29, which are all, within the first tenth of the iterations (published:
  0–3; 0–9, to 0–19; 0–19, to 0–39, of 100). So IPC 50 tests labels and first images, and no range. MTT: all start
  epochs; hard labels; any first images, where DATM takes those that an expert has right.
- Networks train 500 epochs on a synthetic set, {real} on all real data.
"""


def runs_of(
    sizes: Sequence[int], distillations: int, seeds: int, dataset: str, quick: bool
) -> dict[tuple[int, str], list[RunConfig]]:
    """(IPC, method) -> a run for each distillation. Within an IPC, methods differ in range, labels and first images."""
    return {
        (ipc, method): [
            override(
                get_recipe(f"cifar10-ipc{ipc}"),
                [
                    dataset,
                    *BASE,
                    *SCALES[ipc].overrides(method),
                    *METHODS[method],
                    *(QUICK if quick else []),
                    f"evaluate.seeds={seeds}",
                    f"name=ipc{ipc}-{method.replace(', ', '-').replace(' ', '-')}-s{seed}",
                    f"seed={seed}",
                ],
            )
            for seed in range(distillations)
        ]
        for ipc in sizes
        for method in METHODS
    }


def asked(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, "runs/cifar", seeds=3)
    parser.add_argument("--ipc", type=int, nargs="+", choices=list(SCALES), default=list(SCALES))
    parser.add_argument("--cifar", type=Path, default=SOURCE, help="folder of the Parquet files")
    return settled(parser, parsed(parser, words))


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Distil, score and compare; print and save the tables. Returns what was measured."""
    arguments = asked(words)
    dataset = dataset_override(arguments.cifar, arguments.runs, arguments.quick)
    runs = runs_of(arguments.ipc, arguments.distillations, arguments.seeds, dataset, arguments.quick)
    with going(arguments.runs):
        pipeline = run(in_turns(runs), Pipeline, arguments.runs, arguments.executor)
    runs = resolved(runs, pipeline)
    found = measured(pipeline.out, runs, {}, arguments.ipc[0], {})
    facts = facts_of(__file__, words, arguments)
    part = "" if arguments.ipc == list(SCALES) else "-ipc" + "-".join(map(str, arguments.ipc))
    name = f"cifar10-part{part}{'-quick' if arguments.quick else ''}"
    present(arguments.out, name, page(facts, found, arguments), {**facts, **found})
    return found


def page(facts: dict[str, str], found: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Write the results as Markdown."""
    lines = head("A part of CIFAR-10: DATM, MTT and controls", facts)
    lines += ["Tiny sizes, of no meaning (--quick); the ones below are of a full run.", ""] if arguments.quick else []
    lines.append(HEADER.format(description=DESCRIPTION, epochs=EPOCHS, real=REAL_EPOCHS))
    lines += [MEASURED.format(errors=ERRORS[arguments.distillations > 1]), ""]
    lines += [*crossover_table(found), "", "## On the way", "", *progress_table(found)]
    return [*lines, "", "## Cost", "", *cost_table(found)]


if __name__ == "__main__":
    start(main)
