"""Tests the command line: bad input is one clear line, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from datm_ray import cli
from datm_ray.cli import ending
from datm_ray.config import to_yaml
from datm_ray.core.networks import registry as networks
from datm_ray.core.networks.architectures import ConvNet
from datm_ray.errors import WorkerLostError
from datm_ray.planning.machines import parse_cluster
from datm_ray.runtime.stopping import Interrupted
from datm_ray.stages.methods.selection import CORESETS
from tests.conftest import CommandLine, assert_one_line, documented_keys, tiny_config


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


BAD_INPUT = {
    "unknown recipe": (["run", "digits-ipc2"], "did you mean 'digits-ipc1'"),
    "ipc beyond class": (["run", "digits-ipc1", "--set", "distill.ipc=5000"], "use --set distill.ipc=118"),
    "batch norm backbone": (["run", "digits-ipc1", "--set", "network.norm=batch"], "network.norm=instance"),
    "batch norm further backbone": (
        ["run", "digits-ipc1", "--set", "backbones=[{network: {norm: batch}}]"],
        "backbones.0.network.norm=instance",
    ),
    "no auxiliaries": (["run", "digits-ipc1", "--set", "metadd={auxiliaries: []}"], "metadd.auxiliaries is []"),
    "auxiliary without maps": (
        ["run", "digits-ipc1", "--set", "metadd={auxiliaries: [{architecture: mlp}]}"],
        "metadd.auxiliaries.0.architecture has no feature maps",
    ),
    "weight without metadd": (["run", "digits-ipc1", "--set", "metadd.variance=2.0"], "metadd.auxiliaries"),
    "scored with batch norm": (["evaluate", "digits-ipc1", "--set", "network.norm=batch"], "network.norm=instance"),
    "auxiliary is the backbone": (
        ["run", "digits-ipc1", "--set", "metadd={auxiliaries: [{width: 32, depth: 2}]}"],
        "metadd.auxiliaries.0 is the backbone itself",
    ),
    "backbone without maps": (
        ["run", "digits-ipc1", "--set", "network.architecture=mlp", "--set", "metadd={auxiliaries: [{width: 8}]}"],
        "network.architecture has no feature maps",
    ),
    "auxiliaries apart from none": (
        ["run", "digits-ipc1", "--set", "cluster.auxiliaries_apart=true"],
        "the recipe has no metadd section",
    ),
    "unknown architecture to score on": (
        ["evaluate", "digits-ipc1", "--arch", "lenet,resnet"],
        "--arch resnet: architecture is 'resnet', which is not registered",
    ),
    "image too small for what is asked for": (
        ["evaluate", "digits-ipc1", "--arch", "vit-small:32", "--set", "dataset.resize=17"],
        "--arch vit-small:32: vit-small has no patch size",
    ),
    "recipe's own network to score on": (
        ["evaluate", "digits-ipc1", "--set", "evaluate.networks=[{architecture: lenet}, {architecture: resnet}]"],
        "evaluate.networks.1.architecture is 'resnet'",
    ),
    "width that is none": (["evaluate", "digits-ipc1", "--arch", "mlp:wide"], "write NAME:WIDTH"),
    "batch norm planned": (["plan", "digits-ipc1", "--set", "network.norm=batch"], "network.norm=instance"),
    "too deep": (["run", "digits-ipc1", "--set", "network.depth=9"], "depth of at most"),
    "unknown network": (["run", "digits-ipc1", "--set", "network.architecture=resnet"], "choose one of: alexnet"),
    "unknown augmentation": (["run", "digits-ipc1", "--set", "distill.augmentation=blur"], "is not an operation"),
    "missing data": (
        ["run", "digits-ipc1", "--set", "dataset.source=folder", "--set", "dataset.path=absent"],
        "absent",
    ),
    "path for digits": (["run", "digits-ipc1", "--set", "dataset.path=absent"], "take no dataset.path"),
    **{
        f"images beyond memory, {' '.join(command)}": (
            [*command, "digits-ipc1", "--set", "dataset.resize=9000"],
            "of 1x9000x9000 need",
        )
        for command in (["plan"], ["run"], ["run", "--dry-run"], ["experts"], ["distill"], ["evaluate"])
    },
    "reserved name": (["run", "digits-ipc1", "--set", "name=experts"], "choose another name"),
    "name of a logger's folder": (["run", "digits-ipc1", "--set", "name=tensorboard"], "choose another name"),
    "folder is a file": (["run", "digits-ipc1", "--out", "/dev/null/runs"], "/dev/null is not a folder"),
    "same run twice": (["run", "digits-ipc1", "digits-ipc1"], "named 'digits-ipc1'"),
    "unknown scheme": (["run", "digits-ipc1", "--out", "gopher://x/y"], "gopher"),
    "no experts": (["distill", "digits-ipc1", "--executor", "serial"], "datm-ray experts digits-ipc1"),
    "no set": (["evaluate", "digits-ipc1", "--executor", "serial"], "datm-ray experts digits-ipc1"),
    "no runs": (["report", "empty"], "holds no runs"),
    "no store": (["store", "ls", "absent"], "holds no experts"),
    "unreachable cluster": (["experts", "digits-ipc1", "--address", "ray://127.0.0.1:1"], "127.0.0.1:1"),
    "unreadable memory": (["run", "digits-ipc1", "--memory", "8 apples"], "use a number with a unit"),
    "too little memory": (["plan", "digits-ipc1", "--memory", "100MiB"], "may take 100 MiB"),
    "unreadable cluster": (
        ["plan", "digits-ipc1", "--cluster", "gpus=many"],
        "gpus is 'many', and must be a whole number",
    ),
    "cluster of fewer cores than a worker": (
        ["plan", "digits-ipc1", "--cluster", "cpus=1", "--set", "cluster.threads_per_worker=2"],
        "a worker takes 2 cores, and the cluster has 1",
    ),
    "cluster of too little memory": (["plan", "digits-ipc10", "--cluster", "gpus=2,memory=2MiB"], "may take 2 MiB"),
    "whitening of large images": (
        ["plan", "digits-ipc1", "--data-shape", "1x200x200,10,90000", "--set", "dataset.normalisation=zca"],
        "fitting zca to images of 1x200x200 takes",
    ),
    "recipe for no images": (["init", "absent"], "absent does not exist"),
    "recipe for two times": (["init", "digits", "--minutes", "5", "--hours", "1"], "both given"),
    "recipe for endless hours": (["init", "absent", "--hours", "inf"], "minutes is inf"),
    "recipe where there is no folder": (["init", "digits", "--out", "absent/x.yaml"], "cannot write absent"),
    "cores measured for GPUs": (["plan", "digits-ipc1", "--cluster", "gpus=1", "--measure"], "it has no GPU"),
    "no gpu": (["experts", "digits-ipc1", "--executor", "serial", "--set", "cluster.device=cuda"], "GPU"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(
    case: str, datm_ray: CommandLine, tmp_path: Path
) -> None:
    """Each mistake is one line of error before anything is written."""
    command, expected = BAD_INPUT[case]
    code, out, err = datm_ray(*command)
    require_one_line((code, out, err), expected, tmp_path)


@pytest.mark.ray
def test_more_workers_than_a_cluster_holds_are_refused(ray_cluster: Any, datm_ray: CommandLine, tmp_path: Path) -> None:
    """More workers than a cluster holds are an error with their number, before anything is written."""
    code, out, err = datm_ray("experts", "digits-ipc1", "--set", "cluster.workers=500")
    require_one_line((code, out, err.removeprefix("Starting Ray ...\n")), "500 worker", tmp_path)


def test_a_recipe_for_own_images_is_written_once_and_planned(datm_ray: CommandLine, tmp_path: Path) -> None:
    """`init` writes one file, which `recipe show` reads, names the next command, and replaces no file."""
    asked = ["init", "digits", "--resize", "16", "--ipc", "2", "--minutes", "10"]
    code, out, err = datm_ray(*asked)
    assert code == 0, err
    assert out.splitlines()[-1] == "Next: datm-ray run digits-ipc2.yaml"
    assert files_below(tmp_path) == ["digits-ipc2.yaml"]
    code, out, _ = datm_ray("recipe", "show", "digits-ipc2.yaml")
    assert code == 0
    assert "resize: 16" in out
    before = (tmp_path / "digits-ipc2.yaml").read_text()
    assert datm_ray(*asked)[0] == 2
    assert (tmp_path / "digits-ipc2.yaml").read_text() == before


def test_a_recipe_for_own_images_comes_with_notes_on_them(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`init` tells which files were not taken and what serves for testing, in JSON too."""
    monkeypatch.setattr("datm_ray.planning.init.suggest.measured", lambda *_, **__: parse_cluster("cpus=2,gflops=60"))
    for number in range(24):
        place = tmp_path / "birds" / "train" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(place)
    for name in ("train/a/x.heic", "train/b/x.heic"):
        (tmp_path / "birds" / name).touch()
    asked = ["init", "birds", "--resize", "8", "--ipc", "1", "--minutes", "1"]
    code, out, err = datm_ray(*asked)
    assert code == 0, err
    notes = out.splitlines()[:2]
    assert notes[0] == "2 files or folders were not taken: .heic 2"
    assert notes[1] == "training images: train; test images: a fixed 20\N{NO-BREAK SPACE}% of each class of these"
    assert "the disk of the folder" not in out
    code, out, _ = datm_ray(*asked, "--out", "again.yaml", "--json")
    found = json.loads(out)
    assert found["notes"][:2] == notes
    assert set(found) == documented_keys("init")
    monkeypatch.setattr("shutil.disk_usage", lambda _: mock.Mock(free=1000, total=2000))
    code, out, _ = datm_ray(*asked, "--out", "full.yaml")
    assert re.search(r"\nThis stores .* MiB, and the disk of the folder runs has 1000 B left\. Try: ", out)
    monkeypatch.setattr("shutil.disk_usage", mock.Mock(side_effect=OSError(5, "Input/output error")))
    code, out, _ = datm_ray(*asked, "--out", "unknown.yaml")
    assert (code, "the disk of the folder" in out) == (0, False)


