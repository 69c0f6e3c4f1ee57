"""The command line `datm-ray`: parse, call the pipeline once, print the result and the next step.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from datm_ray._version import __version__
from datm_ray.errors import DatmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from datm_ray.config import NetworkConfig, RunConfig
    from datm_ray.pipeline import Pipeline
    from datm_ray.runtime.executor import Executor
    from datm_ray.runtime.ray_jobs import Jobs
    from datm_ray.runtime.telemetry import Reporter
    from datm_ray.store.trajectories import ExpertGroup, TrajectoryStore

app = typer.Typer(
    help="Dataset distillation at cluster scale: a large labelled image set becomes a tiny synthetic one.",
    epilog="Start with: datm-ray run digits-ipc1 digits-ipc10",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="Packaged recipes.", no_args_is_help=True, rich_markup_mode=None)
store_app = typer.Typer(help="Look into a trajectory store.", no_args_is_help=True, rich_markup_mode=None)
job_app = typer.Typer(help="Runs as jobs of a Ray cluster.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")
app.add_typer(job_app, name="job")
app.add_typer(store_app, name="store")

Recipes = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE|FILE.yaml...", help="Packaged recipes or YAML files; several share experts."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one value; may be given again."),
]
Out = Annotated[str, typer.Option("--out", metavar="URI", help="Folder for everything the run writes.")]
Store = Annotated[
    str | None, typer.Option("--store", metavar="URI", help="Trajectory store; <out>/experts where not given.")
]
ExecutorName = Annotated[
    Literal["ray", "serial"], typer.Option("--executor", help="ray: parallel actors; serial: this process alone.")
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="Ray cluster to run on; none starts one on this machine."),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="What one distilling worker may take, e.g. 8GiB (cluster.memory)."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]
StoreUri = Annotated[str, typer.Argument(metavar="URI", help="Trajectory store: local path, file:// or s3:// URI.")]
Group = Annotated[
    str, typer.Argument(metavar="DATASET/ARCHITECTURE/FINGERPRINT", help="A group of experts, as `store ls` names it.")
]


Dashboard = Annotated[
    str,
    typer.Option(
        "--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, which takes jobs."
    ),
]
LOCAL_DASHBOARD = "http://127.0.0.1:8265"
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's number, as `job list` shows it.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Print the version, or go on to the command."""
    if version:
        print(__version__)
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
    dry_run: DryRun = False,
) -> None:
    """Train experts, distil, evaluate, report. The same command again continues where it stopped."""
    from datm_ray.pipeline import report as write_report

    pipeline, start = _prepare(_Said(recipes, _with_memory(set_, memory), out, store, executor, address))
    if dry_run:
        _print_plan(pipeline)
        return
    pipeline.run_all(start, _reporter())
    print(pipeline.table())
    print(f"\nReport: {write_report(out).uri}")


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
            help="Suggest a layout for it: gpus=64,memory=80GiB,tflops=60,network=25Gbps or cpus=2,memory=24GiB.",
        ),
    ] = None,
    data_shape: Annotated[
        str | None,
        typer.Option("--data-shape", metavar="CxHxW,CLASSES,IMAGES", help="Of a data set that is not here."),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time this machine's cores first, for a second.")] = False,
) -> None:
    """What a recipe takes, before anything starts: memory of a worker, work, hours, traffic, storage; and a layout.

    In --cluster, memory is that of a GPU, or of all cores together; tflops (or gflops) is the speed of student steps on
    one GPU or core, not its peak; network is what one of them can send.
    """
    from datm_ray.runtime.cost import machine_of, parse_cluster
    from datm_ray.runtime.executor import require_precision
    from datm_ray.runtime.plan import Layout, data_shape as shape_of, parse_shape
    from datm_ray.runtime.speed import product_rate, require_measurable
    from datm_ray.runtime.workload import as_it_is, described_here, propose

    described = None if cluster is None else parse_cluster(cluster)
    shape = None if data_shape is None else parse_shape(data_shape)
    configs = [_config(name, _with_memory(set_, memory)) for name in recipes]
    wanted = sum(config.workers_per_set for config in configs)  # a run distils its recipes side by side
    for config in configs:
        config.require_matchable()
        here = described or described_here(config)
        require_precision(config.cluster, here.device == "GPU")
        if measure:
            require_measurable(here)
        product = product_rate() if measure else None
        machine = machine_of(
            here, precision=config.cluster.precision, threads=config.cluster.threads_per_worker, product=product
        )
        known = shape or shape_of(config.dataset)
        if described is None:
            found = as_it_is(config, known, Layout.of(config, wanted), here, machine)
        else:
            found = propose(config, known, here, machine)
        for planned in found.plans:
            print("\n".join(planned.lines()))
        print("\n".join(found.lines(suggested=described is not None)))


