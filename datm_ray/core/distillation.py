"""One distillation as a value that can be stepped, saved and restored.

Holds the synthetic set, the optimisers' momenta, the iteration counter, the loss curve and the set chosen on
validation data: everything that a checkpoint must carry. Reads no experts and no disk; the caller hands over the
parameters to match and decides when to validate and to save.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.core.matching import (
    AllSum,
    MatchingGradient,
    StudentStep,
    StudentStepFunctions,
    identity,
    matching_gradient,
)
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.errors import DivergenceError

IMAGE_MOMENTUM, LABEL_MOMENTUM, STEP_SIZE_MOMENTUM = 0.5, 0.9, 0.5
"""Momenta of the three SGD optimisers, as published."""

LEARNED = ("images", "soft_labels", "step_size")


@dataclass(frozen=True)
class LearningRates:
    """Of SGD on the three learned variables."""

    images: float
    soft_labels: float
    step_size: float


@dataclass(frozen=True)
class IterationRecord:
    """One row of the run's history."""

    iteration: int
    expert: int
    start: int
    loss: float
    """Normalised matching loss."""
    step_size: float
    """After the update."""
    skipped: bool
    """Whether the loss exceeded the threshold, so that nothing was updated."""


@dataclass
class Distillation:
    """The state of one distillation."""

    synthetic: SyntheticSet
    rates: LearningRates
    threshold: float
    momenta: dict[str, Tensor] = field(default_factory=dict)
    """One buffer per learned variable, empty before the first update."""
    history: list[IterationRecord] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    """(iterations done, validation accuracy)."""
    chosen: SyntheticSet | None = None
    """The set chosen on validation data so far."""
    chosen_at: int = 0
    """Iterations done when it was chosen."""

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return len(self.history)

    @property
    def skipped(self) -> int:
        """Iterations skipped because their loss exceeded the threshold."""
        return sum(record.skipped for record in self.history)

    def step(
        self,
        functions: StudentStepFunctions,
        expert: int,
        start: int,
        parameters: tuple[Tensor, Tensor],
        steps: Sequence[StudentStep],
        *,
        all_sum: AllSum = identity,
    ) -> IterationRecord:
        """One iteration: match `parameters` = (start, target), update the set, append to the history.

        Raises:
            DivergenceError: the loss, a gradient or an updated value is not finite, or the step size is not
                positive. The state is then the one before this iteration.
        """
        gradient = matching_gradient(functions, *parameters, self.synthetic, steps, all_sum=all_sum)
        if not math.isfinite(gradient.loss):
            raise self._divergence("its matching loss is not finite")
        skipped = gradient.loss > self.threshold
        if not skipped:
            self._update(gradient)
        record = IterationRecord(self.iteration, expert, start, gradient.loss, float(self.synthetic.step_size), skipped)
        self.history.append(record)
        return record

    def record_validation(self, accuracy: float, standard_error: float = 0.0) -> bool:
        """Note the accuracy of the current set and choose the set if it is not clearly worse than an earlier one.

        Not clearly worse: within one standard error of the best accuracy so far. Validation sets are small, so the
        highest of many noisy accuracies says little; what must be caught is a collapse, and otherwise the set that
        was optimised longest is the one to have.

        Args:
            accuracy: in [0, 1].
            standard_error: of an accuracy measured on so many validation images.

        Returns:
            Whether the current set was chosen.
        """
        best = max((earlier for _, earlier in self.validations), default=accuracy)
        is_chosen = accuracy >= best - standard_error
        self.validations.append((self.iteration, accuracy))
        if is_chosen:
            self.chosen, self.chosen_at = self.synthetic.clone(), self.iteration
        return is_chosen

    def _update(self, gradient: MatchingGradient) -> None:
        if not gradient.is_finite():
            raise self._divergence("its gradient is not finite")
        updated, momenta = self.synthetic.clone(), {}
        for name, momentum in zip(LEARNED, (IMAGE_MOMENTUM, LABEL_MOMENTUM, STEP_SIZE_MOMENTUM), strict=True):
            buffer = getattr(gradient, name)
            if name in self.momenta:
                buffer = momentum * self.momenta[name] + buffer
            momenta[name] = buffer
            getattr(updated, name).sub_(getattr(self.rates, name) * buffer)
        if not updated.is_valid():
            raise self._divergence(f"it would make the step size {float(updated.step_size):.3g}")
        self.synthetic, self.momenta = updated, momenta

    def _divergence(self, what: str) -> DivergenceError:
        return DivergenceError(
            f"distillation diverged at iteration {self.iteration}: {what}",
            "a learning rate is too high for these experts",
            "lower distill.learning_rate_images or learning_rate_step_size and start with a new --out; "
            "the set as it was before is saved as last-good.arrow",
        )

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """The whole state as named arrays, for a checkpoint."""
        arrays = {f"synthetic.{name}": value for name, value in _set_arrays(self.synthetic).items()}
        arrays |= {f"momentum.{name}": _to_numpy(value) for name, value in self.momenta.items()}
        if self.chosen is not None:
            arrays |= {f"chosen.{name}": value for name, value in _set_arrays(self.chosen).items()}
        for column in HISTORY_COLUMNS:
            arrays[f"history.{column}"] = np.array(
                [getattr(record, column) for record in self.history], HISTORY_COLUMNS[column]
            )
        arrays["validation.iteration"] = np.array([iteration for iteration, _ in self.validations], np.int64)
        arrays["validation.accuracy"] = np.array([accuracy for _, accuracy in self.validations], np.float64)
        arrays["validation.chosen_at"] = np.array(self.chosen_at, np.int64)
        return arrays

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, NDArray[np.generic]],
        rates: LearningRates,
        threshold: float,
        device: torch.device,
    ) -> Distillation:
        """The state that `to_arrays` saved."""
        columns = [arrays[f"history.{column}"].tolist() for column in HISTORY_COLUMNS]
        return cls(
            synthetic=_set_from(arrays, "synthetic", device),
            rates=rates,
            threshold=threshold,
            momenta={
                name: _to_torch(arrays[f"momentum.{name}"], device) for name in LEARNED if f"momentum.{name}" in arrays
            },
            history=[IterationRecord(*row) for row in zip(*columns, strict=True)],
            validations=list(
                zip(
                    arrays["validation.iteration"].tolist(),
                    arrays["validation.accuracy"].tolist(),
                    strict=True,
                )
            ),
            chosen=_set_from(arrays, "chosen", device) if "chosen.images" in arrays else None,
            chosen_at=int(arrays["validation.chosen_at"]),
        )


HISTORY_COLUMNS: dict[str, type[np.generic]] = {
    "iteration": np.int64,
    "expert": np.int64,
    "start": np.int64,
    "loss": np.float64,
    "step_size": np.float64,
    "skipped": np.bool_,
}
"""Columns of the history in a checkpoint, in the order of `IterationRecord`'s fields."""


def _set_arrays(synthetic: SyntheticSet) -> dict[str, NDArray[np.generic]]:
    return {name: _to_numpy(getattr(synthetic, name)) for name in (*LEARNED, "labels")}


def _set_from(arrays: Mapping[str, NDArray[np.generic]], prefix: str, device: torch.device) -> SyntheticSet:
    return SyntheticSet(**{name: _to_torch(arrays[f"{prefix}.{name}"], device) for name in (*LEARNED, "labels")})


def _to_numpy(tensor: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = tensor.detach().cpu().numpy()
    return array


def _to_torch(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.tensor(array, device=device)  # a copy: the array may be a read-only view of a file
