"""Tests jobs on a real Ray cluster over HTTP: submitted, followed, stopped, resubmitted, and on a failing one."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobDetails
from ray.runtime_env import RuntimeEnv

from datm_ray.artifact import load
from datm_ray.config import to_yaml
from datm_ray.errors import ClusterError, ConfigError, JobLostError, JobNotFoundError, JobUnreachableError
from datm_ray.monitor import logs
from datm_ray.runtime.ray.jobs import Job, Jobs, job_environment
from datm_ray.store.files.filesystem import open_location
from tests.conftest import CommandLine, documented_keys, tiny_config
from tests.processes import free_port, until
from tests.runtime import dashboard as dashboards

SECRET = "no-log-shows-this"
OWN = (Path(__file__).parents[3] / "docs/methods/own.md").read_text()


@pytest.fixture(scope="module")
def dashboard(s3_server: str) -> Iterator[str]:
    """Address of a separate cluster with one CPU and credentials for a bucket."""
    port, agent = free_port(), free_port()
    ports = [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent}", f"--port={free_port()}"]
    command = ["ray", "start", "--head", "--block", "--num-cpus=1", "--dashboard-host=127.0.0.1", *ports]
    command += ["--include-log-monitor=False", "--disable-usage-stats"]
    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"AWS_ENDPOINT_URL": s3_server, "NO_PROXY": "127.0.0.1", "PATH": path}
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # short, because paths of sockets are limited
        cluster = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:], f"--temp-dir={folder}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | credentials | environment,
        )
        until(lambda: _listens(port), every=1)
        yield f"http://127.0.0.1:{port}"
        cluster.terminate()
        cluster.wait(60)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_a_stopped_job_resumes_when_submitted_again(datm_ray: CommandLine, dashboard: str, bucket: str) -> None:
    """A job on a bucket without a shared disk is stopped, submitted again and followed to its end.

    A job's processes start for half a minute, and those of each stage anew: two jobs, and no stage twice.
    """
    out, store, address = f"s3://{bucket}/shared", f"s3://{bucket}/experts", ("--address", dashboard)
    Path("tiny.yaml").write_text(to_yaml(tiny_config("evaluate.seeds=1", "cluster.workers=1")))
    code, _, err = datm_ray("experts", "tiny.yaml", "--executor", "serial", "--out", "elsewhere", "--store", store)
    assert code == 0, err
    arguments = ("job", "submit", "tiny.yaml", "--out", out, "--store", store, *address)
    code, printed, err = datm_ray(*arguments, "--detach", "-v")
    assert code == 0, err
    submission_id = re.findall(r"^Job (\S+)$", printed, re.MULTILINE)[0]
    code, _, err = datm_ray(*arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"writes to {out} already" in err
    assert f"datm-ray job logs {submission_id} --follow --address {dashboard}" in err
    jobs = Jobs(dashboard)
    until(lambda: "stage started stage=Evaluation" in jobs.logs(submission_id), every=1)
    assert re.search(f"{submission_id} +running", datm_ray("job", "list", *address)[1])
    assert "is being stopped" in datm_ray("job", "stop", submission_id, *address)[1]
    until(lambda: jobs.job(submission_id).is_over, every=1)
    code, printed, _ = datm_ray("job", "status", submission_id, *address)
    assert "stopped" in printed
    assert out in printed
    place = open_location(out)
    assert not (place / "report.html").exists()
    assert load(f"{out}/tiny/synthetic.arrow").images.shape[0] == 10
    assert re.search(r"Z INFO \S+ Worker/\d+  checkpoint saved run=tiny iteration=6", jobs.logs(submission_id))
    code, printed, err = datm_ray(*arguments)
    assert code == 0, printed + err
    assert "Experts: nothing to do" in printed
    assert "Distillation: nothing to do" in printed
    assert "Evaluation: done" in printed
    assert printed.rstrip().endswith("succeeded")
    assert (place / "report.html").exists()
    first, second = jobs.list()
    assert (first.status, second.status, second.exit_code) == ("stopped", "succeeded", 0)
    log = jobs.logs(second.id)
    assert printed == f"Job {second.id}\n{log}Job {second.id} succeeded\n"
    printed += log + jobs.logs(first.id) + f"{first} {second}"
    token = Path("~/.ray/auth_token").expanduser()
    assert SECRET not in printed
    assert not token.exists() or token.read_text().strip() not in printed


@pytest.mark.slow
@pytest.mark.ray
def test_bad_input_submits_nothing(datm_ray: CommandLine, dashboard: str, tmp_path: Path) -> None:
    """Bad input is one line with exit code 2, and submits no job."""
    before = len(Jobs(dashboard).list())
    out = str(tmp_path / "out")
    bad = {
        "is no absolute path": ["submit", "digits-ipc1", "--out", "runs"],
        "cannot read absent.txt": ["submit", "digits-ipc1", "--out", out, "--requirements", "absent.txt"],
        "Did you mean 'digits-ipc1'": ["submit", "digits-ipc2", "--out", out],
        "there is no job 'j'": ["status", "j"],
        "bogus": ["submit", "digits-ipc1", "--out", "bogus://x/y"],
        "two runs are both named 'digits-ipc1'": ["submit", "digits-ipc1", "digits-ipc1", "--out", out],
    }
    for expected, arguments in bad.items():
        code, printed, err = datm_ray("job", *arguments, "--address", dashboard)
        assert (code, printed) == (2, "")
        assert expected in err
        assert len(err.splitlines()) == 1
    assert len(Jobs(dashboard).list()) == before


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[dashboards.Dashboard]:
    """A dashboard in this process with one job, whose log is read often."""
    monkeypatch.setattr("datm_ray.runtime.ray.dashboard.use_token", lambda: None)
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.FOLLOW_INTERVAL", (0.01, 0.01))
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.FOLLOW_SHARE", 10)
    with dashboards.serving(log="Experts: 2 tasks to run\n") as there:
        yield there


@pytest.fixture
def jobs(there: dashboards.Dashboard) -> Jobs:
    """Jobs of the dashboard above."""
    return Jobs(there.address)


def followed(jobs: Jobs, submission_id: str = "here") -> tuple[Job, str, list[str]]:
    """A followed job at its end, its printed log, and the warnings."""
    shown, warned = [], []  # type: ignore[var-annotated]
    return jobs.follow(submission_id, shown.append, warned.append), "".join(shown), warned


@pytest.mark.parametrize("ask", [Jobs.job, Jobs.logs, Jobs.stop, followed])
def test_a_missing_job_is_reported(jobs: Jobs, ask: Callable[[Jobs, str], object]) -> None:
    """A missing job is an error, also if its id would lead to another page of the dashboard."""
    for submission_id in ("gone", "", ".", "../version", "here?x", "a b"):
        with pytest.raises(JobNotFoundError, match=re.escape(f"there is no job {submission_id!r} at")):
            ask(jobs, submission_id)


def test_a_job_is_requested_once(jobs: Jobs, there: dashboards.Dashboard) -> None:
    """A job is requested once, without a list of all jobs; other errors do not mean that it is missing."""
    assert jobs.logs("here") == "Experts: 2 tasks to run\n"
    assert jobs.job("here").status == "running"
    assert there.paths() == ["/api/jobs/here/logs", "/api/jobs/here"]
    body = "Traceback (most recent call last):\n  File x\nOSError: the agent of Job here does not exist"
    there.plan = lambda _: (500, {"Content-Type": "text/plain"}, body)
    with pytest.raises(ClusterError, match=r"refused the request \(OSError: the agent of Job here does not exist\)"):
        jobs.logs("here")


@pytest.mark.parametrize("fault", [dashboards.LOST, dashboards.page(502), dashboards.page(200), dashboards.page(503)])
def test_a_log_resumes_where_a_connection_ended(
    fault: dashboards.Answer, jobs: Jobs, there: dashboards.Dashboard
) -> None:
    """After a lost connection no line is missing or shown twice, and the outage is reported once."""
    lines = [f"line {n}\n" for n in range(20)]
    moments = iter(range(1000))

    def plan(asked: dashboards.Asked) -> dashboards.Answer | None:
        moment = next(moments)
        there.log = "".join(lines[: 1 + moment // 2])[:-1]  # a read may end within a line
        if moment >= 60:
            there.log, there.status, there.exit_code = "".join(lines), "FAILED", 3
        return fault if moment % 30 in range(15, 20) else None

    there.plan = plan
    job, shown, warned = followed(jobs)
    assert shown == "".join(lines)
    assert (job.status, job.exit_code) == ("failed", 3)
    assert len(warned) == 2
    assert all("Trying again for 10 min; the job keeps running." in line for line in warned)


def test_a_log_with_lost_parts_is_not_started_again(jobs: Jobs, there: dashboards.Dashboard) -> None:
    """A log reported as empty, because its node does not answer, is not printed from the start again."""
    logs = iter(["one\n", "one\ntwo\n", "", "one\n", "one\ntwo\nthree\n"])

    def plan(asked: dashboards.Asked) -> None:
        if asked.path.endswith("logs"):
            there.log = next(logs, "one\ntwo\nthree\n")
            there.status = "SUCCEEDED" if "three" in there.log else "RUNNING"

    there.plan = plan
    job, shown, warned = followed(jobs)
    assert (job.status, shown, warned) == ("succeeded", "one\ntwo\nthree\n", [])


def test_a_job_ends_with_the_exit_code_of_its_command(datm_ray: CommandLine, there: dashboards.Dashboard) -> None:
    """Following a job returns its reason and exit code: 1 if stopped, the shell's after a signal."""
    follow = ("job", "logs", "here", "--follow", "--address", there.address)
    there.status, there.exit_code = "FAILED", 2
    assert datm_ray(*follow) == (2, "Experts: 2 tasks to run\nJob here failed: Job is FAILED\n", "")
    there.job["message"] = "It failed with exit code -9, last available logs (truncated to 20,000 chars):\nExperts"
    there.exit_code = -9
    assert datm_ray(*follow) == (137, "Experts: 2 tasks to run\nJob here failed: It failed with exit code -9\n", "")
    there.status, there.exit_code = "STOPPED", None
    assert datm_ray(*follow) == (1, "Experts: 2 tasks to run\nJob here stopped\n", "")


