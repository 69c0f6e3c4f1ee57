"""Rules for a recipe of trajectory matching, datm or mtt, for a user's own images.

Tests: tests/planning/test_suggest.py.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

from datm_ray.errors import ConfigError
from datm_ray.planning.init.draft import (
    AS_ASKED,
    EXPERTS_SHARE,
    FOUND,
    LEAST_ITERATIONS,
    MOST_ITERATIONS,
    PUBLISHED_BATCH,
    TRAINED,
    VALIDATIONS,
    WIDTHS,
    Choices,
    Draft,
    Fitted,
    saved,
)
from datm_ray.stages.experts.train import experts_at_a_time
from datm_ray.words import counted

BOUND, BOUND_POWER = 8.0, 0.57
"""The range of start epochs ends at distance (learning rate times steps) BOUND * ipc ** BOUND_POWER from epoch 0.

The ranges of DATM's CIFAR-10 recipes end at distance 8 (IPC 1), 38 (IPC 10) and 77 (IPC 50), those of the recipes
for digits at 8 (IPC 1) and 23 (IPC 10)."""
LATE_SHARE, MOST_LATE = 3.0, 0.5
"""Start of the range of start epochs, as a share of its end: LATE_SHARE times the set's share of the real images, at
most MOST_LATE. For mtt the range starts at 0.

Examples: for CIFAR-10 the rule gives 0.03 at IPC 50 and 0.31 at IPC 500, where DATM's recipes have 0 and 0.67. For
digits at IPC 10 it gives 0.25, where digits-ipc10 has 0.17."""
STEP_DISTANCE = 0.06
"""Expert's distance (learning rate times steps) that one student step must cover.

DATM's CIFAR-10 recipes have 0.048 at IPC 1 to 50, the recipes for digits 0.06 to 0.08."""
STUDENT_BATCH = 50
"""Number of images in a student step; two per class if those are more. All images of the set if it has fewer."""
THRESHOLD = 1.1
"""Suggested `distill.threshold`, the matching loss above which an iteration is skipped, as in DATM's cifar10-ipc1.

While a set hardly moves the student, losses scatter around 1."""
STEPS = (80, 40, 20, 10)
"""Numbers of student steps in an iteration, in the order of trying them. The first, as published, is chosen only if
there is time for it together with the published number of iterations, `MOST_ITERATIONS`."""
ENOUGH_EXPERTS, ENOUGH_ITERATIONS = 4, 300
"""Numbers of experts and of iterations. The network gets the largest width that allows both."""
LEAST_EXPERTS, MOST_EXPERTS = 2, 100
"""Smallest number of experts of a suggested recipe, even if it takes too long, and largest, as published for DATM."""
MOST_SHARED = 8 * 2**30
"""Largest total size in bytes of experts' files with all epochs; larger ones keep only the epochs that are needed."""
DISK_SHARE = 0.1
"""Largest share of the free disk that the experts of a suggested recipe may take."""


def experts(draft: Draft) -> Choices:
    """Choose the experts' batch size and learning rate, and the augmentation for all networks."""
    batch, published = draft.batch_size, draft.batch_size == PUBLISHED_BATCH
    steps = counted(math.ceil(draft.training_images / batch), "step")
    yield "experts.batch_size", batch, f"an epoch of {draft.training_images:,} images then has {steps}"
    yield (
        "experts.learning_rate",
        draft.learning_rate,
        "as published" if published else "twice the published rate, because there are fewer steps",
    )
    yield from draft.augmentation("experts", "distill", "evaluate")


def matching(draft: Draft) -> Choices:
    """Choose the range of start epochs, the student's batches, and how the set is updated."""
    ipc, epoch, share = draft.wish.ipc, draft.epoch_distance, draft.images / draft.training_images
    is_mtt = draft.wish.method == "mtt"
    yield "distill.ipc", ipc, AS_ASKED
    distance = BOUND * ipc**BOUND_POWER
    bound = max(2, round(distance / epoch))
    first = 0 if is_mtt else int(bound * min(MOST_LATE, LATE_SHARE * share))
    late = f"; begins later because the set is {share:.0%} of the data" if first else ""
    why = f"ends at distance {distance:.0f}, known to suit {counted(ipc, 'image')} per class{late}"
    yield "distill.start_epochs", [first, bound], why
    batch = min(draft.images, max(STUDENT_BATCH, 2 * draft.raw.classes))
    whole = batch == draft.images
    yield "distill.batch_size", batch, "all images of the set" if whole else f"of {draft.images:,} images of the set"
    yield "distill.threshold", THRESHOLD, "a little above the loss of no movement, near which a set may start"
    yield "distill.initial_step_size", None, FOUND
    yield "distill.learning_rate_images", None, FOUND
    if is_mtt:
        yield "distill.initial", "random", "any real images, as published"
    else:
        yield "distill.learning_rate_labels", 5.0, "as for digits, between the published 2 and 10"
    yield "distill.learning_rate_step_size", 5e-5, "as for digits"


