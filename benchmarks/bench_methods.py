"""Every way to make a set, under the same labels, on a part of real CIFAR-10: 10 images per class, on CPUs.

python benchmarks/bench_methods.py [--distillations 1] [--seeds 3] [--quick]         (make bench-methods)

Sets are made by SRe2L and its variants, DATM, DM, selections of real images and a random draw. The same ConvNet is
trained on each with hard labels, with one soft label for each image, and with a teacher's labels of every batch. Step
sizes are chosen on validation images. The folder of runs is kept; running the command again resumes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_cifar import BASE, SCALES
from cifar_part import DESCRIPTION, SOURCE, dataset_override
from facts import common_facts, counted, going, head, result_path, save
from program import options, run, settled, start
from tables import table

from datm_ray.artifact import load
from datm_ray.config import NetworkConfig, RunConfig, override
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe
from datm_ray.report.results import RunSummary, cost_lines
from datm_ray.stages.evaluate.scores import read_score

SCORED = NetworkConfig(architecture="convnet", width=32, depth=3)
"""Network that is trained on every set."""
EPOCHS = 200
"""Epochs of a network on a set."""
CONVNET = "network={architecture: convnet, width: 32, depth: 3}"
TEACHER = [
    "network={architecture: resnet18, width: 16, norm: batch, depth: 3}",
    "dataset.normalisation=standard",
    "experts={count: 1, epochs: 30, batch_size: 128, learning_rate: 0.1, momentum: 0.9, weight_decay: 5e-4, "
    "schedule: cosine, warmup_epochs: 2, augmentation: crop+flip, keep_epochs: 30}",
]
SRE2L = [*TEACHER, "method=sre2l", "distill.iterations=500", "distill.initial=noise"]
SELECT = [*TEACHER, "method=select"]
METHODS: Mapping[str, Sequence[str]] = {
    "SRe2L": SRE2L,
    "SRe2L, falling crops (CDA)": [*SRE2L, "recover.crops=falling"],
    "SRe2L from real images": [*SRE2L, "distill.initial=random"],
    "SRe2L from real images, two rounds (FADRM)": [*SRE2L, "distill.initial=random", "recover.rounds=2"],
    "real crops of lowest loss (RDED)": [*SELECT, "select.by=rded"],
    "moderate coreset": [*SELECT, "select.by=moderate"],
    "EL2N coreset": [*SELECT, "select.by=el2n"],
    "forgetting coreset": [*SELECT, "select.by=forgetting"],
    "DM": [CONVNET, "method=dm", "dataset.normalisation=standard", "distill.iterations=2000", "distill.real_batch=64"],
    "DATM": [*BASE, *SCALES[10].overrides("datm")],
}
RECOVER = ["recover.learning_rate=0.25", "recover.statistics=0.01", "recover.least_share=0.25"]
QUICK = ["distill.iterations=4", "distill.validate_every=0", "evaluate.epochs=2", "distill.student_steps=2"]
LABELS = {"hard": "distilled-hard", "one soft label": "distilled", "a teacher's": "distilled"}
HEADER = """{description}
Far from the published sizes: a ResNet-18 of an eighth of the published width, trained for 30 epochs, is the teacher of
SRe2L, of the selections and of their labels (DATM: its first expert, a ConvNet of width 32). 500 iterations of SRe2L,
2,000 of DM with 64 real images of each class, 300 of DATM. {count} of each row, {seeds} networks for each set:
ConvNet-3 of width 32, {epochs} epochs, step size chosen on validation images.

- hard: the images' classes. one soft label: the teacher's logits (DATM: learned). a teacher's: its logits of every
  augmented batch, at temperature 20, without CutMix. –: the method trains no network that could label.
- bytes: of 100 images with 8 bits a channel, and of labels: one class, 10 numbers of 32 bits, or {epochs} epochs of
  float16 logits with their views, as `evaluate.labels: stored` keeps them.
- CPU hours: of networks that are trained before, and of making the set.
"""


class Scored(Pipeline):
    """Scores the rows of the table on the one network."""

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """The set's rows under the labels of the configuration, and those of random images."""
        network = None if config.network == SCORED else SCORED
        taught = config.evaluate.labels == "teacher"
        rows = ["distilled"] if taught else ["distilled-hard", "distilled", "random-hard"]
        return [(row, network) for row in (*rows, *(["random-soft"] if config.method != "dm" else []))]


def runs_of(arguments: argparse.Namespace, dataset: str, labels: str) -> dict[str, list[RunConfig]]:
    """Row of the table -> a run for each distillation."""
    changes = [dataset, f"evaluate.labels={labels}", f"evaluate.epochs={EPOCHS}", f"evaluate.seeds={arguments.seeds}"]
    return {
        name: [
            override(
                get_recipe("cifar10-ipc10"),
                [
                    *changes,
                    "evaluate.networks=[{architecture: convnet, width: 32, depth: 3}]",
                    "distill.learning_rate_images=1.0" if name == "DM" else "distill.ipc=10",
                    *RECOVER,
                    *settings,
                    *(QUICK if arguments.quick else []),
                    f"name={plain(name)}-s{seed}",
                    f"seed={seed}",
                ],
            )
            for seed in range(arguments.distillations)
        ]
        for name, settings in METHODS.items()
        if labels == "own" or name != "DM"
    }


