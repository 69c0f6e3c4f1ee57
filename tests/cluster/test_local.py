"""Tests cluster/local by starting and stopping a real cluster, beside others, on free ports."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, SCRIPTS

START, STOP = CLUSTER / "local" / "start.sh", CLUSTER / "local" / "stop.sh"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    """Scripts parse, are executable, and stop at the first error."""
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    """Shellcheck reports nothing on the scripts."""
    subprocess.run(["shellcheck", script], check=True)


def free_ports() -> list[int]:
    """Unused ports; the port after the first is unused too."""
    while True:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        if ports[0] + 1 not in ports and ports[0] < 65_000:
            return ports


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of the scripts: free ports, a token of this test, and this interpreter's tools."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard, metrics = map(str, free_ports())
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PORT": port,
        "DASHBOARD_PORT": dashboard,
        "METRICS_PORT": metrics,
    }
    yield environment
    subprocess.run([STOP], env=environment, check=True, capture_output=True, timeout=120)
    shutil.rmtree(f"/tmp/datm-ray-{os.getuid()}/{port}", ignore_errors=True)


def call(script: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    done = subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def status(address: str, token: str | None = None) -> int:
    """Status of an HTTP server's answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


RAY = """#!/bin/sh
if [ "$1" = get-auth-token ]; then
    mkdir -p "$HOME/.ray" && echo secret >"$HOME/.ray/auth_token"
else
    ulimit -n >"$HOME/files"
    trap 'kill $!; exit' TERM
    echo "Ray runtime started"
    sleep 60 &
    wait
fi
"""


@pytest.mark.parametrize("is_there", [False, True])
def test_only_its_user_reads_the_token(is_there: bool, environment: dict[str, str], tmp_path: Path) -> None:
    """A token that Ray makes for all to read, now or earlier, is its user's alone once the cluster starts."""
    (tmp_path / "ray").write_text(RAY)
    (tmp_path / "ray").chmod(0o755)
    folder = tmp_path / ".ray"
    if is_there:
        folder.mkdir(0o755)
        (folder / "auth_token").write_text("secret")
        (folder / "auth_token").chmod(0o644)
    ours = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{environment['PATH']}"}
    before = os.umask(0o022)
    try:
        code, _, err = call(START, environment | ours)
    finally:
        os.umask(before)
    assert (code, err) == (0, "")
    assert [each.stat().st_mode & 0o777 for each in (folder, folder / "auth_token")] == [0o700, 0o600]
    assert Path(f"/tmp/datm-ray-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    assert int((tmp_path / "files").read_text()) == min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_is_started_and_stopped(environment: dict[str, str]) -> None:
    """A started cluster answers on localhost to the token only, and has metrics; stopping leaves nothing."""
    code, out, err = call(START, environment, "--num-cpus", "1", "--object-store-memory", "100000000")
    assert code == 0, err
    port, dashboard, metrics = (environment[name] for name in ("PORT", "DASHBOARD_PORT", "METRICS_PORT"))
    assert f"http://127.0.0.1:{dashboard}" in out
    jobs = f"http://127.0.0.1:{dashboard}/api/jobs/"
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in out + err
    assert (status(jobs), status(jobs, "wrong"), status(jobs, token)) == (401, 403, 200)
    assert status(f"http://127.0.0.1:{metrics}/metrics", token) == 200
    with pytest.raises(OSError, match="refused"):  # another address of this machine
        socket.create_connection(("127.0.0.2", int(dashboard)), timeout=5)

    code, _, err = call(START, environment)
    assert code == 2
    assert f"A cluster runs on port {port} already" in err

    marked = f"/tmp/datm-ray-{os.getuid()}/{port}"
    assert of_cluster(marked)
    code, out, _ = call(STOP, environment)
    assert (code, f"The cluster on port {port} has stopped" in out) == (0, True)
    assert not of_cluster(marked)
    assert "No cluster" in call(STOP, environment)[1]


def of_cluster(folder: str) -> list[str]:
    """Processes whose command names a cluster's folder."""
    processes = subprocess.run(["ps", "-A", "-ww", "-o", "command="], capture_output=True, text=True, check=True).stdout
    return [line for line in processes.splitlines() if folder in line]


@pytest.mark.slow
@pytest.mark.ray
def test_a_port_in_use_is_one_line(environment: dict[str, str]) -> None:
    """A port in use is one line with the reason, and nothing of the cluster stays."""
    with socket.create_server(("127.0.0.1", int(environment["DASHBOARD_PORT"]))):
        code, out, err = call(START, environment, "--num-cpus", "1", "--object-store-memory", "100000000")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "Ray did not start" in err
    assert not of_cluster(f"/tmp/datm-ray-{os.getuid()}/{environment['PORT']}")


def test_another_process_of_that_number_is_left_alone(environment: dict[str, str]) -> None:
    """A process with a reused id is stopped only if its command names the cluster's folder."""
    folder = Path(f"/tmp/datm-ray-{os.getuid()}/{environment['PORT']}")
    folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as other:
        (folder / "pid").write_text(str(other.pid))
        code, out, _ = call(STOP, environment)
        assert (code, "No cluster" in out) == (0, True)
        assert other.poll() is None
        other.kill()
    assert not (folder / "pid").exists()


def test_no_ray_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    """A missing Ray is one line of error."""
    if (CLUSTER.parent / ".venv" / "bin" / "ray").exists():
        pytest.skip("the repository's own environment is found")
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("bash", "id", "dirname", "env"):
        (path / name).symlink_to(str(shutil.which(name)))
    code, out, err = call(START, {**environment, "PATH": str(path)})
    assert (code, out) == (2, "")
    assert err.startswith("There is no command ray")
