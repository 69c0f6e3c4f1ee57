"""Settings in which the runs of one accuracy table differ, so that no column is compared with another unawares.

Tests: tests/test_report.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from datm_ray.config import RunConfig, short_names
from datm_ray.config.sections import TeacherConfig
from datm_ray.stages.evaluate.rows import ROWS, row_schedule
from datm_ray.stages.labels import kept_labels


def differences(configs: Sequence[RunConfig]) -> list[str]:
    """Lines on the scored networks, their training and their images; no line for what is the same in all runs.

    A line has the settings that differ, and behind each value the names of its runs in brackets.
    """
    names = [config.name for config in configs]
    networks = short_names([config.network for config in configs])
    lines = {
        "network": networks,
        "training": _differing([_training(config) for config in configs]),
        "images": _differing([_images(config) for config in configs]),
    }
    return [f"{title}: {_by_value(values, names)}" for title, values in lines.items() if len(set(values)) > 1]


def _by_value(values: Sequence[str], names: Sequence[str]) -> str:
    """Each value once, with the names of its runs, such as "convnet (one, two); lenet (three)"."""
    runs: dict[str, list[str]] = {}
    for value, name in zip(values, names, strict=True):
        runs.setdefault(value, []).append(name)
    return "; ".join(f"{value} ({', '.join(found)})" for value, found in runs.items())


def _differing(trainings: Sequence[Sequence[str]]) -> list[str]:
    """For each training, its settings that are not equal in all trainings, as text."""
    kept = [number for number, parts in enumerate(zip(*trainings, strict=True)) if len(set(parts)) > 1]
    return [", ".join(filter(None, (parts[number] for number in kept))) for parts in trainings]


def _training(config: RunConfig) -> list[str]:
    """Settings of a run's training as texts, in a fixed order: of the row "distilled", then of the controls."""
    settings, schedule = config.evaluate, row_schedule(config, "distilled")
    rate = "learned or chosen" if settings.learning_rate is None else f"{settings.learning_rate:g}"
    labels = {"own": "the set's labels", "teacher": "a teacher's labels", "stored": "stored labels"}[settings.labels]
    labels += f" ({_changed(settings.teacher)})" if settings.teacher and config.own_teacher() else ""
    taught = f" at temperature {settings.temperature:g}, CutMix {settings.cutmix:g}" if settings.has_teacher else ""
    top = "all" if settings.top_logits is None else f"{settings.top_logits:,}"
    stored = f"labels of {kept_labels(config):,} epochs, {top} logits each" if settings.stores_labels else ""
    return [
        f"{schedule.epochs:,} epochs",
        f"batches of {schedule.batch_size:,}",
        {"sgd": "SGD", "adamw": "AdamW"}[schedule.optimiser],
        f"learning rate {rate}",
        "cosine decay" if schedule.cosine else "one decay halfway",
        f"{schedule.warmup_epochs:,} warm-up epochs",
        f"weight decay {schedule.weight_decay:g}",
        " and ".join(dict.fromkeys(_augmentation(config, row) for row in ROWS)),
        labels + taught,
        stored,
        f"{settings.real_epochs:,} epochs on all real data",
    ]


def _changed(teacher: TeacherConfig) -> str:
    """Settings of a teacher that are no defaults, and its architecture, such as "architecture resnet18, epochs 30"."""
    network = {"architecture": teacher.network.architecture, **teacher.network.model_dump(exclude_defaults=True)}
    training = teacher.experts.model_dump(exclude_defaults=True)
    return ", ".join(f"{key} {value}" for key, value in {**network, **training}.items())


def _augmentation(config: RunConfig, row: str) -> str:
    augmentation = row_schedule(config, row).augmentation
    return f"augmentation {augmentation}" if augmentation else "no augmentation"


def _images(config: RunConfig) -> list[str]:
    """Settings of a run's images as texts, in a fixed order."""
    settings = config.dataset
    given = f" with mean {list(settings.mean or ())} and deviation {list(settings.std or ())}" * bool(settings.mean)
    return [
        settings.source,
        f"{settings.resize} pixels a side" if settings.resize else "original size",
        f"normalisation {settings.normalisation}{given}",
        f"validation share {settings.validation:g}",
    ]
