"""Commands that submit, follow and stop runs as jobs of a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from datm_ray.cli.ending import INTERRUPTED
from datm_ray.cli.options import Json, Recipes, Set, Store, Verbose, config_of, print_json
from datm_ray.words import duration

if TYPE_CHECKING:
    from datm_ray.runtime.ray.jobs import Jobs

job_app = typer.Typer(
    help="Submit, follow and stop runs as jobs of a Ray cluster.", no_args_is_help=True, rich_markup_mode=None
)

LOCAL_DASHBOARD = "http://127.0.0.1:8265"


def default_dashboard() -> str:
    """URL of the dashboard: RAY_ADDRESS if it holds a URL, as in Ray's own job commands, else this machine's dashboard.

    On the nodes of a cluster, RAY_ADDRESS may hold the address that Ray programs connect to. This address is no URL,
    and is ignored.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    return address if address.startswith(("http://", "https://")) else LOCAL_DASHBOARD


Dashboard = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        default_factory=default_dashboard,
        show_default=f"RAY_ADDRESS if it is a URL, else {LOCAL_DASHBOARD}",
        help="Address of the cluster's dashboard.",
    ),
]
Follow = Annotated[
    bool,
    typer.Option(
        "--follow", "-f", help="Show the log until the job ends, and end with its exit code. Ctrl-C leaves it running."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job id (Ray's submission id), as `job list` shows it.")]


@job_app.command("submit")
def job_submit(
    recipes: Recipes,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="URI", help="Folder for everything. All nodes must reach it.")
    ],
    address: Dashboard,
    set_: Set = None,
    store: Store = None,
    requirements: Annotated[
        str | None,
        typer.Option(
            "--requirements",
            metavar="FILE",
            help="File of packages, for pip on the cluster. Files that it names do not travel.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="KEY[=VALUE]",
            help="Environment variable of the job and its workers. KEY alone takes this shell's value. Ray's dashboard "
            "shows it. May be repeated.",
        ),
    ] = None,
    runtime_env: Annotated[
        str | None,
        typer.Option("--runtime-env", metavar="FILE", help="YAML or JSON file with Ray's runtime environment."),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow/--detach",
            "-f/-d",
            help="Show the log until the job ends, and end with its exit code; or return at once. Exit code 75 means "
            "that the cluster has not answered for 10 minutes.",
        ),
    ] = True,
    verbose: Verbose = 0,
) -> None:
    """Submit `run` as a job of the cluster and follow its log.

    The job keeps running when this terminal is closed or Ctrl-C is pressed. Submitting it again resumes a job that
    ended. --verbose is passed on to the job.
    """
    from datm_ray.pipeline import require_together
    from datm_ray.runtime.ray.jobs import Jobs, job_environment
    from datm_ray.stages.methods.registry import method_of

    configs = [config_of(name, set_) for name in recipes]
    for config in configs:
        method_of(config).check(config)
    require_together(configs)
    environment = job_environment(requirements, env or (), runtime_env)
    jobs = Jobs(address)
    submission_id = jobs.submit(configs, out, store, environment, verbose)
    next_ = "" if follow else f"\nNext: {jobs.command('logs', submission_id)}"
    print(f"Job {submission_id}{next_}", flush=True)
    if follow:
        _follow(jobs, submission_id)


@job_app.command("list")
def job_list(address: Dashboard, json_: Json = False) -> None:
    """List this package's jobs on the cluster, oldest first."""
    from datm_ray.runtime.ray.jobs import Jobs

    found = Jobs(address).list()
    if json_:
        print_json([dataclasses.asdict(job) for job in found])
        return
    for job in found:
        print(f"{job.id}  {job.status:<9}  {duration(job.seconds):>11}  {job.recipes}  {job.out}")


@job_app.command("status")
def job_status(submission_id: JobId, address: Dashboard, json_: Json = False) -> None:
    """Show a job's state and the last line of its log."""
    from datm_ray.runtime.ray.jobs import Jobs

    jobs = Jobs(address)
    job = jobs.job(submission_id)
    lines = jobs.logs(submission_id).split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    if json_:
        print_json(dataclasses.asdict(job) | {"last": last})
        return
    ended = "" if job.exit_code is None else f", exit code {job.exit_code}"
    print(f"{job.id}: {job.status}{ended}")
    facts = {"recipes": job.recipes, "out": job.out, "time": duration(job.seconds), "last": last or job.message}
    for title, value in facts.items():
        print(f"  {title:<8} {value}")


@job_app.command("logs")
def job_logs(
    submission_id: JobId,
    address: Dashboard,
    follow: Follow = False,
) -> None:
    """Print a job's log."""
    from datm_ray.runtime.ray.jobs import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, submission_id)
    else:
        print(jobs.logs(submission_id), end="")


@job_app.command("stop")
def job_stop(submission_id: JobId, address: Dashboard) -> None:
    """Stop a job and keep what it has finished.

    `job submit` with the same arguments resumes the stopped run.
    """
    from datm_ray.runtime.ray.jobs import Jobs

    print(f"Job {submission_id} {'is being stopped' if Jobs(address).stop(submission_id) else 'had ended already'}")


def _follow(jobs: Jobs, submission_id: str) -> None:
    """Show a job's log until the job ends.

    Ctrl-C ends this process, not the job.

    Raises:
        typer.Exit: the job has not succeeded; the exit code is the job's, 128 + the number of a signal, or else 1.
    """
    try:
        job = jobs.follow(
            submission_id,
            show=lambda text: print(text, end="", flush=True),
            warn=lambda text: print(f"datm-ray: {text}", file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        follow, stop = jobs.command("logs", submission_id), jobs.command("stop", submission_id)
        print(f"\nThe job keeps running. Follow it again with: {follow}\nStop it with: {stop}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(f"Job {submission_id} {job.status}{f': {job.message}' if job.status == 'failed' and job.message else ''}")
    if job.status != "succeeded":
        code = job.exit_code or 1
        raise typer.Exit(code if code > 0 else 128 - code)  # a shell's exit code for a signal
