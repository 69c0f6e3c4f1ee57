"""GPUs and CPUs that Ray has assigned to this process."""

from __future__ import annotations

from collections.abc import Sequence

gpus: Sequence[str] = ()
"""Ray's identifiers of the GPUs of this process's worker; empty without GPUs, in a driver, and without Ray. A worker to
which Ray gave a GPU must not compute on the CPU unless `cluster.device` is "cpu"."""

share: float = 1.0
"""Share of its GPU's memory that this process's worker may take: 0.25 if four workers share the GPU. At least 1 if no
other worker does, in a driver, without Ray and without GPUs."""

cpus: int | None = None
"""Number of the node's CPUs that belong to this worker's GPUs: 12 for one of 8 GPUs on a node with 96 CPUs. 0 for a
worker without GPUs. `None` in a driver, and without Ray."""
