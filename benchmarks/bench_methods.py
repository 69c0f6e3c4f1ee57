"""Every way to make a set, under the labels of one teacher, on a part of real CIFAR-10: 10 images per class, on CPUs.

python benchmarks/bench_methods.py [--distillations 1] [--seeds 3] [--kept 0.1 0.025] [--quick]    (make bench-methods)

Sets are made by SRe2L and its variants, DATM, DM, selections of real images and a random draw. The same ConvNet is
trained on each set with hard labels, with one soft label for each image, and with stored labels for every epoch. One
teacher makes the stored labels of all rows. `--kept` gives shares of the epochs whose labels are kept: a second table
then has the accuracy with only these labels. Step sizes are chosen on validation images. The folder of runs is kept;
running the command again resumes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_cifar import BASE, SCALES
from cifar_part import DESCRIPTION, SOURCE, dataset_override
from facts import going, head, parsed, present
from program import facts_of, in_turns, options, run, settled, start
from tables import table

from datm_ray.artifact import load
from datm_ray.config import NetworkConfig, RunConfig, override
from datm_ray.pipeline import Pipeline, summaries
from datm_ray.recipes import get_recipe
from datm_ray.report.results import RunSummary, cost_lines
from datm_ray.stages.distill.task import SYNTHETIC
from datm_ray.stages.evaluate.rows import fixed_rows
from datm_ray.stages.evaluate.scores import read_score

SCORED = NetworkConfig(architecture="convnet", width=32, depth=3)
"""Network that is trained on every set."""
EPOCHS = 200
"""Epochs of a network on a set."""
CONVNET = "network={architecture: convnet, width: 32, depth: 3}"
RESNET = "{architecture: resnet18, width: 16, norm: batch, depth: 3}"
TRAINING = (
    "{count: 1, epochs: 30, batch_size: 128, learning_rate: 0.1, momentum: 0.9, weight_decay: 5e-4, "
    "schedule: cosine, warmup_epochs: 2, augmentation: crop+flip, keep_epochs: 30}"
)
TEACHER = [f"network={RESNET}", f"experts={TRAINING}"]
SRE2L = [*TEACHER, "method=sre2l", "distill.iterations=500", "distill.initial=noise"]
SELECT = [*TEACHER, "method=select"]
METHODS: Mapping[str, Sequence[str]] = {
    "SRe2L": SRE2L,
    "SRe2L, falling crops (CDA)": [*SRE2L, "recover.crops=falling", "recover.least_share=0.08", "recover.flip=true"],
    "SRe2L from real images": [*SRE2L, "distill.initial=random"],
    "SRe2L from real crops, two rounds (FADRM)": [*SRE2L, "distill.initial=crops", "recover.rounds=2"],
    "real crops of lowest loss (RDED)": [*SELECT, "select.by=rded"],
    "moderate coreset": [*SELECT, "select.by=moderate"],
    "EL2N coreset": [*SELECT, "select.by=el2n"],
    "forgetting coreset": [*SELECT, "select.by=forgetting"],
    "DM": [CONVNET, "method=dm", "distill.iterations=2000", "distill.real_batch=64"],
    "DATM": [*BASE, *SCALES[10].overrides("datm")],
}
WHOLE = {"moderate coreset", "EL2N coreset", "forgetting coreset"}
"""Rows whose images are whole real ones, with 8 bits a channel."""
SCORING = [
    "evaluate.labels=stored",
    "evaluate.cutmix=1",
    "evaluate.fixed_labels=true",
    f"evaluate.teacher={{network: {RESNET}, experts: {TRAINING}}}",
    "evaluate.networks=[{architecture: convnet, width: 32, depth: 3}]",
]
"""Settings of the labels of every row: for each seed, those of one teacher, trained as the networks of SRe2L are."""
RECOVER = [
    *("recover.learning_rate=0.25", "recover.statistics=0.01"),
    *("recover.least_share=1.0", "recover.flip=false"),
]
"""Views published for CIFAR-100: images are shifted, and neither cropped nor mirrored."""
QUICK = ["distill.iterations=4", "distill.validate_every=0", "distill.student_steps=2"]
EVERY = "every epoch"
LABELS = {"hard": "distilled-hard", "one soft label": "distilled-fixed", EVERY: "distilled"}
"""Column of the table -> row of a run's table that it shows."""
OF_RANDOM = {"hard": "random-hard", "one soft label": "random-fixed", EVERY: "random-soft"}
"""Column -> row of a run's table for random images."""
RANDOM = "random images"
OF_EXPERTS = "random images, DATM's experts label"
PIXEL = 4
"""Bytes of one value of a learned image, which is a 32-bit float. A value of a real image has one byte."""
TITLES = [
    *("set", *(f"{label}, %" for label in LABELS)),
    *("bytes of images", *(f"bytes of labels, {label}" for label in LABELS)),
]
PARTS = {"networks": ("experts", "teacher", "auxiliaries"), "set": ("distillation",), "labels": ("labels",)}
"""Part of the CPU hours -> titles of the cost lines that it sums, up to their first comma."""
HEADER = """{description}
Far from the published sizes: a ResNet-18 of an eighth of the published width, trained for 30 epochs, is the teacher of
SRe2L, of the selections and, for all rows, of the labels for every epoch. EL2N and forgetting have this one network,
where their papers have ten. Views in recover are shifted, as published for CIFAR-100; those of CDA are crops down to
8 % of the area, and mirrored. 500 iterations of SRe2L, 2,000 of DM with 64 real images of each class, 300 of DATM.
DATM's images are not whitened (published: ZCA), since its rows share the teacher. {count} of each row, {networks} for
each set: ConvNet-3 of width 32, {epochs} epochs. Each network's step size is chosen on validation images in every
cell; those that DATM and DM have themselves are among the candidates of the first two columns.

- hard: the images' classes, with DSA. one soft label: the set's own, which stays the same, with DSA: the teacher's
  logits of SRe2L's and chosen images, learned by DATM. –: DM's labels are hard. every epoch: the teacher's stored
  logits for resized and mirrored views with CutMix, at temperature 20; random images have labels by the same rule.
- {spread}
- bytes: of 100 images as they are scored, 32-bit floats, or 8 bits a channel where they are whole real images; and of
  the labels: a class, 10 logits of 32 bits, or the label store's files for {epochs} epochs.
- CPU hours of a set: of all networks that are trained before it is scored, the teacher among them; of making it; of
  its labels for every epoch.
"""
PRUNED = """
## Fewer stored epochs

Labels of the first epochs alone, which a training repeats in turn, for the set and for random images. In brackets the
mean difference to all {epochs} epochs over pairs of the same {pairs}, and its standard error.
"""


