"""What `datm-ray init` and `datm-ray run` reach on images of one's own, with nothing tuned by hand.

python benchmarks/bench_own_images.py --data FOLDER [--minutes 15] [--ipc 1 10] [--seeds 3] [--cases digits-16 ...]

The cases are parts of real data sets, written as folders of images. The recipe of each is what `init` writes for the
time; a seed draws its own experts, set and networks. Only one command runs at a time. The folder of runs is kept;
running the command again resumes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from cifar_part import FILES as CIFAR
from facts import common_facts, going, head, parsed, present, write_whole
from PIL import Image
from program import options, settled, start
from tables import table

from datm_ray.errors import DatasetError
from datm_ray.stages.distill.checkpoint import read_curves
from datm_ray.store.files.filesystem import open_location

TINY = ("tinyimagenet-100-per-class-train.parquet", "tinyimagenet-25-per-class-val.parquet")

Counts = dict[int, tuple[int, int]]
"""Label -> number of training and of test images."""


def every(classes: int, of: int, train: int, test: int) -> Counts:
    """Classes that are spread evenly over those of a data set, with as many images of each."""
    return {number * of // classes: (train, test) for number in range(classes)}


CASES: dict[str, tuple[tuple[str, str], Counts, int | None]] = {
    "tiny64-10": (TINY, every(10, 200, 100, 25), None),
    "tiny64-20": (TINY, every(20, 200, 100, 25), None),
    "grey32-10": (TINY, every(10, 200, 100, 25), 32),
    "grey32-20": (TINY, every(20, 200, 100, 25), 32),
    "cifar10-500": (CIFAR, every(10, 10, 500, 200), None),
    "unbalanced-3": (TINY, {0: (100, 25), 60: (60, 25), 120: (25, 25)}, None),
    "digits-16": (("", ""), {}, None),
}
"""Case -> files, images of each class, and the side in pixels of grey images; `None` for colour at the files' size."""


def write_case(name: str, data: Path, folder: Path) -> None:
    """Write the images of a case as `train/CLASS/` and `test/CLASS/`.

    Raises:
        DatasetError: the files are not there.
    """
    import pyarrow.parquet as pq

    files, counts, grey = CASES[name]
    for part, (split, file) in enumerate(zip(("train", "test"), files, strict=True)):
        if not (data / file).is_file():
            raise DatasetError(f"{data} holds no {file}", remedy="give its folder with --data, or other --cases")
        rows = pq.read_table(data / file)
        labels = rows["label"].to_numpy()
        for label, numbers in counts.items():
            place = folder / split / f"class{label:03d}"
            place.mkdir(parents=True, exist_ok=True)
            chosen = np.flatnonzero(labels == label)[: numbers[part]]
            for number, each in enumerate(rows["image"].take(chosen).to_pylist()):
                write_image(each["bytes"], place / f"{number:04d}", grey)


def write_image(encoded: bytes, place: Path, grey: int | None) -> None:
    """Write an image in grey, with sides of `grey` pixels; unchanged if `grey` is `None`."""
    if grey is None:
        place.with_suffix(".jpg").write_bytes(encoded)
        return
    image = Image.open(io.BytesIO(encoded)).convert("L")
    image.resize((grey, grey), Image.Resampling.BICUBIC).save(place.with_suffix(".png"))


EVERY = 5.0
"""Seconds between two notes of the time that a command has taken."""


def timed(words: Sequence[str], place: Path) -> float:
    """Run a command to its end. Returns its seconds, those of earlier, interrupted calls included.

    The seconds so far are noted in the file `place` every `EVERY` seconds, so a killed benchmark loses no more.

    Raises:
        CalledProcessError: the command failed.
    """
    before, began = (json.loads(place.read_text()) if place.exists() else 0.0), time.monotonic()
    with subprocess.Popen(words) as process:
        code = None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(EVERY)
            write_whole(place, before + time.monotonic() - began)
    if code:
        raise subprocess.CalledProcessError(code, list(words))
    return float(json.loads(place.read_text()))


