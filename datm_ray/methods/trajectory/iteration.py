"""One iteration of trajectory matching: the update, when the update is skipped, and the limit on its size.

No code here reads experts or the disk. The caller passes the parameters to match, and decides when to validate and to
save. The learned variables follow the gradient of the weighted sum of all backbones' matching losses. Each backbone has
its own weight and step size. In shapes, a is the number of backbones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.core.synthetic import AllSum, SyntheticSet, identity
from datm_ray.errors import DivergenceError
from datm_ray.methods.state import LEARNED, MOST_DIVERGED, STEP_SIZE_MOMENTUM, MetaTerm, State, not_finite, read_all
from datm_ray.methods.trajectory.matching import MatchingGradient, PlacedSteps, matching_gradient
from datm_ray.methods.trajectory.step_functions import StudentStepFunctions

MOST_ABOVE = 50
"""Number of vain iterations since the set's last update after which a distillation stops, see `MatchingState.stuck`.

An iteration is vain if the matching losses of all backbones are finite and exceed `distill.threshold`."""

InRows = Callable[[Callable[[AllSum], None]], None]
"""Type of a function that takes a function f, which matches backbones. It calls f with the sum over the class shards of
one backbone, and then waits until other workers have matched their backbones. See `Mesh.in_rows`."""


@dataclass(frozen=True)
class Match:
    """Inputs of one backbone's matching in one iteration."""

    functions: StudentStepFunctions
    start: Tensor
    """[p] expert parameters at the start epoch, from which the student starts."""
    target: Tensor
    """[p] expert parameters at the target epoch."""
    steps: PlacedSteps
    """Minibatches of the student's steps. In a class shard, each contains only the shard's own images."""
    backbone: int = 0
    weight: float = 1.0
    """Weight of this backbone's matching loss in the sum over backbones."""
    first: int = 0
    """Index of the first parameter that is matched; the loss leaves out earlier ones, see `distill.unmatched_share`."""

    @property
    def is_still(self) -> bool:
        """True if start and target are identical in all matched parameters, so that the loss is undefined."""
        return torch.equal(self.start[self.first :], self.target[self.first :])

    def gradient(
        self, synthetic: SyntheticSet, all_sum: AllSum = identity, skip_above: float = math.inf
    ) -> MatchingGradient:
        """Compute the matching loss and its gradient by `matching_gradient`.

        Args:
            synthetic: the synthetic set, or this class shard's part of it.
            all_sum: function that sums a tensor over class shards (workers with different classes).
            skip_above: a loss above this limit is not differentiated. The result then has a gradient of zeros.
        """
        return matching_gradient(
            self.functions,
            self.start,
            self.target,
            synthetic,
            self.steps,
            backbone=self.backbone,
            skip_above=skip_above,
            first=self.first,
            all_sum=all_sum,
        )


@dataclass(frozen=True)
class Origin:
    """Expert and start epoch from which a backbone's student starts in one iteration, for the history."""

    expert: int
    epoch: int
    """Start epoch of the student."""


@dataclass(frozen=True)
class IterationRecord:
    """Record of one backbone's matching in one iteration, for the history."""

    iteration: int
    backbone: int
    expert: int
    start: int
    loss: float
    """Normalised matching loss before the update; 1 means that the student came no closer to the target."""
    step_size: float
    """The student's step size after the update."""
    skipped: bool
    """True if this backbone updated nothing: its loss exceeded `distill.threshold`, or it diverged, see `diverged`."""
    decrease: float = math.nan
    """How much a step along the full gradient, before `distill.gradient_limit` shortens it, lowers the loss to first
    order: a multiple of the loss. nan if the backbone was skipped, or in records of earlier versions."""


def diverged(loss: NDArray[np.float64], skipped: NDArray[np.bool_], limit: float) -> NDArray[np.bool_]:
    """Mask [n]: True for updates that were skipped because of a divergence, not of a finite loss above `limit`.

    An update is that of one backbone in one iteration. It diverges if the loss, the gradient, MetaDD's loss or
    gradient, or an updated value is not finite, or if a step size would not stay positive.

    Args:
        loss: [n] matching loss of each update.
        skipped: [n] True for updates that were skipped for any reason.
        limit: `DistillConfig.skip_above`, above which a loss is skipped.
    """
    return skipped & ~(np.isfinite(loss) & (loss > limit))


