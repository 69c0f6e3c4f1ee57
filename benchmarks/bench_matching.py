"""Speed, memory and error of the matching gradient: full unrolling, TESLA's approximation, and this package.

python benchmarks/bench_matching.py [--quick]         (make bench-matching)
python benchmarks/bench_matching.py --only 1          CIFAR-10's shape, T = 5, in some minutes

Each method of a row has a process of its own, which does one call on request. The calls of a row's methods take
turns, so that whatever else the machine does hits all of them alike, and none sees another's memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from facts import common_facts, head, parsed, result_path, save, sizes_and_places, status
from floor import Alone, Operation, operations_of, operations_of_steps
from published_matching import Gradient, Problem, make_problem, step_as_traced, tesla, unrolling
from tables import spread, table
from torch import Tensor
from turns import timed

from datm_ray.config import PUBLISHED_AUGMENTATION, NetworkConfig, NetworkSpec
from datm_ray.core.compute.precision import Precision
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.memory import available_memory
from datm_ray.methods.trajectory.matching import identity, matching_gradient, place_steps
from datm_ray.methods.trajectory.step_functions import Order, StepOptions, StudentStepFunctions
from datm_ray.runtime.executor import multiplies_bfloat16

HEADER = """Matching loss and its gradient in images, soft labels and step size; ConvNet, instance normalisation, mean
pooling; random tensors of fixed seeds; every minibatch is the whole set; step size 0.01.

- `unrolling`: the graph of all T steps, as DATM computes it. `tesla`: parameters collected without a graph, then the
  graph of one step at a time with the parameters held constant: an approximation. `ours`: `matching_gradient`,
  in chunks of the stated number of images. The first two run uncompiled, as published.
- seconds: one call; median (smallest to largest) of n, the methods of a row taking turns. ratio: of the calls of one
  turn, to the row's first `ours`; median (smallest to largest).
- memory: peak of the call minus what the process held just before it, largest of the n calls; "beyond trace" leaves
  out the T + 1 parameter vectors that every method keeps. On a CPU the process's VmHWM, reset before the call after
  free memory was given back to the system; on CUDA torch's allocator. With several shards: of the largest.
- error: relative norm against float64 unrolling, of images / soft labels / step size, on fewer images and steps.
- warm-up: the first call, of one step: compilation, where there is any (a warm compile cache makes it shorter).
- convolutions: number in a student step, of whole minibatches. Each gradient of a convolution counts as one.
- alone: seconds of the call's convolutions and matrix products by themselves. Each is timed warm and several times in
  the same turn, in the faster of two memory orders (channels innermost or outermost); this is multiplied by how often
  the call computes it. A call with these operations and the library's kernels cannot be faster, but for some
  microseconds of Python in each. share: alone to seconds. best ratio: seconds to `alone` of the row's first `ours`,
  which no ratio to such an `ours` can exceed."""

COLUMNS = (
    *("shape", "T", "batch (chunk)", "method", "seconds", "ratio", "convolutions", "alone, s", "share", "best ratio"),
    *("MiB", "MiB beyond trace", "error", "warm-up, s"),
)
ONLY = """measure only these rows of the table, counted from 0. If the numbers of all rows are there, of this month and
machine, the others are kept; else the page is named by its rows"""
CUDA_ONLY = "CIFAR-100 at IPC 50 (T = 80, batch 1000) in float32, tf32 and bfloat16, and all variants at 32×32"


@dataclass(frozen=True)
class Shape:
    """A network and its images."""

    name: str
    depth: int
    width: int
    image: tuple[int, int, int]
    classes: int
    batch: int
    chunk: int
    """Images per call of the step functions."""
    reference: tuple[int, int]
    """Numbers of images and student steps of the problem on which errors are measured."""

    @property
    def spec(self) -> NetworkSpec:
        """ConvNet of this depth and width, for images of this shape."""
        channels, *size = self.image
        return NetworkConfig(width=self.width, depth=self.depth).for_images(channels, (size[0], size[1]), self.classes)


@dataclass(frozen=True)
class Method:
    """Work of one process."""

    shape: Shape
    steps: int
    name: str = "ours"
    """Name: unrolling, tesla, ours, or reference, which is float64 unrolling of the problem of `Shape.reference`."""
    strategy: str = ""
    order: Order | None = None
    precision: Precision = "float32"
    compiled: bool = True
    channels_last: bool = True
    shards: int = 1
    threads: int = 1
    device: str = "cpu"

    @property
    def label(self) -> str:
        """Name of the method in the table."""
        variants = [self.order or "", self.precision if self.precision != "float32" else ""]
        variants += [
            "augmented" if self.strategy else "",
            "" if self.compiled or self.name != "ours" else "uncompiled",
            "" if self.channels_last else "channels first",
            f"{self.shards} shards",
        ]
        chosen = [v for v in variants if v and v != "1 shards"]
        return f"{self.name} ({', '.join(chosen)})" if chosen else self.name


class Ours:
    """`matching_gradient`, on the part of the set that this shard holds."""

    def __init__(self, method: Method, network: FlatNetwork, rank: int) -> None:
        options = StepOptions(method.compiled, method.order, method.channels_last, method.precision)
        self.functions = StudentStepFunctions(network, options)
        self._method, self._rank = method, rank
        if self.functions.note:
            print(self.functions.note, file=sys.stderr)

    def __call__(self, problem: Problem) -> Gradient:
        shards, whole = self._method.shards, problem.synthetic
        first, last, chunk = self._part(len(whole.images))
        held = slice(first, last)
        part = SyntheticSet(whole.images[held], whole.soft_labels[held], whole.step_sizes, whole.labels[held])
        steps = [step.held_by(first, last) for step in problem.steps] if shards > 1 else problem.steps
        all_sum = _summed_over_processes if shards > 1 else identity
        placed = place_steps(steps, chunk, part.images)
        result = matching_gradient(self.functions, problem.start, problem.target, part, placed, all_sum=all_sum)
        return result.loss, (result.images, result.soft_labels, result.step_size)

    def operations(self) -> tuple[Counter[Operation], float]:
        """How often a call computes each operation, and convolutions of whole minibatches in a student step."""
        shape, steps = self._method.shape, self._method.steps
        first, last, chunk = self._part(shape.batch)
        step = operations_of(step_as_traced(self.functions, chunk, shape.image, shape.classes))
        calls = steps * math.ceil((last - first) / chunk)
        return Counter({each: calls * count for each, count in step.items()}), convolutions(step)

    def _part(self, rows: int) -> tuple[int, int, int]:
        """First image and end of this shard's part of `rows` images, and number of images in a call."""
        shards, rank = self._method.shards, self._rank
        first, last = rows * rank // shards, rows * (rank + 1) // shards
        calls = math.ceil((last - first) / self._method.shape.chunk)
        return first, last, math.ceil((last - first) / calls)  # even parts, as a run's plan has them


