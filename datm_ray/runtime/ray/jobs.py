"""Runs as jobs of a Ray cluster: submitted over HTTP from anywhere, they keep running when the terminal is closed.

The recipes and this package are sent with the job. Other packages must be on the cluster, or be listed in a file of
requirements or a runtime environment. A job needs no shared disk if its output folder is a URI that all machines can
open. Environment variables are sent only if the user names them. Messages and logs never contain their values, but
Ray's dashboard shows the values.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobDetails, JobStatus
from ray.runtime_env import RuntimeEnv

from datm_ray.config import RunConfig, to_yaml
from datm_ray.errors import ClusterError, ConfigError, JobLostError, JobNotFoundError, JobUnreachableError
from datm_ray.monitor.logs import hide
from datm_ray.runtime.ray.cluster import first_line
from datm_ray.runtime.ray.dashboard import Dashboard, masked
from datm_ray.runtime.stopping import SAVE_TIMEOUT
from datm_ray.store.files.filesystem import open_location
from datm_ray.words import duration

AGENT_TIMEOUT = 60.0
"""Seconds to keep trying to submit to a cluster that answers but has no job agent yet."""
FOLLOW_INTERVAL = (1.0, 5.0)
"""Seconds between two requests for a log: the first number while it grows, up to the second while it does not."""
FOLLOW_SHARE = 0.1
"""Largest share of the time of `Jobs.follow` that fetching the log may take. Every request fetches the whole log,
which takes seconds for 100 MiB."""
FOLLOW_TIMEOUT = 600.0
"""Seconds without an answer after which `Jobs.follow` gives up. The job keeps running."""
PENDING_REPORTED = 15.0
"""Seconds after which `Jobs.follow` reports that the job has not started."""
LAST_LINES_TIMEOUT = 30.0
"""Seconds without an answer after which the rest of the log of a job that has ended is given up."""
STOP_MARGIN = 15.0
"""Seconds that a stopped job gets to end, in addition to the time for saving its work (`SAVE_TIMEOUT`)."""
_SUBMISSION_ID = re.compile(r"\w[\w.+-]*")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NOT_FOUND = re.compile(r"status code 404: Job .* does not exist")
_CREDENTIALS = re.compile(r"://[^/\s]*@")
MINE = "datm_ray"
"""Key in a job's metadata that marks this package's jobs."""


@dataclass(frozen=True)
class Job:
    """State of one job, as the cluster reports it."""

    id: str
    """Submission id, by which Ray's own commands know the job too."""
    status: str
    """State of the job: pending, running, stopped, succeeded or failed."""
    recipes: str
    """Names of the recipes that the job runs, separated by commas."""
    out: str
    """Output folder of the runs."""
    seconds: float
    """Seconds from submission to the end of the job, or until now."""
    message: str
    exit_code: int | None
    """Exit code of the job's command; `None` before it has ended, or if it was killed."""

    @property
    def is_over(self) -> bool:
        """True if the job has ended."""
        return self.status in ("stopped", "succeeded", "failed")


