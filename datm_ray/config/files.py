"""A run's configuration as YAML text: reading it, writing it with comments, and overriding single keys.

`datm-ray recipe show NAME` prints a packaged recipe to start from. Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from datm_ray.config.schema import RENAMED, RunConfig, fields_at, known_keys, parse_config
from datm_ray.config.sections import SELDOM, MetaConfig, Section, StartEpochs
from datm_ray.errors import ConfigError


def load_sections(path: str) -> dict[str, Any]:
    """Read a recipe's YAML file as plain data, unchecked: key -> value, or section -> {key: value}.

    Raises:
        ConfigError: the file cannot be read, or is not YAML with keys and values.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST_TEXT + 1)
    except OSError as failure:
        raise ConfigError(f"cannot read {path}: {failure.strerror}", remedy="check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file", remedy="give a recipe's name or a YAML file") from None
    return _read_sections(text, path)


def load_config(path: str, base_of: Callable[[str], RunConfig]) -> RunConfig:
    """Read the YAML file of a run's configuration.

    Args:
        path: path of the file. If it has no key `name`, the run is named after the file.
        base_of: finds the recipe that the file's key `base` names.

    Raises:
        ConfigError: the file or its base cannot be read, is not YAML, or is not a valid configuration.
    """
    values = {"name": plain_name(Path(path).stem), **load_sections(path)}
    if isinstance(values.get("distill"), dict) and values["distill"].keys() >= _FORMER_STARTS:
        values = _of_earlier_version(values, path)  # a recipe that a run has saved; some errors advise to use it
    if "base" in values:
        values = _merged(_base(values.pop("base"), base_of, path), values)
    return parse_config(values, path)


def keys_given(path: str | None, assignments: Sequence[str]) -> set[str]:
    """Sections and keys, such as `distill` and `distill.ipc`, that a user has set in a file or by overrides.

    Args:
        path: the YAML file; `None` for a packaged recipe. Keys of a recipe.yaml that a run has written are left out:
            runs write default values too, so the file does not tell which keys a user has set.
        assignments: overrides of the form `section.field=value`.

    Raises:
        ConfigError: the file cannot be read, or is not YAML with keys and values.
    """
    values = {} if path is None else load_sections(path)
    if values.keys() >= _SAVED and "base" not in values:
        values = {}
    inner = {f"{name}.{key}" for name, value in values.items() if isinstance(value, dict) for key in value}
    paths = [each.partition("=")[0].strip().split(".") for each in assignments]
    return {*values, *inner, *(path[0] for path in paths), *(".".join(path[:2]) for path in paths)}


def _base(name: object, base_of: Callable[[str], RunConfig], origin: str) -> dict[str, Any]:
    """Plain data of the recipe that a file's key `base` names.

    Args:
        name: value of the key `base`.
        base_of: finds a recipe by its name.
        origin: name of the file with the key, at the start of error messages.

    Raises:
        ConfigError: the value is not text, or `base_of` finds no recipe.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{origin}: base is {name!r}", remedy="give a packaged recipe's name or a YAML file")
    try:
        return base_of(name).model_dump(mode="json")
    except ConfigError as failure:
        raise ConfigError(f"{origin}: base: {failure.fact}", failure.cause, failure.remedy) from None


def plain_name(stem: str) -> str:
    """Name of a run, made from a file's name without its suffix; "run" if the file's name has no letter or digit.

    Each group of characters that a run's name must not have is replaced by "-".
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Copy of `base` with `changes`: sections are merged key by key; lists and other values are replaced."""
    alike = [key for key, value in changes.items() if isinstance(value, dict) and isinstance(base.get(key), dict)]
    return base | changes | {key: _merged(base[key], changes[key]) for key in alike}


def load_recipe_of_run(text: str, origin: str) -> RunConfig:
    """Read a recipe that this version or an earlier one saved for a run.

    Args:
        text: YAML text, as `to_yaml` writes it.
        origin: name of its file, at the start of error messages.

    Raises:
        ConfigError: the text is not YAML, or not a valid configuration.
    """
    return parse_config(_of_earlier_version(_read_sections(text, origin), origin), origin)


_FORMER_STARTS = {old.partition(".")[2] for old, new in RENAMED.items() if new.startswith("distill.start_epochs.")}


_FORMER_RECOVERY = {
    "block",
    "learning_rate",
    "statistics",
    "least_share",
    "crops",
    "flip",
    "shift",
    "rounds",
    "mixed_in",
}
"""Keys of `recover` in versions without the key `recover.restarts`. Recipes saved by their runs have all these keys."""
_SAVED = {"dataset", "network", "experts", "distill", "evaluate", "cluster"}
"""Sections of every recipe that a run has saved, whatever the version."""


def _of_earlier_version(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Rename former keys in a recipe's plain data, in place, and return the data.

    In a recipe that a run saved, a missing `distill.gradient_limit` becomes null: earlier versions had no limit.

    Args:
        values: the recipe's plain data.
        origin: name of its file, at the start of error messages.
    """
    for old, new in RENAMED.items():
        section, _, field = old.partition(".")
        keys = values.get(section)
        if isinstance(keys, dict) and field in keys:
            _assign(values, new.split("."), keys.pop(field), origin)
    if isinstance(values.get("distill"), dict) and values.keys() >= _SAVED:
        values["distill"].setdefault("gradient_limit", None)
    return values


