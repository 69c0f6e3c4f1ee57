"""Trajectory matching in one worker: the experts it reads, the networks it matches, and the values it reports."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.config import ClusterConfig, RunConfig
from datm_ray.core.compute.gpu import sent
from datm_ray.core.images.augment import Augmentation
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.steps import Steps
from datm_ray.core.synthetic import AllSum, SyntheticSet
from datm_ray.core.training.loop import Heartbeat
from datm_ray.errors import ConfigError, StoreError, ThresholdError
from datm_ray.methods.state import FIRST_MOVE, MetaTerm
from datm_ray.methods.trajectory.calibration import PAIRS, Measured, find_step_size, measure
from datm_ray.methods.trajectory.difficulty import draw_origin
from datm_ray.methods.trajectory.distance import Distance
from datm_ray.methods.trajectory.iteration import MOST_ABOVE, HardLabelled, Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import draw_student_steps, first_matched, first_shown, place_steps
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.runtime.ahead import Ahead
from datm_ray.runtime.machine.devices import channels_last_on, precision_on, to_device
from datm_ray.stages.methods.base import Demand, Method, often, rate_found
from datm_ray.stages.methods.first_images.initial import first_set
from datm_ray.stages.methods.memory import DistillationPlan, chunk_by_trial, plans_of_part
from datm_ray.stages.methods.part import Part
from datm_ray.words import counted, listed


@dataclasses.dataclass(frozen=True)
class _Backbone:
    """One backbone that this worker matches, with its step functions and memory plan."""

    number: int
    functions: StudentStepFunctions
    plan: DistillationPlan
    """Memory plan of this worker for the backbone."""
    chunk: int
    """Number of images in a micro-batch."""


COMPILED_MAPS, UNCOMPILED_MAPS = 2, 9
"""Peak memory of a compiled and of an uncompiled student step, as a multiple of the bytes that all layers write in one
forward pass. Measured: 1.8 to 1.9 compiled, 7.3 to 8.9 uncompiled."""
NETWORK_VECTORS = 10
"""Number of vectors, each as long as the network's parameters, that memory plans count beside the student's
stored steps: 2 networks, the target, the vector that the reverse sweep carries back through the steps, 4 gradients and
sums of gradients, and the next iteration's start and target."""
_AGAIN = (
    f". Running the same command again tries {MOST_ABOVE} more iterations; other settings need another --out or "
    "--set name=..."
)


