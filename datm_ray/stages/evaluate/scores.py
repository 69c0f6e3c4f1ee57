"""Scores of a run, read from the results of its evaluation: rows, other architectures, and DD-Ranking's scores.

`stages.evaluate.rows` writes the results. Tests: tests/stages/evaluate/test_evaluate.py.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datm_ray.artifact import SCORING
from datm_ray.config import NetworkConfig, RunConfig
from datm_ray.core.scores import augmentation_robust, label_robust
from datm_ray.monitor.spent import Spent, total
from datm_ray.stages.evaluate.rows import (
    FAIR_ROWS,
    FIXED_ROWS,
    ON_OTHERS,
    TABLE_ROWS,
    has_learned_step_size,
    is_taught,
    result_location,
    row_schedule,
)
from datm_ray.store.files.filesystem import Location
from datm_ray.store.sealed import rejecting_nonsense


@dataclass(frozen=True)
class Score:
    """Test accuracy of one row of the accuracy table over several seeds."""

    row: str
    """Name of the row: a key of `ALL_ROWS` in `stages.evaluate.rows`."""
    accuracies: tuple[float, ...]
    """Test accuracies in [0, 1], one per seed."""
    spent: Spent
    """Cost of training and testing the row's networks, summed over seeds."""

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        """Mean test accuracy over seeds, in [0, 1]."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds of the accuracies, in their unit (not percent); nan for one seed."""
        return statistics.stdev(self.accuracies) if self.n > 1 else math.nan

    def __str__(self) -> str:
        """Mean ± standard deviation in percent, such as "47.1 ± 0.3"; the mean alone for one seed."""
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f}" if self.n > 1 else f"{100 * self.mean:.1f}"


@dataclass(frozen=True)
class NetworkScores:
    """Scores of a set on one network of `evaluate.networks`."""

    network: NetworkConfig
    kind: str
    """"same": the backbone; "seen": matched or a MetaDD network of the distillation; "unseen": neither."""
    learned: Score | None
    """Score with the learned step size; `None` if none was learned, as with another optimiser or a teacher's labels."""
    tuned: Score
    """Score with a step size chosen on validation data, which may be the learned one."""
    control: Score | None
    """Score of random real images with a tuned step size; `None` if unfinished.

    The images have soft labels if experts exist, otherwise hard labels."""


def read_network_scores(out: Location, config: RunConfig, dataset_fingerprint: str) -> list[NetworkScores]:
    """Scores of the distilled set on every network of `evaluate.networks`, in the recipe's order.

    Read from results in the output folder `out`. Networks for which a seed of the distilled set is unfinished are left
    out.

    Raises:
        CorruptFileError: the file of a result is damaged.
    """
    scores = []
    for network in config.scored_networks:
        rows = (*ON_OTHERS, "random-hard")
        results = {row: _read_all_seeds(out, config, dataset_fingerprint, row, network) for row in rows}
        if distilled := results["distilled"]:
            learned = [dataclasses.replace(each, accuracy=each.with_learned_step_size) for each in distilled]
            with_learned = _score("distilled", learned) if has_learned_step_size(config, "distilled") else None
            row = "random-soft" if results["random-soft"] else "random-hard"
            control = _score(row, results[row]) if results[row] else None
            tuned = _score("distilled", distilled)
            scores.append(NetworkScores(network, _kind(network, config), with_learned, tuned, control))
    return scores


@dataclass(frozen=True)
class _Result:
    """Content of the result file of one seed of a row of the accuracy table."""

    accuracy: float
    """Test accuracy with the chosen step size, in [0, 1]."""
    with_learned_step_size: float
    """Test accuracy in [0, 1] with the step size learned with the set; nan if none was learned."""
    spent: Spent
    step_size: float
    """Chosen step size."""

    @classmethod
    def read(cls, place: Location) -> _Result:
        content = place.read_json()
        with rejecting_nonsense(place):
            learned = content["test_accuracy_with_learned_step_size"]
            return cls(
                float(content["test_accuracy"]),
                math.nan if learned is None else float(learned),
                Spent.from_json(content["cost"]),
                float(content["step_size"]),
            )


def note_scoring(out: Location, config: RunConfig, dataset_fingerprint: str) -> None:
    """Write into the run's folder how the networks of the row "distilled" were trained, for users who load the set.

    The file has the step size that most seeds chose; of equally frequent ones, that of the lowest seed number. Nothing
    is written while a seed has no result in the output folder `out`.

    Raises:
        CorruptFileError: the file of a result is damaged.
    """
    results = _read_all_seeds(out, config, dataset_fingerprint, "distilled")
    if not results:
        return
    chosen = statistics.mode(each.step_size for each in results)
    schedule = dataclasses.replace(row_schedule(config, "distilled"), learning_rate=chosen)
    if is_taught(config, "distilled"):
        schedule = dataclasses.replace(schedule, temperature=config.evaluate.temperature)
    (out / config.name / SCORING).write_json(schedule.to_json())


