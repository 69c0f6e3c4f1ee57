"""Runs as jobs of a Ray cluster: handed in over HTTP from anywhere, they go on when the terminal is closed.

The recipes and this package travel with the job; the cluster must have the other packages, or be given a file of
requirements. A job needs no disk that machines share if its folder is a URI that all of them can open. Nothing of this
process's environment travels, so that no secret can: the cluster has its own credentials.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray.exceptions
from aiohttp import ClientError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import datm_ray
from datm_ray.config import RunConfig, to_yaml
from datm_ray.errors import ClusterError, ConfigError
from datm_ray.runtime.ray_cluster import first_line
from datm_ray.runtime.ray_compat import hush, use_token
from datm_ray.store.filesystem import open_location

AuthenticationError: Any = getattr(ray.exceptions, "AuthenticationError", ())
"""Of versions of Ray that know tokens."""
CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a cluster to answer."""
AGENT_TIMEOUT = 60.0
"""Seconds to wait for a cluster that answers to have somebody who takes jobs."""
END_TIMEOUT = 30.0
"""Seconds to wait for a job's state after the last line of its log."""
_NUMBER = re.compile(r"\w[\w.+-]*")
_NOT_FOUND = re.compile(r"status code 404: Job .* does not exist")
_CREDENTIALS = re.compile(r"://[^/\s]*@")
MINE = "datm_ray"
"""Key of a job's metadata that tells this package's jobs from others."""


