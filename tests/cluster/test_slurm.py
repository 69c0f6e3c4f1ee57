"""Tests cluster/slurm/run.sbatch with stand-ins for the commands of Slurm and Ray."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

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
echo "srun ${tasks:-$((nodes * per_node))} on $nodes $where: $*"
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": "#!/bin/sh\nprintf 'a1\\na2\\na3\\n' | head -n $SLURM_JOB_NUM_NODES\n",
    "ray": "#!/bin/sh\n",
    "datm-ray": '#!/bin/sh\necho "datm-ray $*"\n',
}


@pytest.mark.parametrize("nodes", [1, 3])
def test_every_node_gets_one_task(nodes: int, tmp_path: Path) -> None:
    """Ray starts once on the first node and once on each other node, whatever number of tasks sbatch has exported."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "a[1-3]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes),  # as sbatch exports it for --ntasks-per-node=1
    }
    done = subprocess.run([RUN, "x", "--out", "y"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    started = sorted(line for line in done.stdout.splitlines() if line.startswith("srun"))
    head = "srun 1 on 1 --nodelist=a1: ray start --head --port=6379 --block --disable-usage-stats"
    others = "srun 2 on 2 --exclude=a1: ray start --address=a1:6379 --block --disable-usage-stats"
    assert started == [head, others][: 1 if nodes == 1 else 2]
    assert "datm-ray run x --out y --address a1:6379" in done.stdout
