"""What MetaDD does for a set on networks it was not made with, and what it costs.

python benchmarks/bench_metadd.py [--quick] [--data cifar10] [--distillations 5]         (make bench-metadd)

One recipe is distilled with and without MetaDD, with each of its terms, with other auxiliaries and with a control that
takes logits in place of maps; all else is equal, seeds included. Every set is scored on the backbone, on architectures
that took part (seen) and on some that did not (unseen). The folder of runs is kept; running the command again resumes.
Digits are resized to 16x16 pixels; weights were chosen on their validation images, see benchmarks/LOG.md. CIFAR-10 is
a part of the real one, from Parquet files.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_part import DESCRIPTION, SOURCE, dataset_override
from facts import common_facts, counted, going, head, result_path, save
from metadd_compare import by_architecture, compared, experts_costs, spent_table, variant_table
from metadd_cost import TITLE, cost_rows, cost_table
from program import options, resolved, run, settled, start

from datm_ray.config import NetworkConfig, RunConfig, override
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe

SEEN = ["{architecture: resnet18, width: 16}", "{architecture: vgg11, width: 16}"]
MORE_SEEN = ["{architecture: lenet}", "{architecture: alexnet, width: 16}"]
SCORED_ON = [
    NetworkConfig(architecture="resnet18", width=16),
    NetworkConfig(architecture="vgg11", width=16),
    NetworkConfig(architecture="lenet"),
    NetworkConfig(architecture="alexnet", width=16),
    NetworkConfig(architecture="mlp"),
    NetworkConfig(architecture="convnet", width=32, depth=3, norm="none", pooling="max"),
]
"""Beside the backbone."""
VARIANCE, INVARIANCE, POSITION = 1.0, 0.01, 0.1
CIFAR_ITERATIONS = 200


@dataclass(frozen=True)
class Setting:
    """A recipe to distil, and its changes."""

    recipe: str
    description: str
    """What a reader of the results must know."""
    overrides: Sequence[str]
    quick: Sequence[str]
    experts: str
    """Experts section of the auxiliaries."""
    is_cifar: bool = False
    """True takes the part of CIFAR-10, False the digits."""


DIGITS = Setting(
    recipe="digits-ipc1",
    description="Real digits resized to 16x16, ConvNet of depth 2 and width 32 as backbone.",
    overrides=["dataset.resize=16"],
    quick=["distill.iterations=4", "experts.count=2"],
    experts="{count: 1, epochs: 20, batch_size: 64, learning_rate: 0.01, momentum: 0.9, augmentation: '', "
    "keep_epochs: 1}",
)
CIFAR10 = Setting(
    recipe="cifar10-ipc10",
    description=f"{DESCRIPTION} ConvNet of depth 3 and width 32 as backbone, 8 SGD experts of 14 epochs, 10 images "
    f"per class;\n{CIFAR_ITERATIONS} iterations of 15 student steps with batches of 50, against a target one epoch "
    "ahead: far from the\npublished sizes.",
    overrides=[
        "network={width: 32, depth: 3}",
        "experts={count: 8, epochs: 14, batch_size: 128, learning_rate: 0.02}",
        f"distill.iterations={CIFAR_ITERATIONS}",
        "distill.student_steps=15",
        "distill.expert_epochs=1",
        "distill.batch_size=50",
        "distill.start_epochs=[0, 12]",
        "distill.initial_step_size=0.02",
        "distill.threshold=2.0",
        "distill.validate_every=100",
        "distill.checkpoint_every=20",
        "evaluate.protocol=short",
        "evaluate.real_epochs=20",
    ],
    quick=["distill.iterations=4", "distill.ipc=1", "distill.student_steps=2", "experts.count=2"],
    experts="{count: 1, epochs: 20, batch_size: 128, learning_rate: 0.01, momentum: 0.9, keep_epochs: 1}",
    is_cifar=True,
)
SETTINGS = {"digits": DIGITS, "cifar10": CIFAR10}

HEADER = """{description}
{distillations} for each variant; for each set {n} freshly
trained network(s) of each architecture, of the same initial parameters in every variant.