def require_one_line(ended: tuple[int, str, str], expected: str, folder: Path) -> None:
    """Assert one line of error with the expected words, exit code 2, and nothing written to the folder."""
    code, out, err = ended
    assert code == 2
    assert out == ""
    assert err.startswith("datm-ray: ")
    assert len(err.splitlines()) == 1
    assert expected.lower() in err.lower()
    assert files_below(folder) == []


def test_an_output_folder_that_cannot_be_written_is_one_line(datm_ray: CommandLine, tmp_path: Path) -> None:
    """A file in place of the output folder is an error before any work."""
    (tmp_path / "taken").write_text("")
    assert_one_line(datm_ray("run", "digits-ipc1", "--out", "taken", "--executor", "serial"), "datm-ray: Cannot write")


def test_a_truncated_store_file_is_named(datm_ray: CommandLine, finished_run: Path, tmp_path: Path) -> None:
    """`store verify` and `distill` both name the damaged file and never use it."""

    shutil.copytree(finished_run, tmp_path / "runs")
    (expert,) = (tmp_path / "runs").rglob("expert-00001.arrow")
    expert.write_bytes(expert.read_bytes()[:-1000])
    assert_one_line(datm_ray("store", "verify", "runs/experts"), "expert-00001.arrow")
    for name in ("synthetic.arrow", "checkpoint.arrow", "initial.arrow"):
        (tmp_path / "runs/tiny" / name).unlink()
    code, _, err = datm_ray("distill", str(finished_run.parent / "tiny.yaml"), "--executor", "serial")
    assert code == 2
    assert "expert-00001.arrow" in err.splitlines()[-1]
    assert not (tmp_path / "runs/tiny/synthetic.arrow").exists()


@pytest.mark.parametrize("content", [b"", b"not an artifact", b"ARROW1\0\0 and then nothing"])
def test_a_file_that_is_no_artifact_is_named(content: bytes, datm_ray: CommandLine, tmp_path: Path) -> None:
    """Exporting a file that is no synthetic set is one line of error."""
    (tmp_path / "set.arrow").write_bytes(content)
    assert_one_line(datm_ray("export", "set.arrow", "--out", "exported"), "set.arrow")
    assert files_below(tmp_path) == ["set.arrow"]


def test_a_checkpoint_is_no_artifact(datm_ray: CommandLine, finished_run: Path) -> None:
    """Exporting a checkpoint is an error that says what the file is."""
    code, _, err = datm_ray("export", str(finished_run / "tiny/checkpoint.arrow"), "--out", "x")
    assert code == 2
    assert "checkpoint" in err