def _read_all_seeds(
    out: Location, config: RunConfig, dataset_fingerprint: str, row: str, network: NetworkConfig | None = None
) -> list[_Result]:
    """Results of all seeds of a row of the accuracy table; empty if the result of any seed is missing."""
    seeds = range(config.evaluate.seeds)
    places = [result_location(out, config, dataset_fingerprint, row, number, network) for number in seeds]
    return [_Result.read(place) for place in places] if all(place.exists() for place in places) else []


def _kind(network: NetworkConfig, config: RunConfig) -> str:
    if network == config.network:
        return "same"
    seen = [*(backbone.network for backbone in config.backbones), *(each.network for each in config.each_auxiliary())]
    return "seen" if network in seen else "unseen"


def read_scores(out: Location, config: RunConfig, dataset_fingerprint: str) -> list[Score]:
    """Scores of the rows of the accuracy table for which every seed is finished, in the order of `TABLE_ROWS`.

    Read from results in the output folder `out`; rows of `FIXED_ROWS` only if the recipe sets `evaluate.fixed_labels`.

    Raises:
        CorruptFileError: the file of a result is damaged.
    """
    rows = [row for row in TABLE_ROWS if config.evaluate.fixed_labels or row not in FIXED_ROWS]
    return [score for row in rows if (score := read_score(out, config, dataset_fingerprint, row))]


FAIR_PARTS = {
    "LRS": "label-robust score",
    "HLR": "hard-label recovery: all real data − distilled, both with hard labels; lower is better",
    "IOR": "improvement over random: distilled − random real images, both with soft labels",
    "ARS": "augmentation-robust score",
    "beta": "distilled − random real images, mean of augmented and not",
}
"""Name of each of DD-Ranking's two scores (LRS, ARS) and of the differences that they combine -> meaning."""

FairScores = Mapping[str, tuple[float, ...]]
"""DD-Ranking's scores of a set and their parts: key of `FAIR_PARTS` -> one value per seed."""


def read_fair_scores(out: Location, config: RunConfig, dataset_fingerprint: str) -> FairScores | None:
    """DD-Ranking's scores, computed from results in the output folder `out`.

    `None` if the recipe does not set `evaluate.fair`, or a row that they need is unfinished.

    Raises:
        CorruptFileError: the file of a result is damaged.
    """
    if not config.evaluate.fair:
        return None
    rows = ("full", "random-soft", "distilled", "distilled-hard", "distilled-plain", "random-plain")
    found = [_read_all_seeds(out, config, dataset_fingerprint, row) for row in rows]
    if not all(found):
        return None
    seeds = []
    for of_seed in zip(*found, strict=True):
        real, random, own, hard, plain, random_plain = (result.accuracy for result in of_seed)
        label = label_robust(real_hard=real, distilled_hard=hard, distilled=own, random_soft=random)
        seeds.append(
            label | augmentation_robust(distilled=own, random=random, distilled_plain=plain, random_plain=random_plain)
        )
    return {name: tuple(each[name] for each in seeds) for name in FAIR_PARTS}


def read_fair_rows(out: Location, config: RunConfig, dataset_fingerprint: str) -> list[Score]:
    """Scores of the rows in `FAIR_ROWS` for which every seed is finished; empty without `evaluate.fair`.

    Read from results in the output folder `out`.

    Raises:
        CorruptFileError: the file of a result is damaged.
    """
    rows = FAIR_ROWS if config.evaluate.fair else ()
    return [score for row in rows if (score := read_score(out, config, dataset_fingerprint, row))]


def read_score(
    out: Location, config: RunConfig, dataset_fingerprint: str, row: str, network: NetworkConfig | None = None
) -> Score | None:
    """Read the score of one row of the accuracy table; `None` unless every seed has a result.

    Args:
        out: output folder of the run.
        dataset_fingerprint: fingerprint of the run's data set.
        row: key of `ALL_ROWS` in `stages.evaluate.rows`.
        network: scored network of `evaluate.networks`, trained with the step size that is best on validation data;
            `None` for the backbone.

    Raises:
        CorruptFileError: the file of a result is damaged.
    """
    results = _read_all_seeds(out, config, dataset_fingerprint, row, network)
    return _score(row, results) if results else None


def _score(row: str, results: Sequence[_Result]) -> Score:
    return Score(row, tuple(each.accuracy for each in results), total(each.spent for each in results))
