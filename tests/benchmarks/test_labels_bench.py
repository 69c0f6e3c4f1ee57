"""Tests the benchmark of labels: every way plays back what was written, and has a row."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch

BENCH = "bench_labels"


def test_every_way_plays_back_the_labels(bench: ModuleType, tmp_path: Path) -> None:
    """All ways give the logits of every image in every epoch, up to what they keep, and as many views."""
    labels = bench.Labels(bench.Sizes(images=22, classes=20, side=8, epochs=2, batch=8))
    for number, way in enumerate(bench.ways(labels, 19)):
        place = tmp_path / str(number)
        way.write(place)
        played = list(way.read(place))
        rows = np.concatenate([views.rows for views, _ in played])
        logits = torch.cat([logits for _, logits in played])
        for epoch in range(2):
            own = slice(22 * epoch, 22 * epoch + 22)
            assert sorted(rows[own]) == list(range(22))
            expected = labels.logits[epoch][torch.from_numpy(rows[own])]
            torch.testing.assert_close(logits[own], expected, rtol=1e-3, atol=1e-3)
        bench.measure(way, labels, tmp_path)
        name, size, *speeds = bench.cells(way, labels.sizes.labels)
        assert len([name, size, *speeds]) == len(bench.COLUMNS)
        assert float(size) > 60
