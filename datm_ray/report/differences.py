"""Settings in which the runs of one accuracy table differ, so that no column is compared with another unawares.

Tests: tests/test_report.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from datm_ray.config import RunConfig, short_names
from datm_ray.stages.evaluate.rows import row_schedule


def differences(configs: Sequence[RunConfig]) -> list[str]:
    """Lines on the scored network and on the training of the networks, each if the runs differ in it.

    A line has the settings that differ, and behind each value the names of its runs in brackets.
    """
    names = [config.name for config in configs]
    networks = short_names([config.network for config in configs])
    lines = {"network": networks, "training": _differing([_training(config) for config in configs])}
    return [f"{title}: {_by_value(values, names)}" for title, values in lines.items() if len(set(values)) > 1]


def _by_value(values: Sequence[str], names: Sequence[str]) -> str:
    """Each value once, with the names of its runs, such as "convnet (one, two); lenet (three)"."""
    runs: dict[str, list[str]] = {}
    for value, name in zip(values, names, strict=True):
        runs.setdefault(value, []).append(name)
    return "; ".join(f"{value} ({', '.join(found)})" for value, found in runs.items())


def _differing(trainings: Sequence[Sequence[str]]) -> list[str]:
    """Text of each training: its parts that are not equal in all of them."""
    kept = [number for number, parts in enumerate(zip(*trainings, strict=True)) if len(set(parts)) > 1]
    return [", ".join(parts[number] for number in kept) for parts in trainings]


def _training(config: RunConfig) -> list[str]:
    """Parts of a run's training in words, the same ones for every run; all but the last are of the row "distilled"."""
    settings, schedule = config.evaluate, row_schedule(config, "distilled")
    rate = "learned or chosen" if settings.learning_rate is None else f"{settings.learning_rate:g}"
    labels = {"own": "the set's labels", "teacher": "a teacher's labels", "stored": "stored labels"}[settings.labels]
    teachers = [f"{each.experts.epochs} epochs of {each.network.architecture}" for each in config.own_teacher()]
    labels += f" ({teachers[0]})" if teachers else ""
    taught = f" at temperature {settings.temperature:g}, CutMix {settings.cutmix:g}" if settings.has_teacher else ""
    return [
        f"{schedule.epochs:,} epochs",
        f"batches of {schedule.batch_size:,}",
        {"sgd": "SGD", "adamw": "AdamW"}[schedule.optimiser],
        f"learning rate {rate}",
        "cosine decay" if schedule.cosine else "one decay halfway",
        f"{schedule.warmup_epochs:,} warm-up epochs",
        f"weight decay {schedule.weight_decay:g}",
        f"augmentation {schedule.augmentation}" if schedule.augmentation else "no augmentation",
        labels + taught,
        f"{settings.real_epochs:,} epochs on all real data",
    ]
