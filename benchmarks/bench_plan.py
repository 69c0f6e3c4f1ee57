"""What `datm-ray plan` says against a real run: seconds, memory, traffic and files of a distillation of two shards.

python benchmarks/bench_plan.py --data TRAIN.parquet [--quick]         (make bench-plan DATA=...)

The prediction is made first and written down; the constants of the model were measured at 32x32 (see
`datm_ray/runtime/cost.py`), the run is another network on other images. Then `datm-ray distill` runs on Ray, in a
network of its own where the system allows it, until it has written some checkpoints, and is killed with everything it
started. The same command goes on from there, writes some more, and is killed again: the end of a distillation trains
500 epochs for validation, which would take hours here. `--quick` takes digits and a tiny network, and checks the way
and not the numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import hardware, head, result_path, save

from datm_ray.config import RunConfig, override, to_yaml
from datm_ray.recipes import get_recipe
from datm_ray.runtime.cost import (
    STAGES,
    WRITE_RATE,
    Described,
    assumptions,
    checkpoint_bytes,
    machine_of,
    parse_cluster,
)
from datm_ray.runtime.distill import INITIAL
from datm_ray.runtime.plan import Layout, data_shape, parse_shape
from datm_ray.runtime.speed import product_rate
from datm_ray.runtime.workload import Proposal, as_it_is, propose, show_number, storage, transform_bytes
from datm_ray.store.filesystem import open_location
from datm_ray.store.tensors import read_tensors
from datm_ray.store.trajectories import size_in_words

SHARDS = 2
LOOK = 0.1
"""Seconds between two looks at the run."""
WITHIN = 0.25
"""By which a prediction may be off."""

TINY_IMAGENET = (
    "name=plan",
    "dataset.source=parquet",
    "dataset.normalisation=standard",
    "experts.count=1",
    "experts.epochs=1",
    "experts.optimiser=sgd",
    "experts.keep_epochs=1",
    "distill.expert_epochs=1",
    "distill.first_start=0",
    "distill.start_bound=1",
    "distill.final_start_bound=1",
    "distill.batch_size=200",
    "distill.student_steps=5",
    "distill.threshold=10",
    "distill.checkpoint_every=1",
    "cluster.memory=6GiB",
)
"""IPC 50 over 200 classes as in the recipe, with smaller batches, fewer student steps and one expert of one epoch."""
DIGITS = (
    "name=plan",
    "network.width=4",
    "experts.count=1",
    "experts.epochs=2",
    "experts.keep_epochs=1",
    "distill.ipc=2",
    "distill.iterations=5000",
    "distill.student_steps=3",
    "distill.expert_epochs=1",
    "distill.first_start=0",
    "distill.start_bound=1",
    "distill.final_start_bound=1",
    "distill.threshold=10",
    "distill.validate_every=5000",
    "distill.checkpoint_every=1",
    "cluster.compile=false",
    "cluster.memory=3GiB",
)

HEADER = """`predicted` was written before the run started. `measured`: in two parts, the first killed with SIGKILL
together with all it had started, the second the same command again.

- an iteration: from one checkpoint to the next, so with its checkpoint; median, the first of each part left out.
- computing: CPU seconds of the busier worker in an iteration, which do not count that other work shares the processors,
  nor what a worker waits for the other.
- first images: CPU seconds of the busier worker until the initial set's file was there, imports included. `plan` itself
  assumes that the expert gets half of the images right; one of one epoch gets few, so all images were looked at, and
  this is what is predicted here.
- memory: largest resident memory of a worker, without what it shares with others, while it matches; predicted are
  process, set, network, trace and one micro-batch of the plan.
- traffic: what the loopback device of the run's own network namespace sent in an iteration, headers and Ray's own
  messages included, for each worker.
- store, checkpoint, initial set: of the files."""


@dataclass
class Part:
    """What was seen of one part of the run."""

    started: float
    checkpoints: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, iterations done)."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of the busiest worker so far, at each checkpoint."""
    sent: list[int] = field(default_factory=list)
    """Bytes that the loopback device had sent, at each checkpoint."""
    initial_cpu: float = 0.0
    """CPU seconds that the busier worker had computed when the initial set was there."""
    peak: int = 0
    """Bytes, from the first checkpoint on."""
    peak_of_all: int = 0