def _keep_former_recovery(values: dict[str, Any]) -> None:
    """Set keys of `recover`, in place, so that a recipe saved by an earlier version gives the same images as before.

    Such a recipe is recognised by its section `recover`: the section has all keys of that version, but no key
    `restarts`, which later versions save too.
    """
    recover = values.get("recover")
    if isinstance(recover, dict) and recover.keys() >= _FORMER_RECOVERY and "restarts" not in recover:
        recover["restarts"] = "all"
        if recover["crops"] == "falling":
            recover["crops"] = "falling-cut"


def _state_what_metadd_saw(values: dict[str, Any]) -> None:
    """Add `metadd.augmented`, in place, to a recipe that a run saved before this key existed.

    The section `metadd` of such a recipe has all other keys. In its run, MetaDD's networks saw augmented images only
    with method sre2l.
    """
    section = values.get("metadd")
    if isinstance(section, dict) and section.keys() >= MetaConfig.model_fields.keys() - {"augmented"}:
        section.setdefault("augmented", values.get("method") == "sre2l")


def _read_sections(text: str, origin: str) -> dict[str, Any]:
    values = _read_yaml(text, origin)
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} holds no configuration", remedy="compare with `datm-ray recipe show`")
    _keep_former_recovery(values)
    _state_what_metadd_saw(values)
    return values


