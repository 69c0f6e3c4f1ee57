"""Rules for a recipe of dm, select or sre2l, for a user's own images. select and sre2l share the rules for a teacher.

Tests: tests/planning/test_suggest.py.
"""

from __future__ import annotations

import math
from typing import Any

from datm_ray.core.training.loop import PROTOCOLS
from datm_ray.errors import ConfigError
from datm_ray.planning.init.draft import (
    AS_ASKED,
    EVALUATION_SHARE,
    EXPERTS_SHARE,
    FOUND,
    LEAST_ITERATIONS,
    MOST_ITERATIONS,
    REAL_SHARE,
    SMALLEST_PICTURE,
    TRAINED,
    VALIDATIONS,
    Choices,
    Draft,
    Fitted,
    saved,
)
from datm_ray.stages.methods.recovery import FEW_IMAGES
from datm_ray.words import counted

REAL_IMAGES = (256, 128, 64, 32)
"""Numbers of real images of each class in an iteration of dm, in the order of trying them. The first is published."""
ENOUGH_UPDATES, MOST_UPDATES = 600, 20_000
"""ENOUGH_UPDATES: number of iterations of dm, that of the recipe digits-dm-ipc10. The network gets the largest width
for which there is time for this number. MOST_UPDATES: largest number of iterations of dm, as published."""
PUBLISHED_STEP_SIZE = 0.01
"""Learning rate published for training networks on dm's set, for the epochs of the protocol "published". With half
as many epochs, the rate is twice as large."""
TEACHER_BATCH, TEACHER_RATE = 128, 0.1
"""Largest batch size of a teacher, and the learning rate for it: both as in SRe2L's recipe for CIFAR-100. Smaller
batches get a rate in proportion, such as 0.05 for batches of 64 in the recipe digits-sre2l-ipc10."""
ENOUGH_EPOCHS, LEAST_EPOCHS, MOST_EPOCHS = 30, 5, 200
"""Numbers of a teacher's epochs. ENOUGH_EPOCHS, that of the recipe digits-sre2l-ipc10: the network gets the largest
width for which there is time for it. LEAST_EPOCHS: smallest number, even if there is no time for it. MOST_EPOCHS:
largest number, that of SRe2L for CIFAR-100."""
LARGE_PICTURE = 48
"""Smallest side in pixels, inclusive, of images that get the values published for Tiny-ImageNet, not for CIFAR."""
POOL = 300
"""Number of real images of each class that rded crops, as published; larger if the set has more per class."""
ENOUGH_RECOVERY, LEAST_RECOVERY, MOST_RECOVERY, MOST_OF_SMALL = 300, 100, 4000, 1000
"""Numbers of iterations of sre2l. ENOUGH_RECOVERY, that of the recipe digits-sre2l-ipc10: the network gets the largest
width for which there is time for it. LEAST_RECOVERY: smallest number; with fewer, images stay noisy, and iterations are
cheap compared with the teacher. MOST_RECOVERY, MOST_OF_SMALL: largest numbers, published for Tiny-ImageNet and for
CIFAR-100."""


def embeddings(draft: Draft) -> Choices:
    """Choose the first images and the augmentation for method dm."""
    yield "distill.ipc", draft.wish.ipc, AS_ASKED
    yield "distill.initial", "random", "real images, as published"
    yield "distill.learning_rate_images", None, FOUND
    yield from draft.augmentation("distill", "evaluate")


def fitted_embeddings(draft: Draft) -> Fitted:
    """Choose the width of the network, and the numbers of real images and of iterations, for method dm.

    Raises:
        ConfigError: memory is not enough for any width.
    """
    values = draft.widest(_embeddings_of)
    real, protocol = values["distill.real_batch"], values["evaluate.protocol"]
    enough = f"{ENOUGH_UPDATES} iterations"
    reasons = {
        **draft.reasons_for(values, enough, "as many as experts would have", most=MOST_UPDATES),
        "distill.real_batch": "of each class, as published"
        if real == REAL_IMAGES[0]
        else "all images of the largest class"
        if real == max(draft.training_counts)
        else f"of each class; as many as leave {enough} in {draft.asked}, or the least",
        "distill.initial_step_size": f"the published {PUBLISHED_STEP_SIZE}"
        + (f", in proportion to fewer epochs (evaluate.protocol {protocol})" if protocol != "published" else ""),
    }
    return values, reasons