@dataclass
class Row:
    """What was measured of one row of the tables."""

    images: int
    """Bytes of the images."""
    accuracies: dict[str, list[list[float]]] = field(default_factory=dict)
    """Column -> for each set, the test accuracies of its networks, from 0 to 1."""
    labels: dict[str, int] = field(default_factory=dict)
    """Column -> bytes of the labels."""
    hours: dict[str, float] = field(default_factory=dict)
    """Part of `PARTS` -> CPU hours, a mean over sets; empty for random images."""


class Scored(Pipeline):
    """Pipeline that scores the rows of the tables, on the network SCORED."""

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """Rows of the set, and rows of random images that no other run scores.

        Random images are the same for all methods. Their one soft label is the teacher's, or that of DATM's experts.
        With pruned labels, only the rows that use stored labels are scored.
        """
        network = None if config.network == SCORED else SCORED
        rows = ["distilled", *(row for row in fixed_rows(config) if row.startswith("distilled"))]
        rows += {"datm": ["random-fixed"], "dm": []}.get(config.method, list(OF_RANDOM.values()))
        if config.evaluate.keep_labels is not None:
            rows = [row for row in rows if row in (LABELS[EVERY], OF_RANDOM[EVERY])]
        return [(row, network) for row in rows]


def runs_of(arguments: argparse.Namespace, dataset: str, share: float = 1.0) -> dict[str, list[RunConfig]]:
    """Row of the table -> a run for each distillation.

    Args:
        share: share of the epochs whose labels are kept, above 0; 1 keeps all.
    """
    epochs = epochs_of(arguments)
    kept = [] if share == 1 else [f"evaluate.keep_labels={max(1, round(share * epochs))}"]
    return {
        name: [
            override(
                get_recipe("cifar10-ipc10"),
                [
                    dataset,
                    "distill.learning_rate_images=1.0" if name == "DM" else "distill.ipc=10",
                    *RECOVER,
                    *settings,
                    "dataset.normalisation=standard",
                    *SCORING,
                    f"evaluate.epochs={epochs}",
                    f"evaluate.seeds={arguments.seeds}",
                    *(QUICK if arguments.quick else []),
                    *kept,
                    f"name={plain(name)}-s{seed}",
                    f"seed={seed}",
                ],
            )
            for seed in range(arguments.distillations)
        ]
        for name, settings in METHODS.items()
    }


