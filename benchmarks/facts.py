"""What all results have in common: the command, the machine, versions, commit and date above them; their files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from datm_ray.monitor.provenance import provenance

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PLACES = ("--runs", "--cifar", "--out")
"""Options that name folders of one machine; they decide no result."""
UNITS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "sve": "SVE",
    "asimd": "NEON",
}
"""Flag of a CPU in /proc/cpuinfo -> its vector units, the widest first. They decide the speed."""
GOES = "goes.json"
"""File in a folder of runs: which version worked on them, and for how long."""


def sizes_and_places(description: str | None) -> argparse.ArgumentParser:
    """Options that nearly all benchmarks have: tiny sizes, and the folder of the results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; written nowhere unless --out is given")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results unless --quick")
    return parser


def parsed(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line with `sizes_and_places`. Its `out` is `None` if nothing is to be written."""
    arguments = parser.parse_args(words)
    arguments.out = arguments.out or (None if arguments.quick else RESULTS)
    return arguments


def common_facts(program: str, words: Sequence[str], device: str = "cpu", runs: Path | None = None) -> dict[str, str]:
    """Facts above every result: command, machine, versions, commit and date.

    Args:
        runs: folder of runs that several calls of the program may have worked on, see `going`; `None` without one.
    """
    versions = provenance(torch.device("cpu"))["versions"]
    return {
        "command": " ".join(["python", f"benchmarks/{Path(program).name}", *without_places(words)]),
        "hardware": hardware(device)[1],
        "versions": f"Python {platform.python_version()}, " + ", ".join(map(" ".join, versions.items())),
        **({"commit": commit()} if runs is None else _goes(runs)),
        "date": str(date.today()),
    }


@contextmanager
def going(runs: Path) -> Iterator[None]:
    """Note in a folder of runs that this version works on them, and how long the block took once it ends."""
    goes = _read_goes(runs)
    goes.append({"commit": commit(), "began": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "seconds": None})
    started = time.monotonic()
    write_whole(runs / GOES, goes)
    yield
    goes[-1]["seconds"] = round(time.monotonic() - started)
    write_whole(runs / GOES, goes)


def _read_goes(runs: Path) -> list[dict[str, Any]]:
    place = runs / GOES
    found: list[dict[str, Any]] = json.loads(place.read_text()) if place.exists() else []
    return found


def write_whole(place: Path, content: Any) -> None:
    """Write a JSON file that is never seen half written."""
    unfinished = place.with_name(f"{place.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, place)


def _goes(runs: Path) -> dict[str, str]:
    goes = _read_goes(runs)
    ended = [each["seconds"] for each in goes if each["seconds"] is not None]
    broken = f", {len(goes) - len(ended)} of them interrupted and not counted" if len(ended) < len(goes) else ""
    return {
        "commit": ", ".join(dict.fromkeys(each["commit"] for each in goes)),
        "took": f"{sum(ended) / 60:.0f} minutes in {len(goes)} go(es){broken}",
    }


def counted(distillations: int, networks: int) -> dict[str, str]:
    """Describe how many repetitions were made, and with which seeds."""
    return {
        "seeds": f"{distillations} distillation(s) of each row (seeds 0 to {distillations - 1}), "
        f"{networks} freshly trained networks for each (numbers 0 to {networks - 1})"
    }


def head(title: str, facts: Mapping[str, str]) -> list[str]:
    """First lines of a page in Markdown: its title and the facts."""
    return [f"# {title}", "", *(f"{key}: {value}  " for key, value in facts.items()), ""]


def result_path(out: Path, name: str, device: str = "cpu") -> Path:
    """Path of a result without its suffix, named by machine and month."""
    return out / f"{name}_{hardware(device)[0]}_{date.today():%Y%m}"


def in_folder(path: Path) -> Path:
    """Return the path of a file to write, after making its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Write a Markdown page for readers. The path has no suffix."""
    in_folder(path.with_suffix(".md")).write_text("\n".join(lines) + "\n")


def save(path: Path, lines: Sequence[str], result: Mapping[str, Any]) -> None:
    """Write a Markdown page for readers, and a JSON file with the numbers for programs. The path has no suffix."""
    write_page(path, lines)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def present(out: Path | None, name: str, lines: Sequence[str], numbers: Mapping[str, Any], device: str = "cpu") -> None:
    """Print a page, and save it with its numbers in the folder `out`; nowhere if that is `None`."""
    print("\n".join(lines))
    if out:
        save(result_path(out, name, device), lines, numbers)


def without_places(words: Sequence[str]) -> list[str]:
    """A command line without the folders of one machine."""
    kept = []
    for before, word in zip(("", *words), words, strict=False):
        if before not in PLACES and word.partition("=")[0] not in PLACES:
            kept.append(word)
    return kept


def hardware(device: str) -> tuple[str, str]:
    """Hardware as a name for files, and as one for readers.

    CPUs with other names or vector units have other names for files, so that no machine overwrites another's page.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return name.lower().replace(" ", "-"), name
    model = provenance(torch.device("cpu"))["processor"]  # former name
    cores, units = len(os.sched_getaffinity(0)), vector_units()
    memory = f"{status('MemTotal', '/proc/meminfo') / 2**30:.0f} GiB"
    name = re.sub(r"[^a-z0-9]+", "-", f"{cores} core {model} {units}".lower().replace("(r)", "")).strip("-")
    return name, f"{cores} cores of {model}{f' ({units})' if units else ''}, {memory}"


def vector_units(path: str = "/proc/cpuinfo") -> str:
    """The widest vector units of this machine's CPU, in words; "" if the system does not say."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return next((words for flag, words in UNITS.items() if flag in flags), "")


def status(field: str, path: str = "/proc/self/status") -> int:
    """Value of a field of a file in /proc that is given in kB, in bytes."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def commit() -> str:
    """Commit of this repository, and whether tracked files differ from it. Pages of results do not count."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + (", changed" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