class Jobs:
    """Client for the jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect to a cluster.

        Args:
            address: URL of the cluster's dashboard, such as http://127.0.0.1:8265.

        Raises:
            ClusterError: the address is no URL, nothing answers there, or what answers is no Ray cluster.
        """
        self._shown = masked(address)
        self._client = Dashboard(address)

    def command(self, name: str, submission_id: str) -> str:
        """Text of the shell command `datm-ray job NAME` for the job `submission_id`; "logs" gets --follow."""
        follow = " --follow" if name == "logs" else ""
        return f"datm-ray job {name} {submission_id}{follow} --address {shlex.quote(self._shown)}"

    def submit(
        self,
        configs: Sequence[RunConfig],
        out: str,
        store: str | None = None,
        environment: Mapping[str, Any] | None = None,
        verbosity: int = 0,
    ) -> str:
        """Submit a job that runs the recipes, and return its submission id without waiting for its start.

        After a job has ended, whatever the reason, a new one with the same recipes and folders resumes its work.

        Args:
            configs: recipes of the runs.
            out: output folder of the runs; a URI, or a path on a disk that all nodes share.
            store: path or URI of the trajectory store, where experts are kept; `None` means a folder in `out`.
            environment: result of `job_environment`; `None` for an environment with this package alone.
            verbosity: what the job's log holds: 0 messages and warnings, 1 also every log line, 2 also the raw output
                of Ray and its workers.

        Raises:
            ConfigError: the path of a folder or of a recipe's images is relative.
            StoreError: a folder's URI cannot be used.
            ClusterError: the cluster does not accept the job or does not answer, or a running job writes to `out`.
            JobUnreachableError: the cluster's answer was lost, so whether it has the job is not known.
        """
        read = [each for config in configs for each in _read(config)]
        for name, place in (("--out", out), ("--store", store), *read):
            if place is not None:
                _require_reachable(name, place)
        for config in configs:
            _require_images(config.dataset.path)
        environment = environment or job_environment()
        self._require_nobody_at_work(out)
        files = [f"{number}-{config.name}.yaml" for number, config in enumerate(configs)]
        command = ["python", "-m", "datm_ray", "run", *files, "--out", out, "--address", "auto"]
        command += ["--store", store] if store is not None else []
        command += ["--verbose"] * verbosity
        names = ", ".join(config.name for config in configs)
        submission_id = _new_submission_id()
        with tempfile.TemporaryDirectory(prefix="datm-ray-job-") as folder:
            for file, config in zip(files, configs, strict=True):
                (Path(folder) / file).write_text(to_yaml(config), encoding="utf-8")
            self._submit(
                entrypoint=shlex.join(command),
                submission_id=submission_id,
                runtime_env={**environment, "working_dir": folder},
                metadata={MINE: names, "out": out},
            )
        return submission_id

    def _submit(self, submission_id: str, **job: Any) -> None:
        """Submit a job. Retries for up to `AGENT_TIMEOUT` s while a newly started cluster has no job agent yet."""
        end = time.monotonic() + AGENT_TIMEOUT
        while True:
            try:
                with self._answers():
                    self._client.submit_job(submission_id=submission_id, **job)
                return
            except ClusterError as failure:
                if self._took(submission_id, failure, end):
                    return
                if "No available agent" not in failure.fact or time.monotonic() > end:
                    raise
            time.sleep(1.0)

    def _took(self, submission_id: str, failure: ClusterError, end: float) -> bool:
        """True if the cluster has the job although submitting it failed, because only the answer was lost.

        Args:
            submission_id: submission id of the job.
            failure: error with which submitting failed.
            end: time until which the cluster is asked, in seconds of the monotonic clock.

        Raises:
            JobUnreachableError: the cluster has not answered by the time `end`, so nothing is known.
        """
        while True:
            try:
                self.job(submission_id)
                return True
            except JobNotFoundError:
                return False
            except ClusterError as silence:
                if time.monotonic() > end:
                    raise JobUnreachableError(
                        f"{failure.fact}; whether job {submission_id} was submitted is not known ({silence.fact})",
                        failure.cause,
                        f"find out with `{self.command('logs', submission_id)}`",
                    ) from None
            time.sleep(1.0)

    def _require_nobody_at_work(self, out: str) -> None:
        for job in self.list():
            if job.out.rstrip("/") == out.rstrip("/") and not job.is_over:
                raise ClusterError(
                    f"job {job.id} is {job.status} and writes to {out} already",
                    "two at once would write over each other",
                    f"follow it with `{self.command('logs', job.id)}`, stop it first, or give another --out",
                )

    def list(self) -> list[Job]:
        """List this package's jobs, also ended ones, the oldest first.

        Raises:
            ClusterError: the cluster refuses the request or does not answer.
        """
        with self._answers():
            found = [job for job in self._client.list_jobs() if MINE in (job.metadata or {})]
        return [_job(job) for job in sorted(found, key=lambda job: job.start_time or 0)]

    def job(self, submission_id: str) -> Job:
        """Fetch the state of one job.

        Args:
            submission_id: submission id of the job, as `submit` returns it.

        Raises:
            JobNotFoundError: the cluster has no job with this id.
            ClusterError: the cluster refuses the request or does not answer.
        """
        with self._answers(submission_id):
            return _job(self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        """Fetch the whole log so far of the job `submission_id`.

        Raises:
            JobNotFoundError: the cluster has no job with this id.
            ClusterError: the cluster refuses the request or does not answer.
        """
        with self._answers(submission_id):
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str, show: Callable[[str], object], warn: Callable[[str], object]) -> Job:
        """Show a job's log as it grows, until the job has ended. Returns the ended job.

        After a lost connection the log continues where it was. Ctrl-C during the call does not stop the job.

        Args:
            submission_id: submission id of the job, as `submit` returns it.
            show: called with every new part of the log.
            warn: called with a message once per loss of the connection, once if the job has not started after
                `PENDING_REPORTED` seconds, and if the end of the log cannot be read.

        Raises:
            JobNotFoundError: there is no job with this id.
            JobLostError: the cluster had the job at first, and no longer has it.
            JobUnreachableError: the cluster has not answered for `FOLLOW_TIMEOUT` seconds.
        """
        often, seldom = FOLLOW_INTERVAL
        shown, pause, answered = 0, often, time.monotonic()
        known = warned = False
        tell_at: float | None = answered + PENDING_REPORTED
        while True:
            start, job = time.monotonic(), None
            try:
                job = self.job(submission_id)  # before the log: if the job has ended, the log is then complete
                log = self.logs(submission_id)
            except JobNotFoundError as absent:
                if not known:
                    raise
                raise JobLostError(
                    f"{absent.fact} any more",
                    "the cluster was restarted, which ended the job",
                    "run the same `datm-ray job submit` again to resume from what it had finished",
                ) from None
            except ClusterError as failure:
                silent = start - answered
                if job is not None and job.is_over and silent > LAST_LINES_TIMEOUT:
                    warn(f"the rest of the log cannot be read: {failure.fact}.")
                    return job
                if silent > FOLLOW_TIMEOUT:
                    raise JobUnreachableError(
                        f"{failure.fact}, for {duration(silent)} now",
                        "the job keeps running without this connection",
                        f"follow it again with `{self.command('logs', submission_id)}`",
                    ) from None
                if not warned:
                    warn(f"{failure.fact}. Trying again for {duration(FOLLOW_TIMEOUT)}; the job keeps running.")
                pause, warned = seldom, True
            else:
                if len(log) > shown:
                    show(log[shown:])
                if job.is_over:
                    return job
                answered, known, warned = time.monotonic(), True, False
                if tell_at is not None and (log or answered > tell_at):
                    if job.status == "pending" and job.message:
                        warn(f"the job is {job.status} ({job.message}).")
                    tell_at = None
                pause = often if len(log) > shown else min(1.5 * pause, seldom)
                pause, shown = max(pause, (answered - start) / FOLLOW_SHARE), max(shown, len(log))
            time.sleep(pause)

    def stop(self, submission_id: str) -> bool:
        """Ask the cluster to stop the job `submission_id`, without waiting for its end.

        The job first saves its work, which stays. Returns False if the job had already ended.

        Raises:
            JobNotFoundError: the cluster has no job with this id.
            ClusterError: the cluster refuses the request or does not answer.
        """
        with self._answers(submission_id):
            return bool(self._client.stop_job(submission_id))

    @contextmanager
    def _answers(self, submission_id: str | None = None) -> Iterator[None]:
        """Raise a `ClusterError` if the cluster refuses a request that is sent in the block.

        Args:
            submission_id: job that the request is about; `None` if it is about no job. If the cluster has no such
                job, the error is a `JobNotFoundError`.
        """
        absent = JobNotFoundError(
            f"there is no job {submission_id!r} at {self._shown}",
            remedy=f"`datm-ray job list --address {shlex.quote(self._shown)}` lists its jobs",
        )
        if submission_id is not None and not _SUBMISSION_ID.fullmatch(submission_id):
            raise absent  # other characters would change the address
        try:
            yield
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as failure:  # the last three: a bad answer
            if submission_id is not None and _NOT_FOUND.search(str(failure)):
                raise absent from None
            raise ClusterError(
                f"the Ray cluster at {self._shown} refused the request ({_refusal(failure)})",
                "it does not accept the job, or has a problem of its own",
                f"`datm-ray job list --address {shlex.quote(self._shown)}` shows whether it answers",
            ) from None


