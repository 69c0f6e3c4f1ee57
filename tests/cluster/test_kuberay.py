"""Tests the KubeRay manifests by Ray's autoscaler and by rules of Kubernetes and KubeRay, without a cluster."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private import ray_constants

from datm_ray.config import ClusterConfig
from datm_ray.runtime.stopping import SAVE_TIMEOUT
from tests.cluster.files import CLUSTER, MANIFESTS, ROOT, commands, document, documents, shell_blocks

RAYCLUSTER, RAYJOB = (CLUSTER / "kuberay" / name for name in ("raycluster.yaml", "rayjob.yaml"))


@pytest.fixture
def spec() -> dict[str, Any]:
    """Specification of the cluster, which both manifests share."""
    return dict(document(RAYCLUSTER, "RayCluster")["spec"])


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of the head and of the workers."""
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_names_are_kubernetes_names(path: Path) -> None:
    """Documents, containers and ports have valid names; a cluster's name fits the operator's suffixes."""
    names = [each["metadata"]["name"] for each in documents(path)]
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", name) for name in names)


def test_both_have_the_same_cluster() -> None:
    """Both manifests specify the same cluster."""
    first, second = documents(RAYCLUSTER), documents(RAYJOB)
    assert first[0] == second[0]
    assert first[1]["spec"] == second[1]["spec"]["rayClusterSpec"]


def test_ray_s_autoscaler_reads_it(spec: dict[str, Any]) -> None:
    """Ray's autoscaler reads the manifest with its schema: a head without tasks, and GPU workers from none to many."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "y"}, "spec": spec})
    types = config["available_node_types"]
    assert set(types) == {"headgroup", "gpu"}
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert "GPU" not in types["headgroup"]["resources"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["resources"]["CPU"] >= 1
    assert (types["gpu"]["min_workers"], config["max_workers"]) == (0, 16)
    assert config["idle_timeout_minutes"] == 10


@pytest.mark.parametrize(("path", "kind"), [(RAYCLUSTER, "RayCluster"), (RAYJOB, "RayJob")])
def test_a_gpu_model_is_known_to_the_autoscaler_by_the_commented_line(path: Path, kind: str, tmp_path: Path) -> None:
    """With the commented line of a manifest, a pod holds a worker that asks for the GPU's model; without it, none."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    from datm_ray.runtime.ray.cluster import fitting

    changed = tmp_path / path.name
    changed.write_text(path.read_text().replace("# resources: '", "resources: '"))
    held = []
    for file in (path, changed):
        spec = document(file, kind)["spec"]
        made = {"metadata": {"name": "x", "namespace": "y"}, "spec": spec.get("rayClusterSpec", spec)}
        pod = _derive_autoscaling_config_from_ray_cr(made)["available_node_types"]["gpu"]["resources"]
        held.append(fitting(pod, ClusterConfig(gpus_per_worker=1.0, accelerator_type="A100")))
    assert held == [0, 1]


@pytest.mark.parametrize(("path", "number"), [(RAYCLUSTER, 2), (RAYJOB, 3)])
def test_a_registry_that_asks_for_a_password_needs_the_commented_lines(path: Path, number: int) -> None:
    """With the commented lines of a manifest, every pod has the secret of a registry."""
    assert "imagePullSecrets" not in str(documents(path))
    changed = pods(path.read_text().replace("# imagePullSecrets:", "imagePullSecrets:"))
    assert [each["imagePullSecrets"] for each in changed] == [[{"name": "registry"}]] * number


