"""Everything that is to be known of a GPU, in nine minutes: exactness, speed and memory, accuracy.

python benchmarks/bench_gpu.py [--cifar FOLDER]                    (make gpu, make gpu CIFAR=FOLDER)
python benchmarks/bench_gpu.py --device cpu                       (make gpu DEVICE=cpu: tiny, tries the program)

Needs torch, numpy, pydantic and PyYAML, not Ray. Workers also need pyarrow, fsspec and Pillow, as the package does; the
last section pyarrow and Pillow, or scikit-learn.
Results are written row by row, so that a run that is cut off keeps what it has. A row that fails is reported with its
error, and the others run. What the time did not reach is listed by name. Sections share the time, so `--minutes` gives
more to each, and `--only` all of it to some. Exit code 1 says that something failed or was not exact, or that a check
was not reached.

What only a card can show, and what to check first when it is there, is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu  # first: it finds the package beside this folder, which all that follow import
import torch
from cifar_part import FILES
from facts import common_facts, head, result_path, save
from gpu import constants, curve, exactness, experts, networks, steps, sums, workers
from gpu.machine import Machine, timed_algorithms
from gpu.sections import Outcome, Section, run_sections

SECTIONS: tuple[Section, ...] = (
    exactness.SECTION,
    workers.SECTION,
    sums.SECTION,
    steps.SECTION,
    experts.SECTION,
    networks.EVALUATION,
    networks.METADD,
    constants.SECTION,
    curve.SECTION,
)


class Page:
    """The result so far, printed and saved."""

    def __init__(self, path: Path, title: str, facts: dict[str, str]) -> None:
        self._path, self._title, self._facts = path, title, facts
        self._printed = 0

    def save(self, outcomes: Sequence[Outcome]) -> None:
        """Write the result's Markdown and JSON files anew, and print the rows that are new."""
        lines = [*head(self._title, self._facts), *(line for outcome in outcomes for line in outcome.lines())]
        sections = [outcome.as_json() for outcome in outcomes]
        save(self._path, lines, {**self._facts, "sections": sections})
        for row in outcomes[-1].rows[self._printed :]:
            print(f"{outcomes[-1].section.name}: {_in_words(row)}", flush=True)
        self._printed = len(outcomes[-1].rows)
        if outcomes[-1].status != "running":
            print(f"{outcomes[-1].section.name}: {outcomes[-1].remark}; {outcomes[-1].seconds:.0f} s", flush=True)
            self._printed = 0


def _in_words(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("error" if "failed" in row else "errors",)
    )


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu runs all of it in small")
    parser.add_argument("--cifar", help=f"folder of {' and '.join(FILES)}; digits without")
    parser.add_argument("--compile", action="store_true", help="on a CPU too, where it takes longer than all the rest")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all sections together")
    parser.add_argument("--only", help=f"sections, joined by commas: {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results, on a CPU build/gpu")
    arguments = parser.parse_args(words)
    arguments.only = arguments.only.split(",") if arguments.only else names
    if unknown := set(arguments.only) - set(names):
        parser.error(f"{', '.join(sorted(unknown))} is no section; there are {', '.join(names)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu tries the program in small")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Run the sections. Returns 1 if anything failed or a check was not reached, else 0."""
    arguments = parsed(words)
    machine = Machine(arguments.device, arguments.device == "cpu", arguments.cifar, arguments.compile)
    # Tiny tensors gain nothing from a second thread, and on a busy machine lose everything by waiting for it.
    torch.set_num_threads(1 if machine.small else len(os.sched_getaffinity(0)))
    # Torch's default rounds convolutions to TF32. The exactness of float32 is checked without this rounding. Sections
    # that measure what a run does round as the run does (`Machine.as_in_a_run`, `StepOptions`).
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    patience = 5 if machine.small else 1  # in small nothing is measured, and the machine may be busy
    chosen = [each for each in SECTIONS if each.name in arguments.only]
    name = "gpu" if len(chosen) == len(SECTIONS) else f"gpu-{'-'.join(arguments.only)}"
    root = Path(gpu.__file__).parents[2]
    out = arguments.out or (root / "build" / "gpu" if machine.small else root / "benchmarks" / "results")
    title = "The day of the GPU" if not machine.small else "The day of the GPU, in small: no measurement"
    facts = common_facts(__file__, sys.argv[1:] if words is None else words, machine.device)
    if not machine.small:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        facts["device"] = f"{memory:.0f} GiB, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    page = Page(result_path(out, name, machine.device), title, facts)
    with timed_algorithms(True):  # as in a run
        outcomes = run_sections(chosen, machine, 60 * patience * arguments.minutes, page.save)
    failures, unchecked = (sum(getattr(each, name) for each in outcomes) for name in ("failures", "unchecked"))
    print(f"{failures} failure(s), {unchecked} check(s) not reached; written to {out}", flush=True)
    return 1 if failures or unchecked else 0


if __name__ == "__main__":
    sys.exit(main())