def _refusal(failure: Exception) -> str:
    """Line of Ray's answer that explains a refusal: the last line of a traceback, else the first line."""
    text = str(failure).partition("Request failed with ")[2] or str(failure)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    is_traceback = any(line.startswith(("Traceback", "File ")) or "Traceback (most" in line for line in lines)
    return masked(first_line(lines[-1] if is_traceback else text) or type(failure).__name__)


def _new_submission_id() -> str:
    return f"datm-ray-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06d}"


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    ended = (details.end_time or 0) / 1000 or time.time()
    started = (details.start_time or 0) / 1000 or ended
    return Job(
        id=details.submission_id or details.job_id or "",
        status=JobStatus(details.status).value.lower(),
        recipes=metadata.get(MINE, ""),
        out=metadata.get("out", ""),
        seconds=max(0.0, ended - started),
        message=_message(details.message or ""),
        exit_code=details.driver_exit_code,
    )


def _message(text: str) -> str:
    """Shorten the cluster's message about a job to one line: its first line, and pip's last error if it has one."""
    errors = [line.strip() for line in text.splitlines() if line.strip().startswith("ERROR: ")]
    last = f" ({first_line(errors[-1].removeprefix('ERROR: '))})" if errors else ""
    return masked(first_line(text).partition(", last available logs")[0] + last)