def _since_update(records: Sequence[IterationRecord]) -> Sequence[IterationRecord]:
    """Records after the last one that was not skipped."""
    count = next((back for back, record in enumerate(reversed(records)) if not record.skipped), len(records))
    return records[len(records) - count :]


@dataclass
class MatchingState(State[IterationRecord]):
    """State of a distillation by trajectory matching. Its history has one record per backbone and iteration."""

    record: ClassVar[type[IterationRecord]] = IterationRecord

    @property
    def backbones(self) -> int:
        """Number of networks whose trajectories are matched."""
        return len(self.synthetic.step_sizes)

    @property
    def iteration(self) -> int:
        """Number of iterations done, each with one record per backbone."""
        return len(self.history) // self.backbones

    @property
    def skipped(self) -> int:
        """Number of updates, one per backbone and iteration, skipped so far for any reason."""
        return self.count("skipped", lambda new: sum(record.skipped for record in new))

    @property
    def diverged(self) -> int:
        """Number of updates, one per backbone and iteration, skipped so far by divergence, see function `diverged`."""
        return self.count("diverged", lambda new: int(self._diverged(new).sum()))

    @property
    def shortened(self) -> int:
        """Number of gradients, one per backbone and iteration, shortened so far to `distill.gradient_limit`."""
        limit = self.settings.gradient_limit or math.inf
        return self.count("shortened", lambda new: sum(record.decrease > limit for record in new))

    @property
    def stuck(self) -> int:
        """Number of vain iterations since the last update if the run must stop now; 0 if the run may continue.

        An iteration is vain if all its losses are finite and above `distill.threshold`, so that it updates nothing. The
        run must stop if the last iteration was vain and the number of vain iterations is a multiple of `MOST_ABOVE`. So
        a resumed run tries `MOST_ABOVE` more vain iterations.
        """
        since = _since_update(self.history)
        since = since[len(since) % self.backbones :]  # whole iterations
        above = self._diverged(since).reshape(-1, self.backbones).sum(axis=1) == 0
        return int(above.sum()) if above[-1:].any() and above.sum() % MOST_ABOVE == 0 else 0

    def step(
        self,
        matches: Sequence[Match],
        origins: Sequence[Origin],
        *,
        meta: MetaTerm | None = None,
        all_sum: AllSum = identity,
        sum_over_backbones: AllSum = identity,
        in_rows: InRows | None = None,
    ) -> list[IterationRecord]:
        """Run one iteration: match, update the set, append to the history.

        A backbone diverges if its loss or gradient is not finite, or if its step size would not stay positive. A
        backbone is skipped if it diverges or its loss exceeds `distill.threshold`. The other backbones update the set.
        If MetaDD's part or an updated value is not finite, all backbones are skipped. All processes decide alike.

        Args:
            matches: inputs of each backbone that this process matches; they are matched one after another.
            origins: expert and start epoch of each backbone of the run, in order, for the records.
            meta: MetaDD's inputs; `None` if this process holds no MetaDD network.
            all_sum: function that sums a tensor over a backbone's class shards (workers with different classes).
            sum_over_backbones: function that sums a tensor over the processes that hold the same images for different
                networks, this one included.
            in_rows: function that takes a function f, calls f with a sum like `all_sum`, and then waits until other
                processes have matched their backbones; `None` if no other process matches one.

        Raises:
            DivergenceError: a backbone has diverged `MOST_DIVERGED` times since its last update, or a multiple of this
                number of times. So a resumed run tries `MOST_DIVERGED` more iterations. Every shard has the set of the
                last update and the complete history.
        """
        # MetaDD comes first: processes that hold only MetaDD networks finish it while the other processes match.
        total, meta_values = self.meta_gradient(meta, all_sum, sum_over_backbones)
        outcome = self._outcome(matches, total, all_sum, in_rows)
        outcome[3] = meta_values[-1]
        outcome = sum_over_backbones(outcome)
        zeros = (name for name in LEARNED if name not in total)
        total |= {name: torch.zeros_like(self.synthetic.variable(name)) for name in zeros}
        summed = {name: sum_over_backbones(total[name]) for name in LEARNED}
        # The update is computed before it is known whether it is taken, so that the CPU waits for the GPU once.
        move = self.moved(summed, ~self._skips(outcome), all_sum)
        outcome, is_invalid, after, before, meta_values = read_all(
            outcome, move.is_invalid, move.synthetic.step_sizes, self.synthetic.step_sizes, meta_values
        )
        skipped = self._skips(outcome) | is_invalid.bool()
        is_taken = not bool(skipped.all())
        if is_taken:
            self.take(move)
            self.record_meta(meta, meta_values.tolist())
        records = self._records(origins, outcome, after if is_taken else before, skipped)
        self.history += records
        self._require_progress(bool(outcome[3].any()))
        return records

    def _outcome(
        self, matches: Sequence[Match], total: dict[str, Tensor], all_sum: AllSum, in_rows: InRows | None
    ) -> Tensor:
        """Add the gradients of this process's backbones to `total`. Returns the outcome [4 a] of the a backbones.

        Its rows are the loss, the first-order decrease, a number that is not 0 if the backbone diverged, and zeros. The
        caller replaces the last row by MetaDD's. Backbones of other processes have zeros in all rows.

        Args:
            total: learned variable -> sum of gradients, to which this method adds in place.
            matches: inputs of each backbone that this process matches.
            all_sum, in_rows: as for `step`.
        """
        outcome = torch.zeros(4, self.backbones, dtype=torch.float64, device=self.synthetic.images.device)

        def match_all(all_sum: AllSum) -> None:
            for match in matches:
                for row, value in enumerate(self._match(match, total, all_sum)):
                    outcome[row, match.backbone] = value

        if in_rows is None:
            match_all(all_sum)
        else:
            in_rows(match_all)
        return outcome

    def _records(
        self, origins: Sequence[Origin], outcome: Tensor, step_sizes: Tensor, skipped: Tensor
    ) -> list[IterationRecord]:
        """Make this iteration's records, one per backbone.

        Args:
            outcome: [4 a] loss, first-order decrease, and two numbers that are not read here.
            step_sizes: [a] step sizes after the iteration.
            skipped: [a] True for backbones that updated nothing.
        """
        decreases = outcome[1].masked_fill(skipped, math.nan)
        columns = [each.tolist() for each in (outcome[0], step_sizes, skipped, decreases)]
        return [
            IterationRecord(self.iteration, number, origin.expert, origin.epoch, *rest)
            for number, (origin, *rest) in enumerate(zip(origins, *columns, strict=True))
        ]

    def _skips(self, outcome: Tensor) -> Tensor:
        """Mask [a]: True for each backbone to skip.

        A backbone is skipped if its loss exceeds `distill.threshold`, if it diverged, or MetaDD's loss or gradient is
        not finite.

        Args:
            outcome: [4 a] four numbers for each of the a backbones: loss, the first-order decrease (not read here), a
                number that is not 0 if the backbone diverged, and a number that is not 0 if MetaDD's loss or gradient
                is not finite.
        """
        losses, _, unusable, lost = outcome
        skipped: Tensor = (losses > self.settings.skip_above) | (unusable > 0) | (lost > 0)
        return skipped

    def _diverged(self, records: Sequence[IterationRecord]) -> NDArray[np.bool_]:
        losses, skipped = [record.loss for record in records], [record.skipped for record in records]
        return diverged(np.array(losses, np.float64), np.array(skipped, np.bool_), self.settings.skip_above)

    def _require_progress(self, is_lost: bool) -> None:
        """Raise a `DivergenceError` if a backbone diverged k * `MOST_DIVERGED` times (k >= 1) since its last update.

        Args:
            is_lost: True if MetaDD's loss or gradient was not finite in this iteration, for the message.
        """
        for number in np.flatnonzero(self._diverged(self.history[-self.backbones :])).tolist():
            own = self.history[number :: self.backbones]
            times = int(self._diverged(_since_update(own)).sum())
            if times % MOST_DIVERGED == 0:
                raise self._divergence(times, own[-1].loss, is_lost)

    def _match(
        self, match: Match, total: dict[str, Tensor], all_sum: AllSum
    ) -> tuple[float, Tensor | float, Tensor | float]:
        """Add a backbone's weighted gradient to `total`, unless it diverges or its loss exceeds `distill.threshold`.

        Returns:
            The backbone's loss, then its first-order decrease [] (see `_shorten`; nan if nothing was added), then a
            number [] that is not 0 if the backbone diverged.
        """
        gradient = match.gradient(self.synthetic, all_sum, skip_above=self.settings.skip_above)
        if not gradient.loss <= self.settings.skip_above:
            return gradient.loss, math.nan, float(not math.isfinite(gradient.loss))
        gradient = replace(gradient, images=self.pulled_back(gradient.images))
        decrease = self._shorten(match, gradient, all_sum)
        has_diverged = decrease.isnan() | ~self._stays_positive(match, gradient)
        step_sizes = torch.zeros_like(self.synthetic.step_sizes)
        step_sizes[match.backbone] = gradient.step_size
        for name, value in zip(LEARNED, (gradient.images, gradient.soft_labels, step_sizes), strict=True):
            # In place, because the gradient may be large. Adding -0 changes no bit of any number.
            weighted = value.mul_(match.weight).masked_fill_(has_diverged, -0.0)
            total[name] = total[name].add_(weighted) if name in total else weighted
        return gradient.loss, decrease.masked_fill(has_diverged, math.nan), has_diverged

    def _shorten(self, match: Match, gradient: MatchingGradient, all_sum: AllSum) -> Tensor:
        """Shorten a backbone's gradient, in place, if its first-order decrease exceeds `distill.gradient_limit`.

        The first-order decrease is how much one step of SGD without momentum lowers the loss, to first order: the sum
        over the learned variables of learning rate times squared gradient norm. docs/methods/datm.md explains the
        limit.

        Returns:
            [] the first-order decrease before shortening, as a multiple of the loss; nan if the gradient is not finite
            in any shard.
        """
        # A norm, unlike a sum of squares, makes no copy of the images. Squares of large norms need float64.
        images, labels = (
            torch.linalg.vector_norm(each).double().square() for each in (gradient.images, gradient.soft_labels)
        )
        rates, limit = self.rates, self.settings.gradient_limit
        fall = rates["images"] * images + rates["soft_labels"] * labels
        bad = not_finite(gradient.images, gradient.soft_labels, gradient.step_size).double()
        fall, bad = all_sum(torch.stack([fall, bad]))
        fall = fall + rates["step_sizes"] * gradient.step_size.double().square()
        # Divisors are tensors, because a GPU divides by a number less exactly.
        share = match.weight * fall / torch.full_like(fall, gradient.loss)
        decrease = (share if gradient.loss else torch.zeros_like(fall)).masked_fill(bad > 0, math.nan)
        if limit is not None:
            factor = torch.where(decrease > limit, torch.full_like(decrease, limit) / decrease, 1.0)
            for each in (gradient.images, gradient.soft_labels, gradient.step_size):
                each.mul_(factor.to(each.dtype))
        return decrease

    def _stays_positive(self, match: Match, gradient: MatchingGradient) -> Tensor:
        """Bool tensor []: True if an update leaves the backbone's step size positive; the same in every shard."""
        moved = match.weight * gradient.step_size
        if "step_sizes" in self.momenta:
            moved = moved + STEP_SIZE_MOMENTUM * self.momenta["step_sizes"][match.backbone]
        return self.synthetic.step_sizes[match.backbone] - self.rates["step_sizes"] * moved > 0

    def _divergence(self, times: int, loss: float, is_lost: bool) -> DivergenceError:
        if is_lost:
            what, cause = (
                "MetaDD's loss or gradient",
                "a weight under metadd is too large, or an auxiliary is untrained",
            )
            lower = "metadd.variance, invariance or position"
        else:
            what = "its gradient, an updated value or a step size" if math.isfinite(loss) else "its matching loss"
            cause = "a learning rate is too high for these experts, or a product overflows in cluster.precision"
            lower = "distill.learning_rate_images or learning_rate_step_size"
        return DivergenceError(
            f"distillation diverged {times} times without an update up to iteration {self.iteration}: {what} "
            "is not finite, or not positive",
            cause,
            f"lower {lower} and start with a new --out. The set of the last update is saved as last-good.arrow. "
            f"Running the same command again tries {MOST_DIVERGED} more iterations",
        )


class HardLabelled(MatchingState):
    """State of a distillation whose labels stay the classes, whatever `distill.labels` says (MTT)."""

    @property
    def rates(self) -> dict[str, float]:
        """Learned variable -> learning rate; 0 for the labels."""
        return super().rates | {"soft_labels": 0.0}
