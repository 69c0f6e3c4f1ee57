"""Values that the packaged recipes of DATM share; functions for recipes of MTT and SRe2L; MetaDD's networks.

Source for DATM: arXiv 2310.05773 and the authors' configuration files of 2024-04-26. The functions for MTT and SRe2L
name their sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from datm_ray.config import (
    DatasetConfig,
    DistillConfig,
    EvaluateConfig,
    ExpertConfig,
    MetaConfig,
    NetworkConfig,
    RecoverConfig,
    RunConfig,
    StartEpochs,
)

LATEST_MATCHED = {"cifar10": 61, "cifar100": 71, "tiny-imagenet": 71}
"""Data set -> last expert epoch, inclusive, that any of DATM's published recipes for it matches. Experts store the
epochs up to this one, so that the recipes can share experts."""
LATEST_MATCHED_BY_MTT = 41
"""Last expert epoch, inclusive, that any packaged recipe of MTT matches. Experts of every recipe of MTT store the
epochs up to this one, so that the recipes can share experts."""


def published(source: str, *, depth: int, **distill: Any) -> RunConfig:
    """Make a recipe of DATM from the values in which the paper's recipes differ, and the values that all of them share.

    Args:
        source: data set, a key of `LATEST_MATCHED`.
        depth: number of blocks of the ConvNet.
        distill: values of the section `distill`: key of `DistillConfig` -> value.
    """
    return RunConfig(
        dataset=DatasetConfig(source=source, validation=0.02),
        network=NetworkConfig(depth=depth),
        # GSAM as in DATM. Experts keep all epochs that any recipe of the data set matches, so that recipes share them.
        experts=ExpertConfig(optimiser="gsam", keep_epochs=LATEST_MATCHED[source]),
        distill=DistillConfig(initial_step_size=0.01, **distill),
    )


def of_mtt(source: str, *, bound: int, normalisation: Literal["zca", "standard"] = "zca", **distill: Any) -> RunConfig:
    """Make a recipe of MTT (arXiv 2203.11932), with plain SGD experts of 50 epochs.

    Args:
        source: data set, such as "cifar10".
        bound: upper bound of start epochs, exclusive; the first is 0.
        normalisation: normalisation of the images.
        distill: further values of the section `distill`: key of `DistillConfig` -> value.
    """
    return RunConfig(
        method="mtt",
        dataset=DatasetConfig(source=source, normalisation=normalisation, validation=0.02),
        network=NetworkConfig(depth=3),
        experts=ExpertConfig(epochs=50, keep_epochs=LATEST_MATCHED_BY_MTT),
        distill=DistillConfig(
            iterations=5000, initial="random", start_epochs=StartEpochs(bound=bound), threshold=None, **distill
        ),
    )


def recovered(
    source: str, ipc: int, experts: ExpertConfig, iterations: int, recover: RecoverConfig, evaluate: EvaluateConfig
) -> RunConfig:
    """Make a recipe of SRe2L (arXiv 2306.13092): images from noise, recovered from a ResNet-18 that also labels them.

    The accuracy table has no row for all real data, which would take half to nine tenths of a run's GPU time. In its
    place, the run logs the teacher's accuracy on validation images. `--set evaluate.full=true` adds the row.

    Args:
        source: data set, such as "cifar100".
        ipc: synthetic images per class.
        experts: training of the ResNet-18, the teacher.
        iterations: steps of Adam on the images.
        recover: settings of the recovery.
        evaluate: training of the networks that score the set.
    """
    return RunConfig(
        method="sre2l",
        dataset=DatasetConfig(source=source, normalisation="standard", validation=0.02),
        network=NetworkConfig(architecture="resnet18", norm="batch", depth=3),
        experts=experts.model_copy(update={"count": 1, "keep_epochs": 1, "momentum": 0.9, "schedule": "cosine"}),
        distill=DistillConfig(
            ipc=ipc,
            iterations=iterations,
            initial="noise",
            learning_rate_labels=0.0,
            learning_rate_step_size=0.0,
            initial_step_size=0.01,
            validate_every=0,
        ),
        recover=recover,
        evaluate=evaluate.model_copy(update={"labels": "teacher", "schedule": "cosine", "full": False}),
    )


def small_recovery(source: str, ipc: int) -> RunConfig:
    """Make a recipe of SRe2L for the data set `source` and `ipc` images per class, with the authors' CIFAR-100 values.

    While images are recovered, they are shifted, neither cropped nor mirrored, as in the authors' program. The
    authors' program differs from this package in four points. It shifts images only down and to the right. While
    networks train on a set, it also mixes images, its teacher is in training mode, and its loss lacks the factor T^2
    (T: temperature).
    """
    teacher = ExpertConfig(epochs=200, batch_size=128, learning_rate=0.1, weight_decay=5e-4, augmentation="crop+flip")
    recover = RecoverConfig(learning_rate=0.25, statistics=0.01, least_share=1.0, flip=False)
    evaluate = EvaluateConfig(
        optimiser="adamw",
        learning_rate=1e-3,
        weight_decay=0.01,
        epochs=400,
        batch_size=128,
        temperature=30.0,
        augmentation="crop+flip",
    )
    return recovered(source, ipc, teacher, 1000, recover, evaluate)


AUXILIARIES = ("resnet18", "mobilenet-v2", "vit-small")
"""MetaDD's auxiliaries in the packaged recipes: one network of each kind that the paper uses. The paper's networks are
ResNet-34, GoogLeNet and ViT-B/16."""
UNSEEN = ("alexnet", "resnet50", "vgg11")
"""Networks that score sets in MetaDD's paper and take no part in making them: AlexNet, ResNet-50 and VGG (VGG-19 in the
paper, VGG-11 here). The paper's fourth, Swin-S, is not in this package."""
RECOVERY_WEIGHTS = {"variance": 100.0, "invariance": 1.0, "position": 10.0}
"""Weights of MetaDD's terms in SRe2L, chosen on digits alone, as the default weights were for DATM. With the default
weights the meta-feature ratio hardly moved in SRe2L on digits (run once, no page kept)."""


def with_auxiliaries(
    base: RunConfig,
    share: float,
    names: Sequence[str] = AUXILIARIES,
    weights: Mapping[str, float] | None = None,
) -> RunConfig:
    """Copy of a recipe with MetaDD and auxiliaries of published width; the `UNSEEN` networks score its set too.

    Args:
        share: share of the synthetic images that MetaDD uses in an iteration, in (0, 1].
        names: architectures of the auxiliaries.
        weights: weights of the terms "variance", "invariance" and "position"; `None` for the defaults.
    """
    auxiliaries = tuple(NetworkConfig(architecture=name) for name in names)
    metadd = MetaConfig.model_validate({"auxiliaries": auxiliaries, "share": share, **(weights or {})})
    unseen = tuple(NetworkConfig(architecture=name) for name in UNSEEN)
    evaluate = base.evaluate.model_copy(update={"networks": unseen})
    return base.model_copy(update={"metadd": metadd, "evaluate": evaluate})
