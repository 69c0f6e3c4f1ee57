"""Doing the work: workers for each stage, executors that place them, progress.

Workers are plain classes that know nothing of Ray; only the modules named `ray_...` import it.
"""

import os

# Ray reads it when it is imported. Under `uv run` it would pack the working folder, data and all, for its workers,
# which have this process's packages anyway.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
