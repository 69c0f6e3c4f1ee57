"""What MetaDD does for a set on networks it was not made with, and what it costs.

python benchmarks/bench_metadd.py [--quick]         (make bench-metadd)

Digits at 16x16 pixels: the same recipe with and without MetaDD, with each of its terms, with other auxiliaries and with
the control that takes logits in place of maps, everything else alike, seeds included. Every set is scored on the
backbone, on architectures that took part (seen) and on some that did not (unseen). The folder of runs is kept, and the
same command goes on where it stopped. Weights were chosen on validation images, see benchmarks/LOG.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_matching import Shape, hardware, status
from scipy.stats import ttest_rel, wilcoxon

from datm_ray.artifact import load
from datm_ray.config import NetworkConfig, RunConfig, override
from datm_ray.core.distillation import Distillation, LearningRates, Match, MetaTerm, Origin
from datm_ray.core.matching import draw_student_steps
from datm_ray.core.metadd import MetaDD, meta_feature_ratio, scaled_maps
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork, flatten
from datm_ray.core.step_functions import StudentStepFunctions
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.distill import SYNTHETIC
from datm_ray.runtime.evaluate import read_network_scores
from datm_ray.runtime.expert_networks import ExpertNetworks
from datm_ray.runtime.telemetry import Reporter

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
MAIN = ("without", "var-ai-pos")
"""Shown architecture by architecture."""
EXPERTS = "{count: 1, epochs: 20, batch_size: 64, learning_rate: 0.01, momentum: 0.9, augmentation: '', keep_epochs: 1}"
VARIANCE, INVARIANCE, POSITION = 1.0, 0.01, 0.1
THRESHOLDS = (0.3, 0.5, 0.7)

HEADER = """Real digits resized to 16x16, ConvNet of depth 2 and width 32 as backbone; one distillation for each
variant, all of one seed; n freshly trained networks of each architecture, the same initial parameters in every variant.

- same: the backbone. seen: {seen}. unseen: {unseen}. Widths are relative to the published 128.
- tuned: step size chosen on validation images among the learned one, 0.01, 0.03 and 0.1; learned: the one learned.
- accuracy: mean over architectures of the mean over networks, test images, in %.
- difference: tuned, to the set without MetaDD, over pairs of the same architecture and seed; p of a paired t test and
  of Wilcoxon's; pairs. They share two sets, so p speaks of these sets and not of all that might be distilled.
- ratio: meta-feature ratio of the set's images under backbone and {seen}, at threshold 0.3 / 0.5 / 0.7. The
  threshold enters the ratio only: none of the losses has one."""


@dataclass(frozen=True)
class Variant:
    """One set."""

    name: str
    auxiliaries: Sequence[str] = ()
    variance: float = 0.0
    invariance: float = 0.0
    position: float = 0.0
    divergence: float = 1.0
    variance_of: str = "maps"

    def overrides(self) -> list[str]:
        """Of the recipe."""
        if not self.auxiliaries:
            return [f"name={self.name}"]
        settings = (
            f"auxiliaries: [{', '.join(self.auxiliaries)}], experts: {EXPERTS}, variance: {self.variance}, "
            f"invariance: {self.invariance}, position: {self.position}, divergence: {self.divergence}, "
            f"variance_of: {self.variance_of}"
        )
        return [f"name={self.name}", f"metadd={{{settings}}}"]


def variants() -> list[Variant]:
    """The set without, all combinations of terms, the sign of the divergence, auxiliaries, and the control."""
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


def configs_of(chosen: Sequence[Variant], recipe: str, seeds: int, quick: bool) -> list[RunConfig]:
    """The runs, in order."""
    small = ["distill.iterations=4", "experts.count=2"] if quick else []
    base = ["dataset.resize=16", f"evaluate.seeds={seeds}", *small]
    found = [override(get_recipe(recipe), [*base, *variant.overrides()]) for variant in chosen]
    return [_scored(config) for config in found]


def _scored(config: RunConfig) -> RunConfig:
    networks = (config.network, *SCORED_ON)
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"networks": networks})})


def label(network: NetworkConfig) -> str:
    """A short name that tells the networks here apart."""
    return network.architecture + (f"-{network.norm}-{network.pooling}" if network.norm != "instance" else "")


def accuracies(pipeline: Pipeline, config: RunConfig, column: str) -> dict[str, list[float]]:
    """By architecture, in %."""
    fingerprint = pipeline._raw[config.dataset].fingerprint
    return {
        label(scores.network): [100 * each for each in getattr(scores, column).accuracies]
        for scores in read_network_scores(pipeline.out, config, fingerprint)
    }


def ratios(pipeline: Pipeline, config: RunConfig, looking: RunConfig) -> list[float]:
    """Of a run's set, under the networks of another run, at every threshold."""
    dataset, cpu = pipeline._dataset(config), torch.device("cpu")
    networks = [*looking.each_backbone()[:1], *looking.each_auxiliary()]
    restored = [ExpertNetworks(each, dataset, pipeline.store_uri, cpu).restored(0) for each in networks]
    found = load(f"{(pipeline.out / config.name / SYNTHETIC).uri}")
    scaled = scaled_maps(MetaDD(restored).evidence(found.images, found.labels).maps)
    return [float(meta_feature_ratio(scaled, threshold).mean()) for threshold in THRESHOLDS]


