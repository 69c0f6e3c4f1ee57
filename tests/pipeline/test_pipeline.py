"""Tests the pipeline on real digits: equal results everywhere, and after any kind of failure."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from queue import Queue
from typing import Any
from unittest import mock

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from datm_ray import cli, pipeline as pipeline_module
from datm_ray.artifact import Artifact, KeptTransform, load
from datm_ray.config import RunConfig, override, run_identity, scored_on, to_yaml
from datm_ray.core.synthetic import random_rows
from datm_ray.core.training.teacher import Teacher
from datm_ray.data import Transform
from datm_ray.data.dataset import transform_of
from datm_ray.errors import (
    ClusterError,
    ConfigError,
    DatasetError,
    MissingExpertsError,
    RunDirectoryError,
)
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, checks, preview, tasks
from datm_ray.pipeline.folder import LEASE, read_recipe, summaries
from datm_ray.pipeline.runs import Runs
from datm_ray.planning.memory import GPU_PROCESS_BYTES
from datm_ray.planning.plan import plan_run
from datm_ray.planning.work import Row, evaluation
from datm_ray.report.results import cost_lines
from datm_ray.runtime.executor import Event, Executor, Phase, Progress, SerialExecutor
from datm_ray.shape import network_cost
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.evaluate.rows import ROWS, TABLE_ROWS, EvaluateWorker
from datm_ray.stages.evaluate.scores import FAIR_PARTS
from datm_ray.stages.experts.train import expert_group
from datm_ray.stages.methods.selection import coresets_of
from datm_ray.stages.worker import StageWorker
from datm_ray.store import claims
from datm_ray.store.claims import lease
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.trajectories import TrajectoryStore
from tests.conftest import CommandLine, killing_executor, run_here, set_of, stacks_of_any_work, tiny_config
from tests.processes import PROCESSES

QUIET = Reporter(quiet=True)
FILES = ("initial.arrow", "synthetic.arrow")
"""A set before and after its distillation."""


def serial(config: RunConfig) -> Callable[[], Executor]:
    return lambda: SerialExecutor(config.cluster)


def run_all(config: RunConfig, out: Path, start: Callable[[], Executor] | None = None) -> Pipeline:
    pipeline = Pipeline([config], str(out))
    pipeline.run_all(start or serial(config), QUIET)
    return pipeline


def assert_same_set(one: Artifact, other: Artifact) -> None:
    """Assert bit-identical sets, as one machine and number of threads give."""
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.soft_labels, other.soft_labels)
    assert one.step_size == other.step_size


def accuracies(pipeline: Pipeline) -> dict[str, tuple[float, ...]]:
    (summary,) = pipeline_module.summaries(pipeline.out, pipeline.configs)
    return {score.row: score.accuracies for score in summary.scores}


def test_a_run_leaves_experts_a_set_and_every_row_of_the_table(finished_run: Path) -> None:
    """A run leaves stored experts, a loadable set, two seeds of each row, and a report."""
    pipeline = Pipeline([tiny_config()], str(finished_run))
    assert preview.remaining_lines(pipeline.runs) == [
        "0 experts to train",
        "0 sets to distil",
        "0 networks to train for evaluation",
    ]
    assert (
        preview.remaining_lines(Pipeline([tiny_config("name=new")], str(finished_run)).runs)[1]
        == "1 set to distil: new"
    )
    (key,) = TrajectoryStore(str(finished_run / "experts")).groups()
    assert (key.dataset, key.architecture) == ("digits", "convnet")
    artifact = load(str(finished_run / "tiny" / "synthetic.arrow"))
    assert artifact.images.shape == (10, 1, 8, 8)
    assert artifact.labels.tolist() == list(range(10))
    assert {row: len(values) for row, values in accuracies(pipeline).items()} == dict.fromkeys(ROWS, 2)
    assert pipeline_module.report(str(finished_run)).exists()


def test_distillation_changes_images_labels_and_step_size(finished_run: Path) -> None:
    """Distillation learns images, labels and step size."""
    before, after = (load(str(finished_run / "tiny" / name)) for name in ("initial.arrow", "synthetic.arrow"))
    assert not torch.equal(before.images, after.images)
    assert not torch.equal(before.soft_labels, after.soft_labels)
    assert before.step_size != after.step_size


def test_coresets_beside_a_set_are_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--coresets` adds coresets to a recipe's table; they share its experts and its controls."""
    monkeypatch.chdir(tmp_path)
    configs = [config := tiny_config("name=mine", "evaluate.seeds=1"), *coresets_of(config)]
    pipeline = Pipeline(configs, "runs")
    pipeline.run_all(serial(config), QUIET)
    assert [config.method for config in pipeline.configs] == ["datm", "select", "select", "select"]
    assert len(list(Path("runs/experts").rglob("expert-*.arrow"))) == configs[0].experts.count
    assert len(list(Path("runs/controls").rglob("*.json"))) == 3
    heading = pipeline.table().splitlines()[0]
    names = ["mine", "mine-moderate", "mine-el2n", "mine-forgetting"]
    assert [name for name in heading.split() if name.startswith("mine")] == names


def test_rows_with_fixed_labels_stand_in_one_table(tmp_path: Path, finished_run: Path) -> None:
    """A finished run gets rows with hard and fixed labels beside a teacher's, and later commands still show them."""
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    taught = ("evaluate.labels=teacher", "evaluate.full=false", "evaluate.seeds=1")
    fixed = tiny_config(*taught, "evaluate.fixed_labels=true")
    pipeline = Pipeline([fixed], str(out))
    pipeline.evaluate(serial(fixed), QUIET)
    rows = [line.partition("  ")[0] for line in pipeline.table().splitlines()[2:9]]
    assert rows == [TABLE_ROWS[row] for row in TABLE_ROWS]  # "full" was scored before
    assert "not yet" not in pipeline.table()
    later = Pipeline([tiny_config(*taught)], str(out))
    later.evaluate(serial(fixed), QUIET)
    pipeline_module.report(str(out))
    (summary,) = json.loads((out / "summary.json").read_text())
    assert list(summary["test_accuracy"]) == list(TABLE_ROWS)
    assert TABLE_ROWS["random-fixed"] in (out / "report.html").read_text()
    assert TABLE_ROWS["random-fixed"] in [cost["what"] for cost in summary["cost"]]


def test_fair_scores_can_be_added_to_a_finished_run(tmp_path: Path, finished_run: Path) -> None:
    """Fair scores train only their missing rows, and later reports without them requested still show them."""
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    fair = tiny_config("evaluate.fair=true")
    pipeline = Pipeline([fair], str(out))
    assert preview.remaining_lines(pipeline.runs)[-1].startswith(
        "6 networks to train for evaluation: tiny distilled-hard 0,"
    )
    pipeline.evaluate(serial(fair), QUIET)
    assert "LRS, label-robust score" in pipeline.table()
    run_all(tiny_config(), out)
    pipeline_module.report(str(out))
    (summary,) = json.loads((out / "summary.json").read_text())
    assert {name: part["n"] for name, part in summary["fair"].items()} == dict.fromkeys(FAIR_PARTS, 2)
    assert all(0 <= seed <= 1 for name in ("LRS", "ARS") for seed in summary["fair"][name]["seeds"])


