"""GPUs and CPUs that Ray has assigned to this process."""

from __future__ import annotations

from collections.abc import Sequence

gpus: Sequence[str] = ()
"""Ray's identifiers of the GPUs of this process's worker. Empty without GPUs, in a driver, and without Ray. A worker
without such a GPU may compute on the CPU, others must not."""

cpus: int | None = None
"""Share of the node's CPUs that goes with these GPUs: 12 for one of 8 GPUs on a node with 96 CPUs. 0 for a worker
without GPUs. `None` in a driver, and without Ray."""
