"""Environment variables that libraries read, set for as long as a block runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def variables(wanted: Mapping[str, str], *, replaces: bool = False) -> Iterator[None]:
    """Set environment variables while the block runs. Afterwards they have their former values.

    Args:
        wanted: name of each variable -> value in the block.
        replaces: True to replace a value that the user has set; False to keep it.
    """
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if replaces or before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