@app.command()
def experts(
    recipes: Recipes,
    set_: Set = None,
    out: Out = "runs",
    store: Store = None,
    executor: ExecutorName = "ray",
    address: Address = None,
) -> None:
    """Train the expert trajectories that the recipes need and the store has not."""
    said = _Said(recipes, set_, out, store, executor, address)
    pipeline, start = _prepare(said)
    pipeline.train_experts(start, _reporter())
    print(f"Experts are in {pipeline.store_uri}")
    if all(config.is_matchable for config in pipeline.configs):
        print(f"Next: {said.next('distill')}")


@app.command()
def distill(
    recipes: Recipes,
    set_: Set = None,
    out: Out = "runs",
    store: Store = None,
    executor: ExecutorName = "ray",
    address: Address = None,
    memory: Memory = None,
) -> None:
    """Distil synthetic sets from experts that are already trained."""
    said = _Said(recipes, _with_memory(set_, memory), out, store, executor, address)
    pipeline, start = _prepare(said)
    pipeline.distill(start, _reporter())
    for config in pipeline.configs:
        print(f"{config.name}: {(pipeline.out / config.name / 'synthetic.arrow').uri}")
    print(f"Next: {said.next('evaluate')}")


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
        typer.Option("--arch", metavar="NAME[:WIDTH],...", help="Architectures to score the sets on as well."),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", metavar="N", help="Networks a row (evaluate.seeds).")] = None,
    fair: Annotated[
        bool, typer.Option("--fair", help="Also DD-Ranking's scores, of three more rows of networks (evaluate.fair).")
    ] = False,
) -> None:
    """Train fresh networks on the synthetic sets and on the controls, and score them on the test set.

    Other architectures get the step size that was learned, and one chosen on validation data. A name means the recipe's
    own network, backbone or auxiliary of that name where it has one; widths are relative to 128. What SGD does not
    train, such as vit-small, takes --set evaluate.optimiser=adamw.

    --fair asks what is left of the set's accuracy with hard labels, and without augmentation.
    """
    set_ = [*(set_ or []), *([f"evaluate.seeds={seeds}"] if seeds is not None else [])]
    set_ += ["evaluate.fair=true"] if fair else []
    pipeline, start = _prepare(_Said(recipes, set_, out, store, executor, address), arch)
    pipeline.evaluate(start, _reporter())
    print(pipeline.table())
    print(f"Next: datm-ray report {out}")


