"""Executor on Ray: tasks of one worker run on a pool of actors, tasks of several workers on groups of ranks.

Events stream back through Ray's generators, so a dead worker is noticed at once. Ray places workers, and its autoscaler
starts nodes for workers that wait. This module decides the order of tasks and what follows a loss. Every error that is
not in the user's input costs the task an attempt. Another worker then gets the task, on another node if there is one.
Module `retries` counts the losses and decides when to give up.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayActorError, RayError, RayTaskError

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError, ConfigError, DatmError, PeerLostError, PluginError, WorkerLostError
from datm_ray.monitor.logs import accept
from datm_ray.runtime.executor import (
    Event,
    Failed,
    Finished,
    Lost,
    Note,
    Phase,
    Progress,
    Resized,
    Started,
    Stopped,
    Task,
)
from datm_ray.runtime.machine.versions import versions_here
from datm_ray.runtime.ray.cluster import SHORT_WAIT, Nodes, connect, default_gpus, with_gpus, worker_options
from datm_ray.runtime.ray.compat import draining_nodes, knows_labels, requests_without_place
from datm_ray.runtime.ray.losses import is_final, may_be_the_gpu, may_be_the_nodes, reason, unwrapped
from datm_ray.runtime.ray.metrics import RayMetrics
from datm_ray.runtime.ray.pool import Gpus, PoolWorker, StageSetup, avoiding
from datm_ray.runtime.ray.ranks import RankGroup
from datm_ray.runtime.retries import MARGIN, History, Patience, patience_of, size_for
from datm_ray.runtime.stopping import SAVE_TIMEOUT, SAVES, Interrupted, close_unless_interrupted, saving, wait_for_close
from datm_ray.words import counted

PENDING = 64
"""Largest number of actors that wait for resources at a time, for tasks of one worker. The number of started actors
replaces it if that is larger."""
MOST_FAILED_STARTS = 11
"""Number of failed attempts in a row to start actors that a stage without a running task survives. They take about four
minutes. One more ends the stage with an error."""
EVENT_INTERVAL = 0.5
"""Longest wait for an event, in seconds, before waiting tasks are checked."""
CHECK_INTERVAL = 5.0
"""Seconds between two checks for stuck workers, for new log records and for nodes that end soon, and between two
questions to Ray about actors that wait for long."""
ABSENCE = 2 * CHECK_INTERVAL
"""Longest normal time in seconds between two checks. Time beyond it counts as a suspension of this process, as by
Ctrl-Z."""
LONGEST_DRAIN = 600.0
"""Longest time in seconds for which no one-worker task starts, so that a waiting group gets the resources that become
free."""
ROOT_CAUSE_TIMEOUT = 3.0
"""Seconds to wait for another rank's original error after a rank reports that it lost its peers."""
LONGEST_AVOIDANCE = 600.0
"""Longest time in seconds without a running task for which waiting tasks avoid nodes that failed them. `Nodes.patience`
replaces it if that is shorter."""
GROWTH_INTERVAL = 600.0
"""Shortest time in seconds that a group works before it is restarted with more workers. A group is restarted sooner if
it then has all the workers it can use, or had been made smaller because workers did not become free."""
WAIT_INTERVAL = 60.0
"""Seconds between two messages that a task waits for a worker. The first message comes after 15 s."""
FAULTS_OF_A_NODE = 3
"""Number of workers lost in a row on one node, by errors, after which new workers avoid the node if possible."""

_log = logging.getLogger(__name__)


