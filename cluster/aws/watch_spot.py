"""Tell Ray that AWS is about to take this spot machine back, so that its workers save and others resume their work.

    python watch_spot.py HEAD:PORT

cluster.yaml starts it on every worker. Plain Python. AWS announces the end two minutes before, in the machine's
metadata, and nothing of Ray reads it. METADATA_URL names another metadata service, EVERY the seconds between requests.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
import urllib.request
from datetime import datetime, timezone
from typing import Any

METADATA = os.environ.get("METADATA_URL", "http://169.254.169.254")
EVERY = float(os.environ.get("EVERY", "5"))
NOTICE = 120
"""Seconds between AWS's notice and the end of the machine."""


def metadata(path: str, method: str = "GET", **headers: str) -> str:
    """Answer of the metadata service. All requests need a token of this service, except the request for the token."""
    named = {f"X-aws-ec2-metadata-{name.replace('_', '-')}": value for name, value in headers.items()}
    request = urllib.request.Request(f"{METADATA}/latest/{path}", method=method, headers=named)
    with urllib.request.urlopen(request, timeout=2) as answer:
        return str(answer.read().decode())


def notice() -> dict[str, Any] | None:
    """AWS's notice that this machine ends soon; `None` if there is none, or if the service does not answer."""
    try:
        token = metadata("api/token", "PUT", token_ttl_seconds="60")
        found = json.loads(metadata("meta-data/spot/instance-action", token=token))
    except (OSError, ValueError):  # 404 without a notice
        return None
    return found if isinstance(found, dict) else None


def seconds_left(found: dict[str, Any]) -> int:
    """Seconds until the time in a notice, at least 1; about two minutes if it names none."""
    try:
        end = datetime.strptime(found["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except (KeyError, TypeError, ValueError):
        return NOTICE - 10
    return max(1, int((end - datetime.now(timezone.utc)).total_seconds()))


def drain(address: str, seconds: int) -> bool:
    """Have Ray mark this machine's node as one that ends in `seconds` seconds. Returns False if that failed.

    The command is a hidden one of Ray's. Without --node-id it takes this machine's node of the cluster in RAY_ADDRESS.
    """
    command = ["ray", "drain-node", f"--address={address}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message=AWS takes this spot machine back", f"--deadline-remaining-seconds={seconds}"]
    return subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}, check=False).returncode == 0


def main() -> int:
    """Wait for a notice, and pass it on. One process of this machine does so, however often Ray is started."""
    (address,) = sys.argv[1:]
    with open(f"/tmp/watch_spot-{os.getuid()}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0
        while not (found := notice()):
            time.sleep(EVERY)
        print(f"AWS: {found}", flush=True)
        while not drain(address, seconds_left(found)):
            time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
