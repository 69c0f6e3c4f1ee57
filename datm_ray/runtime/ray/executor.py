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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayActorError, RayError, RayTaskError

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError, ConfigError, DatmError, PeerLostError, WorkerLostError
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
from datm_ray.runtime.ray.cluster import SHORT_WAIT, Nodes, connect, default_gpus, with_gpus, worker_options
from datm_ray.runtime.ray.compat import draining_nodes, knows_labels
from datm_ray.runtime.ray.losses import is_final, may_be_the_nodes, reason, unwrapped
from datm_ray.runtime.ray.metrics import RayMetrics
from datm_ray.runtime.ray.pool import PoolWorker, Stage, labels_without
from datm_ray.runtime.ray.ranks import RankGroup
from datm_ray.runtime.retries import MARGIN, History, Patience, size_for
from datm_ray.runtime.stopping import SAVE_TIMEOUT, SAVES, Interrupted, close_unless_interrupted, saving, wait_for_close
from datm_ray.words import counted

PENDING = 8
"""Number of actors that may wait for resources at a time; or the number of started actors, if that is larger."""
EVENT_INTERVAL = 0.5
"""Longest wait for an event, in seconds, before waiting tasks are checked."""
CHECK_INTERVAL = 5.0
"""Seconds between two checks for stuck workers, for new log records and for nodes that end soon."""
LONGEST_DRAIN = 600.0
"""Longest time in seconds for which one-worker tasks stay unstarted so that a waiting group can get its resources."""
ABSENCE = 10.0
"""Longest normal gap in seconds between two checks of events. After a longer one, this process was suspended."""
ROOT_CAUSE_TIMEOUT = 3.0
"""Seconds to wait for the original error after a rank reports that it lost its peers."""
AVOIDANCE_PAUSE = 600.0
"""Seconds during which nodes that lost workers are used again, because the other nodes had no free resources."""
WAIT_INTERVAL = 60.0
"""Seconds between two messages that a task waits for a worker. The first message comes after 15 s."""
FAULTS_OF_A_NODE = 3
"""Number of workers lost in a row on one node, by errors, after which new workers avoid the node if possible."""

_log = logging.getLogger(__name__)


