"""Jobs on a real Ray cluster over real HTTP: handed in, followed, stopped, handed in again."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import requests
from aiohttp import ServerDisconnectedError
from ray.job_submission import JobDetails

from datm_ray.artifact import load
from datm_ray.cli.jobs import highlights
from datm_ray.config import to_yaml
from datm_ray.errors import ClusterError, ConfigError
from datm_ray.runtime.executor import Lost, Progress, Resized, Task
from datm_ray.runtime.ray_jobs import Jobs
from datm_ray.runtime.telemetry import Reporter
from datm_ray.store.filesystem import open_location
from datm_ray.store.trajectories import TrajectoryStore
from tests.conftest import CommandLine, tiny_config

SECRET = "no-log-shows-this"


def free_port() -> int:
    """That nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def dashboard(s3_server: str) -> Iterator[str]:
    """The address of a cluster of its own, with two CPUs, whose machines have credentials for a bucket."""
    port, agent = free_port(), free_port()
    ports = [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent}", f"--port={free_port()}"]
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1", *ports]
    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    environment = {"AWS_ENDPOINT_URL": s3_server, "NO_PROXY": "127.0.0.1", "PATH": os.environ["PATH"]}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # short, for sockets have short names
        cluster = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:], f"--temp-dir={folder}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | credentials | environment,
        )
        until(lambda: _listens(port))
        yield f"http://127.0.0.1:{port}"
        cluster.terminate()
        cluster.wait(60)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition: object, seconds: float = 120) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_a_job_is_stopped_and_goes_on_where_it_was(datm_ray: CommandLine, dashboard: str, bucket: str) -> None:
    """In a bucket, without any shared disk. The same submission finishes the run, and is followed to its end."""
    out = f"s3://{bucket}/shared"
    Path("tiny.yaml").write_text(
        to_yaml(tiny_config("distill.iterations=150", "distill.checkpoint_every=5", "evaluate.seeds=1"))
    )
    arguments = ("job", "submit", "tiny.yaml", "--out", out, "--address", dashboard)
    code, told, err = datm_ray(*arguments)
    assert code == 0, err
    number = re.findall(r"^Job (\S+)$", told, re.MULTILINE)[0]
    place = open_location(out)
    until(lambda: (place / "tiny/checkpoint.arrow").exists())
    assert "running" in datm_ray("job", "list", "--address", dashboard)[1]
    code, _, err = datm_ray(*arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"writes to {out} already" in err
    assert "is being stopped" in datm_ray("job", "stop", number, "--address", dashboard)[1]
    until(lambda: Jobs(dashboard).job(number).is_over)
    code, told, _ = datm_ray("job", "status", number, "--address", dashboard)
    assert "stopped" in told
    assert out in told
    assert not (place / "tiny/synthetic.arrow").exists()
    store = TrajectoryStore(f"{out}/experts")
    (key,) = store.groups()
    assert store.group(key.dataset, key.architecture, key.fingerprint).experts() == [0, 1]
    code, told, err = datm_ray(*arguments, "--follow")
    assert code == 0, told + err
    assert "Experts: nothing to do" in told
    assert told.rstrip().endswith("succeeded")
    assert load(f"{out}/tiny/synthetic.arrow").images.shape[0] == 10
    assert (place / "report.html").exists()
    assert len(datm_ray("job", "list", "--address", dashboard)[1].splitlines()) == 2
    told += "".join(Jobs(dashboard).logs(job.id) + str(job) for job in Jobs(dashboard).list())
    token = Path("~/.ray/auth_token").expanduser()
    assert SECRET not in told
    assert not token.exists() or token.read_text().strip() not in told


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_ends_with_the_exit_code_of_its_command(datm_ray: CommandLine, dashboard: str, tmp_path: Path) -> None:
    """Whoever follows it gets the reason in the log, and the code."""
    Path("tiny.yaml").write_text(to_yaml(tiny_config("dataset.source=folder", f"dataset.path={tmp_path}/none")))
    code, told, _ = datm_ray(
        "job", "submit", "tiny.yaml", "--out", str(tmp_path / "out"), "--address", dashboard, "--follow"
    )
    assert code == 2
    assert f"{tmp_path}/none" in told
    assert "Traceback" not in told
    number = re.findall(r"^Job (\S+)$", told, re.MULTILINE)[0]
    code, log, _ = datm_ray("job", "logs", number, "--address", dashboard)
    assert code == 0
    assert f"{tmp_path}/none" in log


@pytest.mark.slow
@pytest.mark.ray
def test_bad_input_hands_nothing_in(datm_ray: CommandLine, dashboard: str, tmp_path: Path) -> None:
    """One line, exit code 2, and no job more."""
    before = len(Jobs(dashboard).list())
    out = str(tmp_path / "out")
    bad = {
        "relative to a folder": ["submit", "digits-ipc1", "--out", "runs"],
        "cannot read absent.txt": ["submit", "digits-ipc1", "--out", out, "--requirements", "absent.txt"],
        "Did you mean 'digits-ipc1'": ["submit", "digits-ipc2", "--out", out],
        "there is no job 'j'": ["status", "j"],
        "bogus": ["submit", "digits-ipc1", "--out", "bogus://x/y"],
        "two runs are both named 'digits-ipc1'": ["submit", "digits-ipc1", "digits-ipc1", "--out", out],
    }
    for expected, arguments in bad.items():
        code, told, err = datm_ray("job", *arguments, "--address", dashboard)
        assert (code, told) == (2, "")
        assert expected in err
        assert len(err.splitlines()) == 1
    assert len(Jobs(dashboard).list()) == before


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:8265", "is no address of a dashboard"), ("http://127.0.0.1:x", "is no address of a dashboard")],
)
def test_an_address_that_is_none_is_refused(address: str, expected: str) -> None:
    """With how to write it."""
    with pytest.raises(ClusterError, match=expected):
        Jobs(address)