def _read(config: RunConfig) -> Iterator[tuple[str, str | None]]:
    """Yield (key, path) for each key of a recipe that names results of earlier runs to read; `None` if it is unset."""
    yield "distill.continue_from", config.distill.continue_from
    yield "given.path", config.given.path if config.given else None


def _require_reachable(name: str, place: str) -> None:
    """Raise a `ConfigError` if `place` is a relative path: a job runs elsewhere, in a folder that is deleted later.

    Args:
        name: option or key that the path comes from, for the message.
        place: path or URI. A URI that cannot be used raises a `StoreError`.
    """
    is_local = open_location(place).local_path is not None  # raises an error for a URI that it cannot open
    if is_local and not place.startswith(("/", "file:///")):
        raise _relative_error(
            name, place, "a URI such as s3://bucket/folder, or an absolute path on a disk that all machines share"
        )


def _require_images(path: str | None) -> None:
    """Raise a `ConfigError` if `dataset.path` is relative. A path with `~` is accepted: the head expands it."""
    if path is not None and not path.startswith(("/", "~")) and "://" not in path:  # a URI has an error of its own
        raise _relative_error("dataset.path", path, "the absolute path at which the head has the images")


def _relative_error(name: str, place: str, what: str) -> ConfigError:
    return ConfigError(
        f"{name} {place!r} is no absolute path, and a job works in a folder of its own", remedy=f"give {what}"
    )