@dataclass(frozen=True)
class Job:
    """What is known about one job."""

    id: str
    status: str
    """pending, running, stopped, succeeded or failed."""
    recipes: str
    """Names of the runs."""
    out: str
    """Where they write to."""
    seconds: float
    """Since it was handed in, or until it ended."""
    message: str
    exit_code: int | None
    """Of the command; None before it has ended, or where it was killed."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("stopped", "succeeded", "failed")


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: of the cluster's dashboard, such as http://127.0.0.1:8265.

        Raises:
            ClusterError: nothing answers there, or no Ray cluster does.
        """
        self._address = address
        _require_web_address(address)
        _go_around_proxy(address)
        if address.startswith("https:"):
            _share_authorities()
        try:
            _require_answer(address)
            use_token()
            self._client = JobSubmissionClient(address)
            hush()
        except AuthenticationError:
            raise _no_token(address) from None
        except (OSError, RuntimeError) as failure:
            raise ClusterError(
                f"no Ray cluster takes jobs at {address} ({first_line(failure)})", *_why_not(address, failure)
            ) from None

    def submit(
        self, configs: Sequence[RunConfig], out: str, store: str | None = None, requirements: str | None = None
    ) -> str:
        """Hand in a job that runs the recipes to the end. Its number.

        The same again, after a job has ended however it ended, goes on where that one stopped.

        Args:
            out: of the runs; a URI, or a path on a disk that all machines share.
            store: of the experts; none puts it into `out`.
            requirements: path of a file of packages, as pip takes it.

        Raises:
            ConfigError: a place or file that cannot be used.
            ClusterError: the cluster does not take the job.
        """
        for name, place in (("--out", out), ("--store", store)):
            if place is not None:
                _require_reachable(name, place)
        self._require_nobody_at_work(out)
        environment: dict[str, object] = {"py_modules": [str(Path(datm_ray.__file__).parent)]}
        if requirements is not None:
            environment["pip"] = _requirements(requirements)
        files = [f"{number}-{config.name}.yaml" for number, config in enumerate(configs)]
        command = ["python", "-m", "datm_ray", "run", *files, "--out", out, "--address", "auto"]
        command += ["--store", store] if store is not None else []
        names = ", ".join(config.name for config in configs)
        with tempfile.TemporaryDirectory(prefix="datm-ray-job-") as folder, self._answers():
            for file, config in zip(files, configs, strict=True):
                (Path(folder) / file).write_text(to_yaml(config), encoding="utf-8")
            return self._submit(
                entrypoint=shlex.join(command),
                submission_id=f"datm-ray-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06d}",
                runtime_env={**environment, "working_dir": folder},
                metadata={MINE: names, "out": out},
            )

    def _submit(self, **job: Any) -> str:
        """Hand in a job, to a cluster that may have started a moment ago and have nobody yet to take it."""
        end = time.monotonic() + AGENT_TIMEOUT
        while True:
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as failure:
                if "No available agent" not in str(failure) or time.monotonic() > end:
                    raise
            time.sleep(1.0)

    def _require_nobody_at_work(self, out: str) -> None:
        for job in self.list():
            if job.out.rstrip("/") == out.rstrip("/") and not job.is_over:
                raise ClusterError(
                    f"job {job.id} is {job.status} and writes to {out} already",
                    "two at once would write over each other",
                    f"follow it with `datm-ray job logs {job.id} --follow`, stop it first, or give another --out",
                )

    def list(self) -> list[Job]:
        """This package's jobs, the oldest first."""
        with self._answers():
            found = [job for job in self._client.list_jobs() if MINE in (job.metadata or {})]
        return [_job(job) for job in sorted(found, key=lambda job: job.start_time or 0)]

    def job(self, number: str) -> Job:
        """One job.

        Raises:
            ClusterError: there is none of that number.
        """
        with self._answers(number):
            return _job(self._client.get_job_info(number))

    def logs(self, number: str) -> str:
        """All that a job has said so far."""
        with self._answers(number):
            text: str = self._client.get_job_logs(number)
        return text

    def follow(self, number: str) -> Iterator[str]:
        """What a job says, as it says it, until it has ended. Leaving early does not stop the job."""
        self.job(number)  # for a socket that is refused does not say why
        loop = asyncio.new_event_loop()
        lines: Any = self._client.tail_job_logs(number)
        try:
            with self._answers(), suppress(StopAsyncIteration):
                while True:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)  # in how Ray calls its web client
                        text = loop.run_until_complete(anext(lines))
                    yield text
        finally:
            with suppress(Exception):  # or it would complain about the connection that nobody has closed
                loop.run_until_complete(lines.aclose())
            loop.close()

    def ended(self, number: str) -> Job:
        """A job that has said its last line, as it ended."""
        end = time.monotonic() + END_TIMEOUT
        while not (job := self.job(number)).is_over and time.monotonic() < end:
            time.sleep(0.5)
        return job

    def stop(self, number: str) -> bool:
        """Stop a job; whether it was at work. What it has finished stays."""
        with self._answers(number):
            stopped: bool = self._client.stop_job(number)
        return stopped

    @contextmanager
    def _answers(self, number: str | None = None) -> Iterator[None]:
        """Turns the ways in which a cluster fails to answer into one.

        Args:
            number: of the job that the block asks for; none where it asks for no single one.
        """
        absent = ClusterError(
            f"there is no job {number!r} at {self._address}", remedy="`datm-ray job list` shows those there are"
        )
        if number is not None and not _NUMBER.fullmatch(number):  # its address would be that of something else
            raise absent
        try:
            yield
        except AuthenticationError:
            raise _no_token(self._address) from None
        except (OSError, RuntimeError, ClientError) as failure:  # the last while a log is followed
            if number is not None and _NOT_FOUND.search(str(failure)):
                raise absent from None
            raise ClusterError(
                f"the Ray cluster at {self._address} does not do it: {first_line(failure)}",
                "it may have gone down, or refuse the job"
                + (f"; requests go through {proxy}" if (proxy := _proxy_of(self._address)) else ""),
                "`datm-ray job list` shows whether it answers; a job goes on without this connection",
            ) from None


def _no_token(address: str) -> ClusterError:
    return ClusterError(
        f"the Ray cluster at {address} asks for an authentication token, and does not accept the one from here",
        "no token was given, or that of another cluster",
        "put the cluster's token into ~/.ray/auth_token, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
    )


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    started = (details.start_time or 0) / 1000
    ended = (details.end_time or 0) / 1000 or time.time()
    return Job(
        id=details.submission_id or details.job_id or "",
        status=JobStatus(details.status).value.lower(),
        recipes=metadata.get(MINE, ""),
        out=metadata.get("out", ""),
        seconds=max(0.0, ended - started),
        message=first_line(details.message or ""),
        exit_code=details.driver_exit_code,
    )