def epochs_of(arguments: argparse.Namespace) -> int:
    """Epochs of a network on a set."""
    return 2 if arguments.quick else EPOCHS


def plain(name: str) -> str:
    """Name of a run, made from a row's name: lower case, with hyphens for spaces and without brackets and commas."""
    return "-".join(word.strip("(),").lower() for word in name.split())


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Make all sets, score them under all labels; print and save the tables. Returns what was measured."""
    parser = options(__doc__, "runs/methods", seeds=3)
    parser.add_argument("--cifar", type=Path, default=SOURCE, help="folder of the Parquet files")
    parser.add_argument(
        "--kept", type=share_of_epochs, nargs="*", default=[], help="shares of epochs whose labels are kept"
    )
    arguments = settled(parser, parsed(parser, words))
    dataset = dataset_override(arguments.cifar, arguments.runs, arguments.quick)
    found: dict[str, Row] = {}
    with going(arguments.runs):
        for share in (1.0, *arguments.kept):
            groups = runs_of(arguments, dataset, share)
            pipeline = run(in_turns(groups), Scored, arguments.runs, arguments.executor)
            resolved = {config.name: config for config in pipeline.configs}
            for name, configs in groups.items():
                add(found, name, pipeline, [resolved[config.name] for config in configs])
    facts = facts_of(__file__, words, arguments)
    lines = head("Ways to make a set, on a part of CIFAR-10", facts)
    lines += ["Tiny sizes, of no meaning (--quick).", ""] if arguments.quick else []
    lines += page(found, arguments)
    measured = {name: asdict(row) for name, row in found.items()}
    present(arguments.out, f"methods{'-quick' if arguments.quick else ''}", lines, {**facts, **measured})
    return measured


def share_of_epochs(text: str) -> float:
    """Parse a share above 0 and below 1."""
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return share


def add(found: dict[str, Row], name: str, pipeline: Pipeline, configs: Sequence[RunConfig]) -> None:
    """Add what was measured of a row's runs, and of the random images that they alone score.

    Args:
        found: row of the tables -> what is known of it; changed.
        configs: a run for each distillation, all with as many kept epochs.
    """
    about = summaries(pipeline.out, configs)
    stored, made = about[0].stored, load((about[0].folder / SYNTHETIC).uri)
    assert stored is not None  # all sets are made
    assert stored.labels is not None  # and labelled
    sizes = {"hard": made.labels.nbytes, "one soft label": made.soft_labels.nbytes, EVERY: stored.labels}
    row = found.setdefault(name, Row(stored.images // (PIXEL if name in WHOLE else 1)))
    row.hours = row.hours or hours(about)
    shown = [(name, LABELS)]
    if name == next(iter(METHODS)):
        shown.append((RANDOM, OF_RANDOM))
    if name == "DATM":
        shown.append((OF_EXPERTS, {"one soft label": OF_RANDOM["one soft label"]}))
    for title, rows in shown:
        row = found.setdefault(title, Row(stored.images // PIXEL))
        for label, own in rows.items():
            if scores := measured(pipeline, configs, own):
                column = column_of(label, configs[0])
                row.accuracies[column], row.labels[column] = scores, sizes[label]


def column_of(label: str, config: RunConfig) -> str:
    """Column of a kind of labels: its name, or the number of kept epochs if labels are pruned."""
    keep = config.evaluate.keep_labels
    return label if label != EVERY or keep is None else f"{keep} of {config.evaluate.epochs} epochs"


def measured(pipeline: Pipeline, configs: Sequence[RunConfig], row: str) -> list[list[float]]:
    """Test accuracies of a row's networks, a list for each run; empty if the row is not scored."""
    network = None if configs[0].network == SCORED else SCORED
    fingerprint = pipeline.runs.raw(configs[0]).fingerprint
    scores = [read_score(pipeline.out, config, fingerprint, row, network) for config in configs]
    return [list(score.accuracies) for score in scores if score]


