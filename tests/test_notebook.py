"""Tests that the example notebook runs as it stands, in order, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first-set.ipynb"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_notebook_runs_and_its_network_learns_from_ten_images(tmp_path: Path) -> None:
    """The notebook's cells run, and a network trained on its ten images beats chance by far."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(NOTEBOOK.parents[1])}
    command = [sys.executable, "-W", "ignore:FigureCanvasAgg", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert float(last.split()[0]) > 70, last
    assert (tmp_path / "runs/notebook/report.html").exists()
