"""One iteration of trajectory matching: the update, when it is skipped, and the limit on its size.

No code here reads experts or the disk. The caller passes the parameters to match, and decides when to validate and to
save. The learned variables follow the gradient of the sum of all backbones' matching losses; each backbone has a weight
and a step size. In shapes, a is the number of backbones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.core.synthetic import AllSum, SyntheticSet, identity
from datm_ray.errors import DivergenceError
from datm_ray.methods.state import LEARNED, MOST_DIVERGED, STEP_SIZE_MOMENTUM, MetaTerm, State, not_finite
from datm_ray.methods.trajectory.matching import MatchingGradient, StudentStep, matching_gradient
from datm_ray.methods.trajectory.step_functions import StudentStepFunctions

MOST_ABOVE = 50
"""A distillation stops when this many iterations since its last update had no loss below the threshold."""

InRows = Callable[[Callable[[AllSum], None]], None]
"""Runs work that only the class shards of one backbone share, see `Mesh.in_rows`."""


@dataclass(frozen=True)
class Match:
    """Inputs of one backbone's matching in one iteration."""

    functions: StudentStepFunctions
    start: Tensor
    """[p] expert parameters at the start epoch, from which the student starts."""
    target: Tensor
    """[p] expert parameters at the target epoch."""
    steps: Sequence[StudentStep]
    """Minibatches of the student; in a class shard, the rows of them that it holds."""
    backbone: int = 0
    weight: float = 1.0
    """Weight of this backbone's matching loss in the sum."""
    chunk: int | None = None
    """Images per call of the step functions; None for a whole minibatch, see `matching_gradient`."""

    def gradient(
        self, synthetic: SyntheticSet, all_sum: AllSum = identity, skip_above: float = math.inf
    ) -> MatchingGradient:
        """The matching loss and its gradient, see `matching_gradient`."""
        return matching_gradient(
            self.functions,
            self.start,
            self.target,
            synthetic,
            self.steps,
            backbone=self.backbone,
            chunk=self.chunk,
            skip_above=skip_above,
            all_sum=all_sum,
        )


@dataclass(frozen=True)
class Origin:
    """Source of the parameters that a backbone matched."""

    expert: int
    epoch: int
    """Start epoch of the student."""


@dataclass(frozen=True)
class IterationRecord:
    """One row of the run's history: one backbone in one iteration."""

    iteration: int
    backbone: int
    expert: int
    start: int
    loss: float
    """Normalised matching loss."""
    step_size: float
    """The student's step size after the update."""
    skipped: bool
    """True if this backbone updated nothing: its loss exceeded the limit, or it diverged, see `diverged`."""
    decrease: float = math.nan
    """First-order decrease before the gradient was shortened, in multiples of the loss. nan if the backbone was
    skipped, or if an earlier version saved the record."""


def diverged(loss: NDArray[np.float64], skipped: NDArray[np.bool_], limit: float) -> NDArray[np.bool_]:
    """Mask of the iterations that were skipped for another reason than a finite loss above the limit.

    Then the loss, the gradient, MetaDD's part or an updated value was not finite, or a step size would not have stayed
    positive.
    """
    return skipped & ~(np.isfinite(loss) & (loss > limit))


def _since_update(records: Sequence[IterationRecord]) -> Sequence[IterationRecord]:
    """Last records, after the last one that was not skipped."""
    count = next((back for back, record in enumerate(reversed(records)) if not record.skipped), len(records))
    return records[len(records) - count :]