def test_an_address_where_nobody_is_is_refused() -> None:
    """Or where somebody else is."""
    with pytest.raises(ClusterError, match="no Ray cluster takes jobs"):
        Jobs(f"http://127.0.0.1:{free_port()}")


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and says nothing."""
    monkeypatch.setattr("datm_ray.runtime.ray_jobs.CONNECT_TIMEOUT", 0.5)
    expected = r"no Ray cluster takes jobs .*timed out"
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterError, match=expected):
        Jobs(f"http://127.0.0.1:{silent.getsockname()[1]}")


class Cluster:
    """What Ray's client says of a cluster with one job, in Ray's own words; keeps what it was asked."""

    def __init__(self, _address: str) -> None:
        self.asked: list[str] = []
        self.has_an_agent = True

    def list_jobs(self) -> list[JobDetails]:
        self.asked.append("list")
        return [self.get_job_info("here")]

    def get_job_info(self, number: str) -> JobDetails:
        self.asked.append(f"job {number}")
        if number != "here":
            raise RuntimeError(f"Request failed with status code 404: Job {number} does not exist.")
        metadata = {"datm_ray": "tiny", "out": "s3://bucket/runs"}
        return JobDetails(type="SUBMISSION", submission_id=number, status="RUNNING", entrypoint="", metadata=metadata)

    def get_job_logs(self, number: str) -> str:
        self.get_job_info(number)
        if self.has_an_agent:
            return "Experts: 2 to do\n"
        raise RuntimeError("Request failed with status code 500: Traceback\nthe agent of Job here does not exist.")

    async def tail_job_logs(self, _number: str) -> AsyncIterator[str]:
        yield "Experts: 2 to do\n"
        raise ServerDisconnectedError

    def stop_job(self, number: str) -> bool:
        return bool(self.get_job_info(number))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Those of the cluster above."""
    for name in ("_require_answer", "use_token"):
        monkeypatch.setattr(f"datm_ray.runtime.ray_jobs.{name}", lambda *_: None)
    monkeypatch.setattr("datm_ray.runtime.ray_jobs.JobSubmissionClient", Cluster)
    return Jobs("http://127.0.0.1:8265")


