"""Tests cluster/aws by Ray's schema and by Ray's AWS code in a simulated EC2, without cloud and network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    for remote, local in mounts.items():
        assert (ROOT / local).exists()
        assert remote == f"/home/ray/src/{local}"
    copied = re.findall(r"^COPY --chown=\S+ (.*) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert sorted(mounts.values()) == sorted(source for line in copied for source in line.split())
    copy, install = configuration()["setup_commands"]
    source, target = copy.split()[-2:]
    assert source == "/home/ray/src"
    assert install.endswith(f" {target}")


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
