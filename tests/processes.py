"""Processes for tests of several ranks: forked from a server that has imported torch and this package once.

A freshly started interpreter spends four CPU-seconds on those imports; a forked process starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.conftest", "torch.distributed", "datm_ray.runtime.distill"])
