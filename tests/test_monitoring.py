"""Tests cluster/monitoring: the dashboard queries exported metrics only, and the checker finds missing data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from datm_ray.monitor.metrics import CATALOGUE
from tests.cluster.files import document, shell_blocks

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "cluster" / "monitoring"
CHECK = MONITORING / "check.py"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/datm-ray.json").read_text())

RAYS_OWN = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_object_store_used_memory",
    "ray_object_store_available_memory",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
    "ray_cluster_active_nodes",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_gram_available",
}
"""Metrics that Ray 2.60 exports; names of GPU metrics are from its own Grafana dashboard."""

CONDITIONAL = {"Test accuracy", "Losses", "Meta-feature ratio", "Retries", "Workers lost", "Meshes rebuilt"}
CONDITIONAL |= {"Tasks given to other workers", "GPU", "GPU memory"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics in a query, without matchers, durations, labels, functions and numbers."""
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|on|ignoring) *\([^)]*\)", " ", expression)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?! *\()", rest))


def catalogued(name: str) -> str:
    """Name in the catalogue of a metric that Prometheus knows by this one."""
    ours = name.removeprefix("ray_")
    return ours.removesuffix("_bucket") if ours.endswith("_seconds_bucket") else ours


def test_names_are_found_in_queries() -> None:
    """Metrics are found in queries; functions, labels, matchers and durations are not taken for them."""
    assert metrics_of('sum by (le, run) (rate(a_b_bucket{run=~"$run"}[$__rate_interval])) / (c:d > 0)') == {
        "a_b_bucket",
        "c:d",
    }


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_query_asks_for_what_is_exported(expression: str) -> None:
    """Every query uses exported metrics, ours or Ray's, and groups by labels that they have."""
    names = metrics_of(expression)
    assert names
    unknown = {name for name in names - RAYS_OWN if catalogued(name) not in CATALOGUE}
    assert unknown == set()
    for labels in re.findall(r"by \(([^)]*)\)", expression):
        for name in names - RAYS_OWN:
            assert set(labels.split(", ")) - {"le"} <= set(CATALOGUE[catalogued(name)].tags)


def test_everything_that_is_exported_is_shown() -> None:
    """Every exported metric is shown in a panel."""
    shown = {catalogued(name) for expression in expressions() for name in metrics_of(expression)}
    assert set(CATALOGUE) - shown == set()


def test_legends_name_labels_that_there_are() -> None:
    """Legends name labels that their query returns."""
    for panel in panels():
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                names = metrics_of(target["expr"]) - RAYS_OWN
                assert all(label in CATALOGUE[catalogued(name)].tags for name in names), target["expr"]
                if grouped := re.search(r"by \(([^)]*)\)", target["expr"]):
                    assert label in grouped[1].split(", ")


def test_panels_do_not_overlap() -> None:
    """Panels have distinct places and numbers."""
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_everything_is_bound_to_this_machine() -> None:
    """The README's commands, and Grafana's address of Prometheus, bind to this machine."""
    readme = (MONITORING / "README.md").read_text()
    assert "--web.listen-address=127.0.0.1:9090" in readme
    assert "GF_SERVER_HTTP_ADDR=127.0.0.1" in readme
    assert {"DATA", "LOGS", "PLUGINS"} == set(re.findall(r"GF_PATHS_(\w+)=/tmp/", readme)), "a user cannot write there"
    assert "0.0.0.0" not in readme
    sources = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert [source["url"] for source in sources["datasources"]] == ["http://127.0.0.1:9090"]