def job_environment(
    requirements: str | None = None, variables: Sequence[str] = (), runtime_env: str | None = None
) -> dict[str, Any]:
    """Make Ray's runtime environment of a job, without `working_dir`. The log never shows a value of its variables.

    Args:
        requirements: path of a requirements file for pip. Its lines are sent to the cluster, but not the files that it
            refers to.
        variables: environment variables of the job, as KEY=VALUE, or KEY for the value in this process.
        runtime_env: path of a YAML or JSON file with a Ray runtime environment; `None` for an empty one. The settings
            that this package needs are added.

    Raises:
        ConfigError: an argument cannot be used, or sets a key that another argument or this package sets.
    """
    given = {} if runtime_env is None else _read_environment(runtime_env)
    theirs, named = given.get("env_vars") or {}, _variables(variables)
    hide([*theirs.values(), *named.values()])
    # By default Ray kills a stopped job after 3 seconds, too early for workers to save their work.
    ours = {"RAY_JOB_STOP_WAIT_TIME_S": f"{SAVE_TIMEOUT + STOP_MARGIN:.0f}"}
    _require_apart(given, {"working_dir"}, f"{runtime_env} and by datm-ray, whose recipes travel in it")
    _require_apart(given, {"pip"} if requirements else (), f"{runtime_env} and by --requirements")
    _require_apart(theirs, named, f"{runtime_env} and by --env")
    _require_apart(theirs | named, ours, "you and by datm-ray, so that a stopped job can save its work")
    if requirements and _CREDENTIALS.search(_text(requirements, "--requirements")):
        raise _credentials_error(requirements)
    modules = given.get("py_modules") or []
    merged = given | {
        "env_vars": ours | theirs | named,
        "py_modules": [*([modules] if isinstance(modules, str) else modules), str(Path(__file__).parents[2])],
        **({} if requirements is None else {"pip": requirements}),
    }
    try:
        RuntimeEnv(**merged, working_dir=tempfile.gettempdir())
    except (TypeError, ValueError) as failure:
        raise ConfigError(
            f"Ray refuses {runtime_env or requirements}: {first_line(failure)}",
            remedy="Ray's documentation of runtime environments says which keys go together",
        ) from None
    return merged


def _require_apart(keys: Iterable[str], others: Container[str], owners: str) -> None:
    for key in keys:
        if key in others:
            raise ConfigError(f"{key} is set by {owners}", remedy="leave one of them out")


def _variables(given: Sequence[str]) -> dict[str, str]:
    """Read environment variables from KEY=VALUE, or KEY alone for this process's value. Errors never show a value."""
    found = {}
    for number, text in enumerate(given, start=1):
        name, equals, value = text.partition("=")
        if not _VARIABLE.fullmatch(name):  # the error does not show the name, because it may be a secret value
            raise ConfigError(
                f"--env number {number} does not begin with the name of a variable",
                remedy="write --env KEY=VALUE, or --env KEY for the value that KEY has in this shell",
            )
        if not equals and name not in os.environ:
            raise ConfigError(
                f"--env {name}: this shell has no variable of that name, or does not export it",
                remedy=f"write --env {name}=VALUE, or `export {name}` first",
            )
        found[name] = value if equals else os.environ[name]
    return found


def _read_environment(path: str) -> dict[str, Any]:
    """Read Ray's runtime environment from a YAML or JSON file. Errors never show a value, which may be a secret."""
    text = _text(path, "--runtime-env")
    try:
        found = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        raise ConfigError(f"{path} is neither YAML nor JSON", remedy="check --runtime-env") from None
    known = ", ".join(sorted(name for name in RuntimeEnv.known_fields if name[0] != "_"))
    if not isinstance(found, dict):
        raise ConfigError(f"{path} has no keys and values", remedy=f"Ray's runtime environment has the keys {known}")
    for key in found:
        if key not in RuntimeEnv.known_fields:
            raise ConfigError(f"{path} has the key {key!r}, which Ray would ignore", remedy=f"known keys: {known}")
    variables = found.get("env_vars") or {}
    if not isinstance(variables, dict) or not all(isinstance(each, str) for pair in variables.items() for each in pair):
        raise ConfigError(f"{path}: env_vars needs text for every name", remedy='put numbers into quotes: KEY: "1"')
    if _CREDENTIALS.search(json.dumps({key: value for key, value in found.items() if key != "env_vars"}, default=str)):
        raise _credentials_error(path)
    return found


def _text(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "it is not a text file"
        raise ConfigError(f"cannot read {path}: {reason}", remedy=f"check {option}") from None


def _credentials_error(path: str) -> ConfigError:
    return ConfigError(
        f"{path} has a line with a user name or password in it, which everybody would see among the job's data",
        remedy="give the cluster's machines their own credentials, such as in ~/.netrc",
    )
