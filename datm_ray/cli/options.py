"""Command-line options that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from datm_ray.monitor import logs

if TYPE_CHECKING:
    from datm_ray.config import RunConfig


def recipes_starting_with(incomplete: str) -> list[str]:
    """Names of packaged recipes that start with the text, for a shell's completion."""
    from datm_ray.recipes import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def settings_starting_with(incomplete: str) -> Iterator[str]:
    """Keys of a recipe that start with the text, as `section.field=`, for a shell's completion."""
    from datm_ray.config import RunConfig

    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key in [f"{name}.{each}=" for each in inner] if inner else [f"{name}="]:
            if key.startswith(incomplete):
                yield key


def more_output(steps: int) -> int:
    """Show `steps` more levels of the log on standard error, or fewer if negative. Returns `steps`."""
    logs.show(logs.verbosity() + steps)
    return steps


Recipes = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE|FILE.yaml...",
        help="Packaged recipes or YAML files. Several share their experts.",
        autocompletion=recipes_starting_with,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="SECTION.FIELD=VALUE",
        help="Override one value of the recipe. May be repeated.",
        autocompletion=settings_starting_with,
    ),
]
Store = Annotated[
    str | None,
    typer.Option("--store", metavar="URI", help="Trajectory store, a path or URI. Without it, <out>/experts is used."),
]
ExpertsOf = Annotated[
    str,
    typer.Option("--recipe", metavar="RECIPE|FILE.yaml", help="Recipe of the experts: data set, network and epochs."),
]
IntoStore = Annotated[str, typer.Option("--store", metavar="URI", help="Trajectory store to write to.")]
WriteTo = Annotated[str, typer.Option("--out", "-o", metavar="URI", help="Folder to write to.")]


def verbose_option(help_: str) -> Any:
    """Make the option --verbose of a command. A user may give the option twice."""
    return typer.Option("--verbose", "-v", count=True, show_default=False, callback=more_output, help=help_)


Verbose = Annotated[
    int, verbose_option("Print the log. Given twice, print details and the raw output of Ray and its workers too.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=lambda value: more_output(-value),
        help="Print only results and errors.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, whose keys the documentation describes.")]


def print_json(value: object) -> None:
    """Print a value as one JSON document. Numbers that are not finite become null."""
    print(json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2))


def config_of(name: str, set_: list[str] | None) -> RunConfig:
    """Load a packaged recipe by its name, or a YAML file, and override values by `set_`.

    A line on standard error names keys that the file or `set_` gives, but the recipe's method does not read.

    Args:
        name: name of the recipe, or path of the file.
        set_: overrides of the form `section.field=value`; `None` for none.

    Raises:
        ConfigError: there is no such recipe, or a key or value is wrong.
    """
    from datm_ray.config import override, unread_values
    from datm_ray.config.files import keys_given
    from datm_ray.recipes import get_recipe, is_file

    config = override(get_recipe(name), set_ or [])
    given = keys_given(name if is_file(name) else None, set_ or [])
    if unread := [key for key in unread_values(config) if key in given]:
        print(f"Note: method {config.method} does not read {', '.join(unread)}", file=sys.stderr)
    return config


class Invocation(NamedTuple):
    """Arguments of a command such as `distill`, from which `next` makes the command for the next stage."""

    recipes: list[str]
    set_: list[str] | None
    out: str
    store: str | None
    executor: str = "ray"
    address: str | None = None

    def next(self, command: str) -> str:
        """Text of the shell command that runs `command`, such as "evaluate", with the same arguments."""
        import shlex

        words = ["datm-ray", command, *self.recipes, "--out", self.out]
        words += [word for each in self.set_ or [] for word in ("--set", each)]
        words += ["--store", self.store] if self.store else []
        words += ["--executor", self.executor] if self.executor != "ray" else []
        words += ["--address", self.address] if self.address else []
        return shlex.join(words)