@app.command()
def report(out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of earlier runs.")] = "runs") -> None:
    """Write the HTML report over all runs of an output folder."""
    from datm_ray.pipeline import report as write_report

    print(f"Report: {write_report(out).uri}")


@app.command()
def export(
    artifact: Annotated[str, typer.Argument(metavar="FILE", help="A synthetic.arrow file.")],
    out: Annotated[str, typer.Option("--out", metavar="URI", help="Folder to write to.")],
    format_: Annotated[
        Literal["png", "parquet", "pt"],
        typer.Option("--format", help="png: a folder per class; parquet: Hugging Face layout; pt: DATM's three files."),
    ] = "png",
) -> None:
    """Write a synthetic set in another format."""
    from datm_ray.artifact import export as export_artifact, load
    from datm_ray.store.filesystem import open_location

    written = export_artifact(load(artifact), format_, open_location(out))
    print(f"Wrote {len(written)} file(s) to {out}")


@recipe_app.command("list")
def recipe_list() -> None:
    """The packaged recipes, a line each."""
    from datm_ray.recipes import recipe_names, recipe_notes

    for name in recipe_names():
        print(f"{name:<22} {recipe_notes(name).splitlines()[0]}")


@recipe_app.command("show")
def recipe_show(
    name: Annotated[str, typer.Argument(metavar="RECIPE|FILE.yaml", help="A packaged recipe or a YAML file.")],
    set_: Set = None,
) -> None:
    """A recipe as YAML, with a comment on every field; a starting point for your own file."""
    from datm_ray.config import to_yaml
    from datm_ray.recipes import recipe_names, recipe_notes

    config = _config(name, set_)
    if name in recipe_names():
        print("\n".join(f"# {line}".rstrip() for line in recipe_notes(name).splitlines()))
    print(to_yaml(config), end="")


@store_app.command("ls")
def store_ls(uri: StoreUri) -> None:
    """The groups of interchangeable experts in a store: how many, what is kept of them, how large they are."""
    from datm_ray.errors import CorruptFileError
    from datm_ray.store.trajectories import epochs_in_words

    for group in _groups(uri, unfinished=True):
        numbers = group.experts()
        if not numbers:
            print(f"{group.key}  no expert yet, training in progress or given up (`store rm` deletes what there is)")
            continue
        try:
            info = group.read_info(numbers[0])
            kept = f"{epochs_in_words(info.epochs)}, {info.storage}"
        except CorruptFileError:
            kept = "damaged, see `datm-ray store verify`"
        size = sum(group.size(number) for number in numbers)
        print(f"{group.key}  {len(numbers)} expert(s), {kept}, {_size(size)}")


@store_app.command("show")
def store_show(uri: StoreUri) -> None:
    """The experts of every group: epochs, loss, size, recipe."""
    from datm_ray.errors import CorruptFileError

    for group in _groups(uri):
        print(group.key)
        for place, number in enumerate(group.experts()):
            try:
                lines = _expert_lines(group, number, with_recipe=place == 0)
            except CorruptFileError as failure:
                lines = [f"  expert {number:>5}: damaged: {failure.fact}"]
            print("\n".join(lines))


def _expert_lines(group: ExpertGroup, number: int, *, with_recipe: bool) -> list[str]:
    import math

    from datm_ray.store.trajectories import epochs_in_words

    info, progress = group.read_info(number), group.read_progress(number)
    lines = []
    if with_recipe:
        buffers = f"   buffers {info.buffer_count:,}" if info.buffer_count else ""
        lines.append(f"  parameters {info.parameter_count:,}{buffers}   {info.storage}   format {info.format_version}")
        for section, values in info.recipe.items():
            lines.append(f"  {section}: {', '.join(f'{name}={value}' for name, value in values.items())}")
    told = "imported" if "imported" in info.recipe else f"final train loss {progress.train_loss[-1]:.4f}"
    if math.isfinite(progress.test_accuracy[-1]):
        told += f", test accuracy {progress.test_accuracy[-1]:.4f}"
    return [*lines, f"  expert {number:>5}: {epochs_in_words(progress.epochs)}, {told}, {_size(group.size(number))}"]


@store_app.command("verify")
def store_verify(uri: StoreUri) -> None:
    """Read every byte of every expert, and of the transform beside them, and check it against its checksums."""
    from datm_ray.errors import CorruptFileError, StoreError

    checked = size = 0
    damaged: list[str] = []
    for group in _groups(uri):
        for number in group.experts():
            checked += 1
            size += group.size(number)
            try:
                group.verify(number)
            except (CorruptFileError, StoreError) as failure:
                damaged.append(f"{failure.fact}. {failure.cause}")
        try:
            group.read_transform()
        except (CorruptFileError, StoreError) as failure:
            damaged.append(f"{failure.fact}. {failure.cause}")
    if damaged:
        print("\n".join(damaged))
        raise CorruptFileError(
            f"{len(damaged)} of the files in {uri} are damaged; the first: {damaged[0]}",
            remedy="delete them (`datm-ray store rm`) and run the step that wrote them again, or restore copies",
        )
    print(f"{checked} expert(s) are whole, {_size(size)}")


@store_app.command("rm")
def store_rm(
    uri: StoreUri,
    group: Group,
    expert: Annotated[
        list[int] | None, typer.Option("--expert", metavar="N", help="This expert alone; may be given again.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would be deleted.")] = False,
) -> None:
    """Delete experts, or a whole group with its transform."""
    from datm_ray.errors import StoreError

    found = _group(uri, group, unfinished=True)
    numbers = sorted(set(expert or found.experts()))
    absent = set(numbers) - set(found.experts())
    if absent:
        raise StoreError(f"{group} has no expert {min(absent)}", remedy=f"`datm-ray store show {uri}` names them")
    size = _size(sum(found.size(number) for number in numbers))
    rest = "" if expert else ", their transform and what is in progress"
    what = f"{len(numbers)} expert(s) of {found.location.uri}{rest}, {size}"
    if not yes:
        print(f"Would delete {what}. Nothing was deleted; --yes deletes.")
        return
    if expert:
        for number in numbers:
            found.remove_expert(number)
    else:
        found.remove()
    print(f"Deleted {what}.")


@store_app.command("import")
def store_import(
    files: Annotated[list[str], typer.Argument(metavar="FILE.pt...", help="replay_buffer_*.pt files of MTT's family.")],
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="RECIPE|FILE.yaml", help="Data set, network and epochs of the experts.")
    ],
    store: Annotated[str, typer.Option("--store", metavar="URI", help="Trajectory store to write to.")],
    set_: Set = None,
) -> None:
    """Store other projects' expert trajectories as experts of a recipe."""
    config = _config(recipe, set_)
    from datm_ray.runtime.replay_buffers import import_replay_buffers

    imported = []
    for each in import_replay_buffers(files, config, store):
        print(f"{each.group} expert {each.expert}" + ("" if each.new else " was there already"))
        imported.append(each)
    new = sum(each.new for each in imported)
    print(f"{new} trajectories were stored in {store}, {len(imported) - new} were there already")
    count = min(len(_group(store, group).experts()) for group in {each.group for each in imported})
    settings = [*(set_ or []), f"experts.count={count}"]
    print(f"Next: {_Said([recipe], settings, 'runs', store, 'ray', None).next('distill')}")