def _embeddings_of(draft: Draft, width: int) -> tuple[dict[str, Any], bool]:
    values: dict[str, Any] = {"network.width": width}
    _, values["cluster.shards"] = draft.layout(values)
    values |= draft.evaluation(values, math.ceil(TRAINED / draft.epoch_distance))
    longer = PROTOCOLS["published"].epochs / PROTOCOLS[values["evaluate.protocol"]].epochs
    values["distill.initial_step_size"] = float(f"{PUBLISHED_STEP_SIZE * longer:.1g}")
    for real in dict.fromkeys(min(count, max(draft.training_counts)) for count in REAL_IMAGES):
        values["distill.real_batch"] = real
        values |= _iterations(draft, values, MOST_UPDATES)
        if values["distill.iterations"] >= ENOUGH_UPDATES:
            break
    return values, values["distill.iterations"] >= ENOUGH_UPDATES


def teacher(draft: Draft) -> Choices:
    """Choose how the teacher is trained, the one network that methods select and sre2l need."""
    batch = min(draft.batch_size, TEACHER_BATCH)
    steps = counted(math.ceil(draft.training_images / batch), "step")
    yield "experts.count", 1, "the teacher"
    yield "experts.batch_size", batch, f"an epoch of {draft.training_images:,} images then has {steps}"
    why = f"{TEACHER_RATE} for batches of {TEACHER_BATCH}, as published for CIFAR-100, and in proportion"
    yield "experts.learning_rate", TEACHER_RATE * batch / TEACHER_BATCH, why
    for key, value in (("schedule", "cosine"), ("momentum", 0.9), ("weight_decay", 5e-4)):
        yield f"experts.{key}", value, "as published for teachers"
    yield "experts.keep_epochs", 1, "the last epoch is stored anyway, and no other is read"
    yield "experts.augmentation", *_teacher_augmentation(draft)


def _teacher_augmentation(draft: Draft) -> tuple[str, str]:
    if draft.side < SMALLEST_PICTURE:
        return "crop_scale_rotate", "as for the digits' teacher"
    published = draft.side >= LARGE_PICTURE
    return ("resized+flip", "as for Tiny-ImageNet's teacher") if published else ("crop+flip", "as for CIFAR's teacher")


def selection(draft: Draft) -> Choices:
    """Choose how method select picks real images, and the augmentation of scored networks."""
    yield "distill.ipc", draft.wish.ipc, AS_ASKED
    yield "distill.labels", "soft", "the teacher's logits; hard gives the classes"
    if draft.side >= SMALLEST_PICTURE:
        yield "select.by", "rded", "crops that the teacher classifies best"
        yield "select.pool", max(POOL, draft.wish.ipc), "images of a class that are cropped, as published; all if fewer"
    else:
        yield "select.by", "moderate", f"whole images; a crop of {draft.side} pixels often shows another picture"
    yield from draft.augmentation("evaluate")


def fitted_selection(draft: Draft) -> Fitted:
    """Choose the network's width, the epochs of the teacher's training and the evaluation, for method `select`.

    Raises:
        ConfigError: memory is not enough for any width.
    """
    values = draft.widest(_selection_of)
    return values, _teacher_reasons(draft, values, f"{ENOUGH_EPOCHS} epochs of the teacher")


def _selection_of(draft: Draft, width: int) -> tuple[dict[str, Any], bool]:
    values = _scored_teacher(draft, width, 1 - EVALUATION_SHARE - REAL_SHARE)
    is_in_time = sum(draft.clock(values).values()) <= draft.planned_seconds
    return values, is_in_time and values["experts.epochs"] >= ENOUGH_EPOCHS


def _scored_teacher(draft: Draft, width: int, share: float) -> dict[str, Any]:
    """Recipe values for a teacher whose training takes at most `share` of the planned time, and for the evaluation."""
    values: dict[str, Any] = {"network.width": width}
    values["experts.epochs"] = _epochs(draft, values, share)
    return values | draft.evaluation(values, values["experts.epochs"])


def statistics(draft: Draft) -> Choices:
    """Choose the teacher's architecture and normalisation for sre2l, which recovers images from batch statistics.

    Raises:
        ConfigError: the set has too few images for statistics.
    """
    if draft.images < FEW_IMAGES:
        raise ConfigError(
            f"a set of {draft.images} images is too small for sre2l",
            f"it compares batch statistics of the whole set with the teacher's, and fewer than {FEW_IMAGES} say little",
            f"ask for {-(-FEW_IMAGES // draft.raw.classes)} images per class or more, or for another method",
        )
    yield "network.architecture", "resnet18", "as published"
    yield "network.norm", "batch", "images are recovered from its statistics"


