"""Values that the published recipes of DATM share. Source: arXiv 2310.05773 and the authors' files of 2024-04-26."""

from __future__ import annotations

from datm_ray.config import (
    DatasetConfig,
    DistillConfig,
    EvaluateConfig,
    ExpertConfig,
    MetaConfig,
    NetworkConfig,
    RunConfig,
    StartEpochs,
)

LATEST_MATCHED = {"cifar10": 61, "cifar100": 71, "tiny-imagenet": 71}
"""Last epoch that any published recipe matches, by data set, inclusive."""


def published(
    source: str,
    *,
    depth: int,
    ipc: int,
    student_steps: int,
    batch_size: int,
    learning_rate_images: float,
    learning_rate_step_size: float,
    learning_rate_labels: float,
    start_epochs: StartEpochs,
    expert_epochs: int = 2,
    threshold: float = 1.0,
) -> RunConfig:
    """Recipe from a row of DATM's table."""
    return RunConfig(
        dataset=DatasetConfig(source=source, validation=0.02),
        network=NetworkConfig(depth=depth),
        # GSAM as in DATM. All epochs are kept that any recipe of the family may match, so that all share the experts.
        experts=ExpertConfig(optimiser="gsam", keep_epochs=LATEST_MATCHED[source]),
        distill=DistillConfig(
            ipc=ipc,
            student_steps=student_steps,
            expert_epochs=expert_epochs,
            batch_size=batch_size,
            learning_rate_images=learning_rate_images,
            learning_rate_step_size=learning_rate_step_size,
            learning_rate_labels=learning_rate_labels,
            initial_step_size=0.01,
            start_epochs=start_epochs,
            threshold=threshold,
        ),
        evaluate=EvaluateConfig(),
    )


def with_auxiliaries(base: RunConfig, share: float) -> RunConfig:
    """Copy of a recipe with MetaDD and the four auxiliaries of published size."""
    metadd = MetaConfig(
        auxiliaries=tuple(NetworkConfig(architecture=name) for name in ("resnet18", "vgg11", "alexnet", "vit-small")),
        share=share,
    )
    return base.model_copy(update={"metadd": metadd})