@store_app.command("export")
def store_export(
    uri: StoreUri,
    group: Group,
    out: Annotated[str, typer.Option("--out", metavar="URI", help="Folder to write to.")],
    per_file: Annotated[int, typer.Option("--per-file", metavar="N", min=1, help="Experts a file.")] = 10,
) -> None:
    """Write the experts of a group as replay_buffer_<n>.pt files, for MTT's family."""
    from datm_ray.store.filesystem import open_location

    found = _group(uri, group)
    from datm_ray.runtime.replay_buffers import export_replay_buffers

    open_location(out).require_writable()
    exported = export_replay_buffers(found, open_location(out), per_file)
    print(f"Wrote {len(exported.files)} file(s) to {out}")
    if exported.without_statistics:
        print("Without the running statistics of batch norms, for which a replay buffer has no place")
    if exported.left_out:
        epochs = ", ".join(map(str, exported.left_out))
        print(f"Without epoch(s) {epochs}, which come after a gap: a buffer's positions are its epochs")


@job_app.command("submit")
def job_submit(
    recipes: Recipes,
    out: Annotated[str, typer.Option("--out", metavar="URI", help="Folder for everything, which all machines reach.")],
    set_: Set = None,
    store: Store = None,
    address: Dashboard = LOCAL_DASHBOARD,
    requirements: Annotated[
        str | None, typer.Option("--requirements", metavar="FILE", help="Packages that the cluster lacks, for pip.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log, and end as it ends.")] = False,
) -> None:
    """Hand `run` in as a job, which goes on when this terminal is closed. The same again resumes a job that ended."""
    from datm_ray.pipeline import require_together
    from datm_ray.runtime.ray_jobs import Jobs

    configs = [_config(name, set_) for name in recipes]
    for config in configs:
        config.require_matchable()
    require_together(configs)
    jobs = Jobs(address)
    number = jobs.submit(configs, out, store, requirements)
    print(f"Job {number}\nNext: datm-ray job logs {number} --follow --address {address}")
    if follow:
        _follow(jobs, number, address)


