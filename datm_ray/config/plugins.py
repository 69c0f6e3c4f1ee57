"""Objects of a user's own modules, which a recipe names as `package.module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from datm_ray.errors import PluginError


def imported(key: str, place: str) -> Any:
    """Import the class or function that a recipe names.

    Args:
        key: key of the recipe that names it, for messages.
        place: `package.module:name`.

    Raises:
        PluginError: the module cannot be imported, or lacks the name.
    """
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as failure:  # a user's module may raise anything
        what = {"method": "class", "network.architecture": "class or function"}.get(key, "function")
        raise PluginError(
            f"{key} {place!r} cannot be imported: {failure or type(failure).__name__}",
            f"its package is not installed here, or the {what} has another name",
            "install it on every machine, or put its folder on PYTHONPATH",
        ) from failure