def _lengths(draft: Draft, steps: int) -> dict[str, Any]:
    """Recipe values that follow from the number of student steps.

    They are the number of an expert's epochs that the student must cover, and how many epochs experts train and keep.
    """
    span = max(1, round(STEP_DISTANCE * steps / draft.epoch_distance))
    epochs = max(draft.values["distill.start_epochs"][1] - 1 + span, math.ceil(TRAINED / draft.epoch_distance))
    return {
        "distill.student_steps": steps,
        "distill.expert_epochs": span,
        "experts.epochs": epochs,
        "experts.keep_epochs": epochs,
    }


def fitted(draft: Draft) -> Fitted:
    """Choose the width of the network and the numbers of experts, epochs, student steps and iterations.

    The width is the largest for which the time is enough for `ENOUGH_EXPERTS` experts and `ENOUGH_ITERATIONS`
    iterations. Returns the values and their reasons.

    Raises:
        ConfigError: memory is not enough for any width.
    """
    values = draft.widest(_of_width)
    return values, _reasons(draft, values)


def _of_width(draft: Draft, width: int) -> tuple[dict[str, Any], bool]:
    """Recipe values for a width, and True if they reach `ENOUGH_EXPERTS` and `ENOUGH_ITERATIONS`.

    A run with these values takes about the planned time, or longer with the smallest allowed numbers.
    """
    values = {"network.width": width, **_lengths(draft, STEPS[-1])}
    workers, values["cluster.shards"] = draft.layout(values)
    values |= draft.evaluation(values, values["experts.epochs"])
    stack = experts_at_a_time(draft.config(values), (draft.raw.channels, *draft.raw.size), draft.raw.classes)
    for steps in STEPS:
        lengths = _lengths(draft, steps)
        if values["evaluate.full"]:
            lengths["evaluate.real_epochs"] = lengths["experts.epochs"]
        if steps != STEPS[-1] and not draft.fits(values | lengths):  # the student's steps are kept in memory
            continue
        values |= lengths
        values |= _numbers(draft, values, workers, stack)
        values |= _storable(draft, values, workers, stack)
        if values["distill.iterations"] >= (MOST_ITERATIONS if steps == STEPS[0] else ENOUGH_ITERATIONS):
            break
    if stack > 1:
        values["cluster.experts_at_a_time"] = min(stack, -(-values["experts.count"] // workers))
    values |= saved(values["distill.iterations"])
    is_enough = values["experts.count"] >= ENOUGH_EXPERTS and values["distill.iterations"] >= ENOUGH_ITERATIONS
    return values, is_enough


def _storable(draft: Draft, values: dict[str, Any], workers: int, stack: int) -> dict[str, Any]:
    """Recipe values to change so that the experts' files are not too large; empty if they are small enough already.

    With few images, epochs are short and many, so the files may exceed `MOST_SHARED` bytes or the share `DISK_SHARE`
    of the free disk. First, fewer epochs are kept. If that is not enough, fewer experts are trained.

    Args:
        workers: number of the machine's workers.
        stack: number of experts that a worker trains at a time.
    """
    free = DISK_SHARE * draft.wish.disk
    if draft.stored(values) <= min(MOST_SHARED, free):
        return {}
    fewer: dict[str, Any] = {"experts.keep_epochs": None}
    if draft.stored(values | fewer) > free:
        one, two = (draft.stored(values | fewer | {"experts.count": count}) for count in (1, 2))
        most = 1 + int((free - one) / (two - one))
        fewer |= _numbers(draft, values | fewer, workers, stack, most)
    return fewer


def _numbers(
    draft: Draft, values: dict[str, Any], workers: int, stack: int, most: int = MOST_EXPERTS
) -> dict[str, int]:
    """Values of `experts.count` and `distill.iterations` with which the run fills the planned time.

    If the time is short, experts are cut before iterations. `LEAST_EXPERTS` and `LEAST_ITERATIONS` are kept even if
    they take too long.

    Args:
        values: the other settings, chosen before.
        workers: number of the machine's workers. Experts are added and cut in rounds of one per worker.
        stack: number of experts that each worker trains together, on which the time of an expert depends.
        most: largest number of experts.
    """
    one, two = (draft.clock(values | {"experts.count": workers * stack * rounds})["experts"] for rounds in (1, 2))
    each, fixed = (two - one) / stack, 2 * one - two  # seconds of a round, and of compiling
    rounds = int((EXPERTS_SHARE * draft.planned_seconds - fixed) / each)
    count = max(LEAST_EXPERTS, min(workers * rounds, most))
    few = {"experts.count": count, "distill.iterations": VALIDATIONS, "distill.validate_every": 1}
    short = draft.plan(draft.config(values | few))
    iteration = sum(short.iteration)
    iterations = VALIDATIONS + int((draft.planned_seconds - sum(short.clock.values())) / iteration)
    spare = max(0, count - ENOUGH_EXPERTS) // workers
    fewer = min(spare, max(0, math.ceil((ENOUGH_ITERATIONS - iterations) * iteration / each)))
    iterations += int(fewer * each / iteration)
    return {
        "experts.count": count - workers * fewer,
        "distill.iterations": min(max(LEAST_ITERATIONS, iterations), MOST_ITERATIONS),
    }


def _reasons(draft: Draft, values: dict[str, Any]) -> dict[str, str]:
    """Key of the recipe -> reason for its value, for the values that `fitted` returns."""
    count, steps = values["experts.count"], values["distill.student_steps"]
    span, reached = (draft.epoch_distance * values[key] for key in ("distill.expert_epochs", "experts.epochs"))
    is_full = draft.stored(values | {"experts.count": count + 1}) > DISK_SHARE * draft.wish.disk
    limit = "a tenth of the free disk holds" if is_full else "the time allows beside the iterations"
    enough = f"{ENOUGH_EXPERTS} experts or {ENOUGH_ITERATIONS} iterations"
    usual = draft.reasons_for(values, enough, "as many as the experts have")
    disk = ", or too few experts on the free disk" if _is_short_of_disk(draft, values) else ""
    least = "the least; a tenth of the free disk holds no more" if is_full else draft.too_short
    return {
        **usual,
        "network.width": usual["network.width"] + disk,
        "cluster.experts_at_a_time": "all workers train experts",
        "distill.student_steps": "as published"
        if steps == STEPS[0]
        else f"of {', '.join(map(str, STEPS[1:]))} the most that leave {ENOUGH_ITERATIONS} iterations in {draft.asked}"
        if values["distill.iterations"] >= ENOUGH_ITERATIONS
        else draft.too_short,
        "distill.expert_epochs": f"distance {span:.2g}, for {steps} student steps",
        "experts.epochs": f"distance {reached:.0f}: beyond the latest target, and far enough to label images",
        "experts.keep_epochs": "all epochs, so that recipes with more images per class can share the experts"
        if values["experts.keep_epochs"]
        else "those that can be matched; all epochs would take too much space",
        "experts.count": "as published"
        if count == MOST_EXPERTS
        else f"as many as {limit}"
        if count > LEAST_EXPERTS
        else least,
    }


def _is_short_of_disk(draft: Draft, values: dict[str, Any]) -> bool:
    """True if the share `DISK_SHARE` of the free disk cannot hold `ENOUGH_EXPERTS` experts of the next larger width.

    False if the width is already the largest, or if the next larger network does not fit into memory.
    """
    if values["network.width"] == WIDTHS[0]:
        return False
    wider = WIDTHS[WIDTHS.index(values["network.width"]) - 1]
    enough = {"network.width": wider, "experts.count": ENOUGH_EXPERTS, "experts.keep_epochs": None}
    quick = replace(draft, exactly=False)  # the wider network's compiled steps may not have been timed
    with suppress(ConfigError):  # the wider network may not fit into memory
        return quick.stored(values | enough) > DISK_SHARE * draft.wish.disk
    return False
