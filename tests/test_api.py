"""Tests the stages as Python calls: their values, and that they equal those of the command line."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import datm_ray
from datm_ray import cli
from datm_ray.api import recipe_of
from datm_ray.config import to_yaml
from datm_ray.errors import ConfigError, DatasetError, MissingExpertsError
from datm_ray.store.trajectories import TrajectoryStore
from tests.conftest import set_of, tiny_config

pytestmark = pytest.mark.usefixtures("without_charts")

Capture = pytest.CaptureFixture[str]
SERIAL: Any = {"executor": "serial", "progress": False}


def test_a_run_returns_its_set_and_scores(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running a finished run returns its set, the table's rows with each network's accuracy, and the report's place."""
    shutil.copytree(finished_run, tmp_path / "runs")
    result = datm_ray.run(tiny_config(), str(tmp_path / "runs"), **SERIAL)
    assert result.name == "tiny"
    assert {row: len(values) for row, values in result.accuracies.items()} == dict.fromkeys(
        ("random-hard", "random-soft", "distilled", "full"), 2
    )
    assert all(0 <= accuracy <= 1 for values in result.accuracies.values() for accuracy in values)
    expected = datm_ray.load(finished_run / "tiny/synthetic.arrow")
    assert torch.equal(result.synthetic.images, expected.images)
    assert Path(result.report).read_text().startswith("<!doctype html>")
    assert result.networks == {}
    assert result.history["iteration"].tolist() == list(range(6))
    assert np.isfinite(result.history["loss"]).all()
    assert result.history["step_size"][-1] > 0
    assert result.history["validation.iteration"].tolist() == [3, 6]
    chosen = int(result.history["validation.chosen_at"])
    assert (
        result.history["validation.accuracy"].max()
        == dict(zip(result.history["validation.iteration"], result.history["validation.accuracy"], strict=True))[chosen]
    )
    described = " ".join(documented(datm_ray.Result, "history").split())

    assert all(f'"{name}"' in described for name in result.history)
    assert capsys.readouterr() == ("", "")


