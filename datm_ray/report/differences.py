"""Keys in which configurations differ, for errors, and for remarks on tables that compare runs.

Tests: tests/report/test_report.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from datm_ray.config import RunConfig

MISSING = "not set"
"""Text in place of the value of a key that a configuration lacks."""
UNSCORED = {"seeds", "networks", "full", "fair", "fixed_labels"}
"""Keys of `evaluate` that decide which networks are scored, and not how each one is trained or scored."""
OF_TEACHERS, OF_STORED_LABELS = {"teacher", "temperature", "cutmix"}, {"keep_labels", "top_logits"}
"""Keys of `evaluate` that are read only with a teacher's labels, and keys that are read only with stored labels."""


def differences(configs: Sequence[RunConfig]) -> list[str]:
    """Lines that say in which settings the runs differ, one line for each key.

    Compared are settings of the images, the scored network and its training. Keys that some of the runs do not use are
    left out. A line has the key and its values, each with the names of the runs that have this value in brackets.
    """
    names = [config.name for config in configs]
    found = differing([_settings(config) for config in configs])
    return [f"{key}: {_by_value(values, names)}" for key, values in found if MISSING not in values]


def differing(values: Sequence[Any], key: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield each dotted key at which configurations differ, with a list: the value of every configuration as text.

    Args:
        values: for each configuration, as plain data, the section to compare.
        key: dotted path of the section; "" for whole configurations.
    """
    if all(isinstance(each, dict) for each in values):
        for name in dict.fromkeys(name for each in values for name in each):
            yield from differing([each.get(name, MISSING) for each in values], f"{key}.{name}".lstrip("."))
    elif any(each != values[0] for each in values):
        sections = {json.dumps(each) for each in values if isinstance(each, dict)}
        section = json.dumps if len(sections) > 1 else lambda _: "set"
        yield key, [section(each) if isinstance(each, dict) else _in_yaml(each) for each in values]


def _settings(config: RunConfig) -> dict[str, Any]:
    """Settings that decide what a column of the accuracy table shows, without those that the run does not read."""
    left_out = UNSCORED
    if not config.evaluate.has_teacher:
        left_out = left_out | OF_TEACHERS
    if not config.evaluate.stores_labels:
        left_out = left_out | OF_STORED_LABELS
    return config.model_dump(
        mode="json",
        include={"dataset", "network", "evaluate"},
        exclude={"dataset": {"path", "streamed"}, "evaluate": left_out},
    )


def _by_value(values: Sequence[str], names: Sequence[str]) -> str:
    """Each value once, with the names of its runs, such as "convnet (one, two); lenet (three)"."""
    runs: dict[str, list[str]] = {}
    for value, name in zip(values, names, strict=True):
        runs.setdefault(value, []).append(name)
    return "; ".join(f"{value} ({', '.join(found)})" for value, found in runs.items())


def _in_yaml(value: Any) -> str:
    """Value as a recipe gives it, such as "true" or "null"."""
    return value if isinstance(value, str) and value else json.dumps(value)