def compared(pipeline: Pipeline, configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """What the table says of each variant, with every accuracy."""
    looks = [config for config in configs if config.metadd]
    looking = next((each for each in looks if each.metadd and len(each.metadd.auxiliaries) == len(SEEN)), looks[0])
    backbone = configs[0].network.architecture
    base = accuracies(pipeline, configs[0], "tuned")
    rows = []
    for config in configs:
        tuned, learned = (accuracies(pipeline, config, column) for column in ("tuned", "learned"))
        seen = [each.architecture for each in (config.metadd or looking.metadd).auxiliaries]  # type: ignore[union-attr]
        groups = {
            "same": [backbone],
            "seen": seen,
            "unseen": [name for name in tuned if name not in (backbone, *seen)],
        }
        row: dict[str, Any] = {"variant": config.name, "tuned": tuned, "learned": learned, "groups": groups}
        row["ratio"] = ratios(pipeline, config, looking)
        row["tests"] = {
            group: paired([a for name in names for a in tuned[name]], [b for name in names for b in base[name]])
            for group, names in groups.items()
        }
        rows.append(row)
    return rows


def paired(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Mean difference and two tests of it."""
    differences = [value - other for value, other in zip(values, base, strict=True)]
    if not any(differences):
        return {"difference": 0.0, "pairs": len(differences)}
    return {
        "difference": statistics.fmean(differences),
        "pairs": len(differences),
        "p_t": float(ttest_rel(values, base).pvalue),
        "p_wilcoxon": float(wilcoxon(differences).pvalue),
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each variant."""
    lines = [
        "| variant | same, tuned (learned) | seen | unseen | difference: same | seen | unseen | ratio |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        cells = []
        for names in row["groups"].values():
            tuned, learned = (
                statistics.fmean(statistics.fmean(row[column][name]) for name in names)
                for column in ("tuned", "learned")
            )
            cells.append(f"{tuned:.1f} ({learned:.1f})")
        cells += [told(row["tests"][group]) for group in row["groups"]]
        cells.append(" / ".join(f"{ratio:.3f}" for ratio in row["ratio"]))
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return lines


def told(test: dict[str, float]) -> str:
    """A difference with its tests."""
    if "p_t" not in test:
        return ""
    return f"{test['difference']:+.1f} (p {test['p_t']:.2g}, {test['p_wilcoxon']:.2g}; {test['pairs']})"


def by_architecture(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Tuned accuracy of the first and the full variant on every architecture."""
    chosen = [row for row in rows if row["variant"] in MAIN]
    lines = [f"| architecture | {' | '.join(row['variant'] for row in chosen)} |", "| --- " * (1 + len(chosen)) + "|"]
    for name in chosen[0]["tuned"]:
        cells = [f"{statistics.fmean(row['tuned'][name]):.1f} ± {spread(row['tuned'][name])}" for row in chosen]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Sample standard deviation."""
    return f"{statistics.stdev(values):.1f}" if len(values) > 1 else "?"


# --- cost -------------------------------------------------------------------------------------------------------------


def cost_child(auxiliaries: int, quick: bool, share: float) -> None:
    """Peak memory and seconds of an iteration at CIFAR shape, IPC 10, with so many auxiliaries; one JSON line."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    width, size, steps = (8, (16, 16), 2) if quick else (128, (32, 32), 10)
    shape = Shape("CIFAR-10 IPC 10", 3, width, (3, *size), 10, 100, 20, (20, 5))
    names = ["convnet", "resnet18", "vgg11", "alexnet", "lenet"][: 1 + auxiliaries]
    specs = [NetworkSpec(name, 3, size, 10, width=width) for name in names]
    networks = [build_network(spec, seed) for seed, spec in enumerate(specs)]
    functions = StudentStepFunctions(FlatNetwork(networks[0]))
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(100, 3, *size, generator=draw), torch.arange(100) % 10
    state = Distillation(
        SyntheticSet(images, torch.randn(100, 10, generator=draw), torch.tensor([0.01]), labels),
        LearningRates(1e-3, 1e-3, 0.0),
        threshold=1e9,
    )
    start = flatten(networks[0])
    target = start + torch.randn(start.shape, generator=draw) / len(start) ** 0.5
    metadd, looking = (MetaDD(networks) if auxiliaries else None), len(networks)
    del networks  # a worker holds MetaDD's copies only

    def iterate() -> float:
        drawn = draw_student_steps(100, steps, shape.batch, "", 0, state.iteration)
        match = Match(functions, start, target, drawn, chunk=shape.chunk)
        rows = torch.arange(round(100 * share)).numpy()
        meta = MetaTerm(metadd, looking, rows, len(rows)) if metadd else None
        before = time.perf_counter()
        state.step([match], [Origin(0, 0)], meta=meta)
        return time.perf_counter() - before

    iterate()  # compiles
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    seconds = [iterate() for _ in range(3)]
    print(json.dumps({"peak": status("VmHWM"), "seconds": seconds}))


def cost_rows(quick: bool) -> list[dict[str, Any]]:
    """Each in a process of its own."""
    rows = []
    for auxiliaries, share in ((0, 1.0), (1, 1.0), (2, 1.0), (4, 1.0), (4, 0.2)):
        request = json.dumps([auxiliaries, quick, share])
        command = [sys.executable, __file__, "--cost-child", request]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        rows.append({"auxiliaries": auxiliaries, "share": share, **json.loads(answer)})
    return rows


def cost_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each number of auxiliaries."""
    lines = ["| auxiliaries | share of images | peak, MiB | ratio | seconds an iteration | ratio |", "| --- " * 6 + "|"]
    base = rows[0]
    for row in rows:
        seconds, before = statistics.median(row["seconds"]), statistics.median(base["seconds"])
        peak = f"{row['peak'] / 2**20:.0f} | {row['peak'] / base['peak']:.2f}"
        lines.append(
            f"| {row['auxiliaries']} | {row['share']:g} | {peak} | "
            f"{seconds:.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f}) | {seconds / before:.2f} |"
        )
    return lines


def main() -> None:
    """Distil, score, compare; print the tables and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; written nowhere unless --out is given")
    parser.add_argument("--recipe", default="digits-ipc1")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", nargs="*", help="only these, and `without`")
    parser.add_argument("--runs", default="runs/metadd", help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results unless --quick")
    parser.add_argument("--cost-child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cost_child:
        cost_child(*arguments.cost_child)
        return
    chosen = [each for each in variants() if not arguments.variants or each.name in ("without", *arguments.variants)]
    costs = cost_rows(arguments.quick)
    print("\n".join(cost_table(costs)), flush=True)
    configs = configs_of(chosen, arguments.recipe, 1 if arguments.quick else arguments.seeds, arguments.quick)
    pipeline = Pipeline(configs, arguments.runs)
    pipeline.run_all(lambda: create_executor("ray", configs[0].cluster, None), Reporter())
    rows = compared(pipeline, configs)
    file_name, machine = hardware("cpu")
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": machine,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "recipe": arguments.recipe,
        "n": str(configs[0].evaluate.seeds),
        "weights": f"variance {VARIANCE}, invariance {INVARIANCE}, position {POSITION}",
        "date": str(date.today()),
    }
    groups = next(row["groups"] for row in rows if row["variant"] != "without")
    named = {group: ", ".join(groups[group]) for group in ("seen", "unseen")}
    lines = ["# MetaDD", "", *(f"{key}: {value}  " for key, value in facts.items()), "", HEADER.format(**named), ""]
    lines += [*table(rows), "", *by_architecture(rows), ""]
    lines += [
        "Cost of an iteration at CIFAR-10's shape, IPC 10, ConvNet-3/128, T = 10, batch 100, auxiliaries of published "
        "size, median of 3:"
    ]
    lines += ["", *cost_table(costs)]
    print("\n".join(lines))
    out = arguments.out or (None if arguments.quick else Path(__file__).parent / "results")
    if out:
        path = out / f"metadd-{arguments.recipe}_{file_name}_{date.today():%Y%m}"
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")
        path.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows, "cost": costs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
