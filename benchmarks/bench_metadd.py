"""What MetaDD does for a set on networks it was not made with, and what it costs.

python benchmarks/bench_metadd.py [--quick] [--data cifar10] [--distillations 5]         (make bench-metadd)
python benchmarks/bench_metadd.py --recipe digits-dm-ipc10
python benchmarks/bench_metadd.py --recipe digits-sre2l-ipc10

One recipe is distilled with and without MetaDD, with each of its terms, with other auxiliaries, and with a control that
takes logits in place of maps. Rivals take the cross-entropy of several networks, and in SRe2L their statistics. All
else is equal, seeds included. The recipe's method is MetaDD's host. Every set is scored on the backbone, on
architectures that took part (seen) and on some that did not (unseen). The folder of runs is kept; running the command
again resumes. Digits are resized to 16x16 pixels. Weights were chosen on their validation images with DATM as host, see
benchmarks/LOG.md, and are larger with other hosts. CIFAR-10 is a part of the real one, from Parquet files.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar_part import DESCRIPTION, SOURCE, dataset_override
from facts import common_facts, counted, going, head, parsed, present
from metadd_compare import by_architecture, compared, experts_costs, spent_table, variant_table
from metadd_cost import TITLE, cost_rows, cost_table
from program import in_turns, options, resolved, run, settled, start

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
"""Networks that score the sets, besides the backbone."""
NORMED = ["{architecture: convnet, width: 32, depth: 2, norm: batch}", "{architecture: vgg11, width: 16, norm: batch}"]
"""Auxiliaries with batch normalisation, whose statistics a teacher's may be compared with."""
NORMED_SCORED_ON = [
    NetworkConfig(architecture="convnet", width=32, depth=2, norm="batch"),
    NetworkConfig(architecture="vgg11", width=16, norm="batch"),
    *SCORED_ON[2:],
]
WEIGHTS = 1.0, 0.01, 0.1
"""Weights of variance, invariance and position, chosen on digits with DATM."""
DM_WEIGHTS, SRE2L_WEIGHTS = (30.0, 0.3, 3.0), (100.0, 1.0, 10.0)
"""Weights in DM and in SRe2L, tried by hand until the meta-feature ratio rose about as much as in DATM. With DATM's
weights the ratio hardly moves. In SRe2L an auxiliary's cross-entropy then counts as much as the teacher's."""
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
    """Section `experts` of the auxiliaries, in YAML."""
    host: str = "DATM"
    """Method that MetaDD's losses are added to, in words."""
    seen: Sequence[str] = tuple(SEEN)
    """Auxiliaries of all variants, except of variants with another number of auxiliaries."""
    scored_on: Sequence[NetworkConfig] = tuple(SCORED_ON)
    """Networks that score the sets, beside the backbone."""
    weights: tuple[float, float, float] = WEIGHTS
    """Weights of variance, invariance and position."""
    has_statistics: bool = False
    """True for a rival of MetaDD that recovers images from the batch statistics of the auxiliaries too."""
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
QUICK = ("distill.iterations=4", "distill.ipc=1", "experts.epochs=3", "evaluate.protocol=quick")
DM = replace(
    DIGITS,
    recipe="digits-dm-ipc10",
    host="DM",
    overrides=[*DIGITS.overrides, "experts.count=1"],  # the backbone as MetaDD's network; DM itself trains none
    quick=QUICK,
    weights=DM_WEIGHTS,
)
SRE2L = replace(
    DIGITS,
    recipe="digits-sre2l-ipc10",
    host="SRe2L",
    description="Real digits resized to 16x16, ResNet-18 of width 32 with batch normalisation as backbone, which is "
    "the teacher. The\nauxiliaries have batch normalisation too. Networks train on the set under the teacher's labels.",
    quick=QUICK,
    seen=NORMED,
    scored_on=NORMED_SCORED_ON,
    weights=SRE2L_WEIGHTS,
    has_statistics=True,
)
SETTINGS = {"digits": DIGITS, "cifar10": CIFAR10}
HOSTS = {"datm": DIGITS, "mtt": replace(DIGITS, host="MTT"), "dm": DM, "sre2l": SRE2L}
"""Method of a recipe for digits -> its setting."""