@job_app.command("list")
def job_list(address: Dashboard = LOCAL_DASHBOARD) -> None:
    """This package's jobs on the cluster, a line each, the oldest first."""
    from datm_ray.runtime.ray_jobs import Jobs

    for job in Jobs(address).list():
        print(f"{job.id}  {job.status:<9}  {job.seconds:>7,.0f} s  {job.recipes}  {job.out}")


@job_app.command("status")
def job_status(number: JobId, address: Dashboard = LOCAL_DASHBOARD) -> None:
    """What a job does, and the last line of its log."""
    from datm_ray.runtime.ray_jobs import Jobs

    jobs = Jobs(address)
    job = jobs.job(number)
    ended = "" if job.exit_code is None else f", exit code {job.exit_code}"
    print(f"{job.id}: {job.status}{ended}")
    for title, value in (("recipes", job.recipes), ("out", job.out), ("time", f"{job.seconds:,.0f} s")):
        print(f"  {title:<8} {value}")
    lines = [line.strip() for line in jobs.logs(number).splitlines() if line.strip()]
    for title, found in (
        ("lost", [line for line in lines if "its worker died" in line]),
        ("progress", [line for line in lines if " done; " in line]),
        ("last", lines or [job.message]),
    ):
        count = f"{len(found)} worker(s), the last time: " if title == "lost" else ""
        print(*[f"  {title:<8} {count}{line}" for line in found[-1:] if line], sep="\n", end="\n" if found else "")


@job_app.command("logs")
def job_logs(
    number: JobId,
    address: Dashboard = LOCAL_DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends, and end as it ends.")] = False,
) -> None:
    """What a job has said."""
    from datm_ray.runtime.ray_jobs import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, number, address)
    else:
        print(jobs.logs(number), end="")


@job_app.command("stop")
def job_stop(number: JobId, address: Dashboard = LOCAL_DASHBOARD) -> None:
    """Stop a job; what it has finished stays, and `job submit` with the same arguments goes on from there."""
    from datm_ray.runtime.ray_jobs import Jobs

    print(f"Job {number} {'is being stopped' if Jobs(address).stop(number) else 'had ended already'}")


def _follow(jobs: Jobs, number: str, address: str) -> None:
    """Show a job's log and end with its exit code; an interrupt leaves the job alone."""
    try:
        for text in jobs.follow(number):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(f"\nThe job goes on: datm-ray job logs {number} --follow --address {address}", file=sys.stderr)
        raise typer.Exit(0) from None
    job = jobs.ended(number)
    print(f"Job {number} {job.status}{f': {job.message}' if job.status == 'failed' and job.message else ''}")
    if job.status != "succeeded":
        raise typer.Exit(job.exit_code or 1)


