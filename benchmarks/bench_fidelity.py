"""Does it do what the papers say? DATM's figure 1 and an ablation, on scikit-learn's real digits.

python benchmarks/bench_fidelity.py [--part crossover|ablation] [--distillations 1] [--quick]         (make fidelity)

Crossover: images per class (IPC) against start ranges early, middle, late and DATM's own, which are those of the
packaged recipes; within an IPC nothing else differs. Which range wins where, and at which share of the data is the set
lossless: not below all real data by more than one standard error. Both controls stand beside every row. Ablation: at
one IPC, one thing at a time. Experts are shared. How sets do on other architectures is measured by bench_metadd.py.

Nothing is chosen on test images: the set that is kept and the controls' step sizes are chosen on validation images, and
of the tables nothing is fed back. The folder of runs is kept, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from facts import common_facts, counted, head, result_path, save
from fidelity_tables import ablation_table, cost_table, crossover_table, measured, range_table, without_set
from fidelity_variants import FULL, QUICK, TESLA, Sizes, TeslaPipeline, ablation_runs, crossover_runs, estimate

from datm_ray.config import RunConfig
from datm_ray.pipeline import DatasetTask, Pipeline
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.evaluate import ROWS, result_location
from datm_ray.runtime.executor import Executor
from datm_ray.runtime.provenance import provenance
from datm_ray.runtime.telemetry import Reporter

HEADER = """Real 8x8 digits, {images:,} training images; ConvNet of depth 2 and width 32.
Accuracy on test images in %, mean ± standard deviation over all networks. {independent}"""
ONE = """Networks of one distillation share its
set: the deviation is not that over distillations, and the standard error of a difference takes them for independent."""
SEVERAL = "Standard errors are over\ndistillations, by the means of their networks."


class Scoring(Pipeline):
    """A pipeline that trains no controls for the ablation, whose sets are compared with one another."""

    def _evaluate_tasks(self) -> list[DatasetTask]:
        shown = {
            result_location(self.out, config, self._raw[config.dataset].fingerprint, row, number).uri
            for config in self.configs
            for row in (["distilled"] if config.name.startswith("ablation") else ROWS)
            for number in range(config.evaluate.seeds)
        }
        # By their places: a control that runs share is a task of any of them.
        return [each for each in super()._evaluate_tasks() if each[1].arguments[3] in shown]


class TeslaScoring(Scoring, TeslaPipeline):
    """The same with TESLA's approximation."""


def run(configs: Sequence[RunConfig], kind: type[Pipeline], folder: str, executor: str) -> Pipeline:
    """All stages of some runs that is not done yet."""
    pipeline = kind(configs, folder, alone=executor == "serial")
    start: Callable[[], Executor] = lambda: create_executor(executor, configs[0].cluster, None)  # noqa: E731
    pipeline.run_all(start, Reporter())
    return pipeline


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; written nowhere unless --out is given")
    parser.add_argument("--part", choices=["crossover", "ablation", "all"], default="all")
    parser.add_argument("--distillations", type=int, default=1, help="of each row, with seeds of their own")
    parser.add_argument("--seeds", type=int, default=5, help="networks for each set")
    parser.add_argument("--executor", choices=["ray", "serial"], default="ray")
    parser.add_argument("--runs", help="folder of the runs; runs/fidelity, or runs/fidelity-quick")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results unless --quick")
    parser.add_argument("--estimate", action="store_true", help="say how long it will take, and do nothing")
    return parser.parse_args(words)


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


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Distil, score, compare; print the tables, write them down and draw; what was measured."""
    arguments = parsed(words)
    sizes = QUICK if arguments.quick else FULL
    crossover, ablation = wanted(arguments, sizes)
    cores = provenance(torch.device("cpu"))["cores"]
    seconds = estimate(crossover, ablation)
    sets = sum(map(len, (*crossover.values(), *ablation.values())))
    if not arguments.quick:
        print(
            f"{sets} sets; about {seconds / 60:.0f} minutes of one core, so {seconds / 60 / min(2, cores):.0f} of two"
        )
    if arguments.estimate:
        return {"estimate": seconds}
    folder = arguments.runs or ("runs/fidelity-quick" if arguments.quick else "runs/fidelity")
    exact = [config for runs in (*crossover.values(), *without_set(ablation, TESLA).values()) for config in runs]
    pipeline = run(exact, Scoring, folder, arguments.executor)
    if TESLA in ablation:
        run(ablation[TESLA], TeslaScoring, folder, arguments.executor)
    found = measured(pipeline.out, crossover, ablation, sizes.ablation_ipc)
    facts = {
        **common_facts(__file__, sys.argv[1:] if words is None else words),
        **counted(arguments.distillations, arguments.seeds),
    }
    lines = page(facts, found, arguments)
    print("\n".join(lines))
    out = arguments.out or (None if arguments.quick else Path(__file__).parent / "results")
    if out:
        write(out, facts, found, lines, arguments.part)
    return found


def page(facts: dict[str, str], found: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """The results as Markdown."""
    several = arguments.distillations > 1
    lines = head("Digits: difficulty, and what each part of DATM is worth", facts)
    if arguments.quick:
        lines += ["Tiny sizes, of no meaning (--quick).", ""]
    lines += [
        HEADER.format(images=found["training_images"], independent=SEVERAL if several else ONE),
        "",
    ]
    if len(found["crossover"]) > 1:
        lines += ["## Start range and images per class", "", *crossover_table(found), "", *range_table(found), ""]
    if found["ablation"]:
        lines += ["## One thing at a time", "", *ablation_table(found), ""]
    return [*lines, "## Cost", "", *cost_table(found)]


def write(out: Path, facts: dict[str, str], found: dict[str, Any], lines: Sequence[str], part: str) -> None:
    """The three files of a result; a part alone has a name of its own."""
    path = result_path(out, "fidelity-digits" if part == "all" else f"fidelity-digits-{part}")
    out.mkdir(parents=True, exist_ok=True)
    shown = list(lines)
    if len(found["crossover"]) > 1:
        from fidelity_plot import draw

        draw(found, path.with_suffix(".png"))
        shown[2:2] = [f"![Accuracy against images per class, a line for each range]({path.name}.png)", ""]
    save(path, shown, {**facts, **found})


if __name__ == "__main__":
    main()
