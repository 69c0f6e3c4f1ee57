"""Commands that plan a run, run it or one of its stages, report and export."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from datm_ray._version import __version__
from datm_ray.cli.ending import Commands, note
from datm_ray.cli.options import (
    Invocation,
    Json,
    Quiet,
    Recipes,
    Set,
    Store,
    Verbose,
    WriteTo,
    config_of,
    print_json,
    verbose_option,
)
from datm_ray.monitor import logs
from datm_ray.words import counted, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from datm_ray.config import NetworkConfig
    from datm_ray.monitor.progress import Reporter
    from datm_ray.pipeline import Pipeline
    from datm_ray.runtime.executor import Executor

app = typer.Typer(
    cls=Commands,
    help="Dataset distillation at cluster scale: a large labelled image set becomes a tiny synthetic one.",
    epilog="Start with: datm-ray run digits-ipc1 digits-ipc10",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ExportFormat = Literal["png", "parquet", "pt", "arrow", "safetensors"]
"""Export formats: the keys of `exports.EXPORTS`, written out here because importing that module loads torch."""
Out = Annotated[
    str, typer.Option("--out", "-o", metavar="URI", callback=note, help="Folder for everything the run writes.")
]
ExecutorName = Annotated[
    Literal["ray", "serial"],
    typer.Option("--executor", help="Use parallel workers (ray) or this process (serial)."),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="Ray cluster to run on. Without it, Ray starts on this machine."),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Memory of one distilling worker, such as 8GiB (cluster.memory)."),
]
SkipFull = Annotated[
    bool,
    typer.Option("--skip-full", help="Leave out the control on all real data, which takes longest (evaluate.full)."),
]
Coresets = Annotated[
    bool,
    typer.Option(
        "--coresets",
        help="Add coresets of as many real images: moderate, EL2N and, if experts store enough epochs, forgetting. "
        "Trains experts if the recipe has none.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", callback=note, help="Print the remaining work. Nothing is written.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Print the version, or run the given command."""
    if version:
        print(f"datm-ray {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipes: Recipes,
    set_: Set = None,
    out: Out = "runs",
    store: Store = None,
    executor: ExecutorName = "ray",
    address: Address = None,
    memory: Memory = None,
    skip_full: SkipFull = False,
    coresets: Coresets = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train experts, distil, evaluate and write the report.

    You may stop the command at any time. Running it again resumes the work. Ctrl-C and SIGTERM first save the current
    iteration or epoch.

    With --dry-run, --json prints the remaining work. Without it, --json prints the scores, as in summary.json.
    """
    from datm_ray.pipeline import report as write_report
    from datm_ray.stages.distill.task import SYNTHETIC

    set_ = [*_with_memory(set_, memory), *_without_full(skip_full)]
    pipeline, start = _prepare(Invocation(recipes, set_, out, store, executor, address), coresets=coresets)
    if dry_run:
        _print_plan(pipeline, json_)
        return
    pipeline.run_all(start, _reporter())
    written = write_report(out, _reporter().message)
    if json_:
        print_json((pipeline.out / "summary.json").read_json())
        return
    place = (pipeline.out / pipeline.configs[len(recipes) - 1].name / SYNTHETIC).uri
    print(f"{pipeline.table()}\n\nReport: {written.uri}")
    print(f"Use the set: s = datm_ray.load({place!r}); s.dataset() is for torch, s.training() says how it was scored")


@app.command()
def plan(
    recipes: Recipes,
    set_: Set = None,
    memory: Memory = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="KEY=VALUE,...",
            help="Suggest a layout for this cluster. Examples: cpus=2,memory=24GiB or "
            "gpus=64,memory=80GiB,tflops=10,network=25Gbps.",
        ),
    ] = None,
    data_shape: Annotated[
        str | None,
        typer.Option("--data-shape", metavar="CxHxW,CLASSES,IMAGES", help="Shape of a data set on another machine."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time the run's own steps. Compiling them may take minutes.",
        ),
    ] = False,
    json_: Json = False,
    verbose: Annotated[int, verbose_option("Print the parts of memory and of an iteration too, and the log.")] = 0,
) -> None:
    """Estimate memory, time and storage before anything starts.

    Time on CPUs is estimated from small steps, timed on this machine within seconds. --measure times the run's own
    steps.

    --cluster suggests a layout for the described cluster. In it, memory is that of one GPU, or of all cores together.
    tflops (or gflops) is the speed of student steps on one GPU or core, a fraction of the peak in its data sheet.
    network is the speed at which one GPU or core can send. Time on GPUs needs tflops or --measure.
    """
    from datm_ray.planning.plan import plan_run

    configs = [config_of(name, _with_memory(set_, memory)) for name in recipes]
    wanted = sum(config.workers_per_set for config in configs)  # a run distils its recipes side by side
    plans = []
    for config in configs:
        found = plan_run(config, cluster, data_shape, measure=measure, wanted=wanted)
        if json_:
            plans.append(found.to_json())
        else:
            print("\n".join(found.lines(verbose=verbose > 0)))
    if json_:
        print_json(plans)


@app.command()
def experts(
    recipes: Recipes,
    set_: Set = None,
    out: Out = "runs",
    store: Store = None,
    executor: ExecutorName = "ray",
    address: Address = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train the experts that are missing from the store."""
    invocation = Invocation(recipes, set_, out, store, executor, address)
    pipeline, start = _prepare(invocation)
    pipeline.train_experts(start, _reporter())
    print(f"Experts are in {pipeline.store_uri}")
    if pipeline.is_distillable:
        print(f"Next: {invocation.next('distill')}")


@app.command()
def distill(
    recipes: Recipes,
    set_: Set = None,
    out: Out = "runs",
    store: Store = None,
    executor: ExecutorName = "ray",
    address: Address = None,
    memory: Memory = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Distil the synthetic sets that are not finished yet.

    Experts and priors that a method needs must be in the store already.
    """
    from datm_ray.stages.distill.task import SYNTHETIC

    invocation = Invocation(recipes, _with_memory(set_, memory), out, store, executor, address)
    pipeline, start = _prepare(invocation)
    pipeline.distill(start, _reporter())
    for config in pipeline.configs:
        print(f"{config.name}: {(pipeline.out / config.name / SYNTHETIC).uri}")
    print(f"Next: {invocation.next('evaluate')}")


@app.command()
def evaluate(
    recipes: Recipes,
    set_: Set = None,
    out: Out = "runs",
    store: Store = None,
    executor: ExecutorName = "ray",
    address: Address = None,
    arch: Annotated[
        str | None,
        typer.Option("--arch", metavar="NAME[:WIDTH],...", help="Also score the sets on these networks, or your own."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", metavar="N", help="Train N networks for each row (evaluate.seeds).")
    ] = None,
    fair: Annotated[
        bool,
        typer.Option("--fair", help="Add DD-Ranking's scores, from three more rows of networks (evaluate.fair)."),
    ] = False,
    skip_full: SkipFull = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score the synthetic sets and their controls on the test set.

    Fresh networks are trained on each synthetic set and on each control, such as random real images, and tested on the
    real test images.

    Architectures of --arch are trained twice: with the learned step size, and with a step size chosen on validation
    data. If the recipe has a network of the given name, that network is used. A WIDTH of 128 means the published size.
    Networks that SGD cannot train well, such as vit-small, need --set evaluate.optimiser=adamw.

    --fair also measures the set's accuracy with hard labels and without augmentation. This needs the control on all
    real data, which is then made even if the recipe has evaluate.full: false.

    --json prints the scores of these recipes in place of the table, with the keys of summary.json.
    """
    set_ = [*(["evaluate.full=true"] if fair else []), *(set_ or [])]
    set_ += [f"evaluate.seeds={seeds}"] if seeds is not None else []
    set_ += [*(["evaluate.fair=true"] if fair else []), *_without_full(skip_full)]
    pipeline, start = _prepare(Invocation(recipes, set_, out, store, executor, address), arch)
    pipeline.evaluate(start, _reporter())
    if json_:
        print_json(pipeline.scores())
        return
    print(pipeline.table())
    print(f"Next: {shlex.join(['datm-ray', 'report', out])}")


@app.command()
def report(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of earlier runs.")] = "runs",
    verbose: Verbose = 0,
) -> None:
    """Write the HTML report on all runs of an output folder."""
    from datm_ray.pipeline import report as write_report

    print(f"Report: {write_report(out, _reporter().message).uri}")


@app.command()
def export(
    artifact: Annotated[str, typer.Argument(metavar="FILE", help="A synthetic.arrow or .safetensors file.")],
    out: WriteTo,
    format_: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="png writes pictures, a folder per class. parquet writes Hugging Face's layout. pt writes DATM's "
            "three files. arrow and safetensors write one file with everything, transform included, for datm_ray.load.",
        ),
    ] = "png",
    verbose: Verbose = 0,
) -> None:
    """Write a synthetic set in another format.

    Soft labels are logits in pt, arrow and safetensors, and probabilities (their softmax) in parquet. DD-Ranking reads
    the logits from pt.
    """
    from datm_ray.artifact import load
    from datm_ray.interop.exports import export as export_artifact, left_out
    from datm_ray.store.files.filesystem import open_location

    loaded = load(artifact)
    written = export_artifact(loaded, format_, open_location(out))
    print("\n".join([f"Wrote {counted(len(written), 'file')} to {out}", *left_out(loaded, format_)]))