- same: the backbone. seen: {seen}. unseen: {unseen}. Widths are relative to the published 128.
- tuned: step size chosen on validation images among the learned one, 0.01, 0.03 and 0.1; learned: the one learned.
- accuracy: mean over architectures, distillations and networks, test images, in %.
- difference: tuned, to the sets without MetaDD, over pairs of the same architecture, distillation and network; p of a
  paired t test and of Wilcoxon's{over_distillations}; pairs. {shared}
  A table of many variants has many tests; one in twenty is below 0.05 by chance.
- With another number of auxiliaries other architectures are seen: accuracies are then of those, and differences are to
  the sets without MetaDD on the same ones.
- ratio: meta-feature ratio of the images under the backbone and {seen} of the same seed, at threshold
  0.3 / 0.5 / 0.7, mean over distillations. The threshold enters the ratio only: none of the losses has one."""
SPENT = """Networks are trained at the learned step size and at those that are tried on validation images. 0: an earlier
version did the work, and noted no cost."""
ONE, SEVERAL = (
    "One distillation",
    "{count} distillations (seeds 0 to {last}, which decide experts, auxiliaries, draws, initial images and networks)",
)
SHARED = (
    "They share two sets, so p speaks of these sets and not of all that\n  might be distilled.",
    "Networks of one distillation\n  share its set, so the first two p take them for more than they are.",
)


@dataclass(frozen=True)
class Variant:
    """One kind of set."""

    name: str
    auxiliaries: Sequence[str] = ()
    variance: float = 0.0
    invariance: float = 0.0
    position: float = 0.0
    divergence: float = 1.0
    variance_of: str = "maps"

    def overrides(self, experts: str) -> list[str]:
        """Changes to the recipe, as `--set` takes them."""
        if not self.auxiliaries:
            return []
        settings = (
            f"auxiliaries: [{', '.join(self.auxiliaries)}], experts: {experts}, variance: {self.variance}, "
            f"invariance: {self.invariance}, position: {self.position}, divergence: {self.divergence}, "
            f"variance_of: {self.variance_of}"
        )
        return [f"metadd={{{settings}}}"]


def variants() -> list[Variant]:
    """Variants: no MetaDD, all combinations of terms, the divergence's sign, other auxiliaries, the control."""
    terms = {"var": VARIANCE, "ai": INVARIANCE, "pos": POSITION}
    found = [Variant("without")]
    for count in (1, 2, 3):
        for chosen in itertools.combinations(terms, count):
            weights = [terms[name] if name in chosen else 0.0 for name in terms]
            found.append(Variant("+".join(chosen).replace("+", "-"), SEEN, *weights))
    full = (VARIANCE, INVARIANCE, POSITION)
    found += [Variant(f"all-{count}-auxiliaries", [*SEEN, *MORE_SEEN][:count], *full) for count in (1, 3, 4)]
    found.append(Variant("all-pushed-apart", SEEN, *full, divergence=-1.0))
    found.append(Variant("all-no-divergence", SEEN, *full, divergence=0.0))
    found.append(Variant("logit-variance", SEEN, *full, variance_of="logits"))
    return found


def runs_of(
    variant: Variant, setting: Setting, recipe: str, distillations: int, base: Sequence[str]
) -> list[RunConfig]:
    """One run for each distillation of a variant."""
    runs = []
    for seed in range(distillations):
        name = variant.name if distillations == 1 else f"{variant.name}-s{seed}"
        own = [f"name={name}", f"seed={seed}", *variant.overrides(setting.experts)]
        runs.append(_scored(override(get_recipe(recipe), [*setting.overrides, *base, *own])))
    return runs


def _scored(config: RunConfig) -> RunConfig:
    networks = (config.network, *SCORED_ON)
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"networks": networks})})


class Scoring(Pipeline):
    """A pipeline that scores only the rows of these tables and no controls."""

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """Score the distilled set alone, on every architecture."""
        return [("distilled", network) for network in config.scored_networks]


def heading(setting: Setting, groups: dict[str, list[str]], distillations: int, seeds: int) -> str:
    """Facts that a reader of the tables needs."""
    several = distillations > 1
    counted = SEVERAL.format(count=distillations, last=distillations - 1) if several else ONE
    over = ", and of a t test of\n  the distillations' mean differences" if distillations >= 3 else ""
    named = {group: ", ".join(groups[group]) for group in ("seen", "unseen")}
    return HEADER.format(
        description=setting.description,
        distillations=counted,
        n=seeds,
        over_distillations=over,
        shared=SHARED[several],
        **named,
    )