def _require_web_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        given = "RAY_API_SERVER_ADDRESS" if os.environ.get("RAY_API_SERVER_ADDRESS") == address else "--address"
        raise ClusterError(
            f"{given} {address!r} is no address of a dashboard", remedy="write it like http://127.0.0.1:8265"
        )


def _go_around_proxy(address: str) -> None:
    """Let this process reach an address on this machine directly: a proxy elsewhere would look for it there."""
    host = urlsplit(address).hostname or ""
    if not urllib.request.getproxies() or urllib.request.proxy_bypass(urlsplit(address).netloc):
        return
    with suppress(ValueError):
        if host == "localhost" or ip_address(host).is_loopback:
            # The lower-case name counts where both are set; a host in brackets is urllib's, one without requests'.
            known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
            names = [host, f"[{host}]"] if ":" in host else [host]
            os.environ["no_proxy"] = ",".join([*filter(None, [known]), *names])


def _share_authorities() -> None:
    """Let one variable be enough for a company's certificates: Python reads one, Ray's client the other."""
    one, other = "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"
    for name, twin in ((one, other), (other, one)):
        if os.environ.get(twin) and os.path.isfile(os.environ[twin]):
            os.environ.setdefault(name, os.environ[twin])


def _proxy_of(address: str) -> str | None:
    """The variable and the address of the proxy that requests go through, without credentials; None for no proxy."""
    parts = urlsplit(address)
    for name in (f"{parts.scheme}_proxy", f"{parts.scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY"):
        if os.environ.get(name):
            if urllib.request.proxy_bypass(parts.netloc):
                return None
            return f"the proxy of {name}, {_CREDENTIALS.sub('://', os.environ[name])}"
    return None


def _why_not(address: str, failure: Exception) -> tuple[str, str]:
    """Likely cause, and remedy, where a dashboard does not answer."""
    if "CERTIFICATE_VERIFY_FAILED" in str(failure):
        return (
            "its certificate is of an authority that is unknown here, such as a company's own",
            "set SSL_CERT_FILE and REQUESTS_CA_BUNDLE to the file of the authority's certificate",
        )
    if proxy := _proxy_of(address):
        return (
            f"the request went through {proxy}",
            f"check that variable, or set no_proxy={urlsplit(address).hostname} to reach the address directly",
        )
    return (
        "the address is wrong, the head node is down, or its port cannot be reached from here",
        "give the address of its dashboard, such as http://127.0.0.1:8265, through a tunnel if need be",
    )


def _require_answer(address: str) -> None:
    """Raise an `OSError` if nobody answers in time: Ray's own client would wait for ever."""
    with suppress(urllib.error.HTTPError):  # an answer too, such as that a token is missing
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=CONNECT_TIMEOUT).close()


def _require_reachable(name: str, place: str) -> None:
    """A job runs on other machines, in a folder that is deleted afterwards."""
    is_local = open_location(place).local_path is not None  # refuses what is no place for files
    if is_local and not place.startswith(("/", "file:///")):
        raise ConfigError(
            f"{name} {place!r} is relative to a folder that the job's machines do not have",
            remedy="give a URI such as s3://bucket/folder, or an absolute path on a disk that all machines share",
        )


def _requirements(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "it is no text"
        raise ConfigError(f"cannot read {path}: {reason}", remedy="check --requirements") from None
    wanted = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for line in wanted:
        if _CREDENTIALS.search(line):
            raise ConfigError(
                f"{path} has a line with a user name or password in it, which everybody would see among the job's data",
                remedy="give the cluster's machines their own credentials, such as in ~/.netrc",
            )
        if line.startswith(("-r", "-c", "-e", "--requirement", "--constraint", "--editable")) or line.endswith("\\"):
            raise ConfigError(
                f"{path} has the line {line!r}, which names something that does not travel with the job",
                remedy="write the packages themselves, one a line",
            )
    return wanted
