"""Recipe of SRe2L for ImageNet-1K. Images are decoded from their files whenever they are needed."""

from __future__ import annotations

from datm_ray.config import DatasetConfig, EvaluateConfig, ExpertConfig, RecoverConfig, RunConfig, with_settings
from datm_ray.recipes.published import recovered


def imagenet_sre2l_ipc10() -> RunConfig:
    """ImageNet-1K, 10 images per class, by SRe2L. The paper reports 21.3 % with ResNet-18.

    Not run yet. Give `--set dataset.path=FOLDER`, a folder with train/CLASS and val/CLASS. The teacher is torchvision's
    ResNet-18: `datm-ray store import-teacher resnet18.pth --recipe imagenet-sre2l-ipc10` puts its file into the store.
    Without this file the run trains a teacher. Images are stretched to 224x224 pixels, while the authors cut the centre
    of test images. The teacher's labels of all 300 epochs take 6 GB; `--set evaluate.keep_labels=30` keeps a tenth.
    """
    base = recovered(
        "folder",
        10,
        ExpertConfig(epochs=90, batch_size=256, learning_rate=0.1, weight_decay=1e-4, augmentation="resized+flip"),
        4000,
        RecoverConfig(learning_rate=0.25, statistics=0.01, shift=32),
        EvaluateConfig(
            optimiser="adamw",
            learning_rate=1e-3,
            weight_decay=0.01,
            epochs=300,
            batch_size=1024,
            cutmix=1.0,
            augmentation="resized+flip",
        ),
    )
    dataset = DatasetConfig(
        source="folder",
        resize=224,
        streamed=True,
        normalisation="standard",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        validation=0.004,
    )
    return with_settings(base, {"dataset": dataset, "evaluate.labels": "stored"})