def run_case(name: str, ipc: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the recipe of a case and run it with a seed, unless this is done already. Returns what was measured."""
    runs: Path = arguments.runs
    folder, run = runs / "cases" / name, f"{name}-ipc{ipc}"
    out = runs / f"{run}-seed{seed}"  # one folder a run, because a run that found experts would take less time
    recipe, done = runs / f"{run}.yaml", out / f"{run}.json"
    if name != "digits-16" and not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        write_case(name, arguments.data, unfinished)
        os.replace(unfinished, folder)
    if not recipe.exists():
        source = ["digits", "--resize", "16"] if name == "digits-16" else [str(folder)]
        wish = ["--ipc", str(ipc), "--minutes", str(arguments.minutes), "--name", run, "--out", str(recipe), "--json"]
        printed = subprocess.run(
            [sys.executable, "-m", "datm_ray", "init", *source, *wish], check=True, capture_output=True, text=True
        )
        recipe.with_suffix(".json").write_text(printed.stdout)
    if not done.exists():
        out.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "datm_ray", "run", str(recipe), "--set", f"seed={seed}", "--out", str(out)]
        seconds = timed(command, out / f"{run}.seconds")
        done.write_text(json.dumps({"seconds": seconds}))
    (summary,) = [each for each in json.loads((out / "summary.json").read_text()) if each["run"] == run]
    curves = read_curves(open_location(str(out / run)))
    plan = json.loads(recipe.with_suffix(".json").read_text())["plan"]
    return {
        "case": name,
        "ipc": ipc,
        "seed": seed,
        "planned_seconds": 3600 * sum(plan["clock_hours"].values()),
        "seconds": json.loads(done.read_text())["seconds"],
        "planned_cpu_seconds": 3600 * sum(held for stage, held in plan["hours"].items() if stage != "start"),
        "cpu_seconds": sum(part["cpu_seconds"] for part in summary["cost"]),
        "skipped_share": float(np.mean(curves["history.skipped"])),
        "test_accuracy": {row: each["seeds"] for row, each in summary["test_accuracy"].items()},
        "recipe": summary["recipe"],
    }


def rows_of(results: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """One row of the table for each case and number of images per class."""
    for name, ipc in dict.fromkeys((each["case"], each["ipc"]) for each in results):
        own = [each for each in results if (each["case"], each["ipc"]) == (name, ipc)]
        cells, means = [], {}
        for row in ("random-hard", "random-soft", "distilled"):
            found = [100 * value for each in own for value in each["test_accuracy"].get(row, [])]
            means[row] = (statistics.fmean(found), statistics.stdev(found) if found[1:] else float("nan"))
            cells.append(f"{means[row][0]:.1f} ± {means[row][1]:.1f}")
        (control, spread), (mean, own_spread) = means["random-soft"], means["distilled"]
        above = (mean - control) / max(spread, own_spread, 1e-9)
        yield [
            f"{name}, IPC {ipc}",
            *cells,
            f"{above:.1f}",
            f"{max(each['skipped_share'] for each in own):.1%}",
            " ".join(f"{each['seconds'] / each['planned_seconds']:.2f}" for each in own),
            " ".join(f"{each['cpu_seconds'] / each['planned_cpu_seconds']:.2f}" for each in own),
            str(len(own)),
        ]


HEAD = [
    *("case", "random, hard", "random, soft", "distilled", "above by", "skipped at most"),
    *("taken / planned", "the same by CPU", "n"),
]
"""Titles of the columns. "above by" is in units of the larger of both standard deviations. CPU time is that of workers,
without their start, and does not depend on other work on the machine."""


def main() -> None:
    """Run the cases and write the tables."""
    parser = options(__doc__, "runs/own-images", seeds=3)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--minutes", type=float, default=15.0, help="time of each run")
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = settled(parser, parsed(parser))
    results = []
    with going(arguments.runs):
        for seed in range(arguments.seeds):
            for name in arguments.cases:
                results += [run_case(name, ipc, seed, arguments) for ipc in arguments.ipc]
    facts = common_facts(__file__, sys.argv[1:], runs=arguments.runs)
    lines = [*head("Images of one's own: init and run", facts), *table(HEAD, list(rows_of(results)))]
    present(arguments.out, "own-images", lines, {"facts": facts, "results": results})


if __name__ == "__main__":
    start(main)