class RayExecutor:
    """Executor whose workers are Ray actors, on a running cluster or on a cluster started here for the run."""

    def __init__(self, cluster: ClusterConfig, address: str | None = None) -> None:
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
            self.workers, self.workers_per_machine = self.nodes.planned()
        except BaseException:
            self._leave()
            raise
        self.metrics = RayMetrics()
        self.pool: list[PoolWorker] = []
        """Actors of one-worker tasks. They outlive a stage, because the next stage may use them too."""
        self._number, self._stage = 0, Stage(0, object, (), "")
        self.faults: Counter[str] = Counter()
        """Node -> number of workers lost there in a row by errors."""
        where = f", dashboard http://{dashboard}" if dashboard else ""
        gpus = f" and {counted(cluster.gpus_per_worker, 'GPU')}" if cluster.gpus_per_worker else " and no GPU"
        each = f"{counted(cluster.threads_per_worker, 'thread')}{gpus}"
        more = ", more as nodes start" if self.nodes.may_grow() and cluster.workers is None else ""
        self.description = f"Ray, up to {counted(self.workers, 'worker')} with {each} each{more}{where}"

    @property
    def light_workers(self) -> int:
        """Highest number of workers that run tasks with `is_light` at the same time."""
        return self.cluster.workers or max(1, self.light_nodes.capacity())

    def share(self, value: Any) -> Any:
        """Put a value into Ray's object store. All actors of a node share its arrays without copies."""
        return ray.put(value)

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: list[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """Run every task on Ray actors and yield its events, see `Executor.run`."""
        first = dict[tuple[int, bool], str]()
        for task in tasks:
            first.setdefault((min((task.size, *task.fewer)), task.is_light), task.name)
        for (size, is_light), name in first.items():
            self.require_workers(name, size, light=is_light)
        self.metrics.begin(tasks, self.workers)
        if (worker, *map(id, setup)) != (self._stage.worker, *map(id, self._stage.setup)):
            self._number += 1  # actors keep their worker while the number stays the same
        self._stage = Stage(self._number, worker, setup, method)
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
        for each in self.pool:
            each.stop()
        self._leave()

    def _leave(self) -> None:
        if self._owns_cluster:
            ray.shutdown()

    def require_workers(self, name: str, size: int, *, light: bool = False) -> None:
        """Raise a `ClusterError` if `size` workers can never run at the same time, see `Executor.require_workers`."""
        self.workers, self.workers_per_machine = self.nodes.planned()
        if self.cluster.workers and size > self.cluster.workers:
            raise ClusterError(
                f"{name} needs {size} workers at the same time, but cluster.workers is {self.cluster.workers}",
                "the number is cluster.shards times the networks that cluster.backbones_apart and auxiliaries_apart "
                "put on workers of their own",
                "lower them, or raise cluster.workers",
            )
        (self.light_nodes if light else self.nodes).require(size, f"{name}: ")


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
    """Largest number of workers to try, inclusive. Larger groups did not get their resources."""
    size: int = 0
    """Number of workers of the current or last attempt; 0 before the first."""
    group: RankGroup | None = None
    """Ranks of the current attempt; `None` for a task of one worker, and between attempts."""
    waits_since: float = field(default_factory=time.monotonic)
    """Time since which the task has no workers, in seconds of the monotonic clock."""
    gives_way: bool = False
    """True if the task's group of ranks has waited so long that tasks of one worker may start first."""
    failed_on: str = ""
    """Node of the task's first error that may have its cause on that node alone; "" before such an error."""
    workers: list[PoolWorker] = field(default_factory=list)
    """Actors at work, by rank; empty while the task waits for actors."""
    streams: dict[Any, int] = field(default_factory=dict)
    """Stream of events (Ray's generator of references) -> rank, for ranks that have not ended."""
    heard: float = 0.0
    """Time of the last event, in seconds of the monotonic clock."""
    patience: Patience = field(default_factory=Patience)
    saved: int = 0
    """Highest `Progress.done` that the current attempt has saved."""
    leaves: bool = False
    """True if the current attempt was asked to save its work, because its node ends soon."""
    peer_lost: tuple[BaseException, float] | None = None
    """First error of a rank that lost its peers, and the time until which to wait for the cause; `None` without one."""
    result: Finished | Stopped = field(default_factory=Finished)
    """Last event of rank 0. It is passed on once all ranks have ended."""

    @property
    def is_waiting(self) -> bool:
        return not self.workers and self.group is None and self.not_before <= time.monotonic()


class _Stage:
    """Run of one stage, from its first to its last task. All its tasks have the same worker class."""

    def __init__(self, executor: RayExecutor, stage: Stage, tasks: list[Task]) -> None:
        self._executor, self._cluster, self._nodes = executor, executor.cluster, executor.nodes
        self._pool, self._stage, self._tasks = executor.pool, stage, tasks
        self._taken = 0
        """Number of tasks taken from the list so far."""
        self._jobs: list[_Job] = []
        self._failure: DatmError | None = None
        """First error in the user's input; `None` without one. After an error no task starts; running tasks finish."""
        self._given_up: DatmError | None = None
        """Error of the first task that lost its workers too often. It is raised after all other tasks have ended."""
        self._failed_starts = 0
        """Number of actors in a row that Ray could not start."""
        self._request_after = self._avoid_after = 0.0
        """Times in seconds of the monotonic clock: no actor is requested before the first, no node avoided before the
        second."""
        self._checked = self._awake = time.monotonic()
        """Times of the last check of the workers, and for events, in seconds of the monotonic clock."""
        self._blocked_since = self._reported_at = math.inf
        """Time since which no task runs and Ray has been asked for the same workers (infinite if a task runs), and time
        of the last message on waiting."""

    def events(self) -> Iterator[tuple[Task, Event]]:
        """Run all tasks to their end and yield their events, each with its task."""
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
        """Take tasks that the caller has added to the list meanwhile. Returns all tasks that have not ended."""
        new = self._tasks[self._taken :]
        if self._taken and new:
            self._executor.metrics.add(new)
        self._taken += len(new)
        self._jobs += [_Job(task, sizes=[task.size, *task.fewer]) for task in new]
        if self._failure:
            self._jobs = [job for job in self._jobs if job.workers]
        return self._jobs

    def _notice_absence(self) -> None:
        """Subtract time in which this process was suspended, as by Ctrl-Z, from the workers' time without events."""
        now = time.monotonic()
        if now - self._awake > ABSENCE:
            for job in self._jobs:
                job.heard = min(now, job.heard + now - self._awake)
        self._awake = now

    def _save_and_stop(self) -> Iterator[tuple[Task, Event]]:
        """Ask the workers to save their work, wait for those that can save, then raise `Interrupted`."""
        asked = {worker.save(): job for job in self._jobs for worker in job.workers}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=CHECK_INTERVAL) if asked else ([], [])
        at_work = list(dict.fromkeys(asked[each] for each in answered if _answer(each)))
        for job in [job for job in self._jobs if job not in at_work]:
            self._release(job)
        self._jobs = at_work
        for job in at_work:
            yield job.task, Note(f"{SAVES}, within {SAVE_TIMEOUT:.0f} s")
        saved, end = [], time.monotonic() + SAVE_TIMEOUT
        while self._jobs and time.monotonic() < end:
            for task, event in self._next_events():
                saved += [f"{task.name}: {event.saved}"] if isinstance(event, Stopped) else []
                yield task, event
        raise Interrupted("; ".join(saved))

    # --- from waiting to running ----------------------------------------------------------------------------------

    def _start(self) -> Iterator[tuple[Task, Event]]:
        """Start waiting tasks: those of several workers on new groups, those of one on free actors. Request actors."""
        yield from self._start_groups()
        yield from self._request_group()
        waiting = [job for job in self._jobs if job.is_waiting and job.task.size == 1]
        if self._group_waits():
            waiting = [job for job in waiting if self._is_apart(job)]
        free = self._free()
        for job in list(waiting):
            if not free:  # most of the time, with many tasks
                break
            avoided, options = self._avoided(job), self._options(job.task)
            found = next((each for each in free if each.node not in avoided and each.suits(options)), None)
            if found:
                waiting.remove(job)
                free.remove(found)
                yield from self._begin(job, [found])
        is_needed = bool(waiting) or any(job.task.size > 1 and not job.workers for job in self._jobs)
        for each in free:
            if is_needed or time.monotonic() - each.free_since > SHORT_WAIT:  # others may need its resources
                self._drop(each)
        yield from self._request_workers(waiting)

    def _free(self) -> list[PoolWorker]:
        used = [worker for job in self._jobs for worker in job.workers]
        return [each for each in self._pool if each.starting is None and each not in used]

    @property
    def _left(self) -> int:
        """Number of workers that `cluster.workers` leaves for tasks of one worker, beside groups that run or wait."""
        first = (job.group.size for job in self._jobs if job.group and (job.workers or not job.gives_way))
        return self._limit - sum(first)

    @property
    def _limit(self) -> int:
        return self._cluster.workers or sys.maxsize

    def _at_work(self, but: _Job) -> int:
        """Number of workers in use by tasks other than `but`, or about to start."""
        ranks = sum(job.size for job in self._jobs if job.group and job.workers and job is not but)
        return ranks + len(self._pool) - len(self._free())

    def _group_waits(self) -> bool:
        """True while no task of one worker may start, because a group waits for the resources that running tasks free.

        A group gives way after `SHORT_WAIT` if other runs hold the resources it needs, else after `LONGEST_DRAIN`.
        """
        now, alone = time.monotonic(), [job for job in self._jobs if job.workers and not job.group]
        busy = sum(not self._is_apart(job) for job in alone)
        running = sum(job.size for job in self._jobs if job.group and job.workers)
        for job in self._jobs:
            if job.group and not job.workers:
                is_ours = self._nodes.capacity() - running - busy < job.group.size
                if not job.gives_way and now - job.waits_since > (LONGEST_DRAIN if is_ours else SHORT_WAIT):
                    job.gives_way, self._blocked_since = True, math.inf
                if not job.gives_way:
                    return True
            elif job.task.size > 1 and job.is_waiting and size_for(job.sizes, self._left):
                return True
        return False

    def _is_apart(self, job: _Job) -> bool:
        """True if the task runs on workers of `cluster.light`, which are assumed to take no resources of groups."""
        return self._cluster.light is not None and job.task.is_light

    def _request_group(self) -> Iterator[tuple[Task, Event]]:
        """Request the ranks of the next task that needs several workers, if no other group waits."""
        # One group waits at a time, until it gives way. Otherwise small groups could overtake a large one for ever.
        if not all(job.workers or job.gives_way for job in self._jobs if job.group):
            return
        job = next((job for job in self._jobs if job.is_waiting and job.task.size > 1), None)
        if job is None:
            return
        sizes, left = [size for size in job.sizes if size <= job.limit] or job.sizes, self._left
        free = self._nodes.capacity() - sum(each.group.size for each in self._jobs if each.group)
        size = size_for(sizes, min(free, left)) or size_for(sizes, left)
        if size is None or size > self._limit - self._at_work(job):
            return  # tasks of one worker end first
        most = size_for(job.sizes, self._limit) or size
        job.group, job.gives_way = RankGroup(size, most, self._options(job.task), self._avoided(job, size)), False
        yield job.task, Phase(f"starting {counted(size, 'worker')}")

    def _request_workers(self, waiting: list[_Job]) -> Iterator[tuple[Task, Event]]:
        """Request actors for waiting tasks of one worker, in the order of the tasks. Drop requests no longer needed."""
        now, pending = time.monotonic(), [each for each in self._pool if each.starting is not None]
        if any(each.avoids and now - each.free_since > SHORT_WAIT for each in pending):
            self._use_all_nodes()
            for each in [each for each in pending if each.avoids]:
                pending.remove(each)
                self._drop(each)
        room = 0 if now < self._request_after else max(PENDING, len(self._pool) - len(pending)) - len(pending)
        room = min(room, self._left - len(self._pool))
        for job in waiting:
            if not pending and room <= 0:  # most of the time, with many tasks
                break
            options, avoided = self._options(job.task), self._avoided(job)
            largest = self._nodes_of(job.task).memory()  # more was requested before nodes of workers came
            suitable = (each for each in pending if each.suits(options) and each.memory <= largest)
            if requested := next(suitable, None):
                pending.remove(requested)
            elif room > 0:
                room -= 1
                if not self._pool:
                    yield job.task, Phase("starting workers")
                labels = labels_without(options, avoided)
                new = {**options, **({"label_selector": labels} if labels else {})}
                self._pool.append(PoolWorker.start(new, avoids=bool(avoided)))
        for each in pending:  # no task needs it any more
            self._drop(each)

    def _start_groups(self) -> Iterator[tuple[Task, Event]]:
        """Start groups whose resources are reserved. Release a group that waits too long, and try with fewer ranks."""
        for job in [job for job in self._jobs if job.group and not job.workers]:
            assert job.group
            size = job.group.size
            if job.group.is_placed and size > self._limit - self._at_work(job):
                job.gives_way, job.waits_since = False, time.monotonic()  # until tasks of one worker end
            elif job.group.is_placed:
                if size != (job.size or job.task.size):
                    yield job.task, Resized(size, job.task.size)
                job.group.start()
                yield from self._begin(job, job.group.workers)
            elif self._nodes.capacity() < size and size_for(job.sizes, self._nodes.capacity()):
                self._release(job)  # a node was lost meanwhile
            elif job.group.memory > self._nodes_of(job.task).memory():
                self._release(job)  # more was requested before nodes of workers came
            elif time.monotonic() - job.group.requested_at > SHORT_WAIT and job.group.avoids:
                self._release(job)
                self._use_all_nodes()
            elif time.monotonic() - job.group.requested_at > SHORT_WAIT and size > job.sizes[-1]:
                self._release(job)
                job.limit, self._blocked_since = size - 1, math.inf
                yield job.task, Note(f"{counted(size, 'worker')} did not become free; trying with fewer")

    def _begin(self, job: _Job, workers: list[PoolWorker]) -> Iterator[tuple[Task, Event]]:
        job.workers, job.size, job.saved, job.heard = workers, len(workers), 0, time.monotonic()
        job.peer_lost, job.leaves = None, False
        job.patience = Patience(self._cluster.peer_timeout, self._cluster.progress_timeout)
        # Ray resolves these references before the calls, so the driver does not wait until all ranks have started.
        others = [worker.starting or "" for worker in workers[1:]]
        address = workers[0].actor.rendezvous.remote(*others) if others else ""
        for rank, worker in enumerate(workers):
            worker.run(self._stage, job.task, job.patience, (rank, job.size), address)
        job.streams = {worker.stream: rank for rank, worker in enumerate(workers)}
        yield job.task, Started(job.size)

    def _nodes_of(self, task: Task) -> Nodes:
        return self._executor.light_nodes if task.is_light else self._nodes

    def _options(self, task: Task) -> dict[str, Any]:
        # A request for more memory than any node of workers has would wait for ever.
        memory = min(task.memory, self._nodes_of(task).memory())
        return worker_options(self._cluster, task.is_light, memory)

    def _avoided(self, job: _Job, size: int = 1) -> set[str]:
        """Nodes where this task lost workers, or others did in a row; empty if no `size` workers fit on other nodes."""
        if time.monotonic() < self._avoid_after or not knows_labels():
            return set()
        bad = {node for node, count in self._executor.faults.items() if count >= FAULTS_OF_A_NODE}
        bad |= set(job.history.nodes)
        return bad if bad and self._nodes_of(job.task).elsewhere(bad) >= size else set()

    def _use_all_nodes(self) -> None:
        """Avoid no node for a while, because the other nodes have no free resources."""
        self._avoid_after, self._blocked_since = time.monotonic() + AVOIDANCE_PAUSE, math.inf

    def _drop(self, worker: PoolWorker) -> None:
        worker.stop()
        self._pool.remove(worker)

    def _release(self, job: _Job) -> None:
        """Stop the workers of a task's current attempt. The task then waits for workers again."""
        if job.group:
            job.group.stop()
        else:
            for worker in job.workers:
                self._drop(worker)
        job.group, job.workers, job.streams, job.waits_since = None, [], {}, time.monotonic()

    # --- while they run -------------------------------------------------------------------------------------------

    def _next_events(self) -> Iterator[tuple[Task, Event]]:
        """Wait at most `EVENT_INTERVAL` for events and for actors to start, and handle what has arrived."""
        starting = {each.starting: each for each in self._pool if each.starting is not None}
        streams = {stream: job for job in self._jobs for stream in job.streams}
        if not streams and not starting:
            time.sleep(EVENT_INTERVAL)
            return
        arrived, _ = ray.wait([*streams, *starting], num_returns=1, timeout=EVENT_INTERVAL, fetch_local=False)
        self._notice_absence()
        for each in arrived:
            if each in starting:
                self._note_start(starting[each])
            elif each in (job := streams[each]).streams:
                self._jobs.remove(job)
                self._jobs.append(job)  # events of other tasks come first next time
                yield from self._read(job, each)

    def _note_start(self, worker: PoolWorker) -> None:
        """Record that an actor has started, or drop an actor that Ray could not start."""
        try:
            worker.has_started(ray.get(worker.starting))
            self._failed_starts = 0
            worker.free_since = time.monotonic()
        except RayError as failure:
            self._drop(worker)
            self._failed_starts += 1
            self._request_after = time.monotonic() + min(WAIT_INTERVAL, 0.1 * 2.0 ** min(self._failed_starts, 10))
            if self._failed_starts > PENDING + self._cluster.retries and not any(job.workers for job in self._jobs):
                raise WorkerLostError(
                    f"Ray cannot start workers: {reason(unwrapped(failure))}",
                    remedy="see the cluster's dashboard or `ray status`, then run the same command again: it resumes",
                ) from None

    def _read(self, job: _Job, stream: Any) -> Iterator[tuple[Task, Event]]:
        """Handle the next item of a stream: an event, log records, or an error."""
        rank, task, silence = job.streams[stream], job.task, time.monotonic() - job.heard
        try:
            event = ray.get(next(stream))
        except StopIteration:
            del job.streams[stream]
            if not job.streams and not job.peer_lost:
                yield from self._end(job)
            return
        except RayError as failure:
            yield from self._lose(job, unwrapped(failure), silence, stream)
            return
        job.heard = time.monotonic()
        if isinstance(event, list):
            accept(event)
        elif rank:
            self._executor.metrics.record(task, event, rank)
        elif isinstance(event, Finished | Stopped):
            job.result = event  # passed on by `_end`, after the end of all streams
        else:
            job.patience.take(event, silence)
            yield task, event
            if isinstance(event, Progress) and event.saved:
                job.saved = event.done
                more = size_for(job.sizes, job.group.possible) if job.group else None
                if more and more > job.size:
                    self._release(job)
                    job.limit = 2**31
                    yield task, Note("checkpoint saved; restarting with more workers")

    def _end(self, job: _Job) -> Iterator[tuple[Task, Event]]:
        """Pass on the result of a task whose workers have all ended. The workers are then free for another task."""
        if job.leaves and isinstance(job.result, Stopped):
            yield job.task, Note(f"saved {job.result.saved}")
            self._release(job)
            return
        self._jobs.remove(job)
        for worker in job.workers:
            self._executor.faults.pop(worker.node, None)
            worker.free_since = time.monotonic()
        yield job.task, job.result
        if job.group:
            kind = (job.size, self._options(job.task))
            waiting = (each for each in self._jobs if not each.workers and each.not_before <= time.monotonic())
            heir = next((each for each in waiting if (each.task.size, self._options(each.task)) == kind), None)
            if heir:
                self._release(heir)
                heir.group = job.group
                yield from self._begin(heir, job.workers)
            else:
                job.group.stop()

    def _lose(
        self, job: _Job, cause: BaseException, silence: float, stream: Any = None
    ) -> Iterator[tuple[Task, Event]]:
        """Handle an error of a task. An error in the user's input ends the stage; after others the task is retried.

        A task that has lost its workers too often is given up.

        Args:
            silence: seconds without an event before the error.
            stream: stream that ended with the error; `None` if no stream did.
        """
        if isinstance(cause, PeerLostError) and stream is not None and job.streams.keys() - {stream}:
            del job.streams[stream]  # another rank's error may be the cause
            job.peer_lost = job.peer_lost or (cause, time.monotonic() + ROOT_CAUSE_TIMEOUT)
        elif isinstance(cause, ConfigError) and job.size < job.task.size:
            # The error did not occur with all workers, and nodes may come back.
            self._release(job)
            job.sizes = [each for each in job.sizes if each > job.size]
            yield job.task, Note(f"waiting for nodes: {counted(job.size, 'worker')} cannot run it: {cause}")
        elif is_final(cause) and not (may_be_the_nodes(cause) and self._has_elsewhere(job, stream)):
            self._failure = self._failure or cause
            yield from self._fail(job, cause)
        else:
            why = reason(cause)
            if isinstance(cause, RayTaskError):
                _log.info("%s", cause, extra={"is_shown": True})  # with the worker's traceback
            elif isinstance(cause, RayActorError) and silence > job.patience.limit:
                why = f"no step for {silence:.0f} s; its log in Ray's dashboard says where it was stuck"
            job.history = job.history.after_loss(job.saved, self._blame(job, cause, stream))
            if job.history.gives_up(self._cluster.retries):
                failure = self._too_many_losses(job, cause, why)
                self._given_up = self._given_up or failure
                yield from self._fail(job, failure)
            else:
                self._release(job)
                job.not_before = time.monotonic() + job.history.delay
                yield job.task, Lost(why, job.history.losses)

    def _has_elsewhere(self, job: _Job, stream: Any) -> bool:
        """True if the task may be retried on another node after an error that may have its cause on one node.

        A task gets one such retry, if another node can hold a worker. The failed node is recorded.
        """
        worker = job.workers[job.streams.get(stream, 0)]
        worker.find_node()
        if job.failed_on or not worker.node or not knows_labels():
            return False
        job.failed_on = worker.node
        return bool(self._nodes_of(job.task).elsewhere({worker.node}))

    def _blame(self, job: _Job, cause: BaseException, stream: Any) -> str:
        """Return the node on which a worker was lost, "" if unknown. Counts the loss, and stops free actors there."""
        worker = job.workers[job.streams.get(stream, 0)]
        worker.find_node()
        if isinstance(cause, PeerLostError):
            return ""
        if worker.node and not isinstance(cause, NodeDiedError):
            self._executor.faults[worker.node] += 1
        for idle in self._free():
            if idle.node == worker.node:  # this actor may be lost too, and a new one is cheap
                self._drop(idle)
        return worker.node

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
        """End a task that is not retried. Its error is raised after the other tasks have ended."""
        self._release(job)
        self._jobs.remove(job)
        for each in [each for each in self._jobs if self._failure and not each.workers]:
            self._release(each)
        if others := len(self._take_tasks()):
            yield job.task, Failed(str(failure), others)

    def _check(self) -> Iterator[tuple[Task, Event]]:
        """Fetch logs, end stuck workers that have not ended themselves, and report tasks that wait for long."""
        self._notice_absence()
        now = time.monotonic()
        yield from self._report_waiting(now)
        if now - self._checked > CHECK_INTERVAL:
            self._checked = now
            for job in [job for job in self._jobs if job.workers]:
                for worker in job.workers:
                    worker.find_node()
                    worker.take_news()
                silence = now - job.heard
                if silence > job.patience.limit + MARGIN:
                    for worker in job.workers:
                        worker.end_process()
                    yield from self._lose(job, WorkerLostError(f"no step for {silence:.0f} s, and no answer"), silence)
            yield from self._leave_nodes(draining_nodes())
        for job in [job for job in self._jobs if job.peer_lost and job.workers]:
            assert job.peer_lost
            if now > job.peer_lost[1] or not job.streams:
                yield from self._lose(job, job.peer_lost[0], now - job.heard)

    def _leave_nodes(self, nodes: set[str]) -> Iterator[tuple[Task, Event]]:
        """Ask workers on nodes that end soon to save their work, so that other workers can resume it."""
        for job in self._jobs:
            if not job.leaves and any(worker.node in nodes for worker in job.workers):
                job.leaves = True
                for worker in job.workers:
                    worker.save()
                yield job.task, Note("its node ends soon: saving, to resume elsewhere")

    def _report_waiting(self, now: float) -> Iterator[tuple[Task, Event]]:
        """Report every minute that tasks wait and none runs. Raises a `ClusterError` if they have waited too long."""
        waiting = [job for job in self._jobs if not job.workers and job.not_before <= now]
        if len(waiting) < len(self._jobs) or not waiting:
            self._blocked_since = math.inf
            return
        if self._blocked_since == math.inf:
            self._blocked_since, self._reported_at = now, now - 0.75 * WAIT_INTERVAL
        if self._group_waits():  # tasks of one worker have asked for none yet
            waiting = [job for job in waiting if job.task.size > 1 or self._is_apart(job)]
        job, waited = waiting[0], now - self._blocked_since
        nodes = self._nodes_of(job.task)
        size = job.group.size if job.group else job.sizes[0]
        if waited > nodes.patience() and size == job.sizes[-1]:  # smaller groups are tried first
            raise nodes.not_enough(size)
        if now - self._reported_at > WAIT_INTERVAL:
            self._reported_at = now
            yield job.task, Note(nodes.waiting(size, waited))


def _answer(reference: Any) -> bool:
    try:
        return bool(ray.get(reference))
    except RayError:  # the worker has died
        return False
