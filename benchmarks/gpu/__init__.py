"""What is measured on the day a GPU is there: one module for each question, run by `benchmarks/bench_gpu.py`.

Needs torch, numpy, pydantic and PyYAML, not Ray. Uses `config`, `recipes`, `core` and `methods` of
this package, and `runtime.mesh`, `data` and `stages` where they can be imported.
"""

import os
import sys
from pathlib import Path

# The package's copy beside these programs is imported, even if another one is installed.
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
# Torch reads it at the first product on a GPU, which comes long before the first check of deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