def test_the_code_of_the_reference_runs(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of docs/reference.md names a recipe, settings and results that exist; a finished run stands in."""
    page = (Path(__file__).parents[1] / "docs/reference.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for settings in re.findall(r"settings=(\{.*?\})", code):
        recipe_of("digits-ipc1", ast.literal_eval(settings))
    shutil.copytree(finished_run, tmp_path / "runs/demo")

    def finished(recipe: str, out: str, settings: dict[str, Any]) -> Any:
        assert (recipe, out) == ("digits-ipc1", "runs/demo")
        return run(tiny_config(), out=out, settings=settings, **SERIAL)

    run = datm_ray.run
    monkeypatch.setattr(datm_ray, "run", finished)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    result = names["result"]
    assert capsys.readouterr().out == "".join(
        f"{line}\n"
        for line in (
            f"{result.accuracies['distilled']} {result.synthetic.images.shape}",
            f"{result.history['loss']} {result.history['validation.accuracy']}",
            "{}",
        )
    )
    assert len(result.accuracies["distilled"]) == 2


def documented(of: type, name: str) -> str:
    """Text below a field of a dataclass."""
    return inspect.getsource(of).partition(f"    {name}: ")[2].split('"""')[1]


def test_stages_can_be_called_one_by_one(finished_run: Path, tmp_path: Path) -> None:
    """Each stage returns its own value, or an error if an earlier stage is missing."""
    out, config = str(tmp_path / "runs"), tiny_config()
    with pytest.raises(MissingExpertsError, match="datm-ray experts"):
        datm_ray.distill(config, out, **SERIAL)
    store = datm_ray.train_experts(config, out, **SERIAL)
    assert len(list(Path(store).rglob("expert-*.arrow"))) == config.experts.count
    synthetic = datm_ray.distill(config, out, **SERIAL)
    settings = {"evaluate.seeds": 1, "evaluate.networks": ["lenet"]}
    result = datm_ray.evaluate(config, out, settings=settings, **SERIAL)
    assert torch.equal(result.synthetic.images, synthetic.images)
    assert torch.equal(synthetic.images, set_of(finished_run).images)
    assert len(result.accuracies["distilled"]) == 1
    assert list(result.networks) == ["convnet (width 4)", "lenet"]
    assert all(list(columns) == ["learned", "tuned", "control"] for columns in result.networks.values())
    assert all(0 <= accuracy <= 1 for values in result.networks["lenet"].values() for accuracy in values)


def test_settings_replace_those_of_a_recipe(tmp_path: Path) -> None:
    """Settings replace values of a packaged recipe, file or configuration: numbers, text, booleans, None, lists."""
    settings = {
        "name": "mine",
        "distill.iterations": 7,
        "network.depth": None,
        "cluster.compile": False,
        "dataset.path": "a: b",
        "distill.augmentation": "",
    }
    (tmp_path / "other.yaml").write_text(to_yaml(datm_ray.get_recipe("digits-ipc1")))
    for recipe in ("digits-ipc1", datm_ray.get_recipe("digits-ipc1"), str(tmp_path / "other.yaml")):
        config = recipe_of(recipe, settings)
        assert (config.name, config.distill.iterations, config.network.depth) == ("mine", 7, None)
        assert (config.cluster.compile, config.dataset.path, config.distill.augmentation) == (False, "a: b", "")
    with pytest.raises(ConfigError, match="unknown key 'distil'"):
        recipe_of("digits-ipc1", {"distil.ipc": 3})
    with pytest.raises(ConfigError, match="Did you mean 'digits-ipc1'"):
        datm_ray.run("digits-ipc", str(tmp_path))


def test_a_plan_is_that_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call returns what `datm-ray plan` prints: memory, hours by stage, and a layout for a described cluster."""
    described = "gpus=4,memory=80GiB,tflops=60"
    plan = datm_ray.plan("cifar10-ipc10", {"distill.iterations": 100}, cluster=described)
    changes = ["--set", "distill.iterations=100", "--cluster", described]
    monkeypatch.setattr(sys, "argv", ["datm-ray", "plan", "cifar10-ipc10", *changes, "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out) == [json.loads(json.dumps(plan.to_json()))]
    assert plan.stages["distillation"][0] > 0
    assert str(plan).startswith("cifar10-ipc10: ")
    with pytest.raises(ConfigError, match="neither gpus nor cpus"):
        datm_ray.plan("digits-ipc1", cluster="memory=8GiB")


def test_a_wrong_option_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """A misspelt option would run something else for hours."""
    with pytest.raises(TypeError, match="unknown option 'excutor'"):
        datm_ray.distill(tiny_config(), tmp_path, excutor="serial")  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []


def test_settings_may_be_paths_numbers_of_numpy_and_any_text(tmp_path: Path) -> None:
    """Values need no text form, and errors name the setting."""
    config = recipe_of("digits-ipc1", {"dataset.path": tmp_path / "caf\udce9 😀", "distill.ipc": np.int64(3)})
    assert config.dataset.path == str(tmp_path / "caf\udce9 😀")
    assert config.distill.ipc == 3
    means = np.array([0.5, 0.25])
    for given in (means, torch.from_numpy(means), means.tolist()):
        config = recipe_of("digits-ipc1", {"dataset.mean": given, "dataset.std": given})
        assert (config.dataset.mean, config.dataset.std) == ((0.5, 0.25), (0.5, 0.25))
    with pytest.raises(ConfigError, match=r"settings: distill\.ipc is 'x'"):
        recipe_of("digits-ipc1", {"distill.ipc": "x"})
    (tmp_path / "mine.yaml").write_text("base: digits-ipc1\n")
    assert recipe_of(tmp_path / "mine.yaml").name == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"ipc": ipc}, f"ipc is {ipc!r}. Give a whole number, at least 1.") for ipc in (-1, 0, 1.5, "1", None, True)),
        *(({"minutes": time}, f"minutes is {time!r}.") for time in (math.inf, math.nan, 0, -3, "10", None)),
        *(({"minutes": time}, f"minutes is {time!r}"[:20]) for time in (1e307, 10**400, -(10**400), 1e9 + 1, True)),
        *(({"resize": side}, f"resize is {side!r}.") for side in (0, 1, 7, 16.0, "16")),
    ],
)
def test_impossible_numbers_for_a_recipe_are_refused_before_any_file_is_read(
    options: dict[str, Any], message: str
) -> None:
    """`init` refuses numbers of another type, out of range, without end or too large to compute with."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        datm_ray.init("/no/such/folder", **{"ipc": 1, **options})


def test_numbers_of_numpy_are_numbers_for_a_recipe() -> None:
    """`init` takes numbers of NumPy, and looks for the files."""
    with pytest.raises(DatasetError, match="does not exist"):
        datm_ray.init("/no/such/folder", np.int64(1), np.float32(3), resize=np.int64(8))  # type: ignore[arg-type]


def test_sets_of_several_seeds_share_their_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of docs/methods/scores.md makes a set for each seed from the same experts, and prints their means."""
    page = (Path(__file__).parents[1] / "docs/methods/scores.md").read_text()
    code = page.partition("## Several sets")[2].split("```python\n")[1].split("```")[0]
    seeds = []

    def of_tiny(recipe: str, out: str, settings: dict[str, Any]) -> Any:
        assert recipe == "digits-ipc1"
        seeds.append(settings["seed"])
        return run(
            tiny_config("distill.iterations=1", "distill.validate_every=0", "evaluate.seeds=1", "evaluate.full=false"),
            out=out,
            settings=settings,
            executor="serial",
            progress=False,
        )

    run = datm_ray.run
    monkeypatch.setattr(datm_ray, "run", of_tiny)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert seeds == [0, 1, 2]
    assert len(TrajectoryStore("runs/seeds/experts").groups()) == 1
    images = [datm_ray.load(f"runs/seeds/digits-{seed}/synthetic.arrow").images for seed in seeds]
    assert not torch.equal(images[0], images[1])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "random-hard", "random-soft", "distilled"
    ]  # fmt: skip