def pods(manifest: str) -> list[dict[str, Any]]:
    """Specifications of a manifest's pods: the head's, the workers' and, if there is one, the submitter's."""
    body = list(yaml.safe_load_all(manifest))[1]["spec"]
    templates = [group["template"] for group in groups(body.get("rayClusterSpec", body))]
    submitter = [body["submitterPodTemplate"]] if "submitterPodTemplate" in body else []
    return [each["spec"] for each in [*templates, *submitter]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_head_alone_has_a_token_of_kubernetes(path: Path) -> None:
    """The service account's token, with which the autoscaler makes pods, is in the head's pod only."""
    head, *others = pods(path.read_text())
    assert "automountServiceAccountToken" not in head
    assert {each.get("automountServiceAccountToken") for each in others} == {False}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_images_come_from_a_claim_by_the_commented_lines(path: Path) -> None:
    """With the commented lines, the head's container and the workers' read a volume claim of their pod."""
    text = path.read_text()
    assert not any("volumes" in pod for pod in pods(text))
    changed = text.replace("# volumes:", "volumes:").replace("# volumeMounts:", "volumeMounts:")
    for pod in pods(changed)[:2]:
        (volume,), (mount,) = pod["volumes"], pod["containers"][0]["volumeMounts"]
        assert (mount["name"], mount["mountPath"], mount["readOnly"]) == (volume["name"], "/data", True)
        assert volume["persistentVolumeClaim"] == {"claimName": "images", "readOnly": True}


def test_a_new_build_has_a_new_name(tmp_path: Path) -> None:
    """The README names the image by its commit, and its commands put that name at every place of a manifest."""
    (build,) = [text for text in shell_blocks(CLUSTER / "kuberay" / "README.md") if "docker build" in text]
    assert build.startswith('IMAGE="registry.example.com/me/datm-ray:$(git rev-parse --short HEAD)"\n')
    given = [line for text in shell_blocks(CLUSTER / "kuberay" / "README.md") for line in text.splitlines()]
    edits = [line.partition(" | kubectl apply")[0] for line in given if line.startswith("sed ")]
    assert [edit.rpartition("/")[2] for edit in edits] == ["rayjob.yaml", "raycluster.yaml"]
    for edit, manifest in zip(edits, (RAYJOB, RAYCLUSTER), strict=True):
        shell = ["sh", "-euc", f"IMAGE=registry/datm-ray:abc; {edit}"]
        changed = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        images = [each["image"] for pod in pods(changed) for each in pod["containers"]]
        assert images == ["registry/datm-ray:abc"] * manifest.read_text().count(" image: ")


def test_the_role_of_pods_is_one_that_pods_can_assume() -> None:
    """The role of the manifests' commented annotation is the README's, which trusts the service account alone."""
    account = document(RAYCLUSTER, "ServiceAccount")["metadata"]["name"]
    given = [words for text in shell_blocks(CLUSTER / "kuberay" / "README.md") for words in commands(text)]
    (made,) = [words for words in given if words[:3] == ["aws", "iam", "create-role"]]
    (trust,) = json.loads(made[made.index("--assume-role-policy-document") + 1])["Statement"]
    assert trust["Action"] == "sts:AssumeRoleWithWebIdentity"
    assert trust["Condition"]["StringEquals"]["OIDC:sub"] == f"system:serviceaccount:NAMESPACE:{account}"
    assert trust["Principal"]["Federated"].endswith(":oidc-provider/OIDC")
    for manifest in MANIFESTS:
        named = re.findall(r"role/(\S+)}$", manifest.read_text(), re.MULTILINE)
        assert named == [made[made.index("--role-name") + 1]]


def test_a_run_that_has_ended_is_deleted_before_it_is_made_again() -> None:
    """The README's command that makes a job follows one that deletes it, because the operator runs no job twice."""
    name = document(RAYJOB, "RayJob")["metadata"]["name"]
    given = [words for text in shell_blocks(CLUSTER / "kuberay" / "README.md") for words in commands(text)]
    (made,) = [place for place, words in enumerate(given) if words[0] == "sed" and words[-1].endswith("/rayjob.yaml")]
    assert given[made - 1][:4] == ["kubectl", "delete", f"rayjob/{name}", "--ignore-not-found"]
    assert given[made + 1][:2] == ["kubectl", "apply"]


def test_the_head_is_waited_for_before_its_port_is_forwarded() -> None:
    """The README's tunnel to a new cluster follows a command that waits for the head; a job waits for the tunnel."""
    name = document(RAYCLUSTER, "RayCluster")["metadata"]["name"]
    given = [words for text in shell_blocks(CLUSTER / "kuberay" / "README.md") for words in commands(text)]
    (forwarded,) = [place for place, words in enumerate(given) if words[:2] == ["kubectl", "port-forward"]]
    wait = given[forwarded - 1]
    assert wait[:2] == ["kubectl", "wait"]
    assert {"--for=condition=HeadPodReady", f"raycluster/{name}"} < set(wait)
    assert given[forwarded + 1][:2] == ["until", "curl"]


def test_ports_and_containers_are_named_as_kuberay_wants(spec: dict[str, Any]) -> None:
    """Ray's container is first, and the head's ports have the names that its service uses."""
    head, *workers = groups(spec)
    names = [group["template"]["spec"]["containers"][0]["name"] for group in (head, *workers)]
    assert names == ["ray-head", *["ray-worker"] * len(workers)]
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"gcs": 6379, "dashboard": 8265, "metrics": 8080}
    for group in groups(spec):
        named = {each["name"]: each["containerPort"] for each in group["template"]["spec"]["containers"][0]["ports"]}
        assert group["rayStartParams"]["metrics-export-port"] == str(named["metrics"])
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_workers_live_on_spot_and_the_head_does_not(spec: dict[str, Any]) -> None:
    """Workers prefer and tolerate every label of spot nodes that the head avoids."""
    head, worker = (group["template"]["spec"] for group in groups(spec))
    (term,) = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    avoided = {(each["key"], *each["values"]) for each in term["matchExpressions"] if each["operator"] == "NotIn"}
    preferences = worker["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    expressions = [each for one in preferences for each in one["preference"]["matchExpressions"]]
    assert {(each["key"], *each["values"]) for each in expressions if each["operator"] == "In"} == avoided
    assert len(avoided) == 4
    tolerated = {(each["key"], each.get("value")) for each in worker["tolerations"]}
    assert tolerated >= {("nvidia.com/gpu", None), *avoided} - {("eks.amazonaws.com/capacityType", "SPOT")}
    assert "tolerations" not in head


def test_nobody_gets_in_without_token_and_nothing_runs_as_root(spec: dict[str, Any]) -> None:
    """A token is required, no container runs as root, and the dashboard stays inside Kubernetes."""
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    job = document(RAYJOB, "RayJob")["spec"]
    templates = [each["template"]["spec"] for each in groups(spec)] + [job["submitterPodTemplate"]["spec"]]
    for pod in templates:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*(each for pod in templates for each in pod["containers"]), spec["autoscalerOptions"]]:
        restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == restricted, "Pod Security's `restricted` refuses it"