class TrajectoryMatching(Method):
    """Trajectory matching (DATM, MTT): a worker matches its backbones, each with that backbone's experts."""

    functions: type[StudentStepFunctions] = StudentStepFunctions
    """Class that computes a student step and its derivative. Benchmarks may set another class."""
    refuses: bool = True
    """True to raise an error for a set that learns nothing from matching. Benchmarks may set this to False."""
    state = MatchingState
    reads_backbones = True
    can_continue = True
    trains = "all"  # each is matched with its own experts
    soft_labels = True
    gives_step_size = True
    precisions = ("auto", "float32", "tf32", "bfloat16")

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise a `ConfigError` for a recipe that cannot be matched, such as one whose experts lack a matched epoch."""
        super().check(config)
        config.require_matched_epochs()

    @classmethod
    def demand(cls, config: RunConfig, classes: int, shards: int, cost: ImageCost) -> Demand:
        """Work and memory of an iteration: student steps on this worker's part of the minibatches.

        The student's parameters after each step stay in memory. With several class shards, each step sums two vectors
        over the shards.
        """
        settings, images = config.distill, config.distill.ipc * classes
        rows = rows_at_a_time(images, settings.ipc * -(-classes // shards), min(settings.batch_size, images))
        steps, vector = settings.student_steps, 4 * cost.parameters
        return Demand(
            {"matching": steps * rows},
            at_once=rows,
            maps=COMPILED_MAPS if config.cluster.compile else UNCOMPILED_MAPS,
            vectors=NETWORK_VECTORS,
            trace=(steps + 1) * vector,
            steps=steps,
            summed=steps * (2 * vector + 4) if shards > 1 else 0,
            sums=2 * steps,
        )

    @classmethod
    def described(cls, config: RunConfig, images: int, chunk: int) -> str:
        """Text for plans: the numbers of iterations, student steps and images."""
        settings, batch = config.distill, min(config.distill.batch_size, images)
        steps = f"{settings.student_steps:,} student steps of {batch:,} of {images:,} images"
        without = f", without the first {share:.0%} of the parameters" if (share := settings.unmatched_share) else ""
        return f"{settings.iterations:,} iterations of {steps}, in micro-batches of {chunk:,}{without}"

    @classmethod
    def outlook(cls, config: RunConfig, training_images: int) -> Distance:
        """Forecast for a recipe: how far experts and the student move in the space of parameters."""
        return Distance.of(config, training_images)

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        config, role = part.config, part.role
        cluster = config.cluster
        graphs = part.device.type == "cuda" and cluster.cuda_graphs
        options = dataclasses.replace(step_options(cluster, part.device), graphs=graphs)
        steps = {n: self.functions(FlatNetwork(self.experts[n].network), options) for n in role.backbones}
        # Uncompiled steps take more memory.
        plans = plans_of_part(part, compiled=cluster.compile and not any(each.note for each in steps.values()))
        self._backbones = [
            _Backbone(number, steps[number], plans[number], plans[number].chunk) for number in role.backbones
        ]
        # A thread prepares inputs during waits for a remote store or a GPU. On a CPU it would only take cores from the
        # iteration.
        is_remote = any(self.experts[n].group.location.local_path is None for n in role.backbones)
        has_waits = is_remote or part.device.type == "cuda"
        self._ahead = Ahead(self._inputs, config.distill.iterations, in_thread=has_waits)
        self.calibration = "measuring the first matching losses"
        self.preparation = f"{'compiling' if cluster.compile else 'preparing'} student steps"
        self.notes = sorted({each.note for each in steps.values()} - {""})
        first = next(iter(steps.values()), None)
        self.facts = {} if first is None else first.facts

    def first_set(self) -> Steps[SyntheticSet]:
        """Make the set before any iteration, in steps. A step size that is null in the recipe gets a likely value.

        Without soft labels (MTT), these are random real images, or noise, with hard labels.
        """
        distance = Distance.of(self.part.config, len(self.part.dataset.train_labels))
        experts = self.experts[0] if self.soft_labels else None
        return first_set(self.part, experts, distance.step_size or distance.likely_step_size)

    def close(self) -> None:
        """Stop preparing the inputs of the next iteration."""
        self._ahead.close()

    def prepare(self, heartbeat: Heartbeat) -> None:
        """Compile student steps. On a GPU, also find by trial how large a micro-batch may be."""
        for place, backbone in enumerate(self._backbones):

            def step(chunk: int, functions: StudentStepFunctions = backbone.functions) -> None:
                functions.prepare(chunk, self.part.dataset.image_shape, self.part.dataset.classes, heartbeat)

            if self.part.device.type == "cuda":
                chunk = chunk_by_trial(step, backbone.plan, self.part.device, backbone.functions.forget)
                self._backbones[place] = dataclasses.replace(backbone, chunk=chunk)
            else:
                step(backbone.chunk)

    def calibrate(self, state: MatchingState) -> Iterator[str]:
        """Find the initial step sizes and the images' learning rate where the recipe leaves them open.

        Losses are measured for `PAIRS` pairs of start and target. Yields messages about the results.

        Raises:
            ThresholdError: all measured losses exceed `distill.threshold` (without one: are not finite), start and
                target are equal in all pairs, or the loss has no gradient in the images.
            StoreError: an expert has the same parameters in its first and last stored epochs.
        """
        given, threshold = self.part.config.distill.initial_step_size, self.part.config.distill.skip_above
        pairs = self._pairs(state.iteration)
        if given is None:
            measured = self._search(state, pairs)
            state.synthetic.step_sizes.copy_(torch.tensor([each.step_size for each in measured]))
        else:
            measured = self._measured(lambda own, all_sum: measure(given, pairs[own], state.synthetic, all_sum))
        losses = [loss for each in measured for loss in each.losses if not math.isnan(loss)]
        above, start = sum(loss > threshold for loss in losses), _numbers(each.loss for each in measured)
        if not losses and self.refuses:
            raise ThresholdError(
                f"start and target are identical in all {PAIRS} pairs that were measured, so there is nothing to match",
                "the experts have come to rest before these epochs",
                "lower distill.start_epochs",
            )
        if above == len(losses) and self.refuses:
            best = measured if given is None else self._search(state, pairs)
            raise self._hopeless("the set would start", [each.loss for each in measured], state, pairs, best)
        if given is None:
            yield self._started(measured)
        if self.part.config.distill.learning_rate_images is None:
            state.image_rate = self._image_rate(state, pairs)
            yield rate_found(state)
        if above:
            yield (
                f"{above} of {counted(len(losses), 'matching loss')} at the start {'is' if above == 1 else 'are'} "
                f"{self._unusable}, and such iterations are skipped. The mean loss is {start}: {self._distance(state)}"
            )

    @property
    def _unusable(self) -> str:
        """Text that says why a loss is skipped: above the threshold, or not finite if the recipe has no threshold."""
        threshold = self.part.config.distill.threshold
        return "not finite" if threshold is None else f"above distill.threshold {threshold:g}"

    def _started(self, measured: Sequence[Measured]) -> str:
        """Text about the step sizes with which the set starts, and whether each is the best one."""
        sizes, losses = _numbers(each.step_size for each in measured), _numbers(each.loss for each in measured)
        none = [each for each in measured if not each.is_best]
        if not none:
            return f"initial step size {sizes} found: the set starts with a matching loss of {losses} (1: no movement)"
        least, most = min(each.least_tried for each in none), max(each.most_tried for each in none)
        return (
            f"no step size from {least:.2g} to {most:.2g} clearly brings the student nearer to its target: the least "
            f"matching loss is {_numbers((each.least_loss for each in none), 4)} (1: no movement). The set starts with "
            f"step size {sizes}, at which the student moves, and a loss of {losses}"
        )

    def _pairs(self, iteration: int) -> Mapping[int, Sequence[Match]]:
        """Pairs of an expert's start and target parameters for calibration, spread evenly over the start epochs.

        Returns the index of each backbone that this worker matches -> `PAIRS` pairs.
        """
        config, allowed = self.part.config, self.part.config.distill.start_epochs
        starts = np.linspace(allowed.first, allowed.upper_bound(iteration) - 1, PAIRS).round().astype(int).tolist()
        origins = [Origin(number % config.experts.count, start) for number, start in enumerate(starts)]
        return {
            backbone.number: [self._match(backbone, origin, iteration + k) for k, origin in enumerate(origins)]
            for backbone in self._backbones
        }

    def _search(self, state: MatchingState, pairs: Mapping[int, Sequence[Match]]) -> list[Measured]:
        """Find the best step size of every network of the run, with its losses. All workers get the same results.

        Args:
            pairs: index of each backbone that this worker matches -> its pairs of start and target.
        """
        near = self._distance(state).likely_step_size
        threshold = self.part.config.distill.threshold or 1.0
        bound = min(threshold, (1 + threshold) / 2)  # below the threshold, as single losses scatter around the mean

        def search(own: int, all_sum: AllSum) -> Measured:
            return find_step_size(lambda tried: measure(tried, pairs[own], state.synthetic, all_sum), near, bound)

        return self._measured(search)

    def _measured(self, of_backbone: Callable[[int, AllSum], Measured]) -> list[Measured]:
        """Measure step size and losses of every backbone of the run, on the workers that match it, for all workers.

        Args:
            of_backbone: function (index of a backbone, sum over the workers with other classes) -> measurement.
        """
        found = torch.zeros(len(self.part.config.weights), 4 + PAIRS, dtype=torch.float64)

        def work(all_sum: AllSum) -> None:
            for backbone in self._backbones:
                own = of_backbone(backbone.number, all_sum)
                row = [own.step_size, own.least_tried, own.most_tried, own.least_loss, *own.losses]
                found[backbone.number] = torch.tensor(row, dtype=torch.float64)

        self.part.mesh.in_rows(work)
        rows = self.part.mesh.sum_over_backbones(found.to(self.part.device)).tolist()
        return [Measured(row[0], tuple(row[4:]), *row[1:4]) for row in rows]

    def _image_rate(self, state: MatchingState, pairs: Mapping[int, Sequence[Match]]) -> float:
        """Learning rate with which a first update moves the images by `FIRST_MOVE` times their norm.

        The movement is a mean over the pairs. Pairs with a loss above `distill.threshold` would update nothing, so they
        count only if all losses are above the threshold. Raises a `ThresholdError` if no pair has a gradient.
        """
        for skip_above in (self.part.config.distill.skip_above, math.inf):
            shares = [self._image_share(state, pairs, number, skip_above) for number in range(PAIRS)]
            if found := [share for share in shares if math.isfinite(share) and share]:
                return FIRST_MOVE / statistics.fmean(found)
        raise ThresholdError(
            "the matching loss has no gradient in the images, so no distill.learning_rate_images can be found",
            str(self._distance(state)),
            "give distill.learning_rate_images, or lower distill.start_epochs",
        )

    def _image_share(
        self, state: MatchingState, pairs: Mapping[int, Sequence[Match]], number: int, skip_above: float
    ) -> float:
        """Norm of a first update of the images with learning rate 1, divided by the norm of the images.

        The update follows the loss of one pair (start and target) of each network. Networks with a loss above
        `skip_above` add nothing.

        Args:
            number: index of the pair among the `pairs` of each network, from 0.
        """
        total = torch.zeros_like(state.synthetic.images)

        def work(all_sum: AllSum) -> None:
            for backbone in self._backbones:
                pair = pairs[backbone.number][number]
                total.add_(pair.weight * pair.gradient(state.synthetic, all_sum, skip_above).images)

        self.part.mesh.in_rows(work)
        return self.share_of_images(state.movement(total), state.synthetic.images)

    def _distance(self, state: MatchingState) -> Distance:
        """Distances that the experts and the student move in the space of parameters.

        The student's distance is that with the set's current step size.
        """
        given = Distance.of(self.part.config, len(self.part.dataset.train_labels))
        return dataclasses.replace(given, step_size=float(state.synthetic.step_size))

    def _hopeless(
        self,
        what: str,
        losses: Sequence[float],
        state: MatchingState,
        pairs: Mapping[int, Sequence[Match]],
        best: Sequence[Measured],
        again: str = "",
    ) -> ThresholdError:
        """Make an error about losses above `distill.threshold`, with settings that would bring losses below it.

        Args:
            what: start of the message, before "with a matching loss of".
            losses: matching losses of the networks, above `distill.threshold`.
            best: the best step size that was found for every network.
            again: end of the message, about running the same command again; "" for none.
        """
        settings, now = self.part.config.distill, float(state.synthetic.step_size)
        remedy = f"try {self._better(best)}"
        if not min(each.loss for each in best) <= settings.skip_above:
            lower = "distill.learning_rate_images or start_epochs" if state.momenta else "distill.start_epochs"
            remedy = "raise distill.threshold to 1" if settings.skip_above < 1 else f"lower {lower}"
            least, most = min(each.least_tried for each in best), max(each.most_tried for each in best)
            remedy = f"no step size from {least:.2g} to {most:.2g} is enough: {remedy}"
        fewer = round(settings.student_steps * best[0].step_size / now)
        if len(best) == 1 and 1 <= fewer < settings.student_steps:
            cut = {n: [dataclasses.replace(each, steps=each.steps[:fewer]) for each in own] for n, own in pairs.items()}
            (short,) = self._measured(lambda own, all_sum: measure(now, cut[own], state.synthetic, all_sum))
            if short.loss <= settings.skip_above:
                remedy += f", or distill.student_steps={fewer} (loss {short.loss:.3g})"
        fact = f"{what} with a matching loss of {_numbers(losses, 5)}, {self._unusable}"
        return ThresholdError(fact, str(self._distance(state)), f"{remedy}{again}")

    def _better(self, best: Sequence[Measured]) -> str:
        """Text that recommends a setting with the best step size found for the current set, and gives the loss."""
        found, least = (_numbers(each) for each in zip(*((each.step_size, each.loss) for each in best), strict=True))
        if self.part.config.distill.initial_step_size is not None:
            return f"distill.initial_step_size=null, which finds {found} for the present set (loss {least})"
        number = min(each.step_size for each in best)  # the smallest, so that no student goes too far
        among = f"the smallest of {found}, " if len(best) > 1 else ""
        return f"distill.initial_step_size={number:.3g}, {among}found for the present set (loss {least})"

    def step(self, state: MatchingState, meta: MetaTerm | None) -> None:
        """Run one iteration: match every network once. Meanwhile the inputs of the next iteration are prepared.

        Args:
            state: state of the distillation, changed in place.
            meta: MetaDD's term; `None` without MetaDD.

        Raises:
            ThresholdError: the losses of many iterations in a row exceeded `distill.threshold`.
            DivergenceError: a network's updates were too often skipped because a value was not finite.
            StoreError: an expert has the same parameters in its first and last stored epochs.
        """
        origins, matches = self._ahead.get(state.iteration)
        state.step(
            matches,
            origins,
            meta=meta,
            all_sum=self.part.mesh.sum_over_classes,
            sum_over_backbones=self.part.mesh.sum_over_backbones,
            in_rows=self.part.mesh.in_rows,
        )
        if self.refuses and (times := state.stuck):
            losses, pairs = [each.loss for each in state.history[-state.backbones :]], self._pairs(state.iteration)
            what = f"{times} iterations in a row changed nothing, the last"
            raise self._hopeless(what, losses, state, pairs, self._search(state, pairs), _AGAIN)

    def augmentations(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], iteration: int
    ) -> Sequence[Augmentation]:
        """For each of some images, the augmentation under which the first backbone's student first sees it.

        Images that the student does not see in the iteration share one augmentation, drawn for the iteration. MetaDD's
        networks see the images under these augmentations if `metadd.augmented` is set.
        """
        if not self.part.config.distill.augmentation:
            return ()
        return first_shown(rows + self.part.rows.first, *self._draws, iteration)

    @property
    def _draws(self) -> tuple[int, int, int, str, int]:
        """First arguments of `draw_student_steps`, the same in every iteration."""
        seed, settings = self.part.config.seed, self.part.config.distill
        images = settings.ipc * self.part.dataset.classes
        return images, settings.student_steps, settings.batch_size, settings.augmentation, seed

    def _inputs(self, iteration: int) -> tuple[list[Origin], list[Match]]:
        """Inputs of an iteration: expert and start epoch of every backbone, and a `Match` for each one of this worker.

        A `Match` has start, target and minibatches on the device. Its bits depend on the iteration's number alone.
        """
        origins = self._origins(iteration)
        return origins, [self._match(each, origins[each.number], iteration) for each in self._backbones]

    def _origins(self, iteration: int) -> list[Origin]:
        config, allowed = self.part.config, self.part.config.distill.start_epochs
        starts = range(allowed.first, allowed.upper_bound(iteration))
        return [
            draw_origin(starts, config.experts.count, config.seed, iteration, backbone)
            for backbone in range(len(config.weights))
        ]

    def _wanted(self, origin: Origin) -> tuple[int, list[int]]:
        """Number of the expert, and two of its epochs: where the student starts, and its target."""
        return origin.expert, [origin.epoch, origin.epoch + self.part.config.distill.expert_epochs]

    def _match(self, backbone: _Backbone, origin: Origin, iteration: int) -> Match:
        steps = draw_student_steps(*self._draws, iteration, backbone.number)
        held = [step.held_by(self.part.rows.first, self.part.rows.last) for step in steps]
        first, last = self.experts[backbone.number].group.read_params(*self._wanted(origin))
        matched = first_matched(len(first), self.part.config.distill.unmatched_share)
        if np.array_equal(first[matched:], last[matched:]):
            self._require_motion(backbone, origin, matched)  # no error for a single pair: its iteration is skipped
        start, target = (sent(to_device(each, torch.device("cpu")), self.part.device) for each in (first, last))
        return Match(
            backbone.functions,
            start,
            target,
            place_steps(held, backbone.chunk, start),
            backbone.number,
            self.part.config.weights[backbone.number],
            matched,
        )

    def _require_motion(self, backbone: _Backbone, origin: Origin, matched: int) -> None:
        """Raise a `StoreError` if the expert's matched parameters are identical at its first and last stored epochs.

        Call this if start and target of an iteration are identical, which by itself is no error.
        """
        expert, (start, target) = self._wanted(origin)
        group = self.experts[backbone.number].group
        epochs = group.read_info(expert).epochs
        first, last = group.read_params(expert, [epochs[0], epochs[-1]])
        if not np.array_equal(first[matched:], last[matched:]):
            return
        raise StoreError(
            f"epochs {start} and {target} of expert {expert} in {group.location.uri} are identical, and so are its "
            f"first and last, {epochs[0]} and {epochs[-1]}: it does not move, and there is nothing to match",
            "it was imported from a script that stored the same parameters at every epoch, or experts.learning_rate "
            "is too low for experts.storage",
            f"delete {group.key} with `datm-ray store rm`, then train or import these experts again",
        )

    def measured(self, state: MatchingState) -> dict[str, float]:
        """Measurements of the first backbone's last iteration, and counts so far: suffix of a metric name -> value."""
        first = state.history[-state.backbones]
        return {
            "matching_loss": first.loss,
            "step_size": first.step_size,
            "skipped_steps": state.skipped,
            "shortened_steps": state.shortened,
            "start_epoch": first.start,
            "upper_bound": self.part.config.distill.start_epochs.upper_bound(first.iteration),
        }

    def shown(self, state: MatchingState) -> dict[str, float]:
        """Loss and step size of the first backbone in the last iteration, and all backbones' skipped updates so far."""
        first = state.history[-state.backbones]
        return {"loss": first.loss, "step_size": first.step_size, "skipped": float(state.skipped)}

    def counts(self, state: MatchingState) -> dict[str, int]:
        """Counts over all iterations and backbones of the finished distillation, by name.

        "skipped" counts updates that were skipped for any reason, "diverged" those among them that were not skipped for
        a finite loss above `distill.threshold`, and "shortened" the gradients that exceeded `distill.gradient_limit`.
        """
        return {"skipped": state.skipped, "diverged": state.diverged, "shortened": state.shortened}

    def images_seen(self) -> float:
        """Average number of images in all student steps of one iteration, summed over all backbones."""
        config, settings = self.part.config, self.part.config.distill
        images = settings.ipc * self.part.dataset.classes
        batches = -(-images // min(images, settings.batch_size))  # batches of one pass; the first may be smaller
        return settings.student_steps * images / batches * len(config.weights)

    def warnings(self, state: MatchingState) -> Iterator[str]:
        """Messages for what hit over a quarter of updates: losses above the threshold, divergence, cut gradients."""
        settings = self.part.config.distill
        updates, above = len(state.history), state.skipped - state.diverged
        if 4 * above > updates:
            lower = "Try distill.initial_step_size=null, lower"
            if settings.initial_step_size is None:
                best = self._search(state, self._pairs(state.iteration))
                is_enough = min(each.loss for each in best) <= settings.skip_above
                lower = f"Try {self._better(best)}, or lower" if is_enough else "Lower"
            yield (
                f"{above} of {counted(updates, 'matching loss')} exceeded distill.threshold {settings.skip_above:g}, "
                f"and taught nothing: {self._distance(state)}. {lower} the start epochs, or "
                "see in the report whether it came all at once"
            )
        if 4 * state.diverged > updates:
            reason = "skipped because a value was not finite or a step size not positive"
            yield (
                f"{often(state.diverged, updates, 'update', reason)}: lower distill.learning_rate_images or "
                "learning_rate_step_size, or use cluster.precision=float32"
            )
        if 4 * state.shortened > updates:
            yield (
                f"{often(state.shortened, updates, 'gradient', 'shortened to distill.gradient_limit')}, "
                f"{settings.gradient_limit:g} times the loss: lower distill.learning_rate_images, or raise the limit"
            )


class MatchingTrainingTrajectories(TrajectoryMatching):
    """MTT: students start at epochs from 0 up to a fixed bound, first images are random, and labels are the classes."""

    state = HardLabelled
    soft_labels = False

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise a `ConfigError` for a recipe that the method cannot distil.

        MTT also rejects the ranges of start epochs that DATM adds: those that begin after epoch 0 or grow.
        """
        super().check(config)
        starts = config.distill.start_epochs
        if starts.first or starts.bound <= starts.last:
            range_ = f"begins at {starts.first}" if starts.first else f"grows from {starts.bound} to {starts.last + 1}"
            raise ConfigError(
                f"distill.start_epochs {range_}, and method {config.method} has a fixed range from epoch 0 on",
                "ranges by difficulty are what DATM adds",
                f"use --set 'distill.start_epochs=[0, {starts.last + 1}]', or --set method=datm",
            )

    @classmethod
    def choosing(cls, config: RunConfig, classes: int, training_images: int) -> Mapping[str, float]:
        """No work: no network sees the first images before they are matched."""
        return {"scoring": 0}


def step_options(cluster: ClusterConfig, device: torch.device) -> StepOptions:
    """Options of student steps on this device, without CUDA graphs."""
    layout, precision = channels_last_on(cluster, device), precision_on(cluster, device)
    return StepOptions(cluster.compile, channels_last=layout, precision=precision)


def rows_at_a_time(images: int, held: int, batch: int) -> int:
    """Number of images of a minibatch for which a worker plans memory, if it holds `held` of the set's images.

    Minibatches are drawn from the whole set, so the number of a worker's images in a minibatch varies. About one
    minibatch in a thousand has more than the planned number. If memory were planned for the average number, half of all
    steps would need a second call for a few images.

    Args:
        images: number of images of the whole set.
        held: number of the set's images that the worker holds.
        batch: number of images of a minibatch, over all workers.
    """
    share = held / images
    spread = math.sqrt(batch * share * (1 - share) * (images - batch) / max(1, images - 1))
    return min(held, batch, math.ceil(batch * share + 3 * spread))


def _numbers(numbers: Iterable[float], digits: int = 3) -> str:
    """Text that lists the numbers, with `digits` significant digits."""
    return listed(f"{number:.{digits}g}" for number in numbers)