def status_of(process: int, *names: str) -> dict[str, int]:
    """Lines of a process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in names}


def children_of(process: int) -> list[int]:
    """All processes that a process started, and those that they did."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [process]
    while queue:
        more = parents.get(queue.pop(), [])
        found += more
        queue += more
    return found


def distilling(processes: list[int]) -> list[int]:
    """Of these, the workers that distil; Ray names a process after its actor."""
    found = []
    for process in processes:
        with suppress(OSError):
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::DistillWorker"):
                found.append(process)
    return found


def cpu_seconds(process: int) -> float:
    """That a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loopback_bytes(process: int) -> int:
    """That the loopback device of a process's network has sent."""
    lines = Path(f"/proc/{process}/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def own_network() -> list[str]:
    """What to put before a command so that it has a loopback device to itself; nothing where that is not allowed."""
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    with suppress(OSError):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return []


def run_until(command: list[str], folder: Path, checkpoints: int, limit: float) -> Part:
    """Start the run, watch it until it has written so many checkpoints, and kill it with all it started."""
    log = (folder.parent / "run.log").open("a")
    ordinary = {
        **os.environ,
        "RAY_worker_niceness": "0",
    }  # Ray's 15 would let any other process of the machine go first
    child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=ordinary)
    with suppress(OSError):  # what else the machine does waits, where the user may say so
        Path(f"/proc/{child.pid}/autogroup").write_text("-10")
    part = Part(time.monotonic())
    try:
        for _ in looks(child, limit, log.name):
            look(part, child.pid, folder)
            if len(part.checkpoints) >= checkpoints:
                return part
    finally:
        for process in [*children_of(child.pid), child.pid]:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        child.wait()
        log.close()
    raise SystemExit(f"fewer than {checkpoints} checkpoints in {limit:g} s; see {log.name}")


