"""What is measured on the day a GPU is there: one module for each question, run by `benchmarks/bench_gpu.py`.

Needs torch and numpy. Of this package's own modules it uses `core`, and where they can be imported `runtime.mesh` and
`data`; so neither Ray nor pydantic has to be installed.
"""

import sys
from pathlib import Path

# The copy beside these programs, installed or not.
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
