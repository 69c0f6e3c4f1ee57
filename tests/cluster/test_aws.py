"""Tests cluster/aws by Ray's schema and by Ray's AWS code in a simulated EC2, without cloud and network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from copy import deepcopy
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from datm_ray.cli import app  # noqa: F401  (its warnings come before those of Ray's autoscaler)
from tests.cluster.files import CLUSTER, ROOT, document

AWS = CLUSTER / "aws"
WORKERS = ["gpu-l4", "gpu-a10g", "gpu-a100"]
TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def configuration() -> dict[str, Any]:
    """The configuration as it is in the file."""
    return dict(yaml.safe_load((AWS / "cluster.yaml").read_text()))


@pytest.fixture
def prepared() -> dict[str, Any]:
    """The configuration with Ray's defaults, as `ray up` has it."""
    from ray.autoscaler._private.util import prepare_config

    return dict(prepare_config(configuration()))


def test_it_satisfies_ray_s_schema(prepared: dict[str, Any]) -> None:
    """The configuration passes the schema check with which `ray up` starts."""
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


@pytest.mark.parametrize(
    "broken",
    [
        {"max_wokers": 3},
        {"idle_timeout_minutes": "ten"},
        {"head_node_type": "haed"},
        {"docker": {"image": "x", "container": "y"}},
    ],
)
def test_the_schema_notices(broken: dict[str, Any], prepared: dict[str, Any]) -> None:
    """The schema check refuses misspelt and mistyped configurations."""
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepared | broken)


def test_machines_have_identities_of_their_own() -> None:
    """Machines have instance profiles instead of keys, and require tokens for their metadata."""
    for name, node in configuration()["available_node_types"].items():
        identity = "datm-ray-head" if name == "head" else "datm-ray-worker"
        assert node["node_config"]["IamInstanceProfile"] == {"Name": identity}
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