def test_a_job_that_waits_says_so(monkeypatch: pytest.MonkeyPatch, jobs: Jobs, there: dashboards.Dashboard) -> None:
    """A job without output for long, as while packages are installed, is reported once as waiting."""
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.PENDING_REPORTED", 0.1)
    there.log, there.status = "", "PENDING"

    def plan(asked: dashboards.Asked) -> None:
        if len(there.asked) > 100:
            there.status = "SUCCEEDED"

    there.plan = plan
    assert followed(jobs)[1:] == ("", ["the job is pending (Job is PENDING)."])


def test_a_cluster_that_is_silent_for_long_is_left(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, there: dashboards.Dashboard
) -> None:
    """A cluster silent for long ends the following with its own exit code and the command to resume it."""
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.FOLLOW_TIMEOUT", 0.1)
    there.plan = lambda asked: dashboards.page(502) if len(there.asked) > 6 else None
    code, printed, err = datm_ray("job", "logs", "here", "--follow", "--address", there.address)
    assert (code, printed) == (75, "Experts: 2 tasks to run\n")
    warning, end = err.splitlines()
    assert "502 Bad Gateway" in warning
    assert "the job keeps running" in warning
    assert end.endswith(
        "The job keeps running without this connection. "
        f"Follow it again with `datm-ray job logs here --follow --address {there.address}`."
    )