HEADER = """Host: {host}. {description}
{distillations} for each variant; for each set {n} freshly
trained network(s) of each architecture, of the same initial parameters in every variant.

- same: the backbone. seen: {seen}. unseen: {unseen}. Widths are relative to the published 128.
- tuned: step size chosen on validation images among {sizes}.
- accuracy: mean over architectures, distillations and networks, test images, in %.
- difference: tuned, to the sets without MetaDD, over pairs of the same architecture, distillation and network; p of a
  paired t test and of Wilcoxon's{over_distillations}; pairs. {shared}
  A table of many variants has many tests; one in twenty is below 0.05 by chance.
- With another number of auxiliaries other architectures are seen: accuracies are then of those, and differences are to
  the sets without MetaDD on the same ones.
- ratio: meta-feature ratio of the images under the backbone and {seen} of the same seed, at threshold
  0.3 / 0.5 / 0.7, mean over distillations. The threshold enters the ratio only: none of the losses has one."""
SPENT = """Networks are trained at every step size that is tried on validation images, and at the learned one. 0: an
earlier version did the work, and noted no cost."""
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
    statistics_of: str = "teacher"

    def overrides(self, experts: str) -> list[str]:
        """Changes to the recipe, as `--set` takes them."""
        if not self.auxiliaries:
            return []
        settings = (
            f"auxiliaries: [{', '.join(self.auxiliaries)}], experts: {experts}, variance: {self.variance}, "
            f"invariance: {self.invariance}, position: {self.position}, divergence: {self.divergence}, "
            f"variance_of: {self.variance_of}"
        )
        rival = [] if self.statistics_of == "teacher" else [f"recover.statistics_of={self.statistics_of}"]
        return [f"metadd={{{settings}}}", *rival]


def variants(setting: Setting) -> list[Variant]:
    """Variants: no MetaDD, all combinations of terms, the divergence's sign, other auxiliaries, the control, rivals.

    A rival takes the place of MetaDD's losses, with the same auxiliaries: their cross-entropy alone, or their running
    statistics.
    """
    seen = setting.seen
    terms = dict(zip(("var", "ai", "pos"), setting.weights, strict=True))
    found = [Variant("without")]
    for count in (1, 2, 3):
        for chosen in itertools.combinations(terms, count):
            weights = [terms[name] if name in chosen else 0.0 for name in terms]
            found.append(Variant("+".join(chosen).replace("+", "-"), seen, *weights))
    full = setting.weights
    found += [Variant(f"all-{count}-auxiliaries", [*seen, *MORE_SEEN][:count], *full) for count in (1, 3, 4)]
    found.append(Variant("all-pushed-apart", seen, *full, divergence=-1.0))
    found.append(Variant("ai-pushed-apart", seen, invariance=terms["ai"], divergence=-1.0))
    found.append(Variant("all-no-divergence", seen, *full, divergence=0.0))
    found.append(Variant("logit-variance", seen, *full, variance_of="logits"))
    found.append(Variant("classes-of-several", seen, invariance=terms["ai"], divergence=0.0))
    if setting.has_statistics:
        found += [Variant(f"statistics-of-{of}", seen, statistics_of=of) for of in ("auxiliaries", "all")]
    return found


def runs_of(variant: Variant, setting: Setting, distillations: int, base: Sequence[str]) -> list[RunConfig]:
    """One run for each distillation of a variant."""
    runs = []
    for seed in range(distillations):
        name = variant.name if distillations == 1 else f"{variant.name}-s{seed}"
        own = [f"name={name}", f"seed={seed}", *variant.overrides(setting.experts)]
        config = override(get_recipe(setting.recipe), [*setting.overrides, *base, *own])
        runs.append(_scored(config, setting.scored_on))
    return runs


def _scored(config: RunConfig, scored_on: Sequence[NetworkConfig]) -> RunConfig:
    networks = (config.network, *scored_on)
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"networks": networks})})


class Scoring(Pipeline):
    """A pipeline that scores only the rows of these tables and no controls."""

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """Score the distilled set alone, on every architecture."""
        return [("distilled", network) for network in config.scored_networks]