@pytest.mark.parametrize(("kind", "count"), [("png", 10), ("parquet", 1), ("pt", 3), ("arrow", 1), ("safetensors", 1)])
def test_exports_are_written(kind: str, count: int, datm_ray: CommandLine, finished_run: Path, tmp_path: Path) -> None:
    """Each format writes its files and prints their place."""
    code, out, _ = datm_ray("export", str(finished_run / "tiny/synthetic.arrow"), "--format", kind, "--out", "exported")
    assert ("soft labels and step size are in the .arrow file" in out) == (kind == "png")
    assert code == 0
    assert f"{count} file{'s' * (count > 1)} " in out
    assert len(files_below(tmp_path)) == count


def test_store_commands_describe_the_experts(datm_ray: CommandLine, finished_run: Path) -> None:
    """`store ls`, `show` and `verify` agree on two experts of one recipe."""
    store = str(finished_run / "experts")
    assert "2 experts," in datm_ray("store", "ls", store)[1]
    shown = datm_ray("store", "show", store)[1]
    assert "epochs 0-5" in shown
    assert "width=4" in shown
    assert datm_ray("store", "verify", store)[1].startswith("whole: 2 experts, ")


def test_the_store_inside_a_folder_of_runs_is_pointed_at(datm_ray: CommandLine, finished_run: Path) -> None:
    """A folder of runs given as a store is an error that names the store inside."""
    assert_one_line(datm_ray("store", "ls", str(finished_run)), f"ive its store, {finished_run / 'experts'}")