def test_a_cluster_that_forgets_a_job_has_ended_it(jobs: Jobs, there: dashboards.Dashboard) -> None:
    """A job unknown to a restarted cluster has ended."""
    there.plan = lambda asked: there.job.update(submission_id="another") if len(there.asked) > 8 else None
    with pytest.raises(JobLostError, match=r"there is no job 'here' at .* any more\. The cluster was restarted"):
        followed(jobs)


def test_a_job_that_has_ended_ends_though_its_log_is_gone(
    monkeypatch: pytest.MonkeyPatch, jobs: Jobs, there: dashboards.Dashboard
) -> None:
    """An ended job is reported even if its log is lost with its node."""
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.LAST_LINES_TIMEOUT", 0.1)
    there.status = "SUCCEEDED"
    there.plan = lambda asked: (500, {}, "no agent") if asked.path.endswith("logs") else None
    job, shown, warned = followed(jobs)
    assert (job.status, shown) == ("succeeded", "")
    assert "the rest of the log cannot be read" in warned[-1]


def test_a_long_log_is_fetched_less_often(
    monkeypatch: pytest.MonkeyPatch, jobs: Jobs, there: dashboards.Dashboard
) -> None:
    """A long log is fetched less often, so that fetching takes a tenth of the time."""
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        there.status = "SUCCEEDED" if len(pauses) == 3 else "RUNNING"

    times = iter([0.0, 0.0, 4.0, 10.0, 10.1, 20.0, 20.0, 30.0, 30.0])
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.FOLLOW_INTERVAL", (1.0, 5.0))
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.FOLLOW_SHARE", 0.1)
    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: next(times), time=time.time)
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.time", clock)
    followed(jobs)
    assert pauses == pytest.approx([40.0, 5.0, 5.0])