@app.command()
def publish(
    run_: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run, such as runs/digits-ipc1.")],
    out: WriteTo,
    transform: Annotated[
        bool,
        typer.Option(
            "--transform/--no-transform",
            help="Put a whitening transform, 38 MB for 32x32 RGB, into synthetic.safetensors. Where it is left out, "
            "`fitted(images)` makes it again from the real training images.",
        ),
    ] = True,
    verbose: Verbose = 0,
) -> None:
    """Write a finished set with a card, to publish it.

    The card, README.md, says what the set is, how to use it, its accuracy beside the controls and how it was made.
    The other files are preview.png, train.parquet (Hugging Face's layout) and synthetic.safetensors (everything, for
    datm_ray.load).
    """
    from datm_ray.pipeline import publish as write_published

    written = write_published(run_, out, transform=transform)
    print(f"Wrote {', '.join(written)} to {out}. State the licence of the source in README.md.")


def _prepare(
    invocation: Invocation, arch: str | None = None, *, coresets: bool = False
) -> tuple[Pipeline, Callable[[], Executor]]:
    """Check the recipes. Returns the pipeline of their runs, and a function that starts its executor.

    Args:
        arch: architectures to score on in place of `evaluate.networks`, separated by commas; `None` keeps the recipe's.
        coresets: True to add runs that choose as many real images as each recipe's set has.

    Raises:
        DatmError: a recipe, data set or path cannot be read or used.
    """
    configs = [config_of(name, invocation.set_) for name in invocation.recipes]
    if coresets:
        from datm_ray.stages.methods.selection import coresets_of

        given, say = {config.name for config in configs}, _reporter().message
        configs += [each for config in configs for each in coresets_of(config, say) if each.name not in given]
    asked: dict[NetworkConfig, str] = {}
    if arch is not None:
        from datm_ray.config import networks_named, scored_on

        for config in configs:
            asked |= {network: f"--arch {name}" for network, name in networks_named(config, arch.split(",")).items()}
        configs = [scored_on(config, arch.split(",")) for config in configs]
    from datm_ray.api import stages_of

    return stages_of(configs, invocation.out, invocation.store, invocation.executor, invocation.address, asked)


