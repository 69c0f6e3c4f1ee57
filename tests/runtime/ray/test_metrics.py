"""Tests the export of metrics through Ray, without a cluster."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from ray.util.metrics import Counter, Gauge, Histogram

from datm_ray.monitor.metrics import CATALOGUE, Sample
from datm_ray.runtime.ray.metrics import RayMetrics


def test_every_metric_is_exported_as_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gauge is set, a counter increased, and a histogram observes each value, under the catalogue's name and tags."""
    exported = list[tuple[str, str, float, dict[str, str]]]()
    for kind, name in ((Gauge, "set"), (Counter, "inc"), (Histogram, "observe")):

        def export(metric: Gauge, value: float, tags: dict[str, str], kind: type = kind) -> None:
            exported.append((kind.__name__.lower(), metric.info["name"], value, tags))

        monkeypatch.setattr(kind, name, export)
    metrics = RayMetrics()
    metrics.close()
    samples = [Sample(name, 0.5, dict.fromkeys(metric.tags, "x")) for name, metric in CATALOGUE.items()]
    for _ in range(2):
        metrics._export(lambda: samples)
    expected = [(metric.kind, name, 0.5, dict.fromkeys(metric.tags, "x")) for name, metric in CATALOGUE.items()]
    assert exported == 2 * expected
    assert {metric.kind for metric in CATALOGUE.values()} == {"gauge", "counter", "histogram"}
