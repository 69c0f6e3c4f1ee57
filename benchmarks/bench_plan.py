"""What `datm-ray plan --measure` says against short distillations: seconds of an iteration, memory of a worker.

python benchmarks/bench_plan.py [--quick]         (make bench-plan)

Every case distils made-up images of its shape for a few iterations in a process of its own, after one expert of one
epoch: neither time nor memory depends on what is on the images. `--quick` takes the smallest case alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from facts import common_facts, head, result_path, save
from PIL import Image

from datm_ray.config import RunConfig, override, to_yaml
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.planning.duration import Proposal, measured, show_number
from datm_ray.planning.fit import data_shape, plans_of, total
from datm_ray.planning.machines import machine_here
from datm_ray.recipes import get_recipe
from datm_ray.runtime.executor import Event, Progress, SerialExecutor, Task
from datm_ray.stages.distill import read_cost
from datm_ray.store.trajectories import size_in_words

CASES = {
    "digits, IPC 1": ("digits-ipc1", 0, 0, ()),
    "digits, IPC 10": ("digits-ipc10", 0, 0, ()),
    "CIFAR-10's shape, IPC 10": ("cifar10-ipc10", 32, 10, ("distill.student_steps=3",)),
    "Tiny-ImageNet's shape, IPC 1": ("tiny-imagenet-ipc1", 64, 200, ("distill.student_steps=2",)),
}
"""Name -> recipe, side of the made-up images (0: real digits), classes, further overrides."""
SHORT = (
    "name=plan",
    "experts.count=1",
    "experts.epochs=1",
    "experts.optimiser=sgd",
    "experts.keep_epochs=1",
    "distill.iterations=8",
    "distill.expert_epochs=1",
    "distill.start_epochs=[0, 1]",
    "distill.initial=random",
    "distill.labels=hard",
    "distill.threshold=1e9",
    "distill.validate_every=8",
    "distill.validation_seeds=1",
    "evaluate.protocol=quick",
    "cluster.workers=1",
    "cluster.device=cpu",
    "dataset.normalisation=standard",
)
HEADER = """Predicted before each run started. Seconds are CPU seconds of one thread, in which other work on the machine
counts little: of the steps that `--measure` times, and of an iteration (median, the first left out). Memory: largest
resident memory of the process that distils, against the estimate with its margin."""


COLUMNS = (
    "| | CPU seconds of an iteration: roughly | with --measure | measured | measured / predicted "
    "| memory: predicted | measured | measured / predicted |"
)


def made_up(folder: Path, side: int, classes: int, each: int = 20) -> Path:
    """A Parquet file of noise."""
    draw = np.random.default_rng(0)
    files = []
    for number in range(classes * each):
        place = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)).save(place)
        files.append({"bytes": place.read_bytes(), "path": None})
        place.unlink()
    table = pa.table({"image": files, "label": [number % classes for number in range(classes * each)]})
    pq.write_table(table, folder / "train.parquet")
    pq.write_table(table, folder / "test.parquet")
    return folder


def case_of(name: str, folder: Path) -> RunConfig:
    """Recipe of a case, with its images below the folder."""
    recipe, side, classes, more = CASES[name]
    data = [f"dataset.path={json.dumps(str(made_up(folder, side, classes)))}", "dataset.source=parquet"] if side else []
    return override(get_recipe(recipe), [*SHORT, *more, *data])


def predicted(config: RunConfig, out: str) -> dict[str, float]:
    """Planned seconds of an iteration and bytes of a worker."""
    shape = data_shape(config.dataset)
    config = config.resolved(shape.image[1:])
    plain = Proposal(config, shape, plans_of(config, shape), machine_here(config))
    time.perf_counter = time.process_time
    timed = replace(plain, machine=measured(plain))
    return {
        "seconds": sum(timed.iteration),
        "seconds without --measure": sum(plain.iteration),
        "bytes": float(total(plain.plans[0].parts)),
    }


def train_expert(config: RunConfig, out: str) -> dict[str, float]:
    """Train and store the expert."""
    pipeline = Pipeline([config], out, alone=True)
    pipeline.train_experts(lambda: SerialExecutor(config.cluster), Reporter(quiet=True))
    return {}


def distil(config: RunConfig, out: str) -> dict[str, float]:
    """CPU seconds of an iteration, and peak bytes of this process."""
    moments: list[float] = []

    class Noting(Reporter):
        """A reporter that notes, in CPU seconds, when iterations end."""

        @contextmanager
        def stage(self, title: str, tasks: int) -> Iterator[Any]:
            yield self

        def event(self, task: Task, event: Event) -> None:
            if isinstance(event, Progress):
                moments.append(time.process_time())

    pipeline = Pipeline([config], out, alone=True)
    pipeline.distill(lambda: SerialExecutor(config.cluster), Noting(quiet=True))
    return {
        "seconds": statistics.median(later - earlier for earlier, later in itertools.pairwise(moments[:-1])),
        "bytes": read_cost(pipeline.out / config.name).peak_memory_bytes,
    }


PARTS = {"predicted": predicted, "expert": train_expert, "measured": distil}
"""What a process of its own does, in this order."""


def compared(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """Predicted and measured values of each part of a case."""
    folder.mkdir(parents=True)
    (folder / "plan.yaml").write_text(to_yaml(case_of(name, folder)))
    found = {}
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part, "--runs", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}, {part}: {found[part]}", flush=True)
    return found


def row(name: str, found: dict[str, dict[str, float]]) -> str:
    """Format one line of the table."""
    before, after = found["predicted"], found["measured"]
    texts = [show_number(before["seconds without --measure"]), show_number(before["seconds"])]
    texts += [show_number(after["seconds"]), f"{after['seconds'] / before['seconds']:.2f}"]
    texts += [size_in_words(before["bytes"]), size_in_words(after["bytes"]), f"{after['bytes'] / before['bytes']:.2f}"]
    return f"| {name} | {' | '.join(texts)} |"


def main() -> None:
    """Compare all cases; print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest case; written nowhere without --out")
    parser.add_argument("--runs", type=Path, help="folder of the runs; a temporary one")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results unless --quick")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        config = get_recipe(str(arguments.runs / "plan.yaml"))
        print(json.dumps(PARTS[arguments.part](config, str(arguments.runs / "out"))))
        return
    runs = arguments.runs or Path(tempfile.mkdtemp(prefix="bench-plan-"))
    names = list(CASES)[: 1 if arguments.quick else None]
    found = {name: compared(name, runs / str(number)) for number, name in enumerate(names)}
    facts = common_facts(__file__, sys.argv[1:])
    lines = [*head("Plan against short runs", facts), HEADER, "", COLUMNS, "|" + " --- |" * (COLUMNS.count("|") - 1)]
    lines += [row(name, each) for name, each in found.items()]
    print("\n".join(lines))
    out = arguments.out or (None if arguments.quick else Path(__file__).parent / "results")
    if out:
        save(result_path(out, f"plan{'-quick' if arguments.quick else ''}"), lines, {**facts, **found})


if __name__ == "__main__":
    main()