def test_the_operator_s_submitter_keeps_its_own_command() -> None:
    """The pod that submits a run has the head's image and no command, so that the operator gives its own."""
    spec = document(RAYJOB, "RayJob")["spec"]
    (container,) = spec["submitterPodTemplate"]["spec"]["containers"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert container["image"] == head["image"]
    assert not container.keys() & {"command", "args"}
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_bucket_s_keys_come_from_outside(path: Path) -> None:
    """Every pod gets the bucket's keys from its service account or an optional secret."""
    account, body = documents(path)
    for group in groups(body["spec"].get("rayClusterSpec", body["spec"])):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "datm-ray-s3", "optional": True}}]
        given = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert not [name for name in given if re.search("KEY|SECRET|TOKEN", name)]
        assert {f"AWS_METADATA_SERVICE_{name}" for name in ("NUM_ATTEMPTS", "TIMEOUT")} < given.keys()


def test_workers_save_before_their_pod_ends(spec: dict[str, Any]) -> None:
    """A worker's pod that is deleted leaves its workers the time to save, and no hook ends Ray before."""
    drains = []
    for group in groups(spec):
        pod = group["template"]["spec"]
        assert "lifecycle" not in pod["containers"][0]
        values = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        drains.append(float(values["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]))
        assert drains[-1] < pod.get("terminationGracePeriodSeconds", 30)  # Kubernetes' own
    head, *workers = drains
    assert head == 0
    assert min(workers) > SAVE_TIMEOUT
    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"), "Ray has another name for it"


def test_the_job_resumes_and_cleans_up() -> None:
    """After a lost head a new cluster runs the command again, on results in a bucket; at the end it is deleted."""
    spec = document(RAYJOB, "RayJob")["spec"]
    assert 1 <= spec["backoffLimit"] <= 2, "an error of the recipe is tried as often"
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] == "K8sJobMode"
    words = spec["entrypoint"].split()
    assert words[:2] == ["datm-ray", "run"]
    assert "--verbose" in words, "a bucket holds no log"
    assert words[words.index("--out") + 1].startswith("s3://")
    assert words[words.index("--address") + 1] == "auto"
    workers = int(re.search(r"cluster\.workers=(\d+)", spec["entrypoint"])[1])  # type: ignore[index]
    assert workers <= spec["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]


def test_pods_get_what_they_ask_for(spec: dict[str, Any]) -> None:
    """Limits of CPU and memory equal requests, only workers have GPUs, and all ask for some disk."""
    for group in groups(spec):
        container = group["template"]["spec"]["containers"][0]
        resources = container["resources"]
        assert resources["requests"] == {**resources["limits"], "ephemeral-storage": "20Gi"}
        wanted = {"cpu", "memory"} | (set() if group is spec["headGroupSpec"] else {"nvidia.com/gpu"})
        assert set(resources["limits"]) == wanted
    options = spec["autoscalerOptions"]["resources"]
    assert options["limits"] == options["requests"]


def test_scaling_is_on_and_within_bounds(spec: dict[str, Any]) -> None:
    """Autoscaling is switched on, and the numbers of workers are within its bounds."""
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in groups(spec):
        assert group["template"]["spec"]["restartPolicy"] == "Never", "v2 takes a pod for one node"
        assert group["template"]["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