@dataclass
class Distillation(State[IterationRecord]):
    """State of a distillation by trajectory matching. Its history has a record for each backbone in an iteration."""

    record: ClassVar[type[IterationRecord]] = IterationRecord

    @property
    def backbones(self) -> int:
        """Number of networks that are matched."""
        return len(self.synthetic.step_sizes)

    @property
    def iteration(self) -> int:
        """Number of iterations done."""
        return len(self.history) // self.backbones

    @property
    def skipped(self) -> int:
        """Number of updates skipped, for any reason."""
        return sum(record.skipped for record in self.history)

    @property
    def diverged(self) -> int:
        """Number of updates skipped for another reason than a finite loss above the limit, see `diverged`."""
        return int(self._diverged(self.history).sum())

    @property
    def shortened(self) -> int:
        """Number of gradients that were shortened, see `DistillConfig.gradient_limit`."""
        limit = self.settings.gradient_limit or math.inf
        return sum(record.decrease > limit for record in self.history)

    @property
    def stuck(self) -> int:
        """Number of iterations since the last update whose losses all exceeded the limit; 0 unless the limit is due.

        The limit is due at every multiple of `MOST_ABOVE`, so that a run that is resumed tries as many again.
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
        backbone that diverges, or whose loss exceeds the limit, is skipped, and the others are updated. If MetaDD's
        part or an updated value is not finite, all are skipped. All shards and backbones decide alike.

        Args:
            matches: one per backbone that this process computes, in sequence.
            origins: one per backbone of the run, in order.
            meta: MetaDD's inputs; None if this process holds no MetaDD network.
            all_sum: sum over the class shards of a backbone.
            sum_over_backbones: sum over the processes that hold the same rows for other networks.
            in_rows: calls its argument with an `all_sum` of its own, and knows how to wait for other backbones; None if
                no process waits.

        Raises:
            DivergenceError: a backbone has diverged `MOST_DIVERGED` times since its last update, or a multiple of that,
                so that another call tries as many again. In every shard the set is that of the last update and the
                history is complete.
        """
        # MetaDD first, so that processes with MetaDD networks alone finish it while the others match.
        total, meta_records, is_lost = self.meta_gradient(meta, all_sum, sum_over_backbones)
        outcome = torch.zeros(4, self.backbones, dtype=torch.float64)

        def match_all(all_sum: AllSum) -> None:
            for match in matches:
                outcome[:3, match.backbone] = torch.tensor(self._match(match, total, all_sum), dtype=torch.float64)

        if in_rows is None:
            match_all(all_sum)
        else:
            in_rows(match_all)
        outcome[3] = is_lost
        losses, decreases, unusable, lost = sum_over_backbones(outcome.to(self.synthetic.images.device)).cpu()
        skipped = (losses > self.settings.threshold) | (unusable > 0) | (lost > 0)
        if not bool(skipped.all()):
            zeros = (name for name in LEARNED if name not in total)
            total |= {name: torch.zeros_like(getattr(self.synthetic, name)) for name in zeros}
            summed = {name: sum_over_backbones(total[name]) for name in LEARNED}
            if self.update(summed, ~skipped.to(self.synthetic.step_sizes.device), all_sum):
                self.meta_history += meta_records
            else:
                skipped.fill_(True)
        decreases[skipped] = math.nan
        records = self._records(origins, losses, skipped, decreases)
        self.history += records
        self._require_progress(bool(lost.any()))
        return records

    def _records(
        self, origins: Sequence[Origin], losses: Tensor, skipped: Tensor, decreases: Tensor
    ) -> list[IterationRecord]:
        """Records of this iteration, one per backbone."""
        columns = [each.tolist() for each in (losses, self.synthetic.step_sizes, skipped, decreases)]
        return [
            IterationRecord(self.iteration, number, origin.expert, origin.epoch, *rest)
            for number, (origin, *rest) in enumerate(zip(origins, *columns, strict=True))
        ]

    def _diverged(self, records: Sequence[IterationRecord]) -> NDArray[np.bool_]:
        losses, skipped = [record.loss for record in records], [record.skipped for record in records]
        return diverged(np.array(losses, np.float64), np.array(skipped, np.bool_), self.settings.threshold)

    def _require_progress(self, is_lost: bool) -> None:
        """Raise a `DivergenceError` if a backbone has diverged too often since its last update."""
        for number in np.flatnonzero(self._diverged(self.history[-self.backbones :])).tolist():
            own = self.history[number :: self.backbones]
            times = int(self._diverged(_since_update(own)).sum())
            if times % MOST_DIVERGED == 0:
                raise self._divergence(times, own[-1].loss, is_lost)

    def _match(self, match: Match, total: dict[str, Tensor], all_sum: AllSum) -> tuple[float, float, bool]:
        """Add a backbone's gradient to `total`. Returns its loss, first-order decrease, and whether it diverged.

        Nothing is added if the backbone has diverged or its loss exceeds the limit.
        """
        gradient = match.gradient(self.synthetic, all_sum, skip_above=self.settings.threshold)
        if not gradient.loss <= self.settings.threshold:
            return gradient.loss, math.nan, not math.isfinite(gradient.loss)
        decrease = self._shorten(match, gradient, all_sum)
        if math.isnan(decrease) or not self._stays_positive(match, gradient):
            return gradient.loss, math.nan, True
        step_sizes = torch.zeros_like(self.synthetic.step_sizes)
        step_sizes[match.backbone] = gradient.step_size
        for name, value in zip(LEARNED, (gradient.images, gradient.soft_labels, step_sizes), strict=True):
            weighted = value.mul_(match.weight)  # in place: its memory becomes the sum's, because it may be large
            total[name] = total[name].add_(weighted) if name in total else weighted
        return gradient.loss, decrease, False

    def _shorten(self, match: Match, gradient: MatchingGradient, all_sum: AllSum) -> float:
        """Shorten a backbone's gradient to its limit. Returns the first-order decrease before that.

        The first-order decrease is that of one step of SGD without momentum: the sum over the learned variables of
        learning rate times squared gradient norm. It is in multiples of the loss, and nan if the gradient is not finite
        in any shard. Limits are explained in docs/methods/datm.md.
        """
        # Norms make no copy of the images, which may be large. Squares of long ones need float64.
        images, labels = (
            torch.linalg.vector_norm(each).double().square() for each in (gradient.images, gradient.soft_labels)
        )
        rates, limit = self.rates, self.settings.gradient_limit or math.inf
        fall = rates["images"] * images + rates["soft_labels"] * labels
        fall, bad = all_sum(
            torch.stack([fall, not_finite(gradient.images, gradient.soft_labels, gradient.step_size).double()])
        )
        if bool(bad):
            return math.nan
        fall = fall + rates["step_sizes"] * gradient.step_size.double().square()
        decrease = match.weight * float(fall) / gradient.loss if gradient.loss else 0.0
        if decrease > limit:
            for each in (gradient.images, gradient.soft_labels, gradient.step_size):
                each.mul_(limit / decrease)
        return decrease

    def _stays_positive(self, match: Match, gradient: MatchingGradient) -> bool:
        """True if an update leaves the backbone's step size positive; every shard finds the same."""
        moved = match.weight * gradient.step_size
        if "step_sizes" in self.momenta:
            moved = moved + STEP_SIZE_MOMENTUM * self.momenta["step_sizes"][match.backbone]
        return bool(self.synthetic.step_sizes[match.backbone] - self.rates["step_sizes"] * moved > 0)

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
