"""Main memory that this process can still allocate, on the machine and in the container that it runs in.

Not covered: memory of GPUs. Tests: tests/planning/test_memory.py.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process can allocate without swapping: the machine's, or the container's if less.

    `root` is the folder that holds `proc` and `sys`.
    """
    # Systems other than Linux report used memory in different ways, so there all memory counts as free.
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_left_in_control_groups(root)])


def _left_in_control_groups(root: Path) -> list[int]:
    """Free bytes below the memory limits of this process's control group and its parent groups; empty if unlimited."""
    left = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base = root / "sys/fs/cgroup" / controllers
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            group = base / path.lstrip("/")
            # In a container, the path may be one of the host, which does not exist there. The base is then
            # the container's own group.
            for place in [base, *(each for each in (group, *group.parents) if base in each.parents)]:
                with suppress(OSError, ValueError):  # the limit is "max", or the group has none
                    limit, used = (int((place / name).read_text()) for name in names)
                    left.append(max(0, limit - used + _reclaimable(place)))
    return left


def _reclaimable(group: Path) -> int:
    """Bytes of a control group's cached files, which the kernel frees on demand; 0 if unknown."""
    with suppress(OSError, ValueError, StopIteration):
        lines = (group / "memory.stat").read_text().splitlines()
        return next(
            int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "total_inactive_file")
        )
    return 0