def recovery(draft: Draft) -> Choices:
    """Choose how sre2l recovers images, and how scored networks are trained on the teacher's labels."""
    yield "distill.ipc", draft.wish.ipc, AS_ASKED
    yield "distill.initial", "noise", "as published"
    yield "distill.labels", "soft", "the teacher's logits"
    if draft.side >= LARGE_PICTURE:
        values: dict[str, Any] = {"learning_rate": 0.1, "statistics": 1.0, "least_share": 0.08, "shift": 4}
        why, temperature = "as published for Tiny-ImageNet", 20.0
    elif draft.side >= SMALLEST_PICTURE:
        values = {"learning_rate": 0.25, "statistics": 0.01, "least_share": 1.0, "flip": False, "shift": 4}
        why, temperature = "as published for CIFAR-100", 30.0
    else:
        values = {"learning_rate": 0.1, "statistics": 1.0, "least_share": 1.0, "flip": False, "shift": 0}
        why, temperature = "as for digits", 4.0
    yield from ((f"recover.{key}", value, why) for key, value in values.items())
    yield "evaluate.labels", "teacher", "labels every batch, as published"
    yield "evaluate.temperature", temperature, why
    yield "evaluate.augmentation", *_teacher_augmentation(draft)


def fitted_recovery(draft: Draft) -> Fitted:
    """Choose the width of the network, the epochs of the teacher, and the number of iterations of sre2l.

    Raises:
        ConfigError: memory is not enough for any width.
    """
    values = draft.widest(_recovery_of)
    del values["distill.validate_every"]  # pieces are not validated
    enough = f"{ENOUGH_EPOCHS} epochs of the teacher or {ENOUGH_RECOVERY} iterations"
    return values, _teacher_reasons(draft, values, enough, LEAST_RECOVERY, _most_iterations(draft))


def _recovery_of(draft: Draft, width: int) -> tuple[dict[str, Any], bool]:
    values = _scored_teacher(draft, width, EXPERTS_SHARE)
    values |= _iterations(draft, values, _most_iterations(draft), LEAST_RECOVERY)
    return values, values["experts.epochs"] >= ENOUGH_EPOCHS and values["distill.iterations"] >= ENOUGH_RECOVERY


def _most_iterations(draft: Draft) -> int:
    return MOST_RECOVERY if draft.side >= LARGE_PICTURE else MOST_OF_SMALL


def _teacher_reasons(
    draft: Draft,
    values: dict[str, Any],
    enough: str,
    least: int = LEAST_ITERATIONS,
    most: int = MOST_ITERATIONS,
) -> dict[str, str]:
    epochs = values["experts.epochs"]
    return {
        **draft.reasons_for(values, enough, "as many as the teacher has", least, most),
        "experts.epochs": "as published for CIFAR-100"
        if epochs == MOST_EPOCHS
        else "as many as its share of the time allows"
        if epochs > LEAST_EPOCHS
        else draft.too_short,
    }


def _epochs(draft: Draft, values: dict[str, Any], share: float) -> int:
    """Number of the teacher's epochs that take at most `share` of the planned time.

    The number is at least `LEAST_EPOCHS`, even if these take longer, and at most `MOST_EPOCHS`.
    """
    few = LEAST_EPOCHS
    one, two = (draft.clock(values | {"experts.epochs": count * few})["experts"] for count in (1, 2))
    return min(max(few, few + int((share * draft.planned_seconds - one) / (two - one) * few)), MOST_EPOCHS)


def _iterations(draft: Draft, values: dict[str, Any], most: int, least: int = LEAST_ITERATIONS) -> dict[str, int]:
    """Values of `distill.iterations`, from `least` to `most`, to fill the planned time, and of the keys of `saved`."""
    count = VALIDATIONS

    def clock(count: int) -> dict[str, float]:
        return draft.clock(values | {"distill.iterations": count, **saved(count)})

    # Only distillation is compared: with more iterations, more of the validations run at the same time as iterations.
    each = (clock(2 * count)["distillation"] - clock(count)["distillation"]) / count
    for _ in range(2):
        count += int((draft.planned_seconds - sum(clock(count).values())) / each)
        count = min(max(least, count), most)
    return {"distill.iterations": count, **saved(count)}