def heading(setting: Setting, groups: dict[str, list[str]], distillations: int, seeds: int, *, learns: bool) -> str:
    """Text above the tables, with the facts that a reader needs.

    Args:
        learns: True if sets have a step size of their own.
    """
    several = distillations > 1
    counted = SEVERAL.format(count=distillations, last=distillations - 1) if several else ONE
    over = ", and of a t test of\n  the distillations' mean differences" if distillations >= 3 else ""
    named = {group: ", ".join(groups[group]) for group in ("seen", "unseen")}
    fixed = "0.01, 0.03 and 0.1"
    return HEADER.format(
        host=setting.host,
        sizes=f"the learned one, {fixed}; learned: the one learned" if learns else fixed,
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
    parser.add_argument("--recipe", help="another one for digits, by datm, mtt, dm or sre2l")
    parser.add_argument("--variants", nargs="*", help="only these, and `without`")
    parser.add_argument("--no-cost", action="store_true", help="leave out the table of memory and time")
    arguments = parsed(parser, words)
    if arguments.recipe and arguments.data != "digits":
        parser.error("--recipe is for digits")
    arguments.setting = setting_of(parser, arguments)
    named = {variant.name for variant in variants(arguments.setting)}
    if unknown := set(arguments.variants or ()) - named:
        parser.error(f"--variants knows {', '.join(sorted(named))}, and not {', '.join(sorted(unknown))}")
    if arguments.variants is not None and not set(arguments.variants) - {"without"}:
        parser.error("--variants needs one beside `without`")
    if arguments.data != "digits":
        arguments.default_runs = Path(f"runs/metadd-{arguments.data}")
    elif arguments.setting.recipe != DIGITS.recipe:
        arguments.default_runs = Path(f"runs/metadd-{arguments.setting.recipe}")
    return settled(parser, arguments)


def setting_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Setting:
    """Setting for the recipe that the command line names. The recipe's method is MetaDD's host."""
    if not arguments.recipe:
        return SETTINGS[arguments.data]
    method = get_recipe(arguments.recipe).method
    if method not in HOSTS:
        parser.error(f"--recipe has method {method}, and hosts are {', '.join(HOSTS)}")
    return replace(HOSTS[method], recipe=arguments.recipe)


def main(words: list[str] | None = None) -> None:
    """Distil, score and compare; print and save the tables."""
    arguments = asked(words)
    setting, quick = arguments.setting, arguments.quick
    seeds = 1 if quick else arguments.seeds
    base = [f"evaluate.seeds={seeds}", *(setting.quick if quick else [])]
    if setting.is_cifar:
        base.append(dataset_override(arguments.cifar, arguments.runs, quick))
    named = ("without", *(arguments.variants or ()))
    chosen = [each for each in variants(setting) if not arguments.variants or each.name in named]
    runs = {each.name: runs_of(each, setting, arguments.distillations, base) for each in chosen}
    costs = [] if arguments.no_cost or setting.host != DIGITS.host else cost_rows(quick)  # of an iteration of DATM
    print("\n".join(cost_table(costs)) if costs else "No cost measured", flush=True)
    with going(arguments.runs):
        pipeline = run(in_turns(runs), Scoring, arguments.runs, arguments.executor)
    runs = resolved(runs, pipeline)
    rows = compared(pipeline, runs, len(setting.seen))
    found = {"rows": rows, "experts": experts_costs(pipeline, runs), "cost": costs}
    facts = {
        **common_facts(__file__, sys.argv[1:] if words is None else words, runs=arguments.runs),
        "host": f"{setting.host} (method: {get_recipe(setting.recipe).method})",
        "recipe": setting.recipe,
        **counted(arguments.distillations, seeds),
        "weights": "variance {:g}, invariance {:g}, position {:g}".format(*setting.weights),
    }
    part = "".join(f"-{each.name}" for each in chosen[1:]) if arguments.variants else ""
    name = f"metadd-{setting.recipe}{part}{'-quick' if quick else ''}"
    present(arguments.out, name, page(facts, found, setting, arguments), {**facts, **found})


def page(facts: dict[str, str], found: dict[str, Any], setting: Setting, arguments: argparse.Namespace) -> list[str]:
    """Write the results as Markdown."""
    rows, costs = found["rows"], found["cost"]
    groups = next(row["groups"] for row in rows if row["variant"] != "without")
    seeds = len(next(iter(rows[0]["tuned"].values()))[0])
    lines = head("MetaDD", facts)
    lines += ["Tiny sizes, of no meaning (--quick); the ones below are of a full run.", ""] if arguments.quick else []
    learns = bool(rows[0]["learned"])
    lines += [heading(setting, groups, arguments.distillations, seeds, learns=learns), ""]
    lines += [*variant_table(rows), "", *by_architecture(rows), "", "## Cost", "", SPENT, ""]
    lines += spent_table(rows, found["experts"])
    return [*lines, "", TITLE, "", *cost_table(costs)] if costs else lines


if __name__ == "__main__":
    start(main)
