"""Options that several commands have, each defined once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from datm_ray.config import RunConfig

Recipes = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE|FILE.yaml...", help="Packaged recipes or YAML files; several share experts."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one value; may be given again."),
]
Store = Annotated[
    str | None, typer.Option("--store", metavar="URI", help="Trajectory store; <out>/experts where not given.")
]


def config_of(name: str, set_: list[str] | None) -> RunConfig:
    """The recipe of that name, or of that file, with its values overridden."""
    from datm_ray.config import override
    from datm_ray.recipes import get_recipe

    return override(get_recipe(name), set_ or [])


class Invocation(NamedTuple):
    """Arguments of one stage's command, which the command for the next stage repeats."""

    recipes: list[str]
    set_: list[str] | None
    out: str
    store: str | None
    executor: str
    address: str | None

    def next(self, command: str) -> str:
        """The command for the next stage."""
        import shlex

        words = ["datm-ray", command, *self.recipes, "--out", self.out]
        words += [word for each in self.set_ or [] for word in ("--set", each)]
        words += ["--store", self.store] if self.store else []
        words += ["--executor", self.executor] if self.executor != "ray" else []
        words += ["--address", self.address] if self.address else []
        return shlex.join(words)