def test_package_is_copied_and_installed(prepared: dict[str, Any]) -> None:
    """Everything needed to build on the machines is copied from the repository."""
    mounts = {remote: local for remote, local in prepared["file_mounts"].items() if not local.startswith("~")}
    assert all((ROOT / local).exists() for local in mounts.values())
    watcher, versions = (mounts.pop(f"/home/ray/{name}") for name in ("watch_spot.py", "constraints.txt"))
    assert (watcher, versions) == ("cluster/aws/watch_spot.py", "cluster/aws/constraints.txt")
    assert all(remote == f"/home/ray/src/{local}" for remote, local in mounts.items())
    copied = re.findall(r"^COPY --chown=\S+ (.*) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert sorted([*mounts.values(), versions]) == sorted(source for line in copied for source in line.split())
    copy, install = configuration()["setup_commands"]
    source, target = copy.split()[-2:]
    assert source == "/home/ray/src"
    assert install.endswith(f" {target}")
    assert "-c /home/ray/constraints.txt" in install


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml")
def test_workers_install_the_same_versions_whenever_they_start() -> None:
    """Every package that is installed directly has one version, which the package accepts; Ray's is in the command."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(each) for each in project["dependencies"]]
    lines = (AWS / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for each in asked:
        if each.name not in ("ray", "setuptools"):  # the latter computes nothing
            assert each.specifier.contains(pinned[each.name]), each.name
    assert {"boto3", "botocore", "aiobotocore"} < pinned.keys()


class Metadata(BaseHTTPRequestHandler):
    """A machine's metadata service: a notice at the third request, for those with a token."""

    looks = 0

    def do_PUT(self) -> None:
        self.answer(b"a token" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else None)

    def do_GET(self) -> None:
        Metadata.looks += 1
        allowed = self.headers["X-aws-ec2-metadata-token"] == "a token"
        there = self.path == "/latest/meta-data/spot/instance-action" and Metadata.looks > 2
        end = (datetime.now(timezone.utc) + timedelta(seconds=119)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.answer(json.dumps({"action": "terminate", "time": end}).encode() if allowed and there else None)

    def answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def test_the_notice_of_a_spot_machine_reaches_ray(tmp_path: Path) -> None:
    """The watcher asks until there is a notice, and has Ray drain this machine's node until Ray accepts it."""
    calls = tmp_path / "calls"
    ray = tmp_path / "ray"
    ray.write_text(f"#!/bin/sh\necho $RAY_ADDRESS $* >> {calls}\n[ $(wc -l < {calls}) -eq 2 ]\n")
    ray.chmod(0o755)
    Metadata.looks = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"METADATA_URL": f"http://127.0.0.1:{server.server_port}", "EVERY": "0.05"}
        environment = {**os.environ, **where, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        watcher = [sys.executable, AWS / "watch_spot.py", "10.0.0.1:6379"]
        done = subprocess.run(watcher, env=environment, capture_output=True, text=True, timeout=60, check=True)
        server.shutdown()
    assert done.stdout.startswith("AWS: {'action': 'terminate'")
    assert Metadata.looks == 3
    address, command, *options = calls.read_text().splitlines()[1].split(maxsplit=2)
    assert (address, command) == ("10.0.0.1:6379", "drain-node")
    assert len(calls.read_text().splitlines()) == 2, "Ray was asked again after it had refused once"
    seconds = re.search(r"--deadline-remaining-seconds=(\d+)", options[0])
    assert seconds is not None
    assert 60 < int(seconds[1]) < 120


def test_ray_has_the_hidden_command_of_the_watcher() -> None:
    """Ray's hidden command to drain a node takes the watcher's options."""
    from ray.scripts.scripts import drain_node

    text = (AWS / "watch_spot.py").read_text()
    options = {name: each for each in drain_node.params for name in each.opts}
    given = set(re.findall(r'"(--[a-z-]+)=', text))
    assert len(given) == 4
    assert given <= options.keys()
    (reason,) = re.findall(r"--reason=(\w+)", text)
    assert reason in options["--reason"].type.choices


def test_every_worker_watches() -> None:
    """Workers start the watcher before Ray, in the background, with the head's address."""
    _, watch, start = configuration()["worker_start_ray_commands"]
    assert "/home/ray/watch_spot.py $RAY_HEAD_IP:6379" in watch
    assert watch.startswith("nohup ")
    assert watch.endswith("</dev/null &")
    assert "--address=$RAY_HEAD_IP:6379" in start
    options = " ".join(configuration()["docker"]["run_options"])
    assert "AWS_METADATA_SERVICE_NUM_ATTEMPTS=5" in options
    assert "AWS_METADATA_SERVICE_TIMEOUT=5" in options


def test_nobody_gets_in_without_token(prepared: dict[str, Any]) -> None:
    """The token is copied to where every container reads it; the dashboard listens on the head alone."""
    options = " ".join(prepared["docker"]["run_options"])
    assert "--env RAY_AUTH_MODE=token" in options
    where = re.search(r"--env RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert where is not None
    assert prepared["file_mounts"][where[1]] == "~/.ray/auth_token"
    start = prepared["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert all("--metrics-export-port=8080" in prepared[f"{who}_start_ray_commands"][-1] for who in ("head", "worker"))


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A simulated AWS account with the identities of the README in it."""
    (tmp_path / ".ssh").mkdir()
    for name, value in {
        "HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": configuration()["provider"]["region"],
    }.items():
        monkeypatch.setenv(name, value)
    from moto import mock_aws

    with mock_aws():
        import boto3

        iam = boto3.client("iam")
        for who in ("head", "worker"):
            role = f"datm-ray-{who}"
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=json.dumps(TRUST))
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
            # The simulated IAM checks the policy's grammar.
            iam.put_role_policy(RoleName=role, PolicyName=who, PolicyDocument=(AWS / f"{who}-policy.json").read_text())
        yield boto3.client("ec2")


@pytest.mark.slow
def test_ray_launches_it(ec2: Any, prepared: dict[str, Any]) -> None:
    """Ray's AWS code opens SSH alone, and starts the head on demand and the workers on spot."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(prepared)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    types = config["available_node_types"]
    for name in types:
        tags = {"ray-node-type": "head" if name == "head" else "worker", "ray-user-node-type": name}
        provider.create_node(types[name]["node_config"], tags, 1)
    machines = [each for group in ec2.describe_instances()["Reservations"] for each in group["Instances"]]
    started = {
        each["InstanceType"]: (each.get("InstanceLifecycle"), each["IamInstanceProfile"]["Arn"].rpartition("/")[2])
        for each in machines
    }
    assert started == {
        "m6i.2xlarge": (None, "datm-ray-head"),
        "g6.2xlarge": ("spot", "datm-ray-worker"),
        "g5.2xlarge": ("spot", "datm-ray-worker"),
        "p4d.24xlarge": ("spot", "datm-ray-worker"),
    }
    for tag in [each["Tags"] for each in machines]:
        assert {"Key": "ray-cluster-name", "Value": "datm-ray"} in tag, "the head may end what has this tag"
    used = {group["GroupId"] for each in machines for group in each["SecurityGroups"]}
    rules = ec2.describe_security_groups(GroupIds=sorted(used))["SecurityGroups"]
    open_to_all = [rule for group in rules for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in open_to_all] == [(22, 22)]


@pytest.mark.slow
def test_machines_have_what_the_file_says(ec2: Any) -> None:
    """CPUs and GPUs given to the scheduler are those of each instance type."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    configured = configuration()
    without = deepcopy(configured)
    for node in without["available_node_types"].values():
        node["resources"] = {}
    found = AWSNodeProvider.fillout_available_node_types_resources(without)["available_node_types"]
    for name in WORKERS:
        resources = configured["available_node_types"][name]["resources"]
        assert resources == {resource: found[name]["resources"][resource] for resource in resources}


def test_the_head_may_do_what_it_must_and_workers_nothing_to_machines() -> None:
    """The head may pass on the workers' identity only and end this cluster's machines only."""
    head, worker = (json.loads((AWS / f"{who}-policy.json").read_text())["Statement"] for who in ("head", "worker"))
    assert all(action.startswith("s3:") for each in worker for action in each["Action"])
    for each in head:  # a tag that the head could set on any machine would make it the head's
        if "ec2:CreateTags" in each["Action"]:
            (condition,) = each["Condition"]["StringEquals"].items()
            assert condition in {
                ("ec2:CreateAction", "RunInstances"),
                ("aws:ResourceTag/ray-cluster-name", configuration()["cluster_name"]),
            }
    (started,) = [each for each in head if each["Sid"] == "Workers"]
    types = configuration()["available_node_types"]
    allowed = started["Condition"]["StringEquals"]["ec2:InstanceType"]
    assert allowed == [types[name]["node_config"]["InstanceType"] for name in WORKERS]
    (rest,) = [each for each in head if each["Action"] == "ec2:RunInstances" and each is not started]
    assert rest["NotResource"] == started["Resource"]
    by_action = {
        action: each
        for each in head
        for action in ([each["Action"]] if isinstance(each["Action"], str) else each["Action"])
    }
    assert by_action["iam:PassRole"]["Resource"].endswith(":role/datm-ray-worker")
    tag = by_action["ec2:TerminateInstances"]["Condition"]["StringEquals"]
    assert tag == {"aws:ResourceTag/ray-cluster-name": configuration()["cluster_name"]}
    image = configuration()["available_node_types"]["head"]["node_config"]["ImageId"]
    parameter = by_action["ssm:GetParameters"]["Resource"].partition(":parameter")[2]
    assert image.startswith("resolve:ssm:" + parameter.rstrip("*"))


@pytest.mark.parametrize("place", ["aws", "kuberay"])
def test_the_guides_say_how_machines_are_asked_for(place: str) -> None:
    """Nothing but waiting actors asks for machines, which end after the idle time that the guides name."""
    assert not [path for path in (ROOT / "datm_ray").rglob("*.py") if "request_resources" in path.read_text()]
    about = " ".join((CLUSTER / place / "README.md").read_text().split())
    assert "start for workers that wait" in about
    pods = document(CLUSTER / "kuberay" / "raycluster.yaml", "RayCluster")["spec"]["autoscalerOptions"]
    assert configuration()["idle_timeout_minutes"] == pods["idleTimeoutSeconds"] / 60 == 10
    assert "end when they have been idle for ten minutes" in about