class StopsAfter(SerialExecutor):
    """A serial executor that ends like a dead process after this many events."""

    def __init__(self, config: RunConfig, events: int) -> None:
        super().__init__(config.cluster)
        self._left = events

    def run(self, *arguments: Any) -> Iterator[tuple[Any, Event]]:
        for task, event in super().run(*arguments):
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            yield task, event


def test_a_run_stopped_at_any_event_ends_with_the_same_set(tmp_path: Path, finished_run: Path) -> None:
    """A run stopped again and again after a few events ends with the same bits."""
    config = tiny_config()
    stops = 0
    while stops < 30:
        with suppress(KeyboardInterrupt):
            pipeline = run_all(config, tmp_path, lambda: StopsAfter(config, events=7))
            break
        stops += 1
    assert 3 <= stops < 30
    assert_same_set(set_of(tmp_path), set_of(finished_run))
    assert accuracies(pipeline) == accuracies(Pipeline([config], str(finished_run)))


def command_line(*arguments: str) -> None:
    """Run `datm-ray` with these arguments, in a process that a test kills."""
    sys.argv = ["datm-ray", *arguments]
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        cli.main()


@pytest.mark.slow
def test_a_run_killed_with_sigkill_in_every_stage_ends_with_the_same_set(tmp_path: Path, finished_run: Path) -> None:
    """A command killed after an expert, a checkpoint and a score, and run again each time, gives the same set."""
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(to_yaml(tiny_config()))
    kills = 0
    for written in ("experts/**/expert-*.arrow", "tiny/checkpoint.arrow", "tiny/evaluation/**/*.json", ""):
        arguments = ("run", str(recipe), "--out", str(out), "--executor", "serial")
        process = PROCESSES.Process(target=command_line, args=arguments)
        process.start()
        while process.is_alive() and not (written and any(out.glob(written))):
            time.sleep(0.01)
        if written and process.is_alive():
            process.kill()
            kills += 1
        process.join()
    assert process.exitcode == 0
    assert kills > 0
    assert_same_set(set_of(out), set_of(finished_run))


@pytest.mark.ray
@pytest.mark.slow
def test_killed_ray_actors_of_every_stage_change_nothing(ray_cluster: Any, tmp_path: Path, finished_run: Path) -> None:
    """Killing one actor in each stage is reported and changes no bit."""
    losses: list[str] = []
    config = tiny_config()
    pipeline = run_all(config, tmp_path, lambda: killing_executor(config, losses))
    assert len(losses) >= 2  # the third killed actor may have been idle
    assert_same_set(set_of(tmp_path), set_of(finished_run))
    assert accuracies(pipeline) == accuracies(Pipeline([config], str(finished_run)))


def test_finished_work_is_not_done_again(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run gives no task to any executor."""

    class Forbidden(SerialExecutor):
        def run(self, *arguments: Any) -> Iterator[tuple[Any, Event]]:
            raise AssertionError("a task was given out")

    config = tiny_config()
    run_all(config, finished_run, lambda: Forbidden(config.cluster))


def test_a_second_command_on_a_run_is_refused_and_writes_nothing(
    tmp_path: Path, finished_run: Path, datm_ray: CommandLine
) -> None:
    """A run that a command works on is refused to others that write; its store, and reading, are open to all."""
    out, recipe = shutil.copytree(finished_run, tmp_path / "runs"), str(finished_run.parent / "tiny.yaml")
    other = ("--out", str(tmp_path / "other"), "--store", str(out / "experts"))
    with lease(open_location(str(out / "tiny" / LEASE)), 0.0, print, print):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for command in ("run", "experts", "distill", "evaluate"):
            code, _, err = datm_ray(command, recipe, "--out", str(out), "--executor", "serial")
            assert (code, len(err.splitlines())) == (2, 1), err
            assert f"runs/tiny is in use by process {os.getpid()} on " in err
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert datm_ray("run", recipe, "--out", str(out), "--dry-run")[0] == 0
        assert datm_ray("report", str(out))[0] == 0
        assert datm_ray("experts", recipe, *other, "--executor", "serial")[0] == 0
    assert datm_ray("run", recipe, "--out", str(out), "--executor", "serial")[0] == 0
    assert not (out / "tiny" / LEASE).exists()


def test_a_command_whose_run_was_taken_over_ends_in_one_line(
    tmp_path: Path, finished_run: Path, datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that finds its lease taken over stops its work and exits with code 1 and one line."""
    monkeypatch.setattr(claims, "HEARTBEAT", 0.05)
    out, recipe = tmp_path / "runs", str(finished_run.parent / "tiny.yaml")
    place = open_location(str(out / "tiny" / LEASE))

    class Slow(DistillWorker):
        def distill(self, *arguments: Any, **named: Any) -> Iterator[Event]:
            for event in super().distill(*arguments, **named):
                if isinstance(event, Progress):
                    place.write_json({**place.read_json(), "token": 1, "process": 4711})
                    time.sleep(0.3)
                yield event

    monkeypatch.setattr(Pipeline, "distill_worker", Slow)
    store = str(finished_run / "experts")
    code, _, err = datm_ray("distill", recipe, "--out", str(out), "--store", store, "--executor", "serial")
    assert code == 1, err
    assert "runs/tiny was taken over by process 4711 on " in err.splitlines()[-1]
    assert place.read_json()["process"] == 4711


def test_runs_of_one_folder_share_what_they_have_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two recipes share experts, the score of all real data, and one stored whitening."""
    monkeypatch.setattr("datm_ray.artifact.INLINE_BYTES", 0)
    configs = [tiny_config(), tiny_config("name=other", "distill.ipc=2")]
    pipeline = Pipeline(configs, str(tmp_path))
    assert preview.remaining_lines(pipeline.runs)[0].startswith("2 experts to train")
    pipeline.run_all(serial(configs[0]), QUIET)
    assert len(list((tmp_path / "controls").glob("*/full-*.json"))) == 2
    report = pipeline_module.report(str(tmp_path)).read_bytes().decode()
    assert report.index("other") < report.index("tiny")
    table = pipeline.table()
    assert "tiny" in table
    assert "other" in table
    (kept,) = (tmp_path / "transforms").iterdir()
    (beside_experts,) = (tmp_path / "experts").rglob("transform.arrow")
    assert kept.samefile(beside_experts)
    for name in ("tiny/initial.arrow", "tiny/synthetic.arrow", "other/synthetic.arrow"):
        held = load(str(tmp_path / name)).held_transform
        assert isinstance(held, KeptTransform)
        assert held.transform.digest == kept.stem


def test_a_set_may_start_from_any_images_and_keep_hard_labels(tmp_path: Path) -> None:
    """MTT's options start from random images and keep hard labels, whatever their learning rate."""
    config = tiny_config("distill.initial=random", "distill.labels=hard")
    run_all(config, tmp_path)
    before, after = (load(str(tmp_path / "tiny" / name)) for name in ("initial.arrow", "synthetic.arrow"))
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    rows = random_rows(dataset.train_labels, config.distill.ipc, config.seed)
    assert torch.equal(before.images, torch.from_numpy(dataset.train_images[rows]))
    assert not torch.equal(before.images, after.images)
    assert torch.equal(before.soft_labels, after.soft_labels)
    assert torch.allclose(after.soft_labels.softmax(dim=1), torch.eye(10), atol=1e-7)


def test_mtt_is_datm_with_its_options(tmp_path: Path) -> None:
    """Method mtt makes, from a recipe of DATM, the bits that DATM makes with random images and hard labels."""
    mtt = tiny_config("name=mtt", "method=mtt")
    datm = tiny_config("name=datm", "distill.initial=random", "distill.labels=hard")
    pipeline = Pipeline([mtt, datm], str(tmp_path))
    assert preview.remaining_lines(pipeline.runs)[0].startswith("2 experts to train")  # shared
    pipeline.train_experts(serial(mtt), QUIET)
    pipeline.distill(serial(mtt), QUIET)
    first, made = ([load(str(tmp_path / each / file)) for each in ("mtt", "datm")] for file in FILES)
    for ours, theirs in (first, made):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.soft_labels, theirs.soft_labels)
        assert ours.step_sizes == theirs.step_sizes
    assert not torch.equal(first[0].images, made[0].images)
    assert torch.equal(first[0].soft_labels, made[0].soft_labels)
    assert first[0].step_sizes != made[0].step_sizes
    assert run_identity(mtt) != run_identity(datm) | {"name": "mtt"}