def asked(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, "runs/metadd", seeds=5)
    parser.add_argument("--data", choices=list(SETTINGS), default="digits")
    parser.add_argument("--cifar", type=Path, default=SOURCE, help="folder of the files")
    parser.add_argument("--recipe", help="another one for digits")
    parser.add_argument("--variants", nargs="*", help="only these, and `without`")
    parser.add_argument("--no-cost", action="store_true", help="leave out the table of memory and time")
    arguments = parser.parse_args(words)
    if arguments.recipe and arguments.data != "digits":
        parser.error("--recipe is for digits")
    named = {variant.name for variant in variants()}
    if unknown := set(arguments.variants or ()) - named:
        parser.error(f"--variants knows {', '.join(sorted(named))}, and not {', '.join(sorted(unknown))}")
    if arguments.variants is not None and not set(arguments.variants) - {"without"}:
        parser.error("--variants needs one beside `without`")
    if arguments.data != "digits":
        arguments.default_runs = Path(f"runs/metadd-{arguments.data}")
    return settled(parser, arguments)


def main(words: list[str] | None = None) -> None:
    """Distil, score and compare; print and save the tables."""
    arguments = asked(words)
    setting, quick = SETTINGS[arguments.data], arguments.quick
    recipe = arguments.recipe or setting.recipe
    seeds = 1 if quick else arguments.seeds
    base = [f"evaluate.seeds={seeds}", *(setting.quick if quick else [])]
    if setting.is_cifar:
        base.append(dataset_override(arguments.cifar, arguments.runs, quick))
    chosen = [each for each in variants() if not arguments.variants or each.name in ("without", *arguments.variants)]
    runs = {each.name: runs_of(each, setting, recipe, arguments.distillations, base) for each in chosen}
    costs = [] if arguments.no_cost else cost_rows(quick)
    print("\n".join(cost_table(costs)) if costs else "No cost measured", flush=True)
    # All variants of a seed precede the next seed, so that an interrupted benchmark still compares variants.
    ordered = [config for seed in zip(*runs.values(), strict=True) for config in seed]
    with going(arguments.runs):
        pipeline = run(ordered, Scoring, arguments.runs, arguments.executor)
    runs = resolved(runs, pipeline)
    rows = compared(pipeline, runs, len(SEEN))
    found = {"rows": rows, "experts": experts_costs(pipeline, runs), "cost": costs}
    facts = {
        **common_facts(__file__, sys.argv[1:] if words is None else words, runs=arguments.runs),
        "recipe": recipe,
        **counted(arguments.distillations, seeds),
        "weights": f"variance {VARIANCE}, invariance {INVARIANCE}, position {POSITION}",
    }
    lines = page(facts, found, setting, arguments)
    print("\n".join(lines))
    if arguments.out:
        part = "".join(f"-{each.name}" for each in chosen[1:]) if arguments.variants else ""
        name = f"metadd-{recipe}{part}{'-quick' if quick else ''}"
        save(result_path(arguments.out, name), lines, {**facts, **found})


def page(facts: dict[str, str], found: dict[str, Any], setting: Setting, arguments: argparse.Namespace) -> list[str]:
    """Write the results as Markdown."""
    rows, costs = found["rows"], found["cost"]
    groups = next(row["groups"] for row in rows if row["variant"] != "without")
    seeds = len(next(iter(rows[0]["tuned"].values()))[0])
    lines = head("MetaDD", facts)
    lines += ["Tiny sizes, of no meaning (--quick); the ones below are of a full run.", ""] if arguments.quick else []
    lines += [heading(setting, groups, arguments.distillations, seeds), ""]
    lines += [*variant_table(rows), "", *by_architecture(rows), "", "## Cost", "", SPENT, ""]
    lines += spent_table(rows, found["experts"])
    return [*lines, "", TITLE, "", *cost_table(costs)] if costs else lines


if __name__ == "__main__":
    start(main)
