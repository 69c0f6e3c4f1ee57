"""Readers of the files under cluster/, and of the commands that documents give to users."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(CLUSTER.rglob("README.md")),
]
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")])


def documents(path: Path) -> list[dict[str, Any]]:
    """All documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def document(path: Path, kind: str) -> dict[str, Any]:
    """The one document of a kind in a file of Kubernetes manifests."""
    (found,) = [each for each in documents(path) if each["kind"] == kind]
    return found


def ray_version() -> str:
    """Version of Ray in the image, which all other files must repeat."""
    (version,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    return str(version)


def shell_blocks(readme: Path) -> list[str]:
    """Contents of the ```sh blocks of a README."""
    return re.findall(r"^```sh\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)


def commands(shell: str) -> list[list[str]]:
    """Simple commands of a piece of shell as words, without variables set in front, redirections and comments."""
    found: list[list[str]] = []
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()")
        lexer.whitespace_split = True
        words: list[str] = []
        given = list(lexer)
        for place, word in enumerate([*given, ";"]):
            if ">" in (word, given[place - 1] if place else ""):
                continue
            if set(word) <= set("|&;()"):
                found += [words] if words else []
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
    return found


def documented_commands() -> list[tuple[str, list[str]]]:
    """Every whole `datm-ray` command that READMEs, scripts and manifests give to users, with its place."""
    found = [(readme, words) for readme in DOCUMENTS for text in shell_blocks(readme) for words in commands(text)]
    found += [  # those that another command starts
        (readme, words[words.index("datm-ray") :])
        for readme, words in found
        if words[0] in ("ray", "srun") and "datm-ray" in words
    ]
    for script in SCRIPTS:
        text = re.sub(r"\$\w+", "1", script.read_text().replace('"$@"', "digits-ipc1"))
        found += [(script, words) for line in re.findall(r"datm-ray (?:run|job) .*", text) for words in commands(line)]
    for manifest in MANIFESTS:
        entrypoints = [each["spec"].get("entrypoint") for each in documents(manifest) if "spec" in each]
        found += [(manifest, shlex.split(each)) for each in entrypoints if each]
    return [(str(path.relative_to(ROOT)), words) for path, words in found if words[0] == "datm-ray"]


def mentioned_commands() -> list[tuple[str, list[str]]]:
    """Every `datm-ray` command that a README names within a sentence, whole or not."""
    return [
        (str(readme.relative_to(ROOT)), shlex.split(text))
        for readme in DOCUMENTS
        for text in re.findall(r"`(datm-ray [^`]+)`", readme.read_text())
    ]
