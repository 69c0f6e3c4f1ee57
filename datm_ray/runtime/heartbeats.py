"""Heartbeats of long work: events by which executors know that a worker is not stuck (see `retries.Patience`).

Work whose `Progress` events are frequent needs no other event. A `Phase` raises the time limit for the next event to
`cluster.progress_timeout`, so it is reported only where nothing else was reported for long.
Tests: tests/runtime/test_heartbeats.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from datm_ray.config import ClusterConfig
from datm_ray.core.steps import Steps, Work
from datm_ray.runtime.executor import Phase
from datm_ray.runtime.retries import STEPS_OF_PATIENCE
from datm_ray.runtime.stopping import Interrupted, given_up, is_overdue

Item = TypeVar("Item")
Result = TypeVar("Result")

TRAINING = "training an epoch"
"""Text of the phase that a training reports, as a heartbeat, within a slow epoch."""


def interval_in_epochs(cluster: ClusterConfig) -> float:
    """Seconds without an event after which a training reports a heartbeat: 1/20 of `cluster.progress_timeout`.

    A training with shorter epochs needs no heartbeat within them. Each epoch ends with an event, and the time limit
    for the next event is at least 20 times the longest epoch (`retries.Patience`).
    """
    return cluster.progress_timeout / STEPS_OF_PATIENCE


def interval_between_epochs(cluster: ClusterConfig) -> float:
    """Seconds without an event after which work between epochs, such as scoring, reports a heartbeat.

    This is `interval_in_epochs`, but at most half of `cluster.peer_timeout`, which is the time limit of a worker whose
    epochs are short (`retries.Patience`).
    """
    return min(interval_in_epochs(cluster), cluster.peer_timeout / 2)


def with_heartbeats(steps: Iterable[Item], interval: float) -> Iterator[Item]:
    """Pass on every item that is not `None`. Pass on a `None` only if nothing was passed on for `interval` seconds.

    The caller reports a heartbeat for each `None`. More than `stopping.LONGEST_EPOCH` seconds after a request to stop,
    every `None` is passed on, so that the work can end before its epoch does.

    Args:
        steps: an item after an epoch's last step, `None` after every other step.
        interval: time in seconds.
    """
    due = time.monotonic() + interval
    for item in steps:
        if item is not None or time.monotonic() >= due or is_overdue():
            yield item
            due = time.monotonic() + interval


def within_epoch(saved: Callable[[], str]) -> Phase:
    """Make the event that a training yields as a heartbeat between two steps of an epoch.

    Args:
        saved: describes the last saved state, such as "epoch 3 of 90".

    Raises:
        Interrupted: the training was asked to stop more than `stopping.LONGEST_EPOCH` seconds ago.
    """
    if is_overdue():
        raise given_up(saved())
    return Phase(TRAINING)


def stopped_if(is_asked: Callable[[], bool], steps: Steps[Result], end: Callable[[], Interrupted]) -> Steps[Result]:
    """Do all steps and return the result, but raise `end()` between two steps once `is_asked()` is True.

    Args:
        is_asked: returns True once the work must be given up, such as `stopping.is_overdue`.
        steps: the work.
        end: makes the error, which describes the last saved state.
    """
    work = Work(steps)
    for _ in work:
        if is_asked():
            raise end()
        yield
    return work.result


def reporting(
    steps: Steps[Result], text: str, interval: float, *, at_once: bool = True
) -> Generator[Phase, None, Result]:
    """Do all steps and return the result. Yields a phase wherever the work pauses, at most every `interval` seconds.

    Args:
        steps: the work.
        text: text of the phases.
        interval: time in seconds between two phases.
        at_once: True to yield the first phase at the first pause; False to yield it after `interval` seconds.
    """
    due, work = time.monotonic() + (0.0 if at_once else interval), Work(steps)
    for _ in work:
        if time.monotonic() >= due:
            yield Phase(text)
            due = time.monotonic() + interval
    return work.result
