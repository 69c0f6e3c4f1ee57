"""The command line that benchmarks of whole runs share: options, checks before the work, errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from facts import common_facts, counted, sizes_and_places

from datm_ray.config import RunConfig
from datm_ray.errors import DatmError
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import Executor


def options(description: str | None, runs: str, seeds: int) -> argparse.ArgumentParser:
    """Options of every benchmark of whole runs; `runs` and `seeds` are defaults."""
    parser = sizes_and_places(description)
    parser.add_argument("--distillations", type=positive, default=1, help="of each row, with seeds of their own")
    parser.add_argument("--seeds", type=positive, default=seeds, help="networks for each set")
    parser.add_argument("--executor", choices=["ray", "serial"], default="ray")
    parser.add_argument("--runs", type=Path, help=f"folder of the runs; {runs}, with --quick {runs}-quick")
    parser.set_defaults(default_runs=Path(runs))
    return parser


def settled(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    """Options with the folder of runs filled in, and all folders created, so that an unwritable one fails early."""
    default: Path = arguments.default_runs
    arguments.runs = arguments.runs or default.with_name(default.name + ("-quick" if arguments.quick else ""))
    for folder in (arguments.runs, arguments.out):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as failure:
                parser.error(f"{folder} cannot be made a folder: {failure.strerror}")
    return arguments


def run(configs: Sequence[RunConfig], kind: type[Pipeline], folder: Path, executor: str) -> Pipeline:
    """Run all unfinished stages of some runs."""
    pipeline = kind(configs, str(folder), alone=executor == "serial")
    start: Callable[[], Executor] = lambda: create_executor(executor, configs[0].cluster, None)  # noqa: E731
    pipeline.run_all(start, Reporter())
    return pipeline


def in_turns(groups: Mapping[Any, list[RunConfig]]) -> list[RunConfig]:
    """Runs of all groups, one distillation of each in turn, so that an interrupted benchmark still compares groups."""
    return [config for seed in zip(*groups.values(), strict=True) for config in seed]


def facts_of(program: str, words: Sequence[str] | None, arguments: argparse.Namespace) -> dict[str, str]:
    """Facts above the results of whole runs, with their sessions and seeds.

    Args:
        words: arguments of the command line; `None` for those of this process.
    """
    facts = common_facts(program, sys.argv[1:] if words is None else words, runs=arguments.runs)
    return facts | counted(arguments.distillations, arguments.seeds)


def resolved(groups: Mapping[str, list[RunConfig]], pipeline: Pipeline) -> dict[str, list[RunConfig]]:
    """Groups of runs as the pipeline has them, with the values that image sizes decide filled in."""
    found = {config.name: config for config in pipeline.configs}
    return {name: [found[config.name] for config in configs] for name, configs in groups.items()}


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def start(main: Callable[[], object]) -> None:
    """Run a program. An error of this package is shown in one line, and decides the exit code."""
    try:
        main()
    except DatmError as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.exit_code)
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
