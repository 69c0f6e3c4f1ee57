"""The command line `datm-ray`: parse, make one call, print the result and the next step.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings

from datm_ray.cli.jobs import job_app
from datm_ray.cli.runs import app, recipe_app
from datm_ray.cli.stores import store_app
from datm_ray.errors import DatmError

INTERRUPTED = 130
"""What typer makes of Ctrl-C."""

__all__ = ["app", "main"]

app.add_typer(recipe_app, name="recipe")
app.add_typer(job_app, name="job")
app.add_typer(store_app, name="store")


def main() -> None:
    """Run the command line; expected failures are one line on standard error and an exit code."""
    _hide_deprecations()
    try:
        app()
    except DatmError as failure:
        if os.environ.get("DATM_RAY_DEBUG") == "1":
            raise
        print(f"datm-ray: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("datm-ray: stopped. The same command again goes on from here.", file=sys.stderr)
        raise


def _hide_deprecations() -> None:
    """Hide what a dependency has deprecated, which a user cannot change; Python's option -W shows it."""
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module="(?!datm_ray)")
