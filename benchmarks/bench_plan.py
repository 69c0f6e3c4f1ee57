"""What `datm-ray plan` says against short runs, stage by stage: CPU seconds, and memory of the distilling worker.

python benchmarks/bench_plan.py [--quick]         (make bench-plan)

Every case plans a run of made-up images of its shape, with and without `--measure`, and then runs it in one process.
Neither time nor memory depends on what the images show. `--quick` takes the smallest case, without `--measure`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from facts import common_facts, head, parsed, present, sizes_and_places
from PIL import Image

CASES: dict[str, tuple[str, int, dict[str, object]]] = {
    "digits, IPC 1": ("digits-ipc1", 0, {"distill.iterations": 40}),
    "CIFAR-10's shape, width 64": ("cifar10-ipc1", 32, {"network.width": 64, "distill.student_steps": 12}),
    "Tiny-ImageNet's shape, width 32": ("tiny-imagenet-ipc1", 64, {"network.width": 32, "distill.student_steps": 12}),
}
"""Name -> recipe, side of the made-up images (0: real digits), further settings."""
SHORT: dict[str, object] = {
    "experts.count": 2,
    "evaluate.seeds": 1,
    "evaluate.protocol": "short",
    "cluster.workers": 1,
}
SMALL: dict[str, object] = {
    "dataset.source": "folder",
    "dataset.normalisation": "standard",
    "experts.epochs": 12,
    "experts.batch_size": 64,
    "distill.iterations": 20,
    "distill.start_epochs": [0, 4],
    "distill.threshold": 1e9,
    "distill.validate_every": 20,
    "evaluate.real_epochs": 10,
}
"""SHORT: settings of all cases. SMALL: further settings of cases with made-up images."""
STAGES, MEMORY = ("experts", "distillation", "evaluation"), "memory, MiB"
HEADER = """CPU seconds of one worker with one thread, planned and taken, with other work on the machine or not: small
steps timed in a few seconds, the run's own steps with `--measure`, and the run. Starting is not part of them. Memory:
largest of the process that distils, against the estimate with its margin."""
COLUMNS = (
    "| | stage | planned | planned with `--measure` | taken | taken / planned | taken / planned with `--measure` |"
)


def made_up(folder: Path, side: int) -> Path:
    """Write a folder with 80 images of noise in each of 10 classes, 20 of them for testing. Returns the folder."""
    draw = np.random.default_rng(0)
    for part, each in (("train", 60), ("test", 20)):
        for number in range(10 * each):
            place = folder / part / str(number % 10) / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)).save(place)
    return folder


def datm_ray(*arguments: str) -> str:
    """Run a `datm-ray` command with these arguments. Returns what it prints on standard output."""
    command = [sys.executable, "-m", "datm_ray", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def planned(words: list[str], *options: str) -> dict[str, float]:
    """Row of the table -> CPU seconds that a plan says, and MiB of memory."""
    plan = json.loads(datm_ray("plan", *words, *options, "--json"))[0]
    seconds = {stage: 3600 * plan["hours"][stage] for stage in STAGES}
    seconds["distillation"] += 3600 * plan["hours"]["validation"]
    return seconds | {"in all": sum(seconds.values()), MEMORY: plan["memory"][0]["bytes"] / 2**20}


def taken(words: list[str], out: Path) -> dict[str, float]:
    """Row of the table -> CPU seconds that a run takes, and MiB of memory."""
    datm_ray("run", *words, "--out", str(out), "--executor", "serial", "--quiet")
    distilled = json.loads((out / words[0] / "cost.json").read_text())
    results = [*out.glob("controls/*/*.json"), *out.glob("*/evaluation/*.json")]
    scored = [json.loads(each.read_text())["cost"] for each in results]
    trained = [each["spent"] for each in json.loads((out / words[0] / "experts-cost.json").read_text())]
    costs = zip(STAGES, (trained, [distilled], scored), strict=True)
    seconds = {stage: sum(each["cpu_seconds"] for each in own) for stage, own in costs}
    return seconds | {"in all": sum(seconds.values()), MEMORY: distilled["peak_memory_bytes"] / 2**20}


def compared(name: str, folder: Path, *, measure: bool) -> dict[str, dict[str, float]]:
    """Column of the table -> its rows. Without `measure`, both columns of plans are equal."""
    recipe, side, more = CASES[name]
    settings = {**SHORT, **(SMALL if side else {}), **more}
    if side:
        settings["dataset.path"] = str(made_up(folder / "images", side))
    words = [recipe, *(word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}"))]
    quick = planned(words)
    exact = planned(words, "--measure") if measure else quick
    return {"planned": quick, "measured": exact, "taken": taken(words, folder / "out")}


def rows(name: str, found: dict[str, dict[str, float]]) -> list[str]:
    """Lines of the table."""
    quick, exact, spent = found["planned"], found["measured"], found["taken"]
    return [
        f"| {name} | {row} | {quick[row]:,.0f} | {exact[row]:,.0f} | {spent[row]:,.0f} "
        f"| {spent[row] / quick[row]:.2f} | {spent[row] / exact[row]:.2f} |"
        for row in spent
    ]


def main() -> None:
    """Compare all cases; print and save the table."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--runs", type=Path, help="folder of the runs; a temporary one")
    arguments = parsed(parser)
    runs = arguments.runs or Path(tempfile.mkdtemp(prefix="bench-plan-"))
    names = list(CASES)[: 1 if arguments.quick else None]
    found = {name: compared(name, runs / str(n), measure=not arguments.quick) for n, name in enumerate(names)}
    facts = common_facts(__file__, sys.argv[1:])
    lines = [*head("Plan against short runs", facts), HEADER, "", COLUMNS, "|" + " --- |" * (COLUMNS.count("|") - 1)]
    lines += [line for name, each in found.items() for line in rows(name, each)]
    present(arguments.out, f"plan{'-quick' if arguments.quick else ''}", lines, {**facts, **found})


if __name__ == "__main__":
    main()
