"""Tests cluster/slurm/run.sbatch with stand-ins for the commands of Slurm and Ray."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from datm_ray.runtime.stopping import SAVE_TIMEOUT
from tests.cluster.files import CLUSTER

RUN = CLUSTER / "slurm" / "run.sbatch"
# Number of tasks as srun finds it: --ntasks, else SLURM_NTASKS, else --nodes times --ntasks-per-node. If this is more
# than the nodes hold by --ntasks-per-node, srun ignores --ntasks-per-node.
SRUN = """#!/usr/bin/env bash
tasks=${SLURM_NTASKS:-} per_node=1 nodes=1
while [[ $1 == --* ]]; do
    case $1 in
        --ntasks=*) tasks=${1#*=} ;;
        --ntasks-per-node=*) per_node=${1#*=} ;;
        --nodes=*) nodes=${1#*=} ;;
    esac
    where="${where:-}$([[ $1 != --nodelist=* && $1 != --exclude=* ]] || echo "$1")"
    shift
done
did=$("$@")
echo "srun ${tasks:-$((nodes * per_node))} on $nodes $where: $did"
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": """#!/bin/sh
[ "$1" = requeue ] && echo "queued $2 again" || printf 'a1\\na2\\na3\\n' | head -n $SLURM_JOB_NUM_NODES
""",
    "getent": "#!/bin/sh\necho $ADDRESSES | tr ' ' '\\n'\n",
    "hostname": "#!/bin/sh\necho 10.0.0.9 172.17.0.1\n",
    "ray": """#!/bin/sh
[ "$1" = start ] && echo "ray $* for $RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S s, $(ulimit -n) files"
[ "$1" = status ] && echo asked >>"$HOME/asked" && [ $(wc -l <"$HOME/asked") -gt 1 ] && echo " 0.0/2.0 CPU"
[ "$1" = get-auth-token ] && mkdir -p "$HOME/.ray" && echo secret >"$HOME/.ray/auth_token"
exit 0
""",
    "datm-ray": """#!/usr/bin/env bash
echo "datm-ray $*"
trap 'echo saved; kill $!; exit 143' TERM
[[ -z ${WORKS:-} ]] || { sleep 60 & touch "$WORKS"; wait; }
""",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment of a batch job with stand-ins for its commands."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "ADDRESSES": "127.0.1.1 10.0.0.7",  # as where the file of hosts names this machine
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "a[1-3]",
        "SLURM_JOB_NUM_NODES": "1",
    }


@pytest.mark.parametrize("nodes", [1, 3])
def test_every_node_gets_one_task(nodes: int, environment: dict[str, str]) -> None:
    """Ray starts once on the first node and once on each other node, whatever number of tasks sbatch has exported."""
    # SLURM_NTASKS as sbatch exports it for --ntasks-per-node=1
    environment |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NTASKS": str(nodes)}
    done = subprocess.run([RUN, "x", "--out", "y"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    started = sorted(line for line in done.stdout.splitlines() if line.startswith("srun"))
    folder = f"/tmp/datm-ray-{os.getuid()}/4711"
    head = f"ray start --head --node-ip-address=10.0.0.7 --port=6379 --temp-dir={folder} --block --disable-usage-stats"
    other = "ray start --address=10.0.0.7:6379 --block --disable-usage-stats"
    limits = f"for 25 s, {min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])} files"
    expected = [f"srun 1 on 1 --nodelist=a1: {head} {limits}", f"srun 2 on 2 --exclude=a1: {other} {limits}"]
    assert started == expected[: 1 if nodes == 1 else 2]
    assert "datm-ray run --set cluster.wait_for_nodes=600 x --out y --address 10.0.0.7:6379" in done.stdout
    assert "again" not in done.stdout
    asked = Path(environment["HOME"], "asked").read_text().splitlines()
    assert len(asked) == 2, "a run starts once the head's node has joined"
    home = Path(folder).parent
    assert (home.stat().st_mode & 0o777, home.owner()) == (0o700, Path("/proc/self").owner())


def test_only_its_user_reads_the_token(environment: dict[str, str], tmp_path: Path) -> None:
    """The token of the cluster, which Ray makes for all to read, is its user's alone."""
    subprocess.run(["bash", "-c", f"umask 022; {RUN} x"], env=environment, capture_output=True, timeout=60, check=True)
    folder = tmp_path / ".ray"
    assert [each.stat().st_mode & 0o777 for each in (folder, folder / "auth_token")] == [0o700, 0o600]


@pytest.mark.parametrize(("found", "address"), [("", "10.0.0.9"), ("127.0.1.1", "10.0.0.9"), ("10.1.1.1", "10.1.1.1")])
def test_the_head_has_an_address_that_others_reach(found: str, address: str, environment: dict[str, str]) -> None:
    """A name that leads to this machine itself, or nowhere, is replaced by an address of the machine."""
    done = subprocess.run(
        [RUN, "x"], env=environment | {"ADDRESSES": found}, capture_output=True, text=True, timeout=60, check=True
    )
    assert f"--node-ip-address={address} " in done.stdout
    assert f"--address {address}:6379" in done.stdout


@pytest.mark.parametrize(("signal_", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_job_at_its_time_limit_saves_and_is_queued_again(
    signal_: signal.Signals, again: bool, environment: dict[str, str], tmp_path: Path
) -> None:
    """Before the time limit a run saves and is queued again; one that is cancelled or preempted only saves."""
    works = tmp_path / "works"
    environment |= {"WORKS": str(works)}
    with subprocess.Popen([RUN, "x"], env=environment, stdout=PIPE, stderr=PIPE, text=True) as job:
        while not works.exists():
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal_)
        out, err = job.communicate(timeout=120)
    assert (job.returncode, err) == (143, "")
    assert out.splitlines().count("saved") == 1
    assert ("queued 4711 again" in out) == again


def test_slurm_is_asked_for_what_the_script_needs() -> None:
    """Slurm warns the script before the limit, may queue the job again, and keeps the log of the times before."""
    options = {line.removeprefix("#SBATCH ") for line in RUN.read_text().splitlines() if line.startswith("#SBATCH")}
    (warning,) = [each for each in options if each.startswith("--signal=B:USR1@")]
    assert int(warning.rpartition("@")[2]) > 2 * SAVE_TIMEOUT, "Slurm may send it a minute late"
    assert {"--requeue", "--open-mode=append"} < options
