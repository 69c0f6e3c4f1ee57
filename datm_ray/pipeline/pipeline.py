"""Running the stages of one or more runs, in order. Tests: tests/pipeline/test_pipeline.py."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from datm_ray._version import __version__
from datm_ray.artifact import TRANSFORMS, keep_transform
from datm_ray.config import DatasetConfig, NetworkConfig, RunConfig, to_yaml
from datm_ray.errors import ConfigError
from datm_ray.monitor.loggers import Logger, open_logger
from datm_ray.monitor.logs import LOG, fields, noting_the_end, writing
from datm_ray.monitor.progress import Reporter
from datm_ray.monitor.uploaded_log import UploadedLog
from datm_ray.pipeline import checks, tasks
from datm_ray.pipeline.folder import (
    LEASE,
    RECIPE,
    continue_set,
    has_results,
    read_recipe,
    stored_labels,
    summaries,
    write_note,
)
from datm_ray.pipeline.preview import data_lines
from datm_ray.pipeline.runs import Runs
from datm_ray.pipeline.tasks import RowArguments
from datm_ray.report.results import accuracy_table, facts_of, fair_table, networks_table
from datm_ray.runtime.executor import Executor, Finished, More, Task
from datm_ray.runtime.machine.devices import fix_workspace
from datm_ray.runtime.stopping import ask, by_signals
from datm_ray.stages.distill.checkpoint import CHECKPOINT
from datm_ray.stages.distill.pieces import remove_pieces
from datm_ray.stages.distill.task import SYNTHETIC, DistillWorker
from datm_ray.stages.distill.validation import Candidates
from datm_ray.stages.evaluate.progress import remove_progress
from datm_ray.stages.evaluate.rows import result_location, scored_rows
from datm_ray.stages.evaluate.scores import note_scoring, read_score
from datm_ray.stages.experts.progress import ExpertProgress, note_stacks
from datm_ray.stages.experts.train import ExpertsCost, experts_cost, progress_of, stacks, write_experts_cost
from datm_ray.stages.methods.registry import networks_before_scoring, role_of, trained_networks
from datm_ray.stages.prior import is_trained, note_prior_cost
from datm_ray.stages.worker import StageWorker
from datm_ray.store.claims import lease
from datm_ray.store.files.filesystem import LAG, Location, require_shared
from datm_ray.words import counted, listed

_log = logging.getLogger(__name__)


class Pipeline:
    """Runner of all stages, from experts to evaluation, of one or more runs that share an output folder.

    The constructor reads the runs' images and checks the runs. A method such as `run_all` starts the work.
    """

    distill_worker: type[DistillWorker] = DistillWorker
    """Worker class that distils. Benchmarks may set another one."""

    def __init__(
        self,
        configs: Sequence[RunConfig],
        out: str,
        store: str | None = None,
        *,
        elsewhere: bool = False,
        alone: bool = False,
        asked: Mapping[NetworkConfig, str] | None = None,
    ) -> None:
        """Read the runs' images, and check everything that can be checked before a start. Starts no work.

        Nothing is written but missing files of cifar10 and cifar100, which are downloaded.

        Args:
            configs: the runs; at least one.
            out: output folder, a path or URI.
            store: trajectory store, a path or URI; `None` puts it into the output folder.
            elsewhere: True if workers may run on other nodes, whose memory and GPUs are not known here.
            alone: True if this process will do all the work, without Ray.
            asked: network to score on -> command-line option that asked for it, for messages; `None` for none.

        Raises:
            DatmError: a data set or path cannot be read, or a recipe's values cannot be used.
        """
        checks.check_before_reading(configs, elsewhere=elsewhere)
        if alone and configs[0].cluster.deterministic:
            fix_workspace()  # checks of memory and the fit of zca use the GPU before this process works on it
        self.runs = Runs(configs, out, store, elsewhere=elsewhere, alone=alone, asked=asked)
        checks.check(self.runs)
        self._log = Logger()
        self._unstackable = set[str]()
        """Architectures that a message has already named as trained one after another."""
        self._shares_out = True
        """True if workers of the present command read or write in the output folder."""
        self._setups: dict[DatasetConfig, tuple[Any, ...]] = {}
        """Data set -> arguments of `StageWorker`; the first is the result of `Executor.share` for the data set."""

    @property
    def configs(self) -> Sequence[RunConfig]:
        """Recipes of the runs, resolved for their images: no normalisation is "auto" and no depth is null."""
        return self.runs.configs

    @property
    def out(self) -> Location:
        """Output folder of the runs."""
        return self.runs.out

    @property
    def store_uri(self) -> str:
        """Location of the trajectory store, an absolute path or a URI."""
        return self.runs.store_uri

    @property
    def is_distillable(self) -> bool:
        """True if every run can be distilled by its method. Experts can be trained even if this is False."""
        try:
            checks.require_distillable(self.runs)
        except ConfigError:
            return False
        return True

    def run_all(self, start: Callable[[], Executor], reporter: Reporter) -> None:
        """Run all stages: train experts, distil sets, store labels if asked for, and evaluate the sets.

        Args:
            start: function that starts the executor, which runs the tasks.
            reporter: shows messages and progress.

        Raises:
            DatmError: a run cannot be distilled, a folder cannot be written or used, or work failed.
        """
        checks.require_distillable(self.runs)
        with self._started(start, reporter, distils=True) as executor:
            self._experts(executor, reporter)
            self._distill(executor, reporter, evaluates=True)
            self._evaluate(executor, reporter)

    def train_experts(self, start: Callable[[], Executor], reporter: Reporter) -> None:
        """Train the experts that are missing in the store. `start` starts the executor, `reporter` shows progress.

        Raises:
            DatmError: a folder cannot be written or used, or work failed.
        """
        with self._started(start, reporter, shares_out=False) as executor:
            self._experts(executor, reporter)

    def distill(self, start: Callable[[], Executor], reporter: Reporter) -> None:
        """Distil the sets that are not finished. `start` starts the executor, `reporter` shows progress.

        Raises:
            MissingExpertsError: experts or a prior are not in the store.
            DatmError: a run cannot be distilled, a folder cannot be written or used, or work failed.
        """
        checks.require_distillable(self.runs)
        checks.require_priors(self.runs)
        for config in self.configs:
            checks.require_experts(self.runs, trained_networks(config))
        validates = any(config.distill.validate_every for config in self.runs.unfinished())
        with self._started(start, reporter, distils=True, has_light=validates) as executor:
            self._note_experts_cost()  # another command may have trained them
            self._distill(executor, reporter)

    def evaluate(self, start: Callable[[], Executor], reporter: Reporter) -> None:
        """Train and score the networks that the runs' accuracy tables still lack.

        `start` starts the executor, and `reporter` shows progress. If a recipe stores labels, those that are missing
        are made first.

        Raises:
            MissingExpertsError: experts are not in the store.
            RunDirectoryError: a run has no synthetic set.
            DatmError: a folder cannot be written or used, or work failed.
        """
        checks.require_distillable(self.runs)
        for config in self.configs:
            checks.require_experts(self.runs, networks_before_scoring(config))
        checks.require_sets(self.runs)
        with self._started(start, reporter) as executor:
            self._evaluate(executor, reporter)

    def table(self) -> str:
        """Accuracy table as text, then the tables of DD-Ranking's scores and of other architectures, if any."""
        found = summaries(self.out, self.configs)
        others = [networks_table(summary) for summary in found if summary.networks]
        fair = [fair_table(found)] if any(summary.fair for summary in found) else []
        return "\n\n".join([accuracy_table(found), *fair, *others])

    def scores(self) -> list[dict[str, Any]]:
        """Accuracies, costs and recipes of the runs as plain data, each with the keys of summary.json."""
        return [facts_of(summary) for summary in summaries(self.out, self.configs)]

    def scored_rows(self, config: RunConfig) -> list[tuple[str, NetworkConfig | None]]:
        """Rows of a run's accuracy table, such as "distilled", each with its network; `None` for the backbone.

        Benchmarks override this method to leave rows out.
        """
        return scored_rows(config)

    @contextmanager
    def _started(
        self,
        start: Callable[[], Executor],
        reporter: Reporter,
        *,
        distils: bool = False,
        has_light: bool = True,
        shares_out: bool = True,
    ) -> Iterator[Executor]:
        """Lease the runs' folders, start the executor and yield it. Leases and executor end with the `with` block.

        Until then no other command can write into these folders. Experts under `--out` are not leased: other commands
        can use them.

        Args:
            distils: True to check also if there are enough workers and memory to distil.
            has_light: True to check also if a worker with the resources of `cluster.light` can run.
            shares_out: False if the command's workers use the store alone, and not the output folder.
        """
        checks.require_writable(self.runs)
        self._shares_out = shares_out
        with ExitStack() as leases:
            for config in sorted(self.configs, key=lambda config: config.name):  # a fixed order: no deadlock
                place = self.runs.folder(config) / LEASE
                leases.enter_context(lease(place, config.cluster.wait_for_run, reporter.message, ask))
            # Checked again, because the command that held the leases before may have used other experts.
            checks.require_same_experts(self.runs, of_all=False)
            with self._executing(start, reporter, distils=distils, has_light=has_light) as executor:
                yield executor

    @contextmanager
    def _executing(
        self, start: Callable[[], Executor], reporter: Reporter, *, distils: bool, has_light: bool
    ) -> Iterator[Executor]:
        if not (self.runs.alone or self.runs.elsewhere):
            reporter.message("Starting Ray ...")
        executor, recipes = start(), self.configs
        self._setups.clear()
        try:
            if executor.gpus_per_worker is not None:  # the workers' machines may have other GPUs than this one
                self.runs.give_gpus(executor.gpus_per_worker)
            if has_light:  # checked now, because earlier stages may take days
                executor.require_workers(self.configs[0].name, 1, light=True)
            if distils:
                for config in self.runs.unfinished():
                    # An unfinished distillation may resume with fewer workers: nodes may be lost since it started.
                    is_unfinished = (self.runs.folder(config) / CHECKPOINT).exists()
                    fewer = tasks.smaller_groups(self.runs, config) if is_unfinished else ()
                    executor.require_workers(config.name, min((config.workers_per_set, *fewer)))
                checks.require_memory(self.runs, executor)
            self._log = open_logger(self.configs[0].cluster.log_to, self.out, self.configs, reporter.message)
            folders = [self.runs.folder(config) for config in self.configs]
            uploaded = [UploadedLog(folder) for folder in folders if folder.local_path is None]
            local = [folder.local_path for folder in folders if folder.local_path is not None]
            with writing(local, uploaded), noting_the_end(), by_signals(reporter.message):
                _log.info("run started %s", fields(version=__version__, command=shlex.join(sys.argv)))
                where = listed(((folder / LOG).uri for folder in folders), most=2)
                log = f"{where}, uploaded every minute; -v shows it here" if uploaded else where
                for line in (f"Running on {executor.description}", *data_lines(self.runs), f"Log: {log}"):
                    reporter.message(line)
                for config in recipes:
                    # The recipe is written last, because it marks the folder as a run's, also for `report`.
                    self._write_note(config)
                    (self.runs.folder(config) / RECIPE).write_text(to_yaml(self._with_rows_before(config)))
                yield executor
        finally:
            with closing(executor):
                self._log.close()

    def _write_note(self, config: RunConfig) -> None:
        write_note(self.runs.folder(config), self.runs.raw(config), self.runs.origins(config))

    def _with_rows_before(self, config: RunConfig) -> RunConfig:
        """Copy of the recipe that also asks for the rows and networks that the run's earlier recipe asked for."""
        folder = self.runs.folder(config)
        earlier = read_recipe(folder) if has_results(folder) else None
        before = earlier.evaluate.networks if earlier else ()
        more = tuple(network for network in before if network not in config.evaluate.networks)
        networks = (*config.evaluate.networks, *more)
        fair = config.evaluate.fair or bool(earlier and earlier.evaluate.fair)
        fixed = config.evaluate.fixed_labels or bool(earlier and earlier.evaluate.fixed_labels)
        more_rows = {"networks": networks, "fair": fair, "fixed_labels": fixed, "full": config.evaluate.full or fair}
        return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=more_rows)})

    def _experts(self, executor: Executor, reporter: Reporter) -> None:
        scoring = tasks.scoring_runs(self.runs)
        for config in [*self.runs.networks(), *scoring]:
            group = self.runs.experts(config)
            if not group.has_transform():
                transform = self.runs.dataset(config.dataset, reporter.message).transform
                twin = keep_transform(transform, self.out / TRANSFORMS)
                group.write_transform(transform.to_arrays(), transform.to_metadata(), twin)
        if scoring:
            self._clear_up(scoring)
            self._note_stacks(executor, scoring)
            networks = partial(tasks.expert_tasks, workers=executor.light_workers, networks=scoring)
            self._run("Scoring networks", "train", networks, executor, reporter)
            self._run("Difficulty", "score", tasks.scoring_tasks, executor, reporter)
        self._clear_up()
        self._note_stacks(executor)

        def open_tasks(runs: Runs) -> list[Task]:
            return [*tasks.expert_tasks(runs, executor.light_workers), *tasks.prior_tasks(runs)]

        if self.runs.networks() or self.runs.missing_priors():
            self._run("Experts", "train", open_tasks, executor, reporter)
        else:
            methods = ", ".join(sorted({config.method for config in self.configs}))
            reporter.message(f"Experts: none, method {methods} needs no trained networks")
        self._note_stacks(executor)
        self._note_experts_cost()

    def _note_stacks(self, executor: Executor, networks: Sequence[RunConfig] | None = None) -> None:
        """Record in the store which experts are trained together (stacks), so that any number of workers resumes these.

        Args:
            networks: networks with experts, as runs with one network each; `None` for all but those that score images
                for a curriculum.
        """
        for config, open_stacks in tasks.expert_stacks(self.runs, executor.light_workers, networks):
            note_stacks(self.runs.experts(config), open_stacks)

    def _note_experts_cost(self) -> None:
        """Write the cost and origin of experts and priors into the runs' folders, for reports without the store."""
        for config in self.configs:
            self._write_note(config)
            costs = [replace(self._experts_cost(each), role=role_of(config, each)) for each in trained_networks(config)]
            write_experts_cost(self.runs.folder(config), costs)
            if is_trained(config):
                note_prior_cost(self.runs.folder(config), self.runs.prior(config))

    def _experts_cost(self, config: RunConfig) -> ExpertsCost:
        """Cost of the experts of a run with one network, including networks that order their images, if any."""
        cost, scoring = experts_cost(config, self.runs.experts(config)), config.scoring_run
        if scoring is None:
            return cost
        return replace(cost, spent=cost.spent + experts_cost(scoring, self.runs.experts(scoring)).spent)

    def _clear_up(self, networks: Sequence[RunConfig] | None = None) -> None:
        """Remove progress files of stored experts, which workers leave if they die just after storing the experts.

        Args:
            networks: networks with experts, as runs with one network each; `None` for all but those that score images
                for a curriculum.
        """
        for config in tasks.expert_recipes(self.runs, networks):
            group, missing = self.runs.experts(config), set(self.runs.missing_experts(config))
            if group.progress.list():
                ExpertProgress.clear_up(group)
                for stack in stacks(
                    range(config.experts.count), tasks.stack_size(self.runs, config), config.experts.count
                ):
                    if not missing & set(stack):
                        progress_of(config, group, stack).remove()

    def _distill(self, executor: Executor, reporter: Reporter, *, evaluates: bool = False) -> None:
        """Distil unfinished sets. With `evaluates`, free workers score finished sets while others still distil."""
        checks.require_names(self.runs)
        for config in self.runs.unfinished():
            if (done := continue_set(config, self.runs.folder(config))) is not None:
                reporter.message(f"{config.name}: continues from iteration {done} of {config.distill.continue_from}")
                if (every := config.distill.validate_every) and done % every:
                    reporter.message(
                        f"{config.name}: the set of iteration {done} was validated too, since it was the last one, so "
                        "another set may be kept than by one long run"
                    )
        scored, given = set[str](), set[str]()
        """Names of runs that have evaluation tasks already, and URIs of these tasks' results, which runs may share."""

        pieces: dict[str, set[str]] = {}
        """Name of each run whose set is made in pieces -> names of the tasks whose pieces are not made yet."""

        def open_tasks(runs: Runs) -> list[Task]:
            found = tasks.distill_tasks(runs, executor)
            for task in found:
                if task.method == "make_piece":
                    pieces.setdefault(task.run, set()).add(task.name)
            return found

        def following(task: Task) -> list[Task]:
            if task.stage == "evaluation":
                self._report_row(task, reporter)
                return []
            (own,) = (config for config in self.configs if config.name == task.run)
            if task.method == "make_piece":
                pieces[task.run].discard(task.name)
                return [] if pieces[task.run] else [tasks.join_task(self.runs, own)]
            unfinished = {config.name for config in self.runs.unfinished()}
            # Rows of the last sets join running evaluations. If none run, the evaluation stage scores them.
            if not evaluates or executor.light_workers == 1 or not (unfinished or given):
                return []
            later = unfinished | scored | tasks.epochs_to_label(self.runs).keys()
            done = [each for each in self.configs if each.name not in later and each.dataset == own.dataset]
            if not done:
                return []
            scored.update(config.name for config in done)
            found = tasks.evaluate_tasks(self.runs, self.scored_rows, workers=executor.light_workers, of=done)
            new = [each for each in found if given.isdisjoint(RowArguments(*each.arguments).result_uris)]
            given.update(uri for each in new for uri in RowArguments(*each.arguments).result_uris)
            self._tell_unstackable(new, reporter)
            return new

        self._run("Distillation", "distill", open_tasks, executor, reporter, following)
        for config in self.configs:  # a worker that died after it had written the set leaves candidates
            Candidates(self.runs.folder(config)).remove()
            if (self.runs.folder(config) / SYNTHETIC).exists():
                remove_pieces(self.runs.folder(config))

    def _label(self, executor: Executor, reporter: Reporter) -> None:
        """Store a teacher's labels of finished sets, for runs whose recipe asks for stored labels."""
        if any(config.evaluate.stores_labels for config in self.configs):
            open_tasks = partial(tasks.label_tasks, workers=executor.light_workers)
            self._run("Labels", "label", open_tasks, executor, reporter)
            for config in self.configs:
                place = stored_labels(self.runs.folder(config), config, self.runs.raw(config).fingerprint)
                if place is not None:
                    reporter.message(f"{config.name}: labels of every epoch are in {place.uri}")

    def _evaluate(self, executor: Executor, reporter: Reporter) -> None:
        self._label(executor, reporter)

        def open_tasks(runs: Runs) -> list[Task]:
            found = tasks.evaluate_tasks(runs, self.scored_rows, workers=executor.light_workers)
            self._tell_unstackable(found, reporter)
            return found

        def following(task: Task) -> list[Task]:
            self._report_row(task, reporter)
            return []

        self._run("Evaluation", "evaluate", open_tasks, executor, reporter, following)
        folders = {
            result_location(self.out, config, self.runs.raw(config).fingerprint, row, 0, network).parent
            for config in self.configs
            for row, network in self.scored_rows(config)
        }
        for folder in folders:
            remove_progress(folder)
        for config in self.configs:
            note_scoring(self.out, config, self.runs.raw(config).fingerprint)

    def _tell_unstackable(self, evaluation: Sequence[Task], reporter: Reporter) -> None:
        """Show which architectures of these tasks cannot be trained in stacks, unless a line named them before."""
        if new := [name for name in tasks.unstackable(self.runs, evaluation) if name not in self._unstackable]:
            self._unstackable.update(new)
            reporter.message(f"networks of {listed(new)} cannot be stacked, and are trained one after another")

    def _report_row(self, task: Task, reporter: Reporter) -> None:
        """Show the score of each row of the accuracy table that an evaluation task has completed."""
        *_, uris, row, numbers, network = RowArguments(*task.arguments)
        for config in self.configs:  # runs may share a row
            key = (self.out, config, self.runs.raw(config).fingerprint, row)
            if (row, network) not in self.scored_rows(config) or numbers[0] >= config.evaluate.seeds:
                continue
            if result_location(*key, numbers[0], network).uri == uris[0] and (score := read_score(*key, network)):
                reporter.message(f"{tasks.row_title(config, row, network)}: {score} % (n={score.n})")

    def _setup(self, dataset: DatasetConfig, executor: Executor, reporter: Reporter) -> tuple[Any, ...]:
        """Arguments of the workers' constructor `StageWorker` for a data set.

        They are made once for each data set, and so all stages of a command can use the same workers.
        """
        if dataset not in self._setups:
            shared = executor.share(self.runs.dataset(dataset, reporter.message))
            self._setups[dataset] = (shared, self.configs[0].cluster, self.distill_worker, self._landmarks())
        return self._setups[dataset]

    def _landmarks(self) -> tuple[str, ...]:
        """URIs of files on this machine's disks, in output folder and store, that workers look for when they start.

        A worker that does not find them does not share these disks. Without this check, missing results would be
        noticed only at the end of a stage. A command that only trains experts has no file in the output folder here:
        its workers never use this folder, which may be on this machine's own disk. All stages of a command have the
        same files, so the command keeps its workers.
        """
        networks = self.runs.networks()
        transforms = [self.runs.experts(networks[0]).transform_file] if networks else []
        leases = [self.runs.folder(self.configs[0]) / LEASE] if self._shares_out else []
        places = [*leases, *transforms]
        return tuple(place.uri for place in places if place.local_path is not None and place.exists())

    def _run(
        self,
        title: str,
        method: str,
        open_tasks: Callable[[Runs], Sequence[Task]],
        executor: Executor,
        reporter: Reporter,
        following: Callable[[Task], Iterable[Task]] = lambda task: (),
    ) -> None:
        """Run the unfinished tasks of one stage and the tasks that they create, one data set after the other.

        Args:
            title: title of the stage in messages.
            method: name of the worker's method that runs a task, unless the task names another.
            open_tasks: function that returns the stage's tasks without a result.
            following: function called for each finished task before its end is shown. Returns further tasks, to run
                after those of the same data set.

        Raises:
            ClusterError: the workers have ended, and this process does not see their results.
        """
        left = open_tasks(self.runs)
        if not left:
            reporter.message(f"{title}: nothing to do, all finished")
            return
        by_dataset: dict[DatasetConfig, list[Task]] = {}
        for task in left:
            by_dataset.setdefault(task.arguments[0].dataset, []).append(task)
        with reporter.stage(title, left) as stage:
            for dataset, group in by_dataset.items():
                names = {task.name for task in group}
                for task, event in executor.run(StageWorker, self._setup(dataset, executor, reporter), method, group):
                    more = following(task) if isinstance(event, Finished) else ()
                    for each in [event.task] if isinstance(event, More) else more:
                        if each.name not in names:  # a task that is retried creates its tasks again
                            names.add(each.name)
                            group.append(each)
                            stage.add(each)
                    if not isinstance(event, More):
                        stage.event(task, event)
                        self._log.event(task, event)
        if unseen := open_tasks(self.runs):
            found = counted(len(unseen), "result")
            if not self.runs.alone:
                reporter.message(f"{title}: looking up to {LAG} s for {found} of other machines")
            fact = f"{title}: {found}, {unseen[0].name} the first, cannot be read on this machine"
            require_shared(lambda: not open_tasks(self.runs), 0 if self.runs.alone else LAG, fact)
