"""Tests what README, docs and cluster/ say: commands exist, links lead somewhere, and nothing is secret."""

from __future__ import annotations

import ast
import functools
import pydoc
import re
import runpy
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import typer.main

from datm_ray.cli import app
from datm_ray.config import override
from datm_ray.planning.plan import plan_run
from datm_ray.recipes import get_recipe
from datm_ray.store import labels, tensors, trajectories
from tests.cluster.files import (
    CLUSTER,
    DOCUMENTS,
    ROOT,
    commands,
    documented_commands,
    mentioned_commands,
    shell_blocks,
)
from tests.conftest import load_config_text

TEXTS = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix not in (".png", ".pyc"))
SECRETS = [
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"(?i)aws_secret_access_key\s*[=:]\s*\S",
    r"(?i)\b(?:password|passwd|auth_token)\s*[=:]\s*['\"]?[0-9a-z+/]{12,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"\b[0-9a-f]{64}\b",  # a token of Ray's
]


def find(words: list[str]) -> tuple[Any, list[str]]:
    """The command with this name, and the words after it."""
    command: Any = typer.main.get_command(app)
    _, *arguments = words
    while hasattr(command, "commands") and arguments[:1] not in (["--help"], ["--version"]):
        assert arguments, f"{' '.join(words)} names no command"
        assert arguments[0] in command.commands, f"{' '.join(words)}: there is no command {arguments[0]!r}"
        command = command.commands[arguments.pop(0)]
    return command, arguments


def parse(words: list[str]) -> dict[str, Any]:
    """Values of a `datm-ray` command, parsed by the command line, which also raises its errors."""
    command, arguments = find(words)
    with command.make_context("datm-ray", arguments) as context:
        return dict(context.params)


def test_commands_are_found_in_text() -> None:
    """Commands are found in chains, after variables, over continued lines and before comments."""
    text = (
        "A=1 datm-ray run x \\\n --out y && (sleep 1; datm-ray job list) # datm-ray no\ntunnel & datm-ray plan 'a b'\n"
    )
    assert commands(text) == [
        ["datm-ray", "run", "x", "--out", "y"],
        ["sleep", "1"],
        ["datm-ray", "job", "list"],
        ["tunnel"],
        ["datm-ray", "plan", "a b"],
    ]
    found = documented_commands()
    assert {place for place, _ in found} >= {
        "cluster/README.md",
        "cluster/aws/README.md",
        "cluster/kuberay/README.md",
        "cluster/kuberay/rayjob.yaml",
        "cluster/local/README.md",
        "cluster/local/start.sh",
        "cluster/slurm/README.md",
        "cluster/slurm/run.sbatch",
    }


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("datm-ray", "names no command"),
        ("datm-ray rum x", "no command 'rum'"),
        ("datm-ray run", "[Mm]issing"),
        ("datm-ray run x --adress y", "No such option"),
    ],
)
def test_a_wrong_command_is_noticed(wrong: str, what: str) -> None:
    """A missing, misspelt or incomplete command, or an unknown option, is found."""
    with pytest.raises(Exception, match=what):
        parse(wrong.split())


def named(value: object) -> str:
    """Name of a test case."""
    return " ".join(value)[:80] if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("place", "words"), documented_commands(), ids=named)
def test_commands_exist(place: str, words: list[str]) -> None:
    """Every documented command has an existing name, options, recipe and configuration values."""
    values = {} if words[-1] == "--help" else parse(words)
    for recipe in values.get("recipes") or []:
        is_file = recipe.endswith(".yaml")  # a file of the reader
        override(get_recipe("digits-ipc1" if is_file else recipe), values.get("set_") or [])


def test_commands_of_ray_exist() -> None:
    """Every command of Ray that documents give, also within another, has a name and options of Ray's command line."""
    from ray.scripts.scripts import cli

    given = [words for place in DOCUMENTS for text in shell_blocks(place) for words in commands(text)]
    inner = [words for outer in given if outer[0] == "ray" for text in outer if " " in text for words in commands(text)]
    found = [words for words in [*given, *inner] if words[0] == "ray"]
    assert {"up", "down", "exec", "metrics"} <= {words[1] for words in found}
    for words in found:
        command, arguments = cli, words[1:]
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context("ray", arguments)


