"""GPUs that Ray has assigned to this process. A worker without such a GPU may compute on the CPU, others must not."""

from __future__ import annotations

from collections.abc import Sequence

gpus: Sequence[str] = ()
"""Ray's identifiers of the GPUs of this process's worker. Empty without GPUs, in a driver, and without Ray."""