def test_prometheus_looks_where_ray_writes() -> None:
    """Prometheus reads Ray's file of targets in Ray's default folder, and in that of cluster/local's first cluster."""
    constants = pytest.importorskip("ray._private.ray_constants")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    folders = ["/tmp/ray", "/tmp/datm-ray-1000/6379"]
    start = (MONITORING.parent / "local" / "start.sh").read_text()
    assert "home=/tmp/datm-ray-$(id -u)" in start
    assert "folder=$home/$port" in start
    file = constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
    assert job["file_sd_configs"][0]["files"] == [f"{folder}/{file}" for folder in folders]
    lines = [line for text in shell_blocks(MONITORING / "README.md") for line in text.splitlines()]
    edits = [line for line in lines if line.startswith("sed ")]
    for edit, folder in zip(edits, (f"{os.getuid()}/6379", f"{os.getuid()}/JOB"), strict=True):
        shell = ["sh", "-euc", edit.partition(" >")[0]]
        made = yaml.safe_load(subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        assert made["scrape_configs"][0]["file_sd_configs"][0]["files"][1] == f"/tmp/datm-ray-{folder}/{file}"
        assert made["rule_files"] == [str(MONITORING / "alerts.yml")]


def test_every_place_has_its_way_to_watch() -> None:
    """The README covers every place of cluster/, and on Kubernetes names a port that all pods have."""
    readme = (MONITORING / "README.md").read_text()
    places = {path.name for path in MONITORING.parent.iterdir() if (path / "README.md").exists()} - {"monitoring"}
    covered = {"local": "one machine", "slurm": "Slurm job", "aws": "## On AWS", "kuberay": "## On Kubernetes"}
    assert places == covered.keys()
    assert all(words in readme for words in covered.values())
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    monitor = yaml.safe_load(shown)["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert monitor["podTargetLabels"] == ["ray.io/cluster"], "two clusters would be one"
    spec = document(MONITORING.parent / "kuberay" / "raycluster.yaml", "RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert endpoint["port"] in [port["name"] for port in ports]


def test_alerts_ask_for_what_is_exported() -> None:
    """Every alert asks for metrics and labels that exist, says what to check, and is loaded."""
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    assert len(group["rules"]) == 3
    for rule in group["rules"]:
        names = {name.removeprefix("ray_") for name in metrics_of(rule["expr"])}
        assert names <= CATALOGUE.keys()
        assert rule["labels"] == {"severity": "warning"}
        labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        asked = {label for found in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in found.split(", ")}
        assert labels <= asked <= {tag for name in names for tag in CATALOGUE[name].tags}
        assert all(asked <= set(CATALOGUE[name].tags) for name in names)
    assert yaml.safe_load((MONITORING / "prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_prometheus_accepts_its_configuration() -> None:
    """Prometheus's own tool accepts the configuration."""
    subprocess.run(["promtool", "check", "config", str(MONITORING / "prometheus.yml")], check=True, capture_output=True)


@contextmanager
def prometheus(values: Callable[[str], list[str]]) -> Iterator[str]:
    """An HTTP server that answers as Prometheus; `values` gives the values of a query's one series, or none."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            asked = {name: given[0] for name, given in parse_qs(url.query).items()}
            if url.path.endswith("/values"):
                data: Any = ["a run"]
            else:
                found = values(asked["query"])
                data = {"result": [{"metric": {}, "values": [[0, value] for value in found]}] if found else []}
            self.send_response(400 if "refused" in asked.get("query", "") else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "success", "data": data}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def check(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CHECK), address, *arguments], capture_output=True, text=True)


def test_the_checker_is_content_where_every_query_returns_data() -> None:
    """The checker fills in all variables, and prints every query with its series."""
    asked: list[str] = []
    with prometheus(lambda query: asked.append(query) or ["1"]) as address:
        checked = check(address)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert len(asked) == len(expressions())
    assert not [query for query in asked if "$" in query]
    rows = [line for line in checked.stdout.splitlines() if line.startswith("| ") and line.endswith("| 1 |")]
    assert len(rows) == len(expressions()) + 1


@pytest.mark.parametrize("nothing", [[], ["NaN", "NaN"]])
@pytest.mark.parametrize(
    ("missing", "arguments", "code"),
    [
        ("ray_datm_ray_distill_matching_loss", (), 1),
        ("ray_datm_ray_workers_lost_total", (), 0),
        ("ray_datm_ray_workers_lost_total", ("--with", "Workers lost"), 1),
        ("ray_datm_ray_workers_lost_total", ("--with", "Losses"), 0),
    ],
)
def test_the_checker_notices_what_is_missing(
    missing: str, arguments: tuple[str, ...], code: int, nothing: list[str]
) -> None:
    """A query without data, or with values that are no numbers, is an error in a required panel."""
    with prometheus(lambda query: nothing if missing in query else ["NaN", "2"]) as address:
        checked = check(address, *arguments)
    assert checked.returncode == code
    empty = [line for line in checked.stdout.splitlines() if line.endswith("| 0 |")]
    assert len(empty) == 1
    assert missing in empty[0]


def test_the_checker_says_in_one_line_what_it_cannot_ask(tmp_path: Path) -> None:
    """A silent server, a refused query or an unknown panel is one line of error."""
    refused = json.loads(json.dumps(DASHBOARD))
    refused["panels"][1]["targets"][0]["expr"] = "refused("
    (tmp_path / "refused.json").write_text(json.dumps(refused))
    with prometheus(lambda query: ["1"]) as address:
        cases = [
            (check("http://127.0.0.1:9"), "No Prometheus answers at http://127.0.0.1:9"),
            (check(address, "--dashboard", str(tmp_path / "refused.json")), "Prometheus refuses"),
            (check(address, "--with", "Horoscope"), "No panel is called Horoscope"),
        ]
    for checked, words in cases:
        assert checked.returncode == 1
        assert checked.stderr.startswith(words)
        assert checked.stderr.count("\n") == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
def test_every_query_returns_data_from_a_live_run(tmp_path: Path) -> None:
    """Every query returns data from a run with MetaDD in two shards, two killed actors and a real Prometheus."""
    command = [sys.executable, str(ROOT / "benchmarks/show_monitoring.py"), "--out", str(tmp_path / "report.md")]
    shown = subprocess.run([*command, "--seconds", "2"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    report = (tmp_path / "report.md").read_text()
    assert "queries return data" in report
    lost = [line for line in report.splitlines() if line.startswith("| Faults | Workers lost")]
    assert len(lost) == 1
    assert int(lost[0].rstrip(" |").rpartition(" ")[2]) >= 2