def plain(name: str) -> str:
    """A row's name as that of a run."""
    return "-".join(word.strip("(),").lower() for word in name.split())


def rows_of(found: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Rows of the table."""
    for name, each in found.items():
        cells = [cell(each[label]) for label in LABELS]
        yield [name, *cells, *(f"{each['bytes'][label]:,}" if each[label] else "–" for label in LABELS), each["hours"]]


def cell(accuracies: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    if not accuracies:
        return "–"
    percent = [100 * value for value in accuracies]
    return f"{statistics.fmean(percent):.1f} ± {statistics.stdev(percent) if percent[1:] else float('nan'):.1f}"


def measured(pipeline: Pipeline, configs: Sequence[RunConfig], labels: str) -> dict[str, list[float]]:
    """Row of the runs' tables -> test accuracies of all their networks."""
    found: dict[str, list[float]] = {}
    for config in configs:
        for row, network in pipeline.scored_rows(config):
            score = read_score(pipeline.out, config, pipeline.runs.raw(config).fingerprint, row, network)
            found.setdefault(row, []).extend(score.accuracies if score else [])
    return found


def hours(pipeline: Pipeline, config: RunConfig) -> str:
    """CPU hours of networks and of distillation."""
    folder = pipeline.out / config.name
    summary = RunSummary(config, folder, [])
    spent = {line.title.partition(",")[0]: line.spent.cpu_seconds / 3600 for line in cost_lines(summary)}
    return f"{spent.get('experts', 0):.2f} + {spent.get('distillation', 0):.2f}"


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Make all sets, score them under all labels; print and save the table. Returns what was measured."""
    parser = options(__doc__, "runs/methods", seeds=3)
    parser.add_argument("--cifar", type=Path, default=SOURCE, help="folder of the Parquet files")
    arguments = settled(parser, parser.parse_args(words))
    dataset = dataset_override(arguments.cifar, arguments.runs, arguments.quick)
    found: dict[str, dict[str, Any]] = {}
    with going(arguments.runs):
        for labels in ("own", "teacher"):
            groups = runs_of(arguments, dataset, labels)
            ordered = [config for seed in zip(*groups.values(), strict=True) for config in seed]
            pipeline = run(ordered, Scored, arguments.runs, arguments.executor)
            resolved = {config.name: config for config in pipeline.configs}
            for name, configs in groups.items():
                own = [resolved[config.name] for config in configs]
                add(found, name, pipeline, own, labels)
    facts = {
        **common_facts(__file__, sys.argv[1:] if words is None else words, runs=arguments.runs),
        **counted(arguments.distillations, arguments.seeds),
    }
    lines = head("Ways to make a set, on a part of CIFAR-10", facts)
    lines += ["Tiny sizes, of no meaning (--quick).", ""] if arguments.quick else []
    count = "One set" if arguments.distillations == 1 else f"{arguments.distillations} sets"
    lines.append(HEADER.format(description=DESCRIPTION, count=count, seeds=arguments.seeds, epochs=EPOCHS))
    titles = ["set", *(f"{label}, %" for label in LABELS), *(f"bytes, {label}" for label in LABELS), "CPU hours"]
    lines += table(titles, list(rows_of(found)))
    print("\n".join(lines))
    if arguments.out:
        save(result_path(arguments.out, f"methods{'-quick' if arguments.quick else ''}"), lines, {**facts, **found})
    return found


def add(
    found: dict[str, dict[str, Any]], name: str, pipeline: Pipeline, configs: Sequence[RunConfig], labels: str
) -> None:
    """Add what was measured of a row's runs under some labels, and of the random images beside them."""
    scores, first = measured(pipeline, configs, labels), configs[0]
    of_random = f"random images, {first.network.architecture} as teacher" if first.method != "dm" else ""
    images = load((pipeline.out / first.name / "synthetic.arrow").uri).images
    classes, size = pipeline.runs.raw(first).classes, images[0].numel()
    label_bytes = {"hard": 1, "one soft label": 4 * classes, "a teacher's": EPOCHS * (32 + 2 * classes)}
    sizes = {label: len(images) * (size + each) for label, each in label_bytes.items()}
    rows = {name: ("distilled-hard", "distilled"), **({of_random: ("random-hard", "random-soft")} if of_random else {})}
    for title, (hard, soft) in rows.items():
        cost = hours(pipeline, first) if title == name else "–"
        each = found.setdefault(title, {**{label: [] for label in LABELS}, "bytes": sizes, "hours": cost})
        if labels == "own":
            each |= {"hard": scores.get(hard, []), "one soft label": scores.get(soft, [])}
        else:
            each |= {"a teacher's": scores.get(soft, [])}


if __name__ == "__main__":
    start(main)