def convolutions(counts: Counter[Operation]) -> int:
    """Number of convolutions, each of their gradients counted as one."""
    return sum(count for each, count in counts.items() if each.is_convolution)


def _summed_over_processes(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def measured(call: Callable[[], Gradient], device: str) -> dict[str, float]:
    """Seconds, loss and peak memory of a call over what was held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the call could reuse would not show in its peak
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status("VmRSS")
    seconds, (loss, _) = timed(call, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")
    return {"seconds": seconds, "loss": loss, "peak": peak - before}


def child(request: dict[str, Any]) -> None:
    """Run one process of a method: report the warm-up, then make one measured call for every line of input."""
    shape = Shape(**{**request["method"].pop("shape")})
    shape = replace(shape, image=tuple(shape.image), reference=tuple(shape.reference))  # type: ignore[arg-type]
    method = Method(shape=shape, **request["method"])
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(method.threads)
    torch.backends.cudnn.allow_tf32 = False  # torch's default would round the other methods' convolutions
    if method.device == "cpu":  # running out of memory must end this process, not the machine
        limit = int(0.9 * available_memory()) + status("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        for answer in answers_of(method, request):
            print(json.dumps(answer), file=answers, flush=True)
    except (RuntimeError, MemoryError) as failure:
        text = str(failure)
        print(json.dumps({"failed": "out of memory" if "alloc" in text or "memory" in text else text}), file=answers)


def answers_of(method: Method, request: dict[str, Any]) -> Any:
    """Compute and yield what a child process reports: the warm-up, then each measured call."""
    shape, there = method.shape, {"device": method.device, "strategy": method.strategy}
    if method.name == "reference":
        exact = unrolling(make_problem(shape.spec, *shape.reference, dtype=torch.float64, **there))
        torch.save(exact[1], request["reference"])
        yield {"warm_up": 0.0}
        return
    if method.shards > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{request['meeting']}", rank=request["rank"], world_size=method.shards
        )
    problem = make_problem(shape.spec, shape.batch, method.steps, **there)
    ours = Ours(method, problem.network, request["rank"]) if method.name == "ours" else None
    compute = ours or {"unrolling": unrolling, "tesla": tesla}[method.name]
    seconds, _ = timed(lambda: compute(replace(problem, steps=problem.steps[:1])), method.device)
    report: dict[str, Any] = {"warm_up": seconds, "trace": (method.steps + 1) * problem.start.nbytes}
    if ours:
        counts, report["convolutions"] = ours.operations()
    else:
        two_steps = make_problem(shape.spec, shape.batch, 2, device=method.device)
        counts = operations_of_steps(compute, two_steps, method.steps)
        report["convolutions"] = convolutions(counts) / method.steps
    report["operations"] = [f"{count} x {each}" for each, count in counts.items()]
    alone = Alone(counts, method.device, method.precision)
    alone.seconds()
    if request["reference"]:
        exact = torch.load(request["reference"])
        _, gradient = compute(make_problem(shape.spec, *shape.reference, **there))
        pairs = zip(gradient, exact, strict=True)
        report["error"] = [float((value.double() - e).norm() / e.norm()) for value, e in pairs]
    yield report
    for _ in sys.stdin:
        yield {**measured(lambda: compute(problem), method.device), "alone": alone.seconds()}


class Worker:
    """The process, or processes, of one method."""

    def __init__(self, method: Method, reference: str) -> None:
        self.method = method
        self.calls: list[dict[str, float]] = []
        meeting = tempfile.mktemp(prefix="bench-meeting-")
        self._processes = []
        for rank in range(method.shards):
            request = {"method": asdict(method), "reference": reference, "rank": rank, "meeting": meeting}
            command = [sys.executable, __file__, "--child", json.dumps(request)]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            )
        self.report = self._answer()

    def call(self) -> None:
        """Make one measured call."""
        if "failed" in self.report:
            return
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answer = self._answer()
        if "failed" in answer:
            self.report.update(answer)
        else:
            self.calls.append(answer)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate()

    def _answer(self) -> dict[str, Any]:
        """Read the answers of all shards; the largest of each number counts."""
        lines = [process.stdout.readline() for process in self._processes if process.stdout is not None]
        answers = [json.loads(line) if line else {"failed": "killed"} for line in lines]
        return {key: max(answer.get(key, 0) for answer in answers) for key in answers[0]}


def run_row(methods: list[Method], repetitions: int, with_errors: bool) -> list[dict[str, Any]]:
    """Run the methods of a row in turns, each in processes of its own. Returns the results of each method."""
    with tempfile.TemporaryDirectory() as folder:
        reference = f"{folder}/reference.pt" if with_errors else ""
        if with_errors:
            Worker(replace(methods[0], name="reference", shards=1), reference).close()
        workers = [Worker(method, reference) for method in methods]
        for _ in range(repetitions):
            for worker in workers:
                worker.call()
        for worker in workers:
            worker.close()
    base = next(worker for worker in workers if worker.method.name == "ours")
    return [summary(worker, base) for worker in workers]


def summary(worker: Worker, base: Worker) -> dict[str, Any]:
    """Results of a method: figures of every call, and ratios of its seconds to `base` in the same turn."""
    pairs = list(zip(worker.calls, base.calls, strict=False))
    row = {"method": asdict(worker.method), "label": worker.method.label, "calls": worker.calls, **worker.report}
    row["ratios"] = [call["seconds"] / other["seconds"] for call, other in pairs]
    row["best_ratios"] = [call["seconds"] / other["alone"] for call, other in pairs]
    return row


def table_line(row: dict[str, Any]) -> str:
    """Format one line of the table."""
    method, shape = row["method"], row["method"]["shape"]
    name = [shape["name"], str(method["steps"]), f"{shape['batch']} ({shape['chunk']})", row["label"]]
    if not row["calls"]:
        return f"| {' | '.join([*name, row['failed'], *[''] * (len(COLUMNS) - len(name) - 1)])} |"
    seconds, peak = [call["seconds"] for call in row["calls"]], max(call["peak"] for call in row["calls"])
    alone = [call["alone"] for call in row["calls"] if "alone" in call]  # missing in rows kept from earlier versions
    cells = [
        f"{spread(seconds)}, n = {len(seconds)}",
        spread(row["ratios"]),
        f"{row['convolutions']:.3g}" if alone else "",
        spread(alone),
        spread([own / all_ for own, all_ in zip(alone, seconds, strict=False)]),
        spread(row.get("best_ratios", [])),
        f"{peak / 2**20:.0f}",
        f"{(peak - row['trace']) / 2**20:.0f}",
        " / ".join(f"{error:.0e}" for error in row.get("error", [])),
        f"{row['warm_up']:.1f}",
    ]
    return f"| {' | '.join([*name, *cells])} |"


def rows_to_run(quick: bool, threads: int, device: str) -> list[tuple[list[Method], bool]]:
    """The methods of each row, and whether their errors are measured."""
    cuda = device == "cuda"
    tiny = Shape("tiny 8×8", 2, 4, (3, 8, 8), 4, 8, 4, (8, 2))
    digits = tiny if quick else Shape("ConvNet-2/32, 8×8", 2, 32, (1, 8, 8), 10, 100, 50, (100, 10))
    small = tiny if quick else Shape("ConvNet-3/128, 32×32", 3, 128, (3, 32, 32), 10, 100, 100 if cuda else 20, (20, 5))
    large = tiny if quick else Shape("ConvNet-4/128, 64×64", 4, 128, (3, 64, 64), 200, 20, 20 if cuda else 4, (8, 5))
    precisions: tuple[Precision, Precision] = ("tf32", "bfloat16")
    more = {"threads": threads, "device": device}

    def three(shape: Shape, steps: int, strategy: str = "", compiled: bool = not quick) -> list[Method]:
        method = Method(shape, steps, strategy=strategy, compiled=compiled, **more)  # type: ignore[arg-type]
        return [replace(method, name=name) for name in ("unrolling", "tesla", "ours")]

    def variants(methods: list[Method]) -> list[Method]:
        ours = methods[-1]
        choices = [("reverse-over-reverse", True), ("reverse-over-reverse", False), ("reverse-over-forward", False)]
        varied = [replace(ours, order=order, compiled=compiled) for order, compiled in choices]  # type: ignore[arg-type]
        return [*methods, *varied]

    rows = [(variants(three(digits, 2 if quick else 20, compiled=True)), True)]
    first, *longer = [2] if quick else [5, 10, 20, 40]
    outermost = replace(three(small, first)[-1], channels_last=False)
    rows.append(([*three(small, first), outermost], True))
    rows += [(three(small, steps), True) for steps in longer]
    rows.append((three(small, 2 if quick else 5, PUBLISHED_AUGMENTATION), True))
    rows += [(three(large, steps), True) for steps in ([2] if quick else [5, 10])]
    ours = three(small, 2)[-1]
    tenfold = replace(small, batch=10 * small.batch)
    rows.append(([ours, replace(ours, shape=tenfold)], False))
    if not cuda:  # two shards on one GPU would only share it
        rows.append(([replace(ours, steps=2 if quick else 10, threads=1, shards=shards) for shards in (1, 2)], False))
        shape, steps = (small, first) if multiplies_bfloat16() else (tiny, 2)  # other CPUs are too slow
        base = replace(three(shape, steps)[-1], compiled=True)
        rows.append(([base, replace(base, precision="bfloat16")], True))
    else:
        rounded = [replace(ours, steps=5, precision=precision) for precision in precisions]
        rows.append(([*variants(three(small, 5))[2:], *rounded], True))
        cifar100 = Shape("CIFAR-100 IPC 50", 3, 128, (3, 32, 32), 100, 1000, 250, (20, 5))
        ours = replace(ours, shape=cifar100, steps=80)
        rows.append(([ours, *(replace(ours, precision=precision) for precision in precisions)], True))
    return rows


def heading(facts: dict[str, str], device: str) -> list[str]:
    """Text above the rows."""
    lines = [*head("Matching gradient", facts), HEADER, ""]
    if device == "cpu":
        lines += [f"No CUDA device; with one, also: {CUDA_ONLY}, and the CUDA allocator's peaks.", ""]
    return [*lines, *table(COLUMNS, [])]


def main() -> None:
    """Run all rows; print and save the results."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", type=int, nargs="+", help=ONLY)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parsed(parser)
    if arguments.child:
        child(arguments.child)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {**common_facts(__file__, sys.argv[1:], device), "threads": str(arguments.threads)}
    path = result_path(arguments.out, "matching", device) if arguments.out else None
    kept: list[list[dict[str, Any]]] = []
    if path and arguments.only and path.with_suffix(".json").exists():
        earlier = json.loads(path.with_suffix(".json").read_text())
        kept, facts["command"] = earlier["rows"], f"{earlier['command']}; {facts['command']}"
    elif path and arguments.only:
        path = result_path(arguments.out, f"matching-rows-{'-'.join(map(str, arguments.only))}", device)
    lines = heading(facts, device)
    print("\n".join(lines), flush=True)
    results: list[list[dict[str, Any]]] = []
    for number, (methods, with_errors) in enumerate(rows_to_run(arguments.quick, arguments.threads, device)):
        if not arguments.only or number in arguments.only:
            results.append(run_row(methods, arguments.repetitions, with_errors))
        elif kept:
            results.append(kept[number])
        else:
            continue
        lines += [table_line(row) for row in results[-1]]
        print("\n".join(lines[-len(results[-1]) :]), flush=True)
        if path:  # after every row, so that an interrupted run keeps its rows
            save(path, lines, {**facts, "rows": results})


if __name__ == "__main__":
    main()