@pytest.mark.parametrize("ask", [Jobs.job, Jobs.logs, Jobs.stop, Jobs.ended, lambda jobs, job: next(jobs.follow(job))])
@pytest.mark.parametrize("number", ["gone", "", ".", "../version", "here?x", "a b"])
def test_a_job_that_is_not_there_is_told(jobs: Jobs, ask: Callable[[Jobs, str], object], number: str) -> None:
    """Also one whose number would lead to another page of the dashboard."""
    with pytest.raises(ClusterError, match=re.escape(f"there is no job {number!r} at")):
        ask(jobs, number)


def test_a_job_is_asked_for_once(jobs: Jobs) -> None:
    """Without a list of all jobs before; and not every trouble means that there is none."""
    assert jobs.logs("here") == "Experts: 2 to do\n"
    assert jobs.job("here").status == "running"
    assert jobs._client.asked == ["job here", "job here"]
    jobs._client.has_an_agent = False
    with pytest.raises(ClusterError, match="does not do it: Request failed with status code 500"):
        jobs.logs("here")


def test_a_connection_that_breaks_while_a_job_is_followed_is_one_line(jobs: Jobs) -> None:
    """The job goes on without it."""
    lines = jobs.follow("here")
    assert next(lines) == "Experts: 2 to do\n"
    with pytest.raises(ClusterError, match="a job goes on without this connection"):
        next(lines)


def test_a_status_tells_losses_progress_and_the_last_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words in which a run writes its log; of a job without a log, what the cluster says."""
    monkeypatch.setattr("datm_ray.runtime.telemetry.LINE_INTERVAL", 0.0)
    reporter, task = Reporter(), Task("digits-ipc1", ())
    reporter.message("Running on Ray, up to 2 worker(s) of 1 thread(s)")
    with reporter.stage("Distillation", 1) as stage:
        for event in (
            Progress(1, 300, {"loss": 1.5}),
            Lost("its node died", 1),
            Progress(120, 300, {"loss": 0.41}),
            Lost("it has not answered for 61 s", 2),
            Resized(1, 2),
        ):
            stage.event(task, event)
    assert highlights(capsys.readouterr().err, "Job is currently running.") == {
        "lost": "2 worker(s), the last time: digits-ipc1: its worker died (it has not answered for 61 s); attempt 3"
        " starts on another one",
        "progress": "Distillation: 0/1 done; digits-ipc1 120/300  loss 0.41",
        "last": "digits-ipc1: goes on with 1 of 2 worker(s), for the cluster has room for no more",
    }
    assert highlights(" \n", "Job is currently pending.") == {"last": "Job is currently pending."}
    assert highlights("Experts: 2 to do\n\n", "") == {"last": "Experts: 2 to do"}
    assert highlights("", "") == {}


def test_a_slash_makes_no_other_folder(jobs: Jobs) -> None:
    """Where a job writes to already, another is not handed in."""
    for out in ("s3://bucket/runs", "s3://bucket/runs/"):
        with pytest.raises(ClusterError, match=f"job here is running and writes to {out} already"):
            jobs._require_nobody_at_work(out)
    jobs._require_nobody_at_work("s3://bucket/runs2")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--index-url https://user:secret@host/simple", "user name or password"),
        ("-r other.txt", "does not travel"),
        ("-e .", "does not travel"),
        ("torch==2.9 \\", "does not travel"),
    ],
)
def test_requirements_that_cannot_travel_are_refused(tmp_path: Path, line: str, expected: str) -> None:
    """A job's data can be read by all who reach the dashboard, so nothing secret may be among it."""
    from datm_ray.runtime.ray_jobs import _requirements

    file = tmp_path / "requirements.txt"
    file.write_text(f"# packages\nnumpy\n{line}\n")
    with pytest.raises(ConfigError, match=expected) as caught:
        _requirements(str(file))
    assert "secret" not in str(caught.value)
    file.write_text("# packages\n\nnumpy>=2\n")
    assert _requirements(str(file)) == ["numpy>=2"]