def test_a_submission_whose_answer_is_lost_counts(
    monkeypatch: pytest.MonkeyPatch, jobs: Jobs, there: dashboards.Dashboard, tmp_path: Path
) -> None:
    """After a lost answer a submission succeeds if the job exists, and else is an error."""
    there.status = "SUCCEEDED"

    def plan(asked: dashboards.Asked) -> dashboards.Answer | None:
        if asked.method == "POST" and there.log.startswith("datm"):
            there.job = {"submission_id": there.log}
        return dashboards.page(504) if asked.method == "POST" else None

    there.plan = plan
    with pytest.raises(ClusterError, match="504 Gateway Timeout"):
        jobs.submit([tiny_config()], str(tmp_path))
    monkeypatch.setattr("datm_ray.runtime.ray.jobs._new_submission_id", lambda: "datm-ray-1")
    there.log = "datm-ray-1"
    assert jobs.submit([tiny_config()], str(tmp_path)) == "datm-ray-1"


def test_a_submission_is_asked_for_until_the_cluster_answers(
    monkeypatch: pytest.MonkeyPatch, jobs: Jobs, there: dashboards.Dashboard, tmp_path: Path
) -> None:
    """After a lost answer the job is requested until a gateway answers; else the line names the job."""
    there.status = "SUCCEEDED"
    monkeypatch.setattr("datm_ray.runtime.ray.jobs._new_submission_id", lambda: "datm-ray-1")
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.time.sleep", lambda _: None)
    away, left = 3, 0

    def plan(asked: dashboards.Asked) -> dashboards.Answer | None:
        nonlocal left
        if asked.method == "POST":
            there.job, left = {"submission_id": "datm-ray-1"}, away
            return dashboards.page(504)
        left -= 1
        return dashboards.page(502) if left >= 0 else None

    there.plan = plan
    assert jobs.submit([tiny_config()], str(tmp_path)) == "datm-ray-1"
    assert left == -1
    away = 10**9
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.AGENT_TIMEOUT", 0.1)
    with pytest.raises(JobUnreachableError, match=r"whether job datm-ray-1 was submitted is not known"):
        jobs.submit([tiny_config()], str(tmp_path))