def looks(child: subprocess.Popen[bytes], limit: float, log: str) -> Iterator[None]:
    """As long as the child runs and there is time."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if child.poll() is not None:
            raise SystemExit(f"the run ended with exit code {child.returncode}; see {log}")
        yield
        time.sleep(LOOK)


def look(part: Part, process: int, folder: Path) -> None:
    """Note memory, and a checkpoint where there is a new one."""
    now, workers = time.monotonic(), distilling(children_of(process))
    if (folder / INITIAL).exists() and workers and not part.initial_cpu:
        part.initial_cpu = max(cpu_seconds(worker) for worker in workers)
    with suppress(OSError, KeyError, ValueError):
        sizes = [status_of(worker, "VmRSS", "RssShmem") for worker in workers]
        own = max((size["VmRSS"] - size["RssShmem"] for size in sizes), default=0)
        part.peak_of_all = max(part.peak_of_all, own)
        if part.checkpoints:
            part.peak = max(part.peak, own)
    done = iterations_done(folder)
    if done and workers and (not part.checkpoints or done > part.checkpoints[-1][1]) and done_since(part, folder):
        part.checkpoints.append((now, done))
        part.cpu.append(max(cpu_seconds(worker) for worker in workers))
        part.sent.append(loopback_bytes(workers[0]))


def done_since(part: Part, folder: Path) -> bool:
    """Whether the checkpoint there is was written in this part."""
    age = time.time() - (folder / "checkpoint.arrow").stat().st_mtime
    return age < time.monotonic() - part.started


def iterations_done(folder: Path) -> int:
    """Of the last complete checkpoint: the shared file comes after the parts, and the older parts go after it."""
    if not (folder / "checkpoint.arrow").exists():
        return 0
    with suppress(OSError, ValueError):
        numbers = {int(name.split("-")[0]) for name in os.listdir(folder / "checkpoint") if name.endswith(".arrow")}
        return numbers.pop() if len(numbers) == 1 else 0
    return 0


def predicted(config: RunConfig, product: float | None) -> tuple[Proposal, dict[str, float]]:
    """What the model says, in the units of the table."""
    shape = data_shape(config.dataset)
    described = Described("core", SHARDS)
    machine = machine_of(described, threads=config.cluster.threads_per_worker, product=product)
    found = as_it_is(config, shape, Layout.of(config), described, machine)
    parts, work = found.plans[0].footprint, found.work
    training = round(shape.training_images * (1 - config.dataset.validation))
    looked = work.choosing / (2 + config.experts.count) * (training / work.images + config.experts.count)
    checkpoint = checkpoint_bytes(work.images, work.row_bytes, chosen=False)
    writing = checkpoint / work.shards / WRITE_RATE
    return found, {
        "an iteration, s": found.estimate.iteration.total + writing,
        "computing, CPU s": found.estimate.iteration.compute + found.estimate.iteration.update + writing,
        "first images, CPU s": machine.seconds(looked / work.shards, "scoring"),
        "memory, MiB": (parts.process + parts.synthetic + parts.network + parts.trace + parts.call) / 2**20,
        "traffic of a worker, MiB": work.traffic.sent(work.shards, len(work.rows)) / 2**20,
        "store, MiB": storage(config, shape).store / 2**20,
        "checkpoint, MiB": checkpoint / 2**20,
        "initial set, MiB": (work.images * (work.row_bytes + 8) + transform_bytes(config, shape)) / 2**20,
    }


def measured(parts: list[Part], folder: Path, store: Path) -> dict[str, float]:
    """The same of the run."""
    return {
        "an iteration, s": statistics.median(times(parts)),
        "computing, CPU s": statistics.median(differences(parts, "cpu")),
        "first images, CPU s": parts[0].initial_cpu,
        "memory, MiB": max(part.peak for part in parts) / 2**20,
        "traffic of a worker, MiB": statistics.median(differences(parts, "sent")) / SHARDS / 2**20,
        "store, MiB": size_below(store) / 2**20,
        "checkpoint, MiB": (size_below(folder / "checkpoint") + (folder / "checkpoint.arrow").stat().st_size) / 2**20,
        "initial set, MiB": (folder / INITIAL).stat().st_size / 2**20,
    }


def times(parts: list[Part]) -> list[float]:
    """Seconds from one checkpoint to the next."""
    found = []
    for part in parts:
        moments = [moment for moment, _ in part.checkpoints]
        found += [later - earlier for earlier, later in itertools.pairwise(moments)]
    return found


def differences(parts: list[Part], name: str) -> list[float]:
    """Of a quantity from one checkpoint to the next."""
    found: list[float] = []
    for part in parts:
        values = getattr(part, name)
        found += [later - earlier for earlier, later in itertools.pairwise(values)]
    return found


def size_below(folder: Path) -> int:
    """Of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def digest(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def went_on(parts: list[Part], folder: Path, initial: str) -> dict[str, Any]:
    """What shows that the second part continued the first; ends the benchmark where it did not."""
    arrays = read_tensors(open_location(str(folder)) / "checkpoint.arrow", kind="checkpoint").arrays
    history = arrays["history.iteration"].tolist()
    first, second = (part.checkpoints for part in parts)
    told = {
        "iterations before": first[-1][1],
        "first after": second[0][1],
        "history": history,
        "loss": np.round(arrays["history.loss"], 4).tolist(),
        "initial set unchanged": digest(folder / INITIAL) == initial,
    }
    if not (told["initial set unchanged"] and history == list(range(len(history))) and second[0][1] > first[-1][1]):
        raise SystemExit(f"the second part did not go on where the first was killed: {told}")
    return told


def table(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Both side by side."""
    rows = ["| | predicted | measured | measured / predicted |", "| --- | --- | --- | --- |"]
    for name, value in before.items():
        ratio = after[name] / value
        rows.append(
            f"| {name} | {value:,.2f} | {after[name]:,.2f} | {ratio:.2f}{'' if is_within(ratio) else ' (off)'} |"
        )
    return rows


def is_within(ratio: float) -> bool:
    """Whether a prediction is as near as is asked for."""
    return abs(ratio - 1) <= WITHIN


LAYOUTS_HEADER = """Extrapolated, not measured: what `datm-ray plan RECIPE --cluster ...` says. Nothing was run on a
GPU, nor on several machines; the model was checked against runs on two cores (plan-tiny-imagenet). Hours are those of
GPUs, with those in which a set's other GPUs wait while the first validates; "clock" is hours from start to end if
nothing fails and nothing is skipped. `float32` takes the assumed default of {default:.1f} TFLOP/s a GPU, a tenth of the
stated peak; "60 TFLOP/s" is what student steps would have to reach. Network {network} for every sum; ImageNet-1K:
`--data-shape {shape}` with the recipe of Tiny-ImageNet (its start epochs were never tuned for it).
The layout is the fastest, not the one of fewest GPU-hours."""

IMAGENET = "3x64x64,1000,1281167"
NETWORK = "25Gbps"


def layout_rows() -> list[list[str]]:
    """The table of layouts."""
    rows = []
    for name, recipe, shape in (
        ("Tiny-ImageNet IPC 50", "tiny-imagenet-ipc50", None),
        ("the same with MetaDD", "tiny-imagenet-metadd-ipc50", None),
        ("ImageNet-1K 64x64 IPC 50", "tiny-imagenet-ipc50", IMAGENET),
    ):
        config = get_recipe(recipe)
        for speed in ("", ",tflops=60"):
            for gpus in (1, 8, 64):
                described = parse_cluster(f"gpus={gpus},memory=80GiB,network={NETWORK}{speed}")
                told_shape = parse_shape(shape) if shape else data_shape(config.dataset)
                found = propose(config, told_shape, described, machine_of(described))
                told = found.estimate
                part = told.iteration
                hours = [show_number(told.hours[stage]) for stage in STAGES]
                rows.append(
                    [
                        name,
                        f"{gpus}, {'60 TFLOP/s' if speed else 'float32'}",
                        str(found.work.shards),
                        str(len(found.work.rows)),
                        f"{show_number(part.total)} ({show_number(part.compute)} + {show_number(part.sums)})",
                        *hours,
                        show_number(told.total_hours),
                        show_number(told.total_wall),
                        size_in_words(storage(found.config, told_shape).total),
                    ]
                )
    return rows


def layouts() -> list[str]:
    """The table of layouts, as text."""
    columns = [
        "recipe",
        "GPUs",
        "shards",
        "rows",
        "s an iteration (computing + sums)",
        *STAGES,
        "in all",
        "clock",
        "storage",
    ]
    default = machine_of(parse_cluster("gpus=1")).rate / 1e12
    lines = ["# Layouts", "", LAYOUTS_HEADER.format(default=default, network=NETWORK, shape=IMAGENET), ""]
    lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join(row)} |" for row in layout_rows()]
    described = parse_cluster(f"gpus=64,memory=80GiB,network={NETWORK}")
    config = get_recipe("tiny-imagenet-ipc50")
    found = propose(config, data_shape(config.dataset), described, machine_of(described))
    return [
        *lines,
        "",
        "Assumptions:",
        "",
        *(f"- {each}" for each in assumptions(found.machine, found.work, described)),
    ]


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """The run."""
    sharded = [f"cluster.shards={SHARDS}", f"cluster.workers={SHARDS}"]
    if arguments.quick:
        return override(get_recipe("digits-ipc1"), [*DIGITS, *sharded])
    path = [f"dataset.path={json.dumps(arguments.data)}"]
    return override(get_recipe("tiny-imagenet-ipc50"), [*TINY_IMAGENET, *sharded, *path, *(arguments.set or [])])


def main() -> None:
    """Predict, run, kill, resume, compare; print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits and a tiny network; written nowhere without --out")
    parser.add_argument("--data", help="parquet file of Tiny-ImageNet's training images")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="change the run")
    parser.add_argument("--runs", help="folder of the run, whose experts are used where it has some; a temporary one")
    parser.add_argument("--measure", action="store_true", help="time this machine's cores, where they are others")
    parser.add_argument("--before", type=int, default=5, help="checkpoints before the run is killed")
    parser.add_argument("--after", type=int, default=4, help="checkpoints after it has gone on")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds that a part may take")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results unless --quick")
    parser.add_argument("--name", default="tiny-imagenet", help="of the results' files")
    parser.add_argument("--layouts", action="store_true", help="only tell layouts of GPUs, and run nothing")
    arguments = parser.parse_args()
    if arguments.layouts:
        text = "\n".join(layouts())
        print(text)
        if arguments.out:
            (arguments.out / f"plan-layouts_extrapolated_{date.today():%Y%m}.md").write_text(text + "\n")
        return
    if not arguments.quick and not arguments.data:
        parser.error("--data is needed, or --quick")
    runs = Path(arguments.runs or tempfile.mkdtemp(prefix="bench-plan-")).absolute()
    config, folder = config_of(arguments), runs / "plan"
    if folder.exists():
        shutil.rmtree(folder)
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "plan.yaml").write_text(to_yaml(config))
    said = ["--out", str(runs)]
    subprocess.run([sys.executable, "-m", "datm_ray", "experts", str(runs / "plan.yaml"), *said], check=True)
    load, product = os.getloadavg()[0], product_rate()
    found, before = predicted(config, product if arguments.measure else None)
    (runs / "predicted.json").write_text(json.dumps(before, indent=1) + "\n")
    print(json.dumps(before, indent=1), flush=True)
    namespace = own_network()
    command = [*namespace, sys.executable, "-m", "datm_ray", "distill", str(runs / "plan.yaml"), *said]
    parts = [run_until(command, folder, arguments.before, arguments.limit)]
    initial = digest(folder / INITIAL)
    parts.append(run_until(command, folder, arguments.after, arguments.limit))
    resumed = went_on(parts, folder, initial)
    after = measured(parts, folder, runs / "experts")
    _, machine = hardware("cpu")
    facts = {
        "command": "python " + shlex.join([str(Path(each).name if "/" in each else each) for each in sys.argv]),
        "hardware": machine,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "date": str(date.today()),
    }
    seconds, cpu = times(parts), differences(parts, "cpu")
    iteration = found.estimate.iteration
    lines = [*head("Plan against a run", facts), HEADER, ""]
    lines += [
        f"{config.distill.ipc} images per class of {found.shape.classes}: {found.work.images:,} of "
        f"{'x'.join(map(str, found.shape.image))}, {SHARDS} shards of one thread, T = {found.work.steps}, batch "
        f"{found.work.batch}, micro-batches of {found.plans[0].chunk}. Predicted: {iteration.compute:.2f} s computing "
        f"at {found.machine.rate / 1e9:.0f} GFLOP/s ({found.machine.origin}), {iteration.sums:.2f} sums, "
        f"{iteration.update:.2f} update. Just before the run a matrix product ran at {product / 1e9:.0f} GFLOP/s a "
        f"core, the load was {load:.2f}.",
        "",
        *table(before, after),
        "",
        f"Iterations: {len(seconds)}, {min(seconds):.2f} to {max(seconds):.2f} s; CPU seconds {min(cpu):.2f} to "
        f"{max(cpu):.2f}. Memory over the whole run: "
        f"{max(part.peak_of_all for part in parts) / 2**20:,.0f} MiB. "
        f"{'' if namespace else 'No network of its own: traffic is that of the whole machine. '}"
        f"Killed after iteration {resumed['iterations before']}; went on, first checkpoint after iteration "
        f"{resumed['first after']}, {parts[1].checkpoints[0][0] - parts[1].started:.0f} s after the command; no "
        f"iteration missing or twice; loss {', '.join(map(str, resumed['loss']))}.",
    ]
    print("\n".join(lines))
    out = arguments.out or (None if arguments.quick else Path(__file__).parent / "results")
    if out:
        details = {
            "predicted": before,
            "measured": after,
            "resumed": resumed,
            "parts": [asdict(part) for part in parts],
        }
        name = f"plan-{'digits' if arguments.quick else arguments.name}"
        save(result_path(out, name), lines, {**facts, "product": product, **details})


if __name__ == "__main__":
    main()