def test_an_interrupt_says_that_nothing_is_lost(datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C exits with the usual code, and says how to resume."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("datm_ray.pipeline.Pipeline.run_all", interrupted)
    code, _, err = datm_ray("run", "digits-ipc1", "--executor", "serial")
    assert (code, err) == (130, "datm-ray: stopped. Run the same command again to resume.\n")
    monkeypatch.setattr("datm_ray.pipeline.report", interrupted)
    code, _, err = datm_ray("report", "runs")
    assert (code, err) == (130, "datm-ray: stopped.\n")  # nothing to resume


@pytest.mark.parametrize("further", [(), (KeyboardInterrupt,), (OSError, KeyboardInterrupt)])
def test_an_interrupt_names_what_was_saved(
    further: tuple[type[BaseException], ...], datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line says from which iteration it resumes, also after a further Ctrl-C; SIGTERM has its exit code."""
    end = Interrupted("birds: iteration 21 of 60")
    end.exit_code = 143

    def interrupted(*_: object, **__: object) -> None:
        with ExitStack() as closing:
            for each in reversed(further):
                closing.push(mock.Mock(side_effect=each))
            raise end

    monkeypatch.setattr("datm_ray.pipeline.Pipeline.run_all", interrupted)
    code, _, err = datm_ray("run", "digits-ipc1", "--executor", "serial")
    line = "stopped. Saved birds: iteration 21 of 60. Run the same command again to resume from there."
    assert (code, err) == (143, f"datm-ray: {line}\n")


def test_a_signal_while_ray_is_closed_ends_with_what_was_saved(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during the close ends the process without exit handlers, after the line on what was saved."""

    def interrupted(*_: object, **__: object) -> None:
        try:
            raise Interrupted("birds: iteration 21 of 60")
        finally:
            end = Interrupted()
            end.is_at_once = True
            raise end

    monkeypatch.setattr("datm_ray.pipeline.Pipeline.run_all", interrupted)
    exits = mock.Mock(side_effect=SystemExit(130))
    monkeypatch.setattr("os._exit", exits)
    code, _, err = datm_ray("run", "digits-ipc1", "--executor", "serial")
    line = "stopped. Saved birds: iteration 21 of 60. Run the same command again to resume from there."
    assert (code, err) == (130, f"datm-ray: {line}\n")
    exits.assert_called_once_with(130)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_while_ray_is_closed_hides_no_failure(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    """A failed command that is interrupted while it closes Ray ends at once, with its failure's line and exit code."""

    def failed(*_: object, **__: object) -> None:
        with ExitStack() as closing:
            for _ in range(signals):
                end = Interrupted()
                end.is_at_once = True
                closing.push(mock.Mock(side_effect=end))
            try:
                raise KeyError("inner")
            except KeyError:
                raise WorkerLostError("birds lost its worker 4 times without progress") from None

    monkeypatch.setattr("datm_ray.pipeline.Pipeline.run_all", failed)
    exits = mock.Mock(side_effect=SystemExit(1))
    monkeypatch.setattr("os._exit", exits)
    code, _, err = datm_ray("run", "digits-ipc1", "--executor", "serial")
    assert (code, err) == (1, "datm-ray: birds lost its worker 4 times without progress.\n")
    exits.assert_called_once_with(1)


def test_an_end_at_once_removes_the_temporary_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The home folder made for a user without one is removed also where no exit handler runs."""
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(ending, "_home", None)
    monkeypatch.setattr("os.path.expanduser", lambda _: "~")
    monkeypatch.setattr("atexit.register", mock.Mock())
    monkeypatch.setattr("os._exit", exits := mock.Mock())
    ending.find_home()
    home = Path(os.environ["HOME"])
    assert home.is_dir()
    ending._exit_at_once(130)
    assert not home.exists()
    exits.assert_called_once_with(130)


def test_coresets_are_planned_beside_a_set(datm_ray: CommandLine, tmp_path: Path) -> None:
    """`run --coresets` adds a run for each choice of real images, which trains no further experts."""
    found = [
        datm_ray("run", "digits-ipc1", *more, "--dry-run", "--out", str(tmp_path)) for more in ([], ["--coresets"])
    ]
    alone, shown = (shown.splitlines() for _, shown, _ in found)
    (experts,) = (line for line in alone if "to train:" in line and "expert" in line)
    assert experts in shown
    (sets,) = (line for line in shown if "to distil" in line)
    assert sets.startswith(f"4 sets to distil: digits-ipc1, digits-ipc1-{CORESETS[0]}, digits-ipc1-{CORESETS[1]}")
    assert not any("left out" in logged for *_, logged in found)


def test_a_coreset_that_cannot_be_made_is_named_with_what_to_do(datm_ray: CommandLine, tmp_path: Path) -> None:
    """A line names the coreset for which experts store too few epochs; with its advice, none is left out."""
    dry = ("run", "digits-sre2l-ipc10", "--coresets", "--dry-run", "--out", str(tmp_path), "--set")
    _, shown, logged = datm_ray(*dry, "experts.epochs=4")
    assert "\n3 sets to distil" in shown
    (line,) = (line for line in logged.splitlines() if "left out" in line)
    assert line.startswith("digits-sre2l-ipc10-forgetting is left out: select.by is 'forgetting', and experts store")
    assert "--set experts.keep_epochs=4" in line
    _, shown, logged = datm_ray(*dry, "experts.epochs=4", "--set", "experts.keep_epochs=4")
    assert "\n4 sets to distil" in shown
    assert "left out" not in logged


def test_the_control_on_all_real_data_can_be_skipped(datm_ray: CommandLine, tmp_path: Path) -> None:
    """`run --skip-full` plans no network for it; with --fair, which needs it, it is one clear line."""
    out = ("--out", str(tmp_path / "out"))
    code, shown, _ = datm_ray("run", "digits-ipc1", "--skip-full", "--dry-run", *out)
    assert code == 0
    assert any(line.startswith("15 networks to train for evaluation:") for line in shown.splitlines())
    assert_one_line(
        datm_ray("evaluate", "digits-ipc1", "--skip-full", "--fair", *out),
        "evaluate.fair needs the control on all real data, but evaluate.full is false",
        "or set evaluate.full=true",
    )


@pytest.mark.parametrize("name", ["dataset.json", "distilled-00.json", "cost.json", "experts-cost.json"])
def test_a_result_of_another_shape_is_a_damaged_file(
    name: str, datm_ray: CommandLine, finished_run: Path, tmp_path: Path
) -> None:
    """A result of valid JSON in another shape is one line with the file's name."""
    out = shutil.copytree(finished_run, tmp_path / "copy")
    next((out / "tiny").rglob(name)).write_text('{"a": [1]}')
    assert_one_line(datm_ray("report", str(out)), name)


def test_a_dry_run_refuses_what_the_run_would(datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run refuses an unwritable place and missing GPUs, as the run does."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("file").touch()
    for words, expected in (
        (["--out", "file"], "file is not a folder"),
        (["--set", "cluster.gpus_per_worker=1"], "this machine has none"),
        (["--set", "cluster.device=cuda"], "this machine has none"),
    ):
        assert_one_line(datm_ray("run", "digits-ipc1", "--dry-run", *words), expected)


def test_a_second_run_has_nothing_to_do(datm_ray: CommandLine, finished_run: Path) -> None:
    """Running a finished command again does nothing; so does a dry run, which writes nothing."""
    before = files_below(finished_run)
    recipe = str(finished_run.parent / "tiny.yaml")
    code, out, _ = datm_ray("run", recipe, "--out", str(finished_run), "--dry-run")
    data, experts, *_ = out.splitlines()
    assert (code, experts) == (0, "0 experts to train")
    assert data == "digits: 10 classes, 1,222 training, 216 validation, 359 test images of 1x8x8"
    assert files_below(finished_run) == before
    code, _, err = datm_ray("run", recipe, "--out", str(finished_run), "--executor", "serial")
    assert code == 0
    assert err.count("nothing to do") == 3


def test_stages_one_by_one_lead_from_one_to_the_next(datm_ray: CommandLine, finished_run: Path, tmp_path: Path) -> None:
    """experts, distill and evaluate name the next command, and report writes the report."""
    recipe = str(finished_run.parent / "tiny.yaml")
    for command, following in (("experts", "distill"), ("distill", "evaluate"), ("evaluate", "report")):
        code, out, _ = datm_ray(command, recipe, "--executor", "serial")
        assert code == 0
        assert f"Next: datm-ray {following}" in out
    assert datm_ray("report")[1] == f"Report: {tmp_path / 'runs/report.html'}\n"


def test_recipes_are_listed_and_shown_as_files_that_run(datm_ray: CommandLine, tmp_path: Path) -> None:
    """`recipe show` prints a file that `run` takes back."""
    names = [line.split()[0] for line in datm_ray("recipe", "list")[1].splitlines()]
    assert {"digits-ipc1", "digits-ipc10", "cifar10-ipc50", "tiny-imagenet-ipc50"} <= set(names)
    shown = datm_ray("recipe", "show", "digits-ipc10")[1]
    (tmp_path / "digits-ipc10.yaml").write_text(shown)
    assert max(map(len, datm_ray("recipe", "show", "digits16-metadd-ipc1")[1].splitlines())) <= 100
    assert datm_ray("recipe", "show", "digits-ipc10.yaml")[1] == shown[shown.index("\nname:") + 1 :]


def test_a_plan_is_ten_lines_and_needs_no_data(
    datm_ray: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan has a headline and needs for each recipe, uses the given budget and writes nothing."""
    monkeypatch.setattr("datm_ray.planning.measure._seconds", lambda *_, **__: (0.2, 0.1))
    seen = "metadd={auxiliaries: [{architecture: lenet}]}"
    code, out, err = datm_ray(
        "plan", "digits-ipc10", "cifar10-ipc1", "--memory", "3GiB", "--set", "dataset.path=absent"
    )
    assert (code, err) == (0, "")
    titles = [line.partition(":") for line in out.splitlines() if not line.startswith(" ")]
    assert [title for title, *_ in titles] == ["digits-ipc10", "cifar10-ipc1"]
    assert all(
        re.search(r"memory .* of 3 GiB a worker, about .* of CPUs, .* on the clock, [0-9.]+ [MG]iB of", needs)
        for *_, needs in titles
    )
    assert len(out.splitlines()) <= 2 * 10
    for row in ("data", "experts", "distillation", "evaluation", "CPU time", "storage"):
        assert out.count(f"\n  {row:<16} ") == 2, row
    assert out.count("fitting zca      360 MiB of memory, once") == 1  # digits are not whitened
    assert files_below(tmp_path) == []
    code, out, _ = datm_ray("plan", "digits-ipc1", "-v", "--memory", "3GiB", "--set", seen, "--set", "cluster.shards=2")
    assert code == 0
    for expected in (
        "computing",
        "a shard sums",
        "the process itself",
        "the trace of",
        "networks of metadd",
    ):
        assert expected in out, expected


@pytest.mark.parametrize(
    "images",
    [
        ["dataset.source=folder"],
        ["dataset.source=parquet", "dataset.streamed=false"],
        ["dataset.path=absent"],
        ["dataset.path=s3://bucket/birds"],
        ["dataset.source=parquet", "dataset.path='a.parquet,b.parquet'"],
    ],
)
def test_a_plan_of_images_elsewhere_names_its_way_out(images: list[str], datm_ray: CommandLine, tmp_path: Path) -> None:
    """A plan that finds no images names the option that stands for them; a run, which needs them, does not."""
    settings = [word for each in images for word in ("--set", each)]
    command = ("imagenet-sre2l-ipc10", *settings)
    described = ("--cluster", "gpus=8,memory=80GiB,tflops=20,network=25Gbps")
    way_out = "or plan without the images: --data-shape CxHxW,CLASSES,IMAGES"
    require_one_line(datm_ray("plan", *command, *described), way_out, tmp_path)
    assert way_out not in datm_ray("run", "--dry-run", *command)[2]
    code, _, err = datm_ray("plan", *command, *described, "--data-shape", "3x224x224,1000,1281167")
    assert (code, err) == (0, "")


def test_a_plan_for_a_cluster_suggests_a_valid_layout(datm_ray: CommandLine) -> None:
    """The suggested layout of a plan is a valid configuration, also for a data set that is absent."""
    described = ["--cluster", "gpus=64,memory=80GiB,tflops=60,network=25Gbps"]
    code, out, err = datm_ray("plan", "tiny-imagenet-ipc50", "--data-shape", "3x64x64,1000,1281167", *described)
    assert (code, err) == (0, "")
    layout = next(line.split("layout", 1)[1] for line in out.splitlines() if line.startswith("  layout"))
    command, _, workers = layout.partition(": ")
    assert workers.endswith(" of 64 workers distil")
    again = datm_ray("plan", "tiny-imagenet-ipc50", "--data-shape", "3x64x64,1000,1281167", *shlex.split(command))
    assert again[0] == 0, again[2]
    assert "on the clock" in out
    assert "fitting zca      5.62 GiB of memory, 576 MiB of disk and about 54 min on two CPU cores" in out
    assert "about" in out.splitlines()[0]
    for text in (again[1], out):
        assert "of 50,000 images" in text
    assert "GPU time         unknown: not measured" in again[1]


def test_a_plan_for_a_cluster_says_what_of_the_recipe_it_does_not_follow(datm_ray: CommandLine) -> None:
    """A plan for a cluster lists beside its layout the recipe's shards, workers and GPUs that it replaces."""
    own = ["cluster.shards=3", "cluster.workers=6", "cluster.gpus_per_worker=0.5"]
    set_ = [word for each in own for word in ("--set", each)]
    described = ["--memory", "3GiB", "--cluster", "gpus=1,memory=80GiB,tflops=60"]
    code, out, err = datm_ray("plan", "digits-ipc1", *described, *set_)
    assert (code, err) == (0, "")
    ignored = [line for line in out.splitlines() if line.endswith(f"; not followed: {', '.join(own)} of the recipe")]
    assert [line.split()[0] for line in ignored] == ["layout"]
    assert len(out.splitlines()) <= 10
    for same in ([], ["--set", "cluster.gpus_per_worker=1"]):
        assert "not followed" not in datm_ray("plan", "digits-ipc1", *described, *same)[1]
    assert "not followed" not in datm_ray("plan", "digits-ipc1", "--memory", "3GiB", "--set", "cluster.shards=3")[1]


def test_a_plan_may_time_real_steps_first(datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """--measure bases a plan's hours on steps timed here; the other lines stay."""
    plan = ["plan", "digits-ipc1", "--memory", "3GiB", "--set", "cluster.compile=false", "--set", "cluster.workers=1"]
    planned = []
    for seconds in (1.0, 10.0):
        monkeypatch.setattr("datm_ray.planning.measure._seconds", lambda *_, seconds=seconds, **__: (seconds, seconds))
        code, out, _ = datm_ray(*plan, "--measure")
        assert code == 0
        assert "; measured here" in out
        (found,) = json.loads(datm_ray(*plan, "--measure", "--json")[1])
        planned.append([found["hours"][stage] for stage in ("experts", "distillation", "evaluation")])
    assert planned[1] == pytest.approx([10 * each for each in planned[0]])


def test_debug_mode_shows_the_traceback(datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """DATM_RAY_DEBUG=1 shows the traceback of an error."""
    from datm_ray.errors import ConfigError

    monkeypatch.setenv("DATM_RAY_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["datm-ray", "recipe", "show", "nothing"])
    with pytest.raises(ConfigError):
        cli.main()


def test_help_answers_without_loading_torch_or_ray() -> None:
    """`--help` imports neither torch nor Ray, which keeps it fast."""
    code = (
        "import sys; sys.argv = ['datm-ray', '--help']\n"
        "from datm_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'numpy', 'pyarrow', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
    print(f"--help took {time.perf_counter() - started:.2f} s")


def test_a_plan_shows_every_backbone(datm_ray: CommandLine) -> None:
    """The headline is the largest backbone's; --verbose shows the parts of each."""
    wider = "backbones=[{network: {width: 64, depth: 2}}]"
    code, out, _ = datm_ray("plan", "digits-ipc1", "--memory", "3GiB", "--set", wider, "--verbose")
    assert code == 0
    first, second = out.partition("memory of a worker that distils digits-ipc1, backbone 0")[2].split("backbone 1")
    trace = [next(line for line in part.splitlines() if "the trace" in line) for part in (first, second)]
    assert trace[0] != trace[1]


def test_the_next_command_repeats_the_options(datm_ray: CommandLine) -> None:
    """The suggested next command repeats the options; networks that cannot be matched get none."""
    Path("tiny.yaml").write_text(to_yaml(tiny_config()))
    options = ["--out", "my runs", "--set", "experts.count=1", "--store", "s", "--executor", "serial"]
    code, out, err = datm_ray("experts", "tiny.yaml", *options)
    assert code == 0, err
    following = next(line for line in out.splitlines() if line.startswith("Next: datm-ray "))
    words = shlex.split(following.removeprefix("Next: datm-ray "))
    assert words == ["distill", "tiny.yaml", *options]
    assert datm_ray(*words)[0] == 0
    code, out, _ = datm_ray("experts", "tiny.yaml", *options, "--set", "network.norm=batch", "--set", "name=batch")
    assert code == 0
    assert "Next" not in out


def test_experts_of_another_version_s_network_are_refused(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored experts of an architecture that has changed are one line of error."""
    Path("tiny.yaml").write_text(to_yaml(tiny_config("experts.count=1")))
    assert datm_ray("experts", "tiny.yaml", "--executor", "serial")[0] == 0
    monkeypatch.setitem(networks._BUILDERS, "convnet", lambda spec: ConvNet(spec.model_copy(update={"width": 5})))
    for command in ("experts", "distill", "evaluate", "run"):
        code, out, err = datm_ray(command, "tiny.yaml", "--executor", "serial")
        assert (code, out) == (2, "")
        assert "do not fit the present convnet" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_of_a_run_with_or_without_metadd_is_not_the_other_s(there: bool, datm_ray: CommandLine) -> None:
    """A run with MetaDD and one without are never mixed in a folder; one line says which it is."""
    with_meta = tiny_config("metadd={auxiliaries: [{architecture: lenet}]}")
    first, second = (with_meta, tiny_config()) if there else (tiny_config(), with_meta)
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/recipe.yaml").write_text(to_yaml(first))
    Path("runs/tiny/initial.arrow").touch()  # it has results
    Path("tiny.yaml").write_text(to_yaml(second))
    code, out, err = datm_ray("run", "tiny.yaml", "--executor", "serial")
    assert (code, out) == (2, "")
    assert f"it differs in metadd ({'set there, not set' if there else 'not set there, set'} here)" in err.lower()
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_set_is_scored_on_other_architectures(datm_ray: CommandLine) -> None:
    """Other architectures are scored with learned and tuned step sizes beside a control, also in the report."""
    auxiliary = "experts: {count: 1, epochs: 2, learning_rate: 0.02, augmentation: ''}"
    config = tiny_config("evaluate.seeds=1", f"metadd={{auxiliaries: [{{architecture: lenet}}], {auxiliary}}}")
    Path("tiny.yaml").write_text(to_yaml(config))
    code, _, err = datm_ray("run", "tiny.yaml", "--executor", "serial")
    assert code == 0, err
    scored = ("--arch", "lenet,mlp:8", "--seeds", "2")
    code, out, err = datm_ray("evaluate", "tiny.yaml", "--executor", "serial", *scored)
    assert code == 0, err
    cells = [re.split(r" {2,}", line) for line in out.splitlines()]
    kinds = {line[0]: line[1] for line in cells if len(line) == 5}
    assert (kinds["convnet (width 4)"], kinds["lenet"], kinds["mlp (width 8)"]) == ("same", "seen", "unseen")
    for word in ("learned step size", "tuned step size", "mean, seen", "mean, unseen", "n = 2"):
        assert word in out
    assert datm_ray("report", "runs")[0] == 0
    page = Path("runs/report.html").read_text()
    for word in ("On other architectures", "What networks see", "Meta-feature ratio", "mlp (width 8)"):
        assert word in page
    summary = json.loads(Path("runs/summary.json").read_text())[0]
    assert [each["kind"] for each in summary["networks"]] == ["same", "seen", "unseen"]
    assert 0 <= summary["meta_feature_ratio"]["after"] <= 1
    code, _, err = datm_ray("run", "tiny.yaml", "--executor", "serial", "--set", "evaluate.seeds=2")
    assert code == 0, err
    assert "mlp (width 8)" in Path("runs/report.html").read_text()  # later commands keep what was scored


def fails_with(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    """Make every run fail."""

    def run_all(*_: object) -> None:
        raise failure

    monkeypatch.setattr("datm_ray.pipeline.Pipeline.run_all", run_all)


def make_folders_for_logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the folder `there`, for output, and the folder `temporary`, which holds logs without an output folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    Path("temporary").mkdir()
    Path("there").mkdir()


def test_a_failure_that_nobody_expects_is_one_line_and_a_log(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An unexpected failure is one line; its traceback is in the output folder, or else in a temporary file."""
    make_folders_for_logs(monkeypatch, tmp_path)
    for failure, expected in (
        (ZeroDivisionError("division\nby zero"), "unexpected ZeroDivisionError: division by zero. The traceback"),
        (MemoryError(), "there is not enough memory (MemoryError). Try: `datm-ray plan`"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "there is not enough memory"),
        (OSError(12, "Cannot allocate memory"), "there is not enough memory"),
        (
            BrokenPipeError(32, "Broken pipe"),
            "unexpected BrokenPipeError: [Errno 32] Broken pipe",
        ),  # such as a server's
    ):
        fails_with(monkeypatch, failure)
        for out in ("there", "absent"):
            code, printed, err = datm_ray("run", "digits-ipc1", "--executor", "serial", "--out", out)
            assert (code, printed, len(err.splitlines())) == (1, "", 1), err
            assert expected in err
            log = Path(err.rpartition(" is in ")[2].rstrip(".\n"))
            assert log.parent == (Path("there") if out == "there" else tmp_path / "temporary")
            assert "Traceback" in log.read_text()
            assert "run digits-ipc1" in log.read_text()
    assert not Path("absent").exists()


def test_a_dry_run_that_fails_writes_no_log_into_the_output_folder(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An unexpected failure of a dry run, which must write nothing, leaves its traceback in a temporary file."""
    make_folders_for_logs(monkeypatch, tmp_path)

    def fails(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("datm_ray.pipeline.preview.remaining_lines", fails)
    for options in (("--out", "there", "--dry-run"), ("--dry-run", "--out", "there")):
        code, _, err = datm_ray("run", "digits-ipc1", "--executor", "serial", *options)
        assert code == 1
        assert str(tmp_path / "temporary") in err
    assert list(Path("there").iterdir()) == []


def test_a_path_that_the_locale_cannot_encode_is_one_line(tmp_path: Path) -> None:
    """A recipe's path with letters beyond an ASCII locale is bad input, with the variable that mends it."""
    (tmp_path / "folder ü").mkdir()
    (tmp_path / "birds.yaml").write_text("base: digits-ipc1\ndataset: {source: folder, path: folder ü}\n", "utf-8")
    command = [sys.executable, "-m", "datm_ray", "run", "birds.yaml", "--dry-run", "--out", "."]
    ascii_ = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=ascii_, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1), ended.stderr
    assert "a path holds characters that this locale cannot encode ('ascii' codec" in ended.stderr
    assert "Try: PYTHONUTF8=1" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["birds.yaml", "folder ü"]


def test_the_log_of_a_failure_holds_no_secrets(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An unexpected failure shows and logs no value of a job's variables, and no password of an address."""
    key = '-----BEGIN\nline-1\\x"quoted"\n-----END'
    values = {"A": "from-shell", "B": "it's hidden", "LONGER": "from-shell-too", "KEY": key, "FILE": "in-a-file"}

    def fails(_: object, address: str) -> None:
        shown = f"{values} or {json.dumps(values)} or {' '.join(values.values())}"
        raise ZeroDivisionError(f"no answer from {address} for {shown} {'-' * 1000}")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("datm_ray.runtime.ray.jobs.Jobs.__init__", fails)
    monkeypatch.setenv("A", "from-shell")
    (tmp_path / "env.yaml").write_text("env_vars: {FILE: in-a-file}\n")
    variables = ("--env", "WANDB_API_KEY=0123abcd", "--env", "A", "--env=B=it's hidden", "--env", "C=no")
    variables += ("--env", "LONGER=from-shell-too", "--env", f"KEY={key}", "--runtime-env", "env.yaml")
    address = ("--address", "http://user:pass-word@gw:8265")
    code, _, err = datm_ray("job", "submit", "digits-ipc1", "--out", "s3://b/x", *address, *variables)
    assert (code, len(err.splitlines())) == (1, 1), err
    log = Path(err.rpartition(" is in ")[2].rstrip(".\n")).read_text()
    assert "WANDB_API_KEY=***' --env 'A=***' '--env=B=***' --env 'C=***'" in log
    assert "ZeroDivisionError: no answer from http://***@gw:8265" in log
    for secret in ("0123abcd", "from-shell", "-too", "s hidden", "line-1", "quoted", "in-a-file", "pass-word", "C=no"):
        assert secret not in log + err


def test_a_reader_that_has_gone_ends_a_command_in_silence(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed pipe, as in `datm-ray recipe list | head -1`, ends a command silently with the usual exit code."""
    for buffering in (-1, 1, 0):
        read, write = os.pipe()
        os.close(read)
        with monkeypatch.context() as patched, open(write, "wb", buffering=min(buffering, 0)) as raw:
            patched.setattr(sys, "stdout", io.TextIOWrapper(raw, "utf-8", line_buffering=buffering == 1))
            code, _, err = datm_ray("recipe", "list")
        assert (code, err) == (141, ""), buffering


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", r"92.1\xb11.1"), ("cp1252", "92.1±1.1"), ("utf-8", "±")])
def test_output_is_what_the_stream_can_show(
    encoding: str, expected: str, datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs that the stream lacks become escapes, as bytes of file names do; nothing fails."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    assert datm_ray("recipe", "list")[0] == 0
    print("caf\udce9 →")
    shown.flush()
    content = shown.buffer.getvalue()  # type: ignore[attr-defined]
    assert expected.encode(encoding) in content
    assert rb"caf\udce9 " in content


def test_a_full_disk_under_the_output_is_one_line(datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under standard output is one line and an exit code of failure."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = datm_ray("recipe", "list")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    assert (code, len(err.splitlines())) == (1, 1)
    assert "a disk or a quota is full (OSError: [Errno 28] No space left on device)" in err


def test_the_report_is_written_before_anything_is_printed(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch, finished_run: Path, tmp_path: Path
) -> None:
    """The report is written before anything is printed, so a failing terminal does not lose it."""
    out = shutil.copytree(finished_run, tmp_path / "copy")
    (out / "report.html").unlink()
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patched, open(write, "w", buffering=1, encoding="utf-8") as pipe:
        patched.setattr(sys, "stdout", pipe)
        code, _, _ = datm_ray("run", str(finished_run.parent / "tiny.yaml"), "--executor", "serial", "--out", str(out))
    assert code == 141
    assert (out / "report.html").exists()


def test_a_user_without_a_home_folder_gets_a_temporary_one(
    datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's user without HOME and without an entry of its id can run commands."""
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["uid"])
    monkeypatch.setenv("HOME", "x")
    monkeypatch.delenv("HOME")
    assert datm_ray("run", "digits-ipc1", "--dry-run")[0] == 0
    assert Path.home().is_dir()


def test_a_log_is_followed_into_a_pipe_that_closes(datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`job logs JOB --follow | head` ends silently with the lines read; Ctrl-C gives the usual exit code."""
    from datm_ray.runtime.ray import jobs as ray_jobs

    class Jobs:
        failure: type[BaseException] | None = None

        def __init__(self, _address: str) -> None: ...

        def follow(self, _id: str, show: Callable[[str], None], warn: object) -> None:
            for _ in range(3):
                show("line\n")
            if self.failure:
                raise self.failure

        def command(self, name: str, number: str) -> str:
            return f"{name} {number}"

    monkeypatch.setattr(ray_jobs, "Jobs", Jobs)
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patched, open(write, "w", encoding="utf-8") as pipe:
        patched.setattr(sys, "stdout", pipe)
        assert datm_ray("job", "logs", "here", "--follow")[::2] == (141, "")
    Jobs.failure = KeyboardInterrupt
    code, out, err = datm_ray("job", "logs", "here", "--follow")
    assert (code, out) == (130, "line\n" * 3)
    assert err == "\nThe job keeps running. Follow it again with: logs here\nStop it with: stop here\n"


def keys_in(value: object) -> set[str]:
    """Keys of all objects in a JSON document, except where keys are a user's names."""
    if isinstance(value, list):
        return set().union(*map(keys_in, value))
    if not isinstance(value, dict):
        return set()
    named = ("parts", "recipe", "hours", "clock_hours", "storage_bytes")
    return set(value).union(*(keys_in(each) for key, each in value.items() if key not in named))


def test_lists_and_plans_as_json(datm_ray: CommandLine, finished_run: Path, tmp_path: Path) -> None:
    """--json prints one document with the documented keys and the values of the text."""
    described = ["--cluster", "gpus=64,memory=80GiB,tflops=60"]
    store, recipe = str(finished_run / "experts"), str(finished_run.parent / "tiny.yaml")
    found = {}
    for command, arguments in {
        "recipe list": [],
        "plan": ["digits-ipc1", "digits-ipc10", *described],
        "run --dry-run": [recipe, "-o", str(finished_run), "--executor", "serial", "--set", "name=again"],
        "store ls": [store],
        "store show": [store],
    }.items():
        code, out, err = datm_ray(*command.split(), *arguments, "--json")
        assert (code, err) == (0, ""), command
        found[command] = json.loads(out)
        assert keys_in(found[command]) == documented_keys(command), command
    whole = json.loads(datm_ray("store", "verify", store, "--json")[1])
    assert (whole["experts"], whole["bytes"] > 0, whole["damaged"]) == (2, True, [])
    assert [each["name"] for each in found["plan"]] == ["digits-ipc1", "digits-ipc10"]
    assert set(found["plan"][0]["hours"]) == {"start", "experts", "distillation", "validation", "evaluation"}
    assert [each["count"] for each in found["run --dry-run"]["remaining"]] == [0, 1, 2]
    assert (found["store ls"][0]["experts"], len(found["store show"])) == ([0, 1], 2)
    assert "digits-ipc1" in [each["name"] for each in found["recipe list"]]
    (unknown,) = json.loads(datm_ray("plan", "digits-ipc1", *described[:1], "gpus=1,memory=80GiB", "--json")[1])
    assert unknown["hours"] is None
    out = str(shutil.copytree(finished_run, tmp_path / "copy"))
    (scores,) = json.loads(datm_ray("run", recipe, "-o", out, "--executor", "serial", "--json")[1])
    assert scores["test_accuracy"]["distilled"]["n"] == 2
    assert json.loads(datm_ray("evaluate", recipe, "-o", out, "--executor", "serial", "--json")[1]) == [scores]
    code, out, err = datm_ray("plan", "digits-ipc2", "--json")
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_a_damaged_store_as_json(datm_ray: CommandLine, finished_run: Path, tmp_path: Path) -> None:
    """The JSON of a damaged store has the expert's damage in its place and lists the others."""
    store = shutil.copytree(finished_run / "experts", tmp_path / "experts")
    damaged, *_ = sorted(store.rglob("expert-*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    first, second = json.loads(datm_ray("store", "show", str(store), "--json")[1])
    assert str(damaged) in first["damage"]
    assert second["damage"] is None
    (group,) = json.loads(datm_ray("store", "ls", str(store), "--json")[1])
    assert (group["experts"], group["epochs"]) == ([0, 1], None)
    lines = datm_ray("store", "verify", str(store))[1].splitlines()
    code, out, err = datm_ray("store", "verify", str(store), "--json")
    assert (code, len(err.splitlines())) == (2, 1)
    found = json.loads(out)
    assert keys_in(found) == documented_keys("store verify")
    expected = {"group": group["group"], "file": damaged.name, "damage": lines[0]}
    assert (found["experts"], found["damaged"]) == (2, [expected])
    damaged.unlink()
    (store / group["group"] / "transform.arrow").unlink()
    (missing,) = json.loads(datm_ray("store", "verify", str(store), "--json")[1])["damaged"]
    assert missing["file"] == "transform.arrow"


def test_the_commands_that_print_json_are_documented() -> None:
    """The page on the command line names the commands that have --json, and the page on JSON describes them."""
    having = {name for name, command in all_commands() if any("--json" in each.opts for each in command.params)}
    docs = Path(__file__).parents[2] / "docs"
    section = (docs / "command-line.md").read_text().partition("\n## JSON\n")[2]
    assert set(re.findall(r"`([a-z ]+)`", section.replace("\n", " "))) == having
    assert all(documented_keys(name) for name in having - {"run", "evaluate"})


def all_commands() -> list[tuple[str, Any]]:
    """Every command, as words and as an object."""
    import typer.main

    top: Any = typer.main.get_command(cli.app)
    inner = [(f"{name} {one}", two) for name, each in top.commands.items() for one, two in group_of(each).items()]
    return [("", top), *top.commands.items(), *inner]


def group_of(command: Any) -> dict[str, Any]:
    return getattr(command, "commands", {})


def test_keys_that_the_method_does_not_read_are_noted(datm_ray: CommandLine, tmp_path: Path) -> None:
    """A key of `--set` or of a user's file that the method does not read is named; the base's keys are not."""
    out = ("--dry-run", "--out", str(tmp_path / "out"))
    code, _, err = datm_ray("run", "digits-dm-ipc10", "--set", "distill.threshold=3", *out)
    assert (code, err.splitlines()) == (0, ["Note: method dm does not read distill.threshold"])
    (tmp_path / "mine.yaml").write_text("base: digits-ipc1\nmethod: dm\nrecover: {block: 9}\n")
    code, _, err = datm_ray("run", str(tmp_path / "mine.yaml"), *out)
    assert (code, err.splitlines()) == (0, ["Note: method dm does not read recover"])


def test_every_command_has_the_usual_short_options(datm_ray: CommandLine) -> None:
    """Every command has -h and the usual letters, and help texts that no line cuts off."""
    for name, command in all_commands():
        code, out, err = datm_ray(*name.split(), "-h")
        assert (code, err) == (0, ""), name
        assert out == datm_ray(*name.split(), "--help")[1]
        assert max(map(len, out.splitlines())) <= 80, name
        assert "..." not in out.partition("Commands:")[2], name
        for parameter in command.params:
            letters = {"--out": "-o", "--set": "-s", "--verbose": "-v", "--quiet": "-q"}
            for option, letter in letters.items():
                assert option not in parameter.opts or letter in parameter.opts, (name, option)
            text = getattr(parameter, "help", None) or ""
            assert text[:1].isupper() or text.split()[0] in ("png",), (name, parameter.name, text)
            assert text.endswith("."), (name, parameter.name, text)
    working = ("run", "init", "plan", "experts", "distill", "evaluate", "report", "export", "publish", "job submit")
    working += ("store verify", "store rm", "store import", "store import-teacher", "store export")
    verbose = [name for name, command in all_commands() if any("-v" in each.opts for each in command.params)]
    assert sorted(verbose) == sorted(working)


def test_the_version_has_the_program_s_name(datm_ray: CommandLine) -> None:
    """--version prints the program's name and the version."""
    from datm_ray import __version__

    assert datm_ray("--version") == (0, f"datm-ray {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("datm-ray run digits-ipc1", {"digits-ipc1", "digits-ipc10"}),
        ("datm-ray recipe show tiny-imagenet-ipc1", {"tiny-imagenet-ipc1", "tiny-imagenet-ipc10"}),
        ("datm-ray run digits-ipc1 --set distill.student", {"distill.student_steps="}),
        ("datm-ray plan x -s na", {"name="}),
        ("datm-ray jo", {"job"}),
    ],
)
def test_a_shell_completes_commands_recipes_and_settings(
    words: str, expected: set[str], datm_ray: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bash and zsh complete commands, recipes and settings."""
    monkeypatch.setenv("_DATM_RAY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words.replace(" ", "\n"))
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert set(datm_ray()[1].split()) >= expected
    monkeypatch.setenv("_DATM_RAY_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
    shown = datm_ray()[1]
    assert all(f'"{each}"' in shown for each in expected), shown