class RayExecutor:
    """Executor whose workers are Ray actors, on a running cluster or on a cluster started here for the run."""

    def __init__(self, cluster: ClusterConfig, address: str | None = None) -> None:
        """Connect to a cluster and check that it can hold the workers.

        Args:
            cluster: section `cluster` of the recipe.
            address: the cluster's address, as for `connect`. If it is `None` and this process has connected already,
                that connection is used, and `close` leaves it open.

        Raises:
            ClusterError: no cluster answers, it cannot hold the workers, or it lacks what the settings need.
        """
        if cluster.device == "cuda" and cluster.gpus_per_worker == 0:
            raise ClusterError(
                "cluster.device is 'cuda', but cluster.gpus_per_worker is 0",
                remedy="set cluster.gpus_per_worker=1, or cluster.device=auto",
            )
        wait_for_close()  # else this process would join the Ray that it is closing, after Ctrl-C in a notebook
        self._owns_cluster = address is not None or not ray.is_initialized()
        dashboard = connect(address) if self._owns_cluster else ""
        try:
            self.cluster = cluster = with_gpus(cluster)
            self.gpus_per_worker: float | None = default_gpus(cluster)
            self.nodes, self.light_nodes = Nodes(cluster), Nodes(cluster, light=True)
            self.nodes.require(cluster.workers or 1)
        except BaseException:
            self._leave()
            raise
        versions_here()  # before a change to the package's files: this process has imported the present ones
        self.metrics = RayMetrics()
        self.pool: list[PoolWorker] = []
        """Actors of one-worker tasks. They outlive a stage, because the next stage may use them too."""
        self._stage = StageSetup(0, object, (), "")
        self.faults: Counter[str] = Counter()
        """Node -> number of workers lost there in a row by errors."""
        self.set_aside: dict[Gpus, PoolWorker] = {}
        """Broken GPU -> actor that holds the broken GPU itself, or a substitute: another GPU of its node. A worker to
        which Ray gives the broken GPU uses the substitute. The actors outlive a stage."""
        where = f", dashboard http://{dashboard}" if dashboard else ""
        gpus = f" and {counted(cluster.gpus_per_worker, 'GPU')}" if cluster.gpus_per_worker else " and no GPU"
        each = f"{counted(cluster.threads_per_worker, 'thread')}{gpus}"
        self.description = f"Ray, up to {counted(self.workers, 'worker')} with {each} each{where}"

    @property
    def workers(self) -> int:
        """Highest number of workers at the same time: `cluster.workers`, else what the running nodes can hold."""
        return self.nodes.planned()[0]

    @property
    def workers_per_machine(self) -> int:
        """Highest number of workers on one node."""
        return self.nodes.planned()[1]

    @property
    def light_workers(self) -> int:
        """Highest number of workers that run tasks with `is_light` at the same time."""
        return self.light_nodes.planned()[0]

    def share(self, value: Any) -> Any:
        """Put a value into Ray's object store. Returns its reference. All actors of a node share one copy of arrays."""
        return ray.put(value)

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: list[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """Run the tasks on Ray actors. Yields pairs (task, event).

        After an error in the user's input, running tasks finish and no other starts.

        Args:
            worker: worker class. Each actor constructs worker(*setup).
            setup: arguments of the constructor, or references to them from `share`.
            method: worker's method that runs a task, unless the task names another.
            tasks: tasks to run. The caller may append to the list meanwhile.

        Raises:
            DatmError: an error in the user's input; a task needs more workers than the cluster can hold; or workers
                could not be started, were lost too often, or did not become free.
            Interrupted: the command was asked to stop.
        """
        first = dict[tuple[int, bool, int], str]()
        for task in tasks:
            first.setdefault((min((task.size, *task.fewer)), task.is_light, task.memory), task.name)
        for (size, is_light, memory), name in first.items():
            self.require_workers(name, size, light=is_light, memory=memory)
        self._report_memory(tasks)
        self.metrics.begin(tasks, self.workers)
        is_other = (worker, *map(id, setup)) != (self._stage.worker, *map(id, self._stage.setup))
        number = self._stage.number + is_other  # actors keep their worker while the number stays the same
        self._stage = StageSetup(number, worker, setup, method, versions_here())
        stage = _Stage(self, self._stage, tasks)
        try:
            for task, event in stage.events():
                self.metrics.record(task, event)
                yield task, event
        finally:
            stage.close()

    def close(self) -> None:
        """Stop all actors and disconnect. Also stop the cluster if it was started for the run.

        Raises:
            Interrupted: a signal came. If this process ends now, what it has started of Ray ends too.
        """
        close_unless_interrupted(self._close)

    def _close(self) -> None:
        self.metrics.close()
        for each in [*self.pool, *self.set_aside.values()]:
            each.stop()
        self._leave()

    def _leave(self) -> None:
        if self._owns_cluster:
            ray.shutdown()

    def _report_memory(self, tasks: list[Task]) -> None:
        """Log a warning if the tasks' main memory keeps CPUs or GPUs idle, once: for the tasks that need most."""
        workers = Counter[tuple[int, bool]]()
        for task in tasks:
            workers[task.memory, task.is_light] += task.size
        for (memory, is_light), count in sorted(workers.items(), reverse=True):
            nodes = self.light_nodes if is_light else self.nodes
            if short := nodes.short_of_memory(min(count, self.cluster.workers or count), memory):
                _log.warning("%s", short)
                return

    def require_workers(self, name: str, size: int, *, light: bool = False, memory: int = 0) -> None:
        """Raise a `ClusterError` if a task's `size` workers can never run at the same time.

        Args:
            name: name of the task or run, for the message.
            light: True for workers with the resources of `cluster.light`, False for those of `cluster` itself.
            memory: bytes of main memory that each worker needs; 0 reserves none.
        """
        if self.cluster.workers and size > self.cluster.workers:
            raise ClusterError(
                f"{name} needs {size} workers at the same time, but cluster.workers is {self.cluster.workers}",
                "the number is cluster.shards times the networks that cluster.backbones_apart and auxiliaries_apart "
                "put on workers of their own",
                "lower them, or raise cluster.workers",
            )
        (self.light_nodes if light else self.nodes).require(size, f"{name}: ", memory)


@dataclass(eq=False)
class _Job:
    """Task that has not ended, with its past attempts and its current attempt."""

    task: Task
    history: History = field(default_factory=History)
    not_before: float = 0.0
    """Time before which no new attempt starts, in seconds of the monotonic clock."""
    sizes: list[int] = field(default_factory=list)
    """Numbers of workers that can run the task, the largest first."""
    limit: int = 2**31
    """Largest number of workers to request for the task, inclusive. Lowered while other commands hold the resources of
    more; 2**31 is no limit."""
    is_short: bool = False
    """True from when a larger group did not get its resources until the task runs with more workers."""
    size: int = 0
    """Number of workers of the current or last attempt; 0 before the first."""
    group: RankGroup | None = None
    """Ranks of the current attempt, requested or at work; `None` for a task of one worker, and before a request."""
    waits_since: float = 0.0
    """Time, in seconds of the monotonic clock, since which the task waits for resources that other commands hold. Time
    in which it waits for tasks of this command is left out."""
    workers: list[PoolWorker] = field(default_factory=list)
    """Actors at work, by rank; empty while the task waits for actors."""
    streams: dict[Any, int] = field(default_factory=dict)
    """Stream of events (Ray's generator of references) -> rank, for ranks that have not ended."""
    began: float = 0.0
    """Time of the current attempt's start, in seconds of the monotonic clock."""
    heard: float = 0.0
    """Time of rank 0's last event, in seconds of the monotonic clock. Log records and other ranks' events do not count,
    because they say nothing about the time that a step takes."""
    silence: float = 0.0
    """Seconds without an event of rank 0, without time in which this process was suspended, as by Ctrl-Z."""
    patience: Patience = field(default_factory=Patience)
    saved: int = 0
    """Highest `Progress.done` that the current attempt has saved."""
    leaves: bool = False
    """True if the current attempt was asked to save its work and end, because a node of its workers ends soon."""
    peer_lost: tuple[BaseException, float] | None = None
    """First error of a rank that lost its peers, and the time, in seconds of the monotonic clock, until which to wait
    for another rank's original error. `None` if no rank lost its peers."""
    result: Finished | Stopped = field(default_factory=Finished)
    """Final event of rank 0, which is passed on once all ranks have ended."""

    @property
    def is_waiting(self) -> bool:
        return not self.workers and self.not_before <= time.monotonic()

    @property
    def is_placed(self) -> bool:
        """True if Ray has reserved the resources of all ranks."""
        return bool(self.group and self.group.is_placed)

    @property
    def unheard(self) -> float:
        """Seconds from rank 0's last event until now, without time in which this process was suspended."""
        return min(time.monotonic() - self.heard, self.silence + ABSENCE)


class _Stage:
    """Run of one stage, from its first to its last task. All its tasks have the same worker class.

    Tasks of several workers start before tasks of one, and each kind starts in the caller's order. Workers are
    requested from Ray for all tasks that may start. A task avoids the nodes that failed it, while other nodes can hold
    its workers.
    """

    def __init__(self, executor: RayExecutor, stage: StageSetup, tasks: list[Task]) -> None:
        self._executor, self._cluster, self._nodes = executor, executor.cluster, executor.nodes
        self._pool, self._stage, self._tasks = executor.pool, stage, tasks
        self._limit = executor.cluster.workers or sys.maxsize
        self._taken = 0
        """Number of tasks taken from the caller's list so far."""
        self._jobs: list[_Job] = []
        """Tasks that have not ended, in the order of the caller's list."""
        self._failure: DatmError | None = None
        """First error in the user's input; `None` without one. After an error no task starts; running tasks finish."""
        self._given_up: DatmError | None = None
        """Error of the first task that lost its workers too often. It is raised after all other tasks have ended."""
        self._is_stopping = False
        """True once the command was asked to stop: tasks at work are saved, and none starts."""
        self._draining: set[str] = set()
        """Nodes that end soon, as of the last check. Ray places nothing on them."""
        self._failed_starts = 0
        """Number of failed attempts in a row to start actors; actors that were requested together count once."""
        self._failed_at = self._request_after = self._asked_at = 0.0
        """Three times in seconds of the monotonic clock: last failed start of an actor; earliest request of another;
        last question to Ray about actors that wait."""
        self._checked, self._checked_groups = time.monotonic(), 0.0
        """Times of the last check of the workers, and of waiting groups, in seconds of the monotonic clock."""
        self._due_since = math.inf
        """Time, in seconds of the monotonic clock, since which a group waits that the nodes could hold beside the
        running groups. Infinite if no group waits so; -infinite once one has waited too long."""
        self._idle_since = self._reported_at = math.inf
        """Two times in seconds of the monotonic clock: since which no task runs (infinite if one runs), and of the last
        message about waiting."""
        self._starting_since = math.inf
        """Time, in seconds of the monotonic clock, since which workers' processes start and no task runs; infinite if a
        task runs, or none starts."""

    def events(self) -> Iterator[tuple[Task, Event]]:
        """Run all tasks to their end and yield their events, each with its task.

        Raises:
            DatmError: the first error in the user's input, else the error of the first task that lost its workers too
                often; or workers cannot be started, or did not become free in time.
            Interrupted: the command was asked to stop.
        """
        with saving("Stopping") as is_asked:  # details follow once the workers have answered
            while self._take_tasks():
                if is_asked():
                    yield from self._save_and_stop()
                yield from self._start()
                yield from self._next_events()
                yield from self._check()
        if failure := self._failure or self._given_up:
            raise failure

    def close(self) -> None:
        """Stop the workers of all tasks that have not ended."""
        for job in self._jobs:
            self._release(job)

    def _take_tasks(self) -> list[_Job]:
        """Take tasks that the caller has added to the list. Returns all that have not ended; after an error in the
        user's input only those that run."""
        new = self._tasks[self._taken :]
        if self._taken and new:
            self._executor.metrics.add(new)
        self._taken += len(new)
        self._jobs += [_Job(task, sizes=[task.size, *task.fewer], waits_since=time.monotonic()) for task in new]
        if self._failure:
            self._jobs = [job for job in self._jobs if job.workers]
        return self._jobs

    def _save_and_stop(self) -> Iterator[tuple[Task, Event]]:
        """Ask the workers to save their work, wait up to `SAVE_TIMEOUT` s for it, then raise `Interrupted`."""
        self._is_stopping = True
        asked = {worker.save(): job for job in self._jobs for worker in job.workers}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=CHECK_INTERVAL) if asked else ([], [])
        at_work = list(dict.fromkeys(asked[each] for each in answered if _answer(each)))
        for job in [job for job in self._jobs if job not in at_work]:
            self._release(job)
        self._jobs = at_work
        for job in at_work:
            job.leaves = False  # its end is the command's end
            yield job.task, Note(f"{SAVES}; workers have {SAVE_TIMEOUT:.0f} s")
        saved, end = [], time.monotonic() + SAVE_TIMEOUT
        while any(job.streams for job in self._jobs) and time.monotonic() < end:
            for task, event in self._next_events():
                saved += [f"{task.name}: {event.saved}"] if isinstance(event, Stopped) else []
                yield task, event
        raise Interrupted("; ".join(saved))

    # --- from waiting to running ----------------------------------------------------------------------------------

    def _start(self) -> Iterator[tuple[Task, Event]]:
        """Start waiting tasks on workers that Ray has given: groups, or free actors. Request workers for the others."""
        yield from self._start_groups()
        yield from self._request_groups()
        waiting = [job for job in self._jobs if job.is_waiting and job.task.size == 1]
        if self._groups_are_due():
            for job in waiting:
                job.waits_since = job.waits_since if self._is_apart(job) else time.monotonic()
            waiting = [job for job in waiting if self._is_apart(job)]
        yield from self._start_alone(waiting)

    def _start_alone(self, waiting: list[_Job]) -> Iterator[tuple[Task, Event]]:
        """Start waiting tasks that need a single worker on free actors, in order, and request actors for the rest.

        Free actors that suit none of these tasks are stopped: at once if any task still waits, otherwise after
        `SHORT_WAIT` seconds. Requests that suit no waiting task, or are too old, are withdrawn.
        """
        blocked = self._nodes_without_substitute()
        self._drop(*(each for each in self._free() if each.node in blocked))  # the substitute may take its GPU
        free, pending = self._free(), [each for each in self._pool if each.starting is not None]
        held = sum(job.group.size for job in self._jobs if job.group and (job.workers or self._due_since > -math.inf))
        started = len(self._pool) - len(pending)
        left = min(self._limit - held - len(self._pool), max(PENDING, started) - len(pending))
        left = 0 if time.monotonic() < self._request_after else left
        # Ray does not say that an actor hangs in its start, as on a dead mount, so a request has a time limit.
        oldest = time.monotonic() - self._cluster.progress_timeout
        for job in waiting:
            if not free and not pending and left <= 0:  # a shortcut: with many tasks, actors are seldom free
                break
            avoided, options = self._avoided(job), self._options(job.task)
            wanted = avoiding(options, avoided)
            if found := next((each for each in free if each.node not in avoided and each.suits(options)), None):
                free.remove(found)
                yield from self._begin(job, [found])
            elif same := [each for each in pending if each.options == wanted and each.free_since > oldest]:
                pending.remove(same[0])
            elif left > 0:
                left -= 1
                if not self._pool:
                    yield job.task, Phase("starting workers")
                self._pool.append(PoolWorker.start(wanted))
        groups = [job for job in self._jobs if job.task.size > 1]
        is_needed = not all(job.workers for job in [*waiting, *groups])  # others may need what is free
        kept_since = math.inf if is_needed else time.monotonic() - SHORT_WAIT
        self._drop(*pending, *(each for each in free if each.free_since < kept_since))

    def _free(self) -> list[PoolWorker]:
        used = [worker for job in self._jobs for worker in job.workers]
        return [each for each in self._pool if each.starting is None and each not in used]

    def _nodes_without_substitute(self) -> set[str]:
        """Nodes with a broken GPU whose substitute is not known, because the actor that holds it has not started.

        Once started, such an actor may turn out to hold another broken GPU. No task gets that GPU any more, so its
        substitute replaces the first broken GPU from then on.
        """
        held = self._executor.set_aside
        for gpu in held:
            each = held[gpu]
            each.find_node()
            if each.gpu in held:
                held[gpu], held[each.gpu] = held[each.gpu], each
        return {each.node for each in held.values() if not each.gpu}

    def _is_apart(self, job: _Job) -> bool:
        """True if the task runs on workers of `cluster.light`, which are assumed to take nothing that groups need."""
        return self._cluster.light is not None and job.task.is_light

    def _ranks(self) -> int:
        """Number of workers of all groups at work."""
        return sum(job.size for job in self._jobs if job.group and job.workers)

    def _alone(self) -> int:
        """Number of tasks at work that have a single worker, on resources that groups may need."""
        return sum(not job.group and bool(job.workers) and not self._is_apart(job) for job in self._jobs)

    def _fits_limit(self, size: int) -> bool:
        """True if `cluster.workers` allows `size` more workers."""
        return self._ranks() + len(self._pool) + size <= self._limit

    def _groups_are_due(self) -> bool:
        """True while tasks of one worker must not start, so that a waiting group gets the resources that become free.

        Only groups that the nodes can hold beside running groups are due. Tasks of one worker wait for a due group for
        at most `LONGEST_DRAIN` seconds, or until the group has waited for `SHORT_WAIT` seconds because other commands
        hold the resources. Then these tasks start again, until no group is due any more. Callers let tasks on workers
        of `cluster.light` start all the same.
        """
        now, waiting = time.monotonic(), [job for job in self._jobs if job.task.size > 1 and job.is_waiting]
        if any(job.is_placed for job in waiting):
            return True  # its resources are reserved, and it waits for cluster.workers only
        ranks = self._ranks()
        due = [job for job in waiting if size_for(job.sizes, min(self._limit, self._capacity(job)) - ranks)]
        self._due_since = min(self._due_since, now) if due else math.inf
        if due and now > min(self._due_since + LONGEST_DRAIN, *(job.waits_since + SHORT_WAIT for job in due)):
            self._due_since = -math.inf
        return bool(due) and self._due_since > -math.inf

    def _request_groups(self) -> Iterator[tuple[Task, Event]]:
        """Request the ranks of tasks of several workers, in the order of the tasks.

        An earlier request is replaced if the task should now have another size or avoid other nodes.
        """
        now, ranks, alone = time.monotonic(), self._ranks(), self._alone()
        taken = ranks
        for job in [job for job in self._jobs if job.task.size > 1 and job.is_waiting]:
            free, left = self._capacity(job) - taken, self._limit - taken
            size = self._size(job, free, left)
            if size is None or not (job.group or self._fits_limit(size)):
                continue  # running tasks end first
            free, taken = free - size, taken + size
            is_short = size > job.sizes[-1] and now - job.waits_since > SHORT_WAIT
            if free < alone and (ranks or alone):  # nodes or running tasks of this command are waited for
                job.waits_since = now
            elif is_short and free >= 0 and not job.is_placed:
                nodes, bad = self._nodes_of(job.task), self._avoided(job, size) | self._draining
                idle = nodes.idle(bad, job.task.memory)
                job.limit = idle if job.sizes[-1] <= idle < size else size // 2
                job.is_short, job.waits_since = True, now
                yield job.task, Note(f"{counted(size, 'worker')} did not become free; trying with fewer")
                continue
            options = self._requested_options(job, size)
            if job.group and (job.group.size, job.group.options) == (size, options):
                continue
            if job.group:
                job.group.stop()
            yield job.task, Phase(f"starting {counted(size, 'worker')}")
            job.group = RankGroup(size, options)

    def _size(self, job: _Job, free: int, left: int) -> int | None:
        """Number of ranks (workers of a group) to request for a task; `None` if `left` is too small for every size.

        This is the largest size for which `free` and `left` are enough, else the largest for which `left` is enough.
        Sizes above `job.limit` are left out, unless all are above it: then the smallest is left.
        After a second loss without progress, a smaller group without the nodes that failed the task is preferred to a
        larger group with them.

        Args:
            free: number of workers that the nodes can hold beside other groups.
            left: number of workers that may still be started under the limit `cluster.workers`.
        """
        sizes = [size for size in job.sizes if size <= job.limit] or job.sizes[-1:]
        bad = self._avoided(job, job.sizes[-1]) if job.history.without_progress > 1 else set[str]()
        now = min(free, left)
        good = min(now, self._capacity(job, bad)) if bad else now
        return size_for(sizes, good) or size_for(sizes, now) or size_for(sizes, left)

    def _start_groups(self) -> Iterator[tuple[Task, Event]]:
        """Start groups whose resources are reserved. Ray is asked at most once per `EVENT_INTERVAL` seconds."""
        if time.monotonic() - self._checked_groups < EVENT_INTERVAL:
            return
        self._checked_groups = time.monotonic()
        for job, group in [(job, job.group) for job in self._jobs if job.is_waiting and job.group]:
            if group.is_reserved() and self._fits_limit(group.size) and not self._nodes_without_substitute():
                if group.size != (job.size or job.task.size):
                    yield job.task, Resized(group.size, job.task.size)
                group.start([each for each in sorted(job.sizes) if group.size < each <= self._limit])
                yield from self._begin(job, group.workers)

    def _begin(self, job: _Job, workers: list[PoolWorker]) -> Iterator[tuple[Task, Event]]:
        job.workers, job.size, job.saved, job.silence = workers, len(workers), 0, 0.0
        job.began = job.heard = time.monotonic()
        job.peer_lost, job.leaves = None, False
        job.patience = patience_of(job.size, self._cluster.peer_timeout, self._cluster.progress_timeout)
        # Ray resolves these references before the calls, so the driver does not wait until all ranks have started.
        others = [worker.starting or "" for worker in workers[1:]]
        address = workers[0].actor.rendezvous.remote(*others) if others else ""
        instead = {gpu: each.gpu for gpu, each in self._executor.set_aside.items() if each.gpu}
        stage = self._stage._replace(instead=instead)
        for rank, worker in enumerate(workers):
            worker.run(stage, job.task, job.patience, (rank, job.size), address)
        job.streams = {worker.stream: rank for rank, worker in enumerate(workers)}
        yield job.task, Started(job.size)

    def _nodes_of(self, task: Task) -> Nodes:
        return self._executor.light_nodes if task.is_light else self._nodes

    def _capacity(self, job: _Job, bad: Collection[str] = ()) -> int:
        """Number of a task's workers that running nodes can hold. Neither nodes that end soon, nor those in `bad`, nor
        broken GPUs count."""
        nodes, memory, bad = self._nodes_of(job.task), job.task.memory, {*bad, *self._draining}
        good = {node for node, held in nodes.fits(memory).items() if held and node not in bad}
        share = self._options(job.task).get("num_gpus", 1.0)
        lost = sum(each.node in good for each in self._executor.set_aside.values())
        return nodes.elsewhere(bad, memory) - lost * int(1 / share + 1e-9)

    def _options(self, task: Task) -> dict[str, Any]:
        return worker_options(self._cluster, task.is_light, self._nodes_of(task).reserved(task.memory))

    def _requested_options(self, job: _Job, size: int = 1) -> dict[str, Any]:
        return avoiding(self._options(job.task), self._avoided(job, size))

    def _avoided(self, job: _Job, size: int = 1) -> set[str]:
        """Nodes that failed this task since it last saved new work, and nodes with `FAULTS_OF_A_NODE` losses in a row.

        The set is empty if the other running nodes cannot hold the task's `size` workers.
        """
        bad = {node for node, count in self._executor.faults.items() if count >= FAULTS_OF_A_NODE} | job.history.nodes
        return bad if bad and knows_labels() and self._capacity(job, bad) >= size else set()

    def _drop(self, *workers: PoolWorker) -> None:
        """Remove actors from the pool and stop them. Actors in `set_aside` are not stopped: they keep their GPUs."""
        for worker in workers:
            if worker not in self._executor.set_aside.values():
                worker.stop()
            self._pool.remove(worker)

    def _release(self, job: _Job) -> None:
        """Stop the workers of a task's current attempt. The task then waits for workers again.

        Requests of later tasks' groups are withdrawn, so that this task's next one comes before theirs.
        """
        if job.group:
            for later in self._jobs[self._jobs.index(job) + 1 :] if job.workers else ():
                if later.group and not later.workers:  # its new request comes after this task's, as in the list
                    later.group.stop()
                    later.group = None
            job.group.stop()
        else:
            self._drop(*job.workers)
        job.group, job.workers, job.streams, job.waits_since = None, [], {}, time.monotonic()
        self._executor.metrics.release(job.task)

    # --- while they run -------------------------------------------------------------------------------------------

    def _next_events(self) -> Iterator[tuple[Task, Event]]:
        """Wait at most `EVENT_INTERVAL` for events and for actors to start, and handle what has arrived."""
        starting = {each.starting: each for each in self._pool if each.starting is not None}
        at_work = sorted((job for job in self._jobs if job.streams), key=lambda job: job.heard)  # none waits long
        streams = {stream: job for job in at_work for stream in job.streams}
        if not streams and not starting:
            time.sleep(EVENT_INTERVAL)
            return
        arrived, _ = ray.wait([*streams, *starting], num_returns=1, timeout=EVENT_INTERVAL, fetch_local=False)
        for each in arrived:
            if each in starting:
                self._note_start(starting[each])
            elif each in (job := streams[each]).streams:
                yield from self._read(job, each)

    def _note_start(self, worker: PoolWorker) -> None:
        """Record that an actor has started, or drop an actor that Ray could not start.

        Raises a `WorkerLostError` if more than `MOST_FAILED_STARTS` starts in a row have failed and no task runs.
        """
        try:
            worker.has_started(ray.get(worker.starting))
            self._failed_starts = 0
            worker.free_since = time.monotonic()
        except RayError as failure:
            self._drop(worker)
            now, why = time.monotonic(), f"Ray cannot start workers: {reason(unwrapped(failure))}"
            if worker.free_since < self._failed_at:
                return  # requested together with one that has failed already
            self._failed_starts, self._failed_at = self._failed_starts + 1, now
            self._request_after = now + min(WAIT_INTERVAL, 0.1 * 2.0 ** min(self._failed_starts, 10))
            if self._failed_starts > MOST_FAILED_STARTS and not any(job.workers for job in self._jobs):
                remedy = "see the cluster's dashboard or `ray status`, then run the same command again: it resumes"
                raise WorkerLostError(why, remedy=remedy) from None
            _log.warning("%s; trying again", why)

    def _read(self, job: _Job, stream: Any) -> Iterator[tuple[Task, Event]]:
        """Handle the next item of a rank's stream: log records and an event, an error, or the stream's end."""
        rank, task = job.streams[stream], job.task
        try:
            records, event = ray.get(next(stream))
        except StopIteration:
            del job.streams[stream]
            if not job.streams and not job.peer_lost:
                yield from self._end(job)
            return
        except RayError as failure:
            yield from self._lose(job, unwrapped(failure), stream)
            return
        accept(records)
        if event is None:
            return
        if rank:
            self._executor.metrics.record(task, event, rank)
            return
        silence, job.heard, job.silence = job.unheard, time.monotonic(), 0.0
        if isinstance(event, Finished | Stopped):
            job.result = event  # passed on by `_end`, after the end of all streams
        else:
            job.patience.take(event, silence)
            yield task, event
            if isinstance(event, Progress) and event.saved:
                job.saved = event.done
                yield from self._grow(job)

    def _grow(self, job: _Job) -> Iterator[tuple[Task, Event]]:
        """Restart a group with more workers, if Ray has reserved resources for more meanwhile.

        A restart takes time, so a group grows at most every `GROWTH_INTERVAL` seconds. It grows earlier if it gets all
        workers that it can use, or if it was made smaller because workers did not become free.
        """
        size = size_for(job.sizes, job.group.possible) if job.group else None
        is_due = size == size_for(job.sizes, self._limit) or job.is_short
        if size and size > job.size and (is_due or time.monotonic() - job.began > GROWTH_INTERVAL):
            self._release(job)
            job.limit = size if size < self._capacity(job) else 2**31  # others may hold the rest
            job.is_short = False
            yield job.task, Note("checkpoint saved; restarting with more workers")

    def _end(self, job: _Job) -> Iterator[tuple[Task, Event]]:
        """Pass on the result of a task whose workers have all ended. The workers are then free for another task.

        If they ended early because a node ends soon, the task waits for other workers instead.
        """
        if job.leaves and isinstance(job.result, Stopped):
            yield job.task, Note(f"its node ends soon: saved {job.result.saved}, to resume elsewhere")
            self._release(job)
            return
        self._jobs.remove(job)
        for worker in job.workers:
            self._executor.faults.pop(worker.node, None)
            worker.free_since = time.monotonic()
        yield job.task, job.result
        if job.group:
            heir = next((each for each in self._jobs if each.task.size > 1 and each.is_waiting), None)
            kind = job.size, job.group.options
            if heir and (heir.task.size, self._requested_options(heir, job.size)) == kind:
                self._release(heir)
                heir.group = job.group
                heir.group.give_back()  # it wants no more ranks than it has
                yield from self._begin(heir, job.workers)
            else:
                job.group.stop()

    def _lose(self, job: _Job, cause: BaseException, stream: Any = None) -> Iterator[tuple[Task, Event]]:
        """Handle an error of a task's attempt: retry the task, give it up, or end the stage.

        An error in the user's input ends the stage, unless it may not occur on other nodes. After any other error
        the task is retried, or given up if it has lost its workers too often. If a rank only lost its peers, another
        rank's error is awaited first. A GPU that may be broken is set aside, so that no task gets it. The first
        GPU set aside on a node does not count as a failure of the node, because its other GPUs may work. The second one
        counts, and so does a GPU that torch cannot use.

        Args:
            stream: stream that ended with the error; `None` if no stream did.
        """
        if isinstance(cause, PeerLostError) and stream is not None and job.streams.keys() - {stream}:
            del job.streams[stream]  # another rank's error may be the cause
            job.peer_lost = job.peer_lost or (cause, time.monotonic() + ROOT_CAUSE_TIMEOUT)
            return
        gpu, is_first = self._set_aside(job, cause, stream)
        nodes = self._blame(job, cause, stream) if is_final(cause) or not is_first else ()
        history = job.history.after_loss(job.saved, nodes)
        if is_final(cause) and not (may_be_the_nodes(cause) and (gpu or self._has_elsewhere(job, history))):
            yield from self._refuse(job, cause)
            return
        why = reason(cause) + (f"; {gpu} is not used again" if gpu else "")
        if isinstance(cause, RayTaskError):
            _log.info("%s", cause, extra={"is_shown": True})  # with the worker's traceback
        elif isinstance(cause, RayActorError) and job.unheard > job.patience.limit:
            why = f"no step for {job.unheard:.0f} s; its log in Ray's dashboard says where it was stuck"
        job.history = history
        if history.gives_up(self._cluster.retries):
            failure = self._too_many_losses(job, cause, why)
            self._given_up = self._given_up or failure
            yield from self._fail(job, failure)
        else:
            self._release(job)
            job.not_before = time.monotonic() + history.delay
            yield job.task, Lost(why, history.losses, is_retried=not (self._failure or self._is_stopping))

    def _refuse(self, job: _Job, cause: DatmError) -> Iterator[tuple[Task, Event]]:
        """End the stage after an error in the user's input.

        The stage does not end if the task ran with fewer workers than it can use: a larger group may not have the
        error, such as too little memory. The task then waits until added nodes allow a larger group.
        """
        if isinstance(cause, ConfigError) and not isinstance(cause, PluginError) and job.size < job.task.size:
            self._release(job)
            job.sizes = [each for each in job.sizes if each > job.size]
            yield job.task, Note(f"waiting for nodes: {counted(job.size, 'worker')} cannot run it: {cause}")
        else:
            self._failure = self._failure or cause
            yield from self._fail(job, cause)

    def _has_elsewhere(self, job: _Job, history: History) -> bool:
        """True if the task may be retried on other nodes after an error that may have its cause on single nodes.

        The error is final once it has occurred on `cluster.retries` + 1 nodes, or if other nodes cannot hold the task.
        """
        is_known = knows_labels() and 0 < len(history.nodes) <= self._cluster.retries
        return is_known and self._capacity(job, history.nodes) >= job.sizes[-1]

    def _set_aside(self, job: _Job, cause: BaseException, stream: Any) -> tuple[Gpus | None, bool]:
        """Keep a GPU from other tasks if an error may be its own, because Ray would give it to the next actor.

        The actor that had the error is kept, and with it the GPU. The ranks of a group end together with the group's
        reservation, so a new actor takes any GPU of the node, as a substitute for the broken one. If the broken GPU
        is itself a substitute, its own actor holds it already, and the GPU that it replaced gets another substitute.
        The last GPU is not set aside. Nor is a shared one, because Ray would still give its other shares to actors.

        Returns:
            The broken GPU, `None` if none was set aside; and True if it is the first set aside on its node.
        """
        held, worker = self._executor.set_aside, job.workers[job.streams.get(stream, 0)]
        worker.find_node()
        gpu, node, gpus = worker.gpu, worker.node, worker.options.get("num_gpus", 0.0)
        broken = held[gpu].gpu if gpu in held else gpu
        is_lasting = gpus >= 1 and may_be_the_gpu(cause) and self._capacity(job) > job.sizes[-1]
        if not gpu or not broken or not is_lasting or (job.group and not knows_labels()):
            return None, False
        is_first = all(each.node != node for each in held.values())
        if gpu in held:
            held[broken] = held[gpu]
        if job.group:
            there = {"ray.io/node-id": node}
            worker = PoolWorker.start({"num_cpus": 0.0, "num_gpus": gpus, "label_selector": there})
            worker.node = node
        held[gpu] = worker
        return broken, is_first

    def _blame(self, job: _Job, cause: BaseException, stream: Any) -> set[str]:
        """Return the nodes that failed the task; empty if unknown. For each node, count the loss and stop free actors.

        The death of a node itself is not counted. If no stream ended with the error, the ranks that have not ended are
        the ones that hang. A rank that lost its peers is not the cause, and neither is one whose stream has ended.
        """
        streams = list(job.streams) if stream is None else [stream] * (not isinstance(cause, PeerLostError))
        nodes = {job.workers[job.streams[each]].node for each in streams if each in job.streams}
        self._executor.faults.update(nodes if not isinstance(cause, NodeDiedError) else ())
        # These actors may be lost too, and new ones are cheap.
        self._drop(*(each for each in self._free() if each.node in nodes))
        return nodes

    def _too_many_losses(self, job: _Job, cause: BaseException, why: str) -> DatmError:
        """Error for a task that is given up: its last error if the package raised it, such as for a full disk.

        Otherwise a `WorkerLostError` with the number of losses and the reason `why` of the last one.
        """
        ours = cause if isinstance(cause, DatmError) else None
        if ours and not isinstance(ours, WorkerLostError):
            return ours
        times = job.history.without_progress
        return WorkerLostError(
            f"{job.task.name} lost its worker {times} times without progress; last reason: {why}",
            (ours and ours.cause) or "the reason is in the log and in Ray's dashboard",
            (ours and ours.remedy)
            or "run the same command again: it resumes; raise cluster.progress_timeout if a step takes longer",
        )

    def _fail(self, job: _Job, failure: DatmError) -> Iterator[tuple[Task, Event]]:
        """End a task that is not retried. `events` raises its error after the other tasks have ended."""
        self._release(job)
        self._jobs.remove(job)
        for each in [each for each in self._jobs if self._failure and not each.workers]:
            self._release(each)
        if others := self._take_tasks():
            running = sum(bool(each.workers) for each in others)
            yield job.task, Failed(str(failure), running, len(others) - running)

    def _check(self) -> Iterator[tuple[Task, Event]]:
        """Fetch logs, end stuck workers that have not ended themselves, and report tasks that wait for long.

        Raises a `NoFreeWorkersError` if no task runs and no workers become free in time.
        """
        now = time.monotonic()
        yield from self._report_waiting(now)
        if now - self._checked > CHECK_INTERVAL:
            passed, self._checked, self._draining = min(now - self._checked, ABSENCE), now, draining_nodes()
            for job in [job for job in self._jobs if job.workers]:
                yield from self._check_workers(job, passed)
            yield from self._check_gpus(now)
        for job in list(self._jobs):
            if job.peer_lost and job.workers and (now > job.peer_lost[1] or not job.streams):
                yield from self._lose(job, job.peer_lost[0])

    def _check_gpus(self, now: float) -> Iterator[tuple[Task, Event]]:
        """Give up actors in `set_aside` that have died, got no GPU within `SHORT_WAIT` seconds, or lost their node.

        A worker that uses such an actor's GPU in place of a broken one is lost, because Ray gives that GPU to others.
        """
        for gpu, each in list(self._executor.set_aside.items()):
            is_late = not each.gpu and now - each.free_since > SHORT_WAIT  # another command has got the GPU
            if not is_late and each.take_news() and each.node in self._nodes.fits():
                continue
            self._executor.set_aside.pop(gpu).stop()  # a node may come back
            if each.gpu in (None, gpu):
                continue  # no worker uses it
            self._drop(*(idle for idle in self._free() if idle.gpu == gpu))
            for job in list(self._jobs):
                if user := next((worker for worker in job.workers if worker.gpu == gpu), None):
                    yield from self._lose(job, WorkerLostError("its GPU is no longer reserved"), user.stream)

    def _check_workers(self, job: _Job, passed: float) -> Iterator[tuple[Task, Event]]:
        """Fetch logs of a task's workers, and end workers that are silent for too long.

        If a worker's node ends soon, all workers of the task are asked to save their work and end, so that others can
        resume it. They are asked again at every check: while a worker compiles, for example, it has nothing to save.

        Args:
            passed: seconds since the last check, without time in which this process was suspended.
        """
        job.leaves = job.leaves or any(worker.node in self._draining for worker in job.workers)
        for worker in job.workers:
            worker.find_node()
            worker.take_news()
            if job.leaves:
                worker.save()
            has_node = worker.node in self._nodes.fits() or time.monotonic() - job.began < CHECK_INTERVAL
            if worker.starting is not None and not has_node:  # Ray would wait for another node
                yield from self._lose(job, WorkerLostError("its node died before the worker started"), worker.stream)
                return
        job.silence += min(passed, time.monotonic() - job.heard)
        if job.silence > job.patience.limit + MARGIN:
            for worker in job.workers:
                worker.end_process()
            yield from self._lose(job, WorkerLostError(f"no step for {job.silence:.0f} s, and no answer"))

    def _report_waiting(self, now: float) -> Iterator[tuple[Task, Event]]:
        """While tasks wait and none runs, report it once a minute.

        Before the error, tasks may use nodes and GPUs again that failed them, because no other becomes free. Time in
        which a worker's process starts is no wait, up to `cluster.progress_timeout` seconds: Ray may need long for its
        environment.

        Args:
            now: present time, in seconds of the monotonic clock.

        Raises:
            NoFreeWorkersError: the tasks have waited for longer than `Nodes.patience` for workers.
        """
        waiting = [job for job in self._jobs if job.is_waiting]
        if len(waiting) < len(self._jobs) or not waiting:
            self._idle_since = self._starting_since = math.inf
            return
        if self._idle_since == math.inf:
            self._idle_since, self._reported_at = now, now - 0.75 * WAIT_INTERVAL
        job = min(waiting, key=lambda job: job.waits_since)
        size, nodes = job.group.size if job.group else job.sizes[0], self._nodes_of(job.task)
        waited = now - max(self._idle_since, job.waits_since)
        is_late = waited > min(nodes.patience(), LONGEST_AVOIDANCE)
        is_silent = now - self._reported_at > WAIT_INTERVAL
        if not is_silent and (not is_late or now - self._asked_at < CHECK_INTERVAL):
            return
        self._asked_at, may_start = now, now - self._starting_since < self._cluster.progress_timeout
        if may_start and self._finds_places():
            self._starting_since = min(self._starting_since, now)
            self._idle_since, text = now, "waiting for the first worker's process to start"
        elif is_late and (self._executor.set_aside or any(self._avoided(each) for each in waiting)):
            self._executor.faults.clear()
            while self._executor.set_aside:
                self._executor.set_aside.popitem()[1].stop()
            for each in waiting:
                each.history, each.waits_since = each.history.forgiving(), now
            text, is_silent = "no other node became free: trying again on nodes and GPUs that lost workers", True
        elif waited > nodes.patience() and (size == job.sizes[-1] or self._capacity(job) < job.sizes[-1]):
            raise nodes.not_enough(size, job.task.memory)  # fewer workers are tried first
        else:
            text = nodes.waiting(size, waited, job.task.memory)
        if is_silent:
            self._reported_at = now
            yield job.task, Note(text)

    def _finds_places(self) -> bool:
        """True if Ray has given resources to a waiting task, so that its processes are starting."""
        if any(job.is_placed for job in self._jobs):
            return True
        requested = sum(each.starting is not None for each in [*self._pool, *self._executor.set_aside.values()])
        return bool(requested) and requested > requests_without_place()


def _answer(reference: Any) -> bool:
    try:
        return bool(ray.get(reference))
    except RayError:  # the worker has died
        return False