def test_another_configuration_under_the_same_name_is_refused(finished_run: Path) -> None:
    """Another configuration under a run's name is an error that names the difference."""
    with pytest.raises(RunDirectoryError, match=r"distill\.iterations \(6 there, 7 here\)"):
        Pipeline([tiny_config("distill.iterations=7")], str(finished_run))


@pytest.mark.parametrize("there", [False, True])
def test_a_run_with_or_without_deterministic_operations_is_not_the_other_s(there: bool, tmp_path: Path) -> None:
    """Runs that differ in cluster.deterministic alone are not mixed, and the error names the key with both values."""
    first, second = (tiny_config(f"cluster.deterministic={each}".lower()) for each in (there, not there))
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(first))
    (folder / "initial.arrow").touch()  # it has results
    values = "true there, false here" if there else "false there, true here"
    with pytest.raises(RunDirectoryError, match=rf"differs in cluster\.deterministic \({values}\)\."):
        Pipeline([second], str(tmp_path))


def test_a_name_without_results_can_be_used_with_other_settings(tmp_path: Path, finished_run: Path) -> None:
    """A run with experts only may change its recipe, one with any result may not; its experts are kept."""
    shutil.copytree(finished_run / "experts", tmp_path / "experts")
    first = Pipeline([tiny_config("evaluate.networks=[lenet]", "dataset.validation=0.3")], str(tmp_path))
    first.train_experts(serial(first.configs[0]), QUIET)
    changed = tiny_config("distill.iterations=7")
    pipeline = Pipeline([changed], str(tmp_path))
    assert preview.remaining_lines(pipeline.runs)[:2] == ["0 experts to train", "1 set to distil: tiny"]
    pipeline.train_experts(serial(changed), QUIET)
    assert read_recipe(pipeline.out / "tiny") == changed
    with pytest.raises(RunDirectoryError, match="belongs to another recipe since this command started"):
        checks.require_names(first.runs)
    for name in ("initial.arrow", "checkpoint.arrow", "synthetic.arrow", "evaluation/distilled-00.json"):
        place = tmp_path / "tiny" / name
        place.parent.mkdir(exist_ok=True)
        place.touch()
        with pytest.raises(RunDirectoryError, match=r"distill\.iterations \(7 there, 6 here\)"):
            Pipeline([tiny_config()], str(tmp_path))
        place.unlink()
        if place.parent.name == "evaluation":
            place.parent.rmdir()


def test_all_real_data_comes_last_and_may_be_left_out(tmp_path: Path, finished_run: Path) -> None:
    """A run without the control has neither its networks nor its row, says so, and can have it later."""
    both = Pipeline([tiny_config("name=one"), tiny_config("name=two", "distill.ipc=2")], str(tmp_path / "none"))
    left = tasks.evaluate_tasks(both.runs, both.scored_rows)
    assert [task.arguments[4] for task in left].index("full") == len(left) - 2
    shutil.copytree(finished_run, tmp_path / "out")
    for path in (tmp_path / "out/controls").rglob("full-*.json"):
        path.unlink()
    without = Pipeline([tiny_config("evaluate.full=false")], str(tmp_path / "out"))
    assert preview.remaining_lines(without.runs)[2] == "0 networks to train for evaluation"
    without.evaluate(serial(without.configs[0]), QUIET)
    assert without.table().splitlines()[-1] == "all real data: skipped (evaluate.full is false)"
    assert not any(line.startswith(("all real data  ", "share")) for line in without.table().splitlines())
    page = Path(pipeline_module.report(str(tmp_path / "out")).path).read_text()
    assert "all real data: skipped" in page
    assert "Not evaluated yet" not in page
    (summary,) = json.loads((tmp_path / "out/summary.json").read_text())
    assert set(summary["test_accuracy"]) == set(ROWS) - {"full"}
    later = Pipeline([tiny_config()], str(tmp_path / "out"))
    assert preview.remaining_lines(later.runs)[2] == "2 networks to train for evaluation: tiny full 0, tiny full 1"
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(finished_run, tmp_path / "out")
    assert "all real data: skipped" not in without.table()