def hours(about: Sequence[RunSummary]) -> dict[str, float]:
    """CPU hours of each part of `PARTS`, a mean over runs."""
    lines = [(line.title.partition(",")[0], line.spent.cpu_seconds) for each in about for line in cost_lines(each)]
    return {
        part: sum(seconds for title, seconds in lines if title in titles) / 3600 / len(about)
        for part, titles in PARTS.items()
    }


def page(found: Mapping[str, Row], arguments: argparse.Namespace) -> list[str]:
    """Header and tables."""
    ordered = {name: found[name] for name in (RANDOM, OF_EXPERTS, *METHODS)}
    several = arguments.distillations > 1
    count = f"{arguments.distillations} sets" if several else "One set"
    spread = (
        "±: standard deviation over sets, each the mean of its networks."
        if several
        else "±: standard deviation over networks. One set of each row: a point or two between rows say nothing."
    )
    epochs, seeds = epochs_of(arguments), arguments.seeds
    networks = "one network" if seeds == 1 else f"{seeds} networks"
    text = HEADER.format(description=DESCRIPTION, count=count, networks=networks, epochs=epochs, spread=spread)
    lines = [text, *table([*TITLES, *(f"CPU hours, {part}" for part in PARTS)], list(rows_of(ordered)))]
    pruned = [column for column in ordered[RANDOM].accuracies if column not in LABELS]
    if pruned:
        lines.append(PRUNED.format(epochs=epochs, pairs="seed" if several else "network's number"))
        titles = ["set", "all epochs, %", *(f"{column}, %" for column in pruned)]
        titles += [f"bytes of labels, {column}" for column in ("all", *pruned)]
        lines += table(titles, pruned_rows(ordered, pruned))
    return lines


def rows_of(found: Mapping[str, Row]) -> Iterator[list[str]]:
    """Cells of each row of the first table."""
    for name, row in found.items():
        cells = [cell(row.accuracies.get(label, [])) for label in LABELS]
        sizes = [f"{row.labels[label]:,}" if label in row.labels else "–" for label in LABELS]
        spent = [f"{row.hours[part]:.3f}" if row.hours else "–" for part in PARTS]
        yield [name, *cells, f"{row.images:,}", *sizes, *spent]


def pruned_rows(found: Mapping[str, Row], columns: Sequence[str]) -> list[list[str]]:
    """Cells of each row of the table with fewer stored epochs, for rows that have them."""
    rows = []
    for name, row in found.items():
        if EVERY in row.accuracies:
            base = row.accuracies[EVERY]
            cells = [f"{cell(row.accuracies[each])} ({difference(row.accuracies[each], base)})" for each in columns]
            rows.append([name, cell(base), *cells, *(f"{row.labels[each]:,}" for each in (EVERY, *columns))])
    return rows


def values(sets: Sequence[Sequence[float]]) -> list[float]:
    """Values in percent that a cell averages: the mean of each set, or each network of a single set."""
    return [100 * statistics.fmean(each) for each in sets] if len(sets) > 1 else [100 * each for each in sets[0]]


def cell(sets: Sequence[Sequence[float]]) -> str:
    """Mean and standard deviation in percent; the mean alone of one value, and a dash without sets."""
    return _spread(values(sets)) if sets else "–"


def difference(sets: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> str:
    """Mean and standard error of the differences in pairs, in percentage points."""
    pairs = [one - two for one, two in zip(values(sets), values(base), strict=True)]
    return _spread(pairs, 1 / math.sqrt(len(pairs)), "+")


def _spread(found: Sequence[float], scale: float = 1.0, sign: str = "") -> str:
    """Mean, and standard deviation times `scale` if there is more than one value."""
    mean = format(statistics.fmean(found), f"{sign}.1f")
    return f"{mean} ± {scale * statistics.stdev(found):.1f}" if len(found) > 1 else mean


if __name__ == "__main__":
    start(main)