def test_shown_recipes_are_recipes(tmp_path: Path) -> None:
    """Every YAML block with a `base` is a file that `run` takes; README and docs have some."""
    shown = [
        (place, text)
        for place in DOCUMENTS
        for text in re.findall(r"^```yaml\n(base: .*?)^```$", place.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert {place.name for place, _ in shown} >= {"your-images.md"}
    for place, text in shown:
        (tmp_path / "birds.yaml").write_text(text)
        config = get_recipe(str(tmp_path / "birds.yaml"))
        assert (config.name, config.dataset.source, config.network.depth) == ("birds", "folder", None), place
        assert len(text.splitlines()) <= 5


def test_shown_runs_are_recipes(tmp_path: Path) -> None:
    """Every YAML block with a `name` is a file that `run` takes."""
    found = {}
    for place in DOCUMENTS:
        for text in re.findall(r"^```yaml\n(name: .*?\nbase: .*?)^```$", place.read_text(), re.MULTILINE | re.DOTALL):
            (tmp_path / "shown.yaml").write_text(text)
            config = get_recipe(str(tmp_path / "shown.yaml"))
            found[config.name] = config
    assert {"mine-sre2l", "mine-teacher"} <= found.keys()
    taught = found["mine-teacher"]  # photos, for which the values of digits' recipes are poor
    assert (taught.network.architecture, taught.network.width, taught.recover.least_share) == ("resnet18", 128, 0.08)
    assert {taught.experts.augmentation, taught.evaluate.augmentation} == {"resized+flip"}
    assert taught.recover.shift == round(32 * (taught.dataset.resize or 0) / 224)


def test_shown_choices_of_machines_are_accepted() -> None:
    """Every section `cluster` that the guide to clusters shows is one of a recipe."""
    guide = next(place for place in DOCUMENTS if place.as_posix().endswith("cluster/README.md"))
    shown = re.findall(r"^```yaml\n(cluster:.*?)^```$", guide.read_text(), re.MULTILINE | re.DOTALL)
    clusters = [load_config_text(text, guide.name).cluster for text in shown]
    assert [(each.accelerator_type, each.light is None, len(each.labels)) for each in clusters] == [
        ("A100", True, 0),
        ("H100", False, 0),
        (None, True, 2),
    ]


def test_shown_gpu_hours_are_those_of_the_plan() -> None:
    """Each row of the guide to clusters that says what a recipe takes is what `plan` computes for it."""
    row = r"^\| `(\S+)`" + r" \| ([\d.]+)" * 4 + r" \| (\d+) GiB \|$"
    rows = re.findall(row, (CLUSTER / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 13
    for name, *shown in rows:
        found = plan_run(get_recipe(name), "gpus=1,memory=80GiB,tflops=10").to_json()
        hours = found["hours"]
        amounts = [hours["experts"], hours["distillation"], hours["validation"] + hours["evaluation"]]
        amounts += [sum(hours.values()), found["storage_bytes"]["store"] / 2**30]
        assert [float(each) for each in shown] == pytest.approx(amounts, rel=0.05, abs=0.5), name


@pytest.mark.parametrize(("place", "words"), mentioned_commands(), ids=named)
def test_mentioned_commands_exist(place: str, words: list[str]) -> None:
    """Commands within sentences exist, also where arguments are left out."""
    command, arguments = find(words)
    options = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    assert {word for word in arguments if word.startswith("--")} <= options


@pytest.mark.parametrize("place", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_mentioned_settings_exist(place: Path) -> None:
    """Every `section.field` in a README is a setting of a recipe."""
    settings = set(re.findall(r"\b(?:cluster|distill|experts|evaluate)\.[a-z_]+(?:=[\w.]+)?", place.read_text()))
    names = {setting for setting in settings if not setting.endswith((".yaml", ".py"))}
    for setting in sorted(names):
        name, _, value = setting.partition("=")
        recipe = get_recipe("cifar10-ipc10")
        assert attrgetter(name)(recipe) is not Ellipsis
        override(recipe, [setting] if value else [])


@pytest.mark.parametrize("readme", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(readme: Path) -> None:
    """Relative links lead to files, and a part after # to one of their headings."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", readme.read_text()):
        path, _, heading = target.partition("#")
        linked = readme.parent / path if path else readme
        assert linked.exists(), f"{target} does not exist"
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in slugs


def test_named_modules_and_calls_exist() -> None:
    """Every dotted name that begins with the package's, in any document, is a module, one of its names or a format."""
    found = {name for place in DOCUMENTS for name in re.findall(r"`(datm_ray(?:\.\w+)+)[`(]", place.read_text())}
    assert {"datm_ray.load", "datm_ray.runtime.ray.jobs.Jobs"} <= found
    formats = {module.FORMAT for module in (labels, tensors, trajectories)}
    assert [name for name in sorted(found - formats) if pydoc.locate(name) is None] == []


def rows_of_changes() -> list[str]:
    """Rows of the table in CONTRIBUTING.md that say where to change what."""
    return re.findall(r"^\| .*\]\(.*\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", rows_of_changes(), ids=lambda row: row.split(" |")[0])
def test_names_in_the_table_of_changes_exist(row: str) -> None:
    """Each name in a row is in one of the files that the row links to."""
    files = "".join((ROOT / link).read_text() for link in re.findall(r"\]\(([\w./-]+)\)", row))
    assert [name for name in re.findall(r"`(\w+)`", row) if name not in files] == []


@functools.cache
def decorators(path: str) -> dict[str, list[ast.expr]]:
    """Function of a Python file -> its decorators."""
    found = ast.walk(ast.parse((ROOT / path).read_text()))
    return {each.name: each.decorator_list for each in found if isinstance(each, ast.FunctionDef)}


def rows_of_faults() -> list[str]:
    """Rows of the tables in docs/faults.md that say what happens after a fault."""
    sections = (ROOT / "docs/faults.md").read_text().partition("## Faults")[2].partition("## Rules")[0]
    return [
        row for row in re.findall(r"^\| .* \|$", sections, re.MULTILINE) if not row.startswith(("| fault |", "| ---"))
    ]


def titles_of_faults() -> list[str]:
    """Headings of the tables in docs/faults.md that say what happens after a fault."""
    sections = (ROOT / "docs/faults.md").read_text().partition("## Faults")[2].partition("## Rules")[0]
    return re.findall(r"^### (.*)$", sections, re.MULTILINE)


def rows_of_history() -> list[str]:
    """Rows of the table in docs/faults.md that compares earlier versions with this one."""
    section = (ROOT / "docs/faults.md").read_text().partition("## Before and now")[2]
    return re.findall(r"^\| (?!\||---).* \|$", section, re.MULTILINE)


@pytest.mark.parametrize("row", [*rows_of_faults(), *rows_of_history()], ids=lambda row: row.split(" |")[0])
def test_each_fault_has_a_test(row: str) -> None:
    """Each row names tests that exist, with a star where only `make test-all` or a variable runs them.

    A row that compares versions may link to a table of faults instead.
    """
    assert row.count(" | ") in (3, 5)
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`(\*?)", row.rpartition(" | ")[2])
    titles = re.findall(r"\[([\w ]+)\]\(#[\w-]+\)", row.rpartition(" | ")[2]) if row in rows_of_history() else []
    assert named or titles
    assert set(titles) <= set(titles_of_faults())
    for path, name, star in named:
        defined = decorators(path)
        assert name in defined, f"{path} has no {name}"
        marks = {ast.unparse(mark).removeprefix("pytest.mark.").partition("(")[0] for mark in defined[name]}
        assert bool(star) == bool(marks & {"exhaustive", "skipif"}), name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_secret_is_in_a_file(path: Path) -> None:
    """No file holds a key or token; each place says where they come from."""
    text = path.read_text()
    assert not [pattern for pattern in SECRETS if re.search(pattern, text)]


@pytest.mark.parametrize(
    "secret",
    ["AKIAIOSFODNN7EXAMPLE", "aws_secret_access_key = x", "auth_token: 0123456789abcdef", "ab" * 32],
)
def test_a_secret_is_noticed(secret: str) -> None:
    """The patterns of secrets match examples of them."""
    assert any(re.search(pattern, f"line\n  {secret}\n") for pattern in SECRETS)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_listens_for_the_world(path: Path) -> None:
    """No dashboard binds to all interfaces, a public load balancer or an open port."""
    text = path.read_text()
    assert not re.search(r"dashboard[-_]host[ =:]+[\"']?(?!127\.0\.0\.1)\S", text)
    assert not re.search(r"0\.0\.0\.0|::/0|LoadBalancer|NodePort|hostNetwork|hostPort|kind: Ingress", text)


def test_words_to_avoid_are_found_in_docstrings_comments_messages_and_names(tmp_path: Path) -> None:
    """`.ci/words` names the line of each fault, and passes a file without one."""
    faults = runpy.run_path(str(ROOT / ".ci" / "words"))["faults"]
    (tmp_path / "bad.py").write_text(
        '"""Numbers."""\n\nsize = 1\n"""Of an image."""\nclass NoPulse:\n    """The crew."""\n\n'  # former name
        'def f(told: int) -> str:\n    """The same."""\n    return "a promise"\n'
        'old = "told"  # former name\nnew = 1  # as far as known\n'
        'has_place = 1  # makes room\nnew = "look at it, then hand it in"\nold = "hands in its work"\n'  # former name
    )
    found = [fault.removeprefix(f"{tmp_path / 'bad.py'}:").split(":")[:2] for fault in faults(tmp_path / "bad.py")]
    assert sorted((int(line), what.strip()) for line, what in found) == [
        (4, "a docstring begins with 'Of'"),
        (5, "'Pulse'"),  # former name
        (6, "'crew'"),  # former name
        (8, "'told'"),  # former name
        (9, "a docstring begins with 'The same'"),
        (10, "'promise'"),  # former name
        (12, "'as far as'"),  # former name
        (13, "'has place'"),  # former name
        (13, "'room'"),  # former name
        (14, "'look at'"),  # former name
        (15, "'hands in'"),  # former name
    ]
    (tmp_path / "good.py").write_text('"""Numbers."""\n\nsize = 1\n"""Size of an image in pixels; None keeps it."""\n')
    assert not list(faults(tmp_path / "good.py"))