@pytest.mark.parametrize(("is_stacked", "expected"), [
    (False, {"random-hard": (1, 2, 1), "random-soft": (1, 2, 1), "distilled": (1, 0, 1), "full": (1, 2, 0)}),
    (True, {"random-hard": (6, 0, 2), "random-soft": (6, 0, 2), "distilled": (2, 0, 1), "full": (6, 0, 0)}),
])  # fmt: skip
def test_scoring_counts_all_networks_and_sets_of_a_task(
    is_stacked: bool, expected: dict[str, tuple[int, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of a task counts the networks trained together, those of other step sizes, and the sets that it holds."""
    counted = list[tuple[int, int, int]]()

    def memory(*arguments: Any, held: int, sets: int, **_: Any) -> int:
        counted.append((arguments[4], held, sets))
        return 0

    monkeypatch.setattr(tasks, "scoring_memory", memory)
    if is_stacked:
        stacks_of_any_work(monkeypatch)
    pipeline = Pipeline([tiny_config(f"cluster.compile={is_stacked}".lower())], str(tmp_path))
    found = tasks.evaluate_tasks(pipeline.runs, pipeline.scored_rows)
    rows = [task.name.split()[1] for task in found]
    assert len(rows) == len(counted)
    assert dict(zip(rows, counted, strict=True)) == expected


def test_memory_of_a_task_follows_what_the_task_reads(tmp_path: Path) -> None:
    """Micro-batches of `evaluate` lower the memory of the rows that read the key, not of others or of a validation."""
    found = list[dict[str, int]]()
    for number, micro in enumerate((128, 4)):
        changes = ("network.width=64", "dataset.resize=32", "distill.ipc=20", "cluster.compile=false")
        config = tiny_config(*changes, "evaluate.batch_size=128", f"evaluate.micro_batch={micro}")
        pipeline = Pipeline([config], str(tmp_path / str(number)))
        of_rows = {
            each.name.split()[1]: each.memory for each in tasks.evaluate_tasks(pipeline.runs, pipeline.scored_rows)
        }
        found.append({**of_rows, "validation": tasks.validation_task(pipeline.runs, config).memory})
    whole, divided = found
    assert {name for name in whole if divided[name] < whole[name]} == {"random-hard", "random-soft", "distilled"}
    assert [divided[name] for name in ("full", "validation")] == [whole[name] for name in ("full", "validation")]


def test_only_rows_that_a_teacher_labels_reserve_memory_for_it(tmp_path: Path) -> None:
    """A teacher that labels every batch is in the memory of its rows, and not of the others or of a validation."""
    found = list[dict[str, int]]()
    for number, labels in enumerate(("own", "teacher")):
        changes = ("evaluate.cutmix=0", f"evaluate.labels={labels}", "evaluate.teacher.network.architecture=resnet18")
        config = tiny_config(*changes, "cluster.compile=false")
        pipeline = Pipeline([config], str(tmp_path / str(number)))
        of_rows = {
            each.name.split()[1]: each.memory for each in tasks.evaluate_tasks(pipeline.runs, pipeline.scored_rows)
        }
        found.append({**of_rows, "validation": tasks.validation_task(pipeline.runs, config).memory})
    own, taught = found
    assert {name for name in own if taught[name] > own[name]} == {"random-soft", "distilled"}


def test_a_row_trained_together_has_the_accuracies_of_networks_trained_alone(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds that are trained together are one task; a result that exists stays, and the others are nearly the same."""
    config = tiny_config("cluster.compile=true")
    stacks_of_any_work(monkeypatch)
    shutil.copytree(finished_run, tmp_path / "out")
    results = [*(tmp_path / "out/controls").rglob("*.json"), *(tmp_path / "out/tiny/evaluation").rglob("*.json")]
    before = {path: json.loads(path.read_text())["test_accuracy"] for path in results}
    kept = next(path for path in results if path.name == "distilled-00.json")
    for path in results:
        if path != kept:
            path.unlink()
    content = kept.read_bytes()
    pipeline = Pipeline([config], str(tmp_path / "out"))
    names = [task.name for task in tasks.evaluate_tasks(pipeline.runs, pipeline.scored_rows)]
    assert names == [f"tiny {row} 0-1" for row in ("random-hard", "random-soft", "distilled", "full")]
    more = tasks.evaluate_tasks(pipeline.runs, pipeline.scored_rows, workers=8)
    assert len(more) == 7
    pipeline.evaluate(serial(config), QUIET)
    assert kept.read_bytes() == content
    after = {path: json.loads(path.read_text())["test_accuracy"] for path in results}
    assert after == pytest.approx(before, abs=0.02)


TAUGHT = ("evaluate.labels=teacher", "evaluate.cutmix=1", "evaluate.learning_rate=0.05", "evaluate.schedule=cosine")


def test_a_finished_run_is_scored_under_the_labels_of_its_first_expert(tmp_path: Path, finished_run: Path) -> None:
    """Rows are scored again under a teacher beside the first results, and the seeds of one task as alone."""
    out = shutil.copytree(finished_run, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*-0?.json") if "experts" not in path.parts}
    own, taught = tiny_config(), tiny_config(*TAUGHT)
    pipeline = Pipeline([taught], str(out))
    plan = preview.remaining_lines(pipeline.runs)
    assert plan[:2] == ["0 experts to train", "0 sets to distil"]
    assert plan[2].startswith("6 networks to train for evaluation")  # of random-hard for its schedule
    pipeline.evaluate(serial(taught), QUIET)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (
        preview.remaining_lines(pipeline.runs)[2]
        == preview.remaining_lines(Pipeline([own], str(out)).runs)[2]
        == "0 networks to train for evaluation"
    )
    scored = accuracies(pipeline)
    assert set(scored) == set(ROWS)
    assert scored["distilled"] != accuracies(Pipeline([own], str(out)))["distilled"]
    assert scored["full"] == accuracies(Pipeline([own], str(out)))["full"]
    assert "tiny (a teacher's labels)" in pipeline.table()
    training = set_of(out).training()
    assert (training.learning_rate, training.temperature, training.cosine) == (0.05, taught.evaluate.temperature, True)
    worker = EvaluateWorker(pipeline.runs.dataset(taught.dataset), taught.cluster)
    uris = [str(tmp_path / f"{number}.json") for number in range(2)]
    folder = str(out / "tiny")
    for row in ("distilled", "random-soft"):
        *_, done = worker.evaluate(taught, pipeline.store_uri, folder, uris, row, (0, 1))
        found = [(each["test_accuracy"], each["step_size"], each["learned_step_size"]) for each in done.result]
        assert found == [(each, 0.05, None) for each in scored[row]]
        for uri in uris:
            Path(uri).unlink()


def test_runs_of_several_methods_are_scored_under_one_teacher(tmp_path: Path) -> None:
    """With `evaluate.teacher`, the networks of every method learn from one network, which is trained once and noted.

    A method without experts then has random images under these labels in its table.
    """
    own = ["evaluate.teacher={network: lenet, experts: {epochs: 2}}", "evaluate.seeds=1", "evaluate.full=false"]
    changes = [*TAUGHT, *own, "distill.validate_every=0"]
    chosen = tiny_config("name=chosen", "method=select", "experts.count=1", "distill.initial_step_size=0.1", *changes)
    matched = tiny_config("name=matched", "method=dm", *changes)
    pipeline = Pipeline([matched], str(tmp_path))
    assert preview.remaining_lines(pipeline.runs)[0].startswith("1 expert to train: expert 0 of digits/lenet/")
    with pytest.raises(MissingExpertsError, match=r"lenet/\w+ holds 0 of 1 experts of matched"):
        pipeline.evaluate(serial(matched), QUIET)
    pipeline.run_all(serial(matched), QUIET)
    assert set(accuracies(pipeline)) == {"random-hard", "random-soft", "distilled"}
    both = Pipeline([matched, chosen], str(tmp_path))
    assert preview.remaining_lines(both.runs)[0].startswith(
        "1 expert to train: expert 0 of digits/convnet/"
    )  # chooses; the teacher is there
    both.run_all(serial(matched), QUIET)
    assert "random-soft" in accuracies(Pipeline([chosen], str(tmp_path)))
    (shared,) = (str(key) for key in TrajectoryStore(both.store_uri).groups() if key.architecture == "lenet")
    for config in (matched, chosen):
        note = json.loads((tmp_path / config.name / "dataset.json").read_text())
        assert f"{shared}/0" in note["experts"]
    costs = [[line.title for line in cost_lines(each)] for each in summaries(both.out, both.configs)]
    assert [titles[0] for titles in costs] == ["teacher, lenet", "teacher, convnet"]
    cost_file = tmp_path / "matched" / "experts-cost.json"
    noted = [{key: each[key] for key in each if key != "role"} for each in json.loads(cost_file.read_text())]
    cost_file.write_text(json.dumps(noted))  # as earlier versions did
    assert cost_lines(summaries(both.out, [matched])[0])[0].title == "experts, lenet"
    assert "training" not in both.table()
    worker = EvaluateWorker(both.runs.dataset(matched.dataset), matched.cluster)
    images = torch.from_numpy(both.runs.dataset(matched.dataset).test_images[:5])
    folder = open_location(str(tmp_path / "matched"))
    taught = [worker._lessons(each, both.store_uri, "distilled", folder, images) for each in (matched, chosen)]
    logits = [each.network(images) for each in taught if isinstance(each, Teacher)]
    assert torch.equal(*logits)


def test_a_teacher_that_is_not_trained_and_an_endless_warm_up_are_refused(tmp_path: Path) -> None:
    """A method without experts has no teacher, unless MetaDD has the backbone trained; nothing is written."""
    with pytest.raises(
        ConfigError, match=r"method dm trains no network that could be the teacher.*evaluate\.labels=own"
    ):
        Pipeline([tiny_config("method=dm", "evaluate.labels=teacher")], str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"warmup_epochs is 4, and there are 4 epochs"):
        Pipeline([tiny_config("evaluate.warmup_epochs=4")], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    meta = "metadd={auxiliaries: [lenet], experts: {epochs: 2}}"
    assert preview.remaining_lines(
        Pipeline([tiny_config("method=dm", meta, "evaluate.labels=teacher")], str(tmp_path / "out")).runs
    )


def test_tasks_are_weighed_by_their_work(tmp_path: Path) -> None:
    """Weights count image passes, by epochs, images, candidates and iterations, and steps of small sets besides."""
    threes = "cluster.experts_at_a_time=3"
    own = ("evaluate.real_epochs=40", "evaluate.networks=[vgg11]", "distill.ipc=10", "experts.count=9")
    config = tiny_config(threes, *own)
    more = tiny_config(threes, "name=more", "experts.epochs=20")
    runs = Pipeline([config, more, override(config, ["name=long", "distill.iterations=60"])], str(tmp_path))
    every = [*tasks.expert_tasks(runs.runs), *tasks.distill_tasks(runs.runs)]
    every += tasks.evaluate_tasks(runs.runs, runs.scored_rows)
    weights = {task.name.partition(" of ")[0]: task.weight for task in every}
    shape = runs.runs.shape(config)
    passes = 54 * config.distill.student_steps * 50  # of iterations, each with student steps of batches of 50
    assert weights["long"] - weights["tiny"] == pytest.approx(11 * passes * network_cost(config, shape).flop)
    assert weights["experts 0-1"] / weights["experts 6-8"] == pytest.approx(2 * 20 / (3 * 5)), weights
    distilled = weights["tiny distilled 0"]
    assert 2.9 * distilled < weights["tiny random-hard 0"] < 3 * distilled  # test images pass one network of three
    assert weights["tiny distilled on vgg11 0"] > 20 * distilled
    one, full = (
        {part.kind: part.operations for part in evaluation(Row(config, row, None, shape), 1)}
        for row in ("distilled", "full")
    )
    assert full["real"] / one["training"] == pytest.approx(3 * 40 * 1222 / (4 * 100))
    assert full["steps"] / one["steps"] == 3 * 40 * 10 / 4


def test_a_row_is_reported_once_when_all_its_seeds_are_there(
    tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row's line has its score, also of networks scored earlier, for each run that shares it, before the end's."""
    shutil.copytree(finished_run, tmp_path / "out")
    next((tmp_path / "out/tiny/evaluation").rglob("distilled-01.json")).unlink()
    config = tiny_config("evaluate.seeds=3")
    pipeline = Pipeline([config], str(tmp_path / "out"))
    pipeline.evaluate(serial(config), Reporter())
    shown = capsys.readouterr().err.splitlines()
    lines = [line for line in shown if line.endswith("(n=3)")]
    (summary,) = pipeline_module.summaries(pipeline.out, pipeline.configs)
    assert lines[-1].startswith("tiny, all real data: ")
    assert shown.index(lines[-1]) < next(i for i, line in enumerate(shown) if line.startswith("Evaluation: done in"))
    assert sorted(lines) == sorted(f"tiny, {ROWS[score.row]}: {score} % (n=3)" for score in summary.scores)
    shutil.copytree(tmp_path / "out/tiny", tmp_path / "out/more")
    recipe = tmp_path / "out/more/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: tiny", "name: more"))
    for result in (tmp_path / "out/controls").rglob("full-01.json"):
        result.unlink()
    both = [config, tiny_config("evaluate.seeds=3", "name=more")]
    Pipeline(both, str(tmp_path / "out")).evaluate(serial(config), Reporter())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("(n=3)")]
    assert [line.partition(":")[0] for line in lines] == ["tiny, all real data", "more, all real data"]


def test_architectures_that_cannot_be_stacked_are_named_once(
    tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the architectures that are trained one after another; none does without a compiler or need."""
    shutil.copytree(finished_run, tmp_path / "out")
    monkeypatch.setattr(Pipeline, "_run", lambda self, title, method, open_tasks, *_: open_tasks(self.runs))

    def shown(*changes: str) -> list[str]:
        config = scored_on(tiny_config(*changes), ["vgg11:4", "resnet18:4", "vit-small:4"])
        pipeline = Pipeline([config], str(tmp_path / "out"))
        for _ in range(2):
            pipeline.evaluate(serial(config), Reporter())
        return [line for line in capsys.readouterr().err.splitlines() if "stacked" in line]

    assert shown("cluster.compile=true") == []  # too little work
    stacks_of_any_work(monkeypatch)
    line = "networks of resnet18 and vit-small cannot be stacked, and are trained one after another"
    assert shown("cluster.compile=true") == [line]
    assert shown("cluster.compile=false") == []


def test_more_images_per_class_than_a_class_has_is_refused(tmp_path: Path) -> None:
    """IPC beyond the class size is an error before anything is written."""
    with pytest.raises(DatasetError, match=r"distill\.ipc is 5000"):
        Pipeline([tiny_config("distill.ipc=5000")], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def photos(folder: Path, count: int) -> RunConfig:
    """The tiny run on two classes of this many 8x8 images each, with as many test images and a thumbnail."""
    for i in range(count):
        for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / f"{i}.pgm").write_bytes(b"P5 8 8 255\n" + bytes([i] * 32 + [len(place) * 9] * 32))
    (folder / "train/cat/._0.pgm").write_bytes(b"")
    return tiny_config("dataset.source=folder", f"dataset.path={folder}", "dataset.validation=0.2")


def test_the_largest_ipc_of_a_small_class_is_computed(tmp_path: Path) -> None:
    """Ten images less two for validation allow IPC 8: the error's remedy, which works."""
    config = photos(tmp_path / "data", 10)
    with pytest.raises(DatasetError) as caught:
        Pipeline([override(config, ["distill.ipc=10"])], str(tmp_path / "out"))
    assert str(caught.value) == (
        "distill.ipc is 10, but class 'cat' of data has 8 training images. 2 more are for validation "
        "(dataset.validation=0.2) and 10 for testing. Use --set distill.ipc=8, or add images of this class."
    )
    Pipeline([override(config, ["distill.ipc=8"])], str(tmp_path / "out"))


def test_images_that_stay_in_their_files_give_the_same_run(tmp_path: Path) -> None:
    """Experts, set and accuracies of a run whose images are decoded when needed have the bits of a run in memory."""
    settings = ["dataset.resize=8", "dataset.normalisation=standard", "evaluate.full=true", "experts.test_every=1"]
    config = override(photos(tmp_path / "data", 12), settings)
    held, streamed = (
        run_all(override(config, [f"dataset.streamed={value}"]), tmp_path / value) for value in ("false", "true")
    )
    sets = [load(str(tmp_path / value / "tiny" / "synthetic.arrow")) for value in ("false", "true")]
    assert_same_set(*sets)
    assert accuracies(held) == accuracies(streamed)
    assert plan_run(streamed.configs[0]).shape.bytes == 0


def test_how_the_files_were_read_is_reported_before_and_in_a_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A dry run and a run both report skipped files and the set of each file."""
    config = photos(tmp_path / "data", 10)
    pipeline = Pipeline([config], str(tmp_path / "out"), alone=True)
    lines = preview.data_lines(pipeline.runs)
    assert lines == [
        "data: 2 classes, 16 training, 4 validation, 20 test images of 1x8x8",
        "data: 1 file or folder was not taken: hidden 1",
        "data: training images: train; test images: test",
    ]
    with pytest.raises(KeyboardInterrupt):
        pipeline.train_experts(serial(config), Stopped())
    assert capfd.readouterr().err.splitlines()[1:4] == lines


class Stopped(Reporter):
    """Stops the command when its first stage starts."""

    def stage(self, title: str, tasks: int) -> Any:
        raise KeyboardInterrupt


def test_more_networks_can_be_scored_on_a_finished_run(tmp_path: Path) -> None:
    """More seeds are added to a finished run's scores, and nothing else is done again."""
    run_all(tiny_config("evaluate.seeds=1"), tmp_path)
    pipeline = Pipeline([tiny_config("evaluate.seeds=2")], str(tmp_path))
    assert [line.split()[0] for line in preview.remaining_lines(pipeline.runs)] == ["0", "0", "4"]


def test_whitening_that_does_not_fit_is_refused_unless_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whitening too large for memory is refused with options that help, unless the store has it."""
    white = tiny_config("dataset.normalisation=zca", "experts.count=1")
    pipeline = Pipeline([white], str(tmp_path / "done"))
    with monkeypatch.context() as scarce:
        scarce.setattr("datm_ray.data.transform.available_memory", lambda: 40 * 64**2 - 1)
        message = r"zca to images of 1x8x8 takes .* is free\..*dataset\.normalisation=standard.*dataset\.resize"
        with pytest.raises(DatasetError, match=message):
            Pipeline([white], str(tmp_path / "out"))
        with pytest.raises(DatasetError, match=message):
            pipeline.runs.dataset(white.dataset)
        Pipeline([tiny_config()], str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    transform = pipeline.runs.dataset(white.dataset).transform
    pipeline.runs.experts(white).write_transform(transform.to_arrays(), transform.to_metadata())
    monkeypatch.setattr("datm_ray.data.transform.available_memory", lambda: 0)
    other = tiny_config("dataset.normalisation=zca", "network.width=8", "name=other")
    again = Pipeline([other, white], str(tmp_path / "done"))
    assert again.runs.dataset(other.dataset).transform.fingerprint == transform.fingerprint


def test_whitening_that_takes_minutes_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan includes the cost of whitening until it is stored; a standard transform or few images cost little."""
    plain = tiny_config("dataset.resize=64")
    white = override(plain, ["dataset.normalisation=auto"])
    assert len(preview.data_lines(Pipeline([white], str(tmp_path)).runs)) == 1  # fewer images than pixels
    monkeypatch.setattr("datm_ray.data.transform._EIGEN_SECONDS", 1e-7)
    _, line = preview.data_lines(Pipeline([white], str(tmp_path)).runs)
    cost = "152 MiB of memory, 19.1 MiB of disk and about 3 min on two CPU cores"
    assert line == f"digits: fitting zca takes {cost}, once"
    planned = plan_run(white).lines()
    assert f"  fitting zca      {cost}, once, by the process that starts the workers" in planned
    assert len(preview.data_lines(Pipeline([plain], str(tmp_path)).runs)) == 1


def test_whitening_is_fitted_once_for_an_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one folder fit a large transform once, whatever their networks, also if they start at the same time."""
    fits: list[str] = []
    began, lines = threading.Event(), Queue[str]()

    def fit(*arguments: Any, **options: Any) -> Transform:
        fits.append("fit")
        began.set()
        lines.get(timeout=10)  # until the other run waits
        return transform_of(*arguments, **options)

    monkeypatch.setattr("datm_ray.pipeline.runs.transform_of", fit)
    configs = [
        tiny_config("dataset.resize=16", "dataset.normalisation=zca", f"name=w{width}", f"network.width={width}")
        for width in (4, 8, 16)
    ]
    all_runs = [Runs([config], str(tmp_path)) for config in configs]
    first = threading.Thread(target=all_runs[0].dataset, args=(configs[0].dataset,))
    first.start()
    assert began.wait(10)
    second = all_runs[1].dataset(configs[1].dataset, lines.put)
    first.join()
    third = all_runs[2].dataset(configs[2].dataset)
    assert fits == ["fit"]
    assert second.transform.digest == third.transform.digest == all_runs[0].dataset(configs[0].dataset).transform.digest


@pytest.mark.parametrize(
    ("elsewhere", "has_gpu", "device"), [(0, 1, "cuda"), (1, 1, "cpu"), (0, 0, "cpu"), (1, 0, "cpu")]
)
def test_a_driver_on_a_cluster_leaves_gpus_to_the_workers(
    elsewhere: int, has_gpu: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whitening is fitted on this machine's GPU, but on the CPU where the GPU belongs to a cluster's workers."""
    asked: list[str] = []

    def fit(*arguments: Any, device: str, **options: Any) -> Transform:
        asked.append(device)
        return transform_of(*arguments, **options)

    monkeypatch.setattr("datm_ray.pipeline.runs.transform_of", fit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(has_gpu))
    config = tiny_config("dataset.normalisation=zca")
    Runs([config], str(tmp_path), elsewhere=bool(elsewhere)).dataset(config.dataset)
    assert asked == [device]


def test_runs_are_resolved_for_the_size_of_their_images(tmp_path: Path) -> None:
    """All written files name normalisation and depth, and either recipe finds the run."""
    config = override(tiny_config("experts.count=1"), ["dataset.normalisation=auto", "network.depth=null"])
    named = tiny_config("dataset.normalisation=zca", "network.depth=2", "experts.count=1")
    run_here(tmp_path, config, stage="train_experts")
    recipe = (tmp_path / "tiny/recipe.yaml").read_text()
    assert "normalisation: zca\n" in recipe
    assert "depth: 2\n" in recipe
    for each in (config, named):
        assert preview.remaining_lines(Pipeline([each], str(tmp_path)).runs)[0] == "0 experts to train"
    (tmp_path / "tiny/initial.arrow").touch()
    with pytest.raises(RunDirectoryError, match=r"dataset\.normalisation \(zca there, standard here\)"):
        Pipeline([override(config, ["dataset.normalisation=standard"])], str(tmp_path))


def test_changed_images_under_a_finished_run_are_noticed(finished_run: Path, tmp_path: Path) -> None:
    """Changed images under a finished run are an error, wherever the data set lies."""
    shutil.copytree(finished_run, tmp_path / "copy")
    note = tmp_path / "copy/tiny/dataset.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"fingerprint": "0" * 16}))
    with pytest.raises(RunDirectoryError, match="other images"):
        Pipeline([tiny_config()], str(tmp_path / "copy"))


def test_a_run_of_an_earlier_version_is_resumed(finished_run: Path, tmp_path: Path) -> None:
    """A run of an earlier version, whose note of its images is shorter, resumes if the fingerprint is equal."""
    shutil.copytree(finished_run, tmp_path / "out")
    note = tmp_path / "out" / "tiny" / "dataset.json"
    known = json.loads(note.read_text())
    assert known.pop("test_images") > 0
    note.write_text(json.dumps(known))
    assert preview.remaining_lines(Pipeline([tiny_config()], str(tmp_path / "out")).runs)[1] == "0 sets to distil"


def test_places_given_to_workers_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get absolute places, because their working directory may differ."""
    monkeypatch.chdir(tmp_path)
    pipeline = Pipeline([tiny_config()], "runs", "store")
    assert pipeline.store_uri == str(tmp_path / "store")
    assert Pipeline([tiny_config()], "runs").store_uri == str(tmp_path / "runs/experts")


def test_results_that_workers_wrote_elsewhere_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without a shared disk end their stage with one clear error."""
    monkeypatch.setattr("datm_ray.pipeline.pipeline.LAG", 1)

    class Elsewhere(SerialExecutor):
        def run(self, worker: Any, setup: Any, method: str, tasks: Any) -> Iterator[tuple[Any, Event]]:
            yield from ()

    config = tiny_config()
    with pytest.raises(ClusterError, match=r"do not share this disk.*s3://"):
        run_all(config, tmp_path, lambda: Elsewhere(config.cluster))


@pytest.mark.parametrize(
    ("command", "missing", "is_noticed"),
    [("run_all", "out", True), ("train_experts", "store", True), ("train_experts", "out", False)],
)
def test_workers_that_do_not_share_a_disk_are_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, missing: str, is_noticed: bool
) -> None:
    """Workers without a folder that they need do no work: their first task fails. Experts need the store alone."""
    monkeypatch.setattr("datm_ray.store.files.filesystem.LAG", 0)
    config, events = tiny_config(), list[Event]()

    class Elsewhere(SerialExecutor):
        def run(self, worker: Any, setup: Any, method: str, tasks: Any) -> Iterator[tuple[Any, Event]]:
            (tmp_path / missing).rename(tmp_path / "elsewhere")
            try:
                for task, event in super().run(worker, setup, method, tasks):
                    events.append(event)
                    yield task, event
            finally:
                (tmp_path / "elsewhere").rename(tmp_path / missing)

    pipeline = Pipeline([config], str(tmp_path / "out"), str(tmp_path / "store"))
    error = pytest.raises(ClusterError, match=rf" has no {tmp_path / missing}/.*do not share this disk.*s3://")
    with error if is_noticed else nullcontext():
        getattr(pipeline, command)(lambda: Elsewhere(config.cluster), QUIET)
    assert any(isinstance(event, Progress) for event in events) != is_noticed
    assert bool(list((tmp_path / "store").rglob("expert-*"))) != is_noticed


@pytest.mark.parametrize(("limit", "looks"), [(3600.0, 61), (90.0, 31), (2.0, 1)])
def test_a_worker_ends_its_look_for_shared_files_before_it_counts_as_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, looks: int
) -> None:
    """A worker looks once a second for a minute, and for a third of a shorter cluster.progress_timeout."""
    place = mock.Mock(local_path=str(tmp_path), **{"exists.return_value": False})
    monkeypatch.setattr("datm_ray.stages.worker.open_location", lambda _: place)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(ClusterError, match="do not share this disk"):
        StageWorker(mock.Mock(), tiny_config(f"cluster.progress_timeout={limit}").cluster, shared=["gone"])
    assert place.exists.call_count == looks


def test_results_that_a_shared_disk_shows_late_are_waited_for(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that another machine has written, and that this one sees a second later, ends its stage well."""
    shutil.copytree(finished_run, tmp_path / "copy")
    shown_at, info = [math.inf], LocalFileSystem.info

    def late(self: LocalFileSystem, path: str, **options: Any) -> Any:
        if str(path).endswith("synthetic.arrow") and time.monotonic() < shown_at[0]:
            raise FileNotFoundError(path)
        return info(self, path, **options)

    class Elsewhere(SerialExecutor):
        def run(self, worker: Any, setup: Any, method: str, tasks: Any) -> Iterator[tuple[Any, Event]]:
            shown_at[0] = time.monotonic() + 1.0
            yield from ()

    monkeypatch.setattr(LocalFileSystem, "info", late)
    pipeline = Pipeline([tiny_config()], str(tmp_path / "copy"))
    assert preview.remaining_lines(pipeline.runs)[1] == "1 set to distil: tiny"
    pipeline.distill(lambda: Elsewhere(tiny_config().cluster), Reporter(quiet=True))
    assert preview.remaining_lines(pipeline.runs)[1] == "0 sets to distil"


def test_memory_of_workers_follows_their_gpus_and_not_this_machines(tmp_path: Path) -> None:
    """Tasks for workers with GPUs reserve the memory of GPU workers; the recipe still leaves the GPUs open."""

    class FirstTaskError(Exception):
        pass

    class OnGpus(SerialExecutor):
        def __init__(self, gpus: float) -> None:
            super().__init__(config.cluster)
            self.gpus_per_worker = gpus

        def run(self, worker: Any, setup: Any, method: str, tasks: Any) -> Iterator[tuple[Any, Event]]:
            memory[self.gpus_per_worker] = tasks[0].memory
            raise FirstTaskError
            yield

    config, memory = tiny_config(), dict[float | None, int]()
    for gpus in (0.0, 1.0):
        with pytest.raises(FirstTaskError):
            run_all(config, tmp_path, lambda gpus=gpus: OnGpus(gpus))  # type: ignore[misc]
    assert memory[1.0] == GPU_PROCESS_BYTES != memory[0.0]
    assert "gpus_per_worker: null" in (tmp_path / "tiny/recipe.yaml").read_text()


def test_an_unfinished_distillation_resumes_with_fewer_workers(tmp_path: Path) -> None:
    """An unfinished distillation resumes with fewer workers; an unstarted one needs all it requests."""

    class FirstTaskError(Exception):
        pass

    class Cramped(SerialExecutor):
        """An executor with resources for one worker, which ends at its first task."""

        def require_workers(self, name: str, size: int, *, light: bool = False) -> None:
            if size > 1:
                raise ClusterError(f"{name} wants {size} workers at once")

        def run(self, worker: Any, setup: Any, method: str, tasks: Any) -> Iterator[tuple[Any, Event]]:
            raise FirstTaskError

    config = tiny_config("cluster.shards=3", "cluster.memory=4GiB")
    with pytest.raises(ClusterError, match="tiny wants 3 workers at once"):
        run_all(config, tmp_path, lambda: Cramped(config.cluster))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/checkpoint.arrow").touch()
    with pytest.raises(FirstTaskError):
        run_all(config, tmp_path, lambda: Cramped(config.cluster))


def test_a_precision_of_gpus_wants_one_where_the_workers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU precision needs a GPU on the workers' machines, whatever this machine has."""
    config, out = tiny_config("cluster.precision=tf32"), str(tmp_path)
    asks, has_none = (tiny_config("cluster.precision=tf32", f"cluster.gpus_per_worker={gpus}") for gpus in (0.5, 0.0))
    for one_is_here in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda here=one_is_here: here)
        for elsewhere in (False, True):
            with pytest.raises(ClusterError, match=r"cluster\.precision is 'tf32', but there is no GPU"):
                Pipeline([has_none], out, elsewhere=elsewhere)
        for accepted in (config, asks):
            Pipeline([accepted], out, elsewhere=True)
    for accepted in (config, asks):
        Pipeline([accepted], out)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for refused in (config, asks):
        with pytest.raises(ClusterError, match="there is no GPU"):
            Pipeline([refused], out)


def test_bfloat16_without_a_gpu_wants_a_cpu_that_multiplies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in bfloat16 is refused at once on a CPU that would emulate it; workers elsewhere check their own CPU."""
    config, out = tiny_config("cluster.precision=bfloat16"), str(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("datm_ray.runtime.executor.multiplies_bfloat16", lambda: False)
    Pipeline([config], out, elsewhere=True)
    with pytest.raises(ClusterError, match="This machine's CPU computes it far more slowly"):
        Pipeline([config], out)
    with pytest.raises(ClusterError, match="This machine's CPU computes it far more slowly"):
        DistillWorker(mock.Mock(), config.cluster)
    monkeypatch.setattr("datm_ray.runtime.executor.multiplies_bfloat16", lambda: True)
    Pipeline([config], out)


def test_recipes_with_different_clusters_are_refused(tmp_path: Path) -> None:
    """Recipes of one command with different clusters are refused, because they share workers."""
    with pytest.raises(ConfigError, match="cluster sections"):
        Pipeline([tiny_config(), tiny_config("name=other", "cluster.threads_per_worker=2")], str(tmp_path))


def test_any_folder_name_becomes_a_group_of_the_store(tmp_path: Path) -> None:
    """A data set named after any folder, with blanks or accents, becomes a valid group."""
    for name, folder in (("my data", "my-data"), ("_données", "donn-es"), ("日本", "dataset")):
        assert expert_group(str(tmp_path), tiny_config(), name, "f").key.dataset == folder


def test_stages_that_lack_their_input_name_the_command_to_run_first(tmp_path: Path, tiny: RunConfig) -> None:
    """Distilling without experts, or evaluating without a set, is one line with the missing command."""
    pipeline = Pipeline([tiny], str(tmp_path / "out"))
    with pytest.raises(MissingExpertsError, match="datm-ray experts tiny"):
        pipeline.distill(serial(tiny), QUIET)
    pipeline.train_experts(serial(tiny), QUIET)
    with pytest.raises(RunDirectoryError, match="datm-ray distill tiny"):
        pipeline.evaluate(serial(tiny), QUIET)


def test_resuming_from_a_checkpoint_starts_at_its_iteration(tmp_path: Path, tiny: RunConfig) -> None:
    """A resumed run reports its checkpoint's iteration at the start, and then the next one."""
    pipeline = Pipeline([tiny], str(tmp_path))
    pipeline.train_experts(serial(tiny), QUIET)
    dataset = pipeline.runs.dataset(tiny.dataset)
    arguments = (tiny, pipeline.store_uri, str(tmp_path / "tiny"))
    events = DistillWorker(dataset, tiny.cluster).distill(*arguments)
    for event in events:
        if isinstance(event, Progress) and event.done == 5:
            break  # the last checkpoint is of iteration 4
    events.close()
    resumed = list(DistillWorker(dataset, tiny.cluster).distill(*arguments))
    assert resumed[:2] == [Phase("preparing the networks"), Phase("preparing student steps")]
    assert [event.done for event in resumed if isinstance(event, Progress)] == [4, 5, 6]


def test_a_distillation_resumes_with_any_number_of_shards_that_can_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distillation resumes with as many shards as possible, and needs enough to hold its images."""
    config = tiny_config("cluster.shards=6")
    pipeline = Pipeline([config], str(tmp_path))
    for least, sizes in ((1, (5, 4, 3, 2, 1)), (3, (5, 4, 3)), (6, ())):
        monkeypatch.setattr(tasks, "_would_fit", lambda _, __, layout, least=least: layout.get("shards", 1) >= least)
        assert tasks.smaller_groups(pipeline.runs, config) == sizes
