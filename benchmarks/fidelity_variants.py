"""What bench_fidelity.py distils: the runs of its three parts, and the TESLA-style gradient for one of the ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datm_ray.config import RunConfig, override
from datm_ray.methods.trajectory.step_functions import Reversed, StudentStepFunctions
from datm_ray.pipeline import Pipeline
from datm_ray.recipes import get_recipe
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.methods.trajectory import TrajectoryMatching


class TeslaStepFunctions(StudentStepFunctions):
    """Student steps whose parameters seem not to depend on the images: TESLA's approximation.

    The reverse sweep then hands the same vector from step to step, and every step's part is taken by itself.
    """

    def reverse(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor, v: Tensor) -> Reversed:
        """The exact reverse step, but without the derivative in the step's parameters."""
        s, d_theta, d_x, d_y = super().reverse(theta, x, y, weights, v)
        return s, torch.zeros_like(d_theta), d_x, d_y


class AnyMatching(TrajectoryMatching):
    """Trajectory matching that also accepts ranges that can hardly be matched, because the benchmark compares them."""

    refuses = False


class AnyWorker(DistillWorker):
    """Worker that distils with any range of start epochs."""

    method = AnyMatching


class AnyPipeline(Pipeline):
    """Pipeline that distils with any range of start epochs."""

    distill_worker = AnyWorker


class TeslaMatching(AnyMatching):
    """Trajectory matching with TESLA's approximation of the gradient."""

    functions = TeslaStepFunctions


class TeslaWorker(DistillWorker):
    """Distils with TESLA's approximation of the gradient."""

    method = TeslaMatching


class TeslaPipeline(AnyPipeline):
    """A pipeline whose distillation takes TESLA's approximation."""

    distill_worker = TeslaWorker


