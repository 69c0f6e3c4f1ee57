"""Commands that write a recipe for the user's own images, and that list and print packaged recipes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from datm_ray.cli.options import Json, Set, Verbose, config_of, print_json, recipes_starting_with
from datm_ray.cli.runs import app

recipe_app = typer.Typer(help="List and print recipes.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def init(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Folder, zip archive or Parquet file of images, or digits.")
    ],
    ipc: Annotated[int, typer.Option("--ipc", min=1, metavar="N", help="Synthetic images per class.")] = 10,
    method: Annotated[
        Literal["datm", "mtt", "dm", "select", "sre2l"],
        typer.Option("--method", help="How the set is made; the documentation has a page on each."),
    ] = "datm",
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.1, metavar="M", help="Time for everything. Default: 30 minutes.")
    ] = None,
    hours: Annotated[float | None, typer.Option("--hours", min=0.01, metavar="H", help="Time in hours.")] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of the run. Default: from PATH, method and N."),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            "--resize",
            min=8,
            metavar="PIXELS",
            help="Bring all images to this side. Without it, images of one size up to 64 pixels keep it, and others "
            "become 64x64.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FILE.yaml", help="File to write. Default: NAME.yaml.")
    ] = None,
    json_: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Write a recipe for your own images and your time.

    The command reads the images, times steps on this machine for up to a minute or two, and chooses values that fill
    the time. The recipe is the only file written. Every value in it has its reason beside it.
    """
    from datm_ray.api import init as init_recipe
    from datm_ray.errors import ConfigError
    from datm_ray.planning.init.suggest import default_name

    if minutes is not None and hours is not None:
        raise ConfigError("--minutes and --hours are both given", remedy="give one of them")
    time = minutes if minutes is not None else 30.0 if hours is None else 60 * hours
    file = _new_file(out, name or default_name(path, ipc, method))
    suggestion = init_recipe(path, ipc, time, method=method, name=name, resize=resize)
    try:
        file.write_text(str(suggestion), encoding="utf-8")
    except OSError as failure:
        raise ConfigError(f"cannot write {file}: {failure.strerror}", remedy="give another --out") from None
    if json_:
        parts = {"reasons": suggestion.reasons, "plan": suggestion.plan.to_json(), "notes": list(suggestion.notes)}
        print_json({"file": str(file), **parts})
        return
    print("\n".join([*suggestion.notes, str(suggestion.plan), *suggestion.warnings]))
    print(f"\nRecipe: {file}\nNext: datm-ray run {shlex.quote(str(file))}")


def _new_file(out: str | None, name: str) -> Path:
    """Path of the recipe to write: `out`, or <name>.yaml. Checked before the images are read, which takes time.

    Raises:
        ConfigError: the name is invalid, the file exists, or its folder does not.
    """
    from datm_ray.config import parse_config
    from datm_ray.errors import ConfigError

    parse_config({"name": name}, "--name")
    file = Path(out or f"{name}.yaml")
    if file.exists():
        raise ConfigError(f"{file} exists", remedy="give another --name or --out, or delete it")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {file}: there is no such folder", remedy="give another --out")
    return file


@recipe_app.command("list")
def recipe_list(json_: Json = False) -> None:
    """List the packaged recipes, one per line."""
    from datm_ray.recipes import recipe_names, recipe_notes

    if json_:
        print_json([{"name": name, "notes": recipe_notes(name).splitlines()} for name in recipe_names()])
        return
    for name in recipe_names():
        print(f"{name:<22} {recipe_notes(name).splitlines()[0]}")


@recipe_app.command("show")
def recipe_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FILE.yaml",
            help="A packaged recipe or a YAML file.",
            autocompletion=recipes_starting_with,
        ),
    ],
    set_: Set = None,
) -> None:
    """Print a recipe as YAML, with a comment on every field.

    Keys that the recipe's method does not read are left out.
    Your own YAML file needs only `base: NAME` and the values that differ.
    """
    import textwrap

    from datm_ray.config import to_yaml, unread_keys
    from datm_ray.recipes import recipe_names, recipe_notes

    config = config_of(name, set_)
    if name in recipe_names():
        comment = textwrap.TextWrapper(100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        print("\n#\n".join(comment.fill(paragraph) for paragraph in recipe_notes(name).split("\n\n")))
    print(to_yaml(config, without=unread_keys(config)), end="")