def main() -> None:
    """Run the command line; expected failures are one line on standard error and an exit code."""
    try:
        app()
    except DatmError as failure:
        if os.environ.get("DATM_RAY_DEBUG") == "1":
            raise
        print(f"datm-ray: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except KeyboardInterrupt:
        print("datm-ray: stopped. The same command again continues from here.", file=sys.stderr)
        sys.exit(130)


class _Said(NamedTuple):
    """What was said for a stage, and is to be said again for the next one."""

    recipes: list[str]
    set_: list[str] | None
    out: str
    store: str | None
    executor: str
    address: str | None

    def next(self, command: str) -> str:
        """The command for the next stage."""
        import shlex

        words = ["datm-ray", command, *self.recipes, "--out", self.out]
        words += [word for each in self.set_ or [] for word in ("--set", each)]
        words += ["--store", self.store] if self.store else []
        words += ["--executor", self.executor] if self.executor != "ray" else []
        words += ["--address", self.address] if self.address else []
        return shlex.join(words)


def _prepare(said: _Said, arch: str | None = None) -> tuple[Pipeline, Callable[[], Executor]]:
    """The pipeline, checked, and how to start its executor."""
    configs = [_config(name, said.set_) for name in said.recipes]
    asked: dict[NetworkConfig, str] = {}
    if arch is not None:
        from datm_ray.config import networks_named, scored_on

        for config in configs:
            asked |= {network: f"--arch {name}" for network, name in networks_named(config, arch.split(",")).items()}
        configs = [scored_on(config, arch.split(",")) for config in configs]
    from datm_ray.pipeline import Pipeline
    from datm_ray.runtime.create import create_executor

    elsewhere = bool(said.address or os.environ.get("RAY_ADDRESS"))
    alone = said.executor == "serial"
    pipeline = Pipeline(configs, said.out, said.store, elsewhere=elsewhere, alone=alone, asked=asked)
    return pipeline, lambda: create_executor(said.executor, configs[0].cluster, said.address)


def _config(name: str, set_: list[str] | None) -> RunConfig:
    from datm_ray.config import load_config, override
    from datm_ray.recipes import get_recipe

    is_file = name.endswith((".yaml", ".yml")) or os.sep in name
    return override(load_config(name) if is_file else get_recipe(name), set_ or [])


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
    # Quoted, for YAML is to read it as text whatever it holds.
    return [*(set_ or []), f"cluster.memory={json.dumps(memory)}"]


def _reporter() -> Reporter:
    from datm_ray.runtime.telemetry import Reporter

    return Reporter()


def _open_store(uri: str, *, unfinished: bool = False) -> TrajectoryStore:
    from datm_ray.errors import MissingExpertsError
    from datm_ray.store.trajectories import TrajectoryStore

    store = TrajectoryStore(uri)
    if not store.groups(unfinished=unfinished):
        raise MissingExpertsError(
            f"{uri} holds no experts", "the path is wrong, or nothing was trained yet", "run `datm-ray experts RECIPE`"
        )
    return store


def _groups(uri: str, *, unfinished: bool = False) -> list[ExpertGroup]:
    store = _open_store(uri, unfinished=unfinished)
    keys = store.groups(unfinished=unfinished)
    return [store.group(key.dataset, key.architecture, key.fingerprint) for key in keys]


def _group(uri: str, name: str, *, unfinished: bool = False) -> ExpertGroup:
    from datm_ray.errors import StoreError

    found = {str(group.key): group for group in _groups(uri, unfinished=unfinished)}
    if name not in found:
        raise StoreError(f"{uri} has no group {name}", remedy=f"it has {', '.join(found)}")
    return found[name]


def _size(count: int) -> str:
    """Bytes in words."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:,.0f} {units[0]}" if units[0] == "B" else f"{size:,.1f} {units[0]}"


def _print_plan(pipeline: Pipeline) -> None:
    for line in pipeline.plan():
        print(line)