def test_a_submission_is_followed_unless_detached(
    datm_ray: CommandLine, there: dashboards.Dashboard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Submitting follows the job to its end; Ctrl-C leaves it running and prints how to follow and stop it."""
    submit = ("job", "submit", "digits-ipc1", "-o", str(tmp_path / "runs"), "--address", there.address)
    there.status, there.exit_code = "FAILED", 3
    monkeypatch.setattr("datm_ray.runtime.ray.jobs._new_submission_id", lambda: "datm-ray-1")
    code, out, err = datm_ray(*submit, "-v", "-v")
    assert (code, err) == (3, "")
    assert out == "Job datm-ray-1\nExperts: 2 tasks to run\nJob datm-ray-1 failed: Job is FAILED\n"
    assert there.job["entrypoint"].endswith("--address auto --verbose --verbose")
    follow = f"datm-ray job logs datm-ray-1 --follow --address {there.address}"
    assert datm_ray(*submit, "--detach") == (0, f"Job datm-ray-1\nNext: {follow}\n", "")
    assert datm_ray(*submit, "-d") == (0, f"Job datm-ray-1\nNext: {follow}\n", "")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("datm_ray.runtime.ray.jobs.Jobs.follow", interrupt)
    code, out, err = datm_ray(*submit)
    assert (code, out) == (130, "Job datm-ray-1\n")
    stop = f"datm-ray job stop datm-ray-1 --address {there.address}"
    assert err == f"\nThe job keeps running. Follow it again with: {follow}\nStop it with: {stop}\n"
    assert not [path for path in there.paths() if path.endswith("stop")]


def test_a_job_gets_the_variables_that_the_user_names_and_shows_none(
    datm_ray: CommandLine, there: dashboards.Dashboard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A job carries named variables and the user's runtime environment beside this package's, and no other variable."""
    file = tmp_path / "environment.yaml"
    file.write_text("pip: [humanize]\nenv_vars: {MODE: fast}\npy_modules: [s3://bucket/mine.zip]\n")
    monkeypatch.setenv("RAY_ADDRESS", f"{there.address}/")  # as for Ray's own job commands
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stays-here")
    submit = ("job", "submit", "digits-ipc1", "-o", str(tmp_path / "runs"), "-d", "-v", "-v")
    given = ("--env", "WANDB_API_KEY", "--env", f"MORE={SECRET}=1", "--env", "EMPTY=", "--runtime-env", str(file))
    printed = [datm_ray(*submit, *given), datm_ray("job", "list"), datm_ray("job", "list", "--json")]
    printed.append(datm_ray("job", "status", there.job["submission_id"]))
    assert [code for code, _, _ in printed] == [0, 0, 0, 0]
    assert SECRET not in str(printed)
    sent = there.job["runtime_env"]
    ours = {"RAY_JOB_STOP_WAIT_TIME_S": "75"}
    assert sent["env_vars"] == ours | {"MODE": "fast", "WANDB_API_KEY": SECRET, "MORE": f"{SECRET}=1", "EMPTY": ""}
    assert sent["pip"] in (["humanize"], {"packages": ["humanize"], "pip_check": False})
    assert sent["py_modules"][0] == "s3://bucket/mine.zip"
    assert len(sent["py_modules"]) == 2
    assert "stays-here" not in json.dumps(sent)
    assert SECRET not in there.job["entrypoint"] + json.dumps(there.job["metadata"])


def test_a_method_of_ones_own_travels_as_documented(
    datm_ray: CommandLine, there: dashboards.Dashboard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command of the page sends the folder with its method; a single file is refused and submits nothing."""
    recipe, environment, *_ = re.findall(r"```yaml\n(.*?)```", OWN, re.DOTALL)
    source, *_ = re.findall(r"```python\n(.*?)```", OWN, re.DOTALL)
    line = next(each for each in OWN.splitlines() if "job submit" in each)
    files = {"digits-dc.yaml": recipe, "env.yaml": environment, "my_methods/__init__.py": source, "one.py": ""}
    (tmp_path / "my_methods").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    _, _, *arguments = line.replace("s3://BUCKET/digits-dc", str(tmp_path / "runs")).split()
    submit = (*arguments, "-d", "--address", there.address)
    code, _, err = datm_ray(*submit)
    assert (code, "cannot be imported" in err) == (2, True)  # without PYTHONPATH, before anything is sent
    monkeypatch.syspath_prepend(str(tmp_path))
    assert datm_ray(*submit)[0] == 0
    inside = [zipfile.ZipFile(io.BytesIO(package)).namelist() for package in there.packages]
    assert any("my_methods/__init__.py" in names for names in inside)
    assert len(there.job["runtime_env"]["py_modules"]) == 2
    (tmp_path / "env.yaml").write_text(environment.replace("my_methods", "one.py"))
    there.status = "SUCCEEDED"
    there.asked.clear()
    code, _, err = datm_ray(*submit)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "one.py must be an existing directory" in err
    assert not [asked for asked in there.asked if asked.method == "POST"]
    sys.modules.pop("my_methods", None)


def test_an_environment_that_cannot_travel_is_one_line_without_values(
    datm_ray: CommandLine, there: dashboards.Dashboard, tmp_path: Path
) -> None:
    """A variable or runtime environment that cannot be used is refused in one line that holds no value."""
    file, text, both = tmp_path / "environment.yaml", tmp_path / "some.json", tmp_path / "requirements.txt"
    both.write_text("humanize\n")
    path = ("--runtime-env", str(file))
    cases: list[tuple[str, str, tuple[str, ...]]] = [
        ("--env ABSENT_HERE: this shell has no variable", "", ("--env", "ABSENT_HERE")),
        ("--env number 2 does not begin with the name", "", ("--env", "A=1", "--env", f"{SECRET}=x")),
        ("--env number 1 does not begin", "", ("--env", f"={SECRET}")),
        ("RAY_JOB_STOP_WAIT_TIME_S is set by you and by datm-ray", "", ("--env", "RAY_JOB_STOP_WAIT_TIME_S=1")),
        ("RAY_JOB_STOP_WAIT_TIME_S is set by you", "env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '1'}", path),
        ("A is set by .*yaml and by --env", f"env_vars: {{A: {SECRET}}}", (*path, "--env", f"A={SECRET}")),
        ("working_dir is set by .*yaml and by datm-ray", "working_dir: .", path),
        ("pip is set by .*yaml and by --requirements", "pip: [a]", (*path, "--requirements", str(both))),
        ("'pip' field, 'uv' field, and 'conda'", "conda: base", (*path, "--requirements", str(both))),
        ("the key 'env_var', which Ray would ignore. Known keys: conda", f"env_var: {{A: {SECRET}}}", path),
        ("env_vars needs text", f"env_vars: {{A: {SECRET}, B: 1}}", path),
        ("env_vars needs text", f"env_vars: [{SECRET}]", path),
        ("has no keys and values", SECRET, path),
        ("neither YAML nor JSON", f"a: [{SECRET}", path),
        ("some.json is neither", f"a: {SECRET}", ("--runtime-env", str(text))),
        ("a user name or password", f"pip: ['https://me:{SECRET}@host/x.whl']", path),
        ("Ray refuses .*yaml", "py_modules: [{a: 1}]", path),
        ("cannot read absent.yaml", "", ("--runtime-env", "absent.yaml")),
    ]
    submit = ("job", "submit", "digits-ipc1", "-o", str(tmp_path / "runs"), "-d", "--address", there.address)
    for expected, content, arguments in cases:
        file.write_text(content)
        text.write_text(content)
        code, out, err = datm_ray(*submit, *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), (expected, err)
        assert re.search(expected, err), (expected, err)
        assert SECRET not in err, expected
    assert not [asked for asked in there.asked if asked.method == "POST"]


def test_the_address_of_a_dashboard_in_rays_variables_is_taken(
    datm_ray: CommandLine, there: dashboards.Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job commands take the dashboard from RAY_ADDRESS, after Ray's own variable, and ignore an address for drivers."""
    monkeypatch.setenv("RAY_ADDRESS", there.address)
    assert datm_ray("job", "logs", "here")[0] == 0
    monkeypatch.setenv("RAY_ADDRESS", "http://")
    assert "RAY_ADDRESS 'http://' is not the address of a dashboard" in datm_ray("job", "list")[2]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr("datm_ray.cli.jobs.LOCAL_DASHBOARD", there.address)
    assert datm_ray("job", "logs", "here")[0] == 0
    monkeypatch.setattr("datm_ray.cli.jobs.LOCAL_DASHBOARD", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", there.address)
    assert datm_ray("job", "logs", "here")[0] == 0


def test_jobs_as_json(datm_ray: CommandLine, there: dashboards.Dashboard) -> None:
    """--json prints lists and states of jobs with the documented keys and nothing else."""
    (job,) = json.loads(datm_ray("job", "list", "--json", "--address", there.address)[1])
    assert set(job) == documented_keys("job list")
    status = json.loads(datm_ray("job", "status", "here", "--json", "--address", there.address)[1])
    assert set(status) == documented_keys("job status") | set(job)
    assert (status["id"], status["last"]) == ("here", "Experts: 2 tasks to run")
    there.log = ""
    assert "  last     Job is" in datm_ray("job", "status", "here", "--address", there.address)[1]


def test_a_slash_makes_no_other_folder(jobs: Jobs) -> None:
    """A job whose folder is in use is refused, with or without a final slash."""
    for out in ("s3://bucket/runs", "s3://bucket/runs/"):
        with pytest.raises(ClusterError, match=f"job here is running and writes to {out} already"):
            jobs._require_nobody_at_work(out)
    jobs._require_nobody_at_work("s3://bucket/runs2")


def test_requirements_travel_as_they_are_but_no_secret(tmp_path: Path) -> None:
    """Ray reads the lines of the file; one with a user name or password is refused without showing it."""
    file, lines = tmp_path / "requirements.txt", ["# packages", "numpy>=2", "name @ git+https://host/a/b@main"]
    file.write_text("\n".join(lines) + "\n")
    assert RuntimeEnv(**job_environment(str(file)))["pip"]["packages"] == lines
    file.write_text(f"numpy\n--index-url https://user:{SECRET}@host/simple\n")
    with pytest.raises(ConfigError, match="user name or password") as caught:
        job_environment(str(file))
    assert SECRET not in str(caught.value)


def test_relative_places_of_a_job_are_refused() -> None:
    """Relative paths are refused, because they would lie in the job's own folder, which is deleted."""
    from datm_ray.runtime.ray.jobs import _require_reachable

    _require_reachable("--out", "s3://bucket/runs")
    _require_reachable("--out", "/shared/runs")
    with pytest.raises(ConfigError, match=r"--out 'runs' is no absolute path.*s3://bucket/"):
        _require_reachable("--out", "runs")
    for fact, changes in {
        r"distill\.continue_from 'runs/short'": ["distill.continue_from=runs/short"],
        r"given\.path 'downloads/datm'": ["method=given", "given={path: downloads/datm}"],
        r"dataset\.path 'data/birds'": ["dataset.path=data/birds"],
    }.items():
        with pytest.raises(ConfigError, match=f"{fact} is no absolute path"):
            Jobs.__new__(Jobs).submit([tiny_config(*changes)], "s3://bucket/runs")


@pytest.mark.parametrize("path", ["/data/birds", "~/birds"])
def test_images_of_a_job_lie_on_the_head(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute path of images, or one in the home of the head's user, is accepted."""
    jobs = Jobs.__new__(Jobs)
    monkeypatch.setattr(jobs, "_require_nobody_at_work", lambda _: None)
    monkeypatch.setattr(jobs, "_submit", lambda **_: None)
    assert jobs.submit([tiny_config(f"dataset.path={path}")], "s3://bucket/runs")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", ""),
        ("\n  it fell over.\nTraceback", "it fell over"),
        (ValueError(), "ValueError"),
        (ValueError("\nno such thing.\n"), "no such thing"),
        ("x" * 300, "x" * 200),
    ],
)
def test_a_message_becomes_one_line(message: BaseException | str, expected: str) -> None:
    """A message becomes one line: empty stays empty, a silent error gives its kind."""
    from datm_ray.runtime.ray.cluster import first_line

    assert first_line(message) == expected


def test_a_jobs_message_is_a_line() -> None:
    """Ray's message of a job becomes a line if it is missing, empty, or has pip's reason at its end."""
    from datm_ray.runtime.ray.jobs import _job

    for message in (None, ""):
        details = JobDetails(type="SUBMISSION", submission_id="j", status="PENDING", entrypoint="", message=message)
        assert (_job(details).id, _job(details).message) == ("j", "")
    pip = "runtime_env setup failed: No.\nTraceback\n    ERROR: No version of a==9\n    ERROR: No a==9 at https://me:x@host\n"
    details = JobDetails(type="SUBMISSION", submission_id="j", status="FAILED", entrypoint="", message=pip)
    assert _job(details).message == "runtime_env setup failed: No (No a==9 at https://USER:PASSWORD@host)"


def test_no_message_about_a_job_has_a_value_of_its_environment() -> None:
    """Values that a command was given with --env are hidden in a job's message and in a refusal of Ray."""
    from datm_ray.runtime.ray.jobs import _message, _refusal

    logs.hide(["no-line-shows-this"])
    text = "cannot start with API=no-line-shows-this\nERROR: no index at no-line-shows-this"
    assert _message(text) == "cannot start with API=*** (no index at ***)"
    assert _refusal(RuntimeError(text)) == "cannot start with API=***"