def test_no_place_is_taken_that_the_job_has_not() -> None:
    """A relative path would lie in the job's own folder, which is deleted."""
    from datm_ray.runtime.ray_jobs import _require_reachable

    _require_reachable("--out", "s3://bucket/runs")
    _require_reachable("--out", "/shared/runs")
    with pytest.raises(ConfigError, match=r"--out 'runs' is relative.*s3://bucket/"):
        _require_reachable("--out", "runs")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", ""),
        ("\n  it fell over.\nTraceback", "it fell over"),
        (ValueError(), "ValueError"),
        (ValueError("\nno such thing.\n"), "no such thing"),
        ("x" * 300, "x" * 200),
    ],
)
def test_a_line_is_made_of_what_somebody_says(said: BaseException | str, expected: str) -> None:
    """Nothing where a message is empty; the kind of an error that says nothing."""
    from datm_ray.runtime.ray_cluster import first_line

    assert first_line(said) == expected


def test_a_job_without_a_message_has_none() -> None:
    """Ray leaves it out, or empty, at the start."""
    from datm_ray.runtime.ray_jobs import _job

    for message in (None, ""):
        details = JobDetails(type="SUBMISSION", submission_id="j", status="PENDING", entrypoint="", message=message)
        assert (_job(details).id, _job(details).message) == ("j", "")


PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the environment says about proxies and certificates; all of it is restored afterwards."""
    for name in (*PROXIES, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_address_on_this_machine_goes_around_the_proxy(
    host: str, monkeypatch: pytest.MonkeyPatch, no_proxies: None
) -> None:
    """Both clients do, and what the user has excepted stays excepted."""
    monkeypatch.setattr("datm_ray.runtime.ray_jobs.JobSubmissionClient", Cluster)
    monkeypatch.setattr("datm_ray.runtime.ray_jobs.use_token", lambda: None)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    server_kind = type("Server", (ThreadingHTTPServer,), {"address_family": socket.AF_INET6 if ":" in host else 2})
    with server_kind((host.strip("[]"), 0), SimpleHTTPRequestHandler) as server:
        monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://{host}:{server.server_port}"
        Jobs(address)
        Jobs(address)  # a second time nothing is added
        server.shutdown()
    assert requests.utils.get_environ_proxies(address) == {}
    assert requests.utils.get_environ_proxies("http://inside.example:8265") == {}
    assert len(requests.utils.get_environ_proxies("http://outside.example:8265")) > 0
    assert os.environ["no_proxy"].count(host.strip("[]")) == (2 if ":" in host else 1)


def test_a_proxy_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, no_proxies: None) -> None:
    """With the variable it came from, without its password, and with how to go around it."""
    monkeypatch.setenv("http_proxy", f"http://me:{SECRET}@127.0.0.1:{free_port()}")
    with pytest.raises(ClusterError, match=r"the proxy of http_proxy, http://127.*no_proxy=head\.example") as caught:
        Jobs("http://head.example:8265")
    assert SECRET not in str(caught.value)


def test_certificates_of_a_company_are_named(monkeypatch: pytest.MonkeyPatch, no_proxies: None, tmp_path: Path) -> None:
    """Either variable is enough, and a failure names both."""
    refused = urllib.error.URLError(ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"))

    def refuse(*_: object) -> None:
        raise refused

    monkeypatch.setattr("datm_ray.runtime.ray_jobs._require_answer", refuse)
    (tmp_path / "company.pem").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "company.pem"))
    with pytest.raises(ClusterError, match="Set SSL_CERT_FILE and REQUESTS_CA_BUNDLE to the file"):
        Jobs("https://head.example:8265")
    assert os.environ["REQUESTS_CA_BUNDLE"] == os.environ["SSL_CERT_FILE"]


def test_a_reader_of_a_log_that_goes_leaves_nothing_open(jobs: Jobs) -> None:
    """The connection is closed with the generator, so that `job logs --follow | head` says nothing more."""
    closed: list[bool] = []

    async def endless(_number: str) -> AsyncIterator[str]:
        try:
            while True:
                yield "line\n"
        finally:
            closed.append(True)

    jobs._client.tail_job_logs = endless
    lines = jobs.follow("here")
    assert next(lines) == "line\n"
    lines.close()  # type: ignore[attr-defined]
    assert closed == [True]


def test_an_address_of_the_environment_is_blamed_on_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own variable for jobs."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "head:8265")
    with pytest.raises(ClusterError, match=r"^RAY_API_SERVER_ADDRESS 'head:8265' is no address"):
        Jobs("head:8265")
