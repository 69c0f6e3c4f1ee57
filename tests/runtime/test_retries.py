"""Tests decisions about lost and stuck workers, without a cluster."""

from __future__ import annotations

import subprocess
import sys

from datm_ray.runtime.executor import Note, Phase, Progress
from datm_ray.runtime.retries import History, Patience, watched
from datm_ray.store.files import patience as storage


def test_a_task_that_saves_nothing_new_is_given_up() -> None:
    """Four losses without anything saved in between end a task with three retries, after growing waits."""
    history, delays = History(), []
    for losses in range(1, 5):
        history = history.after_loss(7)
        assert history.losses == losses
        assert history.gives_up(retries=3) == (losses == 4)
        delays.append(history.delay)
    assert delays == [0.0, 5.0, 25.0, 60.0]


def test_losses_between_which_a_task_saves_are_no_reason_to_give_up() -> None:
    """Losses between which a task saves more than before do not end it."""
    history = History()
    for saved in range(10, 400, 10):
        history = history.after_loss(saved)
        assert not history.gives_up(retries=1)
        assert history.delay == 0.0
    assert history.losses == 39
    assert not history.after_loss(400).gives_up(retries=1)
    assert history.after_loss(5).gives_up(retries=1)


def test_without_retries_the_first_loss_is_the_last() -> None:
    """Without retries the first loss ends a task, whatever it has saved."""
    assert History().after_loss(100).gives_up(retries=0)


def test_nodes_are_avoided_until_the_task_gets_on() -> None:
    """A task remembers the nodes of losses in a row, and forgets them once it has saved more."""
    history = History().after_loss(0, ["a"]).after_loss(0, ["b", "c"]).after_loss(0).after_loss(0, ["a"])
    assert history.nodes == {"a", "b", "c"}
    assert history.after_loss(5, ["d"]).nodes == {"d"}
    forgiven = history.forgiving()
    assert (forgiven.nodes, forgiven.losses, forgiven.without_progress) == (set(), 4, 4)


def test_patience_follows_the_slowest_step() -> None:
    """Before its third timed step a worker may take long; then 20 times its slowest step, between both limits."""
    patience = Patience(shortest=300.0, longest=3600.0)
    for seconds, limit in ((500.0, 3600.0), (20.0, 3600.0), (1.0, 3600.0)):
        patience.take(Progress(1, 9), seconds)
        assert patience.limit == limit
    patience = Patience(shortest=300.0, longest=3600.0)
    patience.take(Phase("compiling"), 900.0)
    for seconds in (900.0, 1.0, 30.0, 2.0):
        patience.take(Progress(1, 9), seconds)
    assert patience.limit == 600.0
    assert Patience(300.0, 3600.0, steps=3, slowest=0.1).limit == 300.0


def test_a_phase_between_steps_may_take_as_long_as_the_first_step() -> None:
    """A validation in several workers, minutes without an event, is no silence. The next step ends it, untimed."""
    patience = Patience(300.0, 3600.0, steps=3, slowest=0.1)
    for event, limit in ((Phase("validating"), 3600.0), (Note("late"), 3600.0), (Progress(4, 9), 300.0)):
        patience.take(event, 100.0)
        assert patience.limit == limit
    patience.take(Progress(5, 9), 100.0)
    assert patience.limit == 2000.0


def test_requests_to_storage_end_before_the_worker_counts_as_stuck() -> None:
    """Requests end within the limit for the next event, and within the peers' time where peers wait."""

    def found(*, has_peers: bool) -> list[float]:
        steps = [Progress(done, 9) for done in range(1, 5)]
        return [storage.patience() for _ in watched(steps, Patience(300.0, 3600.0), has_peers=has_peers)]

    short = 300.0 * storage.SHARE
    assert found(has_peers=True) == [short] * 4
    # The event that shortens the limit is passed on before: the new limit is for the next one.
    assert found(has_peers=False) == [storage.LONGEST] * 3 + [short]
    assert storage.patience() == storage.LONGEST  # nobody waits for this process any more


STUCK = """
import time
from datm_ray.runtime.executor import Progress
from datm_ray.runtime.retries import Patience, watched

def work():
    yield Progress(1, 2)
    this_is_where_it_is_stuck()

def this_is_where_it_is_stuck():
    time.sleep(60)

for event in watched(work(), Patience(0.2, 0.2)):
    print(event.done, flush=True)
"""


def test_a_process_that_is_stuck_ends_itself_and_says_where() -> None:
    """A process without a step ends with exit code 1, and its standard error names the function it was in."""
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout) == (1, "1\n")
    assert "this_is_where_it_is_stuck" in ended.stderr