def override(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Copy of the configuration with overrides of the form `section.field=value`, whose values are read as YAML.

    Fields that hold text take the value literally, without surrounding blanks, unless it is empty, null or quoted.

    Raises:
        ConfigError: an override is not an assignment, its key is unknown, its value is not YAML or has a wrong type, or
            the configuration would be invalid.
    """
    values = config.model_dump(mode="json")
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment!r} is not an assignment", remedy="write --set section.field=value")
        path, bare = key.strip().split("."), text.strip(" \t")
        is_text = _takes_text(path) and bare not in ("", "null") and not _QUOTED.fullmatch(bare)
        origin = f"--set {assignment!r}"
        _assign(values, path, bare if is_text else _read_yaml(text, origin), origin)
    return parse_config(values, "--set")


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Copy of the configuration with some values replaced.

    Args:
        settings: `section.field` -> new value. Text is taken literally, not as YAML.

    Raises:
        ConfigError: a key is unknown, a value has a wrong type, or the configuration would be invalid.
    """
    values = config.model_dump(mode="json")
    for key, value in settings.items():
        _assign(values, key.split("."), value, f"settings {key!r}")
    return parse_config(values, "settings")


def _assign(values: Any, path: Sequence[str], value: Any, origin: str) -> None:
    """Set one value in plain data, in place. Missing sections are made.

    Args:
        path: keys, and indices in lists, that lead to the value.
        origin: source of the value, at the start of error messages.

    Raises:
        ConfigError: a list on the path lacks the index, or a value on the path is no section.
    """
    for place, part in enumerate(path):
        above = ".".join(path[:place])
        if isinstance(values, list) and part not in map(str, range(len(values))):
            raise ConfigError(
                f"{origin}: {above} has no element {part!r}",
                f"it is a list of length {len(values)}, counted from 0",
                f"give the whole list: --set '{above}=[...]'",
            )
        if not isinstance(values, dict | list):
            raise ConfigError(f"{origin}: {above!r} is not a section", remedy=known_keys(()))
        key: Any = int(part) if isinstance(values, list) else part
        if place == len(path) - 1:
            values[key] = value
        elif isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[key]


_QUOTED = re.compile(r"\"(.*)\"|'(.*)'", re.DOTALL)


def _takes_text(path: Sequence[str]) -> bool:
    """True if the field at this path of keys takes any text, so that `a #1` or `1e3` must not be read as YAML."""
    field, section = fields_at(path[:-1]).get(path[-1]), fields_at(path[:-2]).get(path[-2]) if path[1:] else None
    if field is None and section is not None and get_origin(section.annotation) is dict:
        value = get_args(section.annotation)[1]
        return _is_text(value) and int not in get_args(value)
    return field is not None and _is_text(field.annotation)


def _is_text(annotation: Any) -> bool:
    parts = get_args(annotation) if get_origin(annotation) in (Annotated, Union, UnionType) else ()
    return annotation is str or any(map(_is_text, parts))


def to_yaml(config: RunConfig, without: Collection[str] = ()) -> str:
    """YAML text of the configuration with a comment for every field, readable by `load_config`.

    Args:
        without: keys, such as `distill.threshold`, and sections that are left out.
    """
    return "\n".join(_section_lines(config, "", "", without)) + "\n"


def to_yaml_with_reasons(config: RunConfig, reasons: Mapping[str, str]) -> str:
    """YAML text of the values that have a reason, each with its reason as a comment. `load_config` can read it.

    Args:
        reasons: reason of each value, by `section.field`.
    """
    lines = []
    for name in type(config).model_fields:
        section = getattr(config, name)
        inner = [each for each in getattr(type(section), "model_fields", ()) if f"{name}.{each}" in reasons]
        lines += [f"{name}:"] if inner else []
        lines += [line for each in inner for line in _value_lines(section, each, "  ", reasons[f"{name}.{each}"])]
        lines += _value_lines(config, name, "", reasons[name]) if name in reasons else []
    return "\n".join(lines) + "\n"


def _section_lines(section: Section, heading: str, indent: str, without: Collection[str] = ()) -> Iterator[str]:
    """YAML lines of a section's fields: first the common ones, then those of `SELDOM[heading]` below a comment.

    Args:
        heading: key of the section; "" for the whole configuration.
        without: names of fields, and `section.field` of inner sections, that are left out.
    """
    fields = {name: each for name, each in type(section).model_fields.items() if name not in without}
    seldom = [name for name in fields if name in SELDOM.get(heading, "").split()]
    for name in sorted(fields, key=seldom.__contains__):
        if seldom[:1] == [name]:
            yield f"{indent}# seldom needed:"
        value = getattr(section, name)
        if isinstance(value, Section) and not isinstance(value, StartEpochs):
            yield from ("", *_commented(f"{indent}{name}:", (type(value).__doc__ or "").partition("\n")[0]))
            inner = [key.removeprefix(f"{name}.") for key in without if key.startswith(f"{name}.")]
            yield from _section_lines(value, name, f"{indent}  ", inner)
        else:
            yield from _value_lines(section, name, indent, fields[name].description)


def _value_lines(section: Section, name: str, indent: str, comment: str | None) -> list[str]:
    """YAML lines of the field `name` of a section: key, value and comment; `None` gives an empty comment."""
    value, plain = getattr(section, name), section.model_dump(mode="json", include={name})
    if isinstance(value, StartEpochs) and value == StartEpochs(first=value.first, bound=value.bound):
        plain[name] = [value.first, value.bound]
    flow = None if isinstance(plain[name], dict | list) else False  # None puts each innermost list on one line
    text = yaml.dump(plain, None, _Dumper, default_flow_style=flow, sort_keys=False, width=_COLUMNS)
    return _commented(f"{textwrap.indent(text.rstrip(chr(10)), indent):<{_COMMENT_COLUMN}}", comment)


def _commented(text: str, comment: str | None) -> list[str]:
    """Lines of YAML text with its comment: behind it, or above text of several lines or a line beyond `_COLUMNS`."""
    comment = " ".join((comment or "").split())
    line = f"{text}  # {comment}"
    if len(line) <= _COLUMNS and "\n" not in text:
        return [line]
    above = " " * (len(text) - len(text.lstrip())) + "# "
    wrapped = textwrap.wrap(comment, _COLUMNS, initial_indent=above, subsequent_indent=above)
    return [*wrapped, text.rstrip()]


_COMMENT_COLUMN, _COLUMNS = 34, 100


class _Loader(yaml.SafeLoader):
    """YAML reader in which 1e-5 is a number, 2024-11-20 is text, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is repeated", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML writer that quotes text which `_Loader` would read as something else."""


# Numbers with an exponent. YAML 1.1, which PyYAML implements, requires a point and a sign in them: 1.0e-5.
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


_LARGEST_TEXT = 2**16  # most characters of a recipe: PyYAML takes quadratic time for some


def _read_yaml(text: str, origin: str) -> Any:
    if len(text) > _LARGEST_TEXT:
        raise ConfigError(
            f"{origin} is too long for a recipe", "it is probably another file", "give a recipe's name or file"
        )
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as failure:
        line = f" at line {failure.problem_mark.line + 1}" if failure.problem_mark else ""
        what = f"not valid YAML{line}: {failure.problem}"
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # PyYAML does not catch errors in explicit tags such as !!int, nor its own recursion depth.
        what = "not valid YAML"
    raise ConfigError(f"{origin} is {what}", remedy="compare with `datm-ray recipe show`")