def _without_full(skip_full: bool) -> list[str]:
    return ["evaluate.full=false"] if skip_full else []


def _with_memory(set_: list[str] | None, memory: str | None) -> list[str]:
    import json

    from datm_ray.config import parse_bytes
    from datm_ray.errors import ConfigError

    if memory is None:
        return set_ or []
    try:
        parse_bytes(memory)
    except ConfigError as failure:
        raise ConfigError(f"--memory: {failure.fact}", failure.cause, failure.remedy) from None
    # Quoted, so that YAML reads it as text.
    return [*(set_ or []), f"cluster.memory={json.dumps(memory)}"]


def _reporter() -> Reporter:
    from datm_ray.monitor.progress import Reporter

    return Reporter(quiet=logs.verbosity() < 0)


def _print_plan(pipeline: Pipeline, json_: bool) -> None:
    from datm_ray.pipeline import preview

    runs = pipeline.runs
    if json_:
        left = preview.remaining(runs, pipeline.scored_rows).items()
        remaining = [{"stage": title, "count": count, "tasks": tasks} for title, (count, tasks) in left]
        distances = [{"name": name, **found.to_json()} for name, found in preview.distances(runs).items()]
        print_json({"data": preview.data(runs), "remaining": remaining, "distances": distances})
        return
    planned = preview.remaining_lines(runs, pipeline.scored_rows)
    steps = (f"{name}: {'; '.join(found.lines())}" for name, found in preview.distances(runs).items())
    for line in [*preview.data_lines(runs), *planned, *steps]:
        print(one_line(line))
