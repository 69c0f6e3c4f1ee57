"""Execution of tasks: executors that start workers, sums over a task's workers, retries, heartbeats, stopping.

The serial executor is the reference. `runtime/ray/` is the only folder that imports Ray.
"""

import os

# Ray reads this variable when it is imported. Under `uv run` Ray would otherwise upload the working folder, with its
# data, to its workers. They need no upload, because they have this process's packages.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
