"""The command line `datm-ray`: parse, make one call, print the result and the next step.

Heavy packages are imported only when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from datm_ray.cli.ending import adapt_streams, end_cleanly, find_home
from datm_ray.cli.jobs import job_app
from datm_ray.cli.recipes import recipe_app
from datm_ray.cli.runs import app
from datm_ray.cli.stores import store_app
from datm_ray.monitor import logs

__all__ = ["app", "main"]

app.add_typer(recipe_app, name="recipe")
app.add_typer(job_app, name="job")
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line. A failure prints one line on standard error and sets the exit code."""
    adapt_streams()
    logs.show(0)
    _hide_deprecations()
    find_home()
    noted: dict[str, Any] = {}
    end_cleanly(
        lambda: app(obj=noted, prog_name="datm-ray"), lambda: None if noted.get("dry_run") else noted.get("out")
    )


def _hide_deprecations() -> None:
    """Hide deprecation warnings of other packages, which users cannot fix. Python's option -W shows them."""
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module="(?!datm_ray)")
