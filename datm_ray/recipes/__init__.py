"""Packaged recipes: one function per named run; its docstring gives the source and the expected result.

The values for CIFAR and Tiny-ImageNet are the published ones of DATM (arXiv 2310.05773, the authors' configuration
files of 2024-04-26), GSAM experts included, or of the method in the recipe's name. The section "What differs" of
docs/methods/datm.md, or of that method's page, lists the differences. Figures of our own are given only where they were
measured.

A public function of a module listed in `_MODULES` is a recipe, under its name with dashes.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable

from datm_ray.config import RunConfig
from datm_ray.config.files import load_config
from datm_ray.errors import ConfigError
from datm_ray.recipes import cifar10, cifar100, digits, imagenet, tiny_imagenet

_MODULES = (digits, cifar10, cifar100, tiny_imagenet, imagenet)
_RECIPES: dict[str, Callable[[], RunConfig]] = {
    name.replace("_", "-"): each
    for module in _MODULES
    for name, each in vars(module).items()
    if inspect.isfunction(each) and each.__module__ == module.__name__ and not name.startswith("_")
}


def recipe_names() -> list[str]:
    """Names of all packaged recipes, data set by data set."""
    return list(_RECIPES)


def get_recipe(name: str) -> RunConfig:
    """Packaged recipe of this name, or the recipe in a file if the name ends in .yaml or .yml or contains a "/".

    A file with the key `base` holds only its differences from the base recipe. `base` is the name of a recipe, or a
    path relative to the file.

    Raises:
        ConfigError: the recipe or its base does not exist, the file is its own base, or it holds no recipe.
    """
    return _find(name, ())


def _find(name: str, below: tuple[str, ...]) -> RunConfig:
    """Recipe of this name or file. `below` are the files whose key `base` led here, directly or through other files.

    Raises:
        ConfigError: the recipe or a base does not exist, a file is its own base, or it holds no recipe.
    """
    if not is_file(name):
        return _lookup(name)().model_copy(update={"name": name})
    path, folder = os.path.realpath(name), os.path.dirname(name)
    if path in below:
        raise ConfigError(f"{name} is a base of itself", remedy="remove one `base:` of these files")
    return load_config(name, lambda base: _find(os.path.join(folder, base) if is_file(base) else base, (*below, path)))


def is_file(name: str) -> bool:
    """True if `name` is the path of a recipe's file, False if it is the name of a packaged recipe."""
    return name.endswith((".yaml", ".yml")) or os.sep in name


def recipe_notes(name: str) -> str:
    """Docstring of a packaged recipe: where its values come from and what to expect.

    Raises:
        ConfigError: there is no packaged recipe of this name.
    """
    return inspect.cleandoc(_lookup(name).__doc__ or "")


def _lookup(name: str) -> Callable[[], RunConfig]:
    if name in _RECIPES:
        return _RECIPES[name]
    near = difflib.get_close_matches(name, _RECIPES, n=1)
    raise ConfigError(
        f"unknown recipe {name!r}",
        remedy=f"did you mean {near[0]!r}?" if near else "`datm-ray recipe list` shows them; a file ends in .yaml",
    )
