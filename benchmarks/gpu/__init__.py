"""What is measured on the day a GPU is there: one module for each question, run by `benchmarks/bench_gpu.py`.

Needs torch, numpy, pydantic and PyYAML, not Ray. Uses `config`, `recipes`, `core` and `methods` of
this package, and `runtime.mesh` and `data` where they can be imported.
"""

import sys
from pathlib import Path

# The copy beside these programs, installed or not.
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