@dataclass(frozen=True)
class Range:
    """A fixed range of start epochs, both ends included."""

    first: int
    last: int

    def overrides(self) -> list[str]:
        """Overrides of a recipe that set this range."""
        return [f"distill.start_epochs=[{self.first}, {self.last + 1}]"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is distilled: the full ones, or tiny ones to try the program."""

    fixed: Mapping[str, Range]
    """Ranges that are equal at every IPC."""
    own: Mapping[int, Range]
    """DATM's own ranges, by IPC."""
    recipes: Mapping[int, str]
    """Packaged recipe, by IPC, that gives all other values."""
    iterations: Mapping[int, int]
    ablation_ipc: int
    expert_counts: Sequence[int]
    """Numbers of experts in the ablation, beside the recipe's."""
    base: Sequence[str]
    """Overrides of every run."""
    everything: Range
    """All start epochs that exist, for the variants without a range."""
    unlimited: Sequence[tuple[int, str]]
    """Pairs (IPC, range) that are also distilled without a limit on gradients."""


FULL = Sizes(
    fixed={"early": Range(0, 4), "middle": Range(5, 19), "late": Range(20, 35)},
    # IPC 1, 10 and 30: ranges of the packaged recipes, from a prototype scored on its test split. Others lie between.
    own={1: Range(0, 9), 5: Range(2, 19), 10: Range(5, 29), 20: Range(8, 32), 30: Range(10, 34)},
    recipes={1: "digits-ipc1", 5: "digits-ipc10", 10: "digits-ipc10", 20: "digits-ipc30", 30: "digits-ipc30"},
    iterations={1: 500, 5: 250, 10: 200, 20: 250, 30: 250},
    ablation_ipc=10,
    expert_counts=(1, 4, 50),
    base=["experts.keep_epochs=40"],
    everything=Range(0, 35),
    unlimited=[(1, "early"), (1, "datm"), (20, "late")],  # where gradients had exploded
)
QUICK = Sizes(
    fixed={"early": Range(0, 1), "late": Range(3, 4)},
    own={1: Range(0, 2), 2: Range(1, 3)},
    recipes={1: "digits-ipc1", 2: "digits-ipc10"},
    iterations={1: 2, 2: 2},
    ablation_ipc=2,
    expert_counts=(1,),
    base=[
        "network={width: 4, depth: 2}",
        "experts={count: 2, epochs: 5, batch_size: 128, learning_rate: 0.02, augmentation: '', keep_epochs: 5}",
        "distill.expert_epochs=1",
        "distill.student_steps=2",
        "distill.validation_seeds=1",
        "distill.threshold=10",
        "evaluate.protocol=quick",
        "evaluate.real_epochs=1",
        "cluster.compile=false",
    ],
    everything=Range(0, 4),
    unlimited=[(1, "early")],
)

TESLA = "tesla"
"""Name of the variant that `TeslaPipeline` distils."""
UNLIMITED = "unlimited"


Rows = dict[tuple[int, str], list[RunConfig]]
"""(IPC, range) -> a run for each distillation."""


def crossover_runs(sizes: Sizes, distillations: int, seeds: int) -> Rows:
    """Runs of the crossover; within an IPC only the range differs."""
    found = {}
    for ipc in sizes.own:
        for name, start in {**sizes.fixed, "datm": sizes.own[ipc]}.items():
            found[ipc, name] = _runs(sizes, ipc, f"ipc{ipc}-{name}", start.overrides(), distillations, seeds)
    return found


def unlimited_runs(sizes: Sizes, distillations: int, seeds: int) -> Rows:
    """Some of the crossover's runs, without a limit on gradients."""
    found = {}
    for ipc, name in sizes.unlimited:
        start = {**sizes.fixed, "datm": sizes.own[ipc]}[name]
        changes = [*start.overrides(), "distill.gradient_limit=null"]
        found[ipc, name] = _runs(sizes, ipc, f"{UNLIMITED}-ipc{ipc}-{name}", changes, distillations, seeds)
    return found


def ablation_runs(sizes: Sizes, distillations: int, seeds: int) -> dict[str, list[RunConfig]]:
    """Variant -> a run for each distillation; each differs in one thing from DATM's own run of the same IPC.

    DATM's own run is one of the crossover's.
    """
    ipc = sizes.ablation_ipc
    own = sizes.own[ipc]
    half, grows = (own.first + own.last + 2) // 2, max(1, sizes.iterations[ipc] // 2)
    keys = f"first: {own.first}, bound: {half}, final_bound: {own.last + 1}, expand_iterations: {grows}"
    changes: dict[str, list[str]] = {
        "no range": sizes.everything.overrides(),
        "floating bound": [f"distill.start_epochs={{{keys}}}"],
        "labels not learned": ["distill.learning_rate_labels=0"],
        "hard labels": ["distill.labels=hard"],
        "random initial images": ["distill.initial=random"],
        "no range, hard labels, random (MTT)": [
            *sizes.everything.overrides(),
            "distill.labels=hard",
            "distill.initial=random",
        ],
        TESLA: [],
        "GSAM experts": ["experts.optimiser=gsam"],
        **{f"{count} expert{'s' * (count > 1)}": [f"experts.count={count}"] for count in sizes.expert_counts},
    }
    found = {}
    for name, own_changes in changes.items():
        run_name = "ablation-" + "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
        found[name] = _runs(sizes, ipc, run_name, [*own.overrides(), *own_changes], distillations, seeds)
    return found


def _runs(sizes: Sizes, ipc: int, name: str, changes: Sequence[str], distillations: int, seeds: int) -> list[RunConfig]:
    iterations = sizes.iterations[ipc]
    common = [
        f"distill.ipc={ipc}",
        f"distill.iterations={iterations}",
        f"distill.validate_every={max(1, min(100, iterations // 2))}",
        f"evaluate.seeds={seeds}",
    ]
    runs = []
    for seed in range(distillations):
        own = [f"name={name}" + (f"-s{seed}" if seed else ""), f"seed={seed}"]
        runs.append(override(get_recipe(sizes.recipes[ipc]), [*sizes.base, *common, *changes, *own]))
    return runs


# --- how long it will take ----------------------------------------------------------------------------------------

ITERATION = {10: 0.072, 50: 0.15}
"""Images of a minibatch -> CPU seconds of an iteration of 40 student steps. These and the constants below were measured
once each, on a core of an AMD EPYC beside other work, see LOG.md."""
TRAINING = (0.00087, 0.0000233)
"""CPU seconds of an epoch on a synthetic set: of each minibatch, and of each image."""
EXPERT_EPOCH, COMPILING, STARTING = 0.025, 4.1, 60.0
"""CPU seconds: of an expert's epoch (GSAM takes twice that), of compiling for a set, of starting Ray and workers."""


def estimate(runs: Sequence[RunConfig]) -> float:
    """CPU seconds of all stages of unstarted runs, on a core of a 2-core machine."""
    experts: dict[tuple[str, int], int] = {}
    controls: dict[tuple[int, int], float] = {}
    seconds = STARTING
    for config in runs:
        distill, seeds = config.distill, config.evaluate.seeds
        group = config.experts.optimiser, config.seed
        experts[group] = max(experts.get(group, 0), config.experts.count)
        images = 10 * distill.ipc
        training = 500 * (TRAINING[0] * -(-images // 128) + TRAINING[1] * images)
        validations = -(-distill.iterations // distill.validate_every) * distill.validation_seeds
        seconds += COMPILING + distill.iterations * ITERATION[10 if images <= 10 else 50]
        seconds += (validations + seeds) * training
        if config.name.startswith("ipc"):  # two controls of three step sizes each
            controls[distill.ipc, config.seed] = 2 * 3 * seeds * training
    real = 3 * len({config.seed for config in runs}) * runs[0].evaluate.seeds * runs[0].evaluate.real_epochs
    seconds += real * (10 * TRAINING[0] + 1222 * TRAINING[1]) + sum(controls.values())
    for (optimiser, _), count in experts.items():
        seconds += count * runs[0].experts.epochs * EXPERT_EPOCH * (2 if optimiser == "gsam" else 1)
    return seconds
